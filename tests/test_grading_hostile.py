"""`llmopt grade` on a class that hands in everything: each costs its own points and nothing else.

One folder of submissions is graded once; every test looks at what became of one of them. Where
LLMOPT_TEST_IMAGE names an image (docs/grading.md), the learners run in containers of it.
"""

import contextlib
import copy
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import psutil
import pytest

from llmopt_lab import build
from llmopt_lab.grading.grade import Score, grade

IMAGE = os.environ.get("LLMOPT_TEST_IMAGE", "")
ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
EXERCISES = FIXTURES / "course" / "exercises"
SOLVED = build.read_source(FIXTURES / "course" / "solutions" / "source" / "0_demo.py")
FULL = {"demo.ceil_div": 1, "demo.running_total": 2, "demo.n_bytes": 1}
CELL_TIMEOUT = 8
LATE = f"did not finish within {CELL_TIMEOUT} seconds"
WRONG = "def ceil_div(a, b):\n    return a // b\n"
PASS_MARK = "print('demo.ceil_div: done, 1 point')\n"

# student -> cell of the solved notebook -> what stands there instead
CELLS = {
    "good": {},
    "endless loops": {
        "ceil_div": "def ceil_div(a, b):\n    while True:\n        pass",
        "n_bytes": "import time\nwhile True:\n    try:\n        time.sleep(1)\n"
                   "    except BaseException:\n        pass",
    },
    "a memory hog": {"ceil_div": "hog = bytearray(8 << 30)"},
    "a hog in shared memory": {
        "n_bytes": "import mmap\nhog, much = mmap.mmap(-1, 8 << 30), bytes(32 << 20)\n"
                   "for _ in range(256):\n    hog.write(much)",
    },
    "a fork bomb": {"ceil_div": "import os\nwhile True:\n    os.fork()"},
    "gigabytes of output": {
        "ceil_div": "import os\nfor _ in range(20):\n    os.write(1, bytes(100_000_000))\n"
                    "print('x' * 50_000_000)\n"
                    "def ceil_div(a, b):\n    print('y' * 10_000_000)\n    return -(-a // b)",
    },
    "a full disk": {"ceil_div": "with open('big', 'wb') as file:\n    for _ in range(4000):\n"
                                "        file.write(bytes(1 << 20))"},
    "dead processes": {
        "ceil_div": "def ceil_div(a, b):\n    import os\n    os._exit(0)",
        "running_total": "import os\nos.kill(os.getpid(), 9)",
    },
    "kills everybody": {"ceil_div": "import os, signal\nos.kill(-1, signal.SIGKILL)"},
    "says exit": {"ceil_div": "exit()", "n_bytes": "import sys\nsys.exit(3)"},
    "no Python, no input": {"ceil_div": "def ceil_div(:", "n_bytes": "input('your name?')"},
    "an error, an unknown magic": {
        "running_total": "raise ValueError('mine')", "n_bytes": "%no_such_magic",
    },
    "edited checks": {
        "ceil_div": WRONG, "ceil_div_check": f"# NBVAL_SKIP\n{PASS_MARK}",
        "n_bytes_check": "raise SystemExit",
    },
    "prints pass marks": {"ceil_div": WRONG + PASS_MARK + "def check(*args):\n    " + PASS_MARK},
    "redefines check": {
        "ceil_div": WRONG + "import llmopt_lab.grading as g, llmopt_lab.grading.checks as c\n"
        "def check(name, attempt):\n    print(name + ': done, 1 point')\n"
        "g.check = c.check = check\nc.judged = c._run = lambda *args: (None, None)\n"
        "c.expect = c.expect_same_run = lambda *args, **kwargs: None\n"
        "c.find_exercise('demo.ceil_div').__dict__['check'] = lambda attempt: None",
    },
    "patches torch": {
        "ceil_div": WRONG + "import math, torch, operator\n"
        "math.isclose = torch.allclose = torch.equal = lambda *args, **kwargs: True\n"
        "torch.isclose = lambda a, *rest, **kwargs: torch.ones_like(a, dtype=torch.bool)\n"
        "torch.Tensor.__ne__ = lambda a, b: torch.zeros(1, dtype=torch.bool)\n"
        "import llmopt_lab.core.trace as t\nt.first_divergence = lambda *args, **kwargs: None",
        "n_bytes": "class Equal(int):\n    __eq__ = lambda a, b: True\n"
                   "    __ne__ = lambda a, b: False\n    __hash__ = int.__hash__\n"
                   "def n_bytes():\n    return Equal(7)",
    },
    "answers too much": {"n_bytes": "def n_bytes():\n    return [0] * 3_000_000"},
    "talks on the wire itself": {
        "ceil_div": "import os\nfor fd in range(3, 60):\n    try:\n"
                    "        os.write(fd, bytes([0, 0, 0, 2, 0, 0, 0, 0]) + b'{}')\n"
                    "    except OSError:\n        pass",
    },
}  # fmt: skip


def notebook_with(**sources: str):
    notebook = copy.deepcopy(SOLVED)
    for cell in notebook.cells:
        name = cell.id.replace("-", "_").removeprefix("demo_")
        cell.source = sources.pop(name, cell.source)
    assert not sources, f"no such cells: {sources}"
    return notebook


class Class:
    """What was handed in, what became of it, and what it left behind."""

    def __init__(self, folder: Path):
        self.folder, self.submissions = folder, folder / "class"
        self.server = socket.create_server(("127.0.0.1", 0))
        self.calls: list = []
        threading.Thread(target=self._answer, daemon=True).start()
        for student, cells in CELLS.items():
            self.hand_in(student, notebook_with(**cells))
        self._hand_in_the_rest()
        self.before = self._everything()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", f"{ROOT}:{FIXTURES}")
            patch.setenv("MARK_OF_THIS_TEST", str(folder))
            self.scores = grade(
                [self.submissions], exercises=EXERCISES, checks=["demo_checks"], jobs=2,
                cell_timeout=CELL_TIMEOUT, total_timeout=60, memory=512 << 20, processes=40,
                out=folder / "out", container=IMAGE,
            )  # fmt: skip
        self.by_student: dict[str, Score] = {s.student: s for s in self.scores}

    def _answer(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.calls.append(self.server.accept())

    def hand_in(self, student: str, notebook, name: str = "0_demo.ipynb") -> Path:
        file = self.submissions / student / name
        file.parent.mkdir(parents=True)
        text = notebook if isinstance(notebook, str) else nbformat.writes(notebook)
        file.write_text(text)
        return file

    def _hand_in_the_rest(self) -> None:
        self.victim = self.folder / "victim.txt"
        self.victim.write_text("mine")
        other = self.submissions / "good" / "0_demo.ipynb"
        outside = (
            "from pathlib import Path\nfound = []\n"
            f"for place in [{str(self.victim)!r}, {str(other)!r}, {str(ROOT / 'README.md')!r}]:\n"
            "    try:\n        with open(place, 'a') as file:\n            file.write('yours')\n"
            "    except OSError:\n        pass\n"
            f"assert not Path({str(other)!r}).exists(), 'sees what others handed in'\n"
        )
        self.hand_in("writes outside", notebook_with(n_bytes=outside))
        call = f"import socket\nsocket.create_connection({self.server.getsockname()!r}, 2)"
        self.hand_in("calls home", notebook_with(ceil_div=call))
        deleted = copy.deepcopy(SOLVED)
        deleted.cells = [c for c in deleted.cells if not c.id.endswith("check")]
        self.hand_in("deleted checks", deleted)
        forged = notebook_with(ceil_div=WRONG)
        own = nbformat.v4.new_code_cell('check("demo.n_bytes", n_bytes)')
        own.metadata.nbgrader = {"grade": True, "locked": True, "grade_id": "demo-ceil_div-x",
                                 "points": 100}  # fmt: skip
        forged.cells.insert(2, own)
        odd = nbformat.v4.new_code_cell("1", metadata={"nbgrader": "yes", "tags": ["nbval-skip"]})
        forged.cells.insert(3, odd)
        self.hand_in("forged points", forged)
        bare = json.loads(nbformat.writes(SOLVED))
        for cell in bare["cells"]:
            cell.pop("id"), cell.pop("outputs", None), cell.pop("execution_count", None)
        bare["nbformat_minor"] = 0
        bare["metadata"]["kernelspec"]["name"] = "a-kernel-of-colab"
        self.hand_in("no outputs", json.dumps(bare))
        self.hand_in("a name of its own", SOLVED, "homework FINAL (2) – Kopie.ipynb")
        self.hand_in("broken JSON", '{"cells": [')
        self.hand_in("another course", nbformat.v4.new_notebook())
        (self.submissions / "a link").symlink_to(self.folder)
        linked = self.submissions / "a linked file" / "0_demo.ipynb"
        linked.parent.mkdir()
        linked.symlink_to(self.submissions / "good" / "0_demo.ipynb")
        (self.submissions / "nothing").mkdir()
        (self.submissions / "nothing" / "answers.docx").write_text("")

    def _everything(self) -> dict[str, bytes]:
        files = [p for p in self.folder.rglob("*") if p.is_file() and "out" not in p.parts]
        return {str(p): p.read_bytes() for p in files}

    def earned(self, student: str) -> dict[str, int]:
        return {v.exercise: v.earned for v in self.by_student[student].verdicts}

    def message(self, student: str, exercise: str) -> str:
        verdicts = {v.exercise: v for v in self.by_student[student].verdicts}
        return verdicts[f"demo.{exercise}"].message

    def lacks(self, what: str) -> bool:
        """Whether this system refused a part of the isolation, and the result says so."""
        return any(what in s.missing for s in self.scores)


@pytest.fixture(scope="module")
def handed_in(tmp_path_factory):
    handed = Class(tmp_path_factory.mktemp("hostile"))
    yield handed
    handed.server.close()


def costs(handed_in, student: str, **messages: str) -> None:
    """The named exercises earn nothing, for that reason; all others are earned in full."""
    verdicts = handed_in.by_student[student].verdicts
    earned = FULL | {f"demo.{name}": 0 for name in messages}
    assert handed_in.earned(student) == earned, [v.message for v in verdicts]
    for exercise, message in messages.items():
        assert message in handed_in.message(student, exercise)


def test_a_good_notebook_among_them_earns_everything(handed_in):
    costs(handed_in, "good")


def test_endless_loops_in_a_cell_and_in_a_check_are_cut_off(handed_in):
    costs(handed_in, "endless loops", ceil_div=LATE, n_bytes=LATE)


def test_memory_that_is_too_much_is_refused(handed_in):
    costs(handed_in, "a memory hog", ceil_div="MemoryError")


def test_shared_memory_counts_as_well(handed_in):
    # the kernel ends it in a container, we without one
    refused = "the process died in this cell (out of memory" if IMAGE else "more than 512 MiB"
    costs(handed_in, "a hog in shared memory", n_bytes=refused)


def test_a_fork_bomb_runs_into_its_own_limit(handed_in):
    assert handed_in.earned("a fork bomb") == FULL | {"demo.ceil_div": 0}


def test_gigabytes_of_output_go_nowhere_and_cost_nothing(handed_in):
    costs(handed_in, "gigabytes of output")


def test_a_file_of_gigabytes_is_refused(handed_in):
    costs(handed_in, "a full disk", ceil_div="OSError")


def test_a_process_that_dies_in_a_cell_or_a_check_costs_that_exercise(handed_in):
    # a container's first process cannot be killed from inside
    survived = "no cell of this exercise defines"
    costs(handed_in, "dead processes", ceil_div="the process died",
          running_total=survived if IMAGE else "the process died")  # fmt: skip


def test_who_kills_every_process_it_may_reaches_no_other(handed_in):
    assert handed_in.earned("kills everybody")["demo.n_bytes"] == 1


def test_exit_and_quit_cost_their_own_exercise(handed_in):
    costs(handed_in, "says exit", ceil_div="calls exit()", n_bytes="calls exit()")


def test_code_that_is_no_python_and_a_question_to_nobody_are_told(handed_in):
    costs(handed_in, "no Python, no input", ceil_div="SyntaxError", n_bytes="EOFError")


def test_an_error_and_an_unknown_magic_are_told(handed_in):
    costs(handed_in, "an error, an unknown magic", running_total="ValueError: mine", n_bytes="")


def test_an_edited_check_is_put_back(handed_in):
    costs(handed_in, "edited checks", ceil_div="forgets-the-tail")


def test_a_deleted_check_is_put_back(handed_in):
    costs(handed_in, "deleted checks")


def test_a_printed_pass_mark_earns_nothing(handed_in):
    costs(handed_in, "prints pass marks", ceil_div="forgets-the-tail")


def test_a_redefined_check_earns_nothing(handed_in):
    costs(handed_in, "redefines check", ceil_div="forgets-the-tail")


def test_a_patched_torch_and_a_number_that_equals_everything_earn_nothing(handed_in):
    costs(handed_in, "patches torch", ceil_div="forgets-the-tail", n_bytes="something-else")


def test_a_cell_that_calls_itself_a_check_has_no_points(handed_in):
    costs(handed_in, "forged points", ceil_div="forgets-the-tail")
    assert handed_in.by_student["forged points"].points == 4


def test_an_answer_too_large_to_read_is_refused(handed_in):
    costs(handed_in, "answers too much", n_bytes="too long to be sent")


def test_who_writes_on_the_wire_itself_gets_no_points_for_it(handed_in):
    assert handed_in.earned("talks on the wire itself")["demo.ceil_div"] == 0


def test_without_outputs_and_cell_ids_a_notebook_is_graded_all_the_same(handed_in):
    costs(handed_in, "no outputs")


def test_a_name_of_its_own_does_not_matter(handed_in):
    costs(handed_in, "a name of its own")


@pytest.mark.parametrize(
    ("student", "complaint"),
    [
        ("broken JSON", "cannot be read as JSON"),
        ("another course", "not one of this course's exercise notebooks"),
        ("a link", "a symbolic link, which is not followed"),
        ("a linked file", "a symbolic link, which is not followed"),
        ("nothing", "no notebook (.ipynb) in this folder; there is answers.docx"),
    ],
)
def test_what_cannot_be_graded_gets_one_sentence(handed_in, student, complaint):
    assert complaint in handed_in.by_student[student].error
    assert handed_in.by_student[student].verdicts == ()


def test_a_network_call_does_not_get_out(handed_in):
    assert handed_in.lacks("network") or handed_in.calls == []
    if not handed_in.lacks("network"):
        costs(handed_in, "calls home", ceil_div="Error")


def test_nothing_is_written_outside_and_nobody_sees_what_others_handed_in(handed_in):
    if handed_in.lacks("files"):
        return
    costs(handed_in, "writes outside", n_bytes="no cell of this exercise defines")
    assert handed_in.victim.read_text() == "mine"
    assert handed_in._everything() == handed_in.before


def test_no_process_and_no_folder_of_a_learner_is_left(handed_in, tmp_path):
    mark = str(handed_in.folder)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            assert process.environ().get("MARK_OF_THIS_TEST") != mark, process


def test_every_result_is_in_the_files(handed_in):
    rows = json.loads((handed_in.folder / "out" / "scores.json").read_text())
    assert {row["student"] for row in rows} == set(handed_in.by_student)
    assert len(rows) == len(CELLS) + 11
    assert {p.suffix for p in (handed_in.folder / "out" / "graded").iterdir()} == {".json"}


def test_a_system_that_isolates_nothing_is_reported():
    """The same process without namespaces, as on macOS: what is missing is said, limits hold."""
    code = (
        "from llmopt_lab.grading import sandbox, student\n"
        "import IPython.core.interactiveshell, time\n"
        "sandbox._unshare = lambda flags: False\n"
        "from llmopt_lab.grading.judge import Learner\n"
        "box = sandbox.Nursery().start(sandbox.Limits(processes=40))\n"
        "learner = Learner(box.channel, box.stop)\n"
        "learner.channel.deadline = time.monotonic() + 60\n"
        "print(sorted(box.missing), learner.evaluate('6 * 7'))\n"
        "learner.run('import os\\nif os.fork() == 0:\\n    import time\\n    time.sleep(600)')\n"
        "learner.stop()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert "['files', 'network', 'processes'] 42" in run.stdout, run.stderr
