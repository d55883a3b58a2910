"""Expert choice: not the token picks its experts, each expert picks its tokens."""

import torch
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import load, store
from llmopt_lab.core.trace import record
from llmopt_lab.moe.records import ExpertRan, ExpertsChose
from llmopt_lab.moe.reference import check_input, check_routing, highest, router_logits, swiglu


def expert_choice_layer(
    x: Tensor, router: Tensor, w_gate_up: Tensor, w_down: Tensor, *, capacity: int
) -> Tensor:
    """Each expert takes its `capacity` best tokens: the load is even by construction.

    The price: a token may be taken by no expert, or by all; and whether it is taken depends on the
    tokens after it, which no decoder knows while it generates.

    Args:
        x, router, w_gate_up, w_down: as for `moe_layer`.
        capacity: tokens that each expert takes, 1 to n_tokens: capacity_of(.., k, factor=1) gives
            k experts a token on average.

    Returns:
        (n_tokens, d), the dtype of `x`; zeros for a token that nobody took. Weights are the softmax
        over the experts, not renormalised.

    Raises:
        BadInput: as `moe_layer`.

    Source: Zhou et al. 2022, section 3.2 (https://arxiv.org/abs/2202.09368).
    """
    check_input(x, router, w_gate_up, w_down)
    require(
        isinstance(capacity, int) and 1 <= capacity <= len(x),
        f"capacity must lie in [1, n_tokens = {len(x)}]; got {capacity!r}",
    )
    chosen = choose_tokens(router_logits(x, router), capacity)
    record(chosen)
    total = torch.zeros_like(x, dtype=chosen.weights.dtype)                 # float32 or wider
    for expert, tokens in enumerate(chosen.tokens):
        gate_up, down = load("W_gate_up", w_gate_up, expert), load("W_down", w_down, expert)
        y = swiglu(load("X", x, tokens), gate_up, down).to(total.dtype)     # (capacity, d)
        total = total.index_add(0, tokens, chosen.weights[expert, :, None] * y)
        record(ExpertRan(expert, tokens))
    out = torch.empty_like(x)
    store("out", out, slice(0, len(x)), total.to(x.dtype))
    return out


def choose_tokens(logits: Tensor, capacity: int) -> ExpertsChose:
    """The `capacity` tokens of highest score of each expert; of equal ones, the earlier token."""
    check_routing(logits, 1, None, "softmax")
    scores = logits.softmax(1).T                                            # (n_experts, n_tokens)
    tokens = highest(scores, capacity)
    return ExpertsChose(tokens, scores.gather(1, tokens), len(logits))
