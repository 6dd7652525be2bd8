"""Check, then time `ops.expand` beside torch and NumPy, every contender writing into arrays that exist.

Two maps of rows and columns, with a factor for each column, as growth needs it: an arbitrary one (every old index, then
random ones, shuffled) and the tiling that a broadcast multiplication can write. The floor is what must be read and
written at least, over the bandwidth at which torch copies 256 MB, which reads twice and writes once. Prints a table and
exits with 1 if a contender computed something else; writes nothing unless ``--json`` is given.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import pycodesign
from pycodesign import ops
from pycodesign.bench import harness

SHAPES = ((3072, 768), (4096, 1024))
DTYPES = ("float32", "bfloat16", "float16", "float64")
TARGETS = {"arbitrary": 3.0, "tiling": 1 / 1.1}  # the fastest other's time over ours, float32


@dataclass(frozen=True, eq=False)
class Way:
    """One way to compute an expansion."""

    name: str
    run: Callable[[], object]


def make_maps(old: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Return maps from 2 * old indices to old ones."""
    arbitrary = rng.permutation(np.concatenate([np.arange(old), rng.integers(0, old, old)]))
    return {"arbitrary": torch.from_numpy(arbitrary), "tiling": torch.arange(2 * old) % old}


def make_ways(
    w: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, kind: str
) -> list[Way]:
    """Return every way to write w[rows][:, columns] * scale into `out`, ours first."""
    old, new = w.shape, out.shape
    near = scale.to(w.dtype)  # torch multiplies 16-bit floats by 16-bit floats
    temporary = torch.empty(old[0], new[1], dtype=w.dtype)
    wide = columns.expand(old[0], new[1])

    def select() -> None:
        torch.index_select(w, 1, columns, out=temporary)
        torch.index_select(temporary.mul_(near), 0, rows, out=out)

    def gather() -> None:
        torch.gather(w, 1, wide, out=temporary)
        torch.index_select(temporary.mul_(near), 0, rows, out=out)

    ways = [
        Way("pycodesign", lambda: ops.expand(w, rows, columns, in_scale=scale, out=out)),
        Way("torch indexing", lambda: torch.mul(w[rows[:, None], columns], near, out=out)),
        Way("torch index_select", select),
        Way("torch gather, index_select", gather),
    ]
    if w.dtype != torch.bfloat16:
        arrays = (t.numpy() for t in (w, rows, columns, near, temporary, out))
        w_array, rows_array, columns_array, scale_array, temporary_array, out_array = arrays

        def take() -> None:
            np.take(w_array, columns_array, 1, out=temporary_array, mode="clip")
            np.multiply(temporary_array, scale_array, out=temporary_array)
            np.take(temporary_array, rows_array, 0, out=out_array, mode="clip")

        ways.append(Way("NumPy take", take))
    if kind == "tiling":
        tiles = out.view(new[0] // old[0], old[0], new[1] // old[1], old[1])
        repeated = w[None, :, None, :].expand(len(tiles), -1, -1, -1)
        factors = near.view(1, 1, tiles.shape[2], tiles.shape[3])
        ways.append(Way("torch broadcast mul", lambda: torch.mul(repeated, factors, out=tiles)))
    return ways


def check(ways: list[Way], expected: torch.Tensor, out: torch.Tensor) -> None:
    tolerance = 0.0 if out.dtype in (torch.float32, torch.float64) else 2 * torch.finfo(out.dtype).eps
    for way in ways:
        out.zero_()
        way.run()
        if not torch.allclose(out.double(), expected, rtol=tolerance, atol=tolerance * 2**-12):
            raise harness.CheckError(f"{way.name}: expected the definition's values, got others")


def measure_bandwidth() -> float:
    """Bytes a second."""
    source, copy = torch.ones(64 << 20), torch.empty(64 << 20)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        copy.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 3 * source.nbytes / min(seconds)


def run(threads: int, rounds: int, dtypes: tuple[str, ...]) -> dict[str, Any]:
    torch.set_num_threads(threads)
    pycodesign.set_num_threads(threads)
    rng = np.random.default_rng(0)
    facts = harness.gather_facts()
    bandwidth = measure_bandwidth()
    rows = []
    cases = [(shape, dtype, kind) for dtype in dtypes for shape in SHAPES for kind in TARGETS]
    for (outputs, inputs), dtype, kind in track(cases, "timing", console=Console(stderr=True), transient=True):
        w = torch.from_numpy(rng.standard_normal((outputs, inputs))).to(getattr(torch, dtype))
        row_map, column_map = make_maps(outputs, rng)[kind], make_maps(inputs, rng)[kind]
        scale = torch.from_numpy(rng.random(2 * inputs)).to(torch.float64 if dtype == "float64" else torch.float32)
        out = torch.empty(2 * outputs, 2 * inputs, dtype=w.dtype)
        ways = make_ways(w, row_map, column_map, scale, out, kind)
        expected = (w.to(scale.dtype)[row_map][:, column_map] * scale).double()
        check(ways, expected, out)
        floor = (w.nbytes + out.nbytes) / bandwidth
        spreads = harness.measure_hot(ways, rounds)
        others = [spread for way, spread in spreads.items() if way is not ways[0]]
        for way, spread in spreads.items():
            rows.append(
                {"from": [outputs, inputs], "to": list(out.shape), "dtype": dtype, "map": kind, "way": way.name}
                | harness.spread_ms(spread, 1)
                | {"floor_ms": round(1e3 * floor, 3)}
            )
        rows[-len(spreads)] |= {
            "speedup": round(min(o.median for o in others) / spreads[ways[0]].median, 3),
            "speedup_of_minima": round(min(o.minimum for o in others) / spreads[ways[0]].minimum, 3),
        }
    options = {"threads": threads, "rounds": rounds, "dtypes": list(dtypes)}
    return {
        "schema": harness.SCHEMA,
        "suite": "growth-expand",
        "options": options,
        "facts": facts,
        "bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "rows": rows,
    }


def print_result(result: dict[str, Any]) -> None:
    table = Table("shape", "dtype", "map", "way", "median ms", "min ms", "floor ms", "ratio", "of minima")
    for row in result["rows"]:
        shape = f"{row['from'][0]}x{row['from'][1]} -> {row['to'][0]}x{row['to'][1]}"
        ratios = [f"{row[key]:.2f}" if key in row else "" for key in ("speedup", "speedup_of_minima")]
        times = (f"{row[key]:.2f}" for key in ("median", "minimum", "floor_ms"))
        table.add_row(shape, row["dtype"], row["map"], row["way"], *times, *ratios)
    Console(width=140).print(table)
    targets = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in TARGETS.items())
    print(f"ratio: the fastest other's time over ours; wanted for float32 with two threads: {targets}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="several times for several; all by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    arguments = parser.parse_args()
    result = run(arguments.threads, arguments.rounds, tuple(arguments.dtype or DTYPES))
    print_result(result)
    if arguments.json:
        arguments.json.write_text(harness.format_result(result))


if __name__ == "__main__":
    main()
