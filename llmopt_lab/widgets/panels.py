"""The few kinds of picture a frame is made of. Plain data: no drawing, no torch, no notebook.

A `tone` is a meaning, not a colour. draw.py knows how each looks on light and dark pages:

    idle      nothing here              active   in use, first owner or current tile
    shared    used by several           new      changed by this very step
    cached    kept, may be evicted      bad      wasted, dropped, refused or wrong
    good      accepted, correct         owner0 ... owner7   one colour a request, expert or writer
"""

from dataclasses import dataclass

TONES = ("idle", "active", "shared", "new", "cached", "bad", "good") + tuple(
    f"owner{i}" for i in range(8)
)


@dataclass(frozen=True)
class Cell:
    """One square of a grid. `text` is drawn in it; `note` is its full name for a screen reader.

    `heat`, 0 to 1, fills the square with its tone's strong colour: the cells of a heat map. Say the
    value in `text` or `note` as well.
    """

    text: str = ""
    tone: str = "idle"
    note: str = ""
    heat: float | int = 0


@dataclass(frozen=True)
class Grid:
    """Labelled rows of cells: a block table, a score tile, the experts and their tokens."""

    title: str
    row_labels: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    column_labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arrows:
    """Arrows between the cells of two grids of the same frame: logical to physical blocks.

    Each pair is ((grid, row, column), (grid, row, column)), grids counted within the frame.
    """

    pairs: tuple[tuple[tuple[int, int, int], tuple[int, int, int]], ...]


@dataclass(frozen=True)
class Bar:
    """One bar: a label, a value, a tone. From 0 to `shaded` it is filled in the strong colour: a
    part that it shares with another bar, for instance."""

    label: str
    value: float | int
    tone: str = "active"
    shaded: float | int = 0


@dataclass(frozen=True)
class Bars:
    """Values to compare by length, on one scale from 0 to `top` (the largest value if None)."""

    title: str
    bars: tuple[Bar, ...]
    unit: str = ""
    top: float | int | None = None


@dataclass(frozen=True)
class Line:
    """One line of a chart through its points (x, y), x rising. Its label stands at its end."""

    label: str
    points: tuple[tuple[float | int, float | int], ...]
    tone: str = "active"


@dataclass(frozen=True)
class Chart:
    """Lines over one scale of x, y from 0 to `top` (the largest y if None)."""

    title: str
    lines: tuple[Line, ...]
    x_label: str = ""
    unit: str = ""
    top: float | int | None = None


@dataclass(frozen=True)
class Span:
    """A stretch of time on a lane, from `start` to `end` (half-open), in the lanes' unit."""

    start: float | int
    end: float | int
    text: str = ""
    tone: str = "active"


@dataclass(frozen=True)
class Lanes:
    """Who did what when: one labelled row of spans each, on one clock."""

    title: str
    labels: tuple[str, ...]
    lanes: tuple[tuple[Span, ...], ...]
    unit: str = "steps"
    now: float | int | None = None


@dataclass(frozen=True)
class Meter:
    """One number with a unit, and the value it is compared with."""

    title: str
    value: float | int
    unit: str
    versus: float | int | None = None
    tone: str = "active"


@dataclass(frozen=True)
class Token:
    """One token of a text."""

    text: str
    tone: str = "idle"
    note: str = ""


@dataclass(frozen=True)
class Tokens:
    """A text as its tokens, each with a tone: who wrote it, which block holds it."""

    title: str
    tokens: tuple[Token, ...]


Panel = Grid | Arrows | Bars | Chart | Lanes | Meter | Tokens


@dataclass(frozen=True)
class Frame:
    """What the player shows for one step. `caption` alone must tell the story."""

    caption: str
    panels: tuple[Panel, ...]
    file: str | None = None  # of the algorithm, and the line to highlight beside the picture
    line: int | None = None
    step: int | None = None  # index of the trace step it shows
    legend: tuple[tuple[str, str], ...] = ()  # (tone, its name here): ("owner0", "request A")
