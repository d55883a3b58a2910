"""How lab-target's draft head was made: data, loss, loop, evaluation and card.

    python -m llmopt_lab.speculative_decoding.train_head corpus     # once: minutes of one core
    python -m llmopt_lab.speculative_decoding.train_head train      # the weights; minutes of a GPU
    python -m llmopt_lab.speculative_decoding.train_head card       # writes lab-target-head/

The text is that of the lab models (nn/corpus.py), a part of it, in the target's own tokens. The
target is frozen and reads each window once; the head learns to predict the target's distribution
of the next token, not the text. It is trained as it will be used: from each place it goes on for
several tokens on its own features, and each of these steps is part of the loss. A run that was cut
off goes on from its last checkpoint when started again.

Source: Li et al. 2024, EAGLE (https://arxiv.org/abs/2401.15077); the steps on its own features and
a loss on tokens alone are EAGLE-3's (Li et al. 2025, https://arxiv.org/abs/2503.01840).
"""

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from llmopt_lab.core.device import hardware_facts, pick_device, software_facts
from llmopt_lab.core.errors import require
from llmopt_lab.nn.corpus import read_tokens
from llmopt_lab.nn.train import Batches, Muon, Recipe, learning_rate, write_atomically
from llmopt_lab.nn.transformer import Transformer, causal_attention, rope_tables
from llmopt_lab.nn.weights import EMBEDDED, load
from llmopt_lab.speculative_decoding.head import FOLDER, DraftHead

TARGET = "lab-target"
N_TOKENS = 24_000_000  # of the corpus: whole documents in random order, up to this many
CORPUS, RUN = Path(".lab/head_corpus"), Path(".lab/runs/lab-target-head")


@dataclass(frozen=True)
class HeadRecipe:
    """All that decides a head: run twice on one machine, it gives one head up to rounding."""

    train: Recipe  # steps, batch, context, rates; its config is the head's
    n_ahead: int = 4  # steps from each place: one on the target's features, then on its own
    fade: float = 0.8  # weight of each such step over that of the one before


def recipe_for(target: Transformer, steps: int = 1_000) -> HeadRecipe:
    """The recipe of the head that ships."""
    config = replace(target.config, n_layers=1)
    return HeadRecipe(Recipe(config, steps=steps, batch=32, context=1024, weight_decay=0.05))


def toy(recipe: HeadRecipe) -> HeadRecipe:
    """Seconds on a CPU: the same shapes, next to no data."""
    small = dict(steps=6, batch=2, context=48, reports=3, held_out_every=1000)
    return replace(recipe, train=replace(recipe.train, **small), n_ahead=3)


# Loss


class Ahead:
    """Attention of a head that goes on from every place at once, a call a step.

    Row t of step j stands for the token j places after t, read after tokens 0 to t with the
    target's features and tokens t + 1 to t + j with the head's own. So it sees the rows up to t of
    step 0, and row t alone of each later step.
    """

    def __init__(self):
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float) -> Tensor:
        self.keys.append(k)
        self.values.append(v)
        n_steps, n = len(self.keys), q.shape[2]
        if n_steps == 1:
            return causal_attention(q, k, v, layer=layer, scale=scale)
        whole = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
        alone = torch.eye(n, dtype=torch.bool, device=q.device)
        group = q.shape[1] // k.shape[1]  # kernels that take a mask take no groups
        keys, values = (
            torch.cat(x, dim=2).repeat_interleave(group, dim=1) for x in (self.keys, self.values)
        )
        mask = torch.cat((whole, *[alone] * (n_steps - 1)), dim=1)
        return F.scaled_dot_product_attention(q, keys, values, mask, scale=scale)


def steps_ahead(
    head: DraftHead, target: Transformer, tokens: Tensor, features: Tensor, tables: list, n: int
) -> list[Tensor]:
    """The head's logits of each step, (batch, n_tokens - j, n_vocab) of step j.

    Args:
        tokens: (batch, n_tokens); features: (batch, n_tokens, d_model), the target's, of each.
        tables: `rope_tables` at the positions of each step.

    Row t of step j is about the token after token t + j.
    """
    attend, n_tokens = Ahead(), tokens.shape[1]
    last = F.pad(features, (0, 0, 1, 0))[:, :-1]  # of the token before each
    found = []
    for j in range(n):
        read = F.pad(tokens[:, j:], (0, j))  # the last j rows read past the end: nobody uses them
        last = head(last, target.embed_tokens(read), *tables[j], attend)
        found.append(target.logits(last[:, : n_tokens - j]))
    return found


def loss_of(
    head: DraftHead, target: Transformer, tokens: Tensor, tables: list, recipe: HeadRecipe
) -> Tensor:
    """Nats of the target's distribution under the head's, each step by its weight, over their sum.

    Its least value is not 0 but the target's entropy.
    """
    with torch.no_grad():
        features = target.hidden(tokens, *tables[0], causal_attention)
        p = target.logits(features).float().softmax(-1)
    logits = steps_ahead(head, target, tokens, features, tables, recipe.n_ahead)
    weights = [recipe.fade**j for j in range(recipe.n_ahead)]
    nats = [
        F.cross_entropy(rows.flatten(0, 1).float(), p[:, j:].flatten(0, 1))
        for j, rows in enumerate(logits)
    ]
    return sum(w * x for w, x in zip(weights, nats, strict=True)) / sum(weights)


def tables_of(recipe: HeadRecipe, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """`rope_tables` of each step: row t of step j is at position t + j."""
    positions = torch.arange(recipe.train.context, device=device)[None]
    return [
        rope_tables(recipe.train.config, positions + j, torch.float32)
        for j in range(recipe.n_ahead)
    ]


@torch.no_grad()
def acceptance(
    head: DraftHead, target: Transformer, windows: Tensor, recipe: HeadRecipe, batch: int = 8
) -> list[dict[str, float]]:
    """Of each step ahead, on (n, context) tokens: `overlap`, the mean of sum min(p, q), which is
    how often a guess is kept at temperature 1, and `top1`, how often it is when greedy."""
    tables = tables_of(recipe, windows.device)
    sums = torch.zeros(recipe.n_ahead, 2, dtype=torch.float64, device=windows.device)
    for tokens in windows.split(batch):
        features = target.hidden(tokens, *tables[0], causal_attention)
        p = target.logits(features).float().softmax(-1)
        for j, logits in enumerate(
            steps_ahead(head, target, tokens, features, tables, recipe.n_ahead)
        ):
            q, there = logits.float().softmax(-1), p[:, j:]
            sums[j, 0] += torch.minimum(there, q).sum(-1).mean(1).sum()
            sums[j, 1] += (there.argmax(-1) == q.argmax(-1)).double().mean(1).sum()
    return [{"overlap": overlap, "top1": top1} for overlap, top1 in (sums / len(windows)).tolist()]


# The loop


def train(recipe: HeadRecipe, corpus: Path, out: Path, target: Transformer, say=print) -> dict:
    """Train a head for `target`; go on from `out`/checkpoint.pt if it is there.

    Writes `out`/trained.pt: weights in bfloat16, and what training.json holds.
    """
    device, plan = target.device, recipe.train
    on_gpu = device.type == "cuda"
    out.mkdir(parents=True, exist_ok=True)
    unseen = torch.from_numpy(read_tokens(corpus / "heldout.tokens.xz").astype(np.int64))
    windows = unseen[: len(unseen) // plan.context * plan.context].view(-1, plan.context)
    windows = windows[:: plan.held_out_every].to(device)
    sample = windows[:: max(1, len(windows) // 16)]
    batches = Batches(read_tokens(corpus / "train.tokens.xz"), plan, device)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        head = DraftHead(plan.config)
    head = head.to(device)
    matrices = [w for w in head.parameters() if w.dim() == 2]
    norms = [w for w in head.parameters() if w.dim() == 1]
    optimizers = [
        Muon(matrices, lr=plan.matrix_lr, weight_decay=plan.weight_decay),
        torch.optim.AdamW(norms, lr=plan.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rates = [plan.matrix_lr, plan.other_lr]
    step, curve, seconds = 0, [], 0.0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.is_file():
        saved = torch.load(checkpoint, map_location=device)
        require(
            saved["recipe"] == asdict(recipe),
            f"{checkpoint} is of another recipe; delete it, or name another folder by --out",
        )
        head.load_state_dict(saved["head"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, curve, seconds = saved["step"], saved["curve"], saved["seconds"]
        say(f"goes on from step {step}")

    torch.set_float32_matmul_precision("high")
    loss = torch.compile(loss_of) if on_gpu else loss_of
    tables = tables_of(recipe, device)
    half = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)
    every = max(1, plan.steps // plan.reports)
    total = torch.zeros((), device=device)  # of the loss since the last report
    began = time.perf_counter() - seconds
    bar = tqdm(total=plan.steps, initial=step, unit="step", smoothing=0.05, mininterval=1)
    while step < plan.steps:
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * learning_rate(plan, step)
        with half:
            nats = loss(head, target, batches.at(step)[:, :-1], tables, recipe)
        nats.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), plan.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        total += nats.detach()
        step += 1
        bar.update()
        if step % every == 0 or step == plan.steps:
            n = (step - 1) % every + 1
            with half:
                kept = acceptance(head, target, sample, recipe)
            seconds = time.perf_counter() - began
            point = {"step": step, "loss": float(total) / n, "heldout": kept}
            curve.append(point | {"seconds": round(seconds, 1)})
            total.zero_()
            overlaps = " ".join(f"{x['overlap']:.3f}" for x in kept)
            bar.set_postfix_str(f"loss {point['loss']:.3f}, held-out acceptance {overlaps}")
            state = {
                "recipe": asdict(recipe),
                "head": head.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step,
                "curve": curve,
                "seconds": seconds,
            }
            write_atomically(checkpoint, state)
    bar.close()

    weights = {name: weight.bfloat16() for name, weight in head.state_dict().items()}
    head.load_state_dict(weights)  # what is published is what is measured
    torch.set_float32_matmul_precision("highest")
    result = {
        "recipe": asdict(recipe),
        "target": TARGET,
        "parameters": sum(weight.numel() for weight in head.parameters()),
        "train_tokens": len(batches.tokens),
        "tokens": plan.steps * plan.batch * plan.context,
        "epochs": plan.steps / batches.steps_per_epoch,
        "seconds": round(seconds, 1),
        "heldout_tokens": windows.numel(),
        "heldout": acceptance(head, target, windows, recipe),
        "environment": software_facts() | {"python": platform.python_version(), **hardware_facts()},
        "curve": curve,
    }
    weights = {name: weight.cpu() for name, weight in weights.items()}
    write_atomically(out / "trained.pt", {"weights": weights, "result": result})
    (out / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    say(f"held-out acceptance of each step: {result['heldout']}; wrote {out}")
    return result


def write_corpus(out: Path, say=print) -> None:
    """The part of this environment's corpus to train on and the held-out text, in lab-target's
    tokens: train.tokens.xz and heldout.tokens.xz."""
    from tokenizers import Tokenizer

    from llmopt_lab.nn import corpus

    out.mkdir(parents=True, exist_ok=True)
    packages, _ = corpus.find_packages()
    corpus.collect(packages)
    documents, held_out = corpus.split(packages)
    tokenizer = Tokenizer.from_file(str(EMBEDDED / TARGET / "tokenizer.json"))
    order = np.random.default_rng(0).permutation(len(documents))
    tokens = corpus.encode_documents(tokenizer, [documents[i] for i in order])
    starts = np.flatnonzero(tokens == 0)
    if N_TOKENS < starts[-1]:
        tokens = tokens[: starts[np.searchsorted(starts, N_TOKENS)]]
    corpus.write_tokens(out / "train.tokens.xz", tokens)
    unseen = corpus.encode_documents(tokenizer, held_out)
    corpus.write_tokens(out / "heldout.tokens.xz", unseen)
    say(f"{len(tokens) / 1e6:.1f} M tokens to train on, {len(unseen) / 1e3:.0f} k held out")


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["corpus", "train", "card"])
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="its folder")
    parser.add_argument("--out", type=Path, help="folder to write to")
    parser.add_argument("--run", type=Path, default=RUN, help="of `card`: what training wrote")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--toy", action="store_true", help="everything small")
    given = parser.parse_args(arguments)
    if given.what == "corpus":
        write_corpus(given.out or given.corpus)
    elif given.what == "train":
        target = load(TARGET, device=pick_device()).model
        recipe = recipe_for(target)
        recipe = toy(recipe) if given.toy else recipe
        if given.steps:
            recipe = replace(recipe, train=replace(recipe.train, steps=given.steps))
        train(recipe, given.corpus, given.out or RUN, target)
    else:
        from llmopt_lab.speculative_decoding.head_card import write_card

        write_card(given.run, given.out or FOLDER)


if __name__ == "__main__":
    main()
