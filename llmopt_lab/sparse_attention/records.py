"""What sparse attention makes on the way, and what its pictures show: one record an event."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt_lab.core.memory import ceil_div
from llmopt_lab.core.trace import Record


@dataclass(frozen=True)
class BlockLists(Record):
    """Of each block of queries: the blocks of keys to visit, first the full ones, then the partial.

    In a full block every query sees every key, so nothing is masked there. Every block that is not
    listed stays in slow memory. The dimensions ".." are none when all heads share the lists, and
    (.., n_kv_heads) when each KV head has its own.
    """

    n_q: int
    n_k: int
    tile_q: int
    tile_k: int
    blocks: Tensor          # (.., row_blocks, most) int32, rising in either part; -1 behind the end
    n_full: Tensor          # (.., row_blocks) int32
    n_live: Tensor          # (.., row_blocks) int32, full and partial

    def __str__(self) -> str:
        n_live, n_full = int(self.n_live.sum()), int(self.n_full.sum())
        n_all = self.n_live.numel() * ceil_div(self.n_k, self.tile_k)
        return (
            f"visit {n_live} of {n_all} blocks of {self.tile_q} x {self.tile_k}: {n_full} full, "
            f"{n_live - n_full} partial"
        )

    def of(self, kv_head: tuple[int, ...]) -> "BlockLists":
        """The lists of one KV head."""
        if self.blocks.ndim == 2:
            return self
        return BlockLists(
            self.n_q, self.n_k, self.tile_q, self.tile_k,
            self.blocks[kv_head], self.n_full[kv_head], self.n_live[kv_head],
        )

    def row(self, block: int) -> Iterator[tuple[slice, bool]]:
        """Keys to visit for one block of queries, and whether it sees them all; of one head."""
        live = self.blocks[block, : int(self.n_live[block])].tolist()
        for i, j in enumerate(live):
            keys = slice(j * self.tile_k, min((j + 1) * self.tile_k, self.n_k))
            yield keys, i < int(self.n_full[block])

    def live(self) -> Tensor:
        """True where a block is visited, (.., row_blocks, col_blocks)."""
        n_cols = ceil_div(self.n_k, self.tile_k)
        grid = torch.zeros(
            *self.n_live.shape, n_cols + 1, dtype=torch.bool, device=self.blocks.device
        )
        filled = self.blocks.long().masked_fill(self.blocks < 0, n_cols)    # -1 lands behind
        return grid.scatter(-1, filled, True)[..., :n_cols]


@dataclass(frozen=True)
class Visited(Record):
    """One live block was scored, and folded into the running softmax of its rows."""

    rows: slice             # queries
    cols: slice             # keys
    full: bool              # every query sees every key
    scores: Tensor          # (rows, cols), scaled; -inf where a query may not look
    total: Tensor           # (rows,)   sum of exp(score - m) so far

    def __str__(self) -> str:
        n_seen = int((self.scores > -torch.inf).sum())
        how = "full" if self.full else f"partial, {n_seen} of {self.scores.numel()} scores count"
        return f"{_range('quer', 'y', 'ies', self.rows)}: visit {_keys(self.cols)}; {how}"


@dataclass(frozen=True)
class Finished(Record):
    """These rows have seen their last block, and their result was written."""

    rows: slice
    n_visited: int
    out: Tensor             # (rows, d_v)   zeros where no key was seen

    def __str__(self) -> str:
        return (
            f"{_range('quer', 'y', 'ies', self.rows)}: done after {self.n_visited} blocks of keys"
        )


@dataclass(frozen=True)
class Selected(Record):
    """Blocks were chosen by content: the best of each block of queries, by these scores."""

    scores: Tensor          # (.., row_blocks, col_blocks), -inf where nothing may be seen
    chosen: Tensor          # (.., row_blocks, col_blocks) bool

    def __str__(self) -> str:
        n_may = int((self.scores > -torch.inf).sum())
        return f"select {int(self.chosen.sum())} of the {n_may} blocks that may be seen"


@dataclass(frozen=True)
class Rolled(Record):
    """A streaming cache took tokens in, and forgot as many of the oldest as it had no room for."""

    first: int              # the first new token
    n_new: int
    n_forgotten: int        # by this step
    n_sinks: int            # tokens 0 to n_sinks - 1 stay
    oldest: int             # the oldest token of the window afterwards

    def __str__(self) -> str:
        last = self.first + self.n_new - 1
        kept = f"sinks 0 to {self.n_sinks - 1} and " if self.n_sinks else ""
        return (
            f"tokens {self.first} to {last} come in, {self.n_forgotten} are forgotten; kept: "
            f"{kept}{self.oldest} to {last}"
        )


def _keys(cols: slice) -> str:
    return _range("key", "", "s", cols)


def _range(stem: str, one: str, several: str, where: slice) -> str:
    first, last = where.start, where.stop - 1
    return f"{stem}{several} {first} to {last}" if first < last else f"{stem}{one} {first}"
