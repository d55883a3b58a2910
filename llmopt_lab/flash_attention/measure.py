"""Lesson 2's questions to a real model, asked of SmolLM2-135M: its notebook loads a smaller one.

    python -m llmopt_lab.flash_attention.measure

Writes results/measured.json: how well the model predicts a text with each attention, what the
guide's code in its last layer changes, and what one head costs from 512 to 32,768 tokens.
"""

import argparse
import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmopt_lab.core.device import software_facts
from llmopt_lab.core.errors import require
from llmopt_lab.flash_attention.cases import (
    cost_of,
    guides_flash_attention,
    layer_inputs,
    long_text,
)
from llmopt_lab.flash_attention.reference import flash_attention, naive_attention
from llmopt_lab.nn.model_card import cpu_name
from llmopt_lab.nn.transformer import Transformer, causal_attention
from llmopt_lab.nn.weights import load

RESULTS = Path(__file__).parent / "results" / "measured.json"
FIRST, N_PREDICTED = 9000, 768  # the passage of the text
MOST = {"naive": 4096, "guide's flash": 8192}  # tokens: memory, and time
LENGTHS = tuple(512 << i for i in range(7))


def _attend(attention: Callable[..., Tensor], q, k, v, *, layer: int, scale: float) -> Tensor:
    return attention(q, k, v, causal=True, scale=scale)


ATTENTIONS = {
    "torch's": causal_attention,
    "naive": partial(_attend, naive_attention),
    "flash": partial(_attend, partial(flash_attention, tile_q=128, tile_k=128)),
}


@torch.no_grad()
def nats_with_each(model: Transformer, text: Tensor) -> dict[str, float]:
    """Name of an attention -> nats a token of N_PREDICTED tokens."""
    tokens = text[FIRST : FIRST + N_PREDICTED + 1]
    found = {}
    for name, attend in ATTENTIONS.items():
        logits = model(tokens[None, :-1], attend=attend)[0]
        found[name] = float(F.cross_entropy(logits, tokens[1:]))
    return found


@torch.no_grad()
def moved_by_the_guide(
    model: Transformer, text: Tensor, lengths=(100, 128, 200, 500, 1000)
) -> dict[str, float]:
    """Tokens read -> the share of the next token's probability that the guide's code moves.

    It stands in the last layer alone and is asked for the last token, which may see everything.
    """
    config = model.config
    group = config.n_heads // config.n_kv_heads

    def guides_last(q, k, v, *, layer, scale):
        if layer < config.n_layers - 1:
            return causal_attention(q, k, v, layer=layer, scale=scale)
        k, v = (x[0].repeat_interleave(group, dim=0) for x in (k, v))
        return guides_flash_attention(scale * q[0], k, v)[None]

    found = {}
    for n in lengths:
        tokens = text[None, FIRST + 500 - n : FIRST + 500]
        right, wrong = (
            model(tokens, attend=attend, last_only=True)[0, -1].softmax(-1)
            for attend in (causal_attention, guides_last)
        )
        found[str(n)] = float((right - wrong).abs().sum() / 2)
    return found


def costs_of_a_head(model: Transformer, text: Tensor) -> list[dict]:
    """Milliseconds and peak bytes of one query head of the third layer: one call, causal."""
    q, k, v = (x[0] for x in layer_inputs(model, text[: LENGTHS[-1]], layer=2))
    scale = model.config.d_head**-0.5
    runs = {
        "naive": lambda q, k, v: naive_attention(q, k, v, causal=True),
        "guide's flash": lambda q, k, v: guides_flash_attention(scale * q[None], k[None], v[None]),
        "ours": lambda q, k, v: flash_attention(q, k, v, causal=True, tile_q=512, tile_k=512),
        "torch": lambda *x: scaled_dot_product_attention(
            *(t[None, None] for t in x), is_causal=True
        ),
    }
    rows = []
    for n in LENGTHS:
        x = [t[:n] for t in (q, k, v)]
        for name, attend in runs.items():
            if n <= MOST.get(name, n):
                attend(*x)  # allocates
                cost = cost_of(lambda: attend(*x))  # noqa: B023  called at once
                ms = round(1000 * cost.seconds, 3)
                rows.append({"n": n, "name": name, "ms": ms, "peak_bytes": cost.peak_nbytes})
                print(rows[-1], flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    require(args.out.parent.is_dir(), f"the folder {args.out.parent} does not exist")
    lm = load(args.model, device="cpu", dtype=torch.float32)
    asked = lm.model, lm.encode(long_text())
    results = {
        "format_version": 1,
        "room": "flash_attention",
        "software": software_facts() | {"python": platform.python_version()},
        "cpu": {"name": cpu_name(), "threads": torch.get_num_threads()},
        "model": args.model,
        "n_predicted": N_PREDICTED,
        "nats": nats_with_each(*asked),
        "moved": moved_by_the_guide(*asked),
        "costs": costs_of_a_head(*asked),
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
