"""The static pages, opened from a disk without a network: they play by keyboard and pass axe."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from llmopt_lab.build import KERNELSPEC
from llmopt_lab.workshop import site as pages

pytestmark = pytest.mark.browser

PLAYS = """
from llmopt_lab.core.errors import require
from llmopt_lab.widgets.explore import Choice, Explore
from llmopt_lab.widgets.panels import Bar, Bars, Frame
from llmopt_lab.widgets.player import Player
from llmopt_lab.widgets.predict import Predict


def count(n):
    require(n != 3, "three is not allowed here")
    bars = [Bars("counted", (Bar("i", i, "good"),), "", 10.0) for i in range(n)]
    return Player([Frame(f"{i + 1} of {n}", (bar,)) for i, bar in enumerate(bars)])


print("before")
count(5)
"""
SLIDES = 'Explore(count, n=Choice("how many", (2, 3, 4), 4))'
ASKS = 'Predict("How many?", answer=7, explain="Count them.")'


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A course of one lesson, and its pages."""
    root = tmp_path_factory.mktemp("site") / "course"
    for folder in ("notebooks", "exercises"):
        (root / folder).mkdir(parents=True)
    (root / "pyproject.toml").write_text(
        '[project]\nname = "llmopt_lab"\n[project.urls]\nRepository = "https://github.com/a/b"\n'
    )
    text = (
        "# 1. A lesson\n[![Open in Colab](https://colab.research.google.com/x.svg)](https://c.org)\n"
        "Let $e^{s-m}$ be. See `$x$`, [it](../exercises/1_demo.ipynb) and [2](2_gone.ipynb#a)."
    )
    cells = [new_markdown_cell(text), *map(new_code_cell, (PLAYS, SLIDES, ASKS))]
    notebook = new_notebook(cells=cells, metadata={"kernelspec": KERNELSPEC})
    from llmopt_lab.build import execute

    execute(notebook, root / "notebooks")
    nbformat.write(notebook, root / "notebooks/1_demo.ipynb")
    task = new_notebook(
        cells=[new_markdown_cell("# Exercises\n\n## 1. Do"), new_code_cell("x = 1")]
    )
    nbformat.write(task, root / "exercises/1_demo.ipynb")
    out = root.parent / "pages"
    pages.site(out, root)
    return out


@pytest.fixture
def offline(chromium, built):
    """A function that opens a page without a network; its requests and errors are kept."""
    context = chromium.new_context(viewport={"width": 1200, "height": 1000}, offline=True)
    page = context.new_page()
    page.asked, page.errors = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda said: said.type == "error" and page.errors.append(said.text))

    def open_page(name):
        page.goto((built / name).as_uri())
        return page

    yield open_page
    context.close()


def test_a_player_steps_and_plays_without_kernel_and_network(offline, tmp_path):
    page = offline("notebooks/1_demo.html")
    player = page.locator(".lm-player").first
    counter = player.locator(".lm-counter")
    assert counter.inner_text() == "step 1 of 5"
    for _ in range(30):  # the keyboard alone: Tab from the top of the page to the slider
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.type") == "range":
            break
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert counter.inner_text() == "step 3 of 5"
    assert player.locator(".lm-caption").last.inner_text() == "3 of 5"
    page.keyboard.press("Home")
    player.locator("select").select_option("120")
    player.get_by_role("button", name="play").press("Enter")
    page.wait_for_function("document.querySelector('.lm-counter').textContent == 'step 5 of 5'")
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert page.errors == []
    assert {url.partition(":")[0] for url in page.asked} <= {"file", "data"}


def test_sliders_slide_and_a_refusal_is_said_in_words(offline):
    page = offline("notebooks/1_demo.html")
    place = page.locator(".lm-static", has=page.locator(".lm-static-slider"))
    assert place.locator(".lm-counter").inner_text() == "step 1 of 4"
    slider = place.get_by_label("how many")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert (
        place.locator(".lm-static-note").inner_text() == "Not possible: three is not allowed here"
    )
    page.keyboard.press("ArrowLeft")
    assert place.locator(".lm-counter").inner_text() == "step 1 of 2"
    assert slider.get_attribute("aria-valuetext") == "2" and page.errors == []


def test_words_outputs_formulas_and_answers_are_on_the_page(offline):
    page = offline("notebooks/1_demo.html")
    assert page.locator("math").count() == 1 and page.get_by_text("$x$").count() == 1
    assert page.locator(".output_area", has_text="before").count() == 1
    page.get_by_text("The answer").click()
    assert page.get_by_text("7. Count them.").is_visible()
    assert page.get_by_role("link", name="Open in Colab").get_attribute("href") == "https://c.org"
    gone = page.get_by_role("link", name="2", exact=True).get_attribute("href")
    assert gone.endswith("/blob/main/notebooks/2_gone.ipynb#a") and gone.startswith("https://")
    page.get_by_role("link", name="it", exact=True).click()
    assert (
        page.url.endswith("exercises/1_demo.html")
        and page.locator("h1").inner_text() == "Exercises"
    )


@pytest.mark.parametrize("name", ["index.html", "notebooks/1_demo.html", "exercises/1_demo.html"])
def test_axe_finds_nothing_serious_on_the_pages(name, offline):
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(offline(name)).response["violations"]
    serious = [v["id"] for v in found if v["impact"] in ("serious", "critical")]
    assert serious == [], found


def test_without_scripts_the_still_pictures_and_all_steps_in_words_are_there(chromium, built):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((built / "notebooks/1_demo.html").as_uri())
    assert (
        page.locator("figure img").count() == 2
        and page.get_by_text("All steps in words").count() == 2
    )
    context.close()


def test_a_folder_in_use_and_a_lesson_that_is_not_there_are_refused(tmp_path):
    from llmopt_lab.core.errors import BadInput

    with pytest.raises(BadInput, match="there is no lesson 'kv'"):
        pages.site(tmp_path / "new", rooms=["kv"])
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(BadInput, match="not empty"):
        pages.site(tmp_path)
