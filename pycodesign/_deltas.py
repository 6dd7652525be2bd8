"""Differences of weights, one for each of many tasks, on top of one linear layer that all of them share."""

from __future__ import annotations

import operator
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pycodesign import _core
from pycodesign._arguments import Array, check_array, from_numpy, join_names, to_numpy
from pycodesign._device import Device, find_device, load_native

Matrix: TypeAlias = Any  # scipy.sparse, a pair (B, A), an array (O, I), or None

Pack: TypeAlias = Callable[[NDArray[np.float32] | None], _core.Delta]

VALUE_DTYPES = ("float32", "bfloat16")
BEYOND_BFLOAT16 = np.float32(float.fromhex("0x1.ffp127"))  # rounds to infinity, as all above it
GROUP_OCTETS = 2  # a group of 16 rows has two octets that end alike, the longer one first

_uploaded: weakref.WeakKeyDictionary[_core.Delta, dict[int, Any]] = weakref.WeakKeyDictionary()


class PackedDeltas:
    """Packed differences of weights of several tasks, made by `prepack_deltas`; immutable.

    ``packed + other`` has the tasks of both, in order; like `select` it copies nothing. Calls on one object may run at
    the same time from several threads.
    """

    def __init__(self, deltas: Sequence[_core.Delta]) -> None:
        self._deltas = list(deltas)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of the layer (O, I)."""
        return self._deltas[0].outputs, self._deltas[0].inputs

    @property
    def kinds(self) -> tuple[str, ...]:
        """For each task ``"sparse"``, ``"low_rank"``, ``"dense"`` or ``"none"``."""
        return tuple(delta.kind for delta in self._deltas)

    @property
    def entries(self) -> tuple[int, ...]:
        """Values of each task's matrices; for sparse ones, those that are stored."""
        return tuple(delta.entries for delta in self._deltas)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form."""
        return sum(delta.bytes for delta in self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)

    def select(self, tasks: Sequence[int]) -> PackedDeltas:
        """Return some of the tasks, in this order; they share the memory of these.

        Parameters
        ----------
        tasks : sequence of int

        Raises
        ------
        IndexError, ValueError
            For a task that there is not, or none at all.
        """
        chosen = to_indices("tasks", tasks, len(self))
        if not chosen:
            raise ValueError("tasks: expected at least one, got none")
        return PackedDeltas([self._deltas[n] for n in chosen])

    def __add__(self, other: PackedDeltas) -> PackedDeltas:
        if not isinstance(other, PackedDeltas):
            return NotImplemented
        if other.shape != self.shape:
            raise ValueError(f"other: expected deltas {self.shape}, got {other.shape}")
        return PackedDeltas(self._deltas + other._deltas)

    def __repr__(self) -> str:
        return f"PackedDeltas(shape={self.shape}, kinds={self.kinds}, nbytes={self.nbytes})"


def prepack_deltas(
    deltas: Sequence[Matrix], *, bias: Sequence[Array | None] | None = None, dtype: str = "float32"
) -> PackedDeltas:
    """Pack what each of several tasks adds to the weights of a linear layer (O, I).

    Parameters
    ----------
    deltas : sequence, one for each task
        A `scipy.sparse` array or matrix (O, I), in any format, of at most 65,535 inputs; entries that are given twice
        are added up, zeros that are stored stay entries. A low-rank pair ``(B, A)`` of arrays (O, r) and (r, I). An
        array (O, I): all of a matrix. None: no difference of weights. All values float32 and finite.
    bias : sequence, optional
        For each task a float32 (O,) that is added, too, or None.
    dtype : {"float32", "bfloat16"}
        How values of matrices are kept: bfloat16 rounds them to nearest even. It takes half of their bytes; sums are
        in float32 either way.

    Returns
    -------
    PackedDeltas

    Raises
    ------
    TypeError, ValueError
        Naming the task, what was expected and what came: no task at all, sizes that differ, indices out of range,
        values that are not finite.

    References
    ----------
    Fu et al., "LeTS", ICML 2021.

    Examples
    --------
    >>> import numpy as np
    >>> from pycodesign import ops
    >>> a, b = np.ones((1, 3), np.float32), np.ones((4, 1), np.float32)
    >>> packed = ops.prepack_deltas([(b, a), None])
    >>> packed.shape, packed.kinds
    ((4, 3), ('low_rank', 'none'))
    """
    if not isinstance(deltas, Sequence):
        raise TypeError(f"deltas: expected a sequence, one delta for each task, got {type(deltas).__name__}")
    if not deltas:
        raise ValueError("deltas: expected at least one task, got none")
    if not isinstance(dtype, str) or dtype not in VALUE_DTYPES:
        raise ValueError(f"dtype: expected {join_names(map(repr, VALUE_DTYPES))}, got {dtype!r}")
    if bias is not None and len(bias) != len(deltas):
        raise ValueError(f"bias: expected one or None for each of {len(deltas)} tasks, got {len(bias)}")
    biases = [None] * len(deltas) if bias is None else list(bias)
    readings = [_read_delta(f"deltas[{n}]", delta, dtype) for n, delta in enumerate(deltas)]
    shape = next((size for size, _ in readings if size is not None), None)
    if shape is None:
        raise ValueError("deltas: expected at least one matrix, which says the sizes, got None for every task")
    if 0 in shape:
        raise ValueError(f"deltas: expected at least one output and one input, got {shape}")
    packed = []
    for n, ((size, pack), given) in enumerate(zip(readings, biases, strict=True)):
        if size not in (None, shape):
            raise ValueError(f"deltas[{n}]: expected {shape} as before it, got {size}")
        added = None
        if given is not None:
            added, _ = to_numpy(f"bias[{n}]", given)
            check_array(f"bias[{n}]", added, ("float32",), f"({shape[0]},)", added.shape == shape[:1])
            added = _check_finite(f"bias[{n}]", np.ascontiguousarray(added))
        packed.append(_core.pack_none(*shape, added) if pack is None else pack(added))
    return PackedDeltas(packed)


def delta_linear(
    x: Array,
    base: Array | None,
    packed: PackedDeltas,
    *,
    tasks: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    out: Array | None = None,
) -> Array:
    """Add to the output of a linear layer what each task's difference of weights adds: one pass, many tasks.

    ::

        z[n, t, o] = base[t, o] + (bias_n[o] + sum over i of delta_n[o, i] * x[t, i])

    The sum is float32: it starts at the bias and takes one entry after the other, in ascending order of i; of a
    low-rank pair, first ``A x``, then B times that. So a row of z is the same to the bit whatever other tasks and rows
    are asked, in whatever order, and for any number of threads. It is within ``eps (K + 2) (|bias| + sum |delta| |x|) +
    eps |base|`` of the exact value, for K entries in a row of the matrix (``I + r + 2`` for a pair, with ``|B| |A|``
    for ``|delta|``); instruction sets may differ by as much.

    On a CUDA device, if `x` is there, tasks are copied to it when they are first asked for, which waits, and
    `positions` in every call: a CUDA graph can capture the calls that follow without positions.

    Parameters
    ----------
    x : float32 (T, I) or (N, T, I)
        What all tasks read, or rows of its own for each of N asked tasks; any strides. An infinite or NaN element
        makes the outputs that read it through an entry infinite or NaN, no others.
    base : float32 (O,), (T, O) or (N, T, O), optional
        Output of the shared layer, or its bias alone; zeros if None.
    packed : PackedDeltas
    tasks : sequence of int, optional
        Which tasks, in which order; a task may be asked several times. All by default. N is how many they are.
    positions : sequence of int, optional
        Which rows of `x` and `base` (P of them), in which order; all by default.
    out : float32 (N, T, O), optional
        Written and returned; must not overlap `x` or `base`. The elements of a row follow one another.

    Returns
    -------
    float32 (N, T, O), or (N, P, O)
        Of the kind of `x`.

    Raises
    ------
    TypeError, ValueError, IndexError
        Naming the argument, what was expected and what came. Nothing is written then.
    RuntimeError
        For arrays on a CUDA device where there are no kernels for it, saying why.

    References
    ----------
    Fu et al., "LeTS", ICML 2021.

    Examples
    --------
    >>> import numpy as np
    >>> from pycodesign import ops
    >>> delta = np.array([[0, 2, 0], [1, 0, 0]], np.float32)
    >>> packed = ops.prepack_deltas([delta, None])
    >>> x = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    >>> base = np.array([[10, 20], [30, 40]], np.float32)
    >>> ops.delta_linear(x, base, packed, positions=[1])
    array([[[40., 44.]],
    <BLANKLINE>
           [[30., 40.]]], dtype=float32)

    A dense matrix is a linear layer whose rows do not depend on how many there are:

    >>> layer = ops.prepack_deltas([delta])
    >>> ops.delta_linear(x, None, layer)[0]
    array([[ 4.,  1.],
           [10.,  4.]], dtype=float32)
    """
    if not isinstance(packed, PackedDeltas):
        raise TypeError(f"packed: expected PackedDeltas, got {type(packed).__name__}")
    deltas = packed._deltas
    if tasks is not None:
        deltas = [deltas[n] for n in to_indices("tasks", tasks, len(deltas))]
    outputs, inputs = packed.shape
    device = find_device(x=x, base=base, out=out)
    if device is not None:
        return _delta_linear_on(device, x, base, packed.shape, deltas, positions, out)
    given, kind = to_numpy("x", x)
    check_array("x", given, ("float32",), _choice(len(deltas), "T", inputs), _fits(given, len(deltas), None, inputs))
    tokens = given.shape[-2]
    added = None
    if base is not None:
        added, _ = to_numpy("base", base)
        fits = added.shape == (outputs,) or _fits(added, len(deltas), tokens, outputs)
        check_array("base", added, ("float32",), f"({outputs},), {_choice(len(deltas), tokens, outputs)}", fits)
        if added.ndim == 1:
            added = np.broadcast_to(added, (tokens, outputs))
    if positions is not None:
        chosen = to_indices("positions", positions, tokens)
        tokens = len(chosen)
        given = given[..., chosen, :]
        added = None if added is None else added[..., chosen, :]
    shape = (len(deltas), tokens, outputs)
    target = None
    if out is not None:
        target, _ = to_numpy("out", out)
        check_array("out", target, ("float32",), str(shape), target.shape == shape)
    if not deltas:
        return out if out is not None else from_numpy(np.empty(shape, np.float32), kind)
    z = _core.delta_linear(_in_rows(given), None if added is None else _in_rows(added), deltas, target)
    return out if out is not None else from_numpy(z, kind)


def _delta_linear_on(
    device: Device,
    x: Array,
    base: Array | None,
    size: tuple[int, int],
    deltas: list[_core.Delta],
    positions: Sequence[int] | None,
    out: Array | None,
) -> Array:
    native = load_native()
    (outputs, inputs), tasks = size, len(deltas)
    _check_floats(device, "x", x, _choice(tasks, "T", inputs), _fits(x, tasks, None, inputs))
    tokens = x.shape[-2]
    if base is not None:
        fits = tuple(base.shape) == (outputs,) or _fits(base, tasks, tokens, outputs)
        _check_floats(device, "base", base, f"({outputs},), {_choice(tasks, tokens, outputs)}", fits)
    chosen = None
    if positions is not None:
        chosen = device.upload("positions", np.array(to_indices("positions", positions, tokens), np.int64))
        tokens = chosen.shape[0]
    shape = (tasks, tokens, outputs)
    if out is None:
        out = device.empty(shape, "float32")
    else:
        _check_floats(device, "out", out, str(shape), tuple(out.shape) == shape)
    if deltas:
        held = [_upload(device, native, delta) for delta in deltas]
        rows = (None if array is None else device.view(device.in_rows(array)) for array in (x, base))
        places = None if chosen is None else device.view(chosen)
        native.delta_linear(*rows, held, places, device.view(out), device.index, device.stream)
    return out


def _upload(device: Device, native: Any, delta: _core.Delta) -> Any:
    """Return a task on the device, copied there when it is first asked for."""
    places = _uploaded.setdefault(delta, {})
    if device.index not in places:
        device.check_upload("packed")
        arrays = delta.arrays()
        if delta.kind == "sparse":
            longest = arrays.pop("count")[::GROUP_OCTETS]
            arrays["begin"] = np.append(0, np.cumsum(longest)).astype(np.int32)
        places[device.index] = native.Delta(delta.kind, delta.outputs, delta.inputs, delta.rank, arrays, device.index)
    return places[device.index]


def _check_floats(device: Device, name: str, array: Array, shape: str, fits: bool) -> None:
    dtype = device.dtype_name(array)
    if dtype != "float32" or not fits:
        text = f"{name}: expected float32 {shape}, got {dtype} {tuple(array.shape)}"
        raise ValueError(text) if dtype == "float32" else TypeError(text)


def _read_delta(name: str, delta: Matrix, dtype: str) -> tuple[tuple[int, int] | None, Pack | None]:
    """Check a delta, and return its shape and what packs it with its bias."""
    sparse = sys.modules.get("scipy.sparse")  # whoever has such a matrix has imported it
    if delta is None:
        return None, None
    if sparse is not None and sparse.issparse(delta):
        row, column, value = _read_sparse(name, delta, dtype)
        outputs, inputs = delta.shape
        return (outputs, inputs), lambda bias: _core.pack_sparse(outputs, inputs, row, column, value, bias, dtype)
    if isinstance(delta, tuple | list):
        if len(delta) != 2:
            raise ValueError(f"{name}: expected a pair (B, A), got {len(delta)} elements")
        b = _read_matrix(f"{name}[0]", delta[0], "(O, r)", dtype)
        a = _read_matrix(f"{name}[1]", delta[1], "(r, I)", dtype)
        if b.shape[1] != a.shape[0] or not b.shape[1]:
            raise ValueError(f"{name}: expected (O, r) and (r, I) of one rank r >= 1, got {b.shape} and {a.shape}")
        return (b.shape[0], a.shape[1]), lambda bias: _core.pack_low_rank(b, a, bias, dtype)
    w = _read_matrix(name, delta, "(O, I)", dtype)
    return (w.shape[0], w.shape[1]), lambda bias: _core.pack_dense(w, bias, dtype)


def _read_matrix(name: str, matrix: Array, shape: str, dtype: str) -> NDArray[Any]:
    array, _ = to_numpy(name, matrix)
    check_array(name, array, ("float32",), shape, array.ndim == 2)
    return _check_finite(name, np.ascontiguousarray(array), dtype)


def _read_sparse(name: str, matrix: Matrix, dtype: str) -> tuple[NDArray[Any], ...]:
    """Return rows, columns and values of the entries, sorted by row, then column, none twice."""
    if matrix.dtype != np.float32 or matrix.ndim != 2:
        raise TypeError(f"{name}: expected float32 (O, I), got {matrix.dtype} {matrix.shape}")
    if hasattr(matrix, "indptr"):  # what is damaged must not reach scipy's own loops
        matrix = _check_compressed(name, matrix)
    entries = matrix.tocoo()
    row, column = (np.asarray(index, np.int64) for index in (entries.row, entries.col))
    for index, size in ((row, matrix.shape[0]), (column, matrix.shape[1])):
        if index.size and not 0 <= index.min() <= index.max() < size:
            wrong = index.min() if index.min() < 0 else index.max()
            raise ValueError(f"{name}: expected indices from 0 to {size - 1}, got {wrong}")
    value = _check_finite(name, np.asarray(entries.data, np.float32))
    place = row * matrix.shape[1] + column
    if (np.diff(place) <= 0).any():
        order = np.argsort(place, kind="stable")
        row, column, value, place = row[order], column[order], value[order], place[order]
        first = np.flatnonzero(np.diff(place, prepend=-1))
        if first.size < place.size:
            row, column = row[first], column[first]
            value = np.add.reduceat(value, first)
    value = _check_finite(name, value, dtype)
    return row.astype(np.int32), column.astype(np.int32), np.ascontiguousarray(value)


def _check_compressed(name: str, matrix: Matrix) -> Matrix:
    """Return the matrix without entries behind its last row, for which scipy would make up rows."""
    pointers, indices = np.asarray(matrix.indptr), np.asarray(matrix.indices)
    blocks = getattr(matrix, "blocksize", (1, 1))
    rows, columns = (size // block for size, block in zip(matrix.shape, blocks, strict=True))
    major, minor = (columns, rows) if matrix.format == "csc" else (rows, columns)
    sound = len(pointers) == major + 1 and pointers[0] == 0 and bool((np.diff(pointers) >= 0).all())
    if not sound or not pointers[-1] <= len(indices) == len(matrix.data):
        raise ValueError(f"{name}: expected a valid {matrix.format} matrix, got pointers or sizes that do not fit")
    used = indices[: pointers[-1]]
    if used.size and not 0 <= used.min() <= used.max() < minor:
        wrong = used.min() if used.min() < 0 else used.max()
        raise ValueError(f"{name}: expected indices from 0 to {minor - 1}, got {wrong}")
    if len(used) == len(indices):
        return matrix
    return type(matrix)((matrix.data[: len(used)], used, pointers), shape=matrix.shape)


def _check_finite(name: str, array: NDArray[Any], dtype: str = "float32") -> NDArray[Any]:
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite values, got {array[~np.isfinite(array)][0]}")
    if dtype == "bfloat16" and (abs(array) >= BEYOND_BFLOAT16).any():
        wrong = array[abs(array) >= BEYOND_BFLOAT16][0]
        raise ValueError(f"{name}: expected values that are finite in bfloat16, too, got {wrong}")
    return array


def to_indices(name: str, values: Sequence[int], size: int) -> list[int]:
    """Return indices from 0 to `size` - 1 as plain integers."""
    try:
        given = list(values)
        if any(isinstance(value, bool) or str(getattr(value, "dtype", "")) == "torch.bool" for value in given):
            raise TypeError
        indices = [operator.index(value) for value in given]
    except TypeError:
        raise TypeError(f"{name}: expected a sequence of integers, got {values!r:.200}") from None
    for index in indices:
        if not 0 <= index < size:
            raise IndexError(f"{name}: expected indices from 0 to {size - 1}, got {index}")
    return indices


def _fits(array: NDArray[Any], tasks: int, tokens: int | None, size: int) -> bool:
    if array.ndim not in (2, 3) or array.shape[-1] != size or tokens not in (None, array.shape[-2]):
        return False
    return array.ndim == 2 or array.shape[0] == tasks


def _choice(tasks: int, tokens: int | str, size: int) -> str:
    return f"({tokens}, {size}) or ({tasks}, {tokens}, {size})"


def _in_rows(array: NDArray[Any]) -> NDArray[Any]:
    """Return the array, or a copy whose elements follow one another within a row."""
    return array if array.strides[-1] == array.itemsize or array.shape[-1] < 2 else np.ascontiguousarray(array)
