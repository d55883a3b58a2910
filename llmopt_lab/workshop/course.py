"""The course as its built notebooks have it: sections, minutes, exercises, what needs what.

A section begins at a heading `## 3. Title (20 minutes)`, an exercise at
`## 3. Title (2 points, 8 minutes)`. Prerequisites stand in two sentences:

    Do them after section 3            in a lesson's first cell: its exercises need sections 1 to 3
    Needs section 5 of the lesson.     below an exercise's heading
    Needs section 2 of chapter 2.      below a section's heading, or in a lesson's first cell

What a section's *code* needs is read from the code: see `cells_needed`.
"""

import ast
import copy
import re
import symtable
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

from llmopt_lab.core.errors import require

HEADING = re.compile(
    r"^## (?:(?P<number>\d+)\. )?(?P<title>.*?)"
    r"(?: \((?:(?P<points>\d+) points?, )?(?P<minutes>\d+) minutes?\))?$"
)
AFTER = re.compile(r"after\s+section\s+(\d+)")
NEEDS = re.compile(r"Needs\s+sections?\s+([\d, and]+)\s+of\s+(the\s+lesson|chapter\s+(\d+))")
START = "0_start_here"
Place = tuple[str, int]  # a lesson's name and the number of one of its sections


@dataclass(frozen=True, eq=False)
class Section:
    """One section of a lesson, or one exercise. There is one object of each."""

    notebook: str  # "1_paged_attention"
    number: int
    title: str
    minutes: int
    cells: tuple = field(repr=False)
    points: int = 0  # of an exercise; 0 for a lesson's section
    needs: frozenset[Place] = frozenset()  # sections of lessons to be taught before

    @property
    def place(self) -> Place:
        return self.notebook, self.number


@dataclass(frozen=True)
class Chapter:
    """A lesson and its exercises; `head` is what stands before the first heading."""

    name: str  # "1_paged_attention"
    title: str
    after: int  # the exercises, or the next chapter, may begin after this section
    sections: tuple[Section, ...]
    exercises: tuple[Section, ...] = ()
    head: tuple = field(default=(), repr=False)
    metadata: dict = field(default_factory=dict, repr=False)

    @property
    def core(self) -> tuple[Section, ...]:
        """What no agenda leaves out: up to section `after`, and the last, which sums up."""
        return (*self.sections[: self.after], *self.sections[self.after :][-1:])


def read_course(root: Path) -> list[Chapter]:
    """The chapters of a checkout, in order, each with its exercises where it has some.

    Raises:
        BadInput: no lessons, or a lesson that breaks a rule of the module's docstring.
    """
    files = sorted((root / "notebooks").glob("[0-9]_*.ipynb"))
    require(bool(files), f"no lessons in {root / 'notebooks'}: run this in a checkout")
    names = {file.stem[0]: file.stem for file in files}
    return [_read_chapter(file, root / "exercises" / file.name, names) for file in files]


def _read_chapter(lesson: Path, exercises: Path, names: dict[str, str]) -> Chapter:
    notebook = nbformat.read(lesson, 4)
    head, parts = split(notebook.cells)
    title = head[0].source.partition("\n")[0].lstrip("# ") if head else lesson.stem
    text = "\n".join(cell.source for cell in head if cell.cell_type == "markdown")
    found = AFTER.search(text)
    require(
        found is not None and 1 <= int(found[1]) <= len(parts),
        f"{lesson.name}: its first cell must say after which of its {len(parts)} sections the "
        "exercises may begin, such as: Do them after section 3",
    )
    shared = _needs(text, lesson.stem, names)
    sections = tuple(_section(lesson.stem, part, names, shared) for part in parts)
    graded: tuple[Section, ...] = ()
    if exercises.exists():
        base = frozenset((lesson.stem, n) for n in range(1, int(found[1]) + 1))
        _, tasks = split(nbformat.read(exercises, 4).cells)
        numbered = [task for task in tasks if HEADING.match(_first_line(task))["points"]]
        graded = tuple(_section(lesson.stem, task, names, base) for task in numbered)
    return Chapter(
        lesson.stem, title, int(found[1]), sections, graded, tuple(head), dict(notebook.metadata)
    )


def _section(notebook: str, cells: Sequence, names: dict[str, str], shared: frozenset) -> Section:
    line = _first_line(cells)
    heading = HEADING.match(line)
    require(
        heading["number"] is not None and heading["minutes"] is not None,
        f"{notebook}: a section's heading ends in its minutes, such as "
        f"'## 3. Title (20 minutes)'; got {line!r}",
    )
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return Section(
        notebook,
        int(heading["number"]),
        heading["title"],
        int(heading["minutes"]),
        tuple(cells),
        int(heading["points"] or 0),
        shared | _needs(text, notebook, names),
    )


def _needs(text: str, notebook: str, names: dict[str, str]) -> frozenset[Place]:
    places = set()
    for numbers, _, chapter in NEEDS.findall(text):
        require(
            not chapter or chapter in names,
            f"{notebook} needs chapter {chapter}, and there is no notebook {chapter}_*.ipynb",
        )
        lesson = names[chapter] if chapter else notebook
        places |= {(lesson, int(n)) for n in re.findall(r"\d+", numbers)}
    return frozenset(places)


def split(cells: Iterable) -> tuple[list, list[list]]:
    """(what stands before the first `## ` heading, one list of cells a heading).

    A heading in the middle of a Markdown cell begins a cell of its own.
    """
    groups: list[list] = [[]]
    for cell in cells:
        pieces = _at_headings(cell.source) if cell.cell_type == "markdown" else [cell.source]
        for i, piece in enumerate(pieces):
            if cell.cell_type == "markdown" and piece.startswith("## "):
                groups.append([])
            part = copy.deepcopy(cell)
            part.source = piece
            if i:
                part.id = f"{cell.id}-{i + 1}"
            groups[-1].append(part)
    return groups[0], groups[1:]


def _at_headings(text: str) -> list[str]:
    """A Markdown cell cut before each `## ` line that is not inside a fence."""
    pieces, fenced = [[]], False
    for line in text.split("\n"):
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced and any(pieces[-1]):
            pieces.append([])
        pieces[-1].append(line)
    return ["\n".join(piece).strip("\n") for piece in pieces]


def _first_line(cells: Sequence) -> str:
    return cells[0].source.partition("\n")[0]


@dataclass
class Names:
    """Names of the module that a cell's code touches."""

    given: set[str] = field(default_factory=set)  # it gives them a value
    changed: set[str] = field(default_factory=set)  # x[i] = ..., x.a = ..., x.method(...) alone
    used: set[str] = field(default_factory=set)  # it needs their value from before


def names_of(source: str) -> Names:
    """What a cell gives, changes and uses, statement by statement from top to bottom.

    A name that a cell gives before it uses it is not used. Functions count as called where they
    are defined. What only one branch of an `if` gives is not given.
    """
    names = Names()
    _read(ast.parse(source).body, names)
    return names


def _read(statements: Iterable[ast.stmt], names: Names) -> None:
    for node in statements:
        match node:
            case ast.For():
                _take(node.iter, names)
                _take(ast.Assign([node.target], ast.Constant(0), lineno=1), names)
                _read([*node.body, *node.orelse], names)
            case ast.With():
                for item in node.items:
                    _take(item.context_expr, names)
                    if item.optional_vars is not None:
                        _take(ast.Assign([item.optional_vars], ast.Constant(0), lineno=1), names)
                _read(node.body, names)
            case ast.While():
                _take(node.test, names)
                _read([*node.body, *node.orelse], names)
            case ast.Try():
                _read([*node.body, *node.orelse, *node.finalbody], names)
                for handler in node.handlers:
                    aside = Names(set(names.given) | {handler.name or ""})
                    _read(handler.body, aside)
                    names.used |= aside.used
            case ast.If():
                _take(node.test, names)
                branches = [Names(set(names.given)) for _ in range(2)]
                for branch, body in zip(branches, (node.body, node.orelse), strict=True):
                    _read(body, branch)
                    names.used |= branch.used
                    names.changed |= branch.changed
                names.given |= branches[0].given & branches[1].given
            case _:
                _take(node, names)


def _take(node: ast.AST, names: Names) -> None:
    """Add what one simple statement, definition or expression touches."""
    table = symtable.symtable(ast.unparse(node), "cell", "exec")
    given = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    used = {s.get_name() for s in table.get_symbols() if s.is_referenced()}
    scopes = list(table.get_children())
    while scopes:
        scope = scopes.pop()
        used |= {s.get_name() for s in scope.get_symbols() if s.is_global() and s.is_referenced()}
        scopes += scope.get_children()
    changed = _roots(node)
    if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        used.add(node.target.id)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        used.discard(node.name)  # it may call itself
    names.used |= (used | changed) - names.given
    names.changed |= changed
    names.given |= given


def _roots(node: ast.AST) -> set[str]:
    """The x of `x[i] = ...`, `x.a += ...` and of a line `x.method(...)`."""
    targets: list[ast.AST] = []
    match node:
        case ast.Assign() | ast.Delete():
            targets = list(node.targets)
        case ast.AugAssign() | ast.AnnAssign():
            targets = [node.target]
        case ast.Expr(value=ast.Call()):
            targets = [node.value.func]
    roots = set()
    for target in targets:
        inside = False
        while isinstance(target, ast.Attribute | ast.Subscript):
            target, inside = target.value, True
        if inside and isinstance(target, ast.Name):
            roots.add(target.id)
    return roots


def cells_needed(before: Sequence, wanted: Sequence) -> list[int]:
    """Indices into `before` of the code cells that the code of `wanted` needs, in order.

    Both are lists of cells of one notebook, `before` all that stands before `wanted`. A cell is
    needed if it gives or changes a name that a needed cell below it uses.
    """
    missing: set[str] = set()
    for cell in reversed([c for c in wanted if c.cell_type == "code"]):
        names = names_of(cell.source)
        missing = (missing - names.given) | names.used
    needed = []
    for index in reversed([i for i, c in enumerate(before) if c.cell_type == "code"]):
        names = names_of(before[index].source)
        if (names.given | names.changed) & missing:
            needed.append(index)
            missing = (missing - names.given) | names.used
    return needed[::-1]
