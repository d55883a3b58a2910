"""`llmopt release FOLDER`: what students get, without solutions, wrong attempts and notes.

The bundle holds what is listed in `CONTENTS`, nothing else: a file that nobody thought of stays at
home. Before anything is written, `leaks` looks for solutions, attempts and notes in every file.
"""

import argparse
import ast
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import nbformat

from llmopt_lab import badges
from llmopt_lab.core.errors import LabError, require
from llmopt_lab.workshop.course import HEADING

ROOT = Path(__file__).resolve().parents[2]
CONTENTS = (
    "LICENSE",
    "Makefile",
    "README.md",
    "constraints.txt",
    "docs/*.png",
    "environment*.yml",
    "exercises/*.ipynb",
    "llmopt_lab/**/*",
    "notebooks/*.ipynb",
    "pyproject.toml",
)
LEFT_OUT = {"__pycache__", ".ipynb_checkpoints"}
LINES_ALIKE = 3  # so many telling lines of a private text in a row, and it has leaked
MARK = "BEGIN" + " SOLUTION"  # in two parts, or this file would be a leak


class Leak(LabError, RuntimeError):
    """The bundle would hold a solution, an attempt or a note; nothing was written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="a new folder, or a new file ending in .zip")
    parser.add_argument(
        "--repository", help="stamp this address (https://github.com/...) into badges and set-up"
    )


def run(args: argparse.Namespace) -> int:
    n_files, n_texts = release(args.out, repository=args.repository)
    print(f"{args.out}: {n_files} files; none holds any of {n_texts} solutions, attempts and notes")
    return 0


def release(out: Path, root: Path = ROOT, *, repository: str | None = None) -> tuple[int, int]:
    """Write the bundle; return its number of files, and of private texts that it was held against.

    Args:
        out: a folder, or a .zip file, that is not there yet.
        root: of the checkout.
        repository: the address from which students install; that of pyproject.toml if None.

    Raises:
        BadInput: `out` is there already, or the address is not on github.com.
        Leak: a file holds something private.
    """
    require(not out.exists(), f"{out} is there already: name a new folder or .zip file")
    require(
        out.resolve().parent.is_dir(), f"the folder {out.resolve().parent} is not there: make it"
    )
    files = {path: path.read_bytes() for path in bundled(root)}
    named = {str(path.relative_to(root)): content for path, content in files.items()}
    named["README.md"] = for_students(named["README.md"].decode("utf-8"), set(named)).encode()
    if repository is not None:
        stamp(named, badges.repository(root), repository.removesuffix("/"))
    private = private_texts(root)
    found = list(leaks(named, private, public_lines(root)))
    if found:
        raise Leak("nothing was written:\n" + "\n".join(found))
    if out.suffix == ".zip":
        with tempfile.TemporaryDirectory(dir=out.resolve().parent) as folder:
            whole = Path(folder) / "bundle"
            with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, content in sorted(named.items()):
                    archive.writestr(f"{out.stem}/{name}", content)
            shutil.move(whole, out)  # whole, or not at all
    else:
        for name, content in named.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(content)
    return len(named), len(private)


def bundled(root: Path) -> list[Path]:
    """The files of a checkout that students get."""
    found = {path for pattern in CONTENTS for path in root.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not LEFT_OUT & {*path.parts} and path.suffix != ".pyc")


def for_students(readme: str, files: set[str]) -> str:
    """README.md without `make test` and without paragraphs that lead to files left out."""

    def leads_out(paragraph: str) -> bool:
        targets = re.findall(r"\]\(([^)#]+)", paragraph)
        return any("://" not in target and target not in files for target in targets)

    kept = [part for part in readme.split("\n\n") if not leads_out(part)]
    return re.sub(r"^make test .*\n", "", "\n\n".join(kept), flags=re.M)


def stamp(files: dict[str, bytes], old: str, new: str) -> None:
    """Put another address of the repository into everything: badges, set-up cells, pyproject.

    Raises:
        BadInput: Colab cannot open notebooks from there.
    """
    badges.colab_badge("", new)
    places = [(old, new)]
    places += [tuple(f"/github/{x.removeprefix('https://github.com/')}/" for x in (old, new))]
    for name, content in files.items():
        if name.endswith((".ipynb", ".md", ".toml")):
            for before, after in places:
                content = content.replace(before.encode(), after.encode())
            files[name] = content


# The leak test


def private_texts(root: Path) -> dict[str, list[str]]:
    """Where from -> its telling lines: solutions, attempts right and wrong, instructor's notes."""
    texts = {}
    for file in sorted((root / "solutions" / "source").glob("*.py")):
        parts = re.findall(
            rf"### {MARK}[ \t]*\n(.*?)### END SOLUTION", file.read_text("utf-8"), re.S
        )
        for number, part in enumerate(parts, 1):
            texts[f"solution {number} of {file.stem}"] = _telling(part)
    for file in sorted((root / "tests" / "attempts").glob("*.py")):
        source = file.read_text("utf-8")
        rows = source.splitlines()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                body = "\n".join(rows[node.lineno - 1 : node.end_lineno])
                texts[f"attempt {node.name} at {file.stem}"] = _telling(body)
    for file in sorted((root / "instructor").glob("*.md")):
        notes = file.read_text("utf-8")
        for paragraph in re.split(r"\n\s*\n", notes):
            lines = [line for line in _telling(paragraph) if not HEADING.match(line)]
            if len(" ".join(lines)) >= 60:
                texts[f"note {lines[0][:40]!r} on {file.stem}"] = lines
    return {name: lines for name, lines in texts.items() if lines}


def public_lines(root: Path) -> set[str]:
    """Lines that are not private wherever else they stand: what exercises give, and the references.

    An exercise's kernel begins with lines that every attempt repeats, and the answer to some is
    what the chapter's reference does: the references are the course.
    """
    lines = set()
    for file in (root / "solutions" / "source").glob("*.py"):
        given = re.sub(rf"### {MARK}.*?### END SOLUTION", "", file.read_text("utf-8"), flags=re.S)
        lines |= {*_telling(re.sub(r"^# ?", "", given, flags=re.M))}  # Markdown is in comments
    for reference in (root / "llmopt_lab").glob("*/reference.py"):
        for file in reference.parent.glob("*.py"):
            lines |= {*_telling(file.read_text("utf-8"))}
    return lines


def leaks(
    files: Mapping[str, bytes], private: Mapping[str, list[str]], public: set[str]
) -> Iterator[str]:
    """Each place that holds a private text, and which.

    A text is held by a file that has `LINES_ALIKE` of its lines in a row, or all of them if there
    are fewer, `public` ones not counted. One line alone proves nothing, except in an exercise. The
    checks in llmopt_lab/grading compare with right answers of their own: there only a whole text
    of more than `LINES_ALIKE` lines counts.
    """
    openings: dict[str, list[tuple[str, list[str]]]] = {}
    whole: dict[str, list[tuple[str, list[str]]]] = {}
    for name, lines in private.items():
        lines = [line for line in lines if line not in public]
        if len(lines) > LINES_ALIKE:
            whole.setdefault(lines[0], []).append((name, lines))
        for i in range(max(0, len(lines) - LINES_ALIKE) + 1 if lines else 0):
            openings.setdefault(lines[i], []).append((name, lines[i : i + LINES_ALIKE]))
    for file, content in files.items():
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if MARK in text and file.endswith(".ipynb"):
            yield f"{file}: a mark of a solution"
        known = whole if file.startswith("llmopt_lab/grading/") else openings
        for where, lines in _texts(file, text):
            lines = [line for line in lines if line not in public]
            for i, line in enumerate(lines):
                for name, run in known.get(line, ()):
                    counts = len(run) > 1 or file.startswith("exercises/")
                    if lines[i : i + len(run)] == run and counts:
                        yield f"{where}: {name}: {run[0][:60]}"


def _texts(file: str, text: str) -> Iterator[tuple[str, list[str]]]:
    """The telling lines of a file; of a notebook, those of each cell and of its outputs."""
    if not file.endswith(".ipynb"):
        yield file, _telling(text)
        return
    for cell in nbformat.reads(text, 4).cells:
        yield f"{file}, cell {cell.id}", _telling(cell.source)
        for output in cell.get("outputs", ()):
            yield f"{file}, output of {cell.id}", _telling(output.get("text", ""))


def _telling(text: str) -> list[str]:
    """Lines without indentation and comments, and without those that stand everywhere."""
    lines = (re.sub(r"\s+#.*$|^#.*$", "", line.strip()) for line in text.splitlines())
    return [line for line in lines if len(line) >= 12 and not line.startswith(("import ", "from "))]
