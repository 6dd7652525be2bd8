"""Index maps: which old feature each new one continues, and how much of it its readers take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Index: TypeAlias = NDArray[np.int64]
Scale: TypeAlias = NDArray[np.float64]

ZERO, MEAN, ONE = -1, -2, -3  # in place of an index: what a new feature holds instead of a copy


@dataclass(frozen=True)
class Axis:
    """How one axis of a parameter grows.

    Attributes
    ----------
    index : (N,) int64
        Old position for each new one, or `ZERO`, `MEAN`, `ONE`.
    scale : (N,) float64
        Factor of the values.
    gradient : (N,) float64
        Factor of the gradients, by which optimizer states go.
    groups : (N,) int64
        Positions of one group matter by the sum of their values alone; -1 stands for no group.
    """

    index: Index
    scale: Scale
    gradient: Scale
    groups: Index

    @property
    def identity(self) -> bool:
        return bool((self.index == np.arange(len(self.index))).all() and (self.scale == 1).all())

    @property
    def has_groups(self) -> bool:
        """Whether a group has more than one position."""
        groups = self.groups[self.groups >= 0]
        return len(np.unique(groups)) < len(groups)


@dataclass(frozen=True)
class Heads:
    """Query heads, key and value heads of an attention."""

    q: int
    kv: int


class Inexact(ValueError):
    """A change that cannot keep the function."""


def join_axes(axes: list[Axis], sizes: list[int]) -> Axis:
    """Put axes one after the other: segments of a fused projection."""
    starts = np.cumsum([0, *sizes[:-1]])
    index, groups = (
        np.concatenate([np.where(old < 0, old, old + start) for old, start in zip(part, starts, strict=True)])
        for part in ([axis.index for axis in axes], [axis.groups for axis in axes])
    )
    scale, gradient = (np.concatenate([getattr(axis, name) for axis in axes]) for name in ("scale", "gradient"))
    return Axis(index, scale, gradient, groups)


def keep_axis(size: int) -> Axis:
    return Axis(np.arange(size), np.ones(size), np.ones(size), np.full(size, -1))


def grow_cycle(role: str, old: int, new: int) -> Axis:
    """Copy features in turn; each reader of one divides its weight among the copies."""
    index = np.arange(new) % old
    share = 1 / np.bincount(index)[index]
    ones = np.ones(new)
    return Axis(index, share, ones, index) if role == "read" else Axis(index, ones, share, np.full(new, -1))


def grow_stream(role: str, kind: str, old: int, new: int, tied: bool) -> Axis:
    """Grow a stream that norms read: whole copies, then features in which a norm finds nothing.

    The variance falls by the share of the copies, `eta`, which gamma makes up for. A tied output layer reads with
    the embedding's weights, which are not divided among copies: there the norm before it is.
    """
    copies, padding = divmod(new, old)
    if padding and (kind == "repeat" or (kind == "mean" and role == "map")):
        below, above = copies * old, (copies + 1) * old
        raise Inexact(f"{old} -> {new}; exact would be {f'{below} or ' if copies > 1 else ''}{above}")
    repeated = np.arange(new) % old
    padded = np.where(np.arange(new) < copies * old, repeated, {"mean": MEAN, "zero": ZERO, "repeat": 0}[kind])
    ones, alone = np.ones(new), np.full(new, -1)
    share = ones / copies
    if role in ("write", "map"):
        return Axis(padded, ones, share, alone)
    if role == "read":
        return Axis(repeated, share, ones, np.where(padded == repeated, repeated, -1))
    if role == "factor":
        return Axis(np.where(padded == repeated, repeated, ONE), ones, share, alone)
    eta = copies * old / new
    scale = (math.sqrt(eta) if role == "gamma" else 1.0) * (share if tied else ones)
    gradient = (1 / math.sqrt(eta) if role == "gamma" else 1.0) * (ones if tied else share)
    index = repeated if role == "gamma" else np.where(padded < 0, ZERO, padded)
    return Axis(index, scale, gradient, alone)


def grow_heads(space: str, old: tuple[Heads, int], new: tuple[Heads, int], rotary: bool) -> Axis:
    """Grow an attention by copies of whole groups of heads, and heads by copies of their dimensions.

    `old` and `new` hold the heads and the dimensions of one. Copies of a query's and a key's dimension would count
    twice in their product: keys divide it among copies, and make up for the softmax's other scale.
    """
    (old_heads, old_dim), (new_heads, new_dim) = old, new
    old_group, new_group = old_heads.q // old_heads.kv, new_heads.q // new_heads.kv
    if new_dim != old_dim and rotary:
        raise Inexact(f"heads of {old_dim} -> {new_dim} dimensions, rotated by position; exact would be {old_dim}")
    if new_dim < old_dim:
        raise Inexact(f"heads of {old_dim} -> {new_dim} dimensions; exact would be {old_dim} or more")
    kv = np.arange(new_heads.kv) % old_heads.kv
    slot = np.arange(new_heads.kv)[:, None] // old_heads.kv * new_group + np.arange(new_group)
    q = (kv[:, None] * old_group + slot % old_group).ravel()
    if len(np.unique(q)) < old_heads.q or len(np.unique(kv)) < old_heads.kv or len(q) != new_heads.q:
        text = f"{old_heads.q} heads on {old_heads.kv} keys -> {new_heads.q} on {new_heads.kv}"
        least = math.ceil(old_group / max(1, new_heads.kv // old_heads.kv))
        raise Inexact(f"{text}; exact would be {max(old_heads.kv, new_heads.kv)} keys, {least} or more heads on each")
    heads = kv if space in "kv" else q
    inner = np.arange(new_dim) % old_dim
    index = (heads[:, None] * old_dim + inner).ravel()
    of_head = np.repeat(1 / np.bincount(heads)[heads], new_dim)
    of_inner = np.tile(1 / np.bincount(inner)[inner], len(heads))
    ones, alone = np.ones(len(index)), np.full(len(index), -1)
    if space == "k":
        softmax = math.sqrt(new_dim / old_dim)
        groups = (np.arange(len(heads))[:, None] * old_dim + inner).ravel()
        return Axis(index, softmax * of_inner, of_head / softmax, groups)
    if space == "o":
        return Axis(index, of_head * of_inner, ones, index)
    return Axis(index, ones, of_head * of_inner, alone)


def spread_blocks(name: str, old: int, new: int, first: int) -> list[tuple[int, bool]]:
    """Say for each new block which old one it continues, and whether it is a copy, to be silenced.

    The first `first` blocks are not copied; copies stand behind their originals, spread evenly.
    """
    if new > old == first:
        raise Inexact(f"{name}: {old} -> {new} blocks, none of which can be copied; exact would be {old}")
    free = old - first
    sources = [*range(first), *(first + i * free // (new - first) for i in range(new - first))]
    return [(source, i > 0 and sources[i - 1] == source) for i, source in enumerate(sources)]
