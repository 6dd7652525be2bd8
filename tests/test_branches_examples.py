"""Branches from outside: examples of docstrings, the scripts of examples/ and bench/, and the package as a command."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys

import pytest


@pytest.mark.parametrize("name", ["exact", "graph", "growing", "listing", "nets", "placing", "space", "table"])
def test_examples_of_docstrings(name):
    found = doctest.testmod(importlib.import_module(f"pycodesign.branches.{name}"))
    assert found.failed == 0 and found.attempted > 0


def test_the_example_draws(tmp_path, monkeypatch):
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    example = importlib.import_module("search_branches")
    rows = [
        {"method": method, "seed": seed, "target_ms": 0.1, "test": 0.9 + 0.01 * seed, "validation": 0.9,
         "predicted_ms": 0.08 + 0.01 * seed, "measured_ms": 0.1, "seconds": 1.0, "candidates": 2}
        for method in example.METHODS for seed in range(2)
    ]  # fmt: skip
    example.draw(rows, tmp_path / "front.svg")
    assert (tmp_path / "front.svg").stat().st_size > 1000
    summary = example.summarize(rows)
    assert [line["method"] for line in summary] == list(example.METHODS)
    assert summary[1]["max_plus_ahead"] == 0 and summary[1]["seeds"] == 2
    example.print_summary(summary)


@pytest.mark.slow
def test_predictions_of_random_plans(tmp_path):
    """On an idle machine of two cores; the committed result is bench/results/branches-predicted-granite-rapids.json."""
    import json
    import subprocess
    from pathlib import Path

    script = Path(__file__).parents[1] / "bench" / "bench_placement.py"
    path = tmp_path / "predicted.json"
    subprocess.run([sys.executable, str(script), "predict", "--json", str(path)], check=True)
    summary = json.loads(path.read_text())["summary"]
    assert summary["plans"] >= 100
    assert summary["mean_error"] <= 0.1 and summary["rank_correlation"] >= 0.9, summary


def test_the_package_is_a_command() -> None:
    done = subprocess.run([sys.executable, "-P", "-m", "pycodesign", "--version"], capture_output=True, text=True)
    assert re.match("pycodesign, version ", done.stdout), done.stderr
