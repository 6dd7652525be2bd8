"""Ranges of activations, observed on example inputs, and the 8-bit scales that follow from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from pycodesign.nn.fusion import Weights
from pycodesign.nn.ops import GEOMETRY

CALIBRATIONS = ("minmax", "percentile")
PERCENTILE = 0.9999  # of the values on either side that a range holds


def list_calls(example_inputs: Any) -> list[tuple[Any, ...]]:
    """Return the arguments of each call: of a tensor, of a tuple of arguments, or of several of these."""
    if example_inputs is None:
        return []
    if isinstance(example_inputs, Tensor):
        return [(example_inputs,)]
    if isinstance(example_inputs, tuple):
        return [example_inputs]
    expected = "example_inputs: expected a tensor, a tuple of arguments, or an iterable of these"
    if not isinstance(example_inputs, Iterable):
        raise TypeError(f"{expected}, got {type(example_inputs).__name__}")
    calls = []
    for given in example_inputs:
        if not isinstance(given, (Tensor, tuple)):
            raise TypeError(f"{expected}, got {type(example_inputs).__name__} of {type(given).__name__}")
        calls += list_calls(given)
    if not calls:
        raise ValueError("example_inputs: expected at least one example, got none")
    return calls


class Observer(fx.Interpreter):
    """Runs a graph with quantized weights; notes each value's shape and, where asked for, its range.

    Attributes
    ----------
    ranges : dict from fx.Node to list of (float, float)
        One for each run.
    """

    def __init__(self, traced: fx.GraphModule, layers: Mapping[str, Weights], calibration: str | None) -> None:
        super().__init__(traced)
        self.extra_traceback = False  # errors keep their own words
        self.calibration = calibration
        self.ranges: dict[fx.Node, list[tuple[float, float]]] = {}
        self.layers = {
            name: (torch.from_numpy(w.q.dequantize()), None if w.bias is None else torch.from_numpy(w.bias), w.options)
            for name, w in layers.items()
        }

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target not in self.layers:
            return super().call_module(target, args, kwargs)
        weight, bias, options = self.layers[target]
        if weight.dim() == 2:
            return F.linear(args[0], weight, bias)
        return F.conv2d(args[0], weight, bias, **{name: options[name] for name in GEOMETRY if name in options})

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["shape"] = tuple(value.shape) if isinstance(value, Tensor) else None
        if self.calibration and isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            self.ranges.setdefault(n, []).append(find_range(value, self.calibration))
        return value


def find_range(value: Tensor, calibration: str) -> tuple[float, float]:
    """Return the least and the greatest value, or percentiles."""
    flat = value.detach().flatten()
    if calibration == "minmax":
        low, high = torch.aminmax(flat)
        return float(low), float(high)
    rank = max(1, round((1 - PERCENTILE) * flat.numel()))
    low, high = (flat.kthvalue(k).values for k in (rank, flat.numel() + 1 - rank))
    return float(low), float(high)


class Affines(Mapping[fx.Node, tuple[float, int]]):
    """Scale and zero point of each node's value, made where they are asked for: others need not be finite."""

    def __init__(self, ranges: Mapping[fx.Node, list[tuple[float, float]]], calibration: str) -> None:
        self.ranges, self.calibration = ranges, calibration

    def __getitem__(self, node: fx.Node) -> tuple[float, int]:
        return to_affine(self.ranges[node], self.calibration, node.name)

    def __iter__(self) -> Iterator[fx.Node]:
        return iter(self.ranges)

    def __len__(self) -> int:
        return len(self.ranges)


def to_affine(ranges: Iterable[tuple[float, float]], calibration: str, name: str) -> tuple[float, int]:
    """Return scale and zero point of uint8 values: those of the union of ranges, or of their mean for percentiles.

    ValueError with the value's name if they are not finite.
    """
    lows, highs = np.array(list(ranges), np.float64).T
    low, high = (lows.min(), highs.max()) if calibration == "minmax" else (lows.mean(), highs.mean())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"example_inputs: expected finite activations, got {low} to {high} from {name}")
    low, high = min(low, 0.0), max(high, 0.0)  # zero is exact
    scale = float(np.float32((high - low) / 255)) or 1.0
    return scale, int(np.clip(np.rint(-low / scale), 0, 255))
