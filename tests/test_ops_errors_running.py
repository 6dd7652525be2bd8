"""Bad inputs and options of running a layer: each mistake has its full message, and leaves `out` as it was."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_layers import BYTES, ERRORS, FLOAT, LINEAR, QL, X8, XL, XT, YT, Q, X, Y, conv, exactly, lin

import pycodesign
from pycodesign import ops
from pycodesign.quantize import QuantizedTensor

F32 = np.float32
UNALIGNED = np.zeros(301, np.uint8)[1:].view(F32).reshape(1, 3, 5, 5)

RUNNING: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "x as list": (
        X.tolist(), FLOAT, {}, TypeError,
        "x: expected a NumPy array or a torch tensor, got list",
    ),
    "x dtype": (
        X.astype(float), FLOAT, {}, TypeError,
        "x: expected float32 (N, 3, H, W), got float64 (1, 3, 5, 5)",
    ),
    "float x for an integer layer": (
        X, BYTES, {}, TypeError,
        "x: expected uint8 (N, 3, H, W), got float32 (1, 3, 5, 5)",
    ),
    "signed x for an unsigned layer": (
        X8.view(np.int8), BYTES, {}, TypeError,
        "x: expected uint8 (N, 3, H, W), got int8 (1, 3, 5, 5)",
    ),
    "boolean x": (
        X8.view(bool), BYTES, {}, TypeError,
        "x: expected uint8 (N, 3, H, W), got bool (1, 3, 5, 5)",
    ),
    "x of the other byte order": (
        X.astype(">f4"), FLOAT, {}, TypeError,
        "x: expected float32 (N, 3, H, W), got >f4 (1, 3, 5, 5)",
    ),
    "x rank": (
        X[0], FLOAT, {}, ValueError,
        "x: expected float32 (N, 3, H, W), got float32 (3, 5, 5)",
    ),
    "x channels": (
        X[:, :2], FLOAT, {}, ValueError,
        "x: expected float32 (N, 3, H, W), got float32 (1, 2, 5, 5)",
    ),
    "unaligned x": (
        UNALIGNED, FLOAT, {}, ValueError,
        "x: expected elements aligned in memory, got an unaligned view",
    ),
    "x dtype of linear": (
        XT.astype(float), LINEAR, {}, TypeError,
        "x: expected float32 (..., 6), got float64 (2, 3, 6)",
    ),
    "x inputs of linear": (
        XT[..., :5], LINEAR, {}, ValueError,
        "x: expected float32 (..., 6), got float32 (2, 3, 5)",
    ),
    "scalar x of linear": (
        np.array(1, F32), LINEAR, {}, ValueError,
        "x: expected float32 (..., 6), got float32 ()",
    ),
    "residual dtype": (
        X, FLOAT, {"residual": Y.astype(float)}, TypeError,
        "residual: expected float32, uint8 or int8 (1, 4, 3, 3), got float64 (1, 4, 3, 3)",
    ),
    "residual shape": (
        X, FLOAT, {"residual": Y[:, :3]}, ValueError,
        "residual: expected float32, uint8 or int8 (1, 4, 3, 3), got float32 (1, 3, 3, 3)",
    ),
    "residual as number": (
        X, FLOAT, {"residual": 1.0}, TypeError,
        "residual: expected a NumPy array or a torch tensor, got float",
    ),
    "residual dtype of linear": (
        XT, LINEAR, {"residual": YT.astype(np.int32)}, TypeError,
        "residual: expected float32, uint8 or int8 (2, 3, 5), got int32 (2, 3, 5)",
    ),
    "residual shape of linear": (
        XT, LINEAR, {"residual": YT.reshape(6, 5)}, ValueError,
        "residual: expected float32, uint8 or int8 (2, 3, 5), got float32 (6, 5)",
    ),
    "residual scale": (
        X, FLOAT, {"residual": Y, "residual_scale": "a"}, TypeError,
        "residual_scale: expected a number, got str",
    ),
    "residual scale NaN": (
        X, FLOAT, {"residual": Y, "residual_scale": float("nan")}, ValueError,
        "residual_scale: expected a finite float32, got nan",
    ),
    "residual scale beyond float32 of linear": (
        XT, LINEAR, {"residual": YT, "residual_scale": -1e39}, ValueError,
        "residual_scale: expected a finite float32, got -1e+39",
    ),
    "residual zero point": (
        X, FLOAT, {"residual": Y, "residual_zero_point": 0.5}, TypeError,
        "residual_zero_point: expected an integer, got float",
    ),
    "clamp as number": (
        X, FLOAT, {"clamp": 6}, ValueError,
        "clamp: expected a pair (lowest, highest), either may be None, got 6",
    ),
    "clamp the wrong way": (
        X, FLOAT, {"clamp": (6, 0)}, ValueError,
        "clamp: expected lowest <= highest, got (6, 0)",
    ),
    "clamp to NaN": (
        X, FLOAT, {"clamp": (0, float("nan"))}, ValueError,
        "clamp: expected numbers or None, got (0, nan)",
    ),
    "clamp to text": (
        X, FLOAT, {"clamp": "06"}, TypeError,
        "clamp: expected a number, got str",
    ),
    "out_dtype": (
        X, FLOAT, {"out_dtype": "float64"}, ValueError,
        "out_dtype: expected 'float32', 'uint8', 'int8' or 'int32', got 'float64'",
    ),
    "out_dtype as a dtype": (
        X, FLOAT, {"out_dtype": np.dtype("float32")}, ValueError,
        "out_dtype: expected 'float32', 'uint8', 'int8' or 'int32', got dtype('float32')",
    ),
    "exact sums of floats": (
        X, FLOAT, {"out_dtype": "int32"}, ValueError,
        "out_dtype: expected 'float32', 'uint8' or 'int8' for float32 inputs, got 'int32'",
    ),
    "exact sums with residual": (
        X8, BYTES, {"out_dtype": "int32", "residual": Y}, ValueError,
        "out_dtype: 'int32' gives the exact sums; expected no residual and no clamp with it",
    ),
    "exact sums with clamp": (
        X8, BYTES, {"out_dtype": "int32", "clamp": (0, None)}, ValueError,
        "out_dtype: 'int32' gives the exact sums; expected no residual and no clamp with it",
    ),
    "no out_scale": (
        X, FLOAT, {"out_dtype": "uint8"}, ValueError,
        "out_scale: expected a positive number for out_dtype 'uint8', got None",
    ),
    "out_scale of floats": (
        X, FLOAT, {"out_scale": 0.5}, ValueError,
        "out_scale: expected None for out_dtype 'float32', got a number",
    ),
    "negative out_scale": (
        X, FLOAT, {"out_dtype": "uint8", "out_scale": -1}, ValueError,
        "out_scale: expected a positive finite float32, got -1.000000",
    ),
    "infinite out_scale": (
        X, FLOAT, {"out_dtype": "uint8", "out_scale": float("inf")}, ValueError,
        "out_scale: expected a positive finite float32, got inf",
    ),
    "out_zero_point": (
        X, FLOAT, {"out_dtype": "int8", "out_scale": 1, "out_zero_point": 128}, ValueError,
        "out_zero_point: expected a value of int8, got 128",
    ),
    "out_zero_point of floats": (
        X, FLOAT, {"out_zero_point": 1}, ValueError,
        "out_zero_point: expected a value of float32: 0, got 1",
    ),
    "linear layer for conv2d": (
        X, LINEAR, {}, ValueError,
        "packed: expected a Packed conv2d layer, got a linear layer",
    ),
    "weights for a packed layer": (
        X, Q, {}, TypeError,
        "packed: expected a Packed conv2d layer, got QuantizedTensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNNING)
def test_running(name: str) -> None:
    x, packed, options, exception, message = RUNNING[name]
    run = ops.linear if "of linear" in name else ops.conv2d
    shapes = {4: (1, 4, 3, 3), 3: (2, 3, 5), 0: (5,)}
    out = np.full(shapes[np.ndim(x) if run is ops.linear else 4], 7, options.get("out_dtype", "float32"))
    for given in ({}, {"out": out}):
        with pytest.raises(exception, match=exactly(message)):
            run(x, packed, **options, **given)
    assert (out == 7).all()


def test_masked_arrays_are_refused() -> None:
    masked = np.ma.MaskedArray(X, mask=X > 0)
    with pytest.raises(TypeError, match="x: expected a NumPy array or a torch tensor, got MaskedArray"):
        ops.conv2d(masked, FLOAT)
    levels = np.ma.array([-1, np.nan, 1], np.float32, mask=[0, 1, 0])
    with pytest.raises(TypeError, match="levels: expected a NumPy array or a torch tensor, got MaskedArray"):
        QuantizedTensor(np.ones((4, 4), np.uint8), levels, np.ones(4, F32))


def test_torch_tensor_that_is_not_in_host_memory() -> None:
    import torch

    x = torch.empty(1, 3, 5, 5, device="meta")
    with pytest.raises(TypeError, match=r"^x: expected an array in host memory, got a tensor on meta$"):
        ops.conv2d(x, FLOAT)
    with pytest.raises(TypeError, match=exactly("x: expected float32 (N, 3, H, W), got float64 (1, 3, 5, 5)")):
        ops.conv2d(torch.zeros(1, 3, 5, 5, dtype=torch.float64), FLOAT)
    with pytest.raises(TypeError, match=r"^x: expected a dtype that NumPy has, got torch.bfloat16$"):
        ops.conv2d(torch.zeros(1, 3, 5, 5, dtype=torch.bfloat16), FLOAT)


def test_torch_tensors_that_numpy_cannot_view() -> None:
    import torch

    with pytest.raises(TypeError, match=r"^x: expected a strided tensor, got torch.sparse_coo$"):
        ops.linear(torch.zeros(2, 6).to_sparse(), LINEAR)
    x, out = (torch.ones(2, n, dtype=torch.complex64).conj().imag for n in (6, 5))  # negated by a flag
    with pytest.raises(TypeError, match=r"^x: expected a tensor that NumPy can view, got another: .*resolve_neg"):
        ops.linear(x, LINEAR)
    with pytest.raises(TypeError, match=r"^out: expected a tensor that NumPy can view, got another: .*resolve_neg"):
        ops.linear(x.resolve_neg(), LINEAR, out=out)


def test_outputs_too_large_for_memory() -> None:
    packed = conv(Q, padding=1 << 24)
    with pytest.raises(MemoryError):
        ops.conv2d(X, packed)


def test_an_error_in_the_first_call_does_not_end_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "COLD_BYTES", 1 << 16)
    packed = lin(QL, tune=True)
    with pytest.raises(ValueError, match=r"^out_scale: expected None "):
        ops.linear(XL, packed, out_scale=1)
    ops.linear(XL, packed)
    assert packed.explain()["why"].startswith("measured cold: ")


# ---- a packed layer, a file, a setting -----------------------------------------------------------------------------

OTHERS: dict[str, ERRORS] = {
    "warmup rank": (
        lambda: FLOAT.warmup((3, 5, 5)),
        ValueError,
        "x: expected float32 (N, 3, H, W), got float32 (3, 5, 5)",
    ),
    "warmup size": (
        lambda: FLOAT.warmup((1, 3, -1, 5)),
        ValueError,
        "shape: expected an integer >= 0, got -1",
    ),
    "warmup text": (
        lambda: FLOAT.warmup("1355"),  # type: ignore[arg-type]
        TypeError,
        "shape: expected an integer, got str",
    ),
    "warmup number": (
        lambda: FLOAT.warmup(5),  # type: ignore[arg-type]
        TypeError,
        "shape: expected a sequence of integers, got int",
    ),
    "instruction set": (
        lambda: pycodesign.set_isa("sse9"),
        ValueError,
        "name: expected one of scalar, avx2, avx2_vnni, avx512, avx512_vbmi, avx512_amx, got 'sse9'",
    ),
    "no threads": (
        lambda: pycodesign.set_num_threads(0),
        ValueError,
        "n: expected a number from 1 to 4096, got 0",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others(name: str) -> None:
    call, exception, message = OTHERS[name]
    with pytest.raises(exception, match=exactly(message)):
        call()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none"))):
        ops.load_packed(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none"))):
        FLOAT.save(tmp_path / "none" / "layer")
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        ops.load_packed(tmp_path)
