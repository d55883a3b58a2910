"""The notebooks belong to their sources; the lessons run by nbval against their stored outputs."""

import ast
import dis
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import CodeType

import nbformat
import pytest

from llmopt_lab import build

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "solutions").glob("*.ipynb"))
SECONDS = 90
each_lesson = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_every_built_notebook_has_a_source():
    assert build.orphans(ROOT) == []


@pytest.mark.parametrize(
    "path", NOTEBOOKS + SOLUTIONS, ids=lambda path: f"{path.parent.name} {path.stem}"
)
def test_a_notebook_has_the_cells_of_its_source(path):
    """Its outputs are nbval's, below."""
    built = nbformat.read(path, as_version=4)
    fresh = build.read_source(path.parent / "source" / f"{path.stem}.py")
    parts = [[(c.id, c.cell_type, c.source, c.metadata) for c in n.cells] for n in (built, fresh)]
    assert parts[0] == parts[1], f"run: make notebooks ARGS={path.stem.partition('_')[2]}"


def bindings(source: str) -> dict[str, str]:
    """Name -> what a cell binds it to: an import's words, or the cell itself."""
    code = compile(source, "cell", "exec")
    stored = ("STORE_NAME", "STORE_GLOBAL")
    found = {i.argval: source for i in dis.get_instructions(code) if i.opname in stored}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in node.names:
                found[name.asname or name.name.partition(".")[0]] = (
                    f"{getattr(node, 'module', '')} {name.name}"
                )
    return found


def globals_of_functions(code: CodeType) -> set[str]:
    """Names that the functions of a cell look up only when they are called."""
    found = set()
    for inner in (const for const in code.co_consts if isinstance(const, CodeType)):
        loads = dis.get_instructions(inner)
        found |= {i.argval for i in loads if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        found |= globals_of_functions(inner)
    return found


@each_lesson
def test_what_a_slider_calls_later_still_means_the_same(path):
    """A widget calls its function after all cells have run: no later cell may reuse its names."""
    notebook = nbformat.read(path, as_version=4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    last: dict[str, str] = {}
    for source in cells:
        last |= bindings(source)
    now: dict[str, str] = {}
    for source in cells:
        now |= bindings(source)
        if re.search(r"\b(Explore|Paint|Complete|Live)\(", source):
            used = globals_of_functions(compile(source, "cell", "exec"))
            reused = {name for name in used & now.keys() if now[name] != last[name]}
            assert not reused, f"a later cell binds {reused} anew; this cell needs it:\n{source}"


def nbval(path: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run a notebook by nbval, in its own folder, on one core."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider",
         "-p", "nbval.plugin", *arguments, str(path)],
        cwd=path.parent,
        # the other plugins installed here take seconds to import
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )  # fmt: skip


@pytest.mark.notebook
@each_lesson
def test_a_lesson_gives_its_stored_outputs_within_90_seconds(path):
    start = time.monotonic()
    run = nbval(path, "--nbval", "--nbval-cell-timeout=80")
    assert run.returncode == 0, run.stdout[-4000:]
    assert time.monotonic() - start < SECONDS


@pytest.mark.notebook
@pytest.mark.parametrize("solution", SOLUTIONS, ids=lambda path: path.stem)
def test_by_nbval_a_solution_earns_every_point_and_the_untouched_exercise_none(solution, tmp_path):
    checks = {
        cell.id: cell.metadata.nbgrader.points
        for cell in nbformat.read(solution, as_version=4).cells
        if cell.metadata.get("nbgrader", {}).get("grade")
    }
    plugin = ("-p", "llmopt_lab.grading.nbval_points", "--points-json")
    solved = nbval(solution, "--nbval", *plugin, str(tmp_path / "solved"))
    assert solved.returncode == 0, solved.stdout[-4000:]
    assert f"points: {sum(checks.values())} of {sum(checks.values())}" in solved.stdout
    exercise = ROOT / "exercises" / solution.name
    blank = nbval(exercise, "--nbval-lax", *plugin, str(tmp_path / "blank"))
    assert f"points: 0 of {sum(checks.values())}" in blank.stdout
    lines = map(json.loads, (tmp_path / "blank").read_text().splitlines())
    assert {line["cell"] for line in lines if not line["passed"]} == set(checks)


@each_lesson
def test_a_lesson_was_executed_leaves_no_warning_and_stores_no_widget_state(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)
    assert "widgets" not in notebook.metadata
    assert all("widget-view" not in kind for o in outputs for kind in o.get("data", {}))


@each_lesson
def test_every_section_says_how_many_minutes_it_takes(path):
    notebook = nbformat.read(path, as_version=4)
    headings = [
        line
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("## ")
    ]
    assert headings and all(
        line.endswith(" minutes)") or line.endswith(" minute)") for line in headings
    )
