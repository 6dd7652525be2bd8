"""Threads that run branches: how many, on which cores, and that they are given back after an error."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import Any

import branches_conformance as conformance
import numpy as np
import pytest
from branch_graphs import CORES, fail, two_cores

import pycodesign
from pycodesign import ops
from pycodesign.branches import Body, Executor, Graph, Placement, Slice, Value


@two_cores
def test_each_has_one_thread() -> None:
    for timeout in (None, 60):
        assert ops.run_branches([pycodesign.get_num_threads] * 2, timeout=timeout) == [1, 1]


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


def test_timed_branches_within_branches_take_no_more_threads() -> None:
    lock, threads = threading.Lock(), set[int]()

    def note(x: Any) -> None:
        with lock:
            threads.add(threading.get_ident())
        time.sleep(0.01)

    ops.run_branches([lambda x: ops.run_branches([note] * 4, x)] * CORES, 1, timeout=60)
    assert len(threads) <= CORES


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
