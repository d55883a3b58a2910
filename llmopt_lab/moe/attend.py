"""A language model of llmopt_lab.nn whose mixtures of experts run on the kernels.

model = use_kernels(load("lab-moe", device="cuda").model)
"""

import torch
from torch import Tensor, nn

from llmopt_lab.core.errors import require
from llmopt_lab.nn.feed_forward import MixtureOfExperts
from llmopt_lab.nn.transformer import Transformer


class PackedExperts(nn.Module):
    """A mixture's weights in the layout of the kernels, for inference."""

    def __init__(self, mixture: MixtureOfExperts):
        super().__init__()
        self.top_k = mixture.top_k
        gate_up = torch.cat([mixture.gate_proj.detach(), mixture.up_proj.detach()], dim=1)
        self.register_buffer("router", mixture.gate.weight.detach().T.contiguous())
        self.register_buffer("w_gate_up", gate_up.mT.contiguous())
        self.register_buffer("w_down", mixture.down_proj.detach().mT.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """(.., d_model) to the same."""
        from llmopt_lab.moe.kernels import moe_layer_triton

        rows = x.flatten(0, -2)
        y = moe_layer_triton(rows, self.router, self.w_gate_up, self.w_down, k=self.top_k)
        return y.view_as(x)


def use_kernels(model: Transformer) -> Transformer:
    """Let every mixture of experts of `model` run on the kernels from now on; returns `model`.

    Raises:
        BadInput: there is no mixture, or one visits a single expert (the model gives it weight 1,
            the kernels its probability). No layer is changed then.

    Cost: the experts' weights are copied into the kernels' layout, one layer at a time.
    """
    blocks = [block for block in model.layers if isinstance(block.mlp, MixtureOfExperts)]
    require(len(blocks) > 0, "the model has no mixture of experts")
    for block in blocks:
        require(block.mlp.top_k > 1, "top_k must be 2 or more; got 1")
    for block in blocks:
        block.mlp = PackedExperts(block.mlp)
    return model
