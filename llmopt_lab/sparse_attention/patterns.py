"""Patterns: rules that say from two token indices alone whether a query sees a key.

    pattern = SlidingWindow(256) | Sinks(4)        # StreamingLLM's mask
    pattern.mask(8, 8)                             # (8, 8) bool: draw it
    pattern.allowed(rows, cols)                    # any part of it: no N x N tensor is needed

`|` sees what either sees, `&` what both see. Queries and keys are numbered by token, so with n_q
queries and n_k keys query i is token i + n_k - n_q: the last query is the last token.
"""

from dataclasses import dataclass
from itertools import groupby
from math import lcm
from typing import NamedTuple

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import ceil_div

FAR = 1 << 30  # further than any token; sums of two such bounds fit in 32 bits


class Band(NamedTuple):
    """Pairs of blocks of `grain` tokens on some diagonals, inside a rectangle.

    With r and c the blocks of a query and a key: low <= r - c <= high, r - c a multiple of `step`,
    r in [row_begin, row_end), c in [col_begin, col_end).
    """

    grain: int = 1
    low: int = -FAR
    high: int = FAR
    step: int = 1
    row_begin: int = -FAR
    row_end: int = FAR
    col_begin: int = -FAR
    col_end: int = FAR


Term = tuple[Band, ...]  # what all of these bands hold


class Pattern:
    """A rule. Subclasses are frozen dataclasses that define `allowed` and `terms`."""

    def allowed(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Whether the tokens `rows` (r,) see the tokens `cols` (c,), both int64: (r, c) bool."""
        raise NotImplementedError

    def terms(self) -> tuple[Term, ...]:
        """The same rule as numbers, for a kernel: a pair counts if all bands of some term hold it.

        Indices from the end must be counted out before, by `at`.
        """
        raise NotImplementedError

    def at(self, n_tokens: int) -> "Pattern":
        """The same pattern over `n_tokens` tokens, with indices from the end counted out."""
        return self

    def mask(self, n_q: int, n_k: int, *, device: torch.device | str = "cpu") -> Tensor:
        """True where the last n_q of n_k tokens may look, (n_q, n_k).

        Raises:
            BadInput: a size is not positive, or a token that the pattern names is not there.
        """
        require(n_q > 0 and n_k > 0, f"n_q and n_k must be positive; got {n_q} and {n_k}")
        rows = torch.arange(n_k - n_q, n_k, device=device)
        return self.at(n_k).allowed(rows, torch.arange(n_k, device=device))

    def __or__(self, other: "Pattern") -> "Pattern":
        return AnyOf((self, other))

    def __and__(self, other: "Pattern") -> "Pattern":
        return AllOf((self, other))


@dataclass(frozen=True)
class AnyOf(Pattern):
    """Sees what at least one of the parts sees."""

    parts: tuple[Pattern, ...]

    def allowed(self, rows: Tensor, cols: Tensor) -> Tensor:
        seen = self.parts[0].allowed(rows, cols)
        for part in self.parts[1:]:
            seen = seen | part.allowed(rows, cols)
        return seen

    def terms(self) -> tuple[Term, ...]:
        return tuple(term for part in self.parts for term in part.terms())

    def at(self, n_tokens: int) -> Pattern:
        return AnyOf(tuple(part.at(n_tokens) for part in self.parts))


@dataclass(frozen=True)
class AllOf(Pattern):
    """Sees what every part sees."""

    parts: tuple[Pattern, ...]

    def allowed(self, rows: Tensor, cols: Tensor) -> Tensor:
        seen = self.parts[0].allowed(rows, cols)
        for part in self.parts[1:]:
            seen = seen & part.allowed(rows, cols)
        return seen

    def terms(self) -> tuple[Term, ...]:
        whole: tuple[Term, ...] = ((Band(),),)
        for part in self.parts:
            whole = tuple(_both(a, b) for a in whole for b in part.terms())
        return tuple(term for term in whole if all(_holds_some(band) for band in term))

    def at(self, n_tokens: int) -> Pattern:
        return AllOf(tuple(part.at(n_tokens) for part in self.parts))


@dataclass(frozen=True)
class Full(Pattern):
    """Dense attention: every query sees every key."""

    def allowed(self, rows: Tensor, cols: Tensor) -> Tensor:
        return torch.ones(len(rows), len(cols), dtype=torch.bool, device=rows.device)

    def terms(self) -> tuple[Term, ...]:
        return ((Band(),),)


@dataclass(frozen=True)
class Causal(Pattern):
    """A query sees its own key and those before it."""

    def allowed(self, rows: Tensor, cols: Tensor) -> Tensor:
        return cols <= rows[:, None]

    def terms(self) -> tuple[Term, ...]:
        return ((Band(low=0),),)


@dataclass(frozen=True)
class SlidingWindow(Pattern):
    """A causal window of width w is a query's own key and the w - 1 before it; a symmetric one is
    its own key and w // 2 on each side.

    Sources: Beltagy et al. 2020, Longformer, section 3.1; Jiang et al. 2023, Mistral 7B, section 2.
    """

    width: int
    causal: bool = True

    def __post_init__(self) -> None:
        _positive("width", self.width)

    def allowed(self, rows: Tensor, cols: Tensor) -> Tensor:
        back = rows[:, None] - cols
        if self.causal:
            return (back >= 0) & (back < self.width)
        return back.abs() <= self.width // 2

    def terms(self) -> tuple[Term, ...]:
        if self.causal:
            return ((Band(low=0, high=self.width - 1),),)
        return ((Band(low=-(self.width // 2), high=self.width // 2),),)


@dataclass(frozen=True)
class DilatedWindow(Pattern):
    """`SlidingWindow` over every `dilation`-th key: as many keys, and `dilation` times the reach.

    Source: Longformer, section 3.1, "Dilated Sliding Window".
    """

    width: int
    dilation: int
    causal: bool = True

    def __post_init__(self) -> None:
        _positive("width", self.width)
        _positive("dilation", self.dilation)

    def allowed(self, rows: Tensor, cols: Tensor) -> Tensor:
        back = rows[:, None] - cols
        steps = back // self.dilation
        if self.causal:
            near = (steps >= 0) & (steps < self.width)
        else:
            near = steps.abs() <= self.width // 2
        return near & (back % self.dilation == 0)

    def terms(self) -> tuple[Term, ...]:
        first = 0 if self.causal else -(self.width // 2)
        last = self.width - 1 if self.causal else self.width // 2
        low, high = first * self.dilation, last * self.dilation
        return ((Band(low=low, high=high, step=self.dilation),),)


@dataclass(frozen=True)
class Strided(Pattern):
    """A query sees its own key and every `stride`-th one before it.

    Source: Child et al. 2019, Sparse Transformer, section 4.3, A^(2) of strided attention.
    """

    stride: int

    def __post_init__(self) -> None:
        _positive("stride", self.stride)

    def allowed(self, rows: Tensor, cols: Tensor) -> Tensor:
        back = rows[:, None] - cols
        return (back >= 0) & (back % self.stride == 0)

    def terms(self) -> tuple[Term, ...]:
        return ((Band(low=0, step=self.stride),),)


@dataclass(frozen=True)
class Sinks(Pattern):
    """The first `n` tokens, seen by themselves (causally) and by every later token.

    Source: Xiao et al. 2023, StreamingLLM, section 3.2.
    """

    n: int

    def __post_init__(self) -> None:
        _positive("n", self.n)

    def allowed(self, rows: Tensor, cols: Tensor) -> Tensor:
        return (cols < self.n) & (cols <= rows[:, None])

    def terms(self) -> tuple[Term, ...]:
        return ((Band(low=0, col_end=self.n),),)


@dataclass(frozen=True)
class GlobalTokens(Pattern):
    """These tokens see all tokens, and all tokens see them. -1 is the last token.

    Source: Longformer, section 3.1, "Global Attention": symmetric.
    """

    tokens: tuple[int, ...]

    def at(self, n_tokens: int) -> "GlobalTokens":
        wrong = [t for t in self.tokens if not -n_tokens <= t < n_tokens]
        require(not wrong, f"there are {n_tokens} tokens, and none is number {wrong}")
        return GlobalTokens(tuple(t % n_tokens for t in self.tokens))

    def allowed(self, rows: Tensor, cols: Tensor) -> Tensor:
        require(
            all(t >= 0 for t in self.tokens),
            f"{self.tokens} counts from the end of a text whose length is not known here: "
            "take .at(n_tokens) first, or .mask(n_q, n_k)",
        )
        tokens = torch.tensor(self.tokens, dtype=torch.int64, device=rows.device)
        return torch.isin(rows, tokens)[:, None] | torch.isin(cols, tokens)

    def terms(self) -> tuple[Term, ...]:
        runs = _runs(self.tokens)
        return tuple(
            (band,)
            for first, end in runs
            for band in (Band(row_begin=first, row_end=end), Band(col_begin=first, col_end=end))
        )


@dataclass(frozen=True)
class Listed(Pattern):
    """Token i sees the keys `keys[i]`; a token behind the list sees none."""

    keys: tuple[tuple[int, ...], ...]

    def allowed(self, rows: Tensor, cols: Tensor) -> Tensor:
        seen = torch.zeros(len(rows), len(cols), dtype=torch.bool, device=rows.device)
        for i, row in enumerate(rows.tolist()):
            if 0 <= row < len(self.keys):
                keys = torch.tensor(self.keys[row], dtype=torch.int64, device=rows.device)
                seen[i] = torch.isin(cols, keys)
        return seen

    def terms(self) -> tuple[Term, ...]:
        return tuple(
            (Band(row_begin=row, row_end=row + 1, col_begin=first, col_end=end),)
            for row, keys in enumerate(self.keys)
            for first, end in _runs(keys)
        )


@dataclass(frozen=True)
class InBlocks(Pattern):
    """A pattern of blocks of `size` tokens: a token sees the whole of each block that its own sees.

    The last block may be shorter.
    """

    size: int
    of: Pattern

    def __post_init__(self) -> None:
        _positive("size", self.size)

    def at(self, n_tokens: int) -> Pattern:
        return InBlocks(self.size, self.of.at(ceil_div(n_tokens, self.size)))

    def allowed(self, rows: Tensor, cols: Tensor) -> Tensor:
        row_blocks, row = torch.unique(rows // self.size, return_inverse=True)
        col_blocks, col = torch.unique(cols // self.size, return_inverse=True)
        return self.of.allowed(row_blocks, col_blocks)[row[:, None], col]

    def terms(self) -> tuple[Term, ...]:
        return tuple(
            tuple(band._replace(grain=band.grain * self.size) for band in term)
            for term in self.of.terms()
        )


def sparse_transformer(stride: int) -> Pattern:
    """Local plus strided: the last `stride` keys, and every `stride`-th one before them.

    Each query sees fewer than stride + N / stride keys, about 2 sqrt(N) at stride sqrt(N), and any
    two tokens are two layers apart.
    Source: Sparse Transformer, section 4.3. There one head takes the local part and another the
    strided one, or one head both, as here; the paper's local part has one key more, i - stride,
    which the strided part holds too.
    """
    return SlidingWindow(stride) | Strided(stride)


def longformer(width: int, global_tokens: tuple[int, ...] = (0,)) -> Pattern:
    """A symmetric window, and global tokens that see all and are seen by all.

    Source: Longformer, section 3.1. `& Causal()` makes it safe for a decoder.
    """
    return SlidingWindow(width, causal=False) | GlobalTokens(tuple(global_tokens))


def streaming(window: int, n_sinks: int = 4) -> Pattern:
    """The last `window` keys and the first `n_sinks` tokens. Source: StreamingLLM, section 3.2."""
    return SlidingWindow(window) | Sinks(n_sinks) if n_sinks else SlidingWindow(window)


def bigbird(
    n_tokens: int, *, block: int, rng: torch.Generator,
    n_window: int = 3, n_global: int = 2, n_random: int = 3,
) -> Pattern:  # fmt: skip
    """Of blocks of tokens: a window of n_window, the first n_global global, n_random drawn at will.

    Every block of queries draws its own `n_random`, among those that it does not see anyway (all of
    them if there are fewer).
    Source: Zaheer et al. 2020, BigBird (ITC), section 2 and appendix D.

    Raises:
        BadInput: a negative count, or more global blocks than there are blocks.
    """
    _positive("n_tokens", n_tokens)
    _positive("block", block)
    _positive("n_window", n_window)
    for name, n in (("n_global", n_global), ("n_random", n_random)):
        require(n >= 0, f"{name} must not be negative; got {n}")
    n_blocks = ceil_div(n_tokens, block)
    known = SlidingWindow(n_window, causal=False) | GlobalTokens(tuple(range(n_global)))
    drawn = []
    for seen in known.mask(n_blocks, n_blocks):
        others = torch.nonzero(~seen)[:, 0]
        order = torch.randperm(len(others), generator=rng)
        drawn.append(tuple(sorted(others[order[:n_random]].tolist())))
    return InBlocks(block, known | Listed(tuple(drawn)))


def _runs(tokens: tuple[int, ...]) -> list[tuple[int, int]]:
    """The tokens as half-open ranges of consecutive ones."""
    ordered = sorted(set(tokens))
    groups = groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0])
    runs = [[token for _, token in group] for _, group in groups]
    return [(run[0], run[-1] + 1) for run in runs]


def _both(a: Term, b: Term) -> Term:
    """What both terms hold: bands of one grain become one band."""
    joined = {band.grain: band for band in a}
    for band in b:
        other = joined.get(band.grain, Band(band.grain))
        joined[band.grain] = Band(
            band.grain,
            max(band.low, other.low), min(band.high, other.high), lcm(band.step, other.step),
            max(band.row_begin, other.row_begin), min(band.row_end, other.row_end),
            max(band.col_begin, other.col_begin), min(band.col_end, other.col_end),
        )  # fmt: skip
    if len(joined) > 1 and joined.get(1) == Band():
        del joined[1]
    return tuple(joined.values())


def _holds_some(band: Band) -> bool:
    return band.low <= band.high and band.row_begin < band.row_end and band.col_begin < band.col_end


def _positive(name: str, size: int) -> None:
    require(isinstance(size, int) and size > 0, f"{name} must be a positive int; got {size!r}")
