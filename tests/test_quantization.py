"""Quantization: codes, scales, packing, and GPTQ against a brute-force optimal brain quantizer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt_lab.core.close import assert_close
from llmopt_lab.core.errors import BadInput
from llmopt_lab.core.memory import Load, Store
from llmopt_lab.core.trace import recording
from llmopt_lab.quantization import Quantized, dequantize, gptq, hessian_of, pack_int4, quantize
from llmopt_lab.quantization.cases import layer
from llmopt_lab.quantization.gptq import output_error
from llmopt_lab.quantization.input_scales import awq_scales, smooth_scales
from llmopt_lab.quantization.reference import (
    bits_per_weight,
    fake_quantize,
    quantize_fp8,
    quantize_kv,
    unpack_int4,
)


def brute_force(weight, hessian, q: Quantized, order, damping):
    """Optimal brain quantizer: one weight at a time, an explicit inverse of what is left of H."""
    n = weight.shape[1]
    h = hessian + damping * hessian.diagonal().mean() * torch.eye(n, dtype=hessian.dtype)
    low, high = -(2 ** (q.bits - 1)), 2 ** (q.bits - 1) - 1
    out = weight.clone()
    for r, row in enumerate(out):
        left = list(order)
        while left:
            inverse = torch.linalg.inv(h[left][:, left])
            j, group = left[0], left[0] // q.group_size
            scale, zero = q.scales[r, group], 0 if q.zeros is None else q.zeros[r, group]
            value = (((row[j] / scale).round() + zero).clamp(low, high) - zero) * scale
            row[left] -= (row[j] - value) / inverse[0, 0] * inverse[:, 0]
            row[j] = value
            left = left[1:]
    return out


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, None), (3, 5), (2, 4)])
def test_gptq_equals_a_brute_force_optimal_brain_quantizer(bits, group_size, act_order, symmetric):
    weight, x = layer(5, 13, 60, correlated=True)
    h = hessian_of(x)
    settings = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    q = gptq(weight, h, **settings, act_order=act_order, tile=4)
    order = h.diagonal().argsort(descending=True) if act_order else torch.arange(13)
    assert_close(dequantize(q), brute_force(weight, h, q, order.tolist(), 0.01))


@pytest.mark.parametrize("act_order", [False, True])
def test_on_unseen_white_inputs_gptq_gains_nothing_and_on_correlated_ones_ten_times(act_order):
    for correlated in (False, True):
        weight, x = layer(32, 64, 20000, correlated=False)
        if correlated:
            x = x[:, :1] + 0.05 * x
        seen, unseen = x[:10000], x[10000:]
        ways = quantize(weight, bits=4), gptq(weight, hessian_of(seen), bits=4, act_order=act_order)
        rtn, ours = ((unseen @ (dequantize(q) - weight).T).norm() ** 2 for q in ways)
        assert rtn / ours > 10 if correlated else 0.9 < rtn / ours < 1.1


def test_gptqs_weights_are_worse_and_its_output_is_better():
    weight, x = layer(16, 40, 400, correlated=True)
    h = hessian_of(x)
    rtn, ours = (dequantize(q) for q in (quantize(weight, bits=4), gptq(weight, h, bits=4)))
    assert (ours - weight).norm() > (rtn - weight).norm()
    assert output_error(weight, ours, h) < output_error(weight, rtn, h)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 23), st.integers(2, 8), st.integers(1, 9), st.booleans())
def test_no_weight_is_off_by_more_than_half_a_step(rows, cols, bits, group_size, symmetric):
    weight, _ = layer(rows, cols, 1, correlated=False)
    q = quantize(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    step = q.scales.repeat_interleave(group_size, 1)[:, :cols]
    # rounding the zero point may push the extreme codes half a step out of the range
    allowed = step * (0.5 if symmetric else 1.0) * (1 + 1e-9)
    assert ((dequantize(q) - weight).abs() <= allowed).all()


def test_all_pairs_of_codes_survive_packing_and_so_do_odd_rows():
    codes = torch.cartesian_prod(*[torch.arange(-8, 8, dtype=torch.int8)] * 2)
    assert pack_int4(codes).shape == (256, 1)
    assert torch.equal(unpack_int4(pack_int4(codes), 2), codes)
    odd = torch.tensor([[-8, 7, -1]], dtype=torch.int8)
    assert pack_int4(odd).tolist() == [[0x78, 0x0F]]
    assert torch.equal(unpack_int4(pack_int4(odd), 3), odd)


def test_bits_a_weight_count_scales_and_zero_points_and_a_ragged_last_group():
    weight, _ = layer(3, 256, 1, correlated=False)
    assert bits_per_weight(quantize(weight, bits=4, group_size=128)) == 4.125
    assert bits_per_weight(quantize(weight, bits=4, group_size=128, symmetric=False)) == 4.15625
    assert bits_per_weight(quantize(weight[:, :200], bits=4, group_size=128)) == 4 + 2 * 16 / 200


def test_zeros_stay_zeros_and_an_outlier_ruins_its_own_group_only():
    assert torch.equal(dequantize(quantize(torch.zeros(2, 5))), torch.zeros(2, 5))
    weight, _ = layer(4, 64, 1, correlated=False)
    weight[0, 0] = 1000.0
    per_tensor = dequantize(quantize(weight, bits=4, per_tensor=True))
    assert (per_tensor != 0).sum() == 1
    grouped = dequantize(quantize(weight, bits=4, group_size=16))
    assert_close(grouped[1:], dequantize(quantize(weight[1:], bits=4, group_size=16)))
    assert (grouped[0, 16:] != 0).any() and (grouped[0, 1:16] == 0).all()


def test_every_weight_gets_a_gradient_through_fake_quantization():
    weight, x = layer(4, 6, 9, correlated=False)
    weight.requires_grad_()
    fake = fake_quantize(weight, bits=4)
    fake.backward(torch.ones_like(fake))
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert torch.equal(fake, dequantize(quantize(weight, bits=4)))


def test_awq_is_never_worse_than_rounding_and_wins_with_salient_inputs():
    weight, x = layer(16, 32, 300, correlated=False)
    x[:, 3] *= 50
    h, mean_abs = hessian_of(x), x.abs().mean(0)
    s = awq_scales(weight, mean_abs, h, bits=4)
    rtn = output_error(weight, dequantize(quantize(weight, bits=4)), h)
    assert output_error(weight, dequantize(quantize(weight * s, bits=4)) / s, h) < rtn / 4


def test_smoothing_balances_the_largest_input_and_weight_of_every_channel():
    weight, x = layer(5, 7, 30, correlated=True)
    s = smooth_scales(weight, x.abs().amax(0))
    assert_close((x / s).abs().amax(0), (weight * s).abs().amax(0))
    assert_close((x / s) @ (weight * s).T, x @ weight.T)


def test_fp8_is_off_by_a_sixteenth_at_most_and_a_kv_cache_by_a_step():
    x = torch.linspace(0.01, 3, 50, dtype=torch.float64).view(5, 10)
    codes, scale = quantize_fp8(x, per_row=True)
    assert ((codes.double() * scale - x).abs() <= x / 16 * (1 + 1e-9)).all()
    k, v = torch.randn(2, 2, 3, 9, 4, generator=torch.Generator().manual_seed(0))
    k[..., 1] *= 100
    k8, v8 = quantize_kv(k, v)
    assert ((k8 - k).abs() <= (k.amax(-2) - k.amin(-2)).clamp_min(0)[..., None, :] / 100).all()
    assert (v8 - v).abs().max() < 0.05


def test_gptq_reads_and_writes_what_is_behind_each_tile_once():
    weight, x = layer(3, 10, 40, correlated=True)
    with recording(Load, Store) as trace:
        gptq(weight, hessian_of(x), tile=4)
    behind = (6 + 2) * 3 * 8
    assert trace.total("nbytes", Load) == 10 * 3 * 8 + behind
    assert trace.total("nbytes", Store) == 10 * 3 + behind


@pytest.mark.parametrize(
    "call",
    [
        lambda w, h: quantize(w[0]),
        lambda w, h: quantize(w.int()),
        lambda w, h: quantize(w, bits=9),
        lambda w, h: quantize(w, group_size=0),
        lambda w, h: quantize(w / 0),
        lambda w, h: quantize(w, group_size=2, per_tensor=True),
        lambda w, h: dequantize(Quantized(quantize(w).codes, torch.zeros(3, 1), None, 8, 10)),
        lambda w, h: dequantize(Quantized(quantize(w).codes, torch.ones(3, 2), None, 8, 10)),
        lambda w, h: pack_int4(torch.tensor([8], dtype=torch.int8)),
        lambda w, h: unpack_int4(torch.zeros(2, dtype=torch.uint8), 5),
        lambda w, h: gptq(w, h[:2]),
        lambda w, h: gptq(w, torch.zeros_like(h)),
        lambda w, h: gptq(w, h, damping=-1.0),
        lambda w, h: awq_scales(w, w[0].abs()[:3], h),
        lambda w, h: quantize_fp8(w * torch.nan),
    ],
)
def test_bad_input_is_refused(call):
    weight, x = layer(3, 10, 40, correlated=True)
    with pytest.raises(BadInput):
        call(weight, hessian_of(x))
