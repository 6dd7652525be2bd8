"""Arguments: what `run_branches`, graphs, placements, tables and searches refuse, and with which message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from branch_graphs import make_graph
from branch_spaces import SPACE

from pycodesign import ops
from pycodesign import quantize as to_levels
from pycodesign.branches import (
    Architecture,
    Body,
    Executor,
    Graph,
    LatencyTable,
    Placement,
    Slice,
    Space,
    Value,
    build_inception,
    build_parnet,
    describe_machine,
    place,
    profile,
    search,
)
from pycodesign.repetition.chain import Chain

# `ops.run_branches`


@pytest.mark.parametrize(
    ("branches", "options", "error", "message"),
    [
        (3, {}, TypeError, "branches: expected a sequence of callables, got int"),
        ("ab", {}, TypeError, "branches: expected callables, chains or packed layers, got str"),
        ([len, 3], {}, TypeError, "branches: expected callables, chains or packed layers, got int"),
        ([len], {"timeout": 0}, ValueError, "timeout: expected a positive finite number of seconds, got 0"),
        ([len], {"timeout": float("nan")}, ValueError, "timeout: expected a positive finite number"),
        ([len], {"timeout": "1"}, TypeError, "timeout: expected a number, got str"),
        ([len], {"spin": -1}, ValueError, "spin: expected microseconds from 0 to 1e9, got -1"),
        ([len], {"spin": None}, TypeError, "spin: expected a number, got NoneType"),
    ],
)
def test_bad_arguments(branches: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.run_branches(branches, np.zeros(2), **options)


def test_bad_inputs_of_chains() -> None:
    chain = Chain()
    chain.output(chain.avg_pool2d(chain.input()))
    for x, error, message in (
        (3, TypeError, "inputs: expected a NumPy array or a torch tensor, got int"),
        (np.zeros(2), TypeError, "inputs: expected float32"),
        (np.zeros((2, 2, 2), np.float32), ValueError, "inputs: expected float32"),
    ):
        with pytest.raises(error, match=message):
            ops.run_branches([chain, chain], x)
    with pytest.raises(TypeError, match="inputs: expected 1 arrays, got 2"):
        ops.run_branches([chain], np.zeros((1, 2), np.float32), 3 * np.ones((1, 2), np.float32))


def test_packed_layers_take_one_input() -> None:
    layer, x = ops.prepack_linear(to_levels.ternary(np.eye(4, dtype=np.float32))), np.ones((1, 4), np.float32)
    for timeout in (None, 60):
        with pytest.raises(TypeError, match="inputs: expected 1 arrays, got 2"):
            ops.run_branches([layer, layer], x, x, timeout=timeout)


# Graphs, placements, tables and searches


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Value(3), r"shape: expected \(N, C, \.\.\.\), got int"),
        (lambda: Value((1, 2.0)), "shape: expected an integer, got float"),
        (lambda: Slice("x", 0.0), "begin: expected an integer, got float"),
        (lambda: Slice("x", None), "begin: expected an integer, got NoneType"),
        (lambda: Slice("x", 0, 2.0), "end: expected an integer, got float"),
        (lambda: Placement((("a",),), (1.5,)), "threads: expected an integer, got float"),
    ],
)
def test_sizes_are_checked_where_they_are_given(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


GRAPH = make_graph(np.copy)


TABLE = LatencyTable(describe_machine(), {"a": {"solo/1": 1e-3}, "b": {"solo/1": 1e-3}})


SEQUENTIAL = Placement.sequential(GRAPH)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: place(GRAPH, TABLE, 2.5), "workers: expected an integer, got float"),
        (lambda: place(GRAPH, TABLE, None), "workers: expected an integer, got NoneType"),
        (lambda: place(GRAPH, TABLE, measure="x"), "measure: expected a bool or a function, got str"),
        (lambda: place(GRAPH, TABLE, measure=lambda *_: None), "measure: expected a number, got NoneType"),
        (lambda: place(GRAPH, TABLE, measure=lambda *_: np.nan), "measure: expected a function .*, got nan"),
        (lambda: profile(SPACE, threads=1), "threads: expected a sequence of integers, got int"),
        (lambda: profile(SPACE, calibration=1.5), "calibration: expected an integer, got float"),
        (lambda: Executor(GRAPH, SEQUENTIAL, widths=3), "widths: expected threads by names of bodies, got int"),
        (lambda: Executor(GRAPH, SEQUENTIAL, widths=["a"]), "widths: expected threads by names of bodies, got list"),
        (lambda: Executor(GRAPH, SEQUENTIAL, ["threads"]), r"backend: expected .*, got \['threads'\]"),
        (
            lambda: Executor(GRAPH, SEQUENTIAL, "distributed", spin=0),
            "options: expected group, .*'distributed', got 's",
        ),
        (lambda: Executor(GRAPH, SEQUENTIAL, table=TABLE), "options: expected spin, pin, widths or timeout .*'table'"),
        (lambda: Placement(3), "teams: expected names of bodies for each team, got int"),
        (lambda: Placement(("a", "b")), "teams: expected names of bodies for each team, got str"),
        (lambda: Graph({"x": 3}, [], [], []), "values: expected a Value, got int as 'x'"),
        (lambda: Graph(3, [], [], []), "values: expected a mapping of str to Value, got int"),
        (lambda: Body("a", np.copy, Slice("x"), ()), "inputs: expected a tuple of Slice, got Slice"),
        (lambda: Body("a", 3, (), ()), "run: expected a callable, a chain or a packed layer, got int"),
        (lambda: Space(operators=3), "operators: expected a tuple of str, got int"),
        (lambda: Space(gates="none"), "gates: expected a tuple of str, got str"),
        (lambda: search(SPACE, TABLE, (), target_ms=1.0, seed="a"), "seed: expected an integer, got str"),
        (lambda: Architecture.from_json(None), "text: expected a str, got NoneType"),
        (lambda: build_parnet(streams=0), "streams: expected an integer >= 1, got 0"),
        (lambda: build_inception(width=0), "width: expected an integer >= 1, got 0"),
    ],
)
def test_what_was_expected_and_what_came(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        make()


def test_workers_of_numpy() -> None:
    assert place(GRAPH, TABLE, np.int64(2)).threads == place(GRAPH, TABLE, np.array([1, 1])).threads == (1, 1)  # type: ignore[arg-type]
