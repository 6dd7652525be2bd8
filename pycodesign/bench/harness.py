"""Interleaved timing of contenders in one process, with caches hot and cold.

Every round gives each contender one turn, in an order that rotates from round to round, so that drift of the machine
meets all of them alike. A turn is:

1. a pause, in which the threads of the previous contender stop spinning;
2. one run that is not timed: it wakes the contender's own threads and fills the caches;
3. the *hot* timing;
4. eviction: all cores read a buffer larger than the caches, so that no weight, table, generated code or
   activation of the contender is left in them;
5. the *cold* timing.

A timing during which the scheduler took a core away from this process is made again, a few times at most; how many
stayed disturbed is part of the result.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

import pycodesign
from pycodesign._arguments import join_names

SCHEMA = 1
EVICTED_BYTES = 96 << 20
PAUSE_SECONDS = 0.01  # a libgomp team spins for some 4 ms after its last job
ATTEMPTS = 4  # at an undisturbed timing
FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512vbmi", "avx512_bf16", "amx_int8")
PACKAGES = ("numpy", "torch", "onnx", "onnxruntime", "openvino")


class Contender(Protocol):
    """What `measure` times."""

    def run(self) -> object:
        """Do the work that is timed."""


AnyContender = TypeVar("AnyContender", bound=Contender)


class CheckError(AssertionError):
    """A contender computed something else than the reference."""


@dataclass(frozen=True)
class Spread:
    """Robust statistics of repeated timings, in seconds; `disturbed` of the `count` timings were interrupted."""

    median: float
    iqr: float
    mad: float
    minimum: float
    count: int
    disturbed: int = 0

    @classmethod
    def of(cls, seconds: Sequence[float], disturbed: int = 0) -> Spread:
        """Summarize the timings of one contender.

        Parameters
        ----------
        seconds : sequence of float
            At least one timing.
        disturbed : int
            How many of them were interrupted.

        Examples
        --------
        >>> Spread.of([1.0, 2.0, 9.0]).median
        2.0
        """
        low, median, high = np.percentile(seconds, [25, 50, 75]).tolist()
        mad = statistics.median(abs(s - median) for s in seconds)
        return cls(median, high - low, mad, min(seconds), len(seconds), disturbed)


@dataclass(frozen=True)
class Timing:
    """Hot and cold timings of one contender."""

    hot: Spread
    cold: Spread


class Evictor:
    """Replaces what the caches hold, on every core that this process may use.

    Each core reads its share of at least 96 MB, of twice the last-level cache, and of eight times its own second-level
    cache: as the weights of other layers would, it leaves the caches full, and nothing in them to be written back.
    """

    def __init__(self) -> None:
        caches = pycodesign.show_config()["caches"]
        cores = sorted(os.sched_getaffinity(0))
        total = max(EVICTED_BYTES, 2 * caches["l3"])
        share = max(total // len(cores), 8 * caches["l2"])
        self._buffers = {core: np.ones(share // 8) for core in cores}
        self._threads = ThreadPoolExecutor(len(cores))

    def __call__(self) -> float:
        return max([job.result() for job in [self._threads.submit(self._walk, core) for core in self._buffers]])

    def _walk(self, core: int) -> float:
        os.sched_setaffinity(0, {core})  # 0 is the calling thread, a worker of this object
        return float(self._buffers[core].max())

    def close(self) -> None:
        """Free the buffers and the threads."""
        self._threads.shutdown()
        self._buffers.clear()


def measure(
    contenders: Sequence[AnyContender],
    *,
    rounds: int = 15,
    pause: float = PAUSE_SECONDS,
    evict: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    attempts: int = ATTEMPTS,
    progress: Callable[[], object] = lambda: None,
) -> dict[AnyContender, Timing]:
    """Time contenders in turns.

    Parameters
    ----------
    contenders : sequence of Contender
        Already checked.
    rounds : int
        Turns of each contender.
    pause : float
        Seconds of sleep before a turn.
    evict : callable, optional
        Runs before each cold timing; an `Evictor` by default.
    clock : callable
        Returns seconds.
    attempts : int
        At a timing that the scheduler does not disturb.
    progress : callable
        Runs after each turn.

    Returns
    -------
    dict of Contender to Timing
        In the order given.

    Raises
    ------
    ValueError
        If `rounds` is not positive.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    owned = None if evict else Evictor()
    evict = evict or owned
    assert evict is not None

    def time_run(contender: Contender, prepare: Callable[[], object]) -> tuple[float, bool]:
        for _ in range(attempts):
            prepare()
            switches = _preemptions()
            start = clock()
            contender.run()
            seconds = clock() - start
            disturbed = _preemptions() > switches
            if not disturbed:
                break
        return seconds, disturbed

    hot: dict[AnyContender, list[tuple[float, bool]]] = {contender: [] for contender in contenders}
    cold: dict[AnyContender, list[tuple[float, bool]]] = {contender: [] for contender in contenders}
    try:
        for turn in range(rounds):
            first = turn % max(len(contenders), 1)
            for contender in [*contenders[first:], *contenders[:first]]:
                time.sleep(pause)
                hot[contender].append(time_run(contender, contender.run))
                cold[contender].append(time_run(contender, evict))
                progress()
    finally:
        if owned:
            owned.close()

    def summarize(timings: list[tuple[float, bool]]) -> Spread:
        return Spread.of([seconds for seconds, _ in timings], sum(disturbed for _, disturbed in timings))

    return {contender: Timing(summarize(hot[contender]), summarize(cold[contender])) for contender in contenders}


def measure_hot(contenders: Sequence[AnyContender], rounds: int) -> dict[AnyContender, Spread]:
    """Time in turns: a pause for the other threads to rest, a run to wake one's own, and the timing."""
    seconds: dict[AnyContender, list[float]] = {contender: [] for contender in contenders}
    for turn in range(rounds):
        first = turn % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            time.sleep(PAUSE_SECONDS)
            contender.run()
            start = time.perf_counter()
            contender.run()
            seconds[contender].append(time.perf_counter() - start)
    return {contender: Spread.of(values) for contender, values in seconds.items()}


def gather_facts() -> dict[str, Any]:
    """Describe the machine and the software: what a timing means nothing without.

    Returns
    -------
    dict
        Values that JSON can hold; None for what could not be found.
    """
    config = pycodesign.show_config()
    config["team"] = re.sub(r"\S*/", "", config["team"])  # the library's name, not where it lies
    known = set(_search(r"^flags\s*:\s*(.*)$", "/proc/cpuinfo").split())
    memory = _search(r"^MemTotal:\s*(\d+) kB", "/proc/meminfo")
    return {
        "cpu": config.pop("cpu"),
        "flags": [flag for flag in FLAGS if flag in known],
        "caches": config.pop("caches"),
        "cores": config.pop("cores"),
        "memory": int(memory) * 1024 if memory else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "pycodesign": config,
        "commit": _commit(),
        "load": list(os.getloadavg()),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def package_version(name: str) -> str | None:
    """Return the version of an installed distribution, None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def keep_threads() -> Iterator[None]:
    """Restore, at the end, how many threads operations may use: this package's, and torch's where it is loaded."""
    torch = sys.modules.get("torch")
    before, torchs = pycodesign.get_num_threads(), torch.get_num_threads() if torch else 0
    try:
        yield
    finally:
        pycodesign.set_num_threads(before)
        if torch:
            torch.set_num_threads(torchs)


def write_result(result: dict[str, Any], directory: Path | str) -> Path:
    """Write a result as JSON, named by suite, processor and time, and return where."""
    facts = result["facts"]
    cpu = re.sub(r"[^a-z0-9]+", "-", str(facts["cpu"]).lower()).strip("-")
    stamp = re.sub(r"[^0-9T]", "", facts["date"][:19])
    path = Path(directory) / f"{result['suite']}_{cpu}_{stamp}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(format_result(result))
    return path


def format_result(result: dict[str, Any]) -> str:
    """Write a result as JSON, one line for each row of its lists."""
    entries = []
    for key, value in result.items():
        rows = ",\n".join(map(json.dumps, value)) if isinstance(value, list) else ""
        entries.append(f"{json.dumps(key)}: " + (f"[\n{rows}\n]" if rows else json.dumps(value, indent=1)))
    return "{\n" + ",\n".join(entries) + "\n}\n"


def read_result(path: Path | str, suites: Collection[str] = ()) -> dict[str, Any]:
    """Read what `write_result` wrote.

    Raises
    ------
    ValueError
        If the file is no benchmark result of this schema, or of none of the suites, where some are given.
    """
    try:
        result = json.loads(Path(path).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"path: expected a benchmark result, got {path} ({error})") from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise ValueError(f"path: expected a benchmark result of schema {SCHEMA}, got {path}")
    if suites and result["suite"] not in suites:
        raise ValueError(f"path: expected a result of {join_names(suites)}, got one of {result['suite']}: {path}")
    return result


def spread_ms(spread: Spread, layers: int) -> dict[str, float | int]:
    """Convert the timings of a chain of equal layers to milliseconds of one layer."""
    fields = asdict(spread)
    return {
        "rounds": fields.pop("count"),
        "disturbed": fields.pop("disturbed"),
        **{name: round(1e3 * value / layers, 6) for name, value in fields.items()},
    }


def _preemptions() -> int:
    """How often the scheduler has taken a core from a thread of this process that could have gone on."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _search(pattern: str, path: str) -> str:
    """First group of a pattern in a file; empty if there is no such file or line."""
    try:
        found = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else ""


def _commit() -> str | None:
    """The commit of the source tree that this file lies in, "+" if it was changed; None outside one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes.strip() else "")
