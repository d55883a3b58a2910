"""What `llmopt bench distillation` times: our fused loss and its peers, one function each.

Each takes the inputs of a case and gives the call to time: loss, and the gradients of the student's
hidden states and output layer. All minimise T^2 * mean KL(teacher || student).
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt_lab.core.bench import Contender
from llmopt_lab.core.device import gpu_facts
from llmopt_lab.core.errors import Missing

Call = Callable[[], tuple[Tensor, Tensor, Tensor]]
ROWS = 1024  # tokens that the oracle computes at a time


def oracle(hidden, weight, teacher, teacher_weight, temperature) -> Tensor:
    """Loss and both gradients in float64 from their formulas, behind each other as one vector."""
    wide = weight.double()
    loss, d_weight = 0.0, torch.zeros_like(wide)
    d_hidden = []
    for rows, target in zip(hidden.split(ROWS), teacher.split(ROWS), strict=True):
        rows, target = rows.double(), target.double()
        if teacher_weight is not None:
            target = target @ teacher_weight.double().T
        log_q = (rows @ wide.T / temperature).log_softmax(-1)
        log_p = (target / temperature).log_softmax(-1)
        loss += (log_p.exp() * (log_p - log_q)).sum()
        difference = temperature / len(hidden) * (log_q.exp() - log_p.exp())
        d_hidden.append(difference @ wide)
        d_weight += difference.T @ rows
    loss = temperature**2 * loss / len(hidden)
    return torch.cat([loss.view(1), *(x.flatten() for x in d_hidden), d_weight.flatten()])


def _loss_and_gradients(loss_of: Callable[[Tensor, Tensor], Tensor], hidden, weight) -> Call:
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))

    def call():
        loss = loss_of(hidden, weight)
        # in one dtype, whose tolerance the whole result is held to
        return loss.detach().to(hidden.dtype), *torch.autograd.grad(loss, (hidden, weight))

    return call


def ours(hidden, weight, teacher, teacher_weight, temperature) -> Call:
    from llmopt_lab.distillation.kernels import linear_kl_triton

    return _loss_and_gradients(
        lambda h, w: linear_kl_triton(
            h, w, teacher, teacher_weight=teacher_weight, temperature=temperature
        ),
        hidden,
        weight,
    )


def liger(hidden, weight, teacher, teacher_weight, temperature, *, softened: bool) -> Call:
    """Liger's fused_linear_kl_div, which takes the teacher's probabilities.

    softened: they are there before the clock starts; else they are made from logits on the clock.
    """
    try:
        from liger_kernel.ops.fused_linear_kl_div import LigerFusedLinearKLDivFunction
    except ImportError as absent:
        raise Missing("liger-kernel 0.8.5 or newer is not installed") from absent
    if not hidden.is_cuda:
        raise Missing("Liger's kernels need a GPU")

    def probabilities() -> Tensor:
        logits = teacher if teacher_weight is None else teacher @ teacher_weight.T
        # one operator from half precision to half precision, float32 inside
        return torch.softmax(logits * (1 / temperature), dim=-1)

    target = probabilities() if softened else None

    def loss_of(h: Tensor, w: Tensor) -> Tensor:
        p = probabilities() if target is None else target
        loss = LigerFusedLinearKLDivFunction.apply(h, w, p, None, "batchmean", -100, temperature)
        # its backward scales the gradients only if it must
        return loss if temperature == 1 else loss * temperature**2

    return _loss_and_gradients(loss_of, hidden, weight)


def materialised(hidden, weight, teacher, teacher_weight, temperature, *, compiled: bool) -> Call:
    """All logits in memory, the softmax in float32, as a training loop writes it."""
    if compiled and gpu_facts() is None:
        raise Missing("torch.compile is only timed on a GPU here")
    loss = _compiled() if compiled else materialised_loss
    return _loss_and_gradients(
        lambda h, w: loss(h, w, teacher, teacher_weight, temperature), hidden, weight
    )


def materialised_loss(h, w, teacher, teacher_weight, temperature) -> Tensor:
    target = teacher if teacher_weight is None else F.linear(teacher, teacher_weight)
    p = torch.softmax(target.float() / temperature, dim=-1)
    log_q = torch.log_softmax(F.linear(h, w).float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(materialised_loss, dynamic=False)


CONTENDERS = (
    Contender("ours", ours, ours=True),
    Contender("Liger, p ready", partial(liger, softened=True)),
    Contender("Liger, p made", partial(liger, softened=False)),
    Contender("materialised", partial(materialised, compiled=False)),
    Contender("materialised, compiled", partial(materialised, compiled=True)),
)
