"""SumMerge's heuristic: sub-sums that groups of inputs share, computed once."""

from __future__ import annotations

import heapq
from collections import Counter
from itertools import combinations


def merge_sums(groups: list[int], variables: int) -> list[int]:
    """Rewrite groups into smaller ones with equal sums.

    Each two groups share a sub-sum. The one that occurs most, and of those the longest, becomes a variable, which takes
    its terms' place in all groups that hold them. Again, until no two groups share two terms.

    Parameters
    ----------
    groups : list of int
        Sets of variables, as bits. Changed in place.
    variables : int
        So many exist.

    Returns
    -------
    list of int
        The terms of each new variable.
    """
    occurs: Counter[int] = Counter()
    heap: list[tuple[int, int, int]] = []

    def change(terms: int, by: int) -> None:
        if terms & (terms - 1):  # two terms or more
            occurs[terms] += by
            if by > 0:
                heapq.heappush(heap, (-occurs[terms], -terms.bit_count(), terms))

    for a, b in combinations(groups, 2):
        change(a & b, 1)
    made = []
    while heap:
        negative, size, terms = heapq.heappop(heap)
        if occurs[terms] != -negative:
            if occurs[terms]:
                heapq.heappush(heap, (-occurs[terms], size, terms))
            continue
        made.append(terms)
        variable = 1 << (variables + len(made) - 1)
        for number, group in enumerate(groups):
            if group & terms == terms:
                shorter = group ^ terms | variable
                for other, taken in enumerate(groups):
                    if other != number:
                        change(group & taken, -1)
                        change(shorter & taken, 1)
                groups[number] = shorter
    return made
