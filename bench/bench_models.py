"""Time whole networks beside every installed engine, print the tables, write ``bench/results/``.

python bench/bench_models.py
python bench/bench_models.py resnet18 --weights ternary --batch 1 --threads 1 --plot resnet18.svg
python bench/bench_models.py --quick
"""

from __future__ import annotations

from pathlib import Path

import click

from pycodesign.bench.harness import write_result
from pycodesign.bench.models import run_models
from pycodesign.bench.network_report import print_models
from pycodesign.bench.suites import CLOCKS, DTYPES

RESULTS = Path(__file__).parent / "results"


@click.command()
@click.argument("networks", nargs=-1)
@click.option("--weights", multiple=True, help="Default: binary, ternary, uniform2 (4 levels).")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), default=DTYPES, show_default=True)
@click.option("--threads", multiple=True, type=int, help="Default: 1 and 2.")
@click.option("--batch", "batches", multiple=True, type=int, help="Default: 1 and 8.")
@click.option("--contender", "contenders", multiple=True, help="torch, torch.compile, ...; default: all.")
@click.option("--rounds", type=int, help="Turns of each contender.")
@click.option("--clock", type=click.Choice(list(CLOCKS)), default="wall", show_default=True)
@click.option("--quick", is_flag=True, help="ResNet-20 beside torch, in seconds.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, show_default=True)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Draw the ratios there.")
def main(
    networks: tuple[str, ...],
    weights: tuple[str, ...],
    dtypes: tuple[str, ...],
    threads: tuple[int, ...],
    batches: tuple[int, ...],
    contenders: tuple[str, ...],
    rounds: int | None,
    clock: str,
    quick: bool,
    output: Path,
    plot: Path | None,
) -> None:
    """Time NETWORKS (resnet18, resnet20, vgg-small; all by default), with each weights, batch and thread count."""
    if plot:
        from plot import draw_result  # before the run: it needs matplotlib
    try:
        result = run_models(
            networks=networks or None,
            weights=weights or None,
            dtypes=dtypes,
            threads=threads or None,
            batches=batches or None,
            contenders=contenders or None,
            rounds=rounds,
            clock=clock,
            quick=quick,
        )
    except (ModuleNotFoundError, ValueError) as error:
        raise click.UsageError(str(error)) from None
    print_models(result)
    click.echo(f"wrote {write_result(result, output)}")
    if plot:
        draw_result(result, None, "auto").savefig(plot, dpi=150)
        click.echo(f"wrote {plot}")


if __name__ == "__main__":
    main()
