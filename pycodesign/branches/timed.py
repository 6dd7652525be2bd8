"""Teams whose bodies may not return: each on a thread of its own, which can be left behind."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from pycodesign import _core

__all__ = ["Step", "Team", "hold_torch_threads", "run_timed"]


class Step(Protocol):
    """A body with its arguments."""

    name: str

    def __call__(self) -> None: ...


@dataclass
class Team:
    """What a thread runs, step after step.

    Parameters
    ----------
    steps : iterable of Step
        Teams that share an iterator take its steps in turn.
    before : sequence of sequence of str, optional
        For each step the names of those that it waits for.
    threads : int
        Of the operations of this package within a step; how many torch's take is up to the step.
    """

    steps: Iterable[Step]
    before: Sequence[Sequence[str]] = ()
    threads: int = 1


def run_timed(teams: Sequence[Team], timeout: float) -> None:
    """Run every team on a new thread, and return when all have finished.

    Teams begin no further step once the caller stops waiting, or is refused a thread.

    Raises
    ------
    TimeoutError
        With the names of the steps that were running then. Their threads go on until they return.
    BaseException
        The first one that a step raises, after all have stopped.
    """
    changed = threading.Condition()
    done: set[str] = set()
    running: dict[int, str] = {}
    errors: list[BaseException] = []
    active = len(teams)

    def run(index: int, team: Team) -> None:
        nonlocal active
        try:
            for step, before in zip(team.steps, team.before or itertools.repeat(()), strict=False):
                with changed:
                    while not errors and not done.issuperset(before):
                        changed.wait()
                    if errors:
                        return
                    running[index] = step.name
                _core.call_with_threads(step, team.threads)
                with changed:
                    del running[index]
                    done.add(step.name)
                    changed.notify_all()
        except BaseException as error:
            with changed:
                errors.append(error)
        finally:
            with changed:
                running.pop(index, None)
                active -= 1
                changed.notify_all()

    end = time.monotonic() + min(timeout, threading.TIMEOUT_MAX)
    try:
        for index, team in enumerate(teams):
            threading.Thread(target=run, args=(index, team), name=f"team {index}", daemon=True).start()
        with changed:
            in_time = changed.wait_for(
                lambda: active == 0, min(max(0.0, end - time.monotonic()), threading.TIMEOUT_MAX)
            )
            if not in_time:
                names = ", ".join(running[index] for index in sorted(running)) or "nothing"
                late = TimeoutError(f"timeout: expected to finish within {timeout:g} s, still running: {names}")
                late.__cause__ = errors[0] if errors else None
                errors.insert(0, late)
                changed.notify_all()
    except BaseException as error:
        with changed:
            errors.append(error)
            changed.notify_all()
        raise
    if errors:
        raise errors[0]


@contextmanager
def hold_torch_threads(threads: int) -> Iterator[None]:
    """Let torch's operations that begin on this thread run on so many threads, where torch is loaded.

    What other threads have stays, unlike with ``torch.set_num_threads``.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_num_threads"):  # still being imported
        yield
        return
    torch.get_num_threads()  # the first call on a thread sets what it has
    before = _core.swap_runtime_threads(threads, threads)
    try:
        yield
    finally:
        _core.swap_runtime_threads(*before)
