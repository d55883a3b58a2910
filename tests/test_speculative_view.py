"""The pictures of speculation say what the trace says, in words as well as in colours."""

import json

import pytest
import torch

from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.trace import Trace, recording
from llmopt_lab.speculative_decoding.cases import TableModel, random_model
from llmopt_lab.speculative_decoding.drafts import PromptLookup
from llmopt_lab.speculative_decoding.head import DraftHead
from llmopt_lab.speculative_decoding.measure import decode_with
from llmopt_lab.speculative_decoding.records import Added, Guessed, Judged, Read, Rewound
from llmopt_lab.speculative_decoding.reference import overlap, speculative_decode
from llmopt_lab.speculative_decoding.tree import speculative_decode_tree
from llmopt_lab.speculative_decoding.view import DRAFT, LEGEND, TARGET, frames
from llmopt_lab.widgets.draw import draw_series
from llmopt_lab.widgets.panels import Bars, Frame, Grid, Lanes, Meter, Tokens
from llmopt_lab.widgets.player import MAX_STATE, Player

PROMPT = [0, 2, 1]
WORDS = "abcde".__getitem__


def run(*, widths=None, draft=None, n_new=12, seed=1):
    """(trace, text) of a sampled run on a vocabulary of 5."""
    target = TableModel(5, 1)
    draft = draft or TableModel(5, 2, like=(TableModel(5, 1), 0.6), name="draft")
    settings = {"n_new": n_new, "temperature": 1.0, "rng": torch.Generator().manual_seed(seed)}
    prompt = torch.tensor(PROMPT)
    with recording() as trace:
        if widths:
            text = speculative_decode_tree(target, draft, prompt, widths=widths, **settings)
        else:
            text = speculative_decode(target, draft, prompt, k=3, **settings)
    return trace, text.tolist()


def panel(frame: Frame, kind: type, number: int = 0):
    return [p for p in frame.panels if isinstance(p, kind)][number]


def of(shown: list[Frame], trace: Trace, kind: type) -> list[Frame]:
    return [frame for frame in shown if isinstance(trace.steps[frame.step].what, kind)]


def test_each_guess_pass_verdict_and_rollback_has_a_frame_and_its_line():
    trace, _ = run()
    shown = frames(trace, PROMPT)
    for kind in (Guessed, Judged, Added, Rewound):
        assert len(of(shown, trace, kind)) == len(trace.of(kind)) > 0
    n_target = sum(read.who == "target" for read in trace.of(Read))
    assert len(of(shown, trace, Read)) == n_target
    assert all(f.file.endswith(".py") and f.line for f in shown)


@pytest.mark.parametrize("widths", [None, (2, 2)], ids=["chain", "tree"])
def test_the_stream_ends_as_the_text_and_names_every_writer(widths):
    trace, text = run(widths=widths)
    last = of(frames(trace, PROMPT, words=WORDS), trace, Added)[-1]
    stream = [token for token in panel(last, Tokens).tokens if token.tone != "bad"]
    assert [token.text for token in stream] == [WORDS(token) for token in text]
    n_kept = sum(judged.accepted for judged in trace.of(Judged))
    tones = [token.tone for token in stream]
    assert tones[:3] == ["idle"] * 3
    assert tones.count(DRAFT) + tones.count("good") == n_kept > 0
    assert tones.count(TARGET) == len(trace.of(Added)) and len(tones) == len(text)
    for token in stream:
        writer = {"idle": "prompt", DRAFT: "draft", "good": "accepted", TARGET: "target"}
        assert writer[token.tone] in token.note


def test_a_guess_waits_is_judged_and_those_behind_a_refused_one_fall_with_it():
    trace, _ = run()
    shown = frames(trace, PROMPT)
    guessed = of(shown, trace, Guessed)[0]
    assert [t.tone for t in panel(guessed, Tokens).tokens] == ["idle"] * 3 + ["new"] * 3
    for frame in of(shown, trace, Judged):
        judged = trace.steps[frame.step].what
        tokens = panel(frame, Tokens).tokens
        assert tokens[judged.place].tone == ("good" if judged.accepted else "bad")
        behind = [token.tone for token in tokens[judged.place + 1 :]]
        assert set(behind) <= ({"new"} if judged.accepted else {"bad"})


@pytest.mark.parametrize("widths", [None, (2, 2)], ids=["chain", "tree"])
def test_the_shaded_part_of_the_bars_is_the_chance_to_keep_a_guess(widths):
    trace, _ = run(widths=widths)
    for frame in of(frames(trace, PROMPT, top=2), trace, Judged):
        judged, bars = trace.steps[frame.step].what, panel(frame, Bars).bars
        p, q = (
            [bar for bar in bars if bar.label.startswith(letter) and bar.tone == tone]
            for letter, tone in (("p", TARGET), ("q", DRAFT))
        )
        for side in (p, q):
            assert sum(bar.value for bar in side) == pytest.approx(1)
            shaded = sum(bar.shaded for bar in side)
            assert shaded == pytest.approx(overlap(judged.p, judged.q))
        assert f"{overlap(judged.p, judged.q):.2f} in all" in panel(frame, Bars).title


def test_the_pages_hold_what_each_model_has_read_and_show_what_it_forgets():
    trace, _ = run()
    length = {"target": 0, "draft": 0}
    shown = {frame.step: frame for frame in frames(trace, PROMPT, block_size=4)}
    n_forgotten = 0
    for step in trace.steps:
        match step.what:
            case Read(who, first, n):
                assert length[who] == first
                length[who] += n
            case Rewound(who, new, n_dropped):
                assert length[who] == new + n_dropped
                length[who] = new
        if step.index not in shown:
            continue
        grid = panel(shown[step.index], Grid)
        for who in length:
            rows = [r for r, label in zip(grid.rows, grid.row_labels, strict=True) if who in label]
            cells = [cell for row in rows for cell in row]
            held = sum(cell.tone in ("cached", "new") for cell in cells)
            assert held == length[who]
            forgotten = [i for i, cell in enumerate(cells) if cell.tone == "bad"]
            if isinstance(step.what, Rewound) and step.what.who == who:
                end = step.what.length + step.what.n_dropped
                assert forgotten == list(range(step.what.length, end))
                n_forgotten += 1
            else:
                assert not forgotten
    assert n_forgotten == len(trace.of(Rewound)) > 1


def test_the_clock_adds_up_the_passes():
    trace, _ = run()
    last = frames(trace, PROMPT, c=0.2, verify=1.5)[-1]
    lanes = panel(last, Lanes)
    reads = trace.of(Read)
    n_draft = sum(read.who == "draft" for read in reads)
    n_target = len(reads) - n_draft
    assert lanes.labels == ("draft", "target")
    assert [len(lane) for lane in lanes.lanes] == [n_draft, n_target]
    # the last round had no guess to verify: a pass of one token
    n_single = sum(read.who == "target" and read.n == 1 for read in reads)
    want = 0.2 * n_draft + 1.5 * (n_target - n_single) + n_single
    assert lanes.now == pytest.approx(want)
    spans = sorted((s for lane in lanes.lanes for s in lane), key=lambda s: s.start)
    for before, after in zip(spans, spans[1:], strict=False):
        assert before.end == pytest.approx(after.start)
    assert panel(last, Meter).value == pytest.approx(12 / n_target)
    assert panel(last, Meter, 1).versus == 12


def test_a_tree_shows_its_mask_and_its_verdicts():
    trace, _ = run(widths=(2, 2))
    shown = frames(trace, PROMPT, words=WORDS)
    mask = panel(shown[0], Grid)
    seen = [[cell.text != "" for cell in row] for row in mask.rows]
    want = [[False] * 6 for _ in range(6)]
    for node, parent in enumerate([-1, -1, 0, 0, 1, 1]):
        want[node][node] = True
        if parent >= 0:
            want[node][parent] = True
    assert seen == want and mask.row_labels[0][0] == "0"
    for frame in of(shown, trace, Judged):
        judged = trace.steps[frame.step].what
        tones = [row[i].tone for i, row in enumerate(panel(frame, Grid).rows)]
        assert ("good" if judged.accepted else "bad") in tones


def test_a_draft_without_a_model_has_an_empty_lane():
    trace, _ = run(draft=PromptLookup(5))
    shown = frames(trace, PROMPT)
    assert panel(shown[-1], Lanes).lanes[0] == ()
    empty = [frame for frame in of(shown, trace, Guessed) if "no guess" in frame.caption]
    assert empty, "prompt lookup always found something here: take another seed"
    draw_series(shown)


@pytest.mark.parametrize("how", [{"k": 3}, {"widths": (2, 2)}], ids=str)
def test_a_heads_run_begins_with_the_target_that_reads_the_prompt_for_it(how):
    model = random_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = DraftHead(model.config).double().requires_grad_(False)
    with recording() as trace:
        decode_with(model, head, torch.tensor(PROMPT), n_new=8, **how)
    shown = frames(trace, PROMPT)
    assert shown[0].caption == "target reads tokens 0 to 1 in one pass"
    draft, target = panel(shown[-1], Lanes).lanes
    assert len(target) == 1 + len(trace.of(Added)) and len(draft) > 0
    draw_series(shown)


def test_every_tone_has_a_name_and_every_caption_its_words():
    trace, _ = run(widths=(2, 2))
    named = dict(LEGEND)
    for frame in frames(trace, PROMPT, words=WORDS):
        assert frame.legend == LEGEND
        tones = {token.tone for token in panel(frame, Tokens).tokens}
        for grid in (p for p in frame.panels if isinstance(p, Grid)):
            tones |= {cell.tone for row in grid.rows for cell in row}
            assert all(cell.note or cell.tone == "idle" for row in grid.rows for cell in row)
        assert tones <= named.keys()
        what = trace.steps[frame.step].what
        if isinstance(what, Judged | Added):
            assert repr(WORDS(what.token)) in frame.caption
        assert str(what) in frame.caption


def test_a_trace_without_a_round_is_refused():
    with pytest.raises(BadInput, match="no round of speculation in this trace"):
        frames(Trace(), PROMPT)


@pytest.mark.parametrize("widths", [None, (2, 2)], ids=["chain", "tree"])
def test_a_widget_stays_under_its_megabyte(widths):
    trace, _ = run(widths=widths, n_new=14)
    player = Player(frames(trace, PROMPT, words=WORDS))
    state = {name: getattr(player, name) for name in ("frames", "pieces", "listings")}
    assert len(json.dumps(state).encode()) < MAX_STATE
