"""Programs as machine code: their results, their counts of loads and stores, what they refuse."""

from __future__ import annotations

import doctest
import platform
import sys
from dataclasses import replace

import capstone
import numpy as np
import pytest
from capstone import x86
from conftest import ISAS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_factor import METHODS, layers, quantized, random_quantized

import pycodesign
from pycodesign import _core
from pycodesign.repetition import SumProgram, factor, lower
from pycodesign.repetition.program import ADD, MULTIPLY, SUBTRACT, ZERO

if platform.machine() != "x86_64" or sys.platform != "linux" or not _core.generates_code():
    pytest.skip("machine code is made on x86-64 Linux with AVX2 only", allow_module_level=True)

LEVELS = [isa for isa in ISAS if isa != "scalar"]


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", ["float32", "int32"])
@given(layer=layers(), method=st.sampled_from(METHODS), columns=st.integers(0, 40), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_small_integers_are_exact(isa, dtype, layer, method, columns, seed):
    pycodesign.set_isa(isa)
    q, groups = layer
    program = factor(q, method, groups=groups)
    x = np.random.default_rng(seed).integers(-128, 256, (program.inputs, columns))
    y = lower(program, dtype)(x.astype(dtype))
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, program(x))


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("levels", [[-1, 1], [-1, 0, 1], [-3, -1, 0, 2]])
def test_values_that_leave_the_registers(isa, method, levels):
    pycodesign.set_isa(isa)
    program = factor(random_quantized((48, 70), levels, seed=0), method)
    for dtype in ("float32", "int32"):
        code = lower(program, dtype)
        x = np.random.default_rng(0).integers(-128, 256, (70, 3 * code.lanes + 1))
        np.testing.assert_array_equal(code(x.astype(dtype)), program(x))
        assert code.operations == program.op.size
        if method in ("pair", "patterns"):
            assert code.stores > 48


@given(layer=layers(integer=False), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_fractions_are_near(layer, seed):
    q, groups = layer
    program = factor(q, groups=groups)
    x = np.random.default_rng(seed).standard_normal((program.inputs, 20)).astype(np.float32)
    magnitude = replace(program, levels=np.abs(program.levels)).levels.max() * np.abs(x).sum(axis=0)
    bound = 2 * np.finfo(np.float32).eps * (program.op.size + 1) * magnitude
    assert (np.abs(lower(program)(x) - program(x.astype(np.float64))) <= bound).all()


def make_program(instructions, outputs, inputs, constants=()):
    """A program by hand; what it should compute is not used."""
    op, left, right = np.array(instructions, np.int32).reshape(-1, 3).T
    return SumProgram(
        op=op.astype(np.uint8),
        left=left,
        right=right,
        constants=np.array(constants, np.int64),
        outputs=np.array(outputs, np.int32),
        codes=np.zeros((len(outputs), inputs), np.uint8),
        levels=np.ones((len(outputs), 1), np.int64),
        groups=1,
        method="by hand",
    )


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_instructions_by_hand(isa, dtype):
    pycodesign.set_isa(isa)
    program = make_program(
        [
            (ADD, 0, 0),  # 2: twice x0
            (SUBTRACT, ZERO, 1),  # 3: -x1
            (SUBTRACT, 2, ZERO),  # 4
            (ADD, ZERO, 3),  # 5
            (MULTIPLY, 1, 1),  # 6: 5 x1
            (SUBTRACT, 1, 1),  # 7: nothing
            (ADD, 6, 2),  # 8
            (MULTIPLY, 0, 0),  # 9: not needed
        ],
        outputs=[ZERO, 0, 2, 4, 5, 8, 8, 7, 1],
        inputs=2,
        constants=[-3, 5],
    )
    code = lower(program, dtype)
    x = np.arange(-30, 30).reshape(2, 30)
    np.testing.assert_array_equal(code(x.astype(dtype)), program(x))
    assert code.operations == 7


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("method", METHODS)
def test_counts_are_those_of_the_instructions(isa, method):
    pycodesign.set_isa(isa)
    for levels, dtype in (([-1, 0, 1], "float32"), ([-3, -1, 0, 2], "float32"), ([-3, -1, 0, 2], "int32")):
        code = lower(factor(random_quantized((40, 40), levels, seed=0), method), dtype)
        decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
        decoder.detail = True
        instructions = loads = stores = operations = 0
        for instruction in decoder.disasm(code.code, 0):
            if instruction.mnemonic == "vzeroupper":
                break
            in_memory = [operand.type == x86.X86_OP_MEM for operand in instruction.operands]
            instructions += 1
            stores += in_memory[0]
            loads += any(in_memory[1:])
            operations += instruction.mnemonic not in ("vmovups", "vpxord", "vpxor")
        assert (code.instructions, code.loads, code.stores) == (instructions, loads, stores)
        assert code.operations == operations == code.program.op.size


def test_a_chain_stays_in_registers():
    # Each input is read once, each output written once.
    program = factor(quantized(np.full((1, 100), 1), [0, 1]), "unique")
    code = lower(program, "int32")
    assert (code.operations, code.loads, code.stores) == (99, 100, 1)


def test_staged_vectors():
    code = lower(factor(random_quantized((5, 7), [-1, 0, 1], seed=0)), "int32")
    x = np.random.default_rng(0).integers(-9, 9, (7, code.lanes + 3), np.int32)
    staged = code.stage(x)
    assert staged.shape == (2, 7, code.lanes) and not staged[1, :, 3:].any()
    assert staged.ctypes.data % 64 == 0
    out = np.empty((2, 5, code.lanes), np.int32)
    assert code.run(staged, out) is out
    np.testing.assert_array_equal(np.hstack(list(out))[:, : code.lanes + 3], code(x))


# Bad input


def test_levels_that_are_not_integers():
    program = factor(random_quantized((4, 4), [0.5, 1], seed=0))
    with pytest.raises(ValueError, match="dtype: expected 'float32' for levels that are not integers, got 'int32'"):
        lower(program, "int32")


def test_bad_arguments():
    program = factor(random_quantized((4, 4), [-1, 0, 1], seed=0))
    with pytest.raises(TypeError, match="program: expected a SumProgram, got ndarray"):
        lower(np.ones((4, 4)))
    with pytest.raises(ValueError, match="dtype: expected 'float32' or 'int32', got 'int8'"):
        lower(program, "int8")
    code = lower(program, "int32")
    with pytest.raises(TypeError, match="x: expected int32, got float64"):
        code(np.ones((4, 2)))
    with pytest.raises(ValueError, match=r"x: expected shape \(4, P\), got \(5, 2\)"):
        code(np.ones((5, 2), np.int32))
    staged = code.stage(np.ones((4, 2), np.int32))
    with pytest.raises(ValueError, match="y: expected int32"):
        code.run(staged, np.empty((1, 3, code.lanes), np.int32))
    with pytest.raises(TypeError, match="x: expected int32"):
        code.run(staged.astype(np.float32))
    with pytest.raises(ValueError, match="x: expected int32"):
        code.run(staged[:, :3])


def test_sums_that_do_not_fit():
    code = lower(factor(quantized([[0, 1, 0]], [-5, 3])), "int32")
    limit = (2**31 - 1) // 13
    np.testing.assert_array_equal(code(np.array([[-limit], [limit], [-limit]], np.int32)), [[13 * limit]])
    with pytest.raises(
        ValueError, match=f"x: expected magnitudes up to {limit}, so that sums fit int32, got 2147483648"
    ):
        code(np.full((3, 1), -(2**31), np.int32))


def test_too_large(monkeypatch):
    module = sys.modules["pycodesign.repetition.lower"]
    monkeypatch.setattr(module, "MAX_VALUES", 10)
    with pytest.raises(ValueError, match=r"program: expected at most 10 values, got \d+"):
        lower(factor(random_quantized((8, 8), [-1, 0, 1], seed=0)))


def test_no_machine_code():
    program = factor(random_quantized((4, 4), [-1, 0, 1], seed=0))
    pycodesign.set_isa("scalar")
    with pytest.raises(RuntimeError, match="lower: expected x86-64 Linux with AVX2"):
        lower(program)


@pytest.mark.parametrize(
    ("instructions", "outputs"),
    [
        ([(3, 0, 0)], [0]),
        ([(ADD, 2, 0)], [0]),
        ([(ADD, 0, 2)], [0]),
        ([(ADD, -2, 0)], [0]),
        ([(ADD, 0, -2)], [0]),
        ([(MULTIPLY, 0, 1)], [0]),
        ([(MULTIPLY, 0, -1)], [0]),
        ([(ADD, 0, 0)], [3]),
        ([(ADD, 0, 0)], [-2]),
    ],
)
def test_malformed_programs(instructions, outputs):
    with pytest.raises(ValueError, match=r"program: expected (operations|outputs)"):
        lower(make_program(instructions, outputs, inputs=2, constants=[2]))


def test_docstring_example():
    (found,) = doctest.DocTestFinder(recurse=False).find(lower, "example", module=False, globs={})
    assert doctest.DocTestRunner().run(found).failed == 0
