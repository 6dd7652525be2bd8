"""The types that hold quantized weights: arrays that are checked once and never change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["KernelCodebook", "QuantizedTensor"]

Floats: TypeAlias = NDArray[np.float32]

MAX_LEVELS = 256  # a code is one byte
MAX_KERNELS = 256  # of a codebook; an index is one byte
MAX_FILTER = 7  # height and width of a codebook's kernels
REPETITION_LEVELS = 16  # above this only the dense algorithm remains


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """Weights of few distinct values: ``w[o, ...] = scale[o] * levels[codes[o, ...]]``.

    Arrays may be NumPy arrays or torch tensors; they are kept as NumPy arrays, and not copied unless they have to be
    (codes that are not in C order, tensors on another device).

    Parameters
    ----------
    codes : int8 or uint8 (O, I) or (O, I, kH, kW)
        Index into the levels, never negative: int8 codes reach only the first 128 levels.
    levels : float32 (Q,) or (O, Q)
        Finite and strictly ascending, 1 <= Q <= 256; two-dimensional where each output has its own.
    scale : float32 (O,), or (O, G) for codes (O, I)
        Finite, of any sign. In the second form each group of I / G consecutive inputs has its own.

    Raises
    ------
    TypeError
        If an argument is no array or has another dtype.
    ValueError
        If a shape or a value is not as above.

    Examples
    --------
    >>> codes = np.array([[0, 2, 1], [2, 2, 0]], np.uint8)
    >>> q = QuantizedTensor(codes, np.array([-1, 0, 1], np.float32), np.array([0.5, -2], np.float32))
    >>> q
    QuantizedTensor((2, 3), Q=3, levels: -1, 0, 1)
    >>> q.dequantize()
    array([[-0.5,  0.5,  0. ],
           [-2. , -2. ,  2. ]], dtype=float32)
    """

    codes: NDArray[Any]
    levels: Floats
    scale: Floats

    def __post_init__(self) -> None:
        codes, levels, scale = (to_numpy(name, getattr(self, name)) for name in ("codes", "levels", "scale"))
        _check_codes(codes)
        _check_levels(levels, codes.shape[0])
        check_scale(scale, codes.shape)
        for code in (codes.min(), codes.max()):
            if not 0 <= code < levels.shape[-1]:
                raise ValueError(f"codes: expected values from 0 to {levels.shape[-1] - 1} (Q - 1), got {code}")
        for name, array in (("codes", codes), ("levels", levels), ("scale", scale)):
            object.__setattr__(self, name, np.ascontiguousarray(array))

    @property
    def Q(self) -> int:
        """Number of levels (of each output)."""
        return int(self.levels.shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights."""
        return self.codes.shape

    def decode(self) -> Floats:
        """Return ``levels[codes]``, the weights without their scale.

        Returns
        -------
        float32, shape of codes
        """
        levels = np.broadcast_to(self.levels, (self.shape[0], self.Q))
        output = np.arange(self.shape[0]).reshape(-1, *[1] * (self.codes.ndim - 1))
        weights: Floats = levels[output, self.codes]
        return weights

    def dequantize(self) -> Floats:
        """Return the weights, each product ``scale * level`` rounded once.

        Returns
        -------
        float32, shape of codes
        """
        scale = self.scale.reshape(self.shape[0], -1)  # (O, 1) or (O, G)
        weights = self.decode().reshape(*scale.shape, -1) * scale[:, :, None]
        return weights.reshape(self.shape)

    def __repr__(self) -> str:
        if self.levels.ndim == 2:
            levels = "own for each output"
        elif self.Q <= REPETITION_LEVELS:
            levels = ", ".join(f"{level:g}" for level in self.levels)
        else:
            levels = f"{self.levels[0]:g} .. {self.levels[-1]:g}"
        groups = f", G={self.scale.shape[1]}" if self.scale.ndim == 2 else ""
        return f"QuantizedTensor({self.shape}, Q={self.Q}{groups}, levels: {levels})"


@dataclass(frozen=True, eq=False, repr=False)
class KernelCodebook:
    """Weights made of few small kernels: pattern j of output o is ``scale[o] * sign[o, j] * kernels[c, index[o, j]]``.

    A pattern is the filter of one input channel or, where filters are 1x1, the weights of p consecutive channels: J in
    all for each output. Codebook c serves J / C consecutive patterns. Arrays are taken as by `QuantizedTensor`.

    Parameters
    ----------
    index : uint8 (O, J)
        Below U.
    sign : int8 (O, J)
        -1 or 1.
    kernels : float32 (C, U, p, kH, kW), or (C, U, p) for linear weights
        Finite, with 1 <= U <= 256 and C dividing J. p is 4 to 8 for 1x1 filters and linear weights; for larger
        filters, which are at most 7x7, it is 1.
    scale : float32 (O,)
        Finite, of any sign.

    Raises
    ------
    TypeError
        If an argument is no array or has another dtype.
    ValueError
        If a shape or a value is not as above.

    Examples
    --------
    >>> kernels = np.array([[[[[1, 1, -1]]], [[[1, -1, 1]]]]], np.float32)  # one codebook of two 1x3 kernels
    >>> index, sign = np.array([[0, 1]], np.uint8), np.array([[1, -1]], np.int8)
    >>> codebook = KernelCodebook(index, sign, kernels, np.array([0.5], np.float32))
    >>> codebook
    KernelCodebook((1, 2, 1, 3), U=2, kernels: sign)
    >>> codebook.dequantize()
    array([[[[ 0.5,  0.5, -0.5]],
    <BLANKLINE>
            [[-0.5,  0.5, -0.5]]]], dtype=float32)
    """

    index: NDArray[Any]
    sign: NDArray[Any]
    kernels: Floats
    scale: Floats

    def __post_init__(self) -> None:
        names = ("index", "sign", "kernels", "scale")
        index, sign, kernels, scale = (to_numpy(name, getattr(self, name)) for name in names)
        if index.dtype != np.uint8:
            raise TypeError(f"index: expected uint8 (O, J), got {index.dtype} {index.shape}")
        if index.ndim != 2 or index.size == 0:
            raise ValueError(f"index: expected uint8 (O, J), not empty, got uint8 {index.shape}")
        if sign.dtype != np.int8:
            raise TypeError(f"sign: expected int8 {index.shape}, got {sign.dtype} {sign.shape}")
        if sign.shape != index.shape:
            raise ValueError(f"sign: expected int8 {index.shape}, got int8 {sign.shape}")
        if (np.abs(sign) != 1).any():
            raise ValueError(f"sign: expected -1 or 1, got {sign[np.abs(sign) != 1][0]}")
        _check_kernels(kernels, index.shape[1])
        check_scale(scale, (*index.shape, 1, 1))
        if index.max() >= kernels.shape[1]:
            raise ValueError(f"index: expected values from 0 to {kernels.shape[1] - 1} (U - 1), got {index.max()}")
        for name, array in zip(names, (index, sign, kernels, scale), strict=True):
            object.__setattr__(self, name, np.ascontiguousarray(array))

    @property
    def U(self) -> int:
        """Number of kernels (of each codebook)."""
        return int(self.kernels.shape[1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights, (O, I / groups, kH, kW) or (O, I)."""
        patterns, (channels, *filter_size) = self.index.shape[1], self.kernels.shape[2:]
        return (self.index.shape[0], patterns * channels, *filter_size)

    @property
    def values(self) -> str:
        """What the kernels are made of: ``"sign"`` (-1 and 1), ``"ternary"`` (0, too) or ``"real"``."""
        magnitude = np.abs(self.kernels)
        if (magnitude == 1).all():
            return "sign"
        return "ternary" if np.isin(magnitude, (0, 1)).all() else "real"

    @property
    def bits_per_weight(self) -> float:
        """Size when packed: patterns of one byte up to 128 kernels, two above; values of 1, 2 or 32 bits; scales."""
        pattern_bits = 8 if self.U <= 128 else 16
        value_bits = {"sign": 1, "ternary": 2, "real": 32}[self.values]
        bits = pattern_bits * self.index.size + value_bits * self.kernels.size + 32 * self.scale.size
        return float(bits / np.prod(self.shape))

    def decode(self) -> Floats:
        """Return ``sign * kernels[c, index]``, the weights without their scale.

        Returns
        -------
        float32, shape of the weights
        """
        patterns, codebooks = self.index.shape[1], len(self.kernels)
        c = np.arange(patterns) // (patterns // codebooks)
        weights: Floats = self.kernels[c, self.index]  # (O, J, p, ...)
        weights *= self.sign.reshape(*self.sign.shape, *[1] * (weights.ndim - 2))
        return weights.reshape(self.shape)

    def dequantize(self) -> Floats:
        """Return the weights, each product ``scale * value`` rounded once.

        Returns
        -------
        float32, shape of the weights
        """
        weights = self.decode()
        weights *= self.scale.reshape(-1, *[1] * (weights.ndim - 1))
        return weights

    def to_quantized(self) -> QuantizedTensor:
        """Return the same weights as codes and levels, the kernels' values and their negatives.

        Raises
        ------
        ValueError
            If a kernel holds a value that is no integer, or if there are more than 256 levels.
        """
        levels = np.unique(np.stack([self.kernels, 0 - self.kernels]))
        fractions = levels[levels != np.rint(levels)]
        if fractions.size:
            raise ValueError(f"kernels: expected integers, which levels are to be, got {fractions[-1]}")
        return QuantizedTensor(np.searchsorted(levels, self.decode()).astype(np.uint8), levels, self.scale)

    def __repr__(self) -> str:
        codebooks = f", C={len(self.kernels)}" if len(self.kernels) > 1 else ""
        return f"KernelCodebook({self.shape}, U={self.U}{codebooks}, kernels: {self.values})"


FewValued: TypeAlias = QuantizedTensor | KernelCodebook


def index_type(kernels: int) -> type[np.signedinteger[Any]]:
    """Return the type of codes that name so many kernels and their negatives."""
    return np.int8 if kernels <= 128 else np.int16


def to_arrays(q: FewValued) -> tuple[NDArray[Any], Floats, Floats]:
    """Return weights as codes, levels and scale, from which `from_arrays` makes them again.

    A `KernelCodebook` has its kernels as levels, (C, U, p, kH, kW) or (C, U, p), and as codes (O, J) i for kernel i and
    ~i for its negative: int8 for up to 128 kernels, int16 for more.
    """
    if isinstance(q, QuantizedTensor):
        return q.codes.astype(np.uint8), q.levels, q.scale
    index = q.index.astype(index_type(q.U))
    return np.where(q.sign < 0, ~index, index), q.kernels, q.scale


def from_arrays(codes: Any, levels: Any, scale: Any) -> FewValued:
    """Return the weights of such arrays or tensors."""
    if levels.ndim < 3:
        return QuantizedTensor(codes, levels, scale)
    codes, kernels = to_numpy("codes", codes), levels.shape[1]
    dtype, lowest, highest = index_type(kernels), codes.min(initial=0), codes.max(initial=0)
    if codes.dtype != dtype or lowest < -kernels or highest >= kernels:
        wanted = f"{np.dtype(dtype)} from {-kernels} to {kernels - 1} for {kernels} kernels"
        raise ValueError(f"codes: expected {wanted}, got {codes.dtype} from {lowest} to {highest}")
    index, sign = np.where(codes < 0, ~codes, codes), np.where(codes < 0, -1, 1)
    return KernelCodebook(index.astype(np.uint8), sign.astype(np.int8), levels, scale)


def to_numpy(name: str, array: Any) -> NDArray[Any]:
    if hasattr(array, "detach"):  # a torch tensor
        dtype = str(array.dtype)
        try:
            array = (array.float() if dtype == "torch.bfloat16" else array).numpy(force=True)  # NumPy lacks bfloat16
        except (TypeError, RuntimeError) as error:
            raise TypeError(f"{name}: expected a tensor that NumPy can hold, got {dtype}: {error}") from None
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected a NumPy array or a torch tensor, got {type(array).__name__}")
    return np.asarray(array)  # of the class itself: derived ones may do anything


def check_weights(w: Any) -> Floats:
    w = to_numpy("w", w)
    expected = "w: expected float (O, I) or (O, I / groups, kH, kW)"
    if w.dtype not in (np.float16, np.float32, np.float64):
        raise TypeError(f"{expected}, got {w.dtype} {w.shape}")
    if w.ndim not in (2, 4):
        raise ValueError(f"{expected}, got {w.dtype} {w.shape}")
    if w.size == 0:
        raise ValueError(f"w: expected at least one weight, got shape {w.shape}")
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(w, np.float32)
    finite = np.isfinite(narrow)
    if not finite.all():
        index = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(f"w: expected finite float32 values, got {w[index]} at {index}")
    return narrow


def _check_codes(codes: NDArray[Any]) -> None:
    expected = "codes: expected int8 or uint8 (O, I) or (O, I, kH, kW)"
    if codes.dtype not in (np.int8, np.uint8):
        raise TypeError(f"{expected}, got {codes.dtype} {codes.shape}")
    if codes.ndim not in (2, 4):
        raise ValueError(f"{expected}, got {codes.dtype} {codes.shape}")
    if codes.size == 0:
        raise ValueError(f"codes: expected at least one code, got shape {codes.shape}")


def _check_levels(levels: NDArray[Any], outputs: int) -> None:
    expected = f"levels: expected float32 (Q,) or ({outputs}, Q)"
    if levels.dtype != np.float32:
        raise TypeError(f"{expected}, got {levels.dtype} {levels.shape}")
    if levels.ndim not in (1, 2) or (levels.ndim == 2 and levels.shape[0] != outputs):
        raise ValueError(f"{expected}, got float32 {levels.shape}")
    if not 1 <= levels.shape[-1] <= MAX_LEVELS:
        raise ValueError(f"levels: expected 1 to {MAX_LEVELS} levels, got {levels.shape[-1]}")
    if not np.isfinite(levels).all():
        raise ValueError(f"levels: expected finite values, got {levels[~np.isfinite(levels)][0]}")
    descending = levels[..., 1:] <= levels[..., :-1]
    if descending.any():
        before, after = levels[..., :-1][descending][0], levels[..., 1:][descending][0]
        raise ValueError(f"levels: expected strictly ascending values, got {before} before {after}")


def check_scale(scale: NDArray[Any], shape: tuple[int, ...]) -> None:
    outputs, inputs = shape[:2]
    grouped = f" or ({outputs}, G) with G dividing {inputs}" if len(shape) == 2 else ""
    expected = f"scale: expected float32 ({outputs},){grouped}"
    if scale.dtype != np.float32:
        raise TypeError(f"{expected}, got {scale.dtype} {scale.shape}")
    per_group = len(shape) == 2 and scale.ndim == 2 and scale.shape[1] > 0 and inputs % scale.shape[1] == 0
    if scale.shape[:1] != (outputs,) or not (scale.ndim == 1 or per_group):
        raise ValueError(f"{expected}, got float32 {scale.shape}")
    if not np.isfinite(scale).all():
        raise ValueError(f"scale: expected finite values, got {scale[~np.isfinite(scale)][0]}")


def _check_kernels(kernels: NDArray[Any], patterns: int) -> None:
    expected = "kernels: expected float32 (C, U, p, kH, kW) or (C, U, p)"
    if kernels.dtype != np.float32:
        raise TypeError(f"{expected}, got {kernels.dtype} {kernels.shape}")
    if kernels.ndim not in (3, 5) or kernels.size == 0:
        raise ValueError(f"{expected}, not empty, got float32 {kernels.shape}")
    codebooks, count, channels, *filter_size = kernels.shape
    if patterns % codebooks:
        raise ValueError(f"kernels: expected a number of codebooks C that divides {patterns} (J), got {codebooks}")
    if count > MAX_KERNELS:
        raise ValueError(f"kernels: expected at most {MAX_KERNELS} kernels (U), got {count}")
    check_pattern("kernels", filter_size, channels)
    if not np.isfinite(kernels).all():
        raise ValueError(f"kernels: expected finite values, got {kernels[~np.isfinite(kernels)][0]}")


def check_pattern(name: str, filter_size: Sequence[int], channels: int) -> None:
    """Check the size of a codebook's filters, and how many input channels make a pattern."""
    if max(filter_size, default=1) > MAX_FILTER:
        raise ValueError(f"{name}: expected filters of at most {MAX_FILTER}x{MAX_FILTER}, got {_times(filter_size)}")
    if max(filter_size, default=1) > 1 and channels != 1:
        raise ValueError(f"{name}: expected patterns of 1 channel for {_times(filter_size)} filters, got {channels}")
    if max(filter_size, default=1) == 1 and not 4 <= channels <= 8:
        raise ValueError(f"{name}: expected patterns of 4 to 8 channels for 1x1 filters, got {channels}")


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
