"""Pictures of speculation: two lanes on one clock, p over q, the caches' pages, who wrote what.

Reads the trace only: nothing here guesses or judges.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import ceil_div
from llmopt_lab.core.trace import Trace
from llmopt_lab.speculative_decoding.records import (
    ROOT,
    Added,
    Guessed,
    Judged,
    Read,
    Rewound,
    Tree,
)
from llmopt_lab.widgets.panels import (
    Bar,
    Bars,
    Cell,
    Frame,
    Grid,
    Lanes,
    Meter,
    Span,
    Token,
    Tokens,
)

TARGET, DRAFT = "owner0", "owner1"
MOST_NODES = 24  # of a tree whose mask is still drawn
LEGEND = (
    (TARGET, "target"),
    (DRAFT, "draft"),
    ("idle", "prompt, or empty"),
    ("new", "guessed, not judged yet"),
    ("good", "accepted"),
    ("bad", "refused or forgotten"),
    ("cached", "cached"),
)


@dataclass
class _Run:
    """What the records seen so far add up to."""

    prompt: list[int]
    clock: float = 0.0
    written: list[tuple[int, str]] = field(default_factory=list)  # (token, tone of its writer)
    round: list[list] = field(default_factory=list)  # [token, tone] of this round's guesses
    own: tuple[int, bool] | None = None  # the target's token of this round; a bonus or not
    lanes: dict[str, list[Span]] = field(default_factory=lambda: {"draft": [], "target": []})
    length: dict[str, int] = field(default_factory=lambda: {"draft": 0, "target": 0})
    changed: dict[str, tuple[int, int, str]] = field(default_factory=dict)  # [first, end), tone
    guessed: bool = False  # in this round, be it nothing
    n_passes: int = 0  # of the target that judged; a head has it read the prompt before
    tree: Tree | None = None
    verdicts: dict[int, str] = field(default_factory=dict)  # node -> tone
    at: int = ROOT  # the node below which a tree is judged
    p: Sequence[float] = ()
    q: Sequence[float] = ()
    place: int = 0

    @property
    def n_text(self) -> int:
        return len(self.prompt) + len(self.written)

    def finish_round(self) -> None:
        """Kept guesses and the target's token become text."""
        if self.own is not None:
            self.written += [(token, DRAFT) for token, tone in self.round if tone == "good"]
            self.written.append((self.own[0], TARGET))
        self.round, self.own, self.guessed = [], None, False
        self.tree, self.verdicts, self.at = None, {}, ROOT


def frames(
    trace: Trace,
    prompt: Sequence[int],
    *,
    words: Callable[[int], str] = str,
    c: float = 0.15,
    verify: float = 1.0,
    block_size: int = 16,
    top: int = 3,
) -> list[Frame]:
    """One frame per guess, pass of the target, verdict, own token and rollback of
    `speculative_decode` or its tree.

    Args:
        trace: of one run that recorded everything.
        prompt: its tokens.
        words: the text of a token.
        c, verify: times of a draft's pass and of a verification, in passes of the target of 1
            token: what the clock counts.
        block_size: tokens a page of the caches.
        top: tokens with bars of their own; the others share one.

    Raises:
        BadInput: a trace without a round.
    """
    require(trace.of(Added) != [], "no round of speculation in this trace: record a whole run")
    run = _Run([int(token) for token in prompt])
    n_slots = max(what.first + what.n for what in trace.of(Read))
    with_tree = bool(trace.of(Tree))
    result = []
    for step in trace.steps:
        if not _apply(run, step.what, c, verify):
            continue
        panels = [_stream(run, words), _lanes(run)]
        if with_tree:
            panels.append(_tree(run, words))
        panels += [_bars(run, words, top), _pages(run, n_slots, block_size), *_meters(run)]
        caption = _caption(step.what, words)
        result.append(Frame(caption, tuple(panels), step.file, step.line, step.index, LEGEND))
        run.changed = {}
    return result


def _apply(run: _Run, what, c: float, verify: float) -> bool:
    """Fold one record in; whether it has a frame: the draft's passes are shown with its guess."""
    match what:
        case Read(who, _, n):
            if run.own is not None:
                run.finish_round()
            took = c if who == "draft" else verify if n > 1 else 1.0
            tone = DRAFT if who == "draft" else TARGET
            run.lanes[who].append(Span(run.clock, run.clock + took, _span_text(who, n), tone))
            run.clock += took
            run.n_passes += who == "target" and run.guessed
            new_from = run.changed.get(who, (run.length[who], 0, ""))[0]
            run.length[who] += n
            run.changed[who] = (new_from, run.length[who], "new")
            return who == "target"
        case Guessed(_, tokens, q):
            if run.own is not None:
                run.finish_round()
            run.round, run.guessed = [[int(token), "new"] for token in tokens], True
            if len(q):
                run.p, run.q, run.place = (), q[0].tolist(), run.n_text
        case Tree():
            if run.own is not None:
                run.finish_round()
            run.tree, run.guessed = what, True
        case Judged(place, token, p, q, accepted):
            tone = "good" if accepted else "bad"
            if run.tree is not None:
                _judge_node(run, token, tone)
            else:
                run.round[place - run.n_text][1] = tone
            run.p, run.q, run.place = p.tolist(), q.tolist(), place
        case Added(place, token, source, bonus):
            run.own = (token, bonus)
            if bonus:
                run.p, run.q, run.place = source.tolist(), (), place
        case Rewound(who, length, n_dropped):
            run.changed = {who: (length, length + n_dropped, "bad")}
            run.length[who] = length
        case _:
            return False
    return True


def _judge_node(run: _Run, token: int, tone: str) -> None:
    """The first child of the node last accepted that has this token and no verdict yet."""
    tokens, parents = run.tree.tokens.tolist(), run.tree.parents.tolist()
    for node, (child, parent) in enumerate(zip(tokens, parents, strict=True)):
        if parent == run.at and child == token and node not in run.verdicts:
            run.verdicts[node] = tone
            if tone == "good":
                run.at = node
                run.round.append([token, tone])
            return


def _span_text(who: str, n: int) -> str:
    return str(n) if who == "target" else ""


def _caption(what, words: Callable[[int], str]) -> str:
    """The record's own sentence, with the words of its tokens."""
    match what:
        case Guessed(_, tokens, _) if len(tokens):
            return f"{what}: {' '.join(repr(words(int(token))) for token in tokens)}"
        case Judged() | Added():
            return f"{what}. It is {words(what.token)!r}"
    return str(what)


def _stream(run: _Run, words: Callable[[int], str]) -> Tokens:
    """The text, each token by its writer; behind it this round's guesses and verdicts."""
    tokens = [Token(words(t), "idle", f"{words(t)!r}, prompt") for t in run.prompt]
    for token, tone in run.written:
        writer = "target" if tone == TARGET else "draft, accepted by the target"
        tokens.append(Token(words(token), tone, f"{words(token)!r}, written by the {writer}"))
    said = {"new": "guessed", "good": "guessed and accepted", "bad": "guessed and refused"}
    skipped = False  # guesses after a refused one were never judged
    for token, tone in run.round:
        note = "guessed, behind a refused one" if skipped else said[tone]
        tokens.append(Token(words(token), "bad" if skipped else tone, f"{words(token)!r}, {note}"))
        skipped |= tone == "bad"
    if run.own is not None:
        token, bonus = run.own
        why = "a bonus" if bonus else "in place of the refused guess"
        tokens.append(Token(words(token), TARGET, f"{words(token)!r}, by the target, {why}"))
    return Tokens("the text, by who wrote it", tuple(tokens))


def _lanes(run: _Run) -> Lanes:
    lanes = tuple(tuple(run.lanes[who]) for who in ("draft", "target"))
    title = "passes on one clock, in passes of the target; numbers: tokens it reads at once"
    return Lanes(title, ("draft", "target"), lanes, "", run.clock)


def _tree(run: _Run, words: Callable[[int], str]) -> Grid:
    """The guesses of a tree and its mask: row i sees the marked columns."""
    if run.tree is None or len(run.tree.tokens) > MOST_NODES:
        return Grid("tree mask: which guesses each guess sees", ("no tree",), ((Cell(),),))
    tokens, parents = run.tree.tokens.tolist(), run.tree.parents.tolist()
    seen: list[set[int]] = []
    for node, parent in enumerate(parents):
        seen.append({node} | (seen[parent] if parent != ROOT else set()))
    rows = []
    for node, ancestors in enumerate(seen):
        tone = run.verdicts.get(node, "new")
        rows.append(
            tuple(
                Cell(
                    "●" if other == node else "○" if other in ancestors else "",
                    (tone if other == node else "cached") if other in ancestors else "idle",
                    f"guess {node} {'sees' if other in ancestors else 'does not see'} {other}",
                )
                for other in range(len(tokens))
            )
        )
    labels = tuple(f"{node} {words(token)!r}" for node, token in enumerate(tokens))
    columns = tuple(map(str, range(len(tokens))))
    return Grid("tree mask: which guesses each guess sees", labels, tuple(rows), columns)


def _bars(run: _Run, words: Callable[[int], str], top: int) -> Bars:
    """p and q of the likeliest tokens at the place judged, what they share shaded."""
    n_vocab = max(len(run.p), len(run.q))
    p, q = list(run.p) or [0.0] * n_vocab, list(run.q) or [0.0] * n_vocab
    possible = [token for token in range(n_vocab) if p[token] or q[token]]
    order = sorted(possible, key=lambda token: -max(p[token], q[token]))
    shown = [(repr(words(token)), [token]) for token in order[:top]]
    if len(order) > top:
        shown.append(("all others", order[top:]))
    bars = []
    for word, tokens in shown:
        p_word, q_word = sum(p[token] for token in tokens), sum(q[token] for token in tokens)
        both = min(p_word, q_word, sum(min(p[token], q[token]) for token in tokens))
        bars += [Bar(f"p {word}", p_word, TARGET, both)] if run.p else []
        bars += [Bar(f"q {word}", q_word, DRAFT, both)] if run.q else []
    title = f"place {run.place}: target p, draft q"
    if run.p and run.q:
        title += f"; shaded: both, {sum(min(a, b) for a, b in zip(p, q, strict=True)):.2f} in all"
    return Bars(title, tuple(bars), top=1)


def _pages(run: _Run, n_slots: int, block_size: int) -> Grid:
    """Both KV caches page by page: what is cached, what was written last, what is forgotten."""
    rows, labels = [], []
    for who in ("target", "draft"):
        first, end, tone = run.changed.get(who, (0, 0, ""))
        for page in range(ceil_div(n_slots, block_size)):
            cells = []
            for slot in range(page * block_size, (page + 1) * block_size):
                if first <= slot < end:
                    note = "just written" if tone == "new" else "forgotten"
                    cells.append(Cell("+" if tone == "new" else "×", tone, f"slot {slot} {note}"))
                elif slot < run.length[who]:
                    cells.append(Cell("", "cached", f"slot {slot} cached"))
                else:
                    cells.append(Cell("", "idle", f"slot {slot} empty"))
            rows.append(tuple(cells))
            labels.append(f"{who}, page {page}")
    return Grid("KV pages", tuple(labels), tuple(rows))


def _meters(run: _Run) -> list[Meter]:
    n_new = len(run.written)
    if run.own is not None:
        n_new += 1 + sum(tone == "good" for _, tone in run.round)
    return [
        Meter("tokens a pass of the target", n_new / max(1, run.n_passes), "tokens"),
        Meter("clock, against one token a pass", run.clock, "target passes", n_new or None),
    ]
