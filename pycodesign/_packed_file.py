"""The file of a packed layer: safetensors, with the codes as few bits each and the options as JSON in the metadata."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from pycodesign._arguments import to_integer
from pycodesign._quantized import FewValued, from_arrays, to_arrays
from pycodesign.quantize import KernelCodebook, QuantizedTensor

KEY = "pycodesign"  # the only one of the metadata: safetensors writes several in a random order
FORMAT = "pycodesign packed layer 1"


def encode(q: FewValued, bias: NDArray[np.float32] | None, options: dict[str, Any]) -> bytes:
    """Write a layer's weights, bias and options."""
    tensors: dict[str, NDArray[Any]] = {"scale": q.scale}
    if isinstance(q, KernelCodebook):
        codes, kernels, _ = to_arrays(q)
        tensors |= {"codes": codes, "kernels": kernels}
    else:
        tensors |= {"codes": pack_bits(q.codes, code_bits(q.Q)), "levels": q.levels}
    if bias is not None:
        tensors["bias"] = bias
    return seal(tensors, options | {"shape": q.shape})


def decode(data: bytes) -> tuple[FewValued, NDArray[np.float32] | None, dict[str, Any]]:
    """Read what `encode` wrote; other data raise one of many exceptions, of safetensors, JSON or Python."""
    tensors = safetensors.numpy.load(data)
    size = int.from_bytes(data[:8], "little")
    description = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][KEY])
    if description["format"] != FORMAT:
        raise ValueError(f"format {description['format']!r}, expected {FORMAT!r}")
    options = description["options"]
    if description["sha256"] != compute_digest(tensors, options):
        raise ValueError("its checksum does not match its contents")
    shape = tuple(to_integer("shape", n, 1) for n in options.pop("shape"))
    if "kernels" in tensors:
        q = from_arrays(*(tensors[name] for name in ("codes", "kernels", "scale")))
        if not isinstance(q, KernelCodebook) or q.shape != shape:
            raise ValueError(f"weights of shape {q.shape}, expected a codebook's of {shape}")
        return q, tensors.get("bias"), options
    codes = unpack_bits(tensors["codes"], code_bits(tensors["levels"].shape[-1]), shape)
    return QuantizedTensor(codes, tensors["levels"], tensors["scale"]), tensors.get("bias"), options


def seal(tensors: dict[str, NDArray[Any]], options: Any) -> bytes:
    """Write tensors and options with their checksum."""
    description = {"format": FORMAT, "options": options, "sha256": compute_digest(tensors, options)}
    return bytes(safetensors.numpy.save(tensors, {KEY: json.dumps(description, sort_keys=True)}))


def compute_digest(tensors: dict[str, NDArray[Any]], options: Any) -> str:
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes())
    return digest.hexdigest()


def code_bits(levels: int) -> int:
    """Return how many bits hold a code: as many to a byte as fit."""
    return 1 if levels <= 2 else 2 if levels <= 4 else 4 if levels <= 16 else 8


def pack_bits(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    per_byte = 8 // bits
    padded = np.zeros(-(-codes.size // per_byte) * per_byte, np.uint8)
    padded[: codes.size] = codes.ravel()
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(padded.reshape(-1, per_byte) << shifts, axis=1).astype(np.uint8)
    return packed


def unpack_bits(packed: NDArray[Any], bits: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    size = math.prod(shape)
    if packed.dtype != np.uint8 or packed.shape != (-(-size * bits // 8),):
        raise ValueError(f"codes: expected uint8 ({-(-size * bits // 8)},), got {packed.dtype} {packed.shape}")
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes: NDArray[np.uint8] = (packed[:, None] >> shifts & ((1 << bits) - 1)).astype(np.uint8)
    return codes.ravel()[:size].reshape(shape)
