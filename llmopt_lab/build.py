"""Build the notebooks from their sources: `python -m llmopt_lab.build [--check] [what] [names]`.

    notebooks/source/N_room.py  ->  notebooks/N_room.ipynb     executed
    solutions/source/N_room.py  ->  solutions/N_room.ipynb     executed
                                ->  exercises/N_room.ipynb     solutions cut out, nothing run

Sources are jupytext py:percent. Two builds of one source give the same bytes: cell ids come from
the source, nothing that carries a time, an address or a random id is kept, and the kernel runs
with a fixed hash seed and without a GPU. Cells tagged `timing` have outputs that vary: they keep
those of the notebook built before while their source is the same (`--refresh` takes new ones).

Exercise cells carry nbgrader metadata. `grade_id` is "room-function" for the cell to fill in and
"room-function-check" for its check (a dot for the first dash is fine in a source); what stands
between `### BEGIN SOLUTION` and `### END SOLUTION`, inside a function, is cut out.
"""

import argparse
import ast
import copy
import difflib
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmopt_lab.badges import colab_badge, repository
from llmopt_lab.core.errors import LabError, Missing, require

try:
    import jupytext
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from tqdm import tqdm
except ImportError as missing:
    raise Missing(
        f"building notebooks needs {missing.name}. Run: pip install -e .[test]"
    ) from missing

ANSI = re.compile(r"\x1b\[[0-9;]*m")
WIDGET = "application/vnd.jupyter.widget-view+json"
BADGE = "{{colab_badge}}"
REPOSITORY = "{{repository}}"  # in the set-up cell, which installs from there
STUB = ("# YOUR CODE HERE", "raise NotImplementedError()")  # nbgrader's own words
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
KEPT_METADATA = ("accelerator", "colab")
NBGRADER = {
    "schema_version": 3,
    "grade": False,
    "solution": False,
    "locked": False,
    "task": False,
}
# What would differ between two builds, or between two machines, is switched off.
SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONHASHSEED": "0",
    "SOURCE_DATE_EPOCH": "0",           # matplotlib's SVG and PDF dates
    "TQDM_DISABLE": "1",
}  # fmt: skip
MATPLOTLIBRC = "svg.hashsalt: llmopt_lab\n"
CELL_TIMEOUT_S = 600


class BuildError(LabError, RuntimeError):
    """A notebook could not be built; the message names the file, the cell and the reason."""


def find_root(start: Path) -> Path:
    """The course's folder: the nearest one above `start` whose pyproject.toml is llmopt_lab's.

    Raises:
        BadInput: there is none.
    """
    for folder in (start, *start.parents):
        project = folder / "pyproject.toml"
        if project.is_file():
            name = tomllib.loads(project.read_text("utf-8")).get("project", {}).get("name", "")
            if name.replace("-", "_") == "llmopt_lab":
                return folder
    require(
        False, f"{start} is not inside a checkout of the course (no pyproject.toml of it above)"
    )


def sources(root: Path, what: str = "all", names: Iterable[str] = ()) -> list[Path]:
    """The source files to build: `what` is "notebooks", "exercises" or "all".

    `names` picks some by their names, with or without the number: "1_paged_attention",
    "paged_attention".

    Raises:
        BadInput: no source has one of the names.
    """
    folders = {"notebooks": ["notebooks"], "exercises": ["solutions"]}
    found = [
        file
        for folder in folders.get(what, ["notebooks", "solutions"])
        for file in sorted((root / folder / "source").glob("*.py"))
    ]
    names = list(names)
    for name in names:
        known = [file.stem for file in found]
        require(
            any(name in (stem, stem.partition("_")[2]) for stem in known),
            f"there is no source called {name!r}; there are: {', '.join(known) or 'none'}",
        )
    wanted = set(names)
    return [f for f in found if not wanted or wanted & {f.stem, f.stem.partition("_")[2]}]


def read_source(file: Path):
    """A source as a notebook with ids, complete nbgrader metadata and a stamped badge; not run.

    Raises:
        BuildError: a cell breaks a rule of exercise notebooks, or two cells have one id.
    """
    root = find_root(file.parent)
    notebook = jupytext.read(file, fmt="py:percent")  # else it may guess hydrogen, without magics
    kept = {key: notebook.metadata[key] for key in KEPT_METADATA if key in notebook.metadata}
    notebook.metadata = nbformat.from_dict(
        kept | {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    folder = "exercises" if file.parts[-3] == "solutions" else file.parts[-3]
    ids: set[str] = set()
    for index, cell in enumerate(notebook.cells, 1):
        cell.metadata.pop("lines_to_next_cell", None)
        explicit = cell.metadata.pop("id", None)
        if grading := cell.metadata.get("nbgrader"):
            grading = NBGRADER | grading
            grading["grade_id"] = grading.get("grade_id", "").replace(".", "-")
            cell.metadata.nbgrader = nbformat.from_dict(grading)
        cell.id = (grading or {}).get("grade_id") or explicit or f"cell-{index:03d}"
        problem = _problem(cell) or (f"the id {cell.id!r} is taken" if cell.id in ids else "")
        if problem:
            raise BuildError(f"{file}, cell {index}: {problem}")
        ids.add(cell.id)
        if REPOSITORY in cell.source:
            cell.source = cell.source.replace(REPOSITORY, repository(root))
        if cell.cell_type == "markdown" and BADGE in cell.source:
            badge = colab_badge(f"{folder}/{file.stem}.ipynb", repository(root))
            cell.source = cell.source.replace(BADGE, badge)
    return notebook


def _problem(cell) -> str:
    """What breaks a rule in this cell; empty if nothing does."""
    if not re.fullmatch(r"[\w-]{1,64}", cell.id, re.ASCII):
        return f"the id {cell.id!r} must be 1 to 64 letters, digits, - or _"
    grading = cell.metadata.get("nbgrader", {})
    if grading.get("grade") and not (grading["locked"] and grading.get("points", 0) > 0):
        return "a graded cell must be locked and have points"
    begins = re.findall(r"^([ \t]*)### BEGIN SOLUTION[ \t]*$", cell.source, re.M)
    ends = re.findall(r"^[ \t]*### END SOLUTION[ \t]*$", cell.source, re.M)
    n_marks = len(re.findall(r"(BEGIN|END) SOLUTION", cell.source))
    if len(begins) != len(ends) or len(begins) + len(ends) != n_marks:
        return "### BEGIN SOLUTION and ### END SOLUTION must come in pairs, each alone on its line"
    if bool(begins) != bool(grading.get("solution")):
        return "a cell has `solution: true` if and only if it has a ### BEGIN SOLUTION"
    return _problem_of_stub(cut_solutions(cell.source)) if begins else ""


def _problem_of_stub(source: str) -> str:
    """A stub must fail when it is called, in its check, and not before."""
    try:
        todo: list[ast.AST] = [ast.parse(source)]
    except SyntaxError as error:
        return f"without its solution the cell is not Python: {error}"
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Raise):
            return "a solution must stand inside a function, so that the stub fails in its check"
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            todo += ast.iter_child_nodes(node)
    return ""


def make_exercise(solved):
    """The learner's notebook: solutions cut out, outputs gone, locked cells read-only."""
    notebook = copy.deepcopy(solved)
    for cell in notebook.cells:
        grading = cell.metadata.get("nbgrader", {})
        cell.source = cut_solutions(cell.source)
        if grading.get("locked") or grading.get("solution"):
            cell.metadata.deletable = False
        if grading.get("locked"):
            cell.metadata.editable = False
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def cut_solutions(source: str) -> str:
    """The text of a cell with every marked solution replaced by a stub that is not written yet."""
    lines, inside = [], False
    for line in source.split("\n"):
        if "### BEGIN SOLUTION" in line:
            indent = line[: len(line) - len(line.lstrip())]
            lines += [indent + text for text in STUB]
            inside = True
        elif "### END SOLUTION" in line:
            inside = False
        elif not inside:
            lines.append(line)
    return "\n".join(lines)


def execute(notebook, folder: Path, previous=None) -> None:
    """Run the notebook in place, in `folder`, by this interpreter, and keep what is reproducible.

    Cells tagged `timing` take their outputs from `previous`, where it has the cell unchanged.

    Raises:
        BuildError: a cell raised, hung, wrote to stderr (warnings do), or showed an address.
    """
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    # no kernel folders: "python3" is this interpreter, whatever is installed under that name
    specs = KernelSpecManager(kernel_dirs=[])
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
    begun = [0]

    def begin(cell, cell_index: int) -> None:
        begun.append(cell_index)

    client = NotebookClient(
        notebook,
        km=kernel,
        timeout=CELL_TIMEOUT_S,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        on_cell_execute=begin,
        resources={"metadata": {"path": str(folder)}},
    )
    try:
        with _private_settings() as environment:
            client.execute(env=environment, stderr=subprocess.DEVNULL)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        cell = notebook.cells[begun[-1]]
        text = ANSI.sub("", str(error)).strip()
        raise BuildError(f"cell {begun[-1] + 1} ({cell.id}): {text}") from error
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info = nbformat.from_dict({"name": "python"})
    kept = {
        (cell.id, cell.source): cell.outputs
        for cell in (previous.cells if previous else ())
        if cell.cell_type == "code" and "timing" in cell.metadata.get("tags", ())
    }
    root = find_root(folder)
    for index, cell in enumerate(notebook.cells, 1):
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        if "timing" in cell.metadata.get("tags", ()) and (cell.id, cell.source) in kept:
            cell.outputs = kept[cell.id, cell.source]
        for output in cell.outputs:
            if problem := _clean(output, root):
                raise BuildError(f"cell {index} ({cell.id}): {problem}")


@contextmanager
def _private_settings() -> Iterator[dict[str, str]]:
    """An environment in which only this package and the notebook decide what comes out."""
    with tempfile.TemporaryDirectory() as folder:
        matplotlibrc = Path(folder) / "matplotlibrc"
        matplotlibrc.write_text(MATPLOTLIBRC)
        private = {"IPYTHONDIR": folder, "MATPLOTLIBRC": str(matplotlibrc)}
        yield {**os.environ, **SETTINGS, **private}


def _clean(output, root: Path) -> str:
    """Remove what is random or this machine's from one output; return what cannot stay, if any."""
    if output.output_type == "stream":
        if output.name == "stderr":
            return f"it wrote to stderr: {output.text.strip()}"
        output.text = output.text.replace(f"{root}{os.sep}", "")
        texts = [output.text]
    elif output.output_type == "error":
        # a tagged, wanted exception: our stack in it is long and names this machine's folders
        output.traceback = [f"{output.ename}: {output.evalue}"]
        texts = output.traceback
    else:
        output.data.pop(WIDGET, None)  # a random id; without the kernel it draws nothing
        output.metadata.pop(WIDGET, None)
        for kind, text in output.data.items():
            if kind.startswith("text/") and isinstance(text, str):
                output.data[kind] = text.replace(f"{root}{os.sep}", "")
        texts = [t for k, t in output.data.items() if k.startswith("text/") and isinstance(t, str)]
    for text in texts:
        if address := re.search(r"(<|&lt;)[^<>&]* at 0x[0-9a-f]{6,}", text):
            return f"it shows an address, which differs in every run: {address[0]}"
    return ""


def outputs_of(source: Path, refresh: bool = False) -> dict[Path, str]:
    """The notebooks that one source makes: path -> text. A lesson makes one, exercises two.

    Raises:
        BuildError: the notebook breaks a rule or does not run clean.
    """
    root = find_root(source.parent)
    name = f"{source.stem}.ipynb"
    folder = root / source.parts[-3]
    notebook = read_source(source)
    texts = {}
    if folder.name == "solutions":
        texts[root / "exercises" / name] = text_of(make_exercise(notebook))
    built = folder / name
    previous = nbformat.read(built, 4) if built.exists() and not refresh else None
    try:
        execute(notebook, folder, previous)
    except BuildError as error:
        raise BuildError(f"{source.relative_to(root)}, {error}") from error
    texts[built] = text_of(notebook)
    return texts


def text_of(notebook) -> str:
    """The notebook's file, byte for byte."""
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def write(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, "utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def difference(path: Path, text: str, n_lines: int = 12) -> str:
    """How the file differs from what a build gives now, shortened; empty if it does not."""
    old = path.read_text("utf-8") if path.exists() else ""
    if old == text:
        return ""
    lines = difflib.unified_diff(old.splitlines(), text.splitlines(), "there", "built", lineterm="")
    shown = [line[:160] for _, line in zip(range(n_lines), lines, strict=False)]
    return "\n".join([f"{path.parent.name}/{path.name}", *(f"    {line}" for line in shown)])


def orphans(root: Path) -> list[str]:
    """Built notebooks without a source, as paths from the root."""
    return [
        f"{folder}/{file.name}"
        for folder, source in (
            ("notebooks", "notebooks"),
            ("solutions", "solutions"),
            ("exercises", "solutions"),
        )
        for file in sorted((root / folder).glob("*.ipynb"))
        if not (root / source / "source" / f"{file.stem}.py").exists()
    ]


def build(
    root: Path,
    what: str = "all",
    names: Iterable[str] = (),
    *,
    check: bool = False,
    refresh: bool = False,
) -> list[str]:
    """Build the sources; return the differences found. With `check`, write nothing.

    Cost: executes every notebook. A failed build leaves the files that it did not reach as they
    were, and no file in part.

    Raises:
        BuildError: a notebook does not build.
        BadInput: no source has one of the names.
    """
    found = []
    progress = tqdm(sources(root, what, names), unit="notebook", disable=None)
    for source in progress:
        progress.set_description(f"{source.parts[-3]}/{source.stem}")
        for path, text in outputs_of(source, refresh).items():
            if changed := difference(path, text):
                found.append(changed)
                if not check:
                    write(path, text)
    if check:
        found += [f"{orphan}: it has no source; delete it" for orphan in orphans(root)]
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 0, or 1 if --check found a difference, or 2 after an error."""
    parser = argparse.ArgumentParser(
        prog="python -m llmopt_lab.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it would")
    parser.add_argument("--refresh", action="store_true", help="take new outputs of timing cells")
    parser.add_argument("--root", type=Path, help="the course's folder (default: this checkout)")
    parser.add_argument("what", nargs="?", default="all", help="notebooks, exercises or all")
    parser.add_argument("names", nargs="*", help="paged_attention ... (default: every one)")
    args = parser.parse_args(arguments)
    if args.what not in ("notebooks", "exercises", "all"):
        args.what, args.names = "all", [args.what, *args.names]
    try:
        root = find_root((args.root or Path(__file__)).resolve())
        found = build(root, args.what, args.names, check=args.check, refresh=args.refresh)
    except LabError as error:
        print(f"build: {error}", file=sys.stderr)
        return 2
    if args.check and found:
        print("The built notebooks are not those of their sources. Run: make notebooks\n")
        print("\n".join(found))
        return 1
    for change in found:
        print(change.splitlines()[0])
    print("nothing changed" if not found else f"{len(found)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
