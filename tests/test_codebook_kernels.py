"""Layers packed by a codebook: what other algorithms, which test_repetition.py compares with it, cannot hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pycodesign
from pycodesign import _core, ops
from pycodesign.quantize import KernelCodebook
from pycodesign.reference import repetition as reference

F32 = np.float32
Array = NDArray[Any]
EPS = float(np.finfo(F32).eps)


def draw(outputs: int, patterns: int, kernels: int, size: tuple[int, ...], values: str, codebooks: int = 1) -> Any:
    """Any codebook: `size` is (p, kH, kW), or (p,) for linear weights."""
    rng = np.random.default_rng(outputs + kernels)
    shape = codebooks, kernels, *size
    drawn = {
        "sign": lambda: rng.choice([-1, 1], shape),
        "ternary": lambda: rng.integers(-1, 2, shape),
        "integers": lambda: rng.integers(-9, 10, shape),
        "real": lambda: rng.normal(size=shape),
    }[values]()
    return KernelCodebook(
        rng.integers(0, kernels, (outputs, patterns), np.uint8),
        rng.choice(np.array([-1, 1], np.int8), (outputs, patterns)),
        drawn.astype(F32),
        rng.normal(size=outputs).astype(F32),
    )


def make_input(shape: tuple[int, ...], dtype: str) -> Array:
    rng = np.random.default_rng(0)
    if dtype == "float32":
        return rng.normal(size=shape).astype(F32)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max + 1, shape, dtype=dtype)


LAYERS = {
    "real 3x3": ((23, 9, 20, (1, 3, 3), "real"), (2, 9, 11, 13), {"padding": 1}),
    "real 3x3, stride and dilation": (
        (23, 9, 20, (1, 3, 3), "real"),
        (1, 9, 17, 15),
        {"stride": 2, "dilation": (1, 2)},
    ),
    "real, 256 kernels": ((40, 12, 256, (1, 3, 3), "real"), (1, 12, 8, 8), {"padding": 1}),
    "real 7x7": ((9, 4, 6, (1, 7, 7), "real"), (1, 4, 19, 18), {"stride": 2, "padding": 3}),
    "real 1x1 patterns": ((17, 6, 30, (8, 1, 1), "real"), (1, 48, 5, 7), {}),
    "two real codebooks": ((17, 6, 30, (1, 3, 3), "real", 2), (1, 6, 9, 9), {"padding": 1}),
    "groups, three codebooks": ((16, 6, 5, (4, 1, 1), "real", 3), (2, 48, 4, 9), {"groups": 2}),
    "integers": ((20, 7, 25, (1, 3, 3), "integers"), (1, 7, 10, 12), {"padding": 1}),
    "integers, 200 kernels, codebooks": ((20, 8, 200, (1, 3, 3), "integers", 4), (1, 8, 10, 12), {"padding": 1}),
    "ternary patterns": ((20, 3, 40, (5, 1, 1), "ternary"), (1, 15, 6, 6), {}),
    "columns": ((21, 7, 32, (1, 3, 3), "sign"), (2, 7, 13, 11), {"padding": 1}),
    "columns with zeros, two codebooks": ((21, 8, 60, (1, 3, 3), "ternary", 2), (1, 8, 9, 20), {"padding": 2}),
    "columns, strides": ((21, 7, 32, (1, 3, 3), "ternary"), (1, 7, 13, 16), {"stride": (1, 2), "padding": 1}),
    "columns, far apart": ((9, 3, 20, (1, 3, 3), "sign"), (1, 3, 15, 15), {"dilation": 7, "stride": 2, "padding": 3}),
    "columns, groups": ((12, 4, 17, (1, 2, 3), "sign"), (1, 8, 7, 7), {"groups": 2}),
    "columns, 3x2": ((12, 5, 17, (1, 3, 2), "ternary"), (1, 5, 30, 31), {"stride": 3, "padding": (2, 1)}),
    "columns, 2x2": ((12, 5, 9, (1, 2, 2), "ternary"), (3, 5, 5, 5), {"padding": 1}),
}


@pytest.mark.parametrize("isa", _core.supported_isas())
@pytest.mark.parametrize("name", LAYERS)
def test_conv2d(name: str, isa: str) -> None:
    pycodesign.set_isa(isa)
    codebook, shape, geometry = LAYERS[name]
    q = draw(*codebook)
    for dtype in ("float32",) if codebook[4] == "real" else ("float32", "uint8", "int8"):
        inputs = {} if dtype == "float32" else {"input_scale": 0.03, "input_zero_point": 5}
        x = make_input(shape, dtype)
        packed = ops.prepack_conv2d(q, algorithm="codebook", input_dtype=dtype, **inputs, **geometry)
        results = []
        for threads in (1, 2, 3):
            pycodesign.set_num_threads(threads)
            results.append(ops.conv2d(x, packed))
        assert all(y.tobytes() == results[0].tobytes() for y in results)
        if dtype == "float32":
            exact = reference.conv2d(x, q, out_dtype="float64", **geometry)
            terms = np.prod(q.shape[1:])
            bound = (8 * EPS * np.sqrt(terms) + 2 * EPS) * reference.abs_bound(x, q, **geometry)
            assert (np.abs(results[0] - exact) <= bound).all()
        else:
            np.testing.assert_array_equal(results[0], reference.conv2d(x, q, **inputs, **geometry))
        index, sign = packed._native.indices()
        np.testing.assert_array_equal(index, q.index)
        np.testing.assert_array_equal(sign, q.sign)


def test_kernels_share_columns() -> None:
    """Columns are summed once: four of -1 and 1 up to sign; kernels then add three."""
    channels, outputs, kernels = 7, 21, 32
    q = draw(outputs, channels, kernels, (1, 3, 3), "sign")
    told = ops.prepack_conv2d(q, algorithm="codebook").explain()
    assert told["multiplies"] == 0
    assert told["adds"] == channels * (4 * 2 + kernels * 2) + outputs * (channels - 1)
    told = ops.prepack_conv2d(q, algorithm="codebook", stride=2).explain()  # two phases
    assert told["adds"] == channels * (2 * 4 * 2 + kernels * 2) + outputs * (channels - 1)
    told = ops.prepack_conv2d(draw(outputs, channels, kernels, (1, 3, 3), "integers"), algorithm="codebook").explain()
    assert told["adds"] == channels * kernels * 8 + outputs * (channels - 1)
    assert told["multiplies"] == channels * kernels * 9


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_linear(rows: int) -> None:
    q = draw(70, 9, 50, (6,), "real")
    x = make_input((rows, 54), "float32")
    packed = ops.prepack_linear(q)
    assert packed.algorithm == "codebook"
    bound = (8 * EPS * np.sqrt(54) + 2 * EPS) * reference.abs_bound(x, q)
    assert (np.abs(ops.linear(x, packed) - reference.linear(x, q, out_dtype="float64")) <= bound).all()


@pytest.mark.usefixtures("without_matrix_unit")
def test_auto() -> None:
    """Integer kernels take whatever serves codes best; real ones are a codebook."""
    for values, kernels in (("sign", 16), ("ternary", 9)):
        q = draw(64, 32, kernels, (1, 3, 3), values)
        packed = ops.prepack_conv2d(q, padding=1)
        assert packed.algorithm == ("codegen" if _core.generates_code() else "codebook")
        np.testing.assert_array_equal(packed.weights().decode(), q.decode())
    assert ops.prepack_conv2d(draw(64, 32, 16, (1, 3, 3), "real")).algorithm == "codebook"
    assert ops.prepack_linear(draw(64, 32, 16, (8,), "sign")).algorithm == "packed"


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("values", ["sign", "integers"])
def test_auto_reckons_with_the_kernels_values(values: str, dtype: str) -> None:
    """What sums all products is reckoned as for the same weights without a codebook."""
    q = draw(128, 64, 40, (1, 3, 3), values)
    options = {"padding": 1, "input_dtype": dtype, "input_scale": 0.5 if dtype == "uint8" else 1.0}
    packed, codes = (ops.prepack_conv2d(given, **options) for given in (q, q.to_quantized()))
    assert "real" not in packed.explain()["why"]
    if packed.algorithm == "codebook":
        assert packed.explain()["why"].startswith("predicted 0.")
    else:
        assert (packed.algorithm, packed.explain()["why"]) == (codes.algorithm, codes.explain()["why"])


def test_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "COLD_BYTES", 1 << 16)
    q = draw(64, 32, 16, (1, 3, 3), "sign")
    packed = ops.prepack_conv2d(q, padding=1, tune=True)
    x = make_input((1, 32, 7, 7), "float32")
    y = ops.conv2d(x, packed)
    assert "codebook " in packed.explain()["why"] and "dense " in packed.explain()["why"]
    np.testing.assert_array_equal(y, ops.conv2d(x, packed))
    np.testing.assert_array_equal(packed.weights().decode(), q.decode())


@pytest.mark.parametrize(
    ("values", "algorithm"),
    [("sign", "codebook"), ("real", "codebook"), ("sign", "auto"), ("ternary", "tables"), ("ternary", "dense")],
)
def test_saved(values: str, algorithm: str, tmp_path: Path) -> None:
    """Whatever runs, the file holds the codebook: no more bytes, and all algorithms to choose from elsewhere."""
    q = draw(30, 8, 200, (1, 3, 3), values, 2)
    packed = ops.prepack_conv2d(q, np.ones(30, F32), padding=1, algorithm=algorithm)
    packed.save(tmp_path / "layer")
    loaded = ops.load_packed(tmp_path / "layer")
    back = loaded.weights()
    assert isinstance(back, KernelCodebook)
    for name in ("index", "sign", "kernels", "scale"):
        np.testing.assert_array_equal(getattr(back, name), getattr(q, name))
    assert (loaded.algorithm, loaded.explain()["why"]) == (packed.algorithm, packed.explain()["why"])
    x = make_input((1, 8, 7, 7), "float32")
    np.testing.assert_array_equal(ops.conv2d(x, loaded), ops.conv2d(x, packed))


def test_saved_linear(tmp_path: Path) -> None:
    q = draw(30, 8, 20, (8,), "sign")
    packed = ops.prepack_linear(q)
    packed.save(tmp_path / "layer")
    loaded = ops.load_packed(tmp_path / "layer")
    assert isinstance(loaded.weights(), KernelCodebook)
    assert loaded.algorithm == packed.algorithm == "packed"
    x = make_input((3, 64), "float32")
    np.testing.assert_array_equal(ops.linear(x, loaded), ops.linear(x, packed))


def test_packed_size(tmp_path: Path) -> None:
    """One byte a pattern up to 128 kernels, two above, in memory and in a file."""
    for kernels, size in ((128, 1), (129, 2)):
        packed = ops.prepack_conv2d(draw(256, 256, kernels, (1, 3, 3), "sign"), algorithm="codebook")
        packed.save(tmp_path / "layer")
        for found in (packed.explain()["bytes"], (tmp_path / "layer").stat().st_size):
            assert size < found / 256**2 < size + 0.2


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ("real", {"input_dtype": "uint8"}, "q: expected integer kernels for uint8 inputs, got "),
        ("real", {"algorithm": "dense"}, "algorithm: expected 'codebook' for these kernels, got 'dense': "),
        ("real", {"algorithm": "packed"}, "algorithm: expected 'auto', 'codegen', 'tables', 'dense' or 'codebook'"),
        ("sign", {"groups": 3}, "groups: expected a divisor of the 8 outputs, got 3"),
    ],
)
def test_errors(values: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        ops.prepack_conv2d(draw(8, 4, 3, (1, 3, 3), values), **options)
    assert str(error.value).startswith(message)
