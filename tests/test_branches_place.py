"""Placement: the simulator by hand, the exact search against all placements, the other methods against it."""

from __future__ import annotations

import inspect
import random
import sys
import time

import numpy as np
import pytest
import torch
from branch_graphs import make_graph

from pycodesign.branches import (
    Body,
    Executor,
    Graph,
    LatencyTable,
    Placement,
    Slice,
    Value,
    build_inception,
    build_parnet,
    describe_machine,
    place,
    predict,
)
from pycodesign.branches.exact import enumerate_all, solve
from pycodesign.branches.listing import place_by_rank
from pycodesign.branches.reinforce import place_by_policy
from pycodesign.branches.simulate import Problem, simulate


def draw_problem(rng, n, devices, density, alike):
    before = [tuple((j, rng.choice([0.0, 0.1, 1.0]) * rng.random()) for j in range(i) if rng.random() < density)
              for i in range(n)]  # fmt: skip
    costs = []
    for _ in range(n):
        seconds = rng.random() * rng.choice([0, 1, 1, 2])
        costs.append(tuple(seconds * (1 if alike else rng.uniform(0.5, 2)) for _ in range(devices)))
    return Problem(tuple(f"b{i}" for i in range(n)), tuple(costs), tuple(before))


def fork(rng, branches, devices, segments=1):
    """A stem, branches that listen to some others between segments, and a head."""
    names, costs, before, previous = ["stem"], [(0.3,) * devices], [()], [0] * branches
    for segment in range(segments):
        current = []
        for branch in range(branches):
            reads = {previous[branch]: 0.02 + 0.03 * rng.random()}
            for other in range(branches):
                if segment and other != branch and rng.random() < 0.3:
                    reads[previous[other]] = 0.02 + 0.03 * rng.random()
            before.append(tuple(reads.items()))
            costs.append((rng.uniform(0.2, 1),) * devices)
            names.append(f"{segment}.{branch}")
            current.append(len(names) - 1)
        previous = current
    return Problem((*names, "head"), (*costs, (0.1,) * devices), (*before, tuple((p, 0.05) for p in previous)))


def test_the_simulator_by_hand():
    #  a (2) -> b (3), c (1) -> d (1); c on the other device, 0.5 away
    problem = Problem(
        ("a", "b", "c", "d"),
        ((2, 2), (3, 3), (1, 1), (1, 1)),
        ((), ((0, 0.5),), ((0, 0.5),), ((1, 0.5), (2, 0.5))),
    )
    assert simulate(problem, [[0, 1, 2, 3], []]) == 7
    assert simulate(problem, [[0, 1, 3], [2]]) == 6
    slow = Problem(problem.names, problem.costs, problem.before, ((1, 1), (1.5, 1.5), (2, 2), (1, 1)))
    # From 2 to 2.5 b is alone; both run then, b at 1 / 1.5 and c at 1 / 2, until c is done at 4.5.
    assert simulate(slow, [[0, 1, 3], [2]]) == pytest.approx(2.5 + 2 + (3 - 0.5 - 2 / 1.5) + 1)
    assert simulate(slow, [[0, 1, 2, 3], []]) == 7
    with pytest.raises(ValueError, match=r"orders that come to an end, got bodies that wait: \['d'\]"):
        simulate(problem, [[3, 0, 1, 2], []])


def test_exact_is_the_least_of_all_placements():
    rng = random.Random(0)
    for _ in range(500):
        n = rng.randint(1, 6)
        devices = rng.randint(1, 3 if n < 6 else 2)
        problem = draw_problem(rng, n, devices, rng.random(), rng.random() < 0.7)
        begin = time.process_time()
        found = solve(problem)
        assert time.process_time() - begin < 1
        assert found.latency == pytest.approx(enumerate_all(problem), abs=1e-12)
        assert found.bound == found.latency == pytest.approx(simulate(problem, found.teams))
        assert simulate(problem, place_by_rank(problem)) >= found.latency - 1e-12


@pytest.mark.parametrize(("branches", "devices", "segments"), [(8, 4, 1), (8, 2, 1), (4, 2, 3), (4, 4, 3)])
def test_exact_proves_networks_of_branches(branches, devices, segments):
    problem = fork(random.Random(1), branches, devices, segments)
    found = solve(problem, limit=30)
    assert found.bound == found.latency == pytest.approx(simulate(problem, found.teams))
    assert found.latency <= simulate(problem, place_by_rank(problem)) + 1e-12


def test_exact_says_when_it_has_not_proved_anything():
    problem = fork(random.Random(0), 8, 4, 3)
    found = solve(problem, limit=0.05)
    assert 0 < found.bound < found.latency <= simulate(problem, place_by_rank(problem))
    assert [latency for latency, _ in found.others] == sorted(latency for latency, _ in found.others)


def test_exact_places_long_graphs() -> None:
    n, limit = 300, sys.getrecursionlimit()
    line = ((), *(((i, 10.0),) for i in range(n - 1)))
    problem = Problem(tuple(map(str, range(n + 3))), ((1.0, 1.0),) * (n + 3), (*line, *[((n - 1, 0.0),)] * 3))
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        found = solve(problem, limit=60)
    finally:
        sys.setrecursionlimit(limit)
    assert found.bound == found.latency == n + 2


def test_list_scheduling_of_large_graphs():
    problem = fork(random.Random(0), 16, 4, 12)
    begin = time.process_time()
    latency = simulate(problem, place_by_rank(problem))
    assert time.process_time() - begin < 5
    assert latency >= sum(row[0] for row in problem.costs) / 4
    assert latency < 0.5 * sum(row[0] for row in problem.costs)


def test_reinforce_finds_what_is_near():
    problem = fork(random.Random(2), 4, 2)
    teams = place_by_policy(problem, updates=30, seed=0)
    assert sorted(body for team in teams for body in team) == list(range(6))
    assert simulate(problem, teams) <= 1.1 * solve(problem).latency
    assert teams == place_by_policy(problem, updates=30, seed=0)


def test_reinforce_in_any_mode() -> None:
    problem = Problem(("a", "b"), ((2.0, 2.0), (3.0, 3.0)), ((), ()))
    wanted = place_by_policy(problem, updates=3)
    with torch.inference_mode():
        assert place_by_policy(problem, updates=3) == wanted
    with torch.no_grad():
        assert place_by_policy(problem, updates=3) == wanted


def test_another_default_dtype() -> None:
    net, problem = build_parnet(width=8, size=8), Problem(("a", "b"), ((2.0, 2.0), (3.0, 3.0)), ((), ()))
    torch.set_default_dtype(torch.float64)
    try:
        assert {value.dtype for value in net.to_graph().values.values()} == {"float32"}
        assert len(place_by_policy(problem, updates=3)) == 2
    finally:
        torch.set_default_dtype(torch.float32)


def make_table(graph, seconds, **options):
    entries = {name: {"solo/1": seconds.get(name, 1e-5), "solo/2": 1e-5} for name in graph.bodies}
    return LatencyTable(describe_machine(), entries, **options)


@pytest.mark.parametrize("method", ["exact", "list", "reinforce"])
def test_place(method):
    graph = build_inception(modules=2, width=8, size=8).to_graph()
    seconds = {f"module.{m}.{b}": s for m in range(2) for b, s in enumerate([3e-5, 2e-4, 1.8e-4, 1e-4])}
    table = make_table(graph, seconds, sync=1e-6)
    found = place(graph, table, method=method)
    found.check(graph)
    assert found.method == method and found.seconds > 0
    assert found.latency == pytest.approx(predict(graph, found, table))
    assert found.latency < 0.7 * predict(graph, Placement.sequential(graph), table)
    if method == "exact":
        assert found.bound is not None


def test_one_team_runs_what_is_not_worth_a_wait():
    graph = build_parnet(width=8, size=8).to_graph()
    table = make_table(graph, {}, sync=1e-3)
    assert [len(team) for team in place(graph, table).teams] == [4]
    slower = {name: {"solo/1": 1e-5, "together/1": 1e-4} for name in graph.bodies}
    assert len(place(graph, LatencyTable(describe_machine(), slower)).teams) == 1


def test_the_fastest_of_those_measured_is_taken():
    graph = build_inception(modules=1, width=8, size=8).to_graph()
    measured = []

    def measure(graph, placement):
        measured.append(placement)
        return 1.0 / len(measured)

    found = place(graph, make_table(graph, {}), measure=measure, best=2)
    assert len(measured) == 2 and found.latency == 1 / 2 and found.teams == measured[1].teams


def test_no_placement_is_faster_than_the_bound() -> None:
    graph, rng = build_parnet(streams=3, width=8, size=8).to_graph(), np.random.default_rng(0)
    for _ in range(20):
        solo = {name: float(rng.uniform(1e-5, 1e-4)) for name in graph.bodies}
        entries = {name: {"solo/1": s, "together/1": s * float(rng.uniform(1, 2))} for name, s in solo.items()}
        table = LatencyTable(describe_machine(), entries, sync=1e-6)
        found = place(graph, table)
        assert found.latency is not None and found.bound is not None
        assert 0 < found.bound <= found.latency * (1 + 1e-9)


def test_the_bound_has_the_cost_of_a_run() -> None:
    graph = make_graph(np.copy)
    table = LatencyTable(describe_machine(), {name: {"solo/1": 1e-3} for name in "ab"}, {"solo/1": 1e-4})
    for workers in (1, 2):
        found = place(graph, table, workers)
        assert found.bound == found.latency == pytest.approx(2e-3 / workers + 1e-4)


@pytest.mark.parametrize("method", ["exact", "list", "reinforce"])
def test_graphs_without_bodies_are_placed(method: str) -> None:
    graph = Graph({"x": Value((1, 4))}, [], ["x"], ["x"])
    found = place(graph, LatencyTable(describe_machine(), {}), method=method)
    assert found.teams == ((),) and found.latency == 0
    assert Executor(graph, found)(np.ones((1, 4), np.float32))[0].tolist() == [[1] * 4]


def test_what_place_refuses():
    graph = build_parnet(width=8, size=8).to_graph()
    table = make_table(graph, {})
    with pytest.raises(ValueError, match="method: expected 'exact', 'list', 'reinforce', got 'best'"):
        place(graph, table, method="best")
    with pytest.raises(TypeError, match="table: expected a LatencyTable, got dict"):
        place(graph, {})
    with pytest.raises(ValueError, match="workers: expected one team or more, got none"):
        place(graph, table, ())
    with pytest.raises(ValueError, match="limit: expected a positive number"):
        place(graph, table, limit=0)
    with pytest.raises(ValueError, match="expected an entry for 'stem', got a table of 0"):
        place(graph, LatencyTable(describe_machine(), {}))
    with pytest.raises(ValueError, match="with 3 threads, got solo/1, solo/2"):
        place(graph, table, (3,))
    other = LatencyTable({**describe_machine(), "cpu": "another"}, {})
    with pytest.raises(ValueError, match=r"measured on this machine.*got another"):
        place(graph, other)
    bodies = [
        Body("a", abs, (Slice("b"),), (Slice("a"),), "numpy"),
        Body("b", abs, (Slice("a"),), (Slice("b"),), "numpy"),
    ]
    with pytest.raises(ValueError, match="no cycle, got a -> b -> a"):
        place(Graph({"a": Value((1, 1)), "b": Value((1, 1))}, bodies, [], ["b"]), table)
