"""`ops.delta_linear` against its reference: kinds of deltas, edge sizes, threads, memory layouts.

And against itself to the bit, whatever else is asked. Bad input writes nothing.
"""

from __future__ import annotations

import doctest
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import assert_guards_untouched, guarded
from numpy.typing import NDArray

import pycodesign
from pycodesign import _core, ops
from pycodesign.reference import sharing

Array = NDArray[Any]

ISAS = _core.supported_isas()
EPS = np.finfo(np.float32).eps
KINDS = ("sparse", "low_rank", "none", "dense", "sparse", "low_rank", "sparse")
TOKENS = (1, 2, 3, 15, 16, 17, 32, 33, 49, 64, 65, 130)
SIZES = ((1, 1), (3, 5), (16, 16), (63, 31), (64, 33), (65, 300), (200, 47), (600, 40))


def make_floats(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_delta(kind: str, shape: tuple[int, int], seed: int = 0, density: float = 0.1) -> Any:
    outputs, inputs = shape
    if kind == "none":
        return None
    if kind == "dense":
        return make_floats(shape, seed)
    if kind == "low_rank":
        rank = 1 + 13 * seed % 40
        return make_floats((outputs, rank), seed), make_floats((rank, inputs), seed + 1)
    keep = np.random.default_rng(seed).random(shape) < density
    return scipy.sparse.csr_array(np.where(keep, make_floats(shape, seed), np.float32(0)))


def make_deltas(shape: tuple[int, int], kinds: Sequence[str] = KINDS) -> tuple[list[Any], list[Array | None]]:
    """Deltas and biases; tasks 1 to 4, of every kind, have one."""
    deltas = [make_delta(kind, shape, seed) for seed, kind in enumerate(kinds)]
    return deltas, [make_floats(shape[:1], seed) if 1 <= seed <= 4 else None for seed in range(len(kinds))]


def magnitude(delta: Any) -> Any:
    return tuple(map(abs, delta)) if isinstance(delta, tuple) else None if delta is None else abs(delta)


def bound(x: Array, base: Array | None, deltas: list[Any], bias: list[Any], **options: Any) -> Array:
    """What the docstring promises, with every row as long as the longest."""
    inputs, ranks = x.shape[-1], [delta[0].shape[1] for delta in deltas if isinstance(delta, tuple)]
    terms = inputs + max(ranks, default=0) + 2
    sizes = [magnitude(delta) for delta in deltas], [None if b is None else abs(b) for b in bias]
    sums = sharing.delta_linear(abs(x), None, sizes[0], bias=sizes[1], **options)
    with_base = sums if base is None else sharing.delta_linear(abs(x), abs(base), sizes[0], bias=sizes[1], **options)
    return np.asarray(EPS * (terms * sums + (with_base - sums)))


def assert_near(got: Array, x: Array, base: Array | None, deltas: list[Any], bias: list[Any], **options: Any) -> None:
    expected = sharing.delta_linear(x, base, deltas, bias=bias, **options)
    assert got.dtype == np.float32 and got.shape == expected.shape
    assert (abs(got - expected) <= bound(x, base, deltas, bias, **options)).all()


def assert_bits(got: Any, expected: Any) -> None:
    assert got.shape == expected.shape
    np.testing.assert_array_equal(np.asarray(got).view(np.int32), np.asarray(expected).view(np.int32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_edge_sizes(shape: tuple[int, int], isa: str) -> None:
    pycodesign.set_isa(isa)
    deltas, bias = make_deltas(shape)
    packed = ops.prepack_deltas(deltas, bias=bias)
    assert packed.kinds == KINDS and packed.shape == shape and len(packed) == len(KINDS)
    for tokens, own in product(TOKENS, (False, True)):
        leading = (len(KINDS),) if own else ()
        x, base = make_floats((*leading, tokens, shape[1])), make_floats((*leading, tokens, shape[0]), 1)
        results = []
        for threads in (1, 2, 3):
            pycodesign.set_num_threads(threads)
            results.append(ops.delta_linear(x, base, packed))
            assert_bits(results[-1], results[0])
        assert_near(results[0], x, base, deltas, bias)


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_values(isa: str) -> None:
    pycodesign.set_isa(isa)
    shape = 65, 47

    def rounded(matrix: Any) -> Any:
        if isinstance(matrix, tuple):
            return tuple(map(rounded, matrix))
        if matrix is None or isinstance(matrix, np.ndarray):
            return matrix if matrix is None else matrix.astype(ml_dtypes.bfloat16).astype(np.float32)
        result = matrix.copy()
        result.data = rounded(result.data)
        return result

    deltas, bias = make_deltas(shape)
    packed, plain = (ops.prepack_deltas(deltas, bias=bias, dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert packed.nbytes < 0.8 * plain.nbytes
    near = list(map(rounded, deltas))
    same = ops.prepack_deltas(near, bias=bias)
    mixed = packed.select(range(3)) + plain.select(range(3, 7))
    for tokens in TOKENS:
        x, base = make_floats((tokens, shape[1])), make_floats((tokens, shape[0]), 1)
        z = ops.delta_linear(x, base, packed)
        assert_near(z, x, base, near, bias)
        assert_bits(z, ops.delta_linear(x, base, same))
        assert_bits(z[:3], ops.delta_linear(x, base, mixed)[:3])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_is_the_same_to_the_bit_whatever_else_is_asked(dtype: str, isa: str) -> None:
    pycodesign.set_isa(isa)
    shape = 200, 300
    deltas, bias = make_deltas(shape)
    packed = ops.prepack_deltas(deltas, bias=bias, dtype=dtype)
    x, base = make_floats((130, 300)), make_floats((130, 200), 1)
    z = ops.delta_linear(x, base, packed)
    order = [4, 0, 6, 3, 1, 5, 2, 4]
    assert_bits(ops.delta_linear(x, base, packed, tasks=order), z[order])
    for n in range(len(packed)):
        alone = ops.prepack_deltas([deltas[n], deltas[0]], bias=[bias[n], None], dtype=dtype)
        assert_bits(ops.delta_linear(x, base, packed, tasks=[n])[0], z[n])
        assert_bits(ops.delta_linear(x, base, packed.select([n]))[0], z[n])
        assert_bits(ops.delta_linear(x, base, alone)[0], z[n])
    for rows in ([0], [129], [5, 3], [7, 7, 7], list(range(0, 130, 9)), list(range(40)), list(range(99, 33, -1))):
        assert_bits(ops.delta_linear(x, base, packed, positions=rows), z[:, rows])
        assert_bits(ops.delta_linear(x[rows], base[rows], packed), z[:, rows])
    # Rows of their own for each task.
    rows = np.array([3, 77, 129, 0, 64, 65, 1])
    assert_bits(ops.delta_linear(x[rows, None], base[rows, None], packed)[:, 0], z[np.arange(7), rows])
    own = np.ascontiguousarray(np.broadcast_to(x, (7, 130, 300)))
    assert_bits(ops.delta_linear(own, base, packed), z)


def test_base_may_be_a_bias_or_missing() -> None:
    deltas, bias = make_deltas((65, 47))
    packed = ops.prepack_deltas(deltas, bias=bias)
    for tokens in (1, 20):
        x = make_floats((tokens, 47))
        for base in (None, make_floats((65,)), make_floats((tokens, 65)), make_floats((7, tokens, 65))):
            for options in ({}, {"positions": [tokens - 1, 0]}):
                assert_near(ops.delta_linear(x, base, packed, **options), x, base, deltas, bias, **options)


def test_layouts() -> None:
    deltas, bias = make_deltas((65, 47))
    packed = ops.prepack_deltas(deltas, bias=bias)
    layouts: list[dict[str, Any]] = [{"spare": 0}, {}, {"order": (1, 0, 2)}, {"order": (2, 1, 0)}]
    layouts += [{"steps": (-1, -1, -1)}, {"steps": (1, 2, 3)}, {"steps": (2, -3, 1)}]
    for tokens in (1, 2, 20, 66):
        x, base = make_floats((7, tokens, 47)), make_floats((7, tokens, 65), 1)
        expected = ops.delta_linear(x, base, packed)
        for layout in layouts:
            _, x_view = guarded(x.shape, "float32", **layout)
            _, base_view = guarded(base.shape, "float32", **layout)
            x_view[...], base_view[...] = x, base
            assert_bits(ops.delta_linear(x_view, base_view, packed), expected)
            if layout.get("order", (0, 1, 2))[2] == 2 and layout.get("steps", (1, 1, 1))[2] == 1:
                buffer, out = guarded(expected.shape, "float32", **layout)
                assert ops.delta_linear(x_view, base_view, packed, out=out) is out
                assert_bits(out, expected)
                assert_guards_untouched(buffer, out)


def test_rows_beyond_the_caches() -> None:
    # Outputs that begin at a cache line and elsewhere, in results that no cache holds.
    for outputs, shift in ((1024, 0), (1000, 3)):
        shape = outputs, 64
        deltas = [make_delta("sparse", shape, seed, 0.02) for seed in range(4)] + [make_delta("low_rank", shape)]
        packed = ops.prepack_deltas(deltas)
        x, base = make_floats((1100, 64)), make_floats((1100, outputs), 1)
        expected = np.stack([base + x @ delta.toarray().T for delta in deltas[:4]])
        memory = np.empty(5 * 1100 * outputs + 16, np.float32)
        start = -memory.ctypes.data // 4 % 16 + shift
        out = memory[start : start + 5 * 1100 * outputs].reshape(5, 1100, outputs)
        for threads, isa in ((1, "scalar"), (1, ISAS[-1]), (2, ISAS[-1])):
            pycodesign.set_num_threads(threads)
            pycodesign.set_isa(isa)
            out.fill(np.nan)
            ops.delta_linear(x, base, packed, out=out)
            np.testing.assert_allclose(out[:4], expected, rtol=1e-4, atol=1e-4)
            assert_bits(out[:, 1099:], ops.delta_linear(x, base, packed, positions=[1099]))


@given(st.data())
def test_any_call(data: st.DataObject) -> None:
    shape = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 40))
    kinds = data.draw(st.lists(st.sampled_from(sorted(set(KINDS) - {"none"})), min_size=1, max_size=4))
    density = data.draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    deltas = [make_delta(kind, shape, seed, density) for seed, kind in enumerate([*kinds, "none"])]
    bias = [make_floats(shape[:1], n) if data.draw(st.booleans()) else None for n in range(len(deltas))]
    packed = ops.prepack_deltas(deltas, bias=bias)
    tasks = data.draw(st.lists(st.integers(0, len(deltas) - 1), max_size=5))
    tokens = data.draw(st.integers(1, 70))
    options: dict[str, Any] = {"tasks": tasks}
    if data.draw(st.booleans()):
        options["positions"] = data.draw(st.lists(st.integers(0, tokens - 1), max_size=5))
    leading = (len(tasks),) if data.draw(st.booleans()) else ()
    x, base = make_floats((*leading, tokens, shape[1])), make_floats((*leading, tokens, shape[0]), 1)
    pycodesign.set_isa(data.draw(st.sampled_from(ISAS)))
    z = ops.delta_linear(x, base, packed, **options)
    rows = options.get("positions", range(tokens))
    assert z.shape == (len(tasks), len(rows), shape[0])
    if tasks and rows:
        assert_near(z, x, base, deltas, bias, **options)


def test_every_sparse_format() -> None:
    matrix = make_delta("sparse", (12, 18))
    x = make_floats((5, 18))
    expected = ops.delta_linear(x, None, ops.prepack_deltas([matrix]))
    for form in ("bsr", "coo", "csc", "csr", "dia", "dok", "lil"):
        for convert in (matrix.asformat, scipy.sparse.csr_matrix(matrix).asformat):
            assert_bits(ops.delta_linear(x, None, ops.prepack_deltas([convert(form)])), expected)
    shuffled = matrix.tocoo()
    order = np.random.default_rng(0).permutation(shuffled.nnz)
    shuffled.coords = tuple(index[order] for index in shuffled.coords)
    shuffled.data = shuffled.data[order]
    assert_bits(ops.delta_linear(x, None, ops.prepack_deltas([shuffled])), expected)


def test_entries_given_twice_are_added_up_and_zeros_stay() -> None:
    data, row, column = np.array([1, 2, 4, 0], np.float32), np.array([1, 0, 1, 1]), np.array([2, 0, 2, 0])
    packed = ops.prepack_deltas([scipy.sparse.coo_array((data, (row, column)), shape=(2, 3))])
    assert packed.entries == (3,)
    np.testing.assert_array_equal(packed.shape, (2, 3))
    z = ops.delta_linear(np.array([[1, 10, 100]], np.float32), None, packed)
    np.testing.assert_array_equal(z, [[[2, 500]]])


def test_a_task_without_entries_is_legal() -> None:
    empty = scipy.sparse.csr_array((70, 40), dtype=np.float32)
    packed = ops.prepack_deltas([empty, None])
    assert packed.entries == (0, 0)
    for tokens in (1, 20):
        base = make_floats((tokens, 70))
        np.testing.assert_array_equal(ops.delta_linear(make_floats((tokens, 40)), base, packed), [base, base])


def test_infinity_is_seen_by_who_reads_it() -> None:
    matrix = scipy.sparse.csr_array(np.array([[0, 1, 0], [1, 0, 1], [0, 0, 0]], np.float32))
    packed = ops.prepack_deltas([matrix])
    for isa, tokens in product(ISAS, (1, 2, 3, 40)):
        pycodesign.set_isa(isa)
        x = np.tile(np.array([np.inf, 5, np.nan], np.float32), (tokens, 1))
        z = ops.delta_linear(x, None, packed)
        np.testing.assert_array_equal(z, np.tile([5, np.nan, 0], (1, tokens, 1)))


def test_kinds() -> None:
    deltas, bias = make_deltas((65, 47))
    packed = ops.prepack_deltas(
        [tuple(map(torch.from_numpy, d)) if isinstance(d, tuple) else d for d in deltas],
        bias=[None if b is None else torch.from_numpy(b) for b in bias],
    )
    x, base = make_floats((20, 47)), make_floats((20, 65))
    expected = ops.delta_linear(x, base, packed)
    tensor = ops.delta_linear(torch.from_numpy(x).requires_grad_(), torch.from_numpy(base), packed)
    assert isinstance(tensor, torch.Tensor) and not tensor.requires_grad
    assert_bits(tensor, expected)
    out = torch.empty(7, 20, 65)
    assert ops.delta_linear(torch.from_numpy(x), base, packed, out=out) is out
    assert_bits(out, expected)
    none = ops.delta_linear(torch.from_numpy(x), None, packed, tasks=[])
    assert isinstance(none, torch.Tensor) and none.shape == (0, 20, 65)
    assert ops.delta_linear(x, base, packed, positions=[]).shape == (7, 0, 65)
    assert ops.delta_linear(x[:0], base[:0], packed).shape == (7, 0, 65)
    assert_bits(ops.delta_linear(x, base, packed, positions=np.array([3]), tasks=torch.tensor([1])), expected[1:2, 3:4])


def test_packed_deltas_are_selected_and_joined() -> None:
    deltas, bias = make_deltas((65, 47))
    packed = ops.prepack_deltas(deltas, bias=bias)
    x = make_floats((3, 47))
    z = ops.delta_linear(x, None, packed)
    assert_bits(ops.delta_linear(x, None, packed.select([1, 2]) + packed.select([6])), z[[1, 2, 6]])
    assert sum(packed.select([n]).nbytes for n in range(7)) == packed.nbytes
    assert repr(packed.select([2])) == "PackedDeltas(shape=(65, 47), kinds=('none',), nbytes=260)"
    with pytest.raises(IndexError, match=re.escape("tasks: expected indices from 0 to 6, got 7")):
        packed.select([7])
    with pytest.raises(ValueError, match=re.escape("tasks: expected at least one, got none")):
        packed.select([])
    with pytest.raises(ValueError, match=re.escape("other: expected deltas (65, 47), got (1, 1)")):
        packed + ops.prepack_deltas([np.ones((1, 1), np.float32)])
    with pytest.raises(TypeError):
        packed + 1  # type: ignore[operator]


def test_calls_from_several_threads() -> None:
    pycodesign.set_num_threads(2)
    packed = ops.prepack_deltas(make_deltas((200, 47))[0])
    xs = [make_floats((tokens, 47)) for tokens in (1, 40, 70, 3, 130, 16, 2, 64)]
    expected = [ops.delta_linear(x, None, packed) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(lambda x: ops.delta_linear(x, None, packed), xs), expected, strict=True):
                assert_bits(got, want)


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


@pytest.mark.parametrize(
    ("module", "name"), [(ops, "prepack_deltas"), (ops, "delta_linear"), (sharing, "delta_linear")]
)
def test_docstring_examples(module: Any, name: str) -> None:
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(module, name), name, module=False, globs={"np": np})
    found.globs["delta_linear"] = sharing.delta_linear
    assert found.examples
    assert doctest.DocTestRunner().run(found).failed == 0


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
