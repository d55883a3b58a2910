"""Keep all experts busy: a loss, a bias, and how to see whether it works.

`balance_loss` (Switch) and `expert_load` are those of the language model, llmopt_lab.nn.
"""

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.nn.feed_forward import balance_loss, expert_load

__all__ = ["balance_loss", "expert_load", "max_violation", "moved_bias", "z_loss"]


def z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2: keeps the router's logits small. Differentiable.

    Softmax does not change when all logits grow by the same amount, but float32 loses digits.

    Args:
        logits: (n_tokens, n_experts).

    Source: Zoph et al. 2022, ST-MoE, equation 5 (https://arxiv.org/abs/2202.08906), there times
    0.001.
    """
    require(
        logits.ndim == 2 and logits.numel() > 0,
        f"logits must be (n_tokens, n_experts) and not empty; got {tuple(logits.shape)}",
    )
    return logits.logsumexp(1).square().mean()


@torch.no_grad()
def moved_bias(bias: Tensor, experts: Tensor, *, rate: float = 1e-3) -> Tensor:
    """The bias after a step: `rate` more for experts below the mean load, `rate` less above it.

    Without a loss nothing pulls the router's gradient away from its task.

    Args:
        bias: (n_experts,), as `route` takes it.
        experts: (n_tokens, k), who was visited in this step.
        rate: how far a bias moves; scores lie in [0, 1].

    Source: Wang et al. 2024, Algorithm 1 (https://arxiv.org/abs/2408.15664).
    """
    require(
        bias.ndim == 1 and experts.ndim == 2 and experts.numel() > 0,
        "bias must be (n_experts,) and experts (n_tokens, k), not empty; got "
        f"{tuple(bias.shape)} and {tuple(experts.shape)}",
    )
    require(rate > 0, f"rate must be positive; got {rate}")
    load = expert_load(experts, len(bias))
    # visits are counted in whole numbers: an even load moves nothing
    above = (load * experts.numel()).round() * len(bias) - experts.numel()
    return bias - rate * above.sign().to(bias.dtype)


def max_violation(load: Tensor) -> float:
    """How much more than the mean the busiest expert has: 0 is even, n_experts - 1 is collapse.

    Args:
        load: (n_experts,), visits or shares.

    Source: Wang et al. 2024, equation 4.
    """
    require(
        load.ndim == 1 and float(load.sum()) > 0,
        f"load must be (n_experts,) and not all zero; got {tuple(load.shape)}",
    )
    return float(load.max() * len(load) / load.sum() - 1)
