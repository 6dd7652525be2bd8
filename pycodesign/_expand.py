"""Weights expanded by index, in host memory and on GPUs."""

from __future__ import annotations

import numpy as np

from pycodesign import _core
from pycodesign._arguments import Array, check_scale, from_numpy, to_index, to_raw, to_scale
from pycodesign._device import Device, find_device, is_on, load_native

NUMBERS = "numbers of 1, 2, 4 or 8 bytes in native order"


def expand(
    w: Array,
    out_index: Array,
    in_index: Array | None = None,
    *,
    in_scale: Array | None = None,
    out_scale: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Copy rows and columns of a weight by index, scaled on the way: a larger layer from a smaller one.

    ::

        y[r, c, ...] = (w[out_index[r], in_index[c], ...] * in_scale[c]) * out_scale[r]

    Without scales elements are copied bit by bit. float32 and float64 are rounded after each product; float16 and
    bfloat16 are multiplied in float32 and rounded once, to nearest even.

    If `w` is on a CUDA device, indices and scales are best there, too. Nobody reads them before they are used: an index
    out of range writes zeros, as -1 does, and scales may be infinite. Those in host memory are checked and copied,
    which a CUDA graph cannot capture.

    Parameters
    ----------
    w : array (O,), (O, I), (O, I, H) or (O, I, H, W)
        Of float16, bfloat16, float32, float64, or, without scales, of any dtype of 1, 2, 4 or 8 bytes; any strides.
    out_index : integer (R,)
        Rows of `w`; -1 writes zeros.
    in_index : integer (C,), optional
        Columns of `w`; -1 writes zeros. Every column in its place by default.
    in_scale : (C,), optional
    out_scale : (R,), optional
        Finite factors; float64 for float64 `w`, float32 for other floats.
    out : array (R, C, H, W), optional
        Written and returned. Of the dtype of `w`, apart from it in memory; the elements of a row follow one another.

    Returns
    -------
    array (R,), (R, C), (R, C, H) or (R, C, H, W)
        Of the kind and dtype of `w`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came. Nothing is written then.
    RuntimeError
        For arrays on a CUDA device where there are no kernels for it, saying why.

    References
    ----------
    Fu et al., "TripLe", ICCV 2023.

    Examples
    --------
    One more input, a copy of the first, and zeros for a third output; both copies count half:

    >>> import numpy as np
    >>> from pycodesign import ops
    >>> w = np.array([[2.0, 3.0], [4.0, 5.0]], np.float32)
    >>> half = np.array([0.5, 1.0, 0.5], np.float32)
    >>> ops.expand(w, np.array([0, 1, -1]), np.array([0, 1, 0]), in_scale=half)
    array([[1., 3., 1.],
           [2., 5., 2.],
           [0., 0., 0.]], dtype=float32)
    """
    device = find_device(w=w, out=out)
    if device is not None:
        return _expand_on(device, w, out_index, in_index, in_scale, out_scale, out)
    given, kind, dtype = to_raw("w", w)
    if not given.dtype.isnative or given.itemsize not in (1, 2, 4, 8) or given.dtype.kind not in "biufc":
        raise TypeError(f"w: expected {NUMBERS}, got {given.dtype} {given.shape}")
    _check_dimensions(given.shape, in_index, in_scale)
    rows = to_index("out_index", out_index, given.shape[0])
    columns = None if in_index is None else to_index("in_index", in_index, given.shape[1])
    shape = (rows.size, *(given.shape[1:2] if columns is None else columns.shape), *given.shape[2:])
    inputs = None if in_scale is None else to_scale("in_scale", in_scale, dtype, shape[1])
    outputs = None if out_scale is None else to_scale("out_scale", out_scale, dtype, shape[0])
    target = None
    if out is not None:
        target, _, out_dtype = to_raw("out", out)
        _check_out(out_dtype, target.shape, dtype, shape)
    if given.ndim == 1:  # one row, whose columns are the elements
        target = None if target is None else target[None]
        y = _core.expand(given[None], dtype, np.zeros(1, np.int64), rows, outputs, None, target)[0]
    else:
        y = _core.expand(given, dtype, rows, columns, inputs, outputs, target)
    if out is not None:
        return out
    if kind == "torch":
        return from_numpy(y, kind).view(w.dtype)
    return y.view(w.dtype)


def _expand_on(
    device: Device,
    w: Array,
    out_index: Array,
    in_index: Array | None,
    in_scale: Array | None,
    out_scale: Array | None,
    out: Array | None,
) -> Array:
    native = load_native()
    given, dtype = tuple(w.shape), device.dtype_name(w)
    if w.dtype.itemsize not in (1, 2, 4, 8):
        raise TypeError(f"w: expected {NUMBERS}, got {dtype} {given}")
    _check_dimensions(given, in_index, in_scale)
    rows = _index_on(device, "out_index", out_index, given[0])
    columns = None if in_index is None else _index_on(device, "in_index", in_index, given[1])
    shape = (*rows.shape, *(given[1:2] if columns is None else columns.shape), *given[2:])
    inputs = None if in_scale is None else _scale_on(device, "in_scale", in_scale, dtype, shape[1])
    outputs = None if out_scale is None else _scale_on(device, "out_scale", out_scale, dtype, shape[0])
    if out is None:
        out = device.empty_like(w, shape)
    else:
        _check_out(device.dtype_name(out), tuple(out.shape), dtype, shape)
    arrays = (None if array is None else device.view(array) for array in (w, rows, columns, inputs, outputs, out))
    native.expand(*arrays, device.index, device.stream)
    return out


def _index_on(device: Device, name: str, index: Array, size: int) -> Array:
    """Return indices on the device, as int64 one after another."""
    if not is_on(device, name, index, "w"):
        return device.upload(name, to_index(name, index, size))
    text = f"{name}: expected integers (n,), got {device.dtype_name(index)} {tuple(index.shape)}"
    if not device.dtype_name(index).startswith(("int", "uint")):
        raise TypeError(text)
    if len(index.shape) != 1:
        raise ValueError(text)
    return device.to_vector(index, "int64")


def _scale_on(device: Device, name: str, scale: Array, w_dtype: str, size: int) -> Array:
    """Return factors on the device, one after another."""
    if not is_on(device, name, scale, "w"):
        checked = to_scale(name, scale, w_dtype, size)
        return None if checked is None else device.upload(name, checked)
    dtype = check_scale(name, device.dtype_name(scale), tuple(scale.shape), w_dtype, size)
    return device.to_vector(scale, dtype)


def _check_dimensions(shape: tuple[int, ...], in_index: Array | None, in_scale: Array | None) -> None:
    if not 1 <= len(shape) <= 4:
        raise ValueError(f"w: expected 1 to 4 dimensions, got shape {shape}")
    if len(shape) == 1 and (in_index is not None or in_scale is not None):
        raise ValueError(f"in_index, in_scale: expected None for w {shape}, got an array")


def _check_out(out_dtype: str, out_shape: tuple[int, ...], dtype: str, shape: tuple[int, ...]) -> None:
    if out_dtype != dtype or out_shape != shape:
        text = f"out: expected {dtype} {shape}, got {out_dtype} {out_shape}"
        raise (ValueError if out_dtype == dtype else TypeError)(text)
