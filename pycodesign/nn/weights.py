"""Shape and values of the weights in the tensors that operators and modules hold: codes, levels and scale.

`pycodesign._quantized.to_arrays` makes these of weights, `from_arrays` weights of these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
