"""Training and testing of the networks that a search compares: the same for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Data", "fit", "measure_accuracy", "split_data"]


@dataclass(frozen=True)
class Data:
    """Images (n, C, H, W) and labels (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw batches without end, each image as often as any other."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self), generator=generator)
            for begin in range(0, len(self) - batch + 1, batch):
                chosen = order[begin : begin + batch]
                yield self.images[chosen], self.labels[chosen]


def to_data(data: Any, shape: Sequence[int], classes: int) -> Data:
    """Check images and labels.

    Parameters
    ----------
    data : (Tensor (n, C, H, W), Tensor (n,))
    shape : sequence of int
        (C, H, W).
    classes : int

    Raises
    ------
    TypeError, ValueError
        Unless they are finite float32 images of the shape and int64 classes.
    """
    try:
        images, labels = data
    except (TypeError, ValueError):
        raise TypeError(f"data: expected a pair (images, labels), got {type(data).__name__}") from None
    images, labels = torch.as_tensor(images).detach(), torch.as_tensor(labels)
    if images.dtype != torch.float32 or labels.dtype != torch.int64:
        raise TypeError(f"data: expected float32 images and int64 labels, got {images.dtype} and {labels.dtype}")
    if images.ndim != 4 or labels.shape != images.shape[:1] or len(labels) < 10:
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"data: expected images (n, C, H, W) and labels (n,), n >= 10, got {shapes}")
    if images.shape[1:] != tuple(shape):
        raise ValueError(f"data: expected images (n, {', '.join(map(str, shape))}), got {tuple(images.shape)}")
    if not images.isfinite().all():
        raise ValueError(f"data: expected finite images, got {float(images[~images.isfinite()][0])}")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise ValueError(f"data: expected labels from 0 to {classes - 1}, got {int(wrong[0])}")
    return Data(images, labels)


def split_data(data: Data, share: float, seed: int) -> tuple[Data, Data]:
    """Split at random into a share and the rest."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    first, rest = order.split([round(share * len(data)), len(data) - round(share * len(data))])
    return Data(data.images[first], data.labels[first]), Data(data.images[rest], data.labels[rest])


def fit(net: nn.Module, data: Data, steps: int, *, batch: int = 64, rate: float = 3e-3, seed: int = 0) -> float:
    """Train a network from where it is: AdamW, the rate rising over a tenth of the steps (or two), then falling to 0.

    Parameters
    ----------
    net : torch.nn.Module
    data : Data
    steps, batch : int
    rate : float
        Highest learning rate.
    seed : int
        Of the order of the images.

    Returns
    -------
    float
        Loss of the last step.
    """
    optimizer = torch.optim.AdamW(net.parameters(), rate, weight_decay=1e-2)
    batches = data.batches(min(batch, len(data)), seed)
    total = max(steps, 3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total, pct_start=max(0.1, 2 / total))
    net.train()
    loss = torch.zeros(())
    for _ in range(steps):
        images, labels = next(batches)
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    return float(loss.detach())


def measure_accuracy(net: nn.Module, data: Data, batch: int = 500) -> float:
    """Return the share of images that a network, in evaluation mode, is right about."""
    net.eval()
    with torch.no_grad():
        right = sum(
            int((net(images).argmax(1) == labels).sum())
            for images, labels in zip(data.images.split(batch), data.labels.split(batch), strict=True)
        )
    return right / len(data)
