"""The fused linear and KL in Triton: right when interpreted and on a GPU, fit to compile.

The oracle is torch's kl_div of all the logits in float64, its gradients by autograd. Memory nobody
wrote reads as NaN (conftest), and what the mask leaves out is NaN.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import aot

from llmopt_lab.core.bench import load_results
from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.distillation import kernels
from llmopt_lab.distillation.cases import CASES
from llmopt_lab.distillation.kernels import Tiles, choose_chunk, kl_rows, linear_kl_triton

# rows past the end of the vocabulary are -inf - -inf on lanes that are then left out
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

SHAPES = [  # n_tokens, d, n_vocab, d_teacher (0: logits), chunk
    (7, 5, 37, 0, None),
    (13, 16, 50, 7, 4),
    (9, 4, 70, 0, 3),
    (1, 1, 1, 0, None),
    (3, 8, 16, 8, 1),
    (6, 3, 129, 0, 6),
]


def inputs(shape, *, dtype=torch.float32, device="cpu", masked=False, seed=0):
    """Arguments of linear_kl_triton; where masked, NaN in the teacher of a token that is left out.

    Sizes are such that the gradients of a sum over tokens are near 1, where the table's tolerances
    hold.
    """
    n, d, n_vocab, d_teacher, chunk = shape
    rng = torch.Generator(device).manual_seed(seed)

    def random(rows, cols, size):
        x = torch.randn(rows, cols, generator=rng, device=device)
        return (size * x).to(dtype)

    given = {
        "hidden": random(n, d, 1.0).requires_grad_(),
        "weight": random(n_vocab, d, 3 / d**0.5).requires_grad_(),
        "teacher": random(n, d_teacher or n_vocab, 1.0 if d_teacher else 3.0),
        "teacher_weight": random(n_vocab, d_teacher, 3 / d_teacher**0.5) if d_teacher else None,
        "chunk": chunk,
    }
    if masked:
        given["mask"] = torch.arange(n, device=device) % 3 != 1
        given["teacher"][~given["mask"]] = torch.nan
    return given


class Rounded(torch.autograd.Function):
    """x to a dtype and back; on the way back its gradient, in units of `unit`, too."""

    @staticmethod
    def forward(ctx, x, dtype, unit):
        ctx.dtype, ctx.unit = dtype, unit
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, d_x):
        return (d_x / ctx.unit).to(ctx.dtype).to(d_x.dtype) * ctx.unit, None, None


def oracle(
    hidden, weight, teacher, teacher_weight=None, temperature=1.0, mask=None, chunk=None,
    rounded=None, times=1.0,
):  # fmt: skip
    """`times` the loss in float64, on all the logits.

    `rounded`: the dtype of the buffer that holds the logits and then the difference q - p. In
    bfloat16 a logit of 10 is off by up to 0.03, over a temperature of 1/2 by 0.06, and so is its
    probability, whatever the loss does with it; where weights nearly cancel, the difference shows.
    """
    counts = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    counts = counts if mask is None else mask
    z_t = teacher[counts].double()
    z_t = z_t if teacher_weight is None else z_t @ teacher_weight.double().T
    z_s = hidden[counts].double() @ weight.double().T
    if rounded:
        z_t = z_t.to(rounded).double()
        z_s = Rounded.apply(z_s, rounded, times * temperature / counts.sum())
    return times * temperature**2 * F.kl_div(
        F.log_softmax(z_s / temperature, -1), F.log_softmax(z_t / temperature, -1),
        log_target=True, reduction="sum",
    ) / counts.sum()  # fmt: skip


def check(given, *, temperature=1.0, what=""):
    """Loss and the gradients of n times the loss, against the oracle.

    Over T, which T^2 leaves in them, the gradients are near 1, for which the table's atol is made.
    """
    n = len(given["hidden"]) / max(1, temperature)
    loss = linear_kl_triton(**given, temperature=temperature)
    got = torch.autograd.grad(n * loss, (given["hidden"], given["weight"]))
    wide = [given[name].detach().double().requires_grad_() for name in ("hidden", "weight")]
    rest = {k: v for k, v in given.items() if k not in ("hidden", "weight")} | {
        "temperature": temperature, "rounded": given["hidden"].dtype, "times": n
    }  # fmt: skip
    want_loss = oracle(*wide, **rest)
    want = torch.autograd.grad(want_loss, wide)
    # as exact as the logits, whose dtype is that of the hidden states
    assert_close(loss.detach().to(given["hidden"].dtype), want_loss / n, f"loss {what}")
    for name, g, w in zip(("d_hidden", "d_weight"), got, want, strict=True):
        assert_close(g, w, f"{name} {what}")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_equal_torchs(shape, masked):
    for temperature in (1.0, 2.5):
        check(inputs(shape, masked=masked), temperature=temperature)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 9),
    d=st.integers(1, 9),
    n_vocab=st.integers(1, 60),
    d_teacher=st.integers(0, 5),
    chunk=st.integers(1, 9),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    masked=st.booleans(),
)
def test_loss_and_gradients_equal_torchs_on_random_shapes(
    n, d, n_vocab, d_teacher, chunk, temperature, masked
):
    given = inputs((n, d, n_vocab, d_teacher, chunk), masked=masked)
    check(given, temperature=temperature)


@pytest.mark.parametrize("tile", [16, 64])
def test_any_tile_gives_the_same_rows(tile):
    rng = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(5, 50, generator=rng) for _ in range(2))
    q, p = (x.double().softmax(-1) for x in (student, teacher))
    loss = torch.empty(5)
    kl_rows(student, teacher, loss, tiles=Tiles(tile, 4))
    assert_close(student, q - p)
    assert_close(loss, (p * (p / q).log()).sum(-1))


def test_large_logits_whose_maximum_comes_late_do_not_overflow():
    student, teacher = torch.zeros(2, 40), torch.zeros(2, 40)
    student[0, 39], teacher[0, 38] = 3000.0, 2000.0
    student[1, 0] = -3000.0
    want = (student.double().softmax(-1) - teacher.double().softmax(-1)).clone()
    rows = F.kl_div(
        student.double().log_softmax(-1), teacher.double().log_softmax(-1),
        log_target=True, reduction="none",
    ).sum(-1)  # fmt: skip
    loss = torch.empty(2)
    kl_rows(student, teacher, loss)
    assert_close(student, want)
    assert_close(loss, rows)


def test_a_token_that_the_teacher_rules_out_is_no_nan():
    student, teacher = torch.zeros(1, 40), torch.zeros(1, 40)
    teacher[0, :20] = -torch.inf  # a whole tile of it comes first
    loss = torch.empty(1)
    kl_rows(student, teacher, loss)
    assert_close(loss, torch.tensor([math.log(2)]))
    want = torch.full((1, 40), 1 / 40)
    want[0, 20:] -= 1 / 20
    assert_close(student, want)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_oracle_rounded_to_float64_is_the_oracle(shape, masked):
    given = inputs(shape, masked=masked)
    wide = [given.pop(name).detach().double().requires_grad_() for name in ("hidden", "weight")]
    plain = oracle(*wide, **given, temperature=2.0)
    rounded = oracle(*wide, **given, temperature=2.0, rounded=torch.float64)
    for a, b in zip(
        torch.autograd.grad(plain, wide), torch.autograd.grad(rounded, wide), strict=True
    ):
        assert_close(a, b)


def test_many_chunks_do_not_round_the_weights_gradient_away():
    given = inputs((80, 1, 3, 0, 1), dtype=torch.float16)
    given["hidden"] = torch.ones_like(given["hidden"]).requires_grad_()  # all add up
    given["teacher"] = given["teacher"][:1].expand(80, 3)
    check(given)


def test_rows_may_lie_apart():
    given = inputs((7, 5, 37, 0, None))
    wide = torch.full((7, 60), torch.nan)
    wide[:, 11:48] = given["teacher"]
    check(given | {"teacher": wide[:, 11:48]})


def test_the_teachers_logits_stay_as_they_are():
    given = inputs(SHAPES[0])
    before = given["teacher"].clone()
    linear_kl_triton(**given)
    assert torch.equal(given["teacher"], before)


def test_what_comes_from_above_scales_the_gradients_and_a_second_backward_is_refused():
    given = inputs(SHAPES[0])
    loss = linear_kl_triton(**given)
    (once,) = torch.autograd.grad(loss, given["hidden"], retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * linear_kl_triton(**given), given["hidden"])
    assert_close(thrice, 3 * once.double())
    with pytest.raises(BadInput, match="goes backward once"):
        torch.autograd.grad(loss, given["hidden"])


def test_only_the_gradient_that_is_wanted_is_made():
    given = inputs(SHAPES[0])
    given["weight"] = given["weight"].detach()
    linear_kl_triton(**given).backward()
    assert given["hidden"].grad is not None
    given = inputs(SHAPES[0])
    given["hidden"] = given["hidden"].detach()
    linear_kl_triton(**given).backward()
    assert given["weight"].grad is not None


def test_two_runs_give_the_same_bits():
    def run():
        given = inputs(SHAPES[1], masked=True)
        loss = linear_kl_triton(**given)
        return loss, *torch.autograd.grad(loss, (given["hidden"], given["weight"]))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_chunks_are_equal_whole_tiles_and_within_the_budget():
    chunk = choose_chunk(8192, 49152, 2, False)
    assert chunk % 128 == 0 and chunk * 49152 * 2 <= kernels.CHUNK_BYTES + 128 * 49152 * 2
    assert choose_chunk(8192, 49152, 2, True) < chunk
    assert choose_chunk(5, 100, 4, False) == 128  # no more rows are made than there are tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(7, 6)}, r"hidden must be \(n_tokens, d\) and weight"),
        ({"hidden": torch.zeros(1, 7, 5)}, "hidden must be"),
        ({"hidden": torch.zeros(0, 5), "teacher": torch.zeros(0, 37)}, "must not be empty"),
        ({"teacher": torch.zeros(7, 36)}, r"teacher must be logits of shape \(7, 37\)"),
        ({"teacher_weight": torch.zeros(36, 4)}, "one vocabulary for both models"),
        ({"hidden": torch.zeros(7, 5).double()}, "must be float32, float16 or bfloat16"),
        ({"weight": torch.zeros(37, 5).half()}, "weight must be torch.float32 on cpu like hidden"),
        ({"teacher": torch.zeros(37, 7).T}, "must be contiguous"),
        ({"mask": torch.ones(6, dtype=torch.bool)}, r"mask must be bool of shape \(7,\)"),
        ({"mask": torch.ones(7)}, r"mask must be bool of shape \(7,\)"),
        ({"temperature": 0.0}, "temperature must be a positive finite number"),
        ({"chunk": 0}, "chunk must be positive"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(BadInput, match=message):
        linear_kl_triton(**(inputs(SHAPES[0]) | change))


def test_bfloat16_is_refused_by_the_interpreter():
    given = inputs(SHAPES[0])
    with pytest.raises(BadInput, match="bfloat16 needs a GPU"):
        linear_kl_triton(**(given | {"teacher": given["teacher"].bfloat16()}))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_the_benchmarks_contenders_agree_with_its_oracle(case):
    given = case.inputs("cpu", **case.cpu_sizes[0])
    want = case.oracle(*given)
    agreed = 0
    for contender in case.contenders:
        try:
            call = contender.prepare(*given)
        except ImportError:  # Liger, and what is compiled, need a GPU
            continue
        got = torch.cat([x.flatten() for x in call()])
        assert_close(got, want, contender.name)
        assert torch.equal(torch.cat([x.flatten() for x in call()]), got)
        agreed += 1
    assert agreed == 2


# --- compiled for GPUs that are not here


def spec(target: str, dtype: str) -> dict:
    tile, n_warps, n_stages = kernels.tiles_for(49152)
    return {
        "kernel": "llmopt_lab.distillation.kernels:_kl_rows_kernel",
        "target": target,
        "signature": {
            "student_ptr": f"*{dtype}", "teacher_ptr": f"*{dtype}", "mask_ptr": "*i1",
            "loss_ptr": "*fp32", "student_row": "i32", "teacher_row": "i32",
            "n_vocab": "i32", "scale_log2": "fp32",
        },
        "constexprs": {"MASKED": True, "TILE": tile, "WIDTH": 8, "STAGES": n_stages},
        "options": {"num_warps": n_warps},
        "aligned": ("student_row", "teacher_row", "n_vocab"),
    }  # fmt: skip


def test_the_row_kernel_compiles_for_every_gpu_and_fits():
    pairs = [(t, d) for t in aot.TARGETS for d in ("fp16", "bf16", "fp32")]
    pairs = [(t, d) for t, d in pairs if t != "sm_75" or d == "fp16"]
    for (target, dtype), facts in zip(
        pairs, aot.compile_ahead([spec(*pair) for pair in pairs]), strict=True
    ):
        assert facts["shared"] <= aot.TARGETS[target][3], (target, dtype)
        assert target != "sm_90" or facts["spills"] == 0, dtype


def test_the_recorded_h200_results_meet_what_the_chapter_says():
    (recorded,) = load_results("distillation")
    rows = {case["title"].partition("from ")[2]: case["rows"] for case in recorded["cases"]}
    row = rows["the teacher's logits"][0]
    assert row["size"] == {"n_tokens": 8192, "d_model": 2048, "n_vocab": 49152}
    ours, liger, naive = (
        row["results"][name] for name in ("ours", "Liger, p ready", "materialised")
    )
    assert ours["median_ms"] <= liger["median_ms"]
    assert ours["extra_bytes"] <= 0.82e9
    assert naive["median_ms"] >= 2.3 * ours["median_ms"]
    assert len(rows["the teacher's hidden states"]) == 1


# --- on a GPU

GPU_SHAPES = [
    (300, 64, 1000, 0, None),
    (257, 72, 5003, 0, 100),
    (129, 64, 777, 48, 50),
    (1, 16, 16, 0, None),
    (520, 128, 49152, 256, 256),
    (64, 32, 128256, 0, None),
]


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_on_a_gpu_loss_and_gradients_equal_torchs_ragged(shape, dtype, masked):
    given = inputs(shape, dtype=dtype, device="cuda", masked=masked)
    check(given, temperature=2.0, what=str(dtype))


@pytest.mark.gpu
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 300),
    d=st.integers(1, 100),
    n_vocab=st.integers(1, 20_000),
    chunk=st.integers(1, 300),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    masked=st.booleans(),
)
def test_on_a_gpu_random_shapes_equal_torchs(n, d, n_vocab, chunk, temperature, masked):
    given = inputs((n, d, n_vocab, 0, chunk), dtype=torch.bfloat16, device="cuda", masked=masked)
    check(given, temperature=temperature)


@pytest.mark.gpu
def test_on_a_gpu_small_gradients_survive_half_precision():
    """Divided by the number of tokens before the products, they would be below float16's range."""
    given = inputs((4096, 64, 2048, 0, 512), dtype=torch.float16, device="cuda")
    loss = 65536 * linear_kl_triton(**given)  # as a loss scaler does
    got = torch.autograd.grad(loss, (given["hidden"], given["weight"]))
    wide = [given[name].detach().double().requires_grad_() for name in ("hidden", "weight")]
    want = torch.autograd.grad(65536 * oracle(*wide, given["teacher"]), wide)
    for g, w in zip(got, want, strict=True):
        assert ((g.double() - w).norm() / w.norm()) < 2e-3


@pytest.mark.gpu
def test_on_a_gpu_all_the_logits_are_never_in_memory():
    n, n_vocab = 8192, 49152
    given = inputs((n, 256, n_vocab, 256, None), dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_kl_triton(**given).backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < kernels.CHUNK_BYTES + 2**27 < 2 * n * n_vocab
