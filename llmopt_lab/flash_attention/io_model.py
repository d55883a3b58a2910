"""The IO model: bytes between slow and fast memory, and what attention holds, by formula.

    sizes = Sizes.of(q, k, v, causal=True)
    naive_traffic(sizes).total / flash_traffic(sizes, tile_q=64, tile_k=64).total

Every formula is exact for any sizes and tiles: the tests compare it with counted loads and stores.
Source: FlashAttention, section 3.2 and Theorem 2 (https://arxiv.org/abs/2205.14135): naive moves
Theta(N d + N^2) elements, flash Theta(N^2 d^2 / M) with M elements on chip, d <= M <= N d.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import ceil_div, tiles
from llmopt_lab.flash_attention.reference import check_tiles


@dataclass(frozen=True)
class Sizes:
    """Of one attention, all its heads. `itemsize`: bytes an element of q, k, v and the result."""

    n_q: int
    n_k: int
    d_head: int
    d_v: int
    causal: bool = False
    itemsize: int = 4
    batch: int = 1
    n_heads: int = 1
    n_kv_heads: int = 1

    def __post_init__(self) -> None:
        for name in ("n_q", "n_k", "d_head", "d_v", "itemsize", "batch", "n_heads", "n_kv_heads"):
            size = getattr(self, name)
            require(
                isinstance(size, int) and size > 0, f"{name} must be a positive int; got {size!r}"
            )
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"n_heads must be a multiple of n_kv_heads; got {self.n_heads} and {self.n_kv_heads}",
        )

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> "Sizes":
        """Of the arguments of `flash_attention`."""
        batch = q.shape[:-3].numel()
        n_heads, n_kv_heads = (x.shape[-3] if q.ndim > 2 else 1 for x in (q, k))
        return cls(
            q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1], causal, q.dtype.itemsize,
            batch, n_heads, n_kv_heads,
        )  # fmt: skip

    @property
    def wide(self) -> int:
        """Bytes a softmax statistic: float32 at least."""
        return max(4, self.itemsize)

    @property
    def n_maps(self) -> int:
        """Score matrices: one a query head."""
        return self.batch * self.n_heads

    @property
    def score_nbytes(self) -> int:
        """S of all heads. Naive attention holds S and P: twice this."""
        return self.n_maps * self.n_q * self.n_k * self.itemsize

    @property
    def lse_nbytes(self) -> int:
        """L of all heads: what flash attention holds instead."""
        return self.n_maps * self.n_q * self.wide

    @property
    def last(self) -> int:
        """The last key that query 0 sees; query i sees i more."""
        return self.n_k - self.n_q if self.causal else self.n_k


class Traffic(NamedTuple):
    """Bytes moved between slow and fast memory."""

    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written


def naive_traffic(sizes: Sizes) -> Traffic:
    """Of `naive_attention`: S and P are each written once and read once. A mask saves nothing."""
    s = sizes
    scores = s.n_q * s.n_k
    read = s.n_q * s.d_head + s.n_k * (s.d_head + s.d_v) + 2 * scores
    written = 2 * scores + s.n_q * s.d_v
    return Traffic(s.n_maps * s.itemsize * read, s.n_maps * s.itemsize * written)


def flash_traffic(sizes: Sizes, *, tile_q: int, tile_k: int) -> Traffic:
    """Of `flash_attention`, forward. Without a mask `tile_k` does not matter."""
    s = sizes
    keys = sum(_keys_read(s, tile_q, tile_k))
    read = s.itemsize * (s.n_q * s.d_head + keys * (s.d_head + s.d_v))
    written = s.n_q * (s.itemsize * s.d_v + s.wide)
    return Traffic(s.n_maps * read, s.n_maps * written)


def key_outer_traffic(sizes: Sizes, *, tile_q: int, tile_k: int) -> Traffic:
    """Of `key_outer_attention`, the loop order of the first paper."""
    s = sizes
    queries = sum(_queries_read(s, tile_q, tile_k))
    result = s.itemsize * s.d_v + 2 * s.wide  # O, m and l of one query
    read = s.itemsize * s.n_k * (s.d_head + s.d_v) + queries * (s.itemsize * s.d_head + result)
    return Traffic(s.n_maps * read, s.n_maps * (s.n_q + queries) * result)


def split_kv_traffic(sizes: Sizes, *, n_splits: int) -> Traffic:
    """Of `split_kv_attention`: K and V once a KV head, and a detour of the parts."""
    s = sizes
    group, parts = s.n_heads // s.n_kv_heads, n_splits * (s.d_v + 1) * s.wide
    read = s.itemsize * s.n_k * (s.d_head + s.d_v) + group * (
        n_splits * s.itemsize * s.d_head + parts
    )
    written = group * (parts + s.itemsize * s.d_v)
    return Traffic(s.batch * s.n_kv_heads * read, s.batch * s.n_kv_heads * written)


def backward_traffic(sizes: Sizes, *, tile_q: int, tile_k: int) -> Traffic:
    """Of the backward of `flash_attention`: D, then dK and dV, then dQ."""
    s = sizes
    keys, queries = sum(_keys_read(s, tile_q, tile_k)), sum(_queries_read(s, tile_q, tile_k))
    key = s.itemsize * (s.d_head + s.d_v)  # of K and V, or of dK and dV
    query = s.itemsize * (s.d_head + s.d_v) + 2 * s.wide  # of Q, dO, L and D
    delta = Traffic(s.n_q * (2 * s.itemsize * s.d_v + s.wide), s.n_q * s.wide)
    to_q = Traffic(s.n_q * query + keys * key, s.n_q * s.itemsize * s.d_head)
    n_kv_maps = s.batch * s.n_kv_heads
    read = s.n_maps * (delta.read + queries * query + to_q.read) + n_kv_maps * s.n_k * key
    return Traffic(read, s.n_maps * (delta.written + to_q.written) + n_kv_maps * s.n_k * key)


def on_chip_nbytes(sizes: Sizes, *, tile_q: int, tile_k: int) -> int:
    """What one step of the forward holds: Q_i, K_j, V_j, S_ij, and m, total and acc."""
    s = sizes
    held = tile_q * s.d_head + tile_k * (s.d_head + s.d_v)
    made = tile_q * tile_k + tile_q * (2 + s.d_v)
    return s.itemsize * held + s.wide * made


def largest_tile_q(sizes: Sizes, *, budget: int, tile_k: int) -> int:
    """The most queries that fit `budget` bytes on chip beside `tile_k` keys.

    Traffic falls as 1 / tile_q, so this is the tile that moves least.

    Raises:
        BadInput: not even one query fits.
    """
    at_zero = on_chip_nbytes(sizes, tile_q=0, tile_k=tile_k)
    per_query = on_chip_nbytes(sizes, tile_q=1, tile_k=tile_k) - at_zero
    require(
        budget >= at_zero + per_query,
        f"{budget:,} bytes on chip cannot hold one query beside {tile_k} keys: that takes "
        f"{at_zero + per_query:,}. Use a smaller tile_k.",
    )
    return (budget - at_zero) // per_query


def papers_tiles(n_elements: int, d_head: int) -> tuple[int, int]:
    """B_r and B_c of FlashAttention, Algorithm 1, for M = `n_elements` on chip.

    B_c = ceil(M / 4d), B_r = min(B_c, d): Q, K, V and O take a quarter of M each.
    """
    require(
        n_elements >= d_head > 0, f"M must be at least d; got {n_elements} elements and {d_head}"
    )
    tile_k = ceil_div(n_elements, 4 * d_head)
    return min(tile_k, d_head), tile_k


def tile_counts(sizes: Sizes, *, tile_q: int, tile_k: int) -> tuple[int, int]:
    """Tiles of one head that are computed, and that a causal mask lets us skip."""
    computed = sum(ceil_div(keys, tile_k) for keys in _keys_read(sizes, tile_q, tile_k))
    return computed, ceil_div(sizes.n_q, tile_q) * ceil_div(sizes.n_k, tile_k) - computed


def visible_scores(sizes: Sizes) -> int:
    """(query, key) pairs of one head that count: n_q * n_k, or about half with a causal mask."""
    return sum(_end(sizes, row) for row in range(sizes.n_q))


def flops(sizes: Sizes) -> int:
    """Floating-point operations of both products over the visible scores: what has to be computed.

    Flash attention computes the hidden scores of the tiles on the diagonal beside them, naive
    attention those of the whole square. Without a mask nothing is hidden, and all three are equal.
    """
    return 2 * (sizes.d_head + sizes.d_v) * sizes.n_maps * visible_scores(sizes)


def saved_nbytes(call: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the backward of whatever `call` computes.

    A tensor that is kept twice, or as several views of one storage, counts once.
    """
    kept: dict[int, torch.UntypedStorage] = {}  # holds them, so that no address comes twice

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(storage.nbytes() for storage in kept.values())


def _keys_read(s: Sizes, tile_q: int, tile_k: int) -> Iterator[int]:
    """Of each tile of queries: the keys of the tiles that it does not skip."""
    check_tiles(tile_q, tile_k)
    for rows in tiles(s.n_q, tile_q):
        yield min(s.n_k, ceil_div(_end(s, rows.stop - 1), tile_k) * tile_k)


def _queries_read(s: Sizes, tile_q: int, tile_k: int) -> Iterator[int]:
    """Of each tile of keys: the queries of the tiles that do not skip it."""
    check_tiles(tile_q, tile_k)
    for cols in tiles(s.n_k, tile_k):
        first = max(0, cols.start - s.last)  # the first query that sees any of them
        yield s.n_q - first // tile_q * tile_q if first < s.n_q else 0


def _end(s: Sizes, row: int) -> int:
    """Query `row` sees the keys [0, end)."""
    return min(s.n_k, max(0, row + s.last + 1))
