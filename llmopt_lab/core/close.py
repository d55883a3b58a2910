"""One tolerance table for the whole course. Tests compare with an oracle of higher precision."""

import torch
from torch import Tensor

# dtype of the result under test: (rtol, atol). One rounding of an operand of magnitude 1 costs
# 2^-53, 2^-24, 2^-11 and 2^-8 in these dtypes; sums of a few thousand such terms stay within these.
TOLERANCE = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}


def assert_close(got: Tensor, want: Tensor, what: str = "result") -> None:
    """Raise AssertionError unless `got` equals the oracle `want` within the table's tolerance.

    The tolerance follows the dtype of `got`; `want` may be of higher precision and is compared
    in float64. Shapes must be equal; NaN equals only NaN.
    """
    assert got.shape == want.shape, (
        f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    )
    if got.dtype not in TOLERANCE:
        assert torch.equal(got.cpu(), want.cpu().to(got.dtype)), f"{what}: integers differ"
        return
    rtol, atol = TOLERANCE[got.dtype]
    torch.testing.assert_close(
        got.detach().cpu().double(),
        want.detach().cpu().double(),
        rtol=rtol,
        atol=atol,
        equal_nan=True,
        msg=lambda message: f"{what}: {message}",
    )
