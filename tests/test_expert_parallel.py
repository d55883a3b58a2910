"""Expert parallelism: four gloo processes, started once for all tests, and torchrun's two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from expert_parallel_ranks import DEAD_S, LATE_S, SCENARIOS, D, whole_layer

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.moe import expert_parallel, moe_layer
from llmopt_lab.moe.expert_parallel import experts_of

N_RANKS = 4
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of the four processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("expert_parallel_ranks.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(N_RANKS), folder],
            env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(N_RANKS)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=180)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0, 0, 0, -9], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(N_RANKS)]


def dense(x, router, w_gate_up, w_down, k):
    """Every expert on every token, in float64."""
    probabilities = (x @ router).softmax(1)
    weights, experts = probabilities.topk(k)
    if k > 1:
        weights = weights / weights.sum(1, keepdim=True)
    out = torch.zeros_like(x)
    for e in range(router.shape[1]):
        gate, up = (x @ w_gate_up[e]).chunk(2, 1)
        share = torch.where(experts == e, weights, 0.0).sum(1, keepdim=True)
        out = out + share * ((torch.nn.functional.silu(gate) * up) @ w_down[e])
    return out


def whole(layers):
    """The arguments of `moe_layer` from what each rank was given."""
    x, router, w_gate_up, w_down = zip(*layers, strict=True)
    return torch.cat(x), router[0], torch.cat(w_gate_up), torch.cat(w_down)


def assert_equal(got, want, what):
    """Within 1e-12, which issue and docstring promise: tighter than the table of tolerances."""
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("name", SCENARIOS)
def test_results_and_gradients_equal_one_processs_dense_loop(ranks, name):
    counts, n_experts, k = SCENARIOS[name]
    layer = [t.requires_grad_() for t in whole_layer(sum(counts), n_experts)]
    want = dense(*layer, k)
    wanted = torch.autograd.grad((want * torch.arange(1.0, D + 1)).sum(), layer)
    for first in range(0, N_RANKS, len(counts)):
        found = [ranks[first + r][name] for r in range(len(counts))]
        assert_equal(torch.cat([f["out"] for f in found]), want, "out")
        d_x, d_router, d_gate_up, d_down = zip(*(f["grads"] for f in found), strict=True)
        assert_equal(torch.cat(d_x), wanted[0], "d_x")
        assert_equal(sum(d_router), wanted[1], "d_router, summed over the ranks")
        assert_equal(torch.cat(d_gate_up), wanted[2], "d_w_gate_up")
        assert_equal(torch.cat(d_down), wanted[3], "d_w_down")


def test_all_tokens_may_visit_one_rank(ranks):
    outs, layers, grads = zip(*(rank["one-sided"] for rank in ranks), strict=True)
    x, router, w_gate_up, w_down = whole(layers)
    visited = (x @ router).topk(2).indices.unique().tolist()
    assert visited == list(experts_of(0, N_RANKS, 8)) == [0, 1]
    want = dense(x, router, w_gate_up, w_down, 2)
    assert_equal(torch.cat(outs), want, "out")
    for rank, (_, _, d_gate_up, d_down) in enumerate(grads):
        assert bool(d_gate_up.any()) == bool(d_down.any()) == (rank == 0)


def test_half_precision_logits_are_float32_as_in_one_process(ranks):
    outs, layers = zip(*(rank["large logits"] for rank in ranks), strict=True)
    layer = whole(layers)
    assert (layer[0] @ layer[1]).isinf().all()
    assert_close(torch.cat(outs), moe_layer(*layer, k=2))


def test_a_logit_that_is_infinite_is_refused_by_all(ranks):
    kinds, texts, _ = zip(*(rank["endless logits"] for rank in ranks), strict=True)
    assert kinds == ("BadInput",) * N_RANKS
    assert "a router logit is NaN or infinite" in texts[3]
    assert all("rank 3 was given bad input" in text for text in texts[:3])


def test_bad_input_of_one_rank_is_refused_by_all_and_nothing_is_left_hanging(ranks):
    kinds, texts, _ = zip(*(rank["bad input"] for rank in ranks), strict=True)
    assert kinds == ("BadInput",) * N_RANKS
    assert "x must be (n_tokens, 12); got (2, 11)" in texts[1]
    assert all("rank 1 was given bad input" in texts[r] for r in (0, 2, 3))
    kinds, texts, _ = zip(*(rank["other k"] for rank in ranks), strict=True)
    assert kinds == ("BadInput",) * N_RANKS
    assert "must be the same on all ranks; here [12, 8, 2], on rank 2 [12, 8, 1]" in texts[0]
    assert [rank["after"][0] for rank in ranks] == ["nothing"] * N_RANKS


def test_a_late_rank_ends_in_an_error_at_the_time_limit(ranks):
    for rank in ranks[:3]:
        kind, text, seconds = rank["late"]
        assert kind == "RankLost" and "another rank died or did not answer" in text
        assert LATE_S <= seconds < LATE_S + 1.5


def test_a_dead_rank_ends_in_an_error_within_the_time_limit(ranks):
    for rank in ranks[:3]:
        kind, text, seconds = rank["dead"]
        assert kind == "RankLost" and "another rank died or did not answer" in text
        assert seconds < DEAD_S + 1


def test_torchrun_starts_it_as_the_notebook_does(tmp_path):
    out = tmp_path / "ranks.json"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "llmopt_lab.moe.expert_parallel", "--n-experts", "5", "--out", str(out)),
    ]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    written = json.loads(out.read_text())
    assert [r["n_tokens"] for r in written["ranks"]] == [200, 400]
    assert [r["experts"] for r in written["ranks"]] == [[0, 2], [2, 5]]
    assert all(sum(r["sent_to"]) == 2 * r["n_tokens"] for r in written["ranks"])
    assert max(r["max_difference"] for r in written["ranks"]) <= 1e-12
    away = sum(r["sent_to"][1 - r["rank"]] for r in written["ranks"])
    assert f"{away:,} of 1,200 visits go to another rank" in result.stdout
    assert not result.stderr.replace("*", "").strip(), result.stderr


def test_the_recorded_run_on_two_gpus_equals_one_process_bit_for_bit():
    """Lesson 3 prints it beside its own two processes."""
    path = Path(expert_parallel.__file__).parent / "results/expert_parallel.json"
    recorded = json.loads(path.read_text())
    assert recorded["backend"] == "nccl"
    assert len(recorded["hardware"]) == 2
    assert [run["dtype"] for run in recorded["runs"]] == ["float64", "float32", "bfloat16"]
    for run in recorded["runs"]:
        assert [r["device"] for r in run["ranks"]] == ["cuda:0", "cuda:1"]
        assert all(sum(r["sent_to"]) == 2 * r["n_tokens"] for r in run["ranks"])
        assert sum(r["n_tokens"] for r in run["ranks"]) == recorded["sizes"]["n_tokens"]
        assert [r["max_difference"] for r in run["ranks"]] == [0, 0], run["dtype"]


def test_without_torchrun_it_says_how_to_start_it(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(BadInput, match="torchrun --standalone --nproc-per-node 2"):
        expert_parallel.start()


@pytest.mark.parametrize(("n_ranks", "n_experts"), [(1, 1), (4, 8), (4, 6), (4, 3), (3, 128)])
def test_every_expert_is_held_once_and_as_evenly_as_can_be(n_ranks, n_experts):
    held = [experts_of(rank, n_ranks, n_experts) for rank in range(n_ranks)]
    assert [e for experts in held for e in experts] == list(range(n_experts))
    sizes = [len(experts) for experts in held]
    assert max(sizes) - min(sizes) <= 1
    with pytest.raises(BadInput, match=r"rank must lie in \[0, 4\)"):
        experts_of(4, 4, 8)
