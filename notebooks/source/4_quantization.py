# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
# ---

# %% [markdown]
# # 4. Quantization
# {{colab_badge}}
#
# To write one token, a model reads all its weights once. Store a weight in 4 bits instead of 16,
# and there are four times fewer bytes to read and to hold. The price is an error in every weight.
# This chapter is about making that error not matter. After it you can round a layer so that its
# *output* hardly changes, count what it really takes, predict where it pays, and find the bug in
# somebody else's quantizer.
#
# | section | minutes |
# |---|---|
# | 1. A question | 5 |
# | 2. The idea, step by step | 30 |
# | 3. What the guide says, measured | 25 |
# | 4. A real model | 25 |
# | 5. Weights alone, or activations too | 20 |
# | 6. The kernel | 15 |
# | 7. Where it loses | 10 |
# | 8. In production, and what to remember | 5 |
#
# The exercises are in `exercises/4_quantization.ipynb`. Do them after section 3, or at the end.

# %% tags=["setup", "timing", "nbval-ignore-output"]
try:
    import llmopt_lab
except ModuleNotFoundError:  # on Colab, for instance
    get_ipython().run_line_magic("pip", 'install -q "llmopt_lab @ git+{{repository}}"')

from llmopt_lab.core.session import start

start()

# %% [markdown]
# ## 1. A question (5 minutes)
#
# `lab-target`, the small model of Python code that comes with the course, has a perplexity of about
# 4.6 on code that it was not trained on: it is as unsure as if it chose among 4.6 tokens. Now take
# all weights of its layers and round each to the nearest of 7 values, −3 to 3 times a scale.
# Each run of 128 weights has a scale of its own, so its largest weight fits. That is
# 3 bits a weight, and nothing clever.
#
# Lock in your guess. Section 4 measures the answer.

# %%
from llmopt_lab.widgets.predict import Predict

guess = Predict(
    "The perplexity was 4.6. What is it with every weight rounded to 3 bits, groups of 128?",
    tolerance=0.2,
)
guess

# %% [markdown]
# ## 2. The idea, step by step (30 minutes)
#
# **A grid.** Take the largest weight of a group. Divide it by the largest code: that is the *scale*.
# Every weight is then divided by the scale and rounded; what is stored is the code. With 4 bits the
# codes go from −7 to 7 (−8 would fit, but then the grid would not be symmetric). To use a weight,
# multiply its code by the scale. Below, one row of 8 weights, in two groups of 4.

# %%
import torch

from llmopt_lab.core.trace import recording
from llmopt_lab.quantization import dequantize, quantize
from llmopt_lab.quantization.view import rounding_frames
from llmopt_lab.widgets.player import Player

weight = torch.tensor([[0.70, -0.31, 0.12, 0.24, 1.40, -0.29, 0.47, -0.88]])
with recording() as trace:
    q = quantize(weight, bits=4, group_size=4)
Player(rounding_frames(trace, q, weight=weight), title="Round to the nearest code")

# %% [markdown]
# *Only the picture answers these:*
# - −0.31 and −0.29 are nearly equal. Why do they come back as −0.3 and −0.2?
# - Which weight is off by most, and how does that compare with half a step?
#
# **An outlier eats the scale.** A weight far larger than the others stretches the grid, and small
# weights fall on code 0. How many weights share a scale decides who suffers: the whole matrix
# (per tensor), a row (per channel), or a few neighbours (per group). Below, three rows of
# 12 weights; one weight grows from frame to frame.

# %%
from llmopt_lab.quantization.view import scales_frame


def with_outlier(size):
    """Three rows of weights around 0.3, one of them `size`, rounded to 4 bits in three ways."""
    w = 0.3 * torch.randn(3, 12, generator=torch.Generator().manual_seed(7))
    w[1, 5] = size
    ways = {
        "per tensor": quantize(w, bits=4, per_tensor=True),
        "per channel": quantize(w, bits=4),
        "per group of 4": quantize(w, bits=4, group_size=4),
    }
    return scales_frame(w, ways)


sizes = (0.6, 1.0, 2.0, 4.0, 8.0, 16.0)
Player([with_outlier(size) for size in sizes], title="One large weight")

# %% [markdown]
# *Only the picture answers these:*
# - At which size has the per-tensor matrix lost everything but the outlier?
# - How many weights does the group of the outlier lose at most, and how many does its row lose?
#
# **Two codes a byte.** No memory has 4-bit cells. Two codes share a byte: one in its low half, one in
# its high half. A negative code is stored in two's complement, so −1 is `1111`, and as an int8 it is
# eight ones. Left: packed right. Right: the mask `& 0xF` was forgotten. Step through both.

# %%
from llmopt_lab.quantization import pack_int4, unpack_int4
from llmopt_lab.quantization.view import packing_frames

codes = torch.tensor([3, 5, -1, 3, -8, 7], dtype=torch.int8)
packed = pack_int4(codes)
forgot = (codes[0::2] | codes[1::2] << 4).view(torch.uint8)
Player(
    packing_frames(codes, packed, unpack_int4(packed, 6)),
    packing_frames(codes, forgot, unpack_int4(forgot, 6)),
    labels=("with the mask", "without"),
    title="Two codes in a byte",
)

# %% [markdown]
# *Only the picture answers this:* in which of the two codes of a byte does the forgotten mask do its
# damage, and to whom?
#
# **Bits that you really pay.** Scales take memory too: 16 bits for each group. So the bits a weight
# are $b + 16/g$ (and $b/g$ more with a zero point). Slide:

# %%
from llmopt_lab.quantization.reference import bits_per_weight
from llmopt_lab.widgets.explore import Choice, Explore
from llmopt_lab.widgets.panels import Bar, Bars, Frame, Meter


def effective_bits(bits, zero_point):
    """Bits a weight, a frame a group size, counted on a layer of 512 columns."""
    made = []
    for group_size in (8, 16, 32, 64, 128, 512):
        q = quantize(torch.randn(4, 512), bits=bits, group_size=group_size, symmetric=not zero_point)
        total = bits_per_weight(q)
        bars = [Bar("codes", bits, "good"), Bar("scales", 16 / group_size, "bad")]
        if zero_point:
            bars.append(Bar("zero points", bits / group_size, "bad"))
        made.append(
            Frame(
                f"{bits} bits in groups of {group_size}: {total:g} bits a weight. A 16-bit model "
                f"becomes {16 / total:.2f} times smaller, not {16 / bits:.4g} times.",
                (Bars("bits a weight", tuple(bars), "bits", 10), Meter("together", total, "bits", 16)),
                legend=(("good", "weights"), ("bad", "overhead")),
            )
        )
    return Player(made, start=4)


Explore(
    effective_bits,
    bits=Choice("bits of a code", (2, 3, 4, 8), 4),
    zero_point=Choice("with a zero point", (False, True), False),
)

# %% [markdown]
# *Only the picture answers this:* at 2 bits, which group size doubles what a weight takes?
#
# **Better than nearest.** Rounding to the nearest code is best for the weights. Nobody needs the
# weights; what matters is the layer's output $XW^T$. Two inputs that are nearly always equal make it
# plain. Two weights of 0.6 on a grid of whole numbers: nearest gives 1 and 1, and the output is
# $2x$ instead of $1.2x$. Rounding one up and one down gives $1x$. So round the first weight, see
# its error, and let the second one make it good *before* it is rounded:

# %%
x = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)).expand(-1, 2)
x = x + 0.3 * torch.randn(1000, 2, generator=torch.Generator().manual_seed(1))
h = 2 * x.T @ x
w = torch.tensor([0.6, 0.6])

first = w[0].round()
error = w[0] - first
moved = error * h[0, 1] / h[1, 1]  # what the second weight must take over: least squares
second = (w[1] + moved).round()
print(f"first weight: 0.6 becomes {first:.0f}, off by {error:.1f}")
print(f"second weight: 0.6 {moved:+.2f} = {w[1] + moved:.2f} becomes {second:.0f}")
for name, rounded in (("nearest", w.round()), ("one after the other", torch.stack([first, second]))):
    d = x @ (rounded - w)
    print(f"{name:20} {rounded.tolist()}: squared output error {d.square().sum():.0f}")

# %% [markdown]
# That is GPTQ. For a whole layer, $H = 2X^TX$ says how the inputs vary together. Go through the columns
# from left to right. Round one. Then move all columns to its right by what makes up best for its
# error: $\delta = -\mathrm{error} \cdot U_{j,>j} / U_{jj}$. Where $U$ comes from is below. A cell is filled
# the more, the farther its weight has moved from where it was.

# %%
from llmopt_lab.quantization import gptq, hessian_of
from llmopt_lab.quantization.view import frames

rng = torch.Generator().manual_seed(12)
n_cols = 10
x = 0.5 * torch.randn(200, n_cols, generator=rng).cumsum(1) + torch.randn(200, 1, generator=rng)
weight = torch.randn(4, n_cols, generator=rng)
h = hessian_of(x)
nearest = dequantize(quantize(weight, bits=3))
with recording() as trace:
    q = gptq(weight, h, bits=3)
Player(frames(trace, weight=weight, hessian=h, rounded=nearest), title="GPTQ, column by column")

# %% [markdown]
# *Only the picture answers these:*
# - How far ahead of the column that is rounded does the wave reach? (Here neighbouring inputs are alike.)
# - Whose weights end farther from the original, GPTQ's or those of plain rounding? Whose output?
# - The last column can pass its error to nobody. What does that do to GPTQ's line?
#
# **Where $U$ comes from.** After $j$ columns are fixed, only the others can move, so only their part of $H$
# counts, and its inverse is needed. Inverting again for each column would cost $n^4$. All these
# inverses stand in one matrix: $U$, the Cholesky factor of $H^{-1} = U^T U$. Row $j$ of $U$ is the first
# row of the inverse of what is left of $H$, over the root of its first entry. Check it:

# %%
from llmopt_lab.quantization.cases import layer
from llmopt_lab.quantization.gptq import inverse_factor

h = hessian_of(layer(4, 10, 200, correlated=True)[1])
upper, whole = inverse_factor(h, damping=0.0), torch.linalg.inv(h)
for j in (0, 4, 8):
    left = torch.linalg.inv(h[j:, j:])  # the first j columns are fixed
    row, stale = (inverse[0] / inverse[0, 0].sqrt() for inverse in (left, whole[j:, j:]))
    right = torch.allclose(upper[j, j:], row, rtol=1e-10, atol=0)
    off = (stale - row).norm() / row.norm()
    print(f"column {j}: U's row is {'right' if right else 'WRONG'}; that of the whole inverse is off by {off:.0%}")

# %% [markdown]
# The percentages are a bug that people write: the inverse of the *whole* $H$ at every column, as if the
# columns that are fixed could still move. It crashes nowhere. One of the exercises is to find it.
#
# This is the loop. `tile` columns are finished together; the columns behind them get all their
# corrections in one product at the end, which is faster and gives the same result.

# %%
import inspect

from llmopt_lab.cli import without_records
from llmopt_lab.quantization.gptq import gptq as reference

source = without_records(inspect.getsource(reference))
print(source[source.index("    for steps in tiles") : source.index("    return Quantized")])

# %% [markdown]
# Is that the best order? `act_order=True` starts with the columns whose inputs are largest, while there
# are many others left to make good for them. And what is gained depends on the inputs: where they
# are independent, there is nothing to pass on. Measured on inputs that were *not* used for $H$:

# %%
def relative_output_error(made, weight, x):
    return float(((x @ (made - weight).T).norm() / (x @ weight.T).norm()) ** 2)


print(f"{'inputs':18}{'nearest':>9}{'GPTQ':>9}{'act-order':>11}   GPTQ's weights are farther off")
for name in ("independent", "correlated", "one common part"):
    w, x = layer(32, 64, 4000, correlated=name == "correlated", seed=3)
    if name == "one common part":
        x = x[:, :1] + 0.05 * x
    seen, unseen = x[:2000], x[2000:]
    ways = {
        "nearest": quantize(w, bits=4),
        "gptq": gptq(w, hessian_of(seen), bits=4),
        "act-order": gptq(w, hessian_of(seen), bits=4, act_order=True),
    }
    made = {way: dequantize(q) for way, q in ways.items()}
    errors = [relative_output_error(m, w, unseen) for m in made.values()]
    farther = (made["gptq"] - w).norm() / (made["nearest"] - w).norm()
    print(f"{name:17}{errors[0]:10.5f}{errors[1]:9.5f}{errors[2]:11.5f}{farther:12.2f} times")

# %% [markdown]
# Worse weights, better layer.
#
# ## 3. What the guide says, measured (25 minutes)
#
# The written guide that this course grew out of begins with this, as printed there:

# %%
def quantize_to_int8(tensor):
    """Quantize FP32 to INT8"""
    # Find scale and zero point
    scale = tensor.abs().max() / 127.0
    zero_point = 0

    # Quantize
    quantized = torch.round(tensor / scale).clamp(-128, 127).to(torch.int8)

    return quantized, scale, zero_point


def guides_dequantize(quantized, scale, zero_point):
    """Dequantize INT8 back to FP32"""
    return (quantized.float() - zero_point) * scale


# %% [markdown]
# **"[1024, 1024] FP32 = 4 MB ... 1 MB (4x reduction!)".** Right, in MiB. **"Find scale and zero
# point".** The zero point is not looked for. Where values are not centred on 0, that costs codes:

# %%
w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
print(f"float32 {w.nbytes:,} bytes, int8 {quantize_to_int8(w)[0].nbytes:,} bytes")


def snr_db(got, want):
    return float(10 * torch.log10(want.square().sum() / (got - want).square().sum()))


rng = torch.Generator().manual_seed(1)
data = {
    "weights around 0": torch.randn(64, 1024, generator=rng),
    "after a ReLU": torch.randn(64, 1024, generator=rng).relu(),
    "between 9 and 10": 9 + torch.rand(64, 1024, generator=rng),
}
print("8 bits              guide: codes used   dB   with a zero point: codes used   dB")
for name, x in data.items():
    codes, scale, zero = quantize_to_int8(x)
    ours = quantize(x, bits=8, symmetric=False, per_tensor=True)
    print(f"{name:20}{len(codes.unique()):17}{snr_db(guides_dequantize(codes, scale, zero), x):5.1f}"
          f"{len(ours.codes.unique()):31}{snr_db(dequantize(ours), x):5.1f}")

# %% [markdown]
# dB is signal to noise: 6 more halve the error. Our zero point keeps 0 on the grid, as padding and
# ReLU need it, so in the last row most codes still stand for values that never come.
#
# **Edges.** All zeros, one NaN, half precision:

# %%
from llmopt_lab.core.errors import BadInput

zeros = torch.zeros(4)
print("zeros:    the division gives", (zeros / (zeros.abs().max() / 127)).tolist()[:2])
x = torch.tensor([1.0, 2.0, float("nan")])
codes, scale, _ = quantize_to_int8(x)
print(f"one NaN:  scale {scale}, so every weight comes back as {guides_dequantize(codes, scale, 0)[0]}")
tiny = torch.full((4,), 1.5e-6, dtype=torch.float16)
print(f"float16:  scale of weights of 1.5e-6 is {quantize_to_int8(tiny)[1]}")
print(f"ours:     zeros {dequantize(quantize(zeros[None])).tolist()[0][:2]}, "
      f"tiny {dequantize(quantize(tiny[None]))[0, 0]:.2e}")
try:
    quantize(x[None])
except BadInput as refused:
    print("ours, NaN:", refused)

# %% [markdown]
# **One scale a tensor** is the guide's only choice. Here is what it risks. In each layer of
# `lab-target`, take 4 of the 704 hidden channels of the feed-forward network. Multiply their rows of
# `up_proj` by 30, and divide their columns of `down_proj` by 30. The product is the same: it is the
# same function. Now round both models.

# %% tags=["timing", "nbval-ignore-output"]
from copy import deepcopy

from llmopt_lab.core.device import pick_device
from llmopt_lab.nn.weights import load
from llmopt_lab.quantization.perplexity import bits_per_byte, held_out_windows, perplexity

lm = load("lab-target", device=pick_device())
text, n_bytes = held_out_windows(lm, 2, 256)
text = text.to(lm.model.device)


def measure(model):
    """Perplexity on two held-out files, the first 256 tokens of each."""
    return perplexity(bits_per_byte(model, text, n_bytes), text[:, 1:].numel(), n_bytes)


def rescaled(model, factor, n=4):
    """The same function: `n` hidden channels of each layer larger, and smaller on the way out."""
    model = deepcopy(model)
    for block in model.layers:
        block.mlp.up_proj.weight[:n] *= factor
        block.mlp.down_proj.weight[:, :n] /= factor
    return model


def with_rounded_weights(model, **how):
    model = deepcopy(model)
    for layer_ in model.layers.modules():
        if isinstance(layer_, torch.nn.Linear):
            layer_.weight.copy_(dequantize(quantize(layer_.weight, **how)))
    return model


same = rescaled(lm.model, 30)
apart = (same(text[:1, :-1]) - lm.model(text[:1, :-1])).abs().max()
print(f"largest difference of a logit: {apart:.0e}")
found = {"float": [measure(lm.model), measure(same)]}
for bits in (8, 4):
    for name, how in (("tensor", {"per_tensor": True}), ("row", {})):
        pair = [with_rounded_weights(model, bits=bits, **how) for model in (lm.model, same)]
        found[f"{bits} bits, one scale a {name}"] = [measure(model) for model in pair]
print(f"{'perplexity':28}{'as trained':>12}{'rescaled':>12}")
for name, (trained, scaled) in found.items():
    print(f"{name:28}{trained:12,.2f}{scaled:12,.2f}")

# %% [markdown]
# Same function, dead model: a perplexity above the number of tokens (4,096) is worse than knowing
# nothing. A scale a row costs 16 bits for several hundred weights. There is no reason to save it.
#
# **"Quantization-aware training ... straight-through estimator".** As printed:

# %%
import torch.nn.functional as F
from torch import nn


class FakeQuantize(nn.Module):
    """Simulate quantization during training"""

    def __init__(self, num_bits=8):
        super().__init__()
        self.num_bits = num_bits

    def forward(self, x):
        # Quantize
        scale = x.abs().max() / (2 ** (self.num_bits - 1) - 1)
        quantized = torch.round(x / scale).clamp(
            -(2 ** (self.num_bits - 1)),
            2 ** (self.num_bits - 1) - 1,
        )

        # Dequantize (straight-through estimator)
        dequantized = quantized * scale

        return dequantized


class QuantizedLinear(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.fake_quant = FakeQuantize()

    def forward(self, x):
        quantized_weight = self.fake_quant(self.weight)
        return F.linear(x, quantized_weight)


# %% [markdown]
# Count the weights that get a gradient, and train it towards another layer's outputs. Ours differs in
# one thing: `fake_quantize` hands the gradient through as if nothing had been rounded.

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.quantization.reference import fake_quantize


class StraightThroughLinear(QuantizedLinear):
    def forward(self, x):
        return F.linear(x, fake_quantize(self.weight, bits=8))


def fit(layer_, steps=100):
    """Mean squared error before and after training towards the outputs of a fixed layer."""
    rng = torch.Generator().manual_seed(5)
    x, target = torch.randn(256, 64, generator=rng), torch.randn(64, 64, generator=rng)
    optimizer, losses = torch.optim.Adam(layer_.parameters(), lr=0.1), []
    for _ in range(steps):
        loss = F.mse_loss(layer_(x), x @ target.T) / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


torch.manual_seed(0)
for name, layer_ in (("guide", QuantizedLinear(64, 64)), ("ours", StraightThroughLinear(64, 64))):
    before = layer_.weight.detach().clone()
    losses = fit(layer_)
    n_reached, n_moved = (layer_.weight.grad != 0).sum(), (layer_.weight != before).sum()
    print(f"{name:6} {n_reached:5} of 4096 weights get a gradient, {n_moved:5} ever moved; "
          f"loss {losses[0]:.2f} to {losses[-1]:.4f}")

x = torch.randn(100, 1024)
print(f"outputs for 1,024 inputs: {QuantizedLinear(1024, 64)(x).std():.1f}; "
      f"of torch's own layer: {nn.Linear(1024, 64)(x).std():.2f}")

# %% [markdown]
# `round` is flat almost everywhere, so its gradient is 0. Only the largest weight learns, because
# it makes the scale. The comment names the straight-through estimator; the code does not have it. And
# `torch.randn` is no start for a layer: compare the sizes of the outputs.
#
# **"INT4 ... 4x reduction vs INT8, 16x vs FP32", and `pack_int4`**, which the guide calls and does not
# have. Packed and counted:

# %%
w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(2))
int8 = quantize(w, bits=8)
for group_size in (None, 128, 32):
    q = quantize(w, bits=4, group_size=group_size)
    n = pack_int4(q.codes).nbytes + q.scales.half().nbytes
    name = f"groups of {group_size}" if group_size else "a scale a row"
    print(f"4 bits, {name:14}: {n:7,} bytes; float32 takes {w.nbytes / n:.2f} times as much, "
          f"bfloat16 {w.nbytes / 2 / n:.2f}, int8 {(int8.codes.nbytes + 2 * 1024) / n:.2f}")

# %% [markdown]
# 8 times, not 16; the guide's own table, ten lines further on, says 0.125. And nobody serves in float32:
# against bfloat16 it is less than 4.
#
# **GPTQ: "1. Quantize weights to INT4. 2. Correct errors using Hessian matrix."** Both functions it
# calls are missing, and the order cannot work. Once all weights are rounded, the best correction is the
# original weight itself; round that, and you are where you were. "Hessian (second-order gradient)" is
# true of the *layer's output error*, not of the model's loss: no backward pass is needed.

# %%
w, x = layer(1, 12, 200, correlated=True, seed=1)
h = hessian_of(x)
rounded = quantize(w, bits=4)
correction = torch.linalg.lstsq(x, x @ (w - dequantize(rounded)).T).solution.T
corrected = dequantize(rounded) + correction
again = quantize(corrected, bits=4)
print("codes after correcting and rounding again are the same:", torch.equal(again.codes, rounded.codes))


def output_error_of(v):
    return (x @ (v - w[0])).square().sum()


by_autograd = torch.autograd.functional.hessian(output_error_of, dequantize(rounded)[0])
print("autograd's Hessian of the output error is 2 X^T X:", torch.allclose(by_autograd, h, rtol=1e-10))

# %% [markdown]
# **The guide's table**: memory 1, 0.5, 0.25, 0.125; speed 1, 2, 4, 8 times; accuracy 100, 99.9, 99, 95 %.
# Its speed is 1 / memory, and its accuracy names no model. Here it is again, measured: bytes of the
# layers with their scales; one token through a layer of 4,096 x 4,096 on this machine, in the way the
# guide writes it, *dequantize, then multiply*; and perplexity of `lab-target`.

# %% tags=["timing", "nbval-ignore-output"]
from timeit import repeat

from llmopt_lab.quantization.linear import QuantizedLinear as CodedLinear

big, token = torch.randn(4096, 4096), torch.randn(1, 4096)
half = big.bfloat16(), token.bfloat16()
int8_codes, int8_scale, _ = quantize_to_int8(big)
int4_layer = CodedLinear(quantize(big, bits=4, group_size=128))
ways = {
    "FP32": (32, lambda: F.linear(token, big), found["float"][0]),
    "BF16": (16, lambda: F.linear(half[1], half[0]), measure(deepcopy(lm.model).bfloat16())),
    "INT8, guide": (8, lambda: F.linear(token, guides_dequantize(int8_codes, int8_scale, 0)),
                    found["8 bits, one scale a tensor"][0]),
    "INT4, guide": (4, None, found["4 bits, one scale a tensor"][0]),
    "INT4, groups": (4.125, lambda: int4_layer(token),
                     measure(with_rounded_weights(lm.model, bits=4, group_size=128))),
}
base = None
print(f"{'':14}{'memory':>9}{'ms a token':>13}{'speed':>8}{'perplexity':>13}")
for name, (bits, call, ppl) in ways.items():
    ms = None if call is None else 1000 * min(repeat(call, number=1, repeat=3))
    base = base or ms
    speed = f"{ms:13.1f}{base / ms:7.2f}x" if ms else f"{'not run':>13}{'':8}"
    print(f"{name:14}{bits / 32:8.3f}x{speed}{ppl:13.2f}")

# %% [markdown]
# (BF16, not FP16, is what models are served in: 300 times 300 is infinity in FP16. The guide's INT4 packs
# its codes and has no way back, so it has no time.) Fewer bytes are faster only
# if nobody writes the float weight back to memory. Dequantizing first writes
# and reads more than the float layer ever did. That is why section 6 has a kernel.
#
# | the guide says | measured |
# |---|---|
# | INT8: scale and zero point, 4x smaller | 4x; the zero point is never found |
# | one scale a tensor | 4 channels rescaled, same function: perplexity above 100,000 at 4 bits |
# | straight-through estimator | it is missing: 1 of 4,096 weights gets a gradient |
# | INT4: 16x against FP32 | 8x; 7.76x with groups of 128; less than 4x against BF16 |
# | GPTQ: quantize, then correct | gives back exactly the rounded weights; correct *while* rounding |
# | speed 2x, 4x, 8x | slower than float when dequantized first: see the table |
# | accuracy 99 %, 95 % | no number without a model, a method and a group: see the tables |


# %% [markdown]
# ## 4. A real model (25 minutes)
#
# Section 3 rounded `lab-target` layer by layer. `quantize_model` does it properly: block by block, each
# on what the quantized blocks before it give, so that later blocks can make earlier errors good. The
# calibration text is standard-library source that is not in the held-out text. First: is the whole
# thing worth the trouble at 3 bits?

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.nn.generate import generate
from llmopt_lab.quantization.model import linear_nbytes, quantize_model
from llmopt_lab.quantization.perplexity import calibration_tokens

rng = torch.Generator().manual_seed(0)
windows = calibration_tokens(lm, 32, 256, rng=rng)[0].to(lm.model.device)
calibration = windows[:8]
hows = {
    "float": None,
    "nearest": {"method": "rtn", "bits": 3, "group_size": 128},
    "GPTQ": {"method": "gptq", "bits": 3, "group_size": 128, "act_order": True},
}
prompt = lm.encode("import json\n\n\ndef read(path):\n    with open(path) as f:\n        return")
for name, how in hows.items():
    model, ppl = lm.model, found["float"][0]
    if how is not None:
        model = quantize_model(lm.model, calibration=calibration, progress=False, **how)
        ppl = measure(model)
    written = generate(model, prompt, 8, eos=list(lm.eos))[len(prompt) :]
    print(f"{name:8} {linear_nbytes(model) / 2**20:5.1f} MiB, perplexity {ppl:6.2f}, "
          f"goes on with {lm.decode(written)!r}")

# %% [markdown]
# (Codes of 3 bits are held in 4 here, as in most formats. The float layers are float32.)
#
# The large table was made in advance by `python -m llmopt_lab.quantization.measure`, which took
# an hour and a half of one core: 2 to 8 bits, four group sizes, four ways, for `lab-target` also with a zero
# point, on 11 held-out files. SmolLM2-135M is a chat model of 135 million weights; it reads eight of
# these files. Slide; a step of the player is a group size.

# %%
import json

from llmopt_lab.quantization.measure import RESULTS
from llmopt_lab.quantization.view import quality_frames, recorded_ways

recorded = json.loads(RESULTS.read_text())["models"]


def recorded_perplexity(model, bits, zero_point):
    made = quality_frames(recorded[model], bits=bits, symmetric=not zero_point)
    return Player(made, start=min(2, len(made) - 1))


Explore(
    recorded_perplexity,
    model=Choice("model", tuple(recorded), "lab-target"),
    bits=Choice("bits", (2, 3, 4, 8), 3),
    zero_point=Choice("with a zero point", (False, True), False),
)

# %% [markdown]
# (Bars end at four times the float model.) *Only the picture answers these:*
# - From how many bits on does it not matter which way you take?
# - At 3 bits, what helps plain rounding more: groups of 32, or a zero point? Which of them costs less?
#   (Three bits are 7 symmetric values, and 8 with a zero point.)
# - SmolLM2 has been trained on far more text for each weight. Does it take rounding better, or worse?
#
# Now your prediction, from the same table:

# %%
base = recorded["lab-target"]["float"]["perplexity"]
ways = recorded_ways(recorded["lab-target"], bits=3, group_size=128, symmetric=True)
asked = ways["nearest"]["perplexity"]
print(f"float {base:.2f}, 3 bits to the nearest, groups of 128: {asked:.2f}")
guess.reveal(round(asked, 1))

# %%
print("bits per byte above float, and their ratio to those of plain rounding; groups of 128")
for model, record in recorded.items():
    for bits in (4, 3):
        ways = recorded_ways(record, bits=bits, group_size=128, symmetric=True)
        for way, row in ways.items():
            ratio = row["excess"] / ways["nearest"]["excess"]
            print(f"{model:13} {bits} bits  {way:16} {row['excess']:.3f} {ratio:6.2f}")

# %% [markdown]
# **Inside one layer.** The picture of section 2, on the output projection of the first layer, with its real
# inputs. It takes 24 of the rows; each cell is an average over 4 rows and 24 columns. Then try other layers.

# %% tags=["timing", "nbval-ignore-output"]
def inputs_of(name, model=lm.model):
    """Inputs of one layer while the model reads 1,024 tokens of the calibration text, (rows, d_in)."""
    rows = []
    layer_ = model.get_submodule(name)
    hook = layer_.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, 1)))
    model(calibration[:4])
    hook.remove()
    return torch.cat(rows).cpu()


def one_layer(number, bits):
    """GPTQ at work on 24 rows of a layer's output projection."""
    name = f"layers.{number}.self_attn.o_proj"
    w, h = lm.model.get_submodule(name).weight[:24].cpu(), hessian_of(inputs_of(name))
    how = {"bits": bits, "group_size": 128}
    with recording() as trace:
        gptq(w, h, **how)
    return Player(frames(trace, weight=w, hessian=h, rounded=dequantize(quantize(w, **how))))


Explore(
    one_layer,
    number=Choice("layer", tuple(range(lm.config.n_layers)), 0),
    bits=Choice("bits", (2, 3, 4), 3),
)

# %% [markdown]
# *Only the picture answers this:* where do GPTQ's weights end farthest from their originals, left or
# right, and why there?
#
# **AWQ: protect what the inputs make large.** A weight matters as much as its input is large. Multiply
# the weights of loud input channels by $s > 1$ and divide the inputs by $s$: the same function, but
# these weights are rounded on a finer grid. How loud are the channels of the last layer's
# down projection?

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.quantization.input_scales import awq_scales
from llmopt_lab.quantization.view import search_frames

name = f"layers.{lm.config.n_layers - 1}.mlp.down_proj"
x, w = inputs_of(name), lm.model.get_submodule(name).weight.cpu()
mean_abs = x.abs().mean(0)
print(f"{len(mean_abs)} channels: the loudest has {mean_abs.max() / mean_abs.median():.0f} times the "
      f"mean |x| of the median one; the largest single input is {x.abs().max():.0f}, "
      f"the median |x| {x.abs().median():.3f}")

with recording() as trace:
    awq_scales(w, mean_abs, hessian_of(x), bits=3, group_size=128)
Player(search_frames(trace), title="AWQ tries alpha: s = mean|x| to the power alpha")

# %% [markdown]
# *Only the picture answers this:* what happens at alpha = 1, and what would you lose if you took it?
#
# **Training with rounding in place.** With the straight-through estimator the weights can learn to live on
# the grid. A few steps on the whole model, 3 bits, each on 256 of 8,192 tokens of the calibration text:

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.quantization.qat import (
    FakeQuantize,
    fake_quantized,
    next_token_loss,
    train_quantized,
)

rng, rows = torch.Generator().manual_seed(0), windows.reshape(-1, 128)
model = fake_quantized(lm.model, FakeQuantize(3, group_size=128))
before = measure(model)
losses = train_quantized(
    model, next_token_loss(rows, batch=2), steps=8, lr=1e-4, rng=rng, progress=False
)
print(f"perplexity {before:.2f} before, {measure(model):.2f} after {len(losses)} steps; "
      f"training loss {losses[0]:.2f} to {losses[-1]:.2f}")

# %% [markdown]
# (`round_inputs(model, bits=8, observer=Ema, calibration=rows)` around the same model would round the
# activations while it trains as well; section 5 has the observers.)
#
# Compare with GPTQ above, which took no gradient. Training is for where that is not enough: 2 bits, or
# formats of few values, and for those who can pay for more than 8 steps.
#
# **The KV cache, too.** Keys have a few loud channels, values have none. So KIVI gives a key *channel* a
# scale over a block of tokens, and a value *token* a scale of its own. The newest tokens stay in float.
# The model reads the text 32 tokens at a time through such a cache:

# %% tags=["timing", "nbval-ignore-output"]
from math import exp

from llmopt_lab.quantization.kv_cache import QuantizedKVCache


def through_cache(bits):
    """Perplexity of the text, read through a cache of `bits` bits, and the bytes it holds."""
    n_rows, n = text[:, 1:].shape
    cache = QuantizedKVCache(lm.config, n_rows, max_tokens=n, bits=bits, device=lm.model.device)
    nats = 0.0
    for seen, next_ones in zip(text[:, :-1].split(32, 1), text[:, 1:].split(32, 1), strict=True):
        logits = lm.model(seen, cache.next_positions(seen.shape[1]), attend=cache)
        nats += F.cross_entropy(logits.flatten(0, 1), next_ones.flatten(), reduction="sum").item()
    return exp(nats / (n_rows * n)), cache.nbytes


n_tokens = text[:, 1:].numel()
print(f"16-bit cache: {lm.config.kv_bytes_per_token(torch.bfloat16):6,} bytes a token, "
      f"perplexity {found['float'][0]:.2f}")
for bits in (8, 4, 2):
    ppl, nbytes = through_cache(bits)
    print(f"{bits} bits:       {nbytes / n_tokens:6,.0f} bytes a token, perplexity {ppl:.2f}")

# %% [markdown]
# (2-bit codes take 4 bits here. Scales and zero points are counted.)
#
# **Sixteen values need not be evenly spaced.** Weights crowd around 0, so let the values crowd there too.
# *e2m1* is a float of 4 bits: sign, 2 bits of exponent, 1 of mantissa. *NF4* takes quantiles of the normal
# distribution. A code is then looked up, not multiplied. The formats differ in their scales as well:
# MXFP4 has a power of two for each 32 weights, NVFP4 a float8 for each 16 and one float32 a matrix, NF4
# a float8 for each 64, which have scales of their own (double quantization).

# %% tags=["nbval-ignore-output"]
import matplotlib.pyplot as plt

from llmopt_lab.quantization.block_formats import table_of

values = {
    "int4": torch.arange(-7, 8) / 7,
    "e2m1": table_of("mxfp4") / 6,
    "NF4": table_of("nf4"),
}
figure, axes = plt.subplots(figsize=(7.5, 1.6))
for line, (name, table) in enumerate(values.items()):
    axes.plot(table, [-line] * len(table), "|", markersize=14, label=name)
axes.set(yticks=[0, -1, -2], yticklabels=values, ylim=(-2.6, 0.6),
         xlabel="values that a code can stand for, the largest is 1")
figure.tight_layout()

# %% [markdown]
# What that is worth, measured as before (rounded to the nearest, no calibration), beside integers of about
# as many bits:

# %%
from llmopt_lab.quantization.view import recorded_variant

beside = {  # bits a weight -> a format, and groups of integers that take as many
    "4.13": ({"method": "nf4"}, 128),
    "4.25": ({"method": "mxfp4"}, 64),
    "4.5": ({"method": "nvfp4"}, 32),
}
print(f"{'bits per byte above float':34}", *(f"{model:>14}" for model in recorded))
for bits, (how, group_size) in beside.items():
    rows = [recorded_variant(record, how=how) for record in recorded.values()]
    grid = {"bits": 4, "group_size": group_size, "symmetric": True}
    ints = [recorded_ways(record, **grid)["nearest"] for record in recorded.values()]
    print(f"{bits:>4} bits: {how['method'].upper():24}", *(f"{row['excess']:14.3f}" for row in rows))
    print(f"{'':>10} int4, groups of {group_size:<7}", *(f"{row['excess']:14.3f}" for row in ints))

# %% [markdown]
# NF4 wins clearly at its price; NVFP4 by a little. MXFP4 does not: its scale is a power of two, so the
# largest weight of a block lands anywhere between 4 and 8 scales, and what is above 6 is clipped. e2m1 is
# there for another reason: the tensor cores of Blackwell GPUs multiply it as it is. On an H100 it would have
# to be unpacked like the rest, and there is no kernel for it here.
#
# ## 5. Weights alone, or activations too (20 minutes)
#
# Everything so far was *weight-only*: W4A16 has 4-bit weights and 16-bit activations. It saves bytes.
# The product itself runs in 16 bits, after each weight has been turned back into a number. W8A8 rounds
# the activations as well, and multiplies int8 by int8: it saves half the bytes *and* doubles the rate
# of the tensor cores. Which is faster depends on how many tokens share one reading of the weights.
#
# The least time of one layer is the larger of bytes over bandwidth and operations over rate. The rates
# are the H100's that chapter 1 measured (bandwidth, bf16 products); for int8 twice the bf16 rate,
# as the data sheet has it.

# %%
from llmopt_lab.core.bench import load_results

h100 = load_results("paged_attention")[0]["roofline"]
GB_S, BF16_TFLOP_S = h100["read_gb_s"], h100["matmul_tflop_s"]
FORMATS = {"W16A16": (16, 1), "W4A16": (4.125, 1), "W8A8": (8, 2)}  # bits, rate over bf16's


def least_us(width, n_tokens):
    """Least microseconds of (n_tokens, width) times (width, width), and what limits it."""
    times = {}
    for name, (bits, faster) in FORMATS.items():
        act_bits = 8 if faster == 2 else 16
        nbytes = width * width * bits / 8 + n_tokens * width * (act_bits / 8 + 2)
        memory = nbytes / GB_S / 1e3
        product = 2 * n_tokens * width * width / (faster * BF16_TFLOP_S) / 1e6
        times[name] = max(memory, product), "memory" if memory > product else "arithmetic"
    return times


def roofline(width):
    made = []
    for n_tokens in (1, 4, 16, 64, 128, 256, 512, 1024, 4096):
        times = least_us(width, n_tokens)
        best = min(times, key=lambda name: times[name][0])
        bars = tuple(
            Bar(name, 100 * us / times["W16A16"][0], "good" if name == best else "active")
            for name, (us, _) in times.items()
        )
        told = ", ".join(f"{name} {us:.3g} us ({limit})" for name, (us, limit) in times.items())
        made.append(
            Frame(
                f"Tokens at a time: {n_tokens:,}. Least time, and what limits it: {told}.",
                (Bars("least time of one layer, of that with 16 bits", bars, "%", 100),),
                legend=(("good", "fastest"), ("active", "others")),
            )
        )
    return Player(made)


Explore(roofline, width=Choice("width of the layer", (1024, 4096, 16384), 4096))

# %% [markdown]
# *Only the picture answers these:*
# - Up to how many tokens at a time is W4A16 the fastest?
# - From which number on does W4A16 take exactly as long as 16-bit weights?
#
# So: 4-bit weights for one user at a time, int8 or fp8 products for many users and for long prompts.
#
# **What activations cost in quality.** Activations have no fixed range: each token brings its own. A scale
# a token is chosen while the model runs. The trouble is loud *channels*: inside one token they eat
# the scale, just as the outlier did in section 2. SmoothQuant divides loud channels by $s$ beforehand and
# multiplies the weights by $s$.

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.quantization.input_scales import smooth_scales
from llmopt_lab.quantization.reference import quantize_rows

name = "layers.2.self_attn.q_proj"
x, w = inputs_of(name), lm.model.get_submodule(name).weight.cpu()
loud = x.clone()
loud[:, :4] *= 50  # four loud channels, as large models have them; the weights shrink in return
w_loud = w.clone()
w_loud[:, :4] /= 50


def w8a8_error(x, w):
    codes, scales = quantize_rows(x)
    made = (codes.float() * scales) @ dequantize(quantize(w, bits=8)).T
    return float((made - x @ w.T).norm() / (x @ w.T).norm())


print(f"as it is:                       error {w8a8_error(x, w):.2%} of the output")
print(f"four channels 50 times louder:  error {w8a8_error(loud, w_loud):.2%}")
s = smooth_scales(w_loud, loud.abs().amax(0))
print(f"the same, smoothed:             error {w8a8_error(loud / s, w_loud * s):.2%}")

# %% [markdown]
# And whole models, recorded with the table of section 4:

# %%
print(f"{'bits per byte above float':26}", *(f"{model:>14}" for model in recorded))
for method in ("w8a8", "smoothquant"):
    rows = [row for record in recorded.values() for row in record["rows"]
            if row["how"] == {"method": method, "bits": 8}]
    print(f"{method:26}", *(f"{row['excess']:14.4f}" for row in rows))

# %% [markdown]
# `lab-target` has hardly any such channels behind its norms, where SmoothQuant works, so W8A8 alone is fine there.
# SmolLM2 loses three times less when smoothed. Models above some 6 billion parameters have the loudest.
#
# **A scale that is fixed beforehand.** A scale a token costs a pass over the activations in every layer. A
# *static* scale, one a layer, is chosen once: an *observer* watches calibration text and answers with a
# range. The largest values ever seen (min-max); a moving average of each batch's (EMA), which also works
# while a model trains; the range that 99.99 % of the values lie in (percentile); or the one with the least
# squared error of rounding and clipping (MSE). Here are the ranges they choose for one layer:

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.quantization.activations import OBSERVERS

name = "layers.1.mlp.down_proj"
x = inputs_of(name)
for how, make in OBSERVERS.items():
    observer = make()
    for part in x.split(256):
        observer.observe(part)
    low, high = observer.range(bits=8, symmetric=False)
    inside = ((x >= low) & (x <= high)).double().mean()
    print(f"{how:11} {low:7.2f} to {high:6.2f}, steps of {(high - low) / 255:.4f}, "
          f"{1 - inside:.3%} of the values clipped")

# %% [markdown]
# And what whole models lose with the weights in float and every layer's input in 8 bits:

# %%
def lost(how=None, rotation=None, inputs=None):
    """Bits per byte above float, of each model; a dash where it was not measured."""
    words = []
    for record in recorded.values():
        try:
            row = recorded_variant(record, how=how, rotation=rotation, inputs=inputs)
            words.append(f"{row['excess']:14.3f}")
        except BadInput:
            words.append(f"{'-':>14}")
    return " ".join(words)


print(f"{'bits per byte above float':36}", *(f"{m:>14}" for m in recorded))
print(f"{'a scale a token':36}", lost(inputs={"bits": 8, "observer": None}))
for observer in OBSERVERS:
    print(f"{f'static, {observer}':36}", lost(inputs={"bits": 8, "observer": observer}))

# %% [markdown]
# Clipping the few largest values helps, and a scale a token is still far better: where a static scale is
# needed, the outliers have to go first.
#
# **Turn them away.** For an orthogonal matrix $Q$, $(xQ)(WQ)^T = xW^T$. A random Hadamard matrix (1 and −1,
# over $\sqrt{n}$) adds up all channels with random signs, so a loud one is shared out among all. And it
# costs nothing: fold the norms' scales into the layers behind them; then an RMSNorm commutes with $Q$, and
# the whole residual stream can be turned by changing weights (QuaRot; SpinQuant trains $Q$). Only the
# input of the down projection is a product of two layers, which no weight can turn: that takes a product
# *online*, in every step.

# %% tags=["timing", "nbval-ignore-output"]
from llmopt_lab.quantization.rotation import rotated
from llmopt_lab.quantization.view import loudness_frames

turned = rotated(lm.model, rng=torch.Generator().manual_seed(0), online=True)
apart = (turned(text[:1, :-1]) - lm.model(text[:1, :-1])).abs().max()
print(f"the same function: logits differ by {apart:.0e} at most; perplexity {measure(turned):.3f}")
Player(
    loudness_frames({
        "as trained": inputs_of("layers.1.mlp.down_proj"),
        "rotated": inputs_of("layers.1.mlp.down_proj.inner", turned),
    }),
    title="How loud the channels are that a down projection reads",
)

# %% [markdown]
# *Only the picture answers this:* are there channels that a rotation makes louder, and which?
#
# Measured on whole models, with weights as they are, then rounded as well:

# %%
four = {"method": "rtn", "bits": 4, "group_size": 128}
three = {"method": "rtn", "bits": 3, "group_size": 128}
cases = {
    "activations 8 bits, static min-max": (None, {"bits": 8, "observer": "min-max"}),
    "activations 4 bits, a scale a token": (None, {"bits": 4, "observer": None}),
    "weights and activations 4 bits": (four, {"bits": 4, "observer": None}),
    "weights 4 bits, groups of 128": (four, None),
    "weights 3 bits, groups of 128": (three, None),
    "weights MXFP4": ({"method": "mxfp4"}, None),
}
print(f"{'bits per byte above float':36} {'rotation':9}", *(f"{m:>14}" for m in recorded))
for name, (how, inputs) in cases.items():
    for rotation in (None, "offline", "online"):
        words = lost(how, rotation, inputs)
        if words.strip("- "):
            print(f"{name:36} {rotation or 'none':9}", words)

# %% [markdown]
# What a rotation is worth depends on what is rounded. With activations of 4 bits `lab-target` loses three times
# less and SmolLM2 almost nine times less; with static scales of 8 bits `lab-target` loses 60 times less, as little as
# with a scale a token. In `lab-target` nearly all of it comes from the online one: its loud input is the down
# projection's. SmolLM2 gains from both. Rounding weights alone mostly gets worse, SmolLM2 more than twice as bad at 4 bits:
# groups of 128 and less had dealt with their outliers already, and a rotation shares those out to every
# group. Measure before you turn.
#
# **fp8** (e4m3: 4 bits of exponent, 3 of mantissa) needs less care: its steps are fine near 0 and coarse
# far out, so an outlier does not eat the others. The price is 1/16 of relative error at worst:

# %%
from llmopt_lab.quantization.reference import quantize_fp8

rng = torch.Generator().manual_seed(3)
for size in (1, 10, 1000):
    w = torch.randn(64, 512, generator=rng)
    w[0, 0] = 4.0 * size
    eight, scale = quantize_fp8(w)
    others = torch.ones_like(w, dtype=torch.bool)
    others[0, 0] = False
    int8, fp8 = dequantize(quantize(w, bits=8, per_tensor=True)), eight.float() * scale
    print(f"one weight of {4 * size:5}: the others in int8 {snr_db(int8[others], w[others]):5.1f} dB, "
          f"in fp8 {snr_db(fp8[others], w[others]):5.1f} dB")

# %% [markdown]
# ## 6. The kernel (15 minutes)
#
# In section 3, four bits were slower than float, since the float weight was made in memory first. The
# kernel makes it in registers: it reads the packed codes, turns them into numbers on chip, multiplies,
# and nothing but codes and scales ever crosses the memory bus. Here is the loop for one token:

# %%
try:
    from llmopt_lab.quantization import kernels

    source = inspect.getsource(kernels._one_token_kernel.fn)
    print(source[source.index("    for ") :])
except ImportError as missing:
    print(missing)

# %% [markdown]
# Three things to see in it:
# - **The layout is made for the kernel, once, offline** (`pack_for_kernel`). What a thread reads in one
#   wide load is what it needs, in the order in which it unpacks it.
# - **A scale is multiplied in once a group, not once a weight**: it leaves the sum.
# - **Few instructions a weight.** An H100 that reads 3,091 GB/s gets 6 trillion weights of 4.125 bits
#   a second, and each must be unpacked. Converting integers is too slow, so the bits are put straight
#   into the mantissa of a float.
#
# For more tokens another loop takes over, which feeds the unpacked weights to the tensor cores. W8A8
# (`w8a8_linear`) rounds each token to int8 first, and its sums are int32, exact.
#
# Here they run: compiled if you have a GPU, else in Triton's interpreter, which is slow and right.
# The sizes are ragged: 200 columns in groups of 64, 37 rows.

# %% tags=["timing", "nbval-ignore-output"]
try:
    from llmopt_lab.quantization.kernels import pack_for_kernel, w4a16_linear, w8a8_linear

    device, rng = pick_device(), torch.Generator().manual_seed(6)
    w = torch.randn(37, 200, generator=rng)
    for n_tokens in (1, 5):
        x = torch.randn(n_tokens, 200, generator=rng)
        for symmetric in (True, False):
            q = quantize(w, bits=4, group_size=64, symmetric=symmetric)
            want = x @ dequantize(q).T
            args = [None if t is None else t.to(device) for t in pack_for_kernel(q)]
            got = w4a16_linear(x.to(device), *args).cpu()
            print(f"W4A16, {n_tokens} tokens, {'no zero point' if symmetric else 'zero points'}: "
                  f"off by {(got - want).abs().max():.0e}")
        q = quantize(w, bits=8)
        codes, scales = quantize_rows(x)
        want = (codes.float() * scales) @ dequantize(q).T
        got = w8a8_linear(x.to(device), q.codes.to(device), q.scales.to(device)).cpu()
        print(f"W8A8,  {n_tokens} tokens: off by {(got - want).abs().max():.0e}")
except ImportError as missing:
    print(missing)

# %% [markdown]
# Recorded on an H100, on the feed-forward layer of Llama-3-8B (14,336 x 4,096), each call on weights
# that are not in the L2 cache. Every contender was first checked against an oracle in float64. Before
# you look: from how many tokens at a time is the unquantised product faster?

# %% tags=["nbval-ignore-output"]
from llmopt_lab.core.bench import format_results, run_room

(h100,) = load_results("quantization")
rows = [row for row in h100["cases"][0]["rows"] if row["size"]["n_rows"] == 14336]
n_tokens = [row["size"]["n_tokens"] for row in rows]
figure, axes = plt.subplots(figsize=(7.5, 3.4))
for name, marker in zip(rows[0]["results"], "os^", strict=True):
    axes.plot(n_tokens, [1000 * row["results"][name]["median_ms"] for row in rows], marker=marker, label=name)
axes.plot(n_tokens, [1000 * row["floor_ms"] for row in rows], "k:", label="floor: bytes or arithmetic")
axes.set_xscale("log", base=2)
axes.set_xticks(n_tokens, [f"{n:,}" for n in n_tokens], fontsize=7)
axes.set(yscale="log", xlabel="tokens at a time", ylabel="microseconds",
         title=f"{h100['hardware']['name']}, 4-bit weights, group 128")
axes.legend(fontsize=7)
figure.tight_layout()

# %% [markdown]
# *Only the picture answers this:* up to how many tokens does ours stay flat, so that more tokens are
# free? The whole table, with int8 and fp8 and the losses:

# %%
print(format_results(h100))

# %% [markdown]
# With a GPU, the next cell times the rows of 4,096 x 4,096 weights here; without one it says so. All
# rows take some minutes: `llmopt bench quantization` in a terminal.

# %% tags=["timing", "nbval-ignore-output"]
if pick_device().type == "cuda":
    square = {"n_rows": 4096, "n_cols": 4096}
    short = run_room("quantization", where=lambda title, size: square.items() <= size.items())
    print(format_results(short))
else:
    print("No GPU in this session. The interpreter's times would mean nothing.")

# %% [markdown]
# ## 7. Where it loses (10 minutes)
#
# **Many tokens.** Section 5 has the break-even: once the product and not the memory is the limit, 4-bit
# weights save no time, and unpacking them costs some. In closed form: with $b$ bits a weight the limit
# changes at $n = b / 16 \cdot$ rate / bandwidth tokens.

# %%
for name, (bits, faster) in FORMATS.items():
    n_tokens = bits / 16 * 1000 * faster * BF16_TFLOP_S / GB_S
    print(f"{name:7} arithmetic is the limit from about {n_tokens:3.0f} tokens at a time")

# %% [markdown]
# **Spend your bits well.** A smaller group, a zero point or one bit more: all of them cost bits. Set a
# budget; for each way the picture takes the best of all configurations that were measured and cost no
# more. Find the budget at which the careful ways stop being worth anything.

# %%
from llmopt_lab.quantization.view import budget_frames

Explore(
    lambda model: Player(budget_frames(recorded[model], (2.3, 2.6, 3.2, 3.6, 4.2, 4.7, 8.8)), start=0),
    model=Choice("model", tuple(recorded), "lab-target"),
)

# %% [markdown]
# *Only the picture answers these:*
# - From which budget on is `lab-target` as good as float in every way?
# - A third to half a bit more a weight buys smaller groups: from 2.3 to 2.6, from 3.2 to 3.6, from 4.2
#   to 4.7. Where does it buy most?
#
# **What is not rounded.** Embedding and output head stay in 16 bits. In a small model they are a large part:

# %%
def share(n_vocab, d_model, n_layers, d_q, d_kv, d_ff, tied):
    """Weights of the layers, and of embedding and head."""
    per_layer = d_model * (2 * d_q + 2 * d_kv + 3 * d_ff)
    return n_layers * per_layer, n_vocab * d_model * (1 if tied else 2)


models = {
    "lab-target": share(4096, 384, 6, 384, 128, 704, True),
    "SmolLM2-135M": share(49152, 576, 30, 576, 192, 1536, True),
    "Llama-3-8B": share(128256, 4096, 32, 4096, 1024, 14336, False),
}
for name, (layers, rest) in models.items():
    before, after = 16 * (layers + rest), 4.125 * layers + 16 * rest
    print(f"{name:13} {rest / (layers + rest):4.0%} not rounded; 4 bits, groups of 128: "
          f"{before / after:.2f} times smaller")

# %% [markdown]
# **No kernel, or a small model.** Memory at rest is saved in any case. Time is not. The same greedy text on
# this machine, float and 4 bits without a kernel, which unpacks every weight for every token:

# %% tags=["timing", "nbval-ignore-output"]
import time

four = quantize_model(lm.model, bits=4, group_size=128, progress=False)
for name, model in (("float32", lm.model), ("4 bits", four)):
    start = time.perf_counter()
    generate(model, prompt, 8)
    seconds = time.perf_counter() - start
    print(f"{name:8} {8 / seconds:6.1f} tokens/s, layers {linear_nbytes(model) / 2**20:5.1f} MiB")

# %% [markdown]
# Whole models that decode, recorded by `python -m llmopt_lab.quantization.decoding`: one sequence, after 64
# tokens. Peak memory is what torch gave out at once: weights, KV cache, what a step needs, and on a GPU
# cuBLAS's work space. *tokens/s* is the loop of `generate`; on a GPU, *graph* is the same step as one CUDA
# graph, without Python between its kernels. *bits/byte* is on held-out text: what the rounding costs.

# %% id="takeaway" tags=["nbval-ignore-output"]
from llmopt_lab.quantization.decoding import RESULTS as DECODING

for run in json.loads(DECODING.read_text())["runs"]:
    print(run["hardware"]["name"] + (", one core" if "threads" in run["hardware"] else ""))
    print(f"{'':36}{'tokens/s':>10}{'of float':>10}{'graph':>10}{'of float':>10}{'peak MB':>9}{'bits/byte':>11}")
    for name, rows in run["models"].items():
        print(f"  {name}" + ("" if rows[0]["trained"] else ", random weights of its shape"))
        for row in rows:
            speed, base = row["tokens_per_second"], rows[0]["tokens_per_second"]
            graph = f"{'':20}"
            if row.get("step_timed_as") == "graph":
                graph = f"{1000 / row['step_ms']:10,.0f}{rows[0]['step_ms'] / row['step_ms']:9.2f}x"
            lost = f"{row['bits_per_byte']:11.4f}" if "bits_per_byte" in row else ""
            print(f"    {row['way']:32}{speed:10,.1f}{speed / base:9.2f}x{graph}{row['peak_bytes'] / 1e6:9,.0f}{lost}")

# %% [markdown]
# Codes in memory are not speed: without a kernel, 4 bits cost a core 13 and 17 times the time, and int8 1.9 and
# 1.2 times, since one token has too little arithmetic to make rounding the activations worth it. What is saved
# is memory, and of that only the layers' share.
#
# On the GPU the kernel wins nothing by itself either: the loop of `generate` is limited by Python, which our
# launcher makes longer, and loses with 4 bits at every size. As one graph, 4 bits win: 1.11 times for
# `lab-target`, 1.06 for SmolLM2, 1.50 for the shape of Llama-3-8B. That is far from the 3 times of a layer alone:
# attention, norms and the 16-bit head take their time as before. The peak falls from 52 to 41 MB, from 307 to
# 155 MB and from 16.1 to 5.9 GB; 34 MB of each are cuBLAS's. int8 on both sides loses at one token, as section 5
# says. (Llama's shape has no int8 row: the kernel that adds its split products did not compile for one token
# when this was run. It does now, but was not measured again.)
#
# What it costs depends on the model: 4 bits, just rounded, add 0.033 bits per byte to `lab-target` and 0.186 to
# SmolLM2; int8 on both sides 0.001 and 0.013.

# %% [markdown]
# **Calibration.** GPTQ and AWQ fit the layer to the inputs they see. How much text do they need, and what if
# it is no text at all? Recorded on `lab-target`, 3 bits in groups of 128, in windows of 256 tokens. Before you
# look: is GPTQ on random tokens better or worse than plain rounding, which looks at nothing?

# %%
record = recorded["lab-target"]
nearest = recorded_ways(record, bits=3, group_size=128, symmetric=True)["nearest"]["excess"]
seen = {}
for row in record["calibrations"]:
    seen.setdefault((row["windows"], row["source"]), {})[row["how"]["method"]] = row["excess"]
print(f"{'bits per byte above float':32}{'GPTQ':>8}{'AWQ':>8}")
print(f"{'nothing: plain rounding':32}{nearest:8.3f}{nearest:8.3f}")
for (n, source), excess in seen.items():
    print(f"{f'{n} windows of {source}':32}{excess['gptq']:8.3f}{excess['awq']:8.3f}")

# %% [markdown]
# Better: part of how inputs vary together comes from the model, whatever it reads. But of what GPTQ gains from 64
# windows of text, as many of noise give 61 %, and 8 windows of text give 71 %. AWQ chooses an exponent a layer
# and a clipping ratio a group, which is far less to fit: noise gives 90 %, 8 windows of text 98 %.

# %% [markdown]
# ## 8. In production, and what to remember (5 minutes)
#
# Who quantizes and who serves are two programs, with a checkpoint between them. The format that vLLM's
# own tools write is *compressed-tensors*: `weight_packed` (int32, 8 codes of 4 bits each),
# `weight_scale`, `weight_shape`, and a `quantization_config` in `config.json`. Write one:

# %%
import tempfile
from pathlib import Path

from llmopt_lab.quantization.checkpoint import save_pack_quantized

model = quantize_model(lm.model, bits=4, group_size=64, progress=False)
with tempfile.TemporaryDirectory() as folder:
    save_pack_quantized(model, folder)
    for file in sorted(Path(folder).iterdir()):
        print(f"{file.name:24}{file.stat().st_size:>12,} bytes")

# %% [markdown]
# With the tokenizer's files beside them, `AutoModelForCausalLM.from_pretrained(folder)` loads this and
# gives the same logits (the course's tests do that). Groups are of 64 here: the format knows no shorter
# last group, and 128 does not divide the 704 columns of `lab-target`.
#
# | system | how to say it |
# |---|---|
# | llm-compressor | `oneshot(model=..., dataset=..., recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]))`; `dampening_frac` is our `damping`; `SmoothQuantModifier(smoothing_strength=0.8)` before it for `scheme="W8A8"`; `AWQModifier` |
# | vLLM | `vllm serve MODEL` reads the format from the checkpoint; `--quantization fp8` rounds while loading; `--kv-cache-dtype fp8` |
# | TensorRT-LLM | `LLM(model=...)` reads the format of a Model Optimizer checkpoint (W4A16 AWQ, W4A16 GPTQ, fp8, NVFP4); `kv_cache_config=KvCacheConfig(dtype="fp8")` |
# | the 4-bit formats | llm-compressor `scheme="NVFP4A16"` or `"MXFP4A16"` (weights only), `"NVFP4"`, `"MXFP4"` (activations too); NF4 is bitsandbytes'; `SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard")` is our `rotated`, `"R4"` its `online` |
# | transformers | `from_pretrained(..., quantization_config=GPTQConfig(bits=4, group_size=128, desc_act=True, dataset=..., tokenizer=...))`; `desc_act` is our `act_order`; `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")` |
#
# **Remember**
# 1. A scale has to fit the largest weight that shares it. Give few weights one scale, and count it:
#    $b + 16/g$ bits a weight.
# 2. Judge a layer by its output. The nearest weights are not the best weights.
# 3. GPTQ passes each error to the columns that are still free; correlated inputs are what it lives from.
# 4. AWQ makes loud channels finer; SmoothQuant moves them from the activations into the weights.
# 5. `round` has no gradient. Training needs the straight-through estimator.
# 6. Weight-only saves reading: for few tokens at a time. W8A8 and fp8 save multiplying: for many.
# 7. Fewer bits are faster only with a kernel that never writes the float weight.
# 8. Static activation scales stand or fall with the outliers; a rotation spreads them for free.
# 9. "99 % accuracy" means nothing without model, method, bits, group and the text it was measured on.
#
# **Sources.** Frantar et al. 2022, *GPTQ* ([2210.17323](https://arxiv.org/abs/2210.17323)), Algorithm 1. Lin et
# al. 2023, *AWQ* ([2306.00978](https://arxiv.org/abs/2306.00978)). Xiao et al. 2022, *SmoothQuant*
# ([2211.10438](https://arxiv.org/abs/2211.10438)). Dettmers et al. 2022, *LLM.int8()*
# ([2208.07339](https://arxiv.org/abs/2208.07339)), on loud channels in large models. Micikevicius et al. 2022,
# *FP8* ([2209.05433](https://arxiv.org/abs/2209.05433)). Liu et al. 2024, *KIVI*
# ([2402.02750](https://arxiv.org/abs/2402.02750)). Dettmers et al. 2023, *QLoRA*, with NF4
# ([2305.14314](https://arxiv.org/abs/2305.14314)). OCP, *Microscaling Formats v1.0*; NVIDIA 2025, NVFP4
# ([2509.25149](https://arxiv.org/abs/2509.25149)). Ashkboos et al. 2024, *QuaRot*
# ([2404.00456](https://arxiv.org/abs/2404.00456)). Liu et al. 2024, *SpinQuant*
# ([2405.16406](https://arxiv.org/abs/2405.16406)). Jacob et al. 2018, EMA ranges
# ([1712.05877](https://arxiv.org/abs/1712.05877)). Nagel et al. 2021, *A white paper on neural network
# quantization* ([2106.08295](https://arxiv.org/abs/2106.08295)). Bengio et al. 2013, straight-through estimator
# ([1308.3432](https://arxiv.org/abs/1308.3432)).
#
# Next: the exercises, then chapter 5, where attention skips most of its keys.
