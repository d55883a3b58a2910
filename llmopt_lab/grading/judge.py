"""The judge: checks run here, the learner's code elsewhere.

The cells of a notebook run one after the other in the learner's process. Where the canonical
notebook has a check cell, `check(name, expression)`, no line of that cell runs there: its
expression is evaluated there, and what it gives (a function, a number) is checked here, with a
`Far` object in the function's place. What the learner's code prints, patches or redefines stays on
the other side: it never holds the check, the right answer or the points.

A cell that ends its process or does not finish costs what it stands for: the process is started
again, and runs the cells again without that one, until every check has had its turn.
"""

import ast
import time
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from llmopt_lab.core.errors import LabError
from llmopt_lab.core.trace import Record, open_trace, record
from llmopt_lab.grading.checks import find_exercise, judged
from llmopt_lab.grading.submissions import Verdict, exercise_of, grade_id
from llmopt_lab.grading.wire import Channel, Far, Garbled, Peer, Raised, Stopped

FUNCTIONS = (type(lambda: 0), type(len), type)


class GradingFailed(LabError, RuntimeError):
    """The learner's process did not start; no fault of the learner's."""


class Learner(Peer):
    """The judge's end of the wire to a learner's process."""

    lends = True

    def __init__(self, channel: Channel, stop: Callable[[], None]):
        super().__init__(channel)
        self.stop = stop  # ends the process and all that it has started

    def run(self, source: str) -> tuple[bool, str, bool]:
        """Run a cell there: whether it ended without an error, its message, whether it said exit"""
        self._start()
        ok, message, said_exit = self.ask({"do": "run", "source": source}, [])
        return ok is True, str(message), said_exit is True

    def evaluate(self, source: str):
        """The value of an expression there, or a `Far`."""
        self._start()
        return self.ask({"do": "evaluate", "source": source}, [])

    def gradients(self, handle: int, upstream: Tensor) -> list:
        self._start()
        return super().gradients(handle, upstream)

    def ask(self, message: dict, blobs: list[bytes]):
        trace = open_trace()
        if trace is not None:
            kinds = [f"{kind.__module__}:{kind.__qualname__}" for kind in trace.only]
            message = {**message, "recording": kinds}
        try:
            return super().ask(message, blobs)
        except TimeoutError:
            raise Stopped("timeout", "did not finish in time") from None
        except (EOFError, BrokenPipeError):
            raise Stopped("died", "the process died (out of memory, or a crash)") from None

    def call(self, handle: int, args: tuple, kwargs: dict, grid=None):
        self._start()
        return super().call(handle, args, kwargs, grid)

    def get(self, handle: int, name: str):
        self._start()
        return super().get(handle, name)

    def _start(self) -> None:
        if self.depth == 0:
            self.codec.start_call()

    def request(self, message: dict, blobs: list[bytes]):
        try:
            return super().request(message, blobs)
        except (Raised, TimeoutError, EOFError):
            raise
        except Exception as error:  # noqa: BLE001  whatever it sent, it was not ours
            raise Stopped("garbage", f"an answer that cannot be read ({error})"[:300]) from None

    def settle(self, message: dict, blobs: list[bytes]) -> None:
        self.codec.take_back(message.get("back", []), blobs)
        for tree in message.get("records", []):
            what = self.codec.decode(tree, blobs)
            if not isinstance(what, Record):
                raise Garbled("a record of a kind that is not known here")
            record(what)

    def perform(self, message: dict, blobs: list[bytes]):
        """The learner's code calls something that was handed to it."""
        if message["do"] == "gradients":
            return self.give_gradients(message, blobs)
        target = self.codec.given[message["handle"]]
        if message["do"] == "call":
            args, kwargs = self.arguments(message, blobs)
            return target(*args, **kwargs)
        name = message["name"]
        if message["do"] != "get" or name.startswith("_") or _hides_its_insides(target):
            raise AttributeError(f"{type(target).__name__} has no attribute {name!r} here")
        return getattr(target, name)


def _hides_its_insides(target) -> bool:
    """A function or a partial would show the check's own inputs and answers."""
    from functools import partial

    return isinstance(target, (*FUNCTIONS, partial, Far)) or hasattr(target, "__func__")


def judge(
    notebook, start: Callable[[], Learner], cell_timeout: float, total_timeout: float
) -> tuple[Verdict, ...]:
    """The verdicts on a notebook whose locked cells are the canonical ones.

    `start` makes a fresh process for the learner's code. The limits are seconds.

    Raises:
        GradingFailed: a process did not start.
    """
    deadline = time.monotonic() + total_timeout
    done: dict[str, Verdict] = {}
    failed: dict[str, str] = {}  # exercise -> why its own cell did not run
    without: dict[int, str] = {}  # index of a cell -> why it is left out
    left = [c for c in notebook.cells if _is_check(c)]
    while left and time.monotonic() < deadline:
        learner = start()
        index = 0
        try:
            for index, cell in enumerate(notebook.cells):
                name = exercise_of(grade_id(cell))
                if index in without:
                    if _is_check(cell) and name not in done:
                        done[name] = _stopped(cell, without[index])
                    elif not _is_check(cell):
                        failed.setdefault(name, without[index])
                    continue
                limit = min(time.monotonic() + cell_timeout, deadline)
                learner.channel.deadline = limit
                if not _is_check(cell):
                    ok, message, _ = learner.run(cell.source)
                    if not ok and grade_id(cell):
                        failed.setdefault(name, message)
                elif name not in done:
                    done[name] = _checked(cell, learner, failed.get(name, ""))
        except Stopped as stopped:
            if time.monotonic() >= deadline:
                break
            if index in without:
                break
            without[index] = _why(stopped, cell_timeout)
        finally:
            learner.stop()
        left = [c for c in left if exercise_of(grade_id(c)) not in done]
    for cell in left:
        name = exercise_of(grade_id(cell))
        index = notebook.cells.index(cell)
        if name not in done and index in without:
            done[name] = _stopped(cell, without[index])
        done.setdefault(name, _not_run(cell))
    checks = (c for c in notebook.cells if _is_check(c))
    return tuple(done[exercise_of(grade_id(cell))] for cell in checks)


def _why(stopped: Stopped, cell_timeout: float) -> str:
    if stopped.why == "timeout":
        return f"this cell did not finish within {cell_timeout:g} seconds"
    if stopped.why == "died":
        return "the process died in this cell (out of memory, or a crash)"
    return f"this cell was stopped: {stopped}"


def _is_check(cell) -> bool:
    return bool(cell.metadata.get("nbgrader", {}).get("grade"))


def _checked(cell, learner: Learner, failed: str) -> Verdict:
    """The verdict on one exercise: its expression there, its check here."""
    name, expression = check_of(cell.source)
    wanted, points = find_exercise(name), int(cell.metadata.nbgrader.get("points", 1))
    try:
        attempt = learner.evaluate(expression)
    except Exception as error:  # noqa: BLE001  the learner's
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, NameError):
            why = f"its cell did not run: {failed}" if failed else (
                f"no cell of this exercise defines what is checked ({text})"
            )  # fmt: skip
        else:
            why = text
        return Verdict(name, points, 0, why, "", _first_hint(name), "not-run")
    problem, _ = judged(wanted, attempt)
    if problem is None:
        return Verdict(name, points, points)
    message = str(problem).removeprefix(f"{name}: ")
    outcome = {"not-written": "not-written", "raises": "raises"}.get(problem.misconception, "wrong")
    hint = _sentence(problem.hint) or _first_hint(name)
    return Verdict(name, points, 0, message, problem.misconception, hint, outcome)


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if not text or text.endswith((".", "!", "?")) else text + "."


def _stopped(cell, why: str) -> Verdict:
    return replace(_not_run(cell), message=why, outcome="stopped")


def _not_run(cell) -> Verdict:
    name, points = exercise_of(grade_id(cell)), int(cell.metadata.nbgrader.get("points", 1))
    why = "not run: the notebook used up its time, or its process kept dying"
    return Verdict(name, points, 0, why, "", _first_hint(name), "not-run")


def _first_hint(name: str) -> str:
    return f'hint("{name}", 1) in a cell'


def check_of(source: str) -> tuple[str, str]:
    """The exercise and the expression that a canonical check cell hands to `check`.

    Raises:
        GradingFailed: the cell has no such call; the canonical notebook is not one of ours.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check":
            match node.args:
                case [ast.Constant(value=str(name)), expression]:
                    return name, ast.unparse(expression)
    raise GradingFailed(f"a canonical check cell without check(name, ...): {source!r:.100}")
