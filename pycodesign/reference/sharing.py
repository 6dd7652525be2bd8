"""Many tasks on one linear layer: each output by its definition.

Published as LeTS (Fu et al., ICML 2021): task n's weights are W + delta_n, so its output is the shared layer's plus
delta_n x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def delta_linear(
    x: NDArray[Any],
    base: NDArray[Any] | None,
    deltas: Sequence[Any],
    *,
    bias: Sequence[NDArray[Any] | None] | None = None,
    tasks: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> NDArray[np.float64]:
    """Compute ``z[n, t, o] = base[t, o] + (bias_n[o] + sum over i of delta_n[o, i] * x[t, i])`` in float64.

    Parameters
    ----------
    x : (T, I), or (N, T, I) with rows for each asked task
    base : (O,), (T, O) or (N, T, O), optional
    deltas : sequence
        For each task a `scipy.sparse` matrix (O, I), a pair of arrays (O, r) and (r, I), an array (O, I), or None.
    bias : sequence of (O,) or None, optional
    tasks : sequence of int, optional
    positions : sequence of int, optional

    Returns
    -------
    float64 (N, T, O), or (N, P, O)

    Examples
    --------
    >>> delta_linear(np.array([[1, 2]]), np.array([[10]]), [np.array([[3, 0]]), np.array([[0, 4]])])
    array([[[13.]],
    <BLANKLINE>
           [[18.]]])
    """
    asked = range(len(deltas)) if tasks is None else tasks
    rows = np.arange(x.shape[-2]) if positions is None else np.array(positions, int)
    outputs = next((d[0] if isinstance(d, tuple | list) else d).shape[0] for d in deltas if d is not None)
    z = np.zeros((len(asked), len(rows), outputs))
    for n, task in enumerate(asked):
        own = (x[n] if x.ndim == 3 else x)[rows].astype(np.float64)
        if deltas[task] is not None:
            z[n] += _multiply(deltas[task], own.T).T
        if bias is not None and bias[task] is not None:
            z[n] += bias[task]
        if base is not None:
            shared = base[n] if base.ndim == 3 else base
            z[n] += shared if shared.ndim == 1 else shared[rows]
    return z


def _multiply(delta: Any, x: NDArray[np.float64]) -> Any:
    if isinstance(delta, tuple | list):
        b, a = delta
        return b.astype(np.float64) @ (a.astype(np.float64) @ x)
    return delta.astype(np.float64) @ x
