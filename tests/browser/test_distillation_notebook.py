"""Chapter 6's notebook in JupyterLab: it runs, a student trains live, its players step."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "6_distillation.ipynb"


def player_titled(lab, title: str):
    player = lab.page.locator(".lm-player", has_text=title).first
    player.wait_for()
    lab.settled_box(player)
    return player


def captions(player) -> list[str]:
    texts = player.locator(".lm-caption").all_inner_texts()
    return [text for text in texts if text]


def explore_with(lab, label: str):
    box = lab.page.locator(".widget-vbox", has_text=label).first
    lab.settled_box(box)
    return box


def test_the_notebook_runs_and_moves(open_lab):
    lab = open_lab(NOTEBOOK)
    lab.run_all(timeout_s=240)
    assert lab.page.locator(".jp-OutputArea-output[data-mime-type*='stderr']").count() == 0
    assert lab.page.locator(".jp-RenderedText[data-mime-type*='error']").count() == 0

    guess = lab.page.locator(".lm-predict").first
    lab.settled_box(guess)
    guess.get_by_role("spinbutton").fill("60")
    guess.get_by_role("button", name=re.compile("lock", re.IGNORECASE)).click()
    expect(guess).to_contain_text("It is 20 %; you said 60 %")

    soft = explore_with(lab, "one of the four places")
    expect(soft.locator(".lm-caption").last).to_contain_text("T = 1: KL(p || q) = 0.541 nats")
    place = soft.locator(".lm-slide").first
    place.focus()
    lab.page.keyboard.press("End")
    expect(soft.locator(".lm-caption").last).to_contain_text("The largest push is on 'fox'")
    expect(place).to_be_focused()
    soft.locator(".lm-stage").click()
    lab.page.keyboard.press("End")
    expect(soft.locator(".lm-caption").last).to_contain_text("T = 8:")

    humps = explore_with(lab, "distance of the humps")
    forward, reverse = captions(humps)[-2:]
    assert "mean -0.61, width 3.04" in forward and "mean 3.00, width 0.70" in reverse
    humps.locator(".lm-slide").nth(1).focus()
    lab.page.keyboard.press("Home")  # from the left, the reverse KL finds the larger hump
    expect(humps.locator(".lm-caption").last).to_contain_text("mean -3.00")

    inside = explore_with(lab, "place in the line")
    expect(inside.locator(".lm-counter")).to_have_text("step 2 of 4")

    live = lab.page.locator("figure", has_text="Here the student's first choice is").first
    expect(live.locator("figcaption")).to_contain_text("Step 80")
    trained = explore_with(lab, "share of the teacher")
    expect(trained.locator(".lm-counter")).to_have_text("step 8 of 8")
    share = trained.locator(".lm-slide").nth(1)
    share.focus()
    lab.page.keyboard.press("Home")  # labels alone: trained by a cell further down already
    expect(trained).to_contain_text("0% from the teacher", timeout=60_000)
    expect(share).to_be_focused()
    trained.locator(".lm-stage").click()
    lab.page.keyboard.press("Home")
    expect(trained.locator(".lm-caption").last).to_contain_text("Step 10")

    chunks = player_titled(lab, "Logits that become their gradient")
    chunks.locator(".lm-stage").click()
    lab.page.keyboard.press("End")
    assert captions(chunks)[-1].startswith("Chunk 3 of 3, tokens 6 to 8")

    paid = explore_with(lab, "billions of tokens to learn from")
    paid.locator(".lm-stage").click()
    lab.page.keyboard.press("Home")  # the smallest student
    expect(paid.locator(".lm-caption").last).to_contain_text("could be read 17.7 times as long")
    # the badge at the top is an image of Colab's, and there may be no network
    assert [error for error in lab.errors if "ERR_NAME_NOT_RESOLVED" not in error] == []
