"""The checks of chapter 3. Each knows what the usual mistakes give, and names the one it sees."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from itertools import combinations, product
from math import ceil, comb, floor
from numbers import Real

import torch
from torch import Tensor

from llmopt_lab.core.device import pick_device
from llmopt_lab.core.memory import Load, Store, ceil_div
from llmopt_lab.core.trace import Trace, recording
from llmopt_lab.grading.checks import (
    Mistake,
    NotYet,
    exercise,
    expect_kernel,
    expect_numbers,
    expect_or_name,
    expect_parts,
    expect_stored,
    launched,
)


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=_rng(seed), dtype=dtype)


def _visits(n_tokens: int, n_experts: int, k: int, *, seed: int, without: tuple = ()) -> Tensor:
    """(n_tokens, k) int64: k different experts of each token, some of them much liked."""
    liking = 2 * _random(n_experts, seed=seed + 1) + _random(n_tokens, n_experts, seed=seed)
    liking[:, list(without)] = -torch.inf
    return liking.argsort(dim=1, descending=True)[:, :k].contiguous()


def _counts(experts: Tensor, n_experts: int) -> Tensor:
    """Visits of each expert, (n_experts,) float64: a quotient of integers would be float32."""
    return experts.flatten().bincount(minlength=n_experts).double()


def _expect_parts_in_turn(
    what: str, got: dict, want: dict, mistakes: list[tuple[str, dict, str]], hint: str
) -> None:
    """One part after the other: what is made of a wrong part is wrong in its own way."""
    for part in want:
        wrongs = [(name, wrong[part], where) for name, wrong, where in mistakes]
        expect_or_name(f"{what}: {part}", got[part], want[part], hint, wrongs)


# 1. The loss that does nothing


@exercise(
    "moe.balance_loss",
    points=3,
    minutes=15,
    hints=(
        "Two numbers an expert. f: its share of all visits, counted from `experts`, so it has no "
        "gradient. P: its mean probability over the tokens, from `probabilities`, so it has one. "
        "Where do they meet?",
        "f = torch.bincount(experts.flatten(), minlength=n_experts) / experts.numel(); "
        "P = probabilities.mean(dim=0); the loss is n_experts * (f * P).sum().",
    ),
)
def _(balance_loss):
    for what, probabilities, experts in [
        ("6 tokens, 4 experts, top-1", *_routed(6, 4, 1, seed=1)),
        ("7 tokens, 5 experts, top-2, nobody visits the last one", *_routed(7, 5, 2, seed=2)),
        ("9 tokens, 6 experts, top-3, chosen with a bias", *_routed(9, 6, 3, seed=3, bias=2.0)),
        ("8 tokens that all visit expert 2 of 4", *_routed(8, 4, 1, seed=4, peak=9.0)),
    ]:
        leaf = probabilities.float().requires_grad_()
        loss = balance_loss(leaf, experts.clone())
        if loss is not None and (not isinstance(loss, Tensor) or loss.numel() != 1):
            raise NotYet(
                f"{what}: balance_loss returns {_shape_of(loss)}",
                misconception="returns-other-things",
                hint="a loss is a tensor of one number: sum over the experts, and no .item(), "
                "which cuts the gradient off",
            )
        if loss is not None and not loss.requires_grad:
            raise NotYet(
                f"{what}: your loss is {loss.item():.4g} and has no gradient "
                "(requires_grad is False)",
                misconception="does-nothing-like-the-guides",
                hint="counts of visits are made of comparisons, and these have no slope. Something "
                "must come from `probabilities`: their mean over the tokens",
            )
        want = _with_slope(_balance(), probabilities, experts)
        got = loss if loss is None else {"loss": loss.float(), "slope": _slope(loss, leaf)}
        expect_or_name(
            f"{what}: your answer", got, want,
            "take two tokens and two experts, and go through f, P and the sum by hand",
            [
                (name, _with_slope(_balance(**change), probabilities, experts), where)
                for name, change, where in BALANCE_MISTAKES
            ],
        )  # fmt: skip


# name, how `_balance` differs, where to look
BALANCE_MISTAKES = [
    ("forgets-the-number-of-experts", {"factor": "one"},
     "multiply by the number of experts: then an even load gives 1, however many there are"),
    ("counts-a-token-k-times", {"share": "of tokens"},
     "f is a share of all VISITS and sums to 1: divide by experts.numel(), n_tokens * k. (Hugging "
     "Face's Mixtral has this factor k; the paper and this course do not)"),
    ("counts-first-choices-only", {"share": "first"},
     "a second choice is a visit, too: count all columns of `experts`"),
    ("chooses-again", {"share": "again"},
     "take the choice that was made, `experts`: a bias may have made another one than the largest "
     "probabilities would"),
    ("multiplies-p-by-itself", {"share": "P"},
     "one factor is counted, f, and one is P. The sum of P * P pushes probabilities together, "
     "whoever is visited"),
    ("lets-the-share-be-soft", {"share": "soft"},
     "f counts visits, each as 1, whatever its probability"),
    ("sums-over-the-tokens", {"mean": False},
     "P is a MEAN over the tokens, or the loss grows with the batch"),
    ("takes-the-variance", {"variance": True},
     "the variance of P has a gradient, but it does not look at who was visited. The loss is "
     "n_experts * sum of f * P"),
    ("rewards-the-crowd", {"sign": -1},
     "a loss is made smaller: without the minus the liked experts lose probability"),
]  # fmt: skip


def _balance(
    *, factor: str = "n", share: str = "f", mean: bool = True, variance: bool = False,
    sign: int = 1,
) -> Callable[[Tensor, Tensor], Tensor]:  # fmt: skip
    """Switch's loss, or one with a mistake."""

    def loss(probabilities: Tensor, experts: Tensor) -> Tensor:
        n_tokens, n = probabilities.shape
        k = experts.shape[1]
        p = probabilities.mean(dim=0) if mean else probabilities.sum(dim=0)
        if variance:
            return p.var()
        chosen = probabilities.gather(1, experts)
        f = {
            "f": _counts(experts, n) / experts.numel(),
            "of tokens": _counts(experts, n) / n_tokens,
            "first": _counts(experts[:, 0], n) / n_tokens,
            "again": _counts(probabilities.topk(k, dim=1).indices, n) / experts.numel(),
            "P": p,
            "soft": torch.zeros_like(probabilities).scatter(1, experts, chosen).mean(dim=0),
        }[share]
        return sign * (n if factor == "n" else 1) * (f * p).sum()

    return loss


def _routed(n_tokens, n_experts, k, *, seed, bias=0.0, peak=0.0) -> tuple[Tensor, Tensor]:
    """Probabilities (n_tokens, n_experts) and who was visited, by them or with a bias."""
    logits = _random(n_tokens, n_experts, seed=seed)
    logits[:, 2] += peak
    if k == 2:
        logits[:, -1] -= 9
    shift = bias * torch.linspace(-1, 1, n_experts, dtype=torch.float64)
    return logits.softmax(1), (logits + shift).topk(k, dim=1).indices


def _with_slope(loss_of: Callable, probabilities: Tensor, experts: Tensor) -> dict[str, Tensor]:
    leaf = probabilities.clone().requires_grad_()
    loss = loss_of(leaf, experts)
    return {"loss": loss.detach(), "slope": _slope(loss, leaf)}


def _slope(loss: Tensor, leaf: Tensor) -> Tensor:
    """Of a loss with respect to what it was made of; zeros where it was not."""
    (slope,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    return torch.zeros_like(leaf) if slope is None else slope


def _shape_of(x) -> str:
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    return f"a {type(x).__name__}"


# 2. The loss by hand


BY_HAND_PROBABILITIES = ((0.5, 0.3, 0.1, 0.1), (0.2, 0.6, 0.1, 0.1), (0.1, 0.5, 0.3, 0.1),
                         (0.6, 0.1, 0.2, 0.1))  # fmt: skip
BY_HAND_EXPERTS = ((0, 1), (1, 0), (1, 2), (0, 2))


@exercise(
    "moe.by_hand",
    points=2,
    minutes=10,
    hints=(
        "f first: 8 visits in all, how many go to each expert? Then P, the mean of each column. "
        "For the slope, f is a constant: P_2 is the mean of four numbers, and you move one.",
        "f = 3/8, 3/8, 2/8, 0. P = 1.4/4, 1.5/4, 0.7/4, 0.4/4. loss = 4 * sum of f * P. The slope "
        "is 4 * f_2 / 4. In the collapse f is 1/2, 1/2, 0, 0, and so is P.",
    ),
)
def _(by_hand):
    got = by_hand()
    expect_parts(got, "loss", "slope", "collapsed")
    probabilities, experts = torch.tensor(BY_HAND_PROBABILITIES), torch.tensor(BY_HAND_EXPERTS)
    probabilities = probabilities.double()
    want = _with_slope(_balance(), probabilities, experts)
    f = _counts(experts, 4) / 8
    wrongs = [
        (name, _with_slope(_balance(**change), probabilities, experts)["loss"].item(), where)
        for name, change, where in (
            ("forgets-the-number-of-experts", {"factor": "one"},
             "the sum of f * P is multiplied by the number of experts, 4"),
            ("counts-a-token-k-times", {"share": "of tokens"},
             "f is a share of all 8 visits, not of the 4 tokens: it sums to 1"),
            ("counts-first-choices-only", {"share": "first"},
             "the second column of visits counts, too: there are 8"),
            ("multiplies-p-by-itself", {"share": "P"},
             "f is counted from the visits; only P is a mean of probabilities"),
            ("sums-over-the-tokens", {"mean": False},
             "P is the MEAN of a column: divide by the 4 tokens"),
        )
    ]  # fmt: skip
    _expect_unseen(
        "loss", got[0], want["loss"].item(),
        "write f and P down as four numbers each, and check that each sums to 1",
        [*wrongs,
         ("multiplies-f-by-itself", (4 * f * f).sum().item(),
          "that is 4 * sum of f * f. It has no gradient: one factor is P"),
         ("takes-the-variance", f.var().item(),
          "that is the guide's: the variance of the shares")],
    )  # fmt: skip
    slope = want["slope"][0, 2].item()
    _expect_unseen(
        "slope", got[1], slope,
        "move the probability of token 0 for expert 2 from 0.1 to 0.2 and compute the loss again",
        [("slope-of-p-itself", 4 * slope,
          "P_2 is a mean of 4 tokens: it moves by a quarter of what one token's probability does"),
         ("slope-without-the-factor", slope / 4, "4 * f_2 * P_2 has a 4 in front"),
         ("token-0-does-not-visit", 0.0,
          "token 0 does not visit expert 2, but its probability is a part of P_2, and others visit "
          "it: the slope is the same for all tokens"),
         ("slope-of-another-expert", want["slope"][0, 0].item(),
          "that is the slope for expert 0 or 1. Expert 2 has fewer visits"),
         ("slope-of-p-times-p", (2 * probabilities.mean(0)[2]).item(),
          "f does not move with the probabilities: it is a count")],
    )  # fmt: skip
    _expect_unseen(
        "collapsed", got[2], 2.0, "write down f, P and their products again: only two are not 0",
        [("collapse-is-one-expert", 4.0,
          "4 would be all visits to ONE expert. With top-2 nobody visits an expert twice: f is at "
          "most 1/2"),
         ("takes-it-for-even", 1.0, "1 is an even load: f = P = 1/4 each. Here f = P = 1/2 for two "
          "experts"),
         ("collapse-without-the-factor", 0.5, "multiply by the number of experts, 4")],
    )  # fmt: skip


def _expect_unseen(
    what: str, got, want: float, hint: str, mistakes: list[tuple[str, float, str]]
) -> None:
    """`expect_or_name` for a number that is the whole answer: the message does not give it away."""
    try:
        expect_or_name(what, got, want, hint, mistakes)
    except NotYet as problem:
        value = got.item() if isinstance(got, Tensor) and got.numel() == 1 else got
        known = isinstance(value, Real) and not isinstance(value, bool)
        raise NotYet(
            f"{what} is not {value:.6g}" if known else f"{what} is {value!r}, expected a number",
            misconception=problem.misconception if known else "not-a-number",
            hint=problem.hint,
        ) from None


# 3. Renormalise or not


@exercise(
    "moe.route",
    points=3,
    minutes=15,
    hints=(
        "Softmax over all experts first, then choose, then divide by the sum of what was chosen. "
        "For which k must the last step not be done? Ask what is left of the router in the result.",
        "probabilities = logits.softmax(1); experts = probabilities.sort(dim=1, descending=True, "
        "stable=True).indices[:, :k]; weights = probabilities.gather(1, experts), and for k > 1 "
        "only: weights / weights.sum(1, keepdim=True).",
    ),
)
def _(route):
    even = torch.tensor([[1.0, 2, 2, 0, 2], [3, 3, 3, 3, 3], [0, 1, 0, 1, 0], [2, 0, 1, 2, 1]])
    for what, logits, k in [
        ("6 tokens, 5 experts, top-2", _random(6, 5, seed=1), 2),
        ("5 tokens, 4 experts, top-1", _random(5, 4, seed=2), 1),
        ("4 tokens, 3 experts, top-3", _random(4, 3, seed=3), 3),
        ("logits around a thousand, top-2", _random(4, 6, seed=4) + 1000, 2),
        ("experts with equal logits, top-2", even.double(), 2),
        ("experts with equal logits, top-1", even.double(), 1),
    ]:
        leaf = logits.clone().requires_grad_()
        got = route(leaf, k)
        expect_parts(got, "experts", "weights")
        got = dict(zip(("experts", "weights"), got, strict=True))
        want = _route(logits, k)
        _expect_a_choice(what, got["experts"], logits, want["experts"])
        wrongs = [
            (name, _route(logits, k, **change), where) for name, change, where in ROUTE_MISTAKES
        ]
        _expect_parts_in_turn(
            what, got, want, wrongs,
            "take one token and three experts: softmax, the best, their weights, by hand",
        )  # fmt: skip
        if not got["weights"].requires_grad:
            raise NotYet(
                f"{what}: the weights are right but have no gradient",
                misconception="cuts-the-gradient-off",
                hint="only through the weights does the router learn: no detach(), no item(), no "
                "new tensor made of numbers. Take them from the softmax with gather",
            )


# name, how `_route` differs, where to look
ROUTE_MISTAKES = [
    ("renormalises-a-single-choice", {"rule": "always"},
     "with k = 1 that divides a number by itself. The weight is 1 whatever the router says, so it "
     "gets no gradient and never learns. Renormalise for k > 1 only"),
    ("forgets-to-renormalise", {"rule": "never"},
     "with k > 1 divide by the sum of the chosen probabilities. The guide forgets that, and the "
     "layer's output is too small by just the probability of those who were not chosen"),
    ("takes-the-softmax-twice", {"rule": "softmax"},
     "the chosen probabilities go through no second softmax: divide them by their sum. A softmax "
     "over the chosen LOGITS would give the same"),
    ("divides-by-k", {"rule": "k"}, "divide by the SUM of the chosen probabilities, not by k"),
    ("divides-by-the-sum-of-all-tokens", {"rule": "all tokens"},
     "every token has a sum of its own: sum(dim=1, keepdim=True)"),
    ("takes-the-logits", {"score": "logits", "rule": "never"},
     "a weight is a probability: softmax over the experts first"),
    ("renormalises-the-logits", {"score": "logits"},
     "logits may be negative, and their sum 0: softmax over the experts first"),
    ("softmax-over-the-tokens", {"score": "tokens"},
     "each token shares out its weight among the experts: softmax(dim=1)"),
    ("takes-the-worst", {"worst": True}, "the experts of HIGHEST probability: descending=True"),
    ("lists-experts-by-number", {"by_number": True},
     "best first, as the docstring says: capacity and first choices depend on it"),
    ("weights-of-the-first-columns", {"columns": True},
     "expert e's probability stands in column e: probabilities.gather(1, experts)"),
    ("weights-not-in-the-experts-order", {"reverse": True},
     "weights[t, j] belongs to experts[t, j]"),
]  # fmt: skip


def _route(
    logits: Tensor, k: int, *, rule: str = "right", score: str = "softmax", worst: bool = False,
    by_number: bool = False, columns: bool = False, reverse: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Experts and weights, or what comes of a mistake."""
    scores = {
        "softmax": logits.softmax(1), "tokens": logits.softmax(0), "logits": logits
    }[score]  # fmt: skip
    experts = scores.sort(dim=1, descending=not worst, stable=True).indices[:, :k]
    if by_number:
        experts = experts.sort(dim=1).values
    weights = scores[:, :k] if columns else scores.gather(1, experts)
    total = weights.sum(1, keepdim=True)
    weights = {
        "right": weights / total if k > 1 else weights,
        "always": weights / total,
        "never": weights,
        "softmax": weights.softmax(1) if k > 1 else weights,
        "k": weights / k,
        "all tokens": weights / weights.sum(),
    }[rule]
    return {"experts": experts, "weights": weights.flip(1) if reverse else weights}


def _expect_a_choice(what: str, got, logits: Tensor, want: Tensor) -> None:
    """Of equal logits the expert of the lower number, and nobody twice."""
    if not isinstance(got, Tensor) or got.shape != want.shape or got.is_floating_point():
        return  # the caller says so
    inside = (got >= 0) & (got < logits.shape[1])
    if not inside.all() or torch.equal(got, want):
        return
    token = int((got != want).any(1).nonzero()[0])
    values = [f"{v:.4g}" for v in logits[token].tolist()]
    row = f"token {token}, logits [{', '.join(values)}], goes to {got[token].tolist()}"
    if any(len(set(experts)) < len(experts) for experts in got.tolist()):
        raise NotYet(
            f"{what}: {row}",
            misconception="visits-an-expert-twice",
            hint="the k best are k different experts, also where logits are equal",
        )
    if torch.equal(logits.gather(1, got), logits.gather(1, want)):
        raise NotYet(
            f"{what}: {row}, expected {want[token].tolist()}",
            misconception="breaks-ties-by-chance",
            hint="of equal logits the expert with the lower number comes first. torch.topk does "
            "not promise that; sort(descending=True, stable=True) does",
        )


# 4. The guide's x[expert_mask]


@exercise(
    "moe.mixture",
    points=2,
    minutes=12,
    hints=(
        "`expert_mask` has one value for each (token, choice): it may index the weights, which are "
        "of that shape. Tokens need a mask with one value a token. When does a token visit the "
        "expert?",
        "visits = expert_mask.any(dim=-1) indexes x and output; expert_mask still indexes "
        "top_k_probs. A token chooses an expert at most once, so both have as many hits, in the "
        "same order.",
    ),
)
def _(mixture):
    # batch, tokens, d, k, experts
    for batch, n, d, k, n_experts, without in [
        (1, 4, 3, 1, 3, ()),
        (2, 5, 4, 2, 4, ()),
        (2, 3, 2, 2, 5, (0, 4)),
        (1, 7, 5, 3, 4, ()),
        (3, 2, 3, 2, 2, ()),
    ]:
        what = f"x {(batch, n, d)}, {n_experts} experts, top-{k}"
        x = _random(batch, n, d, seed=n)
        chosen = _visits(batch * n, n_experts, k, seed=d, without=without).view(batch, n, k)
        # not renormalised, and not in order: a mask that mixes choices up is seen
        probs = torch.rand(batch, n, k, generator=_rng(k), dtype=torch.float64)
        experts = [_Expert(_random(d, d, seed=10 + e)) for e in range(n_experts)]
        try:
            got = mixture(x.clone(), probs.clone(), chosen.clone(), experts)
        except IndexError as error:
            if "mask" not in str(error):
                raise
            raise NotYet(
                f"{what}: {error}",
                misconception="indexes-tokens-with-visits",
                hint="expert_mask has a value for each (token, CHOICE), the tokens in x and output "
                "have none for a choice: one dimension too many. Which tokens visit the expert?",
            ) from error
        n_rows = sum(expert.n_rows for expert in experts)
        dense = [expert.apply(x) for expert in experts]
        expect_or_name(
            f"{what}: output", got, _mixture(x, probs, chosen, dense),
            "take one token and follow both of its choices through the loop",
            [
                (name, _mixture(x, probs, chosen, dense, experts, **change), where)
                for name, change, where in MIXTURE_MISTAKES
            ],
        )  # fmt: skip
        expect_or_name(
            f"{what}: rows that passed through an expert", n_rows, chosen.numel(),
            "an expert computes its visitors' rows, each once",
            [
                ("runs-every-expert-on-every-token", batch * n * n_experts,
                 "the result is right, but that is a dense layer with zeros: every expert "
                 "computes every token. Take the visitors out BEFORE the expert runs"),
            ],
        )  # fmt: skip


# name, how `_mixture` differs, where to look
MIXTURE_MISTAKES = [
    ("sees-only-first-choices", {"choices": "first"},
     "[..., 0] asks for the first choice. A token visits its second choice just as well: any "
     "choice, .any(dim=-1)"),
    ("forgets-the-weights", {"weight": "one"},
     "a visit counts as much as its probability: top_k_probs[expert_mask]"),
    ("takes-the-weight-of-the-best-choice", {"weight": "best"},
     "top_k_probs[..., 0] is the weight of the FIRST choice, and this expert may be the second: "
     "expert_mask picks the right one"),
    ("adds-the-weights-of-all-choices", {"weight": "sum"},
     "summed over the last dimension you get the weights of all choices: zero those of other "
     "experts first, or index with expert_mask"),
    ("keeps-only-the-last-expert", {"overwrite": True},
     "with = each expert wipes out what the one before it wrote: +="),
    ("weights-what-goes-in", {"inside": True},
     "an expert is not linear: weight what comes OUT of it"),
    ("starts-from-the-tokens", {"start": True},
     "the output starts from zeros. The residual stream adds the tokens itself"),
]  # fmt: skip


class _Expert:
    """A feed-forward layer that counts the rows it computes."""

    def __init__(self, weight: Tensor):
        self.weight, self.n_rows = weight, 0

    def apply(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight) + x.square()

    def __call__(self, x: Tensor) -> Tensor:
        self.n_rows += x.numel() // x.shape[-1]
        return self.apply(x)


def _mixture(
    x: Tensor, probs: Tensor, chosen: Tensor, dense: list[Tensor], experts: list[_Expert] = (), *,
    choices: str = "all", weight: str = "own", overwrite: bool = False, inside: bool = False,
    start: bool = False,
) -> Tensor:  # fmt: skip
    """The layer token by token, from what every expert makes of every token; or with a mistake."""
    out = x.clone() if start else torch.zeros_like(x)
    for b, t in product(range(x.shape[0]), range(x.shape[1])):
        visits = list(enumerate(chosen[b, t].tolist()))
        if overwrite:
            visits = [max(visits, key=lambda visit: visit[1])]
        for choice, e in visits[:1] if choices == "first" else visits:
            w = {"own": probs[b, t, choice], "one": 1.0, "best": probs[b, t, 0],
                 "sum": probs[b, t].sum()}[weight]  # fmt: skip
            out[b, t] += experts[e].apply(w * x[b, t]) if inside else w * dense[e][b, t]
    return out


# 5. Sort the visits


@exercise(
    "moe.group",
    points=3,
    minutes=15,
    hints=(
        "argsort gives, for each sorted place, the visit that goes there. The inverse answers the "
        "other question: where did visit v go? If order[p] = v, then place[v] = p. And starts "
        "are the running sum of the counts.",
        "order = experts.flatten().argsort(stable=True); place = torch.empty_like(order); "
        "place[order] = torch.arange(len(order), device=order.device); counts = "
        "bincount(minlength=n_experts), and starts is a 0 followed by counts.cumsum(0).",
    ),
)
def _(group):
    for what, experts, n_experts in [
        ("5 tokens, top-1", torch.tensor([[2], [0], [2], [1], [0]]), 3),
        ("5 tokens, top-2", _visits(5, 4, 2, seed=1), 4),
        ("6 tokens, top-2, nobody visits experts 0, 3 and 6",
         _visits(6, 7, 2, seed=2, without=(0, 3, 6)), 7),
        ("9 tokens that all visit expert 2 of 4", torch.full((9, 1), 2), 4),
        ("1 token, top-3 of 5", torch.tensor([[4, 0, 2]]), 5),
        ("40 tokens, top-2", _visits(40, 6, 2, seed=3), 6),
    ]:  # fmt: skip
        got = group(experts.clone(), n_experts)
        expect_parts(got, "order", "place", "starts")
        got = dict(zip(("order", "place", "starts"), got, strict=True))
        want = _group(experts, n_experts)
        _expect_stable(what, got["order"], experts)
        wrongs = [
            (name, _group(experts, n_experts, wrong), where)
            for name, wrong, where in GROUP_MISTAKES
        ]
        _expect_parts_in_turn(
            what, got, want, wrongs,
            "write the visits of three tokens on slips of paper and sort them",
        )  # fmt: skip


# name, the mistake in `_group`, where to look
GROUP_MISTAKES = [
    ("takes-order-for-its-inverse", "order",
     "order says which visit is at a place, place says at which place a visit is. They are equal "
     "only if the permutation is its own inverse: place[order] = arange"),
    ("returns-tokens-for-visits", "tokens",
     "order holds numbers of VISITS, token * k + choice. The token is order // k, later; here the "
     "choice would be lost, and with it the weight"),
    ("numbers-choices-first", "choice first",
     "visit token * k + choice: experts.flatten() has them in this order, experts.T does not"),
    ("returns-the-experts", "experts",
     "that is which EXPERT is at each place: sort().values. Wanted is which visit: argsort, or "
     "sort().indices"),
    ("forgets-who-has-no-visits", "visited only",
     "an expert without visits has an empty range [s, s): bincount(minlength=n_experts)"),
    ("forgets-that-the-last-may-be-empty", "minlength",
     "the last expert may have no visits either, and bincount stops at the last that has: "
     "bincount(minlength=n_experts)"),
    ("counts-instead-of-starts", "counts",
     "starts are running sums, n_experts + 1 of them: 0, then counts.cumsum(0)"),
    ("forgets-the-first-start", "ends",
     "expert 0 starts at 0: put a 0 before the running sums, n_experts + 1 numbers in all"),
    ("forgets-the-last-end", "no end",
     "the last expert ends at starts[n_experts]: n_experts + 1 numbers in all"),
]  # fmt: skip


def _group(experts: Tensor, n_experts: int, wrong: str = "") -> dict[str, Tensor]:
    """order, place and starts, or what comes of a mistake."""
    visits = (experts.T if wrong == "choice first" else experts).flatten()
    order = visits.argsort(stable=True)
    place = order.argsort()
    counts = _counts(experts, n_experts).long()
    ends = counts.cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])
    return {
        "order": {"tokens": order // experts.shape[1], "experts": visits[order]}.get(wrong, order),
        "place": order if wrong == "order" else place,
        "starts": {
            "visited only": torch.cat([ends.new_zeros(1), counts[counts > 0].cumsum(0)]),
            "minlength": starts[: int(visits.max()) + 2],
            "counts": counts, "ends": ends, "no end": starts[:-1],
        }.get(wrong, starts),
    }  # fmt: skip


def _expect_stable(what: str, order, experts: Tensor) -> None:
    """Sorted by expert, but the visits of one expert in another order."""
    visits = experts.flatten()
    if not isinstance(order, Tensor) or order.shape != visits.shape or order.is_floating_point():
        return
    if not torch.equal(order.sort().values, torch.arange(len(visits))):
        return
    if torch.equal(visits[order], visits.sort().values):
        swapped = ((visits[order].diff() == 0) & (order.diff() < 0)).nonzero()
        if len(swapped):
            first = int(swapped[0])
            a, b = order[first : first + 2].tolist()
            raise NotYet(
                f"{what}: expert {int(visits[a])} gets visit {a} before visit {b}",
                misconception="shuffles-the-visits-of-an-expert",
                hint="an expert's visits stay in their order: argsort(stable=True). Otherwise two "
                "runs differ in their last bits, and who is dropped at a capacity is chance",
            )


# 6. The layer, by grouping


@exercise(
    "moe.moe_layer",
    points=5,
    minutes=30,
    hints=(
        "Two loops. First over the experts: their places are starts[e] to starts[e + 1], the "
        "visits there order[start:end], their tokens those // k. Then over the choices: choice j "
        "of every token went to the place place[token * k + j].",
        "First loop: skip if start == end; gate_up, down = load(..., e); store('Y', y, "
        "slice(start, end), swiglu(load('X', x, order[start:end] // k), gate_up, down)). Second: "
        "total += weights[:, j, None] * load('Y', y, place.view(n, k)[:, j]). One store of out.",
    ),
)
def _(moe_layer):
    # tokens, d, d_ff, experts, k, experts that nobody visits
    for n, d, d_ff, n_experts, k, without in [
        (5, 4, 3, 4, 2, ()),
        (7, 3, 2, 6, 3, (0, 5)),
        (4, 3, 2, 3, 1, ()),
        (9, 2, 4, 5, 1, (0, 1, 3, 4)),
        (1, 3, 2, 8, 2, ()),
        (24, 5, 3, 6, 2, (2,)),
    ]:
        experts = _visits(n, n_experts, k, seed=n, without=without)
        given = {
            "x": _random(n, d, seed=1), "experts": experts,
            "weights": torch.rand(n, k, generator=_rng(2), dtype=torch.float64) + 0.1,
            "w_gate_up": _random(n_experts, d, 2 * d_ff, seed=3),
            "w_down": _random(n_experts, d_ff, d, seed=4),
        }  # fmt: skip
        y, out = (torch.full((rows, d), torch.nan).double() for rows in (n * k, n))
        what = f"{n} tokens, {n_experts} experts, top-{k}"
        with recording(Load, Store) as trace:
            try:
                moe_layer(*(tensor.clone() for tensor in given.values()), y, out)
            except IndexError as error:
                if k == 1 or f"size {n}" not in str(error):
                    raise
                raise NotYet(
                    f"{what}: {error}",
                    misconception="takes-visits-for-tokens",
                    hint="order holds numbers of visits, token * k + choice, and there are more of "
                    "them than tokens: the token is order // k",
                ) from error
        expect_stored(
            what, "out", out,
            "when all choices are added up: store('out', out, slice(0, len(x)), total)",
        )  # fmt: skip
        expect_or_name(
            f"{what}: out", out, _layer(**given),
            "take 2 tokens and 2 experts, print order, place and starts, and follow one visit",
            [(name, _layer(**given, wrong=wrong), where) for name, wrong, where in LAYER_MISTAKES],
        )  # fmt: skip
        _expect_layer_traffic(trace, what, len(experts.unique()), **given)


# name, the mistake in `_layer`, where to look
LAYER_MISTAKES = [
    ("forgets-the-weights", "unweighted",
     "a token's result is a WEIGHTED sum over its choices: weights[:, j]"),
    ("comes-back-by-the-same-permutation", "order",
     "order leads to the sorted places; place, its inverse, leads back: visit v lies in row "
     "place[v] of y"),
    ("never-comes-back", "sorted",
     "rows of y are sorted by expert. Row place[token * k + choice] belongs to the token, not row "
     "token * k + choice"),
    ("weights-in-another-order", "sorted weights",
     "row p of y belongs to visit order[p], so does its weight: weights.flatten()[order]. Simpler: "
     "weight after coming back"),
    ("takes-the-token-from-the-remainder", "remainder",
     "visit = token * k + choice: the token is visit // k, the remainder is the choice"),
    ("keeps-only-the-last-choice", "last",
     "add the choices up, then store once: a store replaces what was there"),
    ("averages-the-choices", "mean",
     "the weights say how much each choice counts: sum them up, do not divide by k"),
    ("gives-visits-to-the-next-expert", "next expert",
     "expert e has the places starts[e] up to, and without, starts[e + 1]"),
]  # fmt: skip


def _layer(
    x: Tensor, experts: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, wrong: str = ""
) -> Tensor:
    """The layer visit by visit, or what comes of a mistake."""
    (n, k), n_experts = experts.shape, len(w_gate_up)
    visits = experts.flatten()
    order, place, _ = _group(experts, n_experts).values()

    def ran(visit: int) -> Tensor:
        token = visit % n if wrong == "remainder" else visit // k
        e = int(visits[visit])
        e = (e + 1) % n_experts if wrong == "next expert" else e
        gate, up = (x[token] @ w_gate_up[e]).chunk(2)
        return (gate * torch.sigmoid(gate) * up) @ w_down[e]

    rows = torch.stack([ran(visit) for visit in range(n * k)])
    sorted_rows = rows[order]
    rows = {"order": sorted_rows[order], "sorted": sorted_rows}.get(wrong, rows)
    weight = weights.flatten()
    if wrong == "sorted weights":
        weight = weight[place]
    rows = rows if wrong == "unweighted" else weight[:, None] * rows
    rows = rows.view(n, k, -1)
    if wrong == "last":
        return rows[:, -1]
    return rows.mean(1) if wrong == "mean" else rows.sum(1)


def _expect_layer_traffic(
    trace: Trace, what: str, n_touched: int, x, experts, weights, w_gate_up, w_down
) -> None:
    """The weights of an expert that is visited are read once, rows once a visit."""
    expert, row = w_gate_up[0].nbytes + w_down[0].nbytes, x[0].nbytes
    n_visits, n_experts = experts.numel(), len(w_gate_up)
    read, written = trace.total("nbytes", Load), trace.total("nbytes", Store)
    rows = 2 * n_visits * row
    expect_or_name(
        f"{what}, {n_touched} of the experts visited: bytes read", read, n_touched * expert + rows,
        "each visited expert's two matrices once; x once a visit; y once a visit",
        [
            ("goes-around-load", 0, "read slow memory only with load(...): it keeps the count"),
            ("goes-around-load-for-weights", rows,
             "the experts lie in slow memory: load('W_gate_up', w_gate_up, e), and the same for "
             "w_down"),
            ("goes-around-load-for-rows", n_touched * expert + rows // 2,
             "both x and y are in slow memory: load('X', x, tokens) and load('Y', y, places)"),
            ("reads-only-weights-through-load", n_touched * expert,
             "x and y are in slow memory as well: load('X', x, tokens) and load('Y', y, places)"),
            ("reads-experts-that-nobody-visits", n_experts * expert + rows,
             "an expert with an empty range is not read at all: `if start == end: continue`, "
             "before the loads. In decoding this is most of what an MoE saves"),
            ("reads-the-weights-for-every-visit", n_visits * expert + rows,
             "that is what the grouping is for: load an expert once, and run all its visitors as "
             "one matrix"),
            ("reads-every-token-for-every-expert",
             n_touched * (expert + len(x) * row) + rows // 2,
             "load only the tokens that visit this expert: load('X', x, order[start:end] // k)"),
        ],
    )  # fmt: skip
    expect_or_name(
        f"{what}: bytes written", written, n_visits * row + len(x) * row,
        "y once, row by row, and out once",
        [
            ("goes-around-store", 0, "write slow memory only with store(...): it keeps the count"),
            ("goes-around-store-for-y", len(x) * row,
             "y is in slow memory, too: store('Y', y, slice(start, end), ...)"),
            ("goes-around-store-for-out", n_visits * row,
             "out is in slow memory, too: store('out', out, slice(0, len(x)), total)"),
            ("writes-out-for-every-choice", n_visits * row + n_visits * row,
             "the sum stays on chip until all choices are in it; store out once"),
        ],
    )  # fmt: skip


# 7. Who is dropped?


@exercise(
    "moe.kept_visits",
    points=3,
    minutes=15,
    hints=(
        "Line the visits up in the order in which they are served: first choices of all tokens, "
        "then second choices. How many to the same expert stand before each one? Kept if that is "
        "less than the capacity.",
        "capacity = math.ceil(factor * n_tokens * k / n_experts). Walk choice by choice, and in it "
        "token by token, with a list `taken` of n_experts zeros: kept if taken[e] < capacity, then "
        "taken[e] += 1.",
    ),
)
def _(kept_visits):
    for what, experts, n_experts, factor in [
        ("8 tokens, top-1", _visits(8, 4, 1, seed=1), 4, 1.0),
        ("9 tokens, top-2, factor 1", _visits(9, 4, 2, seed=2), 4, 1.0),
        ("10 tokens, top-2, factor 1.25", _visits(10, 6, 2, seed=3), 6, 1.25),
        ("7 tokens that all visit experts 1 and 0", torch.tensor([[1, 0]] * 7), 3, 1.0),
        ("4 tokens that disagree", torch.tensor([[0, 1], [1, 0], [1, 0], [0, 1]]), 4, 1.5),
        ("6 tokens, top-3, factor 2", _visits(6, 5, 3, seed=4), 5, 2.0),
        ("30 tokens, top-2, factor 0.5", _visits(30, 8, 2, seed=5), 8, 0.5),
    ]:
        got = kept_visits(experts.clone(), n_experts, factor)
        expect_or_name(
            f"{what}: kept", got, _kept(experts, n_experts, factor),
            "compute the capacity, then tick off visit by visit, first choices first",
            [
                (name, _kept(experts, n_experts, factor, wrong), where)
                for name, wrong, where in KEPT_MISTAKES
            ],
        )  # fmt: skip


# name, the mistake in `_kept`, where to look
KEPT_MISTAKES = [
    ("serves-token-by-token", "token by token",
     "token 0's second choice came before token 1's first. First choices matter most: serve all "
     "of them, then all second choices"),
    ("rounds-the-capacity-down", "floor", "the capacity is rounded UP, so that with factor 1 a "
     "load as even as can be loses nobody"),
    ("forgets-k-in-the-capacity", "forgets k",
     "there are n_tokens * k visits to share out among the experts, not n_tokens"),
    ("takes-one-too-many", "one more",
     "an expert takes `capacity` visits: kept if FEWER than that came before"),
    ("takes-one-too-few", "one less",
     "the capacity-th visit is taken: count those BEFORE it, without itself"),
    ("counts-each-choice-anew", "each choice",
     "first and second choices fill the same places of an expert: do not start counting again"),
    ("keeps-the-latest", "latest", "first come, first served: the LATER visits are dropped"),
    ("drops-all-visits-of-the-token", "whole token",
     "only the visit to the full expert is dropped; the token's other visits go on"),
    ("says-who-is-dropped", "inverse", "True must mean: this visit is kept"),
    ("drops-nobody", "nobody", "an expert takes at most `capacity` visits"),
    ("closes-the-whole-layer", "global",
     "every expert has a capacity of its own; the others go on taking visits"),
]  # fmt: skip


def _kept(experts: Tensor, n_experts: int, factor: float, wrong: str = "") -> Tensor:
    """(n_tokens, k) bool, visit by visit; or what comes of a mistake."""
    n_tokens, k = experts.shape
    n_visits = n_tokens if wrong == "forgets k" else n_tokens * k
    share = Fraction(factor) * n_visits / n_experts
    capacity = floor(share) if wrong == "floor" else ceil(share)
    capacity += {"one more": 1, "one less": -1}.get(wrong, 0)
    queue = [(token, choice) for choice in range(k) for token in range(n_tokens)]
    if wrong == "token by token":
        queue.sort()
    if wrong == "latest":
        queue.reverse()
    taken, full = [0] * n_experts, False
    kept = torch.zeros_like(experts, dtype=torch.bool)
    for at, (token, choice) in enumerate(queue):
        if wrong == "each choice" and at % n_tokens == 0:
            taken = [0] * n_experts
        e = int(experts[token, choice])
        full = full or taken[e] >= capacity
        kept[token, choice] = taken[e] < capacity and not (full and wrong == "global")
        taken[e] += 1
    if wrong == "nobody":
        return torch.ones_like(kept)
    if wrong == "whole token":
        return kept & kept.all(1, keepdim=True)
    return ~kept if wrong == "inverse" else kept


# 8. How many experts does a batch read?


@exercise(
    "moe.read_per_step",
    points=3,
    minutes=15,
    hints=(
        "Ask one expert first: with what probability does ONE token not visit it? And all of "
        "n_tokens, which choose independently? Expected numbers add up, so the sum over the "
        "experts is easy.",
        "touched = n_experts * (1 - (1 - k / n_experts) ** n_tokens). An expert has three matrices "
        "of d * d_ff numbers of 2 bytes: 6 * d * d_ff bytes.",
    ),
)
def _(read_per_step):
    for n_tokens, n_experts, k, d, d_ff in [
        (1, 5, 2, 8, 4),
        (4, 3, 1, 4, 4),
        (3, 5, 2, 8, 4),
        (2, 5, 3, 6, 10),
        (16, 8, 2, 4096, 14336),
        (64, 256, 8, 7168, 2048),
        (3, 2, 2, 4, 2),
    ]:
        call = f"read_per_step({n_tokens}, {n_experts}, {k}, {d}, {d_ff})"
        got = read_per_step(n_tokens, n_experts, k, d, d_ff)
        expect_parts(got, "touched", "bytes")
        miss = 1 - k / n_experts
        touched = _touched_exactly(n_tokens, n_experts, k)
        expect_or_name(
            f"{call}: touched", got[0], touched,
            "write down all cases for 2 tokens, 3 experts and top-1, and count",
            [
                ("one-expert-a-visit", float(min(n_experts, n_tokens * k)),
                 "that many are touched only if no two tokens choose the same expert"),
                ("lets-a-token-visit-an-expert-twice",
                 n_experts * (1 - (1 - 1 / n_experts) ** (n_tokens * k)),
                 "a token's k experts are different: ONE token misses an expert with probability "
                 "1 - k / n_experts, not (1 - 1 / n_experts)^k"),
                ("forgets-k", n_experts * (1 - (1 - 1 / n_experts) ** n_tokens),
                 "a token visits k of the experts: it misses one with probability "
                 "1 - k / n_experts"),
                ("gives-the-chance-of-one-expert", 1 - miss**n_tokens,
                 "that is the probability that ONE expert is touched: there are n_experts"),
                ("counts-the-untouched", n_experts * miss**n_tokens,
                 "that is how many nobody visits; the others are touched"),
                ("multiplies-chances", n_experts * (k / n_experts) ** n_tokens,
                 "that is how many experts ALL tokens visit; one token is enough"),
                ("reads-them-all", float(n_experts), "a small batch does not visit every expert"),
                ("reads-k", float(k), "k experts are what one token visits: other tokens choose "
                 "others"),
            ],
        )  # fmt: skip
        expect_or_name(
            f"{call}: bytes", got[1], touched * 6 * d * d_ff,
            "touched experts, times the matrices of one, times 2 bytes a number",
            [
                (name, float(nbytes), where)
                for name, nbytes, where in [
                    ("reads-the-weights-for-every-visit", n_tokens * k * 6 * d * d_ff,
                     "visitors of one expert share its weights: they are read once in a step"),
                    ("reads-them-all", n_experts * 6 * d * d_ff,
                     "experts that nobody visits are not read"),
                    ("forgets-the-gate", touched * 4 * d * d_ff,
                     "SwiGLU has three matrices: gate, up and down"),
                    ("counts-numbers-not-bytes", touched * 3 * d * d_ff, "a number has 2 bytes"),
                    ("counts-4-bytes", touched * 12 * d * d_ff, "16 bits are 2 bytes"),
                    ("reads-one-matrix", touched * 2 * d * d_ff,
                     "an expert has three matrices of d * d_ff numbers"),
                    ("gives-the-bytes-of-a-token", touched * 6 * d * d_ff / n_tokens,
                     "all bytes of the step, not those of one token"),
                ]
            ],
        )  # fmt: skip


def _touched_exactly(n_tokens: int, n_experts: int, k: int) -> float:
    """The mean over all equally likely choices where they can be listed, else the formula."""
    if comb(n_experts, k) ** n_tokens > 2000:
        return n_experts * (1 - (1 - k / n_experts) ** n_tokens)
    batches = list(product(combinations(range(n_experts), k), repeat=n_tokens))
    return sum(len(set().union(*batch)) for batch in batches) / len(batches)


# 9. A bias instead of a loss


@exercise(
    "moe.bias_step",
    points=3,
    minutes=15,
    hints=(
        "Three lines, three uses of the bias: it chooses; it does not weigh; and it moves by rate, "
        "up for experts with fewer visits than the mean, down for those with more.",
        "experts = the k best of scores + bias; weights = scores.gather(1, experts), divided by "
        "their sum; counts = bincount(minlength); "
        "bias + rate * torch.sign(counts.float().mean() - counts).",
    ),
)
def _(bias_step):
    for what, n_tokens, n_experts, k, size in [
        ("7 tokens, 4 experts, top-2", 7, 4, 2, 0.3),
        ("9 tokens, 5 experts, top-2, no bias yet", 9, 5, 2, 0.0),
        ("8 tokens, 4 experts, top-3, a large bias", 8, 4, 3, 1.0),
        ("30 tokens, 8 experts, top-2", 30, 8, 2, 0.5),
        ("an even load", 6, 3, 2, None),
    ]:
        draw = partial(_random, dtype=torch.float32)
        scores = torch.sigmoid(draw(n_tokens, n_experts, seed=n_tokens))
        if size is None:  # token t visits experts t and t + 1, modulo 3
            scores = torch.stack([torch.tensor([0.9, 0.8, 0.1]).roll(t) for t in range(n_tokens)])
        bias = (size or 0.0) * draw(n_experts, seed=n_experts)
        leaf = scores.clone().requires_grad_()
        got = bias_step(leaf, bias.clone(), k, 0.01)
        expect_parts(got, "experts", "weights", "new bias")
        # float32 rounds: a result in float64 is judged as one in float32
        got = {
            part: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
            for part, x in zip(("experts", "weights", "new bias"), got, strict=True)
        }
        wrongs = [
            (name, _bias_step(scores, bias, k, wrong), where)
            for name, wrong, where in BIAS_MISTAKES
        ]
        _expect_parts_in_turn(
            what, got, _bias_step(scores, bias, k), wrongs,
            "take one token and two experts, one of them with a bias, by hand",
        )  # fmt: skip


# name, the mistake in `_bias_step`, where to look
BIAS_MISTAKES = [
    ("judges-the-next-choice", "unbiased load",
     "the load is what the choice WITH the bias gave; judged by the plain scores the bias would "
     "grow for ever"),
    ("chooses-without-the-bias", "choice", "the k best of scores + bias are visited"),
    ("weighs-with-the-bias", "weights",
     "the bias decides WHO is visited and nothing else: weights are the plain scores of the "
     "chosen, divided by their sum. Otherwise it distorts the output, which a loss would then "
     "fight"),
    ("forgets-to-renormalise", "raw",
     "divide the chosen scores by their sum: sigmoids do not sum to 1 at all"),
    ("feeds-the-crowd", "sign",
     "an expert with MORE visits than the mean gets a lower bias, with fewer a higher one"),
    ("moves-by-the-size", "size",
     "every step is `rate` up or down, however far the load is off: only the sign counts"),
    ("moves-by-the-share", "share",
     "every step is `rate` up or down: only the sign of mean - count counts, not the shares"),
    ("moves-an-even-expert", "even",
     "an expert that has just the mean stays: torch.sign(0) is 0"),
    ("moves-only-the-busy", "busy", "experts with fewer visits than the mean go up by rate"),
    ("forgets-the-old-bias", "fresh", "the bias grows step by step: old bias plus the move"),
    ("counts-first-choices-only", "first", "all k choices of a token are visits"),
]  # fmt: skip


def _bias_step(scores: Tensor, bias: Tensor, k: int, wrong: str = "") -> dict[str, Tensor]:
    """Experts, weights and the new bias, or what comes of a mistake."""
    scores, bias, rate, n = scores.double(), bias.double(), 0.01, scores.shape[1]
    experts = (scores if wrong == "choice" else scores + bias).topk(k, dim=1).indices
    weights = (scores + bias if wrong == "weights" else scores).gather(1, experts)
    if wrong != "raw":
        weights = weights / weights.sum(1, keepdim=True)
    counted = {"first": experts[:, :1], "unbiased load": scores.topk(k, dim=1).indices}
    counts = _counts(counted.get(wrong, experts), n)
    above = counts - counts.mean()
    move = {
        "sign": above.sign(), "size": -above, "share": -above / counts.sum(),
        "even": 1 - 2 * (above > 0).double(), "busy": -(above > 0).double(),
    }.get(wrong, -above.sign())  # fmt: skip
    moved = rate * move if wrong == "fresh" else bias + rate * move
    return {"experts": experts, "weights": weights, "new bias": moved}


# 10. Who sends what to whom?


@exercise(
    "moe.exchange",
    points=3,
    minutes=15,
    hints=(
        "Expert e lives on rank e // (n_experts / n_ranks). Row s of the table is what rank s "
        "sends: count its visits by where the expert lives. What stands on the diagonal stays at "
        "home, and what is sent must come back.",
        "sends[s] = torch.bincount(experts[s].flatten() // (n_experts // n_ranks), "
        "minlength=n_ranks). Bytes: (sends.sum() - sends.trace()) * d * 2 bytes, twice: there and "
        "back.",
    ),
)
def _(exchange):
    for what, tokens, n_experts, k, d, without in [
        ("2 ranks, 4 experts, top-1", (3, 4), 4, 1, 8, ()),
        ("4 ranks, 8 experts, top-2, rank 2 has no tokens", (4, 7, 0, 2), 8, 2, 16, ()),
        ("2 ranks, 6 experts, top-2", (5, 3), 6, 2, 4, ()),
        ("3 ranks, 6 experts, top-3, nobody visits rank 1", (4, 2, 5), 6, 3, 4, (2, 3)),
        ("4 ranks, 4 experts, all tokens to expert 3", (2, 2, 3, 1), 4, 1, 4, (0, 1, 2)),
        ("1 rank", (6,), 4, 2, 4, ()),
    ]:
        experts = [
            _visits(max(n, 1), n_experts, k, seed=rank + n, without=without)[:n]
            for rank, n in enumerate(tokens)
        ]
        got = exchange([part.clone() for part in experts], n_experts, d)
        expect_parts(got, "sends", "bytes")
        sends = _sends(experts, n_experts)
        expect_or_name(
            f"{what}: sends", got[0], sends,
            "write down for each visit on which rank it starts and on which its expert lives",
            [
                (name, _sends(experts, n_experts, wrong), where)
                for name, wrong, where in SENDS_MISTAKES
            ],
        )  # fmt: skip
        away, total = int(sends.sum() - sends.trace()), int(sends.sum())
        expect_or_name(
            f"{what}: bytes", got[1], 4 * d * away,
            "visits that leave their rank, times d numbers of 2 bytes, there and back",
            [
                ("forgets-the-way-back", 2 * d * away,
                 "the result must come home to its token: the same rows once more. (Or do you "
                 "count numbers, not bytes? A number has 2)"),
                ("counts-what-stays-at-home", 4 * d * total,
                 "the diagonal never touches the network: its expert is on the same rank"),
                ("counts-what-stays-and-forgets-the-way-back", 2 * d * total,
                 "the diagonal never touches the network, and all others go there AND back"),
                ("counts-4-bytes", 8 * d * away, "16 bits are 2 bytes; there and back are twice"),
                ("counts-visits-not-bytes", away, "each visit carries d numbers of 2 bytes"),
            ],
        )  # fmt: skip


# name, the mistake in `_sends`, where to look
SENDS_MISTAKES = [
    ("deals-experts-out-in-turn", "in turn",
     "neighbouring experts share a rank: with 6 experts on 2 ranks, 0 to 2 live on rank 0. "
     "e // (n_experts / n_ranks), not e % n_ranks"),
    ("divides-by-the-number-of-ranks", "by ranks",
     "a rank holds n_experts / n_ranks experts: divide the expert by THAT"),
    ("says-who-receives", "transposed",
     "row s is what rank s SENDS, column r where it goes: yours is transposed"),
    ("sends-a-token-once-a-rank", "once",
     "here a row is sent for every visit, even if two of them go to the same rank. (Sending it "
     "once and copying there is a real optimisation, and another table)"),
    ("counts-only-first-choices", "first", "all k choices of a token are visits"),
    ("leaves-the-diagonal-out", "no diagonal",
     "the table has all visits, those that stay at home as well; only the bytes leave them out"),
    ("counts-experts-not-ranks", "experts",
     "one column a RANK, (n_ranks, n_ranks): add up the experts that live there"),
    ("shares-out-evenly", "even",
     "the all-to-all is as uneven as the routing: count, do not divide"),
]  # fmt: skip


def _sends(experts: list[Tensor], n_experts: int, wrong: str = "") -> Tensor:
    """(n_ranks, n_ranks) int64, visit by visit; or what comes of a mistake."""
    n_ranks = len(experts)
    columns = n_experts if wrong == "experts" else n_ranks
    sends = torch.zeros(n_ranks, columns, dtype=torch.int64)
    for rank, part in enumerate(experts):
        for token in part.tolist():
            homes = [
                {"in turn": e % n_ranks, "by ranks": e // n_ranks, "experts": e}.get(
                    wrong, e * n_ranks // n_experts
                )
                for e in (token[:1] if wrong == "first" else token)
            ]
            for home in set(homes) if wrong == "once" else homes:
                sends[rank, min(home, columns - 1)] += 1
    if wrong == "even":
        return (sends.sum(1, keepdim=True) // n_ranks).expand_as(sends)
    if wrong == "no diagonal":
        return sends - sends.diag().diag()
    return sends.T if wrong == "transposed" else sends


# 11. The grouped product


@exercise(
    "moe.grouped_kernel",
    points=5,
    minutes=40,
    hints=(
        "Write it in this order and run the check after each: the visits and tokens of the places; "
        "the loop over D; the store. Then the three ends: which places are this expert's, which "
        "columns exist, and where does D end?",
        "end = tl.load(starts_ptr + expert + 1); place_ok = place < end; token = "
        "tl.load(visits_ptr + place, place_ok, other=0) // K. In the loop over first: d = first + "
        "tl.arange(0, STEP), x from token * D + d, w from (expert * D + d) * N + col, both masked "
        "with d < D, acc += tl.dot. Store to place * N + col, where place_ok and col < N.",
    ),
)
def _(kernel):
    expect_kernel("grouped_kernel", kernel)
    # n_tokens, experts, k, D, N, experts that nobody visits
    for what, n_tokens, n_experts, k, d, n, without in [
        ("16 tokens, one expert", 16, 1, 1, 16, 16, ()),
        ("40 tokens, all to expert 1 of 3", 40, 3, 1, 16, 16, (0, 2)),
        ("12 tokens, 3 experts, top-2, width 32", 12, 3, 2, 32, 16, ()),
        ("7 tokens, 6 experts, top-3, nobody visits 0, 2 and 5", 7, 6, 3, 16, 16, (0, 2, 5)),
        ("24 columns, width 40", 10, 2, 2, 40, 24, ()),
        ("9 tokens, 2 experts, top-1, width 20", 9, 2, 1, 20, 16, ()),
    ]:
        experts = _visits(n_tokens, n_experts, k, seed=n_tokens, without=without)
        order, _, starts = _group(experts, n_experts).values()
        x = _random(n_tokens, d, seed=1, dtype=torch.float32)
        w = _random(n_experts, d, n, seed=2, dtype=torch.float32) * d**-0.5
        launch = partial(_launch, kernel, x, w, order, starts, k)
        for first_experts in sorted({max(1, n_experts // 2), n_experts}):
            before, y, after = launch(first_experts)
            _expect_own_rows(what, first_experts, int(starts[first_experts]), before, y, after)
        expect_numbers(
            what, "y", y,
            "does the kernel end in a tl.store to its own rows of y? If so, it reads "
            "outside the tensors: take the address of a weight apart, (expert, d, col)",
        )  # fmt: skip
        want = _grouped(x, w, order, experts)
        expect_or_name(
            f"{what}: y", y, want,
            "print one program's place, token and col, and compare with the reference row by row",
            _grouped_mistakes(x, w, order, starts, experts, want),
        )  # fmt: skip


TILE, GUARD = 16, 64  # visits and columns of a program; rows around y


def _expect_own_rows(
    what: str, first_experts: int, end: int, before: Tensor, y: Tensor, after: Tensor
) -> None:
    """With programs for the first experts alone, the rows from `end` on stay as they were."""
    written = ~torch.cat([before, y, after]).isnan()
    whole_rows = written.all(dim=1)
    if whole_rows.sum() > end:
        raise NotYet(
            f"{what}: programs for {_experts_text(first_experts)} have {end} rows of y to write, "
            f"and the kernel wrote {int(whole_rows.sum())}",
            misconception="writes-into-the-next-experts-rows",
            hint="the expert's last tile is shorter: its places end at "
            "tl.load(starts_ptr + expert + 1). Store only where place is below that",
        )
    beside = written.any(dim=1) & ~whole_rows
    beside[GUARD : GUARD + end] = False
    if beside.any():
        raise NotYet(
            f"{what}: something was written beside the rows of {_experts_text(first_experts)}",
            misconception="writes-past-its-columns",
            hint="the last tile of columns is narrower: store only where col < N, or the next row "
            "is overwritten",
        )


def _experts_text(n: int) -> str:
    return "expert 0" if n == 1 else f"experts 0 to {n - 1}"


def _launch(
    kernel, x: Tensor, w: Tensor, order: Tensor, starts: Tensor, k: int, first_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What stands before y, y, and what stands behind it; programs for `first_experts` alone.

    Each tensor stands between others: an address that is off a little finds those, and no crash.
    """
    device, n_visits, (n_experts, d, n) = pick_device(), len(order), w.shape
    nothing = torch.full((GUARD, d), torch.nan)
    x_rows = torch.cat([nothing, *_x_and_behind(x, k), nothing]).to(device)
    w_rows = torch.cat([torch.full_like(w, torch.nan), w, -w, torch.full_like(w, torch.nan)])
    visits = torch.zeros(n_visits + 2 * GUARD, dtype=torch.int32)
    visits[GUARD : GUARD + n_visits] = order
    y = torch.full((n_visits + 2 * GUARD, n), torch.nan, device=device)
    with launched():
        kernel[(ceil_div(n_visits, TILE), ceil_div(n, TILE), first_experts)](
            x_rows[GUARD:], w_rows.to(device)[n_experts:], y[GUARD:], visits.to(device)[GUARD:],
            starts.int().to(device), K=k, D=d, N=n, ROWS=TILE, COLS=TILE, STEP=TILE,
        )  # fmt: skip
    y = y.cpu()
    return y[:GUARD], y[GUARD : GUARD + n_visits], y[GUARD + n_visits :]


def _x_and_behind(x: Tensor, k: int) -> Iterator[Tensor]:
    """Rows up to the number of visits and a tile more: what is no token is one upside down."""
    yield x
    for _ in range(k + ceil_div(TILE, len(x))):
        yield -x


def _grouped(x: Tensor, w: Tensor, order: Tensor, experts: Tensor) -> Tensor:
    """Row by row, in float64."""
    visits, k = experts.flatten(), experts.shape[1]
    rows = [x[v // k].double() @ w[visits[v]].double() for v in order.tolist()]
    return torch.stack(rows)


def _grouped_mistakes(
    x: Tensor, w: Tensor, order: Tensor, starts: Tensor, experts: Tensor, want: Tensor
) -> list[Mistake]:
    """What kernels with the usual mistakes give, in float64."""
    visits, k, d = experts.flatten(), experts.shape[1], w.shape[1]
    x, w = torch.cat(list(_x_and_behind(x.double(), k))), torch.cat([w, -w]).double()
    expert, place = visits[order], torch.arange(len(order))
    in_tile = place - starts[expert]  # since the expert's first place
    counts = starts.diff()[expert]

    def product_of(rows: Tensor, matrices: Tensor, of: slice = slice(None)) -> Tensor:
        return torch.einsum("pd,pdn->pn", rows[:, of], matrices[:, of])

    def missing(where: Tensor) -> Tensor:
        return torch.where(where[:, None], torch.nan, want)

    rows, matrices = x[order // k], w[expert]
    by_visit = torch.empty_like(want)
    by_visit[order] = want
    whole = d // TILE * TILE
    wrongs = [
        ("takes-the-place-for-the-token", product_of(x[place], matrices),
         "rows of x are in the order of the tokens: look the visit up at the place, and divide by "
         "K"),
        ("takes-visits-for-tokens", product_of(x[order], matrices),
         "visit = token * K + choice: the token is visit // K"),
        ("takes-the-choice-for-the-token", product_of(x[order % k], matrices),
         "the remainder of the visit by K is the choice; the token is visit // K"),
        ("takes-expert-0-for-all", product_of(rows, w[torch.zeros_like(expert)]),
         "expert e's matrix starts at w_ptr + e * D * N"),
        ("takes-the-next-experts-matrix", product_of(rows, w[expert + 1]),
         "expert e's matrix starts at w_ptr + e * D * N, and e is tl.program_id(2)"),
        ("keeps-only-the-last-step", product_of(rows, matrices, slice((d - 1) // TILE * TILE, d)),
         "acc collects all steps over D: acc += tl.dot(...)"),
        ("does-only-the-first-step", product_of(rows, matrices, slice(0, TILE)),
         "walk over all of D: for first in range(0, D, STEP)"),
        ("forgets-the-end-of-the-sum", product_of(rows, matrices, slice(0, whole)),
         "D // STEP leaves out the shorter last step: walk range(0, D, STEP), with a mask"),
        ("sums-past-the-width", _summed_past(x, w, order // k, expert, d),
         "the last step is shorter: what follows in memory is the next token and the next matrix. "
         "Mask x and w with d < D"),
        ("stores-by-visit", by_visit,
         "y is in the order of the places: store at place * N, not at visit * N"),
        ("does-only-the-first-tile", missing(in_tile >= TILE),
         "an expert may have more than ROWS visits: program_id(0) says which tile of them"),
        ("drops-the-shorter-tiles", missing(in_tile >= counts // TILE * TILE),
         "an expert's last tile is seldom full: do not skip it, mask it"),
    ]  # fmt: skip
    return wrongs


def _summed_past(x: Tensor, w: Tensor, token: Tensor, expert: Tensor, d: int) -> Tensor:
    """The sum over D rounded up to whole steps, through what lies behind the row and the matrix."""
    n, width = w.shape[2], ceil_div(d, TILE) * TILE
    at = token[:, None] * d + torch.arange(width)
    rows = torch.cat([x.flatten(), x.new_zeros(TILE)])[at]
    lines = torch.cat([w.flatten(0, 1), w.new_zeros(TILE, n)])
    return torch.einsum("pd,pdn->pn", rows, lines[expert[:, None] * d + torch.arange(width)])
