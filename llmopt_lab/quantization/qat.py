"""Quantization-aware training: round in the forward pass, pass the gradient straight through."""

from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from llmopt_lab.core.errors import require
from llmopt_lab.nn.transformer import Transformer
from llmopt_lab.quantization.reference import check_weight, choose_scales, code_range, fake_quantize


class FakeQuantize(nn.Module):
    """A weight rounded to `bits` bits and back, in its own dtype.

    Args:
        bits, group_size, symmetric: as for `quantize`.
        straight_through: False is rounding as autograd sees it, to show what it does: round has
            gradient 0, so only the weight that makes the scale learns.

    Source: Bengio et al. 2013, section 4 (https://arxiv.org/abs/1308.3432).
    """

    def __init__(
        self,
        bits: int = 8,
        *,
        group_size: int | None = None,
        symmetric: bool = True,
        straight_through: bool = True,
    ):
        super().__init__()
        check_weight(torch.ones(1, 1), bits, group_size)
        require(
            straight_through or symmetric and group_size is None,
            "without the straight-through estimator there is one symmetric scale a row",
        )
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.straight_through = straight_through

    def forward(self, weight: Tensor) -> Tensor:
        if self.straight_through:
            return fake_quantize(
                weight, bits=self.bits, group_size=self.group_size, symmetric=self.symmetric
            )
        check_weight(weight, self.bits, None)
        scale, _ = choose_scales(weight, self.bits, True)
        return (weight / scale[:, None]).round().clamp(*code_range(self.bits)) * scale[:, None]

    def extra_repr(self) -> str:
        return (
            f"bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric}, "
            f"straight_through={self.straight_through}"
        )


class FakeQuantizedLinear(nn.Linear):
    """nn.Linear that multiplies with its rounded weight and trains the weight behind it."""

    def __init__(self, layer: nn.Linear, fake: FakeQuantize):
        nn.Module.__init__(self)  # the weight is given: no memory, no random numbers
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias, self.fake = layer.weight, layer.bias, fake

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fake(self.weight), self.bias)


def fake_quantized(model: nn.Module, fake: FakeQuantize) -> nn.Module:
    """A trainable copy whose linear layers see their weight through `fake`.

    Of a Transformer, the linear layers of its blocks; embedding and head stay as they are. When it
    has been trained, `quantize_model(model, method="rtn")` with the settings of `fake` is the same
    function in few bits.

    Raises:
        BadInput: there is no linear layer.
    """
    model = deepcopy(model).requires_grad_()
    part = model.layers if isinstance(model, Transformer) else model
    names = [name for name, layer in part.named_modules() if isinstance(layer, nn.Linear)]
    require(len(names) > 0, "there is no linear layer to quantize")
    if names == [""]:
        return FakeQuantizedLinear(part, fake)
    for name in names:
        part.set_submodule(name, FakeQuantizedLinear(part.get_submodule(name), fake))
    return model


def train_quantized(
    model: nn.Module,
    loss_of: Callable[[nn.Module, torch.Generator], Tensor],
    *,
    steps: int,
    lr: float,
    rng: torch.Generator,
    progress: bool = True,
) -> list[float]:
    """Train in place with Adam, the rate falling to 0 along a cosine; return each step's loss.

    Args:
        model: of `fake_quantized`.
        loss_of: loss_of(model, rng) draws a batch with `rng` and returns a scalar.

    Raises:
        BadInput: no steps, a rate that is not positive, nothing to train, or a loss that is NaN.
    """
    require(steps > 0 and lr > 0, f"steps and lr must be positive; got {steps} and {lr}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    require(len(parameters) > 0, "no parameter requires a gradient: model.requires_grad_()")
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in tqdm(range(steps), desc="training", disable=not progress):
        loss = loss_of(model, rng)
        losses.append(loss.item())
        require(losses[-1] < float("inf"), f"the loss is {losses[-1]}: take a smaller lr")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return losses


def next_token_loss(
    tokens: Tensor, *, batch: int
) -> Callable[[Transformer, torch.Generator], Tensor]:
    """A `loss_of` for `train_quantized`: mean nats of `batch` random rows of tokens (n, length)."""
    require(
        tokens.dim() == 2 and tokens.shape[1] > 1 and batch > 0,
        f"tokens must be (n, length) with length > 1; got {tuple(tokens.shape)}",
    )

    def loss_of(model: Transformer, rng: torch.Generator) -> Tensor:
        rows = tokens[torch.randint(len(tokens), (batch,), generator=rng)]
        logits = model(rows[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits, rows[:, 1:].flatten())

    return loss_of
