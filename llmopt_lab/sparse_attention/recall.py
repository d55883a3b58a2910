"""What a pattern loses: attention outside it, how far layers reach, a needle in a long text."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import ceil_div, tiles
from llmopt_lab.nn.transformer import Transformer, causal_attention
from llmopt_lab.sparse_attention.patterns import Pattern


def probabilities(q: Tensor, k: Tensor, *, scale: float) -> Tensor:
    """Dense causal attention of every head, (.., n_heads, n, n): what a pattern is measured by."""
    require(
        q.shape[-2] == k.shape[-2],
        f"as many queries as keys are needed; got {q.shape[-2]} and {k.shape[-2]}",
    )
    n, group = q.shape[-2], q.shape[-3] // k.shape[-3]
    scores = scale * q @ k.repeat_interleave(group, -3).mT
    ahead = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(ahead, -torch.inf).softmax(-1)


def mass_recall(p: Tensor, mask: Tensor) -> Tensor:
    """Share of the attention that falls on what the mask keeps, averaged over the queries.

    p: (.., n_heads, n, n), rows that sum to 1. mask: (n, n), or (.., n_heads, n, n). Result
    (.., n_heads), 0 to 1: 1 where the pattern loses nothing.
    """
    return (p * mask).sum(-1).mean(-1)


def block_mass(p: Tensor, tile_q: int, tile_k: int, n_kv_heads: int) -> Tensor:
    """Attention on each block of keys of each block of queries, summed over a group's heads.

    The oracle of block selection: (.., n_kv_heads, row_blocks, col_blocks).
    """
    n_q, n_k = p.shape[-2:]
    rows, cols = ceil_div(n_q, tile_q), ceil_div(n_k, tile_k)
    whole = pad(p, (0, cols * tile_k - n_k, 0, rows * tile_q - n_q))
    blocks = whole.unflatten(-1, (cols, tile_k)).sum(-1).unflatten(-2, (rows, tile_q)).sum(-2)
    return blocks.unflatten(-3, (n_kv_heads, -1)).sum(-3)


def block_shares(p: Tensor, tile_q: int, tile_k: int) -> Tensor:
    """Attention of each block of queries on each block of keys, the mean over its queries.

    (.., n_heads, row_blocks, col_blocks); a row sums to 1 as those of `p` do.
    """
    summed = block_mass(p, tile_q, tile_k, p.shape[-3])
    sizes = [rows.stop - rows.start for rows in tiles(p.shape[-2], tile_q)]
    return summed / torch.tensor(sizes, dtype=p.dtype, device=p.device)[:, None]


@torch.no_grad()
def layers_inputs(model: Transformer, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor, float]]:
    """(q, k, scale) of every layer while the model reads tokens (1, n): (1, heads, n, d_head)."""
    caught = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float) -> Tensor:
        caught.append((q, k, scale))
        return causal_attention(q, k, v, layer=layer, scale=scale)

    model(tokens, attend=spy)
    yield from caught


def reach(patterns: list[Pattern], n: int) -> list[int]:
    """How many tokens the last of n depends on after 1, 2, .. layers of these patterns.

    Cost: n evaluations of a row for each layer; no n x n matrix is multiplied.
    """
    known = torch.zeros(n, dtype=torch.bool)
    known[-1] = True
    counts, columns = [], torch.arange(n)
    for pattern in reversed(patterns):  # the last layer looks first
        rows = known.nonzero()[:, 0]
        known = pattern.at(n).allowed(rows, columns).any(0)
        counts.append(int(known.sum()))
    return counts


class Needle(NamedTuple):
    """A text with a run of random tokens in it, and the same run again at its end."""

    tokens: Tensor  # (n,) int64
    length: int  # of the run

    @property
    def distance(self) -> int:
        """From a token of the second run back to the one that follows its like in the first."""
        return self.first_of_second - self.first - 1

    @property
    def first_of_second(self) -> int:
        return len(self.tokens) - self.length

    @property
    def first(self) -> int:
        run = self.tokens[-self.length :]
        windows = self.tokens[: -self.length].unfold(0, self.length, 1)
        return int((windows == run).all(1).nonzero()[0])


def needle(filler: Tensor, *, length: int, at: int, n_vocab: int, rng: torch.Generator) -> Needle:
    """`length` random tokens at place `at` of the filler text, and again behind it.

    `rng` is a generator of the CPU, so that a seed gives the same run on every device.
    """
    require(
        0 <= at <= len(filler) and length > 1,
        f"the needle needs 2 tokens at least and a place in 0 to {len(filler)}; got {length}, {at}",
    )
    run = torch.randint(n_vocab, (length,), generator=rng).to(filler.device)
    return Needle(torch.cat([filler[:at], run, filler[at:], run]), length)


@torch.no_grad()
def recalled(logits: Callable[[Tensor], Tensor], text: Needle, *, hints: int = 4) -> float:
    """Share of the second run that is predicted greedily, its first `hints` tokens given away.

    logits: tokens (n,) to (n, n_vocab), such as `lambda tokens: model(tokens[None])[0]`.
    Source: the induction test of Olsson et al. 2022, https://arxiv.org/abs/2209.11895
    """
    require(0 < hints < text.length, f"hints must be 1 to {text.length - 1}; got {hints}")
    guesses = logits(text.tokens[:-1]).argmax(-1)
    first = text.first_of_second + hints
    return float((guesses[first - 1 :] == text.tokens[first:]).double().mean())
