"""Tasks belong to one backbone: another will do if it computes the same, and is refused if it does not."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
import torch.nn.functional as F
from sharing_models import Own, change, make_bert, make_stack
from torch import nn

from pycodesign import sharing


def scale(x, by):
    return by * F.relu(x)


class Scaled(nn.Module):
    """With a plain attribute."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x):
        return scale(x, self.by)


class ScaledOwn(Own):
    """With a plain attribute that `embed` reads."""

    by = 1.0

    def embed(self, input_ids):
        return self.by * super().embed(input_ids)


def set_norms(stack: nn.TransformerEncoder, make) -> nn.TransformerEncoder:
    for layer in stack.layers:
        layer.norm1 = make()
    return stack


NORMS = functools.partial(nn.LayerNorm, 16, bias=False), functools.partial(nn.RMSNorm, 16, eps=1e-5)


def set_scale(by: float) -> ScaledOwn:
    own = ScaledOwn(make_stack())
    own.by = by
    return own


def set_embedding(*after: nn.Module) -> Own:
    own = Own(make_stack())
    own.embedding = nn.Sequential(own.embedding, *after)
    return own


@pytest.mark.parametrize(
    "backbones",
    [
        [lambda by=by: make_stack(activation=functools.partial(scale, by=by)) for by in (1.0, 1.001)],
        [lambda by=by: make_stack(activation=functools.partial(F.gelu, approximate=by)) for by in ("none", "tanh")],
        [lambda by=by: make_stack(activation=functools.partial(F.leaky_relu, negative_slope=by)) for by in (0.1, 0.2)],
        [lambda by=by: make_stack(activation=lambda x: F.hardtanh(x, -by, by)) for by in (10.0, 20.0)],
        [lambda by=by: make_stack(activation=Scaled(by)) for by in (1.0, 1.001)],
        [lambda by=by: Own(set_norms(make_stack(), by)) for by in NORMS],
        [lambda by=by: set_scale(by) for by in (1.0, 2.0)],
        [lambda by=by: set_embedding(by()) for by in NORMS],
        [lambda by=by: set_embedding(nn.GELU(by)) for by in ("none", "tanh")],
    ],
    ids=["function", "gelu", "leaky_relu", "lambda", "module", "norm", "embed", "embed norm", "embed gelu"],
)
def test_backbones_that_no_name_tells_apart(backbones, tmp_path):
    one, other = (make() for make in backbones)
    tasks = sharing.MultiTask(one, {"tone": 2}, delta="low_rank")
    (path,) = tasks.save_pretrained(tmp_path)
    assert sharing.MultiTask(copy.deepcopy(one), {}).hash == sharing.MultiTask(backbones[0](), {}).hash == tasks.hash
    with pytest.raises(ValueError, match="expected a task of the backbone"):
        sharing.MultiTask(other, {}).load_task(path)


def test_one_function_by_several_names():
    functions = [F.relu, torch.relu, nn.ReLU(), nn.ReLU(inplace=True), "relu", lambda x: x.clamp(min=0)]
    assert len({sharing.MultiTask(make_stack(activation=own), {}).hash for own in functions}) == 1


def test_functions_that_float64_does_not_fit():
    weight = torch.ones(1)
    tasks = sharing.MultiTask(make_stack(activation=lambda x: F.prelu(x, weight)), {})
    with pytest.raises(ValueError, match="backbone: expected an activation function of float64, too, got <lambda>"):
        _ = tasks.hash


def test_backbones_that_share_their_layers():
    stack = make_stack()
    one, other = (sharing.MultiTask(Own(stack), {"tone": 2}, delta="dense") for _ in range(2))
    engine = other.build_engine([])
    for add in (other.insert_task, engine.add_task):
        with pytest.raises(ValueError, match=r"task: expected one of the backbone \w{12}\.\.\., got one of"):
            add("again", one.get_task("tone"))
    same = sharing.MultiTask(other.backbone, {})
    for add in (same.insert_task, engine.add_task):
        add("again", other.get_task("tone"))


def test_tasks_of_other_backbones():
    tasks = sharing.MultiTask(make_stack(), {}, delta="dense")
    engine = tasks.build_engine()
    for stack, message in (
        (make_stack(width=32), "task: expected one of a backbone of 16 features, got 32"),
        (make_stack(layers=3), "task: expected one of a backbone of 2 layers, got 3"),
        (make_stack(mlp=64), r"task: expected a delta \(32, 16\) of 0.up, got \(64, 16\)"),
        (make_stack(norm_first=True), r"task: expected one of the backbone \w{12}\.\.\., got one of"),
    ):
        task = sharing.MultiTask(stack, {"tone": 2}, delta="dense").get_task("tone")
        for add in (tasks.insert_task, engine.add_task):
            with pytest.raises(ValueError, match=message):
                add("tone", task)
    assert not tasks.tasks and not engine.tasks
    for stack in (make_stack(), tasks.backbone):  # of the same weights, and the same
        same = sharing.MultiTask(stack, {"tone": 2}, delta="dense")
        engine.add_task("tone", same.get_task("tone"))
        engine.add_task("copy", copy.deepcopy(same.get_task("tone")))
    assert engine.tasks == ["tone", "copy"]


@pytest.mark.parametrize("make", [make_bert, Own], ids=["transformers", "own"])
def test_copies_embed_by_their_own_weights(make):
    tasks = change(sharing.MultiTask(make(), {"tone": 2}, delta="low_rank"))
    ids = torch.arange(10).view(2, 5)
    expected = tasks(ids)["tone"]
    file = io.BytesIO()
    torch.save(tasks, file)
    file.seek(0)
    copies = [copy.deepcopy(tasks), torch.load(file, weights_only=False)]
    with torch.no_grad():
        tasks.backbone.get_parameter(next(name for name, _ in tasks.backbone.named_parameters())).zero_()
    for own in copies:
        assert own.hash != tasks.hash
        assert torch.equal(own(ids)["tone"], expected)
