"""Bad weights and options of packing: each mistake has its exception and its full message."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import ISAS
from small_layers import ERRORS, QL, Q, conv, exactly, lin, weights

import pycodesign
from pycodesign import _core, ops
from pycodesign.quantize import QuantizedTensor

F32 = np.float32
GROUPED = weights((5, 6), scale=np.ones((5, 2), F32))


# ---- weights -------------------------------------------------------------------------------------------------------

WEIGHTS: dict[str, ERRORS] = {
    "codes dtype": (
        lambda: QuantizedTensor(Q.codes.astype(np.int64), Q.levels, Q.scale),
        TypeError,
        "codes: expected int8 or uint8 (O, I) or (O, I, kH, kW), got int64 (4, 3, 3, 3)",
    ),
    "codes rank": (
        lambda: QuantizedTensor(Q.codes[0], Q.levels, Q.scale),
        ValueError,
        "codes: expected int8 or uint8 (O, I) or (O, I, kH, kW), got uint8 (3, 3, 3)",
    ),
    "codes outside the levels": (
        lambda: QuantizedTensor(Q.codes + np.uint8(1), Q.levels, Q.scale),
        ValueError,
        "codes: expected values from 0 to 2 (Q - 1), got 3",
    ),
    "no codes": (
        lambda: QuantizedTensor(Q.codes[:, :0], Q.levels, Q.scale),
        ValueError,
        "codes: expected at least one code, got shape (4, 0, 3, 3)",
    ),
    "NaN level": (
        lambda: QuantizedTensor(Q.codes, np.array([-1, np.nan, 1], F32), Q.scale),
        ValueError,
        "levels: expected finite values, got nan",
    ),
    "Q > 256": (
        lambda: QuantizedTensor(Q.codes, np.arange(257, dtype=F32), Q.scale),
        ValueError,
        "levels: expected 1 to 256 levels, got 257",
    ),
    "Q = 0": (
        lambda: QuantizedTensor(Q.codes, np.empty(0, F32), Q.scale),
        ValueError,
        "levels: expected 1 to 256 levels, got 0",
    ),
    "scale shape": (
        lambda: QuantizedTensor(Q.codes, Q.levels, np.ones(3, F32)),
        ValueError,
        "scale: expected float32 (4,), got float32 (3,)",
    ),
}


# ---- options -------------------------------------------------------------------------------------------------------

PACKING: dict[str, ERRORS] = {
    "float weights": (
        lambda: conv(np.zeros((4, 3, 3, 3), F32)),  # type: ignore[arg-type]
        TypeError,
        "q: expected QuantizedTensor or KernelCodebook (O, C / groups, kH, kW), got ndarray",
    ),
    "linear weights for conv2d": (
        lambda: conv(QL),
        ValueError,
        "q: expected QuantizedTensor (O, C / groups, kH, kW), got weights of shape (5, 6)",
    ),
    "conv2d weights for linear": (
        lambda: lin(Q),
        ValueError,
        "q: expected QuantizedTensor (O, I), got weights of shape (4, 3, 3, 3)",
    ),
    "groups that do not divide": (
        lambda: conv(Q, groups=3),
        ValueError,
        "groups: expected a divisor of the 4 outputs, got 3",
    ),
    "no groups": (lambda: conv(Q, groups=0), ValueError, "groups: expected an integer >= 1, got 0"),
    "fractional groups": (
        lambda: conv(Q, groups=2.0),  # type: ignore[arg-type]
        TypeError,
        "groups: expected an integer, got float",
    ),
    "groups as bool": (lambda: conv(Q, groups=True), TypeError, "groups: expected an integer, got bool"),
    "stride 0": (lambda: conv(Q, stride=0), ValueError, "stride: expected an integer >= 1, got 0"),
    "three strides": (
        lambda: conv(Q, stride=(1, 2, 3)),
        ValueError,
        "stride: expected an integer or a pair, got (1, 2, 3)",
    ),
    "stride as array": (
        lambda: conv(Q, stride=np.array([1, 2])),  # type: ignore[arg-type]
        TypeError,
        "stride: expected an integer, got ndarray",
    ),
    "negative padding": (lambda: conv(Q, padding=(0, -1)), ValueError, "padding: expected an integer >= 0, got -1"),
    "named padding": (
        lambda: conv(Q, padding="same"),  # type: ignore[arg-type]
        TypeError,
        "padding: expected an integer, got str",
    ),
    "huge padding": (
        lambda: conv(Q, padding=1 << 40),
        ValueError,
        "padding: expected an integer <= 16777216, got 1099511627776",
    ),
    "stride as bytes": (
        lambda: conv(Q, stride=b"\x01\x02"),  # type: ignore[arg-type]
        TypeError,
        "stride: expected an integer, got bytes",
    ),
    "dilation 0": (lambda: conv(Q, dilation=(1, 0)), ValueError, "dilation: expected an integer >= 1, got 0"),
    "bias as list": (
        lambda: conv(Q, [0.0] * 4),
        TypeError,
        "bias: expected a NumPy array or a torch tensor, got list",
    ),
    "bias dtype": (lambda: conv(Q, np.zeros(4)), TypeError, "bias: expected float32 (4,), got float64 (4,)"),
    "bias shape": (lambda: lin(QL, np.zeros(4, F32)), ValueError, "bias: expected float32 (5,), got float32 (4,)"),
    "bias of the other byte order": (
        lambda: conv(Q, np.zeros(4, ">f4")),
        TypeError,
        "bias: expected float32 (4,), got >f4 (4,)",
    ),
    "input dtype": (
        lambda: conv(Q, input_dtype="float64"),
        ValueError,
        "input_dtype: expected 'float32', 'uint8' or 'int8', got 'float64'",
    ),
    "input dtype as a type": (
        lambda: conv(Q, input_dtype=np.float32),  # type: ignore[arg-type]
        ValueError,
        "input_dtype: expected 'float32', 'uint8' or 'int8', got <class 'numpy.float32'>",
    ),
    "input scale for floats": (
        lambda: conv(Q, input_scale=0.5),
        ValueError,
        "input_scale, input_zero_point, input_bits: expected their defaults for float32 inputs, got others",
    ),
    "input scale as text": (
        lambda: conv(Q, input_dtype="uint8", input_scale="0.5"),  # type: ignore[arg-type]
        TypeError,
        "input_scale: expected a number, got str",
    ),
    "negative input scale": (
        lambda: conv(Q, input_dtype="uint8", input_scale=-1),
        ValueError,
        "input_scale: expected a positive finite number, got -1.0",
    ),
    "NaN input scale": (
        lambda: conv(Q, input_dtype="uint8", input_scale=np.nan),
        ValueError,
        "input_scale: expected a positive finite number, got nan",
    ),
    "input scale beyond float": (
        lambda: conv(Q, input_dtype="uint8", input_scale=10**400),
        ValueError,
        "input_scale: expected a number that fits a float, got int",
    ),
    "input zero point": (
        lambda: conv(Q, input_dtype="uint8", input_zero_point=-1),
        ValueError,
        "input_zero_point: expected a value of uint8, got -1",
    ),
    "fractional input zero point": (
        lambda: conv(Q, input_dtype="int8", input_zero_point=0.5),  # type: ignore[arg-type]
        TypeError,
        "input_zero_point: expected an integer, got float",
    ),
    "input bits": (
        lambda: conv(Q, input_dtype="uint8", input_bits=9),
        ValueError,
        "input_bits: expected 1 to 8, got 9",
    ),
    "unknown algorithm of conv2d": (
        lambda: conv(Q, algorithm="fast"),
        ValueError,
        "algorithm: expected 'auto', 'codegen', 'tables', 'dense' or 'codebook', got 'fast'",
    ),
    "algorithm of linear for conv2d": (
        lambda: conv(Q, algorithm="packed"),
        ValueError,
        "algorithm: expected 'auto', 'codegen', 'tables', 'dense' or 'codebook', got 'packed'",
    ),
    "unknown algorithm of linear": (
        lambda: lin(QL, algorithm="Dense"),
        ValueError,
        "algorithm: expected 'auto', 'codegen', 'tables', 'dense', 'codebook' or 'packed', got 'Dense'",
    ),
    "algorithm as array": (
        lambda: lin(QL, algorithm=np.array(["dense"])),  # type: ignore[arg-type]
        ValueError,
        "algorithm: expected 'auto', 'codegen', 'tables', 'dense', 'codebook' or 'packed', "
        "got array(['dense'], dtype='<U5')",
    ),
    "tables at Q = 17": (
        lambda: conv(weights((4, 3, 3, 3), range(17)), algorithm="tables"),
        ValueError,
        "algorithm: expected at most 16 distinct levels for 'tables', got 17",
    ),
    "linear tables at Q = 17": (
        lambda: lin(weights((4, 6), range(17)), algorithm="tables"),
        ValueError,
        "algorithm: expected at most 16 distinct levels for 'tables', got 17",
    ),
    "packed at Q = 5": (
        lambda: lin(weights((4, 6), range(5)), algorithm="packed"),
        ValueError,
        "algorithm: expected at most 4 distinct levels for 'packed', got 5",
    ),
    "tables with scale groups": (
        lambda: lin(GROUPED, algorithm="tables"),
        ValueError,
        "algorithm: expected 'dense' or 'packed' for one scale per group of inputs (5, 2), got 'tables'",
    ),
    "dense levels beyond int8": (
        lambda: conv(weights((4, 3, 3, 3), (-300, 0, 300)), input_dtype="uint8", algorithm="dense"),
        ValueError,
        "algorithm: expected 'tables' for levels beyond int8, got 'dense'",
    ),
    "packed levels beyond int8": (
        lambda: lin(weights((4, 6), (-1, 0, 128)), input_dtype="int8", algorithm="packed"),
        ValueError,
        "algorithm: expected 'tables' for levels beyond int8, got 'packed'",
    ),
    "many levels beyond int8": (
        lambda: conv(weights((4, 3, 3, 3), range(0, 1700, 100)), input_dtype="uint8"),
        ValueError,
        "q: expected levels from -128 to 127, or at most 16 of them and one scale per output, for uint8 inputs, "
        "got 0 to 1600",
    ),
    "scale groups of levels beyond int8": (
        lambda: lin(weights((5, 6), (-300, 0, 300), GROUPED.scale), input_dtype="int8"),
        ValueError,
        "q: expected levels from -128 to 127, or at most 16 of them and one scale per output, for int8 inputs, "
        "got -300 to 300",
    ),
    "fractional levels": (
        lambda: conv(weights((4, 3, 3, 3), (-0.5, 0, 0.5)), input_dtype="uint8"),
        ValueError,
        "q: expected integer levels for uint8 inputs, got -0.5",
    ),
    "sums that could overflow": (
        lambda: conv(
            QuantizedTensor(np.ones((4, 3, 3, 3), np.uint8), np.array([0, 1e6], F32), Q.scale), input_dtype="uint8"
        ),
        ValueError,
        "levels: expected sums that fit 32 bits, got output 0 with a sum of |levels| of 27000000.000000 over its "
        "27 inputs",
    ),
    "tuning by a number": (lambda: conv(Q, tune=1), TypeError, "tune: expected a bool, got int"),  # type: ignore[arg-type]
    "tuning what was chosen": (
        lambda: conv(Q, algorithm="dense", tune=True),
        ValueError,
        "tune: expected algorithm='auto' with it, got 'dense'",
    ),
}


@pytest.mark.parametrize("name", [*WEIGHTS, *PACKING])
def test_packing(name: str) -> None:
    call, exception, message = (WEIGHTS | PACKING)[name]
    with pytest.raises(exception, match=exactly(message)):
        call()


@pytest.mark.parametrize("isa", ISAS)
def test_products_beyond_machine_code(isa: str) -> None:
    """Also where no machine code is made: the layer, or its file, may go where it is."""
    pycodesign.set_isa(isa)
    wanted = "levels: expected products that fit 16 bits, got a level of magnitude 300.000000 and inputs up to 128"
    with pytest.raises(ValueError, match=exactly(wanted)):
        conv(weights((4, 3, 3, 3), (-300, 0, 300)), input_dtype="uint8", algorithm="codegen")


@pytest.mark.parametrize("input_dtype", ["uint8", "int8"])
def test_largest_sums(input_dtype: str) -> None:
    level = (2**31 - 1) // 255
    x = np.full((1, 1), 255 if input_dtype == "uint8" else 127, input_dtype)
    zero_point = 0 if input_dtype == "uint8" else -128
    q = QuantizedTensor(np.zeros((1, 1), np.uint8), np.array([level - level % 2], F32), np.ones(1, F32))
    packed = lin(q, input_dtype=input_dtype, input_zero_point=zero_point)
    assert ops.linear(x, packed, out_dtype="int32")[0, 0] == 255 * int(q.levels[0])
    q = QuantizedTensor(np.zeros((1, 1), np.uint8), np.array([level + 2], F32), np.ones(1, F32))
    with pytest.raises(ValueError, match=r"^levels: expected sums that fit 32 bits, got output 0 with "):
        lin(q, input_dtype=input_dtype, input_zero_point=zero_point)


# ---- the native module, called directly ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": np.full((2, 4), 3, np.uint8)}, "codes: expected values below 3, got 3"),
        ({"codes": np.zeros((2, 4), np.int64)}, "codes: expected uint8 (O, I), got int64 (2, 4)"),
        ({"codes": np.zeros((2, 0), np.uint8)}, "codes: expected at least one output and input, got uint8 (2, 0)"),
        ({"codes": np.zeros((4, 2), np.uint8).T}, "codes, levels, scale: expected C order, got other strides"),
        ({"levels": np.zeros((3, 3), F32)}, "levels: expected (1 or O, Q), got float32 (3, 3)"),
        ({"levels": np.zeros(3, F32)}, "levels: expected float32 (1 or O, Q), got float32 (3,)"),
        ({"scale": np.ones((3, 1), F32)}, "scale: expected float32 (O, G), got float32 (3, 1)"),
        ({"levels": np.zeros((1, 257), F32)}, "levels: expected (1 or O, 1 to 256), got float32 (1, 257)"),
        ({"scale": np.ones((2, 3), F32)}, "scale: expected (O, a divisor of the 4 inputs), got float32 (2, 3)"),
        ({"bias": np.zeros(3, F32)}, "bias: expected float32 (2,), got float32 (3,)"),
        ({"bias": np.zeros(4, F32)[::2]}, "bias: expected C order, got other strides"),
        ({"input_dtype": "int32"}, "input_dtype: expected 'float32', 'uint8' or 'int8', got 'int32'"),
        ({"algorithm": "auto"}, "algorithm: expected 'codegen', 'tables', 'dense', 'packed' or 'codebook', got 'auto'"),
    ],
)
def test_native_linear(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "codes": np.zeros((2, 4), np.uint8),
        "levels": np.array([[-1, 0, 1]], F32),
        "scale": np.ones((2, 1), F32),
        "bias": None,
        "input_dtype": "float32",
        "input_scale": 1.0,
        "input_zero_point": 0,
        "input_bits": 0,
        "algorithm": "dense",
    }
    _core.PackedLinear(**arguments)
    with pytest.raises((TypeError, ValueError), match=exactly(message)):
        _core.PackedLinear(**(arguments | change))
