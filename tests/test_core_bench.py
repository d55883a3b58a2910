"""Benchmarks: nothing wrong is timed, nothing absent is hidden, and the numbers add up."""

import json
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmopt_lab.cli import main
from llmopt_lab.core import bench
from llmopt_lab.core.bench import Case, Contender, Roofline, WrongResult
from llmopt_lab.core.errors import BadInput, Missing

CPU = torch.device("cpu")
ROOFLINE = Roofline(read_gb_s=10.0, matmul_tflop_s=0.1)


def doubled(x):
    return lambda: 2 * x


def case(*contenders: Contender) -> Case:
    return Case(
        title="double",
        sizes=(),
        cpu_sizes=({"n": 1000},),
        inputs=lambda device, n: (torch.linspace(-1, 1, n, device=device),),
        oracle=lambda x: x.double() * 2,
        contenders=(Contender("ours", doubled, ours=True), *contenders),
        flops=lambda n: n,
        min_bytes=lambda n: 8 * n,
    )


def results_of(*contenders: Contender) -> dict:
    (row,) = bench.run_case(case(*contenders), CPU, ROOFLINE)["rows"]
    return row["results"]


def test_rates_follow_from_the_median_and_the_sizes():
    ours = results_of()["ours"]
    seconds = ours["median_ms"] / 1e3
    assert ours["gb_s"] == pytest.approx(8000 / seconds / 1e9)
    assert ours["tflop_s"] == pytest.approx(1000 / seconds / 1e12)
    # 8,000 bytes at 10 GB/s take 0.8 us; 1,000 operations at 0.1 TFLOP/s take 0.01 us
    assert ours["share_of_roofline"] == pytest.approx(0.0008 / ours["median_ms"])
    assert ours["p20_ms"] <= ours["median_ms"] <= ours["p80_ms"]
    assert len(ours["samples_ms"]) >= 5 and ours["max_error"] == 0


def test_contenders_take_turns_and_each_begins_one():
    order = []

    def counted(name: str) -> Contender:
        return Contender(name, lambda x: lambda: order.append(name) or 2 * x)

    results = results_of(counted("a"), counted("b"))
    runs = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    warm_ups, turns = runs[:2], runs[2:]
    assert warm_ups == ["a", "b"] and len(turns) >= 2 * bench.TURNS - 3
    assert abs(order.count("a") - order.count("b")) < 200
    assert {len(results[name]["samples_ms"]) for name in ("a", "b")} <= {*range(6, 201)}


def test_no_contender_follows_the_same_one_in_every_turn(monkeypatch):
    timers = [bench._Timer([lambda: torch.zeros(1)], CPU) for _ in range(6)]
    order = []
    monkeypatch.setattr(bench._Timer, "take", lambda self, _: order.append(timers.index(self)))
    bench._take_turns(timers, 0.3)
    turns = [order[first : first + 6] for first in range(0, 36, 6)]
    assert all(sorted(turn) == [*range(6)] for turn in turns)
    assert sorted(turn[0] for turn in turns) == [*range(6)]
    pairs = [pair for turn in turns for pair in zip(turn, turn[1:], strict=False)]
    assert len(set(pairs)) == len(pairs) == 30  # each follows each of the others once


def test_what_a_contender_prepared_lives_until_its_last_turn():
    """A captured graph holds addresses only: freed, they belong to the next contender."""
    private = [torch.ones(3), torch.ones(3)]
    alive = [weakref.ref(x) for x in private]
    timer = bench._Timer([x.sum for x in private], CPU)
    del private
    assert all(x() is not None for x in alive), timer


def test_a_wrong_kernel_of_ours_stops_the_benchmark():
    wrong = Contender("ours too", lambda x: lambda: 2.001 * x, ours=True)
    with pytest.raises(WrongResult, match="ours too is wrong, so it was not timed"):
        results_of(wrong)


def test_a_wrong_peer_is_listed_and_not_timed():
    wrong = Contender("peer", lambda x: lambda: 2.001 * x)
    assert results_of(wrong)["peer"].keys() == {"absent"}
    assert results_of(wrong)["peer"]["absent"].startswith("wrong result")


def raise_(error):
    def prepare(x):
        raise error

    return prepare


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Missing("pip install peer"), "pip install peer"),
        (ModuleNotFoundError("No module named 'peer'"), "No module named 'peer'"),
        (RuntimeError("no kernel for this head size\nmore"), "refuses this input: no kernel for"),
        (torch.OutOfMemoryError("CUDA"), "out of memory"),
    ],
)
def test_an_absent_peer_is_listed_with_its_reason(error, reason):
    assert reason in results_of(Contender("peer", raise_(error)))["peer"]["absent"]


def test_a_row_with_nobody_to_time_lists_them_all():
    gone = Contender("ours", raise_(Missing("pip install it")), ours=True)
    nobody = replace(case(), contenders=(gone,))
    (row,) = bench.run_case(nobody, CPU, ROOFLINE)["rows"]
    assert row["results"] == {"ours": {"absent": "pip install it"}}


def test_an_error_in_our_own_kernel_is_not_swallowed():
    with pytest.raises(RuntimeError, match="broken"):
        results_of(Contender("ours too", raise_(RuntimeError("broken")), ours=True))


def test_the_table_shows_losses_like_wins():
    slow = Contender("slow peer", lambda x: lambda: sum([x] * 200) / 100)
    peers = case(slow, Contender("gone", raise_(Missing("x"))))
    results = {
        "room": "r", "hardware": {"name": "CPU"}, "software": {"torch": "2"}, "commit": None,
        "roofline": {"read_gb_s": 1, "matmul_tflop_s": 1},
        "cases": [bench.run_case(peers, CPU, ROOFLINE)],
    }  # fmt: skip
    rows = results["cases"][0]["rows"][0]["results"]
    rows["ours"]["median_ms"], rows["slow peer"]["median_ms"] = 2.0, 1.0
    table = bench.format_results(results)
    assert "0.50x" in table and "gone" in table and "absent: x" in table and "n 1,000" in table
    rows["ours"] = {"absent": "no GPU here"}
    (slow,) = (x for x in bench.format_results(results).splitlines() if "slow peer" in x)
    assert "x" not in slow


def test_a_room_without_benchmarks_is_refused():
    with pytest.raises(BadInput, match="no room called 'teapot' has benchmarks"):
        bench.run_room("teapot")
    with pytest.raises(BadInput, match="no recorded results for 'teapot'"):
        bench.load_results("teapot")


def test_a_lesson_times_only_the_rows_it_picks(monkeypatch):
    monkeypatch.setattr(bench, "measure_roofline", lambda device: ROOFLINE)
    results = bench.run_room("quantization", device=CPU, where=lambda title, size: "alone" in title)
    (only,) = results["cases"]
    assert only["title"].startswith("int8 product alone") and len(only["rows"]) == 1
    with pytest.raises(BadInput, match="picks no row of quantization; its cases are .'4-bit"):
        bench.run_room("quantization", device=CPU, where=lambda title, size: False)


def test_what_a_room_measured_otherwise_is_no_benchmark(tmp_path, monkeypatch):
    (tmp_path / "core").mkdir()
    (tmp_path / "teapot/results").mkdir(parents=True)
    (tmp_path / "teapot/results/h100.json").write_text('{"cases": []}')
    (tmp_path / "teapot/results/taste.json").write_text('{"models": {}}')
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "core/bench.py"))
    assert bench.load_results("teapot") == [{"cases": []}]


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "results.json"
    assert main(["bench", "distillation", "--cpu", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert bench.format_results(written) in capsys.readouterr().out
    assert written["software"]["torch"] == torch.__version__
    rows = [(c["ours"], row) for c in written["cases"] for row in c["rows"]]
    ours = [row["results"][name] for names, row in rows for name in names]
    assert len(ours) >= len(rows) >= 2 and all(r["max_error"] < 1e-4 for r in ours)


def test_a_run_that_ends_too_early_keeps_the_cases_it_has_measured(tmp_path, monkeypatch):
    out = tmp_path / "results.json"
    out.write_text("an older record")
    real, done = bench.run_case, []

    def stopped(*args):
        if done:
            raise KeyboardInterrupt
        done.append(real(*args))
        return done[0]

    monkeypatch.setattr(bench, "run_case", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(["bench", "distillation", "--cpu", "--out", str(out)])
    assert out.read_text() == "an older record"
    kept = json.loads((tmp_path / "results.json.part").read_text())
    assert [case["title"] for case in kept["cases"]] == [done[0]["title"]]


RECORDED = {
    f"{folder.parent.name} {results['hardware']['name']}": results
    for folder in sorted(Path(bench.__file__).parents[1].glob("*/results"))
    for results in bench.load_results(folder.parent.name)
}


def test_recorded_results_of_several_rooms_are_found():
    assert len(RECORDED) >= 6 and all(name.split()[2] in ("H100", "H200") for name in RECORDED)


@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED.keys())
def test_recorded_results_name_their_machine_and_hold_raw_samples(recorded):
    assert recorded["hardware"]["driver"]
    assert recorded["software"]["triton"] and recorded["commit"] and recorded["when"]
    for c in recorded["cases"]:
        for row in c["rows"]:
            timed = [r for r in row["results"].values() if "absent" not in r]
            assert all(len(r["samples_ms"]) >= 20 for r in timed)
            assert all("absent" not in row["results"][name] for name in c["ours"])


@pytest.mark.gpu
def test_a_gpu_timing_is_close_to_what_the_bandwidth_allows():
    device = torch.device("cuda")
    roofline = bench.measure_roofline(device)
    sets = [torch.randn(1 << 26, device=device) for _ in range(4)]  # 256 MiB each
    timing = bench.time_calls([x.sum for x in sets], device)
    assert timing.how == "graph"
    assert 0.7 < roofline.floor_ms(sets[0].nbytes, 0) / timing.median_ms < 1.1


@pytest.mark.gpu
def test_on_a_gpu_launches_do_not_count_where_no_graph_can_be_captured():
    device = torch.device("cuda")
    x = torch.ones(1 << 26, device=device)

    def call():
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("never in a graph")
        time.sleep(2e-4)  # the host's part, longer than the GPU's
        return x.sum()

    one, other = (bench.time_calls([f] * 4, device) for f in (call, x.sum))
    assert (one.how, other.how) == ("stream", "graph")
    assert one.median_ms < 1.5 * other.median_ms


@pytest.mark.gpu
def test_on_a_gpu_all_contenders_of_a_row_pause_where_one_must(monkeypatch):
    device = torch.device("cuda")
    x = torch.ones(1 << 24, device=device)

    def looks_at_the_cpu():
        return x.sum().item()

    pauses, who = {"one": 0, "other": 0}, []
    sleep = torch.cuda._sleep

    def counted(cycles):
        pauses[who[-1]] += 1
        sleep(cycles)

    monkeypatch.setattr(torch.cuda, "_sleep", counted)
    monkeypatch.setattr(bench, "SETTLE", 0)

    def timed(**calls):
        timers = {name: bench._Timer([call] * 4, device) for name, call in calls.items()}
        for name, timer in timers.items():
            take = timer.take
            timer.take = lambda seconds, name=name, take=take: (who.append(name), take(seconds))
        bench._take_turns([*timers.values()], 0.06)
        return {name: len(timer.samples) for name, timer in timers.items()}

    assert timed(one=x.sum, other=x.mean) and pauses == {"one": 0, "other": 0}
    assert timed(one=x.sum, other=looks_at_the_cpu) == pauses


@pytest.mark.gpu
def test_on_a_gpu_a_slow_contender_visits_fewer_input_sets_and_a_fast_one_all():
    device = torch.device("cuda")
    x = torch.ones(5, device=device)

    def slow():
        time.sleep(0.02)
        return x.tolist()

    assert bench._Timer([slow] * 32, device).n_calls in (bench.MIN_SETS, 5)
    assert bench._Timer([x.sum] * 32, device).n_calls == 32


@pytest.mark.gpu
def test_on_a_gpu_a_contender_reads_its_own_copy_in_every_turn():
    device = torch.device("cuda")
    kept = []

    def prepare(x):
        copy, out = x.clone(), torch.empty_like(x)  # freed, the copy's place goes to the next
        kept.append(out)
        return lambda: torch.mul(copy, 2, out=out)

    contenders = [Contender(name, prepare, ours=True) for name in ("a", "b", "c")]
    sets = [(torch.randn(1 << 24, device=device),) for _ in range(4)]
    bench._run_contenders(contenders, sets, 2 * sets[0][0], device)
    torch.cuda.synchronize()
    for out, (x,) in zip(kept, 3 * sets, strict=True):
        assert torch.equal(out, 2 * x)


@pytest.mark.gpu
def test_a_call_that_cannot_be_captured_leaves_generator_and_stream_as_they_were():
    device = torch.device("cuda")
    torch.manual_seed(3)
    torch.randn(5, device=device)
    state, stream = torch.cuda.get_rng_state(), torch.cuda.current_stream()
    want = torch.randn(5, device=device)
    torch.cuda.set_rng_state(state)
    x = torch.ones(5, device=device)

    def looks_at_the_cpu():
        return x * x.sum().item()

    assert bench.time_calls([looks_at_the_cpu], device).how == "stream"
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.randn(5, device=device), want)
    torch.manual_seed(3)
    assert bench.time_calls([x.sum], device).how == "graph"
