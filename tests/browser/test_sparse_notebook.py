"""Chapter 5's notebook in JupyterLab: it runs, its players step, its mask can be painted."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "5_sparse_attention.ipynb"


def test_the_notebook_runs_and_moves(open_lab):
    lab = open_lab(NOTEBOOK)
    lab.run_all(timeout_s=240)
    lab.expect_clean_outputs()

    toy = lab.player_titled("A window of 3, and one sink")
    caption = toy.locator(".lm-caption").last
    toy.locator(".lm-stage").click()
    lab.page.keyboard.press("End")
    expect(caption).to_contain_text("9 of 16 blocks visited, 832 bytes moved so far")

    guess = lab.page.locator(".lm-predict").first
    guess.scroll_into_view_if_needed()
    guess.get_by_role("spinbutton").fill("25.6")
    guess.get_by_role("button", name=re.compile("lock", re.IGNORECASE)).click()
    expect(guess).to_contain_text("It is 12.8; you said 25.6: 2.0 times too high.")

    blocks = lab.explore_with("width, or stride")
    pattern = blocks.locator(".lm-slide").first
    pattern.focus()
    for _ in range(3):
        lab.page.keyboard.press("ArrowUp")  # the Sparse Transformer
    caption = blocks.locator(".lm-caption").last
    live = "Sparse Transformer, width 128, blocks of 64: 87 of 136 blocks are live"
    expect(caption).to_contain_text(live, timeout=20_000)
    expect(pattern).to_be_focused()

    canvas = lab.player_titled("Paint what may be read")
    caption = canvas.locator(".lm-caption")
    expect(caption).to_contain_text("all heads, their mean: 31 of 136 blocks read")
    n_cells = lab.n_cells()
    canvas.locator("[role=gridcell]").nth(16 * 15).focus()  # the last queries, the first keys
    lab.page.keyboard.press("Space")
    lab.page.keyboard.press("Shift+ArrowUp")
    expect(caption).to_contain_text("33 of 136 blocks read")
    canvas.get_by_role("combobox").select_option("layer 5, head 1")
    expect(caption).to_contain_text("layer 5, head 1: 33 of 136 blocks read")
    canvas.get_by_role("button", name="dense", exact=True).click()
    expect(caption).to_contain_text("136 of 136 blocks read, 100.0% of the attention kept")
    canvas.get_by_role("button", name="Ask the model").click()
    told = canvas.locator("[role=status]")
    expect(told).to_have_text(re.compile(r"perplexity (\d+\.\d\d); dense \1"), timeout=20_000)
    assert lab.n_cells() == n_cells

    rolling = lab.player_titled("Two sinks and a window of 12")
    rolling.locator(".lm-stage").click()
    lab.page.keyboard.press("End")
    expect(rolling.locator(".lm-caption").last).to_contain_text("The cache holds 14 of 48 tokens")

    pays = lab.explore_with("sequences at once")
    pays.locator(".lm-slide").nth(2).focus()
    lab.page.keyboard.press("ArrowUp")  # every second layer dense
    some = "16 of 32 layers dense, batch 8"
    expect(pays.locator(".lm-caption").last).to_contain_text(some, timeout=20_000)
    # the badge at the top is an image of Colab's, and there may be no network
    assert [error for error in lab.errors if "net::ERR" not in error] == []
