"""Chapter 3's notebook in JupyterLab: it runs, its players step, its prediction locks."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "3_moe.ipynb"


def test_the_notebook_runs_and_moves(open_lab):
    lab = open_lab(NOTEBOOK)
    lab.run_all(timeout_s=240)
    lab.expect_clean_outputs()

    flow = lab.player_titled("Six tokens, four experts, capacity 4")
    flow.locator(".lm-stage").click()
    lab.page.keyboard.press("ArrowRight")
    expect(flow.locator(".lm-caption").last).to_have_text(
        "Capacity 4: 2 visits dropped: token 2 by expert 1, token 3 by expert 1."
    )
    lab.page.keyboard.press("End")
    expect(flow.locator(".lm-counter")).to_have_text("step 7 of 7")
    expect(flow.locator(".lm-caption").last).to_contain_text("1 of 4 experts stay unread")

    guess = lab.page.locator(".lm-predict").first
    guess.scroll_into_view_if_needed()
    guess.get_by_role("spinbutton").fill("50")
    guess.get_by_role("button", name=re.compile("lock", re.IGNORECASE)).click()
    expect(guess).to_contain_text(re.compile(r"It is 98\.8.*; you said 50"))

    # the live picture of the training: drawn anew at each report, the last one stays
    live = lab.page.locator("figure img[alt^='Step 180. none:']")
    assert live.count() == 1
    live.scroll_into_view_if_needed()
    assert live.evaluate("picture => picture.naturalWidth") > 300

    work = lab.explore_with("tokens in the batch")
    expect(work.locator(".lm-caption").last).to_contain_text("1 of 8 experts stay unread")
    # the badge at the top is an image of Colab's, and there may be no network
    assert [error for error in lab.errors if "ERR_NAME_NOT_RESOLVED" not in error] == []
