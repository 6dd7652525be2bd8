"""Draw a result: how many times as fast as the best other engine, for each weights, or for each layer.

    python bench/plot.py bench/results/RESULT.json ratios.svg
    python bench/plot.py bench/results/RESULT.json layers.png --weights ternary

Of whole networks, which `bench_models.py` times, each with each weights.

Cold timings; one panel for each precision, a color for each number of threads, a line at 1. Needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pycodesign.bench.harness import read_result
from pycodesign.bench.suites import COMPARABLE

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44")  # of Paul Tol's "bright" scheme: distinct to the color-blind too
WEIGHTS = {"uniform2": "4 levels", "uniform3": "8 levels", "uniform4": "16 levels"}
DTYPES = {
    "float32": "float32, against the best float32",
    "uint8": "uint8, against the best int8",
    "uint4": "uint8 below 16, against the best int8",
}


def collect_ratios(result: dict[str, Any], weights: str | None, algorithm: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Find the ratios to draw, of the smallest batch.

    Parameters
    ----------
    result : dict
        Of `pycodesign.bench.run_suite` or `run_models`.
    weights : str, optional
        Draw the layers with these weights; by default the weighted mean for each weights, or every network.
    algorithm : str
        Of ours.

    Returns
    -------
    dict of str to dict of int to dict of str to float
        By dtype, threads, and the bar's label.
    """
    ratios: dict[str, dict[int, dict[str, Any]]] = {}
    batch = min(result["options"]["batches"])
    networks = result["suite"] == "models"
    for entry in result["rows"] if weights or networks else result["summary"]:
        wanted = ("cold", batch, algorithm, weights or entry["weights"])
        if tuple(entry.get(k) for k in ("state", "batch", "algorithm", "weights")) == wanted and entry["speedup"]:
            kind = WEIGHTS.get(entry["weights"], entry["weights"])
            label = entry["layer"] if weights else f"{entry['layer']}, {kind}" if networks else kind
            ratios.setdefault(entry["dtype"], {}).setdefault(entry["threads"], {})[label] = entry["speedup"]
    return ratios


def draw_bars(axes: Axes, series: dict[int, dict[str, float]], labels: list[str]) -> None:
    """Draw one panel: groups of bars by label, a bar for each number of threads."""
    positions, width = np.arange(len(labels)), 0.8 / len(series)
    for index, (threads, bars) in enumerate(series.items()):
        shifted = positions + (index - (len(series) - 1) / 2) * width
        drawn = axes.barh(
            shifted,
            [bars.get(label, np.nan) for label in labels],
            0.9 * width,
            color=COLORS[index % len(COLORS)],
            label=f"{threads} thread{'s'[: threads > 1]}",
        )
        axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8, bbox={"color": "white", "pad": 0})
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(positions, labels)
    axes.yaxis.set_inverted(True)
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def draw_result(result: dict[str, Any], weights: str | None, algorithm: str) -> Figure:
    """Draw the ratios of a result.

    Raises
    ------
    ValueError
        If it holds none.
    """
    ratios = collect_ratios(result, weights, algorithm)
    if not ratios:
        wanted = f"with {weights} weights " if weights else ""
        raise ValueError(f"result: expected cold timings of {algorithm} {wanted}beside other engines, got none")
    labels = list(dict.fromkeys(label for series in ratios.values() for bars in series.values() for label in bars))
    figure = Figure(figsize=(max(3.4 * len(ratios) + 1, 7), 1.3 + 0.5 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(ratios), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (dtype, series) in zip(panels, ratios.items(), strict=True):
        draw_bars(axes, series, labels)
        axes.set_title(DTYPES[dtype], fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower right", ncols=4, frameon=False)
    mean = "whole networks" if result["suite"] == "models" else "mean without the stem, weighted by time"
    what = WEIGHTS.get(weights, weights) if weights else mean
    held = ", every engine held to it" if result["options"]["isa"] else ""
    facts = result["facts"]
    figure.suptitle(
        f"{result['suite']}, {what}: times as fast as the best other engine\n"
        f"batch {min(result['options']['batches'])}, caches cold; {facts['cpu']}, {facts['pycodesign']['isa']}{held}",
        fontsize=10,
    )
    return figure


@click.command()
@click.argument("result", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--weights", help="Draw each layer with these weights instead of the mean for each weights.")
@click.option("--algorithm", default="auto", show_default=True, help="Of ours.")
def main(result: Path, output: Path, weights: str | None, algorithm: str) -> None:
    """Draw the result file RESULT as OUTPUT: svg, png or pdf."""
    try:
        draw_result(read_result(result, COMPARABLE), weights, algorithm).savefig(output, dpi=150)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
