"""A stem that several branches recompute instead of waiting for it: when, its copies' names, and their place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pycodesign.branches import Body, Graph, LatencyTable, Placement, Slice, Value, build_parnet, describe_machine
from pycodesign.branches.distributed import recompute_bodies


def test_a_stem_is_recomputed():
    net = build_parnet(streams=3, width=8, size=16)
    graph = net.to_graph().recompute("stem")
    assert [name for name in graph.bodies if name.startswith("stem")] == ["stem.0", "stem.1", "stem.2"]
    assert graph.before["stream.2"] == ("stem.2",)
    x = torch.rand(net.shape)
    assert torch.equal(graph(x)[0], net.to_graph()(x)[0])
    with pytest.raises(ValueError, match="may run more than once, got 'head'"):
        graph.recompute("head")
    with pytest.raises(ValueError, match="got 'nothing'"):
        graph.recompute("nothing")


def test_a_stem_is_recomputed_where_that_is_cheaper():
    graph = build_parnet(width=8, size=8).to_graph()
    place = Placement((("stem", "stream.0", "head"), ("stream.1",)))
    moved, placed = recompute_bodies(graph, place)
    assert placed.teams == (("stem.0", "stream.0", "head"), ("stem.1", "stream.1"))
    placed.check(moved)
    assert recompute_bodies(graph, place, "never") == (graph, place)
    names = [*graph.bodies, *moved.bodies]

    def make_table(sync):
        return LatencyTable(
            describe_machine(), {name: {"solo/1": 1e-4, "together/1": 2e-4} for name in names}, {}, sync
        )

    assert recompute_bodies(graph, place, "auto", make_table(1e-6)) == (graph, place)  # two stems slow each other
    assert recompute_bodies(graph, place, "auto", make_table(1e-3))[1].teams == placed.teams


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
