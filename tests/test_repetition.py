"""Every algorithm, on every instruction set and thread count of this machine, against the reference.

Integer inputs give equal results. Float inputs are within the bound that `tolerance` derives, with the same bits from
run to run and for every thread count. Sizes sit at the edges of what kernels work in: 4, 8 or 16 lanes of pixels,
blocks of 8 outputs, words of 4 channels, panels of 64 outputs of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from conftest import ALGORITHMS, INPUT_DTYPES, ISAS, THREADS, to_codebook
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layers import (
    BINARY,
    F32,
    QUATERNARY,
    TERNARY,
    Case,
    Record,
    assert_guards_untouched,
    assert_near,
    check,
    each_conv2d,
    each_isa,
    each_linear,
    expect,
    guarded,
    make_input,
    make_weights,
    pack,
    run,
)

import pycodesign
from pycodesign import ops, quantize
from pycodesign.quantize import KernelCodebook, QuantizedTensor
from pycodesign.reference import repetition as reference

# ---- sizes and geometry ----------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    # one pixel, one channel, one output; then each size at its edges, in another place for each
    "1 of each": Case((1, 1, 1, 1), (1, 1, 1, 1)),
    "2 outputs, 1x3 pixels": Case((1, 3, 1, 3), (2, 3, 1, 1)),
    "3 outputs, 1x4 pixels": Case((1, 4, 1, 4), (3, 4, 1, 1)),
    "4 outputs, 1x5 pixels": Case((1, 5, 1, 5), (4, 5, 1, 1), levels=BINARY),
    "5 outputs, 7x1 pixels": Case((1, 7, 7, 1), (5, 7, 1, 1)),
    "7 outputs, 8x1 pixels": Case((1, 8, 8, 1), (7, 8, 1, 1), bias=False),
    "8 outputs, 9x1 pixels": Case((1, 9, 9, 1), (8, 9, 1, 1), levels=QUATERNARY),
    "9 outputs, 15 pixels": Case((1, 13, 3, 5), (9, 13, 1, 1)),
    "13 outputs, 16 pixels": Case((1, 2, 4, 4), (13, 2, 1, 1), levels=BINARY),
    "16 outputs, 17 pixels": Case((1, 16, 1, 17), (16, 16, 1, 1)),
    "17 outputs, 31 pixels": Case((1, 17, 31, 1), (17, 17, 1, 1)),
    "23 outputs, 33 pixels": Case((1, 6, 3, 11), (23, 6, 1, 1), levels=QUATERNARY),
    "3 images, 47 outputs": Case((3, 31, 7, 7), (47, 31, 1, 1)),
    # 3x3
    "3x3": Case((1, 8, 9, 7), (16, 8, 3, 3)),
    "3x3 padded": Case((2, 12, 13, 11), (24, 12, 3, 3), {"padding": 1}),
    "3x3 binary": Case((1, 11, 17, 16), (32, 11, 3, 3), {"padding": 1}, BINARY),
    "3x3 stride 2": Case((2, 7, 14, 15), (9, 7, 3, 3), {"stride": 2, "padding": 1}),
    "3x3 many vectors": Case((1, 16, 29, 37), (40, 16, 3, 3), {"padding": 1}),
    "3x3 on one pixel": Case((1, 5, 1, 1), (6, 5, 3, 3), {"padding": 1}),
    "3x3 on padding": Case((1, 2, 1, 2), (3, 2, 3, 3), {"padding": (3, 4)}),
    # cut into bands of rows, of images; outputs shared by threads
    "bands of rows": Case((1, 10, 83, 47), (30, 10, 3, 3), {"padding": 1}),
    "bands of rows, stride 2": Case((1, 9, 75, 61), (20, 9, 3, 3), {"stride": 2, "padding": 1}, BINARY),
    "bands of rows, two images": Case((2, 8, 41, 33), (12, 8, 5, 3), {"padding": (2, 0)}),
    "bands of images": Case((9, 14, 12, 13), (24, 14, 3, 3), {"padding": 1}),
    "shared outputs": Case((1, 50, 5, 5), (150, 50, 3, 3), {"padding": 1}),
    # strides, paddings, dilations
    "stride beyond kernel": Case((2, 3, 11, 13), (5, 3, 2, 1), {"stride": (4, 3)}),
    "stride 2, 1x1": Case((1, 6, 8, 9), (10, 6, 1, 1), {"stride": 2}),
    "stride (1, 3)": Case((1, 4, 6, 19), (5, 4, 3, 5), {"stride": (1, 3), "padding": (1, 2)}),
    "dilation 2": Case((1, 5, 12, 10), (7, 5, 3, 3), {"dilation": 2, "padding": 2}),
    "dilation and stride": Case(
        (2, 3, 17, 16), (4, 3, 3, 2), {"dilation": (3, 2), "stride": (2, 3), "padding": (4, 1)}
    ),
    "padding beyond kernel": Case((2, 2, 3, 4), (3, 2, 2, 3), {"padding": (5, 4)}),
    "padding, stride 5": Case((1, 3, 7, 2), (4, 3, 3, 3), {"padding": (6, 7), "stride": 5}),
    "kernel as large as input": Case((3, 4, 5, 6), (7, 4, 5, 6)),
    "rectangles": Case((2, 5, 19, 4), (6, 5, 5, 2), {"padding": (0, 1), "stride": (3, 1), "dilation": (2, 1)}),
    "1x7": Case((1, 4, 3, 23), (5, 4, 1, 7), {"padding": (0, 3)}),
    "7x1": Case((1, 4, 23, 3), (5, 4, 7, 1), {"padding": (3, 0)}),
    "7x7 stem": Case((2, 3, 31, 33), (16, 3, 7, 7), {"stride": 2, "padding": 3}),
    # groups
    "2 groups": Case((2, 6, 7, 5), (10, 3, 3, 3), {"groups": 2, "padding": 1}),
    "3 groups of 1 output": Case((1, 15, 6, 6), (3, 5, 3, 3), {"groups": 3}),
    "5 groups of 9 outputs": Case((1, 20, 5, 7), (45, 4, 1, 1), {"groups": 5}),
    "depthwise": Case((2, 17, 9, 8), (17, 1, 3, 3), {"groups": 17, "padding": 1}),
    "depthwise stride 2": Case((1, 8, 11, 11), (8, 1, 5, 5), {"groups": 8, "padding": 2, "stride": 2}, BINARY),
    "depthwise x 3": Case((1, 4, 6, 7), (12, 1, 3, 3), {"groups": 4, "padding": 1}, QUATERNARY),
    # few kernels
    "32 kernels": Case((1, 40, 15, 14), (70, 40, 3, 3), {"padding": 1}, BINARY, kernels=32),
    "32 kernels, stride 2": Case((1, 21, 15, 14), (50, 21, 3, 3), {"padding": 1, "stride": 2}, BINARY, kernels=32),
    "9 ternary kernels": Case((2, 10, 9, 8), (50, 10, 3, 3), {"padding": (0, 2)}, kernels=9),
    "200 kernels": Case((1, 12, 7, 9), (40, 12, 3, 3), {"padding": 1}, QUATERNARY, kernels=200),
    "12 kernels, 7x7": Case((1, 5, 16, 15), (30, 5, 7, 7), {"padding": 3}, kernels=12),
    "8 kernels, groups": Case((1, 12, 9, 9), (34, 6, 2, 3), {"groups": 2, "dilation": 2}, BINARY, kernels=8),
    # matrix units: 64 bytes or 32 bfloat16 at a tap; 16 and 32 outputs, 16 and 32 pixels at a time
    "64 channels": Case((1, 64, 9, 11), (33, 64, 3, 3), {"padding": 1}),
    "128 channels, stride 2": Case((2, 128, 7, 9), (48, 128, 3, 3), {"padding": 1, "stride": 2}, BINARY),
    "64 channels, 1x1": Case((1, 64, 3, 5), (15, 64, 1, 1), levels=QUATERNARY),
    "64 channels, 12 levels": Case((1, 64, 4, 4), (40, 64, 3, 2), {"dilation": (1, 2)}, levels=tuple(range(-6, 6))),
    "64 channels, 40 levels": Case((1, 64, 6, 5), (31, 64, 2, 2), levels=tuple(range(-20, 20))),
    "65 channels, binary": Case((1, 65, 5, 7), (17, 65, 3, 3), {"padding": 1}, BINARY),
    "2 groups of 64 channels": Case((1, 128, 5, 6), (50, 64, 3, 3), {"padding": 1, "groups": 2}),
    "64 channels, per-output levels": Case((1, 64, 5, 6), (37, 64, 3, 3), {"padding": 1}, TERNARY, own_levels=True),
    # rows of channels, where all products are summed, but for bytes without VNNI.
    "96 outputs, 36 channels": Case((2, 36, 9, 10), (96, 36, 3, 3), {"padding": 1}, BINARY),
    "132 channels, 1x1, 25 pixels": Case((1, 132, 5, 5), (64, 132, 1, 1)),
    "rows of one pixel": Case((1, 64, 1, 1), (64, 64, 3, 3), {"padding": 1}, QUATERNARY),
    "rows on padding": Case((2, 60, 2, 3), (30, 60, 3, 3), {"padding": (4, 5), "stride": 2}, BINARY),
    "rows, stride 3, dilation": Case((1, 48, 17, 13), (88, 48, 3, 2), {"padding": 2, "stride": 3, "dilation": (2, 5)}),
    "rows, 16 levels": Case((3, 40, 6, 7), (61, 40, 3, 3), {"padding": 1}, levels=tuple(range(-8, 8))),
    "rows of which bands differ": Case((1, 64, 7, 7), (64, 64, 1, 1), levels=tuple(range(-8, 8))),
    "rows of images apart": Case((3, 64, 4, 4), (64, 64, 1, 1), levels=tuple(range(-8, 8))),
    "rows, per-output levels": Case((1, 64, 7, 7), (62, 64, 3, 3), {"padding": 1}, QUATERNARY, own_levels=True),
    "bands of rows of channels": Case((1, 64, 67, 40), (60, 64, 3, 3), {"padding": 1, "stride": 2}),
    # levels
    "per-output levels": Case((2, 6, 5, 7), (11, 6, 3, 3), {"padding": 1}, TERNARY, own_levels=True),
    "many patterns": Case((1, 6, 3, 5), (300, 6, 1, 1), levels=QUATERNARY),
}


@cache
def packed_conv2d(name: str, dtype: str, algorithm: str, isa: str) -> ops.Packed:
    pycodesign.set_isa(isa)
    return pack(CONVOLUTIONS[name], dtype, algorithm)


@each_isa
@each_conv2d
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv2d(name: str, algorithm: str, isa: str, record: Record) -> None:
    case = CONVOLUTIONS[name]
    if not case.fits(algorithm):
        with pytest.raises(ValueError, match=r"^algorithm: expected (a KernelCodebook|at most 16 distinct levels)"):
            pack(case, "float32", algorithm)
        return
    for dtype in INPUT_DTYPES:
        packed = packed_conv2d(name, dtype, algorithm, isa)
        assert packed.algorithm == algorithm
        x = make_input(case.x, dtype)
        check(case, x, packed, record, isa)
        if dtype != "float32":
            check(case, x, packed, record, isa, out_dtype="int32")


@pytest.mark.parametrize("packed_on", ISAS)
@pytest.mark.parametrize("name", ["3x3 padded", "64 channels", "65 channels, binary", "32 kernels, stride 2"])
def test_layers_run_where_they_were_not_packed(name: str, packed_on: str, record: Record) -> None:
    for algorithm in ("codegen", "dense"):
        for dtype in INPUT_DTYPES:
            packed = packed_conv2d(name, dtype, algorithm, packed_on)
            for isa in ISAS:
                check(CONVOLUTIONS[name], make_input(CONVOLUTIONS[name].x, dtype), packed, record, isa)


@each_isa
@each_conv2d
@pytest.mark.parametrize("columns", [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65])
def test_row_lengths(columns: int, algorithm: str, isa: str, record: Record) -> None:
    for stride in (1, 2, 3):
        case = Case((1, 5, 2, stride * (columns - 1) + 1), (3, 5, 1, 1), {"stride": (1, stride)})
        for dtype in INPUT_DTYPES:
            check(case, make_input(case.x, dtype), pack(case, dtype, algorithm), record, isa)


LINEARS = {
    "1 of each": Case((1, 1), (1, 1)),
    "2 inputs, 3 outputs": Case((2, 2), (3, 2)),
    "3 inputs, 15 outputs": Case((3, 3), (15, 3), levels=BINARY),
    "4 inputs, 16 outputs": Case((5, 4), (16, 4), levels=QUATERNARY),
    "5 inputs, 17 outputs": Case((6, 5), (17, 5), bias=False),
    "15 inputs, 31 outputs": Case((7, 15), (31, 15)),
    "16 inputs, 63 outputs": Case((1, 16), (63, 16)),
    "17 inputs, 64 outputs": Case((2, 17), (64, 17)),
    "18 inputs, 65 outputs": Case((13, 18), (65, 18)),
    "19 inputs, 127 outputs": Case((3, 19), (127, 19)),
    "30 inputs, 128 outputs": Case((4, 30), (128, 30), levels=BINARY),
    "31 inputs, 129 outputs": Case((1, 31), (129, 31), levels=BINARY),
    "32 inputs": Case((1, 32), (70, 32), levels=BINARY),
    "33 inputs": Case((8, 33), (70, 33), levels=QUATERNARY),
    "one row": Case((1, 257), (130, 257)),
    "32 rows": Case((32, 61), (67, 61)),
    "17 rows": Case((17, 70), (70, 70)),
    "45 rows": Case((45, 150), (100, 150), levels=tuple(range(-6, 6))),
    "140 rows": Case((140, 70), (33, 70)),
    "a vector": Case((23,), (9, 23)),
    "leading dimensions": Case((2, 3, 4, 11), (10, 11)),
    "scale groups": Case((7, 24), (70, 24), scale_groups=3),
    "scale groups of 17": Case((2, 34), (5, 34), levels=BINARY, scale_groups=2),
    "one scale group": Case((2, 20), (66, 20), scale_groups=1),
    "a scale for each input": Case((3, 7), (5, 7), levels=QUATERNARY, scale_groups=7),
    "per-output levels": Case((4, 21), (66, 21), levels=TERNARY, own_levels=True),
    "two levels": Case((5, 37), (10, 37), levels=(0, 3)),
    "three uneven levels": Case((5, 37), (10, 37), levels=(-7, 2, 100)),
    "four positive levels": Case((5, 37), (10, 37), levels=(1, 2, 4, 8)),
    "one level": Case((5, 37), (10, 37), levels=(-3,)),
    "only zero": Case((5, 37), (10, 37), levels=(0,)),
    "7 levels": Case((2, 40), (33, 40), levels=tuple(range(-3, 4))),
    "256 levels": Case((2, 40), (33, 40), levels=tuple(range(-128, 128))),
}


@each_isa
@each_linear
@pytest.mark.parametrize("name", LINEARS)
def test_linear(name: str, algorithm: str, isa: str, record: Record) -> None:
    case = LINEARS[name]
    if not case.fits(algorithm):
        with pytest.raises(ValueError, match=r"^algorithm: expected "):
            pack(case, "float32", algorithm)
        return
    for dtype in INPUT_DTYPES:
        packed = pack(case, dtype, algorithm)
        assert packed.algorithm == algorithm
        x = make_input(case.x, dtype)
        check(case, x, packed, record, isa)
        if dtype != "float32":
            check(case, x, packed, record, isa, out_dtype="int32")


# ---- levels ----------------------------------------------------------------------------------------------------------

LEVELS = {
    **{f"Q={q}, both signs": tuple(range(-(q // 2), q - q // 2)) for q in range(1, 17)},
    **{f"Q={q}, mostly positive": (-1, *range(1, q)) for q in range(2, 17)},
    "Q=16, powers of two": tuple(sorted([-(2**e) for e in range(7)] + [0] + [2**e for e in range(7)] + [127])),
    "Q=15, beyond int8": tuple(int(v) for v in quantize.power_of_two(np.ones((1, 1)), 4).levels),
    "Q=17": tuple(range(-8, 9)),
    "Q=256": tuple(range(-128, 128)),
}


@each_conv2d
@pytest.mark.parametrize("name", LEVELS)
def test_levels(name: str, algorithm: str, record: Record) -> None:
    # 300 x 9 patterns of 4 channels: so many outputs call for large tables, and nearly fill them
    case = Case((1, 4, 3, 5), (300, 4, 3, 3), levels=LEVELS[name])
    if not case.fits(algorithm):
        message = rf"^algorithm: expected (at most 16 distinct levels .* got {len(case.levels)}$|a KernelCodebook)"
        with pytest.raises(ValueError, match=message):
            pack(case, "float32", algorithm)
        return
    for dtype in case.input_dtypes(algorithm):
        packed = pack(case, dtype, algorithm)
        for isa in (ISAS[0], ISAS[-1]):
            check(case, make_input(case.x, dtype), packed, record, isa)


@each_conv2d
@pytest.mark.parametrize("levels", [(-1.5, 0.25, 3.5), (0.1, 0.3), tuple(np.linspace(-1, 1, 15)), (1e-3, 1e3)])
def test_fractional_levels(levels: tuple[float, ...], algorithm: str, record: Record) -> None:
    case = Case((1, 5, 4, 7), (19, 5, 3, 3), levels=levels)
    for isa in ISAS:
        check(case, make_input(case.x, "float32"), pack(case, "float32", algorithm), record, isa)


def all_cases() -> Iterator[tuple[Case, str, str]]:
    cases = [*CONVOLUTIONS.values(), *LINEARS.values()]
    cases += [Case((1, 4, 3, 5), (300, 4, 3, 3), levels=levels) for levels in LEVELS.values()]
    for case in cases:
        for algorithm in ALGORITHMS[case.kind]:
            if case.fits(algorithm):
                yield from ((case, dtype, algorithm) for dtype in case.input_dtypes(algorithm))


def test_weights_come_back() -> None:
    for case, dtype, algorithm in all_cases():
        q, _ = make_weights(case)
        back = pack(case, dtype, algorithm).weights()
        assert isinstance(back, KernelCodebook) == (algorithm == "codebook")
        np.testing.assert_array_equal(back.decode(), q.decode(), err_msg=f"{case} {dtype} {algorithm}")
        np.testing.assert_array_equal(back.scale, q.scale)
        if isinstance(back, QuantizedTensor):
            np.testing.assert_array_equal(back.levels, q.levels)


# ---- epilogue --------------------------------------------------------------------------------------------------------

EPILOGUES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32 residual": {"residual": "float32"},
    "uint8 residual, relu": {"residual": "uint8", "clamp": (0, None)},
    "int8 residual, ceiling": {"residual": "int8", "clamp": (None, 1.5)},
    "clamp": {"clamp": (-0.5, 0.75)},
    "uint8": {"out_dtype": "uint8", "out_scale": 0.037, "out_zero_point": 101},
    "int8": {"out_dtype": "int8", "out_scale": 0.021, "out_zero_point": -13},
    "uint8, relu, uint8 residual": {
        "out_dtype": "uint8", "out_scale": 0.05, "clamp": (0, None), "residual": "uint8",
    },
    "int8, clamp, float32 residual": {
        "out_dtype": "int8", "out_scale": 0.05, "clamp": (-2, 3), "residual": "float32",
    },
    "int8, saturated, int8 residual": {
        "out_dtype": "int8", "out_scale": 1e-4, "out_zero_point": 127, "residual": "int8",
    },
}  # fmt: skip


@each_isa
@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", ["conv2d", "linear", "grouped linear"])
def test_epilogue(kind: str, bias: bool, name: str, isa: str, record: Record) -> None:
    if kind == "conv2d":  # 23 x 23 pixels: more than the 512 that are finished at a time
        case, shape = Case((2, 5, 23, 23), (6, 5, 3, 3), {"padding": 1}, bias=bias), (2, 6, 23, 23)
    else:
        groups = 3 if kind == "grouped linear" else 0
        case, shape = Case((7, 27), (70, 27), scale_groups=groups, bias=bias), (7, 70)
    options = dict(EPILOGUES[name])
    if "residual" in options:
        options["residual"] = make_input(shape, options["residual"], seed=1)
        options |= {"residual_scale": 0.0131, "residual_zero_point": 11}
    for algorithm in ALGORITHMS[case.kind]:
        if case.fits(algorithm):
            for dtype in INPUT_DTYPES:
                check(case, make_input(case.x, dtype), pack(case, dtype, algorithm), record, isa, **options)


@each_isa
@pytest.mark.parametrize("width", [9, 40, 100, 130, 190, 250, 260, 390, 1025, 1290, 2300])
def test_bytes_of_any_width(width: int, isa: str, record: Record) -> None:
    """Bytes leave the lanes, and residuals enter them, 64 or 16 vectors at a time."""
    case = Case((1, 3, 1, width), (2, 3, 1, 1))
    epilogue = {"residual_scale": 0.11, "out_dtype": "uint8", "out_scale": 0.07, "out_zero_point": 100}
    residual = make_input((1, 2, 1, width), "uint8", seed=1)
    for algorithm in ("dense", "codegen"):
        packed = pack(case, "uint8", algorithm)
        check(case, make_input(case.x, "uint8"), packed, record, isa, residual=residual, **epilogue)


@each_isa
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("side", [2, 3, 5, 7, 8, 12, 14, 15, 16])
def test_results_of_small_maps(side: int, dtype: str, isa: str, record: Record) -> None:
    """Those of up to 64 words or 256 bytes of lanes go to their rows, and residuals come from there, in one step."""
    case = Case((1, 3, side, side), (70, 3, 3, 3), {"padding": 1})
    epilogue: dict[str, Any] = {"residual": make_input((1, 70, side, side), dtype, seed=1), "residual_scale": 0.11}
    if dtype == "uint8":
        epilogue |= {"out_dtype": "uint8", "out_scale": 0.07, "out_zero_point": 100}
    for algorithm in ("dense", "codegen"):
        check(case, make_input(case.x, dtype), pack(case, dtype, algorithm), record, isa, **epilogue)


@each_isa
@pytest.mark.parametrize("name", ["padding beyond kernel", "3x3 on padding", "3x3 padded", "7x7 stem"])
def test_residual_in_bytes(name: str, isa: str, record: Record) -> None:
    """Where padding is wider than the kernel, outputs share positions in the lanes, but not residuals."""
    case = CONVOLUTIONS[name]
    shape = run(make_input(case.x, "uint8"), packed_conv2d(name, "uint8", "dense", isa)).shape
    epilogue = {"residual_scale": 0.11, "out_dtype": "uint8", "out_scale": 0.07, "out_zero_point": 100}
    for algorithm in ("codegen", "dense"):
        packed = packed_conv2d(name, "uint8", algorithm, isa)
        check(case, make_input(case.x, "uint8"), packed, record, isa, residual=make_input(shape, "int8"), **epilogue)


@each_isa
def test_ties_round_to_even(isa: str) -> None:
    pycodesign.set_isa(isa)
    q = QuantizedTensor(np.zeros((1, 1, 1, 1), np.uint8), np.ones(1, F32), np.ones(1, F32))
    x = np.arange(-128, 128).astype(np.int8).reshape(1, 1, 16, 16)
    packed = ops.prepack_conv2d(q, input_dtype="int8", input_scale=0.5)
    y = ops.conv2d(x, packed, out_dtype="int8", out_scale=1)
    np.testing.assert_array_equal(y, np.rint(x / 2).astype(np.int8))


@each_isa
def test_nan_becomes_the_lowest_value(isa: str) -> None:
    pycodesign.set_isa(isa)
    q = QuantizedTensor(np.zeros((1, 1), np.uint8), np.ones(1, F32), np.ones(1, F32))
    x = np.array([[np.nan], [np.inf], [-np.inf], [3]], F32)
    packed = ops.prepack_linear(q)
    np.testing.assert_array_equal(ops.linear(x, packed, clamp=(0, 6))[:, 0], [np.nan, 6, 0, 3])
    assert ops.linear(x, packed, out_dtype="uint8", out_scale=1, out_zero_point=9)[:, 0].tolist() == [0, 255, 0, 12]
    y = ops.linear(x, packed, out_dtype="int8", out_scale=1, out_zero_point=9)
    assert y[:, 0].tolist() == [-128, 127, -128, 12]


# ---- NaN and Inf -----------------------------------------------------------------------------------------------------


@each_isa
@pytest.mark.parametrize("algorithm", ["codegen", "tables", "dense"])
def test_floats_of_any_magnitude(algorithm: str, isa: str) -> None:
    """One number for each pixel, from 2^-100 to 2^126: no bit of it may be lost, infinity and NaN remain."""
    pycodesign.set_isa(isa)
    rng = np.random.default_rng(0)
    pixels, channels, outputs = 456, 64, 17  # so many channels that a matrix unit is used
    levels = np.array([-2, -1, 0, 1, 4], F32)
    codes = rng.integers(0, 5, (outputs, channels, 1, 1), dtype=np.uint8)
    packed = ops.prepack_conv2d(QuantizedTensor(codes, levels, np.ones(outputs, F32)), algorithm=algorithm)
    values = np.ldexp(rng.uniform(1, 2, pixels), np.arange(pixels) // 2 - 100).astype(F32) * rng.choice([-1, 1], pixels)
    values[-4:] = np.inf, -np.inf, np.nan, np.finfo(F32).max / 4
    for channel in (0, 15, 63):
        x = np.zeros((1, channels, 1, pixels), F32)
        x[0, channel, 0] = values
        weights = levels[codes[:, channel, 0, 0]]
        y = ops.conv2d(x, packed)[0, :, 0][weights != 0]
        np.testing.assert_array_equal(y, weights[weights != 0, None] * values)


@each_isa
@each_conv2d
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_conv2d_with_one_bad_pixel(value: float, algorithm: str, isa: str) -> None:
    pycodesign.set_isa(isa)
    case = Case((2, 6, 9, 11), (10, 3, 3, 3), {"padding": 1, "groups": 2})
    packed = pack(case, "float32", algorithm)
    q, _ = make_weights(case)
    x = make_input(case.x, "float32")
    clean = run(x, packed)
    for index in ((0, 0, 0, 0), (1, 4, 8, 10), (0, 2, 4, 10), (1, 3, 5, 5)):
        bad = x.copy()
        bad[index] = value
        y = run(bad, packed)
        mark = np.zeros(case.x, F32)
        mark[index] = 1
        connected = QuantizedTensor(np.zeros(case.w, np.uint8), np.ones(1, F32), np.ones(case.w[0], F32))
        nonzero = QuantizedTensor((q.decode() != 0).astype(np.uint8), np.array([0, 1], F32), np.ones(case.w[0], F32))
        in_window = reference.conv2d(mark, connected, **case.geometry) > 0
        through_nonzero = reference.conv2d(mark, nonzero, **case.geometry) > 0
        assert not np.isfinite(y[through_nonzero]).any()
        np.testing.assert_array_equal(y[~in_window], clean[~in_window])


@each_isa
@each_linear
def test_linear_with_a_bad_row(algorithm: str, isa: str) -> None:
    pycodesign.set_isa(isa)
    case = Case((7, 44), (67, 44))
    packed = pack(case, "float32", algorithm)
    x = make_input(case.x, "float32")
    clean = run(x, packed)
    bad = x.copy()
    bad[3, 17], bad[5, 40] = np.nan, np.inf
    y = run(bad, packed)
    nonzero = make_weights(case)[0].decode() != 0
    assert not np.isfinite(y[3, nonzero[:, 17]]).any() and not np.isfinite(y[5, nonzero[:, 40]]).any()
    good = np.delete(np.arange(7), [3, 5])
    np.testing.assert_array_equal(y[good], clean[good])


# ---- sums ------------------------------------------------------------------------------------------------------------


@each_conv2d
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_bands_that_fit_the_cache(dtype: str, algorithm: str, record: Record) -> None:
    """More staged bytes than the second-level cache, on one thread too."""
    case = Case((1, 64, 112, 120), (9, 64, 3, 3), {"padding": 1}, kernels=40)
    check(case, make_input(case.x, dtype), pack(case, dtype, algorithm), record, ISAS[-1])


@each_isa
@pytest.mark.parametrize(("kind", "algorithm"), [(k, a) for k in ("conv2d", "linear") for a in ALGORITHMS[k]])
def test_long_sums_of_equal_terms(kind: str, algorithm: str, isa: str) -> None:
    """Whose roundings all point one way for as long as a sum does not double."""
    pycodesign.set_isa(isa)
    inputs, ones = 50000 if kind == "conv2d" else 300000, (1, 1)[: 2 if kind == "conv2d" else 0]
    q = QuantizedTensor(np.ones((3, inputs, *ones), np.uint8), np.array([-1, 1], F32), np.ones(3, F32))
    weights = to_codebook(q) if algorithm == "codebook" else q
    assert weights is not None
    prepack, run = (ops.prepack_conv2d, ops.conv2d) if kind == "conv2d" else (ops.prepack_linear, ops.linear)
    for value in (1 / 3, 0.7, 1.1):
        x = np.full((1, inputs, *ones), value, F32)
        y = run(x, prepack(weights, algorithm=algorithm))
        sum_ = inputs * float(F32(value))
        np.testing.assert_allclose(y, sum_, rtol=8 * np.finfo(F32).eps * math.sqrt(inputs))


@each_isa
def test_missing_channels_weigh_nothing(isa: str) -> None:
    """Words of four channels end with some that do not exist, and only one output has a level of zero."""
    pycodesign.set_isa(isa)
    levels = np.arange(-128, 128, dtype=F32).reshape(32, 8)
    codes = np.random.default_rng(3).integers(0, 8, (32, 18, 3, 3), dtype=np.uint8)
    q = QuantizedTensor(codes, levels, np.ones(32, F32))
    packed = ops.prepack_conv2d(q, padding=1, input_dtype="uint8", algorithm="dense")
    x = make_input((2, 18, 5, 6), "uint8")
    np.testing.assert_array_equal(
        ops.conv2d(x, packed, out_dtype="int32"), reference.conv2d(x, q, padding=1, out_dtype="int32")
    )
    np.testing.assert_array_equal(packed.weights().codes, codes)


@each_isa
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("channels", "outputs"), [(16, 32), (18, 60), (60, 64), (100, 130)])
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_channels_last(dtype: str, channels: int, outputs: int, stride: int, isa: str, record: Record) -> None:
    """Pixels whose channels lie side by side, one after another or with something between them."""
    case = Case((2, channels, 7, 9), (outputs, channels, 3, 3), {"padding": 2, "stride": stride})
    packed = pack(case, dtype, "dense")
    side_by_side: Any = {"order": (0, 2, 3, 1)}
    for spare in (0, 1):
        _, x = guarded(case.x, dtype, spare=spare, **side_by_side)
        x[...] = make_input(case.x, dtype)
        check(case, x, packed, record, isa)
        for out_dtype in ("float32", "uint8", "int8", "int32"):
            options: dict[str, Any] = {"out_dtype": out_dtype, "clamp": None if out_dtype == "int32" else (-1, 3)}
            if out_dtype in ("uint8", "int8"):
                options |= {"out_scale": 0.05, "out_zero_point": 3}
            if out_dtype == "int32" and dtype == "float32":
                continue
            expected = ops.conv2d(np.ascontiguousarray(x), packed, **options)
            buffer, y = guarded(expected.shape, out_dtype, spare=spare, **side_by_side)
            ops.conv2d(x, packed, out=y, **options)
            np.testing.assert_array_equal(y, expected)
            assert_guards_untouched(buffer, y)
            if out_dtype == "int32":
                continue
            for residual_dtype in INPUT_DTYPES:
                residual = make_input(expected.shape, residual_dtype, seed=1)
                options |= {"residual": residual, "residual_scale": 0.0131, "residual_zero_point": 11}
                expected = ops.conv2d(x, packed, **options)
                _, last = guarded(residual.shape, residual_dtype, spare=spare, **side_by_side)
                last[...] = residual
                options["residual"] = last
                ops.conv2d(x, packed, out=y, **options)
                np.testing.assert_array_equal(y, expected)


@each_isa
@pytest.mark.parametrize("largest", [1, 2, 7, 8, 31, 63, 64, 65, 127])
@pytest.mark.parametrize(("dtype", "bits"), [("uint8", None), ("uint8", 4), ("uint8", 1), ("int8", None), ("int8", 3)])
def test_dense_sums_of_worst_inputs(isa: str, largest: int, dtype: str, bits: int | None) -> None:
    """Sums by 16 bits are widened in time: every product of an output has the same sign, and inputs are extreme."""
    pycodesign.set_isa(isa)
    bounds = np.iinfo(dtype)
    low, high = (bounds.min, bounds.max) if bits is None else (0, 2**bits - 1)
    if bits and dtype == "int8":
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    shape = 11, 530, 1, 2
    rng = np.random.default_rng(largest)
    codes = rng.choice([0, 1, 2, 3], shape, p=[0.4, 0.1, 0.1, 0.4]).astype(np.uint8)  # mostly the largest
    codes[0], codes[1] = 0, 3
    levels = np.array([-largest, 0, 1, largest + 0.0], F32) if largest > 1 else np.array([-1, 0, 0.5, 1], F32) * 2
    q = QuantizedTensor(codes, levels, np.ones(len(codes), F32))
    w = levels[codes].astype(np.int64)
    packed = ops.prepack_conv2d(q, input_dtype=dtype, input_bits=bits, algorithm="dense")
    x = rng.choice(np.array([low, high], dtype), (1, 530, 3, 12))
    worst = np.where(w[:, :, 0] > 0, high, low).astype(dtype)  # of each output, at two columns of its own
    x[0, :, 0, 0:2], x[0, :, 0, 4:6], x[0, :, 1, 2:4] = worst[2], worst[0], worst[1]
    expected = np.einsum(
        "ocs,nchws->nohw", w[:, :, 0], np.lib.stride_tricks.sliding_window_view(x, 2, axis=3).astype(int)
    )
    np.testing.assert_array_equal(ops.conv2d(x, packed, out_dtype="int32"), expected)


@each_isa
@each_conv2d
@pytest.mark.parametrize(("dtype", "bits", "zero_point"), [("uint8", 1, 255), ("uint8", 4, 255), ("int8", 2, -128)])
def test_padding_beyond_the_promised_bits(algorithm: str, isa: str, dtype: str, bits: int, zero_point: int) -> None:
    """Padding is the zero point, which no promise bounds: most of what these outputs read is padding."""
    pycodesign.set_isa(isa)
    q = QuantizedTensor(np.ones((9, 64, 3, 3), np.uint8), np.array([-1, 1], F32), np.ones(9, F32))
    weights = to_codebook(q) if algorithm == "codebook" else q
    assert weights is not None
    options = {"padding": 2, "input_zero_point": zero_point}
    packed = ops.prepack_conv2d(weights, algorithm=algorithm, input_dtype=dtype, input_bits=bits, **options)
    x = np.ones((2, 64, 3, 4), dtype)
    np.testing.assert_array_equal(ops.conv2d(x, packed), reference.conv2d(x, q, **options))


@each_isa
@pytest.mark.parametrize("algorithm", ["dense", "packed"])
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 39])
@pytest.mark.parametrize(("largest", "bits"), [(1, None), (8, None), (8, 4), (64, None), (127, None)])
def test_linear_sums_of_worst_inputs(isa: str, algorithm: str, rows: int, largest: int, bits: int | None) -> None:
    pycodesign.set_isa(isa)
    rng = np.random.default_rng(rows)
    codes = rng.choice([0, 1, 2], (75, 1030), p=[0.45, 0.1, 0.45]).astype(np.uint8)
    codes[0], codes[1] = 0, 2
    levels = np.array([-largest, 0, largest], F32)
    q = QuantizedTensor(codes, levels, np.ones(len(codes), F32))
    w = levels[codes].astype(np.int64)
    high = 2 ** (bits or 8) - 1
    x = np.where(w[:rows] > 0, high, 0).astype(np.uint8)  # the worst of one output each
    packed = ops.prepack_linear(q, input_dtype="uint8", input_bits=bits, algorithm=algorithm)
    np.testing.assert_array_equal(ops.linear(x, packed, out_dtype="int32"), x.astype(int) @ w.T)


def test_widely_dilated_wide_filters() -> None:
    q = quantize.binary(np.random.default_rng(0).standard_normal((8, 16, 1, 200), np.float32))
    x = make_input((1, 16, 1, 3400), "uint8")
    options = {"dilation": (1, 16), "input_dtype": "uint8"}
    packed = ops.prepack_conv2d(q, algorithm="tables", **options)
    expected = ops.conv2d(x, ops.prepack_conv2d(q, algorithm="dense", **options), out_dtype="int32")
    np.testing.assert_array_equal(ops.conv2d(x, packed, out_dtype="int32"), expected)


def test_more_input_sizes_than_plans_are_kept() -> None:
    case = Case((1, 3, 1, 1), (5, 3, 3, 3), {"padding": 1})
    packed = pack(case, "uint8", "tables")
    for size in (*range(1, 41), 1, 2, 40):
        x = make_input((1, 3, 2, size), "uint8")
        np.testing.assert_array_equal(run(x, packed), expect(case, x))


def test_auto_is_deterministic_and_says_why() -> None:
    for case in [*CONVOLUTIONS.values(), *LINEARS.values()]:
        first, second = (pack(case, "float32", "auto").explain() for _ in range(2))
        assert first["algorithm"] in ALGORITHMS[case.kind]
        assert first["why"] and (first["algorithm"], first["why"]) == (second["algorithm"], second["why"])


# ---- properties ------------------------------------------------------------------------------------------------------

small = st.integers(1, 5)
run_settings = st.tuples(st.sampled_from(ISAS), st.sampled_from(THREADS), st.sampled_from(INPUT_DTYPES))
level_sets = st.sets(st.integers(-128, 127), min_size=1, max_size=5).map(lambda levels: tuple(sorted(levels)))


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    groups, channels, outputs, kernel_h, kernel_w = (draw(small) for _ in range(5))
    stride, dilation = draw(st.tuples(small, small)), draw(st.tuples(small, small))
    padding = draw(st.tuples(st.integers(0, 6), st.integers(0, 6)))
    spans = [dilation[0] * (kernel_h - 1) + 1 - 2 * padding[0], dilation[1] * (kernel_w - 1) + 1 - 2 * padding[1]]
    height, width = (max(span, 1) + draw(st.integers(0, 12)) for span in spans)
    return Case(
        (draw(st.integers(1, 3)), groups * channels, height, width),
        (groups * outputs, channels, kernel_h, kernel_w),
        {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
        draw(level_sets),
        bias=draw(st.booleans()),
    )


@settings(max_examples=150)
@given(convolutions(), st.sampled_from(ALGORITHMS["conv2d"]), run_settings)
def test_any_conv2d(case: Case, algorithm: str, setting: tuple[str, int, str]) -> None:
    check_any(case, algorithm, *setting)


@settings(max_examples=100)
@given(
    st.integers(0, 9),
    st.integers(1, 70),
    st.integers(1, 140),
    level_sets,
    st.sampled_from(ALGORITHMS["linear"]),
    run_settings,
)
def test_any_linear(
    rows: int, inputs: int, outputs: int, levels: tuple[float, ...], algorithm: str, setting: tuple[str, int, str]
) -> None:
    case = Case((rows, inputs), (outputs, inputs), levels=levels)
    check_any(case, algorithm if case.fits(algorithm) else "dense", *setting)


def check_any(case: Case, algorithm: str, isa: str, threads: int, dtype: str) -> None:
    assume(case.fits(algorithm))
    pycodesign.set_isa(isa)
    pycodesign.set_num_threads(threads)
    x = make_input(case.x, dtype)
    y = run(x, pack(case, dtype, algorithm))
    if dtype == "float32":
        assert_near(y, case, x)
    else:
        np.testing.assert_array_equal(y, expect(case, x))
