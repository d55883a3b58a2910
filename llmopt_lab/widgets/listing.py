"""The source that is shown beside a picture: the function around the line a frame names."""

import ast
import linecache
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

Definition = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Listing:
    """Lines of one file, the first of them numbered `first`."""

    title: str  # "PagedCache.append in paged_attention/reference.py"
    first: int
    lines: tuple[str, ...]


def list_source(file: str | None, line: int | None) -> Listing | None:
    """The innermost function, or else the top-level statement, that holds `line` of `file`.

    Works for modules and for notebook cells, which IPython keeps in `linecache`. None when the
    file cannot be read or is not Python.
    """
    if file is None or line is None:
        return None
    linecache.checkcache(file)
    source = linecache.getlines(file)
    around = _around(tuple(source), line)
    if not around:
        return None
    functions = [s for s in around if isinstance(s, Definition)]
    shown = functions[-1] if functions else around[0]
    text = textwrap.dedent("".join(source[_first(shown) - 1 : shown.end_lineno]))
    names = [s.name for s in around if isinstance(s, Definition | ast.ClassDef)]
    title = f"{'.'.join(names)} in {_where(file)}" if functions else _where(file)
    return Listing(title, _first(shown), tuple(text.rstrip().split("\n")))


@lru_cache(maxsize=64)
def _parse(source: tuple[str, ...]) -> ast.Module | None:
    try:
        return ast.parse("".join(source))
    except (SyntaxError, ValueError):  # not Python: a compiled extension, a cell magic
        return None


def _around(source: tuple[str, ...], line: int) -> list[ast.stmt]:
    """The statements that hold `line`, outermost first."""
    path: list[ast.stmt] = []
    module = _parse(source)
    inside = module.body if module else []
    while holding := [s for s in inside if _first(s) <= line <= s.end_lineno]:
        path.append(holding[0])
        inside = _children(holding[0])
    return path


def _first(statement: ast.stmt) -> int:
    decorators = getattr(statement, "decorator_list", [])
    return min([statement.lineno] + [d.lineno for d in decorators])


def _children(statement: ast.stmt) -> list[ast.stmt]:
    """The statements directly inside one, whatever block they stand in."""
    found: list[ast.stmt] = []
    todo = list(ast.iter_child_nodes(statement))
    for node in todo:
        if isinstance(node, ast.stmt):
            found.append(node)
        else:  # except handlers and match cases hold statements of their own
            todo.extend(ast.iter_child_nodes(node))
    return found


def _where(file: str) -> str:
    """A name for the reader that is the same on every machine."""
    path = Path(file)
    if "ipykernel" in file or file.startswith("<"):
        return "this notebook"
    return f"{path.parent.name}/{path.name}" if path.parent.name else path.name
