"""What is known of the shapes of a graph's values, whatever the size of its inputs.

Shapes are compared, never evaluated: equal ones are equal in every call. One that is not known is the node itself, so
that a value has the shape of what only changes its elements. Sizes that are no numbers stand for themselves, too.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx, nn

from pycodesign._arguments import to_pair
from pycodesign.nn.graph import KEEPS, bind, call_name, is_plain, match, to_plain

ELEMENTWISE = (nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Hardswish, nn.ELU, nn.Mish, nn.PReLU, nn.LayerNorm, nn.GroupNorm)
PROMOTING = (nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Softplus, nn.Softmax)  # make floats of integers
FUNCTIONS = frozenset("silu gelu leaky_relu hardswish elu mish layer_norm group_norm clone contiguous detach".split())
PROMOTING_FUNCTIONS = frozenset("sigmoid tanh hardsigmoid softplus".split())
ARITHMETIC = frozenset("add sub mul truediv div rsub".split())


class Image(NamedTuple):
    """Of (N, C, H, W). A side is a number, or (which, offset, stride) for ``(which + offset) // stride + 1``."""

    batch: Any
    channels: Any
    height: Any
    width: Any


class Rows(NamedTuple):
    """Of (..., I)."""

    lead: Any
    last: Any


Shape: TypeAlias = "Image | Rows | fx.Node"


class Shapes:
    """Shapes by node.

    Parameters
    ----------
    layers : collection of str
        Names of modules that are known to compute what `torch.nn.Conv2d` or `torch.nn.Linear` does.
    """

    def __init__(self, traced: fx.GraphModule, layers: Collection[str]) -> None:
        self.traced, self.layers = traced, layers
        self.known: dict[fx.Node, Shape] = {}
        self.sizes: dict[tuple[Any, str], int] = {}  # what layers say about the values that they take
        for node in traced.graph.nodes:
            self._note_size(node)
        for node in traced.graph.nodes:
            self.known[node] = self._find(node)

    def find_common(self, a: fx.Node, b: fx.Node) -> Image | Rows | None:
        """Return the shape of two float32 values, if it is the same in every call."""
        shapes = self.known[a], self.known[b]
        lift = self._as_image if any(isinstance(shape, Image) for shape in shapes) else self._as_rows
        if all(isinstance(shape, fx.Node) for shape in shapes):
            return None
        lifted = {lift(shape) for shape in shapes}
        shape = lifted.pop()
        return None if lifted or not _is_float(shape) else shape

    def _note_size(self, node: fx.Node) -> None:
        layer = self._find_layer(node)
        if layer is not None:
            axis, size = (
                ("last", layer.in_features) if isinstance(layer, nn.Linear) else ("channels", layer.in_channels)
            )
        elif match(self.traced, node) == ("norm", {"image": True}):
            norm: Any = self.traced.get_submodule(str(node.target))
            axis, size = "channels", norm.num_features
        else:
            return
        x = node.args[0]
        while isinstance(x, fx.Node):
            self.sizes[x, axis] = size
            found = match(self.traced, x)
            kinds = ("clamp", "norm", "max_pool2d", "avg_pool2d") if axis == "channels" else ("clamp",)
            same = self._keeps_shape(x, promoting=False) or (found is not None and found[0] in kinds)
            x = x.args[0] if same and x.args else None

    def _find_layer(self, node: fx.Node) -> Any:
        """Return the float32 convolution or linear layer that a node calls, if there is no doubt what it computes."""
        found = match(self.traced, node)
        if found is None or found[0] not in ("conv2d", "linear"):
            return None
        layer: Any = self.traced.get_submodule(str(node.target))
        if node.target in self.layers:
            return layer
        return layer if type(layer) in KEEPS and layer.weight.dtype == torch.float32 else None

    def _as_image(self, shape: Shape) -> Image:
        if isinstance(shape, Image):
            return shape
        sides = (((shape, axis), -1, 1) for axis in (2, 3))
        return Image((shape, 0), self.sizes.get((shape, "channels"), (shape, 1)), *sides)

    def _as_rows(self, shape: Shape) -> Rows:
        if isinstance(shape, Rows):
            return shape
        return Rows(shape, self.sizes.get((shape, "last"), (shape, -1)))

    def _find(self, node: fx.Node) -> Shape:
        found = match(self.traced, node)
        if found is None:
            return self._find_other(node)
        kind, arguments = found
        x: Any = node.args[0]
        shape = self.known[x]
        if kind in ("clamp", "norm"):
            return shape
        if kind == "add":
            return self.find_common(x, arguments["other"]) or node
        if kind == "flatten":
            image = self._as_image(shape)
            return Rows(image.batch, image)
        if kind in ("max_pool2d", "avg_pool2d"):
            if node.target in (torch.mean, "mean") and not isinstance(shape, Image):
                return node
            image = self._as_image(shape)
            if arguments.get("flat"):
                return Rows(image.batch, image.channels)
            kernel = arguments.get("kernel_size")
            if kernel is None:
                return image._replace(height=1, width=1)
            stride = arguments["stride"] or kernel
            return _slide(image, kernel, stride, arguments["padding"], arguments.get("dilation", 1))
        layer = self._find_layer(node)
        if layer is None:
            return node
        if kind == "linear":
            return Rows(self._as_rows(shape).lead, layer.out_features)
        image = self._as_image(shape)._replace(channels=layer.out_channels)
        if layer.padding == "same":
            return image
        padding = 0 if layer.padding == "valid" else layer.padding
        return _slide(image, *map(to_plain, (layer.kernel_size, layer.stride, padding, layer.dilation)))

    def _find_other(self, node: fx.Node) -> Shape:
        """Find the shape of what no step computes."""
        x = node.args[0] if node.args else None
        name = call_name(node)
        if node.op == "call_function" and name == "cat":
            return self._concatenate(node)
        if not isinstance(x, fx.Node):
            other = node.args[1] if name in ARITHMETIC and len(node.args) > 1 else None
            return self.known[other] if isinstance(other, fx.Node) and _is_float(self.known[other]) else node
        shape = self.known[x]
        if self._keeps_shape(x=node, promoting=_is_float(shape)):
            return shape
        if name in ARITHMETIC and _is_float(shape):
            other = bind(node, "x", "other").get("other")
            if isinstance(other, fx.Node):
                return self._broadcast(x, other) or node
            return shape if isinstance(other, (int, float)) else node
        if isinstance(shape, Image) and node.target is operator.getitem:
            return _slice(shape, node.args[1]) or node
        if isinstance(shape, Image) and name == "pad":
            return _pad(shape, bind(node, "x", "pad", "mode", mode="constant")) or node
        return node

    def _keeps_shape(self, x: fx.Node, promoting: bool) -> bool:
        if x.op == "call_module":
            module = self.traced.get_submodule(str(x.target))
            return is_plain(module) and type(module) in (ELEMENTWISE + PROMOTING if promoting else ELEMENTWISE)
        name = call_name(x)
        return name in FUNCTIONS or (promoting and name in PROMOTING_FUNCTIONS)

    def _broadcast(self, a: fx.Node, b: fx.Node) -> Shape | None:
        if (common := self.find_common(a, b)) is not None:
            return common
        for x, other in ((a, b), (b, a)):
            shape, small = self.known[x], self.known[other]
            if isinstance(shape, Image) and small == shape._replace(height=1, width=1):
                return shape
            if other.op == "get_attr" and not isinstance(shape, fx.Node) and _is_float(shape):
                value = operator.attrgetter(str(other.target))(self.traced)
                wanted = (shape[1], 1, 1) if isinstance(shape, Image) else (shape[1],)
                if isinstance(value, Tensor) and value.dtype == torch.float32 and tuple(value.shape) == wanted:
                    return shape
        return None

    def _concatenate(self, node: fx.Node) -> Shape:
        a = bind(node, "tensors", "dim", dim=0)
        values = a.get("tensors")
        if a["dim"] != 1 or not isinstance(values, (tuple, list)) or not all(isinstance(v, fx.Node) for v in values):
            return node
        shapes = [shape for shape in map(self.known.__getitem__, values) if isinstance(shape, Image)]
        if len(shapes) < len(values) or not all(map(_is_float, shapes)):
            return node
        return shapes[0]._replace(channels=sum(shape.channels for shape in shapes))


def _is_float(shape: Shape) -> bool:
    """Say whether values of this shape are float32: their channels are known from layers alone."""
    return not isinstance(shape, fx.Node) and isinstance(shape[1], int)


def _slide(image: Image, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Image:
    windows = zip(*(to_pair("window", value, 0) for value in (kernel, stride, padding, dilation)), strict=True)
    height, width = (_slide_side(side, *window) for side, window in zip(image[2:], windows, strict=True))
    return image._replace(height=height, width=width)


def _slide_side(side: Any, kernel: int, stride: int, padding: int, dilation: int) -> Any:
    offset = 2 * padding - dilation * (kernel - 1) - 1
    if isinstance(side, int):
        return (side + offset) // stride + 1
    which, before, step = side  # rounding down twice is rounding down once
    return which, before + step * (offset + 1), step * stride


def _slice(image: Image, index: Any) -> Image | None:
    """Return the shape of ``x[:, :c, ::a, ::b]``."""
    if not isinstance(index, tuple) or len(index) != 4 or not all(isinstance(part, slice) for part in index):
        return None
    steps, stops = ([getattr(part, name) for part in index] for name in ("step", "stop"))
    channels = stops.pop(1)
    steps = [1 if step is None else step for step in steps]
    if any(part.start is not None for part in index) or stops != [None] * 3 or steps[:2] != [1, 1]:
        return None
    if not all(isinstance(number, int) for number in (*steps, channels or 0)) or (channels or 0) < 0:
        return None
    if channels is not None:
        if not isinstance(image.channels, int):
            return None
        image = image._replace(channels=min(channels, image.channels))
    return _slide(image, 1, tuple(steps[2:]), 0, 1)


def _pad(image: Image, arguments: dict[str, Any]) -> Image | None:
    """Return the shape where constants were added on either side of the channels."""
    pad = arguments.get("pad")
    if not isinstance(pad, (tuple, list)) or len(pad) < 6 or not all(isinstance(size, int) for size in pad):
        return None
    fits = not any((*pad[:4], *pad[6:])) and arguments["mode"] == "constant" and _is_float(image)
    return image._replace(channels=image.channels + pad[4] + pad[5]) if fits else None
