"""Placements of graphs of any size by list scheduling."""

from __future__ import annotations

from pycodesign.branches.simulate import Problem

__all__ = ["place_by_rank"]


def place_by_rank(problem: Problem) -> list[list[int]]:
    """Place bodies one after another, those with the most behind them first, each where it is done soonest.

    Parameters
    ----------
    problem : Problem
        Its slowdown does not count.

    Returns
    -------
    list of list of int
        Bodies of each device, in order.

    References
    ----------
    HEFT: Topcuoglu, Hariri and Wu, IEEE TPDS 2002; with its insertion into gaps.

    Examples
    --------
    >>> from pycodesign.branches.simulate import Problem
    >>> place_by_rank(Problem(("a", "b", "c"), ((1.0, 1.0), (2.0, 2.0), (3.0, 3.0)), ((), (), ())))
    [[2], [1, 0]]
    """
    n, devices = len(problem.names), problem.devices
    rank = [sum(row) / devices for row in problem.costs]
    for body in reversed(range(n)):
        own = rank[body]
        for later in range(body + 1, n):
            for other, delay in problem.before[later]:
                if other == body:
                    mean = delay * (devices - 1) / devices
                    rank[body] = max(rank[body], own + mean + rank[later])
    busy: list[list[tuple[float, float, int]]] = [[] for _ in range(devices)]  # start, end, body
    finish, device_of = [0.0] * n, [-1] * n
    for body in sorted(range(n), key=lambda b: (-rank[b], b)):
        choices = []
        for d in range(devices):
            ready = 0.0
            for other, delay in problem.before[body]:
                ready = max(ready, finish[other] + (delay if device_of[other] != d else 0.0))
            start = _find_gap(busy[d], ready, problem.costs[body][d])
            choices.append((start + problem.costs[body][d], start, d))
        finish[body], start, device_of[body] = min(choices)
        busy[device_of[body]].append((start, finish[body], body))
        busy[device_of[body]].sort()
    return [[body for _, _, body in row] for row in busy]


def _find_gap(busy: list[tuple[float, float, int]], ready: float, seconds: float) -> float:
    """Return the first time from which a device is idle for long enough."""
    start = ready
    for begin, end, _ in busy:
        if start + seconds <= begin:
            break
        start = max(start, end)
    return start
