"""Specs of plain `torch.nn.Sequential` networks, read from their modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from torch import nn

from pycodesign.growth.spec import (
    Layer,
    Spec,
    batch_norm,
    depthwise,
    embedding,
    keep,
    layer_norm,
    linear,
)

__all__ = ["make_sequential_spec"]

Modules: TypeAlias = tuple[type[nn.Module], ...]

# Applied to each feature alone; the first kind keeps zeros.
ZERO_KEEPING: Modules = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh)
ZERO_KEEPING += (nn.Hardtanh, nn.Hardswish, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Identity)
ZERO_KEEPING += (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
ELEMENTWISE: Modules = (*ZERO_KEEPING, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid, nn.Flatten)
ELEMENTWISE += (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
ELEMENTWISE += (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.ZeroPad2d, nn.Upsample)
ELEMENTWISE += (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
BATCH_NORMS: Modules = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
WRITERS: Modules = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
FEATUREWISE: Modules = (*ELEMENTWISE, *BATCH_NORMS, nn.LayerNorm, nn.RMSNorm)


def make_sequential_spec(source: nn.Sequential, target: nn.Sequential) -> Spec:
    """Say what the axes of a Sequential's parameters mean.

    Parameters
    ----------
    source, target : torch.nn.Sequential
        Linear layers, embeddings, convolutions (of one group, or depthwise), BatchNorm, LayerNorm, RMSNorm, and modules
        that work on each feature alone; nested ones, too. The same modules in both, but for sizes.

    Returns
    -------
    Spec
        Inputs of the first layer and outputs of the last keep their number.

    Raises
    ------
    ValueError
        If there is another module, named; or if the modules differ.
    """
    modules = list(_list_leaves(source))
    others = list(_list_leaves(target))
    if [(name, type(module)) for name, module in modules] != [(name, type(module)) for name, module in others]:
        raise ValueError("target: expected the source's modules, larger, got others")
    layers: dict[str, Layer] = {}
    spaces: dict[str, str] = {}
    writers = [name for name, module in modules if isinstance(module, WRITERS)]
    space = None
    for position, (name, module) in enumerate(modules):
        if isinstance(module, ELEMENTWISE):
            continue
        if isinstance(module, WRITERS):
            groups = getattr(module, "groups", 1)
            if groups > 1:
                if space is None or groups != module.in_channels:
                    layers[name], space = keep(), None
                else:
                    layers[name] = depthwise(space)
                continue
            read, space = space, None if name == writers[-1] else f"features {name}"
            if space is not None:
                spaces[space] = _find_kind(module, [following for _, following in modules[position + 1 :]])
            transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
            layers[name] = linear(read, space, transposed=transposed)
            if isinstance(module, nn.Embedding):
                layers[name] = embedding(space) if space is not None else keep()
        elif isinstance(module, (*BATCH_NORMS, nn.LayerNorm, nn.RMSNorm)):
            norm = batch_norm if isinstance(module, BATCH_NORMS) else layer_norm
            layers[name] = norm(space) if space is not None else keep(*norm("").roles)
        else:
            raise ValueError(f"spec: expected modules that 'auto' knows, got {type(module).__name__} as {name}")
    return Spec("Sequential", layers, spaces={s: kind for s, kind in spaces.items() if kind != "cycle"})


def _list_leaves(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_children():
        if isinstance(module, nn.Sequential):
            yield from _list_leaves(module, f"{prefix}{name}.")
        else:
            yield prefix + name, module


def _find_kind(writer: nn.Module, following: list[nn.Module]) -> str:
    """Say how the features that a module writes may grow, by what works on them."""
    until = next((i for i, module in enumerate(following) if not isinstance(module, FEATUREWISE)), len(following))
    norms = [i for i in range(until) if isinstance(following[i], (nn.LayerNorm, nn.RMSNorm))]
    if not norms:
        return "cycle"
    norm = following[0]
    if getattr(norm, "weight", None) is None:
        return "repeat"
    last_axis = isinstance(writer, (nn.Linear, nn.Embedding)) and len(getattr(norm, "normalized_shape", ())) == 1
    if norms == [0] and last_axis and all(isinstance(module, ZERO_KEEPING) for module in following[1:until]):
        return "mean" if isinstance(norm, nn.LayerNorm) else "zero"
    return "repeat"
