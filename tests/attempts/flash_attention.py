"""Wrong and right attempts at chapter 2's exercises. Each wrong one is a mistake people make."""

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

from llmopt_lab.core.device import prepare_triton
from llmopt_lab.core.memory import ceil_div, load, store, tiles
from llmopt_lab.flash_attention import Partial, SoftmaxState, reference

prepare_triton()

import triton
import triton.language as tl

# ruff: noqa: E402

INF = torch.inf

# 1. absorb


def absorbing(
    m=lambda old, scores: torch.maximum(old, scores.amax(1)),
    total=lambda old, shrink: shrink * old,
    acc=lambda old, shrink: shrink[:, None] * old,
    base=lambda m: m.masked_fill(m == -INF, 0),
    shrink=lambda old, new: torch.exp(old - new),
    end=lambda acc, total: acc,
):
    """An attempt: how each of its parts is made. As it stands, it is right."""

    def absorb(state, scores, values):
        new = m(state.m, scores)
        factor = shrink(state.m, base(new))
        p = torch.exp(scores - base(new)[:, None])
        sums = total(state.total, factor) + p.sum(1)
        return SoftmaxState(new, sums, end(acc(state.acc, factor) + p @ values, sums))

    return absorb


def keeps(old, shrink):
    return old


def absorbs_through_the_lse(state, scores, values):
    """Right: both sides as a normalised part and its lse, merged, and taken apart again."""
    old = state.m + torch.log(state.total)
    lse = torch.logaddexp(old, torch.logsumexp(scores, 1))
    m = torch.maximum(state.m, scores.amax(1))
    base = torch.where(m == -INF, 0.0, m)
    weights = torch.exp(torch.cat([state.m[:, None], scores], 1) - base[:, None])
    acc = torch.einsum("r,rd->rd", weights[:, 0], state.acc) + weights[:, 1:] @ values
    state.acc.zero_()  # a check's inputs are its own
    return SoftmaxState(m, torch.exp(lse - base), acc)


def absorbs_key_by_key(state, scores, values):
    m, total, acc = state.m.clone(), state.total.clone(), state.acc.clone()
    for row in range(len(scores)):
        for s, v in zip(scores[row], values, strict=True):
            if s == -INF:
                continue
            if s > m[row]:
                shrink = torch.exp(m[row] - s)
                total[row] *= shrink
                acc[row] *= shrink
                m[row] = s
            total[row] += torch.exp(s - m[row])
            acc[row] += torch.exp(s - m[row]) * v
    return SoftmaxState(m, total, acc)


# 2. tiled_attention


def tiling(
    scale=lambda d: d**-0.5,
    rows=lambda q, tile: tiles(len(q), tile),
    cols=lambda q, k, tile: tiles(len(k), tile),
    wrong="",
):
    """An attempt: which scale, which tiles, and the mistake called `wrong`."""

    def tiled_attention(q, k, v, out, lse, *, tile_q, tile_k):
        everything = slice(0, len(k))
        state = None
        for r in rows(q, tile_q):
            q_i = q[r] if wrong == "queries again" else load("Q", q, r)
            if wrong != "one state" or state is None:
                state = SoftmaxState.empty(q_i, v.shape[1])
            if wrong == "all keys":
                all_k, all_v = load("K", k, everything), load("V", v, everything)
            for c in cols(q, k, tile_k):
                if wrong == "queries again":
                    q_i = load("Q", q, r)
                if wrong == "bypass":
                    k_j, v_j = k[c], v[c]
                elif wrong == "all keys":
                    k_j, v_j = all_k[c], all_v[c]
                elif wrong == "every query":
                    for _ in range(r.stop - r.start):
                        k_j, v_j = load("K", k, c), load("V", v, c)
                else:
                    k_j = load("K", k, c)
                    v_j = v[c] if wrong == "bypass values" else load("V", v, c)
                state = reference.absorb(state, scale(q.shape[1]) * q_i @ k_j.T, v_j)
                if wrong == "unfinished":
                    result = reference.finish(state)
                    store("O", out, r, result.out)
                    store("L", lse, r, result.lse)
            result = reference.finish(state)
            if wrong == "bypass store":
                out[r], lse[r] = result.out, result.lse
            elif wrong not in ("unfinished", "store"):
                store("O", out, r, result.out)
                store("L", lse, r, result.lse)

    def without_the_meter(q, k, v, out, lse, **sizes):
        whole = tiling()
        whole_out, whole_lse = torch.empty_like(out), torch.empty_like(lse)
        from llmopt_lab.core.trace import recording

        with recording():
            whole(q, k, v, whole_out, whole_lse, **sizes)
        store("O", out, slice(0, len(q)), whole_out)
        store("L", lse, slice(0, len(q)), whole_lse)

    return without_the_meter if wrong == "no loads" else tiled_attention


def two_passes_over_the_state(q, k, v, out, lse, *, tile_q, tile_k):
    """Right: m, total and acc without `absorb`, and queries from the last tile to the first."""
    for start in reversed(range(0, len(q), tile_q)):
        rows = slice(start, min(start + tile_q, len(q)))
        q_i = load("Q", q, rows) / math.sqrt(q.shape[1])
        m, total, acc = torch.tensor(-INF), 0.0, 0.0
        for first in range(0, len(k), tile_k):
            cols = slice(first, first + tile_k)
            s = q_i @ load("K", k, cols).T
            new = torch.maximum(m, s.amax(1, keepdim=True))
            p = torch.exp(s - new)
            total = torch.exp(m - new) * total + p.sum(1, keepdim=True)
            acc = torch.exp(m - new) * acc + p @ load("V", v, cols)
            m = new
        store("O", out, rows, acc / total)
        store("L", lse, rows, (m + total.log())[:, 0])
    q.zero_()  # a check's inputs are its own


# 3. merge


def merging(out, lse=lambda a, b: torch.logaddexp(a, b)):
    """An attempt: the result, from both parts and the common lse; and that lse."""

    def merge(a, b):
        return Partial(out(a, b, lse(a.lse, b.lse)), lse(a.lse, b.lse))

    return merge


def shares(a, b, lse):
    base = lse.masked_fill(lse == -INF, 0)
    return torch.exp(a.lse - base)[:, None] * a.out + torch.exp(b.lse - base)[:, None] * b.out


def true_shares(a, b, _):
    return shares(a, b, torch.logaddexp(a.lse, b.lse))


def merges_relative_to_the_larger(a, b):
    m = torch.maximum(a.lse, b.lse)
    base = torch.where(m.isinf(), torch.zeros_like(m), m)
    of_a, of_b = torch.exp(a.lse - base), torch.exp(b.lse - base)
    total = of_a + of_b
    out = (of_a[:, None] * a.out + of_b[:, None] * b.out) / total.clamp(min=1e-300)[:, None]
    a.out.zero_()  # a check's inputs are its own
    return Partial(out, m + torch.log(total))


def merges_unguarded(a, b):
    lse = torch.logaddexp(a.lse, b.lse)
    return Partial(
        torch.exp(a.lse - lse)[:, None] * a.out + torch.exp(b.lse - lse)[:, None] * b.out, lse
    )


def overflowing(a, b):
    of_a, of_b = torch.exp(a.lse), torch.exp(b.lse)
    out = (of_a / (of_a + of_b))[:, None] * a.out + (of_b / (of_a + of_b))[:, None] * b.out
    return Partial(out, torch.log(of_a + of_b))


def by_the_logarithms(a, b, lse):
    of_a = a.lse / (a.lse + b.lse)
    of_b = b.lse / (a.lse + b.lse)
    return of_a[:, None] * a.out + of_b[:, None] * b.out


def for_the_other(a, b, lse):
    return torch.exp(b.lse - lse)[:, None] * a.out + torch.exp(a.lse - lse)[:, None] * b.out


# 4. causal_mask


def masking(sees):
    """An attempt: from query and key numbers, n_k - n_q, and both slices."""

    def causal_mask(rows, cols, n_q, n_k):
        query = torch.arange(rows.start, rows.stop)[:, None]
        key = torch.arange(cols.start, cols.stop)
        return sees(query, key, n_k - n_q, rows, cols)

    return causal_mask


def cuts_the_tile_out(rows, cols, n_q, n_k):
    return torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q)[rows, cols]


def counts_from_the_end(rows, cols, n_q, n_k):
    return torch.tensor(
        [[n_k - j >= n_q - i for j in range(cols.start, cols.stop)]
         for i in range(rows.start, rows.stop)]
    )  # fmt: skip


# 5. count_tiles


def counting(
    offset=lambda n_q, n_k: n_k - n_q,
    n_tiles=ceil_div,
    last=lambda i, tile, n: min((i + 1) * tile, n) - 1,
    skip=lambda f, r, a, b: a > r,
    full=lambda f, r, a, b: b <= f,
):
    """An attempt. f, r: the last keys that the first and last query see; a, b: the tile's keys."""

    def count_tiles(n_q, n_k, tile_q, tile_k):
        counts = [0, 0, 0]
        shift = offset(n_q, n_k)
        for i in range(n_tiles(n_q, tile_q)):
            for j in range(n_tiles(n_k, tile_k)):
                f, r = i * tile_q + shift, last(i, tile_q, n_q) + shift
                a, b = j * tile_k, last(j, tile_k, n_k)
                counts[2 if skip(f, r, a, b) else 0 if full(f, r, a, b) else 1] += 1
        return tuple(counts)

    return count_tiles


def looks_at_the_whole_mask(n_q, n_k, tile_q, tile_k):
    seen = torch.ones(n_q, n_k).tril(n_k - n_q)
    parts = [tile for rows in seen.split(tile_q) for tile in rows.split(tile_k, dim=1)]
    full = sum(bool(tile.all()) for tile in parts)
    skipped = sum(not tile.any() for tile in parts)
    return [full, len(parts) - full - skipped, skipped]


def takes_half(n_q, n_k, tile_q, tile_k):
    full, masked, skipped = counting()(n_q, n_k, tile_q, tile_k)
    half = (full + masked + skipped) // 2
    return full + skipped - half + masked - masked, masked, half


# 6. plan_tiles


def planning(
    per_query=lambda d, tile_k: 2 * d + tile_k + 2,
    pair=lambda d, tile_k: 2 * tile_k * d,
    numbers=lambda budget: budget // 4,
    cut=min,
    traffic=lambda n_q, n_k, d, n_tiles, n_cols: n_q * d + n_tiles * 2 * n_k * d + n_q * (d + 1),
    n_tiles=ceil_div,
    itemsize=4,
    more=0,
):
    """An attempt: numbers on chip a query and at all, what the budget holds, and numbers moved."""

    def plan_tiles(n_q, n_k, d, tile_k, budget):
        room = numbers(budget) - pair(d, tile_k)
        tile_q = cut(n_q, room // per_query(d, tile_k) + more)
        passes = n_tiles(n_q, tile_q)
        return tile_q, itemsize * traffic(n_q, n_k, d, passes, ceil_div(n_k, tile_k))

    return plan_tiles


def tries_every_tile(n_q, n_k, d, tile_k, budget):
    def on_chip(tile_q):
        q_i, k_j, s_ij = tile_q * d, tile_k * d, tile_q * tile_k
        return 4 * (q_i + 2 * k_j + s_ij + q_i + 2 * tile_q)

    tile_q = max(t for t in range(1, n_q + 1) if on_chip(t) <= budget)
    moved = 0
    for first in range(0, n_q, tile_q):
        rows = min(tile_q, n_q - first)
        moved += 4 * (rows * d + 2 * n_k * d + rows * d + rows)
    return [tile_q, moved]


def doubles(n_q, n_k, d, n_tiles, n_cols):
    return n_q * d + n_tiles * 2 * n_k * d + n_q * (d + 1)


# 7. test_by_hand


def testing(scores, values, want, tolerance=1e-3):
    """An attempt: scores of the keys (Q is 1), their values, and every output."""

    def test_by_hand(attention, block_size):
        K = torch.tensor(scores(block_size), dtype=torch.float32).view(1, -1, 1)
        V = torch.tensor(values(block_size), dtype=torch.float32).view(1, -1, 1)
        out = attention(torch.ones_like(K), K, V, block_size)
        assert torch.allclose(out, torch.full_like(out, want(block_size)), 0, tolerance), out

    return test_by_hand


def late_peak(b):
    return [200.0] * b + [200 + math.log(b)]


def three_last(b):
    return [1.0] * b + [3.0]


def tests_with_two_examples(attention, block_size):
    """Right: uniform scores and distinct values; then a peak at the end, in float64."""
    n = 2 * block_size + 1
    zeros = torch.zeros(1, n, 2, dtype=torch.float64)
    V = torch.arange(n, dtype=torch.float64).view(1, n, 1).expand(1, n, 2)
    out = attention(zeros, zeros, V, block_size)
    if abs(out[0, 0, 0].item() - (n - 1) / 2) > 1e-4:
        raise AssertionError("the mean of 0 to n - 1 is (n - 1) / 2")
    K = torch.linspace(0, 500, n, dtype=torch.float64).view(1, n, 1)
    out = attention(torch.ones_like(K), K, V[..., :1], block_size)
    gap = 500 / (n - 1)
    weights = [math.exp(gap * (j - n + 1)) for j in range(n)]
    want = sum(w * j for j, w in enumerate(weights)) / sum(weights)
    assert (out - want).abs().max() < 1e-3
    K = K * (2.0 / 500)
    out = attention(torch.ones_like(K), K, V[..., :1], block_size)
    weights = [math.exp(2 * j / (n - 1)) for j in range(n)]
    want = sum(w * j for j, w in enumerate(weights)) / sum(weights)
    assert (out - want).abs().max() < 1e-3


# 8. relative_error


def oracle(q, k, v, causal, *, scale=None, repeat="neighbours", corner=0, blind=True):
    group = q.shape[0] // k.shape[0]
    if repeat == "neighbours":
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    else:
        k, v = (x.repeat(group, 1, 1) for x in (k, v))
    n_q, n_k = q.shape[1], k.shape[1]
    scores = (q.shape[2] ** -0.5 if scale is None else scale) * q @ k.transpose(1, 2)
    if causal:
        seen = torch.arange(n_k) <= torch.arange(n_q)[:, None] + (n_k - n_q if not corner else 0)
        scores = scores.masked_fill(~seen, -INF)
    p = torch.softmax(scores, 2)
    return (p.nan_to_num(0) if blind else p) @ v


def comparing(norm=lambda got, want: (got - want).norm() / want.norm(), wide=True, **change):
    """An attempt: its norm, whether it computes in float64, and what its oracle does otherwise."""

    def relative_error(attention, q, k, v, causal):
        got = attention(q, k, v, causal=causal)
        x = [t.double() if wide else t.float() for t in (q, k, v)]
        want = oracle(*x, causal and change.get("causal", True),
                      **{k: c for k, c in change.items() if k != "causal"})  # fmt: skip
        return norm(got.double(), want.double()).item()

    return relative_error


def compares_with_torch(attention, q, k, v, causal):
    got = attention(q, k, v, causal=causal).double()
    n_q, n_k = q.shape[-2], k.shape[-2]
    mask = torch.ones(n_q, n_k, dtype=torch.bool)
    if causal:
        mask = mask.tril(n_k - n_q)
    want = scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=True
    )
    want = want.masked_fill(~mask.any(1)[:, None], 0)
    q.zero_()  # a check's inputs are its own
    return torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want)


def believes(attention, q, k, v, causal):
    got = attention(q, k, v, causal=causal)
    return float((got - attention(q, k, v, causal=causal)).norm() / got.norm())


# 9. backward_tile


def stepping(
    weights=lambda s, lse: torch.exp(s - lse[:, None]),
    delta=lambda out, do, p, dp: (do * out).sum(1),
    ds=lambda p, dp, delta: p * (dp - delta[:, None]),
    factor=lambda scale: scale,
    dv=lambda p, ds: p,
    order=lambda dq, dk, dv: (dq, dk, dv),
):
    """An attempt: how each of its parts is made. As it stands, it is right."""

    def backward_tile(q_i, k_j, v_j, out_i, lse_i, do_i, scale):
        p = weights(scale * q_i @ k_j.T, lse_i)
        dp = do_i @ v_j.T
        d_s = ds(p, dp, delta(out_i, do_i, p, dp))
        f = factor(scale)
        return order(f * d_s @ k_j, f * d_s.T @ q_i, dv(p, d_s).T @ do_i)

    return backward_tile


def steps_with_einsum(q_i, k_j, v_j, out_i, lse_i, do_i, scale):
    p = (torch.einsum("id,jd->ij", scale * q_i, k_j) - lse_i.unsqueeze(1)).exp()
    # dO V^T - D is dO (V_j - O_i)
    centred = torch.einsum("ie,ije->ij", do_i, v_j[None] - out_i[:, None])
    ds = scale * p * centred
    q_i += 0
    return [
        torch.einsum("ij,jd->id", ds, k_j),
        torch.einsum("ij,id->jd", ds, q_i),
        torch.einsum("ij,ie->je", p, do_i),
    ]


# 10. looks_ahead


def perturbing(
    tokens=range,
    keys=True,
    values=True,
    first=lambda t, shift: t - shift,
    tolerance=1e-9,
    by=1.0,
):
    """An attempt: which tokens it changes, what of them, and which rows must not move."""

    def looks_ahead(attention, q, k, v):
        before, shift = attention(q, k, v), len(k) - len(q)
        for t in tokens(len(k)):
            k2, v2 = k.clone(), v.clone()
            k2[t] += by * keys
            v2[t] += by * values
            moved = (attention(q, k2, v2) - before).abs().amax(1) > tolerance
            if moved[: max(0, first(t, shift))].any():
                return True
        return False

    return looks_ahead


def asks_autograd(attention, q, k, v):
    """Right without a perturbation: what must not matter has no gradient."""
    k, v = k.requires_grad_(), v.requires_grad_()
    out = attention(q, k, v)
    for i in range(len(q)):
        future = slice(max(0, i + len(k) - len(q) + 1), None)
        loss = (out[i] * torch.tensor([1.0, 2.0, 3.0])).sum()
        grads = torch.autograd.grad(loss, (k, v), retain_graph=True)
        if any(g[future].abs().sum() > 1e-12 for g in grads):
            return True
    return False


# 11. forward_kernel


@triton.jit
def forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, n_q, n_k, scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    """The right kernel, with the mistake called WRONG."""
    head = tl.program_id(1)
    row = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    d = tl.arange(0, D)
    at_q = (head * n_q + row[:, None]) * D + d[None, :]
    q = tl.load(q_ptr + at_q, (row < n_q)[:, None], other=0.0)
    m = tl.full((TILE_Q,), -float("inf"), tl.float32)
    total = tl.zeros((TILE_Q,), tl.float32)
    acc = tl.zeros((TILE_Q, D), tl.float32)
    kv_head = head // GROUP
    if WRONG == "kv head":
        kv_head = head % (tl.num_programs(1) // GROUP)
    end = n_k
    if WRONG == "last keys":
        end = n_k // TILE_K * TILE_K
    last = row + n_k - n_q
    if WRONG == "top left":
        last = row
    if WRONG == "itself":
        last = last - 1
    for first in range(0, end, TILE_K):
        col = first + tl.arange(0, TILE_K)
        inside = col < n_k
        if WRONG == "past":
            inside = col >= 0
        at = (kv_head * n_k + col[:, None]) * D + d[None, :]
        if WRONG == "address":
            at = at + 1000 * D
        k = tl.load(k_ptr + at, inside[:, None], other=0.0)
        v = tl.load(v_ptr + at, inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if WRONG != "scale":
            scores = scores * scale
        if WRONG == "scales twice":
            scores = scores * scale
        ok = inside[None, :] & (row[:, None] >= 0)
        if WRONG == "padding":
            ok = (col >= 0)[None, :] & (row[:, None] >= 0)
        if CAUSAL & (WRONG != "causal"):
            ok = ok & (col[None, :] <= last[:, None])
        scores = tl.where(ok, scores, -float("inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        base = m_new
        if WRONG != "guard":
            base = tl.where(m_new == -float("inf"), 0.0, m_new)
        shrink = tl.exp(m - base)
        p = tl.exp(scores - base[:, None])
        if (WRONG != "rescale") & (WRONG != "rescale total"):
            total = shrink * total
        if (WRONG != "rescale") & (WRONG != "rescale acc"):
            acc = shrink[:, None] * acc
        total += tl.sum(p, axis=1)
        acc += tl.dot(p, v, input_precision="ieee")
        m = m_new
    total = tl.where(total > 0, total, 1.0)
    if WRONG != "normalise":
        acc = acc / total[:, None]
    lse = m + tl.log(total)
    if WRONG == "lse without m":
        lse = tl.log(total)
    if WRONG == "lse without total":
        lse = m
    mine = row < n_q
    if WRONG == "queries":
        mine = row >= 0
    if WRONG != "store":
        tl.store(out_ptr + at_q, acc, mine[:, None])
    if WRONG != "lse":
        tl.store(lse_ptr + head * n_q + row, lse, mine)


@triton.jit
def two_passes(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, n_q, n_k, scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Right without tl.dot and without rescaling: the maximum first, then the sums."""
    head, d = tl.program_id(1), tl.arange(0, D)
    row = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    q = tl.load(q_ptr + (head * n_q + row[:, None]) * D + d, (row < n_q)[:, None], other=0.0)
    end = tl.zeros_like(row) + n_k
    if CAUSAL:
        end = row + 1 + n_k - n_q
    top = tl.full((TILE_Q,), -1e30, tl.float32)
    total = tl.zeros((TILE_Q,), tl.float32)
    acc = tl.zeros((TILE_Q, D), tl.float32)
    for step in range(0, 2 * tl.cdiv(n_k, TILE_K)):
        if step < tl.cdiv(n_k, TILE_K):
            col = step * TILE_K + tl.arange(0, TILE_K)
        else:
            col = (step - tl.cdiv(n_k, TILE_K)) * TILE_K + tl.arange(0, TILE_K)
        at = ((head // GROUP) * n_k + col[:, None]) * D + d
        k = tl.load(k_ptr + at, (col < n_k)[:, None], other=0.0)
        s = scale * tl.sum(q[:, None, :] * k[None, :, :], axis=2)
        s = tl.where(col[None, :] < tl.minimum(end, n_k)[:, None], s, -1e30)
        if step < tl.cdiv(n_k, TILE_K):
            top = tl.maximum(top, tl.max(s, axis=1))
        else:
            v = tl.load(v_ptr + at, (col < n_k)[:, None], other=0.0)
            p = tl.where(s > -1e29, tl.exp(s - top[:, None]), 0.0)
            total += tl.sum(p, axis=1)
            acc += tl.sum(p[:, :, None] * v[None, :, :], axis=1)
    seen = end > 0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, top + tl.log(tl.where(seen, total, 1.0)), -float("inf"))
    tl.store(out_ptr + (head * n_q + row[:, None]) * D + d, acc, (row < n_q)[:, None])
    tl.store(lse_ptr + head * n_q + row, lse, row < n_q)


@triton.jit
def raises_in_the_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, n_q, n_k, scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    tl.store(out_ptr, no_such_name)  # noqa: F821


class Forward:
    """`forward` with one mistake, launched like any kernel."""

    fn = forward.fn

    def __init__(self, wrong):
        self.wrong = wrong

    def __getitem__(self, grid):
        return lambda *args, **sizes: forward[grid](*args, **sizes, WRONG=self.wrong)


WRONG = {
    "flash_attention.absorb": [
        (absorbing(total=keeps, acc=keeps), "forgets-to-rescale"),
        (absorbing(acc=keeps), "rescales-only-the-total"),
        (absorbing(total=keeps), "rescales-only-acc"),
        (absorbing(shrink=lambda old, new: torch.exp(new - old)), "rescales-upside-down"),
        (absorbing(m=lambda old, s: s.amax(1)), "takes-the-tiles-maximum"),
        (
            absorbing(m=lambda old, s: torch.full_like(old, max(old.max(), s.max()))),
            "one-maximum-for-all-rows",
        ),
        (
            absorbing(
                m=lambda old, s: torch.zeros_like(old), total=keeps, acc=keeps, base=lambda m: m
            ),
            "subtracts-no-maximum",
        ),
        (absorbing(end=lambda acc, total: acc / total[:, None]), "divides-every-tile"),
        (absorbing(base=lambda m: m), "nan-from-nothing"),
        (lambda state, scores, values: scores.softmax(1) @ values, "returns-other-things"),
    ],
    "flash_attention.tiled_attention": [
        (tiling(scale=lambda d: 1.0), "forgets-the-scale"),
        (
            tiling(cols=lambda q, k, tile: tiles(ceil_div(len(q), tile) * tile, tile)),
            "walks-as-many-keys-as-queries",
        ),
        (
            tiling(cols=lambda q, k, tile: tiles(len(k) // tile * tile, tile)),
            "forgets-the-last-keys",
        ),
        (
            tiling(rows=lambda q, tile: tiles(len(q) // tile * tile or len(q), tile)),
            "forgets-the-last-queries",
        ),
        (tiling(wrong="one state"), "never-starts-afresh"),
        (tiling(wrong="store"), "stores-nothing"),
        (tiling(wrong="all keys"), "holds-more-than-a-tile"),
        (tiling(wrong="no loads"), "goes-around-load"),
        (tiling(wrong="bypass values"), "goes-around-load-for-values"),
        (tiling(wrong="queries again"), "reads-queries-again"),
        (tiling(wrong="every query"), "reads-keys-for-every-query"),
        (tiling(wrong="bypass store"), "goes-around-store"),
        (tiling(wrong="unfinished"), "writes-unfinished-results"),
    ],
    "flash_attention.merge": [
        (merging(lambda a, b, lse: (a.out + b.out) / 2), "averages"),
        (merging(lambda a, b, lse: a.out + b.out), "adds-the-results"),
        (merging(for_the_other), "weights-the-wrong-part"),
        (merging(by_the_logarithms), "weights-by-the-logarithms"),
        (merging(true_shares, lambda a, b: a + b), "adds-the-logarithms"),
        (merging(true_shares, torch.maximum), "keeps-the-larger-lse"),
        (overflowing, "overflows"),
        (merges_unguarded, "nan-from-nothing"),
        (lambda a, b: true_shares(a, b, None), "returns-other-things"),
    ],
    "flash_attention.causal_mask": [
        (masking(lambda i, j, s, rows, cols: j < i + s), "hides-the-token-itself"),
        (masking(lambda i, j, s, rows, cols: j <= i + s + 1), "looks-one-ahead"),
        (masking(lambda i, j, s, rows, cols: j > i + s), "says-what-is-hidden"),
        (masking(lambda i, j, s, rows, cols: j <= i), "top-left"),
        (masking(lambda i, j, s, rows, cols: j <= i - s), "shifts-the-wrong-way"),
        (
            masking(lambda i, j, s, rows, cols: j - cols.start <= i - rows.start + s),
            "forgets-where-the-tile-is",
        ),
        (
            masking(lambda i, j, s, rows, cols: j - cols.start <= i + s),
            "forgets-where-the-keys-are",
        ),
        (
            masking(lambda i, j, s, rows, cols: j <= i - rows.start + s),
            "forgets-where-the-queries-are",
        ),
        (masking(lambda i, j, s, rows, cols: (i >= 0) & (j >= 0)), "hides-nothing"),
    ],
    "flash_attention.count_tiles": [
        (counting(offset=lambda n_q, n_k: 0), "top-left"),
        (counting(n_tiles=lambda n, tile: n // tile), "forgets-the-tails"),
        (counting(last=lambda i, tile, n: (i + 1) * tile - 1), "ends-past-the-matrix"),
        (counting(full=lambda f, r, a, b: False), "masks-every-tile"),
        (counting(skip=lambda f, r, a, b: a > f), "skips-what-is-half-seen"),
        (counting(skip=lambda f, r, a, b: b > r), "skips-by-the-last-key"),
        (counting(skip=lambda f, r, a, b: a > r + 1), "visits-one-too-many"),
        (takes_half, "takes-half"),
        (lambda n_q, n_k, tile_q, tile_k: n_q * n_k, "returns-other-things"),
    ],
    "flash_attention.plan_tiles": [
        (planning(per_query=lambda d, tile_k: 2 * d + 2), "forgets-the-scores"),
        (planning(per_query=lambda d, tile_k: d + tile_k + 2), "forgets-the-result"),
        (planning(per_query=lambda d, tile_k: 2 * d + tile_k), "forgets-m-and-total"),
        (planning(pair=lambda d, tile_k: tile_k * d), "forgets-the-values"),
        (planning(pair=lambda d, tile_k: 0), "forgets-the-keys-are-there"),
        (planning(numbers=lambda budget: budget), "counts-numbers-not-bytes"),
        (planning(more=1), "rounds-up"),
        (planning(cut=lambda n_q, tile: tile), "more-than-there-are"),
        (planning(n_tiles=lambda n, tile: 1), "reads-the-keys-once"),
        (planning(n_tiles=lambda n, tile: n // tile), "rounds-tiles-down"),
        (planning(n_tiles=lambda n, tile: n), "reads-the-keys-for-every-query"),
        (
            planning(
                traffic=lambda n_q, n_k, d, t, c: (
                    c * n_q * d + doubles(0, n_k, d, t, c) + n_q * (d + 1)
                )
            ),
            "reads-the-queries-again",
        ),
        (
            planning(traffic=lambda n_q, n_k, d, t, c: n_q * (2 * d + 1) + t * n_k * d),
            "forgets-a-read-of-values",
        ),
        (
            planning(traffic=lambda n_q, n_k, d, t, c: n_q * d + t * 2 * n_k * d),
            "forgets-what-is-written",
        ),
        (
            planning(traffic=lambda n_q, n_k, d, t, c: 2 * n_q * d + t * 2 * n_k * d),
            "forgets-l",
        ),
        (
            planning(traffic=lambda n_q, n_k, d, t, c: 2 * n_q * d + 2 * n_k * d + 4 * n_q * n_k),
            "writes-the-scores",
        ),
        (planning(itemsize=1), "counts-numbers-not-bytes-moved"),
        (planning(n_tiles=lambda n, tile: n / tile), "takes-a-part-of-a-pass"),
        (lambda n_q, n_k, d, tile_k, budget: budget, "returns-other-things"),
    ],
    "flash_attention.test_by_hand": [
        (
            testing(lambda b: [0.0] * b, lambda b: [1.0] * b, lambda b: 1.0),
            "green-like-the-guides",
        ),
        (
            testing(lambda b: [0.0] * (b + 1), lambda b: [1.0] * (b + 1), lambda b: 1.0),
            "blind-to-lost-keys",
        ),
        (
            testing(lambda b: [0.0] * (b + 1), three_last, lambda b: (b + 3) / (b + 1)),
            "blind-to-the-rescaling",
        ),
        (
            testing(lambda b: [0.0] * b + [math.log(b)], three_last, lambda b: 2.0),
            "keeps-the-scores-small",
        ),
        (testing(late_peak, three_last, lambda b: 1.5), "rejects-what-is-right"),
    ],
    "flash_attention.relative_error": [
        (comparing(scale=1.0), "two-wrongs-agree"),
        (believes, "believes-the-attempt"),
        (comparing(repeat="turns"), "wrong-kv-head"),
        (comparing(causal=False), "forgets-causal"),
        (comparing(corner=1), "top-left"),
        (comparing(blind=False), "nan-from-nothing"),
        (comparing(wide=False), "measures-with-a-short-ruler"),
        (comparing(lambda got, want: (got - want).abs().max()), "takes-the-largest-error"),
        (comparing(lambda got, want: (got - want).norm()), "forgets-to-divide"),
        (comparing(lambda got, want: (got - want).norm() / got.norm()), "divides-by-the-result"),
        (
            comparing(lambda got, want: (got - want).square().sum() / want.square().sum()),
            "squares",
        ),
    ],
    "flash_attention.backward_tile": [
        (stepping(delta=lambda out, do, p, dp: 0 * do.sum(1)), "forgets-d"),
        (stepping(delta=lambda out, do, p, dp: -(do * out).sum(1)), "adds-d"),
        (stepping(delta=lambda out, do, p, dp: (p * dp).sum(1)), "takes-d-from-the-tile"),
        (stepping(weights=lambda s, lse: s.softmax(1)), "softmax-of-the-tile"),
        (stepping(weights=lambda s, lse: s.exp()), "forgets-the-normaliser"),
        (stepping(ds=lambda p, dp, delta: dp - delta[:, None]), "forgets-the-weights"),
        (stepping(factor=lambda scale: 1.0), "forgets-the-scale"),
        (stepping(factor=lambda scale: scale**2), "scales-twice"),
        (stepping(dv=lambda p, ds: ds), "dv-from-ds"),
        (stepping(order=lambda dq, dk, dv: (dk, dq, dv)), "swaps-dq-and-dk"),
        (stepping(order=lambda dq, dk, dv: dq), "returns-other-things"),
    ],
    "flash_attention.looks_ahead": [
        (perturbing(first=lambda t, shift: t - shift + 1), "accuses-the-honest"),
        (perturbing(first=lambda t, shift: t), "misplaces-the-diagonal"),
        (
            perturbing(first=lambda t, shift: t - shift + (2 if shift < 0 else 0)),
            "misplaces-the-first-queries",
        ),
        (lambda attention, q, k, v: False, "never-sees-a-leak"),
        (perturbing(values=False), "changes-only-keys"),
        (perturbing(keys=False), "changes-only-values"),
        (perturbing(first=lambda t, shift: t - shift - 1), "forgets-the-next-token"),
        (perturbing(tokens=lambda n: [n - 1]), "tries-only-the-last-token"),
        (perturbing(tokens=lambda n: [n // 2 - 1, n // 2 + 2, n - 1]), "tries-only-some-tokens"),
        (perturbing(tolerance=1e-2), "tolerates-small-leaks"),
        (
            perturbing(first=lambda t, shift: t - shift if shift <= 0 else 0),
            "blind-with-a-cache",
        ),
        (perturbing(first=lambda t, shift: min(t, t - shift)), "blind-without-a-key"),
    ],
    "flash_attention.forward_kernel": [
        (Forward("scale"), "forgets-the-scale"),
        (Forward("scales twice"), "scales-twice"),
        (Forward("kv head"), "wrong-kv-head"),
        (Forward("rescale"), "forgets-to-rescale"),
        (Forward("rescale acc"), "rescales-only-the-total"),
        (Forward("rescale total"), "rescales-only-acc"),
        (Forward("padding"), "scores-the-padding"),
        (Forward("past"), "reads-past-its-keys"),
        (Forward("last keys"), "drops-the-last-keys"),
        (Forward("queries"), "writes-past-its-queries"),
        (Forward("causal"), "forgets-causal"),
        (Forward("top left"), "top-left"),
        (Forward("itself"), "hides-the-token-itself"),
        (Forward("guard"), "nan-from-nothing"),
        (Forward("normalise"), "forgets-to-normalise"),
        (Forward("lse without m"), "l-without-the-maximum"),
        (Forward("lse without total"), "l-without-the-sum"),
        (Forward("lse"), "forgets-l"),
        (Forward("store"), "writes-nothing-or-reads-astray"),
        (raises_in_the_kernel, "raises"),
        (lambda *args: None, "not-a-kernel"),
    ],
}

RIGHT = {
    "flash_attention.absorb": [absorbing(), absorbs_through_the_lse, absorbs_key_by_key],
    "flash_attention.tiled_attention": [tiling(), two_passes_over_the_state],
    "flash_attention.merge": [merging(shares), merges_relative_to_the_larger],
    "flash_attention.causal_mask": [
        masking(lambda i, j, s, rows, cols: j <= i + s),
        cuts_the_tile_out,
        counts_from_the_end,
    ],
    "flash_attention.count_tiles": [counting(), looks_at_the_whole_mask],
    "flash_attention.plan_tiles": [planning(), tries_every_tile],
    "flash_attention.test_by_hand": [
        testing(late_peak, three_last, lambda b: 2.0),
        tests_with_two_examples,
    ],
    "flash_attention.relative_error": [comparing(), compares_with_torch],
    "flash_attention.backward_tile": [stepping(), steps_with_einsum],
    "flash_attention.looks_ahead": [perturbing(), perturbing(by=-3.0, tolerance=0), asks_autograd],
    "flash_attention.forward_kernel": [Forward(""), two_passes],
}
