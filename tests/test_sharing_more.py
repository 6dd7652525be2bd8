"""What must not pass for the same: selections, backbones that compute something else, tasks and files of others."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from test_sharing_hidden import Own, make_bert, make_stack
from torch import nn

from pycodesign import sharing


def count_entries(tasks: sharing.MultiTask, name: str) -> dict[str, int]:
    return {place: delta.values.numel() for place, delta in tasks.get_task(name).list_deltas().items()}


@pytest.mark.parametrize("delta", ["sparse", {"up": "rows", "down": "sparse", "value": "low_rank"}], ids=str)
def test_a_selection_is_the_same_each_time(delta, tmp_path):
    """Also of places that one before has left empty, and of a task that was read."""
    tasks = sharing.MultiTask(make_bert(), {"tone": 2}, delta=delta, density=0.002).eval()
    batches = [({"input_ids": torch.arange(12).view(3, 4)}, torch.tensor([0, 1, 0]))]
    shares = tasks.select_mask("tone", batches, F.cross_entropy)
    spec = tasks.get_task("tone").spec
    assert 0.0 in shares.values() and len(spec.deltas) < len(spec.asked)
    tasks.save_pretrained(tmp_path)
    read = sharing.MultiTask.from_pretrained(tasks.backbone, tmp_path).eval()
    for again in (tasks, tasks, read):
        before = again.get_task("tone").spec
        with pytest.raises(ValueError, match="batches: expected at least one"):
            again.select_mask("tone", [], F.cross_entropy)
        assert again.get_task("tone").spec is before == spec
        assert again.select_mask("tone", batches, F.cross_entropy) == shares
        assert again.get_task("tone").spec == spec


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
    ],
    ids=["function", "gelu", "leaky_relu", "lambda", "module", "norm", "embed"],
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
    with pytest.raises(ValueError, match="backbone: expected functions that take float64, too, got <lambda>"):
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
