"""Chapter 6's notebook in JupyterLab: it runs, its prediction locks, its first player is drawn."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "6_distillation.ipynb"


def explore_with(lab, label: str):
    box = lab.page.locator(".widget-vbox", has_text=label).first
    lab.settled_box(box)
    return box


def test_the_notebook_runs_and_its_prediction_locks(open_lab):
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
