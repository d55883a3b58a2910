"""A mask to paint, block by block: what attention it keeps, and what it costs, at every stroke.

paint = Paint({"head 0": shares}, [Cost("K and V read", "bytes", cells)], allowed=allowed,
              presets={"window": window})
paint                                  # the learner paints with the mouse or the keyboard
paint.mask                             # (rows, columns) bool: what is painted now
"""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import anywidget
import torch
import traitlets
from torch import Tensor

from llmopt_lab.core.errors import LabError, require
from llmopt_lab.widgets.draw import draw_frame, number
from llmopt_lab.widgets.looks import LOOKS
from llmopt_lab.widgets.panels import Cell, Frame, Grid, Meter

HERE = Path(__file__).parent
LOST = 0.01  # a share of a row's attention that is shown as lost when its block is not read
NAMES = {
    "good": "read",
    "bad": "not read, 1% of its row or more",
    "cached": "not read, under 1% of its row",
    "idle": "may not be seen",
}


@dataclass(frozen=True)
class Cost:
    """Something that every block that is read adds to, such as bytes.

    cells: (rows, columns), what each block adds. fixed: what is spent whatever is read.
    """

    title: str
    unit: str
    cells: Tensor
    fixed: int = 0


class Paint(anywidget.AnyWidget):
    """Paint the blocks of keys that each block of queries reads.

    Mouse: press and drag; the first block decides whether the stroke paints or rubs out. Keys:
    arrows move, space or Enter turns a block, shift with an arrow carries the state of the block
    along. Everything is counted in the page, so a stroke waits for no kernel.

    Args:
        shares: name -> (rows, columns), each row's attention on each block, rows that sum to 1; one
            is on show, the learner chooses which. Rows count equally in the mean.
        costs: what reading costs; each is compared with reading all that is allowed.
        allowed: (rows, columns) bool, what can be painted.
        presets: name -> (rows, columns) bool, to start from; the first one is painted at first.
        row_labels, column_labels: names of the blocks of queries and keys.
        choose: what the names of `shares` are: "layer and head".
        title: stands above the picture.
        ask: called in Python with the mask when the learner presses `ask_label`; its words are
            shown.

    `painted` holds the numbers (row * columns + column) of what is painted; set it, or observe it,
    from Python. `shown` is the number of the share on show.

    Raises:
        BadInput: shapes that differ, rows that do not sum to 1, attention on what is not allowed, a
            preset that paints it, no preset.
    """

    _css = (HERE / "page.css").read_text() + "".join(
        f".lm-paint.lm-{theme} .lm-{tone}{{--lm-tone:{colours[0]};--lm-fill:{colours[1]}}}"
        for tone in NAMES
        for theme, colours in (("light", LOOKS[tone].light), ("dark", LOOKS[tone].dark))
    )
    _esm = (
        f"const NAMES = {json.dumps(NAMES)}, LOST = {LOST};\n"
        f"const MARKS = {json.dumps({tone: LOOKS[tone].mark for tone in NAMES})};\n"
        + (HERE / "page.js").read_text()
        + (HERE / "paint.js").read_text()
    )
    _ipython_display_ = None  # that of ipywidgets 7 would win over the bundle and its picture

    painted = traitlets.List(traitlets.Int()).tag(sync=True)
    shown = traitlets.Int(0).tag(sync=True)
    title = traitlets.Unicode().tag(sync=True)
    choose = traitlets.Unicode().tag(sync=True)
    names = traitlets.List(traitlets.Unicode()).tag(sync=True)
    shares = traitlets.List(traitlets.List(traitlets.Float())).tag(sync=True)
    allowed = traitlets.List(traitlets.Bool()).tag(sync=True)
    # {"title", "unit", "cells": a number a block, "fixed"}
    costs = traitlets.List(traitlets.Dict()).tag(sync=True)
    presets = traitlets.List(traitlets.Dict()).tag(sync=True)  # {"name", "painted"}
    row_labels = traitlets.List(traitlets.Unicode()).tag(sync=True)
    column_labels = traitlets.List(traitlets.Unicode()).tag(sync=True)
    ask_label = traitlets.Unicode().tag(sync=True)
    asked = traitlets.Int(0).tag(sync=True)  # questions so far
    answer = traitlets.Dict({"n": 0, "text": ""}).tag(sync=True)  # to the n-th of them

    def __init__(
        self,
        shares: Mapping[str, Tensor],
        costs: Sequence[Cost],
        *,
        allowed: Tensor,
        presets: Mapping[str, Tensor],
        row_labels: Sequence[str],
        column_labels: Sequence[str],
        choose: str = "attention of",
        title: str = "",
        ask: Callable[[Tensor], str] | None = None,
        ask_label: str = "Ask the model",
    ):
        require(len(shares) > 0, "give the attention of one head at least: {'head 0': shares}")
        require(len(presets) > 0, "give one preset at least, to start from: {'all': allowed}")
        shape = (len(row_labels), len(column_labels))
        grids = {"allowed": allowed} | {f"preset {name!r}": x for name, x in presets.items()}
        grids |= {f"share {name!r}": x for name, x in shares.items()}
        grids |= {f"cost {cost.title!r}": cost.cells for cost in costs}
        for name, grid in grids.items():
            require(
                tuple(grid.shape) == shape,
                f"{name} must be {shape}, a value for each pair of labels; got {tuple(grid.shape)}",
            )
        for name, share in shares.items():
            rows, outside = share.double().sum(1), share[~allowed].abs().sum()
            require(
                bool((rows - 1).abs().max() < 1e-3) and bool(outside < 1e-3),
                f"every row of share {name!r} must sum to 1, over what is allowed; the sums go "
                f"from {float(rows.min()):.3g} to {float(rows.max()):.3g}",
            )
        for name, preset in presets.items():
            require(
                not bool((preset & ~allowed).any()),
                f"preset {name!r} paints what is not allowed; take `preset & allowed`",
            )
        self._ask, self._n_columns = ask, shape[1]
        super().__init__(
            title=title,
            choose=choose,
            names=list(shares),
            # six digits are enough for a picture, and a third of the bytes
            shares=[[round(x, 6) for x in s.double().flatten().tolist()] for s in shares.values()],
            allowed=allowed.flatten().tolist(),
            costs=[
                {
                    "title": cost.title,
                    "unit": cost.unit,
                    "cells": cost.cells.flatten().tolist(),
                    "fixed": cost.fixed,
                }
                for cost in costs
            ],
            presets=[
                {"name": name, "painted": _numbers(preset)} for name, preset in presets.items()
            ],
            row_labels=list(row_labels),
            column_labels=list(column_labels),
            ask_label=ask_label if ask is not None else "",
        )
        self.painted = list(self.presets[0]["painted"])

    @traitlets.validate("painted")
    def _only_allowed(self, proposal):
        wrong = [
            i for i in proposal["value"] if not 0 <= i < len(self.allowed) or not self.allowed[i]
        ]
        require(not wrong, f"these blocks cannot be painted: {wrong[:8]}")
        return sorted(set(proposal["value"]))

    @traitlets.validate("shown")
    def _one_of_them(self, proposal):
        require(
            0 <= proposal["value"] < len(self.names),
            f"shown must be 0 to {len(self.names) - 1}; got {proposal['value']}",
        )
        return proposal["value"]

    @property
    def mask(self) -> Tensor:
        """What is painted, (rows, columns) bool."""
        flat = torch.zeros(len(self.allowed), dtype=torch.bool)
        flat[torch.tensor(self.painted, dtype=torch.int64)] = True
        return flat.view(-1, self._n_columns)

    def kept_by_row(self) -> list[float]:
        """Share of each row's attention on painted blocks, for the share on show."""
        kept = [0.0] * len(self.row_labels)
        for i in self.painted:
            kept[i // self._n_columns] += self.shares[self.shown][i]
        return kept

    def kept(self) -> float:
        """Their mean: the attention that the mask keeps, 0 to 1."""
        rows = self.kept_by_row()
        return sum(rows) / len(rows)

    def spent(self) -> dict[str, tuple[float | int, float | int]]:
        """Cost by title: of what is painted, and of all that is allowed."""
        everything = [i for i, may in enumerate(self.allowed) if may]
        return {
            cost["title"]: tuple(
                cost["fixed"] + sum(cost["cells"][i] for i in blocks)
                for blocks in (self.painted, everything)
            )
            for cost in self.costs
        }

    def caption(self) -> str:
        """The picture in words, as the page says it."""
        rows = self.kept_by_row()
        least = min(range(len(rows)), key=lambda r: rows[r])
        words = (
            f"{self.names[self.shown]}: {len(self.painted)} of {sum(self.allowed)} blocks read, "
            f"{100 * self.kept():.1f}% of the attention kept."
        )
        for title, (spent, most) in self.spent().items():
            words += f" {title}: {100 * spent / most:.1f}% of dense."
        return (
            words + f" Row q {self.row_labels[least]} keeps least, {100 * abs(rows[least]):.1f}%."
        )

    @traitlets.observe("asked")
    def _answer(self, change):
        if self._ask is None or change["new"] <= self.answer["n"]:
            return
        try:
            text = self._ask(self.mask)
        except LabError as refused:
            text = str(refused)
        except Exception as failed:  # the page waits until it gets an answer
            text = f"{type(failed).__name__}: {failed}"
        self.answer = {"n": change["new"], "text": text}

    def frame(self) -> Frame:
        """What is painted, as a picture."""
        share, painted = self.shares[self.shown], set(self.painted)
        cells = [self._cell(i, share[i], i in painted, may) for i, may in enumerate(self.allowed)]
        n = self._n_columns
        grid = Grid(
            "percent of a row's attention",
            tuple(f"q {label}" for label in self.row_labels),
            tuple(tuple(cells[i : i + n]) for i in range(0, len(cells), n)),
            tuple(self.column_labels),
        )
        meters = [Meter("attention kept", 100 * self.kept(), "%", 100)]
        units = [cost["unit"] for cost in self.costs]
        for unit, (title, (spent, most)) in zip(units, self.spent().items(), strict=True):
            meters.append(Meter(title, spent, unit, most))
        return Frame(self.caption(), (grid, *meters), legend=tuple(NAMES.items()))

    def _cell(self, i: int, share: float, painted: bool, may: bool) -> Cell:
        row, column = divmod(i, self._n_columns)
        tone = "good" if painted else "idle" if not may else "bad" if share >= LOST else "cached"
        note = f"queries {self.row_labels[row]}, keys {self.column_labels[column]}: {NAMES[tone]}"
        if may:
            note += f"; {100 * share:.1f}% of the row's attention"
        text = f"{100 * share:.0f}" if share >= LOST else ""
        return Cell(text, tone, note, min(1.0, share) ** 0.5)

    def __repr__(self) -> str:
        return f"Paint({self.caption()})"

    def _repr_mimebundle_(self, **kwargs):
        """The live widget, and a still picture for every place that has no kernel."""
        bundle = super()._repr_mimebundle_(**kwargs) or {}
        # the metadata tells Colab where its widget manager is
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        picture = base64.b64encode(draw_frame(self.frame()).encode()).decode()
        caption = escape(self.caption())
        title = f"<p><strong>{escape(self.title)}</strong></p>" if self.title else ""
        spent = "".join(
            f"<li>{escape(title)}: {number(spent)} of {number(most)}</li>"
            for title, (spent, most) in self.spent().items()
        )
        html = (
            f'{title}<figure style="margin:8px 0"><img alt="{caption}" '
            f'src="data:image/svg+xml;base64,{picture}"/><figcaption>{caption}</figcaption>'
            f"</figure><ul>{spent}</ul>"
        )
        return {**data, "text/plain": repr(self), "text/html": html}, metadata


def _numbers(grid: Tensor) -> list[int]:
    return grid.flatten().nonzero()[:, 0].tolist()
