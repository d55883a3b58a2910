"""Four bits as a table of 16 values: MXFP4, NVFP4 and NF4, each with the scales of its blocks.

weight[r, c] = table[codes[r, c]] * scale of the block of c. The table is not evenly spaced, so it
has no zero point and its codes are no integers to multiply: they are looked up.
"""

from functools import cache

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import ceil_div, load, store, tiles
from llmopt_lab.core.trace import record
from llmopt_lab.quantization.records import BlockCoded, GroupScaled
from llmopt_lab.quantization.reference import FP8_MAX, check_weight, pack_int4, unpack_int4

# e2m1: 1 bit of sign, 2 of exponent, 1 of mantissa; code 8 + i is minus code i
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX, E2M1_MAX_EXPONENT = 6.0, 2
BLOCK = {"mxfp4": 32, "nvfp4": 16, "nf4": 64}   # columns that share a scale
FORMATS = tuple(BLOCK)
SCALES_A_BLOCK = 256    # NF4's double quantization: scales that share a second one


@torch.no_grad()
def quantize_blocks(weight: Tensor, kind: str, *, double: bool = True) -> BlockCoded:
    """Round every weight to the nearest value of the format's table times its block's scale.

    Args:
        weight: (rows, cols), floating, finite. The last block of a row may be shorter.
        kind:
            "mxfp4"  e2m1, blocks of 32, scale 2^(floor(log2 absmax) - 2) as float8 e8m0. A weight
                     beyond 6 scales becomes 6 scales.
            "nvfp4"  e2m1, blocks of 16, scale absmax / 6 as float8 e4m3, and one float32 scale a
                     matrix that makes the largest of them 448.
            "nf4"    16 quantiles of the normal distribution, blocks of 64, scale absmax.
        double: of NF4, hold the scales in float8 e4m3 less their mean, 256 of them with a float32
            scale of their own.

    Returns:
        Codes 0 to 15 and scales. A block of zeros comes back as zeros.

    Raises:
        BadInput: a shape, dtype or kind that does not fit, NaN or infinity.

    Memory: 4 bits a weight and 0.25 (MXFP4), 0.5 (NVFP4), 0.5 or with `double` 0.127 (NF4) more.
    Sources: OCP Microscaling Formats v1.0, sections 5.2, 5.3 and 6.3 (opencompute.org); NVIDIA
    2025, Pretraining LLMs with NVFP4 (https://arxiv.org/abs/2509.25149), for NVFP4's scales;
    Dettmers et al. 2023, QLoRA, section 3 (https://arxiv.org/abs/2305.14314), which rounds the
    weights with the scales before those are rounded.
    """
    check_weight(weight, 4, None)
    require(kind in FORMATS, f"kind is one of {', '.join(FORMATS)}; got {kind!r}")
    rows, n_cols = weight.shape
    wide = torch.promote_types(weight.dtype, torch.float32)
    largest = weight.new_empty(rows, ceil_div(n_cols, BLOCK[kind]), dtype=wide)
    every = slice(0, rows)
    for block, cols in enumerate(tiles(n_cols, BLOCK[kind])):
        largest[:, block] = load("W", weight, (every, cols)).abs().amax(1)
    stored, second, mean = _stored_scales(largest, kind, double)
    q = BlockCoded(
        torch.empty(rows, n_cols, dtype=torch.uint8, device=weight.device),
        stored, second, mean, kind,
    )  # fmt: skip
    scales = block_scales(q)
    for block, cols in enumerate(tiles(n_cols, BLOCK[kind])):
        scale = torch.where(scales[:, block] > 0, scales[:, block], 1)      # 0 / 0 is NaN
        record(GroupScaled(cols, scale, None))
        tile = load("W", weight, (every, cols)).to(scales.dtype)
        codes = nearest(tile / scale[:, None], table_of(kind).to(scales))
        store("codes", q.codes, (every, cols), codes)
    return q


def _stored_scales(
    largest: Tensor, kind: str, double: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What is kept of the scales: as the format holds them, their own scales, their mean."""
    if kind == "mxfp4":
        # e8m0 holds 2^-127 to 2^127; frexp's exponent is one more than the floor of log2
        exponent = torch.frexp(largest).exponent - 1 - E2M1_MAX_EXPONENT
        exponent = torch.where(largest > 0, exponent, -127).clamp(-127, 127)
        return (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu), None, None
    if kind == "nvfp4":
        second = largest.max() / (E2M1_MAX * FP8_MAX)
        second = torch.where(second < torch.finfo(torch.float32).tiny, 1, second).float()
        scales = largest / E2M1_MAX / second
        # a block that is not zero keeps a scale: e4m3's least is 2^-9
        scales = torch.where(largest > 0, scales.clamp(2.0**-9, FP8_MAX), 0)
        return scales.to(torch.float8_e4m3fn), second, None
    if not double:
        return largest.float(), None, None
    mean = largest.double().mean().float()
    centred = (largest - mean).flatten()
    groups = torch.nn.functional.pad(centred, (0, -len(centred) % SCALES_A_BLOCK))
    groups = groups.view(-1, SCALES_A_BLOCK)
    second = (groups.abs().amax(1) / FP8_MAX).float()
    second = torch.where(second < torch.finfo(torch.float32).tiny, 1, second)
    codes = (groups / second[:, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.flatten()[: len(centred)].view(largest.shape), second, mean


def block_scales(q: BlockCoded) -> Tensor:
    """The scale of every block as it multiplies, (rows, n_blocks) float32."""
    scales = q.scales.float()
    if q.mean is not None:
        second = q.second.repeat_interleave(SCALES_A_BLOCK)[: scales.numel()]
        return (scales * second.view(scales.shape) + q.mean).clamp_min(0)
    return scales if q.second is None else scales * q.second


def dequantize_blocks(q: BlockCoded) -> Tensor:
    """The matrix that codes and scales stand for, (rows, cols) float32."""
    block = torch.arange(q.codes.shape[1], device=q.codes.device) // BLOCK[q.kind]
    table = table_of(q.kind).to(q.codes.device).float()
    return table[q.codes.long()] * block_scales(q)[:, block]


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """The code of the nearest value of `table` (16,) for every x, uint8; beyond the ends, the end.

    Of two equally near values the code with an even number wins, which for e2m1 is the even
    mantissa, as IEEE rounding has it. Code 8 of e2m1, minus zero, is never chosen.
    """
    order = table.argsort(stable=True)
    values = table[order]
    keep = torch.ones_like(values, dtype=torch.bool)
    keep[1:] = values[1:] != values[:-1]        # minus zero stands after zero
    values, order = values[keep], order[keep]
    middle = (values[1:] + values[:-1]) / 2
    below = torch.searchsorted(middle, x.contiguous())      # x on a middle: the lower of both
    on_it = below < len(middle)
    tie = on_it & (x == middle[below.clamp(max=len(middle) - 1)])
    up = tie & (order[below] % 2 == 1)
    return order[below + up.long()].to(torch.uint8)


def table_of(kind: str) -> Tensor:
    """The 16 values that the codes 0 to 15 stand for, float64."""
    if kind == "nf4":
        return normal_float_4()
    positive = torch.tensor(E2M1, dtype=torch.float64)
    return torch.cat((positive, -positive))


@cache
def normal_float_4() -> Tensor:
    """NF4's values, from -1 to 1, (16,) float64, 0 among them.

    Quantiles of the normal distribution at evenly spaced probabilities, eight for the positive and
    seven for the negative side, so that 0 is exact; divided by the largest.
    Source: Dettmers et al. 2023, section 3 and appendix E (https://arxiv.org/abs/2305.14314).
    """
    end = 0.5 * (1 / 32 + 1 / 30)               # probability beyond the last value
    positive = torch.linspace(1 - end, 0.5, 9, dtype=torch.float64)[:-1]
    negative = torch.linspace(1 - end, 0.5, 8, dtype=torch.float64)[:-1]
    values = torch.cat((
        torch.special.ndtri(positive), torch.zeros(1, dtype=torch.float64),
        -torch.special.ndtri(negative),
    )).sort().values  # fmt: skip
    return values / values[-1]


def pack_blocks(codes: Tensor) -> Tensor:
    """Two codes (0 to 15) a byte, the even column in the low half, as `pack_int4` does."""
    signed = codes.to(torch.int8)
    return pack_int4(torch.where(signed > 7, signed - 16, signed))


def unpack_blocks(packed: Tensor, n: int) -> Tensor:
    """The `n` codes a row, uint8, that `pack_blocks` packed."""
    return (unpack_int4(packed, n) & 0xF).to(torch.uint8)


def bits_per_weight_of_blocks(q: BlockCoded) -> float:
    """Bits a weight takes with its share of all scales."""
    extra = sum(8 * t.nbytes for t in (q.scales, q.second, q.mean) if t is not None)
    return 4 + extra / q.codes.numel()
