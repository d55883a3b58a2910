"""Pictures of attention, tile by tile. Reads the trace only: nothing here scores or absorbs.

with recording() as trace:
    flash_attention(q, k, v, causal=True, tile_q=2, tile_k=2)      # one head
Player(frames(trace), versus=in_step(naive_frames(naive_trace), len(frames(trace))))
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import Load, Store, ceil_div, tiles
from llmopt_lab.core.trace import Record, Step, Trace
from llmopt_lab.flash_attention.records import (
    Absorbed,
    Finished,
    Merged,
    Normalized,
    Partial,
    Scored,
    Skipped,
    SplitDone,
    Weighted,
)
from llmopt_lab.widgets.panels import Cell, Frame, Grid, Meter

MAX_CELLS = 12  # a side of a grid: beyond it, a row or column stands for a tile
TILED = (Absorbed, Skipped, Finished, SplitDone, Merged)
NAIVE = (Scored, Normalized, Weighted)
LEGEND = (
    ("new", "this step"),
    ("active", "absorbed, then dropped"),
    ("bad", "computed, then masked"),
    ("cached", "skipped: never read"),
    ("good", "in HBM"),
    ("shared", "merged"),
    ("idle", "not reached"),
)
NAIVE_LEGEND = (
    ("new", "this step"),  # the words of LEGEND: beside each other, both runs share one legend
    ("good", "in HBM"),
    ("bad", "computed, then masked"),
    ("idle", "not reached"),
)


@dataclass
class _Memory:
    """Bytes, added up from loads and stores."""

    moved: int = 0  # between HBM and chip
    loaded: dict[str, int] = field(default_factory=dict)  # name -> bytes of its latest load
    extra: dict[tuple[str, str], int] = field(default_factory=dict)  # HBM beside Q, K, V and O

    def fold(self, what: Load | Store) -> None:
        self.moved += what.nbytes
        if isinstance(what, Load):
            self.loaded[what.name] = what.nbytes
        elif what.name != "O":
            self.extra[what.name, str(what.where)] = what.nbytes

    def of_tiles(self, names: str) -> int:
        """Bytes of the latest tile of each of these; 0 for what the run did not load."""
        return sum(self.loaded.get(name, 0) for name in names)

    def meters(self, moved_before: int, naive_nbytes: int | None) -> tuple[Meter, Meter]:
        tone = "new" if self.moved > moved_before else "active"
        return (
            Meter("HBM traffic", self.moved, "bytes", naive_nbytes, tone),
            Meter("HBM beside Q, K, V, O", sum(self.extra.values()), "bytes"),
        )


@dataclass
class _Tiles:
    """The score grid and the running softmax, folded from the records seen so far.

    A row stands for one query or a tile of them, a column for one key or a tile of them.
    """

    rows: list[slice]
    cols: list[slice]
    d_v: int
    n_parts: int  # of split-KV, 0 without
    scores: dict[tuple[int, int], Cell] = field(default_factory=dict)
    softmax: dict[int, tuple[Cell, ...]] = field(default_factory=dict)
    m: dict[int, Tensor] = field(default_factory=dict)  # by first query of a tile
    rescaled: str = ""  # what the latest tile did to older sums
    tile_nbytes: int = 0  # scores on chip
    state_nbytes: int = 0  # m, total and acc on chip
    parts: dict[int, Partial] = field(default_factory=dict)  # in HBM
    n_merged: int = 0  # of them

    def fold(self, what: Record) -> None:
        self._drop_tile()
        match what:
            case Absorbed():
                self._absorb(what)
            case Skipped(rows, cols):
                for at in self._cells(rows, cols):
                    self.scores[at] = Cell("", "cached")
            case Finished(rows, result):
                for i in _inside(self.rows, rows):
                    row = self.rows[i].start - rows.start
                    blind = result.lse[row] == -math.inf  # it saw no key
                    known = [c.text for c in self.softmax.get(i, ())][:3]
                    known = known or (["−∞", "", "0"] if blind else ["", "", ""])
                    self.softmax[i] = self._row(i, [*known, *map(_short, result.out[row])], "good")
                self.state_nbytes = 0
            case SplitDone(split, _, part):
                self.parts[split] = part
                self.softmax.clear()
                self.m.clear()  # the next part knows nothing of this one
                self.state_nbytes = 0
            case Merged():
                self.n_merged = max(self.n_merged, 1) + 1

    def _absorb(self, what: Absorbed) -> None:
        state, top, left = what.state, what.rows.start, what.cols.start
        before = self.m.get(top, state.m.new_full(state.m.shape, -math.inf))
        self.m[top] = state.m
        shrinks = [  # without a key yet there is no sum to rescale
            None if old == -math.inf else shrink
            for old, shrink in zip(before.tolist(), (before - state.m).exp().tolist(), strict=True)
        ]
        n_moved = sum(x is not None and x < 1 for x in shrinks)
        self.rescaled = f"; {n_moved} of {len(shrinks)} queries rescale" if n_moved else ""
        self.tile_nbytes = what.scores.nbytes
        self.state_nbytes = state.m.nbytes + state.total.nbytes + state.acc.nbytes
        for i, cells in self.softmax.items():  # of another tile of queries
            if cells[0].tone == "new":
                self.softmax[i] = tuple(Cell(c.text, "good", c.note) for c in cells)
        for i in _inside(self.rows, what.rows):
            row = self.rows[i].start - top
            shrink = "" if shrinks[row] is None else f"×{_short(shrinks[row])}"
            words = [_short(state.m[row]), shrink, _short(state.total[row])]
            self.softmax[i] = self._row(i, [*words, *map(_short, state.acc[row])], "new")
        for i, j in self._cells(what.rows, what.cols):
            require(
                (i, j) not in self.scores,
                f"{self._name(i, j)}: scored twice in this trace, so it holds several heads or "
                "runs. Record one head: flash_attention(q[0, 0], k[0, 0], v[0, 0]).",
            )
            rows, cols = self.rows[i], self.cols[j]
            value = what.scores[
                rows.start - top : rows.stop - top, cols.start - left : cols.stop - left
            ].max()
            tone = "bad" if value == -math.inf else "new"
            self.scores[i, j] = Cell(_short(value), tone, f"{self._name(i, j)}: {_short(value)}")

    def _drop_tile(self) -> None:
        """The scores on chip make room for the next ones."""
        self.rescaled, self.tile_nbytes = "", 0
        for at, cell in self.scores.items():
            if cell.tone == "new":
                self.scores[at] = Cell("", "active")
            elif cell.tone == "bad":
                self.scores[at] = Cell("", "bad")

    def grids(self) -> Iterator[Grid]:
        rows, cols = tuple(f"q {_text(r)}" for r in self.rows), tuple(map(_text, self.cols))
        fine = len(rows) == self.rows[-1].stop and len(cols) == self.cols[-1].stop
        empty = Cell()
        scores = tuple(
            tuple(self.scores.get((i, j), empty) for j in range(len(cols)))
            for i in range(len(rows))
        )
        yield Grid("scores" if fine else "largest score of each tile", rows, scores, cols)
        columns = self._columns()
        softmax = tuple(self.softmax.get(i, (empty,) * len(columns)) for i in range(len(rows)))
        title = "running softmax" if fine else "running softmax of each tile's first query"
        yield Grid(title, rows, softmax, columns)
        if self.n_parts:
            names = tuple(f"part {i}" for i in range(self.n_parts))
            yield Grid("parts in HBM: L", names, tuple(map(self._part, range(self.n_parts))), rows)

    def _part(self, split: int) -> tuple[Cell, ...]:
        """L of every query over the keys of one part."""
        if split not in self.parts:
            return (Cell(),) * len(self.rows)
        tone = "shared" if split < self.n_merged else "good"
        words = [_short(self.parts[split].lse[r.start]) for r in self.rows]
        state = "merged" if split < self.n_merged else "waits to be merged"
        return tuple(Cell(w, tone, f"part {split}: L {w}, {state}") for w in words)

    def _columns(self) -> tuple[str, ...]:
        return ("m", "shrink", "total", *(f"acc {i}" for i in range(self.d_v)))

    def _row(self, i: int, words: Sequence[str], tone: str) -> tuple[Cell, ...]:
        name = f"query {self.rows[i].start}"
        names = self._columns()
        return tuple(
            Cell(w, tone, f"{name}: {n} {w}" if w else "")
            for n, w in zip(names, words, strict=True)
        )

    def _cells(self, rows: slice, cols: slice) -> list[tuple[int, int]]:
        return [(i, j) for i in _inside(self.rows, rows) for j in _inside(self.cols, cols)]

    def _name(self, i: int, j: int) -> str:
        return f"query {_text(self.rows[i])}, key {_text(self.cols[j])}"


def frames(
    trace: Trace, *, naive_nbytes: int | None = None, budget: int | None = None
) -> list[Frame]:
    """One frame a tile: scores, running softmax, bytes. For `flash_attention` of one head,
    `key_outer_attention` of one head, and `split_kv_attention` of one KV head.

    Args:
        trace: of one run.
        naive_nbytes: what naive attention moves, to compare with.
        budget: bytes that fit on chip, to compare with.

    Raises:
        BadInput: the trace holds no tile, or several heads.
    """
    seen = trace.of(Absorbed, Skipped)
    require(
        any(isinstance(what, Absorbed) for what in seen),
        "no tile in this trace: call flash_attention inside `with recording() as trace:`",
    )
    d_v = next(what.state.acc.shape[1] for what in seen if isinstance(what, Absorbed))
    grid = _Tiles(
        _units([what.rows for what in seen]),
        _units([what.cols for what in seen]),
        d_v,
        len(trace.of(SplitDone)),
    )
    memory, result, n_before = _Memory(), [], 0
    for step in trace.steps:
        if isinstance(step.what, (Load, Store)):
            memory.fold(step.what)
        if not isinstance(step.what, TILED):
            continue
        grid.fold(step.what)
        held = "QKV" if grid.tile_nbytes else "Q" if grid.state_nbytes else ""
        on_chip = grid.tile_nbytes + grid.state_nbytes + memory.of_tiles(held)
        meters = memory.meters(n_before, naive_nbytes)
        chip = Meter("on chip", on_chip, "bytes", budget, "new" if on_chip else "active")
        caption = f"{step.what}{grid.rescaled}. {memory.moved:,} bytes moved so far."
        result.append(_frame(step, caption, (*grid.grids(), *meters, chip), LEGEND))
        n_before = memory.moved
    return result


def naive_frames(trace: Trace) -> list[Frame]:
    """One frame for each of the three steps of `naive_attention` of one head.

    Raises:
        BadInput: the trace does not hold exactly these three steps.
    """
    steps = trace.of(*NAIVE)
    require(
        [type(what) for what in steps] == list(NAIVE),
        "naive_frames shows the three steps of naive_attention of one head; "
        f"this trace has {len(steps)}",
    )
    hidden = steps[0].scores == -math.inf  # (n_q, n_k)
    matrices = dict(zip("SPO", (steps[0].scores, steps[1].p, steps[2].out), strict=True))
    memory, result, n_before = _Memory(), [], 0
    for step in trace.steps:
        if isinstance(step.what, (Load, Store)):
            memory.fold(step.what)
        if not isinstance(step.what, NAIVE):
            continue
        now = len(result)
        grids = []
        for i, (name, values) in enumerate(matrices.items()):
            tone = "new" if i == now else "good" if i < now else "idle"
            masked = hidden if name != "O" else None
            grids.append(_matrix(f"{name} in HBM", values, tone, masked))
        caption = f"{step.what}. {memory.moved:,} bytes moved so far."
        meters = memory.meters(n_before, None)
        result.append(_frame(step, caption, (*grids, *meters), NAIVE_LEGEND))
        n_before = memory.moved
    return result


def in_step(run: Sequence[Frame], n_frames: int) -> list[Frame]:
    """`run` at a slower pace: `n_frames` frames, each held for its share of them."""
    require(
        n_frames >= len(run) > 0,
        f"a run of {len(run)} frames cannot be shown in {n_frames}: show the longer run as it is",
    )
    return [run[i * len(run) // n_frames] for i in range(n_frames)]


def _frame(step: Step, caption: str, panels: tuple, legend: tuple) -> Frame:
    return Frame(caption, panels, step.file, step.line, step.index, legend)


def _matrix(title: str, values: Tensor, tone: str, masked: Tensor | None) -> Grid:
    """A whole matrix, at most MAX_CELLS a side: a cell shows the largest value it stands for."""
    rows, cols = (list(tiles(n, ceil_div(n, MAX_CELLS))) for n in values.shape)
    cells = []
    for r in rows:
        line = []
        for c in cols:
            look = "bad" if tone != "idle" and masked is not None and masked[r, c].all() else tone
            word = "" if tone == "idle" else _short(values[r, c].max())
            line.append(Cell(word, look, f"query {_text(r)}, {_text(c)}: {word}" if word else ""))
        cells.append(tuple(line))
    names = tuple(f"q {_text(r)}" for r in rows)
    return Grid(title, names, tuple(cells), tuple(map(_text, cols)))


def _units(spans: list[slice]) -> list[slice]:
    """What a row or column of the grid stands for: single places if few, else the run's tiles."""
    n = max(span.stop for span in spans)
    if n <= MAX_CELLS:
        return list(tiles(n, 1))
    return [slice(*ends) for ends in sorted({(span.start, span.stop) for span in spans})]


def _inside(units: list[slice], span: slice) -> list[int]:
    return [i for i, u in enumerate(units) if span.start <= u.start and u.stop <= span.stop]


def _text(span: slice) -> str:
    first, last = span.start, span.stop - 1
    return f"{first}" if first == last else f"{first}-{last}"


def _short(x: float | Tensor) -> str:
    x = float(x)
    if x == -math.inf:
        return "−∞"
    text = f"{x:.0f}" if abs(x) >= 100 else f"{x:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
