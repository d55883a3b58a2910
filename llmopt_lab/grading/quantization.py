"""The checks of chapter 4. Each knows what the usual mistakes give, and names the one it sees."""

import torch
from torch import Tensor

from llmopt_lab.core.device import pick_device
from llmopt_lab.core.memory import Load, Store, ceil_div, tiles
from llmopt_lab.core.trace import Trace, recording
from llmopt_lab.grading.checks import (
    Mistake,
    NotYet,
    exercise,
    expect,
    expect_kernel,
    expect_no_nan,
    expect_numbers,
    expect_or_name,
    expect_parts,
    expect_stored,
    expect_untouched,
    launched,
)


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# 1. Same function, dead model


@exercise(
    "quantization.same_function",
    points=2,
    minutes=8,
    hints=(
        "Channel c of the hidden layer is silu(row c of gate, times x) * (row c of up, times x). "
        "In which of the two does a factor come out in front? Who reads channel c afterwards?",
        "Clone up and down. up's ROWS `channels` are multiplied by factor; down's COLUMNS "
        "`channels` are divided by it. gate stays: silu(30 * a) is not 30 * silu(a).",
    ),
)
def _(same_function):
    for d_ff, d_model, channels, factor in [(7, 5, [1, 4], 30.0), (4, 6, [0, 2, 3], 0.25)]:
        gate, up = (_random(d_ff, d_model, seed=s) for s in (d_ff, 9))
        down, chosen = _random(d_model, d_ff, seed=4), torch.tensor(channels)
        inputs = [gate.clone(), up.clone(), down.clone()]
        got = same_function(*inputs, chosen, factor)
        expect_parts(got, "gate", "up", "down")
        if any(not torch.equal(a, b) for a, b in zip(inputs, (gate, up, down), strict=True)):
            raise NotYet(
                "your function changed the tensors that it was given",
                misconception="changes-its-arguments",
                hint="the model that owns them still needs them: write to a clone",
            )
        rows, cols = torch.ones(d_ff, 1).double(), torch.ones(d_model, 1).double()
        rows[chosen] = factor
        cols[chosen[chosen < d_model]] = factor
        right = {"gate": gate, "up": up * rows, "down": down / rows.T}
        expect_or_name(
            f"channels {channels}, factor {factor:g}: weights",
            dict(zip(right, got, strict=True)), right,
            "rows of up times factor, columns of down divided by it, nothing else",
            [
                ("forgets-to-divide", {**right, "down": down},
                 "the hidden channel is larger now, and down still reads it at full weight: the "
                 "function has changed"),
                ("multiplies-twice", {**right, "down": down * rows.T},
                 "what up has multiplied, down must divide"),
                ("scales-the-gate", {**right, "gate": gate * rows, "up": up},
                 "the gate goes through silu, which is not linear: silu(30 a) is not 30 silu(a)"),
                ("scales-gate-and-up", {**right, "gate": gate * rows},
                 "one factor is enough, and through silu it does not come out unchanged: leave "
                 "the gate alone"),
                ("scales-columns-of-up", {**right, "up": up * cols.T},
                 "up is (d_ff, d_model), outputs first: a hidden channel is one of its ROWS"),
                ("divides-rows-of-down", {**right, "down": down / cols},
                 "down is (d_model, d_ff): it reads hidden channel c in its COLUMN c"),
                ("scales-every-channel", {"gate": gate, "up": up * factor, "down": down / factor},
                 "only `channels`. A factor on all of them scales the weights evenly, and one "
                 "scale a tensor would follow it: no harm done"),
            ],
        )  # fmt: skip


# 2. Scales of rows and groups


@exercise(
    "quantization.quantize_groups",
    points=3,
    minutes=15,
    hints=(
        "Take one row and one group of columns: its scale is its largest |weight| over the largest "
        "code. Then do it for all rows at once, group by group. What if a group is all zeros?",
        "for group, cols in enumerate(tiles(n_cols, group_size)): scale = "
        "weight[:, cols].abs().amax(1) / (2 ** (bits - 1) - 1); where it is 0 take 1. The codes "
        "are round(weight[:, cols] / scale[:, None]), as int8.",
    ),
)
def _(quantize_groups):
    for rows, n_cols, bits, group_size, kind in [
        (3, 8, 8, 8, "one group a row"),
        (4, 8, 4, 4, "two groups a row"),
        (5, 11, 4, 4, "a last group of 3 columns"),
        (3, 9, 3, 2, "a group of zeros"),
    ]:
        weight = _random(rows, n_cols, seed=rows + n_cols)
        weight *= torch.logspace(0, -1, rows).double()[:, None]
        weight[0, 1] = -6.0  # an outlier whose sign counts
        if kind == "a group of zeros":
            weight[1, 2:4] = 0
        what = f"{rows} x {n_cols}, {bits} bits, groups of {group_size} ({kind})"
        got = quantize_groups(weight.clone(), bits, group_size)
        expect_parts(got, "codes", "scales")
        codes, scales = got
        if isinstance(scales, Tensor) and (scales == 0).any():
            raise NotYet(
                f"{what}: a scale is 0",
                misconception="divides-by-zero",
                hint="0 / 0 is NaN, and no integer stands for NaN: a group of zeros gets scale 1",
            )
        right = _quantized(weight, bits, group_size)
        n_groups, high = right["scales"].shape[1], 2 ** (bits - 1) - 1

        def with_scales(scales: Tensor, cut=torch.round, weight=weight, group_size=group_size):
            spread = scales.expand(len(weight), -1).repeat_interleave(group_size, 1)
            return {
                "codes": cut(weight / spread[:, : weight.shape[1]]).clamp(-128, 127).to(torch.int8),
                "scales": scales.expand(len(weight), -1),
            }

        largest = weight.abs().amax() / high
        by_row = (weight.abs().amax(1, keepdim=True) / high).expand(-1, n_groups)
        signed = torch.stack([weight[:, c].amax(1) for c in tiles(n_cols, group_size)], 1) / high
        safe = right["scales"]
        mistakes = [
            ("one-scale-a-tensor", with_scales(largest.expand(rows, n_groups)),
             "that is the guide's: one outlier sets the step of all weights. Every row and group "
             "has a scale of its own"),
            ("one-scale-a-row", with_scales(by_row),
             "group_size columns share a scale, not the whole row"),
            ("forgets-the-sign", with_scales(torch.where(signed == 0, 1, signed)),
             "the weight of largest MAGNITUDE must fit, and it may be negative: abs() first"),
            ("always-8-bits", with_scales(safe * high / 127),
             "127 is the largest code of 8 bits; of `bits` bits it is 2 ** (bits - 1) - 1"),
            ("counts-codes-not-the-largest", with_scales(safe * high / (high + 1)),
             "2 ** (bits - 1) is one more than the largest code: the largest weight would be "
             "clipped"),
            ("forgets-that-codes-have-a-sign", with_scales(safe * high / (2 * high + 1)),
             "2 ** bits - 1 is for codes from 0 on. Here half of them are negative"),
            ("cuts-off", {**right, "codes": with_scales(safe, torch.trunc)["codes"]},
             "converting to an integer cuts towards 0: round() first"),
            ("rounds-down", {**right, "codes": with_scales(safe, torch.floor)["codes"]},
             "floor is off by half a step on average: round()"),
            ("inverts-the-scale", {**right, "scales": 1 / safe},
             "weight is about code * scale: a scale is |weight| / code"),
        ]  # fmt: skip
        if isinstance(scales, Tensor) and scales.numel() in (1, rows) and n_groups > 1:
            scales = scales.reshape(-1, 1).expand(rows, n_groups)  # too few: named by their values
        result = {"codes": codes, "scales": scales}
        expect_or_name(
            f"{what}: result", result, right, "work out one row and one group by hand", mistakes
        )
        expect(f"{what}: codes", codes, right["codes"], "codes fit in a byte: .to(torch.int8)",
               misconception="codes-take-more-than-a-byte", dtype=torch.int8)  # fmt: skip


def _quantized(weight: Tensor, bits: int, group_size: int) -> dict[str, Tensor]:
    """Symmetric round-to-nearest, element by element."""
    high = 2 ** (bits - 1) - 1
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = weight.new_empty(len(weight), ceil_div(weight.shape[1], group_size))
    for r, row in enumerate(weight.tolist()):
        for group, cols in enumerate(tiles(len(row), group_size)):
            scale = max(map(abs, row[cols])) / high or 1.0
            scales[r, group] = scale
            codes[r, cols] = torch.tensor([round(w / scale) for w in row[cols]], dtype=torch.int8)
    return {"codes": codes, "scales": scales}


# 3. Train me if you can


@exercise(
    "quantization.fake_quantize",
    points=2,
    minutes=12,
    hints=(
        "Forward: round, clip, scale back. Backward: pretend that nothing was rounded. Which "
        "expression has the value of one tensor and the gradient of another? detach() helps.",
        "rounded = codes * scale. weight + (rounded - weight).detach() has the value of rounded "
        "and gradient 1. A clipped weight must get gradient 0: start from weight.clamp(low * "
        "scale, high * scale) in place of weight.",
    ),
)
def _(fake_quantize):
    for rows, cols, bits in [(3, 6, 8), (4, 7, 4), (2, 9, 3)]:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale = torch.linspace(0.1, 0.7, rows).double()[:, None]
        # a code and a part of a step; some far outside, one at either end
        rng = torch.Generator().manual_seed(bits)
        code = torch.randint(low, high + 1, (rows, cols), generator=rng).double()
        code[0, :4] = torch.tensor([low - 3, high + 2, low, high]).double()
        part = 0.4 * (2 * torch.rand(rows, cols, generator=rng, dtype=torch.float64) - 1)
        part[:, 0] = 0.3
        part = torch.where(code == low, part.abs(), part)  # the ends from inside
        part = torch.where(code == high, -part.abs(), part)
        weight = ((code + part) * scale).requires_grad_()
        upstream = _random(rows, cols, seed=bits)
        what = f"{rows} x {cols} weights, {bits} bits"
        got = fake_quantize(weight, scale.clone(), bits)
        clipped = (code < low) | (code > high)
        want = code.clamp(low, high) * scale
        raw = weight.detach()
        wide = (raw / scale).round()
        expect_or_name(
            f"{what}: value", got, want, "round(weight / scale), clipped to the codes, times scale",
            [
                ("rounds-nothing", raw,
                 "the forward pass must see the ROUNDED weights, or there is nothing to get used "
                 "to: value of the rounded, gradient of the weight, not the other way round"),
                ("returns-codes", code.clamp(low, high),
                 "codes are integers; the layer multiplies by codes * scale"),
                ("clips-to-8-bits", wide.clamp(-128, 127) * scale,
                 f"of {bits} bits the codes are {low} to {high}"),
                ("forgets-to-clip", wide * scale,
                 f"there are only the codes {low} to {high}"),
                ("loses-the-least-code", code.clamp(-high, high) * scale,
                 f"the least code is {low}: two's complement has one more below zero"),
                ("cuts-off", (raw / scale).trunc().clamp(low, high) * scale,
                 "round(), not a cut towards 0"),
            ],
        )  # fmt: skip
        if not got.requires_grad:
            raise NotYet(
                f"{what}: the result has no gradient at all",
                misconception="cuts-the-gradient",
                hint="detach only the DIFFERENCE between rounded and raw weight, not all of it",
            )
        (gradient,) = torch.autograd.grad(got, weight, upstream, allow_unused=True)
        n = 0 if gradient is None else int((gradient != 0).sum())
        inside = (~clipped).double()
        expect_or_name(
            f"{what}: gradient ({n} of {weight.numel()} weights get one)",
            torch.zeros_like(raw) if gradient is None else gradient, upstream * inside,
            "1 for a weight inside the range of the codes, 0 outside, times what comes from above",
            [
                ("gradient-of-round", torch.zeros_like(raw),
                 "round is a staircase: its slope is 0 wherever it has one. Nothing trains. "
                 "Let the gradient pass by the rounding"),
                ("trains-clipped-weights", upstream,
                 "a weight outside the range can move and its code does not: no gradient there, "
                 "or it walks away for ever"),
                ("scales-the-gradient", upstream * inside * scale,
                 "the gradient passes as it comes: one step of the weight is one of the result"),
                ("divides-the-gradient", upstream * inside / scale,
                 "d(result) / d(weight) is 1: you divided by scale and never multiplied back"),
                ("gradient-only-where-clipped", upstream * clipped.double(),
                 "the mask says who is inside: those train"),
            ],
        )  # fmt: skip


# 4. Pack and unpack


@exercise(
    "quantization.pack_int4",
    points=3,
    minutes=15,
    hints=(
        "In two's complement -1 is 1111 in four bits and 11111111 in eight. What must you do to "
        "eight bits before you put four others above them? And, unpacking, with a nibble above 7?",
        "pack: nibbles = codes & 0xF after padding an odd row with a 0; low = nibbles[:, 0::2], "
        "high = nibbles[:, 1::2]; low | high << 4. unpack: p & 0xF and p >> 4, side by side with "
        "torch.stack(.., -1).flatten(-2), then 16 less where above 7.",
    ),
)
def _(functions):
    expect_parts(functions, "pack_int4", "unpack_int4")
    pack, unpack = functions
    every = torch.arange(-8, 8)
    cases = [
        ("the codes 1 2 3 4", torch.tensor([[1, 2, 3, 4]])),
        ("all 256 pairs", torch.cartesian_prod(every, every).view(16, 32)),
        ("7 codes a row", torch.tensor([[-1, 3, 0, -8, 7, -3, 5], [2, -7, -2, 1, 6, 4, -6]])),
    ]
    for what, codes in cases:
        codes = codes.to(torch.int8)
        n, want = codes.shape[1], _packed(codes)
        try:
            got = pack(codes.clone())
        except NotImplementedError:  # a RuntimeError, too
            raise
        except (RuntimeError, IndexError) as error:
            raise NotYet(
                f"pack_int4, {what}: {type(error).__name__}: {error}",
                misconception="fails-on-odd-rows" if n % 2 else "raises",
                hint="a row of 7 codes takes 4 bytes: give it an eighth code, 0" if n % 2 else
                "take the row 1 2 3 4 and print the nibbles",
            ) from error  # fmt: skip
        _expect_packed(f"pack_int4, {what}:", got, codes, want)
        back = unpack(want.clone(), n)
        low, high = (want & 0xF).to(torch.int8), (want >> 4).to(torch.int8)
        raw = torch.stack([low, high], -1).flatten(-2)
        signed = torch.where(raw > 7, raw - 16, raw)
        expect_or_name(
            f"unpack_int4, {what}: codes", back, codes,
            "split each byte in two nibbles, give each its sign, drop the padding",
            [
                ("forgets-the-sign", raw[:, :n],
                 "a nibble of 15 is the code -1: those above 7 stand for 16 less"),
                ("minus-8-comes-back-as-8", torch.where(raw > 8, raw - 16, raw)[:, :n],
                 "1000 is -8, not 8: a nibble ABOVE 7 is negative"),
                ("subtracts-8", (raw - 8)[:, :n],
                 "that undoes codes + 8. Two's complement leaves 0 to 7 as they are"),
                ("swaps-the-halves-back",
                 torch.stack([signed[:, 1::2], signed[:, 0::2]], -1).flatten(-2)[:, :n],
                 "the even column is in the LOW half"),
                ("halves-after-each-other",
                 torch.cat([signed[:, 0::2], signed[:, 1::2]], 1)[:, :n],
                 "neighbours shared a byte: low, high, low, high"),
                ("keeps-the-padding", signed, "an odd row was padded: return n codes a row"),
            ],
        )  # fmt: skip


def _packed(codes: Tensor) -> Tensor:
    """Two's complement nibbles, one pair at a time."""
    rows = []
    for row in codes.tolist():
        row = [*row, 0][: len(row) + len(row) % 2]
        rows.append([low % 16 + 16 * (high % 16) for low, high in zip(*[iter(row)] * 2)])  # noqa: B905
    return torch.tensor(rows, dtype=torch.uint8)


def _expect_packed(what: str, got, codes: Tensor, want: Tensor) -> None:
    n = codes.shape[1]
    if isinstance(got, Tensor) and got.nbytes > want.nbytes:
        raise NotYet(
            f"{what} {got.nbytes} bytes ({got.dtype}, {tuple(got.shape)}); {codes.numel()} codes "
            f"take {want.nbytes}",
            misconception="saves-nothing",
            hint="two codes share a byte, and the result is uint8",
        )
    padded = torch.nn.functional.pad(codes, (0, n % 2))
    even, odd = padded[:, 0::2].int(), padded[:, 1::2].int()
    half = padded.shape[1] // 2

    def joined(low: Tensor, high: Tensor) -> Tensor:
        return (low | high << 4).to(torch.uint8)

    expect_or_name(
        f"{what} bytes", got, want, "low half: the even column; high half: the odd one",
        [
            ("lets-the-sign-in", joined(even, odd),
             "-1 is eight ones, and they fill the neighbour's half too: & 0xF first"),
            ("swaps-the-halves", joined(odd & 15, even & 15),
             "the EVEN column is in the low half"),
            ("pairs-the-halves-of-the-row",
             joined(padded[:, :half].int() & 15, padded[:, half:].int() & 15),
             "neighbouring columns share a byte, so that one load gives neighbours"),
            ("shifts-by-8", joined(even + 8, odd + 8),
             "codes + 8 makes another format: here a nibble is two's complement, and 0 stays 0"),
            ("drops-the-odd-one", want[:, : n // 2],
             "the last code of an odd row needs a byte as well"),
        ],
    )  # fmt: skip
    expect(f"{what} bytes", got, want, "return uint8: .view(torch.uint8)",
           misconception="bytes-with-a-sign", dtype=torch.uint8)  # fmt: skip


# 5. Bits per weight


@exercise(
    "quantization.quantized_size",
    points=2,
    minutes=10,
    hints=(
        "Three piles: the codes, a scale for every row and group, perhaps a zero point for each of "
        "those. Round up twice: a row of codes to whole bytes, and the number of groups.",
        "groups = rows * ceil_div(cols, group_size); nbytes = rows * ceil_div(cols * bits, 8) + "
        "groups * (2 + zero_points). Bits per weight are 8 * nbytes / (rows * cols).",
    ),
)
def _(quantized_size):
    for rows, cols, bits, group_size, zeros in [
        (4096, 4096, 4, 128, False),
        (512, 1000, 4, 64, False),
        (8, 48, 8, 32, True),
        (6, 99, 3, 16, True),
    ]:
        call = f"quantized_size({rows}, {cols}, {bits}, {group_size}, {zeros})"
        got = quantized_size(rows, cols, bits, group_size, zeros)
        expect_parts(got, "bytes", "bits per weight")
        codes, a_row = rows * ceil_div(cols * bits, 8), ceil_div(cols, group_size)
        groups = rows * a_row
        nbytes = codes + groups * (2 + zeros)
        expect_or_name(
            f"{call}: bytes", got[0], nbytes,
            "take one row: its codes in whole bytes, its groups, 2 bytes a scale, 1 a zero point",
            [
                ("forgets-the-scales", codes,
                 "without its scales nobody can read the codes: they are stored as well"),
                ("one-scale-a-row", codes + rows * (2 + zeros),
                 "every GROUP of a row has a scale"),
                ("forgets-the-rows", codes + a_row * (2 + zeros),
                 "every ROW has groups of its own"),
                ("one-scale-a-tensor", codes + 2 + zeros, "every row and group has a scale"),
                ("rounds-groups-down", codes + rows * (cols // group_size) * (2 + zeros),
                 "the last, shorter group has a scale as well"),
                ("forgets-the-zero-points", codes + 2 * groups,
                 "with zero_points each group also has a byte that says which code is 0"),
                ("scales-of-four-bytes", codes + groups * (4 + zeros), "a float16 has 2 bytes"),
                ("counts-bits-of-scales", codes + groups * (16 + zeros),
                 "16 BITS are 2 bytes"),
                ("forgets-to-pack", rows * cols + groups * (2 + zeros),
                 "8 / bits codes share a byte"),
                ("fills-bytes-across-rows", ceil_div(rows * cols * bits, 8) + groups * (2 + zeros),
                 "every row begins with a fresh byte: round up row by row"),
                ("rounds-bytes-down", rows * (cols * bits // 8) + groups * (2 + zeros),
                 "a last byte that is only partly filled is a byte, too"),
            ],
        )  # fmt: skip
        exact = 8 * nbytes / (rows * cols)
        expect_or_name(
            f"{call}: bits per weight", got[1], exact,
            "all bits that are stored, over the number of weights",
            [
                ("bits-of-the-codes-alone", float(bits), "the scales' bits are stored as well"),
                ("bytes-per-weight", exact / 8, "a byte has 8 bits"),
                ("how-much-smaller", 32 / exact, "that is the factor that float32 shrinks by; "
                 "wanted are the bits that a weight takes"),
            ],
        )  # fmt: skip


# 6. One column by hand


@exercise(
    "quantization.compensate",
    points=2,
    minutes=10,
    hints=(
        "The column is off by weight - rounded, one error a row. The inverse says how much each "
        "column behind must move for an error of inverse[column, column].",
        "error = (weight[:, column] - rounded) / inverse[column, column]; subtract "
        "torch.outer(error, inverse[column, column:]) from weight[:, column:], in a clone.",
    ),
)
def _(compensate):
    for rows, cols, column in [(1, 2, 0), (3, 5, 0), (2, 6, 3)]:
        hessian = _hessian(cols, seed=cols)
        inverse = torch.full_like(hessian, torch.nan)
        rest = slice(column, cols)
        inverse[rest, rest] = torch.linalg.inv(hessian[rest, rest])
        weight = _random(rows, cols, seed=rows)
        rounded = weight[:, column].round()
        what = f"{rows} x {cols} weights, column {column}"
        got = compensate(weight.clone(), inverse.clone(), column, rounded.clone())
        # by least squares: the change of the other columns that the layer's output minds least
        error = weight[:, column] - rounded
        behind = slice(column + 1, cols)
        best = error[:, None] * torch.linalg.solve(hessian[behind, behind], hessian[behind, column])
        want = weight.clone()
        want[:, column], want[:, behind] = rounded, weight[:, behind] + best
        diagonal = inverse[column, column]
        if isinstance(got, Tensor) and got[:, :column].isnan().any():
            raise NotYet(
                f"{what}: columns before it are NaN now",
                misconception="touches-finished-columns",
                hint="they are rounded already, and the inverse no longer knows them: take "
                "[column, column:] only",
            )

        def moved(by: Tensor, want=want, weight=weight, behind=behind) -> Tensor:
            wrong = want.clone()
            wrong[:, behind] = weight[:, behind] + by
            return wrong

        expect_or_name(
            f"{what}: weight", got, want, "do the example with two columns by hand",
            [
                ("rounds-only", moved(0 * best),
                 "nobody makes good the error: the columns behind must move"),
                ("wrong-sign", moved(-best),
                 "a column that was rounded DOWN leaves something missing; here the error doubles. "
                 "error = weight - rounded, and it is subtracted times the inverse"),
                ("forgets-the-diagonal", moved(best * diagonal),
                 "divide by inverse[column, column]: then the column itself moves by exactly its "
                 "error"),
                ("takes-the-root-of-the-diagonal", moved(best * diagonal.sqrt()),
                 "with the Cholesky factor one divides by its diagonal, which is a root. This is "
                 "the inverse itself"),
                ("compensates-with-the-hessian",
                 moved(-error[:, None] * hessian[column, behind] / hessian[column, column]),
                 "the Hessian says how errors add up; how to undo them stands in its INVERSE"),
                ("keeps-the-column", torch.cat([want[:, :column], weight[:, column, None],
                                                want[:, behind]], 1),
                 "the column itself must become `rounded`"),
                ("one-error-for-all-rows",
                 moved(error.mean() * torch.ones(rows, 1).double() * best / error[:, None]),
                 "every row has an error of its own: torch.outer"),
            ],
        )  # fmt: skip


def _hessian(cols: int, *, seed: int, n: int = 0) -> Tensor:
    """2 X^T X of correlated inputs, n rows (enough, if 0)."""
    x = _random(n or 4 * cols, cols, seed=seed) @ _random(cols, cols, seed=seed + 1)
    return 2 * x.T @ x / len(x)


# 7. The stale inverse


@exercise(
    "quantization.round_columns",
    points=3,
    minutes=15,
    hints=(
        "The inverse says which columns may still move. After column j is rounded it may not: the "
        "inverse of H over the remaining columns is NOT a part of the inverse over all of them.",
        "Simplest: inside the loop, inverse = torch.linalg.inv(hessian[j:, j:]), and use row 0. "
        "Cheaper: after column j, inverse -= torch.outer(inverse[:, j], inverse[j]) / "
        "inverse[j, j].",
    ),
)
def _(round_columns):
    for rows, cols, step in [(3, 2, 0.2), (3, 6, 0.4), (5, 12, 0.3), (6, 10, 0.1)]:
        weight, hessian = _random(rows, cols, seed=cols), _hessian(cols, seed=rows)
        scale = step * torch.linspace(1, 1.5, rows).double()
        what = f"{rows} x {cols} weights"
        got = round_columns(weight.clone(), hessian.clone(), scale.clone())
        run = {kind: _column_by_column(weight, hessian, scale, kind) for kind in COLUMN_MISTAKES}
        expect_or_name(
            f"{what}: result", got, _column_by_column(weight, hessian, scale),
            "compare with a fresh torch.linalg.inv(hessian[j:, j:]) for every column j",
            [(kind, run[kind], where) for kind, where in COLUMN_MISTAKES.items()],
        )  # fmt: skip


COLUMN_MISTAKES = {
    "stale-inverse":
        "the inverse of H over ALL columns still lets finished columns move. After column j take "
        "it out: the inverse over those behind is another one. With two columns that does not "
        "show, nor with independent inputs",
    "rounds-to-nearest":
        "that is plain rounding. Round the weights as they are by then, compensated, not the "
        "original ones, and spread each error before you take the next column",
    "wrong-sign": "what rounding took away, the columns behind must add: W -= error * inverse",
    "forgets-the-diagonal": "divide the error by inverse[j, j]",
    "forgets-to-divide-when-eliminating":
        "taking column j out of the inverse: inverse - outer(inverse[:, j], inverse[j]) / "
        "inverse[j, j]. You left out the division",
    "compensates-with-the-hessian": "the weights to spread by stand in the INVERSE of H",
    "forgets-to-clip": "there are only the codes -8 to 7, also for a weight that has grown",
    "returns-codes": "return the rounded weights, codes * scale",
}  # fmt: skip


def _column_by_column(weight: Tensor, hessian: Tensor, scale: Tensor, mistake: str = "") -> Tensor:
    """Optimal brain quantization in the order of the columns, or with a mistake."""
    w, n_cols = weight.clone(), weight.shape[1]
    out, inverse = torch.empty_like(w), torch.linalg.inv(hessian)
    source = weight if mistake == "rounds-to-nearest" else w
    for j in range(n_cols):
        if mistake not in ("stale-inverse", "forgets-to-divide-when-eliminating"):
            inverse = torch.zeros_like(hessian)
            inverse[j:, j:] = torch.linalg.inv(hessian[j:, j:])
        if mistake == "compensates-with-the-hessian":
            inverse = hessian
        codes = (source[:, j] / scale).round()
        if mistake != "forgets-to-clip":
            codes = codes.clamp(-8, 7)
        out[:, j] = codes if mistake == "returns-codes" else codes * scale
        error = w[:, j] - codes * scale
        if mistake != "forgets-the-diagonal":
            error = error / inverse[j, j]
        spread = torch.outer(error, inverse[j, j + 1 :])
        w[:, j + 1 :] += spread if mistake == "wrong-sign" else -spread
        if mistake == "forgets-to-divide-when-eliminating":
            inverse = inverse - torch.outer(inverse[:, j], inverse[j])
    return out


# 8. Damping


@exercise(
    "quantization.inverse_factor",
    points=2,
    minutes=10,
    hints=(
        "Three steps: add to the diagonal, invert, factor. Of the triangular roots of a matrix "
        "only one is UPPER and gives H^-1 as U^T U.",
        "damped = hessian + damping * hessian.diagonal().mean() * torch.eye(n); "
        "torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).",
    ),
)
def _(inverse_factor):
    dead = _hessian(6, seed=3)
    dead[2, :] = dead[:, 2] = 0
    for what, hessian, damping in [
        ("a regular Hessian", _hessian(5, seed=2) * torch.eye(5).double().add(1) / 2, 0.01),
        ("a Hessian of 4 calibration rows and 7 inputs", _hessian(7, seed=5, n=4), 0.01),
        ("an input that is always 0", dead, 0.05),
    ]:
        eye, diagonal = torch.eye(len(hessian)).double(), hessian.diagonal()
        try:
            got = inverse_factor(hessian.clone(), damping)
        except torch.linalg.LinAlgError as error:
            raise NotYet(
                f"{what}: {error}",
                misconception="leaves-it-singular",
                hint="it has an eigenvalue 0. Add damping * mean(diag H) to EVERY entry of the "
                "diagonal before you invert",
            ) from error
        inverse = torch.linalg.inv(hessian + damping * diagonal.mean() * eye)
        lower = torch.linalg.cholesky(inverse)

        def upper(h: Tensor) -> Tensor:
            factor, failed = torch.linalg.cholesky_ex(torch.linalg.inv_ex(h)[0], upper=True)
            return torch.full_like(factor, torch.nan) if failed else factor

        damped = hessian + damping * diagonal.mean() * eye
        expect_or_name(
            f"{what}: U", got, lower.T,
            "check two things: U is upper triangular, and U.T @ U @ damped is the unit matrix",
            [
                ("forgets-the-damping", upper(hessian),
                 "the Hessian as it is may be singular, and is nearly so in most layers"),
                ("damps-by-a-number", upper(hessian + damping * eye),
                 "Hessians of different layers differ by orders of magnitude: damping is a share "
                 "of the MEAN of the diagonal"),
                ("damps-every-entry", upper(hessian + damping * diagonal.mean()),
                 "only the diagonal: times torch.eye(n)"),
                ("damps-by-the-mean-of-all", upper(hessian + damping * hessian.mean() * eye),
                 "the mean of the DIAGONAL; entries beside it may be negative"),
                ("damps-each-by-its-own", upper(hessian + damping * diagonal.diag()),
                 "an input that is always 0 has a 0 on the diagonal, and a share of 0 is 0: every "
                 "entry gets a share of the mean"),
                ("damps-by-the-largest", upper(hessian + damping * diagonal.max() * eye),
                 "a share of the mean, not of the largest"),
                ("lower-factor", lower,
                 "GPTQ goes from left to right and needs the columns BEHIND in a row: the upper "
                 "factor"),
                ("any-root-will-do", torch.linalg.inv(torch.linalg.cholesky(damped)),
                 "that is a root of the inverse, too, but a lower triangular one: factor the "
                 "inverse, not the Hessian"),
                ("root-on-the-other-side", torch.linalg.inv(torch.linalg.cholesky(damped)).T,
                 "it is upper triangular, but U U^T is the inverse, not U^T U: that one goes from "
                 "right to left"),
                ("factor-of-the-hessian", torch.linalg.cholesky(damped, upper=True),
                 "invert before you factor"),
                ("returns-the-inverse", inverse, "that is U^T U; wanted is U"),
            ],
        )  # fmt: skip


# 9. GPTQ in blocks


@exercise(
    "quantization.gptq",
    points=4,
    minutes=25,
    hints=(
        "Two loops: over blocks of `tile` columns, and over the columns of the block. Inside the "
        "block you spread each error at once, to the columns of the block alone. What must you "
        "keep, so that the columns behind can have all of them together?",
        "Per column: error = (block[:, here] - code * scale) / upper[j, j] goes into errors[:, "
        "here], and torch.outer(error, upper[j, j + 1 : cols.stop]) comes off the rest of the "
        "block. After the block: behind = load('W', w, ..) - errors @ upper[cols, cols.stop:], and "
        "store it.",
    ),
)
def _(gptq):
    for rows, cols, group_size, tile in [
        (2, 6, 6, 3),
        (4, 12, 12, 4),
        (5, 13, 5, 4),
        (7, 17, 4, 6),
        (3, 9, 3, 16),
    ]:
        weight = _random(rows, cols, seed=cols)
        hessian = _hessian(cols, seed=rows)
        upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
        scales = _quantized(weight, 4, group_size)["scales"]
        scales = scales * torch.linspace(0.6, 1.1, scales.shape[1]).double()  # some are clipped
        w, codes = weight.clone(), torch.full((rows, cols), 99, dtype=torch.int8)
        what = f"{rows} x {cols} weights, groups of {group_size}, blocks of {tile}"
        with recording(Load, Store) as trace:
            gptq(w, upper.clone(), scales.clone(), codes, group_size=group_size, tile=tile)
        if (codes == 99).any():
            raise NotYet(
                f"{what}: {int((codes == 99).sum())} of {codes.numel()} codes were not written",
                misconception="leaves-codes-unwritten",
                hint="every column of every block ends in a store('codes', codes, (slice(0, rows), "
                "j), ..): go through tiles(n_cols, tile), whose last block may be shorter",
            )
        sizes = {"group_size": group_size, "tile": tile}
        # an oracle of its own: a fresh inverse for every column
        right = _with_fresh_inverses(weight, hessian, scales, group_size)
        expect_or_name(
            f"{what}: codes", codes, right,
            "take the smallest case that is wrong, and print the first column that differs",
            [
                (name, _blocks(weight, upper, scales, mistake=name, **sizes), where)
                for name, where in BLOCK_MISTAKES.items()
            ],
        )  # fmt: skip
        _expect_lazy(trace, what, rows, cols, tile)


BLOCK_MISTAKES = {
    "rounds-to-nearest":
        "that is plain rounding: the errors are spread to nobody, or what you round is not what "
        "they were spread to",
    "forgets-the-columns-behind":
        "the block is done, and the columns behind it have heard nothing of its errors",
    "forgets-the-block": "inside the block, too, each error is spread before the next column",
    "forgets-the-diagonal":
        "the error is divided by upper[j, j] before it is spread: so do the rows of U become the "
        "rows of the inverse over the columns that are left",
    "divides-by-the-square":
        "upper[j, j] once: its square is inverse[j, j], and the row of U has one factor of it "
        "already",
    "wrong-sign": "subtract: the columns behind must make good what is missing",
    "forgets-to-clip": "4-bit codes lie in [-8, 7]: clamp, also where a weight has grown",
    "scale-of-the-block":
        "groups and blocks are different things: the scale of column j is "
        "scales[:, j // group_size]",
    "spreads-raw-errors-behind":
        "behind the block, too, it is the error divided by upper[j, j] that is spread",
}  # fmt: skip


def _with_fresh_inverses(
    weight: Tensor, hessian: Tensor, scales: Tensor, group_size: int
) -> Tensor:
    w, codes = weight.clone(), torch.empty(weight.shape, dtype=torch.int8)
    for j in range(w.shape[1]):
        inverse, scale = torch.linalg.inv(hessian[j:, j:]), scales[:, j // group_size]
        code = (w[:, j] / scale).round().clamp(-8, 7)
        w[:, j:] -= torch.outer((w[:, j] - code * scale) / inverse[0, 0], inverse[0])
        codes[:, j] = code.to(torch.int8)
    return codes


def _blocks(
    weight: Tensor, upper: Tensor, scales: Tensor, *, group_size: int, tile: int, mistake: str
) -> Tensor:
    """GPTQ's two loops with one mistake."""
    w, codes = weight.clone(), torch.empty(weight.shape, dtype=torch.int8)
    sign = -1.0 if mistake == "wrong-sign" else 1.0
    for cols in tiles(w.shape[1], tile):
        errors = torch.zeros_like(w)
        for j in range(cols.start, cols.stop):
            at = cols.start if mistake == "scale-of-the-block" else j
            scale = scales[:, at // group_size]
            code = (w[:, j] / scale).round()
            if mistake != "forgets-to-clip":
                code = code.clamp(-8, 7)
            codes[:, j] = code.to(torch.int8)
            raw = w[:, j] - code * scale
            power = {"forgets-the-diagonal": 0, "divides-by-the-square": 2}.get(mistake, 1)
            error = sign * raw / upper[j, j] ** power
            errors[:, j] = raw if mistake == "spreads-raw-errors-behind" else error
            if mistake not in ("forgets-the-block", "rounds-to-nearest"):
                w[:, j + 1 : cols.stop] -= torch.outer(error, upper[j, j + 1 : cols.stop])
        if mistake not in ("forgets-the-columns-behind", "rounds-to-nearest"):
            w[:, cols.stop :] -= errors[:, cols] @ upper[cols, cols.stop :]
    return codes


def _expect_lazy(trace: Trace, what: str, rows: int, cols: int, tile: int) -> None:
    """W passes once a block: the block itself, and all columns behind it."""
    column = 8 * rows
    behind = sum(cols - block.stop for block in tiles(cols, tile))
    once_a_column = sum(cols - j - 1 for j in range(cols))
    read = sum(x.nbytes for x in trace.of(Load) if x.name == "W")
    written = sum(x.nbytes for x in trace.of(Store) if x.name == "W")
    expect_or_name(
        f"{what}: bytes of W read", read, column * (cols + behind),
        "each block is loaded once, and after it the columns behind it, once",
        [
            ("goes-around-load", 0, "read W only with load('W', ..): it keeps the count"),
            ("spreads-every-column-at-once", column * (cols + once_a_column),
             "that passes all of W for every column. Keep the scaled errors of the block and "
             "spread them behind it once, as one product"),
            ("goes-around-load-behind", column * cols,
             "the columns behind the block are in slow memory as well"),
        ],
    )  # fmt: skip
    expect_or_name(
        f"{what}: bytes of W written", written, column * behind,
        "a block stays on chip: only the columns behind it are written back",
        [
            ("goes-around-store", 0, "write W only with store('W', ..): it keeps the count"),
            ("writes-the-block-back", column * (cols + behind),
             "nobody reads the block's weights again; its codes are what is stored"),
        ],
    )  # fmt: skip


# 10. Which channels matter?


@exercise(
    "quantization.keep_channels",
    points=3,
    minutes=15,
    hints=(
        "An input channel is a column of the weight. How much does an error in that column matter "
        "for the output? It is multiplied by the input: so how large is that, on average?",
        "salient: x.abs().mean(0).topk(k).indices. kept_error: clone `rounded`, put the float "
        "columns back, rounded[:, channels] = weight[:, channels], and compare the OUTPUTS "
        "x @ weight.T in norm.",
    ),
)
def _(functions):
    expect_parts(functions, "salient_channels", "kept_error")
    salient, kept_error = functions
    for rows, cols, n, k in [(5, 8, 30, 2), (9, 7, 40, 3), (6, 12, 20, 1)]:
        weight = _random(rows, cols, seed=cols)
        x = _random(n, cols, seed=n) * torch.logspace(0, -0.7, cols).double()
        x[:, 3] -= 4  # large and negative
        x[0, 5] += 9  # large once
        weight[:, 6] *= 6
        what = f"x {n} x {cols}, k {k}"
        got = salient(weight.clone(), x.clone(), k)
        importance = x.abs().mean(0)

        def best(by: Tensor, k=k) -> Tensor:
            return by.topk(k).indices.sort().values

        if isinstance(got, Tensor) and len(got) != k:
            raise NotYet(
                f"{what}: salient_channels returns {len(got)} channels",
                misconception="takes-another-number",
                hint="exactly the k channels of largest mean |x|",
            )
        if isinstance(got, Tensor) and got.dtype == torch.int64:
            got = got.sort().values
        expect_or_name(
            f"{what}: the salient channels, sorted,", got, best(importance),
            "the k channels whose inputs have the largest mean |x|",
            [
                ("ranks-by-the-weight", best(weight.norm(dim=0)),
                 "a large weight on an input near 0 does nothing: AWQ looks at the INPUTS"),
                ("ranks-by-the-signed-mean", best(x.mean(0)),
                 "an input of -4 matters as much as one of 4: abs() before the mean"),
                ("ranks-by-the-largest", best(x.abs().amax(0)),
                 "one outlier in one row is not a large channel: the mean, not the maximum"),
                ("takes-the-least", best(-importance), "the LARGEST k"),
                ("ranks-rows-of-x", best(x.abs().mean(1)),
                 "a channel is a COLUMN of x: mean over dim 0"),
            ],
        )  # fmt: skip
        q = _quantized(weight, 3, 4)
        spread = q["scales"].repeat_interleave(4, 1)[:, :cols]
        rounded = q["codes"] * spread
        for channels in (best(importance), torch.tensor([1, 4])):
            _expect_kept_error(what, kept_error, weight, rounded, x, channels)


def _expect_kept_error(what: str, kept_error, weight, rounded, x, channels: Tensor) -> None:
    arguments = (weight, rounded, x, channels)
    got = kept_error(*(a.clone() for a in arguments))
    got = got.item() if isinstance(got, Tensor) and got.numel() == 1 else got
    kept, rows, zeroed = rounded.clone(), rounded.clone(), rounded.clone()
    kept[:, channels] = weight[:, channels]
    rows[channels[channels < len(rows)]] = weight[channels[channels < len(rows)]]
    zeroed[:, channels] = 0
    others = weight.clone()
    others[:, channels] = rounded[:, channels]

    def error(w: Tensor) -> float:
        return ((x @ (w - weight).T).norm() / (x @ weight.T).norm()).item()

    expect_or_name(
        f"{what}: kept_error with channels {channels.tolist()}", got, error(kept),
        "|| x (kept - weight)^T || / || x weight^T ||",
        [
            ("keeps-nothing", error(rounded), "the columns `channels` stay as they are in weight"),
            ("keeps-rows", error(rows),
             "weight is (outputs, inputs): an input channel is a COLUMN"),
            ("drops-the-channels", error(zeroed), "kept in float, not set to zero"),
            ("keeps-all-the-others", error(others),
             "the other way round: `channels` are kept, the others rounded"),
            ("measures-the-weights", ((kept - weight).norm() / weight.norm()).item(),
             "an error in a weight counts as much as its input is large: measure the OUTPUT"),
            ("squares", error(kept) ** 2, "the quotient of norms, not of their squares"),
            ("forgets-to-divide", (x @ (kept - weight).T).norm().item(),
             "divide by the norm of the right output"),
            ("divides-by-the-wrong-output",
             ((x @ (kept - weight).T).norm() / (x @ kept.T).norm()).item(),
             "relative to the output of the FLOAT weight"),
        ],
    )  # fmt: skip


# 11. The product that never sees the matrix


@exercise(
    "quantization.w4a16_linear",
    points=3,
    minutes=20,
    hints=(
        "Outside: tiles of rows of the weight, columns of out. Inside: groups of columns. "
        "One step loads the group's bytes, its scales, and the same columns of x.",
        "start a sum of zeros (len(x), rows); for group, cols in enumerate(tiles(n_in, "
        "group_size)): bytes = load('packed', packed, (rows, slice(cols.start // 2, "
        "ceil_div(cols.stop, 2)))); codes = reference.unpack_int4(bytes, n); the sum grows by "
        "x_g @ (codes * scale).T. One store of 'out' per tile of rows.",
    ),
)
def _(w4a16_linear):
    for m, n_out, n_in, group_size, tile in [
        (1, 4, 8, 8, 4),
        (1, 8, 16, 4, 4),
        (3, 7, 12, 4, 3),
        (2, 10, 21, 6, 4),
    ]:
        x, weight = _random(m, n_in, seed=m), _random(n_out, n_in, seed=n_in)
        q = _quantized(weight, 4, group_size)
        codes, scales = q["codes"], q["scales"]
        packed, out = _packed(codes), x.new_full((m, n_out), torch.nan)
        what = f"{m} rows of x, {n_out} x {n_in} codes, groups of {group_size}, tiles of {tile}"
        with recording(Load, Store) as trace:
            w4a16_linear(
                x.clone(), packed.clone(), scales.clone(), out, group_size=group_size, tile=tile
            )
        expect_stored(
            what, "out", out,
            "when all groups of a tile of rows are summed: "
            "store('out', out, (slice(0, len(x)), rows), total)",
        )  # fmt: skip
        expect_or_name(
            f"{what}: out",
            out,
            x @ (codes * _spread(scales, group_size, n_in)).T,
            "take one row of x and one of the weight; print group, cols and the codes of each step",
            _product_mistakes(x, codes, scales, group_size, tile),
        )
        _expect_small_loads(trace, what, x, packed, scales, group_size, tile)


def _spread(scales: Tensor, group_size: int, n_in: int) -> Tensor:
    """A scale for every weight, (rows, n_in)."""
    return scales.repeat_interleave(group_size, 1)[:, :n_in]


def _product_mistakes(x, codes, scales, group_size: int, tile: int) -> list[Mistake]:
    """What a fused product gives that goes wrong in its values."""
    n_in = codes.shape[1]
    wide = _spread(scales, group_size, n_in)
    weight = codes * wide
    right = x @ weight.T
    whole, rows = n_in // group_size * group_size, len(codes) // tile * tile
    nibbles = codes.to(torch.int16) % 16
    swapped = torch.nn.functional.pad(codes, (0, n_in % 2)).unflatten(1, (-1, 2)).flip(2)
    unscaled = [x[:, c] @ codes[:, c].to(x.dtype).T for c in tiles(n_in, group_size)]
    cut = right.clone()
    cut[:, rows:] = torch.nan
    return [
        ("forgets-the-scales", sum(unscaled),
         "a code is a small integer; the weight is code * scale"),
        ("takes-the-first-group's-scale", x @ (codes * scales[:, :1]).T,
         "every group has a scale of its own: scales[rows, group]"),
        ("scales-once-at-the-end", sum(unscaled) * scales[:, -1],
         "the groups have different scales: each partial sum is scaled by its own"),
        ("forgets-the-sign", x @ (nibbles * wide).T,
         "a nibble above 7 stands for 16 less: reference.unpack_int4 knows"),
        ("swaps-the-halves", x @ (swapped.flatten(1)[:, :n_in] * wide).T,
         "the EVEN column is in the low half of the byte"),
        ("divides-by-the-scale", x @ (codes / wide).T, "quantizing divides; the way back is times"),
        ("keeps-only-the-last-group", x[:, (n_in - 1) // group_size * group_size :]
         @ weight[:, (n_in - 1) // group_size * group_size :].T,
         "add up over the groups: total += .., with zeros before the first"),
        ("drops-the-last-group", x[:, :whole] @ weight[:, :whole].T,
         "the last group may be shorter, but it counts"),
        ("drops-the-last-rows", cut, "the last tile of rows may be shorter, but it counts"),
    ]  # fmt: skip


def _expect_small_loads(trace: Trace, what, x, packed, scales, group_size: int, tile: int) -> None:
    """The codes are read once, packed, a group of a tile at a time; nothing but out is written."""
    m, n_in, n_out = len(x), x.shape[1], len(packed)
    read, written = {}, {}
    for step in trace.of(Load):
        read[step.name] = read.get(step.name, 0) + step.nbytes
    for step in trace.of(Store):
        written[step.name] = written.get(step.name, 0) + step.nbytes
    if foreign := sorted(set(written) - {"out"}):
        raise NotYet(
            f"{what}: {sum(written[name] for name in foreign)} bytes were written to {foreign}",
            misconception="writes-the-matrix-back",
            hint="dequantised weights stay on chip. Writing them out and reading them again moves "
            "more than the float matrix would have",
        )
    for name in ("x", "packed", "scales"):
        if name not in read:
            raise NotYet(
                f"{what}: nothing was loaded from {name}",
                misconception="goes-around-load",
                hint=f"read slow memory only with load('{name}', ..): it keeps the count",
            )
    n_tiles = ceil_div(n_out, tile)
    largest = max(step.nbytes for step in trace.of(Load) if step.name == "packed")
    if largest > min(tile, n_out) * ceil_div(min(group_size, n_in), 2):
        raise NotYet(
            f"{what}: one load of packed reads {largest} bytes; a group of a tile has "
            f"{min(tile, n_out) * ceil_div(min(group_size, n_in), 2)}",
            misconception="holds-more-than-a-group",
            hint="on chip there is room for one group of one tile of rows",
        )
    for name, right, mistakes in [
        ("packed", packed.nbytes,
         [("reads-the-codes-for-every-row-of-x", m * packed.nbytes,
           "all rows of x share the codes: load them once and multiply all of x")]),
        ("scales", scales.nbytes,
         [("reads-all-scales-again", scales.shape[1] * scales.nbytes,
           "a step needs the scales of its own group alone"),
          ("reads-a-scale-for-every-weight", n_out * n_in * scales.itemsize,
           "a group shares ONE scale a row: scales[rows, group]")]),
        ("x", n_tiles * x.nbytes,
         [("reads-all-of-x-again", scales.shape[1] * n_tiles * x.nbytes,
           "a step needs the columns of x of its own group alone"),
          ("reads-x-for-every-row", n_out * x.nbytes,
           "a tile of rows shares the load of x: that is what the tile is for")]),
    ]:  # fmt: skip
        expect_or_name(
            f"{what}: bytes of {name} read", read[name], right,
            "packed and scales are read once, x once a tile of rows", mistakes,
        )  # fmt: skip
    expect_or_name(
        f"{what}: bytes of out written", written.get("out", 0), m * n_out * x.itemsize,
        "out is written once",
        [
            ("goes-around-store", 0, "write slow memory only with store(..): it keeps the count"),
            ("writes-unfinished-sums", scales.shape[1] * m * n_out * x.itemsize,
             "the sum stays on chip until its last group"),
        ],
    )  # fmt: skip


# 12. The kernel


@exercise(
    "quantization.w4a16_kernel",
    points=5,
    minutes=40,
    hints=(
        "A byte has two weights, and they meet two columns of x: load the even columns of x and "
        "the odd ones apart, and make two products. Everything past a border is masked: rows of x, "
        "rows of the weight, columns.",
        "In the loop over groups: byte = group * GROUP // 2 + tl.arange(0, GROUP // 2). low = "
        "((p & 0xF) ^ 8).to(tl.int32) - 8 meets x's columns 2 * byte, (p >> 4) those of 2 * byte "
        "+ 1; mask those with col < n_in, other=0.0. acc += (dot + dot) * scale[None, :].",
    ),
)
def _(kernel):
    expect_kernel("w4a16_kernel", kernel)
    for what, m, n_out, n_in in [
        ("one tile", 16, 16, 32),
        ("three groups", 16, 16, 96),
        ("one row of x", 1, 16, 64),
        ("40 outputs, 21 rows of x", 21, 40, 64),
        ("50 columns", 16, 32, 50),
        ("77 columns, an odd number", 5, 19, 77),
    ]:
        x = _random(m, n_in, seed=m, dtype=torch.float32)
        q = _quantized(_random(n_out, n_in, seed=n_in), 4, 32)
        codes, scales = q["codes"], q["scales"].float() * _random(n_out, 1, seed=2).abs().float()
        got = _launch(kernel, what, x, _packed(codes), scales)
        want = x.double() @ (codes * _spread(scales.double(), 32, n_in)).T
        expect_numbers(
            what, "out", got,
            "does the kernel end in a tl.store to out? If so, take the addresses apart: a row of "
            "packed has n_bytes bytes, one of scales n_groups, one of x n_in numbers",
        )  # fmt: skip
        expect_no_nan(
            what, got,
            "past the last column and past the last row of x there is nothing of yours: "
            "mask the loads of x with other=0.0, and store every row and column of out",
            misconception="reads-past-the-borders",
        )  # fmt: skip
        expect_or_name(
            f"{what}: out", got, want.float(),
            "compare with exercise 11 line by line: bytes, halves, signs, scales, borders",
            _kernel_mistakes(x.double(), codes, scales.double()),
        )  # fmt: skip


def _launch(kernel, what: str, x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """One program per tile of 16 rows of x and 16 of the weight, on a GPU or in the interpreter."""
    device, (m, n_in), n_out = pick_device(), x.shape, len(packed)
    # each stands between others: an address that is off a little finds those, and no crash
    nan = torch.full((max(x.numel(), 16 * n_in),), torch.nan)
    x3 = torch.cat([nan, x.flatten(), nan]).to(device)
    room = torch.full((16 * packed.shape[1] + packed.numel(),), 0x35, dtype=torch.uint8)
    packed3 = torch.cat([room, packed.flatten(), room]).to(device)
    far = torch.full((16 * scales.shape[1] + scales.numel(),), 1e3)
    scales3 = torch.cat([far, scales.flatten(), far]).to(device)
    out = torch.full((m * n_out + 32 * (n_out + 16),), torch.nan, device=device)
    start = 16 * (n_out + 16)
    with launched():
        kernel[(ceil_div(m, 16), ceil_div(n_out, 16))](
            x3[len(nan) :], packed3[len(room) :], scales3[len(far) :], out[start:],
            m, n_out, n_in, packed.shape[1], scales.shape[1],
            GROUP=32, TILE_M=16, TILE_N=16,
        )  # fmt: skip
    out = out.cpu()
    expect_untouched(
        what, "out", ~torch.cat([out[:start], out[start + m * n_out :]]).isnan(),
        "the last tile is shorter, of rows of x and of outputs: mask the store with both",
        misconception="writes-past-the-end",
    )  # fmt: skip
    return out[start : start + m * n_out].view(m, n_out)


def _kernel_mistakes(x: Tensor, codes: Tensor, scales: Tensor) -> list[Mistake]:
    """What kernels with the usual mistakes give, in float64."""
    n_in, n_groups = codes.shape[1], scales.shape[1]
    padded = torch.nn.functional.pad(codes, (0, n_in % 2))
    even, odd = padded[:, 0::2], padded[:, 1::2]
    x_even, x_odd = (torch.nn.functional.pad(x, (0, n_in % 2))[:, i::2] for i in (0, 1))
    byte_scales = _spread(scales, 16, even.shape[1])

    def product(low=even, high=odd, x_low=x_even, x_high=x_odd, scales=byte_scales) -> Tensor:
        return (x_low @ (low * scales).T + x_high @ (high * scales).T).float()

    cut = torch.where(torch.arange(even.shape[1]) < n_in // 32 * 16, 1, 0)
    mistakes = [
        ("forgets-the-sign", product(even.to(torch.int16) % 16, odd.to(torch.int16) % 16),
         "a nibble above 7 stands for 16 less: (nibble ^ 8) - 8, in a signed type"),
        ("subtracts-8", product(_off_by_8(even), _off_by_8(odd)),
         "that is for codes stored plus 8. These are two's complement: flip bit 3 first, "
         "(nibble ^ 8) - 8"),
        ("swaps-the-halves", product(odd, even),
         "the EVEN column is in the low half of its byte, and meets the even column of x"),
        ("forgets-the-high-half", product(high=odd * 0),
         "a byte holds two weights: p >> 4 is the other"),
        ("forgets-the-scales", product(scales=torch.ones_like(byte_scales)),
         "multiply by the group's scale, one a row of the weight"),
        ("takes-the-first-group's-scale", product(scales=scales[:, :1]),
         "the scale is at row * n_groups + group: move on with the group"),
        ("splits-the-group-in-halves", (x[:, : even.shape[1]] @ (even * byte_scales).T
         + x[:, -even.shape[1] :] @ (odd * byte_scales).T).float(),
         "byte b holds the columns 2 b and 2 b + 1: neighbours, not the two halves of a group"),
        ("drops-the-last-group", product(even * cut, odd * cut),
         "the last group may be shorter: walk all n_groups"),
    ]  # fmt: skip
    if n_groups == 1 and len(x) == len(codes):
        mistakes.append(
            ("scales-the-rows-of-x", product(scales=torch.ones_like(byte_scales)) * scales.float(),
             "the scale of row n of the weight belongs to COLUMN n of out: scale[None, :]")
        )  # fmt: skip
    if n_groups > 1:
        last = torch.arange(even.shape[1]) >= (n_groups - 1) * 16
        mistakes.append(
            ("keeps-only-the-last-group", product(even * last, odd * last),
             "acc += .., not acc = ..")
        )  # fmt: skip
    return mistakes


def _off_by_8(codes: Tensor) -> Tensor:
    return codes.to(torch.int16) % 16 - 8
