"""The benchmark of deltas runs, checks what it times, and refuses what it does not know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import pycodesign
from pycodesign import ops
from pycodesign.bench.harness import CheckError
from pycodesign.cli import main

pytest.importorskip("torch", reason="torch is not installed (pip install 'pycodesign[bench]')")
pytest.importorskip("scipy", reason="scipy is not installed (pip install 'pycodesign[bench]')")

from pycodesign.bench import deltas


def test_suite() -> None:
    done = CliRunner().invoke(main, ["bench", "deltas", "--quick", "--rounds", "2", "--json", "-"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["suite"] == "deltas" and result["facts"]["packages"]["scipy"]
    assert result["options"] == {"threads": [1], "rounds": 2, "shape": [3072, 768], "tasks": 8}
    ways: dict[str, list[str]] = {}
    for row in result["rows"]:
        assert row["ratio"] > 0 and row["floor_ms"] > 0 and row["median"] >= row["minimum"] > 0
        assert row["ratio"] == 1 or row["way"] != "pycodesign"
        ways.setdefault(row["deltas"], []).append(row["way"])
    assert list(ways) == ["1.4%", "1.4%, pooled", "rank 8"]
    sparse = ["torch CSR, by feature", "torch CSR, rows", "scipy CSR, by feature", "torch dense"]
    assert ways["1.4%"] == ["pycodesign", *sparse]
    assert ways["1.4%, pooled"] == ["pycodesign", *sparse, "torch CSR, all tokens"]
    assert ways["rank 8"][0] == "pycodesign" and len(ways["rank 8"]) == 3


def test_script_writes_a_result(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "bench" / "bench_sharing.py"
    command = [sys.executable, str(script), "--quick", "--rounds", "1", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "768 -> 3072, 8 tasks" in done.stdout
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("deltas_") and json.loads(path.read_text())["options"]["rounds"] == 1


@pytest.mark.usefixtures("three_threads")
def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.delta_linear

    def wrong(*arguments: Any, out: Any, **keywords: Any) -> Any:
        right(*arguments, out=out, **keywords)
        out[3, 0, 5] += np.float32(0.01)
        return out

    monkeypatch.setattr(deltas.ops, "delta_linear", wrong)
    with pytest.raises(CheckError, match=r"pycodesign, 1.4%: expected the definition's values"):
        deltas.run_delta_suite(quick=True, progress=False)
    assert pycodesign.get_num_threads() == deltas.torch.get_num_threads() == 3


def test_refuses_other_suites_options() -> None:
    done = CliRunner().invoke(main, ["bench", "deltas", "--batch", "2"])
    assert done.exit_code and "batches: expected none for deltas" in done.output
