"""Predicted latency: `predict` from a table, and the model of a space's latency against the simulator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from branch_graphs import make_graph
from branch_spaces import (
    NATIVE,
    SMALL,
    SPACE,
    make_table,
    make_table_of,
    one_thread,  # noqa: F401
)

from pycodesign.branches import Architecture, LatencyTable, Placement, Space, describe_machine, predict
from pycodesign.branches.space import GATES, OPERATORS
from pycodesign.branches.supernet import Choices, LatencyModel, Supernet
from pycodesign.repetition.chain import Chain


def test_predict_needs_a_table() -> None:
    graph = make_graph(np.copy)
    with pytest.raises(TypeError, match="table: expected a LatencyTable, got dict"):
        predict(graph, Placement.sequential(graph), {})  # type: ignore[arg-type]


def test_teams_of_other_widths_are_slowed_by_their_own_share() -> None:
    graph = make_graph(np.copy)
    row = {"solo/1": 1e-3, "together/1": 2e-3, "solo/2": 6e-4, "together/2": 6e-4}
    table = LatencyTable(describe_machine(), {"a": row, "b": row})
    for teams, threads in ((("a",), ("b",)), (1, 2)), ((("b",), ("a",)), (2, 1)):
        assert predict(graph, Placement(teams, threads), table) == pytest.approx(6e-4 + (1e-3 - 3e-4))


def test_tables_of_a_space_hold_for_its_size() -> None:
    net, table = SPACE.build(SPACE.sample()), make_table(SPACE)
    assert predict(net.to_graph(), Placement.sequential(net.to_graph()), table) > 0
    for shape in ((64, 1, 8, 8), (1, 1, 32, 32)):
        graph = net.to_graph(shape)
        assert isinstance(graph.bodies["branch.0.0"].run, Chain)
        with pytest.raises(ValueError, match="table: expected an entry for 'stem'"):
            predict(graph, Placement.sequential(graph), table)


@pytest.mark.parametrize("operators", [NATIVE, OPERATORS], ids=["native", "all"])
def test_the_latency_model_is_the_simulator(operators):
    # Two branches on two teams of one core: the longest path through the graph.
    gates = ("none", "add", "concatenate") if operators is NATIVE else GATES
    space = Space(branches=2, operators=operators, gates=gates, **SMALL)
    table = make_table_of(space)
    model = LatencyModel(space, table, 2)
    for seed in range(20):
        architecture = space.sample(seed)
        graph = space.build(architecture).to_graph()
        teams = [[name for name, body in graph.bodies.items() if max(body.branch, 0) == b] for b in range(2)]
        expected = predict(graph, Placement(tuple(map(tuple, teams))), table)
        assert model.seconds(architecture) == pytest.approx(expected, rel=2e-3)
        summed = LatencyModel(space, table, 2, summed=True).seconds(architecture)
        assert summed == pytest.approx(predict(graph, Placement.sequential(graph), table), rel=2e-2)


def test_the_smooth_maximum_and_its_gradient():
    space = Space(branches=3, **SMALL)
    model, net = LatencyModel(space, make_table_of(space), 3), Supernet(space)
    choices = net.expected()
    fixed = Choices(choices.operators.detach(), choices.gates.detach())
    exact = float(model(fixed))
    smooth = [float(model(fixed, s)) for s in (1e-4, 1e-5, 1e-6, 1e-7)]
    assert smooth == sorted(smooth, reverse=True) and smooth[0] > exact
    assert smooth[-1] == pytest.approx(exact, rel=2e-3)
    gradients = torch.autograd.grad(model(choices, 1e-6), [net.operator_logits, net.gate_logits])
    assert all(float(g.abs().max()) > 0 for g in gradients)
    fewer = LatencyModel(space, model.table, 1)
    assert float(fewer(fixed)) > exact  # all the work on one worker


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
