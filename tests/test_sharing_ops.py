"""`ops.delta_linear` against its reference, and itself to the bit: kinds of deltas, edge sizes, threads, layouts."""

from __future__ import annotations

import doctest
import re
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
from sharing_deltas import ISAS, KINDS, assert_bits, assert_near, make_delta, make_deltas, make_floats

import pycodesign
from pycodesign import ops
from pycodesign.reference import sharing

TOKENS = (1, 2, 3, 15, 16, 17, 32, 33, 49, 64, 65, 130)
SIZES = ((1, 1), (3, 5), (16, 16), (63, 31), (64, 33), (65, 300), (200, 47), (600, 40))


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


@pytest.mark.parametrize("kind", ["csr", "csc", "bsr"])
def test_entries_behind_the_last_row_do_not_count(kind):
    dense = np.arange(16, dtype=np.float32).reshape(4, 4) * np.array([0, 1, 0, 1], np.float32)
    matrix = scipy.sparse.coo_array(dense).asformat(kind)
    matrix.indices = np.append(matrix.indices, np.zeros(50, matrix.indices.dtype))
    matrix.data = np.append(matrix.data, np.full((50, *matrix.data.shape[1:]), 7, np.float32), axis=0)
    for _ in range(3):
        packed = ops.prepack_deltas([matrix])
        assert np.array_equal(ops.delta_linear(np.eye(4, dtype=np.float32), None, packed)[0], dense.T)


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


LARGEST = np.float32(float.fromhex("0x1.fep127"))  # of bfloat16
BEYOND = np.float32(float.fromhex("0x1.ffp127"))


@pytest.mark.parametrize("make", [scipy.sparse.csr_array, np.ascontiguousarray, lambda w: (w, np.eye(2, dtype="f4"))])
def test_values_beyond_bfloat16(make):
    for sign in (1, -1):
        w = np.array([[0, sign * BEYOND], [1, 2]], np.float32)
        ops.prepack_deltas([make(w)])
        with pytest.raises(ValueError, match=r"expected values that are finite in bfloat16, too, got -?3\.39"):
            ops.prepack_deltas([make(w)], dtype="bfloat16")
        w[0, 1] = sign * np.nextafter(BEYOND, np.float32(0))
        packed = ops.prepack_deltas([make(w)], dtype="bfloat16")
        assert ops.delta_linear(np.eye(2, dtype="f4"), None, packed)[0, 1, 0] == sign * LARGEST


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


@pytest.mark.parametrize(
    ("module", "name"), [(ops, "prepack_deltas"), (ops, "delta_linear"), (sharing, "delta_linear")]
)
def test_docstring_examples(module: Any, name: str) -> None:
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(module, name), name, module=False, globs={"np": np})
    found.globs["delta_linear"] = sharing.delta_linear
    assert found.examples
    assert doctest.DocTestRunner().run(found).failed == 0
