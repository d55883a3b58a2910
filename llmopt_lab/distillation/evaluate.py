"""How much of the teacher a student kept, on text that neither was trained on."""

from math import log

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.distillation.divergences import forward_kl, reverse_kl, total_variation
from llmopt_lab.distillation.on_policy import write
from llmopt_lab.distillation.reference import check_same_vocabulary, check_teacher
from llmopt_lab.nn.train import HeldOut, windows
from llmopt_lab.nn.transformer import Transformer


@torch.no_grad()
def retained(
    student: Transformer, teacher: Transformer, held_out: HeldOut, *, context: int, batch: int = 16
) -> dict[str, float]:
    """Both models on the same places of held-out text, and what the student has of the teacher.

    Returns:
        bits_per_byte, accuracy (share of places whose next token is the model's first choice), for
        the student and, with the prefix teacher_, for the teacher; and means over the places:
        kl (forward, nats a token), overlap (sum of min(p, q), the chance that sampled speculation
        keeps a guess), agreement (share of places with the same first choice: greedy speculation).

    Cost: one pass of both models over the text, half of it twice.
    """
    check_same_vocabulary(teacher, student)
    check_teacher(teacher)
    sums: dict[str, float] = {}
    n_places = 0
    todo = list(windows(held_out.tokens, context))
    for i in range(0, len(todo), batch):
        part = todo[i : i + batch]
        tokens = torch.zeros(len(part), context + 1, dtype=torch.int64)
        predicted = torch.zeros(len(part), context, dtype=torch.bool)
        for row, (start, first, end) in enumerate(part):
            text = held_out.tokens[start:end].astype(np.int64)
            tokens[row, : end - start] = torch.from_numpy(text)
            predicted[row, first - start - 1 : end - start - 1] = True
        tokens, predicted = tokens.to(student.device), predicted.to(student.device)
        labels = tokens[:, 1:][predicted]
        p, q = (model(tokens[:, :-1])[predicted].float() for model in (teacher, student))
        for name, value in compare(p, q, labels).items():
            sums[name] = sums.get(name, 0.0) + float(value.double().sum())
        n_places += len(labels)
    n_bytes = sum(held_out.n_bytes)
    result = {}
    for name, value in sums.items():
        if name.endswith("nats"):
            result[name.replace("nats", "bits_per_byte")] = value / log(2) / n_bytes
        else:
            result[name] = value / n_places
    return result


def compare(p: Tensor, q: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What `retained` adds up, from the logits of teacher and student, (rows, n_vocab)."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    first, own = p.argmax(-1), q.argmax(-1)
    return {
        "nats": F.nll_loss(log_q, labels, reduction="none"),
        "teacher_nats": F.nll_loss(log_p, labels, reduction="none"),
        "accuracy": own == labels,
        "teacher_accuracy": first == labels,
        "agreement": own == first,
        "kl": forward_kl(log_p, log_q),
        "overlap": 1 - total_variation(log_p, log_q),
    }


@torch.no_grad()
def own_text(
    student: Transformer,
    teacher: Transformer,
    prompts: Tensor,
    *,
    n_new: int,
    rng: torch.Generator,
    author: str = "student",
) -> dict[str, float]:
    """Student and teacher along a text that one of them writes, sampled at temperature 1.

    Args:
        prompts: (rows, n_prompt) int64, of held-out text.
        author: "student": the text that it will meet at work; "teacher": the text that sampled
            speculation writes, whatever the draft.

    Returns:
        Means over the new tokens: reverse_kl and kl in nats, overlap, agreement, and the teacher's
        nats for the text.
    """
    require(author in ("student", "teacher"), f"author must be student or teacher; got {author!r}")
    check_teacher(teacher)
    model = student if author == "student" else teacher
    tokens = write(model, prompts, n_new=n_new, rng=rng, who=author)
    first = prompts.shape[1] - 1
    sums: dict[str, float] = {}
    for rows in tokens.split(32):
        p, q = (m(rows[:, :-1])[:, first:].float() for m in (teacher, student))
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        labels = rows[:, first + 1 :]
        found = {
            "kl": forward_kl(log_p, log_q),
            "reverse_kl": reverse_kl(log_p, log_q),
            "overlap": 1 - total_variation(log_p, log_q),
            "agreement": (p.argmax(-1) == q.argmax(-1)).double(),
            "teacher_nats": -log_p.gather(-1, labels[..., None])[..., 0],
        }
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + float(value.double().sum())
    return {name: value / (len(tokens) * n_new) for name, value in sums.items()}


def prompts_of(held_out: HeldOut, n_rows: int, n_prompt: int, device: torch.device) -> Tensor:
    """(n_rows, n_prompt) tokens: beginnings of evenly spaced places of the held-out text."""
    starts = np.linspace(0, len(held_out.tokens) - n_prompt - 1, n_rows).astype(np.int64)
    rows = np.stack([held_out.tokens[start : start + n_prompt] for start in starts])
    return torch.from_numpy(rows.astype(np.int64)).to(device)
