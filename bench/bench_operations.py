"""Count what each method of `pycodesign.repetition.factor` leaves to do, beside the published counts.

The published grid of Q-gym (n x n matrices, Q levels, uniformly random), 3x3 layers, the networks that ship with the
package, and adder graphs by da4ml (pip install da4ml) where they take seconds. Every program is validated. Seconds are
processor time of one thread. Multiplications by powers of two count as any others, as in the published counts.

python bench/bench_operations.py
python bench/bench_operations.py --quick --json operations.json
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pycodesign import QuantizedTensor
from pycodesign.bench import harness
from pycodesign.demo import NETWORKS, load_network
from pycodesign.repetition import factor

RESULTS = Path(__file__).parent / "results" / "operations.json"

# Fractions removed by Q-gym, read off its Figure 5 (PACT 2022), within 0.02; by n, for each of LEVELS.
LEVELS = {2: [-1, 1], 3: [-1, 0, 1], 5: range(-2, 3), 7: range(-3, 4), 12: range(-6, 6)}
PUBLISHED = {
    32: (0.764, 0.695, 0.549, 0.484, 0.385),
    64: (0.825, 0.763, 0.626, 0.551, 0.470),
    128: (0.831, 0.784, 0.668, 0.600, 0.542),
    256: (0.844, 0.801, 0.701, 0.657, 0.588),
    512: (0.861, 0.814, 0.746, 0.703, 0.629),
    768: (0.872, 0.820, 0.758, 0.722, 0.652),
}
PUBLISHED_SECONDS = {128: 1200, 512: 4900}  # about, of Q-gym
OTHER_METHODS = ("summerge", "patterns", "unique")
OTHERS_UP_TO = 64  # n; summerge and da4ml take minutes beyond 128
CHANNELS = (64, 128, 256, 512)
ADDER_GRAPHS = ("da4ml",) if harness.package_version("da4ml") else ()
ADDER_SHAPES = ((16, 16), (32, 32), (64, 64), (72, 128))  # outputs, inputs
SATURATION = {"rounds": 2, "node_limit": 500, "time_limit": 20.0}


def draw(shape: tuple[int, ...], levels: Any, seed: int) -> QuantizedTensor:
    levels = np.asarray(levels, np.float32)
    codes = np.random.default_rng(seed).integers(0, len(levels), shape).astype(np.uint8)
    return QuantizedTensor(codes, levels, np.ones(len(codes), np.float32))


def clock(q: QuantizedTensor, method: str = "pair", **options: Any) -> dict[str, Any]:
    """Factor, validate, count."""
    start = time.process_time()
    program = factor(q, method, **options)
    seconds = time.process_time() - start
    program.validate()
    counts = {"adds": program.adds, "multiplies": program.multiplies, "dense_ops": program.dense_ops}
    return counts | {"removed": program.removed, "seconds": seconds}


def mean(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"runs": len(runs)} | {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}


def measure_grid(sizes: list[int], seeds: int, advance: Callable[[], object]) -> Iterator[dict[str, Any]]:
    """The published grid: means over seeds."""
    for n in sizes:
        for (count, levels), published in zip(LEVELS.items(), PUBLISHED[n], strict=True):
            methods = ("pair", *OTHER_METHODS, *ADDER_GRAPHS) if n <= OTHERS_UP_TO else ("pair",)
            for method in methods:
                solve = solve_da4ml if method == "da4ml" else partial(clock, method=method)
                runs = [solve(draw((n, n), levels, seed)) for seed in range(seeds)]
                where = {"n": n, "levels": count, "method": method}
                yield where | mean(runs) | {"published": published, "published_seconds": PUBLISHED_SECONDS.get(n)}
            advance()


def measure_layers(channels: list[int], advance: Callable[[], object]) -> Iterator[dict[str, Any]]:
    """Square 3x3 layers of random weights."""
    for n in channels:
        for name, levels in (("binary", [-1, 1]), ("ternary", [-1, 0, 1])):
            q = draw((n, n, 3, 3), levels, 0)
            yield {"layer": f"3x3 {n}-{n}", "weights": name, "method": "pair"} | clock(q)
            advance()


def measure_networks(advance: Callable[[], object]) -> Iterator[dict[str, Any]]:
    """The trained networks in the package."""
    for network in NETWORKS:
        for layer in load_network(network)[0]:
            q = layer.weights
            for method in ("pair", *OTHER_METHODS):
                if method == "summerge" and q.codes.size > 1 << 14:
                    continue
                where = {"network": network, "layer": layer.name, "shape": list(q.shape), "method": method}
                yield where | clock(q, method)
        advance()


def measure_adders(seeds: int, advance: Callable[[], object]) -> Iterator[dict[str, Any]]:
    """Random ternary matrices beside da4ml; only at 16 x 16 are there so many seeds, and `saturate`."""
    for shape in ADDER_SHAPES:
        contenders: dict[str, Callable[[QuantizedTensor], dict[str, Any]]] = {"pair": clock}
        contenders |= dict.fromkeys(ADDER_GRAPHS, solve_da4ml)
        if shape == ADDER_SHAPES[0]:
            contenders["saturate"] = partial(clock, method="saturate", **SATURATION)
        count = seeds if shape == ADDER_SHAPES[0] else min(seeds, 5)
        for name, solve in contenders.items():
            runs = [solve(draw(shape, LEVELS[3], seed)) for seed in range(count)]
            yield {"outputs": shape[0], "inputs": shape[1], "method": name} | mean(runs)
        advance()


def solve_da4ml(q: QuantizedTensor) -> dict[str, Any]:
    """Count the graph of da4ml as ours are: adders and subtractors, and each value that is shifted as a product.

    It negates for nothing, as hardware does.
    """
    from da4ml.cmvm import solve

    weights = q.decode()
    start = time.process_time()
    graph = solve(np.ascontiguousarray(weights.T.astype(np.float32)))
    seconds = time.process_time() - start
    assert (graph.kernel == weights.T).all()
    adds = multiplies = 0
    for stage in graph.solutions:
        sums = [operation for operation in stage.ops if operation.opcode in (0, 1)]
        adds += len(sums)
        multiplies += len({(operation.id1, operation.data) for operation in sums if operation.data})
        multiplies += np.count_nonzero(stage.out_shifts)
    counts = {"adds": adds, "multiplies": multiplies, "dense_ops": weights.shape[0] * (2 * weights.shape[1] - 1)}
    return counts | {"removed": 1 - (adds + multiplies) / counts["dense_ops"], "seconds": seconds}


def print_rows(title: str, rows: list[dict[str, Any]], columns: list[str], console: Console) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(show(row.get(column)) for column in columns))
    console.print(table)


def show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


@click.command()
@click.option("--quick", is_flag=True, help="Small sizes, one seed: seconds instead of half an hour.")
@click.option("--json", "file", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS, show_default=True)
def main(quick: bool, file: Path) -> None:
    """Count operations and print tables; write them with the machine's facts."""
    warnings.filterwarnings("ignore", "saturate", RuntimeWarning)  # a time limit is part of the result's options
    sizes = [n for n in PUBLISHED if n <= 64 or not quick]
    channels = [n for n in CHANNELS if n <= 64 or not quick]
    console = Console(width=None if Console().is_terminal else 140)
    total = len(sizes) * len(LEVELS) + 2 * len(channels) + len(NETWORKS) + len(ADDER_SHAPES)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("factoring", total=total)

        def advance() -> None:
            progress.advance(task)

        result = {
            "schema": harness.SCHEMA,
            "suite": "operations",
            "facts": harness.gather_facts() | {"da4ml": harness.package_version("da4ml")},
            "options": {"quick": quick, "saturation": SATURATION, "clock": "process time, one thread"},
            "grid": list(measure_grid(sizes, 1 if quick else 5, advance)),
            "layers": list(measure_layers(channels, advance)),
            "networks": list(measure_networks(advance)),
            "adders": list(measure_adders(2 if quick else 100, advance)),
        }
    counts = ["method", "adds", "multiplies", "removed"]
    print_rows("n x n, Q levels", result["grid"], ["n", "levels", *counts, "published", "seconds"], console)
    print_rows("3x3 layers", result["layers"], ["layer", "weights", *counts, "seconds"], console)
    print_rows("Trained networks", result["networks"], ["network", "layer", *counts, "seconds"], console)
    print_rows("Random ternary", result["adders"], ["outputs", "inputs", "runs", *counts, "seconds"], console)
    if not ADDER_GRAPHS:
        click.echo("da4ml is left out: it is not installed, pip install da4ml")
    file.write_text(harness.format_result(result))
    click.echo(f"wrote {file}")


if __name__ == "__main__":
    main()
