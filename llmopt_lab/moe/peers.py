"""What `llmopt bench moe` times: our layer and its peers, one function each.

Each takes x (n_tokens, d), router (d, n_experts), w_gate_up (n_experts, d, 2 * d_ff), w_down
(n_experts, d_ff, d) and k, and gives the call to time. All choose experts by float32 logits and
renormalise; k is 2 or more. A peer with another layout of the weights gets a copy in it before the
clock starts.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt_lab.core.bench import Contender
from llmopt_lab.core.device import gpu_facts
from llmopt_lab.core.errors import Missing

Call = Callable[[], Tensor]


def oracle(x: Tensor, router: Tensor, w_gate_up: Tensor, w_down: Tensor, k: int) -> Tensor:
    """The layer in float64, one expert at a time: no two experts' wide weights at once."""
    wide = x.double()
    weights, experts = (wide @ router.double()).topk(k)
    weights = weights.softmax(1)
    out = torch.zeros_like(wide)
    for expert in range(len(w_down)):
        tokens, choice = (experts == expert).nonzero(as_tuple=True)
        if len(tokens):
            gate, up = (wide[tokens] @ w_gate_up[expert].double()).chunk(2, 1)
            y = (F.silu(gate) * up) @ w_down[expert].double()
            out.index_add_(0, tokens, weights[tokens, choice, None] * y)
    return out


def ours(x: Tensor, router: Tensor, w_gate_up: Tensor, w_down: Tensor, k: int) -> Call:
    from llmopt_lab.moe.kernels import moe_layer_triton

    return lambda: moe_layer_triton(x, router, w_gate_up, w_down, k=k)


def grouped(x: Tensor, router: Tensor, w_gate_up: Tensor, w_down: Tensor, k: int) -> Tensor:
    """A layer built on torch's grouped product: sort, gather, two products, gather back."""
    n_tokens, n_experts = len(x), len(w_down)
    weights, experts = _logits(x, router).topk(k)
    weights = weights.softmax(1)
    by_expert, order = experts.flatten().sort()
    numbers = torch.arange(n_experts, device=x.device)
    ends = torch.searchsorted(by_expert, numbers, right=True, out_int32=True)
    gate, up = torch._grouped_mm(x[order // k], w_gate_up, offs=ends).chunk(2, 1)
    y = torch._grouped_mm(F.silu(gate) * up, w_down, offs=ends)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=x.device)
    rows = y[place].view(n_tokens, k, -1)
    return (rows * weights[..., None]).sum(1).to(x.dtype)


def grouped_mm(x, router, w_gate_up, w_down, k) -> Call:
    return lambda: grouped(x, router, w_gate_up, w_down, k)


def grouped_mm_compiled(x, router, w_gate_up, w_down, k) -> Call:
    """The same with what surrounds the products fused by torch.compile."""
    return _compiled(grouped, x, router, w_gate_up, w_down, k)


def visited(x: Tensor, router: Tensor, w_gate_up: Tensor, w_down: Tensor, k: int) -> Tensor:
    """A loop over the experts, each on its visitors: the host waits for the device at each."""
    weights, experts = _logits(x, router).topk(k)
    weights = weights.softmax(1)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(len(w_down)):
        tokens, choice = (experts == expert).nonzero(as_tuple=True)
        if len(tokens):
            gate, up = (x[tokens] @ w_gate_up[expert]).chunk(2, 1)
            y = (F.silu(gate) * up) @ w_down[expert]
            out.index_add_(0, tokens, weights[tokens, choice, None] * y)
    return out.to(x.dtype)


def loop(x, router, w_gate_up, w_down, k) -> Call:
    return lambda: visited(x, router, w_gate_up, w_down, k)


def everyone(x: Tensor, router: Tensor, w_gate_up: Tensor, w_down: Tensor, k: int) -> Tensor:
    """Every expert on every token, as one batch of products."""
    weights, experts = _logits(x, router).topk(k)
    share = torch.zeros(len(x), len(w_down), device=x.device)
    share = share.scatter(1, experts, weights.softmax(1))
    gate, up = torch.matmul(x, w_gate_up).chunk(2, 2)  # (n_experts, n_tokens, d_ff)
    y = (F.silu(gate) * up) @ w_down  # (n_experts, n_tokens, d)
    return (y * share.T[..., None]).sum(0).to(x.dtype)


def all_experts(x, router, w_gate_up, w_down, k) -> Call:
    return lambda: everyone(x, router, w_gate_up, w_down, k)


def liger(x: Tensor, router: Tensor, w_gate_up: Tensor, w_down: Tensor, k: int) -> Call:
    """Liger's Triton kernels behind torch's routing.

    Its first call for a width of layer compiles 104 variants to choose from: minutes on one core.
    """
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    gate_up, down = (w.mT.contiguous() for w in (w_gate_up, w_down))

    def call() -> Tensor:
        weights, experts = _logits(x, router).topk(k)
        weights = weights.softmax(1).to(x.dtype)
        return LigerFusedMoEFunction.apply(x, gate_up, down, experts.int(), weights)

    return call


def _logits(x: Tensor, router: Tensor) -> Tensor:
    """Products and sums in float32: bfloat16 logits would choose other experts."""
    if not x.is_cuda:
        return x @ router
    if torch.is_grad_enabled() and router.requires_grad:
        return x.float() @ router.float()  # the product below has no gradient
    return torch.mm(x, router, out_dtype=torch.float32)


def _compiled(layer: Callable[..., Tensor], *arguments) -> Call:
    if gpu_facts() is None:
        raise Missing("torch.compile is only timed on a GPU here")
    compiled = _compile(layer, tuple(x.shape for x in arguments[:-1]))
    with warnings.catch_warnings(action="ignore"):  # of the compiler, about its own choices
        compiled(*arguments)
    return lambda: compiled(*arguments)


@lru_cache(maxsize=1)
def _compile(layer: Callable[..., Tensor], shapes: tuple) -> Callable[..., Tensor]:
    """Once for all input sets of a size."""
    torch.compiler.reset()  # or the ninth size is past its limit and runs uncompiled
    return torch.compile(layer, dynamic=False)


OURS = Contender("ours", ours, ours=True)
GROUPED = (
    Contender("torch._grouped_mm", grouped_mm),
    Contender("torch._grouped_mm, compiled", grouped_mm_compiled),
)
LOOP = Contender("loop over experts", loop)
LIGER = Contender("Liger fused_moe", liger)
PREFILL = (OURS, *GROUPED, LOOP, LIGER)
DECODE = (
    OURS,
    *GROUPED,
    LOOP,
    Contender("every expert", all_experts),
    LIGER,
)
