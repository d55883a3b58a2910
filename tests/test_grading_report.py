"""What grading leaves behind: gradebooks, JUnit, the page (browser/test_report.py looks at it)."""

import csv
import json
import xml.etree.ElementTree as ET

from llmopt_lab.grading import report
from llmopt_lab.grading.submissions import Score, Verdict

TITLES = {"demo.a": "1. Blocks", "demo.b": "2. Sums"}
EVIL = '<img src=x onerror="alert(1)">'


def verdict(name: str, earned: int, misconception: str = "", outcome: str = "wrong") -> Verdict:
    if earned:
        return Verdict(f"demo.{name}", earned, earned)
    hint = f"look at {misconception}."
    return Verdict(f"demo.{name}", 2, 0, f"no: {misconception}", misconception, hint, outcome)


def score(student: str, *verdicts: Verdict, number: str = "", **more) -> Score:
    return Score(f"{student}.ipynb", verdicts, "", student, number, "0_demo", **more)


PLAN = {"plan": {"demo.a": 5, "demo.b": 10}}
SCORES = [
    score("ada", verdict("a", 2), verdict("b", 2), number="17", minutes={"demo.a": 4.0}, **PLAN),
    score("bob", verdict("a", 2), verdict("b", 0, "adds-odd"), minutes={"demo.a": 9.0}, **PLAN),
    score("bob", verdict("a", 0, "wrong-type"), verdict("b", 0, "adds-odd"), **PLAN),
    score("cyd", verdict("a", 0, "", "stopped"), verdict("b", 0, "adds-odd"), **PLAN),
    score(EVIL, verdict("a", 2), verdict("b", 0, "not-written", "not-written"), **PLAN),
    score(
        "=1+1", verdict("a", 2), verdict("b", 0, "returns-nothing"), missing=("network",), **PLAN
    ),
    Score("x.ipynb", error="x.ipynb cannot be read as JSON\x00\ud800", student="dot"),
]  # fmt: skip


def test_the_gradebook_has_one_row_a_student_and_the_better_of_two_notebooks(tmp_path):
    report.write_csv(SCORES, tmp_path / "scores.csv")
    rows = {r["Student"]: r for r in csv.DictReader((tmp_path / "scores.csv").open())}
    assert sorted(rows) == sorted([EVIL, "'=1+1", "ada", "bob", "cyd", "dot"])
    assert rows["ada"] | {"ID": "17", "0_demo": "4", "Total": "4"} == rows["ada"]
    assert (rows["bob"]["0_demo"], rows["bob"]["demo.a"], rows["bob"]["demo.b"]) == ("2", "2", "0")
    assert rows["dot"]["0_demo"] == "" and "cannot be read" in rows["dot"]["Feedback"]
    assert {r["Points possible"] for r in rows.values()} == {"4"}


def test_a_name_that_is_a_formula_is_none_in_a_spreadsheet(tmp_path):
    report.write_csv(SCORES, tmp_path / "scores.csv")
    students = [r["Student"] for r in csv.DictReader((tmp_path / "scores.csv").open())]
    assert "'=1+1" in students and "=1+1" not in students


def test_canvas_gets_its_columns_and_its_row_of_possible_points(tmp_path):
    report.write_canvas(SCORES, tmp_path / "canvas.csv")
    head, possible, *rows = csv.reader((tmp_path / "canvas.csv").open())
    assert head == ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", "0_demo"]
    assert possible == ["    Points Possible", "", "", "", "", "4"]
    assert ["ada", "17", "", "", "", "4"] in rows and ["bob", "", "", "bob", "", "2"] in rows


def test_json_and_junit_have_every_verdict_and_survive_what_xml_forbids(tmp_path):
    report.write_all(SCORES, tmp_path, TITLES)
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert [(row["earned"], row["points"]) for row in rows][:2] == [(4, 4), (2, 4)]
    suites = ET.parse(tmp_path / "scores.xml").getroot()
    assert [s.get("errors") for s in suites] == ["0"] * 6 + ["1"]
    case = suites[1].find("testcase[@name='demo.b']")
    properties = {p.get("name"): p.get("value") for p in case.find("properties")}
    assert properties["points"] == "2" and properties["earned"] == "0"
    assert properties["misconception"] == "adds-odd"
    assert case.find("failure").get("message") == "no: adds-odd"


def test_the_section_to_teach_again_is_where_most_who_tried_were_wrong():
    a, b = report.classes_of(SCORES, TITLES)["0_demo"]
    assert (a.n, a.n_done, a.n_tried, a.mistakes) == (5, 4, 5, {"did-not-finish": 1})
    assert (b.n, b.n_done, b.n_tried) == (5, 1, 4)
    assert b.mistakes == {"adds-odd": 2, "not-written": 1, "returns-nothing": 1}
    assert report.to_teach_again([a, b]) is b and b.hint == "look at adds-odd."
    assert report.to_teach_again([]) is None


def test_minutes_are_the_median_of_those_that_were_recorded():
    a, b = report.classes_of(SCORES, TITLES)["0_demo"]
    assert (a.minutes, a.n_timed, a.planned) == (6.5, 2, 5)
    assert (b.minutes, b.n_timed, b.planned) == (None, 0, 10)


def test_the_page_needs_nothing_from_outside_and_runs_nothing():
    page = report.page(SCORES, TITLES)
    assert EVIL not in page and "&lt;img" in page
    for word in ("<script", "http:", "https:", "url(", "@import", "<link", "<img"):
        assert word not in page
    assert "not recorded" in page and "To teach again: 2. Sums" in page
    assert "Not isolated on this system:</strong> network" in page


def test_a_class_of_nobody_still_makes_a_page():
    assert "How the class did" in report.page([SCORES[-1]], {})
