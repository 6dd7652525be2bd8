"""Specs of plain `torch.nn.Sequential` networks, read from their modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias, TypeGuard

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from pycodesign.growth.indices import Inexact
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

__all__ = ["is_sequential", "make_sequential_spec", "name_types"]

Modules: TypeAlias = tuple[type[nn.Module], ...]

# Exact types: a subclass may compute something else. Applied to each number alone; the first kind keeps zeros.
ZERO_KEEPING: Modules = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh)
ZERO_KEEPING += (nn.Hardtanh, nn.Hardswish, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Identity)
ZERO_KEEPING += (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
ELEMENTWISE: Modules = (*ZERO_KEEPING, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid)
# Applied to the pixels of each channel.
POOLINGS: Modules = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
POOLINGS += (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.ZeroPad2d, nn.Upsample)
POOLINGS += (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
BATCH_NORMS: Modules = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMS: Modules = (nn.LayerNorm, nn.RMSNorm)
TRANSPOSED: Modules = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS: Modules = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
WRITERS: Modules = (nn.Linear, nn.Embedding, *CONVOLUTIONS)
FLATTENED = {"channels": "pixels", "last": "tokens"}  # what the axis of features becomes
FEATUREWISE: Modules = (*ELEMENTWISE, *POOLINGS, *BATCH_NORMS, *NORMS, nn.Flatten)


class _Features(NamedTuple):
    """The features between two layers: their space, their number, and where they lie.

    `axis` is ``"channels"`` (N, C, ...), ``"last"`` (..., C), or, behind a Flatten, ``"pixels"`` (N, C * pixels) or
    ``"tokens"`` (N, tokens * C).
    """

    space: str
    size: int
    axis: str


def make_sequential_spec(source: nn.Sequential, target: nn.Sequential) -> Spec:
    """Say what the axes of a Sequential's parameters mean.

    Parameters
    ----------
    source, target : torch.nn.Sequential
        Linear layers, embeddings, convolutions (of one group, or depthwise), BatchNorm, LayerNorm, RMSNorm, Flatten,
        and modules that work on each feature alone; nested ones, too. Before the first layer that may grow and behind
        the last, any module. The same modules in both, but for sizes.

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
    if len(modules) != len(others):
        text = f"{len(modules)} -> {len(others)} modules, of which none is known to be an identity"
        raise Inexact(f"target: {text}; exact would be {len(modules)}, larger")
    for (name, module), (other_name, other) in zip(modules, others, strict=True):
        if parametrized := [m for m in (module, other) if is_parametrized(m)]:
            kind = type(parametrized[0]).__name__
            raise ValueError(f"spec: expected modules without parametrizations, or a Spec, got {kind} as {name}")
        if (name, type(module)) != (other_name, type(other)):
            kinds = name_types(module, other)
            raise ValueError(f"target: expected {kinds[0]} as {name}, as the source's, got {kinds[1]} as {other_name}")
    _check_parameters(modules, others)
    layers: dict[str, Layer] = {}
    spaces: dict[str, str] = {}
    last = max((i for i, (_, module) in enumerate(modules) if _is_full(module)), default=-1)
    features: _Features | None = None  # none that may grow
    for position, (name, module) in enumerate(modules):
        reads = None if features is None else _name_inputs(features, name, module)
        if _is_full(module):
            features = _find_outputs(name, module) if position != last else None
            layers[name] = _make_writer(module, reads, features)
            if features is not None:
                spaces[features.space] = _find_kind(module, [following for _, following in modules[position + 1 :]])
        elif features is None:
            layers[name] = keep(*module.state_dict())
        elif isinstance(module, nn.modules.conv._ConvNd):
            layers[name], features = depthwise(features.space), features._replace(size=module.out_channels)
        elif type(module) is nn.Flatten:
            features = features._replace(axis=FLATTENED.get(features.axis, features.axis))
        elif reads is not None:
            layers[name] = (layer_norm if type(module) in NORMS else batch_norm)(reads)
    return Spec("Sequential", layers, spaces={s: kind for s, kind in spaces.items() if kind != "cycle"})


def _is_full(module: nn.Module) -> bool:
    """Whether each output depends on all inputs, so that the outputs may be others than the inputs."""
    groups = getattr(module, "groups", 1)
    return type(module) in WRITERS and (groups == 1 or groups != getattr(module, "in_channels", None))


def _find_outputs(name: str, module: nn.Module) -> _Features | None:
    if getattr(module, "groups", 1) > 1:
        return None
    keys = ("out_features", "out_channels", "embedding_dim")
    size = next(getattr(module, key) for key in keys if hasattr(module, key))
    return _Features(f"features {name}", size, "channels" if type(module) in CONVOLUTIONS else "last")


def _make_writer(module: nn.Module, reads: str | None, features: _Features | None) -> Layer:
    writes = None if features is None else features.space
    if type(module) is nn.Embedding:
        return embedding(writes) if writes is not None else keep()
    if getattr(module, "groups", 1) > 1:
        return keep()
    return linear(reads, writes, transposed=type(module) in TRANSPOSED)


def _name_inputs(features: _Features, name: str, module: nn.Module) -> str | None:
    """Name the spaces that a module reads or scales, None if it works on each number alone.

    Raises
    ------
    ValueError
        If it works on something else than the features.
    """
    kind = type(module).__name__
    if type(module) not in (*WRITERS, *FEATUREWISE) or type(module) is nn.Embedding:
        raise ValueError(f"spec: expected modules that 'auto' knows, got {kind} as {name}")
    shape = getattr(module, "normalized_shape", ())
    on_channels = type(module) in (*CONVOLUTIONS, *POOLINGS) or len(shape) > 1
    on_last = type(module) is nn.Linear or len(shape) == 1
    is_partial = type(module) is nn.Flatten and (module.start_dim, module.end_dim) != (1, -1)
    if is_partial or (on_channels if features.axis != "channels" else on_last):
        raise ValueError(f"spec: expected {name} to work on the {features.axis} of {features.space}, got a {kind}")
    keys = ("in_features", "in_channels", "num_features")
    count = shape[0] if shape else next((getattr(module, key) for key in keys if hasattr(module, key)), None)
    if count is None:
        return None
    times, rest = divmod(count, features.size)
    if rest or (times > 1 and features.axis not in ("pixels", "tokens")):
        raise ValueError(f"spec: expected {name} of {features.size} inputs, which {features.space} are, got {count}")
    return "+".join([features.space] * times) if features.axis == "tokens" else features.space


def is_sequential(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether it runs its modules one after the other, and does nothing else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _list_leaves(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield modules in the order in which they run: one that is used twice, twice."""
    for name, module in model._modules.items():
        if module is not None and is_sequential(module):
            yield from _list_leaves(module, f"{prefix}{name}.")
        elif module is not None:
            yield prefix + name, module


def name_types(one: object, other: object) -> list[str]:
    """Name the types of two objects, with their modules where the names alone are the same."""
    kinds = [type(one), type(other)]
    names = [kind.__name__ for kind in kinds]
    return names if names[0] != names[1] else [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]


def _check_parameters(modules: list[tuple[str, nn.Module]], others: list[tuple[str, nn.Module]]) -> None:
    """Refuse what grows in one place and is used in another, or works on all features at once."""
    users: dict[int, str] = {}
    for (name, module), (_, other) in zip(modules, others, strict=True):
        tensors = other.state_dict(keep_vars=True)
        for key, old in module.state_dict(keep_vars=True).items():
            if key not in tensors or old.shape == tensors[key].shape:
                continue
            if (user := users.setdefault(id(old), name)) != name:
                text = f"{user} and {name} share {key}, {tuple(old.shape)} -> {tuple(tensors[key].shape)}"
                raise Inexact(f"target: {text}; exact would be the source's shape, or parameters of their own")
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            sizes = module.embedding_dim, other.embedding_dim
            if sizes[0] != sizes[1]:
                text = f"{name} limits the norm of {sizes[0]} -> {sizes[1]} features"
                raise Inexact(f"target: {text}; exact would be {sizes[0]}, or no max_norm")


def _keeps_zeros(module: nn.Module) -> bool:
    if isinstance(module, nn.Hardtanh):
        return module.min_val <= 0 <= module.max_val
    return type(module) in ZERO_KEEPING or type(module) is nn.Flatten


def _find_kind(writer: nn.Module, following: list[nn.Module]) -> str:
    """Say how the features that a module writes may grow, by what works on them."""
    until = next((i for i, module in enumerate(following) if type(module) not in FEATUREWISE), len(following))
    norms = [i for i in range(until) if type(following[i]) in NORMS]
    if not norms:
        return "cycle"
    norm = following[0]
    if getattr(norm, "weight", None) is None:
        return "repeat"
    last_axis = type(writer) in (nn.Linear, nn.Embedding) and len(getattr(norm, "normalized_shape", ())) == 1
    keep_zeros = all(_keeps_zeros(module) for module in following[1:until])
    if norms == [0] and last_axis and keep_zeros:
        return "mean" if isinstance(norm, nn.LayerNorm) else "zero"
    return "repeat"
