"""Verification attention and the rejection sampler: interpreted, compiled ahead, and on a GPU.

The attention's oracle is torch's over gathered keys; everything a right kernel never reads is
hostile (cases.py). The sampler's is float64: its chances, its verdicts replayed from the same
draws, and the probability of every outcome, listed, against counted outcomes.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import aot
import triton
import triton.language as tl

from llmopt_lab.core.bench import load_results
from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.launch import merge_warps
from llmopt_lab.speculative_decoding import kernels
from llmopt_lab.speculative_decoding.cases import sampler_inputs, tree_masks, verify_inputs
from llmopt_lab.speculative_decoding.kernels import (
    MAX_SPAN,
    MAX_SPLITS,
    choose_chunk,
    choose_plan,
    choose_span,
    pack_tree,
    rejection_sample,
    verify_attention,
)
from llmopt_lab.speculative_decoding.peers import attention_oracle, chances_oracle, torch_sampler

SHAPES = [  # lengths, n_new, n_heads, n_kv_heads, d_head, block_size
    ([17, 0, 100, 5, 16], 5, 4, 2, 64, 16),
    ([33, 7], 1, 9, 3, 64, 1),
    ([130, 64, 8], 8, 8, 1, 128, 7),  # two tiles of rows
    ([300], 3, 2, 2, 64, 256),
    ([2, 65], 2, 3, 3, 128, 48),  # the last split holds one new token, which the other cannot see
    ([64, 70], 64, 3, 3, 64, 16),
]


def inputs(shape, **kw):
    lengths, n_new, n_heads, n_kv_heads, d_head, block_size = shape
    sizes = {"n_new": n_new, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_head": d_head}
    return verify_inputs(lengths, **sizes, block_size=block_size, **kw)


def check(shape, tree, **kw):
    args = inputs(shape, **kw)
    mask = tree_masks(len(shape[0]), shape[1], seed=1).to(args[0].device) if tree else None
    got = verify_attention(*args, tree=None if mask is None else pack_tree(mask))
    assert_close(got, attention_oracle(*args, mask), f"{shape}, tree {tree}")


# Attention


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_verification_equals_torchs_attention(shape, tree):
    check(shape, tree)


def test_verification_takes_strided_queries_and_a_scale():
    q, *rest = inputs(SHAPES[0])
    heads_first = torch.full((5, 4, 5, 64), torch.nan)
    heads_first[:] = q.transpose(1, 2)
    got = verify_attention(heads_first.transpose(1, 2), *rest, scale=0.5)
    assert_close(got, attention_oracle(q * 0.5 * 8, *rest, None))


def test_a_chain_is_the_tree_of_one_branch():
    args = inputs(SHAPES[0])
    chain = torch.ones(5, 5, dtype=torch.bool).tril().expand(5, 5, 5)
    assert torch.equal(verify_attention(*args), verify_attention(*args, tree=pack_tree(chain)))


def test_a_mask_is_packed_bit_by_bit():
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[3, [0, 2]] = True
    mask[5, 63] = True
    words = pack_tree(mask)
    assert words.shape == (64,) and words.sum() == 5 - (1 << 63)
    assert words[3] == 5 and words[5] == -(1 << 63)
    for bad in (torch.zeros(65, 65, dtype=torch.bool), torch.zeros(2, 2), torch.zeros(2, 3) > 0):
        with pytest.raises(BadInput):
            pack_tree(bad)


def test_spans_are_whole_tiles_and_bounded_in_number():
    for n, capacity, tile in itertools.product((1, 7, 300), (0, 1, 100, 4096, 700_000), (32, 64)):
        span = choose_span(n, capacity, tile, per_sm=4)
        assert span % tile == 0 and 0 < span <= max(MAX_SPAN, capacity // MAX_SPLITS + tile)
        assert -(-capacity // span) <= MAX_SPLITS


def test_the_programs_fill_whole_waves_of_an_h200(monkeypatch):
    facts = SimpleNamespace(n_sms=132, capability=(9, 0))
    monkeypatch.setattr(kernels, "gpu_facts", lambda: facts)
    for batch, n_rows in itertools.product((4, 8, 16, 32), (4, 20)):
        plan = choose_plan(8 * batch, n_rows, 4096, torch.bfloat16)
        per_sm = {16: 4, 32: 3}[plan.rows]
        waves = 8 * batch * -(-4096 // plan.span) / (per_sm * 132)
        assert waves <= 2 and waves % 1 > 0.85, (batch, n_rows, plan)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x[0], r"q must be \(batch, n_new, n_heads, d_head\)"),
        ("q", lambda x: x[..., :32], "d_head must be 64 or 128; got 32"),
        ("q", lambda x: x[:, :, :3], "n_heads must be a multiple of n_kv_heads; got 3 and 2"),
        ("q", lambda x: x.expand(13, 5, 5, 4, 64).flatten(0, 1)[:5].double(), "torch.float64"),
        ("q", lambda x: torch.zeros(5, 65, 4, 64), "n_new must be 1 to 64; got 65"),
        ("v_cache", lambda x: x[:-1], "k_cache and v_cache must both be"),
        ("block_tables", lambda x: x.long(), "block_tables must be torch.int32"),
        ("block_tables", lambda x: x[:-1], "block_tables must have 2 dimension"),
        ("block_tables", lambda x: x + 100, "block_tables names a block outside the pool"),
        ("block_tables", lambda x: x[:, :1], "a sequence of 100 tokens does not fit"),
        ("lengths", lambda x: x - 1, "must have its 5 new tokens, or none at all; got a length"),
        ("tree", lambda x: torch.ones(5, 4, dtype=torch.int64), r"tree must be \(5, 5\)"),
        ("tree", lambda x: torch.ones(5, 5), "tree must be torch.int64"),
        ("scale", lambda x: float("nan"), "scale must be a finite number; got nan"),
    ],
)
def test_bad_input_of_the_attention_is_refused(name, change, message):
    names = ("q", "k_cache", "v_cache", "block_tables", "lengths")
    arguments = dict(zip(names, inputs(SHAPES[0]), strict=True), scale=None, tree=None)
    arguments[name] = change(arguments[name])
    with pytest.raises(BadInput, match=message):
        verify_attention(**arguments)


def test_bfloat16_is_refused_by_the_interpreter():
    q, k, v, *rest = inputs(SHAPES[0])
    with pytest.raises(BadInput, match="bfloat16 needs a GPU"):
        verify_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), *rest)
    with pytest.raises(BadInput, match="bfloat16 needs a GPU"):
        rejection_sample(*sampler_inputs("cpu", batch=1, k=1, n_vocab=9, dtype=torch.bfloat16), 1)


# The sampler


@triton.jit
def _draws_kernel(out_ptr, seed):
    at = tl.program_id(0)
    tl.store(out_ptr + at, tl.rand(seed, at.to(tl.int64)))


def draws(batch: int, k: int, seed: int, device) -> torch.Tensor:
    """The sampler's draws, (batch, k + 2): one a guess, one for the chunk, one for the token."""
    out = torch.empty(batch, k + 2, device=device)
    _draws_kernel[(out.numel(),)](out, seed)
    return out.double()


def replay(p_logits, q_logits, guesses, seed, temperature=1.0, margin=1e-5):
    """(tokens, n_kept, sure) by the same draws in float64; `sure` where no draw is within `margin`
    of a verdict or of a token's border."""
    batch, k, n_vocab = q_logits.shape
    chunk, _ = choose_chunk(n_vocab)
    p = (p_logits.double() / temperature).softmax(-1)
    q = (q_logits.double() / temperature).softmax(-1)
    drawn = draws(batch, k, seed, p.device)
    tokens, kept, sure = torch.full((batch, k + 1), -1), [], []
    for b in range(batch):
        chance = (p[b, range(k), guesses[b]] / q[b, range(k), guesses[b]]).clamp_max(1)
        verdicts = (drawn[b, :k] < chance).tolist()
        n = verdicts.index(False) if False in verdicts else k
        w = p[b, n] if n == k else (p[b, n] - q[b, n]).clamp_min(0)
        mass = torch.nn.functional.pad(w, (0, -n_vocab % chunk)).view(-1, chunk)
        share = drawn[b, k] * mass.sum()
        at = int((mass.sum(1).cumsum(0) <= share).sum())
        borders = mass[at].cumsum(0)
        inside = drawn[b, k + 1] * borders[-1]
        tokens[b, :n] = guesses[b, :n]
        tokens[b, n] = at * chunk + int((borders <= inside).sum())
        near = (drawn[b, :k] - chance).abs()[: n + 1].min() < margin and chance.min() < 1
        near |= (mass.sum(1).cumsum(0) - share).abs().min() < margin * mass.sum()
        near |= (borders - inside).abs().min() < margin * borders[-1]
        kept.append(n)
        sure.append(not near)
    return tokens, torch.tensor(kept, dtype=torch.int32), torch.tensor(sure)


def check_sampler(args, seed, **settings):
    got = rejection_sample(*args, seed, **settings)
    tokens, n_kept, sure = replay(*args, seed, **settings)
    assert sure.float().mean() > 0.9
    assert torch.equal(got.n_kept.cpu()[sure], n_kept[sure])
    assert torch.equal(got.tokens.cpu()[sure], tokens[sure])
    scaled = [x.double() / settings.get("temperature", 1.0) for x in args[:2]]
    assert_close(got.chances, chances_oracle(*scaled, args[2]))
    return got


@pytest.mark.parametrize(
    ("batch", "k", "n_vocab"), [(8, 3, 200), (12, 1, 7), (2, 16, 100), (1, 5, 1)]
)
def test_the_sampler_does_what_float64_does_with_the_same_draws(batch, k, n_vocab):
    got = check_sampler(sampler_inputs("cpu", batch=batch, k=k, n_vocab=n_vocab), seed=11)
    if n_vocab > 1:
        assert 0 < got.n_kept.float().mean() < k  # some kept, some refused


def test_the_sampler_divides_by_the_temperature():
    check_sampler(sampler_inputs("cpu", batch=8, k=3, n_vocab=100), seed=5, temperature=0.6)


def test_the_sampler_takes_strided_logits():
    p, q, guesses = sampler_inputs("cpu", batch=4, k=3, n_vocab=50)
    wide = torch.full((4, 7, 60), torch.nan)
    wide[:, :4, :50], wide[:, 4:, :50] = p, q
    got = rejection_sample(wide[:, :4, :50], wide[:, 4:, :50], guesses, 3)
    want = rejection_sample(p, q, guesses, 3)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_same_seed_gives_the_same_draws_and_another_one_others():
    args = sampler_inputs("cpu", batch=6, k=4, n_vocab=50)
    first, again, other = (rejection_sample(*args, seed) for seed in (1, 1, (1 << 63) - 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.tokens, other.tokens)
    assert torch.equal(first.chances, other.chances)


def test_tokens_that_are_cut_off_are_never_drawn():
    p, q, guesses = sampler_inputs("cpu", batch=8, k=3, n_vocab=40)
    for logits in (p, q):  # top-k of 5 on both sides
        logits.masked_fill_(logits < logits.topk(5, -1).values[..., -1:], -torch.inf)
    guesses = q.argmax(-1)
    got = check_sampler((p, q, guesses), seed=2)
    for b, n in enumerate(got.n_kept.tolist()):
        places = torch.arange(n + 1)
        assert p[b, places, got.tokens[b, : n + 1]].isfinite().all()
        assert (got.tokens[b, n + 1 :] == -1).all()


def test_a_guess_that_the_target_excludes_is_refused_and_one_that_only_it_sees_replaces_it():
    p, q = torch.full((1, 2, 6), -torch.inf), torch.full((1, 1, 6), -torch.inf)
    p[0, :, 4], q[0, 0, 1] = 0.0, 0.0
    got = rejection_sample(p, q, torch.tensor([[1]]), 9)
    assert got.tokens.tolist() == [[4, -1]] and got.chances.tolist() == [[0.0]]


def test_where_both_agree_everything_is_kept():
    p, _, _ = sampler_inputs("cpu", batch=5, k=3, n_vocab=30)
    q = p[:, :3].clone()
    guesses = q.argmax(-1)
    got = rejection_sample(p, q, guesses, 4)
    assert got.n_kept.tolist() == [3] * 5 and torch.equal(got.tokens[:, :3], guesses)


# Its distribution. Outcomes are (kept, token after them); every probability is listed.


def outcomes_of(p: torch.Tensor, q: torch.Tensor, residual_of) -> dict[tuple, float]:
    """(k + 1, n_vocab) and (k, n_vocab), float64: the probability of every outcome."""
    k, n_vocab = q.shape
    found = {}
    for n in range(k + 1):
        last = p[n] if n == k else residual_of(p[n], q[n])
        for tokens in itertools.product(range(n_vocab), repeat=n + 1):
            kept = [float(torch.minimum(p[i], q[i])[tokens[i]]) for i in range(n)]
            found[tokens] = math.prod(kept) * float(last[tokens[n]])
    return found


def right_residual(p, q):
    return (p - q).clamp_min(0)


def resampled_from_p(p, q):
    return p * (1 - torch.minimum(p, q).sum())


def chi_square(counts: dict[tuple, int], wanted: dict[tuple, float]) -> float:
    """The chance of so large a chi-square if `wanted` is right; cells expected below 5 are one."""
    n = sum(counts.values())
    assert counts.keys() <= wanted.keys() and abs(sum(wanted.values()) - 1) < 1e-9
    cells, rest = [], [0.0, 0.0]
    for what, chance in wanted.items():
        cell = [counts.get(what, 0), n * chance]
        if cell[1] >= 5:
            cells.append(cell)
        else:
            rest = [a + b for a, b in zip(rest, cell, strict=True)]
    cells += [rest] if rest[1] > 0 else []
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def count_outcomes(p_logits, q_logits, n: int, seed: int) -> dict[tuple, int]:
    """n runs of the sampler on one place: guesses drawn from q, one row of the batch a run."""
    rng = torch.Generator(p_logits.device).manual_seed(seed)
    k, n_vocab = q_logits.shape
    q = q_logits.double().softmax(-1)
    guesses = torch.multinomial(q, n, replacement=True, generator=rng).T.contiguous()
    args = p_logits.expand(n, k + 1, n_vocab), q_logits.expand(n, k, n_vocab), guesses
    got = rejection_sample(*args, seed)
    rows, counts = torch.unique(got.tokens.cpu(), dim=0, return_counts=True)
    return {
        tuple(t for t in row if t >= 0): int(count)
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True)
    }


FALSE_ALARM = 1e-6  # of a right sampler, over the choice of the seed, which is fixed


def check_distribution(p_logits, q_logits, n: int) -> None:
    counts = count_outcomes(p_logits, q_logits, n, seed=6)
    p, q = (x.double().softmax(-1).cpu() for x in (p_logits, q_logits))
    assert chi_square(counts, outcomes_of(p, q, right_residual)) > FALSE_ALARM
    # and so many runs see the bias of drawing from p after a refusal
    assert chi_square(counts, outcomes_of(p, q, resampled_from_p)) < FALSE_ALARM


def test_every_outcome_comes_as_often_as_its_listed_probability():
    # few runs, because the interpreter is slow: so p and q are far apart
    p, q = torch.tensor([[0.5, 0.5], [0.3, 0.7]]), torch.tensor([[0.05, 0.95]])
    check_distribution(p.log(), q.log(), n=100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p_logits": torch.zeros(2, 1, 5)}, r"\(batch, k \+ 1, n_vocab\) with k >= 1"),
        ({"q_logits": torch.zeros(2, 3, 4)}, "p has one row more"),
        ({"q_logits": torch.zeros(2, 2, 5).double()}, "q_logits must be torch.float32"),
        ({"guesses": torch.zeros(2, 2, dtype=torch.int32)}, "int64"),
        ({"guesses": torch.full((2, 2), 5)}, r"guesses must lie in \[0, 5\); got 5 to 5"),
        ({"rng_seed": -1}, r"rng_seed must be 0 to 2\^63 - 1; got -1"),
        ({"temperature": 0.0}, "Greedy decoding takes"),
        ({"p_logits": torch.full((2, 3, 5), torch.nan)}, "needs a finite maximum and no NaN"),
    ],
)
def test_bad_input_of_the_sampler_is_refused(change, message):
    arguments = {
        "p_logits": torch.zeros(2, 3, 5), "q_logits": torch.zeros(2, 2, 5),
        "guesses": torch.zeros(2, 2, dtype=torch.int64), "rng_seed": 1,
    } | change  # fmt: skip
    with pytest.raises(BadInput, match=message):
        rejection_sample(**arguments)


def test_an_empty_batch_gives_an_empty_result():
    p, q, guesses = sampler_inputs("cpu", batch=2, k=2, n_vocab=5)
    got = rejection_sample(p[:0], q[:0], guesses[:0], 1)
    assert got.tokens.shape == (0, 3) and got.n_kept.shape == (0,)
    q, k, v, tables, lengths = inputs(SHAPES[0])
    assert verify_attention(q[:0], k, v, tables[:0], lengths[:0]).shape == (0, 5, 4, 64)


# --- compiled for GPUs that are not here

MODULE = "llmopt_lab.speculative_decoding.kernels"
STRIDES = {
    name: "i64"
    for name in (
        "q_seq", "q_new", "q_head", "k_block", "k_slot", "k_head", "v_block", "v_slot", "v_head",
        "table_seq", "p_seq", "p_row", "q_row", "guess_seq",
    )
}  # fmt: skip


def pdl_of(target: str) -> dict:
    return {"launch_pdl": True} if target in ("sm_90", "sm_100") else {}


def verify_spec(target: str, dtype: str, d_head: int, n_new: int, n_splits: int, tree: bool):
    torch_dtype = {"fp32": torch.float32}.get(dtype, torch.float16)
    plan = choose_plan(8, n_new * 4, 4096, torch_dtype)
    part = "fp32" if n_splits > 1 else dtype
    return {
        "kernel": f"{MODULE}:_verify_kernel",
        "target": target,
        "signature": STRIDES
        | {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "v_ptr": f"*{dtype}"}
        | {"table_ptr": "*i32", "length_ptr": "*i32", "tree_ptr": "*i64" if tree else "*i32"}
        | {"out_ptr": f"*{part}", "lse_ptr": f"*{part}"}
        | {"scale_log2": "fp32", "span": "i32", "n_new": "i32"},
        "constexprs": {
            "SPLIT": n_splits > 1, "BLOCK_SIZE": 16, "GROUP": 4, "ROWS": plan.rows,
            "ROW_TILES": -(-n_new * 4 // plan.rows), "D": d_head, "TILE": plan.tile,
            "PRECISION": "ieee" if dtype == "fp32" else "tf32", "STAGES": plan.n_stages,
            "TREE": tree, "PDL": bool(pdl_of(target)),
        } | ({"STAGES": 3} if pdl_of(target) and dtype != "fp32" else {}),
        "aligned": [name for name in STRIDES if name[:2] in ("q_", "k_", "v_")],
        "options": {"num_warps": plan.n_warps} | pdl_of(target),
    }  # fmt: skip


def merge_spec(target: str, splits: int) -> dict:
    return {
        "kernel": f"{MODULE}:_merge_kernel",
        "target": target,
        "signature": {
            "part_ptr": "*fp32", "lse_ptr": "*fp32", "length_ptr": "*i32", "out_ptr": "*fp16",
            "span": "i32", "n_splits": "i32",
        },
        "constexprs": {
            "SPLITS": splits, "D": 128, "PDL": bool(pdl_of(target)),
        },
        "options": {"num_warps": merge_warps(splits, 128)} | pdl_of(target),
    }  # fmt: skip


def sampler_specs(target: str, dtype: str, k: int, n_vocab: int) -> list[dict]:
    chunk, n_warps = choose_chunk(n_vocab)
    n_chunks = -(-n_vocab // chunk)
    pointers = {"p_ptr": f"*{dtype}", "q_ptr": f"*{dtype}", "guess_ptr": "*i64"}
    pointers |= dict.fromkeys(("max_ptr", "sum_ptr", "chance_ptr", "lse_ptr", "mass_ptr"), "*fp32")
    pointers |= {"kept_ptr": "*i32", "token_ptr": "*i64"}
    numbers = {"n_vocab": "i32", "n_chunks": "i32", "seed": "i64", "scale_log2": "fp32"}
    sizes = {
        "K": k, "ROWS": triton.next_power_of_2(k + 1), "CHUNKS": triton.next_power_of_2(n_chunks),
        "CHUNK": chunk, "PDL": bool(pdl_of(target)),
    }  # fmt: skip
    return [
        {
            "kernel": f"{MODULE}:{name}",
            "target": target,
            "signature": STRIDES | pointers | numbers,
            "constexprs": sizes
            if name != "_softmax_parts_kernel"
            else {key: sizes[key] for key in ("K", "CHUNK", "PDL")},
            "aligned": ["p_seq", "p_row", "q_seq", "q_row", "n_vocab"],
            "options": {"num_warps": n_warps} | pdl_of(target),
        }
        for name in ("_softmax_parts_kernel", "_judge_kernel", "_draw_kernel")
    ]


@pytest.mark.parametrize("target", aot.TARGETS)
def test_kernels_compile_and_fit_the_chip(target):
    half = "fp16" if target == "sm_75" else "bf16"
    specs = [
        verify_spec(target, half, 128, 5, 8, tree=False),
        verify_spec(target, half, 64, 1, 1, tree=False),
        verify_spec(target, half, 128, 64, 8, tree=True),
        merge_spec(target, MAX_SPLITS),
        *sampler_specs(target, half, 16, 131_072),
    ]
    if target == "sm_90":
        specs += [verify_spec(target, "fp32", 128, 5, 8, tree=True)]
        specs += sampler_specs(target, "fp32", 1, 1000)
    for spec, facts in zip(specs, aot.compile_ahead(specs), strict=True):
        what = f"{spec['kernel']} {spec['constexprs']}"
        assert facts["shared"] <= aot.TARGETS[target][3], f"{what}: shared memory {facts['shared']}"
        if target == "sm_90":
            assert facts["spills"] == 0, f"{what} spills {facts['spills']} bytes"


def test_the_recorded_h200_results_meet_what_the_chapter_asks():
    (recorded,) = load_results("speculative_decoding")
    attention, tree, sampler = (case["rows"] for case in recorded["cases"])
    ours = {
        (row["size"]["batch"], row["size"]["n_new"]): row["results"]["ours (Triton)"]["median_ms"]
        for row in attention
    }
    assert {row["size"]["n_tokens"] for row in attention} == {4096}
    assert {n for batch, n in ours if batch == 32} == {1, 2, 5, 8}
    for batch in (1, 4, 8, 16, 32):
        assert ours[batch, 5] <= 1.3 * ours[batch, 1], batch
    (row,) = (row for row in sampler if row["size"]["batch"] == 64 and row["size"]["k"] == 16)
    assert row["size"]["n_vocab"] == 131_072
    times = {name: result["median_ms"] for name, result in row["results"].items()}
    assert times["ours (Triton)"] * 2 <= min(times["torch"], times["torch, compiled"])
    assert {row["size"]["n_new"] for row in tree} == {64}


# --- on a GPU

GPU_SHAPES = [
    *SHAPES,
    ([17, 0, 100, 5, 513, 4096], 5, 32, 8, 128, 16),
    ([4096] * 32, 5, 32, 8, 128, 16),
    ([300, 20_000], 8, 2, 2, 64, 256),
    ([130, 64, 4097], 64, 32, 8, 128, 7),
    ([131_072], 2, 32, 8, 128, 16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=lambda s: f"{len(s[0])}x{max(s[0])}-{s[1:]}")
def test_verification_equals_torchs_attention_on_a_gpu(shape, dtype):
    for tree in (False, True):
        check(shape, tree, dtype=dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_verification_equals_torchs_attention_on_a_gpu_on_random_shapes(dtype):
    rng = torch.Generator().manual_seed(0)
    pick = lambda low, high: int(torch.randint(low, high, (1,), generator=rng))  # noqa: E731
    for seed in range(40):
        n_new = (1, 2, 3, 5, 8, 17, 64)[pick(0, 7)]
        lengths = [pick(n_new, 3000) for _ in range(pick(1, 20))]
        n_kv_heads = pick(1, 9)
        shape = (lengths, n_new, n_kv_heads * (1, 2, 4, 7)[pick(0, 4)], n_kv_heads)
        check((*shape, (64, 128)[pick(0, 2)], (1, 16, 64, 256)[pick(0, 4)]), seed % 2,
              dtype=dtype, device="cuda", seed=seed)  # fmt: skip


@pytest.mark.gpu
def test_two_runs_of_the_attention_give_the_same_bits():
    args = inputs(GPU_SHAPES[6], dtype=torch.bfloat16, device="cuda")
    assert torch.equal(verify_attention(*args), verify_attention(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("batch", "k", "n_vocab"), [(8, 4, 131_072), (3, 16, 50_257), (20, 1, 4096), (300, 3, 37)]
)
def test_the_sampler_does_what_float64_does_on_a_gpu(batch, k, n_vocab, dtype):
    args = sampler_inputs("cuda", batch=batch, k=k, n_vocab=n_vocab, dtype=dtype)
    check_sampler(args, seed=11)


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "n_vocab"), [(2, 5), (1, 100), (4, 4)])
def test_every_outcome_comes_as_often_as_listed_on_a_gpu(k, n_vocab):
    sizes = {"batch": 1, "k": k, "n_vocab": n_vocab}
    p, q, _ = sampler_inputs("cuda", **sizes, dtype=torch.float32)
    check_distribution(p[0], q[0], n=400_000)


@pytest.mark.gpu
def test_the_sampler_reaches_logits_past_two_billion():
    p = torch.zeros(1, 1, 1, dtype=torch.bfloat16, device="cuda").expand(9, 17, 131_072)
    p = torch.cat([p] * 120)  # 2.4e9 elements, the last sequence far past 2^31
    p[-1, :, 77] = 50.0
    q = p[:, :16].clone()
    q[-1, :, 77], q[-1, :, 78] = 0.0, 50.0
    guesses = torch.full((len(p), 16), 78, device="cuda")
    got = rejection_sample(p, q, guesses, 1)
    assert got.tokens[-1, :2].tolist() == [77, -1] and got.chances[-1, 0] < 1e-6


@pytest.mark.gpu
def test_the_peer_in_torch_gives_the_same_chances():
    args = sampler_inputs("cuda", batch=8, k=4, n_vocab=131_072)
    assert_close(torch_sampler(*args), chances_oracle(*args))
