"""The models that ship with the package: what their cards promise holds."""

import json
import lzma
import subprocess
import sys

import numpy as np
import pytest
import torch

from llmopt_lab.core.close import assert_close
from llmopt_lab.nn import load
from llmopt_lab.nn.held_out import held_out_documents
from llmopt_lab.nn.train import RECIPES, HeldOut, bits_per_byte, loads_of
from llmopt_lab.nn.weights import EMBEDDED

MODELS = sorted(folder.name for folder in EMBEDDED.iterdir() if folder.is_dir())
FROM_SCRATCH = [name for name in MODELS if name in RECIPES]  # the students' tests are chapter 6's
LIMIT = 40_000_000  # bytes, all models together


def training_of(name: str) -> dict:
    return json.loads((EMBEDDED / name / "training.json").read_text("utf-8"))


def held_out(n_bytes: int) -> tuple[HeldOut, bytes]:
    """The first shipped documents, `n_bytes` or a little more, as tokens and as text."""
    lm = load("lab-draft", device="cpu")
    tokens, texts = [], []
    for text in held_out_documents().values():
        if sum(map(len, texts)) >= n_bytes:
            break
        texts.append(text.encode())
        tokens += [0, *lm.tokenizer.encode(text, add_special_tokens=False).ids]
    lengths = tuple(len(text) for text in texts)
    return HeldOut(np.array(tokens, dtype=np.uint16), lengths), b"".join(texts)


def test_the_family_is_complete_and_small():
    assert {"lab-target", "lab-draft", "lab-moe"} <= set(MODELS)
    files = [file for file in EMBEDDED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < LIMIT
    assert (EMBEDDED / "heldout.json").stat().st_size < 300_000


def test_they_share_one_tokenizer():
    texts = {(EMBEDDED / name / "tokenizer.json").read_bytes() for name in MODELS}
    assert len(texts) == 1


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_it_and_gives_the_same_logits(name):
    transformers = pytest.importorskip("transformers")
    lm = load(name, device="cpu")
    text = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n"
    tokens = lm.encode(text)
    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED / name)
    assert tokenizer(text)["input_ids"] == tokens.tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED / name, dtype=torch.float32)
    with torch.no_grad():
        assert_close(lm.model(tokens[None]), model(tokens[None]).logits)


@pytest.mark.parametrize("name", MODELS)
def test_it_has_learned_more_than_xz_knows(name):
    tokens, text = held_out(30_000)
    measured = bits_per_byte(load(name, device="cpu").model, tokens, context=1024, batch=4)
    packed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    assert measured < 0.75 * 8 * len(packed) / len(text)
    # the card's number is of all held-out text, this is a piece of it
    assert measured == pytest.approx(training_of(name)["heldout_bits_per_byte"], rel=0.35)


def test_no_expert_of_lab_moe_is_overrun():
    tokens, _ = held_out(300_000)  # all that ships: a single file may well be for a few experts
    loads = loads_of(load("lab-moe", device="cpu").model, tokens, context=1024)
    assert len(loads) == 4 and max(loads) <= 1.5
    assert max(training_of("lab-moe")["expert_load_max_over_mean"]) <= 1.5


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_its_card_holds_what_was_promised(name):
    training = training_of(name)
    card = (EMBEDDED / name / "README.md").read_text("utf-8")
    assert training["seconds"] <= 600 and "H100" in training["environment"]["name"]
    assert len(training["curve"]) >= 40 and len(training["completions"]) == 10
    assert training["recipe"]["steps"] == RECIPES[name].steps
    for what in ("gzip -9", "xz -9e", "5-gram", "PSF-2.0", "tokens per second"):
        assert what in card


def test_the_target_is_clearly_better_than_xz_and_the_draft_five_times_as_fast():
    target, draft = training_of("lab-target"), training_of("lab-draft")
    card = (EMBEDDED / "lab-target" / "README.md").read_text("utf-8")
    xz = float(card.partition("| xz -9e | ")[2].partition(" ")[0])
    assert target["heldout_bits_per_byte"] < 0.6 * xz
    assert draft["cpu"]["tokens_per_second"] >= 5 * target["cpu"]["tokens_per_second"]
    assert draft["cpu"]["name"] == target["cpu"]["name"]


def test_lab_moe_comes_with_the_curve_of_its_dense_twin():
    moe = training_of("lab-moe")
    dense = moe["dense_twin"]
    assert dense["parameters"] == pytest.approx(moe["active_parameters"], rel=0.01)
    assert dense["tokens"] == moe["tokens"] and len(dense["curve"]) >= 40


def test_loading_takes_less_than_a_second():
    code = (
        "import time; from llmopt_lab.nn import load; start = time.perf_counter(); "
        "load('lab-target', device='cpu'); print(time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1
