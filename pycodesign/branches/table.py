"""The latency table: what layers, gates, waits and transfers cost on one machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pycodesign
from pycodesign._arguments import to_integer, to_number
from pycodesign.branches.graph import Body

__all__ = ["LatencyTable", "describe_machine"]

SCHEMA = "pycodesign latency table 1"
NUMBERS = ("sync", "transfer")
LARGEST = 1e9  # seconds: sums of them are finite, too


def describe_machine() -> dict[str, Any]:
    """Return what a table's seconds hold for: processor, cores that this process may use, instruction set."""
    config = pycodesign.show_config()
    return {"cpu": config["cpu"], "cores": config["cores"], "isa": config["isa"]}


@dataclass(frozen=True)
class LatencyTable:
    """Seconds, by what takes them.

    Parameters
    ----------
    machine : dict
        As `describe_machine` returns it.
    entries : mapping of str to mapping of str to float
        For each layer or gate its seconds, by ``"solo/n"``: on n threads, all else idle, and ``"together/n"``: while as
        many other teams as were measured do the same.
    run : mapping of str to float
        Seconds that a run takes beside its bodies, as entries have them.
    sync : float
        Seconds from a team's result to the start of another team that waited for it.
    transfer : float
        Seconds for each byte that another team made.
    teams : int
        How many worked together.

    Raises
    ------
    TypeError, ValueError
        For seconds that are no numbers from 0 to 1e9.

    Examples
    --------
    >>> from pycodesign.branches import LatencyTable
    >>> table = LatencyTable({}, {"conv": {"solo/1": 2e-5, "together/1": 3e-5}})
    >>> table.cost("conv"), table.cost("conv", together=True)
    (2e-05, 3e-05)
    """

    machine: Mapping[str, Any]
    entries: Mapping[str, Mapping[str, float]]
    run: Mapping[str, float] = field(default_factory=dict)
    sync: float = 0.0
    transfer: float = 0.0
    teams: int = 2

    def __post_init__(self) -> None:
        for name in ("machine", "entries", "run"):
            if not isinstance(getattr(self, name), Mapping):
                raise TypeError(f"{name}: expected a mapping, got {type(getattr(self, name)).__name__}")
        made: dict[str, Any] = {name: _to_seconds(name, getattr(self, name)) for name in NUMBERS}
        made |= {"machine": dict(self.machine), "teams": to_integer("teams", self.teams, 1)}
        made |= {"entries": {key: _to_row(key, row) for key, row in self.entries.items()}}
        made |= {"run": _to_row("run", self.run)}
        for name, value in made.items():
            object.__setattr__(self, name, value)

    def cost(self, key: str, threads: int = 1, together: bool = False) -> float:
        """Return the seconds of a layer or gate.

        Raises
        ------
        ValueError
            If it was not measured, or not with so many threads.
        """
        if key not in self.entries:
            raise ValueError(f"table: expected an entry for {key!r}, got a table of {len(self.entries)} others")
        row = self.entries[key]
        name = f"solo/{threads}"
        if name not in row:
            measured = ", ".join(sorted(row))
            raise ValueError(f"table: expected {key!r} with {threads} threads, got {measured}")
        return row.get(f"together/{threads}", row[name]) if together else row[name]

    def body_cost(self, body: Body, threads: int = 1, together: bool = False) -> float:
        """Return the seconds of a body: the sum of what it does, or, where that is not known, its own entry's."""
        is_known = bool(body.costs) and self.entries.keys() >= set(body.costs)
        keys = body.costs if is_known or body.name not in self.entries else ()
        return sum(self.cost(key, threads, together) for key in keys or (body.name,))

    def run_cost(self, threads: int = 1, together: bool = False) -> float:
        """Return the seconds that a run takes beside its bodies, of one team or of several."""
        alone = self.run.get(f"solo/{threads}", 0.0)
        return self.run.get(f"together/{threads}", alone) if together else alone

    def save(self, path: Path | str) -> None:
        """Write the table as JSON."""
        Path(path).write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str, *, any_machine: bool = False) -> LatencyTable:
        """Read a table.

        Parameters
        ----------
        path : str or Path
        any_machine : bool
            Take a table of another machine, to look at it.

        Raises
        ------
        ValueError
            If the file is no latency table, or one of another machine.
        """
        try:
            found = json.loads(Path(path).read_text())
        except (ValueError, RecursionError, IsADirectoryError) as error:
            raise ValueError(f"path: expected a latency table, got {path} ({error})") from None
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            raise ValueError(f"path: expected a latency table ({SCHEMA}), got {path}")
        numbers = [found.get(name) for name in NUMBERS]
        entries, teams, machine = found.get("entries"), found.get("teams"), found.get("machine")
        run: Any = found.get("run")
        if not isinstance(entries, dict) or not isinstance(machine, dict):
            raise ValueError(f"path: expected entries and a machine, got {sorted(found)} in {path}")
        if type(teams) is not int or teams < 1:
            raise ValueError(f"path: expected a number of teams, got {teams!r} in {path}")
        for key, row in [*entries.items(), ("run", run)]:
            if not isinstance(row, dict) or not (row or key == "run"):
                raise ValueError(f"path: expected seconds by threads for {key!r}, got {row!r} in {path}")
            numbers += row.values()
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= LARGEST:
                raise ValueError(f"path: expected seconds, got {number!r} in {path}")
        table = cls(machine, entries, run, float(found["sync"]), float(found["transfer"]), teams)
        if not any_machine:
            table.check_machine()
        return table

    def check_machine(self) -> None:
        """Raise unless the table was measured on this machine.

        Raises
        ------
        ValueError
            Saying what differs.
        """
        here = describe_machine()
        for name, value in here.items():
            if self.machine.get(name) != value:
                raise ValueError(
                    f"table: expected one measured on this machine ({name} {value}), got {self.machine.get(name)}; "
                    "measure anew with branches.profile"
                )


def _to_row(key: str, row: Any) -> dict[str, float]:
    if not isinstance(row, Mapping):
        raise TypeError(f"entries: expected seconds by threads for {key!r}, got {type(row).__name__}")
    return {column: _to_seconds(f"{key}, {column}", number) for column, number in row.items()}


def _to_seconds(name: str, value: Any) -> float:
    number = to_number(name, value)
    if not 0 <= number <= LARGEST:
        raise ValueError(f"{name}: expected seconds from 0 to {LARGEST:g}, got {number}")
    return number
