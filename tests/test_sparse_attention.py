"""Sparse attention: patterns as their papers write them, and equal to dense under the same mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.memory import Load, Store
from llmopt_lab.core.trace import recording
from llmopt_lab.sparse_attention import cover, sparse_attention
from llmopt_lab.sparse_attention.block_lists import lists_of
from llmopt_lab.sparse_attention.cases import (
    RAGGED,
    Sizes,
    attention_inputs,
    attention_oracle,
    guides_local_attention,
    guides_longformer_attention,
    guides_strided_attention,
    patterns,
    ragged,
    realistic,
    toy,
)
from llmopt_lab.sparse_attention.io_model import (
    Traffic,
    fitted_exponent,
    flops,
    layers_to_reach,
    pairs_formula,
    sparse_traffic,
    time_calls,
    useful_flops,
    visible_pairs,
    window_blocks,
)
from llmopt_lab.sparse_attention.patterns import (
    Causal,
    DilatedWindow,
    Full,
    GlobalTokens,
    InBlocks,
    Sinks,
    SlidingWindow,
    Strided,
    bigbird,
    longformer,
    sparse_transformer,
    streaming,
)
from llmopt_lab.sparse_attention.records import Finished, Visited
from llmopt_lab.sparse_attention.reference import longformer_attention

NAMES = list(patterns(1))
TILES = [(16, 8), (5, 3), (1, 1), (64, 7)]
ALL_CASES = range(len(RAGGED))


def case(index: int):
    return list(ragged())[index]


def pairs_of(pattern, n_q: int, n_k: int) -> list[set[int]]:
    """The keys of each query, as Python sets."""
    return [set(row.nonzero()[:, 0].tolist()) for row in pattern.mask(n_q, n_k)]


# --- patterns


@pytest.mark.parametrize("width", range(1, 10))
def test_a_causal_window_is_the_own_key_and_those_before_it(width):
    want = [set(range(max(0, i - width + 1), i + 1)) for i in range(12)]
    assert pairs_of(SlidingWindow(width), 12, 12) == want


@pytest.mark.parametrize(("width", "side"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (8, 4)])
def test_a_symmetric_window_has_as_many_keys_on_each_side(width, side):
    want = [set(range(max(0, i - side), min(12, i + side + 1))) for i in range(12)]
    assert pairs_of(SlidingWindow(width, causal=False), 12, 12) == want


def test_a_dilated_window_has_as_many_keys_and_a_longer_reach():
    causal = pairs_of(DilatedWindow(3, 4), 20, 20)
    assert causal[19] == {19, 15, 11} and causal[5] == {5, 1} and causal[0] == {0}
    assert pairs_of(DilatedWindow(4, 3, causal=False), 20, 20)[10] == {4, 7, 10, 13, 16}
    assert pairs_of(DilatedWindow(5, 1), 20, 20) == pairs_of(SlidingWindow(5), 20, 20)


def test_strided_keys_are_counted_back_from_the_query():
    assert pairs_of(Strided(4), 12, 12)[10] == {10, 6, 2}


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_local_plus_strided_is_the_sparse_transformers_definition(stride):
    """A^(1) = {t, .., i}, t = max(0, i - l); A^(2) = {j: (i - j) mod l = 0}, j <= i."""
    want = [
        set(range(max(0, i - stride), i + 1)) | {j for j in range(i + 1) if (i - j) % stride == 0}
        for i in range(20)
    ]
    assert pairs_of(sparse_transformer(stride), 20, 20) == want


def test_any_two_tokens_are_two_layers_of_local_plus_strided_apart():
    mask = sparse_transformer(5).mask(26, 26).long()
    assert torch.equal(mask @ mask > 0, Causal().mask(26, 26))


def test_global_tokens_see_all_and_are_seen_by_all():
    seen = pairs_of(longformer(3, (2, -1)), 9, 9)
    assert seen[2] == seen[8] == set(range(9))
    assert all({2, 8} <= keys for keys in seen)
    assert seen[5] == {4, 5, 6, 2, 8}
    assert torch.equal(longformer(3, (2, -1)).mask(9, 9), longformer(3, (2, 8)).mask(9, 9))
    mask = longformer(3, (2, -1)).mask(9, 9)
    assert torch.equal(mask, mask.T)


def test_an_index_from_the_end_needs_a_length():
    rows = torch.arange(4)
    with pytest.raises(BadInput, match="counts from the end"):
        GlobalTokens((-1,)).allowed(rows, rows)
    with pytest.raises(BadInput, match="there are 4 tokens"):
        GlobalTokens((0, 4)).mask(4, 4)
    with pytest.raises(BadInput, match="there are 4 tokens"):
        GlobalTokens((-5,)).mask(4, 4)


def test_streaming_is_the_window_and_the_first_tokens():
    seen = pairs_of(streaming(3, 2), 9, 9)
    assert seen[0] == {0} and seen[4] == {0, 1, 2, 3, 4} and seen[8] == {0, 1, 6, 7, 8}
    assert streaming(3, 0) == SlidingWindow(3)


def test_a_pattern_of_blocks_is_the_pattern_of_each_tokens_block():
    mask = InBlocks(3, SlidingWindow(2)).mask(8, 8)
    blocks = SlidingWindow(2).mask(3, 3)
    for i in range(8):
        for j in range(8):
            assert mask[i, j] == blocks[i // 3, j // 3]


def test_bigbird_has_window_global_and_random_blocks():
    n, block = 80, 4
    pattern = bigbird(n, block=block, n_random=3, rng=torch.Generator().manual_seed(0))
    grid = pattern.mask(n, n).view(20, 4, 20, 4)
    assert torch.equal(grid.any(3).any(1), grid.all(3).all(1))
    seen = grid.any(3).any(1)
    assert seen[:2].all() and seen[:, :2].all()
    known = SlidingWindow(3, causal=False).mask(20, 20) | GlobalTokens((0, 1)).mask(20, 20)
    assert (seen & ~known)[2:].sum(1).tolist() == [3] * 18
    same = bigbird(n, block=block, n_random=3, rng=torch.Generator().manual_seed(0))
    other = bigbird(n, block=block, n_random=3, rng=torch.Generator().manual_seed(1))
    assert same == pattern and other != pattern
    few = bigbird(20, block=4, n_random=9, rng=torch.Generator().manual_seed(0))
    assert few.mask(20, 20).all()


def test_patterns_compose_like_sets():
    a, b = SlidingWindow(4), Strided(3)
    both, either = a & b, a | b
    assert torch.equal(both.mask(9, 11), a.mask(9, 11) & b.mask(9, 11))
    assert torch.equal(either.mask(9, 11), a.mask(9, 11) | b.mask(9, 11))
    assert not (longformer(4, (0, -1)) & Causal()).mask(9, 9).triu(1).any()


@pytest.mark.parametrize("name", NAMES)
def test_fewer_queries_are_the_last_rows_of_the_mask(name):
    pattern = patterns(23)[name]
    assert torch.equal(pattern.mask(7, 23), pattern.mask(23, 23)[-7:])


@pytest.mark.parametrize("name", NAMES)
def test_any_part_of_a_rule_is_that_part_of_its_mask(name):
    pattern = patterns(23)[name]
    rows, cols = torch.tensor([22, 3, 9]), torch.tensor([0, 21, 8, 9])
    assert torch.equal(pattern.at(23).allowed(rows, cols), pattern.mask(23, 23)[rows][:, cols])


@pytest.mark.parametrize(
    "make",
    [
        lambda: SlidingWindow(0),
        lambda: DilatedWindow(3, 0),
        lambda: Strided(-1),
        lambda: Sinks(0),
        lambda: InBlocks(0, Full()),
        lambda: bigbird(8, block=0, rng=torch.Generator()),
        lambda: bigbird(8, block=2, n_random=-1, rng=torch.Generator()),
        lambda: bigbird(8, block=4, n_global=3, rng=torch.Generator()),
        lambda: Full().mask(0, 4),
    ],
)
def test_sizes_that_make_no_pattern_are_refused(make):
    with pytest.raises(BadInput):
        make()


# --- block lists


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n_q", "n_k"), [(37, 37), (20, 33), (1, 40), (33, 20)])
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_a_cover_holds_every_pair_and_no_block_without_one(name, n_q, n_k, tiles):
    pattern = patterns(n_k)[name]
    mask = pattern.mask(n_q, n_k)
    lists = cover(pattern, n_q, n_k, tile_q=tiles[0], tile_k=tiles[1])
    for i, rows in enumerate(mask.split(tiles[0])):
        kinds = {}
        for j, block in enumerate(rows.split(tiles[1], dim=1)):
            if block.any():
                kinds[j] = bool(block.all())
        got = {keys.start // tiles[1]: full for keys, full in lists.row(i)}
        assert got == kinds
        order = list(got)
        full = [j for j in order if got[j]]
        assert order == sorted(full) + sorted(set(order) - set(full))  # full ones first
        assert lists.live()[i].nonzero()[:, 0].tolist() == sorted(kinds)


def test_lists_can_differ_between_heads():
    live = torch.tensor([[[True, False, True], [False, False, False]], [[False] * 3, [True] * 3]])
    full = torch.tensor([[[False, False, True], [False] * 3], [[True] * 3, [False, True, False]]])
    lists = lists_of(live, full, 4, 6, 2, 2)
    assert torch.equal(lists.live(), live)
    assert list(lists.of((0,)).row(0)) == [(slice(4, 6), True), (slice(0, 2), False)]
    assert list(lists.of((0,)).row(1)) == [] == list(lists.of((1,)).row(0))
    assert [keys.start for keys, _ in lists.of((1,)).row(1)] == [2, 0, 4]


# --- the result


@pytest.mark.parametrize("index", ALL_CASES)
@pytest.mark.parametrize("name", NAMES)
def test_it_equals_dense_attention_under_the_same_mask(index, name):
    _, q, k, v = case(index)
    pattern = patterns(k.shape[-2])[name]
    want = attention_oracle(q, k, v, pattern.mask(q.shape[-2], k.shape[-2]))
    for tile_q, tile_k in TILES[:2] + TILES[3:]:
        out = sparse_attention(q, k, v, pattern, tile_q=tile_q, tile_k=tile_k)
        assert_close(out, want)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 20), st.integers(1, 20), st.sampled_from(NAMES), st.integers(1, 24),
    st.integers(1, 24), st.floats(-2, 2), st.integers(1, 3), st.integers(1, 3),
)  # fmt: skip
def test_any_sizes_tiles_and_scale(n_q, n_k, name, tile_q, tile_k, scale, n_kv_heads, group):
    sizes = Sizes(n_q, n_k, 4, 3, n_heads=n_kv_heads * group, n_kv_heads=n_kv_heads)
    q, k, v = attention_inputs(sizes)
    pattern = patterns(n_k)[name]
    out = sparse_attention(q, k, v, pattern, scale=scale, tile_q=tile_q, tile_k=tile_k)
    assert_close(out, attention_oracle(q, k, v, pattern.mask(n_q, n_k), scale=scale))


def test_a_query_that_sees_nothing_gives_zeros_and_no_nan_in_the_gradients():
    q, k, v = (x.requires_grad_() for x in attention_inputs(Sizes(9, 9, 4, 4)))
    pattern = SlidingWindow(3) & GlobalTokens((0,))  # only tokens 0 to 2 see anything: token 0
    out = sparse_attention(q, k, v, pattern, tile_q=4, tile_k=2)
    assert torch.equal(out[..., 3:, :], torch.zeros_like(out[..., 3:, :]))
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert not q.grad[..., 3:, :].any() and not v.grad[..., 1:, :].any()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_those_of_dense_attention(name):
    inputs = [x.requires_grad_() for x in attention_inputs(RAGGED[1])]
    pattern = patterns(50)[name]
    out = sparse_attention(*inputs, pattern, tile_q=8, tile_k=7)
    want = attention_oracle(*inputs, pattern.mask(37, 50))
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    got_grads = torch.autograd.grad(out, inputs, d_out)
    for a, b in zip(got_grads, torch.autograd.grad(want, inputs, d_out), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_shorter_dtypes_stay_within_their_tolerance(dtype):
    for _, q, k, v in ragged(dtype):
        pattern = streaming(8, 2)
        out = sparse_attention(q, k, v, pattern)
        assert out.dtype == dtype
        assert_close(out, attention_oracle(q, k, v, pattern.mask(q.shape[-2], k.shape[-2])))


def test_heads_and_batches_are_optional_dimensions():
    q, k, v = attention_inputs(Sizes(9, 13, 4, 4, batch=2, n_heads=6, n_kv_heads=3))
    want = sparse_attention(q, k, v, streaming(4, 1))
    assert_close(sparse_attention(q[1], k[1], v[1], streaming(4, 1)), want[1])
    assert_close(sparse_attention(q[1, 5], k[1, 2], v[1, 2], streaming(4, 1)), want[1, 5])


def test_lists_of_each_head_restrict_the_pattern_of_that_head():
    q, k, v = attention_inputs(Sizes(10, 13, 4, 4, batch=2, n_heads=4, n_kv_heads=2))
    rng = torch.Generator().manual_seed(3)
    live = torch.rand(2, 2, 4, 4, generator=rng) < 0.5
    lists = lists_of(live, torch.zeros_like(live), 10, 13, 3, 4)
    out = sparse_attention(q, k, v, Causal(), lists=lists)
    tokens = live.repeat_interleave(3, -2)[..., :10, :].repeat_interleave(4, -1)[..., :13]
    mask = (tokens & Causal().mask(10, 13)).repeat_interleave(2, 1)
    assert_close(out, attention_oracle(q, k, v, mask))


def test_longformers_global_tokens_can_have_projections_of_their_own():
    q, k, v = attention_inputs(Sizes(21, 21, 4, 3, n_heads=4, n_kv_heads=2))
    q_g, k_g, v_g = attention_inputs(Sizes(21, 21, 4, 3, n_heads=4, n_kv_heads=2), seed=9)
    out = longformer_attention(
        q, k, v, q_g, k_g, v_g, width=4, global_tokens=(3, -1), tile_q=4, tile_k=5
    )
    local = attention_oracle(q, k, v, longformer(4, (3, -1)).mask(21, 21))
    everything = attention_oracle(q_g, k_g, v_g, Full().mask(21, 21))
    rows = torch.tensor([3, 20])
    others = [i for i in range(21) if i not in (3, 20)]
    assert_close(out[..., rows, :], everything[..., rows, :])
    assert_close(out[..., others, :], local[..., others, :])
    shared = longformer_attention(q, k, v, q, k, v, width=4, global_tokens=(3, -1))
    assert_close(shared, local)
    none = longformer_attention(q, k, v, q_g, k_g, v_g, width=4, global_tokens=())
    assert_close(none, attention_oracle(q, k, v, SlidingWindow(4, causal=False).mask(21, 21)))


# --- bytes and FLOPs


def counted(call) -> Traffic:
    """Bytes that `call` loads and stores, by its own records."""
    with recording(Load, Store) as trace:
        call()
    return Traffic(trace.total("nbytes", Load), trace.total("nbytes", Store))


@pytest.mark.parametrize("index", ALL_CASES)
@pytest.mark.parametrize("name", NAMES)
def test_traffic_is_what_the_formula_says(index, name):
    _, q, k, v = case(index)
    n_q, n_k = q.shape[-2], k.shape[-2]
    pattern = patterns(n_k)[name]
    for tile_q, tile_k in TILES:
        lists = cover(pattern, n_q, n_k, tile_q=tile_q, tile_k=tile_k)
        got = counted(lambda: sparse_attention(q, k, v, pattern, tile_q=tile_q, tile_k=tile_k))  # noqa: B023
        assert got == sparse_traffic(lists, q, k, v)
        keys = sum(
            block.shape[1]
            for rows in pattern.mask(n_q, n_k).split(tile_q)
            for block in rows.split(tile_k, 1)
            if block.any()
        )
        width = k.shape[-1] + v.shape[-1]
        n_heads = q.shape[0] * q.shape[1]
        assert got.read == 8 * n_heads * (n_q * q.shape[-1] + keys * width)
        assert got.written == 8 * n_heads * n_q * v.shape[-1]


def test_traffic_counts_the_lists_of_every_head():
    q, k, v = attention_inputs(Sizes(10, 13, 4, 4, batch=2, n_heads=4, n_kv_heads=2))
    live = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.5
    lists = lists_of(live, torch.zeros_like(live), 10, 13, 3, 4)
    got = counted(lambda: sparse_attention(q, k, v, Causal(), lists=lists))
    assert got == sparse_traffic(lists, q, k, v)
    with recording(Visited) as trace:
        sparse_attention(q, k, v, Causal(), lists=lists)
    scored = sum(visited.scores.numel() for visited in trace.of(Visited))
    assert flops(lists, q, k, v) == 2 * (4 + 4) * scored


def test_what_is_loaded_follows_the_live_blocks_and_nothing_else():
    q, k, v = attention_inputs(Sizes(64, 64, 4, 4))
    poisoned = k.clone()
    lists = cover(SlidingWindow(9), 64, 64, tile_q=8, tile_k=8)
    poisoned[..., :32, :] = torch.nan  # blocks that queries 48 to 63 do not visit
    out = sparse_attention(q, poisoned, v, SlidingWindow(9), lists=lists)
    assert out[..., 48:, :].isfinite().all()
    with recording(Finished) as trace:
        sparse_attention(q, k, v, SlidingWindow(9), lists=lists)
    assert [done.n_visited for done in trace.of(Finished)] == [1] + [2] * 7


FORMULAS = [
    Full(), Causal(), SlidingWindow(1), SlidingWindow(7), SlidingWindow(1, causal=False),
    SlidingWindow(2, causal=False), SlidingWindow(9, causal=False), DilatedWindow(5, 3),
    DilatedWindow(4, 5, causal=False), Strided(7), streaming(5, 3), sparse_transformer(6),
    longformer(9, (0, -1)), longformer(4, (3, 4, -2)),
    InBlocks(4, longformer(3, (0, -1))),
]  # fmt: skip


@pytest.mark.parametrize("pattern", FORMULAS, ids=str)
@pytest.mark.parametrize("n", [5, 6, 17, 40, 301])
def test_closed_forms_count_the_mask(pattern, n):
    assert pairs_formula(pattern, n) == visible_pairs(pattern, n, n) == pattern.mask(n, n).sum()


def test_a_pattern_without_a_formula_says_so():
    with pytest.raises(BadInput, match="no formula"):
        pairs_formula(Causal() & Strided(2), 9)


@pytest.mark.parametrize("width", [1, 2, 8, 9, 10, 17, 100])
@pytest.mark.parametrize("n", [1, 8, 31, 64])
def test_a_window_needs_no_list(width, n):
    lists = cover(SlidingWindow(width), n, n, tile_q=8, tile_k=8)
    assert window_blocks(width, n, 8) == int(lists.n_live.sum())


def test_flops_are_those_of_the_scored_blocks_and_of_the_pairs():
    q, k, v = attention_inputs(RAGGED[1])
    pattern = streaming(8, 2)
    lists = cover(pattern, 37, 50, tile_q=8, tile_k=7)
    with recording(Visited) as trace:
        sparse_attention(q, k, v, pattern, lists=lists)
    scored = sum(visited.scores.numel() for visited in trace.of(Visited))
    counts = sum(int((visited.scores > -torch.inf).sum()) for visited in trace.of(Visited))
    assert flops(lists, q, k, v) == 2 * (8 + 12) * scored
    assert useful_flops(pattern, q, k, v) == 2 * (8 + 12) * counts


def test_exponents_of_the_bytes_are_those_of_the_papers():
    q = torch.empty(1, 64)

    def exponent(make):
        sizes = [1024, 2048, 4096, 8192]
        lists = (cover(make(n), n, n, tile_q=16, tile_k=16) for n in sizes)
        costs = []
        for n, one in zip(sizes, lists, strict=True):
            x = q.expand(n, 64)
            costs.append(sparse_traffic(one, x, x, x).total)
        return fitted_exponent(sizes, costs)

    assert exponent(lambda n: Causal()) == pytest.approx(2, abs=0.03)
    assert exponent(lambda n: SlidingWindow(128)) == pytest.approx(1, abs=0.03)
    assert exponent(lambda n: streaming(128, 4)) == pytest.approx(1, abs=0.03)
    assert exponent(lambda n: longformer(128, (0,))) == pytest.approx(1, abs=0.03)


def test_pairs_of_local_plus_strided_grow_with_the_power_one_and_a_half():
    sizes = [4**i for i in range(5, 9)]
    pairs = [
        pairs_formula(sparse_transformer(2**i), n) for i, n in zip(range(5, 9), sizes, strict=True)
    ]
    assert fitted_exponent(sizes, pairs) == pytest.approx(1.5, abs=0.02)


def test_layers_to_reach_are_what_repeated_masks_need():
    assert layers_to_reach(8192, 128) == 65
    for n, width in [(17, 5), (18, 5), (2, 2), (9, 20), (1, 1)]:
        mask, reached, depth = SlidingWindow(width).mask(n, n).long(), torch.eye(n).long(), 0
        while not reached[-1, 0]:
            reached, depth = (reached @ mask).clamp(max=1), depth + 1
        assert layers_to_reach(n, width) == depth
    with pytest.raises(BadInput, match="no depth"):
        layers_to_reach(2, 1)


def test_the_exponent_of_a_power_is_that_power():
    assert fitted_exponent([1, 2, 5], [3, 12, 75]) == pytest.approx(2)
    for sizes, costs in (([4], [2]), ([2, 2], [1, 1]), ([1, 2], [0, 1]), ([1, 2], [1])):
        with pytest.raises(BadInput):
            fitted_exponent(sizes, costs)


def test_calls_are_timed_one_after_the_other():
    seen = []
    times = time_calls(seen.append, [3, 1], repeats=2)
    assert seen == [3, 3, 3, 1, 1, 1] and len(times) == 2 and min(times) >= 0


# --- the guide's versions


def rows_moved_by(attend, n: int, token: int) -> list[int]:
    """Rows of the output that move when Q, K and V of one token are replaced."""
    q, k, v = (x[0] for x in attention_inputs(Sizes(n, n, 4, 4)))
    before = attend(q, k, v)
    for x in (q, k, v):
        x[:, token] += 1
    return (attend(q, k, v) != before).any(-1)[0].nonzero()[:, 0].tolist()


def test_the_guides_window_is_off_centre_and_sees_the_future():
    def offsets(width):
        moved = rows_moved_by(lambda *x: guides_local_attention(*x, window_size=width), 31, 15)
        return sorted(15 - row for row in moved)

    assert offsets(3) == [-1, 0] and offsets(5) == [-2, -1, 0, 1]
    assert offsets(8) == list(range(-4, 4))
    q, k, v = (x[0] for x in attention_inputs(Sizes(9, 9, 4, 4)))
    assert not guides_local_attention(q, k, v, window_size=1).any()
    assert_close(sparse_attention(q, k, v, SlidingWindow(1)), v)


def test_the_guides_strided_attention_never_reads_three_tokens_in_four():
    q, k, v = (x[0] for x in attention_inputs(Sizes(32, 32, 4, 4)))
    want = guides_strided_attention(q, k, v, stride=4)
    rng = torch.Generator().manual_seed(5)
    for x in (q, k, v):
        x[:, torch.arange(32) % 4 != 0] = torch.randn(1, 24, 4, generator=rng, dtype=x.dtype)
    assert torch.equal(guides_strided_attention(q, k, v, stride=4), want)


def test_the_guides_global_tokens_are_seen_by_nobody_and_its_last_one_is_not_global():
    n = 64
    moved = rows_moved_by(lambda *x: guides_longformer_attention(*x, window_size=8), n, 0)
    assert len(moved) == 5
    right = rows_moved_by(
        lambda q, k, v: sparse_attention(q[None], k[None], v[None], longformer(8, (0, -1)))[0], n, 0
    )
    assert right == list(range(n))
    q, k, v = (x[0] for x in attention_inputs(Sizes(n, n, 4, 4)))
    guides = guides_longformer_attention(q, k, v, window_size=8)
    want = attention_oracle(q, k, v, Full().mask(n, n))
    assert (guides[:, -1] - want[:, -1]).norm() > want[:, -1].norm()
    fixed = guides_longformer_attention(q, k, v, window_size=8, global_indices=(0, n - 1))
    assert_close(fixed[:, -1], want[:, -1])


# --- what is refused


def test_bad_input_is_refused_before_any_work():
    q, k, v = attention_inputs(Sizes(5, 7, 4, 3, batch=2, n_heads=4, n_kv_heads=2))
    pattern = SlidingWindow(3)
    other = cover(pattern, 5, 8)
    live = torch.ones(2, 4, 1, 1, dtype=torch.bool)
    a_query_head_each = lists_of(live, live, 5, 7, 16, 16)
    for call, text in [
        (lambda: sparse_attention(q[0], k, v, pattern), "as many dimensions"),
        (lambda: sparse_attention(q[..., :0, :], k, v, pattern), "must not be empty"),
        (lambda: sparse_attention(q.float(), k, v, pattern), "floating dtype"),
        (lambda: sparse_attention(q.long(), k.long(), v.long(), pattern), "floating dtype"),
        (lambda: sparse_attention(q[..., :3], k, v, pattern), "share d_head"),
        (lambda: sparse_attention(q, k, v[..., :5, :], pattern), "last size only"),
        (lambda: sparse_attention(q[:1], k, v, pattern), "same batch"),
        (lambda: sparse_attention(q[:, :3], k, v, pattern), "multiple of n_kv_heads"),
        (lambda: sparse_attention(q, k, v, pattern, scale=float("nan")), "finite"),
        (lambda: sparse_attention(q, k, v, pattern, tile_q=0), "tile_q must be"),
        (lambda: sparse_attention(q, k, v, pattern, tile_k=-4), "tile_k must be"),
        (lambda: sparse_attention(q, k, v, GlobalTokens((7,))), "there are 7 tokens"),
        (lambda: sparse_attention(q, k, v, pattern, lists=other), "5 queries and 8 keys"),
        (lambda: sparse_attention(q, k, v, pattern, lists=a_query_head_each), "one a KV head"),
    ]:
        with recording() as trace, pytest.raises(BadInput, match=text):
            call()
        assert len(trace) == 0


def test_the_toy_can_be_checked_by_hand():
    q, k, v = toy(torch.float64)
    with recording(Visited) as trace:
        out = sparse_attention(q, k, v, streaming(2, 1), tile_q=2, tile_k=2)
    assert_close(out, attention_oracle(q, k, v, streaming(2, 1).mask(8, 8)))
    assert torch.equal(2 * trace.of(Visited)[0].scores[0, :1], (q @ k.T)[0, :1])
    assert [str(visited) for visited in trace.of(Visited)[-3:]] == [
        "queries 6 to 7: visit keys 0 to 1; partial, 2 of 4 scores count",
        "queries 6 to 7: visit keys 4 to 5; partial, 1 of 4 scores count",
        "queries 6 to 7: visit keys 6 to 7; partial, 3 of 4 scores count",
    ]


def test_the_realistic_case_is_one_layer_of_a_llama():
    q, k, v = realistic(64)
    assert (q.shape, k.shape, v.shape) == ((1, 32, 64, 128), (1, 8, 64, 128), (1, 8, 64, 128))
    out = sparse_attention(q, k, v, streaming(16, 4))
    assert_close(out, attention_oracle(q, k, v, streaming(16, 4).mask(64, 64)))
