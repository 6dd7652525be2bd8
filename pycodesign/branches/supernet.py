"""All networks of a space at once: shared weights, a distribution over choices, and their latency as a function of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycodesign.branches.operators import Head, Stem, build_gate, build_operator
from pycodesign.branches.space import Architecture, Space
from pycodesign.branches.table import LatencyTable

__all__ = ["Choices", "LatencyModel", "Supernet"]


@dataclass(frozen=True)
class Choices:
    """Weights of each choice, which sum to 1: of a sample one is 1.

    Parameters
    ----------
    operators : Tensor (S, B, L, operators)
    gates : Tensor (S - 1, pairs, gates)
    """

    operators: Tensor
    gates: Tensor

    def indices(self) -> tuple[Tensor, Tensor]:
        return self.operators.argmax(-1), self.gates.argmax(-1)


class Supernet(nn.Module):
    """Every operator at every place, every gate for every pair, and logits that say how likely each is.

    Parameters
    ----------
    space : Space
    """

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space
        s, b, n = space.segments, space.branches, space.layers
        self.stem = Stem(space.channels, space.width)
        self.layers = nn.ModuleList()
        for segment in range(s):
            for _ in range(b):
                for layer in range(n):
                    (inputs, _, _), outputs, stride = space.layer_shape(segment, layer)
                    choices = [build_operator(name, inputs, outputs, stride) for name in space.operators]
                    self.layers.append(nn.ModuleList(choices))
        self.gates = nn.ModuleDict()
        for segment in range(s - 1):
            for first, second in space.pairs:
                for branch, other in ((first, second), (second, first)):
                    for gate in set(space.gates) - {"none"}:
                        name = f"{segment}_{branch}_{other}_{gate}"
                        self.gates[name] = build_gate(gate, space.shape(segment)[0])
        self.head = Head(b * space.shape(s - 1)[0], space.classes)
        self.operator_logits = nn.Parameter(torch.zeros(s, b, n, len(space.operators)))
        self.gate_logits = nn.Parameter(torch.zeros(s - 1, len(space.pairs), len(space.gates)))

    def weights(self) -> list[nn.Parameter]:
        """Return the parameters other than the logits."""
        return [p for name, p in self.named_parameters() if not name.endswith("_logits")]

    def sample(self, temperature: float, generator: torch.Generator | None = None) -> Choices:
        """Draw one choice everywhere; gradients are those of the Gumbel-softmax (Jang et al., 2017), straight through."""
        return Choices(
            _draw(self.operator_logits, temperature, generator), _draw(self.gate_logits, temperature, generator)
        )

    def log_probability(self, choices: Choices) -> float:
        """Return how likely a sample is."""
        with torch.no_grad():
            found = (choices.operators * self.operator_logits.log_softmax(-1)).sum()
            found = found + (choices.gates * self.gate_logits.log_softmax(-1)).sum()
        return float(found)

    def best(self) -> Choices:
        """Return the likeliest choice everywhere."""
        with torch.no_grad():
            return Choices(_one_hot(self.operator_logits), _one_hot(self.gate_logits))

    def architecture(self, choices: Choices) -> Architecture:
        """Return a sample as an architecture."""
        operators, gates = (indices.tolist() for indices in choices.indices())
        return Architecture(
            tuple(tuple(tuple(self.space.operators[o] for o in b) for b in segment) for segment in operators),
            tuple(tuple(self.space.gates[g] for g in row) for row in gates),
            self.space.stem,
        )

    def forward(self, x: Tensor, choices: Choices) -> Tensor:
        """Run the network of a sample: what was not chosen is not computed.

        Parameters
        ----------
        x : Tensor (N, C, H, W)
        choices : Choices

        Returns
        -------
        Tensor (N, classes)
        """
        space = self.space
        operators, gates = choices.indices()
        maps = [self.stem(x)] * space.branches
        for segment in range(space.segments):
            if segment:
                maps = self._exchange(maps, segment - 1, choices.gates[segment - 1], gates[segment - 1])
            for branch in range(space.branches):
                y = maps[branch]
                for layer in range(space.layers):
                    chosen = int(operators[segment, branch, layer])
                    modules = self.layers[(segment * space.branches + branch) * space.layers + layer]
                    y = modules[chosen](y) * choices.operators[segment, branch, layer, chosen]  # type: ignore[index]
                maps[branch] = y
        logits: Tensor = self.head(torch.cat([y.mean((2, 3), keepdim=True) for y in maps], 1))
        return logits

    def _exchange(self, maps: list[Tensor], segment: int, weights: Tensor, chosen: Tensor) -> list[Tensor]:
        found = list(maps)
        for pair, (first, second) in enumerate(self.space.pairs):
            index = int(chosen[pair])
            gate = self.space.gates[index]
            if gate == "none":
                continue
            for branch, other in ((first, second), (second, first)):
                received = maps[other].mean((2, 3), keepdim=True) if gate == "pooled" else maps[other]
                added = self.gates[f"{segment}_{branch}_{other}_{gate}"](maps[branch], received)
                found[branch] = found[branch] + added * weights[pair, index]
        return found


def _one_hot(logits: Tensor) -> Tensor:
    return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    uniform = torch.rand(logits.shape, generator=generator).clamp(1e-9, 1 - 1e-7)
    soft = ((logits.log_softmax(-1) - (-uniform.log()).log()) / temperature).softmax(-1)
    return _one_hot(soft.detach()) + soft - soft.detach()


class LatencyModel:
    """Latency of choices, in seconds, with a gradient: ready times of branches, and a maximum where they meet.

    Each branch is ready when it is done; a gate waits for both of its branches, and costs a wait, a transfer and what it
    computes; the head waits for all. Where there are fewer workers than branches, it takes at least its work over the
    number of workers.

    Parameters
    ----------
    space : Space
    table : LatencyTable
    workers : int
        Teams of one thread each.
    summed : bool
        Add everything up instead, as along a chain.
    """

    def __init__(self, space: Space, table: LatencyTable, workers: int = 2, *, summed: bool = False) -> None:
        self.space, self.table, self.workers, self.summed = space, table, workers, summed
        together = min(workers, space.branches) > 1 and not summed

        def cost(key: str) -> float:
            return table.cost(key, 1, together)

        self.layer_costs = torch.tensor(
            [
                [[cost(space.layer_key(name, s, layer)) for name in space.operators] for layer in range(space.layers)]
                for s in range(space.segments)
            ]
        )  # (S, L, operators)
        self.gate_costs = torch.tensor(
            [
                [0.0 if gate == "none" else cost(space.gate_key(gate, s)) for gate in space.gates]
                for s in range(space.segments - 1)
            ]
        ).reshape(space.segments - 1, len(space.gates))
        self.means = [cost(space.means_key(s)) for s in range(space.segments)]
        self.ends = table.cost(space.stem_key()), table.cost(space.head_key())

    def waits(self, segment: int) -> Tensor:
        """Return the seconds until a branch has what another sends, by gate."""
        channels, height, width = self.space.shape(segment)
        sizes = {"none": 0, "pooled": 4 * channels}
        most = 4 * channels * height * width
        seconds = [
            0.0
            if gate == "none"
            else self.table.sync + self.table.transfer * self.space.batch * sizes.get(gate, most)
            for gate in self.space.gates
        ]
        return torch.tensor(seconds)

    def __call__(self, choices: Choices, smoothness: float = 0.0) -> Tensor:
        """Return the latency.

        Parameters
        ----------
        choices : Choices
        smoothness : float
            Seconds within which two ready times count as close: the maximum is ``s * log(sum exp(t / s))``, and the exact
            one for 0.

        Returns
        -------
        Tensor ()
        """
        space, table = self.space, self.table
        layers = (choices.operators * self.layer_costs[:, None]).sum((-1, -2)) + table.body  # (S, B)
        silent = space.gates.index("none") if "none" in space.gates else None
        stem, head = self.ends
        ready = [torch.tensor(stem + table.body + (table.sync if b else 0.0)) for b in range(space.branches)]
        work = sum(ready, torch.tensor(0.0)) if space.stem == "recomputed" else ready[0]
        for segment in range(space.segments):
            if segment:
                gates, costs = choices.gates[segment - 1], self.gate_costs[segment - 1]
                ready, added = self._meet(ready, segment - 1, gates, costs, silent, smoothness)
                work = work + added
            ready = [time + layers[segment, branch] for branch, time in enumerate(ready)]
            work = work + layers[segment].sum()
        last = self.means[-1]
        ready = [time + last + (table.sync if branch else 0.0) for branch, time in enumerate(ready)]
        work = work + last * space.branches
        if self.summed:
            return work + head + table.body
        total = _smooth_maximum(ready, smoothness)
        if self.workers < space.branches:
            total = _smooth_maximum([total, work / self.workers], smoothness)
        return total + head + table.body

    def _meet(
        self,
        ready: list[Tensor],
        segment: int,
        gates: Tensor,
        costs: Tensor,
        silent: int | None,
        smoothness: float,
    ) -> tuple[list[Tensor], Tensor]:
        """Return when each branch has passed its gates, and what all gates compute."""
        waits = self.waits(segment)
        means = torch.tensor([self.means[segment] if gate == "pooled" else 0.0 for gate in self.space.gates])
        sent = list(ready)
        added = torch.tensor(0.0)
        for pair, branches in enumerate(self.space.pairs):
            for branch in branches:  # means are computed once, however many ask for them; counted once a pair here
                sent[branch] = sent[branch] + (gates[pair] * means).sum()
            added = added + 2 * (gates[pair] * (costs + means)).sum()
        found = list(sent)
        for pair, (first, second) in enumerate(self.space.pairs):
            silence = gates[pair, silent] if silent is not None else torch.tensor(0.0)
            for branch, other in ((first, second), (second, first)):
                arrival = sent[other] + (gates[pair] * waits).sum()
                met = _smooth_maximum([found[branch], arrival], smoothness)
                found[branch] = silence * found[branch] + (1 - silence) * met
        for pair, branches in enumerate(self.space.pairs):
            for branch in branches:
                found[branch] = found[branch] + (gates[pair] * costs).sum()
        return found, added

    def architecture_choices(self, architecture: Architecture) -> Choices:
        """Return an architecture as choices without a gradient."""
        space = self.space

        def pick(names: tuple[str, ...]) -> Callable[[str], Tensor]:
            return lambda name: F.one_hot(torch.tensor(names.index(name)), len(names)).float()

        operator, gate = pick(space.operators), pick(space.gates)
        operators = [[torch.stack([operator(o) for o in b]) for b in segment] for segment in architecture.operators]
        rows = [torch.stack([gate(g) for g in row]) for row in architecture.gates if row]
        empty = torch.zeros(space.segments - 1, len(space.pairs), len(space.gates))
        return Choices(
            torch.stack([torch.stack(segment) for segment in operators]), torch.stack(rows) if rows else empty
        )

    def seconds(self, architecture: Architecture) -> float:
        """Return the latency of one architecture."""
        return float(self(self.architecture_choices(architecture)))


def _smooth_maximum(times: list[Tensor], smoothness: float) -> Tensor:
    stacked = torch.stack(times)
    return smoothness * (stacked / smoothness).logsumexp(0) if smoothness > 0 else stacked.amax(0)
