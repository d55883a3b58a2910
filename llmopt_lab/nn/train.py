"""How the lab models were made: data, optimiser, schedule, loop and evaluation.

    python -m llmopt_lab.nn.train corpus            # once: text, tokenizer, tokens, baselines
    python -m llmopt_lab.nn.train lab-target        # the weights; at most 10 minutes on an H100
    python -m llmopt_lab.nn.train card lab-target   # the Hugging Face folder, on any CPU

`--toy` is the same recipe at a size for any CPU. A run that was cut off goes on from its last
checkpoint when started again. Training needs torch and numpy; the other two steps need tokenizers
and safetensors as well.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import log
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from llmopt_lab.core.device import hardware_facts, pick_device, software_facts
from llmopt_lab.core.errors import require
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.corpus import read_tokens
from llmopt_lab.nn.feed_forward import MixtureOfExperts, expert_load
from llmopt_lab.nn.transformer import Transformer, causal_attention, rope_tables

SEPARATOR = 0  # the token before each document


@dataclass(frozen=True)
class Recipe:
    """All that decides a model: run twice on one machine, it gives one model up to rounding."""

    config: ModelConfig
    steps: int
    batch: int = 128  # sequences a step
    context: int = 1024  # tokens a sequence
    matrix_lr: float = 0.02  # Muon's
    other_lr: float = 3e-3  # AdamW's: embeddings, norms, routers
    weight_decay: float = 0.1  # of the matrices
    warmup: float = 0.01  # share of the steps in which the rate rises from 0
    decay: float = 0.6  # share of the steps, the last, in which it falls to 0
    clip: float = 1.0  # of the gradient's norm
    balance: float = 0.01  # weight of the experts' balance loss
    seed: int = 0
    reports: int = 40  # points of the curve, each with a validation and a checkpoint
    held_out_every: int = 1  # measure on every so many-th held-out document


FAMILY = dict(
    n_vocab=4096, rope_theta=10_000.0, rms_eps=1e-5, max_positions=2048, tie_embeddings=True,
    bos=SEPARATOR, eos=(SEPARATOR,),
)  # fmt: skip
TARGET = dict(d_model=384, n_layers=6, n_heads=6, n_kv_heads=2, d_head=64, d_ff=704)
DRAFT = dict(d_model=128, n_layers=2, n_heads=4, n_kv_heads=2, d_head=32, d_ff=384)
SMALL = dict(d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, d_head=32)
RECIPES = {
    "lab-target": Recipe(ModelConfig(**FAMILY, **TARGET), steps=6_000),
    "lab-draft": Recipe(ModelConfig(**FAMILY, **DRAFT), steps=8_000),
    "lab-moe": Recipe(
        ModelConfig(**FAMILY, **SMALL, d_ff=160, n_experts=8, top_k=2), steps=5_000, balance=0.1
    ),
    "lab-dense": Recipe(ModelConfig(**FAMILY, **SMALL, d_ff=320), steps=5_000),
}


def toy(recipe: Recipe) -> Recipe:
    """The recipe with everything small: seconds on a CPU."""
    sizes = dict(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8, d_ff=48)
    small = dict(steps=60, batch=4, context=64, reports=6, held_out_every=20)
    return replace(recipe, config=replace(recipe.config, **sizes), **small)


# Data


class Batches:
    """The training text in windows; which window comes when depends on seed and step alone.

    Each epoch puts the documents in a new order, drops a random number of tokens, and cuts the rest
    into `batch` rows that are read from left to right.

    Args:
        tokens: (n,) uint16, SEPARATOR before each document.
    """

    def __init__(self, tokens: np.ndarray, recipe: Recipe, device: torch.device):
        self.batch, self.context, self.seed = recipe.batch, recipe.context, recipe.seed
        self.tokens = torch.from_numpy(tokens.astype(np.int16)).to(device)  # 4,096 fit
        self.starts = torch.from_numpy(np.flatnonzero(tokens == SEPARATOR)).to(device)
        ends = torch.cat((self.starts[1:], torch.tensor([len(tokens)], device=device)))
        self.lengths = ends - self.starts
        self.steps_per_epoch = (len(tokens) - self.context - 1) // (self.batch * self.context)
        require(
            self.steps_per_epoch > 0 and int(self.starts[0]) == 0,
            f"{len(tokens):,} tokens are too few for {self.batch} windows of {self.context}, or do "
            "not begin with a separator; build the corpus again, or use --toy",
        )
        self.epoch = -1

    def at(self, step: int) -> Tensor:
        """The batch of one step, (batch, context + 1) int64 on the device."""
        epoch, i = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self._shuffle(epoch)
        return self.rows[:, i * self.context : (i + 1) * self.context + 1].long()

    def _shuffle(self, epoch: int) -> None:
        rng = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        order = torch.randperm(len(self.starts), generator=rng).to(self.tokens.device)
        lengths = self.lengths[order]
        shift = self.starts[order] - (lengths.cumsum(0) - lengths)  # from new place to old
        n = len(self.tokens)
        old = torch.arange(n, device=shift.device) + shift.repeat_interleave(lengths, output_size=n)
        text = self.tokens[old]
        start = int(torch.randint(self.context, (1,), generator=rng))
        width = self.steps_per_epoch * self.context
        text = text[start : start + self.batch * width + 1]
        self.rows = text.unfold(0, width + 1, width)  # (batch, width + 1), overlapping by 1
        self.epoch = epoch


# Optimiser and schedule


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates: each direction of a matrix moves equally far.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". Takes
    matrices, or stacks of them, and decouples weight decay as AdamW does.
    """

    def __init__(self, matrices, *, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients."""
        for group in self.param_groups:
            momentum, lr = group["momentum"], group["lr"]
            same_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                same_shape.setdefault(weight.shape, []).append(weight)
            for (*_, n_rows, n_cols), weights in same_shape.items():
                updates = []
                for weight in weights:
                    state = self.state[weight]
                    if not state:
                        state["mean"] = torch.zeros_like(weight)
                    state["mean"].lerp_(weight.grad, 1 - momentum)
                    updates.append(
                        weight.grad.lerp(state["mean"], momentum)
                    )  # Nesterov's look ahead
                step = -lr * max(1, n_rows / n_cols) ** 0.5
                for weight, update in zip(
                    weights, orthogonalise(torch.stack(updates)), strict=True
                ):
                    weight.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=step)


def orthogonalise(matrices: Tensor) -> Tensor:
    """U V^T of each (..., rows, cols) matrix U S V^T, roughly: singular values of 0.7 to 1.2.

    Five Newton-Schulz steps with Jordan's coefficients; in bfloat16 on a GPU.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    wide = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return (wide if x.shape[-2] <= x.shape[-1] else wide.mT).to(matrices.dtype)


def make_optimizers(model: Transformer, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for all else: embeddings, norms, routers."""
    matrices, others = [], []
    for name, weight in model.named_parameters():
        hidden = weight.dim() >= 2 and name.startswith("layers.") and ".mlp.gate." not in name
        (matrices if hidden else others).append(weight)
    fused = others[0].is_cuda
    return [
        Muon(matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(
            others, lr=recipe.other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused
        ),
    ]


def learning_rate(recipe: Recipe, step: int) -> float:
    """Share of the full rate at a step: up, level, then linearly to zero at the end."""
    up = (step + 1) / max(1, recipe.warmup * recipe.steps)
    down = (recipe.steps - step) / max(1, recipe.decay * recipe.steps)
    return min(1.0, up, down)


# Loss and evaluation


def loss_of(model: Transformer, tokens: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Mean nats of tokens[:, 1:], and the experts' mean balance loss (0 without experts)."""
    x = model.hidden(tokens[:, :-1], cos, sin, causal_attention)
    nats = F.cross_entropy(model.logits(x).flatten(0, 1).float(), tokens[:, 1:].flatten())
    balances = [b.mlp.balance for b in model.layers if isinstance(b.mlp, MixtureOfExperts)]
    return nats, sum(balances) / len(balances) if balances else torch.zeros_like(nats)


@dataclass(frozen=True)
class HeldOut:
    """Held-out documents: their tokens in one row, SEPARATOR before each, and their bytes."""

    tokens: np.ndarray
    n_bytes: tuple[int, ...]  # of each document's text

    def sample(self, every: int) -> "HeldOut":
        """Every so many-th document."""
        number = (self.tokens == SEPARATOR).cumsum() - 1
        return HeldOut(self.tokens[number % every == 0], self.n_bytes[::every])


def windows(tokens: np.ndarray, context: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, end): read tokens[start:end - 1], predict tokens[first:end].

    Each document is read from its separator on; a window begins half a context after the one
    before and predicts what that did not, so all but a document's first tokens are predicted from
    at least half a context. Separators are given, never predicted.
    """
    starts = np.flatnonzero(tokens == SEPARATOR)
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        first = start + 1
        while first < end:
            last = min(start + context + 1, end)
            yield int(start), int(first), int(last)
            first, start = last, last - 1 - context // 2


@torch.no_grad()
def bits_per_byte(model: Transformer, held_out: HeldOut, context: int, batch: int = 16) -> float:
    """Bits that the model needs for a byte of held-out text, in its own precision."""
    nats = 0.0
    todo = list(windows(held_out.tokens, context))
    for i in range(0, len(todo), batch):
        part = todo[i : i + batch]
        tokens = torch.zeros(len(part), context + 1, dtype=torch.int64)
        predicted = torch.zeros(len(part), context, dtype=torch.bool)
        for row, (start, first, end) in enumerate(part):
            text = held_out.tokens[start:end].astype(np.int64)
            tokens[row, : end - start] = torch.from_numpy(text)
            predicted[row, first - start - 1 : end - start - 1] = True
        tokens, predicted = tokens.to(model.device), predicted.to(model.device)
        logits = model(tokens[:, :-1])[predicted]
        nats += float(F.cross_entropy(logits.double(), tokens[:, 1:][predicted], reduction="sum"))
    return nats / log(2) / sum(held_out.n_bytes)


@torch.no_grad()
def loads_of(model: Transformer, held_out: HeldOut, context: int) -> list[float]:
    """Busiest expert's load over the mean, of each layer; empty without experts."""
    experts: dict[int, list[Tensor]] = {}
    hooks = [
        block.mlp.register_forward_pre_hook(
            lambda mlp, x, i=i: experts.setdefault(i, []).append(mlp.route(x[0])[2].flatten())
        )
        for i, block in enumerate(model.layers)
        if isinstance(block.mlp, MixtureOfExperts)
    ]
    if not hooks:
        return []
    n = len(held_out.tokens) // context * context
    for row in torch.from_numpy(held_out.tokens[:n].astype(np.int64)).view(-1, 1, context):
        model(row.to(model.device))
    for hook in hooks:
        hook.remove()
    n_experts = model.config.n_experts
    return [
        float(expert_load(torch.cat(layer), n_experts).max()) * n_experts
        for layer in experts.values()
    ]


# The loop


def train(recipe: Recipe, corpus: Path, out: Path, say=print) -> dict:
    """Train one model; go on from `out`/checkpoint.pt if it is there. Writes `out`/trained.pt.

    Returns:
        What training.json holds: recipe, curve, held-out results, environment.
    """
    facts = corpus / "corpus.json"
    require(
        facts.is_file(),
        f"{facts} is missing; make it with: python -m llmopt_lab.nn.train corpus --corpus {corpus}",
    )
    sizes = json.loads(facts.read_text())
    recipe = replace(recipe, config=replace(recipe.config, n_vocab=sizes["n_vocab"]))
    device = pick_device()
    on_gpu = device.type == "cuda"
    out.mkdir(parents=True, exist_ok=True)
    held_out = HeldOut(
        read_tokens(corpus / "heldout.tokens.xz"), tuple(sizes["heldout_document_bytes"])
    )
    held_out = held_out.sample(recipe.held_out_every)
    sample = held_out.sample(8)
    batches = Batches(read_tokens(corpus / "train.tokens.xz"), recipe, device)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = Transformer(recipe.config)
    for block in model.layers:  # each layer begins as the identity
        for name, weight in block.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                torch.nn.init.zeros_(weight)
    model = model.to(device)
    optimizers = make_optimizers(model, recipe)
    rates = [[group["lr"] for group in o.param_groups] for o in optimizers]  # the full ones
    step, curve, seconds = 0, [], 0.0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.is_file():
        saved = torch.load(checkpoint, map_location=device)
        require(
            saved["recipe"] == asdict(recipe),
            f"{checkpoint} is of another recipe; delete it, or name another folder by --out",
        )
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, curve, seconds = saved["step"], saved["curve"], saved["seconds"]
        say(f"goes on from step {step}")

    torch.set_float32_matmul_precision("high")
    loss = torch.compile(loss_of, fullgraph=True) if on_gpu else loss_of
    positions = torch.arange(recipe.context, device=device)[None]
    cos, sin = rope_tables(recipe.config, positions, torch.float32)
    half = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)
    tokens_per_step = recipe.batch * recipe.context
    every = max(1, recipe.steps // recipe.reports)
    total = torch.zeros((), device=device)  # of the loss since the last report
    began = time.perf_counter() - seconds
    bar = tqdm(total=recipe.steps, initial=step, unit="step", smoothing=0.05, mininterval=1)
    while step < recipe.steps:
        model.train()
        for optimizer, full in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, full, strict=True):
                group["lr"] = rate * learning_rate(recipe, step)
        with half:
            nats, balance = loss(model, batches.at(step), cos, sin)
        (nats + recipe.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        total += nats.detach()
        step += 1
        bar.update()
        if step % every == 0 or step == recipe.steps:
            n = (step - 1) % every + 1
            point = {"step": step, "tokens": step * tokens_per_step, "loss": float(total) / n}
            seconds = time.perf_counter() - began
            model.eval()
            with half:
                point["heldout_bits_per_byte"] = bits_per_byte(model, sample, recipe.context)
            curve.append(point | {"seconds": round(seconds, 1)})
            total.zero_()
            rate = step * tokens_per_step / seconds
            bar.set_postfix_str(
                f"loss {point['loss']:.3f}, held out {point['heldout_bits_per_byte']:.3f} bits a "
                f"byte, {rate / 1e3:,.0f} k tokens/s"
            )
            state = {
                "recipe": asdict(recipe),
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step,
                "curve": curve,
                "seconds": seconds,
            }
            write_atomically(checkpoint, state)
    bar.close()

    weights = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    model.load_state_dict(weights)  # what is published is what is measured
    model.eval()
    torch.set_float32_matmul_precision("highest")
    result = {
        "recipe": asdict(recipe),
        "parameters": recipe.config.n_parameters,
        "active_parameters": recipe.config.n_active_parameters,
        "tokens": recipe.steps * tokens_per_step,
        "epochs": recipe.steps / batches.steps_per_epoch,
        "seconds": round(seconds, 1),
        "heldout_bits_per_byte": bits_per_byte(model, held_out, recipe.context),
        "expert_load_max_over_mean": loads_of(model, held_out, recipe.context),
        "environment": software_facts() | {"python": platform.python_version(), **hardware_facts()},
        "curve": curve,
    }
    weights = {name: weight.cpu() for name, weight in weights.items()}
    write_atomically(out / "trained.pt", {"weights": weights, "result": result})
    (out / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    say(f"{result['heldout_bits_per_byte']:.4f} bits a byte of held-out text; wrote {out}")
    return result


def write_atomically(file: Path, content: dict) -> None:
    """torch.save so that the file is whole or as before, whenever the process is killed."""
    part = file.with_suffix(".part")
    with part.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, file)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m llmopt_lab.nn.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=["corpus", "card", *RECIPES])
    parser.add_argument("model", nargs="?", choices=RECIPES, help="of `card`")
    parser.add_argument("--corpus", type=Path, default=Path(".lab/corpus"), help="its folder")
    parser.add_argument("--out", type=Path, help="folder to write to")
    parser.add_argument("--run", type=Path, help="of `card`: the folder that training wrote")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--toy", action="store_true", help="everything small")
    given = parser.parse_args(arguments)
    if given.what == "corpus":
        from llmopt_lab.nn.corpus import build

        build(given.out or given.corpus)
    elif given.what == "card":
        if given.model is None:
            parser.error("card needs the name of a model")
        run = given.run or Path(".lab/runs") / given.model
        from llmopt_lab.nn.model_card import write_card
        from llmopt_lab.nn.weights import EMBEDDED

        write_card(given.model, given.corpus, run, given.out or EMBEDDED / given.model)
    else:
        recipe = toy(RECIPES[given.what]) if given.toy else RECIPES[given.what]
        recipe = replace(recipe, steps=given.steps or recipe.steps)
        folder = f"{given.what}-toy" if given.toy else given.what
        train(recipe, given.corpus, given.out or Path(".lab/runs") / folder)


if __name__ == "__main__":
    main()
