"""Tasks as files: small, bound to their backbone, and checked as a whole before anything is made of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pycodesign.sharing.components import Task, TaskSpec
from pycodesign.sharing.deltas import KINDS, describe_tensor, load_checked, make_delta
from pycodesign.sharing.encoders import PROJECTIONS, Encoder
from pycodesign.sharing.masks import find_rank

__all__ = [
    "compute_digest",
    "describe",
    "encode_task",
    "list_tensors",
    "make_task",
    "read_task",
    "read_tensors",
    "write_files",
]

FORMAT = "pycodesign.sharing"
VERSION = "2"


def encode_task(name: str, task: Task, backbone: str) -> bytes:
    """Return a file of a task's parameters and what it is.

    Raises
    ------
    ValueError
        If its mask is not selected, or values are not finite.
    """
    if not task.is_selected:
        raise ValueError(f"{name}: expected a mask chosen by select_mask, got deltas without entries")
    tensors = list_tensors(name, task)
    return save(tensors, describe(task, backbone, tensors))


def list_tensors(name: str, task: Task) -> dict[str, Tensor]:
    """Return a task's state in host memory, its floats, which must be finite, as float32."""
    tensors = {}
    for key, value in task.state_dict().items():
        tensor = value.detach().cpu()
        tensors[key] = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
        if not bool(torch.isfinite(tensors[key]).all()):
            raise ValueError(f"{name}: expected finite values, got others in {key}")
    return tensors


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write files, which appear whole, and all of them or, if one cannot be written, none."""
    for path in contents:
        if path.is_dir():
            raise IsADirectoryError(f"path: expected to write the file {path}, got a folder there")
    temporaries = {path: path.with_name(f".{path.name}.{uuid.uuid4().hex}") for path in contents}
    olds = {path: Path(f"{temporaries[path]}.old") for path in contents if os.path.lexists(path)}
    try:
        for path, content in contents.items():
            temporaries[path].write_bytes(content)
        for path, old in olds.items():
            _keep_file(path, old)
        try:
            for path, temporary in temporaries.items():
                os.replace(temporary, path)
        except BaseException:
            for path in [path for path, temporary in temporaries.items() if not temporary.exists()]:
                if path in olds:
                    os.replace(olds[path], path)
                else:
                    path.unlink()
            raise
    finally:
        for temporary in (*temporaries.values(), *olds.values()):
            temporary.unlink(missing_ok=True)


def _keep_file(path: Path, copy: Path) -> None:
    """Give a file a second name; a copy where the file system, or the file's owner, allows no link."""
    try:
        os.link(path, copy, follow_symlinks=False)
    except OSError:
        shutil.copyfile(path, copy, follow_symlinks=False)


def describe(task: Task, backbone: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the metadata of a task's file of these tensors."""
    spec = json.dumps(asdict(task.spec))
    digest = compute_digest(tensors, spec)
    return {"format": FORMAT, "version": VERSION, "backbone": backbone, "spec": spec, "digest": digest}


def compute_digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Return a SHA-256 over names and values, after a text."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_task(path: Path, encoder: Encoder, backbone: str, dropout: float) -> Task:
    """Read a task, after checking the file against the backbone.

    Raises
    ------
    ValueError
        Naming the file: if it is damaged, of another backbone, or holds other tensors, shapes, dtypes, or indices out
        of range.
    """
    tensors, spec = read_tensors(path, encoder, backbone)
    try:
        return make_task(spec, encoder, tensors, dropout)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_tensors(path: Path, encoder: Encoder, backbone: str) -> tuple[dict[str, Tensor], TaskSpec]:
    """Read a file's tensors, which are not checked yet, and its spec, which is."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a task's file, got none") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a safetensors file, got a damaged one: {error}") from None
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        got = f"{metadata.get('format')!r}, version {metadata.get('version')!r}"
        raise ValueError(f"{path}: expected format {FORMAT!r}, version {VERSION!r}, got {got}")
    if metadata.get("backbone") != backbone:
        wanted = f"a task of the backbone {backbone[:12]}..."
        raise ValueError(f"{path}: expected {wanted}, got one of {str(metadata.get('backbone'))[:12]}...")
    if metadata.get("digest") != compute_digest(tensors, metadata.get("spec", "")):
        raise ValueError(f"{path}: expected the values that were written, got others: a damaged file")
    try:
        return tensors, read_spec(metadata.get("spec", ""), len(encoder.layers))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_spec(text: str, layers: int) -> TaskSpec:
    """Read a spec as `describe` writes it."""
    try:
        fields: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("spec: expected JSON, got other text") from None
    if not isinstance(fields, dict) or set(fields) != set(TaskSpec.__dataclass_fields__):
        raise ValueError(f"spec: expected the fields {', '.join(TaskSpec.__dataclass_fields__)}, got others")
    deltas, asked = fields["deltas"], fields["asked"]
    places = {f"{layer}.{projection}" for layer in range(layers) for projection in PROJECTIONS}
    for own in (deltas, asked):
        if not isinstance(own, dict) or not places.issuperset(own):
            raise ValueError(f"spec: expected deltas of projections in {layers} layers, got {own!r:.200}")
        if any(kind not in KINDS for kind in own.values()):
            raise ValueError(f"spec: expected kinds of deltas {', '.join(KINDS)}, got {own!r:.200}")
    if not deltas.items() <= asked.items():
        raise ValueError(f"spec: expected deltas among those that were asked for, got {deltas!r:.200}")
    return TaskSpec(**fields)


def make_task(spec: TaskSpec, encoder: Encoder, tensors: dict[str, Tensor], dropout: float) -> Task:
    """Make a task of all its tensors, of which those that say how much to allocate are checked before."""
    head, variance = tensors.get("head.weight"), tensors.get("aggregator.norm.running_var")
    wanted = spec.labels, encoder.width * (len(encoder.layers) + 1 if spec.aggregator == "concat" else 1)
    if head is None or tuple(head.shape) != wanted:
        raise ValueError(f"head.weight: expected float32 {wanted}, got {describe_tensor(head)}")
    if variance is not None and variance.dtype == torch.float32 and bool((variance < 0).any()):
        raise ValueError("aggregator.norm.running_var: expected variances of at least 0, got others")
    task = Task(spec, encoder, dropout)
    rest = dict(tensors)
    for place, kind in spec.deltas.items():
        layer, _, projection = place.partition(".")
        prefix = f"deltas.{layer}_{projection}."
        own = {name.removeprefix(prefix): rest.pop(name) for name in list(rest) if name.startswith(prefix)}
        outputs, inputs = encoder.layers[int(layer)].projections[projection].weight.shape
        up, rank = own.get("up"), spec.rank or find_rank((outputs, inputs), spec.density)
        if kind == "low_rank" and up is not None and tuple(up.shape) != (outputs, rank):
            raise ValueError(f"{place}: up: expected float32 ({outputs}, {rank}), got {describe_tensor(up)}")
        try:
            task.deltas[f"{layer}_{projection}"] = make_delta(kind, (outputs, inputs), own)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    for name in ("aggregator", "head"):
        own = {key.removeprefix(f"{name}."): rest.pop(key) for key in list(rest) if key.startswith(f"{name}.")}
        try:
            load_checked(getattr(task, name), own)
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
    if rest:
        raise ValueError(f"{min(rest)}: expected no such tensor, got one")
    with torch.no_grad():
        return task.to(encoder.layers[0].projections["query"].weight.device)
