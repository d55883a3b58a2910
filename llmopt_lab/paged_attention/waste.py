"""How much of a KV memory holds no token: contiguous reservations against blocks.

Both allocators answer the same calls (`admit`, `grow`, `release`, `usage`), so one workload can be
replayed on each. They count token slots; no tensor is involved.
Source: Kwon et al. 2023, section 3.1 (reserved, internal and external fragmentation).
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llmopt_lab.core.errors import BadInput, OutOfBlocks, require
from llmopt_lab.core.memory import ceil_div
from llmopt_lab.paged_attention.records import Usage
from llmopt_lab.paged_attention.reference import BlockPool


def internal_waste(lengths: Sequence[int], block_size: int) -> float:
    """Share of the slots in the blocks of these sequences that hold no token.

    The last block of a sequence is on average half empty: (block_size - 1) / 2 slots a sequence.
    """
    require(block_size > 0, f"block_size must be positive; got {block_size}")
    require(all(n >= 0 for n in lengths), "lengths must not be negative")
    reserved = sum(ceil_div(n, block_size) * block_size for n in lengths)
    return 1 - sum(lengths) / reserved if reserved else 0.0


class ContiguousMemory:
    """One contiguous stretch of slots a request, reserved at admission, first fit.

    This is what serving looked like before paging: a request's keys and values are one tensor, so
    its full length must be reserved when it starts.
    """

    def __init__(self, n_slots: int):
        require(n_slots > 0, f"n_slots must be positive; got {n_slots}")
        self.n_slots = n_slots
        self.regions: dict[str, range] = {}     # reserved [start, stop)
        self.used: dict[str, int] = {}

    def holes(self) -> list[range]:
        """Stretches that nobody holds, in order."""
        taken = sorted(self.regions.values(), key=lambda r: r.start)
        ends = [0] + [r.stop for r in taken]
        starts = [r.start for r in taken] + [self.n_slots]
        return [range(a, b) for a, b in zip(ends, starts, strict=True) if a < b]

    def admit(self, name: str, n_tokens: int, n_most: int) -> bool:
        """Reserve `n_most` slots for a request of `n_tokens` so far; False if no hole fits."""
        require(name not in self.regions, f"request {name!r} is already here")
        require(
            0 <= n_tokens <= n_most, f"n_tokens must be 0 to n_most; got {n_tokens} and {n_most}"
        )
        hole = next((h for h in self.holes() if len(h) >= n_most), None)
        if hole is None:
            return False
        self.regions[name] = range(hole.start, hole.start + n_most)
        self.used[name] = n_tokens
        return True

    def grow(self, name: str) -> bool:
        """One more token; False if the reservation is full."""
        if self.used[name] == len(self.regions[name]):
            return False
        self.used[name] += 1
        return True

    def release(self, name: str) -> None:
        del self.regions[name], self.used[name]

    def usage(self) -> Usage:
        holes = [len(h) for h in self.holes()]
        reserved = self.n_slots - sum(holes)
        return Usage(sum(self.used.values()), reserved, sum(holes), max(holes, default=0))


class PagedMemory:
    """Blocks handed out as tokens come. Any free block serves any request: no external waste."""

    def __init__(self, n_slots: int, block_size: int):
        require(block_size > 0, f"block_size must be positive; got {block_size}")
        self.block_size = block_size
        self.pool = BlockPool(n_slots // block_size)
        self.tables: dict[str, list[int]] = {}
        self.used: dict[str, int] = {}

    def admit(self, name: str, n_tokens: int, n_most: int) -> bool:
        """Take blocks for `n_tokens`; False if there are too few. `n_most` does not matter."""
        require(name not in self.tables, f"request {name!r} is already here")
        try:
            self.tables[name] = self.pool.allocate(ceil_div(n_tokens, self.block_size))
        except OutOfBlocks:
            return False
        self.used[name] = n_tokens
        return True

    def grow(self, name: str) -> bool:
        """One more token, in a new block when the last is full; False if there is none."""
        if self.used[name] == len(self.tables[name]) * self.block_size:
            try:
                self.tables[name] += self.pool.allocate(1)
            except OutOfBlocks:
                return False
        self.used[name] += 1
        return True

    def release(self, name: str) -> None:
        for block in self.tables.pop(name):
            self.pool.release(block)
        del self.used[name]

    def usage(self) -> Usage:
        reserved = sum(len(table) for table in self.tables.values()) * self.block_size
        free = len(self.pool.free) * self.block_size
        return Usage(sum(self.used.values()), reserved, free, free)


@dataclass(frozen=True)
class Job:
    """One request of a workload: its prompt, and how far it really goes."""

    n_prompt: int
    n_new: int

    @property
    def n_total(self) -> int:
        return self.n_prompt + self.n_new


def workload(
    n_jobs: int, *, mean_prompt: int, mean_new: int, longest: int, rng: torch.Generator
) -> list[Job]:
    """Jobs with exponentially distributed lengths, many short and a few long, as in chat traffic.

    Prompt and continuation are cut at `longest` // 2 tokens each.
    """
    means = torch.tensor([[mean_prompt], [mean_new]])
    draws = torch.empty(2, n_jobs).exponential_(generator=rng)
    lengths = ((draws * means).long() + 1).clamp(max=longest // 2)
    return [Job(int(prompt), int(new)) for prompt, new in lengths.T]


@dataclass(frozen=True)
class Replay:
    """One workload on one allocator, step by step: a list entry a step."""

    usages: list[Usage]
    running: list[int]          # requests that decode together
    finished: int
    preempted: int

    @property
    def mean_running(self) -> float:
        """Average batch size: what the saved memory buys."""
        return sum(self.running) / len(self.running)

    def mean(self, attribute: str) -> float:
        """Average of one attribute of `Usage` over the steps."""
        return sum(getattr(u, attribute) for u in self.usages) / len(self.usages)


def replay(
    jobs: Sequence[Job],
    memory: ContiguousMemory | PagedMemory,
    *,
    n_steps: int,
    reserve: Callable[[Job], int] = lambda job: job.n_total,
) -> Replay:
    """Serve `jobs` in order for `n_steps` steps, each running request one token a step.

    `reserve` says how many slots a request asks for if it must be contiguous: the longest it may
    get, because nobody knows where it will stop; or, as an oracle would, its true length. A
    request that cannot grow preempts the youngest, which starts over later.

    Raises:
        BadInput: a job asks for less than its length, or does not fit the empty memory.
    """
    for job in jobs:
        require(reserve(job) >= job.n_total, f"{job} would reserve only {reserve(job)} slots")
    waiting = deque(range(len(jobs)))
    left: dict[int, int] = {}                   # job -> tokens to go, oldest first
    usages, batch, finished, preempted = [], [], 0, 0
    for _ in range(n_steps):
        while waiting:
            job = jobs[waiting[0]]
            if not memory.admit(str(waiting[0]), job.n_prompt, reserve(job)):
                break
            left[waiting.popleft()] = job.n_new
        if not left:
            if waiting:
                raise BadInput(f"the memory is too small for {jobs[waiting[0]]} alone")
            break
        usages.append(memory.usage())
        batch.append(len(left))
        for name in list(left):
            while name in left and not memory.grow(str(name)):
                youngest, _ = left.popitem()
                memory.release(str(youngest))
                waiting.appendleft(youngest)
                preempted += 1
            if name in left:
                left[name] -= 1
                if left[name] == 0:
                    del left[name]
                    memory.release(str(name))
                    finished += 1
    return Replay(usages, batch, finished, preempted)
