"""Chapter 1's notebook in JupyterLab: it runs, its players step, its sliders work."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "1_paged_attention.ipynb"


def words(player) -> str:
    """What is drawn, as text."""
    return " ".join(player.locator(".lm-stage svg text").all_text_contents())


def caption(player) -> str:
    return player.locator(".lm-caption").last.inner_text()


def test_the_notebook_runs_and_moves(open_lab):
    lab = open_lab(NOTEBOOK)
    lab.run_all(timeout_s=180)
    lab.expect_clean_outputs()

    table = lab.player_titled("A block table at work")
    table.locator(".lm-stage").click()
    for _ in range(6):
        lab.page.keyboard.press("ArrowRight")
    assert caption(table) == "copy block 1 to 2: B writes what it shared"
    assert "block 2" in words(table)
    listing = table.locator("pre")
    expect(listing).to_contain_text("_copy_on_write")
    lab.screenshot("copy_on_write", ".lm-player")  # docs/page_table.png is this picture
    lab.page.keyboard.press("End")
    assert caption(table) == "B writes 6 tokens; it has 13 now"

    guess = lab.page.locator(".lm-predict").first
    guess.scroll_into_view_if_needed()
    guess.get_by_role("spinbutton").fill("40")
    guess.get_by_role("button", name=re.compile("lock", re.IGNORECASE)).click()
    expect(guess).to_contain_text("189")

    serving = lab.player_titled("Serving four requests")
    slider = serving.locator("input[type=range]")
    box = lab.settled_box(slider)
    middle = box["y"] + box["height"] / 2
    lab.page.mouse.move(box["x"] + 9, middle)
    lab.page.mouse.down()
    lab.page.mouse.move(box["x"] + box["width"] - 9, middle, steps=20)
    lab.page.mouse.up()
    assert re.fullmatch(r"step (\d+) of \1", serving.locator(".lm-counter").inner_text())
    assert "contiguous: without a token" in words(serving)

    explore = lab.page.locator(".widget-vbox", has_text="slots in the pool").first
    explore.scroll_into_view_if_needed()
    counter = explore.locator(".lm-counter")
    expect(counter).to_have_text("step 1 of 30")
    slots, tokens = (explore.locator(".lm-slide").nth(i) for i in (0, 1))
    tokens.focus()
    lab.page.keyboard.press("Home")  # blocks of one token
    expect(counter).to_have_text("step 1 of 26")
    expect(tokens).to_be_focused()
    lab.page.keyboard.press("End")  # of 32: the slider has kept the focus
    expect(counter).to_have_text("step 1 of 52")
    slots.focus()
    lab.page.keyboard.press("Home")
    expect(explore.get_by_role("alert")).to_contain_text("at its longest, the pool has 1")
    # the badge at the top is an image of Colab's, and there may be no network
    assert [error for error in lab.errors if "ERR_NAME_NOT_RESOLVED" not in error] == []
