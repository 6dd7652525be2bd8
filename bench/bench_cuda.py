"""Check, then time the CUDA kernels beside torch's on one GPU, and write one JSON.

Layers of ResNet-18 and -50 and a product of one row, ternary, beside cuDNN and cuBLAS through torch: strict float32,
TF32, float16 in channels-last order; `ops.expand` beside a copy of as many bytes; `ops.delta_linear` beside torch's
products; networks of branches on streams beside one stream. Everything runs within CUDA graphs: *hot* is one of many
calls that follow one another, *cold* one before which others' data have filled the second-level cache. A contender's
``error`` is the largest difference from a float64 product, relative to the sum of the products' magnitudes.
Without a GPU it says what is missing and exits with 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from pycodesign import ops, quantize
from pycodesign._device import load_native
from pycodesign.bench import harness
from pycodesign.bench.cases import Layer
from pycodesign.bench.suites import resnet18_layers
from pycodesign.branches import Executor, Placement, build_inception, build_parnet

DEVICE = PREPACK_DEVICE = "cuda"
CALLS = 20  # of a graph
COLD_BYTES = 256 << 20  # several times the second-level cache
TASKS, INPUTS, OUTPUTS = 8, 768, 3072


@dataclass(frozen=True, eq=False)
class Way:
    """One way to do something; `error` of its result where it is not exact."""

    name: str
    run: Callable[[], Any]
    error: float | None = None


@dataclass(frozen=True)
class Task:
    """What several ways do, and how much of it there is: multiply-adds, or bytes to read and write."""

    group: str
    name: str
    ways: list[Way]
    macs: int = 0
    bytes: int = 0


def capture(run: Callable[[], Any], calls: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph


def time_graph(graph: torch.cuda.CUDAGraph) -> float:
    """Return the seconds of a replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def measure(ways: list[Way], rounds: int) -> dict[Way, tuple[harness.Spread, harness.Spread]]:
    """Time one call of each way, hot and cold, in turns."""
    others = torch.ones(COLD_BYTES // 4, device=DEVICE)
    flush = capture(lambda: others.add_(1), CALLS)

    def run_cold(way: Way) -> Callable[[], Any]:
        return lambda: (others.add_(1), way.run())

    graphs = {way: (capture(way.run, CALLS), capture(run_cold(way), CALLS)) for way in ways}
    seconds: dict[Way, tuple[list[float], list[float]]] = {way: ([], []) for way in ways}
    for turn in range(rounds):
        first = turn % len(ways)
        for way in [*ways[first:], *ways[:first]]:
            hot, cold = graphs[way]
            hot.replay()  # clocks rise
            seconds[way][0].append(time_graph(hot) / CALLS)
            seconds[way][1].append((time_graph(cold) - time_graph(flush)) / CALLS)
    return {way: (harness.Spread.of(hot), harness.Spread.of(cold)) for way, (hot, cold) in seconds.items()}


def find_error(got: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor) -> float:
    return float(((got.double() - exact).abs() / magnitude.clamp_min(1e-30)).max())


def with_tf32(allow: bool, run: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow
        return run()

    return call


def make_layer(layer: Layer) -> Task:
    """A ternary layer: float32, float16, bytes to bytes, and what torch has."""
    torch.manual_seed(0)
    conv, channels_last = layer.is_conv, torch.channels_last if layer.is_conv else torch.contiguous_format
    q = quantize.ternary(np.random.default_rng(0).standard_normal(layer.weight_shape, np.float32))
    x = torch.rand(layer.input_shape, device=DEVICE)
    w = torch.from_numpy(q.dequantize()).to(DEVICE)
    x_bytes = (x * 255).round().to(torch.uint8)
    geometry: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding} if conv else {}
    prepack, run = (ops.prepack_conv2d, ops.conv2d) if conv else (ops.prepack_linear, ops.linear)
    multiply = (lambda a, b: F.conv2d(a, b, **geometry)) if conv else F.linear
    floats = prepack(q, device=PREPACK_DEVICE, **geometry)
    integers = prepack(q, device=PREPACK_DEVICE, input_dtype="uint8", input_scale=1 / 255, **geometry)
    exact, magnitude = multiply(x.double(), w.double()), multiply(x.double().abs(), w.double().abs())
    sums = run(x_bytes, integers, out_dtype="int32")
    expected = multiply(x_bytes.double(), torch.from_numpy(q.decode()).to(DEVICE).double())
    if not torch.equal(sums.double(), expected):
        raise harness.CheckError(f"{layer.name}: expected exact integer sums, got others")
    out = run(x, floats)
    out_bytes = run(x_bytes, integers, out_dtype="uint8", out_scale=0.02)
    half = [t.half().to(memory_format=channels_last) if t.dim() == 4 else t.half() for t in (x, w)]
    shorts = prepack(q, device=PREPACK_DEVICE, input_dtype="float16", **geometry)
    out_half = torch.empty_like(multiply(*half))  # in their order
    ways = [
        Way("ours float32", lambda: run(x, floats, out=out)),
        Way("ours uint8", lambda: run(x_bytes, integers, out_dtype="uint8", out_scale=0.02, out=out_bytes)),
        Way("ours float16", lambda: run(half[0], shorts, out_dtype="float16", out=out_half)),
        Way("torch float32", with_tf32(False, lambda: multiply(x, w))),
        Way("torch TF32", with_tf32(True, lambda: multiply(x, w))),
        Way("torch float16", lambda: multiply(*half)),
    ]
    checked = [
        way if way.name == "ours uint8" else replace(way, error=find_error(way.run(), exact, magnitude)) for way in ways
    ]
    return Task("layers" if conv else "linear", f"{layer.name}, batch {layer.batch}", checked, macs=layer.macs)


def resnet50_layers(batch: int) -> list[Layer]:
    """Return those that ResNet-18 does not have: the 1x1 ones of the bottlenecks."""
    layers = []
    for width, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        layers.append(Layer(f"1x1 {width}-{4 * width}@{size}", batch, width, 4 * width, size))
        layers.append(Layer(f"1x1 {4 * width}-{width}@{size}", batch, 4 * width, width, size))
    return layers


def make_expansion(name: str, dtype: torch.dtype, old: tuple[int, int], new: tuple[int, int], arrays: int) -> Task:
    """A weight, or it and two moments, grown by index, beside a copy of the bytes that are read and written."""
    rng = np.random.default_rng(0)
    tensors = [torch.randn(old, device=DEVICE).to(dtype) for _ in range(arrays)]
    results = [torch.empty(new, device=DEVICE, dtype=dtype) for _ in range(arrays)]
    index = [np.arange(n) % o if name == "tiles" else rng.integers(0, o, n) for o, n in zip(old, new, strict=True)]
    rows, columns = (torch.from_numpy(i).to(DEVICE) for i in index)
    in_scale, out_scale = (torch.rand(n, device=DEVICE) for n in reversed(new))
    scales = {"in_scale": in_scale, "out_scale": out_scale}

    def expand() -> None:
        for w, out in zip(tensors, results, strict=True):
            ops.expand(w, rows, columns, **scales, out=out)

    def index_and_scale() -> Any:
        return [((w[rows][:, columns].float() * in_scale) * out_scale[:, None]).to(dtype) for w in tensors]

    expand()
    if not all(torch.equal(a, b) for a, b in zip(results, index_and_scale(), strict=True)):
        raise harness.CheckError(f"expand {name}: expected torch's values, got others")
    moved = sum(t.numel() * t.element_size() for t in (*tensors, *results))
    source = torch.empty(moved // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    text = f"{name} {old} to {new}, {arrays} of {str(dtype).removeprefix('torch.')}"
    ways = [
        Way("ours", expand),
        Way("torch, indexed and scaled", index_and_scale),
        Way("copy of as many bytes", lambda: target.copy_(source)),
    ]
    return Task("expand", text, ways, bytes=moved)


def make_deltas(tokens: int, density: float, rank: int) -> Task:
    """Several tasks' sparse or low-rank differences on one layer."""
    rng = np.random.default_rng(0)
    x, base = (torch.randn(tokens, n, device=DEVICE) for n in (INPUTS, OUTPUTS))
    out = torch.empty(TASKS, tokens, OUTPUTS, device=DEVICE)
    stacked = torch.empty_like(out)
    if rank:
        shapes = (OUTPUTS, rank), (rank, INPUTS)
        deltas: list[Any] = [tuple(rng.standard_normal(s, np.float32) / 8 for s in shapes) for _ in range(TASKS)]
        full = [b.astype(np.float64) @ a for b, a in deltas]
        down = torch.from_numpy(np.concatenate([a for _, a in deltas])).to(DEVICE).T.contiguous()
        up = torch.from_numpy(np.stack([b.T for b, _ in deltas])).to(DEVICE).contiguous()

        def other() -> Any:
            u = (x @ down).view(tokens, TASKS, rank).transpose(0, 1)
            return torch.baddbmm(base.expand(TASKS, -1, -1), u, up, out=stacked)

        name = "torch, A stacked, batched B"
    else:
        deltas = [scipy.sparse.random(OUTPUTS, INPUTS, density, "csr", np.float32, n) for n in range(TASKS)]
        full = [d.toarray().astype(np.float64) for d in deltas]
        dense = torch.stack([torch.from_numpy(d.toarray().T.copy()) for d in deltas]).to(DEVICE)

        def other() -> Any:
            return torch.baddbmm(base.expand(TASKS, -1, -1), x.expand(TASKS, -1, -1), dense, out=stacked)

        name = "torch, dense, batched"
    packed = ops.prepack_deltas(deltas)
    weights = torch.from_numpy(np.stack(full)).to(DEVICE)
    product = x.double() @ weights.mT
    magnitude = x.double().abs() @ weights.abs().mT + base.double().abs()
    ways = [Way("ours", lambda: ops.delta_linear(x, base, packed, out=out)), Way(name, with_tf32(False, other))]
    checked = [replace(way, error=find_error(way.run(), base.double() + product, magnitude)) for way in ways]
    kind = f"rank {rank}" if rank else f"{density:.1%}"
    return Task("deltas", f"{kind}, {tokens} tokens", checked, bytes=4 * (out.numel() + base.numel() + x.numel()))


class Replay:
    """A captured network on inputs that stay."""

    def __init__(self, graph: Any, place: Placement) -> None:
        self.run = Executor(graph, place, "cuda")
        self.inputs = [torch.rand(graph.values[name].shape, device=DEVICE) for name in graph.inputs]


def time_networks(rounds: int) -> Iterator[dict[str, Any]]:
    """Networks of branches, each a CUDA graph: as many streams as can be used, and one."""
    for name, build in (("parnet", build_parnet), ("inception", build_inception)):
        for width in (64, 128):
            graph = build(width=width).eval().to_graph()
            places = {"streams": Placement.by_chains(graph), "one stream": Placement.sequential(graph)}
            replays = {kind: Replay(graph, place) for kind, place in places.items()}
            seconds: dict[str, list[float]] = {kind: [] for kind in replays}
            for _ in range(rounds):
                for kind, replay in replays.items():
                    replay.run(*replay.inputs)
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    for _ in range(CALLS):
                        replay.run(*replay.inputs)
                    end.record()
                    end.synchronize()
                    seconds[kind].append(float(start.elapsed_time(end)) / 1e3 / CALLS)
            best = np.median(seconds["streams"])
            for kind, values in seconds.items():
                spread = harness.spread_ms(harness.Spread.of(values), 1)
                row = {"group": "branches", "task": f"{name}, width {width}", "way": kind, "temperature": "hot"}
                yield row | {"streams": len(places[kind].teams)} | spread | {"ratio": float(np.median(values) / best)}


def list_tasks(quick: bool) -> Iterator[Task]:
    batches = (1,) if quick else (1, 8, 64)
    for batch in batches:
        layers = [*resnet18_layers(batch), *resnet50_layers(batch)]
        for layer in layers[3:4] if quick else layers:
            yield make_layer(layer)
    for batch in (1,) if quick else (1, 8, 64):
        yield make_layer(Layer("4096x4096", batch, 4096, 4096))
    for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
        for old, new in ((768, 3072), (1536, 6144)), ((1024, 4096), (2048, 8192)), ((4096, 4096), (8192, 8192)):
            for name, arrays in (("tiles", 1), ("arbitrary", 1), ("arbitrary", 3)):
                yield make_expansion(name, dtype, old, new, arrays)
    for tokens in (128,) if quick else (1, 16, 128, 1024):
        for density, rank in ((0.014, 0), (0.0, 8), (0.0, 64)):
            yield make_deltas(tokens, density, rank)


def time_task(task: Task, rounds: int) -> Iterator[dict[str, Any]]:
    spreads = measure(task.ways, rounds)
    ours = spreads[task.ways[0]]
    for way, pair in spreads.items():
        for temperature, spread, own in zip(("hot", "cold"), pair, ours, strict=True):
            row: dict[str, Any] = {"group": task.group, "task": task.name, "way": way.name, "temperature": temperature}
            row |= harness.spread_ms(spread, 1) | {"ratio": round(spread.median / own.median, 3), "error": way.error}
            if task.macs:
                row["tera_macs"] = round(task.macs / spread.median / 1e12, 3)
            if task.bytes:
                row["gigabytes"] = round(task.bytes / spread.median / 1e9, 1)
            yield row


def run(quick: bool, rounds: int) -> dict[str, Any]:
    torch.backends.cudnn.benchmark = True
    native = load_native()
    facts = harness.gather_facts() | {"gpu": native.device_properties(torch.cuda.current_device())}
    rows = [row for task in list_tasks(quick) for row in time_task(task, rounds)]
    rows += time_networks(rounds)
    return {
        "schema": harness.SCHEMA,
        "suite": "cuda",
        "options": {"rounds": rounds, "calls": CALLS, "quick": quick},
        "facts": facts,
        "rows": rows,
    }


def print_result(result: dict[str, Any]) -> None:
    table = Table("group", "task", "way", "", "median ms", "min ms", "times ours", "error")
    for row in result["rows"]:
        error = "" if row.get("error") is None else f"{row['error']:.1e}"
        times = (f"{row[key]:.4f}" for key in ("median", "minimum"))
        table.add_row(row["group"], row["task"], row["way"], row["temperature"], *times, f"{row['ratio']:.2f}", error)
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="few tasks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    arguments = parser.parse_args()
    try:
        load_native()
        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device: install one built for CUDA")
    except RuntimeError as error:
        raise SystemExit(f"nothing was timed: {error}") from None
    result = run(arguments.quick, arguments.rounds)
    print_result(result)
    if arguments.json:
        arguments.json.write_text(harness.format_result(result))


if __name__ == "__main__":
    main()
