"""GPUs as tests see them: of CuPy, of torch, or the emulated module, which the CMake preset ``default`` builds.

Emulated kernels run on the CPU, on arrays of a CuPy that has what pycodesign uses of it, and on torch's tensors in host
memory.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import pycodesign
from pycodesign import _device

GUARD, GUARD_BYTES = 0xA5, 256


class EmulatedArray:
    """What pycodesign uses of a CuPy array; in host memory."""

    def __init__(self, host: NDArray[Any]) -> None:
        self.host = host
        self.shape, self.dtype, self.ndim, self.strides = host.shape, host.dtype, host.ndim, host.strides
        self.flags, self.data = host.flags, types.SimpleNamespace(ptr=host.ctypes.data)
        self.device = types.SimpleNamespace(id=0)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        host = self.host
        return {
            "shape": host.shape,
            "typestr": host.dtype.str,
            "data": (host.ctypes.data if host.size else 0, not host.flags.writeable),
            "strides": None if host.flags.c_contiguous else host.strides,
            "version": 3,
            "stream": 1,
        }

    def __getitem__(self, key: Any) -> EmulatedArray:
        return EmulatedArray(self.host[key.host if isinstance(key, EmulatedArray) else key])

    def reshape(self, *shape: Any) -> EmulatedArray:
        return EmulatedArray(self.host.reshape(*shape))

    def get(self) -> NDArray[Any]:
        return self.host.copy()


class EmulatedCupy(types.ModuleType):
    """What pycodesign uses of CuPy. New arrays lie between guards and hold no zeros."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.ndarray = EmulatedArray
        self.buffers: list[tuple[NDArray[np.uint8], int]] = []
        self.is_capturing = False
        stream = types.SimpleNamespace(ptr=0, is_capturing=lambda: self.is_capturing)
        self.cuda = types.SimpleNamespace(get_current_stream=lambda device=0: stream, Device=self._enter)

    @staticmethod
    def _enter(device: int) -> Any:
        from contextlib import nullcontext

        return nullcontext()

    def empty(self, shape: Any, dtype: Any = "float64") -> EmulatedArray:
        count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        buffer = np.full(count + 2 * GUARD_BYTES, GUARD, np.uint8)
        begin = GUARD_BYTES - buffer.ctypes.data % GUARD_BYTES
        self.buffers.append((buffer, begin))
        self.buffers[-1][0][begin : begin + count] = 0xFF
        return EmulatedArray(buffer[begin : begin + count].view(dtype).reshape(shape))

    def asarray(self, array: Any, dtype: Any = None) -> EmulatedArray:
        host = array.host if isinstance(array, EmulatedArray) else np.asarray(array)
        made = self.empty(host.shape, dtype or host.dtype)
        made.host[...] = host
        return made

    ascontiguousarray = asarray

    def check_guards(self) -> None:
        for buffer, begin in self.buffers:
            count = len(buffer) - 2 * GUARD_BYTES
            assert (buffer[:begin] == GUARD).all() and (buffer[begin + count :] == GUARD).all()


class HostTorch(_device.TorchDevice):
    """Torch's tensors in host memory, as if they were on a GPU."""

    name = "cpu"
    stream = 0

    def check_upload(self, name: str) -> None:
        pass

    def upload(self, name: str, array: NDArray[Any]) -> Any:
        return torch.from_numpy(array.copy())


class Gpu:
    """Arrays of one library on one GPU."""

    def __init__(self, kind: str, is_emulated: bool) -> None:
        self.kind, self.is_emulated = kind, is_emulated

    def put(self, array: Any) -> Any:
        """Return an array on the GPU; where it is emulated, one in the same memory."""
        if array is None:
            return None
        if self.kind == "torch":
            tensor = array
            if isinstance(array, np.ndarray) and array.dtype == ml_dtypes.bfloat16:
                tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            elif isinstance(array, np.ndarray):
                tensor = torch.from_numpy(array)
            return tensor if self.is_emulated else tensor.cuda()
        if array.dtype == ml_dtypes.bfloat16:
            pytest.skip("CuPy has no bfloat16")
        return EmulatedArray(array) if self.is_emulated else sys.modules["cupy"].asarray(array)

    def get(self, array: Any) -> NDArray[Any]:
        """Return a copy in host memory."""
        if self.kind == "torch":
            assert isinstance(array, torch.Tensor)
            if array.dtype == torch.bfloat16:
                return array.cpu().view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
            return array.cpu().numpy().copy()
        assert isinstance(array, sys.modules["cupy"].ndarray)
        return array.get()


def emulate(path: Path, monkeypatch: pytest.MonkeyPatch) -> EmulatedCupy:
    """Put the emulated module and CuPy in their places for one test."""
    module = sys.modules.get("emulated._cuda")
    if module is None:
        spec = importlib.util.spec_from_file_location("_cuda", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["emulated._cuda"] = module
    cupy = EmulatedCupy()
    monkeypatch.setitem(sys.modules, "pycodesign._cuda", module)
    monkeypatch.setattr(pycodesign, "_cuda", module, raising=False)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    locate = _device.locate
    monkeypatch.setattr(_device, "locate", lambda a: HostTorch(0) if isinstance(a, torch.Tensor) else locate(a))
    return cupy


def find_absence(kind: str) -> str:
    """Return why arrays of a library cannot be used on a GPU here; empty where they can."""
    try:
        native = _device.load_native()
    except RuntimeError as error:
        return str(error)
    assert native.device_count()
    if kind == "torch":
        return "" if torch.cuda.is_available() else "torch sees no CUDA device"
    try:
        importlib.import_module("cupy")
    except ImportError:
        return "CuPy is not installed"
    return ""
