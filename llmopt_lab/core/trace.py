"""Record what an algorithm did, so that a picture can replay it.

    with recording() as trace:
        out = paged_attention(q, ...)
    print(trace)                          # one line per step
    trace.total("nbytes", Load)           # bytes read from slow memory

A reference marks a moment worth seeing with a line of its own:

    record(Allocated(seq, logical, block))

`record` returns nothing and changes nothing. Delete every such line and the
algorithm computes the same bits; `tests/test_architecture.py` does exactly that.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from llmopt_lab.core.errors import BadInput, TraceTooLarge, require

MAX_ELEMENTS = 1 << 16  # per recorded tensor; traces are for toy sizes
FORMAT_VERSION = 1  # of a saved trace


class Record:
    """Base of the frozen dataclasses a reference may record. `str(r)` is the step's caption."""

    _kinds: dict[str, type["Record"]] = {}

    def __init_subclass__(cls) -> None:
        Record._kinds[_name_of(cls)] = cls


@dataclass(frozen=True)
class Step:
    """One recorded moment: what happened, and the line of source that said so."""

    index: int
    what: Record
    file: str
    line: int


@dataclass
class Trace:
    """The steps of one run, in order. Counters are derived from steps, never kept beside them."""

    steps: list[Step] = field(default_factory=list)
    only: tuple[type[Record], ...] = ()

    def __len__(self) -> int:
        return len(self.steps)

    def of(self, *kinds: type[Record]) -> list[Record]:
        """The recorded values of these kinds, in order."""
        return [step.what for step in self.steps if isinstance(step.what, kinds)]

    def total(self, attribute: str, *kinds: type[Record]) -> int:
        """Sum of one attribute over the recorded values of these kinds."""
        return sum(getattr(what, attribute) for what in self.of(*kinds))

    def __str__(self) -> str:
        return "\n".join(f"{s.index:4d}  {s.what}" for s in self.steps)

    def save(self, path: str | Path) -> None:
        """Write the trace to one safetensors file: tensors as they are, the steps as JSON."""
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}
        steps = [
            {"file": s.file, "line": s.line, "what": _encode(s.what, tensors)} for s in self.steps
        ]
        metadata = {"format": "llmopt-trace", "version": str(FORMAT_VERSION)}
        # safetensors refuses an empty file, so an empty trace carries one empty tensor
        metadata["steps"] = json.dumps(steps)
        save_file(tensors or {"empty": torch.empty(0)}, path, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read what `save` wrote.

        Raises:
            BadInput: not a trace, a trace of a newer version, or of a record this package lacks.
        """
        from safetensors import SafetensorError, safe_open

        require(Path(path).is_file(), f"no trace at {path}: the file does not exist")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as broken:
            raise BadInput(f"{path} is not a saved trace: {broken}") from broken
        require(
            metadata.get("format") == "llmopt-trace",
            f"{path} holds tensors but no trace; write traces with Trace.save",
        )
        version = int(metadata["version"])
        require(
            version <= FORMAT_VERSION,
            f"{path} is a trace of version {version}; this package reads up to {FORMAT_VERSION}. "
            "Upgrade llmopt_lab.",
        )
        trace = cls()
        for index, step in enumerate(json.loads(metadata["steps"])):
            what = _decode(step["what"], tensors)
            trace.steps.append(Step(index, what, step["file"], step["line"]))
        return trace


_open: ContextVar[Trace | None] = ContextVar("open_trace", default=None)


@contextmanager
def recording(*only: type[Record]) -> Iterator[Trace]:
    """Collect every `record` made inside the block, or those of the kinds named in `only`.

    Blocks nest; the innermost one collects. On a real model, name the small kinds you want to
    see: a trace holds at most 65,536 elements a tensor.
    """
    trace = Trace(only=only)
    token = _open.set(trace)
    try:
        yield trace
    finally:
        _open.reset(token)


def open_trace() -> Trace | None:
    """The trace that `record` adds to now, or None."""
    return _open.get()


def record(what: Record) -> None:
    """Add a copy of `what` to the open trace; do nothing when no trace is open."""
    trace = _open.get()
    if trace is not None and (not trace.only or isinstance(what, trace.only)):
        file, line = _caller()
        trace.steps.append(Step(len(trace), _copy(what), file, line))


@dataclass(frozen=True)
class Divergence:
    """Where two runs part. `index` counts steps; a run that ended has None there."""

    index: int
    reference: Step | None
    attempt: Step | None

    def __str__(self) -> str:
        want = str(self.reference.what) if self.reference else "the reference is done"
        got = str(self.attempt.what) if self.attempt else "your run is already over"
        return f"step {self.index}: expected: {want}; yours: {got}"


def first_divergence(
    reference: Trace, attempt: Trace, *kinds: type[Record], rtol: float = 1e-5, atol: float = 1e-6
) -> Divergence | None:
    """The first step at which `attempt` does something else than `reference`, or None.

    `kinds` restricts the comparison (indices then count the steps of these kinds).
    Tensors count as equal within `rtol` and `atol`; everything else must be equal.
    """
    kinds = kinds or (Record,)
    ours = [s for s in reference.steps if isinstance(s.what, kinds)]
    theirs = [s for s in attempt.steps if isinstance(s.what, kinds)]
    for index in range(max(len(ours), len(theirs))):
        want = ours[index] if index < len(ours) else None
        got = theirs[index] if index < len(theirs) else None
        if want is None or got is None or not _same(want.what, got.what, rtol, atol):
            return Divergence(index, want, got)
    return None


def _same(a, b, rtol: float, atol: float) -> bool:
    if isinstance(a, Record):
        return type(a) is type(b) and all(
            _same(getattr(a, f.name), getattr(b, f.name), rtol, atol) for f in fields(a)
        )
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.allclose(
            a.double(), b.double(), rtol, atol, equal_nan=True
        )
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return False
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y, rtol, atol) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or abs(a - b) <= atol + rtol * abs(b)
    return a == b


def _copy(what: Record) -> Record:
    """Tensors are copied to the CPU now, so that later writes cannot change the past."""
    copies = {}
    for f in fields(what):
        value = getattr(what, f.name)
        copied = _copy_value(value, f"{type(what).__name__}.{f.name}")
        if copied is not value:
            copies[f.name] = copied
    return replace(what, **copies)


def _copy_value(value, name: str):
    if isinstance(value, torch.Tensor):
        if value.numel() > MAX_ELEMENTS:
            raise TraceTooLarge(
                f"{name} has {value.numel():,} elements; "
                f"a trace holds at most {MAX_ELEMENTS:,}. Record a smaller example, "
                "or name the kinds to keep: recording(Allocated, ...)."
            )
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Record):
        return _copy(value)
    if isinstance(value, list):
        return [_copy_value(v, name) for v in value]
    if isinstance(value, tuple):
        return tuple(_copy_value(v, name) for v in value)
    return value


def _caller() -> tuple[str, int]:
    """The nearest frame outside this package's core: the line of the algorithm itself."""
    frame = sys._getframe(2)
    not_algorithm = (f"{__package__}.", "jaxtyping.", "beartype.")  # tests check types in between
    while frame.f_globals.get("__name__", "").startswith(not_algorithm) and frame.f_back:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _name_of(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _encode(value, tensors: dict[str, torch.Tensor]):
    """`value` as JSON; tensors go into `tensors` and leave their key behind."""
    if isinstance(value, torch.Tensor):
        key = f"t{len(tensors)}"
        tensors[key] = value.contiguous()
        return {"tensor": key}
    if isinstance(value, Record):
        content = {f.name: _encode(getattr(value, f.name), tensors) for f in fields(value)}
        return {"record": _name_of(type(value)), "fields": content}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v, tensors) for v in value]}
    if isinstance(value, list):
        return [_encode(v, tensors) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise BadInput(
        f"a record field of type {type(value).__name__} cannot be saved; "
        "use tensors, numbers, strings, slices, tuples, lists or records"
    )


def _decode(value, tensors: dict[str, torch.Tensor]):
    match value:
        case {"tensor": key}:
            return tensors[key]
        case {"record": name, "fields": content}:
            return _kind(name)(**{k: _decode(v, tensors) for k, v in content.items()})
        case {"slice": [start, stop, step]}:
            return slice(start, stop, step)
        case {"tuple": items}:
            return tuple(_decode(v, tensors) for v in items)
        case list():
            return [_decode(v, tensors) for v in value]
    return value


def _kind(name: str) -> type[Record]:
    """The record class of that name. Imports only from this package: a file must not run code."""
    module, _, _ = name.partition(":")
    if name not in Record._kinds and module.startswith("llmopt_lab."):
        with suppress(ImportError):
            importlib.import_module(module)
    require(name in Record._kinds, f"the trace holds {name}, which this package does not have")
    return Record._kinds[name]
