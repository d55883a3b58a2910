"""The Transformer under a pattern: stateless, layer by layer, or with blocks chosen by content.

    logits = model(tokens, attend=PatternAttend(streaming(256, 4)))
    logits = model(tokens, attend=PatternAttend(SlidingWindow(256), Causal()))   # every other layer

On a GPU they run the Triton kernel, forward and backward. On a CPU they take torch's attention with
the mask as a tensor: n_q n_k bits, and no block is skipped. Endless text is for
`rolling_cache.RollingCache`.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmopt_lab.core.errors import require
from llmopt_lab.sparse_attention.patterns import Causal, Pattern
from llmopt_lab.sparse_attention.records import BlockLists
from llmopt_lab.sparse_attention.select import top_blocks


class PatternAttend:
    """An `attend` of `nn.Transformer`: layer i attends under patterns[i % len(patterns)].

    Several patterns interleave local and global layers, as in Mistral's and Gemma's successors.
    A pattern that is not causal lets a language model see the future: write `pattern & Causal()`.

    Raises:
        BadInput: no pattern.
    """

    def __init__(self, *patterns: Pattern):
        require(len(patterns) > 0, "give one pattern at least, such as SlidingWindow(256)")
        self.patterns = patterns

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float) -> Tensor:
        """q (batch, n_heads, n, d_head), k and v (batch, n_kv_heads, n, d_head): out like q."""
        return attend(q, k, v, self.patterns[layer % len(self.patterns)], scale=scale)


class TopBlocksAttend:
    """An `attend` that reads the `n_blocks` best blocks of keys of every block of queries.

    Args:
        size: queries and keys of a block.
        score, always: as for `top_blocks`; `always` blocks are read besides.
    """

    def __init__(
        self, n_blocks: int, size: int, *, score: str = "mean", always: Pattern | None = None
    ):
        self.n_blocks, self.size, self.score, self.always = n_blocks, size, score, always

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float) -> Tensor:
        """Shapes as for `PatternAttend`."""
        lists = top_blocks(
            q, k, Causal(), n_blocks=self.n_blocks, tile_q=self.size, tile_k=self.size,
            score=self.score, always=self.always,
        )  # fmt: skip
        return attend(q, k, v, Causal(), scale=scale, lists=lists)


def attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *,
    scale: float, lists: BlockLists | None = None,
) -> Tensor:  # fmt: skip
    """`sparse_attention` by the kernel on a GPU, by torch's dense attention on a CPU."""
    if _kernel_fits(q, lists):
        from llmopt_lab.sparse_attention.kernels import sparse_attention_triton

        return sparse_attention_triton(q, k, v, pattern, scale=scale, lists=lists)
    mask = _mask(pattern, q.shape[2], k.shape[2], q.device)
    if lists is not None:
        tokens = lists.live().repeat_interleave(lists.tile_q, -2)[..., : lists.n_q, :]
        tokens = tokens.repeat_interleave(lists.tile_k, -1)[..., : lists.n_k]
        if tokens.ndim > 2:  # a list a KV head, else all heads share one
            tokens = tokens.repeat_interleave(q.shape[1] // k.shape[1], -3)
        mask = mask & tokens
    blind = ~mask.any(-1, keepdim=True)  # torch's softmax of nothing is NaN
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask | blind, scale=scale, enable_gqa=True
    )
    return out.masked_fill(blind, 0)


@lru_cache(maxsize=8)  # the layers of a model ask for the same mask
def _mask(pattern: Pattern, n_q: int, n_k: int, device: torch.device) -> Tensor:
    return pattern.mask(n_q, n_k, device=device)


def _kernel_fits(q: Tensor, lists: BlockLists | None) -> bool:
    wide_enough = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    fits = q.is_cuda and wide_enough and q.dtype != torch.float64
    return fits and (lists is None or {lists.tile_q, lists.tile_k} <= {16, 32, 64, 128})
