"""Learning from the inside of a teacher: its hidden states and attention scores, layer by layer.

Source: Jiao et al. 2019, TinyBERT, section 3 (https://arxiv.org/abs/1909.10351).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmopt_lab.core.errors import require
from llmopt_lab.distillation.reference import check_teacher
from llmopt_lab.nn.transformer import Transformer, causal_attention, rope_tables


@dataclass(frozen=True)
class LayerStates:
    """What a model computes on the way."""

    hidden: tuple[Tensor, ...]  # n_layers + 1 of (rows, n, d_model): the embeddings, each layer
    scores: tuple[Tensor, ...]  # n_layers of (rows, n_heads, n, n): scaled dot products, unmasked


def layer_states(model: Transformer, tokens: Tensor) -> LayerStates:
    """Hidden states and attention scores of every layer on tokens (rows, n) int64.

    Cost: one pass, and n_layers * n_heads * n^2 scores a row in memory: short texts only.
    """
    scores = []

    def attend(q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float) -> Tensor:
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores.append(scale * q @ keys.mT)
        return causal_attention(q, k, v, layer=layer, scale=scale)

    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    cos, sin = rope_tables(model.config, positions, model.dtype)
    hidden = [model.embed_tokens(tokens)]
    for block in model.layers:
        hidden.append(block(hidden[-1], cos, sin, attend))
    return LayerStates(tuple(hidden), tuple(scores))


def layer_map(n_student: int, n_teacher: int) -> tuple[int, ...]:
    """The teacher's layer, counted from 1, that each layer of the student learns from: evenly
    spaced, the last from the last (TinyBERT's uniform strategy)."""
    require(
        0 < n_student <= n_teacher,
        f"a student has 1 to {n_teacher} layers, the teacher's number; got {n_student}",
    )
    return tuple(round(m * n_teacher / n_student) for m in range(1, n_student + 1))


class LayerLoss(nn.Module):
    """Mean squared distance from the teacher's embeddings, hidden states and attention scores.

    Hidden states of another width meet after a learned projection, which is part of this module,
    is trained with the student, and is thrown away afterwards. Scores are compared before the
    softmax, where a place may look (TinyBERT found that faster than after it), so both models need
    as many heads.

    Args:
        student, teacher: for their sizes.
        attention: False: compare no scores (other numbers of heads).
        rng: draws the projections.

    Source: TinyBERT, equations 7 to 9; one projection for the layers, one for the embeddings.
    """

    def __init__(
        self,
        student: Transformer,
        teacher: Transformer,
        *,
        attention: bool = True,
        rng: torch.Generator | None = None,
    ):
        super().__init__()
        small, large = student.config, teacher.config
        require(
            not attention or small.n_heads == large.n_heads,
            f"the student has {small.n_heads} heads, the teacher {large.n_heads}: there is no pair "
            "for each. Use attention=False.",
        )
        self.layers = layer_map(small.n_layers, large.n_layers)
        self.attention = attention
        size = small.d_model**-0.5
        for name in ("of_embeddings", "of_layers"):
            start = torch.randn(large.d_model, small.d_model, generator=rng) * size
            if small.d_model == large.d_model:
                start = torch.eye(large.d_model)  # nothing to translate yet
            weight = nn.Parameter(start.to(student.device, student.dtype))
            self.register_parameter(name, weight)  # (d_teacher, d_student)

    def forward(self, student: Transformer, teacher: Transformer, tokens: Tensor) -> dict:
        """ "embeddings", "hidden" and, with attention, "scores": scalars, means over elements.

        tokens: (rows, n) int64. Raises BadInput if the teacher is in training mode.
        """
        check_teacher(teacher)
        own = layer_states(student, tokens)
        with torch.no_grad():
            goal = layer_states(teacher, tokens)
        losses = {
            "embeddings": squared(own.hidden[0] @ self.of_embeddings.T, goal.hidden[0]),
            "hidden": sum(
                squared(own.hidden[m] @ self.of_layers.T, goal.hidden[g])
                for m, g in enumerate(self.layers, start=1)
            ),
        }
        if self.attention:
            n = tokens.shape[1]
            seen = torch.ones(n, n, dtype=torch.bool, device=tokens.device).tril()
            losses["scores"] = sum(
                squared(own.scores[m][..., seen], goal.scores[g - 1][..., seen])
                for m, g in enumerate(self.layers)
            )
        return losses


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference."""
    return (a - b).square().mean()
