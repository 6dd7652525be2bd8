"""Networks as small graphs of bodies, and where each body runs: what every stage of this family shares.

A body is a piece of network that runs on one team of cores, or one device, without a stop: a torch module, a
`repetition.chain.Chain`, any callable. Bodies read and write slices of values; a concatenation is a value of which each
branch writes its slice. A placement says which team runs which bodies, in which order.
"""

from __future__ import annotations

import itertools
import math
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from pycodesign._arguments import join_names, to_integer, to_numpy
from pycodesign.branches.timed import hold_torch_threads

__all__ = ["Body", "Graph", "Placement", "Slice", "Value", "to_graph"]

DTYPES = ("float32", "uint8", "int8", "int32")
CACHE_LINE = 64

Writers: TypeAlias = "dict[str, list[tuple[Slice, str]]]"


@dataclass(frozen=True)
class Value:
    """An array that bodies exchange.

    Parameters
    ----------
    shape : tuple of int
        (N, C, ...): the batch first, then what a `Slice` cuts.
    dtype : {"float32", "uint8", "int8", "int32"}
        Or NumPy's object for it.

    Raises
    ------
    TypeError
        For a shape that is no sequence of integers, and what is no dtype.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.shape, Iterable):
            raise TypeError(f"shape: expected (N, C, ...), got {type(self.shape).__name__}")
        object.__setattr__(self, "shape", tuple(_to_size("shape", size) for size in self.shape))
        if not isinstance(self.dtype, str):
            try:
                object.__setattr__(self, "dtype", np.dtype(self.dtype).name)
            except TypeError:
                wanted, got = join_names(map(repr, DTYPES)), type(self.dtype).__name__
                raise TypeError(f"dtype: expected {wanted}, got {got}") from None

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Slice:
    """Channels [begin, end) of a value; `end` None: all that follow."""

    value: str
    begin: int = 0
    end: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "begin", _to_size("begin", self.begin))
        if self.end is not None:
            object.__setattr__(self, "end", _to_size("end", self.end))


@dataclass(frozen=True)
class Body:
    """A piece of network that one team runs without a stop.

    Parameters
    ----------
    name : str
    run : callable, Chain or Packed
        ``run(*inputs)`` returns an array, or a sequence of one for each output: ``()`` where there is none. It keeps
        nothing that a second call at the same time would disturb, and does not overwrite an input that another body
        reads, too, or that is an output.
    inputs, outputs : tuple of Slice
        What it reads and what it writes.
    arrays : {"torch", "numpy"}
        What `run` takes and returns; a `Chain` or a packed layer always takes NumPy's.
    branch, segment : int
        Where it stands in a network of branches; -1: stem or head.
    costs : tuple of str
        Keys of its layers and gates in a latency table; empty: known by its own name.
    may_recompute : bool
        Whether several teams may each run a copy of it instead of waiting for one.
    """

    name: str
    run: Callable[..., Any]
    inputs: tuple[Slice, ...]
    outputs: tuple[Slice, ...]
    arrays: str = "torch"
    branch: int = -1
    segment: int = -1
    costs: tuple[str, ...] = ()
    may_recompute: bool = False

    def __post_init__(self) -> None:
        if self.arrays not in ("torch", "numpy"):
            raise ValueError(f"arrays: expected 'torch' or 'numpy', got {self.arrays!r}")
        if not callable(self.run):
            raise TypeError(f"run: expected a callable, a chain or a packed layer, got {type(self.run).__name__}")
        for name, module in (("Chain", "pycodesign.repetition.chain"), ("Packed", "pycodesign.ops")):
            native = getattr(sys.modules.get(module), name, None)  # None: nobody has made one
            if native is not None and isinstance(self.run, native):
                object.__setattr__(self, "arrays", "numpy")
        for name in ("inputs", "outputs"):
            pieces = getattr(self, name)
            if isinstance(pieces, Slice) or not isinstance(pieces, Iterable):
                raise TypeError(f"{name}: expected a tuple of Slice, got {type(pieces).__name__}")
            object.__setattr__(self, name, tuple(pieces))


class Graph:
    """Bodies, the values between them, and which values come in and go out.

    Parameters
    ----------
    values : mapping of str to Value
    bodies : sequence of Body
        In any order that their names allow: each value is written once in a run.
    inputs, outputs : sequence of str
        Names of values, each once; one may be both.

    Attributes
    ----------
    bodies : dict of str to Body
        Sorted so that each comes behind all that it depends on.
    before : dict of str to tuple of str
        For each body those whose results it reads.

    Raises
    ------
    TypeError, ValueError
        For unknown values, bodies of one name, a slice that is out of range or that no body writes, two bodies that
        write the same elements, an input or output named twice, and a cycle, named.

    Examples
    --------
    >>> import numpy as np
    >>> from pycodesign.branches import Body, Graph, Slice, Value
    >>> values = {"x": Value((1, 2)), "y": Value((1, 4))}
    >>> bodies = [
    ...     Body("double", lambda x: 2 * x, (Slice("x"),), (Slice("y", 0, 2),), "numpy"),
    ...     Body("negate", lambda x: -x, (Slice("x"),), (Slice("y", 2, 4),), "numpy"),
    ... ]
    >>> graph = Graph(values, bodies, ["x"], ["y"])
    >>> graph(np.float32([[1, 2]]))
    [array([[ 2.,  4., -1., -2.]], dtype=float32)]
    """

    def __init__(
        self, values: Mapping[str, Value], bodies: Iterable[Body], inputs: Sequence[str], outputs: Sequence[str]
    ) -> None:
        if not isinstance(values, Mapping):
            raise TypeError(f"values: expected a mapping of str to Value, got {type(values).__name__}")
        self.values = dict(values)
        for name, value in self.values.items():
            if not isinstance(value, Value):
                raise TypeError(f"values: expected a Value, got {type(value).__name__} as {name!r}")
            if value.dtype not in DTYPES or len(value.shape) < 2 or min(value.shape) < 1:
                raise ValueError(f"values: expected shapes (N, C, ...) of {', '.join(DTYPES)}, got {value} as {name!r}")
        given: dict[str, Body] = {}
        for body in bodies:
            if not isinstance(body, Body):
                raise TypeError(f"bodies: expected Body, got {type(body).__name__}")
            if body.name in given:
                raise ValueError(f"bodies: expected different names, got {body.name!r} twice")
            given[body.name] = replace(
                body,
                inputs=tuple(self._check_slice(body.name, piece) for piece in body.inputs),
                outputs=tuple(self._check_slice(body.name, piece) for piece in body.outputs),
            )
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        for kind, names in (("inputs", self.inputs), ("outputs", self.outputs)):
            if unknown := [name for name in names if name not in self.values]:
                raise ValueError(f"{kind}: expected names of values, got {unknown[0]!r}")
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{kind}: expected different names, got {twice[0]!r} twice")
        before = self._find_before(given, self._check_writers(given))
        self.bodies = {name: given[name] for name in sort_bodies(before)}
        self.before = {name: before[name] for name in self.bodies}

    def __call__(self, *inputs: Any, threads: int = 1) -> list[Any]:
        """Run all bodies one after another, on the caller: what any other way to run it must return, bit for bit.

        Parameters
        ----------
        *inputs : array
            NumPy arrays or torch tensors, one for each input, of its shape and dtype.
        threads : int, default 1
            Of torch's operations, whose sums depend on it; those of this package are the same on any number.

        Returns
        -------
        list of arrays
            New ones, one for each output, of the kind of the inputs.
        """
        arrays, as_torch = self.allocate(), self.check_inputs(inputs)
        for name, x in zip(self.inputs, inputs, strict=True):
            arrays[name][...] = to_numpy(name, x)[0]
        with hold_torch_threads(to_integer("threads", threads, 1)):
            for body in self.bodies.values():
                run_body(body, [view(arrays, piece) for piece in body.inputs], [view(arrays, p) for p in body.outputs])
        found = [arrays[name] for name in self.outputs]
        if not as_torch:
            return found
        import torch

        return [torch.from_numpy(array) for array in found]

    def allocate(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return an array for each value."""
        return {name: allocate_array(value) for name, value in self.values.items()}

    def check_inputs(self, inputs: Sequence[Any]) -> bool:
        """Check the arguments of a run; return whether they are torch tensors."""
        if len(inputs) != len(self.inputs):
            raise TypeError(f"inputs: expected {len(self.inputs)} arrays, got {len(inputs)}")
        for name, x in zip(self.inputs, inputs, strict=True):
            value = self.values[name]
            if isinstance(x, np.ndarray) and x.dtype == value.dtype and x.shape == value.shape:
                continue  # the text costs microseconds
            wanted = f"{value.dtype} {value.shape}"
            if not hasattr(x, "shape") or not hasattr(x, "dtype"):
                raise TypeError(f"{name}: expected {wanted}, got {type(x).__name__}")
            dtype = str(x.dtype).removeprefix("torch.")
            if dtype != value.dtype:
                raise TypeError(f"{name}: expected {wanted}, got {dtype} {tuple(x.shape)}")
            if tuple(x.shape) != value.shape:
                raise ValueError(f"{name}: expected {wanted}, got {dtype} {tuple(x.shape)}")
        return bool(inputs) and not isinstance(inputs[0], np.ndarray)

    def replace_runs(self, change: Callable[[Body], Callable[..., Any] | Body]) -> Graph:
        """Return the same graph with other callables, as a conversion of each body's module makes them."""
        made = []
        for body in self.bodies.values():
            new = change(body)
            made.append(new if isinstance(new, Body) else replace(body, run=new))
        return Graph(self.values, made, self.inputs, self.outputs)

    def transfers(self, body: str) -> dict[str, int]:
        """Return how many bytes a body reads of each body that it depends on."""
        found = {}
        for source in self.before[body]:
            found[source] = sum(
                overlap(mine, other) * self.values[mine.value].bytes // self.values[mine.value].shape[1]
                for mine in self.bodies[body].inputs
                for other in self.bodies[source].outputs
            )
        return found

    def recompute(self, body: str, groups: Mapping[str, int] | None = None) -> Graph:
        """Return the graph in which each branch that reads a body's results has its own copy of it.

        The copies are named ``body.branch``, with a ``"'"`` behind that where the name is taken, and have values of
        their own.

        Parameters
        ----------
        body : str
        groups : mapping of str to int, optional
            For each body that reads the results, which copy it reads; by default that of its branch.

        Raises
        ------
        ValueError
            If there is no such body, if it may not be run more than once, or if it writes slices or an output.
        """
        if body not in self.bodies:
            raise ValueError(f"body: expected a name of the graph's bodies, got {body!r}")
        source = self.bodies[body]
        written = {piece.value for piece in source.outputs}
        whole = all(self._is_whole(piece) for piece in source.outputs)
        if not source.may_recompute or not whole or written & set(self.outputs):
            raise ValueError(f"body: expected one that may run more than once, got {body!r}")
        groups = {name: other.branch for name, other in self.bodies.items()} if groups is None else groups
        branches = sorted({groups[name] for name in self.bodies if body in self.before[name]})

        copies = {(value, b): _find_free(f"{value}.{b}", self.values) for value in written for b in branches}

        def rename(pieces: tuple[Slice, ...], branch: int) -> tuple[Slice, ...]:
            return tuple(replace(p, value=copies.get((p.value, branch), p.value)) for p in pieces)

        values = {name: value for name, value in self.values.items() if name not in written}
        values |= {copy: self.values[name] for (name, _), copy in copies.items()}
        bodies = []
        for branch in branches:
            name = _find_free(f"{body}.{branch}", self.bodies)
            bodies.append(replace(source, name=name, outputs=rename(source.outputs, branch), branch=branch))
        for name, other in self.bodies.items():
            if name != body:
                bodies.append(replace(other, inputs=rename(other.inputs, groups.get(name, -1))))
        return Graph(values, bodies, self.inputs, self.outputs)

    def _is_whole(self, piece: Slice) -> bool:
        return piece.begin == 0 and piece.end == self.values[piece.value].shape[1]

    def _check_slice(self, body: str, piece: Slice) -> Slice:
        if not isinstance(piece, Slice):
            raise TypeError(f"{body}: expected a Slice, got {type(piece).__name__}")
        if piece.value not in self.values:
            raise ValueError(f"{body}: expected a name of a value, got {piece.value!r}")
        channels = self.values[piece.value].shape[1]
        end = channels if piece.end is None else piece.end
        if not 0 <= piece.begin < end <= channels:
            raise ValueError(f"{body}: expected a slice of the {channels} channels of {piece.value!r}, got {piece}")
        return replace(piece, end=end)

    def _check_writers(self, bodies: Mapping[str, Body]) -> Writers:
        """Return the slices that are written of each value, and by whom."""
        writers: Writers = {name: [] for name in self.values}
        for body in bodies.values():
            for piece in body.outputs:
                if piece.value in self.inputs:
                    raise ValueError(f"{body.name}: expected to write other values than inputs, got {piece.value!r}")
                for other, name in writers[piece.value]:
                    if overlap(piece, other):
                        raise ValueError(
                            f"{body.name}: expected to write what no other body writes, got {piece.value!r} "
                            f"[{piece.begin}, {piece.end}), of which {name!r} writes [{other.begin}, {other.end})"
                        )
                writers[piece.value].append((piece, body.name))
        readers = [(body.name, piece) for body in bodies.values() for piece in body.inputs]
        readers += [("outputs", self._check_slice("outputs", Slice(name))) for name in self.outputs]
        for reader, piece in readers:
            if piece.value in self.inputs:
                continue
            if sum(overlap(piece, other) for other, _ in writers[piece.value]) < (piece.end or 0) - piece.begin:
                raise ValueError(f"{reader}: expected a value that bodies write, got {piece}")
        return writers

    @staticmethod
    def _find_before(bodies: Mapping[str, Body], writers: Writers) -> dict[str, tuple[str, ...]]:
        order = {name: index for index, name in enumerate(bodies)}
        found = {}
        for name, body in bodies.items():
            names = {other for mine in body.inputs for theirs, other in writers[mine.value] if overlap(mine, theirs)}
            found[name] = tuple(sorted(names, key=order.__getitem__))
        return found


@dataclass(frozen=True)
class Placement:
    """Which team runs which bodies, in which order.

    Parameters
    ----------
    teams : tuple of tuple of str
        Names of bodies for each team (or device).
    threads : tuple of int
        Cores of each team.
    latency : float, optional
        Seconds, as predicted or measured.
    method : str
        Who made it.
    seconds : float
        What that took.
    bound : float, optional
        Seconds that no placement is predicted to stay under, where that is known.
    """

    teams: tuple[tuple[str, ...], ...]
    threads: tuple[int, ...] = ()
    latency: float | None = None
    method: str = ""
    seconds: float = 0.0
    bound: float | None = None

    def __post_init__(self) -> None:
        for names in (self.teams, *(self.teams if isinstance(self.teams, Iterable) else ())):
            if not isinstance(names, Iterable) or isinstance(names, str):
                raise TypeError(f"teams: expected names of bodies for each team, got {type(names).__name__}")
        object.__setattr__(self, "teams", tuple(tuple(team) for team in self.teams))
        threads = tuple(_to_size("threads", count) for count in self.threads)
        object.__setattr__(self, "threads", threads or (1,) * len(self.teams))
        if not self.teams or len(self.threads) != len(self.teams) or min(self.threads) < 1:
            raise ValueError(f"threads: expected one number for each of {len(self.teams)} teams, got {self.threads}")

    @classmethod
    def sequential(cls, graph: Graph, threads: int = 1) -> Placement:
        """Return the placement in which one team runs everything."""
        return cls((tuple(graph.bodies),), (threads,), method="sequential")

    @classmethod
    def by_chains(cls, graph: Graph) -> Placement:
        """Return the placement on the fewest teams that can run at once all that may, for streams of a GPU."""
        from pycodesign.branches.streams import cover_by_chains

        return cls(tuple(cover_by_chains(graph.before)), method="chains")

    @property
    def team_of(self) -> dict[str, int]:
        return {name: team for team, names in enumerate(self.teams) for name in names}

    def check(self, graph: Graph) -> None:
        """Raise unless each body of a graph is placed once, in an order that comes to an end.

        Raises
        ------
        ValueError
            Naming the body that is missing, unknown, placed twice, or waits for itself.
        """
        placed = [name for team in self.teams for name in team]
        for name in placed:
            if name not in graph.bodies:
                raise ValueError(f"place: expected names of the graph's bodies, got {name!r}")
            if placed.count(name) > 1:
                raise ValueError(f"place: expected each body once, got {name!r} {placed.count(name)} times")
        if missing := [name for name in graph.bodies if name not in placed]:
            raise ValueError(f"place: expected all bodies of the graph, got none of {missing}")
        waits = {name: list(graph.before[name]) for name in graph.bodies}
        for team in self.teams:
            for first, second in itertools.pairwise(team):
                waits[second].append(first)
        sort_bodies(waits, "place")


def to_graph(net: Any, example: Any = None) -> Graph:
    """Return a `Graph` as it is, or the one that a network makes of itself by its method ``to_graph``.

    Parameters
    ----------
    net : Graph, or an object with ``to_graph(shape)``
    example : array or tuple of int, optional
        An input, or its shape, where `net` is no graph.
    """
    if isinstance(net, Graph):
        return net
    if not hasattr(net, "to_graph"):
        raise TypeError(f"net: expected a Graph or a network of branches, got {type(net).__name__}")
    made = net.to_graph() if example is None else net.to_graph(tuple(getattr(example, "shape", example)))
    if not isinstance(made, Graph):
        raise TypeError(f"net: expected to_graph to return a Graph, got {type(made).__name__}")
    return made


def _to_size(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None


def _find_free(name: str, taken: Mapping[str, Any]) -> str:
    while name in taken:
        name += "'"
    return name


def overlap(a: Slice, b: Slice) -> int:
    """Return how many channels two slices, with their ends known, have in common."""
    if a.value != b.value:
        return 0
    return max(0, min(a.end or 0, b.end or 0) - max(a.begin, b.begin))


def sort_bodies(before: Mapping[str, Sequence[str]], argument: str = "bodies") -> list[str]:
    """Sort names so that each follows all that it waits for, and otherwise as they come.

    Raises
    ------
    ValueError
        With the names of a cycle.
    """
    done: dict[str, None] = {}
    for first in before:
        path = {} if first in done else {first: iter(before[first])}  # each waits for the one behind it
        while path:
            name, rest = next(reversed(path.items()))
            other = next((other for other in rest if other not in done), None)
            if other is None:
                done[name] = None
                del path[name]
            elif other in path:
                names = list(path)
                raise ValueError(
                    f"{argument}: expected no cycle, got {' -> '.join([*names[names.index(other) :], other])}"
                )
            else:
                path[other] = iter(before[other])
    return list(done)


def allocate_array(value: Value) -> np.ndarray[Any, Any]:
    """Return an array that begins on a cache line: some of torch's functions sum otherwise where one does not."""
    memory = np.empty(value.bytes + CACHE_LINE, np.uint8)
    begin = -memory.ctypes.data % CACHE_LINE
    return memory[begin : begin + value.bytes].view(value.dtype).reshape(value.shape)


def view(arrays: Mapping[str, np.ndarray[Any, Any]], piece: Slice) -> np.ndarray[Any, Any]:
    """Return the part of an array that a slice names."""
    return arrays[piece.value][:, piece.begin : piece.end]


def run_body(body: Body, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Run a body on NumPy arrays, and write its results to others.

    Raises
    ------
    TypeError, ValueError
        If it returns other arrays than its outputs are.
    """
    if body.arrays == "torch":
        import torch

        with torch.inference_mode():
            results = body.run(*[torch.from_numpy(x) for x in inputs])
    else:
        results = body.run(*inputs)
    results = list(results) if isinstance(results, (list, tuple)) else [results]
    if len(results) != len(outputs):
        raise ValueError(f"{body.name}: expected {len(outputs)} results, got {len(results)}")
    for array, result in zip(outputs, results, strict=True):
        result = to_numpy(body.name, result)[0] if body.arrays == "torch" else np.asarray(result)
        if result.shape != array.shape or result.dtype != array.dtype:
            wanted = f"{array.dtype} {array.shape}"
            raise ValueError(f"{body.name}: expected to return {wanted}, got {result.dtype} {result.shape}")
        array[...] = result
