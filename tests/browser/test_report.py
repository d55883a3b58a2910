"""The page about a class, in a browser: axe, light and dark, by keyboard, on a phone."""

import pytest

from llmopt_lab.grading import report
from llmopt_lab.grading.submissions import Score, Verdict

TITLES = {"demo.a": "1. Blocks", "demo.b": "2. Sums"}


def score(i: int) -> Score:
    verdicts = tuple(
        Verdict(f"demo.{x}", 2, 0, "no", f"a-mistake-with-a-long-name-{i}", "look.", "wrong")
        for x in "ab"
    )
    return Score(f"{i}.ipynb", verdicts, "", f"student {i}", "", f"{i % 2}_demo")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    broken = Score("x.ipynb", error="x.ipynb cannot be read", student="x", missing=("network",))
    path.write_text(report.page([*map(score, range(50)), broken], TITLES), "utf-8")
    return path


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_axe_finds_nothing_and_the_page_itself_does_not_scroll_sideways(
    chromium, file, scheme, width
):
    from axe_playwright_python.sync_playwright import Axe

    page = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(file.as_uri())
    found = Axe().run(page).response["violations"]
    assert [(v["id"], v["impact"]) for v in found] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


@pytest.mark.browser
def test_a_wide_table_is_reached_and_scrolled_by_keyboard(chromium, file):
    page = chromium.new_page(viewport={"width": 700, "height": 800})
    page.goto(file.as_uri())
    heat = page.get_by_role("region", name="Mistakes in 0_demo")
    for _ in range(12):
        page.keyboard.press("Tab")
        if heat.evaluate("e => e === document.activeElement"):
            break
    else:
        raise AssertionError("Tab does not reach the heat map")
    assert heat.evaluate("e => e.scrollWidth > e.clientWidth")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("e => e.scrollLeft > 0", arg=heat.element_handle())
    exercise = heat.get_by_role("rowheader", name="1. Blocks")
    assert exercise.bounding_box()["x"] >= heat.bounding_box()["x"]  # stays in sight
    page.close()
