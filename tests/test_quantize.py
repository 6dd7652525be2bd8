"""The functions of `quantize`: the weights they take; levels and scales of binary, ternary, uniform, power_of_two."""

import time

import numpy as np
import pytest
from quantizers import EVERY_FUNCTION, QUANTIZERS, levels, normal

from pycodesign import quantize

F32 = np.float32


# input of the functions


@pytest.mark.parametrize("function", EVERY_FUNCTION.values(), ids=EVERY_FUNCTION)
@pytest.mark.parametrize(
    ("w", "error", "message"),
    [
        ([[1.0]], TypeError, "w: expected a NumPy array or a torch tensor, got list"),
        (np.ones((2, 3), int), TypeError, "w: expected float (O, I) or (O, I / groups, kH, kW), got int64 (2, 3)"),
        (
            np.ones((2, 3), complex),
            TypeError,
            "w: expected float (O, I) or (O, I / groups, kH, kW), got complex128 (2, 3)",
        ),
        (normal(3), ValueError, "w: expected float (O, I) or (O, I / groups, kH, kW), got float32 (3,)"),
        (normal(3, 2, 2), ValueError, "w: expected float (O, I) or (O, I / groups, kH, kW), got float32 (3, 2, 2)"),
        (normal(0, 2), ValueError, "w: expected at least one weight, got shape (0, 2)"),
        (normal(2, 0, 3, 3), ValueError, "w: expected at least one weight, got shape (2, 0, 3, 3)"),
        (levels(1, 2, np.nan)[None], ValueError, "w: expected finite float32 values, got nan at (0, 2)"),
        (levels(1, -np.inf, 1)[None], ValueError, "w: expected finite float32 values, got -inf at (0, 1)"),
    ],
)
def test_bad_weights_name_the_argument(function, w, error, message):
    with pytest.raises(error) as raised:
        function(w)
    assert str(raised.value) == message


def test_float64_beyond_float32_is_an_error():
    with pytest.raises(ValueError, match=r"^w: expected finite float32 values, got 1e\+300 at \(0, 0\)$"):
        quantize.binary(np.array([[1e300]]))
    with pytest.raises(
        TypeError, match=r"^w: expected float32 or float16, which dequantize\(\) can equal, got float64$"
    ):
        quantize.from_fake_quantized(np.ones((2, 2)))


@pytest.mark.parametrize(
    ("function", "bits", "error", "message"),
    [
        (quantize.uniform, 1, ValueError, "bits: expected 2 to 8, got 1"),
        (quantize.uniform, 9, ValueError, "bits: expected 2 to 8, got 9"),
        (quantize.uniform, 4.0, TypeError, "bits: expected int, got float"),
        (quantize.power_of_two, 1, ValueError, "bits: expected 2 to 5, got 1"),
        (quantize.power_of_two, 6, ValueError, "bits: expected 2 to 5, got 6"),
        (quantize.power_of_two, "4", TypeError, "bits: expected int, got str"),
    ],
)
def test_bad_bits_name_the_argument(function, bits, error, message):
    with pytest.raises(error) as raised:
        function(normal(2, 2), bits)
    assert str(raised.value) == message


@pytest.mark.parametrize("function", EVERY_FUNCTION.values(), ids=EVERY_FUNCTION)
def test_torch_tensors_and_strided_arrays_give_the_same(function):
    import torch

    w = normal(6, 5, 3, 3)
    expected = function(w)
    wide = np.zeros((6, 10, 3, 3), F32)
    wide[:, ::2] = w
    for other in (torch.from_numpy(w).requires_grad_(), wide[:, ::2], np.asfortranarray(w)):
        q = function(other)
        assert np.array_equal(q.codes, expected.codes)
        assert np.array_equal(q.levels, expected.levels)
        assert np.array_equal(q.scale, expected.scale)
    half = torch.from_numpy(w).bfloat16()
    assert np.array_equal(function(half).dequantize(), function(half.float()).dequantize())
    negated = torch.complex(torch.zeros(()), torch.from_numpy(-w)).conj().imag
    assert negated.is_neg() and np.array_equal(function(negated).dequantize(), expected.dequantize())


def test_tensors_that_numpy_cannot_hold_name_the_argument():
    import torch

    w = torch.ones(2, 2)
    for other in (w.to_sparse(), w.to(torch.float8_e4m3fn), w.to("meta")):
        with pytest.raises(TypeError, match=rf"^w: expected a tensor that NumPy can hold, got {other.dtype}: "):
            quantize.ternary(other)


@pytest.mark.parametrize("name", EVERY_FUNCTION)
def test_a_large_layer_takes_less_than_ten_seconds(name):
    w = normal(512, 512, 3, 3)
    if name == "from_fake_quantized":
        w = quantize.uniform(w, 8).dequantize()
    start = time.perf_counter()
    EVERY_FUNCTION[name](w)
    assert time.perf_counter() - start < 10  # 0.01 to 0.4 s on an idle core


# binary and ternary


def test_binary_is_sign_times_mean_magnitude():
    w = normal(8, 4, 3, 3)
    q = quantize.binary(w)
    assert np.array_equal(q.levels, [-1, 1])
    assert np.array_equal(q.codes, np.where(w >= 0, 1, 0))
    assert np.array_equal(q.scale, np.abs(w.astype(float)).mean(axis=(1, 2, 3)).astype(F32))
    assert np.array_equal(quantize.binary(levels(0, -0.0, 2)[None]).codes, [[1, 1, 1]])


def test_ternary_uses_the_twn_threshold_and_scale():
    w = normal(8, 50)
    q = quantize.ternary(w)
    assert np.array_equal(q.levels, [-1, 0, 1])
    for o, row in enumerate(w.astype(float)):
        kept = np.abs(row) > 0.7 * np.abs(row).mean()
        assert np.array_equal(q.codes[o] - 1.0, np.sign(row) * kept)
        assert q.scale[o] == pytest.approx(np.abs(row[kept]).mean(), rel=1e-6)


@pytest.mark.parametrize("function", QUANTIZERS.values(), ids=QUANTIZERS)
def test_degenerate_filters(function):
    tiny = F32(2.0**-149)
    w = np.stack(
        [np.zeros(4, F32), levels(2, 2, 2, 2), levels(0, 0, 0, -3), levels(1e30, -1e30, 1e30, 1e30), np.full(4, tiny)]
    )
    q = function(w)
    got = q.dequantize()
    assert q.scale[0] == 0
    assert np.array_equal(got[0], w[0])
    assert np.allclose(got[1], w[1], rtol=1e-5)
    assert np.allclose(got[3], w[3], rtol=1e-5)
    assert np.isfinite(got).all()
    if function is not quantize.binary:
        assert np.allclose(got[2], w[2], rtol=0.2)
    assert function(w[:1]).scale == 0
    assert np.all(q.decode()[0] == (1 if function is quantize.binary else 0))
    assert np.array_equal(function(normal(1, 1)).shape, (1, 1))


# uniform and power_of_two


@pytest.mark.parametrize("bits", range(2, 9))
def test_uniform_levels_and_error(bits):
    w = normal(16, 300)
    q = quantize.uniform(w, bits)
    assert np.array_equal(q.levels, np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    in_range = np.abs(w).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    naive = in_range * np.rint(w / in_range)
    assert ((q.dequantize() - w) ** 2).sum() <= 1.0001 * ((naive - w) ** 2).sum()


def test_uniform_error_is_near_the_best_of_all_steps():
    w = normal(1, 5000)
    for bits, slack in ((2, 1.02), (4, 1.05), (6, 1.1)):
        half = 2 ** (bits - 1)
        steps = np.abs(w).max() * np.linspace(0.02, 1.2, 2000) / (half - 0.5)
        best = min(((step * np.clip(np.rint(w / step), -half, half - 1) - w) ** 2).sum() for step in steps)
        assert ((quantize.uniform(w, bits).dequantize() - w) ** 2).sum() <= slack * best


@pytest.mark.parametrize("bits", range(2, 6))
def test_power_of_two_rounds_to_the_nearest_level(bits):
    w = normal(6, 400)
    q = quantize.power_of_two(w, bits)
    positive = 2.0 ** np.arange(2 ** (bits - 1) - 1)
    assert np.array_equal(q.levels, [*-positive[::-1], 0, *positive])
    distance = np.abs(w[..., None] / q.scale[:, None, None] - q.levels)
    chosen = np.take_along_axis(distance, q.codes[..., None].astype(int), axis=-1)[..., 0]
    assert np.all(chosen <= distance.min(axis=-1) * (1 + 1e-5) + 1e-5)
    assert np.any(q.codes == 0) or np.any(q.codes == q.Q - 1)


def test_power_of_two_matches_weights_that_are_powers_of_two():
    w = np.outer(levels(0.3, -7, 1e-20), levels(1, -1, 0, 2, -4, 8, 16, -32, 64)).astype(F32)
    assert np.allclose(quantize.power_of_two(w, 4).dequantize(), w, rtol=1e-6, atol=0)
