"""Pictures of the block pool. Reads the trace only: nothing here allocates, shares or attends."""

from collections import Counter
from dataclasses import dataclass, field

from llmopt_lab.core.memory import ceil_div
from llmopt_lab.core.trace import Trace
from llmopt_lab.paged_attention.records import (
    Admitted,
    Allocated,
    CopiedOnWrite,
    Evicted,
    Extended,
    Finished,
    Forked,
    Preempted,
    PrefixHit,
    Published,
    Refused,
    Released,
    Shared,
    Stepped,
)
from llmopt_lab.widgets.panels import Arrows, Cell, Frame, Grid, Lanes, Meter, Span

N_OWNER_TONES = 8
POOL_COLUMNS = 16  # blocks a row when slots are not shown


@dataclass
class _Pool:
    """Who holds what, folded from the records seen so far."""

    n_blocks: int
    block_size: int
    tables: dict[str, list[int]] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    cached: set[int] = field(default_factory=set)
    tones: dict[str, str] = field(default_factory=dict)
    n_most: dict[str, int] = field(default_factory=dict)  # a contiguous cache would reserve these
    served: bool = False  # a scheduler admits: what requests may grow to is known
    touched: set[int] = field(default_factory=set)  # blocks that the latest record changed

    def apply(self, what) -> bool:
        """Fold one record in; False if it is none of this chapter's."""
        self.touched = set()
        match what:
            case Allocated(seq, _, block) | Shared(seq, _, block) | PrefixHit(seq, _, block):
                self.tables.setdefault(seq, []).append(block)
                self.tones.setdefault(seq, f"owner{len(self.tones) % N_OWNER_TONES}")
                self.cached.discard(block)
                self.touched = {block}
            case Forked(parent, seq, length):
                self.lengths[seq] = length
                if parent in self.n_most:
                    self.n_most[seq] = self.n_most[parent]
            case CopiedOnWrite(seq, logical, _, block):
                self.tables[seq][logical] = block
                self.touched = {block}
            case Extended(seq, length, n_new):
                first = (length - n_new) // self.block_size
                self.lengths[seq] = length
                self.touched = set(self.tables[seq][first:])
            case Released(seq, block, _, cached):
                self.tables[seq].remove(block)
                if not self.tables[seq]:
                    del self.tables[seq], self.lengths[seq]
                    self.n_most.pop(seq, None)
                if cached:
                    self.cached.add(block)
                self.touched = {block}
            case Evicted(block):
                self.cached.discard(block)
                self.touched = {block}
            case Published(_, block, _):
                self.touched = {block}
            case Admitted(seq, _, _, n_most):
                self.n_most[seq] = n_most
                self.served = True
            case Refused() | Preempted() | Finished() | Stepped():
                pass
            case _:
                return False
        return True

    def owners(self, block: int) -> list[str]:
        return [seq for seq, table in self.tables.items() if block in table]

    def filled(self, block: int) -> int:
        """Slots of `block` that hold a token of somebody."""
        most = 0
        for seq in self.owners(block):
            start = self.tables[seq].index(block) * self.block_size
            most = max(most, min(self.block_size, self.lengths.get(seq, 0) - start))
        return self.block_size if block in self.cached else max(most, 0)

    def tone(self, block: int) -> str:
        owners = self.owners(block)
        if len(owners) > 1:
            return "shared"
        if owners:
            return self.tones[owners[0]]
        return "cached" if block in self.cached else "idle"

    def note(self, block: int) -> str:
        owners = self.owners(block)
        if owners:
            return f"block {block}: {' and '.join(owners)}"
        return f"block {block}: {'cached, nobody reads it' if block in self.cached else 'free'}"

    def legend(self) -> tuple[tuple[str, str], ...]:
        names: dict[str, list[str]] = {}
        for seq, tone in self.tones.items():
            names.setdefault(tone, []).append(seq)
        owners = tuple((tone, ", ".join(seqs)) for tone, seqs in names.items())
        return (
            *owners, ("shared", "shared"), ("cached", "cached"), ("idle", "free")
        )  # fmt: skip


def frames(trace: Trace, *, n_blocks: int, block_size: int) -> list[Frame]:
    """One frame per change: every request's block table, the pool slot by slot, and the waste."""
    pool = _Pool(n_blocks, block_size)
    names = _names(trace)
    width = _widest_table(trace)
    result = []
    for step in trace.steps:
        if not pool.apply(step.what):
            continue
        tables = _tables(pool, names, width)
        slots = _slots(pool)
        seq = getattr(step.what, "seq", None)  # arrows of the one that acts: all would tangle
        pairs = tuple(
            ((0, names.index(seq), logical), (1, block, 0))
            for logical, block in enumerate(pool.tables.get(seq, ()))
        )
        result.append(
            Frame(
                str(step.what),
                (tables, slots, Arrows(pairs), *_meters(pool)),
                step.file,
                step.line,
                step.index,
                (*pool.legend(), ("new", "just changed")),
            )
        )
    return result


def serving_frames(trace: Trace, *, n_blocks: int, block_size: int) -> list[Frame]:
    """One frame per pass of the model: who ran since the start, and who holds which block now."""
    pool = _Pool(n_blocks, block_size)
    names = _names(trace)
    spans: dict[str, list[Span]] = {name: [] for name in names}
    events: list[str] = []
    result = []
    for step in trace.steps:
        if not pool.apply(step.what):
            continue
        match step.what:
            case Admitted() | Preempted() | Finished() | Refused() | Forked() | CopiedOnWrite():
                events.append(str(step.what))
        if isinstance(step.what, Preempted):
            spans[step.what.seq].append(Span(len(result), len(result) + 1, "", "bad"))
        if not isinstance(step.what, Stepped):
            continue
        now = step.what.number - 1
        for name, n_tokens in step.what.work:
            tone = "new" if n_tokens > 1 else pool.tones.get(name, "active")
            spans[name].append(Span(now, now + 1, "", tone))
        lanes = Lanes(
            "passes of the model",
            tuple(names),
            tuple(tuple(_merged(spans[name])) for name in names),
            "",
            now + 1,
        )
        happened = "; ".join(f"{t} ({n} times)" if n > 1 else t for t, n in Counter(events).items())
        caption = f"{step.what}." + (f" Before it: {happened}." if happened else "")
        events = []
        panels = (lanes, _blocks(pool), *_meters(pool))
        legend = (*pool.legend(), ("new", "several tokens at once"), ("bad", "preempted"))
        result.append(Frame(caption, panels, step.file, step.line, step.index, legend))
    return result


def _names(trace: Trace) -> list[str]:
    """Sequences in the order in which they first appear."""
    seqs = (getattr(step.what, "seq", None) for step in trace.steps)
    return list(dict.fromkeys(seq for seq in seqs if seq is not None))


def _widest_table(trace: Trace) -> int:
    kinds = (Allocated, Shared, PrefixHit)
    return 1 + max((what.logical for what in trace.of(*kinds)), default=0)


def _tables(pool: _Pool, names: list[str], width: int) -> Grid:
    """One row a request: the physical block of each logical block."""
    rows = []
    for name in names:
        table = pool.tables.get(name, [])
        cells = [
            Cell(str(b), "new" if b in pool.touched else pool.tone(b), f"logical {i}: block {b}")
            for i, b in enumerate(table)
        ]
        cells += [Cell("", "idle", f"logical {i}: none") for i in range(len(table), width)]
        rows.append(tuple(cells))
    return Grid("block tables", tuple(names), tuple(rows), tuple(map(str, range(width))))


def _slots(pool: _Pool) -> Grid:
    """One row a block, one cell a slot: the owner where a token is, a dot where one may go."""
    rows = []
    for block in range(pool.n_blocks):
        owners, filled = pool.owners(block), pool.filled(block)
        tone = "new" if block in pool.touched and owners else pool.tone(block)
        text = "+".join(owners)
        cells = [Cell(text, tone, f"{pool.note(block)}, slot {i}") for i in range(filled)]
        waste = "·" if owners else ""
        cells += [
            Cell(waste, "idle", f"{pool.note(block)}, slot {i} is empty")
            for i in range(filled, pool.block_size)
        ]
        rows.append(tuple(cells))
    labels = tuple(f"block {b}" for b in range(pool.n_blocks))
    return Grid("physical blocks", labels, tuple(rows), tuple(map(str, range(pool.block_size))))


def _blocks(pool: _Pool) -> Grid:
    """The whole pool, one cell a block, for pools too large to show their slots."""
    n_rows = ceil_div(pool.n_blocks, POOL_COLUMNS)
    rows = []
    for first in range(0, pool.n_blocks, POOL_COLUMNS):
        blocks = range(first, min(first + POOL_COLUMNS, pool.n_blocks))
        rows.append(tuple(_block_cell(pool, b) for b in blocks))
    labels = tuple(f"{i * POOL_COLUMNS}" for i in range(n_rows))
    columns = tuple(f"+{i}" for i in range(min(POOL_COLUMNS, pool.n_blocks)))
    return Grid("physical blocks", labels, tuple(rows), columns)


def _block_cell(pool: _Pool, block: int) -> Cell:
    owners = pool.owners(block)
    text = owners[0] if len(owners) == 1 else f"×{len(owners)}" if owners else ""
    return Cell(text, pool.tone(block), pool.note(block))


def _meters(pool: _Pool) -> tuple[Meter, ...]:
    owned = [b for b in range(pool.n_blocks) if pool.owners(b)]
    reserved = len(owned) * pool.block_size
    used = sum(pool.filled(b) for b in owned)
    meters = (
        Meter("blocks in use", len(owned), "blocks", pool.n_blocks),
        Meter("reserved, without a token", reserved - used, "slots", reserved, "bad"),
    )
    if not pool.served:
        return meters
    contiguous = sum(pool.n_most.values())  # nothing shared, everything reserved at admission
    written = sum(pool.lengths.get(seq, 0) for seq in pool.n_most)
    title = "contiguous: without a token"
    return (*meters, Meter(title, contiguous - written, "slots", contiguous or None, "bad"))


def _merged(spans: list[Span]) -> list[Span]:
    """Neighbouring unlabelled spans of one tone as one, so that a long run is one bar."""
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        alike = last and not span.text and not last.text and last.tone == span.tone
        if alike and last.end == span.start:
            merged[-1] = Span(last.start, span.end, "", span.tone)
        else:
            merged.append(span)
    return merged
