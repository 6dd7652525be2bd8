"""Quantized layers on arrays: pack the weights once, run them many times. Weights expanded by index. Many tasks on one
layer. Branches.

An array is a NumPy array or a torch tensor in host memory; the result is of the same kind. Functions that say so take
CuPy arrays and torch tensors on a CUDA device, too: they run there, on the current stream, and do not wait for it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from pycodesign import _core, _packed_file
from pycodesign._arguments import (
    SHORT_FLOATS,
    Array,
    Pair,
    check_algorithm,
    check_array,
    check_bias,
    check_epilogue,
    check_inputs,
    check_promise,
    check_tune,
    check_weights,
    flatten_out,
    from_numpy,
    join_names,
    to_integer,
    to_numpy,
    to_pair,
)
from pycodesign._deltas import PackedDeltas, delta_linear, prepack_deltas
from pycodesign._device import load_native
from pycodesign._device_layer import ALGORITHMS as DEVICE_ALGORITHMS
from pycodesign._device_layer import DeviceLayer, list_levels, parse_device, run_layer
from pycodesign._expand import expand
from pycodesign._quantized import from_arrays, to_arrays
from pycodesign.branches.parallel import run_branches
from pycodesign.quantize import KernelCodebook, QuantizedTensor

__all__ = [
    "Explanation",
    "Packed",
    "PackedDeltas",
    "conv2d",
    "delta_linear",
    "expand",
    "linear",
    "load_packed",
    "prepack_conv2d",
    "prepack_deltas",
    "prepack_linear",
    "run_branches",
]

Native: TypeAlias = _core.PackedConv2d | _core.PackedLinear | DeviceLayer

CONV2D_ALGORITHMS = ("auto", "codegen", "tables", "dense", "codebook")
LINEAR_ALGORITHMS = (*CONV2D_ALGORITHMS, "packed")
BY_PATTERNS = ("codegen", "tables")  # at most 16 distinct levels, of any size; one scale per output
ONE_BY_ONE = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
COLD_BYTES = 96 << 20  # what tuning reads between two timings


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

    def __init__(
        self,
        q: QuantizedTensor | KernelCodebook,
        bias: NDArray[np.float32] | None,
        options: dict[str, Any],
        tune: bool,
        device: int | None = None,
    ) -> None:
        start = time.perf_counter()
        self.device = device
        self._shape, self._scale, self._bias = q.shape, q.scale.copy(), bias
        self._options = options
        self._tune_lock = threading.Lock() if tune else None
        algorithm, self._why = _choose(q, options) if device is None else _choose_on_device(q, options)
        self._kernels: Any = q.kernels.copy() if isinstance(q, KernelCodebook) else None
        self._indices: Any = None  # of a codebook, where what is packed are its levels
        self._levels: Any = None if isinstance(q, KernelCodebook) else q.levels.copy()
        self._source = q if tune else None
        self._native = self._pack(q, algorithm)
        self._seconds = time.perf_counter() - start
        self._chain: Any = None

    def __repr__(self) -> str:
        return f"Packed(kind={self.kind!r}, shape={self._shape}, algorithm={self.algorithm!r})"

    def __reduce__(self) -> Any:
        raise TypeError("a packed layer cannot be copied or pickled: save it, and load_packed the file")

    def _pack(self, q: QuantizedTensor | KernelCodebook, algorithm: str) -> Native:
        if self.device is not None:
            return self._place(q, algorithm, self.device)
        if isinstance(q, KernelCodebook) and algorithm != "codebook":
            self._indices = to_arrays(q)[0]
            q = _expand(q, algorithm)
            self._levels = q.levels
        o = self._options
        names = "input_dtype", "input_scale", "input_zero_point"
        inputs: dict[str, Any] = {name: o[name] for name in names} | {"input_bits": o["input_bits"] or 0}
        if isinstance(q, KernelCodebook):
            return _core.PackedConv2d.from_codebook(
                **_codebook_arrays(q), bias=self._bias, **_geometry(q.shape, o), **inputs
            )
        if algorithm == "codebook":
            raise ValueError("algorithm: expected a KernelCodebook for 'codebook', got a QuantizedTensor")
        if algorithm not in BY_PATTERNS and _exceed_int8(q.levels, o):
            raise ValueError(f"algorithm: expected 'tables' for levels beyond int8, got {algorithm!r}")
        if algorithm == "codegen" and not _core.generates_code() and _core.active_isa() == _core.supported_isas()[-1]:
            _warn_once()
        if q.codes.ndim == 4 or algorithm in BY_PATTERNS:
            inputs |= _geometry(q.shape, o)
            return _core.PackedConv2d(**_arrays(q), bias=self._bias, **inputs, algorithm=algorithm)
        return _core.PackedLinear(**_arrays(q), bias=self._bias, **inputs, algorithm=algorithm)

    def _place(self, q: QuantizedTensor | KernelCodebook, algorithm: str, device: int) -> DeviceLayer:
        o = self._options
        names = "input_dtype", "input_scale", "input_zero_point"
        options = {name: o[name] for name in names} | {"input_bits": o["input_bits"] or 0} | _geometry(q.shape, o)
        native = load_native().PackedLayer
        if algorithm == "codebook":
            if not isinstance(q, KernelCodebook):
                raise ValueError("algorithm: expected a KernelCodebook for 'codebook', got a QuantizedTensor")
            placed = native.from_codebook(**_codebook_arrays(q), bias=self._bias, **options, device=device)
        else:
            few = q if isinstance(q, QuantizedTensor) else list_levels(q)
            placed = native(**_arrays(few), bias=self._bias, **options, algorithm=algorithm, device=device)
        layer = DeviceLayer(q, placed, o["input_dtype"])
        self._why = f"{self._why}; {layer.why}"
        return layer

    @property
    def algorithm(self) -> str:
        """Name of the algorithm that the layer is packed for."""
        return self._native.algorithm

    @property
    def kind(self) -> str:
        """``"conv2d"`` or ``"linear"``."""
        return "conv2d" if len(self._shape) == 4 else "linear"

    def weights(self) -> QuantizedTensor | KernelCodebook:
        """Return the quantized weights, decoded from the packed form; of a codebook, the codebook."""
        if isinstance(self._native, DeviceLayer):
            return self._native.q
        if self.algorithm == "codebook" and isinstance(self._native, _core.PackedConv2d):
            return KernelCodebook(*self._native.indices(), self._kernels, self._scale)
        if self._kernels is not None:
            return from_arrays(self._indices, self._kernels, self._scale)
        return QuantizedTensor(self._native.codes().reshape(self._shape), self._levels, self._scale)

    def explain(self) -> Explanation:
        """Say what runs and why, and what it costs.

        Returns
        -------
        Explanation
            ``kind``, ``algorithm``, ``why``; ``adds`` and ``multiplies`` as executed and ``dense_ops`` = O (2 I - 1),
            all per output pixel or row; ``share_removed``, negative where a small ``packed`` layer counts what it pads;
            ``bytes`` of the packed weights beside ``float32_bytes``,
            and ``code_bytes`` of the machine code made from them;
            ``seconds`` it took to pack; ``isa`` and ``threads`` in force, or on a GPU ``device`` and ``blocks``: how
            the last sizes of x were cut.
        """
        counts = self._native.counts()
        algorithm, why = self.algorithm, self._why
        if algorithm == "codegen" and not _core.generates_code():
            algorithm, why = "tables", f"{why}; no machine code is made for {_core.active_isa()} here"
        size = math.prod(self._shape)
        dense_ops = 2 * size - self._shape[0]
        if isinstance(self._native, DeviceLayer):
            place: dict[str, Any] = {"device": f"cuda:{self.device}", "blocks": self._native.plans()}
        else:
            place = {"isa": _core.active_isa(), "threads": _core.get_num_threads()}
        return Explanation(
            kind=self.kind,
            algorithm=algorithm,
            why=why,
            adds=counts["adds"],
            multiplies=counts["multiplies"],
            dense_ops=dense_ops,
            share_removed=1 - (counts["adds"] + counts["multiplies"]) / dense_ops,
            bytes=counts["bytes"],
            code_bytes=counts["code_bytes"],
            float32_bytes=4 * size,
            seconds=self._seconds,
            **place,
        )

    def warmup(self, shape: Sequence[int]) -> None:
        """Plan (and tune, where asked for) for inputs of one shape, so that the first call does not have to.

        Parameters
        ----------
        shape : sequence of int
            Of the input: (N, C, H, W), or (..., I) for a linear layer.
        """
        if not isinstance(shape, Iterable):
            raise TypeError(f"shape: expected a sequence of integers, got {type(shape).__name__}")
        sizes = tuple(to_integer("shape", size, 0) for size in shape)
        if isinstance(self._native, DeviceLayer):
            self._native.plan(self._native.find_size(sizes, self._options["input_dtype"]))
            return
        x = np.zeros(sizes, self._options["input_dtype"])
        conv2d(x, self) if self.kind == "conv2d" else linear(x, self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write codes, levels, scale, bias and options to a safetensors file, never machine code or programs.

        The file appears whole or not at all. Equal layers give equal bytes.

        Parameters
        ----------
        path : path
        """
        chosen = {"algorithm": self.algorithm, "why": self._why}
        data = _packed_file.encode(self.weights(), self._bias, self._options | chosen)
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, target)
        except OSError as error:
            if error.filename is None:
                raise
            raise type(error)(error.errno, error.strerror, os.fspath(path)) from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def to_chain(self) -> Any:
        """Return the layer, without an epilogue, as a `repetition.chain.Chain`; one to be tuned, as it is."""
        if self._tune_lock is not None:
            return self
        if self._chain is None:
            from pycodesign.repetition.chain import Chain

            chain, o = Chain(), self._options
            x = chain.input(o["input_dtype"], o["input_scale"], o["input_zero_point"])
            chain.output(getattr(chain, self.kind)(x, self))
            self._chain = chain
        return self._chain

    def __call__(self, *inputs: Array) -> Array:
        """Run the layer, without an epilogue: `conv2d` or `linear` of it."""
        if len(inputs) != 1:
            raise TypeError(f"inputs: expected 1 arrays, got {len(inputs)}")
        return (conv2d if self.kind == "conv2d" else linear)(*inputs, self)

    def _run(self, x: NDArray[Any], call: Callable[[Native], Array]) -> Array:
        """Run, after choosing by time on the first call with something to time where tuning was asked for."""
        lock = self._tune_lock
        if lock is not None and x.size:
            with lock:
                if self._tune_lock is not None and call(self._native).size:
                    self._tune(call)
                    self._tune_lock = self._source = None
        return call(self._native)

    def _tune(self, call: Callable[[Native], Array]) -> None:
        q = self._source
        assert q is not None
        natives: dict[str, Native] = {}
        for algorithm in (CONV2D_ALGORITHMS if self.kind == "conv2d" else LINEAR_ALGORITHMS)[1:]:
            if algorithm == "codegen" and not _core.generates_code():
                continue  # `tables` would run
            try:
                natives[algorithm] = self._native if algorithm == self.algorithm else self._pack(q, algorithm)
            except ValueError:
                continue  # cannot hold these weights
        other = np.ones(COLD_BYTES, np.uint8)
        seconds: dict[str, list[float]] = {algorithm: [] for algorithm in natives}
        for _ in range(7):
            for algorithm, native in natives.items():
                other.max()
                start = time.perf_counter()
                call(native)
                seconds[algorithm].append(time.perf_counter() - start)
        medians = {algorithm: float(np.median(times[1:])) for algorithm, times in seconds.items()}
        best = min(medians, key=medians.__getitem__)
        self._native = natives[best]
        self._why = "measured cold: " + ", ".join(f"{a} {1e3 * t:.3g} ms" for a, t in sorted(medians.items()))


def prepack_conv2d(
    q: QuantizedTensor | KernelCodebook,
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
    device: Any = None,
) -> Packed:
    """Pack the quantized weights of a convolution.

    Parameters
    ----------
    q : QuantizedTensor or KernelCodebook (O, C / groups, kH, kW)
    bias : float32 (O,), optional
    stride, padding, dilation : int or pair of int
        For height and width. Padding stands for real zeros.
    groups : int
        Divides C and O.
    input_dtype : {"float32", "uint8", "int8"}
        On a GPU also ``"float16"`` and ``"bfloat16"``.
    input_scale, input_zero_point : float, int
        Real value of an integer input: ``input_scale * (x - input_zero_point)``.
    input_bits : int, optional
        Promise that integer inputs fit this many bits. A broken promise gives wrong sums; ``PYCODESIGN_CHECK=1``
        verifies it.
    algorithm : {"auto", "codegen", "tables", "dense", "codebook"}
        ``codegen``: machine code, made for these weights while packing, adds every partial sum of a few channels to
        all outputs that share it (at most 16 distinct levels; x86-64 with AVX2 on Linux, and not with
        ``PYCODESIGN_JIT=0``: elsewhere ``tables`` runs instead, with a warning).
        ``tables``: partial sums of small groups of channels are computed once and looked up (at most 16 distinct
        levels).
        ``dense``: every product, in 8-bit dot products or float32.
        ``codebook``, of a `KernelCodebook`: each input channel's convolution with each kernel is computed once, and an
        output adds one of them for each channel. A codebook of integers can be packed by the others, too: ``codegen``
        finds the kernels that recur in any weights.
        ``auto``: what a cost model predicts to be faster; see `Packed.explain`.
    tune : bool
        Measure at the first call or `Packed.warmup`, with cold weights, instead of predicting.
    device : "cuda", "cuda:0" and so on, int, or torch.device, optional
        The GPU that the weights are put on, and arrays of CuPy or torch are expected on; ``"cuda"`` is the current one.
        There ``auto`` is ``dense``, codes of 1, 2 or 4 bits unpacked in registers for the matrix unit; ``tables`` and
        ``codebook`` are the published sums, on CUDA cores. Run a layer once before a CUDA graph captures it, and keep
        it for as long as the graph. Host memory by default.

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
    check_weights(q, 4, "(O, C / groups, kH, kW)")
    groups = to_integer("groups", groups, 1)
    if q.shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of the {q.shape[0]} outputs, got {groups}")
    options = {
        "stride": to_pair("stride", stride, 1),
        "padding": to_pair("padding", padding, 0),
        "dilation": to_pair("dilation", dilation, 1),
        "groups": groups,
    }
    check_algorithm(algorithm, CONV2D_ALGORITHMS)
    check_tune(tune, algorithm)
    index = _check_device(device, algorithm, tune)
    inputs = check_inputs(q, input_dtype, input_scale, input_zero_point, input_bits, index is not None)
    return Packed(q, check_bias(bias, q), {**options, **inputs, "algorithm": algorithm}, tune, index)


def prepack_linear(
    q: QuantizedTensor | KernelCodebook,
    bias: Array | None = None,
    *,
    input_dtype: str = "float32",
    input_scale: float = 1.0,
    input_zero_point: int = 0,
    input_bits: int | None = None,
    algorithm: str = "auto",
    tune: bool = False,
    device: Any = None,
) -> Packed:
    """Pack the quantized weights of a linear layer.

    Parameters
    ----------
    q : QuantizedTensor or KernelCodebook (O, I)
        Its scale may be (O, G): one per group of I / G inputs (not for ``codegen`` and ``tables``).
    bias : float32 (O,), optional
    input_dtype, input_scale, input_zero_point, input_bits, tune, device
        As for `prepack_conv2d`.
    algorithm : {"auto", "codegen", "tables", "dense", "codebook", "packed"}
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
    check_weights(q, 2, "(O, I)")
    check_algorithm(algorithm, LINEAR_ALGORITHMS)
    if algorithm in BY_PATTERNS and q.scale.ndim == 2 and q.scale.shape[1] > 1:
        wanted = f"'dense' or 'packed' for one scale per group of inputs {q.scale.shape}"
        raise ValueError(f"algorithm: expected {wanted}, got {algorithm!r}")
    check_tune(tune, algorithm)
    index = _check_device(device, algorithm, tune)
    inputs = check_inputs(q, input_dtype, input_scale, input_zero_point, input_bits, index is not None)
    return Packed(q, check_bias(bias, q), {**inputs, "algorithm": algorithm}, tune, index)


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

    For integer inputs every step is one float32 rounding, in this order: results are the same on every machine::

        acc = sum of level * (x - input_zero_point)                      exact
        y = float(acc) * float32(input_scale * scale[o]) + bias[o]
        y = y + residual_scale * (residual - residual_zero_point)
        y = clamp(y);  integer outputs: saturate(rint(y / out_scale) + out_zero_point)

    Float inputs give the same in float arithmetic, within ``8 eps sqrt(K) sum |w| |x|`` for K weights per output, the
    same bits from run to run; ``dense`` on AMX takes what is below 2^-126 in its sums, or the last digits of an element
    of `x` below 2^-103, as zero. Outputs of 16 bits are y, rounded once more. No gradients are recorded: the modules of
    `pycodesign.nn` do that.

    Parameters
    ----------
    x : float32, uint8 or int8 (N, C, H, W), or on a GPU float16 or bfloat16
        Of the packed `input_dtype`; any strides. An infinite or NaN element makes the outputs that read it through a
        nonzero weight infinite or NaN; through a zero weight it may or may not. No other output sees it.
    packed : Packed
    residual : float32, uint8 or int8 (N, O, OH, OW), or on a GPU float16 or bfloat16, optional
        Added before the clamp.
    residual_scale, residual_zero_point : float, int
        The scale is finite, of any sign.
    clamp : pair of float or None, optional
        Lowest and highest value; ReLU is ``(0, None)``.
    out_dtype : {"float32", "int32", "uint8", "int8"}
        ``"int32"`` gives `acc` itself, without bias (integer inputs only). On a GPU also ``"float16"`` and
        ``"bfloat16"``.
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
    if isinstance(packed._native, DeviceLayer):
        numbers = residual_scale, residual_zero_point, clamp, out_dtype, out_scale, out_zero_point
        return run_layer(packed._native, packed._options, x, residual, numbers, out)
    given, kind = to_numpy("x", x)
    check_promise(given, packed._options)
    epilogue = residual, residual_scale, residual_zero_point, clamp, out_dtype, out_scale, out_zero_point
    arguments = check_epilogue(*epilogue)
    target = None if out is None else to_numpy("out", out)[0]
    y = packed._run(given, lambda native: native.run(given, **arguments, out=target))  # type: ignore[union-attr]
    return out if out is not None else from_numpy(y, kind)


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
    x : float32, uint8 or int8 (..., I), or on a GPU float16 or bfloat16
    packed : Packed
    residual : array (..., O), optional
    residual_scale, residual_zero_point, clamp, out_dtype, out_scale, out_zero_point
        As for `conv2d`. With one scale per group of inputs, the groups' products ``float(acc[g]) * m[o, g]`` are added
        in ascending order of g before the bias.
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
    if isinstance(packed._native, DeviceLayer):
        numbers = residual_scale, residual_zero_point, clamp, out_dtype, out_scale, out_zero_point
        return run_layer(packed._native, packed._options, x, residual, numbers, out)
    given, kind = to_numpy("x", x)
    outputs, inputs = packed._shape
    check_array("x", given, (packed._options["input_dtype"],), f"(..., {inputs})", given.shape[-1:] == (inputs,))
    check_promise(given, packed._options)
    shape = (*given.shape[:-1], outputs)
    flat = given.reshape(math.prod(given.shape[:-1]), inputs)
    epilogue = residual, residual_scale, residual_zero_point, clamp, out_dtype, out_scale, out_zero_point
    arguments = check_epilogue(*epilogue, shape=shape)
    target = None if out is None else flatten_out(to_numpy("out", out)[0], shape, out_dtype)
    y = packed._run(given, lambda native: native.run_rows(flat, **arguments, out=target))  # type: ignore[union-attr]
    return out if out is not None else from_numpy(y.reshape(shape), kind)


def load_packed(path: str | os.PathLike[str], *, device: Any = None) -> Packed:
    """Read a packed layer from a file of `Packed.save`; its program is built anew.

    Parameters
    ----------
    path : path
    device : optional
        As for `prepack_conv2d`; the algorithm is chosen anew there.

    Returns
    -------
    Packed

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is no such file, is damaged, or holds a layer of 16-bit floats and `device` is no GPU.
    """
    data = Path(path).read_bytes()
    index = parse_device(device)
    _core.active_isa(), _core.get_num_threads()  # raise where a variable makes no sense: no fault of the file
    try:
        q, bias, options = _packed_file.decode(data)
        why = str(options.pop("why"))
        prepack = prepack_conv2d if len(q.shape) == 4 else prepack_linear
        if index is not None:
            return prepack(q, bias, **options | {"algorithm": "auto", "device": index})
        if options.get("input_dtype") not in SHORT_FLOATS:
            packed = prepack(q, bias, **options, device=None, tune=False)  # which no file may ask for
            packed._why = why
            return packed
    except (SafetensorError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as e:
        wanted = "a packed layer of pycodesign"
        raise ValueError(f"{os.fspath(path)}: expected {wanted}, got a damaged or foreign file: {e}") from e
    raise ValueError(f"device: expected a GPU for a layer of {options['input_dtype']} inputs, got none")


def _choose(q: QuantizedTensor | KernelCodebook, options: dict[str, Any]) -> tuple[str, str]:
    if options["algorithm"] != "auto":
        return options["algorithm"], "asked for"
    zero_point, bits = options["input_zero_point"], options["input_bits"] or 0
    inputs: dict[str, Any] = {"input_dtype": options["input_dtype"], "input_zero_point": zero_point, "input_bits": bits}
    if isinstance(q, KernelCodebook):
        if len(q.shape) == 2 and q.values != "real":
            return _core.choose_linear(**_arrays(q.to_quantized()), input_dtype=options["input_dtype"])
        if _exceed_int8(q.kernels, options):
            return "codebook", "kernels beyond int8"
        return _core.choose_codebook(**_codebook_arrays(q), **_geometry(q.shape, options), **inputs)
    if _exceed_int8(q.levels, options):
        if np.unique(q.levels).size > 16 or q.scale[0].size > 1:
            raise ValueError(
                f"q: expected levels from -128 to 127, or at most 16 of them and one scale per output, for "
                f"{options['input_dtype']} inputs, got {q.levels.min():g} to {q.levels.max():g}"
            )
        return "tables", "levels beyond int8"
    if q.codes.ndim == 2:
        return _core.choose_linear(**_arrays(q), input_dtype=options["input_dtype"])
    return _core.choose_conv2d(**_arrays(q), **_geometry(q.shape, options), **inputs)


def _check_device(device: Any, algorithm: str, tune: bool) -> int | None:
    """Return the index of the GPU, None for host memory."""
    index = parse_device(device)
    if index is None:
        return None
    if algorithm not in DEVICE_ALGORITHMS:
        wanted = join_names(map(repr, DEVICE_ALGORITHMS))
        raise ValueError(f"algorithm: expected {wanted} on a GPU, got {algorithm!r}")
    if tune:
        raise ValueError("tune: expected False on a GPU, where blocks are cut by a cost model, got True")
    return index


def _choose_on_device(q: QuantizedTensor | KernelCodebook, options: dict[str, Any]) -> tuple[str, str]:
    levels = q.levels if isinstance(q, QuantizedTensor) else q.kernels
    asked = options["algorithm"]
    if _exceed_int8(levels, options):
        if asked == "dense" or q.scale[0].size > 1:
            got = f"{levels.min():g} to {levels.max():g}"
            wanted = f"levels from -128 to 127 for 'dense' and {options['input_dtype']} inputs"
            raise ValueError(f"q: expected {wanted}, got {got}")
        return ("tables", "levels beyond int8") if asked == "auto" else (asked, "asked for")
    if isinstance(q, KernelCodebook) and np.unique(np.abs(q.kernels)).size > 128 and asked == "auto":
        return "codebook", "too many values of kernels for the matrix unit"
    return ("dense", "a matrix unit is faster") if asked == "auto" else (asked, "asked for")


def _arrays(q: QuantizedTensor) -> dict[str, Any]:
    """Codes (O, I), levels (1 or O, Q) and scale (O, G)."""
    codes = q.codes.reshape(q.shape[0], -1).astype(np.uint8, copy=False)
    return {"codes": codes, "levels": np.atleast_2d(q.levels), "scale": q.scale.reshape(q.shape[0], -1)}


def _codebook_arrays(q: KernelCodebook) -> dict[str, Any]:
    """Index, sign (O, J), kernels (C, U, inputs), their levels (1, Q), none for fractions, scale (O, 1)."""
    try:
        levels = q.to_quantized().levels
    except ValueError:
        levels = np.empty(0, np.float32)
    arrays = {"kernels": q.kernels.reshape(*q.kernels.shape[:2], -1), "levels": np.atleast_2d(levels)}
    return {"index": q.index, "sign": q.sign, **arrays, "scale": q.scale.reshape(-1, 1)}


def _geometry(shape: tuple[int, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Channels, groups, kernel, stride, padding and dilation; a linear layer's rows are the pixels of an image."""
    if len(shape) == 2:
        return {"channels": shape[1], "groups": 1, "kernel": (1, 1), **ONE_BY_ONE}
    own = {name: options[name] for name in ("groups", *ONE_BY_ONE)}
    return {"channels": shape[1] * options["groups"], "kernel": shape[2:], **own}


def _expand(q: KernelCodebook, algorithm: str) -> QuantizedTensor:
    try:
        return q.to_quantized()
    except ValueError as error:
        raise ValueError(f"algorithm: expected 'codebook' for these kernels, got {algorithm!r}: {error}") from None


@functools.cache
def _warn_once() -> None:
    needs = "x86-64 with AVX2, a Linux that lets memory become executable, and PYCODESIGN_JIT other than 0"
    text = f"algorithm: 'codegen' asked for, 'tables' runs: machine code needs {needs}"
    warnings.warn(text, RuntimeWarning, stacklevel=5)


def _exceed_int8(levels: NDArray[np.float32], options: dict[str, Any]) -> bool:
    return "float" not in options["input_dtype"] and bool(np.abs(levels + 0.5).max() > 127.5)


def _check_packed(packed: Any, kind: str) -> None:
    if not isinstance(packed, Packed):
        raise TypeError(f"packed: expected a Packed {kind} layer, got {type(packed).__name__}")
    if packed.kind != kind:
        raise ValueError(f"packed: expected a Packed {kind} layer, got a {packed.kind} layer")
