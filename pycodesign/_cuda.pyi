from collections.abc import Sequence
from typing import Any, TypeAlias, TypedDict, final, type_check_only

import numpy as np
from numpy.typing import NDArray

_Array: TypeAlias = Any  # with `__cuda_array_interface__`, or a dict like it

@type_check_only
class _Type(type):
    """Metaclass of classes that pybind11 binds."""

@type_check_only
class DeviceProperties(TypedDict):
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int
    shared_bytes_per_block: int

@type_check_only
class BuildInfo(TypedDict):
    runtime: str
    driver: str
    architectures: str

@type_check_only
class LayerPlan(TypedDict):
    shape: tuple[int, ...]
    workspace_bytes: int
    why: str

def device_count() -> int: ...
def absence() -> str: ...
def current_device() -> int: ...
def device_properties(device: int) -> DeviceProperties: ...
def build_info() -> BuildInfo: ...
def expand(
    w: _Array,
    out_index: _Array,
    in_index: _Array | None,
    in_scale: _Array | None,
    out_scale: _Array | None,
    out: _Array,
    device: int,
    stream: int,
) -> None: ...

@final
class PackedLayer(metaclass=_Type):
    def __init__(
        self,
        codes: NDArray[np.uint8],
        levels: NDArray[np.float32],
        scale: NDArray[np.float32],
        bias: NDArray[np.float32] | None,
        channels: int,
        groups: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        input_dtype: str,
        input_scale: float,
        input_zero_point: int,
        input_bits: int,
        algorithm: str,
        device: int,
    ) -> None: ...
    @staticmethod
    def from_codebook(
        index: NDArray[np.uint8],
        sign: NDArray[np.int8],
        kernels: NDArray[np.float32],
        levels: NDArray[np.float32],
        scale: NDArray[np.float32],
        bias: NDArray[np.float32] | None,
        channels: int,
        groups: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        input_dtype: str,
        input_scale: float,
        input_zero_point: int,
        input_bits: int,
        device: int,
    ) -> PackedLayer: ...
    @property
    def device(self) -> int: ...
    @property
    def why(self) -> str: ...
    @property
    def algorithm(self) -> str: ...
    def counts(self) -> dict[str, int]: ...
    def plan(self, x_shape: Sequence[int]) -> LayerPlan: ...
    def run(
        self,
        x: _Array,
        residual: _Array | None,
        residual_scale: float,
        residual_zero_point: float,
        lo: float | None,
        hi: float | None,
        out_dtype: str,
        out_scale: float | None,
        out_zero_point: int,
        out: _Array,
        workspace: _Array | None,
        stream: int,
    ) -> None: ...

def delta_linear(
    x: _Array,
    base: _Array | None,
    deltas: Sequence[Delta],
    positions: _Array | None,
    out: _Array,
    device: int,
    stream: int,
) -> None: ...

@final
class Delta(metaclass=_Type):
    """One task's difference of weights and bias, in a GPU's memory."""

    def __init__(
        self, kind: str, outputs: int, inputs: int, rank: int, arrays: dict[str, NDArray[Any]], device: int
    ) -> None: ...
