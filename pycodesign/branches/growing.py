"""Networks of branches from narrower ones that are trained: a start for the candidates of a search."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from pycodesign.branches.lowering import make_plain
from pycodesign.branches.network import Network
from pycodesign.branches.operators import BranchBody, Concatenate, Pooled
from pycodesign.growth import Spec, batch_norm, depthwise, grow, linear
from pycodesign.growth.spec import Layer

__all__ = ["grow_network", "make_spec"]

CHANNELS = "channels"  # of the stem; a segment has two, four ... times as many, one copy after another


def grow_network(source: Network, target: Network, *, seed: int = 0, inputs: Any = None) -> Any:
    """Fill a network's weights from a trained one of the same architecture and fewer channels, by `growth.grow`.

    With the float weights behind quantized ones both compute the same. Levels and scales are then found anew, so that
    of quantized networks the function is kept as far as those allow.

    Parameters
    ----------
    source, target : Network
        Of `Space.build`.
    seed, inputs
        As `growth.grow` takes them.

    Returns
    -------
    growth.Report
        With `inputs`, of the float weights.

    Raises
    ------
    ValueError
        If the architectures differ.

    Examples
    --------
    >>> import torch
    >>> from pycodesign.branches import Space, grow_network
    >>> spaces = [Space(width=width, operators=("conv3x3", "separable"), size=8) for width in (4, 6)]
    >>> architecture = spaces[0].sample(seed=0)
    >>> small, large = (space.build(architecture) for space in spaces)
    >>> report = grow_network(small, large)
    >>> sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in large.parameters())
    True
    """
    parts = [[(part.name, part.reads, part.writes, part.segment) for part in net.parts] for net in (source, target)]
    if parts[0] != parts[1]:
        raise ValueError("target: expected the architecture of the source, wider, got another one")
    small, large = _strip(copy.deepcopy(source)), _strip(copy.deepcopy(target))
    report = grow(small, large, spec=make_spec(small), seed=seed, inputs=inputs)
    quantized = {name for name, layer in target.named_modules() if parametrize.is_parametrized(layer)}

    def rename(name: str) -> str:
        owner = name.removesuffix(".weight")
        return f"{owner}.parametrizations.weight.original" if owner in quantized else name

    target.load_state_dict({rename(name): value for name, value in large.state_dict().items()})
    return report


def _strip(module: Any) -> Any:
    """Replace quantized layers by float ones of the weights behind them."""
    for name, child in module.named_children():
        if parametrize.is_parametrized(child):
            setattr(module, name, make_plain(child, child.parametrizations.weight.original))
        else:
            _strip(child)
    return module


def make_spec(net: Network) -> Spec:
    """Say what the axes of a network's parameters mean."""
    layers: dict[str, Layer] = {}
    last = max(part.segment for part in net.parts)
    branches = 1 + max(part.branch for part in net.parts)
    for part in net.parts:
        name, module = f"bodies.{part.key}", net.bodies[part.key]
        if isinstance(module, BranchBody):
            before = _name_space(max(part.segment - 1, 0))
            for index, gate in enumerate(module.gates):
                reads = f"{before}+{before}" if isinstance(gate, Concatenate) else before
                if isinstance(gate, (Concatenate, Pooled)):
                    layers |= _list_layers(f"{name}.gates.{index}", gate, reads, before)
            for index, layer in enumerate(module.layers):
                space = _name_space(part.segment)
                layers |= _list_layers(f"{name}.layers.{index}", layer, before if index == 0 else space, space)
        elif part.name == "head":
            layers |= _list_layers(name, module, "+".join([_name_space(last)] * branches), None)
        else:
            layers |= _list_layers(name, module, None, CHANNELS)
    return Spec("network of branches", layers)


def _name_space(segment: int) -> str:
    return "+".join([CHANNELS] * (1 << segment))


def _list_layers(name: str, module: nn.Module, reads: str | None, writes: str | None) -> Iterator[tuple[str, Layer]]:
    """Yield the layers of a Sequential, or of a gate."""
    space = reads
    for child, layer in module.named_children():
        if isinstance(layer, nn.BatchNorm2d):
            yield f"{name}.{child}", batch_norm(space or "")
        elif isinstance(layer, (nn.Conv2d, nn.Linear)):
            alone = isinstance(layer, nn.Conv2d) and layer.groups > 1
            space = reads if alone else writes
            yield f"{name}.{child}", depthwise(reads or "") if alone else linear(reads, writes)
