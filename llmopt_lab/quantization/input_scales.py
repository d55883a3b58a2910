"""AWQ and SmoothQuant: scales, and AWQ's clipping, from what a layer's inputs look like.

(x / s) (W s)^T = x W^T for any s > 0, one a channel of the input.
"""

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import tiles
from llmopt_lab.core.trace import record
from llmopt_lab.quantization.gptq import check_hessian, output_error
from llmopt_lab.quantization.records import Quantized, ScaleTried
from llmopt_lab.quantization.reference import (
    check_finite,
    check_weight,
    choose_scales,
    dequantize,
    empty_scales,
    quantize,
    to_codes,
)


@torch.no_grad()
def awq_scales(
    weight: Tensor, mean_abs: Tensor, hessian: Tensor, *, bits: int = 4,
    group_size: int | None = None, symmetric: bool = True, n_grid: int = 20,
) -> Tensor:
    """The s = mean|x|^alpha, of alpha in 0, 1/n_grid .. 1, with the least output error.

    Args:
        weight: (rows, cols).
        mean_abs: (cols,), the mean |x| of each input over the calibration data.
        hessian: (cols, cols), `hessian_of` the same data: measures the output error.
        bits, group_size, symmetric: as for `quantize`.

    Returns:
        (cols,); all 1 where no alpha beats plain rounding. Quantize weight * s, and divide x by s.

    Raises:
        BadInput: as `quantize`, or the statistics do not fit.

    Cost: rows * cols^2 multiply-adds for each of the n_grid + 1 alphas.
    Source: Lin et al. 2023, section 3.2 (https://arxiv.org/abs/2306.00978).
    """
    check_weight(weight, bits, group_size)
    check_hessian(hessian, weight.shape[1])
    check_statistic(mean_abs, weight, "mean_abs")
    require(isinstance(n_grid, int) and n_grid > 0, f"n_grid must be positive; got {n_grid!r}")
    hessian = hessian.to(torch.promote_types(weight.dtype, torch.float32))
    best, best_error = torch.ones_like(weight[0]), torch.inf
    for i in range(n_grid + 1):
        s = mean_abs.to(weight.dtype).clamp_min(1e-4) ** (i / n_grid)
        s = s / (s.max() * s.min()).sqrt()
        q = quantize(weight * s, bits=bits, group_size=group_size, symmetric=symmetric)
        error = output_error(weight, dequantize(q) / s, hessian)
        record(ScaleTried(i / n_grid, error))
        if error < best_error:
            best, best_error = s, error
    return best


@torch.no_grad()
def awq_clip(
    weight: Tensor, hessian: Tensor, *, bits: int = 4, group_size: int | None = None,
    symmetric: bool = True, n_grid: int = 20, least: float = 0.5,
) -> Quantized:
    """Round to nearest with clipped ranges: each row and group takes the ratio of least error.

    The range of a group is shrunk to 1, 1 - 1/n_grid .. `least` of itself. What lies outside is
    clipped, what lies inside gets finer steps; the group's own output error decides.

    Args, returns and errors as `quantize` and `awq_scales`.

    Cost: rows * cols * group_size multiply-adds a ratio.
    Source: Lin et al. 2023 (AWQ), the authors' code (auto_clip), which measures on sampled rows.
    """
    check_weight(weight, bits, group_size)
    rows, n_cols = weight.shape
    check_hessian(hessian, n_cols)
    require(0 < least <= 1, f"least must lie in (0, 1]; got {least}")
    group_size = group_size or n_cols
    codes = torch.empty(rows, n_cols, dtype=torch.int8, device=weight.device)
    scales, zeros = empty_scales(weight, group_size, symmetric)
    for group, cols in enumerate(tiles(n_cols, group_size)):
        tile = weight[:, cols].to(scales.dtype)
        h = hessian[cols, cols].to(scales.dtype)
        best = torch.full((rows,), torch.inf, dtype=scales.dtype, device=weight.device)
        for i in range(round(n_grid * (1 - least)) + 1):
            scale, zero = choose_scales(tile * (1 - i / n_grid), bits, symmetric)
            tried = to_codes(tile, scale, zero, bits)
            off = tile - (tried - (0 if zero is None else zero[:, None])) * scale[:, None]
            error = (off @ h * off).sum(1)
            better = error < best
            best = torch.where(better, error, best)
            codes[better, cols] = tried[better]
            scales[better, group] = scale[better]
            if zeros is not None:
                zeros[better, group] = zero[better]
    return Quantized(codes, scales, zeros, bits, group_size)


@torch.no_grad()
def smooth_scales(weight: Tensor, max_abs: Tensor, *, alpha: float = 0.5) -> Tensor:
    """SmoothQuant's s = max|x|^alpha / max|w|^(1-alpha), (cols,): outliers move into the weight.

    Args:
        weight: (rows, cols).
        max_abs: (cols,), the largest |x| of each input over the calibration data.
        alpha: 0 leaves everything to the activations, 1 to the weights.

    Source: Xiao et al. 2022, equation 4 (https://arxiv.org/abs/2211.10438).
    """
    check_weight(weight, 8, None)
    check_statistic(max_abs, weight, "max_abs")
    require(0 <= alpha <= 1, f"alpha must lie in [0, 1]; got {alpha}")
    x, w = (m.clamp_min(1e-5) for m in (max_abs.to(weight.dtype), weight.abs().amax(0)))
    return x**alpha / w ** (1 - alpha)


def check_statistic(value: Tensor, weight: Tensor, name: str) -> None:
    require(
        value.shape == weight.shape[1:] and bool((value >= 0).all()),
        f"{name} must be ({weight.shape[1]},) and not negative; got {tuple(value.shape)}",
    )
    check_finite(value, name)
