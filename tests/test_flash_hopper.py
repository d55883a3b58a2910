"""The Hopper kernel: compiled here for sm_90, run where there is one."""

import aot
import pytest
import torch
from hypothesis import given, settings
from test_flash_kernels import (
    RANDOM_CASES,
    check_forward_and_backward,
    check_random_case,
    inputs,
    inputs_without_grad,
    oracle,
)

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.device import gpu_facts
from llmopt_lab.core.hopper import tile_layout
from llmopt_lab.flash_attention import hopper
from llmopt_lab.flash_attention.kernels import flash_attention_triton, forward_into

PLANS = [
    pytest.param(64, hopper.PLANS[64], id="d64"),
    pytest.param(128, hopper.PLANS[128], id="d128"),
    pytest.param(
        128, hopper.Plan(128, 2, 2, 240, overlap=False, persistent=False), id="first-rung"
    ),
    pytest.param(128, hopper.Plan(128, 2, 2, 240, turns=True), id="turns"),
]
SHAPES = [  # batch, n_heads, n_kv_heads, n_q, n_k, causal
    (1, 1, 1, 128, 128, True),
    (2, 4, 2, 100, 77, False),
    (1, 6, 2, 300, 515, True),
    (2, 3, 1, 515, 130, True),  # 385 rows see no key
    (1, 2, 2, 1, 1000, True),
    (3, 2, 2, 64, 2000, False),
    (40, 8, 2, 257, 300, True),  # more work than multiprocessors
]


def test_it_compiles_for_hopper_without_spills_and_fits():
    specs = []
    for d_head, plan in [(p.values[0], p.values[1]) for p in PLANS]:
        for causal in (False, True):
            constants = hopper.constants(plan, d_head, causal)
            tile = tile_layout(64, d_head, torch.bfloat16)
            keys = tile_layout(plan.tile_k, d_head, torch.bfloat16)
            signature = {name: "i32" for name in hopper._forward_kernel.arg_names}
            signature |= {name: "constexpr" for name in constants}
            signature |= {"lse_ptr": "*fp32", "counter_ptr": "*i32", "scale_log2": "fp32"}
            for name in ("q_desc", "out_desc"):
                signature[name] = f"tensordesc<bf16[1, 1, 64, {d_head}],{tile!r}>"
            for name in ("k_desc", "v_desc"):
                signature[name] = f"tensordesc<bf16[1, 1, {plan.tile_k}, {d_head}],{keys!r}>"
            specs.append(
                {
                    "kernel": "llmopt_lab.flash_attention.hopper:_forward_kernel",
                    "target": "sm_90",
                    "signature": signature,
                    "constexprs": constants,
                    "options": {"num_warps": 4, "maxnreg": hopper.MAX_REGISTERS[plan.groups]},
                }
            )
    for spec, facts in zip(specs, aot.compile_ahead(specs), strict=True):
        assert facts["spills"] == 0, (spec["constexprs"], facts)
        assert facts["shared"] <= aot.TARGETS["sm_90"][3], (spec["constexprs"], facts)


def test_without_a_hopper_gpu_it_is_not_chosen():
    q, k, v = inputs_without_grad((1, 2, 1, 8, 8, 64))
    assert not hopper.supports(q, k, v, torch.empty_like(q))


def needs_hopper():
    if gpu_facts().capability != (9, 0):
        pytest.skip("needs an sm_90 GPU")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d_head", "plan"), PLANS)
def test_results_equal_torchs_in_float64(d_head, plan, dtype):
    needs_hopper()
    for *sizes, causal in SHAPES:
        q, k, v = inputs_without_grad((*sizes, d_head), dtype=dtype, device="cuda")
        out = torch.full_like(q, torch.nan)
        lse = torch.full(q.shape[:3], torch.nan, device="cuda")
        hopper.forward(q, k, v, out, lse, causal=causal, scale=d_head**-0.5, plan=plan)
        want, want_lse = oracle(q, k, v, causal=causal)
        assert_close(out, want, f"out {sizes}")
        assert_close(lse, want_lse, f"lse {sizes}")


@pytest.mark.gpu
@pytest.mark.parametrize("d_head", [64, 128])
def test_the_launcher_chooses_it_and_reads_any_layout(d_head):
    needs_hopper()
    q, k, v = inputs_without_grad((2, 6, 2, 333, 400, d_head), dtype=torch.bfloat16, device="cuda")
    spread = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    out, lse = flash_attention_triton(*spread, causal=True, return_lse=True)
    assert hopper.supports(*spread, out)
    want, want_lse = oracle(q, k, v, causal=True)
    assert_close(out, want, "out")
    assert_close(lse, want_lse, "lse")
    assert out.stride() == spread[0].stride()


def is_taken(q, k, v) -> bool:
    """Whether `flash_attention_triton` takes the Hopper kernel."""
    return hopper.supports(q, k, v, torch.empty_like(q))


@pytest.mark.gpu
@pytest.mark.parametrize("d_head", [64, 128])
def test_one_ragged_shape_through_the_launcher(d_head):
    needs_hopper()
    q, k, v = inputs((2, 4, 2, 131, 203, d_head), dtype=torch.bfloat16, device="cuda")
    assert is_taken(q, k, v)
    check_forward_and_backward(q, k, v, causal=True, saved=True)


@pytest.mark.gpu
@settings(max_examples=80, deadline=None, derandomize=True)
@given(RANDOM_CASES)
def test_the_launcher_gives_torchs_results_and_gradients_on_random_shapes(case):
    needs_hopper()
    check_random_case(case, accepts=is_taken)


@pytest.mark.gpu
def test_it_writes_no_row_past_the_end_and_the_same_bits_twice():
    needs_hopper()
    q, k, v = inputs_without_grad((1, 2, 1, 130, 200, 128), dtype=torch.bfloat16, device="cuda")
    results = []
    for _ in range(2):
        room = torch.full((1, 2, 256, 128), 7.0, dtype=q.dtype, device="cuda")
        lse = torch.empty(1, 2, 130, device="cuda")
        hopper.forward(q, k, v, room[:, :, :130], lse, causal=True, scale=0.1)
        assert bool((room[:, :, 130:] == 7).all())
        results.append((room.clone(), lse))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.gpu
def test_the_triton_kernel_gives_what_it_gives():
    needs_hopper()
    q, k, v = inputs_without_grad((2, 4, 2, 500, 700, 128), dtype=torch.bfloat16, device="cuda")
    out, lse = flash_attention_triton(q, k, v, causal=True, return_lse=True)
    other, other_lse = torch.empty_like(out), torch.empty_like(lse)
    forward_into(other, other_lse, q, k, v, causal=True, scale=128**-0.5)
    want, want_lse = oracle(q, k, v, causal=True)
    assert_close(other, want, "out")
    assert_close(other_lse, want_lse, "lse")
