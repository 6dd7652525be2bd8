"""Packed layers on a GPU: what `pycodesign.ops` does for them, on arrays of CuPy and torch."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from pycodesign._arguments import (
    INPUT_RANGES,
    OUTPUT_DTYPES,
    SHORT_FLOATS,
    Array,
    check_epilogue,
    join_names,
    to_integer,
)
from pycodesign._device import Device, find_device, load_native
from pycodesign.quantize import KernelCodebook, QuantizedTensor

ALGORITHMS = ("auto", "dense", "tables", "codebook")
KEPT_PLANS = 64  # of sizes that were seen


def parse_device(device: Any) -> int | None:
    """Return the index of a CUDA device, None for host memory; of "cuda", the current device's.

    Raises
    ------
    TypeError, ValueError
        If it names no device.
    RuntimeError
        Where there are no kernels for it, saying why.
    """
    if device is None:
        return None
    if isinstance(device, int) and not isinstance(device, bool):
        index: int | None = to_integer("device", device, 0)
    else:
        kind, _, number = str(device).partition(":")
        if kind == "cpu":
            return None
        if kind != "cuda" or (str(device) != "cuda" and not number.isdecimal()):
            raise ValueError(f"device: expected None, 'cpu', 'cuda' or 'cuda:0', got {device!r}")
        index = to_integer("device", int(number), 0) if number else None
    native = load_native()
    index = native.current_device() if index is None else index
    native.device_properties(index)  # or it says which there are
    return int(index)


class DeviceLayer:
    """The weights of a layer in a GPU's memory."""

    def __init__(self, q: QuantizedTensor | KernelCodebook, native: Any, input_dtype: str) -> None:
        self.q, self.native, self.input_dtype, self.device = q, native, input_dtype, native.device
        self._lock = threading.Lock()
        self._plans: dict[tuple[int, ...], Any] = {}
        self._captured: list[Array] = []  # workspace of calls that CuPy's graphs repeat

    @property
    def algorithm(self) -> str:
        return str(self.native.algorithm)

    @property
    def why(self) -> str:
        """What the kernels do with these weights."""
        return str(self.native.why)

    def counts(self) -> dict[str, int]:
        return {**self.native.counts(), "code_bytes": 0}

    def plans(self) -> dict[tuple[int, ...], str]:
        """How the last sizes of x are cut into blocks."""
        with self._lock:
            return {shape: plan["why"] for shape, plan in self._plans.items()}

    def plan(self, shape: tuple[int, ...]) -> Any:
        """Return the output's shape, the bytes of workspace, and how blocks are cut."""
        plan = self._plans.get(shape)
        if plan is None:
            plan = self.native.plan(shape)
            with self._lock:
                if len(self._plans) >= KEPT_PLANS:
                    self._plans.pop(next(iter(self._plans)))
                self._plans[shape] = plan
        return plan

    def find_size(self, shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
        """Check what x is, images (N, C, H, W) or (..., I), and return the size to plan for."""
        is_linear = len(self.q.shape) == 2
        expected = f"(..., {self.q.shape[1]})" if is_linear else "(N, C, H, W)"
        if dtype != self.input_dtype:
            raise TypeError(f"x: expected {self.input_dtype} {expected}, got {dtype} {shape}")
        if shape[-1:] != self.q.shape[1:] if is_linear else len(shape) != 4:
            raise ValueError(f"x: expected {self.input_dtype} {expected}, got {dtype} {shape}")
        return (math.prod(shape[:-1]), shape[-1]) if is_linear else shape

    def run(
        self, x: Array, residual: Array | None, epilogue: dict[str, Any], out: Array | None, bits: int | None = None
    ) -> Array:
        """Run on x, whose values `bits` promises to hold; `epilogue` as `check_epilogue` returns it."""
        device = self._find_device(x, residual, out)
        shape, is_linear = tuple(x.shape), len(self.q.shape) == 2
        size = self.find_size(shape, device.dtype_name(x))
        _check_promise(x, self.input_dtype, bits)
        plan = self.plan(size)
        out_shape = (*shape[:-1], self.q.shape[0]) if is_linear else tuple(plan["shape"])
        if residual is not None:
            _check(device, "residual", residual, (*INPUT_RANGES, *SHORT_FLOATS), out_shape)
        if out is not None:
            _check(device, "out", out, (epilogue["out_dtype"],), out_shape)
        y = device.empty(out_shape, epilogue["out_dtype"]) if out is None else out
        bytes_needed = plan["workspace_bytes"]
        workspace = device.empty((bytes_needed,), "uint8") if bytes_needed else None
        if workspace is not None and device.frees_captured:
            self._captured.append(workspace)
        flat_x, flat_residual = (_flatten(device, a, s) for a, s in ((x, size), (residual, plan["shape"])))
        self.native.run(
            flat_x,
            flat_residual,
            **{name: value for name, value in epilogue.items() if name != "residual"},
            out=_flatten_out(device, y, tuple(plan["shape"])),
            workspace=None if workspace is None else device.view(workspace),
            stream=device.stream,
        )
        return y

    def _find_device(self, x: Array, residual: Array | None, out: Array | None) -> Device:
        device = find_device(x=x, residual=residual, out=out)
        if device is None:
            raise TypeError(f"x: expected an array on cuda:{self.device}, where packed is, got one in host memory")
        if device.index != self.device:
            raise TypeError(f"x: expected an array on cuda:{self.device}, where packed is, got {device}")
        return device


def run_layer(
    layer: DeviceLayer,
    options: dict[str, Any],
    x: Array,
    residual: Array | None,
    numbers: tuple[Any, ...],
    out: Array | None,
) -> Array:
    """Run `ops.conv2d` or `ops.linear`; `numbers` are what `check_epilogue` takes after the residual."""
    epilogue = check_epilogue(None, *numbers, dtypes=(*OUTPUT_DTYPES, *SHORT_FLOATS))
    return layer.run(x, residual, epilogue, out, options["input_bits"])


def list_levels(q: KernelCodebook) -> QuantizedTensor:
    """Return the same weights as codes and levels."""
    levels = np.unique(np.stack([q.kernels, 0 - q.kernels]))
    if levels.size > 256:
        raise ValueError(f"q: expected at most 256 distinct values of kernels for 'dense', got {levels.size}")
    return QuantizedTensor(np.searchsorted(levels, q.decode()).astype(np.uint8), levels, q.scale)


def _check(device: Device, name: str, array: Array, dtypes: Sequence[str], shape: tuple[int, ...]) -> None:
    dtype, got = device.dtype_name(array), tuple(array.shape)
    if dtype in dtypes and got == shape:
        return
    text = f"{name}: expected {join_names(dtypes)} {shape}, got {dtype} {got}"
    raise (ValueError if dtype in dtypes else TypeError)(text)


def _flatten(device: Device, array: Array | None, shape: tuple[int, ...]) -> Any:
    """Return what a native call takes, of a dense copy where leading dimensions do not flatten otherwise."""
    if array is None:
        return None
    return device.view(array if tuple(array.shape) == tuple(shape) else device.reshape(array, tuple(shape)))


def _flatten_out(device: Device, out: Array, shape: tuple[int, ...]) -> Any:
    if tuple(out.shape) == shape:
        return device.view(out)
    view = device.view(out)
    interface = dict(view if isinstance(view, dict) else view.__cuda_array_interface__)
    strides, sizes = interface.get("strides"), interface["shape"]
    if strides is not None and math.prod(sizes):
        kept = [(size, stride) for size, stride in zip(sizes[:-1], strides[:-1], strict=True) if size > 1]
        for (_, outer), (size, inner) in pairwise(kept):
            if outer != size * inner:
                raise ValueError("out: expected leading dimensions that flatten without a copy, got other strides")
        interface["strides"] = (kept[-1][1] if kept else 0, strides[-1])
    else:
        interface["strides"] = None
    return interface | {"shape": shape}


def _check_promise(x: Array, dtype: str, bits: int | None) -> None:
    """Verify what `input_bits` promises, where ``PYCODESIGN_CHECK`` asks for it; this waits for the device."""
    if bits is None or os.environ.get("PYCODESIGN_CHECK", "0") in ("", "0") or math.prod(x.shape) == 0:
        return
    low = -(1 << (bits - 1)) if dtype == "int8" else 0
    high, least, most = low + (1 << bits) - 1, int(x.min()), int(x.max())
    if least < low or most > high:
        raise ValueError(f"x: expected values of {bits} bits, {low} to {high}, got {least} to {most}")
