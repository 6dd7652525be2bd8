"""The benchmark of branches runs, checks what it times, and refuses what it does not know."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

import pycodesign
from pycodesign import _core
from pycodesign.bench import branches
from pycodesign.bench.branches import run_branch_suite
from pycodesign.bench.harness import CheckError
from pycodesign.cli import main

pytestmark = pytest.mark.skipif(_core.available_cores() < 2, reason="one core: no branches to time")


def test_suite() -> None:
    options = ["--quick", "--layer", "parnet", "--contender", "torch", "--rounds", "2", "--json", "-"]
    done = CliRunner().invoke(main, ["bench", "branches", *options])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["suite"] == "branches" and result["facts"]["cores"] >= 2
    assert {row["team"] for row in result["latencies"]} == {"pool", "openmp"}
    assert all(0 < row["p10"] <= row["p50"] <= row["p99"] for row in result["latencies"])
    assert [row["branches"] for row in result["unbalanced"]] == ["the longer one", "the shorter one", "both"]
    contenders = [row["contender"] for row in result["rows"]]
    assert contenders == ["plan", "sequential, 1", "sequential, 2", "torch, 1", "torch, 2"]
    assert result["rows"][0]["ratio"] == 1 and all(row["ratio"] > 0 for row in result["rows"])


@pytest.mark.usefixtures("three_threads")
def test_threads_are_restored_behind_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "_measure_pool", lambda counts: [])
    monkeypatch.setattr(branches.branch_latency, "measure_latencies", lambda *counts: [])
    monkeypatch.setattr(branches, "TOLERANCE", -1.0)
    with pytest.raises(CheckError, match="expected a relative error"):
        run_branch_suite(networks=["parnet"], contenders=["torch"], rounds=1, quick=True, progress=False)
    assert pycodesign.get_num_threads() == torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_choose_placement_restores_the_threads() -> None:
    _, graph, x = branches._build("parnet")
    branches.choose_placement(graph, x, few=0)
    assert pycodesign.get_num_threads() == torch.get_num_threads() == 3


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="networks: expected parnet or inception, got 'resnet18'"):
        run_branch_suite(networks=["resnet18"])
    with pytest.raises(ValueError, match=r"contenders: expected torch, torch.compile, onnxruntime, got 'ncnn'"):
        run_branch_suite(contenders=["ncnn"])
    done = CliRunner().invoke(main, ["bench", "branches", "--batch", "2"])
    assert done.exit_code and "batches: expected none for branches" in done.output
