"""What a task has: components on frozen layers, an aggregator over the layers, and a head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycodesign.sharing.deltas import Delta
from pycodesign.sharing.encoders import PROJECTIONS, Activations, Encoder, Layer, attend

__all__ = [
    "AGGREGATORS",
    "POSITIONS",
    "Aggregator",
    "Concatenation",
    "Features",
    "Frozen",
    "Task",
    "TaskSpec",
    "check_count",
    "check_dropout",
    "check_names",
    "check_task",
    "is_integer",
    "pool",
    "read_features",
    "run_component",
    "take_first",
]

POSITIONS = ("mean", "first", "all")
AGGREGATORS = ("attention", "concat")
LABELS = ("classification", "regression", "tokens")
ATTENTION = ("query", "key", "value", "output")
MLP = ("up", "down")


@dataclass(frozen=True)
class TaskSpec:
    """What a task is.

    Attributes
    ----------
    labels : int
        Logits: classes, or numbers to predict.
    kind : {"classification", "regression", "tokens"}
    positions : {"mean", "first", "all"}
        What the head reads: the mean over a text's tokens, its first token, or every token. A component computes no
        more than it takes for that.
    deltas : dict
        For each ``"LAYER.PROJECTION"`` with a difference of weights its kind.
    asked : dict
        Of these and of those that a selection of entries left empty: what the next one chooses from. `deltas` if none
        are given.
    rank : int or None
        Of those that are low-rank; None: as many parameters as `density` of the matrix has.
    density : float
        Of those that are sparse or rows.
    aggregator : {"attention", "concat"}
        How the head reads the layers: an `Aggregator` or a `Concatenation`.
    """

    labels: int
    kind: str = "classification"
    positions: str = "mean"
    deltas: Mapping[str, str] = field(default_factory=dict)
    rank: int | None = None
    density: float = 0.014
    aggregator: str = "attention"
    asked: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "deltas", dict(self.deltas))
        object.__setattr__(self, "asked", dict(self.asked or self.deltas))
        object.__setattr__(self, "labels", check_count("labels", self.labels))
        if self.kind not in LABELS:
            raise ValueError(f"kind: expected one of {', '.join(LABELS)}, got {self.kind!r}")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions: expected one of {', '.join(POSITIONS)}, got {self.positions!r}")
        if (self.kind == "tokens") != (self.positions == "all"):
            raise ValueError(f"positions: expected 'all' for labels of tokens and no others, got {self.positions!r}")
        if self.aggregator not in AGGREGATORS:
            raise ValueError(f"aggregator: expected one of {', '.join(AGGREGATORS)}, got {self.aggregator!r}")
        if isinstance(self.density, bool) or not isinstance(self.density, Real) or not 0 < self.density <= 1:
            raise ValueError(f"density: expected a share in (0, 1], got {self.density!r}")
        object.__setattr__(self, "density", float(self.density))
        if self.rank is not None:
            object.__setattr__(self, "rank", check_count("rank", self.rank))

    @property
    def layers(self) -> list[int]:
        """Layers with a component."""
        return sorted({int(place.partition(".")[0]) for place in self.deltas})

    def find_deltas(self, layer: int) -> dict[str, str]:
        """Return the kinds of a layer's deltas by projection."""
        return {p: self.deltas[f"{layer}.{p}"] for p in PROJECTIONS if f"{layer}.{p}" in self.deltas}


class Frozen(NamedTuple):
    """What a component reads of one frozen layer, for B texts of T tokens, of which P positions are asked.

    P is 1 for ``"first"`` and ``"mean"``, T for ``"all"``; T' is 1 for ``"first"``, else T. Parts that no delta of the
    task reads are None.

    Attributes
    ----------
    x : Tensor (B, T, D)
        What keys and values read.
    x_pooled, q, context : Tensor (B, P, D)
        What the queries read, frozen queries, and what the output projection reads for them.
    a : Tensor (B, T', D)
        What the MLP reads.
    g : Tensor (B, P, F)
        What the MLP's second projection reads, pooled.
    """

    x: Tensor | None
    x_pooled: Tensor | None
    q: Tensor | None
    context: Tensor | None
    a: Tensor | None
    g: Tensor | None


class Features(NamedTuple):
    """What a task reads of the frozen backbone.

    Attributes
    ----------
    mask : Tensor (B, T) of bool
        True where a token is.
    slots : Tensor (S, B, P, D)
        Pooled outputs: of the embedding, then of each layer.
    layers : dict of Frozen
        By number, those with a component.
    """

    mask: Tensor
    slots: Tensor
    layers: dict[int, Frozen]

    def to(self, dtype: torch.dtype) -> Features:
        """Return the features in a dtype."""
        layers = {n: Frozen(*(None if t is None else t.to(dtype) for t in own)) for n, own in self.layers.items()}
        return Features(self.mask, self.slots.to(dtype), layers)


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer, of NumPy's too, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_count(name: str, value: Any) -> int:
    """Return a number of something, of which there has to be one."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value!r}")
    return int(value)


def check_dropout(dropout: Any) -> None:
    """Refuse what is no share."""
    if isinstance(dropout, bool) or not isinstance(dropout, Real) or not 0 <= float(dropout) <= 1:
        raise ValueError(f"dropout: expected a share in [0, 1], got {dropout!r}")


def check_names(tasks: Sequence[str]) -> list[str]:
    """Return tasks' names as a list."""
    if isinstance(tasks, str) or not isinstance(tasks, Iterable):
        raise TypeError(f"tasks: expected a sequence of names, got {tasks!r}")
    return list(tasks)


def pool(x: Tensor, mask: Tensor, positions: str) -> Tensor:
    """Pool (B, T, D) to (B, P, D)."""
    if positions == "first":
        return take_first(x, mask)
    if positions == "all":
        return x
    weights = mask.to(x.dtype)
    weights = weights / weights.sum(1, keepdim=True)
    return torch.bmm(weights[:, None], x)


def take_first(x: Tensor, mask: Tensor) -> Tensor:
    """Return the first token (B, 1, D) of each text, which padding may precede."""
    return x[torch.arange(len(x), device=x.device), mask.int().argmax(1)][:, None]


def read_features(
    encoder: Encoder,
    first: Tensor,
    layers: Sequence[Activations],
    mask: Tensor,
    positions: str,
    wanted: Mapping[int, Iterable[str]],
) -> Features:
    """Take what components read from a pass of the backbone.

    Parameters
    ----------
    wanted : dict
        For each layer's number the projections that have a delta.
    """
    slots = [pool(first, mask, positions)]
    for activations in layers:
        slots.append(pool(activations.h, mask, positions))
    if encoder.norm is not None:
        slots = [encoder.norm(slot) for slot in slots]
    frozen = {}
    for number, projections in wanted.items():
        layer, own = layers[number], set(projections)
        frozen[number] = read_frozen(encoder.layers[number], layer, mask, positions, own)
    return Features(mask, torch.stack(slots), frozen)


def read_frozen(layer: Layer, own: Activations, mask: Tensor, positions: str, projections: set[str]) -> Frozen:
    """Take what one component reads; `projections` are those that have a delta."""
    x = x_pooled = q = context = a = g = None
    if projections.intersection(ATTENTION):
        x, x_pooled, q = own.x, pool(own.x, mask, positions), pool(own.q, mask, positions)
        if positions == "mean":  # of its own query, not a mean over the tokens' contexts
            context = attend(q, own.k, own.v, layer.heads, mask)
        else:
            context = pool(own.context, mask, positions)
    if projections.intersection(MLP):
        a = take_first(own.a, mask) if positions == "first" else own.a
        g = pool(own.g, mask, positions)
    return Frozen(x, x_pooled, q, context, a, g)


def run_component(layer: Layer, deltas: Mapping[str, Delta], frozen: Frozen, mask: Tensor, positions: str) -> Tensor:
    """Return what a task's deltas add to the layer's output (B, P, D), to first order in the residual sums.

    Every projection but the last of attention and MLP reads what it reads in the frozen layer; what follows is linear
    and commutes with the mean over tokens, so that it is computed once, for the pooled position.
    """
    added: Tensor | None = None
    project = layer.projections
    if any(name in deltas for name in ATTENTION):
        assert frozen.x is not None and frozen.q is not None and frozen.context is not None
        q = frozen.q
        if "query" in deltas:
            assert frozen.x_pooled is not None
            q = run_delta(deltas["query"], layer, "query", frozen.x_pooled)
        k, v = (
            run_delta(deltas[name], layer, name, frozen.x) if name in deltas else project[name](frozen.x)
            for name in ("key", "value")
        )
        context = attend(q, k, v, layer.heads, mask)
        added = F.linear(context - frozen.context, project["output"].weight)
        if "output" in deltas:
            added = added + run_difference(deltas["output"], context)
    if any(name in deltas for name in MLP):
        assert frozen.a is not None and frozen.g is not None
        g, rows, weight = frozen.g, None, project["down"].weight
        part = None
        if "up" in deltas:
            rows = deltas["up"].outputs
            z = deltas["up"].project(project["up"], frozen.a)
            changed = layer.activation(z) if positions == "first" else pool(layer.activation(z), mask, positions)
            if rows is None:
                part, g = F.linear(changed - g, weight), changed
            else:
                part, g = F.linear(changed - g[..., rows], weight[:, rows]), g.index_copy(-1, rows, changed)
        if "down" in deltas:
            own = run_difference(deltas["down"], g)
            part = own if part is None else part + own
        added = part if added is None else added + part  # type: ignore[operator]
    assert added is not None
    return added


def run_delta(delta: Delta, layer: Layer, name: str, x: Tensor) -> Tensor:
    """Return (W + dW) x + b + db for all outputs (..., O)."""
    linear = layer.projections[name]
    y = delta.project(linear, x)
    return y if delta.outputs is None else linear(x).index_copy(-1, delta.outputs, y)


def run_difference(delta: Delta, x: Tensor) -> Tensor:
    """Return dW x + db for all outputs (..., O)."""
    y = delta.multiply(x)
    if delta.outputs is None:
        return y
    return y.new_zeros((*x.shape[:-1], delta.shape[0])).index_copy(-1, delta.outputs, y)


class Aggregator(nn.Module):
    """Attention over the layers: which of them each feature is read from.

    A feature's score for a layer is a number of its own, plus the product of the layer's features with a query, in
    each of few groups. At the start the last layer has half of the weight.

    References
    ----------
    Fu et al., "LeTS", ICML 2021: attention pooling over the layers' outputs.
    """

    def __init__(self, slots: int, width: int, groups: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(groups, width // groups, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(slots, groups, width // groups, dtype=torch.float32))
        with torch.no_grad():
            self.bias[-1] = torch.tensor(float(slots - 1)).log()

    def forward(self, slots: Tensor) -> Tensor:
        """Pool (S, B, P, D) to (B, P, D)."""
        parts = slots.unflatten(-1, self.query.shape)
        scores = (parts * self.query).sum(-1, keepdim=True) + self.bias[:, None, None]
        pooled: Tensor = (scores.softmax(0) * parts).sum(0).flatten(-2)
        return pooled


class Concatenation(nn.Module):
    """All layers' features side by side, so that the head reads each class from the layers that tell it.

    Features of a frozen model differ in scale by orders of magnitude: a batch normalization without parameters brings
    them to mean 0 and variance 1.

    References
    ----------
    He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022: such a normalization before a linear
    head on frozen features.
    """

    def __init__(self, slots: int, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(slots * width, affine=False, dtype=torch.float32)

    def forward(self, slots: Tensor) -> Tensor:
        """Join (S, B, P, D) to (B, P, S * D)."""
        joined = slots.movedim(0, -2).flatten(-2)
        normed: Tensor = self.norm(joined.flatten(0, -2)).view_as(joined)
        return normed


class Task(nn.Module):
    """A task's own parameters.

    Attributes
    ----------
    spec : TaskSpec
    deltas : torch.nn.ModuleDict
        By ``"LAYER_PROJECTION"``; none yet for those that are sparse or rows, before a mask is selected.
    aggregator : Aggregator or Concatenation
    dropout, head : torch.nn.Module
    """

    def __init__(self, spec: TaskSpec, encoder: Encoder, dropout: float = 0.1) -> None:
        super().__init__()
        self.spec = spec
        self.deltas = nn.ModuleDict()
        self.width, self.slots = encoder.width, len(encoder.layers) + 1
        concat = spec.aggregator == "concat"
        self.aggregator: nn.Module = (
            Concatenation(self.slots, self.width)
            if concat
            else Aggregator(self.slots, self.width, encoder.layers[0].heads)
        )
        self.dropout = nn.Dropout(dropout)
        width = self.slots * self.width if concat else self.width
        self.head = nn.Linear(width, spec.labels, dtype=torch.float32)
        weight = encoder.layers[0].projections["query"].weight
        self.to(device=weight.device)
        self._encoder: Encoder | None = encoder  # that it was made for

    def find_deltas(self, layer: int) -> dict[str, Delta]:
        """Return a layer's deltas by projection."""
        found: dict[str, Any] = {p: self.deltas[f"{layer}_{p}"] for p in PROJECTIONS if f"{layer}_{p}" in self.deltas}
        return found

    def list_deltas(self) -> dict[str, Delta]:
        """Return all deltas by ``"LAYER.PROJECTION"``."""
        found: dict[str, Any] = {key.replace("_", "."): delta for key, delta in self.deltas.items()}
        return found

    @property
    def is_selected(self) -> bool:
        """Whether every delta has its mask."""
        return {key.replace("_", ".") for key in self.deltas} == set(self.spec.deltas)

    def check_fits(self, encoder: Encoder) -> None:
        """Compare with an encoder the task's sizes, and the encoder it was made for, which copies do not know.

        Raises
        ------
        ValueError
            Naming what differs.
        """
        if self.width != encoder.width:
            raise ValueError(f"task: expected one of a backbone of {encoder.width} features, got {self.width}")
        if self.slots != len(encoder.layers) + 1:
            raise ValueError(f"task: expected one of a backbone of {len(encoder.layers)} layers, got {self.slots - 1}")
        for place, delta in self.list_deltas().items():
            layer, _, projection = place.partition(".")
            shape = tuple(encoder.layers[int(layer)].projections[projection].weight.shape)
            if delta.shape != shape:
                raise ValueError(f"task: expected a delta {shape} of {place}, got {delta.shape}")
        own = self._encoder
        if own is None or own == encoder:  # the same modules
            return
        wanted, got = encoder.compute_hash(), own.compute_hash()
        if got != wanted:
            raise ValueError(f"task: expected one of the backbone {wanted[:12]}..., got one of {got[:12]}...")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoder": None}  # copies and pickles of a task have no backbone

    def forward(self, encoder: Encoder, features: Features) -> Tensor:
        """Return logits (B, labels), of token labels (B, T, labels); deltas without a mask add nothing yet.

        Components compute in the backbone's dtype, aggregator and head in their own.

        Raises
        ------
        ValueError
            For features that were read for another task, which lack what this one reads.
        """
        self._check_features(features)
        features = features.to(encoder.layers[0].projections["query"].weight.dtype)
        slots = list(features.slots)
        for number in sorted({int(key.partition("_")[0]) for key in self.deltas}):
            layer, own = encoder.layers[number], self.find_deltas(number)
            added = run_component(layer, own, features.layers[number], features.mask, self.spec.positions)
            slots[number + 1] = slots[number + 1] + added
        return self.finish(torch.stack(slots))

    def _check_features(self, features: Features) -> None:
        """Refuse features that were read for a task with fewer deltas, or for other positions."""
        pooled, tokens = features.slots.shape[2], features.mask.shape[1]
        if len(features.slots) != self.slots or pooled != (tokens if self.spec.positions == "all" else 1):
            wanted = f"{self.slots} outputs at positions {self.spec.positions!r}"
            raise ValueError(f"features: expected {wanted}, got {tuple(features.slots.shape)} of {tokens} tokens")
        for key in self.deltas:
            layer, _, projection = key.partition("_")
            own = features.layers.get(int(layer))
            if own is None or (own.x if projection in ATTENTION else own.a) is None:
                wanted = f"what {layer}.{projection} reads"
                raise ValueError(f"features: expected {wanted}, got none: they were read for another task")

    def finish(self, slots: Tensor) -> Tensor:
        """Return logits of the layers' pooled outputs (S, B, P, D)."""
        logits: Tensor = self.head(self.dropout(self.aggregator(slots.to(self.head.weight.dtype))))
        return logits if self.spec.positions == "all" else logits[:, 0]

    def count_parameters(self) -> dict[str, int]:
        """Count parameters of the components (with the aggregator), and of a head on one layer's features.

        What a head on all layers has beyond that counts as components.
        """
        head = self.spec.labels * (self.width + 1)
        return {"components": sum(parameter.numel() for parameter in self.parameters()) - head, "head": head}


def check_task(task: Any) -> None:
    """Refuse what is no task."""
    if not isinstance(task, Task):
        raise TypeError(f"task: expected one that get_task returns, got {type(task).__name__}")
