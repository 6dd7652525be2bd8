"""Tensors in safetensors files, one file or several with an index, read and written one at a time.

Files are read and written, never mapped: mapped pages would count as memory of the process.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np

__all__ = ["Checkpoint", "Tensor", "Writer", "read_checkpoint"]

Array: TypeAlias = Any  # a NumPy array, or a torch tensor where NumPy has no such dtype

NUMPY = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
}
TORCH = {"BF16": "bfloat16"}
BYTES = {**{name: np.dtype(dtype).itemsize for name, dtype in NUMPY.items()}, "BF16": 2}
LONGEST_HEADER = 100 << 20  # as the format has it


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: its elements from byte `start` of `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]

    def read(self) -> Array:
        """Return the tensor, in memory of its own.

        Raises
        ------
        OSError
            If the file has become shorter.
        ModuleNotFoundError
            If it is bfloat16 and torch is not installed.
        """
        raw = np.empty(self.nbytes, np.uint8)
        view, done = raw.data, 0
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(self.start)
            while done < len(view):
                count = stream.readinto(view[done:])
                if not count:
                    raise OSError(f"{self.file}: expected {self.nbytes:,} bytes of {self.name}, got {done:,}")
                done += count
        if self.dtype in NUMPY:
            return raw.view(NUMPY[self.dtype]).reshape(self.shape)
        try:
            import torch
        except ImportError:
            text = f'{self.name}: {TORCH[self.dtype]} tensors need torch: pip install "pycodesign[torch]"'
            raise ModuleNotFoundError(text) from None
        return torch.from_numpy(raw).view(getattr(torch, TORCH[self.dtype])).reshape(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint in the order in which they lie in its files, and the files' metadata."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def read_checkpoint(directory: Path, stem: str) -> Checkpoint | None:
    """Find ``STEM.safetensors``, or the shards that ``STEM.safetensors.index.json`` lists, and read their headers.

    Raises
    ------
    ValueError
        If a file is missing, damaged, or contradicts the index.
    """
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.is_file():
        return _read_header(single)
    if not index.is_file():
        return None
    return _read_shards(index)


def _read_shards(index: Path) -> Checkpoint:
    names = _read_index(index)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in sorted(set(names.values())):
        path = index.parent / file
        if not path.is_file():
            raise ValueError(f"{path}: expected a shard that {index.name} lists, got no file")
        shard = _read_header(path)
        metadata |= shard.metadata
        for name, tensor in shard.tensors.items():
            if names.get(name) != file:
                raise ValueError(f"{path}: expected the tensors that {index.name} lists, got {name} as well")
            tensors[name] = tensor
    for name, file in names.items():
        if name not in tensors:
            raise ValueError(f"{index.parent / file}: expected {name}, which {index.name} lists, got no such tensor")
    return Checkpoint(tensors, metadata)


def _read_index(index: Path) -> dict[str, str]:
    try:
        names = json.loads(index.read_text())["weight_map"]
        plain = all(isinstance(file, str) and Path(file).name == file for file in names.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        plain = False
    if not plain:
        raise ValueError(f"{index}: expected a weight_map from tensors to file names, got something else")
    return dict(names)


def _read_header(file: Path) -> Checkpoint:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else 0
        if not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise ValueError(f"{file}: expected a safetensors file, got a damaged one: no header in {size:,} bytes")
        text = stream.read(length)
    try:
        entries = json.loads(text)
        metadata = dict(entries.pop("__metadata__", None) or {})
        tensors = {name: _parse_entry(file, name, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: expected a safetensors file, got a damaged one: {error}") from None
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != end:
            gap = f"{tensor.name} begins at byte {tensor.start:,}, not {end:,}"
            raise ValueError(f"{file}: expected a safetensors file, got a damaged one: {gap}")
        end += tensor.nbytes
    if end != size:
        raise ValueError(f"{file}: expected {end:,} bytes, got a damaged file of {size:,}")
    return Checkpoint(dict(sorted(tensors.items(), key=lambda item: item[1].start)), metadata)


def _parse_entry(file: Path, name: str, entry: Any, base: int) -> Tensor:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in BYTES:
        raise ValueError(f"{name} is {dtype}, none of {', '.join(BYTES)}")
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name} has shape {shape} at {begin, end}")
    tensor = Tensor(name, file, dtype, shape, base + begin)
    if end - begin != tensor.nbytes:
        raise ValueError(f"{name} has {end - begin:,} bytes for shape {shape} of {dtype}")
    return tensor


class Writer:
    """Files of tensors whose shapes are known, to be filled in any order.

    All of their space is taken from the disk when the writer is made.

    Parameters
    ----------
    directory : path
    stem : str
        Of the files' names.
    tensors : sequence of Tensor
        Names, dtypes and shapes; the places are the writer's.
    metadata : mapping from str to str
        For every file.
    max_shard_bytes : int
        Where a new file begins.
    """

    def __init__(
        self,
        directory: Path,
        stem: str,
        tensors: Sequence[Tensor],
        metadata: Mapping[str, str],
        max_shard_bytes: int,
    ) -> None:
        shards = list(_split(tensors, max_shard_bytes))
        numbered = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        self.files = numbered if len(shards) > 1 else [f"{stem}.safetensors"]
        self.nbytes = 0
        self._places: dict[str, tuple[int, Tensor]] = {}
        weight_map: dict[str, str] = {}
        with ExitStack() as stack:
            for file, shard in zip(self.files, shards, strict=True):
                header, layout = _make_header(directory / file, shard, metadata)
                descriptor = os.open(directory / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                stack.callback(os.close, descriptor)
                nbytes = sum(tensor.nbytes for tensor in layout)
                os.posix_fallocate(descriptor, 0, len(header) + nbytes)
                _write_all(descriptor, memoryview(header), 0)
                self._places |= {tensor.name: (descriptor, tensor) for tensor in layout}
                weight_map |= dict.fromkeys((tensor.name for tensor in layout), file)
                self.nbytes += nbytes
            if len(shards) > 1:
                index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
                self.files.append(f"{stem}.safetensors.index.json")
                (directory / self.files[-1]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
            self._stack = stack.pop_all()
        self._descriptors = {descriptor for descriptor, _ in self._places.values()}

    def write(self, name: str, array: Array) -> int:
        """Write a tensor into its place, and return how many bytes that took."""
        descriptor, tensor = self._places.pop(name)
        if not isinstance(array, np.ndarray):
            import torch

            array = array.contiguous().reshape(-1).view(torch.uint8).numpy()
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if raw.nbytes != tensor.nbytes:
            raise ValueError(f"{name}: expected {tensor.nbytes:,} bytes, got {raw.nbytes:,}")
        _write_all(descriptor, raw.data, tensor.start)
        return raw.nbytes

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files; after success, once they are on the disk."""
        with self._stack:
            if kind is None:
                if self._places:
                    raise ValueError(f"expected every tensor to be written, got none for {min(self._places)}")
                for descriptor in self._descriptors:
                    os.fsync(descriptor)


def _split(tensors: Sequence[Tensor], most: int) -> Iterator[list[Tensor]]:
    shard: list[Tensor] = []
    total = 0
    for tensor in tensors:
        if shard and total + tensor.nbytes > most:
            yield shard
            shard, total = [], 0
        shard.append(tensor)
        total += tensor.nbytes
    yield shard


def _make_header(file: Path, shard: Sequence[Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[Tensor]]:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts = list(accumulate((tensor.nbytes for tensor in shard), initial=0))
    for tensor, (begin, end) in zip(shard, pairwise(starts), strict=True):
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps elements aligned
    base = 8 + len(text)
    layout = [replace(tensor, file=file, start=base + start) for tensor, start in zip(shard, starts, strict=False)]
    return struct.pack("<Q", len(text)) + text, layout


def _write_all(descriptor: int, view: memoryview, position: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], position + done)
