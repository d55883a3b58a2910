"""What grading leaves behind: CSV for a gradebook, JSON, JUnit, and a page about the class."""

import csv
import json
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from llmopt_lab.grading.submissions import Score, Verdict

TEMPLATE = Path(__file__).with_name("report.html")
NO_MISTAKE = ("done", "not-written", "not-run")  # outcomes that say nothing about understanding
LEADS_A_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # in a spreadsheet


def write_all(scores: Sequence[Score], out: Path, titles: dict[str, str]) -> None:
    """scores.csv, canvas.csv, scores.json, scores.xml and report.html into the folder `out`.

    `titles`: exercise -> the heading of its section in the exercise notebook.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_csv(scores, out / "scores.csv")
    write_canvas(scores, out / "canvas.csv")
    write_json(scores, out / "scores.json")
    write_junit(scores, out / "scores.xml")
    (out / "report.html").write_text(page(scores, titles), "utf-8", errors="replace")


# gradebooks


def by_student(scores: Sequence[Score]) -> dict[tuple[str, str], list[Score]]:
    """(name, number) -> the scores of one student, in the order of the names."""
    found: dict[tuple[str, str], list[Score]] = {}
    for score in sorted(scores, key=lambda s: (s.student, s.student_id, s.file)):
        found.setdefault((score.student, score.student_id), []).append(score)
    return found


def best(scores: Sequence[Score], notebook: str) -> Score | None:
    """The best of several scores for one notebook, or None if it was not handed in."""
    mine = [s for s in scores if s.notebook == notebook and not s.error]
    return max(mine, key=lambda s: s.earned, default=None)


def notebooks_of(scores: Sequence[Score]) -> dict[str, int]:
    """Notebook -> the points to be had."""
    return {s.notebook: s.points for s in sorted(scores, key=lambda s: s.notebook) if not s.error}


def write_csv(scores: Sequence[Score], path: Path) -> None:
    """One row a student: each notebook's points, their sum, and the points of each exercise.

    A notebook that was not handed in is an empty field, which gradebooks leave alone; of one handed
    in twice the better one counts. Moodle asks on import which column is which.
    """
    possible = notebooks_of(scores)
    exercises = list(dict.fromkeys(v.exercise for s in scores for v in s.verdicts))
    rows = [["Student", "ID", *possible, "Total", "Points possible", "Feedback", *exercises]]
    for (student, number), mine in by_student(scores).items():
        counted = {name: best(mine, name) for name in possible}
        points = {v.exercise: v.earned for s in counted.values() if s for v in s.verdicts}
        problems = " ".join(s.error for s in mine if s.error)
        rows.append(
            [student, number, *("" if s is None else s.earned for s in counted.values()),
             sum(s.earned for s in counted.values() if s), sum(possible.values()), problems,
             *(points.get(name, "") for name in exercises)]
        )  # fmt: skip
    _write_rows(rows, path)


def write_canvas(scores: Sequence[Score], path: Path) -> None:
    """The columns that Canvas' gradebook import knows, with its row of possible points.

    Canvas finds a student by ID; where the folder's name has no number, the name goes in as the
    login, and a column that it does not know becomes a new assignment.
    """
    possible = notebooks_of(scores)
    head = ["Student", "ID", "SIS User ID", "SIS Login ID", "Section"]
    rows = [[*head, *possible], ["    Points Possible", "", "", "", "", *possible.values()]]
    for (student, number), mine in by_student(scores).items():
        counted = [best(mine, name) for name in possible]
        login = "" if number else student
        rows.append(
            [student, number, "", login, "", *("" if s is None else s.earned for s in counted)]
        )
    _write_rows(rows, path)


def _write_rows(rows: list[list], path: Path) -> None:
    """A name that a spreadsheet would take for a formula gets a ' in front."""
    safe = [
        [f"'{x}" if isinstance(x, str) and x.startswith(LEADS_A_FORMULA) else x for x in row]
        for row in rows
    ]
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        csv.writer(file).writerows(safe)


def write_json(scores: Sequence[Score], path: Path) -> None:
    """One object a notebook, with its verdicts, points and earned points."""
    rows = [asdict(s) | {"points": s.points, "earned": s.earned} for s in scores]
    path.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


def write_junit(scores: Sequence[Score], path: Path) -> None:
    """A test suite a notebook, a test case an exercise with its points as properties."""
    suites = ET.Element("testsuites", name="llmopt grade")
    for score in scores:
        failed = [v for v in score.verdicts if v.message]
        suite = ET.SubElement(
            suites, "testsuite", name=_xml_text(score.file), tests=str(len(score.verdicts) or 1),
            failures=str(len(failed)), errors=str(int(bool(score.error))),
        )  # fmt: skip
        if score.error:
            case = ET.SubElement(suite, "testcase", classname=suite.get("name"), name="notebook")
            ET.SubElement(case, "error", message=_xml_text(score.error))
        for v in score.verdicts:
            case = ET.SubElement(suite, "testcase", classname=suite.get("name"), name=v.exercise)
            properties = ET.SubElement(case, "properties")
            for key in ("points", "earned", "misconception", "hint"):
                value = _xml_text(str(getattr(v, key)))
                ET.SubElement(properties, "property", name=key, value=value)
            if v.message:
                ET.SubElement(case, "failure", message=_xml_text(v.message))
    ET.indent(suites)
    ET.ElementTree(suites).write(path, "utf-8", xml_declaration=True)


def _xml_text(text: str) -> str:
    """Without what XML forbids: control characters, halves of characters, and two numbers."""
    return "".join(
        c for c in text if c in "\t\n" or " " <= c < "\ud800" or "\ue000" <= c not in "\ufffe\uffff"
    )


# the class


@dataclass(frozen=True)
class ExerciseOfClass:
    """How a class did in one exercise."""

    name: str
    title: str
    points: int
    n: int  # notebooks
    n_done: int
    n_tried: int  # of those, not left as it was and not out of time
    mistakes: dict[str, int]  # named misconception, or how it ended -> notebooks
    hint: str  # of the most frequent one
    minutes: float | None  # the median, or None where no time was recorded
    n_timed: int
    planned: int | None

    @property
    def n_wrong(self) -> int:
        return self.n_tried - self.n_done


def classes_of(scores: Sequence[Score], titles: dict[str, str]) -> dict[str, list[ExerciseOfClass]]:
    """Notebook -> its exercises in order. Each student counts once a notebook."""
    found = {}
    for notebook in notebooks_of(scores):
        mine = [best(of_one, notebook) for of_one in by_student(scores).values()]
        mine = [score for score in mine if score is not None]
        found[notebook] = [
            _exercise_of_class([(s, s.verdicts[i]) for s in mine], titles.get(v.exercise, ""))
            for i, v in enumerate(mine[0].verdicts)
        ]
    return found


def _exercise_of_class(rows: list[tuple[Score, Verdict]], title: str) -> ExerciseOfClass:
    name, points = rows[0][1].exercise, rows[0][1].points
    verdicts = [v for _, v in rows]
    named = Counter(v.misconception or _ending(v) for v in verdicts if v.outcome != "done")
    mistakes = Counter(
        v.misconception or _ending(v) for v in verdicts if v.outcome not in NO_MISTAKE
    )
    usual = mistakes.most_common(1)[0][0] if mistakes else ""
    hint = next((v.hint for v in verdicts if (v.misconception or _ending(v)) == usual), "")
    minutes = [s.minutes[name] for s, _ in rows if name in s.minutes]
    return ExerciseOfClass(
        name, title, points, len(rows),
        n_done=sum(v.outcome == "done" for v in verdicts),
        n_tried=sum(v.outcome not in NO_MISTAKE[1:] for v in verdicts),
        mistakes=dict(named.most_common()), hint=hint if usual else "",
        minutes=median(minutes) if minutes else None, n_timed=len(minutes),
        planned=next((s.plan[name] for s, _ in rows if name in s.plan), None),
    )  # fmt: skip


def _ending(verdict: Verdict) -> str:
    return {"stopped": "did-not-finish", "not-run": "could-not-run"}.get(
        verdict.outcome, "unnamed" if verdict.message else ""
    )


def to_teach_again(exercises: Sequence[ExerciseOfClass]) -> ExerciseOfClass | None:
    """The exercise that most of those who tried it got wrong; None if nobody did."""
    wrong = [e for e in exercises if e.n_wrong > 0]
    return max(wrong, key=lambda e: (e.n_wrong / e.n_tried, e.n_wrong), default=None)


def page(scores: Sequence[Score], titles: dict[str, str]) -> str:
    """The whole class as one HTML page that needs no network and no script."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    students = by_student(scores)
    possible = notebooks_of(scores)
    chapters = []
    for notebook, exercises in classes_of(scores, titles).items():
        seen = Counter()
        for exercise in exercises:
            seen.update(exercise.mistakes)
        columns = [name for name, _ in seen.most_common()]
        chapters.append(
            {
                "name": notebook,
                "anchor": f"notebook-{len(chapters) + 1}",
                "exercises": exercises,
                "columns": columns,
                "most": max((n for e in exercises for n in e.mistakes.values()), default=1),
                "n": exercises[0].n,
                "teach": to_teach_again(exercises),
                "earned": [s.earned for s in (best(x, notebook) for x in students.values()) if s],
                "points": possible[notebook],
            }
        )
    rows = [
        {
            "student": student, "number": number,
            "points": [best(mine, name) for name in possible],
            "problems": [s.error for s in mine if s.error],
        }
        for (student, number), mine in students.items()
    ]  # fmt: skip
    missing = sorted({what for s in scores for what in s.missing})
    return template.render(
        chapters=chapters, rows=rows, possible=possible, missing=missing, median=median,
        n_notebooks=len(scores), n_errors=sum(bool(s.error) for s in scores),
    )  # fmt: skip
