"""Kernel codebooks: the type, the fit, and what is refused."""

import copy
import doctest
import itertools
import pickle
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pycodesign
from pycodesign import _codebook, _quantized, quantize
from pycodesign.quantize import KernelCodebook, kernel_codebook
from pycodesign.reference import repetition

F32 = np.float32
VALUES = ("sign", "ternary", "real")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(F32)


def make(outputs=4, patterns=6, kernels=(1, 5, 1, 3, 3), values="sign", seed=0) -> KernelCodebook:
    rng = np.random.default_rng(seed)
    index = rng.integers(0, kernels[1], (outputs, patterns)).astype(np.uint8)
    sign = rng.choice(np.array([-1, 1], np.int8), (outputs, patterns))
    made = {
        "sign": rng.choice([-1, 1], kernels),
        "ternary": rng.integers(-1, 2, kernels),
        "real": rng.normal(size=kernels),
    }
    return KernelCodebook(index, sign, made[values].astype(F32), rng.normal(size=outputs).astype(F32))


# KernelCodebook


@pytest.mark.parametrize("kernels", [(1, 5, 1, 3, 3), (3, 5, 1, 2, 7), (2, 5, 4, 1, 1), (3, 5, 8)], ids=str)
def test_dequantize_is_scale_times_sign_times_kernel(kernels):
    q = make(kernels=kernels, values="real")
    channels = kernels[2]
    assert q.shape == (4, 6 * channels, *kernels[3:])
    w = q.dequantize()
    assert w.dtype == np.float32 and w.shape == q.shape
    for o, i in np.ndindex(q.shape[:2]):
        j = i // channels
        kernel = q.kernels[j // (6 // kernels[0]), q.index[o, j], i % channels]
        assert np.array_equal(w[o, i], q.scale[o] * (q.sign[o, j] * kernel))
    assert np.array_equal(q.decode() * q.scale.reshape(-1, *[1] * (w.ndim - 1)), w)


@pytest.mark.parametrize(("values", "levels"), [("sign", [-1, 1]), ("ternary", [-1, 0, 1])])
@pytest.mark.parametrize("kernels", [(2, 5, 1, 3, 3), (3, 5, 8)], ids=str)
def test_integer_kernels_become_levels(kernels, values, levels):
    codebook = make(kernels=kernels, values=values)
    q = codebook.to_quantized()
    assert np.array_equal(q.levels, levels) and codebook.values == values
    assert np.array_equal(q.dequantize(), codebook.dequantize())


def test_larger_integers_become_levels():
    codebook = make(kernels=(1, 2, 1, 1, 3))
    codebook = replace(codebook, kernels=np.array([[[[[3, 0, 1]]], [[[-2, 1, 0]]]]], F32))
    assert codebook.values == "real"
    q = codebook.to_quantized()
    assert np.array_equal(q.levels, [-3, -2, -1, 0, 1, 2, 3])
    assert np.array_equal(q.dequantize(), codebook.dequantize())


def test_the_largest_weights_stay_finite():
    w = np.random.default_rng(0).choice([-1, 1], (24, 40)).astype(np.float32) * np.float32(3.4e38)
    for values in VALUES:
        assert np.isfinite(quantize.kernel_codebook(w, kernels=4, values=values).dequantize()).all()


def test_real_kernels_have_no_levels():
    with pytest.raises(ValueError, match=r"kernels: expected integers, which levels are to be, got \d\.\d+"):
        make(values="real").to_quantized()


def test_size_and_repr():
    q = make(16, 16, (1, 32, 1, 3, 3))
    assert q.bits_per_weight == (8 * 256 + 32 * 9 + 32 * 16) / (256 * 9)
    assert repr(q) == "KernelCodebook((16, 16, 3, 3), U=32, kernels: sign)"
    assert make(16, 16, (1, 32, 1, 3, 3), "ternary").bits_per_weight == (8 * 256 + 2 * 32 * 9 + 32 * 16) / (256 * 9)
    q = make(16, 16, (2, 129, 8), "real")
    assert q.bits_per_weight == (16 * 256 + 32 * 2 * 129 * 8 + 32 * 16) / (256 * 8)
    assert repr(q) == "KernelCodebook((16, 128), U=129, C=2, kernels: real)"


def test_copies_pickles_and_tensors():
    import torch

    q = make()
    tensors = KernelCodebook(*(torch.from_numpy(array) for array in (q.index, q.sign, q.kernels, q.scale)))
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), tensors):
        assert np.array_equal(other.dequantize(), q.dequantize())
    assert pycodesign.KernelCodebook is KernelCodebook
    with pytest.raises(AttributeError):
        q.scale = q.scale  # type: ignore[misc]


INDEX, SIGN, SCALE = np.zeros((4, 6), np.uint8), np.ones((4, 6), np.int8), np.ones(4, F32)


def kernels(*shape: int) -> np.ndarray:
    return np.ones(shape, F32)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"index": [[0]]}, TypeError, "index: expected a NumPy array or a torch tensor, got list"),
        ({"index": INDEX.view(np.int8)}, TypeError, "index: expected uint8 (O, J), got int8 (4, 6)"),
        ({"index": INDEX[0]}, ValueError, "index: expected uint8 (O, J), not empty, got uint8 (6,)"),
        ({"index": INDEX[:, :0]}, ValueError, "index: expected uint8 (O, J), not empty, got uint8 (4, 0)"),
        ({"index": INDEX + np.uint8(2)}, ValueError, "index: expected values from 0 to 1 (U - 1), got 2"),
        ({"sign": SIGN.view(np.uint8)}, TypeError, "sign: expected int8 (4, 6), got uint8 (4, 6)"),
        ({"sign": SIGN[:3]}, ValueError, "sign: expected int8 (4, 6), got int8 (3, 6)"),
        ({"sign": 0 * SIGN}, ValueError, "sign: expected -1 or 1, got 0"),
        ({"sign": -128 * SIGN}, ValueError, "sign: expected -1 or 1, got -128"),
        ({"scale": SCALE[:3]}, ValueError, "scale: expected float32 (4,), got float32 (3,)"),
        ({"scale": np.ones((4, 2), F32)}, ValueError, "scale: expected float32 (4,), got float32 (4, 2)"),
        ({"scale": SCALE * np.inf}, ValueError, "scale: expected finite values, got inf"),
        (
            {"kernels": np.ones((1, 2, 1, 3, 3))},
            TypeError,
            "kernels: expected float32 (C, U, p, kH, kW) or (C, U, p), got float64 (1, 2, 1, 3, 3)",
        ),
        (
            {"kernels": kernels(2, 1, 3, 3)},
            ValueError,
            "kernels: expected float32 (C, U, p, kH, kW) or (C, U, p), not empty, got float32 (2, 1, 3, 3)",
        ),
        (
            {"kernels": kernels(4, 2, 1, 3, 3)},
            ValueError,
            "kernels: expected a number of codebooks C that divides 6 (J), got 4",
        ),
        ({"kernels": kernels(1, 257, 1, 3, 3)}, ValueError, "kernels: expected at most 256 kernels (U), got 257"),
        ({"kernels": kernels(1, 2, 1, 9, 3)}, ValueError, "kernels: expected filters of at most 7x7, got 9x3"),
        (
            {"kernels": kernels(1, 2, 4, 3, 3)},
            ValueError,
            "kernels: expected patterns of 1 channel for 3x3 filters, got 4",
        ),
        (
            {"kernels": kernels(1, 2, 3, 1, 1)},
            ValueError,
            "kernels: expected patterns of 4 to 8 channels for 1x1 filters, got 3",
        ),
        (
            {"kernels": kernels(1, 2, 9)},
            ValueError,
            "kernels: expected patterns of 4 to 8 channels for 1x1 filters, got 9",
        ),
        ({"kernels": kernels(1, 2, 1, 3, 3) * np.nan}, ValueError, "kernels: expected finite values, got nan"),
    ],
)
def test_bad_codebooks(changed, error, message):
    given = {"index": INDEX, "sign": SIGN, "kernels": kernels(1, 2, 1, 3, 3), "scale": SCALE}
    KernelCodebook(**given)
    with pytest.raises(error) as raised:
        KernelCodebook(**given | changed)
    assert str(raised.value) == message


# kernel_codebook


def error_of(w, codebook) -> float:
    return float(((w.astype(float) - codebook.dequantize()) ** 2).sum())


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("codebooks", [1, 3])
@pytest.mark.parametrize("shape", [(16, 24, 3, 3), (16, 24, 1, 5), (32, 48, 1, 1), (32, 48)], ids=str)
def test_weights_of_few_kernels_are_found_again(shape, codebooks, values):
    channels = 1 if len(shape) == 4 and shape[3] > 1 else 8
    sizes = (codebooks, 6, channels, *shape[2:])
    true = make(shape[0], shape[1] // channels, sizes, values)
    w = true.dequantize() * (1 + 0.02 * normal(*shape, seed=1))
    found = kernel_codebook(w, 6, values, codebooks=codebooks)
    assert found.shape == shape and found.kernels.shape == sizes and found.values == values
    noise = error_of(w, true)
    assert error_of(w, found) <= 1.2 * noise


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 4), st.sampled_from([(3, 3), (1, 3), (2, 2), (5, 7), (1, 1), ()])),
    st.integers(2, 7),
    st.sampled_from(VALUES),
    st.integers(1, 3),
    st.integers(0, 2**16),
)
@settings(max_examples=60)
def test_no_round_increases_the_error(size, count, values, codebooks, seed):
    outputs, patterns, filter_size = size
    channels = 1 if max(filter_size, default=1) > 1 else 4
    w = normal(outputs, patterns * codebooks * channels, *filter_size, seed=seed)
    w[0] *= 100
    w[-1, ..., 0] = 0
    distinct = 4 if filter_size == (1, 3) and values == "sign" else 7
    count = min(count, outputs * patterns, distinct)
    if count < 2:
        return
    fits = [
        kernel_codebook(w, count, values, pattern_channels=channels, codebooks=codebooks, rounds=rounds)
        for rounds in (1, 2, 3, 8)
    ]
    errors = [float((w.astype(float) ** 2).sum()), *(error_of(w, fit) for fit in fits)]
    assert all(after <= before * (1 + 1e-5) + 1e-10 * errors[0] for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("values", VALUES)
def test_each_pattern_has_its_nearest_kernel_and_each_output_its_best_scale(values):
    w = normal(12, 10, 3, 3)
    q = kernel_codebook(w, 8, values)
    scaled = q.scale[:, None, None, None] * q.kernels[0, :, 0]
    choices = np.concatenate([scaled, -scaled], axis=1).reshape(12, 1, 16, 3, 3)
    nearest = ((w[:, :, None] - choices) ** 2).sum(axis=(-2, -1)).min(axis=2)
    assert error_of(w, q) <= nearest.sum(dtype=float) * (1.000001 if values == "sign" else 1.002)
    for factor in (0.99, 1.01):
        assert error_of(w, q) <= error_of(w, replace(q, scale=q.scale * F32(factor)))


@pytest.mark.parametrize(("values", "quantizer"), [("sign", quantize.binary), ("ternary", quantize.ternary)])
def test_every_kernel_is_as_good_as_no_codebook(values, quantizer):
    w = normal(64, 64, 1, 3) if values == "ternary" else normal(64, 64, 3, 3)
    kernels = 14 if values == "ternary" else 256  # all there are
    assert error_of(w, kernel_codebook(w, kernels, values)) <= 1.0001 * error_of(w, quantizer(w))


@pytest.mark.parametrize("values", VALUES)
def test_more_kernels_less_error(values):
    w = normal(32, 32, 3, 3)
    errors = [error_of(w, kernel_codebook(w, kernels, values)) for kernels in (2, 4, 8, 16, 32, 64, 128)]
    assert all(after < before for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("values", VALUES)
def test_the_same_weights_give_the_same_codebook(values):
    w = normal(24, 24, 3, 3)
    first, second = (kernel_codebook(w.copy(), 16, values) for _ in range(2))
    for name in ("index", "sign", "kernels", "scale"):
        assert np.array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("exponent", [-110, 120])
def test_the_size_of_weights_does_not_matter(exponent, values):
    w = normal(16, 16, 3, 3)
    q, other = kernel_codebook(w, 8, values), kernel_codebook(np.ldexp(w, exponent), 8, values)
    assert np.array_equal(np.ldexp(q.dequantize(), exponent), other.dequantize())


def test_dead_outputs_and_equal_weights():
    w = normal(8, 8, 3, 3)
    w[3] = 0
    for values in VALUES:
        q = kernel_codebook(w, 4, values)
        assert q.scale[3] == 0 and q.scale[[0, 1, 2, 4, 5, 6, 7]].all()
        assert np.array_equal(
            kernel_codebook(np.full((8, 8, 3, 3), 0.5, F32), 4, values).dequantize()[0, 0, 0], [0.5] * 3
        )
        assert not kernel_codebook(np.zeros((8, 8, 3, 3), F32), 4, values).dequantize().any()


@pytest.mark.parametrize("values", VALUES)
def test_a_kernel_that_none_took_begins_anew_where_it_is_needed(values):
    patterns = np.array([[1, 1, 1], [1, 1, -1], [2, -2, 2], [-2, -2, 2]], F32)
    index, product = np.array([0, 0, 0, 0]), np.array([3, 1, 2, -2], F32)
    kernels = np.array([[1, 1, 1], [1, 1, 1]], F32)
    updated = _codebook._update(patterns, np.ones(4, F32), index, product, kernels, values)
    assert np.array_equal(updated[1], [1, -1, 1] if values != "real" else [2, -2, 2])


def test_a_large_layer_takes_seconds():
    w = normal(512, 512, 3, 3)
    start = time.process_time()
    kernel_codebook(w, 64)
    assert time.process_time() - start < 10


W = normal(8, 12, 3, 3)


@pytest.mark.parametrize(
    ("w", "arguments", "error", "message"),
    [
        (W.astype(int), {}, TypeError, "w: expected float (O, I) or (O, I / groups, kH, kW), got int64 (8, 12, 3, 3)"),
        (W, {"kernels": 97}, ValueError, "kernels: expected at most 96, the patterns of a codebook, got 97"),
        (
            W,
            {"kernels": 25, "codebooks": 4},
            ValueError,
            "kernels: expected at most 24, the patterns of a codebook, got 25",
        ),
        (W, {"kernels": 1}, ValueError, "kernels: expected 2 to 256, got 1"),
        (W, {"kernels": 257}, ValueError, "kernels: expected 2 to 256, got 257"),
        (W, {"kernels": 2.0}, TypeError, "kernels: expected int, got float"),
        (W, {"values": "binary"}, ValueError, "values: expected 'sign', 'ternary' or 'real', got 'binary'"),
        (W, {"codebooks": 5}, ValueError, "codebooks: expected a divisor of 12 patterns an output, got 5"),
        (W, {"codebooks": 0}, ValueError, "codebooks: expected a positive number, got 0"),
        (W, {"rounds": 0}, ValueError, "rounds: expected a positive number, got 0"),
        (
            W,
            {"pattern_channels": 4},
            ValueError,
            "pattern_channels: expected patterns of 1 channel for 3x3 filters, got 4",
        ),
        (normal(8, 12, 9, 9), {}, ValueError, "w: expected filters of at most 7x7, got 9x9"),
        (normal(8, 12), {}, ValueError, "pattern_channels: expected a divisor of 12 input channels, got 8"),
        (
            normal(8, 12, 1, 1),
            {"pattern_channels": 3},
            ValueError,
            "pattern_channels: expected patterns of 4 to 8 channels for 1x1 filters, got 3",
        ),
        (
            normal(8, 12),
            {"pattern_channels": 4, "kernels": 9},
            ValueError,
            "kernels: expected at most 8, as many sign kernels there are, got 9",
        ),
        (
            normal(20, 12, 1, 2),
            {"values": "ternary", "kernels": 6},
            ValueError,
            "kernels: expected at most 5, as many ternary kernels there are, got 6",
        ),
    ],
)
def test_bad_arguments(w, arguments, error, message):
    with pytest.raises(error) as raised:
        kernel_codebook(w, **arguments)
    assert str(raised.value) == message


# The specification, and the docstrings


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_reference_takes_codebooks(values, dtype):
    rng = np.random.default_rng(0)
    x = (100 * rng.random((2, 24, 6, 5))).astype(dtype)
    conv, linear = make(6, 12, (2, 5, 1, 3, 3), values), make(6, 3, (1, 5, 8), values)
    geometry = {"stride": 2, "padding": 1, "groups": 2}
    got = repetition.conv2d(x, conv, **geometry)
    bound = repetition.abs_bound(x, conv, **geometry)
    for g in range(2):  # each channel's small convolutions once, then one of them for each output
        small = [
            repetition.conv2d(
                x[:, [12 * g + j]].astype(float),
                KernelCodebook(
                    *(np.arange(5, dtype=np.uint8)[:, None], np.ones((5, 1), np.int8)),
                    conv.kernels[j // 6 : j // 6 + 1],
                    np.ones(5, F32),
                ),
                stride=2,
                padding=1,
                out_dtype="float64",
            )
            for j in range(12)
        ]
        for o in range(3 * g, 3 * g + 3):
            expected = conv.scale[o] * sum(conv.sign[o, j] * small[j][:, conv.index[o, j]] for j in range(12))
            assert (np.abs(got[:, o] - expected) <= 1e-6 * bound[:, o]).all()
    rows = x[0].reshape(24, -1).T
    expected = rows.astype(float) @ linear.dequantize().astype(float).T
    assert (np.abs(repetition.linear(rows, linear) - expected) <= 1e-6 * repetition.abs_bound(rows, linear)).all()


@pytest.mark.parametrize(("module", "name"), [(_quantized, "KernelCodebook"), (_codebook, "kernel_codebook")])
def test_docstring_examples(module, name):
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(module, name), name, module=module)
    assert found.examples
    assert doctest.DocTestRunner().run(found).failed == 0
