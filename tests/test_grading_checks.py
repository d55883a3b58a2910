"""What a learner is told: checks, hints, differences, exceptions, recorded runs."""

import math
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.trace import first_divergence
from llmopt_lab.grading import NotYet, check, hint
from llmopt_lab.grading.checks import (
    exercise,
    exercises_of,
    expect,
    expect_no_nan,
    expect_numbers,
    expect_same_run,
    expect_stored,
    expect_untouched,
    find_exercise,
)

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
sys.path.insert(0, str(FIXTURES))
import demo_attempts  # noqa: E402
import demo_checks  # noqa: E402

HINTS = ("look here", "look there")


def refused(name: str, attempt) -> NotYet:
    with pytest.raises(NotYet) as found:
        check(name, attempt)
    return found.value


def ceil_div_stub(a, b):
    # YOUR CODE HERE
    raise NotImplementedError()


def reads_past_the_end(a, b):
    blocks = [a, b]
    return blocks[2]


def test_a_right_attempt_prints_its_points(capsys):
    assert check("demo.ceil_div", lambda a, b: -(-a // b)) is None
    check("demo.running_total", demo_checks.running_total)
    printed = capsys.readouterr().out
    assert printed == "demo.ceil_div: done, 1 point\ndemo.running_total: done, 2 points\n"


def test_what_the_attempt_prints_is_shown(capsys):
    def talks(a, b):
        print("a is", a)
        return -(-a // b)

    check("demo.ceil_div", talks)
    assert "a is 8\n" in capsys.readouterr().out


def test_a_wrong_attempt_gets_one_paragraph_values_misconception_next_step_and_hint():
    problem = refused("demo.ceil_div", lambda a, b: a // b)
    assert str(problem) == (
        "demo.ceil_div: ceil_div(7, 4) is 1, expected 2. Misconception: forgets-the-tail. "
        'Next: the last block may be only partly filled. Stuck? hint("demo.ceil_div", 1)'
    )
    assert problem._render_traceback_() == [f"NotYet: {problem}"]


@pytest.mark.parametrize("attempt", [ceil_div_stub, None, ...])
def test_a_stub_is_not_written_yet(attempt):
    problem = refused("demo.ceil_div", attempt)
    assert problem.misconception == "not-written"
    assert "not written yet" in str(problem)


def test_a_raising_attempt_is_shown_its_own_line_and_not_our_stack():
    problem = refused("demo.ceil_div", reads_past_the_end)
    line = reads_past_the_end.__code__.co_firstlineno + 2
    assert problem.misconception == "raises"
    assert f"IndexError: list index out of range at line {line}: `return blocks[2]`" in str(problem)
    assert problem.__cause__.__class__ is IndexError


def test_an_error_inside_the_library_is_placed_at_the_learners_line():
    def multiplies_shapes_that_do_not_fit(a, b):
        return torch.ones(2, 3) @ torch.ones(2, 3)

    problem = refused("demo.ceil_div", multiplies_shapes_that_do_not_fit)
    assert "`return torch.ones(2, 3) @ torch.ones(2, 3)`" in str(problem)


def test_an_operator_that_torch_lacks_is_not_taken_for_an_unwritten_stub():
    def copies_what_is_not_there(a, b):
        return torch.empty(2, device="meta").to("cpu")

    with pytest.raises(NotImplementedError):
        copies_what_is_not_there(1, 2)
    assert refused("demo.ceil_div", copies_what_is_not_there).misconception == "raises"


def test_sys_exit_in_an_attempt_does_not_end_the_session():
    assert "SystemExit" in str(refused("demo.ceil_div", lambda a, b: sys.exit(3)))


def test_a_keyboard_interrupt_is_the_learners_own():
    def interrupted(a, b):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check("demo.ceil_div", interrupted)


@pytest.mark.parametrize("attempt", [lambda a: a, 3])
def test_a_wrong_signature_or_type_says_to_keep_the_stubs(attempt):
    problem = refused("demo.ceil_div", attempt)
    assert problem.misconception == "signature-or-type"
    assert "Keep the stub's signature" in str(problem)


def test_an_attempt_that_changes_its_arguments_does_not_break_the_next_check(capsys):
    for _ in range(2):
        check("demo.running_total", demo_attempts.counts_down)
    assert capsys.readouterr().out.count("done") == 2


def test_a_recorded_attempt_is_told_the_first_step_that_differs_and_carries_both_runs():
    problem = refused("demo.running_total", demo_attempts.adds_every_number)
    reference, attempt, frames, *kinds = problem.runs
    assert frames is demo_checks.frames and not kinds
    parting = first_divergence(reference, attempt)
    assert parting.index == 1
    assert str(parting) in str(problem)


def test_a_recorded_attempt_that_raises_keeps_its_run_until_then():
    problem = refused("demo.running_total", demo_attempts.stops_in_the_middle)
    assert problem.misconception == "raises"
    assert "IndexError" in str(problem) and "your run is already over" in str(problem)
    assert len(problem.runs[1]) == 1


def test_a_run_is_compared_only_in_the_kinds_named():
    class Other(demo_checks.Record):
        pass

    got, want = expect_same_run(
        "sum", demo_attempts.adds_every_number, demo_checks.running_total, lambda: ([1, 2],),
        "", frames=demo_checks.frames, kinds=(Other,),
    )  # fmt: skip
    assert (got, want) == (3, 2)


def test_hints_are_counted_from_one_and_name_the_stronger_one(capsys):
    hint("demo.ceil_div")
    first = capsys.readouterr().out
    assert "hint 1 of 2: 7 tokens" in first and 'hint("demo.ceil_div", 2)' in first
    hint("demo.ceil_div", 2)
    assert "stronger" not in capsys.readouterr().out


@pytest.mark.parametrize("number", [0, 3, -1])
def test_a_hint_that_does_not_exist_says_which_do(number):
    with pytest.raises(BadInput, match="has 2 hints"):
        hint("demo.ceil_div", number)


def test_an_unknown_exercise_names_the_closest_and_lists_the_others():
    with pytest.raises(BadInput, match="Did you mean 'demo.ceil_div'") as error:
        check("demo.ceildiv", None)
    assert "demo.running_total" in str(error.value)


def test_an_unknown_room_says_so():
    with pytest.raises(BadInput, match="no room with exercises 'dmeo'"):
        check("dmeo.ceil_div", None)


def test_a_name_without_a_room_says_how_exercises_are_called():
    with pytest.raises(BadInput, match="room.function"):
        find_exercise("ceil_div")


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("Demo.x", {}, "room.function"),
        ("demo", {}, "room.function"),
        ("demo.x", {"points": 0}, "positive"),
        ("demo.x", {"minutes": -1}, "positive"),
        ("demo.x", {"hints": ("only one",)}, "two hints"),
        ("demo.x", {"hints": ("one", "")}, "two hints"),
    ],
)
def test_a_malformed_exercise_is_refused(name, settings, complaint):
    with pytest.raises(BadInput, match=complaint):
        exercise(name, **{"points": 1, "minutes": 1, "hints": HINTS, **settings})


def test_a_name_that_another_file_registered_is_refused():
    register = exercise("demo.ceil_div", points=1, minutes=1, hints=HINTS)
    with pytest.raises(BadInput, match="registered already"):
        register(lambda attempt: None)
    assert len(exercises_of("demo")) == 3


nan, inf = math.nan, math.inf
T = torch.tensor


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (T([1, 2]), T([1, 2])),
        (T([1, 2], dtype=torch.int32), T([1, 2])),
        (T([1.0, nan, inf]), T([1.0, nan, inf])),
        (T([1.0000001]), T([1.0], dtype=torch.float64)),
        (T([0.5], dtype=torch.bfloat16), T([0.501])),
        (T([True]), T([True])),
        (T([]), T([])),
        (T(5), 5),
        (5.0, 5),
        (0.1 + 0.2, 0.3),
        ("a", "a"),
        ([1, [2, 3]], [1, [2, 3]]),
        ((1, 2), [1, 2]),
        (T([1, 2]), [1, 2]),
        ({"a": T([1])}, {"a": T([1])}),
        (None, None),
        (True, True),
    ],
)
def test_equal_values_are_accepted(got, want):
    expect("x", got, want, "hint")


@pytest.mark.parametrize(
    ("got", "want", "text"),
    [
        (T([[1, 2], [3, 5]]), T([[1, 2], [4, 6]]), "x[1, 0] is 3, expected 4; 2 of 4 values"),
        (T([nan, 2.0, nan]), T([1.0, 2.0, 3.0]), "is nan, expected 1; 2 of 3 values differ, 2 of"),
        (T([1.0]), T([1.001]), "x[0] is 1, expected 1.001"),
        (T([2**60 + 1]), T([2**60]), "x[0] is 1152921504606846977, expected 1152921504606846976"),
        (T([True, False]), T([True, True]), "x[1] is False, expected True"),
        (T([1.0]), T([1]), "x holds floats (torch.float32), expected integers"),
        (T([1]), T([True]), "x holds integers (torch.int64), expected bools"),
        (T([1, 2]), T([[1, 2]]), "x has shape (2,), expected (1, 2)"),
        ([1, 2], T([1, 2]), "x is of type list, expected a tensor of shape (2,)"),
        (T(3), T(4), "x is 3, expected 4"),
        (3, 4, "x is 3, expected 4"),
        (3.1, 3.2, "x is 3.1, expected 3.2"),
        (True, 1, "x is True, of type bool; expected the number 1"),
        ("3", 3, "of type str; expected the number 3"),
        ("a", "b", "x is 'a', expected 'b'"),
        (1, True, "x is 1, expected True"),
        ([1, 2], [1, 3], "x[1] is 2, expected 3"),
        ([1], [1, 3], "x has 1 entries, expected 2: [1, 3]"),
        ([1, 2, 3], [1, 2], "x has 3 entries, expected 2"),
        (5, [5], "x is 5, expected [5]"),
        ([[1], [2]], [[1], [9]], "x[1][0] is 2, expected 9"),
        ({"a": 1}, {"a": 2}, "x['a'] is 1, expected 2"),
        ({}, {"a": 2}, "x lacks ['a']"),
        ({"a": 2, "b": 1}, {"a": 2}, "x has ['b'], which should not be there"),
        (None, T([1]), "x is None, expected tensor([1])"),
        ([None], [1], "x[0] is None, of type NoneType; expected the number 1"),
    ],
)  # fmt: skip
def test_a_difference_is_named_where_it_is(got, want, text):
    with pytest.raises(NotYet) as error:
        expect("x", got, want, "look there")
    assert text in str(error.value)
    step = "look there." if got is not None else "does your function end in a return?"
    assert str(error.value).endswith(f"Next: {step}")


def test_an_exact_dtype_can_be_asked_for():
    expect("x", T([1], dtype=torch.int32), T([1]), "h", dtype=torch.int32)
    with pytest.raises(NotYet, match=r"x has dtype torch.int64, expected torch.int32"):
        expect("x", T([1]), T([1]), "h", dtype=torch.int32)


NONE, SOME = torch.full((2, 3), torch.nan), torch.tensor([1.0, torch.nan])
BLANK, SPILT = torch.tensor([False, False]), torch.tensor([False, True])
ASTRAY = "writes-nothing-or-reads-astray"


@pytest.mark.parametrize(
    "look, good, bad, misconception, text",
    [
        (lambda out: expect_stored("2 rows", "out", out, "store it"),
         SOME, NONE, "stores-nothing", "2 rows: nothing was written to out"),
        (lambda out: expect_numbers("2 rows", "y", out, "store it"),
         SOME, NONE, ASTRAY, "2 rows: every number of y is NaN"),
        (lambda out: expect_no_nan("2 rows", out, "store it", misconception="m"),
         SOME[:1], SOME, "m", "2 rows: 1 of 2 numbers are NaN"),
        (lambda touched: expect_untouched("2 rows", "y", touched, "store it", misconception="m"),
         BLANK, SPILT, "m", "2 rows: something was written outside of y"),
    ],
    ids=["stored", "numbers", "no NaN", "untouched"],
)  # fmt: skip
def test_what_was_not_written_or_written_astray_is_named(look, good, bad, misconception, text):
    look(good)
    with pytest.raises(NotYet) as raised:
        look(bad)
    told = raised.value
    assert (told.message, told.misconception, told.hint) == (text, misconception, "store it")


@pytest.mark.notebook
def test_in_a_notebook_both_runs_are_drawn_and_the_error_is_one_line_without_a_stack(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{FIXTURES}")
    source = (
        "import demo_checks\n"
        "from demo_attempts import adds_every_number\n"
        "from llmopt_lab.grading import check\n"
        'check("demo.running_total", adds_every_number)'
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, allow_errors=True, timeout=60, kernel_name="python3").execute()
    drawn, error = notebook.cells[0].outputs
    assert drawn.output_type == "display_data"
    assert "image/svg" in drawn.data["text/html"]
    assert "total 5" in str(drawn.data) or "add 3" in str(drawn.data)
    assert error.ename == "NotYet"
    assert len(error.traceback) == 1 and error.traceback[0].startswith("NotYet: demo.running_total")
    assert "step 1: expected: add 4, total 6; yours: add 3, total 5" in error.traceback[0]
