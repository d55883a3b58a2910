"""nbgrader takes the notebooks as they are: its own assignment and autograding, in its course."""

import contextlib
import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("nbgrader")

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "tests" / "fixtures" / "course"
STUDENTS = {"right": "full", "cheat": "none"}


@contextlib.contextmanager
def working_in(folder: Path):
    """nbgrader works in the current folder, and finds alembic on the PATH."""
    before, path = Path.cwd(), os.environ["PATH"]
    os.chdir(folder)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"
    try:
        yield
    finally:
        os.chdir(before)
        os.environ["PATH"] = path


def generate(course: Path, notebook: Path, name: str = "ps1"):
    """nbgrader's API on a course that holds one assignment of one notebook; the API."""
    from nbgrader.apps import NbGraderAPI
    from traitlets.config import Config

    source = course / "source" / name
    source.mkdir(parents=True)
    shutil.copy(notebook, source / "task.ipynb")
    config = Config()
    config.CourseDirectory.root = str(course)
    config.Exchange.course_id = "lab"
    config.CourseDirectory.db_url = f"sqlite:///{course}/gradebook.db"
    # the checks of the fixture are a module beside it
    config.ExecutePreprocessor.timeout = 120
    api = NbGraderAPI(config=config)
    result = api.generate_assignment(name)
    assert result["success"], result["log"]
    return api


@pytest.mark.parametrize(
    "notebook", sorted((ROOT / "solutions").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_nbgraders_own_preprocessors_take_every_solution_notebook(notebook):
    """What generate_assignment does to a notebook, without its course: the exercise comes out."""
    from nbgrader.preprocessors import CheckCellMetadata, ClearOutput, ClearSolutions, LockCells

    made = nbformat.read(notebook, 4)
    for step in (CheckCellMetadata(), ClearSolutions(), ClearOutput(), LockCells()):
        made, _ = step.preprocess(made, {})
    ours = nbformat.read(ROOT / "exercises" / notebook.name, 4)
    assert [c.source for c in made.cells] == [c.source for c in ours.cells]
    for theirs, mine in zip(made.cells, ours.cells, strict=True):
        if theirs.metadata.get("nbgrader", {}).get("locked"):
            assert mine.metadata.editable is False and mine.metadata.deletable is False


@pytest.mark.slow
def test_generate_and_autograde_give_the_points_and_put_a_cheated_check_back(tmp_path, monkeypatch):
    from nbgrader.api import Gradebook

    from llmopt_lab import build

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(FIXTURE.parent)]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    solved = build.read_source(FIXTURE / "solutions/source/0_demo.py")
    master = tmp_path / "master.ipynb"
    nbformat.write(solved, master)
    course = tmp_path / "course"
    with working_in(tmp_path):
        api = generate(course, master)
        released = nbformat.read(course / "release/ps1/task.ipynb", 4)
        assert "raise NotImplementedError()" in "".join(c.source for c in released.cells)
        assert "BEGIN SOLUTION" not in "".join(c.source for c in released.cells)
        for student in STUDENTS:
            handed_in = nbformat.from_dict(released)
            for cell, answer in zip(handed_in.cells, solved.cells, strict=True):
                grading = cell.metadata.get("nbgrader", {})
                if student == "right" and grading.get("solution"):
                    cell.source = answer.source
                if student == "cheat" and grading.get("grade"):
                    cell.source = "pass"
            folder = course / "submitted" / student / "ps1"
            folder.mkdir(parents=True)
            nbformat.write(handed_in, folder / "task.ipynb")
            result = api.autograde("ps1", student, create=True)
            assert result["success"], result["log"]
        with Gradebook(f"sqlite:///{course}/gradebook.db") as book:
            scores = {s: book.find_submission("ps1", s) for s in STUDENTS}
            points = {s: (found.score, found.max_score) for s, found in scores.items()}
    most = sum(
        c.metadata.nbgrader.points
        for c in solved.cells
        if c.metadata.get("nbgrader", {}).get("grade")
    )
    assert (
        points == {s: (most if STUDENTS[s] == "full" else 0, most) for s in STUDENTS} and most > 0
    )
