"""Which layers `pycodesign bench` times, and the run."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any, NamedTuple, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import pycodesign
from pycodesign import ops
from pycodesign.bench.cases import Case, Layer
from pycodesign.bench.contenders import (
    ENGINES,
    OURS,
    PRECISIONS,
    RIVAL_DTYPES,
    Chain,
    PycodesignChain,
    hold_engine,
    missing_package,
)
from pycodesign.bench.harness import (
    SCHEMA,
    CheckError,
    Evictor,
    Spread,
    gather_facts,
    keep_threads,
    measure,
    spread_ms,
)
from pycodesign.bench.report import add_ratios, compare_choices, summarize, thread_scaling

DTYPES = ("float32", "uint8")
ROUNDS, QUICK_ROUNDS = 15, 5
CLOCKS: dict[str, dict[str, Any]] = {"wall": {}, "cpu": {"clock": time.process_time, "attempts": 1}}


class Suite(NamedTuple):
    """Layers by batch, the batches, and the algorithms of ours."""

    layers: Callable[[int], list[Layer]]
    batches: tuple[int, ...]
    algorithms: tuple[str, ...]


def resnet18_layers(batch: int) -> list[Layer]:
    """List the distinct convolutions of ResNet-18 (He et al., 2016) for images of 224 x 224."""
    layers = [Layer("7x7 3-64/2@224", batch, 3, 64, 224, 7, 2, 3)]
    for inputs, outputs, size in ((64, 64, 56), (64, 128, 56), (128, 256, 28), (256, 512, 14)):
        if inputs < outputs:
            layers.append(Layer(f"3x3 {inputs}-{outputs}/2@{size}", batch, inputs, outputs, size, 3, 2, 1))
            layers.append(Layer(f"1x1 {inputs}-{outputs}/2@{size}", batch, inputs, outputs, size, 1, 2, 0))
            size //= 2
        layers.append(Layer(f"3x3 {outputs}-{outputs}@{size}", batch, outputs, outputs, size, 3, 1, 1))
    return layers


def other_layers(batch: int) -> list[Layer]:
    """List convolutions with channels and sizes that are no powers of two, nor ResNet-18's."""
    shapes = ((96, 96, 27), (160, 160, 13), (48, 80, 31), (192, 384, 13), (256, 384, 13), (130, 70, 19))
    return [
        Layer(f"{kernel}x{kernel} {inputs}-{outputs}@{size}", batch, inputs, outputs, size, kernel, 1, kernel // 2)
        for kernel in (3, 1)
        for inputs, outputs, size in shapes
    ]


def linear_layers(batch: int) -> list[Layer]:
    """List linear layers by outputs x inputs."""
    return [Layer(f"{o}x{i}", batch, i, o) for o, i in ((4096, 4096), (1024, 4096))]


SUITES = {
    "resnet18": Suite(resnet18_layers, (1, 8), ops.CONV2D_ALGORITHMS),
    "other": Suite(other_layers, (1,), ops.CONV2D_ALGORITHMS),
    "linear": Suite(linear_layers, (1, 32), ops.LINEAR_ALGORITHMS),
}
COMPARABLE = (*SUITES, "models")  # whose results have a row for each layer, or network, and contender


def run_suite(
    name: str,
    *,
    weights: Sequence[str] = ("ternary",),
    dtypes: Sequence[str] = DTYPES,
    threads: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    algorithms: Sequence[str] | None = None,
    contenders: Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    rounds: int | None = None,
    clock: str = "wall",
    isa: str | None = None,
    quick: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Check and time the layers of a suite in every installed engine.

    Parameters
    ----------
    name : {"resnet18", "other", "linear"}
    weights : sequence of str
        Functions of `pycodesign.quantize` with their bits: ``"binary"``, ``"ternary"``, ``"uniform4"``. All share one
        timing of the other engines, which depends on no weight's value.
    dtypes : sequence of {"float32", "uint8", "uint4"}
        Of the layers' inputs and outputs; ``"uint4"``: uint8 below 16 and `input_bits` 4, beside other engines' uint8.
    threads : sequence of int, optional
        One and two by default, as far as there are cores.
    batches : sequence of int, optional
        The suite's own by default.
    algorithms : sequence of str, optional
        Of ours; all that serve the weights by default. One that ``"auto"`` chose is not timed twice.
    contenders : sequence of str, optional
        Of ``"torch"``, ``"onnxruntime"``, ``"openvino"``, ``"pycodesign"``; all by default. One that is not installed
        is listed as such.
    layers : sequence of str, optional
        Only layers whose names contain one of these.
    rounds : int, optional
        Turns of each contender, 15 by default.
    clock : {"wall", "cpu"}
        ``"cpu"``, the processor time of this process, sees less of what else a busy machine does; one thread only.
    isa : str, optional
        Instruction set for every contender: ours is forced to it; torch is held to it for the rest of this process,
        which must not have imported it; others are left out.
    quick : bool
        First batch only, one thread, `auto` only, five rounds, 3x3 layers without stride (or the linear ones).
    progress : bool
        Show a bar on standard error.

    Returns
    -------
    dict
        ``suite``, ``schema``, ``options``, ``facts``; ``rows``, one for each timing, in milliseconds of one layer;
        ``summary``, ``choices`` and ``scaling``, computed from them as `bench.report` says; ``left_out``, what could
        not be timed and why.

    Raises
    ------
    ValueError
        If an option is not one of those above.
    """
    suite = SUITES.get(name)
    if suite is None:
        raise ValueError(f"name: expected one of {', '.join(SUITES)}, got {name!r}")
    cores = len(os.sched_getaffinity(0))
    has_codebooks = any(kind.startswith("codebook") for kind in weights)
    served = [way for way in suite.algorithms if way != "codebook" or has_codebooks]
    options: dict[str, Any] = {
        "weights": list(weights),
        "dtypes": choose("dtypes", dtypes, list(RIVAL_DTYPES)),
        "threads": list(threads or ([1] if quick else range(1, min(cores, 2) + 1))),
        "batches": list(batches or (suite.batches[:1] if quick else suite.batches)),
        "algorithms": choose("algorithms", algorithms or (("auto",) if quick else served), suite.algorithms),
        "contenders": choose("contenders", contenders, (*ENGINES, OURS)),
        "layers": list(layers) if layers else None,
        "rounds": rounds or (QUICK_ROUNDS if quick else ROUNDS),
        "clock": choose("clock", [clock], list(CLOCKS))[0],
        "isa": isa and choose("isa", [isa], pycodesign.show_config()["supported_isas"])[0],
        "quick": quick,
    }
    if clock == "cpu" and options["threads"] != [1]:
        raise ValueError(f"threads: expected 1 with the clock cpu, got {options['threads']}")
    chosen = [
        layer
        for batch in options["batches"]
        for layer in suite.layers(batch)
        if not (quick and layer.is_conv and (layer.kernel, layer.stride) != (3, 1))
        if not layers or any(part in layer.name for part in layers)
    ]
    for part in layers or ():
        if not any(part in layer.name for layer in chosen):
            raise ValueError(f"layers: expected part of a layer's name in suite {name}, got {part!r}")
    left_out: list[dict[str, Any]] = []
    with _instruction_set(isa), keep_threads():
        for engine in options["contenders"]:
            if engine != OURS and (reason := _absence(engine, isa)):
                left_out.append({"contender": engine, "reason": reason})
        facts = gather_facts()
        rows, failed = _time_layers(chosen, options, [entry["contender"] for entry in left_out], progress)
    add_ratios(rows)
    return {
        "schema": SCHEMA,
        "suite": name,
        "options": options,
        "facts": facts | {"load_after": list(os.getloadavg())},
        "rows": rows,
        "summary": summarize(rows),
        "choices": compare_choices(rows),
        "scaling": thread_scaling(rows),
        "left_out": left_out + failed,
    }


def _time_layers(
    layers: Sequence[Layer], options: dict[str, Any], absent: Sequence[str], progress: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Give the rows of all layers, and what failed."""
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    steps = len(layers) * len(options["threads"])
    with contextlib.closing(Evictor()) as evict, progress_bar(steps, progress) as update:
        for layer in layers:
            cases = {kind: Case.random(layer, kind) for kind in options["weights"]}
            for count in options["threads"]:
                where = {"layer": layer.name, "batch": layer.batch, "threads": count}
                update(description=f"{layer.name}, batch {layer.batch}, {count} thread{'s'[: count > 1]}")
                chains, failed = build_checked(_plan_chains(cases, count, options, absent))
                rows += [where | row for row in _time_chains(cases, chains, options, evict, update)]
                left_out += [where | failure for failure in failed]
                del chains
                gc.collect()  # models of several hundred MB
    return rows, left_out


def _absence(engine: str, isa: str | None) -> str | None:
    """Say why an engine takes no part, None if it does."""
    if package := missing_package(engine):
        return f"not installed: {package}"
    return hold_engine(engine, isa) if isa else None


def _plan_chains(
    cases: dict[str, Case], threads: int, options: dict[str, Any], absent: Sequence[str]
) -> list[tuple[dict[str, str], Callable[[], Chain]]]:
    """List what to build, each with what to report if that fails.

    The times of the other engines depend on no weight's value, so these run the first case only.
    """
    plan: list[tuple[dict[str, str], Callable[[], Chain]]] = []
    for engine in options["contenders"]:
        if engine == OURS:
            for (kind, case), dtype, way in product(cases.items(), options["dtypes"], options["algorithms"]):
                label = {"contender": f"{OURS} {PRECISIONS[dtype]} {way}", "weights": kind}
                plan.append((label, partial(PycodesignChain, case, dtype, threads, way)))
        elif engine not in absent:
            case = next(iter(cases.values()))
            for dtype in dict.fromkeys(RIVAL_DTYPES[dtype] for dtype in options["dtypes"]):
                label = {"contender": f"{engine} {PRECISIONS[dtype]}"}
                plan.append((label, partial(ENGINES[engine][0], case, dtype, threads)))
    return plan


class Checked(Protocol):
    """What `build_checked` builds."""

    def check(self) -> None:
        """Raise if it computes the wrong thing."""


AnyChecked = TypeVar("AnyChecked", bound=Checked)


def build_checked(
    plan: Sequence[tuple[dict[str, str], Callable[[], AnyChecked]]],
) -> tuple[list[AnyChecked], list[dict[str, str]]]:
    """Build and check contenders; what fails is told, not dropped."""
    contenders: list[AnyChecked] = []
    failed = []
    for label, make in plan:
        try:
            contender = make()
            contender.check()
            contenders.append(contender)
        except CheckError as error:
            failed.append(label | {"reason": f"failed its check: {error}"})
        except Exception as error:  # an engine may raise anything for a layer that it does not support
            failed.append(label | {"reason": f"{type(error).__name__}: {error}"})
    return contenders, failed


def _time_chains(
    cases: dict[str, Case],
    chains: Sequence[Chain],
    options: dict[str, Any],
    evict: Callable[[], object],
    update: Callable[..., object],
) -> Iterator[dict[str, Any]]:
    """Time what has to be timed and give the rows of all chains, those of the other engines once for each weights."""
    timed = list(dict.fromkeys(_stand_in(chain, chains) for chain in chains))
    share = 1 / max(options["rounds"] * len(timed), 1)
    progress = partial(update, advance=share)
    timings = measure(timed, rounds=options["rounds"], evict=evict, progress=progress, **CLOCKS[options["clock"]])
    for kind, case in cases.items():
        for chain in chains:
            if chain.engine != OURS or chain.case is case:
                timing = timings[_stand_in(chain, chains)]
                yield {"weights": kind, "state": "hot"} | _row(chain, timing.hot)
                yield {"weights": kind, "state": "cold"} | _row(chain, timing.cold)


def _stand_in(chain: Chain, chains: Sequence[Chain]) -> Chain:
    """The chain to time in this one's place: for `auto` the algorithm that it chose, where that runs too."""
    if chain.algorithm != "auto":
        return chain
    same = (other for other in chains if other.case is chain.case and other.dtype == chain.dtype)
    return next((other for other in same if other.algorithm == chain.details["algorithm"]), chain)


def _row(chain: Chain, spread: Spread) -> dict[str, Any]:
    case = chain.case
    ms = spread_ms(spread, case.length)
    return {
        "contender": chain.name,
        "engine": chain.engine,
        "algorithm": chain.algorithm,
        "dtype": chain.dtype,
        "shape": {k: v for k, v in asdict(case.layer).items() if k != "name"},
        "macs": case.layer.macs,
        "chain": {"length": case.length, "sequential": case.sequential},
        "ms": ms,
        "gmacs": round(case.layer.macs / ms["median"] / 1e6, 2),
        "details": chain.details,
    }


def choose(argument: str, wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    unknown = [value for value in wanted or () if value not in known]
    if unknown:
        raise ValueError(f"{argument}: expected some of {', '.join(known)}, got {unknown[0]!r}")
    return list(known if wanted is None else wanted)


@contextlib.contextmanager
def _instruction_set(isa: str | None) -> Iterator[None]:
    """Force our kernels to an instruction set, if one is given."""
    before = pycodesign.show_config()["isa"]
    try:
        if isa:
            pycodesign.set_isa(isa)
        yield
    finally:
        pycodesign.set_isa(before)


@contextlib.contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Callable[..., object]]:
    """Show a bar with the time that is left, and give the function that updates it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    # Layers take seconds each, in turns of very different lengths: hence the long memory.
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown, speed_estimate_period=600
    ) as bar:
        yield partial(bar.update, bar.add_task("", total=total))
