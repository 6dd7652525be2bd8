"""Where quantized weights come from: modules of other libraries, read without loss.

One adapter for each library. None imports its library: a module of that library exists only after somebody else did.
"""

from __future__ import annotations

import copy
import sys
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pycodesign._quantized import FewValued
from pycodesign.nn.codebooks import find_codebook
from pycodesign.quantize import QuantizedTensor, from_fake_quantized

__all__ = ["find_weight"]

Found: TypeAlias = "tuple[Tensor, Tensor | None] | None"  # rounded weights; their scale, where the library tells it

TORCHAO_TENSORS = ("Int8Tensor", "IntxUnpackedToInt8Tensor")


def find_weight(module: nn.Module) -> FewValued | None:
    """Read the weights of a module that quantizes them by itself.

    Such are modules of Brevitas (``QuantConv2d``, ``QuantLinear``), modules with torchao's integer tensors or with its
    fake quantizer (``torchao.quantization.qat``), and modules whose weight is computed by `torch.nn.utils.parametrize`,
    a `Codebook` among them. The module is not changed.

    Parameters
    ----------
    module : torch.nn.Module
        A convolution or a linear layer, in evaluation mode.

    Returns
    -------
    QuantizedTensor, KernelCodebook, or None
        ``dequantize()`` equals the weights that the module computes with. Levels are integers where the library's are.
        None for any other module: its ``weight`` is all there is.

    Raises
    ------
    ValueError
        If such weights cannot be held, or if the module quantizes its activations or bias, too: weights alone would
        not give the module's results. The message says which.

    Notes
    -----
    A straight-through estimator written ``w + (q - w).detach()`` adds rounding errors, so that its result has more
    values than ``q``. Written ``q.detach() + (w - w.detach())`` it is ``q``.

    Examples
    --------
    >>> import torch
    >>> class Sign(torch.nn.Module):
    ...     def forward(self, w):
    ...         return w.sign()
    >>> layer = torch.nn.Linear(3, 2)
    >>> find_weight(layer) is None
    True
    >>> layer = torch.nn.utils.parametrize.register_parametrization(layer, "weight", Sign())
    >>> find_weight(layer)
    QuantizedTensor((2, 3), Q=2, levels: -1, 1)
    """
    codebook = find_codebook(module)
    if codebook is not None:
        return codebook
    for read in (_read_brevitas, _read_torchao_tensor, _read_torchao_fake_quantizer, _read_parametrization):
        with torch.no_grad():
            found = read(module)
        if found is not None:
            return _recover(*found)
    return None


def _recover(weight: Tensor, scale: Tensor | None) -> QuantizedTensor:
    outputs = len(weight)
    if scale is not None:
        scale = scale.float()
        if scale.numel() == 1:
            scale = scale.reshape(1).expand(outputs)
        elif weight.dim() == 2 or scale.numel() == outputs:
            scale = scale.reshape(outputs, -1)
            scale = scale[:, 0] if scale.shape[1] == 1 else scale
        else:
            scale = None  # groups within a convolution's channels
    try:
        return from_fake_quantized(weight.float(), scale)
    except ValueError as error:
        raise ValueError(f"{error}: these weights are not quantized, or not to few values for each output") from error


def _read_brevitas(module: nn.Module) -> Found:
    mixin = sys.modules.get("brevitas.nn.mixin.parameter")
    if mixin is None or not isinstance(module, mixin.QuantWeightMixin):
        return None
    layer: Any = module
    for name in ("input_quant", "output_quant", "bias_quant"):
        proxy = getattr(layer, name, None)
        if proxy is not None and proxy.is_quant_enabled:
            raise ValueError(f"{type(module).__name__}: expected weights alone to be quantized, got {name}")
    if not layer.weight_quant.is_quant_enabled:
        return None
    try:
        quantized = layer.quant_weight()
    except (AssertionError, RuntimeError) as error:  # accumulator-aware weights depend on an input
        raise ValueError(f"{type(module).__name__}: its quant_weight() failed: {error}") from error
    # groups: scale is as large as the weights, scale_ is (O, G, 1)
    return quantized.value, getattr(quantized, "scale_", getattr(quantized, "scale", None))


def _read_torchao_tensor(module: nn.Module) -> Found:
    tensor: Any = getattr(module, "weight", None)
    if not type(tensor).__module__.startswith("torchao."):
        return None
    kind = type(tensor).__name__
    if kind not in TORCHAO_TENSORS:
        raise ValueError(f"weight: expected torchao's {' or '.join(TORCHAO_TENSORS)}, got {kind}")
    for name in ("activation_quantization", "act_quant_kwargs", "act_quant_scale", "act_pre_scale"):
        if getattr(tensor, name, None) is not None:
            raise ValueError(f"weight: expected weights alone to be quantized, got {kind} with {name}")
    affine = tensor.qdata, tensor.block_size, tensor.scale, tensor.zero_point
    weight = sys.modules["torchao.quantization"].dequantize_affine(*affine, torch.int8, output_dtype=torch.float32)
    return weight, tensor.scale


def _read_torchao_fake_quantizer(module: nn.Module) -> Found:
    quantizer: Any = getattr(module, "weight_fake_quantizer", None)
    if quantizer is None or not quantizer.enabled:
        return None
    activations: Any = getattr(module, "activation_fake_quantizer", None)
    if activations is not None and activations.enabled:
        kind = type(module).__name__
        raise ValueError(f"{kind}: expected weights alone to be quantized, got activation_fake_quantizer")
    quantizer = copy.deepcopy(quantizer)  # it keeps what it computes
    weight = quantizer(module.weight)
    return weight, getattr(quantizer, "scale", None)


def _read_parametrization(module: nn.Module) -> Found:
    if not nn.utils.parametrize.is_parametrized(module, "weight"):
        return None
    layer: Any = module
    return layer.weight, None
