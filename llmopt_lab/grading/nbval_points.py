"""pytest plugin: nbval's results as points, hints and misconceptions.

    pytest -p llmopt_lab.grading.nbval_points --nbval-lax --nbval-current-env exercises/1_*.ipynb

A graded cell carries nbgrader metadata (`grade`, `grade_id`, `points`). It earns its points if
nbval ran it without an error AND its `check(...)` printed that it is done: the first alone is true
of a cell that a broken kernel skipped, the second of any cell that prints.

nbval notices neither a dead kernel nor `exit()`, and waits for its whole time-out; here a cell
that ends its kernel fails at once, by name, and so does every later cell of that notebook.
`--points-json FILE` appends one line a cell; grade.py reads them.
"""

import json
import re
import time
from queue import Empty

import pytest

from llmopt_lab.grading.submissions import exercise_of

ANSI = re.compile(r"\x1b\[[0-9;]*m")
POLL_SECONDS = 0.5  # how often a waiting test looks whether its kernel lives
PROPERTIES = ("check", "points", "earned", "misconception", "hint")


class CellStopped(Exception):
    """The cell ended its kernel, or did not end in time. `why` is "died", "exit" or "timeout"."""

    def __init__(self, why: str, message: str):
        super().__init__(message)
        self.why = why


def pytest_addoption(parser):
    parser.getgroup("nbval").addoption(
        "--points-json", metavar="FILE", help="append the result of every cell, one JSON a line"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    kernel = getattr(item.parent, "kernel", None)
    if kernel is not None and hasattr(kernel, "km") and "get_message" not in vars(kernel):
        kernel.get_message = _watch(kernel)


def _watch(kernel):
    """`kernel.get_message`, but it raises `CellStopped` as soon as no answer can come."""
    receive = {"iopub": kernel.kc.get_iopub_msg, "shell": kernel.kc.get_shell_msg}

    def stop(why: str, message: str):
        kernel.stop()
        raise CellStopped(why, message)

    def get_message(stream: str, timeout: int | float | None = None) -> dict:
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while True:
            try:
                wait = min(POLL_SECONDS, max(0, deadline - time.monotonic()))
                message = receive[stream](timeout=wait)
                break
            except Empty:
                if not kernel.is_alive():
                    stop("died", "the kernel died in this cell (out of memory, or a crash)")
                if time.monotonic() >= deadline:
                    stop("timeout", f"this cell did not finish within {timeout:g} seconds")
        if stream == "shell" and any(
            payload.get("source") == "ask_exit"
            for payload in message["content"].get("payload") or []
        ):
            stop("exit", "this cell ended the kernel: it calls exit() or quit()")
        return message

    return get_message


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when != "call" or not hasattr(item, "cell"):
        return report
    metadata = item.cell.metadata.get("nbgrader", {})
    error = call.excinfo.value if call.excinfo else None
    message = ""
    if metadata.get("grade") and report.passed and (missing := _missing_mark(item)):
        report.outcome, report.longrepr = "failed", missing
    if report.failed:
        text = ANSI.sub("", str(report.longrepr))
        message = str(error) if isinstance(error, CellStopped) else _last_paragraph(text)
        report.longrepr = message if metadata.get("grade") else text
    if metadata.get("grade"):
        points = metadata.get("points", 1)
        values = (
            exercise_of(metadata["grade_id"]),
            points,
            points if report.passed else 0,
            *read_message(message),
        )
        # item's too: the report of the teardown copies these into the JUnit file
        item.user_properties += zip(PROPERTIES, values, strict=True)
        report.user_properties = list(item.user_properties)
    if item.config.option.points_json:
        line = {
            "cell": item.cell.id if "id" in item.cell else item.name,
            "passed": report.passed,
            "stopped": error.why if isinstance(error, CellStopped) else "",
            "message": message,
        }
        with open(item.config.option.points_json, "a") as file:
            file.write(json.dumps(line) + "\n")
    return report


def pytest_terminal_summary(terminalreporter):
    reports = [
        (report.nodeid.split("::")[0], dict(report.user_properties))
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call" and "check" in dict(report.user_properties)
    ]
    for file, p in reports:
        verdict = "done" if p["earned"] == p["points"] else "not yet"
        points = f"{p['earned']}/{p['points']}"
        terminalreporter.write_line(f"{verdict:8}{points:>6}  {file}  {p['check']}  {p['hint']}")
    if reports:
        earned, points = (sum(p[key] for _, p in reports) for key in ("earned", "points"))
        terminalreporter.write_line(f"points: {earned} of {points}")


def read_message(message: str) -> tuple[str, str]:
    """The misconception and the next step that a `NotYet` names; empty where it names none."""
    misconception = re.search(r"Misconception: ([\w-]+)\.", message)
    step = re.search(r"Next: (.*?)(?: Stuck\? |$)", message, re.S)
    return misconception[1] if misconception else "", step[1] if step else ""


def _missing_mark(item) -> str:
    """Why a cell without an error did not pass after all, if its check left no mark."""
    name = re.search(r"""\bcheck\(\s*["']([\w.]+)["']""", item.cell.source)
    printed = "".join(o.text for o in item.test_outputs or () if o.output_type == "stream")
    if name is None or re.search(rf"^{re.escape(name[1])}: done, ", printed, re.M):
        return ""
    return f"{name[1]}: the check did not run to its end"


def _last_paragraph(text: str) -> str:
    """The message of the exception that ended the cell: the last line of what nbval shows."""
    return text.strip().splitlines()[-1].removeprefix("NotYet: ")
