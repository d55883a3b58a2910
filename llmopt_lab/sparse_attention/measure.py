"""What sparse attention costs and loses, measured on one CPU core: time, bytes, recall, sinks.

    python -m llmopt_lab.sparse_attention.measure                   # goes on where it was cut off
    python -m llmopt_lab.sparse_attention.measure --parts cost sinks --models lab-target

Writes results/measured.json after every row.
"""

import argparse
import json
import math
import platform
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt_lab.core.device import software_facts
from llmopt_lab.core.errors import require
from llmopt_lab.nn.held_out import held_out_documents
from llmopt_lab.nn.model_card import cpu_name
from llmopt_lab.nn.weights import LanguageModel, load
from llmopt_lab.sparse_attention.attend import PatternAttend, TopBlocksAttend
from llmopt_lab.sparse_attention.block_lists import cover, grids, lists_of
from llmopt_lab.sparse_attention.cases import (
    guides_local_attention,
    guides_longformer_attention,
    guides_strided_attention,
)
from llmopt_lab.sparse_attention.io_model import fitted_exponent, sparse_traffic, time_calls
from llmopt_lab.sparse_attention.patterns import (
    Causal,
    DilatedWindow,
    Full,
    Pattern,
    SlidingWindow,
    Strided,
    bigbird,
    longformer,
    sparse_transformer,
    streaming,
)
from llmopt_lab.sparse_attention.recall import (
    block_mass,
    layers_inputs,
    mass_recall,
    needle,
    probabilities,
    recalled,
)
from llmopt_lab.sparse_attention.reference import sparse_attention
from llmopt_lab.sparse_attention.rolling_cache import RollingCache, stream_nats
from llmopt_lab.sparse_attention.select import chosen_blocks, top_blocks

RESULTS = Path(__file__).parent / "results" / "measured.json"
LENGTHS, D_HEAD, TILE = (1024, 2048, 4096, 8192), 64, 128
TEXT = "stdlib/zipfile.py"  # the longest held-out file
# What one core can do. n: tokens read; window: of the rolling caches, beside 4 sinks; sinks: how
# many to try; needles: texts a distance; stream: tokens of a long text
PLANS = {
    "lab-target": {
        "n": 1536, "window": 252, "sinks": (0, 1, 2, 4, 8), "stream": 32768,
        "needles": 8, "distances": (64, 160, 320, 640, 900),
        "parts": ("sinks", "mass", "perplexity", "needle", "stream"),
    },
    "smollm2-135m": {
        "n": 1000, "window": 252, "sinks": (0, 1, 4), "needles": 1, "distances": (160, 320),
        "parts": ("sinks", "mass", "perplexity", "needle"),
    },
}  # fmt: skip


# Cost against length


def cost_rows() -> dict[str, Callable[[int], Pattern]]:
    """Name -> the pattern of n tokens; all run by the reference in blocks of 128."""
    return {
        "dense": lambda n: Full(),
        "causal": lambda n: Causal(),
        "window 128": lambda n: SlidingWindow(128),
        "window 128 + 4 sinks": lambda n: streaming(128, 4),
        "Longformer 128, 1 global": lambda n: longformer(128, (0,)),
        "local + strided, stride sqrt(n)": lambda n: sparse_transformer(math.isqrt(n)),
        "symmetric window 128": lambda n: SlidingWindow(128, causal=False),
        "dilated 128, 4 apart": lambda n: DilatedWindow(128, 4),
        "strided alone, stride sqrt(n)": lambda n: Strided(math.isqrt(n)),
        "BigBird, blocks of 128": lambda n: bigbird(n, block=128, rng=_seeded()),
    }


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def measure_cost(results: dict, save: Callable[[], None]) -> None:
    """Time and counted bytes of one head at every length, and their exponents."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, max(LENGTHS), D_HEAD, generator=rng)
    found = results.setdefault("cost", {"lengths": LENGTHS, "d_head": D_HEAD, "tile": TILE})
    rows = found.setdefault("rows", {})
    for name, make in cost_rows().items():
        if name in rows:
            continue
        lists = {n: cover(make(n), n, n, tile_q=TILE, tile_k=TILE) for n in LENGTHS}
        call = lambda n: sparse_attention(q[:n], k[:n], v[:n], make(n), lists=lists[n])  # noqa: B023, E731
        nbytes = [sparse_traffic(lists[n], q[:n], k[:n], v[:n]).total for n in LENGTHS]
        rows[name] = _row(time_calls(call, LENGTHS, repeats=3), nbytes)
        save()
    others = {
        "dense, torch's SDPA": lambda n: F.scaled_dot_product_attention(
            *(x[None, None, :n] for x in (q, k, v))
        ),
        "the guide's window loop, 128": lambda n: guides_local_attention(
            *(x[None, :n] for x in (q, k, v)), window_size=128
        ),
        "the guide's strided, stride 4": lambda n: guides_strided_attention(
            *(x[None, :n] for x in (q, k, v)), stride=4
        ),
        "the guide's Longformer loop, 128": lambda n: guides_longformer_attention(
            *(x[None, :n] for x in (q, k, v)), window_size=128, global_indices=(0,)
        ),
    }
    for name, call in others.items():
        if name not in rows:
            rows[name] = _row(time_calls(call, LENGTHS, repeats=3), None)
            save()


def _row(seconds: list[float], nbytes: list[int] | None) -> dict:
    row = {"seconds": seconds, "time_exponent": fitted_exponent(LENGTHS, seconds)}
    if nbytes is not None:
        row |= {"bytes": nbytes, "bytes_exponent": fitted_exponent(LENGTHS, nbytes)}
    print(row, flush=True)
    return row


# Attention mass


def fixed_patterns(n: int) -> dict[str, Pattern]:
    """Name -> the patterns of n tokens whose attention kept and perplexity are measured."""
    return {
        "window 256": SlidingWindow(256),
        "window 252 + 4 sinks": streaming(252, 4),
        "window 64": SlidingWindow(64),
        "window 60 + 4 sinks": streaming(60, 4),
        "dilated 64, 4 apart": DilatedWindow(64, 4),
        "local + strided 32": sparse_transformer(32),
        "BigBird & causal": bigbird(n, block=32, rng=_seeded()) & Causal(),
    }


def held_out_tokens(lm: LanguageModel, n: int) -> Tensor:
    """The first `n` tokens of the longest held-out file."""
    tokens = lm.encode(held_out_documents()[TEXT])[:n]
    require(len(tokens) == n, f"{TEXT} has {len(tokens)} tokens; asked for {n}")
    return tokens


@torch.no_grad()
def measure_mass(lm: LanguageModel, *, n: int = 1024, size: int = 32) -> dict:
    """Share of the dense attention that each choice keeps, mean over layers, heads and queries.

    A late query keeps as many keys as its pattern allows, and 8 blocks of `size` where they are
    chosen. For a model on the CPU.
    """
    masks = {name: pattern.mask(n, n) for name, pattern in fixed_patterns(n).items()}
    sums = dict.fromkeys([*masks, "first token", "top 8 blocks, mean", "top 8 blocks, Quest",
                          "top 8 blocks, oracle"], 0.0)  # fmt: skip
    heads, n_layers = [], 0
    for q, k, scale in layers_inputs(lm.model, held_out_tokens(lm, n)[None]):
        p = probabilities(q, k, scale=scale)
        n_layers += 1
        for name, mask in masks.items():
            sums[name] += float(mass_recall(p, mask).mean())
        first = mass_recall(p, torch.arange(n) == 0)
        sums["first token"] += float(first.mean())
        heads.append([round(x, 4) for x in first[0].tolist()])
        may, every = grids(Causal(), n, n, size, size)
        exact = block_mass(p, size, size, k.shape[1]).masked_fill(~may, -torch.inf)
        best = chosen_blocks(exact, may, 8, None, n, n, size, size)
        lists = {
            "top 8 blocks, oracle": lists_of(best, every.expand_as(best), n, n, size, size)
        } | {
            f"top 8 blocks, {label}": top_blocks(
                q, k, Causal(), n_blocks=8, tile_q=size, tile_k=size, score=score
            )
            for label, score in (("mean", "mean"), ("Quest", "quest"))
        }
        for name, chosen in lists.items():
            live = chosen.live().repeat_interleave(size, -1).repeat_interleave(size, -2)
            mask = live.repeat_interleave(q.shape[1] // k.shape[1], 1)
            sums[name] += float(mass_recall(p, mask).mean())
    return {
        "n": n,
        "block": size,
        "kept": {name: total / n_layers for name, total in sums.items()},
        "first_token_by_layer_and_head": heads,
    }


# Sinks, and what is forgotten


def measure_sinks(
    lm: LanguageModel, *, n: int, window: int, sinks: tuple[int, ...], segment: int = 128
) -> dict:
    """Nats a token, segment by segment, with caches of one size and more or fewer sinks."""
    tokens = held_out_tokens(lm, n)
    rows = []
    for n_sinks in sinks:
        total = window + 4
        cache = RollingCache(lm.config, window=total - n_sinks, n_sinks=n_sinks)
        nats = stream_nats(lm.model, tokens, cache, step=64)
        rows.append(_nats_row({"n_sinks": n_sinks, "cache": total}, nats, segment, total))
    full = RollingCache(lm.config, window=n, n_sinks=0)  # forgets nothing
    nats = stream_nats(lm.model, tokens, full, step=64)
    rows.append(_nats_row({"n_sinks": None, "cache": n}, nats, segment, window + 4))
    return {"text": TEXT, "n": n, "segment": segment, "rows": rows}


def _nats_row(row: dict, nats: Tensor, segment: int, full: int) -> dict:
    """`evicting` counts from where a cache of `full` tokens has begun to forget."""
    row |= {
        "perplexity": float(nats.mean().exp()),
        "perplexity_evicting": float(nats[full:].mean().exp()),
        "nats": [round(float(part.mean()), 4) for part in nats.split(segment)],
    }
    print(row, flush=True)
    return row


@torch.no_grad()
def measure_needle(
    lm: LanguageModel, *, n: int, window: int, repeats: int, distances: tuple[int, ...]
) -> dict:
    """Share of a run of random tokens recalled from `distance` before, under each attention."""
    attends = {
        "dense": PatternAttend(Causal()),
        f"window {window + 4}": PatternAttend(SlidingWindow(window + 4)),
        f"window {window} + 4 sinks": PatternAttend(streaming(window, 4)),
        f"every other layer dense, window {window + 4}": PatternAttend(
            SlidingWindow(window + 4), Causal()
        ),
        "top 8 blocks of 32, mean": TopBlocksAttend(8, 32, always=streaming(32, 1)),
        "top 8 blocks of 32, Quest": TopBlocksAttend(8, 32, score="quest", always=streaming(32, 1)),
    }
    filler, rows = held_out_tokens(lm, n), []
    for distance in distances:
        rng = torch.Generator().manual_seed(distance)
        texts = [
            needle(filler[: distance + 64], length=24, at=64, n_vocab=lm.config.n_vocab, rng=rng)
            for _ in range(repeats)
        ]
        row = {"filler_between": distance, "recalled": {}}
        for name, attend in attends.items():
            read = partial(_logits, lm, attend)
            row["recalled"][name] = sum(recalled(read, text) for text in texts) / repeats
        rows.append(row)
        print(row, flush=True)
    return {"length": 24, "hints": 4, "repeats": repeats, "window": window, "rows": rows}


def _logits(lm: LanguageModel, attend, tokens: Tensor) -> Tensor:
    return lm.model(tokens[None], attend=attend)[0]


@torch.no_grad()
def measure_perplexity(lm: LanguageModel, *, n: int) -> dict:
    """Of the held-out text under stateless patterns, the text's own positions kept."""
    tokens = held_out_tokens(lm, n)
    fixed = {name: PatternAttend(pattern) for name, pattern in fixed_patterns(n).items()}
    found = {}
    for name, attend in {
        "dense": PatternAttend(Causal()),
        **fixed,
        "every other layer dense, window 64": PatternAttend(SlidingWindow(64), Causal()),
        "top 8 blocks of 32, mean": TopBlocksAttend(8, 32, always=streaming(32, 1)),
        "top 8 blocks of 32, Quest": TopBlocksAttend(8, 32, score="quest", always=streaming(32, 1)),
    }.items():
        logits = _logits(lm, attend, tokens[:-1])
        found[name] = float(F.cross_entropy(logits.double(), tokens[1:]).exp())
        print(name, found[name], flush=True)
    return {"text": TEXT, "n": n, "perplexity": found}


def measure_stream(lm: LanguageModel, *, n: int, window: int, segment: int = 4096) -> dict:
    """A text of tens of thousands of tokens, its held-out files end to end, in constant memory."""
    tokens = lm.encode("\n".join(held_out_documents().values()))[:n]
    cache = RollingCache(lm.config, window=window, n_sinks=4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    nats = stream_nats(lm.model, tokens, cache, step=64)
    return {
        "tokens": len(tokens),
        "window": window,
        "n_sinks": 4,
        "max_positions": lm.config.max_positions,
        "cache_bytes": cache.nbytes,
        "kv_bytes_if_all_were_kept": lm.config.kv_bytes_per_token(torch.float32) * len(tokens),
        "peak_resident_growth_bytes": 1024
        * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
        "segment": segment,
        "nats": [round(float(part.mean()), 4) for part in nats.split(segment)],
    }


def measure_model(name: str, part: str) -> dict:
    """One part of one model's measurements."""
    plan, lm = PLANS[name], load(name, device="cpu")
    sizes = {"n": plan["n"], "window": plan["window"]}
    match part:
        case "mass":
            return measure_mass(lm)
        case "sinks":
            return measure_sinks(lm, **sizes, sinks=plan["sinks"])
        case "needle":
            return measure_needle(lm, **sizes, repeats=plan["needles"], distances=plan["distances"])
        case "perplexity":
            return measure_perplexity(lm, n=1024)
        case "stream":
            return measure_stream(lm, n=plan["stream"], window=plan["window"])
    require(False, f"no such part: {part}")


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(PLANS), choices=list(PLANS))
    parts = ("cost", *PLANS["lab-target"]["parts"])
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    require(args.out.parent.is_dir(), f"the folder {args.out.parent} does not exist")
    torch.set_num_threads(1)
    results = json.loads(args.out.read_text()) if args.out.is_file() else {"models": {}}
    results |= {
        "format_version": 1,
        "room": "sparse_attention",
        "software": software_facts() | {"python": platform.python_version()},
        "cpu": {"name": cpu_name(), "threads": 1},
    }

    def save() -> None:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    for name in args.models:
        found = results["models"].setdefault(name, {})
        for part in PLANS[name]["parts"]:
            if part in args.parts and part not in found:
                print(name, part, flush=True)
                found[part] = measure_model(name, part)
                save()
    if "cost" in args.parts:
        measure_cost(results, save)


if __name__ == "__main__":
    main()
