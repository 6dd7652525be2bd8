"""Chains: each mistake has its exception and its full message, and leaves `out` as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pycodesign import _core, ops
from pycodesign.quantize import QuantizedTensor
from pycodesign.repetition.chain import Chain, Value

F32 = np.float32

Q = QuantizedTensor(np.ones((4, 3, 3, 3), np.uint8), np.array([-1, 1], F32), np.ones(4, F32))
QL = QuantizedTensor(np.ones((4, 12), np.uint8), np.array([-1, 1], F32), np.ones(4, F32))
FLOAT, FLAT = ops.prepack_conv2d(Q), ops.prepack_linear(QL)
BYTES = ops.prepack_conv2d(Q, input_dtype="uint8", input_scale=0.5, input_zero_point=3)
SIGNED = ops.prepack_conv2d(Q, input_dtype="int8", input_scale=0.5, input_zero_point=3)


def byte_input(chain: Chain) -> Value:
    return chain.input("uint8", 0.5, 3)


def exact_sums_of(chain: Chain) -> Value:
    return chain.conv2d(byte_input(chain), BYTES, out_dtype="int32")


Mistake = tuple[Callable[[Chain], Any], type[Exception], str]

BUILDING: dict[str, Mistake] = {
    "input dtype": (
        lambda c: c.input("float64"), ValueError,
        "dtype: expected 'float32', 'uint8' or 'int8', got 'float64'",
    ),
    "input dtype as list": (
        lambda c: c.input(["uint8"]), ValueError,
        "dtype: expected 'float32', 'uint8' or 'int8', got ['uint8']",
    ),
    "scale of floats": (
        lambda c: c.input("float32", 0.5), ValueError,
        "scale, zero_point: expected their defaults for float32, got 0.5 and 0",
    ),
    "zero point of floats": (
        lambda c: c.input("float32", 1, 1), ValueError,
        "scale, zero_point: expected their defaults for float32, got 1.0 and 1",
    ),
    "zero point": (
        lambda c: c.input("int8", 1, 128), ValueError,
        "zero_point: expected a value of int8, got 128",
    ),
    "fractional zero point": (
        lambda c: c.input("int8", 1, 0.5), TypeError,
        "zero_point: expected an integer, got float",
    ),
    "no scale": (
        lambda c: c.input("uint8", 0), ValueError,
        "scale: expected a positive finite number, got 0.0",
    ),
    "scale as text": (
        lambda c: c.input("uint8", "1"), TypeError,
        "scale: expected a number, got str",
    ),
    "x as array": (
        lambda c: c.conv2d(np.ones((1, 3, 5, 5), F32), FLOAT), TypeError,
        "x: expected a Value, got ndarray",
    ),
    "x of another chain": (
        lambda c: c.conv2d(Chain().input(), FLOAT), ValueError,
        "x: expected a value of this chain, got one of another",
    ),
    "x of another chain, pooled": (
        lambda c: c.max_pool2d(Chain().input(), 2), ValueError,
        "x: expected a value of this chain, got one of another",
    ),
    "x of int32": (
        lambda c: c.max_pool2d(exact_sums_of(c), 2), ValueError,
        "x: expected float32, uint8 or int8, got int32",
    ),
    "a of int32": (
        lambda c: c.add(exact_sums_of(c)), ValueError,
        "a: expected float32, uint8 or int8, got int32",
    ),
    "b of int32": (
        lambda c: c.add(c.input(), exact_sums_of(c)), ValueError,
        "b: expected float32, uint8 or int8, got int32",
    ),
    "b of another chain": (
        lambda c: c.add(c.input(), Chain().input()), ValueError,
        "b: expected a value of this chain, got one of another",
    ),
    "residual of int32": (
        lambda c: c.conv2d(c.input(), FLOAT, residual=exact_sums_of(c)), ValueError,
        "residual: expected float32, uint8 or int8, got int32",
    ),
    "residual as array": (
        lambda c: c.conv2d(c.input(), FLOAT, residual=np.ones((1, 4, 3, 3), F32)), TypeError,
        "residual: expected a Value, got ndarray",
    ),
    "residual of another chain": (
        lambda c: c.linear(c.input(), FLAT, residual=Chain().input()), ValueError,
        "residual: expected a value of this chain, got one of another",
    ),
    "weights": (
        lambda c: c.conv2d(c.input(), Q), TypeError,
        "packed: expected a Packed conv2d layer, got QuantizedTensor",
    ),
    "a linear layer": (
        lambda c: c.conv2d(c.input(), FLAT), ValueError,
        "packed: expected a Packed conv2d layer, got a linear layer",
    ),
    "a convolution": (
        lambda c: c.linear(c.input(), FLOAT), ValueError,
        "packed: expected a Packed linear layer, got a conv2d layer",
    ),
    "a layer to be tuned": (
        lambda c: c.linear(c.input(), ops.prepack_linear(QL, tune=True)), ValueError,
        "packed: expected a layer that has been tuned (call its warmup first), got one to be tuned",
    ),
    "floats for integers": (
        lambda c: c.conv2d(c.input(), BYTES), ValueError,
        "x: expected uint8 of scale 0.5 and zero point 3, as the layer was packed for, got float32",
    ),
    "integers for floats": (
        lambda c: c.conv2d(byte_input(c), FLOAT), ValueError,
        "x: expected float32, as the layer was packed for, got uint8 of scale 0.5 and zero point 3",
    ),
    "unsigned for signed": (
        lambda c: c.conv2d(byte_input(c), SIGNED), ValueError,
        "x: expected int8 of scale 0.5 and zero point 3, as the layer was packed for, "
        "got uint8 of scale 0.5 and zero point 3",
    ),
    "another scale": (
        lambda c: c.conv2d(c.input("uint8", 0.25, 3), BYTES), ValueError,
        "x: expected uint8 of scale 0.5 and zero point 3, as the layer was packed for, "
        "got uint8 of scale 0.25 and zero point 3",
    ),
    "another zero point": (
        lambda c: c.conv2d(c.conv2d(byte_input(c), BYTES, out_dtype="uint8", out_scale=0.5), BYTES), ValueError,
        "x: expected uint8 of scale 0.5 and zero point 3, as the layer was packed for, "
        "got uint8 of scale 0.5 and zero point 0",
    ),
    "clamp": (
        lambda c: c.conv2d(c.input(), FLOAT, clamp=(1, 0)), ValueError,
        "clamp: expected lowest <= highest, got (1, 0)",
    ),
    "out_dtype": (
        lambda c: c.add(c.input(), out_dtype="float16"), ValueError,
        "out_dtype: expected 'float32', 'uint8', 'int8' or 'int32', got 'float16'",
    ),
    "no out_scale": (
        lambda c: c.add(c.input(), out_dtype="uint8"), ValueError,
        "out_scale: expected a positive number for out_dtype 'uint8', got None",
    ),
    "out_scale of floats": (
        lambda c: c.avg_pool2d(c.input(), out_scale=1), ValueError,
        "out_scale: expected None for out_dtype 'float32', got a number",
    ),
    "out_zero_point": (
        lambda c: c.linear(c.input(), FLAT, out_dtype="int8", out_scale=1, out_zero_point=-129), ValueError,
        "out_zero_point: expected a value of int8, got -129",
    ),
    "exact sums of floats": (
        lambda c: c.avg_pool2d(c.input(), out_dtype="int32"), ValueError,
        "out_dtype: expected 'float32', 'uint8' or 'int8' for float32 inputs, got 'int32'",
    ),
    "exact sums with b": (
        lambda c: c.add(byte_input(c), c.input(), out_dtype="int32"), ValueError,
        "out_dtype: 'int32' gives the exact sums; expected no residual and no clamp with it",
    ),
    "no kernel": (
        lambda c: c.max_pool2d(c.input(), 0), ValueError,
        "kernel_size: expected an integer >= 1, got 0",
    ),
    "kernel None": (
        lambda c: c.max_pool2d(c.input(), None), TypeError,
        "kernel_size: expected an integer, got NoneType",
    ),
    "kernel of three": (
        lambda c: c.avg_pool2d(c.input(), (2, 2, 2)), ValueError,
        "kernel_size: expected an integer or a pair, got (2, 2, 2)",
    ),
    "kernel beyond any image": (
        lambda c: c.avg_pool2d(c.input(), 1 << 25), ValueError,
        "kernel_size: expected an integer <= 16777216, got 33554432",
    ),
    "no stride": (
        lambda c: c.max_pool2d(c.input(), 2, stride=0), ValueError,
        "stride: expected an integer >= 1, got 0",
    ),
    "no dilation": (
        lambda c: c.max_pool2d(c.input(), 2, dilation=(1, 0)), ValueError,
        "dilation: expected an integer >= 1, got 0",
    ),
    "negative padding": (
        lambda c: c.avg_pool2d(c.input(), 2, padding=-1), ValueError,
        "padding: expected an integer >= 0, got -1",
    ),
    "padding beyond half of the kernel": (
        lambda c: c.max_pool2d(c.input(), (4, 3), padding=2), ValueError,
        "padding: expected at most half of the kernel (4, 3), got (2, 2)",
    ),
    "stride without a kernel": (
        lambda c: c.avg_pool2d(c.input(), stride=2), ValueError,
        "kernel_size: expected one with a stride or padding, got None",
    ),
    "padding without a kernel": (
        lambda c: c.avg_pool2d(c.input(), padding=(0, 1)), ValueError,
        "kernel_size: expected one with a stride or padding, got None",
    ),
    "no outputs": (
        lambda c: c.output(), ValueError,
        "values: expected one value or more, each once, got 0",
    ),
    "an input as output": (
        lambda c: c.output(c.input()), ValueError,
        "values: expected values that a step made, got an input",
    ),
    "an array as output": (
        lambda c: c.output(np.ones(3)), TypeError,
        "values: expected a Value, got ndarray",
    ),
    "an output of another chain": (
        lambda c: c.output(exact_sums_of(Chain())), ValueError,
        "values: expected a value of this chain, got one of another",
    ),
    "an unused chain": (
        lambda c: c(np.ones((1, 3, 5, 5), F32)), ValueError,
        "output: expected to be called before the chain is, got a chain without outputs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILDING)
def test_building(name: str) -> None:
    call, exception, message = BUILDING[name]
    with pytest.raises(exception, match=f"^{re.escape(message)}$"):
        call(Chain())


def test_outputs_come_once_and_last() -> None:
    chain = Chain()
    x = chain.input()
    y = chain.add(x)
    with pytest.raises(ValueError, match=r"^values: expected one value or more, each once, got 2$"):
        chain.output(y, y)
    z = chain.max_pool2d(y, 2)  # still open
    chain.output(y, z)
    steps: list[Callable[[], Any]] = [
        lambda: chain.input(),
        lambda: chain.conv2d(x, FLOAT),
        lambda: chain.linear(x, FLAT),
        lambda: chain.max_pool2d(x, 2),
        lambda: chain.avg_pool2d(x),
        lambda: chain.add(x),
        lambda: chain.output(y),
    ]
    for step in steps:
        with pytest.raises(ValueError, match=r"^output: expected to be the last step, got a step after it$"):
            step()
    assert [y.shape for y in chain(np.ones((1, 3, 5, 5), F32))] == [(1, 3, 5, 5), (1, 3, 2, 2)]


def test_a_mistake_leaves_the_chain_as_it_was() -> None:
    chain = Chain()
    x = chain.input()
    for mistake in (lambda: chain.add(x, out_dtype="uint8"), lambda: chain.avg_pool2d(x, out_scale=1)):
        with pytest.raises(ValueError, match=r"^out_scale: "):
            mistake()
    chain.output(chain.add(x))
    assert len(chain.plan((1, 2, 3, 4))) == 2
    np.testing.assert_array_equal(chain(np.ones((1, 2, 3, 4), F32))[0], np.ones((1, 2, 3, 4), F32))


def build_pair() -> Chain:
    chain = Chain()
    x, other = chain.input(), byte_input(chain)
    y = chain.conv2d(x, FLOAT, residual=other)
    chain.output(y, chain.linear(chain.avg_pool2d(y), ops.prepack_linear(QuantizedTensor(QL.codes[:, :4], *QL_REST))))
    return chain


QL_REST = QL.levels, QL.scale
X, X8 = np.ones((1, 3, 5, 6), F32), np.full((1, 4, 3, 4), 3, np.uint8)
BUFFER = np.zeros(300, F32)
UNALIGNED = np.zeros(361, np.uint8)[1:].view(F32).reshape(X.shape)
Y, YL = np.full((1, 4, 3, 4), 7, F32), np.full((1, 4), 7, F32)

CALLS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "no arrays": ((), None, TypeError, "inputs: expected 2 arrays, got 0"),
    "too many arrays": ((X, X8, X), None, TypeError, "inputs: expected 2 arrays, got 3"),
    "a list": ((X.tolist(), X8), None, TypeError, "inputs: expected NumPy arrays, got list"),
    "dtype": ((X.astype(float), X8), None, TypeError, "inputs: expected float32 (N, C, H, W) or (N, I), got float64"),
    "byte order": ((X.astype(">f4"), X8), None, TypeError, "inputs: expected float32 (N, C, H, W) or (N, I), got >f4"),
    "signed": ((X, X8.view("i1")), None, TypeError, "inputs: expected uint8 (N, C, H, W) or (N, I), got int8"),
    "rank": ((X[0], X8), None, ValueError, "inputs: expected float32 (N, C, H, W) or (N, I), got (3, 5, 6)"),
    "no rank": ((X, np.array(3, np.uint8)), None, ValueError,
                "inputs: expected uint8 (N, C, H, W) or (N, I), got ()"),
    "unaligned": ((UNALIGNED, X8), None, ValueError,
                  "inputs: expected elements aligned in memory, got an unaligned view"),
    "channels": ((X[:, :2], X8), None, ValueError, "x: expected (N, 3, H, W) for a convolution, got (1, 2, 5, 6)"),
    "rows": ((X[:, :, 0, 0][:, :2], X8), None, ValueError,
             "x: expected (N, 3, H, W) for a convolution, got (1, 2, 1, 1)"),
    "residual": ((X, X8[:, :, :2]), None, ValueError, "residual: expected the shape (1, 4, 3, 4), got (1, 4, 2, 4)"),
    "residual images": ((X, np.tile(X8, (2, 1, 1, 1))), None, ValueError,
                        "residual: expected the shape (1, 4, 3, 4), got (2, 4, 3, 4)"),
    "out as array": ((X, X8), Y, TypeError, "out: expected a sequence of NumPy arrays, got ndarray"),
    "out of lists": ((X, X8), [Y.tolist(), YL], TypeError, "out: expected a sequence of NumPy arrays, got list"),
    "one out": ((X, X8), [Y], ValueError, "out: expected 2 arrays, got 1"),
    "out dtype": ((X, X8), [Y, YL.astype(float)], TypeError, "out: expected float32 (1, 4), got float64 (1, 4)"),
    "out shape": ((X, X8), [Y[..., :3], YL], ValueError,
                  "out: expected float32 (1, 4, 3, 4), got float32 (1, 4, 3, 3)"),
    "out rank": ((X, X8), [Y, YL.reshape(1, 4, 1, 1)], ValueError,
                 "out: expected float32 (1, 4), got float32 (1, 4, 1, 1)"),
    "out order": ((X, X8), [Y.reshape(1, 4, 4, 3).transpose(0, 1, 3, 2), YL], ValueError,
                  "out: expected C order, got other strides"),
    "read-only out": ((X, X8), [Y, np.frombuffer(YL.tobytes(), F32).reshape(1, 4)], ValueError,
                      "out: expected a writeable array, got a read-only or broadcast one"),
    "broadcast out": ((X, X8), [np.lib.stride_tricks.as_strided(BUFFER, Y.shape, (0, 0, 0, 4)), YL], ValueError,
                      "out: expected a writeable array, got a read-only or broadcast one"),
    "out over an input": ((BUFFER[:90].reshape(X.shape), X8), [BUFFER[89:137].reshape(Y.shape), YL], ValueError,
                          "out: expected memory apart from the inputs, got an array that overlaps it"),
    "out over an out": ((X, X8), [BUFFER[:48].reshape(Y.shape), BUFFER[47:51].reshape(1, 4)], ValueError,
                        "out: expected memory apart from the other outputs, got an array that overlaps it"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calling(name: str) -> None:
    inputs, out, exception, message = CALLS[name]
    arrays = [array for array in out or () if isinstance(array, np.ndarray)] if isinstance(out, list) else [Y, YL]
    before = [array.copy() for array in arrays]
    with pytest.raises(exception, match=f"^{re.escape(message)}$"):
        build_pair()(*inputs, out=out)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_promised_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain()
    packed = ops.prepack_conv2d(Q, input_dtype="uint8", input_bits=4)
    chain.output(chain.conv2d(chain.input("uint8"), packed))
    x = np.full((1, 3, 5, 5), 15, np.uint8)
    x[0, 1, 2, 3] = 16
    chain(x)  # may be wrong, does not crash
    monkeypatch.setenv("PYCODESIGN_CHECK", "1")
    with pytest.raises(ValueError, match=r"^inputs: expected values of 4 bits, 0 to 15, got 15 to 16$"):
        chain(x)
    chain(x & 15)


def test_sizes_that_do_not_fit() -> None:
    chain = Chain()
    a, b = chain.input(), chain.input()
    chain.output(chain.add(a, b))
    with pytest.raises(ValueError, match=r"^b: expected the shape \(1, 3, 5, 6\), got \(3, 5, 1, 1\)$"):
        chain(X, X[0, ..., 0])
    chain = Chain()
    chain.output(chain.linear(chain.input(), FLAT))
    with pytest.raises(ValueError, match=r"^x: expected 12 values a row for a linear layer, got \(1, 3, 5, 6\)$"):
        chain(X)
    chain = Chain()
    chain.output(chain.avg_pool2d(byte_input(chain)))
    with pytest.raises(
        ValueError, match=r"^x: expected windows of 8-bit values whose sums fit 32 bits, got \(1, 1, 4096, 4096\)$"
    ):
        chain(np.broadcast_to(np.uint8(255), (1, 1, 4096, 4096)))


@pytest.mark.parametrize(
    ("shapes", "exception", "message"),
    [
        ((), TypeError, "shapes: expected 1, got 0"),
        (((1, 3, 5, 5), (1, 3)), TypeError, "shapes: expected 1, got 2"),
        (((1, 3, 5),), ValueError, "shapes: expected (N, C, H, W) or (N, I), got (1, 3, 5)"),
        ((3,), ValueError, "shapes: expected (N, C, H, W) or (N, I), got 3"),
        (((1, 3, -5, 5),), ValueError, "shapes: expected an integer >= 0, got -5"),
        (((1, 3, 5.0, 5),), TypeError, "shapes: expected an integer, got float"),
        (((1, 2, 5, 5),), ValueError, "x: expected (N, 3, H, W) for a convolution, got (1, 2, 5, 5)"),
    ],
)
def test_planning(shapes: Any, exception: type[Exception], message: str) -> None:
    chain = Chain()
    chain.output(chain.conv2d(chain.input(), FLOAT))
    with pytest.raises(exception, match=f"^{re.escape(message)}$"):
        chain.plan(*shapes)
    assert chain.plan((2, 3)) == [((2, 3, 1, 1), "plain"), ((2, 4, 0, 0), "plain")]


def test_native() -> None:
    """Called directly, it reads no value and no array that is not there."""
    chain = _core.Chain()
    x = chain.add_input("float32")
    epilogue = (None, None, "float32", None, 0)
    for value in (-1, 1, 99):
        with pytest.raises(IndexError):
            chain.add_max_pool2d(value, (1, 1), (1, 1), (0, 0), (1, 1))
        with pytest.raises(IndexError):
            chain.add_layer(FLOAT._native, False, value, -1, 1, 0, *epilogue)
        with pytest.raises(IndexError):
            chain.set_outputs([value])
    with pytest.raises(IndexError):
        chain.add_add(x, 99, 1, 0, 1, 0, *epilogue)
    with pytest.raises(TypeError, match=r"^layer: expected a PackedConv2d, got another layer$"):
        chain.add_layer(FLAT._native, False, x, -1, 1, 0, *epilogue)
    chain.set_outputs([chain.add_add(x, -1, 1, 0, 1, 0, *epilogue)])
    for inputs, out, rows in (([], None, [False]), ([X, X], None, [False]), ([X], None, []), ([X], [], [False])):
        with pytest.raises(ValueError, match=r"^inputs, out, rows: expected one for each input and output$"):
            chain.run(inputs, out, rows)
    for array in (X.astype(float), X8, X[0]):
        with pytest.raises(
            (TypeError, ValueError), match=r"^inputs: expected float32 \(N, C, H, W\) or \(N, I\), got "
        ):
            chain.run([array], None, [False])
