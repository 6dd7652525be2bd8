"""`place`: which team of cores, or which device, runs which body, in which order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pycodesign._arguments import to_integer, to_number
from pycodesign.branches.exact import solve
from pycodesign.branches.graph import Graph, Placement, to_graph
from pycodesign.branches.listing import place_by_rank
from pycodesign.branches.simulate import Problem, make_problem, predict
from pycodesign.branches.table import LatencyTable

__all__ = ["measure_placement", "place"]

METHODS = ("exact", "list", "reinforce")
Measure = Callable[[Graph, Placement], float]


def place(
    net: Any,
    table: LatencyTable,
    workers: int | Sequence[int] = 2,
    method: str = "exact",
    *,
    limit: float = 10.0,
    measure: Measure | bool = False,
    best: int = 4,
    seed: int = 0,
) -> Placement:
    """Place a network.

    All methods are judged by one simulator, `simulate`, in which bodies take as long as beside others; running
    everything on one team, where they take as long as alone, is always a candidate.

    Parameters
    ----------
    net : Network or Graph
        A network's bodies are made native.
    table : LatencyTable
    workers : int or sequence of int
        Number of teams of one thread, or the threads of each team.
    method : {"exact", "list", "reinforce"}
        ``"exact"``: branch and bound over devices and orders, for up to some ten bodies at a time that could run
        anywhere, all of which take as long as beside others: the fastest there is where they take no longer so than
        alone; else another may be, down to `Placement.bound`. ``"list"``: HEFT, for graphs of any size.
        ``"reinforce"``: a policy learned by REINFORCE, as published, to compare with.
    limit : float
        Seconds after which ``"exact"`` returns the best so far; `Placement.bound` then is less than its latency.
    measure : bool or callable
        Time the `best` fastest in the simulator, and take the fastest. True: by `measure_placement`; else a function of
        graph and placement that returns seconds.
    best : int
    seed : int
        Of ``"reinforce"``.

    Returns
    -------
    Placement
        With its latency, predicted or measured, and the seconds that finding it took.

    Raises
    ------
    TypeError, ValueError
        For an unknown method, and a table that lacks a body or is of another machine.

    Examples
    --------
    >>> from pycodesign.branches import LatencyTable, build_parnet, describe_machine, place
    >>> seconds = {"stem": 4e-5, "stream.0": 3e-4, "stream.1": 3e-4, "head": 5e-6}
    >>> table = LatencyTable(describe_machine(), {name: {"solo/1": s} for name, s in seconds.items()}, sync=1e-6)
    >>> place(build_parnet(), table).teams
    (('stem', 'stream.0'), ('stream.1', 'head'))
    """
    if not isinstance(table, LatencyTable):
        raise TypeError(f"table: expected a LatencyTable, got {type(table).__name__}")
    if method not in METHODS:
        raise ValueError(f"method: expected {', '.join(map(repr, METHODS))}, got {method!r}")
    table.check_machine()
    to_integer("best", best, 1)
    if not to_number("limit", limit) > 0:
        raise ValueError(f"limit: expected a positive number of seconds, got {limit}")
    if not isinstance(measure, bool) and not callable(measure):
        raise TypeError(f"measure: expected a bool or a function, got {type(measure).__name__}")
    if isinstance(workers, Iterable):
        threads = tuple(to_integer("workers", count, 1) for count in workers)
    else:
        threads = (1,) * to_integer("workers", workers, 1)
    if not threads:
        raise ValueError("workers: expected one team or more, got none")
    graph = net.to_graph(native=True) if hasattr(net, "to_graph") else to_graph(net)
    begin = time.perf_counter()
    given = make_problem(graph, table, threads)
    problem = given.slowed()
    found: list[tuple[tuple[int, ...], ...]] = []
    bound = None
    if not graph.bodies:
        pass
    elif method == "exact":
        solution = solve(problem, limit=limit, keep=best)
        found, bound = [teams for _, teams in solution.others], solution.bound
        if problem.costs != given.costs:  # a body may also run alone, and is faster then
            left = max(0.0, limit - (time.perf_counter() - begin))
            alone = solve(replace(given, slowdown=()), limit=left, keep=best)
            found, bound = [*found, *(teams for _, teams in alone.others)], alone.bound
        bound += table.run_cost(threads[0], len(threads) > 1)
    elif method == "list":
        found = [tuple(map(tuple, place_by_rank(problem)))]
    else:
        from pycodesign.branches.reinforce import place_by_policy

        found = [tuple(map(tuple, place_by_policy(problem, seed=seed)))]
    placements = [_to_placement(problem, teams, threads) for teams in found if sum(map(bool, teams)) > 1]
    placements += [Placement.sequential(graph, count) for count in dict.fromkeys(threads)]
    placements = [replace(p, latency=predict(graph, p, table)) for p in dict.fromkeys(placements)]
    placements.sort(key=lambda p: p.latency or 0.0)
    if bound is not None:  # or less: one team's run may cost less
        bound = min(bound, placements[0].latency or 0.0)
    if measure:
        time_it = measure_placement if measure is True else measure
        placements = [replace(p, latency=_to_seconds(time_it(graph, p))) for p in placements[:best]]
        placements.sort(key=lambda p: p.latency or 0.0)
    return replace(placements[0], method=method, seconds=time.perf_counter() - begin, bound=bound)


def _to_placement(problem: Problem, teams: Sequence[Sequence[int]], threads: tuple[int, ...]) -> Placement:
    return Placement(tuple(tuple(problem.names[body] for body in team) for team in teams), threads)


def _to_seconds(measured: Any) -> float:
    seconds = to_number("measure", measured)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"measure: expected a function that returns seconds, got {seconds}")
    return seconds


def measure_placement(graph: Graph, place: Placement, *, rounds: int = 50) -> float:
    """Return the median of the seconds that the `Executor` takes.

    Parameters
    ----------
    graph : Graph
    place : Placement
    rounds : int
    """
    from pycodesign.branches.executor import Executor

    inputs = [np.zeros(graph.values[name].shape, graph.values[name].dtype) for name in graph.inputs]
    seconds = []
    run = Executor(graph, place, backend="threads")
    for _ in range(5):
        run(*inputs)
    for _ in range(rounds):
        begin = time.perf_counter()
        run(*inputs)
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds))
