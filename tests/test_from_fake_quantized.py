"""`quantize.from_fake_quantized`: weights of few values are recovered exactly, with integer levels where they exist."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizers import QUANTIZERS, levels, normal

from pycodesign import quantize
from pycodesign.quantize import QuantizedTensor

F32 = np.float32


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


# a given scale


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
