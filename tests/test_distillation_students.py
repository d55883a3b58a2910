"""The students that ship, and what is said of them: folders, cards and results agree."""

import json

import pytest

from llmopt_lab.distillation.evaluate import retained
from llmopt_lab.distillation.reference import as_teacher, check_same_vocabulary
from llmopt_lab.distillation.ship import RESULTS, SHIPPED, WAYS, best_of, piece
from llmopt_lab.distillation.students import METHODS, STUDENTS, TEACHER
from llmopt_lab.nn import load
from llmopt_lab.nn.weights import EMBEDDED


@pytest.fixture(scope="module")
def results():
    return json.loads(RESULTS.read_text("utf-8"))


def text_of(result: dict) -> dict:
    return result["held_out"]["text"]


def test_every_student_learned_every_way_from_the_same_tokens(results):
    for name in SHIPPED:
        ways = results["runs"][name]
        assert set(METHODS) <= set(ways)
        assert len({(r["tokens"], r["parameters"], r["begins_as"]) for r in ways.values()}) == 1
        for way, method in METHODS.items():
            assert ways[way]["method"] == vars(method)
            assert ways[way]["recipe"]["steps"] == STUDENTS[name].recipe.steps
            assert len(ways[way]["curve"]) == 40
            assert "H200" in ways[way]["environment"]["name"]


def test_one_is_about_40_percent_smaller_and_one_about_7_times(results):
    shares = [
        results["runs"][name]["labels"]["parameters"]
        / results["runs"][name]["labels"]["teacher_parameters"]
        for name in SHIPPED
    ]
    assert 0.55 < shares[0] < 0.65 and 6.5 < 1 / shares[1] < 7.5


def test_what_ships_is_the_best_of_the_three(results):
    for name in SHIPPED:
        ways = results["runs"][name]
        best = min(text_of(ways[way])["bits_per_byte"] for way in METHODS)
        assert text_of(ways[results["shipped"][name]])["bits_per_byte"] == best
        assert best_of(ways) == results["shipped"][name]


def test_a_teacher_helps(results):
    """More of the teacher's accuracy, fewer bits and more guesses kept than on labels alone."""
    for name in (*SHIPPED, "lab-draft"):
        labels, distilled = (text_of(results["runs"][name][way]) for way in ("labels", "distilled"))
        assert distilled["overlap"] > labels["overlap"]
        assert distilled["kl"] < labels["kl"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_student_loads_and_keeps_what_its_card_says(name, results):
    training = json.loads((EMBEDDED / name / "training.json").read_text("utf-8"))
    card = (EMBEDDED / name / "README.md").read_text("utf-8")
    lm, teacher = load(name, device="cpu"), load(TEACHER, device="cpu")
    check_same_vocabulary(teacher, lm)
    assert lm.config.n_parameters == training["parameters"]
    assert sum(w.numel() for w in lm.model.parameters()) == training["parameters"]
    said = text_of(training)
    assert said == text_of(results["runs"][name][training["way"]])
    assert f"{said['bits_per_byte']:.3f}" in card and f"{said['accuracy']:.1%}" in card
    assert all(words in card for words in WAYS.values()) and len(training["completions"]) == 10

    found = retained(lm.model, as_teacher(teacher.model), piece(lm), context=1024, batch=2)
    assert found == pytest.approx(training["piece"], rel=1e-3)


def test_a_draft_that_was_distilled_keeps_more_guesses_than_one_that_only_trained_on(results):
    """On the same texts, the teacher's own: what sampled speculation with lab-draft meets."""
    kept = {
        way: run["held_out"]["teacher_writes"]["overlap"]
        for way, run in results["runs"]["lab-draft"].items()
    }
    assert kept["distilled"] > kept["labels"]
    before = {
        r["before"]["teacher_writes"]["overlap"] for r in results["runs"]["lab-draft"].values()
    }
    assert len(before) == 1
