"""What a pattern loses, against counts by hand and plain loops; and what was recorded of it."""

import json

import pytest
import torch

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.nn import ModelConfig, Transformer, load
from llmopt_lab.sparse_attention import measure
from llmopt_lab.sparse_attention.block_lists import lists_of
from llmopt_lab.sparse_attention.cases import Sizes, attention_inputs
from llmopt_lab.sparse_attention.io_model import (
    block_costs,
    flops,
    layers_to_reach,
    sparse_traffic,
)
from llmopt_lab.sparse_attention.patterns import Causal, SlidingWindow, Strided, streaming
from llmopt_lab.sparse_attention.recall import (
    block_mass,
    block_shares,
    layers_inputs,
    mass_recall,
    needle,
    probabilities,
    reach,
    recalled,
)


def attention(n: int = 23):
    q, k, _ = attention_inputs(Sizes(n, n, 8, 8, batch=2, n_heads=4, n_kv_heads=2))
    return q, k, probabilities(q, k, scale=0.3)


def test_probabilities_are_those_of_dense_causal_attention():
    q, k, p = attention()
    want = torch.softmax(0.3 * k[1, 1, :6] @ q[1, 3, 5], 0)
    assert_close(p[1, 3, 5, :6], want)
    assert not p[1, 3, 5, 6:].any()


def test_recall_is_the_share_of_the_mass_that_is_kept():
    _, _, p = attention()
    assert_close(mass_recall(p, Causal().mask(23, 23)), torch.ones(2, 4, dtype=p.dtype))
    mask = streaming(4, 1).mask(23, 23)
    want = sum(float(p[0, 2, i, j]) for i in range(23) for j in range(23) if mask[i, j]) / 23
    assert float(mass_recall(p, mask)[0, 2]) == pytest.approx(want)


def test_the_mass_of_blocks_adds_up_to_all_of_it():
    _, _, p = attention()
    mass = block_mass(p, 5, 7, 2)
    assert mass.shape == (2, 2, 5, 4)
    assert_close(mass.sum((-1, -2)), torch.full((2, 2), 2 * 23.0, dtype=p.dtype))
    assert_close(mass[1, 0, 4, 2], p[1, :2, 20:, 14:21].sum())


def test_the_shares_of_blocks_are_means_over_their_queries():
    _, _, p = attention()
    shares = block_shares(p, 5, 7)
    assert shares.shape == (2, 4, 5, 4)
    assert_close(shares.sum(-1), torch.ones(2, 4, 5, dtype=p.dtype))
    assert_close(shares[1, 3, 4, 2], p[1, 3, 20:, 14:21].sum() / 3)  # the last block is shorter


def test_costs_block_by_block_add_up_to_those_of_a_run():
    n, sizes = 23, {"tile_q": 5, "tile_k": 7}
    costs = block_costs(n, **sizes, d_head=8, itemsize=8)
    x = torch.empty(n, 8, dtype=torch.float64)
    live = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) < 0.4
    lists = lists_of(live, live, n, n, 5, 7)
    assert costs.fixed_nbytes + costs.nbytes[live].sum() == sparse_traffic(lists, x, x, x).total
    assert costs.flops[live].sum() == flops(lists, x, x, x)
    with pytest.raises(BadInput, match="sizes must be positive"):
        block_costs(0, **sizes, d_head=8)


def test_reach_grows_by_a_window_a_layer():
    assert reach([SlidingWindow(5)] * 4, 40) == [5, 9, 13, 17]
    assert reach([SlidingWindow(1)] * 3, 40) == [1, 1, 1]
    assert reach([SlidingWindow(5), Causal()], 40) == [40, 40]
    assert reach([Causal(), SlidingWindow(5)], 40) == [5, 40]
    assert reach([Strided(4), SlidingWindow(4)], 40)[-1] == 40
    depth = layers_to_reach(40, 7)
    counts = reach([SlidingWindow(7)] * depth, 40)
    assert counts[-1] == 40 > counts[-2]


def test_the_inputs_of_every_layer_are_what_the_model_gives_its_attention():
    config = ModelConfig(37, 32, 3, 4, 2, 8, 32, max_positions=64)
    torch.manual_seed(0)
    model = Transformer(config).requires_grad_(False)
    tokens = torch.arange(9)[None]
    found = list(layers_inputs(model, tokens))
    assert len(found) == 3
    assert all(q.shape == (1, 4, 9, 8) and k.shape == (1, 2, 9, 8) for q, k, _ in found)
    assert all(scale == pytest.approx(8**-0.5) for *_, scale in found)


def test_a_needle_is_there_twice_and_found_by_who_copies():
    filler = torch.arange(50) + 100
    text = needle(filler, length=6, at=10, n_vocab=100, rng=torch.Generator().manual_seed(0))
    assert len(text.tokens) == 62 and text.first == 10 and text.first_of_second == 56
    assert torch.equal(text.tokens[10:16], text.tokens[56:])
    assert text.distance == 45

    def looks_back(distance):
        def logits(tokens):
            guesses = torch.zeros(len(tokens), 200)
            for i in range(len(tokens)):
                if i >= distance:
                    guesses[i, tokens[i - distance]] = 1
            return guesses

        return logits

    assert recalled(looks_back(text.distance), text, hints=2) == 1
    assert recalled(looks_back(text.distance + 1), text, hints=2) < 0.5
    with pytest.raises(BadInput, match="hints must be"):
        recalled(looks_back(1), text, hints=6)
    with pytest.raises(BadInput, match="a place in 0 to 50"):
        needle(filler, length=6, at=51, n_vocab=9, rng=torch.Generator())


# --- what was measured

RECORDED = json.loads(measure.RESULTS.read_text())


def test_every_part_was_measured_for_every_model():
    for name, plan in measure.PLANS.items():
        assert set(RECORDED["models"][name]) == set(plan["parts"])
    assert set(measure.cost_rows()) < set(RECORDED["cost"]["rows"])


def test_every_fixed_pattern_was_measured_and_none_sees_the_future():
    n = 1024
    for name, pattern in measure.fixed_patterns(n).items():
        assert not pattern.mask(n, n).triu(1).any()
        for model in RECORDED["models"].values():
            assert 0 < model["mass"]["kept"][name] <= 1
            read = model["perplexity"]["perplexity"]
            assert read[name] > read["dense"]


def test_counted_bytes_were_those_of_the_formula_then_and_are_now():
    from llmopt_lab.sparse_attention.block_lists import cover
    from llmopt_lab.sparse_attention.io_model import fitted_exponent, sparse_traffic

    lengths = RECORDED["cost"]["lengths"]
    for name in ("window 128", "causal"):
        row = RECORDED["cost"]["rows"][name]
        x = torch.empty(lengths[0], RECORDED["cost"]["d_head"])
        pattern = measure.cost_rows()[name](lengths[0])
        lists = cover(pattern, lengths[0], lengths[0], tile_q=128, tile_k=128)
        assert row["bytes"][0] == sparse_traffic(lists, x, x, x).total
        assert row["bytes_exponent"] == fitted_exponent(lengths, row["bytes"])
        assert row["time_exponent"] == fitted_exponent(lengths, row["seconds"])


def test_a_measurement_can_be_made_again():
    lm = load("lab-draft", device="cpu")
    found = measure.measure_sinks(lm, n=90, window=28, sinks=(0, 4), segment=32)
    assert [row["n_sinks"] for row in found["rows"]] == [0, 4, None]
    assert all(len(row["nats"]) == 3 for row in found["rows"])
    kept = measure.measure_mass(lm, n=96, size=16)["kept"]
    assert kept["window 256"] == pytest.approx(1) and kept["top 8 blocks, oracle"] > 0.99
    row = measure.measure_needle(lm, n=400, window=28, repeats=1, distances=(40,))["rows"][0]
    assert all(20 * share == pytest.approx(round(20 * share)) for share in row["recalled"].values())
