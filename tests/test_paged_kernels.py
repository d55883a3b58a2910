"""The Triton kernels of paged attention: right when interpreted and on a GPU, fit to compile.

Everything a right kernel never reads is hostile here: slots past a sequence's end and blocks of
nobody hold NaN, table entries past the last block name a block outside the pool (see cases.py),
and memory nobody wrote reads as NaN (conftest).
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import aot

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.launch import merge_warps
from llmopt_lab.paged_attention import kernels
from llmopt_lab.paged_attention.cases import decode_inputs, decode_oracle
from llmopt_lab.paged_attention.kernels import (
    MAX_SPAN,
    MAX_SPLITS,
    MAX_TABLE,
    Plan,
    choose_plan,
    choose_span,
    paged_attention_decode,
    write_kv,
)

SHAPES = [  # lengths, n_heads, n_kv_heads, d_head, block_size
    ([17, 0, 100, 1, 16], 4, 2, 64, 16),
    ([33, 7], 9, 3, 64, 1),
    ([130, 64], 8, 1, 128, 7),
    ([300], 2, 2, 64, 256),
    ([1, 95, 96, 97], 3, 3, 128, 48),
    ([0], 2, 1, 128, 16),
    ([200], 20, 1, 64, 3),  # a group of more than 16 query heads
]


def inputs(shape, **kw):
    lengths, n_heads, n_kv_heads, d_head, block_size = shape
    sizes = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_head": d_head}
    return decode_inputs(lengths, **sizes, block_size=block_size, **kw)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_equals_torchs_attention(shape):
    args = inputs(shape)
    assert_close(paged_attention_decode(*args), decode_oracle(*args))


def test_decode_takes_the_scale_it_is_given():
    q, *rest = inputs(SHAPES[0])
    assert_close(paged_attention_decode(q, *rest, scale=0.5), decode_oracle(q * 0.5 * 8, *rest))


def test_decode_reads_strided_queries_and_layers_of_a_larger_cache():
    q, k, v, tables, lengths = inputs(SHAPES[0])
    want = decode_oracle(q, k, v, tables, lengths)
    wide_q = torch.full((*q.shape[:2], 2, q.shape[2]), torch.nan)
    wide_q[:, :, 1] = q
    caches = torch.full((3, 2, *k.shape), torch.nan)
    caches[1, 0], caches[1, 1] = k, v
    padded = torch.full((tables.shape[0], tables.shape[1] + 5), 1 << 30, dtype=torch.int32)
    padded[:, : tables.shape[1]] = tables
    got = paged_attention_decode(
        wide_q[:, :, 1], caches[1, 0], caches[1, 1], padded[:, : tables.shape[1]], lengths
    )
    assert_close(got, want)


def test_an_empty_batch_gives_an_empty_result():
    q, k, v, tables, lengths = inputs(SHAPES[0])
    out = paged_attention_decode(q[:0], k, v, tables[:0], lengths[:0])
    assert out.shape == (0, 4, 64)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 80), min_size=1, max_size=3),
    group=st.integers(1, 5),
    n_kv_heads=st.integers(1, 2),
    block_size=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_decode_equals_torchs_attention_on_random_shapes(
    lengths, group, n_kv_heads, block_size, seed
):
    shape = (lengths, group * n_kv_heads, n_kv_heads, 64, block_size)
    args = inputs(shape, seed=seed)
    assert_close(paged_attention_decode(*args), decode_oracle(*args))


@given(n=st.integers(1, 5000), capacity=st.integers(0, 200_000), tile=st.sampled_from([32, 64]))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_spans_are_whole_tiles_and_bounded_in_number(n, capacity, tile):
    span = choose_span(n, capacity, tile)
    assert span % tile == 0 and span > 0
    assert -(-capacity // span) <= MAX_SPLITS
    assert span <= max(MAX_SPAN, capacity // MAX_SPLITS + tile)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_wave_equals_torchs_attention(shape, monkeypatch):
    q, k, v, tables, lengths = inputs(shape)
    table = 1 << max(tables.shape[1] - 1, 0).bit_length()
    plan = Plan(32, 4, 2, -(-tables.shape[1] * k.shape[1] // 32) * 32, table)
    monkeypatch.setattr(kernels, "choose_plan", lambda *args: plan)
    args = q, k, v, tables, lengths
    assert_close(paged_attention_decode(*args), decode_oracle(*args))


def h100(monkeypatch, capability=(9, 0)):
    facts = SimpleNamespace(n_sms=132, capability=capability)
    monkeypatch.setattr(kernels, "gpu_facts", lambda: facts)


def test_a_hopper_full_of_sequences_walks_them_in_one_wave(monkeypatch):
    h100(monkeypatch)
    plan = choose_plan(128, 128, 16, torch.bfloat16)
    assert plan == Plan(64, 4, 4, 2048, 128)
    split = [
        choose_plan(64, 128, 16, torch.bfloat16),  # half of the GPU would idle
        choose_plan(133, 128, 16, torch.bfloat16),  # one sequence would wait for a second wave
        choose_plan(128, 129, 16, torch.bfloat16),  # a long one would keep the others waiting
        choose_plan(128, 2 * MAX_TABLE, 1, torch.bfloat16),  # too many entries to keep
        choose_plan(128, 128, 16, torch.float32),
    ]
    h100(monkeypatch, (8, 0))
    split.append(choose_plan(128, 128, 16, torch.bfloat16))
    assert all(plan.table == 0 and plan.span < 2048 for plan in split)


def test_written_tokens_land_in_their_slots_and_nowhere_else():
    rng = torch.Generator().manual_seed(0)
    k_cache, v_cache = torch.full((2, 5, 3, 2, 24), torch.nan)
    keys, values = torch.randn(2, 4, 2, 24, generator=rng)
    write_kv(keys, values, k_cache, v_cache, torch.tensor([14, -1, 0, 4]))
    for cache, new in ((k_cache, keys), (v_cache, values)):
        want = torch.full((15, 2, 24), torch.nan)
        want[[14, 0, 4]] = new[[0, 2, 3]]
        torch.testing.assert_close(cache.flatten(0, 1), want, rtol=0, atol=0, equal_nan=True)


def test_writing_reads_strided_keys():
    keys, values = torch.randn(2, 3, 2, 16).unbind(1)[0:2]  # (2, 2, 16) each, strided
    k_cache, v_cache = torch.zeros(2, 4, 1, 2, 16)
    write_kv(keys, values, k_cache, v_cache, torch.tensor([3, 1]))
    assert torch.equal(k_cache[[3, 1], 0], keys) and torch.equal(v_cache[[3, 1], 0], values)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x[0], r"q must be \(batch, n_heads, d_head\)"),
        ("q", lambda x: x[..., :32], "d_head must be 64 or 128; got 32"),
        ("q", lambda x: x[:, :3], "n_heads must be a multiple of n_kv_heads; got 3 and 2"),
        ("q", lambda x: x.double(), "k_cache must be torch.float64"),
        ("q", lambda x: x.bfloat16(), "k_cache must be torch.bfloat16"),
        ("v_cache", lambda x: x[:-1], "k_cache and v_cache must both be"),
        ("block_tables", lambda x: x.long(), "block_tables must be int32"),
        ("block_tables", lambda x: x[:-1], "block_tables must have 2 dimension"),
        ("block_tables", lambda x: x + 100, "block_tables names a block outside the pool"),
        ("block_tables", lambda x: x[:, :1], "a sequence of 100 tokens does not fit"),
        ("block_tables", lambda x: x.T.contiguous().T, "rows of block_tables must be contiguous"),
        ("lengths", lambda x: x.float(), "lengths must be int32"),
        ("lengths", lambda x: -x, "lengths must not be negative; got -100"),
        ("scale", lambda x: float("nan"), "scale must be a finite number; got nan"),
        ("scale", lambda x: float("inf"), "scale must be a finite number; got inf"),
    ],
)
def test_bad_input_is_refused(name, change, message):
    names = ("q", "k_cache", "v_cache", "block_tables", "lengths")
    arguments = dict(zip(names, inputs(SHAPES[0]), strict=True), scale=None)
    arguments[name] = change(arguments[name])
    with pytest.raises(BadInput, match=message):
        paged_attention_decode(**arguments)


def test_bfloat16_is_refused_by_the_interpreter():
    args = inputs(SHAPES[0])
    q, k, v = (x.bfloat16() for x in args[:3])
    with pytest.raises(BadInput, match="bfloat16 needs a GPU"):
        paged_attention_decode(q, k, v, *args[3:])


def test_a_slot_past_the_end_is_refused():
    cache = torch.zeros(2, 3, 1, 4)
    new = torch.zeros(1, 1, 4)
    with pytest.raises(BadInput, match="slot 6 does not exist: the cache has slots 0 to 5"):
        write_kv(new, new, cache, cache.clone(), torch.tensor([6]))


# --- compiled for GPUs that are not here

STRIDES = {
    name: "i64"
    for name in (
        "q_seq", "q_head", "k_block", "k_slot", "k_head", "v_block", "v_slot", "v_head",
        "table_seq", "k_token", "v_token", "k_cache_head", "v_cache_head",
    )
}  # fmt: skip
MODULE = "llmopt_lab.paged_attention.kernels"


def decode_spec(target: str, dtype: str, d_head: int, n_splits: int, *, table: int = 0) -> dict:
    tile, n_warps = (32, 8) if dtype == "fp32" else (64, 4)
    part = "fp32" if n_splits > 1 else dtype
    pdl = target in ("sm_90", "sm_100")
    return {
        "kernel": f"{MODULE}:_decode_kernel",
        "target": target,
        "signature": STRIDES
        | {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "v_ptr": f"*{dtype}"}
        | {"table_ptr": "*i32", "length_ptr": "*i32", "out_ptr": f"*{part}", "lse_ptr": f"*{part}"}
        | {"scale_log2": "fp32", "span": "i32", "max_blocks": "i32"},
        "constexprs": {
            "N_SPLITS": n_splits, "BLOCK_SIZE": 16, "GROUP": 4, "ROWS": 16, "D": d_head,
            "TILE": tile, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
            "STAGES": 4 if table else 2, "TABLE": table, "PDL": pdl,
        },
        "aligned": [name for name in STRIDES if name[:2] in ("q_", "k_", "v_")],
        "options": {"num_warps": n_warps} | ({"launch_pdl": True} if pdl else {}),
    }  # fmt: skip


def merge_spec(target: str, splits: int) -> dict:
    pdl = target in ("sm_90", "sm_100")
    return {
        "kernel": f"{MODULE}:_merge_kernel",
        "target": target,
        "signature": {
            "part_ptr": "*fp32", "lse_ptr": "*fp32", "length_ptr": "*i32", "out_ptr": "*fp16",
            "span": "i32",
        },
        "constexprs": {"N_SPLITS": splits - 1, "SPLITS": splits, "D": 128, "PDL": pdl},
        "options": {"num_warps": merge_warps(splits, 128)} | ({"launch_pdl": True} if pdl else {}),
    }  # fmt: skip


def write_spec(target: str) -> dict:
    pointers = ("k_ptr", "v_ptr", "k_cache_ptr", "v_cache_ptr")
    return {
        "kernel": f"{MODULE}:_write_kernel",
        "target": target,
        "signature": STRIDES | dict.fromkeys(pointers, "*fp16") | {"slots_ptr": "*i64"},
        "constexprs": {"BLOCK_SIZE": 16, "N_HEADS": 8, "D": 128, "HEADS": 8, "DIMS": 128},
    }


def specs_of(target: str) -> list[dict]:
    dtypes = ["fp16", "fp32"] if target == "sm_75" else ["fp16", "bf16", "fp32"]
    decodes = [
        decode_spec(target, dtype, d_head, n_splits)
        for dtype in dtypes
        for d_head, n_splits in ((64, 1), (128, 8))
    ]
    merges = [merge_spec(target, splits) for splits in (4, 64, MAX_SPLITS)]
    if target in ("sm_90", "sm_100"):
        decodes += [decode_spec(target, "bf16", d_head, 1, table=MAX_TABLE) for d_head in (64, 128)]
    return [*decodes, *merges, write_spec(target)]


@pytest.mark.parametrize("target", aot.TARGETS)
def test_kernels_compile_and_fit_the_chip(target):
    specs = specs_of(target)
    for spec, facts in zip(specs, aot.compile_ahead(specs), strict=True):
        what = f"{spec['kernel']} {spec['constexprs']}"
        assert facts["shared"] <= aot.TARGETS[target][3], f"{what}: shared memory {facts['shared']}"
        if target == "sm_90":
            assert facts["spills"] == 0, f"{what} spills {facts['spills']} bytes"


# --- on a GPU

GPU_SHAPES = [
    *SHAPES,
    ([17, 0, 100, 1, 513, 4096], 32, 8, 128, 16),
    ([300, 20_000], 2, 2, 64, 256),
    ([130, 64, 4097], 8, 1, 128, 7),
    ([131_072], 32, 8, 128, 16),
    ([5] * 200, 8, 8, 64, 16),
    ([2048] * 14 + [0, 5], 32, 8, 128, 16),  # one wave of an H100
    ([1, 2048, 700] * 21, 14, 2, 64, 16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=lambda s: f"{len(s[0])}x{max(s[0])}-{s[1:]}")
def test_decode_equals_torchs_attention_on_a_gpu(shape, dtype):
    args = inputs(shape, dtype=dtype, device="cuda")
    assert_close(paged_attention_decode(*args), decode_oracle(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decode_equals_torchs_attention_on_a_gpu_on_random_shapes(dtype):
    rng = torch.Generator().manual_seed(0)
    pick = lambda low, high: int(torch.randint(low, high, (1,), generator=rng))  # noqa: E731
    for seed in range(60):
        lengths = [pick(0, 3000) for _ in range(pick(1, 40))]
        n_kv_heads = pick(1, 9)
        d_head = (64, 128)[pick(0, 2)]
        shape = (lengths, n_kv_heads * pick(1, 9), n_kv_heads, d_head, pick(1, 257))
        args = inputs(shape, dtype=dtype, device="cuda", seed=seed)
        assert_close(paged_attention_decode(*args), decode_oracle(*args), str(shape))


@pytest.mark.gpu
def test_index_arithmetic_is_64_bit():
    block_size, n_kv_heads, d_head = 16, 8, 128
    n_blocks = (1 << 31) // (block_size * n_kv_heads * d_head) + 8  # elements past 2^31
    rng = torch.Generator("cuda").manual_seed(0)
    shape = (n_blocks, block_size, n_kv_heads, d_head)
    k, v = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    tables = torch.tensor([[n_blocks - 1, 0, n_blocks - 2]], dtype=torch.int32, device="cuda")
    slots = (tables[0].long()[:, None] * block_size + torch.arange(16, device="cuda")).flatten()
    new = torch.randn(2, 48, n_kv_heads, d_head, generator=rng, device="cuda").bfloat16()
    write_kv(*new, k, v, slots)
    q = torch.randn(1, 32, d_head, generator=rng, device="cuda").bfloat16()
    lengths = torch.tensor([41], dtype=torch.int32, device="cuda")
    assert_close(
        paged_attention_decode(q, k, v, tables, lengths), decode_oracle(q, k, v, tables, lengths)
    )


@pytest.mark.gpu
def test_two_runs_give_the_same_bits():
    args = inputs(GPU_SHAPES[7], dtype=torch.bfloat16, device="cuda")
    assert torch.equal(paged_attention_decode(*args), paged_attention_decode(*args))
