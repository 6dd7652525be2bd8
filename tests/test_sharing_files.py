"""Files of tasks: written all or none, bound to a backbone, of float32; damaged ones are refused."""

from __future__ import annotations

import copy
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import sharing_models
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sharing_models import SIZES, VOCABULARY, change, make_bert, make_stack, train
from sharing_models import OwnWithPositions as Own
from torch import nn
from transformers import BertConfig, BertModel

from pycodesign import sharing
from pycodesign.sharing.files import compute_digest, write_files

backbone, texts = sharing_models.backbone, sharing_models.texts


@pytest.mark.parametrize(
    "name",
    ["embedding.weight", "positions", "scale", "encoder.layers.1.norm2.weight", "encoder.layers.1.activation.weight"],
)
def test_files_are_bound_to_all_of_a_backbone(tmp_path, name):
    own = Own()
    for layer in own.encoder.layers:
        layer.activation = nn.PReLU()
    tasks = sharing.MultiTask(own, {"tone": 2}, delta="low_rank")
    tasks.save_pretrained(tmp_path)
    other = copy.deepcopy(tasks.backbone)
    sharing.MultiTask.from_pretrained(other, tmp_path)
    state = dict(other.named_parameters()) | dict(other.named_buffers())
    state[name].data.add_(1)
    with pytest.raises(ValueError, match="expected a task of the backbone"):
        sharing.MultiTask.from_pretrained(other, tmp_path)


@pytest.mark.parametrize(
    ("module", "setting"),
    [("embeddings.LayerNorm", "eps"), ("encoder.layer.1.output.LayerNorm", "eps"), ("embeddings", "padding_idx")],
)
def test_files_are_bound_to_the_backbone_of_now(backbone, tmp_path, module, setting):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta="low_rank")
    tasks.save_pretrained(tmp_path)
    other = copy.deepcopy(backbone)
    setattr(other.get_submodule(module), setting, 0.1)
    with pytest.raises(ValueError, match="expected a task of the backbone"):
        sharing.MultiTask.from_pretrained(other, tmp_path)
    backbone.load_state_dict({key: 2 * value for key, value in backbone.state_dict().items()})
    with pytest.raises(ValueError, match="expected a task of the backbone"):
        tasks.load_task(tmp_path / "tone.safetensors", "again")


def test_files_of_other_backbones(backbone, texts, tmp_path):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta="low_rank")
    (path,) = tasks.save_pretrained(tmp_path)
    other = BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=20, **SIZES))
    with pytest.raises(ValueError, match="expected a task of the backbone"):
        sharing.MultiTask.from_pretrained(other, tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="expected a safetensors file, got a damaged one"):
        sharing.MultiTask.from_pretrained(backbone, tmp_path)
    with pytest.raises(ValueError, match="expected a task's file, got none"):
        tasks.load_task(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="expected tasks' files in"):
        sharing.MultiTask.from_pretrained(backbone, tmp_path / "none")


def test_numbers_of_numpy(tmp_path):
    tasks = sharing.MultiTask(make_bert(), {"tone": np.int64(2)}, density=np.float32(0.25), delta="none")
    tasks.add_task("names", ("tokens", np.int32(3)), layers=np.arange(2), rank=np.int64(2), delta="low_rank")
    tasks.save_pretrained(tmp_path)
    again = sharing.MultiTask.from_pretrained(tasks.backbone, tmp_path)
    assert all(again.get_task(name).spec == tasks.get_task(name).spec for name in tasks.tasks)


def test_files_under_another_default_dtype(tmp_path):
    """Tasks, and a search, too, compute in float32 on a backbone of float32."""
    delta = {"query": "sparse", "up": "rows", "down": "low_rank", "value": "dense"}
    tasks = sharing.MultiTask(make_bert(), {"tone": 2}, delta=delta, density=0.2)
    tasks.add_task("wide", 2, delta="none", aggregator="concat")
    batches = [(torch.arange(10).view(2, 5), torch.tensor([0, 1]))]
    tasks.select_mask("tone", batches, F.cross_entropy, scope="matrix")
    change(tasks).save_pretrained(tmp_path)
    expected = tasks(batches[0][0])
    torch.set_default_dtype(torch.float64)
    try:
        again = sharing.MultiTask.from_pretrained(tasks.backbone, tmp_path).eval()
        for name, own in again(batches[0][0]).items():
            assert torch.equal(own, expected[name])
        torch.testing.assert_close(again.build_engine()(batches[0][0]), expected, atol=2e-6, rtol=1e-5)
        costs = sharing.measure_costs(again.encoder, tokens=5, rounds=1)
        again.search("tone", batches, F.cross_entropy, costs=costs, target=100.0, epochs=1)
        assert {parameter.dtype for parameter in again.task_parameters("tone")} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_files_of_converted_tasks(dtype, tmp_path):
    tasks = change(sharing.MultiTask(make_bert(), {"tone": 2}, delta="low_rank", rank=1))
    tasks.tasks.to(dtype)
    tasks.save_pretrained(tmp_path)
    again = sharing.MultiTask.from_pretrained(tasks.backbone, tmp_path)
    sharing.export_adapter(tasks, "tone", tmp_path / "adapter")
    sharing.import_adapter(again, tmp_path / "adapter", "adapter")
    for name in again.tasks:
        for key, value in again.get_task(name).state_dict().items():
            assert torch.equal(value, tasks.get_task("tone").state_dict()[key].float())


def test_save_writes_all_tasks_or_none(tmp_path):
    stack = make_stack()
    tasks = sharing.MultiTask(stack, {"first": 2}, delta="dense")
    tasks.add_task("second", 2, delta="sparse")
    with pytest.raises(ValueError, match="second: expected a mask"):
        tasks.save_pretrained(tmp_path)
    tasks = sharing.MultiTask(stack, {"first": 2, "second": 2}, delta="dense")
    with torch.no_grad():
        tasks.get_task("second").head.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"second: expected finite values, got others in head\.bias"):
        tasks.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_files_are_written_all_or_none(tmp_path):
    tasks = sharing.MultiTask(make_bert(), {"a": 2, "b": 2}, delta={"query": "low_rank"})
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match=r"expected to write the file .*b\.safetensors, got a folder"):
        tasks.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]
    (tmp_path / "adapter" / "adapter_config.json").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        sharing.export_adapter(tasks, "a", tmp_path / "adapter")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["adapter_config.json"]


@pytest.mark.parametrize("links", [True, False])
def test_files_that_were_replaced_come_back(tmp_path, monkeypatch, links):
    paths = {name: tmp_path / name for name in ("new", "old", "fixed")}
    for name in ("old", "fixed"):
        paths[name].write_bytes(b"before")
    paths["link"] = tmp_path / "link"
    paths["link"].symlink_to("nowhere")
    replace = os.replace

    def refuse(source, target):
        if Path(target) == paths["fixed"]:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        replace(source, target)

    def refuse_link(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "replace", refuse)
    if not links:
        monkeypatch.setattr(os, "link", refuse_link)
    with pytest.raises(PermissionError):
        write_files({paths[name]: b"after" for name in ("new", "link", "old", "fixed")})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fixed", "link", "old"]
    assert paths["old"].read_bytes() == paths["fixed"].read_bytes() == b"before"
    assert os.readlink(paths["link"]) == "nowhere"
    write_files({paths[name]: b"after" for name in ("new", "link", "old")})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fixed", "link", "new", "old"]
    assert paths["old"].read_bytes() == paths["link"].read_bytes() == b"after"


def test_a_bit_that_flipped(tmp_path):
    tasks = change(sharing.MultiTask(make_bert(), {"tone": 2}, delta="low_rank"))
    (path,) = tasks.save_pretrained(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected the values that were written, got others: a damaged file"):
        tasks.load_task(path, "again")


def damage(path, change_tensors=None, change_metadata=None):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if change_tensors:
        change_tensors(tensors)
    if change_metadata:
        change_metadata(metadata)
    metadata["digest"] = compute_digest(tensors, metadata["spec"])
    save_file(tensors, path, metadata)


def set_item(key, value):
    return lambda mapping: mapping.__setitem__(key, value)


def set_spec(**fields):
    def change(metadata):
        metadata["spec"] = json.dumps({**json.loads(metadata["spec"]), **fields})

    return change


@pytest.mark.parametrize(
    ("change_tensors", "change_metadata", "message"),
    [
        (
            set_item("head.weight", torch.zeros(3, 32)),
            None,
            r"head.weight: expected float32 \(2, 32\), got float32 \(3, 32\)",
        ),
        (
            set_item("head.weight", torch.zeros(10**9, 0)),
            set_spec(labels=10**9),
            r"head.weight: expected float32 \(1000000000, 32\), got float32 \(1000000000, 0\)",
        ),
        (set_item("head.weight", torch.full((2, 32), torch.nan)), None, "head.weight: expected finite values"),
        (set_item("head.bias", torch.zeros(2, dtype=torch.float16)), None, "head.bias: expected float32"),
        (set_item("other", torch.zeros(2)), None, "other: expected no such tensor"),
        (lambda tensors: tensors.pop("aggregator.query"), None, "aggregator.query: expected float32"),
        (
            set_item("deltas.0_value.index", torch.tensor([5, 4096])),
            None,
            "0.value: index: expected indices from 0 to 1023",
        ),
        (set_item("deltas.0_value.index", torch.tensor([-1, 6])), None, "expected indices from 0 to 1023, got -1"),
        (set_item("deltas.0_value.index", torch.tensor([6, 6])), None, "expected ascending indices"),
        (set_item("deltas.0_value.index", torch.zeros(0, dtype=torch.long)), None, "got none: an empty delta"),
        (set_item("deltas.0_value.index", torch.zeros(3)), None, r"index: expected int64 \(n,\), got float32"),
        (set_item("deltas.0_value.values", torch.zeros(1)), None, "0.value: values: expected float32"),
        (None, set_item("backbone", "0" * 64), "expected a task of the backbone"),
        (None, set_item("format", "other"), "expected format 'pycodesign.sharing'"),
        (None, set_item("spec", "{"), "spec: expected JSON"),
        (None, set_item("spec", "{}"), "spec: expected the fields"),
        (None, set_item("spec", "[" * 10**5), "spec: expected JSON"),
        (None, set_spec(density=True), r"density: expected a share in \(0, 1\], got True"),
        (None, set_spec(labels=10**9), r"head.weight: expected float32 \(1000000000, 32\), got float32 \(2, 32\)"),
        (None, set_spec(labels=10**30), "head.weight: expected float32"),
        (None, set_spec(deltas={"9.value": "sparse"}), "spec: expected deltas of projections in 3 layers"),
        (None, set_spec(deltas={"0.value": "other"}), "spec: expected kinds of deltas"),
        (None, set_spec(density=0), r"density: expected a share in \(0, 1\], got 0"),
        (None, set_spec(labels=-1), "labels: expected at least 1"),
    ],
)
def test_damaged_files(backbone, texts, tmp_path, change_tensors, change_metadata, message):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta={"value": "sparse"})
    train(tasks, texts)
    (path,) = tasks.save_pretrained(tmp_path)
    damage(path, change_tensors, change_metadata)
    with pytest.raises(ValueError, match=message):
        tasks.load_task(path, "again")
    assert list(tasks.tasks) == ["tone"]


def test_damaged_files_of_other_tasks(backbone, tmp_path):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta={"value": "low_rank"}, rank=2, aggregator="concat")
    (path,) = tasks.save_pretrained(tmp_path)
    for change_tensors, change_metadata, message in (
        (None, set_spec(rank=3), r"0.value: up: expected float32 \(32, 3\), got float32 \(32, 2\)"),
        (None, set_spec(rank=None), r"0.value: up: expected float32 \(32, 1\), got float32 \(32, 2\)"),
        (set_item("deltas.0_value.up", torch.zeros(0, 10**9)), set_spec(rank=10**9), "0.value: up: expected float32"),
        (lambda tensors: tensors["aggregator.norm.running_var"].neg_(), None, "expected variances of at least 0"),
    ):
        tasks.save_pretrained(tmp_path)
        damage(path, change_tensors, change_metadata)
        with pytest.raises(ValueError, match=message):
            tasks.load_task(path, "again")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.bool, torch.bfloat16])
def test_variances_of_other_dtypes(dtype, tmp_path):
    tasks = sharing.MultiTask(make_stack(), {"tone": 2}, delta="none", aggregator="concat")
    (path,) = tasks.save_pretrained(tmp_path)
    tensors, key = load_file(path), "aggregator.norm.running_var"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors[key] = tensors[key].to(dtype)
    save_file(tensors, path, {**metadata, "digest": compute_digest(tensors, metadata["spec"])})
    with pytest.raises(ValueError, match=f"{key}: expected float32"):
        tasks.load_task(path, "again")
