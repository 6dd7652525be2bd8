"""What a task adds to the weights of one projection: only this is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycodesign.sharing.encoders import Linear

__all__ = ["KINDS", "Delta", "DenseDelta", "LowRankDelta", "RowDelta", "SparseDelta", "describe_tensor", "make_delta"]


class Delta(nn.Module):
    """A difference dW of a weight (O, I), and of its bias.

    Attributes
    ----------
    bias : Parameter (O,), of a `RowDelta` (R,)
    """

    kind: str
    shape: tuple[int, int]
    bias: nn.Parameter

    @property
    def outputs(self) -> Tensor | None:
        """Outputs that can differ, ascending; None for all of them."""
        return None

    def add_to(self, weight: Tensor) -> Tensor:
        """Return W + dW, of the rows in `outputs`; gradients reach this module's parameters alone."""
        raise NotImplementedError

    def pack(self) -> Any:
        """Return dW (O, I) in the form that `ops.prepack_deltas` takes."""
        raise NotImplementedError

    def project(self, linear: Linear, x: Tensor) -> Tensor:
        """Return (W + dW) x + b + db (..., O), or (..., R) with the outputs in `outputs` alone."""
        rows = self.outputs
        bias: Tensor = self.bias
        if linear.bias is not None:
            bias = bias + (linear.bias if rows is None else linear.bias[rows])
        weight = self.add_to(linear.weight)
        return F.linear(x, weight, bias.to(weight.dtype))

    def multiply(self, x: Tensor) -> Tensor:
        """Return dW x + db (..., O), or (..., R) with the outputs in `outputs` alone."""
        return F.linear(x, self.add_to(x.new_zeros(self.shape)), self.bias.to(x.dtype))

    def count_parameters(self) -> int:
        """Count what is trained."""
        return sum(parameter.numel() for parameter in self.parameters())


class SparseDelta(Delta):
    """Entries of dW at fixed places: a vector of values, and nothing else, is trained.

    Parameters
    ----------
    shape : (O, I)
    index : int64 (nnz,)
        Places in C order, ascending.
    """

    kind = "sparse"
    index: Tensor

    def __init__(self, shape: tuple[int, int], index: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("index", index)
        self.values = nn.Parameter(torch.zeros(len(index), dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(shape[0], dtype=torch.float32))

    def add_to(self, weight: Tensor) -> Tensor:
        return weight.flatten().index_add(0, self.index, self.values.to(weight.dtype)).view_as(weight)

    def pack(self) -> Any:
        sparse = import_sparse()
        index = self.index.cpu().numpy()
        places = index // self.shape[1], index % self.shape[1]
        return sparse.coo_array((to_array(self.values), places), shape=self.shape)


class RowDelta(Delta):
    """Whole rows of dW: few outputs of the projection differ, and all others need not be computed again.

    Parameters
    ----------
    shape : (O, I)
    rows : int64 (R,)
        Outputs, ascending.
    """

    kind = "rows"
    rows: Tensor

    def __init__(self, shape: tuple[int, int], rows: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("rows", rows)
        self.values = nn.Parameter(torch.zeros(len(rows), shape[1], dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(len(rows), dtype=torch.float32))

    @property
    def outputs(self) -> Tensor:
        return self.rows

    def add_to(self, weight: Tensor) -> Tensor:
        return weight[self.rows] + self.values.to(weight.dtype)

    def pack(self) -> Any:
        sparse = import_sparse()
        inputs = self.shape[1]
        places = np.repeat(self.rows.cpu().numpy(), inputs), np.tile(np.arange(inputs), len(self.rows))
        return sparse.coo_array((to_array(self.values).ravel(), places), shape=self.shape)


class LowRankDelta(Delta):
    """dW = B A, with B zero at the start; `up` is B (O, r), `down` is A (r, I), as in LoRA."""

    kind = "low_rank"

    def __init__(self, shape: tuple[int, int], rank: int) -> None:
        super().__init__()
        self.shape = shape
        self.up = nn.Parameter(torch.zeros(shape[0], rank, dtype=torch.float32))
        self.down = nn.Parameter(torch.empty(rank, shape[1], dtype=torch.float32))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.bias = nn.Parameter(torch.zeros(shape[0], dtype=torch.float32))

    def add_to(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).to(weight.dtype)

    def project(self, linear: Linear, x: Tensor) -> Tensor:
        return linear(x) + self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype), self.bias.to(x.dtype))

    def pack(self) -> Any:
        return to_array(self.up), to_array(self.down)


class DenseDelta(Delta):
    """All of dW."""

    kind = "dense"

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.values = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(shape[0], dtype=torch.float32))

    def add_to(self, weight: Tensor) -> Tensor:
        return weight + self.values.to(weight.dtype)

    def pack(self) -> Any:
        return to_array(self.values)


KINDS = ("sparse", "rows", "low_rank", "dense")


def make_delta(kind: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Delta:
    """Make a delta of the tensors of its state, which are checked, all of them, before.

    Raises
    ------
    ValueError
        Naming the tensor, what was expected and what came.
    """
    delta: Delta
    if kind == "sparse":
        delta = SparseDelta(shape, _check_index("index", tensors.get("index"), shape[0] * shape[1]))
    elif kind == "rows":
        delta = RowDelta(shape, _check_index("rows", tensors.get("rows"), shape[0]))
    elif kind == "low_rank":
        up = tensors.get("up")
        if up is None or up.ndim != 2 or not up.shape[1]:
            raise ValueError(f"up: expected float32 ({shape[0]}, r), got {describe_tensor(up)}")
        delta = LowRankDelta(shape, up.shape[1])
    elif kind == "dense":
        delta = DenseDelta(shape)
    else:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    load_checked(delta, tensors)
    return delta


def load_checked(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a module after comparing all names, shapes and dtypes; float values must be finite."""
    state = module.state_dict()
    for name in state.keys() | tensors.keys():
        if name not in state:
            raise ValueError(f"{name}: expected no such tensor, got {describe_tensor(tensors[name])}")
        got, wanted = tensors.get(name), state[name]
        if got is None or got.shape != wanted.shape or got.dtype != wanted.dtype:
            raise ValueError(f"{name}: expected {describe_tensor(wanted)}, got {describe_tensor(got)}")
        if got.is_floating_point() and not torch.isfinite(got).all():
            raise ValueError(f"{name}: expected finite values, got others")
    module.load_state_dict(dict(tensors))


def to_array(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a float32 array in host memory."""
    array: np.ndarray[Any, np.dtype[np.float32]] = tensor.detach().float().cpu().contiguous().numpy()
    return array


def import_sparse() -> Any:
    """Import scipy.sparse, which comes with scipy."""
    try:
        from scipy import sparse
    except ImportError:
        raise ModuleNotFoundError("sparse deltas need scipy to be packed: pip install scipy") from None
    return sparse


def _check_index(name: str, index: Tensor | None, size: int) -> Tensor:
    if index is None or index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(f"{name}: expected int64 (n,), got {describe_tensor(index)}")
    if not len(index):
        raise ValueError(f"{name}: expected at least one place, got none: an empty delta")
    if int(index.min()) < 0 or int(index.max()) >= size:
        wrong = int(index.min()) if int(index.min()) < 0 else int(index.max())
        raise ValueError(f"{name}: expected indices from 0 to {size - 1}, got {wrong}")
    if not bool((index.diff() > 0).all()):
        raise ValueError(f"{name}: expected ascending indices, each once, got others")
    return index


def describe_tensor(tensor: Tensor | None) -> str:
    """Return dtype and shape, for messages."""
    return "none" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
