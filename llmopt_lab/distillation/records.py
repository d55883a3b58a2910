"""What distillation makes and shows: one record an event."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from llmopt_lab.core.trace import Record


@dataclass(frozen=True)
class Softened(Record):
    """A teacher's logits became soft targets."""

    temperature: float
    p: Tensor               # (.., n_vocab)

    def __str__(self) -> str:
        top = self.p.flatten(0, -2)[0].max()
        return f"soft targets at T = {self.temperature:g}: the first row's largest is {top:.3f}"


@dataclass(frozen=True)
class Compared(Record):
    """A student was held to its teacher on some rows."""

    temperature: float
    per_row: Tensor         # (..) nats between the softened distributions
    mask: Tensor            # (..) bool, the rows that count
    soft: Tensor            # () T^2 times the mean of those that count
    hard: Tensor | None     # () mean cross-entropy of the labels, in nats; None without labels
    total: Tensor           # () what is minimised

    def __str__(self) -> str:
        n, of = int(self.mask.sum()), self.mask.numel()
        hard = "no labels" if self.hard is None else f"hard {self.hard:.4f}"
        return (
            f"{n} of {of} rows count: soft {self.soft:.4f} (T = {self.temperature:g}), {hard}, "
            f"total {self.total:.4f}"
        )


@dataclass(frozen=True)
class Stepped(Record):
    """One step of training, and what the student now says where we look."""

    step: int
    loss: float
    p: Tensor               # (n_vocab,) teacher
    q: Tensor               # (n_vocab,) student

    def __str__(self) -> str:
        return f"step {self.step}: loss {self.loss:.4f}"


@dataclass(frozen=True)
class Written(Record):
    """A model wrote a text to learn from: the student (on policy) or the teacher (sequence level).

    The first `n_prompt` tokens were given.
    """

    who: str
    tokens: Tensor          # (rows, n) int64
    n_prompt: int

    def __str__(self) -> str:
        rows, n = self.tokens.shape
        return f"the {self.who} goes on from {self.n_prompt} tokens in {rows} rows, to {n} tokens"


@dataclass(frozen=True)
class Fitted(Record):
    """One step of fitting a single hump to two."""

    step: int
    mean: float
    width: float            # standard deviation
    loss: float             # the divergence that is minimised, in nats
    x: Tensor               # (n,) the places
    p: Tensor               # (n,) teacher
    q: Tensor               # (n,) student

    def __str__(self) -> str:
        return (
            f"step {self.step}: mean {self.mean:.2f}, width {self.width:.2f}, "
            f"divergence {self.loss:.3f} nats"
        )


@dataclass(frozen=True)
class RowsDone(Record):
    """The fused loss is through with a chunk of rows: its logits became their gradient in place."""

    rows: slice
    loss: Tensor            # (rows,) nats, 0 where masked
    lse_student: Tensor     # (rows,) of logits / T
    lse_teacher: Tensor     # (rows,)

    def __str__(self) -> str:
        return (
            f"rows {self.rows.start} to {self.rows.stop - 1}: mean {self.loss.mean():.4f} nats; "
            "the buffer of logits is free again"
        )


class TopK(NamedTuple):
    """A teacher's distributions, the k likeliest tokens of each row, as they are stored."""

    log_p: Tensor           # (.., k) float16, falling: exact log-probabilities, rounded
    tokens: Tensor          # (.., k) int16 below 32,768 tokens, else int32
    n_vocab: int
