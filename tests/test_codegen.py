"""Machine code: every form of it disassembled by capstone, interpreted in NumPy, and run; where it lives; its names.

The interpreter knows the instructions that code may have, and memory that code may touch: what the comment of
`SegmentFunction` in csrc/repetition/codegen_x86.h allows. So AVX-512 code is checked on machines without AVX-512, too.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from threading import Barrier
from typing import Any, NamedTuple

import capstone
import numpy as np
import pytest
from capstone import x86
from conftest import ISAS, to_codebook
from numpy.typing import NDArray

import pycodesign
from pycodesign import _core, ops
from pycodesign.quantize import QuantizedTensor
from pycodesign.reference import repetition as reference

if platform.machine() != "x86_64" or sys.platform != "linux":
    pytest.skip("machine code is made on x86-64 Linux only", allow_module_level=True)

F32 = np.float32
Array = NDArray[Any]

BINARY, TERNARY, FOUR, SIXTEEN = (-1, 1), (-1, 0, 1), (-2, -1, 0, 1), tuple(range(-8, 8))
FRACTIONS = (-2.5, -0.75, 0, 0.25, 1, 1.5)  # sums of small integers times these are exact


@dataclass(frozen=True)
class Case:
    """A layer. The filter of most is one column, so that its taps are the rows."""

    outputs: int
    channels: int  # of one group
    rows: int
    levels: tuple[float, ...]
    columns: int = 1
    stride: int = 1
    dilation: int = 1
    kernels: int = 0  # distinct ones; 0: any
    groups: int = 1
    zeros: float = 0  # of the weights, at least; without a zero the first level
    own_levels: bool = False  # levels for each output, though the same


CASES = {
    "one weight": Case(1, 1, 1, BINARY),
    "binary": Case(45, 7, 4, BINARY),
    "binary, three channels": Case(13, 3, 9, BINARY),
    "ternary": Case(30, 10, 9, TERNARY),
    "ternary, two channels": Case(70, 2, 1, TERNARY),
    "few weights": Case(29, 8, 9, TERNARY, zeros=0.9),
    "four levels": Case(15, 9, 4, FOUR),
    "16 levels": Case(33, 5, 4, SIXTEEN),
    "groups": Case(40, 3, 9, TERNARY, groups=5),
    "stem": Case(16, 3, 49, TERNARY),
    "segments": Case(12, 48, 9, SIXTEEN),
    "as long sums as 16 bits hold": Case(8, 64, 8, BINARY),  # 512 weights: one too many for two segments
    "as long sums of all rows": Case(8, 64, 8, BINARY, zeros=0.9),
    "fractions": Case(31, 6, 4, FRACTIONS),
    "fractions, shared patterns": Case(13, 6, 4, (-1.5, 0, 1.5)),
    "own levels": Case(12, 7, 8, BINARY, own_levels=True),
    "zeros only": Case(5, 3, 1, (0,)),
    "columns": Case(50, 9, 3, BINARY, columns=3, kernels=6),
    "columns of two rows": Case(56, 5, 2, BINARY, columns=2),
    "columns of every second pixel": Case(50, 5, 3, BINARY, columns=3, kernels=6, stride=2),
    "columns of every third pixel": Case(50, 5, 3, BINARY, columns=3, kernels=6, stride=3),
    "columns apart": Case(50, 5, 3, BINARY, columns=3, kernels=6, dilation=2),
    "binary columns far apart": Case(50, 5, 3, BINARY, columns=3, kernels=6, dilation=50),
    "columns far apart": Case(44, 9, 3, TERNARY, columns=3, kernels=3, dilation=50, zeros=0.4),
    "columns of every third pixel, many sums": Case(90, 5, 3, TERNARY, columns=3, kernels=4, stride=3),
    "columns of zeros and ones": Case(60, 3, 3, (0, 1), columns=2, kernels=3, stride=3),
    "columns, segments": Case(40, 70, 3, BINARY, columns=3, kernels=6),
    "columns, groups": Case(60, 4, 3, BINARY, columns=3, kernels=6, groups=3),
    "few kernels": Case(50, 9, 3, BINARY, columns=3, kernels=5),
    "few ternary kernels": Case(70, 9, 3, TERNARY, columns=3, kernels=2),
    "columns of every second pixel, few weights": Case(66, 9, 3, TERNARY, columns=3, kernels=2, stride=2, zeros=0.4),
    "filters of few weights": Case(60, 9, 3, TERNARY, columns=3, kernels=2, zeros=0.7),
}
INPUTS = {"float32": ("float32", None), "uint8": ("uint8", None), "4 bits": ("uint8", 4), "int8": ("int8", None)}


def fits(name: str, inputs: str) -> bool:
    return inputs == "float32" or not name.startswith("fractions")


each_case = pytest.mark.parametrize(("name", "inputs"), [pair for pair in product(CASES, INPUTS) if fits(*pair)])


def make_weights(case: Case) -> QuantizedTensor:
    rng = np.random.default_rng(case.outputs)
    count, kernel = case.kernels or case.outputs * case.channels, (case.rows, case.columns)
    codes = rng.integers(0, len(case.levels), (count, *kernel), dtype=np.uint8)
    if case.zeros:
        codes[rng.random(codes.shape) < case.zeros] = case.levels.index(0) if 0 in case.levels else 0
    if case.kernels:  # up to sign
        codes = np.concatenate([codes, len(case.levels) - 1 - codes])
        codes = codes[rng.integers(0, len(codes), case.outputs * case.channels)]
    codes = codes.reshape(case.outputs, case.channels, *kernel)
    levels = np.array([case.levels] * case.outputs if case.own_levels else case.levels, F32)
    return QuantizedTensor(codes, levels, np.ones(case.outputs, F32))


def options(case: Case, inputs: str) -> dict[str, Any]:
    dtype, bits = INPUTS[inputs]
    return {
        "groups": case.groups,
        "stride": case.stride,
        "dilation": case.dilation,
        "input_dtype": dtype,
        "input_bits": bits,
        "input_zero_point": 1 << (bits or 8) - 1 if dtype == "uint8" else 0,  # sums are of x - zero point, |...| <= it
    }


def pack(case: Case, inputs: str, algorithm: str = "codegen") -> ops.Packed:
    return ops.prepack_conv2d(make_weights(case), algorithm=algorithm, **options(case, inputs))


def make_input(case: Case, inputs: str) -> Array:
    dtype, bits = INPUTS[inputs]
    lowest, highest = (-8, 9) if dtype == "float32" else (0, 1 << (bits or 8)) if dtype == "uint8" else (-128, 128)
    height, width = (case.dilation * (size - 1) + 5 for size in (case.rows, case.columns))
    shape = 2, case.groups * case.channels, height, width + 4
    return np.random.default_rng(0).integers(lowest, highest, shape).astype(dtype)


def expect(case: Case, inputs: str) -> Array:
    kept = "groups", "stride", "dilation", "input_zero_point"
    settings = {key: value for key, value in options(case, inputs).items() if key in kept}
    return reference.conv2d(make_input(case, inputs), make_weights(case), **settings)


# ---- disassembly ---------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    base: str
    index: str | None
    scale: int
    displacement: int


class Instruction(NamedTuple):
    name: str
    operands: tuple[str | int | Memory, ...]  # register, immediate or memory
    end: int  # where the next one begins
    form: str


def disassemble(code: bytes, begin: int, end: int, avx512: bool) -> list[Instruction]:
    """Decode a segment; fail where its bytes are not whole instructions of the instruction set."""
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = True
    width = 64 if avx512 else 32
    instructions = []
    for i in decoder.disasm(code[begin:end], begin):
        operands: list[str | int | Memory] = []
        kinds = []
        for o in i.operands:
            if o.type == x86.X86_OP_REG:
                operands.append(i.reg_name(o.reg))
                kinds.append(i.reg_name(o.reg).rstrip("0123456789") if o.size == width else "r")
            elif o.type == x86.X86_OP_IMM:
                operands.append(o.imm)
                kinds.append("imm")
            else:
                m = o.mem
                operands.append(Memory(i.reg_name(m.base), i.reg_name(m.index) if m.index else None, m.scale, m.disp))
                index = f"+{m.scale}*r" if m.index else ""
                shift = ("", "+d8", "+d32")[i.modrm >> 6]
                kinds.append("[rip]" if m.base == x86.X86_REG_RIP else f"[r{index}{shift}]")
                assert o.size == {"prefetcht1": 1, "test": 4, "mov": 8, "lea": 8}.get(i.mnemonic, width)
        if i.mnemonic[0] == "v" and operands:
            assert (i.bytes[0] == 0x62) == avx512, f"{i.mnemonic} {i.op_str}: not an instruction of this set"
        instructions.append(
            Instruction(i.mnemonic, tuple(operands), i.address + i.size, f"{i.mnemonic} {', '.join(kinds)}".strip())
        )
    assert instructions[-1].end == end
    return instructions


# ---- interpretation ------------------------------------------------------------------------------------------------


def fused(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(float) * b + c).astype(F32)


Operation = Callable[..., Array]  # of the operands, the result's former value first
VECTOR_OPERATIONS: dict[str, tuple[type[Any], Operation]] = {
    "vaddps": (F32, lambda to, a, b: a + b),
    "vsubps": (F32, lambda to, a, b: a - b),
    "vmulps": (F32, lambda to, a, b: a * b),
    "vfmadd132ps": (F32, lambda to, a, b: fused(to, b, a)),
    "vfnmadd132ps": (F32, lambda to, a, b: fused(-to, b, a)),
    "vfmadd231ps": (F32, lambda to, a, b: fused(a, b, to)),
    "vfnmadd231ps": (F32, lambda to, a, b: fused(-a, b, to)),
    "vpaddw": (np.int16, lambda to, a, b: a + b),
    "vpsubw": (np.int16, lambda to, a, b: a - b),
    "vpmullw": (np.int16, lambda to, a, b: a * b),
    "vpaddd": (np.int32, lambda to, a, b: a + b),
    "vpsubd": (np.int32, lambda to, a, b: a - b),
    "vpxor": (np.int32, lambda to, a, b: a ^ b),
    "vpxord": (np.int32, lambda to, a, b: a ^ b),
    "vpslld": (np.int32, lambda to, a, b: a << b),
    "vpsrad": (np.int32, lambda to, a, b: a >> b),
}
X, ACC, TAPS, CODE, PREFETCH = (k << 40 for k in range(1, 6))


class Machine:
    """Runs segments. Memory is what areas, arrays of bytes by address, hold; anything else fails."""

    CHANGED = ("rax", "rsi", "rdi", "r9", "r10", "r11")  # all the caller's to save

    def __init__(self, avx512: bool, readable: dict[int, Array], writable: dict[int, Array]) -> None:
        self.width, self.vector_name = (64, "zmm") if avx512 else (32, "ymm")
        self.vectors = np.full((32 if avx512 else 16, self.width), 0x77, np.uint8)
        self.readable, self.writable = readable | writable, writable
        self.seen: list[set[int]] = [set(), set(), set()]  # vector registers by the place of the operand

    def run(self, instructions: list[Instruction], **registers: int) -> list[int]:
        """Run a segment; return the addresses that it prefetches or only reads."""
        self.registers, prefetched = registers, []
        for i in instructions:
            o = i.operands
            if i.name in VECTOR_OPERATIONS:
                dtype, operation = VECTOR_OPERATIONS[i.name]
                to, a, b = (
                    operand if isinstance(operand, int) else self.vector(operand, i, dtype) for operand in o[-3:]
                )
                to[:] = operation(to, a, b)
            elif i.name == "vmovups":
                self.vector(o[0], i, np.uint8, write=True)[:] = self.vector(o[1], i, np.uint8)
            elif i.name in ("mov", "lea"):
                assert o[0] in self.CHANGED
                at = self.address(o[1], i)
                self.registers[o[0]] = at if i.name == "lea" else int(self.memory(at, 8).view(np.int64)[0])
            elif i.name in ("prefetcht1", "test"):
                prefetched.append(self.address(o[0], i))
            elif i.name == "vzeroupper":
                self.vectors[:16, 16:] = 0
            else:
                assert i.name == "ret"
        return prefetched

    def vector(self, operand: Any, i: Instruction, dtype: type[Any], write: bool = False) -> Array:
        if isinstance(operand, Memory):
            at = self.address(operand, i)
            assert at % self.width == 0
            return self.memory(at, self.width, write).view(dtype)
        assert operand.startswith(self.vector_name)
        number = int(operand[3:])
        for place, other in enumerate(i.operands):
            if other == operand:
                self.seen[place].add(number)
        return self.vectors[number].view(dtype)

    def address(self, m: Any, i: Instruction) -> int:
        base = CODE + i.end if m.base == "rip" else self.registers[m.base]
        return base + (m.scale * self.registers[m.index] if m.index else 0) + m.displacement

    def memory(self, at: int, size: int, write: bool = False) -> Array:
        for base, area in (self.writable if write else self.readable).items():
            if base <= at <= base + area.size - size:
                return area[at - base : at - base + size]
        raise AssertionError(f"{size} bytes at {at:#x} are not for this code to {'write' if write else 'read'}")


def round_up(size: int) -> int:
    return (size + 63) // 64 * 64


def place_taps(x: Array, dtype: type[Any], rng: np.random.Generator) -> tuple[Array, Array]:
    """Planes of x (groups, channels, taps, lanes): a vector for each tap, anywhere, and one that nobody may use."""
    *units, taps, lanes = x.shape
    order = rng.permutation(taps)
    planes = np.full((*units, taps + 1, lanes), -3 * x.max(), dtype)
    planes[:, :, order] = x
    return planes, order


def place_columns(x: Array, dtype: type[Any], case: Case, patterns: Array) -> tuple[Array, Array]:
    """The sums of the columns of x for each pattern, by phase of the stride; in vectors that nobody may use between."""
    *units, _, lanes = x.shape
    count, columns = len(patterns), [s * case.dilation for s in range(case.columns)]
    phases = list(dict.fromkeys(s % case.stride for s in columns))
    lengths = [max(s for s in columns if s % case.stride == p) // case.stride + 1 for p in phases]
    first = np.cumsum([0, *lengths]) * count + np.minimum(np.arange(len(phases) + 1), 1)  # a vector behind the first
    planes = np.full((*units, first[-1] + 1, lanes), -3 * x.max(), dtype)
    rows = x.reshape(*units, case.rows, case.columns, lanes)
    for s, at in enumerate(columns):
        begin = first[phases.index(at % case.stride)] + at // case.stride * count
        planes[:, :, begin : begin + count] = np.einsum("kr,gcrl->gckl", patterns[:, : case.rows], rows[:, :, :, s])
    return planes, first[:-1]


@cache
def interpret(name: str, inputs: str, avx512: bool) -> tuple[frozenset[str], list[set[int]]]:
    """Check a layer's code, all of it; return the forms in it, and the vector registers by the place of the operand."""
    case, is_float = CASES[name], inputs == "float32"
    made = pack(case, inputs)._native.machine_code(avx512)
    assert made
    code, chunks, patterns = made
    dtype, halves = (F32, 1) if is_float else (np.int16, 2)
    width = 64 if avx512 else 32
    lanes, outputs = width // np.dtype(dtype).itemsize, case.outputs // case.groups
    q = make_weights(case)
    taps = case.rows * case.columns
    weights = q.decode().reshape(case.groups, outputs, case.channels, taps).astype(float)

    # In half of the lanes an output's sum is as large as it can be.
    rng = np.random.default_rng(0)
    limit = 8 if is_float or INPUTS[inputs][1] == 4 else 128
    x = rng.integers(-limit, limit + 1, (case.groups, case.channels, taps, lanes))
    for lane in range(0, lanes, 2):
        x[..., lane] = np.where(weights[:, lane // 2 % outputs] < 0, -limit, limit) * (1 - lane % 4)
    x[..., 1], x[..., 3] = limit, -limit  # and the sum of all rows
    columns = np.array(patterns).reshape(-1, 3)
    planes, order = place_columns(x, dtype, case, columns) if patterns else place_taps(x, dtype, rng)
    tap_source = order * width

    forms: set[str] = set()
    seen: list[set[int]] = [set(), set(), set()]
    end = next_output = 0
    constants = round_up(chunks[-1][3][-1][1])
    for group, first_output, count, segments in chunks:
        assert (first_output, first_output // outputs) == (next_output, group)
        next_output += count
        acc = np.full(count * halves * width, 0x55, np.uint8)
        for begin, segment_end, channel, prefetch_lines in segments:
            assert begin == round_up(end) and code[end:begin] == b"\xcc" * (begin - end)
            end = segment_end
            instructions = disassemble(code, begin, end, avx512)
            assert [i.name for i in instructions if i.name in ("ret", "vzeroupper")] == ["vzeroupper", "ret"]
            assert [i.name for i in instructions[-2:]] == ["vzeroupper", "ret"]
            readable = {
                X: planes[group].reshape(-1).view(np.uint8),
                TAPS: tap_source.view(np.uint8),
                CODE + constants: np.frombuffer(code, np.uint8)[constants:],
            }
            machine = Machine(avx512, readable, {ACC: acc})
            stride = planes.strides[1]
            arguments = {"rdi": X + channel * stride, "rsi": ACC, "rdx": PREFETCH, "rcx": stride, "r8": TAPS}
            prefetched = machine.run(instructions, **arguments)
            assert prefetched == [PREFETCH + 64 * k for k in range(prefetch_lines)]
            forms.update(i.form for i in instructions)
            for registers, more in zip(seen, machine.seen, strict=True):
                registers |= more
        expected = np.einsum("oct,ctl->ol", weights[group, first_output % outputs :][:count], x[group])
        if is_float:
            got = acc.view(F32).reshape(count, lanes)
        else:  # low halves of the words, then the high ones
            got = acc.view(np.int32).reshape(count, 2, lanes // 2).swapaxes(1, 2).reshape(count, lanes)
        assert np.array_equal(got, expected)
    assert next_output == case.outputs
    assert code[end:constants] == b"\xcc" * (constants - end)
    words = np.frombuffer(code[constants:], np.uint32).reshape(-1, width // 4)
    assert (words == words[:, :1]).all()
    return frozenset(forms), seen


@pytest.mark.parametrize("avx512", [False, True], ids=["avx2", "avx512"])
@each_case
def test_interpreted(name: str, inputs: str, avx512: bool) -> None:
    interpret(name, inputs, avx512)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa in ("avx2", "avx512")])
@each_case
def test_run(name: str, inputs: str, isa: str) -> None:
    pycodesign.set_isa(isa)
    got = ops.conv2d(make_input(CASES[name], inputs), pack(CASES[name], inputs))
    assert np.array_equal(got, expect(CASES[name], inputs))


# r: a general register, v: ymm or zmm, d8 and d32: displacements. With EVEX, d8 counts vectors.
ADDITIONS = "vaddps", "vsubps", "vpaddw", "vpsubw"
FORMS = {
    *("vmovups v, [rip]", "vmovups v, [r+1*r]", "vmovups v, [r+1*r+d8]"),
    *("vmovups v, [r]", "vmovups v, [r+d8]", "vmovups v, [r+d32]", "vmovups [r], v", "vmovups [r+d8], v"),
    *("vaddps v, v, v", "vaddps v, v, [r+1*r]", "vsubps v, v, v", "vsubps v, v, [r+1*r]"),
    *("vmulps v, v, [rip]", "vfmadd132ps v, v, [rip]", "vfnmadd132ps v, v, [rip]"),
    *("vfmadd231ps v, v, v", "vfnmadd231ps v, v, v"),
    *("vpaddw v, v, v", "vpaddw v, v, [r+1*r]", "vpsubw v, v, v", "vpsubw v, v, [r+1*r]", "vpmullw v, v, [rip]"),
    *("vpslld v, v, imm", "vpsrad v, v, imm", "vpaddd v, v, v", "vpsubd v, v, v"),
    *("vpaddd v, v, [r]", "vpaddd v, v, [r+d8]", "vaddps v, v, [r]"),
    *("lea r, [r]", "lea r, [r+1*r]", "lea r, [r+2*r]", "lea r, [r+4*r]"),
    *("mov r, [r]", "mov r, [r+d8]", "mov r, [r+d32]"),
    *(f"{add} v, v, {row}" for add in ADDITIONS for row in ("[r+d8]", "[r+d32]", "[r+1*r+d8]")),
    *("prefetcht1 [r]", "prefetcht1 [r+d8]", "prefetcht1 [r+d32]", "vzeroupper", "ret"),
}
# Of code that prefetches would not fetch: all processors but AMD's Zen 3 and 4 are taken to drop them.
CPU = Path("/proc/cpuinfo").read_text()
READS_AHEAD = set() if re.search(r"AuthenticAMD\ncpu family\s*: 25\n", CPU) else {"test [r], r", "test [r+d32], r"}
AVX2_FORMS = {
    *("vpxor v, v, v", "vmovups [r+d32], v", "vpaddd v, v, [r+d32]", "vmovups v, [r+1*r+d32]"),
    *(f"{add} v, v, [r+1*r+d32]" for add in ADDITIONS),
}
AVX512_FORMS = {"vpxord v, v, v"}


@pytest.mark.parametrize("avx512", [False, True], ids=["avx2", "avx512"])
def test_columns_occur(avx512: bool) -> None:
    with_columns = {
        name
        for name, inputs in product(CASES, INPUTS)
        if fits(name, inputs) and pack(CASES[name], inputs)._native.machine_code(avx512)[2]
    }
    wanted = {name for name in CASES if "columns" in name} | {"few kernels", "few ternary kernels"}
    assert wanted <= with_columns


@pytest.mark.parametrize("avx512", [False, True], ids=["avx2", "avx512"])
def test_every_form_occurs(avx512: bool) -> None:
    forms: set[str] = set()
    registers: list[set[int]] = [set(), set(), set()]
    for name, inputs in product(CASES, INPUTS):
        if fits(name, inputs):
            here, seen = interpret(name, inputs, avx512)
            forms |= {re.sub("[yz]mm", "v", form) for form in here}
            registers = [a | b for a, b in zip(registers, seen, strict=True)]
    assert forms == FORMS | READS_AHEAD | (AVX512_FORMS if avx512 else AVX2_FORMS)
    assert registers == [set(range(32 if avx512 else 16))] * 3


@pytest.mark.parametrize("avx512", [False, True], ids=["avx2", "avx512"])
@pytest.mark.parametrize("dilation", [1 << 20, 1 << 22, 1 << 24])
@pytest.mark.parametrize("stride", [1, 2])
def test_columns_are_within_reach(stride: int, dilation: int, avx512: bool) -> None:
    """Displacements have 32 bits. Where some would be longer, code adds single inputs, whose addresses are data."""
    case = replace(CASES["columns"], dilation=dilation, stride=stride)
    made = pack(case, "float32")._native.machine_code(avx512)
    assert made
    for *_, segments in made[1]:
        for begin, end, *_ in segments:
            operands = [o for i in disassemble(made[0], begin, end, avx512) for o in i.operands]
            assert all(o.displacement >= 0 for o in operands if isinstance(o, Memory))


# ---- life ----------------------------------------------------------------------------------------------------------


def run_child(folder: Path, body: str, **environment: str) -> str:
    """Run in a process that begins in `folder`, with this file's names; return what it prints."""
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_codegen import *\n{body}"
    command = [sys.executable, "-c", script]
    child = subprocess.run(command, env=os.environ | environment, cwd=folder, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return child.stdout


def test_no_memory_is_writable_and_executable(tmp_path: Path) -> None:
    body = "layers = [pack(CASES[name], 'float32') for name in CASES]\nprint(Path('/proc/self/maps').read_text())"
    mappings = [line.split() for line in run_child(tmp_path, body).splitlines() if line]
    assert not [m for m in mappings if "w" in m[1] and "x" in m[1]]


def test_turned_off(tmp_path: Path) -> None:
    body = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    for inputs in INPUTS:
        packed = pack(CASES["ternary"], inputs)
        assert packed._native.machine_code(True) is None
        assert packed.explain()["algorithm"] == "tables" and packed.explain()["code_bytes"] == 0
        got = ops.conv2d(make_input(CASES["ternary"], inputs), packed)
        assert np.array_equal(got, expect(CASES["ternary"], inputs))
print(*(w.message for w in caught), sep="\\n")
"""
    warning = run_child(tmp_path, body, PYCODESIGN_JIT="0", PYCODESIGN_ISA=ISAS[-1]).strip()
    assert re.fullmatch(r"algorithm: 'codegen' asked for, 'tables' runs: .*PYCODESIGN_JIT.*", warning)


@pytest.mark.parametrize(
    ("value", "is_on"), [("1", True), ("True", True), ("", True), ("OFF", False), ("False", False)]
)
def test_only_a_plain_yes_turns_it_on(value: str, is_on: bool, tmp_path: Path) -> None:
    body = "from pycodesign import _core; print(_core.generates_code())"
    said = run_child(tmp_path, body, PYCODESIGN_JIT=value, PYCODESIGN_ISA=ISAS[-1])
    assert said.strip() == str(is_on and "avx2" in ISAS)


FORBIDDEN = """
import ctypes, warnings
assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0, "no PR_SET_MDWE"  # nothing becomes executable from here on
with warnings.catch_warnings(record=True) as caught:
    for inputs in INPUTS:
        packed = pack(CASES["ternary"], inputs)
        assert packed._native.machine_code(True) is None
        assert packed.explain()["algorithm"] == "tables"
        got = ops.conv2d(make_input(CASES["ternary"], inputs), packed)
        assert np.array_equal(got, expect(CASES["ternary"], inputs))
print(*(w.message for w in caught), sep="\\n")
"""


def test_forbidden_by_the_system(tmp_path: Path) -> None:
    if ctypes.CDLL(None).prctl(66, 0, 0, 0, 0) < 0:  # PR_GET_MDWE
        pytest.skip("memory that never becomes executable needs Linux 6.3")
    warning = run_child(tmp_path, FORBIDDEN, PYCODESIGN_ISA=ISAS[-1]).strip()
    assert re.fullmatch(r"algorithm: 'codegen' asked for, 'tables' runs: .* lets memory become executable.*", warning)


NETWORK = """
import ctypes, copy, warnings
import torch
from pycodesign import quantize
from pycodesign.nn import convert, report
conv = torch.nn.Conv2d
model = torch.nn.Sequential(conv(16, 32, 3, padding=1), torch.nn.ReLU(), conv(32, 32, 3, padding=1)).eval()
for layer in (model[0], model[2]):
    layer.weight.data = torch.from_numpy(quantize.ternary(layer.weight).dequantize())
x = torch.rand(2, 16, 14, 14)
expected = model(x).detach()
assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0, "no PR_SET_MDWE"
for activations, error in (("float32", 1e-5), ("uint8", 0.05)):
    y = convert(model, activations=activations, example_inputs=x, strict=True)(x)
    assert float((y - expected).abs().max() / expected.abs().max()) < error
"""


def test_networks_where_the_system_forbids_code(tmp_path: Path) -> None:
    if ctypes.CDLL(None).prctl(66, 0, 0, 0, 0) < 0:  # PR_GET_MDWE
        pytest.skip("memory that never becomes executable needs Linux 6.3")
    run_child(tmp_path, NETWORK, PYCODESIGN_ISA=ISAS[-1])


def test_code_is_never_saved(tmp_path: Path) -> None:
    case = Case(64, 64, 9, TERNARY)
    packed = pack(case, "uint8")
    packed.save(tmp_path / "layer")
    weights = case.outputs * case.channels * case.rows * case.columns
    assert (tmp_path / "layer").stat().st_size < weights // 4 + 4096
    loaded = ops.load_packed(tmp_path / "layer")
    assert loaded.algorithm == "codegen"
    assert loaded._native.machine_code(True) == packed._native.machine_code(True)
    assert np.array_equal(ops.conv2d(make_input(case, "uint8"), loaded), expect(case, "uint8"))


@pytest.mark.parametrize("inputs", INPUTS)
def test_instruction_set_changes_after_packing(inputs: str) -> None:
    case = CASES["ternary"]
    packed, x, expected = pack(case, inputs), make_input(case, inputs), expect(case, inputs)
    for isa in (*ISAS, *reversed(ISAS)):
        pycodesign.set_isa(isa)
        assert packed.explain()["algorithm"] == ("codegen" if _core.generates_code() else "tables")
        assert np.array_equal(ops.conv2d(x, packed), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_concurrent_first_calls(isa: str) -> None:
    case = CASES["ternary"]
    x, expected, together = make_input(case, "uint8"), expect(case, "uint8"), Barrier(8)
    packed = pack(case, "uint8")
    pycodesign.set_isa(isa)

    def first_call(_: int) -> Array:
        together.wait()
        return ops.conv2d(x, packed)

    with ThreadPoolExecutor(8) as pool:
        assert all(np.array_equal(got, expected) for got in pool.map(first_call, range(8)))


@pytest.mark.parametrize("algorithm", ops.CONV2D_ALGORITHMS[1:])
def test_prepacking_leaks_nothing(algorithm: str) -> None:
    def usage() -> tuple[int, int, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096, len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("\n")

    case, q = CASES["four levels"], make_weights(CASES["four levels"])
    weights = to_codebook(q) if algorithm == "codebook" else q
    assert weights
    for count in (500, 10_000):
        before = usage()
        for _ in range(count):
            ops.prepack_conv2d(weights, algorithm=algorithm, **options(case, "float32"))
    after = usage()
    assert after[0] - before[0] < 4 << 20
    assert after[1] == before[1]
    assert after[2] - before[2] < 10


# ---- names for perf ------------------------------------------------------------------------------------------------


RECORDED = """
layer = pack(CASES["segments"], "float32")
layer._native.machine_code(False)
print(os.getpid(), Path("/proc/self/maps").read_text(), sep="\\n")
"""


def test_jitdump(tmp_path: Path) -> None:
    environment = {"PYCODESIGN_JITDUMP": str(tmp_path), "PYCODESIGN_ISA": "scalar"}  # whose packing makes no code
    process, *mappings = run_child(tmp_path, RECORDED, **environment).splitlines()
    (path,) = tmp_path.iterdir()
    assert path.name == f"jit-{process}.dump"
    assert [line.split()[1] for line in mappings if line.endswith(str(path))] == ["r-xp"]

    data = path.read_bytes()
    magic, version, size, machine, _, pid, _, flags = struct.unpack_from("<6I2Q", data)
    assert (magic, version, size, machine, pid, flags) == (0x4A695444, 1, 40, 62, int(process), 0)
    recorded = []
    while size < len(data):
        kind, length, _, pid, _, virtual, address, code_size, number = struct.unpack_from("<2IQ2I4Q", data, size)
        name, code = data[size + 56 : size + length].split(b"\0", 1)
        assert (kind, pid, virtual, code_size, number) == (0, int(process), address, len(code), len(recorded))
        ends = (line.split()[0].split("-") for line in mappings if " r-x" in line)
        assert any(int(low, 16) <= address <= int(high, 16) - code_size for low, high in ends)
        recorded.append((name.decode(), code))
        size += length

    made = pack(CASES["segments"], "float32")._native.machine_code(False)
    assert made
    assert recorded == [
        (f"pycodesign 12x48x9 f32 outputs {first}-{first + count - 1} segment {i}", made[0][begin:end])
        for _, first, count, segments in made[1]
        for i, (begin, end, *_) in enumerate(segments)
    ]


def test_jitdump_only_when_asked(tmp_path: Path) -> None:
    run_child(tmp_path, RECORDED, PYCODESIGN_JITDUMP="0")
    assert not list(tmp_path.iterdir())
    run_child(tmp_path, RECORDED, PYCODESIGN_JITDUMP="1")
    assert [path.name[:4] for path in tmp_path.iterdir()] == ["jit-"]
