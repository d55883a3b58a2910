"""`llmopt grade FILE...`: points for exercise notebooks, from outside the learner's process.

The file given is only read. A copy gets every locked cell back from the canonical exercise
notebook (so an edited, deleted or pasted check changes nothing), loses its outputs, and is run by
nbval in a process of its own. A cell that kills its kernel, ends it or does not finish costs what
it stands for: the copy is run again without that cell, until every check has had its turn.

This is no sandbox. The learner's code runs with your rights, in the kernel in which the checks
run; who rewrites `llmopt_lab` itself at run time can still fool them.
"""

import argparse
import contextlib
import copy
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from llmopt_lab.core.errors import BadInput, LabError, Missing, require
from llmopt_lab.grading.nbval_points import exercise_of, read_message

CELL_TIMEOUT_S = 60.0
TOTAL_TIMEOUT_S = 600.0
EXERCISES = Path(__file__).resolve().parents[2] / "exercises"


class GradingFailed(LabError, RuntimeError):
    """nbval or its kernel did not start; no fault of the learner's."""


@dataclass(frozen=True)
class Verdict:
    """What one exercise earned, and if not all: why, and where to look next."""

    exercise: str  # "room.function"
    points: int  # to be had
    earned: int
    message: str = ""  # empty when done
    misconception: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Score:
    """The verdicts on one notebook; or the reason why it cannot be graded."""

    file: str
    verdicts: tuple[Verdict, ...] = ()
    error: str = ""

    @property
    def points(self) -> int:
        return sum(v.points for v in self.verdicts)

    @property
    def earned(self) -> int:
        return sum(v.earned for v in self.verdicts)


def grade(
    paths: Sequence[str | Path],
    *,
    cell_timeout: int | float = CELL_TIMEOUT_S,
    total_timeout: int | float = TOTAL_TIMEOUT_S,
    out: str | Path | None = None,
    exercises: str | Path = EXERCISES,
    jobs: int = 1,
) -> list[Score]:
    """Grade notebooks, `jobs` at a time. One that cannot be graded gets an error, not the others.

    `cell_timeout` and `total_timeout` are seconds, for one cell and for one notebook. `exercises`
    is the folder of the canonical notebooks. With `out`, writes scores.json and scores.xml (JUnit)
    into that folder. Cost: about 5 s a notebook, and the time-out once for each cell that hangs.

    Raises:
        BadInput: no paths, a limit that is not positive, no exercise notebooks in `exercises`.
        Missing: nbval is not installed.
    """
    require(len(paths) > 0, "name at least one notebook to grade")
    require(
        cell_timeout > 0 and total_timeout > 0 and jobs > 0,
        "time-outs and jobs must be positive; "
        f"got cell_timeout={cell_timeout}, total_timeout={total_timeout}, jobs={jobs}",
    )
    if importlib.util.find_spec("nbval") is None:
        raise Missing("grading runs notebooks with nbval. Run: pip install llmopt_lab[lab]")
    require(
        out is None or not Path(out).exists() or Path(out).is_dir(),
        f"out must be a folder; {out} is a file",
    )
    canonical = read_canonical(Path(exercises))

    def grade_one(path: str | Path) -> Score:
        try:
            limits = (cell_timeout, total_timeout)
            return Score(str(path), _grade_file(Path(path), canonical, *limits))
        except LabError as error:
            return Score(str(path), error=str(error))

    with ThreadPoolExecutor(jobs) as pool:
        graded = pool.map(grade_one, paths)
        scores = list(tqdm(graded, "grading", len(paths), unit="notebook", disable=None))
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_json(scores, Path(out) / "scores.json")
        write_junit(scores, Path(out) / "scores.xml")
    return scores


def read_canonical(folder: Path) -> list:
    """The exercise notebooks of a folder.

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
    return [nbformat.read(file, 4) for file in files]


def read_learners(path: Path):
    """A learner's notebook, of any 4.x format.

    Raises:
        BadInput: it is not there, not a notebook, or broken.
    """
    import nbformat

    require(path.exists(), f"{path}: there is no such file")
    require(
        path.is_file() and path.suffix == ".ipynb",
        f"{path} is not a notebook: its name does not end in .ipynb",
    )
    try:
        plain = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
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
        cell.metadata.pop("tags", None)  # a learner's tag must not tell nbval to skip a cell
    return restored


def _grade_file(path: Path, canonical: list, cell_timeout: int | float, total_timeout: int | float):
    learners = read_learners(path)
    mine = {grade_id(cell) for cell in learners.cells} - {""}
    overlaps = [len(mine & {grade_id(cell) for cell in c.cells}) for c in canonical]
    require(
        max(overlaps) > 0 and len(mine) > 0,
        f"{path} is not one of this course's exercise notebooks: no cell carries one of their "
        "ids. Start from a fresh copy and paste your code into its cells",
    )
    notebook = restore(learners, canonical[overlaps.index(max(overlaps))])
    return _judge(notebook, cell_timeout, total_timeout)


def _judge(notebook, cell_timeout: int | float, total_timeout: int | float) -> tuple[Verdict, ...]:
    """Run until every check has had its turn, each time without the cells that stopped a run."""
    deadline = time.monotonic() + total_timeout
    without: set[str] = set()
    results: dict[str, dict] = {}
    while (left := deadline - time.monotonic()) > 0:
        lines = _run_once(notebook, min(cell_timeout, left), left)
        stopped = next((line for line in lines if line["stopped"]), None)
        valid = lines[: lines.index(stopped) + 1] if stopped else lines
        for line in valid:
            results.setdefault(line["cell"], line)
        if stopped is None:
            break
        cell = next(cell for cell in notebook.cells if cell.id == stopped["cell"])
        if cell.id in without:  # a thread of the learner's ends every kernel
            break
        without.add(cell.id)
        cell.source = f"raise RuntimeError({stopped['message']!r})"
    return tuple(
        _verdict(notebook, results, index)
        for index, cell in enumerate(notebook.cells)
        if cell.metadata.get("nbgrader", {}).get("grade")
    )


def _run_once(notebook, cell_timeout: int | float, total_timeout: int | float) -> list[dict]:
    """nbval's result for every cell that ran, in order. Leaves no process behind."""
    import nbformat

    with tempfile.TemporaryDirectory(prefix="llmopt-grade-") as name:
        folder = Path(name)
        work = folder / "work"  # all that the learner's code finds around it
        work.mkdir()
        nbformat.write(notebook, work / "notebook.ipynb")
        results = folder / "results.jsonl"
        results.touch()
        command = [
            sys.executable, "-m", "pytest", str(work / "notebook.ipynb"),
            "-p", "nbval.plugin", "-p", "llmopt_lab.grading.nbval_points", "-p", "no:cacheprovider",
            "--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={cell_timeout}",
            f"--points-json={results}", f"--rootdir={folder}", "-c", os.devnull, "-q",
        ]  # fmt: skip
        environment = {
            **os.environ,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_ADDOPTS": "",
            "IPYTHONDIR": str(folder / "ipython"),  # no start-up files of the user's
        }
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            output, _ = process.communicate(timeout=total_timeout)
        except subprocess.TimeoutExpired:
            _kill_tree(process)
            output = "out of time"
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        if not lines and output != "out of time":
            raise GradingFailed(f"nbval could not start the notebook:\n{output[-2000:]}")
        return lines


def _kill_tree(process: subprocess.Popen) -> None:
    """End pytest, its kernel (a session of its own) and whatever those started."""
    import psutil

    try:
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate()


def _verdict(notebook, results: dict[str, dict], index: int) -> Verdict:
    cell = notebook.cells[index]
    grading = cell.metadata.nbgrader
    exercise = exercise_of(grading.grade_id)
    points = int(grading.get("points", 1))
    result = results.get(cell.id)
    if result is None:
        message = "not run: the notebook used up its time, or its kernel kept dying"
    elif result["passed"]:
        return Verdict(exercise, points, points)
    else:
        message = _own_failure(notebook, results, index) or result["message"]
    message = message.removeprefix(f"{exercise}: ")
    misconception, hint = read_message(message)
    return Verdict(
        exercise, points, 0, message, misconception, hint or f'hint("{exercise}", 1) in a cell'
    )


def _own_failure(notebook, results: dict[str, dict], index: int) -> str:
    """Why there was nothing to check, if the check failed only for that."""
    message = results[notebook.cells[index].id]["message"]
    if not message.startswith("NameError"):
        return ""
    exercise = exercise_of(grade_id(notebook.cells[index]))
    for cell in notebook.cells[:index]:
        own = grade_id(cell) and exercise_of(grade_id(cell)) == exercise
        result = results.get(cell.id)
        if own and result and not result["passed"]:
            return f"its cell did not run: {result['message']}"
    return f"no cell of this exercise defines what is checked ({message})"


def table(scores: Sequence[Score]) -> str:
    """The scores as plain text: one line an exercise, and below each notebook what to do next."""
    blocks = []
    for score in scores:
        if score.error:
            blocks.append(f"{score.file}\n  cannot be graded: {score.error}")
            continue
        width = max(len(v.exercise) for v in score.verdicts)
        lines = [score.file]
        for v in score.verdicts:
            state = "done" if v.earned == v.points else v.misconception or "not yet"
            lines.append(f"  {v.exercise:{width}}  {v.earned}/{v.points}  {state}")
        lines.append(f"  {'points':{width}}  {score.earned}/{score.points}")
        for v in score.verdicts:
            if v.message:
                lines.append(f"\n  {v.exercise}: {v.message}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def write_json(scores: Sequence[Score], path: Path) -> None:
    """One object a notebook, with its verdicts, points and earned points."""
    rows = [asdict(s) | {"points": s.points, "earned": s.earned} for s in scores]
    path.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


def write_junit(scores: Sequence[Score], path: Path) -> None:
    """A test suite a notebook, a test case an exercise with its points as properties."""
    suites = ET.Element("testsuites", name="llmopt grade")
    for score in scores:
        failed = [v for v in score.verdicts if v.message]
        suite = ET.SubElement(
            suites, "testsuite", name=score.file, tests=str(len(score.verdicts) or 1),
            failures=str(len(failed)), errors=str(int(bool(score.error))),
        )  # fmt: skip
        if score.error:
            case = ET.SubElement(suite, "testcase", classname=score.file, name="notebook")
            ET.SubElement(case, "error", message=_xml_text(score.error))
        for v in score.verdicts:
            case = ET.SubElement(suite, "testcase", classname=score.file, name=v.exercise)
            properties = ET.SubElement(case, "properties")
            for key in ("points", "earned", "misconception", "hint"):
                value = _xml_text(str(getattr(v, key)))
                ET.SubElement(properties, "property", name=key, value=value)
            if v.message:
                ET.SubElement(case, "failure", message=_xml_text(v.message))
    ET.indent(suites)
    ET.ElementTree(suites).write(path, "utf-8", xml_declaration=True)


def _xml_text(text: str) -> str:
    """Without the control characters that XML forbids."""
    return "".join(c for c in text if c >= " " or c in "\t\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `llmopt grade`."""
    parser.add_argument("files", nargs="+", help="exercise notebooks that learners filled in")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores as JSON")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write them as JUnit XML")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write both there")
    parser.add_argument(
        "--cell-timeout", type=float, default=CELL_TIMEOUT_S, metavar="S", help="for one cell"
    )
    parser.add_argument(
        "--total-timeout", type=float, default=TOTAL_TIMEOUT_S, metavar="S", help="for one notebook"
    )
    parser.add_argument(
        "--exercises", type=Path, default=EXERCISES, metavar="FOLDER", help="canonical notebooks"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="notebooks at a time")


def run(args: argparse.Namespace) -> int:
    """Grade and print. Returns 0 if every point was earned, 1 if not, 2 if a file is unreadable."""
    for file in filter(None, (args.json, args.junit)):
        require(file.parent.is_dir(), f"cannot write {file}: there is no folder {file.parent}")
    scores = grade(
        args.files,
        cell_timeout=args.cell_timeout,
        total_timeout=args.total_timeout,
        out=args.out,
        exercises=args.exercises,
        jobs=args.jobs,
    )
    print(table(scores))
    if args.json:
        write_json(scores, args.json)
    if args.junit:
        write_junit(scores, args.junit)
    if any(score.error for score in scores):
        return 2
    return 0 if all(score.earned == score.points for score in scores) else 1
