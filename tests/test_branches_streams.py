"""Streams for bodies: as few as Dilworth's theorem allows, and enough events for any order that they leave open."""

from __future__ import annotations

import random
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
import pytest
import torch

from pycodesign.branches import Body, Executor, Graph, Placement, Slice, Value
from pycodesign.branches.streams import Step, cover_by_chains, plan_steps


def make_graph(bodies: int, density: float, seed: int) -> Graph:
    """Bodies that each add up what some before it have made, and 1."""
    rng = random.Random(seed)
    values = {"x": Value((1, 1))} | {f"v{i}": Value((1, 1)) for i in range(bodies)}
    made = []
    for i in range(bodies):
        read = ["x", *(f"v{j}" for j in range(i) if rng.random() < density)]
        made.append(Body(f"b{i}", add_up, tuple(map(Slice, read)), (Slice(f"v{i}"),)))
    return Graph(values, made, ["x"], [f"v{i}" for i in range(bodies)])


def add_up(*arrays: Any) -> Any:
    return sum(arrays) + 1


def find_ancestors(graph: Graph) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, sources in graph.before.items():
        found[name] = set(sources).union(*(found[source] for source in sources))
    return found


def count_at_once(graph: Graph) -> int:
    """How many bodies none of which depends on another, by trying all sets."""
    ancestors = find_ancestors(graph)
    free = {(a, b) for a, b in combinations(graph.bodies, 2) if a not in ancestors[b] and b not in ancestors[a]}
    most = 1
    while any(all(pair in free for pair in combinations(s, 2)) for s in combinations(graph.bodies, most + 1)):
        most += 1
    return most


def make_hourglass() -> Graph:
    """Two bodies before one, two behind it: two chains, but one of them has to jump over the middle."""
    values = {name: Value((1, 1)) for name in "xabmcd"}
    reads = {"a": "x", "b": "x", "m": "ab", "c": "m", "d": "m"}
    bodies = [Body(name, add_up, tuple(map(Slice, read)), (Slice(name),)) for name, read in reads.items()]
    return Graph(values, bodies, ["x"], ["c", "d"])


GRAPHS = [make_hourglass()]
GRAPHS += [make_graph(n, density, seed) for n, density, seed in product((1, 5, 9), (0.1, 0.3, 0.6), range(4))]


@pytest.mark.parametrize("graph", GRAPHS, ids=range(len(GRAPHS)))
def test_as_few_chains_as_bodies_that_may_run_at_once(graph: Graph) -> None:
    chains, ancestors = cover_by_chains(graph.before), find_ancestors(graph)
    assert sorted(name for chain in chains for name in chain) == sorted(graph.bodies)
    assert all(first in ancestors[second] for chain in chains for first, second in pairwise(chain))
    assert len(chains) == count_at_once(graph)
    place = Placement.by_chains(graph)
    place.check(graph)
    assert place.teams == tuple(chains)


def find_certain(steps: list[Step]) -> dict[str, set[str]]:
    """For each body all that has certainly come before it: in its stream, and by events."""
    found: dict[str, set[str]] = {}
    last: dict[int, str] = {}
    for step in steps:
        direct = {*step.waits, *([last[step.stream]] if step.stream in last else [])}
        found[step.body] = direct.union(*(found[source] for source in direct))
        last[step.stream] = step.body
    return found


def place_by_chance(graph: Graph, teams: int, rng: random.Random) -> Placement:
    chosen: list[list[str]] = [[] for _ in range(teams)]
    for name in graph.bodies:
        rng.choice(chosen).append(name)
    return Placement(tuple(map(tuple, chosen)))


@pytest.mark.parametrize("graph", GRAPHS, ids=range(len(GRAPHS)))
def test_events_are_enough_and_none_is_spare(graph: Graph) -> None:
    rng = random.Random(0)
    by_chance = [place_by_chance(graph, teams, rng) for teams in (2, 3, 4) for _ in range(10)]
    for place in (Placement.by_chains(graph), Placement.sequential(graph), *by_chance):
        steps = plan_steps(graph, place)
        certain = find_certain(steps)
        assert all(set(sources) <= certain[name] for name, sources in graph.before.items())
        assert {s.body for s in steps if s.is_awaited} == {source for s in steps for source in s.waits}
        for i, step in enumerate(steps):
            for source in step.waits:
                assert place.team_of[source] != step.stream
                fewer = tuple(other for other in step.waits if other != source)
                broken = [*steps[:i], Step(step.body, step.stream, fewer, step.is_awaited), *steps[i + 1 :]]
                assert source not in find_certain(broken)[step.body]


def test_no_gpu_is_said() -> None:
    graph = GRAPHS[0]
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: nothing is missing")
    with pytest.raises(RuntimeError, match=r"^device: torch sees no CUDA device, got 'cuda'; backend='threads' runs"):
        Executor(graph, Placement.by_chains(graph), "cuda")


def sleep_and_add_up(cycles: int, *arrays: Any) -> Any:
    torch.cuda._sleep(cycles)
    return sum(arrays) + 1


@pytest.mark.parametrize("capture", [True, False])
def test_on_a_gpu_whatever_is_late(gpu: Any, capture: bool) -> None:
    if gpu.kind != "torch" or gpu.is_emulated:
        pytest.skip("streams are torch's, of a GPU")
    from functools import partial

    for late, graph in enumerate(GRAPHS[-12:]):
        slow = list(graph.bodies)[late % len(graph.bodies)]
        delays = {name: 4_000_000 * (name == slow) for name in graph.bodies}
        delayed = graph.replace_runs(lambda body, delays=delays: partial(sleep_and_add_up, delays[body.name]))
        for place in (Placement.by_chains(graph), Placement.sequential(graph)):
            run = Executor(delayed, place, "cuda", capture=capture)
            for x in (1.0, 5.0):
                given = torch.full((1, 1), x)
                for got, wanted in zip(run(given.cuda()), graph(given), strict=True):
                    assert torch.equal(got.cpu(), wanted)
                np.testing.assert_array_equal(run(given.numpy())[-1], graph(given.numpy())[-1])
