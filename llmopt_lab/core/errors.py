"""Errors a learner can act on: what was wrong, what was got, what to do."""


class LabError(Exception):
    """Base of every error this package raises on purpose."""


class BadInput(LabError, ValueError):
    """An argument has the wrong shape, dtype, device or value."""


class OutOfBlocks(LabError, MemoryError):
    """The KV-cache block pool has too few free blocks for a request. Nothing was changed."""


class TraceTooLarge(LabError, ValueError):
    """A recorded tensor is bigger than a picture can use."""


class Missing(LabError, ImportError):
    """Something optional is not installed; the message says which command installs it."""


def require(condition: bool, message: str) -> None:
    """Raise `BadInput(message)` unless `condition` holds."""
    if not condition:
        raise BadInput(message)


def require_same_shape(names: str, a, b) -> None:
    """Raise `BadInput` unless two tensors, called `names` in the message, have one shape."""
    require(
        a.shape == b.shape,
        f"{names} must have the same shape; got {tuple(a.shape)} and {tuple(b.shape)}",
    )
