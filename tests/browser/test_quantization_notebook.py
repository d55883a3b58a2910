"""Chapter 4's notebook in JupyterLab: it runs, its players step, its sliders work."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "4_quantization.ipynb"


def captions(player) -> list[str]:
    texts = player.locator(".lm-caption").all_inner_texts()
    return [text for text in texts if text]


def test_the_notebook_runs_and_moves(open_lab):
    lab = open_lab(NOTEBOOK)
    lab.run_all(timeout_s=240)
    lab.expect_clean_outputs()

    packing = lab.player_titled("Two codes in a byte")
    packing.locator(".lm-stage").first.click()
    lab.page.keyboard.press("End")
    right, wrong = captions(packing)[-2:]
    assert right == "codes -8 and 7 share byte 2: 0111 1000, 120. Unpacked: -8 and 7."
    assert wrong.endswith("Unpacked: -8 and -1. That is not what went in.")

    wave = lab.player_titled("GPTQ, column by column")
    wave.locator(".lm-stage").click()
    for _ in range(2):
        lab.page.keyboard.press("ArrowRight")
    assert captions(wave)[-1].startswith("step 1: column 1 rounded")
    lab.page.keyboard.press("End")
    expect(wave.locator(".lm-counter")).to_have_text("step 11 of 11")
    assert re.search(r"Output error 0\.\d+ %, by rounding alone 1\.\d+ %", captions(wave)[-1])

    guess = lab.page.locator(".lm-predict").first
    guess.scroll_into_view_if_needed()
    guess.get_by_role("spinbutton").fill("6")
    guess.get_by_role("button", name=re.compile("lock", re.IGNORECASE)).click()
    expect(guess).to_contain_text(re.compile(r"It is \d.*; you said 6"))

    bits = lab.explore_with("bits of a code")
    bits.locator(".lm-slide").nth(0).focus()
    lab.page.keyboard.press("Home")
    expect(bits.locator(".lm-caption").last).to_contain_text("2 bits in groups of 128: 2.125 bits")

    quality = lab.explore_with("perplexity on held-out text")
    model, n_bits = (quality.locator(".lm-slide").nth(i) for i in range(2))
    expect(quality.locator(".lm-caption").last).to_contain_text("3 bits, groups of 128: 3.13 bits")
    n_bits.focus()
    lab.page.keyboard.press("End")
    expect(quality.locator(".lm-caption").last).to_contain_text("8 bits, groups of 128")
    model.focus()
    lab.page.keyboard.press("End")
    expect(model).to_be_focused()
    expect(quality.locator(".lm-caption").last).to_contain_text("8 bits, groups of 128")

    layer = lab.player_titled("of 384 columns rounded")
    layer.locator(".lm-stage").click()
    lab.page.keyboard.press("End")
    expect(layer.locator(".lm-caption").last).to_contain_text("384 of 384 columns rounded")
    # the badge at the top is an image of Colab's, and there may be no network
    assert [error for error in lab.errors if "ERR_NAME_NOT_RESOLVED" not in error] == []
