"""Layers and gates of which networks of branches are made, and the names under which a latency table knows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

try:
    import torch
except ImportError as error:
    raise ImportError("pycodesign.branches' networks need torch: `pip install 'pycodesign[torch]'`") from error

from torch import Tensor, nn
from torch.nn.utils import parametrize

from pycodesign.branches.space import GATES, OPERATORS

__all__ = ["BranchBody", "FourBits", "Head", "Stem", "Ternary", "build_gate", "build_operator", "quantize"]

QUANTIZED = ":ternary"  # behind the name of an operator whose weights take three values


class FourBits(nn.Module):
    """Weights of at most fifteen values, -7 to 7 times a scale of each output; the gradient goes straight through."""

    def forward(self, w: Tensor) -> Tensor:
        scale = w.detach().abs().amax(tuple(range(1, w.ndim)), keepdim=True).clamp(min=1e-12) / 7
        return scale * (w.detach() / scale).round() + (w - w.detach())


class Ternary(nn.Module):
    """Weights of three values for each output; the gradient goes straight through (Li et al., 2016, TWN)."""

    def forward(self, w: Tensor) -> Tensor:
        size = w.detach().abs()
        over = tuple(range(1, w.ndim))
        is_large = size > 0.7 * size.mean(over, keepdim=True)
        scale = (size * is_large).sum(over, keepdim=True) / is_large.sum(over, keepdim=True).clamp(min=1)
        return scale * w.sign() * is_large + (w - w.detach())


class Repeat(nn.Module):
    """Channels of a smaller number, repeated."""

    def __init__(self, channels: int, times: int) -> None:
        super().__init__()
        self.channels, self.times = channels, times

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, self.times, 1, 1)


def build_operator(name: str, inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """Build a layer.

    Parameters
    ----------
    name : str
        One of `OPERATORS`.
    inputs, outputs : int
        Channels; outputs a multiple of inputs.
    stride : {1, 2}

    Raises
    ------
    ValueError
        If there is no operator of that name.
    """
    if name not in OPERATORS:
        raise ValueError(f"operator: expected one of {', '.join(OPERATORS)}, got {name!r}")
    kind, quantized = name.removesuffix(QUANTIZED), name.endswith(QUANTIZED)
    repeat = [Repeat(inputs, outputs // inputs)] if outputs != inputs else []
    if kind == "skip":
        shrink = [nn.AvgPool2d(1, 2)] if stride == 2 else []
        return nn.Sequential(*shrink, *repeat)
    if kind == "pool":
        return nn.Sequential(nn.AvgPool2d(3, stride, 1, count_include_pad=False), *repeat)
    depthwise: list[nn.Module] = []
    if kind == "separable":
        first = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        depthwise, stride = [quantize(first, FourBits()) if quantized else first, nn.BatchNorm2d(inputs)], 1
    size = 3 if kind == "conv3x3" else 1
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(
        *depthwise, quantize(conv, Ternary()) if quantized else conv, nn.BatchNorm2d(outputs), nn.ReLU()
    )


def quantize(layer: nn.Module, levels: nn.Module) -> nn.Module:
    """Make a layer's weights few-valued while it trains."""
    parametrize.register_parametrization(layer, "weight", levels)
    return layer


class Add(nn.Module):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return other


class Concatenate(nn.Module):
    """What a 1x1 convolution, of weights of 4 bits, makes of both."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv: Any = quantize(nn.Conv2d(2 * channels, channels, 1, bias=False), FourBits())
        self.norm: nn.Module = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        found: Tensor = self.norm(self.conv(torch.cat([x, other], 1)))
        return found


class Pooled(nn.Module):
    """A vector for all pixels, of the other branch's means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        found: Tensor = self.conv(other)
        return found


def build_gate(name: str, channels: int) -> nn.Module:
    """Build a gate: ``gate(x, other)`` is what a branch adds to its own `x`.

    Parameters
    ----------
    name : {"add", "concatenate", "pooled"}
        The other branch's map; a 1x1 convolution of both; a linear function of the other's means,
        (N, C, 1, 1).
    channels : int

    Raises
    ------
    ValueError
        If there is no gate of that name.
    """
    if name not in GATES[1:]:
        raise ValueError(f"gate: expected one of {', '.join(GATES[1:])}, got {name!r}")
    return Add() if name == "add" else Concatenate(channels) if name == "concatenate" else Pooled(channels)


class BranchBody(nn.Module):
    """A segment of a branch: what comes through its gates, its layers, and what others need of it.

    Parameters
    ----------
    gates : sequence of torch.nn.Module
        One for each other branch that it listens to.
    layers : sequence of torch.nn.Module
    sends : str
        ``"map"``; ``"both"``: the map and its means; ``"features"``: the means alone, for the head.
    """

    def __init__(self, gates: Sequence[nn.Module], layers: Sequence[nn.Module], sends: str = "map") -> None:
        super().__init__()
        self.gates, self.layers = nn.ModuleList(gates), nn.ModuleList(layers)
        self.sends = sends

    def forward(self, x: Tensor, *others: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = x
        for gate, other in zip(self.gates, others, strict=True):
            y = y + gate(x, other)
        for layer in self.layers:
            y = layer(y)
        if self.sends == "map":
            return y
        means = y.mean((2, 3), keepdim=True)
        return means if self.sends == "features" else (y, means)


class Stem(nn.Sequential):
    """The 3x3 convolution that halves the side of the input, of weights of 4 bits."""

    def __init__(self, inputs: int, outputs: int) -> None:
        conv = quantize(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), FourBits())
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Head(nn.Sequential):
    """The linear layer, of weights of 4 bits, that reads all branches' means."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__(nn.Flatten(), quantize(nn.Linear(features, classes), FourBits()))
