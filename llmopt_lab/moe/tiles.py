"""The tiles of this room's Triton kernels: how large they are, and how kernels load them."""

from typing import NamedTuple

import torch
from torch import Tensor

from llmopt_lab.core.device import gpu_facts, prepare_triton
from llmopt_lab.core.launch import jit, precision_of, shared_bytes

prepare_triton()

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

MIN_ROWS = 16           # of a row tile
DECODE_TOKENS = 64      # up to here no tile is worth 128 rows
GROUP = tl.constexpr(8)     # row tiles that share the weights of a column tile while in L2


@jit
def begin_kernel(PDL: tl.constexpr):
    """Let the next kernel start beside this one; wait until the one before is done."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@jit
def tile_of(pid, n_row_tiles, n_col_tiles):
    """(row tile, column tile): GROUP row tiles of an expert walk over its columns together."""
    width = GROUP * n_col_tiles
    first = pid // width * GROUP
    height = tl.minimum(n_row_tiles - first, GROUP)
    return first + pid % width % height, pid % width // height


@jit
def load_rows(
    rows, row, first_row, first,    # row (ROWS,) int64: which, if not [first_row, first_row + ROWS)
    N: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, TMA: tl.constexpr,
):
    """Columns [first, first + STEP) of some rows of (n, N), (ROWS, STEP): 0 past N."""
    if TMA:
        tile = rows.load([first_row, first])
    else:
        col = first + tl.arange(0, STEP)                                # (STEP,)
        at = rows + row[:, None] * N + col[None, :]
        if N % STEP == 0:
            tile = tl.load(at)
        else:
            tile = tl.load(at, (col < N)[None, :], other=0.0)
    return tile


@jit
def load_weight(
    w, expert, first_row, first_col,
    N_ROWS: tl.constexpr, N_COLS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    TMA: tl.constexpr,
):
    """A tile of one expert's matrix of (n_experts, N_ROWS, N_COLS), (ROWS, COLS): 0 outside."""
    if TMA:
        tile = w.load([expert, first_row, first_col]).reshape(ROWS, COLS)
    else:
        row = first_row + tl.arange(0, ROWS)                            # (ROWS,)
        col = first_col + tl.arange(0, COLS)                            # (COLS,)
        at = w + expert.to(tl.int64) * (N_ROWS * N_COLS) + row[:, None] * N_COLS + col[None, :]
        tile = tl.load(at, (row < N_ROWS)[:, None] & (col < N_COLS)[None, :], other=0.0)
    return tile


class Sizes(NamedTuple):
    """Of one layer call."""

    n_tokens: int
    d: int
    n_experts: int
    d_ff: int
    k: int

    @property
    def n_visits(self):     # a symbol while torch.compile traces
        return self.n_tokens * self.k

    def row_tiles(self, rows: int) -> int:
        """At most as many tiles of `rows` visits as any routing can make."""
        return min(self.n_visits, self.n_visits // rows + self.n_experts)

    def n_row_tiles(self, dtype: torch.dtype) -> int:
        """Of the call's row tiles, whatever the routing."""
        return self.row_tiles(choose_rows(self, dtype))


class Tiles(NamedTuple):
    """How one kernel runs."""

    rows: int           # of its result; "route": tokens
    cols: int
    step: int           # of the sum
    n_warps: int
    n_stages: int
    tma: bool = False   # whether Hopper's tensor memory accelerator copies what lies in order


# (kernel, bytes an element, whether tiles are full: else `rows` is cut to what an expert gets);
# measured on an H200
TILES = {
    ("gate_up", 2, True): Tiles(128, 128, 64, 8, 4),
    ("gate_up", 2, False): Tiles(64, 128, 64, 4, 4),
    ("project", 2, True): Tiles(128, 256, 64, 8, 4),
    ("project", 2, False): Tiles(64, 256, 64, 8, 4),
    ("hidden_gradient", 2, True): Tiles(128, 64, 64, 8, 4),
    ("hidden_gradient", 2, False): Tiles(64, 64, 64, 4, 3),
    ("weight_gradient", 2, True): Tiles(128, 128, 64, 8, 3),
    ("weight_gradient", 2, False): Tiles(128, 128, 32, 8, 3),
    ("gate_up", 4, True): Tiles(64, 32, 32, 4, 2),
    ("gate_up", 4, False): Tiles(64, 32, 32, 4, 2),
    ("project", 4, True): Tiles(64, 64, 32, 4, 2),
    ("project", 4, False): Tiles(64, 64, 32, 4, 2),
    ("hidden_gradient", 4, True): Tiles(64, 32, 32, 4, 2),
    ("hidden_gradient", 4, False): Tiles(64, 32, 32, 4, 2),
    ("weight_gradient", 4, True): Tiles(64, 64, 32, 4, 2),
    ("weight_gradient", 4, False): Tiles(64, 64, 32, 4, 2),
}
# gate_up with 16 rows: as many weights under way as shared memory holds
SMALL_GATE_UP = Tiles(16, 64, 128, 4, 5)


def choose_rows(sizes: Sizes, dtype: torch.dtype) -> int:
    """Visits in a row tile, the same for every kernel of a call: they share one list of tiles."""
    return rows_for(sizes, dtype) if gpu_facts() else MIN_ROWS


def rows_for(sizes: Sizes, dtype: torch.dtype) -> int:
    """128, if the experts fill that; else so many that most experts have one tile."""
    full = sizes.n_tokens > DECODE_TOKENS and sizes.n_visits >= 96 * sizes.n_experts
    if full and dtype.itemsize == 2:
        return 128
    usual = max(1, 2 * sizes.n_visits // sizes.n_experts)
    most = max(1, min(sizes.n_tokens, usual, 64))
    return max(MIN_ROWS, triton.next_power_of_2(most))


def choose_tiles(kernel: str, sizes: Sizes, dtype: torch.dtype) -> Tiles:
    """Tiles of the "route", "gate_up", "project", "hidden_gradient" or "weight_gradient" kernel."""
    gpu = gpu_facts()
    if gpu is None:
        return Tiles(16, 32, 16, 4, 1)  # interpreted: small, so that small examples have several
    capability = None if torch.version.hip is not None else gpu.capability
    return tiles_for(kernel, sizes, dtype, capability)


def tiles_for(
    kernel: str, sizes: Sizes, dtype: torch.dtype, capability: tuple[int, int] | None
) -> Tiles:
    """The table's tiles, cut down to what a GPU of that capability (None: AMD) holds."""
    e = max(16, triton.next_power_of_2(sizes.n_experts))
    if kernel == "route":
        rows = min(64, 8192 // e, max(16, triton.next_power_of_2(sizes.n_tokens)))
        tiles = Tiles(rows, e, 64, 8, 4)
    else:
        tensor_cores = capability is None or capability >= (8, 0)
        itemsize = dtype.itemsize if tensor_cores else 4    # without them products are float32
        rows = rows_for(sizes, dtype)
        tiles = TILES[kernel, itemsize, rows == 128]
        if (kernel, rows, itemsize) == ("gate_up", 16, 2):
            tiles = SMALL_GATE_UP
        if kernel != "weight_gradient":
            tiles = tiles._replace(rows=rows)
        tiles = tiles._replace(tma=capability is not None and capability >= (9, 0))
    while _bytes_needed(kernel, tiles, dtype.itemsize) > shared_bytes(capability):
        if tiles.n_stages > 2:
            tiles = tiles._replace(n_stages=tiles.n_stages - 1)
        elif tiles.step > 32:
            tiles = tiles._replace(step=tiles.step // 2)
        else:
            tiles = tiles._replace(cols=tiles.cols // 2)
    return tiles


def _bytes_needed(kernel: str, tiles: Tiles, itemsize: int) -> int:
    """Of the tiles that the loop has under way."""
    n_cols = 2 * tiles.cols if kernel == "gate_up" else tiles.cols
    return itemsize * tiles.n_stages * tiles.step * (tiles.rows + n_cols) + 2048


def splits_for(n_tiles: int, n_in: int) -> int:
    """Into how many parts a sum is cut, so that few tiles still keep the whole chip reading.

    Long sums are cut for the sake of an even end as well: the parts are little beside them.
    """
    gpu = gpu_facts()
    n_sms = gpu.n_sms if gpu else 8
    splits = 1
    while splits < 8 and (
        n_tiles * splits < n_sms and n_in >= 1024 * splits
        or n_tiles * splits < 4 * n_sms and n_in >= 8192 * splits
    ):
        splits *= 2
    return splits


def operands_of(tiles: Tiles, *matrices: tuple[Tensor, int, int]) -> tuple[list, dict]:
    """What a kernel reads in tiles of (rows, cols), as pointers or TMA descriptors, and `tiles`."""
    tma = tiles.tma and all(_has_tma_strides(x) for x, *_ in matrices)
    if tma:
        operands = [_descriptor(x, rows, cols) for x, rows, cols in matrices]
    else:
        operands = [x for x, *_ in matrices]
    return operands, options_of(tiles, matrices[0][0].dtype) | {"TMA": tma}


def options_of(tiles: Tiles, dtype: torch.dtype) -> dict:
    return {
        "ROWS": tiles.rows, "COLS": tiles.cols, "STEP": tiles.step,
        "STAGES": tiles.n_stages, "num_warps": tiles.n_warps, "PRECISION": precision_of(dtype),
    }  # fmt: skip


def _descriptor(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """TMA copies (rows, cols) of a matrix, or of one of many; what lies outside reads as 0."""
    block = [1] * (x.ndim - 2) + [rows, cols]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def _has_tma_strides(x: Tensor) -> bool:
    """TMA needs the address and every stride in steps of 16 bytes."""
    steps = [x.data_ptr(), *(stride * x.itemsize for stride in x.stride()[:-1])]
    return x.numel() > 0 and all(step % 16 == 0 for step in steps)
