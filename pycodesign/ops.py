"""Quantized layers on arrays: pack the weights once, run them many times.

An array is a NumPy array or a torch tensor in host memory; the result is of the same kind.
"""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import operator
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from pycodesign import _core
from pycodesign.quantize import QuantizedTensor

__all__ = ["Explanation", "Packed", "conv2d", "linear", "load_packed", "prepack_conv2d", "prepack_linear"]

Array: TypeAlias = Any
Pair: TypeAlias = int | Sequence[int]
Native: TypeAlias = _core.PackedConv2d | _core.PackedLinear

OUTPUT_DTYPES = ("float32", "uint8", "int8", "int32")
INPUT_RANGES = {"float32": (0, 0), "uint8": (0, 255), "int8": (-128, 127)}
CONV2D_ALGORITHMS = ("auto", "tables", "dense")
LINEAR_ALGORITHMS = ("auto", "tables", "dense", "packed")
COLD_BYTES = 96 << 20  # what tuning reads between two timings
FILE_FORMAT = "pycodesign packed layer 1"
LARGEST_INTEGER = 1 << 24  # of options: float32 holds it exactly


class Explanation(dict[str, Any]):
    """What a packed layer is and why; a dict that prints as a table."""

    def __str__(self) -> str:
        width = max(len(key) for key in self)
        return "\n".join(f"{key:<{width}}  {_human(key, value)}" for key, value in self.items())


def _human(key: str, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.1%}" if key == "share_removed" else f"{value:.4g}"
    return str(value)


class Packed:
    """A packed layer, made by `prepack_conv2d`, `prepack_linear` or `load_packed`.

    Calls on one object may run at the same time from several threads.
    """

    def __init__(self, q: QuantizedTensor, bias: NDArray[np.float32] | None, options: dict[str, Any], tune: bool) -> None:
        start = time.perf_counter()
        self._shape = q.shape
        self._levels, self._scale, self._bias = q.levels, q.scale, bias
        self._options = options
        self._tune_lock = threading.Lock() if tune else None
        algorithm, self._why = _choose(q, options)
        self._native = self._pack(q.codes, algorithm)
        self._seconds = time.perf_counter() - start

    def _pack(self, codes: NDArray[Any], algorithm: str) -> Native:
        o, flat = self._options, codes.reshape(codes.shape[0], -1).astype(np.uint8, copy=False)
        arrays = flat, np.atleast_2d(self._levels), self._scale.reshape(codes.shape[0], -1), self._bias
        names = "input_dtype", "input_scale", "input_zero_point"
        inputs: dict[str, Any] = {name: o[name] for name in names} | {"input_bits": o["input_bits"] or 0}
        if algorithm != "tables" and _exceed_int8(self._levels, o):
            raise ValueError(f"algorithm: expected 'tables' for levels beyond int8, got {algorithm!r}")
        if codes.ndim == 4:
            channels, kernel = codes.shape[1] * o["groups"], (codes.shape[2], codes.shape[3])
            geometry = channels, o["groups"], kernel, o["stride"], o["padding"], o["dilation"]
            return _core.PackedConv2d(*arrays, *geometry, **inputs, algorithm=algorithm)
        if algorithm == "tables":
            return _core.PackedConv2d(*arrays, codes.shape[1], 1, (1, 1), (1, 1), (0, 0), (1, 1), **inputs, algorithm=algorithm)
        return _core.PackedLinear(*arrays, **inputs, algorithm=algorithm)

    @property
    def algorithm(self) -> str:
        """Name of the algorithm that runs."""
        return self._native.algorithm

    @property
    def kind(self) -> str:
        """``"conv2d"`` or ``"linear"``."""
        return "conv2d" if len(self._shape) == 4 else "linear"

    def weights(self) -> QuantizedTensor:
        """Return the quantized weights, decoded from the packed form."""
        return QuantizedTensor(self._native.codes().reshape(self._shape), self._levels, self._scale)

    def explain(self) -> Explanation:
        """Say what runs and why, and what it costs.

        Returns
        -------
        Explanation
            ``kind``, ``algorithm``, ``why``; ``adds`` and ``multiplies`` as executed and ``dense_ops`` = O (2 I - 1), all
            per output pixel or row; ``share_removed``; ``bytes`` of the packed weights beside ``float32_bytes``;
            ``seconds`` it took to pack; ``isa`` and ``threads`` in force.
        """
        counts = self._native.counts()
        size = math.prod(self._shape)
        dense_ops = 2 * size - self._shape[0]
        return Explanation(
            kind=self.kind,
            algorithm=self.algorithm,
            why=self._why,
            adds=counts["adds"],
            multiplies=counts["multiplies"],
            dense_ops=dense_ops,
            share_removed=1 - (counts["adds"] + counts["multiplies"]) / dense_ops,
            bytes=counts["bytes"],
            float32_bytes=4 * size,
            seconds=self._seconds,
            isa=_core.active_isa(),
            threads=_core.get_num_threads(),
        )

    def warmup(self, shape: Sequence[int]) -> None:
        """Plan (and tune, where asked for) for inputs of one shape, so that the first call does not have to.

        Parameters
        ----------
        shape : sequence of int
            Of the input: (N, C, H, W), or (..., I) for a linear layer.
        """
        x = np.zeros([_integer("shape", size, 0) for size in shape], self._options["input_dtype"])
        conv2d(x, self) if self.kind == "conv2d" else linear(x, self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write codes, levels, scale, bias and options to a safetensors file; machine code and programs are never saved.

        The file appears whole or not at all.

        Parameters
        ----------
        path : path
        """
        q = self.weights()
        tensors: dict[str, NDArray[Any]] = {"codes": _pack_bits(q.codes, _code_bits(q.Q)), "levels": q.levels, "scale": q.scale}
        if self._bias is not None:
            tensors["bias"] = self._bias
        options = json.dumps({**self._options, "algorithm": self.algorithm, "shape": self._shape}, sort_keys=True)
        metadata = {"format": FILE_FORMAT, "options": options, "sha256": _digest(tensors, options)}
        data = safetensors.numpy.save(tensors, metadata)
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _run(self, call: Callable[[Native], Array]) -> Array:
        """Run, after choosing by time on the first call where tuning was asked for."""
        if self._tune_lock is not None:
            with self._tune_lock:
                if self._tune_lock is not None:
                    self._tune(call)
                    self._tune_lock = None
        return call(self._native)

    def _tune(self, call: Callable[[Native], Array]) -> None:
        codes = self._native.codes().reshape(self._shape)
        natives: dict[str, Native] = {}
        for algorithm in (CONV2D_ALGORITHMS if self.kind == "conv2d" else LINEAR_ALGORITHMS)[1:]:
            try:
                natives[algorithm] = self._native if algorithm == self.algorithm else self._pack(codes, algorithm)
            except ValueError:
                continue  # cannot hold these weights
        other = np.ones(COLD_BYTES, np.uint8)
        seconds: dict[str, list[float]] = {algorithm: [] for algorithm in natives}
        for _ in range(7):
            for algorithm, native in natives.items():
                np.add(other, 1, out=other)
                start = time.perf_counter()
                call(native)
                seconds[algorithm].append(time.perf_counter() - start)
        medians = {algorithm: float(np.median(times[1:])) for algorithm, times in seconds.items()}
        best = min(medians, key=medians.__getitem__)
        self._native = natives[best]
        self._why = "measured cold: " + ", ".join(f"{a} {1e3 * t:.3g} ms" for a, t in sorted(medians.items()))


def prepack_conv2d(
    q: QuantizedTensor,
    bias: Array | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    input_dtype: str = "float32",
    input_scale: float = 1.0,
    input_zero_point: int = 0,
    input_bits: int | None = None,
    algorithm: str = "auto",
    tune: bool = False,
) -> Packed:
    """Pack the quantized weights of a convolution.

    Parameters
    ----------
    q : QuantizedTensor (O, C / groups, kH, kW)
    bias : float32 (O,), optional
    stride, padding, dilation : int or pair of int
        For height and width. Padding stands for real zeros.
    groups : int
        Divides C and O.
    input_dtype : {"float32", "uint8", "int8"}
    input_scale, input_zero_point : float, int
        Real value of an integer input: ``input_scale * (x - input_zero_point)``.
    input_bits : int, optional
        Promise that integer inputs fit this many bits. A broken promise gives wrong sums; ``PYCODESIGN_CHECK=1`` verifies it.
    algorithm : {"auto", "tables", "dense"}
        ``tables``: partial sums of small groups of channels are computed once and looked up (at most 16 distinct levels).
        ``dense``: every product, in 8-bit dot products or float32.
        ``auto``: what a cost model predicts to be faster; see `Packed.explain`.
    tune : bool
        Measure at the first call or `Packed.warmup`, with cold weights, instead of predicting.

    Returns
    -------
    Packed

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came: among others, fractional levels with integer inputs, an
        algorithm that cannot hold the weights, integer sums that could overflow 32 bits.

    References
    ----------
    Hegde et al., "UCNN", ISCA 2018; Fu et al., "Q-gym", PACT 2022.

    Examples
    --------
    >>> import numpy as np
    >>> from pycodesign import ops, quantize
    >>> w = np.random.default_rng(0).standard_normal((64, 32, 3, 3), dtype=np.float32)
    >>> packed = ops.prepack_conv2d(quantize.ternary(w), padding=1)
    >>> ops.conv2d(np.ones((1, 32, 8, 8), np.float32), packed).shape
    (1, 64, 8, 8)
    """
    _check_weights(q, 4, "(O, C / groups, kH, kW)")
    groups = _integer("groups", groups, 1)
    if q.shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of the {q.shape[0]} outputs, got {groups}")
    options = {
        "stride": _pair("stride", stride, 1),
        "padding": _pair("padding", padding, 0),
        "dilation": _pair("dilation", dilation, 1),
        "groups": groups,
    }
    inputs = _check_inputs(q, input_dtype, input_scale, input_zero_point, input_bits)
    _check_algorithm(algorithm, CONV2D_ALGORITHMS)
    return Packed(q, _check_bias(bias, q), {**options, **inputs, "algorithm": algorithm}, _check_tune(tune, algorithm))


def prepack_linear(
    q: QuantizedTensor,
    bias: Array | None = None,
    *,
    input_dtype: str = "float32",
    input_scale: float = 1.0,
    input_zero_point: int = 0,
    input_bits: int | None = None,
    algorithm: str = "auto",
    tune: bool = False,
) -> Packed:
    """Pack the quantized weights of a linear layer.

    Parameters
    ----------
    q : QuantizedTensor (O, I)
        Its scale may be (O, G): one per group of I / G inputs (not for ``tables``).
    bias : float32 (O,), optional
    input_dtype, input_scale, input_zero_point, input_bits, tune
        As for `prepack_conv2d`.
    algorithm : {"auto", "tables", "dense", "packed"}
        ``packed``: 1- and 2-bit codes unpacked in registers, for at most 4 distinct levels; the fewest bytes to read,
        which is what bounds small batches. The others as for `prepack_conv2d`.

    Returns
    -------
    Packed

    Raises
    ------
    TypeError, ValueError
        As for `prepack_conv2d`.

    Examples
    --------
    >>> import numpy as np
    >>> from pycodesign import ops, quantize
    >>> w = np.random.default_rng(0).standard_normal((10, 128), dtype=np.float32)
    >>> packed = ops.prepack_linear(quantize.ternary(w))
    >>> packed.algorithm
    'packed'
    >>> ops.linear(np.ones((2, 128), np.float32), packed).shape
    (2, 10)
    """
    _check_weights(q, 2, "(O, I)")
    inputs = _check_inputs(q, input_dtype, input_scale, input_zero_point, input_bits)
    _check_algorithm(algorithm, LINEAR_ALGORITHMS)
    if algorithm == "tables" and q.scale.ndim == 2 and q.scale.shape[1] > 1:
        raise ValueError(f"algorithm: expected 'dense' or 'packed' for one scale per group of inputs {q.scale.shape}, got 'tables'")
    return Packed(q, _check_bias(bias, q), {**inputs, "algorithm": algorithm}, _check_tune(tune, algorithm))


def conv2d(
    x: Array,
    packed: Packed,
    *,
    residual: Array | None = None,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    clamp: tuple[float | None, float | None] | None = None,
    out_dtype: str = "float32",
    out_scale: float | None = None,
    out_zero_point: int = 0,
    out: Array | None = None,
) -> Array:
    """Run a packed convolution, with its epilogue.

    For integer inputs every step is one float32 rounding, in this order, so that results are the same on every machine::

        acc = sum of level * (x - input_zero_point)                      exact
        y = float(acc) * float32(input_scale * scale[o]) + bias[o]
        y = y + residual_scale * (residual - residual_zero_point)
        y = clamp(y);  integer outputs: saturate(rint(y / out_scale) + out_zero_point)

    Float inputs give the same in float arithmetic, within ``8 eps sqrt(K) sum |w| |x|`` for K weights per output, the same
    bits from run to run.

    Parameters
    ----------
    x : float32, uint8 or int8 (N, C, H, W)
        Of the packed `input_dtype`; any strides. An infinite or NaN element makes the outputs that read it through a nonzero
        weight infinite or NaN; through a zero weight it may or may not. No other output sees it.
    packed : Packed
    residual : float32, uint8 or int8 (N, O, OH, OW), optional
        Added before the clamp.
    residual_scale, residual_zero_point : float, int
    clamp : pair of float or None, optional
        Lowest and highest value; ReLU is ``(0, None)``.
    out_dtype : {"float32", "int32", "uint8", "int8"}
        ``"int32"`` gives `acc` itself, without bias (integer inputs only).
    out_scale, out_zero_point : float, int
        For uint8 and int8 outputs. NaN becomes the lowest value.
    out : array (N, O, OH, OW), optional
        Written and returned; must not overlap `x` or `residual`.

    Returns
    -------
    array (N, O, OH, OW) of `out_dtype`
        Empty when there are no images, or when the filter is larger than the padded input.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came. Nothing is written then.

    Examples
    --------
    >>> import numpy as np
    >>> from pycodesign import ops, quantize
    >>> q = quantize.binary(np.array([[[[2.0]], [[-2.0]]]], np.float32))
    >>> packed = ops.prepack_conv2d(q, input_dtype="uint8", input_scale=0.5, input_zero_point=3)
    >>> x = np.array([[[[5, 9]], [[4, 2]]]], np.uint8)
    >>> ops.conv2d(x, packed, out_dtype="int32")
    array([[[[1, 7]]]], dtype=int32)
    >>> ops.conv2d(x, packed, clamp=(0, 6))
    array([[[[1., 6.]]]], dtype=float32)
    """
    _check_packed(packed, "conv2d")
    given, kind = _to_numpy("x", x)
    _check_promise(given, packed)
    arguments = _epilogue(residual, residual_scale, residual_zero_point, clamp, out_dtype, out_scale, out_zero_point)
    target = None if out is None else _to_numpy("out", out)[0]
    y = packed._run(lambda native: native.run(given, **arguments, out=target))  # type: ignore[union-attr]
    return out if out is not None else _from_numpy(y, kind)


def linear(
    x: Array,
    packed: Packed,
    *,
    residual: Array | None = None,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    clamp: tuple[float | None, float | None] | None = None,
    out_dtype: str = "float32",
    out_scale: float | None = None,
    out_zero_point: int = 0,
    out: Array | None = None,
) -> Array:
    """Run a packed linear layer, with its epilogue.

    Parameters
    ----------
    x : float32, uint8 or int8 (..., I)
    packed : Packed
    residual : array (..., O), optional
    residual_scale, residual_zero_point, clamp, out_dtype, out_scale, out_zero_point
        As for `conv2d`. With one scale per group of inputs, the groups' products ``float(acc[g]) * m[o, g]`` are added in
        ascending order of g before the bias.
    out : array (..., O), optional

    Returns
    -------
    array (..., O) of `out_dtype`

    Raises
    ------
    TypeError, ValueError
        As for `conv2d`.

    Examples
    --------
    >>> import numpy as np
    >>> from pycodesign import ops, quantize
    >>> packed = ops.prepack_linear(quantize.binary(np.array([[1.0, -1.0, 1.0]])))
    >>> ops.linear(np.array([4.0, 2.0, 1.0], np.float32), packed)
    array([3.], dtype=float32)
    """
    _check_packed(packed, "linear")
    given, kind = _to_numpy("x", x)
    outputs, inputs = packed._shape
    dtype = packed._options["input_dtype"]
    _check_array("x", given, (dtype,), f"(..., {inputs})", given.shape[-1:] == (inputs,))
    _check_promise(given, packed)
    shape = (*given.shape[:-1], outputs)
    flat = given.reshape(math.prod(given.shape[:-1]), inputs)
    arguments = _epilogue(residual, residual_scale, residual_zero_point, clamp, out_dtype, out_scale, out_zero_point, shape)
    target = None if out is None else _rows_of(_to_numpy("out", out)[0], shape, out_dtype)
    y = packed._run(lambda native: native.run_rows(flat, **arguments, out=target))
    return out if out is not None else _from_numpy(y.reshape(shape), kind)


def load_packed(path: str | os.PathLike[str]) -> Packed:
    """Read a packed layer from a file of `Packed.save`; its program is built anew.

    Parameters
    ----------
    path : path

    Returns
    -------
    Packed

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is no such file, or is damaged.
    """
    data = Path(path).read_bytes()
    try:
        tensors = safetensors.numpy.load(data)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
        if metadata["format"] != FILE_FORMAT:
            raise ValueError(f"format {metadata['format']!r}, expected {FILE_FORMAT!r}")
        if metadata["sha256"] != _digest(tensors, metadata["options"]):
            raise ValueError("its checksum does not match its contents")
        options = json.loads(metadata["options"])
        shape = tuple(_integer("shape", n, 1) for n in options.pop("shape"))
        levels = tensors["levels"]
        codes = _unpack_bits(tensors["codes"], _code_bits(levels.shape[-1]), shape)
        q = QuantizedTensor(codes, levels, tensors["scale"])
        prepack = prepack_conv2d if len(shape) == 4 else prepack_linear
        return prepack(q, tensors.get("bias"), **options)
    except (safetensors.SafetensorError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)}: expected a packed layer of pycodesign, got a damaged or foreign file: {error}") from error


# ---- choosing ----------------------------------------------------------------------------------------------------------


def _choose(q: QuantizedTensor, options: dict[str, Any]) -> tuple[str, str]:
    if options["algorithm"] != "auto":
        return options["algorithm"], "asked for"
    codes = q.codes.reshape(q.shape[0], -1).astype(np.uint8, copy=False)
    arrays = codes, np.atleast_2d(q.levels), q.scale.reshape(q.shape[0], -1)
    if _exceed_int8(q.levels, options):
        if np.unique(q.levels).size > 16 or q.scale[0].size > 1:
            raise ValueError(
                f"q: expected levels from -128 to 127, or at most 16 of them and one scale per output, for "
                f"{options['input_dtype']} inputs, got {q.levels.min():g} to {q.levels.max():g}"
            )
        return "tables", "levels beyond int8"
    if q.codes.ndim == 2:
        return _core.choose_linear(*arrays, options["input_dtype"])
    geometry = options["stride"], options["padding"], options["dilation"]
    kernel = q.shape[2], q.shape[3]
    return _core.choose_conv2d(*arrays, q.shape[1] * options["groups"], options["groups"], kernel, *geometry, options["input_dtype"])


def _exceed_int8(levels: NDArray[np.float32], options: dict[str, Any]) -> bool:
    return options["input_dtype"] != "float32" and bool(np.abs(levels + 0.5).max() > 127.5)


# ---- checks --------------------------------------------------------------------------------------------------------------


def _check_weights(q: Any, ndim: int, shape: str) -> None:
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"q: expected QuantizedTensor {shape}, got {type(q).__name__}")
    if q.codes.ndim != ndim:
        raise ValueError(f"q: expected QuantizedTensor {shape}, got codes of shape {q.shape}")


def _check_inputs(q: QuantizedTensor, dtype: str, scale: float, zero_point: int, bits: int | None) -> dict[str, Any]:
    if not isinstance(dtype, str) or dtype not in INPUT_RANGES:
        raise ValueError(f"input_dtype: expected 'float32', 'uint8' or 'int8', got {dtype!r}")
    scale = _number("input_scale", scale)
    zero_point = _integer("input_zero_point", zero_point)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"input_scale: expected a positive finite number, got {scale}")
    if dtype == "float32":
        if scale != 1.0 or zero_point != 0 or bits is not None:
            raise ValueError("input_scale, input_zero_point, input_bits: expected their defaults for float32 inputs, got others")
    else:
        low, high = INPUT_RANGES[dtype]
        if not low <= zero_point <= high:
            raise ValueError(f"input_zero_point: expected a value of {dtype}, got {zero_point}")
        if bits is not None and not 1 <= (bits := _integer("input_bits", bits)) <= 8:
            raise ValueError(f"input_bits: expected 1 to 8, got {bits}")
        fractional = q.levels[q.levels != np.rint(q.levels)]
        if fractional.size:
            raise ValueError(f"q: expected integer levels for {dtype} inputs, got {fractional[0]:g}")
    return {"input_dtype": dtype, "input_scale": scale, "input_zero_point": zero_point, "input_bits": bits}


def _check_bias(bias: Array | None, q: QuantizedTensor) -> NDArray[np.float32] | None:
    if bias is None:
        return None
    array, _ = _to_numpy("bias", bias)
    _check_array("bias", array, ("float32",), f"({q.shape[0]},)", array.shape == q.shape[:1])
    return np.array(array)


def _check_array(name: str, array: NDArray[Any], dtypes: tuple[str, ...], shape: str, fits: bool) -> None:
    text = f"{name}: expected {_list(dtypes)} {shape}, got {array.dtype} {array.shape}"
    if array.dtype.name not in dtypes:
        raise TypeError(text)
    if not fits:
        raise ValueError(text)


def _check_algorithm(algorithm: str, names: tuple[str, ...]) -> None:
    if algorithm not in names:
        raise ValueError(f"algorithm: expected {_list(map(repr, names))}, got {algorithm!r}")


def _check_tune(tune: bool, algorithm: str) -> bool:
    if tune and algorithm != "auto":
        raise ValueError(f"tune: expected algorithm='auto' with it, got {algorithm!r}")
    return bool(tune)


def _check_packed(packed: Any, kind: str) -> None:
    if not isinstance(packed, Packed):
        raise TypeError(f"packed: expected a Packed {kind} layer, got {type(packed).__name__}")
    if packed.kind != kind:
        raise ValueError(f"packed: expected a Packed {kind} layer, got a {packed.kind} layer")


def _check_promise(x: NDArray[Any], packed: Packed) -> None:
    bits = packed._options["input_bits"]
    if bits is None or os.environ.get("PYCODESIGN_CHECK", "0") in ("", "0") or x.size == 0:
        return
    low = -(1 << (bits - 1)) if packed._options["input_dtype"] == "int8" else 0
    if x.min() < low or x.max() >= low + (1 << bits):
        raise ValueError(f"x: expected values of {bits} bits, {low} to {low + (1 << bits) - 1}, got {x.min()} to {x.max()}")


def _epilogue(
    residual: Array | None,
    residual_scale: float,
    residual_zero_point: int,
    clamp: tuple[float | None, float | None] | None,
    out_dtype: str,
    out_scale: float | None,
    out_zero_point: int,
    shape: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """Arguments of the native call; `shape` is the output's where residual rows are to be flattened to it."""
    if not isinstance(out_dtype, str) or out_dtype not in OUTPUT_DTYPES:
        raise ValueError(f"out_dtype: expected {_list(map(repr, OUTPUT_DTYPES))}, got {out_dtype!r}")
    added = None if residual is None else _to_numpy("residual", residual)[0]
    if added is not None and shape is not None:
        _check_array("residual", added, tuple(INPUT_RANGES), str(shape), added.shape == shape)
        added = added.reshape(-1, shape[-1]) if added.size else added.reshape(math.prod(shape[:-1]), shape[-1])
    low = high = None
    if clamp is not None:
        if not isinstance(clamp, Sequence) or len(clamp) != 2:
            raise ValueError(f"clamp: expected a pair (lowest, highest), either may be None, got {clamp!r}")
        low, high = (None if bound is None else _number("clamp", bound) for bound in clamp)
        if (low is not None and math.isnan(low)) or (high is not None and math.isnan(high)):
            raise ValueError(f"clamp: expected numbers or None, got {clamp!r}")
        if low is not None and high is not None and low > high:
            raise ValueError(f"clamp: expected lowest <= highest, got {clamp!r}")
    if out_scale is not None:
        out_scale = _number("out_scale", out_scale)
    return {
        "residual": added,
        "residual_scale": _number("residual_scale", residual_scale),
        "residual_zero_point": _integer("residual_zero_point", residual_zero_point),
        "lo": low,
        "hi": high,
        "out_dtype": out_dtype,
        "out_scale": out_scale,
        "out_zero_point": _integer("out_zero_point", out_zero_point),
    }


def _rows_of(out: NDArray[Any], shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    _check_array("out", out, (dtype,), str(shape), out.shape == shape)
    rows = out.reshape(math.prod(shape[:-1]), shape[-1])
    if out.size and not np.may_share_memory(rows, out):
        raise ValueError("out: expected leading dimensions that flatten without a copy, got other strides")
    return rows


def _integer(name: str, value: Any, lowest: int = -LARGEST_INTEGER) -> int:
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


def _number(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number that fits a float, got {type(value).__name__}") from None


def _list(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _pair(name: str, value: Pair, lowest: int) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(values) != 2:
        raise ValueError(f"{name}: expected an integer or a pair, got {value!r}")
    height, width = (_integer(name, v, lowest) for v in values)
    return height, width


# ---- arrays ----------------------------------------------------------------------------------------------------------------


def _to_numpy(name: str, array: Array) -> tuple[NDArray[Any], str]:
    if isinstance(array, np.ndarray):
        return array, "numpy"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        if array.device.type != "cpu":
            raise TypeError(f"{name}: expected an array in host memory (this build runs on the CPU), got a tensor on {array.device}")
        return array.detach().numpy(), "torch"
    raise TypeError(f"{name}: expected a NumPy array or a torch tensor, got {type(array).__name__}")


def _from_numpy(array: NDArray[Any], kind: str) -> Array:
    return sys.modules["torch"].from_numpy(array) if kind == "torch" else array


# ---- files -----------------------------------------------------------------------------------------------------------------


def _code_bits(levels: int) -> int:
    return 1 if levels <= 2 else 2 if levels <= 4 else 4 if levels <= 16 else 8


def _pack_bits(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    per_byte = 8 // bits
    padded = np.zeros(-(-codes.size // per_byte) * per_byte, np.uint8)
    padded[: codes.size] = codes.ravel()
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(padded.reshape(-1, per_byte) << shifts, axis=1).astype(np.uint8)
    return packed


def _unpack_bits(packed: NDArray[Any], bits: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    size = math.prod(shape)
    if packed.dtype != np.uint8 or packed.shape != (-(-size * bits // 8),):
        raise ValueError(f"codes: expected uint8 ({-(-size * bits // 8)},), got {packed.dtype} {packed.shape}")
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes: NDArray[np.uint8] = (packed[:, None] >> shifts & ((1 << bits) - 1)).astype(np.uint8)
    return codes.ravel()[:size].reshape(shape)


def _digest(tensors: dict[str, NDArray[Any]], options: str) -> str:
    digest = hashlib.sha256(options.encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes())
    return digest.hexdigest()
