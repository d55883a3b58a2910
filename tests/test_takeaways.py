"""Notebook 0's takeaways: numbers from records, each linked to a cell that is there."""

import json
import re
from pathlib import Path

import nbformat
import pytest

from llmopt_lab import takeaways as notes
from llmopt_lab.badges import CHAPTERS

ROOT = Path(__file__).parents[1]
FOUND = notes.takeaways()
each = pytest.mark.parametrize("takeaway", FOUND, ids=lambda t: t.room)


def test_there_is_one_for_each_chapter_in_the_guides_order():
    assert [t.room for t in FOUND] == [room for room, *_ in CHAPTERS]
    assert [t.chapter for t in FOUND] == [1, 2, 3, 4, 5, 6, 7]
    assert all(re.search(r"\d", t.measured) and t.measured.endswith(".") for t in FOUND)


@each
def test_its_link_leads_to_a_cell_that_measured_something(takeaway):
    name, _, anchor = takeaway.lesson.partition("#cell-id=")
    lesson = nbformat.read(ROOT / "notebooks" / name, 4)
    cells = [cell for cell in lesson.cells if cell.id == anchor]
    assert len(cells) == 1, f"{name} needs one cell with the id {anchor!r}"
    assert cells[0].cell_type == "code"
    assert any(re.search(r"\d", output.get("text", "")) for output in cells[0].outputs)


def test_the_table_stored_in_notebook_0_is_the_one_that_the_records_give_now():
    start = nbformat.read(ROOT / "notebooks/0_start_here.ipynb", 4)
    tables = [
        output.data["text/markdown"]
        for cell in start.cells
        for output in cell.get("outputs", ())
        if "text/markdown" in output.get("data", {})
    ]
    assert tables == [notes.as_markdown(FOUND)]


def test_lesson_1_says_the_same_about_its_workload():
    """The one takeaway that is computed, not recorded: it has the numbers of the lesson's cell."""
    lesson = nbformat.read(ROOT / "notebooks/1_paged_attention.ipynb", 4)
    cell = next(cell for cell in lesson.cells if cell.id == "takeaway")
    rows = {line[:26].strip(): line[26:].split() for line in cell.outputs[0].text.splitlines()}
    blocks, reserved = rows["blocks of 16"], rows["contiguous, reserve 2,048"]
    said = FOUND[0].measured
    assert f"{blocks[0]} requests run at a time instead of {reserved[0]}" in said
    assert f"{blocks[1]} of the reserved slots" in said and f"instead of {reserved[1]}" in said


def test_a_changed_record_changes_the_sentence(monkeypatch):
    record = json.loads((ROOT / "llmopt_lab/distillation/results/students.json").read_text())
    run = record["runs"]["lab-student"]["distilled"]
    run["held_out"]["text"]["accuracy"] = run["held_out"]["text"]["teacher_accuracy"] / 2
    monkeypatch.setattr(notes, "_measured", lambda room, file: record)
    assert "50.0% as often right" in notes._distillation()


def test_notebook_0_links_every_lesson_every_exercise_and_a_paper_a_chapter():
    start = nbformat.read(ROOT / "notebooks/0_start_here.ipynb", 4)
    text = "\n".join(cell.source for cell in start.cells if cell.cell_type == "markdown")
    targets = {t.partition("#")[0] for t in re.findall(r"\]\(([^)]+)\)", text) if "://" not in t}
    for number, (room, *_) in enumerate(CHAPTERS, 1):
        assert (
            f"{number}_{room}.ipynb" in targets and f"../exercises/{number}_{room}.ipynb" in targets
        )
        row = re.search(rf"^\| {number} \| (.*arxiv.*) \|$", text, re.M)
        assert row, f"chapter {number} has no reference"
    missing = [t for t in targets if not (ROOT / "notebooks" / t).exists()]
    assert missing == []
    for _, _, _, paper in CHAPTERS:
        assert paper in text, paper
