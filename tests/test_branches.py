"""Branches run by teams of threads: against one body after the other, with whatever callables can do wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import branches_conformance as conformance
import numpy as np
import pytest

import pycodesign
from pycodesign import _core, ops, quantize
from pycodesign.branches import Body, Executor, Graph, Placement, Slice, Value
from pycodesign.repetition.chain import Chain

CORES = _core.available_cores()
two_cores = pytest.mark.skipif(CORES < 2, reason="one core: nothing runs in parallel")


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


@two_cores
def test_bodies_run_at_the_same_time() -> None:
    meeting = threading.Barrier(2)

    def meet(x: Any) -> Any:
        meeting.wait(30)
        return x

    assert ops.run_branches([meet, meet], 1) == [1, 1]
    assert ops.run_branches([meet, meet], 1, timeout=60) == [1, 1]


def test_results_come_in_order() -> None:
    branches = [lambda x, i=i: (i, x) for i in range(7)]
    for timeout in (None, 60):
        assert ops.run_branches(branches, "x", timeout=timeout) == [(i, "x") for i in range(7)]
    assert ops.run_branches([]) == []
    assert ops.run_branches([], timeout=1) == []


def test_caller_runs_the_first() -> None:
    found = ops.run_branches([threading.get_ident] * 3)
    assert found[0] == threading.get_ident()


@two_cores
def test_each_has_one_thread() -> None:
    for timeout in (None, 60):
        assert ops.run_branches([pycodesign.get_num_threads] * 2, timeout=timeout) == [1, 1]


def test_layers_and_chains() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (2, 8, 6, 5)).astype(np.uint8)
    w = rng.standard_normal((4, 8, 3, 3), dtype=np.float32)
    layer = ops.prepack_conv2d(quantize.ternary(w), padding=1, input_dtype="uint8", input_scale=0.1)
    chain = Chain()
    value = chain.input("uint8", 0.1)
    chain.output(chain.conv2d(value, layer, clamp=(0, 1)), chain.avg_pool2d(value))
    for _ in range(3):
        found = ops.run_branches([layer, chain, lambda x: x.sum()], x)
        np.testing.assert_array_equal(found[0], ops.conv2d(x, layer), strict=True)
        for got, wanted in zip(found[1], chain(x), strict=True):
            np.testing.assert_array_equal(got, wanted, strict=True)
        assert found[2] == x.sum()
        x = x[:1]  # another size
    linear = ops.prepack_linear(quantize.ternary(rng.standard_normal((3, 5), dtype=np.float32)))
    rows = rng.standard_normal((4, 5), dtype=np.float32)
    np.testing.assert_array_equal(ops.run_branches([linear], rows)[0], ops.linear(rows, linear), strict=True)


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    layer = ops.prepack_linear(quantize.ternary(rng.standard_normal((3, 5), dtype=np.float32)))
    x = torch.randn(4, 5)
    module = torch.nn.Linear(5, 2)
    with torch.no_grad():
        found = ops.run_branches([layer, module], x)[::-1]
        assert not found[0].requires_grad and torch.equal(found[0], module(x))
    assert torch.equal(found[1], ops.linear(x, layer))
    with torch.inference_mode():
        assert ops.run_branches([torch.is_inference_mode_enabled] * 2) == [True, True]
    assert ops.run_branches([torch.is_grad_enabled] * 2) == [True, True]
    with torch.autocast("cpu"):
        assert ops.run_branches([lambda: torch.is_autocast_enabled("cpu")] * 2) == [True, True]
    threads = torch.get_num_threads()
    ops.run_branches([lambda: None] * 2, timeout=60)
    assert torch.get_num_threads() == threads


@two_cores
def test_torch_has_one_thread() -> None:
    """So sums have the same bits, whatever other threads do, however many branches there are."""
    torch = pytest.importorskip("torch")
    before, x = torch.get_num_threads(), torch.randn(1, 1 << 18)
    torch.set_num_threads(1)
    alone = float(x[0] @ x[0])
    torch.set_num_threads(2)

    def dot(x: Any) -> tuple[int, float]:
        return torch.get_num_threads(), float(x[0] @ x[0])

    def body(x: Any) -> Any:
        return torch.tensor([dot(x)])

    values = {"x": Value((1, 1 << 18)), "a": Value((1, 2)), "b": Value((1, 2))}
    graph = Graph(values, [Body(name, body, (Slice("x"),), (Slice(name),)) for name in "ab"], ["x"], ["a", "b"])
    places = [Placement((("a",), ("b",))), Placement((("a", "b"),)), Placement((("a", "b"),), (2,))]
    executors = [(Executor(graph, p, timeout=t), p.threads[0]) for p in places for t in (None, 60)]
    wrong: list[Any] = []

    def call(times: int) -> None:
        for _ in range(times):
            for count, timeout in ((1, None), (2, None), (1, 60)):
                found = ops.run_branches([dot] * count, x, timeout=timeout)
                wrong.extend(y for y in found if y != (1, alone))
            for executor, threads in executors:
                wanted = graph(x, threads=threads)
                wrong.extend(y for y, z in zip(executor(x), wanted, strict=True) if not torch.equal(y, z))
                wrong.extend(z for z in wanted if z[0, 0] != threads)

    try:
        callers = [threading.Thread(target=call, args=(20,)) for _ in range(3)]
        for caller in callers:
            caller.start()
        call(20)
        for caller in callers:
            caller.join()
        assert not wrong and graph(x)[0].tolist() == [[1, alone]]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


FORK = """
import os, signal
import torch
from pycodesign import ops
from pycodesign.branches import Body, Executor, Graph, Placement, Slice, Value

x = torch.ones(1, 1 << 20)
values = {name: Value((1, 1 << 20)) for name in "xab"}
graph = Graph(values, [Body(n, torch.abs, (Slice("x"),), (Slice(n),)) for n in "ab"], ["x"], ["a", "b"])
executor = Executor(graph, Placement((("a",), ("b",))))
calls = [
    lambda: executor(x),
    lambda: graph(x),
    lambda: ops.run_branches([torch.abs, torch.neg], x),
    lambda: ops.run_branches([torch.abs, torch.neg], x, timeout=60),
]
torch.set_num_threads(2)
for call in [lambda: torch.abs(x), *calls]:
    call()
for call in calls:
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        call()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@two_cores
def test_forked_child_of_a_process_that_used_torch() -> None:
    pytest.importorskip("torch")
    subprocess.run([sys.executable, "-P", "-c", FORK], check=True, timeout=200)


def two_torch_bodies(run: Callable[..., Any], shape: tuple[int, ...], outputs: int) -> tuple[Graph, Placement]:
    """The same function twice, on two teams where there are two cores."""
    shapes = {"x": shape, "a": (shape[0], outputs, *shape[2:]), "b": (shape[0], outputs, *shape[2:])}
    values = {name: Value(size) for name, size in shapes.items()}
    graph = Graph(values, [Body(name, run, (Slice("x"),), (Slice(name),)) for name in "ab"], ["x"], ["a", "b"])
    return graph, Placement((("a",), ("b",))) if CORES > 1 else Placement.sequential(graph)


@pytest.mark.parametrize("timeout", [None, 60])
def test_inputs_of_any_layout(timeout: float | None) -> None:
    """Sums of floats depend on strides and alignment."""
    torch = pytest.importorskip("torch")
    functional, x = torch.nn.functional, np.random.default_rng(0).standard_normal((2, 4, 40, 66), dtype=np.float32)
    weight = torch.from_numpy(x[0, :, 3:6, :12].reshape(4, 4, 3, 3))
    shifted = np.empty(x.size + 1, np.float32)[1:].reshape(x.shape)
    shifted[...] = x
    layouts = [x, shifted, np.asfortranarray(x), x[:, ::-1, ::-1], x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)]
    for run in (
        lambda x: functional.conv2d(x, weight, padding=1),
        lambda x: x @ x.transpose(2, 3) @ x,
        lambda x: functional.scaled_dot_product_attention(x, x, x),
        lambda x: x.flatten(1).sum(1)[:, None, None, None].expand(x.shape),
    ):
        graph, place = two_torch_bodies(run, x.shape, 4)
        executor = Executor(graph, place, timeout=timeout)
        for layout in layouts:
            for got, wanted in zip(executor(layout), graph(layout), strict=True):
                np.testing.assert_array_equal(got, wanted, strict=True)


@pytest.mark.parametrize("timeout", [None, 60])
def test_torch_modes_of_bodies(timeout: float | None) -> None:
    torch = pytest.importorskip("torch")
    layer, x = torch.nn.Linear(32, 32), torch.randn(4, 32)
    graph, place = two_torch_bodies(lambda x: layer(x).float(), (4, 32), 32)
    executor = Executor(graph, place, timeout=timeout)
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            found, wanted = executor(x), graph(x)
        assert all(torch.equal(y, z) for y, z in zip(found, wanted, strict=True))
        assert not torch.equal(wanted[0], graph(x)[0]) and torch.equal(executor(x)[1], graph(x)[1])


@pytest.mark.parametrize("timeout", [None, 60])
def test_bodies_that_overwrite_their_input(timeout: float | None) -> None:
    torch = pytest.importorskip("torch")
    values = {"x": Value((1, 9)), "y": Value((1, 9))}
    graph = Graph(values, [Body("a", torch.nn.ReLU(inplace=True), (Slice("x"),), (Slice("y"),))], ["x"], ["y"])
    x = torch.randn(1, 9)
    before = x.clone()
    assert torch.equal(Executor(graph, Placement.sequential(graph), timeout=timeout)(x)[0], before.relu())
    assert torch.equal(x, before)


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


def test_converted_modules_with_hooks() -> None:
    torch = pytest.importorskip("torch")
    nn = pytest.importorskip("pycodesign.nn")
    x = torch.randn(1, 8, 6, 6)
    for hook in ("register_forward_hook", "register_forward_pre_hook"):
        for inner in (False, True):
            module = nn.convert(
                torch.nn.Sequential(torch.nn.Conv2d(8, 4, 3, padding=1), torch.nn.ReLU()).eval(), "ternary"
            )
            hooked = next(module.children()) if inner else module
            getattr(hooked, hook)(lambda module, inputs, *result: result[0] + 1 if result else (inputs[0] + 1,))
            graph, place = two_torch_bodies(module, (1, 8, 6, 6), 4)
            assert torch.equal(Executor(graph, place)(x)[1], graph(x)[1])


def test_nested() -> None:
    def inner(x: int) -> list[Any]:
        return ops.run_branches([lambda x: x + 1, lambda x: x + 2], x)

    assert ops.run_branches([inner, inner, inner], 1) == [[2, 3]] * 3


def test_callers_at_the_same_time() -> None:
    case = conformance.diamond(0, 0)
    executor = Executor(case.graph, case.place if CORES > 1 else Placement.sequential(case.graph))
    wrong = []

    def call(seed: int) -> None:
        x = np.full((2, 3), seed, np.float32)
        for _ in range(50):
            if not np.array_equal(executor(x)[0], case.graph(x)[0]):
                wrong.append(seed)
            if ops.run_branches([lambda: seed, lambda: -seed]) != [seed, -seed]:
                wrong.append(seed)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def fail(*_: Any) -> None:
    raise ArithmeticError("a branch")


@pytest.mark.parametrize("timeout", [None, 60])
@pytest.mark.parametrize("position", range(3))
def test_exceptions_come_back(position: int, timeout: float | None) -> None:
    stopped = []

    def work(*_: Any) -> None:
        time.sleep(0.01)
        stopped.append(None)

    branches: list[Any] = [work, work, work]
    branches[position] = fail
    for _ in range(3):
        with pytest.raises(ArithmeticError, match="a branch"):
            ops.run_branches(branches, timeout=timeout)
        count = len(stopped)
        time.sleep(0.03)
        assert len(stopped) == count  # none was still running
    assert ops.run_branches([len, len], "ab") == [2, 2]


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


@pytest.mark.parametrize("position", range(2))
def test_timeout(position: int) -> None:
    end = threading.Event()
    branches: list[Any] = [lambda: None, lambda: None]
    branches[position] = lambda: end.wait(60)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=rf"timeout: expected .* 0\.2 s, still running: branch {position}$"):
        ops.run_branches(branches, timeout=0.2)
    assert time.monotonic() - start < 20
    end.set()
    assert ops.run_branches([lambda: 1, lambda: 2], timeout=60) == [1, 2]


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


def test_affinity_is_kept() -> None:
    before = os.sched_getaffinity(0)
    case = conformance.chains(1, "float32")
    executor = Executor(case.graph, case.place if CORES > 1 else Placement.sequential(case.graph))
    inside: list[set[int]] = []
    seen = case.graph.replace_runs(lambda body: lambda *x: inside.append(os.sched_getaffinity(0)) or body.run(*x))  # type: ignore[func-returns-value]
    for _ in range(5):
        executor(*case.inputs[0])
        assert os.sched_getaffinity(0) == before
    if CORES > 1:
        Executor(seen, case.place)(*case.inputs[0])
        assert os.sched_getaffinity(0) == before
        assert all(len(cores) == 1 and cores <= before for cores in inside)
        failing = case.graph.replace_runs(lambda body: fail)
        with pytest.raises(ArithmeticError):
            Executor(failing, case.place)(*case.inputs[0])
        assert os.sched_getaffinity(0) == before
    found = ops.run_branches([lambda: os.sched_getaffinity(0)] * 2)
    assert found == [before, before]


@two_cores
def test_one_core_allowed() -> None:
    """A thread that may run on one core only gets an error, and an executor made before works on it all the same."""
    before = os.sched_getaffinity(0)
    case = conformance.diamond(0, 0)
    executor = Executor(case.graph, case.place)
    try:
        os.sched_setaffinity(0, {min(before)})
        np.testing.assert_array_equal(executor(*case.inputs[0])[0], case.graph(*case.inputs[0])[0])
        assert ops.run_branches([lambda: 1, lambda: 2]) == [1, 2]
        assert os.sched_getaffinity(0) == {min(before)}
        with pytest.raises(ValueError, match=r"place: expected teams of at most 1 cores in all, .*, got 2"):
            Executor(case.graph, case.place)
    finally:
        os.sched_setaffinity(0, before)


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


def test_bound_chains() -> None:
    chain = Chain()
    chain.output(chain.avg_pool2d(chain.input(), 2))
    bound = chain.bind([(2, 3, 4, 4)], 1)
    assert bound.output_shapes == [[2, 3, 2, 2]]
    with pytest.raises(ValueError, match="bodies: expected chains with all inputs and outputs set"):
        bound.run()
    with pytest.raises(TypeError, match=r"x: expected float32 \(2, 3, 4, 4\), got float64"):
        bound.set_input(0, np.zeros((2, 3, 4, 4)))
    with pytest.raises(IndexError, match="index"):
        bound.set_input(1, np.zeros((2, 3, 4, 4), np.float32))
    out = np.full((2, 9, 2, 2), np.nan, np.float32)
    with pytest.raises(ValueError, match="out: expected images whose elements follow one another"):
        bound.set_output(0, out[:, ::3])
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 4), dtype=np.float32)
    bound.set_input(0, x)
    bound.set_output(0, out[:, 3:6])
    bound.run()
    np.testing.assert_array_equal(out[:, 3:6], chain(x)[0])
    assert np.isnan(out[:, :3]).all() and np.isnan(out[:, 6:]).all()
    for let_go in (lambda: bound.set_input(0, None), lambda: bound.set_output(0, None), bound.release):
        bound.set_input(0, x)
        bound.set_output(0, out[:, 3:6])
        let_go()
        with pytest.raises(ValueError, match="bodies"):
            bound.run()


def test_body_of_wrong_shape() -> None:
    values = {"x": Value((1, 2)), "y": Value((1, 4))}
    graph = Graph(values, [Body("same", np.copy, (Slice("x"),), (Slice("y"),), "numpy")], ["x"], ["y"])
    with pytest.raises(ValueError, match=r"same: expected to return float32 \(1, 4\)"):
        Executor(graph, Placement.sequential(graph))(np.zeros((1, 2), np.float32))
