"""The search space: which operators, gates and stem a network of branches may have, and one choice of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

from pycodesign._arguments import to_integer

__all__ = ["Architecture", "Space"]

OPERATORS = (
    *("conv3x3", "conv1x1", "separable", "skip", "pool"),
    *("conv3x3:ternary", "conv1x1:ternary", "separable:ternary"),
)
GATES = ("none", "add", "concatenate", "pooled")
STEMS = ("shared", "recomputed")
NATIVE_OPERATORS = frozenset(name for name in OPERATORS if name.endswith(":ternary")) | {"skip", "pool"}
NATIVE_GATES = frozenset({"none", "add", "concatenate"})
BODY = "body"  # what calling a body takes, in a latency table
Shape = tuple[int, int, int]  # C, H, W


@dataclass(frozen=True)
class Space:
    """Networks of B branches, S segments, and L layers in each segment of each branch.

    Between two segments each pair of branches has a gate: ``"none"``, ``"add"`` (of each other's maps),
    ``"concatenate"`` (a 1x1 convolution of both), ``"pooled"`` (of each other's means). Each segment but the first
    halves the side of the maps and doubles the channels. At the end each branch writes the means of its channels into
    its slice of what the head reads.

    Parameters
    ----------
    branches : int
        B, 1 to 4.
    segments, layers : int
        S and L.
    width : int
        Channels of the stem and of the first segment.
    channels, size, batch, classes : int
        The input is (batch, channels, size, size), the result (batch, classes).
    operators, gates : tuple of str
        What a layer and a pair may have. Behind ``":ternary"`` are layers whose weights take three values.
    stem : {"shared", "recomputed"}
        Whether all branches wait for one stem, or each has its own copy.

    Examples
    --------
    >>> from pycodesign.branches import Space
    >>> space = Space(branches=2, segments=2, layers=1, width=8)
    >>> architecture = space.sample(seed=0)
    >>> net = space.build(architecture)
    >>> net.to_graph().outputs
    ('y',)
    """

    branches: int = 2
    segments: int = 3
    layers: int = 2
    width: int = 16
    channels: int = 1
    size: int = 28
    batch: int = 1
    classes: int = 10
    operators: tuple[str, ...] = OPERATORS
    gates: tuple[str, ...] = GATES
    stem: str = "shared"

    def __post_init__(self) -> None:
        for name in ("branches", "segments", "layers", "width", "channels", "size", "batch", "classes"):
            to_integer(name, getattr(self, name), 1)
        if self.branches > 4:
            raise ValueError(f"branches: expected 1 to 4, got {self.branches}")
        for name, known in (("operators", OPERATORS), ("gates", GATES)):
            chosen = getattr(self, name)
            if not isinstance(chosen, Iterable) or isinstance(chosen, str):
                raise TypeError(f"{name}: expected a tuple of str, got {type(chosen).__name__}")
            chosen = tuple(chosen)
            object.__setattr__(self, name, chosen)
            unknown = [choice for choice in chosen if choice not in known]
            if unknown or not chosen or len(set(chosen)) < len(chosen):
                got = repr(unknown[0]) if unknown else chosen
                raise ValueError(f"{name}: expected different ones of {', '.join(known)}, got {got}")
        if self.stem not in STEMS:
            raise ValueError(f"stem: expected 'shared' or 'recomputed', got {self.stem!r}")

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Pairs of branches that a gate may join."""
        return tuple(combinations(range(self.branches), 2))

    def input_shape(self) -> tuple[int, int, int, int]:
        """Return (N, C, H, W)."""
        return self.batch, self.channels, self.size, self.size

    def shape(self, segment: int) -> Shape:
        """Return (C, H, W) of what a segment makes; -1: the stem."""
        side = (self.size + 1) // 2
        for _ in range(segment):
            side = (side + 1) // 2
        return self.width << max(segment, 0), side, side

    def layer_shape(self, segment: int, layer: int) -> tuple[Shape, int, int]:
        """Return a layer's input (C, H, W), its output channels, and its stride."""
        shrinks = segment > 0 and layer == 0
        return self.shape(segment - 1 if shrinks else segment), self.shape(segment)[0], 2 if shrinks else 1

    def layer_key(
        self, operator: str, segment: int, layer: int, before: str | None = None, *, native: bool = True
    ) -> str:
        """Name a layer in a latency table: what it adds to a body behind another layer, or as the first."""
        (c, h, w), outputs, stride = self.layer_shape(segment, layer)
        behind = f"<{before}" if before else ""
        return f"{operator}/{self.batch}x{c}x{h}x{w}/{outputs}/{stride}{behind}" + _world(native)

    def gate_key(self, gate: str, segment: int, *, native: bool = True) -> str:
        """Name what a branch does with what came through a gate behind a segment."""
        return f"gate:{gate}/{self._map(segment)}" + _world(native)

    def means_key(self, segment: int, *, native: bool = True) -> str:
        """Name the means of a branch's channels, beside its map or instead of it."""
        return f"means/{self._map(segment)}" + _world(native)

    def stem_key(self) -> str:
        return f"stem/{'x'.join(map(str, self.input_shape()))}/{self.width}"

    def head_key(self) -> str:
        return f"head/{self.batch}x{self.branches * self.shape(self.segments - 1)[0]}/{self.classes}"

    def _map(self, segment: int) -> str:
        return "x".join(map(str, (self.batch, *self.shape(segment))))

    @property
    def all_native(self) -> bool:
        """Whether every body of every network can be a native chain."""
        return set(self.operators) <= NATIVE_OPERATORS and set(self.gates) <= NATIVE_GATES

    def is_native(self, architecture: Architecture, segment: int, branch: int) -> bool:
        """Whether a segment of a branch can be a native chain."""
        gates = {gate for _, gate in self.sources(architecture, segment, branch)}
        return set(architecture.operators[segment][branch]) <= NATIVE_OPERATORS and gates <= NATIVE_GATES

    def body_keys(self, architecture: Architecture, segment: int, branch: int) -> tuple[str, ...]:
        """Name everything that a segment of a branch does."""
        native = self.is_native(architecture, segment, branch)
        keys = [BODY + _world(native)]
        for _, gate in self.sources(architecture, segment, branch):
            keys.append(self.gate_key(gate, segment - 1, native=native))
        names = architecture.operators[segment][branch]
        for layer, (before, name) in enumerate(zip([None, *names], names, strict=False)):
            keys.append(self.layer_key(name, segment, layer, before, native=native))
        if segment == self.segments - 1 or self.sends_means(architecture, segment, branch):
            keys.append(self.means_key(segment, native=native))
        return tuple(keys)

    def sends_means(self, architecture: Architecture, segment: int, branch: int) -> bool:
        """Whether another branch needs the means of what a segment makes."""
        if segment == self.segments - 1:
            return False
        return any(gate == "pooled" and branch in pair for pair, gate in self._joined(architecture, segment))

    def sources(self, architecture: Architecture, segment: int, branch: int) -> list[tuple[int, str]]:
        """Return the branches that a segment listens to, each with its gate."""
        if not segment:
            return []
        joined = self._joined(architecture, segment - 1)
        return [(sum(pair) - branch, gate) for pair, gate in joined if branch in pair]

    def _joined(self, architecture: Architecture, segment: int) -> list[tuple[tuple[int, int], str]]:
        gates = zip(self.pairs, architecture.gates[segment], strict=True)
        return [(pair, gate) for pair, gate in gates if gate != "none"]

    def sample(self, seed: int | random.Random = 0) -> Architecture:
        """Draw an architecture, each choice alike.

        Parameters
        ----------
        seed : int or random.Random
        """
        rng = seed if isinstance(seed, random.Random) else random.Random(seed)
        operators = tuple(
            tuple(tuple(rng.choice(self.operators) for _ in range(self.layers)) for _ in range(self.branches))
            for _ in range(self.segments)
        )
        gates = tuple(tuple(rng.choice(self.gates) for _ in self.pairs) for _ in range(self.segments - 1))
        return Architecture(operators, gates, self.stem)

    def change(self, architecture: Architecture, seed: int | random.Random = 0) -> Architecture:
        """Draw an operator anew, or a gate, or two of them.

        Parameters
        ----------
        architecture : Architecture
        seed : int or random.Random
        """
        rng = seed if isinstance(seed, random.Random) else random.Random(seed)
        operators = [[list(branch) for branch in segment] for segment in architecture.operators]
        gates = [list(row) for row in architecture.gates]
        places: list[tuple[list[str], int, tuple[str, ...]]] = [
            (branch, i, self.operators) for segment in operators for branch in segment for i in range(len(branch))
        ]
        places += [(row, i, self.gates) for row in gates for i in range(len(row))]
        for names, i, known in rng.sample(places, min(rng.randint(1, 2), len(places))):
            names[i] = rng.choice(known)
        return Architecture(
            tuple(tuple(tuple(branch) for branch in segment) for segment in operators),
            tuple(tuple(row) for row in gates),
            architecture.stem,
        )

    def check(self, architecture: Architecture) -> None:
        """Raise unless an architecture is one of this space.

        Raises
        ------
        TypeError, ValueError
            Saying what differs.
        """
        if not isinstance(architecture, Architecture):
            raise TypeError(f"architecture: expected an Architecture, got {type(architecture).__name__}")
        sizes = [[len(branch) for branch in segment] for segment in architecture.operators]
        if sizes != [[self.layers] * self.branches] * self.segments:
            wanted = f"{self.segments} segments of {self.branches} branches of {self.layers} layers"
            raise ValueError(f"architecture: expected {wanted}, got {sizes}")
        if [len(gates) for gates in architecture.gates] != [len(self.pairs)] * (self.segments - 1):
            wanted = f"{self.segments - 1} times {len(self.pairs)} gates"
            raise ValueError(f"architecture: expected {wanted}, got {architecture.gates}")
        for name in (name for segment in architecture.operators for branch in segment for name in branch):
            if name not in self.operators:
                raise ValueError(f"architecture: expected operators {', '.join(self.operators)}, got {name!r}")
        for name in (name for gates in architecture.gates for name in gates):
            if name not in self.gates:
                raise ValueError(f"architecture: expected gates {', '.join(self.gates)}, got {name!r}")
        if architecture.stem != self.stem:
            raise ValueError(f"architecture: expected a {self.stem} stem, got {architecture.stem!r}")

    def build(self, architecture: Architecture, seed: int = 0) -> Any:
        """Build the network of an architecture.

        Parameters
        ----------
        architecture : Architecture
        seed : int
            Of the weights.

        Returns
        -------
        Network
        """
        from pycodesign.branches.build import build

        return build(self, architecture, seed)


def _world(native: bool) -> str:
    return "" if native else "@torch"


@dataclass(frozen=True)
class Architecture:
    """One network of a `Space`.

    Parameters
    ----------
    operators : tuple
        Names, by segment, branch and layer.
    gates : tuple
        Names, by segment but the last, and pair.
    stem : {"shared", "recomputed"}
    """

    operators: tuple[tuple[tuple[str, ...], ...], ...]
    gates: tuple[tuple[str, ...], ...]
    stem: str = "shared"

    def to_json(self) -> str:
        """Return it as one line of JSON."""
        return json.dumps({field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """Read what `to_json` wrote.

        Raises
        ------
        TypeError, ValueError
            If the text is something else.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected a str, got {type(text).__name__}")
        try:
            found = json.loads(text)
            operators = tuple(tuple(tuple(map(str, b)) for b in segment) for segment in found["operators"])
            return cls(operators, tuple(tuple(map(str, g)) for g in found["gates"]), str(found["stem"]))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"text: expected an architecture in JSON, got {text[:60]!r} ({error})") from None
