"""What speculation gains on this CPU, beside what the model of its speed predicts.

    python -m llmopt_lab.speculative_decoding.measure        # minutes

Writes results/cpu.json. Greedy, one thread; every text is checked against plain decoding. Plain
decoding and all ways to speculate take turns, so that a machine that slows down slows all of them.
Seconds are the processor's, of this process: those in which it waits for a core do not count.
`kept_share` counts what drafts get accepted, in chains and trees, greedy and sampled: no clock.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from llmopt_lab.core.device import software_facts
from llmopt_lab.core.errors import LabError, require
from llmopt_lab.core.trace import recording
from llmopt_lab.nn.generate import generate
from llmopt_lab.nn.held_out import held_out_documents
from llmopt_lab.nn.model_card import cpu_name
from llmopt_lab.nn.transformer import Transformer
from llmopt_lab.nn.weights import LanguageModel, load
from llmopt_lab.speculative_decoding.drafts import PromptLookup, skip_layers
from llmopt_lab.speculative_decoding.head import DraftHead, HeadDraft, load_head
from llmopt_lab.speculative_decoding.reader import Reader
from llmopt_lab.speculative_decoding.records import Added, Guessed, Judged
from llmopt_lab.speculative_decoding.reference import Draft, speculative_decode
from llmopt_lab.speculative_decoding.speed import expected_tokens, speedup
from llmopt_lab.speculative_decoding.tree import speculative_decode_tree

RESULTS = Path(__file__).parent / "results" / "cpu.json"
N_NEW, REPEATS, K = 96, 5, range(1, 9)
IN_A_ROW = 4  # passes timed together: of a draft's in a round only the first finds its caches cold
TREES = ((2, 1, 1), (3, 2, 1, 1), (4, 2, 2, 1))  # children at each depth, for drafts that branch


def prompts(lm: LanguageModel) -> dict[str, Tensor]:
    """ "fresh": the first 128 tokens of a held-out file. "edit": a function and the beginning of it
    again, as an editor asks for a rewritten file."""
    documents = held_out_documents()
    name = max(documents, key=lambda name: len(documents[name]))
    code = documents[name]
    start = code.index("\n    def ", len(code) // 2)
    part = lm.decode(lm.encode(code[start:])[:160])
    return {
        "fresh": lm.encode(code)[:128],
        "edit": lm.encode(f"# before{part}\n\n# after{part[:40]}"),
    }


def in_turns(calls: dict[Hashable, Callable[[], object]], repeats: int) -> dict[Hashable, float]:
    """The median seconds of a processor in each call; they take turns, after one to warm up."""
    times: dict[Hashable, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {name: median(taken[1:]) for name, taken in times.items()}


def decode_with(
    target: Transformer, draft: Transformer | Draft | DraftHead, prompt: Tensor, *,
    n_new: int, k: int = 0, widths: tuple[int, ...] = (), **settings,
) -> Tensor:  # fmt: skip
    """A chain of k guesses a round, or a tree of `widths`, with any kind of draft."""
    reader = Reader(target, max_tokens=len(prompt) + n_new, n_nodes=64 if widths else 0)
    draft = HeadDraft(draft, reader) if isinstance(draft, DraftHead) else draft
    if widths:
        return speculative_decode_tree(
            reader, draft, prompt, widths=widths, n_new=n_new, **settings
        )
    return speculative_decode(reader, draft, prompt, k=k, n_new=n_new, **settings)


def kept_share(
    target: LanguageModel, draft: Transformer | Draft | DraftHead, *,
    n_prompts: int = 8, n_new: int = 96, temperature: float = 0.0, **how,
) -> dict[str, float]:  # fmt: skip
    """What of a draft's guesses is kept, on the beginnings of held-out files.

    Args:
        temperature: 0 is greedy.
        how: k=4 for chains, widths=(2, 2, 1) for trees, and other settings of the decoding.

    Returns:
        "alpha", the share of the judged guesses that was kept; "tokens_per_target_call", of the
        passes that judge, the one over the prompt included where it does.
    """
    judged = kept = rounds = 0
    for i, code in enumerate(sorted(held_out_documents().values())[:n_prompts]):
        prompt = target.encode(code)[:128]
        rng = torch.Generator().manual_seed(i)
        with recording(Added, Judged) as trace:
            decode_with(
                target.model, draft, prompt, n_new=n_new, temperature=temperature, rng=rng, **how
            )
        judged += len(trace.of(Judged))
        kept += sum(what.accepted for what in trace.of(Judged))
        rounds += len(trace.of(Added))
    return {
        "alpha": kept / max(1, judged),
        "tokens_per_target_call": n_prompts * n_new / rounds,
    }


def some_passes(
    target: Transformer, model: Transformer | DraftHead, prompt: Tensor, n: int
) -> Callable[[], object]:
    """IN_A_ROW passes of `n` tokens of the target or of a draft, each after the prompt."""
    reader = Reader(target, max_tokens=len(prompt) + n)
    if isinstance(model, DraftHead):
        reader = HeadDraft(model, reader)
    elif model is not target:
        reader = Reader(model, max_tokens=len(prompt) + n)
    reader.read(prompt.tolist(), n_last=1)
    tokens = prompt[torch.arange(n) % len(prompt)].tolist()

    def call() -> None:
        for _ in range(IN_A_ROW):
            reader.read(tokens, n_last=n)
            reader.rewind(len(prompt))

    return call


def measure(
    target: LanguageModel, name: str, draft: Transformer | Draft | DraftHead, prompt: Tensor, *,
    n_new: int = N_NEW, ks: Sequence[int] = K, repeats: int = REPEATS,
) -> dict:  # fmt: skip
    """One draft on one prompt: chains of every k, and if it is a model, TREES.

    Raises:
        LabError: a text is not that of plain decoding.
    """
    is_model = isinstance(draft, Transformer | DraftHead)
    chains = {k: {"k": k} for k in ks}
    trees = {widths: {"widths": widths, "proposals": "top"} for widths in TREES if is_model}
    ways = {
        how: partial(decode_with, target.model, draft, prompt, n_new=n_new, **settings)
        for how, settings in (chains | trees).items()
    }
    plain = partial(generate, target.model, prompt, n_new)
    text, rounds, verdicts, guesses = plain(), {}, {}, {}
    for how, decode in ways.items():
        with recording(Added, Judged, Guessed) as trace:
            if not torch.equal(decode(), text):
                raise LabError(f"{name}, {how}: another text than plain decoding's; do not time it")
        rounds[how] = len(trace.of(Added))
        verdicts[how] = [what.accepted for what in trace.of(Judged)]
        guesses[how] = sum(len(what.tokens) for what in trace.of(Guessed))
    seconds = in_turns({"plain": plain} | ways, repeats)

    n_rows = {how: how + 1 if how in chains else 1 + n_nodes(how) for how in ways}
    passes = {n: some_passes(target.model, target.model, prompt, n) for n in {1, *n_rows.values()}}
    if is_model:
        passes["draft"] = some_passes(target.model, draft, prompt, 1)
    of_pass = in_turns(passes, 10 * repeats)
    c = of_pass["draft"] / of_pass[1] if is_model else 0.0

    def found(how: int | tuple[int, ...]) -> dict:
        return {
            "alpha": sum(verdicts[how]) / max(1, len(verdicts[how])),
            "rounds": rounds[how],
            "tokens_per_target_call": n_new / rounds[how],
            "verify": of_pass[n_rows[how]] / of_pass[1],
            "speedup": seconds["plain"] / seconds[how],
        }

    result = {
        "draft": name,
        "c": c,
        "plain_tokens_per_second": n_new / seconds["plain"],
        "rows": [{"k": k, "guesses": guesses[k]} | predicted(found(k), k, c) for k in chains],
        "trees": [
            {"widths": list(widths), "nodes": n_nodes(widths)}
            | predicted_tree(found(widths), widths, c)
            for widths in trees
        ],
    }
    for row in result["rows"] + result["trees"]:
        print(
            f"{name}, {row.get('k', row.get('widths'))}: alpha {row['alpha']:.2f}, "
            f"{row['tokens_per_target_call']:.2f} tokens a call, speed-up {row['speedup']:.2f}, "
            f"predicted {row['speedup_predicted']:.2f}",
            flush=True,
        )
    return result


def n_nodes(widths: Sequence[int]) -> int:
    """Guesses of a tree with widths[i] children of each node at depth i."""
    return sum(prod(widths[: depth + 1]) for depth in range(len(widths)))


def predicted(row: dict, k: int, c: float) -> dict:
    """A chain's row with what the model of its speed says, from its alpha."""
    alpha, verify = row["alpha"], row["verify"]
    return row | {
        "tokens_predicted": expected_tokens(alpha, k),
        "speedup_predicted_verify_1": speedup(alpha, k, c),
        "speedup_predicted": speedup(alpha, k, c, verify=verify),
    }


def predicted_tree(row: dict, widths: Sequence[int], c: float) -> dict:
    """The same of a tree, from its tokens a call: alpha mixes siblings, so it predicts none. A
    pass of the draft over one depth counts as one of 1 token."""
    cost = len(widths) * c + row["verify"]
    return row | {"speedup_predicted": row["tokens_per_target_call"] / cost}


def drafts_of(
    target: LanguageModel, draft: LanguageModel
) -> dict[str, Transformer | Draft | DraftHead]:
    """Every kind of draft for the lab models."""
    return {
        "lab-draft": draft.model,
        "draft head": load_head(),
        "prompt lookup": PromptLookup(target.config.n_vocab),
        "layers 0 and 5 of lab-target": skip_layers(target.model, [0, 5]),
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    require(args.out.parent.is_dir(), f"the folder {args.out.parent} does not exist")
    torch.set_num_threads(1)
    target, draft = load("lab-target", device="cpu"), load("lab-draft", device="cpu")
    drafts = drafts_of(target, draft)
    found = [
        {"prompt": kind, "prompt_tokens": len(prompt), **measure(target, name, model, prompt)}
        for kind, prompt in prompts(target).items()
        for name, model in drafts.items()
    ]
    results = {
        "format_version": 1,
        "room": "speculative_decoding",
        "target": "lab-target",
        "n_new": N_NEW,
        "temperature": 0,
        "repeats": REPEATS,
        "clock": "time.process_time",
        "software": software_facts() | {"python": platform.python_version()},
        "cpu": {"name": cpu_name(), "threads": 1},
        "runs": found,
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
