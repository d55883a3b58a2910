"""What decoding costs with a whole model in few bits: tokens a second, peak memory and accuracy.

    python -m llmopt_lab.quantization.decoding                 # on the GPU, else on one CPU core
    python -m llmopt_lab.quantization.decoding --models lab-target --out results.json

Puts this machine's run into results/decoding.json, row by row. On a GPU the models are bfloat16,
run on the kernels and beside them without; on a CPU they are float32 and there is no kernel.
"""

import argparse
import gc
import json
import platform
import time
from pathlib import Path

import torch
from torch import Tensor

from llmopt_lab.core.bench import time_calls
from llmopt_lab.core.cost import allocated_peak
from llmopt_lab.core.device import hardware_facts, pick_device, software_facts
from llmopt_lab.core.errors import Missing, require
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.generate import KVCache, generate
from llmopt_lab.nn.model_card import cpu_name
from llmopt_lab.nn.transformer import Transformer
from llmopt_lab.nn.weights import load
from llmopt_lab.quantization.attend import use_kernels
from llmopt_lab.quantization.model import quantize_model
from llmopt_lab.quantization.perplexity import bits_per_byte, held_out_windows

RESULTS = Path(__file__).parent / "results" / "decoding.json"
PROMPT = 64  # tokens
WAYS = {  # name -> how to quantize, and whether the kernels multiply
    "float": (None, False),
    "4 bits, kernel": ({"method": "rtn", "bits": 4, "group_size": 128}, True),
    "4 bits, dequantized at each step": ({"method": "rtn", "bits": 4, "group_size": 128}, False),
    "int8 both, kernel": ({"method": "w8a8", "bits": 8}, True),
    "int8 both, torch": ({"method": "w8a8", "bits": 8}, False),
}
# Where the trained weights are not at hand, random ones of the same shape: speed and memory do not
# depend on their values.
SHAPES = {
    "smollm2-135m": ModelConfig(
        n_vocab=49152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, d_head=64, d_ff=1536,
        rope_theta=100_000.0, max_positions=8192, tie_embeddings=True,
    ),
    "llama-3-8b": ModelConfig(
        n_vocab=128256, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_head=128,
        d_ff=14336, rope_theta=500_000.0, max_positions=8192,
    ),
}  # fmt: skip
ON_CPU = ("float", "4 bits, dequantized at each step", "int8 both, torch")
ON_GPU = ("float", "4 bits, kernel", "4 bits, dequantized at each step", "int8 both, kernel")
MODELS = {"cpu": ("lab-target", "smollm2-135m"), "cuda": ("lab-target", *SHAPES)}


@torch.no_grad()
def tokens_per_second(model: Transformer, *, n_new: int, runs: int = 3) -> float:
    """Of greedy decoding, batch 1, after a prompt of 64 tokens; the best of `runs`.

    The clock starts with the first new token: reading the prompt is not counted. On a CPU it is
    the process's own processor time, so that a busy machine changes little; use one thread.
    """
    require(n_new > 1 and runs > 0, f"needs n_new > 1 and runs > 0; got {n_new} and {runs}")
    prompt = torch.arange(1, PROMPT + 1)
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    generate(model, prompt, 2)
    fastest = float("inf")
    for _ in range(runs):
        stamps = []
        generate(model, prompt, n_new, on_token=lambda _, at=stamps: at.append(clock()))
        fastest = min(fastest, (stamps[-1] - stamps[0]) / (n_new - 1))
    return 1 / fastest


@torch.no_grad()
def step_ms(model: Transformer, *, length: int) -> dict:
    """Milliseconds of the forward pass of one token after `length` others, as one CUDA graph.

    A graph has no gaps between its kernels, as a server runs it. Small models spend most of a
    step of `generate` in Python.
    """
    cache = KVCache(model.config, max_tokens=length + 1, dtype=model.dtype, device=model.device)
    prompt = torch.arange(1, length + 1, device=model.device)[None]
    model(prompt, attend=cache, last_only=True)
    token, position = prompt[:, -1:], cache.next_positions(1)

    def step() -> Tensor:
        cache.truncate(length)
        return model(token, position, attend=cache, last_only=True)

    timing = time_calls([step], model.device)
    return {
        "step_ms": round(timing.median_ms, 5),
        "step_p20_ms": round(timing.p20_ms, 5),
        "step_p80_ms": round(timing.p80_ms, 5),
        "step_timed_as": timing.how,
    }


def measure_way(name: str, way: str, device: torch.device, *, n_new: int) -> dict:
    """One row: model `name` decodes in one of WAYS. Only this model is in memory then."""
    how, on_kernels = WAYS[way]
    model, trained = _model(name, device)
    if how is not None:
        model = quantize_model(model, progress=False, **how)
    if on_kernels:
        use_kernels(model, keep_codes=False)
    row = {"way": way, "how": how, "trained": trained, "n_new": n_new}
    row |= speed_and_memory(model, n_new=n_new)
    if device.type == "cuda" and (how is None or on_kernels):
        row |= step_ms(model, length=PROMPT)  # the others look at the codes on the CPU: no graph
    if trained:
        lm = load(name, device=device)
        text, n_bytes = held_out_windows(lm, 11, 1024)
        row["bits_per_byte"] = bits_per_byte(model, text.to(device), n_bytes)
    return row


def speed_and_memory(model: Transformer, *, n_new: int) -> dict:
    """Tokens a second, and bytes: of the model, at the peak, and kept by cuBLAS (on a GPU).

    Bytes are those that torch's allocator has given out. What a model before this one left behind
    is not among them; on a GPU cuBLAS's work space for this one is, with `workspace_bytes`.
    """
    if model.device.type == "cuda":
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        speed = tokens_per_second(model, n_new=n_new)
        peak = torch.cuda.max_memory_allocated()
        extra = {"workspace_bytes": torch.cuda.memory_allocated() - held}
    else:
        held, extra = sum(t.nbytes for t in (*model.parameters(), *model.buffers())), {}
        prompt = torch.arange(1, PROMPT + 1)
        peak = held + allocated_peak(lambda: generate(model, prompt, 2))
        speed = tokens_per_second(model, n_new=n_new)
    return {"tokens_per_second": round(speed, 2), "model_bytes": held, "peak_bytes": peak} | extra


def _model(name: str, device: torch.device) -> tuple[Transformer, bool]:
    """The model, bfloat16 on a GPU; trained, or with random weights of its shape."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if name != "llama-3-8b":
        try:
            return load(name, device=device, dtype=dtype).model, True
        except Missing:
            pass
    with device:
        torch.manual_seed(0)
        model = Transformer(SHAPES[name]).to(dtype)
    return model.requires_grad_(False).eval(), False


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    device = pick_device()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = MODELS[device.type]
    parser.add_argument("--models", nargs="+", default=list(names), choices=names)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    require(args.out.parent.is_dir(), f"the folder {args.out.parent} does not exist")
    torch.set_num_threads(1)
    found = json.loads(args.out.read_text()) if args.out.is_file() else {"runs": []}
    hardware = hardware_facts() if device.type == "cuda" else {"name": cpu_name(), "threads": 1}
    others = [run for run in found["runs"] if run["hardware"]["name"] != hardware["name"]]
    before = next((run for run in found["runs"] if run not in others), {"models": {}})
    run = {
        "hardware": hardware,
        "software": software_facts() | {"python": platform.python_version()},
        "prompt": PROMPT,
        "models": before["models"],
    }
    for name in args.models:
        run["models"][name] = rows = []
        for way in ON_GPU if device.type == "cuda" else ON_CPU:
            slow = name != "lab-target" and "dequantized" in way
            rows.append(measure_way(name, way, device, n_new=9 if slow else 65))
            whole = {"format_version": 1, "room": "quantization", "runs": [*others, run]}
            args.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            print(f"{name}, {way}: {rows[-1]}", flush=True)


if __name__ == "__main__":
    main()
