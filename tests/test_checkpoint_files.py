"""Checkpoints are written whole or not at all, whenever the process ends; other files stay."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DOUBLE, LARGER, list_files
from checkpoints import quiet as quiet
from checkpoints import small as small

from pycodesign import growth
from pycodesign.growth import shards, staging


def start(src: Path, dst: Path, code: str) -> subprocess.Popen[str]:
    """Grow in a process of its own, after some code."""
    call = f"growth.grow_checkpoint({str(src)!r}, {str(dst)!r}, target_config={LARGER!r}, overwrite=True)"
    script = (
        f"from pycodesign import growth\nfrom pycodesign.growth import checkpoint, shards, staging\n{code}\n{call}\n"
    )
    return subprocess.Popen([sys.executable, "-c", script], cwd=src.parent, stderr=subprocess.PIPE, text=True)


STOPS = {
    "between tensors": """
        write, count = shards.Writer.write, [0]
        def stop(*arguments):
            count[0] += 1
            if count[0] == 9: os.kill(os.getpid(), signal.SIGKILL)
            return write(*arguments)
        shards.Writer.write = stop
    """,
    "before the renaming": """
        staging._exchange = lambda *directories: os.kill(os.getpid(), signal.SIGKILL)
    """,
    "after the renaming": """
        exchange = staging._exchange
        def stop(*directories):
            exchange(*directories)
            os.kill(os.getpid(), signal.SIGKILL)
        staging._exchange = stop
    """,
}


@pytest.mark.parametrize("where", STOPS)
def test_killed_it_leaves_the_old_or_the_new(small: Path, tmp_path: Path, where: str) -> None:
    dst, complete = tmp_path / "large", tmp_path / "complete"
    growth.grow_checkpoint(small, complete, target_config=LARGER)
    growth.grow_checkpoint(small, dst, target_config=DOUBLE)
    old, new = list_files(dst), list_files(complete)
    with start(small, dst, "import os, signal\n" + textwrap.dedent(STOPS[where])) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    assert list_files(dst) == (new if where == "after the renaming" else old)
    growth.grow_checkpoint(small, dst, target_config=LARGER, overwrite=True)
    assert list_files(dst) == new


def test_killed_at_any_time(small: Path, tmp_path: Path) -> None:
    complete, dst = tmp_path / "complete", tmp_path / "large"
    growth.grow_checkpoint(small, complete, target_config=LARGER)
    new, old = list_files(complete), list_files(small)
    growth.grow_checkpoint(small, dst, target_config={})
    assert list_files(dst) == old
    for delay in (0.0, 0.01, 0.03):
        with start(small, dst, "print('ready', file=__import__('sys').stderr, flush=True)") as process:
            assert process.stderr is not None and process.stderr.readline() == "ready\n"
            time.sleep(delay)
            process.kill()
        assert list_files(dst) in (old, new)


def test_what_a_killed_process_left_behind_is_removed(small: Path, tmp_path: Path) -> None:
    stop = "import os, signal\n" + textwrap.dedent(STOPS["between tensors"])
    with start(small, tmp_path / "large", stop) as process:
        process.communicate(timeout=60)
    (left,) = tmp_path.glob(".large.*")
    (tmp_path / ".large.notes").mkdir()
    with staging.stage_directory(tmp_path / "other"):
        assert left.exists()
        with staging.stage_directory(tmp_path / "large") as first, staging.stage_directory(tmp_path / "large"):
            assert first.exists() and not left.exists()
    assert (tmp_path / ".large.notes").exists()


# ---- directories -----------------------------------------------------------------------------------------------------


def test_in_place_and_where_directories_cannot_be_swapped(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __init__(self, *_: Any, **__: Any) -> None: ...

    monkeypatch.setattr(staging.ctypes, "CDLL", Library)
    growth.grow_checkpoint(small, small, target_config=LARGER, overwrite=True)
    assert json.loads((small / "config.json").read_text())["n_embd"] == 36
    assert [path.name for path in small.parent.iterdir()] == ["small"]


def test_a_swap_that_fails_halfway_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.mkdir()
        (path / path.name).touch()
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self == one:
            raise OSError(errno.EIO, "no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(staging.ctypes, "CDLL", lambda *_, **__: None)
    with pytest.raises(OSError, match="no"):
        staging._exchange(one, other)
    assert sorted(list_files(tmp_path)) == ["one/one", "other/other"]


def test_a_destination_made_in_the_meantime(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "large"

    def make(done: int, total: int) -> None:
        target.mkdir(exist_ok=True)
        (target / "precious").touch()

    with pytest.raises(FileExistsError, match=r"dst: expected a new directory, .*, made in the meantime"):
        growth.grow_checkpoint(small, target, target_config=LARGER, progress=make)
    assert list(list_files(target)) == ["precious"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "small"]


def test_destinations(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^dst: expected a new directory, or overwrite, got {small}, which exists$"):
        growth.grow_checkpoint(small, small, target_config=LARGER)
    with pytest.raises(
        ValueError, match=f"^dst: expected another directory than one that src lies in, got {tmp_path}$"
    ):
        growth.grow_checkpoint(small, tmp_path, target_config=LARGER, overwrite=True)
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "precious").touch()
    with pytest.raises(
        ValueError, match=r"dst: expected a checkpoint to overwrite, got .* without any of config\.json"
    ):
        growth.grow_checkpoint(small, tmp_path / "documents", target_config=LARGER, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="dst: expected a directory, got the file"):
        growth.grow_checkpoint(small, tmp_path / "file", target_config=LARGER, overwrite=True)
    with pytest.raises(ValueError, match="max_shard_bytes: expected an integer of at least 1, got 0"):
        growth.grow_checkpoint(small, tmp_path / "large", target_config=LARGER, max_shard_bytes=0)
    (small / "optimizer.pt").touch()
    with pytest.warns(RuntimeWarning, match=r"optimizer.pt: left out; growth.save_optimizer writes"):
        growth.grow_checkpoint(small, tmp_path / "deep" / "large", target_config=LARGER)
    assert not (tmp_path / "deep" / "large" / "optimizer.pt").exists()


# ---- other files -----------------------------------------------------------------------------------------------------


def test_what_is_no_part_of_the_checkpoint_stays(small: Path) -> None:
    kept = {"notes/a/b.txt": "1", ".git/HEAD": "2", ".gitattributes": "3", "training.log": "4"}
    replaced = {"pytorch_model.bin": "5", "model-00001-of-00002.safetensors": "6"}
    for name, text in (kept | replaced).items():
        (small / name).parent.mkdir(parents=True, exist_ok=True)
        (small / name).write_text(text)
    (small / "link").symlink_to("notes")
    before = set(list_files(small))
    growth.grow_checkpoint(small, small, target_config=LARGER, overwrite=True)
    assert set(list_files(small)) == before - replaced.keys()
    assert {name: (small / name).read_text() for name in kept} == kept
    assert (small / "link").is_symlink()


def test_files_that_look_like_weights_stay(small: Path) -> None:
    kept = ("training_args.bin", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "model_ema.pt")
    replaced = (
        "optimizer.pt",
        "pytorch_model.fp16.bin",
        "tf_model.h5",
        "consolidated.00.pth",
        "model.safetensors.index.json",
    )
    for name in (*kept, *replaced):
        (small / name).write_text(name)
    with pytest.warns(RuntimeWarning, match="optimizer.pt: left out"):
        growth.grow_checkpoint(small, small, target_config=LARGER, overwrite=True)
    assert {name: (small / name).read_text() for name in kept} == {name: name for name in kept}
    assert not any((small / name).exists() for name in replaced)


def test_permissions_stay(small: Path) -> None:
    modes = {small: 0o750, small / "model.safetensors": 0o640, small / "tokenizer.json": 0o600}
    for path, mode in modes.items():
        path.chmod(mode)
    growth.grow_checkpoint(small, small, target_config=LARGER, overwrite=True)
    assert {path: path.stat().st_mode & 0o777 for path in modes} == modes


# ---- the disk --------------------------------------------------------------------------------------------------------


def test_a_full_disk(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def refuse(descriptor: int, offset: int, length: int) -> None:
        taken.append(length)
        if len(taken) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match=r"dst: expected room on the disk for [\d,]+ bytes, got [\d,]+ free"):
        growth.grow_checkpoint(small, tmp_path / "large", target_config=LARGER, max_shard_bytes=20_000)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_an_index_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    closed: list[int] = []
    open_file, close = os.open, os.close

    def record(*arguments: Any) -> int:
        opened.append(open_file(*arguments))
        return opened[-1]

    monkeypatch.setattr(os, "open", record)
    monkeypatch.setattr(os, "close", lambda descriptor: closed.append(descriptor) or close(descriptor))
    (tmp_path / "model.safetensors.index.json").mkdir()
    tensors = [shards.Tensor(name, tmp_path, "F32", (4,), 0) for name in "ab"]
    with pytest.raises(IsADirectoryError):
        shards.Writer(tmp_path, "model", tensors, {}, 16)
    assert len(opened) == 2 and sorted(closed) == sorted(opened)


def test_a_disk_without_room(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small / "tokenizer.json").write_text(" " * 1_000_000)
    monkeypatch.setattr(growth.checkpoint, "stage_directory", None)  # nothing is written
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 900_000))
    with pytest.raises(OSError, match=r"dst: expected room on the disk for 1,[\d,]+ bytes, got 900,000 free"):
        growth.grow_checkpoint(small, tmp_path / "deep" / "large", target_config=LARGER)


def record_syncs(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    names: set[str] = set()
    sync = os.fsync

    def record(descriptor: int) -> None:
        names.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return names


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to see which files are synced")
def test_all_that_is_written_is_on_the_disk(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = record_syncs(monkeypatch)
    growth.grow_checkpoint(small, tmp_path / "large", target_config=LARGER, max_shard_bytes=50_000)
    assert set(list_files(tmp_path / "large")) <= names
    names.clear()
    model = torch.nn.Linear(2, 2)
    growth.save_optimizer(model, torch.optim.AdamW(model.parameters()), tmp_path)
    assert tmp_path.name in names and any(name.startswith(".optimizer.safetensors.") for name in names)
