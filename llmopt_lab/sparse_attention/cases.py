"""Inputs shared by tests, benchmarks and the notebook, the oracle, and the guide's own versions."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmopt_lab.core.bench import Case
from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.memory import ceil_div
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.sparse_attention.block_lists import cover, lists_of
from llmopt_lab.sparse_attention.io_model import flops as listed_flops
from llmopt_lab.sparse_attention.io_model import pairs_formula, visible_pairs
from llmopt_lab.sparse_attention.nsa import nsa_attention
from llmopt_lab.sparse_attention.patterns import (
    Causal,
    DilatedWindow,
    Full,
    GlobalTokens,
    Pattern,
    SlidingWindow,
    Strided,
    bigbird,
    longformer,
    sparse_transformer,
    streaming,
)
from llmopt_lab.sparse_attention.peers import (
    BACKWARD,
    BLOCKS,
    LISTS,
    WINDOW,
    backward_oracle,
    forward_oracle,
    lists_oracle,
)
from llmopt_lab.sparse_attention.rolling_cache import RollingCache
from llmopt_lab.sparse_attention.select import top_blocks

Inputs = tuple[Tensor, Tensor, Tensor]


class Sizes(NamedTuple):
    """Of one attention, all its heads."""

    n_q: int
    n_k: int
    d_head: int = 8
    d_v: int = 8
    batch: int = 1
    n_heads: int = 1
    n_kv_heads: int = 1


# No length is a multiple of a tile; queries fewer and more than keys; one query; grouped heads;
# values wider and narrower than keys.
RAGGED = (
    Sizes(37, 37, 5, 5, batch=2, n_heads=3, n_kv_heads=3),
    Sizes(37, 50, 8, 12, batch=2, n_heads=4, n_kv_heads=2),
    Sizes(41, 30, 8, 3, n_heads=6, n_kv_heads=2),
    Sizes(1, 61, 16, 16, batch=2, n_heads=4, n_kv_heads=1),
    Sizes(1, 1, 1, 1),
)


def patterns(n_tokens: int) -> dict[str, Pattern]:
    """One of every kind, by name, over `n_tokens` tokens."""
    return {
        "full": Full(),
        "causal": Causal(),
        "window 1": SlidingWindow(1),
        "window 3": SlidingWindow(3),
        "window 17": SlidingWindow(17),
        "symmetric window 1": SlidingWindow(1, causal=False),
        "symmetric window 6": SlidingWindow(6, causal=False),
        "dilated 5 x 3": DilatedWindow(5, 3),
        "symmetric dilated 4 x 5": DilatedWindow(4, 5, causal=False),
        "strided 7": Strided(7),
        "sparse transformer 6": sparse_transformer(6),
        "longformer 9": longformer(9, (0, -1)),
        "causal longformer 9": longformer(9, (0, -1)) & Causal(),
        "streaming 8 + 2": streaming(8, 2),
        "bigbird 4": bigbird(
            n_tokens,
            block=4,
            n_global=min(2, ceil_div(n_tokens, 4)),
            n_random=2,
            rng=torch.Generator().manual_seed(n_tokens),
        ),  # fmt: skip
        "far only": Strided(3) & GlobalTokens((0,)),
    }


def attention_inputs(
    sizes: Sizes,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    peak: float = 3.0,
) -> Inputs:
    """q (batch, n_heads, n_q, d_head), k and v (batch, n_kv_heads, n_k, ..), random.

    `peak` scales the queries: at 3 a few keys dominate, and they lie in any block, so that a result
    that misses one of them, or forgets to rescale, is far off.
    """
    rng = torch.Generator(device).manual_seed(seed)
    s = sizes
    q, k, v = (
        torch.randn(s.batch, n_heads, n, d, generator=rng, device=device, dtype=dtype)
        for n_heads, n, d in (
            (s.n_heads, s.n_q, s.d_head),
            (s.n_kv_heads, s.n_k, s.d_head),
            (s.n_kv_heads, s.n_k, s.d_v),
        )
    )
    return peak * q, k, v


def toy(dtype: torch.dtype = torch.float32) -> Inputs:
    """q, k, v of 8 tokens, one head of width 4, small integers: scores are halves of integers."""
    q = [
        [-1, -1, 2, 2], [1, -1, 0, -1], [1, 2, 1, 1], [0, -1, -1, 2],
        [1, 0, 1, -1], [1, -1, 0, -1], [1, -1, 0, 2], [1, 0, 2, 0],
    ]  # fmt: skip
    k = [
        [0, 1, -1, 1], [-1, 1, -1, 0], [-1, 1, 0, 2], [1, 0, -1, 1],
        [-1, 2, 1, -1], [-1, -1, 0, 2], [1, 1, 1, 0], [1, 1, 0, 1],
    ]  # fmt: skip
    v = [
        [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1],
        [1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1],
    ]  # fmt: skip
    return tuple(torch.tensor(x, dtype=dtype) for x in (q, k, v))


def ragged(
    dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Iterator[tuple[Sizes, Tensor, Tensor, Tensor]]:
    """(sizes, q, k, v) of every entry of RAGGED."""
    for seed, sizes in enumerate(RAGGED):
        yield sizes, *attention_inputs(sizes, dtype=dtype, device=device, seed=seed)


def realistic(
    n_tokens: int = 512, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Inputs:
    """q, k, v of a prompt in one layer like Llama-3-8B's: 32 query heads, 8 KV heads, width 128."""
    sizes = Sizes(n_tokens, n_tokens, 128, 128, n_heads=32, n_kv_heads=8)
    return attention_inputs(sizes, dtype=dtype, device=device, peak=2.0)


def attention_oracle(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float | None = None
) -> Tensor:
    """What attention under `mask` must give, in float64: torch's own, zeros for a blind query.

    mask: True where a query may look, (n_q, n_k), or (.., n_heads, n_q, n_k).
    """
    blind = ~mask.any(-1, keepdim=True)
    out = scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask | blind, scale=scale,
        enable_gqa=q.ndim > 2,
    )  # fmt: skip
    return out.masked_fill(blind, 0)


# The guide's snippets, (batch, n, d), kept as they are, mistakes and all; what they leave undefined
# is supplied as it must have been meant.


def guides_local_attention(Q: Tensor, K: Tensor, V: Tensor, window_size: int = 128) -> Tensor:
    """COUNTER-EXAMPLE: a window whose right end is missing, unscaled, which sees the future.

    Its loop takes one query a step: fewer FLOPs than dense attention, and slower.
    """
    seq_len = Q.size(1)
    output = torch.zeros_like(Q)
    for i in range(seq_len):
        start = max(0, i - window_size // 2)
        end = min(seq_len, i + window_size // 2)
        Q_i = Q[:, i : i + 1, :]
        K_window = K[:, start:end, :]
        V_window = V[:, start:end, :]
        scores = torch.matmul(Q_i, K_window.transpose(-2, -1))
        attn = F.softmax(scores, dim=-1)
        output[:, i, :] = torch.matmul(attn, V_window).squeeze(1)
    return output


def guides_strided_attention(Q: Tensor, K: Tensor, V: Tensor, stride: int = 4) -> Tensor:
    """COUNTER-EXAMPLE: attention among every `stride`-th token, stretched over the others.

    The queries are thinned out too, so three tokens in four (stride 4) never reach the output.
    """

    def interpolate(x: Tensor, length: int) -> Tensor:
        stretched = F.interpolate(x.mT, size=length, mode="linear", align_corners=False)
        return stretched.mT

    seq_len = Q.size(1)
    strided_indices = torch.arange(0, seq_len, stride)
    Q_strided = Q[:, strided_indices, :]
    K_strided = K[:, strided_indices, :]
    V_strided = V[:, strided_indices, :]
    output_strided = scaled_dot_product_attention(Q_strided, K_strided, V_strided)
    return interpolate(output_strided, seq_len)


def guides_longformer_attention(
    Q: Tensor, K: Tensor, V: Tensor, window_size: int = 512, global_indices: tuple = (0, -1)
) -> Tensor:
    """COUNTER-EXAMPLE: global tokens see all, but nobody sees them; -1 never equals an index."""
    seq_len = Q.size(1)
    output = torch.zeros_like(Q)
    for i in range(seq_len):
        if i in global_indices:
            Q_i = Q[:, i : i + 1, :]
            attn = scaled_dot_product_attention(Q_i, K, V)
            output[:, i, :] = attn.squeeze(1)
        else:
            start = max(0, i - window_size // 2)
            end = min(seq_len, i + window_size // 2)
            Q_i = Q[:, i : i + 1, :]
            K_local = K[:, start:end, :]
            V_local = V[:, start:end, :]
            attn = scaled_dot_product_attention(Q_i, K_local, V_local)
            output[:, i, :] = attn.squeeze(1)
    return output


def strip_example(reference) -> list[Tensor]:
    """A run that reaches every `record(...)` of the room."""
    q, k, v = attention_inputs(Sizes(7, 9, 4, 3, n_heads=4, n_kv_heads=2))
    lists = cover(streaming(3, 1), 7, 9, tile_q=2, tile_k=3)
    out = reference.sparse_attention(q, k, v, streaming(3, 1), tile_q=2, tile_k=3)
    chosen = top_blocks(q, k, Causal(), n_blocks=1, tile_q=2, tile_k=3)
    k, v = k[..., :7, :], v[..., :7, :]
    gates = torch.full((*q.shape[:-1], 3), 0.5, dtype=q.dtype)
    sizes = {"block": 2, "stride": 1, "select_block": 2, "n_select": 3, "window": 3}
    branches = nsa_attention(q, k, v, gates, **sizes)
    cache = RollingCache(ModelConfig(9, 16, 1, 4, 2, 4, 8), window=3, n_sinks=1, dtype=q.dtype)
    rolled = [
        cache(q[..., i : i + 2, :], k[..., i : i + 2, :], k[..., i : i + 2, :], layer=0, scale=0.5)
        for i in (0, 2, 4)
    ]
    return [lists.blocks, out, chosen.blocks, branches, *rolled]


# The benchmark: 16k tokens, 16 heads of 128, bf16 on a GPU


def _case(
    title, oracle, contenders, sizes, pattern, *, backward: bool = False, block: int = 128
) -> Case:
    """`pattern(**size)` is the rule; a size with `percent` has so many random live blocks."""

    def lists_for(device, *, n, percent=100, **size):
        if percent == 100:
            return None
        rng = torch.Generator(device).manual_seed(0)
        n_blocks = ceil_div(n, block)
        live = torch.rand(n_blocks, n_blocks, generator=rng, device=device) < percent / 100
        return lists_of(live, live, n, n, block, block)

    def inputs(device, **size):
        on_gpu = torch.device(device).type == "cuda"
        rng = torch.Generator(device).manual_seed(0)
        n, d, n_heads = size["n"], size.get("d_head", 128), size.get("n_heads", 16)
        x = torch.randn(4 if backward else 3, 1, n_heads, n, d, generator=rng, device=device)
        lists = lists_for(device, **size)
        found = (*(x.bfloat16() if on_gpu else x), pattern(**size))
        return (*found, lists) if lists is not None else found

    def flops(**size):
        n, d, n_heads = size["n"], size.get("d_head", 128), size.get("n_heads", 16)
        products = 5 if backward else 2
        like = torch.empty(n_heads, n, d, device="meta")
        lists = lists_for("cpu", **size)
        if lists is not None:
            return products * listed_flops(lists, like, like, like) // 2
        return products * 2 * d * n_heads * _pairs(pattern(**size), n)

    def min_bytes(**size):
        tensor = 2 * size.get("n_heads", 16) * size["n"] * size.get("d_head", 128)
        return (8 if backward else 4) * tensor

    small = [{**size, "n": 96, "d_head": 16, "n_heads": 2} for size in sizes[:1]]
    return Case(
        title=title, sizes=sizes, inputs=inputs, oracle=oracle, contenders=contenders,
        flops=flops, min_bytes=min_bytes, cpu_sizes=tuple(small),
    )  # fmt: skip


@lru_cache(maxsize=32)
def _pairs(pattern: Pattern, n: int) -> int:
    try:
        return pairs_formula(pattern, n)
    except BadInput:
        return visible_pairs(pattern, n, n)


def _lists_case(title, pattern) -> Case:
    """Building the lists of a pattern from nothing."""

    def inputs(device, *, n):
        q, k = torch.empty(2, 1, 1, n, 8, device=device)
        return q, k, pattern(n=n)

    return Case(
        title=title, sizes=({"n": 16384}, {"n": 32768}), inputs=inputs, oracle=lists_oracle,
        contenders=LISTS, flops=lambda n: 0, min_bytes=lambda n: 4 * ceil_div(n, 128),
        cpu_sizes=({"n": 256},),
    )  # fmt: skip


def _windowed(*, window: int, sinks: int = 0, **size) -> Pattern:
    return streaming(window, sinks)


def _bigbird(*, n: int, **size) -> Pattern:
    rng = torch.Generator().manual_seed(0)
    return bigbird(n, block=128, n_global=min(2, ceil_div(n, 128)), rng=rng)


CASES = (
    _case(
        "window, forward", forward_oracle, WINDOW,
        (
            {"n": 16384, "window": 1024},
            {"n": 16384, "window": 1024, "sinks": 4},
            {"n": 16384, "window": 4096},
            {"n": 16384, "window": 1024, "d_head": 64},
            {"n": 32768, "window": 1024},
        ),
        _windowed,
    ),
    _case(
        "window, backward", backward_oracle, BACKWARD,
        ({"n": 16384, "window": 1024}, {"n": 16384, "window": 1024, "sinks": 4}),
        _windowed, backward=True,
    ),
    _case(
        "random live blocks of 128, forward", forward_oracle, BLOCKS,
        ({"n": 16384, "percent": 10},), lambda **size: Full(),
    ),
    _case(
        "random live blocks of 64, forward", forward_oracle, BLOCKS,
        ({"n": 16384, "percent": 10},), lambda **size: Full(), block=64,
    ),
    _case(
        "random live blocks of 128, backward", backward_oracle, BACKWARD[:2],
        ({"n": 16384, "percent": 10},), lambda **size: Full(), backward=True,
    ),
    _case(
        "dense, by the same kernel", forward_oracle, WINDOW[:5], ({"n": 16384},),
        lambda **size: Causal(),
    ),
    _case(
        "Sparse Transformer, stride 128", forward_oracle, BLOCKS, ({"n": 16384},),
        lambda **size: sparse_transformer(128),
    ),
    _case(
        "Longformer, window 1024, tokens 0 and -1 global", forward_oracle, BLOCKS,
        ({"n": 16384},), lambda **size: longformer(1024, (0, -1)),
    ),
    _case("BigBird, blocks of 128", forward_oracle, BLOCKS, ({"n": 16384},), _bigbird),
    _lists_case("lists of the Sparse Transformer", lambda n: sparse_transformer(128)),
    _lists_case("lists of BigBird", lambda n: _bigbird(n=n)),
)  # fmt: skip
