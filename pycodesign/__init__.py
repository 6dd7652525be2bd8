"""Kernels and tools for neural networks that are designed together with the machine they run on.

Submodules load when first used: `ops` (packed layers on arrays), `quantize` (weights of few values), `repetition` (the
compiler behind packing), `reference` (the specification in NumPy), `nn` (torch modules and conversion), `growth`
(larger models from trained smaller ones), `sharing` (many tasks on one frozen encoder), `branches` (networks whose
branches run in parallel).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pycodesign._native import __version__, get_num_threads, set_isa, set_num_threads, show_config

if TYPE_CHECKING:
    from pycodesign import branches, growth, ops, quantize, reference, repetition, sharing
    from pycodesign import nn as nn
    from pycodesign.quantize import KernelCodebook, QuantizedTensor

__all__ = [
    "KernelCodebook",
    "QuantizedTensor",
    "__version__",
    "branches",
    "get_num_threads",
    "growth",
    "ops",
    "quantize",
    "reference",
    "repetition",
    "set_isa",
    "set_num_threads",
    "sharing",
    "show_config",
]

_SUBMODULES = frozenset({"branches", "growth", "nn", "ops", "quantize", "reference", "repetition", "sharing"})


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"pycodesign.{name}")
    if name in ("KernelCodebook", "QuantizedTensor"):
        return getattr(importlib.import_module("pycodesign.quantize"), name)
    raise AttributeError(f"module 'pycodesign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES})
