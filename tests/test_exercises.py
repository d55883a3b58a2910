"""Every exercise of every chapter: its stub, its solution, its wrong and its right attempts.

Chapters are found by their sources; a chapter's attempts stand in tests/attempts/<room>.py:
`WRONG`, exercise -> [(attempt, misconception)], and `RIGHT`, exercise -> [attempt].
"""

import ast
import contextlib
import importlib.util
import io
import linecache
import re
import sys
import tokenize
from pathlib import Path

import nbformat
import pytest

from llmopt_lab import build
from llmopt_lab.grading.checks import NotYet, check, exercises_of, find_exercise
from llmopt_lab.grading.grade import grade
from llmopt_lab.grading.submissions import exercise_of

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
sys.path.insert(0, str(FIXTURES))  # the fixture course's checks are a module there
import demo_checks  # noqa: E402, F401  registers them

SOURCES = [
    *build.sources(FIXTURES / "course", "exercises"),
    *build.sources(ROOT, "exercises"),
]
each_chapter = pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)


def room_of(source: Path) -> str:
    return source.stem.partition("_")[2]


def attempts_of(source: Path):
    room = room_of(source)
    file = ROOT / "tests" / "attempts" / f"{room}.py"
    if source.is_relative_to(FIXTURES):
        file = FIXTURES / f"{room}_attempts.py"
    assert file.exists(), f"{room} has exercises but no attempts: write {file.relative_to(ROOT)}"
    spec = importlib.util.spec_from_file_location(f"attempts_{room}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def checks_of(notebook) -> dict[str, float]:
    """Exercise -> points, from the check cells."""
    return {
        exercise_of(cell.id): cell.metadata.nbgrader.points
        for cell in notebook.cells
        if cell.metadata.get("nbgrader", {}).get("grade")
    }


def signatures(source: str) -> dict[str, str]:
    """Every function and method of a cell, with its arguments, result and docstring."""
    found = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                returns = ast.unparse(child.returns) if child.returns else ""
                text = f"({ast.unparse(child.args)}) -> {returns} {ast.get_docstring(child)}"
                found[prefix + child.name] = text

    visit(ast.parse(source), "")
    return found


def words(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w{3,}", text))


def solution_tokens(notebook) -> set[str]:
    """Names of four letters and more, and whole lines, that stand only inside solutions."""
    inside, outside = [], []
    for cell in notebook.cells:
        cut = build.cut_solutions(cell.source).split("\n")
        outside += cut
        for region in re.findall(r"### BEGIN SOLUTION\n(.*?)### END SOLUTION", cell.source, re.S):
            inside += region.split("\n")
    lines = {line.strip() for line in inside if len(line.strip()) >= 8}
    code = "\n".join(inside)
    names = set()
    with contextlib.suppress(tokenize.TokenError, IndentationError):
        for token in tokenize.generate_tokens(io.StringIO(f"if 1:\n{code}").readline):
            if token.type == tokenize.NAME:
                names.add(token.string)
    known = words("\n".join(outside))
    # JSON keys and nbgrader's own words are no leak
    known |= words("cells source outputs metadata code return points solution number notebook")
    return {line for line in lines if line not in {o.strip() for o in outside}} | {
        name for name in names if len(name) >= 4 and name not in known
    }


@each_chapter
def test_every_exercise_is_registered_with_the_points_its_check_cell_gives(source):
    notebook = build.read_source(source)
    registered = {e.name: e.points for e in exercises_of(room_of(source))}
    assert checks_of(notebook) == registered


@each_chapter
def test_a_check_cell_imports_check_itself_and_checks_its_own_exercise(source):
    for cell in build.read_source(source).cells:
        if cell.metadata.get("nbgrader", {}).get("grade"):
            first, *rest = cell.source.strip().splitlines()
            assert first == "from llmopt_lab.grading import check", cell.id
            names = re.findall(r'check\(\s*"([\w.]+)"', "\n".join(rest))
            assert names == [exercise_of(cell.id)]


@each_chapter
def test_stub_and_solution_have_equal_signatures_and_docstrings(source):
    solved = build.read_source(source)
    blank = build.make_exercise(solved)
    for before, after in zip(solved.cells, blank.cells, strict=True):
        if before.metadata.get("nbgrader", {}).get("solution"):
            assert signatures(before.source)
            assert signatures(after.source) == signatures(before.source)


@each_chapter
def test_the_built_exercises_are_those_of_the_source(source):
    """The drift test that runs nothing; nbval runs them in test_notebooks.py."""
    root = build.find_root(source)
    built = (root / "exercises" / f"{source.stem}.ipynb").read_text()
    fresh = build.make_exercise(build.read_source(source))
    assert built == build.text_of(fresh)


def leaks(text: str, notebook) -> set[str]:
    """The solution's tokens that occur anywhere in the text of a notebook file."""
    decoded = text.encode().decode("unicode_escape", "ignore")
    lines = {line.strip().strip('",').removesuffix("\n") for line in decoded.splitlines()}
    return solution_tokens(notebook) & (words(decoded) | lines)


@each_chapter
def test_no_token_of_a_solution_is_anywhere_in_the_exercise_notebook(source):
    notebook = build.read_source(source)
    assert solution_tokens(notebook)
    file = build.find_root(source) / "exercises" / f"{source.stem}.ipynb"
    assert leaks(file.read_text(), notebook) == set()


def test_a_solution_left_in_an_output_or_in_metadata_is_found():
    notebook = build.read_source(SOURCES[0])
    blank = build.make_exercise(notebook)
    blank.cells[1].outputs = [nbformat.v4.new_output("stream", text="padded_numerator = 10")]
    assert leaks(build.text_of(blank), notebook) == {"padded_numerator"}
    blank = build.make_exercise(notebook)
    blank.metadata.memo = "return padded_numerator // b"
    assert "padded_numerator" in leaks(build.text_of(blank), notebook)


@each_chapter
def test_every_exercise_has_hints_that_get_longer_or_at_least_differ(source):
    for exercise in exercises_of(room_of(source)):
        assert len(set(exercise.hints)) == len(exercise.hints) >= 2
        assert find_exercise(exercise.name) is exercise


@each_chapter
def test_right_attempts_written_differently_pass(source, capsys):
    attempts = attempts_of(source)
    for exercise in exercises_of(room_of(source)):
        right = attempts.RIGHT[exercise.name]
        assert len(right) >= 2, f"{exercise.name} needs two right attempts"
        for attempt in right + right:  # twice: a check draws fresh inputs
            check(exercise.name, attempt)
            assert f"{exercise.name}: done" in capsys.readouterr().out


@each_chapter
def test_each_named_wrong_attempt_gets_its_own_misconception_and_message(source):
    attempts = attempts_of(source)
    for exercise in exercises_of(room_of(source)):
        wrong = attempts.WRONG[exercise.name]
        assert len(wrong) >= 4, f"{exercise.name} needs four wrong attempts"
        names = [misconception for _, misconception in wrong]
        assert len(set(names)) == len(names), f"{exercise.name}: two attempts share a misconception"
        messages = set()
        for attempt, misconception in wrong:
            with pytest.raises(NotYet) as refused:
                check(exercise.name, attempt)
            assert refused.value.misconception == misconception, str(refused.value)
            assert f'hint("{exercise.name}", 1)' in str(refused.value)
            messages.add(str(refused.value))
        assert len(messages) == len(wrong), f"{exercise.name}: two attempts share a message"


def sections(notebook) -> list[list]:
    """The code cells below each `## ` heading; cells tagged setup are left out."""
    found: list[list] = [[]]
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and re.search(r"^## ", cell.source, re.M):
            found.append([])
        elif cell.cell_type == "code" and "setup" not in cell.metadata.get("tags", []):
            found[-1].append(cell)
    return found


def run_cell(cell, namespace: dict, name: str) -> None:
    """Execute a cell; its source stays readable, as Triton and inspect want it."""
    linecache.cache[name] = (len(cell.source), None, cell.source.splitlines(True), name)
    exec(compile(cell.source, name, "exec"), namespace)


@each_chapter
def test_each_exercise_needs_the_setup_cells_and_its_own_alone(source, capsys):
    notebook = build.read_source(source)
    setup = [cell for cell in notebook.cells if "setup" in cell.metadata.get("tags", [])]
    for number, section in enumerate(sections(notebook)):
        checks = [c for c in section if c.metadata.get("nbgrader", {}).get("grade")]
        if not checks:
            continue
        namespace = {"__name__": "__main__"}
        for index, cell in enumerate(setup + section):
            run_cell(cell, namespace, f"<{source.stem} section {number} cell {index}>")
        out = capsys.readouterr().out
        assert all(f"{exercise_of(cell.id)}: done" in out for cell in checks), section


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """Chapter -> the scores of its solution and of its untouched exercises: a grader a course."""
    folder = tmp_path_factory.mktemp("handed-in")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{FIXTURES}")
        for course in (FIXTURES / "course", ROOT):
            sources = [source for source in SOURCES if build.find_root(source) == course]
            files = []
            for source in sources:
                solved = folder / f"solved {source.stem}.ipynb"
                nbformat.write(build.read_source(source), solved)
                files += [solved, course / "exercises" / f"{source.stem}.ipynb"]
            scores = grade(files, exercises=course / "exercises", checks=["demo_checks"], jobs=1)
            found |= zip(sources, zip(scores[::2], scores[1::2], strict=True), strict=True)
    return found


@pytest.mark.notebook
@each_chapter
def test_the_grader_gives_the_solution_every_point_and_the_untouched_stub_none(source, graded):
    done, blank = graded[source]
    points = checks_of(build.read_source(source))
    assert {v.exercise: v.earned for v in done.verdicts} == points, [*done.verdicts]
    assert {v.exercise: v.points for v in blank.verdicts} == points
    assert blank.earned == 0
    # the stubs' own cells run: only the checks fail, each for what is not written
    assert {v.misconception for v in blank.verdicts} == {"not-written"}, [*blank.verdicts]
