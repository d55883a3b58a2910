"""GPTQ: round column by column, and let the columns still to come make good each error."""

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import load, store, tiles
from llmopt_lab.core.trace import record
from llmopt_lab.quantization.records import ColumnQuantized, GroupScaled, Quantized, TileFinished
from llmopt_lab.quantization.reference import (
    check_finite,
    check_weight,
    choose_scales,
    empty_scales,
    to_codes,
)


def hessian_of(x: Tensor) -> Tensor:
    """2 X^T X in float64, (d_in, d_in), of a layer's inputs `x` (.., d_in): of its output error."""
    check_finite(x, "x")
    rows = x.reshape(-1, x.shape[-1]).double()
    return 2 * rows.T @ rows


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper U with U^T U = (H + damping * mean(diag H) * 1)^-1.

    Raises:
        BadInput: H is not positive definite even with the damping.
    """
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    damped = hessian + damping * hessian.diagonal().mean() * eye
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    require(
        not failed,
        f"the Hessian is singular with damping {damping}: an input is always 0, or there are fewer "
        "calibration rows than inputs. Use damping 0.01 or more, or more calibration data.",
    )
    return upper


@torch.no_grad()
def gptq(
    weight: Tensor, hessian: Tensor, *, bits: int = 4, group_size: int | None = None,
    symmetric: bool = True, damping: float = 0.01, act_order: bool = False, tile: int = 128,
) -> Quantized:
    """Quantize so that the layer's output, not its weight, changes little.

    Args:
        weight: (rows, cols), floating, finite.
        hessian: (cols, cols), `hessian_of` the layer's inputs.
        bits, group_size, symmetric: as for `quantize`. A group's scales are chosen when its first
            column is reached, from the weights as compensated by then.
        damping: share of the mean diagonal that is added to the diagonal.
        act_order: take the columns by falling diagonal of H; every group then keeps the scales of
            the original weights, so that the groups stay contiguous.
        tile: columns whose errors are gathered before the columns behind them are touched;
            `group_size` instead where groups choose their scales on the way. Changes no result
            beyond rounding.

    Returns:
        As `quantize`.

    Raises:
        BadInput: as `quantize`; the Hessian does not fit, or is singular.

    Cost: rows * cols^2 multiply-adds and one Cholesky factor of (cols, cols), in float64.
    Source: Frantar et al. 2022, Algorithm 1 (https://arxiv.org/abs/2210.17323).
    """
    check_weight(weight, bits, group_size)
    rows, n_cols = weight.shape
    check_hessian(hessian, n_cols, damping, tile)
    group_size = group_size or n_cols
    on_the_way = group_size < n_cols and not act_order
    order = torch.arange(n_cols, device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    every, w = slice(0, rows), weight.double()[:, order]
    upper = inverse_factor(hessian.double()[order][:, order], damping)
    codes = torch.empty(rows, n_cols, dtype=torch.int8, device=weight.device)
    scales, zeros = empty_scales(weight, group_size, symmetric)

    def scale_group(cols: slice, block: Tensor) -> None:
        group = cols.start // group_size
        scale, zero = choose_scales(block.to(scales.dtype), bits, symmetric)
        scales[:, group] = scale
        if zeros is not None:
            zeros[:, group] = zero
        record(GroupScaled(cols, scale, zero))

    if not on_the_way:
        for cols in tiles(n_cols, group_size):
            scale_group(cols, weight[:, cols])
    for steps in tiles(n_cols, group_size if on_the_way else tile):
        block = load("W", w, (every, steps)).clone()                # (rows, tile)
        scaled_errors = torch.zeros_like(block)
        if on_the_way:
            scale_group(steps, block)
        for step in range(steps.start, steps.stop):
            here, column = step - steps.start, int(order[step])
            scale = scales[:, column // group_size]
            zero = None if zeros is None else zeros[:, column // group_size]
            code = to_codes(block[:, here, None], scale, zero, bits)[:, 0]
            rounded = (code.double() - (0 if zero is None else zero)) * scale
            error = block[:, here] - rounded                        # (rows,)
            scaled_errors[:, here] = error / upper[step, step]
            spread = torch.outer(scaled_errors[:, here], upper[step, step + 1 : steps.stop])
            block[:, here + 1 :] -= spread
            store("codes", codes, (every, column), code)
            record(ColumnQuantized(step, column, code, error, spread))
        behind = slice(steps.stop, n_cols)
        if behind.start < n_cols:
            spread = scaled_errors @ upper[steps, behind]
            store("W", w, (every, behind), load("W", w, (every, behind)) - spread)
            record(TileFinished(steps, spread))
    return Quantized(codes, scales, zeros, bits, group_size)


def output_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """Squared error of the layer's output over the calibration rows: tr(D H D^T) / 2."""
    d = (weight - approximation).to(hessian.dtype)
    return float((d @ hessian * d).sum() / 2)


def check_hessian(hessian: Tensor, n_cols: int, damping: float = 0.0, tile: int = 1) -> None:
    require(
        hessian.shape == (n_cols, n_cols),
        f"the Hessian of {n_cols} inputs is ({n_cols}, {n_cols}); got {tuple(hessian.shape)}",
    )
    check_finite(hessian, "hessian")
    require(damping >= 0, f"damping must not be negative; got {damping}")
    require(isinstance(tile, int) and tile > 0, f"tile must be a positive int; got {tile!r}")
