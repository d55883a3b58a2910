"""`llmopt grade`: who handed in what, in which order, what is kept, and cells put back."""

import argparse
import copy
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import pytest

from llmopt_lab import build
from llmopt_lab.core.errors import BadInput
from llmopt_lab.grading import grade as grading
from llmopt_lab.grading.grade import Score, grade
from llmopt_lab.grading.submissions import find_submissions, minutes_of, restore, student_of

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
    (score,) = grade([file], exercises=EXERCISES, checks=["demo_checks"], **limits)
    return score


def verdicts(*earned: int) -> list[dict]:
    """A worker's verdicts on the three exercises."""
    rows = []
    for (name, points), mine in zip(FULL.items(), earned, strict=True):
        wrong = {} if mine else {"message": "no", "misconception": "forgets-the-tail",
                                 "hint": "round up.", "outcome": "wrong"}  # fmt: skip
        rows.append({"exercise": name, "points": points, "earned": points * mine, **wrong})
    return rows


class FakeWorker:
    """Answers at once; counts what it was asked, and stops the run at the `stop_at`-th."""

    def __init__(self, stop_at: int = 10**9):
        self.asked, self.stop_at, self.lock = [], stop_at, threading.Lock()

    def __call__(self, path: Path) -> dict:
        with self.lock:
            self.asked.append(path)
            if len(self.asked) == self.stop_at:
                raise KeyboardInterrupt
        if "trouble" in path.parent.name:
            raise OSError("no space left")
        return {"notebook": "0_demo", "verdicts": verdicts(1, "7" not in path.parent.name, 1)}


def hand_in(folder: Path, n: int) -> None:
    for i in range(n):
        file = folder / f"student {i:03}" / "0_demo.ipynb"
        file.parent.mkdir(parents=True)
        file.write_text(f'{{"cells": [], "nbformat": 4, "number": {i}}}')


def test_two_hundred_notebooks_come_back_in_order_and_trouble_with_one_is_its_own(tmp_path):
    hand_in(tmp_path / "class", 200)
    (tmp_path / "class" / "student 050").rename(tmp_path / "class" / "student 050 trouble")
    scores = grade([tmp_path / "class"], exercises=EXERCISES, jobs=8, grade_one=FakeWorker())
    assert [s.student[:11] for s in scores] == [f"student {i:03}" for i in range(200)]
    assert [s.student for s in scores if s.error] == ["student 050 trouble"]
    assert {s.student for s in scores if s.earned == 2} == {
        f"student {i:03}" for i in range(200) if "7" in str(i)
    }


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    hand_in(tmp_path / "class", 20)
    settings = {"exercises": EXERCISES, "out": tmp_path / "out"}
    first = FakeWorker(stop_at=8)
    with pytest.raises(KeyboardInterrupt):
        grade([tmp_path / "class"], jobs=1, grade_one=first, **settings)
    second = FakeWorker()
    scores = grade([tmp_path / "class"], jobs=3, grade_one=second, **settings)
    assert len(scores) == 20 and not any(s.error for s in scores)
    assert set(first.asked[:7]).isdisjoint(second.asked)
    third = FakeWorker()
    assert grade([tmp_path / "class"], grade_one=third, **settings) == scores
    assert third.asked == []


def test_only_what_has_changed_is_graded_again(tmp_path):
    hand_in(tmp_path / "class", 4)
    settings = {"exercises": EXERCISES, "out": tmp_path / "out"}
    grade([tmp_path / "class"], grade_one=FakeWorker(), **settings)
    changed = tmp_path / "class" / "student 002" / "0_demo.ipynb"
    changed.write_text("{}")
    worker = FakeWorker()
    grade([tmp_path / "class"], grade_one=worker, **settings)
    assert worker.asked == [changed]
    worker = FakeWorker()  # other limits may lead to another verdict
    grade([tmp_path / "class"], grade_one=worker, cell_timeout=5, **settings)
    assert len(worker.asked) == 4
    worker = FakeWorker()
    grade([tmp_path / "class"], grade_one=worker, again=True, **settings)
    assert len(worker.asked) == 4


def test_a_result_that_was_cut_off_while_it_was_written_is_graded_again(tmp_path):
    hand_in(tmp_path / "class", 2)
    settings = {"exercises": EXERCISES, "out": tmp_path / "out"}
    grade([tmp_path / "class"], grade_one=FakeWorker(), **settings)
    one = sorted((tmp_path / "out" / "graded").iterdir())[0]
    one.write_text(one.read_text()[:20])
    worker = FakeWorker()
    grade([tmp_path / "class"], grade_one=worker, **settings)
    assert len(worker.asked) == 1


@pytest.mark.notebook
def test_a_judge_that_dies_is_replaced(submit, monkeypatch):
    file = submit()
    worker = grading.Worker(
        {
            "limits": {"total_timeout": 60.0}, "exercises": str(EXERCISES), "hidden": [],
            "checks": ["no_such_module"], "engine": "", "image": "",
        }
    )  # fmt: skip
    assert "the judge itself failed" in worker.grade(file)["error"]
    worker.settings["checks"] = ["demo_checks"]
    assert [v["earned"] for v in worker.grade(file)["verdicts"]] == [1, 2, 1]
    worker.close()


@pytest.mark.parametrize(
    ("name", "who"),
    [
        ("ada", ("ada", "")),
        ("Ada Lovelace_123456_assignsubmission_file_", ("Ada Lovelace", "123456")),
        ("Ada Lovelace_123456_assignsubmission_file", ("Ada Lovelace", "123456")),
        ("lovelaceada_4711_80815_1_paged_attention", ("lovelaceada", "4711")),
        ("lovelaceada_LATE_4711_80815_0_demo-2", ("lovelaceada", "4711")),
        ("0_demo", ("0_demo", "")),
    ],
)
def test_moodles_and_canvas_names_give_the_student_and_the_number(name, who):
    assert student_of(name) == who


def test_checkpoints_and_hidden_files_are_not_submissions(tmp_path):
    for name in (
        "ada/.ipynb_checkpoints/x.ipynb",
        "ada/x.ipynb",
        "__MACOSX/ada/x.ipynb",
        "b.ipynb",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = find_submissions([tmp_path])
    assert [(s.student, s.path.name) for s in found] == [("ada", "x.ipynb"), ("b", "b.ipynb")]


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(BadInput, match="nothing to grade"):
        find_submissions([tmp_path])


def timed(*minutes: float | None, colab: bool = True):
    """The set-up cell at 0, then the three checks at these minutes."""
    notebook = copy.deepcopy(SOLVED)
    cells = [c for c in notebook.cells if c.id == "setup" or c.id.endswith("check")]
    for cell, at in zip(cells, (0, *minutes), strict=True):
        if at is not None and colab:
            cell.metadata.executionInfo = {"timestamp": 1.7e12 + at * 60_000}
        elif at is not None:
            when = datetime.fromtimestamp(1.7e9 + at * 60, UTC)
            cell.metadata.execution = {"shell.execute_reply": when.isoformat()}
    return notebook


def test_minutes_are_the_times_between_the_checks():
    expected = {"demo.ceil_div": 4, "demo.running_total": 8.5, "demo.n_bytes": 1}
    assert minutes_of(timed(4, 12.5, 13.5)) == expected
    assert minutes_of(timed(4, 12.5, 13.5, colab=False)) == expected


def test_a_check_that_was_run_again_later_does_not_spoil_the_others():
    assert minutes_of(timed(30, 12, 13)) == {"demo.ceil_div": 30}


def test_no_minutes_are_made_up():
    assert minutes_of(SOLVED) == {}
    assert minutes_of(timed(0.1, 0.2, 0.3)) == {}  # Run All
    assert minutes_of(timed(None, 10, None)) == {"demo.running_total": 10}


@pytest.mark.notebook
@pytest.mark.parametrize(("solved", "status"), [(True, 0), (False, 1)])
def test_the_command_prints_a_table_and_its_status_says_whether_all_is_done(
    submit, tmp_path, capsys, solved, status
):
    file = submit() if solved else EXERCISES / "0_demo.ipynb"
    parser = argparse.ArgumentParser()
    grading.add_arguments(parser)
    args = parser.parse_args(
        [str(file), "--exercises", str(EXERCISES), "--checks", "demo_checks",
         "--json", str(tmp_path / "s.json"), "--junit", str(tmp_path / "s.xml")]
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
    with pytest.raises(BadInput, match="nothing to grade"):
        grade_one(tmp_path)


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
    return [cell.metadata.get("nbgrader", {}).get("grade_id") or "own" for cell in cells]


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
