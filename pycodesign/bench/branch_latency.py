"""What it costs that teams wait for each other: forks, joins, barriers and calls, spinning and parked.

Run as a program it prints JSON, of a process that has not loaded torch: there the threads are a pool of our own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from pycodesign import _core, ops

__all__ = ["measure_latencies"]

STEPS = 200  # forks and joins, or barriers, in one run
NEVER = 1e6  # microseconds of patience: no team does another's work
PARKED = (  # microseconds to spin, and of patience: a caller that spins meets a thread that wakes up
    ("the caller spins", 500.0, NEVER),
    ("the caller parks, too", 0.0, NEVER),
    ("the caller does all that nobody has begun", 50.0, 5.0),
)
RESTS = {"pool": 0.003, "openmp": 0.02}  # seconds until every thread sleeps; an OpenMP runtime's spin for some ms


def measure_latencies(rounds: int = 300, parked_rounds: int = 100) -> list[dict[str, Any]]:
    """Time what two teams of one core do together.

    Parameters
    ----------
    rounds, parked_rounds : int
        Runs while threads spin, and runs behind a pause in which they park.

    Returns
    -------
    list of dict
        ``what``, ``state`` (spinning or parked), ``team`` (whose threads), ``p10``, ``p50`` and ``p99`` in
        microseconds, ``rounds``.
    """
    fork = _core.BranchRunner([0, 1, 0], [1] * 3, [[], [0], [1]], 2, [None] * 3)  # the caller waits for the other team
    rest = RESTS[_team()]
    ladder, barriers = _make_ladder(), _make_barriers()

    def nothing() -> None:
        pass

    rows = []
    for pin in (False, True):
        pinned = ", pinned" if pin else ""
        spinning: dict[str, tuple[Callable[[], object], int]] = {
            f"fork and join within a plan{pinned}": (partial(ladder.run, NEVER, NEVER, pin), STEPS),
            f"barrier within a plan{pinned}": (partial(barriers.run, NEVER, NEVER, pin), STEPS),
            f"call of a plan that forks and joins{pinned}": (partial(fork.run, NEVER, NEVER, pin), 1),
        }
        for what, (run, steps) in spinning.items():
            rows.append(_row(what, "spinning", _time(run, rounds * (1 if steps > 1 else 10), 0.0, steps)))
        for name, spin, patience in PARKED:
            seconds = _time(partial(fork.run, spin, patience, pin), parked_rounds, rest, 1)
            rows.append(_row(f"call of a plan that forks and joins{pinned}, {name}", "parked", seconds))
    call = partial(ops.run_branches, [nothing, nothing])
    rows.append(_row("run_branches of two empty functions", "spinning", _time(call, 10 * rounds, 0.0, 1)))
    rows.append(_row("run_branches of two empty functions", "parked", _time(call, parked_rounds, rest, 1)))
    return rows


def _make_ladder() -> _core.BranchRunner:
    """Fork from team 0 to team 1, and join, again and again."""
    after = [[2 * i - 1] * (i > 0) if team == 0 else [2 * i] for i in range(STEPS) for team in range(2)]
    return _core.BranchRunner([0, 1] * STEPS, [1] * 2 * STEPS, after, 2, [None] * 2 * STEPS)


def _make_barriers() -> _core.BranchRunner:
    """Each team waits for the other's last step."""
    after = [[2 * i - 1 - team] * (i > 0) for i in range(STEPS) for team in range(2)]
    return _core.BranchRunner([0, 1] * STEPS, [1] * 2 * STEPS, after, 2, [None] * 2 * STEPS)


def _time(run: Callable[[], object], rounds: int, rest: float, steps: int) -> list[float]:
    for _ in range(5):
        run()
    seconds = []
    for _ in range(rounds):
        if rest:
            time.sleep(rest)
        start = time.perf_counter()
        run()
        seconds.append((time.perf_counter() - start) / steps)
    return seconds


def _row(what: str, state: str, seconds: list[float]) -> dict[str, Any]:
    p10, p50, p99 = (round(1e6 * float(s), 3) for s in np.percentile(seconds, [10, 50, 99]))
    return {"what": what, "state": state, "team": _team(), "p10": p10, "p50": p50, "p99": p99, "rounds": len(seconds)}


def _team() -> str:
    return _core.thread_backend().split(":")[0]


if __name__ == "__main__":
    print(json.dumps(measure_latencies(*map(int, sys.argv[1:]))))
