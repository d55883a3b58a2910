"""Sequences of different lengths, packed end to end without padding."""

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.flash_attention.reference import FlashAttention, check_input, check_tiles


def flash_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *,
    causal: bool = False, scale: float | None = None, tile_q: int = 16, tile_k: int = 16,
) -> Tensor:
    """`flash_attention` of every sequence with its own keys. Differentiable.

    Args:
        q: (.., n_heads, total_q, d_head), the queries of all sequences, one after the other.
        k, v: (.., n_kv_heads, total_k, d), packed in the same way.
        cu_seqlens_q, cu_seqlens_k: (n_sequences + 1,) int32, where sequences start: sequence s has
            the queries [cu_seqlens_q[s], cu_seqlens_q[s + 1]). The last entry is the total.
        causal: the last query of a sequence sees all of its keys.
        scale, tile_q, tile_k: as for `flash_attention`.

    Returns:
        (.., n_heads, total_q, d_v), the dtype of `q`. A sequence without keys gives zeros.

    Raises:
        BadInput: as `flash_attention`; the two tensors of starts do not fit q, k or each other.

    Cost: the sum over the sequences; a padded batch pays for the longest one every time.
    Source: flash_attn_varlen_func of the FlashAttention package, which puts heads after tokens.
    """
    scale = check_input(q, k, v, scale)
    check_tiles(tile_q, tile_k)
    starts_q = _starts("cu_seqlens_q", cu_seqlens_q, q.shape[-2])
    starts_k = _starts("cu_seqlens_k", cu_seqlens_k, k.shape[-2])
    require(
        len(starts_q) == len(starts_k),
        "cu_seqlens_q and cu_seqlens_k must name as many sequences; "
        f"got {len(starts_q) - 1} and {len(starts_k) - 1}",
    )
    outs = []
    for s in range(len(starts_q) - 1):
        q_s = q[..., starts_q[s] : starts_q[s + 1], :]
        k_s, v_s = (x[..., starts_k[s] : starts_k[s + 1], :] for x in (k, v))
        out, _ = FlashAttention.apply(q_s, k_s, v_s, causal, scale, tile_q, tile_k)
        outs.append(out)
    return torch.cat(outs, dim=-2)


def _starts(name: str, cu_seqlens: Tensor, total: int) -> list[int]:
    require(
        cu_seqlens.ndim == 1 and len(cu_seqlens) > 1 and cu_seqlens.dtype == torch.int32,
        f"{name} must be (n_sequences + 1,) int32; got {tuple(cu_seqlens.shape)} "
        f"{cu_seqlens.dtype}",
    )
    starts = cu_seqlens.tolist()
    require(
        starts[0] == 0 and starts[-1] == total and starts == sorted(starts),
        f"{name} must rise from 0 to {total}, the packed length; got {starts}",
    )
    return starts
