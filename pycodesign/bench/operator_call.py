"""How long one call of an operator takes where there is next to nothing to compute."""

from __future__ import annotations

import contextlib
import importlib
import statistics
import time
from typing import Any

import numpy as np


def time_operator_call(turns: int = 200, calls: int = 50) -> dict[str, float]:
    """Time ``torch.ops.pycodesign.conv2d`` on one pixel of one channel and one output.

    Parameters
    ----------
    turns : int
        The median of so many is given.
    calls : int
        In each turn.

    Returns
    -------
    dict
        Microseconds of a call: under ``"inference_mode"``, ``"no_grad"``, as ``"usual"``, and where x asks for a
        ``"gradient"``, whose graph the call then records.
    """
    import torch

    from pycodesign._quantized import to_arrays
    from pycodesign.quantize import ternary

    importlib.import_module("pycodesign.nn")  # defines the operator
    operator: Any = torch.ops.pycodesign.conv2d
    weights = [torch.from_numpy(array) for array in to_arrays(ternary(np.ones((1, 1, 1, 1), np.float32)))]
    x = torch.ones(1, 1, 1, 1)
    modes: dict[str, tuple[Any, Any]] = {
        "inference_mode": (torch.inference_mode, x),
        "no_grad": (torch.no_grad, x),
        "usual": (contextlib.nullcontext, x),
        "gradient": (contextlib.nullcontext, x.clone().requires_grad_()),
    }
    found: dict[str, list[float]] = {name: [] for name in modes}
    for _ in range(turns):
        for name, (mode, given) in modes.items():
            with mode():
                operator(given, *weights)
                start = time.perf_counter()
                for _ in range(calls):
                    operator(given, *weights)
                found[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: round(statistics.median(times), 2) for name, times in found.items()}
