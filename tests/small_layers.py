"""Small layers, and inputs and results that fit them; types and patterns of errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from pycodesign import ops
from pycodesign.quantize import QuantizedTensor

F32 = np.float32
ERRORS = tuple[Callable[[], Any], type[Exception], str]


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def weights(shape: tuple[int, ...], levels: Any = (-1, 0, 1), scale: Any = None) -> QuantizedTensor:
    levels = np.asarray(levels, F32)
    codes = np.random.default_rng(0).integers(0, levels.size, shape, dtype=np.uint8)
    codes.flat[: levels.size] = np.arange(levels.size)[: codes.size]
    return QuantizedTensor(codes, levels, np.ones(shape[0], F32) if scale is None else scale)


conv, lin = ops.prepack_conv2d, ops.prepack_linear
Q = weights((4, 3, 3, 3))
QL = weights((5, 6))
FLOAT, BYTES, LINEAR = conv(Q), conv(Q, input_dtype="uint8"), lin(QL)
X, X8, XL = np.ones((1, 3, 5, 5), F32), np.ones((1, 3, 5, 5), np.uint8), np.ones((2, 6), F32)
XT = np.ones((2, 3, 6), F32)
Y, YL, YT = np.ones((1, 4, 3, 3), F32), np.ones((2, 5), F32), np.ones((2, 3, 5), F32)
