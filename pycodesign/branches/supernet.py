"""All networks of a space at once: shared weights, a distribution over choices, and their latency by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycodesign.branches.network import Network
from pycodesign.branches.operators import Head, Stem, build_gate, build_operator
from pycodesign.branches.space import BODY, NATIVE_GATES, NATIVE_OPERATORS, Architecture, Space
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
                    for gate in (gate for gate in space.gates if gate != "none"):
                        name = f"{segment}_{branch}_{other}_{gate}"
                        self.gates[name] = build_gate(gate, space.shape(segment)[0])
        self.head = Head(b * space.shape(s - 1)[0], space.classes)
        self.operator_logits = nn.Parameter(torch.zeros(s, b, n, len(space.operators)))
        self.gate_logits = nn.Parameter(torch.zeros(s - 1, len(space.pairs), len(space.gates)))

    def weights(self) -> list[nn.Parameter]:
        """Return the parameters other than the logits."""
        return [p for name, p in self.named_parameters() if not name.endswith("_logits")]

    def sample(self, temperature: float, generator: torch.Generator | None = None) -> Choices:
        """Draw one choice everywhere; gradients are those of the Gumbel-softmax, straight through."""
        return Choices(
            _draw(self.operator_logits, temperature, generator), _draw(self.gate_logits, temperature, generator)
        )

    def expected(self) -> Choices:
        """Return how likely each choice is."""
        return Choices(self.operator_logits.softmax(-1), self.gate_logits.softmax(-1))

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

    def hand_on(self, net: Network, architecture: Architecture) -> None:
        """Copy the weights of a network's layers and gates to it."""
        space = self.space
        for part in net.parts:
            module: Any = net.bodies[part.key]
            if part.segment < 0:
                module.load_state_dict((self.head if part.name == "head" else self.stem).state_dict())
                continue
            for layer, name in enumerate(architecture.operators[part.segment][part.branch]):
                choices: Any = self.layers[(part.segment * space.branches + part.branch) * space.layers + layer]
                module.layers[layer].load_state_dict(choices[space.operators.index(name)].state_dict())
            sources = space.sources(architecture, part.segment, part.branch)
            for gate, (other, name) in zip(module.gates, sources, strict=True):
                own = self.gates[f"{part.segment - 1}_{part.branch}_{other}_{name}"]
                gate.load_state_dict(own.state_dict())

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

    Each branch is ready when it is done; a gate waits for both of its branches, and costs a wait, a transfer and what
    it computes; the head waits for all. Where there are fewer workers than branches, it takes at least its work over
    the number of workers.

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
        self.together = min(workers, space.branches) > 1 and not summed
        self.worlds = (True,) if space.all_native else (True, False)
        segments, operators = range(space.segments), space.operators
        self.firsts, self.others, self.gate_costs, self.means = {}, {}, {}, {}
        for native in self.worlds:
            key: dict[str, Any] = {"native": native}
            rows = [[self._cost(space.layer_key(o, s, 0, **key), o, native) for o in operators] for s in segments]
            self.firsts[native] = torch.tensor(rows)  # (S, operators)
            cubes = [
                [
                    [
                        [self._cost(space.layer_key(o, s, n, b, **key), o, native, b) for o in operators]
                        for b in operators
                    ]
                    for n in range(1, space.layers)
                ]
                for s in segments
            ]  # (S, L - 1, operators before, operators)
            self.others[native] = torch.tensor(cubes).reshape(space.segments, -1, len(operators), len(operators))
            gates = [
                [0.0 if g == "none" else self._cost(space.gate_key(g, s, **key), g, native) for g in space.gates]
                for s in segments[:-1]
            ]
            self.gate_costs[native] = torch.tensor(gates).reshape(-1, len(space.gates))
            self.means[native] = [self._cost(space.means_key(s, **key)) for s in segments]
        self.body = {native: self._cost(BODY if native else f"{BODY}@torch") for native in self.worlds}
        self.ends = (table.cost(BODY) + table.cost(space.stem_key()), table.cost(BODY) + table.cost(space.head_key()))
        self.run = table.run_cost(1, self.together)
        self.is_native = torch.tensor([float(name in NATIVE_OPERATORS) for name in operators])
        self.is_native_gate = torch.tensor([float(name in NATIVE_GATES) for name in space.gates])

    def _cost(self, key: str, name: str = "", native: bool = False, before: str = "") -> float:
        """Look up a cost; 0 for what a native chain cannot do, which then is no native one."""
        known = NATIVE_OPERATORS | NATIVE_GATES | {""}
        if native and not (name in known and before in known):
            return 0.0
        return self.table.cost(key, 1, self.together)

    def waits(self, segment: int) -> Tensor:
        """Return the seconds until a branch has what another sends, by gate."""
        channels, height, width = self.space.shape(segment)
        sizes = {"none": 0, "pooled": 4 * channels}
        most = 4 * channels * height * width
        seconds = [
            0.0 if gate == "none" else self.table.sync + self.table.transfer * self.space.batch * sizes.get(gate, most)
            for gate in self.space.gates
        ]
        return torch.tensor(seconds)

    def __call__(self, choices: Choices, smoothness: float = 0.0) -> Tensor:
        """Return the latency.

        Parameters
        ----------
        choices : Choices
        smoothness : float
            Seconds within which two ready times count as close: the maximum is ``s * log(sum exp(t / s))``, and the
            exact one for 0.

        Returns
        -------
        Tensor ()
        """
        space, sync = self.space, self.table.sync
        silent = space.gates.index("none") if "none" in space.gates else None
        waits = space.stem == "shared"  # all but the first branch, for the stem
        ready = [torch.tensor(self.ends[0] + (sync if b and waits else 0.0)) for b in range(space.branches)]
        work = ready[0] if waits else sum(ready, torch.tensor(0.0))
        for segment in range(space.segments):
            gates = choices.gates[segment - 1] if segment else None
            native = [self._find_native(choices.operators[segment, b], gates, b) for b in range(space.branches)]
            layers = [
                self._sum_layers(choices.operators[segment, b], segment, native[b]) for b in range(space.branches)
            ]
            if gates is not None:
                ready, added = self._meet(ready, segment - 1, gates, native, silent, smoothness)
                work = work + added
            ready = [time + seconds for time, seconds in zip(ready, layers, strict=True)]
            if segment < space.segments - 1:
                sends = choices.gates[segment][:, [g == "pooled" for g in space.gates]].sum(-1)
                for branch in range(space.branches):
                    asked = [p for p, pair in enumerate(space.pairs) if branch in pair]
                    silence = torch.stack([1 - sends[p] for p in asked]).prod() if asked else torch.tensor(1.0)
                    means = (1 - silence) * self._mix(self.means, native[branch], segment)
                    ready[branch], work = ready[branch] + means, work + means
            else:
                last = [self._mix(self.means, share, segment) for share in native]
                ready = [time + means for time, means in zip(ready, last, strict=True)]
                work = work + sum(last, torch.tensor(0.0))
            work = work + sum(layers, torch.tensor(0.0))
        if self.summed:
            return work + self.ends[1] + self.run
        total = _smooth_maximum([time + (sync if b else 0.0) for b, time in enumerate(ready)], smoothness)
        if self.workers < space.branches:
            total = _smooth_maximum([total, work / self.workers], smoothness)
        return total + self.ends[1] + self.run

    def _find_native(self, operators: Tensor, gates: Tensor | None, branch: int) -> Tensor:
        """Return how much of a body is native: 1 or 0 of a sample."""
        share = (operators * self.is_native).sum(-1).prod()
        for pair, branches in enumerate(self.space.pairs) if gates is not None else ():
            if branch in branches:
                share = share * (gates[pair] * self.is_native_gate).sum()  # type: ignore[index]
        return share

    def _mix(self, costs: Mapping[bool, list[Any] | Tensor], native: Tensor, segment: int) -> Tensor:
        """Return native costs and those of torch, each by its share."""
        if False not in costs:
            return torch.as_tensor(costs[True][segment])
        return native * costs[True][segment] + (1 - native) * costs[False][segment]

    def _sum_layers(self, operators: Tensor, segment: int, native: Tensor) -> Tensor:
        """Return the seconds of a body's layers, each behind the one before it."""
        total = torch.tensor(0.0)
        for world in self.worlds:
            seconds = self.body[world] + (operators[0] * self.firsts[world][segment]).sum()
            for layer in range(1, self.space.layers):
                seconds = seconds + operators[layer - 1] @ self.others[world][segment, layer - 1] @ operators[layer]
            total = total + (native if world else 1 - native) * seconds
        return total

    def _meet(
        self,
        ready: list[Tensor],
        segment: int,
        gates: Tensor,
        native: list[Tensor],
        silent: int | None,
        smoothness: float,
    ) -> tuple[list[Tensor], Tensor]:
        """Return when each branch has passed its gates, and what all gates compute."""
        waits = self.waits(segment)
        found, added = list(ready), torch.tensor(0.0)
        for pair, (first, second) in enumerate(self.space.pairs):
            silence = gates[pair, silent] if silent is not None else torch.tensor(0.0)
            for branch, other in ((first, second), (second, first)):
                arrival = ready[other] + (gates[pair] * waits).sum()
                met = _smooth_maximum([found[branch], arrival], smoothness)
                found[branch] = silence * found[branch] + (1 - silence) * met
        for pair, branches in enumerate(self.space.pairs):
            for branch in branches:
                cost = (gates[pair] * self._mix(self.gate_costs, native[branch], segment)).sum()
                found[branch], added = found[branch] + cost, added + cost
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
