"""Held-out bits per byte of quantized models, and what decoding with them costs on this CPU.

    python -m llmopt_lab.quantization.measure                  # goes on where a run was cut off
    python -m llmopt_lab.quantization.measure --models lab-target

Writes results/perplexity.json after every configuration.
"""

import argparse
import ctypes
import gc
import json
import platform
import time
from itertools import product
from pathlib import Path

import torch

from llmopt_lab.core.device import software_facts
from llmopt_lab.core.errors import require
from llmopt_lab.nn.model_card import cpu_name, decode_speed
from llmopt_lab.nn.transformer import Transformer
from llmopt_lab.nn.weights import load
from llmopt_lab.quantization.linear import CodedLinear
from llmopt_lab.quantization.model import linear_nbytes, quantize_model
from llmopt_lab.quantization.perplexity import (
    bits_per_byte,
    calibration_tokens,
    held_out_windows,
    perplexity,
)
from llmopt_lab.quantization.reference import bits_per_weight

RESULTS = Path(__file__).parent / "results" / "perplexity.json"
GROUP_SIZES = (128, 32, 64, None)  # None: one scale a row
METHODS = (
    {"method": "rtn"},
    {"method": "gptq", "act_order": True},
    {"method": "awq"},
    {"method": "gptq"},
)
# Sizes are what one CPU core can do: a row of SmolLM2's table takes minutes.
SLICES = {
    "lab-target": {
        "calibration": (64, 256),
        "held_out": (11, 1024),
        "bits": (4, 3, 8, 2),
        "symmetric": (True, False),
        "methods": METHODS,
        "n_new": 128,
    },
    "smollm2-135m": {
        "calibration": (16, 256),
        "held_out": (8, 384),
        "bits": (4, 3, 8),
        "symmetric": (True,),
        "methods": METHODS[:3],
        "n_new": 8,
    },
}


def configurations(name: str) -> list[dict]:
    """The arguments of `quantize_model` to try, those that tell most first."""
    plan = SLICES[name]
    grids = [
        {**method, "bits": bits, "group_size": group_size, "symmetric": symmetric}
        for symmetric, group_size, bits, method in product(
            plan["symmetric"], GROUP_SIZES, plan["bits"], plan["methods"]
        )
    ]
    grids += [{"method": method, "bits": 8} for method in ("w8a8", "smoothquant")]
    return grids


def measure(name: str, results: dict, save) -> None:
    """Fill results["models"][name] with what is not there yet; call `save()` after each row."""
    plan, lm = SLICES[name], load(name, device="cpu")
    tokens, n_bytes = held_out_windows(lm, *plan["held_out"])
    n_tokens = tokens[:, 1:].numel()
    calibration, sha256 = calibration_tokens(
        lm, *plan["calibration"], rng=torch.Generator().manual_seed(0)
    )
    found = results["models"].setdefault(name, {"rows": [], "decoding": []})
    found |= {
        "calibration": {
            "tokens": calibration.numel(),
            "windows": list(calibration.shape),
            "text_sha256": sha256,
            "seed": 0,
        },
        "held_out": {"windows": list(plan["held_out"]), "tokens": n_tokens, "bytes": n_bytes},
    }
    if "float" not in found:
        bits = bits_per_byte(lm.model, tokens, n_bytes)
        found["float"] = {
            "bits_per_byte": bits,
            "perplexity": perplexity(bits, n_tokens, n_bytes),
            "linear_bytes": linear_nbytes(lm.model),
        }
        save()
    base = found["float"]["bits_per_byte"]
    for how in configurations(name):
        if any(row["how"] == how for row in found["rows"]):
            continue
        start = time.perf_counter()
        model = quantize_model(lm.model, calibration=calibration, progress=False, **how)
        seconds = time.perf_counter() - start
        bits = bits_per_byte(model, tokens, n_bytes)
        found["rows"].append(
            {
                "how": how,
                "bits_per_byte": bits,
                "excess": bits - base,
                "perplexity": perplexity(bits, n_tokens, n_bytes),
                "bits_per_weight": mean_bits_per_weight(model),
                "linear_bytes": linear_nbytes(model),
                "quantize_seconds": round(seconds, 1),
            }
        )
        save()
        print(f"{name} {how}: {bits:.4f}, {bits - base:+.4f} bits per byte", flush=True)


def mean_bits_per_weight(model: Transformer) -> float:
    """Of the linear layers, scales counted with 16 bits."""
    layers = [m for m in model.layers.modules() if isinstance(m, CodedLinear)]
    weights = [m.in_features * m.out_features for m in layers]
    bits = [bits_per_weight(m.quantized) * n for m, n in zip(layers, weights, strict=True)]
    return sum(bits) / sum(weights)


def measure_decoding(name: str, results: dict, save) -> None:
    """Tokens a second and memory of greedy decoding, batch 1: float, 4-bit, int8 activations."""
    found = results["models"][name]
    for how in (
        None,
        {"method": "rtn", "bits": 4, "group_size": 128},
        {"method": "w8a8", "bits": 8},
    ):
        if any(row["how"] == how for row in found["decoding"]):
            continue
        model = load(name, device="cpu").model
        if how is not None:
            model = quantize_model(model, progress=False, **how)
        reset_peak_memory()
        n_new = SLICES[name]["n_new"]
        speed = decode_speed(model, threads=1, n_new=n_new)
        found["decoding"].append(
            {
                "how": how,
                "tokens_per_second": round(speed, 2),
                "n_new": n_new,
                "model_bytes": model_nbytes(model),
                "peak_resident_bytes": peak_memory(),
            }
        )
        save()
        print(f"{name} {how}: {speed:.2f} tokens/s", flush=True)


def model_nbytes(model: Transformer) -> int:
    """Bytes of all that the model holds, embedding included."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def reset_peak_memory() -> None:
    """Let the kernel count this process's peak from here on (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the float model left behind is not this model's
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Most bytes of memory that this process had since the reset (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("VmHWM"))


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(SLICES), choices=list(SLICES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--decoding", action="store_true", help="measure speed, on a quiet machine")
    args = parser.parse_args(arguments)
    require(args.out.parent.is_dir(), f"the folder {args.out.parent} does not exist")
    torch.set_num_threads(1)
    results = json.loads(args.out.read_text()) if args.out.is_file() else {"models": {}}
    results |= {
        "format_version": 1,
        "room": "quantization",
        "software": software_facts() | {"python": platform.python_version()},
        "cpu": {"name": cpu_name(), "threads": 1},
    }

    def save() -> None:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    for name in args.models:
        if args.decoding:
            measure_decoding(name, results, save)
        else:
            measure(name, results, save)


if __name__ == "__main__":
    main()
