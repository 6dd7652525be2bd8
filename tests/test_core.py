"""Threads and instruction sets: whatever runs, wherever it runs, the results are the same."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import pycodesign
from pycodesign import _core, ops, quantize

LEVELS = ["scalar", "avx2", "avx2_vnni", "avx512", "avx512_vbmi", "avx512_amx"]
BENCH = Path(__file__).parents[1] / "bench" / "bench_threads.py"
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


@pytest.fixture(autouse=True)
def leave_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start scripts where they import the installed package, not the sources."""
    monkeypatch.chdir(tmp_path)


def build_layer(seed: int = 0) -> tuple[np.ndarray, ops.Packed]:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (2, 24, 19, 23), dtype=np.uint8)
    q = quantize.ternary(rng.standard_normal((40, 24, 3, 3), dtype=np.float32))
    return x, ops.prepack_conv2d(q, padding=1, input_dtype="uint8", input_zero_point=3)


def run_script(code: str, **environment: str) -> str:
    """Run Python code in a process of its own, where `build_layer` is defined, and return what it printed."""
    prelude = """
        import os, signal, threading, time
        import numpy as np
        import pycodesign
        from pycodesign import _core, ops, quantize

        def build_layer():
            rng = np.random.default_rng(0)
            q = quantize.ternary(rng.standard_normal((40, 24, 3, 3), dtype=np.float32))
            packed = ops.prepack_conv2d(q, padding=1, input_dtype="uint8")
            return rng.integers(0, 256, (2, 24, 19, 23), dtype=np.uint8), packed
    """
    script = textwrap.dedent(prelude) + textwrap.dedent(code)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYCODESIGN_")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=inherited | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class TestIsa:
    def test_supported_levels_can_be_set(self) -> None:
        supported = _core.supported_isas()
        assert supported[0] == "scalar"
        assert supported == [level for level in LEVELS if level in supported]
        for level in supported:
            pycodesign.set_isa(level)
            assert _core.active_isa() == level

    @pytest.mark.parametrize("name", ["", "sse9", "AVX2", "avx2 "])
    def test_unknown_level(self, name: str) -> None:
        before = _core.active_isa()
        with pytest.raises(ValueError, match=f"expected one of {', '.join(LEVELS)}, got '{name}'"):
            pycodesign.set_isa(name)
        assert _core.active_isa() == before

    def test_unsupported_level(self) -> None:
        unsupported = [level for level in LEVELS if level not in _core.supported_isas()]
        if not unsupported:
            pytest.skip("this processor supports every level")
        with pytest.raises(ValueError, match="which this processor does not support"):
            pycodesign.set_isa(unsupported[0])

    def test_environment(self) -> None:
        assert run_script("print(_core.active_isa())", PYCODESIGN_ISA="scalar") == "scalar"

    def test_bad_environment_raises_at_first_use(self) -> None:
        code = """
            for attempt in range(2):
                try:
                    _core.active_isa()
                except ValueError as error:
                    print(error)
            pycodesign.set_isa("scalar")
            print(_core.active_isa())
        """
        message = f"PYCODESIGN_ISA: expected one of {', '.join(LEVELS)}, got 'sse9'"
        assert run_script(code, PYCODESIGN_ISA="sse9").splitlines() == [message, message, "scalar"]


class TestThreadCount:
    def test_set(self) -> None:
        for n in (1, 2, 7):
            pycodesign.set_num_threads(n)
            assert pycodesign.get_num_threads() == n

    @pytest.mark.parametrize("n", ["2", 2.0, None, True])
    def test_no_integer(self, n: object) -> None:
        with pytest.raises(TypeError, match=f"n: expected an integer, got {n!r}"):
            pycodesign.set_num_threads(n)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="name: expected a string, got None"):
            pycodesign.set_isa(None)  # type: ignore[arg-type]

    @pytest.mark.parametrize("n", [0, -1, 4097, 2**31, 2**70])
    def test_out_of_range(self, n: int) -> None:
        with pytest.raises(ValueError, match=f"n: expected a number from 1 to 4096, got {n}"):
            pycodesign.set_num_threads(n)

    def test_environment(self) -> None:
        assert run_script("print(pycodesign.get_num_threads())", PYCODESIGN_NUM_THREADS="3") == "3"

    @pytest.mark.parametrize("text", ["two", "0", "2.5", "99999"])
    def test_bad_environment_raises_at_first_use(self, text: str) -> None:
        code = """
            try:
                pycodesign.get_num_threads()
            except ValueError as error:
                print(error)
        """
        message = f"PYCODESIGN_NUM_THREADS: expected a number from 1 to 4096, got '{text}'"
        assert run_script(code, PYCODESIGN_NUM_THREADS=text) == message

    def test_affinity(self) -> None:
        code = """
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            print(pycodesign.get_num_threads())
        """
        assert run_script(code) == "1"


class TestResults:
    def test_do_not_depend_on_the_thread_count(self) -> None:
        x, packed = build_layer()
        pycodesign.set_num_threads(1)
        expected = ops.conv2d(x, packed)
        for n in (2, 3, 8):
            pycodesign.set_num_threads(n)
            np.testing.assert_array_equal(ops.conv2d(x, packed), expected)

    def test_concurrent_callers(self) -> None:
        layers = [build_layer(seed) for seed in range(4)]
        pycodesign.set_num_threads(2)
        expected = [ops.conv2d(x, packed) for x, packed in layers]

        def run(caller: int) -> None:
            x, packed = layers[caller % 4]
            for _ in range(50):
                np.testing.assert_array_equal(ops.conv2d(x, packed), expected[caller % 4])

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(run, range(8)))

    def test_thread_count_changes_while_another_thread_computes(self) -> None:
        x, packed = build_layer()
        expected = ops.conv2d(x, packed)
        with ThreadPoolExecutor(1) as threads:
            computing = threads.submit(lambda: [ops.conv2d(x, packed) for _ in range(200)])
            n = 0
            while not computing.done():
                n = n % 6 + 1
                pycodesign.set_num_threads(n)
        for y in computing.result():
            np.testing.assert_array_equal(y, expected)


class TestProcess:
    FORK = """
        x, packed = build_layer()
        pycodesign.set_num_threads(3)
        expected = ops.conv2d(x, packed)

        def fork_and_compute():
            child = os.fork()
            if child == 0:
                ok = all(np.array_equal(ops.conv2d(x, packed), expected) for _ in range(20))
                os._exit(0 if ok and _core.thread_backend() == "pool" else 1)
            _, status = os.waitpid(child, 0)
            assert status == 0, status

        for _ in range(3):
            fork_and_compute()
            assert np.array_equal(ops.conv2d(x, packed), expected)
        print("done")
    """

    def test_forked_child(self) -> None:
        assert run_script(self.FORK) == "done"

    def test_forked_child_while_another_thread_prepares(self) -> None:
        code = """
            weights = np.random.default_rng(0).standard_normal((512, 512, 3, 3), np.float32)
            packed = ops.prepack_conv2d(quantize.ternary(weights), algorithm="codegen")
            x = np.ones((1, 512, 4, 4), np.float32)
            thread = threading.Thread(target=ops.conv2d, args=(x, packed))
            thread.start()
            time.sleep(0.02)  # in which it began to make tables, as no machine code runs here
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                ops.conv2d(x, packed)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            thread.join()
            print(status)
        """
        assert run_script(code, PYCODESIGN_ISA="scalar") == "0"

    @needs_torch
    def test_forked_child_of_a_process_that_used_torch(self) -> None:
        use_torch = """
            import torch
            torch.set_num_threads(2)
            torch.conv2d(torch.ones(1, 64, 28, 28), torch.ones(64, 64, 3, 3))
        """
        assert run_script(textwrap.dedent(use_torch) + textwrap.dedent(self.FORK)) == "done"

    @pytest.mark.parametrize("nap", [0, 0.01])
    def test_exit_with_live_workers(self, nap: float) -> None:
        code = f"""
            x, packed = build_layer()
            pycodesign.set_num_threads(4)
            ops.conv2d(x, packed)
            time.sleep({nap})
            print("done")
        """
        assert run_script(code) == "done"

    def test_exit_while_a_daemon_thread_computes(self) -> None:
        code = """
            x, packed = build_layer()
            pycodesign.set_num_threads(3)

            def compute():
                while True:
                    ops.conv2d(x, packed)

            threading.Thread(target=compute, daemon=True).start()
            time.sleep(0.1)
            print("done")
        """
        assert run_script(code) == "done"


class TestTeam:
    def test_own_pool(self) -> None:
        assert run_script("print(_core.thread_backend())") == "pool"

    @needs_torch
    def test_torch_team(self) -> None:
        code = """
            x, packed = build_layer()
            pycodesign.set_num_threads(3)
            expected = ops.conv2d(x, packed)
            import torch
            assert np.array_equal(ops.conv2d(x, packed), expected)
            print(_core.thread_backend())
        """
        backend = run_script(code)
        assert backend.startswith("openmp") and "omp" in backend

    @needs_torch
    def test_alternating_with_torch(self) -> None:
        if len(os.sched_getaffinity(0)) < 2:
            pytest.skip("needs two cores")
        done = subprocess.run(
            [sys.executable, str(BENCH), "--json", "--blocks", "10"], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["ratio_fastest_blocks"] < 10  # two spinning teams: 20 and more
