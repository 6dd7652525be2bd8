"""What `pycodesign.ops.conv2d` and `linear` compute, and the steps of a chain beside them.

A weight takes one of Q values, so a dot product is a sum over levels of sums of inputs (UCNN, Hegde et al., ISCA 2018,
section III, the factorized dot product; Q-gym, Fu et al., PACT 2022, starts from the same form):

    acc[o] = sum_i levels[codes[o, i]] * x[i] = sum_q levels[q] * sum_{i: codes[o, i] = q} x[i]

Both forms are equal; this file computes the first in float64. Sums of integers are exact there (below 2^53), so for
integer inputs every result is exact: the order of the float32 steps in `_finish` is part of the specification.
A codebook's sum is one of sums: each small kernel's convolution of a channel, computed once,

    acc[o] = sum_j sign[o, j] * (kernels[c(j), index[o, j]] * x)[j]

and equal, too. For float inputs it is the value to come near to: within 8 eps sqrt(K) `abs_bound`, K terms a sum,
eps = 2^-23, and one rounding to 16-bit outputs.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pycodesign.quantize import KernelCodebook, QuantizedTensor

Array: TypeAlias = NDArray[Any]
Pair: TypeAlias = int | tuple[int, int]


@np.errstate(all="ignore")  # NaN, Inf and overflow follow IEEE 754
def conv2d(
    x: Array,
    q: QuantizedTensor | KernelCodebook,
    bias: Array | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    input_scale: float = 1.0,
    input_zero_point: int = 0,
    residual: Array | None = None,
    **epilogue: Any,
) -> Array:
    """Convolve x (N, C, H, W) with weights (O, C / groups, R, S); the result is (N, O, OH, OW).

    Parameters
    ----------
    x : float16, bfloat16, float32, float64, uint8 or int8 (N, C, H, W)
    q : QuantizedTensor or KernelCodebook (O, C / groups, R, S)
    bias : float32 (O,), optional
    residual : float16, bfloat16, float32, uint8 or int8 (N, O, OH, OW), optional
    **epilogue
        Of `ops.conv2d`: residual_scale, residual_zero_point, clamp, out_dtype, out_scale, out_zero_point. For float
        inputs out_dtype="float64" returns the result unrounded.
    """
    acc = _sum_conv2d(x.astype(np.float64) - input_zero_point, q.decode(), stride, padding, dilation, groups)
    acc = np.moveaxis(acc, 1, -1)[..., None]  # (N, OH, OW, O, 1)
    if residual is not None:
        residual = np.moveaxis(residual, 1, -1)
    y = _finish(x.dtype, acc, q.scale[:, None], bias, input_scale, residual=residual, **epilogue)
    return np.ascontiguousarray(np.moveaxis(y, -1, 1))


@np.errstate(all="ignore")  # NaN, Inf and overflow follow IEEE 754
def linear(
    x: Array,
    q: QuantizedTensor | KernelCodebook,
    bias: Array | None = None,
    *,
    input_scale: float = 1.0,
    input_zero_point: int = 0,
    **epilogue: Any,
) -> Array:
    """Multiply x (..., I) by weights (O, I) transposed; the result is (..., O). Arguments are those of `conv2d`."""
    scale = q.scale.reshape(q.shape[0], -1)  # (O, G)
    real = np.split(x.astype(np.float64) - input_zero_point, scale.shape[1], axis=-1)
    levels = np.split(q.decode().astype(np.float64), scale.shape[1], axis=-1)
    acc = np.stack([part @ level.T for part, level in zip(real, levels, strict=True)], axis=-1)  # (..., O, G)
    return _finish(x.dtype, acc, scale, bias, input_scale, **epilogue)


def max_pool2d(x: Array, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0, dilation: Pair = 1) -> Array:
    """Take the largest value of each window of x (N, C, H, W); NaN wins, padding never does."""
    lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    return np.asarray(_windows(x, lowest, kernel_size, stride, padding, dilation).max(axis=(-2, -1)))


@np.errstate(all="ignore")  # NaN, Inf and overflow follow IEEE 754
def avg_pool2d(
    x: Array,
    kernel_size: Pair | None = None,
    stride: Pair | None = None,
    padding: Pair = 0,
    *,
    count_include_pad: bool = True,
    input_scale: float = 1.0,
    input_zero_point: int = 0,
    **epilogue: Any,
) -> Array:
    """Average each window of x (N, C, H, W), or each image: its sum times float32(input_scale / pixels).

    Padding is a real zero, and one of the pixels if `count_include_pad`. The epilogue is that of `conv2d`, which has no
    bias and no residual here.
    """
    windows = (x.shape[2], x.shape[3]) if kernel_size is None else kernel_size, stride, padding
    acc = _windows(x.astype(np.float64) - input_zero_point, 0, *windows).sum(axis=(-2, -1))
    data = _windows(np.ones(x.shape[2:]), float(count_include_pad), *windows).sum(axis=(-2, -1))
    scale = (input_scale / data).reshape(-1, 1)
    y = _finish(x.dtype, acc.reshape(*acc.shape[:2], -1, 1), scale, None, 1.0, **epilogue)
    return np.asarray(y.reshape(acc.shape))


@np.errstate(all="ignore")  # NaN, Inf and overflow follow IEEE 754
def add(
    a: Array, b: Array | None = None, *, input_scale: float = 1.0, input_zero_point: int = 0, **epilogue: Any
) -> Array:
    """Convert a, of the given scale and zero point, by the epilogue of `conv2d`, whose residual is b."""
    acc = (a.astype(np.float64) - input_zero_point)[..., None]
    return _finish(a.dtype, acc, np.ones((1, 1)), None, input_scale, residual=b, **epilogue)


def abs_bound(
    x: Array,
    q: QuantizedTensor | KernelCodebook,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Array:
    """Return sum |w||x| in float64, the shape of the result: the unit of the error bound of float inputs."""
    magnitude, weights = np.abs(x.astype(np.float64)), np.abs(q.dequantize().astype(np.float64))
    if weights.ndim == 2:
        return np.asarray(magnitude @ weights.T)
    return _sum_conv2d(magnitude, weights, stride, padding, dilation, groups)


def _sum_conv2d(x: Array, w: Array, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Array:
    (sh, sw), (ph, pw), (dh, dw) = _pair(stride), _pair(padding), _pair(dilation)
    n, c, h, width = x.shape
    o, _, r, s = w.shape
    oh, ow = (h + 2 * ph - dh * (r - 1) - 1) // sh + 1, (width + 2 * pw - dw * (s - 1) - 1) // sw + 1
    if min(oh, ow) < 1:
        raise ValueError(f"x: expected height and width that hold the kernel, got {x.shape}")
    x = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    acc = np.zeros((n, groups, o // groups, oh * ow))
    for i in range(r):
        for j in range(s):
            seen = x[:, :, i * dh :, j * dw :][:, :, : (oh - 1) * sh + 1 : sh, : (ow - 1) * sw + 1 : sw]
            tap = w[:, :, i, j].reshape(groups, o // groups, c // groups).astype(np.float64)
            acc += tap @ seen.reshape(n, groups, c // groups, oh * ow)
    return acc.reshape(n, o, oh, ow)


def _windows(
    x: Array, padding_value: float, size: Pair, stride: Pair | None, padding: Pair, dilation: Pair = 1
) -> Array:
    """View x (..., H, W) as windows (..., OH, OW, R, S)."""
    (r, s), (ph, pw), (dh, dw) = _pair(size), _pair(padding), _pair(dilation)
    sh, sw = (r, s) if stride is None else _pair(stride)
    x = np.pad(x, ((0, 0),) * (x.ndim - 2) + ((ph, ph), (pw, pw)), constant_values=padding_value)
    spans = dh * (r - 1) + 1, dw * (s - 1) + 1
    windows = np.lib.stride_tricks.sliding_window_view(x, spans, axis=(-2, -1))
    return windows[..., ::sh, ::sw, ::dh, ::dw]


def _finish(
    input_dtype: np.dtype[Any],
    acc: Array,
    scale: Array,
    bias: Array | None,
    input_scale: float,
    *,
    residual: Array | None = None,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    clamp: tuple[float | None, float | None] | None = None,
    out_dtype: str = "float32",
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> Array:
    """Turn the sums acc (..., O, G), with scale (O, G), into the result (..., O).

    Every line is one rounding to float32 per operation for integer inputs, to float64 for float inputs. Scalars are
    float32 values in both.
    """
    integer = input_dtype.kind in "iu"
    if integer and np.abs(acc).sum(axis=-1).max(initial=0) > np.iinfo(np.int32).max:
        raise OverflowError("acc: expected sums within int32")
    if out_dtype == "int32":
        return np.asarray(acc.sum(axis=-1), np.int32)

    real = np.float32 if integer else np.float64
    f32 = np.float32
    m = (np.float64(input_scale) * scale.astype(np.float64)).astype(real)
    y = acc[..., 0].astype(real) * m[:, 0]
    for g in range(1, acc.shape[-1]):
        y = y + acc[..., g].astype(real) * m[:, g]
    if bias is not None:
        y = y + bias.astype(real)
    if residual is not None:
        y = y + real(f32(residual_scale)) * (residual.astype(real) - real(residual_zero_point))
    low, high = clamp if clamp is not None else (None, None)
    if low is not None:
        y = np.where(y < f32(low), real(f32(low)), y)  # NaN stays
    if high is not None:
        y = np.where(y > f32(high), real(f32(high)), y)
    if out_dtype not in ("uint8", "int8"):
        return np.asarray(y, out_dtype)

    limits = np.iinfo(out_dtype)
    t = y / real(f32(1.0 if out_scale is None else out_scale))
    t = np.fmax(t, real(limits.min - out_zero_point))  # NaN becomes the least value
    t = np.minimum(t, real(limits.max - out_zero_point))
    return np.asarray(np.rint(t) + out_zero_point, out_dtype)


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
