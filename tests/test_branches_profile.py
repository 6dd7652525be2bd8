"""`profile` measures every body of a graph and of a space, and leaves torch's random numbers alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from branch_spaces import (
    SPACE,
    one_thread,  # noqa: F401
)

from pycodesign.branches import Body, Graph, Slice, Space, Value, describe_machine, place, profile
from pycodesign.branches.profiling import list_body_probes, make_table
from pycodesign.branches.supernet import LatencyModel


def test_profile():
    space = Space(branches=2, segments=2, layers=1, width=4, size=8, operators=("conv1x1:ternary", "conv1x1"))
    table = profile(space, 1, rounds=2, calibration=1)
    model = LatencyModel(space, table, 1)
    for seed in range(3):
        assert 0 < model.seconds(space.sample(seed)) < 1
    keys = {key for seed in range(20) for b in space.build(space.sample(seed)).to_graph().bodies.values()
            for key in b.costs}  # fmt: skip
    assert keys <= set(table.entries)
    assert table.machine == describe_machine()
    with pytest.raises(ValueError, match="workers: expected 1 to"):
        profile(space, 4096)
    with pytest.raises(ValueError, match="threads: expected 1 to"):
        profile(space, 1, threads=(4096,))
    with pytest.raises(TypeError, match="space: expected a Space"):
        profile("space")


def test_tables_of_a_graph_hold_for_its_bodies() -> None:
    graph = SPACE.build(SPACE.sample()).to_graph()
    table = profile(graph, 1, rounds=1)
    assert place(graph, table, 1).latency == pytest.approx(sum(table.cost(name) for name in graph.bodies), abs=1e-3)
    assert profile(Graph({}, [], [], []), 1, rounds=1).cost("body") >= 0


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
