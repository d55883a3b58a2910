"""Benchmarks as data: check every contender against the oracle, then time it beside its peers.

    llmopt bench paged_attention --out results.json

A room's `cases.py` holds `CASES`, a tuple of `Case`. Timings are GPU times of one call. Several
copies of the inputs, together several times the L2 cache, are visited in turn by calls captured
in one CUDA graph (where the contender can be captured), as the layers of a model follow each
other: every call reads cold memory, and launch gaps of Python stay out of the number. (Overwriting
the L2 before each call instead charges the call for writing those dirty lines back: about 16 us on
an H100.) The contenders take turns, so that a chip that gets hot slows all of them, and run for a
while before each turn's samples: near its power limit a chip's clock follows the power drawn in the
last tens of milliseconds, which would be the one before's. Reported: the median of the replays with
its 20th and 80th percentile. On a CPU, wall time of one input set. Raw samples go into the JSON, in
the order they were taken.
"""

import argparse
import datetime
import importlib
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.device import hardware_facts, pick_device, software_facts
from llmopt_lab.core.errors import BadInput, LabError, require
from llmopt_lab.core.memory import ceil_div

COLD_BYTES = 512 << 20  # several times the L2 of any supported GPU
MIN_SETS, MAX_SETS = 4, 32  # input sets a case is timed on
LONGEST = 0.1  # seconds of one sample: a slow contender visits fewer sets
HEAD_START = 2_000_000  # clock cycles, about a millisecond
TURNS = 6  # rounds in which the contenders of a row are timed
SECONDS = 0.3  # of samples for each contender
SETTLE = 0.1  # seconds a contender runs before its samples of a turn
FORMAT_VERSION = 1


class WrongResult(LabError, AssertionError):
    """A contender disagrees with the oracle, so it was not timed."""


@dataclass(frozen=True)
class Contender:
    """One implementation. `prepare(*inputs)` does the untimed set-up and returns the call to time.

    `prepare` raises `Missing` (or ImportError) when a peer is not installed: it is then listed as
    absent. `ours` marks the kernel the course teaches.
    """

    name: str
    prepare: Callable[..., Callable[[], Tensor | tuple[Tensor, ...]]]
    ours: bool = False


@dataclass(frozen=True)
class Case:
    """What to compare, on which inputs, and what the work costs at least.

    sizes:     keyword arguments of `inputs`, one dict a row of the table
    inputs:    (device, **size) -> the tensors every contender gets
    oracle:    (*inputs) -> the right result, in float32 or float64
    flops:     (**size) -> floating-point operations of one call
    min_bytes: (**size) -> bytes any implementation must move: the roofline's floor
    """

    title: str
    sizes: tuple[dict, ...]
    inputs: Callable[..., tuple]
    oracle: Callable[..., Tensor]
    contenders: tuple[Contender, ...]
    flops: Callable[..., int]
    min_bytes: Callable[..., int]
    cpu_sizes: tuple[dict, ...] = field(default=())  # what a machine without a GPU runs instead


@dataclass(frozen=True)
class Timing:
    """Medians and spread of one contender's call, in milliseconds, with the raw samples."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    how: str  # "graph", "stream" or "wall"
    samples_ms: tuple[float, ...]


class _Timer:
    """Takes samples of one contender: a call for each of its input sets."""

    def __init__(self, calls: Sequence[Callable[[], Tensor]], device: torch.device):
        self.calls = calls  # a graph replays addresses: what the calls hold must stay where it is
        self.n_calls = len(calls)
        self.samples: list[float] = []
        self.pause = False
        if device.type != "cuda":
            self.n_calls, self.how = 1, "wall"  # no cold memory to visit: one input set
            self.replay, self.least = calls[0], 1
            calls[0]()
            return
        for call in calls:
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        calls[0]()
        torch.cuda.synchronize()
        fit = int(LONGEST / (time.perf_counter() - start))
        self.calls = calls = calls[: max(MIN_SETS, fit)]
        self.n_calls = len(calls)
        self.replay, self.how = _capture(calls)
        self.least = ceil_div(20, TURNS)
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def take(self, seconds: float) -> None:
        """Samples for about `seconds`, at most a turn's share of 200."""
        start = time.perf_counter()
        while self.how != "wall" and time.perf_counter() - start < SETTLE:
            self._sample()
        start = time.perf_counter()
        for n in range(200 // TURNS):
            if n >= self.least and time.perf_counter() - start > seconds:
                break
            self.samples.append(self._sample())

    def _sample(self) -> float:
        if self.how == "wall":
            start = time.perf_counter()
            self.replay()
            return 1000 * (time.perf_counter() - start)
        begin, end = self.events
        if self.pause:
            torch.cuda._sleep(HEAD_START)
        begin.record()
        self.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / self.n_calls

    def timing(self) -> Timing:
        cuts = statistics.quantiles(self.samples, n=10, method="inclusive")
        samples = tuple(round(s, 5) for s in self.samples)
        return Timing(statistics.median(self.samples), cuts[1], cuts[7], self.how, samples)


def _take_turns(timers: Sequence[_Timer], seconds: float) -> None:
    """`seconds` of samples for each, in rounds that begin with another one each time.

    The order 0, 1, -1, 2, -2, .. shifted by the turn: nobody follows the same one every time.
    Where one cannot be captured, the GPU pauses before every sample of all: the host gets ahead
    and no launch is waited for, and nobody's chip is cooler.
    """
    pause = any(timer.how == "stream" for timer in timers)
    for timer in timers:
        timer.pause = pause
    zigzag = [(place + 1) // 2 * (-1) ** (place + 1) for place in range(len(timers))]
    for turn in range(TURNS):
        for step in zigzag:
            timers[(turn + step) % len(timers)].take(seconds / TURNS)


def time_calls(
    calls: Sequence[Callable[[], Tensor]], device: torch.device, *, seconds: float = SECONDS
) -> Timing:
    """Time of one of `calls`, which do the same work on input sets of their own.

    On a GPU all of them are captured into one CUDA graph and replayed: launch gaps of Python stay
    out, and when the sets together exceed the L2 several times, each call reads cold memory.
    """
    timer = _Timer(calls, device)
    _take_turns([timer], seconds)
    return timer.timing()


def _capture(calls: Sequence[Callable[[], Tensor]]) -> tuple[Callable[[], None], str]:
    """`calls` as one replayable CUDA graph; as they are where they cannot be captured."""
    graph = torch.cuda.CUDAGraph()

    def run() -> None:
        for call in calls:
            call()

    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            run()
    except Exception:  # noqa: BLE001  a peer that synchronises or allocates cannot be captured
        torch.cuda.set_stream(stream)  # torch stays on the one it captured from
        torch.cuda.synchronize()
        _end_failed_capture()
        return run, "stream"
    return graph.replay, "graph"


def _end_failed_capture() -> None:
    """Capture something that can be: a failed capture leaves torch's generator waiting for its end.

    Until a capture ends well, every torch.manual_seed and random tensor on the GPU raises.
    """
    one = torch.zeros(1, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        one += 1


@dataclass(frozen=True)
class Roofline:
    """The two ceilings, measured in the same run: what reading memory and multiplying can reach."""

    read_gb_s: float
    matmul_tflop_s: float

    def floor_ms(self, nbytes: int, flops: int) -> float:
        """Least possible time of a call that moves `nbytes` and computes `flops`."""
        return max(nbytes / self.read_gb_s / 1e6, flops / self.matmul_tflop_s / 1e9)


def measure_roofline(device: torch.device) -> Roofline:
    """Read bandwidth of a large sum, and the bf16 (float32 on a CPU) rate of a 4096^3 product."""
    on_gpu = device.type == "cuda"
    words = (4 << 30) // 4 if on_gpu else (256 << 20) // 4
    data = torch.randn(words, device=device)
    read = time_calls([data.sum], device)
    n, dtype = (4096, torch.bfloat16) if on_gpu else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    multiply = time_calls([lambda: a @ b] * 4, device)
    return Roofline(data.nbytes / read.median_ms / 1e6, 2 * n**3 / multiply.median_ms / 1e9)


Where = Callable[[str, dict], bool]  # (title of a case, one of its sizes) -> run it


def run_case(
    case: Case, device: torch.device, roofline: Roofline, where: Where | None = None
) -> dict:
    """Check and time every contender on every size, or on those `where` picks: JSON-ready rows."""
    rows = []
    for size in tqdm(_sizes(case, device, where), desc=case.title, unit="size", leave=False):
        inputs = case.inputs(device, **size)
        want = case.oracle(*inputs)
        n_sets = 1
        if device.type == "cuda":
            n_sets = max(MIN_SETS, min(MAX_SETS, ceil_div(COLD_BYTES, case.min_bytes(**size))))
        sets = [inputs] + [_copy(inputs) for _ in range(n_sets - 1)]
        floor = roofline.floor_ms(case.min_bytes(**size), case.flops(**size))
        results = _run_contenders(case.contenders, sets, want, device)
        for result in results.values():
            if "median_ms" in result:
                seconds = result["median_ms"] / 1e3
                result["gb_s"] = case.min_bytes(**size) / seconds / 1e9
                result["tflop_s"] = case.flops(**size) / seconds / 1e12
                result["share_of_roofline"] = floor / result["median_ms"]
        rows.append({"size": size, "floor_ms": floor, "n_sets": n_sets, "results": results})
        del inputs, sets, want
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "title": case.title,
        "ours": [c.name for c in case.contenders if c.ours],
        "rows": rows,
    }


def _sizes(case: Case, device: torch.device, where: Where | None) -> list[dict]:
    sizes = case.sizes if device.type == "cuda" else case.cpu_sizes
    return [size for size in sizes if where is None or where(case.title, size)]


def _copy(inputs: tuple) -> tuple:
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)


def _run_contenders(contenders, sets: list[tuple], want: Tensor, device) -> dict[str, dict]:
    """Check each, then time the right ones in turns: whoever ran alone would get a cooler chip."""
    results, timers = {}, {}
    for contender in contenders:
        prepared = _prepare(contender, sets, want, device)
        results[contender.name], timers[contender.name] = prepared
    timers = {name: timer for name, timer in timers.items() if timer}
    _take_turns([*timers.values()], SECONDS)
    for name, timer in timers.items():
        timing = timer.timing()
        results[name] = {
            "median_ms": timing.median_ms,
            "p20_ms": timing.p20_ms,
            "p80_ms": timing.p80_ms,
            "how": timing.how,
            "n_sets": timer.n_calls,
            **results[name],
            "samples_ms": timing.samples_ms,
        }
    return results


def _prepare(
    contender: Contender, sets: list[tuple], want: Tensor, device
) -> tuple[dict, _Timer | None]:
    """What one call took and how wrong it was, and its timer; or why it is absent, and None."""
    try:
        calls = [contender.prepare(*inputs) for inputs in sets]
        extra_bytes, got = _extra_bytes(calls[0], device)
        assert_close(got, want, contender.name)
        timer = _Timer(calls, device)
    except ImportError as absent:  # Missing is one
        return {"absent": str(absent)}, None
    except torch.OutOfMemoryError:
        return {"absent": "out of memory"}, None
    except AssertionError as wrong:
        if contender.ours:
            raise WrongResult(f"{contender.name} is wrong, so it was not timed. {wrong}") from wrong
        return {"absent": f"wrong result: {_first_line(wrong)}"}, None
    except (RuntimeError, AttributeError, TypeError) as refused:
        if contender.ours:
            raise
        return {"absent": f"refuses this input: {_first_line(refused)}"}, None
    max_error = (got.double() - want.double()).abs().max().item() if got.numel() else 0.0
    return {"extra_bytes": extra_bytes, "max_error": max_error}, timer


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]


def _extra_bytes(call: Callable, device: torch.device) -> tuple[int | None, Tensor]:
    """Most GPU memory that one call took, its result included, and the result, as one tensor."""
    if device.type == "cuda":
        call()  # compiles, and makes what is kept between calls
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    got = call()
    extra = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None
    return extra, torch.cat([x.flatten() for x in got]) if isinstance(got, tuple) else got


def run_room(
    room: str,
    *,
    device: torch.device | None = None,
    commit: str | None = None,
    where: Where | None = None,
    keep: Callable[[dict], None] = lambda results: None,
) -> dict:
    """Every case of a room, with the facts of the machine: what `llmopt bench` writes as JSON.

    `where(title, size)` picks some rows: a lesson cannot wait for all of them. `keep` is shown the
    results so far after every case: what was measured outlives a session that ends too early.

    Raises:
        BadInput: no such room, or `where` picks nothing.
        WrongResult: a kernel of ours is wrong.
    """
    try:
        cases = importlib.import_module(f"llmopt_lab.{room}.cases")
    except ModuleNotFoundError as missing:
        raise BadInput(f"no room called {room!r} has benchmarks") from missing
    device = device or pick_device()
    picked = [case for case in cases.CASES if _sizes(case, device, where)]
    require(
        bool(picked),
        f"`where` picks no row of {room}; its cases are {[case.title for case in cases.CASES]}",
    )
    roofline = measure_roofline(device)
    results = {
        "format_version": FORMAT_VERSION,
        "room": room,
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "hardware": hardware_facts(),
        "software": software_facts(),
        "roofline": {
            "read_gb_s": roofline.read_gb_s,
            "matmul_tflop_s": roofline.matmul_tflop_s,
        },
        "cases": [],
    }
    for case in picked:
        results["cases"].append(run_case(case, device, roofline, where))
        keep(results)
    return results


def _commit() -> str | None:
    """The commit of the working tree this package runs from, with + if it has changes."""
    here = Path(__file__).parent
    try:
        run = lambda *args: subprocess.run(  # noqa: E731
            ["git", "-C", here, *args], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = "+" if run("status", "--porcelain") else ""
        return run("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return None


def format_results(results: dict) -> str:
    """The table a person reads: ms, spread, GB/s, share of the roofline, and time over ours."""
    gpu = results["hardware"]["name"]
    roof = results["roofline"]
    versions = ", ".join(f"{k} {v}" for k, v in results["software"].items() if v)
    lines = [
        f"{results['room']} on {gpu}; {versions}; commit {results['commit']}",
        f"measured ceilings: read {roof['read_gb_s']:,.0f} GB/s, "
        f"matrix product {roof['matmul_tflop_s']:,.1f} TFLOP/s",
    ]
    header = f"  {'contender':24}{'ms':>9}{'p20..p80':>18}{'GB/s':>7}{'TFLOP/s':>9}{'roofline':>10}"
    header += f"{'extra MB':>10}{'/ ours':>8}"
    for case in results["cases"]:
        lines += ["", case["title"], header]
        for row in case["rows"]:
            lines.append(", ".join(_named(name, value) for name, value in row["size"].items()))
            times = {name: r["median_ms"] for name, r in row["results"].items() if "median_ms" in r}
            ours = min((times[name] for name in case["ours"] if name in times), default=None)
            for name, r in row["results"].items():
                if "absent" in r:
                    lines.append(f"  {name:24} absent: {r['absent']}")
                    continue
                spread = f"{r['p20_ms']:.4f}..{r['p80_ms']:.4f}"
                extra = f"{r['extra_bytes'] / 1e6:,.1f}" if r.get("extra_bytes") is not None else ""
                compared = ours is not None and name not in case["ours"]
                ratio = f"{times[name] / ours:.2f}x" if compared else ""
                lines.append(
                    f"  {name:24}{r['median_ms']:9.4f}{spread:>18}{r['gb_s']:7,.0f}"
                    f"{r['tflop_s']:9.2f}{r['share_of_roofline']:10.1%}{extra:>10}{ratio:>8}"
                )
    return "\n".join(lines)


def _named(name: str, value: int | bool) -> str:
    if isinstance(value, bool):
        return name if value else f"not {name}"
    return f"{name} {value:,}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `llmopt bench`."""
    parser.add_argument("room", help="for example paged_attention")
    parser.add_argument("--out", type=Path, help="write the results as JSON here")
    parser.add_argument("--commit", help="name of the commit, where git cannot tell")
    parser.add_argument("--cpu", action="store_true", help="the small CPU sizes even with a GPU")


def run(args: argparse.Namespace) -> int:
    """`llmopt bench ROOM`: print the table, write the JSON, to OUT.part until all is measured."""
    if args.out:
        require(args.out.parent.is_dir(), f"the folder {args.out.parent} does not exist")
        part = args.out.with_name(f"{args.out.name}.part")

    def keep(results: dict) -> None:
        if args.out:
            part.write_text(json.dumps(results, indent=1) + "\n")

    device = torch.device("cpu") if args.cpu else pick_device()
    results = run_room(args.room, device=device, commit=args.commit, keep=keep)
    print(format_results(results))
    if args.out:
        part.replace(args.out)
        print(f"written: {args.out}")
    return 0


def load_results(room: str) -> Sequence[dict]:
    """The recorded benchmarks that ship with the package: one dict a file in `<room>/results/`.

    A room may keep other measurements there; a benchmark is what has "cases".
    """
    folder = Path(__file__).parents[1] / room / "results"
    require(folder.is_dir(), f"no recorded results for {room!r}: {room}/results does not exist")
    recorded = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [results for results in recorded if "cases" in results]
