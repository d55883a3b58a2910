"""What every kernel does with a pattern: which tiles a program walks, and the rule inside one."""

from llmopt_lab.core.device import prepare_triton
from llmopt_lab.core.launch import jit
from llmopt_lab.sparse_attention.block_list_kernels import (
    COLS,
    FIELDS,
    GRAIN,
    HIGH,
    LOW,
    ROWS,
    STEP,
    floor_div,
)

prepare_triton()

import triton.language as tl

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
def keys_of(
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
def queries_of(
    first_k, n_q, n_k, low, high, n_full_ptr, n_live_ptr, list_at,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, BLOCK_Q: tl.constexpr, LISTED: tl.constexpr,
):
    """`keys_of` the other way round: the tiles of queries that see some keys. Never for sinks."""
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
def tile_at(
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
def from_both_ends(tile, n_tiles, LISTED: tl.constexpr):
    """The order of the query tiles, heavy ones first: the last ones of a causal pattern.

    Other patterns may have global tokens at both ends.
    """
    if LISTED:
        tile = tl.where(tile % 2 == 0, n_tiles - 1 - tile // 2, tile // 2)
    else:
        tile = n_tiles - 1 - tile
    return tile


# The rule inside a block


@jit
def pairs_seen(
    row, col, top, left,            # tokens: (rows,) and (cols,), and the first of each
    terms_ptr, n_terms, low, high, n_sinks,
    SINKS: tl.constexpr,
    RULE: tl.constexpr,             # what the terms' bands forbid, as `rule_of` has it
    LOOP: tl.constexpr,             # whether RULE's one term stands for `n_terms`
    KEYS_FIRST: tl.constexpr,       # whether the result is (cols, rows)
):
    """Whether queries see keys, (rows, cols). Without a RULE: the window [low, high], and sinks."""
    back = _by_row(row, KEYS_FIRST) - _by_col(col, KEYS_FIRST)
    if len(RULE) == 0:
        seen = (back >= low) & (back <= high)
        if SINKS:
            seen = seen | (_by_col(col < n_sinks, KEYS_FIRST) & (back >= 0))
    else:
        seen = tl.full(back.shape, 0, tl.int1)
        if LOOP:
            for i in range(n_terms):
                at = terms_ptr + i * FIELDS
                if _is_near(at, top, left, row.shape[0], col.shape[0], GRAIN & RULE[0]):
                    seen = seen | _term(row, col, back, at, RULE[0], RULE[1], KEYS_FIRST)
        else:
            for i in tl.static_range(len(RULE) // 2):
                at = terms_ptr + i * FIELDS
                seen = seen | _term(
                    row, col, back, at, RULE[2 * i], RULE[2 * i + 1], KEYS_FIRST
                )
    return seen


@jit
def _is_near(
    at, top, left, n_rows: tl.constexpr, n_cols: tl.constexpr, GRAINS: tl.constexpr,
):
    """Whether a term's first band is about some of these rows and some of these columns."""
    bottom, right = top + n_rows - 1, left + n_cols - 1
    if GRAINS:                      # divisions would take most of the time
        grain = tl.load(at)
        top, bottom = floor_div(top, grain), floor_div(bottom, grain)
        left, right = left // grain, right // grain
    return (
        (bottom >= tl.load(at + 4)) & (top < tl.load(at + 5))
        & (right >= tl.load(at + 6)) & (left < tl.load(at + 7))
    )


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
    row, col, back, at, FIRST: tl.constexpr, SECOND: tl.constexpr, KEYS_FIRST: tl.constexpr,
):
    first = _band(row, col, back, at, FIRST, KEYS_FIRST)
    return first & _band(row, col, back, at + 8, SECOND, KEYS_FIRST)


@jit
def _band(row, col, back, at, KIND: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Which of these pairs one band holds; what it does not forbid is not computed."""
    held = tl.full((1, 1), 1, tl.int1)
    if GRAIN & KIND:
        grain = tl.load(at)
        row, col = floor_div(row, grain), col // grain
        back = _by_row(row, KEYS_FIRST) - _by_col(col, KEYS_FIRST)
    if ROWS & KIND:
        held = held & _by_row((row >= tl.load(at + 4)) & (row < tl.load(at + 5)), KEYS_FIRST)
    if COLS & KIND:
        held = held & _by_col((col >= tl.load(at + 6)) & (col < tl.load(at + 7)), KEYS_FIRST)
    if LOW & KIND:
        held = held & (back >= tl.load(at + 1))
    if HIGH & KIND:
        held = held & (back <= tl.load(at + 2))
    if STEP & KIND:
        # a distance is a multiple of step if both leave the same rest
        step = tl.load(at + 3)
        row_rest, col_rest = row - floor_div(row, step) * step, col % step
        held = held & (_by_row(row_rest, KEYS_FIRST) == _by_col(col_rest, KEYS_FIRST))
    return held
