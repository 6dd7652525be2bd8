"""Single-assignment programs of additions, subtractions and multiplications by constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

ADD, SUBTRACT, MULTIPLY = range(3)
ZERO = -1
VALIDATE_BYTES = 256 << 20  # of coefficients at a time


@dataclass(frozen=True, eq=False)
class SumProgram:
    """A program that computes ``weights @ x``, one result per output, from input rows.

    Value v is input row v for v < I' = groups * I, and the result of instruction v - I' otherwise; ``ZERO`` (-1) is the
    constant 0. Instruction k reads only values that lie before it:

    ======== ====================================
    ADD      ``left + right``
    SUBTRACT ``left - right``
    MULTIPLY ``constants[right] * left``
    ======== ====================================

    The groups of a convolution share nothing: each has its own instructions, and they stand behind one another.

    Parameters
    ----------
    op : ndarray of uint8, shape (K,)
    left, right : ndarray of int32, shape (K,)
    constants : ndarray of int64 or float64
        The distinct factors; of the kind of ``levels``.
    outputs : ndarray of int32, shape (O,)
        The value of each output.
    codes : ndarray of uint8, shape (O, I)
        What is to be computed: output o is the sum over i of ``levels[o, codes[o, i]]`` times input row i of its group.
    levels : ndarray of int64 or float64, shape (O, Q)
        int64 where all levels are integers.
    groups : int
    method : str
        The method of `factor` that made the program.
    """

    op: NDArray[np.uint8]
    left: NDArray[np.int32]
    right: NDArray[np.int32]
    constants: NDArray[Any]
    outputs: NDArray[np.int32]
    codes: NDArray[np.uint8]
    levels: NDArray[Any]
    groups: int
    method: str

    @property
    def inputs(self) -> int:
        """Number of input rows, over all groups."""
        return int(self.groups * self.codes.shape[1])

    @property
    def adds(self) -> int:
        """Additions and subtractions."""
        return self.op.size - self.multiplies

    @property
    def multiplies(self) -> int:
        """Multiplications by constants."""
        return int(np.count_nonzero(self.op == MULTIPLY))

    @property
    def dense_ops(self) -> int:
        """Operations of the dense product, O * (2 I - 1): I multiplications and I - 1 additions per output."""
        outputs, inputs = self.codes.shape
        return int(outputs * (2 * inputs - 1))

    @property
    def removed(self) -> float:
        """Share of the dense operations that the program does without."""
        return 1 - self.op.size / self.dense_ops

    def __repr__(self) -> str:
        return (
            f"SumProgram(method={self.method!r}, inputs={self.inputs}, outputs={self.outputs.size}, "
            f"groups={self.groups}, adds={self.adds}, multiplies={self.multiplies}, dense_ops={self.dense_ops})"
        )

    def __call__(self, x: ArrayLike) -> NDArray[Any]:
        """Evaluate the program.

        Parameters
        ----------
        x : array_like, shape (groups * I, P)
            P columns. Integers with integer levels are computed in int64, exactly; anything else in float64.

        Returns
        -------
        ndarray of int64 or float64, shape (O, P)

        Raises
        ------
        TypeError
            If x is not real numbers.
        ValueError
            If x has another shape, or integers so large that a sum might not fit int64.
        """
        x = np.asarray(x)
        if x.dtype.kind not in "biuf":
            raise TypeError(f"x: expected integers or floats, got {x.dtype}")
        self._check_shape(x)
        if x.dtype.kind != "f" and self.levels.dtype.kind == "i":
            self._check_range(x, np.int64)
        return self._evaluate(x)[self.outputs]

    def _check_shape(self, x: NDArray[Any]) -> None:
        if x.ndim != 2 or x.shape[0] != self.inputs:
            raise ValueError(f"x: expected shape ({self.inputs}, P), got {x.shape}")

    def _check_range(self, x: NDArray[Any], dtype: type[np.signedinteger[Any]]) -> None:
        """Check that all sums of integers x fit a dtype; what comes before them may wrap."""
        levels = np.abs(np.take_along_axis(self.levels, self.codes.astype(np.intp), axis=1))
        limit = int(np.iinfo(dtype).max) // max(1, int(levels.sum(axis=1).max()))
        largest = max(abs(int(x.min())), abs(int(x.max()))) if x.size else 0
        if largest > limit:
            raise ValueError(
                f"x: expected magnitudes up to {limit}, so that sums fit {np.dtype(dtype).name}, got {largest}"
            )

    def coefficients(self) -> NDArray[Any]:
        """Coefficients of all input rows in every value: shape (inputs + K, inputs), of the kind of `levels`."""
        return self._evaluate(np.eye(self.inputs, dtype=np.int64))[:-1]

    def _evaluate(self, x: NDArray[Any]) -> NDArray[Any]:
        """All values, and a row of zeros behind them, for ZERO."""
        exact = x.dtype.kind != "f" and self.levels.dtype.kind == "i"
        # One row more than there are values: ZERO, index -1, is the last one.
        values = np.zeros((self.inputs + self.op.size + 1, x.shape[1]), np.int64 if exact else np.float64)
        values[: self.inputs] = x
        constants = self.constants.tolist()
        instructions = zip(self.op.tolist(), self.left.tolist(), self.right.tolist(), strict=True)
        for result, (op, left, right) in enumerate(instructions, self.inputs):
            if op == ADD:
                np.add(values[left], values[right], out=values[result])
            elif op == SUBTRACT:
                np.subtract(values[left], values[right], out=values[result])
            else:
                np.multiply(values[left], constants[right], out=values[result])
        return values

    def validate(self) -> None:
        """Prove that the program computes what `codes` and `levels` say.

        Checks the form (known operations, operands that exist and lie before their use), then carries the vector of
        coefficients of every value through the program: each output's must equal its row of levels, in exact integers,
        or in float64 where levels are fractions (a coefficient is then one constant, never a rounded sum).

        Raises
        ------
        ValueError
            If the program is malformed or an output has a wrong coefficient; names the first one.
        """
        outputs, inputs = self.codes.shape
        if self.groups < 1 or outputs % self.groups:
            raise ValueError(f"groups: expected a divisor of the {outputs} outputs, got {self.groups}")
        count = self.op.size
        result = self.inputs + np.arange(count)
        multiply = self.op == MULTIPLY
        good = (self.op >= 0) & (self.op <= MULTIPLY) & (self.left >= ZERO) & (self.left < result)
        good &= (self.right >= np.where(multiply, 0, ZERO)) & (
            self.right < np.where(multiply, self.constants.size, result)
        )
        if not good.all():
            raise ValueError(f"instruction {np.argmin(good)}: unknown operation or operand out of range")
        if self.outputs.shape != self.codes.shape[:1]:
            raise ValueError(f"outputs: expected {len(self.codes)} values, got shape {self.outputs.shape}")
        good = (self.outputs >= ZERO) & (self.outputs < self.inputs + count)
        if not good.all():
            raise ValueError(f"output {np.argmin(good)}: no such value, {self.outputs[np.argmin(good)]}")

        if not 0 <= self.codes.min(initial=0) <= self.codes.max(initial=0) < self.levels.shape[1]:
            raise ValueError(f"codes: expected values from 0 to {self.levels.shape[1] - 1}, got {self.codes.max()}")
        expected = np.take_along_axis(self.levels, self.codes.astype(np.intp), axis=1)
        own_group = np.arange(outputs) // (outputs // self.groups)
        step = max(1, VALIDATE_BYTES // (8 * (self.inputs + count)))
        for start in range(0, self.inputs, step):
            columns = np.arange(start, min(start + step, self.inputs))
            group, i = np.divmod(columns, inputs)
            want = np.where(own_group[:, None] == group, expected[:, i], 0)
            got = self(np.arange(self.inputs)[:, None] == columns)
            if not np.array_equal(got, want):
                o, c = np.argwhere(got != want)[0]
                raise ValueError(f"output {o}: expected coefficient {want[o, c]} of x{columns[c]}, got {got[o, c]}")

    def dump(self) -> str:
        """Text of the program, one instruction per line: ``x0, x1, ...`` inputs, ``v0, v1, ...`` results, ``y0, ...``.

        Examples
        --------
        >>> import numpy as np
        >>> from pycodesign import QuantizedTensor
        >>> from pycodesign.repetition import factor
        >>> codes = np.array([[2, 2, 1], [2, 2, 0]], np.uint8)
        >>> q = QuantizedTensor(codes, np.array([-1, 0, 1], np.float32), np.ones(2, np.float32))
        >>> print(factor(q).dump())
        v0 = x0 + x1
        v1 = v0 - x2
        y0 = v0
        y1 = v1
        """

        lines = []
        for k, (op, left, right) in enumerate(zip(self.op, self.left, self.right, strict=True)):
            if op == MULTIPLY:
                lines.append(f"v{k} = {self.constants[right]} * {self._name(left)}")
            else:
                lines.append(f"v{k} = {self._name(left)} {'+' if op == ADD else '-'} {self._name(right)}")
        lines += [f"y{o} = {self._name(value)}" for o, value in enumerate(self.outputs)]
        return "\n".join(lines)

    def to_dot(self) -> str:
        """The program as a graph in Graphviz's language: ``dot -Tsvg``. Edges that are subtracted are dashed.

        Examples
        --------
        >>> import numpy as np
        >>> from pycodesign import QuantizedTensor
        >>> from pycodesign.repetition import factor
        >>> q = QuantizedTensor(np.array([[2, 0]], np.uint8), np.array([-1, 0, 1], np.float32), np.ones(1, np.float32))
        >>> print(factor(q).to_dot())
        digraph program {
          v0 [label="-"]
          x0 -> v0
          x1 -> v0 [style=dashed]
          y0 [shape=box]
          v0 -> y0
        }
        """
        lines = ["digraph program {"]
        for k, (op, left, right) in enumerate(zip(self.op, self.left, self.right, strict=True)):
            if op == MULTIPLY:
                lines += [f'v{k} [label="* {self.constants[right]}"]', f"{self._name(left)} -> v{k}"]
            else:
                dashed = " [style=dashed]" if op == SUBTRACT else ""
                lines += [f'v{k} [label="{"-" if op == SUBTRACT else "+"}"]']
                lines += [f"{self._name(left)} -> v{k}", f"{self._name(right)} -> v{k}{dashed}"]
        for o, value in enumerate(self.outputs):
            lines += [f"y{o} [shape=box]", f"{self._name(value)} -> y{o}"]
        return "\n  ".join(lines) + "\n}"

    def _name(self, value: int) -> str:
        if value == ZERO:
            return "0"
        return f"x{value}" if value < self.inputs else f"v{value - self.inputs}"
