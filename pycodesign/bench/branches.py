"""Time branches: what waiting costs, and whole networks beside the same graph one layer after the other.

Two fixed networks, ParNet-like and Inception-like, with random ternary weights and float32 activations: by the plan
that `choose_placement` makes, on teams of one core; one body after another, on one thread and on all; and in other
engines, where every weight is a float32 number. Everything is timed hot, in turns, as where one request follows
another.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import itertools
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import pycodesign
from pycodesign import _core
from pycodesign.bench import branch_latency
from pycodesign.bench.harness import (
    PAUSE_SECONDS,
    SCHEMA,
    CheckError,
    Spread,
    gather_facts,
    keep_threads,
    spread_ms,
)
from pycodesign.bench.suites import progress_bar
from pycodesign.branches import Body, Executor, Graph, Placement, Slice, Value

__all__ = ["choose_placement", "print_branches", "run_branch_suite"]

NETWORKS = ("parnet", "inception")
ROUNDS, QUICK_ROUNDS = 60, 5
RUNS = 5  # consecutive timings of a contender in a turn
TEAMS = 2
TOLERANCE = 1e-4  # of float32 sums in another order, relative to the largest logit

Run = Callable[[], Any]


def run_branch_suite(
    *,
    networks: Sequence[str] = NETWORKS,
    contenders: Sequence[str] | None = None,
    rounds: int | None = None,
    quick: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Time forks, joins and barriers, unbalanced branches, and whole networks.

    Parameters
    ----------
    networks : sequence of {"parnet", "inception"}
    contenders : sequence of str, optional
        Other engines: torch, torch.compile, onnxruntime; by default all that are installed.
    rounds : int, optional
        Turns of each contender, of five timings; 60 by default.
    quick : bool
        Few rounds, and no torch.compile, which compiles for a minute.
    progress : bool

    Returns
    -------
    dict
        ``latencies``, ``unbalanced`` and ``rows``, one for each network and contender, beside ``facts`` and
        ``options``; ratios are medians over the rounds.

    Raises
    ------
    ValueError
        For an unknown name, and where this process may use less than two cores.
    CheckError
        If a contender computes something else.
    """
    if _core.available_cores() < TEAMS:
        raise ValueError(f"branches: expected {TEAMS} cores, got {_core.available_cores()}")
    for name in networks:
        if name not in NETWORKS:
            raise ValueError(f"networks: expected {' or '.join(NETWORKS)}, got {name!r}")
    engines = _find_engines(contenders, quick)
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    facts = gather_facts()
    rows: list[dict[str, Any]] = []
    counts = (5, 3) if quick else (300, 100)
    with keep_threads(), progress_bar(len(networks) + 2, progress) as update:
        update(description="forks and joins")
        latencies = _measure_pool(counts) + branch_latency.measure_latencies(*counts)
        update(advance=1, description="unbalanced branches")
        unbalanced = _measure_unbalanced(rounds)
        update(advance=1)
        for name in networks:
            update(description=name)
            rows += _measure_network(name, engines, rounds)
            update(advance=1)
    options = {"networks": list(networks), "rounds": rounds, "runs": RUNS, "teams": TEAMS, "engines": engines}
    return {
        "schema": SCHEMA,
        "suite": "branches",
        "options": options,
        "facts": facts,
        "latencies": latencies,
        "unbalanced": unbalanced,
        "rows": rows,
    }


@keep_threads()
def choose_placement(graph: Graph, x: Any, few: int = 6) -> Placement:
    """Place branches on two teams, all segments alike: the best of a few that measured bodies promise most of.

    A promise is the sum over the segments of the longer team's bodies. It does not know what a body leaves of the
    caches to the next one, hence the second measurement. One team with all bodies, on one core or on two, is among
    them.
    """
    seconds = _time_bodies(graph, x)
    branches = sorted({body.branch for body in graph.bodies.values() if body.branch >= 0})

    def total(second: frozenset[int]) -> float:
        segments: dict[int, list[float]] = {}
        for name, body in graph.bodies.items():
            segments.setdefault(body.segment, [0.0, 0.0])[body.branch in second] += seconds[name]
        return sum(max(teams) for teams in segments.values())

    choices = [frozenset(c) for n in range(1, len(branches)) for c in itertools.combinations(branches, n)]
    places = [Placement.sequential(graph, threads) for threads in range(1, TEAMS + 1)]
    for second in sorted(choices, key=total)[:few]:
        teams = [[n for n, body in graph.bodies.items() if (body.branch in second) == one] for one in (False, True)]
        places.append(Placement(tuple(map(tuple, teams)), latency=total(second), method="measured"))
    runs: dict[str, tuple[Run, int]] = {}
    for i, place in enumerate(places):
        executor = Executor(graph, place)
        runs[str(i)] = (partial(executor, x), 1)
    lows = {i: float(np.percentile(values, 25)) for i, values in _measure(runs, 15).items()}
    return places[int(min(lows, key=lambda i: lows[i]))]


def _time_bodies(graph: Graph, x: Any) -> dict[str, float]:
    """Return the median seconds of each body, on one thread, as the other bodies run before it."""
    seconds: dict[str, list[float]] = {name: [] for name in graph.bodies}

    def timed(body: Body) -> Callable[..., Any]:
        def run(*arrays: Any) -> Any:
            start = time.perf_counter()
            result = body.run(*arrays)
            seconds[body.name].append(time.perf_counter() - start)
            return result

        return run

    watched = graph.replace_runs(timed)
    with keep_threads():
        pycodesign.set_num_threads(1)
        for _ in range(30):
            watched(x)
    return {name: float(np.median(values[5:])) for name, values in seconds.items()}


def _find_engines(names: Sequence[str] | None, quick: bool) -> list[str]:
    known = {"torch": "torch", "torch.compile": "torch", "onnxruntime": "onnxruntime"}
    for name in names or ():
        if name not in known:
            raise ValueError(f"contenders: expected {', '.join(known)}, got {name!r}")
    found = []
    for name in names or [name for name in known if not (quick and name == "torch.compile")]:
        with contextlib.suppress(ImportError):
            importlib.import_module(known[name])
            found.append(name)
    return found


def _measure_pool(counts: tuple[int, int]) -> list[dict[str, Any]]:
    """Return latencies of a process without torch."""
    command = [sys.executable, branch_latency.__file__, *map(str, counts)]  # by file: the package that runs this, too
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def _build(name: str) -> tuple[Any, Graph, Any]:
    """Return a network, whose weights are ternary, its graph of native bodies, and an input."""
    import torch

    from pycodesign import branches, nn, quantize

    net = getattr(branches, f"build_{name}")()
    for module in net.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.weight.data = torch.from_numpy(quantize.ternary(module.weight.detach().numpy()).dequantize())
    graph = net.to_graph(convert=nn.convert)
    return net, graph, torch.randn(net.shape, generator=torch.Generator().manual_seed(0))


def _measure_network(name: str, engines: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    import torch

    net, graph, x = _build(name)
    place = choose_placement(graph, x)
    contenders: dict[str, tuple[Run, int]] = {}  # and the threads
    plan = Executor(graph, place)
    contenders["plan"] = (partial(_first, plan, x), len(place.teams))
    for threads in range(1, TEAMS + 1):
        sequential = Executor(graph, Placement.sequential(graph, threads))
        contenders[f"sequential, {threads}"] = (partial(_first, sequential, x), threads)
    for engine in engines:
        contenders |= {"torch": _torch, "torch.compile": _compiled, "onnxruntime": _onnxruntime}[engine](net, x)
    with torch.inference_mode():
        expected = net(x).numpy()
        for contender, (run, threads) in contenders.items():
            _set_threads(threads)
            got = np.asarray(run())
            error = float(np.abs(got - expected).max() / np.abs(expected).max())
            if got.shape != expected.shape or not error <= TOLERANCE:
                raise CheckError(f"{contender} of {name}: expected a relative error up to {TOLERANCE}, got {error:.2g}")
        _set_threads(1)
        if not np.array_equal(np.asarray(plan(x)[0]), np.asarray(graph(x)[0])):
            raise CheckError(f"plan of {name}: expected the bits of one body after the other, got others")
        seconds = _measure(contenders, rounds)
    rows = []
    ours = np.median(seconds["plan"], 1)
    for contender, (_, threads) in contenders.items():
        own = seconds[contender]
        low = np.percentile(own, 10) / np.percentile(seconds["plan"], 10)
        rows.append(
            {"network": name, "contender": contender, "threads": threads}
            | {"ms": spread_ms(Spread.of(own.ravel().tolist()), 1), "p10_ms": round(1e3 * np.percentile(own, 10), 6)}
            | {"ratio": round(float(np.median(np.median(own, 1) / ours)), 3), "ratio_p10": round(float(low), 3)}
        )
    rows[0]["teams"] = [list(team) for team in place.teams]
    return rows


def _measure(contenders: dict[str, tuple[Run, int]], rounds: int) -> dict[str, Any]:
    """Time in turns: a pause for the others' threads to rest, two runs to wake one's own, and some timings."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            run, threads = contenders[name]
            _set_threads(threads)
            time.sleep(PAUSE_SECONDS)
            run()
            run()
            timings = []
            for _ in range(RUNS):
                start = time.perf_counter()
                run()
                timings.append(time.perf_counter() - start)
            seconds[name].append(timings)
    return {name: np.array(values) for name, values in seconds.items()}


def _first(run: Callable[..., Any], *arguments: Any) -> Any:
    return run(*arguments)[0]


def _numpy(run: Callable[..., Any], x: Any) -> Any:
    return run(x).numpy()


def _set_threads(threads: int) -> None:
    import torch

    pycodesign.set_num_threads(threads)
    torch.set_num_threads(threads)


def _measure_unbalanced(rounds: int) -> list[dict[str, Any]]:
    """Run branches of about 4 to 1 on two teams: both, and each alone."""
    from pycodesign.branches import build_parnet

    long, short = (build_parnet(depth=depth).to_graph(convert=_to_ternary) for depth in (4, 1))
    values = {"x": long.values["stem"], "long": Value((1, 64)), "short": Value((1, 128))}
    bodies = {
        "long": replace(long.bodies["stream.0"], name="long", inputs=(Slice("x"),), outputs=(Slice("long"),)),
        "short": replace(short.bodies["stream.1"], name="short", inputs=(Slice("x"),), outputs=(Slice("short"),)),
    }
    x = np.random.default_rng(0).random(values["x"].shape, dtype=np.float32)
    runs: dict[str, tuple[Run, int]] = {}
    for name, used in (("the longer one", ["long"]), ("the shorter one", ["short"]), ("both", ["long", "short"])):
        graph = Graph({n: values[n] for n in ("x", *used)}, [bodies[n] for n in used], ["x"], used)
        executor = Executor(graph, Placement(tuple((n,) for n in used)))
        runs[name] = (partial(executor, x), 1)
    seconds = _measure(runs, rounds)
    alone = np.median(seconds["the longer one"], 1)
    return [
        {"branches": name, "ms": spread_ms(Spread.of(own.ravel().tolist()), 1)}
        | {"over_longer": round(float(np.median(np.median(own, 1) / alone)), 3)}
        for name, own in seconds.items()
    ]


def _to_ternary(module: Any) -> Any:
    return importlib.import_module("pycodesign.nn").convert(module, weights="ternary")


def _torch(net: Any, x: Any) -> dict[str, tuple[Run, int]]:
    """Float32, as it is: BatchNorm is not folded."""
    return {f"torch, {threads}": (partial(_numpy, net, x), threads) for threads in range(1, TEAMS + 1)}


def _compiled(net: Any, x: Any) -> dict[str, tuple[Run, int]]:
    """torch.compile with frozen weights, for each number of threads."""
    import torch
    from torch._inductor import config

    runs: dict[str, tuple[Run, int]] = {}
    for threads in range(1, TEAMS + 1):
        _set_threads(threads)
        compiled: Any = torch.compile(copy.deepcopy(net), fullgraph=True, dynamic=False)
        patch: Any = config.patch
        with torch.inference_mode(), patch({"freezing": True, "cpp.threads": threads}):
            compiled(x)
        runs[f"torch.compile, {threads}"] = (partial(_numpy, compiled, x), threads)
    return runs


def _onnxruntime(net: Any, x: Any) -> dict[str, tuple[Run, int]]:
    """One node after another on one and on all threads, and the mode that may run nodes in parallel."""
    import torch

    onnxruntime = importlib.import_module("onnxruntime")
    model: Any = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of this exporter; the other needs one more package
        torch.onnx.export(net, (x,), model, input_names=["x"], output_names=["y"], dynamo=False)
    runs: dict[str, tuple[Run, int]] = {}
    given = x.numpy()
    for mode, threads, parallel in (("", 1, 1), ("", TEAMS, 1), (" parallel", 1, TEAMS), (" parallel", TEAMS, TEAMS)):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads, options.inter_op_num_threads = threads, parallel
        options.execution_mode = getattr(onnxruntime.ExecutionMode, "ORT_PARALLEL" if mode else "ORT_SEQUENTIAL")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(model.getvalue(), options, providers=["CPUExecutionProvider"])
        name = f"onnxruntime{mode}, {f'{parallel} x ' if mode else ''}{threads}"
        runs[name] = (partial(_first, session.run, None, {"x": given}), 1)
    return runs


def print_branches(result: dict[str, Any], console: Console) -> None:
    """Print the tables of a result."""
    table = Table("two teams", "state", "threads of", "p10 us", "p50 us", "p99 us")
    for row in result["latencies"]:
        table.add_row(row["what"], row["state"], row["team"], *(f"{row[p]:.2f}" for p in ("p10", "p50", "p99")))
    console.print(table)
    table = Table("branches", "median ms", "over the longer one")
    for row in result["unbalanced"]:
        table.add_row(row["branches"], f"{row['ms']['median']:.3f}", f"{row['over_longer']:.2f}")
    console.print(table)
    table = Table("network", "contender, threads", "median ms", "p10 ms", "over the plan's", "of p10")
    for row in result["rows"]:
        times = f"{row['ms']['median']:.3f}", f"{row['p10_ms']:.3f}", f"{row['ratio']:.2f}", f"{row['ratio_p10']:.2f}"
        table.add_row(row["network"], row["contender"], *times)
    console.print(table)
