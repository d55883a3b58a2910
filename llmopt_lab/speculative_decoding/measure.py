"""What speculation gains on this CPU, beside what the model of its speed predicts.

    python -m llmopt_lab.speculative_decoding.measure        # on a quiet machine: minutes

Writes results/cpu.json. Greedy, one thread; every text is checked against plain decoding.
`kept_share` counts what drafts get accepted, in chains and trees, greedy and sampled: no clock.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
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
from llmopt_lab.speculative_decoding.records import Added, Guessed, Judged, Read
from llmopt_lab.speculative_decoding.reference import Draft, speculative_decode
from llmopt_lab.speculative_decoding.speed import expected_tokens, speedup
from llmopt_lab.speculative_decoding.tree import speculative_decode_tree

RESULTS = Path(__file__).parent / "results" / "cpu.json"
N_NEW, REPEATS, K = 96, 5, range(1, 9)


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


def median_seconds(call: Callable[[], Tensor], want: Tensor | None = None) -> float:
    """Of REPEATS calls after one to warm up; a result other than `want` ends the measurement."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        out = call()
        times.append(time.perf_counter() - start)
        if want is not None and not torch.equal(out, want):
            raise LabError("speculation wrote another text than plain decoding: do not time it")
    return median(times[1:])


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


def pass_seconds(model: Transformer | DraftHead, target: Transformer, prompt: Tensor, n: int):
    """One pass of `n` tokens after the prompt."""
    reader = Reader(target, max_tokens=len(prompt) + n)
    if isinstance(model, DraftHead):
        reader = HeadDraft(model, reader)
    elif model is not target:
        reader = Reader(model, max_tokens=len(prompt) + n)
    reader.read(prompt.tolist(), n_last=1)

    def call() -> Tensor:
        out = reader.read(prompt[:n].tolist(), n_last=n)
        reader.rewind(len(prompt))
        return out

    return min(median_seconds(call) for _ in range(3))


def measure(
    target: LanguageModel, name: str, draft: Transformer | Draft | DraftHead, prompt: Tensor
) -> dict:
    """One draft on one prompt at every k."""
    plain = generate(target.model, prompt, N_NEW)
    plain_s = median_seconds(lambda: generate(target.model, prompt, N_NEW))
    one = pass_seconds(target.model, target.model, prompt, 1)
    is_model = isinstance(draft, Transformer | DraftHead)
    c = pass_seconds(draft, target.model, prompt, 1) / one if is_model else 0.0
    rows = []
    for k in K:
        decode = partial(decode_with, target.model, draft, prompt, k=k, n_new=N_NEW)
        seconds = median_seconds(decode, plain)
        with recording(Added, Judged, Guessed, Read) as trace:
            decode()
        judged, rounds = trace.of(Judged), len(trace.of(Added))
        alpha = sum(what.accepted for what in judged) / max(1, len(judged))
        verify = pass_seconds(target.model, target.model, prompt, k + 1) / one
        rows.append(
            {
                "k": k,
                "alpha": alpha,
                "rounds": rounds,
                "guesses": sum(len(what.tokens) for what in trace.of(Guessed)),
                "tokens_per_target_call": N_NEW / rounds,
                "tokens_predicted": expected_tokens(alpha, k),
                "verify": verify,
                "speedup": plain_s / seconds,
                "speedup_predicted_verify_1": speedup(alpha, k, c),
                "speedup_predicted": speedup(alpha, k, c, verify=verify),
            }
        )
        row = rows[-1]
        print(
            f"{name}, k {k}: alpha {alpha:.2f}, {row['tokens_per_target_call']:.2f} tokens a call, "
            f"speed-up {row['speedup']:.2f}, predicted {row['speedup_predicted']:.2f}",
            flush=True,
        )
    return {"draft": name, "c": c, "plain_tokens_per_second": N_NEW / plain_s, "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    require(args.out.parent.is_dir(), f"the folder {args.out.parent} does not exist")
    torch.set_num_threads(1)
    target, draft = load("lab-target", device="cpu"), load("lab-draft", device="cpu")
    drafts = {
        "lab-draft": draft.model,
        "draft head": load_head(),
        "prompt lookup": PromptLookup(target.config.n_vocab),
        "layers 0 and 5 of lab-target": skip_layers(target.model, [0, 5]),
    }
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
        "software": software_facts() | {"python": platform.python_version()},
        "cpu": {"name": cpu_name(), "threads": 1},
        "runs": found,
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
