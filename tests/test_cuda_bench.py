"""bench/bench_cuda.py: says what is missing, and computes what it says, emulated and in small."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pycodesign.bench.cases import Layer

BENCH = Path(__file__).parents[1] / "bench" / "bench_cuda.py"


class Recorded:
    """A CUDA graph's calls, made when it is replayed."""

    def __init__(self, run: Callable[[], Any], calls: int) -> None:
        self.run, self.calls = run, calls

    def replay(self) -> None:
        for _ in range(self.calls):
            self.run()


def time_replay(graph: Recorded) -> float:
    start = time.perf_counter()
    graph.replay()
    return time.perf_counter() - start


@pytest.fixture
def bench(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    if gpu.kind != "torch":
        pytest.skip("it times torch's tensors")
    spec = importlib.util.spec_from_file_location("bench_cuda", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_cuda", module)
    spec.loader.exec_module(module)
    if gpu.is_emulated:
        for name, value in {"DEVICE": "cpu", "capture": Recorded, "time_graph": time_replay, "CALLS": 1}.items():
            monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(module, "COLD_BYTES", 64)
        monkeypatch.setattr(module, "PREPACK_DEVICE", 0)
    for name, value in {"TASKS": 2, "INPUTS": 40, "OUTPUTS": 70}.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_tasks(bench: Any) -> None:
    tasks = [
        bench.make_layer(Layer("3x3 8-16@6", 2, 8, 16, 6, 3, 1, 1)),
        bench.make_layer(Layer("40x24", 3, 24, 40)),
        bench.make_expansion("tiles", torch.float32, (8, 12), (16, 24), 3),
        bench.make_expansion("arbitrary", torch.bfloat16, (8, 12), (17, 23), 1),
        bench.make_deltas(4, 0.1, 0),
        bench.make_deltas(4, 0.0, 3),
    ]
    for task in tasks:
        rows = list(bench.time_task(task, 2))
        assert [row["way"] for row in rows[::2]] == [way.name for way in task.ways]
        for row in (row for row in rows if row["way"].startswith("ours")):
            rounding = 2 * 2**-11 if "float16" in row["way"] else 0  # of inputs and of outputs
            assert row["error"] is None or row["error"] < 1e-5 + rounding
        assert rows[0]["ratio"] == 1


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: nothing is missing")
    done = subprocess.run([sys.executable, BENCH], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("nothing was timed: ")
