"""What is measured on a CPU: every text checked, every prediction the formula's, and the record
that ships has each draft at each k, and trees."""

import json
import math

import pytest
import torch

from llmopt_lab.core.errors import LabError
from llmopt_lab.nn.weights import load
from llmopt_lab.speculative_decoding import measure
from llmopt_lab.speculative_decoding.drafts import PromptLookup
from llmopt_lab.speculative_decoding.head import load_head
from llmopt_lab.speculative_decoding.reference import Draft

RECORDED = json.loads(measure.RESULTS.read_text())
DRAFTS = {"lab-draft", "draft head", "prompt lookup", "layers 0 and 5 of lab-target"}


@pytest.fixture(scope="module")
def lab():
    return load("lab-target", device="cpu")


def test_calls_take_turns_and_the_first_turn_does_not_count(monkeypatch):
    clock, called = [0.0], []
    monkeypatch.setattr(measure.time, "process_time", lambda: clock[0])

    def takes(name, seconds):
        left = iter(seconds)

        def call():
            called.append(name)
            clock[0] += next(left)

        return call

    calls = {"a": takes("a", [9, 1, 2, 30]), "b": takes("b", [9, 4, 4, 5])}
    assert measure.in_turns(calls, 3) == {"a": 2, "b": 4}
    assert called == ["a", "b"] * 4


@pytest.mark.parametrize("kind", ["draft head", "prompt lookup"])
def test_a_measured_row_holds_what_was_counted_and_what_the_formula_makes_of_it(lab, kind):
    draft = load_head() if kind == "draft head" else PromptLookup(lab.config.n_vocab)
    prompt = lab.encode("def add(a, b):\n    return a + b\n\n\ndef add(a, b):\n")
    result = measure.measure(lab, kind, draft, prompt, n_new=12, ks=(1, 3), repeats=1)
    assert [row["k"] for row in result["rows"]] == [1, 3]
    check(result, 12)
    assert (result["c"] > 0) == (kind == "draft head") == bool(result["trees"])


def check(result: dict, n_new: int) -> None:
    """Counts agree, and each prediction is the closed formula of alpha, c and verify."""
    c = result["c"]
    for row in result["rows"]:
        k, alpha = row["k"], row["alpha"]
        tokens = (1 - alpha ** (k + 1)) / (1 - alpha) if alpha < 1 else k + 1
        assert 0 < row["rounds"] <= n_new and 0 <= alpha <= 1
        assert row["tokens_per_target_call"] == n_new / row["rounds"] <= k + 1
        assert math.isclose(row["tokens_predicted"], tokens, rel_tol=1e-9)
        for name, verify in (("", row["verify"]), ("_verify_1", 1)):
            predicted = row["speedup_predicted" + name]
            assert math.isclose(predicted, tokens / (k * c + verify), rel_tol=1e-9)
    for row in result["trees"]:
        depth, width, nodes = len(row["widths"]), 1, 0
        for children in row["widths"]:
            width *= children
            nodes += width
        assert row["nodes"] == nodes
        assert row["tokens_per_target_call"] == n_new / row["rounds"] <= depth + 1
        cost = depth * c + row["verify"]
        assert math.isclose(row["speedup_predicted"], row["tokens_per_target_call"] / cost)


class Liar:
    """Guesses 7s, and changes what the target has read: as a broken rollback would."""

    def __init__(self, n_vocab: int, target):
        self.n_vocab, self.target = n_vocab, target

    def guess(self, text, k, sampling, dice):
        text[-1] = 7
        return measure.PromptLookup(self.n_vocab).guess(text, k, sampling, dice)

    def rewind(self, length):
        """Nothing is kept."""


def test_a_draft_that_changes_the_text_is_not_timed(lab, monkeypatch):
    monkeypatch.setattr(measure, "in_turns", lambda *_: pytest.fail("it was timed"))
    draft = Liar(lab.config.n_vocab, lab.model)
    assert isinstance(draft, Draft)
    with pytest.raises(LabError, match="liar, 2: another text than plain decoding's"):
        measure.measure(lab, "liar", draft, torch.tensor([5, 6, 7]), n_new=8, ks=(2,))


def test_the_record_has_every_draft_at_every_k_on_both_prompts_and_trees_of_the_models():
    found = {(run["prompt"], run["draft"]) for run in RECORDED["runs"]}
    assert found == {(prompt, draft) for prompt in ("fresh", "edit") for draft in DRAFTS}
    for run in RECORDED["runs"]:
        assert [row["k"] for row in run["rows"]] == list(range(1, 9))
        widths = [tuple(row["widths"]) for row in run["trees"]]
        assert widths == ([] if run["draft"] == "prompt lookup" else list(measure.TREES))
        check(run, RECORDED["n_new"])
