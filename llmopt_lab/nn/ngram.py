"""An n-gram language model with interpolated, modified Kneser-Ney smoothing.

The strongest model of the time before neural networks, as a yardstick for the lab models.
Source: Chen and Goodman 1999, section 3.
"""

import numpy as np

from llmopt_lab.core.errors import require


class NGram:
    """Probabilities of a token after the `order` - 1 tokens before it.

    An n-gram is one integer, `bits` bits a token, so counting is sorting and a look-up is a binary
    search. The text is one row: n-grams run across the ends of documents.

    Args:
        tokens: (n,) integers in [0, n_vocab), n >= order.

    Cost: memory and time of sorting n 64-bit integers, once an order.
    """

    def __init__(self, tokens: np.ndarray, *, order: int, n_vocab: int):
        self.order, self.n_vocab = order, n_vocab
        self.bits = max(1, int(n_vocab - 1).bit_length())
        require(
            1 <= order and order * self.bits <= 64,
            f"order must be from 1 to {64 // self.bits} for {n_vocab} tokens; got {order}",
        )
        tokens = self._checked(tokens)
        require(len(tokens) >= order, f"needs at least {order} tokens; got {len(tokens)}")
        # The highest order counts how often an n-gram stands in the text; a lower one how many
        # different tokens stand before it, which is what Kneser and Ney found.
        self.levels = []
        grams, counts = np.unique(self._windows(tokens, order), return_counts=True)
        for n in range(order, 0, -1):
            self.levels.append(Level(grams, counts, self.bits))
            if n > 1:
                tail = (1 << np.uint64(self.bits * (n - 1))) - np.uint64(1)
                grams, counts = np.unique(grams & tail, return_counts=True)
        self.levels.reverse()  # levels[n - 1] is of order n

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """P(tokens[i] | up to order - 1 tokens before it) for every i, (n,) float64."""
        tokens = self._checked(tokens)
        p = np.full(len(tokens), 1 / self.n_vocab)
        for n, level in enumerate(self.levels, 1):
            if len(tokens) >= n:
                p[n - 1 :] = level.interpolate(self._windows(tokens, n), p[n - 1 :])
        return p

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        tokens = np.asarray(tokens)
        require(tokens.ndim == 1, f"tokens must be one row, (n,); got {tokens.shape}")
        require(
            tokens.size == 0 or bool(tokens.min() >= 0 and tokens.max() < self.n_vocab),
            f"tokens must lie in [0, {self.n_vocab})",
        )
        return tokens.astype(np.uint64)

    def _windows(self, tokens: np.ndarray, n: int) -> np.ndarray:
        """All n-grams of a row as integers, the first token in the highest bits."""
        grams = np.zeros(len(tokens) - n + 1, np.uint64)
        for i in range(n):
            grams = (grams << np.uint64(self.bits)) | tokens[i : len(tokens) - n + 1 + i]
        return grams


class Level:
    """The n-grams of one order: sorted, with their counts and those of their contexts."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray, bits: int):
        self.grams, self.counts, self.bits = grams, counts, np.uint64(bits)
        self.discounts = discounts_of(counts)
        discount = self.discounts[np.minimum(counts, 3)]
        self.contexts, first = np.unique(grams >> self.bits, return_index=True)
        self.totals = np.add.reduceat(counts, first).astype(np.float64)
        self.left = np.add.reduceat(discount, first) / self.totals  # mass for the lower order

    def interpolate(self, grams: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """The probability of each gram's last token, given that of the next lower order."""
        where, known = find(self.contexts, grams >> self.bits)
        place, seen = find(self.grams, grams)
        count = np.where(seen, self.counts[place], 0)
        own = np.maximum(count - self.discounts[np.minimum(count, 3)], 0) / self.totals[where]
        return np.where(known, own + self.left[where] * lower, lower)


def discounts_of(counts: np.ndarray) -> np.ndarray:
    """What is taken off a count of 0, 1, 2, and 3 or more: Chen and Goodman's equation 26.

    Where a text has no n-gram of some count from 1 to 4, as it is with single tokens of a large
    text, 0.5, 1 and 1.5 stand in, as in KenLM (Heafield et al. 2013).
    """
    n = [(counts == c).sum() for c in range(5)]
    if not all(n[1:]):
        return np.array([0.0, 0.5, 1.0, 1.5])
    y = n[1] / (n[1] + 2 * n[2])
    return np.array([0.0] + [max(0.0, c - (c + 1) * y * n[c + 1] / n[c]) for c in (1, 2, 3)])


def find(ordered: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each value stands in an ordered array (some place if nowhere), and whether it does."""
    place = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return place, ordered[place] == values
