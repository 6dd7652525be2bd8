"""Suites of benchmarks run what they promise; their results are saved, summed up, compared and drawn."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console
from tiny_chains import TINY, ExactChain

import pycodesign
from pycodesign.bench import harness, suites
from pycodesign.bench.cases import Case
from pycodesign.bench.contenders import Chain
from pycodesign.bench.harness import gather_facts, measure, read_result, write_result
from pycodesign.bench.report import add_ratios, compare_choices, print_table, summarize, thread_scaling
from pycodesign.bench.suites import linear_layers, other_layers, resnet18_layers, run_suite

RESULTS = Path(__file__).parents[1] / "bench" / "results"

# ---- runs


def test_suites_hold_the_layers_they_are_named_after() -> None:
    layers = resnet18_layers(8)
    assert len(layers) == len({layer.name for layer in layers}) == 11
    assert {layer.output_shape[1:] for layer in layers} == {(64, 112, 112)} | {
        (channels, size, size) for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7))
    }
    by_name = {layer.name: layer for layer in resnet18_layers(1)}
    assert {by_name[f"3x3 {c}-{c}@{s}"].macs for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))} == {115_605_504}
    assert [layer.macs for layer in linear_layers(1)] == [4096 * 4096, 1024 * 4096]
    others = other_layers(1)
    assert len(others) == len({layer.name for layer in others}) == 12
    assert all(layer.output_size == layer.size for layer in others)
    assert all(4 <= layer.chain_length <= 32 for layer in (*layers, *others, *linear_layers(32)))


@pytest.fixture
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ours(ExactChain):
        engine = suites.OURS

        def __init__(self, case: Case, dtype: str, threads: int, way: str = "auto") -> None:
            self.way = way
            super().__init__(case, dtype, threads)
            self.details["algorithm"] = "quick"

        @property
        def name(self) -> str:
            return f"{super().name} {self.way}"

        @property
        def algorithm(self) -> str:
            return self.way

        def for_case(self, case: Case) -> Chain:
            return type(self)(case, self.dtype, self.threads, self.way)

    tiny = suites.Suite(lambda batch: [TINY["sequential"]], (2,), ("auto", "quick", "slow"))
    monkeypatch.setitem(suites.SUITES, "tiny", tiny)
    monkeypatch.setattr(suites, "PycodesignChain", Ours)
    monkeypatch.setattr(suites, "ENGINES", {"exact": (ExactChain, ("numpy",))})
    monkeypatch.setattr(suites, "missing_package", lambda engine: None)


@pytest.mark.usefixtures("tiny_suite")
def test_run_suite_gives_what_it_documents(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_suite("tiny", rounds=1, threads=[1], progress=False)
    assert json.loads(json.dumps(result)) == result
    assert set(result) == {"schema", "suite", "options", "facts", "rows", "summary", "choices", "scaling", "left_out"}
    assert result["left_out"] == []
    assert len(result["rows"]) == (1 + 3) * 2 * 2  # contenders, dtypes, hot and cold
    for row in result["rows"]:
        assert {"layer", "batch", "threads", "weights", "state", "contender", "dtype", "macs", "chain"} <= set(row)
        assert set(row["ms"]) == {"median", "iqr", "mad", "minimum", "rounds", "disturbed"}
        assert row["best"].startswith("exact")
    assert {(entry["algorithm"], entry["count"], entry["stem"]) for entry in result["summary"]} == {
        (algorithm, 1, None) for algorithm in ("auto", "quick", "slow")
    }
    assert {choice["chosen"] for choice in result["choices"]} == {"quick"}
    text = io.StringIO()
    print_table(result, Console(file=text, width=200))
    assert all(part in text.getvalue() for part in ("exact", "ternary, float32, batch 2", "3x3", "chosen / best"))
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("tiny_suite")
def test_nothing_is_timed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Chain] = []

    def record(chains: list[Chain], **options: Any) -> dict[Chain, harness.Timing]:
        timed.extend(chains)
        return measure(chains, **options)

    monkeypatch.setattr(suites, "measure", record)
    dtypes = ["float32", "uint8", "uint4"]
    result = run_suite("tiny", weights=["binary", "ternary"], dtypes=dtypes, rounds=1, threads=[1], progress=False)
    names = [chain.name for chain in timed]
    assert sorted(names) == sorted(
        ["exact float32", "exact int8"]
        + [f"pycodesign {d} {way}" for d in ("float32", "int8", "uint4") for way in ("quick", "slow")] * 2
    )
    cold = {(r["weights"], r["dtype"], r["contender"]): r for r in result["rows"] if r["state"] == "cold"}
    assert len(cold) == 2 * (2 + 3 * 3)
    for weights in ("binary", "ternary"):
        assert cold[weights, "uint8", "exact int8"]["ms"] == cold["binary", "uint8", "exact int8"]["ms"]
        auto, quick = (cold[weights, "uint4", f"pycodesign uint4 {way}"] for way in ("auto", "quick"))
        assert auto["ms"] == quick["ms"]
        assert auto["best"] == "exact int8"


@pytest.mark.usefixtures("tiny_suite")
def test_nothing_is_dropped_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "missing_package", lambda engine: "exactlib")
    monkeypatch.setattr(ExactChain, "error", 1)
    result = run_suite("tiny", rounds=1, threads=[1], dtypes=["float32"], progress=False)
    reasons = {entry["contender"]: entry["reason"] for entry in result["left_out"]}
    assert reasons["exact"] == "not installed: exactlib"
    assert reasons["pycodesign float32 auto"].startswith("failed its check")
    assert result["rows"] == result["summary"] == []
    text = io.StringIO()
    result["left_out"] += 2 * result["left_out"][-1:]
    print_table(result, Console(file=text, width=200))
    assert "not installed: exactlib" in text.getvalue()
    assert ", and 2 more: failed its check" in text.getvalue()


@pytest.mark.usefixtures("tiny_suite")
def test_algorithms_that_serve_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = suites.SUITES["tiny"]
    monkeypatch.setitem(suites.SUITES, "tiny", tiny._replace(algorithms=("auto", "codebook")))

    def default_for(*weights: str) -> list[str]:
        run = run_suite("tiny", weights=weights, rounds=1, threads=[1], contenders=["pycodesign"], progress=False)
        return list(run["options"]["algorithms"])

    assert default_for("ternary") == ["auto"]
    assert default_for("ternary", "codebook8") == ["auto", "codebook"]


def test_run_suite_checks_its_options() -> None:
    with pytest.raises(ValueError, match="name: expected one of resnet18, other, linear, got 'vgg'"):
        run_suite("vgg")
    with pytest.raises(ValueError, match=r"contenders: expected some of .*, got 'tvm'"):
        run_suite("linear", contenders=["tvm"])
    with pytest.raises(ValueError, match="dtypes: expected some of float32, uint8, uint4, got 'int8'"):
        run_suite("linear", dtypes=["int8"])
    with pytest.raises(ValueError, match=r"algorithms: expected some of auto, .*, got 'fast'"):
        run_suite("linear", algorithms=["fast"])
    with pytest.raises(ValueError, match=r"isa: expected some of scalar.*, got 'mmx'"):
        run_suite("linear", isa="mmx")
    with pytest.raises(ValueError, match=r"threads: expected 1 with the clock cpu, got \[2\]"):
        run_suite("linear", clock="cpu", threads=[2])
    with pytest.raises(ValueError, match=r"layers: expected part of a layer's name .*, got '3x3'"):
        run_suite("linear", layers=["4096", "3x3"])


@pytest.mark.skipif("avx2" not in pycodesign.show_config()["supported_isas"], reason="this processor has no AVX2")
@pytest.mark.parametrize("isa", [None, "avx2"])
def test_run_suite_forces_and_restores_the_instruction_set(isa: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites.SUITES, "tiny", suites.Suite(lambda batch: [TINY["sequential"]], (2,), ("auto",)))
    before = pycodesign.show_config()["isa"]
    result = run_suite("tiny", isa=isa, contenders=[suites.OURS], rounds=1, threads=[1], progress=False)
    assert result["rows"] and not result["left_out"]
    assert result["facts"]["pycodesign"]["isa"] == (isa or before)
    assert pycodesign.show_config()["isa"] == before


@pytest.mark.usefixtures("tiny_suite", "three_threads")
def test_run_suite_restores_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_one(chain: Chain) -> None:
        pycodesign.set_num_threads(1)

    monkeypatch.setattr(ExactChain, "prepare", set_one)
    run_suite("tiny", rounds=1, threads=[1], progress=False)
    assert pycodesign.get_num_threads() == 3


# ---- results


def _row(layer: str, contender: str, median: float, threads: int = 1) -> dict[str, Any]:
    return {
        "layer": layer,
        "batch": 1,
        "threads": threads,
        "weights": "ternary",
        "state": "cold",
        "contender": contender,
        "engine": contender.split()[0],
        "algorithm": (contender.split()[2:] or [None])[0],
        "details": {"algorithm": "dense"},
        "dtype": "float32",
        "shape": {"kernel": int(layer[0])},
        "macs": 10**8,
        "ms": {"median": median, "iqr": 0.1},
    }


def test_results_survive_the_file(tmp_path: Path) -> None:
    rows = [_row("3x3 a", "torch float32", 1.0), _row("3x3 b", "torch float32", 1.0)]
    result = {"schema": harness.SCHEMA, "suite": "linear", "facts": gather_facts(), "rows": rows, "left_out": []}
    path = write_result(result, tmp_path / "results")
    assert path.name.startswith("linear_")
    assert read_result(path) == result
    for text in ("{}", "[]", "no JSON"):
        path.write_text(text)
        with pytest.raises(ValueError, match="path: expected a benchmark result"):
            read_result(path)


def test_summary_weighs_by_time() -> None:
    rows = [
        _row("3x3 a", "torch float32", 4.0),
        _row("3x3 a", "openvino float32", 3.0),
        _row("3x3 a", "pycodesign float32 auto", 1.0),
        _row("3x3 b", "torch float32", 1.0),
        _row("3x3 b", "pycodesign float32 auto", 2.0),
        _row("1x1 c", "pycodesign float32 auto", 5.0),
        _row("7x7 d", "torch float32", 3.0),
        _row("7x7 d", "pycodesign float32 auto", 2.0),
    ]
    add_ratios(rows)
    assert [row["speedup"] for row in rows] == [0.75, 1.0, 3.0, 1.0, 0.5, None, 1.0, 1.5]
    assert rows[2]["best"] == "openvino float32"
    assert rows[2]["speedups"] == {"torch float32": 4.0, "openvino float32": 3.0}
    (entry,) = summarize(rows)
    assert entry["speedup"] == round((3.0 + 1.0) / (1.0 + 2.0), 4)
    assert entry["slowest"] == {"layer": "3x3 b", "speedup": 0.5}
    assert (entry["count"], entry["of"]) == (2, 3)
    assert entry["stem"] == 1.5


def test_choices_compare_auto_with_the_best() -> None:
    rows = [
        _row("3x3 a", "torch float32", 1.0),
        _row("3x3 a", "pycodesign float32 auto", 3.0),
        _row("3x3 a", "pycodesign float32 tables", 2.0),
        _row("3x3 b", "pycodesign float32 auto", 3.0),
    ]
    rows[2]["details"] = {"algorithm": "tables"}
    (choice,) = compare_choices(rows)
    assert (choice["layer"], choice["chosen"], choice["best"], choice["ratio"]) == ("3x3 a", "dense", "tables", 1.5)


def test_scaling_compares_thread_counts() -> None:
    rows = [_row("3x3 a", "pycodesign float32 auto", 2.0), _row("3x3 a", "pycodesign float32 auto", 1.0, threads=2)]
    assert [entry["scaling"] for entry in thread_scaling(rows)] == [2.0]
    rows[0]["macs"] = rows[1]["macs"] = 10**6
    assert thread_scaling(rows) == []


def _load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", Path(__file__).parents[1] / "bench" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_compare_matches_timings() -> None:
    compare_script = _load_script("compare")
    old = {"rows": [_row("3x3 a", "torch float32", 4.0), _row("3x3 b", "torch float32", 4.0)]}
    new = {"rows": [_row("3x3 a", "torch float32", 2.0), _row("3x3 c", "torch float32", 4.0)]}
    matches = compare_script.compare(old, new)
    assert [(match["layer"], match["ratio"]) for match in matches] == [("3x3 a", 2.0)]
    assert matches[0]["noise"] == 0.05
    assert compare_script.compare(old, new, "openvino") == []
    text = io.StringIO()
    compare_script.print_comparison(matches, Console(file=text, width=200))
    assert "2.00" in text.getvalue()


@pytest.mark.parametrize(("script", "places"), [("compare", 2), ("plot", 1)])
def test_scripts_say_which_results_they_take(script: str, places: int, tmp_path: Path) -> None:
    if script == "plot":
        pytest.importorskip("matplotlib")
    main, output = _load_script(script).main, [str(tmp_path / "plot.svg")] if script == "plot" else ["--json"]
    taken = set()
    kinds = "branches-zen4 branches-placed-granite-rapids deltas-zen3 operations linear-ternary-batch1-batch32"
    for name in [
        *kinds.split(),
        "linear-ternary-batch1",
        "models-batch8",
        "other-batch1",
        "resnet18-ternary-3x3-tables",
    ]:
        path = RESULTS / f"{name}.json"
        done = CliRunner().invoke(main, [str(path)] * places + output)
        assert isinstance(done.exception, SystemExit | None), path
        suite = json.loads(path.read_text()).get("suite")
        taken |= {suite} if done.exit_code == 0 else set()
        if suite == "branches":
            wanted = "path: expected a result of resnet18, other, linear or models, got one of branches"
            assert done.exit_code == 2 and wanted in " ".join(done.output.split())
    assert taken == {"resnet18", "other", "linear", "models"}


@pytest.mark.usefixtures("tiny_suite")
def test_plot_draws_every_ratio(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script = _load_script("plot")
    result = run_suite("tiny", weights=["binary", "uniform4"], rounds=1, threads=[1], progress=False)
    means = script.collect_ratios(result, None, "quick")
    assert list(means) == ["float32", "uint8"]
    assert list(means["uint8"][1]) == ["binary", "16 levels"]
    assert list(script.collect_ratios(result, "binary", "auto")["float32"][1]) == ["3x3"]
    for name, weights in (("means.svg", None), ("layers.png", "binary")):
        script.draw_result(result, weights, "auto").savefig(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(
        ValueError, match="result: expected cold timings of auto with ternary weights beside other engines"
    ):
        script.draw_result(result, "ternary", "auto")
