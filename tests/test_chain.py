"""Whole chains give the bits of their steps run one at a time, on every instruction set and thread count."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from chains import NETWORKS, Array, Network, check_chain, each_algorithm, each_dtype, make_inputs
from conftest import ALGORITHMS, INPUT_DTYPES, ISAS
from hypothesis import given, settings
from hypothesis import strategies as st

import pycodesign

SIZES = [  # images, height, width: one pixel, fewer than lanes, primes, fewer rows than threads
    (1, (1, 1)), (3, (1, 1)), (1, (1, 3)), (2, (2, 5)), (1, (7, 1)), (2, (7, 7)), (5, (5, 6)), (1, (3, 16)),
    (1, (17, 4)), (2, (13, 11)), (1, (2, 37)), (1, (31, 33)),
]  # fmt: skip


def each_network(test: Callable[..., None]) -> Callable[..., None]:
    test = pytest.mark.parametrize("dtype", INPUT_DTYPES)(test)
    test = pytest.mark.parametrize("algorithm", ALGORITHMS["conv2d"])(test)
    return pytest.mark.parametrize("name", NETWORKS)(test)


@each_network
def test_network(name: str, algorithm: str, dtype: str) -> None:
    n, outputs, lifted = NETWORKS[name](dtype, algorithm)
    for index, (images, size) in enumerate(SIZES):
        if name in ("smaller maps", "residual blocks that end in rows") and min(size) < 5:  # nothing is left
            continue
        if index % 3 == len(name) % 3 or index in (3, 9):
            check_chain(n, make_inputs(n, images, size), outputs, lifted)


@each_dtype
@each_algorithm
def test_bands_of_rows(algorithm: str, dtype: str) -> None:
    """Maps so large that threads take rows of them, and read some that others have computed."""
    n = Network(dtype, algorithm)
    x = n.conv2d(n.input(4), 18)
    y = n.conv2d(x, 18, 5, clamp=(0, None))
    z = n.conv2d(y, 18, added=x)
    w = n.conv2d(n.add(z, clamp=(0, None)), 18, dilation=3, padding=3)
    output = n.conv2d(n.conv2d(w, 18, 1), 3, (1, 3))
    inside = set(range(x, output))
    check_chain(n, make_inputs(n, 1, (97, 41)), (output,), inside, ISAS, (2, 3), check=False)
    check_chain(n, make_inputs(n, 2, (50, 31)), (output,), inside, ISAS[-1:], (3, 7), check=False)
    check_chain(n, make_inputs(n, 5, (23, 14)), (output,), inside, ISAS[-1:], (3,))  # bands of images


@each_dtype
@each_algorithm
def test_strides_that_keep_the_size(algorithm: str, dtype: str) -> None:
    for size, padding in ((1, 1), (3, 2), (5, 3)):
        n = Network(dtype, algorithm)
        first = n.conv2d(n.input(3), 6)
        strided = n.conv2d(first, 6, stride=2, padding=padding)
        check_chain(n, make_inputs(n, 2, (size, size)), (n.conv2d(strided, 3),), {strided}, ISAS, (1, 3))


@pytest.mark.parametrize(("algorithm", "dtype"), [("codegen", "float32"), ("codegen", "uint8"), ("dense", "int8")])
def test_bands_that_fit_the_cache(algorithm: str, dtype: str) -> None:
    """More staged bytes than the second-level cache, on one thread too."""
    n = Network(dtype, algorithm)
    x = n.conv2d(n.input(1), 68)  # too few for the last lanes of outputs
    y = n.conv2d(x, 68)
    z = n.conv2d(y, 2, added=n.conv2d(y, 2))
    check_chain(n, make_inputs(n, 1, (112, 120)), (z,), {x, y}, ISAS[-1:], (1, 3), check=False)


@st.composite
def networks(draw: st.DrawFn) -> tuple[Network, list[Array], tuple[int, ...]]:
    """Steps of any kind and geometry, that may read any value made before."""
    small = partial(st.integers, 1)
    pair = st.tuples(small(3), small(3))
    n = Network()
    shapes: list[tuple[int, ...]] = []
    for _ in range(draw(small(2))):
        n.input(draw(small(6)), draw(st.sampled_from(INPUT_DTYPES)))
    images, size = draw(small(3)), draw(st.tuples(small(20), small(20)))
    shapes += [(images, n.channels[i], *size) for i in range(n.inputs)]
    for _ in range(draw(small(7))):
        maps = [i for i, shape in enumerate(shapes) if len(shape) == 4]
        x = draw(st.sampled_from(maps[-3:]))
        _, channels, *pixels = shapes[x]
        dtype = draw(st.sampled_from(INPUT_DTYPES))
        kind = draw(st.sampled_from(["same", "same", "same", "conv2d", "add", "max_pool2d", "avg_pool2d", "linear"]))
        options: dict[str, Any] = {"dtype": dtype}
        if kind in ("same", "add", "conv2d"):
            options["clamp"] = draw(st.sampled_from([None, (0, None), (-1, 1.5)]))
        algorithm = draw(st.sampled_from(ALGORITHMS["linear" if kind == "linear" else "conv2d"]))
        if kind in ("same", "conv2d"):
            groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
            outputs = groups * draw(small(4))
            if kind == "same":
                radius, dilation = draw(st.tuples(*[st.integers(0, 2)] * 2)), draw(pair)
                kernel = tuple(2 * r + 1 for r in radius)
                geometry = {
                    "dilation": dilation,
                    "padding": tuple(r * d for r, d in zip(radius, dilation, strict=True)),
                }
                made = pixels
            else:
                kernel, stride, padding = draw(pair), draw(pair), draw(st.tuples(*[st.integers(0, 3)] * 2))
                geometry = {"stride": stride, "padding": padding}
                made = [(p + 2 * m - k) // s + 1 for p, m, k, s in zip(pixels, padding, kernel, stride, strict=True)]
            if min(made) < 1:
                continue
            shape = (images, outputs, *made)
            residuals = [i for i, other in enumerate(shapes) if other == shape]
            added = draw(st.sampled_from([None, *residuals]))
            n.conv2d(x, outputs, kernel, added, groups=groups, algorithm=algorithm, **geometry, **options)
        elif kind == "add":
            shape = shapes[x]
            n.add(x, draw(st.sampled_from([None, *(i for i, other in enumerate(shapes) if other == shape)])), **options)
        elif kind == "linear":
            shape = (images, draw(small(20)))
            n.linear(x, math.prod(shapes[x][1:]), shape[1], algorithm=algorithm, **options)
        else:
            kernel, stride = draw(pair), draw(pair)
            padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
            made = [(p + 2 * m - k) // s + 1 for p, m, k, s in zip(pixels, padding, kernel, stride, strict=True)]
            if min(made) < 1:
                continue
            shape = (images, channels, *made)
            windows = {"kernel_size": kernel, "stride": stride, "padding": padding}
            if kind == "max_pool2d":
                n.max_pool2d(x, **windows)
            else:
                n.avg_pool2d(x, **windows, **options, count_include_pad=draw(st.booleans()))
        shapes.append(shape)
    if not n.steps:
        shapes.append(shapes[0])
        n.add(0)
    made_by_steps = list(range(n.inputs, len(shapes)))
    outputs = {*draw(st.sets(st.sampled_from(made_by_steps), max_size=2)), made_by_steps[-1]}
    return n, make_inputs(n, images, size), tuple(sorted(outputs))


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "avx512_amx"])
@each_dtype
def test_channels_last(dtype: str, isa: str) -> None:
    """Between layers by rows of channels, which floats have with AVX2, and bytes with VNNI; AMX has blocks instead."""
    pycodesign.set_isa(isa)
    n, outputs, _ = NETWORKS["channels last"](dtype, "dense")
    told = [layout for _, layout in n.chain(*outputs).plan((1, 3, 90, 70))]
    rows = isa in ("avx2_vnni", "avx512", "avx512_vbmi") or (dtype == "float32" and isa == "avx2")
    # A stem of floats, pooled, is a plain residual.
    plain = {0, 1, 2, 4} if dtype == "float32" else {0}
    by_rows = set(range(len(told))) - plain - {outputs[0], outputs[1], outputs[1] - 1}
    assert {index for index, layout in enumerate(told) if layout == "channels_last"} == (by_rows if rows else set())


@settings(max_examples=200)
@given(networks(), st.sampled_from(ISAS), st.sampled_from((1, 2, 3, 5)))
def test_any_network(case: tuple[Network, list[Array], tuple[int, ...]], isa: str, threads: int) -> None:
    n, inputs, outputs = case
    check_chain(n, inputs, outputs, None, [isa], (threads,))
