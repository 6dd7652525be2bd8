"""Operations fused into steps of a chain, and steps gathered into segments that each run as one call."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import fx

from pycodesign._quantized import FewValued
from pycodesign.nn.graph import find_rank, match, read_norm
from pycodesign.nn.shapes import Image, Rows, Shapes
from pycodesign.quantize import QuantizedTensor

Floats: TypeAlias = "NDArray[np.float32]"
Clamp: TypeAlias = "tuple[float | None, float | None] | None"


@dataclass(frozen=True)
class Weights:
    """Of one layer, and the arguments of its packing other than the input's."""

    name: str
    q: FewValued
    bias: Floats | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def fold(self, scale: NDArray[np.float64], shift: NDArray[np.float64]) -> Weights | None:
        """Return weights of the layer followed by ``scale * y + shift``, each rounded once; None if not all finite."""
        rows = (-1, *[1] * (self.q.scale.ndim - 1))
        with np.errstate(all="ignore"):
            scales = (self.q.scale * scale.reshape(rows)).astype(np.float32)
            bias = (shift if self.bias is None else self.bias * scale + shift).astype(np.float32)
        if not (np.isfinite(scales).all() and np.isfinite(bias).all()):
            return None
        return Weights(self.name, replace(self.q, scale=scales), bias, self.options)


@dataclass(eq=False)
class FusedStep:
    """A step of a chain, before it is known which chain.

    Parameters
    ----------
    op : str
        Of `program.Step`; or "flatten", which makes no step.
    nodes : list of fx.Node
        What it stands for; the last one's value is what it makes.
    x, other : fx.Node
        The values that it takes and adds.
    form : {"image", "flat", "rows"}
        What the last node's value is: (N, C, H, W); a step's (N, C, H, W) flattened to (N, C H W); or (..., I).
    normalized : bool
        Whether batch normalization of (N, I) is in it: values of more dimensions would be normalized along another.
    """

    op: str
    nodes: list[fx.Node]
    x: fx.Node
    form: str
    other: fx.Node | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    clamp: Clamp = None
    weights: Weights | None = None
    normalized: bool = False

    @property
    def result(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def inputs(self) -> list[fx.Node]:
        return [self.x] if self.other is None else [self.x, self.other]

    def may_absorb(self, node: fx.Node) -> bool:
        """Say whether nothing but `node` reads the result."""
        return list(self.result.users) == [node]


def fuse(
    traced: fx.GraphModule, layers: Mapping[str, Weights], norms: Collection[str] = ()
) -> dict[fx.Node, FusedStep]:
    """Return the steps by the node whose value they make, in the order they are to run in.

    Parameters
    ----------
    layers : dict
        Weights by module name; other layers stay torch's.
    norms : collection of str
        Batch normalizations that become no layers.
    """
    steps: dict[fx.Node, FusedStep] = {}
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    shapes = Shapes(traced, layers)
    for node in traced.graph.nodes:
        found = match(traced, node)
        if found is None:
            continue
        kind, arguments = found
        x = node.args[0]
        before = steps.get(x)
        if kind in ("conv2d", "linear"):
            if node.target in layers:
                form = "image" if kind == "conv2d" else "rows"
                steps[node] = FusedStep(kind, [node], x, form, weights=layers[node.target])
        elif kind == "norm":
            if node.target not in norms:
                _fuse_norm(traced, node, before, arguments["image"], steps)
        elif kind == "clamp":
            if before is not None and before.op not in ("max_pool2d", "flatten") and before.clamp is None:
                if before.may_absorb(node):
                    _extend(steps, before, node).clamp = arguments["clamp"]
                    continue
            if before is not None or find_rank(traced, x) == 4:
                form = "image" if before is None else before.form
                steps[node] = FusedStep("add", [node], x, form, clamp=arguments["clamp"])
        elif kind == "add":
            _fuse_add(node, arguments["other"], steps, shapes, order)
        elif kind == "flatten":
            if before is not None and before.form == "image":
                steps[node] = FusedStep("flatten", [node], x, "flat")
        elif before.form == "image" if before is not None else "flat" not in arguments or find_rank(traced, x) == 4:
            form = "flat" if arguments.pop("flat", False) else "image"
            steps[node] = FusedStep(kind, [node], x, form, arguments=arguments)
    return dict(sorted(steps.items(), key=lambda item: order[item[0]]))


def _extend(steps: dict[fx.Node, FusedStep], step: FusedStep, node: fx.Node) -> FusedStep:
    del steps[step.result]
    step.nodes.append(node)
    steps[node] = step
    return step


def _fuse_norm(
    traced: fx.GraphModule, node: fx.Node, before: FusedStep | None, image: bool, steps: dict[fx.Node, FusedStep]
) -> None:
    scale, shift = read_norm(traced.get_submodule(str(node.target)))
    if before is not None and before.weights is not None and before.may_absorb(node):
        fits = (before.op == "conv2d") == image and before.weights.q.shape[0] == len(scale)
        fits &= image or find_rank(traced, node) != 3  # there it is the second dimension that is normalized
        folded = before.weights.fold(scale, shift) if before.clamp is None and before.other is None and fits else None
        if folded is not None:
            before.weights, before.normalized = folded, not image
            _extend(steps, before, node)
            return
    if image and (before is None or before.form == "image"):  # a layer of its own: one weight for each channel
        q = QuantizedTensor(
            np.zeros((len(scale), 1, 1, 1), np.uint8), np.ones(1, np.float32), np.ones(len(scale), np.float32)
        )
        weights = Weights(str(node.target), q, options={"groups": len(scale)}).fold(scale, shift)
        if weights is not None:
            steps[node] = FusedStep("conv2d", [node], node.args[0], "image", weights=weights)  # type: ignore[arg-type]


def _fuse_add(
    node: fx.Node, b: fx.Node, steps: dict[fx.Node, FusedStep], shapes: Shapes, order: Mapping[fx.Node, int]
) -> None:
    """Add the later operand's layer a residual; where none can take it, add in a step of its own."""
    a: fx.Node = node.args[0]  # type: ignore[assignment]
    form = _find_form(steps, [a, b], shapes.find_common(a, b))
    if form is None:
        return
    for x, other in sorted([(a, b), (b, a)], key=lambda pair: -order[pair[0]]):
        step = steps.get(x)
        if step is not None and step.weights is not None and step.may_absorb(node) and a is not b:
            if step.clamp is None and step.other is None:
                _extend(steps, step, node).other = other
                return
    steps[node] = FusedStep("add", [node], a, form, other=b)


def _find_form(steps: Mapping[fx.Node, FusedStep], nodes: Sequence[fx.Node], shape: Image | Rows | None) -> str | None:
    """Return the form of values of one shape that are to be combined; None if no step can."""
    if shape is None:
        return None
    forms = {steps[node].form for node in nodes if node in steps}
    if "flat" in forms and any(node not in steps for node in nodes):
        return None
    forms = forms or {"image" if isinstance(shape, Image) else "rows"}
    return forms.pop() if len(forms) == 1 else None


def gather(steps: Mapping[fx.Node, FusedStep], layers: Mapping[str, Weights]) -> list[list[FusedStep]]:
    """Return segments, as large as they can be: what leaves one never comes back to it by another way.

    Only those that hold one of the layers are returned.
    """
    segments: list[list[FusedStep]] = []
    home: dict[fx.Node, list[FusedStep]] = {}  # of every node of every step
    for step in steps.values():
        segment = [step]
        segments.append(segment)
        home.update(dict.fromkeys(step.nodes, segment))
        for x in step.inputs:
            other = home.get(x)
            if (
                other is None
                or other is segment
                or not _may_join(step, steps[x], x)
                or _would_cycle(other, segment, home)
            ):
                continue
            other.extend(segment)
            segments.remove(segment)
            segment = other
            home.update({node: other for member in other for node in member.nodes})
    order = {step: i for i, step in enumerate(steps.values())}
    for segment in segments:
        segment.sort(key=order.__getitem__)
    names = {id(step): step.weights.name for step in steps.values() if step.weights is not None}
    return [segment for segment in segments if any(names.get(id(step)) in layers for step in segment)]


def _may_join(step: FusedStep, before: FusedStep, x: fx.Node) -> bool:
    if step.op == "linear" and x is step.x:
        return before.form != "image"
    if step.op in ("add", "linear"):
        return before.form == step.form
    return before.form == "image"


def _would_cycle(a: list[FusedStep], b: list[FusedStep], home: Mapping[fx.Node, list[FusedStep]]) -> bool:
    """Say whether a path leads from one to the other through a node outside both."""
    members = {id(step) for step in (*a, *b)}
    open_nodes = _external_inputs([*a, *b])
    seen = set()
    while open_nodes:
        node = open_nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        segment = home.get(node)
        if segment is None:
            behind: Iterable[fx.Node] = node.all_input_nodes
        else:
            behind = _external_inputs(segment)
        for source in behind:
            if any(id(step) in members for step in home.get(source, ())):
                return True
            open_nodes.append(source)
    return False


def _external_inputs(segment: Sequence[FusedStep]) -> list[fx.Node]:
    inside = {node for step in segment for node in step.nodes}
    return list(dict.fromkeys(x for step in segment for x in step.inputs if x not in inside))
