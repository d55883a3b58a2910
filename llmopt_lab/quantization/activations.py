"""Static scales for activations: observers that watch a layer's inputs, and layers that round them.

An observer sees batches and answers with a range. The range becomes one scale and one zero point,
fixed before the model serves; a dynamic scale is chosen anew for every token.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from llmopt_lab.core.errors import require
from llmopt_lab.nn.transformer import Transformer
from llmopt_lab.quantization.reference import (
    check_finite,
    check_weight,
    choose_scales,
    code_range,
)

N_BINS = 2048


class MinMax:
    """All that was ever seen lies in the range."""

    def __init__(self):
        self.low = self.high = None

    def observe(self, x: Tensor) -> None:
        """Take note of one batch."""
        low, high = _extremes(x)
        self.low = low if self.low is None else min(self.low, low)
        self.high = high if self.high is None else max(self.high, high)

    def range(self, bits: int, symmetric: bool) -> tuple[float, float]:
        """Least and greatest value that gets a code of its own."""
        require(self.low is not None, "no batch was observed: give calibration data")
        return self.low, self.high


class Ema(MinMax):
    """A moving average of each batch's extremes: one odd batch is soon forgotten.

    Source: Jacob et al. 2018, section 3 (https://arxiv.org/abs/1712.05877).
    """

    def __init__(self, decay: float = 0.9):
        super().__init__()
        require(0 <= decay < 1, f"decay must lie in [0, 1); got {decay}")
        self.decay = decay

    def observe(self, x: Tensor) -> None:
        low, high = _extremes(x)
        if self.low is not None:
            low = self.decay * self.low + (1 - self.decay) * low
            high = self.decay * self.high + (1 - self.decay) * high
        self.low, self.high = low, high


class Histogram:
    """Counts of all values seen in 2,048 bins over [-reach, reach].

    `reach` doubles when a value lies beyond, and each two bins become one: no count is lost.
    """

    def __init__(self):
        self.reach, self.counts = 0.0, torch.zeros(N_BINS, dtype=torch.float64)

    def observe(self, x: Tensor) -> None:
        largest = max(map(abs, _extremes(x)))
        if self.reach == 0:
            self.reach = largest
        while largest > self.reach > 0:
            self.reach *= 2
            halves = self.counts.view(-1, 2).sum(1)
            self.counts = torch.nn.functional.pad(halves, (N_BINS // 4, N_BINS // 4))
        if self.reach > 0:
            at = ((x.double() / self.reach + 1) * (N_BINS // 2)).long().clamp(0, N_BINS - 1)
            self.counts += torch.bincount(at.flatten(), minlength=N_BINS).cpu()

    def edges(self) -> Tensor:
        """(2049,) float64, the borders of the bins."""
        require(bool(self.counts.sum() > 0), "no batch was observed, or nothing but zeros")
        return torch.linspace(-self.reach, self.reach, N_BINS + 1, dtype=torch.float64)


class Percentile(Histogram):
    """The range that `share` of all values lie in, the rest split between both ends.

    Source: Wu et al. 2020, section 5 (https://arxiv.org/abs/2004.09602).
    """

    def __init__(self, share: float = 0.9999):
        super().__init__()
        require(0 < share <= 1, f"share must lie in (0, 1]; got {share}")
        self.share = share

    def range(self, bits: int, symmetric: bool) -> tuple[float, float]:
        edges = self.edges()
        below = self.counts.cumsum(0) / self.counts.sum()
        out = (1 - self.share) / 2
        first = int(torch.searchsorted(below, torch.tensor(out).double(), right=True))
        last = int(torch.searchsorted(below, torch.tensor(1 - out).double() - 1e-12))
        return float(edges[first]), float(edges[min(last, N_BINS - 1) + 1])


class Mse(Histogram):
    """The range with the least squared error of rounding and clipping, of 100 shrunken ones."""

    def range(self, bits: int, symmetric: bool) -> tuple[float, float]:
        edges = self.edges()
        middle, used = (edges[1:] + edges[:-1]) / 2, self.counts.nonzero().flatten()
        low, high = float(edges[used[0]]), float(edges[used[-1] + 1])

        def error(part: float) -> float:
            scale, zero = scale_of((low * part, high * part), bits, symmetric)
            return float((self.counts * (_round(middle, scale, zero, bits) - middle) ** 2).sum())

        best = min((i / 100 for i in range(1, 101)), key=error)
        return low * best, high * best


OBSERVERS = {"min-max": MinMax, "EMA": Ema, "percentile": Percentile, "MSE": Mse}


def scale_of(span: tuple[float, float], bits: int, symmetric: bool) -> tuple[float, int]:
    """Scale and zero point whose codes cover `span`, 0 among its values."""
    scale, zero = choose_scales(torch.tensor([span], dtype=torch.float64), bits, symmetric)
    return float(scale), 0 if zero is None else int(zero)


def _round(x: Tensor, scale: float, zero: int, bits: int) -> Tensor:
    return (((x / scale).round() + zero).clamp(*code_range(bits)) - zero) * scale


class RoundedInput(nn.Module):
    """Round x to `bits` bits before `inner` reads it, in float: what integer products would see.

    With an observer the scale is static: watched while the module is in training mode, fixed in
    eval mode. Without one every token has its own symmetric scale. The gradient passes straight
    through where x lies inside the range, and is 0 outside.

    Args:
        inner: a linear layer.
        observer: one of OBSERVERS, made; or None.
        symmetric: of a static scale.
    """

    def __init__(self, inner: nn.Module, *, bits: int = 8, observer=None, symmetric: bool = False):
        super().__init__()
        check_weight(torch.ones(1, 1), bits, None)
        self.inner, self.bits, self.observer, self.symmetric = inner, bits, observer, symmetric
        self.rounding = True  # off while only looking
        self._fixed: tuple[float, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None and self.training:
            self.observer.observe(x.detach())
            self._fixed = None
        return self.inner(self.rounded(x) if self.rounding else x)

    def scale(self) -> tuple[float, int]:
        """The static scale and zero point."""
        if self._fixed is None:
            span = self.observer.range(self.bits, self.symmetric)
            self._fixed = scale_of(span, self.bits, self.symmetric)
        return self._fixed

    def rounded(self, x: Tensor) -> Tensor:
        """x as the codes have it."""
        low, high = code_range(self.bits)
        if self.observer is None:
            with torch.no_grad():
                flat = x.reshape(-1, x.shape[-1])
                scale = choose_scales(flat.float(), self.bits, True)[0].to(x.dtype)
                scale, zero = scale.view(*x.shape[:-1], 1), 0
        else:
            scale, zero = self.scale()
        clipped = torch.clamp(x, (low - zero) * scale, (high - zero) * scale)
        made = (((x / scale).round() + zero).clamp(low, high) - zero) * scale
        return clipped + (made - clipped).detach()

    def extra_repr(self) -> str:
        how = "by token" if self.observer is None else type(self.observer).__name__
        return f"bits={self.bits}, {how}"


@torch.no_grad()
def round_inputs(
    model: Transformer,
    *,
    bits: int = 8,
    observer: Callable | None = None,
    symmetric: bool = False,
    calibration: Tensor | None = None,
    batch: int = 8,
) -> Transformer:
    """A copy whose linear layers in the blocks read rounded inputs; float, quantized or fake.

    Args:
        bits: of the activations.
        observer: makes an observer for each layer, such as `Ema`; None for a scale a token.
        symmetric: of static scales.
        calibration: (n, length) int64 tokens, for static scales. The observers watch the model
            with no input rounded.
        batch: calibration sequences at a time.

    Raises:
        BadInput: static scales without calibration, or there is no linear layer.
    """
    require(
        (observer is None) == (calibration is None),
        "static scales need both an observer and calibration tokens (n, length); a scale a token "
        "needs neither",
    )
    result = deepcopy(model)
    names = [name for name, m in result.layers.named_modules() if hasattr(m, "in_features")]
    require(len(names) > 0, "there is no linear layer whose input could be rounded")
    made = []
    for name in names:
        layer = RoundedInput(
            result.layers.get_submodule(name),
            bits=bits,
            observer=None if observer is None else observer(),
            symmetric=symmetric,
        )
        made.append(layer.train(model.training))
        result.layers.set_submodule(name, layer)
    if observer is not None:
        for layer in made:
            layer.rounding = False
            layer.training = True
        for part in calibration.split(batch):
            result(part, last_only=True)
        for layer in made:
            layer.rounding = True
            layer.training = model.training
    return result


def _extremes(x: Tensor) -> tuple[float, float]:
    check_finite(x, "x")
    return float(x.min()), float(x.max())
