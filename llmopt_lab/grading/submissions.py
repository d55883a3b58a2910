"""What was handed in: which files, whose, and the notebook in each, with our cells put back."""

import copy
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from llmopt_lab.core.errors import BadInput, require

MAX_FILE = 64 << 20  # bytes of a notebook
IGNORED = ("__MACOSX", "__pycache__")
MOODLE = re.compile(r"(.+?)_(\d+)_assignsubmission_\w+$")
CANVAS = re.compile(r"([^_]+)(?:_LATE)?_(\d+)_(\d+)_.+$")
ALL_AT_ONCE = 2.0  # minutes: from the set-up cell to the last check, that was "Run All"


@dataclass(frozen=True)
class Submission:
    """One notebook of one student."""

    path: Path
    student: str  # as the folder or the file is called
    student_id: str = ""  # the learning platform's number, where the name has one
    problem: str = ""  # why it cannot be read, if that is known already


@dataclass(frozen=True)
class Verdict:
    """What one exercise earned, and if not all: why, and where to look next."""

    exercise: str  # "room.function"
    points: int  # to be had
    earned: int
    message: str = ""  # empty when done
    misconception: str = ""
    hint: str = ""
    outcome: str = "done"  # or "wrong", "raises", "not-written", "stopped", "not-run"


@dataclass(frozen=True)
class Score:
    """The verdicts on one notebook; or the reason why it cannot be graded."""

    file: str
    verdicts: tuple[Verdict, ...] = ()
    error: str = ""
    student: str = ""
    student_id: str = ""
    notebook: str = ""  # the canonical one it was made from, "1_paged_attention"
    minutes: dict[str, float] = field(default_factory=dict)  # exercise -> as its front end noted
    plan: dict[str, int] = field(default_factory=dict)  # exercise -> minutes as planned
    missing: tuple[str, ...] = ()  # what of the isolation this system refused

    @property
    def points(self) -> int:
        return sum(v.points for v in self.verdicts)

    @property
    def earned(self) -> int:
        return sum(v.earned for v in self.verdicts)


def find_submissions(paths: Sequence[str | Path]) -> list[Submission]:
    """The notebooks in files and folders, in a fixed order.

    In a folder, a student is the first folder below it, or the name of a file that lies in it
    directly. Names as Moodle and Canvas download them give the student's number, too. Symbolic
    links are not followed.

    Raises:
        BadInput: a folder without anything to grade.
    """
    found: list[Submission] = []
    for path in map(Path, paths):
        if not path.is_dir() or path.is_symlink():
            found.append(Submission(path, *student_of(path.stem)))
            continue
        before = len(found)
        for entry in sorted(path.iterdir()):
            if not _is_hidden(entry.name):
                found += _in_entry(entry)
        require(
            len(found) > before,
            f"there is nothing to grade in {path}: no notebook and no folder of a student",
        )
    return found


def _in_entry(entry: Path) -> list[Submission]:
    """The notebooks of one entry of the folder: a file, or one student's folder."""
    if entry.is_symlink():
        who = student_of(entry.stem)
        return [Submission(entry, *who, f"{entry} is a symbolic link, which is not followed")]
    if not entry.is_dir():
        is_notebook = entry.suffix == ".ipynb"
        return [Submission(entry, *student_of(entry.stem))] if is_notebook else []
    who, found, others = student_of(entry.name), [], []
    for folder, folders, files in os.walk(entry):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for file in (Path(folder) / name for name in sorted(files) if not _is_hidden(name)):
            if file.suffix != ".ipynb":
                others.append(file.name)
                continue
            linked = file.is_symlink()
            problem = f"{file} is a symbolic link, which is not followed" if linked else ""
            found.append(Submission(file, *who, problem))
    there = f"; there is {', '.join(others[:3])}" if others else ""
    none = Submission(entry, *who, f"{entry}: no notebook (.ipynb) in this folder{there}")
    return found or [none]


def student_of(name: str) -> tuple[str, str]:
    """Who a folder or a file belongs to: (name, number of the learning platform or "")."""
    if match := MOODLE.match(name.rstrip("_")):
        return match[1], match[2]
    if match := CANVAS.match(name):
        return match[1], match[2]
    return name, ""


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in IGNORED


def read_canonical(folder: Path) -> dict:
    """The exercise notebooks of a folder, by their names without the suffix.

    Raises:
        BadInput: it has none.
    """
    import nbformat

    files = sorted(folder.glob("*.ipynb"))
    require(
        bool(files),
        f"no exercise notebooks in {folder}: grading takes its checks from there. "
        "Run in a checkout of the course, or name the folder with --exercises",
    )
    return {file.stem: nbformat.read(file, 4) for file in files}


def read_learners(path: Path):
    """A learner's notebook, of any 4.x format.

    Raises:
        BadInput: it is not there, not a notebook, or broken.
    """
    import nbformat

    require(path.exists(), f"{path}: there is no such file")
    require(not path.is_symlink(), f"{path} is a symbolic link, which is not followed")
    require(
        path.is_file() and path.suffix == ".ipynb",
        f"{path} is not a notebook: its name does not end in .ipynb",
    )
    size = path.stat().st_size
    require(size <= MAX_FILE, f"{path} has {size >> 20:,} MiB; a notebook has at most 64")
    try:
        plain = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as JSON ({error}); save it again") from error
    cells = plain.get("cells") if isinstance(plain, dict) else None
    require(
        isinstance(cells, list)
        and plain.get("nbformat") == 4
        and all(
            isinstance(cell, dict)
            and isinstance(cell.get("metadata", {}), dict)
            and isinstance(cell.get("source", ""), (str, list))
            for cell in cells
        ),
        f"{path} is JSON, but not a notebook of format 4; open it in Jupyter and save it again",
    )
    notebook = nbformat.v4.new_notebook()
    for cell in cells:
        source = cell.get("source", "")
        make = nbformat.v4.new_code_cell if cell.get("cell_type") == "code" else None
        if make:
            text = source if isinstance(source, str) else "".join(map(str, source))
            notebook.cells.append(make(text, metadata=cell.get("metadata", {})))
    return notebook


def exercise_of(grade_id: str) -> str:
    """ "paged_attention-slot_mapping-check" is a cell of "paged_attention.slot_mapping"."""
    return ".".join(grade_id.split("-")[:2])


def grade_id(cell) -> str:
    """The cell's nbgrader id; empty for a cell that the learner added."""
    grading = cell.metadata.get("nbgrader")
    name = grading.get("grade_id") if isinstance(grading, dict) else None
    return name if isinstance(name, str) else ""


def restore(learners, canonical):
    """The learner's code cells, with the canonical locked cells in their places.

    A locked cell that was pasted more than once stands where its last copy stood; one that was
    deleted stands behind its nearest predecessor. A check never stands before its exercise.
    """
    from nbformat import NotebookNode

    code = [cell for cell in canonical.cells if cell.cell_type == "code"]
    locked = {grade_id(c): c for c in code if c.metadata.get("nbgrader", {}).get("locked")}
    last = {grade_id(cell): index for index, cell in enumerate(learners.cells)}
    cells = [
        locked.get(grade_id(cell), cell)
        for index, cell in enumerate(learners.cells)
        if grade_id(cell) not in locked or last[grade_id(cell)] == index
    ]
    for name, cell in locked.items():
        there = [grade_id(c) for c in cells]
        before = [grade_id(c) for c in code[: code.index(cell)]]
        exercise = exercise_of(name)
        graded = cell.metadata.nbgrader.get("grade")
        own = [i for i, g in enumerate(there) if g and g != name and exercise_of(g) == exercise]
        if name not in there:
            known = [i for i, g in enumerate(there) if g and g in before]
            cells.insert(max(own if graded and own else known, default=-1) + 1, cell)
        elif graded and own and there.index(name) < max(own):
            cells.insert(max(own), cells.pop(there.index(name)))
    restored = copy.deepcopy(canonical)
    restored.cells = copy.deepcopy(cells)
    for index, cell in enumerate(restored.cells):
        cell.id = f"cell-{index}"
        cell.outputs, cell.execution_count = [], None
        if grade_id(cell) not in locked:  # nor does a learner's own cell become a check, or points
            cell.metadata = NotebookNode(nbgrader=NotebookNode(grade_id=grade_id(cell)))
    return restored


def canonical_of(learners, canonical: dict, path: Path) -> str:
    """The name of the exercise notebook that shares most ids with a learner's.

    Raises:
        BadInput: none does.
    """
    mine = {grade_id(cell) for cell in learners.cells} - {""}
    overlap = {
        name: len(mine & {grade_id(cell) for cell in notebook.cells})
        for name, notebook in canonical.items()
    }
    best = max(overlap, key=overlap.get)
    require(
        overlap[best] > 0,
        f"{path} is not one of this course's exercise notebooks: no cell carries one of their "
        "ids. Start from a fresh copy and paste your code into its cells",
    )
    return best


def minutes_of(learners) -> dict[str, float]:
    """Minutes that each exercise took: from the run of the check before it to that of its own.

    From the times that Colab, and JupyterLab with `recordTiming`, leave in a notebook; a check that
    was run again later counts by its last run, so only what is in order is used. Empty if no times
    were recorded, or if all cells were run in one go.
    """
    times: list[tuple[str, float]] = []
    first = None
    for cell in learners.cells:
        when = _time_of(cell.metadata)
        if when is None:
            continue
        first = when if first is None else first
        if (cell.metadata.get("nbgrader") or {}).get("grade"):
            times.append((exercise_of(grade_id(cell)), when))
    if not times or (times[-1][1] - first) / 60 < ALL_AT_ONCE:
        return {}
    found, before = {}, first
    for exercise, when in times:
        if when > before:
            found[exercise] = round((when - before) / 60, 2)
        before = max(before, when)
    return found


def _time_of(metadata: dict) -> float | None:
    """Seconds since 1970 at which a cell was run last, if its front end has written that down."""
    colab, lab = metadata.get("executionInfo"), metadata.get("execution")
    if isinstance(colab, dict) and isinstance(colab.get("timestamp"), (int, float)):
        return colab["timestamp"] / 1000
    text = lab.get("shell.execute_reply") if isinstance(lab, dict) else None
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except (AttributeError, ValueError):
        return None


def titles_of(notebook) -> dict[str, str]:
    """Exercise -> the heading of its section in the canonical notebook."""
    found, heading = {}, ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for line in re.findall(r"^##+ +(.+)$", cell.source, re.M):
                heading = re.sub(r" *\(\d+ points?,.*\)$", "", line).replace("`", "").strip()
        elif (cell.metadata.get("nbgrader") or {}).get("grade"):
            found[exercise_of(grade_id(cell))] = heading
    return found
