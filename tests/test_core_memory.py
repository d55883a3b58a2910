"""The two-level memory: what load and store move, and how much of it they count."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmopt_lab.core.cost import EagerTraffic
from llmopt_lab.core.memory import Load, Store, ceil_div, load, store, tiles
from llmopt_lab.core.trace import recording


@pytest.mark.parametrize(
    ("where", "n_elements", "text"),
    [
        (slice(0, 3), 3 * 5, "0:3"),
        (slice(None), 4 * 5, ":"),
        (slice(2, None), 2 * 5, "2:"),
        (1, 5, "1"),
        ((1, slice(0, 2)), 2, "1, 0:2"),
        ((slice(0, 10), slice(3, 10)), 4 * 2, "0:10, 3:10"),
        (torch.tensor([3, 0, 3]), 3 * 5, "[3, 0, 3]"),
        (torch.tensor([True, False, False, True]), 2 * 5, "[True, False, False, True]"),
        ((2, 4), 1, "2, 4"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int8])
def test_load_and_store_count_the_bytes_of_exactly_what_they_move(where, n_elements, text, dtype):
    x = torch.arange(20).view(4, 5).to(dtype)
    before = x.clone()
    with recording() as trace:
        tile = load("x", x, where)
        store("x", x, where, tile * 0 + 9)
    assert torch.equal(tile, before[where]) or torch.equal(tile, torch.full_like(tile, 9))  # a view
    assert (x[where] == 9).all() and int((x == 9).sum() - (before == 9).sum()) <= n_elements
    assert trace.total("nbytes", Load) == n_elements * dtype.itemsize
    assert trace.total("nbytes", Store) == n_elements * dtype.itemsize
    assert [str(step.what).split("  ")[0] for step in trace.steps] == ["load", f"store x[{text}]"]
    assert f"x[{text}]" in str(trace.steps[0].what)


def test_a_store_broadcasts_and_counts_what_it_writes_not_what_it_was_given():
    x = torch.zeros(3, 4)
    with recording() as trace:
        store("x", x, slice(0, 2), torch.tensor(1.0))
    assert x.sum() == 8 and trace.total("nbytes", Store) == 2 * 4 * 4


def test_load_and_store_work_without_a_trace():
    x = torch.zeros(3)
    store("x", x, 1, torch.tensor(2.0))
    assert load("x", x, 1) == 2.0


@given(length=st.integers(0, 200), size=st.integers(1, 50))
def test_tiles_cover_every_index_once_and_in_order(length, size):
    cut = list(tiles(length, size))
    assert [i for tile in cut for i in range(tile.start, tile.stop)] == list(range(length))
    assert all(tile.stop - tile.start == size for tile in cut[:-1])
    assert len(cut) == ceil_div(length, size)


@given(a=st.integers(0, 10**18), b=st.integers(1, 10**9))
def test_ceil_div_is_exact_for_large_integers(a, b):
    assert ceil_div(a, b) * b >= a > (ceil_div(a, b) - 1) * b


def test_eager_traffic_counts_each_operators_inputs_and_result():
    a, b = torch.zeros(8, 16), torch.zeros(16, 4)
    with EagerTraffic() as traffic:
        c = a @ b
        c.t().contiguous()
    assert traffic.read == (8 * 16 + 16 * 4 + 8 * 4) * 4
    assert traffic.written == (8 * 4 + 8 * 4) * 4


def test_eager_traffic_counts_no_byte_for_a_view():
    with EagerTraffic() as traffic:
        torch.Tensor.view(torch.Tensor.t(torch.ones(4, 4)), 4, 4)[1:]
    assert (traffic.read, traffic.written) == (0, 4 * 4 * 4)  # only `ones` writes
