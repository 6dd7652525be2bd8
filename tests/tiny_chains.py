"""Layers to benchmark that take no time, and a contender that gives the expected results."""

from __future__ import annotations

from typing import Any

import numpy as np

from pycodesign.bench.cases import Layer
from pycodesign.bench.contenders import Chain

TINY = {
    "sequential": Layer("3x3", 2, 16, 16, 6, 3, 1, 1),
    "parallel": Layer("3x3 /2", 1, 8, 16, 7, 3, 2, 1),
    "1x1 parallel": Layer("1x1 /2", 1, 16, 32, 8, 1, 2, 0),
    "linear sequential": Layer("320x320", 2, 320, 320),  # narrower ones openvino fuses into one
    "linear parallel": Layer("16x32", 1, 32, 16),
}


class ExactChain(Chain):
    """Computes the expected results, off by `error`."""

    engine = "exact"
    error = 0

    def prepare(self) -> None:
        pass

    def run(self) -> object:
        return None

    def outputs(self) -> list[np.ndarray[Any, Any]]:
        return [y + y.dtype.type(self.error) for y in self.case.expected(self.dtype)]
