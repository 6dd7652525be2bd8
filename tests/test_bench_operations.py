"""The counts that are promised: computed here where it takes seconds, and as the recorded results have them."""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from test_factor import random_quantized

from pycodesign import _core
from pycodesign.bench.harness import read_result
from pycodesign.repetition import factor

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def load(monkeypatch):
    """Import a script of bench/, which may import others from there."""
    monkeypatch.syspath_prepend(str(BENCH))
    return lambda name: __import__(name)


@pytest.mark.parametrize("n", [32, 64, 128, 256, *(pytest.param(n, marks=pytest.mark.slow) for n in (512, 768))])
def test_pair_removes_more_than_qgym(n, load):
    script = load("bench_operations")
    for levels, published in zip(script.LEVELS.values(), script.PUBLISHED[n], strict=True):
        assert factor(random_quantized((n, n), levels, seed=100)).removed > published


SLOW = [pytest.param(shape, 60, marks=pytest.mark.slow) for shape in ((768, 768), (256, 256, 3, 3))]


@pytest.mark.parametrize(("shape", "seconds"), [((128, 128), 0.1), *SLOW])
def test_pair_is_fast(shape, seconds):
    q = random_quantized(shape, [-1, 0, 1], seed=0)
    start = time.process_time()
    program = factor(q)
    assert time.process_time() - start <= seconds
    program.validate()


def test_recorded_counts(load):
    script = load("bench_operations")
    result = read_result(script.RESULTS)
    assert not result["options"]["quick"]
    grid = {(row["n"], row["levels"]): row for row in result["grid"] if row["method"] == "pair"}
    assert grid.keys() == {(n, count) for n in script.PUBLISHED for count in script.LEVELS}
    for (n, _), row in grid.items():
        assert row["runs"] == 5 and row["removed"] >= row["published"]
        assert row["seconds"] <= (0.1 if n <= 128 else 60)
    for levels, least in ((2, 0.895), (3, 0.84), (5, 0.77), (12, 0.665)):
        assert grid[128, levels]["removed"] >= least
    layers = {(row["layer"], row["weights"]): row for row in result["layers"]}
    assert all(layers[f"3x3 {n}-{n}", weights] for n in script.CHANNELS for weights in ("binary", "ternary"))
    assert max(layers["3x3 256-256", weights]["seconds"] for weights in ("binary", "ternary")) <= 60
    small = {row["method"]: row for row in result["adders"] if row["outputs"] == 16}
    assert {row["runs"] for row in small.values()} == {100}
    assert small["pair"]["adds"] <= 87 and small["saturate"]["adds"] <= 85
    assert small["da4ml"]["adds"] == pytest.approx(85.6, abs=0.6)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="egglog needs Python 3.11")
def test_bench_operations(load, tmp_path, monkeypatch):
    script = load("bench_operations")
    for name in ("PUBLISHED", "CHANNELS", "ADDER_SHAPES"):
        whole = getattr(script, name)
        monkeypatch.setattr(script, name, {32: whole[32]} if isinstance(whole, dict) else whole[:1])
    monkeypatch.setattr(script, "NETWORKS", script.NETWORKS[:1])
    path = tmp_path / "operations.json"
    run = CliRunner().invoke(script.main, ["--quick", "--json", str(path)], catch_exceptions=False)
    assert run.exit_code == 0 and "Random ternary" in run.output
    assert ("da4ml is left out" in run.output) == (not script.ADDER_GRAPHS)
    result = read_result(path)
    recorded = {(row["n"], row["levels"], row["method"]): row for row in read_result(script.RESULTS)["grid"]}
    for row in result["grid"]:
        expected = recorded[row["n"], row["levels"], row["method"]]["removed"]
        assert row["removed"] == pytest.approx(expected, abs=0.03)
    assert {row["method"] for row in result["networks"]} == {"pair", "summerge", "patterns", "unique"}
    assert {row["method"] for row in result["adders"]} >= {"pair", "saturate"}


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not _core.generates_code(), reason="machine code is made on x86-64 Linux only"
)
def test_bench_lowering(load, tmp_path):
    script = load("bench_lowering")
    path = tmp_path / "lowering.json"
    run = CliRunner().invoke(script.main, ["--quick", "--json", str(path)], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    recorded = {(row["layer"], row["weights"], row["method"]): row for row in read_result(script.RESULTS)["rows"]}
    rows = read_result(path)["rows"]
    assert {row["method"] for row in rows} == {"codegen", "pair", "patterns"}
    for row in rows:
        assert row["ns"] > 0
        if row["method"] != "codegen":
            assert row["operations"] == recorded[row["layer"], row["weights"], row["method"]]["operations"]


def test_tiles_add_up(load):
    script = load("bench_lowering")
    q = random_quantized((64, 64, 3, 3), [-1, 0, 1], seed=0)
    x = np.random.default_rng(0).integers(-9, 9, (64 * 9, 5))
    sums = np.zeros((64, 5), np.int64)
    for number, program in enumerate(script.factor_tiles(q, "pair")):
        program.validate()
        outputs, channels = (slice(32 * k, 32 * (k + 1)) for k in divmod(number, 2))
        rows = x[channels.start * 9 : channels.stop * 9]
        sums[outputs] = program(np.vstack([rows, sums[outputs]]))
    np.testing.assert_array_equal(sums, factor(q)(x))
