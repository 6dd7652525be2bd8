"""Bad deltas and bad calls of `ops.delta_linear`: each has its exception and its full message; `out` is left alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from numpy.typing import NDArray

from pycodesign import _core, ops

Array = NDArray[Any]


def damaged(**changes: Any) -> Any:
    """A CSR matrix (3, 4) whose arrays are replaced after it was made."""
    matrix = scipy.sparse.csr_array(np.eye(3, 4, dtype=np.float32))
    for name, value in changes.items():
        setattr(matrix, name, np.array(value, getattr(matrix, name).dtype))
    return matrix


F, W = np.float32, np.ones((3, 4), np.float32)
EYE = scipy.sparse.csr_array(np.eye(3, 4, dtype=np.float32))
POINTERS = "deltas[0]: expected a valid csr matrix, got pointers or sizes that do not fit"
PACKING: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no sequence": (
        lambda: ops.prepack_deltas(EYE),
        TypeError,
        "deltas: expected a sequence, one delta for each task, got csr_array",
    ),
    "no task": (lambda: ops.prepack_deltas([]), ValueError, "deltas: expected at least one task, got none"),
    "no matrix": (
        lambda: ops.prepack_deltas([None, None]),
        ValueError,
        "deltas: expected at least one matrix, which says the sizes, got None for every task",
    ),
    "string": (
        lambda: ops.prepack_deltas(["w"]),
        TypeError,
        "deltas[0]: expected a NumPy array or a torch tensor, got str",
    ),
    "dtype of a matrix": (
        lambda: ops.prepack_deltas([W, W.astype("f8")]),
        TypeError,
        "deltas[1]: expected float32 (O, I), got float64 (3, 4)",
    ),
    "dtype of a sparse matrix": (
        lambda: ops.prepack_deltas([EYE.astype("f8")]),
        TypeError,
        "deltas[0]: expected float32 (O, I), got float64 (3, 4)",
    ),
    "vector": (lambda: ops.prepack_deltas([W[0]]), ValueError, "deltas[0]: expected float32 (O, I), got float32 (4,)"),
    "triple": (
        lambda: ops.prepack_deltas([(W, W, W)]),
        ValueError,
        "deltas[0]: expected a pair (B, A), got 3 elements",
    ),
    "ranks": (
        lambda: ops.prepack_deltas([(W, W)]),
        ValueError,
        "deltas[0]: expected (O, r) and (r, I) of one rank r >= 1, got (3, 4) and (3, 4)",
    ),
    "rank 0": (
        lambda: ops.prepack_deltas([(W[:, :0], W[:0])]),
        ValueError,
        "deltas[0]: expected (O, r) and (r, I) of one rank r >= 1, got (3, 0) and (0, 4)",
    ),
    "dtype of a pair": (
        lambda: ops.prepack_deltas([(W, W.T.astype("f2"))]),
        TypeError,
        "deltas[0][1]: expected float32 (r, I), got float16 (4, 3)",
    ),
    "sizes": (
        lambda: ops.prepack_deltas([W, EYE[:2]]),
        ValueError,
        "deltas[1]: expected (3, 4) as before it, got (2, 4)",
    ),
    "no output": (
        lambda: ops.prepack_deltas([W[:0]]),
        ValueError,
        "deltas: expected at least one output and one input, got (0, 4)",
    ),
    "many inputs": (
        lambda: ops.prepack_deltas([scipy.sparse.csr_array((2, 65536), dtype=F)]),
        ValueError,
        "deltas: expected at most 65535 inputs of a sparse matrix, got 65536",
    ),
    "not a number": (
        lambda: ops.prepack_deltas([EYE * F(np.nan)]),
        ValueError,
        "deltas[0]: expected finite values, got nan",
    ),
    "infinity": (
        lambda: ops.prepack_deltas([(W, np.full((4, 4), np.inf, F))]),
        ValueError,
        "deltas[0][1]: expected finite values, got inf",
    ),
    "index": (
        lambda: ops.prepack_deltas([damaged(indices=[0, 1, 4])]),
        ValueError,
        "deltas[0]: expected indices from 0 to 3, got 4",
    ),
    "negative index": (
        lambda: ops.prepack_deltas([damaged(indices=[0, -1, 2])]),
        ValueError,
        "deltas[0]: expected indices from 0 to 3, got -1",
    ),
    "pointers that fall": (lambda: ops.prepack_deltas([damaged(indptr=[0, 3, 1, 3])]), ValueError, POINTERS),
    "pointers beyond": (lambda: ops.prepack_deltas([damaged(indptr=[0, 1, 2, 9])]), ValueError, POINTERS),
    "few pointers": (lambda: ops.prepack_deltas([damaged(indptr=[0, 1, 3])]), ValueError, POINTERS),
    "few values": (lambda: ops.prepack_deltas([damaged(data=[1, 2])]), ValueError, POINTERS),
    "dtype of values": (
        lambda: ops.prepack_deltas([W], dtype="float16"),
        ValueError,
        "dtype: expected 'float32' or 'bfloat16', got 'float16'",
    ),
    "biases": (
        lambda: ops.prepack_deltas([W], bias=[None, None]),
        ValueError,
        "bias: expected one or None for each of 1 tasks, got 2",
    ),
    "bias": (
        lambda: ops.prepack_deltas([W, W], bias=[None, np.ones(4, F)]),
        ValueError,
        "bias[1]: expected float32 (3,), got float32 (4,)",
    ),
    "infinite bias": (
        lambda: ops.prepack_deltas([W], bias=[np.full(3, np.inf, F)]),
        ValueError,
        "bias[0]: expected finite values, got inf",
    ),
}

PACKED = ops.prepack_deltas([W, EYE])
X, BASE = np.ones((5, 4), F), np.ones((5, 3), F)
CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "packed": ({"packed": [W]}, TypeError, "packed: expected PackedDeltas, got list"),
    "list": ({"x": [[1.0]]}, TypeError, "x: expected a NumPy array or a torch tensor, got list"),
    "x dtype": (
        {"x": X.astype("f8")},
        TypeError,
        "x: expected float32 (T, 4) or (2, T, 4), got float64 (5, 4)",
    ),
    "x vector": ({"x": X[0]}, ValueError, "x: expected float32 (T, 4) or (2, T, 4), got float32 (4,)"),
    "x inputs": ({"x": X[:, :3]}, ValueError, "x: expected float32 (T, 4) or (2, T, 4), got float32 (5, 3)"),
    "x tasks": ({"x": X[None]}, ValueError, "x: expected float32 (T, 4) or (2, T, 4), got float32 (1, 5, 4)"),
    "base rows": (
        {"base": BASE[1:]},
        ValueError,
        "base: expected float32 (3,), (5, 3) or (2, 5, 3), got float32 (4, 3)",
    ),
    "base dtype": (
        {"base": BASE.astype("f2")},
        TypeError,
        "base: expected float32 (3,), (5, 3) or (2, 5, 3), got float16 (5, 3)",
    ),
    "task": ({"tasks": [0, 2]}, IndexError, "tasks: expected indices from 0 to 1, got 2"),
    "negative task": ({"tasks": [-1]}, IndexError, "tasks: expected indices from 0 to 1, got -1"),
    "task name": ({"tasks": ["a"]}, TypeError, "tasks: expected a sequence of integers, got ['a']"),
    "position": ({"positions": [5]}, IndexError, "positions: expected indices from 0 to 4, got 5"),
    "one position": ({"positions": 0}, TypeError, "positions: expected a sequence of integers, got 0"),
}
OUTPUTS: dict[str, tuple[Callable[[], Array], type[Exception], str]] = {
    "shape": (lambda: np.ones((2, 5, 4), F), ValueError, "out: expected float32 (2, 5, 3), got float32 (2, 5, 4)"),
    "dtype": (lambda: np.ones((2, 5, 3)), TypeError, "out: expected float32 (2, 5, 3), got float64 (2, 5, 3)"),
    "elements apart": (
        lambda: np.ones((2, 5, 6), F)[:, :, ::2],
        ValueError,
        "out: expected rows whose elements follow one another, got other strides",
    ),
    "broadcast": (
        lambda: np.broadcast_to(np.ones(3, F), (2, 5, 3)),
        ValueError,
        "out: expected a writeable array, got a read-only or broadcast one",
    ),
    "rows in each other": (
        lambda: np.lib.stride_tricks.as_strided(np.ones(40, F), (2, 5, 3), (60, 8, 4)),
        ValueError,
        "out: expected rows apart from one another, got rows that overlap",
    ),
    "tasks in each other": (
        lambda: np.lib.stride_tricks.as_strided(np.ones(40, F), (2, 5, 3), (12, 12, 4)),
        ValueError,
        "out: expected rows apart from one another, got rows that overlap",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), PACKING.values(), ids=PACKING)
def test_bad_deltas(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.parametrize(("changes", "error", "message"), CALLS.values(), ids=CALLS)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    out = np.full((2, 5, 3), 7, F)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        ops.delta_linear(**{"x": X, "base": BASE, "packed": PACKED, "out": out} | changes)
    assert (out == 7).all()


@pytest.mark.parametrize(("make", "error", "message"), OUTPUTS.values(), ids=OUTPUTS)
def test_bad_outputs(make: Callable[[], Array], error: type[Exception], message: str) -> None:
    out = make()
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        ops.delta_linear(X, BASE, PACKED, out=out)
    assert (out == 1).all()


def test_out_apart() -> None:
    memory = np.ones((2, 5, 3), F)
    with pytest.raises(ValueError, match="out: expected memory apart from base, got an array that overlaps it"):
        ops.delta_linear(X, memory[1], PACKED, out=memory)
    wide = np.ones((2, 5, 4), F)
    with pytest.raises(ValueError, match="out: expected memory apart from x, got an array that overlaps it"):
        ops.delta_linear(wide[0], BASE, PACKED, out=wide[:, :, :3])
    assert (memory == 1).all() and (wide == 1).all()


def test_native_module_checks_what_it_is_given() -> None:
    index, value = np.zeros(1, np.int32), np.ones(1, F)
    for row, column, data in ((index + 2, index, value), (index, index - 1, value), (index, index, value.astype("f8"))):
        with pytest.raises((TypeError, ValueError), match="expected"):
            _core.pack_sparse(2, 3, row, column, data, None, "float32")
    with pytest.raises(ValueError, match="expected entries in ascending order"):
        _core.pack_sparse(2, 3, np.array([1, 0], np.int32), np.zeros(2, np.int32), np.ones(2, F), None, "float32")
    with pytest.raises(ValueError, match="expected C order"):
        _core.pack_dense(W.T, None, "float32")
    with pytest.raises(ValueError, match="dtype: expected 'float32' or 'bfloat16'"):
        _core.pack_dense(W, None, "float64")
    delta, other = _core.pack_dense(W, None, "float32"), _core.pack_none(4, 4, None)
    with pytest.raises(ValueError, match="deltas: expected tasks of one size"):
        _core.delta_linear(X, None, [delta, other], None)
    with pytest.raises(ValueError, match="deltas: expected at least one task"):
        _core.delta_linear(X, None, [], None)
    with pytest.raises(ValueError, match="x: expected rows whose elements follow one another"):
        _core.delta_linear(np.ones((5, 8), F)[:, ::2], None, [delta], None)
    with pytest.raises(ValueError, match="base: expected float32"):
        _core.delta_linear(X, W, [delta], None)
