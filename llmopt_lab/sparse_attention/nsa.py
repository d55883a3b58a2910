"""Native sparse attention (NSA): compressed, selected and near keys, weighed by gates.

Source: Yuan et al. 2025, https://arxiv.org/abs/2502.11089, section 3. Its letters: l `block`,
d `stride`, l' `select_block`, n `n_select`, w `window`, phi `compress`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import ceil_div
from llmopt_lab.core.trace import record
from llmopt_lab.sparse_attention.block_lists import lists_of
from llmopt_lab.sparse_attention.patterns import Causal, SlidingWindow
from llmopt_lab.sparse_attention.records import Selected
from llmopt_lab.sparse_attention.reference import check_input, sparse_attention

Branches = tuple[Tensor, Tensor, Tensor]


def nsa_attention(
    q: Tensor,
    k: Tensor | Branches,
    v: Tensor | Branches,
    gates: Tensor,
    *,
    block: int = 32,
    stride: int = 16,
    select_block: int = 64,
    n_select: int = 16,
    window: int = 512,
    compress: Callable[[Tensor], Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal: gates[.., 0] * compressed + gates[.., 1] * selected + gates[.., 2] * window.

    Args:
        q: (.., n_heads, n, d_head).
        k, v: (.., n_kv_heads, n, ..), or one of each for every branch, as the paper trains them.
        gates: (.., n_heads, n, 3), the paper's sigmoids of an MLP, made outside.
        block, stride: a compressed key stands for `block` tokens; the next begins `stride` later.
        select_block, n_select: tokens of a selectable block, and how many a query reads. Counted
            among them: the first block, the query's own and the one before it.
        window: nearest keys that the third branch sees.
        compress: (.., blocks, block, d) to (.., blocks, d), for keys and values alike; their mean
            if None. The paper learns it, with positions inside the block.

    Returns:
        (.., n_heads, n, d_v).

    Raises:
        BadInput: wrong shapes, a size that is not positive, stride not a divisor of both blocks.

    Cost a query and head: n / stride + n_select * select_block + window keys.
    """
    keys, values = (x if isinstance(x, tuple) else (x, x, x) for x in (k, v))
    for branch in range(3):
        scale = check_input(q, keys[branch], values[branch], scale)
    n = q.shape[-2]
    require(
        q.ndim > 2 and keys[0].shape[-2] == n,
        f"q, k and v must be (.., heads, n, d), n the same; got {tuple(q.shape)} and "
        f"{tuple(keys[0].shape)}",
    )
    require(
        gates.shape == (*q.shape[:-1], 3),
        f"gates must be {(*q.shape[:-1], 3)}; got {tuple(gates.shape)}",
    )
    sizes = {
        "block": block,
        "stride": stride,
        "select_block": select_block,
        "n_select": n_select,
        "window": window,
    }
    for name, size in sizes.items():
        require(isinstance(size, int) and size > 0, f"{name} must be a positive int; got {size!r}")
    require(
        block % stride == 0 and select_block % stride == 0,
        f"stride must divide block and select_block; got {stride}, {block} and {select_block}",
    )
    compress = compress or (lambda blocks: blocks.mean(-2))

    near, p = compressed_attention(
        q,
        compressed(keys[0], block, stride, compress),
        compressed(values[0], block, stride, compress),
        block=block,
        stride=stride,
        scale=scale,
    )
    chosen = select(importance(p, keys[0].shape[-3], block, stride, select_block, n), n_select)
    lists = lists_of(chosen, torch.zeros_like(chosen), n, n, 1, select_block)
    selected = sparse_attention(q, keys[1], values[1], Causal(), lists=lists, scale=scale)
    local = sparse_attention(q, keys[2], values[2], SlidingWindow(window), scale=scale)
    return gates[..., :1] * near + gates[..., 1:2] * selected + gates[..., 2:] * local


def compressed(x: Tensor, block: int, stride: int, compress: Callable[[Tensor], Tensor]) -> Tensor:
    """One row for every whole block: (.., n, d) to (.., blocks, d). Equation 7."""
    if x.shape[-2] < block:
        return x[..., :0, :]
    return compress(x.unfold(-2, block, stride).mT)


def compressed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block: int, stride: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to whole past blocks, (.., n_heads, n, d_v), and its probabilities (.., n, blocks).

    A query whose first block is not over yet sees nothing, and gets zeros.
    """
    group = q.shape[-3] // k.shape[-3]
    k, v = (x.repeat_interleave(group, -3) for x in (k, v))
    last = torch.arange(k.shape[-2], device=q.device) * stride + block - 1  # (blocks,)
    past = last <= torch.arange(q.shape[-2], device=q.device)[:, None]  # (n, blocks)
    scores = (scale * q @ k.mT).masked_fill(~past, -torch.inf)
    p = torch.where(past, scores, 0).softmax(-1) if k.shape[-2] == 0 else scores.softmax(-1)
    p = p.masked_fill(~past, 0)  # of a row without blocks, softmax is NaN
    return p @ v, p


def importance(
    p: Tensor, n_kv_heads: int, block: int, stride: int, select_block: int, n: int
) -> Tensor:
    """What the compressed probabilities say of each selectable block, (.., n_kv_heads, n, blocks).

    A compressed block gives its probability once for every `stride` tokens that it shares with the
    selectable one, summed over the heads of a group. Equations 9 and 10.
    """
    first = torch.arange(p.shape[-1], device=p.device)[:, None] * stride  # (compressed, 1)
    begin = torch.arange(ceil_div(n, select_block), device=p.device) * select_block
    shared = torch.minimum(first + block, begin + select_block) - torch.maximum(first, begin)
    weight = shared.clamp(min=0) // stride  # (compressed, ..)
    summed = p.unflatten(-3, (n_kv_heads, -1)).sum(-3)
    scores = summed.detach() @ weight.to(p.dtype)
    own = torch.arange(n, device=p.device)[:, None] // select_block
    return scores.masked_fill(torch.arange(len(begin), device=p.device) > own, -torch.inf)


def select(scores: Tensor, n_select: int) -> Tensor:
    """The blocks that each query reads, bool like `scores`: first, own, previous, then the best."""
    blocks = torch.arange(scores.shape[-1], device=scores.device)
    may = scores > -torch.inf  # (.., n, blocks)
    own = may.sum(-1, keepdim=True) - 1
    fixed = may & ((blocks == 0) | (blocks == own) | (blocks == own - 1))
    ranked = scores.masked_fill(fixed, torch.inf)
    best = ranked.topk(min(n_select, scores.shape[-1]), dim=-1)
    chosen = torch.zeros_like(may).scatter(-1, best.indices, best.values > -torch.inf)
    record(Selected(scores, chosen))
    return chosen
