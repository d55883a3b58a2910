"""The picture that changes while a cell runs: seen live, kept when executed without a page."""

import base64
import re

import nbclient
import nbformat

from llmopt_lab.widgets import live
from llmopt_lab.widgets.panels import Frame, Meter

CELL = """
from llmopt_lab.widgets.live import Live
from llmopt_lab.widgets.panels import Frame, Meter

picture = Live()
for i in range(3):
    picture.show(Frame(f"step {i} of <3>", (Meter("steps", i, "", 3),)))
"""


def test_executed_without_a_page_the_last_picture_is_the_only_output():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    assert output.output_type == "display_data"
    assert output.data["text/plain"] == "step 2 of <3>"
    html = output.data["text/html"]
    assert 'alt="step 2 of &lt;3&gt;"' in html
    picture = base64.b64decode(re.search('base64,([^"]+)', html)[1]).decode()
    assert picture.startswith("<svg") and "67%" in picture.replace("&#37;", "%")


def test_outside_a_notebook_the_captions_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(live, "get_ipython", lambda: None)
    picture = live.Live()
    for i in range(2):
        picture.show(Frame(f"step {i}", (Meter("steps", i, ""),)))
    assert capsys.readouterr().out == "step 0\nstep 1\n"
