"""Blocks chosen by content: a cheap score of every block, and the best of each block of queries.

lists = top_blocks(q, k, Causal(), n_blocks=8, tile_q=16, tile_k=16)
out = sparse_attention(q, k, v, Causal(), lists=lists)
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import ceil_div
from llmopt_lab.core.trace import record
from llmopt_lab.sparse_attention.block_lists import grids, lists_of
from llmopt_lab.sparse_attention.patterns import Pattern
from llmopt_lab.sparse_attention.records import BlockLists, Selected


def block_means(x: Tensor, size: int) -> Tensor:
    """Mean of every block of `size` rows, the last one shorter: (.., n, d) to (.., blocks, d)."""
    require(size > 0, f"size must be positive; got {size}")
    n = x.shape[-2]
    n_blocks = ceil_div(n, size)
    whole = pad(x, (0, 0, 0, n_blocks * size - n)).unflatten(-2, (n_blocks, size))
    counts = torch.full((n_blocks, 1), size, dtype=x.dtype, device=x.device)
    counts[-1] = n - (n_blocks - 1) * size
    return whole.sum(-2) / counts


def mean_scores(q: Tensor, k: Tensor, tile_q: int, tile_k: int) -> Tensor:
    """The mean query of each block times the mean key of each block, summed over a group's heads.

    q (.., n_heads, n_q, d), k (.., n_kv_heads, n_k, d): (.., n_kv_heads, row_blocks, col_blocks).
    Cost: one pass over q and k, and n_q n_k d / (tile_q tile_k) multiplications a head.
    Source: MoBA (Lu et al. 2025, https://arxiv.org/abs/2502.13189), section 2.2, for key blocks.
    """
    queries = block_means(q, tile_q)
    group = q.shape[-3] // k.shape[-3]
    queries = queries.unflatten(-3, (k.shape[-3], group)).sum(-3)
    return queries @ block_means(k, tile_k).mT


def quest_scores(q: Tensor, k: Tensor, tile_q: int, tile_k: int) -> Tensor:
    """The most that a query of the block could score with a key of the block, by its extreme keys.

    Shapes as `mean_scores`. Never below the true maximum: sum over d of
    max(q_d * least k_d, q_d * greatest k_d); the largest of the block's queries and group's heads.
    Cost: n_q n_k d / tile_k multiplications a head, two of them.
    Source: Tang et al. 2024, Quest, section 3.3, Algorithm 1 (there for one query).
    """
    n_k, n_blocks = k.shape[-2], ceil_div(k.shape[-2], tile_k)
    past_end = (0, 0, 0, n_blocks * tile_k - n_k)
    least = pad(k, past_end, value=torch.inf).unflatten(-2, (n_blocks, tile_k)).amin(-2)
    greatest = pad(k, past_end, value=-torch.inf).unflatten(-2, (n_blocks, tile_k)).amax(-2)
    grouped = q.unflatten(-3, (k.shape[-3], q.shape[-3] // k.shape[-3]))
    bound = (
        grouped.clamp(min=0) @ greatest.mT[..., None, :, :]
        + grouped.clamp(max=0) @ least.mT[..., None, :, :]
    ).amax(-3)  # (.., n_kv_heads, n_q, col_blocks)
    n_rows = ceil_div(q.shape[-2], tile_q)
    missing = n_rows * tile_q - q.shape[-2]
    bound = pad(bound, (0, 0, 0, missing), value=-torch.inf)
    return bound.unflatten(-2, (n_rows, tile_q)).amax(-2)


SCORES = {"mean": mean_scores, "quest": quest_scores}


def top_blocks(
    q: Tensor, k: Tensor, pattern: Pattern, *, n_blocks: int,
    tile_q: int = 16, tile_k: int = 16, score: str = "mean", always: Pattern | None = None,
) -> BlockLists:  # fmt: skip
    """The `n_blocks` best blocks of keys of every block of queries, a list a KV head.

    Args:
        q: (.., n_heads, n_q, d_head). k: (.., n_kv_heads, n_k, d_head).
        pattern: blocks that it does not touch are never chosen.
        n_blocks: how many, those of `always` not counted; all there are if fewer.
        score: "mean" or "quest", the name of a function above.
        always: blocks that it touches are kept whatever their score, such as `streaming(64, 4)`.

    Returns:
        Lists for `sparse_attention(q, k, v, pattern, lists=..)`.

    Raises:
        BadInput: no such score, no heads' dimension, or a size that is not positive.

    Source: NSA, section 3.3.2, for one list that the heads of a group share; Quest, section 3.3.
    """
    require(score in SCORES, f"score must be one of {', '.join(SCORES)}; got {score!r}")
    require(n_blocks > 0, f"n_blocks must be positive; got {n_blocks}")
    require(
        q.ndim == k.ndim >= 3,
        f"q and k must be (.., heads, n, d_head); got {tuple(q.shape)} and {tuple(k.shape)}",
    )
    n_q, n_k = q.shape[-2], k.shape[-2]
    some, every = grids(pattern, n_q, n_k, tile_q, tile_k, q.device)
    scores = SCORES[score](q.detach(), k.detach(), tile_q, tile_k).masked_fill(~some, -torch.inf)
    return lists_of(chosen_blocks(scores, some, n_blocks, always, n_q, n_k, tile_q, tile_k),
                    every.expand(scores.shape), n_q, n_k, tile_q, tile_k)  # fmt: skip


def chosen_blocks(
    scores: Tensor, some: Tensor, n_blocks: int, always: Pattern | None,
    n_q: int, n_k: int, tile_q: int, tile_k: int,
) -> Tensor:  # fmt: skip
    """Where the `n_blocks` largest scores of each row are, and what `always` keeps; bool."""
    kept = torch.zeros_like(some)
    if always is not None:
        kept = some & grids(always, n_q, n_k, tile_q, tile_k, scores.device)[0]
    others = scores.masked_fill(kept, -torch.inf)
    best = others.topk(min(n_blocks, scores.shape[-1]), dim=-1)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen = chosen.scatter(-1, best.indices, best.values > -torch.inf) | kept
    record(Selected(scores, chosen))
    return chosen
