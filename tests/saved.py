"""The oracle of attention's gradients in half precision, shared by the rooms that have a kernel."""

import torch
from torch import Tensor


def gradients_of_saved(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor,
    mask: Tensor, d_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """d_q, d_k and d_v in float64 by the formulas of the paper, from an `out` that was rounded.

    A row with nearly all its weight on one key has gradients that almost cancel: what is left in
    exact arithmetic can be smaller than what rounding `out` to 8 bits brings in, up to a quarter of
    d_q with two keys. And d_k of a key that all queries see sums what it brings into all of them.
    Every attention that saves `out` has that, so it is in the oracle too.
    """
    group = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
    q, out, d_out = q.double(), out.double(), d_out.double()
    scale = q.shape[3] ** -0.5
    scores = (scale * q @ keys.mT).masked_fill(~mask, -torch.inf)
    p = scores.softmax(-1).nan_to_num()  # a query that sees no key
    delta = (out * d_out).sum(-1, keepdim=True)
    if d_lse is not None:
        delta -= d_lse.double()[..., None]
    d_s = scale * p * (d_out @ values.mT - delta)
    per_head = (d_s.mT @ q, p.mT @ d_out)
    return d_s @ keys, *(x.unflatten(1, (k.shape[1], group)).sum(2) for x in per_head)
