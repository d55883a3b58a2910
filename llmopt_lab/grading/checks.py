"""One check per exercise. Notebooks, `llmopt grade` and the tests all run these.

A room's checks live in `llmopt_lab/grading/<room>.py` and are imported when first asked for:

    @exercise("paged_attention.slot_mapping", points=2, minutes=10, hints=("...", "..."))
    def _(slot_mapping):
        got = slot_mapping(torch.tensor([5, 2]), n_tokens=7, block_size=4)
        expect("slots", got, torch.tensor([20, 21, 22, 23, 8, 9, 10]),
               "the last block is only partly filled", misconception="forgets-the-tail")

A check makes fresh inputs on every call, so an attempt may change its arguments without harm to
the next one. `expect_same_run` compares what two functions recorded and shows both runs.
"""

import difflib
import importlib
import inspect
import math
import numbers
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from llmopt_lab.core.close import TOLERANCE
from llmopt_lab.core.device import prepare_triton
from llmopt_lab.core.errors import BadInput, require
from llmopt_lab.core.trace import Record, Trace, first_divergence, recording

PACKAGE = Path(__file__).resolve().parents[1]
Mistake = tuple[str, object, str]  # its name, what it gives, where to look next


@dataclass(frozen=True)
class Exercise:
    """One graded exercise and the function that checks an attempt at it."""

    name: str  # "room.function"
    points: int
    minutes: int
    hints: tuple[str, ...]  # each stronger than the one before
    check: Callable[[object], None]  # raises NotYet, or returns


class NotYet(AssertionError):
    """The attempt does not do it yet.

    `message` says what is wrong with the values, `misconception` names the mistake
    ("forgets-the-tail"), `hint` says where to look next. With two traces and `frames` (a room's
    `view.frames`), a notebook shows both runs at the first step where records of `kinds` differ.
    """

    def __init__(
        self,
        message: str,
        *,
        misconception: str = "",
        hint: str = "",
        reference: Trace | None = None,
        attempt: Trace | None = None,
        frames: Callable | None = None,
        kinds: tuple[type[Record], ...] = (),
    ):
        super().__init__(message)
        self.message = message
        self.misconception = misconception
        self.hint = hint
        self.runs = (reference, attempt, frames, *kinds) if frames is not None else ()
        self.exercise = ""  # check() fills it in

    def __str__(self) -> str:
        """One paragraph. nbval_points reads the misconception and the next step back out of it."""
        prefix = f"{self.exercise}: " if self.exercise else ""
        parts = [prefix + _sentence(self.message)]
        if self.misconception:
            parts.append(f"Misconception: {self.misconception}.")
        if self.hint:
            parts.append(f"Next: {_sentence(self.hint)}")
        if self.exercise:
            parts.append(f'Stuck? hint("{self.exercise}", 1)')
        return " ".join(" ".join(parts).split())

    def _render_traceback_(self) -> list[str]:
        """IPython shows this instead of a stack through our code."""
        return [f"NotYet: {self}"]


_exercises: dict[str, Exercise] = {}


def exercise(
    name: str, *, points: int, minutes: int, hints: tuple[str, ...]
) -> Callable[[Callable], Callable]:
    """Register the decorated function as the check of `name`, a "room.function".

    Raises:
        BadInput: the name is malformed or taken, points or minutes are not positive, or there are
            fewer than two hints.
    """
    require(
        re.fullmatch(r"[a-z]\w*\.[a-z]\w*", name) is not None,
        f'an exercise is called "room.function"; got {name!r}',
    )
    require(
        points > 0 and minutes > 0,
        f"{name}: points and minutes must be positive; got {points} and {minutes}",
    )
    require(
        len(hints) >= 2 and all(hints),
        f"{name}: give at least two hints, the second stronger; got {len(hints)}",
    )

    def register(run: Callable) -> Callable:
        taken = _exercises.get(name)
        require(
            taken is None or _file_of(taken.check) == _file_of(run),
            f"{name} is registered already, in {_file_of(taken.check) if taken else ''}",
        )
        _exercises[name] = Exercise(name, points, minutes, hints, run)
        return run

    return register


def exercises_of(room: str) -> list[Exercise]:
    """The exercises of one room, in the order of their file. Imports `grading/<room>.py`."""
    _import_checks(room)
    return [e for e in _exercises.values() if e.name.partition(".")[0] == room]


def find_exercise(name: str) -> Exercise:
    """The exercise of that name.

    Raises:
        BadInput: there is none; the message lists those of the room, the closest first.
    """
    require(
        isinstance(name, str) and "." in name,
        f'an exercise is called "room.function", a string; got {name!r}',
    )
    room = name.partition(".")[0]
    known = [e.name for e in exercises_of(room)]
    if known:
        kind, wrong = "exercise", name
    else:
        kind, wrong, known = "room with exercises", room, _known_rooms()
    if name not in _exercises:
        close = difflib.get_close_matches(wrong, known, 1, 0.5)
        meant = f" Did you mean {close[0]!r}?" if close else ""
        raise BadInput(f"there is no {kind} {wrong!r}.{meant} There are: {', '.join(known)}.")
    return _exercises[name]


def check(name: str, attempt) -> None:
    """Check one attempt, a function or a value: print its points, or raise `NotYet`.

    What the attempt prints is shown. Cost: seconds at most.

    Raises:
        NotYet: what is wrong, the misconception, where to look next.
        BadInput: there is no exercise of that name.
    """
    wanted = find_exercise(name)
    problem, cause = judged(wanted, attempt)
    if problem is None:
        print(f"{name}: done, {wanted.points} point{'s' if wanted.points != 1 else ''}")
        return
    _show_runs(problem)
    # the frames below this one are ours and would bury the message
    raise problem.with_traceback(None) from cause


def judged(wanted: Exercise, attempt) -> tuple[NotYet | None, BaseException | None]:
    """The problem with an attempt, if any, and the exception behind it. Prints nothing itself."""
    if attempt is None or attempt is ...:
        problem, cause = _not_written(), None
    else:
        problem, cause = _run(wanted, attempt)
    if problem is not None:
        problem.exercise = wanted.name
    return problem, cause


def hint(name: str, number: int = 1) -> None:
    """Print one of an exercise's hints, counted from 1.

    Raises:
        BadInput: there is no such exercise, or it has no hint of that number.
    """
    hints = find_exercise(name).hints
    require(
        isinstance(number, int) and 1 <= number <= len(hints),
        f'{name} has {len(hints)} hints, hint("{name}", 1) to hint("{name}", {len(hints)}); '
        f"got {number!r}",
    )
    more = f'\n(stronger: hint("{name}", {number + 1}))' if number < len(hints) else ""
    print(f"{name}, hint {number} of {len(hints)}: {hints[number - 1]}{more}")


def expect(
    what: str,
    got,
    want,
    hint: str,
    *,
    misconception: str = "",
    dtype: torch.dtype | None = None,
) -> None:
    """Raise `NotYet` unless `got` equals `want`; `what` names it, `hint` says where to look next.

    Tensors must agree in shape, in kind (float, integer, bool; or exactly in `dtype` if given)
    and in value, floats within core.close's table for the dtype of `got`; `want` may be of higher
    precision. Numbers, strings, lists, tuples and dicts compare by value, floats within the
    float32 row.
    """
    if got is None and want is not None:
        raise NotYet(
            f"{what} is None, expected {_short(want)}",
            misconception="returns-nothing",
            hint="does your function end in a return?",
        )
    if difference := _difference(what, got, want, dtype):
        raise NotYet(difference, misconception=misconception, hint=hint)


def expect_or_name(
    what: str, got, want, hint: str, mistakes: Sequence[Mistake] = (), **exactly
) -> None:
    """`expect`, but a value that one of the mistakes gives is named after that mistake."""
    for misconception, wrong, where_to_look in mistakes:
        if not _same(wrong, want) and _same(got, wrong):
            expect(what, got, want, where_to_look, misconception=misconception, **exactly)
    expect(what, got, want, hint, **exactly)


def expect_parts(got, *parts: str) -> None:
    """`got` is a tuple or list of as many values as there are names of parts."""
    if not isinstance(got, (tuple, list)) or len(got) != len(parts):
        raise NotYet(
            f"your answer is {got!r}, expected ({', '.join(parts)})",
            misconception="returns-other-things",
            hint=f"return {len(parts)} things, separated by commas, in this order",
        )


def expect_kernel(name: str, kernel) -> None:
    """`kernel`, called `name`, is a Triton kernel, and somebody has written it."""
    text = getattr(kernel, "text", None)  # of one that runs in another process
    source = text or getattr(kernel, "fn", None)
    if source is None:
        raise NotYet(
            f"{name} is of type {type(kernel).__name__}, not a Triton kernel",
            misconception="not-a-kernel", hint="keep the line @triton.jit above it",
        )  # fmt: skip
    text = text or inspect.getsource(source)
    if "raise NotImplementedError" in text:  # a compiler would object to it
        raise _not_written()


def expect_stored(what: str, name: str, out: torch.Tensor, hint: str) -> None:
    """A reference has stored something in `out`, called `name`, which was NaN before."""
    if out.isnan().all():
        raise NotYet(
            f"{what}: nothing was written to {name}", misconception="stores-nothing", hint=hint
        )


def expect_numbers(what: str, name: str, out: torch.Tensor, hint: str) -> None:
    """A kernel has left a number in `out`, called `name`, which stands in memory of NaN."""
    if out.isnan().all():
        raise NotYet(
            f"{what}: every number of {name} is NaN",
            misconception="writes-nothing-or-reads-astray",
            hint=hint,
        )


def expect_no_nan(what: str, got: torch.Tensor, hint: str, *, misconception: str) -> None:
    """No number of `got` is NaN."""
    if got.isnan().any():
        raise NotYet(
            f"{what}: {int(got.isnan().sum())} of {got.numel()} numbers are NaN",
            misconception=misconception,
            hint=hint,
        )


def expect_untouched(
    what: str, name: str, touched: torch.Tensor, hint: str, *, misconception: str
) -> None:
    """Nothing around the output called `name` was written: no element of `touched` is true."""
    if touched.any():
        raise NotYet(
            f"{what}: something was written outside of {name}",
            misconception=misconception,
            hint=hint,
        )


@contextmanager
def launched() -> Iterator[None]:
    """Around a launch: what the learner's line raised, without the interpreter's wrapping."""
    prepare_triton()
    try:
        yield
    except Exception as error:
        if error.__cause__ is not None:
            raise error.__cause__ from None
        raise


def expect_same_run(
    what: str,
    attempt: Callable,
    reference: Callable,
    make_inputs: Callable[[], tuple],
    hint: str,
    *,
    frames: Callable[[Trace], list],
    kinds: tuple[type[Record], ...] = (),
    misconception: str = "",
) -> tuple:
    """Run both functions on inputs of their own, each recorded; return what they return.

    Raises `NotYet` at the first step at which they recorded something else (compared only in the
    record `kinds` named, if any), or where the attempt raised. It carries both runs, so a notebook
    shows them side by side. Returns (result of the attempt, result of the reference).
    """
    with recording() as reference_trace:
        want = reference(*make_inputs())
    raised = None
    with recording() as attempt_trace:
        try:
            got = attempt(*make_inputs())
        except NotImplementedError:
            raise
        except (Exception, SystemExit) as error:
            raised = error
    parting = first_divergence(reference_trace, attempt_trace, *kinds)
    if raised is None and parting is None:
        return got, want
    if raised is None:
        message = f"{what} goes another way than the reference at {parting}"
    else:
        message = _raised_text(raised, learners_frame(raised))
        message += f" Until then: {parting}" if parting else ""
    raise NotYet(
        message,
        misconception="raises" if raised else misconception,
        hint=hint,
        reference=reference_trace,
        attempt=attempt_trace,
        frames=frames,
        kinds=kinds,
    ) from raised


def _same(got, want) -> bool:
    try:
        expect("", got, want, "")
    except NotYet:
        return False
    return True


def _run(wanted: Exercise, attempt) -> tuple[NotYet | None, BaseException | None]:
    """The problem with an attempt, if any, and the exception behind it."""
    try:
        wanted.check(attempt)
    except NotYet as problem:
        return problem, problem.__cause__
    except (Exception, SystemExit) as error:
        return _explain(error, wanted), error
    return None, None


def _not_written() -> NotYet:
    return NotYet(
        "not written yet. Replace the line that raises NotImplementedError by your own code",
        misconception="not-written",
    )


def _explain(error: BaseException, wanted: Exercise) -> NotYet:
    """The learner's own exception, with the line of THEIR code and without our stack."""
    frame = learners_frame(error, but_not=_file_of(wanted.check))
    if frame is None:
        return NotYet(
            f"the check could not use your answer: {_named(error)}. Keep the stub's signature, "
            "and return what its docstring says",
            misconception="signature-or-type",
        )
    # torch raises NotImplementedError too, for operators that a device lacks
    if isinstance(error, NotImplementedError) and (
        not str(error) or (frame.line or "").startswith("raise")
    ):
        return _not_written()
    return NotYet(
        _raised_text(error, frame),
        misconception="raises",
        hint="run that line by itself in a cell, on an example small enough to check by hand",
    )


def _raised_text(error: BaseException, frame: traceback.FrameSummary | None) -> str:
    where = f" at line {frame.lineno}: `{frame.line}`" if frame else ""
    return f"your code raised {_named(error)}{where}."


def _named(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def learners_frame(error: BaseException, but_not: str = "") -> traceback.FrameSummary | None:
    """The deepest frame that is the learner's: not a library's, not ours, not the check's."""
    if there := getattr(error, "frame_there", None):  # raised in another process
        return traceback.FrameSummary("there", int(there[0]), "", line=str(there[1])[:200])
    libraries = {sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")}
    libraries |= {str(PACKAGE)}

    def is_learners(file: str) -> bool:
        if file == but_not:
            return False
        if file.startswith("<"):  # generated code, but older IPythons name cells so
            return file.startswith("<ipython-input")
        return not any(Path(file).is_relative_to(folder) for folder in libraries)

    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_learners(f.filename)]
    return frames[-1] if frames else None


def _file_of(function: Callable) -> str:
    return getattr(getattr(function, "__code__", None), "co_filename", "")


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else text + "."


def _import_checks(room: str) -> None:
    if room in _known_rooms():
        importlib.import_module(f"llmopt_lab.grading.{room}")


def _known_rooms() -> list[str]:
    """The files beside this one that register exercises."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [file.stem for file in files if re.search(r"^@exercise\(", file.read_text(), re.M)]


def _show_runs(problem: NotYet) -> None:
    """In a notebook, draw both runs side by side; elsewhere the message must do."""
    if not problem.runs or "IPython" not in sys.modules:
        return
    from IPython import get_ipython
    from IPython.display import display

    if get_ipython() is None:
        return
    from llmopt_lab.widgets.player import compare

    try:
        display(compare(*problem.runs))
    except Exception as error:  # noqa: BLE001  an attempt may record what no view can draw
        print(f"(The two runs cannot be drawn: {_named(error)})")


def _difference(what: str, got, want, dtype: torch.dtype | None = None) -> str:
    """What is different, in words; empty if nothing is."""
    if isinstance(want, torch.Tensor):
        return _tensor_difference(what, got, want, dtype)
    if isinstance(want, Mapping):
        return _mapping_difference(what, got, want)
    if isinstance(want, Sequence) and not isinstance(want, str):
        return _sequence_difference(what, got, want)
    if isinstance(got, torch.Tensor) and got.numel() == 1:
        got = got.item()
    if isinstance(want, numbers.Real) and not isinstance(want, bool):
        if not isinstance(got, numbers.Real) or isinstance(got, bool):
            return (
                f"{what} is {_short(got)}, of type {type(got).__name__}; expected the number {want}"
            )
        rtol, atol, _ = TOLERANCE[torch.float32] if isinstance(want, float) else (0.0, 0.0, 0.0)
        same = math.isclose(got, want, rel_tol=rtol, abs_tol=atol) or got != got and want != want
        return "" if same else f"{what} is {_short(got)}, expected {_short(want)}"
    same = type(got) is type(want) and got == want
    return "" if same else f"{what} is {_short(got)}, expected {_short(want)}"


def _tensor_difference(what: str, got, want: torch.Tensor, dtype: torch.dtype | None) -> str:
    if not isinstance(got, torch.Tensor):
        return (
            f"{what} is of type {type(got).__name__}, "
            f"expected a tensor of shape {tuple(want.shape)}"
        )
    if got.shape != want.shape:
        return f"{what} has shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if dtype is not None and got.dtype != dtype:
        return f"{what} has dtype {got.dtype}, expected {dtype}"
    if _kind(got) != _kind(want):
        return f"{what} holds {_kind(got)} ({got.dtype}), expected {_kind(want)}"
    ours, theirs = want.detach().cpu(), got.detach().cpu()
    if _kind(want) == "floats":
        ours, theirs = ours.double(), theirs.double()
        rtol, atol, _ = TOLERANCE[got.dtype]
        wrong = ~torch.isclose(theirs, ours, rtol, atol, equal_nan=True)
    else:
        wrong = theirs.to(torch.int64) != ours.to(torch.int64)
    if not wrong.any():
        return ""
    index = tuple(wrong.nonzero()[0].tolist())
    n_nan = int((theirs.isnan() & ~ours.isnan()).sum())
    place = f"{what}[{', '.join(map(str, index))}]" if index else what
    counted = f"; {int(wrong.sum())} of {wrong.numel()} values differ" if wrong.numel() > 1 else ""
    if n_nan:
        counted += f", {n_nan} of {wrong.numel()} are NaN"
    return (
        f"{place} is {_short(theirs[index].item())}, expected {_short(ours[index].item())}{counted}"
    )


def _kind(tensor: torch.Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "bools"
    return "floats" if tensor.is_floating_point() else "integers"


def _sequence_difference(what: str, got, want: Sequence) -> str:
    if isinstance(got, torch.Tensor):
        got = got.tolist()
    if not isinstance(got, Sequence) or isinstance(got, str):
        return f"{what} is {_short(got)}, expected {_short(want)}"
    for index, (a, b) in enumerate(zip(got, want, strict=False)):
        if difference := _difference(f"{what}[{index}]", a, b):
            return difference
    if len(got) != len(want):
        return f"{what} has {len(got)} entries, expected {len(want)}: {_short(want)}"
    return ""


def _mapping_difference(what: str, got, want: Mapping) -> str:
    if not isinstance(got, Mapping):
        return f"{what} is {_short(got)}, expected {_short(want)}"
    if missing := [key for key in want if key not in got]:
        return f"{what} lacks {_short(missing)}"
    if extra := [key for key in got if key not in want]:
        return f"{what} has {_short(extra)}, which should not be there"
    differences = (_difference(f"{what}[{key!r}]", got[key], want[key]) for key in want)
    return next(filter(None, differences), "")


def _short(value) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
