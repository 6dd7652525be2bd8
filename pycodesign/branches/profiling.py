"""`profile`: measure the latency table of a space on this machine."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

import pycodesign
from pycodesign._arguments import to_integer
from pycodesign.branches.executor import Executor
from pycodesign.branches.graph import Body, Graph, Placement, Slice, Value
from pycodesign.branches.lowering import build_chain, simplify
from pycodesign.branches.operators import BranchBody, Head, Stem, build_gate, build_operator
from pycodesign.branches.simulate import predict
from pycodesign.branches.space import BODY, NATIVE_GATES, NATIVE_OPERATORS, Space
from pycodesign.branches.table import LatencyTable, describe_machine

__all__ = ["Probe", "list_probes", "profile"]

REPEATS = 5  # runs of a timing
LENGTH = 8  # bodies in a line
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Probe:
    """Something to time: a body on each of some teams, or a line of bodies that hand an array on.

    Parameters
    ----------
    module : torch.nn.Module
    inputs, outputs : tuple of shapes
    native : bool
        Whether it runs as a chain.
    line : int
        How many bodies follow one another.
    in_turns : bool
        Whether those of a line take turns on two teams.
    """

    module: nn.Module
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    native: bool = True
    line: int = 1
    in_turns: bool = False

    def build(self, copies: int) -> tuple[Graph, Placement]:
        """Return a graph of so many copies, each on a team of its own."""
        values: dict[str, Value] = {}
        bodies: list[Body] = []
        inputs: list[str] = []
        ends: list[str] = []
        for copy in range(copies):
            sources = [f"x{copy}.{i}" for i in range(len(self.inputs))]
            values |= {name: Value(shape) for name, shape in zip(sources, self.inputs, strict=True)}
            inputs += sources
            for index in range(self.line):
                made = [f"y{copy}.{index}.{i}" for i in range(len(self.outputs))]
                values |= {name: Value(shape) for name, shape in zip(made, self.outputs, strict=True)}
                reads, writes = (tuple(Slice(name) for name in names) for names in (sources, made))
                run = build_chain(self.module, len(self.inputs)) if self.native else simplify(self.module)
                arrays = "numpy" if self.native else "torch"
                bodies.append(Body(f"b{copy}.{index}", run, reads, writes, arrays))
                sources = made[: len(sources)]
            ends += made
        names = [body.name for body in bodies]
        teams = [names[::2], names[1::2]]
        if not self.in_turns:
            teams = [names[c * self.line : (c + 1) * self.line] for c in range(copies)]
        return Graph(values, bodies, inputs, ends), Placement(tuple(map(tuple, teams)))


def profile(
    space: Space | Graph,
    workers: int = 2,
    *,
    threads: Sequence[int] = (1,),
    rounds: int = 15,
    calibration: int = 16,
    spin: float | None = None,
) -> LatencyTable:
    """Measure what a space's layers, gates, waits and transfers cost.

    Everything is timed as it will run, by the `Executor`: small graphs of bodies with one layer, with two, with a gate.
    What a layer adds is a difference: behind another layer it may cost less than alone, since activations stay where
    they are. Each is timed alone, and on all workers at the same time. A round times everything once, so that drift of
    the machine meets all alike; medians count.

    Parameters
    ----------
    space : Space or Graph
        Of a graph, each of its bodies is timed as it is.
    workers : int
        Teams that work together: at most the cores that this process may use.
    threads : sequence of int
        Numbers of threads of a team.
    rounds : int
    calibration : int
        Random networks of a space by which the table is scaled at the end: see `calibrate`.
    spin : float, optional
        As the `Executor` takes it.

    Returns
    -------
    LatencyTable
        Which `LatencyTable.save` keeps.

    Raises
    ------
    TypeError, ValueError
        For more workers or threads than cores.
    """
    if not isinstance(space, (Space, Graph)):
        raise TypeError(f"space: expected a Space or a Graph, got {type(space).__name__}")
    cores = pycodesign.show_config()["cores"]
    if not 1 <= to_integer("workers", workers) <= cores:
        raise ValueError(f"workers: expected 1 to {cores}, the cores of this process, got {workers}")
    if not isinstance(threads, Iterable):
        raise TypeError(f"threads: expected a sequence of integers, got {type(threads).__name__}")
    threads = tuple(threads)
    for count in threads:
        if not 1 <= to_integer("threads", count) <= cores:
            raise ValueError(f"threads: expected 1 to {cores}, the cores of this process, got {count}")
    to_integer("rounds", rounds, 1)
    to_integer("calibration", calibration, 0)
    with torch.random.fork_rng(devices=[]):
        return _measure(space, workers, threads, rounds, calibration, spin)


def _measure(
    space: Space | Graph, workers: int, threads: Sequence[int], rounds: int, calibration: int, spin: float | None
) -> LatencyTable:
    cores = pycodesign.show_config()["cores"]
    probes: Mapping[str, Probe | BodyProbe]
    probes = list_probes(space, workers) if isinstance(space, Space) else list_body_probes(space, workers)
    timed = _open(probes, workers, dict.fromkeys((1, *threads)), cores, spin)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for _ in progress.track(range(rounds), description="rounds"):
            for run in timed:
                run.time()
    seconds: dict[str, dict[str, float]] = {name: {} for name in probes}
    for run in timed:
        seconds[run.name][run.column] = statistics.median(run.seconds)
    table = make_table(space, seconds, workers)
    if isinstance(space, Graph) or not calibration:
        return table
    return calibrate(space, table, workers, calibration, rounds, spin)


def calibrate(
    space: Space, table: LatencyTable, workers: int, networks: int, rounds: int, spin: float | None = None
) -> LatencyTable:
    """Scale a table so that whole networks, drawn at random, take as long as it predicts, in the median.

    One factor is for what runs alone, by networks on one team, and one for what runs beside others, by networks of
    which each branch has a team.
    """
    rng, options = random.Random(-1), {} if spin is None else {"spin": spin}
    runs: list[tuple[str, float, _Run]] = []
    for index in range(networks):
        graph = space.build(space.sample(rng), seed=index).to_graph(native=True)
        places = {"solo": Placement.sequential(graph)}
        if min(workers, space.branches) > 1:
            teams: list[list[str]] = [[] for _ in range(workers)]
            for name, body in graph.bodies.items():
                teams[max(body.branch, 0) % workers].append(name)
            places["together"] = Placement(tuple(map(tuple, teams)))
        for column, place in places.items():
            x = [torch.rand(space.input_shape())]
            run = _Run(str(index), column, Executor(graph, place, backend="threads", **options), x)
            runs.append((column, predict(graph, place, table), run))
    for _ in range(rounds):
        for _, _, run in runs:
            run.time()
    factors = {}
    for column in ("solo", "together"):
        ratios = [statistics.median(run.seconds) / expected for kind, expected, run in runs if kind == column]
        factors[column] = statistics.median(ratios) if ratios else 1.0

    def scale(row: Mapping[str, float]) -> dict[str, float]:
        return {column: value * factors[column.split("/")[0]] for column, value in row.items()}

    entries = {key: scale(row) for key, row in table.entries.items()}
    return replace(table, entries=entries, run=scale(table.run))


@dataclass
class _Run:
    name: str
    column: str
    run: Executor
    inputs: list[torch.Tensor]
    seconds: list[float] = field(default_factory=list)

    def time(self) -> None:
        self.run(*self.inputs)
        begin = time.perf_counter()
        for _ in range(REPEATS):
            self.run(*self.inputs)
        self.seconds.append((time.perf_counter() - begin) / REPEATS)


def _open(
    probes: Mapping[str, Probe | BodyProbe],
    workers: int,
    threads: Mapping[int, None],
    cores: int,
    spin: float | None,
) -> list[_Run]:
    options = {} if spin is None else {"spin": spin}
    runs = []
    for name, probe in probes.items():
        for count in threads:
            for copies in (1, workers) if workers > 1 and not probe.in_turns else (1,):
                graph, place = probe.build(copies)
                place = Placement(place.teams, (count,) * len(place.teams))
                if len(place.teams) * count > cores:
                    continue
                column = f"{'together' if copies > 1 else 'solo'}/{count}"
                values = [graph.values[x] for x in graph.inputs]
                inputs = [torch.zeros(value.shape, dtype=getattr(torch, value.dtype)) for value in values]
                runs.append(_Run(name, column, Executor(graph, place, backend="threads", **options), inputs))
    return runs


def list_probes(space: Space, workers: int = 2) -> dict[str, Probe]:
    """Return what is timed: a probe for each key of the table, for what its cost is compared with, and for waits."""
    n, found = space.batch, {}
    worlds = (True,) if space.all_native else (True, False)
    tiny = ((n, 1, 1, 1),)
    for native in worlds:
        suffix = "" if native else "@torch"
        empty = BranchBody([], []).eval()
        found[f"one{suffix}"] = Probe(empty, tiny, tiny, native)
        found[f"line{suffix}"] = Probe(empty, tiny, tiny, native, LENGTH)
        for segment in range(space.segments):
            _list_layers(found, space, segment, native)
            own = (n, *space.shape(segment))
            for gate in space.gates if segment < space.segments - 1 else ():
                if gate == "none" or (native and gate not in NATIVE_GATES):
                    continue
                other = (n, own[1], 1, 1) if gate == "pooled" else own
                module = BranchBody([build_gate(gate, own[1])], []).eval()
                found[space.gate_key(gate, segment, native=native)] = Probe(module, (own, other), (own,), native)
            sends, outputs = "features", [(n, own[1], 1, 1)]
            if segment < space.segments - 1:
                sends, outputs = "both", [own, *outputs]
            module = BranchBody([], [], sends).eval()
            found[space.means_key(segment, native=native)] = Probe(module, (own,), tuple(outputs), native)
            found[f"copy/{segment}{suffix}"] = Probe(empty, (own,), (own,), native)
    stem, channels = Stem(space.channels, space.width).eval(), space.branches * space.shape(space.segments - 1)[0]
    found[space.stem_key()] = Probe(stem, (space.input_shape(),), ((n, *space.shape(-1)),))
    found[space.head_key()] = Probe(Head(channels, space.classes).eval(), ((n, channels, 1, 1),), ((n, space.classes),))
    return found | list_waits((n, *space.shape(0)), workers)


def list_waits(large: Shape, workers: int) -> dict[str, Probe]:
    """Return the probes of calls, waits and transfers: bodies that hand on nothing, or an array of some size."""
    empty, tiny = BranchBody([], []).eval(), ((large[0], 1, 1, 1),)
    found = {"one": Probe(empty, tiny, tiny), "line": Probe(empty, tiny, tiny, True, LENGTH)}
    if workers > 1:
        found["turns"] = Probe(empty, tiny, tiny, True, LENGTH, True)
        found["large line"] = Probe(empty, (large,), (large,), True, LENGTH)
        found["large turns"] = Probe(empty, (large,), (large,), True, LENGTH, True)
    return found


@dataclass(frozen=True)
class BodyProbe:
    """A body of a graph by itself, on each of some teams."""

    graph: Graph
    name: str
    in_turns: bool = False

    def build(self, copies: int) -> tuple[Graph, Placement]:
        """Return a graph of so many copies, which read and write values of their own."""
        values: dict[str, Value] = {}
        bodies, inputs, outputs = [], [], []
        source = self.graph.bodies[self.name]
        for copy in range(copies):
            reads: list[str] = []
            writes: list[str] = []
            for pieces, names, kind in ((source.inputs, reads, "x"), (source.outputs, writes, "y")):
                for index, piece in enumerate(pieces):
                    whole = self.graph.values[piece.value]
                    n, _, *rest = whole.shape
                    names.append(f"{kind}{copy}.{index}")
                    values[names[-1]] = Value((n, (piece.end or 0) - piece.begin, *rest), whole.dtype)
            pieces_read, pieces_written = (tuple(Slice(name) for name in names) for names in (reads, writes))
            bodies.append(replace(source, name=f"{copy}", inputs=pieces_read, outputs=pieces_written))
            inputs += reads
            outputs += writes
        return Graph(values, bodies, inputs, outputs), Placement(tuple((body.name,) for body in bodies))


def list_body_probes(graph: Graph, workers: int) -> dict[str, Probe | BodyProbe]:
    """Return what is timed of a graph: its bodies, and waits for values as large as its largest."""
    largest = max((value.bytes for value in graph.values.values()), default=0)
    found: dict[str, Probe | BodyProbe] = {f"body {name}": BodyProbe(graph, name) for name in graph.bodies}
    return found | dict(list_waits((1, max(1, largest // 4), 1, 1), workers))


def _list_layers(found: dict[str, Probe], space: Space, segment: int, native: bool) -> None:
    for layer in range(space.layers):
        (c, h, w), outputs, stride = space.layer_shape(segment, layer)
        after = (space.batch, *space.shape(segment))
        for name in space.operators:
            for before in space.operators if layer else (None,):
                if native and not {name, before or "skip"} <= NATIVE_OPERATORS:
                    continue
                key = space.layer_key(name, segment, layer, before, native=native)
                if key in found:
                    continue
                layers = [build_operator(before, c, c)] if before else []
                layers.append(build_operator(name, c, outputs, stride))
                module = BranchBody([], layers).eval()
                found[key] = Probe(module, ((space.batch, c, h, w),), (after,), native)
                if before:
                    base = Probe(BranchBody([], layers[:1]).eval(), ((space.batch, c, h, w),), (after,), native)
                    found.setdefault(f"before {key}", base)


def make_table(space: Space | Graph, seconds: Mapping[str, Mapping[str, float]], workers: int) -> LatencyTable:
    """Make the table of what probes took: differences between them.

    Parameters
    ----------
    space : Space or Graph
    seconds : mapping
        By name of `list_probes` or `list_body_probes`, and column of a table.
    workers : int
    """

    def subtract(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
        return {column: max(0.0, value - b[column]) for column, value in a.items() if column in b}

    helpers = ("one", "line", "turns", "large", "copy", "before")
    entries, bodies = {}, {}
    for suffix in ("", "@torch"):
        if f"one{suffix}" in seconds:
            one, line = seconds[f"one{suffix}"], seconds[f"line{suffix}"]
            bodies[suffix] = {column: value / (LENGTH - 1) for column, value in subtract(line, one).items()}
            entries[BODY + suffix] = bodies[suffix]
    run = subtract(seconds["one"], entries[BODY])
    for key, row in seconds.items():
        if isinstance(space, Graph):
            if key.startswith("body "):
                entries[key.removeprefix("body ")] = subtract(row, run)
            continue
        if key.split(" ")[0].split("/")[0].removesuffix("@torch") in helpers:
            continue
        suffix = "@torch" if key.endswith("@torch") else ""
        base = seconds[f"one{suffix}"]
        if f"before {key}" in seconds:
            base = seconds[f"before {key}"]
        elif key.startswith(("gate:", "means/")):
            segment = next(s for s in range(space.segments) if space.means_key(s).split("/")[1] in key)
            base = seconds[f"copy/{segment}{suffix}"]
        entries[key] = subtract(row, base)
    alone = seconds["line"]["solo/1"]
    sync = transfer = 0.0
    if "turns" in seconds:
        sync = max(0.0, seconds["turns"]["solo/1"] - alone) / (LENGTH - 1)
        more = seconds["large turns"]["solo/1"] - seconds["large line"]["solo/1"] - (LENGTH - 1) * sync
        if isinstance(space, Graph):
            size = max(4, max((value.bytes for value in space.values.values()), default=0) // 4 * 4)
        else:
            size = Value((space.batch, *space.shape(0))).bytes
        transfer = max(0.0, more) / (LENGTH - 1) / size
    return LatencyTable(describe_machine(), entries, run, sync, transfer, workers)
