"""Held-out bits per byte of quantized models, by way, bits, group, format, rotation, calibration.

    python -m llmopt_lab.quantization.measure                  # goes on where a run was cut off
    python -m llmopt_lab.quantization.measure --models lab-target

Writes results/perplexity.json after every configuration.
"""

import argparse
import json
import platform
import time
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from llmopt_lab.core.device import software_facts
from llmopt_lab.core.errors import require
from llmopt_lab.nn.model_card import cpu_name
from llmopt_lab.nn.transformer import Transformer
from llmopt_lab.nn.weights import load
from llmopt_lab.quantization.activations import OBSERVERS, round_inputs
from llmopt_lab.quantization.block_formats import FORMATS, bits_per_weight_of_blocks
from llmopt_lab.quantization.linear import BlockLinear, CodedLinear
from llmopt_lab.quantization.model import linear_nbytes, quantize_model
from llmopt_lab.quantization.perplexity import (
    bits_per_byte,
    calibration_tokens,
    held_out_windows,
    perplexity,
)
from llmopt_lab.quantization.reference import bits_per_weight
from llmopt_lab.quantization.rotation import rotated

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
        "few_variants": False,
        "calibrations": tuple(product(("text", "random tokens"), (8, 64), METHODS[1:3])),
    },
    "smollm2-135m": {
        "calibration": (16, 256),
        "held_out": (8, 384),
        "bits": (4, 3, 8),
        "symmetric": (True,),
        "methods": METHODS[:3],
        "few_variants": True,
        "calibrations": (),
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
    found = results["models"].setdefault(name, {"rows": []})
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
    done = found.setdefault("variants", [])
    for variant in variants(few=plan["few_variants"]):
        if any(variant.items() <= row.items() for row in done):
            continue
        model = build(lm.model, calibration, **variant)
        bits = bits_per_byte(model, tokens, n_bytes)
        done.append(
            variant
            | {
                "bits_per_byte": bits,
                "excess": bits - base,
                "perplexity": perplexity(bits, n_tokens, n_bytes),
                "bits_per_weight": None if variant["how"] is None else mean_bits_per_weight(model),
            }
        )
        save()
        print(f"{name} {variant}: {bits - base:+.4f} bits per byte", flush=True)
    compared = found.setdefault("calibrations", [])
    for case in calibrations(name):
        if any(case.items() <= row.items() for row in compared):
            continue
        windows = calibration
        if case["source"] == "random tokens":
            rng = torch.Generator().manual_seed(0)
            windows = torch.randint(lm.config.n_vocab, calibration.shape, generator=rng)
        model = quantize_model(
            lm.model, calibration=windows[: case["windows"]], progress=False, **case["how"]
        )
        bits = bits_per_byte(model, tokens, n_bytes)
        compared.append(
            case
            | {
                "bits_per_byte": bits,
                "excess": bits - base,
                "perplexity": perplexity(bits, n_tokens, n_bytes),
            }
        )
        save()
        print(f"{name} {case}: {bits - base:+.4f} bits per byte", flush=True)


def calibrations(name: str) -> list[dict]:
    """What to calibrate on, for 3 bits in groups of 128: windows of text, or of random tokens."""
    how = {"bits": 3, "group_size": 128}
    return [
        {"source": source, "windows": n, "how": method | how}
        for source, n, method in SLICES[name]["calibrations"]
    ]


def variants(*, few: bool) -> list[dict]:
    """What to measure beside the grid: block formats, rotations, and rounded activations.

    `how` are arguments of `quantize_model`, None for float weights; `rotation` is None, "offline"
    or "online"; `inputs` are bits and observer of the activations, None for float ones.
    """
    rtn = {"method": "rtn", "bits": 4}
    formats = [{"method": kind} for kind in FORMATS]
    groups = [{**rtn, "group_size": 128}, {**rtn, "bits": 3, "group_size": 128}]
    small = [{**rtn, "group_size": 16}]
    others = [
        {**rtn, "group_size": 32},
        {**rtn, "group_size": None},
        {"method": "gptq", "bits": 4, "group_size": 128, "act_order": True},
    ]
    turned = [*groups, formats[0]] if few else [*groups, *formats, *small, *others]
    made = [
        {"how": how, "rotation": None, "inputs": None}
        for how in [*groups, *formats, *small, *([] if few else others)]
    ]
    made += [{"how": how, "rotation": "offline", "inputs": None} for how in turned]
    made += [
        {"how": how, "rotation": rotation, "inputs": {"bits": bits, "observer": None}}
        for how, bits in ((None, 4), (None, 8), ({**rtn, "group_size": 128}, 4))
        for rotation in (None, "offline", "online")
        if not few or (how is None and (bits == 4 or rotation is None))
    ]
    made += [
        {"how": None, "rotation": rotation, "inputs": {"bits": 8, "observer": observer}}
        for observer in OBSERVERS
        for rotation in (None, "online")
        if not few or observer == "min-max"
    ]
    return made


def build(
    model: Transformer,
    calibration: Tensor,
    *,
    how: dict | None,
    rotation: str | None,
    inputs: dict | None,
) -> Transformer:
    """One of `variants`: rotate, round the weights, round the inputs."""
    if rotation is not None:
        rng = torch.Generator().manual_seed(0)
        model = rotated(model, rng=rng, online=rotation == "online")
    if how is not None:
        model = quantize_model(model, calibration=calibration, progress=False, **how)
    if inputs is not None:
        observer = inputs["observer"]
        static = {} if observer is None else {"observer": OBSERVERS[observer]}
        if static:
            static |= {"calibration": calibration, "batch": 1}
        model = round_inputs(model, bits=inputs["bits"], **static)
    return model


def mean_bits_per_weight(model: Transformer) -> float:
    """Of the linear layers, integer codes' scales counted with 16 bits."""
    layers = [m for m in model.layers.modules() if isinstance(m, CodedLinear | BlockLinear)]
    weights = [m.in_features * m.out_features for m in layers]
    count = (
        bits_per_weight_of_blocks(m.quantized)
        if isinstance(m, BlockLinear)
        else bits_per_weight(m.quantized)
        for m in layers
    )
    return sum(bits * n for bits, n in zip(count, weights, strict=True)) / sum(weights)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(SLICES), choices=list(SLICES))
    parser.add_argument("--out", type=Path, default=RESULTS)
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
        measure(name, results, save)


if __name__ == "__main__":
    main()
