"""The widgets and the notebooks under Colab's versions of what runs and draws them.

`make .venv-colab` makes the environment. What it has not: Colab's Python, torch, GPU and page.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmopt_lab import badges

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-colab" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

pytestmark = [
    pytest.mark.notebook,
    pytest.mark.skipif(
        not PYTHON.exists(), reason="no .venv-colab; make it with: make .venv-colab"
    ),
]


def run_there(program: str, *arguments: str) -> str:
    """Run a program under Colab's versions; its output, or a failure that shows what it wrote."""
    dropped = ("TRITON_INTERPRET", "PYTHONPATH", "VIRTUAL_ENV", "JUPYTER_PATH")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    done = subprocess.run(
        [PYTHON, *(["-c", program] if program else []), *arguments],
        cwd=ROOT / "notebooks",
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_environment_has_colabs_versions():
    pinned = {}
    for line in (ROOT / "tests" / "colab.txt").read_text().splitlines():
        name, found, version = line.partition(";")[0].partition("#")[0].strip().partition("==")
        if found:
            pinned[name] = version
    program = (
        "import json, sys\nfrom importlib.metadata import version\n"
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    there = json.loads(run_there(program, *pinned))
    assert {name: v.partition("+")[0] for name, v in there.items()} == pinned
    assert there["ipywidgets"] == "7.7.1" and there["ipython"] == "7.34.0"


def test_installing_the_course_there_changes_no_package():
    out = run_there(
        "",
        *(
            "-m",
            "pip",
            "install",
            "--dry-run",
            "--no-build-isolation",
            "--no-index",
            "-e",
            str(ROOT),
        ),
    )
    would = [line for line in out.splitlines() if line.startswith("Would install")]
    assert would == ["Would install llmopt_lab-0.1.0"]


WIDGETS = """
import json
from llmopt_lab.widgets.panels import Cell, Frame, Grid
from llmopt_lab.widgets.player import Player
from llmopt_lab.widgets.predict import Predict

def frame(i):
    return Frame(f"step {i}", (Grid("blocks", ("A",), ((Cell(str(i), "active"),),)),))

player = Player([frame(i) for i in range(3)])
player.position = 2
bundles = []
for widget in (player, Predict("How many?", answer=3)):
    assert getattr(type(widget), "_ipython_display_", None) is None  # ipywidgets 7 would prefer it
    bundle = widget._repr_mimebundle_(include=None, exclude=None)
    bundles.append(sorted((bundle[0] if isinstance(bundle, tuple) else bundle)))
print(json.dumps({"position": player.position, "bundles": bundles}))
"""


def test_the_widgets_are_made_and_offer_a_still_picture():
    made = json.loads(run_there(WIDGETS))
    assert made["position"] == 2
    for bundle in made["bundles"]:
        assert {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"} <= set(
            bundle
        )


RUN = """
import json, sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], 4)
NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
print(json.dumps({
    "first": outputs[0].get("text", ""),
    "pictures": sum("text/html" in o.get("data", {}) for o in outputs),
    "stderr": [o.text for o in outputs if o.get("name") == "stderr"],
}))
"""


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_from_top_to_bottom(notebook):
    ran = json.loads(run_there(RUN, str(notebook)).splitlines()[-1])
    assert ran["first"].startswith("llmopt_lab ") and "ipywidgets 7.7.1" in ran["first"]
    assert ran["pictures"] >= 1
    assert not ran["stderr"]


def test_there_are_notebooks_to_run():
    assert (ROOT / "notebooks" / "0_start_here.ipynb") in NOTEBOOKS


def test_every_notebook_has_its_badge_and_the_set_up_cell():
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        badge = badges.colab_badge(f"notebooks/{path.name}", badges.repository())
        assert badge in "".join(cells[0]["source"]), path.name
        first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        lines = first.splitlines()
        assert lines[:2] == ["try:", "    import llmopt_lab"], path.name
        assert f"llmopt_lab @ git+{badges.repository()}" in lines[3], path.name
        assert "start()" in lines and len(lines) <= 8, path.name


@pytest.mark.parametrize("installed", [True, False])
def test_the_set_up_cell_installs_only_what_is_missing(installed, monkeypatch):
    """Run it with a `%pip` that only notes what it is asked."""
    cells = json.loads((ROOT / "notebooks" / "0_start_here.ipynb").read_text())["cells"]
    cell = next("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    asked = []

    class Shell:
        def run_line_magic(self, name, line):
            asked.append((name, line))

    if not installed:
        monkeypatch.setitem(sys.modules, "llmopt_lab", None)  # its import raises
    exec(cell, {"get_ipython": Shell})
    wanted = ("pip", f'install -q "llmopt_lab @ git+{badges.repository()}"')
    assert asked == ([] if installed else [wanted])
