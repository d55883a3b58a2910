"""Balancing, upcycling and specialisation: losses by hand, gradients by finite differences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.moe import moe_layer, route
from llmopt_lab.moe.balance import balance_loss, expert_load, max_violation, moved_bias, z_loss
from llmopt_lab.moe.cases import guides_load_balancing_loss, layer
from llmopt_lab.moe.model_routing import (
    CLASSES,
    mixture_input,
    model_routing,
    token_class,
    weights_of,
)
from llmopt_lab.moe.reference import swiglu
from llmopt_lab.moe.specialisation import mutual_information, specialisation
from llmopt_lab.moe.upcycle import split_experts, upcycle
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.feed_forward import SwiGLU
from llmopt_lab.nn.transformer import Transformer
from llmopt_lab.nn.weights import load


def logits_of(n_tokens=11, n_experts=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n_tokens, n_experts, generator=rng, dtype=torch.float64)


# The losses


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_balance_loss_by_hand(k):
    logits = logits_of()
    routing = route(logits, k)
    total = 0.0
    for e in range(5):
        visits = sum(row.count(e) for row in routing.experts.tolist())
        mean_p = sum(math.exp(row[e]) / sum(map(math.exp, row)) for row in logits.tolist()) / 11
        total += visits / (11 * k) * mean_p
    want = torch.tensor(5 * total, dtype=torch.float64)
    assert_close(balance_loss(routing.scores, routing.experts), want)


def test_gradients_of_both_losses_pass_gradcheck():
    logits = logits_of().requires_grad_()
    experts = route(logits, 2).experts
    torch.autograd.gradcheck(lambda x: balance_loss(x.softmax(1), experts), logits)
    torch.autograd.gradcheck(z_loss, logits)


def test_the_z_loss_by_hand_and_softmax_does_not_see_what_it_punishes():
    logits = logits_of()
    by_hand = sum(math.log(sum(map(math.exp, row))) ** 2 for row in logits.tolist()) / 11
    assert_close(z_loss(logits), torch.tensor(by_hand, dtype=torch.float64))
    assert_close((logits + 7).softmax(1), logits.softmax(1))
    assert z_loss(logits + 7) > z_loss(logits) + 49


def test_the_guides_loss_has_no_gradient_and_a_million_times_it_changes_nothing():
    logits = logits_of().requires_grad_()
    routing = route(logits, 2)
    guides = guides_load_balancing_loss(routing.scores, routing.experts)
    assert not guides.requires_grad and guides.grad_fn is None
    task = routing.weights.square().sum()
    without, with_it = (
        torch.autograd.grad(task + c * guides, logits, retain_graph=True)[0] for c in (0, 1e6)
    )
    assert torch.equal(without, with_it)
    ours = balance_loss(routing.scores, routing.experts)
    assert torch.autograd.grad(ours, logits)[0].abs().max() > 1e-4
    one_way = torch.zeros(6, 2, dtype=torch.int64)
    assert_close(guides_load_balancing_loss(torch.ones(6, 8), one_way), torch.tensor(1 / 8))


# The bias


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30), st.integers(1, 8), st.data())
def test_the_bias_moves_by_the_sign_of_the_counted_load(n_tokens, n_experts, data):
    k = data.draw(st.integers(1, n_experts))
    experts = torch.tensor(
        [data.draw(st.permutations(range(n_experts)))[:k] for _ in range(n_tokens)]
    )
    bias = torch.linspace(-1, 1, n_experts, dtype=torch.float64)
    moved = moved_bias(bias, experts, rate=0.25)
    for e in range(n_experts):
        visits, mean = int((experts == e).sum()) * n_experts, n_tokens * k
        want = float(bias[e]) + (0.25 if visits < mean else -0.25 if visits > mean else 0.0)
        assert abs(float(moved[e]) - want) < 1e-12


def test_an_even_load_moves_no_bias_even_where_a_share_is_no_binary_fraction():
    experts = torch.arange(77 * 7).view(-1, 1) % 7
    assert torch.equal(moved_bias(torch.zeros(7), experts), torch.zeros(7))


def test_moving_the_bias_evens_a_fixed_skewed_router_and_leaves_the_weights_their_scores():
    logits = logits_of(400, 8) + torch.linspace(2, -2, 8, dtype=torch.float64)
    bias = torch.zeros(8, dtype=torch.float64)
    before = max_violation(expert_load(route(logits, 2).experts, 8))
    for step in range(400):
        bias = moved_bias(bias, route(logits, 2, bias=bias).experts, rate=0.02 / (1 + step / 50))
    routing = route(logits, 2, bias=bias)
    after = max_violation(expert_load(routing.experts, 8))
    assert before > 2 and after < 0.2
    p = logits.softmax(1).gather(1, routing.experts)
    assert_close(routing.weights, p / p.sum(1, keepdim=True))


def test_max_violation_is_0_when_even_and_n_minus_1_after_a_collapse():
    assert max_violation(torch.ones(6)) == 0
    assert max_violation(torch.tensor([0.0, 9.0, 0.0, 0.0])) == 3
    assert max_violation(torch.tensor([1.0, 2.0, 3.0])) == 0.5


# Upcycling


@pytest.mark.parametrize("k", [2, 3, 5])
def test_an_upcycled_layer_computes_what_the_dense_one_does(k):
    rng = torch.Generator().manual_seed(0)
    x, _, w_gate_up, w_down = layer(9, 6, 4, 1)
    router, *copies = upcycle(w_gate_up[0], w_down[0], 5, rng=rng)
    assert_close(moe_layer(x, router, *copies, k=k), swiglu(x, w_gate_up[0], w_down[0]))
    copies[0][0] += 1
    assert not torch.equal(copies[0][0], copies[0][1]), "copies share memory"


@pytest.mark.parametrize("n_pieces", [1, 2, 3])
@pytest.mark.parametrize("k", [2, 3])
def test_finer_experts_compute_what_the_coarse_ones_do(k, n_pieces):
    case = layer(17, 7, 6, 4)
    finer = split_experts(*case[1:], n_pieces)
    assert finer[1].shape == (4 * n_pieces, 7, 2 * 6 // n_pieces)
    assert_close(moe_layer(case.x, *finer, k=k * n_pieces), moe_layer(*case, k=k))


# Specialisation


def test_mutual_information_of_tables_known_by_hand():
    assert abs(mutual_information(torch.eye(4)) - 2) < 1e-12
    assert mutual_information(torch.ones(3, 5)) < 1e-12
    # a binary symmetric channel that errs one time in ten: 1 - H(0.1)
    h = -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9))
    assert abs(mutual_information(torch.tensor([[9, 1], [1, 9]])) - (1 - h)) < 1e-12


def test_independent_tokens_give_the_bias_that_miller_derived_and_chance_measures_it():
    n, rows, cols = 500, 6, 5
    rng = torch.Generator().manual_seed(0)
    found = []
    for _ in range(20):
        experts = torch.randint(rows, (n, 1), generator=rng)
        classes = torch.randint(cols, (n,), generator=rng)
        found.append(specialisation(experts, classes, rng=rng, n_shifts=40))
    bias = (rows - 1) * (cols - 1) / (2 * n * math.log(2))  # 0.0289
    mean = sum(s.bits for s in found) / 20
    chance = sum(float(s.by_chance.mean()) for s in found) / 20
    excess = sum(s.excess for s in found) / 20
    assert abs(mean - bias) < 0.2 * bias and abs(chance - bias) < 0.2 * bias
    assert abs(excess) < 0.2 * bias
    assert abs(found[0].entropy - math.log2(5)) < 0.01


def test_a_planted_dependence_comes_out_near_its_true_size():
    rng = torch.Generator().manual_seed(0)
    classes = torch.randint(4, (3000,), generator=rng)
    noise = torch.rand(3000, generator=rng) < 0.3
    experts = torch.where(noise, torch.randint(4, (3000,), generator=rng), classes)[:, None]
    right, wrong = 0.7 + 0.3 / 4, 0.3 / 4
    true = 2 + right * math.log2(right) + 3 * wrong * math.log2(wrong)
    found = specialisation(experts, classes, rng=rng)
    assert abs(found.excess - true) < 0.05 and found.p_value < 0.01
    assert "of 2.000 bits" in str(found) or "of 1.99" in str(found)


def test_two_texts_of_long_runs_share_bits_by_chance_and_the_shifts_say_so():
    """Neighbours are alike: 600 tokens are as good as a few dozen; shuffled ones hide that."""
    p_values, kind = [], []
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        experts, classes = (
            torch.randint(4, (60,), generator=rng).repeat_interleave(
                torch.randint(1, 40, (60,), generator=rng)
            )[:600]
            for _ in range(2)
        )
        found = specialisation(experts[:, None], classes, rng=rng, n_shifts=99)
        p_values.append(found.p_value)
        shuffled = [
            specialisation(
                experts[:, None], classes[torch.randperm(600, generator=rng)], rng=rng, n_shifts=1
            ).bits
            for _ in range(20)
        ]
        kind.append(found.bits > max(shuffled))
    assert sum(p <= 0.05 for p in p_values) <= 4
    assert sum(kind) == 20


# The lab model


@pytest.fixture(scope="module")
def lab_moe():
    return load("lab-moe", device="cpu")


TEXT = "import os\n\n\ndef size(path):\n    return os.stat(path).st_size + 128\n"


def test_the_routing_of_lab_moe_is_that_of_its_layers(lab_moe):
    tokens = lab_moe.encode(TEXT)
    found = model_routing(lab_moe.model, tokens)
    assert [r.layer for r in found] == [0, 1, 2, 3]
    # the first layer by hand: its input is the embedding plus attention
    block, seen = lab_moe.model.layers[0], []
    handle = block.post_attention_layernorm.register_forward_hook(
        lambda module, given, out: seen.append(out[0])
    )
    lab_moe.model(tokens[None])
    handle.remove()
    routing = route(seen[0] @ block.mlp.gate.weight.T, 2)
    assert torch.equal(found[0].experts, routing.experts)
    assert_close(found[0].weights, routing.weights)
    assert abs(float(found[2].load.sum()) - 1) < 1e-12
    assert not block.mlp._forward_hooks, "a hook was left behind"


def test_windows_are_read_each_from_position_0(lab_moe):
    tokens = lab_moe.encode(TEXT)
    both = model_routing(lab_moe.model, tokens, window=9)[3].experts
    assert torch.equal(both[9:18], model_routing(lab_moe.model, tokens[9:18])[3].experts)


def test_every_layer_of_lab_moe_is_our_layer(lab_moe):
    x = torch.randn(13, 128, generator=torch.Generator().manual_seed(0))
    for block in lab_moe.model.layers:
        assert_close(moe_layer(x, *weights_of(block.mlp), k=2), block.mlp(x))


def test_the_input_of_a_mixture_is_what_its_layer_gives_it(lab_moe):
    tokens = lab_moe.encode(TEXT)
    x = mixture_input(lab_moe.model, tokens, layer=2)
    routing = route(x @ lab_moe.model.layers[2].mlp.gate.weight.T, 2)
    assert torch.equal(routing.experts, model_routing(lab_moe.model, tokens)[2].experts)
    assert not lab_moe.model.layers[2].mlp._forward_pre_hooks, "a hook was left behind"


def test_lab_moe_specialises(lab_moe):
    text = "".join(f"def f{i}(a, b):\n    return a * {i} + b\n\n\n" for i in range(100, 140))
    tokens = lab_moe.encode(text)
    classes = torch.tensor([token_class(lab_moe.decode([t])) for t in tokens.tolist()])
    for routing in model_routing(lab_moe.model, tokens):
        found = specialisation(routing.experts, classes, rng=torch.Generator().manual_seed(0))
        assert found.excess > 0.1 * found.entropy and found.p_value < 0.02


@pytest.mark.parametrize(
    ("text", "name"),
    [("\n", "newline"), (" \n\n", "newline"), ("        ", "indent"), (" return", "keyword"),
     (" None", "keyword"), (" path", "word"), ("_x", "word"), (".join", "word"), (" 128", "number"),
     ("):", "punctuation"), (" ==", "punctuation")],
)  # fmt: skip
def test_classes_of_tokens(text, name):
    assert CLASSES[token_class(text)] == name


RNG = torch.Generator()


@pytest.mark.parametrize(
    ("said", "call"),
    [
        ("not empty", lambda: z_loss(torch.ones(0, 3))),
        ("n_experts,", lambda: moved_bias(torch.ones(1, 3), torch.ones(2, 2))),
        ("rate must", lambda: moved_bias(torch.ones(3), torch.ones(2, 2).long(), rate=0.0)),
        ("not all zero", lambda: max_violation(torch.zeros(3))),
        ("multiple of n_pieces", lambda: split_experts(*layer(1, 3, 4, 2)[1:], 3)),
        ("positive int", lambda: upcycle(torch.ones(3, 4), torch.ones(2, 3), 0, rng=RNG)),
        ("w_gate_up", lambda: upcycle(torch.ones(3, 5), torch.ones(2, 3), 2, rng=RNG)),
        ("counts must", lambda: mutual_information(torch.zeros(2, 2))),
        ("2 tokens", lambda: specialisation(torch.ones(3, 1), torch.ones(4), rng=RNG)),
        ("from 0", lambda: specialisation(-torch.ones(3, 1), torch.ones(3), rng=RNG)),
        ("got 1", lambda: mixture_input(dense(), torch.ones(3).long(), layer=1)),
        ("got 0", lambda: mixture_input(dense(), torch.ones(3).long(), layer=0)),
        ("load lab-moe", lambda: model_routing(dense(), torch.ones(3).long())),
    ],
)  # fmt: skip
def test_bad_input_is_refused(said, call):
    with pytest.raises(BadInput, match=said):
        call()


def dense() -> Transformer:
    config = ModelConfig(
        n_vocab=9, d_model=4, n_layers=1, n_heads=1, n_kv_heads=1, d_head=4, d_ff=4
    )
    return Transformer(config, feed_forward=SwiGLU)
