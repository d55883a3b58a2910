"""Sparse attention in plain PyTorch: flash attention's loop over the live blocks alone.

The algorithm is written for one head. `sparse_attention` takes one head or any number of them;
query head h reads KV head h // group.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import load, store, tiles
from llmopt_lab.core.trace import record
from llmopt_lab.sparse_attention.block_lists import cover
from llmopt_lab.sparse_attention.patterns import Full, GlobalTokens, Pattern, SlidingWindow
from llmopt_lab.sparse_attention.records import BlockLists, Finished, Visited


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *, scale: float | None = None,
    tile_q: int = 16, tile_k: int = 16, lists: BlockLists | None = None,
) -> Tensor:
    """softmax over the keys that the pattern allows, reading only blocks that hold one of them.

    Differentiable (by autograd). Equal to dense attention under `pattern.mask(n_q, n_k)`.

    Args:
        q: queries, (n_q, d_head), or (.., n_heads, n_q, d_head); query i is token i + n_k - n_q.
        k: keys, (n_k, d_head), or (.., n_kv_heads, n_k, d_head).
        v: values, like `k`; their width d_v may differ from d_head.
        pattern: which pairs count; the same for every head.
        scale: of the scores; 1/sqrt(d_head) if None.
        tile_q, tile_k: queries and keys of one block.
        lists: the blocks to visit, with their own tile sizes, such as `select.top_blocks` makes: a
            pair counts if the pattern allows it AND its block is listed. The fewest blocks that
            hold the whole pattern if None.

    Returns:
        (.., n_q, d_v), the dtype of `q`. A query that sees no key gives zeros.

    Raises:
        BadInput: shapes, dtypes or devices do not fit, something is empty, a tile or the scale is
            not a positive, finite number, the lists are of other sizes.

    Memory traffic of a query head, in elements: reads n_q d + (keys of its live blocks) (d + d_v),
    writes n_q d_v; `io_model.sparse_traffic` counts it. Scores: tile_q * tile_k a live block.
    Source: Dao et al. 2022, block-sparse FlashAttention, section 3.3 and Algorithm 5
    (https://arxiv.org/abs/2205.14135), with the loops of FlashAttention-2.
    """
    scale = check_input(q, k, v, scale)
    n_q, n_k = q.shape[-2], k.shape[-2]
    if lists is None:
        lists = cover(pattern, n_q, n_k, tile_q=tile_q, tile_k=tile_k, device=q.device)
    check_lists(lists, q, k)
    record(lists)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    for head, kv_head in heads(q, k):
        sparse_head(
            q[head], k[kv_head], v[kv_head], out[head],
            lists=lists.of(kv_head), pattern=pattern.at(n_k), scale=scale,
        )
    return out


def sparse_head(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, *,
    lists: BlockLists, pattern: Pattern, scale: float,
) -> None:
    """One head: q (n_q, d), k (n_k, d), v (n_k, d_v); the result goes to out (n_q, d_v)."""
    wide = torch.promote_types(q.dtype, torch.float32)      # halves are multiplied and added so
    first = len(k) - len(q)                                 # the token of query 0
    for i, rows in enumerate(tiles(len(q), lists.tile_q)):
        q_i = load("Q", q, rows).to(wide)                               # (tile_q, d)
        m = q_i.new_full((len(q_i),), -torch.inf)                       # largest score so far
        total, acc = torch.zeros_like(m), q_i.new_zeros(len(q_i), v.shape[1])
        for cols, full in lists.row(i):
            k_j = load("K", k, cols).to(wide)                           # (tile_k, d)
            v_j = load("V", v, cols).to(wide)                           # (tile_k, d_v)
            scores = scale * q_i @ k_j.T                                # (tile_q, tile_k)
            if not full:
                seen = pattern.allowed(tokens(rows, first, q), tokens(cols, 0, q))
                scores = scores.masked_fill(~seen, -torch.inf)
            m, total, acc = absorb(m, total, acc, scores, v_j)
            record(Visited(rows, cols, full, scores, total))
        o_i = acc / total.masked_fill(total == 0, 1)[:, None]           # no key at all: 0, not NaN
        store("O", out, rows, o_i.to(out.dtype))
        record(Finished(rows, int(lists.n_live[i]), o_i))


def absorb(
    m: Tensor, total: Tensor, acc: Tensor, scores: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fold scores (rows, cols) and their values (cols, d_v) into the running softmax.

    m and total (rows,), acc (rows, d_v). The result does not depend on m, so no gradient goes
    through it.
    """
    new = torch.maximum(m, scores.detach().amax(dim=1))                 # (rows,)
    base = new.masked_fill(new == -torch.inf, 0)    # no key yet: -inf - -inf would be NaN
    shrink = torch.exp(m - base)                                        # rescales the old sums
    p = torch.exp(scores - base[:, None])                               # (rows, cols)
    return new, shrink * total + p.sum(dim=1), shrink[:, None] * acc + p @ values


def longformer_attention(
    q: Tensor, k: Tensor, v: Tensor, q_global: Tensor, k_global: Tensor, v_global: Tensor, *,
    width: int, global_tokens: tuple[int, ...], scale: float | None = None,
    tile_q: int = 16, tile_k: int = 16,
) -> Tensor:
    """Longformer with projections of their own for its global tokens.

    A global token attends to all tokens with `q_global`, `k_global` and `v_global`. Every other
    token attends to its symmetric window and to the global tokens, with `q`, `k` and `v`. All six
    as in `sparse_attention`, of the same shapes in threes, and n_q = n_k.

    Source: Longformer, section 3.1, "Linear Projections for Global Attention".
    """
    require(
        q.shape == q_global.shape and k.shape == k_global.shape and v.shape == v_global.shape,
        "q, k, v and their global versions must have the same shapes; "
        f"got {[tuple(x.shape) for x in (q, k, v, q_global, k_global, v_global)]}",
    )
    require(
        q.shape[-2] == k.shape[-2],
        f"global tokens are numbered in one text: n_q must be n_k; got {q.shape[-2]} queries and "
        f"{k.shape[-2]} keys",
    )
    settings = {"scale": scale, "tile_q": tile_q, "tile_k": tile_k}
    pattern = SlidingWindow(width, causal=False) | GlobalTokens(tuple(global_tokens))
    out = sparse_attention(q, k, v, pattern, **settings)
    where = torch.tensor(GlobalTokens(tuple(global_tokens)).at(q.shape[-2]).tokens, device=q.device)
    if len(where) == 0:
        return out
    seen = sparse_attention(q_global[..., where, :], k_global, v_global, Full(), **settings)
    return out.index_copy(-2, where, seen)


def tokens(where: slice, first: int, like: Tensor) -> Tensor:
    """The tokens of a block of queries or keys, on the device of `like`: (tile,) int64."""
    return torch.arange(first + where.start, first + where.stop, device=like.device)


def heads(q: Tensor, k: Tensor) -> Iterator[tuple[tuple, tuple]]:
    """Index of every query head, and of the KV head that it reads; one head alone has index ()."""
    group = q.shape[-3] // k.shape[-3] if q.ndim > 2 else 1
    for head in itertools.product(*map(range, q.shape[:-2])):
        yield head, (*head[:-1], head[-1] // group) if head else ()


def check_input(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> float:
    """Refuse bad input before any work; back comes the scale to use."""
    shapes = f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
    require(
        q.ndim == k.ndim == v.ndim >= 2,
        "q, k, v must all be (n, d), or all (.., heads, n, d) with as many dimensions; " + shapes,
    )
    require(min(q.numel(), k.numel(), v.numel()) > 0, f"q, k, v must not be empty; {shapes}")
    require(
        q.dtype == k.dtype == v.dtype and q.is_floating_point(),
        f"q, k, v must share a floating dtype; got {q.dtype}, {k.dtype} and {v.dtype}",
    )
    require(
        q.device == k.device == v.device,
        f"q, k, v must be on one device; got {q.device}, {k.device} and {v.device}",
    )
    require(q.shape[-1] == k.shape[-1], f"q and k must share d_head, the last size; {shapes}")
    require(k.shape[:-1] == v.shape[:-1], f"k and v may differ in their last size only; {shapes}")
    if q.ndim > 2:
        require(q.shape[:-3] == k.shape[:-3], f"q and k must have the same batch; {shapes}")
        require(
            q.shape[-3] % k.shape[-3] == 0,
            f"n_heads must be a multiple of n_kv_heads; got {q.shape[-3]} and {k.shape[-3]}",
        )
    require(
        scale is None or math.isfinite(scale),
        f"scale must be a finite number, or None for 1/sqrt(d_head); got {scale}",
    )
    return q.shape[-1] ** -0.5 if scale is None else scale


def check_lists(lists: BlockLists, q: Tensor, k: Tensor) -> None:
    require(
        (lists.n_q, lists.n_k) == (q.shape[-2], k.shape[-2]),
        f"the lists are of {lists.n_q} queries and {lists.n_k} keys; got {q.shape[-2]} and "
        f"{k.shape[-2]}: make them anew with cover or top_blocks",
    )
    require(
        lists.blocks.ndim == 2 or lists.blocks.shape[:-2] == k.shape[:-2],
        f"the lists must be shared or one a KV head {tuple(k.shape[:-2])}; "
        f"got {tuple(lists.blocks.shape[:-2])}",
    )
