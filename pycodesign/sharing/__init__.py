"""Sharing: many tasks on one frozen encoder, which runs once for all of them.

`MultiTask` trains tasks, each a small difference of weights, `build_engine` serves them, `search` chooses where a task
needs a difference at all. `import_adapter` and `export_adapter` exchange low-rank tasks with peft.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pycodesign.sharing.adapters import export_adapter, import_adapter
    from pycodesign.sharing.cache import FeatureCache
    from pycodesign.sharing.choices import Search, search
    from pycodesign.sharing.components import Features, TaskSpec
    from pycodesign.sharing.costs import CostTable, count_operations, measure_costs
    from pycodesign.sharing.encoders import Encoder, read_encoder
    from pycodesign.sharing.engine import Engine
    from pycodesign.sharing.multitask import MultiTask
    from pycodesign.sharing.task_model import TaskModel, compute_loss

_MODULES = {  # loaded when first used: they need torch
    "CostTable": "costs",
    "Encoder": "encoders",
    "Engine": "engine",
    "FeatureCache": "cache",
    "Features": "components",
    "MultiTask": "multitask",
    "Search": "choices",
    "TaskModel": "task_model",
    "TaskSpec": "components",
    "compute_loss": "task_model",
    "count_operations": "costs",
    "export_adapter": "adapters",
    "import_adapter": "adapters",
    "measure_costs": "costs",
    "read_encoder": "encoders",
    "search": "choices",
}

__all__ = [
    "CostTable",
    "Encoder",
    "Engine",
    "FeatureCache",
    "Features",
    "MultiTask",
    "Search",
    "TaskModel",
    "TaskSpec",
    "compute_loss",
    "count_operations",
    "export_adapter",
    "import_adapter",
    "measure_costs",
    "read_encoder",
    "search",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"pycodesign.sharing.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'pycodesign.sharing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
