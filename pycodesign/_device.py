"""Arrays in a GPU's memory, CuPy's and torch's: where they are, and what their own library does for a call.

A call on the GPU runs on the current stream of the arrays' library, and never waits. What it needs is allocated there,
in that stream's order, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = Any  # a CuPy array or a torch tensor


@dataclass(frozen=True)
class CupyDevice:
    """A GPU as CuPy sees it."""

    index: int

    def __str__(self) -> str:
        return f"a CuPy array on device {self.index}"

    @property
    def stream(self) -> int:
        """Handle of the current stream."""
        return int(sys.modules["cupy"].cuda.get_current_stream(self.index).ptr)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Return a new array of a dtype that NumPy has."""
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(self.index):
            return cupy.empty(shape, dtype)

    def empty_like(self, array: Array, shape: tuple[int, ...]) -> Array:
        return self.empty(shape, array.dtype)

    @property
    def frees_captured(self) -> bool:
        """Whether a graph uses what is allocated now after CuPy has given it away: its graphs have no pool."""
        return bool(sys.modules["cupy"].cuda.get_current_stream(self.index).is_capturing())

    def check_upload(self, name: str) -> None:
        """Refuse copies from host memory while a graph is captured."""
        if self.frees_captured:
            raise _refuse_upload(name, self)

    def upload(self, name: str, array: NDArray[Any]) -> Array:
        """Return a copy on the device, for this stream only."""
        self.check_upload(name)
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(self.index):
            return cupy.asarray(array)  # from pinned memory that CuPy keeps until it has been read

    def to_vector(self, array: Array, dtype: str) -> Array:
        """Return its elements as a dtype, one after another."""
        if array.flags.c_contiguous and array.dtype == dtype:
            return array
        self._check_copy()
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(self.index):
            return cupy.ascontiguousarray(array, dtype)

    def in_rows(self, array: Array) -> Array:
        """Return the array, or a copy whose elements follow one another within a row."""
        if array.shape[-1] < 2 or array.strides[-1] == array.dtype.itemsize:
            return array
        return self.to_vector(array, array.dtype)

    def reshape(self, array: Array, shape: tuple[int, ...]) -> Array:
        """Return the array in a shape, or a copy where its strides do not allow that."""
        with sys.modules["cupy"].cuda.Device(self.index):
            made = array.reshape(shape)
        if not array.flags.c_contiguous and made.data.ptr != array.data.ptr:
            self._check_copy()
        return made

    def _check_copy(self) -> None:
        if self.frees_captured:
            wanted = "arrays of contiguous elements, and indices of int64, while CuPy captures a CUDA graph"
            raise ValueError(f"x, residual, base, index: expected {wanted}, got one that has to be copied")

    @staticmethod
    def view(array: Array) -> Array:
        """Return what a native call takes for the array."""
        return array

    @staticmethod
    def dtype_name(array: Array) -> str:
        return str(array.dtype)


@dataclass(frozen=True)
class TorchDevice:
    """A GPU as torch sees it."""

    index: int

    def __str__(self) -> str:
        return f"a tensor on cuda:{self.index}"

    @property
    def name(self) -> str:
        return f"cuda:{self.index}"

    @property
    def stream(self) -> int:
        """Handle of the current stream."""
        return int(sys.modules["torch"].cuda.current_stream(self.index).cuda_stream)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Return a new tensor; `dtype` is a name that torch has."""
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.name)

    def empty_like(self, array: Array, shape: tuple[int, ...]) -> Array:
        return self.empty(shape, self.dtype_name(array))

    frees_captured = False  # graphs have a pool of their own

    def check_upload(self, name: str) -> None:
        """Refuse copies from host memory while a graph is captured."""
        torch = sys.modules["torch"]
        with torch.cuda.device(self.index):
            if torch.cuda.is_current_stream_capturing():
                raise _refuse_upload(name, self)

    def upload(self, name: str, array: NDArray[Any]) -> Array:
        """Return a copy on the device, for this stream only."""
        self.check_upload(name)
        tensor = sys.modules["torch"].from_numpy(array if array.flags.writeable else array.copy())
        return tensor.pin_memory().to(self.name, non_blocking=True)  # torch keeps that memory until it has been read

    def to_vector(self, array: Array, dtype: str) -> Array:
        """Return its elements as a dtype, one after another."""
        return array.detach().to(getattr(sys.modules["torch"], dtype)).contiguous()

    @staticmethod
    def in_rows(array: Array) -> Array:
        """Return the tensor, or a copy whose elements follow one another within a row."""
        return array if array.shape[-1] < 2 or array.stride(-1) == 1 else array.detach().contiguous()

    @staticmethod
    def reshape(array: Array, shape: tuple[int, ...]) -> Array:
        """Return the tensor in a shape, or a copy where its strides do not allow that."""
        return array.reshape(shape)

    @staticmethod
    def view(array: Array) -> dict[str, Any]:
        """Return what a native call takes for the tensor: its own interface refuses gradients and bfloat16."""
        dtype, size = array.dtype, array.element_size()
        kind = "c" if dtype.is_complex else "f" if dtype.is_floating_point else "i" if dtype.is_signed else "u"
        if str(dtype) == "torch.bool":
            kind = "b"
        elif kind == "f" and (size == 1 or str(dtype) == "torch.bfloat16"):
            kind = "V"
        return {
            "data": (array.data_ptr(), False),
            "shape": tuple(array.shape),
            "strides": tuple(stride * size for stride in array.stride()),
            "typestr": f"<{kind}{size}",
            "owner": array,
        }

    @staticmethod
    def dtype_name(array: Array) -> str:
        return str(array.dtype).removeprefix("torch.")


Device: TypeAlias = CupyDevice | TorchDevice


def locate(array: Any) -> Device | None:
    """Return where an array is, if it is on a GPU."""
    if isinstance(array, np.ndarray):
        return None
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return TorchDevice(array.get_device()) if array.is_cuda else None
    cupy = sys.modules.get("cupy")
    return CupyDevice(array.device.id) if cupy is not None and isinstance(array, cupy.ndarray) else None


def find_device(**arrays: Any) -> Device | None:
    """Return where the arrays are, None if that is the host's memory.

    Raises
    ------
    TypeError
        If one is on a GPU, and another one is not on the same or of another library, or is no plain array.
    """
    given = {name: array for name, array in arrays.items() if array is not None}
    places = {name: locate(array) for name, array in given.items()}
    first = next((name for name, place in places.items() if place is not None), None)
    if first is None:
        return None
    device = places[first]
    assert device is not None
    for name, array in given.items():
        if not is_on(device, name, array, first):
            text = f"{type(array).__name__} in host memory"
            raise TypeError(f"{name}: expected {device}, as {first} is, got {text}")
        check_plain(name, array)
    return device


def check_plain(name: str, array: Any) -> None:
    """Check that a kernel reads of the memory of a torch tensor what torch would read."""
    layout = getattr(array, "layout", None)
    if layout is not None and str(layout) != "torch.strided":
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {layout}")
    if getattr(array, "is_neg", bool)() or getattr(array, "is_conj", bool)():
        raise TypeError(f"{name}: expected a tensor as it lies in memory, got a view with a sign (use resolve_neg())")


def is_on(device: Device, name: str, array: Any, other: str) -> bool:
    """Return whether an array is on a device, as `other` is, rather than in host memory; elsewhere is a `TypeError`."""
    place = locate(array)
    if place is not None and place != device:
        raise TypeError(f"{name}: expected {device}, as {other} is, got {place}")
    return place is not None


def load_native() -> Any:
    """Return the module of CUDA kernels.

    Raises
    ------
    RuntimeError
        Saying what is missing, where it was not built or finds no device.
    """
    try:
        native: Any = importlib.import_module("pycodesign._cuda")
    except ModuleNotFoundError:
        raise RuntimeError(
            "no CUDA kernels: pycodesign was built without nvcc; build it again with "
            "-Ccmake.define.PYCODESIGN_CUDA=ON, or pass arrays in host memory"
        ) from None
    if absence := native.absence():
        raise RuntimeError(absence)
    return native


def _refuse_upload(name: str, device: Device) -> TypeError:
    return TypeError(f"{name}: expected {device} while a CUDA graph is captured, got an array in host memory")
