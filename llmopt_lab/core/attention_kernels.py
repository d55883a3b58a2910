"""What the attention kernels of several rooms share: rows of heads in and out of memory, how large
tiles may be on a GPU, and the check of q, k and v.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from llmopt_lab.core.device import prepare_triton
from llmopt_lab.core.errors import require
from llmopt_lab.core.launch import allow_descriptors, check_dtype, jit, shared_bytes

prepare_triton()

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)   # exp(x) == exp2(x * LOG2_E), exp2 is one instruction
MIN_D = 16                                  # tl.dot wants at least 16 columns
MAX_D = 256
MAX_ROW_STRIDE = 1 << 24                    # elements


@jit
def owned(n_tiles, n_heads):
    """(tile, head, batch) of this program: the tiles of one head start one after the other."""
    pid = tl.program_id(0)
    rest = pid // n_tiles
    return pid % n_tiles, rest % n_heads, (rest // n_heads).to(tl.int64)


@jit
def rows_of(
    x_ptr, n_heads, n_rows, x_head, x_row,
    ROWS: tl.constexpr, D_HEAD: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr,
):
    """Where `load_rows` finds (n_heads, n_rows, D_HEAD): a pointer, or a TMA descriptor of it."""
    if TMA:
        rows = tl.make_tensor_descriptor(
            x_ptr, [n_heads, n_rows, D_HEAD], [x_head, x_row, 1], [1, ROWS, D]
        )
    else:
        rows = x_ptr
    return rows


@jit
def load_rows(
    rows, head, first, n_rows, x_head, x_row,
    ROWS: tl.constexpr, D_HEAD: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr,
    CHECKED: tl.constexpr,          # whether the tile may end past n_rows
):
    """Rows [first, first + ROWS) of one head, (ROWS, D): 0 past n_rows and past D_HEAD."""
    if TMA:
        x = rows.load([head, first, 0]).reshape(ROWS, D)
    else:
        row = tl.arange(0, ROWS)                                        # (ROWS,)
        d = tl.arange(0, D)                                             # (D,)
        start = rows + tl.cast(head, tl.int64) * x_head + tl.cast(first, tl.int64) * x_row
        at = start + row[:, None] * x_row + d[None, :]                  # (ROWS, D)
        if CHECKED:
            ok = (first + row < n_rows)[:, None]
            if D_HEAD < D:
                ok = ok & (d < D_HEAD)[None, :]
            x = tl.load(at, ok, other=0.0)
        elif D_HEAD < D:
            x = tl.load(at, (d < D_HEAD)[None, :], other=0.0)
        else:
            x = tl.load(at)
    return x


@jit
def store_rows(
    x_ptr, x, head, first, n_rows, x_head, x_row,
    ROWS: tl.constexpr, D_HEAD: tl.constexpr, D: tl.constexpr,
):
    row = tl.arange(0, ROWS)                                            # (ROWS,)
    d = tl.arange(0, D)                                                 # (D,)
    start = x_ptr + tl.cast(head, tl.int64) * x_head + tl.cast(first, tl.int64) * x_row
    at = start + row[:, None] * x_row + d[None, :]                      # (ROWS, D)
    ok = (first + row < n_rows)[:, None] & (d < D_HEAD)[None, :]
    tl.store(at, x.to(x_ptr.dtype.element_ty), ok)


class Tiles(NamedTuple):
    """How one kernel runs."""

    tile_q: int
    tile_k: int
    n_warps: int
    n_stages: int
    tma: bool = False   # whether Hopper's tensor memory accelerator copies what the loop reads


# (kernel, bytes an element, padded d_head up to): tiles for a Hopper GPU
TILES = {
    ("forward", 2, 64): Tiles(128, 128, 8, 2),
    ("forward", 2, 128): Tiles(128, 128, 8, 2),
    ("forward", 2, 256): Tiles(128, 64, 8, 2),
    ("backward_keys", 2, 64): Tiles(128, 64, 4, 2),
    ("backward_keys", 2, 128): Tiles(64, 64, 4, 2),
    ("backward_keys", 2, 256): Tiles(64, 64, 8, 2),
    ("backward_queries", 2, 64): Tiles(128, 64, 8, 3),
    ("backward_queries", 2, 128): Tiles(128, 64, 8, 3),
    ("backward_queries", 2, 256): Tiles(64, 32, 4, 3),
    ("forward", 4, 64): Tiles(64, 32, 8, 2),
    ("forward", 4, 128): Tiles(32, 32, 8, 2),
    ("forward", 4, 256): Tiles(16, 16, 8, 2),
    ("backward_keys", 4, 64): Tiles(32, 32, 8, 2),
    ("backward_keys", 4, 128): Tiles(32, 32, 8, 2),
    ("backward_keys", 4, 256): Tiles(16, 16, 8, 2),
    ("backward_queries", 4, 64): Tiles(32, 32, 8, 2),
    ("backward_queries", 4, 128): Tiles(16, 32, 8, 2),
    ("backward_queries", 4, 256): Tiles(16, 16, 8, 2),
}


def tiles_from(
    table: dict, kernel: str, d_head: int, dtype: torch.dtype, capability: tuple[int, int] | None,
    *, at_most: Tiles | None = None,
) -> Tiles:
    """The table's tiles, cut down to what a GPU of that capability (None: AMD) holds.

    Args:
        table: (kernel, bytes an element, padded d_head up to) -> Tiles, for a Hopper GPU.
        kernel: "forward", "backward_keys" or "backward_queries".
        at_most: queries and keys of a tile, and the warps and stages then, where a kernel needs
            registers of its own beside the scores.
    """
    d = padded(d_head)
    tensor_cores = has_tensor_cores(capability)
    itemsize = dtype.itemsize if tensor_cores else 4    # without them products are float32
    tiles = table[kernel, itemsize, max(d, 64)]
    if capability is not None and capability >= (9, 0):
        tiles = tiles._replace(tma=True)
    if at_most:
        tile_q, tile_k = min(at_most.tile_q, tiles.tile_q), min(at_most.tile_k, tiles.tile_k)
        n_warps = at_most.n_warps if tensor_cores else tiles.n_warps    # as `cut_to`
        tiles = at_most._replace(tile_q=tile_q, tile_k=tile_k, n_warps=n_warps, tma=tiles.tma)
    if itemsize == 2 and (capability is None or capability[0] not in (9, 10)):
        tiles = _with_shorter_steps(kernel, tiles)      # products read registers, not shared memory
    # AMD's has 64 KiB, but its kernels do not keep tiles there
    most = shared_bytes(capability) if capability else 99 << 10
    transposes = kernel == "backward_keys" and capability is not None and capability[0] == 10
    while _bytes_needed(kernel, tiles, itemsize * d, transposes=transposes) > most:
        if tiles.n_stages > 2:
            tiles = tiles._replace(n_stages=tiles.n_stages - 1)
        elif max(tiles.tile_q, tiles.tile_k) == 16:
            return tiles._replace(n_stages=1)           # nothing is left to cut
        elif tiles.tile_q >= tiles.tile_k:
            tiles = cut_to(kernel, tiles, tiles.tile_q // 2, tiles.tile_k, capability)
        else:
            tiles = cut_to(kernel, tiles, tiles.tile_q, tiles.tile_k // 2, capability)
    return tiles


def has_tensor_cores(capability: tuple[int, int] | None) -> bool:
    """That Triton uses: a GPU of that capability (None: AMD)."""
    return capability is None or capability >= (8, 0)


def cut_to(
    kernel: str, tiles: Tiles, tile_q: int, tile_k: int, capability: tuple[int, int] | None
) -> Tiles:
    """`tiles` of at most so many queries and keys, and as many rows a warp as before.

    Twice the warps that its rows need made a program of 64 rows 1.5 to 2.6 times as slow (H200).
    Without tensor cores all warps stay: with 4 of 8 a T4's kernels spill 1 to 5 KB a thread.
    """
    cut = tiles._replace(tile_q=min(tiles.tile_q, tile_q), tile_k=min(tiles.tile_k, tile_k))
    if not has_tensor_cores(capability):
        return cut
    if kernel == "backward_keys":
        n_warps = tiles.n_warps * cut.tile_k // tiles.tile_k
    else:
        n_warps = tiles.n_warps * cut.tile_q // tiles.tile_q
    return cut._replace(n_warps=max(1, n_warps))


def _with_shorter_steps(kernel: str, tiles: Tiles) -> Tiles:
    if kernel == "backward_keys":
        return tiles._replace(tile_q=tiles.tile_q // 2)
    return tiles._replace(tile_k=tiles.tile_k // 2)


def _bytes_needed(kernel: str, tiles: Tiles, row_bytes: int, *, transposes: bool) -> int:
    """Of the tiles that a program keeps, and of two tiles a stage of what it walks.

    `transposes`: Blackwell's products want the walked tiles the other way round, too.
    """
    kept, walked = {
        "forward": (tiles.tile_q, tiles.tile_k),
        "backward_keys": (2 * tiles.tile_k, tiles.tile_q),
        "backward_queries": (2 * tiles.tile_q, tiles.tile_k),
    }[kernel]
    copies = 2 * (tiles.n_stages + transposes)
    return row_bytes * (kept + copies * walked) + 2048      # barriers, lse, delta


def options_of(tiles: Tiles, *walked: Tensor) -> dict:
    """`tiles` as the kernels take them. TMA needs addresses and strides in steps of 16 bytes."""
    aligned = all(
        x.data_ptr() % 16 == 0 and all(s and s * x.itemsize % 16 == 0 for s in x.stride()[:3])
        for x in walked
    )
    if tiles.tma and aligned:
        allow_descriptors()
    return {
        "TILE_Q": tiles.tile_q, "TILE_K": tiles.tile_k, "STAGES": tiles.n_stages,
        "TMA": tiles.tma and aligned, "num_warps": tiles.n_warps,
    }  # fmt: skip


def strides_of(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def padded(d_head: int) -> int:
    return max(MIN_D, triton.next_power_of_2(d_head))


def scale_of(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def empty_like(x: Tensor) -> Tensor:
    """Dense, with heads and rows in memory in the order of `x`."""
    batch, n_heads, n, d_head = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, n, n_heads, d_head).transpose(1, 2)
    return x.new_empty(x.shape)


def is_walkable(x: Tensor) -> bool:
    """Whether the kernels can address it: offsets within a tile of 128 rows are 32 bits wide."""
    return x.stride(3) == 1 and x.stride(2) < MAX_ROW_STRIDE


def check_qkv(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    """Refuse bad input before any work."""
    require(q.ndim == 4, f"q must be (batch, n_heads, n_q, d_head); got {tuple(q.shape)}")
    batch, n_heads, _, d_head = q.shape
    require(
        k.ndim == 4 and k.shape == v.shape,
        "k and v must both be (batch, n_kv_heads, n_k, d_head); "
        f"got {tuple(k.shape)} and {tuple(v.shape)}",
    )
    require(
        k.shape[0] == batch and k.shape[3] == d_head,
        f"q, k and v must have the same batch and d_head; got q {tuple(q.shape)}, "
        f"k {tuple(k.shape)}",
    )
    require(
        k.shape[1] > 0 and n_heads > 0 and n_heads % k.shape[1] == 0,
        f"n_heads must be a multiple of n_kv_heads; got {n_heads} and {k.shape[1]}",
    )
    require(
        0 < d_head <= MAX_D and d_head % 8 == 0,
        f"d_head must be a multiple of 8 up to {MAX_D}; got {d_head}",
    )
    check_dtype(q.dtype, q)
    for name, x in (("q", q), ("k", k), ("v", v)):
        require(
            x.dtype == q.dtype and x.device == q.device,
            f"{name} must be {q.dtype} on {q.device} like q; got {x.dtype} on {x.device}",
        )
        require(
            x.numel() == 0 or is_walkable(x),
            f"the last dimension of {name} must be contiguous, and its rows less than "
            f"{MAX_ROW_STRIDE} elements apart; got strides {x.stride()}: call .contiguous()",
        )
    require(
        scale is None or (math.isfinite(scale) and scale > 0),
        f"scale must be a positive finite number; got {scale}",
    )
