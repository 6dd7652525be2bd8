"""Layers to test, their inputs, and what the reference says of them; memory that shows writes outside an array."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from conftest import ALGORITHMS, INPUT_DTYPES, ISAS, THREADS, to_codebook
from numpy.typing import NDArray

import pycodesign
from pycodesign import ops
from pycodesign.quantize import QuantizedTensor
from pycodesign.reference import repetition as reference

F32 = np.float32
EPS = 2.0**-23
Array = NDArray[Any]
Record = Callable[[ops.Packed], None]

each_isa = pytest.mark.parametrize("isa", ISAS)
each_conv2d = pytest.mark.parametrize("algorithm", ALGORITHMS["conv2d"])
each_linear = pytest.mark.parametrize("algorithm", ALGORITHMS["linear"])

BINARY, TERNARY, QUATERNARY = (-1, 1), (-1, 0, 1), (-2, -1, 0, 1)
ZERO_POINTS = {"float32": 0, "uint8": 131, "int8": -7}


@dataclass(frozen=True)
class Case:
    """A layer and the shape of its input."""

    x: tuple[int, ...]  # (N, C, H, W) or (..., I)
    w: tuple[int, ...]  # (O, C / groups, R, S) or (O, I)
    geometry: dict[str, Any] = field(default_factory=dict)
    levels: tuple[float, ...] = TERNARY
    own_levels: bool = False  # per output: levels, and levels + 1
    scale_groups: int = 0
    bias: bool = True
    kernels: int = 0  # filters are any of so many; 0: all are random

    @property
    def kind(self) -> str:
        return "conv2d" if len(self.w) == 4 else "linear"

    def fits(self, algorithm: str) -> bool:
        values = len(self.levels) + self.own_levels
        tables = values <= 16 and self.scale_groups < 2
        if algorithm == "codebook":
            return to_codebook(make_weights(self)[0]) is not None
        return {"codegen": tables, "tables": tables, "dense": True, "packed": values <= 4}[algorithm]

    def input_dtypes(self, algorithm: str) -> tuple[str, ...]:
        """Levels beyond int8 are for tables, or for float inputs."""
        exact = algorithm in (*ops.BY_PATTERNS, "codebook")
        return INPUT_DTYPES if exact or max(self.levels) < 128 else ("float32",)


def make_weights(case: Case) -> tuple[QuantizedTensor, Array | None]:
    rng = np.random.default_rng(len(case.levels) + sum(case.w))
    outputs = case.w[0]
    levels = np.array(case.levels, F32)
    if case.own_levels:
        levels = np.stack([levels + o % 2 for o in range(outputs)])
    scale = rng.normal(0, 0.1, (outputs, case.scale_groups) if case.scale_groups else outputs).astype(F32)
    codes = rng.integers(0, len(case.levels), case.w, dtype=np.uint8)
    if case.kernels:
        kernels = codes.reshape(-1, math.prod(case.w[2:]))[: case.kernels]
        codes = kernels[rng.integers(0, case.kernels, math.prod(case.w[:2]))].reshape(case.w)
    return QuantizedTensor(codes, levels, scale), rng.normal(size=outputs).astype(F32) if case.bias else None


def make_input(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    if "float" in dtype:
        return rng.normal(size=shape).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max + 1, shape, dtype=dtype)


def input_options(dtype: str) -> dict[str, Any]:
    return {} if "float" in dtype else {"input_scale": 0.0173, "input_zero_point": ZERO_POINTS[dtype]}


def pack(case: Case, dtype: str, algorithm: str) -> ops.Packed:
    quantized, bias = make_weights(case)
    q = (to_codebook(quantized) if algorithm == "codebook" else None) or quantized
    if case.kind == "linear":
        return ops.prepack_linear(q, bias, input_dtype=dtype, algorithm=algorithm, **input_options(dtype))
    return ops.prepack_conv2d(q, bias, input_dtype=dtype, algorithm=algorithm, **input_options(dtype), **case.geometry)


def run(x: Array, packed: ops.Packed, **epilogue: Any) -> Array:
    return ops.conv2d(x, packed, **epilogue) if packed.kind == "conv2d" else ops.linear(x, packed, **epilogue)


def expect(case: Case, x: Array, **epilogue: Any) -> Array:
    q, bias = make_weights(case)
    if case.kind == "linear":
        return reference.linear(x, q, bias, **input_options(x.dtype.name), **epilogue)
    return reference.conv2d(x, q, bias, **case.geometry, **input_options(x.dtype.name), **epilogue)


def tolerance(case: Case, x: Array, residual: Array | None = None, residual_scale: float = 1.0) -> Array:
    """Bound the error of float inputs: that of the sum, and half an eps of all magnitudes for each rounding after it.

    Those are per scale group a product and an addition, then bias, residual times scale, and the residual's addition.
    """
    q, bias = make_weights(case)
    magnitude = reference.abs_bound(x, q, **case.geometry)
    weights = math.prod(case.w[1:])
    by_output = (-1, 1, 1) if case.kind == "conv2d" else (-1,)
    total = magnitude + (0 if bias is None else np.abs(bias.reshape(by_output)))
    if residual is not None:
        total = total + residual_scale * np.abs(residual.astype(float))
    roundings = 2 * max(case.scale_groups, 1) + 3
    return np.asarray(8 * EPS * math.sqrt(weights) * magnitude + roundings * EPS / 2 * total)


def assert_near(got: Array, case: Case, x: Array, **epilogue: Any) -> None:
    """Compare a result of float inputs with float64, in steps of `out_scale` where it is quantized."""
    dtype = epilogue.pop("out_dtype", "float32")
    assert got.dtype == dtype
    out_scale, zero_point = epilogue.pop("out_scale", None), epilogue.pop("out_zero_point", 0)
    exact = expect(case, x, out_dtype="float64", **epilogue)
    bound = tolerance(case, x, epilogue.get("residual"), epilogue.get("residual_scale", 1.0))
    if out_scale is not None:
        step = float(F32(out_scale))
        limits = np.iinfo(dtype)
        exact = np.clip(exact / step, limits.min - zero_point, limits.max - zero_point)
        got = got.astype(float) - zero_point
        bound = 0.5 + bound / step + EPS * np.abs(exact)
    assert got.shape == exact.shape
    worst = np.max(np.abs(got - exact) - bound, initial=-np.inf)
    assert worst <= 0, f"off by {worst} more than the bound allows"


def check(case: Case, x: Array, packed: ops.Packed, record: Record, isa: str, **epilogue: Any) -> None:
    """Run on each thread count, twice, and compare with the reference."""
    pycodesign.set_isa(isa)
    first: Array | None = None
    for threads in THREADS:
        pycodesign.set_num_threads(threads)
        for _ in range(2):
            y = run(x, packed, **epilogue)
            if first is None:
                first = y
                if x.dtype == np.float32:
                    assert_near(y, case, x, **epilogue)
                else:
                    expected = expect(case, x, **epilogue)
                    assert y.dtype == expected.dtype and y.shape == expected.shape
                    np.testing.assert_array_equal(y, expected)
            assert y.tobytes() == first.tobytes(), f"other bits with {threads} threads or at a second run"
        record(packed)


GUARD = 0xA5


def guarded(
    shape: tuple[int, ...],
    dtype: str,
    *,
    order: tuple[int, ...] | None = None,
    steps: tuple[int, ...] = (),
    spare: int = 1,
) -> tuple[Array, Array]:
    """Return a buffer of guard bytes and a view of that shape inside it, one element off the buffer's alignment.

    `order` lists the axes from the slowest in memory to the fastest; `steps` are the elements from one index to the
    next, negative ones included; `spare` elements of guard lie before and behind every row of every axis.
    """
    order = order or tuple(range(len(shape)))
    steps = steps or (1,) * len(shape)
    sizes = [abs(steps[axis]) * max(shape[axis], 1) + 2 * spare for axis in order]
    length = math.prod(sizes)
    buffer = np.full((length + 2) * np.dtype(dtype).itemsize, GUARD, np.uint8).view(dtype)
    inside = buffer[1:-1].reshape(sizes)
    window = inside[tuple(slice(spare, spare + abs(steps[a]) * shape[a], abs(steps[a])) for a in order)]
    window = window.transpose(np.argsort(order))
    return buffer, window[tuple(slice(None, None, -1 if step < 0 else 1) for step in steps)]


def assert_guards_untouched(buffer: Array, view: Array) -> None:
    """Overwrite what may be written; nothing else may differ from the guard."""
    view[...] = np.full(view.dtype.itemsize, GUARD, np.uint8).view(view.dtype)[0]
    assert (buffer.view(np.uint8) == GUARD).all(), "wrote outside of out"


LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous, odd start": {"spare": 0},
    "rows apart": {},
    "every second": {"steps": (1, 2, 3, 2)},
    "reversed": {"steps": (-1, -1, -1, -1)},
    "reversed columns, every second row": {"steps": (1, 1, 2, -1)},
    **{f"axes {''.join(map(str, p))}": {"order": p, "spare": 0} for p in permutations(range(4)) if p != (0, 1, 2, 3)},
}
