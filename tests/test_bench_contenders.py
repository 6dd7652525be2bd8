"""The cases of benchmarks are exact, every contender computes them, and engines keep to an instruction set."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_chains import TINY, ExactChain

from pycodesign import ops
from pycodesign.bench import suites
from pycodesign.bench.cases import ACTIVATION_SCALES, Case, Layer
from pycodesign.bench.contenders import ENGINES, RIVAL_DTYPES, PycodesignChain, hold_engine, missing_package
from pycodesign.bench.harness import CheckError


@pytest.mark.parametrize("weights", ["binary", "ternary", "uniform4", "power_of_two4"])
def test_cases_hold_exact_weights_and_biases(weights: str) -> None:
    case = Case.random(TINY["sequential"], weights, length=2)
    levels, q = case.int8_weights(1), case.weights[1]
    np.testing.assert_array_equal(levels * q.scale[:, None, None, None], case.float_weights(1))
    steps = case.biases[1] / (ACTIVATION_SCALES["uint8"] * q.scale)
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
    np.testing.assert_array_equal(case.input("uint8") * ACTIVATION_SCALES["uint8"], case.x)
    assert not np.array_equal(case.int8_weights(0), levels)


def test_cases_reject_unknown_weights() -> None:
    for weights in ("float16", "QuantizedTensor", "Tern", ""):
        with pytest.raises(ValueError, match="weights: expected binary, ternary"):
            Case.random(TINY["sequential"], weights)


@pytest.mark.parametrize("name", TINY)
def test_expected_results_agree_with_plain_loops(name: str) -> None:
    layer = TINY[name]
    case = Case.random(layer, length=1)
    x = case.x.astype(np.float64).reshape(layer.batch, layer.inputs, layer.size or 1, layer.size or 1)
    w = case.float_weights(0).astype(np.float64).reshape(layer.outputs, layer.inputs, layer.kernel, layer.kernel)
    p, s, k = layer.padding, layer.stride, layer.kernel
    padded = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)))
    y = np.empty((layer.batch, layer.outputs, layer.output_size, layer.output_size))
    for row in range(layer.output_size):
        for column in range(layer.output_size):
            window = padded[:, :, row * s : row * s + k, column * s : column * s + k]
            y[:, :, row, column] = np.einsum("ncrs,ocrs->no", window, w) + case.biases[0]
    relu = np.maximum(y, 0).reshape(layer.output_shape)
    np.testing.assert_allclose(case.expected("float32")[0], relu, rtol=1e-12, atol=1e-12)
    codes = np.minimum(np.rint(relu / ACTIVATION_SCALES["uint8"]), 255)
    assert np.max(np.abs(case.expected("uint8")[0] - codes)) <= 1
    assert max(case.input("uint4").max(), case.expected("uint4")[0].max()) <= 15


@pytest.mark.parametrize("dtype", suites.DTYPES)
def test_check_finds_what_is_wrong(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = ExactChain(Case.random(TINY["sequential"], length=2), dtype, 1)
    chain.check()
    monkeypatch.setattr(ExactChain, "error", 0.01 if dtype == "float32" else 2)
    with pytest.raises(CheckError, match="expected the reference's results, off by"):
        chain.check()


@pytest.fixture
def torch_threads() -> Iterator[None]:
    if missing_package("torch"):
        yield
        return
    torch = importlib.import_module("torch")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize("layer", TINY.values(), ids=TINY.keys())
@pytest.mark.parametrize("dtype", suites.DTYPES)
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_compute_the_layers(engine: str, dtype: str, layer: Layer) -> None:
    if missing := missing_package(engine):
        pytest.skip(f"{missing} is not installed (pip install 'pycodesign[bench]')")
    chain = ENGINES[engine][0](Case.random(layer, length=3), dtype, 1)
    chain.check()
    chain.run()
    assert chain.name == f"{engine} {'float32' if dtype == 'float32' else 'int8'}"


@pytest.mark.parametrize("layer", TINY.values(), ids=TINY.keys())
@pytest.mark.parametrize("dtype", RIVAL_DTYPES)
@pytest.mark.parametrize("algorithm", ["auto", "dense"])
def test_ours_computes_the_layers(algorithm: str, dtype: str, layer: Layer) -> None:
    chain = PycodesignChain(Case.random(layer, length=3), dtype, 1, algorithm)
    chain.check()
    assert chain.details["algorithm"] in (ops.CONV2D_ALGORITHMS if layer.is_conv else ops.LINEAR_ALGORITHMS)
    assert chain.details["bytes"] > 0


def test_values_of_uint4_chains_stay_below_16() -> None:
    case = Case.random(TINY["sequential"], length=2)
    case = replace(case, biases=[bias + np.float32(3) for bias in case.biases])
    assert case.expected("uint4")[0].max() == 15
    PycodesignChain(case, "uint4", 1).check()


def test_engines_are_held_to_an_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    for name in limit:
        monkeypatch.setenv(name, "another")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert hold_engine("torch", "avx2") == "was imported before it could be held to avx2"
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "another"
    monkeypatch.delitem(sys.modules, "torch")
    assert hold_engine("torch", "avx2") is None
    assert limit.items() <= os.environ.items()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert hold_engine("torch", "avx2") is None
    assert hold_engine("torch", "scalar") == "is not held to scalar"
    assert hold_engine("onnxruntime", "avx2") == "is not held to avx2"


@pytest.mark.skipif(
    missing_package("torch") is not None, reason="torch is not installed (pip install 'pycodesign[bench]')"
)
def test_torch_obeys_its_limit(tmp_path: Path) -> None:
    script = (
        "from pycodesign.bench.cases import Case, Layer\n"
        "from pycodesign.bench.contenders import TorchChain, hold_engine\n"
        "assert hold_engine('torch', 'avx2') is None\n"
        "for dtype in ('float32', 'uint8'):\n"
        "    TorchChain(Case.random(Layer('3x3', 1, 16, 16, 6, 3, 1, 1), length=1), dtype, 1).run()\n"
    )
    verbose = os.environ | {"ONEDNN_VERBOSE": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=verbose, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kinds = [line.split(",")[6] for line in run.stdout.splitlines() if ",exec,cpu,convolution," in line]
    assert kinds
    assert not [kind for kind in kinds if "avx512" in kind]
