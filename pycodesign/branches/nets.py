"""Two fixed networks of branches: in one they meet once, at the end, in the other all the time."""

from __future__ import annotations

import torch
from torch import nn

from pycodesign._arguments import to_integer
from pycodesign.branches.network import Network, Part

__all__ = ["build_inception", "build_parnet"]


def build_parnet(
    streams: int = 2,
    depth: int = 4,
    width: int = 64,
    *,
    channels: int = 3,
    classes: int = 10,
    size: int = 32,
    batch: int = 1,
    seed: int = 0,
) -> Network:
    """Build a ParNet-like network: streams at falling resolutions that meet once, behind their global pooling.

    Stream k works on maps of half the side of stream k - 1, with twice the channels: all take about as long. Each block
    is the one 3x3 convolution that ParNet's blocks become when they are re-parameterized; its squeeze-and-excitation is
    left out.

    Parameters
    ----------
    streams, depth : int
        How many, and how many 3x3 convolutions each has.
    width : int
        Channels of the stem and of the first stream.
    channels, classes, size, batch : int
        The input is (batch, channels, size, size), the result (batch, classes).
    seed : int
        Of the weights.

    Raises
    ------
    TypeError, ValueError
        For numbers below 1.

    References
    ----------
    Goyal et al., Non-deep Networks, 2021.

    Examples
    --------
    >>> from pycodesign.branches import build_parnet
    >>> list(build_parnet().to_graph().bodies)
    ['stem', 'stream.0', 'stream.1', 'head']
    """
    for name, value in (("streams", streams), ("depth", depth), ("width", width)):
        to_integer(name, value, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: list[tuple[Part, nn.Module]] = [
            (Part("stem", ("x",), (("stem", 0),), may_recompute=True), _unit(channels, width, 3, stride=2))
        ]
        for k in range(streams):
            outputs = width << k
            layers: list[nn.Module] = [nn.AvgPool2d(1 << k)] if k else []
            layers += [_unit(width if i == 0 else outputs, outputs, 3) for i in range(depth)]
            stream = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
            parts.append((Part(f"stream.{k}", ("stem",), (("features", k),), branch=k, segment=0), stream))
        head = nn.Linear(width * ((1 << streams) - 1), classes)
        parts.append((Part("head", ("features",), (("y", 0),)), head))
    return Network(parts, (batch, channels, size, size)).eval()


def build_inception(
    modules: int = 4,
    width: int = 128,
    *,
    channels: int = 3,
    classes: int = 10,
    size: int = 32,
    batch: int = 1,
    seed: int = 0,
) -> Network:
    """Build an Inception-like network: modules of four branches, each of which writes its slice of a concatenation.

    The branches are a 1x1 convolution; a 1x1 and a 3x3 one; a 1x1 and two 3x3 ones; and a 1x1 one with an average
    pooling behind it, where it has fewer channels to work on. The first and the second together take about as long as
    the third and the fourth.

    Parameters
    ----------
    modules : int
    width : int
        Channels between modules, a multiple of 4.
    channels, classes, size, batch, seed
        As `build_parnet` takes them.

    Raises
    ------
    TypeError, ValueError
        For numbers below 1, and another `width`.

    References
    ----------
    Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2016.

    Examples
    --------
    >>> from pycodesign.branches import build_inception
    >>> graph = build_inception(modules=1).to_graph()
    >>> list(graph.bodies)
    ['stem', 'module.0.0', 'module.0.1', 'module.0.2', 'module.0.3', 'head']
    >>> [body.outputs[0].begin for body in graph.bodies.values()]
    [0, 0, 32, 64, 96, 0]
    """
    to_integer("modules", modules, 1)
    if to_integer("width", width, 1) % 4:
        raise ValueError(f"width: expected a multiple of 4, got {width}")
    quarter = width // 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: list[tuple[Part, nn.Module]] = [
            (Part("stem", ("x",), (("value.0", 0),), may_recompute=True), _unit(channels, width, 3, stride=2))
        ]
        for m in range(modules):
            branches = [
                _unit(width, quarter, 1),
                nn.Sequential(_unit(width, width, 1), _unit(width, quarter, 3)),
                nn.Sequential(_unit(width, quarter, 1), _unit(quarter, quarter, 3), _unit(quarter, quarter, 3)),
                nn.Sequential(_unit(width, quarter, 1), nn.AvgPool2d(3, 1, 1)),
            ]
            for b, branch in enumerate(branches):
                name = f"module.{m}.{b}"
                parts.append((Part(name, (f"value.{m}",), ((f"value.{m + 1}", b),), branch=b, segment=m), branch))
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
        parts.append((Part("head", (f"value.{modules}",), (("y", 0),)), head))
    return Network(parts, (batch, channels, size, size)).eval()


def _unit(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())
