"""Callables that run in parallel, each on its own core."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from contextvars import copy_context
from functools import partial
from typing import Any, TypeAlias

from pycodesign import _core
from pycodesign._arguments import Array, check_array, from_numpy, to_number, to_numpy
from pycodesign.branches.timed import Team, hold_torch_threads, run_timed

__all__ = ["Modes", "call_in_modes", "find_modes", "run_branches"]

SPIN = 50.0  # microseconds
AUTOCAST = ("cpu", "cuda")  # devices
Modes: TypeAlias = tuple[bool, bool, tuple[tuple[str, Any], ...], Any] | None


def run_branches(
    branches: Iterable[Any], *inputs: Array, timeout: float | None = None, spin: float = SPIN
) -> list[Any]:
    """Run callables in parallel on the same inputs, each on its own core; the caller runs the first.

    Packed layers and chains run without Python; they take and return what `conv2d`, `linear` and `Chain` do. Every
    other callable needs Python's lock, and runs in parallel as far as it gives that lock up, as torch and NumPy do in
    their functions. All operations of this package, and of torch where it is loaded, run on one thread within a
    branch. Branches beyond the number of cores begin when others have ended. All run on the caller, one after another,
    within another branch, within an `Executor`'s body of one thread, while another thread of this process has the team,
    and where torch has what no other thread can take over: a transform of `torch.func`, a mode such as
    ``FlopCounterMode`` or ``FakeTensorMode``, hooks of saved tensors (as far as torch tells: 2.8 does). An interrupt by
    the keyboard ends the caller's own branch, and is raised once the others have returned; with a `timeout` it is
    raised at once.

    Parameters
    ----------
    branches : iterable of Packed, Chain or callable
        Callables see the caller's context variables, and its torch modes (grad, inference, autocast, default device);
        of CUDA's device and stream each thread has its own.
    *inputs : array
        What each branch is called with.
    timeout : float, optional
        Seconds. With it branches run on new threads, as many as there are cores, and the caller only waits: some tenths
        of a millisecond more. A branch that does not return in time goes on, and keeps its thread until it does.
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
    RuntimeError
        For a `timeout` where torch has what no other thread can take over.
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
    if spin is not SPIN:
        spin = check_spin(spin)
    timeout = check_timeout(timeout)
    bodies: list[Any] = []
    bound: list[tuple[int, _Bound]] = []
    try:
        given = iter(branches)
    except TypeError:
        raise TypeError(f"branches: expected a sequence of callables, got {type(branches).__name__}") from None
    chain_type, packed_type = _native_types()
    is_alone = has_local_modes()
    if is_alone and timeout is not None:
        wanted = "None where torch has transforms, modes or hooks of one thread"
        raise RuntimeError(f"timeout: expected {wanted}, got {timeout:g}")
    modes = None if is_alone else find_modes()
    for branch in given:
        body = branch.to_chain() if isinstance(branch, packed_type) else branch
        if timeout is None and isinstance(body, chain_type):
            is_linear = isinstance(branch, packed_type) and branch.kind == "linear"
            bound.append((len(bodies), (_BoundRows if is_linear else _Bound)(body, inputs)))
            body = bound[-1][1].native
        elif isinstance(body, chain_type):
            body = partial(_call_chain, body) if body is branch else branch
        elif not callable(body):
            wanted = "callables, chains or packed layers"
            raise TypeError(f"branches: expected {wanted}, got {type(branch).__name__}")
        elif modes is not None and (bodies or timeout is not None):  # on another thread
            body = partial(call_in_modes, modes, body)
        bodies.append(body)
    if timeout is not None:
        results: list[Any] = [None] * len(bodies)
        steps = iter([_Store(results, i, body, inputs) for i, body in enumerate(bodies)])  # teams take them in turn
        run_timed([Team(steps)] * min(len(bodies), _core.available_cores()), timeout)
        return results
    results = _core.run_branches(bodies, inputs, spin, is_alone)
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


class _BoundRows(_Bound):
    """A call of a linear layer, on (..., I)."""

    def __init__(self, chain: Any, inputs: Sequence[Array]) -> None:
        given, rows = [to_numpy("inputs", x) for x in inputs], list(inputs)
        if len(given) == 1:
            layer = chain.layers[0]
            x, width = given[0][0], layer._shape[1]
            wanted = (layer._options["input_dtype"],)
            check_array("inputs", x, wanted, f"(..., {width})", x.shape[-1:] == (width,))
            rows = [from_numpy(x.reshape(math.prod(x.shape[:-1]), width), given[0][1])]
            self.shape = x.shape[:-1]
        super().__init__(chain, rows)

    def finish(self) -> Any:
        y = super().finish()
        return y.reshape(*self.shape, y.shape[-1])


def _call_chain(chain: Any, *inputs: Array) -> Any:
    given = [to_numpy("inputs", x) for x in inputs]
    kind = "torch" if any(kind == "torch" for _, kind in given) else "numpy"
    results = [from_numpy(array, kind) for array in chain(*(array for array, _ in given))]
    return results[0] if len(results) == 1 else results


class _Store:
    """Calls a branch, and keeps its result."""

    def __init__(self, results: list[Any], index: int, body: Callable[..., Any], inputs: Sequence[Any]) -> None:
        self.results, self.index, self.body, self.inputs = results, index, body, inputs
        self.name, self.context = f"branch {index}", copy_context()

    def __call__(self) -> None:
        with hold_torch_threads(1):
            self.results[self.index] = self.context.run(self.body, *self.inputs)


class _Torch:
    """What tells torch's modes of a thread; to find these functions takes longer than to call them."""

    def __init__(self, torch: Any) -> None:
        c = torch._C
        self.has_grad, self.has_inference = torch.is_grad_enabled, torch.is_inference_mode_enabled
        self.has_autocast, self.count_functions = c._is_any_autocast_enabled, c._len_torch_function_stack
        self.count_dispatches, self.find_transform = c._len_torch_dispatch_stack, c._functorch.peek_interpreter_stack
        # torch before 2.8 does not tell
        self.find_hooks = getattr(c._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None)


_torch: _Torch | None = None


def _find_torch() -> _Torch | None:
    global _torch
    torch: Any = sys.modules.get("torch")
    if hasattr(torch, "is_autocast_enabled"):  # or it is still being imported
        _torch = _Torch(torch)
    return _torch


def has_local_modes() -> bool:
    """Return whether torch has transforms, modes or hooks that other threads neither see nor can take over."""
    found = _torch or _find_torch()
    if not found:
        return False
    if found.find_transform() is not None or found.count_dispatches() or found.find_hooks(True) is not None:
        return True
    if count := found.count_functions():
        torch: Any = sys.modules["torch"]
        functions = [torch._C._get_function_stack_at(i) for i in range(count)]
        return any(type(function) is not torch.utils._device.DeviceContext for function in functions)
    return False


def find_modes() -> Modes:
    """Return torch's grad and inference modes, devices and dtypes of autocast, and a default device that somebody set.

    None stands for the modes of a new thread.
    """
    found = _torch or _find_torch()
    if not found:
        return None
    grad, inference = found.has_grad(), found.has_inference()
    autocasts, has_device = found.has_autocast(), found.count_functions()
    if grad and not inference and not autocasts and not has_device:
        return None
    torch: Any = sys.modules["torch"]
    kinds = AUTOCAST if autocasts else ()
    autocast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))
    return grad, inference, autocast, torch.get_default_device() if has_device else None


def call_in_modes(modes: Modes, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in the modes that another thread had."""
    if modes is None:
        return function(*arguments)
    torch, (grad, inference, autocast, device) = sys.modules["torch"], modes
    wanted = dict(autocast)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        for kind in AUTOCAST:
            if kind in wanted or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, wanted.get(kind), kind in wanted))
        if device is not None:
            stack.enter_context(device)
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
