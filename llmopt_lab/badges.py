"""`llmopt badges`: the chapter table of README.md, written from what is there.

The repository's address stands in one place, [project.urls] of pyproject.toml.
"""

import sys
import tomllib
from pathlib import Path

from llmopt_lab.core.errors import require

ROOT = Path(__file__).parents[1]
BEGIN = "<!-- chapters: written by `llmopt badges` -->"
END = "<!-- end of chapters -->"

# room, title, paper, its address; the order is that of the notebooks' numbers
CHAPTERS = (
    ("paged_attention", "Paged attention", "Kwon 2023", "https://arxiv.org/abs/2309.06180"),
    ("flash_attention", "Flash attention", "Dao 2022", "https://arxiv.org/abs/2205.14135"),
    ("moe", "Mixture of experts", "Shazeer 2017", "https://arxiv.org/abs/1701.06538"),
    ("quantization", "Quantization", "Frantar 2022", "https://arxiv.org/abs/2210.17323"),
    ("sparse_attention", "Sparse attention", "Yuan 2025", "https://arxiv.org/abs/2502.11089"),
    ("distillation", "Distillation", "Hinton 2015", "https://arxiv.org/abs/1503.02531"),
    (
        "speculative_decoding",
        "Speculative decoding",
        "Leviathan 2022",
        "https://arxiv.org/abs/2211.17192",
    ),
)


def repository(root: Path = ROOT) -> str:
    """The repository's address, as pyproject.toml gives it."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return project["urls"]["Repository"].removesuffix("/")


def colab_badge(notebook: str, address: str) -> str:
    """Markdown of the badge that opens `notebook`, a path from the repository's root, in Colab."""
    require(
        address.startswith("https://github.com/"),
        f"Colab opens notebooks from github.com; the repository's address is {address}",
    )
    where = address.removeprefix("https://github.com/")
    return (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/github/{where}/blob/main/{notebook})"
    )


def chapter_table(root: Path = ROOT) -> str:
    """One row a chapter, in Markdown; what does not exist yet is said to be not there yet."""
    address = repository(root)
    rows = [
        "| chapter | notebook | exercises | reference | kernel | paper |",
        "|---|---|---|---|---|---|",
    ]
    for number, (room, title, paper, link) in enumerate(CHAPTERS, start=1):
        cells = [f"{number}. {title}"]
        for file in (
            f"notebooks/{number}_{room}.ipynb",
            f"exercises/{number}_{room}.ipynb",
            f"llmopt_lab/{room}/reference.py",
            f"llmopt_lab/{room}/kernels.py",
        ):
            cell = f"[{Path(file).name}]({file})" if (root / file).exists() else "not there yet"
            if file.endswith(".ipynb") and (root / file).exists():
                cell = f"[open]({file}) {colab_badge(file, address)}"
            cells.append(cell)
        rows.append("| " + " | ".join([*cells, f"[{paper}]({link})"]) + " |")
    return "\n".join(rows)


def stamped(readme: str, root: Path = ROOT) -> str:
    """The text of README.md with a fresh chapter table between its two marks."""
    for mark in (BEGIN, END):
        require(
            readme.count(mark) == 1,
            f"README.md needs the line {mark} once, around its chapter table",
        )
    head, rest = readme.split(BEGIN)
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n{chapter_table(root)}\n{END}{tail}"


def run(check: bool, root: Path = ROOT) -> int:
    """Write README.md; with `check`, change nothing and return 1 if it would change."""
    path = root / "README.md"
    require(path.is_file(), f"no README.md in {root}: run this in a checkout of the repository")
    old = path.read_text()
    new = stamped(old, root)
    if check and new != old:
        print("README.md is out of date; run: llmopt badges", file=sys.stderr)
        return 1
    if new != old:
        path.write_text(new)
        print("README.md: chapter table written")
    return 0
