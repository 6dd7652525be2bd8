import copy
import pickle
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pycodesign import quantize
from pycodesign.quantize import QuantizedTensor

F32 = np.float32
QUANTIZERS: dict[str, Callable[[Any], QuantizedTensor]] = {
    "binary": quantize.binary,
    "ternary": quantize.ternary,
    **{f"uniform{bits}": lambda w, bits=bits: quantize.uniform(w, bits) for bits in range(2, 9)},
    **{f"power_of_two{bits}": lambda w, bits=bits: quantize.power_of_two(w, bits) for bits in range(2, 6)},
}
EVERY_FUNCTION = {**QUANTIZERS, "from_fake_quantized": quantize.from_fake_quantized}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(F32)


def levels(*values: float) -> np.ndarray:
    return np.array(values, F32)


# QuantizedTensor


def test_dequantize_is_the_rounded_product_of_scale_and_level():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 5, (7, 3, 2, 5)).astype(np.uint8)
    own = np.sort(normal(7, 5), axis=1)
    scale = normal(7)
    w = QuantizedTensor(codes, own, scale).dequantize()
    assert w.dtype == np.float32 and w.shape == codes.shape
    for index in np.ndindex(codes.shape):
        assert w[index] == scale[index[0]] * own[index[0], codes[index]]
    assert np.array_equal(
        QuantizedTensor(codes, own[0], scale).dequantize(), own[0][codes] * scale[:, None, None, None]
    )


def test_dequantize_with_a_scale_per_group_of_inputs():
    codes = np.array([[0, 1, 2, 0], [2, 2, 1, 0]], np.int8)
    q = QuantizedTensor(codes, levels(-1, 0, 2), np.array([[1, 10], [-2, 3]], F32))
    assert np.array_equal(q.dequantize(), [[-1, 0, 20, -10], [-4, -4, 0, -3]])
    assert repr(q) == "QuantizedTensor((2, 4), Q=3, G=2, levels: -1, 0, 2)"


def test_properties_and_repr():
    q = QuantizedTensor(np.zeros((2, 3, 1, 1), np.uint8), np.arange(256, dtype=F32), np.ones(2, F32))
    assert (q.Q, q.shape) == (256, (2, 3, 1, 1))
    assert repr(q) == "QuantizedTensor((2, 3, 1, 1), Q=256, levels: 0 .. 255)"
    own = QuantizedTensor(np.zeros((2, 3), np.uint8), np.array([[1.5], [2]], F32), np.ones(2, F32))
    assert repr(own) == "QuantizedTensor((2, 3), Q=1, levels: own for each output)"


def test_arrays_are_kept_as_they_are_where_they_can_be():
    codes, scale = np.zeros((2, 3), np.int8), np.ones(2, F32)
    q = QuantizedTensor(codes, levels(1, 2), scale)
    assert np.shares_memory(q.codes, codes) and q.codes.dtype == np.int8
    transposed = np.array([[0, 1], [1, 0], [1, 1]], np.uint8).T
    q = QuantizedTensor(transposed, levels(1, 2), scale)
    assert q.codes.flags.c_contiguous and np.array_equal(q.codes, transposed)


def test_copies_and_pickles():
    q = quantize.ternary(normal(4, 9))
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert np.array_equal(other.dequantize(), q.dequantize())


def test_fields_cannot_be_replaced():
    with pytest.raises(AttributeError):
        quantize.ternary(normal(4, 9)).codes = np.zeros((4, 9), np.uint8)  # type: ignore[misc]


CODES, LEVELS, SCALE = np.zeros((4, 6), np.uint8), levels(-1, 0, 1), np.ones(4, F32)
KERNELS = np.zeros((4, 6, 3, 3), np.uint8)


@pytest.mark.parametrize(
    ("codes", "levels", "scale", "error", "message"),
    [
        ([[0]], LEVELS, SCALE, TypeError, "codes: expected a NumPy array or a torch tensor, got list"),
        (
            normal(64, 3, 7, 7),
            LEVELS,
            SCALE,
            TypeError,
            "codes: expected int8 or uint8 (O, I) or (O, I, kH, kW), got float32 (64, 3, 7, 7)",
        ),
        (
            CODES[0],
            LEVELS,
            SCALE,
            ValueError,
            "codes: expected int8 or uint8 (O, I) or (O, I, kH, kW), got uint8 (6,)",
        ),
        (CODES[:, :0], LEVELS, SCALE, ValueError, "codes: expected at least one code, got shape (4, 0)"),
        (CODES + np.uint8(3), LEVELS, SCALE, ValueError, "codes: expected values from 0 to 2 (Q - 1), got 3"),
        (
            CODES.view(np.int8) - np.int8(1),
            LEVELS,
            SCALE,
            ValueError,
            "codes: expected values from 0 to 2 (Q - 1), got -1",
        ),
        (CODES, LEVELS.astype(float), SCALE, TypeError, "levels: expected float32 (Q,) or (4, Q), got float64 (3,)"),
        (CODES, (-1, 0, 1), SCALE, TypeError, "levels: expected a NumPy array or a torch tensor, got tuple"),
        (CODES, np.ones((3, 1), F32), SCALE, ValueError, "levels: expected float32 (Q,) or (4, Q), got float32 (3, 1)"),
        (CODES, np.ones((), F32), SCALE, ValueError, "levels: expected float32 (Q,) or (4, Q), got float32 ()"),
        (CODES, LEVELS[:0], SCALE, ValueError, "levels: expected 1 to 256 levels, got 0"),
        (CODES, np.arange(257, dtype=F32), SCALE, ValueError, "levels: expected 1 to 256 levels, got 257"),
        (CODES, levels(0, np.nan), SCALE, ValueError, "levels: expected finite values, got nan"),
        (CODES, levels(-np.inf, 0), SCALE, ValueError, "levels: expected finite values, got -inf"),
        (CODES, levels(0, 2, 1), SCALE, ValueError, "levels: expected strictly ascending values, got 2.0 before 1.0"),
        (CODES, levels(-0.0, 0), SCALE, ValueError, "levels: expected strictly ascending values, got -0.0 before 0.0"),
        (
            CODES,
            LEVELS,
            SCALE[:3],
            ValueError,
            "scale: expected float32 (4,) or (4, G) with G dividing 6, got float32 (3,)",
        ),
        (
            CODES,
            LEVELS,
            np.ones((4, 4), F32),
            ValueError,
            "scale: expected float32 (4,) or (4, G) with G dividing 6, got float32 (4, 4)",
        ),
        (
            CODES,
            LEVELS,
            np.ones((4, 0), F32),
            ValueError,
            "scale: expected float32 (4,) or (4, G) with G dividing 6, got float32 (4, 0)",
        ),
        (KERNELS, LEVELS, np.ones((4, 2), F32), ValueError, "scale: expected float32 (4,), got float32 (4, 2)"),
        (KERNELS, LEVELS, np.ones(4), TypeError, "scale: expected float32 (4,), got float64 (4,)"),
        (CODES, LEVELS, SCALE * F32(np.nan), ValueError, "scale: expected finite values, got nan"),
    ],
)
def test_bad_tensors_name_the_argument(codes, levels, scale, error, message):
    with pytest.raises(error) as raised:
        QuantizedTensor(codes, levels, scale)
    assert str(raised.value) == message


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


# from_fake_quantized


def check_exact(q: QuantizedTensor, w: np.ndarray) -> None:
    got = q.dequantize()
    assert got.dtype == np.float32
    assert np.array_equal((got + F32(0)).view(np.uint32), (w + F32(0)).view(np.uint32))


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (33, 70), (5, 1, 3, 3), (1, 300)])
def test_what_the_functions_make_is_recovered(name, shape):
    q = QUANTIZERS[name](normal(*shape))
    signs = np.where(np.arange(shape[0]) % 3 == 1, -1, 1).astype(F32)
    for scale in (q.scale, q.scale * signs):
        w = QuantizedTensor(q.codes, q.levels, scale).dequantize()
        got = quantize.from_fake_quantized(w)
        check_exact(got, w)
        assert np.isin(got.levels, q.levels).all()
        assert got.Q <= q.Q


@given(
    data=st.data(),
    bits=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
    outputs=st.integers(1, 12),
    inputs=st.integers(1, 40),
    exponent=st.integers(-60, 60),
)
@settings(max_examples=300, deadline=None)
def test_integer_levels_are_found_wherever_they_exist(data, bits, seed, outputs, inputs, exponent):
    rng = np.random.default_rng(seed)
    half = 2 ** (bits - 1)
    kind = data.draw(st.sampled_from(["uniform", "powers", "odd"]))
    if kind == "powers":
        powers = 2.0 ** np.arange(min(half, 15))
        grid = np.array([*-powers[::-1], 0, *powers], F32)
    else:
        grid = np.arange(-half, half, dtype=F32) * 2 + 1 if kind == "odd" else np.arange(-half, half, dtype=F32)
    codes = rng.integers(0, grid.size, (outputs, inputs)).astype(np.uint8)
    scale = (rng.normal(size=outputs) * 2.0**exponent).astype(F32)
    scale[rng.random(outputs) < 0.1] = 0
    w = QuantizedTensor(codes, grid, scale).dequantize()
    q = quantize.from_fake_quantized(w)
    check_exact(q, w)
    assert np.array_equal(q.levels, np.rint(q.levels))
    assert np.abs(q.levels).max() <= max(np.abs(grid).max(), q.Q)


@given(
    seed=st.integers(0, 2**32 - 1), outputs=st.integers(1, 8), inputs=st.integers(1, 60), distinct=st.integers(1, 256)
)
@settings(max_examples=150, deadline=None)
def test_any_few_values_are_recovered_exactly(seed, outputs, inputs, distinct):
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=(outputs, distinct)) * 2.0 ** rng.integers(-140, 120, (outputs, 1))).astype(F32)
    w = np.take_along_axis(values, rng.integers(0, distinct, (outputs, inputs)), axis=1)
    w[rng.random(w.shape) < 0.1] = -0.0
    check_exact(quantize.from_fake_quantized(w), w)


def test_ternary_outputs_share_levels_whatever_they_use():
    w = np.array(
        [[-0.3, 0, 0.3, 0.3], [0, 0.7, 0.7, 0], [0, 0, 0, -0.0], [-1.1, 0, -1.1, 0], [5, 5, 5, 5], [-3, -3, -3, -3]],
        F32,
    )
    q = quantize.from_fake_quantized(w)
    check_exact(q, w)
    assert np.array_equal(q.levels, [-1, 0, 1])
    assert np.array_equal(q.scale, levels(0.3, 0.7, 0, 1.1, 5, 3))


def test_an_output_of_zeros_adds_no_level():
    w = np.array([[-0.3, 0.3], [0, 0]], F32)
    q = quantize.from_fake_quantized(w)
    check_exact(q, w)
    assert np.array_equal(q.levels, [-1, 1]) and np.array_equal(q.scale, levels(0.3, 0))
    q = quantize.from_fake_quantized(np.zeros((2, 3), F32))
    assert np.array_equal(q.levels, [0]) and np.array_equal(q.scale, [0, 0]) and not q.codes.any()
    q = quantize.from_fake_quantized(np.array([[-3, -3], [0, 0]], F32))
    assert q.Q == 1 and q.dequantize()[1].tolist() == [0, 0]


def test_negative_scales_keep_sixteen_levels():
    codes = np.tile(np.arange(16, dtype=np.uint8), (4, 1))
    scale = levels(0.1, -0.2, 0.3, -0.4)
    q = quantize.from_fake_quantized(QuantizedTensor(codes, np.arange(-8, 8, dtype=F32), scale).dequantize())
    assert np.array_equal(q.levels, np.arange(-8, 8))
    assert np.array_equal(q.scale, scale)
    assert np.array_equal(q.codes, codes)
    assert not np.signbit(q.levels[8])


def test_half_steps_become_odd_integers():
    q = quantize.from_fake_quantized(levels(-1.5, -0.5, 0.5, 1.5)[None])
    assert np.array_equal(q.levels, [-3, -1, 1, 3]) and q.scale == 0.5


def test_values_on_no_grid_are_the_levels():
    shared = levels(-1.7231, -0.3119, 0.4003, 2.2391)
    w = shared[np.random.default_rng(0).integers(0, 4, (9, 5, 3, 3))]
    q = quantize.from_fake_quantized(w)
    check_exact(q, w)
    assert np.array_equal(q.levels, shared) and np.array_equal(q.scale, np.ones(9))


def test_float_levels_with_zeros():
    w = np.array([[-1.7231, -0.0, 0.4003], [0, 0, -0.0]], F32)
    q = quantize.from_fake_quantized(w)
    check_exact(q, w)
    assert q.levels.tolist() == [w[0, 0], 0, w[0, 2]] and not np.signbit(q.levels[1])
    w = np.array([[-1.7231, 0.4003, 2.2391], [0, 0, -0.0]], F32)
    q = quantize.from_fake_quantized(w)
    check_exact(q, w)
    assert q.Q == 3 and np.array_equal(q.scale, [1, 0])


def test_trained_ternary_with_two_magnitudes_has_levels_per_output():
    w = np.zeros((12, 30), F32)
    for o, (minus, plus) in enumerate(np.abs(normal(12, 2)) + F32(0.1)):
        w[o, :10], w[o, 10:20] = -minus, plus
    w[11] = np.where(w[11] > 0, w[11], 0)
    q = quantize.from_fake_quantized(w)
    check_exact(q, w)
    assert q.levels.shape == (12, 3) and np.array_equal(q.scale, np.ones(12))


def test_levels_are_per_output_where_sharing_would_exceed_sixteen():
    zero_points = np.arange(8)[:, None]
    w = ((np.arange(16) - zero_points) * levels(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)[:, None]).astype(F32)
    q = quantize.from_fake_quantized(w)
    check_exact(q, w)
    assert q.levels.shape == (8, 16)
    assert np.abs(q.levels).max() <= 15


def test_one_output_off_the_grid_makes_all_levels_floats():
    w = np.array([[0.1, 0.3, -0.2], [np.pi, np.e, np.sqrt(2)]], F32)
    q = quantize.from_fake_quantized(w)
    check_exact(q, w)
    assert np.array_equal(q.scale, [1, 1])


def test_half_precision_weights_are_recovered():
    w = (normal(4, 1) * np.arange(-2, 3)).astype(np.float16)
    check_exact(quantize.from_fake_quantized(w), w.astype(F32))


def test_extreme_magnitudes_are_recovered():
    largest = np.finfo(F32).max
    tiny = F32(2.0**-149)
    for row in ([largest, -largest, largest / 3], [tiny, 3 * tiny, -7 * tiny], [tiny, largest, 0], [2.0**-126, 1, 0]):
        w = np.array([row], F32)
        check_exact(quantize.from_fake_quantized(w), w)


def test_256_values_pass_and_257_name_the_output():
    w = normal(7, 300)
    w[:] = w[:, :1]
    w[5, :256] = normal(256, seed=1)
    w[5, 256:] = w[5, 0]
    check_exact(quantize.from_fake_quantized(w), w)
    w[5] = normal(300, seed=1)
    with pytest.raises(ValueError) as raised:
        quantize.from_fake_quantized(w)
    assert str(raised.value) == "w: output 5 has 300 distinct values, expected at most 256"


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("low", [-2, -128])
def test_a_given_scale_keeps_its_integers(groups, low):
    integers = np.random.default_rng(0).integers(low, -low, (7, 300)).astype(F32)
    integers[0] = 2 * np.floor(integers[0] / 2)
    integers[1] = 0
    scale = np.linspace(0.1, 2, 7 * groups, dtype=F32).reshape(7, groups)
    w = (integers.reshape(7, groups, -1) * scale[:, :, None]).reshape(7, 300)
    q = quantize.from_fake_quantized(w, scale[:, 0] if groups == 1 else scale)
    check_exact(q, w)
    divisors = np.array([[2]] + [[1]] * 6, F32)
    np.testing.assert_array_equal(q.scale.reshape(7, groups), scale * divisors)
    np.testing.assert_array_equal(q.decode(), integers / divisors)


def test_ternary_weights_in_eight_bits_are_ternary():
    integers = np.array([[-127, 0, 127, 127], [105, -105, 0, 105]], F32)
    scale = np.array([0.1, 0.3], F32)
    q = quantize.from_fake_quantized(integers * scale[:, None], scale)
    check_exact(q, integers * scale[:, None])
    np.testing.assert_array_equal(q.levels, [-1, 0, 1])


def test_a_common_divisor_stays_where_dividing_would_round():
    scale = next(s for s in np.linspace(0.1, 0.2, 100, dtype=F32) if 3 * (3 * s) != 9 * s)
    w = scale * np.array([[3, 9, 0]], F32)
    q = quantize.from_fake_quantized(w, np.array([scale]))
    check_exact(q, w)
    np.testing.assert_array_equal(q.levels, [0, 3, 9])


@pytest.mark.parametrize("groups", [1, 2])
def test_outputs_of_zeros_stay_so_with_a_given_scale(groups):
    w = np.array([[0.1, -0.1, 0.1, 0.1], [0, 0, 0, 0], [-0.1, 0.1, 0.1, -0.1]], F32)
    q = quantize.from_fake_quantized(w, scale=np.full((3, groups), 0.1, F32)[:, :: 1 if groups > 1 else 2].squeeze())
    assert np.array_equal(q.levels, [-1, 1])
    assert np.array_equal(q.dequantize(), w)


def test_a_given_scale_that_does_not_fit_is_not_used():
    w = np.array([[0.5, -1.0], [1.5, 0.75]], F32)
    for scale in (np.array([0.5, 0.5], F32), np.array([0, 0.75], F32)):
        q = quantize.from_fake_quantized(w, scale)
        check_exact(q, w)
        np.testing.assert_array_equal(q.scale, quantize.from_fake_quantized(w).scale)


def test_bad_scales_name_the_argument():
    w = np.ones((2, 4), F32)
    with pytest.raises(ValueError, match=r"scale: expected float32 \(2,\) or \(2, G\) with G dividing 4, got"):
        quantize.from_fake_quantized(w, np.ones(3, F32))
    with pytest.raises(TypeError, match=r"scale: expected a NumPy array or a torch tensor, got float"):
        quantize.from_fake_quantized(w, 0.5)
    with pytest.raises(ValueError, match=r"w: output 0 has 257 distinct values, expected at most 256"):
        quantize.from_fake_quantized(np.arange(257, dtype=F32)[None], np.ones(1, F32))


def test_torch_fake_quantization_is_recovered():
    import torch

    w = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    scale = w.abs().amax((1, 2, 3)) / 7
    zero_point = torch.zeros(16, dtype=torch.int32)
    fake = torch.fake_quantize_per_channel_affine(w, scale, zero_point, 0, -8, 7)
    q = quantize.from_fake_quantized(fake)
    check_exact(q, fake.numpy())
    assert np.isin(q.levels, np.arange(-8, 8)).all()
    assert np.allclose(q.scale, scale, rtol=1e-6)


@pytest.mark.parametrize("name", EVERY_FUNCTION)
def test_a_large_layer_takes_less_than_ten_seconds(name):
    w = normal(512, 512, 3, 3)
    if name == "from_fake_quantized":
        w = quantize.uniform(w, 8).dequantize()
    start = time.perf_counter()
    EVERY_FUNCTION[name](w)
    assert time.perf_counter() - start < 10  # 0.01 to 0.4 s on an idle core
