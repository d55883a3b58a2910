"""Slides of a lesson, by nbconvert, from the slide metadata of its notebook.

A cell's own `slideshow` metadata wins. The others follow a rule: a section's heading begins a
slide; a claim of the guide or a question to the class begins the next one below it; what follows
is on the same slide. The set-up, and code that neither shows nor defines anything, are left out.
"""

import re
from collections.abc import Mapping, Sequence

import nbformat

from llmopt_lab.core.errors import Missing

BEGINS_A_SLIDE = ("# ", "## ")
BEGINS_ONE_BELOW = ("**", "*Only the picture", "| ")
DEFINES = re.compile(r"^(class|def) ", re.M)
HIDE_INPUT = "slide-output-only"


def stamp(cells: Sequence) -> None:
    """Give each cell a slide type unless it has one; hide the code of cells that show something."""
    for cell in cells:
        shows = cell.cell_type == "code" and bool(cell.outputs)
        if shows:
            tags = cell.metadata.setdefault("tags", [])
            if HIDE_INPUT not in tags:
                tags.append(HIDE_INPUT)
        cell.metadata.setdefault("slideshow", {}).setdefault("slide_type", _slide_type(cell, shows))


def _slide_type(cell, shows: bool) -> str:
    text = cell.source
    if cell.cell_type == "markdown":
        if text.startswith(BEGINS_A_SLIDE):
            return "slide"
        return "subslide" if text.startswith(BEGINS_ONE_BELOW) else "-"
    if "setup" in cell.metadata.get("tags", ()):
        return "skip"
    return "-" if shows else "subslide" if DEFINES.search(text) else "skip"


def with_notes(cells: Sequence, notes: Mapping[str, str]) -> list:
    """The cells, and after a section's first cell its note, for the speaker's eyes (key `s`).

    `notes`: first line of the section -> Markdown.
    """
    spoken = []
    for cell in cells:
        spoken.append(cell)
        first = cell.source.partition("\n")[0]
        if cell.cell_type == "markdown" and first in notes:
            note = nbformat.v4.new_markdown_cell(notes[first], id=f"{cell.id}-note")
            note.metadata.slideshow = {"slide_type": "notes"}
            spoken.append(note)
    return spoken


def to_slides(notebook, title: str) -> str:
    """One HTML page. It fetches reveal.js and MathJax when it is opened."""
    try:
        from nbconvert.exporters import SlidesExporter
        from traitlets.config import Config
    except ImportError as missing:
        raise Missing("slides need nbconvert. Run: pip install nbconvert") from missing
    config = Config()
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_input_tags = {HIDE_INPUT}
    exporter = SlidesExporter(config=config)
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    exporter.reveal_scroll = True
    return exporter.from_notebook_node(notebook, {"metadata": {"name": title}})[0]
