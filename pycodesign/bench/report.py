"""What the timings of `run_suite` say: ratios to the best other engine, choices of `auto`, scaling; their tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pycodesign.bench.contenders import OURS, RIVAL_DTYPES

SETTING = ("weights", "dtype", "batch", "threads", "state")  # what the layers of one mean share
BODY_KERNEL = 3  # larger filters are a network's stem: reported, but not in the mean
SCALING_MACS = 50e6  # smaller layers are too short for two threads to say anything
GOOD_CHOICE = 1.1  # times the best algorithm's time

Row = dict[str, Any]


def add_ratios(rows: Sequence[Row]) -> None:
    """Add to each row the best other contender of its precision, and to ours the ratio to every other contender."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in ("layer", "batch", "threads", "weights", "state")), []).append(row)
    for members in groups.values():
        others = {row["contender"]: row for row in members if row["engine"] != OURS}
        for row in members:
            median = row["ms"]["median"]
            rivals = [other for other in others.values() if other["dtype"] == RIVAL_DTYPES[row["dtype"]]]
            best = min(rivals, key=_median, default=None)
            row["best"] = best["contender"] if best else None
            row["speedup"] = round(best["ms"]["median"] / median, 4) if best else None
            if row["engine"] == OURS:
                row["speedups"] = {k: round(other["ms"]["median"] / median, 4) for k, other in others.items()}


def summarize(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Mean speedup of each of ours over the best other contender of the same precision, weighted by time.

    Every layer counts once, so the weighted mean is the sum of the best others' times over the sum of ours. It is
    taken over the 3x3 and 1x1 convolutions, or over the linear layers.

    Parameters
    ----------
    rows : iterable of dict
        Of `run_suite`'s result.

    Returns
    -------
    list of dict
        What the layers share; ``contender`` and ``algorithm``; ``speedup``; ``slowest``, the least speedup and the
        layer's name; how many layers it is of, ``count``, and would be ``of`` had none failed; ``stem``, the speedup of
        the layers with larger filters, None without such.
    """
    keys = (*SETTING, "contender", "algorithm")
    names: set[str] = set()
    groups: dict[tuple[Any, ...], tuple[list[Row], list[Row]]] = {}
    for row in rows:
        is_stem = row["shape"]["kernel"] > BODY_KERNEL
        if not is_stem:
            names.add(row["layer"])
        if row["engine"] == OURS and row["speedup"]:
            groups.setdefault(tuple(row[k] for k in keys), ([], []))[is_stem].append(row)
    summary = []
    for key, (body, stem) in groups.items():
        if body:
            slowest = min(body, key=lambda row: float(row["speedup"]))
            summary.append(
                dict(zip(keys, key, strict=True))
                | {
                    "speedup": _weigh(body),
                    "slowest": {"layer": slowest["layer"], "speedup": slowest["speedup"]},
                    "count": len(body),
                    "of": len(names),
                    "stem": _weigh(stem) if stem else None,
                }
            )
    return summary


def compare_choices(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Time of the algorithm that `auto` chose over that of the best, where others were timed too.

    Parameters
    ----------
    rows : iterable of dict
        Of `run_suite`'s result.

    Returns
    -------
    list of dict
        What identifies the layer; ``chosen`` and ``best`` algorithm; ``ratio``, one where these are the same.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["engine"] == OURS:
            groups.setdefault(tuple(row[k] for k in ("layer", *SETTING)), []).append(row)
    choices = []
    for key, members in groups.items():
        auto = next((row for row in members if row["algorithm"] == "auto"), None)
        if auto and len(members) > 1:
            best = min(members, key=_median)
            choices.append(
                dict(zip(("layer", *SETTING), key, strict=True))
                | {
                    "chosen": auto["details"].get("algorithm"),
                    "best": best["details"].get("algorithm"),
                    "ratio": round(_median(auto) / _median(best), 4),
                }
            )
    return choices


def thread_scaling(rows: Iterable[Row]) -> list[dict[str, Any]]:
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
    """Print the cold timings of a result of `run_suite`: milliseconds of one layer, and what they say.

    Parameters
    ----------
    result : dict
    console : rich.console.Console, optional
        Standard output by default.
    """
    console = console or Console()
    facts, options = result["facts"], result["options"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    held = f"; every contender held to {options['isa']}" if options["isa"] else ""
    unit = "" if options["clock"] == "wall" else " of processor time"
    console.print(f"{facts['cpu']}, {facts['cores']} cores, {' '.join(facts['flags'])}; {versions}{held}")
    console.print(f"milliseconds{unit} for one layer; ours also: times as fast as the best other contender")
    for batch in options["batches"]:
        for threads, dtype, weights in product(options["threads"], options["dtypes"], options["weights"]):
            _print_layers(result, dict(zip(SETTING, (weights, dtype, batch, threads, "cold"), strict=True)), console)
        _print_summary(result, batch, console)
    ours = [entry for entry in result["scaling"] if entry["contender"].startswith(OURS)]
    if ours:
        least = min(ours, key=lambda entry: float(entry["scaling"]))
        console.print(
            f"least scaling to {least['threads']} threads above {SCALING_MACS / 1e6:.0f} MMAC: {least['scaling']:.2f}, "
            f"{least['contender']}, {least['layer']}, batch {least['batch']}, {least['state']}"
        )
    places: dict[tuple[str, str], list[str]] = {}  # of one reason
    for entry in result["left_out"]:
        place = ", ".join(str(entry[k]) for k in ("layer", "batch", "threads", "weights") if k in entry)
        places.setdefault((entry["contender"], entry["reason"]), []).append(place)
    for (contender, reason), found in places.items():
        place = found[0] + (f", and {len(found) - 1} more" if len(found) > 1 else "")
        console.print(f"{contender}{': ' + place if place else ''}: {reason}", style="yellow")


def _print_layers(result: dict[str, Any], setting: dict[str, Any], console: Console) -> None:
    others = _select(result["rows"], **setting | {"dtype": RIVAL_DTYPES[setting["dtype"]]})
    found: dict[str, dict[str, Row]] = {}  # by layer and column
    for row in (*(row for row in others if row["engine"] != OURS), *_select(result["rows"], engine=OURS, **setting)):
        found.setdefault(row["layer"], {})[row["algorithm"] or row["engine"]] = row
    if not found:
        return
    chosen = {choice["layer"]: choice for choice in _select(result["choices"], **setting)}
    columns = list(dict.fromkeys(column for cells in found.values() for column in cells))
    threads = f"{setting['threads']} thread{'s'[: setting['threads'] > 1]}"
    title = f"{setting['weights']}, {setting['dtype']}, batch {setting['batch']}, {threads}"
    table = _table(result, title, "layer", "MMAC", *columns, *["chosen / best"][: len(chosen)])
    for layer, cells in found.items():
        macs = next(iter(cells.values()))["macs"]
        last = [_choice(chosen[layer])] if layer in chosen else []
        table.add_row(layer, f"{macs / 1e6:.0f}", *(_cell(cells.get(column)) for column in columns), *last)
    console.print(table)


def _print_summary(result: dict[str, Any], batch: int, console: Console) -> None:
    entries = _select(result["summary"], batch=batch, state="cold")
    if not entries:
        return
    algorithms = list(dict.fromkeys(entry["algorithm"] for entry in entries))
    title = f"batch {batch}, times as fast as the best other, weighted by time"
    headings = ("weights", "dtype", "threads", *algorithms, "stem", "slowest layer", "worst chosen / best")
    table = _table(result, title, *headings)
    for key in dict.fromkeys(tuple(entry[k] for k in SETTING) for entry in entries):
        setting = dict(zip(SETTING, key, strict=True))
        group = {entry["algorithm"]: entry for entry in _select(entries, **setting)}
        first = group.get("auto") or next(iter(group.values()))
        slowest = first["slowest"]
        choices = _select(result["choices"], **setting)
        worst = max(choices, key=lambda choice: float(choice["ratio"]), default=None)
        table.add_row(
            *(str(setting[k]) for k in ("weights", "dtype", "threads")),
            *(_mean(group.get(algorithm)) for algorithm in algorithms),
            _speedup(first["stem"]) if first["stem"] else "-",
            f"{_speedup(slowest['speedup'])} {slowest['layer']}",
            f"{_choice(worst)}, {worst['layer']}" if worst else "-",
        )
    console.print(table)


def _table(result: dict[str, Any], title: str, *headings: str) -> Table:
    """Make a table whose title says what every timing depends on."""
    title = f"{result['suite']}: {title}, cold, {result['facts']['pycodesign']['isa']}"
    return Table(*headings, title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _median(row: Row) -> float:
    return float(row["ms"]["median"])


def _weigh(rows: Sequence[Row]) -> float:
    """Sum of the best other contenders' times over the sum of ours."""
    return round(sum(_median(row) * float(row["speedup"]) for row in rows) / sum(map(_median, rows)), 4)


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    ms = f"{_median(row):.3f}"
    return f"{ms} {_speedup(row['speedup'])}" if row["engine"] == OURS and row["speedup"] else ms


def _mean(entry: Row | None) -> str:
    if entry is None:
        return "-"
    missing = "" if entry["count"] == entry["of"] else f" ({entry['count']} of {entry['of']})"
    return _speedup(entry["speedup"]) + missing


def _choice(choice: Row) -> str:
    return f"[{'green' if choice['ratio'] <= GOOD_CHOICE else 'red'}]{choice['ratio']:.2f}[/] {choice['chosen']}"


def _speedup(value: float) -> str:
    return f"[{'green' if value >= 1 else 'red'}]{value:.2f}x[/]"
