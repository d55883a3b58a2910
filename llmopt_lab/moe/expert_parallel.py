"""Expert parallelism: every rank holds some of the experts, tokens travel to them and back.

    torchrun --standalone --nproc-per-node 2 -m llmopt_lab.moe.expert_parallel

starts two processes, runs the layer on them and compares it with one process. The same code runs
on gloo (processes of a CPU) and on NCCL (one GPU a rank).
"""

import argparse
import json
import os
import statistics
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from llmopt_lab.core.device import hardware_facts, pick_device, software_facts
from llmopt_lab.core.errors import BadInput, LabError, require
from llmopt_lab.moe.records import Grouping, Routing
from llmopt_lab.moe.reference import combine, group, moe_layer, route, router_logits, swiglu

LIMIT_S = 60.0


class RankLost(LabError, RuntimeError):
    """Another rank died, or did not answer within the time limit. The process group is unusable."""


def experts_of(rank: int, n_ranks: int, n_experts: int) -> range:
    """The experts that a rank holds: as even as can be, none where there are too few."""
    require(
        0 <= rank < n_ranks and n_experts > 0,
        f"rank must lie in [0, {n_ranks}) and n_experts be positive; got {rank}, {n_experts}",
    )
    return range(n_experts * rank // n_ranks, n_experts * (rank + 1) // n_ranks)


def expert_parallel_layer(
    x: Tensor,
    router: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    *,
    k: int,
    process_group: dist.ProcessGroup | None = None,
    limit_s: float = LIMIT_S,
) -> Tensor:
    """`moe_layer` with the experts spread over the ranks of a process group. Differentiable.

    Every rank calls it with its own tokens, at the same time.

    Args:
        x: this rank's tokens, (n_tokens, d). Their number may differ between ranks and be 0.
        router: (d, n_experts), the same on all ranks.
        w_gate_up: (n_local, d, 2 * d_ff), of `experts_of(rank, n_ranks, n_experts)` alone.
        w_down: (n_local, d_ff, d).
        k: experts a token visits, as for `moe_layer`; dropless.
        process_group: None is all ranks.
        limit_s: how long to wait for the other ranks in each exchange.

    Returns:
        (n_tokens, d): what `moe_layer` gives for these tokens with all the experts.

    Gradients: of the local experts complete, over all ranks' tokens; of `router` from this rank's
    tokens, to be summed over the ranks by the caller. The backward pass exchanges as well, so every
    rank must run it.

    Raises:
        BadInput: on every rank, if one was given something wrong or the ranks do not agree.
        RankLost: a rank died or is late by `limit_s`.

    Cost: of each visit to another rank, d elements there and d back; before, n_experts counts. The
    host waits for the device many times in a call: to check the logits, to agree with the others,
    for the counts that size the messages and cut the rows, and once a choice in `combine`.
    Source: Lepikhin et al. 2020 (GShard), section 3.2 (https://arxiv.org/abs/2006.16668).
    """
    rank, n_ranks = dist.get_rank(process_group), dist.get_world_size(process_group)
    talk = _Talk(process_group, limit_s)
    problem = _problem(x, router, w_gate_up, w_down, k, rank, n_ranks)
    if not problem:
        logits = router_logits(x, router)
        if not bool(logits.isfinite().all()):
            problem = "a router logit is NaN or infinite: look for it in x and in the router"
    _agree(talk, problem, x, router, k)
    n_experts = router.shape[1]
    routing, grouping = _route(logits, k)

    # how many of my visits go to each expert, and how many of every rank's come to mine
    per_rank = [len(experts_of(r, n_ranks, n_experts)) for r in range(n_ranks)]
    n_local = per_rank[rank]
    leaving = grouping.starts.diff()  # (n_experts,)
    arriving = talk.exchange(leaving, [n_local] * n_ranks, per_rank, "counts")
    arriving = arriving.view(n_ranks, n_local)
    sent = [int(part.sum()) for part in leaving.cpu().split(per_rank)]
    received = arriving.sum(1).tolist()

    rows = _AllToAll.apply(x[grouping.order // k], received, sent, talk, "dispatch")
    # they lie by rank and then by expert; the experts want them by expert
    expert = torch.arange(n_local, device=x.device).repeat(n_ranks)
    order = expert.repeat_interleave(arriving.flatten()).argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=x.device)
    visitors = rows[order].split(arriving.sum(0).tolist())
    y = [swiglu(*tensors) for tensors in zip(visitors, w_gate_up, w_down, strict=True)]
    y = torch.cat(y)[back] if y else rows  # no expert, no rows
    y = _AllToAll.apply(y, sent, received, talk, "combine")
    return combine(x, routing, grouping, y)


class _Talk:
    """Exchanges with the other ranks that end in time."""

    def __init__(self, process_group: dist.ProcessGroup | None, limit_s: float):
        self.process_group = process_group
        self.limit_s = limit_s

    def exchange(self, rows: Tensor, received: list[int], sent: list[int], what: str) -> Tensor:
        """Rank r's `sent[r]` rows to it, and `received[r]` rows from it, in the ranks' order."""
        out = rows.new_empty(sum(received), *rows.shape[1:])
        self._wait(
            what,
            lambda: dist.all_to_all_single(
                out, rows.contiguous(), received, sent, group=self.process_group, async_op=True
            ),
        )
        return out

    def gather(self, mine: Tensor, what: str) -> Tensor:
        """Every rank's tensor of this shape, (n_ranks, ..)."""
        out = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.process_group))]
        self._wait(
            what,
            lambda: dist.all_gather(out, mine, group=self.process_group, async_op=True),
        )
        return torch.stack(out)

    def _wait(self, what: str, begin) -> None:
        start = time.monotonic()
        try:
            begin().wait(timedelta(seconds=self.limit_s))
        except RuntimeError as error:
            waited = time.monotonic() - start
            raise RankLost(
                f"{what}: another rank died or did not answer; waited {waited:.1f} s of at most "
                f"{self.limit_s:g} s. Look at the other ranks' output, then start all of them "
                f"again. ({str(error).strip().splitlines()[0][:200]})"
            ) from error


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks; their gradients come back the same way."""

    @staticmethod
    def forward(ctx, rows, received, sent, talk, what):
        ctx.way_back = sent, received, talk, f"{what}, backward"
        return talk.exchange(rows, received, sent, what)

    @staticmethod
    def backward(ctx, d_rows):
        sent, received, talk, what = ctx.way_back
        return talk.exchange(d_rows, sent, received, what), None, None, None, None


def _route(logits: Tensor, k: int) -> tuple[Routing, Grouping]:
    if len(logits):
        routing = route(logits, k)
    else:  # a rank without tokens takes part all the same
        scores = logits.softmax(1)
        experts = torch.zeros(0, k, dtype=torch.int64, device=logits.device)
        routing = Routing(experts, scores[:, :k], scores)
    return routing, group(routing.experts, logits.shape[1])


def _problem(x, router, w_gate_up, w_down, k, rank: int, n_ranks: int) -> str:
    """What is wrong with the shapes, dtypes and devices of this rank's input; "" if nothing."""
    try:
        require(
            router.ndim == 2 and router.numel() > 0,
            f"router must be (d, n_experts), not empty; got {tuple(router.shape)}",
        )
        d, n_experts = router.shape
        require(x.ndim == 2 and x.shape[1] == d, f"x must be (n_tokens, {d}); got {tuple(x.shape)}")
        require(0 < k <= n_experts, f"k must lie in [1, {n_experts}]; got {k}")
        mine = experts_of(rank, n_ranks, n_experts)
        d_ff = w_down.shape[1] if w_down.ndim == 3 else 0
        require(
            w_down.shape == (len(mine), d_ff, d) and d_ff > 0,
            f"w_down must be ({len(mine)}, d_ff, {d}), of the experts {mine.start} to "
            f"{mine.stop - 1} that rank {rank} of {n_ranks} holds; got {tuple(w_down.shape)}",
        )
        require(
            w_gate_up.shape == (len(mine), d, 2 * d_ff),
            f"w_gate_up must be ({len(mine)}, {d}, {2 * d_ff}); got {tuple(w_gate_up.shape)}",
        )
        for name, t in (("router", router), ("w_gate_up", w_gate_up), ("w_down", w_down)):
            require(
                t.dtype == x.dtype and t.device == x.device and x.is_floating_point(),
                f"x and all weights must share a floating dtype and a device; x is {x.dtype} on "
                f"{x.device}, {name} {t.dtype} on {t.device}",
            )
    except BadInput as error:
        return str(error)
    return ""


def _agree(talk: _Talk, problem: str, x: Tensor, router: Tensor, k: int) -> None:
    """Every rank refuses if one must, or if they were given different layers."""
    # of a refused rank nothing but the refusal counts
    sizes = [0, 0, 0, 0] if problem else [1, *router.shape, k]
    every = talk.gather(torch.tensor(sizes, device=x.device), "agreement").tolist()
    require(not problem, problem)
    for rank, theirs in enumerate(every):
        require(theirs[0] == 1, f"rank {rank} was given bad input; its own error says what")
        require(
            theirs == sizes,
            f"d, n_experts and k must be the same on all ranks; here {sizes[1:]}, on rank {rank} "
            f"{theirs[1:]}",
        )


# --- started by torchrun


def start(limit_s: float = LIMIT_S) -> torch.device:
    """Join the processes that torchrun started: NCCL with a GPU a rank, else gloo; the device.

    Raises:
        BadInput: not started by torchrun.
    """
    require(
        "RANK" in os.environ,
        "this process was not started by torchrun: torchrun --standalone --nproc-per-node 2 "
        "-m llmopt_lab.moe.expert_parallel",
    )
    local_rank, n_local = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpus = pick_device().type == "cuda" and torch.cuda.device_count() >= n_local
    device = torch.device("cuda", local_rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpus else "gloo",
        timeout=timedelta(seconds=limit_s),
        device_id=device if on_gpus else None,
    )
    return device


def compare(
    device: torch.device, *, n_tokens: int, n_experts: int, d: int, d_ff: int, k: int,
    dtype: torch.dtype = torch.float64, limit_s: float = LIMIT_S, n_times: int = 5,
) -> list[dict]:  # fmt: skip
    """Run the layer on all ranks with uneven shares of the tokens, beside one process's result.

    Rank r has about r + 1 shares of the tokens. Returns, on every rank, one dict a rank: its tokens
    and experts, the visits it sent to each rank, the largest difference from `moe_layer`, and the
    milliseconds of a call.
    """
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    rng = torch.Generator(device).manual_seed(0)  # the same layer on all ranks

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=rng, device=device, dtype=dtype) * scale

    x, router = draw(n_tokens, d), draw(d, n_experts, scale=3 * d**-0.5)
    w_gate_up = draw(n_experts, d, 2 * d_ff, scale=d**-0.5)
    w_down = draw(n_experts, d_ff, d, scale=d_ff**-0.5)
    shares = n_ranks * (n_ranks + 1) // 2
    bounds = [n_tokens * (r * (r + 1) // 2) // shares for r in range(n_ranks + 1)]
    mine, experts = slice(*bounds[rank : rank + 2]), experts_of(rank, n_ranks, n_experts)
    held = slice(experts.start, experts.stop)
    layer = (x[mine], router, w_gate_up[held].clone(), w_down[held].clone())
    times = []
    for _ in range(n_times + 1):
        begin = time.perf_counter()
        out = expert_parallel_layer(*layer, k=k, limit_s=limit_s)
        if out.is_cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    want = moe_layer(x, router, w_gate_up, w_down, k=k)[mine]
    _, grouping = _route(router_logits(x[mine], router), k)
    per_rank = [len(experts_of(r, n_ranks, n_experts)) for r in range(n_ranks)]
    report = {
        "rank": rank,
        "device": str(device),
        "n_tokens": len(out),
        "experts": [experts.start, experts.stop],
        "sent_to": [int(part.sum()) for part in grouping.starts.diff().cpu().split(per_rank)],
        "max_difference": float((out - want).abs().max()) if len(out) else 0.0,
        "ms": statistics.median(times[1:]),
    }
    reports: list[dict] = [{}] * n_ranks
    dist.all_gather_object(reports, report)
    return reports


def format_reports(reports: list[dict], *, d: int, itemsize: int) -> str:
    """The table that rank 0 prints."""
    lines = [f"{'rank':>4} {'tokens':>7} {'experts':>9} {'ms':>8}  max difference  visits sent to"]
    away = 0
    for r in reports:
        sent = " ".join(f"{n:6}" for n in r["sent_to"])
        first, end = r["experts"]
        held = f"{first}..{end - 1}" if end > first else "none"
        away += sum(r["sent_to"]) - r["sent_to"][r["rank"]]
        lines.append(
            f"{r['rank']:4} {r['n_tokens']:7,} {held:>9} {r['ms']:8.2f}  "
            f"{r['max_difference']:14.1e} {sent}"
        )
    visits = sum(sum(r["sent_to"]) for r in reports)
    lines.append(
        f"{away:,} of {visits:,} visits go to another rank: "
        f"{2 * away * d * itemsize:,} bytes there and back"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """One rank: compare, and on rank 0 print the table. 1 if the results differ."""
    parser = argparse.ArgumentParser(prog="llmopt_lab.moe.expert_parallel")
    sizes = {"n_tokens": 600, "n_experts": 8, "d": 64, "d_ff": 96, "k": 2}
    for name, size in sizes.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=size)
    parser.add_argument("--dtype", choices=["float64", "float32", "bfloat16"], default="float64")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds to wait for a rank")
    parser.add_argument("--out", type=Path, help="write the table as JSON here")
    args = parser.parse_args(arguments)
    dtype = getattr(torch, args.dtype)
    tolerance = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 0.1}[args.dtype]
    device = start(args.limit)
    chosen = {name: getattr(args, name) for name in sizes}
    reports = compare(device, **chosen, dtype=dtype, limit_s=args.limit)
    same = all(r["max_difference"] <= tolerance for r in reports)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks, {dist.get_backend()}, {args.dtype}, {chosen}")
        print(format_reports(reports, d=args.d, itemsize=dtype.itemsize), flush=True)
        if args.out:
            facts = {"hardware": hardware_facts(), "software": software_facts()}
            facts |= {"backend": dist.get_backend(), "dtype": args.dtype, "sizes": chosen}
            args.out.write_text(json.dumps(facts | {"ranks": reports}, indent=1) + "\n")
    dist.destroy_process_group()
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
