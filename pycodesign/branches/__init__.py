"""Branches: networks whose branches run in parallel, found and executed.

`profile` measures what layers, waits and transfers cost on this machine, `search` finds a network under a target
latency, `place` says which team of cores, or which device, runs which body, `Executor` does so.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pycodesign.branches.executor import Executor
from pycodesign.branches.graph import Body, Graph, Placement, Slice, Value, to_graph
from pycodesign.branches.simulate import predict
from pycodesign.branches.space import Architecture, Space
from pycodesign.branches.table import LatencyTable, describe_machine

if TYPE_CHECKING:
    from pycodesign.branches.growing import grow_network
    from pycodesign.branches.nets import build_inception, build_parnet
    from pycodesign.branches.network import Network, Part
    from pycodesign.branches.placing import place
    from pycodesign.branches.profiling import profile
    from pycodesign.branches.searching import Found, search

__all__ = [
    "Architecture",
    "Body",
    "Executor",
    "Found",
    "Graph",
    "LatencyTable",
    "Network",
    "Part",
    "Placement",
    "Slice",
    "Space",
    "Value",
    "build_inception",
    "build_parnet",
    "describe_machine",
    "grow_network",
    "place",
    "predict",
    "profile",
    "search",
    "to_graph",
]

_MODULES = {  # loaded when first used: they need torch
    "Found": "searching",
    "Network": "network",
    "Part": "network",
    "build_inception": "nets",
    "build_parnet": "nets",
    "grow_network": "growing",
    "place": "placing",
    "profile": "profiling",
    "search": "searching",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"pycodesign.branches.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'pycodesign.branches' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
