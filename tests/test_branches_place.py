"""Placement: the simulator by hand, the exact search against all placements, the other methods against it."""

import json
import random
import time

import pytest

from pycodesign.branches import (
    Body,
    Graph,
    LatencyTable,
    Placement,
    Slice,
    Value,
    build_inception,
    build_parnet,
    describe_machine,
    place,
)
from pycodesign.branches.exact import enumerate_all, solve
from pycodesign.branches.listing import place_by_rank
from pycodesign.branches.reinforce import place_by_policy
from pycodesign.branches.simulate import Problem, predict, simulate


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


def test_tables_are_kept(tmp_path):
    table = LatencyTable(
        describe_machine(), {"a": {"solo/1": 1e-5, "together/1": 2e-5}}, {"solo/1": 1e-6}, 2e-7, 1e-10, 2
    )
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    assert table.run_cost(together=True) == 1e-6


GOOD = {
    "schema": "pycodesign latency table 1",
    "machine": {},
    "entries": {"a": {"solo/1": 1e-5}},
    "run": {},
    "sync": 0,
    "transfer": 0,
    "teams": 2,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other"}, "expected a latency table"),
        ({"entries": []}, "expected entries and a machine"),
        *[({"teams": teams}, f"expected a number of teams, got {teams}") for teams in (None, True, -3)],
        ({"entries": {"a": {}}}, "expected seconds by threads for 'a'"),
        ({"entries": {"a": {"solo/1": -1}}}, "expected seconds, got -1"),
        ({"entries": {"a": {"solo/1": "1"}}}, "expected seconds, got '1'"),
        ({"run": 3}, "expected seconds by threads for 'run'"),
        ({"sync": True}, "expected seconds, got True"),
        ({"transfer": float("nan")}, "expected seconds, got nan"),
        ({"transfer": 10**400}, "expected seconds, got 1000"),
    ],
)
def test_malformed_tables_are_refused(tmp_path, change, message):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(ValueError, match=message):
        LatencyTable.load(path, any_machine=True)


def test_files_that_are_no_tables_are_refused(tmp_path):
    path = tmp_path / "table.json"
    with pytest.raises(ValueError, match="path: expected a latency table"):
        LatencyTable.load(tmp_path)
    for text in ("", "[1]", "{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match="path: expected a latency table"):
            LatencyTable.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="path: expected a latency table"):
        LatencyTable.load(path)


def test_tables_of_another_machine_are_refused(tmp_path):
    for name, value in {"cpu": "another", "cores": 999, "isa": "none"}.items():
        LatencyTable({**describe_machine(), name: value}, {}).save(tmp_path / "table.json")
        with pytest.raises(ValueError, match=rf"measured on this machine \({name} .*\), got {value}; measure anew"):
            LatencyTable.load(tmp_path / "table.json")
        LatencyTable.load(tmp_path / "table.json", any_machine=True)
