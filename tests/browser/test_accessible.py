"""axe on every widget, alone on a page with its own script and first state, light and dark.

Contrast, names, roles, order. JupyterLab around it is not ours; test_player.py and its siblings
press the keys there.
"""

import json

import nbformat
import pytest
import torch

from llmopt_lab.core.errors import require
from llmopt_lab.widgets.complete import Complete
from llmopt_lab.widgets.paint import Cost, Paint
from llmopt_lab.widgets.panels import Bar, Bars, Cell, Frame, Grid, Meter
from llmopt_lab.widgets.player import Player
from llmopt_lab.widgets.predict import Predict
from llmopt_lab.widgets.slider import Slider

pytestmark = pytest.mark.browser

PAGE = """<!doctype html><html lang="en"><head><title>A widget</title><style>
body {{ background: {ground}; color: {ink}; font: 16px sans-serif; }} {css}</style></head><body>
<main><h1>A lesson</h1><h2>A section</h2><div id="here"></div></main>
<script type="module">{esm_as_constant}
const values = {state}, heard = {{}};
const model = {{
  get: (name) => values[name],
  set(name, value) {{ values[name] = value; (heard["change:" + name] ?? []).forEach((f) => f()); }},
  save_changes() {{}},
  on(name, f) {{ (heard[name] ??= []).push(f); }},
  off() {{}},
  send() {{}},
}};
window.model = model;
(widget.render ?? widget)({{ model, el: document.getElementById("here") }});
</script></body></html>"""
THEMES = {"light": ("#ffffff", "#1b1f24"), "dark": ("#111111", "#e9eef3")}


def frames(n: int) -> list[Frame]:
    cells = ("active", "new", "shared", "bad", "good", "cached", "idle", "owner3")
    rows = (tuple(Cell(str(i), tone) for i, tone in enumerate(cells)),)
    return [
        Frame(
            f"step {i}",
            (
                Grid("cells", ("a",), rows),
                Bars("b", (Bar("x", i, "good"),), "", 9.0),
                Meter("m", i, "n"),
            ),
            file=__file__,
            line=45,
        )
        for i in range(n)
    ]


def next_token(tokens: list[int]) -> torch.Tensor:
    p = torch.arange(1.0, 13.0)
    return p / p.sum()


def a_paint() -> Paint:
    allowed = torch.ones(4, 4).tril().bool()
    shares = allowed / allowed.sum(1, keepdim=True)
    return Paint(
        {"head 0": shares},
        [Cost("bytes moved", "bytes", allowed * 64)],
        allowed=allowed,
        presets={"window": allowed.triu(-1)},
        row_labels=[f"q {i}" for i in range(4)],
        column_labels=[f"k {i}" for i in range(4)],
    )


def locked() -> Predict:
    question = Predict("How many bytes?", answer=4, unit="bytes", explain="Two times two.")
    question.lock(5)
    return question


WIDGETS = {
    "player": lambda: Player(frames(4), title="A run", note="Read this first."),
    "player of two runs": lambda: Player(frames(4), frames(3), title="Two runs"),
    "question with a number": lambda: Predict("How many bytes?", answer=4, unit="bytes"),
    "question with choices": lambda: Predict("Which?", choices=("one", "two"), answer="one"),
    "question answered": locked,
    "completion": lambda: Complete(
        next_token, lambda t: [1, 2], lambda ts: "ab" * len(ts), prompt="x"
    ),
    "painted mask": a_paint,
    "slider": lambda: Slider("how many", (2, 3, 4), 3),
}


def page_of(widget, theme: str) -> str:
    ground, ink = THEMES[theme]
    state = {
        n: getattr(widget, n) for n in widget.trait_names(sync=True) if n not in ("layout", "comm")
    }
    esm = str(widget._esm).replace("export default", "const widget =")
    require("const widget =" in esm, "a widget's module ends in `export default`")
    return PAGE.format(
        ground=ground,
        ink=ink,
        css=str(widget._css),
        esm_as_constant=esm,
        state=json.dumps(state, default=str).replace("</", "<\\/"),
    )


@pytest.fixture(scope="module")
def offline_page(chromium):
    context = chromium.new_context(viewport={"width": 1280, "height": 1000}, offline=True)
    page = context.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    yield page
    context.close()


@pytest.fixture
def shown(offline_page):
    """A function that opens one widget, in a window of its own; the page keeps the errors."""
    page = offline_page
    page.goto("about:blank")
    page.errors.clear()

    def show(name, theme="light"):
        page.set_content(page_of(WIDGETS[name](), theme))
        page.locator("#here > *").first.wait_for()
        assert page.errors == []
        return page

    return show


def violations(page) -> list[tuple]:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        (
            v["id"],
            v["impact"],
            [(n["html"][:160], n["failureSummary"][:400]) for n in v["nodes"]][:3],
        )
        for v in found
    ]


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", WIDGETS)
def test_axe_finds_nothing_in_a_widget(name, theme, shown):
    assert violations(shown(name, theme)) == []


def test_axe_would_find_a_button_without_a_name(shown):
    page = shown("player")
    page.evaluate("document.querySelector('.lm-play').removeAttribute('aria-label')")
    page.evaluate("document.querySelector('.lm-play').removeAttribute('title')")
    assert [v[0] for v in violations(page)] == ["button-name"]


@pytest.mark.parametrize("name", WIDGETS)
def test_tab_reaches_every_control_and_leaves_again(name, shown):
    page = shown(name)
    controls = page.locator(
        "#here button:not(:disabled), #here input:not(:disabled), #here select, #here textarea"
    )
    wanted = {
        control.evaluate("node => node.type == 'radio' ? 'radio ' + node.name : node.outerHTML")
        for control in controls.all()
        if control.evaluate("node => node.tabIndex >= 0")
    }
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        here = page.evaluate(
            """() => { const node = document.activeElement;
            return node === document.body ? null
              : node.type == 'radio' ? 'radio ' + node.name : node.outerHTML; }"""
        )
        if here is None and seen:
            break
        seen.add(here)
    else:
        raise AssertionError("Tab does not leave the widget")
    assert wanted <= seen, wanted - seen


SLIDERS = """
from llmopt_lab.widgets.explore import Choice, Explore
from llmopt_lab.widgets.panels import Bar, Bars, Frame
from llmopt_lab.widgets.player import Player

def make(n):
    bars = [Bars("b", (Bar("x", i, "good"),), "", 9.0) for i in range(n)]
    return Player([Frame(f"{i + 1} of {n}", (bar,)) for i, bar in enumerate(bars)])

Explore(make, n=Choice("how many", (2, 3, 4), 3))
"""


def test_axe_finds_nothing_in_sliders_over_a_player_in_jupyterlab(open_lab):
    from axe_playwright_python.sync_playwright import Axe

    cells = [nbformat.v4.new_code_cell(SLIDERS)]
    lab = open_lab(nbformat.v4.new_notebook(cells=cells))
    lab.run_all()
    lab.page.locator(".lm-player").wait_for()
    lab.page.get_by_label("how many").focus()
    lab.page.keyboard.press("ArrowRight")
    lab.page.locator(".lm-counter", has_text="step 1 of 4").wait_for()
    lab.page.keyboard.press("a")  # would insert a cell if JupyterLab heard it
    assert lab.n_cells() == 1 and lab.page.get_by_label("how many").input_value() == "2"
    found = Axe().run(lab.page, context=".jp-OutputArea-output").response["violations"]
    assert [(v["id"], v["impact"], v["nodes"][0]["html"]) for v in found] == []
