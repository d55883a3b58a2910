"""Block-sparse flash attention in Triton, forward and backward, as one differentiable operator.

The loops are those of flash attention; a program walks the live blocks alone. Where they are a
window, with or without sinks, their numbers follow from the program's own place. Otherwise they
stand in lists, which one small kernel makes from the pattern's terms or from chosen blocks: full
blocks first, then partial ones, in which the kernel evaluates the rule pair by pair. Every sum has
one owner and one order, so two runs give the same bits.
"""

import inspect
import math
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from llmopt_lab.core.device import gpu_facts, interpreting, pick_device, prepare_triton
from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import ceil_div
from llmopt_lab.sparse_attention import hopper
from llmopt_lab.sparse_attention.records import BlockLists

prepare_triton()

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)   # exp(x) == exp2(x * LOG2_E), exp2 is one instruction
MIN_D = 16                                  # tl.dot wants at least 16 columns
MAX_D = 256
MAX_ROW_STRIDE = 1 << 24                    # elements
FAR = 1 << 30                               # further than any token, as in the patterns
FIELDS = tl.constexpr(16)                   # int32 of one term in the table: two bands
MOST_UNROLLED = 2                           # terms that a kernel is compiled for
CHUNK = tl.constexpr(256)                   # terms that are looked at at once
EVERYTHING = (1, -FAR, FAR, 1, -FAR, FAR, -FAR, FAR)    # a band, field by field
NOTHING = (1, 1, 0, 1, 0, 0, 0, 0)
PARTIAL, FULL = tl.constexpr(1), tl.constexpr(2)
SINK_PART = 1024                            # queries of a part for each 64 sinks


def jit(fn, **options):
    """triton.jit of the function itself, which a test's type checker may have wrapped."""
    return triton.jit(inspect.unwrap(fn), **options)


# one compilation for every length and every width
sized_jit = partial(jit, do_not_specialize=(
    "n_q", "n_k", "n_parts", "list_head", "n_terms", "low", "high", "n_sinks",
))


# The lists


@jit
def _floor_div(a, b):
    rest = (a % b + b) % b      # a % b has the sign of a on a GPU, of b under the interpreter
    return (a - rest) // b


@jit
def _held(
    at, first_row, last_row, first_col, last_col,                       # tokens, ends included
):
    """Whether one band holds a pair of these blocks, and whether it holds all of them."""
    grain, low, high, step = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    row_begin, row_end = tl.load(at + 4), tl.load(at + 5)
    col_begin, col_end = tl.load(at + 6), tl.load(at + 7)
    top, bottom = _floor_div(first_row, grain), _floor_div(last_row, grain)
    left, right = first_col // grain, last_col // grain
    top_in, bottom_in = tl.maximum(top, row_begin), tl.minimum(bottom, row_end - 1)
    left_in, right_in = tl.maximum(left, col_begin), tl.minimum(right, col_end - 1)
    lowest = tl.maximum(top_in - right_in, low)                         # of row - col
    highest = tl.minimum(bottom_in - left_in, high)
    some = (
        (_floor_div(highest, step) * step >= lowest) & (top_in <= bottom_in)
        & (left_in <= right_in)
    )
    one_diagonal = (top == bottom) & (left == right) & ((top - left) % step == 0)
    every = (
        (top >= row_begin) & (bottom < row_end) & (left >= col_begin) & (right < col_end)
        & (top - right >= low) & (bottom - left <= high) & ((step == 1) | one_diagonal)
    )
    return some, every


@jit
def _near(
    at, ok, owner, n_q, n_k,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, OF_KEYS: tl.constexpr,
):
    """Whether the first bands at `at` are about the rows, or the columns, of the owner."""
    grain = tl.load(at, ok, other=1)
    if OF_KEYS:
        begin, end = tl.load(at + 6, ok, other=1), tl.load(at + 7, ok, other=0)
        first, last = owner * BLOCK_K // grain, (owner * BLOCK_K + BLOCK_K - 1) // grain
    else:
        begin, end = tl.load(at + 4, ok, other=1), tl.load(at + 5, ok, other=0)
        token = owner * BLOCK_Q + n_k - n_q
        first, last = _floor_div(token, grain), _floor_div(token + BLOCK_Q - 1, grain)
    return ok & (first < end) & (last >= begin)


@jit
def _states(
    terms_ptr, grid_ptr, which, owner, begin, n_terms, n_q, n_k, n_owners, n_walked,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, FROM_TERMS: tl.constexpr,
    OF_KEYS: tl.constexpr, WIDTH: tl.constexpr,
):
    """(WIDTH,) int32, 0, PARTIAL or FULL: the owner's block and the blocks [begin, begin + WIDTH).

    A cover: no allowed pair is lost. Exact for one band. Of two that must hold together a block is
    live if each holds a pair of it; of several terms it is full if one of them holds all of it.
    """
    walked = begin + tl.arange(0, WIDTH)                                # (WIDTH,)
    col = walked
    if OF_KEYS:
        col = tl.zeros_like(walked) + owner
    if FROM_TERMS:
        if OF_KEYS:
            row_block, col_block = walked, owner
        else:
            row_block, col_block = owner, walked
        first_row, first_col = row_block * BLOCK_Q, col_block * BLOCK_K
        last_row = tl.minimum(first_row + BLOCK_Q, n_q) - 1 + n_k - n_q
        last_col = tl.minimum(first_col + BLOCK_K, n_k) - 1
        first_row += n_k - n_q
        some = walked < 0
        every = walked < 0
        # of many terms, most are about other rows than this: the others are picked one by one
        for chunk in range(0, n_terms, CHUNK):
            i = chunk + tl.arange(0, CHUNK)                             # (CHUNK,)
            near = _near(
                terms_ptr + i * FIELDS, i < n_terms, owner, n_q, n_k, BLOCK_Q, BLOCK_K, OF_KEYS
            )
            left = tl.where(near, i, n_terms)
            j = tl.min(left, axis=0)
            while j < n_terms:
                at = terms_ptr + j * FIELDS
                some_1, every_1 = _held(at, first_row, last_row, first_col, last_col)
                some_2, every_2 = _held(at + 8, first_row, last_row, first_col, last_col)
                some = some | (some_1 & some_2)
                every = every | (every_1 & every_2)
                left = tl.where(left == j, n_terms, left)
                j = tl.min(left, axis=0)
        state = tl.where(every, FULL, tl.where(some, PARTIAL, 0))
    else:
        n_cols = n_owners if OF_KEYS else n_walked
        row = walked if OF_KEYS else tl.zeros_like(walked) + owner
        at = grid_ptr + which * n_owners * n_walked + row.to(tl.int64) * n_cols + col
        state = tl.load(at, walked < n_walked, other=0).to(tl.int32)
    past_end = (col + 1) * BLOCK_K > n_k                                # some keys are not there
    state = tl.where(past_end, tl.minimum(state, PARTIAL), state)
    return tl.where(walked < n_walked, state, 0)


@jit
def _list_kernel(
    terms_ptr, grid_ptr,            # (n_terms, FIELDS) int32; (n_lists, n_rows, n_cols) int8
    blocks_ptr, n_full_ptr, n_live_ptr,     # (n_lists, n_owners, n_walked), (n_lists, n_owners)
    n_terms, n_q, n_k, n_owners, n_walked,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, FROM_TERMS: tl.constexpr,
    OF_KEYS: tl.constexpr,          # who owns a list: a block of keys, or else one of queries
    WIDTH: tl.constexpr, ONCE: tl.constexpr,    # whether WIDTH holds all candidates
):
    """One program: the list of one block, full blocks first, WIDTH candidates at a time."""
    pid = tl.program_id(0).to(tl.int64)
    owner = (pid % n_owners).to(tl.int32)
    which = pid // n_owners
    out = blocks_ptr + pid * n_walked
    n_all_full = 0
    if not ONCE:
        for begin in range(0, n_walked, WIDTH):
            state = _states(
                terms_ptr, grid_ptr, which, owner, begin, n_terms, n_q, n_k, n_owners, n_walked,
                BLOCK_Q, BLOCK_K, FROM_TERMS, OF_KEYS, WIDTH,
            )
            n_all_full += tl.sum((state == FULL).to(tl.int32), axis=0)
    n_full = 0
    n_live = n_all_full
    for begin in range(0, n_walked, WIDTH):
        walked = begin + tl.arange(0, WIDTH)                            # (WIDTH,)
        state = _states(
            terms_ptr, grid_ptr, which, owner, begin, n_terms, n_q, n_k, n_owners, n_walked,
            BLOCK_Q, BLOCK_K, FROM_TERMS, OF_KEYS, WIDTH,
        )
        full, partial = (state == FULL).to(tl.int32), (state == PARTIAL).to(tl.int32)
        if ONCE:
            n_live = tl.sum(full, axis=0)
        tl.store(out + n_full + tl.cumsum(full, 0) - full, walked, full != 0)
        tl.store(out + n_live + tl.cumsum(partial, 0) - partial, walked, partial != 0)
        n_full += tl.sum(full, axis=0)
        n_live += tl.sum(partial, axis=0)
    tl.store(n_full_ptr + pid, n_full)
    tl.store(n_live_ptr + pid, n_live)


@jit
def _grid_kernel(
    blocks_ptr, n_full_ptr, n_live_ptr, grid_ptr,       # lists, and their grid, zeros before
    most, n_cols,
    WIDTH: tl.constexpr,
):
    """One program: one list back into its row of the grid."""
    pid = tl.program_id(0).to(tl.int64)
    n_full, n_live = tl.load(n_full_ptr + pid), tl.load(n_live_ptr + pid)
    for begin in range(0, most, WIDTH):
        i = begin + tl.arange(0, WIDTH)                                 # (WIDTH,)
        block = tl.load(blocks_ptr + pid * most + i, i < n_live, other=0)
        state = tl.where(i < n_full, FULL, PARTIAL).to(tl.int8)
        tl.store(grid_ptr + pid * n_cols + block, state, i < n_live)


@jit
def _select_kernel(
    scores_ptr,                     # (n_lists, n_rows, n_cols) float32
    terms_ptr, n_terms,             # blocks that hold none of these pairs are never chosen
    always_ptr, n_always,           # blocks that hold one of these are always
    grid_ptr,                       # (n_lists, n_rows, n_cols) int8, the result
    n_q, n_k, n_rows, n_cols, n_blocks,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ALWAYS: tl.constexpr, WIDTH: tl.constexpr,
):
    """One program: the `n_blocks` best blocks of one row; of equals the first."""
    pid = tl.program_id(0).to(tl.int64)
    row = (pid % n_rows).to(tl.int32)
    col = tl.arange(0, WIDTH)                                           # (WIDTH,)
    state = _states(
        terms_ptr, grid_ptr, 0, row, 0, n_terms, n_q, n_k, n_rows, n_cols,
        BLOCK_Q, BLOCK_K, True, False, WIDTH,
    )
    chosen = col < 0
    if ALWAYS:
        kept = _states(
            always_ptr, grid_ptr, 0, row, 0, n_always, n_q, n_k, n_rows, n_cols,
            BLOCK_Q, BLOCK_K, True, False, WIDTH,
        )
        chosen = (kept > 0) & (state > 0)
    scores = tl.load(scores_ptr + pid * n_cols + col, col < n_cols, other=-float("inf"))
    scores = tl.where((state > 0) & (chosen == 0), scores, -float("inf"))
    for _ in range(n_blocks):
        best = tl.max(scores, axis=0)
        place = tl.min(tl.where(scores == best, col, WIDTH), axis=0)
        taken = (col == place) & (scores > -float("inf"))
        chosen = chosen | taken
        scores = tl.where(taken, -float("inf"), scores)
    tl.store(grid_ptr + pid * n_cols + col, tl.where(chosen, state, 0).to(tl.int8), col < n_cols)


# The rule inside a block


@jit
def _seen(
    row, col, top, left,            # tokens: (rows,) and (cols,), and the first of each
    terms_ptr, n_terms, low, high, n_sinks,
    SINKS: tl.constexpr, TERMS: tl.constexpr, STEPS: tl.constexpr, GRAINS: tl.constexpr,
    KEYS_FIRST: tl.constexpr,       # whether the result is (cols, rows)
):
    """Whether queries see keys, (rows, cols). TERMS 0: the window [low, high], and sinks with it.

    Otherwise by the table of terms: so many of them, unrolled, or any number (-1).
    """
    back = _by_row(row, KEYS_FIRST) - _by_col(col, KEYS_FIRST)
    if TERMS == 0:
        seen = (back >= low) & (back <= high)
        if SINKS:
            seen = seen | (_by_col(col < n_sinks, KEYS_FIRST) & (back >= 0))
    else:
        seen = back < -(1 << 30)
        if TERMS > 0:
            for i in tl.static_range(TERMS):
                at = terms_ptr + i * FIELDS
                seen = seen | _term(row, col, back, at, STEPS, GRAINS, KEYS_FIRST)
        else:
            for i in range(n_terms):
                at = terms_ptr + i * FIELDS
                grain = tl.load(at)
                near = (
                    (_floor_div(top + row.shape[0] - 1, grain) >= tl.load(at + 4))
                    & (_floor_div(top, grain) < tl.load(at + 5))
                    & ((left + col.shape[0] - 1) // grain >= tl.load(at + 6))
                    & (left // grain < tl.load(at + 7))
                )
                if near:
                    seen = seen | _term(row, col, back, at, STEPS, GRAINS, KEYS_FIRST)
    return seen


@jit
def _by_row(x, KEYS_FIRST: tl.constexpr):
    if KEYS_FIRST:
        x = x[None, :]
    else:
        x = x[:, None]
    return x


@jit
def _by_col(x, KEYS_FIRST: tl.constexpr):
    if KEYS_FIRST:
        x = x[:, None]
    else:
        x = x[None, :]
    return x


@jit
def _term(
    row, col, back, at, STEPS: tl.constexpr, GRAINS: tl.constexpr, KEYS_FIRST: tl.constexpr,
):
    held = _band(row, col, back, at, STEPS, GRAINS, KEYS_FIRST)
    if GRAINS:                      # only then has a term two bands
        held = held & _band(row, col, back, at + 8, STEPS, GRAINS, KEYS_FIRST)
    return held


@jit
def _band(
    row, col, back, at, STEPS: tl.constexpr, GRAINS: tl.constexpr, KEYS_FIRST: tl.constexpr,
):
    """Which of these pairs one band holds."""
    low, high = tl.load(at + 1), tl.load(at + 2)
    r, c = row, col
    if GRAINS:
        grain = tl.load(at)
        r, c = _floor_div(row, grain), col // grain
        back = _by_row(r, KEYS_FIRST) - _by_col(c, KEYS_FIRST)
    row_ok = (r >= tl.load(at + 4)) & (r < tl.load(at + 5))
    col_ok = (c >= tl.load(at + 6)) & (c < tl.load(at + 7))
    held = (back >= low) & (back <= high)
    if STEPS:
        # a distance is a multiple of step if both leave the same rest; -1 and -2 equal no rest
        step = tl.load(at + 3)
        row_rest = tl.where(row_ok, r - _floor_div(r, step) * step, -1)
        col_rest = tl.where(col_ok, c % step, -2)
        held = held & (_by_row(row_rest, KEYS_FIRST) == _by_col(col_rest, KEYS_FIRST))
    else:
        held = held & _by_row(row_ok, KEYS_FIRST) & _by_col(col_ok, KEYS_FIRST)
    return held


# Which tiles a program walks


@jit
def _span(some_first, some_last, all_first, all_last, n, TILE: tl.constexpr):
    """Tiles of [0, n): live ones [begin, end), of which [full_begin, full_end) are full.

    [some_first, some_last] is what anybody sees or is seen by, [all_first, all_last] what all.
    """
    begin = tl.maximum(some_first, 0) // TILE
    end = tl.maximum(tl.cdiv(tl.minimum(some_last + 1, n), TILE), begin)
    full_begin = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(all_first, 0), TILE), begin), end)
    full_end = tl.maximum(tl.minimum(all_last + 1, n), 0) // TILE
    full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
    return begin, full_begin, full_end, end


@jit
def _keys_of(
    first_q, last_q, n_q, n_k, low, high, n_sinks, n_full_ptr, n_live_ptr, list_at,
    TILE_K: tl.constexpr, BLOCK_K: tl.constexpr, LISTED: tl.constexpr, SINKS: tl.constexpr,
):
    """(full tiles, partial tiles, begin, full_begin, full_end, end) of keys of some queries."""
    if LISTED:
        per_block: tl.constexpr = BLOCK_K // TILE_K
        n_full = tl.load(n_full_ptr + list_at) * per_block
        n_partial = tl.load(n_live_ptr + list_at) * per_block - n_full
        begin, full_begin, full_end, end = 0, 0, 0, 0
    else:
        first, last = first_q + n_k - n_q, last_q + n_k - n_q           # tokens
        begin, full_begin, full_end, end = _span(
            first - high, last - low, last - high, first - low, n_k, TILE_K
        )
        n_full = full_end - full_begin
        n_partial = end - begin - n_full
        if SINKS:
            n_partial += tl.minimum(tl.cdiv(n_sinks, TILE_K), begin)
    return n_full, n_partial, begin, full_begin, full_end, end


@jit
def _queries_of(
    first_k, n_q, n_k, low, high, n_full_ptr, n_live_ptr, list_at,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BLOCK_Q: tl.constexpr, LISTED: tl.constexpr,
):
    """`_keys_of` the other way round: the tiles of queries that see some keys. Never for sinks."""
    if LISTED:
        per_block: tl.constexpr = BLOCK_Q // TILE_Q
        n_full = tl.load(n_full_ptr + list_at) * per_block
        n_partial = tl.load(n_live_ptr + list_at) * per_block - n_full
        begin, full_begin, full_end, end = 0, 0, 0, 0
    else:
        first = first_k + n_q - n_k                                     # query of the same token
        last = first + TILE_K - 1
        begin, full_begin, full_end, end = _span(
            first + low, last + high, last + low, first + high, n_q, TILE_Q
        )
        n_full = full_end - full_begin
        n_partial = end - begin - n_full
    return n_full, n_partial, begin, full_begin, full_end, end


@jit
def _tile_at(
    step, begin, full_begin, full_end, end, blocks_at, n_before,
    MASKED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, LISTED: tl.constexpr,
):
    """First row of the step-th full (or, MASKED, partial) tile."""
    if LISTED:
        per_block: tl.constexpr = BLOCK // TILE
        block = tl.load(blocks_at + (n_before + step) // per_block)
        first = block * BLOCK + (n_before + step) % per_block * TILE
    elif MASKED:
        # before the full ones, behind them, and then the sinks' from tile 0 on
        behind = step - (full_begin - begin)
        sink = behind - (end - full_end)
        tile = tl.where(behind < 0, begin + step, tl.where(sink < 0, full_end + behind, sink))
        first = tile * TILE
    else:
        first = (full_begin + step) * TILE
    return first


@jit
def _owned(n_tiles, n_heads):
    """(tile, head, batch) of this program: the tiles of one head start one after the other."""
    pid = tl.program_id(0)
    rest = pid // n_tiles
    return pid % n_tiles, rest % n_heads, (rest // n_heads).to(tl.int64)


@jit
def _from_both_ends(tile, n_tiles, LISTED: tl.constexpr):
    """The order of the query tiles, heavy ones first: the last ones of a causal pattern.

    Other patterns may have global tokens at both ends.
    """
    if LISTED:
        tile = tl.where(tile % 2 == 0, n_tiles - 1 - tile // 2, tile // 2)
    else:
        tile = n_tiles - 1 - tile
    return tile


# Loads and stores, as in flash attention


@jit
def _rows_of(
    x_ptr, n_heads, n_rows, x_head, x_row,
    ROWS: tl.constexpr, D_HEAD: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr,
):
    """Where `_load_rows` finds (n_heads, n_rows, D_HEAD): a pointer, or a TMA descriptor of it."""
    if TMA:
        rows = tl.make_tensor_descriptor(
            x_ptr, [n_heads, n_rows, D_HEAD], [x_head, x_row, 1], [1, ROWS, D]
        )
    else:
        rows = x_ptr
    return rows


@jit
def _load_rows(
    rows, head, first, n_rows, x_head, x_row,
    ROWS: tl.constexpr, D_HEAD: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr,
    CHECKED: tl.constexpr,          # whether the tile may end past n_rows
):
    """Rows [first, first + ROWS) of one head, (ROWS, D): 0 past n_rows and past D_HEAD."""
    if TMA:
        x = rows.load([head, first, 0]).reshape(ROWS, D)
    else:
        row = tl.arange(0, ROWS)                                        # (ROWS,)
        d = tl.arange(0, D)                                             # (D,)
        start = rows + tl.cast(head, tl.int64) * x_head + tl.cast(first, tl.int64) * x_row
        at = start + row[:, None] * x_row + d[None, :]                  # (ROWS, D)
        if CHECKED:
            ok = (first + row < n_rows)[:, None]
            if D_HEAD < D:
                ok = ok & (d < D_HEAD)[None, :]
            x = tl.load(at, ok, other=0.0)
        elif D_HEAD < D:
            x = tl.load(at, (d < D_HEAD)[None, :], other=0.0)
        else:
            x = tl.load(at)
    return x


@jit
def _store_rows(
    x_ptr, x, head, first, n_rows, x_head, x_row,
    ROWS: tl.constexpr, D_HEAD: tl.constexpr, D: tl.constexpr,
):
    row = tl.arange(0, ROWS)                                            # (ROWS,)
    d = tl.arange(0, D)                                                 # (D,)
    start = x_ptr + tl.cast(head, tl.int64) * x_head + tl.cast(first, tl.int64) * x_row
    at = start + row[:, None] * x_row + d[None, :]                      # (ROWS, D)
    ok = (first + row < n_rows)[:, None] & (d < D_HEAD)[None, :]
    tl.store(at, x.to(x_ptr.dtype.element_ty), ok)


# Forward


@jit
def _absorb(
    m, total, acc,                  # (TILE_Q,), (TILE_Q,), (TILE_Q, D): the softmax so far
    q, token, top,                  # (TILE_Q, D), (TILE_Q,): the queries, their tokens, the first
    k_rows, v_rows, kv_head, k_head, k_row, v_head, v_row,
    n_tiles, begin, full_begin, full_end, end, blocks_at, n_before,     # as `_tile_at`
    terms_ptr, n_terms, low, high, n_sinks, n_k, scale_log2,
    MASKED: tl.constexpr,           # whether some row sees only a part of these keys
    TILE_K: tl.constexpr, BLOCK_K: tl.constexpr, LISTED: tl.constexpr,
    SINKS: tl.constexpr, TERMS: tl.constexpr, STEPS: tl.constexpr, GRAINS: tl.constexpr,
    D_HEAD: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):
    """Fold the full, or the partial, tiles of keys into the running softmax."""
    for step in tl.range(0, n_tiles, num_stages=STAGES):
        first = _tile_at(
            step, begin, full_begin, full_end, end, blocks_at, n_before,
            MASKED, TILE_K, BLOCK_K, LISTED,
        )
        k = _load_rows(
            k_rows, kv_head, first, n_k, k_head, k_row, TILE_K, D_HEAD, D, TMA, CHECKED=MASKED
        )
        v = _load_rows(
            v_rows, kv_head, first, n_k, v_head, v_row, TILE_K, D_HEAD, D, TMA, CHECKED=MASKED
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)      # (TILE_Q, TILE_K)
        if MASKED:
            key = first + tl.arange(0, TILE_K)                          # (TILE_K,)
            seen = _seen(
                token, key, top, first, terms_ptr, n_terms, low, high, n_sinks,
                SINKS, TERMS, STEPS, GRAINS, False,
            )
            scores = tl.where(seen & (key < n_k)[None, :], scores, -float("inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1) * scale_log2)      # (TILE_Q,)
        if MASKED:
            # a row that sees no key keeps m = -inf, and -inf - -inf would be NaN
            base = tl.where(m_new == -float("inf"), 0.0, m_new)
        else:
            base = m_new
        shrink = tl.exp2(m - base)                                      # (TILE_Q,)
        p = tl.exp2(scores * scale_log2 - base[:, None])                # (TILE_Q, TILE_K)
        total = shrink * total + tl.sum(p, axis=1)
        acc = shrink[:, None] * acc
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)  # (TILE_Q, D)
        m = m_new
    return m, total, acc


@sized_jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr,            # (batch, n_heads, n_q, D_HEAD), (batch, n_kv_heads, n_k, ..)
    out_ptr, lse_ptr,               # like q; (batch, n_heads, n_q) float32
    blocks_ptr, n_full_ptr, n_live_ptr, terms_ptr,      # lists of key blocks, terms
    q_batch, q_head, q_row,         # strides in elements; the last dimension is contiguous
    k_batch, k_head, k_row,
    v_batch, v_head, v_row,
    out_batch, out_head, out_row,
    n_heads, group, n_q, n_k, list_head, n_terms, low, high, n_sinks, scale,
    D_HEAD: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    LISTED: tl.constexpr, SINKS: tl.constexpr, TERMS: tl.constexpr, STEPS: tl.constexpr,
    GRAINS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):
    """One program: TILE_Q queries of one head against the blocks of keys that they see.

    `list_head` is the number of lists a KV head has: 0 where all heads share them.
    """
    tile, head, batch = _owned(tl.cdiv(n_q, TILE_Q), n_heads)
    kv_head = head // group
    first_q = _from_both_ends(tile, tl.cdiv(n_q, TILE_Q), LISTED) * TILE_Q
    scale_log2 = scale * LOG2_E
    k_at, v_at = k_ptr + batch * k_batch, v_ptr + batch * v_batch
    k_rows = _rows_of(k_at, n_heads // group, n_k, k_head, k_row, TILE_K, D_HEAD, D, TMA)
    v_rows = _rows_of(v_at, n_heads // group, n_k, v_head, v_row, TILE_K, D_HEAD, D, TMA)
    q_at = q_ptr + batch * q_batch
    q = _load_rows(
        q_at, head, first_q, n_q, q_head, q_row, TILE_Q, D_HEAD, D, False, CHECKED=True
    )
    row = first_q + tl.arange(0, TILE_Q)                                # (TILE_Q,)
    token = row + n_k - n_q
    list_at = (batch * (n_heads // group) + kv_head) * list_head + first_q // BLOCK_Q
    blocks_at = blocks_ptr + list_at * tl.cdiv(n_k, BLOCK_K)
    n_full, n_partial, begin, full_begin, full_end, end = _keys_of(
        first_q, tl.minimum(first_q + TILE_Q, n_q) - 1, n_q, n_k, low, high, n_sinks,
        n_full_ptr, n_live_ptr, list_at, TILE_K, BLOCK_K, LISTED, SINKS,
    )

    m = tl.full((TILE_Q,), -float("inf"), tl.float32)
    total = tl.zeros((TILE_Q,), tl.float32)
    acc = tl.zeros((TILE_Q, D), tl.float32)
    m, total, acc = _absorb(
        m, total, acc, q, token, first_q + n_k - n_q,
        k_rows, v_rows, kv_head, k_head, k_row, v_head, v_row,
        n_full, begin, full_begin, full_end, end, blocks_at, 0,
        terms_ptr, n_terms, low, high, n_sinks, n_k, scale_log2,
        False, TILE_K, BLOCK_K, LISTED, SINKS, TERMS, STEPS, GRAINS, D_HEAD, D, PRECISION, STAGES,
        TMA,
    )
    m, total, acc = _absorb(
        m, total, acc, q, token, first_q + n_k - n_q,
        k_rows, v_rows, kv_head, k_head, k_row, v_head, v_row,
        n_partial, begin, full_begin, full_end, end, blocks_at, n_full,
        terms_ptr, n_terms, low, high, n_sinks, n_k, scale_log2,
        True, TILE_K, BLOCK_K, LISTED, SINKS, TERMS, STEPS, GRAINS, D_HEAD, D, PRECISION, STAGES,
        TMA,
    )

    total = tl.where(total == 0, 1.0, total)    # a row that saw no key: out 0, lse -inf (from m)
    out_at = out_ptr + batch * out_batch
    acc = acc / total[:, None]
    _store_rows(out_at, acc, head, first_q, n_q, out_head, out_row, TILE_Q, D_HEAD, D)
    lse = (m + tl.log2(total)) / LOG2_E                                 # (TILE_Q,)
    tl.store(lse_ptr + (batch * n_heads + head) * n_q + row, lse, row < n_q)


# Backward


@jit
def _absorb_queries(
    d_k, d_v, k, v, key, first_k,   # (TILE_K, D) each, (TILE_K,), int: this program's keys
    q_rows, d_out_rows, lse_at, delta_at,                               # of all heads
    first_head, group, q_head, q_row, d_out_head, d_out_row,
    n_tiles, begin, full_begin, full_end, end, blocks_at, n_before,     # as `_tile_at`
    terms_ptr, n_terms, low, high, n_sinks, n_q, n_k, scale_log2,
    MASKED: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BLOCK_Q: tl.constexpr, LISTED: tl.constexpr,
    SINKS: tl.constexpr, TERMS: tl.constexpr, STEPS: tl.constexpr, GRAINS: tl.constexpr,
    D_HEAD: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):
    """What the full, or the partial, tiles of queries of one group of heads send to these keys.

    Scores lie keys by queries here, so that both sums can read them from registers. One loop runs
    over the tiles of all heads, not one a head: its pipeline does not run dry between two heads.
    """
    per_head = tl.maximum(n_tiles, 1)       # the pipeline divides before it knows of no tiles
    for step in tl.range(0, group * n_tiles, num_stages=STAGES):
        head = first_head + step // per_head
        first = _tile_at(
            step % per_head, begin, full_begin, full_end, end, blocks_at, n_before,
            MASKED, TILE_Q, BLOCK_Q, LISTED,
        )
        row = first + tl.arange(0, TILE_Q)                              # (TILE_Q,)
        at = tl.cast(head, tl.int64) * n_q + row                        # (TILE_Q,)
        q = _load_rows(
            q_rows, head, first, n_q, q_head, q_row, TILE_Q, D_HEAD, D, TMA, CHECKED=True
        )
        # past the end p must be 0, whatever the keys: exp2(score - inf)
        lse = tl.load(lse_at + at, row < n_q, other=float("inf"))       # (TILE_Q,)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)      # (TILE_K, TILE_Q)
        p = tl.exp2(scores * scale_log2 - (lse * LOG2_E)[None, :])
        if MASKED:
            token = row + n_k - n_q                                     # (TILE_Q,)
            seen = _seen(
                token, key, first + n_k - n_q, first_k, terms_ptr, n_terms, low, high, n_sinks,
                SINKS, TERMS, STEPS, GRAINS, True,
            )
            p = tl.where(seen, p, 0.0)
        d_out = _load_rows(
            d_out_rows, head, first, n_q, d_out_head, d_out_row,
            TILE_Q, D_HEAD, D, TMA, CHECKED=True,
        )
        d_v = tl.dot(p.to(d_out.dtype), d_out, d_v, input_precision=PRECISION)
        delta = tl.load(delta_at + at, row < n_q, other=0.0)            # (TILE_Q,)
        # dS = P * (dP - delta): the product starts at -delta, which costs no registers later
        d_p = tl.zeros((TILE_K, TILE_Q), tl.float32) - delta[None, :]
        d_p = tl.dot(v, tl.trans(d_out), d_p, input_precision=PRECISION)    # (TILE_K, TILE_Q)
        d_scores = p * d_p
        d_k = tl.dot(d_scores.to(q.dtype), q, d_k, input_precision=PRECISION)
    return d_k, d_v


@sized_jit
def _sink_parts_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr,
    d_k_ptr, d_v_ptr,               # (batch * n_heads * n_parts, n_sinks, D_HEAD) float32
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    d_out_batch, d_out_head, d_out_row,
    n_heads, group, n_q, n_k, part, low, n_sinks, scale,
    D_HEAD: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):
    """One program: what `part` queries of one head send to TILE_K sinks from beyond the window.

    Such pairs are a window of their own, [low, n_k]. Every later query sees the sinks: one program
    that walked them all would take a long text's whole backward pass.
    """
    n_tiles = tl.cdiv(n_sinks, TILE_K)
    n_parts = tl.cdiv(n_q, part)
    tile, head, batch = _owned(n_tiles * n_parts, n_heads)
    first_k = tile % n_tiles * TILE_K
    first_q = tile // n_tiles * part
    k = _load_rows(
        k_ptr + batch * k_batch, head // group, first_k, n_k, k_head, k_row,
        TILE_K, D_HEAD, D, False, CHECKED=True,
    )
    v = _load_rows(
        v_ptr + batch * v_batch, head // group, first_k, n_k, v_head, v_row,
        TILE_K, D_HEAD, D, False, CHECKED=True,
    )
    q_at, d_out_at = q_ptr + batch * q_batch, d_out_ptr + batch * d_out_batch
    q_rows = _rows_of(q_at, n_heads, n_q, q_head, q_row, TILE_Q, D_HEAD, D, TMA)
    d_out_rows = _rows_of(d_out_at, n_heads, n_q, d_out_head, d_out_row, TILE_Q, D_HEAD, D, TMA)
    begin = tl.maximum(first_k + low + n_q - n_k, first_q) // TILE_Q
    end = tl.maximum(tl.cdiv(tl.minimum(first_q + part, n_q), TILE_Q), begin)

    d_k = tl.zeros((TILE_K, D), tl.float32)
    d_v = tl.zeros((TILE_K, D), tl.float32)
    d_k, d_v = _absorb_queries(
        d_k, d_v, k, v, first_k + tl.arange(0, TILE_K), first_k, q_rows, d_out_rows,
        lse_ptr + batch * n_heads * n_q, delta_ptr + batch * n_heads * n_q,
        head, 1, q_head, q_row, d_out_head, d_out_row,
        end - begin, begin, end, end, end, None, 0,                     # no list
        None, 0, low, n_k, 0, n_q, n_k, scale * LOG2_E,                 # no terms
        True, TILE_Q, TILE_K, TILE_Q, False, False, 0, False, False, D_HEAD, D, PRECISION,
        STAGES, TMA,
    )
    at = (batch * n_heads + head) * n_parts + tile // n_tiles
    part_size = n_sinks * D_HEAD
    _store_rows(d_k_ptr, d_k, at, first_k, n_sinks, part_size, D_HEAD, TILE_K, D_HEAD, D)
    _store_rows(d_v_ptr, d_v, at, first_k, n_sinks, part_size, D_HEAD, TILE_K, D_HEAD, D)


@jit
def _add_parts(
    total, parts_ptr, part, n_parts, first, n_sinks,
    ROWS: tl.constexpr, D_HEAD: tl.constexpr, D: tl.constexpr,
):
    """Rows [first, first + ROWS) of so many parts, from `part` on, in their order."""
    for i in range(n_parts):
        total += _load_rows(
            parts_ptr, part + i, first, n_sinks, n_sinks * D_HEAD, D_HEAD, ROWS, D_HEAD, D, False,
            CHECKED=True,
        )
    return total


@sized_jit
def _backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr,
    d_k_ptr, d_v_ptr,               # like k and v
    sinks_d_k_ptr, sinks_d_v_ptr,   # parts, of `_sink_parts_kernel`
    blocks_ptr, n_full_ptr, n_live_ptr, terms_ptr,      # lists of query blocks, terms
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    d_out_batch, d_out_head, d_out_row, d_k_batch, d_k_head, d_k_row, d_v_batch, d_v_head, d_v_row,
    n_kv_heads, group, n_q, n_k, n_parts, list_head, n_terms, low, high, n_sinks, scale,
    D_HEAD: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    LISTED: tl.constexpr, SINKS: tl.constexpr, TERMS: tl.constexpr, STEPS: tl.constexpr,
    GRAINS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):
    """One program: TILE_K keys of one KV head against every query of its group that sees them.

    Of sinks without lists it takes the window, and the rest from the parts that others made.
    """
    tile, kv_head, batch = _owned(tl.cdiv(n_k, TILE_K), n_kv_heads)
    first_k = tile * TILE_K     # the first tile first: sinks and causal patterns make it heavy
    scale_log2 = scale * LOG2_E
    n_heads = n_kv_heads * group
    k = _load_rows(
        k_ptr + batch * k_batch, kv_head, first_k, n_k, k_head, k_row,
        TILE_K, D_HEAD, D, False, CHECKED=True,
    )
    v = _load_rows(
        v_ptr + batch * v_batch, kv_head, first_k, n_k, v_head, v_row,
        TILE_K, D_HEAD, D, False, CHECKED=True,
    )
    key = first_k + tl.arange(0, TILE_K)                                # (TILE_K,)
    q_at, d_out_at = q_ptr + batch * q_batch, d_out_ptr + batch * d_out_batch
    q_rows = _rows_of(q_at, n_heads, n_q, q_head, q_row, TILE_Q, D_HEAD, D, TMA)
    d_out_rows = _rows_of(d_out_at, n_heads, n_q, d_out_head, d_out_row, TILE_Q, D_HEAD, D, TMA)
    lse_at, delta_at = lse_ptr + batch * n_heads * n_q, delta_ptr + batch * n_heads * n_q
    list_at = (batch * n_kv_heads + kv_head) * list_head + first_k // BLOCK_K
    blocks_at = blocks_ptr + list_at * tl.cdiv(n_q, BLOCK_Q)
    n_full, n_partial, begin, full_begin, full_end, end = _queries_of(
        first_k, n_q, n_k, low, high, n_full_ptr, n_live_ptr, list_at,
        TILE_Q, TILE_K, BLOCK_Q, LISTED,
    )

    d_k = tl.zeros((TILE_K, D), tl.float32)
    d_v = tl.zeros((TILE_K, D), tl.float32)
    if SINKS and not LISTED:
        n_parts = tl.where(first_k < n_sinks, n_parts * group, 0)       # of this KV head
        part = (batch * n_kv_heads + kv_head) * n_parts
        d_k = _add_parts(d_k, sinks_d_k_ptr, part, n_parts, first_k, n_sinks, TILE_K, D_HEAD, D)
        d_v = _add_parts(d_v, sinks_d_v_ptr, part, n_parts, first_k, n_sinks, TILE_K, D_HEAD, D)
    d_k, d_v = _absorb_queries(
        d_k, d_v, k, v, key, first_k, q_rows, d_out_rows, lse_at, delta_at,
        kv_head * group, group, q_head, q_row, d_out_head, d_out_row,
        n_full, begin, full_begin, full_end, end, blocks_at, 0,
        terms_ptr, n_terms, low, high, n_sinks, n_q, n_k, scale_log2,
        False, TILE_Q, TILE_K, BLOCK_Q, LISTED, SINKS and LISTED, TERMS, STEPS, GRAINS,
        D_HEAD, D, PRECISION, STAGES, TMA,
    )
    d_k, d_v = _absorb_queries(
        d_k, d_v, k, v, key, first_k, q_rows, d_out_rows, lse_at, delta_at,
        kv_head * group, group, q_head, q_row, d_out_head, d_out_row,
        n_partial, begin, full_begin, full_end, end, blocks_at, n_full,
        terms_ptr, n_terms, low, high, n_sinks, n_q, n_k, scale_log2,
        True, TILE_Q, TILE_K, BLOCK_Q, LISTED, SINKS and LISTED, TERMS, STEPS, GRAINS,
        D_HEAD, D, PRECISION, STAGES, TMA,
    )
    d_k_at, d_v_at = d_k_ptr + batch * d_k_batch, d_v_ptr + batch * d_v_batch
    _store_rows(d_k_at, d_k * scale, kv_head, first_k, n_k, d_k_head, d_k_row, TILE_K, D_HEAD, D)
    _store_rows(d_v_at, d_v, kv_head, first_k, n_k, d_v_head, d_v_row, TILE_K, D_HEAD, D)


@jit
def _absorb_keys(
    d_q, q, d_out,                  # (TILE_Q, D) each: this program's queries
    lse, delta, token, top,         # (TILE_Q,) each, and the first token
    k_rows, v_rows, kv_head, k_head, k_row, v_head, v_row,
    n_tiles, begin, full_begin, full_end, end, blocks_at, n_before,     # as `_tile_at`
    terms_ptr, n_terms, low, high, n_sinks, n_k, scale_log2,
    MASKED: tl.constexpr, TILE_K: tl.constexpr, BLOCK_K: tl.constexpr, LISTED: tl.constexpr,
    SINKS: tl.constexpr, TERMS: tl.constexpr, STEPS: tl.constexpr, GRAINS: tl.constexpr,
    D_HEAD: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):
    """What the full, or the partial, tiles of keys send to these queries."""
    for step in tl.range(0, n_tiles, num_stages=STAGES):
        first = _tile_at(
            step, begin, full_begin, full_end, end, blocks_at, n_before,
            MASKED, TILE_K, BLOCK_K, LISTED,
        )
        k = _load_rows(
            k_rows, kv_head, first, n_k, k_head, k_row, TILE_K, D_HEAD, D, TMA, CHECKED=MASKED
        )
        v = _load_rows(
            v_rows, kv_head, first, n_k, v_head, v_row, TILE_K, D_HEAD, D, TMA, CHECKED=MASKED
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)      # (TILE_Q, TILE_K)
        p = tl.exp2(scores * scale_log2 - (lse * LOG2_E)[:, None])
        if MASKED:
            key = first + tl.arange(0, TILE_K)                          # (TILE_K,)
            seen = _seen(
                token, key, top, first, terms_ptr, n_terms, low, high, n_sinks,
                SINKS, TERMS, STEPS, GRAINS, False,
            )
            p = tl.where(seen & (key < n_k)[None, :], p, 0.0)
        d_p = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)     # (TILE_Q, TILE_K)
        d_scores = p * (d_p - delta[:, None])
        d_q = tl.dot(d_scores.to(k.dtype), k, d_q, input_precision=PRECISION)   # (TILE_Q, D)
    return d_q


@sized_jit
def _backward_queries_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr,
    lse_ptr, d_lse_ptr, delta_ptr,  # (batch, n_heads, n_q) float32, contiguous; delta is a result
    d_q_ptr,                        # like q
    blocks_ptr, n_full_ptr, n_live_ptr, terms_ptr,      # lists of key blocks, terms
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row, d_out_batch, d_out_head, d_out_row,
    d_q_batch, d_q_head, d_q_row,
    n_heads, group, n_q, n_k, list_head, n_terms, low, high, n_sinks, scale,
    D_HEAD: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    LISTED: tl.constexpr, SINKS: tl.constexpr, TERMS: tl.constexpr, STEPS: tl.constexpr,
    GRAINS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):
    """One program: the gradient of TILE_Q queries of one head, over the keys that they see.

    And their delta = rowsum(d_out * out) - d_lse, with which dS is P * (dP - delta).
    """
    tile, head, batch = _owned(tl.cdiv(n_q, TILE_Q), n_heads)
    kv_head = head // group
    first_q = _from_both_ends(tile, tl.cdiv(n_q, TILE_Q), LISTED) * TILE_Q
    scale_log2 = scale * LOG2_E
    k_at, v_at = k_ptr + batch * k_batch, v_ptr + batch * v_batch
    k_rows = _rows_of(k_at, n_heads // group, n_k, k_head, k_row, TILE_K, D_HEAD, D, TMA)
    v_rows = _rows_of(v_at, n_heads // group, n_k, v_head, v_row, TILE_K, D_HEAD, D, TMA)
    q_at = q_ptr + batch * q_batch
    q = _load_rows(
        q_at, head, first_q, n_q, q_head, q_row, TILE_Q, D_HEAD, D, False, CHECKED=True
    )
    d_out_at = d_out_ptr + batch * d_out_batch
    d_out = _load_rows(
        d_out_at, head, first_q, n_q, d_out_head, d_out_row, TILE_Q, D_HEAD, D, False, CHECKED=True
    )
    row = first_q + tl.arange(0, TILE_Q)                                # (TILE_Q,)
    at = (batch * n_heads + head) * n_q + row                           # (TILE_Q,)
    lse = tl.load(lse_ptr + at, row < n_q, other=float("inf"))
    out = _load_rows(
        out_ptr + batch * out_batch, head, first_q, n_q, out_head, out_row,
        TILE_Q, D_HEAD, D, False, CHECKED=True,
    )
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), axis=1)   # (TILE_Q,)
    delta -= tl.load(d_lse_ptr + at, row < n_q, other=0.0)
    tl.store(delta_ptr + at, delta, row < n_q)
    list_at = (batch * (n_heads // group) + kv_head) * list_head + first_q // BLOCK_Q
    blocks_at = blocks_ptr + list_at * tl.cdiv(n_k, BLOCK_K)
    n_full, n_partial, begin, full_begin, full_end, end = _keys_of(
        first_q, tl.minimum(first_q + TILE_Q, n_q) - 1, n_q, n_k, low, high, n_sinks,
        n_full_ptr, n_live_ptr, list_at, TILE_K, BLOCK_K, LISTED, SINKS,
    )

    d_q = tl.zeros((TILE_Q, D), tl.float32)
    d_q = _absorb_keys(
        d_q, q, d_out, lse, delta, row + n_k - n_q, first_q + n_k - n_q,
        k_rows, v_rows, kv_head, k_head, k_row, v_head, v_row,
        n_full, begin, full_begin, full_end, end, blocks_at, 0,
        terms_ptr, n_terms, low, high, n_sinks, n_k, scale_log2,
        False, TILE_K, BLOCK_K, LISTED, SINKS, TERMS, STEPS, GRAINS, D_HEAD, D, PRECISION, STAGES,
        TMA,
    )
    d_q = _absorb_keys(
        d_q, q, d_out, lse, delta, row + n_k - n_q, first_q + n_k - n_q,
        k_rows, v_rows, kv_head, k_head, k_row, v_head, v_row,
        n_partial, begin, full_begin, full_end, end, blocks_at, n_full,
        terms_ptr, n_terms, low, high, n_sinks, n_k, scale_log2,
        True, TILE_K, BLOCK_K, LISTED, SINKS, TERMS, STEPS, GRAINS, D_HEAD, D, PRECISION, STAGES,
        TMA,
    )
    d_q_at = d_q_ptr + batch * d_q_batch
    _store_rows(d_q_at, d_q * scale, head, first_q, n_q, d_q_head, d_q_row, TILE_Q, D_HEAD, D)


def sparse_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, pattern, *,
    scale: float | None = None, lists: BlockLists | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention under a pattern, forward and backward, reading live blocks alone.

    Args:
        q: (batch, n_heads, n_q, d_head); float32, float16 or bfloat16; d_head a multiple of 8 up
            to 256. Query i is token i + n_k - n_q: the last query is the last token.
        k, v: (batch, n_kv_heads, n_k, d_head), the dtype of `q`; n_kv_heads divides n_heads
            (grouped-query attention). Only the last dimension of each must be contiguous.
        pattern: of `patterns.py`, the same for every head. Windows, and windows with sinks, need no
            lists; for any other they are made here, by one kernel.
        scale: of the scores, positive; 1/sqrt(d_head) if None.
        lists: blocks to visit, shared or one list a KV head, such as `select_blocks` makes; a pair
            counts if the pattern allows it AND its block is listed. Blocks of 16, 32, 64 or 128.
        return_lse: also return the log-sum-exp of each row's scaled scores.

    Returns:
        (batch, n_heads, n_q, d_head), the dtype of `q`, and with `return_lse` the natural
        log-sum-exp, (batch, n_heads, n_q) float32. Both are differentiable, once. A row that sees
        no key gives 0 and -inf. Two runs give the same bits.

    Raises:
        BadInput: a shape, dtype, device, layout or scale is wrong, or the lists do not fit.

    Cost: forward 4 * d_head operations a pair in a live block and query head, backward 3.5 times
    that. Memory: lse, the lists (4 bytes a pair of blocks), and in the backward pass delta and, for
    a window with sinks, 8 * d_head * n_sinks bytes a query head and a part of its queries, of
    1,024 * ceil(n_sinks / 64) each.
    A pattern of more than two terms (many global tokens, random blocks) is slow where its blocks
    are partial: each term near a block is evaluated for every pair of it.
    Source: Dao et al. 2022 (FlashAttention), section 3.3, with the loops of FlashAttention-2.
    """
    _check(q, k, v, scale)
    settings = _settings(q, k, pattern, lists)
    out, lse = _sparse_attention(q, k, v, *settings, scale)
    return (out, lse) if return_lse else out


def _settings(q: Tensor, k: Tensor, pattern, lists: BlockLists | None):
    """(grid, terms, block_q, block_k): pattern and lists as the operator takes them."""
    terms = pattern.at(k.shape[2]).terms()
    numbers = _numbers(terms)
    if lists is None:
        return q.new_empty((0, 0, 0), dtype=torch.int8), numbers, *choose_blocks(terms)
    _check_lists(lists, q, k)
    return _grid_of(lists), numbers, lists.tile_q, lists.tile_k


def walk_of(q: Tensor, k: Tensor, pattern, lists: BlockLists | None = None) -> "Walk":
    """Which blocks `sparse_attention_triton(q, k, .., pattern, lists=lists)` visits."""
    return _walk(q, k, *_settings(q, k, pattern, lists))


@torch.library.custom_op("llmopt_lab::sparse_attention", mutates_args=())
def _sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: Tensor, terms: list[int], block_q: int, block_k: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward(q, k, v, _walk(q, k, grid, terms, block_q, block_k), _scale_of(q, scale))


@_sparse_attention.register_fake
def _(q, k, v, grid, terms, block_q, block_k, scale):
    return _empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("llmopt_lab::sparse_attention_backward", mutates_args=())
def _sparse_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, grid: Tensor, out: Tensor, lse: Tensor, d_out: Tensor,
    d_lse: Tensor, terms: list[int], block_q: int, block_k: int, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    walk = _walk(q, k, grid, terms, block_q, block_k)
    return backward_of(q, k, v, out, lse, d_out, d_lse, walk, _scale_of(q, scale))


@_sparse_attention_backward.register_fake
def _(q, k, v, grid, out, lse, d_out, d_lse, terms, block_q, block_k, scale):
    return _empty_like(q), _empty_like(k), _empty_like(v)


def _save(ctx, inputs, output) -> None:
    q, k, v, grid, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, grid, *output)


def _gradients(ctx, d_out, d_lse):
    grads = _sparse_attention_backward(*ctx.saved_tensors, d_out, d_lse, *ctx.settings)
    return *grads, None, None, None, None, None


_sparse_attention.register_autograd(_gradients, setup_context=_save)


class Walk(NamedTuple):
    """Which blocks a call visits, and by which rule its partial blocks are masked."""

    terms: Tensor           # (n_terms, FIELDS) int32
    grid: Tensor            # (n_lists, row_blocks, col_blocks) int8 of chosen blocks, or empty
    low: int                # the window: low <= query - key <= high
    high: int
    n_sinks: int            # no more than there are keys
    is_window: bool         # inside blocks the rule is that window and those sinks, nothing else
    from_terms: bool        # whether the lists come from the terms: no window, no chosen blocks
    steps: bool             # whether some band of the rule has a step, or a grain, other than 1
    grains: bool
    block_q: int
    block_k: int
    n_q: int
    n_k: int

    @property
    def listed(self) -> bool:
        return self.from_terms or len(self.grid) > 0

    def lists(
        self, *, of_keys: bool, fill: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """blocks, n_full and n_live of every block of queries (of keys), and lists a KV head.

        What lies behind the end of a list is `fill`, or anything.
        """
        n_rows, n_cols = ceil_div(self.n_q, self.block_q), ceil_div(self.n_k, self.block_k)
        n_owners, n_walked = (n_cols, n_rows) if of_keys else (n_rows, n_cols)
        n_lists = max(1, len(self.grid))
        new = self.terms.new_empty
        blocks, n_full = new(n_lists, n_owners, n_walked), new(n_lists, n_owners)
        n_live = torch.empty_like(n_full)
        if fill is not None:
            blocks.fill_(fill)
        width = max(16, min(1024, triton.next_power_of_2(n_walked)))
        _list_kernel[(n_lists * n_owners,)](
            self.terms, self.grid, blocks, n_full, n_live,
            len(self.terms), self.n_q, self.n_k, n_owners, n_walked,
            BLOCK_Q=self.block_q, BLOCK_K=self.block_k, FROM_TERMS=len(self.grid) == 0,
            OF_KEYS=of_keys, WIDTH=width, ONCE=n_walked <= width,
            num_warps=max(1, min(4, width // 64)),      # one warp for 128 would spill
        )  # fmt: skip
        return blocks, n_full, n_live, 0 if n_lists == 1 else n_owners

    def arguments(self, lists: tuple[Tensor, Tensor, Tensor, int] | None) -> tuple[tuple, dict]:
        """Pointers of the lists and terms, then scalars, then constants, of a kernel."""
        blocks, n_full, n_live, list_head = lists or (self.terms, self.terms, self.terms, 0)
        n_terms = len(self.terms)
        constants = {
            "LISTED": self.listed, "SINKS": self.is_window and self.n_sinks > 0,
            "TERMS": 0 if self.is_window else n_terms if n_terms <= MOST_UNROLLED else -1,
            "STEPS": self.steps and not self.is_window,
            "GRAINS": self.grains and not self.is_window,
            "BLOCK_Q": self.block_q, "BLOCK_K": self.block_k,
        }  # fmt: skip
        scalars = (list_head, n_terms, self.low, self.high, self.n_sinks)
        return ((blocks, n_full, n_live, self.terms), scalars), constants


def _walk(q: Tensor, k: Tensor, grid: Tensor, terms: list[int], block_q: int, block_k: int) -> Walk:
    n_q, n_k = q.shape[2], k.shape[2]
    window = _as_window(tuple(terms))
    from_terms = window is None and len(grid) == 0
    if from_terms and (n_k - n_q) % block_q == 0 and _is_whole(terms, block_q, block_k):
        window = -FAR, FAR, 0       # only the end of the text makes a block partial
    low, high, n_sinks = window or (0, 0, 0)
    return Walk(
        _table(tuple(terms), q.device), grid, low, high, min(n_sinks, n_k), window is not None,
        from_terms,
        any(step != 1 for step in terms[3::8]), any(grain != 1 for grain in terms[::8]),
        block_q, block_k, n_q, n_k,
    )  # fmt: skip


def _is_whole(numbers: list[int], block_q: int, block_k: int) -> bool:
    """Whether every band holds all of a block of the lists or nothing of it."""
    bands = [tuple(numbers[i : i + 8]) for i in range(0, len(numbers), 8)]
    grains = [band[0] for band in bands if band != EVERYTHING]
    return all(grain % block_q == 0 and grain % block_k == 0 for grain in grains)


def _numbers(terms) -> list[int]:
    """The terms as rows of a table, two bands each: the second one holds all if there is none.

    Raises:
        BadInput: a term joins blocks of three sizes.
    """
    flat = []
    for term in terms or ((NOTHING,),):
        require(
            len(term) <= 2,
            "the kernels take rules over tokens and blocks of one size, or blocks of two sizes, "
            f"joined by &; got sizes {[band[0] for band in term]}",
        )
        for band in (*term, EVERYTHING)[:2]:
            flat += [max(-FAR, min(FAR, x)) for x in band]
    return flat


@lru_cache(maxsize=64)
def _table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device).view(-1, FIELDS.value)


def _as_window(numbers: tuple[int, ...]) -> tuple[int, int, int] | None:
    """(low, high, n_sinks) if the terms are a window of whole diagonals, with or without sinks.

    A window with sinks holds the query's own key: the sinks beyond it are all on one side.
    """
    window, second, *others = (numbers[i : i + 8] for i in range(0, len(numbers), 8))
    if second != EVERYTHING or (window[0], *window[3:]) != (1, 1, -FAR, FAR, -FAR, FAR):
        return None
    if not others:
        return window[1], window[2], 0
    sinks = others[0]
    if len(others) > 2 or others[1] != EVERYTHING or sinks[:7] != (1, 0, FAR, 1, -FAR, FAR, -FAR):
        return None
    if not window[1] <= 0 <= window[2]:
        return None
    return window[1], window[2], sinks[7]


def choose_blocks(terms) -> tuple[int, int]:
    """Queries and keys of a block of the lists: less than a tile's where the rule is of blocks."""
    size = 32 if gpu_facts() is None else 64
    grain = math.gcd(*(band[0] for term in terms for band in term if band[0] > 1))
    if gpu_facts() is not None and grain and grain % 128 == 0:
        size = 128
    while grain and size > 16 and grain % size:
        size //= 2
    return size, size


def _grid_of(lists: BlockLists) -> Tensor:
    """(n_lists, row_blocks, col_blocks) int8: 0, PARTIAL or FULL."""
    n_rows, most = lists.blocks.shape[-2:]
    n_cols = ceil_div(lists.n_k, lists.tile_k)
    n_lists = lists.blocks[..., 0, 0].numel()
    grid = torch.zeros(n_lists, n_rows, n_cols, dtype=torch.int8, device=lists.blocks.device)
    _grid_kernel[(n_lists * n_rows,)](
        lists.blocks.contiguous(), lists.n_full.contiguous(), lists.n_live.contiguous(), grid,
        most, n_cols, WIDTH=max(16, min(1024, triton.next_power_of_2(most))), num_warps=1,
    )  # fmt: skip
    return grid


MOST_COLUMNS = 4096         # of the blocks that `select_blocks` chooses from: a row is one load


def select_blocks(
    q: Tensor, k: Tensor, pattern, *,
    n_blocks: int, tile_q: int = 128, tile_k: int = 128, always=None,
) -> BlockLists:
    """`select.top_blocks` by mean scores, without a loop on the host and without waiting for it.

    Args:
        q: (batch, n_heads, n_q, d_head). k: (batch, n_kv_heads, n_k, d_head), as for
            `sparse_attention_triton`, which takes the result.
        pattern, n_blocks, always: as for `top_blocks`; scores are float32.
        tile_q, tile_k: 16, 32, 64 or 128.

    Raises:
        BadInput: a shape or size that the kernels do not take.

    Cost: one pass over q and k, one product of their block means, two small kernels.
    """
    _check(q, k, k, None)
    require(n_blocks > 0, f"n_blocks must be positive; got {n_blocks}")
    require(
        {tile_q, tile_k} <= {16, 32, 64, 128},
        f"the kernels take blocks of 16, 32, 64 or 128; got {tile_q} x {tile_k}",
    )
    n_q, n_k, n_lists = q.shape[2], k.shape[2], k.shape[:2].numel()
    n_rows, n_cols = ceil_div(n_q, tile_q), ceil_div(n_k, tile_k)
    require(
        n_cols <= MOST_COLUMNS,
        f"at most {MOST_COLUMNS} blocks of keys; {n_k} keys in blocks of {tile_k} are {n_cols}",
    )
    queries = _block_means(q.detach(), tile_q)
    queries = queries.unflatten(1, (k.shape[1], q.shape[1] // k.shape[1])).sum(2)
    scores = queries @ _block_means(k.detach(), tile_k).mT
    terms = _table(tuple(_numbers(pattern.at(n_k).terms())), q.device)
    kept = terms if always is None else _table(tuple(_numbers(always.at(n_k).terms())), q.device)
    grid = torch.empty(n_lists, n_rows, n_cols, dtype=torch.int8, device=q.device)
    width = max(16, triton.next_power_of_2(n_cols))
    _select_kernel[(n_lists * n_rows,)](
        scores, terms, len(terms), kept, len(kept), grid, n_q, n_k, n_rows, n_cols, n_blocks,
        BLOCK_Q=tile_q, BLOCK_K=tile_k, ALWAYS=always is not None, WIDTH=width,
        num_warps=max(1, min(8, width // 128)),
    )  # fmt: skip
    walk = Walk(
        terms, grid, 0, 0, 0, False, False, False, False, tile_q, tile_k, n_q, n_k
    )
    blocks, n_full, n_live, _ = walk.lists(of_keys=False, fill=-1)
    shape = (*k.shape[:2], n_rows)
    return BlockLists(
        n_q, n_k, tile_q, tile_k,
        blocks.view(*shape, n_cols), n_full.view(shape), n_live.view(shape),
    )  # fmt: skip


def _block_means(x: Tensor, size: int) -> Tensor:
    """Of every block of `size` rows, the last one shorter: float32 (.., blocks, d)."""
    n = x.shape[2]
    n_whole = n // size
    means = x[:, :, : n_whole * size].unflatten(2, (n_whole, size)).mean(3, dtype=torch.float32)
    if n % size:
        rest = x[:, :, n_whole * size :].mean(2, keepdim=True, dtype=torch.float32)
        means = torch.cat([means, rest], dim=2)
    return means


def _forward(q, k, v, walk: Walk, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse, by the Hopper kernel where it can run."""
    out = _empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if walk.is_window and hopper.supports(q, k, v, out, walk):
        lists = walk.lists(of_keys=False) if walk.listed else None
        hopper.forward(q, k, v, out, lse, walk=walk, lists=lists, scale=scale)
    else:
        forward_into(out, lse, q, k, v, walk=walk, scale=scale)
    return out, lse


def forward_into(out, lse, q, k, v, *, walk: Walk, scale: float) -> None:
    """The Triton kernel on any GPU, into given tensors."""
    batch, n_heads, n_q, d_head = q.shape
    n_kv_heads, n_k = k.shape[1:3]
    (tensors, scalars), constants = walk.arguments(
        walk.lists(of_keys=False) if walk.listed else None
    )
    tiles = choose_tiles("forward", d_head, q.dtype, walk)
    _forward_kernel[(ceil_div(n_q, tiles.tile_q) * n_heads * batch,)](
        q, k, v, out, lse, *tensors, *_strides(q, k, v, out),
        n_heads, n_heads // n_kv_heads, n_q, n_k, *scalars, scale,
        **_sizes(q), **constants, **_options(tiles, k, v),
    )  # fmt: skip


def backward_of(q, k, v, out, lse, d_out, d_lse, walk: Walk, scale: float):
    """d_q, d_k and d_v of what the forward pass made."""
    batch, n_heads, n_q, d_head = q.shape
    n_kv_heads, n_k = k.shape[1:3]
    d_out = d_out if _is_walkable(d_out) else d_out.contiguous()    # an expanded scalar, often
    d_q, d_k, d_v = _empty_like(q), _empty_like(k), _empty_like(v)
    delta = torch.empty_like(lse)
    sizes = _sizes(q)
    # first, for it makes delta
    lists = walk.lists(of_keys=False) if walk.listed else None
    (tensors, scalars), constants = walk.arguments(lists)
    tiles = choose_tiles("backward_queries", d_head, q.dtype, walk)
    _backward_queries_kernel[(ceil_div(n_q, tiles.tile_q) * n_heads * batch,)](
        q, k, v, out, d_out, lse, d_lse.contiguous(), delta, d_q, *tensors,
        *_strides(q, k, v, out, d_out, d_q),
        n_heads, n_heads // n_kv_heads, n_q, n_k, *scalars, scale,
        **sizes, **constants, **_options(tiles, k, v),
    )  # fmt: skip
    lists = walk.lists(of_keys=True) if walk.listed else None
    (tensors, scalars), constants = walk.arguments(lists)
    if constants["SINKS"] and not constants["LISTED"]:
        *sinks, n_parts = _sink_parts(q, k, v, d_out, lse, delta, walk, scale)
    else:
        *sinks, n_parts = delta, delta, 0
    tiles = choose_tiles("backward_keys", d_head, q.dtype, walk)
    _backward_keys_kernel[(ceil_div(n_k, tiles.tile_k) * n_kv_heads * batch,)](
        q, k, v, d_out, lse, delta, d_k, d_v, *sinks, *tensors,
        *_strides(q, k, v, d_out, d_k, d_v),
        n_kv_heads, n_heads // n_kv_heads, n_q, n_k, n_parts, *scalars, scale,
        **sizes, **constants, **_options(tiles, q, d_out),
    )  # fmt: skip
    return d_q, d_k, d_v


def _sink_parts(q, k, v, d_out, lse, delta, walk: Walk, scale: float) -> tuple[Tensor, Tensor, int]:
    """d_k (not yet times scale) and d_v of the sinks from beyond the window, and parts a head.

    How many parts depends on the shapes alone. The more sinks, the fewer parts: else a thousand
    sinks would take many times the memory of q.
    """
    batch, n_heads, n_q, d_head = q.shape
    n_k, n_sinks = k.shape[2], walk.n_sinks
    part = SINK_PART * ceil_div(n_sinks, 64)
    n_parts = ceil_div(n_q, part)
    tiles = choose_tiles("backward_keys", d_head, q.dtype, walk)
    tiles = tiles._replace(tile_k=sink_rows(tiles.tile_k, n_sinks))
    shape = (2, batch * n_heads * n_parts, n_sinks, d_head)
    d_k, d_v = q.new_empty(shape, dtype=torch.float32)
    n_tiles = ceil_div(n_sinks, tiles.tile_k)
    _sink_parts_kernel[(n_tiles * n_parts * n_heads * batch,)](
        q, k, v, d_out, lse, delta, d_k, d_v, *_strides(q, k, v, d_out),
        n_heads, n_heads // k.shape[1], n_q, n_k, part, walk.high + 1, n_sinks, scale,
        **_sizes(q), **_options(tiles, q, d_out),
    )  # fmt: skip
    return d_k, d_v, n_parts


def sink_rows(tile_k: int, n_sinks: int) -> int:
    """Sinks of a tile, where a tile of keys has tile_k."""
    return min(tile_k, max(16, triton.next_power_of_2(n_sinks)))


class Tiles(NamedTuple):
    """How one kernel runs."""

    tile_q: int
    tile_k: int
    n_warps: int
    n_stages: int
    tma: bool = False   # whether Hopper's tensor memory accelerator copies what the loop reads


# (kernel, bytes an element, padded d_head up to): tiles for an H100, those of flash attention
TILES = {
    ("forward", 2, 64): Tiles(128, 128, 8, 2),
    ("forward", 2, 128): Tiles(128, 128, 8, 2),
    ("forward", 2, 256): Tiles(128, 64, 8, 2),
    ("backward_keys", 2, 64): Tiles(64, 128, 8, 3),     # with the rule theirs would spill
    ("backward_keys", 2, 128): Tiles(64, 128, 8, 3),
    ("backward_keys", 2, 256): Tiles(32, 32, 4, 2),
    ("backward_queries", 2, 64): Tiles(128, 64, 8, 3),
    ("backward_queries", 2, 128): Tiles(128, 64, 8, 3),
    ("backward_queries", 2, 256): Tiles(64, 64, 8, 2),
    ("forward", 4, 64): Tiles(64, 32, 8, 2),
    ("forward", 4, 128): Tiles(32, 32, 8, 2),
    ("forward", 4, 256): Tiles(16, 16, 8, 2),
    ("backward_keys", 4, 64): Tiles(32, 32, 8, 2),
    ("backward_keys", 4, 128): Tiles(32, 32, 8, 2),
    ("backward_keys", 4, 256): Tiles(16, 16, 8, 2),
    ("backward_queries", 4, 64): Tiles(32, 32, 8, 2),
    ("backward_queries", 4, 128): Tiles(16, 32, 8, 2),
    ("backward_queries", 4, 256): Tiles(16, 16, 8, 2),
}

# most queries and keys of a tile, and warps, where the rule is more than a window
LONG_RULE = {
    "forward": (64, 32, 4), "backward_keys": (32, 64, 8), "backward_queries": (64, 32, 4),
}


def choose_tiles(kernel: str, d_head: int, dtype: torch.dtype, walk: Walk) -> Tiles:
    """Tiles of the "forward", "backward_keys" or "backward_queries" kernel on the current GPU."""
    gpu = gpu_facts()
    if gpu is None:
        tiles = Tiles(32, 16, 4, 1)     # interpreted: small, so that small examples have several
    else:
        capability = None if torch.version.hip is not None else gpu.capability
        tiles = tiles_for(kernel, d_head, dtype, capability, rule_is_short=walk.is_window)
    if not walk.listed:
        return tiles
    return tiles._replace(
        tile_q=min(tiles.tile_q, walk.block_q), tile_k=min(tiles.tile_k, walk.block_k)
    )


def tiles_for(
    kernel: str, d_head: int, dtype: torch.dtype, capability: tuple[int, int] | None, *,
    rule_is_short: bool = True,
) -> Tiles:
    """The table's tiles, cut down to what a GPU of that capability (None: AMD) holds."""
    d = _padded(d_head)
    tensor_cores = capability is None or capability >= (8, 0)
    itemsize = dtype.itemsize if tensor_cores else 4    # without them products are float32
    tiles = TILES[kernel, itemsize, max(d, 64)]
    if capability is not None and capability >= (9, 0):
        tiles = tiles._replace(tma=True)
    if not rule_is_short:       # a long rule needs registers of its own beside the scores
        tile_q, tile_k, n_warps = LONG_RULE[kernel]
        tile_q, tile_k = min(tile_q, tiles.tile_q), min(tile_k, tiles.tile_k)
        tiles = Tiles(tile_q, tile_k, n_warps, 2, tiles.tma)
    if itemsize == 2 and (capability is None or capability[0] not in (9, 10)):
        tiles = _with_shorter_steps(kernel, tiles)      # products read registers, not shared memory
    while _bytes_needed(kernel, tiles, itemsize * d) > _shared_bytes(capability):
        if tiles.n_stages > 2:
            tiles = tiles._replace(n_stages=tiles.n_stages - 1)
        elif max(tiles.tile_q, tiles.tile_k) == 16:
            return tiles._replace(n_stages=1)           # nothing is left to cut
        elif tiles.tile_q >= tiles.tile_k:
            tiles = tiles._replace(tile_q=tiles.tile_q // 2)
        else:
            tiles = tiles._replace(tile_k=tiles.tile_k // 2)
    return tiles


def _with_shorter_steps(kernel: str, tiles: Tiles) -> Tiles:
    if kernel == "backward_keys":
        return tiles._replace(tile_q=tiles.tile_q // 2)
    return tiles._replace(tile_k=tiles.tile_k // 2)


def _bytes_needed(kernel: str, tiles: Tiles, row_bytes: int) -> int:
    """Of the tiles that a program keeps, and of two tiles a stage of what it walks."""
    kept, walked = {
        "forward": (tiles.tile_q, tiles.tile_k),
        "backward_keys": (2 * tiles.tile_k, tiles.tile_q),
        "backward_queries": (2 * tiles.tile_q, tiles.tile_k),
    }[kernel]
    return row_bytes * (kept + 2 * tiles.n_stages * walked) + 2048      # barriers, lse, delta


def _shared_bytes(capability: tuple[int, int] | None) -> int:
    """Most shared memory of one program. AMD's has 64 KiB, but does not keep tiles there."""
    if capability is not None and capability < (8, 0):
        return 64 << 10
    if capability is not None and capability[0] in (9, 10):
        return 227 << 10
    return 163 << 10 if capability in ((8, 0), (8, 7)) else 99 << 10


def _sizes(q: Tensor) -> dict:
    d_head = q.shape[3]
    return {"D_HEAD": d_head, "D": _padded(d_head), "PRECISION": _precision(q.dtype)}


def _options(tiles: Tiles, *walked: Tensor) -> dict:
    """`tiles` as the kernels take them. TMA needs addresses and strides in steps of 16 bytes."""
    aligned = all(
        x.data_ptr() % 16 == 0 and all(s and s * x.itemsize % 16 == 0 for s in x.stride()[:3])
        for x in walked
    )
    if tiles.tma and aligned:
        triton.set_allocator(_scratch)      # at each launch: every thread has a setting of its own
    return {
        "TILE_Q": tiles.tile_q, "TILE_K": tiles.tile_k, "STAGES": tiles.n_stages,
        "TMA": tiles.tma and aligned, "num_warps": tiles.n_warps,
    }  # fmt: skip


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where a kernel keeps the TMA descriptors that it makes."""
    return torch.empty(size, dtype=torch.int8, device=pick_device())


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _precision(dtype: torch.dtype) -> str:
    """Of float32 products: three tf32 products are nearly as exact and run on tensor cores."""
    gpu = gpu_facts()
    has_tf32 = torch.version.hip is None and gpu is not None and gpu.capability >= (8, 0)
    return "tf32x3" if dtype == torch.float32 and has_tf32 else "ieee"


def _padded(d_head: int) -> int:
    return max(MIN_D, triton.next_power_of_2(d_head))


def _scale_of(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _empty_like(x: Tensor) -> Tensor:
    """Dense, with heads and rows in memory in the order of `x`."""
    batch, n_heads, n, d_head = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, n, n_heads, d_head).transpose(1, 2)
    return x.new_empty(x.shape)


def _is_walkable(x: Tensor) -> bool:
    """Whether the kernels can address it: offsets within a tile of 128 rows are 32 bits wide."""
    return x.stride(3) == 1 and x.stride(2) < MAX_ROW_STRIDE


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    """Refuse bad input before any work."""
    require(q.ndim == 4, f"q must be (batch, n_heads, n_q, d_head); got {tuple(q.shape)}")
    batch, n_heads, _, d_head = q.shape
    require(
        k.ndim == 4 and k.shape == v.shape,
        "k and v must both be (batch, n_kv_heads, n_k, d_head); "
        f"got {tuple(k.shape)} and {tuple(v.shape)}",
    )
    require(
        k.shape[0] == batch and k.shape[3] == d_head,
        f"q, k and v must have the same batch and d_head; got q {tuple(q.shape)}, "
        f"k {tuple(k.shape)}",
    )
    require(
        k.shape[1] > 0 and n_heads > 0 and n_heads % k.shape[1] == 0,
        f"n_heads must be a multiple of n_kv_heads; got {n_heads} and {k.shape[1]}",
    )
    require(
        min(q.numel(), k.numel()) > 0,
        f"q, k and v must not be empty; got {tuple(q.shape)} and {tuple(k.shape)}",
    )
    require(
        0 < d_head <= MAX_D and d_head % 8 == 0,
        f"d_head must be a multiple of 8 up to {MAX_D}; got {d_head}",
    )
    require(
        q.dtype in (torch.float32, torch.float16, torch.bfloat16),
        f"the dtype must be float32, float16 or bfloat16; got {q.dtype}",
    )
    for name, x in (("q", q), ("k", k), ("v", v)):
        require(
            x.dtype == q.dtype and x.device == q.device,
            f"{name} must be {q.dtype} on {q.device} like q; got {x.dtype} on {x.device}",
        )
        require(
            _is_walkable(x),
            f"the last dimension of {name} must be contiguous, and its rows less than "
            f"{MAX_ROW_STRIDE} elements apart; got strides {x.stride()}: call .contiguous()",
        )
    require(
        q.is_cuda or interpreting(),
        f"q is on the {q.device} but Triton compiles for the GPU in this session: move it there",
    )
    require(
        q.is_cuda or q.dtype != torch.bfloat16,
        "bfloat16 needs a GPU: Triton's CPU interpreter computes on its bit pattern "
        "and returns wrong numbers. Use float32.",
    )
    require(
        scale is None or (math.isfinite(scale) and scale > 0),
        f"scale must be a positive finite number; got {scale}",
    )


def _check_lists(lists: BlockLists, q: Tensor, k: Tensor) -> None:
    require(
        (lists.n_q, lists.n_k) == (q.shape[2], k.shape[2]),
        f"the lists are of {lists.n_q} queries and {lists.n_k} keys; got {q.shape[2]} and "
        f"{k.shape[2]}: make them anew",
    )
    require(
        lists.tile_q in (16, 32, 64, 128) and lists.tile_k in (16, 32, 64, 128),
        "the kernels take blocks of 16, 32, 64 or 128; the lists have "
        f"{lists.tile_q} x {lists.tile_k}",
    )
    require(
        lists.blocks.ndim == 2 or lists.blocks.shape[:-2] == k.shape[:2],
        f"the lists must be shared or one a KV head {tuple(k.shape[:2])}; "
        f"got {tuple(lists.blocks.shape[:-2])}",
    )
    require(
        lists.blocks.device == q.device,
        f"the lists are on {lists.blocks.device}, q is on {q.device}",
    )
