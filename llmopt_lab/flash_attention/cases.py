"""Inputs shared by tests, benchmarks and the notebook, and the oracle they are held to."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmopt_lab.core.bench import Case
from llmopt_lab.core.cost import allocated_peak
from llmopt_lab.core.errors import require
from llmopt_lab.flash_attention.io_model import Sizes
from llmopt_lab.flash_attention.key_outer import key_outer_attention
from llmopt_lab.flash_attention.peers import (
    BACKWARD,
    FLASH_2,
    FORWARD,
    LADDER,
    NAIVE,
    OURS,
    backward_oracle,
    forward_oracle,
)
from llmopt_lab.flash_attention.split_kv import split_kv_attention
from llmopt_lab.nn.held_out import held_out_documents
from llmopt_lab.nn.transformer import Transformer, causal_attention, rope_tables

Inputs = tuple[Tensor, Tensor, Tensor]

# No length is a multiple of a tile; queries fewer and more than keys; one query; grouped heads;
# values wider and narrower than keys. Fields: n_q, n_k, d_head, d_v, causal, then the heads.
RAGGED = (
    Sizes(50, 37, 16, 16),
    Sizes(37, 50, 8, 12, causal=True, batch=2, n_heads=4, n_kv_heads=2),
    Sizes(50, 37, 8, 3, causal=True, batch=1, n_heads=6, n_kv_heads=2),
    Sizes(33, 33, 5, 5, causal=True, batch=2, n_heads=3, n_kv_heads=3),
    Sizes(1, 61, 16, 16, causal=True, batch=3, n_heads=8, n_kv_heads=2),
    Sizes(61, 1, 4, 4, causal=True, n_heads=2),
    Sizes(1, 1, 1, 1),
)


def attention_inputs(
    sizes: Sizes,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    peak: float = 3.0,
) -> Inputs:
    """q (batch, n_heads, n_q, d_head), k and v (batch, n_kv_heads, n_k, ..), random.

    `peak` scales the queries: at 3 a few keys dominate, and they lie in any tile, so that a result
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
    """q, k, v of 8 tokens, one head of width 4, small integers: scores are halves of integers.

    In tiles of 2 keys, the largest score of every query lies behind the first tile, so every row
    is rescaled at least once.
    """
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


def ragged(dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"):
    """(sizes, q, k, v) of every entry of RAGGED."""
    for seed, sizes in enumerate(RAGGED):
        q, k, v = attention_inputs(sizes, dtype=dtype, device=device, seed=seed)
        yield Sizes.of(q, k, v, causal=sizes.causal), q, k, v


def realistic(
    n_tokens: int = 512, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Inputs:
    """q, k, v of a prompt in one layer like Llama-3-8B's: 32 query heads, 8 KV heads, width 128."""
    sizes = Sizes(n_tokens, n_tokens, 128, 128, causal=True, n_heads=32, n_kv_heads=8)
    return attention_inputs(sizes, dtype=dtype, device=device, peak=2.0)


def long_text() -> str:
    """The held-out files that ship with the lab models, end to end: 260 kB of Python source."""
    return "\n".join(held_out_documents().values())


@torch.no_grad()
def layer_inputs(model: Transformer, tokens: Tensor, *, layer: int, window: int = 1024) -> Inputs:
    """q (n_heads, n, d_head), k and v (n_kv_heads, n, d_head) of one layer while it reads `tokens`.

    The model reads windows of `window` tokens, each from position 0, so a text may be longer than
    the model's positions; what it makes of the windows is joined end to end.

    Raises:
        BadInput: `tokens` is not (n,) with n > 0, the window does not fit the model, or it has no
            such layer.
    """
    config = model.config
    require(
        tokens.dim() == 1 and len(tokens) > 0, f"tokens must be (n,); got {tuple(tokens.shape)}"
    )
    require(
        0 < window <= config.max_positions,
        f"window must be 1 to {config.max_positions}, the model's positions; got {window}",
    )
    require(
        0 <= layer < config.n_layers,
        f"the model has layers 0 to {config.n_layers - 1}; got {layer}",
    )
    caught = []

    def attend(q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float) -> Tensor:
        if layer == wanted:
            caught.append([x[0] for x in (q, k, v)])
        return causal_attention(q, k, v, layer=layer, scale=scale)

    wanted = layer
    for part in tokens.split(window):
        positions = torch.arange(len(part), device=tokens.device)[None]
        cos, sin = rope_tables(config, positions, model.dtype)
        x = model.embed_tokens(part[None])
        for block in model.layers[: wanted + 1]:
            x = block(x, cos, sin, attend)
    return tuple(torch.cat(parts, dim=1) for parts in zip(*caught, strict=True))


class Cost(NamedTuple):
    """What one call took: wall time, and the most memory it held at once beyond what was there."""

    seconds: float
    peak_nbytes: int


def cost_of(call: Callable[[], object]) -> Cost:
    """Run `call` once, on tensors of the CPU, and measure it by torch's own allocator."""
    seconds = []

    def timed() -> None:
        begin = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - begin)
        del result  # its release is not part of the time

    peak = allocated_peak(timed)
    return Cost(seconds[0], peak)


def attention_oracle(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """What attention must give, in float64: torch's own, with zeros where a query sees no key."""
    q, k, v = q.double(), k.double(), v.double()
    n_q, n_k = q.shape[-2], k.shape[-2]
    blind = max(0, n_q - n_k) if causal else 0  # the first queries, which see no key
    mask = torch.ones(n_q - blind, n_k, dtype=torch.bool, device=q.device)
    if causal:
        mask = mask.tril(n_k - (n_q - blind))
    seen = scaled_dot_product_attention(
        q[..., blind:, :], k, v, attn_mask=mask, scale=scale, enable_gqa=q.ndim > 2
    )
    return torch.cat([seen.new_zeros(*seen.shape[:-2], blind, v.shape[-1]), seen], dim=-2)


def lse_oracle(q: Tensor, k: Tensor, *, causal: bool = False, scale: float | None = None) -> Tensor:
    """Log of the sum of exp(score) of every query, in float64, from the whole score matrix."""
    n_q, n_k, keys = q.shape[-2], k.shape[-2], k.double()
    if q.ndim > 2:
        keys = keys.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * q.double() @ keys.mT
    if causal:
        seen = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril(n_k - n_q)
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.logsumexp(scores, dim=-1)


def guides_flash_attention(Q: Tensor, K: Tensor, V: Tensor, block_size: int = 128) -> Tensor:
    """COUNTER-EXAMPLE: a widely copied snippet, (batch, n, d), kept as it is, mistakes and all.

    It divides by the new total without undoing the old division, does not scale the scores, walks
    the keys by the number of queries, and lets autograd keep every P_ij and two of O a block.
    """
    batch, seq_len, d_model = Q.shape
    O = torch.zeros_like(Q)  # noqa: E741
    l = torch.zeros(batch, seq_len, 1)  # noqa: E741
    m = torch.full((batch, seq_len, 1), float("-inf"))
    for j in range(0, seq_len, block_size):
        K_j = K[:, j : j + block_size, :]
        V_j = V[:, j : j + block_size, :]
        S_ij = torch.matmul(Q, K_j.transpose(-2, -1))
        m_new = torch.maximum(m, S_ij.max(dim=-1, keepdim=True)[0])
        alpha = torch.exp(m - m_new)
        P_ij = torch.exp(S_ij - m_new)
        l_new = alpha * l + P_ij.sum(dim=-1, keepdim=True)
        O = (alpha * O + torch.matmul(P_ij, V_j)) / l_new  # noqa: E741
        l = l_new  # noqa: E741
        m = m_new
    return O


def strip_example(reference) -> list[Tensor]:
    """A run that reaches every `record(...)` of the room: all loop orders, forward and backward."""
    sizes = Sizes(7, 5, 4, 3, causal=True, n_heads=4, n_kv_heads=2)
    q, k, v = (x.requires_grad_() for x in attention_inputs(sizes))
    tiles = {"tile_q": 2, "tile_k": 2}
    out, lse = reference.flash_attention(q, k, v, causal=True, **tiles, return_lse=True)
    grads = torch.autograd.grad(out.square().sum() + lse[..., 2:].sum(), (q, k, v))
    with torch.no_grad():
        naive = reference.naive_attention(q, k, v, causal=True)
        first = key_outer_attention(q, k, v, causal=True, **tiles)
        split = split_kv_attention(q[..., -1:, :], k, v, n_splits=3, tile_k=2)
    return [out.detach(), lse.detach(), *grads, naive, first, split]


# The benchmark: 16k tokens in all and a width of 2,048, multi-head, bf16 on a GPU, as in the papers


def _case(title, oracle, contenders, sizes, *, backward: bool = False) -> Case:
    n_tensors = 4 if backward else 3

    def inputs(device, *, batch, n_heads, n, d_head, causal):
        on_gpu = torch.device(device).type == "cuda"
        rng = torch.Generator(device).manual_seed(0)
        shape = (n_tensors, batch, n_heads, n, d_head)
        x = torch.randn(shape, generator=rng, device=device)
        return *(x.bfloat16() if on_gpu else x), causal

    def flops(*, batch, n_heads, n, d_head, causal):
        products = 5 if backward else 2
        return products * 2 * batch * n_heads * n * n * d_head // (2 if causal else 1)

    def min_bytes(*, batch, n_heads, n, d_head, causal):
        return 2 * (8 if backward else 4) * batch * n_heads * n * d_head

    return Case(
        title=title, sizes=sizes, inputs=inputs, oracle=oracle, contenders=contenders,
        flops=flops, min_bytes=min_bytes,
        cpu_sizes=({"batch": 1, "n_heads": 1, "n": 40, "d_head": 64, "causal": True},),
    )  # fmt: skip


def _sizes(*lengths: int, d_heads: tuple[int, ...] = (64, 128)) -> tuple[dict, ...]:
    return tuple(
        {"batch": 16384 // n, "n_heads": 2048 // d, "n": n, "d_head": d, "causal": causal}
        for d in d_heads
        for causal in (False, True)
        for n in lengths
    )


CASES = (
    _case("forward", forward_oracle, FORWARD, _sizes(4096, 8192, 16384)),
    _case("backward", backward_oracle, BACKWARD, _sizes(4096, 16384), backward=True),
    _case(
        "forward, from Triton to Hopper step by step",
        forward_oracle, LADDER, _sizes(4096, 16384, d_heads=(128,)),
    ),
    _case(
        "forward, extra memory against length",
        forward_oracle, (OURS, FLASH_2, NAIVE),
        tuple(
            {"batch": 1, "n_heads": 2, "n": n, "d_head": 64, "causal": False}
            for n in (1024, 4096, 16384, 65536, 131072)
        ),
    ),
)  # fmt: skip
