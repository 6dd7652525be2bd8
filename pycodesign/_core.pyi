from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Array: TypeAlias = NDArray[Any]
_Pair: TypeAlias = tuple[int, int]

def set_isa(name: str) -> None: ...
def active_isa() -> str: ...
def supported_isas() -> list[str]: ...
def set_num_threads(n: int) -> None: ...
def get_num_threads() -> int: ...
def thread_backend() -> str: ...
def available_cores() -> int: ...
def cpu_name() -> str: ...
def cache_sizes() -> dict[str, int]: ...
def build_info() -> dict[str, Any]: ...
def choose_conv2d(
    codes: _Array,
    levels: _Array,
    scale: _Array,
    channels: int,
    groups: int,
    kernel: _Pair,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
    input_dtype: str,
) -> tuple[str, str]: ...
def choose_linear(codes: _Array, levels: _Array, scale: _Array, input_dtype: str) -> tuple[str, str]: ...

class PackedConv2d:
    def __init__(
        self,
        codes: _Array,
        levels: _Array,
        scale: _Array,
        bias: _Array | None,
        channels: int,
        groups: int,
        kernel: _Pair,
        stride: _Pair,
        padding: _Pair,
        dilation: _Pair,
        input_dtype: str,
        input_scale: float,
        input_zero_point: int,
        input_bits: int,
        algorithm: str,
    ) -> None: ...
    @property
    def algorithm(self) -> str: ...
    @property
    def group_size(self) -> int: ...
    @property
    def max_entries(self) -> int: ...
    def counts(self) -> dict[str, int]: ...
    def codes(self) -> NDArray[np.uint8]: ...
    def warmup(self, images: int, height: int, width: int) -> None: ...
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
        out: _Array | None,
    ) -> _Array: ...
    def run_rows(
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
        out: _Array | None,
    ) -> _Array: ...

class PackedLinear:
    def __init__(
        self,
        codes: _Array,
        levels: _Array,
        scale: _Array,
        bias: _Array | None,
        input_dtype: str,
        input_scale: float,
        input_zero_point: int,
        input_bits: int,
        algorithm: str,
    ) -> None: ...
    @property
    def algorithm(self) -> str: ...
    def counts(self) -> dict[str, int]: ...
    def codes(self) -> NDArray[np.uint8]: ...
    def run_rows(
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
        out: _Array | None,
    ) -> _Array: ...
