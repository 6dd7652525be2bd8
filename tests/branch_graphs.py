"""Small graphs of branches, for several tests."""

from __future__ import annotations

from typing import Any

import pytest

from pycodesign import _core
from pycodesign.branches import Body, Graph, Placement, Slice, Value

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
