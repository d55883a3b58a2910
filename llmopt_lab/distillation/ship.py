"""From training runs to what ships: each student's best model with its card, and all the curves.

    python -m llmopt_lab.distillation.ship .lab/students

Reads <runs>/<student>-<method>/{result.json,trained.pt}. Writes results/students.json, and
a Hugging Face folder for each student of SHIPPED.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch

from llmopt_lab.core.errors import require
from llmopt_lab.distillation.evaluate import retained
from llmopt_lab.distillation.students import METHODS, TEACHER
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.generate import generate
from llmopt_lab.nn.held_out import held_out_documents
from llmopt_lab.nn.model_card import PROMPTS, cpu_name, decode_speed
from llmopt_lab.nn.train import SEPARATOR, HeldOut
from llmopt_lab.nn.transformer import Transformer
from llmopt_lab.nn.weights import EMBEDDED, LanguageModel, load, save

RESULTS = Path(__file__).parent / "results" / "students.json"
SHIPPED = ("lab-student", "lab-student-small")
WAYS = {
    "labels": "labels alone",
    "distilled": "distilled: 0.7 teacher, 0.3 labels",
    "on_policy": "distilled, half of the later tokens its own",
}


def read_runs(runs: Path) -> dict[str, dict[str, dict]]:
    """student -> method -> result."""
    found: dict[str, dict[str, dict]] = {}
    for file in sorted(runs.glob("*/result.json")):
        result = json.loads(file.read_text())
        method = file.parent.name.removeprefix(result["student"] + "-")
        found.setdefault(result["student"], {})[method] = result
    for name in SHIPPED:
        missing = set(METHODS) - set(found.get(name, {}))
        require(not missing, f"{runs} lacks runs of {name}: {', '.join(sorted(missing))}")
    return found


def best_of(ways: dict[str, dict]) -> str:
    """The method of METHODS with the fewest held-out bits a byte."""
    return min(METHODS, key=lambda way: ways[way]["held_out"]["text"]["bits_per_byte"])


def ship(runs: Path, *, folders: Path = EMBEDDED, results: Path = RESULTS, say=print) -> None:
    """Write everything that ships. Speeds are this machine's, one thread, teacher and student."""
    found = read_runs(runs)
    teacher = load(TEACHER, device="cpu")
    speed = {TEACHER: round(decode_speed(teacher.model, threads=1), 1)}
    for name in SHIPPED:
        way = best_of(found[name])
        result = found[name][way]
        model = Transformer(ModelConfig(**_tuples(result["recipe"]["config"])))
        model.load_state_dict(torch.load(runs / f"{name}-{way}" / "trained.pt")["weights"])
        tokenizer = [
            EMBEDDED / TEACHER / file
            for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        ]
        save(model, folders / name, tokenizer)
        lm = load(folders / name, device="cpu")
        speed[name] = round(decode_speed(lm.model, threads=1), 1)
        completions = []
        for prompt in PROMPTS:
            tokens = lm.encode(prompt)
            text = lm.decode(generate(lm.model, tokens, 64, eos=lm.eos)[len(tokens) :])
            completions.append({"prompt": prompt, "completion": text})
        training = result | {
            "way": way,
            "heldout_bits_per_byte": result["held_out"]["text"]["bits_per_byte"],
            "cpu": {"name": cpu_name(), "threads": 1, "tokens_per_second": speed[name]} | busy(),
            "teacher_tokens_per_second": speed[TEACHER],
            "piece": retained(lm.model, teacher.model, piece(lm), context=1024, batch=2),
            "completions": completions,
        }
        (folders / name / "training.json").write_text(json.dumps(training, indent=1) + "\n")
        card = render(name, training, found[name])
        (folders / name / "README.md").write_text(card, encoding="utf-8")
        say(f"{name}: {way}, {training['heldout_bits_per_byte']:.4f} bits a byte")
    content = {
        "format_version": 1,
        "room": "distillation",
        "teacher": TEACHER,
        "cpu": {"name": cpu_name(), "threads": 1, "tokens_per_second": speed} | busy(),
        "shipped": {name: best_of(found[name]) for name in SHIPPED},
        "runs": found,
    }
    results.write_text(json.dumps(content, indent=1) + "\n")


def piece(lm: LanguageModel) -> HeldOut:
    """The first two held-out files that ship: small enough to measure on anew in a test."""
    texts = list(held_out_documents().values())[:2]
    rows = [[SEPARATOR, *lm.encode(text, add_special_tokens=False).tolist()] for text in texts]
    n_bytes = tuple(len(text.encode()) for text in texts)
    return HeldOut(np.array([*rows[0], *rows[1]], np.uint16), n_bytes)


def busy() -> dict[str, float | int]:
    """How much else this machine does: processes that want a core, and cores."""
    return {"load": round(os.getloadavg()[0], 1), "cores": os.cpu_count()}


def _tuples(config: dict) -> dict:
    """A config as JSON gave it back: lists were tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}


def render(name: str, training: dict, ways: dict[str, dict]) -> str:
    """The model card, Markdown with Hugging Face's header."""
    text = training["held_out"]["text"]
    recipe, environment = training["recipe"], training["environment"]
    parameters, of = training["parameters"], training["teacher_parameters"]
    rows = ""
    for way, words in WAYS.items():
        kept = ways[way]["held_out"]["text"]
        mark = ", this model" if way == training["way"] else ""
        rows += (
            f"| {words}{mark} | {kept['bits_per_byte']:.3f} | {kept['accuracy']:.1%} | "
            f"{kept['accuracy'] / kept['teacher_accuracy']:.1%} | {kept['overlap']:.3f} |\n"
        )
    rows += (
        f"| {TEACHER} | {text['teacher_bits_per_byte']:.3f} | {text['teacher_accuracy']:.1%} | "
        "100% | 1 |\n"
    )
    progress = "".join(
        f"| {p['step']:,} | {p['tokens'] / 1e6:,.1f} | {p['loss']:.3f} | "
        f"{p['heldout_bits_per_byte']:.3f} |\n"
        for p in [*training["curve"][3::4]]
    )
    completions = "".join(
        f"```python\n{c['prompt']}⟫{c['completion']}\n```\n\n" for c in training["completions"]
    )
    faster = training["cpu"]["tokens_per_second"] / training["teacher_tokens_per_second"]
    return f"""---
license: apache-2.0
language: [code]
tags: [python, llama, distillation]
---

# {name}

A small language model of Python source, distilled from {TEACHER} in the LLM Optimizations Lab. It
writes text that looks like Python; it is no assistant and its code is not to be trusted.

{parameters:,} parameters, {1 - parameters / of:.0%} fewer than its teacher's {of:,}
({of / parameters:.2f} times smaller). It began as {training["begins_as"]}. Weights are bfloat16.
Made by `python -m llmopt_lab.distillation.students {name} {training["way"]}`.

## What it kept

Three ways to learn from the same {training["tokens"] / 1e6:.1f} M tokens, measured on the same
held-out Python as the teacher. "of teacher" is next-token accuracy as a share of the teacher's;
overlap is the mean of sum min(p, q), the chance that sampled speculation keeps a guess.

| learned from | bits per byte | next token | of teacher | overlap |
|---|---|---|---|---|
{rows}
## Training

{training["tokens"] / 1e6:,.1f} M tokens, {training["epochs"]:.2f} passes over a part of what the
teacher was trained on, in {training["seconds"]:.0f} s on {environment["name"]} (beside other runs)
with torch {environment["torch"]}: {recipe["steps"]:,} steps of
{recipe["batch"] * recipe["context"]:,} tokens, seed {recipe["seed"]}. The last column is measured
on a part of the held-out text.

| step | M tokens | loss, nats | held out, bits per byte |
|---|---|---|---|
{progress}
All points are in training.json, those of the other two ways in the package's
distillation/results/students.json.

## Speed on a CPU

{training["cpu"]["tokens_per_second"]:,.0f} tokens per second, greedy, batch 1, with a KV cache,
float32, {training["cpu"]["threads"]} thread, {training["cpu"]["name"]}: {faster:.2f} times its
teacher's in the same run. The machine had a load of {training["cpu"]["load"]} on
{training["cpu"]["cores"]} cores: the ratio means more than the number.

## Greedy completions

The model's part begins at ⟫.

{completions}## Data and licences

As of {TEACHER}: a part of the same corpus.
"""


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m llmopt_lab.distillation.ship")
    parser.add_argument("runs", type=Path, help="folder of the training runs")
    given = parser.parse_args(arguments)
    require(given.runs.is_dir(), f"the folder {given.runs} does not exist")
    ship(given.runs)


if __name__ == "__main__":
    main()
