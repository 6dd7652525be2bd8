"""Shared by all tests: settings restored after each, hypothesis profiles, and a record of which kernels ran.

A run of all of test_repetition.py fails if an algorithm, for an input dtype, instruction set and thread count that this
machine can run, was not checked.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import hypothesis
import numpy as np
import pytest

import pycodesign
from pycodesign import _core, ops
from pycodesign._arguments import INPUT_RANGES
from pycodesign.quantize import KernelCodebook, QuantizedTensor

ISAS = _core.supported_isas()
THREADS = (1, 2, 3)
ALGORITHMS = {"conv2d": ops.CONV2D_ALGORITHMS[1:], "linear": ops.LINEAR_ALGORITHMS[1:]}
INPUT_DTYPES = tuple(INPUT_RANGES)

Combination: TypeAlias = tuple[str, str, str, str, int]  # kind, algorithm, input dtype, isa, threads

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

pytest.register_assert_rewrite("chains", "growing", "layers", "sharing_deltas")

libraries: list[object] = []  # a torch.library.Library declares as long as it lives


def to_codebook(q: QuantizedTensor) -> KernelCodebook | None:
    """The same weights as kernels, up to sign, and indices; None where there are too many, or channels do not fit."""
    outputs, inputs, *size = q.shape
    channels = 1 if math.prod(size) > 1 else next((p for p in (4, 5, 6, 7, 8) if inputs % p == 0), 0)
    if not channels or max(size, default=1) > 7 or q.scale.ndim > 1:
        return None
    patterns = q.decode().reshape(-1, channels * math.prod(size))
    sign = np.sign([pattern[np.flatnonzero(pattern)[0]] if pattern.any() else 1 for pattern in patterns])
    kernels, index = np.unique(patterns * sign[:, None], axis=0, return_inverse=True)
    if len(kernels) > 256:
        return None
    shape = outputs, inputs // channels
    return KernelCodebook(
        index.reshape(shape).astype(np.uint8),
        sign.reshape(shape).astype(np.int8),
        kernels.reshape(1, -1, channels, *size).astype(np.float32),
        q.scale,
    )


checked_key = pytest.StashKey[set[Combination]]()
partial_key = pytest.StashKey[bool]()


@pytest.fixture
def without_matrix_unit(restore_settings: None) -> None:
    """Where one is, `auto` takes dense sums for layers that are made to show other choices."""
    pycodesign.set_isa([isa for isa in ISAS if isa != "avx512_amx"][-1])


@pytest.fixture(autouse=True)
def restore_settings() -> Iterator[None]:
    """Give every test the instruction set and the thread count that the process began with."""
    isa, threads = _core.active_isa(), pycodesign.get_num_threads()
    yield
    pycodesign.set_isa(isa)
    pycodesign.set_num_threads(threads)


@pytest.fixture
def three_threads(restore_settings: None) -> Iterator[None]:
    """Counts of threads that no benchmark under test sets: the package's, and torch's where it is loaded."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    pycodesign.set_num_threads(3)
    if torch:
        torch.set_num_threads(3)
    yield
    if torch:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Callable[[ops.Packed], None]:
    """Record that a layer was checked under the settings in force."""

    def add(packed: ops.Packed) -> None:
        pytestconfig.stash[checked_key].add(
            (
                packed.kind,
                packed.algorithm,
                packed._options["input_dtype"],
                _core.active_isa(),
                pycodesign.get_num_threads(),
            )
        )

    return add


def declare_torchvision_operators() -> None:
    """Let timm and transformers import beside a CPU-only torch, too.

    PyPI's torchvision, which timm needs and hardly uses, is built for CUDA. Where its operators cannot load it does not
    import, and neither do they, unless somebody declares the two.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        libraries.append(library)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-cuda", action="store_true", help="fail instead of skipping where there is no GPU")
    parser.addoption("--emulated-cuda", type=Path, metavar="MODULE", help="run CUDA kernels on the CPU, by this _cuda")


@pytest.fixture(params=("cupy", "torch"))
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Arrays of a library on a GPU, or on what emulates one."""
    import gpu as gpus

    options = request.config.option
    if options.emulated_cuda is not None:
        cupy = gpus.emulate(options.emulated_cuda, monkeypatch)
        yield gpus.Gpu(request.param, is_emulated=True)
        cupy.check_guards()
        return
    if absence := gpus.find_absence(request.param):
        (pytest.fail if options.require_cuda else pytest.skip)(absence)
    yield gpus.Gpu(request.param, is_emulated=False)


def pytest_configure(config: pytest.Config) -> None:
    declare_torchvision_operators()
    config.stash[checked_key] = set()
    config.stash[partial_key] = any("::" in argument for argument in config.args)


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name == "test_repetition.py":
            item.config.stash[partial_key] = True


def _missing(session: pytest.Session) -> list[Combination]:
    """Return what a run of all of test_repetition.py has left out; nothing after a run of less."""
    config = session.config
    whole = any(Path(item.path).name == "test_repetition.py" for item in session.items)
    if not whole or config.stash[partial_key] or config.option.collectonly or session.shouldstop or session.shouldfail:
        return []
    possible = {
        (kind, algorithm, *rest)
        for kind, algorithms in ALGORITHMS.items()
        for algorithm, *rest in product(algorithms, INPUT_DTYPES, ISAS, THREADS)
        if algorithm != "codegen" or _core.generates_code()
    }
    return sorted(possible - config.stash[checked_key])


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[missing_key] = _missing(session)
    if session.config.stash[missing_key] and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


missing_key = pytest.StashKey[list[Combination]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    checked = config.stash[checked_key]
    if not checked:
        return
    terminalreporter.section("kernels checked against the reference")
    settings = defaultdict(set)
    for kind, algorithm, dtype, isa, threads in checked:
        settings[kind, algorithm, dtype].add((isa, threads))
    for (kind, algorithm, dtype), pairs in sorted(settings.items()):
        isas = ", ".join(isa for isa in ISAS if any(isa == i for i, _ in pairs))
        terminalreporter.write_line(f"{kind} {algorithm} {dtype}: {isas}; threads {sorted({t for _, t in pairs})}")
    for combination in config.stash.get(missing_key, []):
        terminalreporter.write_line(f"NOT CHECKED: {' '.join(map(str, combination))}", red=True)
