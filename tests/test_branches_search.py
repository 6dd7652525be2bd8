"""Spaces, their networks as native bodies, the latency model against the simulator, and the searches themselves."""

import importlib.util
import math
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from pycodesign.branches import (
    Architecture,
    LatencyTable,
    Placement,
    Space,
    describe_machine,
    grow_network,
    predict,
    profile,
    search,
)
from pycodesign.branches.lowering import CannotChain, build_chain
from pycodesign.branches.operators import BranchBody, FourBits, Ternary, build_gate, build_operator
from pycodesign.branches.profiling import list_probes, make_table
from pycodesign.branches.space import GATES, NATIVE_GATES, OPERATORS
from pycodesign.branches.supernet import Choices, LatencyModel, Supernet
from pycodesign.branches.training import Data, fit, measure_accuracy

NATIVE = ("conv3x3:ternary", "conv1x1:ternary", "separable:ternary", "skip", "pool")
SMALL = {"segments": 2, "layers": 2, "width": 4, "size": 8}


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors, and a machine that may be busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_table_of(space, seed=0, sync=2e-6):
    """A latency for everything, from dice."""
    rng = random.Random(seed)
    columns = ("solo/1", "together/1")
    seconds = {}
    for name, probe in list_probes(space).items():
        base = 1e-5 if name.startswith(("one", "line", "copy", "turns", "large")) else rng.uniform(2e-5, 9e-5)
        seconds[name] = dict.fromkeys(columns, base * (1 if probe.line == 1 else 1.5))
    table = make_table(space, seconds, 2)
    return LatencyTable(table.machine, table.entries, table.run, sync, 1e-10, 2)


def settle(net, shape):
    """Give norms statistics that are not those they begin with."""
    net.train()
    for seed in range(2):
        net(torch.rand(8, *shape[1:], generator=torch.Generator().manual_seed(seed)))
    return net.eval()


@pytest.mark.parametrize("stem", ["shared", "recomputed"])
@pytest.mark.parametrize("branches", [1, 2, 3, 4])
def test_networks_of_a_space_run_natively(branches, stem):
    space = Space(branches=branches, stem=stem, operators=NATIVE, gates=("none", "add", "concatenate"), **SMALL)
    assert space.all_native
    for seed in range(4):
        net = settle(space.build(space.sample(seed), seed), space.input_shape())
        graph = net.to_graph(native=True)
        assert {body.arrays for body in graph.bodies.values()} == {"numpy"}
        assert len(graph.bodies) == 1 + 2 * branches + (branches if stem == "recomputed" else 1)
        x = torch.rand(net.shape, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            np.testing.assert_allclose(graph(x)[0], net(x), atol=1e-5)


def test_bodies_with_float_weights_stay_torch():
    space = Space(branches=3, **SMALL)
    assert not space.all_native
    kinds = set()
    for seed in range(6):
        architecture = space.sample(seed)
        net = settle(space.build(architecture), space.input_shape())
        graph = net.to_graph(native=True)
        for body in graph.bodies.values():
            if body.segment >= 0:
                kinds.add(body.arrays)
                assert (body.arrays == "numpy") == space.is_native(architecture, body.segment, body.branch)
        x = torch.rand(net.shape, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            np.testing.assert_allclose(graph(x)[0], net(x), atol=1e-5)
    assert kinds == {"torch", "numpy"}
    with pytest.raises(CannotChain, match="weights of few values, got float ones in Conv2d"):
        build_chain(BranchBody([], [build_operator("conv3x3", 4, 4)]).eval())
    with pytest.raises(CannotChain, match="one that is native, got Pooled"):
        build_chain(BranchBody([build_gate("pooled", 4)], []).eval(), 2)


def test_quantizers():
    w = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for quantizer, most in ((Ternary(), 3), (FourBits(), 15)):
        q = quantizer(w)
        assert all(len(row.unique()) <= most for row in q.detach())
        (gradient,) = torch.autograd.grad(q.sum(), w)
        assert torch.equal(gradient, torch.ones_like(w))  # straight through
    assert torch.equal(Ternary()(torch.zeros(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize("operators", [NATIVE, OPERATORS], ids=["native", "all"])
def test_the_latency_model_is_the_simulator(operators):
    # Two branches on two teams of one core: the longest path through the graph.
    gates = ("none", "add", "concatenate") if operators is NATIVE else GATES
    space = Space(branches=2, operators=operators, gates=gates, **SMALL)
    table = make_table_of(space)
    model = LatencyModel(space, table, 2)
    for seed in range(20):
        architecture = space.sample(seed)
        graph = space.build(architecture).to_graph()
        teams = [[name for name, body in graph.bodies.items() if max(body.branch, 0) == b] for b in range(2)]
        expected = predict(graph, Placement(tuple(map(tuple, teams))), table)
        assert model.seconds(architecture) == pytest.approx(expected, rel=2e-3)
        summed = LatencyModel(space, table, 2, summed=True).seconds(architecture)
        assert summed == pytest.approx(predict(graph, Placement.sequential(graph), table), rel=2e-2)


def test_the_smooth_maximum_and_its_gradient():
    space = Space(branches=3, **SMALL)
    model, net = LatencyModel(space, make_table_of(space), 3), Supernet(space)
    choices = net.expected()
    fixed = Choices(choices.operators.detach(), choices.gates.detach())
    exact = float(model(fixed))
    smooth = [float(model(fixed, s)) for s in (1e-4, 1e-5, 1e-6, 1e-7)]
    assert smooth == sorted(smooth, reverse=True) and smooth[0] > exact
    assert smooth[-1] == pytest.approx(exact, rel=2e-3)
    gradients = torch.autograd.grad(model(choices, 1e-6), [net.operator_logits, net.gate_logits])
    assert all(float(g.abs().max()) > 0 for g in gradients)
    fewer = LatencyModel(space, model.table, 1)
    assert float(fewer(fixed)) > exact  # all the work on one worker


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


def make_data(count=300, seed=0):
    """A bright square in one of four corners."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    images = rng.random((count, 1, 8, 8), dtype=np.float32)
    for image, label in zip(images, labels, strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[0, row : row + 4, column : column + 4] += 0.3
    return torch.from_numpy(images), torch.from_numpy(labels)


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


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 11])
def test_short_trainings(steps):
    space = Space(branches=1, operators=NATIVE, gates=("none",), classes=4, **SMALL)
    net = space.build(space.sample(0))
    before = [parameter.detach().clone() for parameter in net.parameters()]
    assert math.isfinite(fit(net, Data(*make_data(20)), steps, batch=8))
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


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


def test_changes_of_an_architecture():
    space, rng = Space(branches=3, operators=NATIVE, gates=("none", "add"), **SMALL), random.Random(0)
    before = space.sample(rng)

    def choices(architecture):
        operators = [name for segment in architecture.operators for branch in segment for name in branch]
        return operators + [name for row in architecture.gates for name in row]

    changed = set()
    for _ in range(300):
        after = space.change(before, rng)
        space.check(after)
        places = [i for i, (a, b) in enumerate(zip(choices(before), choices(after), strict=True)) if a != b]
        assert len(places) <= 2
        changed.update(places)
    assert changed == set(range(len(choices(before))))


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


def test_grown_networks_compute_the_same():
    spaces = [Space(branches=3, width=width, segments=3, size=16) for width in (4, 6)]
    for seed in range(4):
        architecture = spaces[0].sample(seed)
        small, large = (space.build(architecture).double() for space in spaces)
        small.train()(torch.rand(8, 1, 16, 16, dtype=torch.double))
        before = large.state_dict()["bodies.head.1.parametrizations.weight.original"].clone()
        report = grow_network(small.eval(), large.eval(), inputs=torch.rand(2, 1, 16, 16, dtype=torch.double))
        assert report.difference < 1e-12
        assert not torch.equal(large.state_dict()["bodies.head.1.parametrizations.weight.original"], before)
    with pytest.raises(ValueError, match="target: expected the architecture of the source, wider, got another one"):
        grow_network(spaces[0].build(spaces[0].sample(0)), spaces[1].build(spaces[1].sample(1)))


def test_training_learns():
    space = Space(branches=2, operators=NATIVE, gates=("none",), classes=4, **SMALL)
    net = space.build(Architecture(((("conv3x3:ternary",) * 2,) * 2,) * 2, (("none",),)))
    data, test = (Data(*make_data(400, seed)) for seed in (0, 1))
    fit(net, data, 200, batch=32)
    assert measure_accuracy(net, test) > 0.8


def test_architectures_are_text():
    architecture = Space(branches=3).sample(0)
    assert Architecture.from_json(architecture.to_json()) == architecture
    for text in ("", "{}", "[1]", '{"operators": 1, "gates": [], "stem": "shared"}'):
        with pytest.raises(ValueError, match="text: expected an architecture in JSON"):
            Architecture.from_json(text)


def test_what_spaces_refuse():
    for options, message in [
        ({"branches": 5}, "branches: expected 1 to 4, got 5"),
        ({"width": 0}, "width: expected an integer >= 1"),
        ({"operators": ("conv5x5",)}, "operators: expected different ones of .*, got 'conv5x5'"),
        ({"operators": ()}, "operators: expected different ones"),
        ({"gates": ("add", "add")}, "gates: expected different ones"),
        ({"gates": ("multiply",)}, "got 'multiply'"),
        ({"stem": "none"}, "stem: expected 'shared' or 'recomputed'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Space(**options)
    space = Space(branches=2, operators=NATIVE, gates=("none",))
    for wrong, message in [
        (Space(branches=3).sample(0), "3 segments of 2 branches of 2 layers"),
        (Architecture(space.sample(0).operators, ()), "2 times 1 gates"),
        (Architecture(((("conv3x3",) * 2,) * 2,) * 3, (("none",),) * 2), "got 'conv3x3'"),
        (Architecture(((("skip",) * 2,) * 2,) * 3, (("add",),) * 2), "got 'add'"),
        (Architecture(((("skip",) * 2,) * 2,) * 3, (("none",),) * 2, "x"), "got 'x'"),
    ]:
        with pytest.raises(ValueError, match=f"architecture: expected .*{message}"):
            space.build(wrong)
    with pytest.raises(TypeError, match="architecture: expected an Architecture, got str"):
        space.build("conv")
    with pytest.raises(ValueError, match=r"operator: expected one of .*, got 'conv5x5'"):
        build_operator("conv5x5", 4, 4)
    with pytest.raises(ValueError, match=r"gate: expected one of add, concatenate, pooled, got .none."):
        build_gate("none", 4)
    assert NATIVE_GATES < set(GATES)


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


def test_profile():
    space = Space(branches=2, segments=2, layers=1, width=4, size=8, operators=("conv1x1:ternary", "conv1x1"))
    table = profile(space, 1, rounds=2, calibration=1)
    model = LatencyModel(space, table, 1)
    for seed in range(3):
        assert 0 < model.seconds(space.sample(seed)) < 1
    keys = {key for seed in range(20) for b in space.build(space.sample(seed)).to_graph().bodies.values()
            for key in b.costs}  # fmt: skip
    assert keys <= set(table.entries)
    assert table.machine == describe_machine()
    with pytest.raises(ValueError, match="workers: expected 1 to"):
        profile(space, 4096)
    with pytest.raises(ValueError, match="threads: expected 1 to"):
        profile(space, 1, threads=(4096,))
    with pytest.raises(TypeError, match="space: expected a Space"):
        profile("space")


@pytest.mark.slow
def test_predictions_of_random_plans(tmp_path):
    """On an idle machine of two cores; the committed result is bench/results/branches-predicted-granite-rapids.json."""
    import json
    import subprocess
    from pathlib import Path

    script = Path(__file__).parents[1] / "bench" / "bench_placement.py"
    path = tmp_path / "predicted.json"
    subprocess.run([sys.executable, str(script), "predict", "--json", str(path)], check=True)
    summary = json.loads(path.read_text())["summary"]
    assert summary["plans"] >= 100
    assert summary["mean_error"] <= 0.1 and summary["rank_correlation"] >= 0.9, summary


def test_the_example_draws(tmp_path, monkeypatch):
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    example = importlib.import_module("search_branches")
    rows = [
        {"method": method, "seed": seed, "target_ms": 0.1, "test": 0.9 + 0.01 * seed, "validation": 0.9,
         "predicted_ms": 0.08 + 0.01 * seed, "measured_ms": 0.1, "seconds": 1.0, "candidates": 2}
        for method in example.METHODS for seed in range(2)
    ]  # fmt: skip
    example.draw(rows, tmp_path / "front.svg")
    assert (tmp_path / "front.svg").stat().st_size > 1000
    summary = example.summarize(rows)
    assert [line["method"] for line in summary] == list(example.METHODS)
    assert summary[1]["max_plus_ahead"] == 0 and summary[1]["seeds"] == 2
    example.print_summary(summary)
