"""Bodies of networks as native chains, which run without Python; and as torch modules, where they cannot."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pycodesign import ops, quantize
from pycodesign.branches.graph import Body
from pycodesign.branches.operators import Add, BranchBody, Concatenate, Repeat
from pycodesign.quantize import QuantizedTensor
from pycodesign.repetition.chain import Chain, Value

__all__ = ["CannotChain", "build_chain", "lower_body", "simplify"]


class CannotChain(ValueError):
    """A module has a layer that native chains do not have."""


def lower_body(body: Body) -> Body:
    """Return a body as fast as it can be: a `Chain` where all of its layers are native, else a simplified module."""
    if not isinstance(body.run, nn.Module):
        return body
    try:
        chain = build_chain(body.run, len(body.inputs))
    except CannotChain:
        return replace(body, run=simplify(body.run))
    return replace(body, run=chain, arrays="numpy")


def build_chain(module: nn.Module, inputs: int = 1) -> Chain:
    """Make one native call of a part of a network.

    Parameters
    ----------
    module : torch.nn.Module
        In evaluation mode: a `BranchBody`, or a Sequential of convolutions of few weights, norms, ReLU and pooling.
    inputs : int

    Raises
    ------
    CannotChain
        For float weights, and for gates of pooled vectors: `simplify` such a module instead.
    """
    chain = Chain()
    values = [chain.input() for _ in range(inputs)]
    if not isinstance(module, BranchBody):
        chain.output(_as_new(chain, _add_layers(chain, module, values[0]), values))
        return chain
    y = values[0]
    for gate, other in zip(module.gates, values[1:], strict=True):
        if isinstance(gate, Add):
            y = chain.add(y, other)
        elif isinstance(gate, Concatenate):
            y = chain.add(y, _add_concatenation(chain, gate, values[0], other))
        else:
            raise CannotChain(f"gate: expected one that is native, got {type(gate).__name__}")
    for layer in module.layers:
        y = _add_layers(chain, layer, y)
    y = _as_new(chain, y, values)
    if module.sends == "map":
        chain.output(y)
    else:
        means = chain.avg_pool2d(y)
        chain.output(*([means] if module.sends == "features" else [y, means]))
    return chain


def _as_new(chain: Chain, y: Value, inputs: list[Value]) -> Value:
    return chain.add(y) if any(y is x for x in inputs) else y


def _add_layers(chain: Chain, module: nn.Module, y: Value) -> Value:
    """Add the steps of a Sequential."""
    layers = list(module) if isinstance(module, nn.Sequential) else [module]
    while layers:
        layer = layers.pop(0)
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            norm = layers.pop(0) if layers and type(layers[0]) is nn.BatchNorm2d else None
            clamp = (0.0, None) if layers and type(layers[0]) is nn.ReLU else None
            layers = layers[1:] if clamp else layers
            q, bias = read_weights(layer, norm)
            if isinstance(layer, nn.Linear):
                y = chain.linear(y, ops.prepack_linear(q, bias), clamp=clamp)
                continue
            options: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
            y = chain.conv2d(y, ops.prepack_conv2d(q, bias, **options), clamp=clamp)
        elif isinstance(layer, nn.AvgPool2d):
            y = chain.avg_pool2d(y, layer.kernel_size, layer.stride, layer.padding, count_include_pad=False)
        elif isinstance(layer, Repeat):
            y = chain.conv2d(y, ops.prepack_conv2d(_make_repetition(layer.channels, layer.times)))
        elif not isinstance(layer, (nn.Flatten, nn.Identity)):
            raise CannotChain(f"module: expected native layers, got {type(layer).__name__}")
    return y


def _make_repetition(channels: int, times: int) -> QuantizedTensor:
    """Return the weights, 0 and 1, of the 1x1 convolution that repeats channels."""
    codes = np.tile(np.eye(channels, dtype=np.uint8), (times, 1))[:, :, None, None]
    return QuantizedTensor(codes, np.array([0, 1], np.float32), np.ones(times * channels, np.float32))


def _add_concatenation(chain: Chain, gate: Concatenate, x: Value, other: Value) -> Value:
    """Add a 1x1 convolution of two values' channels as two, the second of which adds the first."""
    q, bias = read_weights(gate.conv, gate.norm)
    half = q.shape[1] // 2
    first, second = (
        QuantizedTensor(np.ascontiguousarray(codes), q.levels, q.scale) for codes in np.split(q.codes, [half], 1)
    )
    y = chain.conv2d(x, ops.prepack_conv2d(first, bias))
    return chain.conv2d(other, ops.prepack_conv2d(second), residual=y)


def read_weights(layer: nn.Module, norm: nn.Module | None) -> tuple[QuantizedTensor, NDArray[np.float32] | None]:
    """Return a layer's weights as they are, and its bias, with the batch normalization behind it folded into both.

    Raises
    ------
    CannotChain
        If the weights are not those of a quantizer.
    """
    if not parametrize.is_parametrized(layer):
        raise CannotChain(f"module: expected weights of few values, got float ones in {type(layer).__name__}")
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    q = quantize.from_fake_quantized(layer.weight)
    bias: Tensor | None = None if layer.bias is None else layer.bias.detach().double()
    if isinstance(norm, nn.BatchNorm2d):
        assert norm.running_mean is not None and norm.running_var is not None
        factor = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
        shift = (0.0 if bias is None else bias) - norm.running_mean.double()
        bias = norm.bias.detach().double() + shift * factor
        q = QuantizedTensor(q.codes, q.levels, (q.scale * factor.numpy()).astype(np.float32))
    return q, None if bias is None else bias.float().numpy()


def simplify(module: nn.Module) -> nn.Module:
    """Return a copy of a module for inference alone: quantizers evaluated, norms folded into convolutions."""
    return _fold(copy.deepcopy(module).eval()).requires_grad_(False)


def _fold(module: nn.Module) -> nn.Module:
    if parametrize.is_parametrized(module):
        return make_plain(module, module.weight)
    for name, child in module.named_children():
        setattr(module, name, _fold(child))
    if isinstance(module, Concatenate):
        assert isinstance(module.norm, nn.BatchNorm2d)
        module.conv = nn.utils.fusion.fuse_conv_bn_eval(module.conv, module.norm)
        module.norm = nn.Identity()
    if not isinstance(module, nn.Sequential):
        return module
    layers: list[nn.Module] = []
    for layer in module:
        if type(layer) is nn.BatchNorm2d and layers and type(layers[-1]) is nn.Conv2d:
            layers[-1] = nn.utils.fusion.fuse_conv_bn_eval(layers[-1], layer)
        else:
            layers.append(layer)
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def make_plain(layer: nn.Module, weight: Any) -> nn.Module:
    """Return a layer without its quantizer. (To remove that one would change the class of all copies.)"""
    if isinstance(layer, nn.Linear):
        plain: nn.Module = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    elif isinstance(layer, nn.Conv2d):
        names = ("kernel_size", "stride", "padding", "dilation", "groups")
        options: dict[str, Any] = {name: getattr(layer, name) for name in names}
        plain = nn.Conv2d(layer.in_channels, layer.out_channels, bias=layer.bias is not None, **options)
    else:
        raise CannotChain(f"module: expected convolutions and linear layers, got {type(layer).__name__}")
    plain.weight = nn.Parameter(weight.detach().clone())
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().clone())
    return plain.eval()
