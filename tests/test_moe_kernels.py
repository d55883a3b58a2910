"""The Triton kernels of mixture of experts, interpreted.

The oracle is a dense loop in float64: every expert on every token, then the shares; its gradients
are autograd's. Memory nobody wrote reads as NaN (conftest), and inputs lie in the middle of NaN.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from llmopt_lab.core.bench import load_results
from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.moe import few_token_kernels, kernels, measure, route_kernels, tiles
from llmopt_lab.moe.cases import CASES
from llmopt_lab.moe.kernels import moe_layer_triton
from llmopt_lab.moe.route_kernels import route
from llmopt_lab.moe.tiles import Sizes, Tiles

SHAPES = [  # n_tokens, d, n_experts, d_ff, k
    (37, 40, 5, 36, 2),
    (40, 33, 3, 17, 1),  # one expert a token keeps its probability
    (70, 16, 16, 16, 3),  # whole tiles in both widths
    (5, 24, 9, 20, 4),  # more experts than tokens
    (1, 48, 4, 50, 2),
    (16, 64, 4, 64, 4),  # every expert sees every token
    (20, 7, 1, 3, 1),  # one expert, widths below a tile
    (33, 8, 20, 8, 16),
]


def inputs(shape, *, dtype=torch.float32, device="cpu", seed=0, clear=1e-3):
    """x, router, w_gate_up and w_down with gradients wanted, in the middle of NaN.

    Tokens whose k-th and next logits are closer than `clear` are drawn again: in float32 and
    float64 they could visit different experts.
    """
    n_tokens, d, n_experts, d_ff, k = shape
    rng = torch.Generator(device).manual_seed(seed)

    def draw(*size, scale=1.0):
        room = torch.full((size[0] + 2, *size[1:]), torch.nan, dtype=dtype, device=device)
        x = torch.randn(size, generator=rng, device=device) * scale
        return room[1:-1].copy_(x)

    router = draw(d, n_experts, scale=2 * d**-0.5)
    w_gate_up = draw(n_experts, d, 2 * d_ff, scale=d**-0.5)
    w_down = draw(n_experts, d_ff, d, scale=d_ff**-0.5)
    x = draw(n_tokens, d)
    while k < n_experts and n_tokens:
        logits = (x.double() @ router.double()).sort(dim=-1, descending=True).values
        close = logits[:, k - 1] - logits[:, k] < clear
        if not close.any():
            break
        x[close] = draw(int(close.sum()), d)
    return [tensor.requires_grad_() for tensor in (x, router, w_gate_up, w_down)]


def oracle(x, router, w_gate_up, w_down, k):
    """Every expert on every token, in the precision of the arguments."""
    probabilities = (x @ router).softmax(-1)
    best, order = probabilities.sort(dim=-1, descending=True, stable=True)
    weights, experts = best[:, :k], order[:, :k]
    if k > 1:
        weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for e in range(router.shape[1]):
        share = torch.where(experts == e, weights, 0).sum(-1, keepdim=True)
        gate, up = (x @ w_gate_up[e]).chunk(2, -1)
        out = out + share * ((gate * gate.sigmoid() * up) @ w_down[e])
    return out


def check_forward_and_backward(*args, k, what=""):
    out = moe_layer_triton(*args, k=k)
    wide = [x.detach().double().requires_grad_() for x in args]
    want = oracle(*wide, k)
    assert_close(out, want, f"out {what}")
    rng = torch.Generator(out.device).manual_seed(1)
    # small, so that sums over many tokens stay near 1, for which the table is made
    scale = 4 * max(1, len(out) / 10) ** 0.5
    d_out = torch.randn(out.shape, generator=rng, device=out.device, dtype=out.dtype) / scale
    got = torch.autograd.grad(out, args, d_out)
    wanted = torch.autograd.grad(want, wide, d_out.double())
    names = ("d_x", "d_router", "d_w_gate_up", "d_w_down")
    for name, g, w in zip(names, got, wanted, strict=True):
        assert_close(g, w, f"{name} {what}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients_equal_a_dense_loop(shape):
    check_forward_and_backward(*inputs(shape), k=shape[-1])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    n_tokens=st.integers(1, 40),
    d=st.integers(1, 40),
    n_experts=st.integers(1, 8),
    d_ff=st.integers(1, 40),
    data=st.data(),
    seed=st.integers(0, 99),
)
def test_results_and_gradients_equal_a_dense_loop_on_random_shapes(
    n_tokens, d, n_experts, d_ff, data, seed
):
    k = data.draw(st.integers(1, min(4, n_experts)))
    shape = (n_tokens, d, n_experts, d_ff, k)
    check_forward_and_backward(*inputs(shape, seed=seed), k=k, what=f"{shape}")


ROOMS = (tiles, route_kernels, few_token_kernels, kernels)  # where kernels are launched


def patch(monkeypatch, name, value):
    """In every module of the kernels that has the name."""
    for room in ROOMS:
        if hasattr(room, name):
            monkeypatch.setattr(room, name, value)


def check_forward(*args, k, what=""):
    """Without gradients: for few tokens another path."""
    args = [x.detach() for x in args]
    got = moe_layer_triton(*args, k=k)
    assert_close(got, oracle(*(x.double() for x in args), k), what)


FEW_SHAPES = [  # n_tokens, d, n_experts, d_ff, k
    (1, 48, 4, 50, 2),
    (2, 33, 9, 17, 4),
    (3, 40, 5, 36, 2),  # experts that two tokens visit
    (4, 24, 3, 20, 3),  # every token visits every expert
    (4, 40, 20, 36, 1),
    (1, 16, 1, 3, 1),
    (2, 8, 256, 4, 16),
]


@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_few_tokens_give_what_a_dense_loop_gives(shape):
    assert few_token_kernels.supports(Sizes(*shape))
    for seed in range(2):
        check_forward(*inputs(shape, seed=seed), k=shape[-1], what=f"seed {seed}")


def test_a_layer_without_gradients_gives_what_a_dense_loop_gives():
    for shape in SHAPES[:4]:
        check_forward(*inputs(shape), k=shape[-1], what=f"{shape}")


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        (16, Tiles(16, 32, 64, 4, 1)),
        (32, Tiles(32, 16, 32, 4, 2)),
        (64, Tiles(64, 64, 16, 4, 3)),
        (16, Tiles(16, 32, 16, 4, 2, tma=True)),
        (64, Tiles(64, 16, 32, 4, 2, tma=True)),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(50, 40, 4, 36, 2), (6, 24, 9, 20, 3)], ids=str)
def test_any_tiles_give_the_same_result(rows, chosen, shape, monkeypatch):
    patch(monkeypatch, "choose_rows", lambda *_: rows)
    patch(monkeypatch, "choose_tiles", lambda *_: chosen)
    check_forward_and_backward(*inputs(shape), k=shape[-1])
    check_forward(*inputs((3, *shape[1:])), k=shape[-1])


@pytest.mark.parametrize("splits", [1, 4])
def test_a_sum_in_parts_gives_the_same_result(splits, monkeypatch):
    patch(monkeypatch, "splits_for", lambda *_: splits)
    for shape in ((3, 24, 9, 70, 4), (40, 24, 3, 20, 1)):  # the second has parts without a step
        check_forward_and_backward(*inputs(shape), k=shape[-1])
    check_forward(*inputs((3, 24, 9, 70, 4)), k=4)


@pytest.mark.parametrize("n_tokens", [4, 50])
def test_all_tokens_may_visit_the_same_experts(n_tokens):
    x, router, w_gate_up, w_down = inputs((n_tokens, 24, 7, 20, 2))
    with torch.no_grad():
        x[:, 0] = 1.0
        router[0] = torch.tensor([0.0, 0, 21, 0, 0, 20, 0])
    check_forward(x, router, w_gate_up, w_down, k=2)
    check_forward_and_backward(x, router, w_gate_up, w_down, k=2)
    grads = torch.autograd.grad(moe_layer_triton(x, router, w_gate_up, w_down, k=2).sum(), w_down)
    idle = [e for e in range(7) if e not in (2, 5)]
    assert not grads[0][idle].any() and grads[0][[2, 5]].any()


@pytest.mark.parametrize("n_tokens", [4, 50])
def test_all_tokens_may_visit_one_expert(n_tokens):
    x, router, w_gate_up, w_down = inputs((n_tokens, 24, 7, 20, 1))
    with torch.no_grad():
        x[:, 0] = 1.0
        router *= 0.3  # a probability of nearly 1 would leave the router's gradient to rounding
        router[0] = torch.tensor([0.0, 0, 0, 0, 0, 4, 0])
        assert ((x @ router).argmax(1) == 5).all()
    check_forward(x, router, w_gate_up, w_down, k=1)
    check_forward_and_backward(x, router, w_gate_up, w_down, k=1)
    grads = torch.autograd.grad(moe_layer_triton(x, router, w_gate_up, w_down, k=1).sum(), w_down)
    assert not grads[0][[0, 1, 2, 3, 4, 6]].any() and grads[0][5].any()


@pytest.mark.parametrize("k", [1, 2, 5])
def test_of_equal_logits_the_lower_expert_wins(k):
    x, router, w_gate_up, w_down = inputs((20, 24, 6, 20, k), clear=-1.0)
    with torch.no_grad():
        router[:] = router[:, :1]
    check_forward(x, router, w_gate_up, w_down, k=k)
    check_forward(x[:3], router, w_gate_up, w_down, k=k)
    routed = route(x.detach(), router.detach(), Sizes(20, 24, 6, 20, k), False)
    assert torch.equal(routed.experts, torch.arange(k, dtype=torch.int32).expand(20, k))
    assert_close(routed.weights, torch.full((20, k), 1 / 6 if k == 1 else 1 / k))


def check_grouping(shape):
    """Visits by expert and then by token, and row tiles that cover each expert once."""
    x, router, *_ = (t.detach() for t in inputs(shape))
    n_tokens, _, n_experts, _, k = shape
    sizes = Sizes(*shape)
    routed = route(x, router, sizes, False)
    best = (x.double() @ router.double()).sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(routed.experts.long(), best[:, :k])
    order = routed.experts.flatten().argsort(stable=True)
    assert torch.equal(routed.visits.long(), order)
    counts = torch.stack([(routed.experts == e).sum() for e in range(n_experts)])
    ends = counts.cumsum(0)
    assert torch.equal(routed.starts[1:].long(), ends) and routed.starts[0] == 0
    rows = tiles.choose_rows(sizes, x.dtype)
    want = [
        (e, first)
        for e in range(n_experts)
        for first in range(int(ends[e] - counts[e]), int(ends[e]), rows)
    ]
    n_used = int(routed.n_used)
    got = zip(routed.tile_expert.tolist(), routed.tile_first.tolist(), strict=True)
    assert list(got)[:n_used] == want
    assert n_used <= len(routed.tile_expert)


@pytest.mark.parametrize(
    "shape",
    [(1, 8, 3, 4, 1), (16, 8, 3, 4, 2), (17, 8, 3, 4, 3), (150, 8, 7, 4, 2), (90, 8, 256, 4, 16)],
    ids=str,
)
def test_visits_are_sorted_by_expert_and_then_by_token(shape):
    check_grouping(shape)


def test_the_scan_takes_more_token_tiles_than_it_reads_at_a_time(monkeypatch):
    monkeypatch.setattr(route_kernels, "SCAN", 32)
    check_grouping((100, 8, 5, 4, 2))


def test_no_tokens_give_an_empty_result_and_zero_gradients():
    args = inputs((0, 24, 4, 20, 2))
    out = moe_layer_triton(*args, k=2)
    assert out.shape == (0, 24)
    grads = torch.autograd.grad(out.sum(), args)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, args, strict=True))


def test_a_nan_stays_with_its_token():
    x, router, w_gate_up, w_down = (t.detach() for t in inputs((20, 24, 6, 20, 2)))
    want = oracle(*(t.double() for t in (x, router, w_gate_up, w_down)), 2)
    x[3, 5] = torch.nan
    got = moe_layer_triton(x, router, w_gate_up, w_down, k=2)
    others = [t for t in range(20) if t != 3]
    assert got[3].isnan().all()
    assert_close(got[others], want[others])
    got = moe_layer_triton(x[1:5], router, w_gate_up, w_down, k=2)
    assert got[2].isnan().all()
    assert_close(got[[0, 1, 3]], want[[1, 2, 4]])


def test_two_runs_give_the_same_bits():
    def run():
        args = inputs(SHAPES[0])
        out = moe_layer_triton(*args, k=2)
        few = moe_layer_triton(args[0][:3].detach(), *(w.detach() for w in args[1:]), k=2)
        return few, out, *torch.autograd.grad(out.square().sum(), args)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_only_the_gradients_that_are_wanted_cost_memory():
    args = inputs(SHAPES[0])
    with torch.no_grad():
        assert moe_layer_triton(*args, k=2).grad_fn is None
    x = args[0]
    for tensor in args[1:]:
        tensor.requires_grad_(False)
    (d_x,) = torch.autograd.grad(moe_layer_triton(*args, k=2).sum(), x)
    wide = [t.detach().double() for t in args]
    wide[0].requires_grad_()
    assert_close(d_x, torch.autograd.grad(oracle(*wide, 2).sum(), wide[0])[0])


def test_strided_tokens_and_an_expanded_gradient_are_read_right():
    x, *weights = inputs((20, 24, 6, 20, 2))
    odd = x.detach().T.contiguous().T.requires_grad_()
    out = moe_layer_triton(odd, *weights, k=2)
    (got,) = torch.autograd.grad(out.sum(), odd)
    wide = [t.detach().double().requires_grad_() for t in (x, *weights)]
    assert_close(got, torch.autograd.grad(oracle(*wide, 2).sum(), wide[0])[0])


def test_the_gradient_has_no_gradient_and_says_so():
    args = inputs(SHAPES[0])
    (grad,) = torch.autograd.grad(
        moe_layer_triton(*args, k=2).square().sum(), args[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="moe_layer_backward"):
        grad.sum().backward()


class OutcomeAsked(AssertionError):
    """An operator gave the host a value, or a shape, that depends on what a tensor holds."""


class NoAnswersToTheHost(TorchDispatchMode):
    """Refuses every operator that must wait for the device before the host can go on."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        if waits & set(func.tags):
            raise OutcomeAsked(str(func))
        return func(*args, **(kwargs or {}))


def without_running(monkeypatch):
    """Launches do nothing: the interpreter, unlike a GPU, must read what tensors hold."""

    class Launch:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    for room in ROOMS:
        for name in dir(room):
            if name.endswith("_kernel"):
                monkeypatch.setattr(room, name, Launch())


@pytest.mark.parametrize("n_tokens", [3, 50])
def test_the_host_asks_the_device_nothing(n_tokens, monkeypatch):
    args = [t.detach() for t in inputs((n_tokens, 24, 6, 20, 2))]
    with pytest.raises(OutcomeAsked), NoAnswersToTheHost():
        args[0].sum().item()
    with pytest.raises(OutcomeAsked), NoAnswersToTheHost():
        args[0].nonzero()
    without_running(monkeypatch)
    d_out = torch.ones(n_tokens, 24)
    with NoAnswersToTheHost():  # the operators' insides: of an operator the mode sees the outside
        kernels._layer(*args, 2, False)
        _, gate_up, *routed = kernels._layer(*args, 2, True)
        kernels._layer_backward(d_out, *args, gate_up, routed, 2)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda x: x[0], r"x must be \(n_tokens, d\); got \(40,\)"),
        ("router", lambda x: x[:-1], r"router must be \(d, n_experts\) with d 40 .*got \(39, 5\)"),
        ("router", lambda x: x[:, :0], "1 to 256 experts"),
        ("router", lambda x: x[:, :1].expand(40, 257), "1 to 256 experts"),
        ("w_down", lambda x: x[1:], r"w_down must be .* with 5 experts and d 40; got \(4"),
        ("w_down", lambda x: x[:, :, 1:], r"w_down must be .*got \(5, 36, 39\)"),
        ("w_gate_up", lambda x: x[:, :, 1:], r"\(5, 40, 72\) beside this w_down; got \(5"),
        ("w_gate_up", lambda x: x.mT.contiguous().mT, "w_gate_up must be contiguous; got strides"),
        ("w_down", lambda x: x.mT.contiguous().mT, "w_down must be contiguous; got strides"),
        ("k", lambda x: 0, "k must be 1 to 5, the experts there are, at most 16; got 0"),
        ("k", lambda x: 6, "k must be 1 to 5, the experts there are, at most 16; got 6"),
        ("x", lambda x: x.double(), "must be float32, float16 or bfloat16; got torch.float64"),
        ("x", lambda x: x.half(), "router must be torch.float16 on cpu like x; got torch.float32"),
        ("w_down", lambda x: x.half(), "w_down must be torch.float32 on cpu like x"),
    ],
)
def test_bad_input_is_refused(name, change, message):
    names = ("x", "router", "w_gate_up", "w_down")
    arguments = dict(zip(names, (t.detach() for t in inputs(SHAPES[0])), strict=True), k=2)
    arguments[name] = change(arguments[name])
    with pytest.raises(BadInput, match=message):
        moe_layer_triton(**arguments)


def test_torchs_own_checks_of_the_operators_pass():
    shape = (5, 8, 3, 6, 2)
    args = inputs(shape)
    torch.library.opcheck(torch.ops.llmopt_lab.moe_layer, (*args, 2, True))
    args = [t.detach() for t in args]
    for n in (5, 4):
        few = args[0][:n].clone()
        torch.library.opcheck(torch.ops.llmopt_lab.moe_layer, (few, *args[1:], 2, False))
    _, gate_up, *routed = kernels._layer(*args, 2, True)
    d_out = torch.ones(5, 8)
    torch.library.opcheck(
        torch.ops.llmopt_lab.moe_layer_backward, (d_out, *args, gate_up, routed, 2)
    )


def test_the_benchmarks_contenders_and_its_oracle_equal_a_dense_loop():
    for case in CASES:
        (size,) = case.cpu_sizes
        *args, k = case.inputs("cpu", **size)
        want = oracle(*(t.double() for t in args), k)
        assert_close(case.oracle(*args, k), want, "oracle")
        ran = []
        for contender in case.contenders:
            try:
                call = contender.prepare(*args, k)
            except ImportError:
                continue
            assert_close(call(), want, contender.name)
            ran.append(contender.name)
        assert {"ours", "torch._grouped_mm", "loop over experts"} <= set(ran)


def test_the_benchmarks_floor_counts_the_experts_touched():
    size = {"n_tokens": 3, "n_experts": 16, "d": 32, "d_ff": 8, "k": 2}
    x, router, *_ = CASES[1].inputs("cpu", **size)
    touched = len((x @ router).topk(2).indices.unique())
    assert touched < 7
    want = 2 * (touched * 3 * 32 * 8 + 32 * 16 + 2 * 3 * 32)
    assert CASES[1].min_bytes(**size) == want


def check_compiled(device, **options):
    x, *weights = inputs((20, 24, 6, 20, 2), device=device)
    layer = lambda x, *weights: moe_layer_triton(x.tanh(), *weights, k=2).cos()  # noqa: E731
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, **options)
    for n in (20, 13):
        some = [x.detach()[:n].requires_grad_(), *weights]
        grads = torch.autograd.grad(compiled(*some).sum(), some)
        wide = [t.detach().double().requires_grad_() for t in some]
        want = torch.autograd.grad(oracle(wide[0].tanh(), *wide[1:], 2).cos().sum(), wide)
        for grad, w in zip(grads, want, strict=True):
            assert_close(grad, w)


def test_a_compiled_function_has_no_graph_break_and_the_same_gradients():
    check_compiled("cpu", backend="aot_eager")


def test_bfloat16_is_refused_by_the_interpreter():
    args = [x.detach().bfloat16() for x in inputs(SHAPES[0])]
    with pytest.raises(BadInput, match="bfloat16 needs a GPU"):
        moe_layer_triton(*args, k=2)


def test_the_recorded_h200_results_meet_what_the_chapter_asks_but_for_two_rows():
    """Those two are short of 0.8 of the bytes' time, and lesson 3 says so.

    Beside `torch._grouped_mm` compiled, prefill is level at Mixtral's shape and ahead at Qwen3's.
    """
    (recorded,) = load_results("moe")
    prefill, decode = (case["rows"] for case in recorded["cases"])
    assert len(prefill) == 2 and len(decode) == 8
    for row in prefill:
        times = {name: r.get("median_ms") for name, r in row["results"].items()}
        assert times["torch._grouped_mm"] >= 1.05 * times["ours"], row["size"]
        level = row["size"]["n_experts"] == 8
        least = 1.0 - 0.01 if level else 1.05
        assert times["torch._grouped_mm, compiled"] >= least * times["ours"], row["size"]
    short = {
        (row["size"]["n_experts"], row["size"]["n_tokens"])
        for row in decode
        if row["results"]["ours"]["gb_s"] < 0.8 * recorded["roofline"]["read_gb_s"]
    }
    assert short == {(128, 1), (128, 4)}


# --- on a GPU

GPU_SHAPES = [  # n_tokens, d, n_experts, d_ff, k
    (37, 40, 5, 36, 2),
    (1, 256, 8, 512, 2),
    (7, 128, 128, 96, 8),
    (64, 512, 8, 320, 2),
    (150, 72, 7, 56, 1),  # several row tiles
    (700, 192, 4, 264, 2),  # full tiles, ragged widths
    (515, 64, 3, 24, 1),
    (2000, 256, 16, 136, 4),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_results_and_gradients_equal_a_dense_loop_on_a_gpu_ragged(shape, dtype):
    check_forward_and_backward(*inputs(shape, dtype=dtype, device="cuda"), k=shape[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [*FEW_SHAPES, (4, 512, 128, 96, 8)], ids=str)
def test_few_tokens_on_a_gpu_give_what_a_dense_loop_gives_twice_the_same_bits(shape, dtype):
    args = [x.detach() for x in inputs(shape, dtype=dtype, device="cuda")]
    check_forward(*args, k=shape[-1])
    first = moe_layer_triton(*args, k=shape[-1])
    for _ in range(20):  # whoever is last adds
        assert torch.equal(moe_layer_triton(*args, k=shape[-1]), first)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("n_tokens", [0, 3, 40, 900])
def test_empty_and_one_sided_routings_on_a_gpu_ragged(n_tokens, k):
    """All tokens visit experts 2 and 5, or 2 alone; the others get nobody and a zero gradient."""
    args = inputs((n_tokens, 128, 7, 72, k), dtype=torch.bfloat16, device="cuda", clear=-1.0)
    with torch.no_grad():
        args[0][:, 0] = 1.0
        if k == 1:  # a probability of nearly 1 would leave the router's gradient to rounding
            args[1].mul_(0.3)
        args[1][0] = torch.tensor([0.0, 0, 24, 0, 0, 22, 0] if k == 2 else [0.0, 0, 4, 0, 0, 0, 0])
        chosen = (args[0].double() @ args[1].double()).topk(k).indices.sort(1).values
        assert (chosen == torch.tensor([2, 5][:k], device="cuda")).all()
    check_forward_and_backward(*args, k=k)
    check_forward(*args, k=k)
    grad = torch.autograd.grad(moe_layer_triton(*args, k=k).sum(), args[3])[0]
    assert not grad[[0, 1, 3, 4, 6]].any() and (k == 2 or not grad[5].any())


@pytest.mark.gpu
@pytest.mark.parametrize("n_tokens", [5, 900])
def test_the_host_never_waits_for_the_gpu(n_tokens):
    args = inputs((n_tokens, 128, 8, 64, 2), dtype=torch.bfloat16, device="cuda")

    def run():
        out = moe_layer_triton(*args, k=2)
        return torch.autograd.grad(out, args, torch.ones_like(out))

    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            args[0].sum().item()
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("n_tokens", [4, 600])
def test_a_cuda_graph_replays_it_on_other_routings(n_tokens):
    args = [
        t.detach() for t in inputs((n_tokens, 128, 8, 64, 2), dtype=torch.bfloat16, device="cuda")
    ]
    moe_layer_triton(*args, k=2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe_layer_triton(*args, k=2)
    for seed in (1, 2):
        shape = (n_tokens, 128, 8, 64, 2)
        others = inputs(shape, dtype=torch.bfloat16, device="cuda", seed=seed)
        with torch.no_grad():
            for mine, other in zip(args, others, strict=True):
                mine.copy_(other)
        graph.replay()
        assert_close(out, oracle(*(t.double() for t in args), 2), f"seed {seed}")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(5, 128, 9, 72, 3), (900, 128, 7, 72, 2)], ids=str)
def test_two_runs_on_a_gpu_give_the_same_bits(shape):
    def run():
        args = inputs(shape, dtype=torch.bfloat16, device="cuda")
        out = moe_layer_triton(*args, k=shape[-1])
        return out, *torch.autograd.grad(out.square().sum(), args)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.gpu
def test_what_is_measured_of_training_and_decoding_has_all_that_lesson_3_prints():
    size = {"n_tokens": 64, "n_experts": 4, "d": 128, "d_ff": 64, "k": 2}
    row = measure.training_step(size)
    assert max(row["gradients_differ"].values()) < 0.02
    for times in row["results"].values():
        assert len(times["forward"]["samples_ms"]) == len(times["forward + backward"]["samples_ms"])
    names = measure.decode_kernels(size | {"n_tokens": 1})
    assert set(names) == {"_logits_kernel", "_gate_up_kernel", "_project_kernel"}
    assert min(names.values()) > 0


@pytest.mark.gpu
def test_a_compiled_function_on_a_gpu_has_no_graph_break_and_the_same_gradients():
    check_compiled("cuda")
