"""Layers, with the pooling and the adds between them, in one native call.

Between convolutions of one size activations stay in the lanes that these compute in, or, where lanes are outputs, have
their channels last; memory is planned once for each input size. What a step computes is exactly what the function of
its name in `pycodesign.ops` or `pycodesign.reference.repetition` computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pycodesign import _core
from pycodesign._arguments import (
    INPUT_RANGES,
    Pair,
    check_epilogue,
    check_promise,
    to_integer,
    to_number,
    to_pair,
)
from pycodesign._device_layer import DeviceLayer
from pycodesign.ops import Packed, _check_packed

__all__ = ["Chain", "Value"]

MOST_BOUND = 32  # sizes for which a chain keeps memory

Clamp = tuple[float | None, float | None] | None
Windows = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # sizes, strides, padding


@dataclass(frozen=True, eq=False)
class Value:
    """What a step of a chain makes, or an input.

    Parameters
    ----------
    dtype : str
    scale, zero_point : float, int
        Real value of an integer: ``scale * (value - zero_point)``.
    """

    dtype: str
    scale: float
    zero_point: int
    chain: Chain
    index: int
    ndim: int | None  # of the array: None as its input's, `source`
    source: int = -1


class Chain:
    """Steps that run in one call.

    Each method adds a step and returns the `Value` that it makes; `output` ends the chain, which then is a function of
    arrays. Input sizes are free: plans are made at the first call with a size and kept. Calls may run at the same time
    from several threads.

    Examples
    --------
    >>> import numpy as np
    >>> from pycodesign import ops, quantize
    >>> from pycodesign.repetition.chain import Chain
    >>> rng = np.random.default_rng(0)
    >>> first, second = (quantize.ternary(rng.standard_normal((8, 8, 3, 3))) for _ in range(2))
    >>> chain = Chain()
    >>> x = chain.input("float32")
    >>> y = chain.conv2d(x, ops.prepack_conv2d(first, padding=1), clamp=(0, None))
    >>> y = chain.conv2d(y, ops.prepack_conv2d(second, padding=1), residual=x)
    >>> chain.output(chain.avg_pool2d(y))
    >>> [y.shape for y in chain(np.ones((1, 8, 14, 14), np.float32))]
    [(1, 8, 1, 1)]
    """

    def __init__(self) -> None:
        self._native = _core.Chain()
        self._inputs: list[Value] = []
        self._values: list[Value] = []
        self._outputs: list[Value] | None = None
        self._promises: list[tuple[int, dict[str, Any]]] = []  # of which input, by the options of a layer that reads it
        self._bound: dict[tuple[Any, ...], list[_core.BoundChain]] = {}
        self.layers: list[Packed] = []  # in the order of their steps; what they are and cost, their `explain` tells

    def __copy__(self) -> Chain:
        return self.__deepcopy__({})

    def __deepcopy__(self, memo: dict[int, Any]) -> Chain:
        """Return the chain itself, which does not change once it has outputs."""
        if self._outputs is None:
            raise TypeError("chain: expected outputs before it is copied, got a chain without")
        return self

    def __reduce__(self) -> Any:
        raise TypeError("chain: expected to be made anew from its layers in another process, which pickle cannot do")

    def input(self, dtype: str = "float32", scale: float = 1.0, zero_point: int = 0) -> Value:
        """Add an input: an array (N, C, H, W), or (N, I).

        Parameters
        ----------
        dtype : {"float32", "uint8", "int8"}
        scale, zero_point : float, int
            Of integers, as in `Value`.
        """
        self._check_open()
        if not isinstance(dtype, str) or dtype not in INPUT_RANGES:
            raise ValueError(f"dtype: expected 'float32', 'uint8' or 'int8', got {dtype!r}")
        scale, zero_point = to_number("scale", scale), to_integer("zero_point", zero_point)
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale: expected a positive finite number, got {scale}")
        low, high = INPUT_RANGES[dtype]
        if dtype == "float32" and (scale, zero_point) != (1.0, 0):
            raise ValueError(f"scale, zero_point: expected their defaults for float32, got {scale} and {zero_point}")
        if not low <= zero_point <= high:
            raise ValueError(f"zero_point: expected a value of {dtype}, got {zero_point}")
        value = Value(dtype, scale, zero_point, self, self._native.add_input(dtype), None, len(self._inputs))
        self._inputs.append(value)
        self._values.append(value)
        return value

    def conv2d(
        self,
        x: Value,
        packed: Packed,
        *,
        residual: Value | None = None,
        clamp: Clamp = None,
        out_dtype: str = "float32",
        out_scale: float | None = None,
        out_zero_point: int = 0,
    ) -> Value:
        """Add `ops.conv2d` of a value.

        Parameters
        ----------
        x : Value (N, C, H, W)
            Of the dtype, scale and zero point that the layer was packed for.
        packed : Packed
            Of `ops.prepack_conv2d`.
        residual : Value (N, O, OH, OW), optional
            Added with its own scale and zero point.
        clamp, out_dtype, out_scale, out_zero_point
            As in `ops.conv2d`.

        Returns
        -------
        Value (N, O, OH, OW)

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was expected and what came.
        """
        return self._add_layer("conv2d", x, packed, residual, clamp, out_dtype, out_scale, out_zero_point)

    def linear(
        self,
        x: Value,
        packed: Packed,
        *,
        residual: Value | None = None,
        clamp: Clamp = None,
        out_dtype: str = "float32",
        out_scale: float | None = None,
        out_zero_point: int = 0,
    ) -> Value:
        """Add `ops.linear` of a value (N, I), or of (N, C, H, W) flattened; the rest as in `conv2d`.

        Returns
        -------
        Value (N, O)
        """
        return self._add_layer("linear", x, packed, residual, clamp, out_dtype, out_scale, out_zero_point)

    def _add_layer(
        self,
        kind: str,
        x: Value,
        packed: Packed,
        residual: Value | None,
        clamp: Clamp,
        *out: Any,
    ) -> Value:
        self._check_value("x", x)
        _check_packed(packed, kind)
        if packed._tune_lock is not None:
            raise ValueError(
                "packed: expected a layer that has been tuned (call its warmup first), got one to be tuned"
            )
        wanted = tuple(packed._options[f"input_{name}"] for name in ("dtype", "scale", "zero_point"))
        if (x.dtype, x.scale, x.zero_point) != wanted:
            raise ValueError(
                f"x: expected {_describe(*wanted)}, as the layer was packed for, "
                f"got {_describe(x.dtype, x.scale, x.zero_point)}"
            )
        epilogue = self._epilogue("residual", residual, clamp, *out)
        native = packed._native
        if isinstance(native, DeviceLayer):
            raise ValueError(f"packed: expected a layer in host memory for a chain, got one on cuda:{native.device}")
        index = self._native.add_layer(native, kind == "linear", x.index, _index(residual), **epilogue)
        self.layers.append(packed)
        if x in self._inputs and packed._options["input_bits"] is not None:
            self._promises.append((x.source, packed._options))
        return self._made(index, epilogue, 4 if kind == "conv2d" else 2)

    def max_pool2d(
        self, x: Value, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0, dilation: Pair = 1
    ) -> Value:
        """Add a max-pooling: the largest value of each window; NaN wins.

        Parameters
        ----------
        x : Value (N, C, H, W)
        kernel_size, stride, padding, dilation : int or pair of int
            For height and width; `stride` is `kernel_size` by default, padding at most half of it. Padding is never the
            largest.

        Returns
        -------
        Value (N, C, OH, OW)
            Of the dtype and scale of `x`.
        """
        self._check_value("x", x)
        kernel = to_pair("kernel_size", kernel_size, 1)
        windows = *_windows(kernel, stride, padding), to_pair("dilation", dilation, 1)
        value = Value(x.dtype, x.scale, x.zero_point, self, self._native.add_max_pool2d(x.index, *windows), 4)
        self._values.append(value)
        return value

    def avg_pool2d(
        self,
        x: Value,
        kernel_size: Pair | None = None,
        stride: Pair | None = None,
        padding: Pair = 0,
        *,
        count_include_pad: bool = True,
        clamp: Clamp = None,
        out_dtype: str = "float32",
        out_scale: float | None = None,
        out_zero_point: int = 0,
    ) -> Value:
        """Add an average-pooling.

        Parameters
        ----------
        x : Value (N, C, H, W)
        kernel_size, stride, padding : int or pair of int
            As in `max_pool2d`; no `kernel_size`: the mean of each image.
        count_include_pad : bool
            Whether padding, which is zero, counts.
        clamp, out_dtype, out_scale, out_zero_point
            As in `ops.conv2d`.

        Returns
        -------
        Value (N, C, OH, OW)
        """
        self._check_value("x", x)
        if kernel_size is None:
            if stride is not None or to_pair("padding", padding, 0) != (0, 0):
                raise ValueError("kernel_size: expected one with a stride or padding, got None")
            windows: Windows = ((0, 0), (1, 1), (0, 0))
        else:
            windows = _windows(to_pair("kernel_size", kernel_size, 1), stride, padding)
        epilogue = self._epilogue("residual", None, clamp, out_dtype, out_scale, out_zero_point)
        given = {name: value for name, value in epilogue.items() if not name.startswith("residual")}
        index = self._native.add_avg_pool2d(x.index, *windows, bool(count_include_pad), x.scale, x.zero_point, **given)
        return self._made(index, epilogue, 4)

    def add(
        self,
        a: Value,
        b: Value | None = None,
        *,
        clamp: Clamp = None,
        out_dtype: str = "float32",
        out_scale: float | None = None,
        out_zero_point: int = 0,
    ) -> Value:
        """Add two values of one shape; without `b`, convert one: quantize, dequantize, clamp.

        The order is that of `ops.conv2d`: ``scale * (a - zero_point)``, then `b` as the residual, then the clamp, then
        the output's scale.

        Parameters
        ----------
        a, b : Value
        clamp, out_dtype, out_scale, out_zero_point
            As in `ops.conv2d`.

        Returns
        -------
        Value
            Of the shape of `a`.
        """
        self._check_value("a", a)
        epilogue = self._epilogue("b", b, clamp, out_dtype, out_scale, out_zero_point)
        index = self._native.add_add(a.index, _index(b), scale=a.scale, zero_point=a.zero_point, **epilogue)
        return self._made(index, epilogue, a.ndim, a.source)

    def output(self, *values: Value) -> None:
        """End the chain: its result is the list of these values' arrays.

        Parameters
        ----------
        *values : Value
            Different ones, none of them an input.
        """
        self._check_open()
        for value in values:
            self._check_value("values", value, is_read=False)
            if any(value is x for x in self._inputs):
                raise ValueError("values: expected values that a step made, got an input")
        if not values or len({value.index for value in values}) < len(values):
            raise ValueError(f"values: expected one value or more, each once, got {len(values)}")
        self._outputs = list(values)
        self._native.set_outputs([value.index for value in values])

    def __call__(self, *inputs: NDArray[Any], out: Sequence[NDArray[Any]] | None = None) -> list[NDArray[Any]]:
        """Run every step.

        Parameters
        ----------
        *inputs : array (N, C, H, W) or (N, I)
            One for each input, in their order and of their dtype, any strides.
        out : sequence of arrays, optional
            In C order, one for each output; apart from the inputs and from each other.

        Returns
        -------
        list of arrays
            One for each output, in their order.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was expected and what came.
        """
        rows = self.check_inputs(inputs)
        if out is not None:
            if not isinstance(out, Sequence) or not all(isinstance(array, np.ndarray) for array in out):
                raise TypeError(f"out: expected a sequence of NumPy arrays, got {type(out).__name__}")
            if len(out) != len(rows):
                raise ValueError(f"out: expected {len(rows)} arrays, got {len(out)}")
        return self._native.run(list(inputs), None if out is None else list(out), rows)

    def check_inputs(self, inputs: Sequence[NDArray[Any]]) -> list[bool]:
        """Check the arguments of a call; return which outputs are rows (N, O)."""
        if self._outputs is None:
            raise ValueError("output: expected to be called before the chain is, got a chain without outputs")
        if len(inputs) != len(self._inputs):
            raise TypeError(f"inputs: expected {len(self._inputs)} arrays, got {len(inputs)}")
        for array, value in zip(inputs, self._inputs, strict=True):
            if not isinstance(array, np.ndarray):
                raise TypeError(f"inputs: expected NumPy arrays, got {type(array).__name__}")
            if array.dtype != value.dtype:
                raise TypeError(f"inputs: expected {value.dtype} (N, C, H, W) or (N, I), got {array.dtype}")
            if array.ndim not in (2, 4):
                raise ValueError(f"inputs: expected {value.dtype} (N, C, H, W) or (N, I), got {array.shape}")
        for index, options in self._promises:
            check_promise(inputs[index], options, "inputs")
        return [2 == (inputs[value.source].ndim if value.ndim is None else value.ndim) for value in self._outputs]

    def bind(self, shapes: Sequence[tuple[int, ...]], threads: int) -> _core.BoundChain:
        """Return this chain with memory of its own, for inputs of these shapes and so many threads."""
        full = [(*shape, 1, 1)[:4] for shape in shapes]
        return _core.BoundChain(self._native, full, threads)

    def take_bound(self, shapes: Sequence[tuple[int, ...]]) -> tuple[list[_core.BoundChain], _core.BoundChain]:
        """Return this chain as `bind` does for one thread, and the list to put it back into, for the next one."""
        free = self._bound.setdefault((_core.active_isa(), *shapes), [])
        try:
            return free, free.pop()
        except IndexError:
            if len(self._bound) > MOST_BOUND:
                self._bound.clear()  # a caller that never repeats a size
            return free, self.bind(shapes, 1)

    def allocate_outputs(self, bound: _core.BoundChain, rows: Sequence[bool]) -> list[NDArray[Any]]:
        """Return new arrays for the outputs of a bound chain."""
        assert self._outputs is not None
        shapes = zip(bound.output_shapes, rows, self._outputs, strict=True)
        return [np.empty(shape[: 2 if is_rows else 4], value.dtype) for shape, is_rows, value in shapes]

    def plan(self, *shapes: Sequence[int]) -> list[tuple[tuple[int, int, int, int], str]]:
        """Plan for inputs of these shapes, and tell of every value, in the order of its step, what becomes of it.

        Parameters
        ----------
        *shapes : sequence of int
            (N, C, H, W) or (N, I), one for each input.

        Returns
        -------
        list of tuple
            Shape of the value, and its layout: "plain"; "lifted", in the lanes of its layer; or "channels_last".
        """
        if len(shapes) != len(self._inputs):
            raise TypeError(f"shapes: expected {len(self._inputs)}, got {len(shapes)}")
        full = []
        for shape in shapes:
            if not isinstance(shape, Sequence) or len(shape) not in (2, 4):
                raise ValueError(f"shapes: expected (N, C, H, W) or (N, I), got {shape!r}")
            full.append([*(to_integer("shapes", size, 0) for size in shape), 1, 1][:4])
        return [((n, c, h, w), layout) for (n, c, h, w), layout in self._native.plan(full, len(self._values))]

    def _check_open(self) -> None:
        if self._outputs is not None:
            raise ValueError("output: expected to be the last step, got a step after it")

    def _check_value(self, name: str, value: Any, is_read: bool = True) -> None:
        self._check_open()
        if not isinstance(value, Value):
            raise TypeError(f"{name}: expected a Value, got {type(value).__name__}")
        if value.chain is not self:
            raise ValueError(f"{name}: expected a value of this chain, got one of another")
        if is_read and value.dtype == "int32":
            raise ValueError(f"{name}: expected float32, uint8 or int8, got int32")

    def _epilogue(self, name: str, residual: Value | None, clamp: Clamp, *out: Any) -> dict[str, Any]:
        scale, zero_point = 1.0, 0
        if residual is not None:
            self._check_value(name, residual)
            scale, zero_point = residual.scale, residual.zero_point
        epilogue = check_epilogue(None, scale, zero_point, clamp, *out)
        return {key: value for key, value in epilogue.items() if key != "residual"}

    def _made(self, index: int, epilogue: dict[str, Any], ndim: int | None, source: int = -1) -> Value:
        scale = 1.0 if epilogue["out_scale"] is None else epilogue["out_scale"]
        value = Value(epilogue["out_dtype"], scale, epilogue["out_zero_point"], self, index, ndim, source)
        self._values.append(value)
        return value


def _index(value: Value | None) -> int:
    return -1 if value is None else value.index


def _describe(dtype: str, scale: float, zero_point: int) -> str:
    return dtype if dtype == "float32" else f"{dtype} of scale {scale!r} and zero point {zero_point}"


def _windows(kernel: tuple[int, int], stride: Pair | None, padding: Pair) -> Windows:
    steps = kernel if stride is None else to_pair("stride", stride, 1)
    margins = to_pair("padding", padding, 0)
    if any(2 * margin > size for margin, size in zip(margins, kernel, strict=True)):
        raise ValueError(f"padding: expected at most half of the kernel {kernel}, got {margins}")
    return kernel, steps, margins
