"""Torch networks of architectures."""

from __future__ import annotations

import torch
from torch import nn

from pycodesign.branches.network import Network, Part
from pycodesign.branches.operators import BranchBody, Head, Stem, build_gate, build_operator
from pycodesign.branches.space import BODY, Architecture, Space

__all__ = ["build"]


def build(space: Space, architecture: Architecture, seed: int = 0) -> Network:
    """Build the network of an architecture; see `Space.build`."""
    space.check(architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem = Stem(space.channels, space.width)
        parts: list[tuple[Part, nn.Module]] = []
        recomputed = architecture.stem == "recomputed"
        for branch in range(space.branches if recomputed else 1):
            writes, place = (f"map.-1.{branch}" if recomputed else "stem", 0), branch if recomputed else -1
            name = f"stem.{branch}" if recomputed else "stem"
            part = Part(name, ("x",), (writes,), place, -1, (BODY, space.stem_key()), may_recompute=not recomputed)
            parts.append((part, stem))
        for segment in range(space.segments):
            for branch in range(space.branches):
                parts.append(_build_body(space, architecture, segment, branch))
        head = Head(space.branches * space.shape(space.segments - 1)[0], space.classes)
        parts.append((Part("head", ("features",), (("y", 0),), costs=(BODY, space.head_key())), head))
    return Network(parts, space.input_shape())


def _build_body(space: Space, architecture: Architecture, segment: int, branch: int) -> tuple[Part, nn.Module]:
    own = f"map.{segment - 1}.{branch}" if segment or architecture.stem == "recomputed" else "stem"
    reads, gates = [own], []
    for source, gate in space.sources(architecture, segment, branch):
        reads.append(f"{'means' if gate == 'pooled' else 'map'}.{segment - 1}.{source}")
        gates.append(build_gate(gate, space.shape(segment - 1)[0]))
    layers = []
    for layer, name in enumerate(architecture.operators[segment][branch]):
        (inputs, _, _), outputs, stride = space.layer_shape(segment, layer)
        layers.append(build_operator(name, inputs, outputs, stride))
    writes: tuple[tuple[str, int], ...] = ((f"map.{segment}.{branch}", 0),)
    sends = "map"
    if segment == space.segments - 1:
        writes, sends = (("features", branch),), "features"
    elif space.sends_means(architecture, segment, branch):
        writes, sends = (*writes, (f"means.{segment}.{branch}", 0)), "both"
    costs = space.body_keys(architecture, segment, branch)
    part = Part(f"branch.{segment}.{branch}", tuple(reads), writes, branch, segment, costs)
    return part, BranchBody(gates, layers, sends)
