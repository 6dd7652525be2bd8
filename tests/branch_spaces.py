"""Small spaces of branches, latency tables of them, and a fixture, for several tests."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pycodesign.branches import LatencyTable, Space, describe_machine, profiling

NATIVE = ("conv3x3:ternary", "conv1x1:ternary", "separable:ternary", "skip", "pool")
SMALL = {"segments": 2, "layers": 2, "width": 4, "size": 8}
SPACE = Space(branches=2, segments=1, layers=1, width=4, size=8, operators=("conv1x1:ternary", "skip"), gates=("none",))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of torch, in every test of a file that imports this: small tensors, and a machine that may be busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_table(space: Space, **options: Any) -> LatencyTable:
    """A microsecond for everything that networks of a space may do."""
    architecture = space.sample()
    keys = {key for body in space.build(architecture).to_graph().bodies.values() for key in body.costs}
    for operator in space.operators:
        for segment in range(space.segments):
            for native in (True, False):
                keys |= {space.layer_key(operator, segment, 0, native=native), space.means_key(segment, native=native)}
    return LatencyTable(describe_machine(), {key: {"solo/1": 1e-6} for key in (*keys, "body")}, **options)


def make_table_of(space: Space, seed: int = 0, sync: float = 2e-6) -> LatencyTable:
    """A latency for everything, from dice."""
    rng = random.Random(seed)
    columns = ("solo/1", "together/1")
    seconds = {}
    for name, probe in profiling.list_probes(space).items():
        base = 1e-5 if name.startswith(("one", "line", "copy", "turns", "large")) else rng.uniform(2e-5, 9e-5)
        seconds[name] = dict.fromkeys(columns, base * (1 if probe.line == 1 else 1.5))
    table = profiling.make_table(space, seconds, 2)
    return LatencyTable(table.machine, table.entries, table.run, sync, 1e-10, 2)
