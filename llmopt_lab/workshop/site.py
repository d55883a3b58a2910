"""`llmopt site FOLDER`: the course as static pages in which the players still step and play.

Each lesson is run once, to collect the frames of its players, sliders included; the words, tables
and charts on its page are those stored in the notebook. A page needs neither a kernel nor a
network: `widgets.js` is the player's own code and the frames lie in the page.
"""

import argparse
import copy
import json
import posixpath
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import nbformat
from tqdm import tqdm

from llmopt_lab.badges import repository
from llmopt_lab.core.errors import Missing, require
from llmopt_lab.widgets import player
from llmopt_lab.widgets.looks import PLAYER_CSS
from llmopt_lab.workshop.frames import MIME

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WIDGETS = Path(player.__file__).parent
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\(([^)]*)\)")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)
MATH = re.compile(r"\$\$(.+?)\$\$|\$(?=\S)([^$]+?)(?<=\S)\$", re.S)
LINK = re.compile(r'href="(?!https?:)([\w./-]*?)\.ipynb(["#])')
FIGURES = '<div class="lm-static"><script type="application/json">{data}</script>{still}</div>'
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{up}site.css">
</head>
<body>
<a class="skip" href="#main">Skip to the text</a>
<header><nav aria-label="Pages"><ul>{links}</ul></nav></header>
<main id="main">
{body}
</main>
<script src="{up}widgets.js"></script>
</body>
</html>
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("rooms", nargs="*", help="only these lessons: moe ... (default: all)")


def run(args: argparse.Namespace) -> int:
    pages = site(args.out, rooms=args.rooms)
    print(f"{len(pages)} pages; open {args.out / 'index.html'}")
    return 0


def site(out: Path, root: Path = ROOT, rooms: Sequence[str] = ()) -> list[Path]:
    """Write the pages; return them. Cost: each lesson runs once, then its sliders: minutes.

    Raises:
        BadInput: `out` is not empty, or there is no such lesson.
        BuildError: a lesson does not run.
        Missing: nbconvert or latex2mathml is not installed.
    """
    require(
        not out.exists() or (out.is_dir() and not any(out.iterdir())),
        f"{out} is there and not empty: name a new folder",
    )
    names = [file.stem for file in sorted((root / "notebooks").glob("[0-9]_*.ipynb"))]
    known = {name.partition("_")[2]: name for name in names}
    for room in rooms:
        require(room in known, f"there is no lesson {room!r}; there are: {', '.join(known)}")
    chosen = [name for room, name in known.items() if not rooms or room in rooms]
    require(bool(chosen), f"no lessons in {root / 'notebooks'}")
    exercises = [name for name in chosen if (root / "exercises" / f"{name}.ipynb").exists()]
    notebooks = [f"notebooks/{name}" for name in chosen] + [f"exercises/{n}" for n in exercises]
    texts = {"site.css": _styles(), "widgets.js": scripts()}
    progress = tqdm(notebooks, unit="page", disable=None)
    for name in progress:
        progress.set_description(name)
        stored = nbformat.read(root / f"{name}.ipynb", 4)
        played = played_from(root / f"{name}.ipynb") if name.startswith("notebooks/") else None
        texts[f"{name}.html"] = page(stored, name, notebooks, played)
    texts["index.html"] = _index(notebooks, root)
    for name, text in texts.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, "utf-8")
    return [out / name for name in texts if name.endswith(".html")]


def played_from(path: Path) -> dict[str, list[dict]]:
    """Run a lesson; cell id -> the frames of the players that it shows, in order."""
    from llmopt_lab.build import execute

    notebook = nbformat.read(path, 4)
    first = nbformat.v4.new_code_cell(
        "from llmopt_lab.workshop.frames import keep\n\nkeep()", id="keep-frames"
    )
    notebook.cells.insert(0, first)
    execute(notebook, path.parent)
    found = {}
    for cell in notebook.cells:
        data = [o.data[MIME] for o in cell.get("outputs", ()) if MIME in o.get("data", {})]
        if data:
            found[cell.id] = data
    return found


def page(notebook, name: str, notebooks: Sequence[str], played: dict | None = None) -> str:
    """One page of HTML.

    Args:
        notebook: as stored.
        name: of this page, "notebooks/1_paged_attention".
        notebooks: names of all pages that there will be; links to others lead to the repository.
        played: from `played_from`; without it the players stay still pictures.
    """
    try:
        from nbconvert.exporters import HTMLExporter
    except ImportError as missing:
        raise Missing("a page needs nbconvert. Run: pip install nbconvert") from missing
    notebook = copy.deepcopy(notebook)
    slots: list[str] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_mathml(BADGE.sub(r"[Open in Colab](\1)", cell.source))
        else:
            _place_players(cell, (played or {}).get(cell.id, []), slots)
    exporter = HTMLExporter(template_name="basic")
    exporter.exclude_anchor_links = True
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    body, _ = exporter.from_notebook_node(notebook)
    for number, slot in enumerate(slots):
        body = body.replace(f"<p>lm-slot-{number}-</p>", slot)
    body = re.sub(r"<pre(?=[ >])", '<pre tabindex="0"', body)
    body = LINK.sub(lambda found: _link(found, name, set(notebooks)), body)
    title = next(
        (c.source.partition("\n")[0].lstrip("# ") for c in notebook.cells if c.source), name
    )
    return _page(title, body, name, notebooks)


def _link(found: re.Match, name: str, notebooks: set[str]) -> str:
    """A link to a notebook, to its page if there is one, else to the notebook in the repository."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(name), found[1]))
    if target in notebooks:
        return f'href="{found[1]}.html{found[2]}'
    return f'href="{repository()}/blob/main/{target}.ipynb{found[2]}'


def _place_players(cell, played: list[dict], slots: list[str]) -> None:
    """Put a mark where a player's still picture was; the picture stays for who has no scripts."""
    waiting = list(played)
    for output in cell.outputs:
        data = output.get("data", {})
        if "image/png" in data:
            alt = {"alt": "Chart drawn by the code above"}
            output.metadata["image/png"] = {**output.metadata.get("image/png", {}), **alt}
        still = data.get("text/html", "")
        if waiting and re.match(r"(Player|Explore)\(", data.get("text/plain", "")):
            frames = json.dumps(waiting.pop(0), separators=(",", ":")).replace("</", "<\\/")
            data["text/html"] = f"<p>lm-slot-{len(slots)}-</p>"
            slots.append(FIGURES.format(data=frames, still=still))


def with_mathml(text: str) -> str:
    """Markdown whose formulas are MathML, which browsers draw without help; code is left alone."""
    try:
        from latex2mathml.converter import convert
    except ImportError as missing:
        raise Missing("formulas need latex2mathml. Run: pip install latex2mathml") from missing

    def formula(found: re.Match) -> str:
        block = found[1] is not None
        return convert(found[1] or found[2], display="block" if block else "inline")

    parts = CODE.split(text)
    return "".join(part if CODE.fullmatch(part) else MATH.sub(formula, part) for part in parts)


def scripts() -> str:
    """The player's module as one plain script, which a page opened from a disk may load."""
    module = (WIDGETS / "page.js").read_text() + (WIDGETS / "player.js").read_text()
    body = module.replace("export default { render };", "const renderPlayer = render;")
    require(body != module, "player.js has no `export default { render };`: site.js needs it")
    return f"(() => {{\n{body}\n{(HERE / 'site.js').read_text()}}})();\n"


def _styles() -> str:
    from pygments.formatters import HtmlFormatter

    # xcode: the one style of pygments whose every colour stands out 4.5:1 from the code's ground
    colours = HtmlFormatter(style="xcode").get_style_defs(".highlight")
    page = (WIDGETS / "page.css").read_text()
    return "\n".join([page, PLAYER_CSS, colours, (HERE / "site.css").read_text()])


def _page(title: str, body: str, name: str, notebooks: Iterable[str]) -> str:
    up = "../" * name.count("/")
    links = [f'<li><a href="{up}index.html">All pages</a></li>']
    for other in notebooks:
        if other.startswith("notebooks/"):
            here = ' aria-current="page"' if other == name else ""
            text = other.partition("/")[2].replace("_", " ")
            links.append(f'<li><a href="{up}{other}.html"{here}>{escape(text)}</a></li>')
    return PAGE.format(title=escape(title), up=up, links="".join(links), body=body)


def _index(notebooks: Sequence[str], root: Path) -> str:
    rows = []
    for name in notebooks:
        if name.startswith("notebooks/"):
            first = nbformat.read(root / f"{name}.ipynb", 4).cells[0].source.partition("\n")[0]
            links = [f'<a href="{name}.html">{escape(first.lstrip("# "))}</a>']
            exercise = name.replace("notebooks/", "exercises/")
            if exercise in notebooks:
                links.append(f'(<a href="{exercise}.html">its exercises</a>)')
            rows.append(f"<li>{' '.join(links)}</li>")
    body = (
        "<h1>LLM Optimizations Lab</h1><p>The lessons as pages: the players step with their "
        "buttons and arrow keys, the sliders slide, nothing is installed and nothing is sent. To "
        "change the code, lock predictions in and do the exercises, open the notebooks.</p>"
        f"<ul>{''.join(rows)}</ul>"
    )
    return _page("LLM Optimizations Lab", body, "index", notebooks)
