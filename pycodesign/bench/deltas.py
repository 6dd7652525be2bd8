"""Time `ops.delta_linear` beside torch's sparse CSR, scipy and dense products, in turns in one process.

The others compute one product for each task. torch's CSR and scipy's take inputs and give results with tokens one after
another, as suits them best ("by feature"); ours, and "torch CSR, rows", take and give rows (T, I) and (N, T, O), as the
layers of a network do, and torch transposes for it. Only results that exist already are added to: torch adds the shared
layer's output in the same call; scipy's product leaves it out. The floor is the larger of two times: to read and write
what must be at least, at the bandwidth at which torch fills memory of that size, and of one multiply-add for each entry
and 16 tokens at two for each cycle of 4 GHz.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import pycodesign
from pycodesign import ops
from pycodesign.bench import harness
from pycodesign.bench.suites import progress_bar

try:
    import scipy.sparse
    import torch
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('deltas are timed beside torch and scipy: pip install "pycodesign[bench]"') from error

__all__ = ["print_deltas", "run_delta_suite"]

INPUTS, OUTPUTS, TASKS = 768, 3072, 8
ROUNDS, QUICK_ROUNDS = 25, 5
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


def _make_deltas(setting: Setting) -> list[Any]:
    rng = np.random.default_rng(0)
    if setting.rank:
        shapes = (OUTPUTS, setting.rank), (setting.rank, INPUTS)
        return [tuple(rng.standard_normal(s, np.float32) / 8 for s in shapes) for _ in range(TASKS)]
    return [scipy.sparse.random(OUTPUTS, INPUTS, setting.density, "csr", np.float32, n) for n in range(TASKS)]


def _to_csr(matrix: Any) -> torch.Tensor:
    starts, columns = (torch.from_numpy(indices.astype(np.int32)) for indices in (matrix.indptr, matrix.indices))
    return torch.sparse_csr_tensor(starts, columns, torch.from_numpy(matrix.data), matrix.shape)


def _make_ways(setting: Setting, deltas: list[Any], x: torch.Tensor, base: torch.Tensor) -> list[Way]:
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
    matrices = [_to_csr(d) for d in deltas]
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


def _check(ways: list[Way], setting: Setting, deltas: list[Any], x: torch.Tensor, base: torch.Tensor) -> None:
    x64, base64 = (t[: 1 if setting.pooled else None].double().numpy() for t in (x, base))
    full = [b @ a if setting.rank else d.toarray() for d in deltas for b, a in [d if setting.rank else (d, d)]]
    exact = np.stack([x64 @ w.T.astype(np.float64) for w in full])
    for way in ways:
        wrong = abs(way.read(way.run()) - exact - (base64 if way.adds_base else 0)).max() / abs(exact).max()
        if wrong > (2**-7 if way.name == OURS and setting.dtype == "bfloat16" else 1e-5):
            raise harness.CheckError(
                f"{way.name}, {setting}: expected the definition's values, got others by {wrong:.1e}"
            )


def _find_floor(setting: Setting, deltas: list[Any], threads: int) -> float:
    """Seconds below which nothing can be: memory to write and read, and multiply-adds."""
    tokens = 1 if setting.pooled else setting.tokens
    values = sum(b.size + a.size for b, a in deltas) if setting.rank else sum(d.nnz for d in deltas)
    z = torch.empty(TASKS * tokens * OUTPUTS)
    fills = []
    for _ in range(9):
        start = time.perf_counter()
        z.zero_()
        fills.append(time.perf_counter() - start)
    return float(max(min(fills), values * max(tokens, 16) / 16 / 2 / 4e9 / threads))


def run_delta_suite(
    *,
    threads: Sequence[int] | None = None,
    rounds: int | None = None,
    quick: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Check and time eight tasks on one layer, 768 -> 3072: sparse and low-rank deltas, several numbers of tokens.

    Parameters
    ----------
    threads : sequence of int, optional
        One and two by default, as far as there are cores.
    rounds : int, optional
        Turns of each way, 25 by default.
    quick : bool
        Three settings of 16 tokens, five rounds, one thread, where nothing else is asked for.
    progress : bool
        Show a bar on standard error.

    Returns
    -------
    dict
        ``suite``, ``schema``, ``options``, ``facts``, and ``rows``, one for each setting, thread count and way, in
        milliseconds; ``ratio`` is the way's median over ours.

    Raises
    ------
    CheckError
        If a way computes something else.
    """
    settings = QUICK if quick else SETTINGS
    threads = list(threads or ([1] if quick else range(1, min(len(os.sched_getaffinity(0)), 2) + 1)))
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    facts = harness.gather_facts()
    facts["packages"]["scipy"] = harness.package_version("scipy")
    rows: list[dict[str, Any]] = []
    steps = len(threads) * len(settings)
    with harness.keep_threads(), warnings.catch_warnings(), progress_bar(steps, progress) as update:
        warnings.filterwarnings("ignore", message="Sparse (invariant|CSR)")
        for count in threads:
            pycodesign.set_num_threads(count)
            torch.set_num_threads(count)
            for setting in settings:
                update(description=f"{setting}, {setting.tokens} tokens")
                rows += _measure_setting(setting, count, rounds)
                update(advance=1)
    options = {"threads": threads, "rounds": rounds, "shape": [OUTPUTS, INPUTS], "tasks": TASKS}
    return {"schema": harness.SCHEMA, "suite": "deltas", "options": options, "facts": facts, "rows": rows}


def _measure_setting(setting: Setting, threads: int, rounds: int) -> list[dict[str, Any]]:
    deltas = _make_deltas(setting)
    rng = np.random.default_rng(1)
    x, base = (torch.from_numpy(rng.standard_normal((setting.tokens, size), np.float32)) for size in (INPUTS, OUTPUTS))
    ways = _make_ways(setting, deltas, x, base)
    _check(ways, setting, deltas, x, base)
    floor = _find_floor(setting, deltas, threads)
    spreads = harness.measure_hot(ways, rounds)
    ours = spreads[ways[0]]
    return [
        {"deltas": str(setting), "tokens": setting.tokens, "threads": threads, "way": way.name}
        | harness.spread_ms(spread, 1)
        | {"ratio": round(spread.median / ours.median, 3), "floor_ms": round(1e3 * floor, 4)}
        for way, spread in spreads.items()
    ]


def print_deltas(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the table of a result."""
    table = Table("deltas", "tokens", "threads", "way", "median ms", "min ms", "floor ms", "times ours")
    for row in result["rows"]:
        times = (f"{row[key]:.3f}" for key in ("median", "minimum", "floor_ms"))
        ratio = f"{row['ratio']:.2f}" if row["way"] != OURS else ""
        table.add_row(row["deltas"], str(row["tokens"]), str(row["threads"]), row["way"], *times, ratio)
    console = console or Console(width=140)
    console.print(table)
    outputs, inputs = result["options"]["shape"]
    console.print(f"{inputs} -> {outputs}, {result['options']['tasks']} tasks; times ours: its time over ours")
