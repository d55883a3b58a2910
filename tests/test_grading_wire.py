"""The wire between judge and learner: what goes over, what does not, and a container at its end."""

import json
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput, LabError, OutOfBlocks
from llmopt_lab.core.trace import recording
from llmopt_lab.flash_attention.records import SoftmaxState
from llmopt_lab.grading import checks, sandbox
from llmopt_lab.grading.grade import grade
from llmopt_lab.grading.judge import Learner
from llmopt_lab.grading.student import Student
from llmopt_lab.grading.wire import HEADER, Channel, Far, Stopped

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
sys.path.insert(0, str(FIXTURES))
import demo_attempts  # noqa: E402
from demo_checks import Added, running_total  # noqa: E402


class Names:
    """In the shell's place: `evaluate` finds what a test has put here."""

    def __init__(self):
        self.known = {}

    def ev(self, name: str):
        return self.known[name]


@pytest.fixture
def there(monkeypatch):
    """(learner, known): a judge's end, and what the other end, a thread of this process, knows."""
    names = Names()
    monkeypatch.setattr("llmopt_lab.grading.student.make_shell", lambda: names)
    monkeypatch.setattr(os, "register_at_fork", lambda **functions: None)
    ours, theirs = socket.socketpair()
    student = Student(Channel(theirs.fileno(), theirs.fileno()))
    thread = threading.Thread(target=student.work, daemon=True)
    thread.start()
    learner = Learner(Channel(ours.fileno(), ours.fileno()), stop=ours.close)
    learner.channel.deadline = time.monotonic() + 30
    yield learner, names.known
    ours.close()
    thread.join(10)
    theirs.close()


def far(there, value):
    learner, known = there
    known["it"] = value
    return learner.evaluate("it")


def test_every_attempt_at_the_demo_gets_the_verdict_that_it_gets_in_one_process(there):
    for name, wrong in demo_attempts.WRONG.items():
        for attempt, misconception in wrong:
            problem, _ = checks.judged(checks.find_exercise(name), far(there, attempt))
            assert problem.misconception == misconception
    for name, right in demo_attempts.RIGHT.items():
        for attempt in right:
            problem, _ = checks.judged(checks.find_exercise(name), far(there, attempt))
            assert problem is None


@pytest.mark.parametrize(
    "value",
    [
        None, True, -(2**90), 0.1, float("-inf"), "ß\ud800", [1, [2.5, "x"]], (1, (2,)), {1, 2},
        {(1, 2): [3], None: "n"}, slice(1, None, 2), range(2, 9, 3), torch.Size([2, 3]), ...,
        torch.bfloat16, torch.device("cpu"), 1 + 2j, frozenset({3}),
    ],
    ids=str,
)  # fmt: skip
def test_plain_values_come_back_as_they_were(there, value):
    assert far(there, value) == value
    assert far(there, lambda x: x)(value) == value


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8, torch.bool])
def test_tensors_come_back_bit_by_bit(there, dtype):
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    echo = far(there, lambda x: x)
    for view in (x, x.mT, x[1:, ::2], x[0, 0, 0], x[:0], x.expand(2, 3, 4, 5)):
        got = echo(view)
        assert got.dtype == dtype and torch.equal(got, view)


def test_what_is_changed_over_there_is_changed_here(there):
    def change(numbers, table, tensor, state):
        numbers.append(4)
        table["new"] = numbers
        tensor[1] = 7  # a view: its whole storage is one
        state.acc.zero_()

    numbers, table, base = [1, 2], {"old": 0}, torch.zeros(3, 4)
    state = SoftmaxState.empty(torch.ones(2, 3), 3)
    state.acc.fill_(5)
    far(there, change)(numbers, table, base[1:], state)
    assert numbers == [1, 2, 4] and table == {"old": 0, "new": numbers}
    assert table["new"] is numbers
    assert_close(base, torch.tensor([[0.0] * 4, [0.0] * 4, [7.0] * 4]))
    assert not state.acc.any()


def test_gradients_pass_in_both_directions(there):
    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0.5, 0.5, 2.0], dtype=torch.float64, requires_grad=True)

    def theirs(x, y, ours):
        return ours(x * y) * x.detach()

    got = far(there, theirs)(x, y, lambda z: (z**2).sum())
    want = ((x * y) ** 2).sum() * x.detach()
    upstream = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(got, (x, y), upstream), torch.autograd.grad(want, (x, y), upstream),
        strict=True,
    ):  # fmt: skip
        assert_close(a, b)


def test_what_is_recorded_over_there_is_recorded_here_in_order(there):
    with recording() as want:
        running_total([2, 3, 4])
    with recording() as got:
        assert far(there, running_total)([2, 3, 4]) == 6
    assert [s.what for s in got.steps] == [s.what for s in want.steps]
    with recording(SoftmaxState) as none:
        far(there, running_total)([2])
    assert len(none) == 0 and issubclass(Added, object)


def test_errors_keep_their_name_their_kind_and_the_learners_line(there):
    class Mine(KeyError):
        pass

    def fails(error):
        raise error

    for error, kind in [
        (Mine("x"), KeyError), (OutOfBlocks("none left"), OutOfBlocks), (SystemExit(3), SystemExit),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "no"), ValueError), (BadInput("no"), BadInput),
    ]:  # fmt: skip
        attempt = far(there, lambda error=error: fails(error))
        with pytest.raises(kind) as raised:
            attempt()
        assert type(raised.value).__name__ == type(error).__name__
        assert str(raised.value) == str(error)
        assert checks.learners_frame(raised.value).line == "raise error"


def test_an_error_of_ours_comes_back_through_their_code_as_itself(there):
    ours = ValueError("out of dice")

    def dice():
        raise ours

    with pytest.raises(ValueError, match="out of dice") as raised:
        far(there, lambda dice: dice())(dice)
    assert raised.value is ours


def test_their_own_kinds_of_numbers_and_lists_arrive_without_their_methods(there):
    class Equal(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

    class Long(list):
        def __len__(self):
            return 99

    got = far(there, [Equal(7), Long([1]), type("D", (dict,), {})(a=Equal(1))])
    assert [type(x) for x in got[:2]] == [int, list] and got[0] != 8 and len(got[1]) == 1
    assert isinstance(got[2], Far)


def test_a_function_of_ours_does_not_show_its_insides(there):
    secret = {"answer": 42}

    def check(x):
        return secret["answer"] == x

    for name in ("__globals__", "__closure__", "__code__", "func_closure"):
        attempt = far(there, lambda f, name=name: getattr(f, name))
        with pytest.raises(AttributeError):
            attempt(check)
    with pytest.raises(LabError):
        far(there, lambda x: x)(os)  # a module is not lent


class Liar:
    """The other end as somebody would write it who wants points."""

    def __init__(self, answer: bytes):
        self.ours, self.theirs = socket.socketpair()
        self.theirs.sendall(answer)
        self.learner = Learner(Channel(self.ours.fileno(), self.ours.fileno()), stop=lambda: None)
        self.learner.channel.deadline = time.monotonic() + 0.3


def message(**content) -> bytes:
    text = json.dumps({"sizes": [], **content}).encode()
    return HEADER.pack(len(text), 0) + text


TENSOR = {"tensor": "float32", "shape": [2**20, 2**20], "stride": [0, 0], "at": 0, "blob": None,
          "storage": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "timeout"),
        (b"\0" * 3, "timeout"),
        (HEADER.pack(2**31, 0), "garbage"),
        (HEADER.pack(2, 0) + b"[]", "garbage"),
        (HEADER.pack(100_000, 0) + b"[" * 100_000, "garbage"),
        (message(do="return"), "garbage"),
        (message(do="return", value={"of": "os:system", "fields": {}}), "garbage"),
        (message(do="return", value={"of": "llmopt_lab.grading.checks:NotYet", "fields": {}}),
         "garbage"),
        (message(do="return", value={"yours": 10**6}), "garbage"),
        (message(do="return", value={"lent": 3}), "garbage"),
        (message(do="return", value={"range": [0, 10**15, 1]}), "garbage"),
        (message(do="return", value=TENSOR), "garbage"),
        (message(do="return", value=1, back=[[5, {"items": []}]]), "garbage"),
        (message(do="return", value=1, records=[{"far": 1, "type": "Load"}]), "garbage"),
    ],
)  # fmt: skip
def test_a_forged_message_stops_the_learner_and_nothing_else(answer, why):
    liar = Liar(answer)
    with pytest.raises(Stopped) as stopped:
        liar.learner.evaluate("x")
    assert stopped.value.why == why


# containers

FAKE_ENGINE = """#!{python}
import json, os, sys
with open({log!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "run":
    at = sys.argv.index("the-image")
    assert sys.argv[at + 1] == "python"
    os.environ["PYTHONPATH"] = {path!r}
    os.execv({python!r}, [{python!r}, *sys.argv[at + 2:]])
"""


@pytest.mark.notebook
def test_with_a_container_engine_each_notebook_runs_in_a_container(tmp_path, monkeypatch):
    engine, log = tmp_path / "bin" / "docker", tmp_path / "log"
    engine.parent.mkdir()
    path = f"{ROOT}:{FIXTURES}"
    engine.write_text(FAKE_ENGINE.format(python=sys.executable, log=str(log), path=path))
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", f"{engine.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", path)
    exercises = FIXTURES / "course" / "exercises"
    (score,) = grade(
        [exercises / "0_demo.ipynb"], exercises=exercises, checks=["demo_checks"],
        container="the-image", memory=1 << 30, processes=50,
    )  # fmt: skip
    assert {v.misconception for v in score.verdicts} == {"not-written"}
    version, image, run, kill = (json.loads(line) for line in log.read_text().splitlines())
    assert version == ["version"] and image == ["image", "inspect", "the-image"]
    assert run[0] == "run" and kill[0] == "kill"
    assert f"--name={kill[1]}" in run
    assert {
        "--rm", "--interactive", "--network=none", "--read-only", "--cap-drop=ALL",
        "--security-opt=no-new-privileges", "--user=65534:65534", f"--memory={1 << 30}",
        f"--memory-swap={1 << 30}", "--pids-limit=50", "--pull=never",
        f"--volume={ROOT / 'llmopt_lab'}:/course/llmopt_lab:ro",
    } <= set(run)  # fmt: skip
    assert not any("exercises" in part or "solutions" in part for part in run)


def test_without_a_container_engine_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInput, match="no container engine: docker: not found; podman: not found"):
        sandbox.find_engine()


def fake_program(file: Path, body: str) -> None:
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)


def test_an_engine_that_does_not_answer_is_passed_over_and_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    fake_program(tmp_path / "docker", "echo client 1; echo is the daemon running? >&2; exit 1")
    with pytest.raises(BadInput, match="docker: is the daemon running.; podman: not found"):
        sandbox.find_engine()
    fake_program(tmp_path / "podman", "exit 0")
    assert sandbox.find_engine() == str(tmp_path / "podman")


def test_an_image_that_is_not_there_is_refused_before_any_work(tmp_path):
    fake_program(tmp_path / "podman", "[ $1 != image ]")
    with pytest.raises(BadInput, match="no image my/lab:1 in podman: .* podman pull my/lab:1"):
        sandbox.find_image(str(tmp_path / "podman"), "my/lab:1")


def test_the_image_is_built_once_with_the_versions_that_the_course_is_tested_with(tmp_path):
    engine, log = tmp_path / "podman", tmp_path / "log"
    fake_program(engine, f"echo $1 >> {log}\ncat > {log}.$1\n[ $1 != image ] || [ -e {log}.built ]")
    assert sandbox.find_image(str(engine), "auto") == sandbox.AUTO
    assert log.read_text().split() == ["image", "build"]
    recipe = Path(f"{log}.build").read_text()
    assert "constraints.txt" in re.search("^COPY (.*) /course/$", recipe, re.M)[1].split()
    (install,) = re.findall("pip install (.*)", recipe)
    assert "-c /course/constraints.txt" in install
    Path(f"{log}.built").touch()
    sandbox.find_image(str(engine), "auto")
    assert log.read_text().split() == ["image", "build", "image"]
