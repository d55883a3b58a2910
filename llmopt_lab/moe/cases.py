"""Inputs shared by tests, benchmarks and the notebook, and the benchmark with its peers."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from llmopt_lab.core.bench import Case
from llmopt_lab.moe import peers
from llmopt_lab.moe.expert_choice import expert_choice_layer


class Layer(NamedTuple):
    """The arguments of `moe_layer`, in its order."""

    x: Tensor  # (n_tokens, d)
    router: Tensor  # (d, n_experts)
    w_gate_up: Tensor  # (n_experts, d, 2 * d_ff)
    w_down: Tensor  # (n_experts, d_ff, d)


def layer(
    n_tokens: int,
    d: int,
    d_ff: int,
    n_experts: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    peak: float = 3.0,
) -> Layer:
    """Random tokens and weights that keep the size of what passes through them.

    `peak` scales the router: at 3 a token prefers some experts clearly, and a result made with
    wrong weights is far off.
    """
    rng = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device, dtype=dtype)

    return Layer(
        draw(n_tokens, d),
        peak * d**-0.5 * draw(d, n_experts),
        d**-0.5 * draw(n_experts, d, 2 * d_ff),
        d_ff**-0.5 * draw(n_experts, d_ff, d),
    )


# n_tokens, d, d_ff, n_experts, k: no size a multiple of a tile; one token, one expert, all experts
RAGGED = (
    (37, 12, 7, 5, 2),
    (1, 3, 5, 8, 2),
    (20, 9, 4, 6, 1),
    (11, 5, 3, 3, 3),
    (3, 4, 2, 1, 1),
    (6, 7, 3, 40, 8),
)


def toy() -> Layer:
    """6 tokens of width 4; 4 experts of width 2. With k = 2 all visit expert 1, and nobody 3.

    The router is the identity: a token is its own logits.
    """
    rows = [
        [1, 2, 0, -1], [0, 2, 1, -1], [2, 1, 0, 0],
        [0, 1, 2, 0], [1, 2, 0, 0], [0, 2, 1, -1],
    ]  # fmt: skip
    weights = layer(1, 4, 2, 4, dtype=torch.float32)
    return weights._replace(x=torch.tensor(rows, dtype=torch.float32), router=torch.eye(4))


def guides_load_balancing_loss(router_probs: Tensor, top_k_indices: Tensor) -> Tensor:
    """COUNTER-EXAMPLE: a widely copied snippet; only `num_experts` is given a value.

    Everything is made from comparisons of integers, so there is no gradient; `router_probs`, which
    would carry one, is not used.
    """
    num_experts = router_probs.shape[-1]
    expert_usage = torch.zeros(num_experts)
    for expert_id in range(num_experts):
        usage = (top_k_indices == expert_id).float().mean()
        expert_usage[expert_id] = usage
    load_balance_loss = expert_usage.var()
    return load_balance_loss


def strip_example(reference) -> list[Tensor]:
    """A run that reaches every `record(...)` of the room."""
    case = [w.requires_grad_() for w in layer(9, 5, 3, 4)]
    rng = torch.Generator().manual_seed(1)
    bias = torch.randn(4, generator=rng, dtype=torch.float64)
    shared = tuple(torch.randn(s, generator=rng, dtype=torch.float64) for s in ((5, 4), (2, 5)))
    outs = [
        reference.moe_layer(*case, k=2),
        reference.moe_layer(*case, k=1, capacity=2),
        reference.moe_layer(*case, k=3, bias=bias, score="sigmoid", shared=shared),
        expert_choice_layer(*case, capacity=4),
    ]
    grads = torch.autograd.grad(sum(out.square().sum() for out in outs), case)
    return [out.detach() for out in outs] + list(grads)


# The benchmark: bf16 on a GPU. The routing is made on the CPU, so that every machine sees the same
# experts touched.


@lru_cache(maxsize=4)
def _tokens(n_tokens: int, d: int, n_experts: int, k: int) -> tuple[Tensor, Tensor, int]:
    """x and router, bfloat16, and how many experts are touched.

    A token whose k-th and next logits nearly tie is drawn again: contenders that add in another
    order could send it to different experts.
    """
    rng = torch.Generator().manual_seed(0)
    router = (torch.randn(d, n_experts, generator=rng) * 2 * d**-0.5).bfloat16()
    x = torch.randn(n_tokens, d, generator=rng).bfloat16()
    while True:
        best = (x.float() @ router.float()).topk(min(k + 1, n_experts))
        near = best.values[:, k - 1 : k].sub(best.values[:, k:]).lt(1e-4).any(1)
        if not near.any():
            return x, router, len(best.indices[:, :k].unique())
        x[near] = torch.randn(int(near.sum()), d, generator=rng).bfloat16()


def bench_inputs(device, *, n_tokens: int, n_experts: int, d: int, d_ff: int, k: int) -> tuple:
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    x, router, _ = _tokens(n_tokens, d, n_experts, k)
    rng = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        w = torch.empty(shape, device=device, dtype=dtype)
        return w.normal_(std=shape[1] ** -0.5, generator=rng)

    weights = draw(n_experts, d, 2 * d_ff), draw(n_experts, d_ff, d)
    return x.to(device, dtype), router.to(device, dtype), *weights, k


def _flops(*, n_tokens: int, n_experts: int, d: int, d_ff: int, k: int) -> int:
    return 6 * n_tokens * k * d * d_ff + 2 * n_tokens * d * n_experts


def _min_bytes(*, n_tokens: int, n_experts: int, d: int, d_ff: int, k: int) -> int:
    """The weights of the experts touched, the router, x and the result, in bfloat16."""
    touched = _tokens(n_tokens, d, n_experts, k)[2]
    return 2 * (touched * 3 * d * d_ff + d * n_experts + 2 * n_tokens * d)


MIXTRAL = {"n_experts": 8, "d": 4096, "d_ff": 14336, "k": 2}  # 8x7B
QWEN = {"n_experts": 128, "d": 2048, "d_ff": 768, "k": 8}  # Qwen3-30B-A3B
CPU_SIZES = ({"n_tokens": 9, "n_experts": 4, "d": 24, "d_ff": 20, "k": 2},)
CASES = tuple(
    Case(
        title=title, sizes=sizes, inputs=bench_inputs, oracle=peers.oracle,
        contenders=contenders, flops=_flops, min_bytes=_min_bytes, cpu_sizes=CPU_SIZES,
    )
    for title, contenders, sizes in (
        (
            "prefill", peers.PREFILL,
            ({"n_tokens": 4096} | MIXTRAL, {"n_tokens": 32768} | QWEN),
        ),
        (
            "decode (floor: the weights of the experts touched)", peers.DECODE,
            tuple({"n_tokens": n} | model for model in (MIXTRAL, QWEN) for n in (1, 4, 16, 64)),
        ),
    )
)  # fmt: skip
