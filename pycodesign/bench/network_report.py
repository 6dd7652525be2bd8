"""What the timings of `run_models` say: means over the networks, memory; their tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pycodesign.bench.contenders import OURS, PRECISIONS

SETTING = ("weights", "dtype", "batch", "threads", "state")  # what the networks of one mean share

Row = dict[str, Any]
Cells = list[list[str]]


def summarize(rows: Iterable[Row]) -> list[Row]:
    """Geometric mean over the networks of our ratio to every other contender, and to the best of the same precision.

    Returns
    -------
    list of dict
        What the networks share; ``networks``, how many; ``best`` and, by contender, ``speedups``.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["engine"] == OURS and row["speedup"]:
            groups.setdefault(tuple(row[k] for k in SETTING), []).append(row)
    summary = []
    for key, members in groups.items():
        shared = set.intersection(*(set(row["speedups"]) for row in members))
        names = [name for name in members[0]["speedups"] if name in shared]
        summary.append(
            dict(zip(SETTING, key, strict=True))
            | {
                "networks": len(members),
                "best": _mean(row["speedup"] for row in members),
                "speedups": {name: _mean(row["speedups"][name] for row in members) for name in names},
            }
        )
    return summary


def compare_memory(rows: Iterable[Row]) -> list[Row]:
    """Bytes of all weights of ours and of the same network in an int8 engine, once for each network.

    Returns
    -------
    list of dict
        ``bytes``, of packed weights and of the float weights of layers that stay torch's; ``code_bytes``, of machine
        code, which holds weights too; ``int8_bytes``; ``packed_ratio`` without, ``ratio`` with the machine code.
    """
    found = {
        (row["layer"], row["weights"], row["dtype"]): row
        for row in rows
        if row["engine"] == OURS and "bytes" in row["details"]
    }
    memory = []
    for key, row in found.items():
        sizes = {"bytes": row["details"]["bytes"], "code_bytes": row["details"]["code_bytes"]}
        ratios = {"packed_ratio": sizes["bytes"], "ratio": sum(sizes.values())}
        entry = dict(zip(("layer", "weights", "dtype"), key, strict=True)) | sizes | {"int8_bytes": row["int8_bytes"]}
        memory.append(entry | {name: round(size / row["int8_bytes"], 4) for name, size in ratios.items()})
    return memory


def print_models(result: Row, console: Console | None = None) -> None:
    """Print the cold timings of a result of `run_models`, and what they say.

    Parameters
    ----------
    result : dict
    console : rich.console.Console, optional
        Standard output by default.
    """
    console = console or Console()
    facts, options = result["facts"], result["options"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    unit = "" if options["clock"] == "wall" else " of processor time"
    console.print(f"{facts['cpu']}, {facts['cores']} cores, {' '.join(facts['flags'])}; {versions}")
    console.print(f"milliseconds{unit} for one batch; ours also: times as fast as the best other contender\n")

    def show(title: str, headings: Sequence[str], cells: Cells) -> None:
        if not cells:
            return
        table = Table(*headings, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for row in cells:
            table.add_row(*row)
        console.print(f"models: {title}, {facts['pycodesign']['isa']}", style="italic")
        console.print(table)

    for batch, threads, dtype in product(options["batches"], options["threads"], options["dtypes"]):
        setting = {"batch": batch, "threads": threads, "dtype": dtype, "state": "cold"}
        rows = _select(result["rows"], setting)
        engines = list(dict.fromkeys(row["engine"] for row in rows))
        title = f"{dtype}, batch {batch}, {threads} thread{'s'[: threads > 1]}, cold"
        show(title, ("network", "weights", *engines), _timing_cells(rows, engines))
    engines = list(dict.fromkeys(row["engine"] for row in result["rows"] if row["engine"] != OURS))
    title = "times as fast as others of the same precision, geometric mean of the networks"
    show(title, (*SETTING, "networks", "the best", *engines), _summary_cells(result["summary"], engines))
    first = {"batch": options["batches"][0], "threads": options["threads"][0], "state": "cold"}
    accuracy = "relative error of the logits, and predictions that agree with the float64 model"
    rows = _select(result["rows"], first)
    show(accuracy, ("network", "weights", "contender", "error", "agree"), _error_cells(rows, options["weights"][0]))
    sizes = ("bytes", "code_bytes", "int8_bytes")
    memory = [
        [
            *(entry[k] for k in ("layer", "weights", "dtype")),
            *(f"{entry[k] / 1000:.0f}" for k in sizes),
            *(f"{entry[k]:.2f}" for k in ("packed_ratio", "ratio")),
        ]
        for entry in result["memory"]
    ]
    headings = ("network", "weights", "dtype", "packed kB", "machine code kB", "int8 kB", "packed / int8", "all / int8")
    show("weights in memory", headings, memory)
    places = ("layer", "weights", "dtype", "environment")
    starts = [
        [*(entry[k] for k in places), *(f"{value:.2f}" for value in entry["seconds"].values())]
        for entry in result["cold_start"]
    ]
    stages = list(result["cold_start"][0]["seconds"]) if starts else []
    show("seconds from the start of a process to the first result", ("network", *places[1:], *stages), starts)
    call = {mode: f"{microseconds:.2f}" for mode, microseconds in result["operator_call"].items()}
    if call:
        show("microseconds of a call of torch.ops.pycodesign.conv2d on one pixel", tuple(call), [list(call.values())])
    for entry in result["left_out"]:
        place = ", ".join(str(entry[k]) for k in ("layer", "batch", "threads", *places[1:]) if k in entry)
        text = f"{entry['contender']}{': ' + place if place else ''}: {entry['reason']}"
        console.print(text, style="yellow", markup=False)


def _timing_cells(rows: Sequence[Row], engines: Sequence[str]) -> Cells:
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["layer"], row["weights"]), {})[row["engine"]] = row
    return [[*key, *(_cell(members.get(engine)) for engine in engines)] for key, members in found.items()]


def _summary_cells(summary: Sequence[Row], engines: Sequence[str]) -> Cells:
    cells = []
    for entry in summary:
        ratios = [entry["speedups"].get(f"{engine} {PRECISIONS[entry['dtype']]}") for engine in engines]
        setting = (str(entry[k]) for k in (*SETTING, "networks"))
        cells.append([*setting, *("-" if ratio is None else _speedup(ratio) for ratio in (entry["best"], *ratios))])
    return cells


def _error_cells(rows: Sequence[Row], first: str) -> Cells:
    """Cells of every contender; the other engines ran the first weights only."""
    return [
        [
            *(row[k] for k in ("layer", "weights", "contender")),
            f"{row['details']['error']:.1e}",
            f"{row['details']['agree']:.0%}",
        ]
        for row in rows
        if row["engine"] == OURS or row["weights"] == first
    ]


def _select(rows: Iterable[Row], wanted: Row) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    ms = f"{row['ms']['median']:.3f}"
    return f"{ms} {_speedup(row['speedup'])}" if row["engine"] == OURS and row["speedup"] else ms


def _speedup(value: float) -> str:
    return f"[{'green' if value >= 1 else 'red'}]{value:.2f}x[/]"


def _mean(ratios: Iterable[float]) -> float:
    """Geometric mean."""
    values = [math.log(ratio) for ratio in ratios]
    return round(math.exp(sum(values) / len(values)), 4)
