"""Graphs of bodies and placements: what they refuse, and that networks compute as their graphs do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from branch_graphs import make_graph
from torch import nn

import pycodesign.nn
from pycodesign.branches import (
    Body,
    Graph,
    Network,
    Part,
    Placement,
    Slice,
    Value,
    build_inception,
    build_parnet,
    to_graph,
)
from pycodesign.branches.converted import find_chain

VALUES = {"x": Value((1, 2)), "a": Value((1, 2)), "b": Value((1, 2)), "y": Value((1, 4))}


def body(name, reads, writes, run=lambda *x: x[0], **options):
    return Body(name, run, tuple(map(Slice, reads)), writes, "numpy", **options)


def diamond():
    return [
        body("join", ["a", "b"], (Slice("y"),), lambda a, b: np.concatenate([a, b], 1)),
        body("left", ["x"], (Slice("a"),), lambda x: 2 * x),
        body("right", ["x"], (Slice("b"),), lambda x: -x),
    ]


def test_bodies_are_sorted_and_run():
    graph = Graph(VALUES, diamond(), ["x"], ["y"])
    assert list(graph.bodies)[-1] == "join" and graph.before["join"] == ("left", "right")
    assert graph.transfers("join") == {"left": 8, "right": 8}
    (y,) = graph(np.float32([[1, 3]]))
    assert y.tolist() == [[2, 6, -1, -3]]
    (y,) = graph(torch.tensor([[1.0, 3.0]]))
    assert isinstance(y, torch.Tensor) and y.tolist() == [[2, 6, -1, -3]]


def test_cycles_are_named():
    bodies = [body("first", ["a"], (Slice("b"),)), body("second", ["b"], (Slice("a"),))]
    with pytest.raises(ValueError, match="cycle, got first -> second -> first"):
        Graph(VALUES, bodies, ["x"], ["b"])


def test_long_graphs_in_any_order():
    count = 3000
    values = {f"v{i}": Value((1, 1)) for i in range(count + 1)}
    bodies = [body(str(i), [f"v{i}"], (Slice(f"v{i + 1}"),), lambda x: x + 1) for i in reversed(range(count))]
    graph = Graph(values, bodies, ["v0"], [f"v{count}"])
    assert list(graph.bodies) == [str(i) for i in range(count)]
    assert graph(np.zeros((1, 1), np.float32))[0] == count


@pytest.mark.parametrize(("inputs", "outputs"), [(["x", "x"], ["a"]), (["x"], ["a", "a"])])
def test_names_twice_are_refused(inputs, outputs):
    with pytest.raises(ValueError, match=r"puts: expected different names, got '.' twice"):
        Graph(VALUES, [body("left", ["x"], (Slice("a"),))], inputs, outputs)


def test_branches_that_share_a_buffer_are_refused():
    bodies = [
        body("left", ["x"], (Slice("y", 0, 3),)),
        body("right", ["x"], (Slice("y", 2, 4),)),
    ]
    with pytest.raises(ValueError, match=r"right: expected to write what no other body writes.*\[2, 4\).*'left'"):
        Graph(VALUES, bodies, ["x"], ["y"])
    with pytest.raises(ValueError, match="other values than inputs, got 'x'"):
        Graph(VALUES, [body("left", ["x"], (Slice("x"),))], ["x"], ["x"])


@pytest.mark.parametrize(
    ("bodies", "message"),
    [
        ([body("a", ["z"], (Slice("a"),))], "a: expected a name of a value, got 'z'"),
        ([body("a", ["x"], (Slice("a", 1, 3),))], "slice of the 2 channels of 'a'"),
        ([body("a", ["x"], (Slice("a", 1, 1),))], "slice of the 2 channels of 'a'"),
        ([body("a", ["b"], (Slice("a"),))], "a: expected a value that bodies write, got .*'b'"),
        ([body("a", ["x"], (Slice("a", 0, 1),))], "outputs: expected a value that bodies write"),
        ([body("a", ["x"], (Slice("a"),))] * 2, "different names, got 'a' twice"),
    ],
)
def test_graphs_that_cannot_run_are_refused(bodies, message):
    with pytest.raises(ValueError, match=message):
        Graph(VALUES, bodies, ["x"], ["a"])


def test_inputs_are_checked():
    graph = Graph(VALUES, diamond(), ["x"], ["y"])
    with pytest.raises(TypeError, match="expected 1 arrays, got 2"):
        graph(1, 2)
    with pytest.raises(TypeError, match=r"x: expected float32 \(1, 2\), got int"):
        graph(1)
    with pytest.raises(TypeError, match=r"x: expected float32 \(1, 2\), got float64"):
        graph(np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"x: expected float32 \(1, 2\), got float32 \(2, 2\)"):
        graph(np.ones((2, 2), np.float32))


def test_results_are_checked():
    wrong = [body("a", ["x"], (Slice("a"),), lambda x: x[:, :1])]
    with pytest.raises(ValueError, match=r"a: expected to return float32 \(1, 2\), got float32 \(1, 1\)"):
        Graph(VALUES, wrong, ["x"], ["a"])(np.ones((1, 2), np.float32))


def test_placements_are_checked():
    graph = Graph(VALUES, diamond(), ["x"], ["y"])
    Placement((("left", "join"), ("right",))).check(graph)
    for teams, message in [
        ((("left", "join"),), "all bodies of the graph, got none of .'right'."),
        ((("left", "join"), ("right", "left")), "each body once, got 'left' 2 times"),
        ((("left", "join"), ("right", "up")), "names of the graph's bodies, got 'up'"),
        ((("join", "left"), ("right",)), "place: expected no cycle"),
    ]:
        with pytest.raises(ValueError, match=message):
            Placement(teams).check(graph)
    with pytest.raises(ValueError, match="threads: expected one number for each of 1 teams"):
        Placement((("left",),), (1, 2))
    assert Placement.sequential(graph).teams == (("left", "right", "join"),)


def test_shapes_may_be_lists() -> None:
    graph = make_graph(np.copy, [1, 4])  # type: ignore[arg-type]
    assert graph(np.ones((1, 4), np.float32))[0].shape == (1, 4)


@pytest.mark.parametrize("build", [build_parnet, build_inception])
def test_a_network_computes_as_its_graph(build):
    net = build(width=8, size=8)
    x = torch.rand(net.shape, generator=torch.Generator().manual_seed(0))
    graph = to_graph(net)
    with torch.no_grad():
        assert torch.equal(graph(x)[0], net(x))
    assert any(0 < piece.begin for b in graph.bodies.values() for piece in b.outputs)  # slices of a concatenation
    converted = net.to_graph(convert=lambda module: pycodesign.nn.convert(module, "ternary"))
    assert converted(x)[0].shape == (1, 10)


def test_only_networks_become_graphs():
    with pytest.raises(TypeError, match="net: expected a Graph or a network of branches, got Linear"):
        to_graph(nn.Linear(2, 2))


def test_a_layer_with_a_residual_is_no_chain_of_one_input():
    layer = pycodesign.nn.Linear.from_float(nn.Linear(2, 2), "ternary")
    one, two = (Body("layer", layer, tuple(map(Slice, names)), (Slice("b"),)) for names in ("x", "xa"))
    for run, wanted in ((one, True), (two, False)):
        graph = Graph({**VALUES}, [run], [piece.value for piece in run.inputs], ["b"])
        assert (find_chain(graph, run) is not None) == wanted


@pytest.mark.parametrize("name", ["a.b", "a_b", "keys", "training", ""])
def test_parts_do_not_share_a_module(name: str) -> None:
    parts = [(Part(n, ("x",), ((n, 0),)), nn.ReLU()) for n in ("a_b", name)]
    with pytest.raises(ValueError, match=f"parts: expected names that differ in more than '.' and '_', .*{name!r}"):
        Network(parts, (1, 4))
