"""Which layers of a network can be packed, with which weights, and why not the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from pycodesign import quantize
from pycodesign._quantized import FewValued
from pycodesign.nn.calibration import CALIBRATIONS
from pycodesign.nn.fusion import Weights
from pycodesign.nn.graph import KEEPS, is_plain
from pycodesign.nn.modules import Quantizer, find_quantizer, quantize_weight, read_geometry
from pycodesign.nn.reports import Row, describe_kind, is_layer
from pycodesign.nn.sources import find_weight
from pycodesign.quantize import REPETITION_LEVELS, KernelCodebook

Quantizers: TypeAlias = "Quantizer | Mapping[str, Quantizer]"

SKIPPED, UNNAMED = "named in skip", "not named in weights"
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_layers(
    model: nn.Module, weights: Quantizers, activations: str, skip: Collection[str]
) -> tuple[dict[str, Weights], dict[str, Row]]:
    """Return the weights of layers that can be packed, and a row for every layer: why, where it cannot be."""
    modules = dict(model.named_modules())
    layers: dict[str, Weights] = {}
    rows: dict[str, Row] = {}
    for name, module in modules.items():
        if not is_layer(module):
            continue
        row = rows[name] = Row(name, describe_kind(module), position=len(rows))
        parent = modules[name.rpartition(".")[0]] if name else None
        try:
            if name in skip:
                raise ValueError(SKIPPED)
            _check_module(module, parent)
            layers[name], row.why = _find_weights(name, module, _choose_quantizer(name, weights), activations)
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            row.why = str(error)
    return layers, rows


def _choose_quantizer(name: str, weights: Quantizers) -> Quantizer:
    if not isinstance(weights, Mapping):
        return weights
    if name not in weights:
        raise ValueError(UNNAMED)
    return weights[name]


def _check_module(module: nn.Module, parent: nn.Module | None) -> None:
    kind = type(module)
    if not isinstance(module, KEEPS):
        raise ValueError(f"{kind.__name__}: there are kernels for Conv2d and Linear only")
    if parent is not None and type(parent).__module__.startswith("torch.nn.") and not isinstance(parent, CONTAINERS):
        raise ValueError(f"{type(parent).__name__} reads its weight itself")
    if not is_plain(module):
        raise ValueError("it has hooks, or a forward of its own")


def _find_weights(name: str, module: Any, quantizer: Quantizer, activations: str) -> tuple[Weights, str]:
    """Return what to pack and, where weights are not kept exactly, why."""
    base = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
    own = find_weight(module)
    kind: Any = type(module)
    known = kind.__module__.startswith(("brevitas.", "torchao."))
    methods = ("forward", "_conv_forward") if base is nn.Conv2d else ("forward",)
    if not known and any(getattr(kind, method) is not getattr(base, method) for method in methods):
        raise ValueError(f"{kind.__name__} has a forward of its own")
    if module.weight.dtype != torch.float32:
        raise ValueError(f"weight: expected torch.float32, got {module.weight.dtype}")
    options = read_geometry(module) if base is nn.Conv2d else {}
    why = ""
    try:
        q = quantize_weight(module, quantizer)
        check_levels(q, activations)
    except ValueError as error:
        if activations == "float32" or quantizer != "from_fake_quantized":
            raise
        q = quantize.uniform(module.weight if own is None else own.dequantize(), 8)
        why = f"rounded to 8 bits: {error}"
    bias = None if module.bias is None else module.bias.detach().numpy().astype(np.float32)
    return Weights(name, q, bias, options), why


def check_levels(q: FewValued, activations: str) -> None:
    """Raise ValueError if no kernel gains from these levels, or none can hold them."""
    if isinstance(q, KernelCodebook):
        if activations == "uint8" and (q.kernels != np.rint(q.kernels)).any():
            raise ValueError("its kernels are no integers, which uint8 activations need")
        return
    integers = bool((q.levels == np.rint(q.levels)).all())
    if activations == "uint8":
        if not integers:
            raise ValueError("its levels are no integers, which uint8 activations need")
        if q.Q > REPETITION_LEVELS and np.abs(q.levels + 0.5).max() > 127.5:
            raise ValueError(f"its levels, {q.levels.min():g} to {q.levels.max():g}, exceed 8 bits")
    elif not integers:
        inputs = q.codes[0].size
        distinct = max(np.unique(row).size for row in q.codes)
        if q.Q > REPETITION_LEVELS or 2 * distinct > inputs:
            raise ValueError(f"its weights do not repeat: {distinct} distinct values among the {inputs} of an output")


def resolve_names(model: nn.Module) -> dict[str, str]:
    """Return the first name of a module by each of its names."""
    first: dict[nn.Module, str] = {}
    return {name: first.setdefault(module, name) for name, module in model.named_modules(remove_duplicate=False)}


def check_arguments(model: Any, weights: Quantizers, activations: str, skip: Collection[str], calibration: str) -> None:
    """Check what `convert` is given, except for its examples."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected torch.nn.Module, got {type(model).__name__}")
    if activations not in ("float32", "uint8"):
        raise ValueError(f"activations: expected 'float32' or 'uint8', got {activations!r}")
    if calibration not in CALIBRATIONS:
        raise ValueError(f"calibration: expected 'minmax' or 'percentile', got {calibration!r}")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if module.training:
            where = f"{name!r} ({type(module).__name__})" if name else type(module).__name__
            raise ValueError(f"model: expected evaluation mode (model.eval()), got {where} in training mode")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise TypeError(f"model: expected tensors in host memory, got {name} on {tensor.device}")
    if isinstance(skip, str):
        raise TypeError(f"skip: expected a collection of module names, got {skip!r}")
    quantizers: Mapping[Any, Quantizer] = weights if isinstance(weights, Mapping) else {None: weights}
    for argument, names in {"skip": skip, "weights": [name for name in quantizers if name is not None]}.items():
        for name in names:
            if name not in modules or not is_layer(modules[name]):
                raise ValueError(f"{argument}: expected names of convolutions and linear layers, got {name!r}")
    for quantizer in quantizers.values():
        find_quantizer(quantizer)
