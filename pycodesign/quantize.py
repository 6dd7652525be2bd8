"""Weights with few distinct values, or few distinct small kernels: the published ways to get them.

Every function returns a `QuantizedTensor`, which stands for ``w[o, ...] = scale[o] * levels[codes[o, ...]]``; only
`kernel_codebook` returns a `KernelCodebook`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pycodesign._codebook import kernel_codebook
from pycodesign._quantized import (
    MAX_LEVELS,
    REPETITION_LEVELS,
    Floats,
    KernelCodebook,
    QuantizedTensor,
    check_scale,
    check_weights,
    to_numpy,
)

__all__ = [
    "REPETITION_LEVELS",
    "KernelCodebook",
    "QuantizedTensor",
    "binary",
    "from_fake_quantized",
    "kernel_codebook",
    "power_of_two",
    "ternary",
    "uniform",
]

MAX_INTEGER_LEVEL = 1 << 15  # what from_fake_quantized looks for; holds the levels of power_of_two(5)
MAX_SMALLEST_MULTIPLE = 256  # steps in the smallest nonzero |weight|; holds 8-bit levels, odd ones too
CLIP_FRACTIONS = np.linspace(1.0, 0.2, 17, dtype=np.float32)
CACHED_WEIGHTS = 1 << 16  # weights per block of the scale search: the block and its temporaries stay in the L2 cache


def binary(w: Any) -> QuantizedTensor:
    """Quantize to {-1, 1} with the mean magnitude of each output as its scale (BWN).

    The sign of a zero weight counts as +1.

    Parameters
    ----------
    w : float (O, I) or (O, I / groups, kH, kW)

    Returns
    -------
    QuantizedTensor
        Levels {-1, 1}. An output of zeros has scale 0.

    Raises
    ------
    TypeError, ValueError
        If `w` is not floating point, not of rank 2 or 4, empty, or not finite.

    References
    ----------
    Rastegari et al., "XNOR-Net", ECCV 2016, equation 6.

    Examples
    --------
    >>> binary(np.array([[1.0, -2.0, 0.0, 3.0]])).dequantize()
    array([[ 1.5, -1.5,  1.5,  1.5]], dtype=float32)
    """
    w = check_weights(w)
    scale = np.abs(_rows(w)).mean(axis=1, dtype=np.float64)
    return QuantizedTensor((w >= 0).view(np.uint8), _int_levels(-1, 1), scale.astype(np.float32))


def ternary(w: Any) -> QuantizedTensor:
    """Quantize to {-1, 0, 1} with the threshold and scale of ternary weight networks (TWN), per output.

    Weights within 0.7 times the mean magnitude become 0; the mean magnitude of the others is the scale.

    Parameters
    ----------
    w : float (O, I) or (O, I / groups, kH, kW)

    Returns
    -------
    QuantizedTensor
        Levels {-1, 0, 1}. An output of zeros has scale 0.

    Raises
    ------
    TypeError, ValueError
        If `w` is not floating point, not of rank 2 or 4, empty, or not finite.

    References
    ----------
    Li, Zhang and Liu, "Ternary Weight Networks", arXiv:1605.04711, 2016: threshold 0.7 E|w|, and the scale that is
    optimal for it.

    Examples
    --------
    >>> ternary(np.array([[1.0, -2.0, 0.0, 3.0]])).dequantize()
    array([[ 0. , -2.5,  0. ,  2.5]], dtype=float32)
    """
    w = check_weights(w)
    rows = _rows(w)
    magnitude = np.abs(rows)
    threshold = 0.7 * magnitude.mean(axis=1, keepdims=True, dtype=np.float64)
    kept = magnitude > threshold
    total = magnitude.sum(axis=1, where=kept, dtype=np.float64)
    scale = total / np.maximum(kept.sum(axis=1), 1)
    codes = 1 + np.where(rows < 0, -kept.view(np.int8), kept.view(np.int8))
    return QuantizedTensor(codes.astype(np.uint8).reshape(w.shape), _int_levels(-1, 0, 1), scale.astype(np.float32))


def uniform(w: Any, bits: int) -> QuantizedTensor:
    """Quantize to the integers of `bits` bits, with the scale of least squared error for each output.

    The scale is searched among seventeen clipping ranges, from the largest magnitude (nothing is clipped) to a fifth
    of it.

    Parameters
    ----------
    w : float (O, I) or (O, I / groups, kH, kW)
    bits : int
        2 to 8. For one bit use `binary`: the integers of one bit, {-1, 0}, have no positive weight.

    Returns
    -------
    QuantizedTensor
        Levels -2^(bits-1) .. 2^(bits-1) - 1. An output of zeros has scale 0.

    Raises
    ------
    TypeError, ValueError
        If `w` is not floating point, not of rank 2 or 4, empty, or not finite; if `bits` is no integer from 2 to 8.

    References
    ----------
    Nagel et al., "A White Paper on Neural Network Quantization", arXiv:2106.08295, 2021: symmetric uniform
    quantization, range setting by mean squared error.

    Examples
    --------
    >>> uniform(np.array([[0.5, -1.0, 0.25, 1.0]]), bits=4).codes - 8.0
    array([[ 3., -7.,  2.,  7.]])
    """
    w = check_weights(w)
    bits = _check_bits(bits, 2, 8)
    top = (1 << (bits - 1)) - 1

    def round_to_level(t: Floats) -> Floats:
        return np.clip(np.rint(t), -top - 1, top)

    return _fit(w, np.arange(-top - 1, top + 1, dtype=np.float32), round_to_level)


def power_of_two(w: Any, bits: int) -> QuantizedTensor:
    """Quantize to zero and signed powers of two, with the scale of least squared error for each output.

    `bits` bits hold a sign and an exponent with one value kept for zero: 2^bits - 1 levels. Each weight goes to the
    nearest level. The scale, which need not be a power of two, is searched as by `uniform`.

    Parameters
    ----------
    w : float (O, I) or (O, I / groups, kH, kW)
    bits : int
        2 to 5. Six bits would span 2^30, which no int32 sum could hold.

    Returns
    -------
    QuantizedTensor
        Levels 0, +-1, +-2, +-4 .. +-2^(2^(bits-1) - 2). An output of zeros has scale 0.

    Raises
    ------
    TypeError, ValueError
        If `w` is not floating point, not of rank 2 or 4, empty, or not finite; if `bits` is no integer from 2 to 5.

    References
    ----------
    Zhou et al., "Incremental Network Quantization", ICLR 2017: nearest of zero and the powers of two; Li, Dong and
    Wang, "Additive Powers-of-Two Quantization", ICLR 2020: the real scale.

    Examples
    --------
    >>> power_of_two(np.array([[0.5, -1.0, 0.0, 0.25]]), bits=3).dequantize()
    array([[ 0.5 , -1.  ,  0.  ,  0.25]], dtype=float32)
    """
    w = check_weights(w)
    bits = _check_bits(bits, 2, 5)
    exponents = (1 << (bits - 1)) - 1
    powers = 2.0 ** np.arange(exponents)
    levels = np.concatenate([-powers[::-1], [0], powers]).astype(np.float32)

    def round_to_level(t: Floats) -> Floats:
        # 2^e is nearest to [0.75 * 2^e, 1.5 * 2^e); 1 also takes what lies above 0.5
        magnitude = np.abs(t)
        _, exponent = np.frexp(magnitude * np.float32(2 / 3))
        nearest = np.ldexp(np.float32(1), np.clip(exponent, 0, exponents - 1))
        return np.copysign(np.where(magnitude > 0.5, nearest, 0), t)

    return _fit(w, levels, round_to_level)


def from_fake_quantized(w: Any, scale: Any = None) -> QuantizedTensor:
    """Recover codes, levels and scales, exactly, from float weights that a quantizer has already rounded.

    Where the quantizer's `scale` is given, and all weights are integer multiples of it, the levels are these integers,
    less a common divisor of an output's. Else, if the weights of every output are small integer multiples of some step,
    ``w == float32(step * integer)``, the levels are those integers and the scales the largest such steps, negative
    where that makes fewer levels in all. Otherwise the levels are the distinct weights themselves and the scales 1, or
    -1 where that makes fewer levels. Outputs share one list of levels, except where sharing would exceed 256 levels, or
    the 16 that repetition algorithms serve while each output alone keeps to 16.

    Parameters
    ----------
    w : float32 or float16 (O, I) or (O, I / groups, kH, kW)
    scale : float32 (O,), or (O, G) for `w` (O, I), optional

    Returns
    -------
    QuantizedTensor
        ``dequantize()`` equals `w`; the sign of zero is not kept. An output of zeros has scale 0, or the one given.

    Raises
    ------
    TypeError, ValueError
        If `w` is not float32 or float16, not of rank 2 or 4, empty, or not finite; if `scale` is not as above.
    ValueError
        If an output has more than 256 distinct values; the message names the first.

    Examples
    --------
    >>> q = from_fake_quantized(np.array([[0.3, 0.0, -0.3], [1.5, 1.5, 0.0]], np.float32))
    >>> q.levels, q.scale
    (array([-1.,  0.,  1.], dtype=float32), array([0.3, 1.5], dtype=float32))
    """
    w = to_numpy("w", w)
    if w.dtype == np.float64:
        raise TypeError("w: expected float32 or float16, which dequantize() can equal, got float64")
    w = check_weights(w) + np.float32(0)  # -0 becomes 0
    rows = _rows(w)
    if scale is not None and (q := _divide_by_scale(w, to_numpy("scale", scale))):
        return q
    distinct = _distinct_values(rows)
    live = np.asarray(distinct.any(axis=1))
    steps, multiples = _find_steps(distinct)
    if not steps[live].all():
        steps, multiples = np.ones_like(steps), distinct

    flip = multiples.max(axis=1) > -multiples.min(axis=1)
    flipped = np.where(flip[:, None], 0 - multiples, multiples)
    if np.unique(flipped).size < np.unique(multiples).size:
        steps, multiples = np.where(flip, -steps, steps), flipped

    levels, positions = _collect_levels(multiples, live)
    codes = _look_up(rows, distinct, positions)
    return QuantizedTensor(codes.reshape(w.shape), levels, np.where(live, steps, np.float32(0)))


def _divide_by_scale(w: Floats, scale: NDArray[Any]) -> QuantizedTensor | None:
    """Take the integers ``w / scale`` as levels; None if some are no integers."""
    check_scale(scale, w.shape)
    steps = scale.reshape(w.shape[0], -1, 1)
    grouped = w.reshape(*steps.shape[:2], -1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        integers = np.rint(np.where(steps == 0, 0, grouped / steps)) + np.float32(0)
        if not (integers * steps == grouped).all():
            return None
        divisors = _common_divisors(integers)
        exact = (integers / divisors * (steps * divisors) == grouped).all(axis=(1, 2), keepdims=True)
    divisors = np.where(exact, divisors, np.float32(1))
    rows = (integers / divisors).reshape(w.shape[0], -1)
    distinct, live = _distinct_values(rows), rows.any(axis=1)
    levels, positions = _collect_levels(distinct, live)
    codes = _look_up(rows, distinct, positions).reshape(w.shape)
    scales = (steps * divisors).reshape(scale.shape)
    if levels.all():
        scales[~live] = 0
    return QuantizedTensor(codes, levels, scales)


def _common_divisors(integers: Floats) -> Floats:
    """Return the greatest common divisor of each row, (O, 1, 1); 1 for a row of zeros or of large integers."""
    if np.abs(integers).max() > MAX_INTEGER_LEVEL:
        return np.ones((len(integers), 1, 1), np.float32)
    divisors = np.gcd.reduce(integers.astype(np.int64).reshape(len(integers), -1), axis=1)
    positive: Floats = np.maximum(divisors, 1).astype(np.float32)
    return positive.reshape(-1, 1, 1)


def _look_up(rows: Floats, distinct: Floats, positions: NDArray[np.intp]) -> NDArray[np.uint8]:
    """Return the position that belongs to each value."""
    codes = np.empty(rows.shape, np.uint8)
    for o, (values, position) in enumerate(zip(distinct, positions, strict=True)):
        codes[o] = position[np.searchsorted(values, rows[o])]
    return codes


def _distinct_values(rows: Floats) -> Floats:
    """Return the distinct values of each row, ascending, the largest repeated up to the longest row's count."""
    ordered = np.sort(rows, axis=1)
    first = np.ones(rows.shape, bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    counts = first.sum(axis=1)
    too_many = np.flatnonzero(counts > MAX_LEVELS)
    if too_many.size:
        o = too_many[0]
        raise ValueError(f"w: output {o} has {counts[o]} distinct values, expected at most {MAX_LEVELS}")
    distinct = np.repeat(ordered[:, -1:], counts.max(), axis=1)
    distinct[np.arange(counts.max()) < counts[:, None]] = ordered[first]
    return distinct


def _find_steps(values: Floats) -> tuple[Floats, Floats]:
    """Find for each row the largest step with ``values == float32(step * multiples)``, multiples integers.

    Tries step = smallest / 1, smallest / 2, ..., smallest being the least nonzero magnitude of the row. Where no step
    is found, or the row is zero, step and multiples are 0.
    """
    steps = np.zeros(len(values), np.float32)
    multiples = np.zeros_like(values)
    magnitude = np.abs(values.astype(np.float64))
    largest = magnitude.max(axis=1)
    smallest = np.where(magnitude > 0, magnitude, np.inf).min(axis=1)
    open_rows = np.flatnonzero(largest > 0)
    for divisor in range(1, MAX_SMALLEST_MULTIPLE + 1):
        open_rows = open_rows[largest[open_rows] * divisor < (MAX_INTEGER_LEVEL + 0.5) * smallest[open_rows]]
        if not open_rows.size:
            break
        # a float32 is off by 2^-24 of itself, a ratio of two by less than 2^-22
        ratio = values[open_rows] * (divisor / smallest[open_rows])[:, None]
        nearest = np.rint(ratio)
        near = (np.abs(ratio - nearest) <= 2.0**-22 * np.abs(ratio)).all(axis=1)
        rows, candidate = open_rows[near], nearest[near].astype(np.float32)
        estimate = (largest[rows] / np.abs(candidate).max(axis=1)).astype(np.float32)
        for ulps in (2, -2, 1, -1, 0):  # the estimate is off by at most two; the last that fits wins
            step = estimate + ulps * np.spacing(estimate)
            with np.errstate(over="ignore"):
                exact = (step[:, None] * candidate == values[rows]).all(axis=1)
            steps[rows[exact]], multiples[rows[exact]] = step[exact], candidate[exact]
        open_rows = open_rows[steps[open_rows] == 0]
    return steps, multiples


def _collect_levels(multiples: Floats, live: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.intp]]:
    """Return the levels, (Q,) or (O, Q), and the position of each multiple among them; any where not `live`."""
    shared = np.unique(multiples[live]) if live.any() else np.zeros(1, np.float32)
    most = max(np.unique(row).size for row in multiples)
    if shared.size <= REPETITION_LEVELS or (most > REPETITION_LEVELS and shared.size <= MAX_LEVELS):
        return shared, np.minimum(np.searchsorted(shared, multiples), shared.size - 1)
    levels = np.stack([_pad_levels(np.unique(row), most) for row in multiples])
    return levels, np.stack([np.searchsorted(own, row) for own, row in zip(levels, multiples, strict=True)])


def _pad_levels(levels: Floats, count: int) -> Floats:
    """Add the integers nearest to zero that are no levels yet, up to `count` levels."""
    near_zero = np.arange(2 * count)
    near_zero = np.where(near_zero % 2, (near_zero + 1) // 2, -near_zero // 2)  # 0, 1, -1, 2, -2, ...
    unused = near_zero[~np.isin(near_zero, levels)]
    return np.sort(np.append(levels, unused[: count - levels.size])).astype(np.float32)


def _fit(w: Floats, levels: Floats, round_to_level: Callable[[Floats], Floats]) -> QuantizedTensor:
    """Choose for each output the clipping range of least squared error, and round to the levels."""
    rows = _rows(w)
    top = levels[-1]
    largest = np.abs(rows).max(axis=1)
    scale = np.empty_like(largest)
    codes = np.empty(rows.shape, np.uint8)
    block = max(1, CACHED_WEIGHTS // rows.shape[1])
    for part in (slice(o, o + block) for o in range(0, len(rows), block)):
        normalized = rows[part] / np.where(largest[part] > 0, largest[part], np.float32(1))[:, None]
        errors = []
        for fraction in CLIP_FRACTIONS:
            t = normalized * (top / fraction)
            t -= round_to_level(t)
            errors.append(fraction**2 * np.einsum("oi,oi->o", t, t))
        best = CLIP_FRACTIONS[np.argmin(errors, axis=0)]
        scale[part] = largest[part] * (best / top)
        t = rows[part] / np.where(scale[part] > 0, scale[part], np.float32(1))[:, None]
        codes[part] = np.searchsorted(levels, round_to_level(t))
    return QuantizedTensor(codes.reshape(w.shape), levels, scale)


def _rows(w: NDArray[Any]) -> NDArray[Any]:
    return w.reshape(w.shape[0], -1)


def _int_levels(*levels: int) -> Floats:
    return np.array(levels, np.float32)


def _check_bits(bits: int, low: int, high: int) -> int:
    try:
        value = operator.index(bits)
    except TypeError:
        raise TypeError(f"bits: expected int, got {type(bits).__name__}") from None
    if not low <= value <= high:
        raise ValueError(f"bits: expected {low} to {high}, got {value}")
    return value
