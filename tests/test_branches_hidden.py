"""What goes wrong unseen: calls of another form, bodies that are not what they look like, state that is left behind."""

from __future__ import annotations

import contextvars
import copy
import inspect
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from branch_graphs import CORES, both, make_graph, spread, two_cores
from torch import nn

import pycodesign.nn
from pycodesign import ops, quantize
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
    build_parnet,
    describe_machine,
    place,
    predict,
    profile,
    search,
)
from pycodesign.branches.exact import solve
from pycodesign.branches.profiling import list_body_probes, make_table
from pycodesign.branches.reinforce import place_by_policy
from pycodesign.branches.simulate import Problem
from pycodesign.branches.training import to_data
from pycodesign.repetition.chain import Chain


def make_chain(outputs: int = 1) -> Chain:
    chain = Chain()
    x = chain.input()
    chain.output(*(chain.add(x, x) for _ in range(outputs)))
    return chain


# run_branches


@both
@pytest.mark.parametrize("to_kind", [np.asarray, torch.from_numpy])
def test_layers_and_chains_take_what_their_functions_do(timeout: float | None, to_kind: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    x = to_kind(rng.standard_normal((2, 4, 5, 5), dtype=np.float32))
    layer = ops.prepack_conv2d(quantize.ternary(rng.standard_normal((3, 4, 3, 3), dtype=np.float32)), padding=1)
    found = ops.run_branches([layer, layer, make_chain(), make_chain(2)], x, timeout=timeout)
    for got, wanted in zip([*found[:3], *found[3]], [*[ops.conv2d(x, layer)] * 2, *[2 * x] * 3], strict=True):
        assert type(got) is type(x)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted), strict=True)


@both
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (4, 1, 1, 5), (0, 5), (2, 0, 5)])
def test_linear_layers_take_any_rows(shape: tuple[int, ...], timeout: float | None) -> None:
    rng = np.random.default_rng(0)
    layer = ops.prepack_linear(quantize.ternary(rng.standard_normal((3, 5), dtype=np.float32)))
    x = rng.standard_normal(shape, dtype=np.float32)
    for got in ops.run_branches([layer, layer], x, timeout=timeout):
        np.testing.assert_array_equal(got, ops.linear(x, layer), strict=True)
    with pytest.raises(ValueError, match=r": expected float32 \(\.\.\., 5\), got float32 "):
        ops.run_branches([layer], x[..., :4], timeout=timeout)


def test_no_more_threads_than_cores() -> None:
    count, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal count, most
        with lock:
            count += 1
            most = max(most, count)
        time.sleep(0.005)
        with lock:
            count -= 1

    before = threading.active_count()
    found = ops.run_branches([work] * (3 * CORES), timeout=60)
    assert found == [None] * (3 * CORES) and most <= CORES and threading.active_count() <= before + CORES


@two_cores
def test_refused_threads_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "team 1":
            raise RuntimeError("can't start new thread")
        start(thread)

    values = {name: Value((1, 4)) for name in "xab"}
    bodies = [Body(y, np.copy, (Slice(x),), (Slice(y),), "numpy") for x, y in ("xa", "ab")]
    executor = Executor(Graph(values, bodies, ["x"], ["b"]), Placement((("b",), ("a",))), timeout=60)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        executor(np.zeros((1, 4), np.float32))
    end = time.monotonic() + 10
    while any(thread.name == "team 0" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_timeouts_longer_than_python_waits() -> None:
    assert ops.run_branches([time.sleep], 0.1, timeout=1e10) == [None]


INVALID_THREADS = """
import threading, torch
from pycodesign import _core, ops, set_num_threads
try:
    ops.run_branches([len, len], "x")
except ValueError as error:
    print(error)
set_num_threads(2)
meeting = threading.Barrier(2)
ops.run_branches([lambda: meeting.wait(20)] * 2)
"""


@two_cores
def test_the_team_is_given_back_after_an_error() -> None:
    environment = {**os.environ, "PYCODESIGN_NUM_THREADS": "two"}
    command = [sys.executable, "-P", "-c", INVALID_THREADS]
    out = subprocess.run(command, env=environment, check=True, timeout=200, stdout=subprocess.PIPE, text=True).stdout
    assert out in ("", "PYCODESIGN_NUM_THREADS: expected a number from 1 to 4096, got 'two'\n")  # "": no OpenMP


@both
def test_default_device_and_autocast_of_a_gpu(timeout: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        found = ops.run_branches([lambda: torch.zeros(1).device.type] * 3, timeout=timeout)
    assert found == ["meta"] * 3
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    with torch.autocast("cuda", torch.float16):
        assert ops.run_branches([lambda: torch.is_autocast_enabled("cuda")] * 3, timeout=timeout) == [True] * 3
    assert ops.run_branches([lambda: torch.is_autocast_enabled("cuda")] * 3, timeout=timeout) == [False] * 3


# Bodies


@both
def test_bodies_have_the_callers_context(timeout: float | None) -> None:
    variable: contextvars.ContextVar[float] = contextvars.ContextVar("variable", default=1)

    def scale(x: Any) -> Any:
        factor = variable.get()
        variable.set(100)
        return x * np.float32(factor)

    graph, x = make_graph(scale), np.ones((1, 4), np.float32)
    executor = Executor(graph, spread(graph), timeout=timeout)
    for factor in (3, 4):
        variable.set(factor)
        assert [float(y[0, 0]) for y in executor(x)] == [factor] * 2
        assert variable.get() == factor
    graph = make_graph(lambda x: x / np.float32(0))
    executor = Executor(graph, spread(graph), timeout=timeout)
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        executor(x)
    with np.errstate(divide="ignore"):
        assert np.isinf(executor(x)[1]).all()


def convert(*modules: nn.Module) -> nn.Module:
    return pycodesign.nn.convert(nn.Sequential(*modules).eval(), "ternary")


def test_subclasses_of_packed_modules_run_what_they_say() -> None:
    class Negative(pycodesign.nn.Linear):
        def forward(self, *inputs: Any) -> Any:
            return -super().forward(*inputs)

    x, layer = torch.randn(2, 4), Negative.from_float(nn.Linear(4, 4), "ternary")
    graph = make_graph(layer, (2, 4), "torch")
    found = Executor(graph, spread(graph))(x)
    assert torch.equal(found[1], layer(x)) and torch.equal(found[1], graph(x)[1])
    segment = next(convert(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).children())
    plain = type(segment)
    assert plain is pycodesign.nn.modules.Segment
    segment.__class__ = type("Negative", (plain,), {"forward": lambda self, x: -plain.forward(self, x)})
    graph = make_graph(segment, (2, 4), "torch")
    assert torch.equal(Executor(graph, spread(graph))(x)[1], graph(x)[1])


def test_hooks_of_all_modules() -> None:
    module, x = convert(nn.Linear(4, 4)), torch.randn(2, 4)
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, result: result + 1)
    try:
        graph = make_graph(module, (2, 4), "torch")
        assert torch.equal(Executor(graph, spread(graph))(x)[1], graph(x)[1])
    finally:
        handle.remove()


def test_linear_layers_read_the_last_dimension() -> None:
    x = torch.randn(2, 3, 5, 4)
    for modules in ([nn.Linear(4, 4)], [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)]):
        module = convert(*modules)
        graph = make_graph(module, tuple(x.shape), "torch")
        assert torch.equal(Executor(graph, spread(graph))(x)[1], graph(x)[1])


@both
def test_a_chain_takes_arrays_whatever_the_body_says(timeout: float | None) -> None:
    graph, x = make_graph(make_chain(), arrays="torch"), torch.ones(1, 4)
    assert graph.bodies["a"].arrays == "numpy"
    for found in (graph(x), Executor(graph, spread(graph), timeout=timeout)(x)):
        assert [y.tolist() for y in found] == [[[2] * 4]] * 2
    with pytest.raises(ValueError, match="arrays: expected 'torch' or 'numpy', got 'Torch'"):
        Body("a", np.copy, (Slice("x"),), (Slice("a"),), "Torch")


def test_a_chain_with_other_results_than_its_body() -> None:
    graph = make_graph(make_chain(2))
    with pytest.raises(ValueError, match=r"a: expected 1 results, got a chain of 2"):
        Executor(graph, spread(graph))


@both
@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: None, "a: expected a NumPy array or a torch tensor, got NoneType"),
        (lambda x: x.bfloat16(), "a: expected a dtype that NumPy has, got torch.bfloat16"),
        (lambda x: torch.empty(1, 4, device="meta"), "a: expected an array in host memory, got a tensor on meta"),
    ],
)
def test_results_that_are_no_arrays_name_their_body(run: Any, message: str, timeout: float | None) -> None:
    graph, x = make_graph(run, arrays="torch", names="a"), torch.ones(1, 4)
    for call in (graph, Executor(graph, Placement.sequential(graph), timeout=timeout)):
        with pytest.raises(TypeError, match=message):
            call(x)


def test_torch_bodies_may_return_arrays() -> None:
    graph = make_graph(lambda x: x.numpy() + 1, arrays="torch", names="a")
    assert graph(torch.ones(1, 4))[0].tolist() == [[2] * 4]


def test_inputs_with_a_gradient_and_of_any_alignment() -> None:
    chained, plain = make_graph(make_chain()), make_graph(np.copy)
    x = torch.ones(1, 4, requires_grad=True)
    assert not plain(x)[0].requires_grad and torch.equal(chained(x)[1], Executor(chained, spread(chained))(x)[1])
    shifted = np.ones(17, np.uint8)[1:].view(np.float32).reshape(1, 4)
    assert not shifted.flags.aligned
    np.testing.assert_array_equal(Executor(chained, spread(chained))(shifted)[0], chained(shifted)[0])


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


def test_shapes_may_be_lists() -> None:
    graph = make_graph(np.copy, [1, 4])  # type: ignore[arg-type]
    assert graph(np.ones((1, 4), np.float32))[0].shape == (1, 4)


def test_finished_chains_are_copied() -> None:
    space = Space(branches=2, segments=1, layers=1, width=4, size=8, operators=("skip", "pool"), gates=("none",))
    graph = space.build(space.sample()).to_graph()
    x = torch.rand(space.input_shape())
    assert torch.equal(copy.deepcopy(graph)(x)[0], graph(x)[0])
    with pytest.raises(TypeError, match="chain: expected outputs before it is copied"):
        copy.deepcopy(Chain())
    with pytest.raises(TypeError, match="chain: expected to be made anew"):
        pickle.dumps(make_chain())


# Processes


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Interrupt(BaseException):
    """As of the keyboard."""


@pytest.mark.parametrize("error", [AssertionError, Interrupt])
def test_processes_remember_any_failure(error: type[BaseException], group: None) -> None:
    def fail(x: Any) -> Any:
        raise error

    graph, x = make_graph(fail), np.ones((1, 4), np.float32)
    executor = Executor(graph, Placement.sequential(graph), "distributed")
    with pytest.raises(error):
        executor(x)
    with pytest.raises(RuntimeError, match=rf"an executor that failed before \({error.__name__}\)"):
        executor(x)


def test_what_processes_take_and_return(group: None) -> None:
    graph = make_graph(lambda x: None, arrays="torch", names="a")
    with pytest.raises(TypeError, match=r"a: expected to return torch.float32 \(1, 4\), got NoneType"):
        Executor(graph, Placement.sequential(graph), "distributed")(torch.ones(1, 4))
    with pytest.raises(TypeError, match="table: expected a LatencyTable, got dict"):
        Executor(graph, Placement.sequential(graph), "distributed", table={})
    graph = make_graph(torch.abs, arrays="torch", names="a")
    executor = Executor(graph, Placement.sequential(graph), "distributed")
    assert not executor(torch.ones(1, 4, requires_grad=True))[0].requires_grad


# Placements and tables


def test_no_placement_is_faster_than_the_bound() -> None:
    graph, rng = build_parnet(streams=3, width=8, size=8).to_graph(), np.random.default_rng(0)
    for _ in range(20):
        solo = {name: float(rng.uniform(1e-5, 1e-4)) for name in graph.bodies}
        entries = {name: {"solo/1": s, "together/1": s * float(rng.uniform(1, 2))} for name, s in solo.items()}
        table = LatencyTable(describe_machine(), entries, sync=1e-6)
        found = place(graph, table)
        assert found.latency is not None and found.bound is not None
        assert 0 < found.bound <= found.latency * (1 + 1e-9)


def test_exact_places_long_graphs() -> None:
    n, limit = 300, sys.getrecursionlimit()
    line = ((), *(((i, 10.0),) for i in range(n - 1)))
    problem = Problem(tuple(map(str, range(n + 3))), ((1.0, 1.0),) * (n + 3), (*line, *[((n - 1, 0.0),)] * 3))
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        found = solve(problem, limit=60)
    finally:
        sys.setrecursionlimit(limit)
    assert found.bound == found.latency == n + 2


@pytest.mark.parametrize("method", ["exact", "list", "reinforce"])
def test_graphs_without_bodies_are_placed(method: str) -> None:
    graph = Graph({"x": Value((1, 4))}, [], ["x"], ["x"])
    found = place(graph, LatencyTable(describe_machine(), {}), method=method)
    assert found.teams == ((),) and found.latency == 0
    assert Executor(graph, found)(np.ones((1, 4), np.float32))[0].tolist() == [[1] * 4]


def test_reinforce_in_any_mode() -> None:
    problem = Problem(("a", "b"), ((2.0, 2.0), (3.0, 3.0)), ((), ()))
    wanted = place_by_policy(problem, updates=3)
    with torch.inference_mode():
        assert place_by_policy(problem, updates=3) == wanted
    with torch.no_grad():
        assert place_by_policy(problem, updates=3) == wanted


def test_another_default_dtype() -> None:
    net, problem = build_parnet(width=8, size=8), Problem(("a", "b"), ((2.0, 2.0), (3.0, 3.0)), ((), ()))
    torch.set_default_dtype(torch.float64)
    try:
        assert {value.dtype for value in net.to_graph().values.values()} == {"float32"}
        assert len(place_by_policy(problem, updates=3)) == 2
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"entries": {"a": {"solo/1": float("nan")}}},
            ValueError,
            "a, solo/1: expected seconds from 0 to 1e.09, got nan",
        ),
        ({"entries": {"a": {"solo/1": float("inf")}}}, ValueError, "a, solo/1: expected seconds .*, got inf"),
        ({"entries": {"a": {"solo/1": -1.0}}}, ValueError, "a, solo/1: expected seconds .*, got -1"),
        ({"entries": {"a": {"solo/1": 1e308}}}, ValueError, "a, solo/1: expected seconds .*, got 1e.308"),
        ({"entries": {"a": {"solo/1": "1"}}}, TypeError, "a, solo/1: expected a number, got str"),
        ({"entries": {"a": 1.0}}, TypeError, "entries: expected seconds by threads for 'a', got float"),
        ({"entries": 3}, TypeError, "entries: expected a mapping, got int"),
        ({"machine": None}, TypeError, "machine: expected a mapping, got NoneType"),
        ({"sync": float("nan")}, ValueError, "sync: expected seconds"),
        ({"transfer": -1}, ValueError, "transfer: expected seconds"),
        ({"teams": 0}, ValueError, "teams: expected an integer >= 1, got 0"),
    ],
)
def test_tables_are_checked_when_made(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LatencyTable(**{"machine": {}, "entries": {}, **options})


def test_predict_needs_a_table() -> None:
    graph = make_graph(np.copy)
    with pytest.raises(TypeError, match="table: expected a LatencyTable, got dict"):
        predict(graph, Placement.sequential(graph), {})  # type: ignore[arg-type]


def test_bodies_with_names_of_probes() -> None:
    names = ("one", "line", "turns", "large line", "large turns", "body")
    values = {"x": Value((1, 2), "uint8"), **{name: Value((1, 2), "uint8") for name in names}}
    bodies = [Body(name, np.copy, (Slice("x"),), (Slice(name),), "numpy") for name in names]
    graph = Graph(values, bodies, ["x"], names)
    probes = list_body_probes(graph, 2)
    own = [key for key, probe in probes.items() if getattr(probe, "graph", None) is graph]
    assert len(own) == len(names)
    seconds = {key: {"solo/1": 7.0 if key in own else 0.0} for key in probes}
    table = make_table(graph, seconds, 2)
    assert [table.cost(name) for name in names] == [7] * len(names) and table.transfer == 0


def test_profile_leaves_the_dice_of_others() -> None:
    space = Space(branches=2, segments=1, layers=1, width=4, size=8, operators=("conv1x1:ternary",), gates=("none",))
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    profile(space, 1, rounds=1, calibration=1)
    assert torch.equal(torch.rand(1), wanted)


# Searches


def test_deep_text_is_no_architecture() -> None:
    with pytest.raises(ValueError, match="text: expected an architecture in JSON"):
        Architecture.from_json("[" * 100_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": float("nan")}, "budget: expected a finite number, 0 or more, got nan"),
        ({"budget": float("inf")}, "budget: expected a finite number, 0 or more, got inf"),
        ({"budget": -1}, "budget: expected a finite number, 0 or more, got -1"),
        ({"candidates": 0}, "candidates: expected an integer >= 1, got 0"),
        ({"candidates": -1}, "candidates: expected an integer >= 1, got -1"),
        ({"strength": float("nan")}, "strength: expected a finite number"),
    ],
)
def test_options_of_a_search(options: dict[str, Any], message: str) -> None:
    space = Space(branches=2, segments=1, layers=1, width=4, size=8, classes=4)
    data = torch.rand(20, 1, 8, 8), torch.arange(20) % 4
    with pytest.raises(ValueError, match=message):
        search(space, LatencyTable(describe_machine(), {}), data, target_ms=1.0, method="random", **options)


def test_labels_and_sizes_of_data() -> None:
    images, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 4
    assert len(to_data((images, labels), (1, 8, 8), 4)) == 20
    for bad, shape, message in (
        (labels, (1, 8, 9), r"data: expected images \(n, 1, 8, 9\), got \(20, 1, 8, 8\)"),
        (labels + 1, (1, 8, 8), "data: expected labels from 0 to 3, got 4"),
        (labels - 100, (1, 8, 8), "data: expected labels from 0 to 3, got -100"),
    ):
        with pytest.raises(ValueError, match=message):
            to_data((images, bad), shape, 4)
