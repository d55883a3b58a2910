"""The mixture-of-experts layer, against a loop over every token and every expert in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.memory import Load, Store
from llmopt_lab.core.trace import recording
from llmopt_lab.moe import capacity_of, expert_choice_layer, group, moe_layer, route
from llmopt_lab.moe.cases import RAGGED, layer, toy
from llmopt_lab.moe.records import NOBODY, ExpertRan, ExpertsChose, Grouping, Overflowed, Routing
from llmopt_lab.moe.reference import drop_overflow, router_logits
from llmopt_lab.moe.sizes import layer_traffic


def expert_by_hand(row, w_gate_up, w_down):
    """One SwiGLU on one token, hidden unit by hidden unit."""
    d_ff = len(w_down)
    out = torch.zeros_like(row)
    for j in range(d_ff):
        gate, up = row @ w_gate_up[:, j], row @ w_gate_up[:, d_ff + j]
        out = out + gate / (1 + torch.exp(-gate)) * up * w_down[j]
    return out


def dense_loop(case, k, *, score="softmax", bias=None, shared=None, capacity=None):
    """The definition: every token through every expert, unchosen ones times zero."""
    x, router, w_gate_up, w_down = (w.double() for w in case)
    n_experts, taken, gates = router.shape[1], [0] * router.shape[1], {}
    for choice, t in itertools.product(range(k), range(len(x))):  # first choices come first
        logits = x[t] @ router
        s = logits.exp() / logits.exp().sum() if score == "softmax" else 1 / (1 + (-logits).exp())
        liked = s.detach() if bias is None else s.detach() + bias
        best = sorted(range(n_experts), key=lambda e: (-float(liked[e]), e))[:k]
        expert, total = best[choice], sum(s[e] for e in best)
        if capacity is None or taken[expert] < capacity:
            gates[t, expert] = s[expert] / total if k > 1 else s[expert]
        taken[expert] += 1
    rows = []
    for t in range(len(x)):
        row = torch.zeros_like(x[t])
        for e in range(n_experts):
            row = row + gates.get((t, e), 0.0) * expert_by_hand(x[t], w_gate_up[e], w_down[e])
        if shared is not None:
            row = row + expert_by_hand(x[t], *shared)
        rows.append(row)
    return torch.stack(rows)


VARIANTS = {
    "softmax": {},
    "sigmoid": {"score": "sigmoid"},
    "bias": {"score": "sigmoid", "bias": True},
    "shared": {"shared": True},
    "capacity": {"capacity": 2},
}


def options_of(variant, case):
    options = dict(VARIANTS[variant])
    rng = torch.Generator().manual_seed(5)
    d, n_experts = case.router.shape
    if "bias" in options:
        options["bias"] = torch.randn(n_experts, generator=rng, dtype=torch.float64)
    if "shared" in options:
        options["shared"] = tuple(
            torch.randn(s, generator=rng, dtype=torch.float64) for s in ((d, 6), (3, d))
        )
    return options


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sizes", RAGGED)
def test_the_layer_is_the_dense_loop(sizes, variant):
    *shape, k = sizes
    case = layer(*shape)
    options = options_of(variant, case)
    assert_close(moe_layer(*case, k=k, **options), dense_loop(case, k, **options))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("k", [1, 2])
def test_its_gradients_are_those_of_the_dense_loop(variant, k):
    case = [w.requires_grad_() for w in layer(7, 5, 3, 4, seed=3)]
    options = options_of(variant, layer(7, 5, 3, 4, seed=3))
    probe = torch.randn(7, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad((f(*arguments, **options) * probe).sum(), case)
        for f, arguments in (
            (lambda *a, **o: moe_layer(*a, k=k, **o), case),
            (lambda *a, **o: dense_loop(a, k, **o), case),
        )
    )
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


def test_transformers_mixtral_block_gives_the_same():
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = transformers.MixtralConfig(
        hidden_size=12, intermediate_size=10, num_local_experts=5, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config).double().eval()
    x, router, w_gate_up, w_down = case = layer(23, 12, 10, 5)
    with torch.no_grad():
        for name, weight in block.named_parameters():
            if "gate_up" in name:
                weight.copy_(w_gate_up.mT)
            elif "down" in name:
                weight.copy_(w_down.mT)
            else:
                weight.copy_(router.T)
        theirs = block(x[None])
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    # their router's softmax is float32: seven digits
    assert_close(moe_layer(*case, k=2).float(), theirs.flatten(0, -2))


# Routing


def test_renormalised_weights_are_the_softmax_over_the_chosen_logits():
    logits = torch.randn(30, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    routing = route(logits, 3)
    assert_close(routing.weights, logits.topk(3).values.softmax(1))
    assert_close(routing.weights.sum(1), torch.ones(30, dtype=torch.float64))


def test_top_1_keeps_its_probability_and_with_it_the_routers_gradient():
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    routing = route(logits, 1)
    assert_close(routing.weights, logits.softmax(1).amax(1, keepdim=True))
    gradients = [
        torch.autograd.grad(route(logits, 1, renormalise=r).weights.sum(), logits)[0].abs().max()
        for r in (False, True)
    ]
    assert gradients[0] > 0.01 and gradients[1] < 1e-6


def test_equal_scores_go_to_the_lower_number_again_and_again():
    logits = torch.zeros(300, 60)
    logits[:, 40] = 1.0
    first = route(logits, 4).experts
    assert first.tolist() == [[40, 0, 1, 2]] * 300
    for n in (1, 7, 300):
        assert torch.equal(route(logits[:n], 4).experts, first[:n])


def test_the_bias_changes_who_is_chosen_and_not_what_the_choice_weighs():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias = torch.tensor([-5.0, 0.0, 0.0, 5.0])
    plain, moved = route(logits, 2), route(logits, 2, bias=bias)
    assert plain.experts.tolist() == [[0, 1]] and moved.experts.tolist() == [[3, 1]]
    p = logits.softmax(1)[0]
    assert_close(moved.weights[0], torch.stack([p[3], p[1]]) / (p[3] + p[1]))
    assert torch.equal(plain.scores, moved.scores)


def test_a_bias_that_chooses_experts_of_probability_0_gives_weights_of_0_and_no_nan():
    logits = torch.tensor([[300.0, 0.0, 0.0]])
    routing = route(logits, 2, bias=torch.tensor([-9.0, 0.0, 0.0]))
    assert routing.experts.tolist() == [[1, 2]] and routing.weights.tolist() == [[0.0, 0.0]]


def test_the_router_works_in_float32_where_bfloat16_would_choose_others():
    x, router, *_ = layer(2000, 64, 1, 64, dtype=torch.float32, peak=0.5)
    x, router = x.bfloat16(), router.bfloat16()
    exact = route((x.double() @ router.double()), 2).experts.sort(1).values
    ours = route(router_logits(x, router), 2).experts.sort(1).values
    half = route((x @ router).float(), 2).experts.sort(1).values
    assert router_logits(x, router).dtype == torch.float32
    assert torch.equal(ours, exact)
    assert 0.005 < (half != exact).any(1).float().mean() < 0.1


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 40), st.integers(1, 9), st.data())
def test_grouping_is_a_permutation_its_inverse_and_a_range_an_expert(n_tokens, n_experts, data):
    k = data.draw(st.integers(1, n_experts))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    experts = torch.rand(n_tokens, n_experts, generator=rng).argsort(1)[:, :k]
    experts = experts.masked_fill(torch.rand(n_tokens, k, generator=rng) < 0.2, NOBODY)
    grouping = group(experts, n_experts)
    n_visits = n_tokens * k
    assert torch.equal(grouping.order[grouping.place], torch.arange(n_visits))
    assert torch.equal(grouping.place[grouping.order], torch.arange(n_visits))
    assert len(grouping.starts) == n_experts + 1 and int(grouping.starts[-1]) == n_visits
    assert int(grouping.starts[0]) == int((experts == NOBODY).sum())
    for e in range(n_experts):
        visits = grouping.order[int(grouping.starts[e]) : int(grouping.starts[e + 1])]
        assert visits.tolist() == [
            v for v, expert in enumerate(experts.flatten().tolist()) if expert == e
        ]


def test_permuted_tokens_give_permuted_results():
    case = layer(37, 12, 7, 5)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(2))
    assert_close(moe_layer(case.x[order], *case[1:], k=2), moe_layer(*case, k=2)[order], "permuted")


def test_renumbered_experts_change_nothing():
    x, router, w_gate_up, w_down = layer(15, 6, 4, 5)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(2))
    renumbered = moe_layer(x, router[:, order], w_gate_up[order], w_down[order], k=2)
    assert_close(renumbered, moe_layer(x, router, w_gate_up, w_down, k=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_stays_near_the_dense_loop(dtype):
    case = layer(19, 8, 6, 4, dtype=dtype)
    out = moe_layer(*case, k=2)
    assert out.dtype == dtype
    assert_close(out, dense_loop(case, 2))


# Capacity


def test_an_even_load_and_factor_1_drop_nothing_and_the_capacity_is_exact():
    assert capacity_of(10, 4, 2, 1.0) == 5
    assert capacity_of(10, 4, 2, 1.25) == 7  # 6.25
    assert capacity_of(100, 10, 1, 1.1) == 11  # in floats 1.1 * 100 / 10 > 11
    experts = torch.arange(12).view(6, 2) % 4
    routing = Routing(experts, torch.ones(6, 2), torch.ones(6, 4))
    with recording(Overflowed) as trace:
        assert torch.equal(drop_overflow(routing, capacity_of(6, 4, 2, 1.0)).experts, experts)
    (overflow,) = trace.of(Overflowed)
    assert len(overflow.tokens) == 0 and "nobody is dropped" in str(overflow)


def test_a_first_choice_of_a_late_token_comes_before_a_second_choice_of_an_early_one():
    experts = torch.tensor([[0, 1], [2, 1], [1, 0], [1, 2]])
    routing = Routing(experts, torch.full((4, 2), 0.5), torch.ones(4, 3))
    with recording(Overflowed) as trace:
        dropped = drop_overflow(routing, 2)
    assert dropped.experts.tolist() == [[0, NOBODY], [2, NOBODY], [1, 0], [1, 2]]
    assert dropped.weights.tolist() == [[0.5, 0], [0.5, 0], [0.5, 0.5], [0.5, 0.5]]
    (overflow,) = trace.of(Overflowed)
    assert str(overflow) == "capacity 2: dropped token 0 by expert 1, token 1 by expert 1"
    assert overflow.choices.tolist() == [1, 1]


def test_a_token_that_is_dropped_everywhere_comes_out_as_zeros():
    case = toy()
    one = case._replace(x=case.x[:1].repeat(6, 1))
    out = moe_layer(*one, k=1, capacity=2)
    assert (out[:2] != 0).all() and (out[2:] == 0).all()


def test_an_even_router_drops_a_percent_at_factor_1_and_next_to_nothing_at_1_25():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4096, 8, generator=rng)
    routing = route(logits, 2)
    shares = []
    for factor in (1.0, 1.25):
        kept = drop_overflow(routing, capacity_of(4096, 8, 2, factor)).experts != NOBODY
        shares.append(float((~kept).float().mean()))
    assert 0.003 < shares[0] < 0.03 and shares[1] == 0


# Expert choice


def test_expert_choice_is_each_expert_with_its_best_tokens():
    for n_tokens, d, d_ff, n_experts, k in RAGGED:
        case = layer(n_tokens, d, d_ff, n_experts)
        capacity = min(n_tokens, capacity_of(n_tokens, n_experts, k, 1.0))
        p = (case.x @ case.router).softmax(1)
        want = torch.zeros_like(case.x)
        for e in range(n_experts):
            for t in sorted(range(n_tokens), key=lambda t: (-float(p[t, e]), t))[:capacity]:  # noqa: B023
                want[t] += p[t, e] * expert_by_hand(case.x[t], case.w_gate_up[e], case.w_down[e])
        with recording(ExpertsChose, ExpertRan) as trace:
            assert_close(expert_choice_layer(*case, capacity=capacity), want)
        assert {len(ran.tokens) for ran in trace.of(ExpertRan)} == {capacity}
        (chose,) = trace.of(ExpertsChose)
        assert int(chose.n_visits.sum()) == n_experts * capacity


def test_expert_choice_looks_into_the_future_and_token_choice_does_not():
    case = layer(12, 6, 4, 3)
    later = case._replace(x=torch.cat([case.x, 3 * case.x[:6]]))
    assert_close(moe_layer(*later, k=1)[:12], moe_layer(*case, k=1))
    ours = expert_choice_layer(*later, capacity=4)[:12]
    assert (ours - expert_choice_layer(*case, capacity=4)).abs().max() > 0.1


# Traffic, records


@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize("d_shared", [0, 3])
@pytest.mark.parametrize("sizes", RAGGED)
def test_counted_bytes_are_the_formulas(sizes, d_shared, capacity):
    n_tokens, d, d_ff, n_experts, k = sizes
    for dtype in (torch.float64, torch.bfloat16):
        case = layer(*sizes[:4], dtype=dtype)
        shared = (torch.ones(d, 2 * d_shared, dtype=dtype), torch.ones(d_shared, d, dtype=dtype))
        with recording() as trace:
            moe_layer(*case, k=k, capacity=capacity, shared=shared if d_shared else None)
        (grouping,) = trace.of(Grouping)
        want = layer_traffic(
            n_tokens=n_tokens, n_experts=n_experts, d=d, d_ff=d_ff, d_shared=d_shared,
            n_visits=n_tokens * k - int(grouping.starts[0]),
            n_touched=int((grouping.starts.diff() > 0).sum()), itemsize=dtype.itemsize,
        )  # fmt: skip
        assert (trace.total("nbytes", Load), trace.total("nbytes", Store)) == want


def test_nobodys_weights_stay_unread():
    case = toy()
    with recording(Load, ExpertRan) as trace:
        moe_layer(*case, k=2)
    read = [load.where for load in trace.of(Load) if load.name == "W_down"]
    assert read == [0, 1, 2] == [ran.expert for ran in trace.of(ExpertRan)]
    poisoned = case._replace(w_down=case.w_down.clone().index_fill_(0, torch.tensor(3), math.nan))
    assert moe_layer(*poisoned, k=2).isfinite().all()


def test_the_captions_of_the_toy_tell_its_story():
    with recording(Routing, Overflowed, Grouping, ExpertRan) as trace:
        moe_layer(*toy(), k=2, capacity=4)
    lines = [str(what) for what in trace.of(Routing, Overflowed, Grouping, ExpertRan)]
    assert lines == [
        "route 6 tokens to 2 of 4 experts; token 0: expert 1 (0.73), expert 0 (0.27)",
        "capacity 4: dropped token 2 by expert 1, token 3 by expert 1",
        "group 12 visits by expert: [3, 4, 3, 0]",
        "expert 0 runs on tokens [0, 2, 4]",
        "expert 1 runs on tokens [0, 1, 4, 5]",
        "expert 2 runs on tokens [1, 3, 5]",
    ]


def test_the_guides_indexing_cannot_run_and_its_smallest_repair_is_exact():
    case = layer(16, 6, 4, 5)
    x, routing = case.x[None], route(case.x @ case.router, 2)
    experts, weights = routing.experts[None], routing.weights[None]
    with pytest.raises(IndexError, match="at index 2 does not match"):
        x[experts == 0]
    out = torch.zeros_like(x)
    for e in range(5):
        visited = experts == e
        gate, up = (x[visited.any(-1)] @ case.w_gate_up[e]).chunk(2, -1)
        out[visited.any(-1)] += (F.silu(gate) * up) @ case.w_down[e] * weights[visited][:, None]
    assert_close(out[0], dense_loop(case, 2))


# Bad input


@pytest.mark.parametrize(
    ("said", "call"),
    [
        ("x must be", lambda c: moe_layer(c.x[None], *c[1:], k=2)),
        ("not empty", lambda c: moe_layer(c.x[:0], *c[1:], k=2)),
        ("w_down must be", lambda c: moe_layer(c.x, c.router, c.w_gate_up, c.w_down[0], k=2)),
        ("w_gate_up must be", lambda c: moe_layer(*c[:2], c.w_gate_up[:, :, 1:], c.w_down, k=2)),
        ("x must be", lambda c: moe_layer(c.x[:, 1:], *c[1:], k=2)),
        ("floating dtype", lambda c: moe_layer(c.x.float(), *c[1:], k=2)),
        ("floating dtype", lambda c: moe_layer(*(w.long() for w in c), k=2)),
        ("one device", lambda c: moe_layer(c.x, c.router.to("meta"), *c[2:], k=2)),
        (r"k must lie in \[1, 5\]; got 6", lambda c: moe_layer(*c, k=6)),
        ("got 0", lambda c: moe_layer(*c, k=0)),
        ("NaN or infinite", lambda c: moe_layer(c.x * math.nan, *c[1:], k=2)),
        ("capacity must be", lambda c: moe_layer(*c, k=2, capacity=0)),
        ("'softmax' or 'sigmoid'", lambda c: moe_layer(*c, k=2, score="relu")),
        ("bias must be", lambda c: moe_layer(*c, k=2, bias=c.x[0])),
        ("shared", lambda c: moe_layer(*c, k=2, shared=(c.x, c.x))),
        ("float32 or wider", lambda c: route(c.x.half(), 2)),
        ("capacity must lie", lambda c: expert_choice_layer(*c, capacity=8)),
        ("factor must be positive", lambda c: capacity_of(10, 4, 2, -1.0)),
    ],
)  # fmt: skip
def test_bad_input_is_refused(said, call):
    with pytest.raises(BadInput, match=said):
        call(layer(7, 6, 4, 5))
