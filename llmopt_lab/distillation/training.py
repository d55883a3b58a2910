"""Train a student on labels, on a teacher's distributions, or on the teacher's view of its texts.

The data, the optimisers, the schedule and the evaluation are those of the lab models (nn/train.py).
A run that was cut off goes on from its last checkpoint when started again.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from llmopt_lab.core.errors import require
from llmopt_lab.core.trace import record
from llmopt_lab.distillation.divergences import DIVERGENCES
from llmopt_lab.distillation.on_policy import captured_write
from llmopt_lab.distillation.records import Stepped
from llmopt_lab.distillation.reference import (
    check_same_vocabulary,
    check_teacher,
    hard_rows,
    soft_rows,
)
from llmopt_lab.nn.train import Batches, Recipe, learning_rate, make_optimizers, write_atomically
from llmopt_lab.nn.transformer import Transformer, causal_attention, rope_tables


@dataclass(frozen=True)
class Method:
    """What a student learns from.

    soft_weight:  of the teacher's distributions; the labels have the rest. 0: labels alone, and the
                  teacher is never asked.
    temperature:  of the soft part, which is multiplied by its square.
    divergence:   a name of `DIVERGENCES`.
    on_policy:    share of a batch's tokens that the student writes itself (GKD's lambda).
    begin:        share of the steps before which the batch is all data: a student that cannot write
                  yet has nothing to learn from its own text.
    n_prompt:     tokens of data that it goes on from.
    n_new:        tokens that it writes.
    """

    soft_weight: float = 0.7
    temperature: float = 1.0
    divergence: str = "forward_kl"
    on_policy: float = 0.0
    begin: float = 0.0
    n_prompt: int = 64
    n_new: int = 192

    def __post_init__(self):
        for name in ("soft_weight", "on_policy", "begin"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} must lie in [0, 1]; got {value}")
        require(self.temperature > 0, f"temperature must be positive; got {self.temperature}")
        require(
            self.divergence in DIVERGENCES,
            f"no divergence {self.divergence!r}; there are {', '.join(DIVERGENCES)}",
        )
        require(
            self.on_policy == 0 or self.soft_weight > 0,
            "on policy the teacher is the only one who knows what comes next: soft_weight > 0",
        )
        require(
            self.n_prompt > 0 and self.n_new > 0,
            f"n_prompt and n_new must be positive; got {self.n_prompt} and {self.n_new}",
        )


def train(
    student: Transformer,
    teacher: Transformer,
    batches: Batches,
    recipe: Recipe,
    method: Method,
    *,
    checkpoint: Path | None = None,
    evaluate: Callable[[Transformer], float] | None = None,
    probe: Tensor | None = None,
    watch: Callable[[], None] | None = None,
    progress: bool = True,
) -> list[dict]:
    """Train `student` in place; one seed, recipe and method give one student, up to rounding.

    Args:
        student: float32 weights that require a gradient.
        teacher: of the same vocabulary, `as_teacher`, on the same device.
        batches: of the recipe's batch and context.
        recipe: steps, rates and seed; its config is not used.
        method: what to learn from.
        checkpoint: file to go on from if it is there, written at each report.
        evaluate: (student in evaluation mode) -> held-out bits per byte, at each report.
        probe: (n,) int64; record what both models expect after it, at each report.
        watch: called after each report, for example to show what was recorded so far.

    Returns:
        The curve, `recipe.reports` points: step, tokens, loss (what was minimised, mean since the
        last point), seconds, heldout_bits_per_byte.

    Raises:
        BadInput: other vocabularies, a teacher that is not quiet, a student that is frozen, a batch
            of which no row would be on policy, a checkpoint of another run.

    On a GPU in bfloat16 where that is safe, with the step compiled.
    """
    check_same_vocabulary(teacher, student)
    check_teacher(teacher)
    require(
        all(weight.requires_grad for weight in student.parameters()),
        "the student is frozen: student.requires_grad_()",
    )
    n_own = round(method.on_policy * recipe.batch)  # rows of a batch
    require(
        n_own > 0 or method.on_policy == 0,
        f"{method.on_policy} of {recipe.batch} rows is no row: raise on_policy or the batch",
    )
    n_text = method.n_prompt + method.n_new
    require(
        n_own == 0 or recipe.context % n_text == 0,
        f"n_prompt + n_new must divide the context, {recipe.context}, so that texts of both kinds "
        f"have as many tokens; got {method.n_prompt} + {method.n_new}",
    )
    device = student.device
    on_gpu = device.type == "cuda"
    optimizers = make_optimizers(student, recipe)
    rates = [[group["lr"] for group in o.param_groups] for o in optimizers]  # the full ones
    made_of = {"recipe": asdict(recipe), "method": asdict(method)}
    step, curve, seconds = 0, [], 0.0
    if checkpoint is not None and checkpoint.is_file():
        saved = torch.load(checkpoint, map_location=device)
        require(
            saved["made_of"] == made_of,
            f"{checkpoint} is of another recipe or method; delete it, or name another file",
        )
        student.load_state_dict(saved["student"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, curve, seconds = saved["step"], saved["curve"], saved["seconds"]

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    loss = torch.compile(loss_of, fullgraph=True, dynamic=False) if on_gpu else loss_of
    half = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)
    tables = {
        n: rope_tables(
            student.config, torch.arange(n, device=device)[None], torch.float32
        )  # the teacher may turn its heads otherwise
        + rope_tables(teacher.config, torch.arange(n, device=device)[None], torch.float32)
        for n in (recipe.context, n_text - 1)
    }
    writer = Writer(student, method) if n_own else None
    every = max(1, recipe.steps // recipe.reports)
    total = torch.zeros((), device=device)  # of the loss since the last report
    began = time.perf_counter() - seconds
    bar = tqdm(total=recipe.steps, initial=step, unit="step", mininterval=1, disable=not progress)
    while step < recipe.steps:
        student.train()
        for optimizer, full in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, full, strict=True):
                group["lr"] = rate * learning_rate(recipe, step)
        data = batches.at(step)
        own = n_own if step >= method.begin * recipe.steps else 0
        parts = [(data[own:], 0)]  # (tokens, places given)
        if own:
            prompts = data[:own, : recipe.context].reshape(-1, n_text)[:, : method.n_prompt]
            seed = 1_000_003 * recipe.seed + step
            parts.append((writer.write(prompts.contiguous(), seed), method.n_prompt))
        shares = [1 - own / recipe.batch, own / recipe.batch]
        for (tokens, n_given), share in zip(parts, shares, strict=False):
            if len(tokens) == 0:
                continue
            with half:
                part = share * loss(
                    student, teacher, tokens, tables[tokens.shape[1] - 1], method, n_given
                )
            part.backward()
            total += part.detach()
        torch.nn.utils.clip_grad_norm_(student.parameters(), recipe.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        bar.update()
        if step % every == 0 or step == recipe.steps:
            student.eval()
            seconds = time.perf_counter() - began
            point = {"step": step, "tokens": step * recipe.batch * recipe.context}
            point["loss"] = float(total) / ((step - 1) % every + 1)
            total.zero_()
            if evaluate is not None:
                with half:
                    point["heldout_bits_per_byte"] = evaluate(student)
            curve.append(point | {"seconds": round(seconds, 1)})
            if probe is not None:
                p, q = (next_token(model, probe) for model in (teacher, student))
                record(Stepped(step, point["loss"], p, q))
            if watch is not None:
                watch()
            bar.set_postfix_str(
                ", ".join(f"{k} {v:.3f}" for k, v in point.items() if isinstance(v, float))
            )
            if checkpoint is not None:
                state = {
                    "made_of": made_of,
                    "student": student.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "step": step,
                    "curve": curve,
                    "seconds": seconds,
                }
                write_atomically(checkpoint, state)
    bar.close()
    torch.set_float32_matmul_precision(precision)
    student.eval()
    return curve


def loss_of(
    student: Transformer, teacher: Transformer, tokens: Tensor, tables: tuple[Tensor, ...],
    method: Method, n_given: int,
) -> Tensor:  # fmt: skip
    """What is minimised on (rows, n + 1) tokens, nothing checked: for torch.compile.

    The first `n_given` tokens of a row are a prompt: what the student wrote follows, which has no
    labels. 0: all is data. Mean over the places that count, in nats.
    """
    cos, sin, teacher_cos, teacher_sin = tables
    first = max(0, n_given - 1)  # the last token given predicts the first one written
    read = tokens[:, :-1]
    x = student.hidden(read, cos, sin, causal_attention)
    logits = student.logits(x[:, first:])
    soft_weight = 1.0 if n_given else method.soft_weight
    loss = 0.0
    if soft_weight < 1:
        loss = (1 - soft_weight) * hard_rows(logits, tokens[:, 1:]).mean()
    if soft_weight > 0:
        with torch.no_grad():
            y = teacher.hidden(read, teacher_cos, teacher_sin, causal_attention)
            target = teacher.logits(y[:, first:])
        rows = soft_rows(logits, target, method.temperature, DIVERGENCES[method.divergence])
        loss = loss + soft_weight * method.temperature**2 * rows.mean()
    return loss


class Writer:
    """The student as an author: on a GPU a bfloat16 copy that follows it, its steps one graph."""

    def __init__(self, student: Transformer, method: Method):
        self.student, self.method = student, method
        on_gpu = student.device.type == "cuda"
        self.model = student
        if on_gpu:
            self.model = Transformer(student.config).to(student.device, torch.bfloat16)
            self.model.requires_grad_(False)
        self.rng = torch.Generator(student.device)
        self._write: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def write(self, prompts: Tensor, seed: int) -> Tensor:
        """(rows, n_prompt) -> (rows, n_prompt + n_new), drawn from the student as it is now."""
        if self.model is not self.student:
            for copy, weight in zip(
                self.model.parameters(), self.student.parameters(), strict=True
            ):
                copy.copy_(weight)
        if self._write is None:
            self._write = captured_write(self.model, prompts, n_new=self.method.n_new, rng=self.rng)
        self.rng.manual_seed(seed)
        return self._write(prompts)


@torch.no_grad()
def next_token(model: Transformer, tokens: Tensor) -> Tensor:
    """What the model expects after tokens (n,): (n_vocab,) float32."""
    return model(tokens[None].to(model.device), last_only=True)[0, -1].float().softmax(-1)
