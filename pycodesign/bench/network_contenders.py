"""A whole network in every engine: what is timed, and its logits beside those of the float32 model.

Every engine gets the same graph and weights, float32 images in and float32 logits out. In int8 the images, and every
result that is not fused into the next operation, are rounded to uint8, weights to int8 with a scale for each output.
"""

from __future__ import annotations

import copy
import importlib
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pycodesign.bench.contenders import OURS, PRECISIONS
from pycodesign.bench.harness import CheckError
from pycodesign.bench.network_graphs import build_onnx, build_torch, quantize_eager
from pycodesign.bench.networks import Floats, Network

# Norm of the logits' error over that of the logits. Random networks amplify the rounding of activations, so int8 errors
# are large; above the bound something is wrong, not rounded.
ERROR_BOUNDS = {"float32": 1e-4, "uint8": 0.5}
Predict = Callable[[Floats], Floats]


@dataclass(eq=False)
class NetworkContender:
    """A contender: a network in one engine.

    Parameters
    ----------
    network : pycodesign.bench.networks.Network
    dtype : {"float32", "uint8"}
        Of the activations.
    threads : int
    """

    network: Network
    dtype: str
    threads: int
    engine: ClassVar[str]
    algorithm: ClassVar[str | None] = None
    details: dict[str, Any] = field(default_factory=dict, init=False)
    predict: Predict = field(init=False)  # logits of one batch

    def __post_init__(self) -> None:
        torch.set_num_threads(self.threads)
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces, once, the end of its quantized tensors
            self.predict = self.prepare()
            self.predict(self.network.x)
        self.details["prepare_seconds"] = round(time.perf_counter() - start, 3)

    @property
    def name(self) -> str:
        """Engine and precision, as in ``"openvino int8"``."""
        return f"{self.engine} {PRECISIONS[self.dtype]}"

    def prepare(self) -> Predict:
        """Convert the network, and give the function that runs it."""
        raise NotImplementedError

    def run(self) -> object:
        """Compute the logits of the network's `x`."""
        return self.predict(self.network.x)

    def check(self) -> None:
        """Compare logits with those of the float64 model and record how far they are.

        Raises
        ------
        CheckError
            If the relative error exceeds `ERROR_BOUNDS`.
        """
        expected = self.network.expected
        logits = np.stack([self.predict(x) for x in self.network.checked])
        if logits.shape != expected.shape:
            raise CheckError(f"expected logits of shape {expected.shape}, got {logits.shape}")
        error = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
        agree = float(np.mean(logits.argmax(-1) == expected.argmax(-1)))
        self.details |= {"error": float(f"{error:.2g}"), "agree": round(agree, 4)}
        if not error <= ERROR_BOUNDS[self.dtype]:
            raise CheckError(f"expected a relative error of at most {ERROR_BOUNDS[self.dtype]:g}, got {error:.2g}")

    def _pick(self, variants: Mapping[str, Predict]) -> Predict:
        """Take the fastest of several ways, and record which."""
        seconds = {name: _best_seconds(partial(predict, self.network.x)) for name, predict in variants.items()}
        best = min(seconds, key=lambda name: seconds[name])
        self.details["variant"] = best
        return variants[best]


class TorchNetwork(NetworkContender):
    """torch without compilation: the fastest of two layouts, with BatchNorm folded or not; int8 by engine x86."""

    engine = "torch"

    def prepare(self) -> Predict:
        if self.dtype == "uint8":
            forward = quantize_eager(self.network)
            return partial(_predict, forward, torch.channels_last)
        variants = {}
        for kind, model in {"": self.network.model, "folded ": build_torch(self.network, False)}.items():
            for name in ("contiguous_format", "channels_last"):
                layout = getattr(torch, name)
                converted: Any = copy.deepcopy(model)
                converted.to(memory_format=layout)
                variants[kind + name] = partial(_predict, converted, layout)
        return self._pick(variants)


class CompiledNetwork(NetworkContender):
    """torch.compile with frozen weights (inductor); int8 from quantize-dequantize pairs, which it fuses."""

    engine = "torch.compile"

    def prepare(self) -> Predict:
        from torch._inductor import config

        model = self.network.model if self.dtype == "float32" else build_torch(self.network, True)
        # A network of static shapes; with fullgraph, what cannot be compiled raises instead of running as it is.
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=False)
        layout = torch.channels_last if self.dtype == "uint8" else torch.contiguous_format
        with config.patch(freezing=True):
            _predict(compiled, layout, self.network.x)
        return partial(_predict, compiled, layout)


class OnnxruntimeNetwork(NetworkContender):
    """onnxruntime on a float32 or a quantize-dequantize graph."""

    engine = "onnxruntime"

    def prepare(self) -> Predict:
        onnxruntime = importlib.import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        # Its threads may spin inside a run, where that helps it, but not after, where it would slow the others.
        options.add_session_config_entry("session.force_spinning_stop", "1")

        def make(model: bytes) -> Predict:
            session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            return lambda x: session.run(None, {"x": x})[0]

        return self._pick(_variants(self.network, self.dtype, make))


class OpenvinoNetwork(NetworkContender):
    """openvino on the same graphs as onnxruntime."""

    engine = "openvino"

    def prepare(self) -> Predict:
        openvino = importlib.import_module("openvino")
        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # else it may compute float32 layers in bfloat16
        }

        def make(model: bytes) -> Predict:
            compiled = core.compile_model(core.read_model(model=model), "CPU", settings)
            self._verify(compiled)
            request = compiled.create_infer_request()

            def predict(x: Floats) -> Floats:
                request.set_tensor("x", openvino.Tensor(x, shared_memory=True))
                request.infer()
                logits: Floats = request.get_output_tensor(0).data.copy()
                return logits

            return predict

        return self._pick(_variants(self.network, self.dtype, make))

    def _verify(self, model: Any) -> None:
        """Raise `CheckError` unless every layer runs in the precision that the name says."""
        suffix = "f32" if self.dtype == "float32" else "i8"
        kinds = []
        for node in model.get_runtime_model().get_ops():
            info = {key: node.get_rt_info()[key].astype(str) for key in ("layerType", "primitiveType")}
            if info["layerType"] in ("Convolution", "FullyConnected", "MatMul"):
                kinds.append(info["primitiveType"].lower())
        wrong = [kind for kind in kinds if not kind.endswith(suffix)]
        if wrong or len(kinds) != sum(step.weights is not None for step in self.network.steps):
            raise CheckError(f"expected layers of {suffix}, got {kinds}")


class PycodesignNetwork(NetworkContender):
    """This package: one call of `pycodesign.nn.convert`."""

    engine = OURS
    algorithm = "auto"

    def prepare(self) -> Predict:
        importlib.import_module("pycodesign").set_num_threads(self.threads)
        self.model = convert_network(self.network, self.dtype)
        return partial(_predict, self.model, torch.contiguous_format)

    def check(self) -> None:
        """Compare logits, verify that layers were converted, and record what they run by and how large they are.

        Raises
        ------
        CheckError
            If logits are wrong, or a layer is torch's that has few distinct weights or an 8-bit input.
        """
        super().check()
        body = [name for name, module in self.network.model.named_modules() if isinstance(module, torch.nn.Conv2d)][1:]
        rows = importlib.import_module("pycodesign.nn").report(self.model)
        if left := [row.layer for row in rows if not row.converted and (self.dtype == "uint8" or row.layer in body)]:
            raise CheckError(f"expected layers of this package, got torch's: {', '.join(left)}")
        layers = [layer.explain() for layer in list_packed(self.model)]
        kept = sum(parameter.nbytes for parameter in self.model.parameters())  # of layers that stay torch's
        self.details |= {
            "algorithms": dict(Counter(layer["algorithm"] for layer in layers)),
            "bytes": kept + sum(layer["bytes"] for layer in layers),
            "code_bytes": sum(layer["code_bytes"] for layer in layers),
            "pack_seconds": round(sum(layer["seconds"] for layer in layers), 3),
        }


def convert_network(network: Network, dtype: str) -> torch.nn.Module:
    """Convert a network with this package."""
    nn = importlib.import_module("pycodesign.nn")
    images = torch.from_numpy(network.calibration)
    converted: torch.nn.Module = nn.convert(
        network.model, weights="from_fake_quantized", activations=dtype, example_inputs=images
    )
    return converted


def list_packed(model: torch.nn.Module) -> list[Any]:
    """List the packed layers of a converted network."""
    nn = importlib.import_module("pycodesign.nn")
    find_chain = importlib.import_module("pycodesign.nn.program").find_chain
    layers = []
    for module in model.modules():
        if isinstance(module, nn.Segment):
            layers += find_chain(module.weights(), module.program).layers
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            layers.append(module.packed())
    return layers


NETWORK_ENGINES: dict[str, tuple[type[NetworkContender], tuple[str, ...]]] = {
    "torch": (TorchNetwork, ()),
    "torch.compile": (CompiledNetwork, ()),
    "onnxruntime": (OnnxruntimeNetwork, ("onnxruntime", "onnx")),
    "openvino": (OpenvinoNetwork, ("openvino", "onnx")),
    OURS: (PycodesignNetwork, ()),
}


def _variants(network: Network, dtype: str, make: Callable[[bytes], Predict]) -> dict[str, Predict]:
    """Ways to write the graph; for int8 it depends on the engine whether sums should be rounded first."""
    if dtype == "float32":
        return {"graph": make(build_onnx(network, False))}
    ways = {"sums rounded": False, "sums deferred": True}
    if not any(step.kind == "add" for step in network.steps):
        ways = {"graph": False}
    return {name: make(build_onnx(network, True, deferred)) for name, deferred in ways.items()}


def _predict(model: Callable[[Tensor], Tensor], layout: torch.memory_format, x: Floats) -> Floats:
    with torch.inference_mode():
        logits: Floats = model(torch.from_numpy(x).contiguous(memory_format=layout)).numpy()
    return logits


def _best_seconds(run: Callable[[], object]) -> float:
    """Shortest of five runs after one to warm up."""
    run()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
