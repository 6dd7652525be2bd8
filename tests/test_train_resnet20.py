"""The example that trains ResNet-20: its quantizer, data, conversion and search; and whole runs."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.progress import Progress
from torch import Tensor

import pycodesign

KINDS = ("binary", "ternary", "int8")
LEVELS = {"binary": {-1, 1}, "ternary": {-1, 0, 1}, "int8": set(range(-128, 128))}


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    path = Path(__file__).parents[1] / "examples" / "train_resnet20.py"
    spec = importlib.util.spec_from_file_location("train_resnet20", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["train_resnet20"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_resnet20"]


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """A folder as CIFAR-10's binary version has it, of few images: each is as bright as its label."""
    for number, name in enumerate(("data_batch_1", "data_batch_2", "test_batch")):
        labels = np.arange(50, dtype=np.uint8) % 10
        records = np.random.default_rng(number).integers(0, 20, (50, 3073)).astype(np.uint8)
        records[:, 1:] += 20 * labels[:, None]
        records[:, 0] = labels
        (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
    return tmp_path


def make_model(example: ModuleType, kinds: Callable[[int], str]) -> torch.nn.Module:
    """A narrow network whose normalizations have seen something."""
    model = example.ResNet20(3, 10, width=8)
    names = list(example.quantized_layers(model))
    example.set_weights(model, {name: kinds(i) for i, name in enumerate(names)})
    with torch.no_grad():
        for _ in range(20):
            model(torch.rand(8, 3, 32, 32))
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_quantizer_rounds_exactly_and_passes_gradients(example: ModuleType, kind: str) -> None:
    w = torch.randn(4, 3, 3, 3, requires_grad=True)
    quantizer = example.Quantize(w, kind)
    result = quantizer(w)
    scale = quantizer.log_scale.detach().exp()
    integers = result.detach() / scale
    assert torch.equal(integers.round() * scale, result.detach())
    assert set(integers.round().flatten().tolist()) <= LEVELS[kind]
    assert kind == "int8" or set(integers.round().flatten().tolist()) == LEVELS[kind]

    result.sum().backward()
    low, high = example.INTEGERS[kind]
    inside = (w / scale > low) & (w / scale < high)
    assert inside.any() and (kind == "int8" or not inside.all())
    torch.testing.assert_close(w.grad, inside.float())  # straight through; nothing where values are clipped
    difference = torch.where(inside, integers.round() - (w / scale), integers.round()).detach()
    expected = (scale * difference).sum((1, 2, 3), keepdim=True)  # LSQ's gradient, of the scale's logarithm
    torch.testing.assert_close(quantizer.log_scale.grad, expected, rtol=1e-4, atol=1e-4)


def test_layers_change_their_kind_alone(example: ModuleType) -> None:
    model = make_model(example, lambda i: "ternary")
    layers = example.quantized_layers(model)
    assert len(layers) == 20  # all but the first of 19, and two in shortcuts
    first, second = list(layers)[:2]
    quantizer = layers[first].parametrizations.weight[0]
    with torch.no_grad():
        quantizer.log_scale += 0.5
    learned, original = quantizer.log_scale.clone(), layers[first].parametrizations.weight.original.clone()
    example.set_weights(model, {first: "ternary", second: "binary"})
    assert torch.equal(quantizer.log_scale, learned)  # the same kind: what was learned stays
    example.set_weights(model, {first: "binary"})
    assert not torch.equal(quantizer.log_scale, learned)
    assert torch.equal(layers[first].parametrizations.weight.original, original)
    for name in (first, second):
        assert pycodesign.nn.sources.find_weight(layers[name]).levels.tolist() == [-1, 1]


@pytest.mark.parametrize("kinds", [*KINDS, "mixed"])
def test_converted_networks_give_the_same_answer(example: ModuleType, kinds: str) -> None:
    model = make_model(example, lambda i: KINDS[i % 3] if kinds == "mixed" else kinds)
    images = example.Images(
        (torch.rand(10, 3, 32, 32), torch.zeros(10)), (torch.rand(4, 3, 32, 32), torch.zeros(4)), True
    )
    expected = example.predict(model, images.test[0])
    converted = example.convert(model, images, "float32")
    torch.testing.assert_close(example.predict(converted, images.test[0]), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(example.predict(example.fold(model), images.test[0]), expected, rtol=1e-5, atol=1e-5)
    rows = {row.layer: row for row in pycodesign.nn.report(converted)}
    assert all(rows[name].converted for name in example.quantized_layers(model))
    assert not rows["0"].converted  # the first convolution stays float
    eight = example.predict(example.convert(model, images, "uint8"), images.test[0])
    assert (eight - expected).abs().max() < 0.1 * expected.abs().max()


def test_network_is_resnet20(example: ModuleType) -> None:
    model = example.ResNet20(3, 10)
    assert sum(p.numel() for p in model.parameters()) == 272_474
    assert torch.nn.Sequential(*list(model)[:-3])(torch.zeros(2, 3, 32, 32)).shape == (2, 64, 8, 8)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


# Data


def test_cifar(example: ModuleType, cifar: Path) -> None:
    images = example.load_images(cifar)
    assert images.train[0].shape == (100, 3, 32, 32) and images.test[0].shape == (50, 3, 32, 32)
    assert (images.channels, images.classes, images.flip) == (3, 10, True)
    records = np.fromfile(cifar / "data_batch_2.bin", np.uint8).reshape(50, 3073)
    assert images.train[1][50:].tolist() == records[:, 0].tolist()
    assert round(float(255 * images.train[0][57, 2, 3, 4])) == records[7, 1 + 2 * 1024 + 3 * 32 + 4]


def test_folders_of_classes(example: ModuleType, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "test"):
        for label, name in enumerate(("ant", "bee", "cow")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(2):
                image.new("RGB", (40, 50), (100, 0, 50 * label)).save(tmp_path / part / name / f"{i}.png")
    x, labels = example.load_images(tmp_path).test
    assert x.shape == (6, 3, 32, 32) and labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert (255 * x[5, :, 3, 4]).round().tolist() == [100, 0, 100]


def test_digits(example: ModuleType) -> None:
    images = example.load_images(None)
    assert images.train[0].shape == (4000, 1, 32, 32) and images.test[0].shape == (1000, 1, 32, 32)
    assert not images.flip


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "expected data_batch_*.bin and test_batch.bin, or folders train/CLASS and test/CLASS"),
        (
            {"test_batch": b"pickle"},
            "expected the binary version (data_batch_1.bin ...), got pickles, which can run code",
        ),
        ({"test_batch.bin": bytes(3073)}, "expected data_batch_*.bin beside test_batch.bin, found none"),
        ({"data_batch_1.bin": bytes(3072), "test_batch.bin": b""}, "expected records of 3073 bytes, got 3072 bytes"),
        ({"data_batch_1.bin": bytes(3073), "test_batch.bin": b""}, "expected records of 3073 bytes, got 0 bytes"),
        ({"train/a/": None, "test/a/": None}, "expected images in a folder for each class, found none"),
    ],
)
def test_other_folders_are_errors(
    example: ModuleType, files: dict[str, bytes | None], message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        if content is None:
            (tmp_path / name).mkdir(parents=True)
        else:
            (tmp_path / name).write_bytes(content)
    result = CliRunner().invoke(example.main, ["--data", str(tmp_path)])
    assert result.exit_code == 1 and message in result.stderr and "Traceback" not in result.stderr


def test_augmented_images_are_shifted_and_mirrored(example: ModuleType) -> None:
    images = torch.zeros(200, 2, 7, 9)
    images[:, 0, 3, 4] = 1  # in the middle
    images[:, 1, 3, 5] = 2  # to the right of it
    rng = torch.Generator().manual_seed(0)

    def differences(result: Tensor) -> set[tuple[int, int]]:
        places = [result[:, c].flatten(1).argmax(1) for c in (0, 1)]
        assert (result.flatten(1).sum(1) == 3).all()
        assert {(int(p) // 9 - 3, int(p) % 9 - 4) for p in places[0]} == {
            (a, b) for a in range(-2, 3) for b in range(-2, 3)
        }
        return set((places[1] - places[0]).tolist())

    assert differences(example.augment(images, False, rng)) == {1}
    assert differences(example.augment(images, True, rng)) == {1, -1}


# Search


def test_walk_takes_the_best_bargain_first(example: ModuleType) -> None:
    losses = {"a": {"binary": 1.0, "ternary": 0.2, "int8": 0.1}, "b": {"binary": 0.6, "ternary": 0.55, "int8": 0.5}}
    ms = {"a": {"binary": 1.0, "ternary": 2.0, "int8": 4.0}, "b": {"binary": 1.0, "ternary": 5.0, "int8": 4.0}}
    path = list(example.walk(losses, ms))
    assert path == [
        {"a": "int8", "b": "binary"},  # 0.03 for each millisecond; ternary would be slower
        {"a": "ternary", "b": "binary"},  # 0.05
        {"a": "binary", "b": "binary"},  # 0.8
    ]
    assert example.choose(path, ms, 2) == [path[0], path[1]] and example.choose(path, ms, 1) == [path[1]]
    assert example.choose(path[:1], ms, 3) == path[:1]


def test_sensitivity_leaves_the_model_alone(example: ModuleType) -> None:
    model = make_model(example, lambda i: "ternary")
    for layer in example.quantized_layers(model).values():
        layer.parametrizations.weight[0].log_scale.data += 0.2  # learned: not what a layer begins with
    data = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = torch.nn.functional.cross_entropy(example.predict(model, data[0]), data[1]).item()
    losses = example.measure_losses(model, data, Progress(disable=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    layers = example.quantized_layers(model)
    assert all(layer.parametrizations.weight[0].kind == "ternary" for layer in layers.values())
    assert losses.keys() == layers.keys()
    assert all(of_kind["ternary"] == pytest.approx(expected, rel=1e-5) for of_kind in losses.values())
    assert any(of_kind["binary"] != pytest.approx(expected, rel=1e-5) for of_kind in losses.values())


def test_layers_of_a_shape_share_what_they_add(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "measure_ms", lambda calls: [10.0 + 12 * i for i in range(len(calls))])
    model = make_model(example, lambda i: "binary")
    images = example.Images(
        (torch.rand(2, 3, 32, 32), torch.zeros(2)), (torch.rand(1, 3, 32, 32), torch.zeros(1)), True
    )
    ms = example.measure_layers(model, images, "float32", Progress(disable=True))
    layers = example.quantized_layers(model)
    assert ms.keys() == layers.keys() and all(of_kind["ternary"] == 0 for of_kind in ms.values())
    alike = [name for name, layer in layers.items() if layer.weight.shape == (8, 8, 3, 3)]
    assert len(alike) == 6
    assert [ms[name]["binary"] for name in alike] == [2.0] * 6 and [ms[name]["int8"] for name in alike] == [4.0] * 6
    assert sum(of_kind["binary"] + of_kind["int8"] for of_kind in ms.values()) == pytest.approx(12 * sum(range(1, 15)))
    assert all(layer.parametrizations.weight[0].kind == "binary" for layer in layers.values())  # as it was


# Whole runs


def invoke(example: ModuleType, *arguments: str) -> str:
    result = CliRunner().invoke(example.main, ["--quick", "--threads", "1", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def read_table(printed: str, heading: str) -> dict[str, list[str]]:
    """Return the rows of the table whose heading holds a word, by their first cell."""
    table = next(part for part in printed.split("┏")[1:] if heading in part)
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in table.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("activations", ["float32", pytest.param("uint8", marks=pytest.mark.slow)])
def test_a_run_on_few_images(example: ModuleType, cifar: Path, activations: str) -> None:
    plot, path, state = cifar / "accuracy.png", cifar / "result.json", cifar / "state.pt"
    options = [
        "--json",
        str(path),
        "--data",
        str(cifar),
        "--search",
        "--plot",
        str(plot),
        "--save",
        str(state),
        "--activations",
        activations,
    ]
    printed = invoke(example, *options)
    rows = read_table(printed, "agree")
    assert rows["pycodesign float32"][1] == "100.0%" and float(rows["pycodesign float32"][2]) < 1e-5
    assert all(float(row[-1]) > 0 for row in rows.values())
    rows = read_table(printed, "mixed")
    assert {"binary", "ternary", "int8", "mixed 1"} <= rows.keys()
    assert all(sum(map(int, row[-3:])) == 20 for row in rows.values())
    assert plot.read_bytes().startswith(b"\x89PNG")
    recorded = json.loads(path.read_text())
    assert [row["network"] for row in recorded["trained"]][-2:] == ["pycodesign float32", "pycodesign uint8"]
    assert {row["name"] for row in recorded["searched"]} == rows.keys() - {"network"}
    assert torch.load(state, weights_only=True)


def test_plot_needs_a_search(example: ModuleType) -> None:
    result = CliRunner().invoke(example.main, ["--plot", "accuracy.png"])
    assert result.exit_code == 2 and "--plot draws what --search finds" in result.stderr


@pytest.mark.slow
def test_digits_are_learned(example: ModuleType) -> None:
    rows = read_table(invoke(example), "agree")
    assert float(re.sub("%", "", rows["pycodesign float32"][0])) > 60
    assert rows["pycodesign float32"][1] == "100.0%"
    assert float(re.sub("%", "", rows["pycodesign uint8"][1])) >= 97
