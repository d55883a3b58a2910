"""Sizes of a paged cache, and what happens to its blocks and requests: one record an event."""

from dataclasses import dataclass

import torch

from llmopt_lab.core.errors import require
from llmopt_lab.core.trace import Record


@dataclass(frozen=True)
class CacheConfig:
    """Sizes of a paged KV cache. A block number means the same block in every layer."""

    n_layers: int
    n_blocks: int
    block_size: int                         # tokens
    n_kv_heads: int
    d_head: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_blocks", "block_size", "n_kv_heads", "d_head"):
            size = getattr(self, name)
            require(
                isinstance(size, int) and size > 0, f"{name} must be a positive int; got {size!r}"
            )

    @property
    def bytes_per_token(self) -> int:
        """2 * layers * KV heads * d_head * bytes an element: keys and values of one token."""
        return 2 * self.n_layers * self.n_kv_heads * self.d_head * self.dtype.itemsize

    @property
    def bytes_per_block(self) -> int:
        return self.block_size * self.bytes_per_token

    @property
    def nbytes(self) -> int:
        """Of the whole pool."""
        return self.n_blocks * self.bytes_per_block


@dataclass(frozen=True)
class Allocated(Record):
    """`block` now holds logical block `logical` of sequence `seq`."""

    seq: str
    logical: int
    block: int

    def __str__(self) -> str:
        return f"allocate block {self.block} for {self.seq}, logical block {self.logical}"


@dataclass(frozen=True)
class Forked(Record):
    """`seq` starts with all `length` tokens of `parent`, in the same blocks."""

    parent: str
    seq: str
    length: int

    def __str__(self) -> str:
        return f"fork {self.parent} into {self.seq}: {self.length} tokens, none copied"


@dataclass(frozen=True)
class Shared(Record):
    """`seq` also reads `block`; `owners` sequences do now."""

    seq: str
    logical: int
    block: int
    owners: int

    def __str__(self) -> str:
        return f"share block {self.block} with {self.seq}; owners: {self.owners}"


@dataclass(frozen=True)
class CopiedOnWrite(Record):
    """`seq` was about to write a shared block, so it got a copy of its own."""

    seq: str
    logical: int
    source: int
    block: int

    def __str__(self) -> str:
        return f"copy block {self.source} to {self.block}: {self.seq} writes what it shared"


@dataclass(frozen=True)
class Extended(Record):
    """`seq` now has `length` tokens; the last `n_new` are about to be written."""

    seq: str
    length: int
    n_new: int

    def __str__(self) -> str:
        tokens = "token" if self.n_new == 1 else "tokens"
        return f"{self.seq} writes {self.n_new} {tokens}; it has {self.length} now"


@dataclass(frozen=True)
class Released(Record):
    """`seq` let go of `block`. Without owners it is free, or `cached` if its content is known."""

    seq: str
    block: int
    owners: int
    cached: bool

    def __str__(self) -> str:
        if self.owners:
            return f"{self.seq} releases block {self.block}; owners left: {self.owners}"
        state = "it stays cached for its content" if self.cached else "it is free"
        return f"{self.seq} releases block {self.block}; {state}"


@dataclass(frozen=True)
class Published(Record):
    """`block` is full and its content has a name: who starts with the same tokens may share it."""

    seq: str
    block: int
    digest: str

    def __str__(self) -> str:
        return f"block {self.block} of {self.seq} is full: publish it as {self.digest[:6]}"


@dataclass(frozen=True)
class PrefixHit(Record):
    """`seq` starts with content that is already in `block`: no compute, no new memory."""

    seq: str
    logical: int
    block: int
    owners: int

    def __str__(self) -> str:
        return f"{self.seq} finds its logical block {self.logical} in block {self.block}"


@dataclass(frozen=True)
class Evicted(Record):
    """The content of cached `block` was forgotten to make room: least recently used goes first."""

    block: int

    def __str__(self) -> str:
        return f"evict cached block {self.block}"


@dataclass(frozen=True)
class Refused(Record):
    """A request for blocks that the pool could not meet. Nothing changed."""

    seq: str
    needed: int
    available: int

    def __str__(self) -> str:
        return f"{self.seq} needs {self.needed} blocks, {self.available} available: refused"


@dataclass(frozen=True)
class Admitted(Record):
    """A waiting request starts, or is `resumed`, with blocks for all its tokens."""

    seq: str
    n_tokens: int
    n_reused: int           # of them, found in the prefix cache
    n_most: int             # tokens it may grow to: what a contiguous cache would reserve
    resumed: bool

    def __str__(self) -> str:
        verb = "resume" if self.resumed else "admit"
        return f"{verb} {self.seq}: {self.n_tokens} tokens, {self.n_reused} of them already cached"


@dataclass(frozen=True)
class Preempted(Record):
    """`seq` gave its blocks back so that an older request can go on; it waits to be recomputed."""

    seq: str
    n_tokens: int

    def __str__(self) -> str:
        return f"preempt {self.seq} at {self.n_tokens} tokens: blocks back, recompute later"


@dataclass(frozen=True)
class Finished(Record):
    """`seq` is complete."""

    seq: str
    n_generated: int

    def __str__(self) -> str:
        return f"{self.seq} is done: {self.n_generated} tokens generated"


@dataclass(frozen=True)
class Stepped(Record):
    """One pass of the model over the running requests: (name, new tokens of this pass) each."""

    number: int
    work: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        work = ", ".join(f"{name} {n}" for name, n in self.work)
        return f"pass {self.number} computes tokens: {work}"


# what to record of a real model, whose keys and values are too large for a trace
EVENTS = (
    Allocated, Forked, Shared, CopiedOnWrite, Extended, Released, Published, PrefixHit, Evicted,
    Refused, Admitted, Preempted, Finished, Stepped,
)  # fmt: skip


@dataclass(frozen=True)
class Usage(Record):
    """What a KV allocator holds at one moment, in tokens.

    used:         tokens that exist
    reserved:     slots handed out; reserved - used is internal fragmentation
    free:         slots nobody holds
    largest_hole: the most that one new request could get; free - largest_hole is external
                  fragmentation (0 when any free slot serves any request, as with blocks)
    """

    used: int
    reserved: int
    free: int
    largest_hole: int

    @property
    def internal_waste(self) -> float:
        """Share of the reserved slots that hold no token."""
        return 1 - self.used / self.reserved if self.reserved else 0.0

    @property
    def external_waste(self) -> float:
        """Share of the free slots that one large request could not get."""
        return 1 - self.largest_hole / self.free if self.free else 0.0

    def __str__(self) -> str:
        return (
            f"{self.used} tokens in {self.reserved} reserved slots, {self.free} free, "
            f"largest hole {self.largest_hole}"
        )
