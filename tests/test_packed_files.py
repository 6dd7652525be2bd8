"""Saved layers: what was saved comes back; anything else is a ValueError that names the file, never a crash.

Files are hostile here: cut, with flipped bits, or written by hand, a valid checksum over contents that make no sense.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import stat
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from pycodesign import _packed_file, ops, quantize
from pycodesign.quantize import QuantizedTensor

F32 = np.float32
Tensors = dict[str, NDArray[Any]]
MESSAGE = ": expected a packed layer of pycodesign, got a damaged or foreign file: "


def layer(shape: tuple[int, ...], q: int = 3, *, own: bool = False, groups: int = 0) -> QuantizedTensor:
    rng = np.random.default_rng(q)
    levels = np.arange(q, dtype=F32) - q // 2
    if own:
        levels = np.stack([levels + o for o in range(shape[0])])
    scale = rng.normal(size=(shape[0], groups) if groups else shape[0]).astype(F32)
    return QuantizedTensor(rng.integers(0, q, shape, dtype=np.uint8), levels, scale)


def small_layer() -> ops.Packed:
    return ops.prepack_conv2d(layer((4, 3, 3, 3)), np.arange(4, dtype=F32), padding=1)


def metadata_of(contents: bytes) -> dict[str, str]:
    size = struct.unpack("<Q", contents[:8])[0]
    metadata: dict[str, str] = json.loads(contents[8 : 8 + size])["__metadata__"]
    return metadata


def with_description(tensors: Tensors, description: str) -> bytes:
    return bytes(safetensors.numpy.save(tensors, {_packed_file.KEY: description}))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "layer.safetensors"


@pytest.fixture
def contents(path: Path) -> bytes:
    small_layer().save(path)
    return path.read_bytes()


def assert_refused(path: Path, data: bytes | None = None) -> str:
    """Load, expecting the error that names the file and allocates little; return what it says."""
    if data is not None:
        path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"^{re.escape(str(path) + MESSAGE)}") as caught:
            ops.load_packed(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    return str(caught.value).removeprefix(str(path) + MESSAGE)


# ---- round trip ----------------------------------------------------------------------------------------------------

LAYERS: dict[str, Callable[[], ops.Packed]] = {
    "plain": lambda: ops.prepack_conv2d(layer((5, 3, 3, 3))),
    "every option": lambda: ops.prepack_conv2d(
        layer((6, 2, 3, 2)), np.arange(6, dtype=F32), stride=(2, 1), padding=(1, 3), dilation=(1, 2), groups=2,
        input_dtype="int8", input_scale=1 / 3, input_zero_point=-5, input_bits=7, algorithm="tables",
    ),
    "auto": lambda: ops.prepack_conv2d(layer((64, 32, 3, 3))),
    "levels of each output": lambda: ops.prepack_conv2d(layer((3, 4, 1, 1), own=True)),
    "fractional levels": lambda: ops.prepack_conv2d(
        QuantizedTensor(np.array([[[[0]], [[1]]]], np.uint8), np.array([0.1, 1e-30], F32)[::-1].copy(), np.ones(1, F32))
    ),
    "linear": lambda: ops.prepack_linear(layer((7, 13)), np.ones(7, F32)),
    "linear uint8": lambda: ops.prepack_linear(
        layer((7, 13)), input_dtype="uint8", input_scale=0.02, input_zero_point=255
    ),
    "linear tables": lambda: ops.prepack_linear(layer((7, 13)), algorithm="tables"),
    "linear dense": lambda: ops.prepack_linear(layer((7, 13)), algorithm="dense"),
    "linear scale groups": lambda: ops.prepack_linear(layer((7, 12), groups=4)),
    **{f"{q} levels": lambda q=q: ops.prepack_linear(layer((9, 37), q)) for q in (1, 2, 3, 4, 5, 16, 17, 255, 256)},  # type: ignore[misc]
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_round_trip(name: str, path: Path) -> None:
    packed = LAYERS[name]()
    packed.save(path)
    loaded = ops.load_packed(path)
    assert (loaded.kind, loaded.algorithm) == (packed.kind, packed.algorithm)
    assert loaded.explain()["why"] == packed.explain()["why"]
    before, after = packed.weights(), loaded.weights()
    for attribute in ("codes", "levels", "scale"):
        expected, got = getattr(before, attribute), getattr(after, attribute)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)

    dtype = packed._options["input_dtype"]
    shape = (2, 4, 8, 9) if "every" in name else (2, before.shape[1], 8, 9)
    x = np.random.default_rng(0).normal(0, 40, shape if packed.kind == "conv2d" else (3, before.shape[1])).astype(dtype)
    run = ops.conv2d if packed.kind == "conv2d" else ops.linear
    np.testing.assert_array_equal(run(x, loaded), run(x, packed))

    for layer in (packed, loaded):
        again = path.with_name("again")
        layer.save(again)
        assert again.read_bytes() == path.read_bytes()


def test_a_measured_choice_is_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "COLD_BYTES", 1 << 16)
    for _ in range(3):
        packed = ops.prepack_linear(layer((70, 64)), tune=True)
        packed.warmup((1, 64))
        packed.save(path)
        assert ops.load_packed(path).algorithm == packed.algorithm


@pytest.mark.parametrize(("q", "bits"), [(2, 1), (3, 2), (4, 2), (16, 4), (256, 8)])
def test_codes_take_the_fewest_bits(q: int, bits: int, path: Path) -> None:
    ops.prepack_linear(layer((256, 512), q)).save(path)
    assert path.stat().st_size - 256 * 512 * bits // 8 < 256 * 4 + 4 * q + 1024


def test_a_file_holds_safe_tensors_only(contents: bytes) -> None:
    tensors = safetensors.numpy.load(contents)
    assert {name: tensor.dtype.name for name, tensor in tensors.items()} == {
        "codes": "uint8", "levels": "float32", "scale": "float32", "bias": "float32",
    }  # fmt: skip


# ---- saving --------------------------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_file(path: Path, contents: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    for target, name in ((os, "replace"), (Path, "write_bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail)
            with pytest.raises(OSError, match=r"^disk full$"):
                ops.prepack_linear(layer((7, 13))).save(path)
        assert path.read_bytes() == contents
        assert os.listdir(path.parent) == [path.name]


def test_layers_are_saved_not_pickled(tmp_path: Path) -> None:
    packed = ops.prepack_linear(quantize.ternary(np.eye(4, 6, dtype=np.float32)))
    assert repr(packed) == f"Packed(kind='linear', shape=(4, 6), algorithm={packed.algorithm!r})"
    for fails in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a packed layer cannot be copied or pickled: save it"):
            fails(packed)
    missing = tmp_path / "missing" / "layer.safetensors"
    with pytest.raises(FileNotFoundError) as raised:
        packed.save(missing)
    assert raised.value.filename == str(missing)


def test_saving_replaces(path: Path, contents: bytes) -> None:
    ops.prepack_linear(layer((7, 13))).save(str(path))
    assert ops.load_packed(str(path)).kind == "linear"
    assert os.listdir(path.parent) == [path.name]


def test_a_saved_file_has_the_permissions_of_any_new_file(path: Path, contents: bytes) -> None:
    other = path.with_name("other")
    other.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


# ---- damage --------------------------------------------------------------------------------------------------------


def test_truncated(path: Path, contents: bytes) -> None:
    header = 8 + struct.unpack("<Q", contents[:8])[0]
    lengths = {*range(12), *range(12, len(contents), 41), header - 1, header, header + 1, len(contents) - 1}
    for length in sorted(lengths):
        assert_refused(path, contents[:length])


def test_longer(path: Path, contents: bytes) -> None:
    for tail in (b"\0", b"{}", contents):
        assert_refused(path, contents + tail)


def test_flipped_bits(path: Path, contents: bytes) -> None:
    header = 8 + struct.unpack("<Q", contents[:8])[0]
    positions = {*range(16), *range(16, header, 7), *range(header, len(contents), 3), len(contents) - 1}
    for position in sorted(positions):
        for bit in (0, 5, 7):
            damaged = bytearray(contents)
            damaged[position] ^= 1 << bit
            try:
                assert_refused(path, bytes(damaged))
            except pytest.fail.Exception:
                # a space of the header's padding, or of its JSON: nothing that is read
                assert chr(contents[position]).isspace(), f"bit {bit} of byte {position} went unnoticed"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a layer",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 1 << 40) + b"{}" * 100,
        struct.pack("<Q", 0),
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 3) + b"\xff\xfe{",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 600_000) + b'{"a":' * 100_000 + b" " * 100_000,
        struct.pack("<Q", 20) + b'{"__metadata__": {}}',
        struct.pack("<Q", 19) + b'{"__metadata__": 5}',
    ],
    ids=lambda data: f"{len(data)} bytes {data[:16]!r}",
)
def test_hostile_header(data: bytes, path: Path) -> None:
    assert_refused(path, data)


@pytest.mark.parametrize(
    "codes",
    [
        {"dtype": "U8", "shape": [1 << 60], "data_offsets": [0, 1 << 60]},
        {"dtype": "U8", "shape": [1 << 33, 1 << 33], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": [-4], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]},
        {"dtype": "U8", "shape": [4], "data_offsets": [1 << 63, (1 << 63) + 4]},
        {"dtype": "U8", "shape": "4", "data_offsets": [0, 4]},
        {"dtype": "X9", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": [4]},
        7,
    ],
    ids=str,
)
def test_hostile_tensor(codes: Any, path: Path) -> None:
    description = json.dumps({"format": _packed_file.FORMAT, "options": {}, "sha256": "0" * 64})
    header = json.dumps({"codes": codes, "__metadata__": {_packed_file.KEY: description}}).encode()
    assert_refused(path, struct.pack("<Q", len(header)) + header + b"\0\0\0\0")


# ---- contents that make no sense, behind a valid checksum ----------------------------------------------------------


def forge(contents: bytes, tensors: Tensors | None = None, drop: str = "", **options: Any) -> bytes:
    """Change tensors and options of a saved layer, and sign it."""
    held = json.loads(metadata_of(contents)[_packed_file.KEY])["options"] | options
    kept = safetensors.numpy.load(contents) | (tensors or {})
    kept.pop(drop, None)
    held.pop(drop, None)
    return _packed_file.seal(kept, held)


def test_a_forged_file_can_be_valid(path: Path, contents: bytes) -> None:
    path.write_bytes(forge(contents, padding=[2, 2], algorithm="dense"))
    loaded = ops.load_packed(path)
    assert loaded.algorithm == "dense"
    assert ops.conv2d(np.zeros((1, 3, 1, 1), F32), loaded).shape == (1, 4, 3, 3)


OPTIONS: dict[str, Any] = {
    "shape": [
        None, 5, "4333", [], [4], [4, 27], [4, 3, 3], [4, 3, 3, 3, 1], [4, 3, 3, 4], [4, 3, 3, -3], [4, 3, 3, 0],
        [4, 3, 3, 3.0], [True, 3, 3, 12], [1 << 62, 1 << 62, 1, 1], ["4", 3, 3, 3], [[4], 3, 3, 3], {"4": 4},
    ],
    "stride": [0, -1, [1], [1, 1, 1], "11", 1.5, None, [1, None], [1 << 40, 1], {}, [[1], 1], True],
    "padding": [-1, [0, -1], 1e9, 1 << 62, [1 << 32, 0], "same"],
    "dilation": [0, [1, 0], None, 1 << 33],
    "groups": [0, 3, -1, 1.0, None, "1", [1], 1 << 40, 8, True],
    "input_dtype": ["float64", "", None, 5, [], {}, "FLOAT32"],
    "input_scale": [0, -1, None, "1", [], 1e400, float("nan"), 2.0],
    "input_zero_point": [1, -1, 0.5, None, "0", 1 << 70],
    "input_bits": [4, 0, "8", 1.5],
    "algorithm": ["packed", "Tables", "", None, 1, ["tables"], {}],
    "unknown": [1],
    "q": [1],
    "bias": [[0, 0, 0, 0]],
    "device": ["cuda", "cpu", 0, None],
    "tune": [True, False],
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_hostile_option(option: str, path: Path, contents: bytes) -> None:
    for value in OPTIONS[option]:
        assert_refused(path, forge(contents, **{option: value}))


@pytest.mark.parametrize("option", ["shape", "input_dtype", "codes", "levels", "scale"])
def test_missing_part(option: str, path: Path, contents: bytes) -> None:
    data = forge(contents, drop=option)
    if option == "input_dtype":  # every other option has its default
        path.write_bytes(data)
        ops.load_packed(path)
    else:
        assert option in assert_refused(path, data)


@pytest.mark.parametrize("options", [5, None, [], ["shape"], "text", {}], ids=str)
def test_hostile_options(options: Any, path: Path, contents: bytes) -> None:
    assert_refused(path, _packed_file.seal(safetensors.numpy.load(contents), options))


@pytest.mark.parametrize(
    "text", ["", "5", "null", "[]", '"text"', "{}", "{", "[" * 100_000, '{"options": ' * 50_000, "\0"]
)
def test_hostile_description(text: str, path: Path, contents: bytes) -> None:
    assert_refused(path, with_description(safetensors.numpy.load(contents), text))


TENSORS: dict[str, list[NDArray[Any]]] = {
    "codes": [
        np.zeros(26, np.uint8), np.zeros(28, np.uint8), np.zeros((27, 1), np.uint8), np.zeros(27, np.int8),
        np.zeros(27, F32), np.full(27, 255, np.uint8), np.zeros((), np.uint8), np.zeros(0, np.uint8),
    ],
    "levels": [
        np.zeros(3, F32), np.array([1, 0, -1], F32), np.array([-1, np.nan, 1], F32), np.array([-1, 0, np.inf], F32),
        np.zeros((), F32), np.zeros(0, F32), np.arange(257, dtype=F32), np.arange(3.0), np.arange(3),
        np.zeros((3, 3), F32),
        np.zeros((4, 3, 1), F32), np.zeros((4, 0), F32), np.array([-1, 0, 1], bool),
    ],
    "scale": [
        np.ones(3, F32), np.ones(4), np.ones((4, 1), F32), np.full(4, np.nan, F32), np.full(4, np.inf, F32),
        np.ones((), F32), np.ones(0, F32), np.ones((4, 0), F32), np.ones(4, np.int32),
    ],
    "bias": [np.ones(5, F32), np.ones(4), np.ones((4, 1), F32), np.ones((), F32)],
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_hostile_contents(name: str, path: Path, contents: bytes) -> None:
    for tensor in TENSORS[name]:
        assert_refused(path, forge(contents, {name: tensor}))


def test_an_algorithm_that_cannot_hold_the_weights(path: Path) -> None:
    ops.prepack_linear(layer((5, 6), 17)).save(path)
    contents = path.read_bytes()
    assert "got 17" in assert_refused(path, forge(contents, algorithm="tables"))
    assert "got 17" in assert_refused(path, forge(contents, algorithm="packed"))
    ops.prepack_linear(QuantizedTensor(np.zeros((2, 2), np.uint8), np.array([300], F32), np.ones(2, F32))).save(path)
    contents = path.read_bytes()
    assert "int8" in assert_refused(path, forge(contents, input_dtype="uint8", algorithm="dense"))
    assert "int8" in assert_refused(path, forge(contents, input_dtype="uint8", algorithm="packed"))


def test_unsigned_change(path: Path, contents: bytes) -> None:
    tensors = safetensors.numpy.load(contents)
    tensors["scale"] = tensors["scale"] * 2
    assert "checksum" in assert_refused(path, safetensors.numpy.save(tensors, metadata_of(contents)))


def test_foreign_files(path: Path, contents: bytes) -> None:
    weights = {"weight": np.zeros((4, 4), F32)}
    assert "__metadata__" in assert_refused(path, safetensors.numpy.save(weights))
    assert _packed_file.KEY in assert_refused(path, safetensors.numpy.save(weights, {"format": "pt"}))
    assert "format" in assert_refused(path, with_description(weights, '{"made": "by hand"}'))
    unsigned = json.dumps({"format": _packed_file.FORMAT, "options": {}})
    assert "sha256" in assert_refused(path, with_description(weights, unsigned))
    later = contents.replace(_packed_file.FORMAT.encode(), _packed_file.FORMAT[:-1].encode() + b"9")
    assert "9" in assert_refused(path, later)


def test_the_shipped_example_is_no_packed_layer() -> None:
    shipped = Path(quantize.__file__).parent / "data" / "mnist_ternary.safetensors"
    assert_refused(shipped)


# ---- codebooks -----------------------------------------------------------------------------------------------------

CODES = np.array([[0, 1, 2], [-1, -2, -3]], np.int8)  # two outputs, three channels; ~i is the negative of kernel i
KERNELS = np.arange(27, dtype=F32).reshape(1, 3, 1, 3, 3)


@pytest.fixture
def codebook(path: Path) -> bytes:
    q = _packed_file.from_arrays(CODES, KERNELS, np.ones(2, F32))
    ops.prepack_conv2d(q, np.zeros(2, F32)).save(path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "tensors",
    [
        {"codes": CODES + np.int8(1)},
        {"codes": CODES - np.int8(1)},
        {"codes": CODES.astype(np.int16)},
        {"codes": CODES.astype(F32)},
        {"codes": CODES[:, :2]},
        {"codes": CODES[:1]},
        {"codes": CODES.ravel()},
        {"kernels": KERNELS[:, :2]},
        {"kernels": KERNELS[0]},
        {"kernels": KERNELS[0, :, 0]},
        {"kernels": KERNELS[0, :, 0, 0]},
        {"kernels": KERNELS[:, :, :, :2]},
        {"kernels": KERNELS.astype(np.float64)},
        {"kernels": KERNELS * F32(np.nan)},
        {"kernels": KERNELS.repeat(100, axis=1)},
        {"kernels": KERNELS[:0]},
        {"scale": np.ones(3, F32)},
        {"scale": np.full(2, np.inf, F32)},
    ],
    ids=lambda tensors: " ".join(f"{name} {t.dtype} {t.shape}" for name, t in tensors.items()),
)
def test_hostile_codebook(tensors: Tensors, path: Path, codebook: bytes) -> None:
    ops.load_packed(path)
    assert_refused(path, forge(codebook, tensors))


@pytest.mark.parametrize("shape", [[2, 3, 3, 4], [3, 3, 3, 2], [2, 3, 9], [2, 27], [], None])
def test_codebook_of_another_shape(shape: Any, path: Path, codebook: bytes) -> None:
    assert_refused(path, forge(codebook, shape=shape))
