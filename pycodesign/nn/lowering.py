"""Segments of a graph turned into modules that run them."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from pycodesign._arguments import to_pair
from pycodesign.nn.fusion import FusedStep
from pycodesign.nn.modules import Conv2d, Linear, Segment
from pycodesign.nn.program import LayerWeights, Program, Step, describe_layer, prepack
from pycodesign.nn.reports import Row, attach_rows, describe_packed
from pycodesign.ops import Packed

Affine = tuple[float, int]  # scale and zero point of uint8 values

QUANTIZED = "uint8"
NO_RANGE = "no example shows the range of its input: that was empty, or no tensor of floats"


class CannotPack(Exception):
    """A layer cannot be packed: its name, and why."""


@dataclass
class Lowered:
    """A segment as a program, its values named by nodes."""

    steps: list[FusedStep]
    inputs: list[fx.Node]
    program: Program = field(default_factory=lambda: Program([], [], []))
    weights: list[LayerWeights] = field(default_factory=list)
    packed: list[Packed] = field(default_factory=list)
    outputs: dict[fx.Node, int] = field(default_factory=dict)  # to positions among the program's outputs

    @property
    def names(self) -> list[str]:
        """Names of the modules whose weights it holds."""
        return [step.weights.name for step in self.steps if step.weights is not None]

    @property
    def arguments(self) -> list[fx.Node]:
        """What its module is called with; a layer alone takes its input and its residual, which may be the same."""
        return self.steps[0].inputs if self.is_layer else self.inputs

    @property
    def is_layer(self) -> bool:
        """Whether one layer is all it does, for inputs of any number of dimensions if it is a linear one."""
        return len(self.program.steps) == 1 and self.steps[0].weights is not None and not self.steps[0].normalized

    @property
    def takes_rows(self) -> bool:
        return all(step.form == "rows" and not step.normalized for step in self.steps)


def lower(segment: Sequence[FusedStep], affines: Mapping[fx.Node, Affine] | None) -> Lowered:
    """Write the program of a segment and pack its layers.

    Parameters
    ----------
    affines : dict, optional
        How values are held between steps; without it they are float32.

    Raises
    ------
    CannotPack
    """
    return _Lowering(segment, affines).lowered


def _pool_first(segment: Sequence[FusedStep]) -> list[FusedStep]:
    """Clamp what max pooling makes rather than all that it takes, as after a first layer that stays torch's."""
    steps = list(segment)
    made = {step.result: i for i, step in enumerate(steps)}
    for i, pool in enumerate(steps):
        before = made.get(pool.x)
        if (
            before is None
            or pool.op != "max_pool2d"
            or to_pair("dilation", pool.arguments.get("dilation", 1), 1) != (1, 1)
        ):
            continue  # a window with a dilation may lie in the padding
        clamp = steps[before]
        if clamp.op == "add" and clamp.other is None and clamp.may_absorb(pool.nodes[0]):
            steps[before] = replace(pool, nodes=clamp.nodes, x=clamp.x)
            steps[i] = replace(clamp, nodes=pool.nodes, x=clamp.result)
    return steps


class _Lowering:
    def __init__(self, segment: Sequence[FusedStep], affines: Mapping[fx.Node, Affine] | None) -> None:
        inside = {node for step in segment for node in step.nodes}
        inputs = list(dict.fromkeys(x for step in segment for x in step.inputs if x not in inside))
        self.lowered = Lowered(list(segment), inputs)
        self.program, self.affines = self.lowered.program, affines
        self.forms: list[tuple[str, float, int]] = []  # dtype, scale and zero point of every value
        self.values: dict[fx.Node, int] = {}
        self.quantized: dict[int, int] = {}  # from values to the same as integers
        for node in inputs:
            self.program.inputs.append({"dtype": "float32"})
            self.values[node] = self._number("float32")
        taken = {self._root(segment, x) for step in segment if step.op != "flatten" for x in step.inputs}
        for step in _pool_first(segment) if affines is None else segment:
            if step.op == "flatten":
                self.values[step.result] = self.values[step.x]
            else:
                self.values[step.result] = self._add(step, taken)
        made: dict[int, int] = {}
        for step in segment:
            if any(user not in inside for user in step.result.users):
                value = self.values[step.result]
                made.setdefault(value, len(made))
                self.lowered.outputs[step.result] = made[value]
        self.program.outputs += [self._as_float(value) for value in made]

    def _number(self, dtype: str, scale: float = 1.0, zero_point: int = 0) -> int:
        self.forms.append((dtype, scale, zero_point))
        return len(self.forms) - 1

    @staticmethod
    def _root(segment: Sequence[FusedStep], node: fx.Node) -> fx.Node:
        """Return the node whose value another holds flattened."""
        flattened = {step.result: step.x for step in segment if step.op == "flatten"}
        while node in flattened:
            node = flattened[node]
        return node

    def _add(self, step: FusedStep, taken: Collection[fx.Node]) -> int:
        x = self.values[step.x]
        if self.affines is not None and step.weights is not None:
            if self.forms[x][0] == "float32" and step.x not in self.affines:
                raise CannotPack(step.weights.name, NO_RANGE)
            x = self._as_integers(step.x)
        arguments = dict(step.arguments)
        if step.clamp is not None:
            arguments["clamp"] = step.clamp
        form = "float32", 1.0, 0
        if step.op == "max_pool2d":
            form = self.forms[x]
        elif self.affines is not None and step.result in taken and step.result in self.affines:
            form = QUANTIZED, *self.affines[step.result]
            arguments |= quantize_to(*form)
        layer = None
        if step.weights is not None:
            weights = step.weights.q, step.weights.bias
            try:
                packed = prepack(weights, step.weights.options, *self.forms[x])
            except (TypeError, ValueError) as error:
                raise CannotPack(step.weights.name, str(error)) from error
            self.lowered.weights.append(weights)
            self.lowered.packed.append(packed)
            layer = describe_layer(step.weights.name, weights, step.weights.options)
        other = None if step.other is None else self.values[step.other]
        self.program.steps.append(Step(step.op, x, other, arguments, layer))
        return self._number(*form)

    def _as_integers(self, node: fx.Node) -> int:
        value = self.values[node]
        if self.forms[value][0] != "float32":
            return value
        if value not in self.quantized:
            form = QUANTIZED, *self.affines[node]  # type: ignore[index]
            self.program.steps.append(Step("add", value, None, quantize_to(*form)))
            self.quantized[value] = self._number(*form)
        return self.quantized[value]

    def _as_float(self, value: int) -> int:
        if self.forms[value][0] == "float32":
            return value
        self.program.steps.append(Step("add", value))
        return self._number("float32")


def quantize_to(dtype: str, scale: float, zero_point: int) -> dict[str, Any]:
    return {"out_dtype": dtype, "out_scale": scale, "out_zero_point": zero_point}


def insert(traced: fx.GraphModule, lowered: Lowered, rows: Mapping[str, Row], replaced: dict[fx.Node, fx.Node]) -> None:
    """Let a module run what a segment did; the graph still has to be sorted and cleared of dead nodes.

    Parameters
    ----------
    replaced : dict
        The nodes in place of those that segments made; filled here.
    """
    graph, steps = traced.graph, lowered.steps
    inside = {node for step in steps for node in step.nodes}
    name, module = _make_module(traced, lowered)
    layers = zip(lowered.names, lowered.packed, strict=True)
    attach_rows(module, [describe_packed(rows[layer], packed, name) for layer, packed in layers if layer in rows])
    with graph.inserting_before(steps[-1].result):
        made = graph.call_module(name, tuple(replaced.get(x, x) for x in lowered.arguments))
        several = len(lowered.program.outputs) > 1
        forms = {step.result: step.form for step in steps}
        for node, position in lowered.outputs.items():
            value = graph.call_function(operator.getitem, (made, position)) if several else made
            if forms[node] == "flat":
                value = graph.call_method("flatten", (value, 1))
            replaced[node] = value
            node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in inside)


def _make_module(traced: fx.GraphModule, lowered: Lowered) -> tuple[str, nn.Module]:
    """Add the module that runs a segment: a layer of the same name where that is all it does."""
    steps, program = lowered.steps, lowered.program
    weights = steps[0].weights
    if lowered.is_layer and weights is not None:
        kind = Conv2d if steps[0].op == "conv2d" else Linear
        module: nn.Module = kind.from_quantized(
            weights.q, weights.bias, packed=lowered.packed[0], clamp=steps[0].clamp, **weights.options
        )
        calls = [node for node in traced.graph.nodes if node.op == "call_module" and node.target == weights.name]
        name = weights.name if len(calls) == 1 else _free_name(traced, weights.name.replace(".", "_"))
    else:
        module = Segment(program, lowered.weights, lowered.takes_rows, lowered.packed)
        name = _free_name(traced, "segment")
    module.eval()
    traced.add_submodule(name, module)
    return name, module


def _free_name(traced: fx.GraphModule, stem: str) -> str:
    number = 0
    while hasattr(traced, f"{stem}_{number}"):
        number += 1
    return f"{stem}_{number}"


def sort_graph(graph: fx.Graph) -> None:
    """Put every node behind what it reads; the order stays as far as it can."""
    waiting = list(graph.nodes)
    done: dict[fx.Node, None] = {}
    while waiting:
        later = []
        for node in waiting:
            if all(source in done for source in node.all_input_nodes):
                done[node] = None
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise RuntimeError("graph: expected no cycle")
        waiting = later
    nodes = sorted(done, key=lambda node: node.op == "output")  # stably: the output last
    for before, node in itertools.pairwise(nodes):
        before.append(node)
