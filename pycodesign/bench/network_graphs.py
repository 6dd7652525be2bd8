"""A network written for an engine: as a torch or ONNX graph, for int8 with quantize-dequantize pairs, or in torch's own
quantized operators.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from pycodesign.bench.networks import Grid, LayerWeights, Network, Step, torch_call

Value = TypeVar("Value")


class Emitter(Protocol[Value]):
    """Writes the operations of a graph in some engine's form."""

    def compute(self, step: Step, sources: list[Value], grids: list[Grid] | None) -> Value:
        """Write a step; a layer's weights as int8 if the grids of its sources are given."""

    def quantize(self, value: Value, grid: Grid, name: str) -> Value:
        """Write a rounding to uint8."""

    def dequantize(self, value: Value, grid: Grid, name: str) -> Value:
        """Write its inverse."""


def emit_network(network: Network, emitter: Emitter[Value], x: Value, int8: bool, deferred_sums: bool = False) -> Value:
    """Write a network, for int8 with quantize-dequantize pairs wherever a result is rounded.

    Parameters
    ----------
    network : Network
    emitter : Emitter
    x : value of the emitter
        The network's input.
    int8 : bool
    deferred_sums : bool
        Leave the first operand of an add in float32, for engines that compute the add behind the convolution.

    Returns
    -------
    value of the emitter
        The logits.
    """
    rounded: dict[str, Value] = {}
    values: dict[str, Value] = {}

    def read(source: str, reader: str) -> Value:
        if source not in rounded:
            return values[source]
        return emitter.dequantize(rounded[source], network.grids[source], f"{source}_to_{reader}")

    def store(name: str, value: Value, exact: bool) -> None:
        if exact:
            values[name] = value
        else:
            rounded[name] = emitter.quantize(value, network.grids[name], f"{name}_rounded")

    store("x", x, exact=not int8)
    for step in network.steps:
        readers = network.consumers[step.name]
        fused = [r.kind for r in readers] == ["relu"]
        summed = deferred_sums and [r.kind for r in readers] == ["add"] and readers[0].sources[0] == step.name
        grids = [network.grids[source] for source in step.sources] if int8 else None
        y = emitter.compute(step, [read(source, step.name) for source in step.sources], grids)
        store(step.name, y, exact=not int8 or fused or summed or not readers)
    return values[network.steps[-1].name]


class TorchEmitter:
    """Writes an `torch.fx` graph."""

    def __init__(self) -> None:
        self.root = torch.nn.Module()
        self.graph = fx.Graph()
        if not hasattr(torch.ops.quantized_decomposed, "quantize_per_channel"):
            importlib.import_module("torch.ao.quantization.fx._decomposed")
        self.ops: Any = torch.ops.quantized_decomposed

    def compute(self, step: Step, sources: list[fx.Node], grids: list[Grid] | None) -> fx.Node:
        function, arguments = torch_call(step)
        if step.weights:
            floats, integers, scale, bias = step.weights
            if grids is None:
                w = self._buffer(f"{step.name}_weight", floats)
            else:
                integral = self._buffer(f"{step.name}_weight", integers)
                steps = self._buffer(f"{step.name}_scale", scale)
                zeros = self._buffer(f"{step.name}_zero", np.zeros(len(scale), np.int64))
                details = (steps, zeros, 0, -128, 127, torch.int8)
                w = self.graph.call_function(self.ops.dequantize_per_channel.default, (integral, *details))
            sources = [*sources, w, self._buffer(f"{step.name}_bias", bias)]
        return self.graph.call_function(function, (*sources, *arguments))

    def quantize(self, value: fx.Node, grid: Grid, name: str) -> fx.Node:
        arguments = (value, *grid, 0, 255, torch.uint8)
        return self.graph.call_function(self.ops.quantize_per_tensor.default, arguments)

    def dequantize(self, value: fx.Node, grid: Grid, name: str) -> fx.Node:
        arguments = (value, *grid, 0, 255, torch.uint8)
        return self.graph.call_function(self.ops.dequantize_per_tensor.default, arguments)

    def _buffer(self, name: str, value: NDArray[Any]) -> fx.Node:
        self.root.register_buffer(name, torch.from_numpy(value))
        return self.graph.get_attr(name)


def build_torch(network: Network, int8: bool) -> fx.GraphModule:
    """Write a network as a torch module with BatchNorm folded; for int8 with quantize-dequantize pairs."""
    emitter = TorchEmitter()
    x = emitter.graph.placeholder("x")
    emitter.graph.output(emit_network(network, emitter, x, int8, deferred_sums=True))
    return fx.GraphModule(emitter.root, emitter.graph)


class OnnxEmitter:
    """Collects nodes and constants of an ONNX graph."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.helper = importlib.import_module("onnx.helper")
        self.from_array = importlib.import_module("onnx.numpy_helper").from_array

    def compute(self, step: Step, sources: list[str], grids: list[Grid] | None) -> str:
        if step.weights:
            sources = [*sources, *self._weights(step.name, step.weights, grids)]
        operator_name, attributes = _ONNX[step.kind](step.module)
        return self._node(operator_name, sources, step.name, **attributes)

    def quantize(self, value: str, grid: Grid, name: str) -> str:
        return self._node("QuantizeLinear", [value, *self._grid(grid, name)], name)

    def dequantize(self, value: str, grid: Grid, name: str) -> str:
        return self._node("DequantizeLinear", [value, *self._grid(grid, name)], name)

    def _weights(self, name: str, weights: LayerWeights, grids: list[Grid] | None) -> list[str]:
        if grids is None:
            return [self._constant(f"{name}_w", weights.floats), self._constant(f"{name}_b", weights.bias)]
        step = np.float32(grids[0].scale) * weights.scale
        parts = {"w": (weights.integers, weights.scale), "b": (np.rint(weights.bias / step).astype(np.int32), step)}
        results = []
        for part, (integers, scale) in parts.items():
            prefix = f"{name}_{part}"
            sources = [
                self._constant(f"{prefix}_integers", integers),
                self._constant(f"{prefix}_scale", scale),
                self._constant(f"{prefix}_zero", np.zeros(len(scale), integers.dtype)),
            ]
            results.append(self._node("DequantizeLinear", sources, prefix, axis=0))
        return results

    def _grid(self, grid: Grid, name: str) -> list[str]:
        return [
            self._constant(f"{name}_scale", np.float32(grid.scale)),
            self._constant(f"{name}_zero", np.uint8(grid.zero_point)),
        ]

    def _constant(self, name: str, value: Any) -> str:
        self.constants.append(self.from_array(np.asarray(value), name))
        return name

    def _node(self, operator_name: str, sources: list[str], result: str, **attributes: Any) -> str:
        self.nodes.append(self.helper.make_node(operator_name, sources, [result], **attributes))
        return result


_ONNX: dict[str, Callable[[Any], tuple[str, dict[str, Any]]]] = {
    "conv2d": lambda m: ("Conv", {"kernel_shape": m.kernel_size, "strides": m.stride, "pads": m.padding * 2}),
    "linear": lambda m: ("Gemm", {"transB": 1}),
    "add": lambda m: ("Add", {}),
    "relu": lambda m: ("Relu", {}),
    "max_pool2d": lambda m: (
        "MaxPool",
        {"kernel_shape": [m.kernel_size] * 2, "strides": [m.stride] * 2, "pads": [m.padding] * 4},
    ),
    "avg_pool2d": lambda m: ("GlobalAveragePool", {}),
    "flatten": lambda m: ("Flatten", {}),
}


def build_onnx(network: Network, int8: bool, deferred_sums: bool = False) -> bytes:
    """Write a network as an ONNX model for its batch; with quantize-dequantize pairs for int8."""
    emitter = OnnxEmitter()
    y = emit_network(network, emitter, "x", int8, deferred_sums)
    helper, kind = emitter.helper, importlib.import_module("onnx").TensorProto.FLOAT
    ends = {"x": network.x.shape, y: network.expected.shape[1:]}
    x_info, y_info = (helper.make_tensor_value_info(name, kind, shape) for name, shape in ends.items())
    graph = helper.make_graph(emitter.nodes, network.name, [x_info], [y_info], emitter.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialized: bytes = model.SerializeToString()
    return serialized


def quantize_eager(network: Network) -> Callable[[Tensor], Tensor]:
    """Write a network in torch's own quantized operators (engine x86), which round where `emit_network` does."""
    torch.backends.quantized.engine = "x86"
    quantized: Any = torch.ops.quantized
    calls: list[tuple[str, tuple[str, ...], Callable[..., Any], tuple[Any, ...]]] = []
    alias: dict[str, str] = {}  # a ReLU is part of what it follows
    for step in network.steps:
        readers = network.consumers[step.name]
        sources = tuple(alias.get(source, source) for source in step.sources)
        if step.kind == "relu":
            alias[step.name] = sources[0]
            continue
        relu = [reader.kind for reader in readers] == ["relu"]
        grid = network.grids[readers[0].name if relu else step.name]
        if step.kind == "add":
            function, arguments = quantized.add_relu if relu else quantized.add, tuple(grid)
        elif step.kind == "linear":
            function, arguments = _prepack_eager(step, relu), tuple(network.grids[step.sources[0]])
        elif step.kind == "conv2d":
            function, arguments = _prepack_eager(step, relu), tuple(grid)
        elif step.kind == "avg_pool2d":
            function, arguments = _pool_eager, tuple(grid)
        else:
            function, arguments = torch_call(step)
        calls.append((step.name, sources, function, arguments))
    x_grid = network.grids["x"]

    def forward(x: Tensor) -> Tensor:
        values = {"x": torch.quantize_per_tensor(x, *x_grid, torch.quint8)}
        for name, sources, function, arguments in calls:
            values[name] = function(*(values[source] for source in sources), *arguments)
        logits: Tensor = values[calls[-1][0]]
        return logits

    return forward


def _pool_eager(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Pool to a grid of its own; torch's own operator would keep that of its input, which is too coarse for means."""
    mean = torch.nn.functional.adaptive_avg_pool2d(x.dequantize(), 1)
    return torch.quantize_per_tensor(mean, scale, zero_point, torch.quint8)


def _prepack_eager(step: Step, relu: bool) -> Callable[..., Tensor]:
    """Pack a layer, to call with its input and a grid: of its result or, as logits are float32, of a linear's input."""
    quantized, weights, m = torch.ops.quantized, step.weights, step.module
    assert weights
    scale = torch.from_numpy(weights.scale.astype(np.float64))
    zeros = torch.zeros(len(scale), dtype=torch.long)
    bias = torch.from_numpy(weights.bias)
    w = torch._make_per_channel_quantized_tensor(torch.from_numpy(weights.integers), scale, zeros, 0)
    if step.kind == "linear":
        packed = quantized.linear_prepack(w, bias)
        multiply = quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return lambda x, *grid: multiply(x.dequantize(), *grid, packed)
    packed = quantized.conv2d_prepack(w, bias, list(m.stride), list(m.padding), list(m.dilation), m.groups)
    convolve = quantized.conv2d_relu if relu else quantized.conv2d
    return lambda x, *grid: convolve(x, packed, *grid)
