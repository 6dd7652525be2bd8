"""`search`: the supernet, training and its data, candidates and finalists, and what it refuses."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from branch_spaces import (
    NATIVE,
    SMALL,
    SPACE,
    make_table,
    make_table_of,
    one_thread,  # noqa: F401
)
from torch import nn

from pycodesign.branches import Architecture, LatencyTable, Space, describe_machine, search
from pycodesign.branches.supernet import LatencyModel, Supernet
from pycodesign.branches.training import Data, fit, measure_accuracy, to_data

# The supernet


def test_a_sample_is_the_network_that_it_names():
    space = Space(branches=2, **SMALL)
    net = Supernet(space)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        choices = net.sample(1.0, generator)
        architecture = net.architecture(choices)
        space.check(architecture)
        again = LatencyModel(space, make_table_of(space), 2).architecture_choices(architecture)
        assert torch.equal(again.operators, choices.operators.round().detach())
        x = torch.rand(4, 1, 8, 8)
        small = space.build(architecture)
        net.hand_on(small, architecture)
        assert torch.allclose(small.train()(x), net.train()(x, choices), atol=1e-5)
    loss = net(x, choices).sum()
    gradients = torch.autograd.grad(loss, [net.operator_logits, net.gate_logits], allow_unused=True)
    assert float(gradients[0].abs().max()) > 0


def test_supernets_have_their_gates_in_order() -> None:
    space = Space(branches=2, segments=2, layers=1, width=4, size=8, gates=("pooled", "add", "none", "concatenate"))
    gates = [name.split("_")[-1] for name in Supernet(space).gates]
    assert gates == ["pooled", "add", "concatenate"] * 2


# Training


def make_data(count=300, seed=0):
    """A bright square in one of four corners."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    images = rng.random((count, 1, 8, 8), dtype=np.float32)
    for image, label in zip(images, labels, strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[0, row : row + 4, column : column + 4] += 0.3
    return torch.from_numpy(images), torch.from_numpy(labels)


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 11])
def test_short_trainings(steps):
    space = Space(branches=1, operators=NATIVE, gates=("none",), classes=4, **SMALL)
    net = space.build(space.sample(0))
    before = [parameter.detach().clone() for parameter in net.parameters()]
    assert math.isfinite(fit(net, Data(*make_data(20)), steps, batch=8))
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_training_learns():
    space = Space(branches=2, operators=NATIVE, gates=("none",), classes=4, **SMALL)
    net = space.build(Architecture(((("conv3x3:ternary",) * 2,) * 2,) * 2, (("none",),)))
    data, test = (Data(*make_data(400, seed)) for seed in (0, 1))
    fit(net, data, 200, batch=32)
    assert measure_accuracy(net, test) > 0.8


def test_labels_and_sizes_of_data() -> None:
    images, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 4
    assert len(to_data((images, labels), (1, 8, 8), 4)) == 20
    for bad, shape, message in (
        (labels, (1, 8, 9), r"data: expected images \(n, 1, 8, 9\), got \(20, 1, 8, 8\)"),
        (labels + 1, (1, 8, 8), "data: expected labels from 0 to 3, got 4"),
        (labels - 100, (1, 8, 8), "data: expected labels from 0 to 3, got -100"),
    ):
        with pytest.raises(ValueError, match=message):
            to_data((images, bad), shape, 4)


def test_images_are_finite() -> None:
    images = torch.rand(20, 1, 8, 8)
    images[3, 0, 2, 2] = torch.nan
    with pytest.raises(ValueError, match="data: expected finite images, got nan"):
        to_data((images, torch.arange(20) % 4), (1, 8, 8), 4)


# Searches


@pytest.mark.parametrize("method", ["differentiable", "random", "optuna"])
def test_search_stays_under_the_target(method):
    space = Space(branches=2, operators=NATIVE, gates=("none", "add"), classes=4, **SMALL)
    table = make_table_of(space)
    model = LatencyModel(space, table, 2)
    seconds = sorted(model.seconds(space.sample(seed)) for seed in range(60))
    target = seconds[20]
    options = {"method": method, "steps": 24, "train_steps": 20, "batch": 32, "candidates": 2, "finalists": 2}
    net = search(space, table, make_data(), target_ms=1e3 * target, **options)
    found = net.found
    assert found.latency <= target and found.latency == pytest.approx(model.seconds(found.architecture))
    assert len(found.candidates) == 2 and found.accuracy == max(accuracy for _, _, accuracy in found.candidates)
    assert bool(found.history) == (method == "differentiable")
    assert not net.training
    again = search(space, table, make_data(), target_ms=1e3 * target, **options)
    assert again.found.architecture == found.architecture


def test_finalists_are_halved(monkeypatch):
    from pycodesign.branches import searching

    space = Space(branches=2, operators=NATIVE, gates=("none",), classes=4, **SMALL)
    trained = []  # networks, and steps of each
    fit = searching.fit

    def count(net, data, steps, **options):
        trained.append((id(net), steps, options["seed"]))
        return fit(net, data, steps, **options)

    monkeypatch.setattr(searching, "fit", count)
    options = {"steps": 8, "train_steps": 12, "batch": 16, "finalists": 5, "seed": 3}
    found = search(space, make_table_of(space), make_data(), target_ms=1e6, **options).found
    assert [steps for _, steps, _ in trained] == [3] * 5 + [6] * 2 + [12]
    assert [seed for _, _, seed in trained] == [3] * 5 + [4] * 2 + [5]
    rounds = [{net for net, _, _ in trained[a:b]} for a, b in ((0, 5), (5, 7), (7, 8))]
    assert [len(nets) for nets in rounds] == [5, 2, 1] and rounds[2] < rounds[1] < rounds[0]
    accuracies = [accuracy for _, _, accuracy in found.candidates]
    assert len(accuracies) == 5 and accuracies[:3] == sorted(accuracies[:3], reverse=True)


def test_neighbors_of_the_best_are_compared_too(monkeypatch):
    from pycodesign.branches import searching

    space = Space(branches=2, operators=NATIVE, gates=("none", "add"), classes=4, **SMALL)
    model, (images, labels) = LatencyModel(space, make_table_of(space)), make_data(100)
    target = sorted(model.seconds(space.sample(seed)) for seed in range(40))[10]
    torch.manual_seed(0)
    net = Supernet(space)

    def choose(changed):
        monkeypatch.setattr(searching, "CHANGED", changed)
        found = searching._choose(net, model, model, Data(images, labels), target, torch.Generator().manual_seed(0))
        assert len(set(found)) == len(found) and all(model.seconds(a) <= target for a in found)
        with torch.no_grad():
            losses = [
                float(nn.functional.cross_entropy(net(images, model.architecture_choices(a)), labels)) for a in found
            ]
        assert losses == sorted(losses)
        return losses[0]

    assert choose(100) < choose(0)


def test_latency_guides_the_search():
    space = Space(branches=2, operators=("conv3x3:ternary", "skip"), gates=("none",), classes=4, **SMALL)
    table = make_table_of(space)
    model = LatencyModel(space, table, 2)
    seconds = sorted(model.seconds(space.sample(seed)) for seed in range(200))
    options = {"steps": 80, "train_steps": 1, "batch": 16, "strength": 20.0}
    tight, loose = (
        search(space, table, make_data(), target_ms=1e3 * target, **options).found.history[-1]["ms"]
        for target in (seconds[3], 10 * seconds[-1])
    )
    assert tight < loose


def test_candidates_may_start_warm():
    space = Space(branches=2, operators=NATIVE, gates=("none",), classes=4, **SMALL)
    started = []
    search(
        space,
        make_table_of(space),
        make_data(),
        target_ms=10,
        method="random",
        train_steps=1,
        candidates=2,
        warm_start=started.append,
    )
    assert len(started) == 2 and all(isinstance(net, nn.Module) for net in started)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_searches_in_any_mode(mode: Any) -> None:
    with mode():
        data = torch.rand(20, 1, 8, 8, requires_grad=mode is torch.enable_grad), torch.arange(20) % 4
        space = Space(**{**vars(SPACE), "classes": 4})
        options: dict[str, Any] = {"target_ms": 1e3, "steps": 4, "train_steps": 2, "finalists": 1, "batch": 4}
        net = search(space, make_table(space), data, **options)
    assert net.found is not None and all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": float("nan")}, "budget: expected a finite number, 0 or more, got nan"),
        ({"budget": float("inf")}, "budget: expected a finite number, 0 or more, got inf"),
        ({"budget": -1}, "budget: expected a finite number, 0 or more, got -1"),
        ({"candidates": 0}, "candidates: expected an integer >= 1, got 0"),
        ({"candidates": -1}, "candidates: expected an integer >= 1, got -1"),
        ({"strength": float("nan")}, "strength: expected a finite number"),
    ],
)
def test_options_of_a_search(options: dict[str, Any], message: str) -> None:
    space = Space(branches=2, segments=1, layers=1, width=4, size=8, classes=4)
    data = torch.rand(20, 1, 8, 8), torch.arange(20) % 4
    with pytest.raises(ValueError, match=message):
        search(space, LatencyTable(describe_machine(), {}), data, target_ms=1.0, method="random", **options)


def test_what_searches_refuse(monkeypatch):
    space = Space(branches=2, operators=NATIVE, gates=("none",), classes=4, **SMALL)
    table, data = make_table_of(space), make_data(40)
    for options, message in [
        ({"method": "grid"}, "method: expected 'differentiable', 'random', 'optuna', got 'grid'"),
        ({"latency": "mean"}, "latency: expected 'max_plus', 'sum', got 'mean'"),
        ({"target_ms": 0}, "target_ms: expected a positive number"),
        ({"target_ms": 1e-4, "method": "random"}, "target_ms: expected one that networks of the space reach"),
        ({"steps": 0}, "steps: expected an integer >= 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            search(space, table, data, **{"target_ms": 1.0, **options})
    with pytest.raises(TypeError, match="space: expected a Space, got str"):
        search("space", table, data, target_ms=1.0)
    with pytest.raises(TypeError, match="table: expected a LatencyTable, got dict"):
        search(space, {}, data, target_ms=1.0)
    other = LatencyTable({**describe_machine(), "cores": 999}, table.entries)
    with pytest.raises(ValueError, match=r"measured on this machine \(cores .*\), got 999"):
        search(space, other, data, target_ms=1.0)
    with pytest.raises(ValueError, match="expected an entry for"):
        search(Space(branches=2, width=6, classes=4), table, data, target_ms=1.0)
    images, labels = data
    for wrong, message in [
        (3, "data: expected a pair"),
        ((images.double(), labels), "float32 images and int64 labels"),
        ((images, labels[:3]), r"images \(n, C, H, W\) and labels \(n,\)"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            search(space, table, wrong, target_ms=1.0)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"method='optuna' needs optuna: `pip install 'pycodesign\[nas\]'`"):
        search(space, table, data, target_ms=10.0, method="optuna")
