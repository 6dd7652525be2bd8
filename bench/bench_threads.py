"""Alternate a torch convolution with one of ours, and call one layer from several threads: what does sharing cost?

Both convolutions run on the same team of threads, so a round should take as long as its two halves alone, measured in
the same process. Two teams that spin on the same cores would take tens of times longer. Prints the ratio of the
medians, and of the fastest blocks of runs: those that other processes disturbed least. Then a larger layer of ours: the
99th percentile of a call over its median, and four callers at once over the same calls one after the other. Writes
nothing unless ``--save`` is given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import pycodesign
from pycodesign import ops, quantize
from pycodesign.bench import harness

RUNS = 20  # consecutive calls of one kind; each block times each kind in turn
CALLERS = 4


def build_halves(threads: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a torch float32 convolution and one of ours, (1, 64, 14, 14) with 3x3 kernels, on `threads` threads."""
    torch.set_num_threads(threads)
    pycodesign.set_num_threads(threads)
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 64, 3, 3), dtype=np.float32)
    x = rng.integers(0, 256, (1, 64, 14, 14), dtype=np.uint8)
    packed = ops.prepack_conv2d(quantize.ternary(w), padding=1, input_dtype="uint8")
    x_torch, w_torch = torch.from_numpy(x.astype(np.float32)), torch.from_numpy(w)
    return lambda: torch.conv2d(x_torch, w_torch, padding=1), lambda: ops.conv2d(x, packed)


def measure(theirs: Callable[[], object], ours: Callable[[], object], blocks: int) -> dict[str, list[harness.Spread]]:
    """Time, block by block, each half alone and rounds of both."""

    def both() -> None:
        theirs()
        ours()

    spreads: dict[str, list[harness.Spread]] = {"torch": [], "pycodesign": [], "round": []}
    for _ in range(blocks):
        for kind, run in zip(spreads, (theirs, ours, both), strict=True):
            run()
            seconds = []
            for _ in range(RUNS):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
            spreads[kind].append(harness.Spread.of(seconds))
    return spreads


def measure_callers(threads: int, blocks: int) -> dict[str, float]:
    """Time a (1, 128, 28, 28) ternary layer: calls of one caller, and of `CALLERS` at once."""
    pycodesign.set_num_threads(threads)
    rng = np.random.default_rng(0)
    packed = ops.prepack_conv2d(quantize.ternary(rng.standard_normal((128, 128, 3, 3), dtype=np.float32)), padding=1)
    x = rng.standard_normal((1, 128, 28, 28), dtype=np.float32)

    def call_often(_: int = 0) -> list[float]:
        out, seconds = np.empty_like(x), []
        for _ in range(RUNS):
            start = time.perf_counter()
            ops.conv2d(x, packed, out=out)
            seconds.append(time.perf_counter() - start)
        return seconds

    single, at_once, in_turn = [], [], []
    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(call_often, range(CALLERS)))
        for _ in range(blocks):
            start = time.perf_counter()
            for _ in range(CALLERS):
                single += call_often()
            in_turn.append(time.perf_counter() - start)
            start = time.perf_counter()
            list(pool.map(call_often, range(CALLERS)))
            at_once.append(time.perf_counter() - start)
    p50, p99 = np.percentile(single, [50, 99])
    return {
        "median_us": 1e6 * float(p50),
        "p99_over_median": float(p99 / p50),
        "four_at_once": statistics.median(at_once) / statistics.median(in_turn),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--save", type=Path, metavar="DIRECTORY", help="write the result there")
    arguments = parser.parse_args()

    with torch.inference_mode():
        spreads = measure(*build_halves(arguments.threads), arguments.blocks)
    time.sleep(0.1)  # torch's team stops spinning
    callers = measure_callers(arguments.threads, arguments.blocks)
    medians = {kind: [spread.median for spread in blocks] for kind, blocks in spreads.items()}
    typical = {kind: statistics.median(seconds) for kind, seconds in medians.items()}
    fastest = {kind: min(seconds) for kind, seconds in medians.items()}
    result = {
        "schema": harness.SCHEMA,
        "suite": "threads",
        "facts": harness.gather_facts(),
        "threads": arguments.threads,
        "blocks": arguments.blocks,
        "us": {kind: {"median": 1e6 * typical[kind], "fastest_block": 1e6 * fastest[kind]} for kind in medians},
        "ratio": typical["round"] / (typical["torch"] + typical["pycodesign"]),
        "ratio_fastest_blocks": fastest["round"] / (fastest["torch"] + fastest["pycodesign"]),
        "callers": callers,
    }
    if arguments.save:
        harness.write_result(result, arguments.save)
    if arguments.json:
        print(json.dumps(result))
    else:
        for kind in medians:
            print(f"{kind:10}  {1e6 * typical[kind]:8.1f} us  (fastest block {1e6 * fastest[kind]:.1f})")
        print(f"round / (torch + pycodesign) = {result['ratio']:.2f}  ({result['ratio_fastest_blocks']:.2f})")
        print(f"one caller: median {callers['median_us']:.1f} us, 99th percentile / median", end=" ")
        print(f"= {callers['p99_over_median']:.2f}")
        print(f"{CALLERS} callers at once / one after the other = {callers['four_at_once']:.2f}")


if __name__ == "__main__":
    main()
