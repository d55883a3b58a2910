# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Exercises 4: Quantization
# {{colab_badge}}
#
# You kill a language model without changing its function, and save it with better scales. You train
# through a rounding that has no slope, pack two weights into a byte, and count what they really cost.
# Then you write GPTQ, from one column by hand to the whole loop, find the bug that many versions of
# it have, and end with the kernel that multiplies by 4-bit weights without ever writing them out.
#
# | exercise | points | minutes |
# |---|---|---|
# | 1. Same function, dead model | 2 | 8 |
# | 2. Scales of rows and groups | 3 | 15 |
# | 3. Train me if you can | 2 | 12 |
# | 4. Pack and unpack | 3 | 15 |
# | 5. Bits per weight | 2 | 10 |
# | 6. One column by hand | 2 | 10 |
# | 7. The stale inverse | 3 | 15 |
# | 8. Damping | 2 | 10 |
# | 9. GPTQ in blocks | 4 | 25 |
# | 10. Which channels matter? | 3 | 15 |
# | 11. The product that never sees the matrix | 3 | 20 |
# | 12. The W4A16 kernel in Triton | 5 | 40 |
# | together | 34 | 195 |
#
# Each exercise stands alone: skip one and go on. Replace the line `raise NotImplementedError()` by
# your code, run the cell, then run the locked cell below it. It says *done*, or what is wrong and
# where to look next. Stuck? `hint("quantization.same_function", 1)` gives the first hint, `2` the
# second, stronger one. Hints cost no points.

# %% tags=["setup", "timing", "nbval-ignore-output"] nbgrader={"grade_id": "setup-install", "locked": true}
try:
    import llmopt_lab
except ModuleNotFoundError:  # on Colab, for instance
    get_ipython().run_line_magic("pip", 'install -q "llmopt_lab @ git+{{repository}}"')

from llmopt_lab.core.session import start

start()

# %% tags=["setup"] nbgrader={"grade_id": "setup-imports", "locked": true}
import copy
import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmopt_lab.core.memory import ceil_div, load, store, tiles
from llmopt_lab.grading import hint
from llmopt_lab.nn import weights
from llmopt_lab.quantization import dequantize, hessian_of, quantize, reference
from llmopt_lab.quantization import gptq as reference_gptq
from llmopt_lab.widgets.predict import Predict

lm = weights.load("lab-target", dtype=torch.float32)  # 8.8 M parameters, trained on Python source
documents = json.loads((weights.EMBEDDED / "heldout.json").read_text("utf-8"))["documents"]
texts = [lm.encode(document["text"])[:513] for document in documents]  # it was not trained on these


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def perplexity(model: nn.Module) -> float:
    return F.cross_entropy(model(texts[0][None, :-1])[0], texts[0][1:]).exp().item()


@torch.no_grad()
def rounded(model: nn.Module, round_weight) -> nn.Module:
    """A copy of the model, all matrices of its layers passed through `round_weight`."""
    model = copy.deepcopy(model)
    for weight in model.layers.parameters():
        if weight.dim() == 2:
            weight.copy_(round_weight(weight))
    return model


@torch.no_grad()
def real_layer() -> tuple[Tensor, Tensor, Tensor]:
    """The query projection of layer 2, inputs to calibrate on and inputs to test on, in float64."""
    layer, seen = lm.model.layers[2].self_attn.q_proj, []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].double()))
    for text in texts:
        lm.model(text[None, :-1])
    hook.remove()
    return layer.weight.double(), torch.cat(seen[1:]), seen[0]


def output_error(approximation: Tensor, weight: Tensor, x: Tensor) -> float:
    return ((x @ (approximation - weight).T).norm() / (x @ weight.T).norm()).item()


# %% [markdown]
# ## 1. Same function, dead model (2 points, 8 minutes)
#
# This is how the guide quantizes, to 8 and to 4 bits: one scale for the whole tensor.

# %%
def quantize_to_int8(tensor):
    """Quantize FP32 to INT8"""
    # Find scale and zero point
    scale = tensor.abs().max() / 127.0
    zero_point = 0

    # Quantize
    quantized = torch.round(tensor / scale).clamp(-128, 127).to(torch.int8)

    return quantized, scale, zero_point


def as_guide_int8(weight):
    quantized, scale, zero_point = quantize_to_int8(weight)
    return (quantized.float() - zero_point) * scale


def as_guide_int4(weight):
    scale = weight.abs().max() / 7.0  # 4-bit: -8 to 7
    return torch.round(weight / scale).clamp(-8, 7) * scale


print(f"float model   perplexity {perplexity(lm.model):.2f}")
print(f"guide, int8   perplexity {perplexity(rounded(lm.model, as_guide_int8)):.2f}")
print(f"guide, int4   perplexity {perplexity(rounded(lm.model, as_guide_int4)):.2f}")

# %% [markdown]
# That looks usable. Now take the same model in other clothes. Its feed-forward layer is
#
# ```text
# down @ (silu(gate @ x) * (up @ x))
# ```
#
# The product makes `d_ff` hidden channels. Make four of them 300 times as large in `up`, and let
# `down` read them at a 300th: every output stays the same. In real models such channels come about by
# themselves in training.

# %%
dressed = copy.deepcopy(lm.model)
for layer in dressed.layers:
    layer.mlp.up_proj.weight.data[:4] *= 300
    layer.mlp.down_proj.weight.data[:, :4] /= 300
print(f"dressed, float   perplexity {perplexity(dressed):.2f}")
dead = Predict(
    "The dressed model in the guide's int8: perplexity?",
    choices=["3, as before", "10 to 100", "above 4,096, the number of tokens"],
)
dead

# %%
print(f"dressed, guide, int8           perplexity {perplexity(rounded(dressed, as_guide_int8)):.0e}")
by_row = perplexity(rounded(dressed, lambda w: dequantize(quantize(w, bits=8))))
print(f"dressed, one scale a row, int8 perplexity {by_row:.2f}")
dead.reveal("above 4,096, the number of tokens")

# %% [markdown]
# Guessing blindly among 4,096 tokens has perplexity 4,096. This model is worse: it is sure, and wrong.
#
# Write the change of clothes. By hand, for one channel and `x = 1`: gate 2, up 3, down 5 gives
# `5 * silu(2) * 3`. With factor 10, up is 30 and down is 0.5. Why not gate 20?

# %% nbgrader={"grade_id": "quantization.same_function", "solution": true}
def same_function(
    gate: Tensor, up: Tensor, down: Tensor, channels: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(gate, up, down) of the same function, hidden `channels` times `factor`; new tensors.

    Args:
        gate, up: (d_ff, d_model). down: (d_model, d_ff).
        channels: (n,) int64, of the d_ff hidden ones.
    """
    ### BEGIN SOLUTION
    up, down = up.clone(), down.clone()
    up[channels] *= factor
    down[:, channels] /= factor
    return gate, up, down
    ### END SOLUTION


# %% nbgrader={"grade_id": "quantization.same_function-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("quantization.same_function", same_function)

# %% [markdown]
# ## 2. Scales of rows and groups (3 points, 15 minutes)
#
# An outlier spoils the step of everybody who shares its scale. So share with fewer: each row (output
# channel) has scales of its own, and in a row each group of `group_size` neighbouring columns has one.
#
# ```text
# scale = largest |weight| of the group / largest code           2^(bits-1) - 1: 7 of 4 bits
# code  = round(weight / scale)
# ```
#
# By hand, 4 bits, one row in groups of 2: `0.7 -0.2 | 14 3 | 0 0`. Scales 0.1, 2 and 1. Codes `7 -2`,
# `7 2` (1.5 goes to the even neighbour) and `0 0`. With one scale for all, 2, the codes were
# `0 0 7 2 0 0`: the first group is lost.
#
# A group of zeros has no largest weight. `0 / 0` is NaN: give it scale 1.

# %%
noise = random(64, 128)
noise[5, 77] = 50.0
for name, approximation in {
    "one scale": dequantize(quantize(noise, bits=4, per_tensor=True)),
    "one a row": dequantize(quantize(noise, bits=4)),
    "one a group of 32": dequantize(quantize(noise, bits=4, group_size=32)),
}.items():
    zeros = (approximation == 0).float().mean()
    error = (approximation - noise).norm() / noise.norm()
    print(f"{name:18} {zeros:6.1%} of the weights become 0, relative error {error:.3f}")

# %% nbgrader={"grade_id": "quantization.quantize_groups", "solution": true}
def quantize_groups(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """(codes, scales): codes (rows, cols) int8, scales (rows, ceil(cols / group_size)).

    Args:
        weight: (rows, cols), floating; cols need not be a multiple of group_size.
        bits: 2 to 8.
    """
    ### BEGIN SOLUTION
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = weight.new_empty(len(weight), ceil_div(weight.shape[1], group_size))
    for group, cols in enumerate(tiles(weight.shape[1], group_size)):
        scale = weight[:, cols].abs().amax(dim=1) / (2 ** (bits - 1) - 1)
        scale = torch.where(scale == 0, 1.0, scale)
        scales[:, group] = scale
        codes[:, cols] = (weight[:, cols] / scale[:, None]).round().to(torch.int8)
    return codes, scales
    ### END SOLUTION


# %% nbgrader={"grade_id": "quantization.quantize_groups-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("quantization.quantize_groups", quantize_groups)

# %% [markdown]
# ## 3. Train me if you can (2 points, 12 minutes)
#
# Quantization-aware training rounds the weights in the forward pass, so that training gets used to it.
# This is the guide's version, word for word. Its comment promises a straight-through estimator.

# %%
class FakeQuantize(nn.Module):
    """Simulate quantization during training"""

    def __init__(self, num_bits=8):
        super().__init__()
        self.num_bits = num_bits

    def forward(self, x):
        # Quantize
        scale = x.abs().max() / (2 ** (self.num_bits - 1) - 1)
        quantized = torch.round(x / scale).clamp(
            -(2 ** (self.num_bits - 1)), 2 ** (self.num_bits - 1) - 1
        )

        # Dequantize (straight-through estimator)
        dequantized = quantized * scale

        return dequantized


trained = Predict("Of 4,096 weights, how many get a gradient that is not 0?", unit="weights")
trained

# %%
weight = random(64, 64).requires_grad_()
(FakeQuantize()(weight) * random(64, 64, seed=1)).sum().backward()
n_trained = int((weight.grad != 0).sum())
print(f"{n_trained} of {weight.numel()}: {weight.grad.abs().argmax() == weight.abs().argmax() = }")
trained.reveal(n_trained)

# %% [markdown]
# `round` is a staircase. Its slope is 0 everywhere but at the jumps, so no gradient passes. The one
# weight that still gets some is the largest: it goes through `scale`. Does it train?

# %%
def train(fake_quantize) -> float:
    """The loss after 300 steps of fitting a linear layer to another one."""
    torch.manual_seed(0)
    x, target = random(256, 32), random(256, 32) @ random(16, 32, seed=1).T / 32**0.5
    weight = (random(16, 32, seed=2) / 32**0.5).requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=0.01)
    for _ in range(300):
        loss = F.mse_loss(x @ fake_quantize(weight).T, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


print(f"guide, 8 bits             loss {train(FakeQuantize(8)):.3f}")
print(f"straight-through, 8 bits  loss {train(lambda w: reference.fake_quantize(w, bits=8)):.3f}")
print(f"straight-through, 4 bits  loss {train(lambda w: reference.fake_quantize(w, bits=4)):.3f}")

# %% [markdown]
# Straight-through means: round on the way forward, and act on the way back as if you had not.
#
# Here the scale is given, one a row, so some weights lie outside the codes and are clipped. For those
# the answer on the way back is 0: if the weight moves a little, the result does not. Call a weight
# clipped if its *rounded* code, `round(weight / scale)`, is outside of `-2^(bits-1)` to
# `2^(bits-1) - 1`.
#
# You need no `torch.autograd.Function`. By hand, with scale 1 and 2 bits (codes -2 to 1): 0.4 gives
# 0 and gradient 1, 5.0 gives 1 and gradient 0.

# %% nbgrader={"grade_id": "quantization.fake_quantize", "solution": true}
def fake_quantize(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`weight` rounded to codes * scale; its gradient is 1, or 0 where it is clipped.

    Args:
        weight: (rows, cols), needs a gradient. scale: (rows, 1), needs none.
    """
    ### BEGIN SOLUTION
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = (weight / scale).round()
    inside = (low <= codes) & (codes <= high)
    passes = torch.where(inside, weight, weight.detach())
    return passes + (codes.clamp(low, high) * scale - weight).detach()
    ### END SOLUTION


# %% nbgrader={"grade_id": "quantization.fake_quantize-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("quantization.fake_quantize", fake_quantize)

# %% [markdown]
# ## 4. Pack and unpack (3 points, 15 minutes)
#
# The guide calls `pack_int4(quantized)` and never shows it. An int8 tensor of 4-bit codes saves
# nothing: the smallest thing that torch can store is a byte. So two neighbours share one.
#
# ```text
# columns   0  1  2  3           byte 0 = column 0 in the low half, column 1 in the high half
# codes     3 -1  7 -8
# nibbles   0011 1111 0111 1000  in two's complement
# bytes     11110011 10000111    F3 87
# ```
#
# The trap is the sign. -1 in int8 is `11111111`, and its upper four bits land on the neighbour:

# %%
codes = torch.tensor([-1, 3], dtype=torch.int8)
byte = codes[0] | codes[1] << 4
print(f"packed without a mask: {byte.item() & 0xFF:08b}, both halves are 1111: -1 and -1")

# %% [markdown]
# A row with an odd number of codes gets a 0 at its end. `unpack_int4` must know how many there were.

# %% nbgrader={"grade_id": "quantization.pack_int4", "solution": true}
def pack_int4(codes: Tensor) -> Tensor:
    """(rows, n) int8 codes from -8 to 7 -> (rows, ceil(n / 2)) uint8."""
    ### BEGIN SOLUTION
    nibbles = F.pad(codes, (0, codes.shape[1] % 2)).to(torch.uint8) & 0xF
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    ### END SOLUTION


def unpack_int4(packed: Tensor, n: int) -> Tensor:
    """(rows, ceil(n / 2)) uint8 -> the (rows, n) int8 codes that were packed."""
    ### BEGIN SOLUTION
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)[:, :n]
    signed = nibbles.to(torch.int8)
    return torch.where(signed > 7, signed - 16, signed)
    ### END SOLUTION


# %% nbgrader={"grade_id": "quantization.pack_int4-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("quantization.pack_int4", (pack_int4, unpack_int4))

# %% [markdown]
# ## 5. Bits per weight (2 points, 10 minutes)
#
# The guide contradicts itself. "Memory: 4x reduction vs INT8, 16x vs FP32" it says under INT4. Its
# table of benefits gives INT4 0.125x of FP32. At most one of the two is right, and both forget
# something.

# %%
Predict(
    "4-bit codes, a float16 scale for every 128 weights: how many times smaller than float32?",
    answer=32 / 4.125,
    tolerance=0.01,
    unit="times",
    explain="4 + 16 / 128 = 4.125 bits a weight, and 32 / 4.125 = 7.76. Against bfloat16 it is 3.88.",
)

# %% [markdown]
# Count exactly. A row of codes takes whole bytes. Every row has a float16 scale (2 bytes) for each of
# its groups; the last group may be shorter and has a scale too. With zero points each group also has
# one byte that says which code stands for 0.
#
# By hand: 2 rows of 5 columns, 3 bits, groups of 4, zero points. 15 bits a row are 2 bytes: 4 in all.
# 2 groups a row are 4 groups of 3 bytes. 16 bytes for 10 weights: 12.8 bits per weight! Small groups
# are expensive.

# %% nbgrader={"grade_id": "quantization.quantized_size", "solution": true}
def quantized_size(
    rows: int, cols: int, bits: int, group_size: int, zero_points: bool
) -> tuple[int, float]:
    """(bytes, bits per weight) of a quantized matrix, everything included."""
    ### BEGIN SOLUTION
    n_groups = rows * ceil_div(cols, group_size)
    nbytes = rows * ceil_div(cols * bits, 8) + n_groups * (2 + zero_points)
    return nbytes, 8 * nbytes / (rows * cols)
    ### END SOLUTION


# %% nbgrader={"grade_id": "quantization.quantized_size-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("quantization.quantized_size", quantized_size)

# %% [markdown]
# ## 6. One column by hand (2 points, 10 minutes)
#
# A layer's weights do not matter. Its *output* does. If two inputs go up and down together, too little
# weight on the first can be made good by more weight on the second. GPTQ does that: it rounds one
# column, and lets the columns still to come make good the error.
#
# How much does the output suffer if the weights of one row are off by d? `|| X d ||^2`, which is
# `d^T (X^T X) d`. GPTQ calls `H = 2 X^T X` the Hessian. Take two inputs:
#
# ```text
# H = 2 1      H^-1 = 1/3 *  2 -1          weights  0.6  1.0
#     1 2                   -1  2
# ```
#
# Column 0 is rounded to 1, so its error is `0.6 - 1 = -0.4`. The column behind gets
#
# ```text
# w_1 - error * H^-1[0, 1] / H^-1[0, 0]  =  1.0 + 0.4 * (-1/2)  =  0.8
# ```
#
# Check it: with d = (0.4, 0) the damage `d^T H d` is 0.32. With d = (0.4, -0.2) it is 0.24, and no
# other d_1 gives less.

# %%
Predict(
    "The same H, weights 0.3 and 1.0, column 0 rounded to 0: what does column 1 become?",
    answer=1.15,
    tolerance=0.001,
    explain="the error is 0.3 - 0 = 0.3; 1.0 - 0.3 * (-1/2) = 1.15.",
)

# %% [markdown]
# Now for all rows at once, and for any column. The columns before it are finished: they keep their
# values, and the inverse has NaN for them.

# %% nbgrader={"grade_id": "quantization.compensate", "solution": true}
def compensate(weight: Tensor, inverse: Tensor, column: int, rounded: Tensor) -> Tensor:
    """The weight, (rows, cols), after `column` became `rounded` and those behind made it good.

    Args:
        weight: (rows, cols).
        inverse: (cols, cols); [column:, column:] is the inverse of H over these columns, the
            rest is NaN.
        rounded: (rows,), the new values of the column.
    """
    ### BEGIN SOLUTION
    error = (weight[:, column] - rounded) / inverse[column, column]
    behind = weight[:, column + 1 :] - torch.outer(error, inverse[column, column + 1 :])
    return torch.cat([weight[:, :column], rounded[:, None], behind], dim=1)
    ### END SOLUTION


# %% nbgrader={"grade_id": "quantization.compensate-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("quantization.compensate", compensate)

# %% [markdown]
# ## 7. The stale inverse (3 points, 15 minutes)
#
# Here is a loop over all columns. It reads like the paper, it runs, and it has a bug that several
# published versions had.

# %%
def round_columns_stale(weight: Tensor, hessian: Tensor, scale: Tensor) -> Tensor:
    w, inverse = weight.clone(), torch.linalg.inv(hessian)
    for j in range(w.shape[1]):
        nearest = (w[:, j] / scale).round().clamp(-8, 7) * scale
        error = (w[:, j] - nearest) / inverse[j, j]
        w[:, j + 1 :] -= torch.outer(error, inverse[j, j + 1 :])
        w[:, j] = nearest
    return w


def round_to_nearest(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale[:, None]).round().clamp(-8, 7) * scale[:, None]


x = random(400, 16).double()  # independent inputs
weight = random(24, 16, seed=1).double()
scale = weight.abs().amax(dim=1) / 7
plain = output_error(round_to_nearest(weight, scale), weight, x)
stale = output_error(round_columns_stale(weight, hessian_of(x), scale), weight, x)
print(f"independent inputs   rounded {plain:.4f}   with the loop {stale:.4f}")

x = x @ random(16, 16, seed=2).double()  # the same, mixed
plain = output_error(round_to_nearest(weight, scale), weight, x)
stale = output_error(round_columns_stale(weight, hessian_of(x), scale), weight, x)
right = dequantize(reference_gptq(weight, hessian_of(x), bits=4, damping=0.0))
print(f"correlated inputs    rounded {plain:.4f}   with the loop {stale:.4f}", end="   ")
print(f"with a right one {output_error(right, weight, x):.4f}")

# %% [markdown]
# Where is it? `inverse` is that of H over *all* columns. Its row j says how all other columns should
# move to make good an error in column j, the finished ones included. But those stay as they are. What
# they cannot do, the columns behind must do as well: they need the inverse of H *over the columns from
# j on*, and it is not a part of the whole inverse:

# %%
H = torch.tensor([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 2.0]])
print("the part of the inverse\n", torch.linalg.inv(H)[1:, 1:])
print("the inverse of the part\n", torch.linalg.inv(H[1:, 1:]))

# %% [markdown]
# Nothing crashes. On independent inputs the inverse is nearly diagonal, and both are the same.
#
# Write the loop so that it is right. For layers of this size you may invert afresh for every column.
# Cheaper is one step of Gaussian elimination, which takes column j out of the inverse:
# `inverse - outer(inverse[:, j], inverse[j]) / inverse[j, j]`.

# %% nbgrader={"grade_id": "quantization.round_columns", "solution": true}
def round_columns(weight: Tensor, hessian: Tensor, scale: Tensor) -> Tensor:
    """The rounded weight, (rows, cols): codes from -8 to 7, times scale; columns in their order.

    Args:
        weight: (rows, cols). hessian: (cols, cols), positive definite. scale: (rows,).
    """
    ### BEGIN SOLUTION
    w, inverse = weight.clone(), torch.linalg.inv(hessian)
    for j in range(w.shape[1]):
        nearest = (w[:, j] / scale).round().clamp(-8, 7) * scale
        error = (w[:, j] - nearest) / inverse[j, j]
        w[:, j + 1 :] -= torch.outer(error, inverse[j, j + 1 :])
        w[:, j] = nearest
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return w
    ### END SOLUTION


# %% nbgrader={"grade_id": "quantization.round_columns-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("quantization.round_columns", round_columns)

# %% [markdown]
# ## 8. Damping (2 points, 10 minutes)
#
# Two things about that inverse. First, GPTQ needs only *row j of the inverse over the columns from j
# on*, for every j, and one Cholesky factor has them all: if `U` is upper triangular and
# `U^T U = H^-1`, then row j of U is row j of that inverse, divided by the root of its first entry.

# %%
x = random(40, 6).double() @ random(6, 6, seed=1).double()
H = hessian_of(x)
U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
fresh = torch.linalg.inv(H[3:, 3:])[0]
print("row 3 of the inverse from column 3 on", fresh / fresh[0].sqrt())
print("row 3 of U                           ", U[3, 3:])

# %% [markdown]
# Second, the inverse may not exist. 8 calibration rows cannot tell 384 inputs apart, and an input that
# is always 0 has a row of zeros:

# %%
H = hessian_of(random(8, 384).double())
print("rank", torch.linalg.matrix_rank(H).item(), "of", len(H))
print("its Cholesky factor exists:", torch.linalg.cholesky_ex(H)[1].item() == 0)

# %% [markdown]
# So GPTQ adds a little to the diagonal: a share `damping`, usually 0.01, of the *mean* of H's diagonal,
# the same for every column. Write the factor with damping.

# %% nbgrader={"grade_id": "quantization.inverse_factor", "solution": true}
def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular U, (n, n), with U^T U = (H + damping * mean(diag H) * 1)^-1.

    Args:
        hessian: (n, n), symmetric, perhaps singular; not all 0.
    """
    ### BEGIN SOLUTION
    eye = torch.eye(len(hessian), dtype=hessian.dtype)
    damped = hessian + damping * hessian.diagonal().mean() * eye
    return torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    ### END SOLUTION


# %% nbgrader={"grade_id": "quantization.inverse_factor-check", "grade": true, "locked": true, "points": 2}
from llmopt_lab.grading import check

check("quantization.inverse_factor", inverse_factor)

# %% [markdown]
# ## 9. GPTQ in blocks (4 points, 25 minutes)
#
# The guide has GPTQ in three steps: "Quantize weights to INT4", then "Correct errors using Hessian
# matrix", then "Minimize quantization error". In that order it cannot work: what you correct after
# rounding is no longer on the grid, and rounding it again gives back what you had.
#
# The real order is: round a column, spread its error, go on. For a weight of 4,096 columns that passes
# the whole matrix through slow memory 4,096 times. GPTQ is *lazy*: it takes a block of `tile` columns
# on chip, spreads inside the block at once, keeps the scaled errors, and after the block spreads all
# of them behind it in one product. The result is the same.
#
# ```text
# for each block of columns:
#     block = W[:, block]                                    load
#     for each column j of the block:
#         code  = round(w_j / scale), clipped to [-8, 7]     store it
#         error = (w_j - code * scale) / U[j, j]             keep it
#         later columns of the block -= error * U[j, those columns]
#     W[:, behind] -= errors @ U[block, behind]              load, subtract, store
# ```
#
# Is the layer better for it? Its weights are not:

# %%
weight, x, test_x = real_layer()
worse = Predict(
    "GPTQ at 4 bits, groups of 64, against plain rounding: is the weights' own error larger?",
    choices=["smaller", "equal", "larger"],
)
worse

# %%
plain = dequantize(quantize(weight, bits=4, group_size=64))
clever = dequantize(reference_gptq(weight, hessian_of(x), bits=4, group_size=64))
for name, approximation in (("rounded", plain), ("GPTQ", clever)):
    print(
        f"{name:8} weights off by {(approximation - weight).norm() / weight.norm():.3f}, "
        f"outputs on other text by {output_error(approximation, weight, test_x):.3f}"
    )
worse.reveal("larger")

# %% [markdown]
# Worse weights, better layer.
#
# Write the two loops. U is given, and so are the scales, one for every row and group; a group is not a
# block. W is in slow memory and is yours to overwrite. On chip there is room for one block:
#
# - `load("W", w, (slice(0, rows), cols))` returns these columns and counts the bytes. It may return a
#   view: `.clone()` what you change on chip;
# - `store("W", w, (slice(0, rows), cols), value)` writes and counts;
# - `store("codes", codes, (slice(0, rows), j), code)` writes a column of codes.
#
# You are graded on the codes and on the bytes of W. By hand, 2 rows, 5 columns, blocks of 2: blocks
# are read (5 columns), and behind them 3 + 1 columns are read and written. A column is 16 bytes: 144
# bytes read, 64 written. The last block has nothing behind it.

# %% nbgrader={"grade_id": "quantization.gptq", "solution": true}
def gptq(
    w: Tensor, upper: Tensor, scales: Tensor, codes: Tensor, *, group_size: int, tile: int
) -> None:
    """Quantize w to 4 bits, column by column; the result goes to `codes`.

    Args:
        w: (rows, cols) float64. upper: (cols, cols), U^T U is the inverse Hessian.
        scales: (rows, n_groups), of groups of group_size columns.
        codes: (rows, cols) int8, to be stored as "codes".
    """
    ### BEGIN SOLUTION
    rows, n_cols = slice(0, len(w)), w.shape[1]
    for cols in tiles(n_cols, tile):
        block = load("W", w, (rows, cols)).clone()
        errors = torch.zeros_like(block)
        for j in range(cols.start, cols.stop):
            here, scale = j - cols.start, scales[:, j // group_size]
            code = (block[:, here] / scale).round().clamp(-8, 7)
            errors[:, here] = (block[:, here] - code * scale) / upper[j, j]
            block[:, here + 1 :] -= torch.outer(errors[:, here], upper[j, j + 1 : cols.stop])
            store("codes", codes, (rows, j), code.to(torch.int8))
        behind = slice(cols.stop, n_cols)
        if behind.start < n_cols:
            rest = load("W", w, (rows, behind)) - errors @ upper[cols, behind]
            store("W", w, (rows, behind), rest)
    ### END SOLUTION


# %% nbgrader={"grade_id": "quantization.gptq-check", "grade": true, "locked": true, "points": 4}
from llmopt_lab.grading import check

check("quantization.gptq", gptq)

# %% [markdown]
# ## 10. Which channels matter? (3 points, 15 minutes)
#
# *Needs section 4 of the lesson.*
#
# AWQ starts from an observation: keep 1 % of the input channels in float, the *right* 1 %, and most of
# the damage is gone. Which ones are right? Not those with the largest weights, says the paper, but those
# with the largest *inputs*.
#
# How does one find out whether such a claim holds? By an *ablation*: do the same with channels chosen
# at random. If that helps as much, the choice meant nothing.
#
# Write the two pieces. `salient_channels` chooses. `kept_error` measures what it is worth to keep any
# channels you like.

# %% nbgrader={"grade_id": "quantization.keep_channels", "solution": true}
def salient_channels(weight: Tensor, x: Tensor, k: int) -> Tensor:
    """(k,) int64: the input channels that AWQ would keep, those of largest mean |x|.

    Args:
        weight: (d_out, d_in). x: (n, d_in), calibration inputs.
    """
    ### BEGIN SOLUTION
    return x.abs().mean(dim=0).topk(k).indices
    ### END SOLUTION


def kept_error(weight: Tensor, rounded: Tensor, x: Tensor, channels: Tensor) -> float:
    """Error of the layer's output if `channels` stay in float and all others are rounded.

    || x kept^T - x weight^T || / || x weight^T ||, with the L2 norm over all elements.

    Args:
        weight, rounded: (d_out, d_in). x: (n, d_in). channels: (k,) int64, input channels.
    """
    ### BEGIN SOLUTION
    kept = rounded.clone()
    kept[:, channels] = weight[:, channels]
    return ((x @ (kept - weight).T).norm() / (x @ weight.T).norm()).item()
    ### END SOLUTION


# %% nbgrader={"grade_id": "quantization.keep_channels-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("quantization.keep_channels", (salient_channels, kept_error))

# %% [markdown]
# The ablation, on two layers, rounded to 3 bits in groups of 64. One is made up, with inputs as in
# large models: 4 of 384 channels are 30 times as large as the others. The other is real, from
# lab-target.

# %%
def ablation(weight: Tensor, x: Tensor, k: int) -> str:
    approximation = dequantize(quantize(weight, bits=3, group_size=64))

    def error_with(channels: Tensor) -> float:
        mixed = approximation.clone()
        mixed[:, channels] = weight[:, channels]
        return output_error(mixed, weight, x)

    rng = torch.Generator().manual_seed(0)
    draws = [torch.randperm(x.shape[1], generator=rng)[:k] for _ in range(20)]
    return (
        f"nothing kept {output_error(approximation, weight, x):.3f}, largest inputs "
        f"{error_with(x.abs().mean(0).topk(k).indices):.3f}, largest weights "
        f"{error_with(weight.norm(dim=0).topk(k).indices):.3f}, at random "
        f"{sum(map(error_with, draws)) / len(draws):.3f}"
    )


uneven = random(512, 384).double()
uneven[:, [7, 100, 211, 300]] *= 30
weight, x, _ = real_layer()
print("made up:   ", ablation(random(256, 384, seed=1).double(), uneven, 4))
print("lab-target:", ablation(weight, x, 4))

# %% [markdown]
# Where a few inputs are large, keeping the right 1 % removes most of the error, a random 1 % next to none.
# lab-target is small and has no such channels: there the choice hardly matters, and AWQ has little to
# work with. A method rests on an assumption; measure whether your model meets it.

# %% [markdown]
# ## 11. The product that never sees the matrix (3 points, 20 minutes)
#
# *Needs section 6 of the lesson.*
#
# The guide's table gives INT4 8 times the speed of FP32. Nothing gets faster by itself: the obvious way
# makes the weights float again and multiplies. In one token's time that reads the codes, *writes* the
# float matrix, and reads it.

# %%
traffic = Predict(
    "One token, float16. How many times as many bytes as the float16 matrix does that move?",
    answer=2.25,
    tolerance=0.05,
    unit="times",
    explain="a quarter (codes) + 1 (written) + 1 (read) = 2.25, and the scales. Slower, not faster. "
    "Dequantised on chip it is the quarter alone.",
)
traffic

# %% [markdown]
# So dequantise on chip, a piece at a time, and let the piece go. Out of slow memory come only codes,
# scales and x. One step takes a tile of rows of the weight and one group of its columns:
#
# ```text
# for each tile of rows of the weight:              these are columns of out
#     total = zeros                                 on chip
#     for each group of columns:
#         total += x[:, group] @ (codes[rows, group] * scales[rows, group])^T
#     out[:, rows] = total
# ```
#
# `reference.unpack_int4(bytes, n)` gives the n codes a row of packed bytes. Every group begins at an even column,
# so at a whole byte; the last group may be shorter, and odd. `load` and `store` are as in exercise 9;
# the names are "x", "packed", "scales" and "out". On chip there is room for one group of one tile.
#
# By hand, x of 1 row, 4 x 8 codes, groups of 4, tiles of 2, in float64: packed has 16 bytes and is
# read once, scales have 64 and are read once, x has 64 and is read twice, out has 32 and is written
# once.

# %% nbgrader={"grade_id": "quantization.w4a16_linear", "solution": true}
def w4a16_linear(
    x: Tensor, packed: Tensor, scales: Tensor, out: Tensor, *, group_size: int, tile: int
) -> None:
    """x times the transpose of the weight, written to `out`; the weight exists only on chip.

    Args:
        x: (m, n_in). packed: (n_out, ceil(n_in / 2)) uint8, the even column in the low half.
        scales: (n_out, n_groups), of groups of group_size columns; group_size is even.
        out: (m, n_out). tile: rows of the weight that are on chip at once.
    """
    ### BEGIN SOLUTION
    every = slice(0, len(x))
    for rows in tiles(len(packed), tile):
        total = x.new_zeros(len(x), rows.stop - rows.start)
        for group, cols in enumerate(tiles(x.shape[1], group_size)):
            n_bytes = slice(cols.start // 2, ceil_div(cols.stop, 2))
            codes = reference.unpack_int4(
                load("packed", packed, (rows, n_bytes)), cols.stop - cols.start
            )
            scale = load("scales", scales, (rows, slice(group, group + 1)))
            total += load("x", x, (every, cols)) @ (codes * scale).T
        store("out", out, (every, rows), total)
    ### END SOLUTION


# %% nbgrader={"grade_id": "quantization.w4a16_linear-check", "grade": true, "locked": true, "points": 3}
from llmopt_lab.grading import check

check("quantization.w4a16_linear", w4a16_linear)

# %% [markdown]
# ## 12. The W4A16 kernel in Triton (5 points, 40 minutes)
#
# *Needs section 6 of the lesson.*
#
# One program makes a tile of out: TILE_M rows of x against TILE_N rows of the weight. It walks the
# groups, as in exercise 11. What is new is that a byte holds two columns, and there is no cheap way to
# shuffle them apart on chip. You need none: a sum may be added in any order, so make *two* products,
#
# ```text
# even columns of x  @  low nibbles^T      +      odd columns of x  @  high nibbles^T
# ```
#
# All tensors are contiguous: row r of a tensor with n columns begins at r * n. The products are
# `tl.dot(a, tl.trans(b), input_precision="ieee")` in float32; without that word a GPU rounds float32 to
# 10 bits and misses the tolerance.
#
# Four questions to answer before you write. Which columns of x meet byte b? What stands in memory after
# the last column of x, and after the last row? Where is the scale of row r and group g? What is the sign
# bit of a nibble, and how do you get 15 to mean -1? (`(nibble ^ 8) - 8`, but in a type that has a sign.)
#
# You are graded in float32, on small and uneven shapes: 21 rows, 40 outputs, 50 columns, 77 columns. You
# need no GPU: without one Triton interprets your kernel on the CPU.

# %% nbgrader={"grade_id": "quantization.w4a16_kernel", "solution": true}
from llmopt_lab.core.device import prepare_triton

prepare_triton()  # without Triton this says what you can do; the other exercises need none

import triton
import triton.language as tl


@triton.jit
def w4a16_kernel(
    x_ptr,  # (m, n_in) float32
    packed_ptr,  # (n_out, n_bytes) uint8: columns 2 b and 2 b + 1 in the low and high half of byte b
    scales_ptr,  # (n_out, n_groups) float32
    out_ptr,  # (m, n_out) float32
    m, n_out, n_in, n_bytes, n_groups,
    GROUP: tl.constexpr,  # columns that share a scale, 32
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):
    """One program: TILE_M rows of x times TILE_N rows of the weight."""
    row = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)  # (TILE_M,) of x
    channel = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)  # (TILE_N,) of the weight
    acc = tl.zeros((TILE_M, TILE_N), tl.float32)
    ### BEGIN SOLUTION
    row_ok, channel_ok = (row < m)[:, None], (channel < n_out)[:, None]
    for group in range(0, n_groups):
        byte = group * (GROUP // 2) + tl.arange(0, GROUP // 2)
        ok = channel_ok & (byte < n_bytes)[None, :]
        p = tl.load(packed_ptr + channel[:, None] * n_bytes + byte[None, :], ok, other=0)
        low = ((p & 0xF).to(tl.int32) ^ 8) - 8
        high = ((p >> 4).to(tl.int32) ^ 8) - 8
        at_x = x_ptr + row[:, None] * n_in + 2 * byte[None, :]
        x_even = tl.load(at_x, row_ok & (2 * byte < n_in)[None, :], other=0.0)
        x_odd = tl.load(at_x + 1, row_ok & (2 * byte + 1 < n_in)[None, :], other=0.0)
        dot = tl.dot(x_even, tl.trans(low.to(tl.float32)), input_precision="ieee")
        dot += tl.dot(x_odd, tl.trans(high.to(tl.float32)), input_precision="ieee")
        scale = tl.load(scales_ptr + channel * n_groups + group, channel < n_out, other=0.0)
        acc += dot * scale[None, :]
    at_out = out_ptr + row[:, None] * n_out + channel[None, :]
    tl.store(at_out, acc, row_ok & (channel < n_out)[None, :])
    ### END SOLUTION


# %% nbgrader={"grade_id": "quantization.w4a16_kernel-check", "grade": true, "locked": true, "points": 5}
from llmopt_lab.grading import check

check("quantization.w4a16_kernel", w4a16_kernel)

# %% [markdown]
# ## Your score, and where to go
#
# Save the notebook. In a terminal, in the folder of the course:
#
# ```text
# llmopt grade exercises/4_quantization.ipynb
# ```
#
# It prints your points for each exercise, and the next step for those that are missing. It runs a
# copy of your notebook from top to bottom; an endless loop costs that exercise and nothing else.
#
# `solutions/4_quantization.ipynb` has one answer to each exercise. Yours may look different.
#
# The course's own versions are in `llmopt_lab/quantization`: `reference.py` for scales, packing and fake
# quantization, `gptq.py` with act-order and scales that are chosen on the way, `input_scales.py` for AWQ
# and SmoothQuant.
