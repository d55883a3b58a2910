"""Wrong and right attempts at chapter 7's exercises. Each wrong one is a mistake people make."""

from functools import partial

import torch

from llmopt_lab.core.device import prepare_triton
from llmopt_lab.speculative_decoding.cases import guides_speculative_decode
from llmopt_lab.speculative_decoding.chance import outcomes

prepare_triton()

import triton
import triton.language as tl

# ruff: noqa: E402

INF = torch.inf

# 1. speculative_greedy


def guide(small, large, prompt, k, n_new):
    return guides_speculative_decode(small, large, prompt, k, n_new)


def looping(
    ask=lambda large, text, guesses: large.choices(text + guesses, len(guesses) + 1),
    count=lambda guesses, right: next(
        (i for i, x in enumerate(guesses) if x != right[i]), len(guesses)
    ),
    new=lambda guesses, right, n: [*guesses[:n], *right[n : n + 1]],
    end=lambda text, prompt, n_new: text[: len(prompt) + n_new],
):
    """An attempt: how it asks, counts, adds and ends. As it stands, it is right."""

    def speculative_greedy(small, large, prompt, k, n_new):
        text = list(prompt)
        while len(text) < len(prompt) + n_new:
            guesses = []
            for _ in range(k):
                guesses.append(small.choices(text + guesses, 1)[0])
            right = ask(large, text, guesses)
            text += new(guesses, right, count(guesses, right))
        return end(text, prompt, n_new)

    return speculative_greedy


def one_by_one(large, text, guesses):
    right = []
    for x in [*guesses, None]:
        right += large.choices(text + guesses[: len(right)], 1)
        if right[-1] != x:
            break
    return right


def plain_decoding(small, large, prompt, k, n_new):
    for _ in range(n_new):
        prompt = prompt + large.choices(prompt, 1)
    return prompt


def pops_what_was_refused(small, large, prompt, k, n_new):
    """Right: the guesses go into the text, as in the guide, and come out again."""
    while n_new > 0:
        start = len(prompt)
        ahead = min(k, n_new - 1)
        for _ in range(ahead):
            prompt.append(small.choices(prompt, 1)[0])
        for i, right in enumerate(large.choices(prompt, ahead + 1)):
            n_new -= 1
            if i == ahead or prompt[start + i] != right:
                del prompt[start + i :]
                prompt.append(right)
                break
    return prompt


# 2. judging_rows


def rows_from(first, more=1):
    def judging_rows(n_text, n_cached, n_guesses):
        start = first(n_text, n_cached, n_guesses)
        return [start + i for i in range(n_guesses + more)]

    return judging_rows


def rows_from_the_end(n_text, n_cached, n_guesses):
    n_fed = n_text - n_cached + n_guesses
    return range(n_fed)[-(n_guesses + 1) :]


# 3. judge_round


def judging(
    chance=lambda x, p, q: min(1.0, float(p[x] / q[x])),
    source=lambda p, q: (p - q).clamp_min(0) / (p - q).clamp_min(0).sum(),
    refused=lambda kept, x, token: [*kept, token],
    last=lambda p, q: p[-1],
    stop=True,
    bonus=True,
):
    """An attempt: how each of its parts is made. As it stands, it is right."""

    def judge_round(guesses, p, q, dice):
        kept = []
        for i, x in enumerate(guesses):
            if dice.happens(chance(x, p[i], q[i])):
                kept.append(x)
                continue
            kept = refused(kept, x, dice.pick(source(p[i], q[i])))
            if stop:
                return kept
        return [*kept, dice.pick(last(p, q))] if bonus else kept

    return judge_round


def matches_a_sample(guesses, p, q, dice):
    new = []
    for i in range(len(p)):
        new.append(dice.pick(p[i]))
        if i == len(guesses) or new[-1] != guesses[i]:
            return new


def compares_a_uniform_number(guesses, p, q, dice):
    """Right, with q padded by a row of zeros: then the bonus is a residual as well."""
    q = torch.cat([q, q.new_zeros(1, p.shape[1])])
    n = 0
    while n < len(guesses) and dice.happens(p[n, guesses[n]] / q[n, guesses[n]]):
        n += 1
    rest = torch.relu(p[n] - q[n])
    p.zero_()  # a check's inputs are its own
    return guesses[:n] + [dice.pick(rest / rest.sum())]


def judges_in_float32(guesses, p, q, dice):
    return judging()(guesses, p.float(), q.float(), dice)


def uses_torch_for_the_residual(guesses, p, q, dice):
    for i, x in enumerate(guesses):
        if not dice.happens(min(1.0, float(p[i, x] / q[i, x]))):
            return [*guesses[:i], int(torch.multinomial((p[i] - q[i]).clamp_min(0), 1))]
    if torch.rand(()) < 0.5:
        return [*guesses, dice.pick(torch.tensor([0.5, 0.5, *[0.0] * (p.shape[1] - 2)]).double())]
    return [*guesses, dice.pick(p[-1])]


def ratio_of_rows(guesses, p, q, dice):
    """A wrong index: the row of the guess is taken for its place."""
    for i, x in enumerate(guesses):
        ratio = float((p[i] - p[i])[x] / (q[i] - q[i])[x])
        if not dice.happens(ratio):
            return guesses[:i]
    return [*guesses, dice.pick(p[-1])]


def normed(x):
    return x / x.sum()


# 5. redrawn_from_p


def redrawing(
    out=lambda p, q, kept: kept + (1 - kept.sum()) * p,
    distance=lambda out, p, q: (out - p).abs().sum() / 2,
):
    """An attempt: the distribution, and its distance from the true one."""

    def redrawn_from_p(p, q):
        true = torch.minimum(p, q) + (1 - torch.minimum(p, q).sum()) * p
        return out(p, q, torch.minimum(p, q)), float(distance(true, p, q))

    return redrawn_from_p


def lists_the_outcomes(p, q):
    def program(dice):
        x = dice.pick(q)
        return x if dice.happens(float(p[x] / q[x])) else dice.pick(p)

    found = outcomes(program)
    out = torch.zeros_like(p)
    for token, chance in found.items():
        out[token] = chance
    distance = sum(max(0.0, float(a - b)) for a, b in zip(out, p, strict=True))
    p.zero_()  # a check's inputs are its own
    return out, distance


# 6. rank_rules


def ranking(
    guess=lambda dice, p, q: dice.pick(q),
    kept=lambda x, token, kept: kept,
    counts=lambda kept: True,
    gap=lambda out, p, q: float((out - p).abs().sum()) / 2,
    key=lambda row: (round(row[1], 9), -row[2]),
):
    """An attempt: who guesses, what is kept, what counts, the distance and the order."""

    def rank_rules(rules, p, q):
        rows = []
        for name, rule in rules.items():

            def program(dice, rule=rule):
                x = guess(dice, p, q)
                token, keeps = rule(x, p, q, dice)
                return token, kept(x, token, keeps), counts(keeps)

            out, share = torch.zeros_like(p), 0.0
            for (token, keeps, weight), chance in outcomes(program).items():
                out[token] += chance * weight
                share += chance * keeps
            rows.append((name, gap(out, p, q), share))
        return rows if key is None else sorted(rows, key=key)

    return rank_rules


def ranks_by_samples(rules, p, q):
    from llmopt_lab.speculative_decoding.chance import Dice

    dice, rows = Dice(torch.Generator().manual_seed(0)), []
    for name, rule in rules.items():
        drawn = [rule(dice.pick(q), p, q, dice) for _ in range(800)]
        out = torch.bincount(torch.tensor([x for x, _ in drawn]), minlength=len(p)) / len(drawn)
        share = sum(kept for _, kept in drawn) / len(drawn)
        rows.append((name, float((out - p).abs().sum() / 2), share))
    return sorted(rows, key=lambda row: (round(row[1], 1), -row[2]))


def ranks_guess_by_guess(rules, p, q):
    """Right: each guess by itself, weighted with q."""
    rows = []
    for name, rule in rules.items():
        out, share = [0.0] * len(p), 0.0
        for x, weight in enumerate(q.tolist()):
            found = outcomes(partial(rule, x, p, q))
            for (token, kept), chance in found.items():
                out[token] += weight * chance
                share += weight * chance if kept else 0
        distance = sum(max(a - b, 0) for a, b in zip(out, p.tolist(), strict=True))
        rows.append([name, distance if distance > 1e-13 else 0.0, share])
    rows.sort(key=lambda row: -row[2])
    rows.sort(key=lambda row: row[1])
    return rows


def below_zero(row):
    return (row[1] if row[1] > 0 else 0, row[0])


# 7. what_stays


def staying(
    whole=lambda guesses, n, token, left: [*guesses[:n], token][:left],
    is_end=lambda x, i, new, ends: x in ends,
    keep=lambda new, i: new[: i + 1],
    full=lambda new, left: len(new) == left,
):
    """An attempt: what may stay, what ends it, how it is cut, and when the room is used up."""

    def what_stays(guesses, n_kept, token, ends, n_left):
        new = whole(guesses, n_kept, token, n_left)
        for i, x in enumerate(new):
            if is_end(x, i, new, ends):
                return keep(new, i), True
        return new, full(new, n_left)

    return what_stays


def stays_with_a_while(guesses, n_kept, token, ends, n_left):
    row, new, done = iter([*guesses[:n_kept], token]), [], False
    while not done and (x := next(row, None)) is not None:
        new += [x]
        done = x in ends or len(new) >= n_left
    return tuple(new), done


def ends_at_a_refused_end(guesses, n_kept, token, ends, n_left):
    for i, x in enumerate(guesses):
        if x in ends:
            return guesses[: i + 1], True
    return staying()(guesses, n_kept, token, ends, n_left)


def looks_for_the_end_first(guesses, n_kept, token, ends, n_left):
    whole = [*guesses[:n_kept], token]
    for i, x in enumerate(whole):
        if x in ends:
            return whole[: i + 1], True
    return whole[:n_left], len(whole) >= n_left


# 8. greedy_round


def rounding(wrong=""):
    """An attempt, with the mistake called `wrong`; right without."""

    def greedy_round(target, draft, text, k):
        if wrong == "everything":
            target.rewind(0)
        if wrong == "draft everything":
            draft.rewind(0)
        guesses, unread = [], text[draft.length :]
        if wrong == "hole" and draft.length:
            unread = text[-1:]
        for _ in range(k):
            guesses.append(int(draft.read(unread, n_last=1)[-1].argmax()))
            unread = guesses[-1:]
        if wrong == "last guess":
            draft.read(unread, n_last=1)
        fed = text[target.length :]
        if wrong == "one by one":
            rows = [target.read(fed, n_last=1)[0]]
            for x in guesses:
                rows.append(target.read([x], n_last=1)[0])
        elif wrong == "two passes":
            rows = [target.read(fed, n_last=1)[0], *target.read(guesses, n_last=k)]
        else:
            rows = target.read(fed + guesses, n_last=k + 1)
        right = [int(row.argmax()) for row in rows]
        if wrong == "own row":
            right = [*right[1:], right[-1]]
        n = 0
        while n < k and guesses[n] == right[n]:
            n += 1
        new = [*guesses[:n], right[n]]
        if wrong == "own row":
            new = [*guesses[:n], right[min(n, k - 1)]]
        if wrong == "guide" and n < k:
            new = [*guesses[:-1], right[n]]
        if wrong == "bonus" and n == k:
            new = guesses
        if wrong == "kept alone" and n < k:
            new = guesses[:n]
        length = len(text) + n
        if wrong != "target":
            target.rewind({"one more": length + 1, "old": len(text) - 1}.get(wrong, length))
        if wrong != "draft":
            draft.rewind(len(text) if wrong == "draft old" else length)
        if wrong == "whole":
            return text + new
        if wrong == "adds":
            text += new
        return None if wrong == "none" else new

    return greedy_round


def rounds_with_lists(target, draft, text, k):
    """Right: both are fed from one list of what they lack."""
    known = list(text)
    while len(known) < len(text) + k:
        row = draft.read(known[draft.length :], n_last=1)
        known.append(row.argmax().item())
    logits = target.read(known[target.length :], n_last=k + 1)
    for place, row in enumerate(logits, start=len(text)):
        best = row.argmax().item()
        if place == len(known) or known[place] != best:
            target.rewind(place)
            draft.rewind(place)
            return known[len(text) : place] + [best]


# 9. best_plan


def planning(
    tokens=lambda a, k: sum(a**i for i in range(k + 1)),
    cost=lambda c, k: k * c + 1,
    ks=lambda most: range(most + 1),
    key=lambda row: (row[2], -row[0]),
):
    """An attempt: tokens, cost, which k it tries, and which row it likes best."""

    def best_plan(alpha, c, most):
        rows = [(k, tokens(alpha, k), tokens(alpha, k) / cost(c, k)) for k in ks(most)]
        return max(rows, key=key)

    return best_plan


def plans_with_the_formula(alpha, c, most):
    best = [0, 1.0, 1.0]
    for k in range(1, most + 1):
        tokens = k + 1 if alpha == 1 else (1 - alpha ** (k + 1)) / (1 - alpha)
        gain = tokens / (1 + c * k)
        if gain > best[2] + 1e-12:
            best = [k, tokens, gain]
    return best


# 10. lookup_guesses


def finding(
    sizes=lambda text, longest: range(min(longest, len(text) - 1), 0, -1),
    places=lambda text, n: range(len(text) - n - 1, -1, -1),
    found=lambda text, at, n, k: text[at + n : at + n + k],
):
    """An attempt: which endings and places it tries, and what it makes of a match."""

    def lookup_guesses(text, k, longest):
        for n in sizes(text, longest):
            for at in places(text, n):
                if text[at : at + n] == text[-n:]:
                    return found(text, at, n, k)
        return []

    return lookup_guesses


def finds_with_a_score(text, k, longest):
    """Right: how far does each earlier place agree with the ending, going backwards?"""
    best, where = 0, None
    for end in range(1, len(text)):
        n = 0
        while n < min(longest, end) and text[end - 1 - n] == text[-1 - n]:
            n += 1
        if n and n >= best:
            best, where = n, end
    return [] if where is None else text[where:][:k]


# 11. tree_attention


def branching(mask=lambda paths, n: ..., depths=lambda paths, parents: [len(x) - 1 for x in paths]):
    """An attempt: the mask and the depths from each node's path up to the text."""

    def tree_attention(parents):
        paths = []
        for node in range(len(parents)):
            path = [node]
            while parents[path[-1]] >= 0:
                path.append(parents[path[-1]])
            paths.append(path)
        made = mask(paths, len(parents))
        return (ancestors(paths, len(parents)) if made is ... else made), depths(paths, parents)

    return tree_attention


def ancestors(paths, n, first=0, last=None):
    out = torch.zeros(n, n, dtype=torch.bool)
    for node, path in enumerate(paths):
        out[node, path[first:last]] = True
    return out


def follows_minus_one(parents):
    mask, depths = torch.eye(len(parents), dtype=torch.bool), []
    for node, parent in enumerate(parents):
        mask[node] |= mask[parent]
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return mask, depths


def multiplies_matrices(parents):
    """Right: powers of the matrix of parents."""
    n = len(parents)
    step = torch.zeros(n, n)
    for node, parent in enumerate(parents):
        if parent >= 0:
            step[node, parent] = 1
    power, seen = torch.eye(n), torch.zeros(n, n)
    for _ in range(n):
        seen, power = seen + power, power @ step
    return seen > 0, (seen.sum(1).long() - 1).tolist()


# 12. judge_kernel


@triton.jit
def judge(
    p_logits_ptr, q_logits_ptr, guesses_ptr, u_keep_ptr, u_pick_ptr, kept_ptr, token_ptr,
    n_vocab, TILE: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    """The right kernel, with the mistake called WRONG."""
    row = tl.program_id(0)
    guess = tl.load(guesses_ptr + row)
    u_keep, u_pick = tl.load(u_keep_ptr + row), tl.load(u_pick_ptr + row)
    at = row * n_vocab
    if WRONG == "row 0":
        at = 0
    p_row, q_row = p_logits_ptr + at, q_logits_ptr + at
    end = n_vocab
    if WRONG == "last tile":
        end = n_vocab // TILE * TILE
    outside = -float("inf")
    if WRONG == "padding":
        outside = 0.0
    m_p, m_q = -float("inf"), -float("inf")
    total_p, total_q = 0.0, 0.0
    for first in range(0, end, TILE):
        col = first + tl.arange(0, TILE)
        x = tl.load(p_row + col, col < n_vocab, other=outside)
        y = tl.load(q_row + col, col < n_vocab, other=outside)
        new_p, new_q = tl.maximum(m_p, tl.max(x)), tl.maximum(m_q, tl.max(y))
        base_p, base_q = new_p, new_q
        if WRONG != "guard":
            base_p = tl.where(new_p == -float("inf"), 0.0, new_p)
            base_q = tl.where(new_q == -float("inf"), 0.0, new_q)
        if WRONG == "overflow":
            base_p, base_q, new_p, new_q = 0.0, 0.0, 0.0, 0.0
            m_p, m_q = 0.0, 0.0
        total_p = total_p * tl.exp(m_p - base_p) + tl.sum(tl.exp(x - base_p))
        total_q = total_q * tl.exp(m_q - base_q) + tl.sum(tl.exp(y - base_q))
        m_p, m_q = new_p, new_q
    x, y = tl.load(p_row + guess), tl.load(q_row + guess)
    p, q = tl.exp(x - m_p) / total_p, tl.exp(y - m_q) / total_q
    keep = u_keep * q < p
    if WRONG == "logits":
        keep = u_keep * y < x
    if WRONG == "totals":
        keep = u_keep * tl.exp(y - m_q) < tl.exp(x - m_p)
    if WRONG == "ratio":
        keep = u_keep * p < q
    if WRONG == "chance":
        keep = u_keep < p
    if WRONG == "certain":
        keep = q <= p
    if WRONG == "refused":
        keep = u_keep * q >= p
    if WRONG != "no kept":
        tl.store(kept_ptr + row, keep.to(tl.int32))
    missing, before, top = 0.0, 0.0, -1.0
    token = 0
    for step in range(0, 2 * tl.cdiv(end, TILE)):
        n_tiles = tl.cdiv(end, TILE)
        first = (step % n_tiles) * TILE
        col = first + tl.arange(0, TILE)
        p = tl.exp(tl.load(p_row + col, col < n_vocab, other=outside) - m_p) / total_p
        q = tl.exp(tl.load(q_row + col, col < n_vocab, other=outside) - m_q) / total_q
        lack = tl.maximum(p - q, 0.0)
        if WRONG == "draw p":
            lack = p
        if WRONG == "reverse":
            lack = tl.maximum(q - p, 0.0)
        if WRONG == "absolute":
            lack = tl.abs(p - q)
        if WRONG == "signed":
            lack = p - q
        if step < n_tiles:
            missing += tl.sum(lack)
        else:
            limit = u_pick * missing
            if WRONG == "threshold":
                limit = u_pick
            if WRONG == "u_keep":
                limit = u_keep * missing
            running = before + tl.cumsum(lack, axis=0)
            if WRONG == "largest":
                if tl.max(lack) > top:
                    top = tl.max(lack)
                    token = first + tl.argmax(lack, axis=0)
            else:
                token += tl.sum((running <= limit).to(tl.int32))
            if WRONG != "afresh":
                before += tl.sum(lack)
    if WRONG == "within":
        token = token % TILE
    if WRONG == "far":
        token += 1
    if WRONG == "early":
        token -= 1
    if WRONG == "all rows":
        tl.store(token_ptr + row + n_vocab, token)
    if WRONG != "no token":
        tl.store(token_ptr + row, tl.minimum(token, n_vocab - 1))


@triton.jit
def one_wide_tile(
    p_logits_ptr, q_logits_ptr, guesses_ptr, u_keep_ptr, u_pick_ptr, kept_ptr, token_ptr,
    n_vocab, TILE: tl.constexpr,
):  # fmt: skip
    """Right, the whole row at once, and the token as a minimum over places."""
    WIDE: tl.constexpr = 4 * TILE
    row, col = tl.program_id(0), tl.arange(0, WIDE)
    x = tl.load(p_logits_ptr + row * n_vocab + col, col < n_vocab, other=-1e30)
    y = tl.load(q_logits_ptr + row * n_vocab + col, col < n_vocab, other=-1e30)
    p, q = tl.exp(x - tl.max(x, axis=0)), tl.exp(y - tl.max(y, axis=0))
    p, q = p / tl.sum(p, axis=0), q / tl.sum(q, axis=0)
    here = col == tl.load(guesses_ptr + row)
    p_x, q_x = tl.sum(tl.where(here, p, 0.0), axis=0), tl.sum(tl.where(here, q, 0.0), axis=0)
    kept = tl.where(tl.load(u_keep_ptr + row) * q_x < p_x, 1, 0)
    lack = tl.where(p > q, p - q, 0.0)
    running = tl.cumsum(lack, axis=0) / tl.sum(lack, axis=0)
    beyond = tl.where(running > tl.load(u_pick_ptr + row), col, n_vocab - 1)
    tl.store(kept_ptr + row, kept)
    tl.store(token_ptr + row, tl.min(beyond, axis=0))


@triton.jit
def raises_in_the_kernel(
    p_logits_ptr, q_logits_ptr, guesses_ptr, u_keep_ptr, u_pick_ptr, kept_ptr, token_ptr,
    n_vocab, TILE: tl.constexpr,
):  # fmt: skip
    tl.store(token_ptr, no_such_name)  # noqa: F821


@triton.jit
def writes_nothing(
    p_logits_ptr, q_logits_ptr, guesses_ptr, u_keep_ptr, u_pick_ptr, kept_ptr, token_ptr,
    n_vocab, TILE: tl.constexpr,
):  # fmt: skip
    tl.load(guesses_ptr + tl.program_id(0))


class Judge:
    """`judge` with one mistake, launched like any kernel."""

    fn = judge.fn

    def __init__(self, wrong):
        self.wrong = wrong

    def __getitem__(self, grid):
        return lambda *args, **sizes: judge[grid](*args, **sizes, WRONG=self.wrong)


P_BY_HAND = [0.40, 0.35, 0.15, 0.10]

WRONG = {
    "speculative_decoding.speculative_greedy": [
        (guide, "keeps-rejected-tokens"),
        (
            looping(
                new=lambda guesses, right, n: [*guesses[:n], *right[n : n + 1], *guesses[n + 1 :]]
            ),
            "keeps-what-follows-a-refusal",
        ),
        (
            looping(count=lambda guesses, right: sum(map(int.__eq__, guesses, right))),
            "counts-every-match",
        ),
        (
            looping(
                ask=lambda large, text, g: [
                    *large.choices(text + g, len(g)),
                    large.choices(text + g, 1)[0],
                ]
            ),
            "judges-with-its-own-row",
        ),
        (
            looping(
                ask=lambda large, text, g: [
                    *large.choices(g, len(g)),
                    large.choices(text + g, 1)[0],
                ]
            ),
            "forgets-the-prompt",
        ),
        (
            looping(ask=lambda large, text, g: large.choices((text + g)[:-1], len(g))),
            "forgets-the-bonus",
        ),
        (looping(ask=one_by_one), "judges-one-by-one"),
        (plain_decoding, "does-not-speculate"),
        (looping(new=lambda guesses, right, n: guesses[:n]), "never-ends"),
        (looping(end=lambda text, prompt, n_new: text), "runs-past-the-end"),
        (
            looping(end=lambda text, prompt, n_new: text[len(prompt) :][:n_new]),
            "returns-only-what-is-new",
        ),
        (
            looping(end=lambda text, prompt, n_new: torch.tensor(text).double()),
            "returns-other-things",
        ),
    ],
    "speculative_decoding.judging_rows": [
        (rows_from(lambda n, cached, k: n - cached), "judges-with-its-own-row"),
        (rows_from(lambda n, cached, k: n - cached - 2), "one-row-too-early"),
        (rows_from(lambda n, cached, k: n - 1), "counts-from-the-beginning-of-the-text"),
        (rows_from(lambda n, cached, k: 0), "starts-at-row-0"),
        (rows_from(lambda n, cached, k: n - cached - 1, more=0), "forgets-the-last-row"),
        (rows_from(lambda n, cached, k: n - cached - 1 + k), "starts-after-the-guesses"),
        (rows_from(lambda n, cached, k: -1), "feeds-the-guesses-alone"),
        (lambda n_text, n_cached, n_guesses: None, "returns-nothing"),
    ],
    "speculative_decoding.judge_round": [
        (judging(source=lambda p, q: p), "resamples-from-p"),
        (judging(source=lambda p, q: normed((q - p).clamp_min(0))), "residual-the-wrong-way-round"),
        (judging(source=lambda p, q: normed((p - q).abs())), "absolute-difference"),
        (judging(chance=lambda x, p, q: min(1, float(q[x] / p[x]))), "turns-the-ratio-over"),
        (judging(chance=lambda x, p, q: p[x]), "keeps-with-chance-p"),
        (matches_a_sample, "matches-a-sample"),
        (judging(chance=lambda x, p, q: p[x] >= q[x]), "keeps-the-likely"),
        (judging(chance=lambda x, p, q: x == int(p.argmax())), "only-the-likeliest"),
        (judging(bonus=False), "forgets-the-bonus"),
        (judging(last=lambda p, q: p[max(0, len(q) - 1)]), "bonus-from-the-wrong-row"),
        (judging(stop=False), "goes-on-after-a-refusal"),
        (judging(refused=lambda kept, x, token: [*kept, x, token]), "keeps-the-refused-token"),
        (judging(refused=lambda kept, x, token: [token]), "throws-the-round-away"),
        (judging(source=lambda p, q: (p - q).clamp_min(0)), "forgets-to-normalise"),
        (judging(source=lambda p, q: p - q), "negative-probabilities"),
        (judging(source=lambda p, q: torch.stack([p, q])), "picks-from-many-rows"),
        (judging(chance=lambda x, p, q: 0.7), "another-distribution"),
        (judges_in_float32, "rounds-to-float32"),
        (ratio_of_rows, "nan-from-nothing"),
        (lambda guesses, p, q, dice: dice.pick(p[0]), "returns-other-things"),
    ],
    "speculative_decoding.residual_by_hand": [
        (lambda: (0.4, [0.75, 0.25, 0, 0]), "takes-the-chance-of-a-refusal"),
        (lambda: ((3 + 3 / 11) / 4, [0.75, 0.25, 0, 0]), "forgets-who-guesses"),
        (lambda: (0.22, [0.75, 0.25, 0, 0]), "matches-a-sample"),
        (lambda: (0.85 + 0.15 * 3 / 11, [0.75, 0.25, 0, 0]), "weights-with-p"),
        (lambda: (60.0, [0.75, 0.25, 0, 0]), "in-percent"),
        (lambda: (0.6, [0.3, 0.1, 0, 0]), "forgets-to-normalise"),
        (lambda: (0.6, P_BY_HAND), "resamples-from-p"),
        (lambda: (0.6, [0, 0, 1, 0]), "residual-the-wrong-way-round"),
        (lambda: (0.6, [0.375, 0.125, 0.5, 0]), "absolute-difference"),
        (lambda: (0.6, [0.3, 0.1, -0.4, 0]), "negative-probabilities"),
        (lambda: 0.6, "returns-other-things"),
    ],
    "speculative_decoding.redrawn_from_p": [
        (redrawing(lambda p, q, kept: p), "that-is-p"),
        (redrawing(lambda p, q, kept: kept), "only-what-was-kept"),
        (redrawing(lambda p, q, kept: kept + p), "forgets-how-often-it-is-refused"),
        (redrawing(lambda p, q, kept: kept + kept.sum() * p), "weights-the-wrong-way"),
        (
            redrawing(lambda p, q, kept: kept + (1 - (p / q).clamp_max(1)) * p),
            "refuses-token-by-token",
        ),
        (redrawing(lambda p, q, kept: q), "keeps-every-guess"),
        (
            redrawing(lambda p, q, kept: kept.sum() * q + (1 - kept.sum()) * p),
            "mixes-p-and-q",
        ),
        (redrawing(distance=lambda out, p, q: (out - p).abs().sum()), "forgets-the-half"),
        (redrawing(distance=lambda out, p, q: (out - p).abs().max()), "takes-the-largest-error"),
        (redrawing(distance=lambda out, p, q: (out - p).sum()), "adds-with-signs"),
        (
            redrawing(distance=lambda out, p, q: (q - p).abs().sum() / 2),
            "distance-of-draft-and-target",
        ),
        (
            redrawing(distance=lambda out, p, q: (out - q).abs().sum() / 2),
            "distance-from-the-draft",
        ),
        (redrawing(distance=lambda out, p, q: (out - p).norm()), "takes-the-root"),
        (lambda p, q: p, "returns-other-things"),
    ],
    "speculative_decoding.rank_rules": [
        (ranking(gap=lambda out, p, q: float((out - p).abs().sum())), "forgets-the-half"),
        (
            ranking(gap=lambda out, p, q: float((out - q).abs().sum()) / 2),
            "distance-from-the-draft",
        ),
        (ranking(gap=lambda out, p, q: float((out - p).abs().max())), "takes-the-largest-error"),
        (ranking(guess=lambda dice, p, q: dice.pick(p)), "guesses-from-p"),
        (
            ranking(guess=lambda dice, p, q: dice.pick(torch.full_like(q, 1 / len(q)))),
            "guesses-evenly",
        ),
        (ranking(guess=lambda dice, p, q: int(q.argmax())), "judges-one-guess"),
        (ranking(counts=lambda kept: kept), "looks-at-kept-guesses-only"),
        (ranking(kept=lambda x, token, kept: x == token), "takes-an-equal-token-for-kept"),
        (ranking(kept=lambda x, token, kept: not kept), "counts-refusals"),
        (ranks_by_samples, "samples"),
        (ranking(key=lambda row: (-round(row[1], 9), row[2])), "worst-first"),
        (ranking(key=lambda row: -row[2]), "ranks-by-what-is-kept"),
        (ranking(key=lambda row: (round(row[1], 9), row[2])), "keeps-less-first"),
        (ranking(key=None), "does-not-sort"),
        (ranking(gap=lambda out, p, q: 0.4), "another-number"),
        (lambda rules, p, q: ranking()(rules, p, q)[:2], "forgets-a-rule"),
        (lambda rules, p, q: list(rules), "returns-other-things"),
    ],
    "speculative_decoding.what_stays": [
        (
            staying(is_end=lambda x, i, new, ends: x in ends and i == len(new) - 1),
            "looks-at-the-last-token-only",
        ),
        (ends_at_a_refused_end, "stops-at-a-refused-end"),
        (staying(keep=lambda new, i: new[:i]), "drops-the-end-token"),
        (
            staying(keep=lambda new, i: new[: i + 1] + new[-1:] * (i < len(new) - 1)),
            "adds-the-token-after-the-end",
        ),
        (
            staying(
                whole=lambda guesses, n, token, left: [*guesses[:n], token],
                full=lambda new, left: len(new) > left,
            ),
            "forgets-the-limit",
        ),
        (staying(full=lambda new, left: False), "never-done-at-the-limit"),
        (looks_for_the_end_first, "sees-an-end-beyond-the-limit"),
        (staying(is_end=lambda x, i, new, ends: x == min(ends)), "knows-one-end-only"),
        (
            staying(whole=lambda guesses, n, token, left: guesses[:n][:left]),
            "forgets-the-targets-token",
        ),
        (
            staying(whole=lambda guesses, n, token, left: [*guesses, token][:left]),
            "adds-every-guess",
        ),
        (lambda guesses, n_kept, token, ends, n_left: token, "returns-other-things"),
        (staying(full=lambda new, left: True), "done-too-early"),
    ],
    "speculative_decoding.greedy_round": [
        (rounding("guide"), "keeps-rejected-tokens"),
        (rounding("bonus"), "forgets-the-bonus"),
        (rounding("kept alone"), "returns-the-kept-guesses-alone"),
        (rounding("own row"), "judges-with-its-own-row"),
        (rounding("whole"), "returns-the-whole-text"),
        (rounding("adds"), "changes-the-text"),
        (rounding("none"), "returns-other-things"),
        (rounding("target"), "target-keeps-refused-guesses"),
        (rounding("one more"), "rewinds-one-too-few"),
        (rounding("old"), "target-forgets-what-was-kept"),
        (rounding("draft"), "draft-keeps-refused-guesses"),
        (rounding("draft old"), "draft-forgets-what-was-kept"),
        (rounding("hole"), "a-hole-in-the-drafts-cache"),
        (rounding("one by one"), "judges-one-by-one"),
        (rounding("two passes"), "reads-the-text-in-a-pass-of-its-own"),
        (rounding("everything"), "reads-everything-again"),
        (rounding("draft everything"), "draft-reads-everything-again"),
        (rounding("last guess"), "draft-reads-its-last-guess"),
    ],
    "speculative_decoding.best_plan": [
        (planning(tokens=lambda a, k: sum(a**i for i in range(1, k + 1))), "forgets-the-bonus"),
        (planning(tokens=lambda a, k: sum(a**i for i in range(k))), "counts-one-guess-less"),
        (planning(tokens=lambda a, k: 1 + k * a), "guesses-after-a-refusal-count"),
        (planning(cost=lambda c, k: 1), "forgets-the-draft"),
        (planning(cost=lambda c, k: k * c or 1), "forgets-the-target"),
        (planning(cost=lambda c, k: c + 1 if k else 1), "one-pass-of-the-draft"),
        (planning(ks=lambda most: range(1, most + 1)), "always-guesses"),
        (planning(key=lambda row: row[1]), "takes-the-most-tokens"),
        (planning(key=lambda row: row[2:] + row[:1]), "takes-the-largest-of-equals"),
        (planning(ks=range), "stops-before-most"),
        (planning(tokens=lambda a, k: (1 - a ** (k + 1)) / (1 - a)), "raises"),
        (lambda alpha, c, most: 4, "returns-other-things"),
    ],
    "speculative_decoding.lookup_guesses": [
        (finding(places=lambda text, n: range(len(text) - n)), "takes-the-earliest-place"),
        (
            finding(sizes=lambda text, longest: range(1, min(longest, len(text) - 1) + 1)),
            "looks-for-the-shortest-ending",
        ),
        (
            finding(sizes=lambda text, longest: [longest] if len(text) > longest else []),
            "only-the-longest-ending",
        ),
        (
            finding(places=lambda text, n: range(len(text) - n, -1, -1)),
            "finds-the-ending-itself",
        ),
        (finding(found=lambda text, at, n, k: text[at : at + k]), "returns-the-match"),
        (finding(found=lambda text, at, n, k: text[at + n :]), "guesses-on-to-the-end"),
        (
            finding(places=lambda text, n: range(len(text) - 2 * n, -1, -1)),
            "must-not-overlap",
        ),
        (finding(found=lambda text, at, n, k: text[at + n : at + n + 1]), "one-token-only"),
        (
            finding(sizes=lambda text, longest: range(len(text) - 1, 0, -1)),
            "longer-than-longest",
        ),
        (
            finding(found=lambda text, at, n, k: text[at + n + 1 : at + n + 1 + k]),
            "skips-what-follows-first",
        ),
        (lambda text, k, longest: None, "returns-other-things"),
    ],
    "speculative_decoding.tree_attention": [
        (
            branching(lambda paths, n: torch.ones(n, n, dtype=torch.bool).tril()),
            "sees-every-earlier-node",
        ),
        (branching(lambda paths, n: ancestors(paths, n, last=2)), "sees-the-parent-only"),
        (branching(lambda paths, n: ancestors(paths, n, first=1)), "does-not-see-itself"),
        (branching(lambda paths, n: ancestors(paths, n).T), "sees-its-descendants"),
        (
            branching(lambda paths, n: ancestors(paths, n).T | ancestors(paths, n)),
            "sees-up-and-down",
        ),
        (
            branching(
                lambda paths, n: torch.tensor([[len(b) <= len(a) for b in paths] for a in paths])
            ),
            "sees-all-of-its-depth",
        ),
        (follows_minus_one, "follows-minus-one"),
        (branching(lambda paths, n: torch.eye(n, dtype=torch.bool)), "sees-itself-alone"),
        (branching(depths=lambda paths, parents: list(range(len(paths)))), "numbers-the-nodes"),
        (branching(depths=lambda paths, parents: [len(x) for x in paths]), "starts-at-one"),
        (branching(depths=lambda paths, parents: parents), "gives-the-parents"),
        (lambda parents: torch.eye(len(parents)), "returns-other-things"),
    ],
    "speculative_decoding.judge_kernel": [
        (Judge("logits"), "compares-logits"),
        (Judge("totals"), "forgets-the-totals"),
        (Judge("ratio"), "turns-the-ratio-over"),
        (Judge("chance"), "keeps-with-chance-p"),
        (Judge("certain"), "compares-without-chance"),
        (Judge("refused"), "says-what-is-refused"),
        (Judge("padding"), "counts-the-padding"),
        (Judge("last tile"), "drops-the-last-tile"),
        (Judge("guard"), "nan-from-nothing"),
        (Judge("overflow"), "subtracts-no-maximum"),
        (Judge("row 0"), "everybody-takes-row-0"),
        (Judge("draw p"), "resamples-from-p"),
        (Judge("reverse"), "residual-the-wrong-way-round"),
        (Judge("absolute"), "absolute-difference"),
        (Judge("signed"), "forgets-to-clamp"),
        (Judge("threshold"), "threshold-without-missing"),
        (Judge("u_keep"), "uses-the-other-random-number"),
        (Judge("largest"), "takes-the-largest"),
        (Judge("afresh"), "starts-each-tile-afresh"),
        (Judge("within"), "number-within-the-tile"),
        (Judge("far"), "one-token-too-far"),
        (Judge("early"), "one-token-too-early"),
        (Judge("no kept"), "forgets-kept"),
        (Judge("no token"), "forgets-token"),
        (Judge("all rows"), "writes-past-its-rows"),
        (writes_nothing, "stores-nothing"),
        (raises_in_the_kernel, "raises"),
        (lambda *args: None, "not-a-kernel"),
    ],
}

RIGHT = {
    "speculative_decoding.speculative_greedy": [looping(), pops_what_was_refused],
    "speculative_decoding.judging_rows": [
        rows_from(lambda n, cached, k: n - cached - 1),
        rows_from_the_end,
    ],
    "speculative_decoding.judge_round": [judging(), compares_a_uniform_number],
    "speculative_decoding.residual_by_hand": [
        lambda: (0.6, [0.75, 0.25, 0, 0]),
        lambda: (torch.tensor(0.6), torch.tensor([0.3, 0.1, 0.0, 0.0]) / 0.4),
    ],
    "speculative_decoding.redrawn_from_p": [redrawing(), lists_the_outcomes],
    "speculative_decoding.rank_rules": [ranking(), ranks_guess_by_guess],
    "speculative_decoding.what_stays": [staying(), stays_with_a_while],
    "speculative_decoding.greedy_round": [rounding(), rounds_with_lists],
    "speculative_decoding.best_plan": [planning(), plans_with_the_formula],
    "speculative_decoding.lookup_guesses": [finding(), finds_with_a_score],
    "speculative_decoding.tree_attention": [branching(), multiplies_matrices],
    "speculative_decoding.judge_kernel": [Judge(""), one_wide_tile],
}
