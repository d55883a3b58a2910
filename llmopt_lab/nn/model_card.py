"""A trained model as a Hugging Face folder with its model card: what was measured, and on what."""

import json
import platform
import time
from pathlib import Path

import torch

from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.generate import generate
from llmopt_lab.nn.transformer import Transformer
from llmopt_lab.nn.weights import load, save

PROMPTS = (
    "def fibonacci(n):\n",
    "import os\nimport sys\n\ndef main():\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "def read_json(path):\n    with open(path) as f:\n",
    "for i in range(10):\n",
    "import numpy as np\n\nx = np.",
    "def test_addition():\n    assert ",
    "try:\n    value = int(text)\nexcept",
    'def is_prime(n):\n    """Return True if n is a prime number."""\n',
    "if __name__ == ",
)


# a dense model with as many active parameters, trained on the same tokens: its curve goes with it
DENSE_TWIN = {"lab-moe": "lab-dense"}


def decode_speed(model: Transformer, threads: int, n_new: int = 128) -> float:
    """Tokens a second of greedy decoding at batch 1 with a KV cache: the best of three runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        prompt = torch.arange(1, 65)
        generate(model, prompt, 8)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            generate(model, prompt, n_new)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return n_new / min(times)


def cpu_name() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_card(name: str, corpus: Path, run: Path, folder: Path) -> None:
    """The Hugging Face folder of a trained model: weights, tokenizer, training.json, README.md."""
    trained = torch.load(run / "trained.pt")
    result = trained["result"]
    model = Transformer(ModelConfig(**result["recipe"]["config"]))
    model.load_state_dict(trained["weights"])
    tokenizer = [
        corpus / file
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    ]
    save(model, folder, tokenizer)
    lm = load(folder, device="cpu")
    result["cpu"] = {
        "name": cpu_name(),
        "threads": 1,
        "tokens_per_second": round(decode_speed(lm.model, threads=1), 1),
    }
    result["completions"] = []
    for prompt in PROMPTS:
        tokens = lm.encode(prompt)
        text = lm.decode(generate(lm.model, tokens, 64, eos=lm.eos)[len(tokens) :])
        result["completions"].append({"prompt": prompt, "completion": text})
    twin = DENSE_TWIN.get(name, "")
    twins_run = run.parent / twin / "trained.pt"
    if twins_run.is_file():
        result["dense_twin"] = {"name": twin} | torch.load(twins_run)["result"]
    (folder / "training.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sizes = json.loads((corpus / "corpus.json").read_text())
    manifest = json.loads((corpus / "manifest.json").read_text())
    (folder / "README.md").write_text(render(name, result, sizes, manifest), encoding="utf-8")


def render(name: str, result: dict, sizes: dict, manifest: dict) -> str:
    """The model card, Markdown with Hugging Face's header."""
    recipe, environment, cpu = result["recipe"], result["environment"], result["cpu"]
    config = ModelConfig(**recipe["config"])
    shape = (
        f"{result['parameters']:,} parameters, {config.to_hf()['architectures'][0]}: "
        f"{config.n_layers} layers of width {config.d_model}, {config.n_heads} query heads and "
        f"{config.n_kv_heads} KV heads of {config.d_head}, feed-forward width {config.d_ff}, "
        f"{config.n_vocab:,} tokens, tied embeddings, {config.max_positions:,} positions."
    )
    experts = ""
    if config.n_experts:
        loads = ", ".join(f"{load:.2f}" for load in result["expert_load_max_over_mean"])
        experts = (
            f"Each layer has {config.n_experts} experts, a token visits {config.top_k}: "
            f"{result['active_parameters']:,} parameters are active. On held-out text the busiest "
            f"expert of each layer gets {loads} times the mean load.\n\n"
        )
    rows = {"this model": result["heldout_bits_per_byte"]}
    twin = result.get("dense_twin")
    if twin:
        what = f"{twin['name']}: dense, {twin['parameters']:,} parameters, the same tokens"
        rows[what] = twin["heldout_bits_per_byte"]
    rows |= sizes["bits_per_byte"]
    scores = "".join(f"| {what} | {bits:.3f} |\n" for what, bits in rows.items())
    curve = result["curve"]
    points = curve[:: max(1, len(curve) // 10)]
    points += [] if points[-1] is curve[-1] else [curve[-1]]
    progress = "".join(
        f"| {p['step']:,} | {p['tokens'] / 1e6:,.0f} | {p['loss']:.3f} | "
        f"{p['heldout_bits_per_byte']:.3f} |\n"
        for p in points
    )
    training = (
        f"{result['tokens'] / 1e6:,.0f} M tokens, {result['epochs']:.1f} passes over "
        f"{sizes['train_tokens'] / 1e6:.1f} M, in {result['seconds'] / 60:.1f} minutes on "
        f"{environment['name']} with torch {environment['torch']}: {recipe['steps']:,} steps of "
        f"{recipe['batch'] * recipe['context']:,} tokens, Muon for the matrices, AdamW for the "
        f"rest, seed {recipe['seed']}. The last column is measured on a part of the held-out text."
    )
    training += "".join(f" {note}" for note in result.get("notes", ()))
    completions = "".join(
        f"```python\n{c['prompt']}⟫{c['completion']}\n```\n\n" for c in result["completions"]
    )
    packages = ", ".join(
        f"{p['name']} {p['version']} ({p['licence']})" for p in manifest["packages"] if p["bytes"]
    )
    refused = "; ".join(f"{r['name']} ({r['why']})" for r in manifest["refused"])
    return f"""---
license: apache-2.0
language: [code]
tags: [python, llama]
---

# {name}

A small language model of Python source, made to be taken apart in the LLM Optimizations Lab. It
writes text that looks like Python; it is no assistant and its code is not to be trusted.

{shape}

Weights are bfloat16. Made by `python -m llmopt_lab.nn.train {name}`; the whole recipe is that file.

{experts}## Quality

Bits per byte on {sizes["heldout_bytes"]:,} bytes of Python that was never trained on
({", ".join(manifest["held_out"])}; near-duplicates of these files were kept out of training).
gzip and xz compress that text alone. The 5-gram model (interpolated, modified Kneser-Ney) has the
same tokens and the same training text as this model.

| | bits per byte |
|---|---|
{scores}
The model reads each file from its beginning, in windows of {recipe["context"]:,} tokens with half
a window of overlap.

## Training

{training}

| step | M tokens | training loss, nats | held out, bits per byte |
|---|---|---|---|
{progress}
All points are in training.json.

## Speed on a CPU

{cpu["tokens_per_second"]:,.0f} tokens per second, greedy, batch 1, with a KV cache, float32,
{cpu["threads"]} thread, {cpu["name"]}.

## Greedy completions

The model's part begins at ⟫.

{completions}## Data and licences

{sizes["train_files"]:,} files, {sizes["train_bytes"] / 1e6:.0f} MB, of the standard library and of
installed packages under permissive licences; manifest.json of the corpus lists every file. Used:
{packages}.

Refused for their licence: {refused}.
"""
