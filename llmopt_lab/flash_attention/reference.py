"""Flash attention in plain PyTorch: naive attention, the tiled forward, the recomputing backward.

The algorithms are written for one head. `naive_attention` and `flash_attention` take one head or
any number of them; query head h reads KV head h // group.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import load, store, tiles
from llmopt_lab.core.trace import record
from llmopt_lab.flash_attention.records import (
    Absorbed,
    Finished,
    Normalized,
    Partial,
    Recomputed,
    Scored,
    Skipped,
    SoftmaxState,
    Weighted,
)


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """softmax(scale Q K^T) V in three steps, each of which writes its whole result to memory.

    Arguments, result and errors as `flash_attention`.

    Memory traffic of one head, in elements: reads n_q d + n_k d + 2 n_q n_k + n_k d_v, writes
    2 n_q n_k + n_q d_v. Extra memory: S and P, n_q n_k elements each.
    Source: FlashAttention, Algorithm 0 (https://arxiv.org/abs/2205.14135).
    """
    scale = check_input(q, k, v, scale)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    for head, kv_head in heads(q, k):
        naive_head(q[head], k[kv_head], v[kv_head], out[head], causal=causal, scale=scale)
    return out


def naive_head(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, causal: bool, scale: float
) -> None:
    """One head: q (n_q, d), k (n_k, d), v (n_k, d_v); the result goes to out (n_q, d_v)."""
    rows, cols = slice(0, len(q)), slice(0, len(k))
    scores, weights = (q.new_empty(len(q), len(k)) for _ in range(2))   # S and P in slow memory

    s = scale * load("Q", q, rows) @ load("K", k, cols).T               # (n_q, n_k)
    s = mask_future(s, rows, cols, reach(q, k, causal))
    store("S", scores, (rows, cols), s)
    record(Scored(s))

    s = load("S", scores, (rows, cols))
    p = torch.softmax(s, dim=1).masked_fill(s == -torch.inf, 0)         # no key at all: 0, not NaN
    store("P", weights, (rows, cols), p)
    record(Normalized(p))

    o = load("P", weights, (rows, cols)) @ load("V", v, cols)           # (n_q, d_v)
    store("O", out, rows, o)
    record(Weighted(o))


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None,
    tile_q: int = 16, tile_k: int = 16, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same result as `naive_attention`, read and written tile by tile. Differentiable.

    Args:
        q: queries, (n_q, d_head), or (.., n_heads, n_q, d_head).
        k: keys, (n_k, d_head), or (.., n_kv_heads, n_k, d_head).
        v: values, like `k`; their width d_v may differ from d_head.
        causal: query i sees keys 0 to i + n_k - n_q: the last query sees every key (aligned at the
            bottom right). A query that sees none gives zeros.
        scale: of the scores; 1/sqrt(d_head) if None.
        tile_q, tile_k: queries and keys held on chip at once.
        return_lse: also return L, the log of the sum of exp(score) of each query.

    Returns:
        (.., n_q, d_v), the dtype of `q`; with `return_lse` also (.., n_q), float32 or wider, -inf
        for a query that sees no key. Both have gradients.

    Raises:
        BadInput: shapes, dtypes or devices do not fit, something is empty, a tile or the scale is
            not a positive, finite number.

    Memory traffic of one query head, in elements: Q is read and O and L are written once, K and V
    once a tile of queries: ceil(n_q / tile_q) * n_k * (d + d_v). With `causal` a tile of queries
    ends at its last visible tile of keys. `io_model.flash_traffic` counts it exactly.
    Saved for backward: q, k, v, the result and L.
    Source: FlashAttention-2, Algorithms 1 and 2 (https://arxiv.org/abs/2307.08691).
    """
    scale = check_input(q, k, v, scale)
    check_tiles(tile_q, tile_k)
    out, lse = FlashAttention.apply(q, k, v, causal, scale, tile_q, tile_k)
    return (out, lse) if return_lse else out


def flash_head(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
    causal: bool, scale: float, tile_q: int, tile_k: int,
) -> None:
    """One head: q (n_q, d), k (n_k, d), v (n_k, d_v); results to out (n_q, d_v), lse (n_q,)."""
    last = reach(q, k, causal)
    for rows in tiles(len(q), tile_q):
        q_i = load("Q", q, rows).to(lse.dtype)                          # (tile_q, d)
        state = SoftmaxState.empty(q_i, v.shape[1])
        for cols in tiles(len(k), tile_k):
            if in_future(rows, cols, last):
                record(Skipped(rows, cols))
                continue
            k_j = load("K", k, cols).to(lse.dtype)                      # (tile_k, d)
            v_j = load("V", v, cols).to(lse.dtype)                      # (tile_k, d_v)
            scores = scale * q_i @ k_j.T                                # (tile_q, tile_k)
            scores = mask_future(scores, rows, cols, last)
            state = absorb(state, scores, v_j)
            record(Absorbed(rows, cols, scores, state))
        result = finish(state)
        store("O", out, rows, result.out.to(out.dtype))
        store("L", lse, rows, result.lse)
        record(Finished(rows, result))


def absorb(state: SoftmaxState, scores: Tensor, values: Tensor) -> SoftmaxState:
    """Fold scores (rows, cols) and their values (cols, d_v) into the running softmax."""
    m = torch.maximum(state.m, scores.amax(dim=1))                      # (rows,)
    base = m.masked_fill(m == -torch.inf, 0)    # no key yet: -inf - -inf would be NaN
    shrink = torch.exp(state.m - base)                                  # rescales the old sums
    p = torch.exp(scores - base[:, None])                               # (rows, cols)
    total = shrink * state.total + p.sum(dim=1)
    acc = shrink[:, None] * state.acc + p @ values
    return SoftmaxState(m, total, acc)


def finish(state: SoftmaxState) -> Partial:
    """Divide once, at the end: O = acc / total and L = m + log(total)."""
    total = state.total.masked_fill(state.total == 0, 1)    # no key at all: 0 / 1, not 0 / 0
    return Partial(state.acc / total[:, None], state.m + torch.log(total))


class FlashAttention(torch.autograd.Function):
    """`flash_attention` with its backward: keeps q, k, v, out and L, and makes P again from them.

    The backward scores every visible tile twice, once for dK and dV and once for dQ, so that each
    tile of a gradient has one writer and no run differs from another: seven products a tile.
    FlashAttention-2, Algorithm 2, walks once and adds to dQ in slow memory: five products.
    """

    @staticmethod
    def forward(ctx, q, k, v, causal, scale, tile_q, tile_k):
        wide = torch.promote_types(q.dtype, torch.float32)  # halves are multiplied and added so
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = q.new_empty(q.shape[:-1], dtype=wide)
        ctx.settings = {"causal": causal, "scale": scale, "tile_q": tile_q, "tile_k": tile_k}
        for head, kv_head in heads(q, k):
            flash_head(q[head], k[kv_head], v[kv_head], out[head], lse[head], **ctx.settings)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_lse):
        q, k, v, out, lse = ctx.saved_tensors
        delta = torch.empty_like(lse)
        d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
        for head, _ in heads(q, k):
            backward_delta(
                out[head], d_out[head], d_lse[head], delta[head], tile_q=ctx.settings["tile_q"]
            )
        for kv_head, group in groups(q, k):
            backward_keys(
                q[group], k[kv_head], v[kv_head], lse[group], d_out[group], delta[group],
                d_k[kv_head], d_v[kv_head], **ctx.settings,
            )
        for head, kv_head in heads(q, k):
            backward_queries(
                q[head], k[kv_head], v[kv_head], lse[head], d_out[head], delta[head], d_q[head],
                **ctx.settings,
            )
        return d_q, d_k, d_v, None, None, None, None


def backward_delta(
    out: Tensor, d_out: Tensor, d_lse: Tensor, delta: Tensor, *, tile_q: int
) -> None:
    """D = rowsum(dO * O), (n_q,). A gradient of L enters here and nowhere else, as dL/dS = P."""
    for rows in tiles(len(out), tile_q):
        o_i, do_i = (load(n, x, rows).to(delta.dtype) for n, x in (("O", out), ("dO", d_out)))
        store("D", delta, rows, (do_i * o_i).sum(dim=1) - load("dL", d_lse, rows))


def backward_keys(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d_out: Tensor, delta: Tensor,
    d_k: Tensor, d_v: Tensor, *, causal: bool, scale: float, tile_q: int, tile_k: int,
) -> None:
    """dK (n_k, d) and dV (n_k, d_v) of one KV head, from the query heads that read it.

    q (group, n_q, d), lse and delta (group, n_q), d_out (group, n_q, d_v).
    """
    last = reach(q[0], k, causal)
    for cols in tiles(len(k), tile_k):
        k_j = load("K", k, cols).to(lse.dtype)                          # (tile_k, d)
        v_j = load("V", v, cols).to(lse.dtype)                          # (tile_k, d_v)
        dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
        for head, rows in itertools.product(range(len(q)), tiles(q.shape[1], tile_q)):
            if in_future(rows, cols, last):
                continue
            q_i = load("Q", q, (head, rows)).to(lse.dtype)              # (tile_q, d)
            do_i = load("dO", d_out, (head, rows)).to(lse.dtype)        # (tile_q, d_v)
            lse_i, delta_i = load("L", lse, (head, rows)), load("D", delta, (head, rows))
            p = recompute(rows, cols, scale * q_i @ k_j.T, lse_i, last) # (tile_q, tile_k)
            d_scores = p * (do_i @ v_j.T - delta_i[:, None])            # (tile_q, tile_k)
            dv_j += p.T @ do_i
            dk_j += scale * d_scores.T @ q_i
        store("dK", d_k, cols, dk_j.to(k.dtype))
        store("dV", d_v, cols, dv_j.to(v.dtype))


def backward_queries(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d_out: Tensor, delta: Tensor,
    d_q: Tensor, *, causal: bool, scale: float, tile_q: int, tile_k: int,
) -> None:
    """dQ (n_q, d) of one query head: the loops of the forward, with P made again."""
    last = reach(q, k, causal)
    for rows in tiles(len(q), tile_q):
        q_i = load("Q", q, rows).to(lse.dtype)                          # (tile_q, d)
        do_i = load("dO", d_out, rows).to(lse.dtype)                    # (tile_q, d_v)
        lse_i, delta_i = load("L", lse, rows), load("D", delta, rows)   # (tile_q,)
        dq_i = torch.zeros_like(q_i)
        for cols in tiles(len(k), tile_k):
            if in_future(rows, cols, last):
                continue
            k_j = load("K", k, cols).to(lse.dtype)                      # (tile_k, d)
            v_j = load("V", v, cols).to(lse.dtype)                      # (tile_k, d_v)
            p = recompute(rows, cols, scale * q_i @ k_j.T, lse_i, last) # (tile_q, tile_k)
            d_scores = p * (do_i @ v_j.T - delta_i[:, None])            # (tile_q, tile_k)
            dq_i += scale * d_scores @ k_j
        store("dQ", d_q, rows, dq_i.to(q.dtype))


def recompute(rows: slice, cols: slice, scores: Tensor, lse: Tensor, last: int) -> Tensor:
    """P of one tile, normalised: exp(S - L). No maximum and no total are needed any more."""
    seen = lse.masked_fill(lse == -torch.inf, 0)    # no key at all: exp(-inf - 0) = 0, not NaN
    p = torch.exp(mask_future(scores, rows, cols, last) - seen[:, None])
    record(Recomputed(rows, cols, p))
    return p


def reach(q: Tensor, k: Tensor, causal: bool) -> int:
    """The last key that query 0 sees; query i sees i keys more. Without `causal`, past the end."""
    return k.shape[-2] - q.shape[-2] if causal else k.shape[-2]


def in_future(rows: slice, cols: slice, last: int) -> bool:
    """Whether no query of the tile sees any of its keys."""
    return cols.start > last + rows.stop - 1


def mask_future(scores: Tensor, rows: slice, cols: slice, last: int) -> Tensor:
    """-inf where a query may not look. Only tiles that the diagonal crosses have such places."""
    query = torch.arange(rows.start, rows.stop, device=scores.device)
    key = torch.arange(cols.start, cols.stop, device=scores.device)
    return scores.masked_fill(key > last + query[:, None], -torch.inf)


def heads(q: Tensor, k: Tensor) -> Iterator[tuple[tuple, tuple]]:
    """Index of every query head, and of the KV head that it reads; one head alone has index ()."""
    group = q.shape[-3] // k.shape[-3] if q.ndim > 2 else 1
    for head in itertools.product(*map(range, q.shape[:-2])):
        yield head, (*head[:-1], head[-1] // group) if head else ()


def groups(q: Tensor, k: Tensor) -> Iterator[tuple[tuple, tuple | None]]:
    """Index of every KV head, and of the query heads that read it: q[group] is (group, n_q, d)."""
    if q.ndim == 2:
        yield (), None
        return
    group = q.shape[-3] // k.shape[-3]
    for head in itertools.product(*map(range, k.shape[:-2])):
        yield head, (*head[:-1], slice(head[-1] * group, (head[-1] + 1) * group))


def check_input(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> float:
    """Refuse bad input before any work; back comes the scale to use."""
    shapes = f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
    require(
        q.ndim == k.ndim == v.ndim >= 2,
        "q, k, v must all be (n, d), or all (.., heads, n, d) with as many dimensions; " + shapes,
    )
    require(
        min(q.numel(), k.numel(), v.numel()) > 0, f"q, k, v must not be empty; {shapes}"
    )
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


def check_tiles(tile_q: int, tile_k: int) -> None:
    for name, size in (("tile_q", tile_q), ("tile_k", tile_k)):
        require(isinstance(size, int) and size > 0, f"{name} must be a positive int; got {size!r}")
