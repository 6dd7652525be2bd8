"""What `convert` did with each layer, and why."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from pycodesign._arguments import SHORT_FLOATS
from pycodesign.nn.modules import Layer
from pycodesign.nn.weights import weight_shape
from pycodesign.ops import Packed

ROWS = "_pycodesign_rows"  # attribute of a module that says which layers it runs, or why it stays


@dataclass
class Row:
    """One layer of a network.

    Attributes
    ----------
    layer : str
        Name of the module.
    kind : str
        Class and shape of the weights.
    runs : str
        Algorithm and dtype of the input; "torch" where the layer was left as it was.
    levels : str
        Number of distinct weight values.
    where : str
        Name of the module that runs it now.
    why : str
        Why this algorithm was chosen, or why the layer was left as it was.
    position : int
        Of the layer in the network.
    """

    layer: str
    kind: str
    runs: str = "torch"
    levels: str = ""
    where: str = ""
    why: str = ""
    position: int = -1

    @property
    def converted(self) -> bool:
        return self.runs != "torch"


class Report(list[Row]):
    """Rows that print as a table; a converted layer that is called several times has one for each call."""

    def __str__(self) -> str:
        names = [field.name for field in fields(Row)[:-1]]
        table = [names, *([getattr(row, name) for name in names] for row in self)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table]
        done = [row for row in self if row.converted]
        layers, calls = len({row.layer for row in self}), len({row.where for row in done})
        count = len({row.layer for row in done})  # one row for each call of a layer
        lines.append(f"{count} of {layers} layers converted, in {calls} call{'s' * (calls != 1)}")
        return "\n".join(map(str.rstrip, lines))


def describe_kind(module: Any) -> str:
    packed = isinstance(module, Layer)
    shape = "x".join(map(str, weight_shape(module.codes, module.levels) if packed else module.weight.shape))
    return f"{type(module).__name__} {shape}"


def describe_packed(row: Row, packed: Packed, where: str) -> Row:
    """Return the row of a layer that was converted."""
    levels = count_levels(packed._levels if packed.algorithm != "codebook" else packed._kernels)
    runs = f"{packed.algorithm}, {packed._options['input_dtype']}"
    return Row(row.layer, row.kind, runs, levels, where, "; ".join(filter(None, [row.why, packed._why])), row.position)


def count_levels(levels: Any) -> str:
    """Name the number of levels, (Q,) or (O, Q), or of a codebook's kernels, (C, U, p) or (C, U, p, kH, kW)."""
    return str(levels.shape[-1]) if levels.ndim < 3 else f"{levels.shape[1]} kernels"


def attach_rows(module: nn.Module, rows: list[Row]) -> None:
    """Leave rows where `report` finds them; they are copied and pickled with the module."""
    module.__dict__[ROWS] = rows


def report(model: nn.Module) -> Report:
    """Say of each convolution and linear layer what `convert` made of it, or why not.

    Parameters
    ----------
    model : torch.nn.Module
        A result of `convert`, or any other.

    Returns
    -------
    Report
        A list of `Row`, which prints as a table.

    Examples
    --------
    >>> import torch, pycodesign
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 300)).eval()
    >>> quantizers = {"0": "ternary", "2": "from_fake_quantized"}
    >>> rows = pycodesign.nn.report(pycodesign.nn.convert(model, quantizers))
    >>> [(row.layer, row.runs, row.levels) for row in rows]
    [('0', 'packed, float32', '3'), ('2', 'torch', '')]
    """
    rows: list[Row] = []
    for name, module in model.named_modules():
        if ROWS in module.__dict__:
            rows += module.__dict__[ROWS]
        elif isinstance(module, Layer):
            rows.append(_describe_layer(name, module))
        elif is_layer(module):
            rows.append(Row(name, describe_kind(module), why="convert has not seen it"))
    return Report(sorted(rows, key=lambda row: row.position))


def _describe_layer(name: str, layer: Layer) -> Row:
    """Return the row of a packed layer that `convert` did not make."""
    row = Row(name, describe_kind(layer), why="convert has not seen it")
    dtype = layer.options.get("input_dtype")
    if dtype in SHORT_FLOATS:  # packed at its first call on a GPU
        return replace(row, runs=f"packed, {dtype}", levels=count_levels(layer.levels), where=name)
    return describe_packed(row, layer.packed(), name)


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
