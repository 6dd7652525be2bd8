"""How long a placed graph takes, by a latency table: the one simulator of all placements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pycodesign.branches.graph import Graph, Placement
from pycodesign.branches.table import LatencyTable

__all__ = ["Problem", "make_problem", "predict", "simulate"]


@dataclass(frozen=True)
class Problem:
    """What is to be placed: numbers alone.

    Parameters
    ----------
    names : tuple of str
        Bodies, each behind those that it depends on.
    costs : tuple of tuple of float
        Seconds of each body on each device.
    before : tuple of tuple of (int, float)
        For each body those whose results it reads, and the seconds until a result is on another device.
    slowdown : tuple of tuple of float, optional
        How much longer each body takes on each device while other devices work, too.
    """

    names: tuple[str, ...]
    costs: tuple[tuple[float, ...], ...]
    before: tuple[tuple[tuple[int, float], ...], ...]
    slowdown: tuple[tuple[float, ...], ...] = ()

    @property
    def devices(self) -> int:
        return len(self.costs[0])

    def slowed(self) -> Problem:
        """Return the problem whose bodies always take as long as beside others."""
        if not self.slowdown:
            return self
        rows = zip(self.costs, self.slowdown, strict=True)
        costs = tuple(tuple(c * s for c, s in zip(*row, strict=True)) for row in rows)
        return replace(self, costs=costs, slowdown=())


def make_problem(graph: Graph, table: LatencyTable, threads: Sequence[int] = (1, 1)) -> Problem:
    """Look up what the bodies of a graph cost on teams of so many threads.

    Raises
    ------
    ValueError
        If the table lacks an entry.
    """
    index = {name: i for i, name in enumerate(graph.bodies)}
    costs, before, slowdown = [], [], []
    for name, body in graph.bodies.items():
        costs.append(tuple(table.body_cost(body, n) for n in threads))
        together = (table.body_cost(body, n, together=True) for n in threads)
        slowdown.append(tuple(max(1.0, t / max(c, 1e-12)) for t, c in zip(together, costs[-1], strict=True)))
        sent = graph.transfers(name)
        before.append(tuple((index[other], table.sync + table.transfer * sent[other]) for other in graph.before[name]))
    return Problem(tuple(graph.bodies), tuple(costs), tuple(before), tuple(slowdown))


def predict(graph: Graph, place: Placement, table: LatencyTable) -> float:
    """Return the seconds that a placed graph takes, by a latency table.

    Raises
    ------
    TypeError
        If `table` is no latency table.
    ValueError
        If the placement does not fit the graph, or the table lacks an entry.
    """
    if not isinstance(table, LatencyTable):
        raise TypeError(f"table: expected a LatencyTable, got {type(table).__name__}")
    place.check(graph)
    problem = make_problem(graph, table, place.threads)
    index = {name: i for i, name in enumerate(problem.names)}
    busy = sum(1 for team in place.teams if team)
    return table.run_cost(place.threads[0], busy > 1) + simulate(
        problem, [[index[name] for name in team] for team in place.teams]
    )


def simulate(problem: Problem, teams: Sequence[Sequence[int]]) -> float:
    """Return the seconds until all bodies are done, each team running its own in the order given.

    Parameters
    ----------
    problem : Problem
    teams : sequence of sequence of int
        Indices of bodies for each device, each body once.

    Raises
    ------
    ValueError
        If the orders wait for each other.
    """
    device_of = {body: device for device, team in enumerate(teams) for body in team}
    finish: dict[int, float] = {}
    position = [0] * len(teams)
    left: list[float | None] = [None] * len(teams)  # seconds that the running body still needs, alone
    clock = 0.0
    while len(finish) < len(device_of):
        next_event = math.inf
        for device, team in enumerate(teams):
            if left[device] is not None or position[device] == len(team):
                continue
            body = team[position[device]]
            ready = 0.0
            for other, delay in problem.before[body]:
                if other not in finish:
                    break
                ready = max(ready, finish[other] + (delay if device_of[other] != device else 0.0))
            else:
                if ready <= clock:
                    left[device] = problem.costs[body][device]
                else:
                    next_event = min(next_event, ready)
        running = [device for device, seconds in enumerate(left) if seconds is not None]
        slow = problem.slowdown and len(running) > 1
        rates = {d: 1 / problem.slowdown[teams[d][position[d]]][d] if slow else 1.0 for d in running}
        ends = {device: clock + (left[device] or 0.0) / rates[device] for device in running}
        next_event = min(next_event, *ends.values()) if ends else next_event
        if next_event == math.inf:
            waiting = [problem.names[team[p]] for team, p in zip(teams, position, strict=True) if p < len(team)]
            raise ValueError(f"teams: expected orders that come to an end, got bodies that wait: {waiting}")
        for device in running:
            if ends[device] <= next_event:
                finish[teams[device][position[device]]] = next_event
                position[device] += 1
                left[device] = None
            else:
                left[device] = (left[device] or 0.0) - (next_event - clock) * rates[device]
        clock = next_event
    return max(finish.values(), default=0.0)
