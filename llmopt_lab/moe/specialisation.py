"""Do experts specialise? Mutual information of expert and token class, and what chance gives."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.trace import Record


@dataclass(frozen=True)
class Specialisation(Record):
    """How much the expert tells about the class of its token, in bits."""

    bits: float  # estimated from counts: too high, the more so the fewer the tokens
    by_chance: Tensor  # (n_shifts,) the same estimate with the classes moved along the text
    entropy: float  # of the class: what knowing it fully would be

    @property
    def excess(self) -> float:
        """Bits beyond what chance gives: about 0 without specialisation, at most `entropy`."""
        return self.bits - float(self.by_chance.mean())

    @property
    def p_value(self) -> float:
        """How often chance does as well: 1 / (n_shifts + 1) at the least."""
        return (1 + int((self.by_chance >= self.bits).sum())) / (1 + len(self.by_chance))

    def __str__(self) -> str:
        return (
            f"the expert tells {self.excess:.3f} of {self.entropy:.3f} bits of the class, beyond "
            f"{float(self.by_chance.mean()):.3f} by chance (p = {self.p_value:.3f})"
        )


def mutual_information(counts: Tensor) -> float:
    """I(row; column) in bits of a table of counts, taken as the exact probabilities.

    From a sample of n this is too high by about (rows - 1) (columns - 1) / (2 n ln 2) bits (Miller
    1955), as long as every cell is filled; the samples must be independent.
    """
    require(
        counts.ndim == 2 and bool((counts >= 0).all()) and float(counts.sum()) > 0,
        f"counts must be (rows, columns), not negative, not all 0; got {tuple(counts.shape)}",
    )
    p = counts.double() / counts.sum()
    independent = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    return float((p * (p / independent).log2()).nan_to_num(0.0).sum().clamp_min(0))


def specialisation(
    experts: Tensor, classes: Tensor, *, rng: torch.Generator, n_shifts: int = 200
) -> Specialisation:
    """Mutual information of the expert visited and the token's class, compared with chance.

    Counting gives more than 0 bits even where there is nothing. Chance's share is measured: move
    the classes along the text by a random distance, around its end, and estimate again. Shuffling
    single tokens would be too kind, because neighbours are alike in class and expert.

    Args:
        experts: (n_tokens, k) int64, in the order of the text; a visit counts 1 / k of its token.
        classes: (n_tokens,) int64, from 0 on.
        rng: for the distances.
        n_shifts: how often chance is measured.
    """
    require(
        experts.ndim == 2 and len(experts) == len(classes) and len(classes) >= 2,
        "experts must be (n_tokens, k) and classes (n_tokens,), of 2 tokens or more; got "
        f"{tuple(experts.shape)} and {tuple(classes.shape)}",
    )
    require(
        int(experts.min()) >= 0 and int(classes.min()) >= 0,
        "experts and classes are numbered from 0: leave out the tokens that visit nobody",
    )
    require(n_shifts > 0, f"n_shifts must be positive; got {n_shifts}")
    n_experts, n_classes = int(experts.max()) + 1, int(classes.max()) + 1

    def estimate(classes: Tensor) -> float:
        cell = experts * n_classes + classes[:, None]
        counts = cell.flatten().bincount(minlength=n_experts * n_classes)
        return mutual_information(counts.view(n_experts, n_classes))

    distances = torch.randint(1, len(classes), (n_shifts,), generator=rng).tolist()
    by_chance = torch.tensor([estimate(classes.roll(s)) for s in distances], dtype=torch.float64)
    share = classes.bincount().double() / len(classes)
    entropy = -float((share * share.log2()).nan_to_num(0.0).sum())
    return Specialisation(estimate(classes), by_chance, entropy)
