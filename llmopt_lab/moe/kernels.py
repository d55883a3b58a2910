"""A mixture-of-experts layer in Triton, forward and backward, without a word to the host.

Forward: `_route_kernel` picks each token's experts, `_scan_kernel` and `_place_kernel` sort the
visits by expert (a counting sort, stable), `_gate_up_kernel` gathers the tokens of a tile of visits
and makes their SwiGLU, `_project_kernel` projects down and writes each visit's weighted row to the
place of its token, `_combine_kernel` adds the k rows of a token. For few tokens `_logits_kernel`
has many multiprocessors read the router and one program does the rest of the routing; for many, on
sm_90, `hopper.py` has the two products. How many visits an expert gets is known on the device only,
so every grid covers the worst case and the programs that are left over end at once. Every sum has
one owner and one order: two runs give the same bits.

A visit is one (token, choice) pair, numbered token * k + choice; `visits` lists them by expert.
"""

import inspect
from typing import NamedTuple

import torch
from torch import Tensor

from llmopt_lab.core.device import gpu_facts, interpreting, prepare_triton
from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import ceil_div
from llmopt_lab.moe import hopper

prepare_triton()

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

MAX_EXPERTS = 256
MAX_K = 16
MIN_ROWS = 16           # of a row tile
DECODE_TOKENS = 64      # up to here no tile is worth 128 rows
GROUP = tl.constexpr(8)     # row tiles that share the weights of a column tile while in L2


def jit(fn):
    """triton.jit of the function itself, which a test's type checker may have wrapped."""
    return triton.jit(inspect.unwrap(fn))


@jit
def _begin(PDL: tl.constexpr):
    """Let the next kernel start beside this one; wait until the one before is done."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@jit
def _schedule(
    counts,                                     # (E,): visits of each expert
    starts_ptr, tile_expert_ptr, tile_first_ptr, n_used_ptr,
    N_EXPERTS: tl.constexpr, E: tl.constexpr, TILE_ROWS: tl.constexpr,
):
    """Cut each expert's visits [starts[e], starts[e + 1]) into row tiles; returns the starts."""
    expert = tl.arange(0, E)                                            # (E,)
    ends = tl.cumsum(counts, 0)
    starts = ends - counts
    tl.store(starts_ptr, 0)
    tl.store(starts_ptr + 1 + expert, ends, expert < N_EXPERTS)
    n_tiles = (counts + TILE_ROWS - 1) // TILE_ROWS
    tile_ends = tl.cumsum(n_tiles, 0)
    tl.store(n_used_ptr, tl.max(tile_ends, 0))
    first_tile = tile_ends - n_tiles
    for i in range(0, tl.max(n_tiles, 0)):
        tl.store(tile_expert_ptr + first_tile + i, expert, i < n_tiles)
        tl.store(tile_first_ptr + first_tile + i, starts + i * TILE_ROWS, i < n_tiles)
    return starts


@jit
def _logits(
    x_ptr, router_ptr, token, token_ok, begin, end,
    D: tl.constexpr, N_EXPERTS: tl.constexpr, E: tl.constexpr, TILE_TOKENS: tl.constexpr,
    TILE_D: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """x router over the dimensions [begin, end), (TILE_TOKENS, E) float32."""
    expert = tl.arange(0, E)                                            # (E,)
    d = tl.arange(0, TILE_D)                                            # (TILE_D,)
    x_at = x_ptr + token.to(tl.int64)[:, None] * D + d[None, :]
    router_at = router_ptr + d[:, None] * N_EXPERTS + expert[None, :]
    logits = tl.zeros((TILE_TOKENS, E), tl.float32)
    for first in tl.range(begin, end, TILE_D, num_stages=STAGES):
        ok = first + d < end
        x = tl.load(x_at + first, token_ok[:, None] & ok[None, :], other=0.0)
        router = tl.load(
            router_at + first * N_EXPERTS, ok[:, None] & (expert < N_EXPERTS)[None, :], other=0.0
        )
        logits = tl.dot(x, router, logits, input_precision=PRECISION)
    return logits


@jit
def _logits_kernel(
    x_ptr, router_ptr,                          # (n_tokens, D), (D, N_EXPERTS)
    parts_ptr,                                  # (n_parts, TILE_TOKENS, E) float32
    n_tokens,
    D: tl.constexpr, N_EXPERTS: tl.constexpr, E: tl.constexpr, LENGTH: tl.constexpr,
    TILE_TOKENS: tl.constexpr, TILE_D: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):
    """One program: LENGTH dimensions' part of the logits of a few tokens.

    One multiprocessor alone would take long to read the router.
    """
    _begin(PDL)
    token = tl.arange(0, TILE_TOKENS)                                   # (TILE_TOKENS,)
    begin = tl.program_id(0) * LENGTH
    logits = _logits(
        x_ptr, router_ptr, token, token < n_tokens, begin, tl.minimum(begin + LENGTH, D),
        D, N_EXPERTS, E, TILE_TOKENS, TILE_D, PRECISION, STAGES,
    )
    at = (tl.program_id(0) * TILE_TOKENS + token)[:, None] * E + tl.arange(0, E)[None, :]
    tl.store(parts_ptr + at, logits)


@jit
def _route_kernel(
    x_ptr, router_ptr,                          # (n_tokens, D), (D, N_EXPERTS)
    parts_ptr,                                  # from _logits_kernel, if N_PARTS
    experts_ptr, weights_ptr,                   # (n_tokens, K) int32 and float32
    probabilities_ptr,                          # (n_tokens, N_EXPERTS) float32, if SAVE
    rank_ptr, tile_counts_ptr,                  # (n_tokens, K), (token tiles, N_EXPERTS) int32
    visits_ptr, starts_ptr, tile_expert_ptr, tile_first_ptr, n_used_ptr,
    n_tokens,
    D: tl.constexpr, N_EXPERTS: tl.constexpr, E: tl.constexpr,
    K: tl.constexpr, K_PADDED: tl.constexpr, SAVE: tl.constexpr, SOLO: tl.constexpr,
    N_PARTS: tl.constexpr, TILE_TOKENS: tl.constexpr, TILE_D: tl.constexpr,
    TILE_ROWS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):
    """One program: the k best experts of TILE_TOKENS tokens, and how many tokens chose each.

    If it is SOLO it knows all counts, so it groups the visits as well.
    """
    _begin(PDL)
    tile = tl.program_id(0)
    token = tile * TILE_TOKENS + tl.arange(0, TILE_TOKENS)              # (TILE_TOKENS,)
    token_ok = token < n_tokens
    expert = tl.arange(0, E)                                            # (E,)
    expert_ok = expert < N_EXPERTS
    if N_PARTS:
        logits = tl.zeros((TILE_TOKENS, E), tl.float32)
        for part in tl.static_range(N_PARTS):
            at = (part * TILE_TOKENS + token)[:, None] * E + expert[None, :]
            logits += tl.load(parts_ptr + at)
    else:
        logits = _logits(
            x_ptr, router_ptr, token, token_ok, 0, D,
            D, N_EXPERTS, E, TILE_TOKENS, TILE_D, PRECISION, STAGES,
        )

    # NaN counts as the largest, as in torch.topk; its token's weights become NaN
    key = tl.where(logits == logits, logits, float("inf"))              # (TILE_TOKENS, E)
    choice = tl.full((TILE_TOKENS, E), -1, tl.int32)    # which choice of the token an expert is
    column = tl.arange(0, K_PADDED)[None, :]                            # (1, K_PADDED)
    score = tl.zeros((TILE_TOKENS, K_PADDED), tl.float32)
    chosen = tl.zeros((TILE_TOKENS, K_PADDED), tl.int32)
    largest = tl.max(tl.where(expert_ok[None, :], key, -float("inf")), axis=1)
    for j in range(0, K):
        left = (choice < 0) & expert_ok[None, :]
        best = tl.max(tl.where(left, key, -float("inf")), axis=1)       # (TILE_TOKENS,)
        # of equal logits the expert with the lower number
        candidate = tl.where(left & (key == best[:, None]), expert[None, :], E)
        first_best = tl.min(candidate, axis=1)                          # (TILE_TOKENS,)
        choice = tl.where(expert[None, :] == first_best[:, None], j, choice)
        score = tl.where(column == j, tl.exp(best - largest)[:, None], score)
        chosen = tl.where(column == j, first_best[:, None], chosen)

    # softmax over all, then the chosen renormalised: for k >= 2 the other experts cancel out
    if K == 1:
        shifted = tl.where(expert_ok[None, :], logits - largest[:, None], -float("inf"))
        total = tl.sum(tl.exp(shifted), axis=1)
        if SAVE:
            at = token.to(tl.int64)[:, None] * N_EXPERTS + expert[None, :]
            probability = tl.exp(shifted) / total[:, None]
            tl.store(probabilities_ptr + at, probability, token_ok[:, None] & expert_ok[None, :])
    else:
        total = tl.sum(score, axis=1)
    at = token[:, None] * K + column
    ok = token_ok[:, None] & (column < K)
    tl.store(weights_ptr + at, score / total[:, None], ok)
    tl.store(experts_ptr + at, chosen, ok)

    # a token visits an expert at most once, so its rank there counts the tokens before it
    visiting = (choice >= 0) & token_ok[:, None]                        # (TILE_TOKENS, E)
    upto = tl.cumsum(visiting.to(tl.int32), 0)
    visit = token[:, None] * K + choice
    counts = tl.sum(visiting.to(tl.int32), axis=0)                      # (E,)
    if SOLO:
        starts = _schedule(
            counts, starts_ptr, tile_expert_ptr, tile_first_ptr, n_used_ptr,
            N_EXPERTS, E, TILE_ROWS,
        )
        tl.store(visits_ptr + starts[None, :] + upto - 1, visit, visiting)
    else:
        tl.store(rank_ptr + visit, upto - 1, visiting)
        tl.store(tile_counts_ptr + tile * N_EXPERTS + expert, counts, expert_ok)


@jit
def _scan_kernel(
    tile_counts_ptr,                # (n_token_tiles, N_EXPERTS): in how many, out from where
    starts_ptr, tile_expert_ptr, tile_first_ptr, n_used_ptr,
    n_token_tiles,
    N_EXPERTS: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr, TILE_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program for all: where the visits from each token tile to each expert begin."""
    _begin(PDL)
    expert = tl.arange(0, E)[None, :]                                   # (1, E)
    counts = tl.zeros((E,), tl.int32)
    for first in range(0, n_token_tiles, TILE):
        tile = (first + tl.arange(0, TILE))[:, None]                    # (TILE, 1)
        ok = (tile < n_token_tiles) & (expert < N_EXPERTS)
        counts += tl.sum(tl.load(tile_counts_ptr + tile * N_EXPERTS + expert, ok, other=0), axis=0)
    begin = _schedule(
        counts, starts_ptr, tile_expert_ptr, tile_first_ptr, n_used_ptr, N_EXPERTS, E, TILE_ROWS
    )
    for first in range(0, n_token_tiles, TILE):
        tile = (first + tl.arange(0, TILE))[:, None]
        ok = (tile < n_token_tiles) & (expert < N_EXPERTS)
        at = tile_counts_ptr + tile * N_EXPERTS + expert
        counts_here = tl.load(at, ok, other=0)                          # (TILE, E)
        tl.store(at, begin[None, :] + tl.cumsum(counts_here, 0) - counts_here, ok)
        begin += tl.sum(counts_here, axis=0)


@jit
def _place_kernel(
    experts_ptr, rank_ptr,          # (n_tokens, K)
    begin_ptr,                      # (token tiles, N_EXPERTS), from _scan_kernel
    visits_ptr,                     # (n_visits,)
    n_visits,
    K: tl.constexpr, N_EXPERTS: tl.constexpr, TILE_TOKENS: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: TILE visits to their places."""
    _begin(PDL)
    visit = tl.program_id(0) * TILE + tl.arange(0, TILE)                # (TILE,)
    ok = visit < n_visits
    expert = tl.load(experts_ptr + visit, ok, other=0)
    tile = visit // K // TILE_TOKENS
    begin = tl.load(begin_ptr + tile * N_EXPERTS + expert, ok, other=0)
    tl.store(visits_ptr + begin + tl.load(rank_ptr + visit, ok, other=0), visit, ok)


@jit
def _tile_of(pid, n_row_tiles, n_col_tiles):
    """(row tile, column tile): GROUP row tiles of an expert walk over its columns together."""
    width = GROUP * n_col_tiles
    first = pid // width * GROUP
    height = tl.minimum(n_row_tiles - first, GROUP)
    return first + pid % width % height, pid % width // height


@jit
def _load_rows(
    rows, row, first_row, first,    # row (ROWS,) int64: which, if not [first_row, first_row + ROWS)
    N: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, TMA: tl.constexpr,
):
    """Columns [first, first + STEP) of some rows of (n, N), (ROWS, STEP): 0 past N."""
    if TMA:
        tile = rows.load([first_row, first])
    else:
        col = first + tl.arange(0, STEP)                                # (STEP,)
        at = rows + row[:, None] * N + col[None, :]
        if N % STEP == 0:
            tile = tl.load(at)
        else:
            tile = tl.load(at, (col < N)[None, :], other=0.0)
    return tile


@jit
def _load_weight(
    w, expert, first_row, first_col,
    N_ROWS: tl.constexpr, N_COLS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    TMA: tl.constexpr,
):
    """A tile of one expert's matrix of (n_experts, N_ROWS, N_COLS), (ROWS, COLS): 0 outside."""
    if TMA:
        tile = w.load([expert, first_row, first_col]).reshape(ROWS, COLS)
    else:
        row = first_row + tl.arange(0, ROWS)                            # (ROWS,)
        col = first_col + tl.arange(0, COLS)                            # (COLS,)
        at = w + expert.to(tl.int64) * (N_ROWS * N_COLS) + row[:, None] * N_COLS + col[None, :]
        tile = tl.load(at, (row < N_ROWS)[:, None] & (col < N_COLS)[None, :], other=0.0)
    return tile


@jit
def _gate_up_kernel(
    x_ptr, w,                       # (n_tokens, D), (n_experts, D, 2 * D_FF)
    hidden_ptr, gate_up_ptr,        # (n_visits, D_FF), and (n_visits, 2 * D_FF) if SAVE
    visits_ptr, starts_ptr, tile_expert_ptr, tile_first_ptr, n_used_ptr,
    n_row_tiles,                    # at most
    K: tl.constexpr, D: tl.constexpr, D_FF: tl.constexpr, SAVE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):
    """One program: silu(x W_gate) * x W_up for ROWS visits of one expert and COLS columns."""
    _begin(PDL)
    row_tile, col_tile = _tile_of(tl.program_id(0), n_row_tiles, tl.cdiv(D_FF, COLS))
    n_used = tl.load(n_used_ptr)
    expert = tl.load(tile_expert_ptr + row_tile)                # loads that do not wait in turn
    first_place = tl.load(tile_first_ptr + row_tile)
    if row_tile >= n_used:
        return
    place = first_place + tl.arange(0, ROWS)                            # (ROWS,)
    place_ok = place < tl.load(starts_ptr + expert + 1)
    # rows past the expert's end repeat token 0 and are not stored
    token = (tl.load(visits_ptr + place, place_ok, other=0) // K).to(tl.int64)
    first_col = col_tile * COLS
    gate = tl.zeros((ROWS, COLS), tl.float32)
    up = tl.zeros((ROWS, COLS), tl.float32)
    for first in tl.range(0, D, STEP, num_stages=STAGES):
        # the weights first: they need not wait for `visits`
        w_gate = _load_weight(w, expert, first, first_col, D, 2 * D_FF, STEP, COLS, TMA)
        w_up = _load_weight(w, expert, first, first_col + D_FF, D, 2 * D_FF, STEP, COLS, TMA)
        x = _load_rows(x_ptr, token, 0, first, D, ROWS, STEP, False)
        gate = tl.dot(x, w_gate, gate, input_precision=PRECISION)
        up = tl.dot(x, w_up, up, input_precision=PRECISION)

    col = first_col + tl.arange(0, COLS)                                # (COLS,)
    ok = place_ok[:, None] & (col < D_FF)[None, :]
    row = place.to(tl.int64)[:, None]
    hidden = gate * tl.sigmoid(gate) * up
    tl.store(hidden_ptr + row * D_FF + col[None, :], hidden.to(hidden_ptr.dtype.element_ty), ok)
    if SAVE:
        at = gate_up_ptr + row * (2 * D_FF) + col[None, :]
        tl.store(at, gate.to(gate_up_ptr.dtype.element_ty), ok)
        tl.store(at + D_FF, up.to(gate_up_ptr.dtype.element_ty), ok)


@jit
def _project_kernel(
    rows, w,                        # (n_visits, N_IN) by expert; (n_experts, N_IN, N_OUT)
    weights_ptr,                    # (n_visits,) by token: of each visit, if WEIGHTED
    parts_ptr,                      # (SPLITS, n_visits, N_OUT), visits by token
    visits_ptr, starts_ptr, tile_expert_ptr, tile_first_ptr, n_used_ptr,
    n_row_tiles, n_visits,
    N_IN: tl.constexpr, N_OUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,       # whether w is (n_experts, N_OUT, N_IN)
    WEIGHTED: tl.constexpr,
    SPLITS: tl.constexpr,           # of the sum, where there are too few tiles for the chip
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):
    """One program: ROWS visits times COLS columns of their expert, rows to their token's place."""
    _begin(PDL)
    n_col_tiles: tl.constexpr = (N_OUT + COLS - 1) // COLS
    row_tile, part = _tile_of(tl.program_id(0), n_row_tiles, n_col_tiles * SPLITS)
    n_used = tl.load(n_used_ptr)
    expert = tl.load(tile_expert_ptr + row_tile)                # loads that do not wait in turn
    first_row = tl.load(tile_first_ptr + row_tile)
    if row_tile >= n_used:
        return
    place = first_row + tl.arange(0, ROWS)                              # (ROWS,)
    place_ok = place < tl.load(starts_ptr + expert + 1)
    row = tl.minimum(place, n_visits - 1).to(tl.int64)
    first_col = part // SPLITS * COLS
    length: tl.constexpr = ((N_IN + STEP - 1) // STEP + SPLITS - 1) // SPLITS * STEP
    begin = part % SPLITS * length
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for first in tl.range(begin, tl.minimum(begin + length, N_IN), STEP, num_stages=STAGES):
        a = _load_rows(rows, row, first_row, first, N_IN, ROWS, STEP, TMA)
        if TRANSPOSED:
            b = _load_weight(w, expert, first_col, first, N_OUT, N_IN, COLS, STEP, TMA)
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
        else:
            b = _load_weight(w, expert, first, first_col, N_IN, N_OUT, STEP, COLS, TMA)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)

    visit = tl.load(visits_ptr + place, place_ok, other=0)
    if WEIGHTED:
        acc = acc * tl.load(weights_ptr + visit, place_ok, other=0.0)[:, None]
    col = first_col + tl.arange(0, COLS)                                # (COLS,)
    at = (visit + tl.cast(part % SPLITS, tl.int64) * n_visits)[:, None] * N_OUT + col[None, :]
    ok = place_ok[:, None] & (col < N_OUT)[None, :]
    tl.store(parts_ptr + at, acc.to(parts_ptr.dtype.element_ty), ok)


@jit
def _combine_kernel(
    parts_ptr, out_ptr,             # (SPLITS, n_tokens, K, D), (n_tokens, D)
    n_tokens,
    K: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr, TILE_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: TILE_D columns of one token, the sum of its visits in their order."""
    _begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)                # (TILE_D,)
    out = tl.zeros((TILE_D,), tl.float32)
    for split in tl.static_range(SPLITS):
        for j in tl.static_range(K):
            at = (split * n_tokens + token) * K + j
            out += tl.load(parts_ptr + at * D + d, d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + d, out.to(out_ptr.dtype.element_ty), d < D)


@jit
def _hidden_gradient_kernel(
    d_out_ptr, w,                   # (n_tokens, D), w_down (n_experts, D_FF, D)
    gate_up_ptr, weights_ptr,       # (n_visits, 2 * D_FF) by expert; (n_visits,) by token
    d_gate_up_ptr,                  # like gate_up
    weighted_ptr,                   # (n_visits, D_FF): weight * hidden, for the gradient of w_down
    d_weights_ptr,                  # (column tiles, n_visits) float32, visits by token
    visits_ptr, starts_ptr, tile_expert_ptr, tile_first_ptr, n_used_ptr,
    n_row_tiles, n_visits,
    K: tl.constexpr, D: tl.constexpr, D_FF: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):
    """One program: the gradient of gate and up for ROWS visits and COLS columns.

    g = d_out W_down^T serves twice: weight * g is the gradient of hidden, and the weight's gradient
    d_out . (hidden W_down) is g . hidden, so the forward pass need not keep hidden W_down.
    """
    row_tile, col_tile = _tile_of(tl.program_id(0), n_row_tiles, tl.cdiv(D_FF, COLS))
    if row_tile >= tl.load(n_used_ptr):
        return
    expert = tl.load(tile_expert_ptr + row_tile)
    first_place = tl.load(tile_first_ptr + row_tile)
    place = first_place + tl.arange(0, ROWS)                            # (ROWS,)
    place_ok = place < tl.load(starts_ptr + expert + 1)
    visit = tl.load(visits_ptr + place, place_ok, other=0)              # (ROWS,)
    token = (visit // K).to(tl.int64)
    first_col = col_tile * COLS
    g = tl.zeros((ROWS, COLS), tl.float32)
    for first in tl.range(0, D, STEP, num_stages=STAGES):
        d_out = _load_rows(d_out_ptr, token, 0, first, D, ROWS, STEP, False)
        w_down = _load_weight(w, expert, first_col, first, D_FF, D, COLS, STEP, TMA)
        g = tl.dot(d_out, tl.trans(w_down), g, input_precision=PRECISION)

    col = first_col + tl.arange(0, COLS)                                # (COLS,)
    ok = place_ok[:, None] & (col < D_FF)[None, :]
    # a 64-bit place of the tile and 32-bit ones inside it: registers are short here
    tile_at = first_place.to(tl.int64) * D_FF
    within = tl.arange(0, ROWS)[:, None] * D_FF + col[None, :]
    at = within + tl.arange(0, ROWS)[:, None] * D_FF
    gate = tl.load(gate_up_ptr + 2 * tile_at + at, ok, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + 2 * tile_at + D_FF + at, ok, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    hidden = gate * share * up
    d_weights_at = d_weights_ptr + tl.cast(col_tile, tl.int64) * n_visits + visit
    tl.store(d_weights_at, tl.sum(g * hidden, axis=1), place_ok)
    weight = tl.load(weights_ptr + visit, place_ok, other=0.0)[:, None]
    dtype = d_gate_up_ptr.dtype.element_ty
    tl.store(weighted_ptr + tile_at + within, (weight * hidden).to(dtype), ok)
    d_hidden = weight * g
    d_gate = d_hidden * up * share * (1 + gate * (1 - share))
    tl.store(d_gate_up_ptr + 2 * tile_at + at, d_gate.to(dtype), ok)
    tl.store(d_gate_up_ptr + 2 * tile_at + D_FF + at, (d_hidden * gate * share).to(dtype), ok)


@jit
def _weight_gradient_kernel(
    a_ptr, b_ptr,                   # (n, M) and (n, N): by token if gathered, else by expert
    d_w_ptr,                        # (n_experts, M, N)
    visits_ptr, starts_ptr,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    GATHER_A: tl.constexpr,         # else b is gathered
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """One program: a (ROWS, COLS) tile of one expert's a^T b over its visits; 0 if it has none."""
    n_row_tiles: tl.constexpr = (M + ROWS - 1) // ROWS
    n_col_tiles: tl.constexpr = (N + COLS - 1) // COLS
    expert = tl.program_id(0) // (n_row_tiles * n_col_tiles)
    row_tile, col_tile = _tile_of(
        tl.program_id(0) % (n_row_tiles * n_col_tiles), n_row_tiles, n_col_tiles
    )
    m = row_tile * ROWS + tl.arange(0, ROWS)                            # (ROWS,)
    n = col_tile * COLS + tl.arange(0, COLS)                            # (COLS,)
    end = tl.load(starts_ptr + expert + 1)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for first in tl.range(tl.load(starts_ptr + expert), end, STEP, num_stages=STAGES):
        place = first + tl.arange(0, STEP)                              # (STEP,)
        ok = place < end
        token = (tl.load(visits_ptr + place, ok, other=0) // K).to(tl.int64)
        if GATHER_A:
            a_row, b_row = token, place.to(tl.int64)
        else:
            a_row, b_row = place.to(tl.int64), token
        a = tl.load(a_ptr + a_row[:, None] * M + m[None, :], ok[:, None] & (m < M)[None, :], 0.0)
        b = tl.load(b_ptr + b_row[:, None] * N + n[None, :], ok[:, None] & (n < N)[None, :], 0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    at = (expert.to(tl.int64) * M + m)[:, None] * N + n[None, :]
    ok = (m < M)[:, None] & (n < N)[None, :]
    tl.store(d_w_ptr + at, acc.to(d_w_ptr.dtype.element_ty), ok)


@jit
def _logit_gradient_kernel(
    d_weights_ptr,                  # (n_parts, n_tokens, K) float32
    weights_ptr, experts_ptr,       # (n_tokens, K)
    probabilities_ptr,              # (n_tokens, N_EXPERTS), if K is 1
    d_logits_ptr,                   # (n_tokens, N_EXPERTS)
    n_tokens, n_parts,
    N_EXPERTS: tl.constexpr, E: tl.constexpr, K: tl.constexpr, TILE_TOKENS: tl.constexpr,
):
    """One program: back through the softmax of TILE_TOKENS tokens, share * (d_share - mean)."""
    token = tl.program_id(0) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)  # (TILE_TOKENS,)
    token_ok = token < n_tokens
    expert = tl.arange(0, E)[None, :]                                   # (1, E)
    at = token.to(tl.int64)[:, None] * N_EXPERTS + expert
    ok = token_ok[:, None] & (expert < N_EXPERTS)
    share = tl.zeros((TILE_TOKENS, E), tl.float32)
    if K == 1:      # not renormalised: every expert's logit takes part
        share = tl.load(probabilities_ptr + at, ok, other=0.0)
    d_share = tl.zeros((TILE_TOKENS, E), tl.float32)
    mean = tl.zeros((TILE_TOKENS,), tl.float32)
    for j in range(0, K):
        visit = token * K + j
        d_weight = tl.zeros((TILE_TOKENS,), tl.float32)
        for part in range(0, n_parts):
            part_at = d_weights_ptr + tl.cast(part, tl.int64) * n_tokens * K
            d_weight += tl.load(part_at + visit, token_ok, other=0.0)
        weight = tl.load(weights_ptr + visit, token_ok, other=0.0)
        here = tl.load(experts_ptr + visit, token_ok, other=-1)[:, None] == expert
        if K > 1:
            share = tl.where(here, weight[:, None], share)
        d_share = tl.where(here, d_weight[:, None], d_share)
        mean += weight * d_weight
    d_logits = share * (d_share - mean[:, None])
    tl.store(d_logits_ptr + at, d_logits.to(d_logits_ptr.dtype.element_ty), ok)


def moe_layer_triton(
    x: Tensor, router: Tensor, w_gate_up: Tensor, w_down: Tensor, *, k: int
) -> Tensor:
    """Each token's k best experts, SwiGLU each, and their weighted sum: forward and backward.

    Args:
        x: (n_tokens, d); float32, float16 or bfloat16. n_tokens may be 0.
        router: (d, n_experts), n_experts at most 256. Its logits are float32 whatever the dtype.
        w_gate_up: (n_experts, d, 2 * d_ff), the gate's columns first. Contiguous.
        w_down: (n_experts, d_ff, d). Contiguous.
        k: experts a token visits, at most 16. Of equal logits the lower expert number wins. The
            weights of k >= 2 experts are renormalised to sum to 1; a single one keeps its
            probability.

    Returns:
        (n_tokens, d), the dtype of `x`, differentiable, once, in all four tensors. Two runs give
        the same bits.

    Raises:
        BadInput: a shape, dtype, device, layout or k is wrong.

    Cost: 6 * n_tokens * k * d * d_ff operations forward and twice that backward. With few tokens
    the weights of the experts touched are read from memory once. Memory: hidden (n_tokens * k,
    d_ff) and a row of d a visit, and for a backward pass gate and up (n_tokens * k, 2 * d_ff). The
    host never waits for the device, so the call can be captured in a CUDA graph.
    Source: Jiang et al. 2024 (Mixtral), section 2.1; Gale et al. 2022 (MegaBlocks), section 5, for
    the grouped product; Guo et al. 2025 (SonicMoE), for the weights' gradient without a stored
    output of the experts.
    """
    tensors = (x, router, w_gate_up, w_down)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return _moe_layer(*tensors, k, save)[0]


def layer_in_triton(
    x: Tensor, router: Tensor, w_gate_up: Tensor, w_down: Tensor, *, k: int
) -> Tensor:
    """As `moe_layer_triton`, by the Triton kernels on any GPU, without a gradient."""
    _check(x, router, w_gate_up, w_down, k)
    x, router = x.detach().contiguous(), router.detach().contiguous()
    sizes = Sizes(*x.shape, router.shape[1], w_down.shape[1], k)
    routed = _route(x, router, sizes, False)
    return _forward(x, w_gate_up, w_down, routed, sizes, False, on_hopper=False)[0]


@torch.library.custom_op("llmopt_lab::moe_layer", mutates_args=())
def _moe_layer(
    x: Tensor, router: Tensor, w_gate_up: Tensor, w_down: Tensor, k: int, save: bool
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:
    """The result, and what a backward pass needs: gate_up if `save`, and `Routed`."""
    return _layer(x, router, w_gate_up, w_down, k, save)


def _layer(x, router, w_gate_up, w_down, k: int, save: bool) -> tuple[Tensor, ...]:
    _check(x, router, w_gate_up, w_down, k)
    x, router = x.contiguous(), router.contiguous()
    sizes = Sizes(*x.shape, router.shape[1], w_down.shape[1], k)
    routed = _route(x, router, sizes, save)
    return *_forward(x, w_gate_up, w_down, routed, sizes, save), *routed


@_moe_layer.register_fake
def _(x, router, w_gate_up, w_down, k, save):
    sizes = Sizes(*x.shape, router.shape[1], w_down.shape[1], k)
    gate_up = x.new_empty(sizes.n_visits if save else 0, 2 * sizes.d_ff)
    return x.new_empty(x.shape), gate_up, *_empty_routed(x, sizes, save)


@torch.library.custom_op("llmopt_lab::moe_layer_backward", mutates_args=())
def _moe_layer_backward(
    d_out: Tensor, x: Tensor, router: Tensor, w_gate_up: Tensor, w_down: Tensor, gate_up: Tensor,
    routed: list[Tensor], k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _layer_backward(d_out, x, router, w_gate_up, w_down, gate_up, routed, k)


def _layer_backward(d_out, x, router, w_gate_up, w_down, gate_up, routed, k: int):
    sizes = Sizes(*x.shape, router.shape[1], w_down.shape[1], k)
    d_out, x, router = (tensor.contiguous() for tensor in (d_out, x, router))
    return _backward(d_out, x, router, w_gate_up, w_down, gate_up, Routed(*routed), sizes)


@_moe_layer_backward.register_fake
def _(d_out, x, router, w_gate_up, w_down, gate_up, routed, k):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, router, w_gate_up, w_down))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.k, save = inputs
    if save:
        ctx.save_for_backward(*tensors, *output[1:])


def _gradients(ctx, d_out, *_):
    *tensors, gate_up = ctx.saved_tensors[:5]
    routed = list(ctx.saved_tensors[5:])
    return *_moe_layer_backward(d_out, *tensors, gate_up, routed, ctx.k), None, None


_moe_layer.register_autograd(_gradients, setup_context=_save)


class Sizes(NamedTuple):
    """Of one layer call."""

    n_tokens: int
    d: int
    n_experts: int
    d_ff: int
    k: int

    @property
    def n_visits(self):     # a symbol while torch.compile traces
        return self.n_tokens * self.k

    def row_tiles(self, rows: int) -> int:
        """At most as many tiles of `rows` visits as any routing can make."""
        return min(self.n_visits, self.n_visits // rows + self.n_experts)

    def n_row_tiles(self, dtype: torch.dtype) -> int:
        """Of the call's row tiles, whatever the routing."""
        return self.row_tiles(choose_rows(self, dtype))


class Routed(NamedTuple):
    """Which experts the tokens visit and which visits the experts get, int32 where not said."""

    experts: Tensor         # (n_tokens, k), best first
    weights: Tensor         # (n_tokens, k) float32
    probabilities: Tensor   # (n_tokens, n_experts) float32 if k is 1 and a backward pass may come
    visits: Tensor          # (n_visits,): by expert, then by token
    starts: Tensor          # (n_experts + 1,): visits of expert e are [starts[e], starts[e + 1])
    tile_expert: Tensor     # (row tiles,)
    tile_first: Tensor      # (row tiles,): the tile's first place in `visits`
    n_used: Tensor          # (1,): row tiles from here on do not exist

    def tiles(self) -> tuple[Tensor, ...]:
        return self.visits, self.starts, self.tile_expert, self.tile_first, self.n_used


def _empty_routed(x: Tensor, sizes: Sizes, save: bool) -> Routed:
    n_tokens, _, n_experts, _, k = sizes
    keep = n_experts if save and k == 1 else 0
    n_row_tiles = sizes.n_visits // MIN_ROWS + n_experts    # of the smallest tiles
    return Routed(
        experts=x.new_empty((n_tokens, k), dtype=torch.int32),
        weights=x.new_empty((n_tokens, k), dtype=torch.float32),
        probabilities=x.new_empty((n_tokens, keep), dtype=torch.float32),
        visits=x.new_empty(sizes.n_visits, dtype=torch.int32),
        starts=x.new_empty(n_experts + 1, dtype=torch.int32),
        tile_expert=x.new_empty(n_row_tiles, dtype=torch.int32),
        tile_first=x.new_empty(n_row_tiles, dtype=torch.int32),
        n_used=x.new_empty(1, dtype=torch.int32),
    )


def _route(x: Tensor, router: Tensor, sizes: Sizes, save: bool) -> Routed:
    n_tokens, d, n_experts, _, k = sizes
    rows = choose_rows(sizes, x.dtype)
    e = max(16, triton.next_power_of_2(n_experts))
    routed = _empty_routed(x, sizes, save)
    tiles = choose_tiles("route", sizes, x.dtype)
    n_token_tiles = ceil_div(n_tokens, tiles.rows)
    rank = torch.empty_like(routed.experts)
    tile_counts = x.new_empty((n_token_tiles, n_experts), dtype=torch.int32)
    groups = routed.starts, routed.tile_expert, routed.tile_first, routed.n_used
    padded = {"N_EXPERTS": n_experts, "E": e}
    common = {"TILE_TOKENS": tiles.rows, "TILE_D": tiles.step, "STAGES": tiles.n_stages,
              "PRECISION": _precision(x.dtype), "num_warps": tiles.n_warps}  # fmt: skip
    pdl = _dependent_launch(x)
    parts, n_parts = x.new_empty(0, dtype=torch.float32), 0
    if n_token_tiles == 1:
        length = ceil_div(ceil_div(d, LOGIT_PARTS), tiles.step) * tiles.step
        n_parts = ceil_div(d, length)
        parts = parts.new_empty(n_parts, tiles.rows, e)
        _logits_kernel[(n_parts,)](
            x, router, parts, n_tokens, D=d, **padded, LENGTH=length, **common, **pdl
        )
    _route_kernel[(n_token_tiles,)](
        x, router, parts, routed.experts, routed.weights, routed.probabilities, rank, tile_counts,
        routed.visits, *groups, n_tokens,
        D=d, **padded, K=k, K_PADDED=triton.next_power_of_2(k), SAVE=save and k == 1,
        SOLO=n_token_tiles == 1, N_PARTS=n_parts, TILE_ROWS=rows, **common, **pdl,
    )  # fmt: skip
    if n_token_tiles != 1:
        _scan_kernel[(1,)](
            tile_counts, *groups, n_token_tiles, **padded,
            TILE=SCAN // e, TILE_ROWS=rows, num_warps=8, **pdl,
        )  # fmt: skip
        _place_kernel[(ceil_div(sizes.n_visits, 256),)](
            routed.experts, rank, tile_counts, routed.visits, sizes.n_visits,
            K=k, N_EXPERTS=n_experts, TILE_TOKENS=tiles.rows, TILE=256, **pdl,
        )  # fmt: skip
    return routed


def _forward(
    x, w_gate_up, w_down, routed: Routed, sizes: Sizes, save: bool, on_hopper: bool = True
) -> tuple[Tensor, Tensor]:
    """The layer's result, and what gate and up were if `save`."""
    hidden = x.new_empty(sizes.n_visits, sizes.d_ff)
    gate_up = x.new_empty(sizes.n_visits if save else 0, 2 * sizes.d_ff)
    if on_hopper and _on_hopper(x, w_gate_up, w_down, sizes):
        groups = routed.tiles()
        hopper.gate_up(x, w_gate_up, hidden, gate_up, groups, k=sizes.k, save=save)
        parts = x.new_empty(1, sizes.n_visits, sizes.d)
        hopper.project(hidden, w_down, routed.weights, parts, groups, k=sizes.k)
        return _combine(parts, sizes, x.dtype), gate_up
    _gate_up(x, w_gate_up, hidden, gate_up, routed, sizes, save)
    return _project(hidden, w_down, routed, sizes, transposed=False), gate_up


def _gate_up(x, w_gate_up, hidden, gate_up, routed: Routed, sizes: Sizes, save: bool) -> None:
    """Fill `hidden`, and `gate_up` if `save`, visits by expert."""
    tiles = choose_tiles("gate_up", sizes, x.dtype)
    if sizes.d_ff * x.itemsize % 16:    # TMA cannot begin at up's first column
        tiles = tiles._replace(tma=False)
    n_row_tiles = sizes.n_row_tiles(x.dtype)
    (w,), options = _operands(tiles, (w_gate_up, tiles.step, tiles.cols))
    _gate_up_kernel[(n_row_tiles * ceil_div(sizes.d_ff, tiles.cols),)](
        x, w, hidden, gate_up, *routed.tiles(), n_row_tiles,
        K=sizes.k, D=sizes.d, D_FF=sizes.d_ff, SAVE=save, **options, **_dependent_launch(x),
    )  # fmt: skip


def _project(rows, w, routed: Routed, sizes: Sizes, *, transposed: bool) -> Tensor:
    """Every visit's row times its expert's matrix, summed over each token's visits: (n_tokens, d).

    Forward the sum is weighted; backward, where `w` is transposed, the rows are already.
    """
    tiles = choose_tiles("project", sizes, rows.dtype)
    n_row_tiles, n_in = sizes.n_row_tiles(rows.dtype), rows.shape[1]
    n_col_tiles = ceil_div(sizes.d, tiles.cols)
    splits = _splits(n_row_tiles * n_col_tiles, n_in, tiles) if not transposed else 1
    dtype = rows.dtype if splits == 1 else torch.float32
    parts = rows.new_empty((splits, sizes.n_visits, sizes.d), dtype=dtype)
    _project_into(parts, rows, w, routed, sizes, tiles, transposed=transposed)
    return _combine(parts, sizes, rows.dtype)


def _project_into(parts, rows, w, routed: Routed, sizes: Sizes, tiles, *, transposed: bool) -> None:
    n_row_tiles, (splits, _, d) = sizes.n_row_tiles(rows.dtype), parts.shape
    n_in = rows.shape[1]
    n_col_tiles = ceil_div(d, tiles.cols)
    block = (tiles.cols, tiles.step) if transposed else (tiles.step, tiles.cols)
    (a, b), options = _operands(tiles, (rows, tiles.rows, tiles.step), (w, *block))
    _project_kernel[(n_row_tiles * n_col_tiles * splits,)](
        a, b, routed.weights, parts, *routed.tiles(), n_row_tiles, sizes.n_visits,
        N_IN=n_in, N_OUT=d, TRANSPOSED=transposed, WEIGHTED=not transposed, SPLITS=splits,
        **options, **_dependent_launch(rows),
    )  # fmt: skip


def _combine(parts: Tensor, sizes: Sizes, dtype: torch.dtype) -> Tensor:
    """The sum of each token's rows of `parts` (splits, n_visits, d), visits by token."""
    out = parts.new_empty(sizes.n_tokens, sizes.d, dtype=dtype)
    tile_d = min(1024, triton.next_power_of_2(sizes.d))
    _combine_kernel[(sizes.n_tokens, ceil_div(sizes.d, tile_d))](
        parts, out, sizes.n_tokens,
        K=sizes.k, SPLITS=len(parts), D=sizes.d, TILE_D=tile_d, **_dependent_launch(parts),
    )  # fmt: skip
    return out


def _on_hopper(x: Tensor, w_gate_up: Tensor, w_down: Tensor, sizes: Sizes) -> bool:
    """Whether the Hopper kernels take the forward products: their row tiles must be the call's."""
    return choose_rows(sizes, x.dtype) == hopper.ROWS and hopper.supports(x, w_gate_up, w_down)


def _backward(d_out, x, router, w_gate_up, w_down, gate_up, routed: Routed, sizes: Sizes):
    """d_x, d_router, d_w_gate_up and d_w_down."""
    n_tokens, d, n_experts, d_ff, k = sizes
    n_row_tiles = sizes.n_row_tiles(x.dtype)
    tiles = choose_tiles("hidden_gradient", sizes, x.dtype)
    n_col_tiles = ceil_div(d_ff, tiles.cols)
    d_gate_up = torch.empty_like(gate_up)
    weighted = x.new_empty(sizes.n_visits, d_ff)
    d_weights = x.new_empty((n_col_tiles, sizes.n_visits), dtype=torch.float32)
    (w,), options = _operands(tiles, (w_down, tiles.cols, tiles.step))
    _hidden_gradient_kernel[(n_row_tiles * n_col_tiles,)](
        d_out, w, gate_up, routed.weights, d_gate_up, weighted, d_weights, *routed.tiles(),
        n_row_tiles, sizes.n_visits, K=k, D=d, D_FF=d_ff, **options,
    )  # fmt: skip
    d_w_down = _weight_gradient(weighted, d_out, w_down, routed, sizes, gather_a=False)
    del weighted
    d_w_gate_up = _weight_gradient(x, d_gate_up, w_gate_up, routed, sizes, gather_a=True)
    d_x = _project(d_gate_up, w_gate_up, routed, sizes, transposed=True)
    d_logits = x.new_empty(n_tokens, n_experts)
    e = max(16, triton.next_power_of_2(n_experts))
    tile_tokens = max(1, 4096 // e)
    _logit_gradient_kernel[(ceil_div(n_tokens, tile_tokens),)](
        d_weights, routed.weights, routed.experts, routed.probabilities, d_logits,
        n_tokens, n_col_tiles, N_EXPERTS=n_experts, E=e, K=k, TILE_TOKENS=tile_tokens,
    )  # fmt: skip
    return d_x.addmm_(d_logits, router.T), x.T @ d_logits, d_w_gate_up, d_w_down


def _weight_gradient(a, b, w, routed: Routed, sizes: Sizes, *, gather_a: bool) -> Tensor:
    """a^T b over the visits of every expert, like `w`; one of the two lies by token."""
    d_w = torch.empty_like(w)
    n_experts, m, n = w.shape
    tiles = choose_tiles("weight_gradient", sizes, a.dtype)
    _weight_gradient_kernel[(n_experts * ceil_div(m, tiles.rows) * ceil_div(n, tiles.cols),)](
        a, b, d_w, routed.visits, routed.starts,
        K=sizes.k, M=m, N=n, GATHER_A=gather_a, **_options(tiles, a.dtype),
    )  # fmt: skip
    return d_w


class Tiles(NamedTuple):
    """How one kernel runs."""

    rows: int           # of its result; "route": tokens
    cols: int
    step: int           # of the sum
    n_warps: int
    n_stages: int
    tma: bool = False   # whether Hopper's tensor memory accelerator copies what lies in order


# (kernel, bytes an element, whether tiles are full: else `rows` is cut to what an expert gets);
# measured on an H200
TILES = {
    ("gate_up", 2, True): Tiles(128, 128, 64, 8, 4),
    ("gate_up", 2, False): Tiles(64, 64, 64, 4, 6),
    ("project", 2, True): Tiles(128, 256, 64, 8, 4),
    ("project", 2, False): Tiles(64, 128, 64, 4, 4),
    ("hidden_gradient", 2, True): Tiles(128, 64, 64, 8, 4),
    ("hidden_gradient", 2, False): Tiles(64, 64, 64, 4, 3),
    ("weight_gradient", 2, True): Tiles(128, 128, 64, 8, 3),
    ("weight_gradient", 2, False): Tiles(128, 128, 32, 8, 3),
    ("gate_up", 4, True): Tiles(64, 32, 32, 4, 2),
    ("gate_up", 4, False): Tiles(64, 32, 32, 4, 2),
    ("project", 4, True): Tiles(64, 64, 32, 4, 2),
    ("project", 4, False): Tiles(64, 64, 32, 4, 2),
    ("hidden_gradient", 4, True): Tiles(64, 32, 32, 4, 2),
    ("hidden_gradient", 4, False): Tiles(64, 32, 32, 4, 2),
    ("weight_gradient", 4, True): Tiles(64, 64, 32, 4, 2),
    ("weight_gradient", 4, False): Tiles(64, 64, 32, 4, 2),
}
SMALL_TILES = {     # of 16 rows: as many weights under way as shared memory holds
    "gate_up": Tiles(16, 64, 128, 4, 5),
    "project": Tiles(16, 64, 128, 4, 4),
}
SCAN = 8192             # counts that _scan_kernel reads at a time
LOGIT_PARTS = 16        # multiprocessors that read the router for few tokens


def choose_rows(sizes: Sizes, dtype: torch.dtype) -> int:
    """Visits in a row tile, the same for every kernel of a call: they share one list of tiles."""
    return rows_for(sizes, dtype) if gpu_facts() else MIN_ROWS


def rows_for(sizes: Sizes, dtype: torch.dtype) -> int:
    """128, if the experts fill that; else so many that most experts have one tile."""
    full = sizes.n_tokens > DECODE_TOKENS and sizes.n_visits >= 96 * sizes.n_experts
    if full and dtype.itemsize == 2:
        return 128
    usual = max(1, 4 * sizes.n_visits // sizes.n_experts)
    most = max(1, min(sizes.n_tokens, usual, 64))
    return max(MIN_ROWS, triton.next_power_of_2(most))


def choose_tiles(kernel: str, sizes: Sizes, dtype: torch.dtype) -> Tiles:
    """Tiles of the "route", "gate_up", "project", "hidden_gradient" or "weight_gradient" kernel."""
    gpu = gpu_facts()
    if gpu is None:
        return Tiles(16, 32, 16, 4, 1)  # interpreted: small, so that small examples have several
    capability = None if torch.version.hip is not None else gpu.capability
    return tiles_for(kernel, sizes, dtype, capability)


def tiles_for(
    kernel: str, sizes: Sizes, dtype: torch.dtype, capability: tuple[int, int] | None
) -> Tiles:
    """The table's tiles, cut down to what a GPU of that capability (None: AMD) holds."""
    e = max(16, triton.next_power_of_2(sizes.n_experts))
    if kernel == "route":
        rows = min(64, 8192 // e, max(16, triton.next_power_of_2(sizes.n_tokens)))
        tiles = Tiles(rows, e, 64, 8, 4)
    else:
        tensor_cores = capability is None or capability >= (8, 0)
        itemsize = dtype.itemsize if tensor_cores else 4    # without them products are float32
        rows = rows_for(sizes, dtype)
        tiles = TILES[kernel, itemsize, rows == 128]
        if rows == 16 and itemsize == 2:
            tiles = SMALL_TILES.get(kernel, tiles)
        if kernel != "weight_gradient":
            tiles = tiles._replace(rows=rows)
        tiles = tiles._replace(tma=capability is not None and capability >= (9, 0))
    while _bytes_needed(kernel, tiles, dtype.itemsize) > _shared_bytes(capability):
        if tiles.n_stages > 2:
            tiles = tiles._replace(n_stages=tiles.n_stages - 1)
        elif tiles.step > 32:
            tiles = tiles._replace(step=tiles.step // 2)
        else:
            tiles = tiles._replace(cols=tiles.cols // 2)
    return tiles


def _bytes_needed(kernel: str, tiles: Tiles, itemsize: int) -> int:
    """Of the tiles that the loop has under way."""
    n_cols = 2 * tiles.cols if kernel == "gate_up" else tiles.cols
    return itemsize * tiles.n_stages * tiles.step * (tiles.rows + n_cols) + 2048


def _shared_bytes(capability: tuple[int, int] | None) -> int:
    """Most shared memory of one program."""
    if capability is None or capability < (8, 0):
        return 64 << 10
    if capability[0] in (9, 10):
        return 227 << 10
    return 163 << 10 if capability in ((8, 0), (8, 7)) else 99 << 10


def _splits(n_tiles: int, n_in: int, tiles: Tiles) -> int:
    """Into how many parts a sum is cut, so that few tiles still keep the whole chip reading.

    Long sums are cut for the sake of an even end as well: the parts are little beside them.
    """
    gpu = gpu_facts()
    n_sms = gpu.n_sms if gpu else 8
    splits = 1
    while splits < 8 and (
        n_tiles * splits < n_sms and n_in >= 4 * splits * tiles.step
        or n_tiles * splits < 4 * n_sms and n_in >= 8192 * splits
    ):
        splits *= 2
    return splits


def _operands(tiles: Tiles, *matrices: tuple[Tensor, int, int]) -> tuple[list, dict]:
    """What a kernel reads in tiles of (rows, cols), as pointers or TMA descriptors, and `tiles`."""
    tma = tiles.tma and all(_has_tma_strides(x) for x, *_ in matrices)
    if tma:
        operands = [_descriptor(x, rows, cols) for x, rows, cols in matrices]
    else:
        operands = [x for x, *_ in matrices]
    return operands, _options(tiles, matrices[0][0].dtype) | {"TMA": tma}


def _options(tiles: Tiles, dtype: torch.dtype) -> dict:
    return {
        "ROWS": tiles.rows, "COLS": tiles.cols, "STEP": tiles.step,
        "STAGES": tiles.n_stages, "num_warps": tiles.n_warps, "PRECISION": _precision(dtype),
    }  # fmt: skip


def _descriptor(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """TMA copies (rows, cols) of a matrix, or of one of many; what lies outside reads as 0."""
    block = [1] * (x.ndim - 2) + [rows, cols]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def _has_tma_strides(x: Tensor) -> bool:
    """TMA needs the address and every stride in steps of 16 bytes."""
    steps = [x.data_ptr(), *(stride * x.itemsize for stride in x.stride()[:-1])]
    return x.numel() > 0 and all(step % 16 == 0 for step in steps)


def _dependent_launch(x: Tensor) -> dict:
    """Options of a kernel whose start hides behind the end of the one before it (sm_90 on)."""
    gpu = gpu_facts()
    pdl = x.is_cuda and torch.version.hip is None and gpu is not None and gpu.capability >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def _precision(dtype: torch.dtype) -> str:
    """Of float32 products: three tf32 products are nearly as exact and run on tensor cores."""
    gpu = gpu_facts()
    has_tf32 = torch.version.hip is None and gpu is not None and gpu.capability >= (8, 0)
    return "tf32x3" if dtype == torch.float32 and has_tf32 else "ieee"


def _check(x: Tensor, router: Tensor, w_gate_up: Tensor, w_down: Tensor, k: int) -> None:
    """Refuse bad input before any work."""
    require(x.ndim == 2 and x.shape[1] > 0, f"x must be (n_tokens, d); got {tuple(x.shape)}")
    d = x.shape[1]
    require(
        router.ndim == 2 and router.shape[0] == d and 0 < router.shape[1] <= MAX_EXPERTS,
        f"router must be (d, n_experts) with d {d} and 1 to {MAX_EXPERTS} experts; "
        f"got {tuple(router.shape)}",
    )
    n_experts = router.shape[1]
    require(
        w_down.ndim == 3 and w_down.shape[::2] == (n_experts, d) and w_down.shape[1] > 0,
        f"w_down must be (n_experts, d_ff, d) with {n_experts} experts and d {d}; "
        f"got {tuple(w_down.shape)}",
    )
    d_ff = w_down.shape[1]
    require(
        w_gate_up.shape == (n_experts, d, 2 * d_ff),
        f"w_gate_up must be (n_experts, d, 2 * d_ff), {(n_experts, d, 2 * d_ff)} beside this "
        f"w_down; got {tuple(w_gate_up.shape)}",
    )
    require(
        0 < k <= min(MAX_K, n_experts),
        f"k must be 1 to {min(MAX_K, n_experts)}, the experts there are, at most {MAX_K}; got {k}",
    )
    require(
        x.shape[0] * k < 1 << 31,
        f"n_tokens * k must be less than 2^31; got {x.shape[0]} * {k}: split the tokens",
    )
    require(
        x.dtype in (torch.float32, torch.float16, torch.bfloat16),
        f"the dtype must be float32, float16 or bfloat16; got {x.dtype}",
    )
    for name, tensor in (("router", router), ("w_gate_up", w_gate_up), ("w_down", w_down)):
        require(
            tensor.dtype == x.dtype and tensor.device == x.device,
            f"{name} must be {x.dtype} on {x.device} like x; got {tensor.dtype} on {tensor.device}",
        )
    for name, tensor in (("w_gate_up", w_gate_up), ("w_down", w_down)):
        require(
            tensor.is_contiguous(),
            f"{name} must be contiguous; got strides {tensor.stride()}: call .contiguous() once, "
            "when the weights are loaded",
        )
    require(
        x.is_cuda or interpreting(),
        f"x is on the {x.device} but Triton compiles for the GPU in this session: move it there",
    )
    require(
        x.is_cuda or x.dtype != torch.bfloat16,
        "bfloat16 needs a GPU: Triton's CPU interpreter computes on its bit pattern "
        "and returns wrong numbers. Use float32.",
    )
