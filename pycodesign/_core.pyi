"""Compiled kernels, what they were built for and what they run on."""

from collections.abc import Callable, Sequence
from typing import Any, final, type_check_only

import numpy as np
from numpy.typing import NDArray

def build_info() -> dict[str, Any]:
    """Return ``compiler``, ``version`` and ``isas``, the instruction sets built in."""

def supported_isas() -> list[str]:
    """Return the instruction sets that this processor supports, from the least to the best."""

def active_isa() -> str:
    """Return the instruction set that kernels are chosen for."""

def set_isa(name: str) -> None:
    """Force an instruction set; ValueError if the name is unknown or this processor does not support it."""

def get_num_threads() -> int:
    """Return how many threads one operation may use."""

def set_num_threads(n: int) -> None:
    """Set how many threads one operation may use; ValueError if not positive."""

def swap_runtime_threads(openmp: int, mkl: int) -> tuple[int, int]:
    """Set how many threads OpenMP's and MKL's operations on this thread get; return what they were (0: as OpenMP's)."""

def thread_backend() -> str:
    """Return whose threads run: ``"pool"`` or ``"openmp: <path of the runtime>"``."""

def available_cores() -> int:
    """Return the number of cores that affinity and cgroup quota leave to this process."""

def cpu_name() -> str:
    """Return the processor's own name."""

def cache_sizes() -> dict[str, int]:
    """Return the bytes of ``l1d``, ``l2`` and ``l3``."""

def generates_code() -> bool:
    """Return whether machine code can be made for the active instruction set."""

def choose_conv2d(
    codes: NDArray[np.uint8],
    levels: NDArray[np.float32],
    scale: NDArray[np.float32],
    channels: int,
    groups: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    input_dtype: str,
    input_zero_point: int,
    input_bits: int,
) -> tuple[str, str]:
    """Return the algorithm that the cost model prefers, and why."""

def choose_codebook(
    index: NDArray[np.uint8],
    sign: NDArray[np.int8],
    kernels: NDArray[np.float32],
    levels: NDArray[np.float32],
    scale: NDArray[np.float32],
    channels: int,
    groups: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    input_dtype: str,
    input_zero_point: int,
    input_bits: int,
) -> tuple[str, str]:
    """Return the algorithm for a convolution by a codebook, and why."""

def choose_linear(
    codes: NDArray[np.uint8], levels: NDArray[np.float32], scale: NDArray[np.float32], input_dtype: str
) -> tuple[str, str]:
    """Return the algorithm that the cost model prefers, and why."""

def expand(
    w: NDArray[Any],
    dtype: str,
    out_index: NDArray[np.int64],
    in_index: NDArray[np.int64] | None,
    in_scale: NDArray[Any] | None,
    out_scale: NDArray[Any] | None,
    out: NDArray[Any] | None,
) -> NDArray[Any]:
    """Copy rows and columns of w (2 to 4 dimensions), whose elements are what `dtype` names, with factors."""

def pack_none(outputs: int, inputs: int, bias: NDArray[np.float32] | None) -> Delta:
    """Pack a task that changes no weights."""

def pack_sparse(
    outputs: int,
    inputs: int,
    row: NDArray[np.int32],
    column: NDArray[np.int32],
    value: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    dtype: str,
) -> Delta:
    """Pack entries, sorted by row, then column, none twice."""

def pack_low_rank(
    b: NDArray[np.float32], a: NDArray[np.float32], bias: NDArray[np.float32] | None, dtype: str
) -> Delta:
    """Pack b (O, r) times a (r, I)."""

def pack_dense(w: NDArray[np.float32], bias: NDArray[np.float32] | None, dtype: str) -> Delta:
    """Pack all of a matrix w (O, I)."""

def delta_linear(
    x: NDArray[np.float32],
    base: NDArray[np.float32] | None,
    deltas: Sequence[Delta],
    out: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    """Add deltas times x (T, I) or (N, T, I) to base (T, O) or (N, T, O), into (N, T, O)."""

@type_check_only
class _Type(type):
    """Metaclass of classes that pybind11 binds."""

class PackedLayer(metaclass=_Type):
    """Packed weights of a layer, whatever its kind."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    @property
    def algorithm(self) -> str:
        """Name of the algorithm that runs."""

    def codes(self) -> NDArray[np.uint8]:
        """Return the codes, decoded from the packed form."""

    def counts(self) -> dict[str, int]:
        """Return ``adds`` and ``multiplies`` per output pixel or row, and ``bytes`` of the packed weights."""

@final
class PackedConv2d(PackedLayer):
    """Packed weights of a convolution: codes (O, C / groups * kH * kW), levels (1 or O, Q), scale (O, 1)."""

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
    ) -> PackedConv2d:
        """Pack index and sign (O, J), kernels (C, U, inputs), their levels (1, Q), scale (O, 1)."""

    def indices(self) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
        """Return index and sign of a codebook, decoded from the packed form."""

    @property
    def group_size(self) -> int:
        """Channels that share a table; 0 without tables."""

    @property
    def max_entries(self) -> int:
        """Entries of the largest table."""

    def machine_code(
        self, avx512: bool
    ) -> tuple[bytes, list[tuple[int, int, int, list[tuple[int, int, int, int]]]], list[list[int]]] | None:
        """Return code with its constants; chunks: group, first output, outputs and segments; patterns of columns.

        A segment: first and one-past-last byte, channel, lines that it prefetches. None where no code is made.
        """

    def run(
        self,
        x: NDArray[Any],
        residual: NDArray[Any] | None,
        residual_scale: float,
        residual_zero_point: float,
        lo: float | None,
        hi: float | None,
        out_dtype: str,
        out_scale: float | None,
        out_zero_point: int,
        out: NDArray[Any] | None,
    ) -> NDArray[Any]:
        """Convolve x (N, C, H, W) into (N, O, OH, OW)."""

    def run_rows(
        self,
        x: NDArray[Any],
        residual: NDArray[Any] | None,
        residual_scale: float,
        residual_zero_point: float,
        lo: float | None,
        hi: float | None,
        out_dtype: str,
        out_scale: float | None,
        out_zero_point: int,
        out: NDArray[Any] | None,
    ) -> NDArray[Any]:
        """Multiply rows x (T, I) into (T, O): a linear layer as the pixels of a 1x1 convolution."""

@final
class PackedLinear(PackedLayer):
    """Packed weights of a linear layer: codes (O, I), levels (1 or O, Q), scale (O, G)."""

    def __init__(
        self,
        codes: NDArray[np.uint8],
        levels: NDArray[np.float32],
        scale: NDArray[np.float32],
        bias: NDArray[np.float32] | None,
        input_dtype: str,
        input_scale: float,
        input_zero_point: int,
        input_bits: int,
        algorithm: str,
    ) -> None: ...
    def run_rows(
        self,
        x: NDArray[Any],
        residual: NDArray[Any] | None,
        residual_scale: float,
        residual_zero_point: float,
        lo: float | None,
        hi: float | None,
        out_dtype: str,
        out_scale: float | None,
        out_zero_point: int,
        out: NDArray[Any] | None,
    ) -> NDArray[Any]:
        """Multiply rows x (T, I) into (T, O)."""

@final
class ProgramCode(metaclass=_Type):
    """Machine code of a program of sums, for the active instruction set."""

    def __init__(
        self,
        inputs: int,
        op: NDArray[np.uint8],
        left: NDArray[np.int32],
        right: NDArray[np.int32],
        constants: NDArray[np.float64],
        outputs: NDArray[np.int32],
        dtype: str,
    ) -> None: ...
    @property
    def lanes(self) -> int:
        """Pixels in a vector."""

    @property
    def counts(self) -> dict[str, int]:
        """Operations, instructions, loads, stores for each vector; slots of memory."""

    def code(self) -> bytes:
        """Return the code with its constants."""

    def run(self, x: NDArray[Any], y: NDArray[Any]) -> None:
        """Compute y (vectors, outputs, lanes) from x (vectors, inputs, lanes)."""

@final
class Chain(metaclass=_Type):
    """Layers, adds and pooling in one call. Values are named by the indices that the methods return; -1: none."""

    def __init__(self) -> None: ...
    def add_input(self, dtype: str) -> int:
        """Add an input: (N, C, H, W), or rows (N, I)."""

    def add_layer(
        self,
        layer: PackedLayer,
        rows: bool,
        x: int,
        residual: int,
        residual_scale: float,
        residual_zero_point: float,
        lo: float | None,
        hi: float | None,
        out_dtype: str,
        out_scale: float | None,
        out_zero_point: int,
    ) -> int:
        """Add a convolution, or a linear layer of the flattened value: `rows`."""

    def add_max_pool2d(
        self, x: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> int:
        """Add a max-pooling."""

    def add_avg_pool2d(
        self,
        x: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        counts_padding: bool,
        scale: float,
        zero_point: int,
        lo: float | None,
        hi: float | None,
        out_dtype: str,
        out_scale: float | None,
        out_zero_point: int,
    ) -> int:
        """Add an average-pooling; kernel (0, 0): the mean of each image."""

    def add_add(
        self,
        a: int,
        b: int,
        scale: float,
        zero_point: int,
        residual_scale: float,
        residual_zero_point: float,
        lo: float | None,
        hi: float | None,
        out_dtype: str,
        out_scale: float | None,
        out_zero_point: int,
    ) -> int:
        """Add two values, or convert one."""

    def set_outputs(self, values: Sequence[int]) -> None:
        """Name the values that `run` returns."""

    def run(
        self, inputs: Sequence[NDArray[Any]], out: Sequence[NDArray[Any]] | None, rows: Sequence[bool]
    ) -> list[NDArray[Any]]:
        """Run every step; `rows`: whether an output is (N, O)."""

    def plan(self, inputs: Sequence[Sequence[int]], values: int) -> list[tuple[list[int], str]]:
        """Return the shape of each value, and its layout."""

@final
class Delta(metaclass=_Type):
    """One task's difference of weights and bias, packed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def arrays(self) -> dict[str, NDArray[Any]]:
        """What it is packed into, by name; 16-bit values as int16."""

    @property
    def kind(self) -> str:
        """``"none"``, ``"sparse"``, ``"low_rank"`` or ``"dense"``."""

    @property
    def dtype(self) -> str:
        """How values are kept: ``"float32"`` or ``"bfloat16"``."""

    @property
    def outputs(self) -> int: ...
    @property
    def inputs(self) -> int: ...
    @property
    def entries(self) -> int:
        """Values of its matrices."""

    @property
    def rank(self) -> int:
        """Of a low-rank pair; else 0."""

    @property
    def bytes(self) -> int:
        """Bytes of the packed form."""

    @property
    def has_bias(self) -> bool: ...

@final
class BoundChain(metaclass=_Type):
    """A chain for inputs of fixed sizes and so many threads, with memory of its own."""

    def __init__(self, chain: Chain, inputs: Sequence[Sequence[int]], threads: int) -> None: ...
    @property
    def output_shapes(self) -> list[list[int]]:
        """Shape (N, C, H, W) of each output."""

    def set_input(self, index: int, x: NDArray[Any] | None) -> None:
        """Read an input from this array from now on; None lets go the one that it has."""

    def set_output(self, index: int, out: NDArray[Any] | None) -> None:
        """Write an output to this array from now on; the elements of each image follow one another. None lets it go."""

    def release(self) -> None:
        """Forget the arrays."""

    def run(self) -> None:
        """Run every step."""

@final
class BranchRunner(metaclass=_Type):
    """Bodies (chains, callables without arguments, None: nothing) and the instructions of the teams that run them."""

    def __init__(
        self,
        team: Sequence[int],
        threads: Sequence[int],
        after: Sequence[Sequence[int]],
        teams: int,
        bodies: Sequence[BoundChain | Callable[[], object] | None],
    ) -> None: ...
    @property
    def waits(self) -> int:
        """How often a team waits for another."""

    def run(self, spin: float, patience: float, pin: bool) -> None:
        """Run every body; microseconds until a team that waits parks, and until it does the work of an absent one."""

def run_branches(
    bodies: list[BoundChain | Callable[..., object] | None], arguments: tuple[Any, ...], spin: float, alone: bool
) -> list[Any]:
    """Run bodies at the same time; return what the callables return, None for chains.

    Alone: one after the other, on the calling thread.
    """

def call_with_threads(function: Callable[[], object], threads: int) -> object:
    """Call a function, with so many threads for each operation within it."""
