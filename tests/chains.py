"""What tests of chains share: networks, each step of which may run in a chain or alone, and how they are compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from conftest import ALGORITHMS, INPUT_DTYPES, ISAS, THREADS, to_codebook
from layers import BINARY, QUATERNARY, TERNARY, make_input
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
                assert {index for index, (_, layout) in enumerate(told) if layout == "lifted"} == expected


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


@network
def adds_of_bytes_and_floats(dtype: str, algorithm: str) -> Built:
    """Rows of as many channels, of bytes and of floats, which whole lines end differently."""
    n = Network(dtype)
    a = n.conv2d(n.input(16), 48, dtype="uint8")
    b = n.add(a, dtype="float32")
    c = n.add(n.conv2d(b, 48, dtype="float32"), a, dtype="float32")
    d = n.add(n.conv2d(c, 48, dtype="int8"), c, dtype="int8")
    e = n.add(n.conv2d(c, 48, dtype="float32"), dtype="uint8")
    f = n.add(n.conv2d(e, 48, dtype="uint8"), e, dtype="uint8")
    return n, (n.conv2d(d, 32, algorithm=algorithm), n.conv2d(f, 32)), None


@network
def channels_last(dtype: str, algorithm: str) -> Built:
    """A stem, pooling and adds between layers by rows of channels."""
    n = Network(dtype)
    stem = n.conv2d(n.input(3), 64, 7, stride=2, levels=tuple(range(-128, 128)), clamp=(0, None))
    pooled = n.max_pool2d(stem, 3, stride=2, padding=1)
    a = n.conv2d(n.conv2d(pooled, 76, clamp=(0, None)), 64, added=pooled, clamp=(0, None))
    b = n.conv2d(a, 90, stride=2)
    c = n.add(n.conv2d(a, 90, 1, stride=2), b, clamp=(0, None))
    d = n.conv2d(n.avg_pool2d(c, kernel_size=3, stride=1, padding=1), 32, algorithm=algorithm)
    e = n.conv2d(n.max_pool2d(b, 2, padding=1), 32)
    return n, (n.avg_pool2d(e), n.linear(n.avg_pool2d(d), 32, 5)), None
