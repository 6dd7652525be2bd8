"""The plan of a growth: for each parameter of the larger model, how it is made from the smaller one's.

A pure function of shapes: it needs no torch and holds no weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypeAlias

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pycodesign.growth.indices import (
    MEAN,
    ONE,
    ZERO,
    Axis,
    Heads,
    Inexact,
    grow_cycle,
    grow_heads,
    grow_stream,
    join_axes,
    spread_blocks,
)
from pycodesign.growth.rules import Rule
from pycodesign.growth.spec import ATTENTION, Role, Spec

__all__ = ["Heads", "Inexact", "Plan", "Rule", "check_options", "make_plan"]

Shapes: TypeAlias = Mapping[str, Sequence[int]]

MODES = ("exact", "break_symmetry")


@dataclass(frozen=True)
class Plan:
    """What `make_plan` returns.

    Attributes
    ----------
    spec : Spec
    rules : list of Rule
        One for each new parameter.
    eps : mapping from str to float
        Name of a norm's module: what its eps is to be multiplied by.
    mode : str
    """

    spec: Spec
    rules: list[Rule]
    eps: Mapping[str, float]
    mode: str

    @property
    def eps_factor(self) -> float:
        """What the eps in the model's config is to be multiplied by."""
        return next(iter(self.eps.values()), 1.0)

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def to_table(self) -> Table:
        """One row for each parameter."""
        table = Table("parameter", "from", "shape", "how", box=SIMPLE_HEAD)
        for rule in self.rules:
            shapes = "x".join(map(str, rule.old_shape)), "x".join(map(str, rule.shape))
            text = shapes[0] if shapes[0] == shapes[1] else " -> ".join(shapes)
            table.add_row(rule.name, "" if rule.source == rule.name else rule.source, text, rule.what)
        return table

    def __str__(self) -> str:
        console = Console(width=200, color_system=None)
        with console.capture() as capture:
            console.print(self.to_table())
        return "\n".join(line.rstrip() for line in capture.get().strip("\n").splitlines())


def make_plan(
    source: Shapes,
    target: Shapes,
    spec: Spec,
    *,
    heads: tuple[Heads, Heads] | None = None,
    mode: str = "break_symmetry",
    tied: bool = False,
    noise: float = 0.1,
    seed: int = 0,
) -> Plan:
    """Plan how each parameter of a larger model is made from a smaller one's.

    Parameters
    ----------
    source, target : mapping from str to shape
        Parameters and buffers of the two models.
    spec : Spec
        What their axes mean.
    heads : pair of Heads, optional
        The attention's heads before and after; needed where there is one.
    mode : {"break_symmetry", "exact"}
        Whether copies get different weights, as far as the function allows, or the same.
    tied : bool
        The output layer shares the embedding's weight.
    noise : float
        How different, relative to the weights.
    seed : int
        Of that noise, which depends on nothing else but a parameter's name.

    Returns
    -------
    Plan

    Raises
    ------
    Inexact
        A `ValueError`, if the function could not be kept, or in mode ``"exact"`` not the training's trajectory: the
        message says what could.
    ValueError
        If a parameter has no rule or no counterpart, or a shape contradicts the spec.

    Examples
    --------
    >>> import numpy as np
    >>> from pycodesign.growth import Spec, linear, make_plan
    >>> spec = Spec("mlp", {"fc1": linear(None, "hidden"), "fc2": linear("hidden", None)})
    >>> source = {"fc1.weight": (4, 3), "fc1.bias": (4,), "fc2.weight": (2, 4)}
    >>> target = {"fc1.weight": (6, 3), "fc1.bias": (6,), "fc2.weight": (2, 6)}
    >>> plan = make_plan(source, target, spec)
    >>> [rule.what for rule in plan]
    ['writes hidden', 'writes hidden', 'reads hidden, each copy its share']
    >>> weight = plan.rules[2].apply(np.ones((2, 4)))  # the first two units have copies: two columns share a one
    >>> bool(np.allclose(weight[:, :2] + weight[:, 4:], 1)), bool((weight[:, 2:4] == 1).all())
    (True, True)
    """
    check_options(mode, noise, seed)
    origins = _map_names(source, target, spec)
    continued = {name: source[origin] for name, (origin, _) in origins.items() if origin in source}
    sizes = _find_sizes(continued, spec, tied), _find_sizes(target, spec, tied)
    rules = []
    silenced: dict[tuple[str, str], set[str]] = {}  # by new block: its number, its pattern
    for name, shape in target.items():
        origin, copied = origins[name]
        pattern, roles = find_roles(spec, name, tied)
        if origin not in source:
            if "*" in pattern and spec.split_block(name) is None:
                text = f"{name}: no block of {spec.name} can be an identity"
                raise Inexact(f"{text}; exact would be the source's depth")
            raise ValueError(f"target: expected the source's parameters, got {name} as well")
        old_shape = tuple(source[origin])
        divided = tied and pattern in spec.tied.values()
        growths = _grow_axes(name, roles, old_shape, tuple(shape), spec, heads, sizes, divided)
        if mode == "exact":
            _check_exact(name, roles, old_shape, tuple(shape), copied, growths)
        ending = name.rpartition(".")[2]
        silent = copied and pattern in spec.silence and ending in ("weight", "bias")
        if copied:
            block = next(block for block in spec.blocks if pattern.startswith(f"{block}."))
            silenced.setdefault((spec.resolve(block, name), block), set()).update([pattern] * silent)
        what = [_describe(roles[position], axis) for position, axis in growths.items()]
        if copied:
            what.insert(0, "zero in a new block" if silent else "copy for a new block")
        if roles and roles[0].kind == "gamma" and 0 in growths and (eps := _scale_eps(old_shape[0], shape[0])) != 1:
            what.append(f"eps x {eps:.4g}")
        factor = spec.resolve(spec.layers[pattern].factor, origin)
        weighted = factor in source and any((axis.index == MEAN).any() for axis in growths.values())
        rules.append(
            Rule(
                name,
                origin,
                old_shape,
                tuple(shape),
                growths,
                silent,
                factor if weighted else "",
                noise if mode == "break_symmetry" else 0.0,
                seed,
                "; ".join(what),
            )
        )
    for (name, block), patterns in silenced.items():
        wanted = {pattern for pattern in spec.silence if pattern.startswith(f"{block}.")}
        if not wanted or wanted - patterns:
            layer = spec.resolve(min(wanted - patterns), f"{name}.") if wanted else "what it adds"
            text = f"a new block {name} has no parameters that make {layer} zero"
            raise Inexact(f"target: {text}; exact would be the source's depth")
    missing = source.keys() - {rule.source for rule in rules}
    if missing:
        raise ValueError(f"target: expected all of the source's parameters, got none for {min(missing)}")
    return Plan(spec, rules, _find_eps(rules, spec), mode)


def check_options(mode: str, noise: float, seed: int) -> None:
    """Refuse what would fail, or make no numbers, while parameters are written."""
    if mode not in MODES:
        raise ValueError(f"mode: expected {' or '.join(map(repr, MODES))}, got {mode!r}")
    if not isinstance(noise, Real) or not 0 <= noise < math.inf:
        raise ValueError(f"noise: expected a finite number of at least 0, got {noise!r}")
    if not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed: expected an integer of at least 0, got {seed!r}")


def _map_names(source: Shapes, target: Shapes, spec: Spec) -> dict[str, tuple[str, bool]]:
    """Say for each new name which old one it continues, and whether it belongs to a new block."""
    counts: tuple[dict[str, int], dict[str, int]] = ({}, {})
    firsts = {}
    for count, names in zip(counts, (source, target), strict=True):
        for name in names:
            if split := spec.split_block(name):
                before, number, _, first = split
                count[before] = max(count.get(before, 0), number + 1)
                firsts[before] = first
    maps = {}
    for before, new in counts[1].items():
        old = counts[0].get(before, 0)
        if new < old:
            raise ValueError(f"target: expected at least {old} blocks {before}*, got {new}")
        maps[before] = spread_blocks(before + "*", old, new, firsts[before])
    origins = {}
    for name in target:
        split = spec.split_block(name)
        if split is None:
            origins[name] = (name, False)
        else:
            before, number, after, _ = split
            block, copied = maps[before][number]
            origins[name] = (f"{before}{block}{after}", copied)
    return origins


def find_roles(spec: Spec, name: str, tied: bool) -> tuple[str, tuple[Role, ...]]:
    """Return the pattern of a parameter's layer and the roles of its axes; a tied output layer is the embedding."""
    pattern, roles = spec.find(name)
    if tied and pattern in spec.tied and roles:  # the embedding's own weight
        roles = tuple(Role("write", role.space) if role.kind == "read" else role for role in roles)
    return pattern, roles


def _find_sizes(shapes: Shapes, spec: Spec, tied: bool) -> dict[str, int]:
    """Return the sizes of spaces that have an axis of their own, and one size everywhere."""
    found: dict[str, set[int]] = {}
    for name, shape in shapes.items():
        for size, role in zip(shape, find_roles(spec, name, tied)[1], strict=False):
            if role.space:
                found.setdefault(role.space, set()).add(size)
    return {space: min(sizes) for space, sizes in found.items() if len(sizes) == 1}


def _grow_axes(
    name: str,
    roles: Sequence[Role],
    old_shape: tuple[int, ...],
    shape: tuple[int, ...],
    spec: Spec,
    heads: tuple[Heads, Heads] | None,
    sizes: tuple[Mapping[str, int], Mapping[str, int]],
    tied: bool,
) -> dict[int, Axis]:
    if len(shape) != len(old_shape):
        raise ValueError(f"{name}: expected {len(old_shape)} axes as in the source, got shape {shape}")
    axes = {}
    for position, (old, new) in enumerate(zip(old_shape, shape, strict=True)):
        role = roles[position] if position < len(roles) else Role("keep")
        if role.kind == "keep":
            if old != new:
                raise ValueError(f"{name}: expected {old} in axis {position} as in the source, got {new}")
            continue
        try:
            axis = _grow_axis(role, old, new, spec, heads, sizes, tied)
        except Inexact as error:
            raise Inexact(f"{name}: {role.space} {error}") from None
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if len(axis.index) != new:
            raise ValueError(f"{name}: expected {len(axis.index)} in axis {position}, got {new}")
        if not axis.identity:
            axes[position] = axis
    return axes


def _grow_axis(
    role: Role,
    old: int,
    new: int,
    spec: Spec,
    heads: tuple[Heads, Heads] | None,
    sizes: tuple[Mapping[str, int], Mapping[str, int]],
    tied: bool,
) -> Axis:
    if new < old:
        raise ValueError(f"expected at least {old} features of {role.space}, got {new}")
    spaces = role.space.split("+")
    if heads is None and set(spaces) & {*ATTENTION}:
        raise ValueError("expected the number of heads, got None")
    (olds, old_dim), (news, new_dim) = (
        _split_spaces(spaces, size, each, known)
        for size, each, known in zip((old, new), heads or (None, None), sizes, strict=True)
    )
    parts = []
    for space, before, after in zip(spaces, olds, news, strict=True):
        kind = spec.spaces.get(space, "cycle")
        if space in ATTENTION and heads is not None:
            parts.append(grow_heads(space, (heads[0], old_dim), (heads[1], new_dim), spec.rotary))
        elif after < before:
            raise ValueError(f"expected at least {before} features of {space}, got {after}")
        elif kind == "cycle":
            parts.append(grow_cycle(role.kind, before, after))
        else:
            parts.append(grow_stream(role.kind, kind, before, after, tied))
    if len(parts) == 1:
        return parts[0]
    axis = join_axes(parts, olds)
    if (axis.index < 0).any():
        raise Inexact(f"{old} -> {new}, of spaces one after the other; exact would be integer multiples")
    return axis


def _split_spaces(spaces: list[str], size: int, heads: Heads | None, known: Mapping[str, int]) -> tuple[list[int], int]:
    """Return the sizes of spaces that lie one after the other, and of one head.

    Spaces of one name are equally large, queries, keys and values follow from the heads, others from the axes that they
    have alone: all, or all but one of a name.
    """
    counts = {"k": heads.kv, "v": heads.kv, "q": heads.q, "o": heads.q} if heads is not None else {}
    others = {space for space in spaces if space not in ATTENTION}
    total = sum(counts[space] for space in spaces if space in ATTENTION)
    unknown = {space for space in others if space not in known} if len({*spaces}) > 1 or total else others
    if len(unknown) + (total > 0) > 1:
        raise ValueError(f"expected axes that show the size of {min(unknown)}, apart from {'+'.join(spaces)}, got none")
    rest = size - sum(known[space] for space in spaces if space in others - unknown)
    of = total or sum(space in unknown for space in spaces)
    each, left = divmod(rest, of) if of else (0, rest)
    if left or each < 0 or (of and each == 0 and size):
        text = f"a multiple of {of} {'heads' if total else 'parts'}" if of else f"{size - rest} features"
        raise ValueError(f"expected {text}{f' beside {size - rest}' if of and size != rest else ''}, got {size}")
    dim = each if total else 0
    return [counts[s] * dim if s in ATTENTION else each if s in unknown else known[s] for s in spaces], dim


def _check_exact(
    name: str,
    roles: Sequence[Role],
    old_shape: tuple[int, ...],
    shape: tuple[int, ...],
    copied: bool,
    axes: Mapping[int, Axis],
) -> None:
    if copied:
        raise Inexact(f"mode: expected the source's depth for 'exact', got a new block with {name}")
    for position, axis in axes.items():
        if (axis.index < 0).any() or (axis.scale != axis.scale[0]).any() or (axis.gradient != axis.gradient[0]).any():
            old = old_shape[position]
            copies = np.bincount(axis.index[axis.index >= 0])
            even = (axis.index >= 0).all() and (copies == copies[0]).all()
            if even and "k" in roles[position].space.split("+")[1:]:
                text = "heads of the same dimensions for 'exact', or a layer of its own for keys"
                raise Inexact(f"mode: expected {text}, got {name} with {old} -> {shape[position]} in axis {position}")
            text = f"{name} with {old} -> {shape[position]} in axis {position}, unevenly copied"
            raise Inexact(f"mode: expected integer multiples of width and heads for 'exact', got {text}")


def _find_eps(rules: list[Rule], spec: Spec) -> dict[str, float]:
    eps = {}
    for rule in rules:
        _, roles = spec.find(rule.name)
        if roles and roles[0].kind == "gamma" and 0 in rule.axes:
            eps[rule.name.rpartition(".")[0]] = _scale_eps(rule.old_shape[0], rule.shape[0])
    return eps


def _scale_eps(old: int, new: int) -> float:
    """Return by how much the variance of a stream falls when it gets features in which a norm finds nothing."""
    return new // old * old / new


def _describe(role: Role, axis: Axis) -> str:
    verbs = {
        "write": "writes",
        "map": "maps",
        "read": "reads",
        "gamma": "scales",
        "beta": "shifts",
        "factor": "multiplies",
    }
    parts = [f"{verbs[role.kind]} {role.space}"]
    for code, what in ((MEAN, "means"), (ZERO, "zeros"), (ONE, "ones")):
        if count := int((axis.index == code).sum()):
            parts.append(f"{count} {what}")
    if (axis.scale != 1).any():
        uniform = (axis.scale == axis.scale[0]).all()
        parts.append(f"x {axis.scale[0]:.4g}" if uniform else "each copy its share")
    return ", ".join(parts)
