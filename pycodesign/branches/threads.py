"""Teams of cores in this process, for `Executor`."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from pycodesign import _core
from pycodesign._arguments import to_integer, to_numpy
from pycodesign.branches.converted import Found, find_chain
from pycodesign.branches.graph import Body, Graph, Placement, Slice, allocate_array, run_body, view
from pycodesign.branches.parallel import SPIN, Modes, call_in_modes, check_spin, check_timeout, find_modes
from pycodesign.branches.timed import Team, hold_torch_threads, run_timed

__all__ = ["Runner"]

PATIENCE = 5.0  # microseconds until a team that waits for one whose thread has not come runs it itself

Arrays = dict[str, NDArray[Any]]
running: ContextVar[tuple[Runner, ...]] = ContextVar("running", default=())  # those in a body of which this code is
runners: WeakSet[Runner] = WeakSet()


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
        self._threads = _count_threads(graph, place, {} if widths is None else widths)
        self._lock = threading.Lock()
        self._native: Any = None
        # Of torch, so that bits do not depend on which thread runs a body: a team among others has one.
        self._torch_threads = place.threads[0] if len(place.teams) == 1 else 1
        self._state = State({}, self._torch_threads)
        self._free: list[tuple[Callable[..., None], int, Slice, tuple[int, ...]]] = []  # bound anew in every run
        if self._timeout is None:
            self._compile()
            runners.add(self)

    def _compile(self) -> None:
        graph = self._graph
        order = [(team, name) for team, names in enumerate(self._place.teams) for name in names]
        index = {name: i for i, (_, name) in enumerate(order)}
        chains = {name: find_chain(graph, body) for name, body in graph.bodies.items()}
        # Python's functions read copies of inputs, of one layout: sums depend on it, and some overwrite what they read.
        self._copied = {piece.value for name, body in graph.bodies.items() if not chains[name] for piece in body.inputs}
        self._lent = set(graph.inputs) - self._copied | set(graph.outputs)
        self._state.arrays.update(graph.allocate())
        bodies = [self._make_body(graph.bodies[name], chains[name]) for _, name in order]
        teams = len(self._place.teams)
        self._native = _core.BranchRunner(
            [team for team, _ in order],
            [self._threads[name] for _, name in order],
            [[index[before] for before in graph.before[name]] for _, name in order],
            teams if teams == 1 else sum(self._place.threads),
            bodies,
        )
        self._release()

    def _make_body(self, body: Body, found: Found | None) -> Any:
        """Return a bound chain, or a function that needs Python."""
        if found is None:
            return PythonBody(body, self._state)
        bound = found.chain.bind(found.input_shapes, self._threads[body.name])
        for bind, pieces, shapes in (
            (bound.set_input, body.inputs, found.input_shapes),
            (bound.set_output, body.outputs, bound.output_shapes),
        ):
            if len(pieces) != len(shapes):
                raise ValueError(f"{body.name}: expected {len(pieces)} results, got a chain of {len(shapes)}")
            for i, (piece, shape) in enumerate(zip(pieces, shapes, strict=True)):
                self._bind(bind, i, piece, tuple(shape))
                if piece.value in self._lent:
                    self._free.append((bind, i, piece, tuple(shape)))
        return bound

    def _bind(self, bind: Callable[..., None], index: int, piece: Slice, shape: tuple[int, ...]) -> None:
        """Let a chain read or write a slice of a value, of 2 dimensions or as the chain has it."""
        array = self._state.arrays[piece.value]
        if piece.begin or piece.end != array.shape[1]:
            array = array[:, piece.begin : piece.end]
        if array.ndim == 4 or shape[2:] in ((), (1, 1)):
            bind(index, array)
        else:
            bind(index, reshape(array, shape))

    def __call__(self, *inputs: Any) -> list[Any]:
        graph = self._graph
        as_torch = graph.check_inputs(inputs)
        if self in running.get():
            raise RuntimeError("Executor: expected a body that does not call the executor that runs it")
        given = {name: to_numpy(name, x)[0] for name, x in zip(graph.inputs, inputs, strict=True)}
        found = self._run(given) if self._timeout is None else self._run_timed(given, self._timeout)
        return [sys.modules["torch"].from_numpy(array) for array in found] if as_torch else found

    def _run(self, given: Arrays) -> list[NDArray[Any]]:
        graph, state = self._graph, self._state
        made = {name: allocate_array(graph.values[name]) for name in graph.outputs}
        with self._lock:
            try:
                if self._native is None:
                    self._compile()
                state.arrays.update(made)
                for name, x in given.items():
                    if name in self._copied or name in made:
                        state.arrays[name][...] = x
                    else:
                        state.arrays[name] = x if x.flags.aligned else x.copy()
                for free in self._free:
                    self._bind(*free)
                state.modes, state.context = find_modes(), self._make_context()
                self._native.run(self._spin, PATIENCE, self._pin)
            finally:
                self._release()
        return [made[name] for name in graph.outputs]

    def _make_context(self) -> Context:
        """Return the caller's context, in which bodies know who runs them."""
        context = copy_context()
        context.run(running.set, (*running.get(), self))
        return context

    def forget_run(self) -> None:
        """In the child of a fork: compile anew if another thread, which is not there any more, was in a run."""
        if self._lock.locked():
            self._lock, self._native, self._free = threading.Lock(), None, []
            self._state = State({}, self._torch_threads)

    def _release(self) -> None:
        """Let go what is the caller's."""
        self._state.context = Context()
        for bind, index, *_ in self._free:
            bind(index, None)
        for name in self._lent:
            self._state.arrays.pop(name, None)

    def _run_timed(self, given: Arrays, timeout: float) -> list[NDArray[Any]]:
        """On arrays of its own, as bodies that come too late still write."""
        graph = self._graph
        state = State(graph.allocate(), self._torch_threads, find_modes(), self._make_context())
        for name, x in given.items():
            state.arrays[name][...] = x
        teams = [
            Team(
                [PythonBody(graph.bodies[name], state) for name in names],
                [graph.before[name] for name in names],
                threads,
            )
            for names, threads in zip(self._place.teams, self._place.threads, strict=True)
        ]
        run_timed(teams, timeout)
        return [state.arrays[name] for name in graph.outputs]


@dataclass
class State:
    """What the bodies of a run share.

    Parameters
    ----------
    arrays : dict of str to array
        Of each value.
    threads : int
        Of torch's operations.
    modes : tuple, optional
        The caller's, of torch.
    context : contextvars.Context
        The caller's; each body has a copy of its own.
    """

    arrays: Arrays
    threads: int
    modes: Modes = None
    context: Context = field(default_factory=Context)


class PythonBody:
    """Calls a body on the arrays of the run."""

    def __init__(self, body: Body, state: State) -> None:
        self.name, self._body, self._state = body.name, body, state

    def __call__(self) -> None:
        body, state = self._body, self._state
        inputs, outputs = ([view(state.arrays, piece) for piece in pieces] for pieces in (body.inputs, body.outputs))
        with hold_torch_threads(state.threads):
            state.context.copy().run(call_in_modes, state.modes, run_body, body, inputs, outputs)


def _count_threads(graph: Graph, place: Placement, widths: Mapping[str, Any]) -> dict[str, int]:
    """Return the threads of each body, checked against the cores that there are."""
    if not isinstance(widths, Mapping):
        raise TypeError(f"widths: expected threads by names of bodies, got {type(widths).__name__}")
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


def reshape(array: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """Return a view of another shape; the elements of each image follow one another."""
    made = array.reshape(shape)
    if not np.shares_memory(made, array):
        raise ValueError(f"body: expected a slice that can be viewed as {tuple(shape)}, got {array.shape}")
    return made


def _forget_runs() -> None:
    for runner in list(runners):
        runner.forget_run()


os.register_at_fork(after_in_child=_forget_runs)
