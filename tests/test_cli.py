"""The command ``pycodesign``, and the shipped networks that its demo runs."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner

import pycodesign
from pycodesign import cli, demo, ops, quantize
from pycodesign.cli import main
from pycodesign.repetition import factor
from pycodesign.repetition.factor import METHODS

Digits = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code not in (0, None)
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    return result.stderr


@pytest.fixture(scope="module")
def digits() -> Digits:
    return demo.load_digits()


@pytest.fixture
def timing() -> dict:
    """What `demo.time_layers` returns: one layer won, one lost, one without a competitor."""
    counts = {"adds": 1000, "multiplies": 0, "dense_ops": 8000, "removed": 0.875, "algorithm": "tables"}
    times = [("torch float32", 2.0, 2.0), ("torch float32", 0.5, 0.5), (None, None, None)]
    return {
        "cpu": "a processor",
        "isa": "scalar",
        "threads": 2,
        "competitors": {"torch": "2.13.0"},
        "layers": [
            {"layer": f"layer {i}", "dtype": "float32", "ms": 1.0, "best": best, "best_ms": ms, "speedup": speedup}
            | counts
            for i, (best, ms, speedup) in enumerate(times)
        ],
        "left_out": [{"contender": "openvino", "reason": "not installed: openvino"}],
    }


def test_quick_demo_agrees_on_every_image() -> None:
    shown = json.loads(run("demo", "--quick", "--json"))
    assert shown["version"] == pycodesign.__version__
    assert [network["network"] for network in shown["networks"]] == list(demo.NETWORKS)
    for network in shown["networks"]:
        assert network["agree"] == network["images"] == 200
        assert network["accuracy"] == network["accuracy_dense"] >= 0.97
        assert network["max_difference"] < 1e-4
        assert all(0.5 < row["removed"] < 1 for row in network["layers"][1:-1])
    layers = shown["timing"]["layers"]
    assert {row["dtype"] for row in layers} == {"float32"}
    assert len(layers) == len(demo.QUICK_LAYERS)
    for row in layers:
        assert row["best"] and row["ms"] > 0 and row["best_ms"] > 0
        assert row["speedup"] == pytest.approx(row["best_ms"] / row["ms"], rel=0.01)
    assert all("check" not in entry["reason"] for entry in shown["timing"]["left_out"])


@pytest.mark.parametrize("name", demo.NETWORKS)
def test_shipped_network_reaches_its_stated_accuracy(name: str, digits: Digits) -> None:
    layers, metadata = demo.load_network(name)
    _, (images, labels) = digits
    logits = np.concatenate([demo.run_dense(layers, images[i : i + demo.BATCH]) for i in range(0, 1000, demo.BATCH)])
    assert (logits.argmax(1) == labels).mean() == float(metadata["accuracy"]) >= 0.97
    levels = {"mnist_ternary": [-1, 0, 1], "mnist_binary": [-1, 1]}[name]
    assert all(layer.weights.levels.tolist() == levels for layer in layers)


def test_shipped_networks_are_small() -> None:
    files = list((Path(demo.__file__).parent / "data").glob("*.safetensors"))
    assert len(files) == len(demo.NETWORKS)
    assert sum(file.stat().st_size for file in files) < 500_000


def test_saved_network_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, _ = demo.load_network("mnist_ternary")
    (tmp_path / "data").mkdir()
    demo.save_network(tmp_path / "data" / "copy.safetensors", layers, {"accuracy": "0.5"})
    monkeypatch.setattr(demo.resources, "files", lambda package: tmp_path)
    copies, metadata = demo.load_network("copy")
    assert metadata["accuracy"] == "0.5"
    for layer, copy in zip(layers, copies, strict=True):
        assert (copy.name, copy.pool) == (layer.name, layer.pool)
        np.testing.assert_array_equal(copy.weights.codes, layer.weights.codes)
        np.testing.assert_array_equal(copy.weights.scale, layer.weights.scale)
        np.testing.assert_array_equal(copy.bias, layer.bias)


def test_a_network_is_no_larger_than_its_file(tmp_path: Path) -> None:
    layers, _ = demo.load_network("mnist_ternary")
    path = tmp_path / "network.safetensors"
    demo.save_network(path, layers[:1], {})
    tensors = safetensors.numpy.load_file(path)
    for shape in ([32, 1 << 40], [32, 1, 3, 4], [32, -1, 3, 3]):
        structure = json.dumps([{"name": layers[0].name, "shape": shape, "pool": "none"}])
        safetensors.numpy.save_file(tensors, path, {"layers": structure})
        with pytest.raises(ValueError, match=rf"^{layers[0].name}.codes: expected -?\d+ bytes a plane, got \(2, 36\)$"):
            demo.read_network(path)


@pytest.mark.parametrize("quantizer", ["ternary", "binary"])
def test_training_exports_the_function_it_trained(quantizer: str) -> None:
    import torch

    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "train_mnist.py"))
    torch.manual_seed(0)
    model = example["Network"](example["QUANTIZERS"][quantizer])
    for norm in model.norms:
        torch.nn.init.normal_(norm.weight)  # of both signs
        torch.nn.init.normal_(norm.bias)
    x = torch.rand(8, 1, 28, 28)
    with torch.no_grad():
        model(x)  # moves the running statistics
        expected = model.eval()(x).numpy()
    np.testing.assert_allclose(demo.run_dense(model.export(), x.numpy()), expected, rtol=0, atol=1e-5)


def test_split_holds_every_digit_once(digits: Digits) -> None:
    (train, train_labels), (test, test_labels) = digits
    assert train.shape == (4000, 1, 28, 28) and test.shape == (1000, 1, 28, 28)
    assert train.min() == 0 and train.max() == 1
    assert np.bincount(train_labels).tolist() == [400] * 10
    assert np.bincount(test_labels).tolist() == [100] * 10
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}


def test_demo_prints_tables(monkeypatch: pytest.MonkeyPatch, timing: dict, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "time_layers", lambda threads, quick: timing)
    monkeypatch.setattr(demo, "NETWORKS", demo.NETWORKS[:1])
    plot = tmp_path / "layers.png"
    printed = run("demo", "--quick", "--threads", "1", "--plot", str(plot))
    assert "200 of 200 predictions agree" in " ".join(printed.split())
    for text in ("layer 0", "layer 1", "layer 2", "87.5%", "not installed: openvino"):
        assert text in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_numpy_stands_in_for_missing_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "missing_package", lambda engine: engine)
    monkeypatch.setattr(demo, "QUICK_LAYERS", demo.QUICK_LAYERS[-1:])
    timed = demo.time_layers(1, quick=True)
    assert "numpy" not in demo.ENGINES  # among which later runs choose
    assert timed["competitors"] == {"numpy": np.__version__}
    assert [row["best"] for row in timed["layers"]] == ["numpy float32"]


@pytest.mark.parametrize(
    ("module", "arguments"), [("mlxtend.data", ["demo"]), ("matplotlib", ["demo", "--plot", "layers.png"])]
)
def test_missing_extra_is_one_sentence(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = fail(*arguments)
    assert message.count("\n") == 1
    assert 'pip install "pycodesign[demo]"' in message


def test_info() -> None:
    facts = json.loads(run("info", "--json"))
    assert facts["used"]["isa"] in facts["detected"]["supported_isas"]
    assert facts["used"]["kernels"] in facts["built"]["isas"]
    assert facts["used"]["threads"] == pycodesign.get_num_threads()
    assert "scalar" in facts["built"]["isas"]
    assert facts["optional"]["mlxtend"]
    printed = run("info")
    assert facts["used"]["isa"] in printed and "PYCODESIGN_ISA" in printed


def test_bench_writes_json(tmp_path: Path) -> None:
    options = [
        "linear",
        "--quick",
        "--rounds",
        "1",
        "--layer",
        "1024",
        "--dtype",
        "float32",
        "--contender",
        "pycodesign",
    ]
    path = tmp_path / "linear.json"
    assert "1024x4096" in run("bench", *options, "--json", str(path))
    assert (
        json.loads(run("bench", *options, "--json", "-"))["suite"] == json.loads(path.read_text())["suite"] == "linear"
    )


NETWORK = str(Path(demo.__file__).parent / "data" / "mnist_ternary.safetensors")


@pytest.mark.usefixtures("without_matrix_unit")
def test_explain_prints_a_table(tmp_path: Path) -> None:
    printed = " ".join(run("explain", NETWORK).split())
    for text in (
        "conv5",
        "128x128x3x3",
        "-1 0 1",
        "codegen",
        "of 7 layers gain, with 100% of the 287 thousand weights",
    ):
        assert text in printed
    w = np.random.default_rng(0).standard_normal((16, 16, 3, 3), np.float32)
    eight, fractions = quantize.uniform(w, 8).dequantize(), np.where(w > 0, np.float32(np.pi), np.float32(-1))
    tensors = {"[b].weight": eight, "f.weight": fractions, "g.weight": w**3}
    safetensors.numpy.save_file(tensors, tmp_path / "file")
    printed = run("explain", str(tmp_path / "file"), "--dtype", "uint8")
    for text in ("0 of 3 layers gain", ": -127 .. 126", "many", "* [b]: 3 bits and up stay dense"):
        assert text in printed
    assert printed.count("[b]") == 2  # no markup
    assert "* f: of few values, but these activations do not suit them" in printed
    assert "1 of 3 layers gain" in run("explain", str(tmp_path / "file"))


@pytest.mark.usefixtures("without_matrix_unit")
def test_explain_writes_json() -> None:
    result = json.loads(run("explain", NETWORK, "--dtype", "uint8", "--json"))
    assert (result["model"], result["dtype"]) == (NETWORK, "uint8")
    assert result["share"] > 0.9
    assert [row["layer"] for row in result["layers"]] == [*(f"conv{i}" for i in range(6)), "classifier"]


def test_explain_knows_every_method() -> None:
    assert list(cli.METHODS) == list(METHODS)


def test_explain_counts_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "layers.svg"
    printed = run("explain", NETWORK, "--method", "unique", "--plot", str(picture))
    assert "counts of unique" in printed
    assert picture.read_text().startswith("<?xml")
    rows = json.loads(run("explain", NETWORK, "--method", "unique", "--json"))["layers"]
    for row, layer in zip(rows, demo.load_network("mnist_ternary")[0], strict=True):
        assert row["adds"] == factor(layer.weights, "unique").adds
        assert row["predicted_ns"] > 0


def test_explain_takes_the_shape_of_the_input(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    helper, path = onnx.helper, tmp_path / "model.onnx"
    w = onnx.numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "w")
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, "h", "w"])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    onnx.save(helper.make_model(helper.make_graph([node], "graph", [x], [y], [w])), path)
    (row,) = json.loads(run("explain", str(path), "--shape", "1,3,10,12", "--json"))["layers"]
    assert row["pixels"] == 8 * 10
    assert "shape: expected one that fits the input" in fail("explain", str(path), "--shape", "1,1,10,12")
    onnx.save(helper.make_model(helper.make_graph([], "graph", [x], [x])), path)
    assert "expected convolutions or linear layers with constant weights, found none" in fail("explain", str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "nothing.onnx"], "'nothing.onnx' does not exist"),
        (["explain", __file__], "got another file"),
        (["explain", NETWORK, "--shape", "1,x"], "expected positive integers with commas between, as 1,3,224,224"),
        (["explain", NETWORK, "--shape", "1,-3"], "expected positive integers with commas between, as 1,3,224,224"),
        (["explain", NETWORK, "--shape", "1,1,28,28"], "shape: expected an ONNX model with it"),
        (["explain", NETWORK, "--dtype", "int4"], "'int4' is not one of"),
        (["demo", "--threads", "0"], "0 is not in the range"),
        (["demo", "--threads", str(1 << 70)], "is not in the range"),
        (["demo", "--plot", "nowhere/x.png"], "expected a file that can be written, got 'nowhere/x.png'"),
        (["explain", NETWORK, "--plot", "x.xyz"], "expected a file name that ends in .eps"),
        (["bench", "linear", "--json", "nowhere/x.json"], "expected a file that can be written, got 'nowhere/x.json'"),
        (["bench", "linear", "--json", ""], "expected a file that can be written, got '.'"),
        (["bench", "resnet99"], "'resnet99' is not one of"),
        (["bench", "linear", "--contender", "tensorrt"], "contenders: expected some of torch"),
        (["bench", "linear", "--layer", "3x3"], "layers: expected part of a layer's name"),
        (["bench", "linear", "--weights", "ternery"], "weights: expected binary"),
        (["train"], "No such command"),
    ],
)
def test_errors(arguments: list[str], message: str) -> None:
    assert message in fail(*arguments)


def test_demo_refuses_settings_in_one_sentence() -> None:
    command = [sys.executable, "-P", "-c", "from pycodesign.cli import main; main()", "demo", "--quick"]
    environment = os.environ | {"PYCODESIGN_ISA": "avx9"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "Error: PYCODESIGN_ISA: expected one of scalar, " in result.stderr


def test_settings_are_no_fault_of_the_file(tmp_path: Path) -> None:
    """A variable that names nothing is said, whatever reads the layers."""
    ops.prepack_linear(quantize.ternary(np.ones((4, 4), np.float32))).save(tmp_path / "layer.safetensors")
    model = str(tmp_path / "layer.safetensors")
    command = [sys.executable, "-P", "-c", "from pycodesign.cli import main; main()", "explain", model]
    for variable, value in (("PYCODESIGN_NUM_THREADS", "two"), ("PYCODESIGN_ISA", "avx9")):
        environment = os.environ | {variable: value}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert f"Error: {variable}: expected" in result.stderr


def test_files_that_no_system_can_name() -> None:
    assert "expected a file that can be written" in fail("bench", "linear", "--json", "a" * 300)
    assert "expected a file that can be written" in fail("demo", "--plot", "a" * 300 + ".png")


def test_version_and_help() -> None:
    assert run("--version").strip() == f"pycodesign, version {pycodesign.__version__}"
    for command in main.commands:
        assert f"pycodesign {command}" in run(command, "--help")
