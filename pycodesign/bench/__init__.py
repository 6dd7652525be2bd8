"""Benchmarks: packed layers beside every installed engine, in one process.

`cases` makes layers and the results to expect, `contenders` runs them in every engine, `harness` times, `suites`
chooses the layers and runs them, `report` makes ratios and tables of the timings. For whole networks these are
`networks`, `network_graphs` (the same network in other engines' form), `network_contenders`, `models`, `cold_start`,
`operator_call` and `network_report`. The command ``pycodesign bench`` and the scripts under ``bench/`` are thin over
these.
"""

from pycodesign.bench.harness import measure
from pycodesign.bench.report import print_table
from pycodesign.bench.suites import run_suite

__all__ = ["measure", "print_table", "run_suite"]
