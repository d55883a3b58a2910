"""Sequence-level distillation: the student learns the teacher's texts as if they were data.

All that is needed of the teacher is text, so it may have another vocabulary, or be a service.
A teacher's worked-out answers (reasoning traces) are such texts; `keep` leaves out the wrong ones.

Source: Kim and Rush 2016, section 3.2 (https://arxiv.org/abs/1606.07947).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.distillation.on_policy import write
from llmopt_lab.distillation.reference import check_teacher, hard_rows, mean_of
from llmopt_lab.nn.generate import generate
from llmopt_lab.nn.transformer import Transformer
from llmopt_lab.nn.weights import LanguageModel


def teacher_texts(
    teacher: Transformer,
    prompts: Tensor,
    *,
    n_new: int,
    temperature: float = 0.0,
    rng: torch.Generator | None = None,
) -> Tensor:
    """Prompts (rows, n_prompt) and what the teacher makes of them, (rows, n_prompt + n_new).

    Greedy by default: its most likely text, as far as greedy search finds it (the paper takes beam
    search's best). At a temperature above 0 samples, which need `rng` on the teacher's device.
    """
    check_teacher(teacher)
    return write(teacher, prompts, n_new=n_new, temperature=temperature, rng=rng, who="teacher")


def texts_for(
    teacher: LanguageModel,
    student: LanguageModel,
    prompts: Sequence[str],
    *,
    n_new: int,
    keep: Callable[[str], bool] = lambda text: True,
) -> list[Tensor]:
    """The teacher's greedy continuations in the student's tokens, whatever the teacher's are.

    Args:
        prompts: texts.
        n_new: tokens of the teacher that it adds to each.
        keep: (prompt and continuation) -> whether to learn from it, such as a checker of answers.

    Returns:
        One (n,) int64 tensor for each text that was kept.
    """
    require(len(prompts) > 0, "there is no prompt")
    rows = []
    for prompt in prompts:
        tokens = teacher.encode(prompt)
        new = generate(teacher.model, tokens, n_new, eos=teacher.eos)[len(tokens) :]
        text = prompt + teacher.decode(new, skip_special_tokens=True)
        if keep(text):
            rows.append(student.encode(text))
    return rows


def text_loss(student: Transformer, tokens: Tensor, n_given: int = 1) -> Tensor:
    """Mean cross-entropy of tokens[:, n_given:] (rows, n) in nats: what sequence level minimises.

    `n_given` tokens of each row are the prompt, at least 1.
    """
    require(
        tokens.dim() == 2 and 1 <= n_given < tokens.shape[1],
        f"tokens must be (rows, n) with n above n_given = {n_given} >= 1; got "
        f"{tuple(tokens.shape)}",
    )
    rows = hard_rows(student(tokens[:, :-1]), tokens[:, 1:])
    place = torch.arange(rows.shape[1], device=tokens.device)
    return mean_of(rows, (place >= n_given - 1).expand(rows.shape))
