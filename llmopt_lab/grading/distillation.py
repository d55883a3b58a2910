"""The checks of chapter 6. Each knows what the usual mistakes give, and names the one it sees."""

import math
import warnings

import torch
from torch import Tensor, nn

from llmopt_lab.core.device import pick_device
from llmopt_lab.core.memory import tiles
from llmopt_lab.distillation.cases import ragged
from llmopt_lab.distillation.trials import RATE, SmallModel, tokens_of
from llmopt_lab.grading.checks import (
    Mistake,
    NotYet,
    exercise,
    expect,
    expect_kernel,
    expect_no_nan,
    expect_or_name,
    expect_parts,
    expect_untouched,
    launched,
)


def _log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    z = logits.double() / temperature
    return z - z.logsumexp(-1, keepdim=True)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, nats."""
    p = log_p.exp()
    return (p * (log_p - log_q)).masked_fill(p == 0, 0).sum(-1)


def _expect_loss(what: str, got) -> None:
    """A scalar that can be trained on."""
    if not isinstance(got, Tensor) or got.dim() > 0:
        shape = f"of shape {tuple(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
        raise NotYet(
            f"{what}: the loss is {shape}, expected a scalar tensor",
            misconception="not-a-scalar",
            hint="backward() starts from one number: the mean over the rows, as a tensor",
        )
    if not got.requires_grad:
        raise NotYet(
            f"{what}: the loss has no gradient",
            misconception="cuts-the-gradient",
            hint="the student learns through its logits: no_grad, detach or .item() must not "
            "touch them",
        )


# 1. The loss that grows with the text


@exercise(
    "distillation.soft_loss",
    points=2,
    minutes=10,
    hints=(
        "F.kl_div(log_q, p, reduction='batchmean') divides the sum by the FIRST dimension. How "
        "many rows are there really, and what must they look like for that to be right?",
        "log_p and log_q are log_softmax(logits / temperature, dim=-1). Each row's KL is "
        "(log_p.exp() * (log_p - log_q)).sum(-1); take their mean, times temperature ** 2.",
    ),
)
def _(soft_loss):
    for what, shape, temperature, size in [
        ("2 texts of 3 places", (2, 3), 2.0, 1.0),
        ("the same, twice as long", (2, 6), 2.0, 1.0),
        ("5 rows, no texts", (5,), 3.0, 1.0),
        ("logits of some thousands", (3, 4), 0.5, 1000.0),
        ("a group of 2 x 2 texts of 3 places", (2, 2, 3), 4.0, 1.0),
    ]:
        student, teacher, _, _ = ragged(*shape, n_vocab=7, seed=len(what))
        student *= size
        got = soft_loss(student.clone().requires_grad_(), teacher.clone(), temperature)
        _expect_loss(what, got)
        log_p, log_q = (_log_softmax(z, temperature) for z in (teacher, student))
        plain_p, plain_q = _log_softmax(teacher), _log_softmax(student)
        rows, square = _kl(log_p, log_q), temperature**2
        want = square * rows.mean()
        underflow = log_q.exp().log()
        expect_or_name(
            f"{what}: the loss", got, want, "one row by hand: two softmaxes, sum of p * (log p - "
            "log q); then the mean over ALL rows, times T^2",
            [
                ("divides-by-the-batch", square * rows.sum() / shape[0],
                 "'batchmean' divides by the first dimension alone, so every place of a text "
                 "counts in full: twice the length, twice the loss. flatten(0, -2) first, or take "
                 "the mean of the rows yourself"),
                ("divides-by-the-vocabulary", want / 7,
                 "reduction='mean' divides by every entry, the vocabulary too. Sum over the "
                 "vocabulary, mean over the rows"),
                ("adds-up-all-rows", square * rows.sum(),
                 "that grows with batch and length: the mean over the rows"),
                ("forgets-t-squared", rows.mean(),
                 "softened gradients are T^2 times smaller: multiply by temperature ** 2"),
                ("multiplies-by-t", temperature * rows.mean(), "temperature SQUARED"),
                ("turns-the-divergence-over", square * _kl(log_q, log_p).mean(),
                 "KL(teacher || student): the weights in the sum are the teacher's. kl_div wants "
                 "the student's logarithms first and the teacher's probabilities second"),
                ("softens-the-teacher-alone", square * _kl(log_p, plain_q).mean(),
                 "the student's logits are divided by T as well"),
                ("softens-the-student-alone", square * _kl(plain_p, log_q).mean(),
                 "the teacher's logits are divided by T as well"),
                ("multiplies-the-logits", square * _kl(
                    _log_softmax(teacher, 1 / temperature), _log_softmax(student, 1 / temperature)
                 ).mean(), "T divides the logits: a higher one is softer"),
                ("forgets-the-teachers-entropy", -square * (log_p.exp() * log_q).sum(-1).mean(),
                 "that is the cross-entropy. Its gradient is the same, but it is not 0 when the "
                 "student equals the teacher: add sum p log p"),
                ("gives-probabilities-for-logarithms",
                 square * (log_p.exp() * (log_p - log_q.exp())).sum(-1).mean(),
                 "kl_div's first argument is log q, not q: log_softmax"),
                ("takes-the-log-of-a-softmax", square * _kl(log_p, underflow).mean(),
                 "a probability below 1e-308 is 0, and log 0 is -inf: log_softmax never leaves the "
                 "logarithms"),
                ("wrong-sign", -want, "a KL is never negative: log p - log q"),
            ],
        )  # fmt: skip


# 2. Right shape by accident


@exercise(
    "distillation.task_loss",
    points=2,
    minutes=10,
    hints=(
        "Which of the three dimensions does F.cross_entropy take for the classes? And which token "
        "does the row of place i predict?",
        "F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()): rows of classes, "
        "one label each.",
    ),
)
def _(task_loss):
    for what, batch, n, n_vocab in [
        ("5 places, 5 tokens in the vocabulary", 2, 5, 5),
        ("5 places, 4 tokens in the vocabulary", 3, 5, 4),
        ("4 places, 7 tokens in the vocabulary", 2, 4, 7),
        ("a text of 2 places", 1, 2, 6),
    ]:
        logits, _, tokens, _ = ragged(batch, n, n_vocab=n_vocab, seed=n + n_vocab)
        tokens[0, :2] = torch.tensor([1, 3])  # neighbours that differ
        try:
            got = task_loss(logits.clone().requires_grad_(), tokens.clone())
        except RuntimeError as error:
            if "target size" not in str(error):
                raise
            raise NotYet(
                f"{what}: {error}",
                misconception="takes-places-for-classes",
                hint="cross_entropy takes dimension 1 for the classes, and here it is the places. "
                "Flatten batch and places into rows, or move the classes to dimension 1",
            ) from error
        if isinstance(got, Tensor) and got.dim() == 0:
            _expect_loss(what, got)
        log_q = _log_softmax(logits)

        def loss(log_q: Tensor, labels: Tensor) -> Tensor:
            return -log_q.gather(-1, labels[..., None]).mean()

        mistakes: list[Mistake] = []
        for rows, labels, shifted in [(log_q[:, :-1], tokens[:, 1:], True), (log_q, tokens, False)]:
            if rows.shape[1] == n_vocab and n_vocab > int(labels.max()):
                silent = (logits[:, :-1] if shifted else logits).transpose(1, 2)
                mistakes.append(
                    ("takes-places-for-classes" if shifted else "the-guides-line",
                     loss(_log_softmax(silent), labels),
                     "cross_entropy takes dimension 1 for the classes. Here that is the places, "
                     "and as there are as many of them as tokens, nothing fails: flatten batch and "
                     "places into rows" + ("" if shifted else ". And row i predicts token i + 1"))
                )  # fmt: skip
            z = logits[:, :-1] if shifted else logits
            bent = z.reshape(batch, n_vocab, -1).transpose(1, 2)
            mistakes.append(
                ("reshapes-for-transposing", loss(_log_softmax(bent), labels),
                 "reshape(batch, n_vocab, n) has the right shape and mixes places and tokens: "
                 "transpose(1, 2) moves the dimension")
            )  # fmt: skip
        want = loss(log_q[:, :-1], tokens[:, 1:])
        labels, n_rows = tokens[:, 1:], batch * (n - 1)
        mistakes += [
            ("predicts-itself", loss(log_q, tokens),
             "the row of place i has seen token i and predicts token i + 1: logits[:, :-1] meet "
             "tokens[:, 1:]"),
            ("predicts-the-token-before", loss(log_q[:, 1:], tokens[:, :-1]),
             "the other way round: row i predicts token i + 1"),
            ("broadcasts-the-labels", -log_q[:, :-1][..., labels].mean(),
             "indexing with all labels gives every row the labels of ALL rows, (batch, n, batch, "
             "n): gather(-1, labels[..., None]) gives each its own"),
            ("adds-up-the-text", want * n_rows / batch,
             "the mean over all rows: a long text must not weigh more in the loss's size"),
            ("adds-up-all-rows", want * n_rows, "the mean over the rows, not the sum"),
            ("skips-the-softmax", loss(logits[:, :-1], labels),
             "logits are no log-probabilities: log_softmax first, or cross_entropy"),
            ("softmax-twice", loss(_log_softmax(log_q[:, :-1].exp()), labels),
             "cross_entropy does the softmax itself: give it logits"),
        ]  # fmt: skip
        expect_or_name(
            f"{what}: the loss", got, want, "take one row: minus the log of its probability for "
            "the token after it; then the mean", mistakes,
        )  # fmt: skip


# 3. Which way is the teacher?


@exercise(
    "distillation.logit_gradient",
    points=2,
    minutes=12,
    hints=(
        "With one row and T = 1 the loss is a constant minus sum p_i log q_i, and log q_i is z_i "
        "minus the log of sum exp(z_j). What is its derivative with respect to z_i?",
        "q - p, as sum p is 1. Then the factors: z is divided by T on its way in (1/T), the loss "
        "is multiplied by T^2, and it is a mean over n rows: temperature * (q - p) / n_rows.",
    ),
)
def _(logit_gradient):
    for what, shape, temperature in [
        ("one row at T = 1", (1,), 1.0),
        ("one row at T = 2", (1,), 2.0),
        ("2 texts of 3 places at T = 1", (2, 3), 1.0),
        ("3 texts of 4 places at T = 5", (3, 4), 5.0),
    ]:
        student, teacher, _, _ = ragged(*shape, n_vocab=6, seed=3 + len(what))
        n = student[..., 0].numel()
        q, p = (_log_softmax(z, temperature).exp() for z in (student, teacher))
        got = logit_gradient(p.clone(), q.clone(), temperature)
        want = temperature * (q - p) / n
        first = nn.functional.one_hot(p.argmax(-1), 6)
        expect_or_name(
            f"{what}: gradient", got, want,
            "move one logit by 1e-6, see how soft_loss moves, and divide",
            [
                ("points-uphill", -want,
                 "that is the step's direction. The gradient points where the loss GROWS: q - p"),
                ("forgets-the-mean", want * n,
                 "the loss is a mean over the rows, and every row gets its share of it: / n_rows"),
                ("divides-by-the-batch", want * n / shape[0],
                 "the mean is over all rows, the places of all texts"),
                ("divides-by-the-vocabulary", want / 6,
                 "the loss sums over the vocabulary: no mean there"),
                ("forgets-t", want / temperature,
                 "T^2 from the loss, 1/T from the division on the way in: T is left"),
                ("forgets-t-squared", want / temperature**2,
                 "that is the gradient of the KL alone; the loss has T^2 in front"),
                ("forgets-the-inner-derivative", want * temperature,
                 "the logits are divided by T before the softmax: the chain rule gives 1/T"),
                ("hardens-the-teacher", temperature * (q - first) / n,
                 "that is the gradient for a label. The teacher's whole distribution is p"),
                ("subtracts-logarithms", temperature * (q.log() - p.log()) / n,
                 "the derivative of log q with respect to a logit has q in it, no logarithm"),
                ("stops-at-q", -temperature * p / q / n,
                 "-p / q is the derivative for q. A logit moves every q of its row: go on through "
                 "the softmax, or use log q_i = z_i - log sum exp z"),
                ("forgets-the-denominator", -temperature * p / n,
                 "log q_i = z_i - log sum exp z, and z_i stands in that sum, too: its derivative "
                 "is q_i"),
                ("takes-the-kls-terms", p * (p.log() - q.log()),
                 "those are the terms of the KL. Its derivative with respect to one logit passes "
                 "through every q of the row"),
            ],
        )  # fmt: skip


# 4. T^2 by measurement


@exercise(
    "distillation.measured_power",
    points=2,
    minutes=12,
    hints=(
        "If the norm falls like T ** -power, what is the ratio of the two norms? Take the "
        "logarithm of both sides.",
        "norm(T) is that of the gradient of the mean KL alone, without T^2, for the student's "
        "logits: autograd, or (q - p) / (T * n_rows). The power is log(norm(low) / norm(high)) / "
        "log(high / low).",
    ),
)
def _(measured_power):
    for what, low, high, size in [
        ("from T = 1 to 3", 1.0, 3.0, 1.0),
        ("from T = 60 to 200", 60.0, 200.0, 1.0),
        ("large logits, from T = 0.5 to 4", 0.5, 4.0, 3.0),
    ]:
        student, teacher, _, _ = ragged(2, 3, n_vocab=6, seed=int(high))
        student, teacher = size * student, size * teacher
        got = measured_power(student.clone(), teacher.clone(), low, high)
        logs = {t: [_log_softmax(z, t) for z in (teacher, student)] for t in (1.0, low, high)}

        def power(of, low=low, high=high) -> float:
            return math.log(of(low) / of(high)) / math.log(high / low)

        def gap(t: float, logs=logs) -> Tensor:
            log_p, log_q = logs[t]
            return (log_q.exp() - log_p.exp()) / t

        def hard_gap(t: float, logs=logs) -> float:
            return float((logs[t][1].exp() - logs[1.0][0].exp()).norm() / t)

        want = power(lambda t: float(gap(t).norm()))  # noqa: B023  called at once
        expect_or_name(
            f"{what}: the power", got, want,
            "print the two norms and their ratio; how many factors of high / low are in it?",
            [
                ("measures-with-the-t-squared", want - 2,
                 "T^2 is the cure. Measure the patient: the mean KL without it"),
                ("measures-the-loss",
                 power(lambda t: float(_kl(*logs[t]).mean())),  # noqa: B023
                 "the loss shrinks as well, but training feels the gradient: its norm"),
                ("gradient-of-the-softened-logits", want - 1,
                 "the student has logits z, not z / T: the derivative with respect to z has "
                 "another 1/T"),
                ("wrong-sign", -want,
                 "the norm falls like T ** -power, and the power is positive: low over high"),
                ("returns-the-ratio", (high / low) ** want,
                 "that is how many times smaller it is; the power is its logarithm over the "
                 "logarithm of high / low"),
                ("forgets-the-distance", want * math.log(high / low),
                 "divide by log(high / low): per factor of T"),
                ("logarithm-to-base-2", want * math.log2(high / low),
                 "log2 is per doubling; divide by log2(high / low)"),
                ("softens-the-student-alone", power(hard_gap),
                 "the teacher is softened too: p - q shrinks because BOTH flatten"),
                ("takes-the-largest", power(lambda t: float(gap(t).abs().max())),  # noqa: B023
                 "the norm of the whole gradient, not its largest entry"),
                ("takes-it-on-trust", 2.0,
                 "2 is the limit for high temperatures. Here it is another number: measure"),
            ],
        )  # fmt: skip


# 5. Which rows count?


@exercise(
    "distillation.rows_that_count",
    points=2,
    minutes=10,
    hints=(
        "Row i predicts token i + 1, so ask about that token: is it part of the answer? Which "
        "places does an answer have?",
        "labels_at = torch.arange(1, n), the place of each row's label. It counts where n_prompt "
        "<= labels_at < n_text; with [:, None] both compare with every place of every text.",
    ),
)
def _(rows_that_count):
    rng = torch.Generator().manual_seed(0)
    for what, n, prompts, ends in [
        ("2 texts of up to 7 tokens", 7, [2, 3], [5, 7]),
        ("4 texts of up to 9 tokens", 9, [1, 4, 3, 6], [9, 6, 4, 7]),
        ("1 text, no padding", 5, [2], [5]),
    ]:
        n_prompt, n_text = torch.tensor(prompts), torch.tensor(ends)
        tokens = torch.randint(1, 9, (len(ends), n), generator=rng)
        place = torch.arange(n)[None]
        tokens[place >= n_text[:, None] - 1] = 0  # an answer ends with the end token, like padding
        tokens[:, 0] = 0  # and a text may begin with one
        tokens[-1, 3] = 0  # and have one in the middle
        got = rows_that_count(tokens.clone(), n_prompt.clone(), n_text.clone())
        begin, end, at = n_prompt[:, None], n_text[:, None], place[:, 1:]
        want = (begin <= at) & (at < end)
        expect_or_name(
            f"{what}: mask", got, want,
            "write the tokens of one text in a line and what each row predicts below it",
            [
                ("loses-the-end", want & (tokens[:, 1:] != 0),
                 "the end of an answer is the padding's token, too, and the student must learn to "
                 "stop: go by n_text, not by the token"),
                ("masks-by-the-token", (at < end) & (tokens[:, 1:] != 0),
                 "two things: the prompt is no answer, and the end token of an answer counts "
                 "though it looks like padding"),
                ("asks-about-the-input", (begin <= at - 1) & (at - 1 < end),
                 "row i holds what comes AFTER token i: it is label i + 1 that must be in the "
                 "answer"),
                ("loses-the-first-token", (begin < at) & (at < end),
                 "the prompt's last row predicts the first token of the answer: it counts"),
                ("counts-one-of-the-padding", (begin <= at) & (at <= end),
                 "the answer's last token is at n_text - 1; the row there predicts padding"),
                ("stops-one-early", (begin <= at) & (at < end - 1),
                 "the answer's last token, at n_text - 1, is a label as well"),
                ("counts-the-prompt", at < end,
                 "the prompt is given, the student need not learn to write it"),
                ("counts-the-padding", begin <= at, "what comes from n_text on is no text"),
                ("counts-all", torch.ones_like(want), "prompt and padding are no labels"),
                ("one-length-for-all", (n_prompt.max() <= at) & (at < n_text.max()) | (begin < 0),
                 "every text has a prompt and an end of its own: [:, None]"),
                ("the-other-rows", ~want, "True are the rows that count"),
                ("one-row-too-many", (begin <= place) & (place < end),
                 "the model was fed tokens[:, :-1]: n - 1 rows, and the first token is nobody's "
                 "label"),
                ("weights-for-a-mask", want.double(),
                 "a mask is bool: NaN times 0 is NaN, but what is not picked has no influence"),
                ("numbers-for-a-mask", want.long(),
                 "a mask is bool. Integers pick rows by NUMBER: logits[mask] would be rows 0 "
                 "and 1"),
            ],
        )  # fmt: skip


# 6. The distillation loss


@exercise(
    "distillation.distillation_loss",
    points=4,
    minutes=20,
    hints=(
        "Pick the rows that count first, logits[mask], and everything after is on plain rows: a "
        "KL each, a cross-entropy each, two means. Which of the two meets the temperature?",
        "s, t, y = student_logits[mask], teacher_logits[mask].detach(), labels[mask]. soft is the "
        "mean of the rows' KL at T, times T^2; hard is F.cross_entropy(s, y). The loss is "
        "soft_weight * soft + (1 - soft_weight) * hard.",
    ),
)
def _(distillation_loss):
    for what, shape, temperature, weight, other_rows in [
        ("prompts are masked", (3, 5), 2.0, 0.7, "have a label"),
        ("padding has label -100", (2, 6), 3.0, 0.25, "have none"),
        ("padding has infinite logits", (2, 4), 2.0, 0.5, "are infinite"),
    ]:
        student, teacher, labels, mask = ragged(*shape, n_vocab=5, seed=21)
        mask.view(-1)[1:4] = torch.tensor([True, False, True])  # texts of different lengths
        if other_rows != "have a label":
            labels = labels.masked_fill(~mask, -100)
        case = (student, teacher, labels, mask, temperature, weight)
        want = _mixed(*case)
        fed = [x.clone() for x in (student, teacher)]
        if other_rows == "are infinite":
            for x in fed:
                x[~mask] = torch.inf
        for x in fed:
            x.requires_grad_()
        inputs = [*fed, labels.clone(), mask.clone(), temperature, weight]
        try:
            got = distillation_loss(*inputs)
        except (RuntimeError, IndexError) as error:
            if "out of bounds" not in str(error) and "out of range" not in str(error):
                raise
            raise NotYet(
                f"{what}: {error}",
                misconception="looks-up-label-minus-100",
                hint="a row that does not count has no label to look up: pick logits[mask] and "
                "labels[mask] first",
            ) from error
        _expect_loss(what, got)
        mistakes = [(name, _mixed(*case, **change), where) for name, change, where in LOSS_MISTAKES]
        if other_rows == "are infinite":
            nan = torch.tensor(torch.nan, dtype=torch.float64)
            mistakes = [
                ("nan-times-zero", nan,
                 "softmax of infinities is NaN, and NaN * 0 is NaN: pick the rows, logits[mask], "
                 "or use torch.where. Never multiply by a mask")
            ]  # fmt: skip
        expect_or_name(
            f"{what}: loss", got, want, "compute the two parts for one row by hand", mistakes
        )
        if other_rows == "are infinite":
            continue
        gradients = torch.autograd.grad(got, fed, allow_unused=True)
        if gradients[1] is not None:
            raise NotYet(
                f"{what}: the teacher gets a gradient",
                misconception="trains-the-teacher",
                hint="a teacher that meets its student half-way is none: teacher_logits.detach()",
            )
        clone = student.clone().requires_grad_()
        parts = _mixed_parts(clone, *case[1:-1])
        soft, hard = (torch.autograd.grad(x, clone, retain_graph=True)[0] for x in parts)
        expect_or_name(
            f"{what}: the student's gradient", gradients[0], weight * soft + (1 - weight) * hard,
            "compare with logit_gradient of exercise 3, row by row",
            [
                ("cuts-the-soft-part", (1 - weight) * hard,
                 "no_grad is for the teacher: the student's softened distribution carries the "
                 "gradient"),
                ("cuts-the-labels-part", weight * soft,
                 "the cross-entropy's gradient is missing: no detach there"),
            ],
        )  # fmt: skip


# name, how `_mixed` differs, where to look
LOSS_MISTAKES = [
    ("masks-nothing", {"soft_rows": "all", "hard_rows": "all"},
     "rows of prompt and padding count like an answer's: take the rows where mask is True"),
    ("masks-the-labels-alone", {"soft_rows": "all"},
     "the KL of a padding row is a number like any other: mask the soft part too"),
    ("masks-the-soft-part-alone", {"hard_rows": "all"}, "the labels' part needs the mask too"),
    ("the-other-rows", {"soft_rows": "others", "hard_rows": "others"},
     "True are the rows that count"),
    ("divides-by-all-rows", {"divide": "all"},
     "the mean is over the rows that count, mask.sum(): with all rows, padding makes the loss "
     "small"),
    ("divides-by-the-batch", {"divide": "batch"},
     "that is the guide's batchmean: the soft part grows with the length. Mean over the rows"),
    ("each-text-alike", {"divide": "texts"},
     "a mean of the texts' means gives a token of a short text more weight. One mean over all "
     "rows"),
    ("divides-by-the-vocabulary", {"divide": "vocabulary"},
     "sum over the vocabulary, mean over the rows: reduction='mean' of kl_div divides by both"),
    ("forgets-t-squared", {"square": 0}, "the soft part is multiplied by temperature ** 2"),
    ("multiplies-by-t", {"square": 1}, "temperature SQUARED"),
    ("t-squared-on-both", {"hard_square": True},
     "only the soft part was flattened, so only it gets T^2"),
    ("softens-the-labels-part", {"hard_soft": True},
     "labels are met at T = 1: there is no teacher to flatten with"),
    ("swaps-the-weights", {"swap": True}, "soft_weight is the SOFT part's; labels have the rest"),
    ("forgets-the-rest-of-the-weight", {"rest": 1.0}, "the labels' part weighs 1 - soft_weight"),
    ("soft-part-alone", {"rest": 0.0}, "add (1 - soft_weight) times the cross-entropy"),
    ("turns-the-divergence-over", {"reverse": True},
     "KL(teacher || student): the teacher's probabilities are the weights"),
    ("forgets-the-teachers-entropy", {"entropy": True},
     "that is the cross-entropy with soft targets: it is not 0 for a student that equals its "
     "teacher. Add sum p log p"),
]  # fmt: skip


def _mixed_parts(
    student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor, temperature: float,
    *, soft_rows: str = "", hard_rows: str = "", divide: str = "", square: int = 2,
    hard_square: bool = False, hard_soft: bool = False, reverse: bool = False,
    entropy: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Soft and hard part, each with its factor; or what comes of a mistake."""
    log_p, log_q = (_log_softmax(z, temperature) for z in (teacher, student))
    soft = _kl(log_q, log_p) if reverse else _kl(log_p, log_q)
    if entropy:
        soft = -(log_p.exp() * log_q).sum(-1)
    log_q = log_q if hard_soft else _log_softmax(student)
    known = labels.clamp_min(0)
    hard = -log_q.gather(-1, known[..., None])[..., 0]
    every = torch.ones_like(mask)
    rows = {"": mask, "all": every, "others": ~mask}
    soft_mask = rows[soft_rows]
    hard_mask = rows[hard_rows] & (labels >= 0)

    def mean(x: Tensor, counts: Tensor, of_soft: bool) -> Tensor:
        kept = x.masked_fill(~counts, 0)
        if divide == "all":
            return kept.sum() / mask.numel()
        if divide == "batch" and of_soft:
            return kept.sum() / len(mask)
        if divide == "texts":
            return (kept.sum(1) / counts.sum(1).clamp_min(1)).mean()
        if divide == "vocabulary" and of_soft:
            return kept.sum() / counts.sum() / student.shape[-1]
        return kept.sum() / counts.sum()

    factor = temperature**2 if hard_square else 1.0
    return temperature**square * mean(soft, soft_mask, True), factor * mean(hard, hard_mask, False)


def _mixed(
    student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor, temperature: float,
    weight: float, *, swap: bool = False, rest: float | None = None, **change,
) -> Tensor:  # fmt: skip
    soft, hard = _mixed_parts(student, teacher, labels, mask, temperature, **change)
    weights = (weight, 1 - weight if rest is None else rest)
    return sum(w * x for w, x in zip(weights[::-1] if swap else weights, (soft, hard), strict=True))


# 7. The teacher that drops out


@exercise(
    "distillation.train_step",
    points=3,
    minutes=15,
    hints=(
        "Four questions. In which mode is the teacher while it answers, and the student? Does the "
        "teacher's answer carry a graph? Which gradients are in the student from before? Who "
        "moves?",
        "teacher.eval(); student.train(); with torch.no_grad(): target = teacher(tokens). Then "
        "loss = soft_loss(student(tokens), target, temperature); optimizer.zero_grad(); "
        "loss.backward(); optimizer.step(); return loss.item().",
    ),
)
def _(attempt):
    expect_parts(attempt, "train_step", "one_step")
    train_step, one_step = attempt
    for what, student_trains, temperature in [
        ("after trainer.train()", True, 2.0),
        ("after an evaluation", False, 3.0),
    ]:
        seed = int(temperature)
        told = one_step(train_step, seed, temperature=temperature, student_trains=student_trains)
        if not told["gradients_on"]:
            raise NotYet(
                f"{what}: gradients are switched off for everything that follows",
                misconception="switches-gradients-off-for-good",
                hint="with torch.no_grad(): ... ends with its block",
            )
        _expect_quiet(what, told)
        student, teacher = SmallModel(seed), SmallModel(seed + 1).eval()
        if any(
            not torch.equal(a, b)
            for a, b in zip(told["teacher_weights"], teacher.parameters(), strict=True)
        ):
            raise NotYet(
                f"{what}: the teacher's weights have changed",
                misconception="trains-the-teacher",
                hint="only the student's weights may move",
            )
        got, tokens = told["returned"], tokens_of(seed)
        if isinstance(got, Tensor) and got.requires_grad:
            raise NotYet(
                f"{what}: the result still holds the graph of the whole step",
                misconception="returns-the-graph",
                hint="a curve of such losses keeps every step's activations in memory: "
                "return loss.item()",
            )
        loss = temperature**2 * _kl(
            _log_softmax(teacher(tokens).detach(), temperature),
            _log_softmax(student(tokens), temperature),
        )
        slopes = torch.autograd.grad(loss.mean(), list(student.parameters()))
        expect_or_name(
            f"{what}: the loss", got, float(loss.mean().detach()),
            "soft_loss of exercise 1, of the student's logits before the step",
            [
                ("divides-by-the-batch", float(loss.sum().detach() / len(tokens)),
                 "the mean is over all rows, not over the texts"),
                ("forgets-t-squared", float(loss.mean().detach() / temperature**2),
                 "times temperature ** 2"),
            ],
        )  # fmt: skip
        before = [weight.detach() for weight in student.parameters()]

        def moved(slope: float, old: float = 0.0, before=before, slopes=slopes) -> list[Tensor]:
            return [b - RATE * (slope * s + old) for b, s in zip(before, slopes, strict=True)]

        expect_or_name(
            f"{what}: the student's weights", told["student_weights"], moved(1.0),
            "zero_grad, backward, step: in this order, once each",
            [
                ("nothing-moves", before,
                 "the weights are as before: backward() fills the gradients, optimizer.step() "
                 "uses them, and zero_grad() must not come between the two"),
                ("keeps-old-gradients", moved(1.0, 1.0),
                 "backward() ADDS to what is in .grad already: optimizer.zero_grad() first"),
                ("climbs", moved(-1.0), "the optimizer goes downhill by itself: no minus sign"),
                ("steps-twice", moved(2.0), "one step for one gradient"),
                ("steps-before-backward", moved(0.0, 1.0),
                 "the step took what was in .grad from before: backward() comes first"),
            ],
        )  # fmt: skip


def _expect_quiet(what: str, told: dict) -> None:
    """The teacher answered once, in evaluation mode and without a graph; the student learned."""
    for who in ("teacher", "student"):
        n = len(told[f"{who}_calls"])
        if n != 1:
            raise NotYet(
                f"{what}: the {who} ran {n} times in one step",
                misconception=f"runs-the-{who}-{'not-at-all' if n == 0 else 'again'}",
                hint="one pass of each model over the tokens, called as model(tokens)",
            )
    (teacher_trains, keeps_graph), (student_trains, learns) = (
        told["teacher_calls"][0], told["student_calls"][0],
    )  # fmt: skip
    if teacher_trains:
        raise NotYet(
            f"{what}: the teacher answered in training mode",
            misconception="teacher-drops-out",
            hint="no_grad does not switch dropout off: two calls would give two answers, and the "
            "student learns the noise. teacher.eval() before EVERY step: trainer.train() reaches "
            "the teacher inside it, too",
        )
    if not student_trains:
        raise NotYet(
            f"{what}: the student answered in evaluation mode",
            misconception="student-sleeps",
            hint="its dropout belongs to its training: student.train()",
        )
    if keeps_graph:
        raise NotYet(
            f"{what}: the teacher's answer kept a graph",
            misconception="keeps-the-teachers-graph",
            hint="detach() afterwards is too late for the memory: the teacher, the larger of the "
            "two, has kept every activation. with torch.no_grad(): around its call",
        )
    if not learns:
        raise NotYet(
            f"{what}: the student ran without gradients",
            misconception="cuts-the-gradient",
            hint="no_grad is for the teacher's call alone",
        )


# 8. Two humps


@exercise(
    "distillation.both_ways",
    points=2,
    minutes=12,
    hints=(
        "The weights in the sum say whose tokens are drawn: forward, the teacher's; reverse, the "
        "student's. Which places have weight 0, and what is 0 * log 0 in the limit and in torch?",
        "def kl(a, b): return torch.where(a > 0, a * (a.log() - b.log()), 0.0).sum(-1). Forward is "
        "kl(p, q), reverse kl(q, p). Where b alone is 0 the logarithm is infinite, and so is the "
        "KL.",
    ),
)
def _(both_ways):
    rng = torch.Generator().manual_seed(5)
    full_p, full_q = torch.rand(6, generator=rng), torch.rand(3, 6, generator=rng)
    hump = torch.tensor([0, 2, 6, 2, 0, 0, 3, 0]).double()
    humps = torch.tensor(
        [[0, 2, 6, 3, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 5, 0]]
    ).double()
    for what, p, q in [
        ("no zeros", full_p, full_q),
        ("zeros in both", hump, humps),
    ]:
        p, q = p / p.sum(), q / q.sum(-1, keepdim=True)
        got = both_ways(p.clone(), q.clone())
        expect_parts(got, "forward", "reverse")
        forward = q.new_tensor([_kl_by_hand(p.tolist(), row) for row in q.tolist()])
        reverse = q.new_tensor([_kl_by_hand(row, p.tolist()) for row in q.tolist()])

        def each(terms_of, p=p, q=q) -> dict[str, Tensor]:
            wide = p.expand_as(q)
            return {"forward": terms_of(wide, q), "reverse": terms_of(q, wide)}

        def smoothed(a: Tensor, b: Tensor) -> Tensor:
            return (a * ((a + 1e-9) / (b + 1e-9)).log()).sum(-1)

        right = {"forward": forward, "reverse": reverse}
        result = dict(zip(right, got, strict=True))
        finite = [isinstance(x, Tensor) and bool(x.isfinite().all()) for x in result.values()]
        if what != "no zeros" and all(finite):
            raise NotYet(
                f"{what}: forward {_rounded(result['forward'])}, reverse "
                f"{_rounded(result['reverse'])}; a student that never does what its teacher does "
                "is infinitely far",
                misconception="hides-the-infinity",
                hint="a small number added to every probability, or zeros skipped on both sides, "
                "make the worst student look fine. Only a weight of 0 makes a term 0",
            )
        expect_or_name(
            f"{what}: KL", result, right, "take one candidate and add the terms by hand",
            [
                ("swaps-the-two", {"forward": reverse, "reverse": forward},
                 "forward is KL(teacher || student): the teacher's p are the weights"),
                ("nan-from-nothing", each(lambda a, b: (a * (a.log() - b.log())).sum(-1)),
                 "0 * log 0 is NaN in torch and 0 in the definition: torch.where(a > 0, .., 0)"),
                ("nan-from-nothing", each(lambda a, b: (a * (a / b).log()).sum(-1)),
                 "0 / 0 and 0 * log 0 are NaN; a place of weight 0 adds nothing"),
                ("forgets-the-entropy", each(lambda a, b: -torch.where(a > 0, a * b.log(), 0.0)
                                             .sum(-1)),
                 "that is the cross-entropy. For the forward KL the same student wins; for the "
                 "reverse one a student on a single place does"),
                ("in-bits", {name: x / math.log(2) for name, x in right.items()},
                 "nats: the natural logarithm"),
                ("divides-by-the-places", {name: x / len(p) for name, x in right.items()},
                 "a KL is a sum over the places, weighted already"),
                ("wrong-sign", {name: -x for name, x in right.items()},
                 "log a - log b: a KL is never negative"),
                ("forward-twice", {"forward": forward, "reverse": forward},
                 "the KL is not symmetric: the reverse one has the student's weights"),
                ("reverse-twice", {"forward": reverse, "reverse": reverse},
                 "the KL is not symmetric: the forward one has the teacher's weights"),
                ("one-number-for-all",
                 {"forward": forward.sum(), "reverse": reverse.sum()},
                 "every candidate has a KL of its own: sum over the last dimension alone"),
            ],
        )  # fmt: skip


def _kl_by_hand(a: list[float], b: list[float]) -> float:
    """Place by place."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        if x > 0:
            total += math.inf if y == 0 else x * math.log(x / y)
    return total


def _rounded(x: Tensor) -> list[float]:
    return [round(value, 2) for value in x.flatten().tolist()]


# 9. Twenty tokens of the teacher


@exercise(
    "distillation.top_k",
    points=4,
    minutes=20,
    hints=(
        "The softmax is taken over ALL tokens, and then the k largest are kept: so what is left "
        "out is known, 1 minus their sum. In the loss everything else is one more token.",
        "store: log_p, tokens = torch.log_softmax(logits, -1).topk(k), as half() and int16 or "
        "int32. loss: log_q = log_softmax(student)[gather at tokens.long()]; p, q = exp of both in "
        "float32; rest = 1 - sum, clamped at 0; sum p (log p - log q) plus rest_p log(rest_p / "
        "rest_q), where a rest_p of 0 adds nothing.",
    ),
)
def _(functions):
    expect_parts(functions, "store_top_k", "loss_from_store")
    store, loss = functions
    for n_rows, n_vocab, k in [(3, 12, 4), (5, 300, 7), (2, 40_000, 6)]:
        what = f"{n_rows} rows of {n_vocab:,}, k = {k}"
        logits = 3 * torch.randn(n_rows, n_vocab, generator=torch.Generator().manual_seed(k))
        logits[:, -1] = logits.amax(1) + 0.5  # the last token's number is the largest
        _expect_store(f"store_top_k, {what}", store(logits.clone(), k), logits, k)
    for what, n_rows, n_vocab, k in [
        ("3 of 9 tokens", 4, 9, 3),
        ("5 of 30 tokens", 3, 30, 5),
        ("a teacher that is sure", 2, 8, 2),
    ]:
        rng = torch.Generator().manual_seed(n_vocab)
        teacher, student = torch.randn(2, n_rows, n_vocab, generator=rng)
        teacher *= 2
        if what == "a teacher that is sure":
            teacher[:, 5] = 25.0  # its log-probability is 0 in half precision
        log_p, tokens = teacher.double().log_softmax(-1).topk(k)
        log_p, tokens = log_p.half(), tokens.to(torch.int16)
        got = loss(log_p.clone(), tokens.clone(), student.clone())
        _expect_bucket(f"loss_from_store, {what}", got, log_p, tokens.long(), student)


def _expect_store(what: str, got, logits: Tensor, k: int) -> None:
    expect_parts(got, "log_p", "tokens")
    n_rows, n_vocab = logits.shape
    small = torch.int16 if n_vocab <= 1 << 15 else torch.int32
    log_p, tokens = got
    for name, x in (("log_p", log_p), ("tokens", tokens)):
        if not isinstance(x, Tensor) or x.shape != (n_rows, k):
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise NotYet(
                f"{what}: {name} is {shape}, expected ({n_rows}, {k})",
                misconception="stores-the-whole-row" if shape == tuple(logits.shape) else
                "stores-another-shape",
                hint="k log-probabilities and k token numbers a row, nothing else",
            )  # fmt: skip
    if tokens.is_floating_point() or (tokens < 0).any():
        raise NotYet(
            f"{what}: tokens are {tokens.dtype}, the least {tokens.min().item()}",
            misconception="wraps-around",
            hint="int16 ends at 32,767, and what is above comes back negative: int32 for a "
            "larger vocabulary",
        )
    need = n_rows * k * (2 + small.itemsize)
    if log_p.nbytes + tokens.nbytes > need:
        where = "in half precision" if log_p.itemsize > 2 else f"as {str(small)[6:]}"
        raise NotYet(
            f"{what}: {log_p.nbytes + tokens.nbytes} bytes ({log_p.dtype}, {tokens.dtype}); "
            f"{need} are enough",
            misconception="stores-wide-numbers" if log_p.itemsize > 2 else "stores-wide-tokens",
            hint=f"{'log_p' if log_p.itemsize > 2 else 'tokens'} {where}: for a billion places of "
            "a text, one byte more of each number is k GB more",
        )
    full = logits.double().log_softmax(-1)
    want_tokens = full.topk(k).indices
    order = tokens.long().argsort(-1)
    ordered = want_tokens.sort(-1).values
    expect_or_name(
        f"{what}: tokens", tokens.long().gather(-1, order), ordered,
        "the k most probable of each row",
        [
            ("keeps-the-least", (-full).topk(k).indices.sort(-1).values,
             "topk takes the largest; you took the smallest"),
            ("keeps-the-first", torch.arange(k).expand(n_rows, k),
             "the first of the vocabulary are not the likeliest: topk"),
        ],
    )  # fmt: skip
    kept = full.gather(-1, ordered)
    expect(f"{what}: log_p", log_p, kept, "half precision: .half()", dtype=torch.float16,
           misconception="stores-bfloat16") if log_p.dtype == torch.bfloat16 else None  # fmt: skip
    expect_or_name(
        f"{what}: log_p", log_p.gather(-1, order), kept.half(),
        "log_softmax over the whole row, then the k largest",
        [
            ("stores-logits", logits.gather(-1, ordered).half(),
             "logits know nothing of the tokens that are gone: log_softmax over the WHOLE row "
             "first"),
            ("renormalises", kept.log_softmax(-1).half(),
             "a softmax over the k alone says that nothing else ever happens: over all tokens, "
             "then topk"),
            ("stores-probabilities", kept.exp().half(),
             "in half precision what is below 6e-8 is 0: store log-probabilities"),
        ],
    )  # fmt: skip


def _expect_bucket(what: str, got, log_p: Tensor, tokens: Tensor, student: Tensor) -> None:
    log_q_all = _log_softmax(student)
    p, q = log_p.double().exp(), log_q_all.exp().gather(-1, tokens)
    rest_p, rest_q = (1 - p.sum(-1)).clamp_min(0), 1 - q.sum(-1)

    def terms(p: Tensor, q: Tensor) -> Tensor:
        return torch.where(p > 0, p * (p.log() - q.log()), 0.0)

    few = terms(p, q).sum(-1)
    want = few + terms(rest_p, rest_q)
    if isinstance(got, Tensor):
        expect_no_nan(
            what, got,
            "rounding makes the k sum to 1 or a little more, and the logarithm of a rest that is 0 "
            "or negative is no number: clamp the rest at 0, and let 0 add nothing",
            misconception="nan-from-nothing",
        )  # fmt: skip
    n_others = student.shape[-1] - tokens.shape[-1]
    others = torch.ones_like(log_q_all).scatter(-1, tokens, 0.0)
    spread = rest_p[:, None] / n_others
    scaled = p / p.sum(-1, keepdim=True)
    mistakes = [
        ("renormalises-the-teacher", terms(scaled, q).sum(-1),
         "scaled to sum to 1, the few say that nothing else ever happens, and the student's rest "
         "is pressed to 0: keep the rest as one more token"),
        ("renormalises-both", terms(scaled, q / q.sum(-1, keepdim=True)).sum(-1),
         "a softmax over the k alone cannot see how much the student gives to all others"),
        ("forgets-the-rest", few,
         "without the rest this is no KL (it may be negative): add rest_p * log(rest_p / rest_q)"),
        ("spreads-the-rest", few + (others * terms(spread, log_q_all.exp())).sum(-1),
         "nobody knows how the rest was shared out, least of all evenly: one bucket for both"),
        ("the-students-rest-weighs", few + terms(rest_q, rest_p),
         "the weights are the teacher's: rest_p * log(rest_p / rest_q)"),
        ("turns-the-divergence-over", terms(q, p).sum(-1) + terms(rest_q, rest_p),
         "KL(teacher || student): the teacher's p are the weights"),
        ("adds-the-rest-itself", few + rest_p, "rest_p * log(rest_p / rest_q)"),
        ("mean-for-all-rows", want.mean(), "one KL for every row"),
    ]  # fmt: skip
    if isinstance(got, Tensor) and got.shape == want.shape:
        gap = (got.detach().double() - want).abs().max().item()
        named = any((got.detach().double() - wrong).abs().max() < 1e-4 for _, wrong, _ in mistakes)
        if 1e-4 < gap < 5e-3 and not named:
            raise NotYet(
                f"{what}: off by up to {gap:.1e}",
                misconception="computes-in-half-precision",
                hint="half precision is for the disk: log_p.float() before exp and sum",
            )
    where = "one row by hand: k terms, and one for everything else"
    expect_or_name(f"{what}: KL", got, want, where, mistakes)


# 10. 97 % of what?

# The authors' table of GLUE's development sets: BERT-base-uncased, DistilBERT-base-uncased
BERT = {"CoLA": 56.3, "MNLI": 84.7, "MRPC": 88.6, "QNLI": 91.8, "QQP": 89.6, "RTE": 69.3,
        "SST-2": 92.7, "STS-B": 89.0, "WNLI": 53.5}  # fmt: skip
DISTILBERT = {"CoLA": 51.3, "MNLI": 82.1, "MRPC": 87.5, "QNLI": 89.2, "QQP": 88.5, "RTE": 59.9,
              "SST-2": 91.3, "STS-B": 86.9, "WNLI": 56.3}  # fmt: skip


@exercise(
    "distillation.share_of_what",
    points=1,
    minutes=8,
    hints=(
        "Share of the means: add up each column, divide one by the other. Share on RTE: two "
        "numbers. And how much does a coin get on a question with two answers?",
        "77.0 / 79.5; 59.9 / 69.3; (59.9 - 50) / (69.3 - 50). All three as fractions of 1.",
    ),
)
def _(share_of_what):
    got = share_of_what()
    expect_parts(got, "share of the mean", "share on RTE", "share above chance on RTE")
    got = [_number(x) for x in got]
    theirs, ours = sum(BERT.values()) / 9, sum(DISTILBERT.values()) / 9
    shares = [DISTILBERT[task] / BERT[task] for task in BERT]
    parts = [
        ("share of the mean", ours / theirs, [
            ("mean-of-the-shares", sum(shares) / 9,
             "that lets WNLI pull, where the student has 105 % of its teacher. The published 97 % "
             "is one mean over the other"),
            ("takes-the-difference", (theirs - ours) / 100, "a share: student over teacher"),
            ("takes-the-students-score", ours / 100,
             "that is how good the student is, not what it has kept: divide by the teacher"),
            ("what-is-lost", 1 - ours / theirs, "what is KEPT"),
        ]),
        ("share on RTE", 59.9 / 69.3, [
            ("takes-the-difference", 0.094, "a share: student over teacher"),
            ("takes-the-students-score", 0.599, "divide by the teacher's"),
            ("what-is-lost", 1 - 59.9 / 69.3, "what is KEPT"),
            ("another-task", 51.3 / 56.3, "that is CoLA; RTE has 59.9 and 69.3"),
        ]),
        ("share above chance on RTE", 9.9 / 19.3, [
            ("forgets-the-teachers-chance", 9.9 / 69.3,
             "the teacher's score has 50 points of luck in it as well: take them off both"),
            ("forgets-the-students-chance", 59.9 / 19.3,
             "the student's score has 50 points of luck in it as well: take them off both"),
            ("chance-of-three-answers", (59.9 - 100 / 3) / (69.3 - 100 / 3),
             "RTE has two answers: it follows, or it does not. A coin gets 50"),
            ("what-is-lost", 1 - 9.9 / 19.3, "what is KEPT"),
            ("takes-the-difference", 0.094, "a share: what is above 50, student over teacher"),
        ]),
    ]  # fmt: skip
    for (what, want, mistakes), number in zip(parts, got, strict=True):
        if abs(number - 100 * want) < 0.6:
            raise NotYet(
                f"{what} is {number:.1f}", misconception="in-percent", hint="as a fraction of 1"
            )
        _expect_near(what, number, want, mistakes)


def _number(x) -> float:
    try:
        return float(x)
    except (TypeError, ValueError):
        raise NotYet(
            f"{x!r} is no number", misconception="not-a-number", hint="return three numbers"
        ) from None


def _expect_near(what: str, got: float, want: float, mistakes: list[Mistake]) -> None:
    """Like `expect_or_name`, for numbers that a person has rounded to three digits."""
    if abs(got - want) < 0.0006:
        return
    for name, wrong, where in mistakes:
        if abs(got - wrong) < 0.0006:
            expect(what, got, want, where, misconception=name)
    expect(what, got, want, "three digits are enough; which two numbers do you divide?")


# 11. The logits that are never there


@exercise(
    "distillation.chunked_kl",
    points=4,
    minutes=25,
    hints=(
        "Take the tokens in slices of `chunk`. A slice has its two logits, its part of the loss, "
        "and q - p: from that come the slice of d_hidden and a part of d_weight. Then it may go.",
        "for rows in tiles(len(hidden), chunk): log_q and log_p from the two products; loss += the "
        "slice's KL / n; difference = (q - p) / n; d_hidden[rows] = difference @ weight; d_weight "
        "+= difference.T @ hidden[rows].",
    ),
)
def _(attempt):
    expect_parts(attempt, "chunked_kl", "bytes_held")
    chunked_kl, bytes_held = attempt
    for n_tokens, n_vocab, d, d_teacher, chunk in [
        (6, 11, 3, 4, 6),
        (6, 11, 3, 4, 2),
        (7, 13, 4, 3, 3),
        (101, 200, 3, 2, 4),
    ]:
        what = f"{n_tokens} tokens in chunks of {chunk}, {n_vocab} in the vocabulary"
        rng = torch.Generator().manual_seed(n_tokens)

        def random(*shape: int, rng=rng) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        case = (random(n_tokens, d), random(n_vocab, d), random(n_tokens, d_teacher),
                random(n_vocab, d_teacher))  # fmt: skip
        got, largest, most = bytes_held(chunked_kl, *(x.clone() for x in case), chunk)
        expect_parts(got, "loss", "d_hidden", "d_weight")
        want = _linear_kl(*case, chunk)
        wrongs = [(name, _linear_kl(*case, chunk, wrong=name), where)
                  for name, where in CHUNK_MISTAKES]  # fmt: skip
        expect_or_name(
            f"{what}: result", dict(zip(want, got, strict=True)), want,
            "with one chunk for all it is plain autograd: compare there first", wrongs,
        )  # fmt: skip
        a_chunk = 8 * chunk * n_vocab
        if n_tokens > 100 and largest > 2 * a_chunk:
            raise NotYet(
                f"{what}: one of your tensors has {largest:,} bytes; a chunk's logits are "
                f"{a_chunk:,}",
                misconception="materialises-the-logits",
                hint="the result is right, and all logits were in memory at once. Multiply inside "
                "the loop, hidden[rows] @ weight.T",
            )
        budget = 12 * a_chunk + 8 * (5 * n_vocab * (d + d_teacher) + 4 * n_tokens * (d + d_teacher))
        if n_tokens > 100 and most > budget:
            raise NotYet(
                f"{what}: {most:,} bytes of your tensors were alive at once; a chunk's logits "
                f"are {a_chunk:,}",
                misconception="keeps-every-chunk",
                hint="a list of chunks is the whole again: use a chunk's logits for loss and "
                "gradients in the same turn of the loop, then let them go. Under autograd, call "
                "grad once a chunk",
            )


CHUNK_MISTAKES = [
    ("adds-up-all-rows",
     "the loss is the mean over ALL tokens, and its gradients with it: divide by n_tokens"),
    ("averages-the-chunks",
     "the last chunk may be shorter: a mean of the chunks' means gives its tokens more weight. "
     "Divide each by the number of ALL tokens"),
    ("adds-up-the-chunks-means", "each chunk divided by its own size: divide by n_tokens"),
    ("drops-the-last-chunk", "the last chunk may be shorter, and it counts: tiles(n, chunk)"),
    ("last-chunk-only", "every chunk adds to the loss and to d_weight: +="),
    ("points-uphill", "the gradient for the logits is q - p"),
    ("forgets-the-mean-in-the-gradient", "the gradients are those of the mean: (q - p) / n_tokens"),
    ("divides-by-the-chunk", "the gradients are those of the mean over ALL tokens, not of a chunk"),
    ("gradient-of-the-teachers-layer",
     "back through the STUDENT's layer: difference @ weight, difference.T @ hidden"),
    ("turns-the-divergence-over", "KL(teacher || student): the teacher's p are the weights"),
    ("hardens-the-teacher", "p is the teacher's whole distribution, not its first choice"),
]  # fmt: skip


def _linear_kl(
    hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, chunk: int, *,
    wrong: str = "",
) -> dict[str, float | Tensor]:  # fmt: skip
    """Loss and gradients by whole matrices; or what comes of a mistake."""
    n = len(hidden)
    log_q, log_p = _log_softmax(hidden @ weight.T), _log_softmax(teacher @ teacher_weight.T)
    rows = _kl(log_q, log_p) if wrong == "turns-the-divergence-over" else _kl(log_p, log_q)
    p = log_p.exp()
    if wrong == "hardens-the-teacher":
        p = nn.functional.one_hot(p.argmax(-1), p.shape[-1]).to(p)
    difference = log_q.exp() - p
    parts = list(tiles(n, chunk))
    share = torch.full((n,), 1 / n, dtype=torch.float64)
    of_gradient = share.clone()
    for part in parts:
        size = part.stop - part.start
        if wrong == "averages-the-chunks":
            share[part] = of_gradient[part] = 1 / (size * len(parts))
        if wrong == "adds-up-the-chunks-means":
            share[part] = of_gradient[part] = 1 / size
        if wrong == "divides-by-the-chunk":
            of_gradient[part] = 1 / size
    if wrong == "adds-up-all-rows":
        share, of_gradient = share * n, of_gradient * n
    if wrong == "forgets-the-mean-in-the-gradient":
        of_gradient = of_gradient * n
    if wrong == "points-uphill":
        of_gradient = -of_gradient
    of_weight = of_gradient.clone()
    if wrong == "drops-the-last-chunk" and n % chunk:
        share[parts[-1]] = of_gradient[parts[-1]] = of_weight[parts[-1]] = 0
    if wrong == "last-chunk-only":
        share[: parts[-1].start] = of_weight[: parts[-1].start] = 0
    down = weight
    if wrong == "gradient-of-the-teachers-layer":
        down = teacher_weight
        hidden = teacher
    return {
        "loss": float((share * rows).sum()),
        "d_hidden": (of_gradient[:, None] * difference) @ down,
        "d_weight": (of_weight[:, None] * difference).T @ hidden,
    }


# 12. The KL of a row as a kernel

TILE = 16


@exercise(
    "distillation.kl_kernel",
    points=5,
    minutes=40,
    hints=(
        "First write it with two loops: the maxima and totals of both rows, then the sum. Then "
        "one loop: what must be done to total_t and gap when m_t grows? total_s and total_t are "
        "the online softmax of chapter 2.",
        "m_new = tl.maximum(m_t, tl.max(z_t)); shrink = tl.exp(m_t - m_new); e = tl.exp(z_t - "
        "m_new); total_t = total_t * shrink + tl.sum(e); gap = gap * shrink + tl.sum(tl.where(e > "
        "0, e * (z_t - z_s), 0.0)). At the end gap / total_t - (m_t + log total_t) + (m_s + log "
        "total_s).",
    ),
)
def _(kernel):
    expect_kernel("kl_kernel", kernel)
    # n_rows, n_vocab, temperature, added to the logits, teacher's first logits at -inf, masked row
    for what, n_rows, n_vocab, temperature, shift, hidden, masked in [
        ("one tile", 2, 16, 1.0, 0.0, 0, None),
        ("two tiles", 2, 32, 1.0, 0.0, 0, None),
        ("27 tokens at T = 2, row 1 masked", 2, 27, 2.0, 0.0, 0, 1),
        ("logits around 200", 1, 32, 1.0, 200.0, 0, None),
        ("row 1 masked, and NaN", 2, 16, 1.5, torch.nan, 0, 1),
        ("the teacher allows only some tokens", 1, 32, 1.0, 0.0, 9, None),
        ("the teacher's first tile is empty", 1, 40, 1.0, 0.0, 18, None),
    ]:
        inputs = _kl_inputs(n_rows, n_vocab, shift, hidden, masked)
        got = _launch(kernel, what, inputs, temperature)
        student, teacher, mask = inputs
        want = _kl_rows(student, teacher, mask, temperature)
        unwritten = got == UNWRITTEN
        if unwritten.any():
            rows = unwritten.nonzero().flatten().tolist()
            raise NotYet(
                f"{what}: nothing was written for rows {rows}",
                misconception="stores-nothing" if len(rows) == n_rows else "skips-the-masked-row",
                hint="every program ends in tl.store(kl_ptr + row, ..), that of a masked row too: "
                "torch.empty has anything there",
            )
        where = "one row of 4 tokens by hand, in two tiles of 2"
        try:
            expect(f"{what}: KL", got, want.float(), where)
        except NotYet:
            mistakes = [
                (name, _kl_rows(student, teacher, mask, temperature, **change), where_to_look)
                for name, change, where_to_look in KERNEL_MISTAKES
            ]
            expect_or_name(f"{what}: KL", got, want.float(), where, mistakes)


# name, how `_kl_rows` differs, where to look. Those that make NaN or infinity first
KERNEL_MISTAKES = [
    ("nan-times-zero", {"masked": "times"},
     "the logits of a masked row may be NaN, and 0 * NaN is NaN: tl.where(counts, kl, 0.0), or "
     "write 0 and return"),
    ("counts-the-masked-row", {"masked": "ignored"}, "where mask is 0 the result is 0"),
    ("the-other-rows", {"masked": "inverted"}, "mask is 1 for a row that counts"),
    ("nan-from-an-empty-tile", {"nan": "tile"},
     "after a tile of -inf alone m_t is -inf still, and -inf - -inf is NaN: subtract 0 in its "
     "place, tl.where(m_new == -inf, 0.0, m_new)"),
    ("nan-from-nothing", {"nan": "zero"},
     "a token that the teacher forbids has e = 0 and z_t - z_s = -inf, and their product is NaN: "
     "tl.where(e > 0, .., 0.0)"),
    ("subtracts-no-maximum", {"overflow": True},
     "exp(200) is infinity in float32: subtract the running maximum"),
    ("counts-the-padding", {"padding": 0.0},
     "the last tile is shorter, and a masked load gives other=0.0: a logit of 0 has a probability. "
     "Load with other=-float('inf')"),
    ("drops-the-last-tile", {"drop": True},
     "n_vocab is no multiple of TILE: range(0, n_vocab, TILE), and a mask for the last tile"),
    ("reads-the-first-tile-only", {"first": True}, "loop over the tiles of the row"),
    ("everybody-takes-row-0", {"row": 0}, "the row begins at row * n_vocab"),
    ("forgets-to-rescale-the-total", {"rescale": "total"},
     "when m_t grows, what total_t has already was measured against the old one: times "
     "exp(m_t - m_new)"),
    ("forgets-to-rescale-the-gap", {"rescale": "gap"},
     "gap is made of the same exp(z_t - m_t): when m_t grows it shrinks like total_t"),
    ("forgets-to-rescale-the-student", {"rescale": "student"},
     "total_s needs the same care as total_t: times exp(m_s - m_new)"),
    ("keeps-the-last-tile", {"rescale": "last"}, "add what the earlier tiles have given"),
    ("forgets-the-temperature", {"cold": True}, "both logits are divided by temperature"),
    ("multiplies-by-the-temperature", {"invert": True}, "T divides the logits"),
    ("multiplies-by-t-squared", {"square": True},
     "the kernel writes the KL; T^2 is the caller's"),
    ("turns-the-divergence-over", {"reverse": True},
     "KL(teacher || student): the weights are the teacher's"),
    ("forgets-the-denominators", {"formula": "gap"},
     "log p - log q is (z_t - z_s) minus both logarithms of the sums: - lse_t + lse_s"),
    ("forgets-to-divide-by-the-total", {"formula": "undivided"},
     "e is not p yet: gap / total_t"),
    ("swaps-the-denominators", {"formula": "swapped"},
     "log p = z_t - lse_t and log q = z_s - lse_s: the student's is added, the teacher's taken "
     "away"),
    ("forgets-the-maxima", {"formula": "no maxima"},
     "lse = m + log(total): the maximum that was subtracted comes back"),
    ("cross-entropy", {"formula": "cross"},
     "that is -sum p log q; the KL has sum p log p as well"),
    ("in-bits", {"formula": "bits"}, "nats: tl.log, not tl.log2, to match exp"),
]  # fmt: skip

UNWRITTEN = -7.0


def _kl_inputs(
    n_rows: int, n_vocab: int, shift: float, hidden: int, masked: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits (n_rows, n_vocab) float32, mask (n_rows,) int32.

    The largest logit of each is in a late tile, and the two rows' sums differ much.
    """
    rng = torch.Generator().manual_seed(100 * n_rows + n_vocab)
    student, teacher = 1.5 * torch.randn(2, n_rows, n_vocab, generator=rng)
    teacher[:, -2] += 4.0
    student[:, -3] += 3.0
    student[0, 1], teacher[0, 2] = 3.5, 5.0  # row 0 has much in the first tile, too
    mask = torch.ones(n_rows, dtype=torch.int32)
    shifted = slice(None)
    if masked is not None:
        mask[masked], shifted = 0, masked
    student[shifted] += shift
    teacher[shifted] += shift
    teacher[:, :hidden] = -torch.inf
    return student, teacher, mask


def _kl_rows(
    student: Tensor, teacher: Tensor, mask: Tensor, temperature: float, *,
    masked: str = "", nan: str = "", overflow: bool = False, padding: float | None = None,
    drop: bool = False, first: bool = False, row: int | None = None, rescale: str = "",
    cold: bool = False, invert: bool = False, square: bool = False, reverse: bool = False,
    formula: str = "",
) -> Tensor:  # fmt: skip
    """KL of each row in float64; or what comes of a mistake."""
    factor = 1.0 if cold else temperature if invert else 1 / temperature
    rows = []
    for r in range(len(student)):
        z_s, z_t = (x[r if row is None else row].double() for x in (student, teacher))
        n = len(z_s)
        if drop:
            z_s, z_t = (z[: n // TILE * TILE] for z in (z_s, z_t))
        if first:
            z_s, z_t = z_s[:TILE], z_t[:TILE]
        if padding is not None:
            z_s, z_t = (nn.functional.pad(z, (0, -n % TILE), value=padding) for z in (z_s, z_t))
        z_s, z_t = (z_t, z_s) if reverse else (z_s, z_t)
        z_s, z_t = z_s * factor, z_t * factor
        spoilt = {"zero": z_t.isinf().any(), "tile": z_t[:TILE].isinf().all()}.get(nan, False)
        spoilt = spoilt or overflow and max(z_s.max(), z_t.max()) > 88
        rows.append(torch.tensor(torch.nan) if spoilt else _one_kl(z_s, z_t, rescale, formula))
    kl = torch.stack([x.double() for x in rows])
    if square:
        kl = kl * temperature**2
    on = mask.bool()
    if masked == "inverted":
        return torch.where(on, 0.0, kl)
    return {"times": kl * on, "ignored": kl}.get(masked, torch.where(on, kl, 0.0))


def _one_kl(z_s: Tensor, z_t: Tensor, rescale: str, formula: str) -> Tensor:
    """One row, walked in tiles as the kernel should, with a mistake in it."""
    m_s = m_t = torch.tensor(-torch.inf).double()
    total_s = total_t = gap = torch.zeros(()).double()
    for cols in tiles(len(z_s), TILE):
        s, t = z_s[cols], z_t[cols]
        new_s, new_t = torch.maximum(m_s, s.max()), torch.maximum(m_t, t.max())
        base = torch.where(new_t.isinf(), 0.0, new_t)
        shrink_s, shrink_t = (m_s - new_s).exp(), (m_t - base).exp()
        e = (t - base).exp()
        if rescale == "last":
            total_s = total_t = gap = torch.zeros(()).double()
        total_s = total_s * (1.0 if rescale == "student" else shrink_s) + (s - new_s).exp().sum()
        total_t = total_t * (1.0 if rescale == "total" else shrink_t) + e.sum()
        more = torch.where(e > 0, e * (t - s), 0.0).sum()
        gap = gap * (1.0 if rescale == "gap" else shrink_t) + more
        m_s, m_t = new_s, new_t
    lse_s, lse_t = m_s + total_s.log(), m_t + total_t.log()
    mean_gap = gap / total_t
    p = (z_t - lse_t).exp()
    return {
        "gap": mean_gap,
        "undivided": gap - lse_t + lse_s,
        "swapped": mean_gap + lse_t - lse_s,
        "no maxima": mean_gap - total_t.log() + total_s.log(),
        "cross": -torch.where(p > 0, p * (z_s - lse_s), 0.0).sum(),
        "bits": mean_gap - (m_t + total_t.log2()) + (m_s + total_s.log2()),
    }.get(formula, mean_gap - lse_t + lse_s)


def _launch(kernel, what: str, inputs: tuple[Tensor, Tensor, Tensor], temperature: float) -> Tensor:
    """One program a row, on a GPU or in the interpreter."""
    device, (n_rows, n_vocab) = pick_device(), inputs[0].shape
    # each row stands between others: an address that is off a little finds those, and no crash
    student, teacher = (
        torch.stack([torch.full_like(x, torch.nan), x, x.flip(1)]).to(device) for x in inputs[:2]
    )
    kl = torch.full((3, n_rows + n_vocab + TILE), UNWRITTEN, device=device)
    with launched(), warnings.catch_warnings():
        # NaN and infinities are among the inputs, and the interpreter's numpy remarks on each
        warnings.simplefilter("ignore", RuntimeWarning)
        kernel[(n_rows,)](
            student[1], teacher[1], inputs[2].to(device), kl[1], n_vocab, temperature, TILE=TILE
        )
    kl = kl.cpu()
    expect_untouched(
        what, "kl", torch.cat([kl[[0, 2]].flatten(), kl[1, n_rows:]]) != UNWRITTEN,
        "one program writes one number: tl.store(kl_ptr + row, ..)",
        misconception="writes-past-its-rows",
    )  # fmt: skip
    return kl[1, :n_rows]
