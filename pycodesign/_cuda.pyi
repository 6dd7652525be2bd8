from collections.abc import Sequence
from typing import Any, TypeAlias, TypedDict, type_check_only

Array: TypeAlias = Any  # with `__cuda_array_interface__`, or a dict like it

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

def device_count() -> int: ...
def absence() -> str: ...
def device_properties(device: int) -> DeviceProperties: ...
def build_info() -> BuildInfo: ...
def expand(
    w: Array,
    out_index: Array,
    in_index: Array | None,
    in_scale: Array | None,
    out_scale: Array | None,
    out: Array,
    device: int,
    stream: int,
) -> None: ...
def delta_linear(
    x: Array,
    base: Array | None,
    deltas: Sequence[Delta],
    positions: Array | None,
    out: Array,
    device: int,
    stream: int,
) -> None: ...

class Delta:
    """One task's difference of weights and bias, in a GPU's memory."""

    def __init__(self, kind: str, outputs: int, inputs: int, rank: int, arrays: dict[str, Array]) -> None: ...
