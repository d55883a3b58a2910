"""The agenda: what fits, what needs what, and what the class and the instructor get."""

import re
from pathlib import Path

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell

from llmopt_lab import cli
from llmopt_lab.core.errors import BadInput
from llmopt_lab.workshop import slides
from llmopt_lab.workshop.catch_up import catch_up
from llmopt_lab.workshop.course import START, cells_needed, names_of, read_course, split
from llmopt_lab.workshop.plan import AT_A_STRETCH, DAY, plan
from llmopt_lab.workshop.release import leaks, private_texts, public_lines
from llmopt_lab.workshop.syllabus import (
    agenda_text,
    lesson_handout,
    read_notes,
    undefined_names,
    write,
)

ROOT = Path(__file__).parents[1]
COURSE = read_course(ROOT)


def code(*sources: str) -> list:
    return [new_code_cell(source) for source in sources]


# Reading the course


def test_every_lesson_and_exercise_is_read_with_its_minutes():
    for chapter in COURSE:
        lesson = nbformat.read(ROOT / "notebooks" / f"{chapter.name}.ipynb", 4)
        text = "\n".join(c.source for c in lesson.cells if c.cell_type == "markdown")
        rows = re.findall(r"^\| (\d+)\. .* \| (\d+) \|$", text, re.M)  # the table of contents
        assert [(s.number, s.minutes) for s in chapter.sections] == [
            (int(n), int(minutes)) for n, minutes in rows
        ], chapter.name
        graded = [
            cell
            for task in chapter.exercises
            for cell in task.cells
            if cell.metadata.get("nbgrader", {}).get("grade")
        ]
        assert sum(t.points for t in chapter.exercises) == sum(
            cell.metadata.nbgrader.points for cell in graded
        )
    assert len(COURSE) >= 6 and COURSE[0].name == START


def test_prerequisites_are_read_from_the_sentences_in_the_notebooks():
    paged = next(c for c in COURSE if c.name == "1_paged_attention")
    base = {("1_paged_attention", n) for n in (1, 2, 3)}
    assert paged.exercises[0].needs == base
    kernel = paged.exercises[-1]
    assert "Triton" in kernel.title and kernel.needs == base | {("1_paged_attention", 5)}


def lesson(folder: Path, name: str, text: str) -> None:
    (folder / "notebooks").mkdir(exist_ok=True)
    cells = [new_markdown_cell(part) for part in text.split("\n---\n")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "notebooks" / f"{name}.ipynb")


def test_a_chapter_may_need_another_one_and_the_plan_takes_both(tmp_path):
    lesson(
        tmp_path,
        "1_one",
        "# 1. One\nafter section 1\n---\n## 1. A (5 minutes)\n\n## 2. B (7 minutes)",
    )
    needs = "Needs section 2 of chapter 1."
    lesson(tmp_path, "2_two", f"# 2. Two\nafter section 1\n{needs}\n---\n## 1. C (9 minutes)")
    course = read_course(tmp_path)
    agenda = plan(course, 60, ["two"])
    assert [s.title for s in agenda.sections] == ["B", "C"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# 1. One\n---\n## 1. A (5 minutes)", "after which of its 1 sections"),
        ("# 1. One\nafter section 3\n---\n## 1. A (5 minutes)", "after which of its 1 sections"),
        ("# 1. One\nafter section 1\n---\n## 1. A", "ends in its minutes"),
        ("# 1. One\nafter section 1\n---\n## A (5 minutes)", "ends in its minutes"),
        (
            "# 1. One\nafter section 1\n---\n## 1. A (5 minutes)\nNeeds section 1 of chapter 9.",
            "needs chapter 9",
        ),
    ],
)
def test_a_lesson_that_does_not_say_its_minutes_or_needs_is_named(text, message, tmp_path):
    lesson(tmp_path, "1_one", text)
    with pytest.raises(BadInput, match=message):
        read_course(tmp_path)
    with pytest.raises(BadInput, match="no lessons"):
        read_course(tmp_path / "notebooks")


def test_a_heading_inside_a_cell_begins_a_section_and_one_in_a_fence_does_not():
    head, parts = split(
        [new_markdown_cell("# T\n\ntext\n\n## 1. A\n\n```\n## no\n```\n\n## 2. B\nend"), *code("x")]
    )
    assert [cell.source for cell in head] == ["# T\n\ntext"]
    assert [part[0].source for part in parts] == ["## 1. A\n\n```\n## no\n```", "## 2. B\nend"]
    assert parts[1][1].source == "x" and len({c.id for p in parts for c in p}) == 3


# What code needs


@pytest.mark.parametrize(
    ("source", "given_", "used"),
    [
        ("x = a + 1", {"x"}, {"a"}),
        ("x += 1", {"x"}, {"x"}),
        ("x = 1\ny = x", {"x", "y"}, set()),
        ("def f(a):\n    return a + b + f(a)", {"f"}, {"b"}),
        ("class A(B):\n    x = c", {"A"}, {"B", "c"}),
        ("z = [i * k for i in n]", {"z"}, {"k", "n"}),
        ("for i in n:\n    s = i", {"i", "s"}, {"n"}),
        ("with f() as g:\n    g", {"g"}, {"f"}),
        ("if c:\n    x = 1", set(), {"c"}),
        ("if c:\n    x = 1\nelse:\n    x = 2", {"x"}, {"c"}),
        ("try:\n    import m\nexcept E as e:\n    print(e)", {"m"}, {"E", "print"}),
        ("cache.append(k)", set(), {"cache", "k"}),
        ("a.b[0] = c", set(), {"a", "c"}),
        ("from p import q as r", {"r"}, set()),
    ],
)
def test_names_that_a_cell_gives_and_uses(source, given_, used):
    names = names_of(source)
    assert names.given == given_
    assert names.used - {"E"} == used - {"E"}


def test_a_changed_name_needs_the_cell_that_made_it_and_the_cell_that_changed_it():
    before = code("a = []", "b = 2", "a.append(1)", "a2 = 3")
    assert cells_needed(before, code("print(a)")) == [0, 2]
    assert cells_needed(before, code("a = 1\nprint(a)")) == []
    assert cells_needed(code("x = 1", "x = 2"), code("x")) == [1]


# The plan


@settings(max_examples=8, deadline=None)
@given(st.integers(60, 2500))
def test_a_plan_keeps_its_minutes_its_needs_and_its_breaks(minutes):
    agenda = plan(COURSE, minutes)
    assert agenda.items[-1].end <= minutes
    taught, stretch, last = set(), 0, 0
    for item in agenda.items:
        assert item.start >= last
        stretch = 0 if item.section is None or item.start // DAY != (last - 1) // DAY else stretch
        last = item.end
        if item.section is None:
            continue
        assert item.section.needs <= taught, item
        assert item.start // DAY == (item.end - 1) // DAY, "a section does not cross a night"
        stretch += item.minutes
        assert stretch <= max(AT_A_STRETCH, item.minutes)
        taught.add(item.section.place if not item.section.points else None)
    assert len(set(agenda.sections)) == len(agenda.sections)
    for chapter in agenda.chapters[1:]:
        chosen = agenda.chosen(chapter.name)
        assert not chosen or set(chapter.core) <= set(chosen), "a chapter's core is taught whole"


def test_more_minutes_bring_more_and_enough_of_them_everything():
    sizes = [len(plan(COURSE, minutes).sections) for minutes in (90, 240, 960, 10_000)]
    assert sizes == sorted(set(sizes))
    everything = [s for c in COURSE for s in (*c.sections, *c.exercises)]
    assert sizes[-1] == len(everything)


def test_a_short_workshop_does_one_chapter_with_its_hands():
    agenda = plan(COURSE, 90)
    chapters = {s.notebook for s in agenda.sections}
    assert chapters == {START, "1_paged_attention"}
    assert sum(s.minutes for s in agenda.sections if s.points) >= 15


def test_impossible_wishes_are_refused_with_what_is_possible():
    with pytest.raises(BadInput, match="20 minutes are too few: 1. Paged attention takes"):
        plan(COURSE, 20)
    with pytest.raises(BadInput, match="there is no chapter 'kv'; there are: paged_attention"):
        plan(COURSE, 90, ["kv"])


def test_the_agenda_names_days_breaks_and_points():
    text = agenda_text(plan(COURSE, 960))
    assert "## Day 1" in text and "## Day 2" in text and "*break*" in text
    assert text.count("| 0:00 |") == 2 and "(2 points)" in text
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / target).exists(), target


# What is written


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("syllabus") / "out"
    write(plan(COURSE, 240, ["flash_attention"]), out, with_slides=False)
    return out


def test_a_lesson_without_some_sections_still_has_every_name_it_uses(written):
    for agenda in (plan(COURSE, minutes) for minutes in (700,)):
        for chapter in COURSE:
            if chosen := agenda.chosen(chapter.name):
                handout = lesson_handout(chapter, chosen)
                assert undefined_names(handout) == set(), chapter.name
    short = plan(COURSE, 110, ["quantization"])  # its last section uses what section 4 makes
    chapter = next(c for c in COURSE if c.name == "4_quantization")
    handout = lesson_handout(chapter, short.chosen(chapter.name))
    catching = [c for c in handout.cells if "catch-up" in c.metadata.get("tags", ())]
    assert catching and all(c.source.startswith("%%capture\n") for c in catching)
    broken = [c for c in handout.cells if c not in catching]
    assert undefined_names(nbformat.v4.new_notebook(cells=broken)), "nothing needed catching up"


def test_the_class_gets_no_solution_and_the_instructor_one_file_an_exercise(written):
    given_out = {
        str(path.relative_to(written / "class")): path.read_bytes()
        for path in (written / "class").rglob("*")
        if path.is_file()
    }
    assert list(leaks(given_out, private_texts(ROOT), public_lines(ROOT))) == []
    tasks = nbformat.read(written / "class/exercises/2_flash_attention.ipynb", 4)
    numbers = [int(n) for n in re.findall(r'catch_up\("2_flash_attention", (\d+)\)', str(tasks))]
    files = sorted((written / "instructor/catch_up").iterdir())
    assert {f.name for f in files} == {f"2_flash_attention_{n}.py" for n in numbers}
    assert len(numbers) >= 2
    for file in files:
        assert "SOLUTION" not in file.read_text() and "NotImplementedError" not in file.read_text()
        compile(file.read_text(), str(file), "exec")


def test_the_class_can_grade_what_it_got(written):
    """The exercises of the agenda are a whole of their own for `llmopt grade --exercises`."""
    tasks = nbformat.read(written / "class/exercises/2_flash_attention.ipynb", 4)
    graded = [c for c in tasks.cells if c.metadata.get("nbgrader", {}).get("grade")]
    assert len(graded) == len(
        plan(COURSE, 240, ["flash_attention"]).chosen("2_flash_attention", True)
    )
    assert all(cell.metadata.nbgrader.locked for cell in graded)


def test_the_notes_hold_answers_hints_and_what_was_written_for_the_section(written):
    notes = (written / "instructor/notes.md").read_text()
    assert "**3.88 times.**" in notes or "*Prediction:*" in notes
    assert "*Hint 1:*" in notes and "Stop at 129 tokens" in notes
    assert "Needs section 5 of 2. Flash attention" in notes


def test_every_note_belongs_to_a_section_that_there_is():
    sections = {s.place for c in COURSE for s in c.sections}
    noted = {c.name: read_notes(ROOT, c.name) for c in COURSE}
    for name, notes in noted.items():
        assert len(notes) >= 3, f"instructor/{name}.md"
        assert {(name, n) for n in notes} <= sections and all(notes.values())


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(BadInput, match="not empty"):
        write(plan(COURSE, 90), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


# Catching up


def test_catching_up_loads_the_handed_out_functions_and_says_which(tmp_path, monkeypatch, capsys):
    (tmp_path / "catch_up").mkdir()
    (tmp_path / "exercises").mkdir()
    monkeypatch.chdir(tmp_path / "exercises")
    space = {"f": None}
    catch_up("1_demo", 2, space)
    assert "Not handed out yet: 1_demo_2.py" in capsys.readouterr().out and space["f"] is None
    (tmp_path / "catch_up/1_demo_2.py").write_text(
        "def f(x):\n    return g(x)\n\ndef g(x):\n    return x + 1\n"
    )
    catch_up("1_demo", 2, space)
    assert "exercise 2: f, g." in capsys.readouterr().out and space["f"](1) == 2


@pytest.mark.parametrize(("name", "number"), [("../secret", 1), ("1_demo", 0), ("demo", 1)])
def test_catching_up_reads_no_other_file(name, number):
    with pytest.raises(BadInput, match="a notebook's name and an exercise's number"):
        catch_up(name, number)


# Slides


def test_slides_follow_the_rule_and_a_cells_own_wish_wins():
    shown = new_code_cell("plot()", outputs=[nbformat.v4.new_output("stream", text="1")])
    own = new_markdown_cell("## mine", metadata={"slideshow": {"slide_type": "skip"}})
    cells = [
        new_markdown_cell("## 2. The idea"), new_markdown_cell("text"), shown,
        new_markdown_cell("**A claim.**"), *code("x = 1", "class A: pass"), own,
    ]  # fmt: skip
    slides.stamp(cells)
    types = [cell.metadata["slideshow"]["slide_type"] for cell in cells]
    assert types == ["slide", "-", "-", "subslide", "skip", "subslide", "skip"]
    assert slides.HIDE_INPUT in shown.metadata.tags


def test_slides_are_nbconverts_with_the_notes_for_the_speaker():
    cells = [new_markdown_cell("## 1. A\n\nhello"), new_markdown_cell("more")]
    slides.stamp(cells)
    spoken = slides.with_notes(cells, {"## 1. A": "ask them"})
    page = slides.to_slides(nbformat.v4.new_notebook(cells=spoken), "A lesson")
    assert "reveal" in page and '<aside class="notes">' in page and "ask them" in page
    assert "<title>A lesson" in page


def test_the_command_prints_the_agenda(capsys):
    assert cli.main(["syllabus", "--minutes", "90"]) == 0
    assert "| time | minutes | what |" in capsys.readouterr().out
    assert cli.main(["syllabus", "--minutes", "5"]) == 2
    assert "llmopt: 5 minutes are too few" in capsys.readouterr().err
