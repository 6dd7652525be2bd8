"""Codebooks of small kernels, fitted to float weights."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pycodesign._quantized import MAX_FILTER, MAX_KERNELS, Floats, KernelCodebook, check_pattern, check_weights

__all__ = ["kernel_codebook"]

VALUES = ("sign", "ternary", "real")
SAMPLED_PATTERNS = 4096  # among which the first kernels are chosen
CANDIDATES = 512  # for first kernels
BLOCK = 1 << 20  # products of a pattern and a kernel at a time
SETTLED = 1e-4  # of the squared error: a round that gains less is the last


def kernel_codebook(
    w: Any,
    kernels: int = 32,
    values: str = "sign",
    *,
    pattern_channels: int | None = None,
    codebooks: int = 1,
    rounds: int = 30,
) -> KernelCodebook:
    """Quantize to few small kernels: each filter of an input channel becomes one of them, up to sign and scale.

    First kernels are chosen greedily among the filters themselves; then rounds of three steps, of which none increases
    the squared error, follow: each pattern takes its nearest kernel, each output its best scale, each kernel becomes
    the nearest of its kind to the patterns that took it (k-means, Lloyd 1982). A kernel that none took begins anew at a
    pattern that is served badly. The same weights give the same codebook on one processor, whatever the number of
    threads; on others, where sums are rounded otherwise, it may be another one.

    Parameters
    ----------
    w : float (O, I) or (O, I / groups, kH, kW)
    kernels : int
        2 to 256 for each codebook, and no more than there are patterns, or different patterns up to sign, for it.
    values : {"sign", "ternary", "real"}
        What kernels are made of: -1 and 1; 0, too; or any numbers, which serve float inputs only.
    pattern_channels : int, optional
        Input channels of a pattern, 4 to 8, 8 by default, for 1x1 filters and linear weights; larger filters, at most
        7x7, have patterns of one channel.
    codebooks : int
        Each serves as many consecutive patterns of every output.
    rounds : int
        At most so many.

    Returns
    -------
    KernelCodebook
        An output of zeros has scale 0.

    Raises
    ------
    TypeError, ValueError
        If `w` is not floating point, not of rank 2 or 4, empty, or not finite; if another argument is not as above or
        the channels are no multiple of `pattern_channels`, the patterns none of `codebooks`.

    References
    ----------
    Wang et al., "Sub-bit Neural Networks", ICCV 2021: binary kernels from a subset of all; Yu et al., "Kernel
    Quantization for Efficient Network Compression", 2020: codebooks of real kernels; Lloyd, "Least Squares Quantization
    in PCM", 1982.

    Examples
    --------
    >>> w = np.random.default_rng(0).normal(size=(64, 64, 3, 3))
    >>> codebook = kernel_codebook(w, kernels=16)
    >>> codebook, round(codebook.bits_per_weight, 2)
    (KernelCodebook((64, 64, 3, 3), U=16, kernels: sign), 0.95)
    >>> codebook.to_quantized()
    QuantizedTensor((64, 64, 3, 3), Q=2, levels: -1, 1)
    """
    w = check_weights(w)
    outputs, inputs, *filter_size = w.shape
    if values not in VALUES:
        raise ValueError(f"values: expected 'sign', 'ternary' or 'real', got {values!r}")
    if pattern_channels is None:
        pattern_channels = 1 if max(filter_size, default=1) > 1 else 8
    pattern_channels = _to_count("pattern_channels", pattern_channels)
    check_pattern(
        "w" if max(filter_size, default=1) > MAX_FILTER else "pattern_channels", filter_size, pattern_channels
    )
    if inputs % pattern_channels:
        raise ValueError(f"pattern_channels: expected a divisor of {inputs} input channels, got {pattern_channels}")
    patterns = w.reshape(outputs, inputs // pattern_channels, -1)  # (O, J, D)
    codebooks = _to_count("codebooks", codebooks)
    if patterns.shape[1] % codebooks:
        raise ValueError(f"codebooks: expected a divisor of {patterns.shape[1]} patterns an output, got {codebooks}")
    _check_kernel_count(kernels, values, outputs * patterns.shape[1] // codebooks, patterns.shape[2])
    rounds = _to_count("rounds", rounds)

    _, exponent = np.frexp(np.abs(w).max())  # a fit near 1, where no square overflows or vanishes
    index, sign, found, scale = _fit(np.ldexp(patterns, -exponent), kernels, values, codebooks, rounds)
    shape = (codebooks, kernels, pattern_channels, *filter_size)
    largest = float(np.finfo(np.float32).max) * (1 - 2.0**-22) / max(1.0, float(np.abs(found).max()))
    with np.errstate(over="ignore"):
        scale = np.minimum(np.ldexp(scale, exponent), np.float32(largest))  # times any kernel all is finite
    return KernelCodebook(index.astype(np.uint8), sign, found.reshape(shape), scale)


def _fit(
    patterns: Floats, kernels: int, values: str, codebooks: int, rounds: int
) -> tuple[NDArray[np.intp], NDArray[np.int8], Floats, Floats]:
    """Return index (O, J), sign (O, J), kernels (C, U, D) and scale (O,)."""
    outputs, count, size = patterns.shape
    parts = [np.ascontiguousarray(part).reshape(-1, size) for part in np.split(patterns, codebooks, axis=1)]
    scale = _begin_scale(patterns, values)
    found = np.stack([_begin_kernels(part, _repeat(scale, part), kernels, values) for part in parts])
    total, best_error = float(np.einsum("ojd,ojd->", patterns, patterns, dtype=np.float64)), np.inf
    for left in reversed(range(rounds)):
        index, product = np.empty((codebooks, outputs, count // codebooks), np.intp), np.empty_like(patterns[..., 0])
        product = product.reshape(codebooks, outputs, -1)
        for c, part in enumerate(parts):
            chosen, products = _assign(part, _repeat(scale, part), found[c])
            index[c], product[c] = chosen.reshape(outputs, -1), products.reshape(outputs, -1)
        norms = np.stack([squares[i] for squares, i in zip((found**2).sum(axis=2), index, strict=True)])
        energy = norms.sum(axis=(0, 2), dtype=np.float64)
        explained = np.abs(product).sum(axis=(0, 2), dtype=np.float64)
        best = np.divide(explained, energy, out=np.zeros_like(energy), where=energy > 0)
        scale = best.astype(np.float32)
        error = total - float((explained * best).sum())
        if left == 0 or error > best_error * (1 - SETTLED):
            break
        best_error = error
        for c, part in enumerate(parts):
            found[c] = _update(part, _repeat(scale, part), index[c].ravel(), product[c].ravel(), found[c], values)
    sign = np.where(product < 0, np.int8(-1), np.int8(1))
    return np.hstack(list(index)), np.hstack(list(sign)), found, scale


def _begin_scale(patterns: Floats, values: str) -> Floats:
    """Return the scale (O,) that would be best if there were every kernel."""
    rows = np.abs(patterns.reshape(len(patterns), -1))
    if values == "ternary":  # as `ternary`
        kept = rows > 0.7 * rows.mean(axis=1, keepdims=True)
        scale = (rows * kept).sum(axis=1) / np.maximum(kept.sum(axis=1), 1)
    else:
        scale = rows.mean(axis=1)
    return np.asarray(scale, np.float32)


def _begin_kernels(patterns: Floats, scale: Floats, kernels: int, values: str) -> Floats:
    """Choose among projected patterns, again and again, the one that lessens the error most; (U, D)."""
    rng = np.random.default_rng(0)
    sample = rng.permutation(len(patterns))[: max(SAMPLED_PATTERNS, kernels)]
    patterns, scale = patterns[sample], scale[sample]
    candidates, counts = np.unique(_project(patterns, scale, values), axis=0, return_counts=True)
    commonest = np.argsort(-counts, kind="stable")
    if len(candidates) > CANDIDATES and counts[commonest[0]] == 1:
        commonest = rng.permutation(len(candidates))
    candidates = candidates[commonest[: max(CANDIDATES, kernels)]]

    gain = np.abs(patterns @ candidates.T) * (2 * scale[:, None])
    gain -= scale[:, None] ** 2 * (candidates**2).sum(axis=1)
    explained = np.zeros(len(patterns), np.float32)
    chosen: list[int] = []
    for _ in range(min(kernels, len(candidates))):
        further = np.maximum(gain - explained[:, None], 0).sum(axis=0)
        further[chosen] = -1
        chosen.append(int(further.argmax()))
        explained = np.maximum(explained, gain[:, chosen[-1]])
    first: Floats = candidates[np.resize(chosen, kernels)]
    return first


def _assign(patterns: Floats, scale: Floats, kernels: Floats) -> tuple[NDArray[np.intp], Floats]:
    """Return for each pattern (n, D) the nearest kernel up to sign, and their product."""
    half_norms = 0.5 * (kernels**2).sum(axis=1)
    index, product = np.empty(len(patterns), np.intp), np.empty(len(patterns), np.float32)
    step = max(1, BLOCK // len(kernels))
    for block in (slice(i, i + step) for i in range(0, len(patterns), step)):
        products = patterns[block] @ kernels.T
        index[block] = (np.abs(products) - scale[block, None] * half_norms).argmax(axis=1)
        product[block] = np.take_along_axis(products, index[block, None], axis=1)[:, 0]
    return index, product


def _update(
    patterns: Floats, scale: Floats, index: NDArray[np.intp], product: Floats, kernels: Floats, values: str
) -> Floats:
    """Return the best kernels for this assignment, and where one has no patterns a badly served pattern."""
    weight = np.where(product < 0, -scale, scale)
    sums = np.stack([np.bincount(index, weight * x, len(kernels)) for x in patterns.T], axis=1)
    weights = np.bincount(index, scale**2, len(kernels))
    used = weights > 0
    kernels = kernels.copy()
    kernels[used] = _project(sums[used] / weights[used, None], np.ones(int(used.sum())), values)
    unused = np.flatnonzero(~used)
    if unused.size:
        gain = scale * (2 * np.abs(product) - scale * (kernels**2).sum(axis=1)[index])
        error = np.where(scale > 0, (patterns**2).sum(axis=1) - gain, -1)
        worst = np.argsort(-error, kind="stable")[: unused.size]
        kernels[unused[: worst.size]] = _project(patterns[worst], scale[worst], values)
    return kernels


def _project(vectors: NDArray[Any], scale: NDArray[Any], values: str) -> Floats:
    """Return the nearest kernel to each of ``vectors / scale``, its first nonzero value positive."""
    normalized = vectors / np.where(scale > 0, scale, 1)[:, None]
    if values == "sign":
        projected = np.where(normalized < 0, -1, 1)
    elif values == "ternary":
        projected = np.clip(np.rint(normalized), -1, 1)
    else:
        projected = normalized
    first = np.take_along_axis(projected, (projected != 0).argmax(axis=1)[:, None], axis=1)
    return np.asarray(np.where(first < 0, -projected, projected) + 0.0, np.float32)


def _repeat(scale: Floats, part: Floats) -> Floats:
    return np.repeat(scale, len(part) // len(scale))


def _to_count(name: str, value: Any) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected int, got {type(value).__name__}") from None
    if count < 1:
        raise ValueError(f"{name}: expected a positive number, got {count}")
    return count


def _check_kernel_count(kernels: Any, values: str, patterns: int, size: int) -> None:
    kernels = _to_count("kernels", kernels)
    if not 2 <= kernels <= MAX_KERNELS:
        raise ValueError(f"kernels: expected 2 to {MAX_KERNELS}, got {kernels}")
    if kernels > patterns:
        raise ValueError(f"kernels: expected at most {patterns}, the patterns of a codebook, got {kernels}")
    different = {"sign": 2 ** (size - 1), "ternary": (3**size + 1) // 2}.get(values, patterns)
    if kernels > different:
        raise ValueError(f"kernels: expected at most {different}, as many {values} kernels there are, got {kernels}")
