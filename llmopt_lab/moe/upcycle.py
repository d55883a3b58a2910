"""Start a mixture from a dense layer; cut experts into finer ones. Neither changes a result.

Sources: Komatsuzaki et al. 2022, sparse upcycling (https://arxiv.org/abs/2212.05055); Dai et al.
2024, DeepSeekMoE, section 3.1 (https://arxiv.org/abs/2401.06066); He et al. 2024, section 3.2
(https://arxiv.org/abs/2410.07524): the start of fine-grained experts.
"""

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.moe.reference import check_input

Weights = tuple[Tensor, Tensor, Tensor]  # router, w_gate_up, w_down, as `moe_layer` takes them


def upcycle(
    gate_up: Tensor, down: Tensor, n_experts: int, *, rng: torch.Generator, std: float = 0.02
) -> Weights:
    """A mixture whose experts are all copies of a dense SwiGLU, and a small random router.

    With k >= 2, where weights sum to 1, it computes what the dense layer computes, and training
    goes on from there: the experts part because they see different tokens.

    Args:
        gate_up: (d, 2 * d_ff), the gate's columns, then the up's.
        down: (d_ff, d).
        n_experts: copies.
        rng: for the router.
        std: of the router's weights.
    """
    require(
        isinstance(n_experts, int) and n_experts > 0,
        f"n_experts must be a positive int; got {n_experts!r}",
    )
    d = gate_up.shape[0] if gate_up.ndim else 0
    router = std * torch.randn(d, n_experts, generator=rng, dtype=gate_up.dtype)
    copies = tuple(w.expand(n_experts, *w.shape).clone() for w in (gate_up, down))
    router = router.to(gate_up.device)
    check_input(gate_up.T[:1], router, *copies)
    return router, *copies


def split_experts(router: Tensor, w_gate_up: Tensor, w_down: Tensor, n_pieces: int) -> Weights:
    """Cut each expert into `n_pieces` experts of d_ff / n_pieces; a token then visits k * n_pieces.

    The pieces of an expert start with the same router column, so they are chosen together, each
    with 1 / n_pieces of the weight, which a larger down projection makes good: with k >= 2 the
    layer computes the same. The work is the same too, but once the columns part there are
    comb(n_experts * n_pieces, k * n_pieces) sets of experts instead of comb(n_experts, k).

    Raises:
        BadInput: as `moe_layer`; d_ff is no multiple of n_pieces.
    """
    check_input(router[:, 0][None], router, w_gate_up, w_down)
    n_experts, d_ff, d = w_down.shape
    require(
        isinstance(n_pieces, int) and n_pieces > 0 and d_ff % n_pieces == 0,
        f"d_ff = {d_ff} must be a multiple of n_pieces; got {n_pieces!r}",
    )
    n, width = n_experts * n_pieces, d_ff // n_pieces
    gate_up = w_gate_up.view(n_experts, d, 2, n_pieces, width).permute(0, 3, 1, 2, 4)
    return (
        router.repeat_interleave(n_pieces, dim=1),
        gate_up.reshape(n, d, 2 * width),
        n_pieces * w_down.reshape(n, width, d),
    )
