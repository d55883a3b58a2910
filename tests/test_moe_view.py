"""The pictures of a mixture of experts: every cell, arrow, bar and meter comes from the trace."""

import pytest
import torch

from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.memory import Load
from llmopt_lab.core.trace import Trace, recording
from llmopt_lab.moe import expert_choice_layer, moe_layer
from llmopt_lab.moe.cases import RAGGED, layer, toy
from llmopt_lab.moe.records import Grouping, Overflowed, Routing
from llmopt_lab.moe.view import expert_frames, frames
from llmopt_lab.widgets.draw import describe, draw_series
from llmopt_lab.widgets.panels import Arrows, Bars, Grid, Meter, Tokens
from llmopt_lab.widgets.player import Player


def traced(*case, run=moe_layer, **options) -> Trace:
    with recording() as trace:
        run(*case, **options)
    return trace


def panel(frame, kind, title=""):
    (found,) = [p for p in frame.panels if isinstance(p, kind) and p.title.startswith(title)]
    return found


def arrows(frame) -> set:
    (found,) = [p for p in frame.panels if isinstance(p, Arrows)]
    return set(found.pairs)


def loads(frame) -> dict[str, int]:
    return {bar.label: bar.value for bar in panel(frame, Bars).bars}


TOY = frames(traced(*toy(), k=2, capacity=4))


def test_the_captions_alone_tell_the_story_of_the_toy():
    assert [frame.caption for frame in TOY] == [
        "Route 6 tokens to 2 of 4 experts; token 0: expert 1 (0.73), expert 0 (0.27).",
        "Capacity 4: 2 visits dropped: token 2 by expert 1, token 3 by expert 1.",
        "Group 12 visits by expert: [3, 4, 3, 0].",
        "Expert 0 is read once and runs on 3 tokens: token 0, token 2, token 4. "
        "96 bytes of experts read so far.",
        "Expert 1 is read once and runs on 4 tokens: token 0, token 1, token 4, token 5. "
        "192 bytes of experts read so far.",
        "Expert 2 is read once and runs on 3 tokens: token 1, token 3, token 5. "
        "288 bytes of experts read so far.",
        "Each of 6 tokens sums what its experts made. 288 bytes of experts read so far. "
        "1 of 4 experts stay unread.",
    ]


def test_every_visit_is_an_arrow_to_its_expert_until_the_experts_run_one_by_one():
    (routing,) = traced(*toy(), k=2).of(Routing)
    all_visits = {
        ((0, t, c), (1, e, 0))
        for t, row in enumerate(routing.experts.tolist())
        for c, e in enumerate(row)
    }
    assert arrows(TOY[0]) == all_visits
    kept = all_visits - {((0, 2, 1), (1, 1, 0)), ((0, 3, 1), (1, 1, 0))}
    assert arrows(TOY[1]) == arrows(TOY[2]) == kept
    for e in range(3):
        assert arrows(TOY[3 + e]) == {pair for pair in kept if pair[1][1] == e}
    assert arrows(TOY[6]) == {(b, a) for a, b in kept}


def test_the_dropped_stand_beside_the_full_expert_by_name():
    rows = panel(TOY[2], Grid, "experts").rows
    assert [[c.text for c in row if c.text] for row in rows] == [
        ["t0", "t2", "t4"], ["t0", "t1", "t4", "t5", "t2", "t3"], ["t1", "t3", "t5"], [],
    ]  # fmt: skip
    assert [c.tone for c in rows[1]] == ["active"] * 4 + ["bad"] * 2
    assert rows[1][4].note == "expert 1: token 2, dropped"
    cell = panel(TOY[1], Grid, "tokens").rows[2][1]
    assert (cell.text, cell.tone) == ("e1 full", "bad")
    assert cell.note == "token 2: dropped, expert 1 is full"


def test_bars_show_what_is_asked_for_and_then_what_is_kept():
    assert loads(TOY[0]) == {"expert 0": 3, "expert 1": 6, "expert 2": 3, "expert 3": 0}
    assert loads(TOY[1]) == {"expert 0": 3, "expert 1": 4, "expert 2": 3, "expert 3": 0}
    tones = [[bar.tone for bar in panel(frame, Bars).bars] for frame in TOY[2:]]
    assert tones == [
        ["active", "active", "active", "idle"],
        ["new", "active", "active", "idle"],
        ["good", "new", "active", "idle"],
        ["good", "good", "new", "idle"],
        ["good", "good", "good", "idle"],
    ]


@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize("sizes", RAGGED)
def test_the_last_frame_agrees_with_the_trace_on_any_shape(sizes, capacity):
    *shape, k = sizes
    trace = traced(*layer(*shape), k=k, capacity=capacity)
    run = frames(trace)
    read = sum(x.nbytes for x in trace.of(Load) if x.name.startswith("W_"))
    weights = layer(*shape)[2:]
    meter = panel(run[-1], Meter, "expert weights")
    assert (meter.value, meter.versus) == (read, sum(w.nbytes for w in weights))
    (grouping,) = trace.of(Grouping)
    n_visits = grouping.starts.diff().tolist()
    for label, value in loads(run[-1]).items():
        assert value == n_visits[int(label.split()[1])]
    assert len(loads(run[-1])) == min(16, shape[3])
    if capacity is not None:
        (overflow,) = trace.of(Overflowed)
        dropped = panel(run[-1], Meter, "visits")
        assert (dropped.value, dropped.versus) == (len(overflow.tokens), shape[0] * k)
    draw_series(run)


def test_of_many_experts_the_busiest_are_shown_and_the_title_says_so():
    run = frames(traced(*layer(60, 6, 3, 40), k=8))
    bars = panel(run[0], Bars)
    assert bars.title == "load of the 16 busiest of 40 experts"
    (grouping,) = traced(*layer(60, 6, 3, 40), k=8).of(Grouping)
    busiest = sorted(grouping.starts.diff().tolist())[-16:]
    assert sorted(bar.value for bar in bars.bars) == busiest


def test_many_tokens_become_boxes_with_their_words_and_say_who_dropped_them():
    words = [f"w{i}" for i in range(40)]
    trace = traced(*layer(40, 16, 8, 4), k=1, capacity=5)
    run = frames(trace, words=words)
    (overflow,) = trace.of(Overflowed)
    boxes = panel(run[-1], Tokens).tokens
    bad = [i for i, box in enumerate(boxes) if box.tone == "bad"]
    assert bad == sorted(overflow.tokens.tolist()) and len(bad) > 6
    token, expert = int(overflow.tokens[0]), int(overflow.experts[0])
    assert boxes[token].note == f"{token} w{token}: dropped by expert {expert}"
    assert f"{token} w{token} by expert {expert}" in run[1].caption
    assert f"and {len(bad) - 6} more" in run[1].caption
    assert "Nobody takes" in run[1].caption
    assert {box.tone for i, box in enumerate(boxes) if i not in bad} == {"good"}


def test_white_space_in_words_is_made_visible():
    run = frames(traced(*toy(), k=1), words=["\n", "    ", "a b", "\t", "", "x"])
    assert panel(run[0], Grid, "tokens").row_labels == (
        "0 ↵", "1 ····", "2 a·b", "3 ⇥", "4 ∅", "5 x",
    )  # fmt: skip


def test_the_shared_expert_has_a_frame_and_its_bytes():
    case = toy()
    shared = (torch.ones(4, 6), torch.ones(3, 4))
    run = frames(traced(*case, k=2, shared=shared))
    assert run[-1].caption == "The shared expert runs on all 6 tokens."
    meter = panel(run[-1], Meter, "expert weights")
    assert meter.value == 288 + 4 * 36 and meter.versus == 384 + 4 * 36


def test_in_expert_choice_a_token_that_nobody_took_is_named():
    x = torch.tensor([[3.0, 0, 0, 0], [2, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0], [0, 0, 0, 3]])
    run = frames(traced(*toy()._replace(x=x), run=expert_choice_layer, capacity=1))
    first = panel(run[0], Grid, "tokens").rows[1][0]
    assert (first.text, first.tone, first.note) == ("nobody", "bad", "token 1: taken by nobody")
    assert dict(run[0].legend)["bad"] == "taken by nobody"
    assert loads(run[-1]) == {f"expert {e}": 1 for e in range(4)}


def test_the_text_of_an_expert_is_its_visitors_and_its_bar_their_share():
    experts = torch.tensor([[0, 1], [2, 0], [2, 1]])
    weights = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
    run = expert_frames(experts, weights, ["a", "\n", "a"], n_experts=4)
    assert len(run) == 4
    assert [[t.tone for t in panel(f, Tokens).tokens] for f in run] == [
        ["new", "active", "idle"], ["active", "idle", "active"], ["idle", "new", "new"],
        ["idle"] * 3,
    ]  # fmt: skip
    assert [bar.value for bar in panel(run[0], Bars).bars] == [pytest.approx(100 / 3)] * 3 + [0]
    assert run[1].caption == "Expert 1 gets 2 of 6 visits; even would be 2. Most often: a (2)."
    assert run[3].caption.endswith("Most often: none.")
    assert panel(run[0], Tokens).tokens[1].note == "token 1 ↵: expert 2 (0.60), expert 0 (0.40)"
    draw_series(run)
    with pytest.raises(BadInput, match="with a word a token"):
        expert_frames(experts, weights, ["a"], n_experts=4)


def test_every_tone_has_a_name_and_every_word_says_what_it_is():
    boxes = frames(traced(*layer(40, 16, 8, 8), k=2, capacity=8))
    for frame in TOY + boxes:
        named = dict(frame.legend)
        for part in frame.panels:
            if isinstance(part, Grid):
                cells = [cell for row in part.rows for cell in row]
                assert all(cell.tone in named for cell in cells)
                assert all(cell.note for cell in cells if cell.text)
            if isinstance(part, Tokens):
                assert all(token.tone in named and token.note for token in part.tokens)
        assert "".join(describe(frame))


def test_a_saved_trace_gives_the_same_pictures(tmp_path):
    trace = traced(*toy(), k=2, capacity=4)
    trace.save(tmp_path / "trace")
    assert frames(Trace.load(tmp_path / "trace")) == TOY


def test_a_widget_of_48_tokens_stays_under_its_megabyte():
    case = layer(48, 16, 8, 8)
    Player(frames(traced(*case, k=2, capacity=8), words=["some_word"] * 48))


def test_what_cannot_be_shown_is_refused():
    with recording() as twice:
        moe_layer(*toy(), k=1)
        moe_layer(*toy(), k=1)
    for trace, n in ((twice, 2), (Trace(), 0)):
        with pytest.raises(BadInput, match=f"this trace has {n}. Call the layer once"):
            frames(trace)
    with pytest.raises(BadInput, match="words must name each of the 6 tokens; got 2"):
        frames(traced(*toy(), k=1), words=["a", "b"])
