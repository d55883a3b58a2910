"""Knowledge distillation in plain PyTorch: soft targets, the loss, its gradient, a quiet teacher.

Rows are places in texts. The logits of a place predict the token after it: with
`logits = model(tokens[:, :-1])` the labels are `tokens[:, 1:]`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmopt_lab.core.errors import require
from llmopt_lab.core.trace import record
from llmopt_lab.distillation.divergences import forward_kl
from llmopt_lab.distillation.records import Compared, Softened
from llmopt_lab.nn.transformer import Transformer

Divergence = Callable[[Tensor, Tensor], Tensor]     # (teacher, student) log-probabilities -> nats


def soft_targets(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(logits / T), (.., n_vocab), float32 or wider: flatter as T grows.

    Raises:
        BadInput: no vocabulary, integers, a temperature that is not positive and finite.
    """
    check_logits("logits", logits)
    check_temperature(temperature)
    p = log_softened(logits, temperature).exp()
    record(Softened(temperature, p))
    return p


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *,
    temperature: float = 3.0, soft_weight: float = 0.7, mask: Tensor | None = None,
    divergence: Divergence = forward_kl,
) -> Tensor:
    """What a student minimises: soft_weight * T^2 * divergence + (1 - soft_weight) * cross-entropy.

    Both parts are means over the rows that count, in nats a token: twice the batch, or twice the
    length, leaves them as they are. Rows that do not count (padding, a prompt) have no influence
    on the value and no gradient.

    Args:
        student_logits: (.., n_vocab), for example (batch, n, n_vocab).
        teacher_logits: the same shape; no gradient goes there.
        labels: (..) int64, the token that each row predicts. Without labels, soft part alone,
            at weight 1.
        temperature: T, of both distributions in the soft part. Labels are met at T = 1.
        soft_weight: from 0 (labels alone) to 1.
        mask: (..) bool, True for rows that count; None: all.
        divergence: `forward_kl`, `reverse_kl`, `jsd`, `total_variation`, or
            divergence(teacher, student) of log-probabilities, giving nats a row.

    Returns:
        A scalar, float32 or wider.

    Raises:
        BadInput: shapes, dtypes or devices that do not fit, other vocabularies, a label out of
            range, a temperature or weight out of its range, no row that counts (the last two by
            value on a CPU only: on a GPU they would wait for the stream).

    The gradient of the soft part under forward KL is T (q - p) / n_rows: the T^2 undoes a 1/T of
    the chain rule and a further 1/T by which p - q shrinks as both flatten.
    Source: Hinton et al. 2015, section 2 (https://arxiv.org/abs/1503.02531).
    """
    check_input(student_logits, teacher_logits, labels, temperature, soft_weight, mask)
    counts = student_logits.new_ones(student_logits.shape[:-1], dtype=torch.bool)
    counts = counts if mask is None else mask
    teacher_logits = teacher_logits.detach()
    rows = soft_rows(student_logits, teacher_logits, temperature, divergence)   # (..)
    soft = temperature**2 * mean_of(rows, counts)
    hard = None if labels is None else mean_of(hard_rows(student_logits, labels), counts)
    total = soft if hard is None else soft_weight * soft + (1 - soft_weight) * hard
    record(Compared(temperature, rows, counts, soft, hard, total))
    return total


def soft_rows(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, divergence: Divergence
) -> Tensor:
    """Nats between the softened distributions of each row, (..); without T^2, nothing checked."""
    return divergence(
        log_softened(teacher_logits, temperature), log_softened(student_logits, temperature)
    )


def hard_rows(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row's label in nats, (..), nothing checked."""
    log_q = log_softened(student_logits, 1.0).flatten(0, -2)                    # (rows, n_vocab)
    return F.nll_loss(log_q, labels.flatten(), reduction="none").view(labels.shape)


def mean_of(rows: Tensor, counts: Tensor) -> Tensor:
    """Mean over the rows where `counts` is True. What does not count may be NaN or infinite."""
    return rows.masked_fill(~counts, 0).sum() / counts.sum().clamp_min(1)


def log_softened(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / T), float32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide / temperature, dim=-1)


def logit_gradient(
    student_logits: Tensor, teacher_logits: Tensor, *,
    temperature: float = 1.0, mask: Tensor | None = None,
) -> Tensor:
    """d(T^2 * mean forward KL) / d(student logits) = T (q - p) / n_rows, 0 where masked.

    In closed form, shaped like the logits. `distillation_loss` without labels has this gradient.
    """
    check_input(student_logits, teacher_logits, None, temperature, 1.0, mask)
    q, p = (log_softened(z, temperature).exp() for z in (student_logits, teacher_logits))
    n_rows = p.shape[:-1].numel() if mask is None else mask.sum().clamp_min(1)
    gradient = temperature * (q - p) / n_rows
    return gradient if mask is None else gradient.masked_fill(~mask[..., None], 0)


# The teacher


def as_teacher(model: nn.Module) -> nn.Module:
    """The same model in evaluation mode, its parameters frozen: what `teacher_logits` wants."""
    return model.eval().requires_grad_(False)


@torch.no_grad()
def teacher_logits(teacher: nn.Module, tokens: Tensor) -> Tensor:
    """teacher(tokens), checked to be the teacher's one answer: no dropout, no gradient.

    Raises:
        BadInput: a part of the teacher is in training mode (with dropout, two calls would differ:
            the student would chase noise), or a parameter wants a gradient.
    """
    check_teacher(teacher)
    return teacher(tokens)


def check_teacher(teacher: nn.Module) -> None:
    """Refuse a teacher that is in training mode anywhere, or that would be trained."""
    noisy = [name or "the model" for name, part in teacher.named_modules() if part.training]
    require(
        not noisy,
        f"the teacher is in training mode ({noisy[0] if noisy else ''}): dropout would change its "
        "answer from call to call. Use as_teacher(model).",
    )
    thawed = [name for name, weight in teacher.named_parameters() if weight.requires_grad]
    require(
        not thawed,
        f"the teacher's {thawed[0] if thawed else ''} requires a gradient: it would be trained, "
        "or its graph kept. Use as_teacher(model).",
    )


def check_same_vocabulary(teacher, student) -> None:
    """Refuse a pair whose token numbers mean different things.

    Args:
        teacher, student: Transformers, or LanguageModels, whose tokenizers are then compared too.

    Two vocabularies of one size can still differ, and then every soft target is about the wrong
    token and nothing fails. Distil such a pair through texts instead: `sequence_level`.
    """
    sizes = [model.config.n_vocab for model in (teacher, student)]
    require(
        sizes[0] == sizes[1],
        f"the teacher has {sizes[0]:,} tokens, the student {sizes[1]:,}: token i of one is not "
        "token i of the other. Take a student with the teacher's tokenizer, or let the student "
        "learn from the teacher's texts (sequence_level).",
    )
    if isinstance(teacher, Transformer) or isinstance(student, Transformer):
        return
    ours, theirs = (model.tokenizer.get_vocab() for model in (teacher, student))
    differ = (token for token, i in ours.items() if theirs.get(token) != i)
    strange = min(differ, key=ours.get, default=None)  # get_vocab has no order of its own
    require(
        strange is None,
        f"the tokenizers differ, for example in {strange!r}: token {ours.get(strange)} of the "
        f"teacher, {theirs.get(strange)} of the student. Let the student learn from the "
        "teacher's texts (sequence_level).",
    )


# Bad input


def check_logits(name: str, logits: Tensor) -> None:
    require(
        logits.dim() >= 1 and logits.numel() > 0 and logits.is_floating_point(),
        f"{name} must be floating point of shape (.., n_vocab), not empty; "
        f"got {logits.dtype} {tuple(logits.shape)}",
    )


def check_temperature(temperature: float) -> None:
    require(
        0 < temperature < math.inf,
        f"temperature must be a positive finite number; got {temperature}",
    )


def check_input(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None,
    temperature: float, soft_weight: float, mask: Tensor | None,
) -> None:
    """Refuse bad input before any work."""
    check_logits("student_logits", student_logits)
    check_logits("teacher_logits", teacher_logits)
    shape = tuple(student_logits.shape)
    require(
        student_logits.shape[-1] == teacher_logits.shape[-1],
        f"student and teacher must share one vocabulary; their logits have {shape[-1]:,} and "
        f"{teacher_logits.shape[-1]:,} tokens. See check_same_vocabulary.",
    )
    require(
        shape == tuple(teacher_logits.shape),
        f"student_logits and teacher_logits must have the same shape; got {shape} and "
        f"{tuple(teacher_logits.shape)}",
    )
    require(
        student_logits.device == teacher_logits.device,
        f"student_logits are on {student_logits.device}, teacher_logits on "
        f"{teacher_logits.device}: move one of them",
    )
    check_temperature(temperature)
    require(0 <= soft_weight <= 1, f"soft_weight must lie in [0, 1]; got {soft_weight}")
    if labels is not None:
        require(
            labels.dtype == torch.int64 and tuple(labels.shape) == shape[:-1],
            f"labels must be int64 of shape {shape[:-1]}, one a row of logits; got {labels.dtype} "
            f"{tuple(labels.shape)}. For logits of tokens[:, :-1] they are tokens[:, 1:].",
        )
        if labels.device.type == "cpu":     # on a GPU this would wait for the stream
            low, high = int(labels.min()), int(labels.max())
            require(
                low >= 0 and high < shape[-1],
                f"labels must lie in [0, {shape[-1]}); got {low} to {high}. Rows without a label "
                "are left out by mask=.",
            )
    if mask is not None:
        require(
            mask.dtype == torch.bool and tuple(mask.shape) == shape[:-1],
            f"mask must be bool of shape {shape[:-1]}, one a row of logits; got {mask.dtype} "
            f"{tuple(mask.shape)}",
        )
        if mask.device.type == "cpu":
            require(bool(mask.any()), "mask leaves no row that counts: the mean has no value")
