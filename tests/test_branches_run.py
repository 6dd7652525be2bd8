"""`ops.run_branches`: results in order, callers at the same time, exceptions and timeouts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import branches_conformance as conformance
import numpy as np
import pytest
from branch_graphs import CORES, fail, two_cores

from pycodesign import ops
from pycodesign.branches import Executor, Placement


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


def test_errors_of_a_generator_are_its_own() -> None:
    def generate() -> Iterator[Any]:
        yield abs
        raise TypeError("of the generator")

    with pytest.raises(TypeError, match="of the generator"):
        ops.run_branches(generate(), 1)
    with pytest.raises(TypeError, match="branches: expected a sequence of callables, got int"):
        ops.run_branches(3, 1)  # type: ignore[arg-type]


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


def test_timeouts_longer_than_python_waits() -> None:
    assert ops.run_branches([time.sleep], 0.1, timeout=1e10) == [None]
