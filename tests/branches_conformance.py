"""What every backend of `branches.Executor` has to do: run a placement as if one body ran after the other.

A backend's tests call ``check(case, make)`` for each case, where ``make(graph, place)`` returns an executor. Every case
has at most `MOST_TEAMS` teams of one core each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pycodesign import ops, quantize
from pycodesign.branches import Body, Graph, Placement, Slice, Value
from pycodesign.repetition.chain import Chain

MOST_TEAMS = 2
Arrays = list[NDArray[Any]]


class Case(NamedTuple):
    graph: Graph
    place: Placement
    inputs: list[Arrays]  # of several runs


def slow(function: Callable[..., Any], seconds: float, *arrays: NDArray[Any]) -> Any:
    """Call a function after a while: a wait that is missing then shows."""
    time.sleep(seconds)
    return function(*arrays)


def double(x: NDArray[Any]) -> NDArray[Any]:
    return 2 * x


def shift(x: NDArray[Any]) -> NDArray[Any]:
    return x + 1


def weigh(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    return x - 3 * y


def split(x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    return x[:, :1] * 5, x[:, 1:] - 7


def runs(*shapes: tuple[int, ...], dtype: str = "float32", count: int = 5) -> list[Arrays]:
    rng = np.random.default_rng(0)
    return [[rng.integers(0, 9, shape).astype(dtype) for shape in shapes] for _ in range(count)]


def make_chain(rng: np.random.Generator, channels: int, outputs: int, dtype: str = "float32") -> Chain:
    """Two convolutions and a pooling between them."""
    given: dict[str, Any] = {"input_dtype": dtype} | ({} if dtype == "float32" else {"input_scale": 0.5})
    chain = Chain()
    x = chain.input(dtype, given.get("input_scale", 1.0))
    first = quantize.ternary(rng.standard_normal((outputs, channels, 3, 3), dtype=np.float32))
    second = quantize.ternary(rng.standard_normal((outputs, outputs, 1, 1), dtype=np.float32))
    y = chain.conv2d(x, ops.prepack_conv2d(first, padding=1, **given), clamp=(0, None))
    chain.output(chain.conv2d(chain.max_pool2d(y, 3, 1, 1), ops.prepack_conv2d(second)))
    return chain


def diamond(first: float, second: float) -> Case:
    values = {"x": Value((2, 3)), "a": Value((2, 3)), "b": Value((2, 6)), "y": Value((2, 3))}
    bodies = [
        Body("stem", shift, (Slice("x"),), (Slice("a"),), "numpy"),
        Body("left", partial(slow, double, first), (Slice("a"),), (Slice("b", 0, 3),), "numpy"),
        Body("right", partial(slow, shift, second), (Slice("a"),), (Slice("b", 3, 6),), "numpy"),
        Body("join", weigh, (Slice("b", 0, 3), Slice("b", 3, 6)), (Slice("y"),), "numpy"),
    ]
    graph = Graph(values, bodies, ["x"], ["y"])
    return Case(graph, Placement((("stem", "left", "join"), ("right",))), runs((2, 3)))


def ladder(steps: int) -> Case:
    """Two branches that exchange what they have after every step, so that each waits for the other all the time."""
    values = {"x": Value((1, 2))} | {f"{side}{i}": Value((1, 2)) for side in "ab" for i in range(steps)}
    bodies = []
    for i in range(steps):
        own = {side: f"{side}{i - 1}" if i else "x" for side in "ab"}
        for side, other in ("ab", "ba"):
            run = partial(slow, weigh, 1e-3) if i % 3 == "ab".index(side) else weigh
            bodies.append(
                Body(f"{side}.{i}", run, (Slice(own[side]), Slice(own[other])), (Slice(f"{side}{i}"),), "numpy")
            )
    graph = Graph(values, bodies, ["x"], [f"a{steps - 1}", f"b{steps - 1}"])
    teams = tuple(tuple(f"{side}.{i}" for i in range(steps)) for side in "ab")
    return Case(graph, Placement(teams), runs((1, 2)))


def several_values() -> Case:
    """Two inputs, two outputs, one of them also read by a body; a body of two results; int32."""
    values = {"u": Value((1, 3), "int32"), "v": Value((1, 3), "int32"), "m": Value((1, 4), "int32")}
    values |= {"p": Value((1, 3), "int32"), "q": Value((1, 1), "int32")}
    bodies = [
        Body("split", split, (Slice("u"),), (Slice("m", 0, 1), Slice("m", 2, 4)), "numpy"),
        Body("one", shift, (Slice("v", 1, 2),), (Slice("m", 1, 2),), "numpy"),
        Body("whole", weigh, (Slice("m", 1, 4), Slice("v")), (Slice("p"),), "numpy"),
        Body("part", double, (Slice("p", 2, 3),), (Slice("q"),), "numpy"),
    ]
    graph = Graph(values, bodies, ["u", "v"], ["p", "q"])
    return Case(graph, Placement((("one", "whole"), ("split", "part"))), runs((1, 3), (1, 3), dtype="int32"))


def passed_on() -> Case:
    """An input that is an output, too."""
    values = {"x": Value((1, 3)), "y": Value((1, 3))}
    graph = Graph(values, [Body("body", double, (Slice("x"),), (Slice("y"),), "numpy")], ["x"], ["x", "y"])
    return Case(graph, Placement((("body",), ())), runs((1, 3)))


def chains(batch: int, dtype: str) -> Case:
    """Chains that read and write slices, of several images too, beside a callable."""
    rng = np.random.default_rng(1)
    values = {"x": Value((batch, 8, 9, 7), dtype), "c": Value((batch, 24, 9, 7)), "y": Value((batch, 5, 9, 7))}
    bodies = [
        Body("left", make_chain(rng, 8, 12, dtype), (Slice("x"),), (Slice("c", 0, 12),), "numpy"),
        Body("right", make_chain(rng, 3, 7, dtype), (Slice("x", 2, 5),), (Slice("c", 12, 19),), "numpy"),
        Body("python", to_float, (Slice("x", 3, 8),), (Slice("c", 19, 24),), "numpy"),
        Body("join", make_chain(rng, 24, 5), (Slice("c"),), (Slice("y"),), "numpy"),
    ]
    graph = Graph(values, bodies, ["x"], ["y"])
    return Case(graph, Placement((("left", "join"), ("right", "python"))), runs((batch, 8, 9, 7), dtype=dtype))


def to_float(x: NDArray[Any]) -> NDArray[Any]:
    return x.astype(np.float32) / 3


CASES: dict[str, Callable[[], Case]] = {
    "diamond": lambda: diamond(0, 0),
    "diamond, first late": lambda: diamond(0.02, 0),
    "diamond, second late": lambda: diamond(0, 0.02),
    "ladder": lambda: ladder(12),
    "several values": several_values,
    "input passed on": passed_on,
    "chains": lambda: chains(1, "float32"),
    "chains of bytes": lambda: chains(1, "uint8"),
    "chains of images": lambda: chains(3, "uint8"),
}


def check(case: Case, make: Callable[[Graph, Placement], Callable[..., list[Any]]]) -> None:
    """Compare every run with the graph's own, bit for bit; results of a run outlive the next."""
    executor = make(case.graph, case.place)
    kept = []
    for inputs in case.inputs:
        expected, before = case.graph(*inputs), [x.copy() for x in inputs]
        found = executor(*inputs)
        assert not any(np.shares_memory(x, y) for x in inputs for y in found)
        kept.append((found, expected))
        for x, untouched in zip(inputs, before, strict=True):
            np.testing.assert_array_equal(x, untouched)
    for found, expected in kept:
        assert len(found) == len(expected)
        for got, wanted in zip(found, expected, strict=True):
            assert got.dtype == wanted.dtype
            np.testing.assert_array_equal(got, wanted, strict=True)
