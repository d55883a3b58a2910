"""The player: steps through the frames of a run, with the source of the algorithm beside them."""

import base64
import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import anywidget
import traitlets

from llmopt_lab.core.errors import require
from llmopt_lab.core.trace import Record, Step, Trace, first_divergence
from llmopt_lab.widgets.draw import PAGE_WIDTH, draw_series, standalone
from llmopt_lab.widgets.listing import Listing, list_source
from llmopt_lab.widgets.looks import PLAYER_CSS
from llmopt_lab.widgets.panels import Frame

HERE = Path(__file__).parent
MAX_STATE = 1 << 20  # bytes a widget may send to the page


class Player(anywidget.AnyWidget):
    """Show frames one at a time: buttons, a slider, keys, a caption, the line of source.

    Args:
        frames: of one run, in order. Drawn once, now; stepping never calls the kernel.
        versus: frames of a second run to show beside the first. One position drives both, and
            the shorter run holds its last frame.
        labels: names of the two runs.
        title: stands above the picture.
        note: one sentence to read first.
        start: the frame to open at.

    `position` is the frame on show; observe it, or set it, from Python.

    Raises:
        BadInput: no frames, a start outside them, frames that draw.draw_frame refuses, or more
            than 1 MiB to send.
    """

    _esm = (HERE / "page.js").read_text() + (HERE / "player.js").read_text()
    _css = (HERE / "page.css").read_text() + PLAYER_CSS
    _ipython_display_ = None  # that of ipywidgets 7 would win over the bundle and its picture

    position = traitlets.Int(0).tag(sync=True)
    title = traitlets.Unicode().tag(sync=True)
    note = traitlets.Unicode().tag(sync=True)
    labels = traitlets.List(traitlets.Unicode()).tag(sync=True)
    # a frame: {"svg": numbers of pieces, "caption", "listing": number or None, "line", "file"}
    frames = traitlets.List(traitlets.Dict()).tag(sync=True)
    versus = traitlets.List(traitlets.Dict()).tag(sync=True)
    pieces = traitlets.List(traitlets.Unicode()).tag(sync=True)
    listings = traitlets.List(traitlets.Dict()).tag(sync=True)

    def __init__(
        self,
        frames: Sequence[Frame],
        versus: Sequence[Frame] | None = None,
        *,
        labels: tuple[str, str] = ("reference", "yours"),
        title: str = "",
        note: str = "",
        start: int = 0,
    ):
        for name, run in (("frames", frames), ("versus", versus)):
            require(
                run is None or len(run) > 0,
                f"nothing to play: {name} is empty. Was the run recorded? Call it inside "
                "`with recording() as trace:` and make the frames from that trace.",
            )
        runs = [list(run) for run in (frames, versus) if run is not None]
        n_frames = max(map(len, runs))
        require(
            0 <= start < n_frames,
            f"start is {start}, but the frames are numbered 0 to {n_frames - 1}",
        )
        # drawn as one series, so that both sides have one size; half the page for each of two
        drawn = draw_series(
            [frame for run in runs for frame in run], width=PAGE_WIDTH if len(runs) == 1 else 440
        )
        pieces: dict[str, int] = {}
        listings: dict[Listing, int] = {}
        sides, rest = [], iter(drawn)
        for run in runs:
            sides.append([_entry(frame, next(rest), pieces, listings) for frame in run])
        content = {
            "frames": sides[0],
            "versus": sides[1] if len(sides) > 1 else [],
            "pieces": list(pieces),
            "listings": [
                {"title": item.title, "first": item.first, "lines": list(item.lines)}
                for item in listings
            ],
        }
        nbytes = len(json.dumps(content).encode())
        require(
            nbytes <= MAX_STATE,
            f"{sum(map(len, runs)):,} frames take {nbytes:,} bytes; a player holds at most "
            f"{MAX_STATE:,}. Show a smaller example, or fewer frames: every second one, or the "
            "steps around the one that matters.",
        )
        super().__init__(
            position=start,
            title=title,
            note=note,
            labels=list(labels) if len(runs) > 1 else [],
            **content,
        )

    @traitlets.validate("position")
    def _inside(self, proposal):
        last = max(len(self.frames), len(self.versus)) - 1
        require(
            0 <= proposal["value"] <= last,
            f"position is {proposal['value']}, but the frames are numbered 0 to {last}",
        )
        return proposal["value"]

    def __repr__(self) -> str:
        n_frames = max(len(self.frames), len(self.versus))
        captions = " | ".join(entry["caption"] for _, entry in self._on_show(self.position))
        return f"Player(step {self.position + 1} of {n_frames}: {captions})"

    def _on_show(self, position: int) -> list[tuple[str, dict]]:
        """(label, frame) of each side at a position; a run that has ended holds its last frame."""
        sides = [side for side in (self.frames, self.versus) if side]
        labels = self.labels or [""]
        return [
            (label, side[min(position, len(side) - 1)])
            for label, side in zip(labels, sides, strict=True)
        ]

    def _repr_mimebundle_(self, **kwargs):
        """The live widget, and a still picture for every place that has no kernel."""
        bundle = super()._repr_mimebundle_(**kwargs) or {}
        # the metadata tells Colab where its widget manager is
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return {**data, "text/plain": repr(self), "text/html": self._still()}, metadata

    def _still(self) -> str:
        """HTML that needs neither a script nor a style sheet, and survives a sanitizer."""
        n_frames = max(len(self.frames), len(self.versus))
        # the end of a run shows most; a player opened on purpose elsewhere shows that
        position = self.position or n_frames - 1
        parts = [
            f"<p><strong>{escape(text)}</strong></p>" for text in (self.title, self.note) if text
        ]
        for label, entry in self._on_show(position):
            svg = standalone([self.pieces[i] for i in entry["svg"]])
            source = base64.b64encode(svg.encode()).decode()
            caption = escape(f"{label}: {entry['caption']}" if label else entry["caption"])
            parts.append(
                f'<figure style="margin:8px 0"><img alt="{caption}" '
                f'src="data:image/svg+xml;base64,{source}"/>'
                f"<figcaption>Step {position + 1} of {n_frames}. {caption}</figcaption></figure>"
            )
        for label, side in zip(self.labels or [""], (self.frames, self.versus), strict=False):
            items = "".join(f"<li>{escape(entry['caption'])}</li>" for entry in side)
            name = f"All steps in words: {label}" if label else "All steps in words"
            parts.append(f"<details><summary>{escape(name)}</summary><ol>{items}</ol></details>")
        return "".join(parts)


def _entry(
    frame: Frame, drawn: Sequence[str], pieces: dict[str, int], listings: dict[Listing, int]
) -> dict:
    """One frame as player.js expects it; equal pieces and listings are sent once."""
    listing = list_source(frame.file, frame.line)
    return {
        "svg": [pieces.setdefault(piece, len(pieces)) for piece in drawn],
        "caption": frame.caption,
        "listing": None if listing is None else listings.setdefault(listing, len(listings)),
        "line": frame.line,
        "file": listing.title if listing else None,
    }


def compare(
    reference: Trace,
    attempt: Trace,
    frames: Callable[[Trace], Sequence[Frame]],
    *kinds: type[Record],
    labels: tuple[str, str] = ("reference", "yours"),
) -> Player:
    """Two runs side by side, opened at the first step where they differ.

    Args:
        reference, attempt: what `recording()` collected from each.
        frames: the chapter's view. Its frames should name the trace step that they show
            (`Frame.step`); without that, the player opens at the first frame that looks different.
        kinds: records to compare, all of them by default.

    Raises:
        BadInput: one of the runs recorded nothing that the view can show.
    """
    runs = []
    for label, trace in zip(labels, (reference, attempt), strict=True):
        run = list(frames(trace))
        require(
            len(run) > 0,
            f"the run called {label!r} recorded nothing to show ({len(trace)} steps in its trace). "
            "Keep the record(...) lines, and call it inside `with recording() as trace:`.",
        )
        runs.append(run)
    parting = first_divergence(reference, attempt, *kinds)
    if parting is None:
        return Player(
            runs[0], runs[1], labels=labels, note=f"No difference in {len(reference)} steps."
        )
    pairs = zip(runs, (parting.reference, parting.attempt), strict=True)
    starts = [at for run, step in pairs if (at := _first_showing(run, step)) is not None]
    start = min(starts) if starts else _first_different(*runs)
    # without the trace's step number: the player counts frames, from 1
    difference = str(parting).partition(": ")[2]
    return Player(
        runs[0], runs[1], labels=labels, start=start, note=f"First difference: {difference}"
    )


def _first_showing(run: list[Frame], step: Step | None) -> int | None:
    """The first frame that shows the trace after `step`."""
    if step is None:
        return None
    return next((i for i, f in enumerate(run) if f.step is not None and f.step >= step.index), None)


def _first_different(left: list[Frame], right: list[Frame]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if (a.caption, a.panels) != (b.caption, b.panels):
            return index
    # one run is the beginning of the other: open where only one goes on
    return min(min(len(left), len(right)), max(len(left), len(right)) - 1)
