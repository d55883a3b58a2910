"""The `llmopt` command. Subcommands import what they need when they run, so `doctor` always can."""

import argparse
import ast
import errno
import importlib
import os
import sys
from pathlib import Path

from llmopt_lab.core.errors import LabError, require

HOME = Path(__file__).parent
# a full disk, no right to write: the system's own sentence says all
NOT_OURS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; return the exit status. An error of ours is one line, not a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        args = _parser(arguments[0] if arguments else "").parse_args(arguments)
        if "room" in args:
            require_room(args.room)
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `llmopt show ... | head`: nobody reads on, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except LabError as error:
        print(f"llmopt: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in NOT_OURS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"llmopt: {where}{error.strerror}", file=sys.stderr)
        return 2


def rooms() -> list[str]:
    """The chapters this package has: folders with a reference."""
    return sorted(path.parent.name for path in HOME.glob("*/reference.py"))


def show(room: str, what: str) -> None:
    """Print about one of `rooms()`: its docstring and files, the text of one, or a recorded run.

    `what` is "" for the overview, "trace" for the steps of the chapter's own example, "bare" for
    the reference without its camera lines, or the name of a file such as "kernels".

    Raises:
        BadInput: the chapter has no such file.
    """
    files = {path.stem: path for path in sorted((HOME / room).glob("*.py"))}
    if not what:
        print(f"{room}\n\n{_docstring(files['__init__'])}\n")
        for name, path in files.items():
            if name != "__init__":
                n_lines = len(path.read_text().splitlines())
                print(f"{name + '.py':16}{n_lines:5} lines  {_docstring(path).splitlines()[0]}")
        print(
            f"\nRead one:  llmopt show {room} reference     Watch a run:  llmopt show {room} trace"
        )
    elif what == "trace":
        from llmopt_lab.core.trace import recording

        with recording() as trace:
            _module(room, "cases").strip_example(_module(room, "reference"))
        print(trace)
    elif what == "bare":
        print(without_records(files["reference"].read_text()))
    else:
        require(what in files, f"{room} has no file {what}.py; it has {', '.join(files)}")
        print(files[what].read_text())


def require_room(room: str) -> None:
    """Raise `BadInput` with the list of chapters unless `room` is one."""
    there = ", ".join(rooms()) or "none yet"
    require(room in rooms(), f"there is no chapter {room!r}. The chapters here: {there}")


def without_records(source: str) -> str:
    """The text of a module without its `record(...)` statements, comments and layout kept."""
    lines = source.splitlines(keepends=True)
    for block in (body for node in ast.walk(ast.parse(source)) for body in _bodies(node)):
        records = [statement for statement in block if is_record_statement(statement)]
        for statement in records:
            lines[statement.lineno - 1 : statement.end_lineno] = [""] * (
                statement.end_lineno - statement.lineno + 1
            )
        if records and len(records) == len(block):  # a block must not become empty
            lines[records[0].lineno - 1] = " " * records[0].col_offset + "pass\n"
    return "".join(lines)


def _bodies(node: ast.AST) -> list[list[ast.stmt]]:
    """The lists of statements directly inside a node."""
    bodies = (getattr(node, name, None) for name in ("body", "orelse", "finalbody"))
    return [body for body in bodies if isinstance(body, list)]


def is_record_statement(node: ast.AST) -> bool:
    """Whether `node` is a statement that is nothing but a call of `record`."""
    return isinstance(node, ast.Expr) and is_record_call(node.value)


def is_record_call(node: ast.AST) -> bool:
    """Whether `node` calls a function called `record`."""
    if not isinstance(node, ast.Call):
        return False
    return getattr(node.func, "id", getattr(node.func, "attr", "")) == "record"


def _module(room: str, file: str):
    return importlib.import_module(f"llmopt_lab.{room}.{file}")


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or "(no docstring)"


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser. Only the subcommand about to run is imported, to ask for its own arguments."""
    parser = argparse.ArgumentParser(prog="llmopt", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor", help="what this machine has, and what to do about the rest"
    )
    doctor.set_defaults(run=lambda args: importlib.import_module("llmopt_lab.doctor").run())

    show_ = commands.add_parser(
        "show", help="a chapter in the terminal: files, source, a recorded run"
    )
    show_.add_argument("room", help=f"one of: {', '.join(rooms())}")
    show_.add_argument(
        "what", nargs="?", default="", help="trace, bare, or a file: reference, kernels ..."
    )
    show_.set_defaults(run=lambda args: show(args.room, args.what) or 0)

    for name, module, summary in (
        ("grade", "llmopt_lab.grading.grade", "points and hints for exercise notebooks"),
        ("bench", "llmopt_lab.core.bench", "check a chapter's contenders, then time them"),
        ("syllabus", "llmopt_lab.workshop.syllabus", "an agenda, notebooks and slides for a class"),
        ("release", "llmopt_lab.workshop.release", "the course without solutions, for students"),
        ("site", "llmopt_lab.workshop.site", "static pages in which the players still play"),
    ):
        subparser = commands.add_parser(name, help=summary)
        if name == command:
            implementation = importlib.import_module(module)
            implementation.add_arguments(subparser)
            subparser.set_defaults(run=implementation.run)

    badges = commands.add_parser("badges", help="stamp the repository's address into README.md")
    badges.add_argument("--check", action="store_true", help="change nothing; fail if it would")
    badges.set_defaults(
        run=lambda args: importlib.import_module("llmopt_lab.badges").run(args.check)
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
