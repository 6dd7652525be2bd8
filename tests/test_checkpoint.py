"""Checkpoints grown on disk: the same as in memory, in little of it, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from click.testing import CliRunner
from safetensors import safe_open

from pycodesign import growth
from pycodesign.cli import main
from pycodesign.growth import shards, staging

SIZES = {"n_embd": 24, "n_layer": 2, "n_head": 6, "n_inner": 40}
LARGER = {"n_embd": 36, "n_layer": 3, "n_head": 9, "n_inner": 60}
DOUBLE = {"n_embd": 48, "n_head": 12, "n_inner": 80}


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def build(**sizes: int) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    tokens = {"vocab_size": 50, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**{**tokens, **SIZES, **sizes}, layer_norm_epsilon=1e-2)
    return transformers.GPT2LMHeadModel(config).eval()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(x).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), x.roll(-1, 1).flatten()).backward()
        optimizer.step()


def read_all(directory: Path, stem: str = "model") -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob(f"{stem}*.safetensors")):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def list_files(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "tokenizer.json").write_text("{}")
    return tmp_path / "small"


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 20_000])
@pytest.mark.parametrize("source_shards", ["10GB", "20KB"])
def test_a_checkpoint_grows_as_the_model_does(tmp_path: Path, shard_bytes: int, source_shards: str) -> None:
    src, dst = tmp_path / "small", tmp_path / "large"
    model, larger = build(), build(**LARGER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer)
    model.save_pretrained(src, max_shard_size=source_shards)
    growth.save_optimizer(model, optimizer, src)
    (src / "tokenizer.json").write_text("{}")
    target_optimizer = torch.optim.AdamW(larger.parameters())
    growth.grow(model, larger, optimizer=optimizer, target_optimizer=target_optimizer)

    steps: list[tuple[int, int]] = []
    report = growth.grow_checkpoint(
        src,
        dst,
        target_config=LARGER,
        verify=True,
        max_shard_bytes=shard_bytes,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert report.difference is not None and report.difference < 1e-6
    assert {*report.files, "config.json", "generation_config.json", "tokenizer.json"} == set(list_files(dst))
    assert (len(report.files) > 2) == (shard_bytes == 20_000)
    assert all(file.stat().st_size < 30_000 for file in dst.glob("*.safetensors")) == (shard_bytes == 20_000)
    assert steps[-1] == (report.bytes_written, report.bytes_written) and steps == sorted(steps)

    loaded = transformers.GPT2LMHeadModel.from_pretrained(dst)
    assert loaded.config.n_layer == 3 and loaded.config.layer_norm_epsilon == larger.config.layer_norm_epsilon
    for (name, got), expected in zip(loaded.state_dict().items(), larger.state_dict().values(), strict=True):
        assert torch.equal(got, expected), name
    loaded_optimizer = torch.optim.AdamW(loaded.parameters())
    growth.load_optimizer(loaded, loaded_optimizer, dst)
    assert loaded_optimizer.param_groups[0]["lr"] == 1e-2
    for got, expected in zip(loaded.parameters(), larger.parameters(), strict=True):
        states = loaded_optimizer.state[got], target_optimizer.state[expected]
        assert states[0].keys() == states[1].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD"])
def test_exact_mode_scales_groups_as_the_model_does(tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"lr": 0.03, "weight_decay": 0.1} | ({"momentum": 0.9} if kind == "SGD" else {})
    model, larger = build(), build(**DOUBLE)
    optimizer, other = (getattr(torch.optim, kind)(m.parameters(), **options) for m in (model, larger))
    train(model, optimizer)
    model.save_pretrained(tmp_path / "small")
    growth.save_optimizer(model, optimizer, tmp_path / "small")
    growth.grow(model, larger, mode="exact", optimizer=optimizer, target_optimizer=other)
    growth.grow_checkpoint(tmp_path / "small", tmp_path / "large", target_config=DOUBLE, mode="exact")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "large").eval()
    loaded_optimizer = getattr(torch.optim, kind)(loaded.parameters())
    growth.load_optimizer(loaded, loaded_optimizer, tmp_path / "large")
    train(larger, other)
    train(loaded, loaded_optimizer)
    for got, expected in zip(loaded.state_dict().values(), larger.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    build().to(dtype).save_pretrained(tmp_path / "small")
    report = growth.grow_checkpoint(tmp_path / "small", tmp_path / "large", target_config=LARGER, verify=True)
    assert report.difference is not None and report.difference < 2 * torch.finfo(dtype).eps + 1e-6
    with safe_open(tmp_path / "large" / "model.safetensors", "pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {dtype}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("LlamaForCausalLM", {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}),
        ("ViTModel", {"hidden_size": 36, "num_attention_heads": 9, "num_hidden_layers": 3}),
        ("BertForMaskedLM", {"hidden_size": 48, "num_attention_heads": 12, "intermediate_size": 80}),
    ],
)
def test_other_architectures(tmp_path: Path, name: str, target: dict[str, int]) -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 40}
    cls = getattr(transformers, name)
    options = {"image_size": 16, "patch_size": 8} if name == "ViTModel" else {"vocab_size": 50}
    heads = {"num_key_value_heads": 2, "head_dim": 4} if name == "LlamaForCausalLM" else {}
    cls(cls.config_class(**sizes, **options, **heads)).save_pretrained(tmp_path / "small")
    report = growth.grow_checkpoint(tmp_path / "small", tmp_path / "large", target_config=target, verify=True)
    assert report.difference is not None and report.difference < 1e-6
    if name == "BertForMaskedLM":
        with pytest.raises(growth.Inexact, match="num_hidden_layers: 2 -> 3, but no block of bert can be an identity"):
            growth.grow_checkpoint(tmp_path / "small", tmp_path / "deep", target_config={"num_hidden_layers": 3})


@pytest.mark.parametrize("name", ["ViTForImageClassification", "DeiTForImageClassification"])
def test_optimizers_of_models_whose_files_have_other_names(tmp_path: Path, name: str) -> None:
    cls = getattr(transformers, name)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 40}
    larger = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 8}
    models = [cls(cls.config_class(image_size=16, patch_size=8, **{**sizes, **change})) for change in ({}, larger)]
    adams = [torch.optim.AdamW(model.parameters()) for model in models]
    models[0](torch.randn(2, 3, 16, 16)).logits.square().sum().backward()
    adams[0].step()
    models[0].save_pretrained(tmp_path / "small")
    growth.save_optimizer(models[0], adams[0], tmp_path / "small")
    growth.grow(*models, optimizer=adams[0], target_optimizer=adams[1])
    growth.grow_checkpoint(tmp_path / "small", tmp_path / "large", target_config=larger, verify=True)
    loaded = cls.from_pretrained(tmp_path / "large")
    adam = torch.optim.AdamW(loaded.parameters())
    growth.load_optimizer(loaded, adam, tmp_path / "large")
    for got, expected in zip(loaded.parameters(), models[1].parameters(), strict=True):
        for key, state in adams[1].state[expected].items():
            assert torch.equal(adam.state[got][key], state)


def test_old_names_of_norms(tmp_path: Path) -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 6, "intermediate_size": 40}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes))
    model.save_pretrained(tmp_path / "small")
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {name: np.ascontiguousarray(array) for name, array in read_all(tmp_path / "small").items()}
    for new, old in names.items():
        tensors = {name.replace(new, old): array for name, array in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "small" / "model.safetensors", {"format": "pt"})
    target = {"hidden_size": 48, "num_attention_heads": 12}
    report = growth.grow_checkpoint(tmp_path / "small", tmp_path / "large", target_config=target, verify=True)
    assert report.difference is not None and report.difference < 1e-6


def test_few_positions_are_verified(tmp_path: Path) -> None:
    build(n_positions=5).save_pretrained(tmp_path / "small")
    report = growth.grow_checkpoint(tmp_path / "small", tmp_path / "large", target_config=LARGER, verify=True)
    assert report.difference is not None and report.difference < 1e-6


def test_layer_scale_vectors_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = growth.Spec(
        "scaled",
        {
            "embed": growth.linear(None, "stream"),
            "blocks.*.fc1": growth.linear("stream", "hidden"),
            "blocks.*.fc2": growth.linear("hidden", "stream", factor="blocks.*.ls.gamma"),
            "blocks.*.ls": growth.layer_scale("stream"),
            "norm": growth.layer_norm("stream"),
            "head": growth.linear("stream", None),
        },
        spaces={"stream": "mean"},
        blocks={"blocks.*": 0},
        silence=["blocks.*.fc2"],
        config={"stream": "width", "hidden": "hidden", "heads": "heads", "layers": "layers"},
    )
    rng = np.random.default_rng(0)
    shapes = {"embed.weight": (4, 3), "norm.weight": (4,), "norm.bias": (4,), "head.weight": (2, 4)}
    for block in range(2):
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in (("fc1.weight", (6, 4)), ("fc2.weight", (4, 6)))}
        shapes[f"blocks.{block}.ls.gamma"] = (4,)
    old = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    (tmp_path / "small").mkdir()
    safetensors.numpy.save_file(old, tmp_path / "small" / "model.safetensors")
    reads: list[str] = []
    read = shards.Tensor.read
    monkeypatch.setattr(shards.Tensor, "read", lambda self: reads.append(self.name) or read(self))
    report = growth.grow_checkpoint(
        tmp_path / "small",
        tmp_path / "large",
        source_config={"width": 4, "hidden": 6, "heads": 1, "layers": 2, "eps": 1e-5},
        target_config={"width": 6, "layers": 4},
        spec=replace(spec, config=spec.config | {"eps": "eps"}),
    )
    assert sorted(reads) == sorted(old)
    new = read_all(tmp_path / "large")
    assert {name: array.shape for name, array in new.items()} == {rule.name: rule.shape for rule in report.plan}
    for rule in report.plan:
        np.testing.assert_array_equal(new[rule.name], rule.apply(old[rule.source], old.get(rule.factor)))
    assert any(rule.factor for rule in report.plan)


# ---- whole or not at all ---------------------------------------------------------------------------------------------


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


def test_in_place_and_where_directories_cannot_be_swapped(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __init__(self, *_: Any, **__: Any) -> None: ...

    monkeypatch.setattr(staging.ctypes, "CDLL", Library)
    growth.grow_checkpoint(small, small, target_config=LARGER, overwrite=True)
    assert json.loads((small / "config.json").read_text())["n_embd"] == 36
    assert [path.name for path in small.parent.iterdir()] == ["small"]


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


def test_a_disk_without_room(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small / "tokenizer.json").write_text(" " * 1_000_000)
    monkeypatch.setattr(growth.checkpoint, "stage_directory", None)  # nothing is written
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 900_000))
    with pytest.raises(OSError, match=r"dst: expected room on the disk for 1,[\d,]+ bytes, got 900,000 free"):
        growth.grow_checkpoint(small, tmp_path / "deep" / "large", target_config=LARGER)


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


def test_a_destination_made_in_the_meantime(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "large"

    def make(done: int, total: int) -> None:
        target.mkdir(exist_ok=True)
        (target / "precious").touch()

    with pytest.raises(FileExistsError, match=r"dst: expected a new directory, .*, made in the meantime"):
        growth.grow_checkpoint(small, target, target_config=LARGER, progress=make)
    assert list(list_files(target)) == ["precious"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "small"]


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


def test_tied_layers_of_configs_that_name_no_class(small: Path, tmp_path: Path) -> None:
    edit_config(small, architectures=None)
    text = "source_config: expected a class of transformers in architectures, .* false, got None"
    with pytest.raises(ValueError, match=text):
        growth.grow_checkpoint(small, tmp_path / "large", target_config=DOUBLE)
    build().transformer.save_pretrained(tmp_path / "features")
    tensors = safetensors.numpy.load_file(small / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    safetensors.numpy.save_file(tensors, small / "model.safetensors", {"format": "pt"})
    config = {**json.loads((small / "config.json").read_text()), "architectures": ["GPT2LMHeadModel"]}
    growth.grow_checkpoint(small, tmp_path / "large", target_config=DOUBLE)
    grown = json.loads((tmp_path / "large" / "config.json").read_text())
    models = [
        transformers.GPT2LMHeadModel.from_pretrained(path, config=transformers.GPT2Config.from_dict(values)).eval()
        for path, values in ((small, config), (tmp_path / "large", grown))
    ]
    x = torch.arange(16)[None]
    torch.testing.assert_close(models[1](x).logits, models[0](x).logits)
    growth.grow_checkpoint(tmp_path / "features", tmp_path / "larger", target_config=DOUBLE, verify=True)


def test_models_without_blocks_stay_so(small: Path, tmp_path: Path) -> None:
    build(n_layer=0).save_pretrained(tmp_path / "empty")
    with pytest.raises(growth.Inexact, match="n_layer: 0 -> 4 blocks, none of which can be copied; exact would be 0"):
        growth.grow_checkpoint(tmp_path / "empty", tmp_path / "large", target_config={"n_layer": 4})
    edit_config(tmp_path / "empty", n_layer=2)
    with pytest.raises(ValueError, match=r"expected blocks h\.\* in a model of 2 layers, got none"):
        growth.grow_checkpoint(tmp_path / "empty", tmp_path / "large", target_config={"n_layer": 4})


@pytest.mark.parametrize("eps", [None, "1e-5"])
def test_eps_that_is_no_number(small: Path, eps: str | None) -> None:
    edit_config(small, layer_norm_epsilon=eps)
    text = f"^source_config: expected a number for 'layer_norm_epsilon', got {eps!r}$"
    with pytest.raises(ValueError, match=text):
        growth.grow_checkpoint(small, small.parent / "large", target_config=LARGER)


def test_metadata_that_is_null(small: Path) -> None:
    edit_header(lambda header: header.update(__metadata__=None))(small)
    names = safetensors.numpy.load_file(small / "model.safetensors")
    (small / "model.safetensors").rename(small / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (small / "model.safetensors.index.json").write_text(json.dumps(index))
    growth.grow_checkpoint(small, small.parent / "large", target_config=LARGER, dry_run=True)


# ---- bad input -------------------------------------------------------------------------------------------------------


def edit_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(src: Path) -> None:
        file = src / "model.safetensors"
        data = file.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return edit


def edit_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(src: Path) -> None:
        file = src / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return edit


def drop(name: str) -> Callable[[Path], None]:
    def edit(src: Path) -> None:
        file = src / "model.safetensors"
        tensors = safetensors.numpy.load_file(file)
        del tensors[name]
        safetensors.numpy.save_file(tensors, file)

    return edit


def convert(name: str, dtype: str) -> Callable[[Path], None]:
    def edit(src: Path) -> None:
        file = src / "model.safetensors"
        tensors = safetensors.numpy.load_file(file)
        safetensors.numpy.save_file({**tensors, name: tensors[name].astype(dtype)}, file)

    return edit


def edit_config(src: Path, **changes: Any) -> None:
    (src / "config.json").write_text(json.dumps({**json.loads((src / "config.json").read_text()), **changes}))


def shard(change: Callable[[Path, dict[str, str]], object]) -> Callable[[Path], None]:
    def edit(src: Path) -> None:
        tensors = safetensors.numpy.load_file(src / "model.safetensors")
        (src / "model.safetensors").unlink()
        names = sorted(tensors)
        weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
        for file in set(weight_map.values()):
            safetensors.numpy.save_file({n: tensors[n] for n in names if weight_map[n] == file}, src / file)
        change(src, weight_map)
        (src / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return edit


def save_states(names: dict[str, tuple[int, ...]]) -> Callable[[Path], None]:
    states = {name: np.zeros(shape, "f4") for name, shape in names.items()}
    return lambda src: safetensors.numpy.save_file(states, src / "optimizer.safetensors")


def save_settings(settings: dict[str, Any]) -> Callable[[Path], None]:
    states, metadata = {f"state.{LN}.exp_avg": np.zeros(24, "f4")}, {"optimizer": json.dumps(settings)}
    return lambda src: safetensors.numpy.save_file(states, src / "optimizer.safetensors", metadata)


LN = "transformer.ln_f.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (edit_bytes(lambda data: b""), "expected a safetensors file, got a damaged one: no header in 0 bytes"),
    "cut header": (edit_bytes(lambda data: data[:50]), "got a damaged one: no header in 50 bytes"),
    "cut data": (edit_bytes(lambda data: data[:-9]), "expected .* bytes, got a damaged file of"),
    "longer": (edit_bytes(lambda data: data + b"more"), "expected .* bytes, got a damaged file of"),
    "no JSON": (edit_bytes(lambda data: data[:8] + b"x" + data[9:]), "got a damaged one: Expecting value"),
    "offsets": (edit_header(lambda h: h[LN].update(data_offsets=[0, 96])), "got a damaged one: .* begins at byte"),
    "size": (edit_header(lambda h: h[LN].update(shape=[23])), f"{LN} has 96 bytes for shape .* of F32"),
    "negative": (edit_header(lambda h: h[LN].update(data_offsets=[-96, 0])), f"{LN} has shape"),
    "no offsets": (edit_header(lambda h: h[LN].pop("data_offsets")), "got a damaged one: 'data_offsets'"),
    "dtype": (edit_header(lambda h: h[LN].update(dtype="Q4")), f"{LN} is Q4, none of BOOL, U8"),
    "no file": (lambda src: (src / "model.safetensors").unlink(), "src: expected model.safetensors or .*, got neither"),
    "missing tensor": (drop("transformer.h.0.ln_1.bias"), "expected transformer.h.0.ln_1.bias in a model of 2 layers"),
    "integers": (convert(LN, "i4"), f"expected {LN} of F16, BF16, F32, F64, got I32"),
    "too many blocks": (
        lambda src: edit_config(src, n_layer=1),
        r"small: expected blocks below 1 by the config, got transformer\.h\.1\.",
    ),
    "missing shard": (
        shard(lambda src, _: (src / "model-1.safetensors").unlink()),
        "expected a shard that model.safetensors.index.json lists, got no file",
    ),
    "cut shard": (
        shard(lambda src, _: os.truncate(src / "model-1.safetensors", 5000)),
        "model-1.safetensors: expected .* bytes, got a damaged file of 5,000",
    ),
    "tensor not in its shard": (
        shard(lambda src, names: names.update(other="model-0.safetensors")),
        "model-0.safetensors: expected other, which model.safetensors.index.json lists",
    ),
    "tensor not in the index": (shard(lambda src, names: names.pop(LN)), f"index.json lists, got {LN} as well"),
    "shard elsewhere": (
        shard(lambda src, names: names.update(other="../model-0.safetensors")),
        "expected a weight_map from tensors to file names",
    ),
    "empty index": (shard(lambda src, names: names.clear()), "src: expected tensors in .*, got none"),
    "config": (lambda src: (src / "config.json").write_text("{"), "source_config: expected JSON, got"),
    "no config": (lambda src: (src / "config.json").unlink(), "source_config: expected a config, got no file"),
    "state of nothing": (
        save_states({"state.nothing.exp_avg": (2,)}),
        "optimizer.safetensors: expected state.PARAMETER.KEY, .*, got state.nothing.exp_avg",
    ),
    "unknown optimizer": (save_settings({"class": "Lion", "param_groups": []}), "expected Adam, AdamW, SGD, got Lion"),
    "damaged settings": (
        save_settings({"class": "SGD"}),
        "optimizer: expected the settings that save_optimizer writes",
    ),
    "settings without a learning rate": (
        save_settings({"class": "AdamW", "param_groups": [{"params": [LN], "weight_decay": 0.1, "eps": 1e-8}]}),
        "optimizer: expected the settings that save_optimizer writes",
    ),
    "unknown state": (save_states({f"state.{LN}.prodigy": (24,)}), f"expected state.* got state.{LN}.prodigy"),
    "shape of a state": (save_states({f"state.{LN}.exp_avg": (23,)}), r"of shape \(24,\), got \(23,\)"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoints(small: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(small)
    before = list_files(small.parent)
    with pytest.raises(ValueError, match=message):
        growth.grow_checkpoint(small, small.parent / "large", target_config=LARGER)
    assert list_files(small.parent) == before
    assert [path.name for path in small.parent.iterdir()] == ["small"]


REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "narrower": ({"n_embd": 12}, "target_config: expected n_embd of at least 24, got 12"),
    "shallower": ({"n_layer": 1}, "target_config: expected n_layer of at least 2, got 1"),
    "misspelled": ({"n_emdb": 48}, "target_config: expected 'n_embd', or another key of the config, got 'n_emdb'"),
    "misspelled in a whole config": (
        {"model_type": "gpt2", "n_layers": 4},
        "target_config: expected 'n_layer', or another key of the config, got 'n_layers'",
    ),
    "another architecture's key": (
        {"width": 48},
        "target_config: expected keys of the config or of sizes (n_embd, n_head, n_inner, n_layer), got 'width'",
    ),
    "vocabulary": ({"vocab_size": 64}, "target_config: expected vocab_size 50 as the source's, got 64"),
    "activation": (
        {"activation_function": "relu"},
        "target_config: expected activation_function 'gelu_new' as the source's, got 'relu'",
    ),
    "no number": ({"n_embd": "48"}, "target_config: expected an integer of at least 1 for 'n_embd', got '48'"),
    "no heads": ({"n_head": 0}, "target_config: expected an integer of at least 1 for 'n_head', got 0"),
    "heads": ({"n_head": 7}, "target_config: expected a width that 7 heads divide, got 24"),
    "attention": (
        {"scale_attn_by_inverse_layer_idx": True},
        "target_config: expected scale_attn_by_inverse_layer_idx False as the source's, got True",
    ),
    "cross attention": (
        {"add_cross_attention": True},
        "target_config: expected add_cross_attention False as the source's, got True",
    ),
    "class": (
        {"architectures": ["GPT2ForSequenceClassification"]},
        "target_config: expected architectures ['GPT2LMHeadModel'] as the source's, "
        "got ['GPT2ForSequenceClassification']",
    ),
    "eps": (
        {"n_embd": 32, "n_head": 8, "layer_norm_epsilon": 0.3},
        "target_config: expected layer_norm_epsilon 0.0075, which keeps the function, got 0.3",
    ),
    "unknown in a whole config": (
        {"model_type": "gpt2", "sliding_window": 8},
        "target_config: expected sliding_window None as the source's, got 8",
    ),
    "architecture": ({"model_type": "llama"}, "target_config: expected model_type 'gpt2' as the source's, got 'llama'"),
}


@pytest.mark.parametrize(("target", "message"), REQUESTS.values(), ids=REQUESTS)
def test_requests_that_cannot_be(small: Path, target: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        growth.grow_checkpoint(small, small.parent / "large", target_config=target)
    with pytest.raises(growth.Inexact, match="exact"):
        growth.grow_checkpoint(small, small.parent / "large", target_config=LARGER, mode="exact")
    assert [path.name for path in small.parent.iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("name", "target", "text"),
    [
        ("ViTModel", {"qkv_bias": False}, "target_config: expected qkv_bias True as the source's, got False"),
        ("ViTModel", {"pooler_act": "relu"}, "target_config: expected pooler_act 'tanh' as the source's, got 'relu'"),
        ("BertModel", {"is_decoder": True}, "target_config: expected is_decoder False as the source's, got True"),
        ("LlamaModel", {"attention_bias": True}, "target_config: expected attention_bias False .*, got True"),
        ("LlamaModel", {"mlp_bias": True}, "target_config: expected mlp_bias False as the source's, got True"),
        ("LlamaModel", {"intermediate_size": None}, "config: expected 'intermediate_size', got none"),
        ("LlamaModel", {"num_attention_heads": 8}, "6 heads on 6 keys -> 8 on 6; exact would be 6 keys, 1 or more"),
    ],
)
def test_settings_that_no_tensor_shows(tmp_path: Path, name: str, target: dict[str, Any], text: str) -> None:
    cls = getattr(transformers, name)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 6, "intermediate_size": 40}
    cls(cls.config_class(**sizes, **({"image_size": 16} if "ViT" in name else {"vocab_size": 50}))).save_pretrained(
        tmp_path / "small"
    )
    with pytest.raises(ValueError, match=text):
        growth.grow_checkpoint(tmp_path / "small", tmp_path / "large", target_config=target)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_whole_config_of_the_larger_model(small: Path, tmp_path: Path) -> None:
    config = build(**LARGER).config
    for number, whole in enumerate((config.to_dict(), config.to_json_file(tmp_path / "c.json") or tmp_path / "c.json")):
        report = growth.grow_checkpoint(small, tmp_path / f"{number}", target_config=whole, verify=True)
        assert report.config["architectures"] == ["GPT2LMHeadModel"] and report.config["dtype"] == "float32"


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


def test_verification_refuses_another_function(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = growth.Rule.apply
    monkeypatch.setattr(growth.Rule, "apply", lambda self, *arguments: apply(self, *arguments) * 1.01)
    with pytest.raises(ValueError, match="verify: expected outputs within 1e-05 of the largest, got a difference of"):
        growth.grow_checkpoint(small, small.parent / "large", target_config=LARGER, verify=True)
    assert [path.name for path in small.parent.iterdir()] == ["small"]


def test_optimizer_files(tmp_path: Path) -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    growth.save_optimizer(model, optimizer, tmp_path)
    with pytest.raises(ValueError, match="optimizer: expected AdamW as was saved, got SGD"):
        growth.load_optimizer(model, torch.optim.SGD(model.parameters()), tmp_path)
    (tmp_path / "damaged").mkdir()
    safetensors.numpy.save_file({}, tmp_path / "damaged" / "optimizer.safetensors", {"optimizer": '{"class": "AdamW"}'})
    with pytest.raises(ValueError, match="directory: expected the settings that save_optimizer writes, got damaged"):
        growth.load_optimizer(model, optimizer, tmp_path / "damaged")
    other = torch.nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"model: expected the parameter transformer\.h\.0\.attn\.c_attn\.bias, got none"
    ):
        growth.load_optimizer(other, torch.optim.AdamW(other.parameters()), tmp_path)
    with pytest.raises(ValueError, match="optimizer: expected parameters of the model alone, got others"):
        growth.save_optimizer(other, optimizer, tmp_path)


def test_optimizer_files_that_do_not_fit(tmp_path: Path) -> None:
    model, wider = torch.nn.Linear(2, 2), torch.nn.Linear(3, 2)
    adam, other = (torch.optim.AdamW(m.parameters(), lr=lr) for m, lr in ((model, 0.5), (wider, 0.25)))
    model(torch.ones(1, 2)).sum().backward()
    adam.step()
    growth.save_optimizer(model, adam, tmp_path)

    def check(text: str) -> None:
        groups = [*other.param_groups]
        with pytest.raises(ValueError, match=text):
            growth.load_optimizer(wider, other, tmp_path)
        assert other.param_groups[0] is groups[0] and other.param_groups[0]["lr"] == 0.25 and not other.state

    check(r"model: expected exp_avg\w* of weight of shape \(2, 3\), got \(2, 2\)")
    file = tmp_path / "optimizer.safetensors"
    tensors = safetensors.numpy.load_file(file)
    whole = file.read_bytes()
    group = {**{k: v for k, v in adam.param_groups[0].items() if k != "params"}, "params": ["bias"]}
    settings = json.dumps({"class": "AdamW", "param_groups": [group]})
    safetensors.numpy.save_file(tensors, file, {"optimizer": settings})
    check("directory: expected states of parameters in groups, got one of weight")
    file.write_bytes(whole[:-4])
    check("directory: expected a safetensors file, got a damaged one")
    file.unlink()
    (tmp_path / "optimizer.safetensors.index.json").write_text("{}")
    check("directory: expected an index with a weight_map, got a damaged one")


def test_optimizers_of_wrapped_models(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    adam = torch.optim.AdamW(model.named_parameters(), lr=0.5)
    growth.save_optimizer(torch.nn.DataParallel(model), adam, tmp_path)
    with safe_open(tmp_path / "optimizer.safetensors", "np") as file:
        groups = json.loads(file.metadata()["optimizer"])["param_groups"]
    assert groups[0]["params"] == groups[0]["param_names"] == ["0.weight", "0.bias"]
    other = torch.optim.AdamW(model.parameters())
    growth.load_optimizer(torch.nn.DataParallel(model), other, tmp_path)
    assert other.param_groups[0]["lr"] == 0.5


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


# ---- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main, ["grow", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command(small: Path, tmp_path: Path) -> None:
    target, large = tmp_path / "target.json", tmp_path / "large"
    target.write_text(json.dumps(LARGER))
    printed = run(small, large, "--target", target, "--dry-run")
    assert "transformer.h.2.mlp.c_proj.weight" in printed and "nothing was written" in printed
    assert not large.exists()
    result = json.loads(run(small, large, "--target", target, "--verify", "--json"))
    assert result["difference"] < 1e-6 and result["config"]["n_embd"] == 36
    assert result["files"] == ["model.safetensors"]
    assert {entry["name"]: entry["to"] for entry in result["parameters"]}["transformer.wte.weight"] == [50, 36]
    failed = CliRunner().invoke(main, ["grow", str(small), str(large), "--target", str(target)])
    assert failed.exit_code == 1 and "dst: expected a new directory, or overwrite" in failed.stderr
    assert "in 1 files; outputs differ by" in run(small, large, "--target", target, "--overwrite", "--verify")


# ---- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import json, re, sys
from pycodesign.growth import grow_checkpoint

def read_peak():  # ru_maxrss begins with what the parent process had
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", status.read())[1])

src, dst, target = sys.argv[1:]
before = read_peak()
report = grow_checkpoint(src, dst, target_config=json.loads(target), max_shard_bytes=700_000_000)
print(before, read_peak(), report.bytes_read, report.bytes_written)
"""


def write_random(src: Path, config: dict[str, Any], shard_bytes: int) -> tuple[int, int]:
    """Write a GPT-2 of random weights, one tensor in memory at a time; return its bytes, and the largest tensor's."""
    D, L, V, P = (config[key] for key in ("n_embd", "n_layer", "vocab_size", "n_positions"))
    block = {"ln_1.weight": (D,), "ln_1.bias": (D,), "ln_2.weight": (D,), "ln_2.bias": (D,)}
    block |= {"attn.c_attn.weight": (D, 3 * D), "attn.c_attn.bias": (3 * D,), "attn.c_proj.weight": (D, D)}
    block |= {"attn.c_proj.bias": (D,), "mlp.c_fc.weight": (D, 4 * D), "mlp.c_fc.bias": (4 * D,)}
    block |= {"mlp.c_proj.weight": (4 * D, D), "mlp.c_proj.bias": (D,)}
    shapes = {"wte.weight": (V, D), "wpe.weight": (P, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
    shapes |= {f"h.{i}.{name}": shape for i in range(L) for name, shape in block.items()}
    tensors = [shards.Tensor(f"transformer.{name}", src, "F32", shape, 0) for name, shape in shapes.items()]
    src.mkdir()
    (src / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    with shards.Writer(src, "model", tensors, {"format": "pt"}, shard_bytes) as writer:
        for tensor in tensors:
            writer.write(tensor.name, rng.standard_normal(tensor.shape, np.float32))
    sizes = [tensor.nbytes for tensor in tensors]
    return sum(sizes), max(sizes)


def measure(src: Path, dst: Path, target: dict[str, Any]) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(src), str(dst), json.dumps(target)],
        cwd=sys.prefix,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


CONFIG = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "layer_norm_epsilon": 1e-5, "n_positions": 256}


def test_memory_holds_one_tensor_and_its_result(tmp_path: Path) -> None:
    config = CONFIG | {"n_embd": 512, "n_layer": 4, "n_head": 8, "vocab_size": 8192}
    total, largest = write_random(tmp_path / "small", config, 20_000_000)
    target = {"n_embd": 768, "n_head": 12, "n_layer": 5}
    before, peak, read, written = measure(tmp_path / "small", tmp_path / "large", target)
    assert read == total and written > 2 * total
    slack = 40_000_000  # the noise is made in blocks
    assert peak - before < largest + largest * 768 / 512 + slack, (before, peak, largest)


@pytest.mark.slow
def test_two_gigabytes_grow_in_little_memory(tmp_path: Path) -> None:
    config = CONFIG | {"n_embd": 1280, "n_layer": 23, "n_head": 20, "vocab_size": 50257, "n_positions": 1024}
    total, _ = write_random(tmp_path / "small", config, 500_000_000)
    assert total > 2_000_000_000 and len(list((tmp_path / "small").glob("*.safetensors"))) > 3
    target = {"n_embd": 1600, "n_head": 25, "n_layer": 24}
    _, peak, read, written = measure(tmp_path / "small", tmp_path / "large", target)
    print(f"{read:,} bytes -> {written:,} bytes, at most {peak:,} resident")
    assert read == total and written > read
    assert peak <= 1_200_000_000
