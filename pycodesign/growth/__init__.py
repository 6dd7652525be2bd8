"""Growth: a larger model, and its optimizer, from a smaller one that is trained.

`Spec` says what the axes of an architecture's parameters mean, `make_plan` derives how each larger parameter is made.
`grow` does so for torch modules, with optimizer states, `grow_checkpoint` for files.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pycodesign.growth.checkpoint import CheckpointReport, grow_checkpoint
from pycodesign.growth.plan import Heads, Inexact, Plan, Rule, make_plan
from pycodesign.growth.spec import (
    Spec,
    batch_norm,
    convolution,
    depthwise,
    embedding,
    keep,
    layer_norm,
    layer_scale,
    linear,
    parameter,
    rms_norm,
)
from pycodesign.growth.specs import BERT, GPT2, LLAMA, TIMM_RESNET, TIMM_VIT, VIT, find_spec

if TYPE_CHECKING:
    from pycodesign.growth.halving import Search, compare_proxies, search
    from pycodesign.growth.modules import Report, grow
    from pycodesign.growth.optimizer_files import load_optimizer, save_optimizer
    from pycodesign.growth.schedule import Schedule

__all__ = [
    "BERT",
    "GPT2",
    "LLAMA",
    "TIMM_RESNET",
    "TIMM_VIT",
    "VIT",
    "CheckpointReport",
    "Heads",
    "Inexact",
    "Plan",
    "Report",
    "Rule",
    "Schedule",
    "Search",
    "Spec",
    "batch_norm",
    "compare_proxies",
    "convolution",
    "depthwise",
    "embedding",
    "find_spec",
    "grow",
    "grow_checkpoint",
    "keep",
    "layer_norm",
    "layer_scale",
    "linear",
    "load_optimizer",
    "make_plan",
    "parameter",
    "rms_norm",
    "save_optimizer",
    "search",
]

_MODULES = {  # loaded when first used: they need torch
    "Report": "modules",
    "Schedule": "schedule",
    "Search": "halving",
    "compare_proxies": "halving",
    "grow": "modules",
    "load_optimizer": "optimizer_files",
    "save_optimizer": "optimizer_files",
    "search": "halving",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"pycodesign.growth.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'pycodesign.growth' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
