"""How a language model of llmopt_lab.nn routes a text: its choices, and what its tokens are."""

import keyword
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.trace import Record
from llmopt_lab.nn.feed_forward import MixtureOfExperts, expert_load
from llmopt_lab.nn.transformer import Transformer

CLASSES = ("newline", "indent", "keyword", "word", "number", "punctuation")


@dataclass(frozen=True)
class LayerRouting(Record):
    """What one layer's router chose for every token of a text."""

    layer: int
    experts: Tensor  # (n_tokens, k) int64, best first
    weights: Tensor  # (n_tokens, k)
    n_experts: int

    @property
    def load(self) -> Tensor:
        """Each expert's share of the visits, (n_experts,) float64."""
        return expert_load(self.experts, self.n_experts)

    def __str__(self) -> str:
        load = self.load
        return (
            f"layer {self.layer}: {len(self.experts)} tokens; expert {int(load.argmax())} has most "
            f"visits, {float(load.max()):.1%}, expert {int(load.argmin())} fewest, "
            f"{float(load.min()):.1%}"
        )


@torch.no_grad()
def model_routing(
    model: Transformer, tokens: Tensor, *, window: int | None = None
) -> list[LayerRouting]:
    """What every layer of mixture chose, while the model read `tokens` (n,) int64.

    Args:
        window: tokens read at once, each window from position 0; the model's most if None.

    Raises:
        BadInput: no layer of the model is a mixture; the tokens or the window do not fit.
    """
    mixtures = [(i, b.mlp) for i, b in enumerate(model.layers) if hasattr(b.mlp, "route")]
    require(bool(mixtures), "no layer of this model is a mixture of experts; load lab-moe")
    require(tokens.ndim == 1 and len(tokens) > 0, f"tokens must be (n,); got {tuple(tokens.shape)}")
    window = model.config.max_positions if window is None else window
    require(
        0 < window <= model.config.max_positions,
        f"window must be 1 to {model.config.max_positions}, the model's positions; got {window}",
    )
    chosen = {layer: [] for layer, _ in mixtures}

    def keep(layer: int):
        def hook(mixture: MixtureOfExperts, given: tuple[Tensor], _) -> None:
            chosen[layer].append(mixture.route(given[0][0])[1:])

        return hook

    handles = [mixture.register_forward_hook(keep(layer)) for layer, mixture in mixtures]
    try:
        for part in tokens.split(window):
            model(part[None], last_only=True)
    finally:
        for handle in handles:
            handle.remove()
    return [
        LayerRouting(
            layer,
            torch.cat([experts for _, experts in chosen[layer]]),
            torch.cat([weights for weights, _ in chosen[layer]]),
            mixture.gate.out_features,
        )
        for layer, mixture in mixtures
    ]


@torch.no_grad()
def mixture_input(model: Transformer, tokens: Tensor, *, layer: int) -> Tensor:
    """What the mixture of one layer gets for `tokens` (n,) int64: (n, d_model).

    Raises:
        BadInput: there is no such layer, or it is no mixture.
    """
    layers = model.layers
    require(
        0 <= layer < len(layers) and hasattr(layers[layer].mlp, "route"),
        f"layer must be that of a mixture, one of {len(layers)} layers; got {layer}",
    )
    seen = []
    handle = layers[layer].mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    try:
        model(tokens[None], last_only=True)
    finally:
        handle.remove()
    return seen[0]


def weights_of(mixture: MixtureOfExperts) -> tuple[Tensor, Tensor, Tensor]:
    """router, w_gate_up and w_down of a layer of the model, as `moe_layer` takes them."""
    gate_up = torch.cat([mixture.gate_proj, mixture.up_proj], dim=1).mT.contiguous()
    return mixture.gate.weight.T.contiguous(), gate_up, mixture.down_proj.mT.contiguous()


def token_class(text: str) -> int:
    """The number in CLASSES of a token of Python source, judged by its own text alone."""
    bare = text.strip()
    if not bare:
        return CLASSES.index("newline" if "\n" in text else "indent")
    if keyword.iskeyword(bare):
        return CLASSES.index("keyword")
    if bare.isdecimal():
        return CLASSES.index("number")
    return CLASSES.index("word" if any(c.isalpha() or c == "_" for c in bare) else "punctuation")
