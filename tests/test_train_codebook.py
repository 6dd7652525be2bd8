"""The example that weighs codebooks against other weights: its parts, and a whole run on few images."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import pycodesign
from pycodesign.nn.codebooks import find_codebook

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLES))  # as for a script
    yield importlib.import_module("train_codebook")
    sys.path.remove(str(EXAMPLES))
    del sys.modules["train_codebook"], sys.modules["train_resnet20"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty images, as CIFAR-10's binary version has them, each as bright as its label."""
    for number, name in enumerate(("data_batch_1", "test_batch")):
        labels = np.arange(40, dtype=np.uint8) % 10
        records = np.random.default_rng(number).integers(0, 20, (40, 3073)).astype(np.uint8)
        records[:, 1:] += 20 * labels[:, None]
        records[:, 0] = labels
        (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
    return tmp_path


@pytest.mark.parametrize("kind", ["binary", "ternary", "int8", "sign 8", "ternary 8", "real 8", "float32"])
def test_kinds_and_their_bits(example: ModuleType, kind: str) -> None:
    model = example.ResNet6(1, 10, width=8).eval()
    float_weights = {name: layer.weight.detach() for name, layer in example.quantized_layers(model).items()}
    example.set_kind(model, kind)
    layers = example.quantized_layers(model)
    assert list(layers) == ["3.conv1", "3.conv2", "4.conv1", "4.conv2", "4.shortcut.0"]
    assert not any(module.training for module in model.modules())
    assert not torch.nn.utils.parametrize.is_parametrized(model[0])
    bits = 0.0
    for name, layer in layers.items():
        codebook = find_codebook(layer)
        assert (codebook is not None) == (kind[-1] == "8" and kind != "int8" and layer.kernel_size == (3, 3))
        assert torch.equal(layer.weight, float_weights[name]) == (kind == "float32")
        if codebook is not None:
            assert codebook.values == kind.partition(" ")[0] and codebook.U == 8
            bits += 8 * codebook.index.size + 72 * {"sign": 1, "ternary": 2, "real": 32}[codebook.values]
        else:
            bits += layer.weight.numel() * {"binary": 1, "int8": 8, "float32": 32}.get(kind, 2)
        bits += 0 if kind == "float32" else 32 * layer.out_channels
    assert example.count_bits(model) == pytest.approx(bits / sum(w.numel() for w in float_weights.values()))


def test_folded_networks_compute_the_same(example: ModuleType) -> None:
    model = example.ResNet6(1, 10, width=8)
    x = torch.rand(8, 1, 32, 32)
    model(x)
    model.eval()
    for layout in (torch.contiguous_format, torch.channels_last):
        folded = example.fold(model, layout)
        assert not [norm for norm in folded.modules() if isinstance(norm, torch.nn.BatchNorm2d)]
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_images_are_drawn_by_seed(example: ModuleType) -> None:
    x, labels = torch.arange(30.0).view(30, 1, 1, 1), torch.arange(30)
    images = example.Images((x[:20], labels[:20]), (x[20:], labels[20:]), False)
    first, second = example.draw(images, 12, 0), example.draw(images, 12, 1)
    assert len(first.train[0]) == 12 and len(first.test[0]) == 18
    assert sorted(torch.cat([first.train[1], first.test[1]]).tolist()) == list(range(30))
    assert torch.equal(first.train[0].flatten().long(), first.train[1])
    assert not torch.equal(first.train[1], second.train[1])
    assert torch.equal(first.train[1], example.draw(images, 12, 0).train[1])
    assert example.draw(images, None, 0) is images


def test_distillation_asks_labels_and_teacher(example: ModuleType) -> None:
    teacher, model = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    x, labels = torch.randn(5, 3), torch.arange(5) % 4
    own = torch.nn.functional.cross_entropy(teacher(x), labels)
    torch.testing.assert_close(example.distill(teacher, teacher, x, labels), own)
    loss = example.distill(teacher, model, x, labels)
    loss.backward()
    assert loss > torch.nn.functional.cross_entropy(model(x), labels) and teacher.weight.grad is None


def test_intervals_and_the_front(example: ModuleType) -> None:
    mean, half = example.summarize([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * math.sqrt(2.5 / 5))
    assert math.isnan(example.summarize([1.0])[1])
    points = {"slow": (4, 0.9), "best": (3, 0.95), "same": (3, 0.94), "fast": (1, 0.8), "bad": (2, 0.7)}
    assert example.find_front(points) == ["fast", "best"]


def invoke(example: ModuleType, *arguments: object) -> Result:
    return CliRunner().invoke(example.main, list(map(str, arguments)))


def test_a_run_on_few_images(example: ModuleType, folder: Path) -> None:
    path, picture = folder / "r.json", folder / "p.png"
    options = ("--data", folder, "--json", path, "--width", 8, "--rounds", 3)
    short = ("--seeds", 2, "--float-epochs", 1, "--epochs", 1)
    run = invoke(example, *options, *short, "--kinds", "float32,ternary,sign 8,real 4")
    assert run.exit_code == 0, run.output
    rows = {row["kind"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["float32", "ternary", "sign 8", "real 4"]
    assert all(len(values) == 2 for row in rows.values() for values in row["accuracy"].values())
    assert all(0 <= value <= 1 for row in rows.values() for value in row["accuracy"]["float32"])
    assert rows["ternary"]["ms"].keys() == rows["sign 8"]["ms"].keys() == {"float32", "uint8"}
    assert rows["float32"]["ms"].keys() == {"float32"} and rows["real 4"]["ms"].keys() == {"float32"}
    assert rows["sign 8"]["bits_per_weight"] < rows["ternary"]["bits_per_weight"] < rows["float32"]["bits_per_weight"]

    networks = example.load_networks(lambda: example.ResNet20(3, 10, width=8), path.with_suffix(".pt"))
    images = example.load_images(folder)
    for kind, row in rows.items():
        accuracy = example.measure_all(networks[kind], images, kind)
        assert {a: values[0] for a, values in row["accuracy"].items()} == {a: round(v, 6) for a, v in accuracy.items()}
        assert row["bits_per_weight"] == round(example.count_bits(networks[kind]), 4)

    timed = invoke(example, *options, "--time")
    assert timed.exit_code == 0, timed.output
    result = json.loads(path.read_text())
    assert result["facts"]["cpu"] and result["threads"] == 1 and result["command"].startswith("python examples/")
    again = {row["kind"]: row for row in result["rows"]}
    assert (
        again["ternary"]["accuracy"] == rows["ternary"]["accuracy"] and again["ternary"]["ms"] != rows["ternary"]["ms"]
    )
    before = path.read_bytes()
    drawn = invoke(example, "--json", path, "--plot", picture)
    assert drawn.exit_code == 0 and picture.read_bytes().startswith(b"\x89PNG")
    assert path.read_bytes() == before and "| sign 8 " in drawn.output


def test_table(example: ModuleType) -> None:
    rows = [
        {"kind": kind, "bits_per_weight": bits, "accuracy": {"float32": accuracy}, "ms": ms}
        for kind, bits, accuracy, ms in (
            ("float32", 32.0, [0.97, 0.96], {"float32": 2.0}),
            ("ternary", 2.03, [0.95, 0.96], {"float32": 1.0, "uint8": 0.5}),
            ("sign 8", 0.96, [0.96, 0.97], {}),
        )
    ]
    assert example.format_rows(rows) == [
        ["float32", "32.00", "96.50 ± 6.36", "+1.00 ± 12.71", "2.000*", "", "", ""],
        ["ternary", "2.03", "95.50 ± 6.36", "+0.00 ± 0.00", "1.000*", "", "", "0.500"],
        ["sign 8", "0.96", "96.50 ± 6.36", "+1.00 ± 0.00", "", "", "", ""],
    ]


def test_the_page_shows_the_recorded_results(example: ModuleType) -> None:
    root = EXAMPLES.parent
    rows = json.loads((root / "bench" / "results" / "codebook-digits.json").read_text())["rows"]
    lines = (root / "docs" / "codebooks.md").read_text().splitlines()
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert [row["kind"] for row in rows] == list(example.KINDS)
    assert all(len(values) == 5 for row in rows for values in row["accuracy"].values())
    assert all(cells in shown for cells in example.format_rows(rows))


def test_bad_options(example: ModuleType, tmp_path: Path) -> None:
    run = invoke(example, "--kinds", "binary,sine 8")
    assert run.exit_code == 2 and "got 'sine 8'" in run.stderr
    run = invoke(example, "--json", tmp_path / "none.json", "--plot", "p.png")
    assert run.exit_code == 1 and "none.json: train first" in run.stderr
    (tmp_path / "empty.json").write_text(json.dumps({"rows": []}))
    run = invoke(example, "--json", tmp_path / "empty.json", "--plot", "p.png")
    assert run.exit_code == 1 and "run with --time first" in run.stderr
    run = invoke(example, "--json", tmp_path / "empty.json", "--time")
    assert run.exit_code == 1 and "empty.pt: train first" in run.stderr
    run = invoke(example, "--data", tmp_path)
    assert run.exit_code == 1 and "expected data_batch_*.bin" in run.stderr
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize("options", [("--kinds", "float32,sign 300"), ("--width", 8)], ids=str)
def test_too_many_kernels_are_refused_before_training(
    example: ModuleType, folder: Path, options: tuple[object, ...]
) -> None:
    path = folder / "r.json"
    run = invoke(example, "--data", folder, "--json", path, *options)
    assert run.exit_code == 2 and "kernels: expected" in run.stderr and not path.exists()


def test_files_of_something_else_are_refused(example: ModuleType, folder: Path) -> None:
    path = folder / "r.json"
    for text in ("", "{}", "[]", '{"rows": [{}]}'):
        path.write_text(text)
        run = invoke(example, "--json", path, "--plot", "p.png")
        assert run.exit_code == 1 and "r.json: expected results of this command" in run.stderr
    path.write_text(json.dumps({"rows": []}))
    torch.save({"ternary": {}}, path.with_suffix(".pt"))
    run = invoke(example, "--data", folder, "--json", path, "--time")
    assert run.exit_code == 1 and "r.pt: expected networks of this --width and --data" in run.stderr


def test_codebooks_take_over(example: ModuleType) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 8, 3), torch.nn.Flatten())
    pycodesign.nn.use_codebooks(model, 4)
    (codebook,) = model[0].parametrizations.weight
    measure = example.AnnealedLoss(lambda x: model(x).detach(), 20)
    shares = []
    for _ in range(20):
        measure(model, torch.randn(5, 2, 3, 3), torch.arange(5))
        shares.append(codebook.share)
    assert shares == sorted(shares) and 0 < shares[0] < 0.5 and shares[9] == shares[-1] == 1


def test_the_helps_examples_name_real_options(example: ModuleType) -> None:
    known = {option for parameter in example.main.params for option in parameter.opts}
    named = {word for word in (example.__doc__ or "").split() if word.startswith("--")}
    assert named and named <= known
    assert pycodesign.nn.use_codebooks.__name__ in (example.__doc__ or "")
