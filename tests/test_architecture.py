"""Rules of the house that a machine can check; each failure names the file."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten

import llmopt_lab
from llmopt_lab.cli import is_record_call, is_record_statement, rooms, without_records
from llmopt_lab.core.trace import recording

HOME = Path(llmopt_lab.__file__).parent
SHARED = {"core", "nn", "widgets"}
ABOVE = {"grading", "serving"}

# What a file of a room may import: files of its own room ("*" for all), other parts of the package.
# A file with a name of its own, such as scheduler.py, is a sibling of reference.py.
ROOM_FILE = {
    "records": (set(), {"core"}),
    "kernels": ({"records", "tiles", "*_kernels", "hopper"}, {"core"}),
    "*_kernels": ({"records", "tiles", "*_kernels"}, {"core"}),  # parts of kernels.py
    "tiles": ({"records"}, {"core"}),  # what these share
    "hopper": ({"records", "tiles"}, {"core"}),
    "attend": ({"records", "reference", "siblings", "kernels"}, {"core", "nn"}),
    "cases": ({"*"}, {"core", "nn"}),
    "peers": ({"*"}, {"core"}),  # what cases.py times, where it is long
    "decoding": ({"*"}, {"core", "nn"}),  # whole models on the kernels, timed
    "measure": ({"*"}, {"core", "nn"}),  # real models, measured for results/
    "head_card": ({"*"}, {"core", "nn"}),  # the same for the draft head
    "train_head": ({"*"}, {"core", "nn"}),
    "view": ({"records"}, {"core", "widgets"}),
    "__init__": ({"records", "reference", "siblings"}, {"core", "nn"}),
    "reference": ({"records", "reference", "siblings"}, {"core", "nn"}),
}
MAY_IMPORT_TRITON = ("kernels", "*_kernels", "tiles", "hopper", "launch", "triton_check")


def kind(stem: str) -> str:
    """The name under which the tables above have a file."""
    return "*_kernels" if stem.endswith("_kernels") else stem


def package_files(home: Path) -> list[Path]:
    return sorted(path for path in home.rglob("*.py") if "__pycache__" not in path.parts)


FILES = [str(path.relative_to(HOME)) for path in package_files(HOME)]


def imported_modules(source: str, package: str) -> set[str]:
    """Full names of the modules that a file of `package` imports, wherever the import stands."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:  # `from .core import trace` names a module, `record` does not
                names.add(f"{base}.{alias.name}" if is_module(base, alias.name) else base)
    return names


def is_module(base: str, name: str) -> bool:
    folder = HOME.parent / base.replace(".", "/")
    return (folder / f"{name}.py").exists() or (folder / name / "__init__.py").exists()


def forbidden_imports(relative: str, source: str, all_rooms: list[str]) -> list[str]:
    """The modules of this package that `relative` (a path in it) imports and must not."""
    part, _, rest = relative.partition("/")
    if not rest or part == "workshop":  # cli.py, build.py ...: above everything
        return []
    package = ".".join(["llmopt_lab", *Path(relative).parent.parts])
    modules = [n for n in imported_modules(source, package) if n.startswith("llmopt_lab.")]
    return sorted(n for n in modules if not allowed(part, Path(rest).stem, n, all_rooms))


def allowed(part: str, stem: str, module: str, all_rooms: list[str]) -> bool:
    target, _, inside = module.removeprefix("llmopt_lab.").partition(".")
    if part in ABOVE:
        return target in SHARED | ABOVE | set(all_rooms)
    if part in SHARED:
        return target in {part, "core"}
    own, others = ROOM_FILE.get(kind(stem), ROOM_FILE["reference"])
    if target != part:
        return target in others and (target != "widgets" or inside in ("", "panels"))
    file = kind(inside.partition(".")[0] or "__init__")
    return "*" in own or file in own or (file not in ROOM_FILE and "siblings" in own)


@pytest.mark.parametrize("relative", FILES)
def test_imports_point_down(relative):
    forbidden = forbidden_imports(relative, (HOME / relative).read_text(), rooms())
    assert not forbidden, f"{relative} must not import {', '.join(forbidden)}"


@pytest.mark.parametrize(
    ("relative", "line"),
    [
        ("paged_attention/view.py", "from llmopt_lab.paged_attention.reference import BlockPool"),
        ("paged_attention/view.py", "from llmopt_lab.paged_attention import BlockPool"),
        ("paged_attention/view.py", "from llmopt_lab.widgets.player import Player"),
        ("paged_attention/reference.py", "from llmopt_lab.moe.records import Routing"),
        ("paged_attention/reference.py", "def f():\n    import llmopt_lab.paged_attention.kernels"),
        ("paged_attention/kernels.py", "from .reference import BlockPool"),
        ("moe/few_token_kernels.py", "from .kernels import moe_layer_triton"),
        ("paged_attention/__init__.py", "from . import kernels"),
        ("core/trace.py", "from llmopt_lab.nn.config import ModelConfig"),
        ("widgets/draw.py", "from llmopt_lab.moe.records import Routing"),
        ("nn/transformer.py", "import llmopt_lab.widgets.player"),
    ],
)
def test_a_forbidden_import_is_seen(relative, line):
    assert forbidden_imports(relative, line, ["moe", "paged_attention"])


@pytest.mark.parametrize(
    ("relative", "line"),
    [
        ("paged_attention/view.py", "from llmopt_lab.widgets.panels import Frame"),
        ("paged_attention/attend.py", "from llmopt_lab.paged_attention.kernels import append_kv"),
        ("paged_attention/cases.py", "from llmopt_lab.paged_attention import PagedCache"),
        ("paged_attention/scheduler.py", "from .reference import BlockPool"),
        ("grading/paged_attention.py", "from llmopt_lab.paged_attention import PagedCache"),
        ("cli.py", "from llmopt_lab.grading import grade"),
    ],
)
def test_an_allowed_import_is_let_through(relative, line):
    assert not forbidden_imports(relative, line, ["moe", "paged_attention"])


@pytest.mark.parametrize("relative", FILES)
def test_only_kernels_import_triton(relative):
    package = ".".join(["llmopt_lab", *Path(relative).parent.parts])
    names = imported_modules((HOME / relative).read_text(), package)
    if any(name.split(".")[0] == "triton" for name in names):
        # elsewhere only inside a function: the module must import without Triton
        at_top = top_level_imports((HOME / relative).read_text())
        assert kind(Path(relative).stem) in MAY_IMPORT_TRITON or "triton" not in at_top, relative


def numbers_asked_for_methods(source: str) -> list[str]:
    """Calls like `n_rows.to(...)` in launched kernels, where n_rows is a number from the launcher.

    Triton makes a number that equals 1 a Python int, which has no methods; on other numbers, and
    in the interpreter, the call works.
    """
    found = []
    for kernel in ast.walk(ast.parse(source)):
        if not (isinstance(kernel, ast.FunctionDef) and kernel.decorator_list):
            continue
        if not kernel.name.endswith("_kernel"):
            continue
        given = {arg.arg for arg in kernel.args.args if not arg.arg.endswith(("_ptr", "_desc"))}
        for call in ast.walk(kernel):
            method = call.func if isinstance(call, ast.Call) else None
            if isinstance(method, ast.Attribute):
                parts = list(ast.walk(method.value))
                names = {part.id for part in parts if isinstance(part, ast.Name)}
                computed = any(isinstance(part, (ast.Call, ast.Subscript)) for part in parts)
                if names and names <= given and not computed:
                    found.append(f"{kernel.name}, line {call.lineno}: {ast.unparse(call)}")
    return found


@pytest.mark.parametrize("relative", [f for f in FILES if kind(Path(f).stem) in MAY_IMPORT_TRITON])
def test_a_kernel_asks_no_number_of_its_launcher_for_a_method(relative):
    assert not numbers_asked_for_methods((HOME / relative).read_text())


def test_a_number_asked_for_a_method_is_seen_and_a_tensor_is_let_through():
    kernel = "@jit\ndef _a_kernel(x_ptr, x_desc, n, m, SIZE: tl.constexpr):\n    {}"
    for line in ("a = n.to(tl.int64)", "a = x_ptr + (n * m).to(tl.int64)", "SIZE.to(tl.int64)"):
        assert numbers_asked_for_methods(kernel.format(line)), line
    for line in ("a = tl.cast(n, tl.int64)", "a = tl.program_id(n).to(tl.int64)", "x_desc.load(n)"):
        assert not numbers_asked_for_methods(kernel.format(line)), line


def top_level_imports(source: str) -> set[str]:
    """First names of what a module imports as it is imported itself."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("relative", [f for f in FILES if f.startswith("core/")])
def test_core_imports_torch_and_nothing_heavier(relative):
    foreign = top_level_imports((HOME / relative).read_text()) - set(sys.stdlib_module_names)
    assert foreign <= {"torch", "llmopt_lab", "triton", "tqdm"}, relative


@pytest.mark.parametrize("relative", FILES)
def test_record_is_always_a_line_of_its_own(relative):
    source = (HOME / relative).read_text()
    tree = ast.parse(source)
    statements = [node for node in ast.walk(tree) if is_record_statement(node)]
    calls = [node for node in ast.walk(tree) if is_record_call(node)]
    assert len(calls) == len(statements), f"{relative}: a record(...) is part of an expression"
    for statement in statements:
        line = source.splitlines()[statement.lineno - 1]
        alone = re.match(r"\s*(\w+\.)?record\(", line)
        assert alone, f"{relative}:{statement.lineno} shares its line"


@pytest.mark.parametrize("relative", FILES)
def test_names_say_what_things_do(relative):
    tree = ast.parse((HOME / relative).read_text())
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    names = [node.name for node in ast.walk(tree) if isinstance(node, kinds)] + [
        Path(relative).stem
    ]
    empty = [name for name in names if re.search(r"manager|helper|util", name, re.IGNORECASE)]
    assert not empty, f"{relative}: {', '.join(empty)} says nothing about what it does"


@pytest.mark.parametrize("room", rooms())
def test_a_reference_does_not_print_and_does_not_ask_whether_it_is_traced(room):
    tree = ast.parse((HOME / room / "reference.py").read_text())
    for node in ast.walk(tree):
        names = {getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node)}
        if isinstance(node, ast.If):
            condition = {getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node.test)}
            assert not condition & {"trace", "tracing", "recording"}, f"{room}:{node.lineno}"
        if isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") != "print", f"{room}:{node.lineno}"
        if isinstance(node, ast.Attribute):
            assert not {"cuda"} & names, f"{room}:{node.lineno}: device code in a reference"


@pytest.mark.parametrize("room", rooms())
def test_what_a_room_exports_is_not_hidden_by_a_file_of_that_name(room):
    package = importlib.import_module(f"llmopt_lab.{room}")
    for path in (HOME / room).glob("*.py"):
        if path.stem not in ("__init__", "__main__"):
            importlib.import_module(f"llmopt_lab.{room}.{path.stem}")
    hidden = [n for n in package.__all__ if isinstance(getattr(package, n), types.ModuleType)]
    assert hidden == []


RUN_EXAMPLES = """
import importlib, sys, torch
torch.use_deterministic_algorithms(True)
out, *rooms = sys.argv[1:]
made = {}
for room in rooms:
    cases = importlib.import_module(f"llmopt_lab.{room}.cases")
    made[room] = cases.strip_example(importlib.import_module(f"llmopt_lab.{room}.reference"))
torch.save(made, out)
"""


def run_examples(package_root: Path, rooms: list[str]) -> dict[str, list[torch.Tensor]]:
    """Room -> the tensors that its example makes, all run by the package below `package_root`."""
    out = package_root / "made.pt"
    environment = os.environ | {"PYTHONPATH": str(package_root), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", RUN_EXAMPLES, str(out), *rooms],
        env=environment,
        cwd=package_root,
        check=True,
    )
    made = {room: tree_flatten(example)[0] for room, example in torch.load(out).items()}
    for room, leaves in made.items():
        tensors = all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        assert leaves and tensors, f"{room}: no tensors"
    return made


def copy_package(destination: Path) -> Path:
    shutil.copytree(HOME, destination / "llmopt_lab", ignore=shutil.ignore_patterns("__pycache__"))
    return destination


def strip_room(package_root: Path, room: str) -> None:
    for path in (package_root / "llmopt_lab" / room).glob("*.py"):
        path.write_text(without_records(path.read_text()))


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(x.nan_to_num(), y.nan_to_num())
        for x, y in zip(a, b, strict=True)
    )


TOY_ROOM = {
    "__init__.py": '"""A room for the test below."""\n',
    "reference.py": """
import torch
from llmopt_lab.core.memory import Load
from llmopt_lab.core.trace import record

def double(x, rng):
    for _ in range(3):
        record(Load("x", 0, {nbytes}))
        x = x + torch.rand(2, generator=rng)
    if x.sum() > 0:
        record(Load("x", 1, 8))
    return x
""",
    "cases.py": """
import torch

def strip_example(reference):
    return reference.double(torch.ones(2), torch.Generator().manual_seed(0))
""",
}
# toy room -> what the record in its loop counts as bytes
TOYS = {"harmless": "8", "drawing": "int(torch.rand(1, generator=rng) * 8)"}


@pytest.fixture(scope="module")
def with_and_without_records(tmp_path_factory):
    """Room -> tensors, by the package as it is and by a copy whose record lines are deleted."""
    package_root = copy_package(tmp_path_factory.mktemp("stripped"))
    for room, nbytes in TOYS.items():
        folder = package_root / "llmopt_lab" / room
        folder.mkdir()
        for name, text in TOY_ROOM.items():
            (folder / name).write_text(text.replace("{nbytes}", nbytes))
    with_records = run_examples(package_root, [*rooms(), *TOYS])
    for room in [*rooms(), *TOYS]:
        strip_room(package_root, room)
    assert "record(" not in (package_root / "llmopt_lab" / "drawing" / "reference.py").read_text()
    return with_records, run_examples(package_root, [*rooms(), *TOYS])


@pytest.mark.parametrize("room", rooms())
def test_deleting_the_record_lines_changes_no_bit(room, with_and_without_records):
    with_records, without = with_and_without_records
    assert same_bits(with_records[room], without[room])


@pytest.mark.parametrize("room", rooms())
def test_the_example_of_the_strip_test_reaches_every_record_line(room):
    cases = importlib.import_module(f"llmopt_lab.{room}.cases")
    reference = importlib.import_module(f"llmopt_lab.{room}.reference")
    with recording() as trace:
        cases.strip_example(reference)
    reached = {(step.file, step.line) for step in trace.steps}
    for path in (HOME / room).glob("*.py"):
        for node in filter(is_record_statement, ast.walk(ast.parse(path.read_text()))):
            lines = range(node.lineno, node.end_lineno + 1)
            assert any((str(path), line) in reached for line in lines), (
                f"{room}/{path.name}:{node.lineno} is not reached by cases.strip_example"
            )


def test_a_record_that_draws_a_random_number_is_caught(with_and_without_records):
    with_records, without = with_and_without_records
    assert same_bits(with_records["harmless"], without["harmless"])
    assert not same_bits(with_records["drawing"], without["drawing"])
