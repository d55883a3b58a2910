"""What a training step of a mixture takes on a GPU, and each kernel of a decode step.

    python -m llmopt_lab.moe.measure --commit HASH

Writes results/measured.json. The forward pass with its peers is `llmopt bench moe`.
"""

import argparse
import datetime
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from llmopt_lab.core.bench import FORMAT_VERSION
from llmopt_lab.core.device import hardware_facts, software_facts
from llmopt_lab.core.errors import require
from llmopt_lab.moe.cases import MIXTRAL, QWEN, bench_inputs
from llmopt_lab.moe.peers import grouped

RESULTS = Path(__file__).parent / "results" / "measured.json"
PREFILL = ({"n_tokens": 4096} | MIXTRAL, {"n_tokens": 32768} | QWEN)
DECODE = {"n_tokens": 1} | QWEN
TURNS, CALLS = 4, 3  # the layers in turn, so many calls each
PROFILED = 20  # calls
HOW_TRAINING = (
    f"bfloat16; events around each call, launches included; the same inputs each time; the two "
    f"layers in turn, {CALLS} calls each, {TURNS} times, the first turn left out. Gradients of x, "
    "router and both weights. The layer on torch._grouped_mm is not compiled, and its router "
    "multiplies copies in float32: torch's product with float32 results has no gradient. "
    "gradients_differ: norm of the difference over the norm of torch's."
)
HOW_KERNELS = (
    f"torch.profiler, mean of {PROFILED} calls with the same weights; a kernel starts while the "
    "one before it still runs, and its wait counts as its time"
)

Layer = Callable[..., Tensor]  # (x, router, w_gate_up, w_down, k) -> the result


def _ours(*tensors: Tensor, k: int) -> Tensor:
    from llmopt_lab.moe.kernels import moe_layer_triton

    return moe_layer_triton(*tensors, k=k)


def _torchs(*tensors: Tensor, k: int) -> Tensor:
    return grouped(*tensors, k)


LAYERS: dict[str, Layer] = {"ours": _ours, "torch._grouped_mm": _torchs}


def training_step(size: dict) -> dict:
    """Times of forward, and of forward and backward, of both layers; how far gradients differ."""
    *tensors, k = bench_inputs("cuda", **size)
    for tensor in tensors:
        tensor.requires_grad_()
    d_out = torch.randn_like(tensors[0])

    def step(layer: Layer) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(*tensors, k=k), tensors, d_out)

    gradients = {name: step(layer) for name, layer in LAYERS.items()}
    names = ("x", "router", "w_gate_up", "w_down")
    pairs = zip(names, gradients["ours"], gradients["torch._grouped_mm"], strict=True)
    differ = {
        name: round(((a - b).float().norm() / b.float().norm()).item(), 5) for name, a, b in pairs
    }
    del gradients
    whats = {"forward": lambda layer: layer(*tensors, k=k), "forward + backward": step}
    samples = {name: {what: {"samples_ms": []} for what in whats} for name in LAYERS}
    for what, run in whats.items():
        for turn, name, _ in product(range(TURNS), LAYERS, range(CALLS)):
            ms = _milliseconds(run, LAYERS[name])
            if turn > 0:
                samples[name][what]["samples_ms"].append(ms)
    return {"size": size, "results": samples, "gradients_differ": differ}


def _milliseconds(run: Callable[[Layer], object], layer: Layer) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream()
    stream.record_event(begin)
    run(layer)
    stream.record_event(end)
    torch.cuda.synchronize()
    return round(begin.elapsed_time(end), 3)


@torch.no_grad()
def decode_kernels(size: dict) -> dict[str, float]:
    """Microseconds of each kernel of one call."""
    *tensors, k = bench_inputs("cuda", **size)
    _ours(*tensors, k=k)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            _ours(*tensors, k=k)
        torch.cuda.synchronize()
    kernels = [event for event in profile.key_averages() if event.key.endswith("_kernel")]
    return {event.key: round(event.device_time_total / PROFILED, 2) for event in kernels}


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--commit", required=True, help="of the code that runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    require(args.out.parent.is_dir(), f"the folder {args.out.parent} does not exist")
    require(torch.cuda.is_available(), "this measures a GPU, and there is none here")
    results = {
        "format_version": FORMAT_VERSION,
        "room": "moe",
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": args.commit,
        "hardware": hardware_facts(),
        "software": software_facts(),
        "training": {"how": HOW_TRAINING, "rows": [training_step(size) for size in PREFILL]},
    }
    us = decode_kernels(DECODE)
    results["decode_kernels"] = {"how": HOW_KERNELS, "size": DECODE, "us": us}
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
