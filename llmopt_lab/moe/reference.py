"""A mixture of experts in plain PyTorch: route, group, run each expert once, combine."""

from dataclasses import replace
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt_lab.core.errors import require
from llmopt_lab.core.memory import ceil_div, load, store
from llmopt_lab.core.trace import record
from llmopt_lab.moe.records import NOBODY, Combined, ExpertRan, Grouping, Overflowed, Routing


def moe_layer(
    x: Tensor, router: Tensor, w_gate_up: Tensor, w_down: Tensor, *, k: int,
    capacity: int | None = None, bias: Tensor | None = None, score: str = "softmax",
    shared: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """sum over each token's k best experts of weight * down(silu(gate(x)) * up(x)). Differentiable.

    Args:
        x: tokens, (n_tokens, d).
        router: (d, n_experts).
        w_gate_up: of every expert, (n_experts, d, 2 * d_ff): the gate's columns, then the up's.
        w_down: of every expert, (n_experts, d_ff, d).
        k: experts a token visits.
        capacity: visits that an expert takes, `capacity_of(..)`; None takes all (dropless).
        bias, score: as for `route`.
        shared: gate_up (d, 2 * d_shared) and down (d_shared, d) of an expert that every token
            visits with weight 1.

    Returns:
        (n_tokens, d), the dtype of `x`; zeros for a token whose visits were all dropped. The
        caller's residual stream carries such a token on.

    Raises:
        BadInput: shapes, dtypes or devices do not fit, something is empty, k or capacity is out of
            range, or a token's logits are NaN or infinite.

    Cost: 6 * d * d_ff operations a visit. Memory traffic: `sizes.layer_traffic`, exactly. The
    weights of an expert are read once however many tokens visit it, and not at all if none does.
    Source: Jiang et al. 2024, section 2 (https://arxiv.org/abs/2401.04088); capacity: Fedus et al.
    2021, section 2.2 (https://arxiv.org/abs/2101.03961); bias, shared: DeepSeek-AI 2024, section
    2.1.2 (https://arxiv.org/abs/2412.19437).
    """
    check_input(x, router, w_gate_up, w_down, shared)
    routing = route(router_logits(x, router), k, bias=bias, score=score)
    record(routing)
    if capacity is not None:
        routing = drop_overflow(routing, capacity)
    out = visit_experts(x, routing, w_gate_up, w_down)
    if shared is not None:
        gate_up, down = (load("W_shared", w, slice(0, len(w))) for w in shared)
        out = out + swiglu(load("X", x, slice(0, len(x))), gate_up, down)
    return out


def router_logits(x: Tensor, router: Tensor) -> Tensor:
    """x @ router, (n_tokens, n_experts), multiplied and added in float32 or wider.

    In bfloat16 near ties are decided by rounding: another expert, not a slightly other result.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, router = load("X", x, slice(0, len(x))), load("router", router, slice(0, len(router)))
    return x.to(wide) @ router.to(wide)


def route(
    logits: Tensor, k: int, *, bias: Tensor | None = None, score: str = "softmax",
    renormalise: bool | None = None,
) -> Routing:
    """The k experts of highest score; of equal scores, the one of the lowest number.

    Args:
        logits: (n_tokens, n_experts), float32 or wider.
        k: 1 to n_experts.
        bias: (n_experts,), added to the scores to choose the experts and for nothing else.
        score: "softmax" over all experts, or "sigmoid" of each (DeepSeek-V3).
        renormalise: divide the k chosen scores by their sum. If None, for k >= 2 only: with k = 1
            the weight would always be 1, and the router would get no gradient.

    Raises:
        BadInput: as `moe_layer`.

    With softmax and `renormalise` the weights are the softmax over the k chosen logits alone.
    Source: Mixtral, section 2; k = 1: Switch, section 2.1; bias: Wang et al. 2024, section 3
    (https://arxiv.org/abs/2408.15664).
    """
    check_routing(logits, k, bias, score)
    scores = logits.softmax(1) if score == "softmax" else logits.sigmoid()
    experts = highest(scores if bias is None else scores + bias, k)         # (n_tokens, k)
    weights = scores.gather(1, experts)
    if k > 1 if renormalise is None else renormalise:
        tiny = torch.finfo(weights.dtype).tiny      # a bias may choose scores of 0
        weights = weights / weights.sum(1, keepdim=True).clamp_min(tiny)
    return Routing(experts, weights, scores)


def highest(scores: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row, (rows, k), largest first; of equal ones, the lower."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k]  # topk: ties at random


def capacity_of(n_tokens: int, n_experts: int, k: int, factor: float) -> int:
    """ceil(factor * n_tokens * k / n_experts): `factor` 1 is just enough for an even load."""
    sizes = {"n_tokens": n_tokens, "n_experts": n_experts, "k": k, "factor": factor}
    for name, size in sizes.items():
        require(size > 0, f"{name} must be positive; got {size}")
    share = Fraction(str(factor)) * n_tokens * k / n_experts                # 1.1 is 11/10 here
    return ceil_div(share.numerator, share.denominator)


def drop_overflow(routing: Routing, capacity: int) -> Routing:
    """Drop the visits that come to an expert after its first `capacity` ones.

    All first choices come before all second choices, and among these the tokens in order.
    Source: Lepikhin et al. 2020, GShard, Algorithm 1 (https://arxiv.org/abs/2006.16668).
    """
    require(
        isinstance(capacity, int) and capacity > 0,
        f"capacity must be a positive int; got {capacity!r}. Use capacity_of, or None for all",
    )
    n_tokens, k = routing.experts.shape
    in_turn = routing.experts.T.reshape(-1, 1)                              # (n_visits, 1)
    queue = group(in_turn, routing.scores.shape[1])
    before_me = queue.place - queue.starts[in_turn.flatten()]               # (n_visits,)
    full = (before_me >= capacity).view(k, n_tokens).T                      # (n_tokens, k)
    tokens, choices = full.nonzero(as_tuple=True)
    record(Overflowed(capacity, tokens, choices, routing.experts[tokens, choices]))
    experts = routing.experts.masked_fill(full, NOBODY)
    return replace(routing, experts=experts, weights=routing.weights.masked_fill(full, 0))


def group(experts: Tensor, n_experts: int) -> Grouping:
    """Sort the visits of `experts`, (n_tokens, k), by expert; an expert's visits stay in order."""
    visits = experts.flatten()
    order = visits.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    starts = (visits - NOBODY).bincount(minlength=n_experts + 1).cumsum(0)  # dropped ones first
    return Grouping(order, place, starts)


def visit_experts(x: Tensor, routing: Routing, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """Run every expert once on all its visitors, and sum each token's results: (n_tokens, d)."""
    grouping = group(routing.experts, len(w_gate_up))
    record(grouping)
    k = routing.experts.shape[1]
    y = x.new_empty(len(grouping.order), x.shape[1])        # one row a visit, in sorted order
    starts = grouping.starts.tolist()
    for expert, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        if start == end:
            continue                                        # nobody came: its weights stay unread
        tokens = grouping.order[start:end] // k                             # (n,)
        gate_up, down = load("W_gate_up", w_gate_up, expert), load("W_down", w_down, expert)
        store("Y", y, slice(start, end), swiglu(load("X", x, tokens), gate_up, down))
        record(ExpertRan(expert, tokens))
    return combine(x, routing, grouping, y)


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert on x (n, d): gate_up (d, 2 * d_ff), down (d_ff, d)."""
    gate, up = (x @ gate_up).chunk(2, dim=-1)                               # (n, d_ff) both
    return (F.silu(gate) * up) @ down


def combine(x: Tensor, routing: Routing, grouping: Grouping, y: Tensor) -> Tensor:
    """Each token fetches its visits' rows of `y` (n_visits, d) by the inverse permutation."""
    total = torch.zeros_like(x, dtype=routing.weights.dtype)                # float32 or wider
    place = grouping.place.view_as(routing.experts)
    for choice in range(place.shape[1]):
        kept = (routing.experts[:, choice] != NOBODY).nonzero()[:, 0]       # (n_kept,)
        row = load("Y", y, place[kept, choice]).to(total.dtype)             # (n_kept, d)
        total = total.index_add(0, kept, routing.weights[kept, choice, None] * row)
    out = torch.empty_like(x)
    store("out", out, slice(0, len(x)), total.to(x.dtype))
    record(Combined(out))
    return out


def check_input(
    x: Tensor, router: Tensor, w_gate_up: Tensor, w_down: Tensor,
    shared: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Refuse bad input before any work."""
    given = {"x": x, "router": router, "w_gate_up": w_gate_up, "w_down": w_down}
    for name, tensor, shape in zip(
        given, given.values(),
        ("(n_tokens, d)", "(d, n_experts)", "(n_experts, d, 2 * d_ff)", "(n_experts, d_ff, d)"),
        strict=True,
    ):
        require(
            tensor.ndim == shape.count(",") + 1 and tensor.numel() > 0,
            f"{name} must be {shape} and not empty; got {tuple(tensor.shape)}",
        )
    (d, n_experts), d_ff = router.shape, w_down.shape[1]
    wanted = {"x": (len(x), d), "w_gate_up": (n_experts, d, 2 * d_ff),
              "w_down": (n_experts, d_ff, d)}
    if shared is not None:
        given |= {"shared[0]": shared[0], "shared[1]": shared[1]}
        d_shared = shared[1].shape[0] if shared[1].ndim else 0
        require(d_shared > 0, f"shared[1] must be (d_shared, d); got {tuple(shared[1].shape)}")
        wanted |= {"shared[0]": (d, 2 * d_shared), "shared[1]": (d_shared, d)}
    for name, shape in wanted.items():
        require(
            given[name].shape == shape,
            f"with router {tuple(router.shape)} and w_down {tuple(w_down.shape)}, {name} must be "
            f"{shape}; got {tuple(given[name].shape)}",
        )
    for name, tensor in given.items():
        require(
            tensor.dtype == x.dtype and x.is_floating_point(),
            f"x and all weights must share a floating dtype; x is {x.dtype}, {name} {tensor.dtype}",
        )
        require(
            tensor.device == x.device,
            f"x and all weights must be on one device; x is on {x.device}, {name} {tensor.device}",
        )


def check_routing(logits: Tensor, k: int, bias: Tensor | None, score: str) -> None:
    require(
        logits.ndim == 2 and logits.numel() > 0 and logits.is_floating_point()
        and logits.dtype.itemsize >= 4,
        "logits must be (n_tokens, n_experts), float32 or wider, not empty; "
        f"got {tuple(logits.shape)}, {logits.dtype}",
    )
    n_experts = logits.shape[1]
    require(
        isinstance(k, int) and 1 <= k <= n_experts, f"k must lie in [1, {n_experts}]; got {k!r}"
    )
    require(score in ("softmax", "sigmoid"), f"score is 'softmax' or 'sigmoid'; got {score!r}")
    require(
        bool(logits.isfinite().all()),
        "a router logit is NaN or infinite: look for it in x and in the router",
    )
    require(
        bias is None or bias.shape == (n_experts,) and bool(bias.isfinite().all()),
        f"bias must be ({n_experts},) and finite; got "
        f"{None if bias is None else tuple(bias.shape)}",
    )
