"""Runs a network of branches where a placement says."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from pycodesign._arguments import join_names
from pycodesign.branches.graph import Graph, Placement, to_graph

__all__ = ["Executor"]

BACKENDS = {name: f"pycodesign.branches.{name}" for name in ("threads", "distributed", "cuda")}


class Executor:
    """A network and its placement, ready to run.

    Parameters
    ----------
    net : Graph, or a network with ``to_graph``
        Bodies that are chains, or torch modules without hooks that `pycodesign.nn.convert` made one chain of, run
        without Python, unless there is a `timeout`: with the weights and the instruction set that they have now,
        whatever is done to the module later. Other bodies read copies of the inputs.
    place : Placement
    backend : {"threads", "distributed", "cuda"}
        Teams of cores in this process, processes of `torch.distributed`, or streams of a GPU, captured as a CUDA graph;
        `Placement.by_chains` assigns those.
    **options
        Of the backend. For ``"threads"``:

        spin : float, default 50
            Microseconds for which a team that waits for another spins before it parks; 0 for machines that are shared.
        pin : bool, default True
            Whether each team stays on one core, out of those that the caller may run on, while it runs. Afterwards
            every thread, the caller's too, may run where it could before.
        widths : mapping of str to int, optional
            Threads of bodies for which they are to be other than their team's: operations of this package within a body
            of several threads run on its team's cores, and on those of teams that wait meanwhile.
        timeout : float, optional
            Seconds for a run; with it every team runs on a new thread of Python, and the caller only waits.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came: among others a cycle, bodies that write the same elements,
        bodies that are not placed, more cores than this process may use.

    References
    ----------
    Fu et al., "ColocNAS", IEEE Micro 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from pycodesign.branches import Body, Executor, Graph, Placement, Slice, Value
    >>> values = {"x": Value((1, 2)), "y": Value((1, 4))}
    >>> bodies = [
    ...     Body("double", lambda x: 2 * x, (Slice("x"),), (Slice("y", 0, 2),), "numpy"),
    ...     Body("negate", lambda x: -x, (Slice("x"),), (Slice("y", 2, 4),), "numpy"),
    ... ]
    >>> graph = Graph(values, bodies, ["x"], ["y"])
    >>> run = Executor(graph, Placement((("double", "negate"),)))
    >>> run(np.float32([[1, 2]]))
    [array([[ 2.,  4., -1., -2.]], dtype=float32)]
    """

    def __init__(self, net: Graph | Any, place: Placement, backend: str = "threads", **options: Any) -> None:
        if not isinstance(place, Placement):
            raise TypeError(f"place: expected a Placement, got {type(place).__name__}")
        if not isinstance(backend, str) or backend not in BACKENDS:
            raise ValueError(f"backend: expected {join_names(map(repr, BACKENDS))}, got {backend!r}")
        self.graph, self.place, self.backend = to_graph(net), place, backend
        place.check(self.graph)
        runner = importlib.import_module(BACKENDS[backend]).Runner
        known = [p.name for p in inspect.signature(runner).parameters.values() if p.kind is p.KEYWORD_ONLY]
        if unknown := [name for name in options if name not in known]:
            raise TypeError(f"options: expected {join_names(known)} for backend {backend!r}, got {unknown[0]!r}")
        self._run = runner(self.graph, place, **options)

    def __call__(self, *inputs: Any) -> list[Any]:
        """Run the network.

        Parameters
        ----------
        *inputs : array
            NumPy arrays or torch tensors, one for each input of the graph, of its shape and dtype.

        Returns
        -------
        list of arrays
            New ones, one for each output, of the kind of the inputs: the same bits as ``graph(*inputs)``, in the
            caller's context variables and torch modes (autocast, for one). Torch's operations, whose sums depend on
            their threads, take one, as there; if a team without others, or a process, has more, they take those: the
            same bits as ``graph(*inputs, threads=place.threads[0])``.

        Raises
        ------
        TypeError, ValueError
            For inputs that do not fit.
        RuntimeError
            For a body that calls the executor which runs it, itself or on a thread that has its context variables.
        TimeoutError
            Naming the bodies that have not returned in time.
        Exception
            The first one that a body raises, after all teams have stopped.
        """
        results: list[Any] = self._run(*inputs)
        return results
