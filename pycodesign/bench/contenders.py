"""A chain of equal layers in every engine: what is timed, and the check that it computes the right thing.

Every engine computes the same function of the same weights: convolution, bias, ReLU, from float32 to float32 or from
uint8 to uint8, requantized. Without the ReLU openvino multiplies the matrices of linear layers beforehand.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np

from pycodesign.bench.cases import ACTIVATION_SCALES, LARGEST, Array, Case, first_pixel
from pycodesign.bench.harness import CheckError

PRECISIONS = {"float32": "float32", "uint8": "int8", "uint4": "uint4"}  # as contenders' names give them
RIVAL_DTYPES = {"float32": "float32", "uint8": "uint8", "uint4": "uint8"}  # what the other engines run beside ours
Step = tuple[Callable[..., Any], tuple[Any, ...]]  # a function and what follows its input


@dataclass(eq=False)
class Chain:
    """A contender: the layers of a case in one engine.

    Parameters
    ----------
    case : Case
    dtype : {"float32", "uint8", "uint4"}
        Of the input and of the output of every layer; ``"uint4"`` is ours alone.
    threads : int
    """

    case: Case
    dtype: str
    threads: int
    engine: ClassVar[str]
    limits: ClassVar[dict[str, dict[str, str]]] = {}  # by instruction set: the environment that holds the engine to it
    details: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.prepare()

    @property
    def name(self) -> str:
        """Engine and precision, as in ``"torch int8"``."""
        return f"{self.engine} {PRECISIONS[self.dtype]}"

    @property
    def algorithm(self) -> str | None:
        """Which of an engine's ways was asked for; None if it has one."""
        return None

    def prepare(self) -> None:
        """Pack the weights."""
        raise NotImplementedError

    def run(self) -> object:
        """Run every layer once."""
        raise NotImplementedError

    def outputs(self) -> list[Array]:
        """Run, and return the last result (sequential) or every result, as `Case.expected` orders them."""
        raise NotImplementedError

    def for_case(self, case: Case) -> Chain:
        """The same contender on another case."""
        return type(self)(case, self.dtype, self.threads)

    def check(self) -> None:
        """Compare the first layer closely, then the whole chain.

        Raises
        ------
        CheckError
            If a float32 result is off by more than ``8 * eps * sqrt(K)`` of ``sum |w| |x|``, or an integer result by
            more than one; at the end of a sequential chain, where such differences have grown, by more than a
            thousandth of the largest result, or three.
        """
        head = self.case.head
        self._compare(self.for_case(head).outputs(), head.expected(self.dtype), head.float_bound, 1.0)
        expected = self.case.expected(self.dtype)
        largest = max((float(np.max(np.abs(y), initial=0)) for y in expected), default=0.0)
        self._compare(self.outputs(), expected, np.float64(1e-3 * largest), 3.0 if self.case.sequential else 1.0)

    def _compare(self, actual: list[Array], expected: list[Array], bound: Array | np.float64, quanta: float) -> None:
        if len(actual) != len(expected):
            raise CheckError(f"expected {len(expected)} results, got {len(actual)}")
        for got, want in zip(actual, expected, strict=True):
            if got.shape != want.shape:
                raise CheckError(f"expected a result of shape {want.shape}, got {got.shape}")
            error = np.abs(got.astype(np.float64) - want)
            if not np.all(error <= (bound if self.dtype == "float32" else quanta)):
                raise CheckError(f"expected the reference's results, off by {error.max()}")


class TorchChain(Chain):
    """torch in float32 (the best of contiguous, channels-last and packed weights) or int8 (engine x86)."""

    engine = "torch"
    limits: ClassVar = {  # oneDNN's, that of torch's own kernels, MKL's
        isa: {"ONEDNN_MAX_CPU_ISA": isa.upper(), "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
        for isa in ("avx2", "avx2_vnni")
    }

    def prepare(self) -> None:
        self.torch = importlib.import_module("torch")
        self.torch.set_num_threads(self.threads)
        x = self.torch.from_numpy(self.case.x)
        if self.dtype == "uint8":
            self.start, self.steps = self._quantized(x)
            return
        variants = self._float_variants(x)
        seconds = {name: _best_seconds(partial(self._forward, *variant)) for name, variant in variants.items()}
        best = min(seconds, key=lambda name: seconds[name])
        self.start, self.steps = variants[best]
        self.details["layout"] = best

    def _float_variants(self, x: Any) -> dict[str, tuple[Any, list[Step]]]:
        torch, layer = self.torch, self.case.layer
        weights = [torch.from_numpy(self.case.float_weights(i)) for i in range(self.case.length)]
        pairs = list(zip(weights, map(torch.from_numpy, self.case.biases), strict=True))

        def multiply(y: Any, *arguments: Any) -> Any:
            return torch.nn.functional.linear(y, *arguments).relu_()

        def convolve(y: Any, *arguments: Any) -> Any:
            return torch.nn.functional.conv2d(y, *arguments).relu_()

        variants: dict[str, tuple[Any, list[Step]]] = {}
        if layer.is_conv:
            for name in ("contiguous_format", "channels_last"):
                layout = getattr(torch, name)
                variants[name] = (
                    x.contiguous(memory_format=layout),
                    [
                        (convolve, (w.contiguous(memory_format=layout), b, layer.stride, layer.padding))
                        for w, b in pairs
                    ],
                )
        else:
            variants["contiguous_format"] = (x, [(multiply, pair) for pair in pairs])
        if torch.backends.mkldnn.is_available():
            # What torch.compile does with frozen weights: oneDNN reorders them once instead of at every call.
            mkldnn, geometry = torch.ops.mkldnn, ([layer.padding] * 2, [layer.stride] * 2, [1, 1], 1)
            steps: list[Step] = []
            for w, b in pairs:
                if layer.is_conv:
                    packed = mkldnn._reorder_convolution_weight(w, *geometry, list(x.shape))
                    steps.append((mkldnn._convolution_pointwise, (packed, b, *geometry, "relu", [], "")))
                else:
                    packed = mkldnn._reorder_linear_weight(w, layer.batch)
                    steps.append((mkldnn._linear_pointwise, (packed, b, "relu", [], "")))
            start = x.contiguous(memory_format=torch.channels_last) if layer.is_conv else x
            variants["packed weights"] = (start, steps)
        return variants

    def _quantized(self, x: Any) -> tuple[Any, list[Step]]:
        torch, layer = self.torch, self.case.layer
        if not layer.is_conv and "ONEDNN_MAX_CPU_ISA" in os.environ:
            raise NotImplementedError("fbgemm, which runs int8 linear layers, cannot be held to an instruction set")
        torch.backends.quantized.engine = "x86"
        quantized, scale = torch.ops.quantized, float(ACTIVATION_SCALES["uint8"])
        steps: list[Step] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces the end of its quantized tensors
            if layer.is_conv:
                x = x.contiguous(memory_format=torch.channels_last)
            start = torch.quantize_per_tensor(x, scale, 0, torch.quint8)
            for i in range(self.case.length):
                w = torch._make_per_channel_quantized_tensor(
                    torch.from_numpy(self.case.int8_weights(i)),
                    torch.from_numpy(self.case.weights[i].scale.astype(np.float64)),
                    torch.zeros(layer.outputs, dtype=torch.long),
                    0,
                )
                bias = torch.from_numpy(self.case.biases[i])
                if layer.is_conv:
                    packed = quantized.conv2d_prepack(w, bias, [layer.stride] * 2, [layer.padding] * 2, [1, 1], 1)
                    steps.append((quantized.conv2d, (packed, scale, 0)))
                else:
                    steps.append((quantized.linear, (quantized.linear_prepack(w, bias), scale, 0)))
        return start, steps

    def _forward(self, start: Any, steps: Sequence[Step]) -> Any:
        with self.torch.inference_mode():
            y = start
            for function, arguments in steps:
                y = function(y if self.case.sequential else start, *arguments)
            return y

    def run(self) -> object:
        return self._forward(self.start, self.steps)

    def outputs(self) -> list[Array]:
        parts = [self.steps] if self.case.sequential else [[step] for step in self.steps]
        results = [self._forward(self.start, part) for part in parts]
        plain = [(y.int_repr() if self.dtype == "uint8" else y).numpy() for y in results]
        return plain if self.case.sequential else [first_pixel(y) for y in plain]


class OnnxruntimeChain(Chain):
    """onnxruntime on a float32 or a quantize-dequantize graph."""

    engine = "onnxruntime"

    def prepare(self) -> None:
        onnxruntime = importlib.import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        # Its threads may spin inside a run, where that helps it, but not after, where it would slow the others.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        model = build_onnx(self.case, self.dtype)
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.feed = {"x": self.case.input(self.dtype)}

    def run(self) -> object:
        return self.session.run(None, self.feed)

    def outputs(self) -> list[Array]:
        results: list[Array] = self.session.run(None, self.feed)
        return results[: 1 if self.case.sequential else self.case.length]


class OpenvinoChain(Chain):
    """openvino on the same graph as onnxruntime."""

    engine = "openvino"

    def prepare(self) -> None:
        openvino = importlib.import_module("openvino")
        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # else it may compute float32 layers in bfloat16
        }
        model = core.compile_model(core.read_model(model=build_onnx(self.case, self.dtype)), "CPU", settings)
        self._verify(model)
        self.request = model.create_infer_request()
        self.request.set_tensor("x", openvino.Tensor(np.ascontiguousarray(self.case.input(self.dtype))))

    def _verify(self, model: Any) -> None:
        """Record how the layers run; raise `CheckError` unless each does, in the precision that the name says."""
        kinds: Counter[str] = Counter()
        for node in model.get_runtime_model().get_ops():
            info = {key: node.get_rt_info()[key].astype(str) for key in ("layerType", "primitiveType")}
            if info["layerType"] in ("Convolution", "FullyConnected", "MatMul"):
                kinds[info["primitiveType"]] += 1
        self.details["primitives"] = dict(kinds)
        suffix = "f32" if self.dtype == "float32" else "I8"
        right = sum(count for kind, count in kinds.items() if kind.lower().endswith(suffix.lower()))
        if right != self.case.length:
            raise CheckError(f"expected {self.case.length} layers of {suffix}, got {dict(kinds)}")

    def run(self) -> object:
        return self.request.infer()

    def outputs(self) -> list[Array]:
        self.request.infer()
        count = 1 if self.case.sequential else self.case.length
        return [self.request.get_output_tensor(i).data.copy() for i in range(count)]


@dataclass(eq=False)
class PycodesignChain(Chain):
    """This package: all layers in one `pycodesign.repetition.chain.Chain`.

    Layers that do not follow one another leave their results in the layout that a next layer would read; for the check
    the same layers write them out.
    """

    way: str = "auto"
    engine: ClassVar[str] = "pycodesign"

    @property
    def name(self) -> str:
        """Precision and algorithm too, as in ``"pycodesign int8 tables"``."""
        return f"{super().name} {self.way}"

    @property
    def algorithm(self) -> str | None:
        """What was asked for; what ran is in the details."""
        return self.way

    def prepare(self) -> None:
        ops, layer = importlib.import_module("pycodesign.ops"), self.case.layer
        importlib.import_module("pycodesign").set_num_threads(self.threads)
        storage = "float32" if self.dtype == "float32" else "uint8"
        packing: dict[str, Any] = {"input_dtype": storage, "algorithm": self.way}
        self.epilogue: dict[str, Any] = {"clamp": (0, None)}
        if self.dtype != "float32":
            scale = float(ACTIVATION_SCALES[self.dtype])
            packing["input_scale"] = scale
            self.epilogue |= {"out_dtype": "uint8", "out_scale": scale}
        if self.dtype == "uint4":
            packing["input_bits"] = 4
            self.epilogue["clamp"] = (0, LARGEST["uint4"] * scale)
        prepack = ops.prepack_conv2d if layer.is_conv else ops.prepack_linear
        if layer.is_conv:
            packing |= {"stride": layer.stride, "padding": layer.padding}
        start = time.perf_counter()
        self.packed = [prepack(q, b, **packing) for q, b in zip(self.case.weights, self.case.biases, strict=True)]
        seconds = time.perf_counter() - start
        self.details.update(
            algorithm=" ".join(dict.fromkeys(packed.algorithm for packed in self.packed)),
            bytes=int(self.packed[0].explain()["bytes"]),
            pack_seconds=round(seconds / self.case.length, 6),
        )
        self.x = self.case.input(self.dtype)
        self.chain = self._chain(all_outputs=False)
        self.results = self.chain(self.x)

    def _chain(self, *, all_outputs: bool) -> Any:
        chain = importlib.import_module("pycodesign.repetition.chain").Chain()
        scaling = () if self.dtype == "float32" else (float(ACTIVATION_SCALES[self.dtype]), 0)
        x = chain.input("float32" if self.dtype == "float32" else "uint8", *scaling)
        add, values = chain.conv2d if self.case.layer.is_conv else chain.linear, [x]
        for packed in self.packed:
            values.append(add(values[-1] if self.case.sequential else x, packed, **self.epilogue))
        chain.output(*values[1:] if all_outputs else values[-1:])
        return chain

    def for_case(self, case: Case) -> Chain:
        return type(self)(case, self.dtype, self.threads, self.way)

    def run(self) -> object:
        return self.chain(self.x, out=self.results)

    def outputs(self) -> list[Array]:
        if self.case.sequential:
            return [np.array(y) for y in self.chain(self.x)]
        return [first_pixel(y) for y in self._chain(all_outputs=True)(self.x)]

    def _compare(self, actual: list[Array], expected: list[Array], bound: Array | np.float64, quanta: float) -> None:
        super()._compare(actual, expected, bound, 0.0)  # integers: equal, not nearly equal


OURS = PycodesignChain.engine
ENGINES: dict[str, tuple[type[Chain], tuple[str, ...]]] = {
    "torch": (TorchChain, ("torch",)),
    "onnxruntime": (OnnxruntimeChain, ("onnxruntime", "onnx")),
    "openvino": (OpenvinoChain, ("openvino", "onnx")),
}


def missing_package(engine: str) -> str | None:
    """Name the first package that an engine of `ENGINES` needs and that is not installed; None if all are."""
    return next((name for name in ENGINES[engine][1] if importlib.util.find_spec(name) is None), None)


def hold_engine(engine: str, isa: str) -> str | None:
    """Hold an engine of `ENGINES` to an instruction set, for the rest of this process; say why if that cannot be."""
    limit = ENGINES[engine][0].limits.get(isa)
    if limit is None:
        return f"is not held to {isa}"
    if engine in sys.modules and limit.items() - os.environ.items():
        return f"was imported before it could be held to {isa}"
    os.environ.update(limit)
    return None


def build_onnx(case: Case, dtype: str) -> bytes:
    """Write a case as an ONNX model, with quantize-dequantize pairs around every layer for uint8.

    Layers that do not follow one another share the input and end in a max-pool that keeps one pixel, which costs next
    to nothing and keeps engines from dropping a layer or converting its whole output. Where layers have a stride, one
    more consumer of the input keeps openvino from moving that stride in front of them all.
    """
    helper = importlib.import_module("onnx.helper")
    to_tensor = importlib.import_module("onnx.numpy_helper").from_array
    float_type, uint8_type = (getattr(importlib.import_module("onnx").TensorProto, t) for t in ("FLOAT", "UINT8"))
    layer, quantized = case.layer, dtype == "uint8"
    kind = uint8_type if quantized else float_type
    scale, zero = ACTIVATION_SCALES["uint8"], np.uint8(0)
    nodes, constants, outputs = [], [], []

    def constant(name: str, value: Any) -> str:
        constants.append(to_tensor(np.asarray(value), name))
        return name

    def node(operator: str, sources: list[str], result: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, sources, [result], **attributes))
        return result

    def output(name: str, shape: tuple[int, ...], element: int) -> None:
        outputs.append(helper.make_tensor_value_info(name, element, shape))

    def weight_and_bias(i: int) -> list[str]:
        if not quantized:
            return [constant(f"w{i}", case.float_weights(i)), constant(f"b{i}", case.biases[i])]
        steps = {"w": case.weights[i].scale, "b": scale * case.weights[i].scale}
        values = {"w": case.int8_weights(i), "b": np.rint(case.biases[i] / steps["b"]).astype(np.int32)}
        return [
            node(
                "DequantizeLinear",
                [
                    constant(f"{n}{i}q", values[n]),
                    constant(f"{n}{i}s", steps[n]),
                    constant(f"{n}{i}z", np.zeros(layer.outputs, values[n].dtype)),
                ],
                f"{n}{i}",
                axis=0,
            )
            for n in "wb"
        ]

    attributes: dict[str, Any] = {"transB": 1}
    if layer.is_conv:
        attributes = {
            "kernel_shape": [layer.kernel] * 2,
            "strides": [layer.stride] * 2,
            "pads": [layer.padding] * 4,
        }
    activation = [constant("scale", scale), constant("zero", zero)] if quantized else []
    y = "x"
    for i in range(case.length):
        source = y if case.sequential else "x"
        if quantized:
            source = node("DequantizeLinear", [source, *activation], f"x{i}")
        y = node("Conv" if layer.is_conv else "Gemm", [source, *weight_and_bias(i)], f"y{i}", **attributes)
        if quantized:
            y = node("QuantizeLinear", [y, *activation], f"y{i}q")
        else:
            y = node("Relu", [y], f"y{i}r")
        if not case.sequential:
            if layer.is_conv:
                y = node("MaxPool", [y], f"pixel{i}", kernel_shape=[1, 1], strides=[layer.output_size] * 2)
            output(y, (layer.batch, layer.outputs, *((1, 1) if layer.is_conv else ())), kind)
    if case.sequential:
        output(y, layer.output_shape, kind)
    if layer.stride > 1:
        source = node("DequantizeLinear", ["x", *activation], "x_real") if quantized else "x"
        output(node("GlobalMaxPool", [source], "x_max"), (layer.batch, layer.inputs, 1, 1), float_type)
    x = helper.make_tensor_value_info("x", kind, layer.input_shape)
    graph = helper.make_graph(nodes, "chain", [x], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialized: bytes = model.SerializeToString()
    return serialized


def _best_seconds(run: Callable[[], object]) -> float:
    """Shortest of five runs after one to warm up."""
    run()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
