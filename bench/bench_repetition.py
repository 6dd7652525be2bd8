"""Time packed layers beside every installed engine, print the tables, write ``bench/results/``.

python bench/bench_repetition.py resnet18 linear
python bench/bench_repetition.py resnet18 --weights binary --batch 1 --threads 1 --layer 3x3
"""

from __future__ import annotations

from pathlib import Path

import click

from pycodesign.bench.harness import write_result
from pycodesign.bench.report import print_table
from pycodesign.bench.suites import CLOCKS, DTYPES, RIVAL_DTYPES, SUITES, run_suite

RESULTS = Path(__file__).parent / "results"


@click.command()
@click.argument("suites", nargs=-1, required=True, type=click.Choice(list(SUITES)))
@click.option("--weights", multiple=True, default=("ternary",), show_default=True, help="binary, uniform4, ...")
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(list(RIVAL_DTYPES)), default=DTYPES, show_default=True
)
@click.option("--threads", multiple=True, type=int, help="Default: 1 and 2.")
@click.option("--batch", "batches", multiple=True, type=int, help="Default: the suite's.")
@click.option("--algorithm", "algorithms", multiple=True, help="Of ours; default: all.")
@click.option("--contender", "contenders", multiple=True, help="Default: all.")
@click.option("--layer", "layers", multiple=True, help="Part of a layer's name; default: all.")
@click.option("--rounds", type=int, help="Turns of each contender.")
@click.option("--clock", type=click.Choice(list(CLOCKS)), default="wall", show_default=True)
@click.option("--isa", help="Hold every contender to an instruction set, as avx2.")
@click.option("--quick", is_flag=True, help="A minute instead of many.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, show_default=True)
def main(
    suites: tuple[str, ...],
    weights: tuple[str, ...],
    dtypes: tuple[str, ...],
    threads: tuple[int, ...],
    batches: tuple[int, ...],
    algorithms: tuple[str, ...],
    contenders: tuple[str, ...],
    layers: tuple[str, ...],
    rounds: int | None,
    clock: str,
    isa: str | None,
    quick: bool,
    output: Path,
) -> None:
    """Time the layers of SUITES; options that may be given several times select several values."""
    for name in suites:
        try:
            result = run_suite(
                name,
                weights=weights,
                dtypes=dtypes,
                threads=threads or None,
                batches=batches or None,
                algorithms=algorithms or None,
                contenders=contenders or None,
                layers=layers or None,
                rounds=rounds,
                clock=clock,
                isa=isa,
                quick=quick,
            )
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        print_table(result)
        click.echo(f"wrote {write_result(result, output)}")


if __name__ == "__main__":
    main()
