"""Which blocks a call visits, and the lists of them, full blocks first, made on the GPU.

A pattern comes as a table of terms, numbers in place of a mask; chosen blocks come as a grid. A
window, with or without sinks, needs no list: its blocks follow from a program's own place.
"""

import math
from functools import lru_cache, reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

from llmopt_lab.core.device import gpu_facts, prepare_triton
from llmopt_lab.core.errors import require
from llmopt_lab.core.launch import jit
from llmopt_lab.core.memory import ceil_div
from llmopt_lab.sparse_attention.records import BlockLists

prepare_triton()

import triton
import triton.language as tl

FAR = 1 << 30                               # further than any token, as in the patterns
FIELDS = tl.constexpr(16)                   # int32 of one term in the table: two bands
MOST_UNROLLED = 8                           # terms that a kernel is compiled for
# a band's eight fields: grain, low, high, step, rows from .. to before .., columns likewise; what
# it forbids is its kind, a sum of these bits
LOW, HIGH, STEP, ROWS, COLS, GRAIN = (tl.constexpr(1 << i) for i in range(6))
CHUNK = tl.constexpr(256)                   # terms that are looked at at once
EVERYTHING = (1, -FAR, FAR, 1, -FAR, FAR, -FAR, FAR)    # a band, field by field
NOTHING = (1, 1, 0, 1, 0, 0, 0, 0)
PARTIAL, FULL = tl.constexpr(1), tl.constexpr(2)


@jit
def floor_div(a, b):
    quotient = a // b           # cut towards 0 on a GPU, rounded down already by the interpreter
    return quotient - (a < quotient * b).to(tl.int32)


@jit
def _holds_everything(at):
    """Whether a band forbids no pair: the second one of a term that has only one."""
    far: tl.constexpr = 1 << 30
    return (
        (tl.load(at + 1) == -far) & (tl.load(at + 2) == far) & (tl.load(at + 3) == 1)
        & (tl.load(at + 4) == -far) & (tl.load(at + 5) == far)
        & (tl.load(at + 6) == -far) & (tl.load(at + 7) == far)
    )


@jit
def _held(
    at, first_row, last_row, first_col, last_col,                       # tokens, ends included
):
    """Whether one band holds a pair of these blocks, and whether it holds all of them."""
    grain, low, high, step = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    row_begin, row_end = tl.load(at + 4), tl.load(at + 5)
    col_begin, col_end = tl.load(at + 6), tl.load(at + 7)
    top, bottom = floor_div(first_row, grain), floor_div(last_row, grain)
    left, right = first_col // grain, last_col // grain
    top_in, bottom_in = tl.maximum(top, row_begin), tl.minimum(bottom, row_end - 1)
    left_in, right_in = tl.maximum(left, col_begin), tl.minimum(right, col_end - 1)
    lowest = tl.maximum(top_in - right_in, low)                         # of row - col
    highest = tl.minimum(bottom_in - left_in, high)
    some = (
        (floor_div(highest, step) * step >= lowest) & (top_in <= bottom_in)
        & (left_in <= right_in)
    )
    one_diagonal = (top == bottom) & (left == right) & ((top - left) % step == 0)
    every = (
        (top >= row_begin) & (bottom < row_end) & (left >= col_begin) & (right < col_end)
        & (top - right >= low) & (bottom - left <= high) & ((step == 1) | one_diagonal)
    )
    return some, every


@jit
def _near(
    at, ok, owner, n_q, n_k,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, OF_KEYS: tl.constexpr,
):
    """Whether the first bands at `at` are about the rows, or the columns, of the owner."""
    grain = tl.load(at, ok, other=1)
    if OF_KEYS:
        begin, end = tl.load(at + 6, ok, other=1), tl.load(at + 7, ok, other=0)
        first, last = owner * BLOCK_K // grain, (owner * BLOCK_K + BLOCK_K - 1) // grain
    else:
        begin, end = tl.load(at + 4, ok, other=1), tl.load(at + 5, ok, other=0)
        token = owner * BLOCK_Q + n_k - n_q
        first, last = floor_div(token, grain), floor_div(token + BLOCK_Q - 1, grain)
    return ok & (first < end) & (last >= begin)


@jit
def _states(
    terms_ptr, grid_ptr, which, owner, begin, n_terms, n_q, n_k, n_owners, n_walked,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, FROM_TERMS: tl.constexpr,
    OF_KEYS: tl.constexpr, WIDTH: tl.constexpr,
):
    """(WIDTH,) int32, 0, PARTIAL or FULL: the owner's block and the blocks [begin, begin + WIDTH).

    A cover: no allowed pair is lost. Exact for one band. Of two that must hold together a block is
    live if each holds a pair of it; of several terms it is full if one of them holds all of it.
    """
    walked = begin + tl.arange(0, WIDTH)                                # (WIDTH,)
    col = walked
    if OF_KEYS:
        col = tl.zeros_like(walked) + owner
    if FROM_TERMS:
        if OF_KEYS:
            row_block, col_block = walked, owner
        else:
            row_block, col_block = owner, walked
        first_row, first_col = row_block * BLOCK_Q, col_block * BLOCK_K
        last_row = tl.minimum(first_row + BLOCK_Q, n_q) - 1 + n_k - n_q
        last_col = tl.minimum(first_col + BLOCK_K, n_k) - 1
        first_row += n_k - n_q
        some = walked < 0
        every = walked < 0
        # of many terms, most are about other rows than this: the others are picked one by one
        for chunk in range(0, n_terms, CHUNK):
            i = chunk + tl.arange(0, CHUNK)                             # (CHUNK,)
            near = _near(
                terms_ptr + i * FIELDS, i < n_terms, owner, n_q, n_k, BLOCK_Q, BLOCK_K, OF_KEYS
            )
            left = tl.where(near, i, n_terms)
            j = tl.min(left, axis=0)
            while j < n_terms:
                at = terms_ptr + j * FIELDS
                holds_some, holds_every = _held(at, first_row, last_row, first_col, last_col)
                if not _holds_everything(at + 8):       # divisions take most of a list's time
                    and_some, and_every = _held(at + 8, first_row, last_row, first_col, last_col)
                    holds_some, holds_every = holds_some & and_some, holds_every & and_every
                some = some | holds_some
                every = every | holds_every
                left = tl.where(left == j, n_terms, left)
                j = tl.min(left, axis=0)
        state = tl.where(every, FULL, tl.where(some, PARTIAL, 0))
    else:
        n_cols = n_owners if OF_KEYS else n_walked
        row = walked if OF_KEYS else tl.zeros_like(walked) + owner
        at = grid_ptr + which * n_owners * n_walked + row.to(tl.int64) * n_cols + col
        state = tl.load(at, walked < n_walked, other=0).to(tl.int32)
    past_end = (col + 1) * BLOCK_K > n_k                                # some keys are not there
    state = tl.where(past_end, tl.minimum(state, PARTIAL), state)
    return tl.where(walked < n_walked, state, 0)


@jit
def _list_kernel(
    terms_ptr, grid_ptr,            # (n_terms, FIELDS) int32; (n_lists, n_rows, n_cols) int8
    blocks_ptr, n_full_ptr, n_live_ptr,     # (n_lists, n_owners, n_walked), (n_lists, n_owners)
    n_terms, n_q, n_k, n_owners, n_walked,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, FROM_TERMS: tl.constexpr,
    OF_KEYS: tl.constexpr,          # who owns a list: a block of keys, or else one of queries
    WIDTH: tl.constexpr, ONCE: tl.constexpr,    # whether WIDTH holds all candidates
):
    """One program: the list of one block, full blocks first, WIDTH candidates at a time."""
    pid = tl.program_id(0).to(tl.int64)
    owner = (pid % n_owners).to(tl.int32)
    which = pid // n_owners
    out = blocks_ptr + pid * n_walked
    n_all_full = 0
    if not ONCE:
        for begin in range(0, n_walked, WIDTH):
            state = _states(
                terms_ptr, grid_ptr, which, owner, begin, n_terms, n_q, n_k, n_owners, n_walked,
                BLOCK_Q, BLOCK_K, FROM_TERMS, OF_KEYS, WIDTH,
            )
            n_all_full += tl.sum((state == FULL).to(tl.int32), axis=0)
    n_full = 0
    n_live = n_all_full
    for begin in range(0, n_walked, WIDTH):
        walked = begin + tl.arange(0, WIDTH)                            # (WIDTH,)
        state = _states(
            terms_ptr, grid_ptr, which, owner, begin, n_terms, n_q, n_k, n_owners, n_walked,
            BLOCK_Q, BLOCK_K, FROM_TERMS, OF_KEYS, WIDTH,
        )
        full, partial = (state == FULL).to(tl.int32), (state == PARTIAL).to(tl.int32)
        if ONCE:
            n_live = tl.sum(full, axis=0)
        tl.store(out + n_full + tl.cumsum(full, 0) - full, walked, full != 0)
        tl.store(out + n_live + tl.cumsum(partial, 0) - partial, walked, partial != 0)
        n_full += tl.sum(full, axis=0)
        n_live += tl.sum(partial, axis=0)
    tl.store(n_full_ptr + pid, n_full)
    tl.store(n_live_ptr + pid, n_live)


class Walk(NamedTuple):
    """Which blocks a call visits, and by which rule its partial blocks are masked."""

    terms: Tensor           # (n_terms, FIELDS) int32
    grid: Tensor            # (n_lists, row_blocks, col_blocks) int8 of chosen blocks, or empty
    low: int                # the window: low <= query - key <= high
    high: int
    n_sinks: int            # no more than there are keys
    from_terms: bool        # whether the lists come from the terms: no window, no chosen blocks
    rule: tuple             # inside blocks, as `rule_of` has it; (): that window and those sinks
    block_q: int
    block_k: int
    n_q: int
    n_k: int

    @property
    def listed(self) -> bool:
        return self.from_terms or len(self.grid) > 0

    def lists(
        self, *, of_keys: bool, fill: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """blocks, n_full and n_live of every block of queries (of keys), and lists a KV head.

        What lies behind the end of a list is `fill`, or anything.
        """
        n_rows, n_cols = ceil_div(self.n_q, self.block_q), ceil_div(self.n_k, self.block_k)
        n_owners, n_walked = (n_cols, n_rows) if of_keys else (n_rows, n_cols)
        n_lists = max(1, len(self.grid))
        new = self.terms.new_empty
        blocks, n_full = new(n_lists, n_owners, n_walked), new(n_lists, n_owners)
        n_live = torch.empty_like(n_full)
        if fill is not None:
            blocks.fill_(fill)
        width = max(16, min(1024, triton.next_power_of_2(n_walked)))
        _list_kernel[(n_lists * n_owners,)](
            self.terms, self.grid, blocks, n_full, n_live,
            len(self.terms), self.n_q, self.n_k, n_owners, n_walked,
            BLOCK_Q=self.block_q, BLOCK_K=self.block_k, FROM_TERMS=len(self.grid) == 0,
            OF_KEYS=of_keys, WIDTH=width, ONCE=n_walked <= width,
            num_warps=max(1, min(8, width // 128)),
        )  # fmt: skip
        return blocks, n_full, n_live, 0 if n_lists == 1 else n_owners

    def arguments(self, lists: tuple[Tensor, Tensor, Tensor, int] | None) -> tuple[tuple, dict]:
        """Pointers of the lists and terms, then scalars, then constants, of a kernel."""
        blocks, n_full, n_live, list_head = lists or (self.terms, self.terms, self.terms, 0)
        n_terms = len(self.terms)
        constants = {
            "LISTED": self.listed, "SINKS": self.n_sinks > 0,
            "RULE": self.rule, "LOOP": 0 < len(self.rule) < 2 * n_terms,
            "BLOCK_Q": self.block_q, "BLOCK_K": self.block_k,
        }  # fmt: skip
        scalars = (list_head, n_terms, self.low, self.high, self.n_sinks)
        return ((blocks, n_full, n_live, self.terms), scalars), constants


def walk_from(
    q: Tensor, k: Tensor, grid: Tensor, terms: str, block_q: int, block_k: int
) -> Walk:
    """The walk of a call: `terms` are what `numbers_of` makes, as text; `grid` of chosen blocks.

    Blocks of size 0 are chosen here: torch.compile cannot trace what asks for the GPU's facts.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    walk = _walk(terms, block_q, block_k, n_q, n_k, len(grid) > 0, q.device)
    return walk._replace(grid=grid)


@lru_cache(maxsize=64)
def _walk(
    terms: str, block_q: int, block_k: int, n_q: int, n_k: int, chosen: bool,
    device: torch.device,
) -> Walk:  # fmt: skip
    """`walk_from`, where another tensor stands for the grid.

    Kept: hundreds of terms take the host milliseconds.
    """
    numbers = tuple(map(int, terms.split(",")))
    if block_q == 0:
        block_q = block_k = choose_block(numbers)
    window = _as_window(numbers)
    from_terms = window is None and not chosen
    if from_terms and (n_k - n_q) % block_q == 0 and _is_whole(numbers, block_q, block_k):
        window = -FAR, FAR, 0       # only the end of the text makes a block partial
    low, high, n_sinks = window or (0, 0, 0)
    table = table_of(numbers, device)
    return Walk(
        table, table, low, high, min(n_sinks, n_k), from_terms,
        rule_of(numbers) if window is None else (), block_q, block_k, n_q, n_k,
    )  # fmt: skip


def rule_of(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """The kinds of every term's first and second band: what a kernel is compiled for.

    More than MOST_UNROLLED terms become one, whose bands forbid whatever one of theirs does.
    """
    kinds = []
    for i in range(0, len(numbers), 8):
        grain, low, high, step, row_begin, row_end, col_begin, col_end = numbers[i : i + 8]
        forbids = (
            (LOW, low > -FAR), (HIGH, high < FAR), (STEP, step != 1), (GRAIN, grain != 1),
            (ROWS, row_begin > -FAR or row_end < FAR), (COLS, col_begin > -FAR or col_end < FAR),
        )  # fmt: skip
        kinds.append(sum(bit.value for bit, so in forbids if so))
    if len(kinds) > 2 * MOST_UNROLLED:
        kinds = [reduce(or_, kinds[::2]), reduce(or_, kinds[1::2])]
    return tuple(kinds)


def kind_of(rule: tuple[int, ...]) -> str:
    """What tiles depend on: "window", "terms", or "terms that divide" (of steps or of blocks)."""
    divides = any((STEP.value | GRAIN.value) & kind for kind in rule)
    return "terms that divide" if divides else "terms" if rule else "window"


def _is_whole(numbers: tuple[int, ...], block_q: int, block_k: int) -> bool:
    """Whether every band holds all of a block of the lists or nothing of it."""
    bands = [numbers[i : i + 8] for i in range(0, len(numbers), 8)]
    grains = [band[0] for band in bands if band != EVERYTHING]
    return all(grain % block_q == 0 and grain % block_k == 0 for grain in grains)


def numbers_of(terms) -> tuple[int, ...]:
    """The terms as rows of a table, two bands each: the second one holds all if there is none.

    Raises:
        BadInput: a term joins blocks of three sizes.
    """
    flat = []
    for term in terms or ((NOTHING,),):
        require(
            len(term) <= 2,
            "the kernels take rules over tokens and blocks of one size, or blocks of two sizes, "
            f"joined by &; got sizes {[band[0] for band in term]}",
        )
        for band in (*term, EVERYTHING)[:2]:
            flat += [max(-FAR, min(FAR, x)) for x in band]
    return tuple(flat)


@lru_cache(maxsize=64)
def table_of(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device).view(-1, FIELDS.value)


def _as_window(numbers: tuple[int, ...]) -> tuple[int, int, int] | None:
    """(low, high, n_sinks) if the terms are a window of whole diagonals, with or without sinks.

    A window with sinks holds the query's own key: the sinks beyond it are all on one side.
    """
    window, second, *others = (numbers[i : i + 8] for i in range(0, len(numbers), 8))
    if second != EVERYTHING or (window[0], *window[3:]) != (1, 1, -FAR, FAR, -FAR, FAR):
        return None
    if not others:
        return window[1], window[2], 0
    sinks = others[0]
    if len(others) > 2 or others[1] != EVERYTHING or sinks[:7] != (1, 0, FAR, 1, -FAR, FAR, -FAR):
        return None
    if not window[1] <= 0 <= window[2]:
        return None
    return window[1], window[2], sinks[7]


def choose_block(numbers: tuple[int, ...]) -> int:
    """Tokens of a block of the lists: less than a tile's where the rule is of blocks."""
    size = 32 if gpu_facts() is None else 64
    grain = math.gcd(*(grain for grain in numbers[::8] if grain > 1))
    if gpu_facts() is not None and grain and grain % 128 == 0:
        size = 128
    while grain and size > 16 and grain % size:
        size //= 2
    return size


@jit
def _grid_kernel(
    blocks_ptr, n_full_ptr, n_live_ptr, grid_ptr,       # lists, and their grid, zeros before
    most, n_cols,
    WIDTH: tl.constexpr,
):
    """One program: one list back into its row of the grid."""
    pid = tl.program_id(0).to(tl.int64)
    n_full, n_live = tl.load(n_full_ptr + pid), tl.load(n_live_ptr + pid)
    for begin in range(0, most, WIDTH):
        i = begin + tl.arange(0, WIDTH)                                 # (WIDTH,)
        block = tl.load(blocks_ptr + pid * most + i, i < n_live, other=0)
        state = tl.where(i < n_full, FULL, PARTIAL).to(tl.int8)
        tl.store(grid_ptr + pid * n_cols + block, state, i < n_live)


def grid_of(lists: BlockLists) -> Tensor:
    """(n_lists, row_blocks, col_blocks) int8: 0, PARTIAL or FULL."""
    n_rows, most = lists.blocks.shape[-2:]
    n_cols = ceil_div(lists.n_k, lists.tile_k)
    n_lists = lists.blocks[..., 0, 0].numel()
    grid = torch.zeros(n_lists, n_rows, n_cols, dtype=torch.int8, device=lists.blocks.device)
    _grid_kernel[(n_lists * n_rows,)](
        lists.blocks.contiguous(), lists.n_full.contiguous(), lists.n_live.contiguous(), grid,
        most, n_cols, WIDTH=max(16, min(1024, triton.next_power_of_2(most))), num_warps=1,
    )  # fmt: skip
    return grid


@jit
def select_kernel(
    scores_ptr,                     # (n_lists, n_rows, n_cols) float32
    terms_ptr, n_terms,             # blocks that hold none of these pairs are never chosen
    always_ptr, n_always,           # blocks that hold one of these are always
    grid_ptr,                       # (n_lists, n_rows, n_cols) int8, the result
    n_q, n_k, n_rows, n_cols, n_blocks,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ALWAYS: tl.constexpr, WIDTH: tl.constexpr,
):
    """One program: the `n_blocks` best blocks of one row; of equals the first."""
    pid = tl.program_id(0).to(tl.int64)
    row = (pid % n_rows).to(tl.int32)
    col = tl.arange(0, WIDTH)                                           # (WIDTH,)
    state = _states(
        terms_ptr, grid_ptr, 0, row, 0, n_terms, n_q, n_k, n_rows, n_cols,
        BLOCK_Q, BLOCK_K, True, False, WIDTH,
    )
    chosen = col < 0
    if ALWAYS:
        kept = _states(
            always_ptr, grid_ptr, 0, row, 0, n_always, n_q, n_k, n_rows, n_cols,
            BLOCK_Q, BLOCK_K, True, False, WIDTH,
        )
        chosen = (kept > 0) & (state > 0)
    scores = tl.load(scores_ptr + pid * n_cols + col, col < n_cols, other=-float("inf"))
    scores = tl.where((state > 0) & (chosen == 0), scores, -float("inf"))
    for _ in range(n_blocks):
        best = tl.max(scores, axis=0)
        place = tl.min(tl.where(scores == best, col, WIDTH), axis=0)
        taken = (col == place) & (scores > -float("inf"))
        chosen = chosen | taken
        scores = tl.where(taken, -float("inf"), scores)
    tl.store(grid_ptr + pid * n_cols + col, tl.where(chosen, state, 0).to(tl.int8), col < n_cols)
