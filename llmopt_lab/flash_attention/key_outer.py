"""The loop order of the first FlashAttention paper: keys outside, queries inside.

Every result is read, corrected and written once a tile of keys. FlashAttention-2 turned the loops
around, so that a result stays on chip until it is done.
"""

import torch
from torch import Tensor

from llmopt_lab.core.memory import load, store, tiles
from llmopt_lab.core.trace import record
from llmopt_lab.flash_attention.records import Absorbed, Skipped, SoftmaxState
from llmopt_lab.flash_attention.reference import (
    absorb,
    check_input,
    check_tiles,
    finish,
    heads,
    in_future,
    mask_future,
    reach,
)


def key_outer_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None,
    tile_q: int = 16, tile_k: int = 16,
) -> Tensor:
    """The same result as `flash_attention`, with the loops the other way round.

    Arguments, result and errors as `flash_attention`.

    Memory traffic of one head, in elements: K and V are read once; Q, O, m and l are read, and O,
    m and l written, once a tile of keys: ceil(n_k / tile_k) * n_q * (d + 2 d_v + 4), and once more
    written at the start.
    Source: FlashAttention, Algorithm 1 (https://arxiv.org/abs/2205.14135).
    """
    scale = check_input(q, k, v, scale)
    check_tiles(tile_q, tile_k)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    for head, kv_head in heads(q, k):
        key_outer_head(
            q[head], k[kv_head], v[kv_head], out[head],
            causal=causal, scale=scale, tile_q=tile_q, tile_k=tile_k,
        )
    return out


def key_outer_head(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, *,
    causal: bool, scale: float, tile_q: int, tile_k: int,
) -> None:
    """One head: q (n_q, d), k (n_k, d), v (n_k, d_v); the result goes to out (n_q, d_v)."""
    last, every = reach(q, k, causal), slice(0, len(q))
    wide = torch.promote_types(q.dtype, torch.float32)
    m, total = (q.new_empty(len(q), dtype=wide) for _ in range(2))      # (n_q,), in slow memory
    store("m", m, every, torch.full_like(m, -torch.inf))
    store("l", total, every, torch.zeros_like(total))
    store("O", out, every, torch.zeros_like(out))
    for cols in tiles(len(k), tile_k):
        k_j = load("K", k, cols).to(wide)                               # (tile_k, d)
        v_j = load("V", v, cols).to(wide)                               # (tile_k, d_v)
        for rows in tiles(len(q), tile_q):
            if in_future(rows, cols, last):
                record(Skipped(rows, cols))
                continue
            q_i = load("Q", q, rows).to(wide)                           # (tile_q, d)
            o_i = load("O", out, rows).to(wide)                         # (tile_q, d_v)
            m_i, total_i = load("m", m, rows), load("l", total, rows)   # (tile_q,)
            scores = mask_future(scale * q_i @ k_j.T, rows, cols, last) # (tile_q, tile_k)
            # O was divided by the old total: multiply it back before adding to it
            state = SoftmaxState(m_i, total_i, total_i[:, None] * o_i)
            state = absorb(state, scores, v_j)
            record(Absorbed(rows, cols, scores, state))
            store("O", out, rows, finish(state).out.to(out.dtype))
            store("m", m, rows, state.m)
            store("l", total, rows, state.total)
