"""`llmopt syllabus --minutes 240`: the agenda of a class, and all that the class needs for it.

With --out FOLDER:

    FOLDER/class/agenda.md             for everyone
    FOLDER/class/notebooks, exercises  what is on the agenda, with catch-up cells
    FOLDER/instructor/notes.md         what to ask, what is the answer, where people get stuck
    FOLDER/instructor/slides           one page a lesson, with the notes for the speaker (key s)
    FOLDER/instructor/catch_up         solutions up to each exercise: hand out as the class goes on
"""

import argparse
import copy
import html
import re
from collections.abc import Sequence
from pathlib import Path

import nbformat

from llmopt_lab.core.errors import require
from llmopt_lab.workshop import slides
from llmopt_lab.workshop.course import (
    START,
    Chapter,
    Section,
    cells_needed,
    names_of,
    read_course,
    split,
)
from llmopt_lab.workshop.plan import DAY, Agenda, plan, where

ROOT = Path(__file__).resolve().parents[2]
MARKS = re.compile(r"^[ \t]*### (BEGIN|END) SOLUTION[ \t]*\n", re.M)
NOTE = re.compile(r"^## (\d+)\b.*$", re.M)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=int, required=True, help="of work: 90, 240, 960 ...")
    parser.add_argument("--out", type=Path, help="write notebooks, notes and slides to this folder")
    parser.add_argument("--no-slides", action="store_true", help="leave the slides out")
    parser.add_argument("rooms", nargs="*", help="only these chapters: moe ... (default: all)")


def run(args: argparse.Namespace) -> int:
    agenda = plan(read_course(ROOT), args.minutes, args.rooms)
    if args.out is None:
        print(agenda_text(agenda))
        return 0
    written = write(agenda, args.out, with_slides=not args.no_slides)
    print(f"{len(written)} files in {args.out}: class is for everyone, instructor for you")
    return 0


def write(agenda: Agenda, out: Path, root: Path = ROOT, *, with_slides: bool = True) -> list[Path]:
    """Write all that the module's docstring lists; return the files.

    Raises:
        BadInput: `out` is there and not empty.
    """
    require(
        not out.exists() or (out.is_dir() and not any(out.iterdir())),
        f"{out} is there and not empty: name a new folder",
    )
    texts = {"class/agenda.md": agenda_text(agenda)}
    spoken = [notes_head(agenda)]
    for chapter in agenda.chapters:
        lesson, tasks = agenda.chosen(chapter.name), agenda.chosen(chapter.name, exercises=True)
        if lesson:
            handout = lesson_handout(chapter, lesson)
            texts[f"class/notebooks/{chapter.name}.ipynb"] = _text(handout)
            mine = {f"## {n}": note for n, note in read_notes(root, chapter.name).items()}
            spoken.append(chapter_notes(chapter, lesson, tasks, root))
            if with_slides:
                talk = copy.deepcopy(handout)
                heads = {line: note for line, note in _headed(talk.cells, mine).items()}
                talk.cells = slides.with_notes(talk.cells, heads)
                page = slides.to_slides(talk, chapter.title)
                texts[f"instructor/slides/{chapter.name}.slides.html"] = page
        if tasks:
            solved = nbformat.read(root / "solutions" / f"{chapter.name}.ipynb", 4)
            given = nbformat.read(root / "exercises" / f"{chapter.name}.ipynb", 4)
            texts[f"class/exercises/{chapter.name}.ipynb"] = _text(exercise_handout(given, tasks))
            for task in tasks:
                file = f"instructor/catch_up/{chapter.name}_{task.number}.py"
                texts[file] = solutions_up_to(solved, task.number)
    texts["instructor/notes.md"] = "\n".join(spoken)
    for name, text in texts.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, "utf-8")
    return [out / name for name in texts]


# The agenda


def agenda_text(agenda: Agenda) -> str:
    """The agenda in Markdown, one table a day."""
    graded = [s for s in agenda.sections if s.points]
    head = (
        f"# Agenda: {agenda.items[-1].end} of {agenda.minutes} minutes\n\n"
        f"{sum(s.minutes for s in graded)} minutes are exercises, worth "
        f"{sum(s.points for s in graded)} points. Behind? In a lesson: *Run > Run All Above "
        "Selected Cell*. In exercises: the catch-up cell below each check.\n"
    )
    rows: list[str] = []
    day = -1
    for item in agenda.items:
        if item.start // DAY != day:
            day = item.start // DAY
            if agenda.items[-1].end > DAY:
                rows.append(f"\n## Day {day + 1}\n")
            else:
                rows.append("")
            rows += ["| time | minutes | what |", "|---|---|---|"]
        rows.append(f"| {_clock(item.start % DAY)} | {item.minutes} | {_what(item.section)} |")
    return "\n".join([head, *rows, ""])


def _clock(minutes: int) -> str:
    return f"{minutes // 60}:{minutes % 60:02}"


def _what(section: Section | None) -> str:
    if section is None:
        return "*break*"
    if section.points:
        link = f"exercises/{section.notebook}.ipynb"
        points = f"{section.points} point{'s' * (section.points > 1)}"
        name = f"**exercise {section.number}:** {section.title} ({points})"
    else:
        link = f"notebooks/{section.notebook}.ipynb"
        name = f"{section.number}. {section.title}"
    return f"[{section.notebook.replace('_', ' ')}]({link}): {name}"


# What the class gets


def lesson_handout(chapter: Chapter, chosen: Sequence[Section]):
    """The lesson with its chosen sections; a catch-up cell stands in for what the others define."""
    cells, present = list(copy.deepcopy(chapter.head)), list(chapter.head)
    wanted = {section.number for section in chosen}
    passed = list(chapter.head)  # everything before this section in the whole lesson
    there = {cell.id for cell in present}
    for section in chapter.sections:
        if section.number in wanted:
            heading, *rest = copy.deepcopy(section.cells)
            missing = [passed[i] for i in cells_needed(passed, section.cells)]
            missing = [cell for cell in missing if cell.id not in there]
            cells.append(heading)
            if missing:
                cells.append(_catch_up_cell(missing, section))
                there |= {cell.id for cell in missing}
            cells += rest
            there |= {cell.id for cell in section.cells}
        passed += section.cells
    slides.stamp(cells)
    return nbformat.v4.new_notebook(cells=cells, metadata=copy.deepcopy(chapter.metadata))


def _catch_up_cell(missing: Sequence, section: Section):
    lines = ["%%capture", "# Catch-up: what this section needs from those that the class skips."]
    source = "\n".join([*lines, *(cell.source for cell in missing)])
    cell = nbformat.v4.new_code_cell(source, id=f"catch-up-{section.number}")
    cell.metadata.update(tags=["catch-up"], jupyter={"source_hidden": True})
    cell.metadata.slideshow = {"slide_type": "skip"}
    return cell


def exercise_handout(given, tasks: Sequence[Section]):
    """The exercise notebook with the chosen exercises, a catch-up cell below each check."""
    notebook = copy.deepcopy(given)
    head, groups = split(notebook.cells)
    wanted = {f"## {task.number}. {task.title} (": task for task in tasks}
    cells = list(head)
    for group in groups:
        first = group[0].source
        task = next((t for start, t in wanted.items() if first.startswith(start)), None)
        if task is not None:
            source = (
                f"# Behind? This loads the solutions of the exercises up to {task.number}, once "
                "they are handed out.\n"
                "from llmopt_lab.workshop.catch_up import catch_up\n\n"
                f'catch_up("{task.notebook}", {task.number})'
            )
            cell = nbformat.v4.new_code_cell(source, id=f"catch-up-{task.number}")
            cell.metadata.tags = ["catch-up"]
            cells += [*group, cell]
        elif not re.match(r"## \d+\. ", first):  # "Your score, and where to go"
            cells += group
    notebook.cells = cells
    return notebook


def solutions_up_to(solved, number: int) -> str:
    """The solved cells of the exercises 1 to `number`, as Python, marks cut out."""
    _, groups = split(solved.cells)
    parts = []
    for group in groups:
        found = re.match(r"## (\d+)\. ", group[0].source)
        if found and int(found[1]) <= number:
            code = [c.source for c in group if c.metadata.get("nbgrader", {}).get("solution")]
            parts += [MARKS.sub("", source + "\n") for source in code]
    return "\n\n".join(parts)


# What the instructor gets


def read_notes(root: Path, name: str) -> dict[int, str]:
    """The instructor's notes on a lesson: section -> Markdown. Empty where there are none."""
    file = root / "instructor" / f"{name}.md"
    if not file.exists():
        return {}
    _, *pieces = NOTE.split(file.read_text("utf-8"))
    return {int(n): text.strip() for n, text in zip(pieces[::2], pieces[1::2], strict=True)}


def notes_head(agenda: Agenda) -> str:
    lines = [
        "# Notes for the instructor",
        "",
        f"For {agenda.items[-1].end} minutes. Keep this folder to yourself: it has the answers.",
        "",
        "- **Before:** everyone opens `0_start_here.ipynb` and runs its first cell. "
        "`llmopt doctor` says what a machine lacks.",
        "- **Predictions:** wait until everyone has locked one in. The answers stand below.",
        "- **Catch-up:** when most have done exercise n, copy `catch_up/N_room_n.py` into the "
        "class's folder `catch_up`, beside `exercises`. Who is behind runs the catch-up cell.",
        "- **Grading:** `llmopt grade --exercises class/exercises SUBMISSIONS` takes the exercises "
        "of this agenda as the whole.",
        "",
    ]
    return "\n".join(lines)


def chapter_notes(
    chapter: Chapter, lesson: Sequence[Section], tasks: Sequence[Section], root: Path
) -> str:
    """Sections with minutes, our note and the predictions' answers; exercises with their hints."""
    written = read_notes(root, chapter.name)
    lines = [f"\n# {chapter.title}\n"]
    chosen = {section.number for section in lesson}
    skipped = [s for s in chapter.sections if s.number not in chosen]
    if skipped and chapter.name != START:
        lines.append(f"Skipped: {'; '.join(f'{s.number}. {s.title}' for s in skipped)}.\n")
    for section in lesson:
        lines.append(f"## {section.number}. {section.title}, {section.minutes} minutes\n")
        lines += [written[section.number], ""] if section.number in written else []
        for question, answer in predictions(section.cells):
            lines.append(f"- *Prediction:* {question} **{answer}**")
    for task in tasks:
        lines += [f"\n## Exercise {task.number}: {task.title}, {task.minutes} minutes\n"]
        places = sorted(task.needs)
        lines.append(f"Needs {', '.join(where(place, [chapter]) for place in places[-1:])}.")
        lines += [f"- *Hint {n}:* {hint}" for n, hint in enumerate(_hints(task), 1)]
    return "\n".join([*lines, ""])


def predictions(cells: Sequence) -> list[tuple[str, str]]:
    """(question, answer) of the predictions that know their answer, from their stored pictures."""
    found = []
    for cell in cells:
        for output in cell.get("outputs", ()):
            page = output.get("data", {}).get("text/html", "")
            asked = re.match(r"<p><strong>(.*?)</strong></p>", page)
            answer = re.search(r"<summary>The answer</summary><p>(.*?)</p>", page)
            if asked and answer:
                found.append((html.unescape(asked[1]), html.unescape(answer[1])))
    return found


def _hints(task: Section) -> tuple[str, ...]:
    from llmopt_lab.grading.checks import find_exercise

    checks = [c for c in task.cells if c.metadata.get("nbgrader", {}).get("grade")]
    found = re.search(r'check\(\s*"([\w.]+)"', checks[0].source) if checks else None
    return find_exercise(found[1]).hints if found else ()


def _headed(cells: Sequence, notes: dict[str, str]) -> dict[str, str]:
    """First line of a section's cell -> its note; `notes` has "## 3"."""
    lines = [c.source.partition("\n")[0] for c in cells if c.cell_type == "markdown"]
    return {
        line: note for line in lines for head, note in notes.items() if line.startswith(f"{head}.")
    }


def undefined_names(notebook) -> set[str]:
    """Names that some cell uses and no cell above it gives; empty if it runs as far as names go."""
    import builtins

    known, missing = {*vars(builtins), "get_ipython", "__file__"}, set()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            names = names_of(cell.source.replace("%%capture\n", ""))
            missing |= names.used - known
            known |= names.given
    return missing


def _text(notebook) -> str:
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"
