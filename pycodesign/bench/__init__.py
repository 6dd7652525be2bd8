"""Benchmarks: packed layers beside every installed engine, in one process.

`cases` makes layers and the results to expect, `contenders` runs them in every engine, `harness` times, `suites`
chooses the layers and makes the tables. The command ``pycodesign bench`` and the scripts under ``bench/`` are thin over
`suites`.
"""

from pycodesign.bench.harness import measure
from pycodesign.bench.suites import print_table, run_suite

__all__ = ["measure", "print_table", "run_suite"]
