"""Options and calls that are wrong: each mistake has its exception and its message."""

from __future__ import annotations

import numpy as np
import pytest
import sharing_models
import torch
import torch.nn.functional as F
from sharing_models import VOCABULARY, make_bert, make_stack
from torch import nn

from pycodesign import ops, sharing
from pycodesign.sharing.components import TaskSpec

backbone, texts = sharing_models.backbone, sharing_models.texts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, r"density: expected a share in \(0, 1\], got 0"),
        ({"density": 1.5}, r"density: expected a share in \(0, 1\], got 1.5"),
        ({"rank": 0}, "rank: expected at least 1, got 0"),
        ({"positions": "last"}, "positions: expected one of mean, first, all, got 'last'"),
        ({"positions": "all"}, "positions: expected 'all' for labels of tokens and no others"),
        ({"delta": "full"}, "delta: expected one of sparse, rows, low_rank, dense, none, got 'full'"),
        ({"delta": {"gate": "sparse"}}, "delta: expected projections among query"),
        ({"aggregator": "mean"}, "aggregator: expected one of attention, concat, got 'mean'"),
        ({"layers": [3]}, "layers: expected numbers from 0 to 2, got 3"),
    ],
)
def test_wrong_options(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        sharing.MultiTask(backbone, {"tone": 2}, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": [True]}, TypeError, "layers: expected a sequence of integers, got"),
        ({"layers": [1.0]}, TypeError, "layers: expected a sequence of integers, got"),
        ({"layers": 3}, TypeError, "layers: expected a sequence of integers, got 3"),
        ({"delta": None}, TypeError, "delta: expected a kind, or kinds by projection, got None"),
        ({"density": 5}, ValueError, "density: expected a share in"),
        ({"dropout": float("nan")}, ValueError, "dropout: expected a share in"),
        ({"tasks": ["a"]}, TypeError, "tasks: expected labels by name, got list"),
    ],
)
def test_options_that_are_wrong(options, error, message):
    """Those of the constructor are checked before any task is added."""
    names = options.pop("tasks", {})
    with pytest.raises(error, match=message):
        sharing.MultiTask(make_stack(), names, **options)


@pytest.mark.parametrize("name", ["type", "train", "keys", "pop", "forward", "half", "cpu", "training"])
def test_names_that_torch_has_taken(name, tmp_path):
    tasks = sharing.MultiTask(make_stack(), {"tone": 2}, delta="dense")
    message = f"name: expected one that torch.nn.ModuleDict takes, got '{name}'"
    with pytest.raises(ValueError, match=message):
        tasks.add_task(name, 2)
    (path,) = tasks.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        tasks.load_task(path, name)


def test_wrong_calls(backbone, texts, tmp_path):
    tasks = sharing.MultiTask(backbone, {"tone": 2})
    ids = texts["input_ids"]

    def serve(**others):
        engine = sharing.MultiTask(backbone, {"tone": 2}, delta="none").build_engine()
        engine({"input_ids": ids, **others})

    for call, error, message in (
        (lambda: tasks.add_task("tone", 2), ValueError, "name: expected a new name, got 'tone'"),
        (lambda: tasks.add_task("a/b", 2), ValueError, "name: expected letters, digits, _ and -"),
        (lambda: tasks.add_task("other", "many"), TypeError, "labels: expected a number of classes"),
        (lambda: tasks.add_task("other", 0), ValueError, "labels: expected at least 1, got 0"),
        (lambda: tasks.add_task("other", 2, depth=3), TypeError, "depth: expected one of delta, density"),
        (lambda: tasks(ids, tasks=["topic"]), KeyError, "name: expected one of tone, got 'topic'"),
        (lambda: tasks(torch.zeros(1, 21, dtype=torch.long)), ValueError, "inputs: expected at most 20 tokens, got 21"),
        (lambda: tasks(ids + VOCABULARY), ValueError, "input_ids: expected numbers from 0 to 49"),
        (lambda: serve(token_type_ids=ids + 1), ValueError, "token_type_ids: expected numbers from 0 to 1"),
        (lambda: serve(position_ids=ids - 1), ValueError, "position_ids: expected numbers from 0 to 19, got -1"),
        (lambda: serve(position_ids=ids * 0.5), ValueError, "position_ids: expected int32 or int64, got torch.float32"),
        (lambda: tasks(texts, ids > 0), ValueError, "attention_mask: expected one, got one among"),
        (lambda: tasks(ids, torch.zeros(3, 9)), ValueError, "attention_mask: expected at least one token"),
        (lambda: tasks(ids, torch.ones(3, 8)), ValueError, r"attention_mask: expected \(3, 9\), got \(3, 8\)"),
        (lambda: tasks(ids[:, :0]), ValueError, "inputs: expected at least one text and one token"),
        (lambda: tasks.save_pretrained(tmp_path), ValueError, "tone: expected a mask chosen by select_mask"),
        (lambda: tasks.build_engine(), ValueError, "tone: expected a mask chosen by select_mask"),
        (lambda: tasks.select_mask("tone", [], F.cross_entropy), ValueError, "batches: expected at least one"),
        (lambda: tasks.select_mask("tone", [(texts, 0)], lambda y, _: 0 * y.sum()), ValueError, "not all zero"),
        (lambda: sharing.MultiTask(nn.Linear(2, 2), {}), TypeError, "backbone: expected a bare BERT"),
        (lambda: TaskSpec(2, kind="ranking"), ValueError, "kind: expected one of classification"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert not list(tmp_path.iterdir())


def test_calls_that_are_wrong():
    tasks = sharing.MultiTask(make_bert(), {"tone": 2, "low": 2, "plain": 2, "names": ("tokens", 2)}, delta="none")
    tasks.add_task("new", 2, delta="sparse")
    tasks.add_task("up", 2, delta={"up": "dense"})
    ids, labels = torch.arange(10).view(2, 5), torch.tensor([0, 1])
    features = tasks.read("plain", ids)
    engine = tasks.build_engine(["plain"])

    def select(*batches, loss=F.cross_entropy):
        return lambda: tasks.select_mask("new", batches, loss)

    for call, error, message in (
        (select((ids, labels, 0)), TypeError, "batches: expected pairs of inputs and labels, got tuple"),
        (select(ids), TypeError, "batches: expected pairs of inputs and labels, got Tensor"),
        (
            select((ids, labels), loss=lambda y, _: y),
            ValueError,
            "loss: expected one number with a gradient, got float",
        ),
        (select((ids, labels), loss=lambda y, _: y.sum().detach()), ValueError, "loss: expected one number .*detached"),
        (select((ids, labels), loss=lambda y, _: y.sum().item()), ValueError, "loss: expected one .* got float"),
        (select((features, labels)), ValueError, "features: expected what 0.query reads, got none"),
        (lambda: tasks.run("up", features), ValueError, "features: expected what 0.up reads, got none"),
        (lambda: tasks.run("names", features), ValueError, "features: expected 3 outputs at positions 'all', got"),
        (lambda: engine.add_task("x", "y"), TypeError, "task: expected one that get_task returns, got str"),
        (lambda: tasks.insert_task("x", "y"), TypeError, "task: expected one that get_task returns, got str"),
        (lambda: tasks.build_engine(["plain", "new"]), ValueError, "new: expected a mask chosen by select_mask"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_wrong_kinds_of_arguments(tmp_path):
    tasks = sharing.MultiTask(make_bert(), {"tone": 2}, delta="none")
    engine, ids = tasks.build_engine(), torch.arange(10).view(2, 5)
    for call in (tasks, engine):
        for arguments, options, message in (
            ((ids.tolist(),), {}, "inputs: expected a tensor, or tensors by name, got list"),
            ((None,), {}, "inputs: expected a tensor, or tensors by name, got NoneType"),
            (({"input_ids": ids.tolist()},), {}, "input_ids: expected a tensor, got list"),
            (({"input_ids": ids, "token_type_ids": 0},), {}, "token_type_ids: expected a tensor, got int"),
            ((ids, [[1] * 5] * 2), {}, "attention_mask: expected a tensor, got list"),
            ((ids,), {"tasks": "tone"}, "tasks: expected a sequence of names, got 'tone'"),
            ((ids,), {"tasks": 3}, "tasks: expected a sequence of names, got 3"),
        ):
            with pytest.raises(TypeError, match=message):
                call(*arguments, **options)
    for call in (lambda: tasks.build_engine("tone"), lambda: tasks.save_pretrained(tmp_path, "tone")):
        with pytest.raises(TypeError, match="tasks: expected a sequence of names, got 'tone'"):
            call()


def test_bools_are_no_indices():
    tasks = sharing.MultiTask(make_bert(), {"tone": 2})
    cache = tasks.cache("tone", [torch.arange(10).view(2, 5)])
    packed = ops.prepack_deltas([np.eye(2, dtype=np.float32)] * 2)
    x = np.ones((2, 2), np.float32)
    for wrong in ([True, False], [np.True_], torch.tensor([True, False]), np.array([False, True])):
        for call, name in (
            (lambda own: ops.delta_linear(x, None, packed, positions=own), "positions"),
            (lambda own: ops.delta_linear(x, None, packed, tasks=own), "tasks"),
            (packed.select, "tasks"),
            (cache.__getitem__, "indices"),
        ):
            with pytest.raises(TypeError, match=f"{name}: expected a sequence of integers, got"):
                call(wrong)
