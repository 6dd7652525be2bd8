"""`QuantizedTensor`: what it decodes to, what it keeps, and what it refuses."""

import copy
import pickle

import numpy as np
import pytest
from quantizers import levels, normal

from pycodesign import quantize
from pycodesign.quantize import QuantizedTensor

F32 = np.float32


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
