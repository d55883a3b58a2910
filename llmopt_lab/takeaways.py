"""The guide's seven key takeaways, each beside what was measured: `takeaways()`.

Numbers come from the results recorded in the rooms or are counted here; none is typed in.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from llmopt_lab.core.bench import load_results

HERE = Path(__file__).parent
CELL = "#cell-id=takeaway"  # of the lesson's cell that measures it


@dataclass(frozen=True)
class Takeaway:
    """One claim of the guide, corrected."""

    chapter: int
    room: str
    title: str
    guide: str
    measured: str

    @property
    def lesson(self) -> str:
        """The address of the measuring cell, from the folder of the notebooks."""
        return f"{self.chapter}_{self.room}.ipynb{CELL}"


def takeaways() -> list[Takeaway]:
    """All seven, in the guide's order. Cost: under a second."""
    claims = (
        ("Paged attention", "eliminates memory fragmentation", _paged_attention),
        ("Flash attention", "O(seq_len) memory, 4x faster", _flash_attention),
        ("Mixture of experts", "activate a subset of parameters (160x reduction)", _moe),
        ("Quantization", "4-16x memory reduction, 4-8x speedup", _quantization),
        ("Sparse attention", "O(seq_len) instead of O(seq_len²)", _sparse_attention),
        ("Distillation", "smaller, faster models with 97% accuracy", _distillation),
        ("Speculative decoding", "2-4x speedup for generation", _speculative_decoding),
    )
    return [
        Takeaway(number, measure.__name__[1:], title, guide, measure())
        for number, (title, guide, measure) in enumerate(claims, 1)
    ]


def as_markdown(found: list[Takeaway]) -> str:
    """The table that notebook 0 shows, with a link to each measuring cell."""
    rows = ["| the guide says | measured |", "|---|---|"]
    for t in found:
        link = f"[Measured in lesson {t.chapter}]({t.lesson})"
        rows.append(f"| **{t.title}**: {t.guide} | {t.measured} {link} |")
    return "\n".join(rows)


def _paged_attention() -> str:
    from llmopt_lab.paged_attention.waste import ContiguousMemory, PagedMemory, replay, workload

    rng = torch.Generator().manual_seed(3)  # lesson 1's workload
    jobs = workload(1500, mean_prompt=200, mean_new=200, longest=2048, rng=rng)
    reserved = replay(jobs, ContiguousMemory(65_536), n_steps=600, reserve=lambda job: 2048)
    blocks = replay(jobs, PagedMemory(65_536, 16), n_steps=600)
    return (
        "External fragmentation yes, internal no: with blocks of 16 tokens "
        f"{blocks.mean('internal_waste'):.1%} of the reserved slots stay empty, instead of "
        f"{reserved.mean('internal_waste'):.1%}. In the same memory {blocks.mean_running:.0f} "
        f"requests run at a time instead of {reserved.mean_running:.0f}."
    )


def _flash_attention() -> str:
    record = load_results("flash_attention")[0]
    rows = _rows(record, "forward, extra memory against length")
    both = [(r["size"]["n"], r["results"]["naive"], r["results"]["ours"]) for r in rows]
    short, *_, long = [row for row in both if "median_ms" in row[1]]
    memory, time = (
        [naive[key] / ours[key] for _, naive, ours in (short, long)]
        for key in ("extra_bytes", "median_ms")
    )
    return (
        "O(N) memory needs a backward pass that computes P again; the guide's code keeps more than "
        f"the standard one. No ratio is a constant: on an {_short(record)}, from {short[0]:,} to "
        f"{long[0]:,} tokens, naive attention takes {memory[0]:.0f} to {memory[1]:,.0f} times the "
        f"memory and {time[0]:.2f} to {time[1]:.1f} times as long as ours. On a CPU nearly nothing "
        "is gained."
    )


def _moe() -> str:
    from llmopt_lab.moe.sizes import PUBLISHED, ModelSize

    switch, mixtral = (ModelSize.from_hf(PUBLISHED[n]) for n in ("Switch-C", "Mixtral 8x7B"))
    shared = mixtral.bytes_read(16) / (2 * mixtral.total)
    return (
        f"Active weights are {switch.total / switch.active:.0f} times fewer in Switch-C and "
        f"{mixtral.total / mixtral.active:.1f} times in Mixtral. Memory is not reduced at all, and "
        f"a step of 16 users' tokens reads {shared:.0%} of Mixtral's weights."
    )


def _quantization() -> str:
    bits = 4 + 16 / 128
    record = load_results("quantization")[0]
    rows = _rows(record, "4-bit weights, group 128 (floor: packed codes and scales)")
    layer = [
        (row["size"]["n_tokens"], _times(row["results"], "unquantised", "ours")) for row in rows
    ]
    one, many = ([x for n, x in layer if n == tokens] for tokens in (1, 4096))
    runs = _measured("quantization", "decoding.json")["runs"]
    gpu = next(run for run in runs if "threads" not in run["hardware"])
    ways = {row["way"]: row for row in gpu["models"]["llama-3-8b"]}
    speed = ways["float"]["step_ms"] / ways["4 bits, kernel"]["step_ms"]
    return (
        f"4 bits in groups of 128 take {bits:.3f} bits: {16 / bits:.2f} times less than bfloat16, "
        f"{32 / bits:.2f} times less than float32. On an {_short(record)} a layer is "
        f"{min(one):.1f} to {max(one):.1f} times as fast at one token and {many[0]:.2f} times at "
        f"4,096; a whole model of Llama-3-8B's shape on an {_short(gpu)} decodes {speed:.2f} times "
        "as fast. Without a kernel it is many times slower."
    )


def _sparse_attention() -> str:
    measured = _measured("sparse_attention", "measured.json")
    cost = measured["cost"]["rows"]
    read = measured["models"]["lab-target"]["perplexity"]["perplexity"]
    record = load_results("sparse_attention")[0]
    dense = _rows(record, "dense, by the same kernel")[0]["results"]["ours"]["median_ms"]
    size = {"n": 16384, "window": 1024}
    rows = [row for row in _rows(record, "window, forward") if row["size"] == size]
    faster = dense / rows[0]["results"]["ours"]["median_ms"]
    grows = {name: f"N^{cost[name]['time_exponent']:.2f}" for name in ("dense", "window 128")}
    return (
        f"True of a window, done by blocks: time grows like {grows['window 128']} instead of "
        f"{grows['dense']} on a CPU, and on an {_short(record)} a window of {size['window']:,} of "
        f"{size['n']:,} tokens is {faster:.1f} times as fast as dense. It is another function: "
        f"lab-target's perplexity goes from {read['dense']:.2f} to {read['window 256']:.2f} with a "
        f"window of 256, and to {read['window 252 + 4 sinks']:.2f} if 4 of these are the first "
        "tokens."
    )


def _distillation() -> str:
    record = _measured("distillation", "students.json")
    run = record["runs"]["lab-student"]["distilled"]
    read = run["held_out"]["text"]
    speed = record["cpu"]["tokens_per_second"]
    fewer = 1 - run["parameters"] / run["teacher_parameters"]
    right = read["accuracy"] / read["teacher_accuracy"]
    return (
        "97 % is DistilBERT's share of its teacher's GLUE score: no accuracy, and no law. Our "
        f"lab-student has {fewer:.0%} fewer parameters than its teacher, decodes "
        f"{speed['lab-student'] / speed['lab-target']:.2f} times as fast on a CPU, predicts the "
        f"next token {right:.1%} as often right, and needs "
        f"{read['bits_per_byte'] / read['teacher_bits_per_byte'] - 1:.0%} more bits a byte."
    )


def _speculative_decoding() -> str:
    runs = _measured("speculative_decoding", "cpu.json")["runs"]
    found = [(row["speedup"], run["draft"], row["k"]) for run in runs for row in run["rows"]]
    worst, best = min(found), max(found)
    return (
        "The text stays the target's, exactly. Speed is tokens a call over what the guesses cost: "
        f"on one core of a CPU from {worst[0]:.2f} times ({worst[1]}) to {best[0]:.2f} times "
        f"({best[1]}, {best[2]} guesses). A full server loses."
    )


def _times(results: dict, slow: str, fast: str) -> float:
    """How many times as long the one takes as the other."""
    return results[slow]["median_ms"] / results[fast]["median_ms"]


def _rows(record: dict, title: str) -> list[dict]:
    return next(case["rows"] for case in record["cases"] if case["title"] == title)


def _measured(room: str, file: str) -> dict:
    return json.loads((HERE / room / "results" / file).read_text())


def _short(record: dict) -> str:
    # "H100" of "NVIDIA H100 80GB HBM3"
    return record["hardware"]["name"].split()[1]
