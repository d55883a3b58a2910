"""What `llmopt bench speculative_decoding` times: our kernels and their peers, one function each.

Each takes the inputs of a case and gives the call to time. A peer with another layout gets a copy
in it before the clock starts.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmopt_lab.core.bench import Contender
from llmopt_lab.core.device import gpu_facts
from llmopt_lab.core.errors import Missing
from llmopt_lab.core.memory import ceil_div

Call = Callable[[], Tensor]


# Attention: q (batch, n_new, n_heads, d_head), caches (n_blocks, block_size, n_kv_heads, d_head)


def attention_oracle(
    q: Tensor, k: Tensor, v: Tensor, tables: Tensor, lengths: Tensor, mask: Tensor | None
) -> Tensor:
    """In float64, a sequence at a time: torch's attention over its gathered keys and values.

    mask: (batch, n_new, n_new) bool, or None for a chain; all of the text before is seen.
    """
    n_new, group = q.shape[1], q.shape[2] // k.shape[2]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for seq, n in enumerate(lengths.tolist()):
        if n:
            keys, values = (
                x.double().repeat_interleave(group, 1)[0]
                for x in (gather(cache, tables[seq : seq + 1], n) for cache in (k, v))
            )  # (n_heads, n, d_head)
            seen = whole_mask(mask if mask is None else mask[seq], n_new, n, q.device)
            rows = q[seq].double().transpose(0, 1)  # (n_heads, n_new, d_head)
            out[seq] = scaled_dot_product_attention(rows, keys, values, seen).transpose(0, 1)
    return out


def gather(cache: Tensor, tables: Tensor, n: int) -> Tensor:
    """The first n tokens of every sequence, copied out of the pool: (batch, n_kv_heads, n, d)."""
    blocks = tables[:, : ceil_div(n, cache.shape[1])].long()
    return cache[blocks].flatten(1, 2)[:, :n].transpose(1, 2).contiguous()


def whole_mask(mask: Tensor | None, n_new: int, n: int, device) -> Tensor:
    """Which of all n tokens each new token sees, (..., n_new, n) bool."""
    if mask is None:
        mask = torch.ones(n_new, n_new, dtype=torch.bool, device=device).tril()
    return torch.cat((mask.new_ones(*mask.shape[:-1], n - n_new), mask), dim=-1)


def ours(q, k, v, tables, lengths, mask) -> Call:
    from llmopt_lab.speculative_decoding.kernels import pack_tree, verify_attention

    tree = None if mask is None else pack_tree(mask)
    return lambda: verify_attention(q, k, v, tables, lengths, tree=tree)


def flash_attention_3(q, k, v, tables, lengths, mask) -> Call:
    from flash_attn_interface import flash_attn_with_kvcache

    return lambda: flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, page_table=tables, causal=True
    )


def flashinfer_paged(q, k, v, tables, lengths, mask) -> Call:
    import flashinfer

    batch, n_new, n_heads, d_head = q.shape
    counts = ((lengths + k.shape[1] - 1) // k.shape[1]).tolist()
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        torch.arange(batch + 1, device=q.device).int() * n_new,
        torch.tensor([0, *counts], device=q.device).cumsum(0).int(),
        torch.cat([row[:n] for row, n in zip(tables, counts, strict=True)]),
        ((lengths - 1) % k.shape[1] + 1).int(),
        n_heads, k.shape[2], d_head, k.shape[1],
        causal=True, q_data_type=q.dtype, kv_data_type=k.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(q.flatten(0, 1), (k, v)).view_as(q)


def sdpa_flash(q, k, v, tables, lengths, mask) -> Call:
    """torch's FlashAttention-2 on contiguous keys, its causal mask aligned at the last token."""
    from torch.nn.attention.bias import causal_lower_right

    n = int(lengths[0])
    rows = q.transpose(1, 2)
    keys, values = (gather(cache, tables, n) for cache in (k, v))
    bias = causal_lower_right(q.shape[1], n)
    return lambda: scaled_dot_product_attention(
        rows, keys, values, attn_mask=bias, enable_gqa=True
    ).transpose(1, 2)


def sdpa_masked(q, k, v, tables, lengths, mask) -> Call:
    """torch's attention with a mask as a tensor, on contiguous keys that stand once a query head:
    the kernels that take a mask take no groups."""
    n, group = int(lengths[0]), q.shape[2] // k.shape[2]
    rows = q.transpose(1, 2)
    keys, values = (gather(cache, tables, n).repeat_interleave(group, 1) for cache in (k, v))
    seen = whole_mask(mask, q.shape[1], n, q.device)
    seen = seen if mask is None else seen[:, None]
    return lambda: scaled_dot_product_attention(rows, keys, values, seen).transpose(1, 2)


# The sampler: p_logits (batch, k + 1, n_vocab), q_logits (batch, k, n_vocab), guesses (batch, k)


def chances_oracle(p_logits: Tensor, q_logits: Tensor, guesses: Tensor) -> Tensor:
    """min(1, p / q) of each guess in float64, (batch, k), a sequence at a time."""
    chances = [
        (
            p[:-1].double().log_softmax(-1).gather(1, guess[:, None])
            - q.double().log_softmax(-1).gather(1, guess[:, None])
        )[:, 0]
        for p, q, guess in zip(p_logits, q_logits, guesses, strict=True)
    ]
    return torch.stack(chances).clamp_max(0).exp()


def our_sampler(p_logits, q_logits, guesses) -> Call:
    from llmopt_lab.speculative_decoding.kernels import rejection_sample

    return lambda: rejection_sample(p_logits, q_logits, guesses, 1).chances


def torch_sampler(p_logits: Tensor, q_logits: Tensor, guesses: Tensor) -> Tensor:
    """The same in torch: the chances; the tokens are drawn too, and dropped."""
    p, q = p_logits.softmax(-1, torch.float32), q_logits.softmax(-1, torch.float32)
    at = guesses[..., None]
    chances = (p[:, :-1].gather(2, at) / q.gather(2, at)).clamp_max(1)[..., 0]  # (batch, k)
    kept = (torch.rand_like(chances) < chances).long().cumprod(1)
    n_kept = kept.sum(1)
    batch = torch.arange(len(p), device=p.device)
    here, k = p[batch, n_kept], q.shape[1]  # (batch, n_vocab)
    other = q[batch, n_kept.clamp_max(k - 1)]
    residual = torch.where((n_kept < k)[:, None], (here - other).clamp_min(0), here)
    drawn = (residual / torch.empty_like(residual).exponential_()).argmax(1)  # no synchronisation
    tokens = torch.cat((guesses, drawn[:, None]), 1)
    tokens.scatter_(1, n_kept[:, None], drawn[:, None])
    return chances


def eager_sampler(p_logits, q_logits, guesses) -> Call:
    return lambda: torch_sampler(p_logits, q_logits, guesses)


def compiled_sampler(p_logits, q_logits, guesses) -> Call:
    if gpu_facts() is None:
        raise Missing("torch.compile is only timed on a GPU here")
    torch.compiler.reset()
    compiled = torch.compile(torch_sampler, dynamic=False)
    return lambda: compiled(p_logits, q_logits, guesses)


CHAIN = (
    Contender("ours (Triton)", ours, ours=True),
    Contender("FlashAttention-3 paged", flash_attention_3),
    Contender("FlashInfer paged", flashinfer_paged),
    Contender("SDPA flash, contiguous", sdpa_flash),
)
TREE = (
    Contender("ours (Triton)", ours, ours=True),
    Contender("SDPA masked, no groups", sdpa_masked),
)
SAMPLER = (
    Contender("ours (Triton)", our_sampler, ours=True),
    Contender("torch", eager_sampler),
    Contender("torch, compiled", compiled_sampler),
)
