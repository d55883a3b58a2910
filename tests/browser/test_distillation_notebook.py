"""Chapter 6's notebook in JupyterLab: it runs, its prediction locks, its sliders draw anew."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "6_distillation.ipynb"


def test_the_notebook_runs_and_moves(open_lab):
    lab = open_lab(NOTEBOOK)
    lab.run_all(timeout_s=240)
    lab.expect_clean_outputs()

    guess = lab.page.locator(".lm-predict").first
    lab.settled_box(guess)
    guess.get_by_role("spinbutton").fill("60")
    guess.get_by_role("button", name=re.compile("lock", re.IGNORECASE)).click()
    expect(guess).to_contain_text("It is 20 %; you said 60 %")

    soft = lab.explore_with("one of the four places")
    expect(soft.locator(".lm-caption").last).to_contain_text("T = 1: KL(p || q) = 0.541 nats")
    place = soft.locator(".lm-slide").first
    place.focus()
    lab.page.keyboard.press("End")
    expect(soft.locator(".lm-caption").last).to_contain_text("T = 1: KL(p || q) = 1.126 nats")
    expect(place).to_be_focused()

    humps = lab.explore_with("distance of the humps")
    distance = humps.locator(".lm-slide").first
    distance.focus()
    lab.page.keyboard.press("Home")
    expect(humps.locator(".lm-slider output").first).to_have_text("2.0")
    expect(humps.locator(".lm-caption").last).to_contain_text(re.compile("nats"))
    expect(humps.get_by_role("alert")).to_have_count(0)

    # a live training: one that is not yet there takes seconds
    trained = lab.explore_with("share of the teacher")
    share = trained.locator(".lm-slide").nth(1)
    share.focus()
    lab.page.keyboard.press("Home")
    expect(trained.locator(".lm-slider output").nth(1)).to_have_text("0.0")
    expect(trained.locator(".lm-counter").last).to_contain_text("step", timeout=60_000)
    expect(trained.get_by_role("alert")).to_have_count(0)

    pays = lab.explore_with("billions of tokens to learn from")
    pays.locator(".lm-slide").first.focus()
    lab.page.keyboard.press("End")
    expect(pays.locator(".lm-slider output").first).to_have_text("300")
    expect(pays.locator(".lm-caption").last).to_contain_text("reads 300 billion tokens")
    # the badge at the top is an image of Colab's, and there may be no network
    assert [error for error in lab.errors if "ERR_NAME_NOT_RESOLVED" not in error] == []
