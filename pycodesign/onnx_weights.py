"""Weights in an ONNX file: float ones that a quantizer has rounded, and integer ones with their scales."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import numpy_helper, shape_inference

from pycodesign.explain import StoredLayer
from pycodesign.quantize import QuantizedTensor, from_fake_quantized

# Which inputs hold weights, their scale and their zero point.
WEIGHT_INPUTS: dict[str, tuple[int, int | None, int | None]] = {
    "Conv": (1, None, None),
    "ConvTranspose": (1, None, None),
    "FusedConv": (1, None, None),
    "ConvInteger": (1, None, 3),
    "QLinearConv": (3, 4, 5),
    "Gemm": (1, None, None),
    "FusedGemm": (1, None, None),
    "QGemm": (3, 4, 5),
    "MatMul": (1, None, None),
    "MatMulInteger": (1, None, 3),
    "MatMulIntegerToFloat": (1, 3, 5),
    "DynamicQuantizeMatMul": (1, 2, 3),
    "QLinearMatMul": (3, 4, 5),
}
Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Weights:
    """A constant, and the scale that its elements are integer multiples of.

    The scale has the constant's rank; each of its dimensions divides the constant's.
    """

    values: Array
    scale: Array | None = None

    def transpose(self, order: Sequence[int] | None = None) -> Weights:
        return Weights(self.values.transpose(order), None if self.scale is None else self.scale.transpose(order))

    def recover(self) -> QuantizedTensor:
        """Return the weights, outputs first, with levels that are integers where the scale makes them so."""
        values, scale = self.values, self.scale
        if values.dtype not in (np.float16, np.float64):
            values = values.astype(np.float32)  # bfloat16, or integers without a scale
        if scale is not None:
            scale = np.broadcast_to(scale, (values.shape[0], *scale.shape[1:]))
            scale = scale.reshape(values.shape[0], -1)
            scale = scale[:, 0] if scale.shape[1] == 1 else scale
            scale = scale if scale.ndim == 1 or values.ndim == 2 else None  # blocks within a convolution's channels
        return from_fake_quantized(values, scale)


def read_onnx(path: str | Path, shape: Sequence[int] | None = None) -> list[StoredLayer]:
    """Find the convolutions, transposed ones too, and matrix products of an ONNX graph whose weights are constants.

    Weights are initializers or constants, float or integer, behind any of DequantizeLinear, QuantizeLinear, Transpose,
    Cast and Identity. Subgraphs of control flow are not searched.

    Parameters
    ----------
    path : path
    shape : sequence of int, optional
        Of the first input. Without it an open first dimension counts as 1, one image.

    Returns
    -------
    list of StoredLayer
        Named as the nodes, or as their outputs where nodes have no name.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        It is no ONNX model, or `shape` does not fit its input.
    """
    path = Path(path)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, in any of its versions
        if isinstance(error, OSError):
            raise
        raise ValueError(f"{path}: expected an ONNX model, got another file: {error}") from error
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    shapes = infer_shapes(model, shape)
    graph = Graph(model, path.parent)
    return [layer for node in model.graph.node for layer in graph.read_node(node, shapes)]


def infer_shapes(model: onnx.ModelProto, shape: Sequence[int] | None) -> dict[str, list[int | None]]:
    """Return the dimensions of every tensor as far as they are known."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if shape is not None:
        dims = inputs[0].type.tensor_type.shape.dim if inputs else []
        fits = len(dims) == len(shape) and all(
            not dim.HasField("dim_value") or dim.dim_value == n for dim, n in zip(dims, shape, strict=False)
        )
        if not fits:
            declared = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in dims]
            raise ValueError(f"shape: expected one that fits the input {declared}, got {list(shape)}")
        for dim, n in zip(dims, shape, strict=True):
            dim.dim_value = n
    for value in inputs:
        first = value.type.tensor_type.shape.dim[:1]
        if first and not first[0].HasField("dim_value"):
            first[0].dim_value = 1
    del model.graph.value_info[:]  # these may know less
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        value.name: [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }


class Graph:
    """Looks up constants; their data are read from the file whenever asked for, and not kept."""

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        self.folder = folder
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output}

    def find(self, name: str) -> Weights | None:
        """Return the constant of that name; None if it depends on the input."""
        if name in self.tensors:
            try:
                return Weights(numpy_helper.to_array(self.tensors[name], str(self.folder)))
            except onnx.checker.ValidationError as error:  # no such file of external data, or one outside of the folder
                raise ValueError(f"{name}: expected its data beside the model, got none: {error}") from error
        node = self.producers.get(name)
        if node is None:
            return None
        attributes = read_attributes(node)
        if node.op_type == "Constant":
            return Weights(numpy_helper.to_array(attributes["value"])) if "value" in attributes else None
        if node.op_type not in ("DequantizeLinear", "QuantizeLinear", "Transpose", "Cast", "Identity"):
            return None
        found = self.find(node.input[0])
        if found is None or node.op_type in ("Cast", "Identity"):
            return found
        if node.op_type == "Transpose":
            return found.transpose(attributes.get("perm"))
        scale, zero_point = (self.find_values(other) for other in (*node.input[1:], "")[:2])
        if scale is None:
            return None
        step = dequantize if node.op_type == "DequantizeLinear" else quantize
        return step(found.values, scale, zero_point, attributes.get("axis", 1))

    def find_values(self, name: str) -> Array | None:
        found = self.find(name)
        return None if found is None else found.values

    def read_node(self, node: onnx.NodeProto, shapes: dict[str, list[int | None]]) -> Iterator[StoredLayer]:
        """Yield the node's layer; none if it has no weights."""
        if node.op_type not in WEIGHT_INPUTS:
            return
        names = [node.input[i] if i is not None and i < len(node.input) else "" for i in WEIGHT_INPUTS[node.op_type]]
        attributes = read_attributes(node)
        convolution = "Conv" in node.op_type
        outputs_first = convolution or bool(attributes.get("transB"))

        def read_weights() -> Weights | None:
            found, scale, zero_point = self.find(names[0]), self.find_values(names[1]), self.find_values(names[2])
            if found is None:
                return None
            if scale is not None or zero_point is not None:
                scale = np.ones((), np.float32) if scale is None else scale
                found = dequantize(found.values, scale, zero_point, axis=0 if outputs_first else 1)
            return found if outputs_first else found.transpose()

        try:
            found = read_weights()
            if found is None:
                return
            shape = found.values.shape
        except ValueError:  # of this layer alone: `read` says it again
            if names[0] not in self.tensors:
                raise
            dims = tuple(self.tensors[names[0]].dims)
            shape = dims if outputs_first else dims[::-1]

        def read() -> QuantizedTensor:
            if node.op_type == "ConvTranspose":
                raise ValueError("transposed convolutions are not served")
            found = read_weights()
            assert found is not None
            return found.recover()

        out = shapes.get(node.output[0])
        yield StoredLayer(
            name=node.name or node.output[0],
            kind="conv2d" if convolution else "linear",
            shape=shape,
            read=read,
            options=read_geometry(attributes) if len(shape) == 4 else {},
            pixels=None if out is None else count_pixels(out, channels=1 if convolution else len(out) - 1),
        )


def read_attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def read_geometry(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return a convolution's options; uneven padding, which changes no count, as that of the top left."""
    return {
        "stride": attributes.get("strides", [1, 1]),
        "padding": attributes.get("pads", [0, 0])[:2],
        "dilation": attributes.get("dilations", [1, 1]),
        "groups": attributes.get("group", 1),
    }


def count_pixels(shape: Sequence[int | None], channels: int) -> int | None:
    """Multiply the dimensions other than `channels`; None if one is not known."""
    sizes = [n for axis, n in enumerate(shape) if axis != channels]
    return None if None in sizes else math.prod(n for n in sizes if n is not None)


def dequantize(values: Array, scale: Array, zero_point: Array | None, axis: int) -> Weights:
    """Compute ``(values - zero_point) * scale``; both for all, for each index of `axis`, or for blocks."""
    steps = align(scale, values, axis)
    shifted = values.astype(np.float32)
    if zero_point is not None:
        shifted = shifted - stretch(align(zero_point, values, axis), values)
    return Weights(shifted * stretch(steps, values), steps)


def quantize(values: Array, scale: Array, zero_point: Array | None, axis: int) -> Weights:
    """Compute ``saturate(rint(values / scale) + zero_point)``, uint8 where no zero point says otherwise."""
    zero_point = np.zeros((), np.uint8) if zero_point is None else zero_point
    name = zero_point.dtype.name  # int8, uint4, ...
    if not name.lstrip("uint").isdecimal():
        raise ValueError(f"zero point: expected an integer, got {name}")
    bits, low = int(name.lstrip("uint")), 0
    if not name.startswith("u"):
        low = -(1 << (bits - 1))
    integers = np.rint(values.astype(np.float32) / stretch(align(scale, values, axis), values))
    return Weights(np.clip(integers + stretch(align(zero_point, values, axis), values), low, low + (1 << bits) - 1))


def align(parameter: Array, values: Array, axis: int) -> Array:
    """Give a scale or zero point the rank of the values."""
    floats = parameter.astype(np.float32)
    if floats.ndim == values.ndim and floats.ndim > 1:
        return floats  # blocks
    shape = [1] * values.ndim
    if floats.size > 1:
        if not -values.ndim <= axis < values.ndim:
            raise ValueError(f"axis: expected one of {values.ndim} dimensions, got {axis}")
        shape[axis] = floats.size
    return floats.reshape(shape)


def stretch(blocks: Array, values: Array) -> Array:
    """Repeat blocks so that they broadcast."""
    for axis, (count, size) in enumerate(zip(blocks.shape, values.shape, strict=True)):
        if count > max(1, size):
            raise ValueError(f"scale: expected at most {size} along dimension {axis}, got {count}")
        if count not in (1, size):
            blocks = blocks.repeat(-(-size // count), axis).take(range(size), axis)
    return blocks
