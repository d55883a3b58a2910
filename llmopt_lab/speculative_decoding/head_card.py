"""The folder of a trained draft head: weights, config, what was measured, and its card."""

import json
from pathlib import Path

import torch

from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.weights import load
from llmopt_lab.speculative_decoding.head import DraftHead
from llmopt_lab.speculative_decoding.measure import kept_share

# how each draft is judged on the beginnings of held-out files
RUNS = {
    "chain of 4, greedy": {"k": 4},
    "chain of 4, temperature 1": {"k": 4, "temperature": 1.0},
    "tree of 3, 2, 1, 1, greedy": {"widths": (3, 2, 1, 1), "proposals": "top"},
    "tree of 3, 2, 1, 1, temperature 1": {"widths": (3, 2, 1, 1), "temperature": 1.0},
}


def write_card(run: Path, folder: Path) -> None:
    """config.json, model.safetensors, training.json and README.md from what training left."""
    from safetensors.torch import save_file

    trained = torch.load(run / "trained.pt", weights_only=True)
    result = trained["result"]
    config = ModelConfig(**result["recipe"]["train"]["config"])
    head = DraftHead(config)
    head.load_state_dict(trained["weights"])
    head = head.requires_grad_(False).eval()
    target, draft = load(result["target"], device="cpu"), load("lab-draft", device="cpu")
    result["target_layers"] = target.config.n_layers
    result["decoding"] = {
        name: {
            who: kept_share(target, model, **how)
            for who, model in (("this head", head), ("lab-draft", draft.model))
        }
        for name, how in RUNS.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.contiguous() for name, weight in trained["weights"].items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config", config.to_hf()), ("training", result)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(render(result), encoding="utf-8")


def render(result: dict) -> str:
    """The card, Markdown with Hugging Face's header."""
    plan, environment = result["recipe"]["train"], result["environment"]
    config = ModelConfig(**plan["config"])
    steps = "".join(
        f"| {j + 1} | {x['overlap']:.3f} | {x['top1']:.3f} |\n"
        for j, x in enumerate(result["heldout"])
    )
    decoding = "".join(
        f"| {name} | "
        + " | ".join(
            f"{cells[who]['alpha']:.3f} | {cells[who]['tokens_per_target_call']:.2f}"
            for who in ("this head", "lab-draft")
        )
        + " |\n"
        for name, cells in result["decoding"].items()
    )
    curve = result["curve"]
    points = curve[:: max(1, len(curve) // 8)]
    points += [] if points[-1] is curve[-1] else [curve[-1]]
    progress = "".join(
        f"| {p['step']:,} | {p['loss']:.3f} | "
        + " | ".join(f"{x['overlap']:.3f}" for x in p["heldout"])
        + " |\n"
        for p in points
    )
    ahead = len(result["heldout"])
    columns = " | ".join(f"step {j + 1}" for j in range(ahead))
    return f"""---
license: apache-2.0
language: [code]
tags: [python, eagle, speculative-decoding]
---

# {result["target"]}'s draft head

One layer that guesses what {result["target"]} will write, from {result["target"]}'s own features
(EAGLE, https://arxiv.org/abs/2401.15077). It has no embedding and no output head: it borrows both,
and it is of no use with any other model. `llmopt_lab/speculative_decoding/head.py` runs it.

{result["parameters"]:,} parameters in bfloat16: a layer of width {config.d_model} as the target has
{result["target_layers"]} of, and a matrix that joins a feature with a token's embedding.

## What it gets right

On {result["heldout_tokens"]:,} tokens of held-out Python (that of the lab models), each guess after
the ones before it were right. Acceptance is the mean of sum min(p, q), how often a guess is kept at
temperature 1; the last column is how often it is the target's likeliest token. The first step reads
the target's feature, the others the head's own.

| guess | acceptance | same likeliest token |
|---|---|---|
{steps}
In decoding, beside lab-draft (a model of its own with 2 layers), on 96 tokens after each of 8
held-out beginnings of 128 tokens: the share of judged guesses that was kept, and tokens a pass of
the target. In a tree most siblings are refused, whoever drafts: compare its tokens.

| | head: kept | head: tokens | lab-draft: kept | lab-draft: tokens |
|---|---|---|---|---|
{decoding}
## Training

`python -m llmopt_lab.speculative_decoding.train_head`; the whole recipe is that file.
{plan["steps"]:,} steps of {plan["batch"] * plan["context"]:,} tokens, {result["epochs"]:.1f} passes
over {result["train_tokens"] / 1e6:.1f} M tokens of the lab models' corpus (whole documents, drawn
at random), in {result["seconds"] / 60:.1f} minutes on {environment["name"]} with torch
{environment["torch"]}, which ran other jobs meanwhile. The loss is the cross-entropy to the
target's distribution, over {ahead} steps from each place.

| step | loss, nats | {columns} |
|---|---|{"---|" * ahead}
{progress}
The columns are acceptance on a part of the held-out text. All points are in training.json.
Data and licences: those of {result["target"]}, see its card.
"""
