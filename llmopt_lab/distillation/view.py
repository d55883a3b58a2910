"""Pictures of distributions that meet. Reads what was recorded: nothing here softens or trains.

with recording(Softened) as trace:
    for t in (0.5, 1, 2, 4):
        soft_targets(teacher_logits, t), soft_targets(student_logits, t)
Player(frames(trace, words=["cat", "dog", ...]))
"""

import math
from collections.abc import Sequence

from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import Load, Store
from llmopt_lab.core.trace import Step, Trace
from llmopt_lab.distillation.records import Fitted, RowsDone, Softened, Stepped
from llmopt_lab.widgets.panels import Bar, Bars, Cell, Chart, Frame, Grid, Line, Meter

MAX_TOKENS = 8  # shown alone; the others are one column
STILL = 0.005  # a push that is shown as none
LEGEND = (
    ("owner0", "teacher p"),
    ("owner1", "student q"),
    ("good", "pushed up"),
    ("bad", "pushed down"),
)
TWO = LEGEND[:2]
CHUNKS = (("new", "in memory"), ("good", "done"), ("idle", "not made yet"))


def frames(trace: Trace, *, words: Sequence[str], place: int = 0) -> list[Frame]:
    """One frame a temperature: teacher, student, and the push that each logit of the student gets.

    The push is minus the gradient of T^2 KL(p || q) of one place: T (p - q).

    Args:
        trace: `soft_targets` of the teacher and then of the student, at one temperature after the
            other; logits (n_vocab,) or (places, n_vocab).
        words: n_vocab names of tokens.
        place: which row.

    Raises:
        BadInput: no such pairs in the trace, as many words as tokens are not given, no such row.
    """
    pairs = _pairs([s for s in trace.steps if isinstance(s.what, Softened)])
    rows = [[_row(step.what.p, place) for step in pair] for pair in pairs]
    require(
        len(words) == len(rows[0][0]),
        f"give a word for each of the {len(rows[0][0])} tokens; got {len(words)}",
    )
    shown = _likeliest(rows)
    top = max(float(x.max()) for pair in rows for x in pair)
    names = tuple(words[i] for i in shown) + (("others",) if len(shown) < len(words) else ())
    result, sizes = [], []
    for (_, student), (p, q) in zip(pairs, rows, strict=True):
        t = student.what.temperature
        push = t * (p - q)
        sizes.append((t, float(push.norm())))
        kl = _kl(p, q)
        cells = [_with_others(x, shown, len(words)) for x in (p, q, push)]
        largest = max(range(len(names)), key=lambda i: abs(cells[2][i]))  # noqa: B023
        caption = (
            f"T = {t:g}: KL(p || q) = {kl:.3f} nats, times T² {t * t * kl:.3f}. "
            f"The largest push is on {names[largest]!r}: {_arrow(cells[2][largest])}, from "
            f"q = {cells[1][largest]:.3f} towards p = {cells[0][largest]:.3f}."
        )
        panels = [
            Grid(
                "teacher, student, and the push T (p − q)",
                ("teacher p", "student q", "push"),
                (
                    _shares(cells[0], names, "owner0", "teacher", top),
                    _shares(cells[1], names, "owner1", "student", top),
                    _pushes(cells[2], names),
                ),
                names,
            ),
            Meter("KL(p || q)", round(kl, 4), "nats"),
            Meter("T² KL(p || q)", round(t * t * kl, 4), "nats"),
        ]
        if len(pairs) > 1:
            panels.append(_sizes(sizes))
        result.append(
            Frame(caption, tuple(panels), student.file, student.line, student.index, LEGEND)
        )
    return result


def training_frames(trace: Trace, *, words: Sequence[str]) -> list[Frame]:
    """One frame a report of `train(.., probe=..)`: the student nears its teacher at one place.

    Raises:
        BadInput: nothing was recorded, or not one word a token is given.
    """
    steps = [s for s in trace.steps if isinstance(s.what, Stepped)]
    require(
        len(steps) > 0,
        "no report of a training is in this trace: call train(.., probe=tokens) inside "
        "`with recording(Stepped) as trace:`",
    )
    require(
        len(words) == len(steps[0].what.p),
        f"give a word for each of the {len(steps[0].what.p)} tokens; got {len(words)}",
    )
    shown = _likeliest([[s.what.p, s.what.q] for s in (steps[0], steps[-1])])
    top = max(float(x.max()) for s in steps for x in (s.what.p, s.what.q))
    names = [words[i] for i in shown]
    losses = [(s.what.step, s.what.loss) for s in steps]
    result = []
    for i, step in enumerate(steps):
        p, q = step.what.p, step.what.q
        kl, first = _kl(p, q), int(q.argmax())
        bars = []
        for token, name in zip(shown, names, strict=True):
            bars += [
                Bar(f"{name}, teacher", round(float(p[token]), 4), "owner0"),
                Bar(f"{name}, student", round(float(q[token]), 4), "owner1"),
            ]
        agree = "the teacher's too" if first == int(p.argmax()) else "not the teacher's"
        caption = (
            f"Step {step.what.step:,}: loss {step.what.loss:.3f}. Here the student's first choice "
            f"is {words[first]!r} ({float(q[first]):.0%}), {agree}; KL(p || q) {kl:.3f} nats."
        )
        panels = (
            Bars("what both expect next", tuple(bars), "", top),
            Chart(
                "loss",
                (Line("so far", tuple(losses[: i + 1]), "active"),),
                "step",
                "nats",
                max(loss for _, loss in losses),
            ),
            Meter("KL(p || q) here", round(kl, 4), "nats"),
        )
        result.append(Frame(caption, panels, step.file, step.line, step.index, TWO))
    return result


def hump_frames(trace: Trace, *, name: str, every: int = 10) -> list[Frame]:
    """Some steps of `fit_one_hump`: one hump looks for its place under two.

    Beside each other, the forward KL covers both and the reverse KL seeks one:
    Player(hump_frames(forward, name="forward KL"), versus=hump_frames(reverse, name="reverse KL")).

    Args:
        trace: of one `fit_one_hump`.
        name: of the divergence.
        every: steps from frame to frame; the last is always shown.

    Raises:
        BadInput: no step in the trace, or several runs.
    """
    steps = [s for s in trace.steps if isinstance(s.what, Fitted)]
    numbers = [s.what.step for s in steps]
    require(
        len(steps) > 0 and numbers == list(range(len(steps))),
        "hump_frames shows one run of fit_one_hump; call it once inside "
        f"`with recording(Fitted) as trace:`. This trace has the steps {numbers[:5]} ...",
    )
    require(every > 0, f"every must be positive; got {every}")
    picked = steps[::every] + ([] if (len(steps) - 1) % every == 0 else [steps[-1]])
    top = max(float(x.max()) for s in picked for x in (s.what.p, s.what.q))
    losses = [(s.what.step, s.what.loss) for s in picked]
    result = []
    for i, step in enumerate(picked):
        what = step.what
        between = _valley(what.p)
        caption = (
            f"Step {what.step}: mean {what.mean:.2f}, width {what.width:.2f}, {name} "
            f"{what.loss:.3f} nats. Between the humps the student has {float(what.q[between]):.3f} "
            f"where the teacher has {float(what.p[between]):.3f}."
        )
        panels = (
            Chart(
                f"{name}: two humps and one",
                (
                    Line("teacher p", _points(what.x, what.p), "owner0"),
                    Line("student q", _points(what.x, what.q), "owner1"),
                ),
                "place",
                "",
                top,
            ),
            Chart(
                f"{name} in nats",
                (Line("so far", tuple(losses[: i + 1]), "active"),),
                "step",
                "nats",
                max(loss for _, loss in losses),
            ),
        )
        result.append(Frame(caption, panels, step.file, step.line, step.index, TWO))
    return result


def chunk_frames(trace: Trace) -> list[Frame]:
    """One frame a chunk of `linear_kl`: whose logits are in memory, and what has moved so far.

    Raises:
        BadInput: no run in the trace, several, or one recorded without its loads and stores.
    """
    done = [s for s in trace.steps if isinstance(s.what, RowsDone)]
    starts = [s.what.rows.start for s in done]
    logits = [s.what for s in trace.steps if isinstance(s.what, Store) and s.what.name == "logits"]
    require(
        len(done) > 0 and starts == sorted(set(starts)) and starts[0] == 0 and len(logits) > 0,
        "chunk_frames shows one run of linear_kl with its loads and stores; call it once inside "
        f"`with recording() as trace:`. This trace has chunks that start at {starts[:6]}",
    )
    n_tokens = done[-1].what.rows.stop
    buffer = max(what.nbytes for what in logits)
    whole = buffer // max(s.what.rows.stop - s.what.rows.start for s in done) * n_tokens
    result, moved, passed = [], 0, iter(trace.steps)
    for number, step in enumerate(done):
        for earlier in passed:
            if isinstance(earlier.what, Load | Store):
                moved += earlier.what.nbytes
            if earlier is step:
                break
        rows, loss = step.what.rows, step.what.loss
        cells = []
        for other in done:
            at = other.what.rows
            name = f"tokens {at.start} to {at.stop - 1}"
            if other is step:
                cells.append(Cell("in the buffer", "new", f"{name}: logits, now their gradient"))
            elif at.start < rows.start:
                mean = float(other.what.loss.mean())
                cells.append(Cell(f"{mean:.2f} nats", "good", f"{name}: done, {mean:.3f} nats"))
            else:
                cells.append(Cell("not made", "idle", f"{name}: no logits yet"))
        caption = (
            f"Chunk {number + 1} of {len(done)}, tokens {rows.start} to {rows.stop - 1}: mean "
            f"{float(loss.mean()):.3f} nats. Its logits became their gradient where they lie; "
            f"{buffer:,} bytes hold a chunk, all the logits would take {whole:,}."
        )
        panels = (
            Grid(
                "logits of the tokens",
                ("chunk",),
                (tuple(cells),),
                tuple(f"{s.what.rows.start}–{s.what.rows.stop - 1}" for s in done),
            ),
            Meter("logits in memory", buffer, "bytes", whole),
            Meter("moved so far", moved, "bytes"),
        )
        result.append(Frame(caption, panels, step.file, step.line, step.index, CHUNKS))
    return result


def _pairs(steps: list[Step]) -> list[tuple[Step, Step]]:
    """(teacher, student) of each temperature, in order."""
    pairs = list(zip(steps[::2], steps[1::2], strict=False))
    good = len(steps) > 0 and len(steps) % 2 == 0
    good = good and all(
        a.what.temperature == b.what.temperature and a.what.p.shape == b.what.p.shape
        for a, b in pairs
    )
    require(
        good,
        "frames shows soft_targets(teacher_logits, t) followed by soft_targets(student_logits, t), "
        f"for one t after the other; this trace has {len(steps)} of them at temperatures "
        f"{[s.what.temperature for s in steps[:6]]}",
    )
    return pairs


def _row(p: Tensor, place: int) -> Tensor:
    rows = p.reshape(-1, p.shape[-1])
    require(0 <= place < len(rows), f"place must be 0 to {len(rows) - 1}; got {place}")
    return rows[place].double()


def _likeliest(rows: list[list[Tensor]]) -> list[int]:
    """The tokens to show, in their order: those that get most from anyone at any time."""
    most = rows[0][0].clone()
    for pair in rows:
        for x in pair:
            most = most.maximum(x.to(most))
    n = len(most)
    return list(range(n)) if n <= MAX_TOKENS else sorted(most.topk(MAX_TOKENS).indices.tolist())


def _with_others(x: Tensor, shown: list[int], n: int) -> list[float]:
    values = [float(x[i]) for i in shown]
    return values + [float(x.sum()) - sum(values)] if len(shown) < n else values


def _kl(p: Tensor, q: Tensor) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a > 0)


def _shares(
    values: list[float], names: Sequence[str], tone: str, who: str, top: float
) -> tuple[Cell, ...]:
    return tuple(
        Cell(f"{v:.3f}", tone, f"{who}, {name}: {v:.3f}", max(0.0, min(1.0, v / top)))
        for v, name in zip(values, names, strict=True)
    )


def _pushes(values: list[float], names: Sequence[str]) -> tuple[Cell, ...]:
    cells = []
    for value, name in zip(values, names, strict=True):
        tone = "idle" if abs(value) < STILL else "good" if value > 0 else "bad"
        cells.append(Cell(_arrow(value), tone, f"push on {name}: {value:+.3f}"))
    return tuple(cells)


def _arrow(value: float) -> str:
    return f"{'·' if abs(value) < STILL else '▲' if value > 0 else '▼'} {abs(value):.2f}"


def _sizes(sizes: list[tuple[float, float]]) -> Chart:
    """Of the gradient, with T^2 and as the chain rule alone gives it, up to this frame."""
    return Chart(
        "size of the gradient",
        (
            Line("with T²", tuple(sizes), "good"),
            Line("without", tuple((t, size / t**2) for t, size in sizes), "bad"),
        ),
        "T",
    )


def _points(x: Tensor, y: Tensor) -> tuple[tuple[float, float], ...]:
    """Of a line; what is drawn as 0 says 0."""
    return tuple(zip(x.tolist(), (round(value, 4) for value in y.tolist()), strict=True))


def _valley(p: Tensor) -> int:
    """The lowest place between the first and the last that are higher than both neighbours."""
    x = p.tolist()
    peaks = [i for i in range(1, len(x) - 1) if x[i - 1] < x[i] >= x[i + 1]] or [0]
    return min(range(peaks[0], peaks[-1] + 1), key=x.__getitem__)
