"""One of the processes that grade: `python -m llmopt_lab.grading.worker`, started by `grade.py`.

It reads one line of JSON with its settings, then the path of a notebook a line, and answers each
with a line of JSON: verdicts and minutes, or the reason why the notebook cannot be graded.
"""

import contextlib
import importlib
import json
import os
import resource
import sys
from dataclasses import asdict
from pathlib import Path

from llmopt_lab.core.device import prepare_triton, version_of
from llmopt_lab.core.errors import LabError
from llmopt_lab.grading import checks, student  # noqa: F401  loaded before the first fork
from llmopt_lab.grading.judge import Learner, judge
from llmopt_lab.grading.sandbox import Box, Limits, Nursery, start_container
from llmopt_lab.grading.submissions import (
    canonical_of,
    minutes_of,
    read_canonical,
    read_learners,
    restore,
)

JUDGES_MEMORY = 8 << 30  # bytes


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a check prints is no answer
    settings = json.loads(sys.stdin.readline())
    if version_of("triton") is not None:
        prepare_triton()
    import IPython.core.interactiveshell  # noqa: F401

    for module in settings["checks"]:
        importlib.import_module(module)
    limits = Limits(**settings["limits"])
    engine, image = settings["engine"], settings["image"]
    nursery = None if engine else Nursery(settings["hidden"])
    with contextlib.suppress(OSError, ValueError):  # an answer may make a check hungry
        resource.setrlimit(resource.RLIMIT_DATA, (JUDGES_MEMORY, JUDGES_MEMORY))
    canonical = read_canonical(Path(settings["exercises"]))
    missing: set[str] = set()

    def start() -> Learner:
        box: Box = start_container(engine, image, limits) if engine else nursery.start(limits)
        missing.update(box.missing)
        return Learner(box.channel, box.stop)

    for line in sys.stdin:
        try:
            answer = grade_file(Path(json.loads(line)), canonical, start, limits)
        except LabError as error:
            answer = {"error": str(error)}
        answer["missing"] = sorted(missing)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def grade_file(path: Path, canonical: dict, start, limits: Limits) -> dict:
    """The verdicts on one notebook, which is only read, and the minutes it tells of."""
    learners = read_learners(path)
    name = canonical_of(learners, canonical, path)
    notebook = restore(learners, canonical[name])
    verdicts = judge(notebook, start, limits.cell_timeout, limits.total_timeout)
    return {
        "notebook": name,
        "verdicts": [asdict(v) for v in verdicts],
        "minutes": minutes_of(learners),
        "plan": {v.exercise: checks.find_exercise(v.exercise).minutes for v in verdicts},
    }


if __name__ == "__main__":
    main()
