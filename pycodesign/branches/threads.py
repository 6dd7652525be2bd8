"""Teams of cores in this process, for `Executor`."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pycodesign import _core
from pycodesign._arguments import to_integer, to_numpy
from pycodesign.branches.converted import find_chain
from pycodesign.branches.graph import Body, Graph, Placement, Slice, run_body, view
from pycodesign.branches.parallel import SPIN, check_spin, check_timeout
from pycodesign.branches.timed import Team, hold_torch_threads, run_timed

__all__ = ["Runner"]

PATIENCE = 5.0  # microseconds until a team that waits for one whose thread has not come runs it itself
CACHE_LINE = 64

Arrays = dict[str, NDArray[Any]]


class Runner:
    """A placement of a graph, compiled into a list of instructions for each team; `Executor` says what it takes."""

    def __init__(
        self,
        graph: Graph,
        place: Placement,
        *,
        spin: float = SPIN,
        pin: bool = True,
        widths: Mapping[str, int] | None = None,
        timeout: float | None = None,
    ) -> None:
        self._spin, self._timeout = check_spin(spin), check_timeout(timeout)
        if not isinstance(pin, bool):
            raise TypeError(f"pin: expected a bool, got {type(pin).__name__}")
        self._pin, self._graph, self._place = pin, graph, place
        self._threads = _count_threads(graph, place, dict(widths or {}))
        self._outputs = [(name, graph.values[name].shape, np.dtype(graph.values[name].dtype)) for name in graph.outputs]
        self._lock = threading.Lock()
        self._inside: set[int] = set()  # threads that run a body
        # Of torch, so that bits do not depend on which thread runs a body: a team among others has one.
        self._torch_threads = place.threads[0] if len(place.teams) == 1 else 1
        self._arrays: Arrays = {}  # of each value; inputs and outputs are those of the run
        self._free: list[tuple[Callable[..., None], int, Slice, tuple[int, ...]]] = []  # bound anew in every run
        if self._timeout is None:
            self._arrays = {name: _allocate(graph, name) for name in graph.values}
            self._compile()

    def _compile(self) -> None:
        order = [(team, name) for team, names in enumerate(self._place.teams) for name in names]
        index = {name: i for i, (_, name) in enumerate(order)}
        bodies = [self._make_body(self._graph.bodies[name]) for _, name in order]
        teams = len(self._place.teams)
        self._native = _core.BranchRunner(
            [team for team, _ in order],
            [self._threads[name] for _, name in order],
            [[index[before] for before in self._graph.before[name]] for _, name in order],
            teams if teams == 1 else sum(self._place.threads),
            bodies,
        )

    def _make_body(self, body: Body) -> Any:
        """Return a bound chain, or a function that needs Python."""
        found = find_chain(self._graph, body)
        if found is None:
            return PythonBody(body, self._arrays, self._inside, self._torch_threads)
        bound = found.chain.bind(found.input_shapes, self._threads[body.name])
        for bind, pieces, shapes in (
            (bound.set_input, body.inputs, found.input_shapes),
            (bound.set_output, body.outputs, bound.output_shapes),
        ):
            for i, (piece, shape) in enumerate(zip(pieces, shapes, strict=True)):
                self._bind(bind, i, piece, tuple(shape))
                if piece.value in (*self._graph.inputs, *self._graph.outputs):
                    self._free.append((bind, i, piece, tuple(shape)))
        return bound

    def _bind(self, bind: Callable[..., None], index: int, piece: Slice, shape: tuple[int, ...]) -> None:
        """Let a chain read or write a slice of a value, of 2 dimensions or as the chain has it."""
        array = self._arrays[piece.value]
        if piece.begin or piece.end != array.shape[1]:
            array = array[:, piece.begin : piece.end]
        if array.ndim == 4 or shape[2:] in ((), (1, 1)):
            bind(index, array)
        else:
            bind(index, reshape(array, shape))

    def __call__(self, *inputs: Any) -> list[Any]:
        graph = self._graph
        as_torch = graph.check_inputs(inputs)
        given = {name: to_numpy(name, x)[0] for name, x in zip(graph.inputs, inputs, strict=True)}
        made = {name: np.empty(shape, dtype) for name, shape, dtype in self._outputs}
        if self._timeout is not None:
            self._run_timed(given, made, self._timeout)
        else:
            if threading.get_ident() in self._inside:
                raise RuntimeError("Executor: expected a body that does not call the executor that runs it")
            with self._lock:
                self._arrays.update(given)
                self._arrays.update(made)
                for name in made.keys() & given.keys():  # bodies read the copy
                    made[name][...] = given[name]
                for free in self._free:
                    self._bind(*free)
                self._native.run(self._spin, PATIENCE, self._pin)
        found = [made[name] for name in graph.outputs]  # one may be asked for twice
        return [sys.modules["torch"].from_numpy(array) for array in found] if as_torch else found

    def _run_timed(self, given: Arrays, made: Arrays, timeout: float) -> None:
        """On arrays of its own, as bodies that come too late still write."""
        graph = self._graph
        arrays = {**graph.allocate(), **given}
        teams = [
            Team(
                [PythonBody(graph.bodies[name], arrays, set(), self._torch_threads) for name in names],
                [graph.before[name] for name in names],
                threads,
            )
            for names, threads in zip(self._place.teams, self._place.threads, strict=True)
        ]
        run_timed(teams, timeout)
        for name, array in made.items():
            array[...] = arrays[name]


class PythonBody:
    """Calls a body on the arrays of the run; `inside` holds the threads that are in one."""

    def __init__(self, body: Body, arrays: Arrays, inside: set[int], threads: int) -> None:
        self.name, self._body, self._arrays, self._inside = body.name, body, arrays, inside
        self._threads = threads

    def __call__(self) -> None:
        body, arrays, thread = self._body, self._arrays, threading.get_ident()
        self._inside.add(thread)
        try:
            with hold_torch_threads(self._threads):
                run_body(body, [view(arrays, p) for p in body.inputs], [view(arrays, p) for p in body.outputs])
        finally:
            self._inside.discard(thread)


def _count_threads(graph: Graph, place: Placement, widths: Mapping[str, Any]) -> dict[str, int]:
    """Return the threads of each body, checked against the cores that there are."""
    cores, wanted = _core.available_cores(), sum(place.threads)
    if wanted > cores:
        raise ValueError(
            f"place: expected teams of at most {cores} cores in all, as many as this process may use, got {wanted}"
        )
    for name, width in widths.items():
        if name not in graph.bodies:
            raise ValueError(f"widths: expected names of the graph's bodies, got {name!r}")
        if to_integer("widths", width, 1) > wanted:
            raise ValueError(f"widths: expected at most {wanted}, the cores of all teams, got {width} for {name!r}")
    teams = zip(place.teams, place.threads, strict=True)
    return {name: widths.get(name, threads) for names, threads in teams for name in names}


def _allocate(graph: Graph, name: str) -> NDArray[Any]:
    """Return an array for a value that begins on a cache line."""
    value = graph.values[name]
    count, bytes_each = math.prod(value.shape), np.dtype(value.dtype).itemsize
    memory = np.zeros(count * bytes_each + CACHE_LINE, np.uint8)
    begin = -memory.ctypes.data % CACHE_LINE
    return memory[begin : begin + count * bytes_each].view(value.dtype).reshape(value.shape)


def reshape(array: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """Return a view of another shape; the elements of each image follow one another."""
    made = array.reshape(shape)
    if not np.shares_memory(made, array):
        raise ValueError(f"body: expected a slice that can be viewed as {tuple(shape)}, got {array.shape}")
    return made
