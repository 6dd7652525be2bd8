"""Steps of chains, each alone, against the reference.

A step alone is a chain of one: from an input to an output, never in the lanes of a layer. Of integers it equals the
reference, of floats it is within a bound, and a layer alone gives the bits of `pycodesign.ops`.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from chains import F32, Network, check_chain, each_dtype, each_isa, make_inputs
from conftest import ALGORITHMS, INPUT_DTYPES, ISAS
from layers import make_input

import pycodesign
from pycodesign.reference import repetition as reference
from pycodesign.repetition.chain import Chain

WINDOWS: dict[str, dict[str, Any]] = {
    "2": {"kernel_size": 2},
    "3, stride 2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "3, stride 1": {"kernel_size": 3, "stride": 1, "padding": 1},
    "rectangles": {"kernel_size": (3, 2), "stride": (1, 3), "padding": (1, 0)},
    "padding is half of it": {"kernel_size": (4, 2), "stride": (3, 1), "padding": (2, 1)},
    "1": {"kernel_size": 1},
    "stride beyond it": {"kernel_size": 1, "stride": (3, 4)},
    "the image": {"kernel_size": (7, 19)},
    "wide": {"kernel_size": (1, 17), "stride": 1, "padding": (0, 8)},
    "beyond the image": {"kernel_size": (9, 23), "stride": (1, 2), "padding": (4, 11)},
}


@each_dtype
@pytest.mark.parametrize("name", WINDOWS)
def test_max_pool2d(name: str, dtype: str) -> None:
    for dilation in (1, 2, (1, 3)):
        network = Network(dtype)
        x = network.input(5)
        options = WINDOWS[name] | {"dilation": dilation}
        if name == "the image" and dilation != 1:
            options |= {"kernel_size": (4, 7)}
        if name == "beyond the image" and dilation != 1:
            options |= {"kernel_size": (5, 9), "padding": (2, 4)}
        if name == "wide" and dilation != 1:
            options |= {"kernel_size": (1, 7), "padding": (0, 3)}
        y = network.max_pool2d(x, **options)
        check_chain(network, make_inputs(network, 3, (7, 19)), (y,), set())


@each_dtype
@pytest.mark.parametrize("out_dtype", ["float32", "uint8", "int8", "int32"])
@pytest.mark.parametrize("name", [*WINDOWS, "global"])
def test_avg_pool2d(name: str, out_dtype: str, dtype: str) -> None:
    if (dtype, out_dtype) == ("float32", "int32"):
        return
    for counts, clamp in product((True, False), (None, (-0.25, 1))):
        if out_dtype == "int32" and clamp:
            continue
        network = Network(dtype)
        x = network.input(5)
        y = network.avg_pool2d(x, out_dtype, **WINDOWS.get(name, {}), count_include_pad=counts, clamp=clamp)
        check_chain(network, make_inputs(network, 3, (7, 19)), (y,), set(), ISAS, (1, 3))


@each_isa
def test_means_of_large_maps(isa: str) -> None:
    """Their errors are those of a few roundings, however many pixels there are."""
    network = Network()
    mean = network.avg_pool2d(network.input(2))
    for size in ((512, 512), (1500, 1499)):
        x = 2 * np.random.default_rng(0).random((1, 2, *size), F32)
        check_chain(network, [x], (mean,), set(), [isa], (1, 2))
        np.testing.assert_allclose(network.run_alone(x)[mean], x.mean((2, 3), float, keepdims=True), rtol=3e-7)


@each_isa
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 65])
def test_pools_of_rows(size: int, isa: str) -> None:
    for dtype in INPUT_DTYPES:
        network = Network(dtype)
        x = network.input(2)
        pools = [
            network.max_pool2d(x, (1, 2), stride=stride, padding=(0, 1), dilation=(1, dilation))
            for stride, dilation in product((1, 2, 3), (1, 2))
        ]
        pools += [network.avg_pool2d(x, kernel_size=(1, 2), stride=s, padding=(0, 1)) for s in (1, 2)]
        check_chain(network, make_inputs(network, 1, (2, size)), tuple(pools), set(), [isa], (1, 2))


@pytest.mark.parametrize("a_dtype", INPUT_DTYPES)
@pytest.mark.parametrize("b_dtype", [None, *INPUT_DTYPES])
@pytest.mark.parametrize("out_dtype", ["float32", "uint8", "int8", "int32"])
def test_add(out_dtype: str, b_dtype: str | None, a_dtype: str) -> None:
    if out_dtype == "int32" and (a_dtype == "float32" or b_dtype):
        return
    clamps: list[Any] = [None] if out_dtype == "int32" else [None, (0, None), (None, 1.5), (-0.5, 0.75)]
    for clamp in clamps:
        network = Network()
        a = network.input(3, a_dtype)
        b = None if b_dtype is None else network.input(3, b_dtype)
        y = network.add(a, b, dtype=out_dtype, clamp=clamp)
        for images, size in ((1, (1, 1)), (1, (1, 5)), (2, (3, 11)), (2, (53, 67))):  # 1024 at a time
            isas = ISAS if images == 2 else ISAS[-1:]
            check_chain(network, make_inputs(network, images, size), (y,), set(), isas, (1, 3))


@pytest.mark.parametrize("algorithm", ALGORITHMS["linear"])
@each_dtype
def test_linear(dtype: str, algorithm: str) -> None:
    """Of rows, and of images that are flattened in C order."""
    for out_dtype, (images, channels, size) in product(
        ("float32", "uint8"), [(1, 7, ()), (5, 33, ()), (1, 3, (1, 1)), (3, 5, (2, 3)), (50, 2, (3, 1))]
    ):
        network = Network(dtype, algorithm)
        x = network.input(channels)
        inputs = channels * math.prod(size)
        y = network.linear(x, inputs, 67, dtype=out_dtype, clamp=(-1, None))
        z = network.linear(x, inputs, 67, y, dtype=dtype)
        check_chain(network, make_inputs(network, images, size), (z, y), set(), ISAS, (1, 3))


def test_images_may_be_rows() -> None:
    """(N, I) and (N, I, 1, 1) are the same values; an output has the dimensions of what it is made from."""
    network = Network("uint8")
    a, b = network.input(5), network.input(5)
    total = network.add(a, b, dtype="float32")
    flat = network.linear(total, 5, 4, dtype="float32")
    image = network.conv2d(total, 6, 1, dtype="float32")
    chain = network.chain(total, flat, image)
    rows, images = make_inputs(network, 3, ()), make_inputs(network, 3, (1, 1))
    for mixed in (rows, images, [rows[0], images[1]], [images[0], rows[1]]):
        got = chain(*mixed)
        assert [y.shape for y in got] == [mixed[0].shape, (3, 4), (3, 6, 1, 1)]
        for y, expected in zip(got, chain(*images), strict=True):
            np.testing.assert_array_equal(y.ravel(), expected.ravel())


@each_isa
def test_nan_and_infinity(isa: str) -> None:
    pycodesign.set_isa(isa)
    nan, inf = np.nan, np.inf
    chain = Chain()
    x = chain.input()
    largest = chain.max_pool2d(x, (1, 2), stride=1, padding=(0, 1))
    mean = chain.avg_pool2d(x, (1, 2), stride=(1, 2))
    relu = chain.add(x, clamp=(0, 6))
    integers = chain.add(x, out_dtype="int8", out_scale=0.5, out_zero_point=3)
    chain.output(largest, mean, relu, integers)
    got = chain(np.array([nan, 1, -inf, inf, inf, 2, -1, nan, 0, -5], F32).reshape(1, 1, 1, 10))
    expected = [
        [nan, nan, 1, inf, inf, inf, 2, nan, nan, 0, -5],
        [nan, nan, inf, nan, -2.5],
        [nan, 1, 0, 6, 6, 2, 0, nan, 0, 0],
        [-128, 5, -128, 127, 127, 7, 1, -128, 3, -7],
    ]
    for y, values in zip(got, expected, strict=True):
        np.testing.assert_array_equal(y.ravel(), np.array(values).astype(y.dtype))


def test_windows_that_hold_only_padding() -> None:
    network = Network("int8")
    x, y = network.input(2), Network("float32")
    largest = network.max_pool2d(x, 2, padding=1, dilation=2)  # rows -1 and 1 of one
    check_chain(network, make_inputs(network, 1, (1, 1)), (largest,))
    chain = network.chain(largest)
    np.testing.assert_array_equal(chain(np.ones((1, 2, 1, 1), np.int8))[0], np.full((1, 2, 1, 1), -128))
    largest = y.max_pool2d(y.input(2), 2, padding=1, dilation=2)
    np.testing.assert_array_equal(y.chain(largest)(np.ones((1, 2, 1, 1), F32))[0], np.full((1, 2, 1, 1), -np.inf))


@each_isa
def test_ties_round_to_even(isa: str) -> None:
    pycodesign.set_isa(isa)
    x = np.arange(-128, 128).astype(np.int8).reshape(1, 1, 16, 16)
    chain = Chain()
    value = chain.input("int8", scale=0.5)
    chain.output(
        chain.add(value, out_dtype="int8", out_scale=1), chain.avg_pool2d(value, 1, out_dtype="int8", out_scale=1)
    )
    for y in chain(x):
        np.testing.assert_array_equal(y, np.rint(x / 2).astype(np.int8))


def test_the_reference_pools_as_torch_does() -> None:
    import torch

    x = make_input((2, 3, 9, 11), "float32")
    x[0, 1, 4, 5] = np.nan
    given_x = torch.from_numpy(x)
    for kernel, stride, padding in product((2, (3, 4)), (None, 1, (2, 3)), (0, 1)):
        for dilation in (1, (2, 1)):
            expected = torch.nn.functional.max_pool2d(given_x, kernel, stride, padding, dilation)
            np.testing.assert_array_equal(reference.max_pool2d(x, kernel, stride, padding, dilation), expected)
        for counts in (True, False):
            expected = torch.nn.functional.avg_pool2d(given_x, kernel, stride, padding, count_include_pad=counts)
            got = reference.avg_pool2d(x, kernel, stride, padding, count_include_pad=counts)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(reference.avg_pool2d(x), given_x.mean((2, 3), keepdim=True), rtol=1e-5, atol=1e-6)
