"""How much speculation saves: tokens a round, time a round, and how far to guess ahead."""

from dataclasses import dataclass

from llmopt_lab.core.errors import require


def expected_tokens(alpha: float, k: int) -> float:
    """Tokens that a call of the target yields: (1 - alpha^(k + 1)) / (1 - alpha), from 1 to k + 1.

    Args:
        alpha: chance that a guess is kept, the same for each and independent of the others.
        k: guesses a round.

    Source: Leviathan et al. 2023, section 3.1, equation 1 (https://arxiv.org/abs/2211.17192).
    """
    require(0 <= alpha <= 1, f"alpha is a probability, 0 to 1; got {alpha}")
    require(k >= 0, f"k must not be negative; got {k}")
    return sum(alpha**i for i in range(k + 1))  # the same sum, and right at alpha = 1 too


def speedup(alpha: float, k: int, c: float, *, verify: float = 1.0) -> float:
    """Plain decoding's time a token over speculation's: expected_tokens / (k c + verify).

    Args:
        c: time of a draft's pass over a target's pass of 1 token.
        verify: time of the target's pass of k + 1 tokens over a pass of 1 token. 1 while reading
            the weights is what costs; toward k + 1 in large batches, where arithmetic does.

    Source: Leviathan et al. 2023, theorem 3.8, where verify = 1.
    """
    require(c >= 0, f"c is a ratio of times and must not be negative; got {c}")
    require(verify > 0, f"verify is a ratio of times and must be positive; got {verify}")
    return expected_tokens(alpha, k) / (k * c + verify)


def best_k(alpha: float, c: float, *, most: int = 32) -> int:
    """The number of guesses of highest `speedup`, 0 to `most`; of equal ones the smallest."""
    return max(range(most + 1), key=lambda k: (speedup(alpha, k, c), -k))


def break_even(k: int, c: float, *, verify: float = 1.0) -> float:
    """The alpha at which `speedup` is 1; below it speculation is slower. Over 1: it never pays.

    Source: speedup grows with alpha, so bisection finds it.
    """
    if speedup(1.0, k, c, verify=verify) < 1:
        return float("inf")
    low, high = 0.0, 1.0
    for _ in range(60):
        alpha = (low + high) / 2
        low, high = (alpha, high) if speedup(alpha, k, c, verify=verify) < 1 else (low, alpha)
    return high


@dataclass
class AdaptiveK:
    """Guesses as far ahead as the kept share of the last guesses makes worth while.

    Args:
        c: as for `speedup`.
        most: guesses a round, at most.
        alpha: the belief to start from.
        memory: of how many judged guesses the belief is made; old ones fade.

    What it chooses depends on the past only, so the output's distribution stays the target's.
    It guesses at least one token: with none it would learn nothing more.
    """

    c: float
    most: int = 16
    alpha: float = 0.8
    memory: float = 20.0

    def choose(self) -> int:
        """How far to guess in the next round."""
        return max(1, best_k(self.alpha, self.c, most=self.most))

    def learn(self, n_guessed: int, n_kept: int) -> None:
        """Take in a round. Guesses after the first refused one were not judged."""
        judged = min(n_kept + 1, n_guessed)
        for kept in [1.0] * n_kept + [0.0] * (judged - n_kept):
            self.alpha += (kept - self.alpha) / self.memory
