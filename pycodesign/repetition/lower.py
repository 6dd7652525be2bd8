"""Programs of sums as machine code, to hold the count of their operations against the time that they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from pycodesign import _core

from .program import SumProgram

MAX_VALUES = 1 << 22  # of a program: some 40 MB of code
CACHE_LINE = 64


@dataclass(frozen=True, eq=False)
class LoweredProgram:
    """Machine code that runs a `SumProgram` over vectors of columns, made by `lower`.

    Parameters
    ----------
    program : SumProgram
    dtype : {"float32", "int32"}
    lanes : int
        Columns in a vector.
    operations, instructions, loads, stores : int
        For each vector: operations of the program that an output needs; vector instructions; reads and writes of
        memory, among them the operands of instructions.
    code : bytes
        The instructions, and the constants behind them.
    """

    program: SumProgram
    dtype: str
    lanes: int
    operations: int
    instructions: int
    loads: int
    stores: int
    code: bytes
    _native: _core.ProgramCode

    def __call__(self, x: ArrayLike) -> NDArray[Any]:
        """Evaluate the program.

        Parameters
        ----------
        x : array_like of `dtype`, shape (groups * I, P)

        Returns
        -------
        ndarray of `dtype`, shape (O, P)
            int32: exact. float32: rounded after each addition.

        Raises
        ------
        TypeError
            If x is of another dtype.
        ValueError
            If x has another shape, or int32 cannot hold the sums.
        """
        x = np.asarray(x)
        if x.dtype != self.dtype:
            raise TypeError(f"x: expected {self.dtype}, got {x.dtype}")
        self.program._check_shape(x)
        if self.dtype == "int32":
            self.program._check_range(x, np.int32)
        vectors = self.run(self.stage(x))
        return np.ascontiguousarray(vectors.transpose(1, 0, 2).reshape(len(self.program.outputs), -1)[:, : x.shape[1]])

    def stage(self, x: NDArray[Any]) -> NDArray[Any]:
        """Cut x (groups * I, P) into vectors, with zeros behind: shape (vectors, groups * I, lanes)."""
        vectors = -(-x.shape[1] // self.lanes)
        staged = allocate((vectors, len(x), self.lanes), self.dtype)
        staged[...] = 0
        rows = staged.transpose(1, 0, 2)  # its last two axes are those of x, cut
        whole = x.shape[1] // self.lanes
        rows[:, :whole] = x[:, : whole * self.lanes].reshape(len(x), whole, self.lanes)
        if whole < vectors:
            rows[:, whole, : x.shape[1] - whole * self.lanes] = x[:, whole * self.lanes :]
        return staged

    def run(self, staged: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Evaluate the program for staged vectors: shape (vectors, O, lanes)."""
        if out is None:
            out = allocate((len(staged), len(self.program.outputs), self.lanes), self.dtype)
        self._native.run(staged, out)
        return out


def lower(program: SumProgram, dtype: str = "float32") -> LoweredProgram:
    """Turn a program into machine code for the active instruction set.

    Each instruction comes just before the first that needs it. Values stay in registers; where there are none left,
    the one that is read last of all goes to memory (Belady).

    Parameters
    ----------
    program : SumProgram
    dtype : {"float32", "int32"}
        Of inputs and sums.

    Returns
    -------
    LoweredProgram

    Raises
    ------
    RuntimeError
        No machine code can be made: it takes x86-64 Linux with AVX2.
    TypeError
        If program is no SumProgram.
    ValueError
        If the program is malformed or has more than 4 million values, the dtype is unknown, or it is int32 where levels
        are fractions.

    Examples
    --------
    >>> import numpy as np
    >>> from pycodesign import QuantizedTensor
    >>> from pycodesign.repetition import factor, lower
    >>> codes = np.array([[2, 2, 1], [2, 2, 0]], np.uint8)
    >>> q = QuantizedTensor(codes, np.array([-1, 0, 1], np.float32), np.ones(2, np.float32))
    >>> code = lower(factor(q), "int32")
    >>> code(np.array([[1], [2], [3]], np.int32)).tolist()
    [[3], [0]]
    >>> code.operations, code.loads, code.stores
    (2, 3, 2)
    """
    if not isinstance(program, SumProgram):
        raise TypeError(f"program: expected a SumProgram, got {type(program).__name__}")
    if dtype not in ("float32", "int32"):
        raise ValueError(f"dtype: expected 'float32' or 'int32', got {dtype!r}")
    if dtype == "int32" and program.levels.dtype.kind != "i":
        raise ValueError("dtype: expected 'float32' for levels that are not integers, got 'int32'")
    if program.inputs + program.op.size > MAX_VALUES:
        raise ValueError(f"program: expected at most {MAX_VALUES} values, got {program.inputs + program.op.size}")
    if not _core.generates_code():
        raise RuntimeError("lower: expected x86-64 Linux with AVX2 and PYCODESIGN_JIT other than 0; call the program")
    indices = (program.left, program.right, program.outputs)
    if any(a.size and max(abs(int(a.min())), abs(int(a.max()))) > MAX_VALUES for a in indices):
        raise ValueError(f"program: expected operands and outputs up to {MAX_VALUES}, got a larger one")
    left, right, outputs = (np.ascontiguousarray(a, np.int32) for a in indices)
    op, constants = np.ascontiguousarray(program.op, np.uint8), np.ascontiguousarray(program.constants, np.float64)
    native = _core.ProgramCode(program.inputs, op, left, right, constants, outputs, dtype)
    counts = {name: native.counts[name] for name in ("operations", "instructions", "loads", "stores")}
    return LoweredProgram(program, dtype, native.lanes, **counts, code=native.code(), _native=native)


def allocate(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array that starts on a cache line."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return memory[start : start + size].view(dtype).reshape(shape)
