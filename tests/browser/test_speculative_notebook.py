"""Chapter 7's notebook in JupyterLab: it runs, its players step, its sliders work."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "7_speculative_decoding.ipynb"


def test_the_notebook_runs_and_moves(open_lab):
    lab = open_lab(NOTEBOOK)
    lab.run_all(timeout_s=240)
    lab.expect_clean_outputs()

    toy = lab.player_titled("Guess, judge, go on")
    caption = toy.locator(".lm-caption").last
    toy.locator(".lm-stage").click()
    lab.page.keyboard.press("Home")
    expect(caption).to_contain_text("the draft guesses")
    lab.page.keyboard.press("ArrowRight")
    expect(caption).to_contain_text("target reads tokens 0 to 5 in one pass")
    lab.page.keyboard.press("ArrowRight")
    expect(caption).to_contain_text(re.compile(r"chance to keep it min\(1, p/q\) = \d\.\d\d; kept"))

    guess = lab.page.locator(".lm-predict").first
    guess.scroll_into_view_if_needed()
    guess.get_by_role("spinbutton").fill("3")
    guess.get_by_role("button", name=re.compile("lock", re.IGNORECASE)).click()
    expect(guess).to_contain_text(re.compile(r"It is \d\.\d.*; you said 3"))

    real = lab.explore_with("guesses a round")
    k, temperature, draft = (real.locator(".lm-slide").nth(i) for i in range(3))
    for handle in (k, temperature, draft):
        handle.focus()
        lab.page.keyboard.press("Home")
    title = "lab-draft, k 1, temperature 0.0"
    expect(real.locator(".lm-player", has_text=title)).to_be_visible(timeout=20_000)
    for name in ("draft head", "prompt lookup"):
        draft.focus()
        lab.page.keyboard.press("ArrowUp")
        title = f"{name}, k 1, temperature 0.0"
        expect(real.locator(".lm-player", has_text=title)).to_be_visible(timeout=20_000)
        expect(draft).to_be_focused()

    tree = lab.player_titled("A tree of guesses")
    tree.locator(".lm-stage").click()
    lab.page.keyboard.press("Home")
    expect(tree.locator(".lm-caption").last).to_contain_text("the draft guesses a tree of 6 tokens")

    pays = lab.explore_with("each further token")
    further = pays.locator(".lm-slide").nth(1)
    further.focus()
    lab.page.keyboard.press("End")
    expect(pays.locator(".lm-caption").last).to_contain_text("Do not speculate")
    # the badge at the top is an image of Colab's, and there may be no network
    assert [error for error in lab.errors if "net::ERR" not in error] == []
