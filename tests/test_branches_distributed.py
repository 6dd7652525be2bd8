"""The backend of processes: the conformance suite on two and three of them, lost peers, what it takes and refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from branch_graphs import make_graph

from pycodesign import ops
from pycodesign import quantize as to_levels
from pycodesign.branches import Body, Executor, Graph, Placement, Slice, Value, build_parnet, profile

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def run_processes(size, task, store, wait=120):
    command = [sys.executable, "-W", "error", str(Path(__file__).parent / "branches_worker.py")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(store), task],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        return [(*process.communicate(timeout=wait), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("task, size", [("conform", 2), ("conform", 3), ("pairs", 3)])
def test_processes_compute_as_one(task, size, tmp_path):
    for out, err, code in run_processes(size, task, tmp_path / "store"):
        assert (out, code) == ("fine\n", 0), err


def test_executors_of_one_group_keep_their_messages(tmp_path):
    for out, err, code in run_processes(2, "two", tmp_path / "store"):
        assert (out, code) == ("[1.0, 2.0]\n", 0), err


@pytest.mark.parametrize("task", ["dies", "hangs"])
def test_a_lost_peer_is_an_error(task, tmp_path):
    (out, err, _), _ = run_processes(2, task, tmp_path / "store")
    lines = out.splitlines()
    assert len(lines) == 3, out + err
    assert lines[0].startswith("ConnectionError: rank 0: expected to "), out
    assert "rank 1 within 2 s, got none after" in lines[0]
    assert lines[1].startswith("RuntimeError: run: expected all processes, got an executor that failed before")
    assert float(lines[2].split()[1]) < 5


def test_other_placements_are_an_error(tmp_path):
    for rank, (out, err, _) in enumerate(run_processes(2, "other", tmp_path / "store")):
        wanted = f"the same graph and placement on all ranks, got others on rank {1 - rank}"
        assert wanted in out, out + err


def test_what_is_refused(tmp_path):
    graph = build_parnet(width=8, size=8).to_graph()
    place = Placement.sequential(graph)
    with pytest.raises(RuntimeError, match="init_process_group to have been called, got no group"):
        Executor(graph, place, backend="distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for options, message in [
            ({"timeout": 0}, "timeout: expected a positive number of seconds"),
            ({"link_delay": -1}, "link_delay: expected seconds, fewer than the timeout"),
            ({"recompute": "maybe"}, "recompute: expected 'auto', 'always' or 'never', got 'maybe'"),
        ]:
            with pytest.raises(ValueError, match=message):
                Executor(graph, place, backend="distributed", **options)
        if not torch.cuda.is_available():
            with pytest.raises(RuntimeError, match="device: torch sees no CUDA device, got 'cuda'"):
                Executor(graph, place, backend="distributed", device="cuda")
        with pytest.raises(ValueError, match="group: expected 2 processes, one for each team, got 1"):
            Executor(graph, Placement((*place.teams, ())), backend="distributed")
    finally:
        dist.destroy_process_group()


# One process


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
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


def test_processes_take_inputs_of_any_strides(group: None) -> None:
    graph = make_graph(np.copy)
    executor = Executor(graph, Placement.sequential(graph), "distributed")
    x = np.arange(4, dtype=np.float32).reshape(1, 4)
    constant = x.copy()
    constant.flags.writeable = False
    for given in (x[:, ::-1], constant, x):
        np.testing.assert_array_equal(executor(given)[0], given)


# Processes and threads alike


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


@pytest.mark.parametrize("dtype", [np.dtype("float32"), np.float32])
def test_dtypes_of_numpy(dtype: Any, group: None) -> None:
    values = {name: Value((1, 4), dtype) for name in "xa"}
    graph = Graph(values, [Body("a", np.copy, (Slice("x"),), (Slice("a"),), "numpy")], ["x"], ["a"])
    for backend in ("threads", "distributed"):
        assert Executor(graph, Placement.sequential(graph), backend)(np.ones((1, 4), np.float32))[0].sum() == 4
    assert profile(graph, 1, rounds=1).cost("a") >= 0
    with pytest.raises(TypeError, match="dtype: expected 'float32', 'uint8', 'int8' or 'int32', got dtype"):
        Value((1, 4), torch.float32)  # type: ignore[arg-type]
