"""Quantized linear layers in Triton: 4-bit weights, int8 and fp8 products, and the rounding.

W4A16 is about bytes: with one token, a weight is read once and used once, so the least time is the
packed bytes over the read bandwidth, and few instructions may be spent on a weight. The layout is
made for that. A 16-bit word holds the codes of one row at columns q, q + 32, q + 64 and q + 96 of
a block of 128; the words of a row and block are 64 bytes in a row. So what a thread reads as a
pair of words becomes, by one shift and one `lop3`, the pair of bf16 weights that a tensor core
wants there: no weight moves between threads. Scales apply to sums of a group, not to weights.

W8A8 and fp8 are about arithmetic: codes times codes on tensor cores, one scale a token and one a
row of the weight on the result.

Every sum has one order, so two runs give the same bits. None of these functions has a gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llmopt_lab.core.device import gpu_facts, interpreting, prepare_triton
from llmopt_lab.core.errors import require
from llmopt_lab.core.launch import (
    allow_descriptors,
    check_dtype,
    dependent_launch,
    jit,
    precision_of,
)
from llmopt_lab.core.memory import ceil_div
from llmopt_lab.quantization.records import Quantized

prepare_triton()

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BLOCK = tl.constexpr(128)           # columns of a block of the packed layout
SLICE = tl.constexpr(32)            # columns of a slice: nibble j of a word is of slice j
FP8_MAX = tl.constexpr(448.0)       # the largest float8_e4m3fn
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
MAX_INT8_COLS = 1 << 17             # 2^17 products of two int8 fit an int32
MAX_ROW_STRIDE = 1 << 24            # elements

# A pair of words, one in each half of a register, into the pair of weights of slice j. A code in
# the last bits of 128.0 (fp16: 1024.0) makes 128 + code; adding $2 = -(128 + 8 + zero) is exact.
_UNPACK = """{
    .reg .b32 pair, one;
    mov.b32 one, ONE;
    shr.u32 pair, $1, SHIFT;
    lop3.b32 pair, pair, 0x000F000F, BASE, 0xEA;
    fma.rn.TYPE $0, pair, one, $2;
}"""
_BF16 = _UNPACK.replace("TYPE", "bf16x2").replace("BASE", "0x43004300").replace("ONE", "0x3F803F80")
_FP16 = _UNPACK.replace("TYPE", "f16x2").replace("BASE", "0x64006400").replace("ONE", "0x3C003C00")
UNPACK_BF16 = tl.constexpr(tuple(_BF16.replace("SHIFT", str(4 * j)) for j in range(4)))
UNPACK_FP16 = tl.constexpr(tuple(_FP16.replace("SHIFT", str(4 * j)) for j in range(4)))
# the four bits below the exponent of 1.0, in one instruction
SIXTEENTHS = tl.constexpr("lop3.b32 $0, $1, 0x00780000, 0x3F800000, 0xEA;")


# --- 4-bit weights: the offline layout


def pack_for_kernel(
    q: Quantized, *, scale_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The layout that `w4a16_linear` reads, made once from 4-bit (or narrower) codes.

    Args:
        q: codes (rows, cols) int8 in [-8, 8) with their scales; group_size a multiple of 32, or
            one group a row, or one scale a matrix.
        scale_dtype: round the scales to it, as checkpoints do; None keeps theirs (float32 at most).

    Returns:
        packed: (ceil(cols / 128), rows, 32) int16. Word q of block b holds, from its lowest bits
            up, the codes + 8 of columns 128 b + q + 0, 32, 64 and 96. Columns past the end hold 8.
        scales: (ceil(cols / 128), rows), one a block, if groups are whole blocks (longer groups
            repeat theirs); else one a slice of 32 columns, (4 * ceil(cols / 128), rows).
        zeros: like scales, int16; None for symmetric codes.

    Raises:
        BadInput: more than 4 bits, another group size, or shapes that do not fit.

    Memory: 4 bits a weight, and a scale (and zero) for each 128 or 32 of a row.
    """
    require(q.bits <= 4, f"w4a16_linear takes codes of 2 to 4 bits; got {q.bits}")
    require(
        q.codes.ndim == 2 and q.codes.dtype == torch.int8 and q.codes.numel() > 0,
        f"codes must be (rows, cols) int8; got {tuple(q.codes.shape)} {q.codes.dtype}",
    )
    low, high = int(q.codes.min()), int(q.codes.max())
    require(-8 <= low and high < 8, f"4-bit codes lie in [-8, 8); got {low} to {high}")
    n_rows, n_cols = q.codes.shape
    n_groups = ceil_div(n_cols, q.group_size)
    require(
        q.scales.ndim == 2 and q.scales.shape[1] == n_groups and len(q.scales) in (1, n_rows),
        f"{n_cols} columns in groups of {q.group_size} need scales ({n_rows}, {n_groups}); "
        f"got {tuple(q.scales.shape)}",
    )
    require(
        q.zeros is None or q.zeros.shape == q.scales.shape and q.zeros.dtype == torch.int16,
        "zeros must be int16 and have the shape of the scales",
    )
    require(
        n_groups == 1 or q.group_size % 32 == 0,
        f"group_size must be a multiple of 32, or one group a row; got {q.group_size}",
    )
    n_blocks = ceil_div(n_cols, 128)
    codes = torch.nn.functional.pad(q.codes, (0, 128 * n_blocks - n_cols)).int() + 8
    nibbles = codes.view(n_rows, n_blocks, 4, 32) << torch.arange(
        0, 16, 4, device=codes.device, dtype=torch.int32
    ).view(4, 1)
    packed = nibbles.sum(2).to(torch.int16).transpose(0, 1).contiguous()
    width = 128 if n_groups == 1 or q.group_size % 128 == 0 else 32
    first = torch.arange(0, 128 * n_blocks, width, device=codes.device)     # column of each scale

    def spread(x: Tensor, past: int) -> Tensor:
        """One value a block or slice; `past` where it begins past the last column."""
        x = x.expand(n_rows, n_groups)[:, (first // q.group_size).clamp(max=n_groups - 1)]
        return torch.where(first < n_cols, x, past).T.contiguous()

    scale_dtype = scale_dtype or torch.promote_types(torch.float16, q.scales.dtype)
    scales = spread(q.scales, 1).to(torch.float32 if scale_dtype == torch.float64 else scale_dtype)
    return packed, scales, None if q.zeros is None else spread(q.zeros, 0).to(torch.int16)


# --- 4-bit weights: one token


@jit
def _sixteenths(word, shift: tl.constexpr, LOP3: tl.constexpr):
    """1 + code / 16 as float32, of the code at bit 19 - shift of each 32-bit word."""
    if shift >= 0:
        moved = word << shift
    else:
        moved = word >> -shift
    if LOP3:
        bits = tl.inline_asm_elementwise(
            SIXTEENTHS, "=r,r", [moved], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        bits = moved & 0x00780000 | 0x3F800000
    return bits.to(tl.float32, bitcast=True)


@jit
def _one_token_kernel(
    x_ptr,                          # (n_cols,)
    packed_ptr,                     # (n_blocks, n_rows, 16) pairs of words, int32
    scale_ptr, zero_ptr,            # (n_blocks or 4 n_blocks, n_rows)
    out_ptr,                        # (n_rows,)
    n_cols, n_rows, n_blocks,
    HAS_ZEROS: tl.constexpr, PER_SLICE: tl.constexpr,   # whether each slice has a scale of its own
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
    LOP3: tl.constexpr, PDL: tl.constexpr,
):
    """One program: ROWS outputs. A thread reads 16 bytes (a chunk: 8 columns of each slice) of
    every row, and keeps a sum of its own to the end.

    Weights are taken as 1 + code / 16, which needs no subtraction:
    sum(x (code - 8 - zero)) = 16 (sum(x (1 + code / 16)) - (1.5 + zero / 16) sum(x)).
    """
    if PDL:
        gdc_wait()
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)                    # (ROWS,)
    row = tl.minimum(n, n_rows - 1)                                     # rows past the end: again
    of_thread = tl.arange(0, 8)
    pair = tl.arange(0, 4)
    acc = tl.zeros((CHUNKS, ROWS), tl.float32)
    for first in tl.range(0, n_blocks * 4, CHUNKS, num_stages=STAGES):
        chunk = first + tl.arange(0, CHUNKS)                            # (CHUNKS,)
        block = chunk // 4
        ok = (block < n_blocks)[:, None]
        at = (block.to(tl.int64) * n_rows)[:, None] + row[None, :]      # (CHUNKS, ROWS)
        scale = tl.zeros((CHUNKS, ROWS), tl.float32)
        zero = tl.zeros((CHUNKS, ROWS), tl.float32)
        if not PER_SLICE:
            scale = tl.load(scale_ptr + at, ok, other=0.0).to(tl.float32)
            if HAS_ZEROS:
                zero = tl.load(zero_ptr + at, ok, other=0).to(tl.float32)
        words = packed_ptr + at[:, :, None] * 16 + (chunk % 4 * 4)[:, None, None] + pair
        word = tl.load(words, ok[:, :, None], other=0, cache_modifier=".cg")    # (CHUNKS, ROWS, 4)
        col = (block * BLOCK + chunk % 4 * 8)[:, None] + of_thread      # (CHUNKS, 8)
        part = tl.zeros((CHUNKS, ROWS, 4), tl.float32)
        x_sum = tl.zeros((CHUNKS,), tl.float32)
        for j in tl.static_range(4):
            x = tl.load(x_ptr + col + SLICE * j, col + SLICE * j < n_cols, other=0.0)
            x = x.to(tl.float32)                                        # (CHUNKS, 8)
            even, odd = tl.split(x.reshape(CHUNKS, 4, 2))               # (CHUNKS, 4) each
            part += _sixteenths(word, 19 - 4 * j, LOP3) * even[:, None, :]
            part += _sixteenths(word, 3 - 4 * j, LOP3) * odd[:, None, :]
            x_sum += tl.sum(x, axis=1)
            if PER_SLICE:
                at_slice = at + (block * 3 + j).to(tl.int64)[:, None] * n_rows
                scale = tl.load(scale_ptr + at_slice, ok, other=0.0).to(tl.float32)
                if HAS_ZEROS:
                    zero = tl.load(zero_ptr + at_slice, ok, other=0).to(tl.float32)
            if PER_SLICE or j == 3:
                acc += scale * (tl.sum(part, axis=2) - (1.5 + zero * 0.0625) * x_sum[:, None])
                part = tl.zeros((CHUNKS, ROWS, 4), tl.float32)
                x_sum = tl.zeros((CHUNKS,), tl.float32)
    out = 16 * tl.sum(acc, axis=0)
    tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), n < n_rows)


# --- 4-bit weights: many tokens


@jit
def _tile_of(pid, n_tiles_n, n_tiles_m):
    """(tile of outputs, tile of tokens): eight tiles of tokens share what the L2 has of weights."""
    n_group = 8 * n_tiles_n
    first_m = pid // n_group * 8
    n_here = tl.minimum(n_tiles_m - first_m, 8)
    return pid % n_group // n_here, first_m + pid % n_here


@jit
def _slice_of(word, bias, j: tl.constexpr, ASM: tl.constexpr):
    """Slice j of a block of words (TILE_N, SLICE), as code - 8 - zero in the dtype of `bias`.

    bias: (TILE_N, SLICE) -(8 + zero), and for ASM also less the base of `_UNPACK`.
    """
    if ASM:
        w = tl.inline_asm_elementwise(
            UNPACK_BF16[j] if bias.dtype == tl.bfloat16 else UNPACK_FP16[j],
            "=r,r,r", [word, bias], dtype=bias.dtype, is_pure=True, pack=2,
        )
    else:
        w = (word >> 4 * j & 15).to(bias.dtype) + bias
    return w


@jit
def _load_x(
    x_at, x_rows, first_m, first, n_cols, TILE_M: tl.constexpr, COLS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Columns [first, first + COLS) of a tile of tokens, (COLS, TILE_M): 0 past the end."""
    if TMA:
        x = x_rows.load([first_m, first]).T
    else:
        ok = first + tl.arange(0, COLS) < n_cols
        x = tl.load(x_at + first, ok[:, None], other=0.0)
    return x


@jit
def _w4a16_kernel(
    x_ptr,                          # (n_tokens, n_cols)
    packed_ptr,                     # (n_blocks, n_rows, 32) int16
    scale_ptr, zero_ptr,            # (n_blocks or 4 n_blocks, n_rows)
    out_ptr,                        # (n_tokens, n_rows); with splits (n_splits, n_tokens, n_rows)
    n_tokens, n_cols, n_rows, n_blocks,
    x_row,                          # stride in elements
    split_blocks,                   # blocks a split
    HAS_ZEROS: tl.constexpr, PER_SLICE: tl.constexpr,
    TILE_N: tl.constexpr, TILE_M: tl.constexpr, STAGES: tl.constexpr,
    ASM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):
    """One program: TILE_N outputs of TILE_M tokens over one split of the columns.

    The weights are the left operand (out^T = W x^T): a tensor core takes it from registers, where
    it was unpacked, and the few tokens are the side that may be 16 wide.
    """
    if PDL:
        gdc_wait()
    tile_n, tile_m = _tile_of(tl.program_id(0), tl.cdiv(n_rows, TILE_N), tl.cdiv(n_tokens, TILE_M))
    split = tl.program_id(1)
    first_n, first_m = tile_n * TILE_N, tile_m * TILE_M
    n = first_n + tl.arange(0, TILE_N)                                  # (TILE_N,)
    m = first_m + tl.arange(0, TILE_M)                                  # (TILE_M,)
    q = tl.arange(0, SLICE)
    row, token = tl.minimum(n, n_rows - 1), tl.minimum(m, n_tokens - 1)
    begin = split * split_blocks
    end = tl.minimum(begin + split_blocks, n_blocks)

    x_at = x_ptr + token[None, :].to(tl.int64) * x_row + q[:, None]     # (SLICE, TILE_M)
    words_at = packed_ptr + row[:, None] * SLICE + q[None, :]           # (TILE_N, SLICE)
    x_rows = x_at
    if TMA:
        x_rows = tl.make_tensor_descriptor(
            x_ptr, [n_tokens, n_cols], [x_row, 1], [TILE_M, SLICE]
        )
        words = tl.make_tensor_descriptor(
            packed_ptr, [n_blocks * n_rows, SLICE], [SLICE, 1], [TILE_N, SLICE]
        )
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    base: tl.constexpr = 0 if not ASM else 128 if dtype == tl.bfloat16 else 1024

    acc = tl.zeros((TILE_N, TILE_M), tl.float32)
    for block in tl.range(begin, end, num_stages=STAGES):
        at = tl.cast(block, tl.int64) * n_rows
        if TMA:
            word = words.load([block * n_rows + first_n, 0])            # (TILE_N, SLICE)
        else:
            word = tl.load(words_at + at * SLICE)
        bias = tl.full((TILE_N, SLICE), -(8 + base), dtype)
        part = tl.zeros((TILE_N, TILE_M), tl.float32)
        if PER_SLICE:
            at = at * 4
        scale = tl.load(scale_ptr + at + row).to(tl.float32)
        for j in tl.static_range(4):
            if PER_SLICE and j > 0:
                scale = tl.load(scale_ptr + at + j * n_rows + row).to(tl.float32)
            if HAS_ZEROS and (PER_SLICE or j == 0):
                zero = tl.load(zero_ptr + at + j * n_rows + row)
                bias = tl.broadcast_to(
                    (-(8 + base) - zero.to(tl.int32)).to(dtype)[:, None], (TILE_N, SLICE)
                )
            w = _slice_of(word, bias, j, ASM)
            x = _load_x(
                x_at, x_rows, first_m, block * BLOCK + SLICE * j, n_cols, TILE_M, SLICE, TMA
            )
            part = tl.dot(w, x, part, input_precision=PRECISION)
            if PER_SLICE or j == 3:
                acc += part * scale[:, None]
                part = tl.zeros((TILE_N, TILE_M), tl.float32)
    if PDL:
        gdc_launch_dependents()
    at = (split.to(tl.int64) * n_tokens + m)[None, :] * n_rows + n[:, None]
    ok = (m < n_tokens)[None, :] & (n < n_rows)[:, None]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), ok)


@jit
def _merge_kernel(
    part_ptr, x_scale_ptr, w_scale_ptr,     # (N_SPLITS, n_tokens, n_rows), (n_tokens,), (n_rows,)
    out_ptr,                                # (n_tokens, n_rows)
    n_tokens, n_rows, w_scale_row,
    N_SPLITS: tl.constexpr, SCALED: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):
    """One program: TILE results, each the sum of its splits in their order."""
    if PDL:
        gdc_wait()                  # until every split is stored
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    size = tl.cast(n_tokens, tl.int64) * n_rows    # one token is a constant, without .to
    ok = at < size
    total = tl.load(part_ptr + at, ok, other=0)
    for split in tl.static_range(1, N_SPLITS):
        total += tl.load(part_ptr + split * size + at, ok, other=0)
    out = total.to(tl.float32)
    if SCALED:
        out *= tl.load(x_scale_ptr + at // n_rows, ok, other=0.0)
        out *= tl.load(w_scale_ptr + at % n_rows * w_scale_row, ok, other=0.0)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), ok)


def w4a16_linear(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None = None
) -> Tensor:
    """x W^T with 4-bit weights, unpacked in registers.

    Args:
        x: (.., n_cols) float32, float16 or bfloat16; rows may lie apart.
        packed, scales, zeros: as `pack_for_kernel` gives them, for (n_rows, n_cols). Scales may be
            float32, float16 or bfloat16.

    Returns:
        (.., n_rows), the dtype of `x`. Sums in float32; the weights enter exactly, as integers,
        and the sum of a group is scaled. (A zero far outside 4 bits is rounded to the dtype of x.)

    Raises:
        BadInput: a shape, dtype, device or layout is wrong, or a gradient is wanted.

    Cost: reads n_rows * n_cols / 2 bytes of codes and the scales; 2 * n_tokens * n_rows * n_cols
    operations. One token: no tensor core. More: tiles on tensor cores, the columns split where the
    tiles do not fill the GPU; a second kernel adds the splits. A GPU without tensor cores in
    Triton (sm_75) is right, but slow from two tokens on.
    Source: Frantar et al. 2024, Marlin (https://arxiv.org/abs/2408.11743), sections 3.2 and 3.4;
    Kim et al. 2022 (https://arxiv.org/abs/2211.10017) for codes inside a float.
    """
    n_cols, n_rows = _check_w4a16(x, packed, scales, zeros)
    rows = _rows_of(x, n_cols)
    n_tokens, n_blocks = len(rows), len(packed)
    out = rows.new_empty(n_tokens, n_rows)
    if n_tokens == 0:
        return out.view(*x.shape[:-1], n_rows)
    has_zeros, per_slice = zeros is not None, len(scales) > n_blocks
    zeros = packed if zeros is None else zeros      # never read
    launch, nvidia = dependent_launch(x.device), x.is_cuda and torch.version.hip is None
    kernel = "w4a16_slices" if per_slice else "w4a16"
    tiles = choose_tiles(kernel, n_tokens, n_rows, n_cols, x.dtype)
    if tiles.tile_m == 1:
        for token in range(n_tokens):
            _one_token_kernel[(ceil_div(n_rows, tiles.tile_n),)](
                rows[token], packed.view(torch.int32), scales, zeros, out[token],
                n_cols, n_rows, n_blocks, HAS_ZEROS=has_zeros, PER_SLICE=per_slice,
                ROWS=tiles.tile_n, CHUNKS=tiles.tile_k // 32, STAGES=tiles.n_stages,
                LOP3=nvidia, num_warps=tiles.n_warps, **launch,
            )  # fmt: skip
        return out.view(*x.shape[:-1], n_rows)
    split_blocks = ceil_div(n_blocks, tiles.splits)
    n_splits = ceil_div(n_blocks, split_blocks)
    part = out
    if n_splits > 1:
        part = rows.new_empty(n_splits, n_tokens, n_rows, dtype=torch.float32)
    n_tiles = ceil_div(n_rows, tiles.tile_n) * ceil_div(n_tokens, tiles.tile_m)
    _w4a16_kernel[(n_tiles, n_splits)](
        rows, packed, scales, zeros, part,
        n_tokens, n_cols, n_rows, n_blocks, rows.stride(0), split_blocks,
        HAS_ZEROS=has_zeros, PER_SLICE=per_slice,
        TILE_N=tiles.tile_n, TILE_M=tiles.tile_m, STAGES=tiles.n_stages,
        ASM=nvidia and x.dtype != torch.float32, TMA=_use_tma(tiles, rows),
        PRECISION=precision_of(x.dtype), num_warps=tiles.n_warps, **launch,
    )  # fmt: skip
    if n_splits > 1:
        _merge(part, None, None, out)
    return out.view(*x.shape[:-1], n_rows)


def _merge(part: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, out: Tensor) -> None:
    n_splits, n_tokens, n_rows = part.shape
    scaled = x_scale is not None
    tile = 256 if n_tokens * n_rows < 1 << 17 else 1024     # few results: more programs
    _merge_kernel[(ceil_div(n_tokens * n_rows, tile),)](
        part, x_scale if scaled else part, w_scale if scaled else part, out,
        n_tokens, n_rows, w_scale.stride(0) if scaled else 0,
        N_SPLITS=n_splits, SCALED=scaled, TILE=tile, num_warps=tile // 128,
        **dependent_launch(out.device),
    )  # fmt: skip


# --- int8 and fp8: codes times codes


@jit
def _scaled_kernel(
    x_ptr, w_ptr,                   # (n_tokens, n_cols), (n_rows, n_cols): int8 or float8_e4m3fn
    x_scale_ptr, w_scale_ptr,       # (n_tokens,), (n_rows,)
    out_ptr,                        # (n_tokens, n_rows); with splits (n_splits, n_tokens, n_rows)
    n_tokens, n_cols, n_rows,
    x_row, w_row, w_scale_row,      # strides in elements
    split_cols,                     # columns a split, a multiple of TILE_K
    TILE_N: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
    SPLIT: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):
    """One program: tiles of TILE_N outputs of TILE_M tokens, over one split of the columns."""
    if PDL:
        gdc_wait()
    n_tiles_n, n_tiles_m = tl.cdiv(n_rows, TILE_N), tl.cdiv(n_tokens, TILE_M)
    split = tl.program_id(1)
    begin = split * split_cols
    end = tl.minimum(begin + split_cols, n_cols)
    k = tl.arange(0, TILE_K)
    if TMA:
        x_rows = tl.make_tensor_descriptor(x_ptr, [n_tokens, n_cols], [x_row, 1], [TILE_M, TILE_K])
        w_rows = tl.make_tensor_descriptor(w_ptr, [n_rows, n_cols], [w_row, 1], [TILE_N, TILE_K])
    else:
        x_rows, w_rows = x_ptr, w_ptr
    sum_type: tl.constexpr = tl.int32 if w_ptr.dtype.element_ty == tl.int8 else tl.float32
    # the copies of the next tile begin before this one is stored
    for tile in tl.range(
        tl.program_id(0), n_tiles_n * n_tiles_m, tl.num_programs(0), flatten=True
    ):
        tile_n, tile_m = _tile_of(tile, n_tiles_n, n_tiles_m)
        first_n, first_m = tile_n * TILE_N, tile_m * TILE_M
        n = first_n + tl.arange(0, TILE_N)                              # (TILE_N,)
        m = first_m + tl.arange(0, TILE_M)                              # (TILE_M,)
        row, token = tl.minimum(n, n_rows - 1), tl.minimum(m, n_tokens - 1)
        x_at = x_ptr + token[None, :].to(tl.int64) * x_row + k[:, None]
        w_at = w_ptr + row[:, None].to(tl.int64) * w_row + k[None, :]
        acc = tl.zeros((TILE_N, TILE_M), sum_type)
        for first in tl.range(begin, end, TILE_K):
            if TMA:
                w = w_rows.load([first_n, first])                       # (TILE_N, TILE_K)
            else:
                w = tl.load(w_at + first, (first + k < n_cols)[None, :], other=0.0)
            x = _load_x(x_at, x_rows, first_m, first, n_cols, TILE_M, TILE_K, TMA)
            acc = tl.dot(w, x, acc, out_dtype=sum_type)
        ok = (m < n_tokens)[None, :] & (n < n_rows)[:, None]
        at = (split.to(tl.int64) * n_tokens + m)[None, :] * n_rows + n[:, None]
        if SPLIT:
            tl.store(out_ptr + at, acc, ok)
        else:
            x_scale = tl.load(x_scale_ptr + token)                      # (TILE_M,)
            w_scale = tl.load(w_scale_ptr + row * w_scale_row)          # (TILE_N,)
            out = acc.to(tl.float32) * w_scale[:, None] * x_scale[None, :]
            tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), ok)
    if PDL:
        gdc_launch_dependents()


def w8a8_linear(x: Tensor, w_int8: Tensor, w_scale: Tensor) -> Tensor:
    """x W^T with int8 weights and activations that are rounded to int8 by token.

    Args:
        x: (.., n_cols) float32, float16 or bfloat16.
        w_int8: (n_rows, n_cols) int8, symmetric codes; at most 131,072 columns.
        w_scale: (n_rows, 1), or (1, 1) for one scale a matrix; float32.

    Returns:
        (.., n_rows), the dtype of `x`: int8 products, summed exactly in int32, scaled in float32.

    Raises:
        BadInput: a shape, dtype, device or layout is wrong, a gradient is wanted, or the GPU is
            older than sm_80, where Triton has no int8 product.

    Cost: one pass over `x` to round it, then 2 * n_tokens * n_rows * n_cols integer operations on
    n_rows * n_cols bytes of weights. Source: Dettmers et al. 2022, LLM.int8()
    (https://arxiv.org/abs/2208.07339), section 2.1, row-wise and vector-wise; Xiao et al. 2022
    (https://arxiv.org/abs/2211.10438) for inputs that are smooth enough.
    """
    return _rounded_linear(x, w_int8, w_scale, torch.int8)


def fp8_linear(x: Tensor, w_fp8: Tensor, w_scale: Tensor) -> Tensor:
    """x W^T in float8_e4m3fn, with activations that are rounded by token.

    Arguments, result and errors as `w8a8_linear`, with float8_e4m3fn weights and a GPU from sm_89
    on. A Hopper tensor core cuts the sum so far, and what it adds to it, to 14 bits (torch's
    `use_fast_accum`), not float32's 24. Always toward zero: where most products have one sign,
    2,048 columns lost up to 1.6 % of the largest result (H200, as with cuBLAS).
    Source: Micikevicius et al. 2022 (https://arxiv.org/abs/2209.05433); DeepSeek-AI 2024
    (https://arxiv.org/abs/2412.19437), section 3.3.2, and Xie et al. 2025
    (https://arxiv.org/abs/2511.10909) on the sum.
    """
    return _rounded_linear(x, w_fp8, w_scale, torch.float8_e4m3fn)


def _rounded_linear(x: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    _check_activations(x)
    _check_codes(w, w_scale, dtype)
    require(
        x.shape[-1] == w.shape[1] and x.device == w.device,
        f"x must be (.., {w.shape[1]}) on {w.device}; got {tuple(x.shape)} on {x.device}",
    )
    rows = _rows_of(x, w.shape[1])
    codes, scale = quantize_rows(rows, dtype)
    return scaled_linear(codes, scale, w, w_scale, x.dtype).view(*x.shape[:-1], len(w))


def scaled_linear(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """(x * x_scale) (w * w_scale)^T of codes: `w8a8_linear` and `fp8_linear` after the rounding.

    Args:
        x: (n_tokens, n_cols), w: (n_rows, n_cols); both int8, or both float8_e4m3fn.
        x_scale: (n_tokens, 1), w_scale: (n_rows, 1) or (1, 1); float32.
        dtype: of the result, (n_tokens, n_rows).

    Raises:
        BadInput: as `w8a8_linear`.
    """
    _check_codes(w, w_scale, w.dtype)
    n_rows, n_cols = w.shape
    n_tokens = len(x)
    require(
        x.dtype == w.dtype and x.device == w.device and x.ndim == 2 and x.shape[1] == n_cols
        and (n_tokens == 0 or _is_walkable(x)),
        f"x must be (n_tokens, {n_cols}) {w.dtype} on {w.device}, its last dimension contiguous; "
        f"got {tuple(x.shape)} {x.dtype} on {x.device}",
    )
    require(
        x_scale.shape == (n_tokens, 1) and x_scale.dtype == torch.float32
        and x_scale.device == w.device,
        f"x_scale must be ({n_tokens}, 1) float32; got {tuple(x_scale.shape)} {x_scale.dtype}",
    )
    check_dtype(dtype, w)
    out = torch.empty(n_tokens, n_rows, dtype=dtype, device=w.device)
    if n_tokens == 0:
        return out
    tiles = choose_tiles("scaled", n_tokens, n_rows, n_cols, w.dtype)
    split_cols = ceil_div(ceil_div(n_cols, tiles.tile_k), tiles.splits) * tiles.tile_k
    n_splits = ceil_div(n_cols, split_cols)
    part = out
    if n_splits > 1:
        sum_type = torch.int32 if w.dtype == torch.int8 else torch.float32
        part = torch.empty(n_splits, n_tokens, n_rows, dtype=sum_type, device=w.device)
    x_scale, w_scale = x_scale.reshape(-1), w_scale.reshape(-1).expand(n_rows)
    n_programs = ceil_div(n_rows, tiles.tile_n) * ceil_div(n_tokens, tiles.tile_m)
    gpu = gpu_facts()
    if tiles.persistent and gpu:
        n_programs = min(n_programs, gpu.n_sms)
    _scaled_kernel[(n_programs, n_splits)](
        x, w, x_scale, w_scale, part,
        n_tokens, n_cols, n_rows, x.stride(0), w.stride(0), w_scale.stride(0), split_cols,
        TILE_N=tiles.tile_n, TILE_M=tiles.tile_m, TILE_K=tiles.tile_k, SPLIT=n_splits > 1,
        TMA=_use_tma(tiles, x, w), num_warps=tiles.n_warps, num_stages=tiles.n_stages,
        **dependent_launch(w.device),
    )  # fmt: skip
    if n_splits > 1:
        _merge(part, x_scale, w_scale, out)
    return out


# --- rounding, and back


@jit
def _rint(x):
    """The nearest integer, ties to even, of |x| < 2^22: a float32 of 1.5 * 2^23 has no fraction."""
    return (x + 12582912.0) - 12582912.0


@jit
def _quantize_rows_kernel(
    x_ptr, codes_ptr, scale_ptr,    # (n_rows, n_cols), (n_rows, n_cols), (n_rows,)
    n_cols, x_row, TILE: tl.constexpr, PDL: tl.constexpr,
):
    """One program: one row. It is read twice; the second time it lies in a cache."""
    if PDL:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, TILE)
    top = tl.zeros((TILE,), tl.float32)
    for first in tl.range(0, n_cols, TILE):
        x = tl.load(x_ptr + row * x_row + first + col, first + col < n_cols, other=0.0)
        top = tl.maximum(top, tl.abs(x.to(tl.float32)))
    INT8: tl.constexpr = codes_ptr.dtype.element_ty == tl.int8
    limit: tl.constexpr = 127.0 if INT8 else FP8_MAX
    scale = tl.div_rn(tl.max(top, axis=0), limit)
    scale = tl.where(scale < TINY, 1.0, scale)      # all zero: 0/0 is NaN
    tl.store(scale_ptr + row, scale)
    for first in tl.range(0, n_cols, TILE):
        x = tl.load(x_ptr + row * x_row + first + col, first + col < n_cols, other=0.0)
        y = tl.div_rn(x.to(tl.float32), tl.zeros((TILE,), tl.float32) + scale)
        y = tl.minimum(tl.maximum(y, -limit), limit)
        if INT8:
            y = _rint(y)
        codes = y.to(codes_ptr.dtype.element_ty)
        tl.store(codes_ptr + row * n_cols + first + col, codes, first + col < n_cols)
    if PDL:
        gdc_launch_dependents()


@jit
def _dequantize_rows_kernel(
    codes_ptr, scale_ptr, out_ptr,  # (n_rows, n_cols), (n_rows,), (n_rows, n_cols)
    n_cols, codes_row, scale_row, TILE: tl.constexpr,
):
    """One program: TILE columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * TILE + tl.arange(0, TILE)
    codes = tl.load(codes_ptr + row * codes_row + col, col < n_cols, other=0.0).to(tl.float32)
    out = codes * tl.load(scale_ptr + row * scale_row)
    tl.store(out_ptr + row * n_cols + col, out.to(out_ptr.dtype.element_ty), col < n_cols)


def quantize_rows(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Each row rounded with a scale of its own, as the reference's functions do it, to the bit.

    Args:
        x: (.., n_cols) float32, float16 or bfloat16, finite.
        dtype: torch.int8 or torch.float8_e4m3fn.

    Returns:
        codes like `x`, and scales (.., 1) float32: absmax / 127 (or 448), and 1 for zeros.

    Raises:
        BadInput: a shape, dtype, device or layout is wrong, or the GPU cannot hold the dtype.

    Cost: `x` is read from memory once, one byte an element is written.
    """
    _check_activations(x)
    _check_code_dtype(dtype, x)
    rows = _rows_of(x, x.shape[-1])
    codes = torch.empty(rows.shape, dtype=dtype, device=x.device)
    scales = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    if len(rows):
        tile = min(4096, triton.next_power_of_2(rows.shape[1]))
        _quantize_rows_kernel[(len(rows),)](
            rows, codes, scales, rows.shape[1], rows.stride(0), TILE=tile,
            num_warps=max(1, min(8, tile // 512)), **dependent_launch(x.device),
        )  # fmt: skip
    return codes.view(x.shape), scales.view(*x.shape[:-1], 1)


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes * scales, (n_rows, n_cols) in `dtype`; scales (n_rows, 1) or (1, 1) float32.

    Raises:
        BadInput: not int8 or float8_e4m3fn codes with such scales, or a device that cannot.
    """
    _check_codes(codes, scales, codes.dtype, multiply=False)
    check_dtype(dtype, codes)
    n_rows, n_cols = codes.shape
    out = torch.empty(n_rows, n_cols, dtype=dtype, device=codes.device)
    scales = scales.reshape(-1).expand(n_rows)
    tile = min(2048, triton.next_power_of_2(n_cols))
    _dequantize_rows_kernel[(n_rows, ceil_div(n_cols, tile))](
        codes, scales, out, n_cols, codes.stride(0), scales.stride(0), TILE=tile,
    )  # fmt: skip
    return out


@jit
def _quantize_int4_kernel(
    w_ptr,                          # (n_rows, n_cols)
    packed_ptr, scale_ptr, zero_ptr,    # as `pack_for_kernel` gives them
    n_cols, n_rows, w_row,
    HAS_ZEROS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):
    """One program: ROWS rows of one block."""
    block = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)                    # (ROWS,)
    row_ok = n < n_rows
    GROUPS: tl.constexpr = BLOCK // GROUP
    col = block * BLOCK + tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    ok = row_ok[:, None, None] & (col < n_cols)[None]
    w = tl.load(w_ptr + n.to(tl.int64)[:, None, None] * w_row + col[None], ok, other=0.0)
    w = w.to(tl.float32)                                                # (ROWS, GROUPS, GROUP)
    if HAS_ZEROS:
        least = tl.minimum(tl.min(w, axis=2), 0.0)                      # (ROWS, GROUPS)
        scale = tl.div_rn(tl.maximum(tl.max(w, axis=2), 0.0) - least, 15.0)
        scale = tl.where(scale < TINY, 1.0, scale)
        zero = -8.0 - _rint(tl.div_rn(least, scale))
    else:
        scale = tl.div_rn(tl.max(tl.abs(w), axis=2), 7.0)
        scale = tl.where(scale < TINY, 1.0, scale)
        zero = tl.zeros((ROWS, GROUPS), tl.float32)
    code = _rint(tl.div_rn(w, tl.broadcast_to(scale[:, :, None], w.shape))) + zero[:, :, None]
    code = tl.minimum(tl.maximum(code, -8.0), 7.0)
    code = tl.where((col < n_cols)[None], code, 0.0).to(tl.int32) + 8
    nibble = code.reshape(ROWS, 4, SLICE) << (4 * tl.arange(0, 4))[None, :, None]
    word = tl.sum(nibble, axis=1).to(tl.int16)                          # (ROWS, SLICE)
    words_at = packed_ptr + (block * n_rows + n)[:, None] * SLICE + tl.arange(0, SLICE)[None, :]
    tl.store(words_at, word, row_ok[:, None])
    # one scale a block, or one a slice
    SHARE: tl.constexpr = 1 if GROUP == BLOCK else GROUP // SLICE       # places a group fills
    for i in tl.static_range(SHARE):
        place = block * (GROUPS * SHARE) + tl.arange(0, GROUPS) * SHARE + i     # (GROUPS,)
        at = place[None, :] * n_rows + n[:, None]
        first = block * BLOCK + tl.arange(0, GROUPS) * GROUP + i * SLICE
        begun = (first < n_cols)[None, :]                               # (1, GROUPS)
        tl.store(scale_ptr + at, tl.where(begun, scale, 1.0), row_ok[:, None])
        if HAS_ZEROS:
            tl.store(zero_ptr + at, tl.where(begun, zero, 0.0).to(tl.int16), row_ok[:, None])


@jit
def _dequantize_int4_kernel(
    packed_ptr, scale_ptr, zero_ptr, out_ptr,   # .., (n_rows, n_cols)
    n_cols, n_rows,
    HAS_ZEROS: tl.constexpr, PER_SLICE: tl.constexpr, ROWS: tl.constexpr,
):
    """One program: ROWS rows of one block."""
    block = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)                    # (ROWS,)
    q = tl.arange(0, SLICE)
    row_ok = n < n_rows
    word = tl.load(packed_ptr + (block * n_rows + n)[:, None] * SLICE + q, row_ok[:, None], other=0)
    for j in tl.static_range(4):
        at = (block * 4 + j if PER_SLICE else block) * n_rows + n       # (ROWS,)
        scale = tl.load(scale_ptr + at, row_ok, other=0.0).to(tl.float32)
        zero = tl.zeros((ROWS,), tl.float32)
        if HAS_ZEROS:
            zero = tl.load(zero_ptr + at, row_ok, other=0).to(tl.float32)
        code = (word >> 4 * j & 15).to(tl.float32) - 8
        out = (code - zero[:, None]) * scale[:, None]                   # (ROWS, SLICE)
        col = block * BLOCK + SLICE * j + q
        ok = row_ok[:, None] & (col < n_cols)[None, :]
        out_at = out_ptr + n.to(tl.int64)[:, None] * n_cols + col[None, :]
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), ok)


def quantize_int4(
    weight: Tensor, *, group_size: int = 128, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight to 4 bits straight into the layout of `w4a16_linear`.

    The same bits as `pack_for_kernel` of the reference's `quantize` with 4 bits.

    Args:
        weight: (n_rows, n_cols) float32, float16 or bfloat16, finite.
        group_size: 32, 64 or 128.
        symmetric: else with zeros.

    Raises:
        BadInput: a shape, dtype, device, layout or group size is wrong.

    Cost: the weight is read once, half a byte an element and the scales are written.
    """
    _check_activations(weight)
    require(
        weight.ndim == 2 and len(weight) > 0, f"weight must be (rows, cols); got {weight.shape}"
    )
    require(group_size in (32, 64, 128), f"group_size must be 32, 64 or 128; got {group_size}")
    weight = _rows_of(weight, weight.shape[1])
    n_rows, n_cols = weight.shape
    group_size = 128 if n_cols <= group_size else group_size    # one group a row: one scale a block
    n_blocks = ceil_div(n_cols, 128)
    packed = torch.empty(n_blocks, n_rows, 32, dtype=torch.int16, device=weight.device)
    shape = (n_blocks if group_size == 128 else 4 * n_blocks, n_rows)
    scales = torch.empty(shape, dtype=torch.float32, device=weight.device)
    zeros = None if symmetric else torch.empty(shape, dtype=torch.int16, device=weight.device)
    _quantize_int4_kernel[(ceil_div(n_rows, 16), n_blocks)](
        weight, packed, scales, scales if zeros is None else zeros, n_cols, n_rows,
        weight.stride(0), HAS_ZEROS=not symmetric, GROUP=group_size, ROWS=16,
    )  # fmt: skip
    return packed, scales, zeros


def dequantize_int4(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, n_cols: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """The weight (n_rows, n_cols) in `dtype` that `w4a16_linear` multiplies with.

    Raises:
        BadInput: the tensors are not as `pack_for_kernel` gives them for that many columns.
    """
    n_rows = _check_packed(packed, scales, zeros, n_cols)
    check_dtype(dtype, packed)
    out = torch.empty(n_rows, n_cols, dtype=dtype, device=packed.device)
    _dequantize_int4_kernel[(ceil_div(n_rows, 16), len(packed))](
        packed, scales, scales if zeros is None else zeros, out, n_cols, n_rows,
        HAS_ZEROS=zeros is not None, PER_SLICE=len(scales) > len(packed), ROWS=16,
    )  # fmt: skip
    return out


# --- how they run


class Tiles(NamedTuple):
    """How one product runs; tile_m = 1 is the kernel for one token."""

    tile_n: int             # outputs
    tile_m: int             # tokens
    tile_k: int             # columns
    n_warps: int
    n_stages: int
    splits: int = 1         # of the columns
    tma: bool = False       # whether Hopper's tensor memory accelerator copies
    persistent: bool = False    # one program a multiprocessor walks several tiles


# (kernel, tokens up to): tiles for an H100
TILES = {
    ("w4a16", 1): Tiles(4, 1, 2048, 2, 1),
    ("w4a16", 16): Tiles(128, 16, 128, 4, 3),
    ("w4a16", 32): Tiles(128, 32, 128, 8, 3),
    ("w4a16", 64): Tiles(128, 64, 128, 8, 4),
    ("w4a16", 1 << 62): Tiles(128, 128, 128, 8, 3, tma=True),
    ("scaled", 16): Tiles(64, 16, 256, 4, 4),
    ("scaled", 32): Tiles(64, 32, 256, 4, 4),
    ("scaled", 64): Tiles(64, 64, 128, 4, 4),
    ("scaled", 256): Tiles(64, 128, 128, 4, 5, tma=True),
    ("scaled", 1 << 62): Tiles(256, 128, 128, 8, 4, tma=True, persistent=True),
}
# a scale a slice wants more registers: 128 tokens would spill on sm_90
TILES |= {
    ("w4a16_slices", most): tiles._replace(tile_m=min(tiles.tile_m, 64))
    for (name, most), tiles in TILES.items()
    if name == "w4a16"
}
FILL = 16       # warps a multiprocessor wants while tiles of few tokens wait for memory
MAX_SPLITS = 16


def choose_tiles(
    kernel: str, n_tokens: int, n_rows: int, n_cols: int, dtype: torch.dtype
) -> Tiles:
    """Tiles of "w4a16", "w4a16_slices" (dtype of the activations) or "scaled" (of the codes)."""
    gpu = gpu_facts()
    if gpu is None:     # interpreted: small, so that small examples have several
        tile_m = 1 if kernel != "scaled" and n_tokens == 1 else 16
        return Tiles(16, tile_m, 128, 4, 1, splits=2)
    capability = None if torch.version.hip is not None else gpu.capability
    tiles = tiles_for(kernel, n_tokens, dtype, capability)
    if 1 < tiles.tile_m <= 64:
        n_tiles = ceil_div(n_rows, tiles.tile_n) * ceil_div(n_tokens, tiles.tile_m)
        n_steps = ceil_div(n_cols, tiles.tile_k)
        wanted = FILL // tiles.n_warps * gpu.n_sms
        splits = min(wanted // n_tiles, n_steps // 4, MAX_SPLITS)
        tiles = tiles._replace(splits=max(1, splits))
    return tiles


def tiles_for(
    kernel: str, n_tokens: int, dtype: torch.dtype, capability: tuple[int, int] | None
) -> Tiles:
    """The table's tiles, cut down to what a GPU of that capability (None: AMD) holds."""
    tiles = next(t for (name, most), t in TILES.items() if name == kernel and n_tokens <= most)
    if tiles.tile_m == 1:
        return tiles
    hopper = capability is not None and capability[0] in (9, 10)
    if not hopper or dtype == torch.float32:
        tiles = tiles._replace(
            tile_n=min(tiles.tile_n, 64), tile_m=min(tiles.tile_m, 64),
            tile_k=min(tiles.tile_k, 128), n_stages=min(tiles.n_stages, 3),
            tma=False, persistent=False,
        )
    if dtype == torch.float32 or capability is not None and capability < (8, 0):
        return tiles._replace(tile_m=min(tiles.tile_m, 16), n_stages=2)
    return tiles._replace(n_stages=2) if capability is None else tiles


def _use_tma(tiles: Tiles, *walked: Tensor) -> bool:
    """TMA needs addresses and strides in steps of 16 bytes."""
    aligned = all(
        x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 and x.stride(0) > 0
        for x in walked
    )
    if tiles.tma and aligned:
        allow_descriptors()
    return tiles.tma and aligned


# --- what is refused


def _rows_of(x: Tensor, n_cols: int) -> Tensor:
    """(n_tokens, n_cols) with contiguous rows that the kernels can address; a copy if need be."""
    rows = x.reshape(-1, n_cols)
    return rows if len(rows) == 0 or _is_walkable(rows) else rows.contiguous()


def _is_walkable(x: Tensor) -> bool:
    return x.stride(1) == 1 and 0 < x.stride(0) < MAX_ROW_STRIDE


def _check_activations(x: Tensor) -> None:
    require(
        x.ndim >= 1 and x.shape[-1] > 0, f"x must be (.., n_cols) with columns; got {x.shape}"
    )
    check_dtype(x.dtype, x)
    require(
        not (torch.is_grad_enabled() and x.requires_grad),
        "this product has no gradient: call it under torch.no_grad()",
    )


def _check_packed(packed: Tensor, scales: Tensor, zeros: Tensor | None, n_cols: int) -> int:
    """The number of rows of the weight."""
    n_blocks = ceil_div(n_cols, 128)
    require(
        packed.ndim == 3 and packed.dtype == torch.int16
        and packed.shape[0] == n_blocks and packed.shape[2] == 32 and packed.shape[1] > 0,
        f"packed must be ({n_blocks}, n_rows, 32) int16 for {n_cols} columns; "
        f"got {tuple(packed.shape)} {packed.dtype}: use pack_for_kernel",
    )
    n_rows = packed.shape[1]
    require(
        scales.shape in ((n_blocks, n_rows), (4 * n_blocks, n_rows))
        and scales.dtype in (torch.float32, torch.float16, torch.bfloat16),
        f"scales must be ({n_blocks} or {4 * n_blocks}, {n_rows}) float32, float16 or bfloat16; "
        f"got {tuple(scales.shape)} {scales.dtype}: use pack_for_kernel",
    )
    require(
        packed.is_cuda or scales.dtype != torch.bfloat16,
        "bfloat16 needs a GPU: Triton's CPU interpreter computes on its bit pattern "
        "and returns wrong numbers. Use float32 scales.",
    )
    require(
        zeros is None or zeros.shape == scales.shape and zeros.dtype == torch.int16,
        f"zeros must be {tuple(scales.shape)} int16 like the scales",
    )
    for name, x in (("packed", packed), ("scales", scales), ("zeros", zeros)):
        require(
            x is None or x.is_contiguous() and x.device == packed.device,
            f"{name} must be contiguous and on {packed.device}",
        )
    return n_rows


def _check_w4a16(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None
) -> tuple[int, int]:
    """(n_cols, n_rows)"""
    _check_activations(x)
    n_rows = _check_packed(packed, scales, zeros, x.shape[-1])
    require(x.device == packed.device, f"x is on {x.device}, the weight on {packed.device}")
    return x.shape[-1], n_rows


def _check_code_dtype(dtype: torch.dtype, like: Tensor, multiply: bool = False) -> None:
    require(
        dtype in (torch.int8, torch.float8_e4m3fn),
        f"codes must be int8 or float8_e4m3fn; got {dtype}",
    )
    require(
        like.is_cuda or dtype == torch.int8,
        "float8 needs a GPU: Triton's CPU interpreter loses the carry when it rounds up to a power "
        "of two, so that 0.49 becomes 0.25. Use the reference.",
    )
    if not like.is_cuda or torch.version.hip is not None:
        return
    least = (8, 9) if dtype == torch.float8_e4m3fn else (8, 0) if multiply else (0, 0)
    found = gpu_facts().capability
    require(
        found >= least,
        f"{dtype} needs a GPU from sm_{least[0]}{least[1]} on; this is sm_{found[0]}{found[1]}. "
        "Use the reference.",
    )


def _check_codes(
    w: Tensor, w_scale: Tensor, dtype: torch.dtype, *, multiply: bool = True
) -> None:
    require(
        w.ndim == 2 and w.dtype == dtype and w.numel() > 0 and _is_walkable(w),
        f"codes must be (n_rows, n_cols) {dtype}, the last dimension contiguous; "
        f"got {tuple(w.shape)} {w.dtype} with strides {w.stride()}",
    )
    require(
        w_scale.shape in ((len(w), 1), (1, 1)) and w_scale.dtype == torch.float32
        and w_scale.device == w.device,
        f"scales must be ({len(w)}, 1) or (1, 1) float32 on {w.device}; "
        f"got {tuple(w_scale.shape)} {w_scale.dtype} on {w_scale.device}",
    )
    require(
        w.dtype != torch.int8 or w.shape[1] <= MAX_INT8_COLS,
        f"int32 sums hold {MAX_INT8_COLS:,} products of int8; got {w.shape[1]:,} columns",
    )
    require(
        w.is_cuda or interpreting(),
        f"the codes are on the {w.device} but Triton compiles for the GPU in this session: "
        "move them there",
    )
    _check_code_dtype(dtype, w, multiply)
