"""The small training: three ways of balancing from one start, measured as they go."""

from dataclasses import replace
from math import log

import pytest
import torch
import torch.nn.functional as F

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.moe.records import TrainingReport
from llmopt_lab.moe.train_small import CONFIG, WAYS, BiasedMixture, SmallTraining
from llmopt_lab.moe.view import training_frame
from llmopt_lab.nn.feed_forward import MixtureOfExperts
from llmopt_lab.widgets.draw import draw_series
from llmopt_lab.widgets.panels import Chart, Grid

SIZES = dict(d_model=16, n_heads=2, n_kv_heads=1, d_head=8, d_ff=8, max_positions=32)
SMALL = replace(CONFIG, **SIZES)
TEXT = b"".join(b"def f%d(a, b):\n    return a * %d + b\n\n" % (i, i * i) for i in range(200))


@pytest.fixture(scope="module")
def trained() -> dict:
    runs = {way: SmallTraining(way, TEXT, config=SMALL) for way in WAYS}
    return {way: (run, [run.advance(n) for n in (1, 39, 40)]) for way, run in runs.items()}


def test_all_ways_start_from_one_model_and_read_one_text(trained):
    first = [reports[0] for _, reports in trained.values()]
    assert len({r.bits for r in first}) == 1
    assert all(torch.equal(r.load, first[0].load) for r in first)


def test_all_ways_learn(trained):
    for run, reports in trained.values():
        assert reports[0].bits > 7.5 and reports[-1].bits < 4.5
        assert run.bits_per_byte(TEXT) < 4.5
        assert [r.step for r in reports] == [1, 40, 80]


def test_without_balancing_few_experts_do_the_work_and_either_way_evens_it_out(trained):
    none, loss, bias = (reports[-1].busiest for _, reports in trained.values())
    assert none > 2.5 and loss < 0.8 * none and bias < 1.6


def test_shares_sum_to_one_in_every_layer(trained):
    for _, reports in trained.values():
        for report in reports:
            assert report.load.shape == (2, 8)
            assert_close(report.load.sum(1), torch.ones(2, dtype=torch.float64))


def test_only_the_bias_way_moves_the_bias_and_each_step_by_its_rate(trained):
    for way, (run, _) in trained.items():
        moved = [bool(m.bias.any()) for m in run.mixtures]
        assert moved == [way == "bias"] * 2
    after_one = SmallTraining("bias", TEXT, config=SMALL)
    after_one.advance(1)
    assert {round(abs(x), 6) for x in after_one.mixtures[0].bias.tolist()} <= {0.0, 0.01}


def test_without_a_bias_it_is_the_models_mixture_and_a_bias_changes_only_the_choice():
    torch.manual_seed(0)
    plain, biased = MixtureOfExperts(SMALL, 0), BiasedMixture(SMALL, 0)
    biased.load_state_dict(plain.state_dict() | {"bias": torch.zeros(8)})
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    for train in (True, False):
        assert_close(biased.train(train)(x), plain.train(train)(x))
    before, *_ = biased.route(x)
    biased.bias[3] = 9.0
    scores, weights, experts = biased.route(x)
    assert torch.equal(scores, before) and (experts[..., 0] == 3).all()
    chosen = scores.gather(-1, experts)
    assert_close(weights, chosen / chosen.sum(-1, keepdim=True))


def test_two_runs_of_one_seed_agree_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    one, two = (SmallTraining("loss", TEXT, config=SMALL, seed=3).advance(4) for _ in range(2))
    assert one.bits == two.bits and torch.equal(one.load, two.load)
    assert torch.equal(torch.get_rng_state(), state)
    assert SmallTraining("loss", TEXT, config=SMALL, seed=4).advance(4).bits != one.bits


def test_bits_per_byte_is_the_mean_over_windows_read_one_by_one(trained):
    run, _ = trained["none"]
    tokens = torch.tensor(list(TEXT[:200]))
    nats = []
    for start in range(0, 192, 32):
        with torch.no_grad():
            logits = run.model.eval()(tokens[None, start : start + 32])[0]
        nats.append(F.cross_entropy(logits, tokens[start + 1 : start + 33]))
    want = torch.stack(nats).mean() / log(2)
    assert_close(torch.tensor(run.bits_per_byte(TEXT[:200])), want)


def test_the_picture_names_the_overrun_and_the_idle_experts(trained):
    runs = {way: reports for way, (_, reports) in trained.items()}
    frames = [training_frame(runs, at) for at in range(3)]
    assert frames[-1] == training_frame(runs)
    grids = [p for p in frames[-1].panels if isinstance(p, Grid)]
    assert [g.title for g in grids] == [f"layer {i}: share of the visits" for i in range(2)]
    for layer, grid in enumerate(grids):
        for way, row in zip(grid.row_labels, grid.rows, strict=True):
            for e, cell in enumerate(row):
                share = float(runs[way][-1].load[layer, e])
                tone = "bad" if share > 0.25 else "idle" if share < 1 / 16 else "good"
                assert cell.tone == tone and cell.text == f"{share:.0%}"
                assert cell.note == f"{way}, layer {layer}, expert {e}: {share:.1%} of the visits"
    charts = [p for p in frames[1].panels if isinstance(p, Chart)]
    assert [[len(line.points) for line in chart.lines] for chart in charts] == [[2] * 3] * 2
    assert frames[-1].caption.startswith("Step 80. none: ")
    draw_series(frames)


def test_reports_that_do_not_belong_together_are_refused():
    report = TrainingReport("none", 1, 8.0, torch.full((1, 2), 0.5))
    for runs in ({}, {"a": []}, {"a": [report], "b": [report, report]}):
        with pytest.raises(BadInput, match="equally many reports"):
            training_frame(runs)


@pytest.mark.parametrize(
    ("said", "call"),
    [
        ("none, loss, bias; got 'both'", lambda: SmallTraining("both", TEXT)),
        ("more than a window of 128", lambda: SmallTraining("none", b"short")),
        ("256 symbols", lambda: SmallTraining("none", TEXT, config=replace(CONFIG, n_vocab=99))),
        ("must be positive", lambda: SmallTraining("none", TEXT, config=SMALL).advance(0)),
    ],
)
def test_bad_input_is_refused(said, call):
    with pytest.raises(BadInput, match=said):
        call()
