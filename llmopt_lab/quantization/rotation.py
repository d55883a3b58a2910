"""Rotations: turn what a layer reads so that no channel is loud, and its weights back.

(x Q) (W Q)^T = x W^T for any orthogonal Q. A random Hadamard matrix mixes all channels with equal
weights, so an outlier is shared out among them all.
"""

from copy import deepcopy
from functools import cache

import torch
from torch import Tensor, nn

from llmopt_lab.core.errors import require
from llmopt_lab.nn.transformer import RMSNorm, Transformer

IN_BLOCK = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


class RotatedInput(nn.Module):
    """Turn x before `inner` reads it: x (.., d) Q. The one rotation that no weight can absorb.

    Cost: d^2 multiply-adds a token here; d log2(d) with a fast Hadamard transform.
    """

    def __init__(self, inner: nn.Module, q: Tensor):
        super().__init__()
        self.inner = inner
        self.register_buffer("q", q)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x @ self.q)


@cache
def hadamard(n: int) -> Tensor:
    """A matrix (n, n) float64 of 1 and -1 whose rows are orthogonal.

    Sylvester's doubling of Paley's matrix of order q + 1, q a prime of the form 4k + 3, or of 1.

    Raises:
        BadInput: neither reaches n.
    """
    require(isinstance(n, int) and n > 0, f"n must be a positive int; got {n!r}")
    small = n
    while small > 2 and not _is_paley(small) and small % 2 == 0:
        small //= 2
    require(
        small <= 2 or _is_paley(small),
        f"no Hadamard matrix of order {n} here: n must be 2^k or 2^k (q + 1), q a prime 4j + 3",
    )
    doubling = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if small <= 2:
        matrix = doubling[:small, :small]
    else:
        q = small - 1
        squares = {i * i % q for i in range(1, q)}
        residue = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)])
        at = torch.arange(q)
        matrix = torch.ones(small, small, dtype=torch.float64)
        matrix[1:, 0] = -1
        matrix[1:, 1:] = residue[(at[None] - at[:, None]) % q].double() + torch.eye(q).double()
    while len(matrix) < n:
        matrix = torch.kron(doubling, matrix)
    return matrix


def _is_paley(n: int) -> bool:
    q = n - 1
    return q % 4 == 3 and all(q % d for d in range(2, int(q**0.5) + 1))


def random_hadamard(n: int, rng: torch.Generator) -> Tensor:
    """An orthogonal (n, n) float64: a Hadamard matrix over sqrt(n), its rows' signs drawn."""
    signs = torch.randint(2, (n,), generator=rng, device=rng.device).double() * 2 - 1
    return signs.cpu()[:, None] * hadamard(n) / n**0.5


@torch.no_grad()
def rotated(
    model: Transformer, *, rng: torch.Generator, heads: bool = True, online: bool = False
) -> Transformer:
    """The same function with turned weights, easier to round. `model` is not changed.

    The scales of all norms are folded into the layers that read them. Then the residual stream is
    turned: what writes to it (embedding, o_proj, down_proj) by Q, what reads it by Q again. An
    RMSNorm without a scale commutes with Q.

    Args:
        model: with SwiGLU feed-forward layers.
        rng: draws the signs of the Hadamard matrices.
        heads: turn the value channels of each head too, in v_proj and o_proj.
        online: turn the input of down_proj as well. No weight before it can take that rotation
            over (its input is a product of two layers), so it costs time in every step.

    Returns:
        A model with a head of its own: it no longer equals the embedding. Logits are those of
        `model` up to rounding in its dtype; the products here are made in float64.

    Raises:
        BadInput: experts, or a width that `hadamard` does not know.

    Cost: d_model multiply-adds for each weight, once.
    Sources: Ashkboos et al. 2024, QuaRot, section 4 (https://arxiv.org/abs/2404.00456); Liu et al.
    2024, SpinQuant, section 3, R1 and R2 of `heads`, R4 of `online`
    (https://arxiv.org/abs/2405.16406), which trains the rotations that are random here.
    """
    config = model.config
    require(
        all(
            isinstance(block.get_submodule(name), nn.Linear)
            for block in model.layers
            if config.n_experts is None
            for name in IN_BLOCK
        )
        and config.n_experts is None,
        "rotated needs a model with float SwiGLU layers: no experts, and not quantized yet",
    )
    device = model.device
    turn = random_hadamard(config.d_model, rng).to(device)
    turn_head = random_hadamard(config.d_head, rng).to(device) if heads else None
    turn_hidden = random_hadamard(config.d_ff, rng).to(device) if online else None
    result = deepcopy(model)
    head = result.embed_tokens if result.lm_head is None else result.lm_head
    result.lm_head = nn.Linear(config.d_model, config.n_vocab, bias=False, device=device)
    result.lm_head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    _absorb(result.norm, [result.lm_head])
    _turn_inputs([result.lm_head], turn)
    _set(result.embed_tokens, "weight", result.embed_tokens.weight.double() @ turn)
    for block in result.layers:
        q, k, v, o, gate, up, down = (block.get_submodule(name) for name in IN_BLOCK)
        _absorb(block.input_layernorm, [q, k, v])
        _absorb(block.post_attention_layernorm, [gate, up])
        _turn_inputs([q, k, v, gate, up], turn)
        for layer in (o, down):  # outputs: rows of the weight
            _set(layer, "weight", turn.T @ layer.weight.double())
            if layer.bias is not None:
                _set(layer, "bias", layer.bias.double() @ turn)
        if turn_head is not None:
            per_head = v.weight.double().unflatten(0, (-1, config.d_head))
            _set(v, "weight", (turn_head.T @ per_head).flatten(0, 1))
            if v.bias is not None:
                bias = v.bias.double().unflatten(0, (-1, config.d_head))
                _set(v, "bias", (bias @ turn_head).flatten())
            by_head = o.weight.double().unflatten(1, (-1, config.d_head))
            _set(o, "weight", (by_head @ turn_head).flatten(1))
        if turn_hidden is not None:
            _turn_inputs([down], turn_hidden)
            block.mlp.down_proj = RotatedInput(down, turn_hidden.to(model.dtype))
    return result


def _absorb(norm: RMSNorm, layers: list[nn.Linear]) -> None:
    """Move a norm's scale into the layers that read it."""
    for layer in layers:
        _set(layer, "weight", layer.weight.double() * norm.weight.double())
    _set(norm, "weight", torch.ones_like(norm.weight, dtype=torch.float64))


def _turn_inputs(layers: list[nn.Linear], turn: Tensor) -> None:
    for layer in layers:
        _set(layer, "weight", layer.weight.double() @ turn)


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    """A new parameter in the dtype of the old: a tied tensor is left as it is."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))
