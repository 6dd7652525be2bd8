"""Train a small ViT on digits, grow it while it trains, and compare with a large one from scratch.

    pip install "pycodesign[demo,torch]"
    python examples/grow_vit.py                                  # some minutes on one core
    python examples/grow_vit.py --seeds 1 --plot accuracy.svg --json accuracy.json
    python examples/grow_vit.py --search                         # which larger shape? some minutes more

The schedule is TripLe's (ICCV 2023): a small model is trained; before the large training begins it grows in width, and
again after 60 steps; after 120 and after 180 steps it grows by a block. New parameters copy warmed-up weights and the
optimizer's states. Three trainings of each seed take the same batches at the same learning rate:

* scratch: the large model from random weights, after a warm-up;
* kept: the small model, grown with the optimizer's states;
* dropped: the same, with a new optimizer after each growth.

Evaluated are running means of the weights, which grow with the model.

The table says after how many steps the grown ones are as accurate, on 1,000 images that nobody trains on, as the large
model from scratch is at its end; as work, the small model's steps count, too, each step by its operations. It also
gives the means of loss and accuracy over all of their steps, which chance moves less.

`--search` asks another question: how well do a few steps foretell which of six larger shapes will be the most accurate?
It prints Kendall's rank correlation of the loss after few steps, of candidates that are grown and of those from
scratch, with the accuracy of training from scratch to the end; then it lets successive halving choose.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
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
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pycodesign import growth
from pycodesign.bench.harness import SCHEMA, format_result, gather_facts
from pycodesign.demo import load_digits

SMALL = (48, 2)  # features, blocks
STAGES = ((0, (56, 2)), (60, (64, 2)), (120, (64, 3)), (180, (64, 4)))  # step of the large training, and what it trains
LARGE = STAGES[-1][1]
PATCH, HEAD = 7, 8  # pixels; features of an attention head
BATCH, SHIFT, RATE, WARMUP = 64, 2, 5e-3, 50  # images, pixels, learning rate, steps
EVERY, DECAY = 10, 0.95  # steps between evaluations; of the mean over steps of the weights that are evaluated
CANDIDATES = ((48, 3), (48, 6), (64, 2), (64, 4), (80, 3), (96, 4))
PROXY_STEPS = (20, 40, 80)
SEARCH_RATE = 2e-3  # at which the deepest candidate still trains from scratch
KINDS = ("scratch", "kept", "dropped")
COLORS = ("#4477aa", "#228833", "#ee6677")


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, HEAD).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Images (N, 1, 28, 28) to logits (N, 10), by the mean over patches."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (28 // PATCH) ** 2, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


SPEC = growth.Spec(
    "ViT",
    {
        "patches": growth.convolution(None, "stream"),
        "positions": growth.parameter(None, None, "stream"),
        "blocks.*.norm1": growth.layer_norm("stream"),
        "blocks.*.attention.qkv": growth.linear("stream", "q+k+v"),
        "blocks.*.attention.proj": growth.linear("o", "stream"),
        "blocks.*.norm2": growth.layer_norm("stream"),
        "blocks.*.fc1": growth.linear("stream", "hidden"),
        "blocks.*.fc2": growth.linear("hidden", "stream"),
        "norm": growth.layer_norm("stream"),
        "head": growth.linear("stream", None),
    },
    spaces={"stream": "mean"},
    blocks={"blocks.*": 0},
    silence=["blocks.*.attention.proj", "blocks.*.fc2"],
    heads="blocks.0.attention.heads",
)


def weigh_step(shape: tuple[int, int]) -> float:
    """Operations of a step, relative to the large model's: those of the blocks' matrices."""
    return shape[0] ** 2 * shape[1] / (LARGE[0] ** 2 * LARGE[1])


def build_optimizer(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=RATE, weight_decay=0.05)


@dataclass
class Digits:
    """Images (N, 1, 28, 28), float32, and labels (N,), to train and to test with."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def draw(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches, each shifted by some pixels."""
        generator = torch.Generator().manual_seed(seed)
        images, labels = self.train
        while True:
            rows = torch.randint(len(labels), (BATCH,), generator=generator)
            shifts = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
            yield images[rows].roll(shifts, (2, 3)), labels[rows]


@dataclass
class Run:
    """A training: the model and the mean of its weights at its end, losses of all steps, accuracies of some."""

    model: nn.Module
    optimizer: Optimizer
    mean: AveragedModel
    losses: list[float]
    accuracies: list[float]

    def find_step(self, accuracy: float) -> int | None:
        """Return after how many steps the accuracy is that high."""
        return next(((i + 1) * EVERY for i, reached in enumerate(self.accuracies) if reached >= accuracy), None)


def train(
    model: nn.Module,
    optimizer: Optimizer,
    digits: Digits,
    steps: int,
    seed: int,
    *,
    warmup: int = 0,
    done: int = 0,
    rate: float = RATE,
    mean: AveragedModel | None = None,
    schedule: growth.Schedule | None = None,
    keep: bool = True,
) -> Run:
    losses, accuracies = [], []
    batches = digits.draw(seed)
    mean = mean or AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for step in range(steps):
        if schedule is not None:
            before = model
            model, optimizer = schedule.grow(step, model, optimizer, mean)
            if model is not before and not keep:
                optimizer = build_optimizer(model)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (done + step + 1) / warmup) if warmup else rate
        images, labels = next(batches)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean.update_parameters(model)
        losses.append(loss.item())
        if (step + 1) % EVERY == 0:
            with torch.no_grad():
                right = mean(digits.test[0]).argmax(1) == digits.test[1]
            accuracies.append(float(right.float().mean()))
    return Run(model, optimizer, mean, losses, accuracies)


def compare(digits: Digits, seed: int, small_steps: int, steps: int) -> dict[str, Run]:
    """Run the three trainings of a seed."""
    torch.manual_seed(seed)
    large = ViT(*LARGE)
    runs = {"scratch": train(large, build_optimizer(large), digits, steps, seed, warmup=WARMUP)}
    small = ViT(*SMALL)
    trained = train(small, build_optimizer(small), digits, small_steps, 1000 + seed, warmup=WARMUP)
    for kind in KINDS[1:]:
        schedule = growth.Schedule([(step, partial(ViT, *shape)) for step, shape in STAGES], spec=SPEC, seed=seed)
        model, mean = copy.deepcopy(trained.model), copy.deepcopy(trained.mean)
        optimizer = build_optimizer(model)
        optimizer.load_state_dict(trained.optimizer.state_dict())
        options = {"mean": mean, "schedule": schedule, "keep": kind == "kept"}
        runs[kind] = train(model, optimizer, digits, 6 * steps // 10, seed, **options)
    return runs


def summarize(seed: int, runs: dict[str, Run], small_steps: int, steps: int) -> dict[str, Any]:
    accuracy = runs["scratch"].accuracies[-1]
    row: dict[str, Any] = {"seed": seed, "accuracy": accuracy}
    for kind in KINDS[1:]:
        run = runs[kind]
        reached = run.find_step(accuracy)
        row[f"{kind}_steps"] = reached
        if reached is not None:
            starts = [*(step for step, _ in STAGES), reached]
            work = small_steps * weigh_step(SMALL)
            for (start, shape), end in zip(STAGES, starts[1:], strict=True):
                work += max(0, min(end, reached) - start) * weigh_step(shape)
            row[f"{kind}_share"] = reached / steps
            row[f"{kind}_work"] = work / steps
        row[f"{kind}_loss"] = float(np.mean(run.losses))
        row[f"{kind}_mean_accuracy"] = float(np.mean(run.accuracies))
    return {**row, "curves": {kind: run.accuracies for kind, run in runs.items()}}


def search(digits: Digits, seed: int, small_steps: int, final: int) -> dict[str, Any]:
    """Compare grown candidates with those from scratch as a proxy, then search with them."""
    torch.manual_seed(seed)
    small = ViT(*SMALL)
    trained = train(small, build_optimizer(small), digits, small_steps, 1000 + seed, warmup=WARMUP)
    candidates = {f"{w}x{d}": lambda w=w, d=d: ViT(w, d) for w, d in CANDIDATES}

    def run(model: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
        options: dict[str, Any] = {"warmup": WARMUP, "done": first, "rate": SEARCH_RATE}
        train(model, optimizer, digits, last - first, 10_000 * seed + first, **options)

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return -F.cross_entropy(model(digits.test[0]), digits.test[1]).item()

    def measure_accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(digits.test[0]).argmax(1) == digits.test[1]).float().mean())

    options: dict[str, Any] = {"optimizer": trained.optimizer, "spec": SPEC, "seed": seed}
    options["build_optimizer"] = lambda parameters: AdamW(parameters, lr=SEARCH_RATE, weight_decay=0.05)
    taus = growth.compare_proxies(
        small, candidates, run, score, steps=PROXY_STEPS, final_steps=final, final_score=measure_accuracy, **options
    )
    found = growth.search(small, candidates, run, score, steps=PROXY_STEPS[0], **options)
    return {"seed": seed, **taus, "best": found.best, "rungs": found.rungs}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for kind, color in zip(KINDS, COLORS, strict=True):
        curves = 100 * np.array([row["curves"][kind] for row in rows])
        steps = EVERY * np.arange(1, curves.shape[1] + 1)
        label = {"scratch": "from scratch", "kept": "grown, states kept", "dropped": "grown, states dropped"}[kind]
        axes.plot(steps, curves.mean(0), color=color, label=label)
        axes.fill_between(steps, curves.min(0), curves.max(0), color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="steps of the large training", ylabel="accuracy on 1,000 test digits, %", ylim=(60, 100))
    axes.set_title(f"ViT, {len(rows)} seeds: mean, lowest and highest")
    axes.legend(loc="lower right")
    figure.savefig(path)


def print_rows(rows: list[dict[str, Any]]) -> None:
    columns = ("steps", "work", "loss", "accuracy")
    table = Table("seed", "accuracy", *(f"{kind}: {what}" for kind in KINDS[1:] for what in columns))
    for row in rows:
        cells = [str(row["seed"]), f"{row['accuracy']:.1%}"]
        for kind in KINDS[1:]:
            share, work = (row.get(f"{kind}_{name}") for name in ("share", "work"))
            cells += ["not reached", ""] if share is None else [f"{share:.0%}", f"{work:.0%}"]
            cells += [f"{row[f'{kind}_loss']:.3f}", f"{row[f'{kind}_mean_accuracy']:.1%}"]
        table.add_row(*cells)
    Console(width=110).print(table)


def print_search(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "seed", *(f"{proxy}, {steps} steps" for proxy in ("grown", "scratch") for steps in PROXY_STEPS), "best"
    )
    for row in rows:
        taus = (f"{row[proxy][steps]:.2f}" for proxy in ("grown", "scratch") for steps in PROXY_STEPS)
        accurate = max(row["final"], key=row["final"].get)
        table.add_row(str(row["seed"]), *taus, f"{row['best']}, truly {accurate}")
    Console(width=110).print(table)


@click.command(context_settings={"show_default": True})
@click.option("--seeds", type=click.IntRange(min=1), default=5)
@click.option("--steps", type=click.IntRange(min=100), default=600, help="Of the training from scratch.")
@click.option("--small-steps", type=click.IntRange(min=1), default=400, help="Of the small model.")
@click.option("--search", "searching", is_flag=True, help="Compare proxies for the search of a shape instead.")
@click.option("--threads", type=click.IntRange(min=1), default=1)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the accuracies.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write all figures.")
def main(
    seeds: int,
    steps: int,
    small_steps: int,
    searching: bool,
    threads: int,
    plot: Path | None,
    json_path: Path | None,
) -> None:
    """Grow a ViT while it trains."""
    if searching and plot:
        raise click.UsageError("--plot draws trainings, not what --search finds")
    torch.set_num_threads(threads)
    (x, labels), (test_x, test_labels) = ([torch.from_numpy(array) for array in part] for part in load_digits())
    digits = Digits((x, labels), (test_x, test_labels))
    rows = []
    if searching:
        rows = [search(digits, seed, small_steps, steps) for seed in range(seeds)]
    else:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            for seed in progress.track(range(seeds), description="seeds"):
                rows.append(summarize(seed, compare(digits, seed, small_steps, steps), small_steps, steps))
    print_search(rows) if searching else print_rows(rows)
    if json_path:
        suite = "grow_vit_search" if searching else "grow_vit"
        shapes = {"small": SMALL, "stages": STAGES}
        options = {"steps": steps, "small_steps": small_steps, "threads": threads, **shapes}
        rate = SEARCH_RATE if searching else RATE
        options |= {"batch": BATCH, "rate": rate, "warmup": WARMUP, "every": EVERY, "decay": DECAY}
        result = {"schema": SCHEMA, "suite": suite, "facts": gather_facts(), "options": options, "rows": rows}
        json_path.write_text(format_result(result))
    if plot:
        draw(rows, plot)


if __name__ == "__main__":
    main()
