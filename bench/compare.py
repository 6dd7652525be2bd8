"""Compare two result files: how many times as fast the second is, timing by timing.

    python bench/compare.py bench/results/OLD.json bench/results/NEW.json --contender pycodesign

Files of two runs compare two states of one machine only if it was equally busy; the ratios of the contenders that did
not change tell.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from pycodesign.bench.harness import read_result
from pycodesign.bench.suites import COMPARABLE

KEYS = ("layer", "weights", "batch", "threads", "state", "contender")


def compare(old: dict[str, Any], new: dict[str, Any], contender: str = "") -> list[dict[str, Any]]:
    """Match the timings of two results.

    Parameters
    ----------
    old, new : dict
        Of `pycodesign.bench.run_suite`.
    contender : str
        Only contenders whose names contain this.

    Returns
    -------
    list of dict
        What identifies the timing, ``old`` and ``new`` in milliseconds, ``ratio`` (above one: the new one is faster),
        and ``noise``, the relative interquartile range of the noisier of the two.
    """
    before = {tuple(row[k] for k in KEYS): row["ms"] for row in old["rows"]}
    return [
        {
            **dict(zip(KEYS, key, strict=True)),
            "old": before[key]["median"],
            "new": row["ms"]["median"],
            "ratio": before[key]["median"] / row["ms"]["median"],
            "noise": max(ms["iqr"] / ms["median"] for ms in (before[key], row["ms"])),
        }
        for row in new["rows"]
        if (key := tuple(row[k] for k in KEYS)) in before and contender in row["contender"]
    ]


def print_comparison(matches: list[dict[str, Any]], console: Console) -> None:
    """Print one line for each timing and the geometric mean for each contender; dim where noise explains it."""
    table = Table(*KEYS, "old ms", "new ms", "ratio", "noise")
    for match in matches:
        explained = abs(match["ratio"] - 1) <= match["noise"]
        style = "dim" if explained else "green" if match["ratio"] > 1 else "red"
        numbers = (f"{match['old']:.3f}", f"{match['new']:.3f}", f"{match['ratio']:.2f}", f"{match['noise']:.0%}")
        table.add_row(*(str(match[k]) for k in KEYS), *numbers, style=style)
    console.print(table)
    for name in dict.fromkeys(match["contender"] for match in matches):
        logs = [math.log(match["ratio"]) for match in matches if match["contender"] == name]
        console.print(f"{name}: {math.exp(sum(logs) / len(logs)):.3f} over {len(logs)} timings (geometric mean)")


@click.command()
@click.argument("old", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--contender", default="", help="Only contenders whose names contain this.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(old: Path, new: Path, contender: str, as_json: bool) -> None:
    """Compare the result files OLD and NEW."""
    try:
        results = read_result(old, COMPARABLE), read_result(new, COMPARABLE)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    clocks = [result["options"]["clock"] for result in results]
    if clocks[0] != clocks[1]:
        raise click.ClickException(f"expected timings by one clock, got {clocks[0]} and {clocks[1]}")
    matches = compare(*results, contender)
    if not matches:
        raise click.ClickException("no timing is in both files")
    if as_json:
        json.dump(matches, sys.stdout, indent=1)
        return
    console = Console()
    for key in ("cpu", "commit", "date"):
        console.print(f"{key}: {results[0]['facts'][key]} -> {results[1]['facts'][key]}")
    print_comparison(matches, console)


if __name__ == "__main__":
    main()
