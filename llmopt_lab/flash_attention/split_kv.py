"""Split-KV decoding: one query, its keys shared out to several programs, the results merged.

With one query there is one tile of queries, so the loops of `flash_head` would keep one program
busy. Flash-Decoding gives each program some of the keys; `merge` makes the parts whole.
"""

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import load, store
from llmopt_lab.core.trace import record
from llmopt_lab.flash_attention.records import (
    Absorbed,
    Finished,
    Merged,
    Partial,
    SoftmaxState,
    SplitDone,
)
from llmopt_lab.flash_attention.reference import (
    absorb,
    check_input,
    check_tiles,
    finish,
    groups,
)


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of both parts, from the results over each.

    Each part is weighted by its share of the sum of exponentials. The order does not matter, and a
    part that saw no key (zeros, -inf) changes nothing.
    Source: Dao et al. 2023, Flash-Decoding.
    """
    lse = torch.logaddexp(a.lse, b.lse)                                 # (rows,)
    base = lse.masked_fill(lse == -torch.inf, 0)    # neither saw a key: -inf - -inf would be NaN
    of_a, of_b = torch.exp(a.lse - base), torch.exp(b.lse - base)       # they sum to 1
    merged = Partial(of_a[..., None] * a.out + of_b[..., None] * b.out, lse)
    record(Merged(of_a, merged))
    return merged


def split_kv_attention(
    q: Tensor, k: Tensor, v: Tensor, *, n_splits: int, scale: float | None = None, tile_k: int = 16
) -> Tensor:
    """`flash_attention` of one query a sequence, with the keys in `n_splits` parts.

    Args:
        q: (.., n_heads, 1, d_head), the query of the newest token, or (1, d_head).
        k, v: as for `flash_attention`.
        n_splits: parts of nearly equal length, 1 to n_k.
        scale: of the scores; 1/sqrt(d_head) if None.
        tile_k: keys held on chip at once.

    Returns:
        (.., n_heads, 1, d_v), the dtype of `q`.

    Raises:
        BadInput: as `flash_attention`; more than one query; n_splits is not 1 to n_k.

    Memory traffic of one KV head, in elements: K and V once for all the query heads of its group,
    Q once a split; the parts, n_splits * group * (d_v + 1), are written once and read once.
    Source: Dao et al. 2023, Flash-Decoding.
    """
    scale = check_input(q, k, v, scale)
    check_tiles(1, tile_k)
    require(q.shape[-2] == 1, f"split-KV is for one query a head; got {q.shape[-2]} in q")
    require(
        isinstance(n_splits, int) and 1 <= n_splits <= k.shape[-2],
        f"n_splits must be 1 to {k.shape[-2]}, the number of keys; got {n_splits!r}",
    )
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    for kv_head, group in groups(q, k):
        split_head(
            q[group][:, 0], k[kv_head], v[kv_head], out[group][:, 0],
            n_splits=n_splits, scale=scale, tile_k=tile_k,
        )
    return out


def split_head(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, n_splits: int, scale: float, tile_k: int
) -> None:
    """One KV head: q (group, d), k (n_k, d), v (n_k, d_v); the result goes to out (group, d_v)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    parts = q.new_empty(n_splits, len(q), v.shape[1], dtype=wide)
    lses = q.new_empty(n_splits, len(q), dtype=wide)
    for split in range(n_splits):               # a program each: nothing is shared
        start, stop = split * len(k) // n_splits, (split + 1) * len(k) // n_splits
        q_g = load("Q", q, slice(0, len(q))).to(wide)                   # (group, d)
        state = SoftmaxState.empty(q_g, v.shape[1])
        for first in range(start, stop, tile_k):
            cols = slice(first, min(first + tile_k, stop))
            k_j = load("K", k, cols).to(wide)                           # (tile_k, d)
            v_j = load("V", v, cols).to(wide)                           # (tile_k, d_v)
            scores = scale * q_g @ k_j.T                                # (group, tile_k)
            state = absorb(state, scores, v_j)
            record(Absorbed(slice(0, len(q)), cols, scores, state))
        part = finish(state)
        store("O parts", parts, split, part.out)
        store("L parts", lses, split, part.lse)
        record(SplitDone(split, slice(start, stop), part))

    whole = Partial(load("O parts", parts, 0), load("L parts", lses, 0))
    for split in range(1, n_splits):
        whole = merge(whole, Partial(load("O parts", parts, split), load("L parts", lses, split)))
    store("O", out, slice(0, len(q)), whole.out.to(out.dtype))
    record(Finished(slice(0, len(q)), whole))
