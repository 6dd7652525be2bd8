"""Latency tables: checked when made, kept in files; files of another form or another machine are refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from pycodesign.branches import LatencyTable, describe_machine


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"entries": {"a": {"solo/1": float("nan")}}},
            ValueError,
            "a, solo/1: expected seconds from 0 to 1e.09, got nan",
        ),
        ({"entries": {"a": {"solo/1": float("inf")}}}, ValueError, "a, solo/1: expected seconds .*, got inf"),
        ({"entries": {"a": {"solo/1": -1.0}}}, ValueError, "a, solo/1: expected seconds .*, got -1"),
        ({"entries": {"a": {"solo/1": 1e308}}}, ValueError, "a, solo/1: expected seconds .*, got 1e.308"),
        ({"entries": {"a": {"solo/1": "1"}}}, TypeError, "a, solo/1: expected a number, got str"),
        ({"entries": {"a": 1.0}}, TypeError, "entries: expected seconds by threads for 'a', got float"),
        ({"entries": 3}, TypeError, "entries: expected a mapping, got int"),
        ({"machine": None}, TypeError, "machine: expected a mapping, got NoneType"),
        ({"sync": float("nan")}, ValueError, "sync: expected seconds"),
        ({"transfer": -1}, ValueError, "transfer: expected seconds"),
        ({"teams": 0}, ValueError, "teams: expected an integer >= 1, got 0"),
    ],
)
def test_tables_are_checked_when_made(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LatencyTable(**{"machine": {}, "entries": {}, **options})


def test_tables_keep_numbers_of_python(tmp_path: Path) -> None:
    row = MappingProxyType({"solo/1": np.float32(0.5)})
    table = LatencyTable(
        MappingProxyType(describe_machine()), MappingProxyType({"a": row}), sync=np.float64(1), teams=np.int64(2)
    )  # type: ignore[arg-type]
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table and table.entries == {"a": {"solo/1": 0.5}}


def test_tables_are_kept(tmp_path):
    table = LatencyTable(
        describe_machine(), {"a": {"solo/1": 1e-5, "together/1": 2e-5}}, {"solo/1": 1e-6}, 2e-7, 1e-10, 2
    )
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    assert table.run_cost(together=True) == 1e-6


GOOD = {
    "schema": "pycodesign latency table 1",
    "machine": {},
    "entries": {"a": {"solo/1": 1e-5}},
    "run": {},
    "sync": 0,
    "transfer": 0,
    "teams": 2,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other"}, "expected a latency table"),
        ({"entries": []}, "expected entries and a machine"),
        *[({"teams": teams}, f"expected a number of teams, got {teams}") for teams in (None, True, -3)],
        ({"entries": {"a": {}}}, "expected seconds by threads for 'a'"),
        ({"entries": {"a": {"solo/1": -1}}}, "expected seconds, got -1"),
        ({"entries": {"a": {"solo/1": "1"}}}, "expected seconds, got '1'"),
        ({"run": 3}, "expected seconds by threads for 'run'"),
        ({"sync": True}, "expected seconds, got True"),
        ({"transfer": float("nan")}, "expected seconds, got nan"),
        ({"transfer": 10**400}, "expected seconds, got 1000"),
    ],
)
def test_malformed_tables_are_refused(tmp_path, change, message):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(ValueError, match=message):
        LatencyTable.load(path, any_machine=True)


def test_files_that_are_no_tables_are_refused(tmp_path):
    path = tmp_path / "table.json"
    with pytest.raises(ValueError, match="path: expected a latency table"):
        LatencyTable.load(tmp_path)
    for text in ("", "[1]", "{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match="path: expected a latency table"):
            LatencyTable.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="path: expected a latency table"):
        LatencyTable.load(path)


def test_tables_of_another_machine_are_refused(tmp_path):
    for name, value in {"cpu": "another", "cores": 999, "isa": "none"}.items():
        LatencyTable({**describe_machine(), name: value}, {}).save(tmp_path / "table.json")
        with pytest.raises(ValueError, match=rf"measured on this machine \({name} .*\), got {value}; measure anew"):
            LatencyTable.load(tmp_path / "table.json")
        LatencyTable.load(tmp_path / "table.json", any_machine=True)
