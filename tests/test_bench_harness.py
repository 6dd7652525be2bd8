"""The harness of benchmarks times what it says, hot and cold, and names the machine."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from pycodesign.bench import harness
from pycodesign.bench.harness import Evictor, Spread, gather_facts, measure


class FakeMachine:
    """A clock, and caches that the first run after an eviction fills."""

    def __init__(self) -> None:
        self.now = 0.0
        self.cached: str | None = None
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def evict(self) -> None:
        self.cached = None


class FakeContender:
    def __init__(self, name: str, machine: FakeMachine, hot: float, cold: float) -> None:
        self.name, self.machine, self.hot, self.cold = name, machine, hot, cold

    def run(self) -> None:
        self.machine.now += self.hot if self.machine.cached == self.name else self.cold
        self.machine.cached = self.name
        self.machine.log.append(self.name)


@pytest.fixture
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    monkeypatch.setattr(harness, "_preemptions", lambda: 0)
    return FakeMachine()


def test_spread_is_robust() -> None:
    spread = Spread.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert spread == Spread(median=3.0, iqr=2.0, mad=1.0, minimum=1.0, count=5, disturbed=0)


def test_measure_separates_hot_from_cold(quiet_machine: FakeMachine) -> None:
    contenders = [FakeContender("a", quiet_machine, 1.0, 3.0), FakeContender("b", quiet_machine, 2.0, 7.0)]
    timings = measure(contenders, rounds=4, pause=0, evict=quiet_machine.evict, clock=quiet_machine.clock)
    assert list(timings) == contenders
    a, b = timings.values()
    assert (a.hot.median, a.cold.median) == (1.0, 3.0)
    assert (b.hot.median, b.cold.median) == (2.0, 7.0)
    assert b.cold.count == 4


def test_measure_rotates_the_order(quiet_machine: FakeMachine) -> None:
    contenders = [FakeContender(name, quiet_machine, 1.0, 1.0) for name in "abc"]
    measure(contenders, rounds=3, pause=0, evict=quiet_machine.evict, clock=quiet_machine.clock)
    assert "".join(dict.fromkeys(quiet_machine.log[:9])) == "abc"
    assert "".join(dict.fromkeys(quiet_machine.log[9:18])) == "bca"
    assert "".join(dict.fromkeys(quiet_machine.log[18:])) == "cab"


def test_measure_repeats_disturbed_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine()
    monkeypatch.setattr(harness, "_preemptions", lambda: len(machine.log))
    (timing,) = measure([FakeContender("a", machine, 1.0, 1.0)], rounds=2, pause=0, evict=machine.evict).values()
    assert timing.hot.disturbed == timing.hot.count == 2
    assert len(machine.log) == 2 * harness.ATTEMPTS * (2 + 1)  # warm-up and hot, cold


def test_measure_checks_its_arguments(quiet_machine: FakeMachine) -> None:
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        measure([FakeContender("a", quiet_machine, 1.0, 1.0)], rounds=0)


def test_evictor_walks_enough_memory_on_every_core() -> None:
    affinity = os.sched_getaffinity(0)
    evictor = Evictor()
    buffers = evictor._buffers
    assert set(buffers) == affinity
    evictor()
    assert os.sched_getaffinity(0) == affinity
    assert sum(buffer.nbytes for buffer in buffers.values()) >= 64 << 20
    for value, buffer in enumerate(buffers.values(), start=2):
        buffer[-1] = value
        assert evictor() == value
    evictor.close()


def test_facts_fit_json_and_name_the_machine() -> None:
    facts = json.loads(json.dumps(gather_facts()))
    assert {"cpu", "flags", "caches", "cores", "packages", "pycodesign", "commit", "load", "date"} <= set(facts)
    assert facts["packages"]["numpy"] == np.__version__
    assert facts["cores"] == len(os.sched_getaffinity(0))
    assert facts["pycodesign"]["team"] and "/" not in facts["pycodesign"]["team"]
