"""Whole models that decode on quantized weights: speed, memory, and the same text as by hand."""

import gc
import json

import pytest
import torch

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.device import prepare_triton

pytest.importorskip("triton")
prepare_triton()

from llmopt_lab.core.errors import BadInput  # noqa: E402
from llmopt_lab.nn.config import ModelConfig  # noqa: E402
from llmopt_lab.nn.generate import KVCache, generate  # noqa: E402
from llmopt_lab.nn.transformer import Transformer  # noqa: E402
from llmopt_lab.quantization import decoding  # noqa: E402
from llmopt_lab.quantization.attend import use_kernels  # noqa: E402
from llmopt_lab.quantization.linear import CodedLinear  # noqa: E402
from llmopt_lab.quantization.model import quantize_model  # noqa: E402

SMALL = ModelConfig(
    n_vocab=90, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_head=16, d_ff=88
)  # fmt: skip


def small_model(device="cpu", dtype=torch.float32) -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = Transformer(SMALL)
    return model.to(device, dtype).requires_grad_(False).eval()


def test_a_model_that_dropped_its_codes_multiplies_as_before_and_says_what_is_gone():
    tokens = torch.arange(10).view(2, 5)
    model = quantize_model(small_model(), bits=4, group_size=32, progress=False)
    want = model(tokens)
    use_kernels(model, keep_codes=False)
    assert_close(model(tokens), want)
    layers = [m for m in model.modules() if isinstance(m, CodedLinear)]
    assert all(layer.nbytes == 0 for layer in layers)
    with pytest.raises(BadInput, match="keeps both"):
        _ = layers[0].weight
    eight = quantize_model(small_model(), method="w8a8", bits=8, progress=False)
    want = eight(tokens)
    assert_close(use_kernels(eight, keep_codes=False)(tokens), want)
    assert eight.layers[0].mlp.up_proj.packed is not None  # the kernel reads these themselves


def test_the_clock_counts_new_tokens_and_not_the_prompt(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(decoding.time, "process_time", lambda: next(ticks) / 4)
    monkeypatch.setattr(decoding, "PROMPT", 7)
    assert decoding.tokens_per_second(small_model(), n_new=5, runs=2) == 4
    with pytest.raises(BadInput, match="n_new > 1"):
        decoding.tokens_per_second(small_model(), n_new=1)


def test_a_run_is_written_row_by_row_and_replaces_this_machine_s_only(monkeypatch, tmp_path):
    monkeypatch.setattr(decoding, "_model", lambda name, device: (small_model(), False))
    monkeypatch.setattr(decoding, "pick_device", lambda: torch.device("cpu"))
    out = tmp_path / "decoding.json"
    other = {"hardware": {"name": "another"}, "models": {"lab-target": []}}
    out.write_text(json.dumps({"runs": [other]}))
    for _ in range(2):
        decoding.main(["--models", "lab-target", "--out", str(out)])
    kept, run = json.loads(out.read_text())["runs"]
    assert kept == other
    rows = {row["way"]: row for row in run["models"]["lab-target"]}
    assert list(rows) == list(decoding.ON_CPU)
    assert all(row["tokens_per_second"] > 0 and row["peak_bytes"] >= 0 for row in rows.values())
    held = [row["model_bytes"] for row in rows.values()]
    assert held[0] == sum(p.nbytes for p in small_model().parameters()) and held[1] < held[2]


def test_the_peak_is_what_torch_gave_out_at_once_to_the_byte():
    kept = torch.ones(1000)

    def run():
        a = torch.ones(2000)  # 8,000 bytes, gone before the rest
        del a
        b, c = torch.ones(1000), torch.ones(1500)
        kept.add_(b.sum() + c.sum())

    scalars = 256  # of three sums, each at most a piece of 64 bytes
    assert 10_000 <= decoding.allocated_peak(run) <= 10_000 + scalars
    assert decoding.allocated_peak(lambda: kept.add_(1)) <= scalars


def test_a_model_s_memory_is_its_own_whatever_ran_before(monkeypatch):
    monkeypatch.setattr(decoding, "_model", lambda name, device: (small_model(), False))
    cpu = torch.device("cpu")
    rows = {}
    for way in (*decoding.ON_CPU, *decoding.ON_CPU[::-1]):
        row = decoding.measure_way("lab-target", way, cpu, n_new=2)
        rows.setdefault(way, []).append((row["model_bytes"], row["peak_bytes"]))
    for first, again in rows.values():
        assert first == again
    model_bytes, peak = rows["4 bits, dequantized at each step"][0]
    assert peak - model_bytes > 4 * 88 * 64  # the largest weight as float32, beside its codes


def bytes_of(model) -> int:
    """Of all tensors that a model on the GPU holds, in the allocator's pieces of 512."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if getattr(module, "multiply", None) is not None:
            tensors += [x for x in module.multiply.keywords.values() if x is not None]
    pieces = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(-(-nbytes // 512) * 512 for nbytes in pieces.values())


@pytest.mark.gpu
def test_on_a_gpu_a_model_s_memory_is_its_own_whatever_ran_before(monkeypatch):
    def model_of(name, device):
        return small_model(device, torch.bfloat16), False

    def measure(way: str) -> tuple[int, ...]:
        row = decoding.measure_way("any", way, torch.device("cuda"), n_new=2)
        return row["model_bytes"], row["peak_bytes"], row["workspace_bytes"]

    monkeypatch.setattr(decoding, "_model", model_of)
    measure("float")  # the first capture of a session leaves the generator 1 kB
    rows = {way: measure(way) for way in decoding.ON_GPU}
    for way in decoding.ON_GPU[::-1]:
        assert measure(way) == rows[way], way
    torch.manual_seed(0)  # raises after a failed capture
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    model = quantize_model(model_of("any", "cuda")[0], bits=4, group_size=128, progress=False)
    memory = decoding.speed_and_memory(use_kernels(model, keep_codes=False), n_new=2)
    assert memory["model_bytes"] - before == bytes_of(model)
    assert memory["peak_bytes"] > memory["model_bytes"] + memory["workspace_bytes"]


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_decode_what_the_dequantized_model_decodes():
    model = quantize_model(small_model("cuda"), bits=4, group_size=32, progress=False)
    tokens = torch.arange(48, device="cuda").view(2, 24)
    want = model(tokens)
    use_kernels(model, keep_codes=False)
    assert_close(model(tokens), want)
    cache = KVCache(SMALL, max_tokens=24, device="cuda")
    steps = [model(t, cache.next_positions(1), attend=cache) for t in tokens[:1].split(1, 1)]
    assert_close(torch.cat(steps, 1), want[:1])
    assert len(generate(model, torch.arange(5), 8)) == 13


@pytest.mark.gpu
def test_a_step_is_timed_as_one_graph():
    model = quantize_model(
        small_model("cuda", torch.bfloat16), bits=4, group_size=32, progress=False
    )
    timing = decoding.step_ms(use_kernels(model), length=20)
    assert timing["step_timed_as"] == "graph" and timing["step_ms"] > 0


# --- as recorded


def recorded_rows(*, on_gpu: bool) -> list[tuple[str, dict[str, dict]]]:
    runs = json.loads(decoding.RESULTS.read_text())["runs"]
    (run,) = (run for run in runs if ("threads" not in run["hardware"]) == on_gpu)
    return [(name, {row["way"]: row for row in rows}) for name, rows in run["models"].items()]


def test_what_the_roundings_cost_was_recorded_with_every_trained_model():
    for on_gpu, ways in ((False, decoding.ON_CPU), (True, decoding.ON_GPU)):
        for name, rows in recorded_rows(on_gpu=on_gpu):
            if name != "llama-3-8b":  # random weights
                assert list(rows) == list(ways), name
                lost = {way: row["bits_per_byte"] for way, row in rows.items()}
                eight = next(way for way in ways if "int8" in way)
                assert lost["float"] < lost[eight] < lost["4 bits, dequantized at each step"]


def test_as_one_graph_four_bits_beat_float_and_hold_less_at_every_size():
    for name, rows in recorded_rows(on_gpu=True):
        four, whole = rows["4 bits, kernel"], rows["float"]
        assert four["step_timed_as"] == whole["step_timed_as"] == "graph"
        assert four["step_p80_ms"] < whole["step_p20_ms"], name
        assert four["peak_bytes"] < whole["peak_bytes"], name
