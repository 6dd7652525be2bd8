"""Bad `out`: its type, shape, memory and overlaps, each with its full message; memory that lies apart is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_layers import FLOAT, LINEAR, XL, XT, YT, X, Y, exactly

from pycodesign import ops, quantize

F32 = np.float32
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
