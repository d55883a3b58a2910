"""What students get: everything they need, and nothing that is not theirs."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

from llmopt_lab import badges, cli
from llmopt_lab.core.errors import BadInput
from llmopt_lab.workshop import release as kit
from llmopt_lab.workshop.release import Leak, for_students, leaks, private_texts, public_lines

ROOT = Path(__file__).parents[1]
ADDRESS = "https://github.com/some-class/llm-course"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("release") / "course"
    kit.release(out, repository=ADDRESS)
    return out


def test_the_bundle_has_the_lessons_the_exercises_the_package_and_nothing_private(bundle):
    here = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    for folder in ("notebooks", "exercises"):
        assert {p.name for p in (ROOT / folder).glob("*.ipynb")} == {
            p.name for p in (bundle / folder).iterdir()
        }
    assert {"Makefile", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= here
    assert "llmopt_lab/widgets/player.js" in here
    assert any(name.endswith("model.safetensors") for name in here)
    private = ("solutions", "tests", "instructor", "notebooks/source", ".ci", ".git")
    assert not [name for name in here if name.startswith(private) or "__pycache__" in name]


def test_no_solution_can_be_found_in_the_bundle_with_grep(bundle):
    """Not by the bundle's own leak test: the text of every solution, looked for in every cell."""
    given, lessons = (
        {p.name: "\n".join(c.source for c in nbformat.read(p, 4).cells) for p in sorted(folder)}
        for folder in ((bundle / "exercises").iterdir(), (bundle / "notebooks").iterdir())
    )
    checked = 0
    for source in (ROOT / "solutions/source").glob("*.py"):
        text = source.read_text()
        for body in re.findall(r"### BEGIN SOLUTION\n(.*?)[ \t]*### END SOLUTION", text, re.S):
            name = f"{source.stem}.ipynb"
            assert body.strip() not in given[name]
            assert body.count("\n") < 3 or body.strip() not in lessons[name]
            checked += 1
    assert checked >= 60
    assert "BEGIN SOLUTION" not in "".join([*given.values(), *lessons.values()])


def test_badges_and_set_up_cells_carry_the_class_address(bundle):
    old = badges.repository()
    for path in [*(bundle / "notebooks").iterdir(), *(bundle / "exercises").iterdir()]:
        text = path.read_text()
        assert f"/github/some-class/llm-course/blob/main/{path.parent.name}/{path.name}" in text
        assert f"git+{ADDRESS}" in text and old not in text
        nbformat.validate(json.loads(text))
    readme = (bundle / "README.md").read_text()
    assert "/github/some-class/llm-course/blob/main/notebooks/1_paged_attention.ipynb" in readme
    assert badges.repository(bundle) == ADDRESS
    assert badges.stamped(readme, bundle) == readme, "the bundle's own `llmopt badges` agrees"


def test_every_link_of_the_bundles_readme_leads_somewhere(bundle):
    readme = (bundle / "README.md").read_text()
    targets = [t for t in re.findall(r"\]\(([^)#]+)", readme) if "://" not in t]
    assert targets and all((bundle / target).exists() for target in targets)
    assert "make test" not in readme and "make lab" in readme


def test_the_package_in_the_bundle_works_by_itself(bundle):
    done = subprocess.run(
        [sys.executable, "-m", "llmopt_lab.cli", "show", "moe"],
        cwd=bundle,
        env=os.environ | {"PYTHONPATH": str(bundle), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "reference.py" in done.stdout, done.stderr


# The leak test itself


SOLUTION = [
    "kv_head = head // group_of_heads",
    "rows = table[logical] * block_size + offset",
    "scores = scale * (keys[rows] @ query)",
    "weights = torch.softmax(scores, 0)",
]


def notebook_with(source: str, output: str = "") -> bytes:
    cell = nbformat.v4.new_code_cell(source)
    if output:
        cell.outputs = [nbformat.v4.new_output("stream", text=output)]
    return nbformat.writes(nbformat.v4.new_notebook(cells=[cell])).encode()


@pytest.mark.parametrize(
    ("file", "content", "found"),
    [
        ("exercises/1_a.ipynb", notebook_with("\n".join(SOLUTION)), True),
        ("exercises/1_a.ipynb", notebook_with("    " + "\n        ".join(SOLUTION[1:])), True),
        ("exercises/1_a.ipynb", notebook_with("print()", "\n".join(SOLUTION[:3])), True),
        ("notebooks/1_a.ipynb", notebook_with("x = 1\n" + "\n# why\n".join(SOLUTION[:3])), True),
        ("notebooks/1_a.ipynb", notebook_with("\n".join(SOLUTION[:2])), False),
        ("notebooks/1_a.ipynb", notebook_with("### BEGIN SOLUTION"), True),
        ("README.md", "\n".join(SOLUTION).encode(), True),
        ("llmopt_lab/x.py", "\n".join(SOLUTION[:3]).encode(), True),
        ("llmopt_lab/grading/x.py", "\n".join(SOLUTION).encode(), True),
        ("llmopt_lab/grading/x.py", "\n".join(SOLUTION[:3]).encode(), False),
        ("llmopt_lab/model.safetensors", b"\xff\xfe\x00", False),
    ],
)
def test_a_leak_is_found_whatever_its_indentation_comments_and_file(file, content, found):
    private = {"solution 1 of 1_a": SOLUTION}
    assert bool(list(leaks({file: content}, private, set()))) == found


def test_what_the_exercise_gives_is_no_leak_and_one_line_counts_in_exercises_only():
    content = notebook_with("\n".join(SOLUTION))
    assert not list(leaks({"exercises/1.ipynb": content}, {"s": SOLUTION}, set(SOLUTION)))
    one = notebook_with(SOLUTION[0])
    assert list(leaks({"exercises/1.ipynb": one}, {"s": SOLUTION[:1]}, set()))
    assert not list(leaks({"notebooks/1.ipynb": one}, {"s": SOLUTION[:1]}, set()))


def test_the_private_texts_are_all_solutions_all_attempts_and_the_notes():
    texts = private_texts(ROOT)
    marks = [
        f.read_text().count("### BEGIN SOLUTION") for f in (ROOT / "solutions/source").glob("*.py")
    ]
    assert sum(name.startswith("solution ") for name in texts) >= 0.9 * sum(marks)
    for room in ("paged_attention", "moe", "quantization"):
        assert any(name.startswith("attempt ") and name.endswith(f" at {room}") for name in texts)
    assert any(name.startswith("note ") for name in texts)
    private = {line for lines in texts.values() for line in lines}
    assert len(private - public_lines(ROOT)) > 0.6 * len(private), "most of it is private indeed"


def small_checkout(folder: Path) -> Path:
    for name in (
        "notebooks",
        "exercises",
        "solutions/source",
        "tests/attempts",
        "instructor",
        "llmopt_lab",
    ):
        (folder / name).mkdir(parents=True)
    (folder / "pyproject.toml").write_text(f'[project.urls]\nRepository = "{ADDRESS}"\n')
    (folder / "README.md").write_text("# Course\n\nSee [this](missing.md).\n\nSee [it](LICENSE).\n")
    (folder / "LICENSE").write_text("free")
    body = "\n".join(f"    {line}" for line in SOLUTION)
    source = f"# %%\ndef f():\n    ### BEGIN SOLUTION\n{body}\n    ### END SOLUTION\n"
    (folder / "solutions/source/1_a.py").write_text(source)
    (folder / "exercises/1_a.ipynb").write_bytes(notebook_with("def f():\n    ..."))
    return folder


def test_a_leaking_bundle_is_not_written_and_the_place_is_named(tmp_path):
    root = small_checkout(tmp_path / "course")
    (root / "exercises/2_b.ipynb").write_bytes(notebook_with("\n".join(SOLUTION)))
    with pytest.raises(Leak, match=r"exercises/2_b.ipynb, cell \w+: solution 1 of 1_a"):
        kit.release(tmp_path / "out", root)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_a_folder_and_a_zip_hold_the_same_files(name, tmp_path):
    root = small_checkout(tmp_path / "course")
    n_files, n_texts = kit.release(tmp_path / name, root)
    if name.endswith(".zip"):
        with zipfile.ZipFile(tmp_path / name) as archive:
            names = {n.removeprefix("out/") for n in archive.namelist()}
            readme = archive.read("out/README.md").decode()
    else:
        names = {str(p.relative_to(tmp_path / name)) for p in (tmp_path / name).rglob("*.*")}
        names |= {"LICENSE"}
        readme = (tmp_path / name / "README.md").read_text()
    assert names == {"LICENSE", "README.md", "pyproject.toml", "exercises/1_a.ipynb"}
    assert (n_files, n_texts) == (4, 1) and readme == "# Course\n\nSee [it](LICENSE).\n"
    with pytest.raises(BadInput, match="is there already"):
        kit.release(tmp_path / name, root)


def test_an_address_that_colab_cannot_open_is_refused(tmp_path):
    root = small_checkout(tmp_path / "course")
    with pytest.raises(BadInput, match="Colab opens notebooks from github.com"):
        kit.release(tmp_path / "out", root, repository="https://example.org/x")
    with pytest.raises(BadInput, match="is not there: make it"):
        kit.release(tmp_path / "a/b", root)
    assert not (tmp_path / "out").exists()


def test_a_readme_keeps_links_to_the_web_and_loses_what_was_left_out():
    text = "a [x](https://e.org)\n\nb [y](gone.md#z)\n\n```\nmake lab\nmake test   # all\n```\n"
    assert for_students(text, set()) == "a [x](https://e.org)\n\n```\nmake lab\n```\n"


def test_the_command_says_what_it_did(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kit, "release", lambda out, repository: (4, 60))
    assert cli.main(["release", str(tmp_path / "x")]) == 0
    assert "4 files; none holds any of 60" in capsys.readouterr().out
