"""What else goes wrong unseen: layers that chains do not have, modes of a thread, names that meet, exits and forks."""

from __future__ import annotations

import contextvars
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from branch_graphs import CORES, both, make_graph, spread
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from pycodesign import ops
from pycodesign import quantize as to_levels
from pycodesign.branches import (
    Architecture,
    Body,
    Executor,
    Graph,
    LatencyTable,
    Network,
    Part,
    Placement,
    Slice,
    Space,
    Value,
    build_inception,
    build_parnet,
    describe_machine,
    place,
    predict,
    profile,
    search,
)
from pycodesign.branches.distributed import recompute_bodies
from pycodesign.branches.operators import BranchBody, Concatenate, Ternary, quantize
from pycodesign.branches.supernet import LatencyModel, Supernet
from pycodesign.branches.training import to_data
from pycodesign.repetition.chain import Chain

# Layers


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + super().forward(x)
        return found


class Twice(nn.AvgPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def conv(**options: Any) -> nn.Module:
    return quantize(nn.Conv2d(4, 4, 3, **{"padding": 1, **options}), Ternary())


def norm(**options: Any) -> nn.BatchNorm2d:
    found = nn.BatchNorm2d(4, **options)
    for name, value in found.state_dict().items():
        if value.ndim:
            getattr(found, name).data = torch.rand(4) + (0.5 if name.endswith("r") else 0)
    return found


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, inputs, result: result + 1)
    return module


LAYERS: dict[str, tuple[Callable[[], nn.Module], bool]] = {  # whether they are native
    "convolution": (conv, True),
    "dilation": (lambda: conv(dilation=2, padding=2), True),
    "stride and groups": (lambda: conv(stride=2, groups=2), True),
    "norm": (lambda: nn.Sequential(conv(), norm(), nn.ReLU()), True),
    "norm without weights": (lambda: nn.Sequential(conv(), norm(affine=False)), True),
    "nested": (lambda: nn.Sequential(nn.Sequential(conv(), nn.Identity()), nn.Sequential(norm(), nn.ReLU())), True),
    "pooling": (lambda: nn.AvgPool2d(3, 1, 1), True),
    "pooling without padding": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), True),
    "rows": (lambda: nn.Sequential(nn.Flatten(), quantize(nn.Linear(144, 3), Ternary()), nn.ReLU()), True),
    "reflection": (lambda: conv(padding_mode="reflect"), False),
    "same": (lambda: conv(padding="same"), False),
    "norm without running means": (lambda: nn.Sequential(conv(), norm(track_running_stats=False)), False),
    "norm of its batch": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), norm(track_running_stats=False)), False),
    "another divisor": (lambda: nn.AvgPool2d(2, divisor_override=1), False),
    "ceiling": (lambda: nn.AvgPool2d(4, ceil_mode=True), False),
    "subclass": (lambda: Twice(2), False),
    "residual": (lambda: Residual(conv(), nn.ReLU()), False),
    "residual of floats": (lambda: Residual(nn.Conv2d(4, 4, 1), norm()), False),
    "last dimension": (lambda: quantize(nn.Linear(6, 3), Ternary()), False),
    "flat at the end": (lambda: nn.Sequential(nn.AvgPool2d(2), nn.Flatten()), False),
    "flat from elsewhere": (lambda: nn.Sequential(nn.Flatten(2), quantize(nn.Linear(36, 3), Ternary())), False),
    "weight norm": (lambda: weight_norm(nn.Conv2d(4, 4, 9, padding=4)), False),
    "weight norm and norm": (lambda: nn.Sequential(weight_norm(nn.Conv2d(4, 4, 9, padding=4)), norm()), False),
    "hook": (lambda: hooked(conv()), False),
    "hook within": (lambda: nn.Sequential(conv(), hooked(nn.ReLU())), False),
    "hook before a norm": (lambda: nn.Sequential(hooked(nn.Conv2d(4, 4, 1)), norm()), False),
    "hook of all": (lambda: hooked(nn.Sequential(conv(), nn.ReLU())), False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_native_layers_do_what_torch_does(name: str) -> None:
    torch.manual_seed(0)
    make, is_native = LAYERS[name]
    module, x = make().eval(), torch.randn(2, 4, 6, 6)
    net = Network([(Part("stem", ("x",), (("y", 0),)), module)], (2, 4, 6, 6)).eval()
    graph = net.to_graph(native=True)
    assert isinstance(graph.bodies["stem"].run, Chain) == is_native
    np.testing.assert_allclose(graph(x)[0], net(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [lambda gate: hooked(gate), lambda gate: hooked(gate.conv), lambda gate: gate])
def test_gates_with_hooks_are_left_alone(change: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    gate = Concatenate(4)
    gate.norm = norm()
    change(gate)
    net = Network([(Part("a", ("x", "x"), (("y", 0),)), BranchBody([gate], []))], (2, 4, 6, 6)).eval()
    x, graph = torch.randn(2, 4, 6, 6), net.to_graph(native=True)
    assert isinstance(graph.bodies["a"].run, Chain) == (not gate._forward_hooks and not gate.conv._forward_hooks)
    np.testing.assert_allclose(graph(x)[0], net(x).detach(), rtol=1e-4, atol=1e-4)


def test_networks_with_unknown_layers_are_placed() -> None:
    parts: list[tuple[Part, nn.Module]] = [(Part("a", ("x",), (("y", 0),)), weight_norm(nn.Conv2d(4, 4, 9, padding=4)))]
    table = LatencyTable(describe_machine(), {"a": {"solo/1": 1e-5}})
    assert place(Network(parts, (1, 4, 6, 6)), table).teams == (("a",),)


# Modes of one thread


def square(x: Tensor) -> Tensor:
    return (x * x).sum()


def cube(x: Tensor) -> Tensor:
    return (x * x * x).sum()


def run_both(x: Tensor) -> Tensor:
    first, second = ops.run_branches([square, cube], x)
    return first + second  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of torch.func.jvp
def test_transforms_of_branches() -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    wanted = 2 * x + 3 * x * x
    assert torch.equal(torch.func.grad(run_both)(x), wanted)
    value, tangent = torch.func.jvp(run_both, (x,), (torch.ones(3),))
    assert value == run_both(x) and tangent == wanted.sum()
    assert torch.equal(torch.func.vmap(run_both)(torch.stack([x, 2 * x])), torch.stack([run_both(x), run_both(2 * x)]))
    assert torch.equal(torch.func.hessian(run_both)(x), torch.diag(2 + 6 * x))


def test_modes_and_hooks_see_all_branches() -> None:
    x = torch.ones(4, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ops.run_branches([lambda: x @ x] * 3)
    assert counter.get_total_flops() == 3 * 2 * 4**3
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor)
        return len(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index - 1]):
        ops.run_branches([lambda: x.sin()] * 3)
    assert len(packed) == 3
    with FlopCounterMode(display=False), pytest.raises(RuntimeError, match="timeout: expected None where torch has"):
        ops.run_branches([abs, abs], -1.0, timeout=60)


def test_context_variables() -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    variable.set(3)

    def change(x: int) -> int:
        before = variable.get()
        variable.set(before + x)
        return before

    def fail(x: int) -> None:
        variable.set(x)
        raise ArithmeticError

    for timeout in (None, 60):
        assert ops.run_branches([abs, change, change, change], 4, timeout=timeout) == [4, 3, 3, 3]
        with pytest.raises(ArithmeticError):
            ops.run_branches([abs, fail], 4, timeout=timeout)
        assert variable.get() == 3
    with FlopCounterMode(display=False):  # all on this thread
        assert ops.run_branches([abs, change, change], 4) == [4, 3, 3]
        with pytest.raises(ArithmeticError):
            ops.run_branches([abs, fail], 4)
    assert variable.get() == 3


def test_errors_of_a_generator_are_its_own() -> None:
    def generate() -> Iterator[Any]:
        yield abs
        raise TypeError("of the generator")

    with pytest.raises(TypeError, match="of the generator"):
        ops.run_branches(generate(), 1)
    with pytest.raises(TypeError, match="branches: expected a sequence of callables, got int"):
        ops.run_branches(3, 1)  # type: ignore[arg-type]


# Copies of a stem


def make_diamond(stem: str = "s", other: str = "a") -> Graph:
    """x + 1 in `other`, its double in the stem, which b and c read."""
    values = {name: Value((1, 4)) for name in ("x", "p", "q", "y", "z")}
    bodies = [
        Body(other, lambda x: x + 1, (Slice("x"),), (Slice("p"),), "numpy"),
        Body(stem, lambda p: 2 * p, (Slice("p"),), (Slice("q"),), "numpy", may_recompute=True),
        Body("b", lambda q: q + 3, (Slice("q"),), (Slice("y"),), "numpy"),
        Body("c", lambda q: q + 4, (Slice("q"),), (Slice("z"),), "numpy"),
    ]
    return Graph(values, bodies, ["x"], ["y", "z"])


@pytest.mark.parametrize("teams", [(("a", "s", "b"), ("c",)), (("c",), ("a", "s", "b")), (("s", "b"), ("a", "c"))])
def test_copies_come_behind_what_they_read(teams: tuple[tuple[str, ...], ...]) -> None:
    graph, given = make_diamond(), Placement(teams)
    table = LatencyTable({}, {name: {"solo/1": 1e-6} for name in (*graph.bodies, "s.0", "s.1")}, sync=1.0)
    for choice, entries in (("always", None), ("auto", table), ("always", table)):
        changed, moved = recompute_bodies(graph, given, choice, entries)
        moved.check(changed)
        assert set(changed.bodies) == {"a", "s.0", "s.1", "b", "c"}
        for team, names in enumerate(moved.teams):
            assert f"s.{team}" in names
        assert changed(np.ones((1, 4), np.float32))[1].tolist() == [[8] * 4]


def test_copies_take_names_that_are_free() -> None:
    graph = make_diamond("s", "s.0")
    changed, moved = recompute_bodies(graph, Placement((("s.0", "s", "b"), ("c",))), "always")
    assert moved.teams == (("s.0", "s.0'", "b"), ("s.1", "c"))
    assert changed(np.ones((1, 4), np.float32))[0].tolist() == [[7] * 4]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_processes_take_inputs_of_any_strides(group: None) -> None:
    graph = make_graph(np.copy)
    executor = Executor(graph, Placement.sequential(graph), "distributed")
    x = np.arange(4, dtype=np.float32).reshape(1, 4)
    constant = x.copy()
    constant.flags.writeable = False
    for given in (x[:, ::-1], constant, x):
        np.testing.assert_array_equal(executor(given)[0], given)


# Threads, exits and forks


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


def run_script(script: str) -> str:
    """Run lines of Python in a process of its own, and return what they print."""
    lines = "import os, sys, threading, time\nimport numpy as np\nfrom pycodesign import ops\n"
    lines += "from pycodesign.branches import Body, Executor, Graph, Placement, Slice, Value\n"
    lines += "x = np.ones((1, 4), np.float32)\nbegun = threading.Event()\n"
    lines += "def make(run):\n    values = {name: Value((1, 4)) for name in 'xab'}\n"
    lines += "    bodies = [Body(name, run, (Slice('x'),), (Slice(name),), 'numpy') for name in 'ab']\n"
    lines += (
        f"    return Executor(Graph(values, bodies, ['x'], ['a', 'b']), Placement({spread(make_graph(abs)).teams!r}))\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", lines + script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("call", ["make(wait)(x)", "ops.run_branches([wait] * 2, x)", "make(count)(x)"])
def test_python_exits_while_a_daemon_is_in_a_body(call: str) -> None:
    script = "class Last:\n    def __del__(self, sleep=time.sleep):\n        sleep(1)\n"  # in the end of Python
    script += "last = Last()\ndef wait(x):\n    begun.set()\n    time.sleep(0.3)\n    return x\n"
    script += "def count(x):\n    begun.set()\n    while True:\n        pass\n"
    script += f"threading.Thread(target=lambda: {call}, daemon=True).start()\nbegun.wait()\nprint('end')\n"
    assert run_script(script) == "end\n"


def test_forks_while_another_thread_is_in_an_executor() -> None:
    script = "def wait(x):\n    begun.set()\n    time.sleep(0 if forked else 1)\n    return x + 1\n"
    script += "forked, run = False, make(wait)\nthread = threading.Thread(target=run, args=(x,))\nthread.start()\n"
    script += "begun.wait()\nchild = os.fork()\nif child == 0:\n    forked = True\n"
    script += "    os._exit(7 if [y.tolist() for y in run(x) + run(x)] == [[[2] * 4]] * 4 else 8)\n"
    script += "end = time.monotonic() + 60\n"
    script += (
        "while not (found := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:\n    time.sleep(0.01)\n"
    )
    script += "if not found[0]:\n    os.kill(child, 9)\nprint(os.waitstatus_to_exitcode(found[1]), run(x)[0])\n"
    assert run_script(script) == "7 [[2. 2. 2. 2.]]\n"


def test_timed_branches_within_branches_take_no_more_threads() -> None:
    lock, threads = threading.Lock(), set[int]()

    def note(x: Any) -> None:
        with lock:
            threads.add(threading.get_ident())
        time.sleep(0.01)

    ops.run_branches([lambda x: ops.run_branches([note] * 4, x)] * CORES, 1, timeout=60)
    assert len(threads) <= CORES


# Packed layers as bodies


@pytest.mark.parametrize("options", [{}, {"backend": "threads", "timeout": 60}, {"backend": "distributed"}])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (1, 2, 1, 5), (2, 5, 4, 4)])
def test_packed_layers_are_bodies(shape: tuple[int, ...], options: dict[str, Any], group: None) -> None:
    rng = np.random.default_rng(0)
    kernel = (3, 3) if shape[1:] == (5, 4, 4) else ()
    weights = to_levels.ternary(rng.standard_normal((6, 5, *kernel), dtype=np.float32))
    layer = ops.prepack_conv2d(weights, padding=1) if kernel else ops.prepack_linear(weights)
    x = rng.standard_normal(shape, dtype=np.float32)
    wanted = ops.conv2d(x, layer) if kernel else ops.linear(x, layer)
    values = {"x": Value(shape), "a": Value(wanted.shape)}
    graph = Graph(values, [Body("a", layer, (Slice("x"),), (Slice("a"),), "torch")], ["x"], ["a"])
    assert graph.bodies["a"].arrays == "numpy"
    executor = Executor(graph, Placement.sequential(graph), **options)
    for found in (graph(x), executor(x), [layer(x)]):
        np.testing.assert_array_equal(found[0], wanted, strict=True)


def test_packed_layers_take_one_input() -> None:
    layer, x = ops.prepack_linear(to_levels.ternary(np.eye(4, dtype=np.float32))), np.ones((1, 4), np.float32)
    for timeout in (None, 60):
        with pytest.raises(TypeError, match="inputs: expected 1 arrays, got 2"):
            ops.run_branches([layer, layer], x, x, timeout=timeout)


# Names and tables


@pytest.mark.parametrize("name", ["a.b", "a_b", "keys", "training", ""])
def test_parts_do_not_share_a_module(name: str) -> None:
    parts = [(Part(n, ("x",), ((n, 0),)), nn.ReLU()) for n in ("a_b", name)]
    with pytest.raises(ValueError, match=f"parts: expected names that differ in more than '.' and '_', .*{name!r}"):
        Network(parts, (1, 4))


SPACE = Space(branches=2, segments=1, layers=1, width=4, size=8, operators=("conv1x1:ternary", "skip"), gates=("none",))


def make_table(space: Space, **options: Any) -> LatencyTable:
    """A microsecond for everything that networks of a space may do."""
    architecture = space.sample()
    keys = {key for body in space.build(architecture).to_graph().bodies.values() for key in body.costs}
    for operator in space.operators:
        for segment in range(space.segments):
            for native in (True, False):
                keys |= {space.layer_key(operator, segment, 0, native=native), space.means_key(segment, native=native)}
    return LatencyTable(describe_machine(), {key: {"solo/1": 1e-6} for key in (*keys, "body")}, **options)


def test_tables_of_a_space_hold_for_its_size() -> None:
    net, table = SPACE.build(SPACE.sample()), make_table(SPACE)
    assert predict(net.to_graph(), Placement.sequential(net.to_graph()), table) > 0
    for shape in ((64, 1, 8, 8), (1, 1, 32, 32)):
        graph = net.to_graph(shape)
        assert isinstance(graph.bodies["branch.0.0"].run, Chain)
        with pytest.raises(ValueError, match="table: expected an entry for 'stem'"):
            predict(graph, Placement.sequential(graph), table)


def test_tables_of_a_graph_hold_for_its_bodies() -> None:
    graph = SPACE.build(SPACE.sample()).to_graph()
    table = profile(graph, 1, rounds=1)
    assert place(graph, table, 1).latency == pytest.approx(sum(table.cost(name) for name in graph.bodies), abs=1e-3)
    assert profile(Graph({}, [], [], []), 1, rounds=1).cost("body") >= 0


def test_teams_of_other_widths_are_slowed_by_their_own_share() -> None:
    graph = make_graph(np.copy)
    row = {"solo/1": 1e-3, "together/1": 2e-3, "solo/2": 6e-4, "together/2": 6e-4}
    table = LatencyTable(describe_machine(), {"a": row, "b": row})
    for teams, threads in ((("a",), ("b",)), (1, 2)), ((("b",), ("a",)), (2, 1)):
        assert predict(graph, Placement(teams, threads), table) == pytest.approx(6e-4 + (1e-3 - 3e-4))


def test_the_bound_has_the_cost_of_a_run() -> None:
    graph = make_graph(np.copy)
    table = LatencyTable(describe_machine(), {name: {"solo/1": 1e-3} for name in "ab"}, {"solo/1": 1e-4})
    for workers in (1, 2):
        found = place(graph, table, workers)
        assert found.bound == found.latency == pytest.approx(2e-3 / workers + 1e-4)


def test_recomputed_stems_wait_for_nobody() -> None:
    seconds = {}
    for stem in ("shared", "recomputed"):
        space = Space(**{**vars(SPACE), "stem": stem})
        model = LatencyModel(space, make_table(space, sync=1e-3), 2)
        seconds[stem] = model.seconds(space.sample())
        graph = space.build(space.sample()).to_graph()
        teams = [[name for name, body in graph.bodies.items() if max(body.branch, 0) == branch] for branch in (0, 1)]
        assert seconds[stem] == pytest.approx(
            predict(graph, Placement(tuple(map(tuple, teams))), model.table), abs=1e-5
        )
        other = Architecture(space.sample().operators, (), "recomputed" if stem == "shared" else "shared")
        with pytest.raises(ValueError, match=f"architecture: expected a {stem} stem, got '{other.stem}'"):
            space.check(other)
    assert seconds["shared"] - seconds["recomputed"] == pytest.approx(1e-3, abs=1e-5)


def test_tables_keep_numbers_of_python(tmp_path: Path) -> None:
    row = MappingProxyType({"solo/1": np.float32(0.5)})
    table = LatencyTable(
        MappingProxyType(describe_machine()), MappingProxyType({"a": row}), sync=np.float64(1), teams=np.int64(2)
    )  # type: ignore[arg-type]
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table and table.entries == {"a": {"solo/1": 0.5}}


@pytest.mark.parametrize("dtype", [np.dtype("float32"), np.float32])
def test_dtypes_of_numpy(dtype: Any, group: None) -> None:
    values = {name: Value((1, 4), dtype) for name in "xa"}
    graph = Graph(values, [Body("a", np.copy, (Slice("x"),), (Slice("a"),), "numpy")], ["x"], ["a"])
    for backend in ("threads", "distributed"):
        assert Executor(graph, Placement.sequential(graph), backend)(np.ones((1, 4), np.float32))[0].sum() == 4
    assert profile(graph, 1, rounds=1).cost("a") >= 0
    with pytest.raises(TypeError, match="dtype: expected 'float32', 'uint8', 'int8' or 'int32', got dtype"):
        Value((1, 4), torch.float32)  # type: ignore[arg-type]


# Searches


def test_supernets_have_their_gates_in_order() -> None:
    space = Space(branches=2, segments=2, layers=1, width=4, size=8, gates=("pooled", "add", "none", "concatenate"))
    gates = [name.split("_")[-1] for name in Supernet(space).gates]
    assert gates == ["pooled", "add", "concatenate"] * 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_searches_in_any_mode(mode: Any) -> None:
    with mode():
        data = torch.rand(20, 1, 8, 8, requires_grad=mode is torch.enable_grad), torch.arange(20) % 4
        space = Space(**{**vars(SPACE), "classes": 4})
        options: dict[str, Any] = {"target_ms": 1e3, "steps": 4, "train_steps": 2, "finalists": 1, "batch": 4}
        net = search(space, make_table(space), data, **options)
    assert net.found is not None and all(p.requires_grad for p in net.parameters())


def test_images_are_finite() -> None:
    images = torch.rand(20, 1, 8, 8)
    images[3, 0, 2, 2] = torch.nan
    with pytest.raises(ValueError, match="data: expected finite images, got nan"):
        to_data((images, torch.arange(20) % 4), (1, 8, 8), 4)


# Messages

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


def test_bodies_without_outputs() -> None:
    seen: list[Any] = []
    body = Body("a", lambda x: seen.append(x.sum()) or (), (Slice("x"),), (), "numpy")
    graph = Graph({"x": Value((1, 4))}, [body], ["x"], ["x"])
    Executor(graph, Placement.sequential(graph))(np.ones((1, 4), np.float32))
    assert seen == [4]


def test_the_package_is_a_command() -> None:
    done = subprocess.run([sys.executable, "-P", "-m", "pycodesign", "--version"], capture_output=True, text=True)
    assert re.match("pycodesign, version ", done.stdout), done.stderr
