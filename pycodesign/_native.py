"""The compiled modules, and what they were built with."""

from __future__ import annotations

import importlib
import operator
from typing import Any

try:
    from pycodesign import _core
except ImportError as error:
    raise ImportError(
        "pycodesign._core, the compiled module, cannot be imported: "
        "in a source checkout, build it with `pip install .` or `pip install -e .`"
    ) from error

MOST_THREADS = 4096

__version__: str = _core.build_info()["version"]


def set_num_threads(n: int) -> None:
    """Set how many threads one operation may use.

    Parameters
    ----------
    n : int
        1 to 4096. The default is the number of cores this process may use, or ``PYCODESIGN_NUM_THREADS``.

    Raises
    ------
    TypeError
        If `n` is no integer.
    ValueError
        If `n` is out of range.

    Examples
    --------
    >>> import pycodesign
    >>> before = pycodesign.get_num_threads()
    >>> pycodesign.set_num_threads(1)
    >>> pycodesign.get_num_threads()
    1
    >>> pycodesign.set_num_threads(before)
    """
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"n: expected an integer, got {n!r}")
    number = operator.index(n)
    if not 1 <= number <= MOST_THREADS:
        raise ValueError(f"n: expected a number from 1 to {MOST_THREADS}, got {number}")
    _core.set_num_threads(number)


def get_num_threads() -> int:
    """Return how many threads one operation may use."""
    return _core.get_num_threads()


def set_isa(name: str) -> None:
    """Force the instruction set that kernels are chosen for.

    Parameters
    ----------
    name : str
        ``"scalar"``, ``"avx2"``, ``"avx2_vnni"``, ``"avx512"``, ``"avx512_vbmi"`` or ``"avx512_amx"``. The default
        is the best one this processor has, or ``PYCODESIGN_ISA``.

    Raises
    ------
    TypeError
        If the name is no string.
    ValueError
        If the name is unknown or this processor does not support it.

    Examples
    --------
    >>> import pycodesign
    >>> before = pycodesign.show_config()["isa"]
    >>> pycodesign.set_isa("scalar")
    >>> pycodesign.show_config()["isa"]
    'scalar'
    >>> pycodesign.set_isa(before)
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {name!r}")
    _core.set_isa(name)


def show_config() -> dict[str, Any]:
    """Return what was detected, what is in force and what was built.

    Returns
    -------
    dict
        ``version``, ``compiler``, ``isas`` (built), ``isa`` (in force), ``supported_isas``, ``cpu``, ``caches``
        (bytes), ``cores``, ``threads``, ``team`` (whose threads), ``cuda`` (what the CUDA module says, or why there is
        none).
    """
    return {
        **_core.build_info(),
        "isa": _core.active_isa(),
        "supported_isas": _core.supported_isas(),
        "cpu": _core.cpu_name(),
        "caches": _core.cache_sizes(),
        "cores": _core.available_cores(),
        "threads": _core.get_num_threads(),
        "team": _core.thread_backend(),
        "cuda": _cuda_state(),
    }


def _cuda_state() -> str | dict[str, Any]:
    try:
        _cuda: Any = importlib.import_module("pycodesign._cuda")
    except ModuleNotFoundError:
        return "not built: no CUDA compiler was found when pycodesign was built"
    except ImportError as error:
        return f"cannot be loaded: {error}"
    state: dict[str, Any] = {**_cuda.build_info(), "devices": _cuda.device_count()}
    if absence := _cuda.absence():
        state["absence"] = absence
    return state
