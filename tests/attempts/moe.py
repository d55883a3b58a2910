"""Wrong and right attempts at chapter 3's exercises. Each wrong one is a mistake people make."""

import math
from itertools import product

import torch
from torch import Tensor

from llmopt_lab.core.device import prepare_triton
from llmopt_lab.core.memory import load, store
from llmopt_lab.moe import reference

prepare_triton()

import triton
import triton.language as tl

# ruff: noqa: E402


def counted(experts: Tensor, n_experts: int) -> Tensor:
    return torch.bincount(experts.flatten(), minlength=n_experts)


# 1. balance_loss


def balancing(
    share=lambda p, experts: counted(experts, p.shape[1]) / experts.numel(),
    mean=lambda p: p.mean(0),
    end=lambda f, p, n: n * (f * p).sum(),
):
    """An attempt: f, P, and the loss made of them. As it stands, it is right."""

    def balance_loss(probabilities, experts):
        f, p = share(probabilities, experts), mean(probabilities)
        return end(f, p, probabilities.shape[1])

    return balance_loss


def balances_token_by_token(probabilities, experts):
    """Right: every visit adds the mean probability of its expert."""
    loss = 0.0
    for e in experts.flatten().tolist():
        loss = loss + probabilities[:, e].mean()
    return loss * probabilities.shape[1] / experts.numel()


def balances_with_one_hot(probabilities, experts):
    n = probabilities.shape[1]
    f = torch.nn.functional.one_hot(experts, n).float().mean((0, 1))
    loss = n * torch.einsum("e,te->", f, probabilities) / len(probabilities)
    experts.zero_()  # a check's inputs are its own
    return loss


def soft_share(p, experts):
    return torch.zeros_like(p).scatter(1, experts, p.gather(1, experts)).mean(0)


# 2. by_hand

LOSS, SLOPE, COLLAPSED = 1.2625, 0.25, 2.0


def answers(loss=LOSS, slope=SLOPE, collapsed=COLLAPSED):
    return lambda: (loss, slope, collapsed)


def asks_autograd():
    p = torch.tensor([[5, 3, 1, 1], [2, 6, 1, 1], [1, 5, 3, 1], [6, 1, 2, 1]]) / 10
    p.requires_grad_()
    f = torch.tensor([3, 3, 2, 0]) / 8
    loss = 4 * (f * p.mean(0)).sum()
    loss.backward()
    return [loss.item(), p.grad[0, 2], 4 * (0.5 * 0.5) * 2]


# 3. route


def routing(
    score=lambda logits: logits.softmax(1),
    choose=lambda s, k: s.sort(dim=1, descending=True, stable=True).indices[:, :k],
    weigh=lambda s, experts: s.gather(1, experts),
    normalise=lambda w, k: w / w.sum(1, keepdim=True) if k > 1 else w,
):
    """An attempt: scores, choice, weights and what becomes of them. As it stands, it is right."""

    def route(logits, k):
        scores = score(logits)
        experts = choose(scores, k)
        return experts, normalise(weigh(scores, experts), k)

    return route


def routes_over_the_chosen(logits, k):
    """Right: k times the first largest, and a softmax over the chosen logits."""
    left, experts = logits.detach().clone(), []
    for _ in range(k):
        best = left.argmax(1, keepdim=True)  # the first of equal ones
        experts.append(best)
        left.scatter_(1, best, -torch.inf)
    experts = torch.cat(experts, 1)
    if k == 1:
        return [experts, logits.softmax(1).gather(1, experts)]
    return [experts, logits.gather(1, experts).softmax(1)]


def always(w, k):
    return w / w.sum(1, keepdim=True)


def last_of_equals(s, k):
    return s.shape[1] - 1 - s.flip(1).sort(dim=1, descending=True, stable=True).indices[:, :k]


def the_largest_only(s, k):
    return s.argmax(1, keepdim=True).expand(-1, k)


# 4. mixture


def mixing(
    visitors=lambda mask: mask.any(-1),
    weight=lambda probs, mask, visitors: probs[mask],
    start=torch.zeros_like,
    add=True,
    inside=False,
):
    """An attempt: who visits, and with which weight. As it stands, it is right."""

    def mixture(x, top_k_probs, top_k_indices, experts):
        output = start(x)
        for e, expert in enumerate(experts):
            mask = top_k_indices == e
            rows = visitors(mask)
            if not rows.any():
                continue
            w = weight(top_k_probs, mask, rows).unsqueeze(-1)
            visit = expert(w * x[rows]) if inside else w * expert(x[rows])
            output[rows] = output[rows] + visit if add else visit
        return output

    return mixture


def guides_mixture(x, top_k_probs, top_k_indices, experts):
    output = torch.zeros_like(x)
    for expert_id in range(len(experts)):
        expert_mask = top_k_indices == expert_id
        if expert_mask.any():
            expert_input = x[expert_mask]
            expert_output = experts[expert_id](expert_input)
            expert_probs = top_k_probs[expert_mask]
            output[expert_mask] += expert_output * expert_probs.unsqueeze(-1)
    return output


def mixes_by_index_add(x, top_k_probs, top_k_indices, experts):
    d, k = x.shape[-1], top_k_probs.shape[-1]
    rows, out = x.reshape(-1, d), torch.zeros_like(x).view(-1, d)
    indices, probs = top_k_indices.reshape(-1, k), top_k_probs.reshape(-1, k)
    for e in range(len(experts)):
        token, choice = torch.where(indices == e)
        out.index_add_(0, token, experts[e](rows[token]) * probs[token, choice, None])
    return out.view_as(x)


def mixes_visit_by_visit(x, top_k_probs, top_k_indices, experts):
    out = torch.zeros_like(x)
    for b, t, j in product(*(range(n) for n in top_k_probs.shape)):
        expert = experts[int(top_k_indices[b, t, j])]
        out[b, t] += top_k_probs[b, t, j] * expert(x[b, t][None])[0]
    return out


def mixes_densely(x, top_k_probs, top_k_indices, experts):
    out = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        w = (top_k_probs * (top_k_indices == e)).sum(-1, keepdim=True)
        out += w * expert(x)
    return out


# 5. group


def grouping(
    flat=lambda experts: experts.flatten(),
    sort=lambda visits: visits.argsort(stable=True),
    inverse=lambda order: order.argsort(),
    starts=lambda counts: torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
    counts=counted,
    end=lambda order, place, starts, k: (order, place, starts),
):
    """An attempt: how each of its parts is made. As it stands, it is right."""

    def group(experts, n_experts):
        order = sort(flat(experts))
        ranges = starts(counts(experts, n_experts))
        return end(order, inverse(order), ranges, experts.shape[1])

    return group


def groups_with_lists(experts, n_experts):
    """Right: one list an expert."""
    lists = [[] for _ in range(n_experts)]
    for visit, e in enumerate(experts.flatten().tolist()):
        lists[e].append(visit)
    order = [visit for part in lists for visit in part]
    starts = [sum(map(len, lists[:e])) for e in range(n_experts + 1)]
    place = [order.index(visit) for visit in range(len(order))]
    experts.zero_()  # a check's inputs are its own
    return [torch.tensor(x) for x in (order, place, starts)]


def groups_by_counting(experts, n_experts):
    """Right: a counting sort; place first, order from it."""
    visits = experts.flatten()
    hot = (visits[:, None] == torch.arange(n_experts)).int()
    before = (hot.cumsum(0) - hot).gather(1, visits[:, None])[:, 0]
    starts = torch.zeros(n_experts + 1, dtype=torch.int64)
    starts[1:] = hot.sum(0).cumsum(0)
    place = starts[visits] + before
    order = torch.empty_like(place).scatter_(0, place, torch.arange(len(place)))
    return order, place, starts


def backwards(visits):
    return len(visits) - 1 - visits.flip(0).argsort(stable=True)


# 6. moe_layer


def layering(wrong=""):
    """An attempt with the mistake called `wrong`."""

    def moe_layer(x, experts, weights, w_gate_up, w_down, y, out):
        (n, k), n_experts = experts.shape, len(w_gate_up)
        g = reference.group(experts, n_experts)
        starts = g.starts.tolist()
        total = torch.zeros_like(x)
        for e in range(n_experts):
            start, end = starts[e], starts[e + 1]
            if start == end and wrong != "all experts":
                continue
            of = (e + 1) % n_experts if wrong == "next expert" else e
            if wrong == "bypass weights":
                gate_up, down = w_gate_up[of], w_down[of]
            else:
                gate_up, down = load("W_gate_up", w_gate_up, of), load("W_down", w_down, of)
            if wrong == "every visit":
                for _ in range(end - start - 1):
                    load("W_gate_up", w_gate_up, of)
                    load("W_down", w_down, of)
            tokens = g.order[start:end]
            tokens = tokens if wrong == "visits" else tokens // k
            if wrong == "remainder":
                tokens = g.order[start:end] % n
            if wrong == "every token":
                rows = load("X", x, slice(0, n))[tokens]
            else:
                rows = x[tokens] if wrong == "bypass x" else load("X", x, tokens)
            made = reference.swiglu(rows, gate_up, down)
            if wrong == "sorted weights":
                made = made * weights.flatten()[start:end, None]
            if wrong == "bypass y store":
                y[start:end] = made
            else:
                store("Y", y, slice(start, end), made)
        place = {"order": g.order, "sorted": torch.arange(n * k)}.get(wrong, g.place).view(n, k)
        for j in range(k):
            if wrong in ("bypass x and y", "bypass y"):
                row = y[place[:, j]]
            else:
                row = load("Y", y, place[:, j])
            w = weights[:, j, None]
            if wrong in ("unweighted", "sorted weights"):
                w = 1
            total = w * row if wrong == "last" else total + w * row
            if wrong == "every choice":
                store("out", out, slice(0, n), total)
        if wrong == "mean":
            total = total / k
        if wrong == "bypass out store":
            out[:] = total
        elif wrong not in ("nothing", "every choice"):
            store("out", out, slice(0, n), total)

    def without_the_meter(*given):
        from llmopt_lab.core.trace import recording

        with recording():
            layering("")(*given)

    return without_the_meter if wrong == "no loads" else moe_layer


def reads_only_weights(x, experts, weights, w_gate_up, w_down, y, out):
    g, (n, k) = reference.group(experts, len(w_gate_up)), experts.shape
    for e in experts.unique().tolist():
        here = slice(int(g.starts[e]), int(g.starts[e + 1]))
        gate_up, down = load("W_gate_up", w_gate_up, e), load("W_down", w_down, e)
        store("Y", y, here, reference.swiglu(x[g.order[here] // k], gate_up, down))
    rows = y[g.place].view(n, k, -1)
    store("out", out, slice(0, n), (weights[..., None] * rows).sum(1))


def adds_in_sorted_order(x, experts, weights, w_gate_up, w_down, y, out):
    """Right: weighted in sorted order, experts from the last to the first, added by index_add."""
    k = experts.shape[1]
    g = reference.group(experts, len(w_gate_up))
    for e in reversed(range(len(w_gate_up))):
        here = slice(int(g.starts[e]), int(g.starts[e + 1]))
        if here.start < here.stop:
            rows = load("X", x, g.order[here] // k)
            hidden = rows @ load("W_gate_up", w_gate_up, e)
            gate, up = hidden.chunk(2, dim=1)
            rows = (torch.nn.functional.silu(gate) * up) @ load("W_down", w_down, e)
            store("Y", y, here, weights.flatten()[g.order[here], None] * rows)
    everything = load("Y", y, slice(0, len(y)))
    total = torch.zeros_like(x).index_add(0, g.order // k, everything)
    store("out", out, slice(0, len(x)), total)
    x.zero_()  # a check's inputs are its own


def walks_token_by_token(x, experts, weights, w_gate_up, w_down, y, out):
    """Right: the second loop over tokens."""
    (n, k), g = experts.shape, reference.group(experts, len(w_gate_up))
    for e in experts.unique().tolist():
        here = slice(int(g.starts[e]), int(g.starts[e + 1]))
        gate_up, down = load("W_gate_up", w_gate_up, e), load("W_down", w_down, e)
        store("Y", y, here, reference.swiglu(load("X", x, g.order[here] // k), gate_up, down))
    for t in range(n):
        rows = load("Y", y, g.place[t * k : (t + 1) * k])
        store("out", out, t, weights[t] @ rows)


# 7. kept_visits


def keeping(
    capacity=lambda n, k, e, factor: math.ceil(factor * n * k / e),
    queue=lambda n, k: [(t, j) for j in range(k) for t in range(n)],
    fits=lambda taken, capacity: taken < capacity,
    anew=False,
    end=lambda kept: kept,
    closes=False,
):
    """An attempt: the capacity, who comes when, and who fits. As it stands, it is right."""

    def kept_visits(experts, n_experts, factor):
        n, k = experts.shape
        room, taken, full = capacity(n, k, n_experts, factor), [0] * n_experts, False
        kept = torch.zeros(n, k, dtype=torch.bool)
        for i, (t, j) in enumerate(queue(n, k)):
            if anew and i % n == 0:
                taken = [0] * n_experts
            e = int(experts[t, j])
            ok = fits(taken[e], room)
            full = full or not ok
            kept[t, j] = ok and not (closes and full)
            taken[e] += 1
        return end(kept)

    return kept_visits


def keeps_by_sorting(experts, n_experts, factor):
    """Right: the rank of a visit is its sorted place minus its expert's first."""
    n, k = experts.shape
    in_turn = experts.T.reshape(-1)
    order = in_turn.argsort(stable=True)
    starts = torch.bincount(in_turn, minlength=n_experts).cumsum(0)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), starts])[:-1]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(n * k) - starts[in_turn[order]]
    return (rank < math.ceil(factor * n * k / n_experts)).reshape(k, n).T


def keeps_expert_by_expert(experts, n_experts, factor):
    n, k = experts.shape
    kept = torch.zeros(k * n, dtype=torch.bool)
    for e in range(n_experts):
        here = (experts.T.reshape(-1) == e).nonzero()[:, 0]
        kept[here[: -int(-factor * n * k // n_experts)]] = True
    experts.zero_()  # a check's inputs are its own
    return kept.view(k, n).T.clone()


# 8. read_per_step


def reading(
    touched=lambda n, e, k: e * (1 - (1 - k / e) ** n),
    nbytes=lambda touched, n, e, k, one: touched * 6 * one,
):
    """An attempt: distinct experts, and bytes. As it stands, it is right."""

    def read_per_step(n_tokens, n_experts, k, d, d_ff):
        distinct = touched(n_tokens, n_experts, k)
        return distinct, nbytes(distinct, n_tokens, n_experts, k, d * d_ff)

    return read_per_step


def reads_step_by_step(n_tokens, n_experts, k, d, d_ff):
    """Right: each token finds the share of new experts that is still left."""
    touched = 0.0
    for _ in range(n_tokens):
        touched += k * (n_experts - touched) / n_experts
    return [touched, 2 * touched * (d * 2 * d_ff + d_ff * d)]


def reads_by_binomials(n_tokens, n_experts, k, d, d_ff):
    """Right: a token misses an expert in C(n - 1, k) of C(n, k) choices."""
    miss = math.comb(n_experts - 1, k) / math.comb(n_experts, k)
    touched = n_experts - n_experts * miss**n_tokens
    return touched, touched * d * d_ff * 3 * 2


# 9. bias_step


def stepping(
    choose=lambda scores, bias: scores + bias,
    weigh=lambda scores, bias: scores,
    normalise=lambda w: w / w.sum(1, keepdim=True),
    load=lambda experts, scores, k: experts,
    move=lambda counts: torch.sign(counts.mean() - counts),
    old=lambda bias: bias,
):
    """An attempt: how each of its parts is made. As it stands, it is right."""

    def bias_step(scores, bias, k, rate):
        experts = choose(scores, bias).topk(k, dim=1).indices
        weights = normalise(weigh(scores, bias).gather(1, experts))
        counts = counted(load(experts, scores, k), scores.shape[1]).float()
        return experts, weights, old(bias) + rate * move(counts)

    return bias_step


def steps_with_loops(scores, bias, k, rate):
    n_tokens, n_experts = scores.shape
    liked = (scores + bias).detach().argsort(1, descending=True)[:, :k]
    counts = [int((liked == e).sum()) for e in range(n_experts)]
    moved = bias.clone()
    for e, n in enumerate(counts):
        if n * n_experts > n_tokens * k:
            moved[e] -= rate
        elif n * n_experts < n_tokens * k:
            moved[e] += rate
    chosen = torch.zeros_like(scores).scatter(1, liked, 1.0) * scores
    weights = (chosen / chosen.sum(1, keepdim=True)).gather(1, liked)
    bias.zero_()  # a check's inputs are its own
    return [liked, weights, moved]


# 10. exchange


def exchanging(
    home=lambda e, n_experts, n_ranks: e // (n_experts // n_ranks),
    rows=lambda part: part,
    table=lambda sends: sends,
    nbytes=lambda sends, d: 4 * d * int(sends.sum() - sends.trace()),
):
    """An attempt: where an expert lives, who is counted, and bytes. As it stands, it is right."""

    def exchange(experts, n_experts, d):
        n_ranks = len(experts)
        sends = torch.zeros(n_ranks, n_ranks, dtype=torch.int64)
        for s, part in enumerate(experts):
            for e in rows(part).flatten().tolist():
                sends[s, home(e, n_experts, n_ranks)] += 1
        return table(sends), nbytes(sends, d)

    return exchange


def exchanges_by_comparison(experts, n_experts, d):
    """Right: the home of expert e is the number of ranks whose last expert is below it."""
    n_ranks = len(experts)
    firsts = torch.arange(1, n_ranks) * (n_experts // n_ranks)
    sends = torch.stack([
        torch.stack([(torch.bucketize(part, firsts, right=True) == r).sum()
                     for r in range(n_ranks)])
        for part in experts
    ])  # fmt: skip
    away = sum(int(sends[s, r]) for s in range(n_ranks) for r in range(n_ranks) if s != r)
    return [sends, away * d * 2 + away * d * 2]


def counts_experts(experts, n_experts, d):
    return torch.stack([counted(part, n_experts) for part in experts]), 0


def sends_once(experts, n_experts, d):
    n_ranks = len(experts)
    sends = torch.zeros(n_ranks, n_ranks, dtype=torch.int64)
    for s, part in enumerate(experts):
        for token in part.tolist():
            for r in {e // (n_experts // n_ranks) for e in token}:
                sends[s, r] += 1
    return sends, 4 * d * int(sends.sum() - sends.trace())


# 11. grouped_kernel


@triton.jit
def grouped(
    x_ptr, w_ptr, y_ptr, visits_ptr, starts_ptr,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    """The right kernel, with the mistake called WRONG."""
    expert = tl.program_id(2)
    first_place = tl.load(starts_ptr + expert) + tl.program_id(0) * ROWS
    place = first_place + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    end = tl.load(starts_ptr + expert + 1)
    if first_place >= end:
        return
    place_ok = place < end
    if WRONG == "first tile":
        place_ok = place_ok & (tl.program_id(0) == 0)
    if WRONG == "short tiles":
        place_ok = place_ok & (first_place + ROWS <= end)
    if WRONG == "end":
        place_ok = place >= 0
    col_ok = col < N
    visit = tl.load(visits_ptr + place, place_ok, other=0)
    token = visit // K
    if WRONG == "place":
        token = place
    if WRONG == "visit":
        token = visit
    if WRONG == "choice":
        token = visit % K
    if WRONG == "address":
        token = token + 100000
    of = expert
    if WRONG == "expert 0":
        of = expert * 0
    if WRONG == "next expert":
        of = expert + 1
    acc = tl.zeros((ROWS, COLS), tl.float32)
    stop = D
    if WRONG == "end of D":
        stop = D // STEP * STEP
    if WRONG == "first step":
        stop = STEP
    for first in range(0, stop, STEP):
        d = first + tl.arange(0, STEP)
        d_ok = d < D
        if WRONG == "past D":
            d_ok = d >= 0
        x = tl.load(x_ptr + token[:, None] * D + d[None, :], d_ok[None, :], other=0.0)
        w = tl.load(
            w_ptr + (of * D + d[:, None]) * N + col[None, :],
            d_ok[:, None] & col_ok[None, :], other=0.0,
        )  # fmt: skip
        if WRONG == "last step":
            acc = tl.dot(x, w, input_precision="ieee")
        else:
            acc += tl.dot(x, w, input_precision="ieee")
    if WRONG == "columns":
        col_ok = col >= 0
    row = place
    if WRONG == "by visit":
        row = visit
    if WRONG != "store":
        tl.store(y_ptr + row[:, None] * N + col[None, :], acc, place_ok[:, None] & col_ok[None, :])


@triton.jit
def place_by_place(
    x_ptr, w_ptr, y_ptr, visits_ptr, starts_ptr,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Right without tl.dot and without tiles of D: one number of the width after the other."""
    expert = tl.program_id(2)
    start, end = tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1)
    start += tl.program_id(0) * ROWS
    if start >= end:
        return
    row = start + tl.arange(0, ROWS)
    mine = row < end
    token = tl.load(visits_ptr + row, mine, other=0) // K
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for d in range(0, D):
        x = tl.load(x_ptr + token * D + d, mine, other=0.0)
        w = tl.load(w_ptr + expert * D * N + d * N + col, col < N, other=0.0)
        acc += x[:, None] * w[None, :]
    tl.store(y_ptr + row[:, None] * N + col[None, :], acc, mine[:, None] & (col < N)[None, :])


@triton.jit
def raises_in_the_kernel(
    x_ptr, w_ptr, y_ptr, visits_ptr, starts_ptr,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tl.store(y_ptr, no_such_name)  # noqa: F821


class Grouped:
    """`grouped` with one mistake, launched like any kernel."""

    fn = grouped.fn

    def __init__(self, wrong):
        self.wrong = wrong

    def __getitem__(self, grid):
        return lambda *args, **sizes: grouped[grid](*args, **sizes, WRONG=self.wrong)


WRONG = {
    "moe.balance_loss": [
        (
            balancing(end=lambda f, p, n: f.var()),
            "does-nothing-like-the-guides",
        ),
        (balancing(end=lambda f, p, n: (f * p).sum()), "forgets-the-number-of-experts"),
        (
            balancing(share=lambda p, e: counted(e, p.shape[1]) / len(p)),
            "counts-a-token-k-times",
        ),
        (
            balancing(share=lambda p, e: counted(e[:, 0], p.shape[1]) / len(p)),
            "counts-first-choices-only",
        ),
        (
            balancing(
                share=lambda p, e: counted(p.topk(e.shape[1], 1).indices, p.shape[1]) / e.numel()
            ),
            "chooses-again",
        ),
        (balancing(share=lambda p, e: p.mean(0)), "multiplies-p-by-itself"),
        (balancing(share=soft_share), "lets-the-share-be-soft"),
        (balancing(mean=lambda p: p.sum(0)), "sums-over-the-tokens"),
        (balancing(end=lambda f, p, n: p.var()), "takes-the-variance"),
        (balancing(end=lambda f, p, n: -n * (f * p).sum()), "rewards-the-crowd"),
        (balancing(end=lambda f, p, n: n * f * p), "returns-other-things"),
    ],
    "moe.by_hand": [
        (answers(loss=0.315625), "forgets-the-number-of-experts"),
        (answers(loss=2.525), "counts-a-token-k-times"),
        (answers(loss=1.45), "counts-first-choices-only"),
        (answers(loss=1.215), "multiplies-p-by-itself"),
        (answers(loss=5.05), "sums-over-the-tokens"),
        (answers(loss=1.375), "multiplies-f-by-itself"),
        (answers(loss=torch.tensor([3.0, 3, 2, 0]).div(8).var()), "takes-the-variance"),
        (answers(slope=1.0), "slope-of-p-itself"),
        (answers(slope=0.0625), "slope-without-the-factor"),
        (answers(slope=0), "token-0-does-not-visit"),
        (answers(slope=0.375), "slope-of-another-expert"),
        (answers(slope=0.35), "slope-of-p-times-p"),
        (answers(collapsed=4), "collapse-is-one-expert"),
        (answers(collapsed=1), "takes-it-for-even"),
        (answers(collapsed=0.5), "collapse-without-the-factor"),
        (lambda: LOSS, "returns-other-things"),
        (lambda: (LOSS, SLOPE, "2"), "not-a-number"),
    ],
    "moe.route": [
        (routing(normalise=always), "renormalises-a-single-choice"),
        (routing(normalise=lambda w, k: w), "forgets-to-renormalise"),
        (
            routing(normalise=lambda w, k: w.softmax(1) if k > 1 else w),
            "takes-the-softmax-twice",
        ),
        (routing(normalise=lambda w, k: w / k), "divides-by-k"),
        (
            routing(normalise=lambda w, k: w / w.sum()),
            "divides-by-the-sum-of-all-tokens",
        ),
        (routing(score=lambda x: x, normalise=lambda w, k: w), "takes-the-logits"),
        (routing(score=lambda x: x), "renormalises-the-logits"),
        (routing(score=lambda x: x.softmax(0)), "softmax-over-the-tokens"),
        (
            routing(choose=lambda s, k: s.sort(dim=1, stable=True).indices[:, :k]),
            "takes-the-worst",
        ),
        (
            routing(
                choose=lambda s, k: (
                    s.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
                )
            ),
            "lists-experts-by-number",
        ),
        (
            routing(weigh=lambda s, experts: s[:, : experts.shape[1]]),
            "weights-of-the-first-columns",
        ),
        (
            routing(weigh=lambda s, experts: s.gather(1, experts.flip(1))),
            "weights-not-in-the-experts-order",
        ),
        (routing(choose=last_of_equals), "breaks-ties-by-chance"),
        (routing(choose=the_largest_only), "visits-an-expert-twice"),
        (routing(score=lambda x: x.detach().softmax(1)), "cuts-the-gradient-off"),
        (lambda logits, k: logits.argsort(1)[:, :k], "returns-other-things"),
    ],
    "moe.mixture": [
        (guides_mixture, "indexes-tokens-with-visits"),
        (
            mixing(
                visitors=lambda mask: mask[..., 0],
                weight=lambda probs, mask, rows: probs[..., 0][rows],
            ),
            "sees-only-first-choices",
        ),
        (
            mixing(weight=lambda probs, mask, rows: torch.ones_like(probs[mask])),
            "forgets-the-weights",
        ),
        (
            mixing(weight=lambda probs, mask, rows: probs[rows][:, 0]),
            "takes-the-weight-of-the-best-choice",
        ),
        (
            mixing(weight=lambda probs, mask, rows: probs[rows].sum(-1)),
            "adds-the-weights-of-all-choices",
        ),
        (mixing(add=False), "keeps-only-the-last-expert"),
        (mixing(inside=True), "weights-what-goes-in"),
        (mixing(start=torch.clone), "starts-from-the-tokens"),
        (mixes_densely, "runs-every-expert-on-every-token"),
    ],
    "moe.group": [
        (grouping(inverse=lambda order: order), "takes-order-for-its-inverse"),
        (
            grouping(end=lambda order, place, starts, k: (order // k, place, starts)),
            "returns-tokens-for-visits",
        ),
        (grouping(flat=lambda experts: experts.T.flatten()), "numbers-choices-first"),
        (
            grouping(
                sort=lambda visits: visits.sort().values, inverse=lambda v: v.argsort(stable=True)
            ),
            "returns-the-experts",
        ),
        (
            grouping(counts=lambda experts, n: experts.unique(return_counts=True)[1]),
            "forgets-who-has-no-visits",
        ),
        (
            grouping(counts=lambda experts, n: torch.bincount(experts.flatten())),
            "forgets-that-the-last-may-be-empty",
        ),
        (grouping(starts=lambda counts: counts), "counts-instead-of-starts"),
        (grouping(starts=lambda counts: counts.cumsum(0)), "forgets-the-first-start"),
        (
            grouping(starts=lambda counts: counts.cumsum(0) - counts),
            "forgets-the-last-end",
        ),
        (grouping(sort=backwards), "shuffles-the-visits-of-an-expert"),
        (
            grouping(end=lambda order, place, starts, k: order),
            "returns-other-things",
        ),
    ],
    "moe.moe_layer": [
        (layering("unweighted"), "forgets-the-weights"),
        (layering("order"), "comes-back-by-the-same-permutation"),
        (layering("sorted"), "never-comes-back"),
        (layering("sorted weights"), "weights-in-another-order"),
        (layering("remainder"), "takes-the-token-from-the-remainder"),
        (layering("last"), "keeps-only-the-last-choice"),
        (layering("mean"), "averages-the-choices"),
        (layering("next expert"), "gives-visits-to-the-next-expert"),
        (layering("visits"), "takes-visits-for-tokens"),
        (layering("nothing"), "stores-nothing"),
        (layering("no loads"), "goes-around-load"),
        (layering("bypass weights"), "goes-around-load-for-weights"),
        (layering("bypass x"), "goes-around-load-for-rows"),
        (reads_only_weights, "reads-only-weights-through-load"),
        (layering("all experts"), "reads-experts-that-nobody-visits"),
        (layering("every visit"), "reads-the-weights-for-every-visit"),
        (layering("every token"), "reads-every-token-for-every-expert"),
        (layering("bypass y store"), "goes-around-store-for-y"),
        (layering("bypass out store"), "goes-around-store-for-out"),
        (layering("every choice"), "writes-out-for-every-choice"),
    ],
    "moe.kept_visits": [
        (
            keeping(queue=lambda n, k: [(t, j) for t in range(n) for j in range(k)]),
            "serves-token-by-token",
        ),
        (
            keeping(capacity=lambda n, k, e, factor: int(factor * n * k / e)),
            "rounds-the-capacity-down",
        ),
        (
            keeping(capacity=lambda n, k, e, factor: math.ceil(factor * n / e)),
            "forgets-k-in-the-capacity",
        ),
        (keeping(fits=lambda taken, room: taken <= room), "takes-one-too-many"),
        (keeping(fits=lambda taken, room: taken + 1 < room), "takes-one-too-few"),
        (keeping(anew=True), "counts-each-choice-anew"),
        (
            keeping(queue=lambda n, k: [(t, j) for j in range(k) for t in range(n)][::-1]),
            "keeps-the-latest",
        ),
        (
            keeping(end=lambda kept: kept & kept.all(1, keepdim=True)),
            "drops-all-visits-of-the-token",
        ),
        (keeping(end=lambda kept: ~kept), "says-who-is-dropped"),
        (keeping(fits=lambda taken, room: True), "drops-nobody"),
        (keeping(closes=True), "closes-the-whole-layer"),
    ],
    "moe.read_per_step": [
        (reading(lambda n, e, k: min(e, n * k)), "one-expert-a-visit"),
        (
            reading(lambda n, e, k: e * (1 - (1 - 1 / e) ** (n * k))),
            "lets-a-token-visit-an-expert-twice",
        ),
        (reading(lambda n, e, k: e * (1 - (1 - 1 / e) ** n)), "forgets-k"),
        (reading(lambda n, e, k: 1 - (1 - k / e) ** n), "gives-the-chance-of-one-expert"),
        (reading(lambda n, e, k: e * (1 - k / e) ** n), "counts-the-untouched"),
        (reading(lambda n, e, k: e * (k / e) ** n), "multiplies-chances"),
        (reading(lambda n, e, k: e), "reads-them-all"),
        (reading(lambda n, e, k: k), "reads-k"),
        (
            reading(nbytes=lambda t, n, e, k, one: n * k * 6 * one),
            "reads-the-weights-for-every-visit",
        ),
        (reading(nbytes=lambda t, n, e, k, one: t * 4 * one), "forgets-the-gate"),
        (reading(nbytes=lambda t, n, e, k, one: t * 3 * one), "counts-numbers-not-bytes"),
        (reading(nbytes=lambda t, n, e, k, one: t * 12 * one), "counts-4-bytes"),
        (reading(nbytes=lambda t, n, e, k, one: t * 2 * one), "reads-one-matrix"),
        (
            reading(nbytes=lambda t, n, e, k, one: t * 6 * one / n),
            "gives-the-bytes-of-a-token",
        ),
        (
            lambda n_tokens, n_experts, k, d, d_ff: n_tokens * k * 6 * d * d_ff,
            "returns-other-things",
        ),
    ],
    "moe.bias_step": [
        (stepping(choose=lambda s, b: s), "chooses-without-the-bias"),
        (stepping(weigh=lambda s, b: s + b), "weighs-with-the-bias"),
        (stepping(normalise=lambda w: w), "forgets-to-renormalise"),
        (stepping(move=lambda c: torch.sign(c - c.mean())), "feeds-the-crowd"),
        (stepping(move=lambda c: c.mean() - c), "moves-by-the-size"),
        (stepping(move=lambda c: (c.mean() - c) / c.sum()), "moves-by-the-share"),
        (
            stepping(move=lambda c: torch.where(c > c.mean(), -1.0, 1.0)),
            "moves-an-even-expert",
        ),
        (stepping(move=lambda c: -(c > c.mean()).float()), "moves-only-the-busy"),
        (stepping(old=lambda bias: 0 * bias), "forgets-the-old-bias"),
        (stepping(load=lambda e, s, k: e[:, :1]), "counts-first-choices-only"),
        (stepping(load=lambda e, s, k: s.topk(k, 1).indices), "judges-the-next-choice"),
        (lambda scores, bias, k, rate: bias, "returns-other-things"),
    ],
    "moe.exchange": [
        (exchanging(home=lambda e, n, r: e % r), "deals-experts-out-in-turn"),
        (
            exchanging(home=lambda e, n, r: min(e // r, r - 1)),
            "divides-by-the-number-of-ranks",
        ),
        (exchanging(table=lambda sends: sends.T), "says-who-receives"),
        (sends_once, "sends-a-token-once-a-rank"),
        (exchanging(rows=lambda part: part[:, :1]), "counts-only-first-choices"),
        (
            exchanging(table=lambda sends: sends - sends.diag().diag()),
            "leaves-the-diagonal-out",
        ),
        (counts_experts, "counts-experts-not-ranks"),
        (
            exchanging(
                table=lambda sends: (sends.sum(1, keepdim=True) // len(sends)).expand_as(sends)
            ),
            "shares-out-evenly",
        ),
        (
            exchanging(nbytes=lambda sends, d: 2 * d * int(sends.sum() - sends.trace())),
            "forgets-the-way-back",
        ),
        (exchanging(nbytes=lambda sends, d: 4 * d * int(sends.sum())), "counts-what-stays-at-home"),
        (
            exchanging(nbytes=lambda sends, d: 2 * d * int(sends.sum())),
            "counts-what-stays-and-forgets-the-way-back",
        ),
        (
            exchanging(nbytes=lambda sends, d: 8 * d * int(sends.sum() - sends.trace())),
            "counts-4-bytes",
        ),
        (
            exchanging(nbytes=lambda sends, d: int(sends.sum() - sends.trace())),
            "counts-visits-not-bytes",
        ),
        (lambda experts, n_experts, d: 0, "returns-other-things"),
    ],
    "moe.grouped_kernel": [
        (Grouped("place"), "takes-the-place-for-the-token"),
        (Grouped("visit"), "takes-visits-for-tokens"),
        (Grouped("choice"), "takes-the-choice-for-the-token"),
        (Grouped("expert 0"), "takes-expert-0-for-all"),
        (Grouped("next expert"), "takes-the-next-experts-matrix"),
        (Grouped("last step"), "keeps-only-the-last-step"),
        (Grouped("first step"), "does-only-the-first-step"),
        (Grouped("end of D"), "forgets-the-end-of-the-sum"),
        (Grouped("past D"), "sums-past-the-width"),
        (Grouped("by visit"), "stores-by-visit"),
        (Grouped("first tile"), "does-only-the-first-tile"),
        (Grouped("short tiles"), "drops-the-shorter-tiles"),
        (Grouped("end"), "writes-into-the-next-experts-rows"),
        (Grouped("columns"), "writes-past-its-columns"),
        (Grouped("store"), "writes-nothing-or-reads-astray"),
        (raises_in_the_kernel, "raises"),
        (lambda *args: None, "not-a-kernel"),
    ],
}

RIGHT = {
    "moe.balance_loss": [balancing(), balances_token_by_token, balances_with_one_hot],
    "moe.by_hand": [answers(), asks_autograd],
    "moe.route": [routing(), routes_over_the_chosen],
    "moe.mixture": [mixing(), mixes_by_index_add, mixes_visit_by_visit],
    "moe.group": [grouping(), groups_with_lists, groups_by_counting],
    "moe.moe_layer": [layering(), adds_in_sorted_order, walks_token_by_token],
    "moe.kept_visits": [keeping(), keeps_by_sorting, keeps_expert_by_expert],
    "moe.read_per_step": [reading(), reads_step_by_step, reads_by_binomials],
    "moe.bias_step": [stepping(), steps_with_loops],
    "moe.exchange": [exchanging(), exchanges_by_comparison],
    "moe.grouped_kernel": [Grouped(""), place_by_place],
}
