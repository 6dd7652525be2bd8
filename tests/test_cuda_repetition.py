"""Layers on a GPU: what test_repetition.py checks on the CPU, against the reference, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import INPUT_DTYPES, to_codebook
from layers import BINARY, QUATERNARY, TERNARY, Case, expect, input_options, make_input, make_weights, tolerance

from pycodesign import ops, quantize
from pycodesign._arguments import SHORT_FLOATS
from pycodesign.quantize import QuantizedTensor
from pycodesign.reference import repetition as reference

F32 = np.float32
FLOATS = ("float32", *SHORT_FLOATS)
DTYPES = (*INPUT_DTYPES, *SHORT_FLOATS)
SIXTEEN = tuple(range(-8, 8))
MANY = tuple(range(-60, 68))
CASES = {
    "3x3": Case((1, 64, 8, 8), (64, 64, 3, 3), {"padding": 1}),
    "3x3, remainders": Case((2, 17, 7, 5), (33, 17, 3, 3), {"padding": 1}, SIXTEEN),
    "first layer": Case((1, 3, 20, 21), (24, 3, 7, 7), {"stride": 2, "padding": 3}, BINARY),
    "1x1": Case((3, 48, 5, 5), (65, 48, 1, 1), {}, QUATERNARY),
    "strides": Case((1, 33, 11, 9), (8, 33, 3, 2), {"stride": (2, 3), "padding": (0, 1)}, MANY),
    "dilation": Case((1, 20, 12, 12), (17, 20, 3, 3), {"dilation": (2, 3), "padding": 2}, TERNARY),
    "groups": Case((2, 48, 6, 6), (66, 24, 3, 3), {"groups": 2, "padding": 1}, TERNARY),
    "depthwise": Case((1, 12, 9, 9), (12, 1, 3, 3), {"groups": 12, "padding": 1}, SIXTEEN),
    "one pixel": Case((1, 300, 3, 3), (70, 300, 3, 3), {}, TERNARY),
    "no images": Case((0, 5, 4, 4), (3, 5, 3, 3), {}, TERNARY),
    "own levels": Case((1, 19, 6, 6), (20, 19, 3, 3), {"padding": 1}, TERNARY, own_levels=True),
    "one row": Case((200,), (70, 200), {}, TERNARY),
    "rows": Case((3, 5, 130), (33, 130), {}, BINARY),
    "many rows": Case((70, 130), (130, 130), {}, SIXTEEN),
    "no rows": Case((0, 8), (3, 8), {}, TERNARY),
    "scale groups": Case((5, 96), (40, 96), {}, TERNARY, scale_groups=3),
    "scale groups, many rows": Case((40, 96), (40, 96), {}, MANY, scale_groups=3),
    "scale groups in parts": Case((20, 1024), (40, 1024), {}, TERNARY, scale_groups=2),
}


def pack(case: Case, dtype: str, **options: Any) -> ops.Packed:
    q, bias = make_weights(case)
    prepack = ops.prepack_linear if case.kind == "linear" else ops.prepack_conv2d
    return prepack(q, bias, input_dtype=dtype, device="cuda", **input_options(dtype), **case.geometry, **options)


def run(gpu: Any, packed: ops.Packed, x: Any, residual: Any = None, **epilogue: Any) -> Any:
    call = ops.conv2d if packed.kind == "conv2d" else ops.linear
    return gpu.get(call(gpu.put(x), packed, residual=gpu.put(residual), **epilogue))


def bound(case: Case, x: Any) -> Any:
    q, bias = make_weights(case)
    total = reference.abs_bound(x, q, **case.geometry)
    if bias is not None:
        total = total + np.abs(bias).reshape((-1, 1, 1) if case.kind == "conv2d" else (-1,))
    return 4e-6 * total + 1e-9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_sizes(gpu: Any, name: str, dtype: str) -> None:
    case = CASES[name]
    x, packed = make_input(case.x, dtype), pack(case, dtype)
    y, wanted = run(gpu, packed, x), expect(case, x)
    assert y.shape == wanted.shape and y.dtype == F32
    if dtype in SHORT_FLOATS:
        short = run(gpu, packed, x, out_dtype=dtype)
        assert short.dtype == dtype
        np.testing.assert_array_equal(short, y.astype(dtype))  # one rounding
    if dtype in FLOATS:
        assert (np.abs(y - expect(case, x, out_dtype="float64")) <= bound(case, x)).all()
    else:
        np.testing.assert_array_equal(y, wanted)
        np.testing.assert_array_equal(run(gpu, packed, x, out_dtype="int32"), expect(case, x, out_dtype="int32"))


@pytest.mark.parametrize(
    ("residual_dtype", "out_dtype"),
    [
        *product((None, *INPUT_DTYPES), INPUT_DTYPES),
        *((None, dtype) for dtype in SHORT_FLOATS),
        *((dtype, dtype) for dtype in SHORT_FLOATS),
        ("float16", "int8"),
        ("int8", "float16"),
    ],
)
@pytest.mark.parametrize("name", ["3x3, remainders", "rows", "many rows"])
def test_epilogue(gpu: Any, name: str, residual_dtype: str | None, out_dtype: str) -> None:
    case = CASES[name]
    epilogue: dict[str, Any] = {"clamp": (-1.25, 2), "out_dtype": out_dtype}
    if out_dtype not in FLOATS:
        epilogue |= {"out_scale": 0.013, "out_zero_point": 7}
    for dtype in ("int8", "uint8", "float32", "float16"):
        x, packed = make_input(case.x, dtype), pack(case, dtype)
        if residual_dtype is not None:
            epilogue["residual"] = make_input(expect(case, x).shape, residual_dtype, 1)
            epilogue |= {"residual_scale": 0.017, "residual_zero_point": -3}
        y, wanted = run(gpu, packed, x, **epilogue), expect(case, x, **epilogue)
        assert y.dtype == wanted.dtype
        if dtype not in FLOATS:
            np.testing.assert_array_equal(y, wanted)
        elif out_dtype in FLOATS:
            exact = expect(case, x, **epilogue | {"out_dtype": "float64"})
            rounding = {"float32": 0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[out_dtype] * (np.abs(exact) + 1e-3)
            assert (np.abs(y.astype(float) - exact) <= bound(case, x) + 1e-6 + rounding).all()
        else:
            assert (np.abs(y.astype(int) - wanted) <= 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["3x3", "3x3, remainders", "1x1"])
def test_strides(gpu: Any, name: str, dtype: str) -> None:
    case = CASES[name]
    packed, x = pack(case, dtype), make_input(case.x, dtype)
    y = run(gpu, packed, x)
    views = [
        np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        np.repeat(x.transpose(0, 2, 3, 1), 2, axis=2)[:, :, ::2].transpose(0, 3, 1, 2),
        np.concatenate([x, x[:, :1]], axis=1).transpose(0, 2, 3, 1).copy()[..., :-1].transpose(0, 3, 1, 2),
        np.ascontiguousarray(x.transpose(3, 1, 0, 2)).transpose(2, 1, 3, 0),
        np.repeat(x, 2, axis=3)[..., ::2],
    ]
    for view in views:
        np.testing.assert_array_equal(run(gpu, packed, view), y)
    target = gpu.put(np.zeros((*y.shape[:1], *y.shape[2:], y.shape[1]), F32).transpose(0, 3, 1, 2))
    assert ops.conv2d(gpu.put(x), packed, out=target) is target
    np.testing.assert_array_equal(gpu.get(target), y)


def test_rows_into_out(gpu: Any) -> None:
    case = CASES["rows"]
    packed, x = pack(case, "float32"), make_input(case.x, "float32")
    y = run(gpu, packed, x)
    wide = np.zeros((3, 5, 40), F32)
    ops.linear(gpu.put(x), packed, out=gpu.put(wide[..., :33]) if gpu.is_emulated else gpu.put(wide)[..., :33])
    if gpu.is_emulated:
        np.testing.assert_array_equal(wide[..., :33], y)
        assert not wide[..., 33:].any()
    with pytest.raises(ValueError, match="out: expected leading dimensions that flatten"):
        ops.linear(gpu.put(x), packed, out=gpu.put(np.zeros((3, 9, 33), F32))[:, :5])


@pytest.mark.parametrize("dtype", FLOATS)
def test_fractional_levels(gpu: Any, dtype: str) -> None:
    for case in (
        Case((1, 30, 6, 6), (20, 30, 3, 3), {"padding": 1}, (-1.1, 0.3, 0.7)),
        Case((2, 90), (20, 90), {}, tuple(0.1 * i for i in range(-9, 20))),
    ):
        packed, x = pack(case, dtype), make_input(case.x, dtype)
        y = run(gpu, packed, x)
        assert (np.abs(y - expect(case, x, out_dtype="float64")) <= bound(case, x)).all()
        assert "weights in 3 terms" in packed.explain()["why"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [2, 200])
def test_sums_of_one_sign(gpu: Any, dtype: str, rows: int) -> None:
    """Where the matrix unit's truncation adds up."""
    for levels in ((0.3, 0.7), (1.0, 2.0)):
        case = Case((rows, 1200), (20, 1200), {}, levels, bias=False)
        packed, x = pack(case, dtype), np.abs(make_input(case.x, dtype))
        error = np.abs(run(gpu, packed, x) - expect(case, x, out_dtype="float64"))
        assert (error <= 4e-6 * reference.abs_bound(x, make_weights(case)[0])).all()


def test_captures_of_cupy(gpu: Any) -> None:
    """A graph goes on using what its calls allocated: workspace stays, and nothing else is allocated."""
    if gpu.kind != "cupy" or not gpu.is_emulated:
        pytest.skip("needs a CuPy that captures without a graph")
    packed = pack(Case((1, 40, 9, 9), (33, 40, 3, 3), {"padding": 1}), "float32")
    x, index = make_input((1, 40, 9, 9), "float32"), np.array([1, 0])
    expected, cupy = run(gpu, packed, x), sys.modules["cupy"]
    cupy.is_capturing = True
    np.testing.assert_array_equal(run(gpu, packed, x), expected)
    assert len(packed._native._captured) == 1
    linear = pack(CASES["rows"], "float32")
    ops.linear(gpu.put(np.zeros((3, 5, 150), F32))[..., :130], linear)
    rows = gpu.put(np.ones((3, 5), F32))
    deltas = ops.prepack_deltas([np.ones((3, 5), F32)])
    for call, message in [
        (lambda: ops.expand(rows, gpu.put(index.astype(np.int32))), "expected arrays of contiguous elements"),
        (lambda: ops.linear(gpu.put(np.zeros((3, 9, 130), F32))[:, :5], linear), "expected arrays of contiguous"),
        (lambda: ops.expand(rows, index), "out_index: expected a CuPy array on device 0 while a CUDA graph"),
        (lambda: ops.delta_linear(rows, None, deltas), "packed: expected a CuPy array on device 0 while a CUDA graph"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    ops.expand(rows, gpu.put(index))


@pytest.mark.parametrize("dtype", SHORT_FLOATS)
def test_extreme_short_floats(gpu: Any, dtype: str) -> None:
    """Subnormal inputs count, sums may leave the range of the inputs, and results outside of it are infinite."""
    case = Case((3, 40), (5, 40), {}, (-3e-5, 0, 2e5), bias=False)
    packed = pack(case, dtype)
    for value in (ml_dtypes.finfo(dtype).smallest_subnormal, {"float16": 65504, "bfloat16": 1e30}[dtype]):
        x = np.full(case.x, value, dtype)
        y = run(gpu, packed, x)
        error = np.abs(y - expect(case, x, out_dtype="float64"))
        assert (error <= 4e-6 * reference.abs_bound(x, make_weights(case)[0])).all()
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(run(gpu, packed, x, out_dtype=dtype), y.astype(dtype))


def test_extreme_floats(gpu: Any) -> None:
    case = Case((1, 4, 3, 3), (5, 4, 3, 3), {"padding": 1}, (-1, 1), bias=False)
    packed = pack(case, "float32")
    x = np.full(case.x, 3e38, F32)
    x[:, 1:] = 0
    np.testing.assert_array_equal(np.isfinite(run(gpu, packed, x * F32(0.05))), True)
    x = make_input(case.x, "float32")
    x[0, 0, 0, 0] = np.inf
    y = run(gpu, packed, x)[0]
    assert not np.isfinite(y[:, :2, :2]).any() and np.isfinite(y[:, 2]).all() and np.isfinite(y[:, :, 2]).all()


def test_no_pixels(gpu: Any) -> None:
    packed = pack(Case((1, 5, 2, 4), (3, 5, 3, 3)), "float32")
    assert run(gpu, packed, np.zeros((1, 5, 2, 4), F32)).shape == (1, 3, 0, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if len(case.levels) <= 16 and case.scale_groups < 2]
)
def test_tables(gpu: Any, name: str, dtype: str) -> None:
    case = CASES[name]
    x, packed = make_input(case.x, dtype), pack(case, dtype, algorithm="tables")
    assert "shared by all outputs" in packed.explain()["why"]
    y = run(gpu, packed, x)
    if dtype in FLOATS:
        assert (np.abs(y - expect(case, x, out_dtype="float64")) <= tolerance(case, x)).all()
    else:
        np.testing.assert_array_equal(y, expect(case, x))


def test_wide_levels(gpu: Any) -> None:
    case = Case((2, 20, 5, 5), (30, 20, 3, 3), {}, (-700, 0, 300))
    x, packed = make_input(case.x, "int8"), pack(case, "int8")
    assert packed.algorithm == "tables"
    np.testing.assert_array_equal(run(gpu, packed, x), expect(case, x))


@pytest.mark.parametrize("algorithm", ["auto", "codebook"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codebook(gpu: Any, dtype: str, algorithm: str) -> None:
    for case in (
        Case((1, 16, 5, 5), (9, 16, 3, 3), {"padding": 1}, BINARY, kernels=6),
        Case((1, 8, 4, 4), (140, 8, 1, 1), {}, BINARY, kernels=40),
    ):
        q, bias = make_weights(case)
        codebook, x = to_codebook(q), make_input(case.x, dtype)
        assert codebook is not None
        options = {"input_dtype": dtype, "algorithm": algorithm, **input_options(dtype), **case.geometry}
        packed = ops.prepack_conv2d(codebook, bias, device="cuda", **options)
        assert packed.algorithm == ("dense" if algorithm == "auto" else algorithm)
        y = run(gpu, packed, x)
        if dtype in FLOATS:
            assert (np.abs(y - expect(case, x, out_dtype="float64")) <= tolerance(case, x)).all()
        else:
            np.testing.assert_array_equal(y, expect(case, x))
    real = quantize.kernel_codebook(np.random.default_rng(0).normal(size=(12, 6, 3, 3)), kernels=40, values="real")
    x = make_input((1, 6, 7, 7), "float32")
    y = run(gpu, ops.prepack_conv2d(real, device="cuda", algorithm=algorithm), x)
    np.testing.assert_allclose(y, reference.conv2d(x, real), rtol=0, atol=1e-4)


def test_torch_operators(gpu: Any) -> None:
    from pycodesign import nn
    from pycodesign.nn import ops as torch_ops

    if gpu.kind != "torch":
        pytest.skip("operators take tensors")
    for name in ("3x3", "rows"):
        case = CASES[name]
        q, bias = make_weights(case)
        assert bias is not None
        weights = [gpu.put(array) for array in (q.codes, q.levels, q.scale, bias)]
        x = make_input(case.x, "uint8")
        residual = np.abs(expect(case, x)).astype(F32)
        options = {"clamp": [0, 3], **input_options("uint8"), **case.geometry, "input_dtype": "uint8"}
        arguments = gpu.put(x), *weights, gpu.put(residual), json.dumps(options)
        wanted = expect(case, x, residual=residual, clamp=(0, 3))
        np.testing.assert_array_equal(gpu.get(torch_ops.run_on_device(case.kind, *arguments)), wanted)
        if not gpu.is_emulated:
            operator = getattr(torch.ops.pycodesign, case.kind)
            np.testing.assert_array_equal(gpu.get(operator(*arguments)), wanted)
        kind = nn.Conv2d if case.kind == "conv2d" else nn.Linear
        for dtype in SHORT_FLOATS:
            given = gpu.put(make_input(case.x, dtype))
            layer = kind.from_quantized(q, bias, input_dtype=dtype, out_dtype=dtype, **case.geometry).to(given.device)
            weights = [layer.codes, layer.levels, layer.scale, layer.bias, None, layer.options_json]
            y = torch_ops.run_on_device(case.kind, given, *weights) if gpu.is_emulated else layer(given)
            call = ops.conv2d if case.kind == "conv2d" else ops.linear
            assert torch.equal(y, call(given, pack(case, dtype), out_dtype=dtype))
            fake = torch_ops.fake_conv2d if case.kind == "conv2d" else torch_ops.fake_linear
            assert fake(given, *weights).dtype == y.dtype == given.dtype
            assert torch.equal(torch_ops.cast_layer(case.kind, given.float(), *weights)[0], given)  # for autocast


def test_explain_and_files(gpu: Any, tmp_path: Path) -> None:
    case = CASES["3x3"]
    packed = pack(case, "uint8")
    packed.warmup(case.x)
    explanation = packed.explain()
    assert explanation["algorithm"] == "dense" and explanation["device"] == "cuda:0"
    assert "2-bit codes unpacked in registers" in explanation["why"]
    assert "pixels a block" in explanation["blocks"][case.x]
    assert explanation["bytes"] < explanation["float32_bytes"] / 10
    packed.save(tmp_path / "layer")
    x = make_input(case.x, "uint8")
    again = ops.load_packed(tmp_path / "layer", device="cuda")
    np.testing.assert_array_equal(run(gpu, again, x), run(gpu, packed, x))
    on_cpu = ops.load_packed(tmp_path / "layer")
    np.testing.assert_array_equal(ops.conv2d(x, on_cpu), run(gpu, packed, x))


def test_refusals(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["3x3"]
    q, _ = make_weights(case)
    with pytest.raises(ValueError, match="algorithm: expected 'auto', 'dense', 'tables' or 'codebook' on a GPU"):
        ops.prepack_conv2d(q, device="cuda", algorithm="codegen")
    with pytest.raises(ValueError, match="algorithm: expected a KernelCodebook for 'codebook'"):
        ops.prepack_conv2d(q, device="cuda", algorithm="codebook")
    many = QuantizedTensor(np.arange(200, dtype=np.uint8)[:, None], np.arange(200, dtype=F32), np.ones(200, F32))
    with pytest.raises(ValueError, match="algorithm: expected at most 128 distinct patterns of inputs for 'tables'"):
        ops.prepack_linear(many, device="cuda", algorithm="tables")
    with pytest.raises(ValueError, match="tune: expected False on a GPU"):
        ops.prepack_conv2d(q, device="cuda", tune=True)
    with pytest.raises(ValueError, match="device: expected None, 'cpu', 'cuda' or 'cuda:0', got 'rocm'"):
        ops.prepack_conv2d(q, device="rocm")
    with pytest.raises(ValueError, match="device: expected 0 to"):
        ops.prepack_conv2d(q, device="cuda:99")
    with pytest.raises(ValueError, match="device: expected an integer <= "):
        ops.prepack_conv2d(q, device=f"cuda:{10**20}")
    with pytest.raises(ValueError, match="device: expected None, 'cpu', 'cuda' or 'cuda:0', got 'cuda:'"):
        ops.prepack_conv2d(q, device="cuda:")
    depthwise = QuantizedTensor(np.zeros((65536, 1, 1, 1), np.uint8), np.array([1], F32), np.ones(65536, F32))
    with pytest.raises(ValueError, match="groups: expected at most 65535 on a GPU, got 65536"):
        ops.prepack_conv2d(depthwise, device="cuda", groups=65536)
    wide = QuantizedTensor(np.zeros((1, 1), np.uint8), np.array([200], F32), np.ones(1, F32))
    with pytest.raises(ValueError, match="q: expected levels from -128 to 127 for 'dense'"):
        ops.prepack_linear(wide, device="cuda", input_dtype="int8", algorithm="dense")
    with pytest.raises(ValueError, match="input_dtype: expected 'float32', 'uint8' or 'int8', got 'float16'"):
        ops.prepack_conv2d(q, input_dtype="float16")
    with pytest.raises(ValueError, match="expected 'float32', 'uint8', 'int8', 'float16' or 'bfloat16', got 'float64'"):
        ops.prepack_conv2d(q, device="cuda", input_dtype="float64")
    with pytest.raises(ValueError, match="input_bits: expected their defaults for bfloat16 inputs, got others"):
        ops.prepack_conv2d(q, device="cuda", input_dtype="bfloat16", input_bits=4)
    short = pack(case, "float16")
    with pytest.raises(TypeError, match=re.escape("x: expected float16 (N, C, H, W), got float32 (1, 64, 8, 8)")):
        ops.conv2d(gpu.put(np.zeros(case.x, F32)), short)
    with pytest.raises(ValueError, match=r"out_dtype: expected .* for float16 inputs, got 'int32'"):
        ops.conv2d(gpu.put(np.zeros(case.x, np.float16)), short, out_dtype="int32")
    short.save(tmp_path / "short")
    with pytest.raises(ValueError, match=r"^device: expected a GPU for a layer of float16 inputs, got none$"):
        ops.load_packed(tmp_path / "short")
    assert "float16 inputs" in ops.load_packed(tmp_path / "short", device="cuda").explain()["why"]
    packed = pack(case, "float32", algorithm="dense")
    with pytest.raises(ValueError, match="packed: expected a layer in host memory for a chain, got one on cuda:0"):
        packed.to_chain()
    with pytest.raises(TypeError, match="x: expected an array on cuda:0, where packed is, got one in host memory"):
        ops.conv2d(np.zeros(case.x, F32), packed)
    with pytest.raises(TypeError, match=re.escape("x: expected float32 (N, C, H, W), got int8 (1, 64, 8, 8)")):
        ops.conv2d(gpu.put(np.zeros(case.x, np.int8)), packed)
    with pytest.raises(ValueError, match=re.escape("x: expected (N, 64, H, W)")):
        ops.conv2d(gpu.put(np.zeros((1, 5, 8, 8), F32)), packed)
    with pytest.raises(
        ValueError, match=re.escape("residual: expected float32, uint8, int8, float16 or bfloat16 (1, 64, 8, 8)")
    ):
        ops.conv2d(gpu.put(np.zeros(case.x, F32)), packed, residual=gpu.put(np.zeros((1, 64, 8, 7), F32)))
    with pytest.raises(TypeError, match=re.escape("out: expected float32 (1, 64, 8, 8), got int8")):
        ops.conv2d(gpu.put(np.zeros(case.x, F32)), packed, out=gpu.put(np.zeros((1, 64, 8, 8), np.int8)))
    with pytest.raises(ValueError, match=re.escape("x: expected float32 (N, C, H, W), got float32 (64, 8)")):
        packed.warmup((64, 8))
    with pytest.raises(ValueError, match=re.escape("x: expected float32 (..., 200), got float32 ()")):
        pack(CASES["one row"], "float32").warmup(())
    x = gpu.put(np.zeros(case.x, F32))
    with pytest.raises(ValueError, match="out: expected memory apart from x"):
        ops.conv2d(x, packed, out=x)
    if gpu.kind == "torch":
        with pytest.raises(TypeError, match="x: expected a tensor as it lies in memory, got a view with a sign"):
            ops.conv2d(torch.complex(x, x).conj().imag, packed)
        with pytest.raises(TypeError, match=r"residual: expected a dense tensor, got one of layout torch\.sparse_coo"):
            ops.conv2d(x, packed, residual=x.to_sparse())
    if gpu.kind == "torch":
        monkeypatch.setenv("PYCODESIGN_CHECK", "1")
        narrow = pack(case, "uint8", input_bits=4)
        with pytest.raises(TypeError, match=re.escape("x: expected uint8 (N, C, H, W), got float32 (1, 64, 8, 8)")):
            ops.conv2d(x * torch.nan, narrow)
        with pytest.raises(ValueError, match="x: expected values of 4 bits, 0 to 15, got 0 to 16"):
            ops.conv2d(torch.arange(17, dtype=torch.uint8).repeat(1, 64, 8, 8)[..., :17].to(gpu.put(x).device), narrow)
