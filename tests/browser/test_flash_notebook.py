"""Chapter 2's notebook in JupyterLab: it runs, its players step, its sliders work."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "2_flash_attention.ipynb"


def captions(player) -> list[str]:
    texts = player.locator(".lm-caption").all_inner_texts()
    return [text for text in texts if text]


def test_the_notebook_runs_and_moves(open_lab):
    lab = open_lab(NOTEBOOK)
    lab.run_all(timeout_s=240)
    lab.expect_clean_outputs()

    both = lab.player_titled("The same attention, twice")
    both.locator(".lm-stage").first.click()
    for _ in range(3):
        lab.page.keyboard.press("ArrowRight")
    flash, naive = captions(both)[-2:]
    assert flash.startswith("queries 0 to 1: skip keys 6 to 7")
    assert naive.startswith("step 1, S = scale * Q K^T: write 8 x 8 scores")
    lab.page.keyboard.press("End")
    flash, naive = captions(both)[-2:]
    assert "928 bytes moved so far" in flash
    assert "1,536 bytes moved so far" in naive

    guess = lab.page.locator(".lm-predict").first
    guess.scroll_into_view_if_needed()
    guess.get_by_role("spinbutton").fill("16")
    guess.get_by_role("button", name=re.compile("lock", re.IGNORECASE)).click()
    expect(guess).to_contain_text("It is 3.9 times; you said 16 times")

    budget = lab.explore_with("KiB on chip")
    expect(budget.locator(".lm-caption").last).to_contain_text("146 queries in 128 KiB")
    width, chip = (budget.locator(".lm-slide").nth(i) for i in (1, 2))
    width.focus()
    lab.page.keyboard.press("End")
    expect(budget.locator(".lm-caption").last).to_contain_text("16 keys leave room for")
    chip.focus()
    lab.page.keyboard.press("Home")  # 32 KiB for heads of width 256
    expect(budget.locator(".lm-counter")).to_have_text("step 1 of 1")
    expect(chip).to_be_focused()

    head = lab.explore_with("query head")
    head.locator(".lm-slide").nth(2).focus()
    lab.page.keyboard.press("End")  # tiles of 32: 6 absorbed, 3 skipped, 3 finished
    expect(head.locator(".lm-counter")).to_have_text("step 1 of 12")

    split = lab.player_titled("One query, eight keys, three programs")
    split.locator(".lm-stage").click()
    lab.page.keyboard.press("End")
    assert captions(split)[-1].startswith("query 0: done")
    # the badge at the top is an image of Colab's, and there may be no network
    assert [error for error in lab.errors if "ERR_NAME_NOT_RESOLVED" not in error] == []
