"""Which stream of a GPU runs which body, and which events they need: pure functions of the graph."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pycodesign.branches.graph import Graph, Placement, sort_bodies

__all__ = ["Step", "cover_by_chains", "plan_steps"]

Before = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Step:
    """A body on its stream: it starts when what `waits` names is done; `is_awaited` if another stream waits for it."""

    body: str
    stream: int
    waits: tuple[str, ...]
    is_awaited: bool


def cover_by_chains(before: Before) -> list[tuple[str, ...]]:
    """Cover bodies with as few chains as there can be, each of which depends on the one before it in its chain.

    That number is how many bodies at most can run at once (Dilworth); a maximum matching between each body and its next
    one finds the chains. Direct dependencies are preferred: they need no event then.

    Parameters
    ----------
    before : mapping of str to sequence of str
        For each body those that it depends on.

    References
    ----------
    Dilworth, "A decomposition theorem for partially ordered sets", 1950; Fulkerson, 1956.

    Examples
    --------
    >>> from pycodesign.branches.streams import cover_by_chains
    >>> cover_by_chains({"stem": [], "left": ["stem"], "right": ["stem"], "join": ["left", "right"]})
    [('stem', 'left', 'join'), ('right',)]
    """
    order = sort_bodies(before)
    behind: dict[str, list[str]] = {name: [] for name in order}  # all that depend on it, the direct ones first
    for name in reversed(order):
        direct = [other for other in order if name in before[other]]
        others = {far for other in direct for far in behind[other]} - set(direct)
        behind[name] = direct + [other for other in order if other in others]
    previous: dict[str, str] = {}

    def find_next(name: str, seen: set[str]) -> bool:
        for other in behind[name]:
            if other not in seen:
                seen.add(other)
                if other not in previous or find_next(previous[other], seen):
                    previous[other] = name
                    return True
        return False

    for name in order:
        find_next(name, set())
    following = {first: second for second, first in previous.items()}
    chains = []
    for name in order:
        if name not in previous:
            chain = [name]
            while chain[-1] in following:
                chain.append(following[chain[-1]])
            chains.append(tuple(chain))
    return chains


def plan_steps(graph: Graph, place: Placement) -> list[Step]:
    """List what to start, in an order in which nothing waits for what was not started.

    A body waits for another stream's only where nothing that it follows has waited already.

    Parameters
    ----------
    graph : Graph
    place : Placement
        A team is a stream.
    """
    waits = {name: list(graph.before[name]) for name in graph.bodies}
    stream = place.team_of
    position: dict[str, int] = {}
    for team in place.teams:
        position |= {name: i for i, name in enumerate(team)}
        for first, second in itertools.pairwise(team):
            waits[second].append(first)
    known: list[dict[int, int]] = [{} for _ in place.teams]  # by stream: up to where it knows that another has come
    known_after: dict[str, dict[int, int]] = {}
    needed: dict[str, list[str]] = {}
    order = sort_bodies(waits)
    started = {name: i for i, name in enumerate(order)}
    for name in order:
        own = known[stream[name]]
        needed[name] = []
        for source in sorted(graph.before[name], key=started.__getitem__, reverse=True):  # a late one knows of others
            other = stream[source]
            if other == stream[name] or own.get(other, -1) >= position[source]:
                continue
            needed[name].append(source)
            for at, reached in known_after[source].items():
                own[at] = max(own.get(at, -1), reached)
        own[stream[name]] = position[name]
        known_after[name] = dict(own)
    awaited = {source for sources in needed.values() for source in sources}
    return [Step(name, stream[name], tuple(sources), name in awaited) for name, sources in needed.items()]
