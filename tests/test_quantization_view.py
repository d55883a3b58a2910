"""The pictures of quantization: every cell, line and caption comes from the run."""

import json

import pytest
import torch

from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.trace import Trace, recording
from llmopt_lab.quantization import dequantize, gptq, hessian_of, pack_int4, quantize, unpack_int4
from llmopt_lab.quantization.cases import layer
from llmopt_lab.quantization.gptq import output_error
from llmopt_lab.quantization.input_scales import awq_scales
from llmopt_lab.quantization.records import ColumnQuantized, GroupScaled, TileFinished
from llmopt_lab.quantization.view import (
    budget_frames,
    frames,
    loudness_frames,
    packing_frames,
    quality_frames,
    recorded_variant,
    rounding_frames,
    scales_frame,
    search_frames,
)
from llmopt_lab.widgets.draw import draw_series
from llmopt_lab.widgets.panels import Chart, Frame, Grid, Meter
from llmopt_lab.widgets.player import MAX_STATE, Player


def gptq_run(rows=4, cols=10, *, n=60, bits=3, **settings):
    """A recorded run of GPTQ: its frames, the trace, the layer and what came out."""
    weight, x = layer(rows, cols, n, correlated=True)
    h = hessian_of(x)
    with recording() as trace:
        q = gptq(weight, h, bits=bits, **settings)
    settings.pop("act_order", None)
    settings.pop("tile", None)
    rounded = dequantize(quantize(weight, bits=bits, **settings))
    run = frames(trace, weight=weight, hessian=h, rounded=rounded)
    return run, trace, weight, h, q, rounded


def grid_of(frame: Frame) -> Grid:
    return next(panel for panel in frame.panels if isinstance(panel, Grid))


def lines_of(frame: Frame) -> dict[str, tuple]:
    chart = next(panel for panel in frame.panels if isinstance(panel, Chart))
    return {line.label: line.points for line in chart.lines}


def meters(frame: Frame) -> dict[str, Meter]:
    return {panel.title: panel for panel in frame.panels if isinstance(panel, Meter)}


def words(grid: Grid) -> list[list[str]]:
    return [[cell.text for cell in row] for row in grid.rows]


def tones(grid: Grid) -> list[list[str]]:
    return [[cell.tone for cell in row] for row in grid.rows]


def test_there_is_a_frame_for_each_scale_column_and_tile_with_its_line_of_source():
    run, trace, *_ = gptq_run(tile=4)
    kinds = [type(trace.steps[frame.step].what) for frame in run]
    assert kinds[0] is GroupScaled and kinds.count(GroupScaled) == 1
    assert kinds.count(ColumnQuantized) == 10 and kinds.count(TileFinished) == 2
    assert all(frame.file.endswith("quantization/gptq.py") and frame.line for frame in run)


@pytest.mark.parametrize("settings", [{}, {"group_size": 4}, {"act_order": True}, {"tile": 3}])
def test_the_last_frame_shows_the_codes_and_how_far_each_weight_has_moved(settings):
    run, _, weight, _, q, _ = gptq_run(**settings)
    grid = grid_of(run[-1])
    assert words(grid) == [[str(code) for code in row] for row in q.codes.tolist()]
    moved = (dequantize(q) - weight).abs()
    heat = torch.tensor([[cell.heat for cell in row] for row in grid.rows], dtype=moved.dtype)
    assert torch.allclose(heat, moved / moved.max(), atol=1e-12)
    assert {tone for row in tones(grid) for tone in row} == {"good", "new"}


@pytest.mark.parametrize("settings", [{}, {"group_size": 4}, {"act_order": True, "tile": 4}])
def test_both_curves_end_at_the_layer_s_output_errors(settings):
    run, _, weight, h, q, rounded = gptq_run(**settings)
    whole = output_error(weight, torch.zeros_like(weight), h)
    for name, made in (("GPTQ", dequantize(q)), ("rounding", rounded)):
        points = lines_of(run[-1])[name]
        assert points[0] == (0, 0)
        assert points[-1][0] == 10
        assert points[-1][1] == pytest.approx(100 * output_error(weight, made, h) / whole)
        assert [x for x, _ in points] == sorted(x for x, _ in points)


def test_the_meters_say_that_gptq_moves_its_weights_farther():
    run, _, weight, _, q, rounded = gptq_run(rows=6, cols=12)
    last = meters(run[-1])
    ours, alone = last["weights moved: GPTQ"], last["weights moved: rounding"]
    assert ours.value == pytest.approx(float((dequantize(q) - weight).norm()))
    assert alone.value == alone.versus == pytest.approx(float((rounded - weight).norm()))
    assert ours.value > alone.value


def test_columns_fill_from_the_left_and_the_wave_runs_ahead_of_them():
    run, trace, weight, *_ = gptq_run(tile=5)
    for frame in run:
        what = trace.steps[frame.step].what
        row = tones(grid_of(frame))[0]
        if isinstance(what, ColumnQuantized):
            assert row[: what.step] == ["good"] * what.step and row[what.step] == "new"
            end = what.step + 1 + what.spread.shape[1]
            assert set(row[end:]) <= {"idle"}  # behind the tile: later, all at once
    (first,) = (f for f in run if isinstance(trace.steps[f.step].what, TileFinished))
    assert tones(grid_of(first))[0][5:] == ["active"] * 5
    before = run[run.index(first) - 1]
    assert words(grid_of(before))[0][7] == f"{float(weight[0, 7]):.2f}"
    assert words(grid_of(first))[0][7] != words(grid_of(before))[0][7]


def test_under_act_order_columns_fill_where_they_stand():
    run, trace, *_ = gptq_run(act_order=True)
    order = [what.column for what in trace.of(ColumnQuantized)]
    assert order != sorted(order)
    for n, column in enumerate(order):
        row = tones(grid_of(run[n + 1]))[0]
        assert row[column] == "new"
        assert {j for j, tone in enumerate(row) if tone == "good"} == set(order[:n])


def test_in_a_real_layer_a_cell_stands_for_many_weights_and_a_frame_for_many_columns():
    run, _, weight, h, q, _ = gptq_run(rows=20, cols=100, n=300, tile=16)
    grid = grid_of(run[-1])
    assert (len(grid.rows), len(grid.rows[0])) == (5, 15)
    assert grid.row_labels[:2] == ("row 0-3", "row 4-7") and grid.column_labels[:2] == ("0", "7")
    assert len(run) == 16
    moved = (dequantize(q) - weight).abs()
    cell = grid.rows[1][2]
    assert cell.note == f"row 4-7, column 14-20: moved by {moved[4:8, 14:21].mean():.2f} on average"
    assert max(cell.heat for row in grid.rows for cell in row) == 1
    assert run[0].caption.startswith("0 of 100 columns rounded")
    assert run[4].caption.startswith("28 of 100 columns rounded. Output error")
    want = 100 * output_error(weight, dequantize(q), h) / output_error(weight, 0 * weight, h)
    assert lines_of(run[-1])["GPTQ"][-1] == (100, pytest.approx(want))


def test_a_frame_that_ends_with_a_tile_shows_the_tile_s_corrections():
    run, trace, *_ = gptq_run(rows=3, cols=64, n=200, tile=16)
    assert isinstance(trace.steps[run[4].step].what, TileFinished)
    assert set(tones(grid_of(run[4]))[0][4:]) == {"active"}
    assert isinstance(trace.steps[run[3].step].what, ColumnQuantized)
    assert set(tones(grid_of(run[3]))[0][4:]) == {"idle"}


def test_the_largest_picture_of_a_layer_fits_a_widget():
    weight, x = layer(24, 384, 600, correlated=True)
    h = hessian_of(x)
    with recording() as trace:
        gptq(weight, h, bits=4, group_size=128)
    rounded = dequantize(quantize(weight, bits=4, group_size=128))
    player = Player(frames(trace, weight=weight, hessian=h, rounded=rounded))
    state = {name: getattr(player, name) for name in ("frames", "pieces", "listings")}
    assert len(json.dumps(state).encode()) < MAX_STATE


def test_captions_tell_the_story_alone():
    run, *_ = gptq_run(tile=4)
    assert run[1].caption.startswith("step 0: column 0 rounded, row 0 off by")
    assert "the error spreads to 3 columns of the tile. Output error" in run[1].caption
    assert "%, by rounding alone" in run[1].caption
    assert run[5].caption.startswith("steps 0 to 3 done; their errors spread to 6 columns behind")


def test_rounding_shows_the_codes_and_what_comes_back_group_by_group():
    weight = torch.tensor([[0.7, -0.31, 0.1, 0.22, 14.0, -3.0, 0.5]])
    with recording() as trace:
        q = quantize(weight, bits=4, group_size=4)
    first, last = rounding_frames(trace, q, weight=weight)
    rows = dict(zip(grid_of(last).row_labels, words(grid_of(last)), strict=True))
    assert rows["code"] == ["7", "-3", "1", "2", "7", "-2", "0"]
    assert rows["comes back"] == ["0.7", "-0.3", "0.1", "0.2", "14", "-4", "0"]
    assert rows["off by"] == ["0", "-0.01", "0", "0.02", "0", "1", "0.5"]
    assert tones(grid_of(first))[2] == ["new"] * 4 + ["idle"] * 3
    assert tones(grid_of(last))[2] == ["good"] * 4 + ["new"] * 3
    assert words(grid_of(first))[2][4:] == ["", "", ""]
    assert first.caption.startswith("columns 0 to 3: codes -7 to 7, scale 0.1 = 0.7 / 7.")
    (meter,) = meters(last).values()
    assert (meter.value, meter.versus) == (1, 1)


def test_rounding_with_a_zero_point_or_one_scale_for_all_is_shown_as_it_is():
    weight = torch.tensor([[9.0, 9.5, 10.0], [-100.0, 1.0, 2.0]])
    with recording() as trace:
        q = quantize(weight, bits=8, symmetric=False)
    (frame,) = rounding_frames(trace, q, weight=weight)
    assert "codes -128 to 127, scale 0.0392, and code -128 stands for 0" in frame.caption
    with recording() as trace:
        q = quantize(weight, bits=8, per_tensor=True)
    (frame,) = rounding_frames(trace, q, weight=weight, row=1)
    assert "scale 0.787 = 100 / 127" in frame.caption
    assert words(grid_of(frame))[2] == ["-127", "1", "3"]


def test_the_same_outlier_costs_a_tensor_a_channel_or_a_group():
    weight = torch.full((3, 8), 0.5)
    weight[1, 2] = 50
    ways = {
        "tensor": quantize(weight, bits=4, per_tensor=True),
        "channel": quantize(weight, bits=4),
        "group": quantize(weight, bits=4, group_size=4),
    }
    frame = scales_frame(weight, ways)
    grids = [panel for panel in frame.panels if isinstance(panel, Grid)]
    assert [grid.title for grid in grids] == [
        "tensor: 1 scale", "channel: 3 scales", "group: 6 scales"
    ]  # fmt: skip
    lost = [sum(tone == "bad" for row in tones(grid) for tone in row) for grid in grids]
    assert lost == [23, 7, 3]
    assert "so many became 0: tensor 23, channel 7, group 3" in frame.caption
    assert [tones(grid)[1][2] for grid in grids] == ["new"] * 3
    (bars,) = (panel for panel in frame.panels if not isinstance(panel, Grid))
    assert [bar.value for bar in bars.bars] == pytest.approx(
        [100, 100 * (7 / 23) ** 0.5, 100 * (3 / 23) ** 0.5]
    )


def test_two_codes_in_a_byte_and_a_packing_that_forgets_the_mask():
    codes = torch.tensor([-1, 3, 7, -8], dtype=torch.int8)
    packed = pack_int4(codes)
    run = packing_frames(codes, packed, unpack_int4(packed, 4))
    assert [frame.caption for frame in run] == [
        "codes -1 and 3 share byte 0: 0011 1111, 63. Unpacked: -1 and 3.",
        "codes 7 and -8 share byte 1: 1000 0111, 135. Unpacked: 7 and -8.",
    ]
    assert tones(grid_of(run[0]))[1] == ["owner0", "owner1", "idle", "idle"]
    forgot = (codes[0::2] | codes[1::2] << 4).view(torch.uint8)
    run = packing_frames(codes, forgot, unpack_int4(forgot, 4))
    assert run[0].caption.endswith("Unpacked: -1 and -1. That is not what went in.")
    assert tones(grid_of(run[0]))[1] == ["owner0", "bad", "idle", "idle"]


def test_the_search_for_awq_s_scales_ends_at_the_one_it_took():
    weight, x = layer(16, 32, 300, correlated=False)
    x[:, 3] *= 50
    h, mean_abs = hessian_of(x), x.abs().mean(0)
    with recording() as trace:
        scales = awq_scales(weight, mean_abs, h, bits=4, n_grid=10)
    run = search_frames(trace)
    assert len(run) == 11 and run[0].caption.startswith("alpha 0.00: the output error is 100 %")
    (alpha, share), = lines_of(run[-1])["best"]  # fmt: skip
    s = mean_abs**alpha
    assert torch.allclose(scales, s / (s.max() * s.min()).sqrt())
    rtn = output_error(weight, dequantize(quantize(weight, bits=4)), h)
    ours = output_error(weight, dequantize(quantize(weight * scales, bits=4)) / scales, h)
    assert share == pytest.approx(100 * ours / rtn)


def row(bits, group_size, excess, *, method="rtn", symmetric=True, **how) -> dict:
    """One row of the measured results, made up."""
    how |= {"method": method, "bits": bits, "group_size": group_size, "symmetric": symmetric}
    cost = bits + 16 / (group_size or 512)
    return {"how": how, "excess": excess, "perplexity": 5 + excess, "bits_per_weight": cost}


RECORD = {
    "float": {"perplexity": 5.0},
    "rows": [
        row(4, 128, 0.30),
        row(4, 128, 0.10, method="gptq"),
        row(4, 128, 0.20, method="gptq", act_order=True),
        row(4, None, 0.50),
        row(3, 32, 0.25),
        row(3, 128, 0.05, symmetric=False),
        {"how": {"method": "w8a8", "bits": 8}, "bits_per_weight": 8.1, "excess": 0.0},
    ],
}


def test_measured_perplexities_stand_beside_the_float_model_a_frame_a_group_size():
    run = quality_frames(RECORD, bits=4)
    assert [frame.caption for frame in run] == [
        "4 bits, groups of 128: 4.12 bits a weight. Bits per byte of text above the float model: "
        "nearest +0.300, GPTQ +0.100, GPTQ, act-order +0.200.",
        "4 bits, one scale a row: 4.03 bits a weight. Bits per byte of text above the float model: "
        "nearest +0.500.",
    ]
    bars = [(bar.label, bar.value, bar.tone) for bar in run[0].panels[0].bars]
    assert bars == [
        ("float", 5.0, "idle"),
        ("nearest", 5.3, "active"),
        ("GPTQ", 5.1, "good"),
        ("GPTQ, act-order", 5.2, "active"),
    ]
    assert (
        "3 bits, groups of 128, zero point"
        in quality_frames(RECORD, bits=3, symmetric=False)[0].caption
    )
    with pytest.raises(BadInput, match="not measured on this model: 8 bits with zero point"):
        quality_frames(RECORD, bits=8, symmetric=False)


def test_a_budget_takes_the_best_that_costs_no_more():
    cheap, rich = budget_frames(RECORD, (2.0, 3.2, 4.2))
    assert cheap.caption == (
        "At most 3.2 bits a weight. Best of each way: nearest: 3 bits, groups of 128, zero point."
    )
    assert [(bar.label, bar.value) for bar in rich.panels[0].bars] == [
        ("nearest", 0.05),
        ("GPTQ", 0.10),
        ("GPTQ, act-order", 0.20),
    ]
    with pytest.raises(BadInput, match="nothing was measured with at most 2 bits"):
        budget_frames(RECORD, (2,))


def test_a_variant_is_found_by_all_that_names_it():
    how, inputs = {"method": "nf4"}, {"bits": 8, "observer": None}
    variants = [
        {"how": how, "rotation": None, "inputs": None, "excess": 1},
        {"how": how, "rotation": "offline", "inputs": None, "excess": 2},
        {"how": None, "rotation": None, "inputs": inputs, "excess": 3},
    ]
    record = {"variants": variants}
    assert recorded_variant(record, how=how)["excess"] == 1
    assert recorded_variant(record, how=how, rotation="offline")["excess"] == 2
    assert recorded_variant(record, how=None, inputs=inputs)["excess"] == 3
    with pytest.raises(BadInput, match="not measured on this model"):
        recorded_variant(record, how=None)


def test_the_loudest_channel_stands_first_and_curves_join_one_by_one():
    x = torch.tensor([[1.0, -8.0, 2.0], [0.0, 4.0, -2.0]])
    flat = torch.full((2, 3), -3.0)
    run = loudness_frames({"as it is": x, "turned": flat})
    rms = x.square().mean().sqrt()
    want = [(i, pytest.approx(float(y / rms), abs=1e-3)) for i, y in enumerate((8, 2, 1))]
    assert list(lines_of(run[0])["as it is"]) == want and list(lines_of(run[0])) == ["as it is"]
    assert lines_of(run[1])["turned"] == ((0, 1.0), (1, 1.0), (2, 1.0))
    assert run[1].caption == (
        "turned: the loudest of 3 channels reaches 1.0 times the root mean square of the input, "
        "the median one 1.0 times."
    )
    draw_series(run)
    with pytest.raises(BadInput, match="1 to 3 ways"):
        loudness_frames({})


def test_every_tone_has_a_name_and_every_word_says_what_it_is():
    weight = torch.tensor([[0.7, -0.31, 0.1, 5.0]])
    with recording() as trace:
        q = quantize(weight, bits=4)
    codes = torch.tensor([1, -2], dtype=torch.int8)
    run = [
        *gptq_run()[0],
        *rounding_frames(trace, q, weight=weight),
        scales_frame(weight, {"a": q}),
        *packing_frames(codes, pack_int4(codes), codes),
    ]
    for frame in run:
        named = dict(frame.legend)
        for panel in frame.panels:
            if isinstance(panel, Grid):
                cells = [cell for row in panel.rows for cell in row]
                assert all(cell.tone in named or not cell.text for cell in cells)
                assert all(len(cell.note) > len(cell.text) for cell in cells if cell.text)


def test_a_layer_that_needs_no_rounding_is_drawn():
    weight = torch.zeros(2, 3)
    with recording() as trace:
        q = gptq(weight, torch.eye(3))
    draw_series(frames(trace, weight=weight, hessian=torch.eye(3), rounded=dequantize(q)))


def test_what_cannot_be_shown_is_refused():
    weight, x = layer(3, 20, 40, correlated=True)
    h = hessian_of(x)
    with recording() as twice:
        q = gptq(weight, h)
        gptq(weight, h)
    for trace in (twice, Trace()):
        with pytest.raises(BadInput, match="one run of gptq over all 20 columns"):
            frames(trace, weight=weight, hessian=h, rounded=weight)
    with pytest.raises(BadInput, match="room for 12 columns; got 20"):
        rounding_frames(twice, q, weight=weight)
    with pytest.raises(BadInput, match="no scale in this trace"):
        rounding_frames(Trace(), q, weight=weight[:, :4])
    with pytest.raises(BadInput, match=r"room for 8 x 12 weights; got \(3, 20\)"):
        scales_frame(weight, {})
    with pytest.raises(BadInput, match="n even; got"):
        packing_frames(*(torch.zeros(3, dtype=d) for d in (torch.int8, torch.uint8, torch.int8)))
    with pytest.raises(BadInput, match="no trial in this trace"):
        search_frames(Trace())
