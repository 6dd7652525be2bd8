"""Which entries, or rows, of a task's weights may differ from the backbone's: chosen at the start of training."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pycodesign.sharing.components import Features, Task
from pycodesign.sharing.deltas import DenseDelta, RowDelta, SparseDelta, describe_tensor
from pycodesign.sharing.encoders import Encoder

__all__ = ["METHODS", "SCOPES", "find_rank", "restore_on_failure", "select_mask"]

METHODS = ("gradient", "change")
SCOPES = ("global", "matrix")
MASKED = ("sparse", "rows")


@contextlib.contextmanager
def restore_on_failure(task: Task) -> Iterator[None]:
    """Give a task its spec, deltas and values of before again if the block raises."""
    spec, deltas, state = task.spec, task.deltas, copy.deepcopy(task.state_dict())
    try:
        yield
    except BaseException:
        task.spec, task.deltas = spec, deltas
        task.load_state_dict(state)
        raise


def select_mask(
    task: Task,
    encoder: Encoder,
    batches: Iterable[tuple[Features, Any]],
    loss: Callable[[Tensor, Any], Tensor],
    method: str,
    scope: str,
    lr: float,
) -> dict[str, float]:
    """Give a task its sparse deltas and those of rows; see `MultiTask.select_mask`."""
    for name, value, known in (("method", method, METHODS), ("scope", scope, SCOPES)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    places = {place: kind for place, kind in task.spec.asked.items() if kind in MASKED}
    if not places:
        raise ValueError(f"name: expected a task with sparse deltas or rows, got {dict(task.spec.asked)}")
    task.spec = replace(task.spec, deltas=task.spec.asked)  # which batches are read for
    kept = {key: delta for key, delta in task.deltas.items() if key.replace("_", ".") not in places}
    probes = {place: DenseDelta(_find_shape(encoder, place)).to(task.head.weight.device) for place in places}
    task.deltas = nn.ModuleDict(kept | {place.replace(".", "_"): probe for place, probe in probes.items()})
    scores = _score(task, encoder, probes, batches, loss, method, lr)
    deltas: dict[str, SparseDelta | RowDelta] = {}
    for kind in MASKED:
        own = {place: scores[place] for place in places if places[place] == kind}
        own = {place: score.mean(1) for place, score in own.items()} if kind == "rows" else own
        for place, index in _choose(own, task.spec.density, scope).items():
            shape = _find_shape(encoder, place)
            if len(index):
                deltas[place] = SparseDelta(shape, index) if kind == "sparse" else RowDelta(shape, index)
    chosen = {place: kind for place, kind in task.spec.deltas.items() if place in deltas or kind not in MASKED}
    task.spec = replace(task.spec, deltas=chosen)
    device = task.head.weight.device
    added = {place.replace(".", "_"): delta.to(device) for place, delta in deltas.items()}
    task.deltas = nn.ModuleDict(kept | added)
    return {place: deltas[place].values.numel() / scores[place].numel() if place in deltas else 0.0 for place in places}


def find_rank(shape: tuple[int, int], density: float) -> int:
    """Return the rank at which a pair of factors has about `density` of the matrix's parameters."""
    return max(1, round(density * shape[0] * shape[1] / sum(shape)))


def _find_shape(encoder: Encoder, place: str) -> tuple[int, int]:
    layer, _, projection = place.partition(".")
    outputs, inputs = encoder.layers[int(layer)].projections[projection].weight.shape
    return outputs, inputs


def _score(
    task: Task,
    encoder: Encoder,
    probes: dict[str, DenseDelta],
    batches: Iterable[tuple[Features, Any]],
    loss: Callable[[Tensor, Any], Tensor],
    method: str,
    lr: float,
) -> dict[str, Tensor]:
    values = [probe.values for probe in probes.values()]
    scores = [torch.zeros_like(value) for value in values]
    optimizer = torch.optim.Adam(values, lr=lr)
    seen = 0
    for features, labels in batches:
        own = loss(task(encoder, features), labels)
        if not isinstance(own, Tensor) or own.numel() != 1 or not own.requires_grad:
            got = describe_tensor(own) if isinstance(own, Tensor) else type(own).__name__
            detached = isinstance(own, Tensor) and not own.requires_grad
            raise ValueError(f"loss: expected one number with a gradient, got {got}{', detached' if detached else ''}")
        gradients = torch.autograd.grad(own, values)
        seen += 1
        if method == "gradient":
            for score, gradient in zip(scores, gradients, strict=True):
                score += gradient.abs()
        else:
            for value, gradient in zip(values, gradients, strict=True):
                value.grad = gradient
            optimizer.step()
    if not seen:
        raise ValueError("batches: expected at least one batch, got none")
    if method == "change":
        scores = [value.detach().abs() for value in values]
    for place, score in zip(probes, scores, strict=True):
        if not torch.isfinite(score).all():
            raise ValueError(f"loss: expected finite gradients, got others in {place}")
    if not any(bool(score.any()) for score in scores):
        raise ValueError("loss: expected gradients that are not all zero, got zeros; is the head trained a little?")
    return dict(zip(probes, scores, strict=True))


def _choose(scores: dict[str, Tensor], density: float, scope: str) -> dict[str, Tensor]:
    """Return for each place the flat indices, ascending, of the largest scores."""
    if scope == "matrix":
        return {
            p: s.flatten().topk(max(1, round(density * s.numel()))).indices.sort().values for p, s in scores.items()
        }
    if not scores:
        return {}
    flat = torch.cat([score.flatten() for score in scores.values()])
    best = flat.topk(max(1, round(density * len(flat)))).indices.sort().values
    chosen, start = {}, 0
    for place, score in scores.items():
        stop = start + score.numel()
        chosen[place] = best[(best >= start) & (best < stop)] - start
        start = stop
    return chosen
