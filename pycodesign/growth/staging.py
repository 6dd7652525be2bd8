"""A directory that appears whole or not at all."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["stage_directory", "sync"]


@contextmanager
def stage_directory(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """Make a directory beside `target` that becomes it if all goes well.

    A lock tells it from one that a process which was killed has left behind; those of the same target are removed.
    Unless `replace`, it is an error if the target exists by the time.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target)
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    unlocked = staging.with_name(f"{staging.name}.new")  # a name that nobody removes
    unlocked.mkdir()
    lock = _lock(unlocked)
    unlocked.rename(staging)
    try:
        yield staging
        _sync_tree(staging)
        if replace and target.exists():
            _exchange(staging, target)
        elif target.exists():
            raise FileExistsError(f"dst: expected a new directory, or overwrite, got {target}, made in the meantime")
        else:
            staging.rename(target)  # fails if it has come to be, unless it is empty
        sync(target.parent)
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(staging, ignore_errors=True)  # what was left unfinished, or what was replaced


def _lock(directory: Path) -> int | None:
    """Return a descriptor that locks a directory until it is closed; None where another process, or none, can."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_stale(target: Path) -> None:
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{32}}")
    for directory in target.parent.iterdir():
        with suppress(OSError):  # it may vanish
            if name.fullmatch(directory.name) and (lock := _lock(directory)) is not None:
                os.close(lock)
                shutil.rmtree(directory, ignore_errors=True)


def _sync_tree(directory: Path) -> None:
    """Wait until all that is in a directory is on the disk."""
    for folder, _, files in os.walk(directory):
        for file in files:
            path = Path(folder, file)
            if path.is_file() and not path.is_symlink():
                with suppress(PermissionError):  # linked from what was there
                    sync(path)
        sync(Path(folder))


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> None:
    """Swap two directories in one step; in two where the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return
    aside = one.with_name(f"{one.name}.old")
    other.rename(aside)
    try:
        one.rename(other)
    except OSError:
        aside.rename(other)
        raise
    aside.rename(one)
