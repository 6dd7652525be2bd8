"""`profile`: measure the latency table of a space on this machine."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import pycodesign
from pycodesign._arguments import to_integer
from pycodesign.branches.build import build_stem
from pycodesign.branches.executor import Executor
from pycodesign.branches.graph import Body, Graph, Placement, Slice, Value
from pycodesign.branches.operators import BranchBody, build_gate, build_operator, convert_body
from pycodesign.branches.space import Space
from pycodesign.branches.table import LatencyTable, describe_machine

__all__ = ["list_steps", "profile"]

SECONDS = 1e-3  # of a timing: a step is repeated until it takes as long
Step = Callable[[], object]


def profile(
    space: Space,
    workers: int = 2,
    *,
    threads: Sequence[int] = (1,),
    rounds: int = 15,
    convert: Callable[[nn.Module], nn.Module] = convert_body,
) -> LatencyTable:
    """Measure what a space's layers, gates, waits and transfers cost.

    Each layer and gate is timed alone, and while all workers do the same; each round times everything once, so that
    drift of the machine meets all alike; medians count. Calls of bodies, waits and transfers are those of the
    `Executor`, by graphs of bodies that do nothing.

    Parameters
    ----------
    space : Space
    workers : int
        Teams that work together: at most the cores that this process may use.
    threads : sequence of int
        Numbers of threads of a team.
    rounds : int
    convert : callable
        As in `Network.to_graph`: what makes of a part's module the one that runs.

    Returns
    -------
    LatencyTable

    Raises
    ------
    ValueError
        For more workers or threads than cores.
    """
    if not isinstance(space, Space):
        raise TypeError(f"space: expected a Space, got {type(space).__name__}")
    cores = pycodesign.show_config()["cores"]
    if not 1 <= to_integer("workers", workers) <= cores:
        raise ValueError(f"workers: expected 1 to {cores}, the cores of this process, got {workers}")
    for count in threads:
        if not 1 <= to_integer("threads", count) <= cores:
            raise ValueError(f"threads: expected 1 to {cores}, the cores of this process, got {count}")
    to_integer("rounds", rounds, 1)
    steps = list_steps(space, workers, convert)
    times: dict[str, dict[str, list[float]]] = {key: {} for key in steps}
    before = torch.get_num_threads(), pycodesign.get_num_threads()
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress, torch.inference_mode():
            for _ in progress.track(range(rounds), description="layers"):
                for count in dict.fromkeys((1, *threads)):
                    torch.set_num_threads(count)
                    pycodesign.set_num_threads(count)
                    for key, copies in steps.items():
                        alone = time_together(copies[:1])
                        times[key].setdefault(f"solo/{count}", []).append(alone)
                        if workers > 1 and workers * count <= cores:
                            times[key].setdefault(f"together/{count}", []).append(time_together(copies))
    finally:
        torch.set_num_threads(before[0])
        pycodesign.set_num_threads(before[1])
    entries = {key: {name: statistics.median(found) for name, found in row.items()} for key, row in times.items()}
    body, sync, transfer = measure_waits(space, workers, rounds)
    return LatencyTable(describe_machine(), entries, body, sync, transfer, workers)


def list_steps(
    space: Space, copies: int, convert: Callable[[nn.Module], nn.Module] = convert_body
) -> dict[str, list[Step]]:
    """Return a function for each layer and gate of a space, `copies` times, each with arrays of its own."""
    made: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {}
    n = space.batch

    def maps(*shape: int) -> Tensor:
        return torch.rand(n, *shape)

    made[space.stem_key()] = lambda: (convert(build_stem(space).eval()), (maps(*space.input_shape()[1:]),))
    for segment in range(space.segments):
        for layer in range(space.layers):
            (c, h, w), outputs, stride = space.layer_shape(segment, layer)
            for name in space.operators:
                made[space.layer_key(name, segment, layer)] = lambda a=(name, c, outputs, stride), s=(c, h, w): (  # type: ignore[misc]
                    convert(build_operator(*a).eval()),
                    (maps(*s),),
                )
        shape = space.shape(segment)
        made[space.means_key(segment)] = lambda s=shape: (_Means(), (maps(*s),))  # type: ignore[misc]
        for gate in space.gates if segment < space.segments - 1 else ():
            if gate != "none":
                other = shape[:1] if gate == "pooled" else shape
                made[space.gate_key(gate, segment)] = lambda g=gate, s=shape, o=other: (  # type: ignore[misc]
                    _Gate(convert(BranchBody([build_gate(g, s[0])], []).eval())),
                    (maps(*s), maps(*o)),
                )
    features = space.branches * space.shape(space.segments - 1)[0]
    made[space.head_key()] = lambda: (nn.Linear(features, space.classes).eval(), (maps(features),))

    def bind(module: nn.Module, inputs: tuple[Tensor, ...]) -> Step:
        return lambda: module(*inputs)

    return {key: [bind(*make()) for _ in range(copies)] for key, make in made.items()}


class _Means(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class _Gate(nn.Module):
    """A gate and the addition of what it makes."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.gate = body.gates[0]  # type: ignore[index]

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        added: Tensor = x + self.gate(x, other)
        return added


def time_together(steps: Sequence[Step]) -> float:
    """Return the seconds of a step, each repeated on a thread of its own while the others are repeated, too."""
    first = steps[0]
    first()
    begin = time.perf_counter()
    first()
    count = max(3, round(SECONDS / max(time.perf_counter() - begin, 1e-7)))
    if len(steps) == 1:
        begin = time.perf_counter()
        for _ in range(count):
            first()
        return (time.perf_counter() - begin) / count
    start, stop = threading.Barrier(len(steps)), threading.Event()

    def keep_busy(step: Step) -> None:
        with torch.inference_mode():
            step()
            start.wait()
            while not stop.is_set():
                step()

    others = [threading.Thread(target=keep_busy, args=(step,)) for step in steps[1:]]
    for thread in others:
        thread.start()
    start.wait()
    try:
        begin = time.perf_counter()
        for _ in range(count):
            first()
        return (time.perf_counter() - begin) / count
    finally:
        stop.set()
        for thread in others:
            thread.join()


def measure_waits(space: Space, workers: int, rounds: int) -> tuple[float, float, float]:
    """Return the seconds of calling a body, of waiting for another team, and of a byte that another team made."""
    small, large = (space.batch, 1, 1, 1), (space.batch, *space.shape(0))
    length = 16
    runs: dict[str, Executor] = {}
    for name, shape in (("small", small), ("large", large)):
        graph = _make_line(shape, length)
        bodies = tuple(graph.bodies)
        runs[f"{name} alone"] = Executor(graph, Placement.sequential(graph), backend="threads")
        if workers > 1:
            place = Placement((bodies[::2], bodies[1::2]))
            runs[f"{name} in turns"] = Executor(graph, place, backend="threads")
    inputs = {"small": torch.zeros(small), "large": torch.zeros(large)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(max(rounds, 10)):
        for name, run in runs.items():
            x = inputs[name.split()[0]]
            run(x)
            begin = time.perf_counter()
            for _ in range(5):
                run(x)
            times[name].append((time.perf_counter() - begin) / 5 / length)
    for run in runs.values():
        run.close()
    middle = {name: statistics.median(found) for name, found in times.items()}
    return estimate_waits(middle, 4 * torch.zeros(large).numel())


def estimate_waits(seconds: Mapping[str, float], bytes_: int) -> tuple[float, float, float]:
    """Split seconds of a body in a line into those of the call, the wait, and each byte."""
    body = seconds["small alone"]
    if "small in turns" not in seconds:
        return body, 0.0, 0.0
    sync = max(0.0, seconds["small in turns"] - body)
    more = seconds["large in turns"] - seconds["large alone"] - sync
    return body, sync, max(0.0, more / bytes_)


def _make_line(shape: tuple[int, ...], length: int) -> Graph:
    """Make a graph of bodies that hand an array on."""
    values = {f"v{i}": Value(shape) for i in range(length + 1)}
    run = BranchBody([], []).eval()
    bodies = [Body(f"b{i}", run, (Slice(f"v{i}"),), (Slice(f"v{i + 1}"),)) for i in range(length)]
    return Graph(values, bodies, ["v0"], [f"v{length}"])

