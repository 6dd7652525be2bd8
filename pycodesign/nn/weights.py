"""Weights of a layer as the tensors that operators and modules hold.

Those of a `QuantizedTensor` are its codes, levels and scale. A `KernelCodebook` of real kernels has its kernels as
levels, (C, U, p, kH, kW) or (C, U, p), and as codes int16 (O, J): i for kernel i, and ~i for its negative.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pycodesign.quantize import KernelCodebook, QuantizedTensor

FewValued: TypeAlias = "QuantizedTensor | KernelCodebook"


def to_integers(q: FewValued) -> FewValued:
    """Return codes and levels instead of a codebook, where its kernels are integers."""
    return q.to_quantized() if isinstance(q, KernelCodebook) and q.values != "real" else q


def to_arrays(q: FewValued) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]:
    """Return codes, levels and scale."""
    if isinstance(q, QuantizedTensor):
        return q.codes.astype(np.uint8), q.levels, q.scale
    index = q.index.astype(np.int16)
    return np.where(q.sign < 0, ~index, index), q.kernels, q.scale


def from_arrays(codes: Any, levels: Any, scale: Any) -> FewValued:
    """Return the weights of such arrays or tensors."""
    if levels.ndim < 3:
        return QuantizedTensor(codes, levels, scale)
    codes = np.asarray(codes)
    if codes.dtype != np.int16 or codes.min(initial=0) < -256 or codes.max(initial=0) > 255:
        found = f"{codes.dtype}, {codes.min(initial=0)} to {codes.max(initial=0)}"
        raise ValueError(f"codes: expected int16 from -256 to 255 for a codebook, got {found}")
    index, sign = np.where(codes < 0, ~codes, codes), np.where(codes < 0, -1, 1)
    return KernelCodebook(index.astype(np.uint8), sign.astype(np.int8), levels, scale)


def weight_shape(codes: Tensor, levels: Tensor) -> tuple[Any, ...]:
    """Return (O, C / groups, kH, kW), or (O, I) for a linear layer."""
    if levels.dim() < 3:
        return tuple(codes.shape)
    channels, *kernel = levels.shape[2:]
    return (codes.shape[0], codes.shape[1] * channels, *kernel)


def dequantize(codes: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """Return the weights, as ``dequantize()`` of what they came from does."""
    if levels.dim() < 3:
        rows = codes.flatten(1).long()
        values = levels[rows] if levels.dim() == 1 else levels.gather(1, rows)
        scale = scale.reshape(codes.shape[0], -1, 1)  # (O, G, 1)
        return (values.view(codes.shape[0], scale.shape[1], -1) * scale).view(codes.shape)
    patterns, books = codes.shape[1], levels.shape[0]
    book = torch.arange(patterns, device=codes.device) // (patterns // books)
    values = levels.flatten(2)[book, torch.where(codes < 0, ~codes, codes).long()]  # (O, J, D)
    values = torch.where((codes < 0)[..., None], -values, values).flatten(1) * scale.reshape(-1, 1)
    return values.view(weight_shape(codes, levels))
