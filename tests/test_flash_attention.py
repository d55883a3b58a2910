"""Flash attention: equal to torch's attention, and every byte it moves or keeps accounted for."""

import math
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.cost import EagerTraffic
from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.memory import Load, Store, ceil_div
from llmopt_lab.core.trace import recording
from llmopt_lab.flash_attention import (
    Partial,
    SoftmaxState,
    absorb,
    flash_attention,
    flash_attention_varlen,
    merge,
    naive_attention,
    split_kv_attention,
)
from llmopt_lab.flash_attention.cases import (
    RAGGED,
    attention_inputs,
    attention_oracle,
    cost_of,
    guides_flash_attention,
    layer_inputs,
    long_text,
    lse_oracle,
    ragged,
    realistic,
    toy,
)
from llmopt_lab.flash_attention.io_model import (
    Sizes,
    Traffic,
    backward_traffic,
    flash_traffic,
    flops,
    key_outer_traffic,
    largest_tile_q,
    naive_traffic,
    on_chip_nbytes,
    papers_tiles,
    saved_nbytes,
    split_kv_traffic,
    tile_counts,
    visible_scores,
)
from llmopt_lab.flash_attention.key_outer import key_outer_attention
from llmopt_lab.flash_attention.records import Absorbed, Recomputed, Skipped
from llmopt_lab.flash_attention.reference import finish
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.transformer import Transformer, causal_attention

TILES = [(16, 8), (5, 3), (7, 64), (64, 5)]
ALL_CASES = range(len(RAGGED))


def case(index: int):
    return list(ragged())[index]


def counted(call) -> Traffic:
    """Bytes that `call` loads and stores, by its own records."""
    with recording(Load, Store) as trace:
        call()
    return Traffic(trace.total("nbytes", Load), trace.total("nbytes", Store))


def sizes_strategy():
    def build(n_q, n_k, d_head, d_v, causal, batch, n_kv_heads, group):
        return Sizes(n_q, n_k, d_head, d_v, causal, 8, batch, n_kv_heads * group, n_kv_heads)

    n, few = st.integers(1, 20), st.integers(1, 3)
    return st.builds(build, n, n, n, n, st.booleans(), few, few, few)


# --- the result


@pytest.mark.parametrize("index", ALL_CASES)
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_both_loop_orders_equal_torchs_attention(index, tiles):
    sizes, q, k, v = case(index)
    settings = {"causal": sizes.causal, "tile_q": tiles[0], "tile_k": tiles[1]}
    want = attention_oracle(q, k, v, causal=sizes.causal)
    out, lse = flash_attention(q, k, v, **settings, return_lse=True)
    assert_close(out, want)
    assert_close(lse, lse_oracle(q, k, causal=sizes.causal))
    assert_close(key_outer_attention(q, k, v, **settings), want)


@pytest.mark.parametrize("index", ALL_CASES)
def test_the_three_naive_steps_equal_torchs_attention(index):
    sizes, q, k, v = case(index)
    want = attention_oracle(q, k, v, causal=sizes.causal)
    assert_close(naive_attention(q, k, v, causal=sizes.causal), want)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes_strategy(), st.integers(1, 24), st.integers(1, 24), st.floats(-2, 2))
def test_any_sizes_tiles_and_scale_give_the_same_result(sizes, tile_q, tile_k, scale):
    q, k, v = attention_inputs(sizes)
    causal = sizes.causal
    out = flash_attention(q, k, v, causal=causal, scale=scale, tile_q=tile_q, tile_k=tile_k)
    assert_close(out, attention_oracle(q, k, v, causal=causal, scale=scale))


def test_heads_and_batches_are_optional_dimensions():
    q, k, v = attention_inputs(Sizes(9, 13, 4, 4, batch=2, n_heads=6, n_kv_heads=3))
    want = flash_attention(q, k, v, causal=True)
    assert_close(flash_attention(q[1], k[1], v[1], causal=True), want[1])
    assert_close(flash_attention(q[1, 5], k[1, 2], v[1, 2], causal=True), want[1, 5])


def test_strided_inputs_give_the_same_bits():
    q, k, v = attention_inputs(Sizes(9, 13, 4, 4, batch=2, n_heads=3, n_kv_heads=3))
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not views[0].is_contiguous()
    assert torch.equal(flash_attention(*views), flash_attention(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_shorter_dtypes_stay_within_their_tolerance(dtype):
    for sizes, *tensors in ragged(dtype):
        q, k, v = tensors
        out, lse = flash_attention(q, k, v, causal=sizes.causal, return_lse=True)
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
        assert_close(out, attention_oracle(q, k, v, causal=sizes.causal))
        assert_close(lse, lse_oracle(q, k, causal=sizes.causal))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_added_up_in_float32(dtype):
    """In bfloat16 itself, 256 + 1 is 256: a total of 4096 ones would stop there."""
    q, k = torch.zeros(1, 8, dtype=dtype), torch.zeros(4096, 8, dtype=dtype)
    out, lse = flash_attention(q, k, torch.ones_like(k), tile_k=1, return_lse=True)
    assert torch.equal(out, torch.ones_like(out))
    assert_close(lse, torch.tensor([math.log(4096)], dtype=torch.float32))


def test_values_of_one_give_one_whatever_the_scores():
    q, k, v = attention_inputs(Sizes(33, 57, 8, 3))
    out = flash_attention(10 * q, k, torch.ones_like(v), tile_k=4)
    assert_close(out, torch.ones_like(out))


def test_large_scores_do_not_overflow():
    q, k, v = attention_inputs(Sizes(17, 23, 8, 8))
    out, lse = flash_attention(1e4 * q, 1e4 * k, v, tile_k=4, return_lse=True)
    assert_close(out, attention_oracle(1e4 * q, 1e4 * k, v))
    assert_close(lse, lse_oracle(1e4 * q, 1e4 * k))


def test_a_query_does_not_see_what_comes_later():
    q, k, v = attention_inputs(Sizes(12, 15, 4, 4))
    want = flash_attention(q, k, v, causal=True, tile_q=5, tile_k=4)
    for key in range(15):
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[..., key, :] += 5
        changed_v[..., key, :] += 5
        out = flash_attention(q, changed_k, changed_v, causal=True, tile_q=5, tile_k=4)
        same = (out == want).all(-1)[0, 0]
        # query i is token i + 3: the last query is the newest token
        assert same.tolist() == [i + 3 < key for i in range(12)]


def test_one_query_with_a_cache_sees_every_key_causal_or_not():
    q, k, v = attention_inputs(Sizes(1, 300, 8, 8))
    assert_close(flash_attention(q, k, v, causal=True), attention_oracle(q, k, v))


def test_queries_that_see_no_key_give_zeros_and_never_nan():
    q, k, v = attention_inputs(Sizes(9, 4, 4, 4))
    for tile_q, tile_k in [(1, 1), (2, 3), (4, 4), (16, 16)]:  # blind tiles, and mixed ones
        settings = {"causal": True, "tile_q": tile_q, "tile_k": tile_k}
        out, lse = flash_attention(q, k, v, **settings, return_lse=True)
        assert torch.equal(out[..., :5, :], torch.zeros_like(out[..., :5, :]))
        assert torch.equal(lse[..., :5], torch.full_like(lse[..., :5], -torch.inf))
        assert lse[..., 5:].isfinite().all()


# --- online softmax


def random_tiles(n_tiles: int, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    for _ in range(n_tiles):
        scores = 5 * torch.randn(3, 4, generator=rng, dtype=torch.float64)
        yield scores, torch.randn(4, 2, generator=rng, dtype=torch.float64)


def start() -> SoftmaxState:
    return SoftmaxState.empty(torch.zeros(3, 1, dtype=torch.float64), 2)


def test_absorbing_tiles_in_any_order_is_the_softmax_of_all_scores():
    tiles = list(random_tiles(5))
    scores, values = torch.cat([s for s, _ in tiles], 1), torch.cat([v for _, v in tiles])
    for order in (tiles, tiles[::-1], tiles[2:] + tiles[:2]):
        result = finish(reduce(lambda state, tile: absorb(state, *tile), order, start()))
        assert_close(result.out, torch.softmax(scores, 1) @ values)
        assert_close(result.lse, torch.logsumexp(scores, 1))


def test_absorbing_keeps_exact_sums_relative_to_the_largest_score():
    tiles = list(random_tiles(3))
    state = reduce(lambda state, tile: absorb(state, *tile), tiles, start())
    scores = torch.cat([s for s, _ in tiles], 1)
    assert_close(state.m, scores.amax(1))
    assert_close(state.total, (scores - scores.amax(1)[:, None]).exp().sum(1))


def test_a_masked_tile_changes_nothing_before_and_after_the_first_key():
    (scores, values), (later, later_values) = random_tiles(2)
    masked = torch.full_like(scores, -torch.inf)
    nothing = absorb(start(), masked, values)
    assert torch.equal(nothing.total, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(nothing.m, torch.full((3,), -torch.inf, dtype=torch.float64))
    with_mask = absorb(absorb(absorb(nothing, scores, values), masked, values), later, later_values)
    without = absorb(absorb(start(), scores, values), later, later_values)
    for name in ("m", "total", "acc"):
        assert torch.equal(getattr(with_mask, name), getattr(without, name)), name


# --- the backward


@pytest.mark.parametrize("index", ALL_CASES)
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_gradients_equal_those_of_torchs_attention(index, tiles):
    sizes, *tensors = case(index)
    q, k, v = (x.requires_grad_() for x in tensors)
    out, lse = flash_attention(
        q, k, v, causal=sizes.causal, tile_q=tiles[0], tile_k=tiles[1], return_lse=True
    )
    want_out = attention_oracle(q, k, v, causal=sizes.causal)
    want_lse = lse_oracle(q, k, causal=sizes.causal)
    rng = torch.Generator().manual_seed(1)
    d_out, d_lse = (torch.randn(x.shape, generator=rng, dtype=x.dtype) for x in (out, lse))
    seen = want_lse.isfinite()  # the gradient of -inf means nothing
    got = torch.autograd.grad([out, lse[seen]], (q, k, v), [d_out, d_lse[seen]], retain_graph=True)
    want = torch.autograd.grad([want_out, want_lse[seen]], (q, k, v), [d_out, d_lse[seen]])
    for name, a, b in zip(("dQ", "dK", "dV"), got, want, strict=True):
        assert_close(a, b, name)
    again = torch.autograd.grad([out, lse[seen]], (q, k, v), [d_out, d_lse[seen]])
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_equal_finite_differences(causal):
    q, k, v = (
        x.requires_grad_()
        for x in attention_inputs(Sizes(5, 7, 3, 2, n_heads=2, n_kv_heads=1), peak=1.0)
    )
    call = lambda *tensors: flash_attention(*tensors, causal=causal, tile_q=2, tile_k=3)  # noqa: E731
    assert torch.autograd.gradcheck(call, (q, k, v))


def test_gradients_have_the_dtype_of_their_tensors():
    q, k, v = (
        x.bfloat16().requires_grad_() for x in attention_inputs(Sizes(9, 9, 8, 8, causal=True))
    )
    flash_attention(q, k, v, causal=True).sum().backward()
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    attention_oracle(*wide, causal=True).sum().backward()
    for got, want in zip((q, k, v), wide, strict=True):
        assert got.grad.dtype == torch.bfloat16
        assert_close(got.grad, want.grad)


def test_a_gradient_of_the_gradient_is_refused():
    q, k, v = (x.requires_grad_() for x in attention_inputs(Sizes(3, 3, 2, 2)))
    (grad,) = torch.autograd.grad(flash_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_backward_recomputes_every_visible_tile_twice_and_no_other():
    sizes = Sizes(20, 27, 4, 4, causal=True, n_heads=4, n_kv_heads=2)
    q, k, v = (x.requires_grad_() for x in attention_inputs(sizes))
    out = flash_attention(q, k, v, causal=True, tile_q=4, tile_k=5)
    with recording(Recomputed) as trace:
        out.sum().backward()
    n_computed, n_skipped = tile_counts(sizes, tile_q=4, tile_k=5)
    assert n_skipped > 0
    assert len(trace.of(Recomputed)) == 2 * 4 * n_computed
    q_0, k_0 = q[0, 0], k[0, 0]
    p = torch.softmax((q_0 @ k_0.T * 4**-0.5).masked_fill(~mask_of(20, 27), -torch.inf), 1)
    first = trace.of(Recomputed)[0]
    assert_close(first.p, p[first.rows, first.cols])


def mask_of(n_q: int, n_k: int) -> torch.Tensor:
    """True where a query may look, written down element by element."""
    return torch.tensor([[key <= i + n_k - n_q for key in range(n_k)] for i in range(n_q)])


# --- bytes moved


@pytest.mark.parametrize("index", ALL_CASES)
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_traffic_is_what_the_formulas_say(index, tiles):
    sizes, *tensors = case(index)
    q, k, v = (x.requires_grad_() for x in tensors)
    tiles = {"tile_q": tiles[0], "tile_k": tiles[1]}
    settings = {"causal": sizes.causal, **tiles}
    with torch.no_grad():
        assert counted(lambda: flash_attention(q, k, v, **settings)) == flash_traffic(
            sizes, **tiles
        )
        assert counted(lambda: key_outer_attention(q, k, v, **settings)) == key_outer_traffic(
            sizes, **tiles
        )
        naive = counted(lambda: naive_attention(q, k, v, causal=sizes.causal))
    assert naive == naive_traffic(sizes)
    out = flash_attention(q, k, v, **settings)
    assert counted(lambda: out.sum().backward()) == backward_traffic(sizes, **tiles)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes_strategy(), st.integers(1, 24), st.integers(1, 24))
def test_traffic_is_what_the_formulas_say_for_any_sizes_and_tiles(sizes, tile_q, tile_k):
    q, k, v = (x.requires_grad_() for x in attention_inputs(sizes))
    tiles = {"tile_q": tile_q, "tile_k": tile_k}
    out = []
    forward = counted(lambda: out.append(flash_attention(q, k, v, causal=sizes.causal, **tiles)))
    assert forward == flash_traffic(sizes, **tiles)
    assert counted(lambda: out[0].sum().backward()) == backward_traffic(sizes, **tiles)
    with torch.no_grad():
        first = counted(lambda: key_outer_attention(q, k, v, causal=sizes.causal, **tiles))
    assert first == key_outer_traffic(sizes, **tiles)


def test_traffic_counts_the_bytes_of_the_dtype():
    for dtype, itemsize in ((torch.float16, 2), (torch.float32, 4), (torch.float64, 8)):
        q, k, v = attention_inputs(RAGGED[1], dtype=dtype)
        sizes = Sizes.of(q, k, v, causal=True)
        assert sizes.itemsize == itemsize
        tiles = {"tile_q": 8, "tile_k": 8}
        got = counted(lambda: flash_attention(q, k, v, causal=True, **tiles))  # noqa: B023
        assert got == flash_traffic(sizes, **tiles)


def test_without_a_mask_the_closed_form_of_the_docstring_holds():
    s = Sizes(50, 37, 16, 12, itemsize=4)
    passes = ceil_div(50, 16)
    traffic = flash_traffic(s, tile_q=16, tile_k=8)
    assert traffic == (4 * (50 * 16 + passes * 37 * (16 + 12)), 4 * (50 * 12 + 50))
    first = key_outer_traffic(s, tile_q=16, tile_k=8)
    passes = ceil_div(37, 8)
    elements = 37 * (16 + 12) + passes * 50 * (16 + 2 * 12 + 4) + 50 * (12 + 2)
    assert first.total == 4 * elements


def test_naive_traffic_is_what_three_eager_operators_move():
    q, k, v = (x[0, 0] for x in attention_inputs(Sizes(50, 37, 16, 12)))
    with EagerTraffic() as eager:
        torch.softmax(q @ k.T, dim=1) @ v
    assert naive_traffic(Sizes.of(q, k, v)) == (eager.read, eager.written)


def test_flash_traffic_falls_as_one_over_the_memory_and_naive_does_not():
    """Theorem 2: Theta(N^2 d^2 / M), within constants, for d <= M <= N d."""
    d = 64
    for n in (4096, 16384):
        sizes = Sizes(n, n, d, d)
        ratios = []
        for budget in (32 << 10, 64 << 10, 128 << 10, 256 << 10):
            tile_q = largest_tile_q(sizes, budget=budget, tile_k=16)
            traffic = flash_traffic(sizes, tile_q=tile_q, tile_k=16)
            assert traffic.total < naive_traffic(sizes).total
            ratios.append(traffic.total / 4 / (n**2 * d**2 / (budget / 4)))
        assert max(ratios) / min(ratios) < 1.5
        assert all(4 < ratio < 7 for ratio in ratios)
    doubled = (
        naive_traffic(Sizes(8192, 8192, d, d)).total / naive_traffic(Sizes(4096, 4096, d, d)).total
    )
    assert 3.8 < doubled < 4


def test_turning_the_loops_around_moves_less():
    for n in (1024, 4096):
        sizes, tiles = Sizes(n, n, 64, 64), {"tile_q": 64, "tile_k": 64}
        new, old = flash_traffic(sizes, **tiles).total, key_outer_traffic(sizes, **tiles).total
        assert 1.4 < old / new < 1.6


def test_tiles_that_are_skipped_are_neither_read_nor_scored():
    sizes, q, k, v = case(1)
    n_computed, n_skipped = tile_counts(sizes, tile_q=5, tile_k=4)
    for attend in (flash_attention, key_outer_attention):
        with recording(Absorbed, Skipped) as trace:
            attend(q, k, v, causal=True, tile_q=5, tile_k=4)
        assert len(trace.of(Absorbed)) == sizes.n_maps * n_computed
        assert len(trace.of(Skipped)) == sizes.n_maps * n_skipped
    assert n_computed + n_skipped == ceil_div(37, 5) * ceil_div(50, 4)
    poisoned_k, poisoned_v = k.clone(), v.clone()
    poisoned_k[..., 24:, :] = poisoned_v[..., 24:, :] = torch.nan
    out = flash_attention(q, poisoned_k, poisoned_v, causal=True, tile_q=5, tile_k=4)
    # the tile of queries 5 to 9 ends at key 9 + 13; its last tile of keys ends before 24
    assert out[..., :10, :].isfinite().all() and out[..., 10:15, :].isnan().all()


def test_the_visible_scores_are_those_of_the_mask():
    for n_q, n_k in [(5, 5), (3, 8), (8, 3), (1, 9), (9, 1)]:
        assert visible_scores(Sizes(n_q, n_k, 4, 4, causal=True)) == mask_of(n_q, n_k).sum()
        assert visible_scores(Sizes(n_q, n_k, 4, 4)) == n_q * n_k


def test_the_operations_are_those_that_torch_counts():
    q, k, v = (x[0, 0] for x in attention_inputs(Sizes(50, 37, 16, 12)))
    with FlopCounterMode(display=False) as counter:
        torch.softmax(q @ k.T, dim=1) @ v
    assert flops(Sizes.of(q, k, v)) == counter.get_total_flops()


def test_a_mask_saves_flash_most_of_the_hidden_products_and_naive_none():
    sizes = Sizes(48, 48, 16, 12, causal=True)
    q, k, v = (x[0, 0] for x in attention_inputs(sizes))
    counted = {}
    for name, call in {
        "naive": lambda: naive_attention(q, k, v, causal=True),
        "flash": lambda: flash_attention(q, k, v, causal=True, tile_q=8, tile_k=8),
    }.items():
        with FlopCounterMode(display=False) as counter:
            call()
        counted[name] = counter.get_total_flops()
    computed, skipped = tile_counts(sizes, tile_q=8, tile_k=8)
    whole = flops(Sizes.of(q, k, v))
    assert counted["naive"] == whole
    assert counted["flash"] == whole * computed // (computed + skipped)
    assert flops(sizes) < counted["flash"] < whole


# --- bytes on chip and bytes kept


def test_the_largest_tile_fills_the_budget():
    sizes = Sizes(4096, 4096, 64, 48, itemsize=2)
    for tile_k in (16, 64):
        for budget in (48 << 10, 100 << 10, 227 << 10):
            tile_q = largest_tile_q(sizes, budget=budget, tile_k=tile_k)
            assert on_chip_nbytes(sizes, tile_q=tile_q, tile_k=tile_k) <= budget
            assert on_chip_nbytes(sizes, tile_q=tile_q + 1, tile_k=tile_k) > budget
    with pytest.raises(BadInput, match="1,000 bytes on chip cannot hold one query beside 64 keys"):
        largest_tile_q(sizes, budget=1000, tile_k=64)


def test_the_papers_tiles():
    assert papers_tiles(4 * 64 * 32, 64) == (32, 32)
    assert papers_tiles(4 * 64 * 100 + 1, 64) == (64, 101)
    with pytest.raises(BadInput, match="M must be at least d"):
        papers_tiles(10, 64)


@pytest.mark.parametrize("index", ALL_CASES)
def test_flash_attention_keeps_q_k_v_the_result_and_l_and_nothing_else(index):
    sizes, *tensors = case(index)
    q, k, v = (x.requires_grad_() for x in tensors)
    made = []
    kept = saved_nbytes(
        lambda: made.extend(flash_attention(q, k, v, causal=sizes.causal, return_lse=True))
    )
    assert kept == sum(x.nbytes for x in (q, k, v, *made))
    assert made[1].nbytes == sizes.lse_nbytes


def test_what_autograd_keeps_of_the_guides_loop_is_twice_what_naive_attention_keeps():
    n, d = 2048, 64
    tensors = attention_inputs(Sizes(n, n, d, d), dtype=torch.float32)
    q, k, v = (x[0].requires_grad_() for x in tensors)
    inputs = q.nbytes + k.nbytes + v.nbytes
    naive = saved_nbytes(lambda: torch.softmax(q @ k.mT, -1) @ v)
    assert naive == inputs + 4 * n * n  # P
    looped = saved_nbytes(lambda: guides_flash_attention(q, k, v))
    assert 1.9 < looped / naive < 2.1
    flash = saved_nbytes(lambda: flash_attention(q, k, v, tile_q=256, tile_k=256))
    assert flash == inputs + 4 * n * (d + 1)


def test_the_guides_loop_fades_earlier_blocks_by_their_number():
    """Uniform scores, values of one: the right answer is 1; S_j = (S_(j-1) / B + 1) / j."""
    for n_blocks in (1, 2, 4, 8):
        n = 128 * n_blocks
        out = guides_flash_attention(*(torch.full((1, n, 4), x) for x in (0.0, 0.0, 1.0)))
        weight = 0.0
        for j in range(1, n_blocks + 1):
            weight = (weight / 128 + 1) / j
        assert_close(out, torch.full((1, n, 4), weight))


# --- split-KV


def partial(seed: int, n_keys: int) -> tuple[Partial, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    scores = 4 * torch.randn(3, n_keys, generator=rng, dtype=torch.float64)
    values = torch.randn(n_keys, 2, generator=rng, dtype=torch.float64)
    return finish(absorb(start(), scores, values)), scores, values


def same(a: Partial, b: Partial) -> None:
    assert_close(a.out, b.out)
    assert_close(a.lse, b.lse)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(*[st.integers(1, 6)] * 3)
def test_merging_is_attention_over_all_keys_in_any_order_and_grouping(n_a, n_b, n_c):
    parts = [partial(seed, n) for seed, n in enumerate((n_a, n_b, n_c))]
    a, b, c = (part for part, _, _ in parts)
    scores = torch.cat([s for _, s, _ in parts], dim=1)
    values = torch.cat([x for _, _, x in parts])
    want = Partial(torch.softmax(scores, 1) @ values, torch.logsumexp(scores, 1))
    for whole in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, merge(b, a))):
        same(whole, want)


def test_merging_with_a_part_that_saw_no_key_changes_nothing():
    a, _, _ = partial(0, 5)
    nothing = finish(start())
    same(merge(a, nothing), a)
    same(merge(nothing, a), a)
    same(merge(nothing, nothing), nothing)


DECODES = [  # n_k, d_head, d_v, batch, n_heads, n_kv_heads
    (1, 4, 4, 1, 1, 1),
    (61, 8, 5, 2, 6, 3),
    (40, 16, 16, 3, 8, 1),
    (33, 3, 9, 1, 4, 4),
]


@pytest.mark.parametrize("decode", DECODES, ids=str)
@pytest.mark.parametrize("n_splits", [1, 2, 7, "all"])
def test_split_kv_equals_torchs_attention_and_moves_what_its_formula_says(decode, n_splits):
    n_k, d_head, d_v, batch, n_heads, n_kv_heads = decode
    n_splits = n_k if n_splits == "all" else min(n_splits, n_k)
    sizes = Sizes(1, n_k, d_head, d_v, False, 8, batch, n_heads, n_kv_heads)
    q, k, v = attention_inputs(sizes)
    out = []
    traffic = counted(lambda: out.append(split_kv_attention(q, k, v, n_splits=n_splits, tile_k=4)))
    assert_close(out[0], attention_oracle(q, k, v))
    assert traffic == split_kv_traffic(sizes, n_splits=n_splits)


def test_split_kv_takes_one_head_too():
    q, k, v = (x[0, 0] for x in attention_inputs(Sizes(1, 23, 4, 4)))
    assert_close(split_kv_attention(q, k, v, n_splits=3), attention_oracle(q, k, v))


def test_split_kv_reads_keys_once_a_group_and_flash_once_a_query_head():
    sizes = Sizes(1, 4096, 128, 128, itemsize=2, n_heads=32, n_kv_heads=8)
    split = split_kv_traffic(sizes, n_splits=16).total
    assert flash_traffic(sizes, tile_q=16, tile_k=64).total / split == pytest.approx(4, rel=0.1)


def test_split_kv_refuses_what_it_cannot_split():
    q, k, v = attention_inputs(Sizes(2, 9, 4, 4))
    with pytest.raises(BadInput, match="one query a head; got 2 in q"):
        split_kv_attention(q, k, v, n_splits=2)
    for n_splits in (0, 10):
        with pytest.raises(BadInput, match=f"1 to 9, the number of keys; got {n_splits}"):
            split_kv_attention(q[..., :1, :], k, v, n_splits=n_splits)


# --- packed sequences


LENGTHS = [(5, 5), (1, 9), (0, 4), (7, 3), (6, 0), (8, 8)]  # queries and keys; some have none


def packed():
    n_q, n_k = (sum(column) for column in zip(*LENGTHS, strict=True))
    q, k, v = attention_inputs(Sizes(n_q, n_k, 4, 3, batch=1, n_heads=4, n_kv_heads=2))
    cu_q, cu_k = (
        torch.tensor([0, *column]).cumsum(0).int() for column in zip(*LENGTHS, strict=True)
    )
    return q, k, v, cu_q, cu_k


def unpacked_oracle(q, k, v, cu_q, cu_k, causal):
    outs = []
    for s, (n_q, n_k) in enumerate(LENGTHS):
        rows, cols = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        if n_k:
            outs.append(
                attention_oracle(q[..., rows, :], k[..., cols, :], v[..., cols, :], causal=causal)
            )
        else:
            outs.append(q.new_zeros(*q.shape[:-2], n_q, v.shape[-1]))
    return torch.cat(outs, dim=-2)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_and_their_gradients_equal_each_sequence_alone(causal):
    q, k, v, cu_q, cu_k = packed()
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = flash_attention_varlen(q, k, v, cu_q, cu_k, causal=causal, tile_q=3, tile_k=4)
    want = unpacked_oracle(q, k, v, cu_q, cu_k, causal)
    assert_close(out, want)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    got = torch.autograd.grad(out, (q, k, v), d_out)
    for a, b in zip(got, torch.autograd.grad(want, (q, k, v), d_out), strict=True):
        assert_close(a, b)


def test_a_packed_sequence_never_reads_its_neighbours():
    q, k, v, cu_q, cu_k = packed()
    k[..., : cu_k[3], :] = v[..., cu_k[4] :, :] = torch.nan
    out = flash_attention_varlen(q, k, v, cu_q, cu_k)
    assert out[..., cu_q[3] : cu_q[4], :].isfinite().all()


def test_packed_sequences_move_the_sum_of_what_each_moves_alone():
    q, k, v, cu_q, cu_k = packed()
    tiles = {"tile_q": 3, "tile_k": 4}
    got = counted(lambda: flash_attention_varlen(q, k, v, cu_q, cu_k, causal=True, **tiles))
    alone = [
        flash_traffic(Sizes(n_q, n_k, 4, 3, True, 8, 1, 4, 2), **tiles)
        for n_q, n_k in LENGTHS
        if n_q and n_k
    ]
    no_keys = Traffic(4 * 6 * 4 * 8, 4 * 6 * (3 + 1) * 8)  # reads Q, writes zeros and L
    assert got == tuple(map(sum, zip(*alone, no_keys, strict=True)))


@pytest.mark.parametrize(
    ("cu_q", "message"),
    [
        ([0, 5], "must name as many sequences; got 1 and 2"),
        ([0, 6, 5], "must rise from 0 to 5"),
        ([1, 3, 5], "must rise from 0 to 5"),
        ([0, 3, 4], "must rise from 0 to 5"),
        ([5], r"must be \(n_sequences \+ 1,\) int32"),
    ],
)
def test_starts_that_do_not_fit_are_refused_before_any_work(cu_q, message):
    q, k, v = attention_inputs(Sizes(5, 5, 2, 2))
    cu_k = torch.tensor([0, 2, 5], dtype=torch.int32)
    with recording() as trace, pytest.raises(BadInput, match=message):
        flash_attention_varlen(q, k, v, torch.tensor(cu_q, dtype=torch.int32), cu_k)
    with recording() as long, pytest.raises(BadInput, match="int32"):
        flash_attention_varlen(q, k, v, cu_k.long(), cu_k)
    assert len(trace) == len(long) == 0


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 4)}, "as many dimensions; got"),
        ({"q": torch.ones(4)}, "as many dimensions; got"),
        ({"q": torch.ones(1, 4, 0, 8)}, "must not be empty"),
        ({"k": torch.ones(1, 2, 0, 8), "v": torch.ones(1, 2, 0, 8)}, "must not be empty"),
        ({"q": torch.ones(1, 4, 3, 8).half()}, "must share a floating dtype; got torch.float16"),
        (
            {name: torch.ones(1, 2, 5, 8).int() for name in "qkv"},
            "must share a floating dtype; got torch.int32",
        ),
        ({"k": torch.ones(1, 2, 5, 8, device="meta")}, "must be on one device; got cpu, meta"),
        ({"q": torch.ones(1, 4, 3, 7)}, "q and k must share d_head"),
        ({"v": torch.ones(1, 2, 6, 8)}, "k and v may differ in their last size only"),
        ({"v": torch.ones(1, 1, 5, 8)}, "k and v may differ in their last size only"),
        ({"q": torch.ones(2, 4, 3, 8)}, "q and k must have the same batch"),
        ({"q": torch.ones(1, 3, 3, 8)}, "n_heads must be a multiple of n_kv_heads; got 3 and 2"),
        ({"scale": math.nan}, "scale must be a finite number, or None .*; got nan"),
        ({"scale": math.inf}, "got inf"),
        ({"tile_q": 0}, "tile_q must be a positive int; got 0"),
        ({"tile_k": -4}, "tile_k must be a positive int; got -4"),
    ],
)
def test_bad_input_is_refused_before_any_work(change, message):
    good = {
        "q": torch.ones(1, 4, 3, 8),
        "k": torch.ones(1, 2, 5, 8),
        "v": torch.ones(1, 2, 5, 8),
    }
    with recording() as trace:
        for attend in (flash_attention, key_outer_attention, naive_attention):
            if attend is naive_attention and change.keys() & {"tile_q", "tile_k"}:
                continue
            with pytest.raises(BadInput, match=message):
                attend(**(good | change))
    assert len(trace) == 0
    flash_attention(**good)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_q": 0}, "n_q must be a positive int; got 0"),
        ({"d_v": -1}, "d_v must be a positive int; got -1"),
        ({"n_heads": 3, "n_kv_heads": 2}, "n_heads must be a multiple of n_kv_heads; got 3 and 2"),
    ],
)
def test_sizes_must_fit(change, message):
    with pytest.raises(BadInput, match=message):
        Sizes(**({"n_q": 4, "n_k": 4, "d_head": 4, "d_v": 4} | change))


def test_tiles_must_be_positive_in_the_formulas_too():
    for formula in (flash_traffic, key_outer_traffic, backward_traffic, tile_counts):
        with pytest.raises(BadInput, match="tile_q must be a positive int; got 0"):
            formula(Sizes(4, 4, 4, 4), tile_q=0, tile_k=2)


# --- inputs of the chapter


def test_every_row_of_the_toy_is_rescaled_after_its_first_tile():
    q, k, v = toy(torch.float64)
    scores = q @ k.T / 2
    assert torch.equal(2 * scores, (2 * scores).round())
    assert (scores[:, :2].amax(1) < scores[:, 2:].amax(1)).all()
    assert_close(flash_attention(q, k, v, tile_q=2, tile_k=2), attention_oracle(q, k, v))


def test_the_realistic_prompt_has_llamas_heads():
    q, k, v = realistic(40)
    out = flash_attention(q, k, v, causal=True, tile_q=32, tile_k=32)
    assert (q.shape, k.shape) == ((1, 32, 40, 128), (1, 8, 40, 128))
    assert_close(out, attention_oracle(q, k, v, causal=True))


# What the notebook reads and measures with


def small_model() -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        n_vocab=40,
        d_model=24,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        d_head=6,
        d_ff=32,
        max_positions=16,
    )
    return Transformer(config).double().eval()


@pytest.mark.parametrize("layer", range(3))
def test_a_layers_queries_and_keys_are_those_the_model_attends_with(layer):
    model, tokens = small_model(), torch.arange(11) * 7 % 40
    q, k, v = layer_inputs(model, tokens, layer=layer, window=16)
    assert q.shape == (4, 11, 6) and k.shape == v.shape == (2, 11, 6)

    def put_back(q_, k_, v_, *, layer, scale):
        if layer != wanted:
            return causal_attention(q_, k_, v_, layer=layer, scale=scale)
        return attention_oracle(q[None], k[None], v[None], causal=True)

    wanted = layer
    assert_close(model(tokens[None], attend=put_back), model(tokens[None]))


def test_a_text_longer_than_the_model_is_read_in_windows_from_position_0():
    model, tokens = small_model(), torch.arange(23) * 7 % 40
    whole = layer_inputs(model, tokens, layer=1, window=9)
    parts = [
        layer_inputs(model, part, layer=1, window=16)
        for part in (tokens[:9], tokens[9:18], tokens[18:])
    ]
    for got, want in zip(whole, zip(*parts, strict=True), strict=True):
        assert_close(got, torch.cat(want, dim=1))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"tokens": torch.zeros(2, 3, dtype=torch.long)}, r"tokens must be \(n,\); got \(2, 3\)"),
        ({"tokens": torch.zeros(0, dtype=torch.long)}, r"tokens must be \(n,\); got \(0,\)"),
        ({"window": 17}, "window must be 1 to 16, the model's positions; got 17"),
        ({"window": 0}, "window must be 1 to 16, the model's positions; got 0"),
        ({"layer": 3}, "the model has layers 0 to 2; got 3"),
        ({"layer": -1}, "the model has layers 0 to 2; got -1"),
    ],
)
def test_a_layer_or_window_the_model_has_not_is_refused(bad, message):
    with pytest.raises(BadInput, match=message):
        layer_inputs(small_model(), **{"tokens": torch.arange(4), "layer": 0, "window": 16, **bad})


def test_the_long_text_is_python_of_260_kb():
    text = long_text()
    assert len(text.encode()) == 259_981 and text.count("\n    def ") > 100


def test_the_cost_of_a_call_is_the_most_it_held_at_once():
    one = 1000 * 4

    def three_of_which_two_at_once():
        a = torch.zeros(1000)
        b = a.clone()
        del a
        return b.clone()

    assert cost_of(three_of_which_two_at_once).peak_nbytes == 2 * one
    assert cost_of(lambda: None).peak_nbytes == 0
    assert cost_of(lambda: torch.zeros(1000)).seconds > 0
