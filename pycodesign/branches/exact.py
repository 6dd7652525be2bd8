"""Placements of small graphs that are proved to be the fastest, by branch and bound."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pycodesign.branches.listing import place_by_rank
from pycodesign.branches.simulate import Problem, simulate

__all__ = ["Solution", "solve"]

MOST_KNOWN = 500  # partial schedules of the same bodies that are remembered
EPSILON = 1e-12  # relative: rounding of sums
Teams = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Solution:
    """What `solve` found.

    Parameters
    ----------
    teams : tuple of tuple of int
        Bodies of each device, in order.
    latency : float
        Seconds.
    bound : float
        No placement is faster than this; the latency itself where it is proved to be the least.
    others : list of (float, teams)
        The fastest that were met on the way, this one first.
    """

    teams: Teams
    latency: float
    bound: float
    others: list[tuple[float, Teams]] = field(default_factory=list)


def solve(problem: Problem, *, limit: float = 10.0, keep: int = 4) -> Solution:
    """Find the placement, and the order on each device, of the least latency.

    Bodies are scheduled in the order in which they start. A partial schedule is given up when what is left of the
    critical path, or of the work of all devices, cannot be faster than the best; or when in another one of the same
    bodies no device was free later and no input arrived later. Of devices that are alike and idle only one is tried.

    Parameters
    ----------
    problem : Problem
        Its slowdown does not count: see `Problem.slowed`.
    limit : float
        Seconds after which the best so far is returned.
    keep : int
        How many of the fastest to return.

    Returns
    -------
    Solution
    """
    return _Search(problem, time.monotonic() + limit, keep).run()


class _Search:
    def __init__(self, problem: Problem, end: float, keep: int) -> None:
        self.problem, self.end, self.keep = problem, end, keep
        n, self.devices = len(problem.names), problem.devices
        self.after: list[list[int]] = [[] for _ in range(n)]
        for body, row in enumerate(problem.before):
            for other, _ in row:
                self.after[other].append(body)
        self.least = [min(row) for row in problem.costs]
        self.tail = list(self.least)  # seconds from a body's start to the end of all behind it, at best
        for body in reversed(range(n)):
            self.tail[body] += max((self.tail[other] for other in self.after[body]), default=0.0)
        ancestors: list[set[int]] = []
        for row in problem.before:
            ancestors.append({other for other, _ in row}.union(*(ancestors[other] for other, _ in row)))
        self.joins = [(body, sorted(others)) for body, others in enumerate(ancestors) if len(problem.before[body]) > 1]
        columns = list(zip(*problem.costs, strict=True))
        self.alike = [columns.index(column) for column in columns]
        self.seen: dict[tuple[bool, ...], list[tuple[float, ...]]] = {}
        self.pool: list[tuple[float, Teams]] = []
        self.stopped = False
        self.steps = 0

    def run(self) -> Solution:
        n = len(self.problem.names)
        sequences = [
            [[*range(n)] if d == device else [] for d in range(self.devices)] for device in range(self.devices)
        ]
        for rows in [place_by_rank(self.problem), *sequences]:
            self._offer(simulate(self.problem, rows), tuple(map(tuple, rows)))
        state = _State((0.0,) * self.devices, (-1.0,) * n, (-1,) * n, (), 0.0, sum(self.least))
        root = self._bound(state)
        path = [self._follow(state)]
        while path and not self.stopped:
            following = next(path[-1], None)
            if following is None:
                path.pop()
            else:
                path.append(self._follow(following))
        latency, teams = self.pool[0]
        return Solution(teams, latency, root if self.stopped else latency, self.pool)

    def _offer(self, latency: float, teams: Teams) -> None:
        if all(teams != other for _, other in self.pool):
            self.pool = sorted([*self.pool, (latency, teams)])[: self.keep]

    def _bound(self, state: _State) -> float:
        """Return seconds that no completion of a partial schedule stays under.

        A body comes behind all that it depends on, however many devices there are; and a body that waits for others
        comes behind their work, shared evenly by devices that begin when they can.
        """
        free = [max(time, state.last) for time in state.free]
        bound, soonest = max(state.free), min(free)
        earliest = list(state.finish)  # of bodies to come: when they can be done at best
        starts = [math.inf] * self.devices  # when a device can begin anything that is left
        for body, device in enumerate(state.device_of):
            if device >= 0:
                continue
            start = soonest
            for other, _ in self.problem.before[body]:
                start = max(start, earliest[other])
            earliest[body] = start + self.least[body]
            bound = max(bound, start + self.tail[body])
            for d in range(self.devices):
                begin = max(free[d], start)
                for other, delay in self.problem.before[body]:
                    if state.device_of[other] not in (-1, d):
                        begin = max(begin, state.finish[other] + delay)
                starts[d] = min(starts[d], begin)
        if starts[0] == math.inf:
            return bound
        starts.sort()
        bound = max(bound, _fill(starts, state.work))
        for body, others in self.joins:
            if state.device_of[body] < 0:
                work = sum(self.least[other] for other in others if state.device_of[other] < 0)
                if work:
                    bound = max(bound, _fill(starts, work) + self.tail[body])
        return bound

    def _follow(self, state: _State) -> Iterator[_State]:
        """Yield the partial schedules of one more body that may lead to the best, the most urgent first."""
        problem = self.problem
        self.steps += 1
        if self.steps % 64 == 0 and time.monotonic() > self.end:
            self.stopped = True
        if self.stopped:
            return
        if len(state.order) == len(problem.names):
            teams: list[list[int]] = [[] for _ in range(self.devices)]
            for body in state.order:
                teams[state.device_of[body]].append(body)
            self._offer(simulate(problem, teams), tuple(map(tuple, teams)))
            return
        arrivals = {
            body: [self._find_arrival(state, body, d) for d in range(self.devices)]
            for body, device in enumerate(state.device_of)
            if device < 0 and any(state.device_of[other] >= 0 for other, _ in problem.before[body])
        }
        if self._is_dominated(state, arrivals):
            return
        moves = []
        for body, device in enumerate(state.device_of):
            if device >= 0 or any(state.device_of[other] < 0 for other, _ in problem.before[body]):
                continue
            tried = set()
            for d in range(self.devices):
                if d not in state.device_of:
                    if self.alike[d] in tried:
                        continue
                    tried.add(self.alike[d])
                start = max(state.last, state.free[d], arrivals[body][d] if body in arrivals else 0.0)
                moves.append((start, -self.tail[body], body, d))
        for start, _, body, d in sorted(moves):
            following = state.add(body, d, start, problem.costs[body][d], self.least[body])
            if self._bound(following) < self.pool[0][0] * (1 - EPSILON):
                yield following

    def _find_arrival(self, state: _State, body: int, device: int) -> float:
        """Return when all that is known of a body's inputs is on a device."""
        arrival = 0.0
        for other, delay in self.problem.before[body]:
            if state.device_of[other] >= 0:
                arrival = max(arrival, state.finish[other] + (delay if state.device_of[other] != device else 0.0))
        return arrival

    def _is_dominated(self, state: _State, arrivals: dict[int, list[float]]) -> bool:
        """Whether the same bodies were done before and nothing was later; remember this schedule if not."""
        rows = []  # of each device: when it is free, and when it has the inputs of each body to come
        for d, free in enumerate(state.free):
            free = max(free, state.last)
            rows.append((free, *(max(free, times[d]) for times in arrivals.values())))
        if len(set(self.alike)) == 1:
            rows.sort()
        vector = (state.last, *(number for row in rows for number in row))
        known = self.seen.setdefault(tuple(device >= 0 for device in state.device_of), [])
        if any(all(a <= b for a, b in zip(other, vector, strict=True)) for other in known):
            return True
        if len(known) < MOST_KNOWN:
            known.append(vector)
        return False


def _fill(starts: list[float], work: float) -> float:
    """Return when so much work can be done at best, by devices that begin at these times, ascending."""
    total = work
    for count, start in enumerate(starts, 1):
        total += start
        if count == len(starts) or total / count <= starts[count]:
            break
    return total / count


@dataclass(frozen=True)
class _State:
    """A partial schedule: nothing that follows starts before `last`."""

    free: tuple[float, ...]
    finish: tuple[float, ...]
    device_of: tuple[int, ...]
    order: tuple[int, ...]
    last: float
    work: float

    def add(self, body: int, device: int, start: float, seconds: float, least: float) -> _State:
        end = start + seconds
        free = (*self.free[:device], end, *self.free[device + 1 :])
        finish = (*self.finish[:body], end, *self.finish[body + 1 :])
        device_of = (*self.device_of[:body], device, *self.device_of[body + 1 :])
        return _State(free, finish, device_of, (*self.order, body), start, self.work - least)


def enumerate_all(problem: Problem) -> float:
    """Return the least latency of all orders on all devices, each tried: what `solve` is held against.

    Examples
    --------
    >>> from pycodesign.branches.simulate import Problem
    >>> problem = Problem(("a", "b"), ((2.0, 2.0), (3.0, 3.0)), ((), ()))
    >>> enumerate_all(problem), solve(problem).latency
    (3.0, 3.0)
    """
    n, best = len(problem.names), math.inf
    free, finish, device_of = [0.0] * problem.devices, [0.0] * n, [-1] * n

    def visit(left: Sequence[int]) -> None:
        nonlocal best
        if not left:
            best = min(best, max(finish, default=0.0))
            return
        for body in left:
            if any(device_of[other] < 0 for other, _ in problem.before[body]):
                continue
            for d in range(problem.devices):
                before = free[d]
                start = before
                for other, delay in problem.before[body]:
                    start = max(start, finish[other] + (delay if device_of[other] != d else 0.0))
                free[d] = finish[body] = start + problem.costs[body][d]
                device_of[body] = d
                visit([other for other in left if other != body])
                free[d], device_of[body] = before, -1

    visit(range(n))
    return best
