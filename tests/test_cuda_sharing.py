"""`ops.delta_linear` on a GPU: what test_sharing_ops.py checks on the CPU, to the bit where that fuses its products."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from numpy.typing import NDArray
from sharing_deltas import ISAS, KINDS, assert_bits, assert_near, make_delta, make_deltas, make_floats

import pycodesign
from pycodesign import ops

Array = NDArray[Any]


def run(gpu: Any, x: Array, base: Array | None, packed: ops.PackedDeltas, **options: Any) -> Array:
    z = ops.delta_linear(gpu.put(x), gpu.put(base), packed, **options)
    return np.asarray(gpu.get(z))


def assert_same(gpu: Any, x: Array, base: Array | None, packed: ops.PackedDeltas, **options: Any) -> Array:
    """The CPU's bits, if it has fused products."""
    got = run(gpu, x, base, packed, **options)
    pycodesign.set_isa(ISAS[-1])
    expected = ops.delta_linear(x, base, packed, **options)
    assert got.shape == expected.shape and got.dtype == np.float32
    if ISAS[-1] == "scalar":
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    else:
        assert_bits(got + np.float32(0), expected + np.float32(0))  # without the sign of zeros
    return got


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (16, 16), (63, 31), (65, 33), (255, 47), (256, 17), (600, 129)], ids=str
)
def test_edge_sizes(gpu: Any, shape: tuple[int, int]) -> None:
    deltas, bias = make_deltas(shape)
    packed = ops.prepack_deltas(deltas, bias=bias)
    for tokens, own in product((0, 1, 2, 3, 4, 5, 8, 9, 17), (False, True)):
        leading = (len(KINDS),) if own else ()
        x, base = make_floats((*leading, tokens, shape[1])), make_floats((*leading, tokens, shape[0]), 1)
        got = assert_same(gpu, x, base, packed)
        assert_near(got, x, base, deltas, bias)


def test_bfloat16_values(gpu: Any) -> None:
    deltas, bias = make_deltas((65, 47))
    packed, plain = (ops.prepack_deltas(deltas, bias=bias, dtype=dtype) for dtype in ("bfloat16", "float32"))
    mixed = packed.select(range(3)) + plain.select(range(3, 7))
    for tokens in (1, 6):
        x, base = make_floats((tokens, 47)), make_floats((tokens, 65), 1)
        z = assert_same(gpu, x, base, packed)
        assert_bits(z[:3], run(gpu, x, base, mixed)[:3])


def test_structures_and_many_tasks(gpu: Any) -> None:
    rng = np.random.default_rng(0)
    shape = 300, 200
    columns, blocks = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    columns[:, rng.permutation(200)[:7]] = rng.standard_normal((300, 7))
    blocks[64:96, 32:64] = rng.standard_normal((32, 32))
    blocks[256:288, 100:132] = rng.standard_normal((32, 32))
    full = np.zeros(shape, np.float32)
    full[17] = rng.standard_normal(200)
    sparse = [scipy.sparse.csr_array(matrix) for matrix in (columns, blocks, full, np.zeros(shape, np.float32))]
    packed = ops.prepack_deltas([*sparse, *(make_delta("low_rank", shape, seed) for seed in range(3))] * 5)
    assert len(packed) == 35  # more than one launch takes
    x, base = make_floats((6, 200)), make_floats((6, 300), 1)
    z = assert_same(gpu, x, base, packed)
    assert_same(gpu, make_floats((35, 3, 200)), None, packed)
    order = [33, 0, 6, 3, 1, 5, 2, 34]
    assert_bits(run(gpu, x, base, packed, tasks=order), z[order])
    assert_bits(run(gpu, x, base, packed.select([4, 34])), z[[4, 34]])
    assert_bits(run(gpu, x, base, packed, positions=[5, 3, 3]), z[:, [5, 3, 3]])
    assert run(gpu, x, base, packed, tasks=[]).shape == (0, 6, 300)
    assert run(gpu, x, base, packed, positions=[]).shape == (35, 0, 300)


@pytest.mark.parametrize("inputs", [3700, 7200, 14500, 29000, 60000])
def test_inputs_that_leave_little_shared_memory(gpu: Any, inputs: int) -> None:
    deltas = [make_delta("sparse", (20, inputs), 1, 0.001), make_delta("low_rank", (20, inputs), 1)]
    packed = ops.prepack_deltas([*deltas, make_delta("dense", (20, inputs), 2)])
    assert_same(gpu, make_floats((5, inputs)), make_floats((5, 20), 1), packed)


def test_bases_and_layouts(gpu: Any) -> None:
    deltas, bias = make_deltas((65, 47))
    packed = ops.prepack_deltas(deltas, bias=bias)
    wide = make_floats((14, 9, 50))
    for x in (wide[::2, :5, 2:49], wide[0, ::3, 3:], make_floats((7, 47, 5)).transpose(0, 2, 1)):
        tokens = x.shape[-2]
        for base in (None, make_floats((65,)), make_floats((tokens, 130))[:, ::2], make_floats((7, tokens, 65))):
            for options in ({}, {"positions": [tokens - 1, 0]}):
                assert_same(gpu, x, base, packed, **options)


def test_outputs(gpu: Any) -> None:
    deltas, bias = make_deltas((65, 47))
    packed = ops.prepack_deltas(deltas, bias=bias)
    x, base = make_floats((6, 47)), make_floats((6, 65), 1)
    expected = run(gpu, x, base, packed)
    padded = np.full((8, 9, 71), 7, np.float32)
    place = gpu.put(padded.copy())
    out = place[1:, 2:8, 3:68]
    assert ops.delta_linear(gpu.put(x), gpu.put(base), packed, out=out) is out
    padded[1:, 2:8, 3:68] = expected
    assert_bits(gpu.get(place), padded)
    on_gpu = gpu.put(x)
    for out, error, message in (
        (np.ones((7, 6, 64), np.float32), ValueError, "out: expected float32 (7, 6, 65), got float32 (7, 6, 64)"),
        (np.ones((7, 6, 65)), TypeError, "out: expected float32 (7, 6, 65), got float64 (7, 6, 65)"),
    ):
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            ops.delta_linear(on_gpu, None, packed, out=gpu.put(out))
    with pytest.raises(TypeError, match=re.escape("x: expected float32 (T, 47) or (7, T, 47), got float64 (6, 47)")):
        ops.delta_linear(gpu.put(x.astype(float)), None, packed)
    with pytest.raises(ValueError, match=r"^base: expected float32 \(65,\), "):
        ops.delta_linear(on_gpu, gpu.put(base[:5]), packed)
    with pytest.raises(IndexError, match=r"^positions: expected indices from 0 to 5, got 6$"):
        ops.delta_linear(on_gpu, None, packed, positions=[6])
    if gpu.kind == "cupy":
        with pytest.raises(TypeError, match=r"^base: expected a CuPy array on device 0, as x is, got ndarray in host"):
            ops.delta_linear(on_gpu, base, packed)


def test_infinities_stay_where_they_are_read(gpu: Any) -> None:
    delta = scipy.sparse.csr_array(np.array([[0, 2, 0], [1, 0, 0], [0, 0, 0]], np.float32))
    x = np.array([[np.inf, 1, 1], [1, np.nan, 1]], np.float32)
    z = run(gpu, x, None, ops.prepack_deltas([delta]))
    np.testing.assert_array_equal(z[0], [[2, np.inf, 0], [np.nan, 1, 0]])
