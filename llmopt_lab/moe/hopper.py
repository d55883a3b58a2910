"""The two grouped products of a mixture of experts for Hopper in Gluon.

A warpgroup moves tiles, two warpgroups multiply 64 rows each with 256 columns. The rows of a tile
are gathered from the tokens as they are copied into shared memory; weights, and the hidden rows,
which already lie by expert, come through TMA. The programs stay and walk over the tiles that the
routing made, so no tile is launched for nothing. `kernels.py` calls `gate_up` and `project` on
sm_90.
"""

import inspect

import torch
from torch import Tensor

from llmopt_lab.core.device import gpu_facts, prepare_triton
from llmopt_lab.core.memory import ceil_div

prepare_triton()

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS = 128              # visits in a tile: 64 a warpgroup
COLS = 256              # columns of the product; of gate and of up 128 each
STEP = 64               # of the sum
BAND = 8                # row tiles that share the weights of a column tile while in L2
REGISTERS = {True: (216, 72), False: (240, 24)}     # a thread that multiplies, that copies
MAX_REGISTERS = 168     # a thread at the launch; the groups then trade among them


def jit(fn, **options):
    """gluon.jit of the function itself, which a test's type checker may have wrapped."""
    return gluon.jit(inspect.unwrap(fn), **options)


@jit
def _count(n_tiles):
    """(tiles that are one piece of work, pieces in all).

    Where the tiles left after the last whole round would occupy at most half the programs, each is
    cut into two pieces of 64 rows.
    """
    left = n_tiles % gl.num_programs(0)
    halved = 2 * left <= gl.num_programs(0)
    return gl.where(halved, n_tiles - left, n_tiles), gl.where(halved, n_tiles + left, n_tiles)


@jit
def _piece(index, n_whole, n_row_tiles, n_col_tiles, BAND: gl.constexpr):
    """(row tile, column tile, first row in it, rows) of a piece of work.

    BAND row tiles walk over the columns together.
    """
    cut = index >= n_whole
    tile = gl.where(cut, n_whole + (index - n_whole) // 2, index)
    first_row = gl.where(cut, (index - n_whole) % 2 * 64, 0)
    width = BAND * n_col_tiles
    first = tile // width * BAND
    height = gl.minimum(n_row_tiles - first, BAND)
    rows = gl.where(cut, 64, 128)
    return first + tile % width % height, tile % width // height, first_row, rows


@jit
def _produce(rows, w_desc, tiles, bars, groups, n_cols, K: gl.constexpr, N_IN: gl.constexpr,
             UP: gl.constexpr, GATE_UP: gl.constexpr, GATHER: gl.constexpr, STAGES: gl.constexpr,
             BAND: gl.constexpr):
    """Rows and weights into shared memory as soon as their place is free."""
    a_s, b_s = tiles
    full, free = bars
    visits_ptr, starts_ptr, tile_expert_ptr, tile_first_ptr, n_used_ptr = groups
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    n_used = gl.load(n_used_ptr)
    n_whole, n_pieces = _count(n_used * n_cols)
    step = 0
    index = gl.program_id(0)
    while index < n_pieces:
        row_tile, col_tile, skipped, n_rows = _piece(index, n_whole, n_used, n_cols, BAND)
        expert = gl.load(tile_expert_ptr + row_tile)
        first_row = gl.load(tile_first_ptr + row_tile) + skipped
        if GATHER:
            end = gl.load(starts_ptr + expert + 1)
            at = first_row + gl.arange(0, 64, gl.SliceLayout(1, COPY))
            col = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, COPY)), 0)
            # rows past the expert's end repeat token 0 and are not stored
            token = (gl.load(visits_ptr + at, at < end, other=0) // K).to(gl.int64)
            low_at = rows + gl.expand_dims(token * N_IN, 1) + col
            at += 64
            token = (gl.load(visits_ptr + at, at < end, other=0) // K).to(gl.int64)
            high_at = rows + gl.expand_dims(token * N_IN, 1) + col
        for first in range(0, N_IN, 64):
            stage = step % STAGES
            mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
            N_BOXES: gl.constexpr = 2 if GATE_UP else 1
            boxes = b_s.index(stage)._reinterpret(
                w_desc.dtype, [N_BOXES, 1, 64, 256 // N_BOXES], w_desc.layout)
            nbytes: gl.constexpr = N_BOXES * w_desc.block_type.nbytes
            if GATHER:
                mbarrier.expect(full.index(stage), nbytes)
            else:
                mbarrier.expect(full.index(stage), nbytes + 2 * rows.block_type.nbytes)
            for i in gl.static_range(N_BOXES):
                tma.async_copy_global_to_shared(
                    w_desc, [expert, first, col_tile * (256 // N_BOXES) + i * UP],
                    full.index(stage), boxes.index(i))
            if GATHER:
                async_copy.async_copy_global_to_shared(a_s.index(2 * stage), low_at + first)
                async_copy.async_copy_global_to_shared(a_s.index(2 * stage + 1), high_at + first)
                async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            else:
                for half in gl.static_range(2):
                    tma.async_copy_global_to_shared(
                        rows, [first_row + half * 64, first],
                        full.index(stage), a_s.index(2 * stage + half))
            step += 1
        index += gl.num_programs(0)


@jit
def _halves(x):
    """Columns [0, 128) and [128, 256) of (64, 256)."""
    return gl.split(gl.permute(gl.reshape(x, [64, 2, 128]), [0, 2, 1]))


@jit
def _store_half(ptr, row, row_ok, first_col, half, N: gl.constexpr, OUT: gl.constexpr):
    """(64, 128) to rows of (n, N), 256 bytes a row at once."""
    dtype: gl.constexpr = ptr.dtype.element_ty
    col = first_col + gl.arange(0, 128, gl.SliceLayout(0, OUT))
    at = gl.expand_dims(row.to(gl.int64) * N, 1) + gl.expand_dims(col, 0)
    ok = gl.expand_dims(row_ok, 1) & gl.expand_dims(col < N, 0)
    gl.store(ptr + at, gl.convert_layout(half.to(dtype), OUT), ok)


@jit
def _multiply(out_ptr, gate_up_ptr, weights_ptr, tiles, bars, groups, n_cols,
              WHO: gl.constexpr, N_IN: gl.constexpr, N_OUT: gl.constexpr, GATE_UP: gl.constexpr,
              GATHER: gl.constexpr, SAVE: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr):
    """One warpgroup: 64 rows of each tile."""
    a_s, b_s = tiles
    full, free = bars
    visits_ptr, starts_ptr, tile_expert_ptr, tile_first_ptr, n_used_ptr = groups
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16])
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    n_used = gl.load(n_used_ptr)
    n_whole, n_pieces = _count(n_used * n_cols)
    step = 0
    index = gl.program_id(0)
    while index < n_pieces:
        row_tile, col_tile, skipped, n_rows = _piece(index, n_whole, n_used, n_cols, BAND)
        expert = gl.load(tile_expert_ptr + row_tile)
        first_row = gl.load(tile_first_ptr + row_tile) + skipped
        end = gl.minimum(gl.load(starts_ptr + expert + 1), first_row + n_rows)
        first_row += WHO * 64
        if first_row < end:
            acc = gl.zeros([64, 256], gl.float32, ACC)
            for first in range(0, N_IN, 64):
                stage = step % STAGES
                mbarrier.wait(full.index(stage), (step // STAGES) & 1)
                if GATHER:
                    fence_async_shared()        # the rows were not copied by TMA
                pending = warpgroup_mma(
                    a_s.index(2 * stage + WHO), b_s.index(stage), acc,
                    use_acc=first > 0, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[pending])
                # the product before this one is done with its stage
                mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1, pred=first > 0)
                step += 1
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)
            row = first_row + gl.arange(0, 64, gl.SliceLayout(1, OUT))
            if GATE_UP:
                gate, up = _halves(acc)
                hidden = gate / (1 + gl.exp(-gate)) * up
                _store_half(out_ptr, row, row < end, col_tile * 128, hidden, N_OUT, OUT)
                if SAVE:
                    at = gate_up_ptr
                    _store_gate_up(at, row, row < end, col_tile * 128, gate, up, N_OUT, OUT)
            else:
                acc_row = first_row + gl.arange(0, 64, gl.SliceLayout(1, ACC))
                visit = gl.load(visits_ptr + acc_row, acc_row < end, other=0)
                weight = gl.load(weights_ptr + visit, acc_row < end, other=0.0)
                low, high = _halves(acc * gl.expand_dims(weight, 1))
                visit = gl.load(visits_ptr + row, row < end, other=0)
                _store_half(out_ptr, visit, row < end, col_tile * 256, low, N_OUT, OUT)
                _store_half(out_ptr, visit, row < end, col_tile * 256 + 128, high, N_OUT, OUT)
        else:
            for _ in range(0, N_IN, 64):
                stage = step % STAGES
                mbarrier.wait(full.index(stage), (step // STAGES) & 1)
                mbarrier.arrive(free.index(stage), count=1)
                step += 1
        index += gl.num_programs(0)


@jit
def _store_gate_up(ptr, row, row_ok, first_col, gate, up, D_FF: gl.constexpr, OUT: gl.constexpr):
    """gate and up side by side in rows of 2 * D_FF."""
    dtype: gl.constexpr = ptr.dtype.element_ty
    col = first_col + gl.arange(0, 128, gl.SliceLayout(0, OUT))
    at = gl.expand_dims(row.to(gl.int64) * (2 * D_FF), 1) + gl.expand_dims(col, 0)
    ok = gl.expand_dims(row_ok, 1) & gl.expand_dims(col < D_FF, 0)
    gl.store(ptr + at, gl.convert_layout(gate.to(dtype), OUT), ok)
    gl.store(ptr + at + D_FF, gl.convert_layout(up.to(dtype), OUT), ok)


@jit
def _grouped_kernel(
    rows,                           # gate_up: x (n_tokens, N_IN); project: hidden, by expert
    w_desc,                         # (n_experts, N_IN, 2 * N_OUT) or (n_experts, N_IN, N_OUT)
    out_ptr,                        # gate_up: (n_visits, N_OUT) by expert; project: by token
    gate_up_ptr,                    # (n_visits, 2 * N_OUT), if SAVE
    weights_ptr,                    # (n_visits,) by token: what a visit counts
    visits_ptr, starts_ptr, tile_expert_ptr, tile_first_ptr, n_used_ptr,
    K: gl.constexpr, N_IN: gl.constexpr, N_OUT: gl.constexpr, GATE_UP: gl.constexpr,
    GATHER: gl.constexpr, SAVE: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
    REGISTERS: gl.constexpr, SPARE: gl.constexpr,
    COPIERS: gl.constexpr,
):
    """One program: its share of the tiles; a warpgroup copies, two multiply."""
    dtype: gl.constexpr = w_desc.dtype
    N_BOXES: gl.constexpr = 2 if GATE_UP else 1
    A: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
    B: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 256], dtype)
    a_s = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], A)
    b_s = gl.allocate_shared_memory(dtype, [STAGES, 64, 256], B)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + (128 if GATHER else 0))
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    n_cols = (N_OUT + 256 // N_BOXES - 1) // (256 // N_BOXES)
    tiles = (a_s, b_s)
    bars = (full, free)
    groups = (visits_ptr, starts_ptr, tile_expert_ptr, tile_first_ptr, n_used_ptr)
    gl.warp_specialize([
        (_multiply, (out_ptr, gate_up_ptr, weights_ptr, tiles, bars, groups, n_cols,
                     0, N_IN, N_OUT, GATE_UP, GATHER, SAVE, STAGES, BAND)),
        (_multiply, (out_ptr, gate_up_ptr, weights_ptr, tiles, bars, groups, n_cols,
                     1, N_IN, N_OUT, GATE_UP, GATHER, SAVE, STAGES, BAND)),
        (_produce, (rows, w_desc, tiles, bars, groups, n_cols,
                    K, N_IN, N_OUT, GATE_UP, GATHER, STAGES, BAND)),
    ], [4, COPIERS], [REGISTERS, SPARE])


def supports(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> bool:
    """Whether `gate_up` and `project` take them; kernels.py has kernels for all else."""
    gpu = gpu_facts()
    d_ff, d = w_down.shape[1:]
    return (
        gpu is not None
        and torch.version.hip is None
        and gpu.capability == (9, 0)
        and x.dtype in (torch.bfloat16, torch.float16)
        and d % STEP == 0 and d_ff % 8 == 0
        and all(t.data_ptr() % 16 == 0 for t in (x, w_gate_up, w_down))
    )


def gate_up(x, w_gate_up, hidden, gate_up, groups, *, k: int, save: bool, **changes) -> None:
    """Fill `hidden` (n_visits, d_ff) by expert, and `gate_up` (n_visits, 2 * d_ff) if `save`.

    `groups`: visits, starts, tile_expert, tile_first and n_used of row tiles of ROWS visits.
    """
    d, d_ff = x.shape[1], hidden.shape[1]
    plan = constants(d, d_ff, k, gate_up=True, save=save) | changes
    rows = x if plan["GATHER"] else _rows(x)
    _grouped_kernel[(_programs(groups, d_ff, 128),)](
        rows, _weights(w_gate_up, 128), hidden, gate_up, hidden, *groups, **plan,
        num_warps=4, maxnreg=MAX_REGISTERS,
    )  # fmt: skip


def project(hidden, w_down, weights, parts, groups, *, k: int, **changes) -> None:
    """Fill `parts` (n_visits, d) by token: each visit's hidden row times w_down and its weight."""
    d_ff, d = w_down.shape[1:]
    plan = constants(d_ff, d, k, gate_up=False, save=False) | changes
    _grouped_kernel[(_programs(groups, d, 256),)](
        _rows(hidden), _weights(w_down, 256), parts, parts, weights, *groups, **plan,
        num_warps=4, maxnreg=MAX_REGISTERS,
    )  # fmt: skip


def constants(
    n_in: int, n_out: int, k: int, *, gate_up: bool, save: bool, gather: bool | None = None
) -> dict:
    """What the kernel is compiled for."""
    gather = gate_up if gather is None else gather
    registers, spare = REGISTERS[gather]
    stages = 3 if gather and n_in >= 4096 else 4    # measured on an H200
    return {
        "K": k, "N_IN": n_in, "N_OUT": n_out, "GATE_UP": gate_up, "GATHER": gather,
        "SAVE": save, "STAGES": stages, "BAND": BAND, "REGISTERS": registers, "SPARE": spare,
        "COPIERS": 4 if gather else 1,
    }  # fmt: skip


def tile_layout(shape: list[int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory for TMA and for the products."""
    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for(shape, element)


def _rows(x: Tensor) -> TensorDescriptor:
    """TMA copies 64 rows that lie in order."""
    block = [64, STEP]
    return TensorDescriptor(
        x, list(x.shape), [x.shape[1], 1], block, tile_layout(block, x.dtype)
    )


def _weights(w: Tensor, cols: int) -> TensorDescriptor:
    """TMA copies (STEP, cols) of one expert's matrix; what lies outside reads as 0."""
    block = [1, STEP, cols]
    return TensorDescriptor(
        w, list(w.shape), list(w.stride()), block, tile_layout(block, w.dtype)
    )


def _programs(groups, n_out: int, cols: int) -> int:
    """One a multiprocessor, unless there are fewer tiles."""
    return min(gpu_facts().n_sms, len(groups[2]) * ceil_div(n_out, cols))
