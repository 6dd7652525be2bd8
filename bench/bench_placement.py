"""What latency tables, placements and processes of `pycodesign.branches` are worth, as results for bench/results.

python bench/bench_placement.py predict --json predicted.json    # predicted against measured latency of random plans
python bench/bench_placement.py place --json placed.json         # methods of placement: gap and time of each
python bench/bench_placement.py delay --json delays.json         # latency of two processes against link delay
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist

import pycodesign
from pycodesign.bench.harness import SCHEMA, format_result, gather_facts
from pycodesign.branches import Executor, Graph, Placement, Space, build_inception, build_parnet, predict, profile
from pycodesign.branches.exact import solve
from pycodesign.branches.listing import place_by_rank
from pycodesign.branches.reinforce import place_by_policy
from pycodesign.branches.simulate import Problem, make_problem, simulate

NATIVE = ("conv3x3:ternary", "conv1x1:ternary", "separable:ternary", "skip", "pool")
SPACE = {"operators": NATIVE, "gates": ("none", "add", "concatenate")}


def write(path: Path | None, suite: str, **rows: Any) -> None:
    text = format_result({"schema": SCHEMA, "suite": suite, "facts": gather_facts(), **rows})
    if path is None:
        click.echo(text)
    else:
        path.write_text(text)


@click.group(context_settings={"show_default": True})
def main() -> None:
    torch.set_num_threads(1)
    pycodesign.set_num_threads(1)


def draw_place(graph: Graph, rng: random.Random, workers: int) -> Placement:
    """Half of the plans keep a branch on a team, a quarter throw dice for every body, a quarter use one team."""
    kind = rng.choice(["branch", "branch", "dice", "one"])
    if kind == "one" or workers == 1:
        return Placement.sequential(graph)
    teams: list[list[str]] = [[] for _ in range(workers)]
    for name, body in graph.bodies.items():
        team = max(body.branch, 0) % workers if kind == "branch" else rng.randrange(workers)
        teams[team].append(name)
    return Placement(tuple(map(tuple, teams)))


@main.command("predict")
@click.option("--plans", default=120)
@click.option("--width", default=16)
@click.option("--rounds", default=21)
@click.option("--workers", default=2)
@click.option("--json", "path", type=click.Path(path_type=Path))
def predict_plans(plans: int, width: int, rounds: int, workers: int, path: Path | None) -> None:
    """Profile two spaces, and time random plans of random networks of both, all in turns."""
    rng, rows, tables = random.Random(0), [], {}
    runs: list[tuple[dict[str, Any], Executor, torch.Tensor, list[float]]] = []
    for branches in (2, 3):
        space = Space(branches=branches, width=width, **SPACE)
        tables[branches] = table = profile(space, workers, rounds=rounds)
        for _ in range(plans // 2):
            graph = space.build(space.sample(rng)).to_graph(native=True)
            place = draw_place(graph, rng, workers)
            row = {"branches": branches, "teams": len(place.teams), "predicted_us": 1e6 * predict(graph, place, table)}
            runs.append((row, Executor(graph, place), torch.rand(space.input_shape()), []))
    for _ in range(rounds):
        for _, run, x, seconds in runs:
            run(x)
            begin = time.perf_counter()
            for _ in range(5):
                run(x)
            seconds.append((time.perf_counter() - begin) / 5)
    for row, _, _, seconds in runs:
        row["measured_us"] = 1e6 * statistics.median(seconds)
        row["error"] = row["predicted_us"] / row["measured_us"] - 1
        rows.append({name: round(value, 4) for name, value in row.items()})
    predicted, measured = (np.array([row[name] for row in rows]) for name in ("predicted_us", "measured_us"))
    ranks = [np.argsort(np.argsort(values)) for values in (predicted, measured)]
    errors = np.abs(predicted / measured - 1)
    summary = {
        "plans": len(rows),
        "mean_error": round(float(errors.mean()), 4),
        "median_error": round(float(np.median(errors)), 4),
        "largest_error": round(float(errors.max()), 4),
        "rank_correlation": round(float(np.corrcoef(*ranks)[0, 1]), 4),
        "sync_us": round(1e6 * tables[2].sync, 4),
        "run_us": {name: round(1e6 * value, 3) for name, value in tables[2].run.items()},
    }
    click.echo(summary)
    write(path, "branches-predicted", summary=summary, plans=rows)


def draw_fork(rng: random.Random, branches: int, devices: int, segments: int) -> Problem:
    """A stem, branches of unlike segments, three in ten pairs of which exchange what they have, and a head."""
    names, costs, before, previous = ["stem"], [(30e-6,) * devices], [()], [0] * branches
    for segment in range(segments):
        current = []
        for branch in range(branches):
            reads = {previous[branch]: rng.uniform(1e-6, 4e-6)}
            for other in range(branches):
                if segment and other != branch and rng.random() < 0.3:
                    reads[previous[other]] = rng.uniform(1e-6, 4e-6)
            before.append(tuple(reads.items()))
            costs.append((rng.uniform(20e-6, 200e-6),) * devices)
            names.append(f"{segment}.{branch}")
            current.append(len(names) - 1)
        previous = current
    head = tuple((body, 2e-6) for body in previous)
    return Problem((*names, "head"), (*costs, (10e-6,) * devices), (*before, head))


@main.command("place")
@click.option("--limit", default=5.0, help="Seconds of the exact search.")
@click.option("--graphs", default=3, help="Random ones of each size.")
@click.option("--json", "path", type=click.Path(path_type=Path))
def place_graphs(limit: float, graphs: int, path: Path | None) -> None:
    """Compare methods of placement on random forks and on networks of a profiled space."""
    problems: list[tuple[str, Problem]] = []
    for branches, devices, segments in [(4, 2, 1), (8, 2, 1), (8, 4, 1), (4, 2, 4), (4, 4, 4), (8, 4, 4)]:
        for seed in range(graphs):
            name = f"{branches} branches, {segments} segments, {devices} devices"
            problems.append((name, draw_fork(random.Random(seed), branches, devices, segments)))
    space = Space(branches=4, **SPACE)
    table = profile(space, 2, rounds=9)
    for seed in range(graphs):
        graph = space.build(space.sample(seed)).to_graph(native=True)
        problems.append(("4 branches of a space, 2 cores", make_problem(graph, table).slowed()))
    rows = []
    for name, problem in problems:
        begin = time.process_time()
        solution = solve(problem, limit=limit)
        row = {"graph": name, "bodies": len(problem.names), "proved": solution.bound == solution.latency}
        row |= {"exact_us": 1e6 * solution.latency, "exact_seconds": time.process_time() - begin}
        row["bound_gap"] = solution.latency / solution.bound - 1
        for method, solve_it in (("list", place_by_rank), ("reinforce", place_by_policy)):
            begin = time.process_time()
            latency = simulate(problem, solve_it(problem))
            row |= {f"{method}_seconds": time.process_time() - begin, f"{method}_gap": latency / solution.latency - 1}
        row["sequential_gap"] = sum(cost[0] for cost in problem.costs) / solution.latency - 1
        rows.append({key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()})
        click.echo(rows[-1])
    write(path, "branches-placed", rows=rows)


DELAYS_MS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)


def run_rank(rank: int, store: str, rounds: int, queue: Any) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=wait)
    rows = []
    for name, build in (("parnet", build_parnet), ("inception", build_inception)):
        net = build()
        graph, x = net.to_graph(), torch.rand(net.shape, generator=torch.Generator().manual_seed(0))
        expected = graph(x)[0]
        heavy = ("1", "2") if name == "inception" else ("1",)
        away = [b for b in graph.bodies if b.rsplit(".", 1)[-1] in heavy and graph.bodies[b].branch >= 0]
        away = away if name == "parnet" else [b for b in away if b.endswith(".1")]
        place = Placement((tuple(b for b in graph.bodies if b not in away), tuple(away)))
        alone = Placement.sequential(graph)
        here = Executor(graph, alone)
        for recompute in ("never", "always"):
            for delay in DELAYS_MS:
                run = Executor(graph, place, backend="distributed", recompute=recompute, link_delay=delay / 1e3)
                seconds = []
                for _ in range(rounds):
                    dist.barrier()
                    begin = time.perf_counter()
                    found = run(x)[0]
                    seconds.append(time.perf_counter() - begin)
                    assert torch.equal(found, expected)
                rows.append({"net": name, "stem": recompute, "delay_ms": delay, "messages": len(run._run.messages),
                             "ms": round(1e3 * statistics.median(seconds), 3)})  # fmt: skip
        if rank == 0:
            seconds = []
            for _ in range(rounds):
                begin = time.perf_counter()
                here(x)
                seconds.append(time.perf_counter() - begin)
            rows.append({"net": name, "stem": "one process", "delay_ms": 0.0, "messages": 0,
                         "ms": round(1e3 * statistics.median(seconds), 3)})  # fmt: skip
        dist.barrier()
    if rank == 0:
        queue.put(rows)
    dist.destroy_process_group()


@main.command("delay")
@click.option("--rounds", default=31)
@click.option("--json", "path", type=click.Path(path_type=Path))
def delay_links(rounds: int, path: Path | None) -> None:
    """Time two processes whose messages are held back."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        processes = [context.Process(target=run_rank, args=(rank, store, rounds, queue)) for rank in range(2)]
        for process in processes:
            process.start()
        rows = queue.get(timeout=300)
        for process in processes:
            process.join()
    for row in rows:
        click.echo(row)
    write(path, "branches-link-delay", rows=rows)


if __name__ == "__main__":
    main()
