"""Chains: every step against the reference, and whole chains against their steps run one at a time.

A step alone is a chain of one: from an input to an output, never in the lanes of a layer. Of integers it equals the
reference, of floats it is within a bound, and a layer alone gives the bits of `pycodesign.ops`. A whole chain gives the
bits of its steps, on every instruction set and thread count.
"""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ALGORITHMS, INPUT_DTYPES, ISAS, THREADS, to_codebook
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import BINARY, LAYOUTS, QUATERNARY, TERNARY, assert_guards_untouched, guarded, make_input
from numpy.typing import NDArray

import pycodesign
from pycodesign import ops
from pycodesign.quantize import QuantizedTensor
from pycodesign.reference import repetition as reference
from pycodesign.repetition.chain import Chain, Value

F32 = np.float32
EPS = 2.0**-23
Array = NDArray[Any]

each_isa = pytest.mark.parametrize("isa", ISAS)
each_dtype = pytest.mark.parametrize("dtype", INPUT_DTYPES)
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS["conv2d"])


@dataclass(frozen=True)
class Format:
    """How the elements of a value are to be read."""

    dtype: str
    scale: float = 1.0
    zero_point: int = 0

    def named(self, prefix: str) -> dict[str, Any]:
        return {f"{prefix}_scale": self.scale, f"{prefix}_zero_point": self.zero_point}

    def output(self) -> dict[str, Any]:
        return {"out_dtype": self.dtype} | (self.named("out") if self.dtype in ("uint8", "int8") else {})


def make_format(dtype: str, index: int) -> Format:
    """Every value has a scale and a zero point of its own."""
    if dtype == "uint8":
        return Format(dtype, 0.031 + 0.002 * index, 117 + index)
    return Format(dtype, 0.043 - 0.001 * index, -9 - index) if dtype == "int8" else Format(dtype)


@dataclass(frozen=True)
class Layer:
    q: QuantizedTensor
    bias: Array | None
    geometry: dict[str, Any]
    packed: ops.Packed


@dataclass(frozen=True)
class Step:
    """A method of `Chain`, for values by index."""

    kind: str
    x: int
    added: int | None
    options: dict[str, Any]
    layer: Layer | None = None


@dataclass
class Network:
    """Steps to be run in one chain or alone. Methods return the index of the value that they make, inputs first."""

    dtype: str = "float32"  # of values, unless said otherwise
    algorithm: str = "dense"
    formats: list[Format] = field(default_factory=list)
    channels: list[int] = field(default_factory=list)
    inputs: int = 0
    steps: list[Step] = field(default_factory=list)
    alone: dict[int, tuple[Chain, Chain | None]] = field(default_factory=dict)
    moved: set[int] = field(default_factory=set)  # lifted where bytes of residuals move between lanes and rows

    def input(self, channels: int, dtype: str | None = None) -> int:
        assert not self.steps
        self.inputs += 1
        return self._made(make_format(dtype or self.dtype, len(self.formats)), channels)

    def conv2d(
        self,
        x: int,
        outputs: int,
        kernel: int | tuple[int, int] = 3,
        added: int | None = None,
        *,
        groups: int = 1,
        levels: tuple[int, ...] = TERNARY,
        bias: bool = True,
        algorithm: str | None = None,
        dtype: str | None = None,
        clamp: Any = None,
        **geometry: Any,
    ) -> int:
        """Pad so that the size stays, unless said otherwise."""
        r, s = (kernel, kernel) if isinstance(kernel, int) else kernel
        geometry = {"padding": (r // 2, s // 2), "groups": groups} | geometry
        shape = (outputs, self.channels[x] // groups, r, s)
        layer = self._layer(x, shape, levels, bias, algorithm, geometry)
        return self._step("conv2d", x, added, outputs, {"clamp": clamp}, layer, dtype or self.dtype)

    def linear(
        self,
        x: int,
        inputs: int,
        outputs: int,
        added: int | None = None,
        *,
        levels: tuple[int, ...] = TERNARY,
        algorithm: str | None = None,
        dtype: str | None = None,
        clamp: Any = None,
    ) -> int:
        layer = self._layer(x, (outputs, inputs), levels, True, algorithm, {})
        return self._step("linear", x, added, outputs, {"clamp": clamp}, layer, dtype or self.dtype)

    def max_pool2d(self, x: int, kernel_size: Any, **options: Any) -> int:
        options = {"kernel_size": kernel_size} | options
        self.steps.append(Step("max_pool2d", x, None, options))
        return self._made(self.formats[x], self.channels[x])

    def avg_pool2d(self, x: int, dtype: str | None = None, **options: Any) -> int:
        return self._step("avg_pool2d", x, None, self.channels[x], options, None, dtype or self.dtype)

    def add(self, a: int, b: int | None = None, *, dtype: str | None = None, clamp: Any = None) -> int:
        return self._step("add", a, b, self.channels[a], {"clamp": clamp}, None, dtype or self.dtype)

    def _layer(
        self, x: int, shape: tuple[int, ...], levels: Any, bias: bool, algorithm: str | None, geometry: Any
    ) -> Layer:
        rng = np.random.default_rng(len(self.formats))
        codes = rng.integers(0, len(levels), shape, dtype=np.uint8)
        scale = rng.normal(0, 1 / math.sqrt(math.prod(shape[1:])), shape[0]).astype(F32)
        algorithm = algorithm or self.algorithm
        if algorithm == "codebook":  # few kernels
            kernels = codes.reshape(-1, math.prod(shape[2:]))[:40]
            codes = kernels[rng.integers(0, len(kernels), math.prod(shape[:2]))].reshape(shape)
        q = QuantizedTensor(codes, np.array(levels, F32), scale)
        weights: Any = to_codebook(q) if algorithm == "codebook" else q
        if weights is None:  # channels that make no patterns
            weights, algorithm = q, "dense"
        added = rng.normal(size=shape[0]).astype(F32) if bias else None
        inputs = {"input_dtype": self.formats[x].dtype} | self.formats[x].named("input")
        prepack: Any = ops.prepack_conv2d if len(shape) == 4 else ops.prepack_linear
        return Layer(q, added, geometry, prepack(weights, added, **geometry, **inputs, algorithm=algorithm))

    def _step(
        self, kind: str, x: int, added: int | None, channels: int, options: Any, layer: Layer | None, dtype: str
    ) -> int:
        made = make_format(dtype, len(self.formats))
        self.steps.append(Step(kind, x, added, options | made.output(), layer))
        return self._made(made, channels)

    def _made(self, made: Format, channels: int) -> int:
        self.formats.append(made)
        self.channels.append(channels)
        return len(self.formats) - 1

    def chain(self, *outputs: int) -> Chain:
        chain = Chain()
        values = [add_input(chain, made) for made in self.formats[: self.inputs]]
        for step in self.steps:
            values.append(add_step(chain, step, values[step.x], None if step.added is None else values[step.added]))
        for value, made in zip(values, self.formats, strict=True):
            assert (value.dtype, value.scale, value.zero_point) == (made.dtype, made.scale, made.zero_point)
        chain.output(*(values[index] for index in outputs))
        return chain

    def run_alone(self, *inputs: Array, check: bool = True) -> list[Array]:
        """Return all values, each step run alone, and compared with the reference."""
        values = list(inputs)
        for index, step in enumerate(self.steps):
            if index not in self.alone:
                chain = Chain()
                x = add_input(chain, self.formats[step.x])
                added = None if step.added is None else add_input(chain, self.formats[step.added])
                chain.output(add_step(chain, step, x, added))
                self.alone[index] = chain, None
            arrays = [values[i] for i in (step.x, step.added) if i is not None]
            (y,) = self.alone[index][0](*arrays)
            if check:
                self.check(step, y, *arrays)
            values.append(y)
        return values

    def check(self, step: Step, y: Array, x: Array, added: Array | None = None) -> None:
        options = dict(step.options)
        if added is not None:
            options |= {"residual": added, **self.formats[step.added or 0].named("residual")}
        if step.layer is not None:
            rows = x if step.kind == "conv2d" else x.reshape(x.shape[0], -1)
            run: Any = ops.conv2d if step.kind == "conv2d" else ops.linear
            np.testing.assert_array_equal(y, run(rows, step.layer.packed, **options))
        if step.kind != "max_pool2d":
            options |= self.formats[step.x].named("input")
        expected = self.expect(step, x, options)
        assert (y.shape, y.dtype) == (expected.shape, np.dtype(step.options.get("out_dtype", x.dtype)))
        if x.dtype != F32 or step.kind == "max_pool2d":
            np.testing.assert_array_equal(y, expected)
            return
        got, bound = y.astype(float), self.bound(step, x, options)
        if "out_scale" in step.options:
            unit, zero_point = float(F32(step.options["out_scale"])), step.options["out_zero_point"]
            limits = np.iinfo(y.dtype)
            expected = np.clip(expected / unit, limits.min - zero_point, limits.max - zero_point)
            got -= zero_point
            bound = 0.5 + bound / unit + EPS * np.abs(expected)
        worst = np.max(np.abs(got - expected) - bound, initial=-np.inf)
        assert worst <= 0, f"off by {worst} more than the bound allows"

    def expect(self, step: Step, x: Array, options: dict[str, Any]) -> Array:
        if x.dtype == F32 and step.kind != "max_pool2d":  # unrounded
            options = {k: v for k, v in options.items() if not k.startswith("out_")} | {"out_dtype": "float64"}
        if step.layer is None:
            if step.kind == "add":
                return reference.add(x, options.pop("residual", None), **options)
            return getattr(reference, step.kind)(x, **options)
        if step.kind == "linear":
            x = x.reshape(x.shape[0], -1)
        return getattr(reference, step.kind)(x, step.layer.q, step.layer.bias, **step.layer.geometry, **options)

    def bound(self, step: Step, x: Array, options: dict[str, Any]) -> Array:
        """Bound the error of the sum, and of at most six roundings after it, each half an eps of all magnitudes."""
        magnitude = np.abs(x).astype(float)
        terms = 0.0
        if step.layer is not None:
            q, bias = step.layer.q, step.layer.bias
            rows = x if step.kind == "conv2d" else x.reshape(x.shape[0], -1)
            magnitude = reference.abs_bound(rows, q, **step.layer.geometry)
            terms = 8 * math.sqrt(math.prod(q.shape[1:]))
            if bias is not None:
                magnitude = magnitude + np.abs(bias.reshape((-1, 1, 1) if step.kind == "conv2d" else -1))
        elif step.kind == "avg_pool2d":
            windows = {
                k: v for k, v in options.items() if k in ("kernel_size", "stride", "padding", "count_include_pad")
            }
            magnitude = reference.avg_pool2d(np.abs(x), **windows, out_dtype="float64")
            terms = 9  # sums of 16 in float32, of these in float64, rounded once
        total = magnitude
        if "residual" in options:
            raw = np.abs(options["residual"].astype(float)) + abs(options["residual_zero_point"])
            total = magnitude + options["residual_scale"] * raw
        return np.asarray(terms * EPS * magnitude + 3 * EPS * total)


def add_input(chain: Chain, made: Format) -> Value:
    return chain.input(made.dtype, made.scale, made.zero_point)


def add_step(chain: Chain, step: Step, x: Value, added: Value | None) -> Value:
    layer = () if step.layer is None else (step.layer.packed,)
    if step.kind == "add":
        return chain.add(x, added, **step.options)
    if step.layer is not None:
        return getattr(chain, step.kind)(x, *layer, residual=added, **step.options)
    return getattr(chain, step.kind)(x, **step.options)


def make_inputs(network: Network, images: int, *sizes: tuple[int, ...]) -> list[Array]:
    """One size for all inputs, or one for each; () makes rows."""
    sizes = sizes * network.inputs if len(sizes) == 1 else sizes
    formats = zip(network.formats[: network.inputs], sizes, strict=True)
    return [
        make_input((images, network.channels[i], *size), made.dtype, seed=i) for i, (made, size) in enumerate(formats)
    ]


def check_chain(
    network: Network,
    inputs: list[Array],
    outputs: tuple[int, ...],
    lifted: set[int] | None = None,
    isas: tuple[str, ...] | list[str] = ISAS,
    threads: tuple[int, ...] = THREADS,
    check: bool = True,
) -> None:
    chain = network.chain(*outputs)
    for isa in isas:
        pycodesign.set_isa(isa)
        pycodesign.set_num_threads(1)
        alone = network.run_alone(*inputs, check=check)
        for count in threads:
            pycodesign.set_num_threads(count)
            for index, y in zip(outputs, chain(*inputs), strict=True):
                assert y.dtype == alone[index].dtype and y.shape == alone[index].shape
                np.testing.assert_array_equal(y, alone[index], err_msg=f"value {index}, {isa}, {count} threads")
            told = chain.plan(*(x.shape for x in inputs))
            assert [shape[: y.ndim] for (shape, _), y in zip(told, alone, strict=True)] == [y.shape for y in alone]
            if lifted is not None:
                expected = lifted | network.moved if network.dtype != "float32" and isa != "scalar" else lifted
                assert {index for index, (_, is_lifted) in enumerate(told) if is_lifted} == expected


# ---- each step alone -------------------------------------------------------------------------------------------------

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


# ---- networks: which values stay in lanes, and what comes out --------------------------------------------------------

Built = tuple[
    Network, tuple[int, ...], set[int] | None
]  # outputs, and what is lifted where kernels have one lane count
NETWORKS: dict[str, Callable[[str, str], Built]] = {}


def network(build: Callable[[str, str], Built]) -> Callable[[str, str], Built]:
    NETWORKS[build.__name__.replace("_", " ")] = build
    return build


@network
def two_convolutions(dtype: str, algorithm: str) -> Built:
    n = Network(dtype, algorithm)
    first = n.conv2d(n.input(3), 9, clamp=(0, None))
    return n, (n.conv2d(first, 5),), {first}


@network
def residual_blocks(dtype: str, algorithm: str) -> Built:
    n = Network(dtype, algorithm)
    lifted = [n.conv2d(n.input(4), 10, clamp=(0, 6))]
    for _ in range(3):
        lifted.append(n.conv2d(lifted[-1], 10, clamp=(0, None)))
        lifted.append(n.conv2d(lifted[-1], 10, added=lifted[-2], clamp=(0, None)))
    return n, (n.conv2d(lifted[-1], 3),), set(lifted)


@network
def residual_blocks_that_end_in_rows(dtype: str, algorithm: str) -> Built:
    n = Network(dtype, algorithm)
    sums, lifted = [n.conv2d(n.input(4), 5)], set()
    for _ in range(2):
        lifted.add(n.conv2d(sums[-1], 5, clamp=(0, None)))
        sums.append(n.conv2d(max(lifted), 5, added=sums[-1]))  # floats all in rows, as the last is
    n.moved = set(sums[:-1])
    return n, (n.max_pool2d(sums[-1], 2, stride=1),), lifted


@network
def filters_of_many_sizes(dtype: str, algorithm: str) -> Built:
    n = Network(dtype, algorithm)
    x = n.conv2d(n.input(2), 6, 1)
    lifted = {x}
    filters: list[tuple[Any, dict[str, Any]]] = [
        (3, {}), (5, {}), (1, {}), (7, {}), (3, {"dilation": 2, "padding": 2}), ((1, 7), {}), ((7, 1), {}),
        ((3, 5), {"dilation": (3, 1), "padding": (3, 2)}), ((4, 3), {"dilation": (2, 1), "padding": (3, 1)}),
    ]  # fmt: skip
    for index, (kernel, geometry) in enumerate(filters):
        x = n.conv2d(x, 5 + index % 3, kernel, levels=(BINARY, TERNARY, QUATERNARY)[index % 3], **geometry)
        lifted.add(x)
    return n, (x,), lifted - {x}


@network
def groups(dtype: str, algorithm: str) -> Built:
    n = Network(dtype, algorithm)
    a = n.conv2d(n.input(6), 15, groups=3)
    b = n.conv2d(a, 15, groups=15, bias=False)  # depthwise
    c = n.conv2d(b, 10, 1, groups=5)
    d = n.conv2d(c, 20, 5, groups=2, clamp=(0, None))
    e = n.conv2d(d, 20, groups=20, added=d)
    return n, (n.conv2d(e, 7, 1),), {a, b, c, d, e}


@network
def smaller_maps(dtype: str, algorithm: str) -> Built:
    n = Network(dtype, algorithm)
    x = n.conv2d(n.input(3), 7)  # read with a stride
    a = n.conv2d(x, 8, stride=2)
    short = n.conv2d(x, 8, 1, stride=2)
    b = n.conv2d(a, 8, added=short, clamp=(0, None))
    c = n.conv2d(b, 8)
    d = n.conv2d(c, 8, added=b)
    e = n.conv2d(d, 9, 3, padding=0)  # smaller again
    f = n.conv2d(e, 4, 1)
    n.moved = {short, b}
    return n, (f,), {a, c, e}  # d is not, so neither are floats that are its residual, or that one's


@network
def residuals_from_elsewhere(dtype: str, algorithm: str) -> Built:
    n = Network(dtype, algorithm)
    x = n.input(6)
    a = n.conv2d(x, 6)
    b = n.conv2d(a, 6, added=x)  # rows, so b is
    c = n.max_pool2d(b, 3, stride=1, padding=1)
    d = n.conv2d(c, 6)
    e = n.conv2d(d, 6, added=c)
    other = n.conv2d(e, 6, dtype="int8" if dtype == "uint8" else "uint8")  # not read by a convolution
    f = n.conv2d(e, 6)
    g = n.conv2d(f, 6, added=other, clamp=(None, 3))
    h = n.conv2d(g, 6, added=g)
    n.moved = {e}
    return n, (n.conv2d(h, 3),), {a, d, other, f, g, h}


@network
def outputs_in_the_middle(dtype: str, algorithm: str) -> Built:
    n = Network(dtype, algorithm)
    a = n.conv2d(n.input(3), 5, clamp=(0, None))
    b = n.conv2d(a, 5)
    c = n.conv2d(b, 5, added=a)
    d = n.conv2d(c, 5, added=b, clamp=(0, None))
    unread = n.conv2d(d, 3)
    return n, (d, b, n.conv2d(d, 4), n.conv2d(b, 2, stride=2)), {a, c, unread}


@network
def adds(dtype: str, algorithm: str) -> Built:
    n = Network(dtype, algorithm)
    x = n.input(4)
    a, b = n.conv2d(x, 7), n.conv2d(x, 7, 1, dtype="float32")
    c = n.add(a, b, clamp=(0, None))
    d = n.conv2d(c, 7)
    e = n.add(d, c, dtype="float32")
    f = n.add(e, clamp=(-1, 1))
    g = n.conv2d(f, 7)
    h = n.add(g)  # an output: rows
    i = n.add(h, h)
    return n, (h, n.conv2d(i, 3)), {a, b, c, d, e, f}


@network
def classifier(dtype: str, algorithm: str) -> Built:
    n = Network(dtype, algorithm)
    a = n.max_pool2d(n.conv2d(n.input(3), 8, clamp=(0, None)), 3, stride=2, padding=1)
    b = n.conv2d(a, 8)
    c = n.conv2d(b, 8, added=a, clamp=(0, None))
    mean = n.avg_pool2d(c)
    hidden = n.linear(mean, 8, 20, clamp=(0, None))
    logits = n.linear(hidden, 20, 20, hidden, dtype="float32", algorithm="packed")
    return n, (logits, mean), {b}


@network
def exact_sums(dtype: str, algorithm: str) -> Built:
    n = Network(dtype, algorithm)
    a = n.conv2d(n.input(3), 5)
    sums = "float32" if dtype == "float32" else "int32"
    b = n.conv2d(a, 6, dtype=sums)
    c = n.linear(n.avg_pool2d(b if dtype == "float32" else n.conv2d(a, 6)), 6, 3, dtype=sums)
    unread = n.conv2d(a, 4, dtype=sums)
    lifted = {a, unread} if dtype == "float32" else {a}
    return n, (c, b, n.conv2d(a, 6, algorithm="dense")), lifted if algorithm == "dense" else None


@network
def every_algorithm(dtype: str, algorithm: str) -> Built:
    n = Network(dtype)
    x = n.conv2d(n.input(3), 12, algorithm=algorithm)
    for other in ("dense", "codegen", "tables", "codegen", "dense", "tables"):
        x = n.conv2d(x, 12, algorithm=other, added=x, dtype=("float32", "uint8")[dtype == "uint8"])
    return n, (x,), None


@network
def one_dtype_after_the_other(dtype: str, algorithm: str) -> Built:
    n = Network(dtype, algorithm)
    x = n.conv2d(n.input(5), 8, dtype="uint8")
    x = n.conv2d(x, 8, dtype="float32", clamp=(0, None))
    y = n.conv2d(x, 8, dtype="int8")
    z = n.conv2d(y, 8, added=x, dtype="uint8")
    z = n.conv2d(z, 8, added=y, dtype="int8")
    return n, (n.conv2d(z, 8, added=z, dtype="float32"),), None


@network
def lanes_of_outputs(dtype: str, algorithm: str) -> Built:
    """Enough channels that sums of all products run by rows of channels."""
    n = Network(dtype)
    a = n.conv2d(n.input(3), 36, clamp=(0, None), algorithm=algorithm)
    b = n.conv2d(a, 64)
    c = n.conv2d(b, 64, added=b, levels=tuple(range(-4, 5)), algorithm="dense")
    d = n.conv2d(c, 30, 1, algorithm=algorithm)
    return n, (n.conv2d(c, 90, stride=2), n.conv2d(d, 2)), None


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
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_chain import *\n{body}"
    command, environment = [sys.executable, "-c", script], os.environ | {"PYCODESIGN_JIT": "0"}
    child = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert child.stdout == "right\n", child.stderr


# ---- properties ------------------------------------------------------------------------------------------------------


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


@settings(max_examples=200)
@given(networks(), st.sampled_from(ISAS), st.sampled_from((1, 2, 3, 5)))
def test_any_network(case: tuple[Network, list[Array], tuple[int, ...]], isa: str, threads: int) -> None:
    n, inputs, outputs = case
    check_chain(n, inputs, outputs, None, [isa], (threads,))


# ---- the reference (torch, once imported, brings threads of its own) ----------------------------------------------


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
