"""Block formats, rotations and rounded activations, each against somebody else's arithmetic."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantization_model import linears, rng, small_model, some_tokens
from torch import nn

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.memory import Load, Store
from llmopt_lab.core.trace import recording
from llmopt_lab.quantization import dequantize, quantize
from llmopt_lab.quantization.activations import (
    OBSERVERS,
    Ema,
    MinMax,
    Mse,
    Percentile,
    RoundedInput,
    round_inputs,
    scale_of,
)
from llmopt_lab.quantization.block_formats import (
    BLOCK,
    FORMATS,
    bits_per_weight_of_blocks,
    block_scales,
    dequantize_blocks,
    nearest,
    normal_float_4,
    pack_blocks,
    quantize_blocks,
    table_of,
    unpack_blocks,
)
from llmopt_lab.quantization.cases import layer
from llmopt_lab.quantization.linear import BlockLinear
from llmopt_lab.quantization.model import quantize_model
from llmopt_lab.quantization.qat import FakeQuantize, fake_quantized, train_quantized
from llmopt_lab.quantization.reference import quantize_rows
from llmopt_lab.quantization.rotation import RotatedInput, hadamard, random_hadamard, rotated

# Dettmers et al. 2023, QLoRA, appendix E
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


# MXFP4, NVFP4, NF4


def test_the_tables_are_the_papers():
    assert_close(normal_float_4().float(), torch.tensor(NF4, dtype=torch.float64))
    # e2m1 from its bits: (-1)^s 2^(e-1) (1 + m/2), and m/2 where e = 0
    for code in range(16):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        size = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
        assert float(table_of("mxfp4")[code]) == (-size if sign else size)


def test_e2m1_rounds_as_compressed_tensors_does_ties_and_overflow_included():
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA

    x = torch.cat((torch.arange(-8, 8, 1 / 64), torch.randn(500, generator=rng())))
    codes = nearest(x, table_of("nvfp4").float())
    values = table_of("nvfp4").float()[codes.long()]
    assert torch.equal(values, FP4_E2M1_DATA.cast_to_fp4(x.clamp(-6, 6)) + 0.0)
    rows = codes.view(3, -1)
    theirs = unpack_fp4_from_uint8(pack_blocks(rows), 3, rows.shape[1], torch.float32)
    assert torch.equal(theirs, values.view(3, -1))
    assert torch.equal(unpack_blocks(pack_blocks(rows[:, :-1]), rows.shape[1] - 1), rows[:, :-1])


def by_enumeration(weight, q):
    """For each weight the smallest distance to any of the 16 values of its block, float64."""
    block = torch.arange(weight.shape[1]) // BLOCK[q.kind]
    values = block_scales(q).double()[:, block, None] * table_of(q.kind)
    return (weight.double()[..., None] - values).abs().amin(-1)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(FORMATS), st.integers(1, 5), st.integers(1, 150), st.integers(-40, 40),
    st.booleans(),
)  # fmt: skip
def test_every_weight_gets_the_nearest_of_its_16_values(kind, rows, cols, exponent, double):
    weight, _ = layer(rows, cols, 1, correlated=False, dtype=torch.float32)
    weight = weight * 2.0**exponent
    q = quantize_blocks(weight, kind, double=double)
    off = (dequantize_blocks(q).double() - weight.double()).abs()
    slack = 1e-6 * weight.abs().max()
    assert (off <= by_enumeration(weight, q) + slack).all()


def test_mxfp4_s_scales_are_the_ocp_powers_of_two_and_what_is_beyond_is_clipped():
    weight = torch.zeros(1, 96)
    weight[0, :3] = torch.tensor([7.9, -1.0, 0.3])  # floor(log2 7.9) - 2 = 0
    weight[0, 32:34] = torch.tensor([8.0, -0.1])  # 3 - 2 = 1
    q = quantize_blocks(weight, "mxfp4")
    assert q.scales.dtype == torch.float8_e8m0fnu
    assert q.scales.float().tolist() == [[1.0, 2.0, 2.0**-127]]
    assert dequantize_blocks(q)[0, [0, 1, 2, 32, 33, 64]].tolist() == [
        6.0,
        -1.0,
        0.5,
        8.0,
        0.0,
        0.0,
    ]
    assert q.scales.view(torch.uint8).tolist() == [[127, 128, 0]]


def test_nvfp4_stands_for_what_compressed_tensors_unpacks_from_it():
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import generate_gparam

    weight, _ = layer(6, 64, 1, correlated=False, dtype=torch.float32)
    weight[2, 5] = 40.0
    q = quantize_blocks(weight, "nvfp4")
    assert q.scales.dtype == torch.float8_e4m3fn and float(q.scales.float().max()) == 448
    theirs = generate_gparam(weight.min(), weight.max())
    assert_close(1 / q.second.view(1), theirs)
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    stored = {
        "weight_packed": pack_blocks(q.codes),
        "weight_scale": q.scales,
        "weight_global_scale": theirs,
    }
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    back = NVFP4PackedCompressor.decompress(stored, scheme)["weight"]
    # compressed-tensors unpacks in bfloat16
    assert_close(back.bfloat16(), dequantize_blocks(q))


def test_nf4_s_double_quantization_costs_little_and_saves_three_eighths_of_a_bit():
    weight, _ = layer(64, 1024, 1, correlated=False, dtype=torch.float32)
    plain, double = (quantize_blocks(weight, "nf4", double=d) for d in (False, True))
    assert bits_per_weight_of_blocks(plain) == 4 + 32 / 64
    n = weight.numel()
    assert bits_per_weight_of_blocks(double) == 4 + 8 / 64 + 32 / (64 * 256) + 32 / n
    errors = [(dequantize_blocks(q) - weight).norm() for q in (plain, double)]
    assert errors[0] < errors[1] < 1.01 * errors[0]
    # e4m3 is off by 1/16 at most of what the mean left
    left = block_scales(plain) - double.mean
    assert ((block_scales(double) - block_scales(plain)).abs() <= left.abs().max() / 16).all()
    exact = torch.tensor(NF4).repeat(3, 4) * torch.tensor([[0.5], [2.0], [8.0]])
    assert_close(dequantize_blocks(quantize_blocks(exact, "nf4", double=False)), exact)


def test_on_normal_weights_the_formats_rank_as_their_scales_do():
    """Finer blocks and finer scales win: measured relative errors, three decimals."""
    weight, _ = layer(64, 1024, 1, correlated=False, dtype=torch.float32)
    error = {k: (dequantize_blocks(quantize_blocks(weight, k)) - weight).norm() for k in FORMATS}
    error["int4"] = (dequantize(quantize(weight, bits=4, group_size=32)) - weight).norm()
    assert error["nf4"] < error["nvfp4"] < error["int4"] < error["mxfp4"]


@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_of_zeros_come_back_as_zeros_and_small_ones_are_not_lost(kind):
    weight = torch.zeros(2, 130)
    assert torch.equal(dequantize_blocks(quantize_blocks(weight, kind)), weight)
    weight[0, :3] = torch.tensor([1e-3, -1e-3, 1.0])
    weight[1, 128] = 3e-3
    back = dequantize_blocks(quantize_blocks(weight, kind))
    assert back[0, 2] > 0.7 and (kind == "nf4" or back[1, 128] > 2e-3)
    assert (back[0, 64:] == 0).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_read_the_weight_twice_and_write_a_code_a_weight(kind):
    weight, _ = layer(3, 70, 1, correlated=False, dtype=torch.float32)
    with recording(Load, Store) as trace:
        quantize_blocks(weight, kind)
    assert trace.total("nbytes", Load) == 2 * weight.nbytes
    assert trace.total("nbytes", Store) == weight.numel()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_model_in_a_block_format_is_the_model_of_its_dequantized_weights(kind):
    model, tokens = small_model(torch.float32, qkv_bias=True, out_bias=True), some_tokens()
    ours = quantize_model(model, method=kind, bits=4, progress=False)
    by_hand = copy.deepcopy(model)
    for module in linears(by_hand).values():
        module.weight.data = dequantize_blocks(quantize_blocks(module.weight, kind))
    assert_close(ours(tokens), by_hand(tokens))
    assert all(isinstance(m, BlockLinear) for m in linears(ours).values())
    one = ours.layers[0].mlp.down_proj
    q = quantize_blocks(model.layers[0].mlp.down_proj.weight, kind)
    scales = sum(t.nbytes for t in (q.scales, q.second, q.mean) if t is not None)
    assert one.nbytes == one.out_features * -(-one.in_features // 2) + scales + (
        0 if one.bias is None else one.bias.nbytes
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda w: quantize_blocks(w, "fp3"),
        lambda w: quantize_blocks(w[0], "nf4"),
        lambda w: quantize_blocks(w / 0, "nf4"),
        lambda w: quantize_blocks(w.long(), "mxfp4"),
        lambda w: quantize_model(small_model(), method="nvfp4", bits=3),
        lambda w: quantize_model(small_model(), method="nvfp4", bits=4, group_size=16),
    ],
)
def test_formats_refuse_bad_input(call):
    with pytest.raises(BadInput):
        call(torch.ones(2, 40))


# Rotations


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 44, 64, 384, 576, 704])
def test_hadamard_s_rows_are_orthogonal_and_of_plus_and_minus_one(n):
    matrix = hadamard(n)
    assert torch.equal(matrix.abs(), torch.ones(n, n, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))
    q = random_hadamard(n, rng(n))
    assert_close(q @ q.T, torch.eye(n, dtype=torch.float64))


def test_orders_without_a_hadamard_matrix_are_refused():
    for n in (0, 3, 6, 22, 52):
        with pytest.raises(BadInput):
            hadamard(n)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_model_is_the_same_function_and_its_norms_have_no_scale(heads, online, tied):
    changes = {"qkv_bias": True, "out_bias": True, "tie_embeddings": tied, "qk_norm": True}
    model, tokens = small_model(**changes, d_ff=44), some_tokens()
    before = copy.deepcopy(model.state_dict())
    turned = rotated(model, rng=rng(), heads=heads, online=online)
    assert_close(turned(tokens), model(tokens))
    for name, module in turned.named_modules():
        if name.endswith("norm") and "_norm" not in name:
            assert torch.equal(module.weight, torch.ones_like(module.weight))
    assert (turned.embed_tokens.weight - model.embed_tokens.weight).abs().max() > 0.01
    assert (turned.layers[0].mlp.up_proj.weight - model.layers[0].mlp.up_proj.weight).norm() > 0.1
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert isinstance(turned.layers[1].mlp.down_proj, RotatedInput) == online


def loudest(model, tokens):
    """Largest |x| over the root mean square, of what the first block's q_proj reads."""
    seen = []
    hook = model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    model(tokens)
    hook.remove()
    return float(seen[0].abs().max() / seen[0].square().mean().sqrt())


def test_a_rotation_quietens_a_loud_channel_and_four_bit_activations_live():
    model, tokens = small_model(d_ff=44), some_tokens()  # channel 3 of the first input is loud
    turned = rotated(model, rng=rng())
    assert loudest(turned, tokens) < 0.6 * loudest(model, tokens)
    want = model(tokens)
    errors = [(round_inputs(m, bits=4)(tokens) - want).norm() for m in (model, turned)]
    assert errors[1] < 0.8 * errors[0]


def test_a_model_with_an_online_rotation_is_quantized_inside_it():
    model, tokens = small_model(d_ff=44), some_tokens()
    turned = rotated(model, rng=rng(), online=True)
    for how in (
        {"method": "rtn"},
        {"method": "gptq", "calibration": tokens},
        {"method": "awq", "calibration": tokens, "clip": False},
    ):
        ours = quantize_model(turned, bits=8, progress=False, **how)
        assert (ours(tokens) - model(tokens)).norm() < 0.02 * model(tokens).norm()
        down = ours.layers[0].mlp.down_proj
        assert isinstance(down, RotatedInput) and down.inner.bits == 8


def test_experts_and_quantized_models_are_not_rotated():
    for model in (
        small_model(n_experts=4, top_k=2, d_ff=44),
        quantize_model(small_model(d_ff=44), progress=False),
    ):
        with pytest.raises(BadInput, match="no experts, and not quantized"):
            rotated(model, rng=rng())
    with pytest.raises(BadInput, match="no Hadamard matrix of order 22"):
        rotated(small_model(d_ff=22), rng=rng(), online=True)


# Activations


def batches(n=6):
    return [torch.randn(5, 40, generator=rng(i)) * (i + 1) + 1 for i in range(n)]


def test_min_max_keeps_the_extremes_and_ema_forgets_them():
    seen, every = MinMax(), torch.cat(batches())
    for x in batches():
        seen.observe(x)
    assert seen.range(8, False) == (float(every.min()), float(every.max()))
    moving, low, high = Ema(0.75), None, None
    for x in batches():
        moving.observe(x)
        least, most = float(x.min()), float(x.max())
        low = least if low is None else low + (least - low) / 4
        high = most if high is None else high + (most - high) / 4
    assert moving.range(8, False) == pytest.approx((low, high))


def test_the_histogram_loses_no_count_when_it_grows_and_percentiles_are_numpy_s():
    seen = Percentile(0.98)
    for x in batches():
        seen.observe(x)
    values = torch.cat([x.flatten() for x in batches()])
    assert seen.counts.sum() == values.numel() and seen.reach >= values.abs().max()
    low, high = seen.range(8, False)
    bin_width = 2 * seen.reach / len(seen.counts)
    inside = ((values >= low) & (values <= high)).double().mean()
    assert 0.98 <= inside <= 0.99
    for got, at in ((low, 0.01), (high, 0.99)):
        near = torch.quantile(values, torch.tensor([at - 0.005, at + 0.005]))
        assert near[0] - bin_width <= got <= near[1] + bin_width
    assert Percentile(1.0).counts.sum() == 0
    whole = Percentile(1.0)
    for x in batches():
        whole.observe(x)
    ends = whole.range(8, False)
    assert ends[0] <= values.min() < ends[0] + bin_width
    assert ends[1] - bin_width <= values.max() <= ends[1]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_mse_observer_beats_min_max_and_a_fine_search_hardly_beats_it(bits, symmetric):
    x = torch.randn(4000, generator=rng(2)) ** 3  # long tails
    observers = MinMax(), Mse()
    errors = []
    for observer in observers:
        observer.observe(x)
        span = observer.range(bits, symmetric)
        errors.append(rounding_error(x, span, bits, symmetric))
    low, high = float(x.min()), float(x.max())
    tried = [rounding_error(x, (low * i / 500, high * i / 500), bits, symmetric)
             for i in range(5, 501)]  # fmt: skip
    assert min(tried) <= errors[1] * 1.0001 and errors[1] < 1.03 * min(tried)
    assert errors[1] < errors[0]


def rounding_error(x, span, bits, symmetric):
    scale, zero = scale_of(span, bits, symmetric)
    top = 2 ** (bits - 1)
    codes = ((x / scale).round() + zero).clamp(-top, top - 1)
    return float(((codes - zero) * scale - x).square().sum())


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_static_inputs_are_rounded_with_the_observed_range_and_fake_quantize_of_torch(
    name, symmetric
):
    inner = nn.Linear(40, 3, bias=False)
    layer_ = RoundedInput(inner, bits=8, observer=OBSERVERS[name](), symmetric=symmetric)
    for x in batches():
        layer_(x)
    layer_.eval()
    scale, zero = layer_.scale()
    x = 3 * torch.randn(7, 40, generator=rng(9))  # some of it beyond the range
    x.requires_grad_()
    made = layer_.rounded(x)
    theirs = torch.fake_quantize_per_tensor_affine(x, scale, zero, -128, 127)
    assert_close(made, theirs)
    made.sum().backward()
    ours, x.grad = x.grad, None
    theirs.sum().backward()
    assert (ours != x.grad).double().mean() < 0.01  # at the very border both are right
    before = layer_.scale()
    layer_(100 * x)
    assert layer_.scale() == before


def test_inputs_by_token_are_what_quantize_rows_gives():
    layer_ = RoundedInput(nn.Identity(), bits=8)
    x = torch.randn(2, 5, 40, generator=rng(), dtype=torch.float64)
    codes, scales = quantize_rows(x.float())
    assert_close(layer_(x.float()), codes * scales)


def test_observers_watch_the_float_model_and_every_layer_gets_its_own_range():
    model, tokens = small_model(torch.float32), some_tokens()
    ours = round_inputs(model, observer=MinMax, calibration=tokens, batch=3)
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
        for name, module in linears(model).items()
    ]
    want = model(tokens)
    for hook in hooks:
        hook.remove()
    for name, x in seen.items():
        observer = ours.layers.get_submodule(name).observer
        assert observer.range(8, False) == pytest.approx((float(x.min()), float(x.max())))
    assert 0 < (ours(tokens) - want).norm() < 0.1 * want.norm()
    by_token = round_inputs(model, bits=8)
    assert (by_token(tokens) - want).norm() < (ours(tokens) - want).norm()


def test_training_with_rounded_weights_and_activations_moves_both():
    start = small_model(torch.float32)
    tokens = some_tokens(16)
    fake = fake_quantized(start, FakeQuantize(4))
    trained = round_inputs(fake, bits=4, observer=Ema, calibration=tokens, batch=4)
    trained.requires_grad_().train()
    before = trained.layers[0].mlp.up_proj.scale()

    def loss_of(model, rng):
        logits = model(tokens[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits, tokens[:, 1:].flatten())

    losses = train_quantized(trained, loss_of, steps=30, lr=3e-3, rng=rng(), progress=False)
    assert losses[-1] < losses[0] - 0.3
    assert trained.layers[0].mlp.up_proj.scale() != before
    frozen = trained.eval().layers[0].mlp.up_proj.scale()
    trained(tokens)
    assert trained.layers[0].mlp.up_proj.scale() == frozen


def test_what_cannot_be_observed_is_refused():
    model = small_model()
    with pytest.raises(BadInput, match="static scales need both"):
        round_inputs(model, observer=MinMax)
    with pytest.raises(BadInput, match="static scales need both"):
        round_inputs(model, calibration=some_tokens())
    with pytest.raises(BadInput, match="no batch was observed"):
        RoundedInput(nn.Linear(2, 2), observer=MinMax()).eval()(torch.ones(1, 2))
    with pytest.raises(BadInput, match="NaN"):
        MinMax().observe(torch.tensor([torch.nan]))
    for wrong in (
        lambda: Ema(1.0),
        lambda: Percentile(0.0),
        lambda: RoundedInput(nn.Linear(2, 2), bits=1),
    ):
        with pytest.raises(BadInput):
            wrong()
