"""Expansion of weights: each element by its definition.

Published as TripLe (Fu et al., ICCV 2023), which copies the weights of a small network, and its optimizer's states,
into a larger one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def expand(
    w: NDArray[Any],
    out_index: NDArray[Any],
    in_index: NDArray[Any] | None = None,
    *,
    in_scale: NDArray[Any] | None = None,
    out_scale: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Compute ``y[r, c, ...] = (w[out_index[r], in_index[c], ...] * in_scale[c]) * out_scale[r]``; index -1: zeros.

    Parameters
    ----------
    w : array of 1 to 4 dimensions
        float16 is multiplied in float32 and rounded once.
    out_index : integer (R,)
    in_index : integer (C,), optional
    in_scale : (C,), optional
    out_scale : (R,), optional

    Returns
    -------
    array (R, C, ...) of the dtype of `w`

    Examples
    --------
    >>> expand(np.array([[1, 2], [3, 4]]), np.array([1, 0, -1]), np.array([0, 0, 1]))
    array([[3, 3, 4],
           [1, 1, 2],
           [0, 0, 0]])
    """
    if w.ndim == 1:
        return expand(w[:, None], out_index, out_scale=out_scale)[:, 0]
    columns = np.arange(w.shape[1]) if in_index is None else in_index
    y = np.zeros((len(out_index), len(columns), *w.shape[2:]), w.dtype)
    for r, row in enumerate(out_index):
        for c, column in enumerate(columns):
            if row != -1 and column != -1:
                value = w[row, column]
                if in_scale is not None:
                    value = value * in_scale[c]  # a float16 times a float32 is a float32
                if out_scale is not None:
                    value = value * out_scale[r]
                y[r, c] = value
    return y
