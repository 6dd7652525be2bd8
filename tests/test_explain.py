"""What `pycodesign explain` reads from files of torch and safetensors, and what it concludes; see also test_onnx.py."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

import pycodesign.nn
from pycodesign import demo, explain, ops, quantize
from pycodesign.explain import StoredLayer, explain_layer, explain_model, read_model
from pycodesign.quantize import QuantizedTensor
from pycodesign.repetition import SumProgram, factor

pytestmark = pytest.mark.usefixtures("without_matrix_unit")

F32 = np.float32


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=F32)


# safetensors


def test_packed_layer(tmp_path: Path) -> None:
    q = quantize.ternary(normal(32, 16, 3, 3))
    packed = ops.prepack_conv2d(q, stride=2, padding=1, groups=1)
    packed.save(tmp_path / "layer.safetensors")
    (layer,) = read_model(tmp_path / "layer.safetensors")
    assert layer.name == "layer"
    assert layer.options == {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    np.testing.assert_array_equal(layer.read().codes, q.codes)
    row, expected = explain_layer(layer), packed.explain()
    for name in ("algorithm", "why", "adds", "multiplies", "dense_ops", "float32_bytes"):
        assert row[name] == expected[name]
    assert row["removed"] == expected["share_removed"]
    assert row["bytes"] == expected["bytes"] + expected["code_bytes"]

    ops.prepack_linear(quantize.binary(normal(10, 40))).save(tmp_path / "layer.safetensors")
    (layer,) = read_model(tmp_path / "layer.safetensors")
    assert (layer.kind, layer.shape, layer.options) == ("linear", (10, 40), {})
    row = explain_layer(layer)
    assert row["adds"] + row["multiplies"] > row["dense_ops"] and row["removed"] == 0  # it gains by its bytes


def test_shipped_network() -> None:
    layers = read_model(Path(demo.__file__).parent / "data" / "mnist_ternary.safetensors")
    assert [layer.name for layer in layers] == [*(f"conv{i}" for i in range(6)), "classifier"]
    assert explain_model(layers)["share"] > 0.99  # whether the first layer gains depends on the processor


def test_state_dict(tmp_path: Path) -> None:
    ternary, binary = quantize.ternary(normal(8, 4, 3, 3)), quantize.binary(np.sign(normal(6, 20)))
    tensors = {
        "conv.weight": torch.from_numpy(ternary.dequantize()),
        "conv.bias": torch.zeros(8),
        "mask.table": torch.ones(8, 4),
        "norm.weight": torch.ones(8),
        "half.weight": torch.from_numpy(binary.dequantize()).half(),
        "brain.weight": torch.from_numpy(binary.dequantize()).bfloat16(),
        "eight.weight": torch.ones(4, 4, dtype=torch.int8),
        "packed.codes": torch.from_numpy(ternary.codes),
        "packed.levels": torch.from_numpy(ternary.levels),
        "packed.scale": torch.from_numpy(ternary.scale),
    }
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path)
    layers = {layer.name: layer for layer in read_model(path)}
    assert layers.keys() == {"conv", "half", "brain", "eight", "packed"}
    for name, expected in {"conv": ternary, "half": binary, "brain": binary, "packed": ternary}.items():
        np.testing.assert_array_equal(layers[name].read().dequantize(), expected.dequantize())
    assert explain_layer(layers["eight"])["why"] == "w: expected F16, BF16 or F32, got I8"


@pytest.mark.parametrize("values", ["sign", "real"])
def test_codebooks(tmp_path: Path, values: str) -> None:
    q = quantize.kernel_codebook(normal(64, 32, 3, 3), 8, values)
    layer = pycodesign.nn.Conv2d.from_quantized(q, padding=1)
    packed, state, pickled = (tmp_path / name for name in ("layer.safetensors", "model.safetensors", "model.pt"))
    ops.prepack_conv2d(q, padding=1, algorithm="codebook").save(packed)
    tensors = {f"part.{name}": tensor for name, tensor in layer.state_dict().items()}
    safetensors.torch.save_file(tensors, state)
    torch.save(tensors, pickled)
    for path in (packed, state, pickled):
        (stored,) = read_model(path)
        np.testing.assert_array_equal(stored.read().dequantize(), q.dequantize())
        row = explain_layer(stored)
        assert stored.shape == (64, 32, 3, 3) and row["gains"] and row["adds"] > 0
        assert row["levels"] == (None if values == "real" else [-1, 1])
        assert values == "sign" or row["algorithm"] == "codebook"
        assert "hints" in explain_model([stored]) and not explain_model([stored])["hints"]
        counted = explain_layer(stored, method="pair")
        assert counted["adds"] is None if values == "real" else 0 < counted["adds"]
        assert ("method: expected weights of few levels" in counted["why"]) == (values == "real")


# Conclusions


def stored(q: QuantizedTensor, **options: object) -> StoredLayer:
    return explain._hold("layer", q) if not options else StoredLayer("layer", "conv2d", q.shape, lambda: q, options)


W = normal(64, 32, 3, 3)
recover = quantize.from_fake_quantized
REPEATED = np.sign(normal(64, 1, 3, 3)).repeat(32, axis=1)  # pays everywhere but on a matrix unit
FRACTIONS = QuantizedTensor(quantize.ternary(W).codes, np.array([0.1, 0.25, 1], F32), np.ones(64, F32))
NOISY = recover(np.where(W > 0, F32(0.3), F32(-0.3)) + np.float32(1e-7) * W.round().clip(-1, 1))


@pytest.mark.parametrize(
    ("layer", "dtype", "algorithm", "hint"),
    [
        (stored(quantize.ternary(W)), "float32", "codegen", None),
        (stored(quantize.binary(REPEATED)), "uint8", "codegen", None),
        (stored(quantize.ternary(normal(64, 128))), "float32", "packed", None),
        (stored(quantize.uniform(W, 8)), "float32", "dense", "layer: 3 bits and up stay dense"),
        (stored(quantize.uniform(W, 4)), "uint8", "dense", "layer: 3 bits and up stay dense"),
        (stored(quantize.binary(W[:, :1]), groups=64), "float32", "dense", "too few outputs share an input"),
        (stored(recover(W.clip(0.1, 0.3).round(1))), "float32", "codegen", None),
        (stored(FRACTIONS), "uint8", None, "these activations do not suit them"),
        (stored(NOISY), "float32", "codegen", "w + (q - w).detach() does that"),
        (StoredLayer("layer", "conv2d", W.shape, lambda: recover(W)), "float32", None, "not quantized to few values"),
    ],
    ids=["ternary", "uint8", "linear", "8 bits", "4 bits", "depthwise", "2 values", "fractions", "noise", "float"],
)
def test_conclusions(layer: StoredLayer, dtype: str, algorithm: str | None, hint: str | None) -> None:
    calls: list[None] = []
    result = explain_model([layer], dtype, lambda: calls.append(None))
    (row,) = result["layers"]
    assert len(calls) == 1
    assert row["algorithm"] == algorithm
    assert row["gains"] == (algorithm in ("codegen", "packed")) == (result["share"] == 1)
    assert 0 <= row["removed"] < 1 and row["why"]
    if hint is None:
        assert not result["hints"]
    else:
        assert len(result["hints"]) == 1 and hint in result["hints"][0]


def test_hints_name_at_most_three_layers() -> None:
    result = explain_model([stored(quantize.uniform(W[:4], 8))] * 5)
    assert result["hints"][0].startswith("layer, layer, layer and 2 more: 3 bits")
    assert result["summary"] == "0 of 5 layers gain, with 0% of the 5.76 thousand weights."


# Errors


def write(content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "file").write_bytes(content)
        return folder / "file"

    return make


def foreign(folder: Path) -> Path:
    safetensors.numpy.save_file({"x": np.ones(3, F32)}, folder / "file", metadata={"layers": '[{"other": 1}]'})
    return folder / "file"


def damaged(folder: Path) -> Path:
    safetensors.numpy.save_file({"x": np.ones(3, F32)}, folder / "file", metadata={"pycodesign": "{}"})
    return folder / "file"


def graph(folder: Path) -> Path:
    (folder / "file.onnx").write_bytes(b"no graph at all")
    return folder / "file.onnx"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (write(b"PK\3\4 a pickle of torch, perhaps"), r"file: expected \*\.onnx, \*\.pt, .*; got another file"),
        (write(b""), r"file: expected \*\.onnx, \*\.pt, .*; got another file"),
        (foreign, r"file: expected \*\.onnx, \*\.pt, .*; got another file"),
        (damaged, "file: expected a packed layer of pycodesign, got a damaged or foreign file"),
        (graph, r"file\.onnx: expected an ONNX model, got another file"),
    ],
)
def test_other_files_are_errors(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_model(make(tmp_path))


# torch.save


@pytest.mark.parametrize("nested", [False, True])
def test_pickled_state_dict(tmp_path: Path, nested: bool) -> None:
    ternary, binary = quantize.ternary(normal(8, 4, 3, 3)), quantize.binary(np.sign(normal(6, 20)))
    tensors = {
        "conv.weight": torch.from_numpy(ternary.dequantize()),
        "conv.bias": torch.zeros(8),
        "brain.weight": torch.from_numpy(binary.dequantize()).bfloat16(),
        "eight.weight": torch.ones(4, 4, dtype=torch.int8),
        "norm.num_batches_tracked": torch.tensor(3),
        "packed.codes": torch.from_numpy(ternary.codes),
        "packed.levels": torch.from_numpy(ternary.levels),
        "packed.scale": torch.from_numpy(ternary.scale),
        "version": 1,
    }
    path = tmp_path / "model.pt"
    torch.save({"state_dict": tensors, "epoch": 3} if nested else tensors, path)
    layers = {layer.name: layer for layer in read_model(path)}
    assert layers.keys() == {"conv", "brain", "eight", "packed"}
    for name, expected in {"conv": ternary, "brain": binary, "packed": ternary}.items():
        q = layers[name].read()
        assert layers[name].shape == q.shape
        np.testing.assert_array_equal(q.dequantize(), expected.dequantize())
    assert explain_layer(layers["eight"])["why"] == "w: expected floats, got torch.int8"


def test_pickled_layers_of_other_dtypes(tmp_path: Path) -> None:
    q, path = quantize.ternary(normal(8, 4, 3, 3)), tmp_path / "model.pt"
    tensors = {"a.codes": torch.from_numpy(q.codes), "a.levels": torch.from_numpy(q.levels), "a.scale": torch.ones(8)}
    torch.save({5: torch.ones(2, 2), **tensors, "a.levels": tensors["a.levels"].bfloat16()}, path)
    (layer,) = read_model(path)
    np.testing.assert_array_equal(layer.read().decode(), q.decode())
    for part in tensors:
        torch.save(tensors | {part: tensors[part].to_sparse()}, path)
        with pytest.raises(ValueError, match=rf"model.pt: expected .*; got another file: {part}: expected a tensor "):
            read_model(path)
    torch.save(tensors | {"a.codes": tensors["a.codes"].long()}, path)
    with pytest.raises(ValueError, match=r"model.pt: expected .*; got another file: codes: expected int8 or uint8"):
        read_model(path)


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("harm"),))


def test_pickles_are_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"conv.weight": Harmful()}, "model.pt")
    Path("other.pt").write_bytes(b"hello")
    torch.save([1], "list.pth")
    for name in ("model.pt", "other.pt"):
        with pytest.raises(ValueError, match=f"{name}: expected a state_dict of tensors; got another file"):
            read_model(name)
    with pytest.raises(ValueError, match=r"list\.pth: expected a state_dict, got list"):
        read_model("list.pth")
    assert not Path("harm").exists()


# counts of a method, times


def test_counts_of_a_method() -> None:
    q = quantize.ternary(normal(16, 4, 3, 3))
    layer = StoredLayer("conv", "conv2d", q.shape, lambda: q, {"groups": 2})
    packed, row = explain_layer(layer), explain_layer(layer, method="pair")
    program = factor(q, groups=2)
    assert (row["adds"], row["multiplies"], row["removed"]) == (program.adds, program.multiplies, program.removed)
    assert (row["algorithm"], row["bytes"]) == (packed["algorithm"], packed["bytes"])
    assert row["removed"] > packed["removed"]
    large = quantize.ternary(normal(128, 129))
    row = explain_layer(StoredLayer("fc", "linear", large.shape, lambda: large), method="summerge")
    assert row["why"] == "q: expected at most 16384 weights a group for 'summerge', got 16512"
    assert row["adds"] is None and row["algorithm"] == "packed"
    assert explain_model([layer], method="unique")["method"] == "unique"


def test_time_limit_of_a_method_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    q = quantize.ternary(normal(16, 16))
    layer = StoredLayer("fc", "linear", q.shape, lambda: q)
    message = "saturate: the time limit of 1 s is reached"

    def stop_early(*args: object, **options: object) -> SumProgram:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return factor(q)

    monkeypatch.setattr(explain, "factor", stop_early)
    row = explain_layer(layer, method="saturate")
    assert row["why"].endswith(f"; {message}") and row["adds"] == factor(q).adds


def test_predicted_times() -> None:
    q = quantize.ternary(normal(64, 64, 3, 3))
    row = explain_layer(StoredLayer("conv", "conv2d", q.shape, lambda: q, pixels=1000))
    share = float(row["why"].split()[1])
    assert row["predicted_ns"] == pytest.approx(share * row["dense_ns"])
    assert row["predicted_ms"] == pytest.approx(row["predicted_ns"] / 1e6 * 1000)
    half = quantize.ternary(normal(64, 32, 3, 3))
    other = explain_layer(StoredLayer("conv", "conv2d", half.shape, lambda: half))
    assert other["dense_ns"] == pytest.approx(row["dense_ns"] / 2)
    assert other["predicted_ms"] is None
    eight = quantize.uniform(normal(64, 64, 3, 3), 8)
    dense = explain_layer(StoredLayer("conv", "conv2d", eight.shape, lambda: eight), "uint8")
    assert dense["predicted_ns"] == dense["dense_ns"] > 0
    binary = quantize.binary(normal(64, 256))
    assert explain_layer(StoredLayer("fc", "linear", binary.shape, lambda: binary))["predicted_ns"] > 0


def test_missing_files_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("missing.onnx", "missing.safetensors"):
        with pytest.raises(OSError, match=name):
            read_model(tmp_path / name)
    monkeypatch.delitem(sys.modules, "pycodesign.onnx_weights", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "pycodesign\[onnx\]"'):
        read_model(tmp_path / "missing.onnx")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "pycodesign\[torch\]"'):
        read_model(tmp_path / "missing.pt")


def test_shape_belongs_to_onnx() -> None:
    with pytest.raises(ValueError, match="shape: expected an ONNX model with it, got "):
        read_model(Path(demo.__file__).parent / "data" / "mnist_ternary.safetensors", (1, 1, 28, 28))
