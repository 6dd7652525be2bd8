"""Arguments of `pycodesign.ops`: each is checked once, by its name, and brought into the form that kernels take."""

from __future__ import annotations

import math
import numbers
import operator
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pycodesign.quantize import KernelCodebook, QuantizedTensor

Array: TypeAlias = Any  # a NumPy array or a torch tensor
Pair: TypeAlias = int | Sequence[int]

OUTPUT_DTYPES = ("float32", "uint8", "int8", "int32")
INPUT_RANGES = {"float32": (0, 0), "uint8": (0, 255), "int8": (-128, 127)}
SHORT_FLOATS = ("float16", "bfloat16")  # inputs, residuals and outputs on a GPU, besides
LARGEST_INTEGER = 1 << 24  # of options: float32 holds it exactly
LARGEST_FLOAT = float(np.finfo(np.float32).max)


def to_numpy(name: str, array: Array) -> tuple[NDArray[Any], str]:
    """Return the array without a copy, and of which kind it was: ``"numpy"`` or ``"torch"``."""
    if isinstance(array, np.ndarray) and not isinstance(array, np.ma.MaskedArray):
        return np.asarray(array), "numpy"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        if array.device.type != "cpu":
            raise TypeError(f"{name}: expected an array in host memory, got a tensor on {array.device}")
        try:
            return array.detach().numpy(), "torch"
        except TypeError:
            wanted, got = "a dtype that NumPy has", array.dtype
            if array.layout is not torch.strided:
                wanted, got = "a strided tensor", array.layout
            raise TypeError(f"{name}: expected {wanted}, got {got}") from None
        except RuntimeError as error:  # negated by a flag alone, or no memory of its own
            raise TypeError(f"{name}: expected a tensor that NumPy can view, got another: {error}") from None
    raise TypeError(f"{name}: expected a NumPy array or a torch tensor, got {type(array).__name__}")


def from_numpy(array: NDArray[Any], kind: str) -> Array:
    """Return the array as `kind`, without a copy."""
    return sys.modules["torch"].from_numpy(array) if kind == "torch" else array


def to_raw(name: str, array: Array) -> tuple[NDArray[Any], str, str]:
    """Return the array without a copy, the name of its dtype, and its kind, for functions that only move elements.

    Dtypes that NumPy does not have become integers of the same size.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        dtype = str(array.dtype).removeprefix("torch.")
        if dtype == "bfloat16" or dtype.startswith("float8"):
            array = array.detach().view(torch.int16 if dtype == "bfloat16" else torch.int8)
        return *to_numpy(name, array), dtype
    raw, kind = to_numpy(name, array)
    foreign = raw.dtype.name == "bfloat16" or raw.dtype.name.startswith("float8")  # of ml_dtypes
    return raw.view(f"i{raw.itemsize}") if foreign else raw, kind, raw.dtype.name


def to_index(name: str, index: Array, size: int) -> NDArray[np.int64]:
    """Return an array of indices from -1 to `size` - 1 as int64, one after another."""
    array, _ = to_numpy(name, index)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers (n,), got {array.dtype} {array.shape}")
    if array.ndim != 1:
        raise ValueError(f"{name}: expected integers (n,), got {array.dtype} {array.shape}")
    if array.size and not -1 <= array.min() <= array.max() < size:
        wrong = array.min() if array.min() < -1 else array.max()
        raise ValueError(f"{name}: expected indices from -1 to {size - 1}, got {wrong}")
    return np.ascontiguousarray(array, np.int64)


def to_scale(name: str, scale: Array | None, w_dtype: str, size: int) -> NDArray[Any] | None:
    """Return a vector of factors for elements of a dtype, one after another."""
    if scale is None:
        return None
    array, _ = to_numpy(name, scale)
    check_scale(name, str(array.dtype), array.shape, w_dtype, size)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite values, got {array[~np.isfinite(array)][0]}")
    return np.ascontiguousarray(array)


def check_scale(name: str, dtype: str, shape: tuple[int, ...], w_dtype: str, size: int) -> str:
    """Return the dtype that factors have for elements of a dtype."""
    wanted = {"float64": "float64", "float32": "float32", "float16": "float32", "bfloat16": "float32"}.get(w_dtype)
    if wanted is None:
        raise ValueError(f"{name}: expected None for w of {w_dtype}, got {dtype} {shape}")
    if dtype != wanted or shape != (size,):
        text = f"{name}: expected {wanted} ({size},), got {dtype} {shape}"
        raise (ValueError if dtype == wanted else TypeError)(text)
    return wanted


def to_integer(name: str, value: Any, lowest: int = -LARGEST_INTEGER) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None
    if number < lowest:
        raise ValueError(f"{name}: expected an integer >= {lowest}, got {number}")
    if number > LARGEST_INTEGER:
        raise ValueError(f"{name}: expected an integer <= {LARGEST_INTEGER}, got {number}")
    return number


def to_number(name: str, value: Any) -> float:
    if type(value) is float:
        return value
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number that fits a float, got {type(value).__name__}") from None


def join_names(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def to_pair(name: str, value: Pair, lowest: int) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else (value, value)
    if len(values) != 2:
        raise ValueError(f"{name}: expected an integer or a pair, got {value!r}")
    height, width = (to_integer(name, v, lowest) for v in values)
    return height, width


def check_weights(q: Any, ndim: int, shape: str) -> None:
    if not isinstance(q, QuantizedTensor | KernelCodebook):
        raise TypeError(f"q: expected QuantizedTensor or KernelCodebook {shape}, got {type(q).__name__}")
    if len(q.shape) != ndim:
        raise ValueError(f"q: expected {type(q).__name__} {shape}, got weights of shape {q.shape}")


def check_inputs(
    q: QuantizedTensor | KernelCodebook, dtype: str, scale: float, zero_point: int, bits: int | None, on_gpu: bool
) -> dict[str, Any]:
    """Return the options that describe the input."""
    dtypes = (*INPUT_RANGES, *(SHORT_FLOATS if on_gpu else ()))
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise ValueError(f"input_dtype: expected {join_names(map(repr, dtypes))}, got {dtype!r}")
    scale = to_number("input_scale", scale)
    zero_point = to_integer("input_zero_point", zero_point)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"input_scale: expected a positive finite number, got {scale}")
    if "float" in dtype:
        if scale != 1.0 or zero_point != 0 or bits is not None:
            raise ValueError(
                f"input_scale, input_zero_point, input_bits: expected their defaults for {dtype} inputs, got others"
            )
    else:
        low, high = INPUT_RANGES[dtype]
        if not low <= zero_point <= high:
            raise ValueError(f"input_zero_point: expected a value of {dtype}, got {zero_point}")
        if bits is not None and not 1 <= (bits := to_integer("input_bits", bits)) <= 8:
            raise ValueError(f"input_bits: expected 1 to 8, got {bits}")
        what, values = ("kernels", q.kernels) if isinstance(q, KernelCodebook) else ("levels", q.levels)
        fractional = values[values != np.rint(values)]
        if fractional.size:
            raise ValueError(f"q: expected integer {what} for {dtype} inputs, got {fractional[0]:g}")
    return {"input_dtype": dtype, "input_scale": scale, "input_zero_point": zero_point, "input_bits": bits}


def check_bias(bias: Array | None, q: QuantizedTensor | KernelCodebook) -> NDArray[np.float32] | None:
    if bias is None:
        return None
    array, _ = to_numpy("bias", bias)
    check_array("bias", array, ("float32",), f"({q.shape[0]},)", array.shape == q.shape[:1])
    return np.array(array)


def check_array(name: str, array: NDArray[Any], dtypes: tuple[str, ...], shape: str, fits: bool) -> None:
    right_dtype = array.dtype in map(np.dtype, dtypes)
    if right_dtype and fits:
        return  # the text costs microseconds
    text = f"{name}: expected {join_names(dtypes)} {shape}, got {array.dtype} {array.shape}"
    raise ValueError(text) if right_dtype else TypeError(text)


def check_algorithm(algorithm: str, names: tuple[str, ...]) -> None:
    if not isinstance(algorithm, str) or algorithm not in names:
        raise ValueError(f"algorithm: expected {join_names(map(repr, names))}, got {algorithm!r}")


def check_tune(tune: bool, algorithm: str) -> None:
    if not isinstance(tune, bool):
        raise TypeError(f"tune: expected a bool, got {type(tune).__name__}")
    if tune and algorithm != "auto":
        raise ValueError(f"tune: expected algorithm='auto' with it, got {algorithm!r}")


def check_promise(x: NDArray[Any], options: dict[str, Any], name: str = "x") -> None:
    """Verify what `input_bits` promises, where ``PYCODESIGN_CHECK`` asks for it."""
    bits = options["input_bits"]
    if bits is None or os.environ.get("PYCODESIGN_CHECK", "0") in ("", "0") or x.size == 0:
        return
    low = -(1 << (bits - 1)) if options["input_dtype"] == "int8" else 0
    high = low + (1 << bits) - 1
    if x.min() < low or x.max() > high:
        raise ValueError(f"{name}: expected values of {bits} bits, {low} to {high}, got {x.min()} to {x.max()}")


def check_epilogue(
    residual: Array | None,
    residual_scale: float,
    residual_zero_point: int,
    clamp: tuple[float | None, float | None] | None,
    out_dtype: str,
    out_scale: float | None,
    out_zero_point: int,
    *,
    shape: tuple[int, ...] | None = None,
    dtypes: tuple[str, ...] = OUTPUT_DTYPES,
) -> dict[str, Any]:
    """Arguments of the native call; `shape` is the output's where residual rows are to be flattened to it."""
    if not isinstance(out_dtype, str) or out_dtype not in dtypes:
        raise ValueError(f"out_dtype: expected {join_names(map(repr, dtypes))}, got {out_dtype!r}")
    added = None if residual is None else to_numpy("residual", residual)[0]
    if added is not None and shape is not None:
        check_array("residual", added, tuple(INPUT_RANGES), str(shape), added.shape == shape)
        added = added.reshape(-1, shape[-1]) if added.size else added.reshape(math.prod(shape[:-1]), shape[-1])
    low = high = None
    if clamp is not None:
        if not isinstance(clamp, Sequence) or len(clamp) != 2:
            raise ValueError(f"clamp: expected a pair (lowest, highest), either may be None, got {clamp!r}")
        low, high = (None if bound is None else to_number("clamp", bound) for bound in clamp)
        if (low is not None and math.isnan(low)) or (high is not None and math.isnan(high)):
            raise ValueError(f"clamp: expected numbers or None, got {clamp!r}")
        if low is not None and high is not None and low > high:
            raise ValueError(f"clamp: expected lowest <= highest, got {clamp!r}")
    if out_scale is not None:
        out_scale = to_number("out_scale", out_scale)
    residual_scale = to_number("residual_scale", residual_scale)
    if not abs(residual_scale) <= LARGEST_FLOAT:
        raise ValueError(f"residual_scale: expected a finite float32, got {residual_scale}")
    return {
        "residual": added,
        "residual_scale": residual_scale,
        "residual_zero_point": to_integer("residual_zero_point", residual_zero_point),
        "lo": low,
        "hi": high,
        "out_dtype": out_dtype,
        "out_scale": out_scale,
        "out_zero_point": to_integer("out_zero_point", out_zero_point),
    }


def flatten_out(out: NDArray[Any], shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Return a view of `out` (..., O) as rows (T, O)."""
    check_array("out", out, (dtype,), str(shape), out.shape == shape)
    rows = out.reshape(math.prod(shape[:-1]), shape[-1])
    if out.size and not np.may_share_memory(rows, out):
        raise ValueError("out: expected leading dimensions that flatten without a copy, got other strides")
    return rows
