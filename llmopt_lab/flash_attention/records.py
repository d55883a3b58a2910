"""What flash attention makes on the way, and what its pictures show: one record an event."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt_lab.core.trace import Record


@dataclass(frozen=True)
class SoftmaxState(Record):
    """A softmax-weighted sum over the keys seen so far, one row a query, not yet normalised."""

    m: Tensor               # (rows,)       largest score so far, -inf before the first
    total: Tensor           # (rows,)       sum of exp(score - m)
    acc: Tensor             # (rows, d_v)   sum of exp(score - m) * value

    @classmethod
    def empty(cls, q_i: Tensor, d_v: int) -> "SoftmaxState":
        """Of the queries `q_i`, (rows, d_head), before their first key: its dtype and device."""
        m = q_i.new_full((len(q_i),), -torch.inf)
        return cls(m, torch.zeros_like(m), q_i.new_zeros(len(q_i), d_v))

    def __str__(self) -> str:
        return f"row 0: m={self.m[0]:.3f} total={self.total[0]:.3f}"


@dataclass(frozen=True)
class Partial(Record):
    """Attention over some of the keys, normalised over them. `merge` joins two of these."""

    out: Tensor             # (rows, d_v)   zeros where no key was seen
    lse: Tensor             # (rows,)       log of the sum of exp(score), -inf where no key was seen

    def __str__(self) -> str:
        return f"row 0: L={self.lse.flatten()[0]:.3f}"


@dataclass(frozen=True)
class Absorbed(Record):
    """One tile of scores was folded into the running softmax of its rows."""

    rows: slice             # queries
    cols: slice             # keys
    scores: Tensor          # (rows, cols), scaled; -inf where a query may not look
    state: SoftmaxState     # after it

    def __str__(self) -> str:
        n_hidden = int((self.scores == -torch.inf).sum())
        masked = f" ({n_hidden} of {self.scores.numel()} scores masked)" if n_hidden else ""
        return (
            f"queries {_text(self.rows)} absorb keys {_text(self.cols)}{masked}; "
            f"query {self.rows.start}: m={self.state.m[0]:.3f} total={self.state.total[0]:.3f}"
        )


@dataclass(frozen=True)
class Skipped(Record):
    """A tile in which no query may look at any key: not read, not computed."""

    rows: slice
    cols: slice

    def __str__(self) -> str:
        return (
            f"queries {_text(self.rows)} skip keys {_text(self.cols)}: "
            "all of them lie in the future"
        )


@dataclass(frozen=True)
class Finished(Record):
    """The last key of these rows was absorbed and the sum divided by its total."""

    rows: slice
    result: Partial

    def __str__(self) -> str:
        return (
            f"queries {_text(self.rows)} are done: divide by the totals; "
            f"query {self.rows.start}: L={self.result.lse[0]:.3f}"
        )


@dataclass(frozen=True)
class Scored(Record):
    """Naive attention, step 1: S, every score at once."""

    scores: Tensor          # (n_q, n_k)

    def __str__(self) -> str:
        return f"S = scale * Q K^T: {_size(self.scores)} scores at once"


@dataclass(frozen=True)
class Normalized(Record):
    """Naive attention, step 2: P, the softmax of every row of S."""

    p: Tensor               # (n_q, n_k)

    def __str__(self) -> str:
        return f"P = softmax(S): {_size(self.p)} weights, each row sums to 1"


@dataclass(frozen=True)
class Weighted(Record):
    """Naive attention, step 3: O = P V."""

    out: Tensor             # (n_q, d_v)

    def __str__(self) -> str:
        return f"O = P V: {_size(self.out)} results"


@dataclass(frozen=True)
class SplitDone(Record):
    """Split-KV: one part of the keys has its own normalised result, ready to be merged."""

    split: int
    cols: slice
    result: Partial

    def __str__(self) -> str:
        return f"split {self.split} has seen keys {_text(self.cols)}; {self.result}"


@dataclass(frozen=True)
class Merged(Record):
    """Two partial results became one: `share` is how much of it comes from the first."""

    share: Tensor           # (rows,)
    result: Partial

    def __str__(self) -> str:
        return f"merge: {self.share.flatten()[0]:.3f} of row 0 was known before; {self.result}"


@dataclass(frozen=True)
class Recomputed(Record):
    """Backward: one tile of P was made again from Q, K and L, because nobody had kept it."""

    rows: slice
    cols: slice
    p: Tensor               # (rows, cols)

    def __str__(self) -> str:
        return f"recompute P for queries {_text(self.rows)} and keys {_text(self.cols)}"


def _text(where: slice) -> str:
    first, last = where.start, where.stop - 1
    return f"{first} to {last}" if first < last else f"{first}"


def _size(x: Tensor) -> str:
    return " x ".join(map(str, x.shape))
