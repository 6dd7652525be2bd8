"""One task as a model of its own, for training loops that others wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from pycodesign.sharing.components import TaskSpec

if TYPE_CHECKING:
    from pycodesign.sharing.multitask import MultiTask

__all__ = ["TaskModel", "compute_loss"]


class TaskModel(nn.Module):
    """One task, called as Hugging Face's models are: ``model(**inputs, labels=labels)`` returns loss and logits.

    Its parameters and its state are the task's alone.
    """

    accepts_loss_kwargs = False  # the Trainer passes none then

    def __init__(self, tasks: MultiTask, name: str) -> None:
        super().__init__()
        self.task = tasks.get_task(name)
        self._tasks = (tasks,)  # in a tuple: no submodule
        self.name = name

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return ``logits``, and ``loss`` where labels are given; labels of -100 do not count."""
        tasks = self._tasks[0]
        named = {"input_ids": input_ids, "token_type_ids": token_type_ids, "position_ids": position_ids}
        named |= {"pixel_values": pixel_values, "inputs_embeds": inputs_embeds}
        given = {name: value for name, value in named.items() if value is not None}
        logits = tasks.run(self.name, tasks.read(self.name, given, attention_mask))
        if labels is None:
            return {"logits": logits}
        return {"loss": compute_loss(self.task.spec, logits, labels), "logits": logits}


def compute_loss(spec: TaskSpec, logits: Tensor, labels: Tensor) -> Tensor:
    """Return cross entropy, or the mean squared error of a regression.

    Labels are (B,) or (B, 1), of tokens (B, T).

    Raises
    ------
    ValueError
        For labels in another shape.
    """
    one = logits.shape[:-1]
    if labels.shape not in (one, (*one, 1), logits.shape if spec.kind == "regression" else one):
        raise ValueError(f"labels: expected {tuple(one)}, got {tuple(labels.shape)}")
    if spec.kind == "regression":
        return F.mse_loss(logits, labels.to(logits.dtype).reshape(logits.shape))
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())
