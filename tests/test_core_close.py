"""The one tolerance table: what passes, what fails, and what the message says."""

import pytest
import torch

from llmopt_lab.core.close import TOLERANCE, assert_close

DTYPES = list(TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rounding_to_the_dtype_passes(dtype):
    want = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(want.to(dtype), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_error_of_five_percent_in_one_large_element_fails_and_is_named(dtype):
    want = torch.linspace(1, 2, 100, dtype=torch.float64)
    got = want.clone()
    got[70] *= 1.05
    with pytest.raises(AssertionError, match="attention"):
        assert_close(got.to(dtype), want, "attention")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zeros_do_not_pass_for_a_small_result(dtype):
    want = torch.full((100,), 1e-6, dtype=torch.float64)
    with pytest.raises(AssertionError, match="relative L2"):
        assert_close(torch.zeros(100, dtype=dtype), want)


def test_equal_zeros_and_empty_tensors_pass():
    assert_close(torch.zeros(3), torch.zeros(3))
    assert_close(torch.zeros(0, 4), torch.zeros(0, 4))


def test_a_nan_equals_only_a_nan():
    assert_close(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]))
    for got, want in (([float("nan")], [1.0]), ([1.0], [float("nan")])):
        with pytest.raises(AssertionError):
            assert_close(torch.tensor(got), torch.tensor(want))


def test_infinities_are_compared_by_sign():
    assert_close(torch.tensor([1.0, -torch.inf]), torch.tensor([1.0, -torch.inf]))
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1.0, torch.inf]), torch.tensor([1.0, -torch.inf]))


def test_a_shape_is_not_broadcast():
    with pytest.raises(AssertionError, match=r"out: shape \(3, 1\), expected \(3,\)"):
        assert_close(torch.zeros(3, 1), torch.zeros(3), "out")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_integers_must_be_equal(dtype):
    assert_close(torch.tensor([0, 1]).to(dtype), torch.tensor([0, 1]))
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([0, 1]).to(dtype), torch.tensor([1, 1]))


def test_an_oracle_of_zeros_is_judged_by_atol_alone():
    assert_close(torch.full((3,), 1e-6), torch.zeros(3))
    with pytest.raises(AssertionError):
        assert_close(torch.full((3,), 1e-4), torch.zeros(3))
