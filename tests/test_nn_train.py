"""The training recipe: its data, optimiser, evaluation, and a whole run that is killed half-way."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.nn import corpus, model_card, train
from llmopt_lab.nn.config import ModelConfig
from llmopt_lab.nn.train import RECIPES, Batches, HeldOut, Muon, bits_per_byte, toy
from llmopt_lab.nn.transformer import Transformer

CPU = torch.device("cpu")
TOY = replace(
    toy(RECIPES["lab-moe"]), steps=24, reports=6, batch=3, context=32, held_out_every=1, decay=1.0
)


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory) -> Path:
    """A corpus of a part of the standard library, so small that a validation takes no time."""
    out = tmp_path_factory.mktemp("corpus")
    stdlib = corpus.standard_library()
    wanted = r"(json/(tool|scanner)|sched|[a-c]\w*|typing)\.py"
    stdlib.paths = [path for path in stdlib.paths if re.fullmatch(wanted, path)]
    corpus.collect([stdlib])
    stdlib.kept = [d for d in stdlib.kept if d.name != "stdlib/argparse.py"]
    corpus.write_corpus([stdlib], [], out, n_vocab=500, say=lambda line: None)
    return out


# --- the shapes


def test_the_models_have_the_sizes_that_their_cards_promise():
    total = {name: recipe.config.n_parameters for name, recipe in RECIPES.items()}
    assert 8.5e6 < total["lab-target"] < 9e6
    assert 0.85e6 < total["lab-draft"] < 1e6
    assert 2 * sum(total.values()) < 40e6 - 5e6  # bytes in bfloat16, room left for students
    moe, dense = RECIPES["lab-moe"], RECIPES["lab-dense"]
    router = moe.config.n_layers * moe.config.d_model * moe.config.n_experts
    assert moe.config.n_active_parameters - router == dense.config.n_parameters
    same = replace(moe, config=dense.config, balance=dense.balance)  # only experts need balance
    assert same == dense  # the same tokens, the same recipe


# --- data


def text_of(lengths: list[int]) -> np.ndarray:
    """Documents of different lengths; every token but the separators is met once."""
    rows, n = [], 1
    for length in lengths:
        rows += [[0], range(n, n + length)]
        n += length
    return np.concatenate(rows).astype(np.uint16)


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=3, max_size=30),
    batch=st.integers(1, 4),
    context=st.integers(1, 9),
    seed=st.integers(0, 5),
)
def test_an_epoch_reads_each_token_at_most_once_and_nearly_all(lengths, batch, context, seed):
    tokens = text_of(lengths)
    recipe = replace(TOY, batch=batch, context=context, seed=seed)
    if len(tokens) < context * (batch + 1) + 1:
        return
    batches = Batches(tokens, recipe, CPU)
    for epoch in range(2):
        first = epoch * batches.steps_per_epoch
        inputs, targets = [], []
        for step in range(first, first + batches.steps_per_epoch):
            rows = batches.at(step)
            assert rows.shape == (batch, context + 1) and rows.dtype == torch.int64
            inputs += rows[:, :-1].flatten().tolist()
            targets += rows[:, 1:].flatten().tolist()
        for read in (inputs, targets):
            words = [token for token in read if token]
            assert len(words) == len(set(words))
        assert len(tokens) - len(inputs) < context * (batch + 1) + 1


def test_inside_a_document_tokens_keep_their_order_and_documents_change_theirs():
    tokens = text_of([30, 20, 40, 25, 35])
    batches = Batches(tokens, replace(TOY, batch=1, context=8, seed=3), CPU)
    orders = []
    for epoch in range(4):
        start = epoch * batches.steps_per_epoch
        rows = [batches.at(step)[0] for step in range(start, start + batches.steps_per_epoch)]
        for row, following in zip(rows, rows[1:], strict=False):
            assert row[-1] == following[0]  # the last target is the next window's first input
        read = torch.cat([row[:-1] for row in rows]).tolist()
        follows = dict(zip(read, read[1:], strict=False))
        assert all(later in (token + 1, 0) for token, later in follows.items() if token)
        first = [token for before, token in zip(read, read[1:], strict=False) if before == 0]
        assert set(first) <= {1, 31, 51, 91, 116}
        orders.append(tuple(first))
    assert len(set(orders)) > 1


def test_a_batch_depends_on_seed_and_step_alone():
    tokens = text_of([30, 20, 40, 25, 35])
    recipe = replace(TOY, batch=2, context=8)
    one, other = Batches(tokens, recipe, CPU), Batches(tokens, recipe, CPU)
    ahead = [one.at(step) for step in range(20)]
    assert all(torch.equal(other.at(step), ahead[step]) for step in (19, 3, 11))
    different = Batches(tokens, replace(recipe, seed=1), CPU)
    assert not all(torch.equal(different.at(step), ahead[step]) for step in range(20))


def test_too_little_text_is_refused():
    with pytest.raises(BadInput, match="too few"):
        Batches(text_of([10]), replace(TOY, batch=2, context=8), CPU)


# --- optimiser and schedule


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9), (3, 7, 12), (3, 12, 7)])
def test_orthogonalising_keeps_directions_and_evens_out_lengths(shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    got = train.orthogonalise(x)
    inside = u.mT @ got @ vh.mT  # diagonal where directions are kept
    lengths = inside.diagonal(dim1=-2, dim2=-1)
    assert_close(inside - torch.diag_embed(lengths), torch.zeros_like(inside))
    assert lengths.min() > 0.6 and lengths.max() < 1.3


def test_muon_steps_by_hand():
    rng = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 3, generator=rng, dtype=torch.float64))
    want, mean = weight.detach().clone(), torch.zeros(6, 3, dtype=torch.float64)
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5, momentum=0.9)
    for _ in range(3):
        weight.grad = torch.randn(6, 3, generator=rng, dtype=torch.float64)
        mean = 0.9 * mean + 0.1 * weight.grad
        ahead = train.orthogonalise(0.9 * mean + 0.1 * weight.grad)
        want = want * (1 - 0.1 * 0.5) - 0.1 * 2**0.5 * ahead
        optimizer.step()
        assert_close(weight.detach(), want)


def test_each_weight_has_one_optimiser_and_matrices_of_layers_have_muon():
    model = Transformer(TOY.config)
    muon, adam = train.make_optimizers(model, TOY)
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups = [{names[id(w)] for g in o.param_groups for w in g["params"]} for o in (muon, adam)]
    assert groups[0] | groups[1] == set(names.values()) and not groups[0] & groups[1]
    assert {"layers.0.self_attn.q_proj.weight", "layers.1.mlp.down_proj"} <= groups[0]
    assert {"embed_tokens.weight", "layers.0.mlp.gate.weight", "norm.weight"} <= groups[1]


def test_the_rate_rises_stays_and_falls_to_nothing():
    recipe = replace(TOY, steps=1000, warmup=0.01, decay=0.5)
    rates = [train.learning_rate(recipe, step) for step in range(1000)]
    assert rates[:10] == [pytest.approx((i + 1) / 10) for i in range(10)]
    assert set(rates[10:500]) == {1.0}
    assert rates[750] == pytest.approx(0.5) and rates[999] == pytest.approx(1 / 500)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


# --- evaluation


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=6), half=st.integers(1, 8))
def test_windows_predict_each_token_once_from_at_least_half_a_context(lengths, half):
    tokens, context = text_of(lengths), 2 * half
    predicted = []
    for start, first, end in train.windows(tokens, context):
        assert end - 1 - start <= context  # tokens read
        begins = max(place for place in np.flatnonzero(tokens == 0) if place < first)
        assert start >= begins and 0 not in tokens[start + 1 : end]  # of one document
        assert first - start >= half or start == begins
        predicted += range(first, end)
    assert predicted == np.flatnonzero(tokens).tolist()


def tiny(**switches) -> Transformer:
    sizes = dict(n_vocab=500, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_head=8, d_ff=24)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**sizes, **switches)).double().eval()
    for weight in model.parameters():
        weight.data.uniform_(-0.4, 0.4)
    return model


def test_bits_per_byte_is_the_sum_over_documents_read_one_by_one():
    model, context = tiny(), 12
    tokens, n_bytes = text_of([5, 40, 12, 0, 13]), (17, 90, 30, 0, 25)
    bits = 0.0
    for document in np.split(tokens, np.flatnonzero(tokens == 0)[1:]):
        row = torch.from_numpy(document.astype(np.int64))
        for i in range(1, len(row)):
            # the first window reads 12 tokens, each later one predicts 6 more
            start = 0 if i <= context else (i - context - 1) // 6 * 6 + 6
            logits = model(row[None, start:i])[0, -1].detach()
            bits -= float(logits.log_softmax(-1)[row[i]]) / np.log(2)
    got = bits_per_byte(model, HeldOut(tokens, n_bytes), context, batch=3)
    assert got == pytest.approx(bits / sum(n_bytes), rel=1e-10)


def test_a_sample_keeps_documents_and_their_bytes_together():
    held_out = HeldOut(text_of([3, 1, 4, 1, 5]), (30, 10, 40, 10, 50))
    part = held_out.sample(2)
    assert part.tokens.tolist() == [0, 1, 2, 3, 0, 5, 6, 7, 8, 0, 10, 11, 12, 13, 14]
    assert part.n_bytes == (30, 40, 50)


def test_the_loss_in_training_is_the_models_own_forward_pass():
    model = tiny(n_experts=3, top_k=2).train()
    tokens = torch.randint(500, (2, 20), generator=torch.Generator().manual_seed(1))
    cos, sin = train.rope_tables(model.config, torch.arange(19)[None], torch.float64)
    nats, balance = train.loss_of(model, tokens, cos, sin)
    want = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert_close(nats, want.float())
    assert_close(balance, (model.layers[0].mlp.balance + model.layers[1].mlp.balance) / 2)


def test_the_loss_compiles_into_one_graph():
    model = tiny(n_experts=3, top_k=2).float().train()
    tokens = torch.randint(500, (2, 20), generator=torch.Generator().manual_seed(1))
    cos, sin = train.rope_tables(model.config, torch.arange(19)[None], torch.float32)
    compiled = torch.compile(train.loss_of, fullgraph=True, backend="aot_eager")
    for want, got in zip(
        train.loss_of(model, tokens, cos, sin), compiled(model, tokens, cos, sin), strict=True
    ):
        assert_close(got.detach(), want.detach())


def test_the_busiest_experts_load_is_measured_in_each_layer():
    model = tiny(n_experts=4, top_k=1)
    held_out = HeldOut(text_of([60, 60]), (60, 60))
    loads = train.loads_of(model, held_out, 16)
    assert len(loads) == 2 and all(1 <= load <= 4 for load in loads)
    with torch.no_grad():  # all tokens to one expert
        model.layers[1].mlp.gate.weight.zero_()
    assert train.loads_of(model, held_out, 16)[1] == 4.0
    assert train.loads_of(tiny(), held_out, 16) == []


# --- a whole run


def run(recipe: train.Recipe, folder: Path, out: Path) -> dict:
    return train.train(recipe, folder, out, say=lambda line: None)


def without_times(curve: list[dict]) -> list[dict]:
    return [{key: value for key, value in p.items() if key != "seconds"} for p in curve]


@pytest.fixture(scope="module")
def finished(small_corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    run(TOY, small_corpus, out)
    return out


def test_training_learns_and_tells(finished):
    result = json.loads((finished / "training.json").read_text())
    trained = torch.load(finished / "trained.pt")
    assert result == json.loads(json.dumps(trained["result"]))
    bits = [point["heldout_bits_per_byte"] for point in result["curve"]]
    assert len(bits) == 6 and bits == sorted(bits, reverse=True)
    assert result["curve"][0]["loss"] - result["curve"][-1]["loss"] > 0.3
    assert result["tokens"] == 24 * 3 * 32 == result["curve"][-1]["tokens"]
    assert len(result["expert_load_max_over_mean"]) == 2
    assert result["environment"]["torch"] == torch.__version__


KILLED = """
import sys
from pathlib import Path
import test_nn_train as t
t.run(t.TOY, Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_killed_run_goes_on_as_if_nothing_had_happened(finished, small_corpus, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(small_corpus), str(tmp_path)], env=environment,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (tmp_path / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = torch.load(tmp_path / "checkpoint.pt")
    assert 0 < saved["step"] < TOY.steps and not (tmp_path / "trained.pt").exists()

    result = run(TOY, small_corpus, tmp_path)
    whole = torch.load(finished / "trained.pt")
    assert without_times(result["curve"]) == without_times(whole["result"]["curve"])
    assert result["heldout_bits_per_byte"] == whole["result"]["heldout_bits_per_byte"]
    weights = torch.load(tmp_path / "trained.pt")["weights"]
    assert all(torch.equal(weights[name], whole["weights"][name]) for name in weights)


def test_a_checkpoint_is_whole_or_as_before(tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.pt"
    train.write_atomically(file, {"step": 1})

    def die(content, stream):
        stream.write(b"half a check")
        raise KeyboardInterrupt

    monkeypatch.setattr(train.torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        train.write_atomically(file, {"step": 2})
    assert torch.load(file) == {"step": 1}


def test_a_checkpoint_of_another_recipe_is_refused(finished, small_corpus, tmp_path):
    shutil.copy(finished / "checkpoint.pt", tmp_path)
    with pytest.raises(BadInput, match="another recipe"):
        run(replace(TOY, steps=25), small_corpus, tmp_path)


def test_the_card_tells_what_was_measured_and_the_folder_loads(finished, small_corpus, tmp_path):
    from llmopt_lab.nn import load

    transformers = pytest.importorskip("transformers")
    model_card.write_card("lab-moe", small_corpus, finished, tmp_path)
    lm = load(tmp_path, device="cpu")
    weights = torch.load(finished / "trained.pt")["weights"]
    assert all(torch.equal(lm.model.state_dict()[n], w.float()) for n, w in weights.items())
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = lm.encode("import os\n")
    assert_close(lm.model(tokens[None]), hf(tokens[None]).logits)

    card = (tmp_path / "README.md").read_text()
    result = json.loads((tmp_path / "training.json").read_text())
    sizes = json.loads((small_corpus / "corpus.json").read_text())
    assert f"| this model | {result['heldout_bits_per_byte']:.3f} |" in card
    for name, bits in sizes["bits_per_byte"].items():
        assert f"| {name} | {bits:.3f} |" in card
    assert len(result["completions"]) == 10 and result["cpu"]["tokens_per_second"] > 0
    for load_ in result["expert_load_max_over_mean"]:
        assert f"{load_:.2f}" in card
    assert "stdlib" in card and "PSF-2.0" in card


def test_the_command_trains_a_toy_in_less_than_a_minute(small_corpus, tmp_path):
    began = time.perf_counter()
    command = [sys.executable, "-m", "llmopt_lab.nn.train", "lab-target", "--toy"]
    done = subprocess.run(
        [*command, "--corpus", str(small_corpus), "--out", str(tmp_path)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "bits a byte" in done.stdout and "100%" in done.stderr
    assert (tmp_path / "trained.pt").is_file() and time.perf_counter() - began < 60


def test_without_a_corpus_it_says_how_to_make_one(tmp_path):
    with pytest.raises(BadInput, match="is missing; make it with: python -m llmopt_lab.nn.train"):
        run(TOY, tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()
