"""Extraction: of the operations in an e-graph, few that compute all outputs. What several outputs use counts once."""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .program import MULTIPLY


class Node(NamedTuple):
    """An operation: classes in, class out; MULTIPLY has a constant's number as `right`."""

    op: int
    left: int
    right: int
    output: int

    @property
    def operands(self) -> set[int]:
        return {self.left} if self.op == MULTIPLY else {self.left, self.right}


@dataclass
class Graph:
    """An e-graph: classes of equal values, and the operations that compute them from others."""

    nodes: list[Node]
    inputs: Mapping[int, int]  # class to input row
    outputs: Mapping[int, int]  # output to class

    @cached_property
    def members(self) -> dict[int, list[int]]:
        """The nodes of each class that is no input."""
        members = defaultdict(list)
        for index, node in enumerate(self.nodes):
            if node.output not in self.inputs:
                members[node.output].append(index)
        return dict(members)


def order_nodes(graph: Graph, node_of: Mapping[int, int]) -> tuple[list[int], list[int]]:
    """Put the nodes that outputs need in an order in which each reads only earlier ones.

    Parameters
    ----------
    graph : Graph
    node_of : mapping
        The node chosen for each class.

    Returns
    -------
    order, cycle : lists of nodes
        If the choice is circular, `cycle` holds the nodes of one circle; otherwise it is empty.
    """
    order: list[int] = []
    done = set(graph.inputs)
    for root in graph.outputs.values():
        path: dict[int, int] = {}  # class to its node, from the root on
        stack = [root]
        while stack:
            current = stack[-1]
            if current in done:
                stack.pop()
                continue
            path[current] = node_of[current]
            missing = [operand for operand in graph.nodes[node_of[current]].operands if operand not in done]
            for operand in missing:
                if operand in path:
                    circle = list(path)
                    return [], [path[part] for part in circle[circle.index(operand) :]]
            if missing:
                stack.append(missing[0])
            else:
                done.add(current)
                order.append(path.pop(current))
                stack.pop()
    return order, []


def extract_greedily(graph: Graph, incumbent: Sequence[int], deadline: float) -> list[int]:
    """Choose, class by class, the node whose operands' operations, taken together, are fewest.

    Parameters
    ----------
    graph : Graph
    incumbent : sequence of int
        Nodes that compute all outputs: the result if time runs out.
    deadline : float
        By `time.monotonic`.

    Returns
    -------
    list of int
        Nodes, in an order in which each reads only earlier ones.
    """
    cost: dict[int, int] = dict.fromkeys(graph.inputs, 0)  # by class: the set of nodes that it takes, as bits
    node_of: dict[int, int] = {}
    users = defaultdict(list)
    for index, node in enumerate(graph.nodes):
        for operand in node.operands:
            users[operand].append(index)
    waiting = list(graph.inputs)
    while waiting:
        if time.monotonic() > deadline:
            node_of = {graph.nodes[index].output: index for index in incumbent}
            break
        for index in users[waiting.pop()]:
            node = graph.nodes[index]
            if node.output in graph.inputs or not node.operands <= cost.keys():
                continue
            taken = 1 << index
            for operand in node.operands:
                taken |= cost[operand]
            known = cost.get(node.output)
            if known is None or taken.bit_count() < known.bit_count():
                cost[node.output] = taken
                node_of[node.output] = index
                waiting.append(node.output)
    order, cycle = order_nodes(graph, node_of)
    assert not cycle, "a node that reads its own class costs more than that class"
    return order


def extract_optimally(graph: Graph, incumbent: Sequence[int], seconds: float) -> tuple[list[int], bool]:
    """Choose the fewest nodes that compute all outputs, by an integer program.

    One variable in {0, 1} for each node, and one for each class: that an output's class is 1, that a class is at most
    the sum of its nodes, and that a node is at most each of its operands' classes. Circular choices are cut off when
    they come up.

    Parameters
    ----------
    graph : Graph
    incumbent : sequence of int
        Nodes that compute all outputs, to begin with.
    seconds : float

    Returns
    -------
    chosen : list of int
        Nodes, in an order in which each reads only earlier ones; no more than the incumbent's.
    optimal : bool
        Whether it is known that no choice has fewer.
    """
    deadline = time.monotonic() + seconds
    best, _ = order_nodes(graph, {graph.nodes[index].output: index for index in incumbent})
    solver = IntegerProgram(graph)
    while (left := deadline - time.monotonic()) > 0:
        chosen, optimal = solver.solve(best, left)
        order, cycle = order_nodes(graph, {graph.nodes[index].output: index for index in chosen})
        if not cycle:
            return (order, optimal) if len(order) < len(best) else (best, optimal)
        solver.forbid(cycle)
    return best, False


@contextmanager
def mute_stdout() -> Iterator[None]:
    """HiGHS prints a banner when it is first used, into the file itself: past sys.stdout."""
    sys.stdout.flush()
    stdout, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(null)


class IntegerProgram:
    """The constraints of `extract_optimally` in HiGHS; variable n is node n, classes follow."""

    def __init__(self, graph: Graph) -> None:
        try:
            import highspy
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError('extraction="ilp" needs highspy: pip install "pycodesign[saturate]"') from error
        self.highspy, self.graph = highspy, graph
        self.class_variable = {part: len(graph.nodes) + k for k, part in enumerate(graph.members)}
        size = len(graph.nodes) + len(self.class_variable)
        with mute_stdout():
            self.highs = highspy.Highs()  # type: ignore[no-untyped-call]
        self.highs.setOptionValue("output_flag", False)
        self.highs.setOptionValue("threads", 1)
        needed = np.zeros(size)
        needed[[self.class_variable[part] for part in graph.outputs.values() if part not in graph.inputs]] = 1
        self.highs.addVars(size, needed, np.ones(size))
        nodes = np.arange(len(graph.nodes), dtype=np.int32)
        self.highs.changeColsCost(nodes.size, nodes, np.ones(nodes.size))
        integer = np.full(nodes.size, int(highspy.HighsVarType.kInteger), np.uint8)
        self.highs.changeColsIntegrality(nodes.size, nodes, integer)
        for part, members in graph.members.items():
            self.require([*members, self.class_variable[part]], [1.0] * len(members) + [-1.0], 0)
        for index, node in enumerate(graph.nodes):
            for operand in node.operands - graph.inputs.keys():
                self.require([self.class_variable[operand], index], [1.0, -1.0], 0)

    def require(self, variables: Sequence[int], factors: Sequence[float], least: float) -> None:
        """Add: sum of factors times variables >= least."""
        columns, values = np.array(variables, np.int32), np.array(factors, np.float64)
        self.highs.addRow(least, self.highspy.kHighsInf, columns.size, columns, values)

    def forbid(self, cycle: Iterable[int]) -> None:
        cycle = list(cycle)
        self.require(cycle, [-1.0] * len(cycle), 1 - len(cycle))

    def solve(self, start: Sequence[int], seconds: float) -> tuple[list[int], bool]:
        """The best nodes found within some seconds, at least as good as `start`, and whether they are optimal."""
        start_values = np.zeros(self.highs.getNumCol())
        start_values[start] = 1
        start_values[[self.class_variable[self.graph.nodes[index].output] for index in start]] = 1
        solution = self.highspy.HighsSolution()
        solution.col_value = start_values.tolist()
        self.highs.setSolution(solution)
        self.highs.setOptionValue("time_limit", seconds + self.highs.getRunTime())
        self.highs.run()
        values = np.array(self.highs.getSolution().col_value)[: len(self.graph.nodes)]
        optimal = self.highs.getModelStatus() == self.highspy.HighsModelStatus.kOptimal
        chosen = np.flatnonzero(values > 0.5).tolist() if values.size else list(start)
        return chosen, optimal
