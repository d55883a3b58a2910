"""A mixture-of-experts layer in Triton, forward and backward, without a word to the host.

Forward: `route_kernels.py` picks each token's experts and sorts the visits by expert,
`_gate_up_kernel` gathers the tokens of a tile of visits and makes their SwiGLU, `_project_kernel`
projects down and writes each visit's weighted row to the place of its token, `_combine_kernel` adds
the k rows of a token. For very few tokens, where no gradient is wanted, `few_token_kernels.py` has
all. How many visits an expert gets is known on the device only, so every grid covers the worst case
and the programs that are left over end at once. Every sum has one owner and one order: two runs
give the same bits.

A visit is one (token, choice) pair, numbered token * k + choice; `visits` lists them by expert.
"""

import torch
from torch import Tensor

from llmopt_lab.core.device import prepare_triton
from llmopt_lab.core.errors import require
from llmopt_lab.core.launch import check_dtype, dependent_launch, jit
from llmopt_lab.core.memory import ceil_div
from llmopt_lab.moe import few_token_kernels
from llmopt_lab.moe.route_kernels import Routed, empty_routed, route
from llmopt_lab.moe.tiles import (
    Sizes,
    begin_kernel,
    choose_tiles,
    load_rows,
    load_weight,
    operands_of,
    options_of,
    splits_for,
    tile_of,
)

prepare_triton()

import triton
import triton.language as tl

MAX_EXPERTS = 256
MAX_K = 16


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
    begin_kernel(PDL)
    row_tile, col_tile = tile_of(tl.program_id(0), n_row_tiles, tl.cdiv(D_FF, COLS))
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
        w_gate = load_weight(w, expert, first, first_col, D, 2 * D_FF, STEP, COLS, TMA)
        w_up = load_weight(w, expert, first, first_col + D_FF, D, 2 * D_FF, STEP, COLS, TMA)
        x = load_rows(x_ptr, token, 0, first, D, ROWS, STEP, False)
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
    begin_kernel(PDL)
    n_col_tiles: tl.constexpr = (N_OUT + COLS - 1) // COLS
    row_tile, part = tile_of(tl.program_id(0), n_row_tiles, n_col_tiles * SPLITS)
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
        a = load_rows(rows, row, first_row, first, N_IN, ROWS, STEP, TMA)
        if TRANSPOSED:
            b = load_weight(w, expert, first_col, first, N_OUT, N_IN, COLS, STEP, TMA)
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
        else:
            b = load_weight(w, expert, first, first_col, N_IN, N_OUT, STEP, COLS, TMA)
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
    begin_kernel(PDL)
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
    row_tile, col_tile = tile_of(tl.program_id(0), n_row_tiles, tl.cdiv(D_FF, COLS))
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
        d_out = load_rows(d_out_ptr, token, 0, first, D, ROWS, STEP, False)
        w_down = load_weight(w, expert, first_col, first, D_FF, D, COLS, STEP, TMA)
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
    row_tile, col_tile = tile_of(
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


@torch.library.custom_op("llmopt_lab::moe_layer", mutates_args=())
def _moe_layer(
    x: Tensor, router: Tensor, w_gate_up: Tensor, w_down: Tensor, k: int, save: bool
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:
    """The result, and what a backward pass needs: gate_up and `Routed`, empty if not `save`."""
    return _layer(x, router, w_gate_up, w_down, k, save)


def _layer(x, router, w_gate_up, w_down, k: int, save: bool) -> tuple[Tensor, ...]:
    _check(x, router, w_gate_up, w_down, k)
    x, router = x.contiguous(), router.contiguous()
    sizes = Sizes(*x.shape, router.shape[1], w_down.shape[1], k)
    if not save:
        return _inference(x, router, w_gate_up, w_down, sizes), *_nothing_saved(x, sizes)
    routed = route(x, router, sizes, save)
    return *_forward(x, w_gate_up, w_down, routed, sizes, save), *routed


@_moe_layer.register_fake
def _(x, router, w_gate_up, w_down, k, save):
    sizes = Sizes(*x.shape, router.shape[1], w_down.shape[1], k)
    if not save:
        return x.new_empty(x.shape), *_nothing_saved(x, sizes)
    gate_up = x.new_empty(sizes.n_visits, 2 * sizes.d_ff)
    return x.new_empty(x.shape), gate_up, *empty_routed(x, sizes, save)


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


def _inference(x, router, w_gate_up, w_down, sizes: Sizes) -> Tensor:
    if few_token_kernels.supports(sizes):
        return few_token_kernels.layer(x, router, w_gate_up, w_down, sizes)
    return _forward(x, w_gate_up, w_down, route(x, router, sizes, False), sizes, False)[0]


def _nothing_saved(x: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
    """In the place of gate_up and `Routed`."""
    return x.new_empty(0, 2 * sizes.d_ff), *empty_routed(x, sizes._replace(n_tokens=0), False)


def _forward(
    x, w_gate_up, w_down, routed: Routed, sizes: Sizes, save: bool
) -> tuple[Tensor, Tensor]:
    """The layer's result, and what gate and up were if `save`."""
    hidden = x.new_empty(sizes.n_visits, sizes.d_ff)
    gate_up = x.new_empty(sizes.n_visits if save else 0, 2 * sizes.d_ff)
    _gate_up(x, w_gate_up, hidden, gate_up, routed, sizes, save)
    return _project(hidden, w_down, routed, sizes, transposed=False), gate_up


def _gate_up(x, w_gate_up, hidden, gate_up, routed: Routed, sizes: Sizes, save: bool) -> None:
    """Fill `hidden`, and `gate_up` if `save`, visits by expert."""
    tiles = choose_tiles("gate_up", sizes, x.dtype)
    if sizes.d_ff * x.itemsize % 16:    # TMA cannot begin at up's first column
        tiles = tiles._replace(tma=False)
    n_row_tiles = sizes.n_row_tiles(x.dtype)
    (w,), options = operands_of(tiles, (w_gate_up, tiles.step, tiles.cols))
    _gate_up_kernel[(n_row_tiles * ceil_div(sizes.d_ff, tiles.cols),)](
        x, w, hidden, gate_up, *routed.tiles(), n_row_tiles,
        K=sizes.k, D=sizes.d, D_FF=sizes.d_ff, SAVE=save, **options, **dependent_launch(x.device),
    )  # fmt: skip


def _project(rows, w, routed: Routed, sizes: Sizes, *, transposed: bool) -> Tensor:
    """Every visit's row times its expert's matrix, summed over each token's visits: (n_tokens, d).

    Forward the sum is weighted; backward, where `w` is transposed, the rows are already.
    """
    tiles = choose_tiles("project", sizes, rows.dtype)
    n_row_tiles, n_in = sizes.n_row_tiles(rows.dtype), rows.shape[1]
    n_col_tiles = ceil_div(sizes.d, tiles.cols)
    splits = splits_for(n_row_tiles * n_col_tiles, n_in) if not transposed else 1
    dtype = rows.dtype if splits == 1 else torch.float32
    parts = rows.new_empty((splits, sizes.n_visits, sizes.d), dtype=dtype)
    block = (tiles.cols, tiles.step) if transposed else (tiles.step, tiles.cols)
    (a, b), options = operands_of(tiles, (rows, tiles.rows, tiles.step), (w, *block))
    _project_kernel[(n_row_tiles * n_col_tiles * splits,)](
        a, b, routed.weights, parts, *routed.tiles(), n_row_tiles, sizes.n_visits,
        N_IN=n_in, N_OUT=sizes.d, TRANSPOSED=transposed, WEIGHTED=not transposed, SPLITS=splits,
        **options, **dependent_launch(rows.device),
    )  # fmt: skip
    return _combine(parts, sizes, rows.dtype)


def _combine(parts: Tensor, sizes: Sizes, dtype: torch.dtype) -> Tensor:
    """The sum of each token's rows of `parts` (splits, n_visits, d), visits by token."""
    out = parts.new_empty(sizes.n_tokens, sizes.d, dtype=dtype)
    tile_d = min(1024, triton.next_power_of_2(sizes.d))
    _combine_kernel[(sizes.n_tokens, ceil_div(sizes.d, tile_d))](
        parts, out, sizes.n_tokens,
        K=sizes.k, SPLITS=len(parts), D=sizes.d, TILE_D=tile_d, **dependent_launch(parts.device),
    )  # fmt: skip
    return out


def _backward(d_out, x, router, w_gate_up, w_down, gate_up, routed: Routed, sizes: Sizes):
    """d_x, d_router, d_w_gate_up and d_w_down."""
    n_tokens, d, n_experts, d_ff, k = sizes
    n_row_tiles = sizes.n_row_tiles(x.dtype)
    tiles = choose_tiles("hidden_gradient", sizes, x.dtype)
    n_col_tiles = ceil_div(d_ff, tiles.cols)
    d_gate_up = torch.empty_like(gate_up)
    weighted = x.new_empty(sizes.n_visits, d_ff)
    d_weights = x.new_empty((n_col_tiles, sizes.n_visits), dtype=torch.float32)
    (w,), options = operands_of(tiles, (w_down, tiles.cols, tiles.step))
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
        K=sizes.k, M=m, N=n, GATHER_A=gather_a, **options_of(tiles, a.dtype),
    )  # fmt: skip
    return d_w


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
    check_dtype(x.dtype, x)
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
