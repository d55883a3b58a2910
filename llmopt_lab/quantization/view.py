"""Pictures of rounding, packing and GPTQ. Reads what was recorded: nothing here rounds.

with recording() as trace:
    gptq(weight, hessian, bits=3)
Player(frames(trace, weight=weight, hessian=hessian, rounded=dequantize(quantize(weight, bits=3))))
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import ceil_div, tiles
from llmopt_lab.core.trace import Step, Trace
from llmopt_lab.quantization.records import (
    ColumnQuantized,
    GroupScaled,
    Quantized,
    ScaleTried,
    TileFinished,
)
from llmopt_lab.widgets.panels import Bar, Bars, Cell, Chart, Frame, Grid, Line, Meter

MAX_ROWS, MAX_COLUMNS = 8, 12  # of single weights
PLAIN_ROWS, PLAIN_COLUMNS = 6, 16  # beyond: each cell stands for several
VISIBLE = 0.02  # a correction that is shown, in shares of the farthest move
GPTQ = (GroupScaled, ColumnQuantized, TileFinished)
LEGEND = (
    ("new", "rounded by this step"),
    ("good", "rounded"),
    ("active", "moved by this step"),
    ("idle", "not rounded yet"),
)
BEST_LEGEND = (("idle", "float"), ("good", "best"), ("active", "others"))
WAYS = {  # of rounding, as the measured results have them
    "nearest": {"method": "rtn"},
    "AWQ": {"method": "awq"},
    "GPTQ": {"method": "gptq"},
    "GPTQ, act-order": {"method": "gptq", "act_order": True},
}
PACKING_LEGEND = (
    ("owner0", "low half"),
    ("owner1", "high half"),
    ("good", "packed"),
    ("bad", "wrong"),
    ("idle", "to come"),
)


@dataclass
class _Layer:
    """The weight as GPTQ has it by now, folded from the records seen so far."""

    weight: Tensor  # (rows, cols) float64, as it was
    order: list[int]  # step -> column
    now: Tensor  # like weight: rounded values, and compensated ones that wait
    shift: Tensor  # like weight: what was taken off since the last frame
    codes: dict[int, list[int]] = field(default_factory=dict)  # column -> codes, once rounded
    fresh: set[int] = field(default_factory=set)  # columns rounded since the last frame

    def fold(self, what: GroupScaled | ColumnQuantized | TileFinished) -> None:
        match what:
            case ColumnQuantized(step, column, codes, error, spread):
                self.now[:, column] -= error
                self._take_off(spread, step + 1)
                self.codes[column] = codes.tolist()
                self.fresh.add(column)
            case TileFinished(steps, spread):
                self._take_off(spread, steps.stop)

    def _take_off(self, spread: Tensor, first: int) -> None:
        columns = self.order[first : first + spread.shape[1]]
        self.now[:, columns] -= spread
        self.shift[:, columns] += spread

    def next_frame(self) -> None:
        self.fresh.clear()
        self.shift.zero_()

    def moved(self) -> Tensor:
        """(rows, cols): how far each weight is from what it was."""
        return (self.now - self.weight).abs()


def _untouched(weight: Tensor, order: list[int]) -> _Layer:
    return _Layer(weight, order, weight.clone(), torch.zeros_like(weight))


def frames(trace: Trace, *, weight: Tensor, hessian: Tensor, rounded: Tensor) -> list[Frame]:
    """One frame a column that GPTQ rounds: the weights, the wave of corrections, the errors.

    A cell is filled the more, the farther its weight is from the original. Up to 8 rows and 12
    columns a cell is one weight and shows its code once it is rounded; beyond, a cell stands for
    several, and a frame for as many columns as a cell.

    Args:
        trace: of one run of `gptq`.
        weight: (rows, cols), what was quantized.
        hessian: (cols, cols), what it was quantized with.
        rounded: (rows, cols), the weight after rounding alone, to compare with.

    Raises:
        BadInput: the trace does not hold one run over all columns of `weight`.
    """
    steps = [s for s in trace.steps if isinstance(s.what, GPTQ)]
    order = [what.column for what in trace.of(ColumnQuantized)]
    n_rows, n_cols = weight.shape
    require(
        sorted(order) == list(range(n_cols)),
        f"frames shows one run of gptq over all {n_cols} columns of the weight; this trace rounds "
        f"{len(order)} columns. Call gptq once inside `with recording() as trace:`.",
    )
    weight, rounded, hessian = weight.double(), rounded.double(), hessian.double()
    layer = _untouched(weight, order)
    for step in steps:
        layer.fold(step.what)
    whole = float((weight @ hessian * weight).sum()) or 1.0
    in_words = n_rows <= MAX_ROWS and n_cols <= MAX_COLUMNS
    height = 1 if in_words else ceil_div(n_rows, PLAIN_ROWS)
    width = 1 if in_words else ceil_div(n_cols, PLAIN_COLUMNS)
    rows, cols = list(tiles(n_rows, height)), list(tiles(n_cols, width))
    farthest = max(float(layer.moved()[r, c].mean()) for r in rows for c in cols) or 1.0

    def error(of: Tensor) -> float:
        """Of the layer's output, in percent of its sum of squares."""
        d = of - weight
        return 100 * float((d @ hessian * d).sum()) / whole

    layer = _untouched(weight, order)
    alone = weight.clone()  # the same columns rounded, without corrections
    curves = {"GPTQ": [], "rounding": []}
    result = []
    for step, following in zip_longest(steps, steps[1:]):
        layer.fold(step.what)
        n_done = len(layer.codes)
        alone[:, order[:n_done]] = rounded[:, order[:n_done]]
        if width > 1:  # a frame for each cell's worth of columns, its tile's corrections included
            whole_cell = n_done % width == 0 or n_done == n_cols
            if not whole_cell or following and not isinstance(following.what, ColumnQuantized):
                continue
        for name, made in (("GPTQ", layer.now), ("rounding", alone)):
            curves[name].append((n_done, error(made)))
        what = step.what if width == 1 else f"{n_done} of {n_cols} columns rounded"
        caption = (
            f"{what}. Output error {curves['GPTQ'][-1][1]:.3g} %, by rounding alone "
            f"{curves['rounding'][-1][1]:.3g} %."
        )
        lines = tuple(
            Line(name, tuple(curves[name]), tone)
            for name, tone in (("GPTQ", "good"), ("rounding", "bad"))
        )
        at_the_end = float((rounded - weight).norm())
        panels = (
            _weights(layer, rows, cols, in_words, farthest),
            Chart("output error so far", lines, f"of {n_cols} columns", "%"),
            Meter("weights moved: GPTQ", float(layer.moved().norm()), "", at_the_end, "good"),
            Meter("weights moved: rounding", float((alone - weight).norm()), "", at_the_end, "bad"),
        )
        result.append(_frame(step, caption, panels, LEGEND))
        layer.next_frame()
    return result


def _weights(
    layer: _Layer, rows: list[slice], cols: list[slice], in_words: bool, farthest: float
) -> Grid:
    """The layer as a heat map of how far its weights have moved."""
    moved, shift = layer.moved(), layer.shift.abs()
    grid = []
    for r in rows:
        line = []
        for c in cols:
            inside = set(range(c.start, c.stop))
            if inside <= layer.codes.keys():
                tone = "new" if inside & layer.fresh else "good"
            else:
                tone = "active" if shift[r, c].max() > VISIBLE * farthest else "idle"
            distance = float(moved[r, c].mean())
            word, name = "", f"row {_text(r)}, column {_text(c)}"
            if in_words:
                now, was = _short(float(layer.now[r, c])), _short(float(layer.weight[r, c]))
                word, note = now, f"{name}: now {now}, was {was}"
                if c.start in layer.codes:
                    word = str(layer.codes[c.start][r.start])
                    note = f"{name}: code {word} stands for {now}, was {was}"
            else:
                note = f"{name}: moved by {_short(distance)} on average"
            line.append(Cell(word, tone, note, min(1.0, distance / farthest)))
        grid.append(tuple(line))
    title = "weights, and codes where rounded" if in_words else "how far the weights have moved"
    labels = tuple(f"row {_text(r)}" for r in rows)
    return Grid(title, labels, tuple(grid), tuple(str(c.start) for c in cols))


def rounding_frames(trace: Trace, q: Quantized, *, weight: Tensor, row: int = 0) -> list[Frame]:
    """One frame a scale that `quantize` chose: one row of the weight, its codes, what comes back.

    Args:
        trace: of the run that made `q`.
        weight: (rows, cols), what was quantized; at most 12 columns.
        row: of the weight, the one to show.

    Raises:
        BadInput: too many columns, or a trace without a scale.
    """
    n_cols = weight.shape[1]
    require(
        n_cols <= MAX_COLUMNS,
        f"a picture has room for {MAX_COLUMNS} columns; got {n_cols}: show weight[:, :12]",
    )
    steps = [step for step in trace.steps if isinstance(step.what, GroupScaled)]
    require(
        bool(steps), "no scale in this trace: call quantize inside `with recording() as trace:`"
    )
    was, back, codes = weight[row].double(), _values(q)[row], q.codes[row].tolist()
    scales = [_scale(q, row, c)[0] for c in range(n_cols)]
    lines = {
        "weight": [_short(x) for x in was.tolist()],
        "weight / scale": [_short(x / s) for x, s in zip(was.tolist(), scales, strict=True)],
        "code": [str(code) for code in codes],
        "comes back": [_short(x) for x in back.tolist()],
        "off by": [_short(x) for x in (was - back).tolist()],
    }
    low, high = -(1 << q.bits - 1), (1 << q.bits - 1) - 1
    result = []
    for step in steps:
        here = step.what.cols
        scale, zero = _scale(q, row, here.start)
        rows = []
        for name, words in lines.items():
            shown = [w if c < here.stop or name == "weight" else "" for c, w in enumerate(words)]
            notes = [f"column {c}, {name}: {w}" if w else "" for c, w in enumerate(shown)]
            rows.append(
                tuple(
                    Cell(w, _stage(c, here), n)
                    for c, (w, n) in enumerate(zip(shown, notes, strict=True))
                )
            )
        if q.zeros is not None:
            why = f"codes {low} to {high}, scale {scale:.3g}, and code {zero} stands for 0"
        else:
            why = f"codes {-high} to {high}, scale {scale:.3g} = {scale * high:.3g} / {high}"
        error = float((was - back)[here].abs().max())
        panels = (
            Grid(f"row {row}", tuple(lines), tuple(rows), tuple(map(str, range(n_cols)))),
            Meter("largest error of these, beside half a step", error, "", scale / 2, "new"),
        )
        caption = (
            f"columns {here.start} to {here.stop - 1}: {why}. The largest error is {error:.3g}."
        )
        legend = (("new", "this scale's columns"), ("good", "rounded before"), ("idle", "to come"))
        result.append(_frame(step, caption, panels, legend))
    return result


def _stage(column: int, here: slice) -> str:
    return "good" if column < here.start else "new" if column < here.stop else "idle"


def scales_frame(weight: Tensor, ways: Mapping[str, Quantized]) -> Frame:
    """One weight rounded in several ways, side by side: which codes are left of it.

    Args:
        weight: (rows, cols), at most 8 by 12.
        ways: how it was rounded -> what came out.
    """
    require(
        weight.shape[0] <= MAX_ROWS and weight.shape[1] <= MAX_COLUMNS,
        f"a picture has room for {MAX_ROWS} x {MAX_COLUMNS} weights; got {tuple(weight.shape)}",
    )
    top = int(weight.abs().argmax())
    largest = divmod(top, weight.shape[1])
    panels, bars, told = [], [], []
    for name, q in ways.items():
        rows, lost = [], 0
        for r, row in enumerate(weight.tolist()):
            cells = []
            for c, value in enumerate(row):
                s, z = _scale(q, r, c)
                code = int(q.codes[r, c])
                gone = code == z and value != 0
                lost += gone
                tone = "new" if (r, c) == largest else "bad" if gone else "good"
                note = (
                    f"row {r}, column {c}: {_short(value)} is code {code}, {_short((code - z) * s)}"
                )
                cells.append(Cell(str(code), tone, note))
            rows.append(tuple(cells))
        n_scales = q.scales.numel()
        panels.append(
            Grid(f"{name}: {n_scales} {'scale' if n_scales == 1 else 'scales'}", (), tuple(rows))
        )
        others, made = weight.double().clone(), _values(q)
        others[largest] = made[largest] = 0
        share = 100 * float((made - others).norm() / others.norm())
        bars.append(Bar(name, share, "bad" if share > 50 else "good"))
        told.append(f"{name} {lost}")
    caption = (
        f"The largest weight is {_short(float(weight.flatten()[top]))}. Of {weight.numel()} "
        f"weights, so many became 0: {', '.join(told)}."
    )
    panels.append(Bars("error of all weights but the largest", tuple(bars), "%", 100))
    legend = (("new", "the largest weight"), ("good", "kept"), ("bad", "became 0"))
    return Frame(caption, tuple(panels), legend=legend)


def packing_frames(codes: Tensor, packed: Tensor, back: Tensor) -> list[Frame]:
    """One frame a byte: the two 4-bit codes that went into it, its bits, and what comes out.

    Args:
        codes: (n,) int8, n even.
        packed: (n / 2,) uint8, somebody's packing of them: the even code in the low half.
        back: (n,) int8, what somebody unpacked.
    """
    n = len(codes)
    require(
        codes.shape == back.shape == (n,) and packed.shape == (n // 2,) and n % 2 == 0,
        f"codes and back must be (n,), packed (n / 2,), n even; got {tuple(codes.shape)}, "
        f"{tuple(back.shape)}, {tuple(packed.shape)}",
    )
    result = []
    for i in range(n // 2):
        first, second = 2 * i, 2 * i + 1
        byte = int(packed[i])
        bits = [*f"{byte:08b}"]
        rows = {
            "codes": [str(x) for x in codes.tolist()],
            "come back": [str(x) if j <= second else "" for j, x in enumerate(back.tolist())],
        }

        def tone(j: int, name: str, here: int = i) -> str:
            if name == "come back" and j <= 2 * here + 1 and back[j] != codes[j]:
                return "bad"
            if j // 2 == here:
                return "owner0" if j % 2 == 0 else "owner1"
            return "good" if j < 2 * here else "idle"

        grid = tuple(
            tuple(Cell(w, tone(j, name), f"code {j}: {w}") for j, w in enumerate(words))
            for name, words in rows.items()
        )
        halves = tuple(
            Cell(b, "owner1" if j < 4 else "owner0", f"bit {7 - j}: {b}")
            for j, b in enumerate(bits)
        )
        a, b = int(codes[first]), int(codes[second])
        wrong = "" if back[first] == a and back[second] == b else " That is not what went in."
        caption = (
            f"codes {a} and {b} share byte {i}: {''.join(bits[:4])} {''.join(bits[4:])}, {byte}. "
            f"Unpacked: {int(back[first])} and {int(back[second])}.{wrong}"
        )
        panels = (
            Grid("4-bit codes", tuple(rows), grid, tuple(map(str, range(n)))),
            Grid(f"byte {i}", (), (halves,), tuple("76543210")),
            Meter("packed", i + 1, "bytes", second + 1, "good"),
        )
        result.append(Frame(caption, panels, legend=PACKING_LEGEND))
    return result


def search_frames(trace: Trace) -> list[Frame]:
    """One frame an alpha that `awq_scales` tried: the output error over alpha, the best so far.

    Raises:
        BadInput: the trace holds no trial.
    """
    steps = [step for step in trace.steps if isinstance(step.what, ScaleTried)]
    require(bool(steps), "no trial in this trace: call awq_scales inside `with recording()`")
    top = max(step.what.error for step in steps)
    base = steps[0].what.error or 1.0
    result, points = [], []
    for step in steps:
        points.append((step.what.alpha, 100 * step.what.error / base))
        best = min(points, key=lambda point: point[1])
        lines = (Line("tried", tuple(points), "new"), Line("best", (best,), "good"))
        caption = (
            f"alpha {step.what.alpha:.2f}: the output error is {points[-1][1]:.0f} % of "
            f"rounding's. Best so far: alpha {best[0]:.2f} with {best[1]:.0f} %."
        )
        chart = Chart(
            "output error, plain rounding is 100 %", lines, "alpha", "%", 100 * top / base
        )
        result.append(_frame(step, caption, (chart,), (("new", "tried"), ("good", "best"))))
    return result


def recorded_ways(record: dict, **how) -> dict[str, dict]:
    """Way -> its row of one model's measured results, of the ways that were measured so.

    Args:
        record: of one model in results/perplexity.json.
        how: bits, group_size and symmetric, as for `quantize_model`.
    """
    return {
        way: row
        for way, named in WAYS.items()
        for row in record["rows"]
        if row["how"] == named | how
    }


def recorded_variant(
    record: dict, *, how: dict | None, rotation: str | None = None, inputs: dict | None = None
) -> dict:
    """The measured row of one variant: of a block format, a rotation, or rounded activations.

    Args:
        record: of one model in results/perplexity.json.
        how: arguments of `quantize_model`, or None for float weights.
        rotation: None, "offline" or "online".
        inputs: {"bits": .., "observer": ..} of the activations, or None for float ones.

    Raises:
        BadInput: it was not measured.
    """
    asked = {"how": how, "rotation": rotation, "inputs": inputs}
    rows = [row for row in record["variants"] if asked.items() <= row.items()]
    require(len(rows) == 1, f"not measured on this model: {asked}")
    return rows[0]


def loudness_frames(ways: Mapping[str, Tensor]) -> list[Frame]:
    """One frame a way: how loud each channel of one layer's input is, the loudest first.

    Args:
        ways: name -> inputs (rows, channels) of the same layer, at most three.

    Raises:
        BadInput: more ways than there are tones.
    """
    tones = ("bad", "good", "active")
    require(
        0 < len(ways) <= len(tones), f"1 to {len(tones)} ways can be told apart; got {len(ways)}"
    )
    curves = {}
    for name, x in ways.items():
        loud = (x.abs().amax(0) / x.square().mean().sqrt()).sort(descending=True).values
        curves[name] = [round(float(y), 3) for y in loud]
    top = max(curve[0] for curve in curves.values())
    lines, result = [], []
    for (name, curve), tone in zip(curves.items(), tones, strict=False):
        lines.append(Line(name, tuple(enumerate(curve)), tone))
        caption = (
            f"{name}: the loudest of {len(curve)} channels reaches {curve[0]:.1f} times the root "
            f"mean square of the input, the median one {curve[len(curve) // 2]:.1f} times."
        )
        chart = Chart(
            "largest |x| of each channel, in root mean squares of x",
            tuple(lines),
            "by rank",
            top=top,
        )
        legend = tuple((tone, name) for name, tone in zip(curves, tones, strict=False))
        result.append(Frame(caption, (chart,), legend=legend))
    return result


def quality_frames(record: dict, *, bits: int, symmetric: bool = True) -> list[Frame]:
    """One frame a group size: measured perplexity of every way of rounding, beside the float model.

    Args:
        record: of one model in results/perplexity.json.

    Raises:
        BadInput: nothing was measured so.
    """
    base, result = record["float"]["perplexity"], []
    for group_size in (32, 64, 128, None):
        rows = recorded_ways(record, bits=bits, group_size=group_size, symmetric=symmetric)
        if not rows:
            continue
        best = min(rows, key=lambda way: rows[way]["perplexity"])
        bars = [Bar("float", base, "idle")]
        bars += [
            Bar(w, r["perplexity"], "good" if w == best else "active") for w, r in rows.items()
        ]
        excess = ", ".join(f"{way} {row['excess']:+.3f}" for way, row in rows.items())
        caption = (
            f"{_named(bits, group_size, symmetric)}: {rows[best]['bits_per_weight']:.3g} bits a "
            f"weight. Bits per byte of text above the float model: {excess}."
        )
        panel = Bars("perplexity on held-out text", tuple(bars), "", 4 * base)
        result.append(Frame(caption, (panel,), legend=BEST_LEGEND))
    require(
        bool(result),
        f"not measured on this model: {bits} bits {'without' if symmetric else 'with'} zero point",
    )
    return result


def budget_frames(record: dict, budgets: Sequence[float | int]) -> list[Frame]:
    """One frame a budget: the best measured configuration of every way that costs no more.

    Args:
        record: of one model in results/perplexity.json.
        budgets: bits a weight, scales and zero points included; those too small for all are left
            out.
    """
    result = []
    for budget in budgets:
        rows = {
            way: [
                row
                for row in record["rows"]
                if row["bits_per_weight"] <= budget and row["how"].items() >= named.items()
                and ("act_order" in row["how"]) == ("act_order" in named)
            ]
            for way, named in WAYS.items()
        }  # fmt: skip
        found = {
            way: min(mine, key=lambda row: row["excess"]) for way, mine in rows.items() if mine
        }
        if not found:
            continue
        best = min(found, key=lambda way: found[way]["excess"])
        bars = tuple(
            Bar(way, max(row["excess"], 0), "good" if way == best else "active")
            for way, row in found.items()
        )
        told = "; ".join(
            f"{way}: {_named(*(row['how'][key] for key in ('bits', 'group_size', 'symmetric')))}"
            for way, row in found.items()
        )
        panel = Bars("bits per byte above the float model", bars, "", 0.4)
        caption = f"At most {budget:g} bits a weight. Best of each way: {told}."
        result.append(Frame(caption, (panel,), legend=BEST_LEGEND))
    require(bool(result), f"nothing was measured with at most {max(budgets)} bits a weight")
    return result


def _named(bits: int, group_size: int | None, symmetric: bool) -> str:
    group = f"groups of {group_size}" if group_size else "one scale a row"
    return f"{bits} bits, {group}" + ("" if symmetric else ", zero point")


def _scale(q: Quantized, row: int, column: int) -> tuple[float, int]:
    """Scale and zero point of one weight."""
    at = min(row, len(q.scales) - 1), column // q.group_size
    return float(q.scales[at]), 0 if q.zeros is None else int(q.zeros[at])


def _values(q: Quantized) -> Tensor:
    """What the codes stand for, (rows, cols) float64."""
    group = [c // q.group_size for c in range(q.codes.shape[1])]
    zeros = 0 if q.zeros is None else q.zeros.double()[:, group]
    return (q.codes.double() - zeros) * q.scales.double()[:, group]


def _frame(step: Step, caption: str, panels: tuple, legend: tuple) -> Frame:
    return Frame(caption, panels, step.file, step.line, step.index, legend)


def _text(span: slice) -> str:
    first, last = span.start, span.stop - 1
    return f"{first}" if first == last else f"{first}-{last}"


def _short(x: float) -> str:
    if abs(x) >= 100:
        text = f"{x:.0f}"
    else:
        text = f"{x:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text
