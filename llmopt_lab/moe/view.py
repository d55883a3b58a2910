"""Pictures of a mixture of experts: who visits whom, who is full, which weights are read.

with recording() as trace:
    moe_layer(*toy(), k=2, capacity=4)
Player(frames(trace))
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import Load
from llmopt_lab.core.trace import Record, Trace
from llmopt_lab.moe.records import (
    NOBODY,
    Combined,
    ExpertRan,
    ExpertsChose,
    Grouping,
    Overflowed,
    Routing,
    TrainingReport,
)
from llmopt_lab.widgets.panels import (
    Arrows,
    Bar,
    Bars,
    Cell,
    Chart,
    Frame,
    Grid,
    Line,
    Meter,
    Token,
    Tokens,
)

MAX_TOKENS, MAX_VISITS = 12, 36  # beyond: no arrows, a box a token
MAX_BARS = 16  # beyond: the busiest experts only
NAMED = 6  # dropped visits that a caption names
SHOWN = (Routing, Overflowed, Grouping, ExpertRan, Combined, ExpertsChose)


@dataclass
class _Visit:
    """One token at one of its experts."""

    token: int
    expert: int
    weight: float
    place: int = NOBODY  # in the expert's queue, once grouped
    state: str = "active"  # a tone: waits; "new" is computed now, "good" done, "bad" dropped


@dataclass
class _Layer:
    """All visits and the bytes read, folded from the records seen so far."""

    n_tokens: int = 0
    n_experts: int = 0
    visits: list[_Visit] = field(default_factory=list)
    grouped: bool = False
    combined: bool = False
    read: set[int] = field(default_factory=set)  # experts whose weights were
    weight_nbytes: int = 0

    def fold(self, what: Record) -> None:
        for visit in self.visits:
            if visit.state == "new":
                visit.state = "good"
        match what:
            case Load(name, _, nbytes) if name.startswith("W_"):
                self.weight_nbytes += nbytes
            case Routing(experts, weights, scores):
                self.n_tokens, self.n_experts = scores.shape
                pairs = zip(experts.tolist(), weights.tolist(), strict=True)
                self.visits = [
                    _Visit(t, e, w)
                    for t, (row, heavy) in enumerate(pairs)
                    for e, w in zip(row, heavy, strict=True)
                ]
            case ExpertsChose(tokens, weights, n_tokens):
                self.n_tokens, self.n_experts, self.grouped = n_tokens, len(tokens), True
                pairs = zip(tokens.tolist(), weights.tolist(), strict=True)
                self.visits = [
                    _Visit(t, e, w, place)
                    for e, (row, heavy) in enumerate(pairs)
                    for place, (t, w) in enumerate(zip(row, heavy, strict=True))
                ]
                self.visits.sort(key=lambda v: (v.token, v.expert))
            case Overflowed(_, tokens, _, experts):
                full = set(zip(tokens.tolist(), experts.tolist(), strict=True))
                for visit in self.visits:
                    if (visit.token, visit.expert) in full:
                        visit.state = "bad"
            case Grouping(_, place, starts):
                self.grouped = True
                for visit, where in zip(self.visits, place.tolist(), strict=True):
                    if visit.state != "bad":
                        visit.place = where - int(starts[visit.expert])
            case ExpertRan(expert):
                self.read.add(expert)
                for visit in self.visits:
                    if visit.expert == expert and visit.state == "active":
                        visit.state = "new"
            case Combined():
                self.combined = True

    def of_token(self, token: int) -> list[_Visit]:
        return [v for v in self.visits if v.token == token]

    def of_expert(self, expert: int) -> list[_Visit]:
        """Those who are kept in their places, then the dropped ones."""
        mine = [v for v in self.visits if v.expert == expert]
        return sorted(mine, key=lambda v: (v.state == "bad", v.place))

    @property
    def dropped(self) -> list[_Visit]:
        return [v for v in self.visits if v.state == "bad"]

    def load_of(self, expert: int) -> int:
        return sum(v.expert == expert and v.state != "bad" for v in self.visits)


def frames(trace: Trace, *, words: Sequence[str] | None = None) -> list[Frame]:
    """One frame a step of `moe_layer` or `expert_choice_layer`: flow, load, drops, bytes read.

    Up to 12 tokens and 36 visits every token and every place at an expert is a cell and every
    visit an arrow; beyond, every token is a box. Beyond 16 experts only the busiest are shown.

    Args:
        trace: of one run.
        words: what the tokens are, (n_tokens,); their numbers if None.

    Raises:
        BadInput: the trace does not hold exactly one run; not one word a token.
    """
    chosen = trace.of(Routing, ExpertsChose)
    require(
        len(chosen) == 1,
        "frames shows one run of moe_layer or expert_choice_layer; this trace has "
        f"{len(chosen)}. Call the layer once inside `with recording() as trace:`.",
    )
    start = _Layer()
    start.fold(chosen[0])
    require(
        words is None or len(words) == start.n_tokens,
        f"words must name each of the {start.n_tokens} tokens; got {len(words or ())}",
    )
    names = [f"token {t}" for t in range(start.n_tokens)]
    if words is not None:
        names = [f"{t} {_visible(word)}" for t, word in enumerate(words)]
    picture = _Picture(trace, names, start)
    layer, result, n_shared = _Layer(), [], 0
    for step in trace.steps:
        layer.fold(step.what)
        caption = None
        if isinstance(step.what, SHOWN):
            caption = picture.caption(step.what, layer)
        elif isinstance(step.what, Load) and step.what.name == "W_shared":
            n_shared += 1
            if n_shared == 2:
                caption = f"The shared expert runs on all {layer.n_tokens} tokens."
        if caption:
            panels = picture.panels(step.what, layer)
            result.append(Frame(caption, panels, step.file, step.line, step.index, picture.legend))
    return result


def expert_frames(
    experts: Tensor, weights: Tensor, words: Sequence[str], *, n_experts: int
) -> list[Frame]:
    """One frame an expert: the words of a text that visit it, and the load of all.

    Args:
        experts, weights: (n_tokens, k), best first, as a layer of a model chose.
        words: (n_tokens,) of them.
        n_experts: of the layer.
    """
    require(
        experts.shape == weights.shape == (len(words), experts.shape[-1]),
        "experts and weights must be (n_tokens, k), with a word a token; got "
        f"{tuple(experts.shape)}, {tuple(weights.shape)} and {len(words)} words",
    )
    counts = [int((experts == e).sum()) for e in range(n_experts)]
    choices = [
        dict(zip(*pair, strict=True))
        for pair in zip(experts.tolist(), weights.tolist(), strict=True)
    ]
    result = []
    for e, count in enumerate(counts):
        boxes = []
        for t, (word, chosen) in enumerate(zip(words, choices, strict=True)):
            tone = "new" if next(iter(chosen)) == e else "active" if e in chosen else "idle"
            told = ", ".join(f"expert {x} ({w:.2f})" for x, w in chosen.items())
            boxes.append(Token(word, tone, f"token {t} {_visible(word)}: {told}"))
        bars = tuple(
            Bar(f"expert {x}", 100 * n / experts.numel(), "new" if x == e else "idle")
            for x, n in enumerate(counts)
        )
        common = Counter(
            _visible(w) for w, chosen in zip(words, choices, strict=True) if e in chosen
        )
        told = ", ".join(f"{w} ({n})" for w, n in common.most_common(5)) or "none"
        caption = (
            f"Expert {e} gets {count} of {experts.numel()} visits; even would be "
            f"{experts.numel() / n_experts:.0f}. Most often: {told}."
        )
        legend = (("new", "first choice"), ("active", "a later choice"), ("idle", "others"))
        panels = (Tokens("the text", tuple(boxes)), Bars("load: share of the visits", bars, "%"))
        result.append(Frame(caption, panels, legend=legend))
    return result


def training_frame(runs: Mapping[str, Sequence[TrainingReport]], at: int = -1) -> Frame:
    """Trainings side by side at their report number `at`: loads a layer, and how they came about.

    Args:
        runs: name -> its reports, oldest first, equally many and of one model's sizes.
    """
    require(
        len(runs) > 0 and len({len(reports) for reports in runs.values()} | {0}) == 2,
        "runs must hold one training or more, each with equally many reports, at least 1; got "
        f"{ {name: len(reports) for name, reports in runs.items()} }",
    )
    now = {name: reports[at] for name, reports in runs.items()}
    until = len(next(iter(runs.values()))) if at == -1 else at + 1
    n_layers, n_experts = next(iter(now.values())).load.shape
    grids = []
    for layer in range(n_layers):
        rows = []
        for name, report in now.items():
            cells = []
            for e, share in enumerate(report.load[layer].tolist()):
                tone = "bad" if share * n_experts > 2 else "good"
                tone = "idle" if share * n_experts < 0.5 else tone
                note = f"{name}, layer {layer}, expert {e}: {share:.1%} of the visits"
                cells.append(Cell(f"{share:.0%}", tone, note))
            rows.append(tuple(cells))
        columns = tuple(f"expert {e}" for e in range(n_experts))
        grids.append(Grid(f"layer {layer}: share of the visits", tuple(now), tuple(rows), columns))
    tones = [f"owner{i}" for i in range(8)]
    lines = {
        name: (tones[i % 8], [(r.step, r.busiest) for r in reports[:until]], reports[:until])
        for i, (name, reports) in enumerate(runs.items())
    }
    busiest = Chart(
        "load of the busiest expert",
        tuple(Line(name, tuple(points), tone) for name, (tone, points, _) in lines.items()),
        "steps",
        "x mean",
        1.4 * max(r.busiest for reports in runs.values() for r in reports),  # room for three labels
    )
    bits = Chart(
        "training text, bits a byte",
        tuple(
            Line(name, tuple((r.step, r.bits) for r in reports), tone)
            for name, (tone, _, reports) in lines.items()
        ),
        "steps",
        "bits",
        1.4 * max(r.bits for reports in runs.values() for r in reports),
    )
    told = "; ".join(
        f"{name}: {r.bits:.2f} bits a byte, busiest {r.busiest:.1f} times the mean"
        for name, r in now.items()
    )
    legend = (
        ("bad", "more than twice the mean"),
        ("good", "half to twice the mean"),
        ("idle", "less than half the mean"),
    )
    step = next(iter(now.values())).step
    return Frame(f"Step {step}. {told}.", (*grids, busiest, bits), legend=legend)


class _Picture:
    """What stays the same from frame to frame."""

    def __init__(self, trace: Trace, names: list[str], start: _Layer):
        self.names = names
        self.n_experts = start.n_experts
        loads = [start.load_of(e) for e in range(start.n_experts)]
        busiest = sorted(range(start.n_experts), key=lambda e: (-loads[e], e))[:MAX_BARS]
        self.experts = sorted(busiest)
        self.most = max(loads)
        self.fine = start.n_tokens <= MAX_TOKENS and len(start.visits) <= MAX_VISITS
        self.fine = self.fine and start.n_experts <= MAX_BARS
        self.width = max(1, *(len(start.of_token(t)) for t in range(start.n_tokens)))
        self.capacity = next((what.capacity for what in trace.of(Overflowed)), None)
        weights = [what for what in trace.of(Load) if what.name in ("W_gate_up", "W_down")]
        shared = sum(what.nbytes for what in trace.of(Load) if what.name == "W_shared")
        n_read = len({what.where for what in weights})
        total = sum(what.nbytes for what in weights)
        self.all_nbytes = total // n_read * start.n_experts + shared if n_read else None
        owners = [
            (f"owner{i}", "expert " + ", ".join(map(str, range(i, start.n_experts, 8))))
            for i in range(min(8, start.n_experts))
        ]
        states = [
            ("active", "waits"),
            ("new", "computed by this step"),
            ("good", "done"),
            ("shared", "some of its visits dropped"),
            ("bad", "dropped" if trace.of(Routing) else "taken by nobody"),
            ("idle", "empty, weights not read"),
        ]
        self.legend = tuple((owners if self.fine else []) + states)

    def caption(self, what: Record, layer: _Layer) -> str:
        read = f"{layer.weight_nbytes:,} bytes of experts read so far."
        match what:
            case Overflowed(capacity) if layer.dropped:
                told = ", ".join(
                    f"{self.names[v.token]} by expert {v.expert}" for v in layer.dropped[:NAMED]
                )
                more = len(layer.dropped) - NAMED
                told += f" and {more} more" if more > 0 else ""
                lost = [t for t in range(layer.n_tokens) if self._lost(layer, t)]
                alone = f" Nobody takes {', '.join(self.names[t] for t in lost)}." if lost else ""
                text = f"capacity {capacity}: {len(layer.dropped)} visits dropped: {told}.{alone}"
            case ExpertRan(expert, tokens):
                who = ", ".join(self.names[t] for t in tokens.tolist()[:MAX_TOKENS])
                more = len(tokens) - MAX_TOKENS
                who += f" and {more} more" if more > 0 else ""
                text = (
                    f"expert {expert} is read once and runs on {len(tokens)} tokens: {who}. {read}"
                )
            case Combined():
                unread = self.n_experts - len(layer.read)
                text = f"{what}. {read}"
                text += f" {unread} of {self.n_experts} experts stay unread." if unread else ""
            case _:
                text = f"{what}."
        return text[0].upper() + text[1:]

    def panels(self, what: Record, layer: _Layer) -> tuple:
        flow = self._grids(what, layer) if self.fine else (self._tokens(layer),)
        meters = [
            Meter("expert weights read", layer.weight_nbytes, "bytes", self.all_nbytes, "new")
        ]
        if self.capacity is not None:
            n_visits = len(layer.visits)
            meters.append(Meter("visits dropped", len(layer.dropped), "", n_visits, "bad"))
        return *flow, self._bars(layer), *meters

    def _grids(self, what: Record, layer: _Layer) -> tuple:
        rows, starts = [], {}
        for t in range(layer.n_tokens):
            cells = []
            for c, v in enumerate(layer.of_token(t)):
                starts[id(v)] = (0, t, c)
                note = f"{self.names[t]}: expert {v.expert}, weight {v.weight:.2f}"
                if v.state == "bad":
                    note = f"{self.names[t]}: dropped, expert {v.expert} is full"
                    cells.append(Cell(f"e{v.expert} full", "bad", note))
                else:
                    cells.append(Cell(f"e{v.expert} {v.weight:.2f}", f"owner{v.expert % 8}", note))
            if not cells:
                cells.append(Cell("nobody", "bad", f"{self.names[t]}: taken by nobody"))
            rows.append(tuple(cells) + (Cell(),) * (self.width - len(cells)))
        tokens = Grid("tokens, with whom they visit", tuple(self.names), tuple(rows))
        queues = []
        for e in self.experts:
            cells = []
            for v in layer.of_expert(e) if layer.grouped else ():
                said = {"active": "waits", "new": "computed now", "good": "done", "bad": "dropped"}
                note = f"expert {e}: {self.names[v.token]}, {said[v.state]}"
                cells.append(Cell(f"t{v.token}", v.state, note))
            queues.append(tuple(cells) + (Cell(),) * (self.most - len(cells)))
        labels = tuple(f"expert {e}" for e in self.experts)
        title = "experts, with who comes"
        experts = Grid(title, labels, tuple(queues), tuple(str(i + 1) for i in range(self.most)))
        pairs = []
        for v in layer.visits:
            if v.state == "bad":
                continue
            to = (1, self.experts.index(v.expert), 0)  # its row: arrows to places would cross
            if isinstance(what, Combined):
                pairs.append((to, starts[id(v)]))
            elif v.state == "new" or not layer.read:
                pairs.append((starts[id(v)], to))
        return tokens, experts, Arrows(tuple(pairs))

    def _tokens(self, layer: _Layer) -> Tokens:
        boxes = []
        for t, name in enumerate(self.names):
            visits = layer.of_token(t)
            states = {v.state for v in visits}
            if self._lost(layer, t):
                tone = "bad"
            else:
                tone = next(s for s in ("new", "bad", "active", "good") if s in states)
                tone = "shared" if tone == "bad" else tone
            told = ", ".join(
                f"dropped by expert {v.expert}"
                if v.state == "bad"
                else f"expert {v.expert} ({v.weight:.2f})"
                for v in visits
            )
            boxes.append(Token(name, tone, f"{name}: {told or 'taken by nobody'}"))
        return Tokens("tokens", tuple(boxes))

    def _bars(self, layer: _Layer) -> Bars:
        bars = []
        for e in self.experts:
            states = {v.state for v in layer.visits if v.expert == e} - {"bad"}
            tone = next((s for s in ("new", "active", "good") if s in states), "idle")
            bars.append(Bar(f"expert {e}", layer.load_of(e), tone))
        title = "load of each expert"
        if len(self.experts) < self.n_experts:
            title = f"load of the {MAX_BARS} busiest of {self.n_experts} experts"
        if self.capacity is not None:
            title += f", capacity {self.capacity}"
        return Bars(title, tuple(bars), "visits", self.most)

    def _lost(self, layer: _Layer, token: int) -> bool:
        return all(v.state == "bad" for v in layer.of_token(token))


def _visible(word: str) -> str:
    return word.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·") or "∅"
