"""`Executor` by threads: the conformance suite, bodies that fail, hang or call it again, and what it refuses."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import branches_conformance as conformance
import numpy as np
import pytest
from branch_graphs import CORES, both, make_graph, spread, two_cores

from pycodesign import _core, ops
from pycodesign.branches import Body, Executor, Graph, Placement, Slice, Value
from pycodesign.repetition.chain import Chain


def make_executor(**options: Any) -> Callable[[Graph, Placement], Executor]:
    return lambda graph, place: Executor(graph, place, "threads", **options)


@two_cores
@pytest.mark.parametrize("options", [{}, {"spin": 0.0}, {"pin": False}, {"timeout": 60}], ids=str)
@pytest.mark.parametrize("name", conformance.CASES)
def test_conformance(name: str, options: dict[str, Any]) -> None:
    conformance.check(conformance.CASES[name](), make_executor(**options))


@pytest.mark.parametrize("name", conformance.CASES)
def test_sequential(name: str) -> None:
    case = conformance.CASES[name]()
    for threads in range(1, CORES + 1):
        sequential = Placement.sequential(case.graph, threads)
        conformance.check(case._replace(place=sequential), make_executor())


@two_cores
def test_widths() -> None:
    case = conformance.chains(3, "float32")
    conformance.check(case, make_executor(widths={"join": 2, "left": 2}))


@pytest.mark.parametrize("timeout", [None, 60])
def test_arrays_of_a_run_are_let_go(timeout: float | None) -> None:
    chain = Chain()
    chain.output(chain.max_pool2d(chain.input(), 3, 1, 1))
    values = {name: Value((1, 3, 8, 8)) for name in "xyz"}
    bodies = [Body(name, chain, (Slice("x"),), (Slice(name),), "numpy") for name in "yz"]
    graph = Graph(values, bodies, ["x"], ["y", "z"])
    executor = Executor(graph, Placement.sequential(graph), timeout=timeout)
    for _ in range(2):
        x = np.random.default_rng(0).standard_normal((1, 3, 8, 8), dtype=np.float32)
        arrays = [x, *executor(x)]
        np.testing.assert_array_equal(arrays[1], graph(x)[0])
        alive = [weakref.ref(array if array.base is None else array.base) for array in arrays]
        del x, arrays
        assert all(reference() is None for reference in alive)


@two_cores
@pytest.mark.parametrize("timeout", [None, 60])
@pytest.mark.parametrize("culprit", ["stem", "left", "right", "join"])
def test_exceptions_of_bodies(culprit: str, timeout: float | None) -> None:
    case = conformance.diamond(0, 0)
    state = {"fails": True}

    def change(body: Body) -> Callable[..., Any]:
        def run(*arrays: Any) -> Any:
            if body.name == culprit and state["fails"]:
                raise ArithmeticError(culprit)
            return body.run(*arrays)

        return run

    graph = case.graph.replace_runs(change)
    executor = Executor(graph, case.place, timeout=timeout)
    for _ in range(3):
        with pytest.raises(ArithmeticError, match=culprit):
            executor(*case.inputs[0])
    state["fails"] = False
    np.testing.assert_array_equal(executor(*case.inputs[0])[0], case.graph(*case.inputs[0])[0])


def test_timeout_of_a_body() -> None:
    end = threading.Event()
    case = conformance.diamond(0, 0)
    graph = case.graph.replace_runs(
        lambda body: (lambda x: end.wait(60) or x) if body.name == "right" else body.run  # type: ignore[func-returns-value]
    )
    executor = Executor(graph, case.place, timeout=0.2)
    with pytest.raises(TimeoutError, match="still running: right"):
        executor(*case.inputs[0])
    end.set()


@two_cores
def test_body_that_calls_its_executor() -> None:
    executors: list[Executor] = []

    def call_again(x: Any) -> Any:
        return executors[0](x)[0]

    values = {"x": Value((1, 4)), "y": Value((1, 4))}
    graph = Graph(values, [Body("again", call_again, [Slice("x", 0, 4)], [Slice("y", 0, 4)])], ["x"], ["y"])
    executors.append(Executor(graph, Placement([["again"]])))
    with pytest.raises(RuntimeError, match=r"^Executor: expected a body that does not call"):
        executors[0](np.zeros((1, 4), np.float32))


@both
def test_a_body_that_reaches_its_own_executor(timeout: float | None) -> None:
    x, one = np.ones((1, 4), np.float32), None if timeout is None else 60.0

    def call(x: Any) -> Any:
        return executor(x)[0]

    graph = make_graph(call)
    ways: list[Callable[[Any], Any]] = [call, lambda x: ops.run_branches([np.copy, call], x, timeout=one)[1]]
    between = Executor(graph, spread(graph), timeout=60)
    ways.append(lambda x: between(x)[1])
    for way in ways:
        graph = make_graph(way)
        executor = Executor(graph, spread(graph), timeout=timeout)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="expected a body that does not call the executor that runs it"):
                executor(x)
    executor = Executor(make_graph(np.copy), spread(graph))
    assert between(x)[0].tolist() == [[1] * 4]


def test_bad_placements() -> None:
    case = conformance.diamond(0, 0)
    graph = case.graph
    too_many = Placement((*[(name,) for name in graph.bodies], *[()] * CORES))
    for net, place, options, error, message in (
        (graph, too_many, {}, ValueError, f"place: expected teams of at most {CORES} cores"),
        (graph, Placement.sequential(graph, CORES + 1), {}, ValueError, f"place: expected .* got {CORES + 1}"),
        (graph, "teams", {}, TypeError, "place: expected a Placement, got str"),
        (3, Placement.sequential(graph), {}, TypeError, "net: expected a Graph or a network of branches, got int"),
        (graph, Placement.sequential(graph), {"backend": "mpi"}, ValueError, "backend: expected 'threads', "),
        (graph, Placement.sequential(graph), {"widths": {"no": 1}}, ValueError, "widths: expected names"),
        (graph, Placement.sequential(graph), {"widths": {"stem": 2}}, ValueError, "widths: expected at most 1"),
        (graph, Placement.sequential(graph), {"pin": 1}, TypeError, "pin: expected a bool, got int"),
        (graph, Placement((("stem", "left"),)), {}, ValueError, "place: expected all bodies"),
        (graph, Placement((("left", "stem", "right", "join"),)), {}, ValueError, "place: expected no cycle"),
    ):
        with pytest.raises(error, match=message):
            Executor(net, place, **options)  # type: ignore[arg-type]


def test_bad_inputs() -> None:
    case = conformance.diamond(0, 0)
    executor = Executor(case.graph, Placement.sequential(case.graph))
    with pytest.raises(TypeError, match=r"x: expected float32 \(2, 3\), got float64"):
        executor(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"x: expected float32 \(2, 3\), got float32 \(1, 3\)"):
        executor(np.zeros((1, 3), np.float32))
    with pytest.raises(TypeError, match="inputs: expected 1 arrays, got 0"):
        executor()


def test_native_errors() -> None:
    """What Python checks first is checked below, too."""
    make = _core.BranchRunner
    bodies = [lambda: None] * 3
    for arguments, error, message in (
        (([0, 0], [1, 1, 1], [[]] * 3, 1, bodies), ValueError, "expected one for each of 3 bodies"),
        (([0, 0, 1], [1, 1, 1], [[]] * 3, 1, bodies), ValueError, "team: expected 0 to 0, got 1"),
        (([0, 0, 0], [1, 0, 1], [[]] * 3, 1, bodies), ValueError, "threads: expected at least 1, got 0"),
        (([0, 0, 0], [1, 1, 1], [[], [3], []], 1, bodies), ValueError, "after: expected tasks from 0 to 2, got 3"),
        (([0, 0, 0], [1, 1, 1], [[2], [], []], 1, bodies), ValueError, "after: expected no cycle, got "),
        (([0, 0, 0], [1, 1, 1], [[]] * 3, CORES + 1, bodies), ValueError, f"teams: expected at most {CORES}"),
        (([0, 0, 0], [1, 1, 1], [[]] * 3, 1, [len, 1, len]), TypeError, "bodies: expected chains and callables"),
    ):
        with pytest.raises(error, match=message):
            make(*arguments)  # type: ignore[arg-type]
    runner = make([0], [1], [[]], 1, [lambda: None])
    for spin, patience in ((-1.0, 0.0), (0.0, float("nan"))):
        with pytest.raises(ValueError, match="expected microseconds"):
            runner.run(spin, patience, False)
