"""Bodies on torch's tensors, wherever those are."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from pycodesign.branches.graph import Body, Slice

__all__ = ["find_device", "move_body", "run_tensors", "view_tensor"]


def find_device(device: str | torch.device) -> torch.device:
    """Return a device with its index: that of "cuda" is the current one's now.

    Raises
    ------
    RuntimeError
        For a CUDA device where torch sees none.
    """
    found = torch.device(device)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device: torch sees no CUDA device, got {str(device)!r}; backend='threads' runs on the CPU")
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def view_tensor(values: dict[str, Tensor], piece: Slice) -> Tensor:
    """Return the part of a value that a slice names."""
    return values[piece.value][:, piece.begin : piece.end]


def move_body(body: Body, device: torch.device) -> Body:
    """Return a body whose module, if it is one, is a copy on the device."""
    if device.type == "cpu":
        return body
    if body.arrays != "torch":
        raise ValueError(f"{body.name}: expected a torch module on {device}, got a body of {body.arrays} arrays")
    run = copy.deepcopy(body.run).to(device) if isinstance(body.run, nn.Module) else body.run
    return Body(body.name, run, body.inputs, body.outputs)


def run_tensors(body: Body, values: dict[str, Tensor]) -> None:
    """Run a body on slices of values.

    Raises
    ------
    ValueError
        If it returns other tensors than its outputs are.
    """
    inputs = [view_tensor(values, piece) for piece in body.inputs]
    if body.arrays == "torch":
        with torch.inference_mode():
            results = body.run(*inputs)
    else:
        results = body.run(*[x.numpy() for x in inputs])
    results = list(results) if isinstance(results, (list, tuple)) else [results]
    if len(results) != len(body.outputs):
        raise ValueError(f"{body.name}: expected {len(body.outputs)} results, got {len(results)}")
    for piece, result in zip(body.outputs, results, strict=True):
        part = view_tensor(values, piece)
        if not isinstance(result, (Tensor, np.ndarray)):
            wanted = f"{part.dtype} {tuple(part.shape)}"
            raise TypeError(f"{body.name}: expected to return {wanted}, got {type(result).__name__}")
        result = torch.as_tensor(result)
        if result.shape != part.shape or result.dtype != part.dtype:
            wanted = f"{part.dtype} {tuple(part.shape)}"
            raise ValueError(f"{body.name}: expected to return {wanted}, got {result.dtype} {tuple(result.shape)}")
        part.copy_(result)
