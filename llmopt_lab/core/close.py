"""One tolerance table for the whole course. Tests compare with an oracle of higher precision."""

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """How far a result may be from its oracle: each element, and the whole tensor."""

    rtol: float
    atol: float
    norm: float  # of the relative L2 error: catches what a small result hides under atol


# dtype of the result under test. One rounding of an operand of magnitude 1 costs 2^-53, 2^-24,
# 2^-11 and 2^-8 in these dtypes; sums of a few thousand such terms stay within these.
TOLERANCE = {
    torch.float64: Tolerance(1e-10, 1e-10, 1e-10),
    torch.float32: Tolerance(1e-4, 1e-5, 2e-5),  # a tf32 product misses this by 10x
    torch.float16: Tolerance(2e-3, 2e-3, 2e-3),
    torch.bfloat16: Tolerance(1.6e-2, 1.6e-2, 1e-2),
}


def assert_close(got: Tensor, want: Tensor, what: str = "result") -> None:
    """Raise AssertionError unless `got` equals the oracle `want` within the table's tolerance.

    The tolerance follows the dtype of `got`; `want` may be of higher precision, both are compared
    in float64. Shapes must be equal; NaN equals only NaN; integers and bools must be equal.
    """
    if got.shape != want.shape:
        raise AssertionError(f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if got.dtype not in TOLERANCE:
        if not torch.equal(got.cpu(), want.cpu().to(got.dtype)):
            raise AssertionError(f"{what}: {got.dtype} values differ")
        return
    rtol, atol, norm = TOLERANCE[got.dtype]
    want = want.detach().double()
    got = got.detach().to(want)
    torch.testing.assert_close(
        got, want, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )
    finite = want.isfinite()
    error, size = (got - want)[finite].norm(), want[finite].norm()
    if error > norm * size > 0:  # zeros have no relative error: atol judges them
        raise AssertionError(
            f"{what}: relative L2 error {error / size:.2e}, at most {norm:.0e} allowed"
        )
