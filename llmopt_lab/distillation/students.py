"""The students that ship: how each begins, what it learns from, and what it has kept.

    python -m llmopt_lab.distillation.students lab-student distilled      # a minute or two on a GPU
    python -m llmopt_lab.distillation.ship .lab/students                  # folders and results

The first reads the corpus that `python -m llmopt_lab.nn.train corpus` makes.
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llmopt_lab.core.device import hardware_facts, pick_device, software_facts
from llmopt_lab.core.errors import require
from llmopt_lab.distillation.evaluate import own_text, prompts_of, retained
from llmopt_lab.distillation.initialise import (
    fresh,
    keep_layers,
    neuron_importance,
    prune_neurons,
    thawed,
)
from llmopt_lab.distillation.reference import as_teacher
from llmopt_lab.distillation.training import Method, train
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.corpus import read_tokens
from llmopt_lab.nn.train import FAMILY, SMALL, Batches, HeldOut, Recipe, bits_per_byte
from llmopt_lab.nn.transformer import Transformer
from llmopt_lab.nn.weights import load

TEACHER = "lab-target"
FRESH = "random weights"
COMMON = dict(batch=64, context=1024, reports=40)


@dataclass(frozen=True)
class Student:
    """How a student begins, and the recipe of its training."""

    begin: Callable[[Transformer, Tensor], Transformer]  # from the teacher and some tokens
    recipe: Recipe
    begins_as: str


def _pruned(teacher: Transformer, tokens: Tensor) -> Transformer:
    return prune_neurons(teacher, neuron_importance(teacher, tokens.split(4)), D_FF)


SMALL_CONFIG = ModelConfig(**FAMILY, **SMALL, d_ff=320)
LAYERS = (0, 2, 5)
D_FF = 176  # of 704: as many parameters as with three of the six layers
STUDENTS = {
    "lab-student": Student(
        lambda teacher, _: keep_layers(teacher, LAYERS),
        Recipe(SMALL_CONFIG, steps=600, matrix_lr=0.01, other_lr=1.5e-3, **COMMON),
        f"layers {', '.join(map(str, LAYERS))} of {TEACHER}",
    ),
    "lab-pruned": Student(
        _pruned,
        Recipe(SMALL_CONFIG, steps=600, matrix_lr=0.01, other_lr=1.5e-3, **COMMON),
        f"the {D_FF} most active feed-forward neurons of each layer of {TEACHER}",
    ),
    "lab-student-small": Student(
        lambda teacher, _: fresh(SMALL_CONFIG, seed=0).to(teacher.device),
        Recipe(SMALL_CONFIG, steps=720, **COMMON),
        FRESH,
    ),
    "lab-draft": Student(
        lambda teacher, _: thawed(load("lab-draft", device=teacher.device).model),
        Recipe(SMALL_CONFIG, steps=800, matrix_lr=0.006, other_lr=9e-4, **COMMON),
        "lab-draft as it ships",
    ),
}
METHODS = {
    "labels": Method(soft_weight=0.0),
    "distilled": Method(soft_weight=0.7),
    "on_policy": Method(soft_weight=0.7, on_policy=0.5, begin=0.6, n_prompt=32, n_new=96),
}
VARIANTS = {  # beside the three: what temperature, mixing and divergence change
    "soft_alone": Method(soft_weight=1.0),
    "warm": Method(soft_weight=0.7, temperature=2.0),
    "soft_warm": Method(soft_weight=1.0, temperature=2.0),
    "jsd": Method(soft_weight=1.0, divergence="jsd"),
    "total_variation": Method(soft_weight=1.0, divergence="total_variation"),
}


def run(name: str, method: Method, recipe: Recipe, corpus: Path, out: Path, *, progress: bool):
    """Train one student, evaluate it as it ships (bfloat16), write `out`/trained.pt and .json."""
    device = pick_device()
    out.mkdir(parents=True, exist_ok=True)
    teacher = as_teacher(load(TEACHER, device=device).model)
    sizes = json.loads((corpus / "corpus.json").read_text())
    held_out = HeldOut(
        read_tokens(corpus / "heldout.tokens.xz"), tuple(sizes["heldout_document_bytes"])
    )
    batches = Batches(read_tokens(corpus / "train.tokens.xz"), recipe, device)
    student = STUDENTS[name].begin(teacher, batches.at(0)[:16, :-1]).requires_grad_()
    recipe = replace(recipe, config=student.config)
    sample = held_out.sample(16)
    before = None
    if STUDENTS[name].begins_as != FRESH:
        before = measure(as_teacher(student), teacher, held_out, recipe.context)
        student.requires_grad_()
    curve = train(
        student, teacher, batches, recipe, method,
        checkpoint=out / "checkpoint.pt", progress=progress,
        evaluate=lambda model: bits_per_byte(model, sample, recipe.context),
    )  # fmt: skip
    weights = {name: weight.bfloat16() for name, weight in student.state_dict().items()}
    student.load_state_dict(weights)  # what is published is what is measured
    as_teacher(student)
    result = {
        "student": name,
        "begins_as": STUDENTS[name].begins_as,
        "teacher": TEACHER,
        "method": asdict(method),
        "recipe": asdict(recipe),
        "parameters": student.config.n_parameters,
        "teacher_parameters": teacher.config.n_parameters,
        "tokens": recipe.steps * recipe.batch * recipe.context,
        "epochs": recipe.steps / batches.steps_per_epoch,
        "seconds": curve[-1]["seconds"],
        "before": before,
        "held_out": measure(student, teacher, held_out, recipe.context),
        "environment": software_facts() | {"python": platform.python_version(), **hardware_facts()},
        "curve": curve,
    }
    torch.save({"weights": {k: v.cpu() for k, v in weights.items()}}, out / "trained.pt")
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def measure(
    student: Transformer, teacher: Transformer, held_out: HeldOut, context: int
) -> dict[str, float | dict[str, float]]:
    """What the student kept: on held-out text, and along texts that student and teacher write."""
    found = {"text": retained(student, teacher, held_out, context=context)}
    prompts = prompts_of(held_out, 128, 64, student.device)
    for author in ("student", "teacher"):
        rng = torch.Generator(student.device).manual_seed(0)
        found[f"{author}_writes"] = own_text(
            student, teacher, prompts, n_new=128, rng=rng, author=author
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m llmopt_lab.distillation.students")
    parser.add_argument("student", choices=STUDENTS)
    parser.add_argument("method", choices=METHODS | VARIANTS)
    parser.add_argument("--corpus", type=Path, default=Path(".lab/corpus"), help="its folder")
    parser.add_argument("--out", type=Path, help="folder to write to")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--batch", type=int, help="instead of the recipe's")
    parser.add_argument("--context", type=int, help="instead of the recipe's")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    given = parser.parse_args(arguments)
    recipe = STUDENTS[given.student].recipe
    changes = {k: getattr(given, k) for k in ("steps", "batch", "context") if getattr(given, k)}
    recipe = replace(recipe, **changes)
    require(
        (given.corpus / "corpus.json").is_file(),
        f"{given.corpus} has no corpus.json; make it with: python -m llmopt_lab.nn.train corpus",
    )
    out = given.out or Path(".lab/students") / f"{given.student}-{given.method}"
    result = run(
        given.student,
        (METHODS | VARIANTS)[given.method],
        recipe,
        given.corpus,
        out,
        progress=not given.quiet,
    )
    text = result["held_out"]["text"]
    print(
        f"{given.student}, {given.method}: {text['bits_per_byte']:.4f} bits a byte "
        f"(teacher {text['teacher_bits_per_byte']:.4f}), next token {text['accuracy']:.4f} "
        f"(teacher {text['teacher_accuracy']:.4f}), overlap {text['overlap']:.4f}; wrote {out}"
    )


if __name__ == "__main__":
    main()
