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
            f"{_queries(self.rows)}: absorb {_keys(self.cols)}{masked}; "
            f"query {self.rows.start}: m={self.state.m[0]:.3f} total={self.state.total[0]:.3f}"
        )


@dataclass(frozen=True)
class Skipped(Record):
    """A tile in which no query may look at any key: not read, not computed."""

    rows: slice
    cols: slice

    def __str__(self) -> str:
        return (
            f"{_queries(self.rows)}: skip {_keys(self.cols)}, "
            "in the future of them all"
        )


@dataclass(frozen=True)
class Finished(Record):
    """These rows have seen their last key, and their normalised result was written."""

    rows: slice
    result: Partial

    def __str__(self) -> str:
        return (
            f"{_queries(self.rows)}: done, the normalised result is written; "
            f"query {self.rows.start}: L={self.result.lse[0]:.3f}"
        )


@dataclass(frozen=True)
class Scored(Record):
    """Naive attention, step 1: S, every score at once."""

    scores: Tensor          # (n_q, n_k)

    def __str__(self) -> str:
        return f"step 1, S = scale * Q K^T: write {_size(self.scores)} scores"


@dataclass(frozen=True)
class Normalized(Record):
    """Naive attention, step 2: P, the softmax of every row of S."""

    p: Tensor               # (n_q, n_k)

    def __str__(self) -> str:
        return f"step 2, P = softmax(S): read the scores again, write {_size(self.p)} weights"


@dataclass(frozen=True)
class Weighted(Record):
    """Naive attention, step 3: O = P V."""

    out: Tensor             # (n_q, d_v)

    def __str__(self) -> str:
        return f"step 3, O = P V: read the weights again, write {_size(self.out)} results"


@dataclass(frozen=True)
class SplitDone(Record):
    """Split-KV: one part of the keys has its own normalised result, ready to be merged."""

    split: int
    cols: slice
    result: Partial

    def __str__(self) -> str:
        return f"split {self.split}: done with {_keys(self.cols)}; {self.result}"


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
        return f"recompute P for {_queries(self.rows)} and {_keys(self.cols)}"


def _queries(rows: slice) -> str:
    return _range("query", "queries", rows)


def _keys(cols: slice) -> str:
    return _range("key", "keys", cols)


def _range(one: str, several: str, where: slice) -> str:
    first, last = where.start, where.stop - 1
    return f"{several} {first} to {last}" if first < last else f"{one} {first}"


def _size(x: Tensor) -> str:
    return " x ".join(map(str, x.shape))
