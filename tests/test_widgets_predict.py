"""Predictions: locked before the answer, judged after it."""

import pytest

pytest.importorskip("anywidget", reason="predictions need anywidget; GPU test machines lack it")

from llmopt_lab.core.errors import BadInput
from llmopt_lab.widgets.predict import Predict


def html_of(widget) -> str:
    bundle = widget._repr_mimebundle_()
    return (bundle[0] if isinstance(bundle, tuple) else bundle)["text/html"]


@pytest.mark.parametrize(
    ("guess", "verdict"),
    [
        (360, "It is 112 KiB; you said 360 KiB: 3.2 times too high."),
        (35, "It is 112 KiB; you said 35 KiB: 3.2 times too low."),
        (140, "It is 112 KiB; you said 140 KiB: 1.25 times too high."),
        (112_000, "It is 112 KiB; you said 112,000 KiB: 1,000 times too high."),
        (-8, "It is 112 KiB; you said -8 KiB: 120 KiB too low."),
        (120, "Right: 112 KiB; you said 120 KiB."),
        (112, "Right: 112 KiB."),
    ],
)
def test_the_verdict_says_how_far_off_a_number_was(guess, verdict):
    asked = Predict("KV bytes of a token?", answer=112, unit="KiB")
    asked.lock(guess)
    assert asked.verdict == verdict


def test_nothing_of_the_answer_is_sent_before_the_lock():
    asked = Predict("How much?", answer=98765, unit="KiB", explain="Because of 2 heads.")
    before = str(asked.get_state())
    assert "98765" not in before and "98,765" not in before and "2 heads" not in before
    asked.lock(1)
    assert "98,765" in asked.verdict and asked.explanation == "Because of 2 heads."


def test_the_answer_may_come_after_the_lock():
    asked = Predict("How much?", unit="ms")
    asked.lock(2)
    assert asked.verdict == ""
    assert asked.reveal(1) is asked
    assert asked.verdict == "It is 1 ms; you said 2 ms: 2.0 times too high."
    assert asked.prediction().blind and asked.prediction().factor == 2


def test_a_guess_after_the_answer_is_judged_but_not_blind():
    asked = Predict("How much?")
    asked.reveal(3)
    assert asked.verdict == ""
    asked.lock(3)
    assert asked.verdict == "Right: 3." and not asked.prediction().blind


def test_a_measurement_that_is_run_again_is_judged_again():
    asked = Predict("How much?")
    asked.lock(10)
    asked.reveal(10)
    asked.reveal(40)
    assert "4.0 times too low" in asked.verdict and asked.prediction().blind


def test_a_lock_never_opens():
    asked = Predict("How much?")
    asked.lock(5)
    with pytest.raises(BadInput, match="stays as it was locked"):
        asked.lock(6)
    asked.locked = False
    asked.guess = "6"
    assert asked.locked and asked.prediction().guess == 5


def test_what_the_page_sends_is_locked_and_judged():
    asked = Predict("How much?", answer=4)
    asked.set_state({"guess": "2e0", "locked": True})
    assert asked.prediction().guess == 2.0
    assert "2.0 times too low" in asked.verdict


def test_a_choice_is_right_or_wrong():
    asked = Predict("Which?", choices=["memory", "compute"], answer="memory")
    asked.lock("compute")
    assert asked.verdict == "It is memory; you said compute."
    assert asked.prediction().right is False and asked.prediction().factor is None


def test_a_tolerance_of_zero_asks_for_the_exact_number():
    asked = Predict("How many?", answer=100, tolerance=0)
    asked.lock(101)
    assert asked.prediction().right is False


def test_locked_predictions_are_listed_in_order():
    before = len(Predict.locked_in())
    for question in ("one?", "two?"):
        Predict(question, answer=1).lock(1)
    Predict("never locked?", answer=1)
    assert [p.question for p in Predict.locked_in()[before:]] == ["one?", "two?"]


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda: Predict(" "), "needs a question"),
        (lambda: Predict("q", choices=["a"]), "two or more"),
        (lambda: Predict("q", choices=["a", "a"]), "two or more"),
        (lambda: Predict("q", tolerance=-1), "tolerance"),
        (lambda: Predict("q", answer=float("nan")), "finite number; got nan"),
        (lambda: Predict("q", answer="about ten"), "finite number; got 'about ten'"),
        (lambda: Predict("q", choices=["a", "b"], answer="c"), "none of the choices: a, b"),
        (lambda: Predict("q").lock("nan"), "finite number"),
        (lambda: Predict("q").reveal(float("inf")), "finite number"),
    ],
)
def test_bad_questions_and_answers_are_refused(ask, says):
    with pytest.raises(BadInput, match=says):
        ask()


def test_a_refused_guess_leaves_the_question_open():
    asked = Predict("How much?", answer=1)
    with pytest.raises(BadInput):
        asked.lock("many")
    assert not asked.locked
    asked.lock(1)
    assert asked.prediction().right


def test_stored_in_a_notebook_the_answer_is_folded_away():
    asked = Predict("Is 1 < 2?", choices=["yes", "no"], answer="yes", explain="1 & 2")
    html = html_of(asked)
    question, folded = html.split("<details>")
    assert "Is 1 &lt; 2?" in question and "<li>no</li>" in question
    assert "yes. 1 &amp; 2" in folded
    assert "<details>" not in html_of(Predict("How much?"))
    assert repr(asked) == "Predict(Is 1 < 2? not locked yet)"
