"""Factoring by equality saturation: an e-graph holds equal sums side by side, and the cheapest program is extracted."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np

from pycodesign.quantize import QuantizedTensor

from .extract import Graph, Node, extract_greedily, extract_optimally
from .factor import factor_pair, factor_unique, prepare
from .program import ADD, MULTIPLY, SUBTRACT, ZERO, SumProgram

MAX_WEIGHTS = 4096
STARTS = ("unique", "pair")
ORDERS = 8  # of elimination that join the e-graph in a round

LANGUAGE = """
(datatype Sum (Input i64) (Constant i64) (Plus Sum Sum) (Minus Sum Sum) (Times Sum Sum))
(function output (i64) Sum :no-merge)
(ruleset rules)
"""
# The six of Q-gym: + and x commute, + associates both ways, x distributes and is factored out.
PUBLISHED = """
(rewrite (Plus a b) (Plus b a) :ruleset rules)
(rewrite (Times a b) (Times b a) :ruleset rules)
(rewrite (Plus (Plus a b) c) (Plus a (Plus b c)) :ruleset rules)
(rewrite (Plus a (Plus b c)) (Plus (Plus a b) c) :ruleset rules)
(rewrite (Times a (Plus b c)) (Plus (Times a b) (Times a c)) :ruleset rules)
(rewrite (Plus (Times a b) (Times a c)) (Times a (Plus b c)) :ruleset rules)
"""
# The constant -1 has number 0.
SUBTRACTION = """
(rewrite (Plus a (Times (Constant 0) b)) (Minus a b) :ruleset rules)
(rewrite (Minus (Plus a b) c) (Plus a (Minus b c)) :ruleset rules)
(rewrite (Plus a (Minus b c)) (Minus (Plus a b) c) :ruleset rules)
(rewrite (Minus (Minus a b) c) (Minus a (Plus b c)) :ruleset rules)
(rewrite (Minus a (Plus b c)) (Minus (Minus a b) c) :ruleset rules)
(rewrite (Plus a (Minus b c)) (Minus a (Minus c b)) :ruleset rules)
(rewrite (Minus a (Minus b c)) (Plus a (Minus c b)) :ruleset rules)
(rewrite (Times a (Minus b c)) (Minus (Times a b) (Times a c)) :ruleset rules)
(rewrite (Minus (Times a b) (Times a c)) (Times a (Minus b c)) :ruleset rules)
"""
OPERATIONS = ("Plus", "Minus", "Times")  # by ADD, SUBTRACT, MULTIPLY


@dataclass(frozen=True)
class Round:
    """One round of exploring and extracting."""

    start: str  # of `STARTS`
    nodes: int  # of the e-graph: operations, a + b and b + a counted once
    classes: int  # without the inputs
    operations: int  # of the best program so far
    optimal: bool  # no cheaper program in this e-graph; a greedy extraction never says so
    seconds: float


@dataclass(frozen=True)
class Saturation:
    """What `saturate` found.

    Parameters
    ----------
    program : SumProgram
        The one with the fewest operations.
    from_unique, from_pair : SumProgram
        The best that was reached from each start.
    pair : SumProgram
        The result of `factor` with ``method="pair"``, to compare with.
    rounds : list of Round
    stopped : {"rounds", "time limit"}
        Why it ended: all rounds are done or bring nothing more, or time ran out.
    """

    program: SumProgram
    from_unique: SumProgram
    from_pair: SumProgram
    pair: SumProgram
    rounds: list[Round]
    stopped: str

    @property
    def nodes(self) -> int:
        """Operations in the largest e-graph."""
        return max((round_.nodes for round_ in self.rounds), default=0)

    def __repr__(self) -> str:
        return (
            f"Saturation(operations={self.program.op.size}, from_unique={self.from_unique.op.size}, "
            f"from_pair={self.from_pair.op.size}, pair={self.pair.op.size}, nodes={self.nodes}, "
            f"rounds={len(self.rounds)}, stopped={self.stopped!r})"
        )


def saturate(
    q: QuantizedTensor,
    *,
    groups: int = 1,
    subtract: bool = True,
    extraction: str = "ilp",
    rounds: int = 10,
    time_limit: float = 60.0,
    node_limit: int = 1000,
    progress: Callable[[Round], object] = lambda _: None,
) -> Saturation:
    """Search for the program of fewest operations among those that algebra proves equal.

    A round puts the best program so far into an e-graph, applies rules until the next step would pass `node_limit`, and
    extracts the cheapest program, in which a shared sum counts once. It is done from two starts: from each output
    factored by itself (``unique``), as published, and from ``pair``. The latter's rounds each add programs of other
    orders of elimination; values with equal coefficients are one class from the outset.

    Parameters
    ----------
    q : QuantizedTensor
        Weights as `factor` takes them, at most 4,096.
    groups : int
    subtract : bool
        Whether there are rules for subtraction, as in none of the published ones: without them a negative weight of the
        first start is a multiplication by -1.
    extraction : {"ilp", "greedy"}
        An integer program (HiGHS), or the cheapest set of operations per class, class by class.
    rounds : int
        At most so many from each start.
    time_limit : float
        Seconds for everything. A round has an equal share of what is left.
    node_limit : int
        Operations in the e-graph beyond which it grows no further.
    progress : callable
        Called with each `Round`.

    Returns
    -------
    Saturation

    Raises
    ------
    ModuleNotFoundError
        egglog, or for ``"ilp"`` highspy, is not installed.
    TypeError, ValueError
        As in `factor`; or there are more than 4,096 weights, or an option is out of range.

    Warns
    -----
    RuntimeWarning
        Time ran out. The result is the best until then.

    References
    ----------
    C. Fu, H. Huang, B. Wasti, C. Cummins, R. Baghdadi, K. Hazelwood, Y. Tian, J. Zhao, H. Leather, Q-gym: An Equality
    Saturation Framework for DNN Inference Exploiting Weight Repetition, PACT 2022. Rules for subtraction, merged starts
    and the rest of the search are ours.

    Examples
    --------
    >>> import numpy as np
    >>> from pycodesign import quantize
    >>> from pycodesign.repetition.saturate import saturate
    >>> q = quantize.ternary(np.random.default_rng(0).standard_normal((8, 8), np.float32))
    >>> found = saturate(q, extraction="greedy", rounds=2)
    >>> found.program.op.size <= found.pair.op.size
    True
    """
    codes, levels = prepare(q, groups)
    if q.codes.size > MAX_WEIGHTS:
        raise ValueError(f"q: expected at most {MAX_WEIGHTS} weights to saturate, got {q.codes.size}; take 'pair'")
    if extraction not in ("ilp", "greedy"):
        raise ValueError(f"extraction: expected 'ilp' or 'greedy', got {extraction!r}")
    for name, value in (("rounds", rounds), ("time_limit", time_limit), ("node_limit", node_limit)):
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value!r}")
    import_egglog()

    search = Search(subtract, extraction, node_limit, time.monotonic() + time_limit)
    pair = factor_pair(codes, levels, groups)
    best: dict[str, SumProgram] = {}
    for start, first in zip(STARTS, (factor_unique(codes, levels, groups), pair), strict=True):
        best[start] = first
        for number in range(rounds):
            left = (rounds - number) + (rounds if start == "unique" else 0)
            seeds = range(1 + ORDERS * number, 1 + ORDERS * (number + 1)) if start == "pair" else ()
            others = (factor_pair(codes, levels, groups, seed) for seed in seeds)
            before = best[start].op.size
            best[start] = search.run_round(start, best[start], others, left)
            progress(search.rounds[-1])
            if search.out_of_time() or (start == "unique" and number and best[start].op.size == before):
                break
    program = min(best.values(), key=lambda program: program.op.size)
    stopped = "time limit" if search.out_of_time() else "rounds"
    if stopped == "time limit":
        warnings.warn(
            f"saturate: the time limit of {time_limit:g} s is reached; the program of {program.op.size} operations is "
            "the best so far",
            RuntimeWarning,
            stacklevel=2,
        )
    named = {start: replace(found, method="saturate") for start, found in best.items()}
    return Saturation(replace(program, method="saturate"), named["unique"], named["pair"], pair, search.rounds, stopped)


def import_egglog() -> Any:
    try:
        from egglog import bindings
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('saturate needs egglog and highspy: pip install "pycodesign[saturate]"') from error
    return bindings


class Search:
    """Rounds under common limits."""

    def __init__(self, subtract: bool, extraction: str, node_limit: int, deadline: float) -> None:
        self.rules = LANGUAGE + PUBLISHED + (SUBTRACTION if subtract else "")
        self.subtract, self.extraction = subtract, extraction
        self.node_limit, self.deadline = node_limit, deadline
        self.rounds: list[Round] = []

    def out_of_time(self) -> bool:
        return time.monotonic() >= self.deadline

    def run_round(self, start: str, best: SumProgram, others: Iterable[SumProgram], left: int) -> SumProgram:
        """Explore from programs that compute the same, extract; the better of what is found and of `best`."""
        begin = time.monotonic()
        expression = EGraph(self.rules, subtract=self.subtract or start == "pair")
        expression.add(best)
        for program in others:
            if self.out_of_time():
                break
            expression.add(program)
        if not self.out_of_time():
            expression.grow(self.node_limit)
        graph, incumbent = expression.read(best)
        optimal = False
        if self.extraction == "ilp":
            seconds = max(0.0, self.deadline - time.monotonic()) / left
            chosen, optimal = extract_optimally(graph, incumbent, seconds)
        else:
            chosen = extract_greedily(graph, incumbent, self.deadline)
        found = build_program(best, graph, chosen, expression.constants)
        if found.op.size < best.op.size:
            best = found
        seconds = time.monotonic() - begin
        self.rounds.append(Round(start, len(graph.nodes), len(graph.members), best.op.size, optimal, seconds))
        return best


class EGraph:
    """An e-graph of the values of programs that compute the same outputs."""

    def __init__(self, rules: str, subtract: bool) -> None:
        self.subtract = subtract  # or a - b is written a + -1 * b
        self.constants: list[Any] = [-1]
        self.names: dict[bytes, str] = {}  # of the first value with these coefficients
        self.written: set[str] = set()  # operations
        self.programs = 0
        self.graph = import_egglog().EGraph()
        self.run(rules)

    def run(self, text: str) -> None:
        self.graph.run_program(*self.graph.parse_program(text))

    def add(self, program: SumProgram) -> None:
        """Put a program in. Values with coefficients that are there already are equal to them."""
        lines = []
        names = name_values(program, self.programs)
        first = {
            name: self.names.setdefault(coefficients.tobytes(), name)
            for name, coefficients in zip(names, program.coefficients(), strict=True)
        }
        for name, operation, left, right in self.write(program, self.programs):
            term = f"({operation} {first.get(left, left)} {first.get(right, right)})"
            same = first.get(name, name)
            if same == name or self.programs == 0:  # all names of the first program are read
                lines.append(f"(let {name} {term})")
            if same != name and term not in self.written:
                lines.append(f"(union {term} {same})")
            self.written.add(term)
        if self.programs == 0:
            lines = [f"(let $x{i} (Input {i}))" for i in range(program.inputs)] + lines
            used = ((o, value) for o, value in enumerate(program.outputs.tolist()) if value != ZERO)
            lines += [f"(set (output {o}) {names[value]})" for o, value in used]
        self.programs += 1
        self.run("\n".join(lines))

    def write(self, program: SumProgram, number: int) -> Iterator[tuple[str, str, str, str]]:
        """Each operation of a program: name, operation, operands."""
        names = name_values(program, number)
        constants = [self.write_constant(constant) for constant in program.constants.tolist()]
        minus = self.write_constant(-1)
        instructions = zip(program.op.tolist(), program.left.tolist(), program.right.tolist(), strict=True)
        for name, (op, left, right) in zip(names[program.inputs :], instructions, strict=True):
            if op == MULTIPLY:
                yield name, "Times", constants[right], names[left]
            elif op == ADD:
                yield name, "Plus", names[left], names[right]
            elif left == ZERO:
                yield name, "Times", minus, names[right]
            elif self.subtract:
                yield name, "Minus", names[left], names[right]
            else:
                yield f"{name}n", "Times", minus, names[right]
                yield name, "Plus", names[left], f"{name}n"

    def write_constant(self, constant: Any) -> str:
        if constant not in self.constants:
            self.constants.append(constant)
        return f"(Constant {self.constants.index(constant)})"

    def grow(self, node_limit: int) -> None:
        """Apply all rules to all nodes, again and again, until a step changes nothing or makes too many nodes."""
        rows = self.count_rows()
        if sum(rows.values()) > node_limit:
            return
        while True:
            self.run("(push)(run-schedule (run rules))")
            before, rows = rows, self.count_rows()
            if rows == before:
                break
            if rows["Plus"] // 2 + rows["Minus"] + rows["Times"] // 2 > node_limit:  # Plus and Times both ways round
                self.run("(pop)")
                break

    def count_rows(self) -> dict[str, int]:
        functions = self.graph.freeze().functions
        return {name: len(functions[name].rows) for name in OPERATIONS}

    def read(self, program: SumProgram) -> tuple[Graph, list[int]]:
        """The graph, and which of its nodes are the first program."""
        functions = self.graph.freeze().functions
        number: dict[Any, int] = defaultdict(count().__next__)  # of each class
        inputs = {number[row.output]: self.graph.value_to_i64(row.inputs[0]) for row in functions["Input"].rows}
        outputs = {self.graph.value_to_i64(row.inputs[0]): number[row.output] for row in functions["output"].rows}
        constants = {row.output: self.graph.value_to_i64(row.inputs[0]) for row in functions["Constant"].rows}

        def make_node(op: int, operands: Sequence[Any], output: Any) -> Node:
            left, right = operands
            if op == MULTIPLY:
                constant, value = (left, right) if left in constants else (right, left)
                return Node(op, number[value], constants[constant], number[output])
            if op == ADD and number[right] < number[left]:
                left, right = right, left
            return Node(op, number[left], number[right], number[output])

        nodes = [
            make_node(op, row.inputs, row.output)
            for op, name in enumerate(OPERATIONS)
            for row in functions[name].rows
            if sum(operand in constants for operand in row.inputs) == (op == MULTIPLY)  # not x * (2 + 3), nor 2 + 3
        ]
        nodes = keep_computable(nodes, inputs)
        index = {node: k for k, node in enumerate(nodes)}
        values = {f"(Constant {k})": value for value, k in constants.items()}
        incumbent: dict[int, int] = {}  # the first node of each class
        for name, operation, left, right in self.write(program, 0):
            values |= {part: functions[part].rows[0].output for part in (name, left, right) if part not in values}
            node = make_node(OPERATIONS.index(operation), (values[left], values[right]), values[name])
            incumbent.setdefault(node.output, index[node])
        return Graph(nodes, inputs, outputs), list(incumbent.values())


def keep_computable(nodes: Iterable[Node], inputs: Iterable[int]) -> list[Node]:
    """The distinct nodes without those that have an operand which no node computes."""
    kept = list(dict.fromkeys(nodes))
    while True:
        computed = {node.output for node in kept}.union(inputs)
        fewer = [node for node in kept if node.operands <= computed]
        if len(fewer) == len(kept):
            return kept
        kept = fewer


def name_values(program: SumProgram, number: int) -> list[str]:
    return [f"$x{i}" for i in range(program.inputs)] + [f"$p{number}v{k}" for k in range(program.op.size)]


def build_program(like: SumProgram, graph: Graph, chosen: Sequence[int], constants: Sequence[Any]) -> SumProgram:
    """The program of the chosen nodes, which come in an order in which each reads only earlier ones."""
    value_of = dict(graph.inputs)
    factors: list[Any] = []
    instructions: list[tuple[int, int, int]] = []
    for index in chosen:
        op, left, right, output = graph.nodes[index]
        value_of[output] = like.inputs + len(instructions)
        if op == MULTIPLY and constants[right] == -1:
            instructions.append((SUBTRACT, ZERO, value_of[left]))
        elif op == MULTIPLY:
            if constants[right] not in factors:
                factors.append(constants[right])
            instructions.append((op, value_of[left], factors.index(constants[right])))
        else:
            instructions.append((op, value_of[left], value_of[right]))
    op, left, right = np.array(instructions, np.int32).reshape(-1, 3).T
    outputs = [value_of[graph.outputs[o]] if o in graph.outputs else ZERO for o in range(like.outputs.size)]
    return replace(
        like,
        op=op.astype(np.uint8),
        left=left,
        right=right,
        constants=np.array(factors, like.levels.dtype),
        outputs=np.array(outputs, np.int32),
    )
