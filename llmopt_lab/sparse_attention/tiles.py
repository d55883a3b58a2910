"""The tiles of this room's Triton kernels on a GPU, and what the kernels are not compiled for."""

from functools import partial

import torch
from torch import Tensor

from llmopt_lab.core import attention_kernels
from llmopt_lab.core.attention_kernels import Tiles, cut_to, padded, tiles_from
from llmopt_lab.core.device import prepare_triton
from llmopt_lab.core.launch import jit, precision_of

prepare_triton()

from triton import next_power_of_2

# one compilation for every length and every width
sized_jit = partial(jit, do_not_specialize=(
    "n_q", "n_padded", "n_k", "n_parts", "list_head", "n_terms", "low", "high", "n_sinks",
))

# flash attention's, but where short walks over few tiles do better with two programs a
# multiprocessor: one works while the other begins or ends
TILES = attention_kernels.TILES | {
    ("backward_queries", 2, 64): Tiles(64, 64, 4, 2),
    ("backward_queries", 2, 128): Tiles(64, 64, 4, 2),
    ("backward_queries", 2, 256): Tiles(64, 64, 4, 2),
}

# at most, where the rule is more than a window: it needs registers of its own
LONG_RULE = {
    ("forward", 64): Tiles(64, 64, 4, 3),
    ("forward", 128): Tiles(64, 64, 4, 3),
    ("forward", 256): Tiles(64, 32, 4, 2),
    ("backward_keys", 64): Tiles(64, 64, 4, 2),
    ("backward_keys", 128): Tiles(64, 64, 4, 2),
    ("backward_keys", 256): Tiles(64, 64, 8, 2),
    ("backward_queries", 64): Tiles(64, 64, 4, 3),
    ("backward_queries", 128): Tiles(64, 64, 4, 2),
    ("backward_queries", 256): Tiles(64, 64, 4, 2),
}
FORWARD_THAT_DIVIDES = Tiles(64, 32, 4, 2)


def tiles_for(
    kernel: str, d_head: int, dtype: torch.dtype, capability: tuple[int, int] | None,
    rule: str = "window",
) -> Tiles:
    """The table's tiles, cut down to what a GPU of that capability (None: AMD) holds.

    `rule`: inside a block, as `kind_of` has it: "window", "terms", or "terms that divide".
    """
    at_most = None if rule == "window" else LONG_RULE[kernel, max(padded(d_head), 64)]
    if rule == "terms that divide" and kernel == "forward":
        at_most = FORWARD_THAT_DIVIDES
    return tiles_from(TILES, kernel, d_head, dtype, capability, at_most=at_most)


def in_blocks(
    kernel: str, tiles: Tiles, block_q: int, block_k: int, capability: tuple[int, int] | None
) -> Tiles:
    """`tiles` cut down to lie in blocks of lists."""
    cut = cut_to(kernel, tiles, block_q, block_k, capability)
    if kernel == "forward" and cut.n_warps < tiles.n_warps and cut.tile_q < 64:
        # in blocks of 32 a warp for all rows took 0.63 of the time of two (H200)
        cut = cut._replace(n_warps=max(1, cut.n_warps // 2))
    return cut


def sink_rows(tile_k: int, n_sinks: int) -> int:
    """Sinks of a tile, where a tile of keys has tile_k."""
    return min(tile_k, max(16, next_power_of_2(n_sinks)))


def sizes_of(q: Tensor) -> dict:
    d_head = q.shape[3]
    return {"D_HEAD": d_head, "D": padded(d_head), "PRECISION": precision_of(q.dtype)}
