"""Four ways to say how far a student's distribution is from its teacher's, row by row.

Each takes log-probabilities, teacher first, (.., n_vocab), and gives nats (..), differentiable in
both. A token to which the averaging distribution gives no probability adds nothing.

Sources: Hinton et al. 2015 (forward KL); Gu et al. 2023, MiniLLM (reverse KL); Agarwal et al. 2023,
GKD, section 3 (generalised JSD); Wen et al. 2023, f-distill (total variation).
"""

from math import log

import torch
from torch import Tensor

from llmopt_lab.core.errors import require


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student): the mean over the teacher's tokens of log p - log q.

    Large where the student gives little to what the teacher likes: the student covers all modes.
    """
    p = teacher.exp()
    return (p * (teacher - student).masked_fill(p == 0, 0)).sum(-1)


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(student || teacher): the mean over the student's own tokens of log q - log p.

    Large where the student gives much to what the teacher dislikes: the student seeks one mode.
    """
    return forward_kl(student, teacher)


def jsd(teacher: Tensor, student: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1-beta) q.

    Divided by beta, it tends to the forward KL as beta goes to 0; divided by 1 - beta, to the
    reverse KL as beta goes to 1. It is never above log 2 nats.
    """
    require(0 < beta < 1, f"beta must lie in (0, 1); got {beta}. The ends are the two KLs.")
    middle = torch.logaddexp(teacher + log(beta), student + log(1 - beta))
    return beta * forward_kl(teacher, middle) + (1 - beta) * forward_kl(student, middle)


def total_variation(teacher: Tensor, student: Tensor) -> Tensor:
    """Half of sum |p - q|, no logarithm: 1 minus the chance that speculation keeps a guess."""
    return (teacher.exp() - student.exp()).abs().sum(-1) / 2


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "total_variation": total_variation,
}
