"""Small graphs of branches, for several tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pycodesign import _core
from pycodesign.branches import Body, Graph, Placement, Slice, Value
from pycodesign.repetition.chain import Chain

CORES = _core.available_cores()
two_cores = pytest.mark.skipif(CORES < 2, reason="one core: nothing runs in parallel")
both = pytest.mark.parametrize("timeout", [None, 60])


def make_graph(run: Any, shape: tuple[int, ...] = (1, 4), arrays: str = "numpy", names: str = "ab") -> Graph:
    """The same function for each name."""
    values = {name: Value(shape) for name in f"x{names}"}
    bodies = [Body(name, run, (Slice("x"),), (Slice(name),), arrays) for name in names]
    return Graph(values, bodies, ["x"], list(names))


def spread(graph: Graph) -> Placement:
    """A team for each body, where there are as many cores."""
    return Placement(tuple((name,) for name in graph.bodies)) if CORES > 1 else Placement.sequential(graph)


def two_torch_bodies(run: Callable[..., Any], shape: tuple[int, ...], outputs: int) -> tuple[Graph, Placement]:
    """The same function twice, on two teams where there are two cores."""
    shapes = {"x": shape, "a": (shape[0], outputs, *shape[2:]), "b": (shape[0], outputs, *shape[2:])}
    values = {name: Value(size) for name, size in shapes.items()}
    graph = Graph(values, [Body(name, run, (Slice("x"),), (Slice(name),)) for name in "ab"], ["x"], ["a", "b"])
    return graph, Placement((("a",), ("b",))) if CORES > 1 else Placement.sequential(graph)


def make_chain(outputs: int = 1) -> Chain:
    """Twice its input, several times."""
    chain = Chain()
    x = chain.input()
    chain.output(*(chain.add(x, x) for _ in range(outputs)))
    return chain


def fail(*_: Any) -> None:
    raise ArithmeticError("a branch")
