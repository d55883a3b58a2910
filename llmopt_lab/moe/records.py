"""What a mixture of experts makes on the way, and what its pictures show: one record an event."""

from dataclasses import dataclass

from torch import Tensor

from llmopt_lab.core.trace import Record

NOBODY = -1     # in place of an expert's number: the visit was dropped


@dataclass(frozen=True)
class Routing(Record):
    """Which experts each token visits, and how much each visit counts."""

    experts: Tensor         # (n_tokens, k) int64, best first; NOBODY where the visit was dropped
    weights: Tensor         # (n_tokens, k), float32 or wider; 0 where the visit was dropped
    scores: Tensor          # (n_tokens, n_experts), of all experts, before any choice

    def __str__(self) -> str:
        n_tokens, k = self.experts.shape
        first = ", ".join(
            f"expert {e} ({w:.2f})" if e != NOBODY else "nobody"
            for e, w in zip(self.experts[0].tolist(), self.weights[0].tolist(), strict=True)
        )
        return f"route {n_tokens} tokens to {k} of {self.scores.shape[1]} experts; token 0: {first}"


@dataclass(frozen=True)
class Overflowed(Record):
    """Experts were full: these visits were dropped, first come, first served."""

    capacity: int           # visits an expert takes
    tokens: Tensor          # (n_dropped,) int64
    choices: Tensor         # (n_dropped,) int64, 0 for a token's best expert
    experts: Tensor         # (n_dropped,) int64, who was full

    def __str__(self) -> str:
        if not len(self.tokens):
            return f"capacity {self.capacity}: nobody is dropped"
        dropped = ", ".join(
            f"token {t} by expert {e}"
            for t, e in zip(self.tokens.tolist(), self.experts.tolist(), strict=True)
        )
        return f"capacity {self.capacity}: dropped {dropped}"


@dataclass(frozen=True)
class Grouping(Record):
    """The visits, sorted so that those of one expert are next to each other.

    Visit number token * k + choice is one token at one of its k experts. Expert e has the places
    [starts[e], starts[e + 1]) of the sorted visits, and dropped visits have [0, starts[0]).
    """

    order: Tensor           # (n_visits,) int64, the visit at each sorted place
    place: Tensor           # (n_visits,) int64, where each visit went: the inverse of `order`
    starts: Tensor          # (n_experts + 1,) int64

    def __str__(self) -> str:
        return f"group {len(self.order)} visits by expert: {self.starts.diff().tolist()}"


@dataclass(frozen=True)
class ExpertRan(Record):
    """`expert` transformed all its visitors at once; nothing else reads its weights."""

    expert: int
    tokens: Tensor          # (n,) int64

    def __str__(self) -> str:
        return f"expert {self.expert} runs on tokens {self.tokens.tolist()}"


@dataclass(frozen=True)
class Combined(Record):
    """Every token has the weighted sum of what its experts made."""

    out: Tensor             # (n_tokens, d)

    def __str__(self) -> str:
        return f"each of {len(self.out)} tokens sums what its experts made"


@dataclass(frozen=True)
class ExpertsChose(Record):
    """Expert choice: each expert took the tokens that score it highest, equally many each."""

    tokens: Tensor          # (n_experts, capacity) int64, best first
    weights: Tensor         # (n_experts, capacity)
    n_tokens: int

    @property
    def n_visits(self) -> Tensor:
        """How many experts took each token, (n_tokens,); 0 is possible."""
        return self.tokens.flatten().bincount(minlength=self.n_tokens)

    def __str__(self) -> str:
        n_experts, capacity = self.tokens.shape
        visits = self.n_visits
        most = int(visits.max())
        return (
            f"{n_experts} experts take {capacity} of {self.n_tokens} tokens each; "
            f"{int((visits == 0).sum())} tokens go nowhere, "
            f"{int((visits == most).sum())} to {most} experts, and none to more"
        )


@dataclass(frozen=True)
class TrainingReport(Record):
    """How a small mixture does after `step` steps of training; means since the report before."""

    way: str                # of balancing
    step: int
    bits: float             # of the training text, a byte
    load: Tensor            # (n_layers, n_experts) float64, shares of a layer's visits

    @property
    def busiest(self) -> float:
        """Load of the busiest expert of all layers, in times the mean: 1 is even."""
        return float(self.load.max()) * self.load.shape[1]

    def __str__(self) -> str:
        return (
            f"{self.way}, step {self.step}: {self.bits:.2f} bits a byte; the busiest expert has "
            f"{self.busiest:.1f} times the mean load"
        )
