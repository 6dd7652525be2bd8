"""Will a network gain here? The weights in its file, and what `pycodesign.ops` would do with each layer."""

from __future__ import annotations

import json
import math
import pickle
import re
import timeit
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from pycodesign import _core, _packed_file, demo, ops
from pycodesign._quantized import FewValued, from_arrays, to_numpy
from pycodesign.quantize import REPETITION_LEVELS, KernelCodebook, QuantizedTensor, from_fake_quantized, ternary
from pycodesign.repetition import factor

KINDS = {2: "linear", 4: "conv2d"}  # by the rank of the weights
FORMATS = "*.onnx, *.pt, *.pth, or safetensors: a packed layer, a network of pycodesign, or a state_dict"
FEW_LEVELS = 4  # so many gain with float and with 8-bit activations
CALIBRATION_RUNS = 20
NEAR = 1e-5  # levels so near to each other, relative to the largest, are meant to be one


@dataclass(frozen=True)
class StoredLayer:
    """A layer as a file has it."""

    name: str
    kind: str  # "conv2d" or "linear"
    shape: tuple[int, ...]  # of the weights, outputs first
    read: Callable[[], FewValued]  # TypeError or ValueError if the weights are not of few values
    options: Mapping[str, Any] = field(default_factory=dict)  # stride, padding, dilation, groups
    pixels: int | None = None  # of the output, for each of which all weights are used; None: the file does not say


def read_model(path: str | Path, shape: Sequence[int] | None = None) -> list[StoredLayer]:
    """Find the layers of a network that have weights.

    Parameters
    ----------
    path : path
        ``*.onnx``; or safetensors: a file of `ops.Packed.save`, of `demo.save_network`, or any ``state_dict``, of which
        ``*.codes`` with levels and scale, and ``*.weight`` of rank 2 and 4, are taken; or such a ``state_dict``, by
        itself or under that key, as ``torch.save`` writes it to ``*.pt`` and ``*.pth``. Nothing in a file is executed.
    shape : sequence of int, optional
        Of the network's input, where an ONNX file leaves it open.

    Returns
    -------
    list of StoredLayer

    Raises
    ------
    ModuleNotFoundError
        onnx, or for ``*.pt`` torch, is needed and not installed; the message says what to install.
    OSError
        The file cannot be read.
    ValueError
        It is none of these files, or `shape` does not fit it.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        try:
            from pycodesign.onnx_weights import read_onnx
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError('*.onnx files are read by onnx: pip install "pycodesign[onnx]"') from error
        return read_onnx(path, shape)
    if shape is not None:
        raise ValueError(f"shape: expected an ONNX model with it, got {path}")
    try:
        if path.suffix in (".pt", ".pth"):
            return list(_read_pickled(path))
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if _packed_file.KEY in metadata:
                return [_read_packed(path)]
            if "layers" in metadata:
                return [_hold(layer.name, layer.weights) for layer in demo.read_network(path)[0]]
            return list(_read_tensors(path, file))
    except (safetensors.SafetensorError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: expected {FORMATS}; got another file: {error}") from error


def _hold(name: str, q: FewValued) -> StoredLayer:
    return StoredLayer(name, KINDS[len(q.shape)], q.shape, lambda: q)


def _read_packed(path: Path) -> StoredLayer:
    packed = ops.load_packed(path)
    geometry = ("stride", "padding", "dilation", "groups") if packed.kind == "conv2d" else ()
    options = {name: packed._options[name] for name in geometry}
    return StoredLayer(path.stem, packed.kind, packed._shape, packed.weights, options)


def _read_tensors(path: Path, file: Any) -> Iterator[StoredLayer]:
    names = set(file.keys())
    for name in sorted(names):
        prefix, _, part = name.rpartition(".")
        if part == "codes" and {f"{prefix}.levels", f"{prefix}.scale"} <= names:
            yield _hold(prefix, from_arrays(*(file.get_tensor(f"{prefix}.{p}") for p in ("codes", "levels", "scale"))))
        elif part == "weight" and len(shape := file.get_slice(name).get_shape()) in KINDS:
            yield StoredLayer(prefix, KINDS[len(shape)], tuple(shape), _Tensor(path, name))


def _read_pickled(path: Path) -> Iterator[StoredLayer]:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('*.pt and *.pth files are read by torch: pip install "pycodesign[torch]"') from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a state_dict of tensors; got another file; save the model's state_dict()"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: expected a state_dict, got {type(state).__name__}")
    tensors = {
        name: tensor for name, tensor in state.items() if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }
    for name in sorted(tensors):
        prefix, _, part = name.rpartition(".")
        if part == "codes" and {f"{prefix}.levels", f"{prefix}.scale"} <= tensors.keys():
            parts = (f"{prefix}.{p}" for p in ("codes", "levels", "scale"))
            yield _hold(prefix, from_arrays(*(to_numpy(part, tensors[part]) for part in parts)))
        elif part == "weight" and tensors[name].ndim in KINDS:
            yield StoredLayer(prefix, KINDS[tensors[name].ndim], tuple(tensors[name].shape), _Floats(tensors[name]))


@dataclass(frozen=True)
class _Floats:
    """Reads a torch tensor."""

    tensor: Any

    def __call__(self) -> QuantizedTensor:
        if not self.tensor.dtype.is_floating_point:
            raise ValueError(f"w: expected floats, got {self.tensor.dtype}")
        return from_fake_quantized(self.tensor.detach().float().numpy())


@dataclass(frozen=True)
class _Tensor:
    """Reads one tensor of a safetensors file."""

    path: Path
    name: str

    def __call__(self) -> QuantizedTensor:
        with safetensors.safe_open(self.path, framework="numpy") as file:
            dtype = file.get_slice(self.name).get_dtype()
            if dtype in ("F16", "F32"):
                return from_fake_quantized(file.get_tensor(self.name))
        if dtype != "BF16":
            raise ValueError(f"w: expected F16, BF16 or F32, got {dtype}")
        return from_fake_quantized(read_bfloat16(self.path, self.name))


def read_bfloat16(path: Path, name: str) -> NDArray[np.float32]:
    """Read a tensor that safetensors cannot give to NumPy, which has no bfloat16: the upper half of a float32."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[name]
        begin, end = entry["data_offsets"]
        file.seek(8 + size + begin)
        halves = np.frombuffer(file.read(end - begin), "<u2")
    floats: NDArray[np.float32] = (halves.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])
    return floats


def explain_layer(layer: StoredLayer, input_dtype: str = "float32", method: str | None = None) -> dict[str, Any]:
    """Pack a layer as ``algorithm="auto"`` does, and count.

    Parameters
    ----------
    layer : StoredLayer
    input_dtype : {"float32", "uint8", "int8"}
        Of the activations; uint8 and int8 ones with zero point 0.
    method : str, optional
        Of `repetition.factor`: count what it leaves, instead of what the packed layer executes.

    Returns
    -------
    dict
        ``layer``, ``kind``, ``shape``; ``levels`` (a list; of the first output where each has its own; None if there
        are too many, or real kernels); ``algorithm``, None where there is none, and ``why``; ``gains``: whether that
        algorithm does less than dense sums; ``adds``, ``multiplies``, ``dense_ops`` for each output pixel, ``removed``
        (a share); ``bytes`` of the packed weights and machine code, ``float32_bytes``; ``pixels``, and ``macs`` =
        weights times pixels; ``predicted_ns`` for each output pixel, ``dense_ns`` of our dense sums, ``predicted_ms``
        for all pixels, where they are known.
    """
    size = math.prod(layer.shape)
    row: dict[str, Any] = {"layer": layer.name, "kind": layer.kind, "shape": list(layer.shape)}
    row |= {"levels": None, "algorithm": None, "why": "", "gains": False, "adds": None, "multiplies": None}
    row |= {"dense_ops": 2 * size - layer.shape[0], "removed": 0.0, "bytes": None, "float32_bytes": 4 * size}
    row |= {"pixels": layer.pixels, "macs": layer.pixels and size * layer.pixels}
    row |= dict.fromkeys(("predicted_ns", "dense_ns", "predicted_ms"))
    try:
        q = layer.read()
        codes = q.to_quantized() if isinstance(q, KernelCodebook) and q.values != "real" else q
        if isinstance(codes, QuantizedTensor):
            if codes.Q > REPETITION_LEVELS and (codes.levels != np.rint(codes.levels)).any():
                wanted = f"expected at most {REPETITION_LEVELS}"
                raise ValueError(f"w: {codes.Q} distinct values on no common grid, {wanted}")
            row["levels"] = np.atleast_2d(codes.levels)[0].tolist()
        prepack = ops.prepack_conv2d if layer.kind == "conv2d" else ops.prepack_linear
        packed = prepack(q, input_dtype=input_dtype, **layer.options).explain()
    except (TypeError, ValueError) as error:
        return row | {"why": str(error)}
    row |= {name: packed[name] for name in ("algorithm", "why", "adds", "multiplies")}
    removed = max(packed["share_removed"], 0.0)  # a packed linear layer may count more operations, of fewer bytes
    row |= {
        "gains": packed["algorithm"] != "dense",
        "removed": removed,
        "bytes": packed["bytes"] + packed["code_bytes"],
    }
    row |= predict_time(row, input_dtype)
    if method is not None:
        try:
            if isinstance(codes, KernelCodebook):
                raise ValueError(f"method: expected weights of few levels, got {codes!r}")
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", RuntimeWarning)
                program = factor(codes, method, groups=layer.options.get("groups", 1))
        except ValueError as error:  # too large for the method, or too many levels
            return row | {"adds": None, "multiplies": None, "removed": 0.0, "why": str(error)}
        row |= {"adds": program.adds, "multiplies": program.multiplies, "removed": program.removed}
        row["why"] = "; ".join([row["why"], *(str(warning.message) for warning in said)])
    return row


def predict_time(row: Mapping[str, Any], input_dtype: str) -> dict[str, float | None]:
    """Predict a row's times on one thread: what `calibrate` measured, times what the cost model says."""
    seconds = calibrate(input_dtype, row["kind"], row["algorithm"] == "packed")
    if row["algorithm"] == "packed":
        return {"predicted_ns": 1e9 * seconds * row["bytes"], "predicted_ms": _scale_ms(row, seconds * row["bytes"])}
    dense = seconds * math.prod(row["shape"])
    ratio = re.match(r"predicted ([0-9.]+) of the time of dense sums", row["why"])
    predicted = dense * float(ratio[1]) if ratio else dense
    return {"predicted_ns": 1e9 * predicted, "dense_ns": 1e9 * dense, "predicted_ms": _scale_ms(row, predicted)}


def _scale_ms(row: Mapping[str, Any], seconds: float) -> float | None:
    return None if row["pixels"] is None else 1e3 * seconds * row["pixels"]


@cache
def calibrate(input_dtype: str, kind: str, packed: bool) -> float:
    """Time one layer of medium size on one thread: seconds for a multiply-add of dense sums, or for a packed byte."""
    rng = np.random.default_rng(0)
    if kind == "conv2d":
        q, x = ternary(rng.standard_normal((64, 64, 3, 3), np.float32)), np.ones((1, 64, 28, 28), input_dtype)
        layer = ops.prepack_conv2d(q, padding=1, input_dtype=input_dtype, algorithm="dense")
    else:
        q, x = ternary(rng.standard_normal((1024, 1024), np.float32)), np.ones((1, 1024), input_dtype)
        layer = ops.prepack_linear(q, input_dtype=input_dtype, algorithm="packed" if packed else "dense")
    run = ops.conv2d if kind == "conv2d" else ops.linear
    threads = _core.get_num_threads()
    _core.set_num_threads(1)
    try:
        seconds = min(timeit.repeat(lambda: run(x, layer), number=1, repeat=CALIBRATION_RUNS))
    finally:
        _core.set_num_threads(threads)
    pixels = x.shape[-1] * x.shape[-2] if kind == "conv2d" else 1
    return seconds / (layer.explain()["bytes"] if packed else math.prod(q.shape) * pixels)


def explain_model(
    layers: Iterable[StoredLayer],
    input_dtype: str = "float32",
    advance: Callable[[], object] = lambda: None,
    method: str | None = None,
) -> dict[str, Any]:
    """Explain every layer; say which share of the network gains, and what would make more of it gain.

    Parameters
    ----------
    layers : iterable of StoredLayer
    input_dtype : {"float32", "uint8", "int8"}
    advance : callable
        Called after each layer.
    method : str, optional
        As in `explain_layer`.

    Returns
    -------
    dict
        ``layers``, rows of `explain_layer`; ``unit``, "multiply-accumulates" or, where the file does not give the sizes
        of images, "weights"; ``total`` of them; ``share`` of them in layers that gain; ``isa``; ``method``;
        ``summary``, a sentence; ``hints``, a list of sentences.
    """
    _core.get_num_threads()  # raises where a variable is no number: no fault of any layer
    rows = []
    for layer in layers:
        rows.append(explain_layer(layer, input_dtype, method))
        advance()
    known = all(row["macs"] is not None for row in rows)
    costs = [row["macs"] if known else row["float32_bytes"] // 4 for row in rows]
    total, gaining = sum(costs), sum(cost for row, cost in zip(rows, costs, strict=True) if row["gains"])
    unit = "multiply-accumulates" if known else "weights"
    share = gaining / total if total else 0.0
    winners = sum(row["gains"] for row in rows)
    summary = f"{winners} of {len(rows)} layers gain, with {share:.0%} of the {_round(total)} {unit}."
    return {
        "layers": rows,
        "unit": unit,
        "total": total,
        "share": share,
        "isa": _core.active_isa(),
        "method": method,
        "summary": summary,
        "hints": list(_give_hints(rows)),
    }


def plot_explanation(result: Mapping[str, Any], path: str | Path) -> None:
    """Draw a result of `explain_model`, bars for each layer: operations left, predicted times; needs matplotlib."""
    from matplotlib.figure import Figure

    rows = result["layers"]
    figure = Figure(figsize=(11, 1.5 + 0.4 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    y = np.arange(len(rows))
    bars = left.barh(y, [100 * (1 - row["removed"]) for row in rows])
    left.bar_label(bars, [f"{row['algorithm'] or '-'}, {row['removed']:.0%} removed" for row in rows], padding=3)
    left.set_yticks(y, [f"{row['layer']} {'x'.join(map(str, row['shape']))}" for row in rows])
    left.invert_yaxis()
    left.margins(x=0.4, y=0.01)
    left.set_xlabel(f"% of the dense operations left by {result['method'] or 'the kernel'}")
    right.barh(y - 0.2, [row["dense_ns"] or np.nan for row in rows], 0.4, label="dense sums")
    right.barh(y + 0.2, [row["predicted_ns"] or np.nan for row in rows], 0.4, label="as packed")
    if any(row["predicted_ns"] for row in rows):
        right.set_xscale("log")
    right.set_xlabel("predicted ns per output pixel, one thread")
    right.legend()
    figure.savefig(path)


def _give_hints(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Group the layers that stay by what would change that."""
    held = [row for row in rows if row["levels"]]
    noisy = [row["layer"] for row in held if _nearly_equal(row["levels"])]
    dense = [row for row in held if row["algorithm"] == "dense" and row["layer"] not in noisy]
    many = [row["layer"] for row in dense if len(row["levels"]) > FEW_LEVELS]
    narrow = [row["layer"] for row in dense if len(row["levels"]) <= FEW_LEVELS]
    refused = [row["layer"] for row in held if row["algorithm"] is None]
    floats = [row["layer"] for row in rows if row["levels"] is None and row["algorithm"] is None]
    if noisy:
        yield (
            f"{_join(noisy)}: some values differ by rounding errors alone. A straight-through estimator written "
            "w + (q - w).detach() does that: export q."
        )
    if many:
        yield f"{_join(many)}: 3 bits and up stay dense; binary, ternary and 2-bit weights gain."
    if narrow:
        yield f"{_join(narrow)}: few values, but too few outputs share an input for sums to recur."
    if refused:
        yield f"{_join(refused)}: of few values, but these activations do not suit them; try another --dtype."
    if floats:
        yield (
            f"{_join(floats)}: not quantized to few values. Train for it; rounding a network that was trained in "
            "float ruins its accuracy. Often the first and the last layer are left so on purpose."
        )


def _nearly_equal(levels: Sequence[float]) -> bool:
    return bool(len(levels) > 1 and np.diff(levels).min() < NEAR * np.abs(levels).max())


def _join(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _round(number: float) -> str:
    for unit in ("", " thousand", " million", " billion"):
        if number < 1000 or unit == " billion":
            break
        number /= 1000
    return f"{number:.3g}{unit}"
