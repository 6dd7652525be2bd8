"""`ops.expand` against its reference: every dtype, edge sizes, threads, memory layouts; bad input writes nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import LAYOUTS, assert_guards_untouched, guarded
from numpy.typing import NDArray

import pycodesign
from pycodesign import _core, ops
from pycodesign.reference import growth

Array = NDArray[Any]

FLOATS = ("float16", "float32", "float64")
ISAS = _core.supported_isas()
COPIED = ("int8", "uint8", "bool", "int16", "int32", "uint32", "int64", "complex64")
SIZES = (0, 1, 3, 4, 5, 15, 16, 17, 63, 66)
INNER = ((), (1,), (2,), (3, 3))
KINDS = ("arbitrary", "tiles", "runs", "no columns")


def make_weight(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 10 if dtype in FLOATS else rng.integers(0, 100, shape)).astype(dtype)


def make_map(old: int, new: int, kind: str, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    if old == 0:
        return np.full(new, -1)
    if kind == "tiles":
        return np.arange(new) % old
    if kind == "runs":  # rising runs, some of them zeros, on average longer than what is copied element by element
        starts = np.sort(rng.integers(0, new + 1, new // 40 + 1))
        shifts = np.cumsum(np.bincount(starts, minlength=new + 1)[:new]) * 5
        runs = (np.arange(new) + shifts) % (old + 40)
        return np.where(runs < old, runs, -1)
    return rng.integers(-1, old, new)


def make_scales(shape: tuple[int, ...], dtype: str, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    wide = "float64" if dtype == "float64" else "float32"
    scales = {"out_scale": rng.standard_normal(shape[0]).astype(wide)}
    return scales | ({"in_scale": rng.standard_normal(shape[1]).astype(wide)} if len(shape) > 1 else {})


def assert_same(got: Any, expected: Any) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    np.testing.assert_array_equal(got, expected)


def place(array: Array, layout: str) -> Array:
    """Return an equal array that lies elsewhere."""
    options = LAYOUTS[layout]
    if order := options.get("order"):
        options = options | {"order": tuple(axis for axis in order if axis < array.ndim)}
    if steps := options.get("steps"):
        options = options | {"steps": steps[: array.ndim]}
    _, view = guarded(array.shape, array.dtype.name, **options)
    view[...] = array
    return view


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "scaled"), [*((dtype, True) for dtype in FLOATS), *((dtype, False) for dtype in FLOATS + COPIED)]
)
def test_edge_sizes(dtype: str, scaled: bool, kind: str) -> None:
    def expand(*arguments: Array | None, **scales: Array) -> Array:
        results = []
        for threads, isa in ((1, "scalar"), (1, ISAS[-1]), (3, ISAS[-1])):
            pycodesign.set_num_threads(threads)
            pycodesign.set_isa(isa)
            results.append(ops.expand(*arguments, **scales))
        assert_same(results[1], results[0])
        assert_same(results[2], results[0])
        return results[0]

    check_sizes(expand, dtype, scaled, kind)


def check_sizes(expand: Callable[..., Array], dtype: str, scaled: bool, kind: str, sizes: Any = SIZES) -> None:
    for seed, ((old, new), inner) in enumerate(product(pairwise(sizes), INNER)):
        w = make_weight((new, old, *inner), dtype, seed)
        rows = make_map(new, 2 * old + 1, kind, seed)
        columns = None if kind == "no columns" else make_map(old, new + 20, kind, seed + 1)
        scales = make_scales((len(rows), old if columns is None else len(columns)), dtype, seed) if scaled else {}
        assert_same(expand(w, rows, columns, **scales), growth.expand(w, rows, columns, **scales))


@pytest.mark.parametrize("dtype", FLOATS + COPIED)
def test_vectors(dtype: str) -> None:
    check_vectors(ops.expand, dtype)


def check_vectors(expand: Callable[..., Array], dtype: str) -> None:
    for old, new in pairwise(SIZES):
        w, index = make_weight((old,), dtype), make_map(old, new, "arbitrary")
        scales = make_scales((new,), dtype) if dtype in FLOATS else {}
        assert_same(expand(w, index), growth.expand(w, index))
        assert_same(expand(w, index, **scales), growth.expand(w, index, **scales))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8"])
def test_layouts(dtype: str, layout: str) -> None:
    for inner, kind in product(INNER, KINDS):
        w = make_weight((9, 70, *inner), dtype)
        rows = make_map(9, 21, kind)
        columns = None if kind == "no columns" else make_map(70, 131, kind)
        expected = growth.expand(w, rows, columns)
        strided = place(w, layout)
        assert_same(ops.expand(strided, rows, columns), expected)
        buffer, flat = guarded((len(rows), math.prod(expected.shape[1:])), dtype)
        out = flat.reshape(expected.shape)
        assert np.shares_memory(out, flat)
        assert ops.expand(strided, rows, columns, out=out) is out
        assert_same(out, expected)
        assert_guards_untouched(buffer, flat)


@pytest.mark.parametrize(
    ("dtype", "scaled"), [*product((*FLOATS, "bfloat16"), (True, False)), ("int8", False), ("int16", False)]
)
@pytest.mark.parametrize(("kind", "width"), [("arbitrary", 1537), ("arbitrary", 1600), ("tiles", 1537)])
def test_results_beyond_the_caches(dtype: str, scaled: bool, kind: str, width: int) -> None:
    # Rows of 1537 elements begin anywhere in a cache line, those of 1600 at one, and are written in blocks; the result
    # goes past the caches on most processors.
    size = 1 if dtype == "int8" else getattr(torch, dtype).itemsize
    count = width * (min(_core.cache_sizes()["l3"], 48 << 20) // 2 // width // size + 7)
    old, new = (500, 700), (count // width, width)
    w = torch.from_numpy(make_weight(old, "float64")).to(getattr(torch, dtype))
    rows, columns = (torch.from_numpy(make_map(o, n, kind)) for o, n in zip(old, new, strict=True))
    wide = w.double() if dtype == "float64" else w.float()
    scales = {name: torch.from_numpy(s) for name, s in make_scales(new, dtype).items()} if scaled else {}
    expected = wide[rows][:, columns]
    if scaled:
        expected = expected * scales["in_scale"] * scales["out_scale"][:, None]
    expected[rows < 0], expected[:, columns < 0] = 0, 0
    got = ops.expand(w, rows, columns, **scales)
    assert got.dtype == w.dtype and torch.equal(got, expected.to(w.dtype))
    buffer, view = guarded(new, "int16" if dtype == "bfloat16" else dtype)
    out = torch.from_numpy(view).view(w.dtype)
    for threads, isa in ((1, "scalar"), (1, ISAS[-1]), (2, ISAS[-1]), (3, ISAS[-1])):
        pycodesign.set_num_threads(threads)
        pycodesign.set_isa(isa)
        out.zero_()
        ops.expand(w, rows, columns, **scales, out=out)
        assert torch.equal(out, got)
    assert_guards_untouched(buffer, view)


@given(st.data())
def test_any_expansion(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4)))
    dtype = data.draw(st.sampled_from(FLOATS + COPIED))
    w = make_weight(shape, dtype, data.draw(st.integers(0, 99)))
    w = w[tuple(slice(None, None, data.draw(st.sampled_from([1, 2, -1]))) for _ in shape)]
    indices = [np.array(data.draw(st.lists(st.integers(-1, size - 1), max_size=9)), int) for size in w.shape[:2]]
    if len(indices) > 1 and data.draw(st.booleans()):
        indices[1:] = []
    sizes = (len(indices[0]), *(map(len, indices[1:]) if len(indices) > 1 else w.shape[1:2]))
    scales = make_scales(sizes, dtype) if dtype in FLOATS and data.draw(st.booleans()) else {}
    assert_same(ops.expand(w, *indices, **scales), growth.expand(w, *indices, **scales))


ALL_16_BITS = np.arange(65536, dtype=np.uint16).view(np.int16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_float_passes_through_float32(dtype: torch.dtype) -> None:
    w = torch.from_numpy(ALL_16_BITS.copy()).view(dtype)
    one, index = torch.ones(65536), torch.arange(65536)
    y = ops.expand(w, index, out_scale=one)
    assert torch.equal(y.isnan(), w.isnan())
    assert torch.equal(y.view(torch.int16)[~w.isnan()], w.view(torch.int16)[~w.isnan()])
    assert torch.equal(ops.expand(w, index).view(torch.int16), w.view(torch.int16))  # copied: NaNs, too


@pytest.mark.parametrize("scale", ["in_scale", "out_scale"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_instruction_set_rounds_to_the_same_16_bits(dtype: torch.dtype, scale: str) -> None:
    w = torch.from_numpy(ALL_16_BITS.copy()).view(dtype).view(256, 256)
    factors = torch.linspace(-3, 3, 256)
    bits = []
    for isa in ISAS:
        pycodesign.set_isa(isa)
        bits.append(ops.expand(w, np.arange(256), **{scale: factors}).view(torch.int16))
        assert torch.equal(bits[-1], bits[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_16_bits_is_torchs(dtype: torch.dtype) -> None:
    # Products on and beside every boundary between two 16-bit floats: ties, subnormals, overflow.
    floats = torch.from_numpy(ALL_16_BITS.copy()).view(dtype).float()
    floats = floats[floats.isfinite() & (floats != 0)]
    for factor in (1 + 2.0**-11, 1 + 2.0**-12, 1 + 2.0**-9, 1 - 2.0**-10, 0.5, 2.0**-9, 3.0, 1 / 3):
        scale = torch.full((len(floats),), factor)
        got = ops.expand(floats.to(dtype), torch.arange(len(floats)), out_scale=scale)
        assert torch.equal(got.view(torch.int16), (floats * scale).to(dtype).view(torch.int16))


def test_kinds() -> None:
    w = make_weight((3, 4), "float32")
    index, scale = np.array([0, 2, -1]), np.ones(4, np.float32)
    expected = growth.expand(w, index)
    tensor = ops.expand(torch.from_numpy(w).requires_grad_(), torch.from_numpy(index), in_scale=torch.from_numpy(scale))
    assert isinstance(tensor, torch.Tensor) and not tensor.requires_grad
    assert_same(tensor.numpy(), expected)
    for dtype in ("int8", "int32", "uint8", "uint64"):
        assert_same(ops.expand(w, np.array([0, 2], dtype), in_scale=scale), expected[:2])
    eight = torch.arange(-5.0, 5).to(torch.float8_e4m3fn)
    assert ops.expand(eight, np.arange(9, -1, -1)).float().tolist() == eight.float().tolist()[::-1]
    brain = ops.expand(w.astype(ml_dtypes.bfloat16), index, in_scale=scale)
    assert_same(brain, expected.astype(ml_dtypes.bfloat16))
    out = np.full((6, 4), 7, np.float32)
    ops.expand(w, index, out=out[::2])
    assert_same(out[::2], expected)
    assert (out[1::2] == 7).all()


def test_not_a_number_is_copied_and_index_minus_one_is_zero() -> None:
    w = np.array([[np.nan, np.inf], [-0.0, 1.0]], np.float32)
    y = ops.expand(w, np.array([0, 1, -1]), np.array([0, -1, 1]), out_scale=np.ones(3, np.float32))
    np.testing.assert_array_equal(y, [[np.nan, 0, np.inf], [-0.0, 0, 1], [0, 0, 0]])
    assert np.signbit(y[1, 0])


def test_calls_from_several_threads() -> None:
    pycodesign.set_num_threads(2)
    cases = [(make_weight((40, 50), "float32", i), make_map(40, 300, "arbitrary", i)) for i in range(8)]
    expected = [w[rows] * (rows >= 0)[:, None] for w, rows in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(lambda case: ops.expand(*case), cases), expected, strict=True):
                np.testing.assert_array_equal(got, want)


W, W4, V, I2, F = np.ones((3, 4), "f4"), np.ones((3, 4, 2, 2), "f4"), np.ones(3, "f4"), np.array([0, 1]), np.float32
NUMBERS = "w: expected numbers of 1, 2, 4 or 8 bytes in native order"
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "list": (lambda: ops.expand([1, 2], I2), TypeError, "w: expected a NumPy array or a torch tensor, got list"),
    "no dimension": (lambda: ops.expand(np.ones(()), I2), ValueError, "w: expected 1 to 4 dimensions, got shape ()"),
    "five dimensions": (
        lambda: ops.expand(np.ones((1, 1, 1, 1, 1)), I2),
        ValueError,
        "w: expected 1 to 4 dimensions, got shape (1, 1, 1, 1, 1)",
    ),
    "16-byte elements": (
        lambda: ops.expand(np.ones((3, 4), complex), I2),
        TypeError,
        f"{NUMBERS}, got complex128 (3, 4)",
    ),
    "byte order": (
        lambda: ops.expand(W.astype(">f4"), I2),
        TypeError,
        f"{NUMBERS}, got >f4 (3, 4)",
    ),
    "objects": (lambda: ops.expand(np.array([[None]]), I2), TypeError, f"{NUMBERS}, got object (1, 1)"),
    "index beyond": (lambda: ops.expand(W, I2 + 2), ValueError, "out_index: expected indices from -1 to 2, got 3"),
    "index below": (lambda: ops.expand(W, I2, I2 - 2), ValueError, "in_index: expected indices from -1 to 3, got -2"),
    "index of a vector": (lambda: ops.expand(V, I2 + 2), ValueError, "out_index: expected indices from -1 to 2, got 3"),
    "float index": (lambda: ops.expand(W, V), TypeError, "out_index: expected integers (n,), got float32 (3,)"),
    "bool index": (
        lambda: ops.expand(W, np.array([True])),
        TypeError,
        "out_index: expected integers (n,), got bool (1,)",
    ),
    "index matrix": (
        lambda: ops.expand(W, I2[None]),
        ValueError,
        "out_index: expected integers (n,), got int64 (1, 2)",
    ),
    "columns of a vector": (
        lambda: ops.expand(V, I2, I2),
        ValueError,
        "in_index, in_scale: expected None for w (3,), got an array",
    ),
    "scale size": (
        lambda: ops.expand(W, I2, in_scale=V),
        ValueError,
        "in_scale: expected float32 (4,), got float32 (3,)",
    ),
    "scale of a vector": (
        lambda: ops.expand(V, I2, out_scale=V),
        ValueError,
        "out_scale: expected float32 (2,), got float32 (3,)",
    ),
    "scale dtype": (
        lambda: ops.expand(W, I2, out_scale=np.ones(2)),
        TypeError,
        "out_scale: expected float32 (2,), got float64 (2,)",
    ),
    "scale of float16": (
        lambda: ops.expand(W.astype("f2"), I2, out_scale=np.ones(2, "f2")),
        TypeError,
        "out_scale: expected float32 (2,), got float16 (2,)",
    ),
    "infinite scale": (
        lambda: ops.expand(W, I2, out_scale=np.array([1, np.inf], F)),
        ValueError,
        "out_scale: expected finite values, got inf",
    ),
    "scaled integers": (
        lambda: ops.expand(W.astype(np.int8), I2, out_scale=np.ones(2, F)),
        ValueError,
        "out_scale: expected None for w of int8, got float32 (2,)",
    ),
}
OUTPUTS: dict[str, tuple[Callable[[], Array], type[Exception], str]] = {
    "shape": (lambda: np.ones((2, 3), F), ValueError, "out: expected float32 (2, 4), got float32 (2, 3)"),
    "dtype": (lambda: np.ones((2, 4)), TypeError, "out: expected float32 (2, 4), got float64 (2, 4)"),
    "columns apart": (
        lambda: np.ones((2, 8), F)[:, ::2],
        ValueError,
        "out: expected rows whose elements follow one another, got other strides",
    ),
    "broadcast": (
        lambda: np.broadcast_to(np.ones(4, F), (2, 4)),
        ValueError,
        "out: expected a writeable array, got a read-only or broadcast one",
    ),
    "rows in each other": (
        lambda: np.lib.stride_tricks.as_strided(np.ones(9, F), (2, 4), (8, 4)),
        ValueError,
        "out: expected rows apart from one another, got rows that overlap",
    ),
    "w": (lambda: W[1:], ValueError, "out: expected memory apart from w, got an array that overlaps it"),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.parametrize(("make", "error", "message"), OUTPUTS.values(), ids=OUTPUTS)
def test_bad_outputs(make: Callable[[], Array], error: type[Exception], message: str) -> None:
    out = make()
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        ops.expand(W, I2, out_scale=np.full(2, 3, F), out=out)
    assert (out == 1).all()


def test_bad_tensors() -> None:
    w = torch.ones(3, 4, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=re.escape("out: expected bfloat16 (2, 4), got int16 (2, 4)")):
        ops.expand(w, I2, out=torch.ones(2, 4, dtype=torch.int16))
    with pytest.raises(TypeError, match=re.escape("out_scale: expected float32 (2,), got float64 (2,)")):
        ops.expand(w, I2, out_scale=torch.ones(2, dtype=torch.float64))
    with pytest.raises(TypeError, match="w: expected an array in host memory"):
        ops.expand(torch.ones(3, 4, device="meta"), I2)
    scale = torch.ones(2)
    with pytest.raises(ValueError, match="out: expected memory apart from out_scale"):
        ops.expand(torch.ones(3, 1), I2, out_scale=scale, out=scale[:, None])


def test_native_module_checks_what_it_is_given() -> None:
    rows, columns = np.array([0, 9]), np.array([0, -2])
    for arguments in ((W, rows, None), (W, I2, columns), (W, I2.astype(np.int32), None)):
        with pytest.raises((TypeError, ValueError), match="expected i"):
            _core.expand(arguments[0], "float32", *arguments[1:], None, None, None)
    with pytest.raises(TypeError, match="in_scale: expected float32"):
        _core.expand(W, "float32", I2, None, np.ones(4), None, None)


@pytest.mark.parametrize("scale", [-1.0, -0.0])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_missing_elements_are_positive_zeros(dtype: str, rows: int, scale: float) -> None:
    w, index = np.ones((rows, 3), dtype), np.array([0, -1, 2, -1, -1] * 9)
    kind = np.float64 if dtype == "float64" else np.float32
    scales = np.full(rows, scale, kind), np.full(len(index), scale, kind)
    for out_scale, in_scale in ((None, scales[1]), (scales[0], None), scales):
        result = ops.expand(w, np.arange(rows), index, out_scale=out_scale, in_scale=in_scale)
        missing = result[:, index < 0]
        assert not missing.any() and not np.signbit(missing).any()
