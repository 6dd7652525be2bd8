"""Bodies of networks as native chains, which run without Python; and as torch modules, where they cannot."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pycodesign import ops, quantize
from pycodesign.branches.converted import is_hooked
from pycodesign.branches.graph import Body, Value
from pycodesign.branches.operators import Add, BranchBody, Concatenate, Repeat
from pycodesign.quantize import QuantizedTensor
from pycodesign.repetition import chain as chains
from pycodesign.repetition.chain import Chain

__all__ = ["CannotChain", "build_chain", "lower_body", "simplify"]

CONV2D = ("stride", "padding", "dilation", "groups")


class CannotChain(ValueError):
    """A module has a layer that native chains do not have."""


def lower_body(body: Body, values: Mapping[str, Value]) -> Body:
    """Return a body as fast as it can be: a `Chain` where all of its layers are native, else a simplified module."""
    if not isinstance(body.run, nn.Module):
        return body
    try:
        dimensions = {len(values[piece.value].shape) for piece in body.inputs}
        if dimensions not in ({2}, {4}):
            raise CannotChain(f"inputs: expected 2 or 4 dimensions, got {sorted(dimensions)}")
        chain = build_chain(body.run, len(body.inputs), is_flat=dimensions == {2})
    except CannotChain:
        return replace(body, run=simplify(body.run))
    return replace(body, run=chain, arrays="numpy")


def build_chain(module: nn.Module, inputs: int = 1, *, is_flat: bool = False) -> Chain:
    """Make one native call of a part of a network.

    Parameters
    ----------
    module : torch.nn.Module
        In evaluation mode: a `BranchBody`, or a Sequential of convolutions of few weights, norms, ReLU and pooling.
    inputs : int
    is_flat : bool
        Whether they are (N, I), not (N, C, H, W).

    Raises
    ------
    CannotChain
        For float weights, gates of pooled vectors, hooks, and whatever else chains do not do as torch does: `simplify`
        such a module instead.
    """
    chain = Chain()
    values = [chain.input() for _ in range(inputs)]
    if find_class(module) is not BranchBody:
        if inputs != 1:
            raise CannotChain(f"module: expected one of one input, got {inputs}")
        chain.output(_as_new(chain, _add_layers(chain, module, values[0], is_flat), values))
        return chain
    assert isinstance(module, BranchBody)
    y = values[0]
    for gate, other in zip(module.gates, values[1:], strict=True):
        if find_class(gate) is Add:
            y = chain.add(y, other)
        elif find_class(gate) is Concatenate:
            y = chain.add(y, _add_concatenation(chain, gate, values[0], other))
        else:
            raise CannotChain(f"gate: expected one that is native, got {type(gate).__name__}")
    for layer in module.layers:
        y = _add_layers(chain, layer, y, is_flat)
    y = _as_new(chain, y, values)
    if module.sends == "map":
        chain.output(y)
    else:
        means = chain.avg_pool2d(y)
        chain.output(*([means] if module.sends == "features" else [y, means]))
    return chain


def find_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that says what a module does: `nn.Sequential` for those that run their layers and do no more,
    `nn.Module` where there are hooks."""
    if is_hooked(module):
        return nn.Module
    found: type[nn.Module] = parametrize.type_before_parametrizations(module)
    return nn.Sequential if found.forward is nn.Sequential.forward else found


def _as_new(chain: Chain, y: chains.Value, inputs: list[chains.Value]) -> chains.Value:
    return chain.add(y) if any(y is x for x in inputs) else y


def _add_layers(chain: Chain, module: nn.Module, y: chains.Value, is_flat: bool) -> chains.Value:
    """Add the steps of a layer, or of a Sequential."""
    layers = list(_list_layers(module))
    while layers:
        layer: Any = layers.pop(0)
        kind, following = find_class(layer), find_class(layers[0]) if layers else None
        if kind is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            norm = layers.pop(0) if following is nn.BatchNorm2d else None
            q, bias = read_weights(layer, norm)
            options: dict[str, Any] = {name: getattr(layer, name) for name in CONV2D}
            y = chain.conv2d(y, ops.prepack_conv2d(q, bias, **options), clamp=_take_clamp(layers))
        elif kind is nn.Linear and is_flat:  # torch's reads the last dimension
            y = chain.linear(y, ops.prepack_linear(*read_weights(layer, None)), clamp=_take_clamp(layers))
        elif kind is nn.AvgPool2d and not layer.ceil_mode and layer.divisor_override is None:
            windows = layer.kernel_size, layer.stride, layer.padding
            y = chain.avg_pool2d(y, *windows, count_include_pad=layer.count_include_pad)
        elif kind is Repeat:
            y = chain.conv2d(y, ops.prepack_conv2d(_make_repetition(layer.channels, layer.times)))
        elif kind is nn.Flatten and following is nn.Linear and (layer.start_dim, layer.end_dim) == (1, -1):
            is_flat = True
        else:
            raise CannotChain(f"module: expected native layers, got {layer}")
    return y


def _list_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a layer, or those of a Sequential, which may hold others."""
    if isinstance(module, nn.Sequential) and find_class(module) is nn.Sequential:
        for layer in module:
            yield from _list_layers(layer)
    elif find_class(module) is not nn.Identity:
        yield module


def _take_clamp(layers: list[nn.Module]) -> tuple[float, None] | None:
    """Return what a ReLU does, which is taken off the layers to come, if it is the next one."""
    if not layers or find_class(layers[0]) is not nn.ReLU:
        return None
    layers.pop(0)
    return 0.0, None


def _make_repetition(channels: int, times: int) -> QuantizedTensor:
    """Return the weights, 0 and 1, of the 1x1 convolution that repeats channels."""
    codes = np.tile(np.eye(channels, dtype=np.uint8), (times, 1))[:, :, None, None]
    return QuantizedTensor(codes, np.array([0, 1], np.float32), np.ones(times * channels, np.float32))


def _add_concatenation(chain: Chain, gate: Any, x: chains.Value, other: chains.Value) -> chains.Value:
    """Add a 1x1 convolution of two values' channels as two, the second of which adds the first."""
    if (find_class(gate.conv), find_class(gate.norm)) != (nn.Conv2d, nn.BatchNorm2d):
        raise CannotChain(f"gate: expected a convolution and a norm without hooks, got {gate}")
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
    try:
        q = quantize.from_fake_quantized(layer.weight)
    except ValueError as error:  # another parametrization
        raise CannotChain(f"module: expected weights of few values, got {error}") from error
    bias: Tensor | None = None if layer.bias is None else layer.bias.detach().double()
    if isinstance(norm, nn.BatchNorm2d):
        if norm.running_mean is None or norm.running_var is None:
            raise CannotChain(f"module: expected a norm by running means, got {norm}")
        factor = (norm.running_var.double() + norm.eps).rsqrt()
        factor = factor if norm.weight is None else norm.weight.detach().double() * factor
        bias = ((0.0 if bias is None else bias) - norm.running_mean.double()) * factor
        bias = bias if norm.bias is None else norm.bias.detach().double() + bias
        q = QuantizedTensor(q.codes, q.levels, (q.scale * factor.numpy()).astype(np.float32))
    return q, None if bias is None else bias.float().numpy()


def simplify(module: nn.Module) -> nn.Module:
    """Return a copy of a module for inference alone: quantizers evaluated, norms folded into convolutions.

    Modules of other classes, and those with hooks, are left as they are.
    """
    return _fold(copy.deepcopy(module).eval()).requires_grad_(False)


def _fold(module: nn.Module) -> nn.Module:
    kind = find_class(module)
    if kind in (nn.Conv2d, nn.Linear) and parametrize.is_parametrized(module):
        return make_plain(module, module.weight)
    if kind not in (nn.Sequential, nn.ModuleList, BranchBody, Concatenate):
        return module
    for name, child in module.named_children():
        setattr(module, name, _fold(child))
    if isinstance(module, Concatenate) and (fused := _fuse(module.conv, module.norm)):
        module.conv, module.norm = fused, nn.Identity()
    if not isinstance(module, nn.Sequential):
        return module
    layers: list[Any] = []
    for layer in module:
        if layers and (fused := _fuse(layers[-1], layer)):
            layers[-1] = fused
        else:
            layers.append(layer)
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def _fuse(conv: Any, norm: Any) -> nn.Module | None:
    """Return a convolution and the norm behind it as one, if that is what they are."""
    if (find_class(conv), find_class(norm)) != (nn.Conv2d, nn.BatchNorm2d) or norm.running_mean is None:
        return None
    fused: nn.Module = nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
    return fused


def make_plain(layer: nn.Module, weight: Any) -> nn.Module:
    """Return a layer without its quantizer. (To remove that one would change the class of all copies.)"""
    if isinstance(layer, nn.Linear):
        plain: nn.Module = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    elif isinstance(layer, nn.Conv2d):
        names = (*CONV2D, "kernel_size", "padding_mode")
        options: dict[str, Any] = {name: getattr(layer, name) for name in names}
        plain = nn.Conv2d(layer.in_channels, layer.out_channels, bias=layer.bias is not None, **options)
    else:
        raise CannotChain(f"module: expected convolutions and linear layers, got {type(layer).__name__}")
    plain.weight = nn.Parameter(weight.detach().clone())
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().clone())
    return plain.eval()
