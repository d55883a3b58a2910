"""The main job: `make lab`, and the first notebook in a browser, as a learner meets it."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from serving import free_port, serving

ROOT = Path(__file__).parents[2]
TOKEN = "browser-tests"

pytestmark = pytest.mark.browser


@pytest.fixture
def lab_address(tmp_path):
    """`make lab` in a copy of the checkout, as it stands; the address of its server."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "0_start_here.ipynb", tmp_path / "notebooks")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    port = free_port()
    arguments = f"--no-browser --port={port} --port-retries=0 --IdentityProvider.token={TOKEN}"
    private = {name: str(tmp_path / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "IPYTHONDIR")}
    private |= {
        n: str(tmp_path / n) for n in ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    }
    address = f"http://127.0.0.1:{port}"
    with serving(
        ["make", "-o", ".venv/ready", "lab", f"ARGS={arguments}"],
        f"{address}/api/status?token={TOKEN}",
        tmp_path / "log",
        cwd=tmp_path,
        env=os.environ | private,
    ):
        yield address


def test_make_lab_opens_the_start_notebook_which_runs_and_moves(lab_address, chromium, tmp_path):
    context = chromium.new_context(viewport={"width": 1280, "height": 1500})
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{lab_address}/?token={TOKEN}")  # what the browser is sent to
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    assert "/lab/tree/notebooks/0_start_here.ipynb" in page.url
    page.get_by_text(re.compile(r"\| Idle$")).wait_for(timeout=60_000)
    page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-item", has_text=re.compile("^Run All Cells")).first.click()

    player = page.locator(".lm-player").first
    player.wait_for(timeout=60_000)
    output = page.locator(".jp-OutputArea-output", has_text="llmopt_lab").first.text_content()
    assert output.startswith("llmopt_lab ") and "\n" not in output.strip()

    caption = player.locator(".lm-caption:not(.lm-ghost)").first
    slider = player.locator("input[type=range]").first
    slider.focus()
    page.keyboard.press("Home")
    page.wait_for_function(
        "node => node.textContent.includes('0 of 4')", arg=caption.element_handle()
    )
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "node => node.textContent.includes('1 of 4')", arg=caption.element_handle()
    )

    question = page.locator(".lm-predict").first
    assert "23,040" not in question.inner_text()
    question.locator("input").first.fill("20000")
    question.get_by_role("button", name="Lock it in").click()
    question.get_by_text("23,040", exact=False).first.wait_for(timeout=20_000)
    page.screenshot(path=tmp_path / "start.png", full_page=True)
    assert errors == []
    context.close()
