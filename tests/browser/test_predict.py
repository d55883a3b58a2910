"""A prediction as a learner makes it."""

import pytest
from nbformat.v4 import new_code_cell, new_notebook

pytestmark = pytest.mark.browser

ASK = """
from llmopt_lab.widgets.predict import Predict
guess = Predict("How many KiB of KV cache does one token take?", unit="KiB",
                explain="2 x 30 layers x 3 heads x 64 x 2 bytes.")
guess
"""
CHOOSE = 'Predict("What bounds decoding?", choices=["memory", "compute"], answer="memory")'


@pytest.fixture
def lab(open_lab):
    cells = [new_code_cell(ASK), new_code_cell("guess.reveal(22.5)"), new_code_cell(CHOOSE)]
    lab = open_lab(new_notebook(cells=cells))
    lab.run_all()
    lab.page.locator(".lm-predict").nth(2).wait_for()
    return lab


def test_a_number_is_locked_with_the_keyboard_and_judged_everywhere_it_shows(lab):
    first, second = lab.page.locator(".lm-predict").nth(0), lab.page.locator(".lm-predict").nth(1)
    assert "22.5" not in first.inner_text() + second.inner_text()
    n_cells = lab.n_cells()
    first.get_by_label("Your prediction").click()
    lab.page.keyboard.type("90")
    lab.page.keyboard.press("a")  # no digit, and no new cell either
    lab.page.keyboard.press("Enter")
    for view in (first, second):
        view.get_by_text("It is 22.5 KiB; you said 90 KiB: 4.0 times too high.").wait_for()
        assert "2 x 30 layers" in view.inner_text()
        assert view.get_by_label("Your prediction").is_disabled()
        assert view.get_by_role("button").is_disabled()
    assert lab.n_cells() == n_cells
    lab.screenshot("predicted")
    assert lab.errors == []


def test_an_empty_answer_cannot_be_locked(lab):
    first = lab.page.locator(".lm-predict").first
    first.get_by_role("button", name="Lock it in").click()
    assert first.get_by_role("button", name="Lock it in").is_enabled()


def test_a_choice_is_made_with_arrows_and_locked(lab):
    question = lab.page.locator(".lm-predict").last
    question.get_by_label("memory").focus()
    lab.page.keyboard.press(" ")
    lab.page.keyboard.press("ArrowDown")
    lab.page.keyboard.press("Tab")
    lab.page.keyboard.press("Enter")
    question.get_by_text("It is memory; you said compute.").wait_for()
    assert question.get_by_label("compute").is_checked()
    assert lab.errors == []
