"""The pictures of distillation: every bar, push and caption comes from the trace."""

import json

import pytest
import torch

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.trace import Trace, record, recording
from llmopt_lab.distillation import forward_kl, reverse_kl, soft_targets
from llmopt_lab.distillation.cases import ragged, toy
from llmopt_lab.distillation.linear_kl import linear_kl, linear_kl_traffic
from llmopt_lab.distillation.records import Fitted, Softened, Stepped
from llmopt_lab.distillation.two_humps import fit_one_hump, two_humps
from llmopt_lab.distillation.view import chunk_frames, frames, hump_frames, training_frames
from llmopt_lab.widgets.draw import draw_series
from llmopt_lab.widgets.panels import Bars, Chart, Frame, Grid, Meter
from llmopt_lab.widgets.player import MAX_STATE, Player

WORDS = ["cat", "dog", "fox", "owl", "ant"]


def softened(student, teacher, temperatures=(0.5, 1.0, 2.0, 4.0)) -> Trace:
    with recording(Softened) as trace:
        for t in temperatures:
            soft_targets(teacher, t)
            soft_targets(student, t)
    return trace


def panels(frame: Frame, kind: type) -> dict:
    return {panel.title: panel for panel in frame.panels if isinstance(panel, kind)}


def fitted(divergence, **settings) -> Trace:
    with recording(Fitted) as trace:
        fit_one_hump(two_humps(), divergence, **settings)
    return trace


def trained(n: int = 4, n_vocab: int = 20) -> Trace:
    student, teacher, _, _ = ragged(n, n_vocab=n_vocab)
    with recording(Stepped) as trace:
        for i, row in enumerate(student):
            q = (row + i * teacher[0]).softmax(0)
            record(Stepped(10 * (i + 1), 5.0 - i, teacher[0].softmax(0), q))
    return trace


def test_there_is_one_frame_a_temperature_with_both_distributions():
    student, teacher, _ = toy()
    for place in range(4):
        run = frames(softened(student, teacher), words=WORDS, place=place)
        assert len(run) == 4
        for frame, t in zip(run, (0.5, 1.0, 2.0, 4.0), strict=True):
            (grid,) = panels(frame, Grid).values()
            assert grid.column_labels == tuple(WORDS)
            for row, logits in zip(grid.rows, (teacher, student), strict=False):
                want = (logits[place] / t).softmax(0)
                assert [cell.text for cell in row] == [f"{x:.3f}" for x in want.tolist()]


def test_the_pushes_are_minus_the_gradient_and_point_where_it_goes():
    student, teacher, _ = toy()
    (frame,) = frames(softened(student, teacher, (2.0,)), words=WORDS)
    push = 2 * ((teacher[0] / 2).softmax(0) - (student[0] / 2).softmax(0))
    (grid,) = panels(frame, Grid).values()
    for cell, value in zip(grid.rows[2], push.tolist(), strict=True):
        arrow, size = cell.text.split()
        assert size == f"{abs(value):.2f}"
        assert (arrow, cell.tone) == (("▲", "good") if value > 0 else ("▼", "bad"))
    z = student[0].clone().requires_grad_()
    log_p = (teacher[0] / 2).log_softmax(0)
    (gradient,) = torch.autograd.grad(4 * forward_kl(log_p, (z / 2).log_softmax(0)), z)
    assert_close(push, -gradient)
    kl = float(forward_kl(log_p, (student[0] / 2).log_softmax(0)))
    meters = panels(frame, Meter)
    assert meters["KL(p || q)"].value == round(kl, 4)
    assert meters["T² KL(p || q)"].value == round(4 * kl, 4)
    assert f"{kl:.3f} nats" in frame.caption and "'cat'" in frame.caption


def test_where_both_agree_nothing_is_pushed():
    _, teacher, _ = toy()
    (frame,) = frames(softened(teacher, teacher, (1.0,)), words=WORDS)
    (grid,) = panels(frame, Grid).values()
    assert {cell.tone for cell in grid.rows[2]} == {"idle"}


def test_the_chart_shows_the_gradient_with_and_without_t_squared_so_far():
    student, teacher, _ = toy()
    run = frames(softened(student, teacher), words=WORDS)
    chart = panels(run[2], Chart)["size of the gradient"]
    with_it, without = chart.lines
    assert [t for t, _ in with_it.points] == [0.5, 1.0, 2.0]
    for (t, size), (_, alone) in zip(with_it.points, without.points, strict=True):
        push = t * ((teacher[0] / t).softmax(0) - (student[0] / t).softmax(0))
        assert_close(torch.tensor([size, alone]), torch.stack([push.norm(), push.norm() / t**2]))


def test_a_large_vocabulary_shows_its_likeliest_tokens_and_the_others_together():
    student, teacher, _, _ = ragged(1, n_vocab=30)
    run = frames(softened(student, teacher), words=[f"w{i}" for i in range(30)])
    (grid,) = panels(run[1], Grid).values()
    assert len(grid.column_labels) == 9 and grid.column_labels[-1] == "others"
    for row in grid.rows[:2]:
        assert round(sum(float(cell.text) for cell in row), 2) == 1
    assert f"w{int(teacher[0].argmax())}" in grid.column_labels


def test_training_is_scrubbed_by_report():
    trace = trained()
    words = [f"w{i}" for i in range(20)]
    run = training_frames(trace, words=words)
    assert len(run) == 4
    for i, (frame, what) in enumerate(zip(run, trace.of(Stepped), strict=True)):
        chart = panels(frame, Chart)["loss"]
        assert chart.lines[0].points == tuple((10 * (j + 1), 5.0 - j) for j in range(i + 1))
        bars = panels(frame, Bars)["what both expect next"].bars
        assert len(bars) == 16
        for bar in bars:
            name, _, who = bar.label.partition(", ")
            of = what.p if who == "teacher" else what.q
            assert bar.value == round(float(of[words.index(name)]), 4)
        assert f"Step {what.step}" in frame.caption
        assert repr(words[int(what.q.argmax())]) in frame.caption


def test_the_humps_frames_follow_the_fit_and_end_with_it():
    trace = fitted(reverse_kl, steps=25)
    run = hump_frames(trace, name="reverse KL", every=10)
    assert [frame.step for frame in run] == [0, 10, 20, 24]
    last = trace.of(Fitted)[-1]
    teacher, student = panels(run[-1], Chart)["reverse KL: two humps and one"].lines
    for line, y in ((student, last.q), (teacher, last.p)):
        assert line.points == tuple(
            (x, round(y, 4)) for x, y in zip(last.x.tolist(), y.tolist(), strict=True)
        )
    assert (last.x[0], last.x[-1]) == (-10, 10)
    assert f"mean {last.mean:.2f}" in run[-1].caption


def test_beside_each_other_one_covers_the_valley_and_one_does_not():
    ends = [
        hump_frames(fitted(d), name="KL")[-1].caption.partition("student has ")[2].split()[0]
        for d in (forward_kl, reverse_kl)
    ]
    assert float(ends[0]) > 0.02 and float(ends[1]) < 0.001


def fused(n_tokens=7, d=3, n_vocab=9, chunk=3) -> Trace:
    rng = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (
        torch.randn(shape, generator=rng, dtype=torch.float64)
        for shape in ((n_tokens, d), (n_vocab, d), (n_tokens, n_vocab))
    )
    with recording() as trace, torch.no_grad():
        linear_kl(hidden, weight, teacher, chunk=chunk, tile=4)
    return trace


def test_the_fused_loss_shows_one_chunk_in_memory_at_a_time():
    run = chunk_frames(fused())
    assert len(run) == 3
    for i, frame in enumerate(run):
        (grid,) = panels(frame, Grid).values()
        assert grid.column_labels == ("0–2", "3–5", "6–6")
        tones = [cell.tone for cell in grid.rows[0]]
        assert tones == ["good"] * i + ["new"] + ["idle"] * (2 - i)
        meter = panels(frame, Meter)["logits in memory"]
        assert (meter.value, meter.versus) == (3 * 9 * 8, 7 * 9 * 8)
    moved = [panels(frame, Meter)["moved so far"].value for frame in run]
    read, written = linear_kl_traffic(7, 3, 9, 3)
    assert moved == sorted(moved) and moved[-1] < 8 * (read + written)


def test_all_can_be_drawn_and_fit_a_player():
    student, teacher, _ = toy()
    runs = [
        frames(softened(student, teacher), words=WORDS),
        training_frames(trained(), words=[f"w{i}" for i in range(20)]),
        hump_frames(fitted(forward_kl), name="forward KL"),
        chunk_frames(fused()),
    ]
    for run in runs:
        assert len(draw_series(run)) == len(run)
        assert all(len(frame.caption) > 40 and frame.line for frame in run)
        player = Player(run)
        assert len(json.dumps(player.get_state(), default=str)) < MAX_STATE
    Player(runs[2], versus=hump_frames(fitted(reverse_kl), name="reverse KL"))


def test_a_saved_trace_gives_the_same_frames(tmp_path):
    student, teacher, _ = toy()
    trace = softened(student, teacher)
    trace.save(tmp_path / "soft.trace")
    assert frames(Trace.load(tmp_path / "soft.trace"), words=WORDS) == frames(trace, words=WORDS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: frames(Trace(), words=WORDS), "this trace has 0 of them"),
        (lambda: frames(softened(*toy()[:2]), words=WORDS[:4]), "a word for each of the 5 tokens"),
        (lambda: frames(softened(*toy()[:2]), words=WORDS, place=4), "place must be 0 to 3; got 4"),
        (lambda: training_frames(Trace(), words=WORDS), "no report of a training"),
        (lambda: training_frames(trained(), words=WORDS), "a word for each of the 20 tokens"),
        (lambda: hump_frames(Trace(), name="x"), "shows one run of fit_one_hump"),
        (lambda: hump_frames(fitted(forward_kl, steps=3), name="x", every=0), "every must be"),
        (lambda: chunk_frames(Trace()), "chunk_frames shows one run of linear_kl"),
    ],
)
def test_what_cannot_be_shown_is_refused(make, message):
    with pytest.raises(BadInput, match=message):
        make()


def test_a_temperature_without_its_student_is_refused():
    student, teacher, _ = toy()
    with recording(Softened) as trace:
        soft_targets(teacher, 1.0)
        soft_targets(student, 2.0)
    with pytest.raises(BadInput, match=r"at temperatures \[1.0, 2.0\]"):
        frames(trace, words=WORDS)
