"""Optimizer states in safetensors files, by the names of parameters."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

try:
    import torch
except ImportError as error:
    raise ImportError("pycodesign.growth.save_optimizer needs torch: `pip install 'pycodesign[torch]'`") from error

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer

from pycodesign.growth.modules import unwrap
from pycodesign.growth.rules import POWERS
from pycodesign.growth.staging import sync

__all__ = ["load_optimizer", "save_optimizer"]

LISTS = ("params", "param_names")  # of a group


def save_optimizer(model: nn.Module, optimizer: Optimizer, directory: str | os.PathLike[str]) -> None:
    """Write an optimizer's state to ``optimizer.safetensors``, from where `grow_checkpoint` can grow it.

    Tensors are called ``state.PARAMETER.KEY``, as in `torch.distributed.checkpoint`; the groups' settings are metadata.

    Parameters
    ----------
    model : torch.nn.Module
        May be in DistributedDataParallel or torch.compile: names are those of the module inside.
    optimizer : torch.optim.Optimizer
        Of the model's parameters.
    directory : path
        That the model is saved in; it exists.

    Raises
    ------
    ValueError
        If the optimizer has other parameters than the model's, or settings that JSON cannot hold.

    Examples
    --------
    >>> import tempfile
    >>> import torch
    >>> from pycodesign import growth
    >>> model = torch.nn.Linear(2, 2)
    >>> adam, directory = torch.optim.AdamW(model.parameters(), lr=0.5), tempfile.mkdtemp()
    >>> growth.save_optimizer(model, adam, directory)
    >>> other = torch.optim.AdamW(model.parameters())
    >>> growth.load_optimizer(model, other, directory)
    >>> other.param_groups[0]["lr"]
    0.5
    """
    names = {id(parameter): name for name, parameter in unwrap(model).named_parameters()}
    tensors, groups = {}, []
    for group in optimizer.param_groups:
        if not all(id(parameter) in names for parameter in group["params"]):
            raise ValueError("optimizer: expected parameters of the model alone, got others")
        settings: dict[str, Any] = {key: _to_plain(value) for key, value in group.items() if key != "params"}
        listed = [names[id(parameter)] for parameter in group["params"]]
        groups.append({**settings, **{key: listed for key in LISTS if key in group}})
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                if value is not None:
                    state = value if isinstance(value, torch.Tensor) else torch.tensor(value)
                    tensors[f"state.{names[id(parameter)]}.{key}"] = state.detach().cpu().contiguous()
    try:
        metadata = {"optimizer": json.dumps({"class": type(optimizer).__name__, "param_groups": groups})}
    except TypeError as error:
        raise ValueError(f"optimizer: expected settings that JSON can hold, got others: {error}") from None
    target = Path(directory) / "optimizer.safetensors"
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        save_file(tensors, temporary, metadata)
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def load_optimizer(model: nn.Module, optimizer: Optimizer, directory: str | os.PathLike[str]) -> None:
    """Read what `save_optimizer` wrote, or `grow_checkpoint` made of it: states, groups and their settings.

    Parameters
    ----------
    model : torch.nn.Module
    optimizer : torch.optim.Optimizer
        Of the class that was saved; its groups are replaced.
    directory : path

    Raises
    ------
    OSError
        If there is no such file.
    ValueError
        If it is damaged, another class's, or has other parameters than the model, or states of other shapes. Nothing
        is changed then.
    """
    parameters = dict(unwrap(model).named_parameters())
    states: dict[str, dict[str, Any]] = {}
    metadata: dict[str, str] = {}
    for file in _list_files(Path(directory)):
        try:
            with safe_open(file, "pt") as tensors:
                metadata |= tensors.metadata() or {}
                for name in tensors.keys():
                    parameter, _, key = name.removeprefix("state.").rpartition(".")
                    states.setdefault(parameter, {})[key] = tensors.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"directory: expected a safetensors file, got a damaged one, {file}: {error}") from None
    try:
        saved = json.loads(metadata["optimizer"])
        kind, unknown = saved["class"], {name for group in saved["param_groups"] for name in group["params"]}
    except (ValueError, KeyError, TypeError):
        raise ValueError("directory: expected the settings that save_optimizer writes, got damaged ones") from None
    if kind != type(optimizer).__name__:
        raise ValueError(f"optimizer: expected {kind} as was saved, got {type(optimizer).__name__}")
    unknown -= parameters.keys()
    if unknown or not states.keys() <= parameters.keys():
        raise ValueError(
            f"model: expected the parameter {min(unknown | (states.keys() - parameters.keys()))}, got none"
        )
    order = {name: number for number, name in enumerate(n for g in saved["param_groups"] for n in g["params"])}
    if ungrouped := states.keys() - order.keys():
        raise ValueError(f"directory: expected states of parameters in groups, got one of {min(ungrouped)}")
    for name, state in states.items():
        for key in state.keys() & POWERS.keys():
            if state[key].shape != parameters[name].shape:
                shapes = tuple(parameters[name].shape), tuple(state[key].shape)
                raise ValueError(f"model: expected {key} of {name} of shape {shapes[0]}, got {shapes[1]}")
    groups, before = [*optimizer.param_groups], optimizer.state
    optimizer.param_groups[:] = [
        {**group, "params": [parameters[name] for name in group["params"]]} for group in saved["param_groups"]
    ]
    try:
        optimizer.load_state_dict(
            {
                "state": {order[name]: state for name, state in states.items()},
                "param_groups": [
                    {**group, "params": [order[name] for name in group["params"]]} for group in saved["param_groups"]
                ],
            }
        )
    except BaseException as error:
        optimizer.param_groups[:], optimizer.state = groups, before
        if isinstance(error, ValueError | KeyError):
            raise ValueError(f"directory: expected a state of {kind}, got another: {error}") from error
        raise


def _to_plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _list_files(directory: Path) -> list[Path]:
    index = directory / "optimizer.safetensors.index.json"
    if index.is_file() and not (directory / "optimizer.safetensors").is_file():
        try:
            return [directory / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"directory: expected an index with a weight_map, got a damaged one, {index}") from None
    return [directory / "optimizer.safetensors"]
