"""The Hopper kernel of sparse attention: compiled here for sm_90, run where there is one."""

import aot
import pytest
import torch
from test_sparse_kernels import inputs, lse_oracle

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.device import gpu_facts
from llmopt_lab.core.hopper import tile_layout
from llmopt_lab.sparse_attention import hopper
from llmopt_lab.sparse_attention.block_lists import grids, lists_of
from llmopt_lab.sparse_attention.cases import Sizes, attention_oracle
from llmopt_lab.sparse_attention.kernels import sparse_attention_triton, walk_of
from llmopt_lab.sparse_attention.patterns import Causal, Full, SlidingWindow, streaming

VARIANTS = [(False, False), (False, True), (True, False), (True, True)]  # listed, sinks
SHAPES = [  # n_q, n_k, batch, n_heads, n_kv_heads
    (128, 128, 1, 1, 1),
    (100, 77, 2, 4, 2),
    (300, 515, 1, 6, 2),
    (515, 130, 2, 3, 1),  # the first 385 tokens precede every key
    (1, 1000, 1, 2, 2),
    (257, 300, 20, 8, 2),  # more work than multiprocessors
]
PATTERNS = [Full(), Causal(), SlidingWindow(1), SlidingWindow(200), streaming(140, 4),
            SlidingWindow(90, causal=False), streaming(64, 200)]  # fmt: skip


def test_it_compiles_for_hopper_without_spills_and_fits():
    specs = []
    for d_head, plan in hopper.PLANS.items():
        for listed, sinks in VARIANTS:
            constants = hopper.constants(plan, d_head, listed=listed, sinks=sinks)
            tile = tile_layout(64, d_head, torch.bfloat16)
            keys = tile_layout(plan.tile_k, d_head, torch.bfloat16)
            signature = {name: "i32" for name in hopper._forward_kernel.arg_names}
            signature |= {name: "constexpr" for name in constants}
            signature |= {"lse_ptr": "*fp32", "scale_log2": "fp32"}
            pointers = ("counter_ptr", "blocks_ptr", "n_full_ptr", "n_live_ptr")
            signature |= dict.fromkeys(pointers, "*i32")
            for name in ("q_desc", "out_desc"):
                signature[name] = f"tensordesc<bf16[1, 1, 64, {d_head}],{tile!r}>"
            for name in ("k_desc", "v_desc"):
                signature[name] = f"tensordesc<bf16[1, 1, {plan.tile_k}, {d_head}],{keys!r}>"
            specs.append(
                {
                    "kernel": "llmopt_lab.sparse_attention.hopper:_forward_kernel",
                    "target": "sm_90",
                    "signature": signature,
                    "constexprs": constants,
                    "options": {"num_warps": 4, "maxnreg": hopper.MAX_REGISTERS},
                }
            )
    for spec, facts in zip(specs, aot.compile_ahead(specs), strict=True):
        assert facts["spills"] == 0, (spec["constexprs"], facts)
        assert facts["shared"] <= aot.TARGETS["sm_90"][3], (spec["constexprs"], facts)


def test_without_a_hopper_gpu_it_is_not_chosen():
    q, k, v = inputs(Sizes(8, 8, 64, 64))
    assert not hopper.supports(q, k, v, torch.empty_like(q), walk_of(q, k, Causal()))


def needs_hopper():
    if gpu_facts().capability != (9, 0):
        pytest.skip("needs an sm_90 GPU")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d_head", [64, 128])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_windows_and_sinks_equal_torchs_in_float64(pattern, d_head, dtype):
    needs_hopper()
    for n_q, n_k, *heads in SHAPES:
        q, k, v = inputs(Sizes(n_q, n_k, d_head, d_head, *heads), dtype=dtype, device="cuda")
        spread = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        mask = pattern.mask(n_q, n_k, device="cuda")
        want, want_lse = attention_oracle(q, k, v, mask), lse_oracle(q, k, mask)
        for x in ((q, k, v), spread):
            assert hopper.supports(*x, x[0], walk_of(x[0], x[1], pattern))
            out, lse = sparse_attention_triton(*x, pattern, return_lse=True)
            assert_close(out, want, f"out {n_q, n_k}")
            assert_close(lse, want_lse, f"lse {n_q, n_k}")
            assert out.stride() == x[0].stride()


@pytest.mark.gpu
@pytest.mark.parametrize("d_head", [64, 128])
@pytest.mark.parametrize("pattern", [Full(), SlidingWindow(600), streaming(200, 4)], ids=str)
def test_listed_blocks_equal_torchs_in_float64(pattern, d_head):
    needs_hopper()
    for n_q, n_k, batch, n_heads, n_kv_heads in SHAPES:
        sizes = Sizes(n_q, n_k, d_head, d_head, batch, n_heads, n_kv_heads)
        q, k, v = inputs(sizes, dtype=torch.bfloat16, device="cuda")
        some, every = grids(pattern, n_q, n_k, 128, 128, "cuda")
        rng = torch.Generator("cuda").manual_seed(n_q)
        shape = (batch, n_kv_heads, *some.shape)
        live = some & (torch.rand(shape, generator=rng, device="cuda") < 0.6)
        lists = lists_of(live, every.expand_as(live), n_q, n_k, 128, 128)
        token = live.repeat_interleave(128, -2)[..., :n_q, :].repeat_interleave(128, -1)
        mask = token[..., :n_k] & pattern.mask(n_q, n_k, device="cuda")
        mask = mask.repeat_interleave(n_heads // n_kv_heads, 1)
        assert hopper.supports(q, k, v, q, walk_of(q, k, pattern, lists))
        out, lse = sparse_attention_triton(q, k, v, pattern, lists=lists, return_lse=True)
        assert_close(out, attention_oracle(q, k, v, mask), f"out {sizes}")
        assert_close(lse, lse_oracle(q, k, mask), f"lse {sizes}")


@pytest.mark.gpu
def test_it_writes_no_row_past_the_end_and_the_same_bits_twice():
    needs_hopper()
    q, k, v = inputs(Sizes(130, 200, 128, 128, 1, 2, 1), dtype=torch.bfloat16, device="cuda")
    walk = walk_of(q, k, streaming(50, 4))
    results = []
    for _ in range(2):
        room = torch.full((1, 2, 256, 128), 7.0, dtype=q.dtype, device="cuda")
        lse = torch.empty(1, 2, 130, device="cuda")
        hopper.forward(q, k, v, room[:, :, :130], lse, walk=walk, lists=None, scale=0.1)
        assert bool((room[:, :, 130:] == 7).all())
        results.append((room.clone(), lse))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
