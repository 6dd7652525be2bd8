"""The networks that are timed whole: torch modules with random quantized weights, and their operations one by one.

Stem and classifier keep float weights, which int8 engines and our uint8 networks round to 8 bits; every other layer has
few distinct weights. The statistics of each BatchNorm are those of random images, so activations keep their size, and
its gains lie around one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from pycodesign import quantize
from pycodesign.bench.cases import LARGEST, find_quantizer

CLASSES = {224: 1000, 32: 10}  # by the images' height and width
CALIBRATION_IMAGES = 16
CHECKED_IMAGES = 16
PATCHES = 4  # in each direction of an image
INT8_MAX = 127

Floats = NDArray[np.float32]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016), which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False)).append(nn.BatchNorm2d(outputs))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        result: Tensor = self.relu2(y + self.shortcut(x))
        return result


def make_resnet18() -> nn.Module:
    """ResNet-18 for images of 224 x 224."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return _make_resnet(stem, (64, 128, 256, 512), blocks=2, classes=CLASSES[224])


def make_resnet20() -> nn.Module:
    """ResNet-20 for images of 32 x 32, its shortcuts 1x1 convolutions where the shape changes."""
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return _make_resnet(stem, (16, 32, 64), blocks=3, classes=CLASSES[32])


def _make_resnet(stem: Iterable[nn.Module], widths: tuple[int, ...], blocks: int, classes: int) -> nn.Module:
    layers, inputs = [*stem], widths[0]
    for outputs in widths:
        for _ in range(blocks):
            layers.append(BasicBlock(inputs, outputs, 2 if inputs < outputs else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def make_vgg_small() -> nn.Module:
    """VGG-small for images of 32 x 32, the usual test of binary and ternary networks (Zhang et al., LQ-Nets, 2018)."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs in (128, 256, 512):
        for last in (False, True):
            layers += [nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)][: int(last)]
            inputs = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512 * 4 * 4, CLASSES[32]))


class Architecture(NamedTuple):
    """How to make a network, and the height and width of its images."""

    make: Callable[[], nn.Module]
    size: int


NETWORKS = {
    "resnet18": Architecture(make_resnet18, 224),
    "resnet20": Architecture(make_resnet20, 32),
    "vgg-small": Architecture(make_vgg_small, 32),
}


class LayerWeights(NamedTuple):
    """Weights of a layer with the BatchNorm behind it folded in.

    Parameters
    ----------
    floats : float32 (O, C, kH, kW) or (O, I)
        What float32 engines get; of stem and classifier not rounded.
    integers : int8, shape of floats
    scale : float32 (O,)
        ``integers * scale`` is what int8 engines get.
    bias : float32 (O,)
    """

    floats: Floats
    integers: NDArray[np.int8]
    scale: Floats
    bias: Floats


@dataclass(frozen=True, eq=False)
class Step:
    """One operation of a network.

    Parameters
    ----------
    name : str
        Of the operation and of its result.
    kind : {"conv2d", "linear", "add", "relu", "max_pool2d", "avg_pool2d", "flatten"}
        The average pooling is global.
    sources : tuple of str
        Names of earlier results; ``"x"`` is the network's input.
    module : torch.nn.Module, optional
        Holds strides, paddings and kernel sizes.
    weights : LayerWeights, optional
    """

    name: str
    kind: str
    sources: tuple[str, ...]
    module: Any = None
    weights: LayerWeights | None = None


class Grid(NamedTuple):
    """Real value of a uint8: ``scale * (code - zero_point)``."""

    scale: float
    zero_point: int


@dataclass(frozen=True, eq=False)
class Network:
    """A network, its input, and the logits to expect.

    Parameters
    ----------
    name : str
    weights : str
        As `cases.Case.random` takes it.
    model : torch.nn.Module
        In evaluation mode.
    x : (N, 3, H, W) float32
        What is timed.
    checked : (B, N, 3, H, W) float32
        B batches of images to compare logits on.
    calibration : (M, 3, H, W) float32
    """

    name: str
    weights: str
    model: nn.Module
    x: Floats
    checked: Floats
    calibration: Floats

    @classmethod
    def random(cls, name: str, weights: str, batch: int, *, seed: int = 0) -> Network:
        """Make a network of `NETWORKS` with random weights and images, quantized by a function of `quantize`."""
        architecture = NETWORKS[name]
        rng = np.random.default_rng(seed)
        shape = (3, architecture.size, architecture.size)
        calibration = _make_images(rng, CALIBRATION_IMAGES, shape)
        checked = _make_images(rng, math.ceil(CHECKED_IMAGES / batch) * batch, shape).reshape(-1, batch, *shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = architecture.make()
            _quantize_body(model, find_quantizer(weights))
            _settle(model, torch.from_numpy(calibration))
        return cls(name, weights, model.eval(), checked[0], checked, calibration)

    @cached_property
    def expected(self) -> NDArray[np.float64]:
        """Logits of the `checked` images in float64, (B, N, classes)."""
        model = copy.deepcopy(self.model).double()
        with torch.inference_mode():
            return np.stack([model(torch.from_numpy(x).double()).numpy() for x in self.checked])

    @cached_property
    def steps(self) -> list[Step]:
        """The operations in order."""
        return trace_steps(self.model)

    @cached_property
    def consumers(self) -> dict[str, list[Step]]:
        """Who reads each result."""
        found: dict[str, list[Step]] = {name: [] for name in ("x", *(step.name for step in self.steps))}
        for step in self.steps:
            for source in step.sources:
                found[source].append(step)
        return found

    @cached_property
    def grids(self) -> dict[str, Grid]:
        """How uint8 holds each result: from the least to the largest value over the `calibration` images, and zero."""
        values = run_steps(self.steps, torch.from_numpy(self.calibration))
        grids: dict[str, Grid] = {}
        for name, value in values.items():
            low, high = min(float(value.min()), 0.0), max(float(value.max()), 0.0)
            scale = float(np.float32((high - low) / LARGEST["uint8"])) or 1.0
            grids[name] = Grid(scale, round(-low / scale))
        for step in self.steps:
            if step.kind in ("max_pool2d", "flatten"):
                grids[step.name] = grids[step.sources[0]]
        return grids

    @cached_property
    def macs(self) -> int:
        """Multiply-adds of the dense layers, of a whole batch."""
        values = run_steps(self.steps, torch.from_numpy(self.x))
        sizes = ((values[step.name].numel(), step.weights.floats[0].size) for step in self.steps if step.weights)
        return sum(outputs * terms for outputs, terms in sizes)

    @property
    def int8_bytes(self) -> int:
        """Bytes of all layers' weights in an int8 engine: one each, and a scale and a bias of four bytes per output."""
        layers = (step.weights for step in self.steps if step.weights)
        return sum(w.integers.size + 8 * w.scale.size for w in layers)


def trace_steps(model: nn.Module) -> list[Step]:
    """List the operations of a network, each BatchNorm folded into the layer before it."""
    traced = fx.symbolic_trace(model)
    alias: dict[str, str] = {}  # results that are others', by node
    found: dict[str, Step] = {}
    for node in traced.graph.nodes:
        sources = tuple(alias.get(source.name, source.name) for source in node.all_input_nodes)
        module = traced.get_submodule(node.target) if node.op == "call_module" else None
        if node.op == "placeholder":
            alias[node.name] = "x"
        elif isinstance(module, nn.BatchNorm2d):
            alias[node.name] = sources[0]
            found[sources[0]] = _fold(found[sources[0]], module)
        elif isinstance(module, (nn.Identity, nn.Sequential)):
            alias[node.name] = sources[0]
        elif node.op != "output":
            kind = _KINDS[type(module)] if module else "add"
            weights = _read_weights(module) if isinstance(module, (nn.Conv2d, nn.Linear)) else None
            found[node.name] = Step(node.name, kind, sources, module, weights)
    return list(found.values())


_KINDS: dict[type[nn.Module], str] = {
    nn.Conv2d: "conv2d",
    nn.Linear: "linear",
    nn.ReLU: "relu",
    nn.MaxPool2d: "max_pool2d",
    nn.AdaptiveAvgPool2d: "avg_pool2d",
    nn.Flatten: "flatten",
}


def run_steps(steps: Iterable[Step], x: Tensor) -> dict[str, Tensor]:
    """Compute every result in float32, by name."""
    values = {"x": x}
    with torch.inference_mode():
        for step in steps:
            function, arguments = torch_call(step)
            tensors = [torch.from_numpy(a) for a in (step.weights.floats, step.weights.bias)] if step.weights else []
            values[step.name] = function(*(values[source] for source in step.sources), *tensors, *arguments)
    return values


def torch_call(step: Step) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """Give the function that computes a step, and what follows its sources, weights and bias."""
    functional, module = nn.functional, step.module
    calls: dict[str, Callable[[], tuple[Callable[..., Tensor], tuple[Any, ...]]]] = {
        "conv2d": lambda: (torch.conv2d, (list(module.stride), list(module.padding))),
        "linear": lambda: (functional.linear, ()),
        "add": lambda: (torch.add, ()),
        "relu": lambda: (functional.relu, ()),
        "max_pool2d": lambda: (functional.max_pool2d, (module.kernel_size, module.stride, module.padding)),
        "avg_pool2d": lambda: (functional.adaptive_avg_pool2d, (1,)),
        "flatten": lambda: (torch.flatten, (1,)),
    }
    return calls[step.kind]()


def _quantize_body(model: nn.Module, quantizer: Callable[[Any], quantize.QuantizedTensor]) -> None:
    """Round the weights of all convolutions but the first to few values."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        for convolution in convolutions[1:]:
            convolution.weight.copy_(torch.from_numpy(quantizer(convolution.weight.numpy()).dequantize()))


def _settle(model: nn.Module, images: Tensor) -> None:
    """Choose gains and biases, take the statistics of the images that reach each BatchNorm, balance the classes."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        norm.momentum = None  # the statistics are those of the one batch that follows
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        classifier.bias.sub_(model.train()(images).mean(0))


def _make_images(rng: np.random.Generator, count: int, shape: tuple[int, int, int]) -> Floats:
    """Draw patches of color under noise: the means over pixels, and so the logits, differ from image to image."""
    channels, height, width = shape
    patches = rng.standard_normal((count, channels, PATCHES, PATCHES), np.float32)
    large = patches.repeat(height // PATCHES, axis=2).repeat(width // PATCHES, axis=3)
    noise = rng.standard_normal(large.shape, np.float32) / np.float32(2)
    images: Floats = (large + noise).astype(np.float32)
    return images


def _read_weights(module: nn.Conv2d | nn.Linear) -> LayerWeights:
    """Weights of a layer as they are: small integers where they are multiples of a step, else rounded to 8 bits."""
    floats = module.weight.detach().numpy()
    try:
        q = quantize.from_fake_quantized(floats)
        if np.abs(q.levels).max() > INT8_MAX or np.any(q.levels != np.rint(q.levels)):
            raise ValueError
    except ValueError:
        q = quantize.uniform(floats, 8)
    sign = np.where(q.scale < 0, np.float32(-1), np.float32(1))  # engines take positive scales only
    integers = (q.decode() * _per_output(sign, floats)).astype(np.int8)
    bias = np.zeros(len(floats), np.float32) if module.bias is None else module.bias.detach().numpy()
    return LayerWeights(floats, integers, np.where(q.scale == 0, np.float32(1), q.scale * sign), bias)


def _fold(step: Step, norm: nn.BatchNorm2d) -> Step:
    """Fold a BatchNorm with positive gains into the layer before it."""
    assert step.weights and norm.running_mean is not None and norm.running_var is not None
    floats, integers, scale, bias = step.weights
    gain = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach().numpy()
    bias = (bias - norm.running_mean.numpy()) * gain + norm.bias.detach().numpy()
    return replace(step, weights=LayerWeights(floats * _per_output(gain, floats), integers, scale * gain, bias))


def _per_output(values: Floats, like: Floats) -> Floats:
    """Shape (O,) values to broadcast over weights."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))
