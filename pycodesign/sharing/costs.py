"""What tasks cost beside a pass of the backbone: counted, and measured on this machine."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pycodesign.sharing import masks
from pycodesign.sharing.components import POSITIONS, Task, TaskSpec, check_count
from pycodesign.sharing.deltas import KINDS, DenseDelta, LowRankDelta, RowDelta, SparseDelta
from pycodesign.sharing.encoders import PROJECTIONS, Encoder
from pycodesign.sharing.engine import Engine, Served

__all__ = ["CostTable", "count_operations", "measure_costs"]


def count_operations(encoder: Encoder, tokens: int, task: Task | None = None) -> int:
    """Count multiply-adds for one text: of the backbone's layers, or of a task on top of them.

    Products with matrices, attention and pooling count; norms and activation functions do not. A delta's entries count
    once for each token that it is computed for.

    Parameters
    ----------
    encoder : Encoder
    tokens : int
    task : Task, optional
    """
    width = encoder.width
    if task is None:
        per_token = sum(linear.weight.numel() for layer in encoder.layers for linear in layer.projections.values())
        return tokens * per_token + len(encoder.layers) * 2 * tokens * tokens * width
    spec = task.spec
    asked = tokens if spec.positions == "all" else 1
    wide = 1 if spec.positions == "first" else tokens
    total = (len(encoder.layers) + 1) * 2 * asked * width + asked * task.head.weight.numel()
    for number in spec.layers:
        deltas, project = task.find_deltas(number), encoder.layers[number].projections
        entries = {name: sum(p.numel() for p in delta.parameters()) for name, delta in deltas.items()}
        if entries.keys() & {"query", "key", "value", "output"}:
            total += 2 * asked * tokens * width + asked * project["output"].weight.numel()
            total += asked * (entries.get("query", 0) + entries.get("output", 0))
            total += tokens * (entries.get("key", 0) + entries.get("value", 0))
        total += asked * entries.get("down", 0)
        if "up" in deltas:
            rows = deltas["up"].outputs
            changed = project["up"].weight.shape[0] if rows is None else len(rows)
            total += wide * entries["up"] + asked * changed * width  # the second projection of what changed
            total += wide * changed if spec.positions == "mean" else 0
    return total


@dataclass(frozen=True)
class CostTable:
    """Seconds that one delta adds to a pass, by projection and kind, as `measure_costs` measured them.

    Attributes
    ----------
    seconds : dict
        ``seconds["value"]["sparse"]``, of one layer and one task.
    backbone : float
        Seconds of a pass of the backbone.
    tokens : int
        Of the text.
    positions : str
    """

    seconds: dict[str, dict[str, float]]
    backbone: float
    tokens: int
    positions: str

    def __post_init__(self) -> None:
        if not isinstance(self.seconds, dict) or set(self.seconds) != set(PROJECTIONS):
            raise ValueError(f"seconds: expected rows for {', '.join(PROJECTIONS)}, got {self.seconds!r:.200}")
        kinds = {tuple(row) if isinstance(row, dict) else () for row in self.seconds.values()}
        if len(kinds) > 1 or not all(kinds) or not set(KINDS).issuperset(*kinds):
            raise ValueError(f"seconds: expected the same of {', '.join(KINDS)} in each row, got {self.seconds!r:.200}")
        for value in (cost for row in self.seconds.values() for cost in row.values()):
            if not _is_number(value) or value < 0:
                raise ValueError(f"seconds: expected finite numbers of at least 0, got {value!r}")
        if not _is_number(self.backbone) or self.backbone <= 0:
            raise ValueError(f"backbone: expected a positive number of seconds, got {self.backbone!r}")
        _check_asked(self.tokens, self.positions)

    def compute_share(self, deltas: dict[str, str]) -> float:
        """Return what deltas, kinds by ``"LAYER.PROJECTION"``, cost in passes of the backbone."""
        return sum(self.seconds[place.partition(".")[2]][kind] for place, kind in deltas.items()) / self.backbone

    def to_json(self) -> str:
        """Write the table as JSON; `from_json` reads it."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> CostTable:
        """Read what `to_json` wrote, after checking it."""
        try:
            fields: Any = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("text: expected JSON, got other text") from None
        if not isinstance(fields, dict) or set(fields) != set(cls.__dataclass_fields__):
            raise ValueError(f"text: expected the fields {', '.join(cls.__dataclass_fields__)}, got others")
        return cls(**fields)

    def __str__(self) -> str:
        kinds = list(next(iter(self.seconds.values())))
        lines = [f"{'per cent of a pass':<20}" + "".join(f"{kind:>10}" for kind in kinds)]
        for projection, row in self.seconds.items():
            lines.append(f"{projection:<20}" + "".join(f"{100 * row[kind] / self.backbone:>10.3f}" for kind in kinds))
        return "\n".join(lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_asked(tokens: int, positions: str) -> None:
    check_count("tokens", tokens)
    if positions not in POSITIONS:
        raise ValueError(f"positions: expected one of {', '.join(POSITIONS)}, got {positions!r}")


@torch.inference_mode()
def measure_costs(
    encoder: Encoder,
    *,
    tokens: int = 128,
    positions: str = "mean",
    density: float = 0.014,
    kinds: Sequence[str] = ("sparse", "low_rank", "dense"),
    rounds: int = 15,
) -> CostTable:
    """Measure what each kind of delta of each projection of a layer costs, through the engine's kernels.

    The contenders take turns, and medians count; layers are taken to be alike.

    Parameters
    ----------
    encoder : Encoder
        As a `MultiTask` holds it.
    tokens : int
        Of one text.
    positions : {"mean", "first", "all"}
    density : float
        Of sparse deltas and rows; it sets the rank of low-rank ones, too.
    kinds : sequence of str
    rounds : int
        Turns of each.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    _check_asked(tokens, positions)
    check_count("rounds", rounds)
    unknown = set(kinds) - set(KINDS)
    if unknown or not kinds:
        raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got {', '.join(kinds) or 'none'}")
    kind = "tokens" if positions == "all" else "classification"
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1, tokens, encoder.width, generator=generator, dtype=torch.float32)
    mask = torch.ones(1, tokens, dtype=torch.bool)
    engine = Engine(encoder, lambda *_: ({}, None))
    _, layers = replace(encoder, embed=lambda _: h).run({})
    contenders: dict[tuple[str, str], Served] = {}
    empty = TaskSpec(2, kind, positions, {}, None, density)
    contenders["", ""] = Served(Task(empty, encoder), encoder)
    for projection in PROJECTIONS:
        for name in kinds:
            task = Task(replace(empty, deltas={f"0.{projection}": name}), encoder)
            weight = encoder.layers[0].projections[projection].weight
            task.deltas[f"0_{projection}"] = make_random(name, weight, density)
            contenders[projection, name] = Served(task, encoder)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in contenders}
    passes: list[float] = []
    for turn in range(rounds + 2):
        start = time.perf_counter()
        replace(encoder, embed=lambda _: h).run({})
        passes.append(time.perf_counter() - start)
        keys = list(contenders)
        first = turn * len(keys) // (rounds + 2)  # who comes after the pass finds other data in the caches
        for key in keys[first:] + keys[:first]:
            start = time.perf_counter()
            engine.run_tasks([contenders[key]], h, layers, mask)
            times[key].append(time.perf_counter() - start)
        if turn == 1:  # the first turns wake threads and pack the backbone's own weights
            passes.clear()
            times = {key: [] for key in contenders}
    medians = {key: statistics.median(values) for key, values in times.items()}
    base = medians["", ""]
    seconds = {p: {k: max(0.0, medians[p, k] - base) for k in kinds} for p in PROJECTIONS}
    return CostTable(seconds, statistics.median(passes), tokens, positions)


def make_random(kind: str, weight: Tensor, density: float) -> Any:
    """Make a delta of random places, and of values that are zero."""
    shape = (weight.shape[0], weight.shape[1])
    generator = torch.Generator().manual_seed(0)
    if kind == "sparse":
        count = max(1, round(density * weight.numel()))
        return SparseDelta(shape, torch.randperm(weight.numel(), generator=generator)[:count].sort().values)
    if kind == "rows":
        count = max(1, round(density * shape[0]))
        return RowDelta(shape, torch.randperm(shape[0], generator=generator)[:count].sort().values)
    if kind == "low_rank":
        return LowRankDelta(shape, masks.find_rank(shape, density))
    return DenseDelta(shape)
