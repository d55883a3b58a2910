"""A two-level memory, as the FlashAttention paper draws it: large and slow (HBM), small and fast.

A reference moves data between the two with `load` and `store`, exactly where its
Triton kernel calls `tl.load` and `tl.store`. Everything in between is on chip.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from llmopt_lab.core.trace import Record, record

Index = slice | int | Tensor | tuple


@dataclass(frozen=True)
class Load(Record):
    """`nbytes` bytes of the tensor called `name` were read from slow memory."""

    name: str
    where: Index
    nbytes: int

    def __str__(self) -> str:
        return f"load  {self.name}[{_text(self.where)}]  {self.nbytes:,} B"


@dataclass(frozen=True)
class Store(Record):
    """`nbytes` bytes were written to the tensor called `name` in slow memory."""

    name: str
    where: Index
    nbytes: int

    def __str__(self) -> str:
        return f"store {self.name}[{_text(self.where)}]  {self.nbytes:,} B"


def load(name: str, tensor: Tensor, where: Index) -> Tensor:
    """Read `tensor[where]` from slow memory."""
    tile = tensor[where]
    record(Load(name, where, tile.nbytes))
    return tile


def store(name: str, tensor: Tensor, where: Index, value: Tensor) -> None:
    """Write `value` to `tensor[where]` in slow memory."""
    tensor[where] = value
    record(Store(name, where, tensor[where].nbytes))


def tiles(length: int, size: int) -> Iterator[slice]:
    """Cut `range(length)` into slices of `size`; the last one may be shorter."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def ceil_div(a: int, b: int) -> int:
    """The least integer that is at least a / b."""
    return -(-a // b)


def _text(where: Index) -> str:
    if isinstance(where, slice):
        ends = (where.start, where.stop)
        return ":".join("" if end is None else str(end) for end in ends)
    if isinstance(where, tuple):
        return ", ".join(_text(part) for part in where)
    return str(where.tolist() if isinstance(where, Tensor) else where)
