"""Whole networks beside every installed engine: which, and the run."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from pycodesign.bench.cold_start import time_cold_starts
from pycodesign.bench.contenders import OURS, PRECISIONS
from pycodesign.bench.harness import SCHEMA, Evictor, gather_facts, keep_threads, measure, spread_ms
from pycodesign.bench.network_report import compare_memory, summarize
from pycodesign.bench.operator_call import time_operator_call
from pycodesign.bench.report import add_ratios
from pycodesign.bench.suites import CLOCKS, DTYPES, QUICK_ROUNDS, ROUNDS, build_checked, choose, progress_bar

if TYPE_CHECKING:
    from pycodesign.bench.network_contenders import NetworkContender
    from pycodesign.bench.networks import Network

WEIGHTS = ("binary", "ternary", "uniform2")
BATCHES = (1, 8)
Row = dict[str, Any]


def run_models(
    *,
    networks: Sequence[str] | None = None,
    weights: Sequence[str] | None = None,
    dtypes: Sequence[str] = DTYPES,
    threads: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    contenders: Sequence[str] | None = None,
    rounds: int | None = None,
    clock: str = "wall",
    quick: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Check and time whole networks in every installed engine.

    Parameters
    ----------
    networks : sequence of {"resnet18", "resnet20", "vgg-small"}, optional
        All by default.
    weights : sequence of str, optional
        Functions of `pycodesign.quantize` with their bits; ``"binary"``, ``"ternary"`` and ``"uniform2"`` (4 levels) by
        default. All share one timing of the other engines, which depends on no weight's value.
    dtypes : sequence of {"float32", "uint8"}
        Of the activations.
    threads : sequence of int, optional
        One and two by default, as far as there are cores.
    batches : sequence of int, optional
        1 and 8 by default.
    contenders : sequence of str, optional
        Of ``"torch"``, ``"torch.compile"``, ``"onnxruntime"``, ``"openvino"``, ``"pycodesign"``; all by default. One
        that is not installed is listed as such.
    rounds : int, optional
        Turns of each contender, 15 by default.
    clock : {"wall", "cpu"}
        As in `run_suite`.
    quick : bool
        ResNet-20, ternary, batch 1, one thread, beside torch alone, five rounds, where nothing else is asked for; no
        cold start.
    progress : bool
        Show a bar on standard error.

    Returns
    -------
    dict
        ``suite``, ``schema``, ``options``, ``facts``; ``rows``, one for each timing, in milliseconds of one batch, with
        the contender's error and its agreement with the float64 model in ``details``; ``summary`` as `summarize` gives
        it; ``memory`` as `compare_memory` does, ``cold_start`` as `time_cold_starts` does, of ternary ResNet-18 if
        ternary is among the weights, else of the first; ``operator_call`` as `time_operator_call` does; ``left_out``,
        what could not be timed and why.

    Raises
    ------
    ModuleNotFoundError
        Without torch, in which the networks are written.
    ValueError
        If an option is not one of those above.
    """
    if importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError('whole networks are written in torch: pip install "pycodesign[bench]"')
    from pycodesign.bench.network_contenders import NETWORK_ENGINES
    from pycodesign.bench.networks import NETWORKS

    cores = len(os.sched_getaffinity(0))
    options: dict[str, Any] = {
        "networks": choose("networks", networks or (("resnet20",) if quick else None), list(NETWORKS)),
        "weights": list(weights or (("ternary",) if quick else WEIGHTS)),
        "dtypes": choose("dtypes", dtypes, DTYPES),
        "threads": list(threads or ([1] if quick else range(1, min(cores, 2) + 1))),
        "batches": list(batches or (BATCHES[:1] if quick else BATCHES)),
        "contenders": choose("contenders", contenders or (("torch", OURS) if quick else None), list(NETWORK_ENGINES)),
        "rounds": rounds or (QUICK_ROUNDS if quick else ROUNDS),
        "clock": choose("clock", [clock], list(CLOCKS))[0],
        "isa": None,
        "quick": quick,
    }
    if clock == "cpu" and options["threads"] != [1]:
        raise ValueError(f"threads: expected 1 with the clock cpu, got {options['threads']}")
    left_out: list[Row] = []
    for engine in options["contenders"]:
        packages = NETWORK_ENGINES[engine][1]
        if missing := next((package for package in packages if importlib.util.find_spec(package) is None), None):
            left_out.append({"contender": engine, "reason": f"not installed: {missing}"})
    facts = gather_facts()
    with keep_threads():
        rows, failed = _time_networks(options, [entry["contender"] for entry in left_out], progress)
    add_ratios(rows)
    cold_starts: list[Row] = []
    failed_starts: list[Row] = []
    if not quick and OURS in options["contenders"]:
        kind = "ternary" if "ternary" in options["weights"] else options["weights"][0]
        cold_starts, failed_starts = time_cold_starts(kind, options["dtypes"], progress=progress)
    return {
        "schema": SCHEMA,
        "suite": "models",
        "options": options,
        "facts": facts | {"load_after": list(os.getloadavg())},
        "rows": rows,
        "summary": summarize(rows),
        "memory": compare_memory(rows),
        "cold_start": cold_starts,
        "operator_call": time_operator_call() if OURS in options["contenders"] else {},
        "left_out": left_out + failed + failed_starts,
    }


def _time_networks(options: Row, absent: Sequence[str], progress: bool) -> tuple[list[Row], list[Row]]:
    """Give the rows of all networks, and what failed."""
    from pycodesign.bench.networks import Network

    rows: list[Row] = []
    left_out: list[Row] = []
    settings = list(product(options["networks"], options["batches"], options["threads"]))
    with contextlib.closing(Evictor()) as evict, progress_bar(len(settings), progress) as update:
        for name, batch, threads in settings:
            where = {"layer": name, "batch": batch, "threads": threads}
            label = f"{name}, batch {batch}, {threads} thread{'s'[: threads > 1]}"
            update(description=f"{label}: preparing")
            if threads == options["threads"][0]:
                networks = {kind: Network.random(name, kind, batch) for kind in options["weights"]}
            plan = _plan(networks, threads, options, absent)
            contenders, failed = build_checked(plan)
            update(description=label)
            advance = partial(update, advance=1 / max(options["rounds"] * len(contenders), 1))
            settings_of_clock = CLOCKS[options["clock"]]
            timings = measure(contenders, rounds=options["rounds"], evict=evict, progress=advance, **settings_of_clock)
            for kind, (contender, timing) in product(options["weights"], timings.items()):
                if contender.engine != OURS or contender.network is networks[kind]:
                    for state in ("hot", "cold"):
                        shared = where | {"weights": kind, "state": state}
                        rows.append(shared | _row(contender, spread_ms(getattr(timing, state), 1)))
            left_out += [where | failure for failure in failed]
            del plan, contenders, timings
            _forget_compiled()
            gc.collect()
    return rows, left_out


def _plan(
    networks: dict[str, Network], threads: int, options: Row, absent: Sequence[str]
) -> list[tuple[dict[str, str], Callable[[], NetworkContender]]]:
    """List what to build, each with what to report if that fails; other engines run the first weights only."""
    from pycodesign.bench.network_contenders import NETWORK_ENGINES

    plan: list[tuple[dict[str, str], Callable[[], NetworkContender]]] = []
    for engine, dtype in product(options["contenders"], options["dtypes"]):
        for kind, network in list(networks.items())[: None if engine == OURS else 1]:
            if engine not in absent:
                label = {"contender": f"{engine} {PRECISIONS[dtype]}"} | ({"weights": kind} if engine == OURS else {})
                plan.append((label, partial(NETWORK_ENGINES[engine][0], network, dtype, threads)))
    return plan


def _row(contender: NetworkContender, ms: dict[str, float | int]) -> Row:
    network = contender.network
    return {
        "contender": contender.name,
        "engine": contender.engine,
        "algorithm": contender.algorithm,
        "dtype": contender.dtype,
        "shape": list(network.x.shape),
        "macs": network.macs,
        "int8_bytes": network.int8_bytes,
        "ms": ms,
        "gmacs": round(network.macs / ms["median"] / 1e6, 2),
        "details": contender.details,
    }


def _forget_compiled() -> None:
    """Drop what torch.compile keeps of earlier networks: it compiles no function more than a few times."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
