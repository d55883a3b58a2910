"""Blocks chosen by content, and the three branches of NSA, against loops over single queries."""

import pytest
import torch

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.trace import recording
from llmopt_lab.sparse_attention import sparse_attention
from llmopt_lab.sparse_attention.cases import Sizes, attention_inputs, attention_oracle
from llmopt_lab.sparse_attention.nsa import nsa_attention
from llmopt_lab.sparse_attention.patterns import Causal, SlidingWindow, streaming
from llmopt_lab.sparse_attention.records import Selected
from llmopt_lab.sparse_attention.select import (
    SCORES,
    block_means,
    mean_scores,
    quest_scores,
    top_blocks,
)

SIZES = Sizes(37, 50, 8, 6, batch=2, n_heads=4, n_kv_heads=2)


def test_the_mean_of_a_short_last_block_is_over_its_own_rows():
    x = torch.arange(14.0).view(7, 2)
    assert torch.equal(block_means(x, 3), torch.stack([x[:3].mean(0), x[3:6].mean(0), x[6]]))


def test_mean_scores_are_those_of_mean_queries_and_mean_keys():
    q, k, _ = attention_inputs(SIZES)
    scores = mean_scores(q, k, 5, 7)
    assert scores.shape == (2, 2, 8, 8)
    rows, cols = slice(35, 37), slice(49, 50)
    want = (q[1, 2:4, rows].mean(1).sum(0) * k[1, 1, cols].mean(0)).sum()
    assert_close(scores[1, 1, 7, 7], want)


def test_quest_scores_are_a_bound_and_exact_for_blocks_of_one_key():
    q, k, _ = attention_inputs(SIZES)
    grouped = q.unflatten(1, (2, 2))
    dots = (grouped @ k[:, :, None].mT).amax(2)  # (batch, n_kv_heads, n_q, n_k)
    assert_close(quest_scores(q, k, 1, 1), dots)
    bound = quest_scores(q, k, 5, 7)
    for i, rows in enumerate(dots.split(5, 2)):
        for j, block in enumerate(rows.split(7, 3)):
            assert (bound[:, :, i, j] >= block.amax((2, 3)) - 1e-12).all()


@pytest.mark.parametrize("score", SCORES)
def test_the_best_blocks_are_taken_among_those_that_may_be_seen(score):
    q, k, v = attention_inputs(SIZES)
    with recording(Selected) as trace:
        lists = top_blocks(q, k, Causal(), n_blocks=3, tile_q=5, tile_k=7, score=score)
    live, scores = lists.live(), SCORES[score](q, k, 5, 7)
    may = torch.zeros(8, 8, dtype=torch.bool)
    for i, rows in enumerate(Causal().mask(37, 50).split(5)):
        for j, block in enumerate(rows.split(7, 1)):
            may[i, j] = block.any()
    for kv_head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for i in range(8):
            seen = [j for j in range(8) if may[i, j]]
            best = sorted(seen, key=lambda j: -scores[(*kv_head, i, j)])[:3]  # noqa: B023
            assert set(live[(*kv_head, i)].nonzero()[:, 0].tolist()) == set(best)
    assert torch.equal(trace.of(Selected)[0].chosen, live)
    token = live.repeat_interleave(5, -2)[..., :37, :].repeat_interleave(7, -1)[..., :50]
    mask = (token & Causal().mask(37, 50)).repeat_interleave(2, 1)
    assert_close(sparse_attention(q, k, v, Causal(), lists=lists), attention_oracle(q, k, v, mask))


def test_what_is_always_kept_does_not_count_against_the_number():
    q, k, _ = attention_inputs(SIZES)
    kept = streaming(5, 2)
    live = top_blocks(q, k, Causal(), n_blocks=1, tile_q=5, tile_k=5, always=kept).live()
    alone = torch.stack(
        [
            torch.stack([block.any() for block in rows.split(5, 1)])
            for rows in kept.mask(37, 50).split(5)
        ]
    )
    assert (live & alone).sum() == 4 * alone.sum()
    may = 3 + torch.arange(8).clamp(max=7) + 1  # blocks of a row up to its own
    want = torch.minimum(may.clamp(max=10), alone.sum(1) + 1)
    assert torch.equal((live.sum(-1) - want).abs().amax((0, 1)), torch.zeros(8, dtype=torch.int64))


def test_all_blocks_give_dense_attention():
    q, k, v = attention_inputs(SIZES)
    lists = top_blocks(q, k, Causal(), n_blocks=99, tile_q=5, tile_k=7)
    want = attention_oracle(q, k, v, Causal().mask(37, 50))
    assert_close(sparse_attention(q, k, v, Causal(), lists=lists), want)


def test_a_choice_that_cannot_be_made_is_refused():
    q, k, _ = attention_inputs(SIZES)
    for call, message in [
        (lambda: top_blocks(q, k, Causal(), n_blocks=0), "n_blocks must be positive"),
        (lambda: top_blocks(q, k, Causal(), n_blocks=1, score="max"), "one of mean, quest"),
        (lambda: top_blocks(q[0, 0], k[0, 0], Causal(), n_blocks=1), "heads, n, d_head"),
        (lambda: top_blocks(q, k, Causal(), n_blocks=1, tile_k=0), "tile_k must be"),
    ]:
        with pytest.raises(BadInput, match=message):
            call()


# --- NSA


def nsa_loop(q, k, v, gates, *, block, stride, select_block, n_select, window, scale):
    """The oracle: one query of one head at a time, in plain loops over Python lists."""
    n_heads, n, _ = q.shape
    group = n_heads // k[0].shape[0]
    out = torch.zeros(n_heads, n, v[0].shape[-1], dtype=q.dtype)

    def attend(query, keys, values):
        if len(keys) == 0:
            return torch.zeros(v[0].shape[-1], dtype=q.dtype), []
        p = (scale * keys @ query).softmax(0)
        return p @ values, p.tolist()

    for kv_head in range(k[0].shape[0]):
        heads = range(kv_head * group, (kv_head + 1) * group)
        for t in range(n):
            starts = [s for s in range(0, n, stride) if s + block - 1 <= t]
            means = [
                [x[0][kv_head, s : s + block].mean(0) for s in starts] for x in (k, v)
            ]  # keys, values
            worth = [0.0] * (t // select_block + 1)
            for head in heads:
                keys, values = (torch.stack(m) if m else torch.empty(0, 1) for m in means)
                near, p = attend(q[head, t], keys, values)
                out[head, t] += gates[head, t, 0] * near
                for s, probability in zip(starts, p, strict=True):
                    for chunk in range(s, s + block, stride):  # one share for every chunk
                        if chunk // select_block < len(worth):
                            worth[chunk // select_block] += probability
            own = t // select_block
            order = sorted(range(own + 1), key=lambda j: (j not in (0, own, own - 1), -worth[j]))  # noqa: B023
            tokens = sorted(
                u
                for j in order[:n_select]
                for u in range(j * select_block, (j + 1) * select_block)
                if u <= t
            )
            for head in heads:
                chosen, _ = attend(q[head, t], k[1][kv_head, tokens], v[1][kv_head, tokens])
                local = slice(max(0, t - window + 1), t + 1)
                last, _ = attend(q[head, t], k[2][kv_head, local], v[2][kv_head, local])
                out[head, t] += gates[head, t, 1] * chosen + gates[head, t, 2] * last
    return out


@pytest.mark.parametrize(
    "sizes",
    [
        {"block": 4, "stride": 2, "select_block": 6, "n_select": 4, "window": 5},
        {"block": 4, "stride": 4, "select_block": 8, "n_select": 3, "window": 1},
        {"block": 8, "stride": 2, "select_block": 4, "n_select": 5, "window": 40},
        {"block": 64, "stride": 16, "select_block": 16, "n_select": 2, "window": 7},  # none whole
    ],
    ids=str,
)
def test_nsa_is_the_sum_of_its_gated_branches(sizes):
    rng = torch.Generator().manual_seed(7)
    branches = [
        attention_inputs(Sizes(45, 45, 8, 6, n_heads=4, n_kv_heads=2), seed=seed)
        for seed in range(3)
    ]
    q = branches[0][0]
    k, v = (tuple(branch[i] for branch in branches) for i in (1, 2))
    gates = torch.rand(*q.shape[:-1], 3, generator=rng, dtype=q.dtype)
    got = nsa_attention(q, k, v, gates, scale=0.3, **sizes)
    want = nsa_loop(q[0], [x[0] for x in k], [x[0] for x in v], gates[0], scale=0.3, **sizes)
    assert_close(got[0], want)


def test_nsa_cannot_look_ahead_and_has_gradients():
    q, k, v = (x.requires_grad_() for x in attention_inputs(Sizes(33, 33, 8, 8, n_heads=2)))
    gates = torch.full((1, 2, 33, 3), 0.5, dtype=q.dtype, requires_grad=True)
    sizes = {"block": 4, "stride": 2, "select_block": 4, "n_select": 3, "window": 6}
    out = nsa_attention(q, k, v, gates, **sizes)
    out[:, :, :20].square().sum().backward()
    for x in (q, k, v, gates):
        assert x.grad.isfinite().all() and x.grad[:, :, :20].any()
        assert not x.grad[:, :, 20:].any()


def test_nsa_with_the_window_alone_is_the_window():
    q, k, v = attention_inputs(Sizes(20, 20, 8, 8, n_heads=2))
    gates = torch.zeros(1, 2, 20, 3, dtype=q.dtype)
    gates[..., 2] = 1
    out = nsa_attention(q, k, v, gates, block=4, stride=2, select_block=4, n_select=3, window=6)
    assert_close(out, attention_oracle(q, k, v, SlidingWindow(6).mask(20, 20)))


def test_nsa_refuses_what_does_not_fit():
    q, k, v = attention_inputs(Sizes(20, 20, 8, 8, n_heads=2))
    gates = torch.zeros(1, 2, 20, 3, dtype=q.dtype)
    for change, message in [
        ({"stride": 3}, "stride must divide"),
        ({"window": 0}, "window must be a positive int"),
        ({"gates": gates[..., :2]}, "gates must be"),
        ({"k": k[:, :, :9], "v": v[:, :, :9]}, "n the same"),
    ]:
        with pytest.raises(BadInput, match=message):
            nsa_attention(**{"q": q, "k": k, "v": v, "gates": gates} | change)
