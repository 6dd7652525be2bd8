"""`ops.expand` on a GPU: what test_growth.py checks on the CPU, layouts of memory, and what is refused."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_growth import (
    ALL_16_BITS,
    COPIED,
    FLOATS,
    KINDS,
    assert_same,
    check_sizes,
    check_vectors,
    make_map,
    make_scales,
    make_weight,
)

import pycodesign
from pycodesign import _device, ops
from pycodesign.reference import growth

Array = NDArray[Any]

DTYPES = ("int8", "float16", "int16", "float32", "int32", "float64", "complex64")


def expander(gpu: Any) -> Callable[..., Array]:
    def expand(w: Array, *indices: Array | None, **scales: Array) -> Array:
        arrays = {name: gpu.put(scale) for name, scale in scales.items()}
        return gpu.get(ops.expand(gpu.put(w), *map(gpu.put, indices), **arrays))

    return expand


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "scaled"), [*((dtype, True) for dtype in FLOATS), *((dtype, False) for dtype in DTYPES)]
)
def test_edge_sizes(gpu: Any, dtype: str, scaled: bool, kind: str) -> None:
    check_sizes(expander(gpu), dtype, scaled, kind, (0, 1, 5, 16, 31, 33, 67))


@pytest.mark.parametrize("dtype", FLOATS + COPIED)
def test_vectors(gpu: Any, dtype: str) -> None:
    check_vectors(expander(gpu), dtype)


@pytest.mark.parametrize("shape", [(300, 1031), (2000, 3), (3, 9000), (131, 96, 3, 3)])
def test_many_blocks(gpu: Any, shape: tuple[int, ...]) -> None:
    w = make_weight((40, 70, *shape[2:]), "float32")
    for kind in KINDS[:2]:
        indices = make_map(40, shape[0], kind), make_map(70, shape[1], kind)
        scales = make_scales(shape, "float32")
        assert_same(expander(gpu)(w, *indices, **scales), growth.expand(w, *indices, **scales))


VIEWS: dict[str, Callable[[Any], Any]] = {  # of (20, 150, 6, 4) that give (9, 70, ...)
    "inside": lambda a: a[1:10, 3:73],
    "every second": lambda a: a[:18:2, 1:140:2, ::2, 1::2],
    "images apart": lambda a: a[1:10, 3:73, 2:5, 1:],
    "odd start": lambda a: a[1:10, 3:73, :, 3],
    "one row after the other": lambda a: a.reshape(20, -1)[2:11, 5:75],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8"])
def test_layouts(gpu: Any, dtype: str, view: str) -> None:
    whole = np.random.default_rng(0).integers(0, 100, (20, 150, 6, 4)).astype(dtype)
    for kind in KINDS[:3]:
        rows, columns = make_map(9, 21, kind), make_map(70, 41, kind)
        expected = growth.expand(VIEWS[view](whole), rows, columns)
        got = ops.expand(VIEWS[view](gpu.put(whole)), gpu.put(rows), gpu.put(columns))
        assert_same(gpu.get(got), expected)


@pytest.mark.parametrize(("before", "behind"), [(0, 0), (1, 0), (3, 5), (8, 8), (2, 1)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8"])
def test_outputs_within_larger_arrays(gpu: Any, dtype: str, before: int, behind: int) -> None:
    w, rows, columns = make_weight((9, 70), dtype), make_map(9, 45, "arbitrary"), make_map(70, 131, "runs")
    padded = np.full((47, before + 131 + behind), 7, dtype)
    place = gpu.put(padded.copy())
    out = place[1:46, before : before + 131]
    assert ops.expand(gpu.put(w), gpu.put(rows), gpu.put(columns), out=out) is out
    padded[1:46, before : before + 131] = growth.expand(w, rows, columns)
    assert_same(gpu.get(place), padded)


@pytest.mark.parametrize("dtype", FLOATS)
def test_missing_elements_are_zero_whatever_the_scale(gpu: Any, dtype: str) -> None:
    w, rows, columns = make_weight((2, 3), dtype), np.array([0, -1]), np.array([0, -1, 2, -1])
    wide = np.dtype(np.float64 if dtype == "float64" else np.float32)
    for in_scale, out_scale in (((1, np.inf, np.inf, np.nan), (2, 3)), ((1, 2, 3, 4), (np.inf, np.nan))):
        scales = {"in_scale": np.array(in_scale, wide), "out_scale": np.array(out_scale, wide)}
        got = expander(gpu)(w, rows, columns, **scales)
        assert_same(got, growth.expand(w, rows, columns, **scales))
        assert not got[1].any() and not got[:, 1::2].any()


def test_every_16_bit_float(gpu: Any) -> None:
    index = np.arange(65536)
    for dtype in (torch.float16, torch.bfloat16) if gpu.kind == "torch" else (np.float16,):
        if gpu.kind == "torch":
            w = torch.from_numpy(ALL_16_BITS.copy()).view(dtype)
            on_gpu, is_nan = gpu.put(w), w.isnan().numpy()
        else:
            on_gpu, is_nan = gpu.put(ALL_16_BITS.view(dtype)), np.isnan(ALL_16_BITS.view(dtype))
        for factor in (1.0, 1 + 2.0**-11, 1 + 2.0**-9, 2.0**-9, 3.0, 1 / 3):
            scale = np.full(65536, factor, np.float32)
            y = ops.expand(on_gpu, gpu.put(index), out_scale=gpu.put(scale))
            got = y.view(torch.int16).cpu().numpy() if gpu.kind == "torch" else gpu.get(y).view(np.int16)
            expected = ops.expand(w if gpu.kind == "torch" else ALL_16_BITS.view(dtype), index, out_scale=scale)
            bits = expected.view(torch.int16).numpy() if gpu.kind == "torch" else expected.view(np.int16)
            np.testing.assert_array_equal(got[~is_nan], bits[~is_nan])
            assert gpu.kind != "torch" or bool(y.isnan().cpu().numpy()[is_nan].all())


def test_indices_and_scales_in_host_memory(gpu: Any) -> None:
    w, rows, scale = make_weight((3, 4), "float32"), np.array([2, -1, 0]), np.array([1, 2, 3], np.float32)
    y = ops.expand(gpu.put(w), rows, np.array([0, 3], np.int32), out_scale=scale)
    assert_same(gpu.get(y), growth.expand(w, rows, np.array([0, 3]), out_scale=scale))
    if gpu.kind == "cupy" or not gpu.is_emulated:
        with pytest.raises(ValueError, match="out_index: expected indices from -1 to 2, got 3"):
            ops.expand(gpu.put(w), np.array([3]))


def test_indices_out_of_range_on_the_gpu_write_zeros(gpu: Any) -> None:
    w = make_weight((3, 4), "float32")
    y = ops.expand(gpu.put(w), gpu.put(np.array([0, 3, 1 << 40, -7])), gpu.put(np.array([4, 1, -2])))
    expected = np.zeros((4, 3), np.float32)
    expected[0, 1] = w[0, 1]
    assert_same(gpu.get(y), expected)


def test_bad_arguments(gpu: Any) -> None:
    w, index = np.ones((3, 4), np.float32), np.array([0, 1])
    on_gpu = gpu.put(w)
    for arguments, error, message in (
        ((gpu.put(np.ones((3, 4), complex)), index), TypeError, "w: expected numbers of 1, 2, 4 or 8 bytes"),
        ((gpu.put(np.ones((1, 1, 1, 1, 1))), index), ValueError, "w: expected 1 to 4 dimensions, got shape"),
        ((on_gpu, gpu.put(np.ones(3))), TypeError, "out_index: expected integers (n,), got float64 (3,)"),
        ((on_gpu, gpu.put(index[None])), ValueError, "out_index: expected integers (n,), got int64 (1, 2)"),
        ((gpu.put(np.ones(3)), index, index), ValueError, "in_index, in_scale: expected None for w (3,), got an array"),
    ):
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            ops.expand(*arguments)
    for scale, error, message in (
        (np.ones(3, np.float32), ValueError, "out_scale: expected float32 (2,), got float32 (3,)"),
        (np.ones(2), TypeError, "out_scale: expected float32 (2,), got float64 (2,)"),
    ):
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            ops.expand(on_gpu, index, out_scale=gpu.put(scale))
    outputs: list[tuple[Array, type[Exception], str]] = [
        (np.ones((2, 3), np.float32), ValueError, "out: expected float32 (2, 4), got float32 (2, 3)"),
        (np.ones((2, 4)), TypeError, "out: expected float32 (2, 4), got float64 (2, 4)"),
    ]
    for out, error, message in outputs:
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            ops.expand(on_gpu, index, out=gpu.put(out))
    with pytest.raises(ValueError, match=r"^out: expected memory apart from w, got an array that overlaps it$"):
        ops.expand(on_gpu, index, out=on_gpu[1:])
    with pytest.raises(ValueError, match=r"^out: expected rows whose elements follow one another"):
        ops.expand(on_gpu, index, out=gpu.put(np.ones((2, 8), np.float32))[:, ::2])
    if gpu.kind == "cupy":
        with pytest.raises(TypeError, match=r"^out: expected a CuPy array on device 0, as w is, got ndarray in host"):
            ops.expand(on_gpu, index, out=np.ones((2, 4), np.float32))


def test_what_is_missing_is_said(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device.load_native(), "absence", lambda: "no CUDA driver: install it")
    with pytest.raises(RuntimeError, match=r"^no CUDA driver: install it$"):
        ops.expand(gpu.put(np.ones((3, 4))), np.array([0]))
    monkeypatch.setitem(sys.modules, "pycodesign._cuda", None)
    monkeypatch.delattr(pycodesign, "_cuda")
    with pytest.raises(RuntimeError, match=r"^no CUDA kernels: pycodesign was built without nvcc; build it again"):
        ops.expand(gpu.put(np.ones((3, 4))), np.array([0]))


def test_tensors_that_numpy_does_not_have(gpu: Any) -> None:
    if gpu.kind != "torch":
        pytest.skip("they are torch's")
    index = np.arange(9, -1, -1)
    eight = torch.arange(-5.0, 5).to(torch.float8_e4m3fn)
    y = ops.expand(gpu.put(eight), gpu.put(index))
    assert y.dtype == eight.dtype and y.float().tolist() == eight.float().tolist()[::-1]
    with pytest.raises(ValueError, match=r"^out_scale: expected None for w of float8_e4m3fn, got float32 \(10,\)$"):
        ops.expand(gpu.put(eight), gpu.put(index), out_scale=gpu.put(np.ones(10, np.float32)))
    learned = gpu.put(torch.ones(3, 4)).requires_grad_()
    assert not ops.expand(learned, gpu.put(np.array([0, 2, -1]))).requires_grad
