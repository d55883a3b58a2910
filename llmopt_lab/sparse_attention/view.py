"""Pictures of sparse attention. Reads what was recorded: nothing here scores or selects.

with recording() as trace:
    sparse_attention(q, k, v, streaming(4, 1), tile_q=2, tile_k=2)      # one head
Player(frames(trace))
"""

import math

from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import Load, Store, ceil_div, tiles
from llmopt_lab.core.trace import Trace
from llmopt_lab.sparse_attention.records import BlockLists, Finished, Rolled, Visited
from llmopt_lab.widgets.panels import Cell, Chart, Frame, Grid, Line, Meter, Token, Tokens

MAX_CELLS = 24  # a side of a grid of tokens
LEGEND = (
    ("new", "visited now: counts"),
    ("bad", "computed, then masked"),
    ("active", "visited before"),
    ("idle", "waits: its block is listed"),
    ("cached", "never read: its block is not listed"),
)
CACHE_LEGEND = (
    ("new", "came in with this step"),
    ("shared", "sink: stays for ever"),
    ("active", "in the window"),
    ("bad", "forgotten"),
    ("idle", "not read yet"),
)


def frames(trace: Trace, *, dense_nbytes: int | None = None) -> list[Frame]:
    """One frame a visited block and one for each finished block of queries, of one head.

    Args:
        trace: of one `sparse_attention` of one head, at most 24 queries and keys.
        dense_nbytes: what dense attention in the same blocks moves, to compare with.

    Raises:
        BadInput: no lists in the trace, those of several heads, or too many tokens to draw.
    """
    plans = trace.of(BlockLists)
    require(
        len(plans) == 1 and plans[0].blocks.ndim == 2,
        "frames shows one run: sparse_attention(q, k, v, ..) inside `with recording() as trace:`; "
        f"this trace has the lists of {len(plans)} runs",
    )
    lists = plans[0]
    require(
        max(lists.n_q, lists.n_k) <= MAX_CELLS,
        f"at most {MAX_CELLS} tokens can be drawn; the run has {lists.n_q} queries and "
        f"{lists.n_k} keys",
    )
    cells = _waiting(lists)
    n_visits, moved, before, result = 0, 0, 0, []
    for step in trace.steps:
        what = step.what
        if isinstance(what, (Load, Store)):
            moved += what.nbytes
        if not isinstance(what, (Visited, Finished)):
            continue
        _settle(cells)
        if isinstance(what, Visited):
            n_visits += 1
            _visit(cells, what)
        n_all = lists.n_live.numel() * ceil_div(lists.n_k, lists.tile_k)
        tone = "new" if moved > before else "active"
        meters = (
            Meter("blocks visited", n_visits, "blocks", n_all),
            Meter("HBM traffic", moved, "bytes", dense_nbytes, tone),
        )
        caption = f"{what}. {n_visits} of {n_all} blocks visited, {moved:,} bytes moved so far."
        grid = Grid(
            "who sees whom",
            tuple(f"q {i}" for i in range(lists.n_q)),
            tuple(tuple(row) for row in cells),
            tuple(str(j) for j in range(lists.n_k)),
        )
        result.append(Frame(caption, (grid, *meters), step.file, step.line, step.index, LEGEND))
        before = moved
    require(len(result) > 0, "no block was visited in this trace")
    first = next(step for step in trace.steps if isinstance(step.what, Visited)).what
    n_heads = sum(
        isinstance(what, Visited) and (what.rows, what.cols) == (first.rows, first.cols)
        for what in trace.of(Visited)
    )
    require(
        n_heads == 1,
        f"this trace holds {n_heads} heads; record one: sparse_attention(q[0, 0], k[0, 0], ..)",
    )
    return result


def _waiting(lists: BlockLists) -> list[list[Cell]]:
    live = lists.live()
    return [
        [
            Cell("", "idle", f"query {i}, key {j}: waits")
            if live[i // lists.tile_q, j // lists.tile_k]
            else Cell("", "cached", f"query {i}, key {j}: never read")
            for j in range(lists.n_k)
        ]
        for i in range(lists.n_q)
    ]


def _settle(cells: list[list[Cell]]) -> None:
    """What was new is not any more; what was masked stays marked."""
    for row in cells:
        for j, cell in enumerate(row):
            if cell.tone == "new":
                row[j] = Cell("", "active", cell.note)
            elif cell.tone == "bad":
                row[j] = Cell("", "bad", cell.note)


def _visit(cells: list[list[Cell]], what: Visited) -> None:
    for i in range(what.rows.start, what.rows.stop):
        for j in range(what.cols.start, what.cols.stop):
            score = float(what.scores[i - what.rows.start, j - what.cols.start])
            seen = score > -math.inf
            text = f"{score:.1f}" if seen else ""
            note = f"query {i}, key {j}: " + (f"score {text}" if seen else "masked")
            cells[i][j] = Cell(text, "new" if seen else "bad", note)


def cache_frames(trace: Trace, texts: list[str]) -> list[Frame]:
    """One frame a pass of a `RollingCache`: which tokens it holds, and which it has forgotten.

    Args:
        trace: with the `Rolled` records of one cache.
        texts: the tokens of the text as they are to be shown, all that was read at least.
    """
    steps = [step for step in trace.steps if isinstance(step.what, Rolled)]
    require(len(steps) > 0, "no RollingCache was used inside `with recording() as trace:`")
    last = steps[-1].what
    require(
        len(texts) >= last.first + last.n_new,
        f"the cache read {last.first + last.n_new} tokens; got the texts of {len(texts)}",
    )
    result, forgotten = [], 0
    for step in steps:
        what = step.what
        forgotten += what.n_forgotten
        end = what.first + what.n_new
        tokens = tuple(Token(text, *_place(i, what, end)) for i, text in enumerate(texts))
        held = end - forgotten
        meters = (Meter("tokens held", held, "tokens", end), Meter("tokens read", end, "tokens"))
        caption = f"{what}. The cache holds {held} of {end} tokens."
        result.append(
            Frame(
                caption, (Tokens("the text", tokens), *meters),
                step.file, step.line, step.index, CACHE_LEGEND,
            )
        )  # fmt: skip
    return result


def _place(i: int, what: Rolled, end: int) -> tuple[str, str]:
    """(tone, note) of token i after a step that ended before token `end`."""
    if i >= end:
        return "idle", f"token {i}: not read yet"
    if i < what.n_sinks:
        return ("new" if i >= what.first else "shared"), f"token {i}: sink"
    if i < what.oldest:
        return "bad", f"token {i}: forgotten"
    return ("new" if i >= what.first else "active"), f"token {i}: in the window"


def mask_grid(mask: Tensor, mass: Tensor | None = None, *, title: str = "mask") -> Grid:
    """A mask as cells, the attention `mass` (same shape, 0 to 1) as their heat; larger ones pooled.

    Args:
        mask: (n_q, n_k) bool. Beyond 24 a side a cell stands for a block, and counts as seen if
            one of its pairs is: its note says how many are.
        mass: what each pair gets under dense attention; a cell shows the sum of its block's rows,
            averaged over them.
    """
    require(
        mass is None or mass.shape == mask.shape,
        f"mask and mass must have one shape; got {tuple(mask.shape)} and "
        f"{tuple(mass.shape) if mass is not None else None}",
    )
    rows, cols = (list(tiles(n, ceil_div(n, MAX_CELLS))) for n in mask.shape)
    cells = []
    for r in rows:
        line = []
        for c in cols:
            part = mask[r, c]
            heat = float(mass[r, c].sum(-1).mean()) if mass is not None else 0
            n_seen = int(part.sum())
            if part.numel() == 1:
                note = f"query {r.start}, key {c.start}: {'seen' if n_seen else 'not seen'}"
            else:
                note = f"queries {r.start}-{r.stop - 1}, keys {c.start}-{c.stop - 1}: "
                note += f"{n_seen} of {part.numel()} pairs seen"
            note += f", {heat:.1%} of the attention" if mass is not None else ""
            tone = "good" if n_seen == part.numel() else "active" if n_seen else "cached"
            if mass is not None and not n_seen and heat > 0.01:
                tone = "bad"  # attention that is lost
            line.append(Cell("", tone, note, min(1.0, heat)))
        cells.append(tuple(line))
    names = tuple(f"q {r.start}" for r in rows)
    return Grid(title, names, tuple(cells), tuple(str(c.start) for c in cols))


def reach_chart(
    counts: dict[str, list[int]], *, title: str = "tokens that the last one depends on"
) -> Chart:
    """Lines of `recall.reach`: name -> tokens that the last one sees after 1, 2, .. layers."""
    require(len(counts) > 0 and all(counts.values()), "give a name and its counts, one at least")
    lines = tuple(
        Line(name, tuple(enumerate([1, *reached])), f"owner{i % 8}")
        for i, (name, reached) in enumerate(counts.items())
    )
    return Chart(title, lines, "layers")
