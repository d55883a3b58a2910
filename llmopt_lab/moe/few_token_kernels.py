"""The forward pass of a mixture of experts for up to FEW tokens: three kernels instead of five.

With so few tokens a layer is as fast as it reads the weights of the experts touched, and every
kernel of its own that stands before or behind that reading is felt. So nobody groups visits: after
`route_kernels.py` has made the logits, each program of `_gate_up_kernel` finds its own expert from
them. All tokens are the rows of its tile; those that visit its expert are stored. The expert's
other visits have programs too, which see that an earlier token is there already and end. Nor does
a kernel of its own add the visits: the last program of `_project_kernel` to finish a tile of
columns does, each token's in their order, so that two runs give the same bits.
"""

import torch
from torch import Tensor

from llmopt_lab.core.device import prepare_triton
from llmopt_lab.core.launch import dependent_launch, jit
from llmopt_lab.core.memory import ceil_div
from llmopt_lab.moe.route_kernels import logit_parts
from llmopt_lab.moe.tiles import (
    Sizes,
    begin_kernel,
    choose_tiles,
    load_rows,
    load_weight,
    operands_of,
    splits_for,
)

prepare_triton()

import triton
import triton.language as tl

FEW = 4             # tokens: each program reads the logits of all


@jit
def _is_ahead(key, expert, of_key, of_expert):
    """Whether an expert is chosen before another: larger key; of equal ones, lower number."""
    return (key > of_key) | ((key == of_key) & (expert < of_expert))


@jit
def _rows_that_visit(choice, K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """The visit of each row, (ROWS,), -1 if it has none, from each token's choice, (TOKENS,)."""
    row, token = tl.arange(0, ROWS), tl.arange(0, TOKENS)
    visit = tl.where(choice >= 0, token * K + choice, -1)               # (TOKENS,)
    # of one row's tokens at most one is itself; the others add nothing to -1
    own = tl.where(row[:, None] == token[None, :], visit[None, :] + 1, 0)
    return tl.sum(own, axis=1) - 1


@jit
def _gate_up_kernel(
    x_ptr, w,                       # (n_tokens, D), (n_experts, D, 2 * D_FF)
    logits_ptr,                     # (N_PARTS, LOGIT_ROWS, E) float32
    hidden_ptr,                     # (n_visits, D_FF), visits by token
    experts_ptr, weights_ptr,       # (n_visits,) int32 and float32
    arrived_ptr,                    # (n_arrived,) int32: counters of `_project_kernel`, 0 from here
    n_tokens, n_arrived,
    K: tl.constexpr, D: tl.constexpr, D_FF: tl.constexpr, N_EXPERTS: tl.constexpr,
    E: tl.constexpr, N_PARTS: tl.constexpr, LOGIT_ROWS: tl.constexpr, TOKENS: tl.constexpr,
    ARRIVED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):
    """One program: COLS columns of silu(x W_gate) * x W_up, of one visit's expert."""
    begin_kernel(PDL)
    n_col_tiles: tl.constexpr = (D_FF + COLS - 1) // COLS
    this_visit, col_tile = tl.program_id(0) // n_col_tiles, tl.program_id(0) % n_col_tiles
    this_token = this_visit // K
    token = tl.arange(0, TOKENS)                                        # (TOKENS,)
    expert = tl.arange(0, E)                                            # (E,)
    logits = tl.zeros((TOKENS, E), tl.float32)
    for part in tl.static_range(N_PARTS):
        at = (part * LOGIT_ROWS + token)[:, None] * E + expert[None, :]
        logits += tl.load(logits_ptr + at)
    # NaN counts as the largest, as in torch.topk; its token's weights become NaN
    key = tl.where(logits == logits, logits, float("inf"))              # (TOKENS, E)
    key = tl.where((expert < N_EXPERTS)[None, :], key, -float("inf"))

    # this visit's expert is the one with so many ahead of it
    this = token == this_token
    this_key = tl.sum(tl.where(this[:, None], key, 0.0), axis=0)        # (E,)
    ahead = _is_ahead(this_key[None, :], expert[None, :], this_key[:, None], expert[:, None])
    rank = tl.sum(ahead.to(tl.int32), axis=1)                           # (E,)
    chosen = tl.sum(tl.where(rank == this_visit % K, expert, 0), axis=0)
    of_chosen = tl.sum(tl.where((expert == chosen)[None, :], key, 0.0), axis=1)     # (TOKENS,)
    ahead = _is_ahead(key, expert[None, :], of_chosen[:, None], chosen)
    choice = tl.sum(ahead.to(tl.int32), axis=1)                         # (TOKENS,)
    choice = tl.where((choice < K) & (token < n_tokens), choice, -1)

    if col_tile == 0:
        # softmax over all, then the chosen renormalised: for k >= 2 the other experts cancel out
        share = tl.exp(this_key - tl.max(this_key, axis=0))             # (E,)
        total = tl.sum(tl.where((rank < K) | (K == 1), share, 0.0), axis=0)
        weight = tl.sum(tl.where(expert == chosen, share, 0.0), axis=0) / total
        tl.store(experts_ptr + this_visit, chosen)
        tl.store(weights_ptr + this_visit, weight)
    if tl.program_id(0) == 0:
        i = tl.arange(0, ARRIVED)
        tl.store(arrived_ptr + i, tl.zeros_like(i), i < n_arrived)
    if tl.min(tl.where(choice >= 0, token, TOKENS), axis=0) < this_token:
        return

    row = tl.minimum(tl.arange(0, ROWS), n_tokens - 1).to(tl.int64)     # (ROWS,)
    first_col = col_tile * COLS
    gate = tl.zeros((ROWS, COLS), tl.float32)
    up = tl.zeros((ROWS, COLS), tl.float32)
    for first in tl.range(0, D, STEP, num_stages=STAGES):
        w_gate = load_weight(w, chosen, first, first_col, D, 2 * D_FF, STEP, COLS, TMA)
        w_up = load_weight(w, chosen, first, first_col + D_FF, D, 2 * D_FF, STEP, COLS, TMA)
        x = load_rows(x_ptr, row, 0, first, D, ROWS, STEP, False)
        gate = tl.dot(x, w_gate, gate, input_precision=PRECISION)
        up = tl.dot(x, w_up, up, input_precision=PRECISION)
    visit = _rows_that_visit(choice, K, TOKENS, ROWS)                   # (ROWS,)
    col = first_col + tl.arange(0, COLS)                                # (COLS,)
    hidden = gate * tl.sigmoid(gate) * up
    at = hidden_ptr + visit.to(tl.int64)[:, None] * D_FF + col[None, :]
    ok = (visit >= 0)[:, None] & (col < D_FF)[None, :]
    tl.store(at, hidden.to(hidden_ptr.dtype.element_ty), ok)


@jit
def _project_kernel(
    hidden_ptr, w,                  # (n_visits, D_FF), visits by token; (n_experts, D_FF, D)
    experts_ptr, weights_ptr,       # (n_visits,)
    parts_ptr,                      # (SPLITS, n_visits, D) float32
    arrived_ptr,                    # (column tiles,) int32: programs that have written their part
    out_ptr,                        # (n_tokens, D)
    n_tokens, n_visits,
    K: tl.constexpr, K_PADDED: tl.constexpr, D: tl.constexpr, D_FF: tl.constexpr,
    SPLITS: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):
    """One program: a part of one visit's expert times COLS columns; the last one adds all."""
    begin_kernel(PDL)
    n_col_tiles: tl.constexpr = (D + COLS - 1) // COLS
    this_visit = tl.program_id(0) // (n_col_tiles * SPLITS)
    part = tl.program_id(0) % (n_col_tiles * SPLITS)
    col_tile, split = part // SPLITS, part % SPLITS
    first_col = col_tile * COLS
    col = first_col + tl.arange(0, COLS)                                # (COLS,)
    token = tl.arange(0, TOKENS)                                        # (TOKENS,)
    column = tl.arange(0, K_PADDED)[None, :]                            # (1, K_PADDED)
    expert = tl.load(experts_ptr + this_visit)
    ok = (token < n_tokens)[:, None] & (column < K)
    experts = tl.load(experts_ptr + token[:, None] * K + column, ok, other=-1)
    choice = tl.max(tl.where(experts == expert, column, -1), axis=1)    # (TOKENS,)
    if tl.min(tl.where(choice >= 0, token, TOKENS), axis=0) == this_visit // K:
        visit = _rows_that_visit(choice, K, TOKENS, ROWS)               # (ROWS,)
        row = tl.maximum(visit, 0).to(tl.int64)
        length: tl.constexpr = ((D_FF + STEP - 1) // STEP + SPLITS - 1) // SPLITS * STEP
        begin = split * length
        acc = tl.zeros((ROWS, COLS), tl.float32)
        for first in tl.range(begin, tl.minimum(begin + length, D_FF), STEP, num_stages=STAGES):
            a = load_rows(hidden_ptr, row, 0, first, D_FF, ROWS, STEP, False)
            b = load_weight(w, expert, first, first_col, D_FF, D, STEP, COLS, TMA)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        acc = acc * tl.load(weights_ptr + visit, visit >= 0, other=0.0)[:, None]
        at = parts_ptr + (tl.cast(split, tl.int64) * n_visits + row)[:, None] * D + col[None, :]
        tl.store(at, acc, (visit >= 0)[:, None] & (col < D)[None, :])

    tl.debug_barrier()              # every thread's part is on its way before one of them counts
    n_before = tl.atomic_add(arrived_ptr + col_tile, 1, sem="acq_rel")
    if n_before == n_visits * SPLITS - 1:
        cell_ok = (token < n_tokens)[:, None] & (col < D)[None, :]
        out = tl.zeros((TOKENS, COLS), tl.float32)
        for i in tl.static_range(SPLITS * K):
            part_row = (token + i // K * n_tokens).to(tl.int64) * K + i % K     # split i // K
            part_at = parts_ptr + part_row[:, None] * D + col[None, :]
            # from where the others' parts are, not from this multiprocessor's own cache
            out += tl.load(part_at, cell_ok, other=0.0, cache_modifier=".cg")
        out_at = out_ptr + token[:, None] * D + col[None, :]
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), cell_ok)


def supports(sizes: Sizes) -> bool:
    return 0 < sizes.n_tokens <= FEW


def layer(x: Tensor, router: Tensor, w_gate_up: Tensor, w_down: Tensor, sizes: Sizes) -> Tensor:
    """The result of the layer, as `kernels.moe_layer_triton`, which has checked the input."""
    n_tokens, d, n_experts, d_ff, k = sizes
    logits = logit_parts(x, router, sizes)
    hidden = x.new_empty(sizes.n_visits, d_ff)
    experts = x.new_empty(sizes.n_visits, dtype=torch.int32)
    weights = x.new_empty(sizes.n_visits, dtype=torch.float32)
    tokens = triton.next_power_of_2(n_tokens)
    tiles = choose_tiles("gate_up", sizes, x.dtype)
    if d_ff * x.itemsize % 16:      # TMA cannot begin at up's first column
        tiles = tiles._replace(tma=False)
    down = choose_tiles("project", sizes, x.dtype)
    n_col_tiles = ceil_div(d, down.cols)
    arrived = x.new_empty(n_col_tiles, dtype=torch.int32)
    (w,), options = operands_of(tiles, (w_gate_up, tiles.step, tiles.cols))
    _gate_up_kernel[(sizes.n_visits * ceil_div(d_ff, tiles.cols),)](
        x, w, logits, hidden, experts, weights, arrived, n_tokens, n_col_tiles,
        K=k, D=d, D_FF=d_ff, N_EXPERTS=n_experts, E=logits.shape[2], N_PARTS=len(logits),
        LOGIT_ROWS=logits.shape[1], TOKENS=tokens,
        ARRIVED=triton.next_power_of_2(n_col_tiles), **options, **dependent_launch(x.device),
    )  # fmt: skip
    splits = splits_for(sizes.n_visits * n_col_tiles, d_ff)
    parts = x.new_empty((splits, sizes.n_visits, d), dtype=torch.float32)
    out = torch.empty_like(x)
    (w,), options = operands_of(down, (w_down, down.step, down.cols))
    _project_kernel[(sizes.n_visits * n_col_tiles * splits,)](
        hidden, w, experts, weights, parts, arrived, out, n_tokens, sizes.n_visits,
        K=k, K_PADDED=triton.next_power_of_2(k), D=d, D_FF=d_ff, SPLITS=splits, TOKENS=tokens,
        **options, **dependent_launch(x.device),
    )  # fmt: skip
    return out
