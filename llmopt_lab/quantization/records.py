"""What quantization makes, and what its pictures show: one record an event."""

from dataclasses import dataclass

from torch import Tensor

from llmopt_lab.core.trace import Record


@dataclass(frozen=True)
class Quantized(Record):
    """A matrix as integer codes: weight[r, c] = (codes[r, c] - zero) * scale of the group of c."""

    codes: Tensor           # (rows, cols) int8, in [-2^(bits-1), 2^(bits-1))
    scales: Tensor          # (rows, n_groups), or (1, 1) for one scale a tensor
    zeros: Tensor | None    # like scales, int16 codes that stand for 0; None: 0 stands for 0
    bits: int
    group_size: int         # columns that share a scale; the last group may have fewer

    def __str__(self) -> str:
        rows, cols = self.codes.shape
        return (
            f"{rows} x {cols} codes of {self.bits} bits, {self.scales.numel()} scales, "
            f"{self.group_size} columns a group"
        )


@dataclass(frozen=True)
class BlockCoded(Record):
    """A matrix as codes of a table of 16 values: table[codes[r, c]] * the scale of c's block."""

    codes: Tensor           # (rows, cols) uint8, 0 to 15
    scales: Tensor          # (rows, n_blocks) float8 e8m0 (MXFP4), e4m3 (NVFP4, NF4), or float32
    second: Tensor | None   # float32 scale of the scales: () for NVFP4, (n_scales / 256,) for NF4
    mean: Tensor | None     # () float32, what NF4 took off its scales before they were rounded
    kind: str               # "mxfp4", "nvfp4" or "nf4"

    def __str__(self) -> str:
        rows, cols = self.codes.shape
        return f"{rows} x {cols} codes of {self.kind}, {self.scales.numel()} scales"


@dataclass(frozen=True)
class GroupScaled(Record):
    """The scales of one group of columns were chosen, one a row."""

    cols: slice
    scales: Tensor          # (rows,) or (1,)
    zeros: Tensor | None    # like scales

    def __str__(self) -> str:
        return (
            f"columns {self.cols.start} to {self.cols.stop - 1}: scale of row 0 is "
            f"{self.scales[0]:.4g}"
        )


@dataclass(frozen=True)
class ColumnQuantized(Record):
    """GPTQ rounded one column, and moved its error to the later columns of the tile."""

    step: int               # how many columns were rounded before
    column: int             # of the weight; differs from `step` under act-order
    codes: Tensor           # (rows,) int8
    error: Tensor           # (rows,) weight minus its rounded value, at that moment
    spread: Tensor          # (rows, later columns of the tile) what was taken off them

    def __str__(self) -> str:
        return (
            f"step {self.step}: column {self.column} rounded, row 0 off by {self.error[0]:.4f}; "
            f"the error spreads to {self.spread.shape[1]} columns of the tile"
        )


@dataclass(frozen=True)
class TileFinished(Record):
    """GPTQ is through with a tile: its errors were taken off all the columns behind it at once."""

    steps: slice
    spread: Tensor          # (rows, columns behind the tile)

    def __str__(self) -> str:
        return (
            f"steps {self.steps.start} to {self.steps.stop - 1} done; "
            f"their errors spread to {self.spread.shape[1]} columns behind the tile"
        )


@dataclass(frozen=True)
class ScaleTried(Record):
    """AWQ scaled the input channels by mean|x|^alpha and measured the output error."""

    alpha: float
    error: float            # squared, summed over outputs and calibration rows

    def __str__(self) -> str:
        return f"alpha {self.alpha:.2f}: output error {self.error:.4g}"
