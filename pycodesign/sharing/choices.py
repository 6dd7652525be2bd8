"""Where a task needs a difference at all, and of which kind: found while training, for a cost on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pycodesign.sharing import masks
from pycodesign.sharing.components import Features, Task, check_count
from pycodesign.sharing.costs import CostTable
from pycodesign.sharing.deltas import Delta, DenseDelta, LowRankDelta
from pycodesign.sharing.encoders import PROJECTIONS
from pycodesign.sharing.multitask import MultiTask

__all__ = ["Search", "search"]

REUSE = "reuse"


class ChoiceDelta(Delta):
    """A weighted sum of deltas, of which one, or none, is to be chosen."""

    kind = "choice"
    costs: Tensor

    def __init__(self, shape: tuple[int, int], candidates: Mapping[str, Delta], costs: Mapping[str, float]) -> None:
        super().__init__()
        self.shape = shape
        self.names = [REUSE, *candidates]
        self.candidates = nn.ModuleList(candidates.values())
        self.logits = nn.Parameter(torch.zeros(len(self.names), dtype=torch.float32))
        own = [0.0, *(costs[name] for name in candidates)]
        self.register_buffer("costs", torch.tensor(own, dtype=torch.float32), persistent=False)
        self.weights = torch.softmax(self.logits.detach(), 0)
        self.bias = nn.Parameter(torch.zeros(shape[0], dtype=torch.float32))

    def draw(self, temperature: float, generator: torch.Generator) -> None:
        """Draw the weights of candidates: a Gumbel softmax; the generator is the CPU's, wherever the logits are."""
        noise = -torch.empty(len(self.names), dtype=torch.float32, device="cpu").exponential_(generator=generator).log()
        self.weights = torch.softmax((self.logits + noise.to(self.logits)) / temperature, 0)

    def add_to(self, weight: Tensor) -> Tensor:
        total = weight
        for own, candidate in zip(self.weights[1:], self.candidates, strict=True):
            difference = candidate.add_to(torch.zeros_like(weight))  # type: ignore[operator]
            total = total + own * difference
        return total

    def compute_cost(self) -> Tensor:
        """Return the cost that is expected of the present probabilities."""
        return torch.softmax(self.logits, 0) @ self.costs

    def take(self, choice: int) -> Delta:
        """Return a candidate as the task's delta, with the bias."""
        delta: Any = self.candidates[choice - 1]
        with torch.no_grad():
            delta.bias.copy_(self.bias)
        return delta  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Search:
    """What `search` chose for a task.

    Attributes
    ----------
    choices : dict
        For each ``"LAYER.PROJECTION"`` ``"reuse"`` or the kind of its delta.
    probabilities : dict
        For each place those of its candidates, by name.
    cost, target : float
        In passes of the backbone.
    losses : list of float
        Of the steps.
    """

    name: str
    choices: dict[str, str]
    probabilities: dict[str, dict[str, float]]
    cost: float
    target: float
    losses: list[float]

    @property
    def shared(self) -> float:
        """Share of the projections that are used as they are."""
        return sum(kind == REUSE for kind in self.choices.values()) / len(self.choices)

    def __str__(self) -> str:
        layers = sorted({int(place.partition(".")[0]) for place in self.choices})
        lines = [f"{'layer':<7}" + "".join(f"{projection:>10}" for projection in PROJECTIONS)]
        for layer in layers:
            lines.append(f"{layer:<7}" + "".join(f"{self.choices.get(f'{layer}.{p}', '-'):>10}" for p in PROJECTIONS))
        spent = f"costs {100 * self.cost:.2f} % of a pass, of {100 * self.target:.2f} % allowed"
        return "\n".join([*lines, f"{self.name}: {self.shared:.0%} of the projections are shared; {spent}"])


def search(
    tasks: MultiTask,
    name: str,
    batches: Sequence[tuple[Any, Any]],
    loss: Callable[[Tensor, Any], Tensor],
    *,
    costs: CostTable,
    target: float,
    kinds: Sequence[str] = ("sparse", "low_rank", "dense"),
    epochs: int = 2,
    lr: float = 1e-3,
    choice_lr: float = 0.05,
    pressure: float = 1.0,
    temperatures: tuple[float, float] = (5.0, 0.2),
    seed: int = 0,
) -> Search:
    """Choose for each layer and projection of a task among using it as it is and kinds of deltas.

    Weights of candidates and the choice among them are trained together: each place's dW is a sum of its candidates,
    weighted by a Gumbel softmax whose temperature falls, and the expected cost above the target is added to the loss.
    The candidates that are most probable against reuse then are the task's, with their weights: as many as cost no more
    than the target.

    Parameters
    ----------
    tasks : MultiTask
    name : str
        A task whose head is trained a little; its deltas are replaced.
    batches : sequence of (inputs, labels)
        Inputs as `MultiTask.forward` takes them, or `Features` with all that components read: of a task with a delta of
        every projection.
    loss : callable
        Of logits and labels.
    costs : CostTable
        Of all `kinds` at the task's positions, for texts about as long as the batches'; see `measure_costs`.
    target : float
        What the task may cost, in passes of the backbone.
    kinds : sequence of str
        Candidates beside reuse, among ``"sparse"``, ``"low_rank"`` and ``"dense"``.
    epochs : int
        Over the batches.
    lr, choice_lr : float
        Of weights, and of the choices.
    pressure : float
        Weight of the expected cost above the target, relative to the target.
    temperatures : pair of float
        At the start and at the end.
    seed : int

    Returns
    -------
    Search
        Prints as a table of what is shared.

    Raises
    ------
    KeyError, TypeError, ValueError
        For an unknown task; naming the argument, what was expected and what came. The task is then as it was.

    References
    ----------
    Fu et al., "LeTS", ICML 2021; Wu et al., "FBNet", CVPR 2019: Gumbel softmax and a table of latencies.

    Examples
    --------
    >>> import torch
    >>> from pycodesign import sharing
    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> tasks = sharing.MultiTask(torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), {"tone": 2})
    >>> batches = [(torch.randn(8, 7, 16), torch.randint(2, (8,))) for _ in range(3)]
    >>> costs = sharing.measure_costs(tasks.encoder, tokens=7, rounds=3)
    >>> found = sharing.search(tasks, "tone", batches, torch.nn.functional.cross_entropy, costs=costs, target=0.5)
    >>> found.cost <= 0.5
    True
    """
    task = tasks.get_task(name)
    if not batches:
        raise ValueError("batches: expected at least one batch, got none")
    if not (isinstance(target, int | float) and target > 0):
        raise ValueError(f"target: expected a positive number of passes, got {target!r}")
    check_count("epochs", epochs)
    if not isinstance(temperatures, Sequence) or len(temperatures) != 2:
        raise ValueError(f"temperatures: expected one at the start and one at the end, got {temperatures!r}")
    rates = {"lr": lr, "choice_lr": choice_lr, "temperatures": min(temperatures)}
    for option, value in rates.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{option}: expected positive numbers, got {value!r}")
    if not 0 <= pressure < math.inf:
        raise ValueError(f"pressure: expected at least 0, got {pressure!r}")
    if costs.positions != task.spec.positions:
        wanted = f"a table for positions {task.spec.positions!r}, as the task's"
        raise ValueError(f"costs: expected {wanted}, got one for {costs.positions!r}")
    if not kinds or set(kinds) - {"sparse", "low_rank", "dense"}:
        raise ValueError(f"kinds: expected some of sparse, low_rank, dense, got {', '.join(kinds) or 'none'}")
    missing = [kind for kind in kinds if any(kind not in row for row in costs.seconds.values())]
    if missing:
        raise ValueError(f"costs: expected a table with {', '.join(kinds)}, got none of {missing[0]}")
    with masks.restore_on_failure(task):
        places = [f"{n}.{p}" for n in range(len(tasks.encoder.layers)) for p in PROJECTIONS]
        task.spec = replace(task.spec, deltas=dict.fromkeys(places, "sparse"), asked={})
        task.deltas = nn.ModuleDict()
        read = list(tasks.read_batches(name, batches))
        choices = _make_choices(tasks, task, read, loss, costs, kinds)
        task.deltas = nn.ModuleDict({place.replace(".", "_"): choice for place, choice in choices.items()})
        own = list(choices.values())
        losses = _train(tasks, task, own, read, loss, target, epochs, lr, choice_lr, pressure, temperatures, seed)
        chosen = _fit_target(choices, target)
        kept = {place: choices[place].take(index) for place, index in chosen.items() if index}
        task.deltas = nn.ModuleDict({place.replace(".", "_"): delta for place, delta in kept.items()})
        task.spec = replace(task.spec, deltas={place: delta.kind for place, delta in kept.items()}, asked={})
    return Search(
        name,
        {place: choices[place].names[index] for place, index in chosen.items()},
        {p: dict(zip(c.names, torch.softmax(c.logits.detach(), 0).tolist(), strict=True)) for p, c in choices.items()},
        sum(float(choices[place].costs[index]) for place, index in chosen.items()),
        float(target),
        losses,
    )


def _make_choices(
    tasks: MultiTask,
    task: Task,
    batches: Sequence[tuple[Features, Any]],
    loss: Callable[[Tensor, Any], Tensor],
    costs: CostTable,
    kinds: Sequence[str],
) -> dict[str, ChoiceDelta]:
    places = list(task.spec.deltas)
    sparse: dict[str, Delta] = {}
    if "sparse" in kinds:
        masks.select_mask(task, tasks.encoder, batches, loss, "gradient", "matrix", 1e-3)
        sparse = task.list_deltas()
    device = task.head.weight.device
    choices = {}
    for place in places:
        layer, _, projection = place.partition(".")
        weight = tasks.encoder.layers[int(layer)].projections[projection].weight
        shape = (weight.shape[0], weight.shape[1])
        candidates: dict[str, Delta] = {}
        for kind in kinds:
            if kind == "sparse":
                candidates[kind] = sparse[place]
            elif kind == "low_rank":
                candidates[kind] = LowRankDelta(shape, task.spec.rank or masks.find_rank(shape, task.spec.density))
            else:
                candidates[kind] = DenseDelta(shape)
        seconds = {kind: costs.seconds[projection][kind] / costs.backbone for kind in kinds}
        choices[place] = ChoiceDelta(shape, candidates, seconds).to(device)
    return choices


def _train(
    tasks: MultiTask,
    task: Task,
    choices: list[ChoiceDelta],
    batches: Sequence[tuple[Features, Any]],
    loss: Callable[[Tensor, Any], Tensor],
    target: float,
    epochs: int,
    lr: float,
    choice_lr: float,
    pressure: float,
    temperatures: tuple[float, float],
    seed: int,
) -> list[float]:
    logits = [choice.logits for choice in choices]
    ours = {id(parameter) for parameter in logits}
    weights = [parameter for parameter in task.parameters() if id(parameter) not in ours]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "lr": lr}, {"params": logits, "lr": choice_lr, "weight_decay": 0}]
    )
    generator = torch.Generator().manual_seed(seed)
    start, stop = temperatures
    steps, losses = epochs * len(batches), []
    for step in range(steps):
        temperature = start * (stop / start) ** (step / max(1, steps - 1))
        for choice in choices:
            choice.draw(temperature, generator)
        features, labels = batches[step % len(batches)]
        own = loss(task(tasks.encoder, features), labels)
        cost = torch.stack([choice.compute_cost() for choice in choices]).sum()
        excess = (cost / target - 1).clamp(min=0)
        optimizer.zero_grad()
        (own + pressure * excess).backward()
        optimizer.step()
        losses.append(float(own.detach()))
        if not math.isfinite(losses[-1]):
            raise ValueError(f"loss: expected finite values, got {losses[-1]} at step {step}")
    return losses


def _fit_target(choices: Mapping[str, ChoiceDelta], target: float) -> dict[str, int]:
    """Return candidates, those that are most probable against reuse first, as many as cost no more than the target."""
    moves = []
    for place, choice in choices.items():
        odds = choice.logits.detach() - choice.logits.detach()[0]
        moves += [(float(odds[index]), place, index) for index in range(1, len(choice.names))]
    chosen, total = dict.fromkeys(choices, 0), 0.0
    for _, place, index in sorted(moves, reverse=True):
        cost = float(choices[place].costs[index])
        if not chosen[place] and total + cost <= target:
            chosen[place], total = index, total + cost
    return chosen
