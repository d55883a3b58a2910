"""The draft head: it is trained as it decodes, it changes no text and no distribution, it learns,
and the one that ships does what its card says."""

import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.trace import recording
from llmopt_lab.nn.corpus import write_tokens
from llmopt_lab.nn.generate import generate, to_probabilities
from llmopt_lab.nn.transformer import causal_attention
from llmopt_lab.nn.weights import load
from llmopt_lab.speculative_decoding import train_head
from llmopt_lab.speculative_decoding.cases import random_model
from llmopt_lab.speculative_decoding.chance import outcomes
from llmopt_lab.speculative_decoding.head import FOLDER, DraftHead, HeadDraft, load_head
from llmopt_lab.speculative_decoding.reader import Reader
from llmopt_lab.speculative_decoding.records import ROOT, Added, Guessed, Judged, Read
from llmopt_lab.speculative_decoding.reference import Sampling, speculative_decode
from llmopt_lab.speculative_decoding.tree import speculative_decode_tree

PROMPT = torch.tensor([3, 1, 4, 1, 5])


@pytest.fixture(scope="module")
def pair():
    """A random target in float64 and an untrained head for it."""
    model = random_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = DraftHead(model.config)
    return model, head.double().requires_grad_(False)


def readers(pair, *, max_tokens=40, n_nodes=0):
    model, head = pair
    target = Reader(model, max_tokens=max_tokens, n_nodes=n_nodes)
    return target, HeadDraft(head, target)


def recipe_of(model, context: int, **changes) -> train_head.HeadRecipe:
    recipe = train_head.toy(train_head.recipe_for(model))
    return replace(recipe, train=replace(recipe.train, context=context, **changes))


# Training and decoding are one thing


def test_the_steps_of_training_are_the_guesses_of_decoding(pair):
    model, head = pair
    tokens = torch.randint(0, 23, (12,), generator=torch.Generator().manual_seed(1))
    recipe = recipe_of(model, 12)
    tables = train_head.tables_of(recipe, tokens.device)
    tables = [(cos.double(), sin.double()) for cos, sin in tables]
    features = model.hidden(tokens[None], *tables[0], causal_attention)
    steps = train_head.steps_ahead(head, model, tokens[None], features, tables, 3)
    for t in (0, 1, 6, 9):
        _, draft = readers(pair)
        for j in range(3):
            read = tokens[: t + 1] if j == 0 else tokens[t + j : t + j + 1]
            assert_close(draft.read(read.tolist(), n_last=1)[0], steps[j][0, t], f"{t}, {j}")


def test_a_tree_gives_each_node_the_logits_of_its_own_path(pair):
    text, nodes, parents = [3, 1, 4], [5, 6, 7, 8, 9], [ROOT, ROOT, 0, 0, 1]
    paths = [[5], [6], [5, 7], [5, 8], [6, 9]]
    _, draft = readers(pair, n_nodes=5)
    draft.read(text, n_last=1)
    got = [
        *draft.read(nodes[:2], n_last=2, parents=parents[:2]),
        *draft.read(nodes[2:], n_last=3, parents=parents[2:]),
    ]
    for row, path in zip(got, paths, strict=True):
        _, alone = readers(pair)
        alone.read(text, n_last=1)
        for token in path:
            want = alone.read([token], n_last=1)[0]
        assert_close(row, want)


def test_it_guesses_from_the_targets_features_wherever_the_target_has_read(pair):
    """What was cached for guesses, kept or not, must not stay: a fresh head says the same."""
    target, draft = readers(pair)
    rng = torch.Generator().manual_seed(2)
    with recording(Guessed, Judged) as trace:
        text = speculative_decode(
            target, draft, PROMPT, k=3, n_new=24, rng=rng, temperature=1.0
        ).tolist()
    assert any(judged.accepted for judged in trace.of(Judged))
    assert any(not judged.accepted for judged in trace.of(Judged))
    for guessed in trace.of(Guessed)[:-1]:
        _, fresh = readers(pair)
        want = Sampling(1.0).probabilities(fresh.read(text[: guessed.first], n_last=1))
        assert_close(guessed.q[:1], want)


def test_the_target_reads_each_token_once(pair):
    target, draft = readers(pair)
    with recording(Read, Added) as trace:
        speculative_decode(target, draft, PROMPT, k=3, n_new=12)
    reads = [read for read in trace.of(Read) if read.who == "target"]
    assert (reads[0].first, reads[0].n) == (0, 4)  # the prompt but its last token, for the head
    assert all(read.n <= 4 for read in reads[1:])
    assert len(reads) == 1 + len(trace.of(Added))


# It changes nothing but the speed


@pytest.mark.parametrize("widths", [None, (2, 1)])
def test_every_text_keeps_the_targets_probability(pair, widths):
    settings = {"temperature": 1.0, "top_k": 2}

    def program(dice):
        target, draft = readers(pair, n_nodes=4)
        how = {"n_new": 3, "rng": dice, **settings}
        if widths:
            out = speculative_decode_tree(target, draft, PROMPT, widths=widths, **how)
        else:
            out = speculative_decode(target, draft, PROMPT, k=2, **how)
        return tuple(out.tolist())

    wanted = {tuple(PROMPT.tolist()): 1.0}
    for _ in range(3):
        wanted = {
            (*text, token): chance * float(p[token])
            for text, chance in wanted.items()
            for p in [to_probabilities(pair[0](torch.tensor([text]))[0, -1], **settings)]
            for token in p.nonzero().flatten().tolist()
        }
    got = outcomes(program)
    assert got.keys() <= wanted.keys() and len(wanted) == 8
    assert max(abs(got.get(text, 0.0) - chance) for text, chance in wanted.items()) < 1e-12


@pytest.mark.parametrize("how", [{"k": 1}, {"k": 4}, {"widths": (2, 2)}], ids=str)
def test_greedy_text_is_plain_decodings(pair, how):
    want = generate(pair[0], PROMPT, 30)
    target, draft = readers(pair, n_nodes=8)
    if "widths" in how:
        got = speculative_decode_tree(target, draft, PROMPT, n_new=30, proposals="top", **how)
    else:
        got = speculative_decode(target, draft, PROMPT, n_new=30, **how)
    assert torch.equal(got, want)


def test_a_prompt_of_one_token_will_do(pair):
    target, draft = readers(pair)
    got = speculative_decode(target, draft, PROMPT[:1], k=3, n_new=9)
    assert torch.equal(got, generate(pair[0], PROMPT[:1], 9))


# What is refused


def test_a_head_of_another_model_is_refused(pair):
    other = random_model(3)
    with pytest.raises(BadInput, match="this head is for another model"):
        HeadDraft(DraftHead(replace(other.config, d_ff=20)), Reader(other, max_tokens=9))
    with pytest.raises(BadInput, match=r"the head is torch.float32 on cpu, the target torch.fl"):
        HeadDraft(DraftHead(pair[0].config), Reader(pair[0], max_tokens=9))


def test_a_tree_in_one_pass_is_refused(pair):
    _, draft = readers(pair, n_nodes=4)
    with pytest.raises(BadInput, match="reads the text first"):
        draft.read([1, 2, 3], n_last=1, parents=[ROOT])
    draft.read([1, 2], n_last=1)
    with pytest.raises(BadInput, match="a node's parent must be read before"):
        draft.read([1, 2], n_last=1, parents=[ROOT, 0])
    assert draft.length == 2 and draft.parents == []


def test_a_folder_without_a_head_is_refused(tmp_path):
    with pytest.raises(BadInput, match="has no draft head"):
        load_head(tmp_path)


# Training


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents of a language with one rule: after a token comes its double, or the one after."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for name, n_documents in (("train", 200), ("heldout", 20)):
        tokens = []
        for _ in range(n_documents):
            token = int(rng.integers(1, 23))
            tokens.append(0)
            for _ in range(40):
                tokens.append(token)
                token = (2 * token + int(rng.random() < 0.2)) % 22 + 1
        write_tokens(folder / f"{name}.tokens.xz", np.array(tokens, dtype=np.uint16))
    return folder


def run(corpus, out, steps=40):
    model = random_model(dtype=torch.float32)
    recipe = recipe_of(model, 24, steps=steps, reports=4, batch=4, held_out_every=1)
    result = train_head.train(recipe, corpus, out, model, say=lambda text: None)
    return result, torch.load(out / "trained.pt", weights_only=True)["weights"]


def test_it_learns_to_guess_what_its_target_writes(corpus, tmp_path):
    result, weights = run(corpus, tmp_path)
    first, *_, last = result["curve"]
    assert last["loss"] < first["loss"]
    for before, after in zip(first["heldout"], last["heldout"], strict=True):
        assert after["overlap"] > before["overlap"] + 0.02
    assert all(weight.dtype == torch.bfloat16 for weight in weights.values())
    assert json.loads((tmp_path / "training.json").read_text()) == json.loads(json.dumps(result))


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(corpus, tmp_path, monkeypatch):
    _, whole = run(corpus, tmp_path / "whole")
    write = train_head.write_atomically

    def once(file, content):
        write(file, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_head, "write_atomically", once)
    with pytest.raises(KeyboardInterrupt):
        run(corpus, tmp_path / "cut")
    monkeypatch.setattr(train_head, "write_atomically", write)
    _, resumed = run(corpus, tmp_path / "cut")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(BadInput, match="is of another recipe"):
        run(corpus, tmp_path / "cut", steps=41)


# The head that ships


@pytest.fixture(scope="module")
def lab():
    return load("lab-target", device="cpu"), load_head()


CODE = "def sum_of_squares(values):\n    total = 0\n    for value in values:\n"


@pytest.mark.parametrize("widths", [None, (3, 2, 1)])
def test_with_lab_targets_head_greedy_text_is_plain_decodings_in_fewer_passes(lab, widths):
    lm, head = lab
    prompt = lm.encode(CODE)
    target = Reader(lm.model, max_tokens=len(prompt) + 48, n_nodes=20)
    draft = HeadDraft(head, target)
    with recording(Added) as trace:
        if widths:
            settings = {"widths": widths, "n_new": 48, "proposals": "top"}
            got = speculative_decode_tree(target, draft, prompt, **settings)
        else:
            got = speculative_decode(target, draft, prompt, k=3, n_new=48)
    assert torch.equal(got, generate(lm.model, prompt, 48))
    assert len(trace.of(Added)) < 48 / 2


def test_its_card_holds_what_training_measured():
    training = json.loads((FOLDER / "training.json").read_text())
    card = (FOLDER / "README.md").read_text()
    recipe = train_head.recipe_for(load("lab-target", device="cpu").model)
    assert training["recipe"] == json.loads(json.dumps(asdict(recipe)))
    head = load_head()
    n_parameters = sum(weight.numel() for weight in head.parameters())
    assert training["parameters"] == n_parameters and f"{n_parameters:,} parameters" in card
    for step in training["heldout"]:
        assert f"| {step['overlap']:.3f} | {step['top1']:.3f} |" in card
    for cells in training["decoding"].values():
        for who in ("this head", "lab-draft"):
            assert f"{cells[who]['tokens_per_target_call']:.2f}" in card
    assert re.search(r"in \d+\.\d minutes on NVIDIA", card)
    files = [file for file in FOLDER.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 4_000_000
