"""Students that begin as a part of their teacher: layers left out, neurons cut."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.feed_forward import SwiGLU
from llmopt_lab.nn.transformer import Transformer


def keep_layers(teacher: Transformer, layers: Sequence[int]) -> Transformer:
    """A trainable copy of the teacher with these of its layers, in this order, and all else.

    Raises:
        BadInput: no layer, one that the teacher lacks, or one twice.

    Source: Sanh et al. 2019, DistilBERT, section 3: one layer out of two
    (https://arxiv.org/abs/1910.01108).
    """
    n_layers = teacher.config.n_layers
    require(
        len(layers) > 0 and len(set(layers)) == len(layers)
        and all(0 <= layer < n_layers for layer in layers),
        f"layers must be some of 0 to {n_layers - 1}, each once; got {list(layers)}",
    )  # fmt: skip
    student = Transformer(replace(teacher.config, n_layers=len(layers)), attend=teacher.attend)
    weights = {
        name: weight
        for name, weight in teacher.state_dict().items()
        if not name.startswith("layers.")
    }
    for new, old in enumerate(layers):
        for name, weight in teacher.layers[old].state_dict().items():
            weights[f"layers.{new}.{name}"] = weight
    student.load_state_dict(weights)
    return student.to(teacher.device, teacher.dtype)


@torch.no_grad()
def neuron_importance(teacher: Transformer, batches: Iterable[Tensor]) -> Tensor:
    """Mean size of each feed-forward neuron's activation, (n_layers, d_ff).

    The activation of a neuron is what down_proj multiplies: silu(gate) * up. `batches` are tokens
    (rows, n) int64; a few thousand tokens rank the neurons.

    Source: Muralidharan et al. 2024, Minitron, section 2.1 (https://arxiv.org/abs/2407.14679).
    """
    check_swiglu(teacher)
    totals = [0.0] * teacher.config.n_layers
    n_places = 0
    hooks = [
        block.mlp.down_proj.register_forward_pre_hook(
            lambda _, x, i=i: totals.__setitem__(i, totals[i] + x[0].abs().flatten(0, -2).sum(0))
        )
        for i, block in enumerate(teacher.layers)
    ]
    try:
        for tokens in batches:
            teacher(tokens)
            n_places += tokens.numel()
    finally:
        for hook in hooks:
            hook.remove()
    require(n_places > 0, "there is no batch to rank the neurons on")
    return torch.stack(totals) / n_places


def prune_neurons(teacher: Transformer, importance: Tensor, d_ff: int) -> Transformer:
    """A trainable copy with the `d_ff` most important feed-forward neurons of each layer.

    Args:
        importance: (n_layers, d_ff of the teacher), as `neuron_importance` gives.

    A neuron is a row of gate_proj and up_proj and a column of down_proj; cutting one that is
    always 0 changes nothing.

    Raises:
        BadInput: no SwiGLU layers, a shape that does not fit, or a `d_ff` that is no cut.
    """
    check_swiglu(teacher)
    config = teacher.config
    require(
        tuple(importance.shape) == (config.n_layers, config.d_ff),
        f"importance must be {(config.n_layers, config.d_ff)}; got {tuple(importance.shape)}",
    )
    require(0 < d_ff <= config.d_ff, f"d_ff must be 1 to {config.d_ff}; got {d_ff}")
    student = Transformer(replace(config, d_ff=d_ff), attend=teacher.attend)
    weights = dict(teacher.state_dict())
    for layer, scores in enumerate(importance):
        kept = scores.topk(d_ff).indices.sort().values
        for part, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            name = f"layers.{layer}.mlp.{part}.weight"
            weights[name] = weights[name].index_select(dim, kept.to(weights[name].device))
    student.load_state_dict(weights)
    return student.to(teacher.device, teacher.dtype)


def fresh(config: ModelConfig, seed: int) -> Transformer:
    """A student of random weights whose layers begin as the identity, as the lab models do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(config)
    for block in model.layers:
        for name, weight in block.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                torch.nn.init.zeros_(weight)
    return model


def thawed(model: Transformer) -> Transformer:
    """A trainable copy."""
    return deepcopy(model).requires_grad_()


def check_swiglu(teacher: Transformer) -> None:
    require(
        all(isinstance(block.mlp, SwiGLU) for block in teacher.layers),
        "only SwiGLU layers have neurons to cut; this model has "
        f"{type(teacher.layers[0].mlp).__name__}",
    )
