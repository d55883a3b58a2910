"""Quantization in plain PyTorch: scales, rounding, packing, fake quantization, fp8, KV cache."""

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import ceil_div, load, store, tiles
from llmopt_lab.core.trace import record
from llmopt_lab.quantization.records import GroupScaled, Quantized

FP8_MAX = 448.0     # the largest float8_e4m3fn


@torch.no_grad()
def quantize(
    weight: Tensor, *, bits: int = 8, group_size: int | None = None, symmetric: bool = True,
    per_tensor: bool = False,
) -> Quantized:
    """Round every weight to the nearest code (RTN).

    Args:
        weight: (rows, cols), floating, finite.
        bits: 2 to 8.
        group_size: columns of a row that share a scale; the whole row (one scale a channel) if
            None. The last group of a row may be shorter.
        symmetric: scale = absmax / (2^(bits-1) - 1), and code 0 is 0. Else the codes cover
            [min(0, least), max(0, greatest)] and a zero point says which code is 0.
        per_tensor: one scale for the whole matrix; excludes `group_size`.

    Returns:
        Codes and scales, float32 or wider. A group of zeros has scale 1 and codes of zero.

    Raises:
        BadInput: shape, dtype, bits or group size do not fit, or a weight is NaN or infinite.

    Error: at most scale / 2 a weight. Memory traffic: the weight is read once; one byte a code is
    written. Source: Nagel et al. 2021, section 2 (https://arxiv.org/abs/2106.08295).
    """
    check_weight(weight, bits, group_size)
    require(
        not (per_tensor and group_size), "per_tensor has one scale: leave group_size out"
    )
    rows, n_cols = weight.shape
    group_size = group_size or n_cols
    codes = torch.empty(rows, n_cols, dtype=torch.int8, device=weight.device)
    scales, zeros = empty_scales(weight, group_size, symmetric)
    if per_tensor:
        scales, zeros = scales[:1], None if zeros is None else zeros[:1]
    for group, cols in enumerate(tiles(n_cols, group_size)):
        tile = load("W", weight, (slice(0, rows), cols)).to(scales.dtype)
        seen = tile.flatten()[None] if per_tensor else tile
        scale, zero = choose_scales(seen, bits, symmetric)
        scales[:, group] = scale
        if zeros is not None:
            zeros[:, group] = zero
        record(GroupScaled(cols, scale, zero))
        store("codes", codes, (slice(0, rows), cols), to_codes(tile, scale, zero, bits))
    return Quantized(codes, scales, zeros, bits, group_size)


def choose_scales(tile: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of every row of `tile`, (rows, cols): (rows,), and (rows,) or None."""
    low, high = code_range(bits)
    if symmetric:
        scale, zero = tile.abs().amax(1) / high, None
    else:
        least, greatest = tile.amin(1).clamp(max=0), tile.amax(1).clamp(min=0)
        scale = (greatest - least) / (high - low)
    scale = torch.where(scale < torch.finfo(scale.dtype).tiny, 1, scale)    # all zero: 0/0 is NaN
    if not symmetric:
        zero = (low - (least / scale).round()).to(torch.int16)
    return scale, zero


def to_codes(tile: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """The nearest codes of `tile`, (rows, cols), given a scale and zero point of each row."""
    codes = (tile / scale[:, None]).round() + (0 if zero is None else zero[:, None])
    return codes.clamp(*code_range(bits)).to(torch.int8)


def dequantize(q: Quantized) -> Tensor:
    """The matrix that the codes stand for, (rows, cols), in the dtype of the scales.

    Raises:
        BadInput: a scale is not positive and finite, or the number of groups does not fit.
    """
    n_cols = q.codes.shape[1]
    n_groups = ceil_div(n_cols, q.group_size)
    require(
        q.scales.ndim == 2 and q.scales.shape[1] == n_groups
        and len(q.scales) in (1, len(q.codes)),
        f"{n_cols} columns in groups of {q.group_size} need scales (rows, {n_groups}); "
        f"got {tuple(q.scales.shape)}",
    )
    require(
        bool((q.scales.isfinite() & (q.scales > 0)).all()),
        "scales must be positive and finite; quantize gives a group of zeros the scale 1",
    )
    group = torch.arange(n_cols, device=q.codes.device) // q.group_size
    codes = q.codes.to(q.scales.dtype)
    if q.zeros is not None:
        codes = codes - q.zeros[:, group]
    return codes * q.scales[:, group]


def pack_int4(codes: Tensor) -> Tensor:
    """Two codes a byte, the even column in the low half: (.., n) to (.., ceil(n / 2)) uint8.

    An odd row is padded with a zero code.

    Raises:
        BadInput: not int8, or a code outside [-8, 8).
    """
    require(codes.dtype == torch.int8, f"codes must be int8; got {codes.dtype}")
    require(
        codes.ndim > 0 and codes.numel() > 0, f"codes must not be empty; got {tuple(codes.shape)}"
    )
    low, high = int(codes.min()), int(codes.max())
    require(-8 <= low and high < 8, f"4-bit codes lie in [-8, 8); got {low} to {high}")
    nibbles = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2)) & 0xF    # or -1 fills both
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).view(torch.uint8)


def unpack_int4(packed: Tensor, n: int) -> Tensor:
    """The `n` int8 codes a row that `pack_int4` packed.

    Raises:
        BadInput: not uint8, or `n` codes do not take that many bytes.
    """
    require(packed.dtype == torch.uint8, f"packed codes must be uint8; got {packed.dtype}")
    require(
        packed.ndim > 0 and ceil_div(n, 2) == packed.shape[-1],
        f"{n} codes take {ceil_div(n, 2)} bytes a row; got {tuple(packed.shape)}",
    )
    nibbles = torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2)[..., :n].to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def bits_per_weight(q: Quantized, *, scale_bits: int = 16) -> float:
    """Bits a weight takes with its share of scales and zero points (`bits` bits each)."""
    extra = scale_bits + (0 if q.zeros is None else q.bits)
    return q.bits + q.scales.numel() * extra / q.codes.numel()


class StraightThrough(torch.autograd.Function):
    """Quantize and dequantize; the gradient passes as if nothing had happened.

    `choose_scales` covers the largest weight of a group, so no weight is outside the clip range.
    """

    @staticmethod
    def forward(ctx, weight, bits, group_size, symmetric):
        q = quantize(weight, bits=bits, group_size=group_size, symmetric=symmetric)
        return dequantize(q).to(weight.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None


def fake_quantize(
    weight: Tensor, *, bits: int = 8, group_size: int | None = None, symmetric: bool = True
) -> Tensor:
    """`weight` rounded as by `quantize`, with gradient 1: round itself has gradient 0.

    Arguments and errors as `quantize`. Source: Bengio et al. 2013 (https://arxiv.org/abs/1308.3432).
    """
    return StraightThrough.apply(weight, bits, group_size, symmetric)


@torch.no_grad()
def quantize_rows(x: Tensor, *, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Activations by token: int8 codes like `x` (.., d), and scales (.., 1)."""
    require(x.ndim > 0 and x.numel() > 0, f"x must not be empty; got {tuple(x.shape)}")
    q = quantize(x.reshape(-1, x.shape[-1]), bits=bits)
    return q.codes.view(x.shape), q.scales.view(*x.shape[:-1], 1)


@torch.no_grad()
def quantize_fp8(x: Tensor, *, per_row: bool = False) -> tuple[Tensor, Tensor]:
    """`x` in float8 e4m3 and its scale: x = x8.float() * scale. Scales (..,1) or ().

    Raises:
        BadInput: not floating, empty, NaN or infinite.

    Error: at most 1/16 of a value that is normal after scaling. Source: Micikevicius et al. 2022
    (https://arxiv.org/abs/2209.05433).
    """
    check_finite(x, "x")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = wide.abs().amax(-1, keepdim=True) if per_row else wide.abs().amax()
    scale = largest / FP8_MAX
    scale = torch.where(scale < torch.finfo(scale.dtype).tiny, 1, scale)
    return (wide / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


@torch.no_grad()
def quantize_kv(k: Tensor, v: Tensor, *, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Keys and values (.., n, d) as they come back from a `bits`-bit cache, same shape and dtype.

    Keys have outlier channels, so a key channel has its scale over all n tokens; a value has its
    scale by token. Both are asymmetric.
    Source: Liu et al. 2024, KIVI (https://arxiv.org/abs/2402.02750), section 3, one group.
    """
    for name, x in (("k", k), ("v", v)):
        check_finite(x, name)
        require(x.ndim >= 2, f"{name} must be (.., n, d); got {tuple(x.shape)}")

    def back(x: Tensor) -> Tensor:
        q = quantize(x.reshape(-1, x.shape[-1]), bits=bits, symmetric=False)
        return dequantize(q).view(x.shape).to(x.dtype)

    return back(k.mT).mT, back(v)


def code_range(bits: int) -> tuple[int, int]:
    """The least and the greatest code."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


def empty_scales(weight: Tensor, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Room for a scale and a zero point of each row and group; half precision gets float32."""
    shape = (len(weight), ceil_div(weight.shape[1], group_size))
    scales = weight.new_empty(shape, dtype=torch.promote_types(weight.dtype, torch.float32))
    return scales, None if symmetric else torch.empty_like(scales, dtype=torch.int16)


def check_finite(x: Tensor, name: str) -> None:
    require(x.is_floating_point(), f"{name} must be floating; got {x.dtype}")
    require(x.numel() > 0, f"{name} must not be empty; got {tuple(x.shape)}")
    require(bool(x.isfinite().all()), f"{name} holds NaN or infinity: find out where it comes from")


def check_weight(weight: Tensor, bits: int, group_size: int | None) -> None:
    """Refuse bad input before any work."""
    require(weight.ndim == 2, f"weight must be (rows, cols); got {tuple(weight.shape)}")
    check_finite(weight, "weight")
    require(isinstance(bits, int) and 2 <= bits <= 8, f"bits must be 2 to 8; got {bits!r}")
    require(
        group_size is None or isinstance(group_size, int) and group_size > 0,
        f"group_size must be a positive int, or None for a whole row; got {group_size!r}",
    )
