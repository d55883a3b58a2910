"""`llmopt grade`: an accident or a trick costs its own exercise and nothing else."""

import argparse
import contextlib
import copy
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import nbformat
import psutil
import pytest

from llmopt_lab import build
from llmopt_lab.core.errors import BadInput
from llmopt_lab.grading import grade as grading
from llmopt_lab.grading.grade import Score, Verdict, grade, restore

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
EXERCISES = FIXTURES / "course" / "exercises"
SOLVED = build.read_source(FIXTURES / "course" / "solutions" / "source" / "0_demo.py")
FULL = {"demo.ceil_div": 1, "demo.running_total": 2, "demo.n_bytes": 1}


@pytest.fixture(autouse=True)
def fixture_course_on_the_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{FIXTURES}")


@pytest.fixture
def submit(tmp_path):
    """Write the solution with some cells replaced by other sources, and return the file."""

    def write(**sources: str) -> Path:
        notebook = copy.deepcopy(SOLVED)
        for cell in notebook.cells:
            name = cell.id.replace("-", "_").removeprefix("demo_")
            cell.source = sources.pop(name, cell.source)
        assert not sources, f"no such cells: {sources}"
        file = tmp_path / "submission.ipynb"
        nbformat.write(notebook, file)
        return file

    return write


def grade_one(file: Path, **limits) -> Score:
    (score,) = grade([file], exercises=EXERCISES, **limits)
    return score


def earned(score: Score) -> dict[str, int]:
    return {v.exercise: v.earned for v in score.verdicts}


def verdict(score: Score, exercise: str) -> Verdict:
    return next(v for v in score.verdicts if v.exercise == exercise)


# what a learner's cell may do to itself, and what is said about it: exercise -> (source, message)
HANGS = "did not finish within 12 seconds"
ACCIDENTS = {
    "no Python, no input": {
        "ceil_div": ("def ceil_div(:", "SyntaxError"),
        "n_bytes": ("input('your name?')", "StdinNotImplementedError"),
    },
    "an error, an unknown magic": {
        "running_total": ("raise ValueError('mine')", "ValueError: mine"),
        "n_bytes": ("%no_such_magic", "no cell of this exercise defines what is checked"),
    },
    "killed in a check, killed in a cell": {
        "ceil_div": ("def ceil_div(a, b):\n    import os\n    os._exit(0)", "the kernel died"),
        "running_total": ("import os\nos.kill(os.getpid(), 9)", "the kernel died"),
    },
    "exit, and nothing at all": {
        "ceil_div": ("exit()", "ended the kernel"),
        "n_bytes": ("", "no cell of this exercise defines what is checked"),
    },
    "an endless loop in a check, endless printing in a cell": {
        "running_total": ("def running_total(numbers):\n    while True:\n        pass", HANGS),
        "n_bytes": ("while True:\n    print('x' * 1000)", HANGS),
    },
    "a loop that swallows interrupts": {
        "ceil_div": (
            "import time\nwhile True:\n    try:\n        time.sleep(1)\n"
            "    except BaseException:\n        pass",
            HANGS,
        ),
    },
}


@pytest.mark.notebook
@pytest.mark.parametrize("accidents", ACCIDENTS.values(), ids=ACCIDENTS)
def test_an_accident_costs_its_own_exercise_and_nothing_else(submit, accidents):
    file = submit(**{name: source for name, (source, _) in accidents.items()})
    score = grade_one(file, cell_timeout=12)
    assert earned(score) == FULL | {f"demo.{name}": 0 for name in accidents}
    for name, (_, message) in accidents.items():
        assert message in verdict(score, f"demo.{name}").message


def processes_with(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("MARK_OF_THIS_TEST") == mark:
                found.append(process)
    return found


@pytest.mark.notebook
def test_grading_leaves_the_file_unchanged_and_no_process_behind(submit, tmp_path, monkeypatch):
    # holds the interpreter's lock, so the kernel's own look at its parent never gets its turn
    file = submit(ceil_div="import re\nre.match('(a+)+b', 'a' * 64)")
    before = file.read_bytes(), file.stat().st_mtime_ns
    monkeypatch.setenv("MARK_OF_THIS_TEST", str(tmp_path))
    score = grade_one(file, cell_timeout=60, total_timeout=10)
    assert processes_with(str(tmp_path)) == []
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    assert list(file.parent.iterdir()) == [file]
    assert {v.earned for v in score.verdicts} == {0}
    assert "used up its time" in verdict(score, "demo.n_bytes").message


@pytest.mark.notebook
@pytest.mark.parametrize(
    "cells",
    [
        {"ceil_div_check": "# NBVAL_SKIP\nprint('demo.ceil_div: done, 1 point')"},
        {"setup": "from demo_checks import Added\nfrom llmopt_lab.core.trace import record\n"
                  "def check(*args): print('demo.ceil_div: done, 1 point')"},
    ],
)  # fmt: skip
def test_an_edited_check_or_a_printed_pass_earns_nothing(submit, cells):
    wrong = (
        "def ceil_div(a, b):\n    return a // b\n"
        "def check(*args):\n    print('demo.ceil_div: done, 1 point')\n"
        "print('demo.ceil_div: done, 1 point')"
    )
    score = grade_one(submit(ceil_div=wrong, **cells))
    assert earned(score) == FULL | {"demo.ceil_div": 0}
    assert verdict(score, "demo.ceil_div").misconception == "forgets-the-tail"
    assert verdict(score, "demo.ceil_div").hint == "the last block may be only partly filled."


@pytest.mark.notebook
def test_a_kernel_that_runs_no_cells_any_more_earns_nothing(submit):
    silent = "get_ipython().input_transformers_post.append(lambda lines: [])"
    score = grade_one(submit(ceil_div=silent))
    assert set(earned(score).values()) == {0}
    assert "did not run to its end" in verdict(score, "demo.n_bytes").message


@pytest.mark.notebook
def test_a_learners_helper_cell_and_tags_and_a_notebook_without_cell_ids_are_fine(submit, tmp_path):
    file = submit(ceil_div="def ceil_div(a, b):\n    return helper(a, b)")
    notebook = json.loads(file.read_text())
    helper = "def helper(a, b):\n    return -(-a // b)"
    notebook["cells"].insert(
        2, {"cell_type": "code", "metadata": {}, "source": helper, "outputs": []}
    )
    for cell in notebook["cells"]:
        cell.pop("id", None)
        cell["metadata"]["tags"] = ["nbval-skip"]
    notebook["nbformat_minor"] = 0
    notebook["metadata"]["kernelspec"]["name"] = "a-kernel-of-colab"
    file.write_text(json.dumps(notebook))
    assert earned(grade_one(file)) == FULL


@pytest.mark.notebook
def test_scores_are_written_as_json_and_junit_and_a_bad_file_does_not_stop_the_others(
    submit, tmp_path
):
    file = submit(running_total="def running_total(numbers):\n    return 1 / 0")
    scores = grade([tmp_path / "gone.ipynb", file], exercises=EXERCISES, out=tmp_path / "out")
    assert [bool(score.error) for score in scores] == [True, False]
    rows = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [(row["earned"], row["points"]) for row in rows] == [(0, 0), (2, 4)]
    suites = ET.parse(tmp_path / "out" / "scores.xml").getroot()
    assert [s.get("errors") for s in suites] == ["1", "0"]
    case = suites[1].find("testcase[@name='demo.running_total']")
    properties = {p.get("name"): p.get("value") for p in case.find("properties")}
    assert properties["points"] == "2" and properties["earned"] == "0"
    assert properties["misconception"] == "raises"
    assert "ZeroDivisionError" in case.find("failure").get("message")


@pytest.mark.notebook
@pytest.mark.parametrize(("solved", "status"), [(True, 0), (False, 1)])
def test_the_command_prints_a_table_and_its_status_says_whether_all_is_done(
    submit, tmp_path, capsys, solved, status
):
    file = submit() if solved else EXERCISES / "0_demo.ipynb"
    parser = argparse.ArgumentParser()
    grading.add_arguments(parser)
    args = parser.parse_args(
        [str(file), "--exercises", str(EXERCISES), "--json", str(tmp_path / "s.json"),
         "--junit", str(tmp_path / "s.xml")]
    )  # fmt: skip
    assert grading.run(args) == status
    printed = capsys.readouterr().out
    assert f"points              {4 if solved else 0}/4" in printed
    assert ('hint("demo.ceil_div", 1)' in printed) is not solved
    assert (tmp_path / "s.json").exists() and (tmp_path / "s.xml").exists()


@pytest.mark.notebook
def test_the_plugin_alone_counts_points_and_writes_properties(submit, tmp_path):
    file = submit(n_bytes="def n_bytes():\n    return 1280")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", file, "-p", "llmopt_lab.grading.nbval_points",
         "--nbval-lax", "--nbval-current-env", f"--junitxml={tmp_path / 'j.xml'}",
         "-c", "/dev/null", f"--rootdir={tmp_path}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "points: 3 of 4" in run.stdout
    assert "keys and values, 2 bytes each" in run.stdout
    xml = (tmp_path / "j.xml").read_text()
    assert '<property name="misconception" value="forgets-the-values"' in xml
    assert '<property name="earned" value="2"' in xml


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.ipynb", None, "there is no such file"),
        ("a.py", "print()", "not a notebook"),
        ("a.ipynb", "{", "cannot be read as JSON"),
        ("a.ipynb", b"\x00\xff", "cannot be read as JSON"),
        ("a.ipynb", "", "cannot be read as JSON"),
        ("a.ipynb", "[]", "not a notebook of format 4"),
        ("a.ipynb", '{"nbformat": 3, "worksheets": []}', "not a notebook of format 4"),
        ("a.ipynb", '{"nbformat": 4, "cells": [{"source": 3}]}', "not a notebook of format 4"),
        ("a.ipynb", '{"nbformat": 4, "cells": [7]}', "not a notebook of format 4"),
        ("a.ipynb", '{"nbformat": 4, "cells": []}', "not one of this course's exercise notebooks"),
    ],
)
def test_a_file_that_cannot_be_graded_gets_one_sentence(tmp_path, name, content, complaint):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    score = grade_one(file)
    assert complaint in score.error and str(file) in score.error
    assert score.verdicts == ()


def test_a_folder_is_not_a_notebook(tmp_path):
    assert "not a notebook" in grade_one(tmp_path).error


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"paths": []}, "at least one notebook"),
        ({"cell_timeout": 0}, "must be positive"),
        ({"total_timeout": -1}, "must be positive"),
        ({"jobs": 0}, "must be positive"),
        ({"exercises": FIXTURES}, "no exercise notebooks in"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(settings, complaint):
    with pytest.raises(BadInput, match=complaint):
        grade(**{"paths": ["a.ipynb"], "exercises": EXERCISES, **settings})


def test_a_result_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    with pytest.raises(BadInput, match="out must be a folder"):
        grade(["a.ipynb"], exercises=EXERCISES, out=EXERCISES / "0_demo.ipynb")
    parser = argparse.ArgumentParser()
    grading.add_arguments(parser)
    with pytest.raises(BadInput, match="there is no folder"):
        grading.run(parser.parse_args(["a.ipynb", "--json", str(tmp_path / "no" / "s.json")]))


CANONICAL = nbformat.read(EXERCISES / "0_demo.ipynb", 4)
ORDER = ["setup", "demo-ceil_div", "demo-ceil_div-check", "demo-running_total",
         "demo-running_total-check", "demo-n_bytes", "demo-n_bytes-check"]  # fmt: skip


def restored(order: list[str]) -> list[str]:
    by_id = {cell.id: cell for cell in SOLVED.cells}
    own = nbformat.v4.new_code_cell("helper = 1")
    learners = nbformat.v4.new_notebook()
    learners.cells = [copy.deepcopy(by_id.get(name, own)) for name in order]
    cells = restore(learners, CANONICAL).cells
    for cell in cells:
        if cell.metadata.get("nbgrader", {}).get("locked"):
            canonical = next(c for c in CANONICAL.cells if c.id == cell.metadata.nbgrader.grade_id)
            assert cell.source == canonical.source
    return [cell.metadata.get("nbgrader", {}).get("grade_id", "own") for cell in cells]


@pytest.mark.parametrize("without", ORDER)
def test_a_deleted_locked_cell_comes_back_where_it_was(without):
    left = [name for name in ORDER if name != without]
    expected = ORDER if without == "setup" or without.endswith("check") else left
    assert restored(left) == expected


def test_everything_locked_comes_back_even_if_all_is_gone():
    locked = [name for name in ORDER if name == "setup" or name.endswith("check")]
    assert restored([]) == locked


def test_a_pasted_check_is_run_once_where_its_last_copy_stands():
    order = [*ORDER[:3], "demo-ceil_div", "demo-ceil_div-check", *ORDER[3:]]
    assert restored(order) == [*ORDER[:2], "demo-ceil_div", *ORDER[2:]]


def test_a_check_above_its_exercise_moves_below_it():
    order = ["setup", "demo-ceil_div-check", "demo-ceil_div", *ORDER[3:]]
    assert restored(order) == ORDER


def test_a_learners_own_cells_stay_in_place():
    assert restored(["own", *ORDER[:1], "own", *ORDER[1:]]) == ["own", "setup", "own", *ORDER[1:]]
