"""The reference is checked against torch in float64, and its integer epilogue against scalars rounded one by one."""

import inspect
from fractions import Fraction

import numpy as np
import pytest

from pycodesign import quantize, reference
from pycodesign.quantize import QuantizedTensor
from pycodesign.reference import repetition

F32 = np.float32
EPS = 2.0**-23


def weights(rng, *shape, q=3, own=False, groups=None):
    outputs = shape[0]
    levels = np.stack([np.sort(rng.choice(np.arange(-8, 8), q, replace=False)) for _ in range(outputs if own else 1)])
    scale = rng.normal(size=(outputs, groups) if groups else outputs).astype(F32)
    return QuantizedTensor(
        rng.integers(0, q, shape).astype(np.uint8), (levels if own else levels[0]).astype(F32), scale
    )


CONVOLUTIONS = {
    "plain": ((2, 6, 7, 5), (4, 6, 3, 3), {}),
    "pointwise": ((1, 5, 4, 4), (3, 5, 1, 1), {}),
    "padding": ((2, 3, 6, 6), (4, 3, 3, 3), {"padding": 1}),
    "stride": ((1, 3, 9, 8), (4, 3, 3, 3), {"stride": 2, "padding": 1}),
    "dilation": ((1, 3, 11, 9), (4, 3, 3, 3), {"dilation": 3, "padding": 2}),
    "groups": ((2, 6, 5, 5), (9, 2, 3, 3), {"groups": 3, "padding": 1}),
    "depthwise": ((2, 6, 5, 5), (12, 1, 3, 3), {"groups": 6, "padding": 1, "stride": 2}),
    "pairs": ((1, 4, 13, 17), (2, 2, 3, 5), {"stride": (3, 2), "padding": (0, 4), "dilation": (2, 3), "groups": 2}),
    "large kernel": ((1, 3, 15, 14), (2, 3, 7, 7), {"stride": 2, "padding": 3}),
    "one pixel": ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    "no images": ((0, 3, 5, 5), (2, 3, 3, 3), {}),
}


@pytest.mark.parametrize(("x_shape", "w_shape", "geometry"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("own", [False, True])
def test_conv2d_is_the_convolution(x_shape, w_shape, geometry, own):
    import torch

    rng = np.random.default_rng(0)
    q = weights(rng, *w_shape, own=own)
    x = rng.normal(size=x_shape).astype(F32)
    w = q.decode().astype(float) * q.scale[:, None, None, None]
    expected = torch.nn.functional.conv2d(torch.from_numpy(x).double(), torch.from_numpy(w), **geometry).numpy()
    got = repetition.conv2d(x, q, out_dtype="float64", **geometry)
    assert got.dtype == np.float64 and got.flags.c_contiguous
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    single = repetition.conv2d(x, q, **geometry)
    assert single.dtype == np.float32
    assert np.array_equal(single, got.astype(F32))

    codes = rng.integers(0, 256, x_shape).astype(np.uint8)
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(codes).double() - 131, torch.from_numpy(q.decode()).double(), **geometry
    )
    got = repetition.conv2d(codes, q, input_zero_point=131, out_dtype="int32", **geometry)
    assert got.dtype == np.int32
    assert np.array_equal(got, expected.numpy())


@pytest.mark.parametrize("shape", [(7, 12), (12,), (2, 3, 12), (0, 12)])
@pytest.mark.parametrize("groups", [None, 1, 3, 12])
def test_linear_is_the_product(shape, groups):
    rng = np.random.default_rng(1)
    q = weights(rng, 5, 12, groups=groups)
    x, bias = rng.normal(size=shape).astype(F32), rng.normal(size=5).astype(F32)
    w = q.decode().astype(float) * np.repeat(q.scale.reshape(5, -1), 12 // (groups or 1), axis=1)
    got = repetition.linear(x, q, bias, out_dtype="float64")
    np.testing.assert_allclose(got, x.astype(float) @ w.T + bias, rtol=0, atol=1e-12)
    codes = rng.integers(-128, 128, shape).astype(np.int8)
    got = repetition.linear(codes, q, input_zero_point=-3, out_dtype="int32")
    assert np.array_equal(got, (codes.astype(np.int64) + 3) @ q.decode().astype(np.int64).T)


def rounded(value: Fraction) -> F32:
    """Round once to float32: from the exact value, by way of its nearest neighbors."""
    near = F32(float(value))
    candidates = [np.nextafter(near, F32(-np.inf)), near, np.nextafter(near, F32(np.inf))]
    distance = [abs(Fraction(float(c)) - value) for c in candidates]
    closest = [c for c, d in zip(candidates, distance, strict=True) if d == min(distance)]
    return next(c for c in closest if len(closest) == 1 or c.view(np.uint32) % 2 == 0)


def exact(value: float) -> Fraction:
    return Fraction(float(value))


@pytest.mark.parametrize("out_dtype", ["float32", "uint8", "int8"])
@pytest.mark.parametrize("residual_dtype", [None, "float32", "uint8", "int8"])
@pytest.mark.parametrize("groups", [None, 2])
def test_integer_epilogue_rounds_every_step_once(out_dtype, residual_dtype, groups):
    rng = np.random.default_rng(2)
    q = weights(rng, 6, 8, q=16, groups=groups)
    x = rng.integers(0, 256, (40, 8)).astype(np.uint8)
    bias = rng.normal(size=6).astype(F32)
    options = {"clamp": (-1.25, 2.7), "out_dtype": out_dtype}
    input_scale, zero_point, residual_scale, residual_zero_point = 0.0123, 120, 0.017, 3
    residual = None
    if residual_dtype:
        residual = (rng.normal(size=(40, 6)) * 50).clip(0, 100).astype(residual_dtype)
        options |= {"residual": residual, "residual_scale": residual_scale, "residual_zero_point": residual_zero_point}
    out_scale, out_zero_point = 0.0131, {"uint8": 140, "int8": -9, "float32": 0}[out_dtype]
    if out_dtype != "float32":
        options |= {"out_scale": out_scale, "out_zero_point": out_zero_point}
    got = repetition.linear(x, q, bias, input_scale=input_scale, input_zero_point=zero_point, **options)
    assert got.dtype == out_dtype

    scale = q.scale.reshape(6, -1)
    width = 8 // scale.shape[1]
    for n, o in np.ndindex(40, 6):
        y = F32(0)
        for g in range(scale.shape[1]):
            part = slice(g * width, (g + 1) * width)
            acc = int((x[n, part].astype(int) - zero_point) @ q.decode()[o, part].astype(int))
            m = F32(np.float64(input_scale) * np.float64(scale[o, g]))
            product = rounded(exact(rounded(Fraction(acc))) * exact(m))
            y = product if g == 0 else rounded(exact(y) + exact(product))
        y = rounded(exact(y) + exact(bias[o]))
        if residual is not None:
            shifted = rounded(exact(F32(residual[n, o])) - residual_zero_point)
            y = rounded(exact(y) + exact(rounded(exact(F32(residual_scale)) * exact(shifted))))
        y = min(max(y, F32(-1.25)), F32(2.7))
        if out_dtype == "float32":
            assert got[n, o] == y
        else:
            limits = np.iinfo(out_dtype)
            t = rounded(exact(y) / exact(F32(out_scale)))
            level = round(exact(t)) + out_zero_point  # a Fraction rounds to even
            assert got[n, o] == min(max(level, limits.min), limits.max)


def test_bias_residual_and_clamp_of_a_convolution():
    rng = np.random.default_rng(3)
    q = weights(rng, 4, 3, 3, 3)
    x, bias = rng.normal(size=(2, 3, 6, 5)).astype(F32), rng.normal(size=4).astype(F32)
    residual = rng.normal(size=(2, 4, 4, 3)).astype(F32)
    plain = repetition.conv2d(x, q, out_dtype="float64")
    options = {"residual": residual, "residual_scale": 0.5, "residual_zero_point": 1}
    got = repetition.conv2d(x, q, bias, clamp=(0, None), out_dtype="float64", **options)
    expected = np.maximum(plain + bias[:, None, None] + 0.5 * (residual.astype(float) - 1), 0)
    np.testing.assert_allclose(got, expected, rtol=1e-14)
    capped = repetition.conv2d(x, q, bias, clamp=(None, 0.3), out_dtype="float64", **options)
    assert capped.max() == F32(0.3)
    levels = repetition.conv2d(x, q, bias, out_dtype="uint8", out_scale=0.1, out_zero_point=7, **options)
    unclamped = plain + bias[:, None, None] + 0.5 * (residual.astype(float) - 1)
    assert np.array_equal(levels, np.clip(np.rint(unclamped / F32(0.1).astype(float)) + 7, 0, 255))


def test_scalars_are_float32_for_float_inputs_too():
    q = QuantizedTensor(np.zeros((1, 1), np.uint8), np.ones(1, F32), np.ones(1, F32))
    one = np.ones((1, 1), F32)
    assert repetition.linear(0 * one, q, residual=one, residual_scale=0.1, out_dtype="float64") == F32(0.1)
    half = F32(0.3) * np.arange(1, 200, 2, dtype=F32)[:, None] / F32(2)
    expected = np.rint(half.astype(float) / float(F32(0.3)))
    assert np.array_equal(repetition.linear(half, q, out_dtype="uint8", out_scale=0.3), expected)


@pytest.mark.parametrize("dtype", [np.int8, F32])
def test_ties_go_to_the_even_level(dtype):
    q = QuantizedTensor(np.zeros((1, 1), np.uint8), np.ones(1, F32), np.ones(1, F32))
    x = np.array([[-3], [-1], [1], [3], [5]], dtype)
    got = repetition.linear(x, q, out_dtype="int8", out_scale=2, out_zero_point=1)
    assert got[:, 0].tolist() == [-1, 1, 1, 3, 3]


def test_padding_is_real_zero():
    q = QuantizedTensor(np.ones((1, 1, 3, 3), np.uint8), np.array([-1, 1], F32), np.ones(1, F32))
    x = np.full((1, 1, 3, 3), 77, np.uint8)
    assert not repetition.conv2d(x, q, padding=1, input_zero_point=77, out_dtype="int32").any()


def test_nan_stays_and_saturates_to_the_least_value():
    q = QuantizedTensor(np.zeros((1, 1), np.uint8), np.ones(1, F32), np.ones(1, F32))
    x = np.array([[np.nan], [np.inf], [-np.inf], [3]], F32)
    np.testing.assert_array_equal(repetition.linear(x, q, clamp=(0, 6))[:, 0], [np.nan, 6, 0, 3])
    assert repetition.linear(x, q, out_dtype="uint8", out_scale=1, out_zero_point=9)[:, 0].tolist() == [0, 255, 0, 12]
    assert repetition.linear(x, q, out_dtype="int8", out_scale=1, out_zero_point=9)[:, 0].tolist() == [
        -128,
        127,
        -128,
        12,
    ]


def test_sums_beyond_int32_and_small_images_are_errors():
    q = QuantizedTensor(np.zeros((1, 3), np.uint8), np.array([2**24], F32), np.ones(1, F32))
    with pytest.raises(OverflowError, match=r"^acc: expected sums within int32$"):
        repetition.linear(np.full((1, 3), 127, np.int8), q)
    q = weights(np.random.default_rng(0), 2, 1, 3, 3)
    with pytest.raises(ValueError, match=r"^x: expected height and width that hold the kernel, got \(1, 1, 2, 5\)$"):
        repetition.conv2d(np.zeros((1, 1, 2, 5), F32), q)


def test_abs_bound_holds_for_plain_float32_sums():
    rng = np.random.default_rng(4)
    q, x = weights(rng, 4, 6, 3, 3), rng.normal(size=(2, 12, 9, 9)).astype(F32)
    geometry = {"padding": 1, "stride": 2, "groups": 2}
    bound = repetition.abs_bound(x, q, **geometry)
    magnitudes = quantize.from_fake_quantized(np.abs(q.dequantize()))
    expected = repetition.conv2d(np.abs(x), magnitudes, out_dtype="float64", **geometry)
    np.testing.assert_allclose(bound, expected, rtol=1e-6)

    linear, x = quantize.ternary(rng.normal(size=(5, 400))), rng.normal(size=(7, 400)).astype(F32)
    bound = repetition.abs_bound(x, linear)
    np.testing.assert_allclose(bound, np.abs(x.astype(float)) @ np.abs(linear.dequantize().astype(float)).T)
    error = np.abs(x @ linear.dequantize().T - repetition.linear(x, linear, out_dtype="float64"))
    assert np.all(error <= 8 * EPS * np.sqrt(400) * bound)


def test_the_sum_form_is_the_same():
    rng = np.random.default_rng(5)
    q, x = weights(rng, 5, 40, q=4), rng.normal(size=(3, 40)).astype(F32)
    groups = np.stack([x.astype(float) @ (q.codes == level).T for level in range(4)])  # (Q, N, O)
    form = np.tensordot(q.levels.astype(float), groups, axes=1) * q.scale
    np.testing.assert_allclose(repetition.linear(x, q, out_dtype="float64"), form, atol=1e-12)


def test_the_reference_imports_no_compiled_code():
    source = inspect.getsource(reference) + inspect.getsource(repetition)
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert set(imports) == {
        "from __future__ import annotations",
        "from typing import Any, TypeAlias",
        "import numpy as np",
        "from numpy.typing import NDArray",
        "from pycodesign.quantize import KernelCodebook, QuantizedTensor",
    }
