"""The feed-forward layers: SwiGLU, and a mixture of SwiGLU experts as in Mixtral.

Sources: Shazeer 2020 (SwiGLU); Shazeer et al. 2017 (mixture of experts); Fedus et al. 2021 (Switch,
section 2.2: the balance loss); Jiang et al. 2024 (Mixtral, section 2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmopt_lab.nn.config import ModelConfig


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), the same in every layer."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MixtureOfExperts(nn.Module):
    """Each token visits the `top_k` experts of highest probability: a weighted sum of SwiGLUs.

    The weights of all experts stand in one tensor a projection, (n_experts, d_out, d_in). In
    training every expert sees every token and unvisited ones count zero: n_experts / top_k times
    the work, in shapes that do not depend on the routing. In inference an expert sees its visitors
    only.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        n, d_model, d_ff = config.n_experts, config.d_model, config.d_ff
        self.top_k = config.top_k
        self.gate = nn.Linear(d_model, n, bias=False)  # the router
        self.gate_proj = nn.Parameter(torch.empty(n, d_ff, d_model))
        self.up_proj = nn.Parameter(torch.empty(n, d_ff, d_model))
        self.down_proj = nn.Parameter(torch.empty(n, d_model, d_ff))
        for weight in (self.gate_proj, self.up_proj, self.down_proj):
            bound = weight.shape[-1] ** -0.5  # as nn.Linear starts
            nn.init.uniform_(weight, -bound, bound)
        self.balance: Tensor | None = None  # the last forward pass's balance loss, in training

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which experts each token visits.

        Args:
            x: (..., d_model).

        Returns:
            Probabilities of all experts (..., n_experts), in float32 or wider; the weights of the
            visited ones (..., top_k), which sum to 1; their numbers (..., top_k).
        """
        logits = self.gate(x)
        probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        return probabilities, weights / weights.sum(-1, keepdim=True), experts

    def forward(self, x: Tensor) -> Tensor:
        probabilities, weights, experts = self.route(x)
        if self.training:
            self.balance = balance_loss(probabilities, experts)
            return self._all_experts(
                x, torch.zeros_like(probabilities).scatter(-1, experts, weights)
            )
        return self._visited_experts(x, weights, experts)

    def _all_experts(self, x: Tensor, weights: Tensor) -> Tensor:
        """One wide SwiGLU, its hidden units weighted by their expert's share; (..., n_experts)."""
        d_ff = self.gate_proj.shape[1]
        hidden = F.silu(F.linear(x, self.gate_proj.flatten(0, 1)))
        hidden = hidden * F.linear(x, self.up_proj.flatten(0, 1))  # (..., n_experts * d_ff)
        hidden = hidden * weights.to(hidden.dtype).repeat_interleave(d_ff, dim=-1)
        return F.linear(hidden, self.down_proj.transpose(0, 1).flatten(1))

    def _visited_experts(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        rows, out = x.flatten(0, -2), torch.zeros_like(x).flatten(0, -2)
        weights, experts = weights.flatten(0, -2), experts.flatten(0, -2)
        for e in experts.unique().tolist():
            tokens, place = (experts == e).nonzero(as_tuple=True)
            hidden = F.silu(rows[tokens] @ self.gate_proj[e].T) * (rows[tokens] @ self.up_proj[e].T)
            visit = weights[tokens, place, None] * (hidden @ self.down_proj[e].T)
            out.index_add_(0, tokens, visit.to(out.dtype))
        return out.view_as(x)


def balance_loss(probabilities: Tensor, experts: Tensor) -> Tensor:
    """Switch's auxiliary loss: n_experts * sum of (share of visits * mean probability).

    1 when the load is even, up to n_experts when all tokens visit one expert. Only the mean
    probability has a gradient. Hugging Face's Mixtral multiplies by top_k as well.

    Args:
        probabilities: (..., n_experts), of the router.
        experts: (..., top_k) int64, the visited ones.
    """
    n_experts = probabilities.shape[-1]
    share = expert_load(experts, n_experts).to(probabilities.dtype)
    return n_experts * (share * probabilities.flatten(0, -2).mean(0)).sum()


def expert_load(experts: Tensor, n_experts: int) -> Tensor:
    """Each expert's share of all visits, (n_experts,) float64, summing to 1."""
    ids = torch.arange(n_experts, device=experts.device)
    return (experts.flatten()[:, None] == ids).sum(0).double() / experts.numel()
