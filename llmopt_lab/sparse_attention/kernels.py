"""Block-sparse flash attention in Triton, forward and backward, as one differentiable operator.

The loops are those of flash attention; a program walks the live blocks alone. Where they are a
window, with or without sinks, their numbers follow from the program's own place. Otherwise they
stand in lists, which one small kernel makes from the pattern's terms or from chosen blocks: full
blocks first, then partial ones, in which the kernel evaluates the rule pair by pair. Every sum has
one owner and one order, so two runs give the same bits.

The forward kernel and the launchers are here, the backward kernels in `backward_kernels.py`, walk
and rule, which both follow, in `rule_kernels.py`, lists in `block_list_kernels.py`, sizes of tiles
in `tiles.py`.
"""

from functools import lru_cache

import torch
from torch import Tensor

from llmopt_lab.core.attention_kernels import (
    LOG2_E,
    Tiles,
    check_qkv,
    empty_like,
    is_walkable,
    load_rows,
    options_of,
    owned,
    rows_of,
    scale_of,
    store_rows,
    strides_of,
)
from llmopt_lab.core.device import gpu_facts, prepare_triton
from llmopt_lab.core.errors import require
from llmopt_lab.core.launch import jit
from llmopt_lab.core.memory import ceil_div
from llmopt_lab.sparse_attention import hopper
from llmopt_lab.sparse_attention.backward_kernels import (
    backward_keys_kernel,
    backward_queries_kernel,
    sink_parts_kernel,
)
from llmopt_lab.sparse_attention.block_list_kernels import (
    Walk,
    grid_of,
    kind_of,
    numbers_of,
    select_kernel,
    table_of,
    walk_from,
)
from llmopt_lab.sparse_attention.records import BlockLists
from llmopt_lab.sparse_attention.rule_kernels import from_both_ends, keys_of, pairs_seen, tile_at
from llmopt_lab.sparse_attention.tiles import in_blocks, sink_rows, sized_jit, sizes_of, tiles_for

prepare_triton()

import triton
import triton.language as tl

SINK_PART = 1024                            # queries of a part for each 64 sinks


@jit
def _absorb(
    m, total, acc,                  # (TILE_Q,), (TILE_Q,), (TILE_Q, D): the softmax so far
    q, token, top,                  # (TILE_Q, D), (TILE_Q,): the queries, their tokens, the first
    k_rows, v_rows, kv_head, k_head, k_row, v_head, v_row,
    n_tiles, begin, full_begin, full_end, end, blocks_at, n_before,     # as `tile_at`
    terms_ptr, n_terms, low, high, n_sinks, n_k, scale_log2,
    MASKED: tl.constexpr,           # whether some row sees only a part of these keys
    TILE_K: tl.constexpr, BLOCK_K: tl.constexpr, LISTED: tl.constexpr,
    SINKS: tl.constexpr, RULE: tl.constexpr, LOOP: tl.constexpr,
    D_HEAD: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):
    """Fold the full, or the partial, tiles of keys into the running softmax."""
    for step in tl.range(0, n_tiles, num_stages=STAGES):
        first = tile_at(
            step, begin, full_begin, full_end, end, blocks_at, n_before,
            MASKED, TILE_K, BLOCK_K, LISTED,
        )
        k = load_rows(
            k_rows, kv_head, first, n_k, k_head, k_row, TILE_K, D_HEAD, D, TMA, CHECKED=MASKED
        )
        v = load_rows(
            v_rows, kv_head, first, n_k, v_head, v_row, TILE_K, D_HEAD, D, TMA, CHECKED=MASKED
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)      # (TILE_Q, TILE_K)
        if MASKED:
            key = first + tl.arange(0, TILE_K)                          # (TILE_K,)
            seen = pairs_seen(
                token, key, top, first, terms_ptr, n_terms, low, high, n_sinks,
                SINKS, RULE, LOOP, False,
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
    LISTED: tl.constexpr, SINKS: tl.constexpr, RULE: tl.constexpr, LOOP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):
    """One program: TILE_Q queries of one head against the blocks of keys that they see.

    `list_head` is the number of lists a KV head has: 0 where all heads share them.
    """
    tile, head, batch = owned(tl.cdiv(n_q, TILE_Q), n_heads)
    kv_head = head // group
    first_q = from_both_ends(tile, tl.cdiv(n_q, TILE_Q), LISTED) * TILE_Q
    scale_log2 = scale * LOG2_E
    k_at, v_at = k_ptr + batch * k_batch, v_ptr + batch * v_batch
    k_rows = rows_of(k_at, n_heads // group, n_k, k_head, k_row, TILE_K, D_HEAD, D, TMA)
    v_rows = rows_of(v_at, n_heads // group, n_k, v_head, v_row, TILE_K, D_HEAD, D, TMA)
    q_at = q_ptr + batch * q_batch
    q = load_rows(
        q_at, head, first_q, n_q, q_head, q_row, TILE_Q, D_HEAD, D, False, CHECKED=True
    )
    row = first_q + tl.arange(0, TILE_Q)                                # (TILE_Q,)
    token = row + n_k - n_q
    list_at = (batch * (n_heads // group) + kv_head) * list_head + first_q // BLOCK_Q
    blocks_at = blocks_ptr + list_at * tl.cdiv(n_k, BLOCK_K)
    n_full, n_partial, begin, full_begin, full_end, end = keys_of(
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
        False, TILE_K, BLOCK_K, LISTED, SINKS, RULE, LOOP, D_HEAD, D, PRECISION, STAGES, TMA,
    )
    m, total, acc = _absorb(
        m, total, acc, q, token, first_q + n_k - n_q,
        k_rows, v_rows, kv_head, k_head, k_row, v_head, v_row,
        n_partial, begin, full_begin, full_end, end, blocks_at, n_full,
        terms_ptr, n_terms, low, high, n_sinks, n_k, scale_log2,
        True, TILE_K, BLOCK_K, LISTED, SINKS, RULE, LOOP, D_HEAD, D, PRECISION, STAGES, TMA,
    )

    total = tl.where(total == 0, 1.0, total)    # a row that saw no key: out 0, lse -inf (from m)
    out_at = out_ptr + batch * out_batch
    acc = acc / total[:, None]
    store_rows(out_at, acc, head, first_q, n_q, out_head, out_row, TILE_Q, D_HEAD, D)
    lse = (m + tl.log2(total)) / LOG2_E                                 # (TILE_Q,)
    tl.store(lse_ptr + (batch * n_heads + head) * n_q + row, lse, row < n_q)


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
    that. Memory: lse, the lists (4 bytes a pair of blocks), and in the backward pass two more of
    the size of lse and, for a window with sinks, 8 * d_head * n_sinks bytes a query head and a part
    of its queries, of 1,024 * ceil(n_sinks / 64) each.
    A pattern of more than eight terms (many global tokens, random blocks) is slow where its blocks
    are partial: there the kernel goes through all of them.
    Source: Dao et al. 2022 (FlashAttention), section 3.3, with the loops of FlashAttention-2.
    """
    _check(q, k, v, scale)
    settings = _settings(q, k, pattern, lists)
    out, lse = _sparse_attention(q, k, v, *settings, scale)
    return (out, lse) if return_lse else out


def _settings(q: Tensor, k: Tensor, pattern, lists: BlockLists | None):
    """(grid, terms, block_q, block_k): pattern and lists as the operator takes them.

    Without lists the blocks are of size 0: `walk_from` chooses.
    """
    # torch.compile traces the making of a constant, and warns of what is kept
    terms_of = _terms_of if torch.compiler.is_compiling() else _kept_terms_of
    terms = terms_of(pattern.at(k.shape[2]))
    if lists is None:
        return q.new_empty((0, 0, 0), dtype=torch.int8), terms, 0, 0
    _check_lists(lists, q, k)
    return grid_of(lists), terms, lists.tile_q, lists.tile_k


def _terms_of(pattern) -> str:
    """The numbers of its terms as text: a list of thousands takes an operator milliseconds."""
    return ",".join(map(str, numbers_of(pattern.terms())))


_kept_terms_of = lru_cache(maxsize=64)(_terms_of)


def walk_of(q: Tensor, k: Tensor, pattern, lists: BlockLists | None = None) -> "Walk":
    """Which blocks `sparse_attention_triton(q, k, .., pattern, lists=lists)` visits."""
    return walk_from(q, k, *_settings(q, k, pattern, lists))


@torch.library.custom_op("llmopt_lab::sparse_attention", mutates_args=())
def _sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: Tensor, terms: str, block_q: int, block_k: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward(q, k, v, walk_from(q, k, grid, terms, block_q, block_k), scale_of(q, scale))


@_sparse_attention.register_fake
def _(q, k, v, grid, terms, block_q, block_k, scale):
    return empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("llmopt_lab::sparse_attention_backward", mutates_args=())
def _sparse_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, grid: Tensor, out: Tensor, lse: Tensor, d_out: Tensor,
    d_lse: Tensor, terms: str, block_q: int, block_k: int, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    walk = walk_from(q, k, grid, terms, block_q, block_k)
    return backward_of(q, k, v, out, lse, d_out, d_lse, walk, scale_of(q, scale))


@_sparse_attention_backward.register_fake
def _(q, k, v, grid, out, lse, d_out, d_lse, terms, block_q, block_k, scale):
    return empty_like(q), empty_like(k), empty_like(v)


def _save(ctx, inputs, output) -> None:
    q, k, v, grid, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, grid, *output)


def _gradients(ctx, d_out, d_lse):
    grads = _sparse_attention_backward(*ctx.saved_tensors, d_out, d_lse, *ctx.settings)
    return *grads, None, None, None, None, None


_sparse_attention.register_autograd(_gradients, setup_context=_save)


def _forward(q, k, v, walk: Walk, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse, by the Hopper kernel where it can run."""
    out = empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if not walk.rule and hopper.supports(q, k, v, out, walk):
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
        q, k, v, out, lse, *tensors, *strides_of(q, k, v, out),
        n_heads, n_heads // n_kv_heads, n_q, n_k, *scalars, scale,
        **sizes_of(q), **constants, **options_of(tiles, k, v),
    )  # fmt: skip


def backward_of(q, k, v, out, lse, d_out, d_lse, walk: Walk, scale: float):
    """d_q, d_k and d_v of what the forward pass made."""
    batch, n_heads, n_q, d_head = q.shape
    n_kv_heads, n_k = k.shape[1:3]
    d_out = d_out if is_walkable(d_out) else d_out.contiguous()    # an expanded scalar, often
    d_q, d_k, d_v = empty_like(q), empty_like(k), empty_like(v)
    sizes = sizes_of(q)
    # first, for it makes what the others read of each query
    lists = walk.lists(of_keys=False) if walk.listed else None
    (tensors, scalars), constants = walk.arguments(lists)
    tiles = choose_tiles("backward_queries", d_head, q.dtype, walk)
    tiles_of_keys = choose_tiles("backward_keys", d_head, q.dtype, walk)
    most = max(tiles.tile_q, tiles_of_keys.tile_q)
    n_padded = ceil_div(n_q, most) * most
    lse2, delta = q.new_empty((2, batch, n_heads, n_padded), dtype=torch.float32)
    backward_queries_kernel[(n_padded // tiles.tile_q * n_heads * batch,)](
        q, k, v, out, d_out, lse, d_lse.contiguous(), d_q, lse2, delta, *tensors,
        *strides_of(q, k, v, out, d_out, d_q),
        n_heads, n_heads // n_kv_heads, n_q, n_padded, n_k, *scalars, scale,
        **sizes, **constants, **options_of(tiles, k, v),
    )  # fmt: skip
    lists = walk.lists(of_keys=True) if walk.listed else None
    (tensors, scalars), constants = walk.arguments(lists)
    if constants["SINKS"] and not constants["LISTED"]:
        *sinks, n_parts = _sink_parts(q, k, v, d_out, lse2, delta, walk, scale)
    else:
        *sinks, n_parts = delta, delta, 0
    backward_keys_kernel[(ceil_div(n_k, tiles_of_keys.tile_k) * n_kv_heads * batch,)](
        q, k, v, d_out, lse2, delta, d_k, d_v, *sinks, *tensors,
        *strides_of(q, k, v, d_out, d_k, d_v),
        n_kv_heads, n_heads // n_kv_heads, n_q, n_padded, n_k, n_parts, *scalars, scale,
        **sizes, **constants, **options_of(tiles_of_keys, q, d_out),
    )  # fmt: skip
    return d_q, d_k, d_v


def _sink_parts(q, k, v, d_out, lse2, delta, walk: Walk, scale: float):
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
    sink_parts_kernel[(n_tiles * n_parts * n_heads * batch,)](
        q, k, v, d_out, lse2, delta, d_k, d_v, *strides_of(q, k, v, d_out),
        n_heads, n_heads // k.shape[1], n_q, delta.shape[2], n_k, part, walk.high + 1, n_sinks,
        scale,
        **sizes_of(q), **options_of(tiles, q, d_out),
    )  # fmt: skip
    return d_k, d_v, n_parts


def choose_tiles(kernel: str, d_head: int, dtype: torch.dtype, walk: Walk) -> Tiles:
    """Tiles of the "forward", "backward_keys" or "backward_queries" kernel on the current GPU."""
    gpu = gpu_facts()
    capability = None if gpu is None or torch.version.hip is not None else gpu.capability
    if gpu is None:
        tiles = Tiles(32, 16, 4, 1)     # interpreted: small, so that small examples have several
    else:
        tiles = tiles_for(kernel, d_head, dtype, capability, kind_of(walk.rule))
    if not walk.listed:
        return tiles
    return in_blocks(kernel, tiles, walk.block_q, walk.block_k, capability)


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
    terms, kept = (
        table_of(numbers_of(rule.at(n_k).terms()), q.device)
        for rule in (pattern, always or pattern)
    )
    grid = torch.empty(n_lists, n_rows, n_cols, dtype=torch.int8, device=q.device)
    width = max(16, triton.next_power_of_2(n_cols))
    select_kernel[(n_lists * n_rows,)](
        scores, terms, len(terms), kept, len(kept), grid, n_q, n_k, n_rows, n_cols, n_blocks,
        BLOCK_Q=tile_q, BLOCK_K=tile_k, ALWAYS=always is not None, WIDTH=width,
        num_warps=max(1, min(8, width // 128)),
    )  # fmt: skip
    walk = Walk(terms, grid, 0, 0, 0, False, (), tile_q, tile_k, n_q, n_k)
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


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    """Refuse bad input before any work."""
    check_qkv(q, k, v, scale)
    require(
        min(q.numel(), k.numel()) > 0,
        f"q, k and v must not be empty; got {tuple(q.shape)} and {tuple(k.shape)}",
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
