"""Quantize a whole Transformer, block by block, each on the inputs that the blocks before give."""

from copy import copy, deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llmopt_lab.core.errors import require
from llmopt_lab.nn.transformer import Block, RMSNorm, Transformer, rope_tables
from llmopt_lab.quantization.block_formats import FORMATS, quantize_blocks
from llmopt_lab.quantization.gptq import gptq, hessian_of
from llmopt_lab.quantization.input_scales import awq_clip, awq_scales, smooth_scales
from llmopt_lab.quantization.linear import BlockLinear, QuantizedLinear, W8A8Linear
from llmopt_lab.quantization.records import Quantized
from llmopt_lab.quantization.reference import check_weight, quantize
from llmopt_lab.quantization.rotation import RotatedInput

METHODS = ("rtn", "awq", "gptq", "w8a8", "smoothquant", *FORMATS)
CALIBRATED = ("awq", "gptq", "smoothquant")

# What makes an input, and the linear layers that share it. A scale of the input's channels folds
# into what makes it: a norm's weight, or the rows of a linear layer.
INPUTS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)


def inputs_of(block: Block) -> list[tuple[str | None, tuple[str, ...]]]:
    """INPUTS of one block. What reads a RotatedInput has no maker that scales could fold into."""
    found = []
    for maker, consumers in INPUTS:
        inside = tuple(
            f"{name}.inner" if isinstance(block.get_submodule(name), RotatedInput) else name
            for name in consumers
        )
        found.append((maker if inside == consumers else None, inside))
    return found


@dataclass(frozen=True)
class Settings:
    """How to quantize; see `quantize_model`."""

    method: str
    bits: int
    group_size: int | None
    symmetric: bool
    damping: float
    act_order: bool
    clip: bool
    alpha: float

    def __post_init__(self):
        require(
            self.method in METHODS, f"method is one of {', '.join(METHODS)}; got {self.method!r}"
        )
        check_weight(torch.ones(1, 1), self.bits, self.group_size)
        require(
            self.method not in ("w8a8", "smoothquant")
            or (self.bits == 8 and self.group_size is None and self.symmetric),
            f"{self.method} multiplies int8 by int8: bits=8, group_size=None, symmetric=True",
        )
        require(
            self.method not in FORMATS
            or (self.bits == 4 and self.group_size is None and self.symmetric),
            f"{self.method} has a table of 16 values and blocks of its own: bits=4, "
            "group_size=None, symmetric=True",
        )
        require(self.damping >= 0, f"damping must not be negative; got {self.damping}")
        require(0 <= self.alpha <= 1, f"alpha must lie in [0, 1]; got {self.alpha}")


class InputStatistics:
    """What the rows of an input (.., d_in) leave behind; the rows themselves are not kept."""

    def __init__(self):
        self.hessian, self.total_abs, self.max_abs, self.n_rows = 0.0, 0.0, None, 0

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        self.hessian = self.hessian + hessian_of(rows)
        self.total_abs = self.total_abs + rows.abs().sum(0, dtype=torch.float64)
        largest = rows.abs().amax(0)
        self.max_abs = largest if self.max_abs is None else self.max_abs.maximum(largest)
        self.n_rows += len(rows)

    @property
    def mean_abs(self) -> Tensor:
        """(d_in,) float64."""
        return self.total_abs / self.n_rows

    def divide(self, s: Tensor) -> None:
        """As if every row had been divided by s (d_in,)."""
        self.hessian = self.hessian / torch.outer(s, s).double()
        self.total_abs, self.max_abs = self.total_abs / s, self.max_abs / s


@torch.no_grad()
def quantize_model(
    model: Transformer,
    *,
    method: str = "rtn",
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = True,
    calibration: Tensor | None = None,
    damping: float = 0.01,
    act_order: bool = False,
    clip: bool = True,
    alpha: float = 0.5,
    batch: int = 8,
    progress: bool = True,
) -> Transformer:
    """The same model with quantized linear layers in every block.

    The embedding, the norms and the head stay as they are: they are read by index or are small, and
    the head, often tied to the embedding, is the most sensitive. `model` is not changed; embedding,
    final norm and head are shared with it.

    Args:
        model: with SwiGLU feed-forward layers; `rotated` or not.
        method:
            "rtn"          round to nearest; needs no calibration data and uses none
            "gptq"         `gptq`, on the Hessian of each layer's inputs
            "awq"          `awq_scales`, folded into the layer before; then `awq_clip`
            "w8a8"         int8 weights and activations, both rounded to nearest
            "smoothquant"  the same after `smooth_scales`, folded into the norms
            "mxfp4", "nvfp4", "nf4"   `quantize_blocks`; no calibration data
        bits, group_size, symmetric: as for `quantize`; w8a8 and smoothquant take 8, None, True, the
            block formats 4, None, True.
        calibration: (n, length) int64 tokens. The layers of a block see what the quantized blocks
            before it make of them, so later blocks can make good earlier errors.
        damping, act_order: as for `gptq`.
        clip: AWQ's search for a clipping range.
        alpha: as for `smooth_scales`.
        batch: calibration sequences at a time.
        progress: show a bar, one step a block.

    Raises:
        BadInput: settings or calibration do not fit, the feed-forward is no SwiGLU, a weight is not
            finite; or, on the way, a Hessian that is singular.

    Cost: memory of the result, of one float block, of the calibration's hidden states
    (n * length * d_model) and of one Hessian (d_in, d_in, float64) for each of a block's 4 inputs.
    Two passes of the calibration tokens through the model.
    Sources: Frantar et al. 2022, section 4 (block by block); Lin et al. 2023, section 3.2; Xiao et
    al. 2022, section 4.
    """
    settings = Settings(method, bits, group_size, symmetric, damping, act_order, clip, alpha)
    _check_model(model)
    calibrated = method in CALIBRATED
    if calibrated:
        _check_calibration(calibration, model, method, batch)
        positions = torch.arange(calibration.shape[1], device=model.device)[None]
        cos, sin = rope_tables(model.config, positions, model.dtype)
        states = [model.embed_tokens(part) for part in calibration.split(batch)]

    result = copy(model)
    result._modules = dict(model._modules)
    result.layers = nn.ModuleList()
    for source in tqdm(model.layers, desc=f"{method}, {bits} bits", disable=not progress):
        block = deepcopy(source)
        statistics = {consumers: InputStatistics() for _, consumers in inputs_of(block)}
        if calibrated:
            hooks = [
                block.get_submodule(consumers[0]).register_forward_pre_hook(
                    lambda _, args, seen=seen: seen.add(args[0])
                )
                for consumers, seen in statistics.items()
            ]
            for x in states:
                block(x, cos, sin, model.attend)
            for hook in hooks:
                hook.remove()
        _quantize_block(block, statistics, settings)
        if calibrated:
            states = [block(x, cos, sin, model.attend) for x in states]
        result.layers.append(block)
    return result.train(model.training)


def _quantize_block(
    block: Block, statistics: dict[tuple[str, ...], InputStatistics], settings: Settings
) -> None:
    """Replace the block's linear layers: first all scales are folded, then all are quantized."""
    inputs = list(inputs_of(block))
    for producer, consumers in inputs:
        layers = [block.get_submodule(name) for name in consumers]
        if producer is None:
            continue
        maker = block.get_submodule(producer)
        s = _input_scales(maker, layers, statistics[consumers], settings)
        if s is not None:
            for made in maker.parameters():  # a norm's weight (d,); a linear's (d, d_in), bias (d,)
                made.data = made / s.to(made).view(-1, *[1] * (made.dim() - 1))
            for layer in layers:
                layer.weight.data = layer.weight * s.to(layer.weight)
            statistics[consumers].divide(s)
    for _, consumers in inputs:
        layers = [block.get_submodule(name) for name in consumers]
        if settings.method in FORMATS:
            for name, layer in zip(consumers, layers, strict=True):
                q = quantize_blocks(layer.weight, settings.method)
                block.set_submodule(name, BlockLinear(q, layer.bias))
            continue
        # rows do not touch one another: layers that share an input are one matrix
        together = torch.cat([layer.weight for layer in layers])
        q = _quantized(together, statistics[consumers], settings)
        of_rows = (
            (None,) * len(layers)
            if x is None
            else x.split([layer.out_features for layer in layers])
            for x in (q.codes, q.scales, q.zeros)
        )
        for name, layer, *parts in zip(consumers, layers, *of_rows, strict=True):
            made = Quantized(*(p if p is None else p.clone() for p in parts), q.bits, q.group_size)
            kind = W8A8Linear if settings.method in ("w8a8", "smoothquant") else QuantizedLinear
            block.set_submodule(name, kind(made, layer.bias))


def _input_scales(
    maker: nn.Module, layers: list[nn.Linear], seen: InputStatistics, settings: Settings
) -> Tensor | None:
    """What to divide the input of `layers` by, (d_in,), or None to leave it."""
    together = torch.cat([layer.weight for layer in layers])
    if settings.method == "smoothquant" and isinstance(maker, RMSNorm):
        return smooth_scales(together, seen.max_abs, alpha=settings.alpha)
    # with grouped queries a value channel feeds several inputs of o_proj: nothing to fold into
    if settings.method == "awq" and len(maker.weight) == together.shape[1]:
        return awq_scales(
            together, seen.mean_abs, seen.hessian, bits=settings.bits,
            group_size=settings.group_size, symmetric=settings.symmetric,
        )  # fmt: skip
    return None


def _quantized(weight: Tensor, seen: InputStatistics, settings: Settings) -> Quantized:
    grid = {
        "bits": settings.bits,
        "group_size": settings.group_size,
        "symmetric": settings.symmetric,
    }
    if settings.method == "gptq":
        return gptq(
            weight, seen.hessian, **grid, damping=settings.damping, act_order=settings.act_order
        )
    if settings.method == "awq" and settings.clip:
        return awq_clip(weight, seen.hessian, **grid)
    return quantize(weight, **grid)


def linear_nbytes(model: nn.Module) -> int:
    """Bytes of the linear layers of all blocks, quantized or not."""
    layers = [module for module in model.layers.modules() if hasattr(module, "in_features")]
    return sum(t.nbytes for layer in layers for t in (*layer.parameters(), *layer.buffers()))


def _check_model(model: Transformer) -> None:
    for number, block in enumerate(model.layers):
        for name in (name for _, consumers in INPUTS for name in consumers):
            try:
                layer = block.get_submodule(name)
            except AttributeError:
                layer = None
            if isinstance(layer, RotatedInput):
                layer = layer.inner
            require(
                isinstance(layer, nn.Linear),
                f"block {number} needs a float linear layer {name}; got {type(layer).__name__}. "
                "Mixtures of experts and models that are quantized already are not supported.",
            )
            require(
                bool(layer.weight.isfinite().all()),
                f"block {number}: {name} holds NaN or infinity: find out where it comes from",
            )


def _check_calibration(
    calibration: Tensor | None, model: Transformer, method: str, batch: int
) -> None:
    require(
        calibration is not None,
        f"{method} looks at the layers' inputs: give calibration=tokens (n, length)",
    )
    require(batch > 0, f"batch must be positive; got {batch}")
    positions = torch.arange(calibration.shape[-1], device=calibration.device)
    model._check(calibration, positions.expand(calibration.shape))
