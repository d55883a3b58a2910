"""The pictures of attention: every cell, meter and caption comes from the trace."""

import json
import math

import pytest
import torch

from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.memory import Load, Store
from llmopt_lab.core.trace import Trace, record, recording
from llmopt_lab.flash_attention import flash_attention, naive_attention, split_kv_attention
from llmopt_lab.flash_attention.cases import attention_inputs, toy
from llmopt_lab.flash_attention.io_model import (
    Sizes,
    flash_traffic,
    naive_traffic,
    on_chip_nbytes,
    tile_counts,
)
from llmopt_lab.flash_attention.key_outer import key_outer_attention
from llmopt_lab.flash_attention.records import (
    Absorbed,
    Finished,
    Merged,
    Skipped,
    SoftmaxState,
    SplitDone,
)
from llmopt_lab.flash_attention.view import frames, in_step, naive_frames
from llmopt_lab.widgets.draw import draw_series
from llmopt_lab.widgets.panels import Frame, Grid, Meter
from llmopt_lab.widgets.player import MAX_STATE, Player

TILES = {"tile_q": 2, "tile_k": 2}


def traced(attend, *tensors, **settings) -> Trace:
    with recording() as trace:
        attend(*tensors, **settings)
    return trace


def one_head(n_q: int, n_k: int, d: int = 4):
    return (x[0, 0] for x in attention_inputs(Sizes(n_q, n_k, d, d), dtype=torch.float32))


def grids(frame: Frame) -> list[Grid]:
    return [panel for panel in frame.panels if isinstance(panel, Grid)]


def meters(frame: Frame) -> dict[str, Meter]:
    return {panel.title: panel for panel in frame.panels if isinstance(panel, Meter)}


def tones(grid: Grid) -> list[list[str]]:
    return [[cell.tone for cell in row] for row in grid.rows]


def words(grid: Grid) -> list[list[str]]:
    return [[cell.text for cell in row] for row in grid.rows]


def of(run: list[Frame], trace: Trace, kind: type) -> list[Frame]:
    return [frame for frame in run if isinstance(trace.steps[frame.step].what, kind)]


def test_there_is_one_frame_a_tile_and_one_for_each_finished_row_of_tiles():
    trace = traced(flash_attention, *one_head(7, 9), causal=True, **TILES)
    run = frames(trace)
    n_computed, n_skipped = tile_counts(Sizes(7, 9, 4, 4, causal=True), **TILES)
    assert len(of(run, trace, Absorbed)) == n_computed
    assert len(of(run, trace, Skipped)) == n_skipped > 0
    assert len(of(run, trace, Finished)) == 4
    assert len(run) == n_computed + n_skipped + 4
    assert all(f.file.endswith("flash_attention/reference.py") and f.line for f in run)


def test_only_the_tile_on_chip_shows_its_scores_and_the_diagonal_is_marked():
    q, k, v = toy()
    trace = traced(flash_attention, q, k, v, causal=True, **TILES)
    first, *_ = frames(trace)
    scores, _ = grids(first)
    assert tones(scores)[:2] == [["new", "bad"] + ["idle"] * 6, ["new", "new"] + ["idle"] * 6]
    assert words(scores)[:2] == [["-0.5", "−∞"] + [""] * 6, ["-1", "-1"] + [""] * 6]
    last = frames(trace)[-1]
    want = [
        ["active" if j <= i else "bad" if j < i // 2 * 2 + 2 else "cached" for j in range(8)]
        for i in range(8)
    ]
    assert tones(grids(last)[0]) == want
    assert not any(text for row in words(grids(last)[0]) for text in row)


def test_the_running_softmax_shows_what_was_rescaled_and_ends_as_the_result():
    q, k, v = toy(torch.float64)
    trace = traced(flash_attention, q, k, v, **TILES)
    run = frames(trace)
    _, state = grids(run[2])  # after the third tile of keys: scores up to key 5
    scores = (q @ k.T / 2)[:2]
    m_old, m = scores[:, :4].amax(1), scores[:, :6].amax(1)
    total = (scores[:, :6] - m[:, None]).exp().sum(1)
    assert state.column_labels == ("m", "shrink", "total", "acc 0", "acc 1", "acc 2", "acc 3")
    for row in range(2):
        shrink = math.exp(m_old[row] - m[row])
        got = [cell.text for cell in state.rows[row][:3]]
        assert float(got[0]) == m[row]
        assert got[1][0] == "×" and float(got[1][1:]) == pytest.approx(shrink, abs=0.005)
        assert float(got[2]) == pytest.approx(float(total[row]), abs=0.005)
    assert "1 of 2 queries rescale" in run[2].caption
    out = torch.softmax(q @ k.T / 2, 1) @ v
    final = [[float(cell.text) for cell in row[3:]] for row in grids(run[-1])[1].rows]
    assert torch.allclose(torch.tensor(final, dtype=torch.float64), out, atol=0.005)
    assert {tone for row in tones(grids(run[-1])[1]) for tone in row} == {"good"}


def test_the_meters_are_the_formulas():
    q, k, v = toy()
    sizes = Sizes.of(q, k, v, causal=True)
    trace = traced(flash_attention, q, k, v, causal=True, **TILES)
    run = frames(trace, naive_nbytes=naive_traffic(sizes).total, budget=256)
    chip, traffic = on_chip_nbytes(sizes, **TILES), flash_traffic(sizes, **TILES)
    for frame in run:
        meter = meters(frame)["on chip"]
        assert meter.versus == 256
        what = trace.steps[frame.step].what
        if isinstance(what, Absorbed):
            assert meter.value == chip
        elif isinstance(what, Skipped):
            assert 0 < meter.value < chip  # the queries and their state stay
        else:
            assert meter.value == 0
    last = meters(run[-1])
    assert last["HBM traffic"].value == traffic.total == trace.total("nbytes", Load, Store)
    assert last["HBM traffic"].versus == naive_traffic(sizes).total
    assert last["HBM beside Q, K, V, O"].value == sizes.lse_nbytes
    moved = [meters(frame)["HBM traffic"].value for frame in run]
    assert moved == sorted(moved)


def test_naive_attention_takes_three_frames_and_holds_two_matrices():
    q, k, v = toy()
    sizes = Sizes.of(q, k, v, causal=True)
    run = naive_frames(traced(naive_attention, q, k, v, causal=True))
    assert [frame.caption[:6] for frame in run] == ["step 1", "step 2", "step 3"]
    s, p, o = grids(run[1])
    assert (s.title, p.title, o.title) == ("S in HBM", "P in HBM", "O in HBM")
    assert {tone for row in tones(s) for tone in row} == {"good", "bad"}
    assert {tone for row in tones(p) for tone in row} == {"new", "bad"}
    assert {tone for row in tones(o) for tone in row} == {"idle"}
    assert words(s)[0] == ["-0.5"] + ["−∞"] * 7
    assert words(p)[0] == ["1"] + ["0"] * 7
    assert meters(run[-1])["HBM traffic"].value == naive_traffic(sizes).total
    assert meters(run[-1])["HBM beside Q, K, V, O"].value == 2 * sizes.score_nbytes


def test_naive_and_flash_run_in_step():
    q, k, v = toy()
    flash = frames(traced(flash_attention, q, k, v, causal=True, **TILES))
    naive = naive_frames(traced(naive_attention, q, k, v, causal=True))
    slow = in_step(naive, len(flash))
    assert len(slow) == len(flash)
    assert [frame.caption[:6] for frame in (slow[0], slow[-1])] == ["step 1", "step 3"]
    counts = [slow.count(frame) for frame in naive]
    assert sum(counts) == len(flash) and max(counts) - min(counts) <= 1
    with pytest.raises(BadInput, match="a run of 20 frames cannot be shown in 3"):
        in_step(flash, 3)


def test_beyond_twelve_a_cell_is_a_tile():
    q, k, v = one_head(64, 40, 8)
    trace = traced(flash_attention, q, k, v, causal=True, tile_q=16, tile_k=8)
    run = frames(trace)
    scores, state = grids(run[-1])
    assert scores.row_labels == ("q 0-15", "q 16-31", "q 32-47", "q 48-63")
    assert scores.column_labels == ("0-7", "8-15", "16-23", "24-31", "32-39")
    assert tones(scores)[0] == ["cached"] * 5  # these queries see no key
    assert words(state)[0] == ["−∞", "", "0"] + ["0"] * 8
    absorbed = of(run, trace, Absorbed)[0]
    largest = trace.of(Absorbed)[0].scores.max()
    (shown,) = (cell for row in grids(absorbed)[0].rows for cell in row if cell.tone == "new")
    assert float(shown.text) == pytest.approx(float(largest), abs=0.005)


def test_the_first_papers_loops_fill_the_grid_column_by_column():
    run = frames(traced(key_outer_attention, *toy(), tile_q=4, tile_k=4))
    seen = [[[t != "idle" for t in row] for row in tones(grids(frame)[0])] for frame in run]
    assert [s[0][0] for s in seen] == [True] * 4
    assert [s[4][0] for s in seen] == [False, True, True, True]
    assert [s[0][4] for s in seen] == [False, False, True, True]
    assert "rescale" in run[2].caption
    # the state of the other queries waits in HBM
    assert [row[0] for row in tones(grids(run[1])[1])] == ["good"] * 4 + ["new"] * 4


def test_split_kv_shows_its_parts_and_merges_them():
    q, k, v = toy()
    trace = traced(split_kv_attention, q[:3, None], k[None], v[None], n_splits=3, tile_k=2)
    run = frames(trace)
    parts, merges = trace.of(SplitDone), trace.of(Merged)
    assert (len(parts), len(merges)) == (3, 2)
    *_, grid = grids(run[-1])
    assert grid.row_labels == ("part 0", "part 1", "part 2")
    for row, part in zip(grid.rows, parts, strict=True):
        got = torch.tensor([float(cell.text) for cell in row])
        assert torch.allclose(got, part.result.lse, atol=0.005)
    first_of_a_part = [frame for frame in of(run, trace, Absorbed) if "keys 2" in frame.caption]
    assert words(grids(first_of_a_part[0])[1])[0][1] == ""  # no older sum to rescale
    state = [tones(grids(frame)[2])[2][0] for frame in run]
    assert state == ["idle"] * (len(run) - 4) + ["good", "good", "shared", "shared"]
    assert meters(run[-1])["HBM traffic"].value == trace.total("nbytes", Load, Store)


def test_captions_tell_the_story_alone():
    trace = traced(flash_attention, *toy(), causal=True, **TILES)
    told = [frame.caption for frame in frames(trace)]
    assert told[0] == (
        "queries 0 to 1: absorb keys 0 to 1 (1 of 4 scores masked); query 0: m=-0.500 "
        "total=1.000. 96 bytes moved so far."
    )
    assert told[1].startswith("queries 0 to 1: skip keys 2 to 3, in the future of them all")
    assert told[4].startswith("queries 0 to 1: done, the normalised result is written")
    assert "2 of 2 queries rescale" in told[6]


def test_every_tone_has_a_name_and_every_number_says_what_it_is():
    trace = traced(flash_attention, *toy(), causal=True, **TILES)
    for frame in frames(trace) + naive_frames(traced(naive_attention, *toy())):
        named = dict(frame.legend)
        cells = [cell for grid in grids(frame) for row in grid.rows for cell in row]
        assert all(cell.tone in named for cell in cells)
        assert all(cell.note.startswith("query") for cell in cells if cell.text)


def test_a_wrong_run_is_shown_and_not_refused():
    """NaN, a maximum that falls, no loads: what exercises produce must still make a picture."""
    one, nan = torch.ones(1), torch.full((1, 1), torch.nan)
    with recording() as trace:
        for key, m in enumerate((900.0, -900.0)):
            state = SoftmaxState(m * one, nan[0], one[None])
            record(Absorbed(slice(0, 1), slice(key, key + 1), nan, state))
    run = frames(trace)
    assert words(grids(run[1])[1]) == [["-900", "×inf", "nan", "1"]]
    assert meters(run[1])["on chip"].value == 4 + 3 * 4
    draw_series(run)


def test_a_trace_of_several_heads_is_refused():
    q, k, v = attention_inputs(Sizes(4, 4, 2, 2, n_heads=2))
    with pytest.raises(BadInput, match="several heads or runs. Record one head"):
        frames(traced(flash_attention, q, k, v))
    with pytest.raises(BadInput, match="three steps of naive_attention of one head; .* has 6"):
        naive_frames(traced(naive_attention, q, k, v))


def test_a_trace_without_a_tile_is_refused():
    trace = traced(naive_attention, *toy())
    with pytest.raises(BadInput, match="no tile in this trace"):
        frames(trace)
    with pytest.raises(BadInput, match="this trace has 0"):
        naive_frames(Trace())


def test_a_widget_stays_under_its_megabyte():
    q, k, v = one_head(12, 12)
    flash = frames(traced(flash_attention, q, k, v, causal=True, **TILES))
    naive = naive_frames(traced(naive_attention, q, k, v, causal=True))
    player = Player(flash, in_step(naive, len(flash)), labels=("flash", "naive"))
    state = {name: getattr(player, name) for name in ("frames", "versus", "pieces", "listings")}
    assert len(json.dumps(state).encode()) < MAX_STATE
