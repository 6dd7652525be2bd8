"""The command ``pycodesign``: thin over `pycodesign.demo`, `bench`, `explain` and `growth`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

import pycodesign

COMPETITORS = ("torch", "onnxruntime", "openvino")
OPTIONAL = ("mlxtend", "matplotlib", "onnx", "egglog", "highspy", "cupy-cuda12x", "cupy-cuda13x")
METHODS = ("pair", "saturate", "summerge", "patterns", "unique")
VARIABLES = tuple(f"PYCODESIGN_{name}" for name in ("ISA", "NUM_THREADS", "CHECK", "JIT", "JITDUMP"))
PICTURE = click.Path(path_type=Path, dir_okay=False)
THREADS = click.IntRange(min=1, max=4096)  # as set_num_threads takes


@contextmanager
def plain_errors() -> Iterator[None]:
    """Show a missing extra, a bad value or a file that cannot be written as one sentence."""
    try:
        yield
    except (ModuleNotFoundError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def parse_shape(context: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
    """Read a shape such as ``1,3,224,224``."""
    if text is None:
        return None
    try:
        shape = [int(size) for size in text.split(",")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1:
        raise click.BadParameter(f"expected positive integers with commas between, as 1,3,224,224, got {text!r}")
    return shape


def check_file(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file that cannot be written before what is to be written in it takes minutes."""
    if path is None or path == Path("-"):
        return path
    try:
        place = path if path.exists() else path.parent
        fits = not path.is_dir() and (place == path or place.is_dir()) and os.access(place, os.W_OK)
    except OSError:  # a name too long, a folder that may not be looked into
        fits = False
    if not fits:
        raise click.BadParameter(f"expected a file that can be written, got {str(path)!r}")
    return path


def check_plot(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a picture that cannot be drawn, too."""
    if path is None:
        return None
    try:
        import matplotlib.backend_bases
    except ModuleNotFoundError as error:
        raise click.ClickException('--plot needs matplotlib: pip install "pycodesign[demo]"') from error
    formats = matplotlib.backend_bases.FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise click.BadParameter(f"expected a file name that ends in .{', .'.join(formats)}, got {str(path)!r}")
    return check_file(context, parameter, path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(pycodesign.__version__, prog_name="pycodesign")
def main() -> None:
    """Fast layers for networks whose weights take few values.

    \b
    pycodesign demo              run trained networks: factor, check, time
    pycodesign bench resnet18    time layers beside every installed engine
    pycodesign explain MODEL     will a network gain? read its weights, count
    pycodesign grow SRC DST      a larger checkpoint that computes the same
    pycodesign info              what was detected, forced, built
    """


@main.command()
@click.option("--quick", is_flag=True, help="Fewer images and layers, float32, one thread: under 20 seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output, nothing else.")
@click.option("--plot", type=PICTURE, callback=check_plot, metavar="FILE", help="Draw the times as bars.")
@click.option("--threads", type=THREADS, help="Threads within a layer; all cores, or one with --quick.")
def demo(quick: bool, as_json: bool, plot: Path | None, threads: int | None) -> None:
    """Run two trained networks, then time the layers of a larger one.

    The networks read MNIST digits; the weights of one are ternary, of the other binary. Every layer is factored. The
    1,000 test digits run through packed layers and through dense float32, and predictions and accuracy are compared.
    Then ResNet-18's layers, with random ternary weights, are timed beside the engines that are installed: torch,
    onnxruntime, openvino, or NumPy if there are none of them.

    The digits and the plot need: pip install "pycodesign[demo]"

    \b
    pycodesign demo --quick
    pycodesign demo --threads 1 --plot layers.png
    pycodesign demo --json > demo.json
    """
    from pycodesign.demo import BATCH, NETWORKS, check_network, load_digits, plot_layers, time_layers

    with plain_errors():
        threads = threads or (1 if quick else pycodesign.get_num_threads())
        pycodesign.set_num_threads(threads)
        _, (images, labels) = load_digits()
        if quick:
            images, labels = images[::5], labels[::5]
        networks = []
        with Progress(console=Console(stderr=True), transient=True) as progress:
            for name in NETWORKS:
                advance = partial(progress.advance, progress.add_task(name, total=len(images) // BATCH))
                networks.append(check_network(name, images, labels, advance))
        timing = time_layers(threads, quick)
    if as_json:
        click.echo(json.dumps({"version": pycodesign.__version__, "networks": networks, "timing": timing}))
    else:
        console = open_console()
        for network in networks:
            print_network(network, console)
        print_timing(timing, console)
    if plot:
        with plain_errors():
            plot_layers(timing, plot)
        click.echo(f"wrote {plot}", err=True)


def open_console() -> Console:
    """Standard output, wide enough for the tables where it is no terminal."""
    return Console(width=None if sys.stdout is not None and sys.stdout.isatty() else 140)


def print_network(network: Mapping[str, Any], console: Console) -> None:
    """Print a result of `demo.check_network`."""
    table = counts_table(f"{network['network']}: operations per pixel", "runs by")
    for row in network["layers"]:
        table.add_row(*counts_cells(row), row["algorithm"])
    console.print(table)
    color = "green" if network["agree"] == network["images"] else "red"
    console.print(
        f"[{color}]{network['agree']} of {network['images']} predictions agree[/] with dense float32: accuracy "
        f"{network['accuracy']:.1%} packed, {network['accuracy_dense']:.1%} dense "
        f"(all 1,000 test images after training: {network['accuracy_stated']:.1%}). "
        f"Logits differ by at most {network['max_difference']:.0e} of the largest.\n"
    )


def print_timing(timing: Mapping[str, Any], console: Console) -> None:
    """Print a result of `demo.time_layers`."""
    threads = f"{timing['threads']} thread{'s'[: timing['threads'] > 1]}"
    engines = ", ".join(f"{name} {version}" for name, version in timing["competitors"].items())
    title = f"ResNet-18: ternary, batch 1, {threads}, cold caches"
    table = counts_table(title, "runs by", "ms", "best other", "ms", "ratio")
    for row in timing["layers"]:
        best = ("-", "-", "-")
        if row["best"]:
            best = row["best"].split()[0], f"{row['best_ms']:.3f}", f"{row['speedup']:.2f}"
        losing = row["best"] and row["speedup"] < 1
        ours = f"{row['dtype']} {row['algorithm']}", f"{row['ms']:.3f}"
        table.add_row(*counts_cells(row), *ours, *best, style="red" if losing else None)
    console.print(table)
    console.print(f"On {timing['cpu']}, {timing['isa']}, beside {engines}. Ratio: the best other's time over ours.")
    if "numpy" in timing["competitors"]:
        console.print('NumPy (im2col, BLAS) stands in for other engines: pip install "pycodesign[bench]"', markup=False)
    for entry in timing["left_out"]:
        layer = f", {entry['layer']}" if "layer" in entry else ""
        console.print(f"{entry['contender']}{layer}: {entry['reason']}", markup=False)


def counts_table(title: str, *more: str) -> Table:
    """Make a table whose rows begin with `counts_cells`."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    for heading in ("adds", "multiplies", "dense", "removed", *more):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def counts_cells(row: Mapping[str, Any]) -> list[str]:
    """Format a layer's name and operations."""
    counts = (f"{row[key]:,}" for key in ("adds", "multiplies", "dense_ops"))
    return [row["layer"], *counts, f"{row['removed']:.1%}"]


@main.command()
@click.argument("suite", type=click.Choice(["resnet18", "other", "linear", "models", "branches", "deltas"]))
@click.option("--weights", multiple=True, default=("ternary",), show_default=True, help="Or binary, uniform4, ...")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(["float32", "uint8", "uint4"]),
    help="float32 and uint8 by default; uint4: values of uint8 below 16.",
)
@click.option("--threads", multiple=True, type=THREADS, help="One and two by default.")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(min=1), help="The suite's own by default.")
@click.option("--algorithm", "algorithms", multiple=True, help="Of ours; all that serve the weights by default.")
@click.option("--contender", "contenders", multiple=True, help="torch[.compile], onnxruntime, openvino, pycodesign.")
@click.option("--layer", "layers", multiple=True, help="Part of a layer's name; of models and branches, a network's.")
@click.option("--rounds", type=click.IntRange(min=1), help="Turns of each; 15 by default, branches 60, deltas 25.")
@click.option("--isa", help="Hold every contender to an instruction set, as avx2; those that cannot be are left out.")
@click.option("--quick", is_flag=True, help="Few layers and rounds, one thread.")
@click.option(
    "--json",
    "file",
    type=click.Path(path_type=Path, allow_dash=True, dir_okay=False),
    callback=check_file,
    metavar="FILE",
    help="Write the result there, with the machine's facts; - for standard output, without the tables.",
)
def bench(suite: str, file: Path | None, **options: Any) -> None:
    """Time the layers of SUITE, whole networks (models, branches) or many tasks on one layer (deltas), beside every
    engine that is installed.

    Each contender is checked against a reference, then timed in turns with the others, with its weights in the caches
    (hot) and with other data there (cold); the tables show the cold timings. Branches and deltas are timed hot alone;
    branches takes --contender, --layer, --rounds and --quick, deltas --threads, --rounds and --quick, models all but
    --algorithm and --isa. An option that may be given several times selects several values. Several weights share one
    timing of the other engines.

    The other engines need: pip install "pycodesign[bench]"

    \b
    pycodesign bench resnet18 --quick
    pycodesign bench linear --weights binary --batch 1 --threads 1
    pycodesign bench resnet18 --layer 3x3 --json resnet18.json
    pycodesign bench other --batch 1 --weights binary --weights ternary --isa avx2
    pycodesign bench models --quick
    pycodesign bench branches --quick
    pycodesign bench deltas --quick
    """
    from pycodesign.bench import print_table, run_suite
    from pycodesign.bench.harness import format_result

    options = {name: value for name, value in options.items() if value}
    show: Callable[[dict[str, Any], Console], None]
    with plain_errors():
        if suite in ("branches", "deltas") and options.get("weights") == ("ternary",):
            del options["weights"]  # the default
        if suite == "branches":
            from pycodesign.bench.branches import print_branches, run_branch_suite

            refuse_options(options, suite, {"contenders", "layers", "rounds", "quick"})
            options["networks"] = options.pop("layers", None) or ("parnet", "inception")
            result, show = run_branch_suite(**options), print_branches
        elif suite == "deltas":
            from pycodesign.bench.deltas import print_deltas, run_delta_suite

            refuse_options(options, suite, {"threads", "rounds", "quick"})
            result, show = run_delta_suite(**options), print_deltas
        elif suite == "models":
            from pycodesign.bench.models import run_models
            from pycodesign.bench.network_report import print_models

            refuse_options(options, "whole networks", options.keys() - {"algorithms", "isa"})
            options["networks"] = options.pop("layers", None)
            result, show = run_models(**options), print_models
        else:
            result, show = run_suite(suite, **options), print_table
    if file:
        with plain_errors(), click.open_file(file, "w") as stream:
            stream.write(format_result(result))
    if file != Path("-"):
        show(result, open_console())


def refuse_options(options: Mapping[str, Any], suite: str, known: Set[str]) -> None:
    """Raise ValueError for an option that a suite does not know."""
    for name in options.keys() - known:
        raise ValueError(f"{name}: expected none for {suite}, got {options[name]!r}")


@main.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--dtype",
    type=click.Choice(["float32", "uint8", "int8"]),
    default="float32",
    show_default=True,
    help="Of the activations; integer ones suit integer levels only.",
)
@click.option(
    "--shape", metavar="N,C,H,W", callback=parse_shape, help="Of the input, where an ONNX file leaves it open."
)
@click.option("--method", type=click.Choice(METHODS), help="Count what this method of factoring leaves.")
@click.option("--plot", type=PICTURE, callback=check_plot, metavar="FILE", help="Draw bars per layer.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output, nothing else.")
def explain(
    model: Path, dtype: str, shape: list[int] | None, method: str | None, plot: Path | None, as_json: bool
) -> None:
    """Say which layers of MODEL gain, which do not, and why.

    MODEL is an ONNX file, a state_dict in a .pt or .pth file, or safetensors: a layer saved by Packed.save, or any
    state_dict. Float weights count as quantized if they lie on few values, however they got there; integer weights are
    read with their scales. Every layer is packed as algorithm="auto" does it on this processor. Its time (ns: for one
    output pixel, on one thread) is predicted by a cost model, after one layer of our own has been timed.

    Removed is the share of a dense layer's additions and multiplications, for each output pixel, that is gone. A packed
    linear layer gains by its fewer bytes instead. Layers with more than 256 distinct weights in an output are not
    quantized and stay with your framework; 3 bits and up mostly stay dense sums: 8-bit dot
    products, as in other int8 engines.

    \b
    With --method the counts are those of a program by pair, saturate, summerge, patterns or unique, which no kernel
    executes; that may take a minute for a large network.

    \b
    *.onnx files need: pip install "pycodesign[onnx]"
    *.pt and *.pth files: pip install "pycodesign[torch]"
    --plot: pip install "pycodesign[demo]"
    --method saturate: pip install "pycodesign[saturate]"

    \b
    pycodesign explain model.onnx
    pycodesign explain model.pt --method pair --plot layers.png
    pycodesign explain model.onnx --shape 1,3,224,224 --dtype uint8
    pycodesign explain state_dict.safetensors --json > model.json
    """
    from pycodesign.explain import explain_model, plot_explanation, read_model

    with plain_errors():
        layers = read_model(model, shape)
        if not layers:
            raise ValueError(f"{model}: expected convolutions or linear layers with constant weights, found none")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        advance = partial(progress.advance, progress.add_task("packing", total=len(layers)))
        with plain_errors():
            result = explain_model(layers, dtype, advance, method)
    if as_json:
        click.echo(json.dumps({"model": str(model), "dtype": dtype, **result}))
    else:
        title = f"{model.name}: {dtype} activations, {result['isa']}" + (f", counts of {method}" if method else "")
        print_explanation(result, escape(title), open_console())
    if plot:
        with plain_errors():
            plot_explanation(result, plot)
        click.echo(f"wrote {plot}", err=True)


def print_explanation(result: Mapping[str, Any], title: str, console: Console) -> None:
    """Print a result of `explain.explain_model`."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for heading in ("weights", "levels", "runs by", "adds", "multiplies", "dense", "removed", "kB", "float32", "ns"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("why", ratio=1)
    for row in result["layers"]:
        counts = (f"{row[key]:,}" if row[key] is not None else "-" for key in ("adds", "multiplies", "dense_ops"))
        sizes = (f"{row[key] / 1000:,.1f}" if row[key] is not None else "-" for key in ("bytes", "float32_bytes"))
        algorithm = row["algorithm"] or "-"
        shape = "x".join(map(str, row["shape"]))
        style = None if row["gains"] else "dim" if row["algorithm"] else "yellow"
        removed = f"{row['removed']:.1%}"
        predicted = f"{row['predicted_ns']:,.0f}" if row["predicted_ns"] is not None else "-"
        cells = shape, show_levels(row["levels"]), algorithm, *counts, removed, *sizes, predicted, row["why"]
        table.add_row(escape(row["layer"]), *cells[:-1], escape(cells[-1]), style=style)
    console.print(table)
    console.print(result["summary"], style="bold", highlight=False)
    for hint in result["hints"]:
        console.print(f"* {hint}", markup=False, highlight=False)


def show_levels(levels: Sequence[float] | None) -> str:
    if levels is None:
        return "many"
    if len(levels) <= 4:
        return " ".join(f"{level + 0.0:.3g}" for level in levels)  # -0 reads 0
    return f"{len(levels)}: {levels[0]:.3g} .. {levels[-1]:.3g}"


@main.command()
@click.argument("src", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option(
    "--target",
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="CONFIG.json",
    help="Sizes of the larger model; what it leaves out stays as it is.",
)
@click.option(
    "--spec", default="auto", show_default=True, help="gpt2, llama, vit, deit or bert; auto: by SRC's config."
)
@click.option(
    "--mode",
    type=click.Choice(["break_symmetry", "exact"]),
    default="break_symmetry",
    show_default=True,
    help="exact: copies stay equal, the optimizer's groups are scaled; integer multiples and the same depth only.",
)
@click.option("--seed", default=0, show_default=True, help="Of the noise that makes copies different.")
@click.option(
    "--shard-size",
    type=click.IntRange(min=1),
    default=5000,
    show_default=True,
    metavar="MB",
    help="Of one file, at most.",
)
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint in DST, which may be SRC.")
@click.option("--dry-run", is_flag=True, help="Print the plan, write nothing.")
@click.option("--verify", is_flag=True, help="Load both models and compare their outputs before DST appears.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output, nothing else.")
def grow(src: Path, dst: Path, target: Path, as_json: bool, shard_size: int, dry_run: bool, **options: Any) -> None:
    """Grow the checkpoint SRC into DST, a larger model that computes the same.

    SRC is a directory in Hugging Face's layout, of GPT-2, Llama, ViT, DeiT or BERT: config.json and model.safetensors,
    or shards and their index. An optimizer.safetensors beside it (growth.save_optimizer writes one) is grown, too.
    Memory holds one tensor and what it becomes. DST is complete or not there at all, whenever the command ends.

    --verify needs: pip install "pycodesign[torch,hf]"

    \b
    pycodesign grow small large --target large.json --dry-run
    pycodesign grow small large --target large.json --verify
    """
    from pycodesign.growth import grow_checkpoint

    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with plain_errors(), Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("growing", total=None, visible=not dry_run)
        report = grow_checkpoint(
            src,
            dst,
            target_config=target,
            max_shard_bytes=shard_size * 1_000_000,
            dry_run=dry_run,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            **options,
        )
    if as_json:
        click.echo(json.dumps(report.to_dict()))
        return
    console = open_console()
    if dry_run:
        console.print(report.plan.to_table())
    console.print(report.summary, markup=False, highlight=False)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output, nothing else.")
def info(as_json: bool) -> None:
    """Print what was detected, forced and built, and which optional packages are installed.

    \b
    pycodesign info
    PYCODESIGN_ISA=avx2 PYCODESIGN_NUM_THREADS=1 pycodesign info --json
    """
    with plain_errors():
        facts = gather_info()
    if as_json:
        click.echo(json.dumps(facts))
        return
    console = open_console()
    for title, entries in facts.items():
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, value in entries.items():
            table.add_row(name, show(value))
        console.print(table)


def gather_info() -> dict[str, dict[str, Any]]:
    """Collect what `info` prints, None for what is absent."""
    from pycodesign.bench.harness import package_version

    config = pycodesign.show_config()
    supported = config["supported_isas"]  # from the least to the best
    reached = supported[: supported.index(config["isa"]) + 1]
    config["kernels"] = [isa for isa in reached if isa in config["isas"]][-1]
    return {
        "detected": {name: config[name] for name in ("cpu", "cores", "caches", "supported_isas")},
        "used": {name: config[name] for name in ("isa", "kernels", "threads", "team")},
        "forced": {name: os.environ.get(name) for name in VARIABLES},
        "built": {name: config[name] for name in ("version", "compiler", "isas", "cuda")},
        "competitors": {name: package_version(name) for name in COMPETITORS},
        "optional": {name: package_version(name) for name in OPTIONAL},
    }


def show(value: object) -> str:
    """Format a value of `gather_info` for people."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {show(item)}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else str(value)
