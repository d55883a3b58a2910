"""Wrong and right attempts at chapter 4's exercises. Each wrong one is a mistake people make."""

import torch
import torch.nn.functional as F

from llmopt_lab.core.device import prepare_triton
from llmopt_lab.core.memory import ceil_div, load, store, tiles
from llmopt_lab.quantization import reference

prepare_triton()

import triton
import triton.language as tl

# ruff: noqa: E402

# 1. same_function


def dressing(change):
    """An attempt: `change` writes to clones of gate, up and down."""

    def same_function(gate, up, down, channels, factor):
        gate, up, down = gate.clone(), up.clone(), down.clone()
        change(gate, up, down, channels, factor)
        return gate, up, down

    return same_function


def forgets_to_divide(gate, up, down, channels, factor):
    up[channels] *= factor


def multiplies_twice(gate, up, down, channels, factor):
    up[channels] *= factor
    down[:, channels] *= factor


def scales_the_gate(gate, up, down, channels, factor):
    gate[channels] *= factor
    down[:, channels] /= factor


def scales_gate_and_up(gate, up, down, channels, factor):
    gate[channels] *= factor
    up[channels] *= factor
    down[:, channels] /= factor


def scales_columns_of_up(gate, up, down, channels, factor):
    up[:, channels] *= factor
    down[:, channels] /= factor


def divides_rows_of_down(gate, up, down, channels, factor):
    up[channels] *= factor
    down[channels] /= factor


def scales_every_channel(gate, up, down, channels, factor):
    up *= factor
    down /= factor


def scales_in_place(gate, up, down, channels, factor):
    up[channels] *= factor
    down[:, channels] /= factor
    return gate, up, down


def dresses_with_a_diagonal_matrix(gate, up, down, channels, factor):
    size = torch.ones(len(up), dtype=up.dtype).index_fill(0, channels, factor)
    return gate, torch.diag(size) @ up, down @ torch.diag(1 / size)


def dresses_channel_by_channel(gate, up, down, channels, factor):
    ups, downs = list(up), list(down.T)
    for c in channels.tolist():
        ups[c], downs[c] = ups[c] * factor, downs[c] / factor
    return [gate.clone(), torch.stack(ups), torch.stack(downs, 1)]


# 2. quantize_groups


def grouping(
    largest=lambda part, whole: part.abs().amax(1),
    code=lambda bits: 2 ** (bits - 1) - 1,
    cut=torch.round,
    zero=1.0,
    dtype=torch.int8,
    end=lambda codes, scales: (codes, scales),
):
    """An attempt: what is largest in a group, the largest code, how to round, and the result."""

    def quantize_groups(weight, bits, group_size):
        codes, scales = [], []
        for cols in tiles(weight.shape[1], group_size):
            scale = (largest(weight[:, cols], weight) / code(bits)).expand(len(weight))
            scale = torch.where(scale == 0, zero, scale)
            codes.append(cut(weight[:, cols] / scale[:, None]).clamp(-128, 127).to(dtype))
            scales.append(scale)
        return end(torch.cat(codes, 1), torch.stack(scales, 1))

    return quantize_groups


def groups_in_one_view(weight, bits, group_size):
    rows, n_cols = weight.shape
    padded = F.pad(weight, (0, -n_cols % group_size)).view(rows, -1, group_size)
    scales = padded.abs().amax(2) / (2 ** (bits - 1) - 1)
    scales[scales == 0] = 1
    codes = torch.round(padded / scales[:, :, None]).to(torch.int8)
    return codes.view(rows, -1)[:, :n_cols], scales


# 3. fake_quantize


def faking(
    codes=lambda weight, scale, low, high: torch.round(weight / scale).clamp(low, high),
    value=lambda codes, scale: codes * scale,
    trains=lambda inside: inside,
    path=lambda weight, scale: weight,
):
    """An attempt: its codes, its value, who trains, and what the gradient passes through."""

    def fake_quantize(weight, scale, bits):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        wide = torch.round(weight / scale)
        way = path(weight, scale)
        way = torch.where(trains((low <= wide) & (wide <= high)), way, way.detach())
        return way + (value(codes(weight, scale, low, high), scale) - way).detach()

    return fake_quantize


def grid(weight, scale, bits):
    return torch.round(weight / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def swaps_value_and_gradient(weight, scale, bits):
    rounded = grid(weight, scale, bits)
    return rounded + (weight - rounded).detach()


def clamps_first(weight, scale, bits):
    """Right, and the second hint."""
    inside = weight.clamp(-(2 ** (bits - 1)) * scale, (2 ** (bits - 1) - 1) * scale)
    return inside + (grid(weight, scale, bits) - inside).detach()


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, scale, bits):
        rounded = grid(weight, scale, bits)
        ctx.save_for_backward((torch.round(weight / scale) * scale - rounded).abs() < scale / 2)
        return rounded

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0], None, None


# 4. pack_int4


def packing(nibbles=lambda codes: codes & 0xF, swap=False):
    def pack_int4(codes):
        parts = nibbles(F.pad(codes, (0, codes.shape[1] % 2)).int())
        low, high = parts[:, swap::2], parts[:, 1 - swap :: 2]
        return (low | high << 4).to(torch.uint8)

    return pack_int4


def unpacking(sign=lambda c: torch.where(c > 7, c - 16, c), order="low first", cut=True):
    def unpack_int4(packed, n):
        low, high = sign((packed & 0xF).to(torch.int8)), sign((packed >> 4).to(torch.int8))
        if order == "after each other":
            both = torch.cat([low, high], 1)
        else:
            both = torch.stack([low, high] if order == "low first" else [high, low], 2).flatten(1)
        return both[:, :n] if cut else both

    return unpack_int4


def packs_halves_of_the_row(codes):
    codes = F.pad(codes, (0, codes.shape[1] % 2)).int() & 15
    half = codes.shape[1] // 2
    return (codes[:, :half] | codes[:, half:] << 4).to(torch.uint8)


def packs_without_padding(codes):
    nibbles = codes.to(torch.uint8) & 0xF
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def packs_by_arithmetic(codes):
    rows = []
    for row in codes.tolist():
        row += [0] * (len(row) % 2)
        rows.append([row[i] % 16 + row[i + 1] % 16 * 16 for i in range(0, len(row), 2)])
    return torch.tensor(rows, dtype=torch.uint8)


def unpacks_by_shifts(packed, n):
    """Right: the shift of a signed byte brings its sign along."""
    signed = packed.view(torch.int8)
    out = torch.empty(len(packed), 2 * packed.shape[1], dtype=torch.int8)
    out[:, 0::2] = (signed << 4) >> 4
    out[:, 1::2] = signed >> 4
    return out[:, :n]


# 5. quantized_size


def sizing(
    codes=lambda rows, cols, bits: rows * ceil_div(cols * bits, 8),
    groups=lambda rows, cols, size: rows * ceil_div(cols, size),
    each=lambda zeros: 2 + zeros,
    rate=lambda nbytes, n, bits: 8 * nbytes / n,
):
    """An attempt: bytes of the codes, how many groups, bytes of each, and bits per weight."""

    def quantized_size(rows, cols, bits, group_size, zero_points):
        nbytes = codes(rows, cols, bits) + groups(rows, cols, group_size) * each(zero_points)
        return nbytes, rate(nbytes, rows * cols, bits)

    return quantized_size


def counts_row_by_row(rows, cols, bits, group_size, zero_points):
    nbytes = 0
    for _ in range(rows):
        nbytes += (cols * bits + 7) // 8
        for _ in range(0, cols, group_size):
            nbytes += 3 if zero_points else 2
    return [nbytes, nbytes / rows / cols * 8]


# 6. compensate


def compensating(
    error=lambda e: e,
    divide=lambda e, diagonal: e / diagonal,
    spread=lambda e, row: torch.outer(e, row),
    put=True,
):
    """An attempt: the errors, divided by what, spread how, and whether the column is set."""

    def compensate(weight, inverse, column, rounded):
        e = divide(error(weight[:, column] - rounded), inverse[column, column])
        new = weight.clone()
        new[:, column + 1 :] -= spread(e, inverse[column, column + 1 :])
        if put:
            new[:, column] = rounded
        return new

    return compensate


def compensates_with_the_hessian(weight, inverse, column, rounded):
    hessian = torch.linalg.inv(inverse[column:, column:])
    error = (weight[:, column] - rounded) / hessian[0, 0]
    weight[:, column + 1 :] -= torch.outer(error, hessian[0, 1:])
    weight[:, column] = rounded
    return weight


def compensates_everywhere(weight, inverse, column, rounded):
    error = (weight[:, column] - rounded) / inverse[column, column]
    return weight - torch.outer(error, inverse[column])


def compensates_by_least_squares(weight, inverse, column, rounded):
    """Right: the Hessian back from its inverse, and the normal equations of the columns behind."""
    hessian = torch.linalg.inv(inverse[column:, column:])
    error = weight[:, column] - rounded
    weight[:, column] = rounded
    weight[:, column + 1 :] += torch.linalg.solve(hessian[1:, 1:], hessian[1:, :1] * error).T
    return weight


# 7. round_columns


def rounding(wrong=""):
    """An attempt with the mistake called `wrong`."""

    def round_columns(weight, hessian, scale):
        w, inverse = weight.clone(), torch.linalg.inv(hessian)
        codes = torch.empty_like(w)
        for j in range(w.shape[1]):
            codes[:, j] = (w[:, j] / scale).round()
            if wrong != "clip":
                codes[:, j].clamp_(-8, 7)
            error = w[:, j] - codes[:, j] * scale
            m = hessian if wrong == "hessian" else inverse
            if wrong != "diagonal":
                error = error / m[j, j]
            step = torch.outer(error, m[j, j + 1 :])
            if wrong != "nearest":
                w[:, j + 1 :] += step if wrong == "sign" else -step
            if wrong != "stale":
                out = torch.outer(inverse[:, j], inverse[j])
                inverse = inverse - (out if wrong == "eliminate" else out / inverse[j, j])
        return codes if wrong == "codes" else codes * scale[:, None]

    return round_columns


def rounds_with_the_cholesky_factor(weight, hessian, scale):
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    for j in range(weight.shape[1]):
        nearest = (weight[:, j] / scale).round().clamp(-8, 7) * scale
        error = (weight[:, j] - nearest) / upper[j, j]
        weight[:, j:] -= torch.outer(error, upper[j, j:])
        weight[:, j] = nearest
    return weight


def rounds_with_fresh_inverses(weight, hessian, scale):
    for j in range(weight.shape[1]):
        row = torch.linalg.inv(hessian[j:, j:])[0]
        nearest = (weight[:, j] / scale).round().clamp(-8, 7) * scale
        error = (weight[:, j] - nearest) / row[0]
        weight[:, j + 1 :] -= error[:, None] * row[1:]
        weight[:, j] = nearest
    return weight


# 8. inverse_factor


def factoring(
    damp=lambda h: h.diagonal().mean() * torch.eye(len(h)).double(),
    factor=lambda h: torch.linalg.cholesky(torch.linalg.inv(h), upper=True),
):
    """An attempt: what is added to H, times damping, and how the sum is factored."""

    def inverse_factor(hessian, damping):
        return factor(hessian + damping * damp(hessian))

    return inverse_factor


def inverse_of_the_root(h):
    return torch.linalg.inv(torch.linalg.cholesky(h))


def factors_backwards(hessian, damping):
    """Right: the factor of H with its order reversed, inverted and reversed again."""
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    lower = torch.linalg.cholesky(hessian.flip(0, 1))
    eye = torch.eye(len(hessian), dtype=hessian.dtype)
    return torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)


# 9. gptq


def blocking(wrong=""):
    """An attempt with the mistake called `wrong`."""

    def gptq(w, upper, scales, codes, *, group_size, tile):
        rows, n_cols = slice(0, len(w)), w.shape[1]
        for cols in tiles(n_cols, tile):
            block = (w[rows, cols] if wrong == "no load" else load("W", w, (rows, cols))).clone()
            errors = torch.zeros_like(block)
            for j in range(cols.start, cols.stop):
                here = j - cols.start
                scale = scales[:, (cols.start if wrong == "scale" else j) // group_size]
                code = (block[:, here] / scale).round()
                if wrong != "clip":
                    code = code.clamp(-8, 7)
                raw = block[:, here] - code * scale
                error = raw / upper[j, j] ** {"diagonal": 0, "square": 2}.get(wrong, 1)
                errors[:, here] = raw if wrong == "raw" else error
                step = torch.outer(error, upper[j, j + 1 : cols.stop])
                if wrong not in ("block", "nearest"):
                    block[:, here + 1 :] += step if wrong == "sign" else -step
                if wrong != "codes" or cols.stop < n_cols:
                    store("codes", codes, (rows, j), code.to(torch.int8))
            if wrong == "write block":
                store("W", w, (rows, cols), block)
            behind = slice(cols.stop, n_cols)
            if behind.start == n_cols or wrong in ("behind", "nearest"):
                continue
            step = errors @ upper[cols, behind]
            unseen = wrong in ("no load", "load behind")
            rest = w[rows, behind] if unseen else load("W", w, (rows, behind))
            rest = rest + step if wrong == "sign" else rest - step
            if wrong == "no store":
                w[rows, behind] = rest
            else:
                store("W", w, (rows, behind), rest)

    return gptq


def spreads_every_column(w, upper, scales, codes, *, group_size, tile):
    rows, n_cols = slice(0, len(w)), w.shape[1]
    for cols in tiles(n_cols, tile):
        load("W", w, (rows, cols))
        for j in range(cols.start, cols.stop):
            scale = scales[:, j // group_size]
            code = (w[:, j] / scale).round().clamp(-8, 7)
            store("codes", codes, (rows, j), code.to(torch.int8))
            error = (w[:, j] - code * scale) / upper[j, j]
            behind = slice(j + 1, n_cols)
            rest = load("W", w, (rows, behind)) - torch.outer(error, upper[j, behind])
            store("W", w, (rows, behind), rest)


def collects_what_is_owed(w, upper, scales, codes, *, group_size, tile):
    """Right: inside the block a column asks for its share of all errors before it."""
    rows, n_cols = slice(0, len(w)), w.shape[1]
    for first in range(0, n_cols, tile):
        cols = slice(first, min(first + tile, n_cols))
        block = load("W", w, (rows, cols))
        errors = block.new_zeros(block.shape)
        for here in range(block.shape[1]):
            j = first + here
            column = block[:, here] - errors[:, :here] @ upper[first:j, j]
            scale = scales[:, j // group_size]
            code = torch.clamp(torch.round(column / scale), -8, 7)
            errors[:, here] = (column - code * scale) / upper[j, j]
            store("codes", codes, (rows, j), code.to(torch.int8))
        if cols.stop < n_cols:
            behind = slice(cols.stop, n_cols)
            rest = load("W", w, (rows, behind)) - errors @ upper[cols, behind]
            store("W", w, (rows, behind), rest)


# 10. keep_channels


def salient(weight, x, k):
    return x.abs().mean(0).topk(k).indices


def salient_by(importance, more=0):
    return lambda weight, x, k: importance(weight, x).topk(k + more).indices


def keeping(mix=None, error=None):
    """An attempt: the mixed weight, and its error."""

    def put_back(weight, rounded, channels):
        kept = rounded.clone()
        kept[:, channels] = weight[:, channels]
        return kept

    def norms(kept, weight, x):
        return (x @ (kept - weight).T).norm() / (x @ weight.T).norm()

    def kept_error(weight, rounded, x, channels):
        return (error or norms)((mix or put_back)(weight, rounded, channels), weight, x).item()

    return kept_error


def keeps_rows(weight, rounded, channels):
    channels = channels[channels < len(weight)]
    return rounded.index_copy(0, channels, weight[channels])


def sorts_all_channels(weight, x, k):
    return torch.tensor(sorted(range(x.shape[1]), key=lambda c: -x[:, c].abs().sum())[:k])


def sums_the_error_channel_by_channel(weight, rounded, x, channels):
    delta = 0
    for c in set(range(x.shape[1])) - set(channels.tolist()):
        delta = delta + torch.outer(x[:, c], rounded[:, c] - weight[:, c])
    return delta.square().sum().sqrt() / torch.linalg.vector_norm(x @ weight.T)


# 11. w4a16_linear


def unpack(nbytes, n, wrong):
    if wrong == "sign":
        return torch.stack([nbytes & 15, nbytes >> 4], 2).flatten(1)[:, :n].double()
    if wrong == "halves":
        nbytes = nbytes << 4 | nbytes >> 4
    return reference.unpack_int4(nbytes, n).double()


def multiplying(wrong=""):
    """An attempt with the mistake called `wrong`."""

    def w4a16_linear(x, packed, scales, out, *, group_size, tile):
        every, n_in, n_out = slice(0, len(x)), x.shape[1], len(packed)
        for rows in tiles(n_out // tile * tile if wrong == "rows" else n_out, tile):
            n_rows = rows.stop - rows.start
            total = torch.zeros(len(x), n_rows, dtype=x.dtype)
            if wrong == "all bytes":
                whole = load("packed", packed, (rows, slice(0, packed.shape[1])))
            last = n_in // group_size * group_size if wrong == "group" else n_in
            for group, cols in enumerate(tiles(last, group_size)):
                here = slice(cols.start // 2, ceil_div(cols.stop, 2))
                for _ in range(len(x) if wrong == "codes again" else 1):
                    if wrong == "all bytes":
                        nbytes = whole[:, here]
                    elif wrong == "no load":
                        nbytes = packed[rows, here]
                    else:
                        nbytes = load("packed", packed, (rows, here))
                codes = unpack(nbytes, cols.stop - cols.start, wrong)
                of = 0 if wrong == "first" else group
                for _ in range(cols.stop - cols.start if wrong == "scales again" else 1):
                    if wrong == "all scales":
                        scale = load("scales", scales, (rows, slice(0, scales.shape[1])))
                        scale = scale[:, of : of + 1]
                    else:
                        scale = load("scales", scales, (rows, slice(of, of + 1)))
                for _ in range(n_rows if wrong == "x again" else 1):
                    if wrong == "all x":
                        part = load("x", x, (every, slice(0, n_in)))[:, cols]
                    else:
                        part = load("x", x, (every, cols))
                weight = codes * scale
                if wrong in ("unscaled", "end"):
                    weight = codes
                if wrong == "divide":
                    weight = codes / scale
                if wrong == "matrix":
                    store("W", torch.empty(n_out, n_in).double(), (rows, cols), weight)
                total = part @ weight.T + (0 if wrong == "last" else total)
                if wrong == "unfinished":
                    store("out", out, (every, rows), total)
            if wrong == "end":
                total = total * scale.T
            if wrong == "no store":
                out[every, rows] = total
            elif wrong not in ("unfinished", "nothing"):
                store("out", out, (every, rows), total)

    return w4a16_linear


def multiplies_byte_by_byte(x, packed, scales, out, *, group_size, tile):
    """Right: even and odd columns apart, as the kernel does; groups from the last to the first."""
    every, n_in = slice(0, len(x)), x.shape[1]
    for rows in reversed(list(tiles(len(packed), tile))):
        total = 0
        for group, cols in reversed(list(enumerate(tiles(n_in, group_size)))):
            nbytes = load("packed", packed, (rows, slice(cols.start // 2, (cols.stop + 1) // 2)))
            low, high = ((half.int() ^ 8) - 8 for half in (nbytes & 15, nbytes >> 4))
            part = load("x", x, (every, cols))
            even, odd = part[:, 0::2], part[:, 1::2]
            product = even @ low.T.to(x.dtype) + odd @ high[:, : odd.shape[1]].T.to(x.dtype)
            total = total + product * load("scales", scales, (rows, group))
        store("out", out, (every, rows), total)


# 12. w4a16_kernel


@triton.jit
def forward(
    x_ptr, packed_ptr, scales_ptr, out_ptr, m, n_out, n_in, n_bytes, n_groups,
    GROUP: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    channel = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    acc = tl.zeros((TILE_M, TILE_N), tl.float32)
    row_ok, channel_ok = (row < m)[:, None], (channel < n_out)[:, None]
    end = n_groups
    if WRONG == "group":
        end = n_in // GROUP
    for group in range(0, end):
        half = tl.arange(0, GROUP // 2)
        byte = group * (GROUP // 2) + half
        p = tl.load(
            packed_ptr + channel[:, None] * n_bytes + byte[None, :],
            channel_ok & (byte < n_bytes)[None, :],
            other=0,
        )
        low, high = (p & 0xF).to(tl.int32), (p >> 4).to(tl.int32)
        if WRONG == "subtract":
            low, high = low - 8, high - 8
        elif WRONG != "sign":
            low, high = (low ^ 8) - 8, (high ^ 8) - 8
        if WRONG == "swap":
            low, high = high, low
        even, odd = 2 * byte, 2 * byte + 1
        if WRONG == "halves":
            even, odd = group * GROUP + half, group * GROUP + GROUP // 2 + half
        even_ok, odd_ok = (even < n_in)[None, :], (odd < n_in)[None, :]
        if WRONG == "borders":
            even_ok, odd_ok = (even >= 0)[None, :], (odd >= 0)[None, :]
        at_row = x_ptr + row[:, None] * n_in
        x_even = tl.load(at_row + even[None, :], row_ok & even_ok, other=0.0)
        x_odd = tl.load(at_row + odd[None, :], row_ok & odd_ok, other=0.0)
        part = tl.dot(x_even, tl.trans(low.to(tl.float32)), input_precision="ieee")
        if WRONG != "high":
            part += tl.dot(x_odd, tl.trans(high.to(tl.float32)), input_precision="ieee")
        at_scale = scales_ptr + channel * n_groups + group
        if WRONG == "first":
            at_scale = scales_ptr + channel * n_groups
        scale = tl.load(at_scale, channel < n_out, other=0.0)
        if WRONG == "rows":
            part = part * scale[:, None]
        elif WRONG != "unscaled":
            part = part * scale[None, :]
        if WRONG == "last":
            acc = part
        else:
            acc += part
    mine = row_ok & (channel < n_out)[None, :]
    if WRONG == "past":
        mine = (row >= 0)[:, None] & (channel < n_out)[None, :]
    if WRONG != "store":
        tl.store(out_ptr + row[:, None] * n_out + channel[None, :], acc, mine)


@triton.jit
def column_by_column(
    x_ptr, packed_ptr, scales_ptr, out_ptr, m, n_out, n_in, n_bytes, n_groups,
    GROUP: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Right without tl.dot and without pairs: each column fetches its own byte."""
    row = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    channel = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    acc = tl.zeros((TILE_M, TILE_N), tl.float32)
    for group in range(0, n_groups):
        col = group * GROUP + tl.arange(0, GROUP)
        ok = (channel < n_out)[:, None] & (col < n_in)[None, :]
        p = tl.load(packed_ptr + channel[:, None] * n_bytes + (col // 2)[None, :], ok, other=0)
        nibble = (p.to(tl.int32) >> (4 * (col % 2))[None, :]) & 15
        scale = tl.load(scales_ptr + channel * n_groups + group, channel < n_out, other=0.0)
        weight = tl.where(nibble > 7, nibble - 16, nibble) * scale[:, None]
        ok = (row < m)[:, None] & (col < n_in)[None, :]
        x = tl.load(x_ptr + row[:, None] * n_in + col[None, :], ok, other=0.0)
        acc += tl.sum(x[:, None, :] * weight[None, :, :], axis=2)
    ok = (row < m)[:, None] & (channel < n_out)[None, :]
    tl.store(out_ptr + row[:, None] * n_out + channel[None, :], acc, ok)


@triton.jit
def raises_in_the_kernel(
    x_ptr, packed_ptr, scales_ptr, out_ptr, m, n_out, n_in, n_bytes, n_groups,
    GROUP: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    tl.store(out_ptr, no_such_name)  # noqa: F821


class Forward:
    """`forward` with one mistake, launched like any kernel."""

    fn = forward.fn

    def __init__(self, wrong):
        self.wrong = wrong

    def __getitem__(self, grid):
        return lambda *args, **sizes: forward[grid](*args, **sizes, WRONG=self.wrong)


WRONG = {
    "quantization.same_function": [
        (dressing(forgets_to_divide), "forgets-to-divide"),
        (dressing(multiplies_twice), "multiplies-twice"),
        (dressing(scales_the_gate), "scales-the-gate"),
        (dressing(scales_gate_and_up), "scales-gate-and-up"),
        (dressing(scales_columns_of_up), "scales-columns-of-up"),
        (dressing(divides_rows_of_down), "divides-rows-of-down"),
        (dressing(scales_every_channel), "scales-every-channel"),
        (scales_in_place, "changes-its-arguments"),
        (lambda gate, up, down, channels, factor: up, "returns-other-things"),
    ],
    "quantization.quantize_groups": [
        (grouping(lambda part, whole: whole.abs().max()), "one-scale-a-tensor"),
        (grouping(lambda part, whole: whole.abs().amax(1)), "one-scale-a-row"),
        (grouping(lambda part, whole: part.amax(1)), "forgets-the-sign"),
        (grouping(code=lambda bits: 127), "always-8-bits"),
        (grouping(code=lambda bits: 2 ** (bits - 1)), "counts-codes-not-the-largest"),
        (grouping(code=lambda bits: 2**bits - 1), "forgets-that-codes-have-a-sign"),
        (grouping(cut=torch.trunc), "cuts-off"),
        (grouping(cut=torch.floor), "rounds-down"),
        (grouping(end=lambda codes, scales: (codes, 1 / scales)), "inverts-the-scale"),
        (grouping(zero=0.0), "divides-by-zero"),
        (grouping(dtype=torch.int64), "codes-take-more-than-a-byte"),
        (grouping(end=lambda codes, scales: codes), "returns-other-things"),
    ],
    "quantization.fake_quantize": [
        (swaps_value_and_gradient, "rounds-nothing"),
        (faking(value=lambda codes, scale: codes), "returns-codes"),
        (faking(lambda w, s, low, high: (w / s).round()), "forgets-to-clip"),
        (faking(lambda w, s, low, high: (w / s).round().clamp(-128, 127)), "clips-to-8-bits"),
        (faking(lambda w, s, low, high: (w / s).round().clamp(-high, high)),
         "loses-the-least-code"),
        (faking(lambda w, s, low, high: (w / s).trunc().clamp(low, high)), "cuts-off"),
        (lambda weight, scale, bits: grid(weight, scale, bits).detach(), "cuts-the-gradient"),
        (grid, "gradient-of-round"),
        (faking(trains=torch.ones_like), "trains-clipped-weights"),
        (faking(path=lambda weight, scale: weight * scale), "scales-the-gradient"),
        (faking(path=lambda weight, scale: weight / scale), "divides-the-gradient"),
        (faking(trains=torch.logical_not), "gradient-only-where-clipped"),
    ],
    "quantization.pack_int4": [
        ((packing(lambda codes: codes), unpacking()), "lets-the-sign-in"),
        ((packing(swap=True), unpacking()), "swaps-the-halves"),
        ((packs_halves_of_the_row, unpacking()), "pairs-the-halves-of-the-row"),
        ((packing(lambda codes: codes + 8), unpacking()), "shifts-by-8"),
        ((lambda codes: packing()(codes[:, : codes.shape[1] // 2 * 2]), unpacking()),
         "drops-the-odd-one"),
        ((lambda codes: packing()(codes).view(torch.int8), unpacking()), "bytes-with-a-sign"),
        ((lambda codes: codes & 0xF, unpacking()), "saves-nothing"),
        ((packs_without_padding, unpacking()), "fails-on-odd-rows"),
        ((lambda codes: codes.view(len(codes), -1, 3), unpacking()), "raises"),
        ((packing(), unpacking(lambda c: c)), "forgets-the-sign"),
        ((packing(), unpacking(lambda c: torch.where(c > 8, c - 16, c))),
         "minus-8-comes-back-as-8"),
        ((packing(), unpacking(lambda c: c - 8)), "subtracts-8"),
        ((packing(), unpacking(order="high first")), "swaps-the-halves-back"),
        ((packing(), unpacking(order="after each other")), "halves-after-each-other"),
        ((packing(), unpacking(cut=False)), "keeps-the-padding"),
        (packing(), "returns-other-things"),
    ],
    "quantization.quantized_size": [
        (sizing(each=lambda zeros: 0), "forgets-the-scales"),
        (sizing(groups=lambda rows, cols, size: rows), "one-scale-a-row"),
        (sizing(groups=lambda rows, cols, size: ceil_div(cols, size)), "forgets-the-rows"),
        (sizing(groups=lambda rows, cols, size: 1), "one-scale-a-tensor"),
        (sizing(groups=lambda rows, cols, size: rows * (cols // size)), "rounds-groups-down"),
        (sizing(each=lambda zeros: 2), "forgets-the-zero-points"),
        (sizing(each=lambda zeros: 4 + zeros), "scales-of-four-bytes"),
        (sizing(each=lambda zeros: 16 + zeros), "counts-bits-of-scales"),
        (sizing(lambda rows, cols, bits: rows * cols), "forgets-to-pack"),
        (sizing(lambda rows, cols, bits: ceil_div(rows * cols * bits, 8)),
         "fills-bytes-across-rows"),
        (sizing(lambda rows, cols, bits: rows * (cols * bits // 8)), "rounds-bytes-down"),
        (sizing(rate=lambda nbytes, n, bits: bits), "bits-of-the-codes-alone"),
        (sizing(rate=lambda nbytes, n, bits: nbytes / n), "bytes-per-weight"),
        (sizing(rate=lambda nbytes, n, bits: 4 * n / nbytes), "how-much-smaller"),
        (lambda rows, cols, bits, group_size, zeros: rows * cols * bits / 8,
         "returns-other-things"),
    ],
    "quantization.compensate": [
        (compensating(spread=lambda e, row: 0), "rounds-only"),
        (compensating(error=lambda e: -e), "wrong-sign"),
        (compensating(divide=lambda e, d: e), "forgets-the-diagonal"),
        (compensating(divide=lambda e, d: e / d.sqrt()), "takes-the-root-of-the-diagonal"),
        (compensates_with_the_hessian, "compensates-with-the-hessian"),
        (compensating(put=False), "keeps-the-column"),
        (compensating(error=lambda e: e.mean().expand(len(e))), "one-error-for-all-rows"),
        (compensates_everywhere, "touches-finished-columns"),
        (lambda weight, inverse, column, rounded: None, "returns-nothing"),
    ],
    "quantization.round_columns": [
        (rounding("stale"), "stale-inverse"),
        (rounding("nearest"), "rounds-to-nearest"),
        (rounding("sign"), "wrong-sign"),
        (rounding("diagonal"), "forgets-the-diagonal"),
        (rounding("eliminate"), "forgets-to-divide-when-eliminating"),
        (rounding("hessian"), "compensates-with-the-hessian"),
        (rounding("clip"), "forgets-to-clip"),
        (rounding("codes"), "returns-codes"),
    ],
    "quantization.inverse_factor": [
        (factoring(lambda h: 0), "forgets-the-damping"),
        (factoring(lambda h: torch.eye(len(h)).double()), "damps-by-a-number"),
        (factoring(lambda h: h.diagonal().mean()), "damps-every-entry"),
        (factoring(lambda h: h.mean() * torch.eye(len(h)).double()), "damps-by-the-mean-of-all"),
        (factoring(lambda h: h.diagonal().diag()), "damps-each-by-its-own"),
        (factoring(lambda h: h.diagonal().max() * torch.eye(len(h)).double()),
         "damps-by-the-largest"),
        (factoring(lambda h: h.diagonal().mean() * (h.diagonal() > 0).double().diag()),
         "leaves-it-singular"),
        (factoring(factor=lambda h: torch.linalg.cholesky(torch.linalg.inv(h))), "lower-factor"),
        (factoring(factor=inverse_of_the_root), "any-root-will-do"),
        (factoring(factor=lambda h: inverse_of_the_root(h).T), "root-on-the-other-side"),
        (factoring(factor=lambda h: torch.linalg.cholesky(h).T), "factor-of-the-hessian"),
        (factoring(factor=torch.linalg.inv), "returns-the-inverse"),
    ],
    "quantization.gptq": [
        (blocking("nearest"), "rounds-to-nearest"),
        (blocking("behind"), "forgets-the-columns-behind"),
        (blocking("block"), "forgets-the-block"),
        (blocking("diagonal"), "forgets-the-diagonal"),
        (blocking("square"), "divides-by-the-square"),
        (blocking("sign"), "wrong-sign"),
        (blocking("clip"), "forgets-to-clip"),
        (blocking("scale"), "scale-of-the-block"),
        (blocking("raw"), "spreads-raw-errors-behind"),
        (blocking("codes"), "leaves-codes-unwritten"),
        (blocking("no load"), "goes-around-load"),
        (blocking("load behind"), "goes-around-load-behind"),
        (blocking("no store"), "goes-around-store"),
        (blocking("write block"), "writes-the-block-back"),
        (spreads_every_column, "spreads-every-column-at-once"),
    ],
    "quantization.keep_channels": [
        ((salient_by(lambda w, x: w.norm(dim=0)), keeping()), "ranks-by-the-weight"),
        ((salient_by(lambda w, x: x.mean(0)), keeping()), "ranks-by-the-signed-mean"),
        ((salient_by(lambda w, x: x.abs().amax(0)), keeping()), "ranks-by-the-largest"),
        ((salient_by(lambda w, x: -x.abs().mean(0)), keeping()), "takes-the-least"),
        ((salient_by(lambda w, x: x.abs().mean(1)), keeping()), "ranks-rows-of-x"),
        ((salient_by(lambda w, x: x.abs().mean(0), more=1), keeping()), "takes-another-number"),
        ((salient, keeping(lambda w, r, c: r)), "keeps-nothing"),
        ((salient, keeping(keeps_rows)), "keeps-rows"),
        ((salient, keeping(lambda w, r, c: r.index_fill(1, c, 0))), "drops-the-channels"),
        ((salient, keeping(lambda w, r, c: w.index_copy(1, c, r[:, c]))), "keeps-all-the-others"),
        ((salient, keeping(error=lambda k, w, x: (k - w).norm() / w.norm())),
         "measures-the-weights"),
        ((salient, keeping(error=lambda k, w, x: (
            (x @ (k - w).T).square().sum() / (x @ w.T).square().sum()))), "squares"),
        ((salient, keeping(error=lambda k, w, x: (x @ (k - w).T).norm())), "forgets-to-divide"),
        ((salient, keeping(error=lambda k, w, x: (x @ (k - w).T).norm() / (x @ k.T).norm())),
         "divides-by-the-wrong-output"),
        (salient, "returns-other-things"),
    ],
    "quantization.w4a16_linear": [
        (multiplying("unscaled"), "forgets-the-scales"),
        (multiplying("first"), "takes-the-first-group's-scale"),
        (multiplying("end"), "scales-once-at-the-end"),
        (multiplying("sign"), "forgets-the-sign"),
        (multiplying("halves"), "swaps-the-halves"),
        (multiplying("divide"), "divides-by-the-scale"),
        (multiplying("last"), "keeps-only-the-last-group"),
        (multiplying("group"), "drops-the-last-group"),
        (multiplying("rows"), "drops-the-last-rows"),
        (multiplying("nothing"), "stores-nothing"),
        (multiplying("matrix"), "writes-the-matrix-back"),
        (multiplying("no load"), "goes-around-load"),
        (multiplying("all bytes"), "holds-more-than-a-group"),
        (multiplying("codes again"), "reads-the-codes-for-every-row-of-x"),
        (multiplying("scales again"), "reads-a-scale-for-every-weight"),
        (multiplying("all scales"), "reads-all-scales-again"),
        (multiplying("x again"), "reads-x-for-every-row"),
        (multiplying("all x"), "reads-all-of-x-again"),
        (multiplying("no store"), "goes-around-store"),
        (multiplying("unfinished"), "writes-unfinished-sums"),
    ],
    "quantization.w4a16_kernel": [
        (Forward("sign"), "forgets-the-sign"),
        (Forward("subtract"), "subtracts-8"),
        (Forward("swap"), "swaps-the-halves"),
        (Forward("high"), "forgets-the-high-half"),
        (Forward("unscaled"), "forgets-the-scales"),
        (Forward("first"), "takes-the-first-group's-scale"),
        (Forward("rows"), "scales-the-rows-of-x"),
        (Forward("halves"), "splits-the-group-in-halves"),
        (Forward("group"), "drops-the-last-group"),
        (Forward("last"), "keeps-only-the-last-group"),
        (Forward("borders"), "reads-past-the-borders"),
        (Forward("past"), "writes-past-the-end"),
        (Forward("store"), "writes-nothing-or-reads-astray"),
        (raises_in_the_kernel, "raises"),
        (lambda *args: None, "not-a-kernel"),
    ],
}  # fmt: skip

RIGHT = {
    "quantization.same_function": [dresses_with_a_diagonal_matrix, dresses_channel_by_channel],
    "quantization.quantize_groups": [grouping(), groups_in_one_view],
    "quantization.fake_quantize": [faking(), clamps_first, StraightThrough.apply],
    "quantization.pack_int4": [
        (packing(), unpacking()),
        (packs_by_arithmetic, unpacks_by_shifts),
    ],
    "quantization.quantized_size": [sizing(), counts_row_by_row],
    "quantization.compensate": [compensating(), compensates_by_least_squares],
    "quantization.round_columns": [
        rounding(),
        rounds_with_the_cholesky_factor,
        rounds_with_fresh_inverses,
    ],
    "quantization.inverse_factor": [factoring(), factors_backwards],
    "quantization.gptq": [blocking(), collects_what_is_owed],
    "quantization.keep_channels": [
        (salient, keeping()),
        (sorts_all_channels, sums_the_error_channel_by_channel),
    ],
    "quantization.w4a16_linear": [multiplying(), multiplies_byte_by_byte],
    "quantization.w4a16_kernel": [Forward(""), column_by_column],
}
