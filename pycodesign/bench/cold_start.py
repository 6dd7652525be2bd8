"""How long a fresh process takes to the first result of a converted network, in the environments that it may meet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pycodesign.bench.contenders import OURS
from pycodesign.bench.suites import progress_bar

if TYPE_CHECKING:
    from pycodesign.bench.networks import Network

RUNS = 3
UNWRITABLE = "/proc"  # a folder that nobody can write in, root neither
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "as it is": {},
    "nowhere to write": dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), UNWRITABLE),
    "no machine code": {"PYCODESIGN_JIT": "0"},
}
# Argument: the file that `save_converted` wrote. Every stage ends where the next begins.
SCRIPT = """
import json, sys, time
times = [time.time()]
import torch
times.append(time.time())
import pycodesign.nn
times.append(time.time())
model, x, expected = torch.load(sys.argv[1], weights_only=False)
times.append(time.time())
with torch.inference_mode():
    logits = model(x)
    times.append(time.time())
    error = float((logits - expected).norm() / expected.norm())
print(json.dumps([times, error]))
"""

Row = dict[str, Any]


def time_cold_starts(
    weights: str, dtypes: Sequence[str], name: str = "resnet18", *, runs: int = RUNS, progress: bool = True
) -> tuple[list[Row], list[Row]]:
    """Time a fresh process from its start to the first result of a converted network.

    The network is read from a file; what was packed is not in it. The runs are made in each of `ENVIRONMENTS`: as it
    is; with home, temporary folder and working directory where nobody can write; without generated machine code.

    Returns
    -------
    rows, left_out : lists of dict
        ``seconds`` by stage and in total, of the run that took the median; relative ``error`` of its logits beside
        those of this process.
    """
    from pycodesign.bench.networks import Network

    rows: list[Row] = []
    left_out: list[Row] = []
    network = Network.random(name, weights, 1)
    with tempfile.TemporaryDirectory() as folder, progress_bar(len(dtypes) * len(ENVIRONMENTS), progress) as update:
        for dtype in dtypes:
            path = Path(folder) / f"{dtype}.pt"
            save_converted(network, dtype, path)
            for environment in ENVIRONMENTS:
                update(description=f"cold start, {dtype}, {environment}", advance=1)
                where = {"layer": name, "weights": weights, "dtype": dtype, "environment": environment}
                try:
                    starts = sorted((_start_cold(path, environment) for _ in range(runs)), key=lambda s: s["total"])
                except subprocess.CalledProcessError as error:
                    reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
                    left_out.append(where | {"contender": f"{OURS} cold start", "reason": reason})
                    continue
                middle = starts[len(starts) // 2]
                rows.append(where | {"runs": runs, "error": middle.pop("error"), "seconds": middle})
    return rows, left_out


def save_converted(network: Network, dtype: str, path: Path) -> None:
    """Convert a network and save it with its input and the logits to expect."""
    import torch

    from pycodesign.bench.network_contenders import convert_network

    model = convert_network(network, dtype)
    x = torch.from_numpy(network.x)
    with torch.inference_mode():
        logits = model(x).numpy()
    torch.save((model, x, torch.from_numpy(logits)), path)


def _start_cold(path: Path, environment: str) -> dict[str, float]:
    variables = ENVIRONMENTS[environment]
    command = [sys.executable, "-c", SCRIPT, str(path)]
    folder = variables.get("HOME", str(path.parent))
    start = time.time()
    run = subprocess.run(command, env=os.environ | variables, cwd=folder, capture_output=True, text=True, check=True)
    times, error = json.loads(run.stdout)
    stages = ("python", "torch", "pycodesign", "load", "first result")
    seconds = (end - begin for begin, end in zip([start, *times], times, strict=False))
    return dict(zip(stages, map(_round, seconds), strict=True)) | {
        "total": _round(times[-1] - start),
        "error": float(f"{error:.2g}"),
    }


def _round(seconds: float) -> float:
    return round(seconds, 3)
