"""The checks of chapter 7. Each knows what the usual mistakes give, and names the one it sees."""

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import product
from math import prod

import torch
from torch import Tensor

from llmopt_lab.core.device import pick_device
from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.trace import recording
from llmopt_lab.grading.checks import (
    Mistake,
    NotYet,
    exercise,
    expect,
    expect_kernel,
    expect_or_name,
    expect_parts,
    expect_untouched,
    launched,
)
from llmopt_lab.speculative_decoding.cases import RULES, Chooser, TableModel
from llmopt_lab.speculative_decoding.chance import outcomes
from llmopt_lab.speculative_decoding.records import Read

EXACT = 1e-12  # of a probability that was added up from all outcomes


def _probabilities(n_vocab: int, seed: int, *, peak: float = 1.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (peak * torch.randn(n_vocab, generator=rng, dtype=torch.float64)).softmax(0)


def _expect_tokens(what: str, got, hint: str) -> list[int]:
    """`got` is a list of whole numbers."""
    if isinstance(got, Tensor):
        got = got.tolist()
    good = isinstance(got, (list, tuple)) and all(type(x) is int for x in got)
    if not good:
        raise NotYet(
            f"{what} is {str(got)[:80]}, of type {type(got).__name__}; expected a list of int",
            misconception="returns-other-things", hint=hint,
        )  # fmt: skip
    return list(got)


# 1. Too good to be true


@exercise(
    "speculative_decoding.speculative_greedy",
    points=3,
    minutes=15,
    hints=(
        "Keep the guesses apart from the text until they are judged. Then three things are added "
        "to the text: the guesses before the first wrong one, and the large model's own choice in "
        "its place. If none is wrong, there is one choice left over.",
        "right = large.choices(text + guesses, k + 1): right[0] is for the place of guesses[0], "
        "right[k] comes after all. Count n_kept up to the first difference; text += "
        "right[:n_kept + 1]. At the end cut to n_new.",
    ),
)
def _(speculative_greedy):
    for accuracy, k, n_new, seed in [
        (0.7, 4, 23, 1),
        (0.0, 3, 9, 2),
        (1.0, 3, 14, 3),
        (0.5, 1, 12, 4),
    ]:
        prompt = [2, 7, 1, 8, 2][: 2 + seed % 3]
        what = f"draft right {accuracy:.0%}, k {k}, {n_new} tokens after {len(prompt)}"
        got, n_calls, n_small = _decoded(speculative_greedy, accuracy, k, n_new, prompt, seed)
        got = _expect_tokens(
            f"{what}: your answer", got, "return one flat list: the prompt and the new tokens"
        )
        decoded = partial(_decoded, accuracy=accuracy, k=k, n_new=n_new, prompt=prompt, seed=seed)
        want, n_best, _ = decoded(_greedy)
        if got == want and n_calls == n_best:
            continue
        wrongs = [
            (name, *decoded(partial(_greedy, wrong=name))[:2], where)
            for name, where in GREEDY_MISTAKES
        ]
        cut = got[: len(want)]
        if cut == want and len(got) > len(want):
            raise NotYet(
                f"{what}: the text is right, and {len(got) - len(want)} tokens too long",
                misconception="runs-past-the-end",
                hint="the last round may yield more than is wanted: cut at n_new new tokens",
            )
        expect_or_name(
            f"{what}: text", cut, want,
            "compare with plain decoding, large.choices(text, 1) token by token: where is the "
            "first difference, and which line put that token there?",
            [*((name, text, where) for name, text, calls, where in wrongs if text != want),
             ("returns-only-what-is-new", want[len(prompt) :], "the text begins with the prompt")],
        )  # fmt: skip
        where = dict(GREEDY_OTHERS)
        names = [name for name, text, calls, _ in wrongs if text == want and calls == n_calls]
        if n_calls >= n_new > n_best:
            names = ["judges-one-by-one" if n_small else "does-not-speculate"]
        per_call = f"{n_new / n_calls:.2f} tokens a call" if n_calls else "without a call"
        expect(
            f"{what}: the text is right, {per_call}; calls of the large model", n_calls, n_best,
            where[names[0]] if names else "one call a round, and all that it has shown to be right "
            "goes into the text",
            misconception=names[0] if names else "calls-too-often",
        )  # fmt: skip


# name, where to look. `_greedy` makes each of them
GREEDY_MISTAKES = [
    ("keeps-rejected-tokens",
     "the guide's mistake: refused guesses stay in the text, and the correction replaces the LAST "
     "guess. It belongs in the place of the first refused one, and nothing may follow it"),
    ("keeps-what-follows-a-refusal",
     "the correction stands in the right place, but the guesses after it were made for another "
     "text: cut them off"),
    ("counts-every-match",
     "a guess that matches AFTER a refused one was made for another text: stop at the first "
     "difference"),
    ("judges-with-its-own-row",
     "the row of a token says what comes AFTER it. The first guess is judged by the row of the "
     "last token of the text: choices(text + guesses, k + 1)[0]"),
    ("forgets-the-prompt",
     "the large model must see the whole text: choices(text + guesses, ..), not the guesses alone, "
     "as the guide has it"),
    ("forgets-the-bonus",
     "if all k guesses are right, the same pass has said what comes after the last one: ask for "
     "k + 1 choices, and add the last"),
]  # fmt: skip

# of a text that is right
GREEDY_OTHERS = [
    *GREEDY_MISTAKES,
    ("judges-one-by-one",
     "all guesses are known before the call: one call of choices(text + guesses, k + 1) judges "
     "them all. That is the point of it"),
    ("does-not-speculate",
     "one call a token is plain decoding: right, and no faster. Let the small model guess k "
     "tokens, and judge them in one call"),
]  # fmt: skip


def _decoded(
    decode: Callable, accuracy: float, k: int, n_new: int, prompt: list[int], seed: int
) -> tuple:
    """The text, and how often the large and the small model were called."""
    large = Chooser(5, seed, most_calls=20 * n_new)
    small = Chooser(5, seed + 50, like=(Chooser(5, seed), accuracy), most_calls=40 * n_new)
    try:
        return decode(small, large, [*prompt], k, n_new), large.n_calls, small.n_calls
    except BadInput as error:
        if "no end in sight" not in str(error):
            raise
        raise NotYet(
            f"k {k}, {n_new} tokens wanted: after {small.n_calls} calls of the small model and "
            f"{large.n_calls} of the large one your loop is not done",
            misconception="never-ends",
            hint="every round must add at least one token: even if the first guess is wrong, the "
            "large model has said what belongs there",
        ) from error


def _greedy(
    small: Chooser, large: Chooser, prompt: list[int], k: int, n_new: int, *, wrong: str = ""
) -> list[int]:
    """Speculative decoding as it should be, or with the mistake called `wrong`."""
    text, end = [*prompt], len(prompt) + n_new
    while len(text) < end:
        guesses: list[int] = []
        for _ in range(k):
            guesses += small.choices(text + guesses, 1)
        right = large.choices(text + guesses, k + 1)
        if wrong == "forgets-the-prompt":
            right = [*large.choices(guesses, k), right[-1]]
        if wrong == "judges-with-its-own-row":
            right = [*right[1:], right[-1]]
        if wrong == "forgets-the-bonus":
            right = right[:-1]
        hits = [a == b for a, b in zip(guesses, right, strict=False)]
        n_kept = (*hits, False).index(False)
        if wrong == "counts-every-match":
            n_kept = sum(hits)
        new = [*guesses[:n_kept], *right[n_kept : n_kept + 1]]
        if n_kept < k and wrong == "keeps-rejected-tokens":
            new = [*guesses[:-1], right[n_kept]]
        if n_kept < k and wrong == "keeps-what-follows-a-refusal":
            new = [*guesses[:n_kept], right[n_kept], *guesses[n_kept + 1 :]]
        text += new
    return text[:end]


# 2. Which row judges which token


@exercise(
    "speculative_decoding.judging_rows",
    points=2,
    minutes=8,
    hints=(
        "Write down what is fed: the tokens of the text that are not cached, then the guesses. In "
        "which row does the last token of the TEXT stand? That row judges the first guess.",
        "The text's last token is fed token n_text - n_cached - 1. From that row on there are "
        "n_guesses + 1 rows in a row: one a guess, and one for what follows them.",
    ),
)
def _(judging_rows):
    for n_text, n_cached, n_guesses in [(7, 3, 2), (4, 0, 3), (9, 8, 4), (7, 5, 0), (12, 7, 3)]:
        last = n_text - n_cached - 1
        rows = list(range(last, last + n_guesses + 1))
        what = f"judging_rows(n_text={n_text}, n_cached={n_cached}, n_guesses={n_guesses})"
        got = judging_rows(n_text, n_cached, n_guesses)
        expect_or_name(
            what, list(got) if isinstance(got, range) else got, rows,
            "number the fed tokens from 0, and write beside each what comes after it",
            [
                ("judges-with-its-own-row", [row + 1 for row in rows],
                 "the row of a token says what comes AFTER it. The first guess is judged by the "
                 "row of the text's last token"),
                ("one-row-too-early", [row - 1 for row in rows],
                 "that row's next token is the last of the text, and you know it already"),
                ("counts-from-the-beginning-of-the-text", [row + n_cached for row in rows],
                 "rows are counted from the first FED token: the cached ones have no row"),
                ("starts-at-row-0", list(range(n_guesses + 1)),
                 "that is right only if one token of the text is not cached. The rest of the text "
                 "comes first"),
                ("forgets-the-last-row", rows[:-1],
                 "the row of the last guess is used, too: it says what follows if all are kept"),
                ("starts-after-the-guesses", [row + n_guesses for row in rows],
                 "the guesses come last in what is fed; the row before the first of them judges "
                 "it"),
                ("feeds-the-guesses-alone", [row - last - 1 for row in rows],
                 "that is the guide's call: the guesses alone. No row of theirs says what comes "
                 "before the first; -1 is the last one"),
            ],
        )  # fmt: skip


# 3. Judge, residual, bonus


@exercise(
    "speculative_decoding.judge_round",
    points=4,
    minutes=20,
    hints=(
        "A loop over the guesses with two ways out: a refusal returns from inside it, and if it "
        "comes to its end, all were kept. What is returned in each case? Which row of p and of q "
        "belongs to guess i?",
        "if not dice.happens(min(1, p[i, x] / q[i, x])): missing = (p[i] - q[i]).clamp_min(0); "
        "return guesses[:i] + [dice.pick(missing / missing.sum())]. After the loop: return "
        "guesses + [dice.pick(p[-1])].",
    ),
)
def _(judge_round):
    for n_vocab, k, seed, share in [(3, 1, 1, 0.3), (3, 2, 2, 0.6), (4, 1, 5, 0.0), (3, 0, 6, 0.5)]:
        what = f"{n_vocab} tokens, {k} guesses" if k != 1 else f"{n_vocab} tokens, 1 guess"
        models = _tables(n_vocab, k, seed, share)
        got = _listed(judge_round, *models, k)
        want, n_tokens = _true_distribution(models[0], n_vocab, k), _true_lengths(*models, k)
        if _distance(got[0], want) < EXACT and _distance(got[1], n_tokens) < EXACT:
            continue
        if _distance(got[0], want) < 1e-6 and _distance(got[1], n_tokens) < 1e-6:
            raise NotYet(
                f"{what}: the probabilities are right to 6 digits, and not to 12",
                misconception="rounds-to-float32",
                hint="p and q are float64: convert nothing to float32",
            )
        for name, change, where in JUDGE_MISTAKES:
            wrong = _listed(partial(_judge, wrong=change), *models, k, checked=False)
            right = (want, n_tokens)
            if all(_distance(a, b) < 1e-9 for a, b in zip(got, wrong, strict=True)) and any(
                _distance(a, b) > 1e-9 for a, b in zip(wrong, right, strict=True)
            ):
                raise NotYet(_difference(what, got, *right), misconception=name, hint=where)
        raise NotYet(
            _difference(what, got, want, n_tokens),
            misconception="another-distribution",
            hint="take one guess and two tokens by hand: p (0.5, 0.5), q (0.8, 0.2). How can each "
            "token come out, and with what probability? Every chance must come from dice",
        )


# name, which part of `_judge` is wrong, where to look
JUDGE_MISTAKES = [
    ("resamples-from-p", "redraw",
     "after a refusal the token comes from the residual, max(p - q, 0) over its sum. Drawn from "
     "p, the tokens that the draft likes come a second time"),
    ("residual-the-wrong-way-round", "reverse",
     "missing is what p has MORE than q: max(p - q, 0), not max(q - p, 0)"),
    ("absolute-difference", "absolute",
     "|p - q| also gives back what q has too much of: clamp at 0"),
    ("turns-the-ratio-over", "ratio",
     "a guess that the target likes more than the draft is always kept: min(1, p / q)"),
    ("keeps-with-chance-p", "chance",
     "the guess was drawn from q already: keep it with min(1, p / q). With p alone it is refused "
     "far too often, and the residual no longer fits"),
    ("matches-a-sample", "sample",
     "that is right, and slow: the text is the target's, but a guess is kept only with the chance "
     "that two draws agree, sum of p q, where sum of min(p, q) is possible"),
    ("keeps-the-likely", "threshold",
     "p >= q is no coin: a guess with p below q must still be kept sometimes, with chance p / q"),
    ("only-the-likeliest", "argmax",
     "to compare with the target's likeliest token is right for greedy decoding. Here every token "
     "has its chance"),
    ("forgets-the-bonus", "bonus",
     "when all guesses are kept, p[-1] says what comes after them: draw one more token from it"),
    ("bonus-from-the-wrong-row", "row",
     "p has one row more than q: the bonus comes from p[-1], the row after the last guess"),
    ("goes-on-after-a-refusal", "on",
     "guesses after a refused one were made for another text: the round ends there"),
    ("keeps-the-refused-token", "both",
     "the token from the residual stands IN PLACE of the refused guess, not after it"),
    ("throws-the-round-away", "lose",
     "the guesses before the refused one were kept: return them, too"),
]  # fmt: skip


def _judge(guesses: list[int], p: Tensor, q: Tensor, dice, *, wrong: str = "") -> list[int]:
    """The tokens of a round, or what comes of a mistake."""
    kept: list[int] = []
    for i, x in enumerate(guesses):
        p_x, q_x = float(p[i, x]), float(q[i, x])
        chance = {
            "ratio": min(1.0, q_x / p_x),
            "chance": p_x,
            "threshold": float(p_x >= q_x),
            "argmax": float(x == int(p[i].argmax())),
        }.get(wrong, min(1.0, p_x / q_x))
        if wrong == "sample":
            kept.append(dice.pick(p[i]))
            if kept[-1] != x:
                return kept
            continue
        if dice.happens(chance):
            kept.append(x)
            continue
        source = {
            "redraw": p[i],
            "reverse": (q[i] - p[i]).clamp_min(0),
            "absolute": (p[i] - q[i]).abs(),
        }.get(wrong, (p[i] - q[i]).clamp_min(0))
        if not source.sum() > 0:
            source = p[i]
        token = dice.pick(source / source.sum())
        kept = [] if wrong == "lose" else kept
        kept += [x, token] if wrong == "both" else [token]
        if wrong != "on":
            return kept
    if wrong == "bonus":
        return kept
    return [*kept, dice.pick(p[max(0, len(guesses) - 1)] if wrong == "row" else p[-1])]


class _Asked:
    """Dice that look at what they are asked, and at whether they are asked at all."""

    def __init__(self, dice):
        self.dice = dice

    def happens(self, chance) -> bool:
        chance = float(chance)
        if chance != chance:
            raise NotYet(
                "dice.happens was given NaN",
                misconception="nan-from-nothing",
                hint="a guess was drawn from q, so q is not 0 there: which row, which column?",
            )
        return self.dice.happens(chance)

    def pick(self, p: Tensor) -> int:
        p = torch.as_tensor(p, dtype=torch.float64)
        if p.dim() != 1:
            raise NotYet(
                f"dice.pick was given numbers of shape {tuple(p.shape)}",
                misconception="picks-from-many-rows",
                hint="one row: p[i] - q[i] for the refused guess i, p[-1] for the bonus",
            )
        if (p < 0).any() or p.isnan().any():
            raise NotYet(
                f"dice.pick was given {[round(x, 4) for x in p.tolist()]}: no probabilities",
                misconception="negative-probabilities",
                hint="where q is above p nothing is missing: clamp_min(0) before you divide by the "
                "sum",
            )
        if abs(float(p.sum()) - 1) > 1e-6:
            raise NotYet(
                f"dice.pick was given numbers whose sum is {float(p.sum()):.4f}",
                misconception="forgets-to-normalise",
                hint="max(p - q, 0) is what is missing; divide it by its sum to draw from it",
            )
        return self.dice.pick(p)


Tables = dict[tuple[int, ...], Tensor]  # what was guessed or written so far -> the next token's


def _tables(n_vocab: int, k: int, seed: int, share: float) -> tuple[Tables, Tables]:
    """p and q after every text of up to k tokens."""
    target = TableModel(n_vocab, seed)
    draft = TableModel(n_vocab, seed + 10, like=(target, share))
    texts = [text for n in range(k + 1) for text in product(range(n_vocab), repeat=n)]
    return tuple(
        {text: model.logits([0, *text]).softmax(0) for text in texts} for model in (target, draft)
    )


def _listed(
    judge: Callable, p: Tables, q: Tables, k: int, *, checked: bool = True
) -> tuple[dict, dict]:
    """The probability of every text of k + 1 tokens, and of every length of the round.

    What the round leaves open the target writes.
    """

    def program(dice) -> tuple[tuple[int, ...], int]:
        guesses: list[int] = []
        for _ in range(k):
            guesses.append(dice.pick(q[tuple(guesses)]))
        rows = torch.stack([p[tuple(guesses[:i])] for i in range(k + 1)])
        drafts = [q[tuple(guesses[:i])] for i in range(k)]
        others = torch.stack(drafts) if drafts else rows[:0]
        asked = _Asked(dice) if checked else dice
        new = judge([*guesses], rows, others.clone(), asked)
        if checked:
            new = _expect_tokens(
                "your answer", new, "return the kept guesses and one token more, as a list"
            )
        text = [*new]
        while len(text) <= k:
            text.append(dice.pick(p[tuple(text)]))
        return tuple(text), len(new)

    try:
        joint = outcomes(program)
    except BadInput as error:
        raise NotYet(
            "your function does not come to the same end when the dice fall the same way",
            misconception="rolls-its-own-dice",
            hint="draw with dice.pick and dice.happens only, not with torch.multinomial or "
            "torch.rand: then every outcome can be listed",
        ) from error
    texts, lengths = {}, {}
    for (text, n), chance in joint.items():
        texts[text] = texts.get(text, 0.0) + chance
        lengths[n] = lengths.get(n, 0.0) + chance
    return texts, lengths


def _true_distribution(p: Tables, n_vocab: int, k: int) -> dict:
    """The target's own: the conditional probabilities multiplied out."""
    return {
        text: prod(float(p[text[:i]][text[i]]) for i in range(k + 1))
        for text in product(range(n_vocab), repeat=k + 1)
    }


def _true_lengths(p: Tables, q: Tables, k: int) -> dict:
    """A round yields more than n tokens with the chance that its first n guesses are kept."""
    kept = [
        sum(
            prod(float(torch.minimum(p[text[:i]], q[text[:i]])[text[i]]) for i in range(n))
            for text in product(range(len(p[()])), repeat=n)
        )
        for n in range(k + 1)
    ]
    return {n + 1: kept[n] - (kept[n + 1] if n < k else 0.0) for n in range(k + 1)}


def _distance(a: dict, b: dict) -> float:
    return max(abs(a.get(key, 0.0) - b.get(key, 0.0)) for key in {*a, *b})


def _difference(what: str, got: tuple[dict, dict], texts: dict, lengths: dict) -> str:
    """The largest error in words: of a text, or of the length of a round."""
    for found, want, kind in [(got[0], texts, "text"), (got[1], lengths, "length")]:
        key = max({*found, *want}, key=lambda x: abs(found.get(x, 0.0) - want.get(x, 0.0)))
        mine, right = found.get(key, 0.0), want.get(key, 0.0)
        if abs(mine - right) < EXACT:
            continue
        if kind == "text":
            text = " ".join(map(str, key))
            return (
                f"{what}: of all outcomes the text {text} has probability {mine:.6f}, and the "
                f"target writes it with {right:.6f}"
            )
        return (
            f"{what}: the texts have the target's probabilities, but a round adds {key} tokens "
            f"with chance {mine:.6f}, where {right:.6f} is possible"
        )
    return what


# 4. The residual by hand


@exercise(
    "speculative_decoding.residual_by_hand",
    points=1,
    minutes=6,
    hints=(
        "A token is guessed with q and then kept with min(1, p/q): multiply, and add up over the "
        "four tokens. For the second: what does each token lack, and what is the sum of that?",
        "Kept: the sum of min(p, q), column by column. Lacking: max(p - q, 0) is 0.30 for A and "
        "0.10 for B; divide both by their sum.",
    ),
)
def _(residual_by_hand):
    p, q = torch.tensor([[0.40, 0.35, 0.15, 0.10], [0.10, 0.25, 0.55, 0.10]], dtype=torch.float64)
    got = residual_by_hand()
    expect_parts(got, "chance that the guess is kept", "the residual")
    kept, source = got
    ratio = (p / q).clamp_max(1)
    expect_or_name(
        "the chance that the guess is kept", kept, float(torch.minimum(p, q).sum()),
        "for each token: how often is it guessed, and how often is it then kept?",
        [
            ("takes-the-chance-of-a-refusal", float((p - q).clamp_min(0).sum()),
             "that is how often it is refused"),
            ("forgets-who-guesses", float(ratio.mean()),
             "min(1, p/q) is the chance if this token was guessed, and C is guessed most often: "
             "weight each by its q"),
            ("matches-a-sample", float((p * q).sum()),
             "sum of p q is the chance that two independent draws agree. The guess need not be "
             "matched: it is kept with min(1, p/q)"),
            ("weights-with-p", float((p * ratio).sum()),
             "the guess is drawn from q: weight min(1, p/q) with q"),
            ("in-percent", 100 * float(torch.minimum(p, q).sum()),
             "a probability is a number from 0 to 1"),
        ],
    )  # fmt: skip
    missing, absolute = (p - q).clamp_min(0), (p - q).abs()
    expect_or_name(
        "the residual", torch.as_tensor(source, dtype=torch.float64),
        missing / missing.sum(),
        "max(p - q, 0) for each of A, B, C, D, divided by the sum",
        [
            ("forgets-to-normalise", missing, "it must sum to 1: divide by the sum, 0.40"),
            ("resamples-from-p", p,
             "then C comes again, and it was offered too often already: max(p - q, 0)"),
            ("residual-the-wrong-way-round", (q - p).clamp_min(0) / (q - p).clamp_min(0).sum(),
             "that is what q has too much of. The target lacks max(p - q, 0)"),
            ("absolute-difference", absolute / absolute.sum(),
             "C is guessed too often: it lacks nothing, so it gets 0"),
            ("negative-probabilities", p - q, "C lacks nothing: 0 instead of -0.40"),
        ],
    )  # fmt: skip


# 5. Drawing from p after a refusal


@exercise(
    "speculative_decoding.redrawn_from_p",
    points=2,
    minutes=12,
    hints=(
        "A token comes out in two ways: guessed and kept, or drawn from p after a refusal. A "
        "refusal of what? Of any guess. How often is that in all?",
        "out = min(p, q) + (1 - sum of min(p, q)) * p; the total variation is half the sum of "
        "|out - p|.",
    ),
)
def _(redrawn_from_p):
    for n_vocab, seed, peak in [(4, 5, 1.0), (3, 5, 1.5), (7, 3, 2.0)]:
        p, q = _probabilities(n_vocab, seed, peak=peak), _probabilities(n_vocab, seed + 1)
        rule = RULES["min(1, p/q), else p"]
        found = outcomes(lambda dice: rule(dice.pick(q), p, q, dice)[0])  # noqa: B023
        out = torch.tensor([found[token] for token in range(n_vocab)], dtype=torch.float64)
        got = redrawn_from_p(p.clone(), q.clone())
        expect_parts(got, "the distribution", "its total variation")
        kept = torch.minimum(p, q)
        alpha = kept.sum()
        missing = (p - q).clamp_min(0)
        expect_or_name(
            f"{n_vocab} tokens: the distribution", got[0], out,
            "two ways to come out, added: kept with min(p, q), or any guess refused and then p",
            [
                ("that-is-p", p,
                 "it would be p with the residual. Here a refused guess is replaced by a draw "
                 "from p itself"),
                ("only-what-was-kept", kept,
                 "after a refusal a token comes, too: add the chance of a refusal times p"),
                ("forgets-how-often-it-is-refused", kept + p,
                 "p is drawn from only after a refusal: times 1 - sum of min(p, q)"),
                ("weights-the-wrong-way", kept + alpha * p,
                 "sum of min(p, q) is how often a guess is KEPT; p is drawn from after a refusal"),
                ("refuses-token-by-token", kept + (1 - (p / q).clamp_max(1)) * p,
                 "the token that comes out need not be the one that was refused: the chance of a "
                 "refusal is one number, over all guesses"),
                ("keeps-every-guess", q, "the guess is kept with chance min(1, p/q) only"),
                ("mixes-p-and-q", alpha * q + (1 - alpha) * p,
                 "what is kept is not distributed as q: x is guessed with q and then kept with "
                 "min(1, p/q), together min(p, q)"),
                ("adds-the-residual", kept + missing,
                 "that is the right rule, which gives p. Here p is drawn from instead"),
            ],
        )  # fmt: skip
        gap = (out - p).abs()
        distance = float(gap.sum() / 2)
        expect_or_name(
            f"{n_vocab} tokens: the total variation", float(got[1]), distance,
            "half the sum of |out - p|",
            [
                ("forgets-the-half", 2 * distance,
                 "what one token has too much another has too little: each error is counted "
                 "twice, so take half"),
                ("takes-the-largest-error", float(gap.max()),
                 "the SUM over all tokens, and half of it: a bias may be spread over many tokens"),
                ("adds-with-signs", float((out - p).sum()),
                 "the errors cancel, because both sum to 1: take their absolute values"),
                ("distance-of-draft-and-target", float((p - q).abs().sum() / 2),
                 "that is how far the draft is from the target, the chance of a refusal. Asked is "
                 "the distance of what comes OUT from p"),
                ("distance-from-the-draft", float((out - q).abs().sum() / 2),
                 "how far is it from p, the distribution that was promised?"),
                ("takes-the-root", float(gap.square().sum().sqrt()),
                 "total variation has no squares: half the sum of |out - p|"),
            ],
        )  # fmt: skip


# 6. Rank the rules


@exercise(
    "speculative_decoding.rank_rules",
    points=3,
    minutes=15,
    hints=(
        "outcomes wants a program of one argument, dice, that does everything that is left to "
        "chance: first the draft's draw, then the rule. What it returns is the key; you need the "
        "token and whether it was kept.",
        "joint = outcomes(lambda dice: rule(dice.pick(q), p, q, dice)) is {(token, kept): chance}. "
        "Add up by token for the distribution, by kept for the other. Sort by (round(tv, 9), "
        "-kept).",
    ),
)
def _(rank_rules):
    names = list(RULES)
    for n_vocab, seed, order in [(4, 1, [0, 1, 2, 3]), (3, 4, [3, 1, 0, 2]), (6, 8, [2, 3, 1, 0])]:
        p, q = _probabilities(n_vocab, seed, peak=1.3), _probabilities(n_vocab, seed + 1)
        rules = {names[i]: RULES[names[i]] for i in order}
        got = rank_rules(dict(rules), p.clone(), q.clone())
        rank = partial(_ranked, rules, p, q)
        want = rank()
        if not isinstance(got, (list, tuple)) or not all(
            isinstance(row, (list, tuple)) and len(row) == 3 for row in got
        ):
            raise NotYet(
                f"your answer is {str(got)[:100]}",
                misconception="returns-other-things",
                hint="a list with one (name, total variation, chance to be kept) for each rule",
            )
        mine = {row[0]: (float(row[1]), float(row[2])) for row in got}
        what = f"{n_vocab} tokens"
        expect(f"{what}: names", sorted(mine), sorted(rules), "one row for each rule, with its "
               "name", misconception="forgets-a-rule")  # fmt: skip
        for column, part, mistakes in [
            (0, "total variation", [
                ("forgets-the-half", {"half": 1.0}, "half the sum of |out - p|"),
                ("distance-from-the-draft", {"from_q": True},
                 "lossless means distributed as p: measure the distance from p"),
                ("guesses-from-p", {"guess": "p"},
                 "the draft guesses, and it draws from q: rule(dice.pick(q), p, q, dice)"),
                ("guesses-evenly", {"guess": "even"},
                 "the guess is drawn from q; you give every token the same chance"),
                ("judges-one-guess", {"guess": "likeliest"},
                 "a draft that samples does not always guess its likeliest token: draw it with "
                 "dice.pick(q)"),
                ("looks-at-kept-guesses-only", {"kept_only": True},
                 "what comes after a refusal counts as well: the distribution of the token, kept "
                 "or not"),
                ("takes-the-largest-error", {"largest": True},
                 "half the SUM of |out - p| over all tokens"),
            ]),
            (1, "chance to keep a guess", [
                ("guesses-from-p", {"guess": "p"},
                 "the draft guesses, and it draws from q: rule(dice.pick(q), p, q, dice)"),
                ("takes-an-equal-token-for-kept", {"equal": True},
                 "a token drawn afresh may happen to be the guess. The rule says itself whether "
                 "it was kept"),
                ("counts-refusals", {"refused": True}, "asked is how often it is KEPT"),
            ]),
        ]:  # fmt: skip
            right = {row[0]: row[1 + column] for row in want}
            answer = {name: mine[name][column] for name in rules}
            if all(abs(answer[name] - right[name]) < EXACT for name in rules):
                continue
            wrongs = [
                (name, {row[0]: row[1 + column] for row in rank(**change)}, where)
                for name, change, where in mistakes
            ]
            _name_the_mistake(f"{what}: {part}", answer, right, wrongs)
        ranks = [row[0] for row in got]
        expect_or_name(
            f"{what}: the order", ranks, [row[0] for row in want],
            "the smaller total variation first; of equal ones, the one that keeps more",
            [
                ("worst-first", [row[0] for row in want][::-1], "the best first"),
                ("ranks-by-what-is-kept", [row[0] for row in sorted(want, key=lambda r: -r[2])],
                 "keeping much is no merit if the text is another: total variation first"),
                ("rounding-decides",
                 [row[0] for row in sorted(got, key=lambda r: r[1])],
                 "two rules are lossless, and 1e-17 of rounding should not rank them: round the "
                 "total variation to 9 digits, then the one that keeps more"),
                ("keeps-less-first",
                 [row[0] for row in sorted(want, key=lambda r: (round(r[1], 9), r[2]))],
                 "of two lossless rules the one that keeps MORE is better"),
                ("does-not-sort", list(rules), "sort them: the best first"),
            ],
        )  # fmt: skip


def _name_the_mistake(what: str, got: dict, want: dict, mistakes: list[Mistake]) -> None:
    """Raise for probabilities that are not those that were to be listed."""
    for name, wrong, where in mistakes:
        if all(abs(got[key] - wrong[key]) < 1e-9 for key in want):
            key = max(want, key=lambda key: abs(got[key] - want[key]))
            raise NotYet(
                f"{what}, rule {key!r}, is {got[key]:.6f}, expected {want[key]:.6f}",
                misconception=name, hint=where,
            )  # fmt: skip
    key = max(want, key=lambda key: abs(got[key] - want[key]))
    error = abs(got[key] - want[key])
    close = error < 0.05
    raise NotYet(
        f"{what}, rule {key!r}, is {got[key]:.9f}, expected {want[key]:.9f}",
        misconception="samples" if close else "another-number",
        hint="that is near, and not exact: list the outcomes, do not draw samples. outcomes(..) "
        "adds up every way the dice can fall"
        if close
        else "print outcomes(lambda dice: rule(dice.pick(q), p, q, dice)) and add up by hand",
    )


def _ranked(
    rules: dict, p: Tensor, q: Tensor, *, guess: str = "q", half: float = 0.5, from_q: bool = False,
    kept_only: bool = False, largest: bool = False, equal: bool = False, refused: bool = False,
) -> list[tuple[str, float, float]]:  # fmt: skip
    """The rows that are asked for, or what comes of a mistake."""
    source = {
        "q": q,
        "p": p,
        "even": torch.full_like(q, 1 / len(q)),
        "likeliest": torch.nn.functional.one_hot(q.argmax(), len(q)).double(),
    }[guess]
    rows = []
    for name, rule in rules.items():

        def program(dice, rule=rule):
            guessed = dice.pick(source)
            token, kept = rule(guessed, p, q, dice)
            return token, kept, token == guessed

        joint = outcomes(program)
        out = torch.zeros_like(p)
        for (token, kept, _), chance in joint.items():
            out[token] += chance if kept or not kept_only else 0.0
        gap = (out - (q if from_q else p)).abs()
        flag = 2 if equal else 1
        kept = sum((chance for what, chance in joint.items() if what[flag] != refused), 0.0)
        rows.append((name, float(gap.max() if largest else half * gap.sum()), kept))
    return sorted(rows, key=lambda row: (round(row[1], 9), -row[2]))


# 7. The end among the guesses


@exercise(
    "speculative_decoding.what_stays",
    points=2,
    minutes=10,
    hints=(
        "First make the list of what would be added without ends and limits: the kept guesses and "
        "the token. Then walk along it. Two things can stop you.",
        "for x in [*guesses[:n_kept], token][:n_left]: append x; if x in ends return (new, True). "
        "After the loop the text is done if n_left tokens were added.",
    ),
)
def _(what_stays):
    ends = {9, 8}
    for guesses, n_kept, token, n_left in [
        ([1, 2], 2, 3, 50),
        ([1, 2, 3], 1, 4, 50),
        ([1, 8, 2, 9, 3], 5, 4, 50),
        ([1, 9, 2, 8, 3], 5, 4, 50),
        ([1, 2, 9, 3], 2, 4, 50),
        ([1, 2], 2, 8, 50),
        ([1, 8, 2], 3, 9, 50),
        ([9, 1, 2], 0, 5, 50),
        ([1, 2, 3, 4], 4, 5, 3),
        ([1, 2, 3, 9], 4, 5, 3),
        ([1, 9, 3, 4], 4, 5, 3),
        ([1, 2], 2, 3, 3),
        ([], 0, 9, 4),
    ]:
        whole = [*guesses[:n_kept], token]
        got = what_stays([*guesses], n_kept, token, set(ends), n_left)
        what = f"guesses {guesses}, {n_kept} kept, then {token}; {n_left} left, ends {sorted(ends)}"
        expect_parts(got, "the tokens", "whether the text is done")
        stays = partial(_stays, guesses, n_kept, token, ends, n_left)
        new, done = stays()
        expect_or_name(
            f"{what}: tokens", _expect_tokens(f"{what}: tokens", got[0], "return a list"), new,
            "walk along the kept guesses and the token, and stop at the first end or at the limit",
            [
                (name, stays(change)[0], where)
                for name, change, where in [
                    ("looks-at-the-last-token-only", "last",
                     "the end may stand anywhere among the kept guesses: nothing may follow it"),
                    ("sees-an-end-beyond-the-limit", "beyond",
                     "cut first, then look for the end: what was cut away is not in the text"),
                    ("stops-at-a-refused-end", "refused",
                     "that end was refused: the target has put another token there"),
                    ("drops-the-end-token", "drop",
                     "the end token stays in the text: a plain decoder would have written it, too"),
                    ("adds-the-token-after-the-end", "after",
                     "after an end among the guesses nothing comes, not even the target's token"),
                    ("forgets-the-limit", "limit", "no more than n_left tokens fit: cut there"),
                    ("knows-one-end-only", "one",
                     "`ends` is a set: a model may have several end tokens"),
                    ("knows-one-end-only", "other",
                     "`ends` is a set: a model may have several end tokens"),
                ]
            ] + [
                ("forgets-the-targets-token", whole[:-1][:n_left],
                 "every round ends with a token of the target's own"),
                ("adds-every-guess", [*guesses, token][:n_left],
                 "only the first n_kept guesses were kept"),
            ],
        )  # fmt: skip
        ended = any(x in ends for x in new)
        if ended:
            hint, name = "the text ends with an end token: done", "goes-on-after-the-end"
        elif done:
            hint = "with the last token that fits the text is done"
            name = "never-done-at-the-limit"
        elif any(x in ends for x in guesses):
            hint = "that end was refused, and there is room: not done"
            name = "done-at-a-refused-end"
        else:
            hint, name = "no end and still room: not done", "done-too-early"
        expect(f"{what}: done", got[1], done, hint, misconception=name)


def _stays(
    guesses: list[int], n_kept: int, token: int, ends: set[int], n_left: int, wrong: str = ""
) -> tuple[list[int], bool]:
    whole = [*guesses[:n_kept], token]
    if wrong in ("one", "other"):
        ends = {min(ends) if wrong == "one" else max(ends)}
    if wrong == "limit":
        n_left = len(whole) + 1
    cut = whole[:n_left]
    if wrong == "last":
        return cut, cut[-1] in ends or len(cut) == n_left
    if wrong == "refused" and (found := [i for i, x in enumerate(guesses) if x in ends]):
        return guesses[: found[0] + 1], True
    if wrong == "beyond" and any(x in ends for x in whole):
        first = next(i for i, x in enumerate(whole) if x in ends)
        return whole[: first + 1], True
    new = []
    for x in cut:
        new.append(x)
        if x in ends:
            if wrong == "drop":
                new.pop()
            if wrong == "after" and len(new) < len(cut):
                new.append(token)
            return new, True
    return new, len(new) == n_left


# 8. Two caches in step


@exercise(
    "speculative_decoding.greedy_round",
    points=3,
    minutes=20,
    hints=(
        "text[model.length:] is what a model has not read yet: one token in most rounds, the whole "
        "prompt in the first, two for the draft after a round in which all guesses were kept. "
        "Feed that, and then the guesses. At the end: how many tokens in each cache are still "
        "right?",
        "draft: read(text[draft.length:], n_last=1), then k - 1 times the last guess. target: "
        "read(text[target.length:] + guesses, n_last=k + 1); row i judges guess i. Then "
        "rewind(len(text) + n_kept) for both: the newest token is not read by anybody yet.",
    ),
)
def _(greedy_round):
    for share, k, n_rounds, seed in [
        (0.0, 3, 4, 3),
        (1.0, 2, 4, 2),
        (0.55, 3, 12, 1),
        (0.8, 1, 8, 4),
    ]:
        what = {1.0: "a draft that is always right", 0.0: "a draft that knows nothing"}.get(
            share, "a draft that is often right"
        )
        _rounds(greedy_round, f"{what}, k {k}", share, k, n_rounds, seed)


def _pair(share: float, seed: int) -> tuple[TableModel, TableModel]:
    target = TableModel(4, seed, peak=2.0)
    like = (TableModel(4, seed, peak=2.0), share)
    return target, TableModel(4, seed + 20, like=like, peak=2.0, name="draft")


def _rounds(attempt: Callable, what: str, share: float, k: int, n_rounds: int, seed: int) -> None:
    """Round after round, with the text, both caches and the counts looked at after each."""
    target, draft = _pair(share, seed)
    oracle, guesser = _pair(share, seed)
    text = [2, 0, 3]
    for number in range(n_rounds):
        where = f"{what}, round {number}"
        guesses: list[int] = []
        for _ in range(k):
            guesses.append(int(guesser.logits(text + guesses).argmax()))
        right = [int(oracle.logits(text + guesses[:i]).argmax()) for i in range(k + 1)]
        n_kept = next((i for i in range(k) if guesses[i] != right[i]), k)
        unread = {"target": len(text) - target.length, "draft": len(text) - draft.length}
        given = [*text]
        with recording(Read) as trace:
            new = attempt(target, draft, given, k)
        new = _expect_tokens(
            f"{where}: your answer", new, "return the tokens that this round adds, as a list"
        )
        if given != text:
            raise NotYet(
                f"{where}: the text that was given has changed",
                misconception="changes-the-text",
                hint="the caller adds what you return: work on a copy, text + guesses",
            )
        read = draft.text[: len(text)]
        if read != text[: len(read)]:
            raise NotYet(
                f"{where}: the text is {text}, and the draft has read {read} of it",
                misconception="a-hole-in-the-drafts-cache",
                hint="a token is missing there. After a round in which all guesses were kept the "
                "draft has not read its last guess: feed it text[draft.length:]",
            )
        expect_or_name(
            f"{where}: guesses {guesses}, {n_kept} of {k} right. New tokens", new,
            right[: n_kept + 1],
            "the kept guesses, and the target's choice after them",
            [
                ("keeps-rejected-tokens", [*guesses[:-1], right[n_kept]] if n_kept < k else None,
                 "nothing may follow the first refused guess, and the correction stands in its "
                 "place"),
                ("forgets-the-bonus", guesses if n_kept == k else None,
                 "all guesses are kept, and row k says what comes after them"),
                ("returns-the-kept-guesses-alone", right[:n_kept] if n_kept < k else None,
                 "the target has said what belongs in the place of the refused guess: add it"),
                ("judges-with-its-own-row", _own_row(oracle, text, guesses, k),
                 "row 0 of the last k + 1 is that of the text's last token, and it judges the "
                 "first guess: n_last=k + 1"),
                ("returns-the-whole-text", text + right[: n_kept + 1],
                 "only the tokens that this round adds"),
            ],
        )  # fmt: skip
        after = text + new
        _expect_caches(where, target, draft, text, guesses, n_kept, after)
        _expect_counts(where, trace.of(Read), unread, k)
        text = after


def _own_row(oracle: TableModel, text: list[int], guesses: list[int], k: int) -> list[int]:
    """The round of somebody who takes each guess's own row for its judge."""
    rows = [int(oracle.logits(text + guesses[: i + 1]).argmax()) for i in range(k)]
    n_kept = next((i for i in range(k) if guesses[i] != rows[i]), k)
    return [*guesses[:n_kept], rows[min(n_kept, k - 1)]]


def _expect_caches(where: str, target, draft, text, guesses, n_kept: int, after) -> None:
    """Each has read a beginning of the text, and all that it could keep."""
    good = len(text) + n_kept
    for model in (target, draft):
        name, have = model.name, model.text
        what = f"{where}: afterwards the {name} has read {have}; the text is {after}"
        one_too_few = [*text, *guesses[: n_kept + 1]]
        if n_kept + 1 < len(guesses) and model is target and have == one_too_few:
            raise NotYet(
                what, misconception="rewinds-one-too-few",
                hint="its last token is the refused guess. The new token in its place has not been "
                "read by anybody: rewind to the text before the round and the kept guesses",
            )  # fmt: skip
        if have != after[: len(have)]:
            raise NotYet(
                what, misconception=f"{name}-keeps-refused-guesses",
                hint=f"the {name} has read guesses that were refused: {name}.rewind(len(text) + "
                "n_kept), or what comes next looks at tokens that are not there",
            )  # fmt: skip
        most = good if model is target else min(good, len(text) + len(guesses) - 1)
        if len(have) < most:
            raise NotYet(
                f"{where}: {n_kept} of {len(guesses)} kept; the {name} has read {len(have)} tokens "
                f"of the text afterwards, and {most} of those in its cache were right",
                misconception=f"{name}-forgets-what-was-kept",
                hint="what was kept need not be read again: rewind(len(text) + n_kept), no further",
            )


def _expect_counts(where: str, reads: list[Read], unread: dict[str, int], k: int) -> None:
    of = {name: [read for read in reads if read.who == name] for name in ("target", "draft")}
    n_target = sum(read.n for read in of["target"])
    expect_or_name(
        f"{where}: the tokens are right. Passes of the target", len(of["target"]), 1,
        "one read of what is unread and all guesses",
        [
            ("judges-one-by-one", k + 1,
             "that is one pass a row. All guesses are known: read(unread + guesses, n_last=k + 1)"),
            ("judges-one-by-one", k,
             "that is one pass a guess. All guesses are known: read(unread + guesses, "
             "n_last=k + 1)"),
            ("reads-the-text-in-a-pass-of-its-own", 2,
             "the unread text and the guesses go in one pass, one after the other"),
        ],
    )  # fmt: skip
    if n_target > unread["target"] + k:
        raise NotYet(
            f"{where}: the target has read {n_target} tokens, and {unread['target'] + k} are new: "
            f"{unread['target']} of the text and {k} guesses",
            misconception="reads-everything-again",
            hint="its cache has the rest: feed text[target.length:] and the guesses",
        )
    expect_or_name(
        f"{where}: the tokens are right. Passes of the draft", len(of["draft"]), k,
        "one pass a guess: the first reads what is unread, each later one the guess before it",
        [
            ("draft-reads-its-last-guess", k + 1,
             "the last guess need not be read now: if it is kept, the next round's first pass "
             "reads it together with the newest token"),
        ],
    )  # fmt: skip
    n_draft = sum(read.n for read in of["draft"])
    if n_draft > unread["draft"] + k - 1:
        raise NotYet(
            f"{where}: the draft has read {n_draft} tokens, and {unread['draft'] + k - 1} are new: "
            f"{unread['draft']} of the text and {k - 1} guesses",
            misconception="draft-reads-everything-again",
            hint="its cache has the rest: feed text[draft.length:] first, then one guess a pass",
        )


# 9. How far to guess


@exercise(
    "speculative_decoding.best_plan",
    points=2,
    minutes=10,
    hints=(
        "For every k from 0 to most: tokens, then cost, then their ratio. With k = 0 it is plain "
        "decoding: 1 token, cost 1, speed-up 1.",
        "tokens = sum(alpha**i for i in range(k + 1)), which needs no division and is right at "
        "alpha = 1; cost = k * c + 1. Take the largest ratio, and the smallest k of equal ones.",
    ),
)
def _(best_plan):
    for alpha, c, most in [
        (0.8, 0.05, 12),
        (0.6, 0.2, 8),
        (0.3, 0.4, 8),
        (0.9, 0.0, 6),
        (0.0, 0.1, 5),
        (0.5, 0.5, 4),
        (1.0, 0.25, 7),
    ]:
        got = best_plan(alpha, c, most)
        expect_parts(got, "k", "tokens", "speed-up")
        plan = partial(_plan, alpha, c, most)
        want = plan()
        expect_or_name(
            f"best_plan(alpha={alpha}, c={c}, most={most}), (k, tokens, speed-up)",
            (got[0], float(got[1]), float(got[2])), want,
            "make the table by hand for k = 0, 1, 2: tokens, cost, ratio",
            [
                ("forgets-the-bonus", plan(tokens=lambda k: sum(alpha**i for i in range(1, k + 1))),  # noqa: B023
                 "even if every guess is refused the round yields the target's own token: the sum "
                 "starts with 1"),
                ("counts-one-guess-less", plan(tokens=lambda k: sum(alpha**i for i in range(k))),  # noqa: B023
                 "k guesses and the bonus: the last term is alpha^k"),
                ("guesses-after-a-refusal-count", plan(tokens=lambda k: 1 + k * alpha),  # noqa: B023
                 "a guess counts only if all before it were kept: alpha^i for the i-th"),
                ("forgets-the-draft", plan(cost=lambda k: 1.0),
                 "tokens a call of the target is not the speed-up: k passes of the draft cost "
                 "k * c"),
                ("forgets-the-target", plan(cost=lambda k: k * c or 1.0),  # noqa: B023
                 "the target's own pass costs 1: k * c + 1"),
                ("one-pass-of-the-draft", plan(cost=lambda k: 1 + c * (k > 0)),  # noqa: B023
                 "the draft makes one pass a guess: k * c"),
                ("takes-the-largest-of-equals", plan(last=True),
                 "of equally fast ones the smallest k"),
                ("always-guesses", plan(least=1),
                 "k = 0 is a choice, too, and here the best: speculation would be slower"),
                ("takes-the-most-tokens", plan(by_tokens=True),
                 "more guesses always give more tokens a call. What counts is tokens over cost"),
                ("stops-before-most", plan(most_k=most - 1), "k = most is allowed"),
            ],
        )  # fmt: skip


def _plan(
    alpha: float, c: float, most: int, *, tokens: Callable | None = None,
    cost: Callable | None = None, least: int = 0, by_tokens: bool = False, last: bool = False,
    most_k: int | None = None,
) -> tuple[int, float, float]:  # fmt: skip
    tokens = tokens or (lambda k: sum(alpha**i for i in range(k + 1)))
    cost = cost or (lambda k: k * c + 1)
    rows = [
        (k, float(tokens(k)), tokens(k) / cost(k))
        for k in range(least, (most if most_k is None else most_k) + 1)
    ]
    if by_tokens:
        return max(rows, key=lambda row: (row[1], row[0]))
    return max(rows, key=lambda row: (row[2], row[0] if last else -row[0]))


# 10. Prompt lookup


@exercise(
    "speculative_decoding.lookup_guesses",
    points=2,
    minutes=12,
    hints=(
        "Two loops: n from long to short, and for each n the places from late to early. The ending "
        "itself is no match: where may an earlier one begin at the latest?",
        "for n in range(min(longest, len(text) - 1), 0, -1): for start from len(text) - n - 1 down "
        "to 0: if text[start:start + n] == text[-n:], return text[start + n:start + n + k].",
    ),
)
def _(lookup_guesses):
    for text, k, longest in [
        ([4, 1, 2, 3, 9, 8, 1, 2, 3], 3, 3),
        ([5, 7, 9, 2, 4, 7, 9, 8, 1, 7, 9], 2, 3),
        ([1, 2, 3, 4, 2, 3], 5, 3),
        ([1, 2, 3, 5, 9, 3, 6, 1, 2, 3], 2, 3),
        ([4, 6, 4, 7, 4], 1, 2),
        ([2, 1, 1, 1, 1], 4, 3),
        ([2, 4, 1, 2, 9, 3, 2, 8, 1, 2], 3, 1),
        ([1, 2, 3, 4], 4, 3),
        ([6], 2, 3),
        ([8, 1, 2, 8, 5, 1, 2, 8, 1, 2], 3, 2),
    ]:
        got = lookup_guesses([*text], k, longest)
        got = _expect_tokens(
            f"lookup_guesses({text}, k={k}, longest={longest})", got,
            "a list of up to k tokens; [] if there is no guess",
        )  # fmt: skip
        look = partial(_lookup, text, k, longest)
        expect_or_name(
            f"lookup_guesses({text}, k={k}, longest={longest})", got, look(),
            "write the last n tokens below the text and slide them to the left until they fit",
            [
                ("takes-the-earliest-place", look(latest=False),
                 "of several places the latest one: what was written last is most likely to come "
                 "again"),
                ("looks-for-the-shortest-ending", look(longest_first=False),
                 "a long ending says more: begin with `longest` tokens"),
                ("only-the-longest-ending", look(shorter=False),
                 "if the last `longest` tokens occur nowhere else, try one token less"),
                ("finds-the-ending-itself", look(itself=True),
                 "the ending is at the end, of course, and nothing follows it: look before it"),
                ("returns-the-match", look(shift=False),
                 "what FOLLOWED it is the guess: from start + n on"),
                ("guesses-on-to-the-end", look(all_of_it=True), "at most k tokens"),
                ("must-not-overlap", look(apart=True),
                 "the earlier place may overlap the ending, and what follows may be a part of it"),
                ("one-token-only", look()[:1], f"up to k = {k} tokens"),
                ("longer-than-longest", look(unlimited=True),
                 "at most the last `longest` tokens are compared"),
                ("skips-what-follows-first", look(extra=1),
                 "the first guess is the token right after the match: text[start + n]"),
            ],
        )  # fmt: skip


def _lookup(
    text: list[int], k: int, longest: int, *, latest: bool = True, longest_first: bool = True,
    shorter: bool = True, itself: bool = False, shift: bool = True, all_of_it: bool = False,
    apart: bool = False, unlimited: bool = False, extra: int = 0,
) -> list[int]:  # fmt: skip
    sizes = list(range(min(len(text) if unlimited else longest, len(text) - 1), 0, -1))
    if not longest_first:
        sizes = sizes[::-1]
    for n in sizes if shorter else [n for n in sizes if n == longest]:
        end = len(text) - n + itself - (n - 1) * apart
        starts = range(max(0, end))
        for start in reversed(starts) if latest else starts:
            if text[start : start + n] == text[-n:]:
                first = start + n * shift + extra
                return text[first : len(text) if all_of_it else first + k]
    return []


# 11. The mask of a tree


@exercise(
    "speculative_decoding.tree_attention",
    points=2,
    minutes=10,
    hints=(
        "A node sees itself, and whatever its parent sees. Parents come before their children, so "
        "the parent's row is there already when you come to the child.",
        "mask = torch.eye(n, dtype=torch.bool); for each node with a parent >= 0: mask[node] |= "
        "mask[parent], depth = depths[parent] + 1; without one the depth is 0.",
    ),
)
def _(tree_attention):
    for parents in [
        [-1, -1, 0, 0, 1, 3],
        [-1, 0, 1, 2],
        [-1, -1, -1],
        [-1, 0, 0, 1, -1, 4, 3, 2, 6],
        [-1],
    ]:
        got = tree_attention([*parents])
        expect_parts(got, "the mask", "the depths")
        n = len(parents)
        paths = []
        for node in range(n):
            path = [node]
            while parents[path[-1]] >= 0:
                path.append(parents[path[-1]])
            paths.append(path)
        want = torch.zeros(n, n, dtype=torch.bool)
        for node, path in enumerate(paths):
            want[node, path] = True
        eye, parent = torch.eye(n, dtype=torch.bool), torch.zeros(n, n, dtype=torch.bool)
        for node, above in enumerate(parents):
            if above >= 0:
                parent[node, above] = True
        wraps = eye.clone()
        for node, above in enumerate(parents):
            wraps[node] |= wraps[above]  # -1 is the last row
        depths = [len(path) - 1 for path in paths]
        level = torch.tensor(depths)[None, :] <= torch.tensor(depths)[:, None]
        expect_or_name(
            f"parents {parents}: mask", got[0], want,
            "go up from each node to its parent, the parent's parent, and so on, and mark them",
            [
                ("sees-every-earlier-node", torch.ones(n, n, dtype=torch.bool).tril(),
                 "that is the mask of a chain. Here an earlier node may be a sibling, a rival for "
                 "the same place, and must not be seen"),
                ("sees-the-parent-only", eye | parent,
                 "the parent's parent is its past, too: all ancestors up to the text"),
                ("does-not-see-itself", want & ~eye, "a token attends to itself as well"),
                ("sees-its-descendants", want.T,
                 "rows are who looks, columns are what is seen: a node sees its ancestors"),
                ("sees-up-and-down", want | want.T, "a node must not see what comes after it"),
                ("sees-all-of-its-depth", level,
                 "nodes of the same or a smaller depth may be on other branches: only ancestors"),
                ("follows-minus-one", wraps,
                 "a parent of -1 is the text, not the last node: mask[-1] is a row in Python"),
                ("sees-itself-alone", eye, "and its ancestors: its past, which it was guessed for"),
            ],
        )  # fmt: skip
        expect_or_name(
            f"parents {parents}: depths", got[1], depths,
            "0 for a child of the text, one more than its parent for every other",
            [
                ("numbers-the-nodes", list(range(n)),
                 "siblings claim the same place in the text, so they have the same position: the "
                 "depth"),
                ("starts-at-one", [depth + 1 for depth in depths],
                 "a child of the text has depth 0: it stands in the first place after the text"),
                ("gives-the-parents", list(parents), "the depth, not the parent's number"),
            ],
        )  # fmt: skip


# 12. The judge as a kernel

TILE = 16


@exercise(
    "speculative_decoding.judge_kernel",
    points=5,
    minutes=40,
    hints=(
        "Write it in this order and run the check after each: both maxima and totals, `kept`, "
        "then `missing`, then the token. Every loop walks the row in tiles and loads with a mask; "
        "what should a masked logit be?",
        "Load with other=-float('inf'). Take the maxima in a loop of their own: then no exponent "
        "is -inf - -inf. missing adds tl.sum(tl.maximum(p - q, 0)). At the end: running = before "
        "+ tl.cumsum(lack, axis=0); token += tl.sum((running <= u_pick * missing).to(tl.int32)); "
        "before += tl.sum(lack). Store tl.minimum(token, n_vocab - 1).",
    ),
)
def _(kernel):
    expect_kernel("judge_kernel", kernel)
    # n_rows, n_vocab, what is added to the logits, how many of the first are -inf in p, in q
    for what, n_rows, n_vocab, shift, hidden_p, hidden_q in [
        ("16 tokens", 7, 16, 0.0, 0, 0),
        ("32 tokens", 5, 32, 0.0, 0, 0),
        ("logits around 200", 3, 16, 200.0, 0, 0),
        ("27 tokens", 7, 27, 0.0, 0, 0),
        ("only some tokens allowed", 4, 32, 0.0, 18, 4),
    ]:
        inputs = _row_inputs(n_rows, n_vocab, shift, hidden_p, hidden_q)
        got = _launch(kernel, what, inputs)
        want = _rows(*inputs)
        unwritten = [name for name, row in got.items() if set(row) == {UNWRITTEN}]
        if unwritten:
            names = " and ".join(unwritten)
            raise NotYet(
                f"{what}: nothing was written to {names}",
                misconception="stores-nothing" if len(unwritten) == 2 else f"forgets-{names}",
                hint="every program ends in two stores: tl.store(kept_ptr + row, ..) and "
                "tl.store(token_ptr + row, ..)",
            )
        if got == want:
            continue
        wrongs = [(name, _rows(*inputs, **change), where) for name, change, where in ROW_MISTAKES]
        for name, wrong, _ in wrongs:
            # their sum is 0 but for rounding, which decides about the last token
            pairs = zip(wrong["token"], got["token"], strict=True)
            if name == "forgets-to-clamp" and all(abs(a - b) <= 1 for a, b in pairs):
                wrong["token"] = got["token"]
        for part in ("kept", "token"):
            expect_or_name(
                f"{what}: {part}", got[part], want[part],
                "take one row of 4 tokens by hand: two softmaxes, the differences, their running "
                "sums",
                [(name, wrong[part], where) for name, wrong, where in wrongs],
            )  # fmt: skip


# name, how `_rows` differs, where to look. What makes NaN first, then those of `kept`
ROW_MISTAKES = [
    ("nan-from-nothing", {"nan": True},
     "a whole first tile of -inf leaves m at -inf, and -inf - -inf is NaN. Take the maximum of the "
     "whole row first, then the sum; or subtract 0 where m is -inf"),
    ("subtracts-no-maximum", {"overflow": True},
     "exp(200) is infinity in float32: subtract the row's largest logit first"),
    ("compares-logits", {"keep": "logits"},
     "logits are no probabilities: exp(logit - m) / total, with each model's own m and total"),
    ("forgets-the-totals", {"keep": "unnormalised"},
     "exp(logit - m) must be divided by the sum over the row: p and q have different ones"),
    ("turns-the-ratio-over", {"keep": "ratio"},
     "kept with chance min(1, p / q): u_keep * q < p, not u_keep * p < q"),
    ("keeps-with-chance-p", {"keep": "chance"},
     "the guess was drawn from q already: u_keep * q(guess) < p(guess)"),
    ("compares-without-chance", {"keep": "certain"},
     "a guess with p below q is kept sometimes: u_keep decides"),
    ("says-what-is-refused", {"keep": "refused"}, "1 means kept"),
    ("counts-the-padding", {"padding": 0.0},
     "the last tile is shorter, and a masked load gives other=0.0: a logit of 0 has a probability. "
     "Load with other=-float('inf')"),
    ("drops-the-last-tile", {"drop": True},
     "n_vocab is no multiple of TILE: range(0, n_vocab, TILE), and a mask for the last tile"),
    ("everybody-takes-row-0", {"row": 0}, "the row begins at row * n_vocab"),
    ("resamples-from-p", {"draw": "p"},
     "after a refusal the token comes from max(p - q, 0), not from p"),
    ("residual-the-wrong-way-round", {"draw": "reverse"},
     "missing is what p has MORE than q: max(p - q, 0)"),
    ("absolute-difference", {"draw": "absolute"},
     "where q is above p nothing is missing: tl.maximum(p - q, 0.0), no absolute value"),
    ("forgets-to-clamp", {"draw": "signed"},
     "p - q sums to 0 over the row: tl.maximum(p - q, 0.0) before anything is added up"),
    ("threshold-without-missing", {"threshold": "u"},
     "the residual is not divided by its sum, so multiply u_pick by it: u_pick * missing"),
    ("takes-the-largest", {"draw": "largest"},
     "that is the token that lacks most; u_pick must decide among all that lack something"),
    ("uses-the-other-random-number", {"threshold": "keep"},
     "u_keep has decided already, and what is refused has a large one: u_pick draws the token"),
    ("starts-each-tile-afresh", {"walk": "afresh"},
     "tl.cumsum begins at 0 in every tile: add `before`, the sum of all tiles before"),
    ("number-within-the-tile", {"walk": "within"},
     "count over ALL tiles, or add `first`: a token's number is its place in the row"),
    ("one-token-too-far", {"walk": "far"},
     "the token whose running sum exceeds it, itself included, is the one: count those that do "
     "not exceed it, from 0"),
    ("one-token-too-early", {"walk": "early"},
     "the running sum includes the token itself: tl.cumsum starts with the first value"),
]  # fmt: skip

UNWRITTEN = -7
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@lru_cache
def _row_inputs(n_rows: int, n_vocab: int, shift: float, hidden_p: int, hidden_q: int) -> Inputs:
    """p and q logits, guesses, u_keep and u_pick, so that no float32 rounding decides anything."""
    for seed in range(1000):
        rng = torch.Generator().manual_seed(1000 * n_vocab + seed)
        p_logits, q_logits = 1.5 * torch.randn(2, n_rows, n_vocab, generator=rng) + shift
        p_logits[:, 0] += 2.0  # a first token that has much: the softmaxes have different totals
        q_logits[:, -1] += 2.0
        p_logits[:, :hidden_p] = -torch.inf
        q_logits[:, :hidden_q] = -torch.inf
        guesses = torch.multinomial(q_logits.softmax(1), 1, generator=rng)[:, 0]
        u_keep, u_pick = torch.rand(2, n_rows, generator=rng)
        p, q = p_logits.double().softmax(1), q_logits.double().softmax(1)
        rows = torch.arange(n_rows)
        margin = (u_keep * q[rows, guesses] - p[rows, guesses]).abs().min()
        missing = (p - q).clamp_min(0)
        at = missing.cumsum(1) / missing.sum(1, keepdim=True)
        gap = (at - u_pick[:, None]).abs().min()
        n_kept = int((u_keep * q[rows, guesses] < p[rows, guesses]).sum())
        inputs = (p_logits, q_logits, guesses.to(torch.int32), u_keep, u_pick)
        if margin > 1e-4 and gap > 1e-3 and 0 < n_kept < n_rows:
            rules = ("", "logits", "unnormalised", "ratio", "chance", "certain", "refused")
            n_found = len({tuple(_rows(*inputs, keep=rule)["kept"]) for rule in rules})
            if n_rows < 7 or n_found == len(rules):  # else a mistake would get another's name
                return inputs
    raise AssertionError("no inputs without a close call: draw more")


def _rows(
    p_logits: Tensor, q_logits: Tensor, guesses: Tensor, u_keep: Tensor, u_pick: Tensor, *,
    keep: str = "", draw: str = "", threshold: str = "", walk: str = "",
    padding: float | None = None, drop: bool = False, nan: bool = False, overflow: bool = False,
    row: int | None = None,
) -> dict[str, list[int]]:  # fmt: skip
    """What each row's program writes, in float64; or what comes of a mistake."""
    n_rows, n_vocab = p_logits.shape
    kept, tokens = [], []
    for r in range(n_rows):
        logits = [x[r if row is None else row].double() for x in (p_logits, q_logits)]
        if drop:
            logits = [x[: n_vocab // TILE * TILE] for x in logits]
        if padding is not None:
            past = -n_vocab % TILE
            logits = [torch.cat([x, x.new_full((past,), padding)]) for x in logits]
        p, q = (_softmax(x, nan=nan, overflow=overflow) for x in logits)
        guess, u = int(guesses[r]), float(u_keep[r])
        inside = guess < len(p)
        p_x, q_x = (float(x[guess]) if inside else 0.0 for x in (p, q))
        raw_p, raw_q = (float(x[guess]) if inside else 0.0 for x in logits)
        top_p, top_q = (float(torch.exp(x[guess] - x.max())) if inside else 0.0 for x in logits)
        kept.append(int({
            "logits": u * raw_q < raw_p,
            "unnormalised": u * top_q < top_p,
            "ratio": u * p_x < q_x,
            "chance": u < p_x,
            "certain": q_x <= p_x,
            "refused": u * q_x >= p_x,
        }.get(keep, u * q_x < p_x)))  # fmt: skip
        lack = {
            "p": p,
            "reverse": (q - p).clamp_min(0),
            "absolute": (p - q).abs(),
            "signed": p - q,
        }.get(draw, (p - q).clamp_min(0))
        if draw == "largest":
            tokens.append(int(lack.argmax()))
            continue
        limit = float(u_keep[r] if threshold == "keep" else u_pick[r])
        if threshold != "u":
            limit *= float(lack.sum())
        running = lack.cumsum(0)
        not_above = (running <= limit).long()
        if walk == "afresh":
            not_above = torch.cat([x.cumsum(0) for x in lack.split(TILE)]) <= limit
        number = int(not_above.sum())
        number = {"within": number % TILE, "far": number + 1, "early": number - 1}.get(walk, number)
        tokens.append(max(min(number, n_vocab - 1), -1))
    return {"kept": kept, "token": tokens}


def _softmax(x: Tensor, *, nan: bool, overflow: bool) -> Tensor:
    """In one row; NaN where a float32 kernel with the mistake gives that."""
    spoilt = nan and x[:TILE].isinf().all() or overflow and x.max() > 88
    return torch.full_like(x, torch.nan) if spoilt else x.softmax(0)


def _launch(kernel, what: str, inputs: Inputs) -> dict[str, list[int]]:
    """One program a row, on a GPU or in the interpreter."""
    device, (n_rows, n_vocab) = pick_device(), inputs[0].shape
    # each row stands between others: an address that is off a little finds those, and no crash
    p, q = (
        torch.stack([torch.full_like(x, torch.nan), x, x.flip(1)]).to(device) for x in inputs[:2]
    )
    guesses, u_keep, u_pick = (x.to(device) for x in inputs[2:])
    width = n_rows + n_vocab + TILE
    kept = torch.full((3, width), UNWRITTEN, dtype=torch.int32, device=device)
    token = torch.full((3, width), UNWRITTEN, dtype=torch.int32, device=device)
    with launched():
        kernel[(n_rows,)](
            p[1], q[1], guesses, u_keep, u_pick, kept[1], token[1], n_vocab, TILE=TILE
        )
    for name, tensor in (("kept", kept), ("token", token)):
        outside = torch.cat([tensor[[0, 2]].flatten(), tensor[1, n_rows:]])
        expect_untouched(
            what, name, outside != UNWRITTEN,
            f"one program writes one number: tl.store({name}_ptr + row, ..)",
            misconception="writes-past-its-rows",
        )  # fmt: skip
    return {"kept": kept[1, :n_rows].tolist(), "token": token[1, :n_rows].tolist()}
