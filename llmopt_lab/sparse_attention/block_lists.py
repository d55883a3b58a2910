"""Block lists: which blocks of keys a block of queries has to visit, from a pattern."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import ceil_div, tiles
from llmopt_lab.sparse_attention.patterns import Pattern
from llmopt_lab.sparse_attention.records import BlockLists


def cover(
    pattern: Pattern, n_q: int, n_k: int, *,
    tile_q: int = 16, tile_k: int = 16, device: torch.device | str = "cpu",
) -> BlockLists:  # fmt: skip
    """The fewest blocks that hold every pair the pattern allows, full and partial told apart.

    A block is live as soon as one of its queries sees one of its keys: a cover may not lose a pair.

    Raises:
        BadInput: a size is not positive.

    Cost: n_q n_k evaluations of the rule, tile_q n_k at a time; no model's tensor is read.
    """
    return lists_of(*grids(pattern, n_q, n_k, tile_q, tile_k, device), n_q, n_k, tile_q, tile_k)


def grids(
    pattern: Pattern, n_q: int, n_k: int, tile_q: int, tile_k: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Which blocks hold an allowed pair, and which only such: (row_blocks, col_blocks) bool."""
    for name, size in (("n_q", n_q), ("n_k", n_k), ("tile_q", tile_q), ("tile_k", tile_k)):
        require(isinstance(size, int) and size > 0, f"{name} must be a positive int; got {size!r}")
    pattern = pattern.at(n_k)
    cols = torch.arange(n_k, device=device)
    past_end = ceil_div(n_k, tile_k) * tile_k - n_k
    some, every = [], []
    for rows in tiles(n_q, tile_q):
        tokens = torch.arange(rows.start, rows.stop, device=device) + n_k - n_q
        seen = pattern.allowed(tokens, cols)  # (tile_q, n_k)
        some.append(pad(seen.any(0), (0, past_end), value=False).view(-1, tile_k).any(1))
        every.append(pad(seen.all(0), (0, past_end), value=True).view(-1, tile_k).all(1))
    return torch.stack(some), torch.stack(every)


def lists_of(
    live: Tensor, full: Tensor, n_q: int, n_k: int, tile_q: int, tile_k: int
) -> BlockLists:
    """The lists of the blocks that are `live`, (.., row_blocks, col_blocks) bool as `full`."""
    full = full & live
    order = (~live).to(torch.int8) + (~full).to(torch.int8)  # 0 full, 1 partial, 2 not visited
    blocks = torch.sort(order, dim=-1, stable=True).indices.to(torch.int32)
    n_live = live.sum(-1, dtype=torch.int32)
    most = max(1, int(n_live.max()))
    dead = torch.arange(most, device=live.device) >= n_live[..., None]
    return BlockLists(
        n_q, n_k, tile_q, tile_k,
        blocks[..., :most].masked_fill(dead, -1), full.sum(-1, dtype=torch.int32), n_live,
    )  # fmt: skip
