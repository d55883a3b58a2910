"""Frames to SVG text: the only renderer of the course. Standard library only, no browser needed.

A picture stands on a card of its own and carries a light and a dark palette, so it can be read on
any page, also inside `<img>`. Nothing in it has an id, so any number of pictures share a page.
"""

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from llmopt_lab.core.errors import require
from llmopt_lab.widgets.looks import ALONE_CSS, LOOKS
from llmopt_lab.widgets.panels import (
    TONES,
    Arrows,
    Bars,
    Cell,
    Chart,
    Frame,
    Grid,
    Lanes,
    Meter,
    Panel,
    Tokens,
)

Px = float | int
MIN_WIDTH = 320  # px: room for a legend
PAGE_WIDTH = 680  # px: panels stand side by side up to this width
CARD_PAD = 18
GAP = 24
ARROW_GAP = 64  # between grids that arrows connect
TITLE_HEIGHT = 26
BAR_PITCH = 30  # from one bar to the next
CHART_HEIGHT = 150  # of a chart's scale
MONO_EM, SANS_EM = 0.61, 0.6  # width of one character in ems, generous for the fonts asked for


def draw_frame(frame: Frame) -> str:
    """One frame as a self-contained SVG document.

    Raises:
        BadInput: a tone that is not in TONES, a value that is not finite, a negative bar, labels
            that do not fit their rows, an arrow to a cell that is not there.
    """
    return standalone(draw_series([frame])[0])


def standalone(pieces: Sequence[str]) -> str:
    """One item of `draw_series` as a self-contained SVG document."""
    return f"{pieces[0]}<style>{ALONE_CSS}</style>{''.join(pieces[1:])}"


def draw_series(frames: Sequence[Frame], *, width: int = PAGE_WIDTH) -> list[tuple[str, ...]]:
    """Frames of one run, all of one size, every panel at one place, so that nothing jumps.

    Args:
        width: how many pixels panels may use side by side before they stack.

    Returns:
        One tuple a frame; joined, its pieces are the SVG without its style sheet (PLAYER_CSS).
        Pieces are whole rows, so what does not change from frame to frame is an equal piece.

    Raises:
        BadInput: as `draw_frame`.
    """
    for frame in frames:
        _check(frame)
    placed = _place(frames, width)
    content = max([MIN_WIDTH] + [room.x + room.width for rooms in placed for room in rooms])
    legend = _legend(frames, content)
    floor = max(room.y + room.height for rooms in placed for room in rooms)
    height = floor + (GAP + legend.height if legend.pieces else 0)
    return [
        tuple(_picture(frame, rooms, legend, floor, content, height))
        for frame, rooms in zip(frames, placed, strict=True)
    ]


def describe(frame: Frame) -> Iterator[str]:
    """The panels of a frame in words, for those who do not see them: one line a row."""
    for panel in frame.panels:
        if isinstance(panel, Arrows):
            yield f"{len(panel.pairs)} arrows. " if panel.pairs else ""
            continue
        yield f"{panel.title}: "
        match panel:
            case Grid():
                for r, row in enumerate(panel.rows):
                    label = f"{panel.row_labels[r]}: " if panel.row_labels else ""
                    cells = ", ".join(_say(c.note or c.text, c.tone, frame) for c in row)
                    yield f"{label}{cells}. "
            case Bars():
                for bar in panel.bars:
                    value = f"{number(bar.value)} {panel.unit}".strip()
                    value += f", {number(bar.shaded)} of it shaded" if bar.shaded else ""
                    yield f"{_say(bar.label, bar.tone, frame)} {value}. "
            case Chart():
                for line in panel.lines:
                    n = len(line.points)
                    told = line.points if n <= 12 else line.points[:: n - 1]  # else its ends
                    points = ", ".join(f"{number(y)} at {number(x)}" for x, y in told)
                    yield f"{_say(line.label, line.tone, frame)}, {panel.unit}: {points}. "
            case Lanes():
                for label, lane in zip(panel.labels, panel.lanes, strict=True):
                    spans = ", ".join(
                        f"{_say(s.text, s.tone, frame)} {number(s.start)} to {number(s.end)}"
                        for s in lane
                    )
                    yield f"{label}: {spans}. "
            case Meter():
                yield f"{number(panel.value)} {panel.unit} {_compared(panel)}. "
            case Tokens():
                yield ", ".join(_say(t.note or t.text, t.tone, frame) for t in panel.tokens) + ". "


def number(value: float | int) -> str:
    """A number for a reader: thousands separated, fractions to three significant digits."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if 100 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def visible(text: str) -> str:
    """A token's text with its line ends, tabs and outer spaces as signs; nothing at all as ∅."""
    text = text.replace("\r", "").replace("\n", "↵").replace("\t", "⇥")
    return re.sub("^ +| +$", lambda spaces: "·" * len(spaces[0]), text) or "∅"


def _check(frame: Frame) -> None:
    grids = [panel for panel in frame.panels if isinstance(panel, Grid)]
    require(
        any(not isinstance(panel, Arrows) for panel in frame.panels),
        f"the frame {frame.caption!r} has no panel to draw; give it a Grid, Bars, Lanes, Meter or "
        "Tokens",
    )
    for panel in frame.panels:
        for tone in _tones(panel):
            require(tone in LOOKS, f"no tone {tone!r}; the tones are {', '.join(TONES)}")
        match panel:
            case Grid():
                require(
                    len(panel.row_labels) in (0, len(panel.rows)),
                    f"Grid {panel.title!r} has {len(panel.rows)} rows and "
                    f"{len(panel.row_labels)} row labels; give one label a row, or none",
                )
                for cell in (cell for row in panel.rows for cell in row):
                    require(
                        0 <= cell.heat <= 1,
                        f"Grid {panel.title!r}: heat is a share, 0 to 1; got {cell.heat}",
                    )
            case Arrows():
                for pair in panel.pairs:
                    for g, r, c in pair:
                        require(
                            0 <= g < len(grids)
                            and 0 <= r < len(grids[g].rows)
                            and 0 <= c < len(grids[g].rows[r]),
                            f"an arrow points to (grid, row, column) = ({g}, {r}, {c}), which the "
                            "frame does not have; grids are counted within the frame, from 0",
                        )
            case Bars():
                for bar in panel.bars:
                    _finite(bar.value, f"Bars {panel.title!r}, bar {bar.label!r}")
                    require(
                        bar.value >= 0,
                        f"Bars {panel.title!r}: {bar.label!r} is {bar.value}; bars start at 0 and "
                        "cannot be negative",
                    )
                    require(
                        0 <= bar.shaded <= bar.value,
                        f"Bars {panel.title!r}: {bar.label!r} is {bar.value}, so 0 to that can be "
                        f"shaded; got {bar.shaded}",
                    )
                if panel.top is not None:
                    _finite(panel.top, f"top of Bars {panel.title!r}")
            case Chart():
                for line in panel.lines:
                    what = f"Chart {panel.title!r}, line {line.label!r}"
                    for value in (value for point in line.points for value in point):
                        _finite(value, what)
                    require(
                        all(y >= 0 for _, y in line.points),
                        f"{what} has a negative y; charts start at 0",
                    )
                if panel.top is not None:
                    _finite(panel.top, f"top of Chart {panel.title!r}")
            case Lanes():
                require(
                    len(panel.labels) == len(panel.lanes),
                    f"Lanes {panel.title!r} has {len(panel.lanes)} lanes and "
                    f"{len(panel.labels)} labels; give one label a lane",
                )
                for span in (span for lane in panel.lanes for span in lane):
                    _finite(span.start, f"Lanes {panel.title!r}, start of {span.text!r}")
                    _finite(span.end, f"Lanes {panel.title!r}, end of {span.text!r}")
                    require(
                        span.start <= span.end,
                        f"Lanes {panel.title!r}: {span.text!r} ends at {span.end}, before its "
                        f"start {span.start}",
                    )
                if panel.now is not None:
                    _finite(panel.now, f"now of Lanes {panel.title!r}")
            case Meter():
                _finite(panel.value, f"Meter {panel.title!r}")
                if panel.versus is not None:
                    _finite(panel.versus, f"versus of Meter {panel.title!r}")


def _finite(value: float | int, what: str) -> None:
    require(abs(value) < 1e300, f"{what} is {value}; a picture needs a finite number")


def _tones(panel: Panel) -> Iterator[str]:
    match panel:
        case Grid():
            yield from (cell.tone for row in panel.rows for cell in row)
        case Bars():
            yield from (bar.tone for bar in panel.bars)
        case Chart():
            yield from (line.tone for line in panel.lines)
        case Lanes():
            yield from (span.tone for lane in panel.lanes for span in lane)
        case Meter():
            yield panel.tone
        case Tokens():
            yield from (token.tone for token in panel.tokens)


@dataclass
class Room:
    """The place a panel keeps through a series, and the sizes its frames agreed on."""

    width: Px
    height: Px = 0
    x: Px = 0
    y: Px = 0
    label: Px = 0  # width of the labels on the left
    cell: Px = 0  # width of a grid's cell
    cell_height: Px = 0
    size: int = 13  # of the words in a grid's cells
    span: tuple[float | int, float | int] = (0, 1)  # values at the left and right end of the scale
    top: float | int = 1  # value at the upper end of a chart


def _place(frames: Sequence[Frame], width: int) -> list[list[Room]]:
    """The rooms of each frame's panels, Arrows left out. Frames of one make-up share them."""
    make_up = [tuple(type(p) for p in frame.panels if type(p) is not Arrows) for frame in frames]
    slots = {
        kinds: [
            list(slot)
            for slot in zip(
                *(
                    [p for p in frame.panels if type(p) is not Arrows]
                    for frame, k in zip(frames, make_up, strict=True)
                    if k == kinds
                ),
                strict=True,
            )
        ]
        for kinds in dict.fromkeys(make_up)
    }
    rooms = {kinds: [_measure(slot, width) for slot in group] for kinds, group in slots.items()}
    connected = any(isinstance(panel, Arrows) for frame in frames for panel in frame.panels)
    gaps = {Grid: ARROW_GAP if connected else GAP}
    rows = {kinds: _rows(kinds, rooms[kinds], gaps, width) for kinds in slots}
    content = max(row.width for k in rows for row in rows[k])
    for kinds, group in slots.items():
        panels = iter(group)
        y = 0.0
        for row in rows[kinds]:
            x, spare = 0.0, (content - row.width) / len(row.rooms)
            for room in row.rooms:
                slot = next(panels)
                if not isinstance(slot[0], Grid):  # a grid keeps the shape of its cells
                    room.width += spare
                _fill(room, slot)
                room.x, room.y = x, y
                x += room.width + row.gap
            y += max(room.height for room in row.rooms) + GAP + (16 if row.gap > GAP else 0)
    return [rooms[kinds] for kinds in make_up]


@dataclass
class Row:
    """Rooms side by side."""

    rooms: list[Room]
    gap: Px

    @property
    def width(self) -> Px:
        return sum(room.width for room in self.rooms) + self.gap * (len(self.rooms) - 1)


def _rows(
    kinds: tuple[type, ...], rooms: list[Room], gaps: dict[type, int], width: Px
) -> list[Row]:
    """Neighbouring grids, or neighbouring meters, share a row while they fit."""
    rows: list[Row] = []
    for kind, group in groupby(zip(kinds, rooms, strict=True), key=lambda pair: pair[0]):
        gap = gaps.get(kind, GAP)
        row = Row([], gap)
        for _, room in group:
            fits = kind in (Grid, Meter) and row.width + gap + room.width <= width
            if not (row.rooms and fits):
                row = Row([], gap)
                rows.append(row)
            row.rooms.append(room)
    return rows


def _measure(slot: list, width: Px) -> Room:
    """The width that the panels of one slot want."""
    titles = max(_wide(panel.title, SANS_EM) for panel in slot)
    match slot[0]:
        case Grid():
            n_columns = max((len(row) for p in slot for row in p.rows), default=0)
            n_columns = max(n_columns, max(len(p.column_labels) for p in slot), 1)
            texts = [cell.text for p in slot for row in p.rows for cell in row]
            word = max((_wide(text, MONO_EM) for text in texts), default=0)
            heads = max((_wide(c, SANS_EM, 12) for p in slot for c in p.column_labels), default=0)
            label = max((_wide(t, SANS_EM) for p in slot for t in p.row_labels), default=0)
            label = min(label, 130) + 10 if label else 0
            wanted = max(word, heads) + 16
            # many columns make narrow cells, but not so narrow that they hide short words
            least = max(16, min(word * 11 / 13 + 7, 36))
            cell = min(max(wanted, 40), 120, max((width - label) / n_columns - 4, least))
            needed = label + n_columns * (cell + 4) - 4
            size = 13 if word <= cell - 6 else 11
            return Room(max(needed, min(titles, 240)), label=label, cell=cell, size=size)
        case Meter():
            return Room(min(max(titles, 150), 240))
        case Bars():
            label = max((_wide(bar.label, SANS_EM) for p in slot for bar in p.bars), default=0)
            top = max((_top(p) for p in slot), default=1)
            return Room(min(520, width), label=min(label, 150) + 32, span=(0, top))
        case Chart():
            points = [point for p in slot for line in p.lines for point in line.points]
            top = max((_top(p) for p in slot), default=1)
            ticks = max(_wide(number(t), SANS_EM, 12) for t in _ticks(0, top, 4))
            ends = [x for x, _ in points]
            return Room(min(560, width), label=ticks + 10, span=_range(ends), top=top)
        case Lanes():
            label = max((_wide(text, SANS_EM) for p in slot for text in p.labels), default=0)
            ends = [t for p in slot for lane in p.lanes for s in lane for t in (s.start, s.end)]
            ends += [p.now for p in slot if p.now is not None]
            return Room(min(560, width), label=min(label, 130) + 10, span=_range(ends))
    return Room(min(520, width))


def _range(ends: Sequence[Px]) -> tuple[Px, Px]:
    """The ends of a scale that holds all of `ends`; from 0 where that is not far."""
    first, last = min(ends, default=0), max(ends, default=1)
    first = 0 if 0 <= first < 0.5 * last else first
    if last - first < max(1e-9 * max(abs(first), abs(last)), 1e-200):  # one moment
        last = first + max(1, 1e-3 * abs(first))
    return first, last


def _fill(room: Room, slot: list) -> None:
    """The height that the panels of one slot need at the room's final width."""
    match slot[0]:
        case Grid():
            room.cell_height = min(36, max(room.cell, 20))
            n_rows = max(len(p.rows) for p in slot)
            head = 20 if any(p.column_labels for p in slot) else 0
            room.height = TITLE_HEIGHT + head + n_rows * (room.cell_height + 4) - 4
        case Meter():
            room.height = TITLE_HEIGHT + 60
        case Bars():
            room.height = TITLE_HEIGHT + BAR_PITCH * max(len(p.bars) for p in slot)
        case Chart():
            room.height = TITLE_HEIGHT + CHART_HEIGHT + 24
        case Lanes():
            room.height = TITLE_HEIGHT + 36 * max(len(p.lanes) for p in slot) + 24
        case Tokens():
            lines = max(len(_lines(p, room.width)) for p in slot)
            room.height = TITLE_HEIGHT + 36 * lines - 6


def _top(panel: Bars | Chart) -> Px:
    if panel.top is not None:
        top = panel.top
    elif isinstance(panel, Bars):
        top = max((bar.value for bar in panel.bars), default=0)
    else:
        top = max((y for line in panel.lines for _, y in line.points), default=0)
    return top if top > 0 else 1


def _picture(
    frame: Frame, rooms: list[Room], legend: "Legend", floor: Px, width: Px, height: Px
) -> Iterator[str]:
    w, h = math.ceil(width + 2 * CARD_PAD), math.ceil(height + 2 * CARD_PAD)
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="lm" role="img" width="{w}" height="{h}" '
        f'viewBox="0 0 {w} {h}" aria-label="{_xml(frame.caption)}">'
    )
    yield "<desc>"
    yield from (_xml(words) for words in describe(frame))
    yield (
        f'</desc><rect class="lm-card" x=".5" y=".5" width="{w - 1}" height="{h - 1}" rx="10"/>'
        f'<g transform="translate({CARD_PAD},{CARD_PAD})">'
    )
    panels = [panel for panel in frame.panels if not isinstance(panel, Arrows)]
    for panel, room in zip(panels, rooms, strict=True):
        yield f'<g transform="translate({_n(room.x)},{_n(room.y)})">'
        match panel:
            case Grid():
                yield from _grid(panel, room)
            case Bars():
                yield from _bars(panel, room)
            case Chart():
                yield from _chart(panel, room)
            case Lanes():
                yield from _lanes(panel, room)
            case Meter():
                yield from _meter(panel, room)
            case Tokens():
                yield from _tokens(panel, room)
        yield "</g>"
    grids = [(p, r) for p, r in zip(panels, rooms, strict=True) if isinstance(p, Grid)]
    for panel in frame.panels:
        if isinstance(panel, Arrows):
            yield from _arrows(panel, grids)
    # words last, on top of the arrows
    for grid, room in grids:
        yield f'<g transform="translate({_n(room.x)},{_n(room.y)})">'
        yield from _grid_words(grid, room)
        yield "</g>"
    if legend.pieces:
        yield f'<g transform="translate(0,{_n(floor + GAP)})">'
        yield from legend.pieces
        yield "</g>"
    yield "</g></svg>"


def _grid(grid: Grid, room: Room) -> Iterator[str]:
    """The boxes and marks of a grid; arrows pass over them and under the words."""
    for r, row in enumerate(grid.rows):
        yield "".join(
            _cell(cell, *_cell_corner(grid, room, r, c), room) for c, cell in enumerate(row)
        )


def _cell(cell: Cell, x: Px, y: Px, room: Room) -> str:
    width, height = room.cell, room.cell_height
    clipped = _clip(cell.text, width - 6, MONO_EM, room.size) != cell.text
    note = cell.note or (cell.text if clipped else "")
    title = f"<title>{_xml(note)}</title>" if note else ""
    if not cell.text:
        mark = _mark(cell.tone, x + width / 2, y + height / 2)
    else:
        mark = _mark(cell.tone, x + width - 8, y + 8) if height > 30 else ""
    box, heat = _box(x, y, width, height), ""
    if cell.heat:  # half of it at most, and the text has a halo
        heat = box.replace('"lm-f"', f'"lm-g" opacity="{0.5 * cell.heat:.2f}"')
    return f'<g class="lm-{cell.tone}">{box}{heat}{mark}{title}</g>'


def _grid_words(grid: Grid, room: Room) -> Iterator[str]:
    yield _text(grid.title, 0, 14, room.width, "lm-t")
    left, pitch = room.label + room.cell / 2, room.cell + 4
    yield "".join(
        _text(label, left + c * pitch, TITLE_HEIGHT + 13, pitch, "lm-m lm-s", "middle")
        for c, label in enumerate(grid.column_labels)
    )
    for r, row in enumerate(grid.rows):
        middle = _cell_corner(grid, room, r, 0)[1] + room.cell_height / 2 + 4.5
        if grid.row_labels:
            yield _text(grid.row_labels[r], 0, middle, room.label - 8, "lm-m")
        yield "".join(
            _cell_word(cell, left + c * pitch, middle, room) for c, cell in enumerate(row)
        )


def _cell_word(cell: Cell, x: Px, y: Px, room: Room) -> str:
    shown = _clip(cell.text, room.cell - 6, MONO_EM, room.size)
    if not shown:
        return ""
    drop = 2.5 if LOOKS[cell.tone].mark and room.cell_height > 30 else 0  # clear of the mark
    place = f'x="{_n(x)}" y="{_n(y + drop)}"'
    small = " lm-n" if room.size < 13 else ""
    return f'<text class="lm-c lm-w lm-{cell.tone}{small}" {place}>{_xml(shown)}</text>'


def _cell_corner(grid: Grid, room: Room, row: int, column: int) -> tuple[Px, Px]:
    """Where a cell starts, within its grid's room."""
    top = TITLE_HEIGHT + (20 if grid.column_labels else 0)
    return room.label + column * (room.cell + 4), top + row * (room.cell_height + 4)


def _bars(bars: Bars, room: Room) -> Iterator[str]:
    yield _text(bars.title, 0, 14, room.width, "lm-t")
    value_width = 96
    scale = (room.width - room.label - value_width) / room.span[1]
    base = f"M{_n(room.label)} {TITLE_HEIGHT - 4}v{BAR_PITCH * len(bars.bars) + 2}"
    for i, bar in enumerate(bars.bars):
        y = TITLE_HEIGHT + BAR_PITCH * i
        length = min(bar.value, room.span[1]) * scale
        value = f"{number(bar.value)} {bars.unit}".strip()
        shade = _box(room.label, y, min(bar.shaded, room.span[1]) * scale, 22, 3)
        shade = shade.replace('"lm-f"', '"lm-g" opacity="0.5"') if bar.shaded else ""
        yield (
            _text(bar.label, 0, y + 16, room.label - 30, "")
            + f'<g class="lm-{bar.tone}">{_mark(bar.tone, room.label - 14, y + 11)}'
            + f"{_box(room.label, y, length, 22, 3)}{shade}</g>"
            + _text(value, room.label + length + 8, y + 16, value_width - 8, "lm-c lm-s")
        )
    yield f'<path class="lm-l" d="{base}"/>'


def _chart(chart: Chart, room: Room) -> Iterator[str]:
    yield _text(chart.title, 0, 14, room.width, "lm-t")
    first, last = room.span
    left, right, top = room.label, room.width - 150, TITLE_HEIGHT
    bottom = top + CHART_HEIGHT

    def at(x: Px, y: Px) -> tuple[Px, Px]:
        height = min(y, room.top) / room.top * CHART_HEIGHT
        return left + (x - first) / (last - first) * (right - left), bottom - height

    across = [(t, at(first, t)[1]) for t in _ticks(0, room.top, 4)]
    yield "".join(f'<path class="lm-l" d="M{_n(left)} {_n(y)}H{_n(right)}"/>' for _, y in across)
    yield "".join(_text(number(t), left - 6, y + 4, left, "lm-m lm-s", "end") for t, y in across)
    along = [(t, at(t, 0)[0]) for t in _ticks(first, last, max(2, int((right - left) / 70)))]
    yield "".join(_text(number(t), x, bottom + 17, 60, "lm-m lm-s", "middle") for t, x in along)
    yield _text(chart.x_label, right + 14, bottom + 17, 136, "lm-m lm-s")
    label = bottom + 20
    for line in sorted(filter(lambda x: x.points, chart.lines), key=lambda x: x.points[-1][1]):
        places = [at(*point) for point in line.points]
        x, y = places[-1]
        path = "L".join(f"{_n(a)} {_n(b)}" for a, b in places)
        label = min(y + 4, label - 16)  # upwards from the lowest line, no two on one another
        value = f"{line.label} {number(line.points[-1][1])} {chart.unit}".strip()
        yield (
            f'<g class="lm-{line.tone}"><path class="lm-a" d="M{path}"/>'
            f'<circle class="lm-f" cx="{_n(x)}" cy="{_n(y)}" r="6"/>{_mark(line.tone, x, y)}</g>'
            + _text(value, x + 11, label, room.width - x - 11, "lm-c lm-s")
        )


def _lanes(lanes: Lanes, room: Room) -> Iterator[str]:
    yield _text(lanes.title, 0, 14, room.width, "lm-t")
    first, last = room.span
    left, right = room.label, room.width - 8
    bottom = TITLE_HEIGHT + 36 * len(lanes.lanes)

    def at(time: Px) -> Px:
        return left + (time - first) / (last - first) * (right - left)

    ticks = [(t, at(t)) for t in _ticks(first, last, max(2, int((right - left) / 70)))]
    yield "".join(
        f'<path class="lm-l" d="M{_n(x)} {TITLE_HEIGHT - 2}V{bottom}"/>' for _, x in ticks
    )
    for i, (label, lane) in enumerate(zip(lanes.labels, lanes.lanes, strict=True)):
        y = TITLE_HEIGHT + 36 * i
        yield _text(label, 0, y + 20, room.label - 8, "lm-m") + "".join(
            _span(s.text, s.tone, at(s.start), y + 2, at(s.end) - at(s.start)) for s in lane
        )
    yield "".join(_text(number(t), x, bottom + 15, 60, "lm-m lm-s", "middle") for t, x in ticks)
    yield _text(lanes.unit, 0, bottom + 15, room.label - 8, "lm-m lm-s")
    if lanes.now is not None:
        x = _n(at(lanes.now))
        yield (
            f'<path class="lm-v" d="M{x} {TITLE_HEIGHT - 4}V{bottom + 2}"><title>now: '
            f"{number(lanes.now)} {_xml(lanes.unit)}</title></path>"
        )


def _span(text: str, tone: str, x: Px, y: Px, width: Px, note: str = "") -> str:
    marked = bool(LOOKS[tone].mark) and width >= 20
    shown = _clip(text, width - 8 - 16 * marked, MONO_EM)
    note = note or text
    inset = 1 if width > 4 else 0  # neighbours that touch in time stay two boxes
    parts = [f'<g class="lm-{tone}">{_box(x + inset, y, max(width - 2 * inset, 1), 28)}']
    if marked:
        parts.append(_mark(tone, x + (11 if text else width / 2), y + 14))
    if shown:
        where = f'x="{_n(x + 6 + 14 * marked)}" y="{_n(y + 18.5)}"'
        parts.append(f'<text class="lm-c" {where}>{_xml(shown)}</text>')
    return f"{''.join(parts)}{f'<title>{_xml(note)}</title>' if note else ''}</g>"


def _meter(meter: Meter, room: Room) -> Iterator[str]:
    yield _text(meter.title, 0, 14, room.width, "lm-t")
    unit = f'<tspan class="lm-u" dx="6">{_xml(meter.unit)}</tspan>' if meter.unit else ""
    yield f'<text class="lm-b" y="{TITLE_HEIGHT + 20}">{number(meter.value)}{unit}</text>'
    if meter.versus is None:
        return
    whole = max(meter.value, meter.versus)
    part = room.width / whole if whole > 0 else 0
    y = TITLE_HEIGHT + 30
    yield (
        f'<g class="lm-idle">{_box(0, y, room.width, 10, 5)}</g>'
        f'<g class="lm-{meter.tone}">{_box(0, y, max(meter.value, 0) * part, 10, 5)}</g>'
        f'<path class="lm-v" d="M{_n(max(meter.versus, 0) * part)} {y - 3}v16"/>'
    )
    yield _text(_compared(meter), 0, y + 26, room.width, "lm-m lm-s")


def _compared(meter: Meter) -> str:
    """How a meter's value stands to the one it is compared with."""
    if meter.versus is None:
        return ""
    versus = number(meter.versus)
    if meter.versus <= 0 or meter.value < 0:
        return f"against {versus}"
    ratio = meter.value / meter.versus
    return f"{number(ratio)} × {versus}" if ratio >= 2 else f"{ratio:.0%} of {versus}"


def _tokens(tokens: Tokens, room: Room) -> Iterator[str]:
    yield _text(tokens.title, 0, 14, room.width, "lm-t")
    for i, line in enumerate(_lines(tokens, room.width)):
        y = TITLE_HEIGHT + 36 * i
        yield "".join(
            _span(shown, token.tone, x, y, width, token.note or token.text)
            for token, shown, x, width in line
        )


def _lines(tokens: Tokens, width: Px) -> list[list[tuple]]:
    """Tokens broken into lines of (token, text shown, x, width of its box)."""
    lines: list[list[tuple]] = [[]]
    x = 0.0
    for token in tokens.tokens:
        shown = _clip(visible(token.text), 200, MONO_EM)
        wide = _wide(shown, MONO_EM) + 14 + 16 * bool(LOOKS[token.tone].mark)
        if x + wide > width and lines[-1]:
            lines.append([])
            x = 0.0
        lines[-1].append((token, shown, x, wide))
        x += wide + 4
        if "\n" in token.text:
            lines.append([])
            x = 0.0
    return lines


def _arrows(arrows: Arrows, grids: list[tuple[Grid, Room]]) -> Iterator[str]:
    for source, target in arrows.pairs:
        a, b = _cell_place(grids, source), _cell_place(grids, target)
        grid, row, column = source
        tone = grids[grid][0].rows[row][column].tone
        beside = source[0] != target[0] and grids[source[0]][1].y == grids[target[0]][1].y
        label = grids[target[0]][1].label
        if beside and a.x < b.x and target[2] == 0:  # stop before the row's label
            b = Room(b.width + label, b.height, b.x - label, b.y)
        elif beside and a.x > b.x and column == 0:  # and start before it on the way back
            label = grids[grid][1].label
            a = Room(a.width + label, a.height, a.x - label, a.y)
        yield f'<g class="lm-{tone}">{_arrow(a, b, beside or a.y == b.y)}</g>'


def _cell_place(grids: list[tuple[Grid, Room]], where: tuple[int, int, int]) -> Room:
    grid, room = grids[where[0]]
    x, y = _cell_corner(grid, room, where[1], where[2])
    return Room(room.cell, room.cell_height, room.x + x, room.y + y)


def _arrow(a: Room, b: Room, sideways: bool) -> str:
    """A curve from the edge of one cell to the edge of another, with its head on the target."""
    if not sideways:
        down = 1 if b.y > a.y else -1
        x1, y1 = a.x + a.width / 2, a.y + (a.height if down > 0 else 0)
        x2, y2 = b.x + b.width / 2, b.y + (0 if down > 0 else b.height)
        bend = max(abs(y2 - y1) / 2, 14) * down
        curve = f"M{_n(x1)} {_n(y1)}C{_n(x1)} {_n(y1 + bend)} {_n(x2)} {_n(y2 - bend)} "
        curve += f"{_n(x2)} {_n(y2 - 6 * down)}"
        head = f"M{_n(x2)} {_n(y2)}l-4 {-8 * down}h8z"
    else:
        right = 1 if b.x > a.x else -1
        x1, y1 = a.x + (a.width if right > 0 else 0), a.y + a.height / 2
        x2, y2 = b.x + (0 if right > 0 else b.width), b.y + b.height / 2
        bend = max(abs(x2 - x1) / 2, 14) * right
        curve = f"M{_n(x1)} {_n(y1)}C{_n(x1 + bend)} {_n(y1)} {_n(x2 - bend)} {_n(y2)} "
        curve += f"{_n(x2 - 6 * right)} {_n(y2)}"
        head = f"M{_n(x2)} {_n(y2)}l{-8 * right}-4v8z"
    return (
        f'<path class="lm-h" d="{curve}"/><path class="lm-a" d="{curve}"/>'
        f'<path class="lm-g" d="{head}"/>'
    )


@dataclass
class Legend:
    pieces: list[str]
    height: Px


def _legend(frames: Sequence[Frame], width: Px) -> Legend:
    """What each tone of the series means, on one or more lines."""
    panels = [p for frame in frames for p in frame.panels if not isinstance(p, Meter | Chart)]
    used = {tone for panel in panels for tone in _tones(panel)}
    names = {tone: name for frame in frames for tone, name in frame.legend}
    if used <= {"idle"} and not names:
        return Legend([], 0)
    pieces: list[str] = []
    x, y = 0.0, 0
    for tone in (tone for tone in TONES if tone in used):
        word = names.get(tone, LOOKS[tone].word)
        needed = min(28 + _wide(word, 0.56, 12), width)
        if x and x + needed > width:
            x, y = 0.0, y + 24
        box = f'<g class="lm-{tone}">{_box(x, y, 20, 16, 4)}{_mark(tone, x + 10, y + 8)}</g>'
        pieces.append(box + _text(word, x + 27, y + 12.5, width - 27, "lm-m lm-s"))
        x += needed + 16
    return Legend(pieces, y + 16)


def _box(x: Px, y: Px, width: Px, height: Px, radius: Px = 5) -> str:
    return (
        f'<rect class="lm-f" x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" '
        f'rx="{_n(min(radius, width / 2))}"/>'
    )


def _mark(tone: str, x: Px, y: Px) -> str:
    mark = LOOKS[tone].mark
    return f'<path class="lm-g" d="M{_n(x)} {_n(y)}{mark}"/>' if mark else ""


def _text(text: str, x: Px, y: Px, width: Px, kind: str, anchor: str = "") -> str:
    """A line of text of at most `width` pixels; when clipped, the whole of it is its title."""
    if not text:
        return ""
    size = 21 if "lm-b" in kind else 12 if "lm-s" in kind else 13
    shown = _clip(text, width, MONO_EM if "lm-c" in kind else SANS_EM, size)
    whole = f"<title>{_xml(text)}</title>" if shown != text else ""
    kind = f' class="{kind}"' if kind else ""
    anchor = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text{kind} x="{_n(x)}" y="{_n(y)}"{anchor}>{_xml(shown)}{whole}</text>'


def _wide(text: str, em: Px, size: Px = 13) -> Px:
    """About how many pixels a text takes."""
    return em * size * sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _clip(text: str, width: Px, em: Px, size: Px = 13) -> str:
    """`text`, or as much of it as fits into `width` pixels and an ellipsis."""
    room = int(width / (em * size) + 1e-6)
    if sum(map(_columns, text)) <= room:
        return text
    kept, room = "", room - 1
    for character in text:
        room -= _columns(character)
        if room < 0:
            break
        kept += character
    return f"{kept}…" if width >= em * size else ""


def _say(text: str, tone: str, frame: Frame) -> str:
    """A cell in words: what stands in it, and what its tone means here."""
    meaning = dict(frame.legend).get(tone, LOOKS[tone].word)
    return f"{text} ({meaning})" if text and tone != "idle" else text or meaning


def _ticks(first: Px, last: Px, at_most: int) -> list[float]:
    """Round values within [first, last], one unit of 1, 2 or 5 times a power of ten apart."""
    rough = (last - first) / at_most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [k * step for k in range(math.ceil(first / step), math.floor(last / step + 1e-9) + 1)]


_REPLACED = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "\t": " ", "\n": " ", "\r": " "}


def _xml(text: str) -> str:
    """`text` escaped; what XML 1.0 cannot hold becomes the replacement character."""
    return "".join(
        _REPLACED.get(c) or (c if _allowed(c) else "\N{REPLACEMENT CHARACTER}") for c in text
    )


def _allowed(character: str) -> bool:
    code = ord(character)
    return 0x20 <= code < 0x7F or 0xA0 <= code < 0xD800 or 0xE000 <= code < 0xFFFE or code > 0xFFFF


def _n(value: Px) -> str:
    """A coordinate with at most one decimal."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text
