"""Check, then time `ops.delta_linear` beside torch's sparse CSR, scipy and dense products, in turns in one process.

The others compute one product for each task. torch's CSR and scipy's take inputs and give results with tokens one after
another, as suits them best ("by feature"); ours, and "torch CSR, rows", take and give rows (T, I) and (N, T, O), as the
layers of a network do, and torch transposes for it. Only results that exist already are added to: torch adds the shared
layer's output in the same call; scipy's product leaves it out. The floor is the larger of two times: to read and write
what must be at least, at the bandwidth at which torch fills memory of that size, and of one multiply-add for each entry
and 16 tokens at two for each cycle of 4 GHz. Prints a table and exits with 1 if a contender computed something else;
writes nothing unless ``--json`` is given.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import pycodesign
from pycodesign import ops
from pycodesign.bench import harness

INPUTS, OUTPUTS, TASKS = 768, 3072, 8
OURS = "pycodesign"


@dataclass(frozen=True)
class Setting:
    """What is timed: density of sparse deltas, or the rank of pairs; tokens; and how many of them are asked for."""

    tokens: int
    density: float = 0.0
    rank: int = 0
    pooled: bool = False
    dtype: str = "float32"

    def __str__(self) -> str:
        kind = f"rank {self.rank}" if self.rank else f"{self.density:.1%}"
        return f"{kind}{' ' + self.dtype if self.dtype != 'float32' else ''}{', pooled' if self.pooled else ''}"


SETTINGS = (
    *(Setting(tokens, 0.014) for tokens in (128, 64, 16, 4, 1)),
    Setting(128, 0.014, pooled=True),
    Setting(128, 0.014, dtype="bfloat16"),
    *(Setting(128, density) for density in (0.005, 0.05, 0.1)),
    *(Setting(tokens, rank=8) for tokens in (128, 16, 1)),
    Setting(128, rank=64),
)
QUICK = (Setting(16, 0.014), Setting(16, 0.014, pooled=True), Setting(16, rank=8))


@dataclass(frozen=True, eq=False)
class Way:
    """One way to compute a setting; `read` brings its result into the order (N, T, O)."""

    name: str
    run: Callable[[], Any]
    read: Callable[[Any], np.ndarray]
    adds_base: bool = True


def make_deltas(setting: Setting) -> list[Any]:
    rng = np.random.default_rng(0)
    if setting.rank:
        shapes = (OUTPUTS, setting.rank), (setting.rank, INPUTS)
        return [tuple(rng.standard_normal(s, np.float32) / 8 for s in shapes) for _ in range(TASKS)]
    return [scipy.sparse.random(OUTPUTS, INPUTS, setting.density, "csr", np.float32, n) for n in range(TASKS)]


def to_csr(matrix: Any) -> torch.Tensor:
    arrays = matrix.indptr.astype(np.int32), matrix.indices.astype(np.int32), matrix.data
    return torch.sparse_csr_tensor(*map(torch.from_numpy, arrays), size=matrix.shape)


def make_ways(setting: Setting, deltas: list[Any], x: torch.Tensor, base: torch.Tensor) -> list[Way]:
    """Return every way, ours first; of pooled settings all but ours compute that one token alone, too."""
    packed = ops.prepack_deltas(deltas, dtype=setting.dtype)
    positions = [0] if setting.pooled else None
    out = torch.empty(TASKS, 1 if setting.pooled else setting.tokens, OUTPUTS)
    ways = [
        Way(OURS, lambda: ops.delta_linear(x, base, packed, positions=positions, out=out), torch.Tensor.numpy),
    ]
    if setting.pooled:
        x_all, base_all = x.T.contiguous(), base.T.contiguous()
        x, base = x[:1], base[:1]
    columns, base_columns = x.T.contiguous(), base.T.contiguous()
    stacked = torch.empty(TASKS, *base.shape)

    def by_feature(results: list[torch.Tensor]) -> np.ndarray:
        return np.stack([np.asarray(z).T[: out.shape[1]] for z in results])

    if setting.rank:
        pairs = [tuple(torch.from_numpy(m.T.copy()) for m in (b, a)) for b, a in deltas]
        down = torch.cat([a for _, a in pairs], 1)
        up = torch.stack([b for b, _ in pairs])

        def low_rank() -> list[torch.Tensor]:
            return [torch.addmm(base, x @ a, b, out=stacked[n]) for n, (b, a) in enumerate(pairs)]

        def low_rank_stacked() -> torch.Tensor:
            u = (x @ down).view(len(x), TASKS, setting.rank).transpose(0, 1)
            return torch.baddbmm(base.expand(TASKS, -1, -1), u, up, out=stacked)

        ways.append(Way("torch, two products for each task", low_rank, lambda _: stacked.numpy()))
        ways.append(Way("torch, A stacked, batched B", low_rank_stacked, lambda _: stacked.numpy()))
        return ways
    matrices = [to_csr(d) for d in deltas]
    dense = [torch.from_numpy(d.toarray().T.copy()) for d in deltas]
    arrays = columns.numpy()

    def rows() -> torch.Tensor:
        turned, base_turned = x.T.contiguous(), base.T.contiguous()
        for n, matrix in enumerate(matrices):
            stacked[n].copy_(torch.addmm(base_turned, matrix, turned).T)
        return stacked

    ways += [
        Way("torch CSR, by feature", lambda: [torch.addmm(base_columns, m, columns) for m in matrices], by_feature),
        Way("torch CSR, rows", rows, torch.Tensor.numpy),
        Way("scipy CSR, by feature", lambda: [d @ arrays for d in deltas], by_feature, adds_base=False),
        Way(
            "torch dense",
            lambda: [torch.addmm(base, x, w, out=stacked[n]) for n, w in enumerate(dense)],
            lambda _: stacked.numpy(),
        ),
    ]
    if setting.pooled:
        ways.append(
            Way("torch CSR, all tokens", lambda: [torch.addmm(base_all, m, x_all) for m in matrices], by_feature)
        )
    return ways


def check(ways: list[Way], setting: Setting, deltas: list[Any], x: torch.Tensor, base: torch.Tensor) -> None:
    x64, base64 = (t[: 1 if setting.pooled else None].double().numpy() for t in (x, base))
    full = [b @ a if setting.rank else d.toarray() for d in deltas for b, a in [d if setting.rank else (d, d)]]
    exact = np.stack([x64 @ w.T.astype(np.float64) for w in full])
    for way in ways:
        wrong = abs(way.read(way.run()) - exact - (base64 if way.adds_base else 0)).max() / abs(exact).max()
        if wrong > (2**-7 if way.name == OURS and setting.dtype == "bfloat16" else 1e-5):
            raise harness.CheckError(
                f"{way.name}, {setting}: expected the definition's values, got others by {wrong:.1e}"
            )


def measure(ways: list[Way], rounds: int) -> dict[Way, harness.Spread]:
    """Time the ways in turns: a pause for the other threads to rest, a run to wake one's own, and the timing."""
    seconds: dict[Way, list[float]] = {way: [] for way in ways}
    for turn in range(rounds):
        first = turn % len(ways)
        for way in [*ways[first:], *ways[:first]]:
            time.sleep(harness.PAUSE_SECONDS)
            way.run()
            start = time.perf_counter()
            way.run()
            seconds[way].append(time.perf_counter() - start)
    return {way: harness.Spread.of(values) for way, values in seconds.items()}


def find_floor(setting: Setting, deltas: list[Any], threads: int) -> float:
    """Seconds below which nothing can be: memory to write and read, and multiply-adds."""
    tokens = 1 if setting.pooled else setting.tokens
    values = sum(b.size + a.size for b, a in deltas) if setting.rank else sum(d.nnz for d in deltas)
    z = torch.empty(TASKS * tokens * OUTPUTS)
    fills = []
    for _ in range(9):
        start = time.perf_counter()
        z.zero_()
        fills.append(time.perf_counter() - start)
    return max(min(fills), values * max(tokens, 16) / 16 / 2 / 4e9 / threads)


def run(settings: tuple[Setting, ...], threads: tuple[int, ...], rounds: int) -> dict[str, Any]:
    facts = harness.gather_facts()
    facts["packages"]["scipy"] = harness.package_version("scipy")
    rng = np.random.default_rng(1)
    result_rows = []
    cases = [(count, setting) for count in threads for setting in settings]
    for count, setting in track(cases, "timing", console=Console(stderr=True), transient=True):
        torch.set_num_threads(count)
        pycodesign.set_num_threads(count)
        deltas = make_deltas(setting)
        x = torch.from_numpy(rng.standard_normal((setting.tokens, INPUTS), np.float32))
        base = torch.from_numpy(rng.standard_normal((setting.tokens, OUTPUTS), np.float32))
        ways = make_ways(setting, deltas, x, base)
        check(ways, setting, deltas, x, base)
        floor = find_floor(setting, deltas, count)
        spreads = measure(ways, rounds)
        ours = spreads[ways[0]]
        for way, spread in spreads.items():
            result_rows.append(
                {"deltas": str(setting), "tokens": setting.tokens, "threads": count, "way": way.name}
                | harness.spread_ms(spread, 1)
                | {"ratio": round(spread.median / ours.median, 3), "floor_ms": round(1e3 * floor, 4)}
            )
    return {
        "schema": harness.SCHEMA,
        "suite": "deltas",
        "options": {"threads": list(threads), "rounds": rounds, "shape": [OUTPUTS, INPUTS], "tasks": TASKS},
        "facts": facts,
        "rows": result_rows,
    }


def print_result(result: dict[str, Any]) -> None:
    table = Table("deltas", "tokens", "threads", "way", "median ms", "min ms", "floor ms", "times ours")
    for row in result["rows"]:
        times = (f"{row[key]:.3f}" for key in ("median", "minimum", "floor_ms"))
        ratio = f"{row['ratio']:.2f}" if row["way"] != OURS else ""
        table.add_row(row["deltas"], str(row["tokens"]), str(row["threads"]), row["way"], *times, ratio)
    Console(width=140).print(table)
    outputs, inputs = result["options"]["shape"]
    print(f"{inputs} -> {outputs}, {result['options']['tasks']} tasks; times ours: its time over ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, action="append", help="several times for several; 1 and 2 by default")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="few settings and rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse (invariant|CSR)")
    settings, rounds = (QUICK, 5) if arguments.quick else (SETTINGS, arguments.rounds)
    result = run(settings, tuple(arguments.threads or (1, 2)), rounds)
    print_result(result)
    if arguments.json:
        arguments.json.write_text(harness.format_result(result))


if __name__ == "__main__":
    main()
