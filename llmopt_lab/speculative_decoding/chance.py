"""Where speculative decoding leaves something to chance: drawn once, or followed down every branch.

    outcomes(lambda dice: tuple(decode(.., rng=dice)))      # {(2, 0): 0.25, (2, 1): ..}

An algorithm that takes its chances from a `Dice` can be run with a generator, and it can be proved:
`outcomes` runs the same code once for every way the dice can fall.
"""

from collections.abc import Callable, Hashable
from math import fsum

import torch
from torch import Tensor

from llmopt_lab.core.errors import BadInput, require


class Dice:
    """Chances drawn from a generator. What is certain needs none: greedy decoding has no `rng`."""

    def __init__(self, rng: torch.Generator | None = None):
        self.rng = rng

    def pick(self, p: Tensor) -> int:
        """A token with the probabilities `p`, (n_vocab,)."""
        top = int(p.argmax())
        if p[top] == 1:
            return top
        self._check()
        return int(torch.multinomial(p.to(self.rng.device), 1, generator=self.rng))

    def happens(self, chance: float) -> bool:
        """True with probability `chance`; 1 or more is certain."""
        if chance >= 1 or chance <= 0:
            return chance >= 1
        self._check()
        drawn = torch.rand((), generator=self.rng, device=self.rng.device, dtype=torch.float64)
        return float(drawn) < chance

    def _check(self) -> None:
        require(
            self.rng is not None,
            "sampling at a temperature above 0 needs rng=torch.Generator().manual_seed(...)",
        )


class ScriptedDice(Dice):
    """Falls as `path` says, and on after its end the first way that is possible."""

    def __init__(self, path: list[tuple[int, int]]):
        super().__init__()
        self.path = path  # (branch taken, branches there were), grows
        self.probabilities: list[float] = []  # of the branches taken
        self._place = 0

    def pick(self, p: Tensor) -> int:
        values = p.nonzero().flatten().tolist()
        return values[self._branch([float(p[value]) for value in values])]

    def happens(self, chance: float) -> bool:
        if chance >= 1 or chance <= 0:
            return chance >= 1
        return self._branch([chance, 1 - chance]) == 0

    def _branch(self, probabilities: list[float]) -> int:
        if self._place == len(self.path):
            self.path.append((0, len(probabilities)))
        branch, n_branches = self.path[self._place]
        require(
            n_branches == len(probabilities),
            "the program met other branches in a second run: it must depend on its dice alone, so "
            "start it from fresh models and caches",
        )
        self._place += 1
        self.probabilities.append(probabilities[branch])
        return branch


def outcomes(
    program: Callable[[Dice], Hashable], *, max_runs: int = 200_000
) -> dict[Hashable, float]:
    """The probability of everything that `program` can return, exact up to rounding.

    Args:
        program: called with dice, once for each way they can fall; it depends on nothing else.
        max_runs: refuse to go on after so many.

    Raises:
        BadInput: more than `max_runs` ways, or a program that changes from run to run.

    Cost: one call of `program` a way: V^tokens or more, so a vocabulary of 3 and a few tokens.
    """
    found: dict[Hashable, list[float]] = {}
    path: list[tuple[int, int]] = []
    for _ in range(max_runs):
        dice = ScriptedDice(path)
        what = program(dice)
        weight = 1.0
        for probability in dice.probabilities:
            weight *= probability
        found.setdefault(what, []).append(weight)
        while path and path[-1][0] == path[-1][1] - 1:  # every branch of the last fork was taken
            path.pop()
        if not path:
            return {what: fsum(weights) for what, weights in found.items()}
        branch, n_branches = path.pop()
        path.append((branch + 1, n_branches))
    raise BadInput(
        f"more than {max_runs:,} ways for the dice to fall: use a smaller vocabulary, fewer "
        "tokens, or a larger max_runs"
    )
