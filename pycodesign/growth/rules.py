"""A rule makes one parameter of the larger model, and its optimizer's moments, from the smaller one's."""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pycodesign import ops
from pycodesign.growth.indices import ONE, ZERO, Axis, keep_axis

Array: TypeAlias = Any  # a NumPy array or a torch tensor in host memory

NOISE_BLOCK = 1 << 20  # values drawn at once
OPTIMIZERS = ("Adam", "AdamW", "SGD")  # of torch.optim
POWERS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "momentum_buffer": 1}  # of gradients, in a state


@dataclass(frozen=True)
class Rule:
    """How one parameter of the larger model is made.

    Attributes
    ----------
    name, source : str
        Names of the new parameter and of the old one that it continues.
    old_shape, shape : tuple of int
        Their shapes.
    axes : mapping from int to Axis
        The axes that change, by their position: one, or two neighbors.
    silent : bool
        The values are zero: all that a new block would add to its input. States are copied all the same.
    factor : str
        Name of the old vector that multiplies this parameter's outputs (LayerScale), where `apply` needs it.
    noise : float
        Size of what breaks the symmetry of copies, relative to the old weights.
    seed : int
        Of that noise.
    what : str
        In words.
    """

    name: str
    source: str
    old_shape: tuple[int, ...]
    shape: tuple[int, ...]
    axes: Mapping[int, Axis]
    silent: bool = False
    factor: str = ""
    noise: float = 0.0
    seed: int = 0
    what: str = ""

    def __post_init__(self) -> None:
        positions = sorted(self.axes)
        alone = len(positions) < 2 or (len(positions) == 2 and positions[1] == positions[0] + 1)
        if not alone or (len(positions) == 2 and math.prod(self.shape[: positions[0]]) != 1):
            raise ValueError(f"{self.name}: expected one axis, or the first two, to grow, got {positions}")

    @property
    def scale(self) -> float | None:
        """Factor s of the values; None if it is not the same for all."""
        return self._multiply(axis.scale for axis in self.axes.values())

    @property
    def gradient(self) -> float | None:
        """Factor a of the gradients; None if it is not the same for all."""
        return self._multiply(axis.gradient for axis in self.axes.values())

    def apply(self, old: Array, factor: Array | None = None, out: Array | None = None) -> Array:
        """Make the new parameter.

        Parameters
        ----------
        old : array of `old_shape`
            The parameter `source`: a NumPy array or a torch tensor in host memory, of floating-point numbers.
        factor : array, optional
            The vector `factor`, where there is one.
        out : array of `shape`, optional
            C-contiguous, of the same kind and dtype; is written to.

        Returns
        -------
        array of `shape`

        Raises
        ------
        ValueError
            If a shape is not the plan's, or the factor is missing.
        """
        if self.factor and factor is None:
            raise ValueError(f"factor: expected {self.factor}, got None")
        if not self.silent:
            out = self._expand(old, factor, "scale", 1, out)
            if self.noise:
                self._add_noise(out, old)
            return out
        out = self._allocate(old, out)
        out[...] = 0
        return out

    def apply_state(self, old: Array, power: int = 1, out: Array | None = None) -> Array:
        """Make an optimizer's moment of the new parameter.

        Parameters
        ----------
        old : array of `old_shape`
            The moment of the parameter `source`.
        power : int
            1 for a mean of gradients, 2 for a mean of their squares.
        out : array of `shape`, optional
            C-contiguous, of the same kind and dtype; is written to.

        Returns
        -------
        array of `shape`
        """
        return self._expand(old, None, "gradient", power, out)

    def _multiply(self, vectors: Iterable[NDArray[np.float64]]) -> float | None:
        if self.silent or any((axis.index < 0).any() for axis in self.axes.values()):
            return None
        product = 1.0
        for vector in vectors:
            if (vector != vector[0]).any():
                return None
            product *= float(vector[0])
        return product

    def _allocate(self, old: Array, out: Array | None) -> Array:
        if tuple(old.shape) != self.old_shape:
            raise ValueError(f"{self.source}: expected shape {self.old_shape}, got {tuple(old.shape)}")
        if out is None:
            return np.empty(self.shape, old.dtype) if isinstance(old, np.ndarray) else old.new_empty(self.shape)
        if tuple(out.shape) != self.shape:
            raise ValueError(f"out: expected shape {self.shape}, got {tuple(out.shape)}")
        if not (out.flags.c_contiguous if isinstance(out, np.ndarray) else out.is_contiguous()):
            raise ValueError(f"out: expected a C-contiguous array, got strides for {self.name}")
        return out

    def _expand(self, old: Array, factor: Array | None, field: str, power: int, out: Array | None) -> Array:
        out = self._allocate(old, out)
        if not self.axes:
            out[...] = old
            return out
        axes = self._fold_axes()
        old, new = self._fold(old), self._fold(out)
        _copy(old, axes, field, power, new)
        for position, axis in enumerate(axes):
            if axis.index[-1] < (ZERO if field == "scale" else 0):
                self._fill_padding(old, axes, position, factor, field, power, new)
        return out

    def _fill_padding(
        self, old: Array, axes: list[Axis], position: int, factor: Array | None, field: str, power: int, new: Array
    ) -> None:
        """Write the end of one axis, where there are no copies but means, or ones.

        States are means there, too: with no second moment, but the old step count, Adam's first steps would be too
        large.
        """
        axis = axes[position]
        start = int(np.argmax(axis.index < 0))
        end = new[start:] if position == 0 else new[:, start:]
        if axis.index[-1] == ONE and field == "scale":
            end[...] = 1
            return
        rows = _compute_mean(old, position, factor if field == "scale" else None)
        count = len(axis.index) - start
        zeros = np.zeros(count, np.int64)
        axes = [*axes]
        axes[position] = Axis(zeros, axis.scale[start:], axis.gradient[start:], zeros)
        end[...] = _copy(rows, axes, field, power)

    def _fold_axes(self) -> list[Axis]:
        positions = sorted(self.axes)
        axes = [self.axes[position] for position in positions]
        before = math.prod(self.shape[: positions[0]])
        if len(positions) == 1:
            return axes if before == 1 else [keep_axis(before), *axes]
        return axes

    def _fold(self, array: Array) -> Array:
        """View an array so that its first axes are those of `_fold_axes`; the pixels of 3-D kernels become one axis."""
        first = min(self.axes)
        before = math.prod(array.shape[:first])
        shape = [*([] if before == 1 else [before]), *array.shape[first:]]
        return array.reshape(shape if len(shape) <= 4 else [*shape[:2], math.prod(shape[2:])])

    def _add_noise(self, new: Array, old: Array) -> None:
        """Add noise along one axis, of sum zero over each of its groups."""
        position = next((p for p, axis in sorted(self.axes.items(), reverse=True) if axis.has_groups), None)
        if position is None:
            return
        axis = self.axes[position]
        members = np.flatnonzero(axis.groups >= 0)
        members = members[np.argsort(axis.groups[members], kind="stable")]
        _, starts, counts = np.unique(axis.groups[members], return_index=True, return_counts=True)
        scale = self.noise * _compute_size(old) * axis.scale[members, None]
        random = np.random.default_rng((self.seed, zlib.crc32(self.name.encode())))
        before, after = math.prod(self.shape[:position]), math.prod(self.shape[position + 1 :])
        view = new.reshape((before, self.shape[position], after))
        for part in _split_blocks(before, len(members), after):
            noise = scale * random.standard_normal((len(view[part[0]]), len(members), len(range(after)[part[1]])))
            noise -= np.repeat(np.add.reduceat(noise, starts, 1) / counts[:, None], counts, 1)
            _add(view[part[0], :, part[1]], members, noise)


def scale_settings(kind: str, settings: Mapping[str, Any], s: float, a: float) -> dict[str, Any]:
    """Scale the settings of Adam, AdamW or SGD for parameters s times as large with gradients a times as large."""
    scaled = dict(settings)
    adam = kind != "SGD"
    decoupled = kind == "AdamW" or scaled.get("decoupled_weight_decay", False)
    for key in ("lr", "initial_lr"):
        if key in scaled:
            scaled[key] = scaled[key] * (s if adam else s / a)
    if adam:
        scaled["eps"] = scaled["eps"] * a
    scaled["weight_decay"] = scaled["weight_decay"] * ((1 if decoupled else a) / s)
    return scaled


def _copy(old: Array, axes: Sequence[Axis], field: str, power: int, out: Array | None = None) -> Array:
    """Expand the first axes of an array; what is no copy becomes zero."""
    dtype = np.float64 if "float64" in str(old.dtype) else np.float32
    scales = [(getattr(axis, field) ** power).astype(dtype) for axis in axes]
    rows, *columns = axes
    return ops.expand(
        old,
        np.maximum(rows.index, ZERO),
        np.maximum(columns[0].index, ZERO) if columns else None,
        out_scale=None if (scales[0] == 1).all() else scales[0],
        in_scale=scales[1] if columns and (scales[1] != 1).any() else None,
        out=out,
    )


def _compute_mean(array: Array, axis: int, weights: Array | None) -> Array:
    """Return the mean over one of the first two axes, of length 1 there; in float64, block by block of the other."""
    shape = [size if position != axis else 1 for position, size in enumerate(array.shape)]
    result = np.empty(shape, array.dtype) if isinstance(array, np.ndarray) else array.new_empty(shape)
    others = array.shape[1 - axis] if array.ndim > 1 else 1
    step = max(1, NOISE_BLOCK * others // max(math.prod(array.shape), 1))
    for start in range(0, others, step):
        block = [slice(None)] * array.ndim
        if array.ndim > 1:
            block[1 - axis] = slice(start, start + step)
        part = array[tuple(block)]
        wide = part.astype(np.float64) if isinstance(part, np.ndarray) else part.double()
        if weights is not None:
            wide = wide * weights.reshape([-1 if position == axis else 1 for position in range(array.ndim)])
        result[tuple(block)] = wide.mean(axis)[(slice(None),) * axis + (None,)]
    return result


def _compute_size(array: Array) -> float:
    """Return the root of the mean square."""
    flat = array.reshape(-1)
    total = 0.0
    for start in range(0, len(flat), NOISE_BLOCK):
        part = flat[start : start + NOISE_BLOCK]
        part = part.astype(np.float64) if isinstance(part, np.ndarray) else part.double()
        total += float(part @ part)
    return math.sqrt(total / max(len(flat), 1))


def _split_blocks(before: int, members: int, after: int) -> Iterator[tuple[slice, slice]]:
    """Split the two outer axes so that noise is drawn in blocks."""
    step = max(1, NOISE_BLOCK // (members * after))
    if step > 1 or after == 1:
        yield from ((slice(i, i + step), slice(None)) for i in range(0, before, step))
        return
    step = max(1, NOISE_BLOCK // members)
    for i in range(before):
        yield from ((slice(i, i + 1), slice(j, j + step)) for j in range(0, after, step))


def _add(view: Array, members: NDArray[np.int64], noise: NDArray[np.float64]) -> None:
    if isinstance(view, np.ndarray):
        view[:, members] += noise.astype(view.dtype)
    else:
        torch = sys.modules["torch"]
        view[:, torch.from_numpy(members)] += torch.from_numpy(noise).to(view.dtype)
