"""Calls of chains: layouts of memory, sizes, and many callers of one chain."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chains import F32, NETWORKS, Array, Network, check_chain, each_algorithm, each_dtype, each_isa, make_inputs
from conftest import ALGORITHMS, ISAS
from layers import LAYOUTS, assert_guards_untouched, guarded, make_input

import pycodesign
from pycodesign import ops
from pycodesign.quantize import QuantizedTensor
from pycodesign.repetition.chain import Chain

# ---- memory layouts --------------------------------------------------------------------------------------------------


def mixed_network(dtype: str, algorithm: str = "dense") -> tuple[Network, tuple[int, ...]]:
    """Every kind of step reads the input, and is an output."""
    n = Network(dtype, algorithm)
    x, other = n.input(5), n.input(5)
    a = n.conv2d(x, 5, added=other)
    b = n.conv2d(a, 5, stride=(1, 2))
    c = n.max_pool2d(x, 2)
    d = n.avg_pool2d(other, kernel_size=(2, 3), stride=1)
    e = n.add(x, other)
    f = n.linear(x, 5 * 6 * 7, 9)
    return n, (a, b, c, d, e, f)


MIRRORED: dict[str, dict[str, Any]] = {  # contiguous but for one axis
    f"mirrored axis {axis}": {"steps": tuple(-1 if i == axis else 1 for i in range(4)), "spare": 0} for axis in range(4)
}


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS | MIRRORED)
def test_input_layouts(layout: str, dtype: str) -> None:
    for algorithm in ALGORITHMS["conv2d"]:
        n, outputs = mixed_network(dtype, algorithm)
        plain = make_inputs(n, 2, (6, 7))
        strided = []
        for array in plain:
            _, view = guarded(array.shape, dtype, **(LAYOUTS | MIRRORED)[layout])
            view[...] = array
            strided.append(view)
        chain = n.chain(*outputs)
        for isa in ISAS:
            pycodesign.set_isa(isa)
            for got, expected in zip(chain(*strided), chain(*plain), strict=True):
                np.testing.assert_array_equal(got, expected)
        for view, array in zip(strided, plain, strict=True):
            np.testing.assert_array_equal(view, array)
    check_chain(n, plain, outputs, None, ISAS[-1:], (3,))


def test_broadcast_read_only_and_repeated_inputs() -> None:
    n, outputs = mixed_network("float32", "codegen")
    chain = n.chain(*outputs)
    for shape in ((1, 1, 1, 1), (3, 1, 6, 7), (1, 5, 1, 7), (3, 5, 6, 1)):
        x = np.broadcast_to(make_input(shape, "float32"), (3, 5, 6, 7))
        for got, expected in zip(chain(x, x), chain(x.copy(), x.copy()), strict=True):
            np.testing.assert_array_equal(got, expected)


@each_dtype
@each_algorithm
def test_nothing_is_written_beside_out(algorithm: str, dtype: str) -> None:
    n, outputs = mixed_network(dtype, algorithm)
    inputs = make_inputs(n, 2, (6, 7))
    chain = n.chain(*outputs)
    for isa, threads in product(ISAS, (1, 3)):
        pycodesign.set_isa(isa)
        pycodesign.set_num_threads(threads)
        expected = chain(*inputs)
        buffers, out = zip(*(guarded(y.shape, y.dtype.name, spare=0) for y in expected), strict=True)
        got = chain(*inputs, out=out)
        for y, view, buffer, array in zip(got, out, buffers, expected, strict=True):
            assert y is view
            np.testing.assert_array_equal(y, array)
            assert_guards_untouched(buffer, view)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@each_dtype
@each_algorithm
@pytest.mark.parametrize(
    ("images", "size"), [(0, (6, 7)), (2, (0, 7)), (2, (6, 0)), (0, (0, 0)), (2, (1, 7)), (1, (1, 1))]
)
def test_empty(images: int, size: tuple[int, int], algorithm: str, dtype: str) -> None:
    n = Network(dtype, algorithm)
    x = n.input(3)
    a = n.conv2d(x, 4)
    b = n.conv2d(a, 4, 2, padding=0)
    c = n.max_pool2d(b, 2)
    d = n.add(n.conv2d(c, 4), c)
    e = n.avg_pool2d(d, kernel_size=3, padding=1)
    f = n.conv2d(e, 2, 1)
    pooled = tuple(max(s - 1, 0) // 2 for s in size)
    rest = ((pooled[0] + 2) // 3, (pooled[1] + 2) // 3)
    shapes = [(images, 4, *size), (images, 4, *pooled), (images, 2, *rest)]
    inputs = make_inputs(n, images, size)
    for outputs in ((a, d, f), (f,)):
        chain = n.chain(*outputs)
        got = chain(*inputs)
        assert [y.shape for y in got] == shapes[-len(outputs) :]
        again = chain(*inputs, out=[np.empty_like(y) for y in got])
        for first, second in zip(got, again, strict=True):
            np.testing.assert_array_equal(first, second)


def test_windows_of_images_without_pixels() -> None:
    chain = Chain()
    x = chain.input("uint8", scale=0.5, zero_point=7)
    largest, mean = chain.max_pool2d(x, 2, padding=1), chain.avg_pool2d(x, 2, padding=1)
    unpadded = chain.avg_pool2d(x, 2, padding=1, count_include_pad=False)
    chain.output(largest, mean, unpadded, chain.avg_pool2d(x), chain.avg_pool2d(x, out_dtype="int8", out_scale=1))
    for size in ((0, 3), (3, 0), (0, 0)):
        y = chain(np.zeros((2, 3, *size), np.uint8))
        assert (y[0] == 0).all() and (y[1] == 0).all() and np.isnan(y[2]).all() and np.isnan(y[3]).all()
        assert (y[4] == -128).all() and y[0].shape == (2, 3, size[0] // 2 + 1, size[1] // 2 + 1)


def test_more_input_sizes_than_plans_are_kept() -> None:
    n = Network("uint8", "tables")
    a = n.conv2d(n.input(3), 5)
    b = n.conv2d(a, 4, added=n.conv2d(a, 4))
    chain = n.chain(b)
    for width in (*range(1, 41), 1, 2, 40):
        inputs = make_inputs(n, 1 + width % 2, (2, width))
        np.testing.assert_array_equal(chain(*inputs)[0], n.run_alone(*inputs, check=width % 7 == 0)[b])


# ---- one chain, many callers -----------------------------------------------------------------------------------------


@each_dtype
@each_algorithm
def test_concurrent_calls(algorithm: str, dtype: str) -> None:
    n, outputs, _ = NETWORKS["residual blocks"](dtype, algorithm)
    sizes = [(1, (9, 9)), (2, (5, 12)), (1, (1, 1)), (3, (20, 7))]
    given_inputs = [make_inputs(n, *size) for size in sizes]
    expected = [n.run_alone(*inputs, check=False)[outputs[0]] for inputs in given_inputs]
    pycodesign.set_num_threads(2)
    chain = n.chain(*outputs)  # its plans are made by racing calls

    def call(i: int) -> Array:
        return chain(*given_inputs[i % len(sizes)])[0]

    with ThreadPoolExecutor(4) as threads:
        for i, y in enumerate(threads.map(call, range(80))):
            assert y.tobytes() == expected[i % len(sizes)].tobytes()


def test_settings_change_between_calls() -> None:
    n, outputs, _ = NETWORKS["residual blocks"]("uint8", "codegen")
    inputs = make_inputs(n, 1, (19, 23))
    chain = n.chain(*outputs)
    expected = n.run_alone(*inputs)[outputs[0]]
    rng = np.random.default_rng(0)
    for _ in range(100):
        pycodesign.set_isa(ISAS[rng.integers(len(ISAS))])
        pycodesign.set_num_threads(int(rng.integers(1, 6)))
        np.testing.assert_array_equal(chain(*inputs)[0], expected)


def test_a_chain_holds_on_to_its_layers() -> None:
    n, outputs, _ = NETWORKS["residual blocks"]("uint8", "codegen")
    inputs = make_inputs(n, 1, (5, 6))
    expected = n.run_alone(*inputs)[outputs[0]]
    chain = n.chain(*outputs)
    del n
    gc.collect()
    np.testing.assert_array_equal(chain(*inputs)[0], expected)


@each_isa
def test_huge_windows(isa: str) -> None:
    pycodesign.set_isa(isa)
    large = 1 << 24
    chain = Chain()
    x = chain.input("int8")
    chain.output(
        chain.max_pool2d(x, (1, large), stride=(1, large), padding=(0, large // 2)),
        chain.max_pool2d(x, 1, stride=large),
        chain.avg_pool2d(x, large, stride=large, padding=large // 2),
        chain.avg_pool2d(x, large, stride=1, padding=large // 2, count_include_pad=False),
        chain.max_pool2d(x, 2, dilation=large),
        chain.avg_pool2d(x, large),
    )
    got = chain(np.array([[1, -2, 3], [4, 5, -6]], np.int8).reshape(1, 1, 2, 3))
    assert got[0].ravel().tolist() == [3, 5] and got[1].ravel().tolist() == [1]
    np.testing.assert_array_equal(got[2], np.full((1, 1, 1, 1), F32(5) * F32(2.0**-48)))
    assert got[3].shape == (1, 1, 3, 4) and got[3][0, 0, 1, 1] == F32(5) * F32(1 / 6)
    assert got[4].size == got[5].size == 0


def test_values_too_large_for_memory() -> None:
    chain = Chain()
    x = chain.input()
    one = QuantizedTensor(np.zeros((1, 1, 1, 1), np.uint8), np.ones(1, F32), np.ones(1, F32))
    wide = chain.conv2d(x, ops.prepack_conv2d(one, padding=1 << 24))
    chain.output(chain.avg_pool2d(chain.conv2d(wide, ops.prepack_conv2d(one)), 1 << 24))
    for images in (1, 1 << 14, 1 << 40):  # the last one's sizes multiply to 2^90
        with pytest.raises(MemoryError):
            chain(np.broadcast_to(F32(0), (images, 1, 1, 1)))
        with pytest.raises(MemoryError):
            chain._native.plan([(images, 1, 1, 1)], 1)


def test_without_machine_code(tmp_path: Path) -> None:
    body = """
import warnings
warnings.simplefilter("ignore")
for dtype in INPUT_DTYPES:
    for name in ("residual blocks", "smaller maps", "classifier"):
        n, outputs, lifted = NETWORKS[name](dtype, "codegen")
        assert n.steps[0].layer.packed.explain()["algorithm"] == "tables"
        check_chain(n, make_inputs(n, 2, (11, 13)), outputs, lifted)
print("right")
"""
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom chains import *\n{body}"
    command, environment = [sys.executable, "-c", script], os.environ | {"PYCODESIGN_JIT": "0"}
    child = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert child.stdout == "right\n", child.stderr
