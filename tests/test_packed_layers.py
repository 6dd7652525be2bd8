"""Packed layers as objects: memory layouts, empty results, calls at once, tuning, explanations, other arrays."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import ALGORITHMS, INPUT_DTYPES, ISAS
from layers import (
    F32,
    LAYOUTS,
    Array,
    Case,
    assert_guards_untouched,
    assert_near,
    each_conv2d,
    each_isa,
    each_linear,
    expect,
    guarded,
    input_options,
    make_input,
    make_weights,
    pack,
    run,
)

import pycodesign
from pycodesign import _core, ops, quantize
from pycodesign.quantize import QuantizedTensor
from pycodesign.reference import repetition as reference

# ---- memory layouts --------------------------------------------------------------------------------------------------


@each_conv2d
@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("uint8", "uint8"), ("int8", "int32"), ("uint8", "int8")], ids="-".join
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv2d_layouts(layout: str, dtypes: tuple[str, str], algorithm: str) -> None:
    input_dtype, out_dtype = dtypes
    case = Case((2, 5, 6, 7), (9, 5, 3, 3), {"padding": 1, "stride": (1, 2)})
    packed = pack(case, input_dtype, algorithm)
    epilogue: dict[str, Any] = {"out_dtype": out_dtype}
    if out_dtype in ("uint8", "int8"):
        epilogue |= {"out_scale": 0.07, "out_zero_point": 3}
    plain = make_input(case.x, input_dtype)
    _, x = guarded(case.x, input_dtype, **LAYOUTS[layout])
    x[...] = plain
    shape = (2, 9, 6, 4)
    if out_dtype != "int32":
        added = make_input(shape, "int8" if out_dtype == "int8" else input_dtype, seed=2)
        _, epilogue["residual"] = guarded(shape, added.dtype.name, **LAYOUTS[layout])
        epilogue["residual"][...] = added
    for isa in ISAS:
        pycodesign.set_isa(isa)
        expected = run(plain, packed, **epilogue)
        if input_dtype == "float32":
            assert_near(expected, case, plain, **epilogue)
        else:
            np.testing.assert_array_equal(expected, expect(case, plain, **epilogue))
        buffer, out = guarded(shape, out_dtype, **LAYOUTS[layout])
        assert run(x, packed, **epilogue, out=out) is out
        np.testing.assert_array_equal(out, expected)
        assert_guards_untouched(buffer, out)
    np.testing.assert_array_equal(x, plain)


@each_isa
@each_conv2d
@pytest.mark.parametrize("size", [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33])
def test_nothing_is_written_beside_out(size: int, algorithm: str, isa: str) -> None:
    pycodesign.set_isa(isa)
    case = Case((1, 4, 1, size), (size, 4, 1, 1))
    for dtype, out_dtype in (("float32", "float32"), ("uint8", "uint8"), ("int8", "int32")):
        packed = pack(case, dtype, algorithm)
        scale = {"out_scale": 0.1} if out_dtype == "uint8" else {}
        buffer, out = guarded((1, size, 1, size), out_dtype, spare=0)
        run(make_input(case.x, dtype), packed, out_dtype=out_dtype, out=out, **scale)
        assert_guards_untouched(buffer, out)


LINEAR_LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous, odd start": {"spare": 0},
    "rows apart": {},
    "columns": {"order": (1, 0)},
    "every third": {"steps": (2, 3)},
    "reversed": {"steps": (-1, -1)},
}


@each_isa
@each_linear
@pytest.mark.parametrize("layout", LINEAR_LAYOUTS)
def test_linear_layouts(layout: str, algorithm: str, isa: str) -> None:
    pycodesign.set_isa(isa)
    case = Case((5, 20), (67, 20))
    for dtype, out_dtype in (("float32", "float32"), ("int8", "uint8"), ("uint8", "int32")):
        packed = pack(case, dtype, algorithm)
        epilogue: dict[str, Any] = {"out_dtype": out_dtype} | ({"out_scale": 0.1} if out_dtype == "uint8" else {})
        plain = make_input(case.x, dtype)
        _, x = guarded(case.x, dtype, **LINEAR_LAYOUTS[layout])
        x[...] = plain
        if out_dtype != "int32":
            _, epilogue["residual"] = guarded((5, 67), dtype, **LINEAR_LAYOUTS[layout])
            epilogue["residual"][...] = make_input((5, 67), dtype, seed=3)
        expected = run(plain, packed, **epilogue)
        buffer, out = guarded((5, 67), out_dtype, **LINEAR_LAYOUTS[layout])
        assert run(x, packed, **epilogue, out=out) is out
        np.testing.assert_array_equal(out, expected)
        assert_guards_untouched(buffer, out)


@each_conv2d
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_broadcast_and_read_only_input(dtype: str, algorithm: str) -> None:
    case = Case((3, 6, 5, 4), (7, 6, 3, 3), {"padding": 1})
    packed = pack(case, dtype, algorithm)
    for shape in ((1, 1, 1, 1), (3, 1, 5, 4), (1, 6, 1, 4), (3, 6, 5, 1)):
        x = np.broadcast_to(make_input(shape, dtype), case.x)
        np.testing.assert_array_equal(run(x, packed), run(x.copy(), packed))
    residual = np.broadcast_to(F32(0.5), (3, 7, 5, 4))
    np.testing.assert_array_equal(run(x, packed, residual=residual), run(x, packed, residual=residual.copy()))


# ---- empty results ---------------------------------------------------------------------------------------------------


@each_conv2d
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize(
    ("shape", "result"),
    [
        ((0, 3, 8, 8), (0, 4, 4, 6)),
        ((1, 3, 4, 8), (1, 4, 0, 6)),
        ((2, 3, 8, 2), (2, 4, 4, 0)),
        ((2, 3, 1, 1), (2, 4, 0, 0)),
        ((1, 3, 0, 8), (1, 4, 0, 6)),
        ((0, 3, 0, 0), (0, 4, 0, 0)),
    ],
)
def test_empty_conv2d(shape: tuple[int, ...], result: tuple[int, ...], dtype: str, algorithm: str) -> None:
    packed = pack(Case(shape, (4, 3, 5, 3)), dtype, algorithm)
    y = run(np.zeros(shape, dtype), packed)
    assert y.shape == result and y.dtype == np.float32
    out = np.empty(result, F32)
    assert run(np.zeros(shape, dtype), packed, out=out) is out


@each_linear
@pytest.mark.parametrize("shape", [(0, 6), (0, 3, 6), (2, 0, 6)])
def test_empty_linear(shape: tuple[int, ...], algorithm: str) -> None:
    packed = pack(Case(shape, (5, 6)), "float32", algorithm)
    assert run(np.zeros(shape, F32), packed).shape == (*shape[:-1], 5)
    residual = np.zeros((*shape[:-1], 5), np.int8)
    assert run(np.zeros(shape, F32), packed, residual=residual).shape == (*shape[:-1], 5)


# ---- one packed object -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "algorithm"), [(kind, a) for kind, algorithms in ALGORITHMS.items() for a in algorithms]
)
def test_concurrent_calls(kind: str, algorithm: str) -> None:
    case = Case((1, 7, 9, 9), (20, 7, 3, 3), {"padding": 1}) if kind == "conv2d" else Case((3, 50), (150, 50))
    packed = pack(case, "float32", algorithm)
    shapes = [case.x, (2, 7, 5, 12), (1, 7, 1, 1)] if kind == "conv2d" else [case.x, (50,), (9, 50)]
    inputs = [make_input(shape, "float32", seed) for seed, shape in enumerate(shapes * 2)]
    pycodesign.set_num_threads(1)
    expected = [run(x, packed) for x in inputs]
    pycodesign.set_num_threads(2)
    fresh = pack(case, "float32", algorithm)  # its plans are made by racing calls

    def call(i: int) -> Array:
        return run(inputs[i % len(inputs)], fresh)

    with ThreadPoolExecutor(4) as threads:
        for i, y in enumerate(threads.map(call, range(60))):
            assert y.tobytes() == expected[i % len(inputs)].tobytes()


def test_concurrent_first_calls_tune_once() -> None:
    x = make_input((40,), "uint8")
    q = quantize.ternary(np.random.default_rng(0).standard_normal((30, 40), np.float32))
    expected = ops.linear(x, ops.prepack_linear(q, input_dtype="uint8"), out_dtype="int32")
    packed = ops.prepack_linear(q, input_dtype="uint8", tune=True)
    packed.warmup((0, 40))  # nothing to time yet
    assert not packed.explain()["why"].startswith("measured")
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda _: ops.linear(x, packed, out_dtype="int32"), range(32)))
    assert all(np.array_equal(y, expected) for y in results)
    assert packed.explain()["why"].startswith("measured cold")


def test_packed_layers_own_their_weights() -> None:
    scale = np.ones(3, np.float32)
    q = QuantizedTensor(np.ones((3, 4), np.uint8), np.array([-1, 1], np.float32), scale)
    packed = ops.prepack_linear(q)
    scale[:] = 0
    assert packed.weights().dequantize().max() == ops.linear(np.ones(4, np.float32), packed).max() / 4 == 1


def test_warmup() -> None:
    conv, linear = Case((1, 3, 5, 5), (4, 3, 3, 3)), Case((2, 6), (4, 6))
    pack(conv, "float32", "tables").warmup((2, 3, 9, 9))
    pack(linear, "uint8", "dense").warmup([3, 1, 6])
    with pytest.raises(ValueError, match=r"^x: expected float32 \(N, 3, H, W\), got float32 \(2, 4, 9, 9\)$"):
        pack(conv, "float32", "tables").warmup((2, 4, 9, 9))


@pytest.mark.parametrize("case", [Case((1, 9, 8, 8), (16, 9, 3, 3)), Case((2, 64), (70, 64))], ids=["conv2d", "linear"])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("isa", [ISAS[0], ISAS[-1]])
def test_tune(isa: str, case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "COLD_BYTES", 1 << 16)
    pycodesign.set_isa(isa)
    q, bias = make_weights(case)
    prepack = ops.prepack_conv2d if case.kind == "conv2d" else ops.prepack_linear
    packed = prepack(q, bias, input_dtype=dtype, tune=True, **input_options(dtype))
    x = make_input(case.x, dtype)
    y = run(x, packed)
    why = packed.explain()["why"]
    assert why.startswith("measured cold: ")
    assert [part.split()[0] for part in why.removeprefix("measured cold: ").split(", ")] == sorted(
        set(ALGORITHMS[case.kind]) - {"codebook"} - (set() if _core.generates_code() else {"codegen"})
    )
    np.testing.assert_array_equal(y, run(x, pack(case, dtype, packed.algorithm)))
    np.testing.assert_array_equal(y, run(x, packed))
    assert packed.explain()["why"] == why


def test_results_without_elements_tune_nothing() -> None:
    packed = ops.prepack_conv2d(make_weights(Case((1, 9, 8, 8), (16, 9, 3, 3)))[0], tune=True)
    for shape in ((0, 9, 8, 8), (1, 9, 2, 8)):
        packed.warmup(shape)
        assert not packed.explain()["why"].startswith("measured")
    packed.warmup((1, 9, 3, 3))
    assert packed.explain()["why"].startswith("measured cold: ")


@each_isa
def test_auto_prefers_a_matrix_unit(isa: str) -> None:
    pycodesign.set_isa(isa)
    wide, grouped = (Case((1, 64, 7, 7), (64, 64 // g, 3, 3), {"groups": g}) for g in (1, 32))
    for dtype in INPUT_DTYPES:
        told = pack(wide, dtype, "auto").explain()
        assert (isa == "avx512_amx") == (told["algorithm"] == "dense" and "matrix unit" in told["why"])
        assert "matrix unit" not in pack(grouped, dtype, "auto").explain()["why"]


@pytest.mark.parametrize(("kind", "algorithm"), [(kind, a) for kind, names in ALGORITHMS.items() for a in names])
def test_explain(kind: str, algorithm: str) -> None:
    case = Case((1, 64, 4, 4), (128, 64, 3, 3), kernels=64) if kind == "conv2d" else Case((1, 512), (256, 512))
    packed = pack(case, "float32", algorithm)
    told = packed.explain()
    weights = math.prod(case.w)
    assert (told["kind"], told["algorithm"], told["why"]) == (kind, algorithm, "asked for")
    assert told["dense_ops"] == 2 * weights - case.w[0]
    assert told["float32_bytes"] == 4 * weights
    assert told["share_removed"] == pytest.approx(1 - (told["adds"] + told["multiplies"]) / told["dense_ops"])
    assert (told["share_removed"] == 0) == (algorithm == "dense")
    assert 0 < told["bytes"] < (1.2 if algorithm == "dense" else 0.3) * told["float32_bytes"]
    assert told["seconds"] > 0
    assert (told["isa"], told["threads"]) == (_core.active_isa(), pycodesign.get_num_threads())
    lines = str(told).splitlines()
    assert [line.split()[0] for line in lines] == list(told)
    assert f"{told['dense_ops']:,}" in str(told)


RESNET18 = [
    (64, 3, 7), (64, 64, 3), (128, 64, 3), (128, 128, 3), (256, 128, 3), (256, 256, 3), (512, 256, 3), (512, 512, 3),
    (128, 64, 1), (256, 128, 1), (512, 256, 1),
]  # fmt: skip


@pytest.mark.parametrize(("outputs", "channels", "size"), RESNET18)
def test_ternary_tables_are_an_eighth_of_float32(outputs: int, channels: int, size: int) -> None:
    told = pack(Case((), (outputs, channels, size, size)), "float32", "tables").explain()
    assert told["bytes"] <= told["float32_bytes"] / 8


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (1000, 512)])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_ternary_packed_linear_is_an_eighth_of_float32(shape: tuple[int, int], dtype: str) -> None:
    told = pack(Case((), shape), dtype, "packed").explain()
    assert told["bytes"] <= told["float32_bytes"] / 8


# ---- promises and other arrays ---------------------------------------------------------------------------------------


def test_promised_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((2, 5, 6, 6), (7, 5, 3, 3))
    q, _ = make_weights(case)
    for dtype, low, high in (("uint8", 0, 15), ("int8", -8, 7)):
        packed = ops.prepack_conv2d(q, input_dtype=dtype, input_bits=4)
        x = np.random.default_rng(0).integers(low, high + 1, case.x).astype(dtype)
        np.testing.assert_array_equal(ops.conv2d(x, packed), reference.conv2d(x, q))
        x[1, 2, 3, 4] = high + 1
        ops.conv2d(x, packed)  # may be wrong, does not crash
        monkeypatch.setenv("PYCODESIGN_CHECK", "1")
        with pytest.raises(
            ValueError, match=rf"^x: expected values of 4 bits, {low} to {high}, got {low} to {high + 1}$"
        ):
            ops.conv2d(x, packed)
        x[1, 2, 3, 4] = low
        ops.conv2d(x, packed)
        monkeypatch.delenv("PYCODESIGN_CHECK")


def test_torch_tensors() -> None:
    import torch

    case = Case((2, 5, 6, 7), (9, 5, 3, 3), {"padding": 1})
    packed = pack(case, "float32", "tables")
    x, residual = make_input(case.x, "float32"), make_input((2, 9, 6, 7), "int8")
    expected = run(x, packed, residual=residual)
    given_x = torch.from_numpy(x).to(memory_format=torch.channels_last).requires_grad_()
    y = run(given_x, packed, residual=torch.from_numpy(residual))
    assert isinstance(y, torch.Tensor)
    np.testing.assert_array_equal(y.numpy(), expected)
    out = torch.empty((2, 9, 6, 7))
    assert run(given_x, packed, residual=torch.from_numpy(residual), out=out) is out
    np.testing.assert_array_equal(out.numpy(), expected)
