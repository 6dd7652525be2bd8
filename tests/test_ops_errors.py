"""Bad input: each mistake has its exception and its full message, and leaves `out` as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ISAS

import pycodesign
from pycodesign import _core, ops, quantize
from pycodesign.quantize import QuantizedTensor

F32 = np.float32


def weights(shape: tuple[int, ...], levels: Any = (-1, 0, 1), scale: Any = None) -> QuantizedTensor:
    levels = np.asarray(levels, F32)
    codes = np.random.default_rng(0).integers(0, levels.size, shape, dtype=np.uint8)
    codes.flat[: levels.size] = np.arange(levels.size)[: codes.size]
    return QuantizedTensor(codes, levels, np.ones(shape[0], F32) if scale is None else scale)


Q = weights((4, 3, 3, 3))
QL = weights((5, 6))
GROUPED = weights((5, 6), scale=np.ones((5, 2), F32))
ERRORS = tuple[Callable[[], Any], type[Exception], str]


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


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

# ---- packing -------------------------------------------------------------------------------------------------------

conv, lin = ops.prepack_conv2d, ops.prepack_linear
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


# ---- running -------------------------------------------------------------------------------------------------------

FLOAT, BYTES, LINEAR = conv(Q), conv(Q, input_dtype="uint8"), lin(QL)
X, X8, XL = np.ones((1, 3, 5, 5), F32), np.ones((1, 3, 5, 5), np.uint8), np.ones((2, 6), F32)
XT = np.ones((2, 3, 6), F32)
Y, YL, YT = np.ones((1, 4, 3, 3), F32), np.ones((2, 5), F32), np.ones((2, 3, 5), F32)
UNALIGNED = np.zeros(301, np.uint8)[1:].view(F32).reshape(1, 3, 5, 5)

RUNNING: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "x as list": (
        X.tolist(), FLOAT, {}, TypeError,
        "x: expected a NumPy array or a torch tensor, got list",
    ),
    "x dtype": (
        X.astype(float), FLOAT, {}, TypeError,
        "x: expected float32 (N, 3, H, W), got float64 (1, 3, 5, 5)",
    ),
    "float x for an integer layer": (
        X, BYTES, {}, TypeError,
        "x: expected uint8 (N, 3, H, W), got float32 (1, 3, 5, 5)",
    ),
    "signed x for an unsigned layer": (
        X8.view(np.int8), BYTES, {}, TypeError,
        "x: expected uint8 (N, 3, H, W), got int8 (1, 3, 5, 5)",
    ),
    "boolean x": (
        X8.view(bool), BYTES, {}, TypeError,
        "x: expected uint8 (N, 3, H, W), got bool (1, 3, 5, 5)",
    ),
    "x of the other byte order": (
        X.astype(">f4"), FLOAT, {}, TypeError,
        "x: expected float32 (N, 3, H, W), got >f4 (1, 3, 5, 5)",
    ),
    "x rank": (
        X[0], FLOAT, {}, ValueError,
        "x: expected float32 (N, 3, H, W), got float32 (3, 5, 5)",
    ),
    "x channels": (
        X[:, :2], FLOAT, {}, ValueError,
        "x: expected float32 (N, 3, H, W), got float32 (1, 2, 5, 5)",
    ),
    "unaligned x": (
        UNALIGNED, FLOAT, {}, ValueError,
        "x: expected elements aligned in memory, got an unaligned view",
    ),
    "x dtype of linear": (
        XT.astype(float), LINEAR, {}, TypeError,
        "x: expected float32 (..., 6), got float64 (2, 3, 6)",
    ),
    "x inputs of linear": (
        XT[..., :5], LINEAR, {}, ValueError,
        "x: expected float32 (..., 6), got float32 (2, 3, 5)",
    ),
    "scalar x of linear": (
        np.array(1, F32), LINEAR, {}, ValueError,
        "x: expected float32 (..., 6), got float32 ()",
    ),
    "residual dtype": (
        X, FLOAT, {"residual": Y.astype(float)}, TypeError,
        "residual: expected float32, uint8 or int8 (1, 4, 3, 3), got float64 (1, 4, 3, 3)",
    ),
    "residual shape": (
        X, FLOAT, {"residual": Y[:, :3]}, ValueError,
        "residual: expected float32, uint8 or int8 (1, 4, 3, 3), got float32 (1, 3, 3, 3)",
    ),
    "residual as number": (
        X, FLOAT, {"residual": 1.0}, TypeError,
        "residual: expected a NumPy array or a torch tensor, got float",
    ),
    "residual dtype of linear": (
        XT, LINEAR, {"residual": YT.astype(np.int32)}, TypeError,
        "residual: expected float32, uint8 or int8 (2, 3, 5), got int32 (2, 3, 5)",
    ),
    "residual shape of linear": (
        XT, LINEAR, {"residual": YT.reshape(6, 5)}, ValueError,
        "residual: expected float32, uint8 or int8 (2, 3, 5), got float32 (6, 5)",
    ),
    "residual scale": (
        X, FLOAT, {"residual": Y, "residual_scale": "a"}, TypeError,
        "residual_scale: expected a number, got str",
    ),
    "residual scale NaN": (
        X, FLOAT, {"residual": Y, "residual_scale": float("nan")}, ValueError,
        "residual_scale: expected a finite float32, got nan",
    ),
    "residual scale beyond float32 of linear": (
        XT, LINEAR, {"residual": YT, "residual_scale": -1e39}, ValueError,
        "residual_scale: expected a finite float32, got -1e+39",
    ),
    "residual zero point": (
        X, FLOAT, {"residual": Y, "residual_zero_point": 0.5}, TypeError,
        "residual_zero_point: expected an integer, got float",
    ),
    "clamp as number": (
        X, FLOAT, {"clamp": 6}, ValueError,
        "clamp: expected a pair (lowest, highest), either may be None, got 6",
    ),
    "clamp the wrong way": (
        X, FLOAT, {"clamp": (6, 0)}, ValueError,
        "clamp: expected lowest <= highest, got (6, 0)",
    ),
    "clamp to NaN": (
        X, FLOAT, {"clamp": (0, float("nan"))}, ValueError,
        "clamp: expected numbers or None, got (0, nan)",
    ),
    "clamp to text": (
        X, FLOAT, {"clamp": "06"}, TypeError,
        "clamp: expected a number, got str",
    ),
    "out_dtype": (
        X, FLOAT, {"out_dtype": "float64"}, ValueError,
        "out_dtype: expected 'float32', 'uint8', 'int8' or 'int32', got 'float64'",
    ),
    "out_dtype as a dtype": (
        X, FLOAT, {"out_dtype": np.dtype("float32")}, ValueError,
        "out_dtype: expected 'float32', 'uint8', 'int8' or 'int32', got dtype('float32')",
    ),
    "exact sums of floats": (
        X, FLOAT, {"out_dtype": "int32"}, ValueError,
        "out_dtype: expected 'float32', 'uint8' or 'int8' for float32 inputs, got 'int32'",
    ),
    "exact sums with residual": (
        X8, BYTES, {"out_dtype": "int32", "residual": Y}, ValueError,
        "out_dtype: 'int32' gives the exact sums; expected no residual and no clamp with it",
    ),
    "exact sums with clamp": (
        X8, BYTES, {"out_dtype": "int32", "clamp": (0, None)}, ValueError,
        "out_dtype: 'int32' gives the exact sums; expected no residual and no clamp with it",
    ),
    "no out_scale": (
        X, FLOAT, {"out_dtype": "uint8"}, ValueError,
        "out_scale: expected a positive number for out_dtype 'uint8', got None",
    ),
    "out_scale of floats": (
        X, FLOAT, {"out_scale": 0.5}, ValueError,
        "out_scale: expected None for out_dtype 'float32', got a number",
    ),
    "negative out_scale": (
        X, FLOAT, {"out_dtype": "uint8", "out_scale": -1}, ValueError,
        "out_scale: expected a positive finite float32, got -1.000000",
    ),
    "infinite out_scale": (
        X, FLOAT, {"out_dtype": "uint8", "out_scale": float("inf")}, ValueError,
        "out_scale: expected a positive finite float32, got inf",
    ),
    "out_zero_point": (
        X, FLOAT, {"out_dtype": "int8", "out_scale": 1, "out_zero_point": 128}, ValueError,
        "out_zero_point: expected a value of int8, got 128",
    ),
    "out_zero_point of floats": (
        X, FLOAT, {"out_zero_point": 1}, ValueError,
        "out_zero_point: expected a value of float32: 0, got 1",
    ),
    "linear layer for conv2d": (
        X, LINEAR, {}, ValueError,
        "packed: expected a Packed conv2d layer, got a linear layer",
    ),
    "weights for a packed layer": (
        X, Q, {}, TypeError,
        "packed: expected a Packed conv2d layer, got QuantizedTensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNNING)
def test_running(name: str) -> None:
    x, packed, options, exception, message = RUNNING[name]
    run = ops.linear if "of linear" in name else ops.conv2d
    shapes = {4: (1, 4, 3, 3), 3: (2, 3, 5), 0: (5,)}
    out = np.full(shapes[np.ndim(x) if run is ops.linear else 4], 7, options.get("out_dtype", "float32"))
    for given in ({}, {"out": out}):
        with pytest.raises(exception, match=exactly(message)):
            run(x, packed, **options, **given)
    assert (out == 7).all()


BUFFER = np.ones(200, F32)
APART = "out: expected memory apart from {}, got an array that overlaps it"

OUT: dict[str, tuple[Any, Any, dict[str, Any], Any, type[Exception], str]] = {
    "list": (
        X, FLOAT, {}, Y.tolist(), TypeError,
        "out: expected a NumPy array or a torch tensor, got list",
    ),
    "dtype": (
        X, FLOAT, {}, np.ones(Y.shape), TypeError,
        "out: expected float32 (1, 4, 3, 3), got float64 (1, 4, 3, 3)",
    ),
    "dtype of quantized": (
        X, FLOAT, {"out_dtype": "int8", "out_scale": 1}, np.ones(Y.shape, np.uint8), TypeError,
        "out: expected int8 (1, 4, 3, 3), got uint8 (1, 4, 3, 3)",
    ),
    "shape": (
        X, FLOAT, {}, np.ones((1, 4, 3, 2), F32), ValueError,
        "out: expected float32 (1, 4, 3, 3), got float32 (1, 4, 3, 2)",
    ),
    "read-only": (
        X, FLOAT, {}, np.frombuffer(Y.tobytes(), F32).reshape(Y.shape), ValueError,
        "out: expected a writeable array, got a read-only or broadcast one",
    ),
    "broadcast": (
        X, FLOAT, {}, np.lib.stride_tricks.as_strided(BUFFER, Y.shape, (0, 0, 12, 4)), ValueError,
        "out: expected a writeable array, got a read-only or broadcast one",
    ),
    "overlaps x": (
        BUFFER[:75].reshape(X.shape), FLOAT, {}, BUFFER[74:110].reshape(Y.shape), ValueError,
        APART.format("x"),
    ),
    "overlaps x, reversed": (
        BUFFER[:75].reshape(X.shape)[::-1, ::-1], FLOAT, {}, BUFFER[39:75][::-1].reshape(Y.shape), ValueError,
        APART.format("x"),
    ),
    "is the residual": (
        X, FLOAT, {"residual": BUFFER[:36].reshape(Y.shape)}, BUFFER[:36].reshape(Y.shape), ValueError,
        APART.format("residual"),
    ),
    "dtype of linear": (
        XT, LINEAR, {}, np.ones(YT.shape), TypeError,
        "out: expected float32 (2, 3, 5), got float64 (2, 3, 5)",
    ),
    "shape of linear": (
        XT, LINEAR, {}, np.ones((6, 5), F32), ValueError,
        "out: expected float32 (2, 3, 5), got float32 (6, 5)",
    ),
    "strides of linear": (
        XT, LINEAR, {}, np.ones((3, 2, 5), F32).transpose(1, 0, 2), ValueError,
        "out: expected leading dimensions that flatten without a copy, got other strides",
    ),
    "overlaps x of linear": (
        BUFFER[:12].reshape(2, 6), LINEAR, {}, BUFFER[11:21].reshape(2, 5), ValueError,
        APART.format("x"),
    ),
    "overlaps residual of linear": (
        XL, LINEAR, {"residual": BUFFER[:10].reshape(2, 5)}, BUFFER[9:19].reshape(2, 5), ValueError,
        APART.format("residual"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OUT)
def test_out(name: str) -> None:
    x, packed, options, out, exception, message = OUT[name]
    run = ops.linear if packed is LINEAR else ops.conv2d
    with pytest.raises(exception, match=exactly(message)):
        run(x, packed, **options, out=out)
    assert (np.asarray(out) == 1).all()


def test_neighbors_do_not_overlap() -> None:
    buffer = np.ones(200, F32)
    x, y, residual = buffer[:75].reshape(X.shape), buffer[75:111].reshape(Y.shape), buffer[111:147].reshape(Y.shape)
    expected = ops.conv2d(x.copy(), FLOAT, residual=residual.copy())
    np.testing.assert_array_equal(ops.conv2d(x, FLOAT, residual=residual, out=y), expected)
    assert (buffer[:75] == 1).all() and (buffer[111:] == 1).all()


@pytest.mark.parametrize("images", [1, 3])
def test_slices_of_one_buffer_lie_apart(images: int) -> None:
    """As networks write that concatenate."""
    buffer = np.ones((images, 3 + 4 + 4, 5, 5), F32)
    packed = ops.prepack_conv2d(quantize.ternary(np.random.default_rng(0).normal(size=(4, 3, 3, 3))), padding=1)
    x, residual, out = buffer[:, :3], buffer[:, 3:7], buffer[:, 7:]
    expected = ops.conv2d(x.copy(), packed, residual=residual.copy())
    np.testing.assert_array_equal(ops.conv2d(x, packed, residual=residual, out=out), expected)
    np.testing.assert_array_equal(buffer[:, 7:], expected)
    assert (buffer[:, :7] == 1).all()
    with pytest.raises(ValueError, match=exactly(APART.format("x"))):
        ops.conv2d(x, packed, out=buffer[:, 2:6])


def test_out_that_overlaps_itself() -> None:
    for strides in ((144, 4, 12, 4), (144, 32, 12, 4), (4, 36, 12, 4)):
        out = np.lib.stride_tricks.as_strided(np.ones(400, F32), (2, 4, 3, 3), strides)
        with pytest.raises(
            ValueError, match="out: expected elements apart in memory, got an array that overlaps itself"
        ):
            ops.conv2d(np.ones((2, *X.shape[1:]), F32), FLOAT, out=out)
    turned = np.ones((3, 3, 4, 1), F32).transpose(3, 2, 0, 1)[:, :, ::-1]
    np.testing.assert_array_equal(ops.conv2d(X, FLOAT, out=turned), ops.conv2d(X, FLOAT))


def test_masked_arrays_are_refused() -> None:
    masked = np.ma.MaskedArray(X, mask=X > 0)
    with pytest.raises(TypeError, match="x: expected a NumPy array or a torch tensor, got MaskedArray"):
        ops.conv2d(masked, FLOAT)
    levels = np.ma.array([-1, np.nan, 1], np.float32, mask=[0, 1, 0])
    with pytest.raises(TypeError, match="levels: expected a NumPy array or a torch tensor, got MaskedArray"):
        QuantizedTensor(np.ones((4, 4), np.uint8), levels, np.ones(4, F32))


def test_a_linear_input_that_has_to_be_copied_may_overlap_out() -> None:
    buffer = np.arange(24, dtype=F32)
    x, out = buffer.reshape(2, 2, 6).transpose(1, 0, 2), buffer[:20].reshape(2, 2, 5)
    expected = ops.linear(x.copy(), LINEAR)
    try:
        ops.linear(x, LINEAR, out=out)
    except ValueError as error:
        assert str(error) == APART.format("x")
    else:
        np.testing.assert_array_equal(out, expected)


# ---- a packed layer, a file, a setting -----------------------------------------------------------------------------

OTHERS: dict[str, ERRORS] = {
    "warmup rank": (
        lambda: FLOAT.warmup((3, 5, 5)),
        ValueError,
        "x: expected float32 (N, 3, H, W), got float32 (3, 5, 5)",
    ),
    "warmup size": (
        lambda: FLOAT.warmup((1, 3, -1, 5)),
        ValueError,
        "shape: expected an integer >= 0, got -1",
    ),
    "warmup text": (
        lambda: FLOAT.warmup("1355"),  # type: ignore[arg-type]
        TypeError,
        "shape: expected an integer, got str",
    ),
    "warmup number": (
        lambda: FLOAT.warmup(5),  # type: ignore[arg-type]
        TypeError,
        "shape: expected a sequence of integers, got int",
    ),
    "instruction set": (
        lambda: pycodesign.set_isa("sse9"),
        ValueError,
        "name: expected one of scalar, avx2, avx2_vnni, avx512, avx512_vbmi, avx512_amx, got 'sse9'",
    ),
    "no threads": (
        lambda: pycodesign.set_num_threads(0),
        ValueError,
        "n: expected a number from 1 to 4096, got 0",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others(name: str) -> None:
    call, exception, message = OTHERS[name]
    with pytest.raises(exception, match=exactly(message)):
        call()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none"))):
        ops.load_packed(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none"))):
        FLOAT.save(tmp_path / "none" / "layer")
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        ops.load_packed(tmp_path)


def test_outputs_too_large_for_memory() -> None:
    packed = conv(Q, padding=1 << 24)
    with pytest.raises(MemoryError):
        ops.conv2d(X, packed)


def test_torch_tensor_that_is_not_in_host_memory() -> None:
    import torch

    x = torch.empty(1, 3, 5, 5, device="meta")
    with pytest.raises(TypeError, match=r"^x: expected an array in host memory, got a tensor on meta$"):
        ops.conv2d(x, FLOAT)
    with pytest.raises(TypeError, match=exactly("x: expected float32 (N, 3, H, W), got float64 (1, 3, 5, 5)")):
        ops.conv2d(torch.zeros(1, 3, 5, 5, dtype=torch.float64), FLOAT)
    with pytest.raises(TypeError, match=r"^x: expected a dtype that NumPy has, got torch.bfloat16$"):
        ops.conv2d(torch.zeros(1, 3, 5, 5, dtype=torch.bfloat16), FLOAT)


def test_torch_tensors_that_numpy_cannot_view() -> None:
    import torch

    with pytest.raises(TypeError, match=r"^x: expected a strided tensor, got torch.sparse_coo$"):
        ops.linear(torch.zeros(2, 6).to_sparse(), LINEAR)
    x, out = (torch.ones(2, n, dtype=torch.complex64).conj().imag for n in (6, 5))  # negated by a flag
    with pytest.raises(TypeError, match=r"^x: expected a tensor that NumPy can view, got another: .*resolve_neg"):
        ops.linear(x, LINEAR)
    with pytest.raises(TypeError, match=r"^out: expected a tensor that NumPy can view, got another: .*resolve_neg"):
        ops.linear(x.resolve_neg(), LINEAR, out=out)


def test_an_error_in_the_first_call_does_not_end_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "COLD_BYTES", 1 << 16)
    packed = lin(QL, tune=True)
    with pytest.raises(ValueError, match=r"^out_scale: expected None "):
        ops.linear(XL, packed, out_scale=1)
    ops.linear(XL, packed)
    assert packed.explain()["why"].startswith("measured cold: ")


# ---- the native module, called directly ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": np.full((2, 4), 3, np.uint8)}, "codes: expected values below 3, got 3"),
        ({"codes": np.zeros((2, 4), np.int64)}, "codes: expected uint8 (O, I), got int64 (2, 4)"),
        ({"codes": np.zeros((2, 0), np.uint8)}, "codes: expected at least one output, input and level"),
        ({"codes": np.zeros((4, 2), np.uint8).T}, "codes, levels, scale: expected C order"),
        ({"levels": np.zeros((3, 3), F32)}, "levels: expected (1 or O, Q), got float32 (3, 3)"),
        ({"levels": np.zeros(3, F32)}, "levels: expected float32 (1 or O, Q), got float32 (3,)"),
        ({"scale": np.ones((3, 1), F32)}, "scale: expected float32 (O, G), got float32 (3, 1)"),
        ({"bias": np.zeros(3, F32)}, "bias: expected float32 (2,), got float32 (3,)"),
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
