"""The widgets in the classic notebook page with Colab's ipywidgets 7.7.1: drawn, stepped, slid.

Colab's own page is not public; this is the nearest front end that can be installed (notebook 6,
from .venv-colab). Shortcuts of the page (b: a new cell below) must not hear a widget's keys.
"""

import os
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect
from serving import free_port, serving

ROOT = Path(__file__).parents[2]
BIN = ROOT / ".venv-colab" / "bin"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not BIN.exists(), reason="no .venv-colab; make it with: make .venv-colab"),
]

CELLS = [
    """
from llmopt_lab.widgets.explore import Choice, Explore
from llmopt_lab.widgets.panels import Cell, Frame, Grid
from llmopt_lab.widgets.player import Player
from llmopt_lab.widgets.predict import Predict

def frame(i, n):
    return Frame(f"step {i}: {n} blocks", (Grid("blocks", ("A",), ((Cell(str(i), "active"),),)),))

Player([frame(i, 5) for i in range(4)], title="A run")
""",
    """
Explore(
    lambda n: Player([frame(i, n) for i in range(3)], title="Blocks"),
    n=Choice("how many", (2, 3, 4), 3),
)
""",
    'Predict("How many bytes?", answer=4, unit="bytes", explain="Two times two.")',
    """
import torch
from llmopt_lab.widgets.paint import Cost, Paint

may = torch.ones(4, 4).tril().bool()
Paint(
    {"head 0": may / may.sum(1, keepdim=True)},
    [Cost("bytes moved", "bytes", may * 64)],
    allowed=may,
    presets={"window": may.triu(-1)},
    row_labels=[f"q {i}" for i in range(4)],
    column_labels=[f"k {i}" for i in range(4)],
)
""",
]


@pytest.fixture
def classic(tmp_path, chromium):
    """A page that shows the notebook above in the classic front end, its kernel ready."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, tmp_path / "widgets.ipynb")
    port = free_port()
    private = {
        name: str(tmp_path / name)
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")
    }
    dropped = ("TRITON_INTERPRET", "VIRTUAL_ENV", "JUPYTER_PATH")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    environment |= private | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [BIN / "python", "-m", "notebook", "--no-browser", f"--port={port}", "--allow-root"]
    command += [f"--NotebookApp.token={'t' * 8}", f"--notebook-dir={tmp_path}"]
    address = f"http://127.0.0.1:{port}"
    status = f"{address}/api/status?token={'t' * 8}"
    with (
        serving(command, status, tmp_path / "log", env=environment),
        chromium.new_context(viewport={"width": 1280, "height": 1400}) as context,
    ):
        page = context.new_page()
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(f"{address}/notebooks/widgets.ipynb?token={'t' * 8}")
        page.wait_for_selector("#kernel_indicator_icon.kernel_idle_icon", timeout=60_000)
        yield page


def test_every_widget_is_drawn_and_answers_keys_on_colabs_versions(classic):
    classic.evaluate("Jupyter.notebook.execute_all_cells()")
    cells = classic.locator(".code_cell")

    player = cells.nth(0).locator(".lm-player")
    player.wait_for(timeout=60_000)
    player.locator(".lm-stage").click()
    classic.keyboard.press("ArrowRight")
    expect(player.locator(".lm-caption").last).to_contain_text("step 1: 5 blocks")
    classic.keyboard.press("End")
    expect(player.locator(".lm-counter")).to_have_text("step 4 of 4")
    classic.keyboard.press("b")  # the page's shortcut for a new cell

    explore = cells.nth(1)
    slide = explore.locator(".lm-slide")
    slide.focus()
    classic.keyboard.press("End")
    expect(explore.locator(".lm-caption").last).to_contain_text("4 blocks")
    expect(slide).to_be_focused()

    guess = cells.nth(2).locator(".lm-predict")
    guess.get_by_role("spinbutton").fill("5")
    guess.get_by_role("button", name="Lock").click()
    expect(guess).to_contain_text("It is 4")

    mask = cells.nth(3).locator(".lm-paint")
    said = mask.locator(".lm-caption")
    before = said.inner_text()
    mask.locator("[role=gridcell][tabindex='0']").focus()
    classic.keyboard.press("ArrowDown")
    classic.keyboard.press("Space")
    expect(said).not_to_have_text(before)

    assert cells.count() == len(CELLS)
    assert classic.locator(".output_error, .output_stderr").count() == 0
    assert classic.errors == []
