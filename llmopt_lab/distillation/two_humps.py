"""One hump fitted to two: what a student does when it cannot have all of its teacher.

The forward KL covers both humps and everything between them, the reverse KL seeks one.
"""

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.trace import record
from llmopt_lab.distillation.divergences import forward_kl
from llmopt_lab.distillation.records import Fitted
from llmopt_lab.distillation.reference import Divergence

PLACES = 81


def two_humps(distance: float = 6.0, share: float = 0.6) -> Tensor:
    """Log-probabilities of PLACES places, evenly from -10 to 10: humps of width 0.7, `distance`
    apart, the left one with `share` of the mass."""
    require(0 < share < 1, f"share must lie in (0, 1); got {share}")
    left, right = (hump(torch.tensor(m), torch.tensor(0.7)) for m in (-distance / 2, distance / 2))
    return (share * left.exp() + (1 - share) * right.exp()).log()


def hump(mean: Tensor, width: Tensor) -> Tensor:
    """Log-probabilities (PLACES,) of a normal distribution cut to the places."""
    x = places().to(mean)
    return (-((x - mean) ** 2) / (2 * width**2)).log_softmax(0)


def places() -> Tensor:
    """(PLACES,) float64."""
    return torch.linspace(-10, 10, PLACES, dtype=torch.float64)


def fit_one_hump(
    teacher: Tensor,
    divergence: Divergence = forward_kl,
    *,
    mean: float = 0.5,
    width: float = 1.0,
    steps: int = 200,
    lr: float = 0.1,
) -> tuple[float, float]:
    """Mean and width of the hump nearest to `teacher` (PLACES,) log-probabilities, by Adam.

    Starts from `mean` and `width`; a divergence with several minima ends in one of them.

    Raises:
        BadInput: a teacher of another size, no steps, a width or rate that is not positive.
    """
    require(
        tuple(teacher.shape) == (PLACES,),
        f"teacher must be ({PLACES},) log-probabilities; got {tuple(teacher.shape)}",
    )
    require(
        steps > 0 and width > 0 and lr > 0,
        f"steps, width and lr must be positive; got {steps}, {width} and {lr}",
    )
    teacher = teacher.double()
    # the width as its logarithm: it stays positive
    student = torch.tensor([mean, width], dtype=torch.float64)
    student[1].log_()
    student.requires_grad_()
    optimizer = torch.optim.Adam([student], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        q = hump(student[0], student[1].exp())
        loss = divergence(teacher, q)
        middle, spread = student[0].item(), student[1].exp().item()
        record(Fitted(step, middle, spread, loss.item(), places(), teacher.exp(), q.exp()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    mean, width = student.detach()
    return mean.item(), width.exp().item()
