"""Weights in ONNX graphs, as `pycodesign explain` reads them."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pycodesign import quantize
from pycodesign.explain import explain_model, read_model
from pycodesign.quantize import QuantizedTensor

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

pytestmark = pytest.mark.usefixtures("without_matrix_unit")

F32 = np.float32
IMAGE = (1, 3, 8, 8)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=F32)


def save_graph(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray | onnx.TensorProto],
    shape: tuple[int | str | None, ...] = IMAGE,
    **options: object,
) -> Path:
    """Write a graph from "x" to "y"."""
    tensors = [
        value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(value, name)
        for name, value in constants.items()
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", [x], [y], tensors)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10), path, **options)
    return path


def save_conv(tmp_path: Path, *nodes: onnx.NodeProto, **constants: object) -> Path:
    conv = helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1, 1, 1, 1])
    return save_graph(tmp_path / "model.onnx", [*nodes, conv], constants)


def read_one(path: Path) -> QuantizedTensor:
    (layer,) = read_model(path)
    q = layer.read()
    assert layer.shape == q.shape
    return q


# Where weights are


def test_a_graph_of_every_kind_of_layer(tmp_path: Path) -> None:
    ternary, binary = quantize.ternary(normal(8, 3, 3, 3)), quantize.binary(normal(8, 4, 3, 3))
    matrix, product = quantize.uniform(normal(10, 8), 2), quantize.binary(normal(6, 10))
    nodes = [
        helper.make_node("Conv", ["x", "stem"], ["a"], "stem", strides=[2, 1], pads=[1, 0, 1, 0], dilations=[1, 2]),
        helper.make_node("Conv", ["a", "grouped"], ["b"], group=2),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "matrix"], ["e"], "gemm", transB=1),
        helper.make_node("MatMul", ["e", "product"], ["f"], "matmul"),
        helper.make_node("Transpose", ["f"], ["g"], "transpose"),
        helper.make_node("MatMul", ["f", "g"], ["y"], "attention"),  # no weights
    ]
    constants = {
        "stem": ternary.dequantize(),
        "grouped": binary.dequantize(),
        "matrix": matrix.dequantize(),
        "product": np.ascontiguousarray(product.dequantize().T),
    }
    layers = read_model(save_graph(tmp_path / "model.onnx", nodes, constants, shape=("n", 3, 8, 8)))
    assert [layer.name for layer in layers] == ["stem", "b", "gemm", "matmul"]
    assert [layer.kind for layer in layers] == ["conv2d", "conv2d", "linear", "linear"]
    assert [layer.pixels for layer in layers] == [4 * 4, 2 * 2, 1, 1]
    for layer, expected in zip(layers, (ternary, binary, matrix, product), strict=True):
        assert layer.shape == expected.shape
        np.testing.assert_array_equal(layer.read().dequantize(), expected.dequantize())
        assert set(layer.read().levels) <= set(expected.levels)
    assert layers[0].options == {"stride": [2, 1], "padding": [1, 0], "dilation": [1, 2], "groups": 1}
    assert layers[1].options["groups"] == 2
    rows = explain_model(layers)["layers"]
    assert [row["algorithm"] for row in rows[2:]] == ["packed", "packed"]
    assert rows[1]["macs"] == 8 * 4 * 9 * 4


INTEGERS = np.random.default_rng(0).integers(-8, 8, (6, 4, 3, 3)).astype(np.int8)
SCALE = np.linspace(0.1, 0.7, 6, dtype=F32)


def dequantized(integers: np.ndarray, scale: np.ndarray, zero_point: float = 0) -> np.ndarray:
    return (integers.astype(F32) - F32(zero_point)) * scale.reshape(-1, *[1] * (integers.ndim - 1))


@pytest.mark.parametrize(
    ("integers", "zero_point"),
    [
        (INTEGERS, None),
        (INTEGERS, np.zeros(6, np.int8)),
        ((INTEGERS + 8).astype(np.uint8), np.full(6, 8, np.uint8)),
        (helper.make_tensor("i", TensorProto.INT4, INTEGERS.shape, INTEGERS.ravel()), None),
    ],
    ids=["int8", "int8 with zero points", "uint8", "int4"],
)
def test_dequantize_linear(tmp_path: Path, integers: object, zero_point: np.ndarray | None) -> None:
    constants = {"i": integers, "s": SCALE} | ({} if zero_point is None else {"z": zero_point})
    q = read_one(save_conv(tmp_path, helper.make_node("DequantizeLinear", [*constants], ["w"], axis=0), **constants))
    np.testing.assert_array_equal(q.dequantize(), dequantized(INTEGERS, SCALE))
    np.testing.assert_array_equal(q.levels, range(-8, 8))
    np.testing.assert_array_equal(q.scale, SCALE)


def test_one_scale_for_all_outputs(tmp_path: Path) -> None:
    node = helper.make_node("DequantizeLinear", ["i", "s"], ["w"])
    q = read_one(save_conv(tmp_path, node, i=INTEGERS, s=F32(0.3)))
    np.testing.assert_array_equal(q.scale, np.full(6, 0.3, F32))


def test_ternary_weights_in_eight_bits_are_ternary(tmp_path: Path) -> None:
    node = helper.make_node("DequantizeLinear", ["i", "s"], ["w"], axis=0)
    q = read_one(save_conv(tmp_path, node, i=(np.sign(INTEGERS) * 127).astype(np.int8), s=SCALE))
    np.testing.assert_array_equal(q.levels, [-1, 0, 1])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_float_weights_behind_quantize_and_dequantize(tmp_path: Path, dtype: type) -> None:
    zero_point = np.full(6, 3 if dtype == np.uint8 else -2, dtype)
    nodes = [
        helper.make_node("QuantizeLinear", ["f", "s", "z"], ["i"], axis=0),
        helper.make_node("DequantizeLinear", ["i", "s", "z"], ["w"], axis=0),
    ]
    w = 20 * normal(6, 4, 3, 3)  # some saturate
    q = read_one(save_conv(tmp_path, *nodes, f=w, s=SCALE, z=zero_point))
    limits = np.iinfo(dtype)
    integers = np.rint(w / SCALE.reshape(-1, 1, 1, 1)) + zero_point[0]
    expected = dequantized(integers.clip(limits.min, limits.max), SCALE, zero_point[0])
    np.testing.assert_array_equal(q.dequantize(), expected)


def test_blocks_of_inputs(tmp_path: Path) -> None:
    integers, scale = INTEGERS.reshape(12, 18), normal(3, 18, seed=1)  # (I, O), a scale for each 4 inputs
    nodes = [
        helper.make_node("DequantizeLinear", ["i", "s"], ["w"], axis=0, block_size=4),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    q = read_one(save_graph(tmp_path / "model.onnx", nodes, {"i": integers, "s": scale}, (1, 12)))
    np.testing.assert_array_equal(q.scale, scale.T)
    np.testing.assert_array_equal(q.dequantize(), (integers * scale.repeat(4, 0)).T)


def test_constants_behind_casts_and_transpositions(tmp_path: Path) -> None:
    w = quantize.ternary(normal(10, 12)).dequantize().astype(np.float16)
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(w)),
        helper.make_node("Identity", ["c"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["f"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    q = read_one(save_graph(tmp_path / "model.onnx", nodes, {}, (1, 12)))
    np.testing.assert_array_equal(q.dequantize(), w.astype(F32))


def test_bfloat16(tmp_path: Path) -> None:
    w = quantize.binary(np.sign(normal(6, 4, 3, 3))).dequantize()
    q = read_one(save_conv(tmp_path, w=helper.make_tensor("w", TensorProto.BFLOAT16, w.shape, w.ravel())))
    np.testing.assert_array_equal(q.dequantize(), w)


MATRIX = INTEGERS.reshape(12, 18)  # (I, O)
INTEGER_NODES: dict[str, tuple[list[str], dict[str, object], np.ndarray]] = {
    "QLinearConv": (["x", "xs", "xz", "i", "s", "z", "ys", "yz"], {}, INTEGERS),
    "ConvInteger": (["x", "i", "xz", "z"], {}, INTEGERS),
    "MatMulInteger": (["x", "m", "xz", "z"], {}, MATRIX.T),
    "QLinearMatMul": (["x", "xs", "xz", "m", "s", "z", "ys", "yz"], {}, MATRIX.T),
    "QGemm": (["x", "xs", "xz", "mt", "s", "z"], {"transB": 1}, MATRIX.T),
    "DynamicQuantizeMatMul": (["x", "m", "s", "z"], {}, MATRIX.T),
    "MatMulIntegerToFloat": (["x", "m", "xs", "s", "xz", "z"], {}, MATRIX.T),
}
MICROSOFT = ("QGemm", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")


@pytest.mark.parametrize("kind", INTEGER_NODES)
def test_integer_nodes(tmp_path: Path, kind: str) -> None:
    inputs, attributes, integers = INTEGER_NODES[kind]
    scale = np.linspace(0.1, 0.7, len(integers), dtype=F32)
    zero_point = np.zeros((), np.int8) if kind.endswith("Integer") else np.zeros(len(integers), np.int8)
    constants = {"i": INTEGERS, "m": MATRIX, "mt": np.ascontiguousarray(MATRIX.T), "s": scale, "z": zero_point}
    constants |= {"xs": F32(1), "ys": F32(1), "xz": np.uint8(0), "yz": np.uint8(0)}
    domain = "com.microsoft" if kind in MICROSOFT else ""
    node = helper.make_node(kind, inputs, ["y"], kind, domain=domain, **attributes)
    used = {name: np.asarray(constants[name]) for name in inputs[1:]}
    q = read_one(save_graph(tmp_path / "model.onnx", [node], used))
    expected = dequantized(integers, scale if "s" in inputs else np.ones_like(scale))
    np.testing.assert_array_equal(q.dequantize(), expected)
    assert set(q.levels) <= set(range(-8, 8))


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"s": np.ones(18, F32), "z": np.zeros(18, np.int8)}, None),
        ({"s": np.ones(200, F32), "z": np.zeros((), np.int8)}, "scale: expected at most"),
    ],
)
def test_a_layer_whose_scales_do_not_fit(tmp_path: Path, constants: dict[str, np.ndarray], message: str | None) -> None:
    node = helper.make_node("MatMulIntegerToFloat", ["x", "m", "xs", "s", "xz", "z"], ["y"], domain="com.microsoft")
    constants = {"m": MATRIX, "xs": np.asarray(F32(1)), "xz": np.asarray(np.uint8(0)), **constants}
    (layer,) = read_model(save_graph(tmp_path / "model.onnx", [node], constants))
    assert layer.shape == (18, 12)
    if message is None:
        layer.read()
    else:
        with pytest.raises(ValueError, match=message):
            layer.read()


def test_data_that_lie_elsewhere_and_are_gone(tmp_path: Path) -> None:
    path = save_conv(tmp_path, w=normal(8, 3, 3, 3))
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="data.bin", size_threshold=0)
    assert read_one(path).shape == (8, 3, 3, 3)
    (tmp_path / "data.bin").unlink()
    (row,) = explain_model(read_model(path))["layers"]
    assert row["shape"] == [8, 3, 3, 3] and row["why"].startswith("w: expected its data beside the model, got none")


def test_weights_in_another_file_and_in_functions(tmp_path: Path) -> None:
    q = quantize.ternary(normal(32, 12))
    function = helper.make_function(
        "local",
        "Dense",
        ["a", "b"],
        ["c"],
        [helper.make_node("MatMul", ["a", "b"], ["c"])],
        [helper.make_opsetid("", 21)],
    )
    path = save_graph(
        tmp_path / "model.onnx", [helper.make_node("Dense", ["x", "w"], ["y"], domain="local")], {}, (1, 12)
    )
    model = onnx.load(path)
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(q.dequantize().T), "w"))
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").stat().st_size >= q.codes.size * 4
    np.testing.assert_array_equal(read_one(path).dequantize(), q.dequantize())


# ONNX: sizes of images


def test_shape_fills_in_what_the_file_leaves_open(tmp_path: Path) -> None:
    w = quantize.ternary(normal(8, 3, 3, 3)).dequantize()
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1, 1, 1, 1])
    path = save_graph(tmp_path / "model.onnx", [node], {"w": w}, ("n", 3, "h", None))
    assert read_model(path)[0].pixels is None
    assert read_model(path, (2, 3, 5, 7))[0].pixels == 2 * 5 * 7
    for shape in ((1, 4, 5, 7), (3, 5, 7)):
        with pytest.raises(ValueError, match=r"shape: expected one that fits the input \['n', 3, 'h', '\?'\], got \["):
            read_model(path, shape)


def test_rows_of_a_matrix_product(tmp_path: Path) -> None:
    w = np.ascontiguousarray(quantize.binary(normal(6, 12)).dequantize().T)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    (layer,) = read_model(save_graph(tmp_path / "model.onnx", [node], {"w": w}, ("n", 5, 7, 12)))
    assert layer.pixels == 5 * 7


def test_transposed_convolutions_are_named(tmp_path: Path) -> None:
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], "up", strides=[2, 2])
    w = quantize.ternary(normal(3, 5, 2, 2)).dequantize()
    result = explain_model(read_model(save_graph(tmp_path / "model.onnx", [node], {"w": w})))
    (row,) = result["layers"]
    assert row["layer"] == "up" and row["why"] == "transposed convolutions are not served" and not row["gains"]


def test_sizes_that_stay_unknown_are_counted_as_weights(tmp_path: Path) -> None:
    w = quantize.ternary(normal(8, 3, 3, 3)).dequantize()
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv")
    path = save_graph(tmp_path / "model.onnx", [node], {"w": w}, ("n", 3, "h", "w"))
    result = explain_model(read_model(path))
    assert (result["unit"], result["total"], result["layers"][0]["macs"]) == ("weights", 8 * 27, None)
    assert explain_model(read_model(path, IMAGE))["unit"] == "multiply-accumulates"


# By the exporters and quantizers that people use


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Sequential]:
    """A network of torch: a float layer, a ternary one with batch normalization, a ternary classifier."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    conv, norm = nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32)
    pool, linear = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 10)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), conv, norm, nn.ReLU(), pool, nn.Flatten(), linear)
    with torch.no_grad():
        norm.running_var.uniform_(0.5, 2)
        for layer in (conv, linear):
            layer.weight.copy_(torch.from_numpy(quantize.ternary(layer.weight).dequantize()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter needs no further package, and is deprecated
        torch.onnx.export(model.eval(), torch.rand(1, 3, 16, 16), path, dynamo=False, input_names=["x"])
    return path, model


def test_torch_export(exported: tuple[Path, nn.Sequential]) -> None:
    result = explain_model(read_model(exported[0]))
    stem, conv, linear = result["layers"]
    assert stem["algorithm"] is None and "27 distinct values on no common grid" in stem["why"]
    assert (conv["levels"], conv["algorithm"]) == ([-1, 0, 1], "codegen")  # the normalization is folded into its scale
    assert (linear["levels"], linear["algorithm"]) == ([-1, 0, 1], "packed")
    assert result["total"] == 16 * 27 * 256 + 32 * 144 * 49 + 320
    assert result["share"] == (32 * 144 * 49 + 320) / result["total"]
    assert result["summary"] == "2 of 3 layers gain, with 67% of the 337 thousand multiply-accumulates."


@pytest.mark.parametrize("how", ["QDQ", "QOperator", "dynamic"])
def test_onnxruntime_quantized(exported: tuple[Path, nn.Sequential], how: str, tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization", reason="onnxruntime is not installed")
    path = tmp_path / "quantized.onnx"
    logging.disable(logging.WARNING)  # it would rather have the graph preprocessed
    try:
        if how == "dynamic":
            quantization.quantize_dynamic(exported[0], path, weight_type=quantization.QuantType.QInt8)
        else:

            class Images(quantization.CalibrationDataReader):
                left = 2

                def get_next(self) -> dict[str, np.ndarray] | None:
                    self.left -= 1
                    return {"x": normal(1, 3, 16, 16, seed=self.left)} if self.left >= 0 else None

            form = quantization.QuantFormat[how]
            quantization.quantize_static(exported[0], path, Images(), quant_format=form, per_channel=True)
    finally:
        logging.disable(logging.NOTSET)
    stem, conv, linear = explain_model(read_model(path), "uint8")["layers"]
    assert stem["algorithm"] == "dense" and len(stem["levels"]) > 100
    assert conv["levels"] == [-1, 0, 1] and conv["algorithm"] in ("codegen", "dense")  # so few channels: by processor
    assert (linear["levels"], linear["algorithm"]) == ([-1, 0, 1], "packed")
