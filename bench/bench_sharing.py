"""Time `ops.delta_linear` beside torch's sparse CSR, scipy and dense products, print the table, write
``bench/results/``.

python bench/bench_sharing.py
python bench/bench_sharing.py --threads 1 --rounds 9
python bench/bench_sharing.py --quick
"""

from __future__ import annotations

from pathlib import Path

import click

from pycodesign.bench.deltas import print_deltas, run_delta_suite
from pycodesign.bench.harness import write_result

RESULTS = Path(__file__).parent / "results"


@click.command()
@click.option("--threads", multiple=True, type=int, help="Default: 1 and 2.")
@click.option("--rounds", type=int, help="Turns of each way.")
@click.option("--quick", is_flag=True, help="Few settings and rounds, in seconds.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, show_default=True)
def main(threads: tuple[int, ...], rounds: int | None, quick: bool, output: Path) -> None:
    """Time sparse and low-rank deltas of eight tasks on one layer."""
    result = run_delta_suite(threads=threads or None, rounds=rounds, quick=quick)
    print_deltas(result)
    click.echo(f"wrote {write_result(result, output)}")


if __name__ == "__main__":
    main()
