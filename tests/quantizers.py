"""The functions of `pycodesign.quantize` by name, and weights for them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from pycodesign import quantize
from pycodesign.quantize import QuantizedTensor

F32 = np.float32
QUANTIZERS: dict[str, Callable[[Any], QuantizedTensor]] = {
    "binary": quantize.binary,
    "ternary": quantize.ternary,
    **{f"uniform{bits}": lambda w, bits=bits: quantize.uniform(w, bits) for bits in range(2, 9)},
    **{f"power_of_two{bits}": lambda w, bits=bits: quantize.power_of_two(w, bits) for bits in range(2, 6)},
}
EVERY_FUNCTION = {**QUANTIZERS, "from_fake_quantized": quantize.from_fake_quantized}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(F32)


def levels(*values: float) -> np.ndarray:
    return np.array(values, F32)
