"""The router of a mixture of experts in Triton, and the grouping of the visits by expert.

`_route_kernel` picks each token's experts, `_scan_kernel` and `_place_kernel` sort the visits by
expert (a counting sort, stable). For few tokens `_logits_kernel` has many multiprocessors read the
router and one program does the rest. How many visits an expert gets is known on the device only.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llmopt_lab.core.device import prepare_triton
from llmopt_lab.core.launch import dependent_launch, jit, precision_of
from llmopt_lab.core.memory import ceil_div
from llmopt_lab.moe.tiles import (
    MIN_ROWS,
    Sizes,
    begin_kernel,
    choose_rows,
    choose_tiles,
)

prepare_triton()

import triton
import triton.language as tl

SCAN = 8192             # counts that _scan_kernel reads at a time
LOGIT_PARTS = 8         # multiprocessors that read the router for few tokens


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
    begin_kernel(PDL)
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
    begin_kernel(PDL)
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
    begin_kernel(PDL)
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
    begin_kernel(PDL)
    visit = tl.program_id(0) * TILE + tl.arange(0, TILE)                # (TILE,)
    ok = visit < n_visits
    expert = tl.load(experts_ptr + visit, ok, other=0)
    tile = visit // K // TILE_TOKENS
    begin = tl.load(begin_ptr + tile * N_EXPERTS + expert, ok, other=0)
    tl.store(visits_ptr + begin + tl.load(rank_ptr + visit, ok, other=0), visit, ok)


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


def empty_routed(x: Tensor, sizes: Sizes, save: bool) -> Routed:
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


def logit_parts(x: Tensor, router: Tensor, sizes: Sizes) -> Tensor:
    """(parts, rows, E) float32, whose sum is the logits of one tile of tokens."""
    tiles = choose_tiles("route", sizes, x.dtype)
    e = max(16, triton.next_power_of_2(sizes.n_experts))
    length = ceil_div(ceil_div(sizes.d, LOGIT_PARTS), tiles.step) * tiles.step
    n_parts = ceil_div(sizes.d, length)
    parts = x.new_empty((n_parts, tiles.rows, e), dtype=torch.float32)
    _logits_kernel[(n_parts,)](
        x, router, parts, sizes.n_tokens,
        D=sizes.d, N_EXPERTS=sizes.n_experts, E=e, LENGTH=length, TILE_TOKENS=tiles.rows,
        TILE_D=tiles.step, PRECISION=precision_of(x.dtype), STAGES=tiles.n_stages,
        num_warps=tiles.n_warps, **dependent_launch(x.device),
    )  # fmt: skip
    return parts


def route(x: Tensor, router: Tensor, sizes: Sizes, save: bool) -> Routed:
    """Who visits whom, and the row tiles of the call."""
    n_tokens, d, n_experts, _, k = sizes
    rows = choose_rows(sizes, x.dtype)
    e = max(16, triton.next_power_of_2(n_experts))
    routed = empty_routed(x, sizes, save)
    tiles = choose_tiles("route", sizes, x.dtype)
    n_token_tiles = ceil_div(n_tokens, tiles.rows)
    rank = torch.empty_like(routed.experts)
    tile_counts = x.new_empty((n_token_tiles, n_experts), dtype=torch.int32)
    groups = routed.starts, routed.tile_expert, routed.tile_first, routed.n_used
    padded = {"N_EXPERTS": n_experts, "E": e}
    common = {"TILE_TOKENS": tiles.rows, "TILE_D": tiles.step, "STAGES": tiles.n_stages,
              "PRECISION": precision_of(x.dtype), "num_warps": tiles.n_warps}  # fmt: skip
    pdl = dependent_launch(x.device)
    parts = x.new_empty(0, dtype=torch.float32)
    if n_token_tiles == 1:
        parts = logit_parts(x, router, sizes)
    _route_kernel[(n_token_tiles,)](
        x, router, parts, routed.experts, routed.weights, routed.probabilities, rank, tile_counts,
        routed.visits, *groups, n_tokens,
        D=d, **padded, K=k, K_PADDED=triton.next_power_of_2(k), SAVE=save and k == 1,
        SOLO=n_token_tiles == 1, N_PARTS=len(parts), TILE_ROWS=rows, **common, **pdl,
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
