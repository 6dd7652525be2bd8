"""Tasks in service: the backbone runs once, and each asked task adds what it adds, through the package's kernels.

Whatever touches several tasks at once goes through `ops.delta_linear`, whose rows depend on nothing but themselves; all
else is done for one task after the other, in the same shapes. So a task's logits are the same to the bit, alone or
among others, in any order.
"""

from __future__ import annotations

import copy
import functools
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pycodesign import ops
from pycodesign._deltas import PackedDeltas
from pycodesign.sharing.components import (
    ATTENTION,
    MLP,
    Frozen,
    Task,
    TaskSpec,
    check_names,
    check_task,
    pool,
    read_frozen,
    take_first,
)
from pycodesign.sharing.deltas import Delta, to_array
from pycodesign.sharing.encoders import Activations, Encoder, Inputs, Layer, attend

__all__ = ["Engine"]


class Part:
    """A task's component on one layer, packed.

    Attributes
    ----------
    packed : dict
        By projection what it adds. Where few rows of ``"up"`` differ, all of their weights instead.
    rows : Tensor or None
        Those rows; `columns` are theirs of the MLP's second projection.
    """

    def __init__(self, layer: Layer, deltas: Mapping[str, Delta]) -> None:
        self.packed = {name: _pack(delta) for name, delta in deltas.items()}
        rows = deltas["up"].outputs if "up" in deltas else None
        self.rows = None if rows is None else rows.clone()
        self.columns: PackedDeltas | None = None
        if self.rows is not None:
            up = layer.projections["up"]
            bias = deltas["up"].bias if up.bias is None else deltas["up"].bias + up.bias[self.rows]
            self.packed["up"] = ops.prepack_deltas([to_array(deltas["up"].add_to(up.weight))], bias=[to_array(bias)])
            self.columns = ops.prepack_deltas([to_array(layer.projections["down"].weight[:, self.rows])])


class Served:
    """A task, packed; its parameters are copies."""

    def __init__(self, task: Task, encoder: Encoder) -> None:
        task.check_fits(encoder)
        self.spec: TaskSpec = task.spec
        self.parts = {n: Part(encoder.layers[n], task.find_deltas(n)) for n in task.spec.layers}
        self.last = copy.deepcopy(task).eval().requires_grad_(False)
        self.last.deltas.clear()


class Engine:
    """A frozen encoder and tasks on it, made by `MultiTask.build_engine`; float32, in host memory, autocast or not.

    It has copies of weights: once the backbone's are others, calls raise RuntimeError. They look at addresses and
    versions, not at values: whoever writes through ``weight.data``, which no version tells, builds another engine.

    Calls may run at the same time from several threads, while tasks are added and removed: a call serves the tasks that
    there are when it starts.
    """

    def __init__(self, encoder: Encoder, check_inputs: Callable[..., tuple[dict[str, Tensor], Tensor | None]]) -> None:
        weight = encoder.layers[0].projections["query"].weight
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            raise TypeError(f"backbone: expected float32 in host memory, got {weight.dtype} on {weight.device}")
        self.encoder = encoder
        self._versions = encoder.list_versions()
        self._check_inputs = check_inputs
        self._tasks: dict[str, Served] = {}
        self._lock = threading.Lock()
        self._shared: dict[tuple[int, str], PackedDeltas] = {}  # projections of the backbone, packed when first needed

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that are served."""
        return list(self._tasks)

    def add_task(self, name: str, task: Task) -> None:
        """Serve a task as it is now, in place of one of this name if there is one.

        Raises
        ------
        TypeError, ValueError
            If it is no task, its mask is not selected, or it was made for another backbone.
        RuntimeError
            If the backbone's weights are others than when the engine was built.
        """
        self._check_backbone()
        check_task(task)
        if not task.is_selected:
            raise ValueError(f"{name}: expected a mask chosen by select_mask, got deltas without entries")
        served = Served(task, self.encoder)
        with self._lock:
            self._tasks = {**self._tasks, name: served}

    def remove_task(self, name: str) -> None:
        """Serve a task no longer; calls under way still do."""
        with self._lock:
            if name not in self._tasks:
                raise KeyError(f"name: expected one of {', '.join(self._tasks) or 'no task at all'}, got {name!r}")
            self._tasks = {key: task for key, task in self._tasks.items() if key != name}

    def __call__(
        self,
        inputs: Tensor | Inputs | None = None,
        attention_mask: Tensor | None = None,
        tasks: Sequence[str] | None = None,
        **named: Tensor | None,
    ) -> dict[str, Tensor]:
        """Run the backbone once, and return logits by task.

        Parameters
        ----------
        inputs, attention_mask, **named
            As for `MultiTask.forward`.
        tasks : sequence of str, optional
            All by default.

        Raises
        ------
        KeyError
            For a task that is not served.
        TypeError, ValueError
            For inputs that the backbone does not take, texts longer than it takes among them.
        RuntimeError
            If the backbone's weights are others than when the engine was built.
        """
        self._check_backbone()
        served = self._tasks
        names = list(served) if tasks is None else list(dict.fromkeys(check_names(tasks)))
        for name in names:
            if name not in served:
                raise KeyError(f"tasks: expected some of {', '.join(served) or 'no task at all'}, got {name!r}")
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            checked, mask = self._check_inputs(inputs, attention_mask, **named)
            first, layers = self.encoder.run(checked, mask)
            mask = torch.ones(first.shape[:2], dtype=torch.bool) if mask is None else mask
            logits = self.run_tasks([served[name] for name in names], first, layers, mask)
        return {name: own.clone() for name, own in zip(names, logits, strict=True)}  # which autograd takes, too

    def run_tasks(
        self, tasks: Sequence[Served], first: Tensor, layers: Sequence[Activations], mask: Tensor
    ) -> list[Tensor]:
        """Return the tasks' logits on a pass of the backbone, of which nothing is changed."""
        slots: dict[str, list[Tensor]] = {}
        for positions in dict.fromkeys(task.spec.positions for task in tasks):
            pooled = [pool(h, mask, positions) for h in (first, *(own.h for own in layers))]
            slots[positions] = pooled if self.encoder.norm is None else [self.encoder.norm(slot) for slot in pooled]
        own_slots = [list(slots[task.spec.positions]) for task in tasks]
        for number, activations in enumerate(layers):
            for positions in slots:
                chosen = [
                    n for n, task in enumerate(tasks) if number in task.parts and task.spec.positions == positions
                ]
                parts = [tasks[n].parts[number] for n in chosen]
                if parts:
                    step = Step(self, number, activations, mask, positions, parts)
                    for n, added in zip(chosen, step.run(), strict=True):
                        own_slots[n][number + 1] = own_slots[n][number + 1] + added
        return [task.last.finish(torch.stack(own)) for task, own in zip(tasks, own_slots, strict=True)]

    def _check_backbone(self) -> None:
        if self.encoder.list_versions() != self._versions:
            wanted = "the weights that the engine was built on"
            raise RuntimeError(f"backbone: expected {wanted}, got others: build it again")

    def share(self, number: int, projection: str) -> PackedDeltas:
        """Return a projection's weight, packed; rows of its products do not depend on one another."""
        key = number, projection
        if key not in self._shared:
            weight = self.encoder.layers[number].projections[projection].weight
            packed = ops.prepack_deltas([to_array(weight)])
            with self._lock:
                self._shared = {**self._shared, key: packed}
        return self._shared[key]


class Step:
    """Components of several tasks on one layer, at the same positions."""

    def __init__(
        self,
        engine: Engine,
        number: int,
        activations: Activations,
        mask: Tensor,
        positions: str,
        parts: Sequence[Part],
    ) -> None:
        self.engine, self.number, self.mask, self.positions, self.parts = engine, number, mask, positions, parts
        self.layer, self.activations = engine.encoder.layers[number], activations
        needed = {projection for part in parts for projection in part.packed}
        self.frozen: Frozen = read_frozen(self.layer, activations, mask, positions, needed)

    def run(self) -> list[Tensor]:
        """Return for each task what it adds to the layer's output (B, P, D)."""
        added: list[list[Tensor]] = [[] for _ in self.parts]
        attention = [n for n, part in enumerate(self.parts) if part.packed.keys() & ATTENTION]
        mlp = [n for n, part in enumerate(self.parts) if part.packed.keys() & set(MLP)]
        if attention:
            self._attend(attention, added)
        if mlp:
            self._run_mlp(mlp, added)
        return [functools.reduce(operator.add, terms) for terms in added]

    def _attend(self, chosen: list[int], added: list[list[Tensor]]) -> None:
        x, q, context = (_take(part) for part in (self.frozen.x, self.frozen.q, self.frozen.context))
        own = self.activations
        queries = self._project(chosen, "query", _take(self.frozen.x_pooled), q)
        keys = self._project(chosen, "key", x, own.k)
        values = self._project(chosen, "value", x, own.v)
        triples = zip(queries, keys, values, strict=True)
        contexts = [attend(*triple, self.layer.heads, self.mask) for triple in triples]
        for n, term in zip(chosen, self._multiply("output", [c - context for c in contexts]), strict=True):
            added[n].append(term)
        self._add(chosen, "output", contexts, added)

    def _run_mlp(self, chosen: list[int], added: list[list[Tensor]]) -> None:
        a, g = _take(self.frozen.a), _take(self.frozen.g)
        z = take_first(self.activations.z, self.mask) if self.positions == "first" else self.activations.z
        read = dict.fromkeys(chosen, g)  # by the second projection
        whole = [n for n in chosen if "up" in self.parts[n].packed and self.parts[n].rows is None]
        if whole:
            for n, own in zip(whole, self._project(whole, "up", a, z), strict=True):
                read[n] = self._activate(own)
            for n, term in zip(whole, self._multiply("down", [read[n] - g for n in whole]), strict=True):
                added[n].append(term)
        by_count: dict[int, list[int]] = {}
        for n in chosen:
            rows = self.parts[n].rows
            if rows is not None:
                by_count.setdefault(len(rows), []).append(n)
        for group in by_count.values():
            self._run_rows(group, a, g, read, added)
        self._add(chosen, "down", [read[n] for n in chosen], added)

    def _run_rows(
        self, group: list[int], a: Tensor, g: Tensor, read: dict[int, Tensor], added: list[list[Tensor]]
    ) -> None:
        """Run the first projection's rows that differ, as many in each of these tasks."""
        changes = []
        for n, own in zip(group, _multiply(_join(self.parts[n].packed["up"] for n in group), a), strict=True):
            rows = _take(self.parts[n].rows)
            changed = self._activate(own)
            changes.append(changed - g[..., rows])
            if "down" in self.parts[n].packed:
                read[n] = g.index_copy(-1, rows, changed)
        columns = _join(_take(self.parts[n].columns) for n in group)
        for n, term in zip(group, _multiply(columns, torch.stack(changes)), strict=True):
            added[n].append(term)

    def _activate(self, z: Tensor) -> Tensor:
        """Apply the activation function, and pool, one task's (B, T', F)."""
        g = _align(self.layer.activation(z))  # where that works in place, a part of all tasks' outputs
        return g if self.positions == "first" else pool(g, self.mask, self.positions)

    def _project(self, chosen: list[int], name: str, x: Tensor, base: Tensor) -> list[Tensor]:
        """Return `base` for tasks without such a delta, and base + dW x + db for the others."""
        having = [n for n in chosen if name in self.parts[n].packed]
        if not having:
            return [base] * len(chosen)
        packed = _join(self.parts[n].packed[name] for n in having)
        found = dict(zip(having, (_align(own) for own in _multiply(packed, x, base)), strict=True))
        return [found.get(n, base) for n in chosen]

    def _add(self, chosen: list[int], name: str, xs: list[Tensor], added: list[list[Tensor]]) -> None:
        """Append dW x + db for tasks that have such a delta."""
        having = [(n, x) for n, x in zip(chosen, xs, strict=True) if name in self.parts[n].packed]
        if having:
            packed = _join(self.parts[n].packed[name] for n, _ in having)
            for (n, _), term in zip(having, _multiply(packed, torch.stack([x for _, x in having])), strict=True):
                added[n].append(term)

    def _multiply(self, name: str, xs: list[Tensor]) -> Tensor:
        """Return W x of the backbone's own weight, for each task's x (B, P, I)."""
        stacked = torch.stack(xs)
        return _multiply(self.engine.share(self.number, name), stacked.flatten(0, 1))[0].view(*stacked.shape[:-1], -1)


def _multiply(packed: PackedDeltas, x: Tensor, base: Tensor | None = None) -> Tensor:
    """Return base + dW x + db (N, B, T, O) of x (B, T, I), or (N, B, T, I)."""
    rows = x.flatten(-3, -2)
    shared = None if base is None else base.flatten(-3, -2)
    y: Tensor = ops.delta_linear(rows, shared, packed)
    return y.view(len(packed), *x.shape[-3:-1], y.shape[-1])


def _align(y: Tensor) -> Tensor:
    """Return y at a multiple of 64 bytes, where torch allocates: its attention gives other bits elsewhere."""
    return y.clone() if y.data_ptr() % 64 else y


def _join(packed: Any) -> PackedDeltas:
    """Put tasks' deltas together; they are not copied."""
    return functools.reduce(operator.add, packed)  # type: ignore[no-any-return]


def _pack(delta: Delta) -> PackedDeltas:
    bias: Tensor = delta.bias
    if delta.outputs is not None:
        bias = bias.detach().cpu()
        bias = bias.new_zeros(delta.shape[0]).index_copy(0, delta.outputs.cpu(), bias)
    return ops.prepack_deltas([delta.pack()], bias=[to_array(bias)])


def _take(part: Any) -> Any:
    assert part is not None  # what a projection of the part reads is there
    return part
