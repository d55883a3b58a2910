"""One rank of the expert-parallel tests: started several times by test_expert_parallel.py.

    python expert_parallel_ranks.py RANK N_RANKS FOLDER

Every scenario's outcome goes to FOLDER/RANK.pt; the last one kills rank 3.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from llmopt_lab.core.errors import BadInput
from llmopt_lab.moe.expert_parallel import RankLost, expert_parallel_layer, experts_of

D, D_FF = 12, 7
# name: tokens of each rank, experts, k; with 2 ranks there are two groups at the same time
SCENARIOS = {
    "four ranks, one without tokens": ((7, 0, 20, 3), 8, 2),
    "experts that do not divide by the ranks": ((5, 9, 1, 6), 6, 3),
    "a rank without an expert": ((4, 2, 3, 5), 3, 1),
    "nobody has a token": ((0, 0, 0, 0), 4, 2),
    "two ranks": ((11, 6), 5, 2),
}
LATE_S, DEAD_S = 1.0, 20.0


def whole_layer(n_tokens: int, n_experts: int, seed: int = 0) -> list[torch.Tensor]:
    """All tokens and all weights, the same in every process."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    router, w_gate_up = draw(D, n_experts), draw(n_experts, D, 2 * D_FF) / 3
    return [draw(n_tokens, D), router, w_gate_up, draw(n_experts, D_FF, D) / 3]


def share_of(rank: int, counts: tuple[int, ...], layer: list[torch.Tensor]) -> list[torch.Tensor]:
    """A rank's tokens, the router, its experts; leaves that want gradients."""
    x, router, w_gate_up, w_down = layer
    first = sum(counts[:rank])
    held = experts_of(rank, len(counts), router.shape[1])
    held = slice(held.start, held.stop)
    mine = (x[first : first + counts[rank]], router, w_gate_up[held], w_down[held])
    return [tensor.clone().requires_grad_() for tensor in mine]


def run(rank: int, counts, n_experts: int, k: int, group=None) -> dict:
    mine = share_of(rank, counts, whole_layer(sum(counts), n_experts))
    out = expert_parallel_layer(*mine, k=k, process_group=group, limit_s=60)
    grads = torch.autograd.grad(
        (out * torch.arange(1.0, D + 1)).sum(), mine, materialize_grads=True
    )
    return {"out": out.detach(), "grads": grads}


def refused(call) -> tuple[str, str, float]:
    """Type and text of the error that `call` raises, and after how many seconds."""
    start = time.monotonic()
    try:
        call()
    except (BadInput, RankLost) as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "nothing", "", time.monotonic() - start


def main(rank: int, n_ranks: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_ranks,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    slow = dist.new_group(list(range(n_ranks)))
    results: dict = {}
    for name, (counts, n_experts, k) in SCENARIOS.items():
        group = pairs[rank // 2] if len(counts) == 2 else None
        results[name] = run(rank % len(counts), counts, n_experts, k, group)

    counts = (2, 2, 2, 2)
    mine = share_of(rank, counts, whole_layer(8, 8))
    # every token prefers the experts 0 and 1, which rank 0 holds
    with torch.no_grad():
        mine[0][:, 0], mine[1][0] = 1.0, torch.tensor([99.0, 98, 0, 0, 0, 0, 0, 0])
    out = expert_parallel_layer(*mine, k=2)
    grads = torch.autograd.grad(out.sum(), mine, materialize_grads=True)
    results["one-sided"] = out.detach(), [t.detach() for t in mine], grads

    # every logit is 97,200: too large for float16, not for the router
    half = [t.detach().half() for t in mine]
    half[0][:], half[1][:] = 90.0, 90.0
    half[2] /= 100
    results["large logits"] = expert_parallel_layer(*half, k=2), half
    endless = [torch.full_like(half[0], torch.inf) if rank == 3 else half[0], *half[1:]]
    results["endless logits"] = refused(lambda: expert_parallel_layer(*endless, k=2))

    cut = [mine[0][:, :-1] if rank == 1 else mine[0], *mine[1:]]
    results["bad input"] = refused(lambda: expert_parallel_layer(*cut, k=2))
    results["other k"] = refused(lambda: expert_parallel_layer(*mine, k=1 if rank == 2 else 2))
    results["after"] = refused(lambda: expert_parallel_layer(*mine, k=2))

    if rank == 3:
        time.sleep(LATE_S + 2)
    else:
        results["late"] = refused(
            lambda: expert_parallel_layer(*mine, k=2, process_group=slow, limit_s=LATE_S)
        )
    dist.barrier()
    if rank == 3:
        torch.save(results, folder / f"{rank}.pt")
        os.kill(os.getpid(), signal.SIGKILL)
    results["dead"] = refused(lambda: expert_parallel_layer(*mine, k=2, limit_s=DEAD_S))
    torch.save(results, folder / f"{rank}.pt")
    os._exit(0)  # the broken process group is not to be torn down in order


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
