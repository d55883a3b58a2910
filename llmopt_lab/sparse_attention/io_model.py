"""The cost model: pairs, blocks, bytes and FLOPs of a pattern, and how they grow with N.

    lists = cover(pattern, n, n, tile_q=64, tile_k=64)
    sparse_traffic(lists, q, k, v).total            # bytes
    flops(lists, q, k, v), useful_flops(pattern, q, k, v)

Every count is exact: the tests compare it with counted loads and stores, or with the mask.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import ceil_div, tiles
from llmopt_lab.sparse_attention.patterns import (
    AnyOf,
    Causal,
    DilatedWindow,
    Full,
    GlobalTokens,
    InBlocks,
    Pattern,
    Sinks,
    SlidingWindow,
    Strided,
)
from llmopt_lab.sparse_attention.records import BlockLists


class Traffic(NamedTuple):
    """Bytes moved between slow and fast memory."""

    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written


def sparse_traffic(lists: BlockLists, q: Tensor, k: Tensor, v: Tensor) -> Traffic:
    """Of `sparse_attention(q, k, v, .., lists=lists)`: Q and O once, K and V of every live block.

    The lists themselves, 4 bytes a live block, are not counted.
    """
    keys = sum(visits * n for visits, n in _visits(lists)) * _heads_a_list(lists, q)
    width = k.shape[-1] + v.shape[-1]
    written = q.shape[:-1].numel() * v.shape[-1] * q.itemsize
    return Traffic(q.nbytes + keys * width * q.itemsize, written)


def flops(lists: BlockLists, q: Tensor, k: Tensor, v: Tensor) -> int:
    """Floating-point operations of both products over the live blocks, masked places included."""
    per_row_block = torch.tensor(
        [rows.stop - rows.start for rows in tiles(lists.n_q, lists.tile_q)]
    )
    live = lists.live().cpu().long()  # (.., row_blocks, col_blocks)
    per_col_block = torch.tensor(
        [cols.stop - cols.start for cols in tiles(lists.n_k, lists.tile_k)]
    )
    pairs = int((live * per_row_block[:, None] * per_col_block).sum())
    return 2 * (k.shape[-1] + v.shape[-1]) * pairs * _heads_a_list(lists, q)


class BlockCosts(NamedTuple):
    """What each block adds when one head visits it, and what it moves whatever it visits."""

    nbytes: Tensor  # (row_blocks, col_blocks) int64, of K and V
    flops: Tensor  # (row_blocks, col_blocks) int64, of both products
    fixed_nbytes: int  # of Q and O


def block_costs(n: int, *, tile_q: int, tile_k: int, d_head: int, itemsize: int = 4) -> BlockCosts:
    """Costs block by block, n queries and keys of width d_head: sums of them are `sparse_traffic`
    and `flops` of one head."""
    require(
        min(n, tile_q, tile_k, d_head, itemsize) > 0,
        f"sizes must be positive; got {n}, {tile_q}, {tile_k}, {d_head}, {itemsize}",
    )
    rows, cols = (
        torch.tensor([where.stop - where.start for where in tiles(n, size)])
        for size in (tile_q, tile_k)
    )
    nbytes = (2 * d_head * itemsize * cols).expand(len(rows), -1)
    return BlockCosts(nbytes, 4 * d_head * rows[:, None] * cols, 2 * n * d_head * itemsize)


def useful_flops(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> int:
    """Floating-point operations of both products over the pairs that count, and no other."""
    pairs = visible_pairs(pattern, q.shape[-2], k.shape[-2])
    return 2 * (k.shape[-1] + v.shape[-1]) * pairs * q.shape[:-2].numel()


def visible_pairs(pattern: Pattern, n_q: int, n_k: int) -> int:
    """(query, key) pairs that the pattern allows, counted a band of 256 queries at a time."""
    require(n_q > 0 and n_k > 0, f"n_q and n_k must be positive; got {n_q} and {n_k}")
    pattern, cols = pattern.at(n_k), torch.arange(n_k)
    first = n_k - n_q
    bands = (torch.arange(first + b.start, first + b.stop) for b in tiles(n_q, 256))
    return sum(int(pattern.allowed(rows, cols).sum()) for rows in bands)


def pairs_formula(pattern: Pattern, n: int) -> int:
    """`visible_pairs(pattern, n, n)` in closed form, for the patterns of the papers.

    dense N^2; causal N(N+1)/2; window N w; window + sinks N (w + s); dilated N w;
    strided N^2 / 2s; local + strided N (s + N / 2s), so N^1.5 at s = sqrt(N);
    window + global N (w + 2g), all of them up to what the ends of the text cut off. Of a pattern
    of blocks, such as BigBird, the pairs of blocks are counted, each times its tokens.

    Raises:
        BadInput: no formula for this pattern; count it with `visible_pairs`.
    """
    match pattern:
        case Full():
            return n * n
        case Causal():
            return _ramp(n, n)
        case SlidingWindow(width, True):
            return _ramp(n, width)
        case SlidingWindow(width, False):
            return 2 * _ramp(n, width // 2 + 1) - n
        case DilatedWindow(width, dilation, causal):
            # tokens of one remainder are a text of their own, n // dilation or one more long
            inner = SlidingWindow(width, causal)
            short, n_long = divmod(n, dilation)
            lengths = {short + 1: n_long, short: dilation - n_long}
            return sum(times * pairs_formula(inner, m) for m, times in lengths.items() if m)
        case Strided(stride):
            return pairs_formula(DilatedWindow(n, stride), n)
        case AnyOf((SlidingWindow(width, True), Sinks(sinks))):
            return _ramp(n, width + sinks)
        case AnyOf((SlidingWindow(width, True), Strided(stride))) if width == stride:
            return _ramp(n, stride) + pairs_formula(Strided(stride), n) - n
        case AnyOf((SlidingWindow(width, False) as local, GlobalTokens() as marked)):
            half, tokens = width // 2, set(marked.at(n).tokens)
            g = len(tokens)
            twice = sum(min(n - 1, t + half) - max(0, t - half) + 1 for t in tokens)
            both = sum(abs(a - b) <= half for a in tokens for b in tokens)
            # the window, and the rows and columns of global tokens; what is in both, once
            return pairs_formula(local, n) + 2 * g * n - g * g - (2 * twice - both)
        case InBlocks(size, of):
            sizes = torch.tensor([block.stop - block.start for block in tiles(n, size)])
            seen = of.mask(len(sizes), len(sizes))
            return int((seen * sizes[:, None] * sizes).sum())
    require(False, f"no formula for {pattern}; count it: visible_pairs(pattern, n, n)")


def window_blocks(width: int, n: int, tile: int) -> int:
    """Live blocks of a causal window over n tokens in square tiles: what its kernel walks.

    Block i of the queries needs the blocks from that of its first query's oldest key up to its own:
    min(i, ceil((width - 1) / tile)) + 1 of them. No list is needed.
    """
    back = ceil_div(width - 1, tile)
    return sum(min(i, back) + 1 for i in range(ceil_div(n, tile)))


def layers_to_reach(n: int, width: int) -> int:
    """Causal-window layers until the last of n tokens depends on the first.

    Each layer adds width - 1 tokens, so ceil((n - 1) / (width - 1)). Source: Mistral 7B, section 2.
    """
    require(n > 0 and width > 0, f"n and width must be positive; got {n} and {width}")
    require(width > 1 or n == 1, "a window of 1 sees itself alone: no depth lets it see further")
    return ceil_div(n - 1, width - 1) if n > 1 else 0


def fitted_exponent(sizes: Sequence[int | float], costs: Sequence[int | float]) -> float:
    """The a of cost = c * size^a, by least squares on logarithms.

    Raises:
        BadInput: fewer than two different sizes, or a value that is not positive.
    """
    require(
        len(sizes) == len(costs) and len(set(sizes)) > 1,
        f"a slope needs as many costs as sizes, two different ones at least; got {sizes}, {costs}",
    )
    require(min(*sizes, *costs) > 0, f"sizes and costs must be positive; got {sizes}, {costs}")
    x, y = ([math.log(value) for value in values] for values in (sizes, costs))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - mean_x) ** 2 for a in x)


def time_calls(call: Callable[[int], object], sizes: Sequence[int], *, repeats: int = 5) -> list:
    """CPU seconds of `call(n)` for every n: the fastest of `repeats`, after one warm-up each."""
    require(repeats > 0, f"repeats must be positive; got {repeats}")
    fastest = []
    for n in sizes:
        call(n)
        samples = []
        for _ in range(repeats):
            begin = time.process_time()
            call(n)
            samples.append(time.process_time() - begin)
        fastest.append(min(samples))
    return fastest


def _ramp(n: int, most: int) -> int:
    """Sum of min(i + 1, most) for i in [0, n)."""
    most = min(n, most)
    return n * most - most * (most - 1) // 2


def _visits(lists: BlockLists) -> list[tuple[int, int]]:
    """Of each block of keys: how often a list names it, and its keys."""
    visits = lists.live().flatten(0, -2).sum(0).tolist()
    sizes = [cols.stop - cols.start for cols in tiles(lists.n_k, lists.tile_k)]
    return list(zip(visits, sizes, strict=True))


def _heads_a_list(lists: BlockLists, q: Tensor) -> int:
    """Query heads that read each list."""
    return q.shape[:-2].numel() // lists.n_live.shape[:-1].numel()
