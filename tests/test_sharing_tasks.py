"""Tasks on one frozen encoder: what they compute, by which deltas, aggregators and heads, and again from files."""

from __future__ import annotations

import doctest

import pytest
import sharing_models
import torch
import torch.nn.functional as F
from sharing_models import KINDS, LABELS, train
from torch import nn

from pycodesign import sharing
from pycodesign.sharing.components import run_difference
from pycodesign.sharing.deltas import DenseDelta, LowRankDelta, RowDelta, SparseDelta
from pycodesign.sharing.encoders import Linear

backbone, texts = sharing_models.backbone, sharing_models.texts


@pytest.mark.parametrize("kind", ["sparse", "rows", "low_rank", "dense"])
def test_delta_is_a_difference_of_weights(kind):
    index, rows = torch.tensor([0, 7, 8, 22]), torch.tensor([1, 3])
    made = {"sparse": SparseDelta((4, 6), index), "rows": RowDelta((4, 6), rows)}
    made |= {"low_rank": LowRankDelta((4, 6), 2), "dense": DenseDelta((4, 6))}
    delta = made[kind].double()
    torch.manual_seed(0)
    for parameter in delta.parameters():
        nn.init.normal_(parameter)
    difference, bias = torch.zeros(4, 6).double(), torch.zeros(4).double()
    if kind == "sparse":
        difference.view(-1)[index] = delta.values.detach()
    elif kind == "rows":
        difference[rows] = delta.values.detach()
    else:
        difference = (delta.up @ delta.down if kind == "low_rank" else delta.values).detach()
    bias[rows if kind == "rows" else slice(4)] = delta.bias.detach()
    linear, x = nn.Linear(6, 4).double(), torch.randn(2, 3, 6).double()
    torch.testing.assert_close(run_difference(delta, x), F.linear(x, difference, bias))
    y = F.linear(x, linear.weight + difference, linear.bias + bias)
    torch.testing.assert_close(delta.project(Linear(linear), x), y[..., rows] if kind == "rows" else y)
    run_difference(delta, x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in delta.parameters())


@pytest.mark.parametrize("positions", ["mean", "first"])
@pytest.mark.parametrize("delta", KINDS, ids=str)
def test_tasks_and_engine(backbone, texts, delta, positions, tmp_path):
    """Training changes what is asked for; engine, cache and files give the same again; the backbone is untouched."""
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    tasks = sharing.MultiTask(backbone, LABELS, delta=delta, density=0.1, positions=positions)
    train(tasks, texts)
    with torch.no_grad():
        logits = tasks(texts)
    assert {name: tuple(own.shape) for name, own in logits.items()} == {
        "tone": (3, 2),
        "topic": (3, 5),
        "stars": (3, 1),
        "names": (3, 9, 3),
    }
    engine = tasks.build_engine()
    served = engine(texts["input_ids"], texts["attention_mask"])
    for name, own in logits.items():
        torch.testing.assert_close(served[name], own, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(
            tasks.run(name, tasks.cache(name, [texts], dtype=None)[[0, 1, 2]])[..., :4, :] if name == "names" else own,
            own[..., :4, :] if name == "names" else own,
        )
    tasks.save_pretrained(tmp_path)
    again = sharing.MultiTask.from_pretrained(backbone, tmp_path).eval()
    with torch.no_grad():
        assert all(torch.equal(own, logits[name]) for name, own in again(texts).items())
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_heads_on_all_layers(backbone, texts, tmp_path):
    """The head reads every layer's features at mean 0 and variance 1; engine and files give the same again."""
    tasks = sharing.MultiTask(backbone, LABELS, delta="rows", density=0.1, aggregator="concat")
    train(tasks, texts)
    tasks.train()
    for name in tasks.tasks:
        for _ in range(200):  # until the running averages are those of these texts
            tasks.run(name, tasks.read(name, texts))
    tasks.eval()
    task, features = tasks.get_task("tone"), tasks.read("tone", texts)
    joined = task.aggregator(features.slots)
    assert joined.shape == (3, 1, 4 * 32)
    frozen = torch.cat(list(features.slots[:, :, 0]), 1)
    slots, (mean, variance) = joined[:, 0], (task.aggregator.norm.running_mean, task.aggregator.norm.running_var)
    torch.testing.assert_close(slots * (variance + 1e-5).sqrt() + mean, frozen, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mean[:32], frozen[:, :32].mean(0), atol=1e-5, rtol=1e-4)  # no delta is before those
    torch.testing.assert_close(variance[:32], frozen[:, :32].var(0), atol=1e-5, rtol=1e-4)
    deltas = sum(parameter.numel() for parameter in task.deltas.parameters())
    assert task.count_parameters() == {"components": deltas + 3 * 32 * 2, "head": 33 * 2}
    with torch.no_grad():
        logits = tasks(texts)
    for name, own in tasks.build_engine()(texts).items():
        torch.testing.assert_close(own, logits[name], atol=2e-5, rtol=1e-4)
    tasks.save_pretrained(tmp_path)
    with torch.no_grad():
        again = sharing.MultiTask.from_pretrained(backbone, tmp_path).eval()(texts)
    assert all(torch.equal(own, logits[name]) for name, own in again.items())


@pytest.mark.parametrize("positions", ["mean", "first"])
def test_zero_deltas_keep_the_frozen_features(backbone, texts, positions):
    tasks = sharing.MultiTask(backbone, {"plain": 2}, delta="none", positions=positions).eval()
    tasks.add_task("zero", 2, delta="dense")
    task, plain = tasks.get_task("zero"), tasks.get_task("plain")
    task.head.load_state_dict(plain.head.state_dict())
    torch.testing.assert_close(*tasks(texts).values(), atol=1e-6, rtol=1e-5)
    assert torch.equal(*tasks.build_engine()(texts).values())  # to the bit


def test_deltas_at_the_first_token_are_those_of_all_tokens(backbone, texts):
    """The same weights, asked at every token: the first token's logits are those of positions="first"."""
    tasks = sharing.MultiTask(backbone, {"all": ("tokens", 3)}, delta="dense")
    tasks.add_task("one", 3, positions="first")
    train(tasks, texts)
    tasks.get_task("one").load_state_dict(tasks.get_task("all").state_dict())
    logits = tasks(texts)
    torch.testing.assert_close(logits["one"], logits["all"][:, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["MultiTask", "export_adapter", "search"])
def test_docstrings(name):
    item = getattr(sharing, name)
    (found,) = doctest.DocTestFinder(recurse=False).find(item, name, module=False, globs={})
    assert doctest.DocTestRunner().run(found).failed == 0
