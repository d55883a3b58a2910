"""The pictures of sparse attention: every cell, meter and caption comes from the trace."""

import time

import pytest
import torch

from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.memory import Load, Store
from llmopt_lab.core.trace import recording
from llmopt_lab.nn import ModelConfig, Transformer
from llmopt_lab.sparse_attention import cover, sparse_attention
from llmopt_lab.sparse_attention.cases import Sizes, attention_inputs, toy
from llmopt_lab.sparse_attention.patterns import Causal, longformer, streaming
from llmopt_lab.sparse_attention.records import Finished, Visited
from llmopt_lab.sparse_attention.rolling_cache import RollingCache
from llmopt_lab.sparse_attention.view import cache_frames, frames, mask_grid, reach_chart
from llmopt_lab.widgets.draw import draw_series

STREAMING = streaming(3, 1)


def traced(pattern=STREAMING, *, tile=2):
    with recording() as trace:
        sparse_attention(*toy(), pattern, tile_q=tile, tile_k=tile)
    return trace


def tones(frame):
    return [[cell.tone for cell in row] for row in frame.panels[0].rows]


def test_there_is_a_frame_a_visit_and_one_a_finished_block():
    trace = traced()
    run = frames(trace, dense_nbytes=4096)
    assert len(run) == len(trace.of(Visited, Finished))
    assert all(f.file.endswith("sparse_attention/reference.py") and f.line for f in run)
    assert draw_series(run)


def test_every_pair_ends_as_the_mask_and_the_lists_say():
    for pattern in (streaming(3, 1), longformer(3, (0, -1)), Causal()):
        trace = traced(pattern)
        live = cover(pattern, 8, 8, tile_q=2, tile_k=2).live()
        last, mask = tones(frames(trace)[-1]), pattern.mask(8, 8)
        for i in range(8):
            for j in range(8):
                want = "active" if mask[i, j] else "bad" if live[i // 2, j // 2] else "cached"
                assert last[i][j] == want


def test_a_visit_shows_its_scores_and_counts_the_bytes():
    trace = traced()
    run = frames(trace)
    visit = trace.of(Visited)[-1]
    frame = [f for f in run if trace.steps[f.step].what is visit][0]
    cell = frame.panels[0].rows[7][7]
    assert cell.tone == "new" and float(cell.text) == round(float(visit.scores[-1, -1]), 1)
    assert frame.panels[0].rows[6][7].tone == "bad"
    meters = {panel.title: panel.value for panel in run[-1].panels[1:]}
    assert meters["HBM traffic"] == trace.total("nbytes", Load, Store)
    assert meters["blocks visited"] == len(trace.of(Visited))
    assert f"{meters['HBM traffic']:,} bytes" in run[-1].caption


def test_a_step_is_drawn_fast():
    trace = traced(Causal(), tile=1)
    start = time.process_time()
    run = frames(trace)
    assert (time.process_time() - start) / len(run) < 0.01


def test_what_cannot_be_drawn_is_refused():
    with recording() as empty:
        pass
    q, k, v = attention_inputs(Sizes(4, 4, 4, 4, n_heads=2))
    with recording() as heads:
        sparse_attention(q, k, v, Causal(), tile_q=2, tile_k=2)
    with recording() as long:
        sparse_attention(*(x[0, 0] for x in attention_inputs(Sizes(30, 30, 4, 4))), Causal())
    for trace, message in [(empty, "of 0 runs"), (heads, "2 heads"), (long, "at most 24 tokens")]:
        with pytest.raises(BadInput, match=message):
            frames(trace)


def test_the_cache_forgets_the_middle_and_keeps_the_sinks():
    torch.manual_seed(0)
    config = ModelConfig(37, 16, 2, 2, 1, 8, 16, max_positions=32)
    model = Transformer(config).requires_grad_(False)
    cache = RollingCache(config, window=3, n_sinks=1)
    with recording() as trace:
        for part in torch.arange(8).split(2):
            model(part[None], cache.next_positions(2), attend=cache)
    run = cache_frames(trace, [str(i) for i in range(10)])
    assert len(run) == 4
    shown = [token.tone for token in run[-1].panels[0].tokens]
    assert shown == ["shared", *["bad"] * 4, "active", "new", "new", "idle", "idle"]
    assert run[-1].panels[1].value == len(cache.kept()) == 4
    assert draw_series(run)
    with pytest.raises(BadInput, match="read 8 tokens"):
        cache_frames(trace, ["a"])


def test_a_mask_shows_where_attention_is_lost():
    mask = streaming(2, 0).mask(4, 4)
    mass = torch.full((4, 4), 0.25)
    grid = mask_grid(mask, mass)
    assert [cell.tone for cell in grid.rows[3]] == ["bad", "bad", "good", "good"]
    assert grid.rows[3][0].heat == 0.25 and "25.0% of the attention" in grid.rows[3][0].note
    pooled = mask_grid(Causal().mask(48, 48))
    assert len(pooled.rows) == 24
    assert [cell.tone for cell in pooled.rows[1][:3]] == ["good", "active", "cached"]
    assert "3 of 4 pairs seen" in pooled.rows[1][1].note
    with pytest.raises(BadInput, match="one shape"):
        mask_grid(mask, mass[:2])


def test_reach_is_drawn_from_the_token_itself():
    chart = reach_chart({"window 5": [5, 9], "window 9": [9, 17]})
    assert chart.lines[0].points == ((0, 1), (1, 5), (2, 9))
    with pytest.raises(BadInput, match="one at least"):
        reach_chart({})
