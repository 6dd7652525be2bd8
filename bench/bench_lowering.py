"""Hold the count of operations against time: programs of `factor` as machine code, beside the layer's own code.

3x3 layers of random weights, float32, one thread. `codegen` is a whole convolution with everything that belongs to it;
its instructions are counted by disassembling it (pip install capstone). The others are programs as straight-line code,
their inputs staged, in the caches: of the whole layer, over a few vectors of pixels; or of tiles, 32 outputs by 32
channels that add to what the tile before left, each over the vectors of a map of 14 x 14. Every program is validated
and its results are checked. Counts and times are for each vector: 16 pixels with AVX-512, 8 with AVX2.

python bench/bench_lowering.py
python bench/bench_lowering.py --quick --json lowering.json
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import capstone
import click
import numpy as np
from bench_operations import draw, print_rows
from capstone import x86
from rich.console import Console
from rich.progress import track

import pycodesign
from pycodesign import QuantizedTensor, ops
from pycodesign.bench import harness
from pycodesign.repetition import LoweredProgram, SumProgram, factor, lower
from pycodesign.repetition.program import ADD, MULTIPLY

RESULTS = Path(__file__).parent / "results" / "lowering.json"
WEIGHTS = {"binary": [-1, 1], "ternary": [-1, 0, 1], "uniform2": [-2, -1, 0, 1]}
SIZES = {32: 56, 64: 56, 128: 28, 256: 14}  # channels and the size of the map, as in ResNet-18
METHODS = ("pair", "patterns")
VECTORS = 4  # of a layer's program: their inputs fit the second-level cache
TILE = 32  # outputs and channels
TILE_VECTORS = 12
COUNTS = ("operations", "instructions", "loads", "stores")
SECONDS = 0.01  # at least, of one timing
AVX512 = ("avx512", "avx512_vbmi")


def lower_checked(program: SumProgram) -> LoweredProgram:
    program.validate()
    code = lower(program)
    x = np.random.default_rng(0).integers(-64, 64, (program.inputs, 2 * code.lanes))
    if not np.array_equal(code(x.astype(np.float32)), program(x)):
        raise harness.CheckError(f"{program.method}: expected the program's sums from its machine code, got others")
    return code


def prepare_programs(programs: Iterable[SumProgram], vectors: int) -> tuple[dict[str, Any], Callable[[], object]]:
    """Lower and check programs of one shape; return what they take together, and what runs all on the same vectors."""
    codes = [lower_checked(program) for program in programs]
    x = np.random.default_rng(0).standard_normal((codes[0].program.inputs, vectors * codes[0].lanes), np.float32)
    staged = codes[0].stage(x)
    out = codes[0].run(staged)
    counts = {name: sum(getattr(code, name) for code in codes) for name in COUNTS}

    def run() -> None:
        for code in codes:
            code.run(staged, out)

    return counts | {"code_bytes": sum(len(code.code) for code in codes)}, run


def factor_tiles(q: QuantizedTensor, method: str) -> Iterator[SumProgram]:
    for codes in np.split(q.codes, len(q.codes) // TILE):
        for tile in np.split(codes, q.shape[1] // TILE, axis=1):
            yield accumulate(factor(QuantizedTensor(tile, q.levels, np.ones(TILE, np.float32)), method))


def accumulate(program: SumProgram) -> SumProgram:
    """The program that adds its results to further inputs, one for each output."""
    outputs, inputs = program.codes.shape
    zero, one = program.levels.shape[1], program.levels.shape[1] + 1
    levels = np.hstack([program.levels, np.tile([0, 1], (outputs, 1))])

    def shift(values: Any) -> Any:
        return values + outputs * (values >= inputs)

    right = np.where(program.op == MULTIPLY, program.right, shift(program.right))
    return replace(
        program,
        op=np.append(program.op, np.full(outputs, ADD, np.uint8)),
        left=np.concatenate([shift(program.left), shift(program.outputs)]).astype(np.int32),
        right=np.concatenate([right, inputs + np.arange(outputs)]).astype(np.int32),
        outputs=(inputs + outputs + program.op.size + np.arange(outputs)).astype(np.int32),
        codes=np.hstack([program.codes, np.where(np.eye(outputs, dtype=bool), one, zero)]).astype(np.uint8),
        levels=levels,
    )


def prepare_layer(q: QuantizedTensor, size: int) -> tuple[dict[str, Any], Callable[[], object]]:
    """The same of a convolution by `codegen`, over all vectors of its map."""
    packed = ops.prepack_conv2d(q, padding=1, algorithm="codegen")
    x = np.random.default_rng(0).integers(-64, 64, (1, q.shape[1], size, size)).astype(np.float32)
    avx512 = pycodesign.show_config()["isa"] in AVX512
    explained = packed.explain()
    counts = {"operations": explained["adds"] + explained["multiplies"]}
    counts |= count_instructions(packed._native.machine_code(avx512)) | {"code_bytes": explained["code_bytes"]}
    out = ops.conv2d(x, packed)
    return counts, partial(ops.conv2d, x, packed, out=out)


def count_instructions(machine_code: Any) -> dict[str, int]:
    """Vector instructions of all segments, and how many of them read and write memory."""
    code, chunks, _ = machine_code
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = True
    counts = dict.fromkeys(("instructions", "loads", "stores"), 0)
    for *_, segments in chunks:
        for begin, end, *_ in segments:
            for instruction in decoder.disasm(code[begin:end], begin):
                if not instruction.mnemonic.startswith("v") or not instruction.operands:
                    continue
                in_memory = [operand.type == x86.X86_OP_MEM for operand in instruction.operands]
                counts["instructions"] += 1
                counts["stores"] += in_memory[0]
                counts["loads"] += any(in_memory[1:])
    return counts


def measure(ways: list[Callable[[], object]], rounds: int) -> list[harness.Spread]:
    """Time all in turns, each long enough for the clock: seconds a call."""
    repeats = []
    for way in ways:
        way()
        start = time.perf_counter()
        way()
        repeats.append(1 + int(SECONDS / (time.perf_counter() - start)))
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, repeat, times in zip(ways, repeats, seconds, strict=True):
            way()
            start = time.perf_counter()
            for _ in range(repeat):
                way()
            times.append((time.perf_counter() - start) / repeat)
    return [harness.Spread.of(times) for times in seconds]


def measure_layer(channels: int, weights: str, rounds: int) -> list[dict[str, Any]]:
    q = draw((channels, channels, 3, 3), WEIGHTS[weights], 0)
    lanes = 16 if pycodesign.show_config()["isa"] in AVX512 else 8
    prepared = [("codegen", *prepare_layer(q, SIZES[channels]), SIZES[channels] ** 2 / lanes)]
    for method in METHODS:
        prepared.append((method, *prepare_programs([factor(q, method)], VECTORS), VECTORS))
        if channels > TILE:
            tiles = prepare_programs(factor_tiles(q, method), TILE_VECTORS)
            prepared.append((f"{method}, tiles", *tiles, TILE_VECTORS))
    spreads = measure([run for _, _, run, _ in prepared], rounds)
    dense_ops = channels * (2 * 9 * channels - 1)
    rows: list[dict[str, Any]] = []
    for (method, counts, _, vectors), spread in zip(prepared, spreads, strict=True):
        row = {"layer": f"3x3 {channels}-{channels}", "weights": weights, "method": method} | counts
        row |= {"removed": 1 - counts["operations"] / dense_ops}
        row |= {"ns": 1e9 * spread.median / vectors, "ns_minimum": 1e9 * spread.minimum / vectors}
        row |= {"ns_per_operation": row["ns"] / row["operations"]}
        rows.append(row | {"time": row["ns"] / (rows[0] if rows else row)["ns"]})
    return rows


@click.command()
@click.option("--quick", is_flag=True, help="Layers of 32 channels, few rounds.")
@click.option("--json", "file", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS, show_default=True)
def main(quick: bool, file: Path) -> None:
    """Check, time, print a table; write it with the machine's facts."""
    pycodesign.set_num_threads(1)
    rounds = 3 if quick else 15
    cases = [(n, weights) for n in SIZES for weights in WEIGHTS if n == 32 or not quick]
    facts = harness.gather_facts()
    rows = []
    for case in track(cases, "timing", console=Console(stderr=True), transient=True):
        rows += measure_layer(*case, rounds)
    result = {
        "schema": harness.SCHEMA,
        "suite": "lowering",
        "facts": facts,
        "options": {"quick": quick, "rounds": rounds, "vectors": VECTORS, "tile_vectors": TILE_VECTORS, "threads": 1},
        "rows": rows,
    }
    columns = ["layer", "weights", "method", "operations", "removed", "instructions", "loads", "stores"]
    columns += ["ns", "ns_per_operation", "time"]
    print_rows("For each vector", rows, columns, Console(width=None if Console().is_terminal else 160))
    click.echo("time: over that of the layer's own code, which is the whole convolution; below 1 a program is faster")
    file.write_text(harness.format_result(result))
    click.echo(f"wrote {file}")


if __name__ == "__main__":
    main()
