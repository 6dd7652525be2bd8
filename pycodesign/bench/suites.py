"""Which layers `pycodesign bench` times, and the tables it makes of them."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pycodesign.bench.cases import Case, Layer
from pycodesign.bench.contenders import ENGINES, Chain, PycodesignChain, missing_package
from pycodesign.bench.harness import SCHEMA, CheckError, Evictor, Spread, gather_facts, measure, spread_ms

OURS = PycodesignChain.engine
DTYPES = ("float32", "uint8")
SCALING_MACS = 50e6  # smaller layers are too short for two threads to say anything
ROUNDS, QUICK_ROUNDS = 15, 5
CLOCKS: dict[str, dict[str, Any]] = {"wall": {}, "cpu": {"clock": time.process_time, "attempts": 1}}


class Suite(NamedTuple):
    """Layers by batch, the batches, and the algorithms of ours to time."""

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


def linear_layers(batch: int) -> list[Layer]:
    """List linear layers by outputs x inputs."""
    return [Layer(f"{o}x{i}", batch, i, o) for o, i in ((4096, 4096), (1024, 4096))]


SUITES = {
    "resnet18": Suite(resnet18_layers, (1, 8), ("auto", "tables", "dense")),
    "linear": Suite(linear_layers, (1, 32), ("auto", "tables", "dense", "packed")),
}


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
    quick: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Check and time the layers of a suite in every installed engine.

    Parameters
    ----------
    name : {"resnet18", "linear"}
    weights : sequence of str
        Functions of `pycodesign.quantize` with their bits: ``"binary"``, ``"ternary"``, ``"uniform4"``.
    dtypes : sequence of {"float32", "uint8"}
        Of the layers' inputs and outputs.
    threads : sequence of int, optional
        One and two by default, as far as there are cores.
    batches : sequence of int, optional
        The suite's own by default.
    algorithms : sequence of str, optional
        Of ours; all that the suite's layers have by default.
    contenders : sequence of str, optional
        Of ``"torch"``, ``"onnxruntime"``, ``"openvino"``, ``"pycodesign"``; all by default. One that is not installed
        is listed as such.
    layers : sequence of str, optional
        Only layers whose names contain one of these.
    rounds : int, optional
        Turns of each contender, 15 by default.
    clock : {"wall", "cpu"}
        ``"cpu"``, the processor time of this process, sees less of what else a busy machine does; one thread only.
    quick : bool
        First batch only, one thread, `auto` only, five rounds, 3x3 layers without stride (or the linear ones).
    progress : bool
        Show a bar on standard error.

    Returns
    -------
    dict
        ``suite``, ``schema``, ``options``, ``facts``; ``rows``, one for each timing, in milliseconds of one layer;
        ``summary`` and ``scaling`` computed from them; ``left_out``, what could not be timed and why.

    Raises
    ------
    ValueError
        If an option is not one of those above.
    """
    suite = SUITES.get(name)
    if suite is None:
        raise ValueError(f"name: expected one of {', '.join(SUITES)}, got {name!r}")
    cores = len(os.sched_getaffinity(0))
    options: dict[str, Any] = {
        "weights": list(weights),
        "dtypes": _choose("dtypes", dtypes, DTYPES),
        "threads": list(threads or ([1] if quick else range(1, min(cores, 2) + 1))),
        "batches": list(batches or (suite.batches[:1] if quick else suite.batches)),
        "algorithms": list(algorithms or (("auto",) if quick else suite.algorithms)),
        "contenders": _choose("contenders", contenders, (*ENGINES, OURS)),
        "layers": list(layers) if layers else None,
        "rounds": rounds or (QUICK_ROUNDS if quick else ROUNDS),
        "clock": _choose("clock", [clock], list(CLOCKS))[0],
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
    left_out = [
        {"contender": engine, "reason": f"not installed: {package}"}
        for engine in options["contenders"]
        if engine != OURS and (package := missing_package(engine))
    ]
    rows: list[dict[str, Any]] = []
    facts = gather_facts()
    evictor = Evictor()
    try:
        settings = [(k, layer) for k in options["weights"] for layer in chosen]
        with _progress(len(settings) * len(options["threads"]), progress) as advance:
            for kind, layer in settings:
                case = Case.random(layer, kind)
                for count in options["threads"]:
                    where = {"layer": layer.name, "batch": layer.batch, "threads": count, "weights": kind}
                    advance(f"{layer.name}, batch {layer.batch}, {kind}, {count} thread{'s'[: count > 1]}")
                    chains, failed = _build_checked(_plan_chains(case, count, options))
                    left_out += [where | failure for failure in failed]
                    timings = measure(chains, rounds=options["rounds"], evict=evictor, **CLOCKS[clock])
                    for chain in chains:
                        timing = timings[chain.name]
                        rows.append(where | {"state": "hot"} | _row(chain, timing.hot))
                        rows.append(where | {"state": "cold"} | _row(chain, timing.cold))
                    del chains
                    gc.collect()  # models of several hundred MB
    finally:
        evictor.close()
    _add_ratios(rows)
    return {
        "schema": SCHEMA,
        "suite": name,
        "options": options,
        "facts": facts | {"load_after": list(os.getloadavg())},
        "rows": rows,
        "summary": summarize(rows),
        "scaling": thread_scaling(rows),
        "left_out": left_out,
    }


def summarize(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean speedup of each of ours over the best other contender of the same dtype, weighted by time.

    Every layer counts once, so the weighted mean is the sum of the best others' times over the sum of ours.

    Parameters
    ----------
    rows : iterable of dict
        Of `run_suite`'s result.

    Returns
    -------
    list of dict
        For the 3x3 layers and for all: ``speedup``; ``slowest``, the least speedup and the layer's name; and how many
        layers it is of, ``count``, and would be ``of`` had none failed.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    names: dict[str, set[str]] = {"3x3": set(), "all": set()}
    for row in rows:
        for which in ["all"] + ["3x3"] * (row["shape"]["kernel"] == 3):
            names[which].add(row["layer"])
            if row["engine"] == OURS and row["speedup"]:
                key = (which, *(row[k] for k in ("weights", "batch", "threads", "state", "contender")))
                groups.setdefault(key, []).append(row)
    summary = []
    for (which, weights, batch, threads, state, contender), members in groups.items():
        slowest = min(members, key=lambda row: float(row["speedup"]))
        ours = sum(row["ms"]["median"] for row in members)
        best = sum(row["ms"]["median"] * row["speedup"] for row in members)
        summary.append(
            {
                "layers": which,
                "count": len(members),
                "of": len(names[which]),
                "weights": weights,
                "batch": batch,
                "threads": threads,
                "state": state,
                "contender": contender,
                "speedup": round(best / ours, 4),
                "slowest": {"layer": slowest["layer"], "speedup": slowest["speedup"]},
            }
        )
    return summary


def thread_scaling(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time with one thread over the time with more, for layers above 50 million multiply-adds."""
    keys = ("layer", "batch", "weights", "state", "contender")
    single: dict[tuple[Any, ...], float] = {}
    several = []
    for row in rows:
        if row["macs"] > SCALING_MACS:
            if row["threads"] == 1:
                single[tuple(row[k] for k in keys)] = row["ms"]["median"]
            else:
                several.append(row)
    return [
        {k: row[k] for k in (*keys, "threads")} | {"scaling": round(single[key] / row["ms"]["median"], 4)}
        for row in several
        if (key := tuple(row[k] for k in keys)) in single
    ]


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """Print a result of `run_suite`: milliseconds of one layer, and how ours compare to the best other contender.

    Parameters
    ----------
    result : dict
    console : rich.console.Console, optional
        Standard output by default.
    """
    console = console or Console()
    unit = "" if result["options"]["clock"] == "wall" else " of processor time"
    facts, rows = result["facts"], result["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    console.print(f"{facts['cpu']}, {facts['cores']} cores, {' '.join(facts['flags'])}; {versions}")
    console.print(f"milliseconds{unit} for one layer; ours also: times as fast as the best other contender")
    dtypes = {row["contender"]: row["dtype"] for row in rows}
    tables = dict.fromkeys((r["weights"], r["batch"], r["threads"], r["state"], r["dtype"]) for r in rows)
    for weights, batch, threads, state, dtype in tables:
        names = [name for name in dtypes if dtypes[name] == dtype]
        title = f"{result['suite']}: {weights}, batch {batch}, {threads} thread{'s'[: threads > 1]}, {dtype}, {state}"
        table = Table("layer", "MMAC", title=title, title_justify="left")
        for name in names:
            table.add_column(name.replace(" float32", "").replace(" int8", ""), justify="right")
        cells: dict[str, dict[str, Any]] = {}
        for row in rows:
            if (row["weights"], row["batch"], row["threads"], row["state"]) == (weights, batch, threads, state):
                cells.setdefault(row["layer"], {})[row["contender"]] = row
        for layer, found in cells.items():
            macs = next(iter(found.values()))["macs"]
            table.add_row(layer, f"{macs / 1e6:.0f}", *(_cell(found.get(name)) for name in names))
        console.print(table)
    _print_summary(result, console)
    for entry in result["left_out"]:
        place = ", ".join(str(entry[k]) for k in ("layer", "batch", "threads", "weights") if k in entry)
        console.print(f"{entry['contender']}{': ' + place if place else ''}: {entry['reason']}", style="yellow")


def _print_summary(result: dict[str, Any], console: Console) -> None:
    if result["summary"]:
        table = Table(
            *("layers", "weights", "batch", "threads", "state", "contender", "times the best other", "slowest layer"),
            title="weighted by time",
            title_justify="left",
        )
        for entry in result["summary"]:
            slowest = f"{entry['slowest']['speedup']:.2f}  {entry['slowest']['layer']}"
            numbers = (str(entry[k]) for k in ("weights", "batch", "threads", "state", "contender"))
            table.add_row(
                f"{entry['layers']} ({entry['count']} of {entry['of']})", *numbers, _speedup(entry["speedup"]), slowest
            )
        console.print(table)
    ours = [entry for entry in result["scaling"] if entry["contender"].startswith(OURS)]
    if ours:
        least = min(ours, key=lambda entry: float(entry["scaling"]))
        console.print(
            f"least scaling to {least['threads']} threads above {SCALING_MACS / 1e6:.0f} MMAC: {least['scaling']:.2f}, "
            f"{least['contender']}, {least['layer']}, batch {least['batch']}, {least['state']}"
        )


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    ms = f"{row['ms']['median']:.3f}"
    return f"{ms} {_speedup(row['speedup'])}" if row["engine"] == OURS and row["speedup"] else ms


def _speedup(value: float) -> str:
    return f"[{'green' if value >= 1 else 'red'}]{value:.2f}x[/]"


def _plan_chains(case: Case, threads: int, options: dict[str, Any]) -> list[tuple[str, Callable[[], Chain]]]:
    """List what to build, under the name to report if that fails."""
    plan: list[tuple[str, Callable[[], Chain]]] = []
    for dtype in options["dtypes"]:
        for engine in options["contenders"]:
            if engine == OURS:
                for way in options["algorithms"]:
                    plan.append((f"{OURS} {dtype} {way}", partial(PycodesignChain, case, dtype, threads, way)))
            elif missing_package(engine) is None:
                plan.append((f"{engine} {dtype}", partial(ENGINES[engine][0], case, dtype, threads)))
    return plan


def _build_checked(makers: Sequence[tuple[str, Callable[[], Chain]]]) -> tuple[list[Chain], list[dict[str, Any]]]:
    """Build and check chains; what fails is told, not dropped."""
    chains: list[Chain] = []
    failed = []
    for name, make in makers:
        try:
            chain = make()
            name = chain.name
            chain.check()
            chains.append(chain)
        except CheckError as error:
            failed.append({"contender": name, "reason": f"failed its check: {error}"})
        except Exception as error:  # an engine may raise anything for a layer that it does not support
            failed.append({"contender": name, "reason": f"{type(error).__name__}: {error}"})
    return chains, failed


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


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    """Add to each row the best other contender of its dtype, and to ours the ratio to every other contender."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in ("layer", "batch", "threads", "weights", "state")), []).append(row)
    for members in groups.values():
        others = {row["contender"]: row for row in members if row["engine"] != OURS}
        for row in members:
            median = row["ms"]["median"]
            same = [other for other in others.values() if other["dtype"] == row["dtype"]]
            best = min(same, key=lambda other: float(other["ms"]["median"]), default=None)
            row["best"] = best["contender"] if best else None
            row["speedup"] = round(best["ms"]["median"] / median, 4) if best else None
            if row["engine"] == OURS:
                row["speedups"] = {k: round(other["ms"]["median"] / median, 4) for k, other in others.items()}


def _choose(argument: str, wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    unknown = [value for value in wanted or () if value not in known]
    if unknown:
        raise ValueError(f"{argument}: expected some of {', '.join(known)}, got {unknown[0]!r}")
    return list(known if wanted is None else wanted)


@contextlib.contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[str], None]]:
    """Give a function that finishes a step and names the next."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=total)
        started = False

        def advance(description: str) -> None:
            nonlocal started
            bar.update(task, advance=int(started), description=description)
            started = True

        yield advance
