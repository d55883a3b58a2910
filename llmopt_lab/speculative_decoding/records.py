"""What happens in a round of speculative decoding: one record an event."""

from dataclasses import dataclass

from torch import Tensor

from llmopt_lab.core.trace import Record

ROOT = -1       # in place of a node's number: the last token of the text


@dataclass(frozen=True)
class Read(Record):
    """A model read the tokens [first, first + n) in one forward pass, and cached their KV."""

    who: str
    first: int
    n: int

    def __str__(self) -> str:
        tokens = f"token {self.first}" if self.n == 1 else f"tokens {self.first} to {self.last}"
        return f"{self.who} reads {tokens} in one pass"

    @property
    def last(self) -> int:
        return self.first + self.n - 1


@dataclass(frozen=True)
class Guessed(Record):
    """The draft guessed these tokens to come after the first `first` ones of the text."""

    first: int
    tokens: Tensor          # (n,) int64
    q: Tensor               # (n, n_vocab), what each was drawn from

    def __str__(self) -> str:
        if not len(self.tokens):
            return "the draft has no guess"
        return f"the draft guesses {self.tokens.tolist()} from place {self.first} on"


@dataclass(frozen=True)
class Judged(Record):
    """A guess was kept or refused; kept with chance min(1, p[token] / q[token])."""

    place: int              # of the token in the text
    token: int
    p: Tensor               # (n_vocab,), of the target here
    q: Tensor               # (n_vocab,), what the guess was drawn from
    accepted: bool

    def __str__(self) -> str:
        p, q = float(self.p[self.token]), float(self.q[self.token])
        verdict = "kept" if self.accepted else "refused"
        chance = f"chance to keep it min(1, p/q) = {min(1.0, p / q):.2f}"
        what = f"token {self.token} at place {self.place}"
        return f"{what}: p {p:.2f}, q {q:.2f}, {chance}; {verdict}"


@dataclass(frozen=True)
class Added(Record):
    """The target's own token at the end of a round."""

    place: int
    token: int
    source: Tensor          # (n_vocab,), it was drawn from this
    bonus: bool             # every guess was kept, and this one comes on top

    def __str__(self) -> str:
        source = "the target's p, a bonus" if self.bonus else "the residual max(p - q, 0)"
        return f"token {self.token} at place {self.place}, drawn from {source}"


@dataclass(frozen=True)
class Rewound(Record):
    """A model forgot the KV of the tokens from `length` on."""

    who: str
    length: int
    n_dropped: int

    def __str__(self) -> str:
        return f"{self.who} forgets {self.n_dropped} tokens and goes back to {self.length}"


@dataclass(frozen=True)
class Tree(Record):
    """Guesses that branch. Parents come before children; siblings are judged in their order."""

    tokens: Tensor          # (n_nodes,) int64
    parents: Tensor         # (n_nodes,) int64, ROOT for what follows the text
    q: Tensor               # (n_nodes, n_vocab), what each was drawn from after its siblings

    @property
    def depths(self) -> list[int]:
        """Of each node; 0 follows the text."""
        depths: list[int] = []
        for parent in self.parents.tolist():
            depths.append(0 if parent == ROOT else depths[parent] + 1)
        return depths

    def __str__(self) -> str:
        widths = [self.depths.count(depth) for depth in range(max(self.depths, default=-1) + 1)]
        return f"the draft guesses a tree of {len(self.tokens)} tokens, {widths} by depth"
