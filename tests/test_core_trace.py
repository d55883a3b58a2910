"""The trace: what is recorded, copied, refused, compared, saved and read back."""

import json
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from llmopt_lab.core import trace as trace_module
from llmopt_lab.core.errors import BadInput, TraceTooLarge
from llmopt_lab.core.memory import Load, Store, load, store
from llmopt_lab.core.trace import (
    MAX_ELEMENTS,
    Record,
    Trace,
    first_divergence,
    record,
    recording,
)


@dataclass(frozen=True)
class Saw(Record):
    """Something of every type a record may hold."""

    what: object


@dataclass(frozen=True)
class Counted(Record):
    """A number, under a caption."""

    n: int

    def __str__(self) -> str:
        return f"counted {self.n}"


def trace_of(*records: Record) -> Trace:
    with recording() as trace:
        for each in records:
            record(each)
    return trace


def test_nothing_is_recorded_without_an_open_trace():
    record(Counted(1))
    assert len(trace_of()) == 0


def test_steps_come_in_order_and_print_as_captions():
    trace = trace_of(Counted(3), Counted(1))
    assert [step.index for step in trace.steps] == [0, 1]
    assert str(trace) == "   0  counted 3\n   1  counted 1"


def test_a_step_knows_the_line_that_recorded_it():
    trace = trace_of(Counted(1))
    step = trace.steps[0]
    assert Path(step.file).name == "test_core_trace.py"
    assert Path(step.file).read_text().splitlines()[step.line - 1].strip() == "record(each)"


def test_a_load_is_attributed_to_the_algorithm_and_not_to_core():
    with recording() as trace:
        load("x", torch.zeros(4), slice(0, 2))
    source = Path(trace.steps[0].file).read_text().splitlines()[trace.steps[0].line - 1]
    assert source.strip() == 'load("x", torch.zeros(4), slice(0, 2))'


def test_the_innermost_of_nested_recordings_collects():
    with recording() as outer:
        record(Counted(1))
        with recording() as inner:
            record(Counted(2))
        record(Counted(3))
    assert [what.n for what in outer.of(Counted)] == [1, 3]
    assert [what.n for what in inner.of(Counted)] == [2]


def test_a_trace_is_closed_after_an_error():
    with pytest.raises(ZeroDivisionError), recording() as trace:
        record(Counted(1))
        raise ZeroDivisionError
    record(Counted(2))
    assert len(trace) == 1


def test_another_thread_does_not_write_into_this_trace():
    with recording() as trace:
        thread = threading.Thread(target=record, args=(Counted(1),))
        thread.start()
        thread.join()
    assert len(trace) == 0


def test_only_the_named_kinds_are_kept_and_numbered_without_gaps():
    with recording(Counted, Store) as trace:
        record(Saw("no"))
        record(Counted(7))
        load("x", torch.zeros(4), 0)
        store("x", torch.zeros(4), 0, torch.tensor(1.0))
    assert [type(step.what) for step in trace.steps] == [Counted, Store]
    assert [step.index for step in trace.steps] == [0, 1]


def test_a_big_tensor_of_a_kind_that_is_not_kept_is_no_error():
    with recording(Counted) as trace:
        record(Saw(torch.zeros(MAX_ELEMENTS + 1)))
    assert len(trace) == 0


def test_totals_add_up_the_named_kinds_only():
    x = torch.zeros(8, dtype=torch.float64)
    with recording() as trace:
        load("x", x, slice(0, 3))
        load("x", x, 5)
        store("x", x, slice(0, 2), torch.ones(2, dtype=torch.float64))
    assert trace.total("nbytes", Load) == 4 * 8
    assert trace.total("nbytes", Load, Store) == 6 * 8
    assert trace.total("nbytes", Counted) == 0


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, 1),
        lambda x: [x],
        lambda x: ("deep", [(x,)]),
        lambda x: Saw(x),
        lambda x: x[1:],
        lambda x: x.expand(2, -1),
    ],
)
def test_a_record_does_not_see_what_is_written_later(wrap):
    x = torch.zeros(4)
    trace = trace_of(Saw(wrap(x)))
    before = str(trace.steps[0].what)
    x.fill_(7)
    assert str(trace.steps[0].what) == before


def test_a_recorded_list_does_not_grow_with_the_callers():
    table = [1, 2]
    trace = trace_of(Saw(table))
    table.append(3)
    assert trace.steps[0].what.what == [1, 2]


def test_a_recorded_tensor_carries_no_gradient_and_lies_on_the_cpu():
    x = torch.ones(2, requires_grad=True)
    kept = trace_of(Saw(x * 2)).steps[0].what.what
    assert not kept.requires_grad and kept.device.type == "cpu"


def test_a_tensor_at_the_size_limit_is_kept_and_one_above_is_refused_by_name():
    assert len(trace_of(Saw(torch.zeros(MAX_ELEMENTS)))) == 1
    with recording() as trace:
        with pytest.raises(TraceTooLarge, match=r"Saw.what has 65,537 elements.*smaller example"):
            record(Saw(torch.zeros(MAX_ELEMENTS + 1)))
        with pytest.raises(TraceTooLarge):
            record(Saw([(torch.zeros(MAX_ELEMENTS + 1),)]))
    assert len(trace) == 0


# first_divergence


def test_equal_runs_do_not_diverge():
    a = trace_of(Saw(torch.tensor([1.0, float("nan")])), Counted(2))
    b = trace_of(Saw(torch.tensor([1.0, float("nan")])), Counted(2))
    assert first_divergence(a, b) is None
    assert first_divergence(trace_of(), trace_of()) is None


def test_the_first_different_step_is_found_and_both_sides_are_told():
    a, b = (
        trace_of(Counted(1), Counted(2), Counted(3)),
        trace_of(Counted(1), Counted(5), Counted(6)),
    )
    found = first_divergence(a, b)
    assert (found.index, found.reference.what.n, found.attempt.what.n) == (1, 2, 5)
    assert str(found) == "step 1: expected: counted 2; yours: counted 5"


def test_a_run_that_ends_early_or_goes_on_too_long_diverges_there():
    long, short = trace_of(Counted(1), Counted(2)), trace_of(Counted(1))
    assert first_divergence(long, short).attempt is None
    assert "your run is already over" in str(first_divergence(long, short))
    assert first_divergence(short, long).reference is None
    assert "the reference is done" in str(first_divergence(short, long))


def test_named_kinds_restrict_the_comparison_and_the_count():
    a = trace_of(Saw(1), Counted(1), Counted(2))
    b = trace_of(Counted(1), Saw(9), Saw(9), Counted(3))
    assert first_divergence(a, b, Counted).index == 1


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (torch.tensor([1.0]), torch.tensor([1.0 + 1e-7]), True),
        (torch.tensor([1.0]), torch.tensor([1.01]), False),
        (torch.tensor([1]), torch.tensor([[1]]), False),
        (torch.tensor([1.0], dtype=torch.float64), torch.tensor([1.0]), True),
        (torch.tensor([1]), 1, False),
        (0.5, 0.5 + 1e-8, True),
        (0.5, 0.6, False),
        ((1, torch.ones(2)), (1, torch.ones(2)), True),
        ((1, torch.ones(2)), (1, torch.ones(3)), False),
        ((1, 2), (1,), False),
        (slice(0, 2), slice(0, 2), True),
        (slice(0, 2), slice(0, 3), False),
        (Counted(1), Counted(1), True),
        (Counted(1), Counted(2), False),
        (Counted(1), Saw(1), False),
        ("a", "a", True),
        (None, 0, False),
    ],
)
def test_values_are_compared_by_what_they_hold(a, b, same):
    assert (first_divergence(trace_of(Saw(a)), trace_of(Saw(b))) is None) == same


# save and load

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=8,
)


@given(values)
def test_plain_values_survive_saving(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "plain.trace"
    trace_of(Saw(value)).save(path)
    back = Trace.load(path).steps[0].what.what
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int8,
        torch.bool,
    ],
)
def test_tensors_survive_saving_bit_by_bit(dtype, tmp_path):
    rng = torch.Generator().manual_seed(0)
    x = (torch.randn(3, 5, generator=rng) * 3).to(dtype)
    records = [Saw(x.T), Saw(x[0, 0]), Saw(x[:0]), Saw((x, [x])), Saw(x[0].expand(2, -1))]
    trace = trace_of(*records)
    trace.save(tmp_path / "t.trace")
    back = Trace.load(tmp_path / "t.trace")
    assert str(back) == str(trace)
    for want, got in zip(trace.of(Saw), back.of(Saw), strict=True):
        want, got = (want.what, got.what)
        if isinstance(want, Tensor):
            assert got.dtype == dtype and torch.equal(got, want)


def test_a_saved_trace_keeps_slices_nested_records_order_and_source_lines(tmp_path):
    x = torch.zeros(4, 4)
    with recording() as trace:
        load("x", x, (slice(0, 2), slice(None, None, 2)))
        store("x", x, torch.tensor([1, 3]), torch.ones(2, 4))
        record(Saw(Counted(4)))
    trace.save(tmp_path / "t.trace")
    back = Trace.load(tmp_path / "t.trace")
    assert str(back) == str(trace)
    assert [(s.index, s.file, s.line) for s in back.steps] == [
        (s.index, s.file, s.line) for s in trace.steps
    ]
    assert first_divergence(trace, back) is None


def test_an_empty_trace_can_be_saved(tmp_path):
    Trace().save(tmp_path / "t.trace")
    assert len(Trace.load(tmp_path / "t.trace")) == 0


def test_what_cannot_be_saved_is_refused_by_type(tmp_path):
    with pytest.raises(BadInput, match="type set cannot be saved"):
        trace_of(Saw({1, 2})).save(tmp_path / "t.trace")


def test_a_missing_file_a_broken_file_and_a_foreign_file_are_told_apart(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        Trace.load(tmp_path / "none.trace")
    (tmp_path / "broken.trace").write_bytes(b"not a trace")
    with pytest.raises(BadInput, match="is not a saved trace"):
        Trace.load(tmp_path / "broken.trace")
    save_file({"w": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(BadInput, match="holds tensors but no trace"):
        Trace.load(tmp_path / "weights.safetensors")


def saved_by_hand(path: Path, version: str, steps: list) -> Path:
    metadata = {"format": "llmopt-trace", "version": version, "steps": json.dumps(steps)}
    save_file({"empty": torch.empty(0)}, path, metadata)
    return path


def test_a_newer_format_is_refused_with_what_to_do(tmp_path):
    newer = str(trace_module.FORMAT_VERSION + 1)
    with pytest.raises(BadInput, match="Upgrade llmopt_lab"):
        Trace.load(saved_by_hand(tmp_path / "t.trace", newer, []))


def test_loading_a_trace_imports_nothing_outside_the_package(tmp_path):
    step = {"file": "f", "line": 1, "what": {"record": "antigravity:Fly", "fields": {}}}
    with pytest.raises(BadInput, match="antigravity:Fly, which this package does not have"):
        Trace.load(saved_by_hand(tmp_path / "t.trace", "1", [step]))
    import sys

    assert "antigravity" not in sys.modules
