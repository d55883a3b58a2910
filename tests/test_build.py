"""From sources to notebooks: the same bytes every time, nothing half-written, no bad notebook."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbgrader.preprocessors import CheckCellMetadata, ClearSolutions

from llmopt_lab import build
from llmopt_lab.build import BuildError
from llmopt_lab.core.errors import BadInput

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
COURSE = FIXTURES / "course"
HEAD = '# %% tags=["setup"]\nimport math\n\n'
SOLUTION = '# %% nbgrader={"grade_id": "demo.f", "solution": true}\n'


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """The fixture course, built once."""
    root = tmp_path_factory.mktemp("built") / "course"
    shutil.copytree(COURSE, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{FIXTURES}")
        build.build(root)
    return root


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    """Write a lesson of its own course and return its source."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{FIXTURES}")
    shutil.copy(COURSE / "pyproject.toml", tmp_path)

    def write(text: str, folder: str = "notebooks") -> Path:
        source = tmp_path / folder / "source" / "1_demo.py"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(text)
        return source

    return write


def built(root: Path) -> dict[str, bytes]:
    return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*.ipynb"))}


def cells_of(source: Path) -> list:
    (text,) = build.outputs_of(source).values()
    return nbformat.reads(text, 4).cells


@pytest.mark.notebook
def test_two_builds_are_byte_identical_also_in_another_folder(course, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{FIXTURES}")
    first = built(course)
    assert set(first) == {f"{d}/0_demo.ipynb" for d in ("notebooks", "exercises", "solutions")}
    other = tmp_path / "elsewhere"
    shutil.copytree(course, other)
    (other / "solutions" / "0_demo.ipynb").unlink()
    (other / "exercises" / "0_demo.ipynb").unlink()
    build.build(other)
    assert built(other) == first


@pytest.mark.notebook
def test_outputs_carry_nothing_that_is_random_or_of_this_machine(course):
    text = (course / "notebooks" / "0_demo.ipynb").read_text()
    notebook = json.loads(text)
    assert "IntSlider(value=3)" in text and "image/png" in text and "image/svg+xml" in text
    for trace in ("model_id", "widget-view", "execution_state", str(course), sys.prefix):
        assert trace not in text
    assert "widgets" not in notebook["metadata"]
    assert all("execution" not in cell["metadata"] for cell in notebook["cells"])
    printed = notebook["cells"][1]["outputs"]
    assert [o["text"] for o in printed] == [["first line\n", "second line\n"]]


@pytest.mark.notebook
def test_metadata_for_colab_and_jupyter_is_kept_and_nothing_else(course):
    notebook = json.loads((course / "notebooks" / "0_demo.ipynb").read_text())
    assert notebook["metadata"] == {
        "accelerator": "GPU",
        "colab": {"gpuType": "T4"},
        "kernelspec": build.KERNELSPEC,
        "language_info": {"name": "python"},
    }


@pytest.mark.notebook
def test_check_finds_a_changed_notebook_and_an_orphan_and_writes_nothing(
    course, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{FIXTURES}")
    root = tmp_path / "course"
    shutil.copytree(course, root)
    assert build.main(["--root", str(root), "--check"]) == 0
    changed = root / "exercises" / "0_demo.ipynb"
    changed.write_text(changed.read_text().replace("Demo exercises", "Demo exercise"))
    shutil.copy(changed, root / "notebooks" / "9_gone.ipynb")
    before = built(root)
    assert build.main(["--root", str(root), "--check", "exercises"]) == 1
    assert built(root) == before
    said = capsys.readouterr().out
    assert "exercises/0_demo.ipynb\n" in said
    assert '-    "# Demo exercise\\n",' in said and '+    "# Demo exercises\\n",' in said
    assert "notebooks/9_gone.ipynb: it has no source" in said


@pytest.mark.notebook
def test_a_timing_cell_keeps_its_output_until_its_source_changes_or_refresh(lesson):
    text = HEAD + '# %% tags=["timing"]\nimport time\n\ntime.time_ns()\n'
    source = lesson(text)

    def output() -> str:
        build.build(source.parents[2])
        notebook = nbformat.read(source.parents[1] / "1_demo.ipynb", 4)
        return notebook.cells[1].outputs[0].data["text/plain"]

    first = output()
    assert output() == first
    source.write_text(text.replace("time_ns()", "time_ns() + 0"))
    second = output()
    assert second != first
    assert build.build(source.parents[2]) == []
    assert len(build.build(source.parents[2], refresh=True)) == 1


@pytest.mark.notebook
@pytest.mark.parametrize(
    ("cell", "complaint"),
    [
        ("1 / 0", r"cell 2 \(cell-002\): .*ZeroDivisionError: division by zero"),
        ("import warnings\nwarnings.warn('old')", r"cell 2 .*wrote to stderr: .*UserWarning: old"),
        ("import os\nos._exit(3)", r"cell 2 .*[Kk]ernel died"),
        ("object()", r"cell 2 .*shows an address, .*<object at 0x"),
        ("print(object())", r"cell 2 .*shows an address"),
        (
            "from IPython.display import HTML\nimport html\n\nHTML(html.escape(repr(math)) + "
            "html.escape(repr(object())))",
            r"cell 2 .*shows an address",
        ),
    ],
)
def test_a_lesson_that_does_not_run_clean_is_refused_by_cell(lesson, cell, complaint):
    source = lesson(f"{HEAD}# %%\n{cell}\n")
    with pytest.raises(BuildError, match=re.compile(complaint, re.S)) as error:
        build.outputs_of(source)
    assert "notebooks/source/1_demo.py" in str(error.value)
    assert "\x1b" not in str(error.value)


@pytest.mark.notebook
def test_a_wanted_exception_is_kept_as_one_line(lesson):
    source = lesson(f'{HEAD}# %% tags=["raises-exception"]\nmath.sqrt(-1)\n')
    (output,) = cells_of(source)[1].outputs
    assert output.ename == "ValueError"
    assert output.traceback == [f"ValueError: {output.evalue}"]


@pytest.mark.notebook
def test_the_running_interpreter_runs_the_notebook_whatever_python3_is_called(
    lesson, tmp_path, monkeypatch
):
    foreign = tmp_path / "jupyter" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    spec = {"argv": ["false"], "display_name": "foreign", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    ipython = tmp_path / "ipython" / "profile_default" / "startup"
    ipython.mkdir(parents=True)
    (ipython / "0.py").write_text("print('from a start-up file')")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    source = lesson(
        f"{HEAD}# %%\nimport os\nimport sys\n\nassert sys.prefix == {sys.prefix!r}\n"
        "print(os.path.basename(os.getcwd()), hash('a'), os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    cells = cells_of(source)
    assert cells[0].outputs == []
    expected = subprocess.check_output(
        [sys.executable, "-c", "print(hash('a'))"], env={**os.environ, "PYTHONHASHSEED": "0"}
    )
    assert cells[1].outputs[0].text == f"notebooks {expected.decode().strip()} \n"


@pytest.mark.notebook
def test_a_path_of_this_checkout_is_shown_from_its_root(lesson):
    source = lesson(
        f"{HEAD}# %%\nimport os\n\nprint(os.path.abspath('x.py'))\nos.path.abspath('y')\n"
    )
    printed, result = cells_of(source)[1].outputs
    assert printed.text == "notebooks/x.py\n"
    assert result.data["text/plain"] == "'notebooks/y'"


@pytest.mark.notebook
def test_a_failing_build_leaves_the_old_notebook(lesson, capsys):
    source = lesson(HEAD)
    root = source.parents[2]
    assert build.main(["--root", str(root)]) == 0
    before = built(root)
    source.write_text(f"{HEAD}# %%\n1 / 0\n")
    assert build.main(["--root", str(root)]) == 2
    assert built(root) == before
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "a.ipynb"
    build.write(file, "old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(build.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build.write(file, "new")
    assert [f.read_text() for f in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (SOLUTION + "x = 1\n", "if and only if"),
        ("# %%\ndef f():\n    ### BEGIN SOLUTION\n    x\n    ### END SOLUTION\n", "if and only if"),
        (SOLUTION + "### BEGIN SOLUTION\nx = 1\n### END SOLUTION\n", "inside a function"),
        (SOLUTION + "class A:\n    ### BEGIN SOLUTION\n    x = 1\n    ### END SOLUTION\n",
         "inside a function"),
        (SOLUTION + "def f():\n    ### BEGIN SOLUTION\n    x = 1\n", "in pairs"),
        (SOLUTION + "def f():\n    # BEGIN SOLUTION\n    x = 1\n    # END SOLUTION\n", "in pairs"),
        (SOLUTION + "def f(:\n    ### BEGIN SOLUTION\n    x\n    ### END SOLUTION\n", "not Python"),
        ('# %% nbgrader={"grade_id": "demo.f-check", "grade": true, "points": 1}\n1\n', "locked"),
        ('# %% nbgrader={"grade_id": "demo.f-check", "grade": true, "locked": true}\n1\n', "poin"),
        ('# %% id="a"\n1\n\n# %% id="a"\n2\n', "id 'a' is taken"),
        ('# %% id="a b"\n1\n', "letters, digits"),
        (f'# %% id="{"a" * 65}"\n1\n', "1 to 64"),
    ],
)  # fmt: skip
def test_a_source_that_breaks_a_rule_is_refused_with_file_and_cell(lesson, text, complaint):
    source = lesson(text, "solutions")
    with pytest.raises(BuildError, match=complaint) as error:
        build.read_source(source)
    assert "1_demo.py, cell " in str(error.value)


def test_cell_ids_come_from_grade_id_then_id_then_position():
    ids = [cell.id for cell in build.read_source(COURSE / "solutions/source/0_demo.py").cells]
    assert ids[:5] == ["cell-001", "setup", "cell-003", "demo-ceil_div", "demo-ceil_div-check"]


def test_the_badge_of_a_solution_opens_the_exercise():
    for folder, opened in (("notebooks", "notebooks"), ("solutions", "exercises")):
        notebook = build.read_source(COURSE / folder / "source" / "0_demo.py")
        address = f"github/someone/some-course/blob/main/{opened}/0_demo.ipynb"
        assert address in notebook.cells[0].source
        assert "{{" not in notebook.cells[0].source


def test_the_stub_is_nbgraders_own():
    solved = build.read_source(COURSE / "solutions" / "source" / "0_demo.py")
    ours = [cell.source for cell in build.make_exercise(solved).cells]
    CheckCellMetadata().preprocess(solved, {})
    theirs, _ = ClearSolutions().preprocess(solved, {})
    assert ours == [cell.source for cell in theirs.cells]


def test_locked_cells_of_an_exercise_are_read_only_and_solutions_cannot_be_deleted():
    solved = build.read_source(COURSE / "solutions" / "source" / "0_demo.py")
    blank = {cell.id: cell.metadata for cell in build.make_exercise(solved).cells}
    assert blank["demo-ceil_div-check"].editable is False
    assert blank["demo-ceil_div"].deletable is False
    assert "editable" not in blank["demo-ceil_div"]
    assert all("deletable" not in cell.metadata for cell in solved.cells)


@pytest.mark.notebook
def test_nbgrader_validates_the_solution_and_fails_the_stub(course, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{FIXTURES}")

    def validate(folder: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "nbgrader", "validate", course / folder / "0_demo.ipynb"],
            capture_output=True, text=True, timeout=120,
        ).stdout  # fmt: skip

    assert "Success! Your notebook passes all the tests." in validate("solutions")
    failed = validate("exercises")
    assert "VALIDATION FAILED ON 3 CELL(S)" in failed
    assert "not written yet" in failed


@pytest.mark.parametrize(
    ("what", "names", "found"),
    [
        ("all", [], ["notebooks", "solutions"]),
        ("notebooks", [], ["notebooks"]),
        ("exercises", ["demo"], ["solutions"]),
        ("all", ["0_demo"], ["notebooks", "solutions"]),
    ],
)
def test_sources_are_picked_by_kind_and_name(what, names, found):
    assert [file.parts[-3] for file in build.sources(COURSE, what, names)] == found


def test_an_unknown_name_lists_the_sources():
    with pytest.raises(BadInput, match="'flash'; there are: 0_demo"):
        build.sources(COURSE, "all", ["flash"])


def test_the_root_is_found_from_any_file_of_the_checkout(tmp_path):
    assert build.find_root(COURSE / "notebooks" / "source") == COURSE
    assert build.find_root(ROOT / "llmopt_lab") == ROOT
    with pytest.raises(BadInput, match="not inside a checkout"):
        build.find_root(tmp_path)
