"""Deltas of many tasks, and results of `ops.delta_linear` compared: with the reference, and bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from pycodesign import _core
from pycodesign.reference import sharing

Array = NDArray[Any]
ISAS = _core.supported_isas()
EPS = np.finfo(np.float32).eps
KINDS = ("sparse", "low_rank", "none", "dense", "sparse", "low_rank", "sparse")


def make_floats(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_delta(kind: str, shape: tuple[int, int], seed: int = 0, density: float = 0.1) -> Any:
    outputs, inputs = shape
    if kind == "none":
        return None
    if kind == "dense":
        return make_floats(shape, seed)
    if kind == "low_rank":
        rank = 1 + 13 * seed % 40
        return make_floats((outputs, rank), seed), make_floats((rank, inputs), seed + 1)
    keep = np.random.default_rng(seed).random(shape) < density
    return scipy.sparse.csr_array(np.where(keep, make_floats(shape, seed), np.float32(0)))


def make_deltas(shape: tuple[int, int], kinds: Sequence[str] = KINDS) -> tuple[list[Any], list[Array | None]]:
    """Deltas and biases; tasks 1 to 4, of every kind, have one."""
    deltas = [make_delta(kind, shape, seed) for seed, kind in enumerate(kinds)]
    return deltas, [make_floats(shape[:1], seed) if 1 <= seed <= 4 else None for seed in range(len(kinds))]


def magnitude(delta: Any) -> Any:
    return tuple(map(abs, delta)) if isinstance(delta, tuple) else None if delta is None else abs(delta)


def bound(x: Array, base: Array | None, deltas: list[Any], bias: list[Any], **options: Any) -> Array:
    """What the docstring promises, with every row as long as the longest."""
    inputs, ranks = x.shape[-1], [delta[0].shape[1] for delta in deltas if isinstance(delta, tuple)]
    terms = inputs + max(ranks, default=0) + 2
    sizes = [magnitude(delta) for delta in deltas], [None if b is None else abs(b) for b in bias]
    sums = sharing.delta_linear(abs(x), None, sizes[0], bias=sizes[1], **options)
    with_base = sums if base is None else sharing.delta_linear(abs(x), abs(base), sizes[0], bias=sizes[1], **options)
    return np.asarray(EPS * (terms * sums + (with_base - sums)))


def assert_near(got: Array, x: Array, base: Array | None, deltas: list[Any], bias: list[Any], **options: Any) -> None:
    expected = sharing.delta_linear(x, base, deltas, bias=bias, **options)
    assert got.dtype == np.float32 and got.shape == expected.shape
    assert (abs(got - expected) <= bound(x, base, deltas, bias, **options)).all()


def assert_bits(got: Any, expected: Any) -> None:
    assert got.shape == expected.shape
    np.testing.assert_array_equal(np.asarray(got).view(np.int32), np.asarray(expected).view(np.int32))
