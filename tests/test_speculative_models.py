"""Speculation with real models: the distribution on the lab pair, greedy text on SmolLM2-135M
against transformers' own generate, and the guide's loop.
"""

import itertools
from collections import Counter

import pytest
import torch

from llmopt_lab.core.trace import recording
from llmopt_lab.nn import weights
from llmopt_lab.nn.generate import to_probabilities
from llmopt_lab.nn.weights import load
from llmopt_lab.speculative_decoding import reference
from llmopt_lab.speculative_decoding.cases import Chooser, guides_speculative_decode
from llmopt_lab.speculative_decoding.drafts import PromptLookup, skip_layers
from llmopt_lab.speculative_decoding.records import Added, Judged
from llmopt_lab.speculative_decoding.reference import speculative_decode
from llmopt_lab.speculative_decoding.tree import speculative_decode_tree

# The distribution of lab-target's texts: 3 tokens, top-k of 3, so 27 texts. A right decoder fails
# with probability FALSE_ALARM over the choice of the seed, which is fixed. At 400 runs the test
# sees a difference of about 0.2 in total variation nine times in ten (non-central chi-square, 20
# degrees of freedom); drawing from p after a refusal is farther off, and is seen below.
FALSE_ALARM, N_RUNS = 1e-6, 400
SETTINGS = {"temperature": 1.5, "top_k": 3}


@pytest.fixture(scope="module")
def lab():
    return load("lab-target", device="cpu"), load("lab-draft", device="cpu")


@pytest.fixture(scope="module")
def prompt(lab):
    return lab[0].encode("class Shape:\n    def")


@pytest.fixture(scope="module")
def wanted(lab, prompt) -> dict[tuple, float]:
    """The probability of each text, from lab-target's conditional distributions multiplied out."""
    found = {(): 1.0}
    for _ in range(3):
        longer = {}
        for text, chance in found.items():
            tokens = torch.tensor([[*prompt.tolist(), *text]])
            p = to_probabilities(lab[0].model(tokens)[0, -1].double(), **SETTINGS)
            for token in p.nonzero().flatten().tolist():
                longer[*text, token] = chance * float(p[token])
        found = longer
    return found


def p_value(counts: Counter, wanted: dict[tuple, float]) -> float:
    """The chance of so large a chi-square if `wanted` is right; cells expected below 5 are one."""
    n, cells, rest = counts.total(), [], [0.0, 0.0]
    assert counts.keys() <= wanted.keys()
    for text, chance in wanted.items():
        if n * chance >= 5:
            cells.append((counts[text], n * chance))
        else:
            rest = [rest[0] + counts[text], rest[1] + n * chance]
    cells += [rest] if rest[1] > 0 else []
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    assert len(cells) >= 5
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2).double()))


def texts(lab, prompt, decode) -> Counter:
    target, draft = lab
    rng = torch.Generator().manual_seed(0)
    settings = {"n_new": 3, "rng": rng, **SETTINGS}
    n = len(prompt)
    runs = (decode(target.model, draft.model, prompt, **settings) for _ in range(N_RUNS))
    return Counter(tuple(run[n:].tolist()) for run in runs)


def chain(*models, **settings):
    return speculative_decode(*models, k=2, **settings)


def tree(*models, **settings):
    return speculative_decode_tree(*models, widths=(2, 1), **settings)


@pytest.mark.slow
@pytest.mark.parametrize("decode", [chain, tree])
def test_the_lab_models_texts_come_as_often_as_the_target_alone_would_write_them(
    decode, lab, prompt, wanted
):
    with recording(Judged) as trace:
        counts = texts(lab, prompt, decode)
    kept = sum(judged.accepted for judged in trace.of(Judged)) / len(trace.of(Judged))
    assert 0.2 < kept < 0.95  # both kinds of verdict
    assert p_value(counts, wanted) > FALSE_ALARM


@pytest.mark.slow
def test_that_many_texts_show_the_bias_of_drawing_from_p(lab, prompt, wanted, monkeypatch):
    monkeypatch.setattr(reference, "residual", lambda p, q: p)
    assert p_value(texts(lab, prompt, chain), wanted) < FALSE_ALARM


# SmolLM2-135M


@pytest.fixture(scope="module")
def smollm2():
    path = weights._find_smollm2()
    assert path.suffix == ".gguf", f"install it: {weights.SMOLLM2_COMMAND}"
    return path, load("smollm2-135m", device="cpu")


@pytest.fixture(scope="module")
def smollm2_text(smollm2):
    """(prompt, 32 tokens after it) by transformers' own greedy generate on its own reading."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path, ours = smollm2
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**load_gguf_checkpoint(path)["config"])
    ).eval()
    read = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(read, strict=False)
    model.tie_weights()
    prompt = ours.encode("The three primary colours are red, blue and yellow. The three primary")
    with torch.no_grad():
        text = model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=32,
            min_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=2,
        )[0]  # fmt: skip
    return prompt, text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["skipped layers", "the text itself", "a tree"])
def test_greedy_text_on_smollm2_is_what_transformers_generates(kind, smollm2, smollm2_text):
    model, (prompt, want) = smollm2[1].model, smollm2_text
    short = skip_layers(model, [*range(0, 10), *range(20, 30)])
    with recording(Added) as trace:
        if kind == "a tree":
            settings = {"widths": (2, 1), "n_new": 32, "proposals": "top"}
            got = speculative_decode_tree(model, short, prompt, **settings)
        else:
            draft = short if kind == "skipped layers" else PromptLookup(model.config.n_vocab)
            got = speculative_decode(model, draft, prompt, k=3, n_new=32)
    assert torch.equal(got, want)
    if kind == "the text itself":
        assert len(trace.of(Added)) < 32  # some guesses were kept


# The guide's loop


@pytest.mark.parametrize(("accuracy", "wrong"), [(0.95, 0.05), (0.3, 0.5)])
def test_the_guides_loop_says_4_tokens_a_call_whatever_the_draft_and_writes_another_text(
    accuracy, wrong
):
    prompt = [3, 1, 4]
    n_wrong = n_calls = n_tokens = 0
    for seed in range(20):
        large = Chooser(9, 2 * seed)
        small = Chooser(9, 2 * seed + 1, like=(large, accuracy))
        got = guides_speculative_decode(small, large, prompt, k=4, n_new=40)[3:]
        right = list(itertools.islice(plainly(Chooser(9, 2 * seed), prompt), len(got)))
        n_wrong += sum(a != b for a, b in zip(got, right, strict=True))
        n_calls += large.n_calls
        n_tokens += len(got)
    assert n_tokens / n_calls == 4.0
    assert n_wrong / n_tokens > wrong


def plainly(model: Chooser, prompt: list[int]):
    text = [*prompt]
    while True:
        text.append(model.choices(text, 1)[0])
        yield text[-1]
