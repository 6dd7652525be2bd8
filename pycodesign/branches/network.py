"""Torch networks that are made of bodies: trained as one module, run as a `Graph`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

try:
    import torch
except ImportError as error:
    raise ImportError("pycodesign.branches' networks need torch: `pip install 'pycodesign[torch]'`") from error

from torch import Tensor, nn

from pycodesign.branches.graph import Body, Graph, Slice, Value

__all__ = ["Network", "Part"]


@dataclass(frozen=True)
class Part:
    """What becomes a body.

    Parameters
    ----------
    name : str
    reads : tuple of str
        Names of values, the module's arguments.
    writes : tuple of (str, int)
        Value, and place in the concatenation that it is, for each result of the module.
    branch, segment, costs, may_recompute
        As in `Body`.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[tuple[str, int], ...]
    branch: int = -1
    segment: int = -1
    costs: tuple[str, ...] = ()
    may_recompute: bool = False

    @property
    def key(self) -> str:
        """The name of its module in `Network.bodies`."""
        return self.name.replace(".", "_")


@dataclass
class _Concatenation:
    pieces: dict[int, Tensor] = field(default_factory=dict)

    def whole(self) -> Tensor:
        pieces = [self.pieces[place] for place in sorted(self.pieces)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


class Network(nn.Module):
    """A network of parts, each a module: the input is the value ``"x"``, the result ``"y"``.

    Parameters
    ----------
    parts : sequence of (Part, torch.nn.Module)
        In an order in which they can run.
    shape : tuple of int
        (N, C, H, W) of the input that `to_graph` takes by default, for which the parts' costs hold.

    Raises
    ------
    ValueError
        For parts whose names are alike, up to ``"."`` and ``"_"``, or those of attributes of `torch.nn.ModuleDict`.

    Attributes
    ----------
    found : Found or None
        How `search` found it.
    """

    def __init__(self, parts: Sequence[tuple[Part, nn.Module]], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.parts = [part for part, _ in parts]
        self.shape = shape
        self.found: Any = None
        self.bodies = nn.ModuleDict()
        for part, module in parts:
            if hasattr(self.bodies, part.key) or not part.key:
                wanted = "names that differ in more than '.' and '_', and that ModuleDict has no attribute of"
                raise ValueError(f"parts: expected {wanted}, got {part.name!r}")
            self.bodies[part.key] = module

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)["y"].whole()

    def _run(self, x: Tensor) -> dict[str, _Concatenation]:
        values = {"x": _Concatenation({0: x})}
        for part in self.parts:
            results = self.bodies[part.key](*[values[name].whole() for name in part.reads])
            results = (results,) if isinstance(results, Tensor) else results
            for (name, place), result in zip(part.writes, results, strict=True):
                values.setdefault(name, _Concatenation()).pieces[place] = result
        return values

    def to_graph(
        self,
        shape: tuple[int, ...] | None = None,
        *,
        convert: Callable[[nn.Module], nn.Module] | None = None,
        native: bool | None = None,
    ) -> Graph:
        """Return the graph of this network for inputs of one shape; it is not changed by further training.

        Parameters
        ----------
        shape : tuple of int, optional
            (N, C, H, W); by default `shape`. Bodies for another one are known to a latency table by their own names.
        convert : callable, optional
            Makes of each part's module, in evaluation mode, the one that runs: `pycodesign.nn.convert`, for example.
        native : bool, optional
            Make native chains of all parts that can be, and simplify the others, as a latency table expects it; by
            default of networks of a `Space`, unless there is `convert`.
        """
        shape = tuple(shape or self.shape)
        if native is None:
            native = convert is None and any(part.costs for part in self.parts)
        net = copy.deepcopy(self).eval()
        with torch.no_grad():
            found = net._run(torch.zeros(shape, dtype=torch.float32))
        values, slices = {}, {}
        for name, concatenation in found.items():
            begin = 0
            for place in sorted(concatenation.pieces):
                piece = concatenation.pieces[place]
                slices[name, place] = Slice(name, begin, begin := begin + piece.shape[1])
            whole = concatenation.whole()
            values[name] = Value(tuple(whole.shape), str(whole.dtype).removeprefix("torch."))
        bodies = []
        for part in net.parts:
            module = net.bodies[part.key].requires_grad_(False)
            bodies.append(
                Body(
                    part.name,
                    module if convert is None else convert(module),
                    tuple(Slice(name) for name in part.reads),
                    tuple(slices[written] for written in part.writes),
                    branch=part.branch,
                    segment=part.segment,
                    costs=part.costs if shape == tuple(self.shape) else (),
                    may_recompute=part.may_recompute,
                )
            )
        if native:
            from pycodesign.branches.lowering import lower_body

            bodies = [lower_body(body, values) for body in bodies]
        return Graph(values, bodies, ["x"], ["y"])
