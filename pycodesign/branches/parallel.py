"""Callables that run in parallel, each on its own core."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from contextvars import copy_context
from functools import partial
from typing import Any, TypeAlias

from pycodesign import _core
from pycodesign._arguments import Array, from_numpy, to_number, to_numpy
from pycodesign.branches.timed import Team, hold_torch_threads, run_timed

__all__ = ["Modes", "call_in_modes", "find_modes", "run_branches"]

SPIN = 50.0  # microseconds
Modes: TypeAlias = tuple[bool, bool, bool, Any] | None


def run_branches(
    branches: Iterable[Any], *inputs: Array, timeout: float | None = None, spin: float = SPIN
) -> list[Any]:
    """Run callables in parallel on the same inputs, each on its own core; the caller runs the first.

    Packed layers and chains run without Python; they take and return what `conv2d`, `linear` and `Chain` do. Every
    other callable needs Python's lock, and runs in parallel as far as it gives that lock up, as torch and NumPy do in
    their functions. All operations of this package, and of torch where it is loaded, run on one thread within a
    branch. Branches beyond the number of cores begin when others have ended. All run on the caller, one after another,
    within another branch, and while another thread of this process has the team.

    Parameters
    ----------
    branches : iterable of Packed, Chain or callable
        Callables see the caller's context variables, and its torch modes (grad, inference, autocast).
    *inputs : array
        What each branch is called with.
    timeout : float, optional
        Seconds. With it each branch runs on a new thread, and the caller only waits: some tenths of a millisecond more.
        A branch that does not return in time goes on, and keeps its thread until it does.
    spin : float
        Microseconds for which a thread that waits for another spins before it parks; 0 for machines that are shared.

    Returns
    -------
    list
        The result of each branch, in their order; a list for a chain of several outputs.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    TimeoutError
        Naming the branches that have not returned.
    Exception
        The first one that a branch raises, after all have stopped; those that have not begun then never do.

    References
    ----------
    Fu et al., "ColocNAS", IEEE Micro 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from pycodesign import ops
    >>> ops.run_branches([np.sin, np.cos], np.zeros(2))
    [array([0., 0.]), array([1., 1.])]
    """
    spin, timeout = check_spin(spin), check_timeout(timeout)
    bodies: list[Any] = []
    bound: list[tuple[int, _Bound]] = []
    try:
        given = list(branches)
    except TypeError:
        raise TypeError(f"branches: expected a sequence of callables, got {type(branches).__name__}") from None
    chain_type, packed_type = _native_types()
    modes = find_modes()
    for branch in given:
        body = branch.to_chain() if isinstance(branch, packed_type) else branch
        if timeout is None and isinstance(body, chain_type):
            bound.append((len(bodies), _Bound(body, inputs)))
            body = bound[-1][1].native
        elif not callable(body):
            wanted = "callables, chains or packed layers"
            raise TypeError(f"branches: expected {wanted}, got {type(branch).__name__}")
        elif bodies or timeout is not None:  # on another thread
            run: Any = copy_context().run
            body = partial(run, body) if modes is None else partial(run, call_in_modes, modes, body)
        bodies.append(body)
    if timeout is not None:
        results: list[Any] = [None] * len(bodies)
        run_timed([Team([_Store(results, i, body, inputs)]) for i, body in enumerate(bodies)], timeout)
        return results
    results = _core.run_branches(bodies, inputs, spin)
    for index, call in bound:
        results[index] = call.finish()
    return results


class _Bound:
    """A call of a chain, with memory of its own; it is kept for the next one with inputs of these sizes."""

    def __init__(self, chain: Any, inputs: Sequence[Array]) -> None:
        given = [to_numpy("inputs", x) for x in inputs]
        arrays = [array for array, _ in given]
        rows = chain.check_inputs(arrays)
        self.kind = "torch" if any(kind == "torch" for _, kind in given) else "numpy"
        self.free, self.native = chain.take_bound([array.shape for array in arrays])
        for i, array in enumerate(arrays):
            self.native.set_input(i, array)
        self.outputs = chain.allocate_outputs(self.native, rows)
        for i, array in enumerate(self.outputs):
            self.native.set_output(i, array)

    def finish(self) -> Any:
        self.native.release()
        self.free.append(self.native)
        results = [from_numpy(array, self.kind) for array in self.outputs]
        return results[0] if len(results) == 1 else results


class _Store:
    """Calls a branch, and keeps its result."""

    def __init__(self, results: list[Any], index: int, body: Callable[..., Any], inputs: Sequence[Any]) -> None:
        self.results, self.index, self.body, self.inputs = results, index, body, inputs
        self.name = f"branch {index}"

    def __call__(self) -> None:
        with hold_torch_threads(1):
            self.results[self.index] = self.body(*self.inputs)


def find_modes() -> Modes:
    """Return torch's grad, inference and autocast modes, and autocast's dtype; None for those of a new thread."""
    torch = sys.modules.get("torch")
    is_autocast_enabled = getattr(torch, "is_autocast_enabled", None)
    if torch is None or is_autocast_enabled is None:  # still being imported
        return None
    grad, inference, autocast = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        is_autocast_enabled("cpu"),
    )
    if grad and not inference and not autocast:
        return None
    return grad, inference, autocast, torch.get_autocast_dtype("cpu")


def call_in_modes(modes: Modes, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in the modes that another thread had."""
    if modes is None:
        return function(*arguments)
    torch, (grad, inference, autocast, dtype) = sys.modules["torch"], modes
    with torch.inference_mode(inference), torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, autocast):
        return function(*arguments)


@functools.cache
def _native_types() -> tuple[Any, Any]:
    from pycodesign.ops import Packed
    from pycodesign.repetition.chain import Chain

    return Chain, Packed


def check_spin(spin: float) -> float:
    spin = to_number("spin", spin)
    if not 0 <= spin <= 1e9:
        raise ValueError(f"spin: expected microseconds from 0 to 1e9, got {spin}")
    return spin


def check_timeout(timeout: float | None) -> float | None:
    if timeout is None:
        return None
    timeout = to_number("timeout", timeout)
    if not (timeout > 0 and math.isfinite(timeout)):
        raise ValueError(f"timeout: expected a positive finite number of seconds, got {timeout}")
    return timeout
