"""Search for what is shared: its costs, what it finds, what a failure leaves."""

from __future__ import annotations

import json

import pytest
import sharing_models
import torch
import torch.nn.functional as F
from sharing_models import make_bert

from pycodesign import sharing
from pycodesign.sharing.choices import ChoiceDelta
from pycodesign.sharing.deltas import DenseDelta, LowRankDelta
from pycodesign.sharing.encoders import PROJECTIONS

KINDS = ("sparse", "low_rank", "dense")
COSTS = {"sparse": 2.0, "low_rank": 1.0, "dense": 5.0}
TABLE = {projection: {"sparse": 1.0, "low_rank": 1.0, "dense": 2.0} for projection in PROJECTIONS}
backbone, texts = sharing_models.shallow, sharing_models.sentences


@pytest.fixture
def table():
    return sharing.CostTable({p: dict(COSTS) for p in PROJECTIONS}, 100.0, 16, "mean")


def test_measured_costs(backbone):
    encoder = sharing.MultiTask(backbone, {}).encoder
    for positions in ("mean", "first", "all"):
        table = sharing.measure_costs(encoder, tokens=8, positions=positions, rounds=3, kinds=("rows", *KINDS))
        assert table.seconds.keys() == set(PROJECTIONS)
        assert table.backbone > 0
        assert all(seconds >= 0 for row in table.seconds.values() for seconds in row.values())
        assert sharing.CostTable.from_json(table.to_json()) == table
        assert str(table).startswith("per cent of a pass")
    with pytest.raises(ValueError, match="kinds: expected some of sparse, rows, low_rank, dense, got full"):
        sharing.measure_costs(encoder, kinds=("full",))
    with pytest.raises(ValueError, match="text: expected the fields"):
        sharing.CostTable.from_json("{}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seconds": {"query": TABLE["query"]}}, "seconds: expected rows for query, key, value, output, up, down"),
        ({"seconds": TABLE | {"up": {"sparse": 1.0}}}, "seconds: expected the same of sparse, rows, low_rank, dense"),
        ({"seconds": {p: {} for p in PROJECTIONS}}, "seconds: expected the same of"),
        ({"seconds": {p: {"other": 1.0} for p in PROJECTIONS}}, "seconds: expected the same of"),
        ({"seconds": {p: {"sparse": -1.0} for p in PROJECTIONS}}, "seconds: expected finite numbers of at least 0"),
        ({"seconds": {p: {"sparse": "1"} for p in PROJECTIONS}}, "seconds: expected finite numbers of at least 0"),
        ({"seconds": []}, "seconds: expected rows for"),
        ({"backbone": 0}, "backbone: expected a positive number of seconds, got 0"),
        ({"backbone": float("nan")}, "backbone: expected a positive number of seconds, got nan"),
        ({"tokens": 0}, "tokens: expected at least 1, got 0"),
        ({"positions": "last"}, "positions: expected one of mean, first, all, got 'last'"),
    ],
)
def test_tables_of_costs_that_are_wrong(fields, message):
    table = {"seconds": TABLE, "backbone": 100.0, "tokens": 8, "positions": "mean"}
    assert sharing.CostTable.from_json(json.dumps(table)) == sharing.CostTable(**table)
    with pytest.raises(ValueError, match=message):
        sharing.CostTable.from_json(json.dumps({**table, **fields}))
    with pytest.raises(ValueError, match="text: expected JSON, got other text"):
        sharing.CostTable.from_json("{")


def test_operations(backbone):
    tasks = sharing.MultiTask(backbone, {"none": 2}, delta="none")
    tasks.add_task("up", 2, delta={"up": "dense"})
    tasks.add_task("first", 2, delta={"up": "dense"}, positions="first")
    encoder, width, inner, tokens = tasks.encoder, 32, 64, 10
    layer = tokens * (4 * width * width + 2 * width * inner) + 2 * tokens * tokens * width
    assert sharing.count_operations(encoder, tokens) == 2 * layer
    least = 3 * 2 * width + 2 * width
    assert sharing.count_operations(encoder, tokens, tasks.get_task("none")) == least
    entries = width * inner + inner  # and a bias
    pooled = tokens * entries + tokens * inner + width * inner
    assert sharing.count_operations(encoder, tokens, tasks.get_task("up")) == least + 2 * pooled
    assert sharing.count_operations(encoder, tokens, tasks.get_task("first")) == least + 2 * (entries + width * inner)


@pytest.mark.parametrize("target", [0.02, 0.1, 1.0])
def test_search_keeps_the_target(backbone, texts, table, target):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, density=0.1).eval()
    labels = (texts["input_ids"][:, 0] > 25).long()
    found = tasks.search("tone", [(texts, labels)] * 3, F.cross_entropy, costs=table, target=target, epochs=4)
    task = tasks.get_task("tone")
    assert found.choices.keys() == {f"{n}.{p}" for n in range(2) for p in PROJECTIONS}
    assert {place: kind for place, kind in found.choices.items() if kind != "reuse"} == dict(task.spec.deltas)
    assert found.cost == pytest.approx(table.compute_share(dict(task.spec.deltas)))
    assert found.cost <= target
    assert all(sum(own.values()) == pytest.approx(1) for own in found.probabilities.values())
    assert f"{found.shared:.0%} of the projections are shared" in str(found)
    assert len(found.losses) == 12 and found.losses[-1] < found.losses[0]
    torch.testing.assert_close(tasks.build_engine()(texts)["tone"], tasks(texts)["tone"], atol=2e-6, rtol=1e-5)


def test_search_learns_where_the_difference_is(backbone, texts, table):
    """The labels are those of a task that differs in one projection; differing elsewhere costs, and does not help."""
    teacher = sharing.MultiTask(backbone, {"tone": 2}, delta={"down": "dense"}, layers=[1]).eval()
    task = teacher.get_task("tone")
    with torch.no_grad():
        task.list_deltas()["1.down"].values.normal_(std=0.5)
    labels = teacher(texts)["tone"].detach().argmax(1)
    tasks = sharing.MultiTask(backbone, {"tone": 2}, density=0.1).eval()
    tasks.get_task("tone").head.load_state_dict(task.head.state_dict())
    options = {"costs": table, "target": 0.05, "epochs": 30, "kinds": ("dense",)}
    found = sharing.search(tasks, "tone", [(texts, labels)] * 3, F.cross_entropy, **options)
    assert found.cost <= 0.05
    assert (tasks(texts)["tone"].argmax(1) == labels).all()


def test_wrong_searches(backbone, texts, table):
    tasks = sharing.MultiTask(backbone, {"tone": 2})
    batches = [(texts, torch.zeros(8, dtype=torch.long))]
    small = sharing.CostTable({p: {"sparse": 1.0} for p in PROJECTIONS}, 1.0, 16, "mean")
    for changed, message in (
        ({"batches": []}, "batches: expected at least one batch"),
        ({"target": 0}, "target: expected a positive number of passes, got 0"),
        ({"kinds": ("rows",)}, "kinds: expected some of sparse, low_rank, dense, got rows"),
        ({"costs": small}, "costs: expected a table with sparse, low_rank, dense, got none of low_rank"),
        ({"loss": lambda y, _: y.sum() * torch.inf}, "loss: expected finite"),
    ):
        options = {"batches": batches, "loss": F.cross_entropy, "costs": table, "target": 0.1, **changed}
        own, loss = options.pop("batches"), options.pop("loss")
        with pytest.raises(ValueError, match=message):
            sharing.search(tasks, "tone", own, loss, **options)


def test_searches_that_are_wrong():
    tasks = sharing.MultiTask(make_bert(), {"tone": 2, "first": 2}, density=0.1)
    tasks.add_task("first-token", 2, positions="first")
    batches = [(torch.arange(10).view(2, 5), torch.tensor([0, 1]))]
    options = {"costs": sharing.CostTable(TABLE, 100.0, 5, "mean"), "target": 0.1}
    for changed, message in (
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"epochs": -1}, "epochs: expected at least 1, got -1"),
        ({"lr": -1}, "lr: expected positive numbers, got -1"),
        ({"choice_lr": float("nan")}, "choice_lr: expected positive numbers, got nan"),
        ({"temperatures": (0, 0)}, "temperatures: expected positive numbers, got 0"),
        ({"temperatures": (1.0,)}, "temperatures: expected one at the start and one at the end"),
        ({"pressure": -1}, "pressure: expected at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.search("tone", batches, F.cross_entropy, **{**options, **changed})
    with pytest.raises(ValueError, match="costs: expected a table for positions 'first', as the task's, got one for"):
        tasks.search("first-token", batches, F.cross_entropy, **options)
    for options, message in (({"rounds": 0}, "rounds: expected at least 1"), ({"tokens": 0}, "tokens: expected at")):
        with pytest.raises(ValueError, match=message):
            sharing.measure_costs(tasks.encoder, **options)


def test_a_failed_search_leaves_the_task_as_it_was(backbone, texts, table):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta="low_rank").eval()
    task, labels = tasks.get_task("tone"), torch.zeros(8, dtype=torch.long)
    spec, before, steps = task.spec, tasks(texts)["tone"], iter(range(20))

    def fail(logits, labels):
        return F.cross_entropy(logits, labels) * (torch.nan if next(steps) > 4 else 1)

    with pytest.raises(ValueError, match="loss: expected finite"):
        sharing.search(tasks, "tone", [(texts, labels)] * 2, fail, costs=table, target=0.5, epochs=4)
    assert task.spec is spec and torch.equal(tasks(texts)["tone"], before)


def test_choices_are_drawn_on_any_device():
    """With a generator on the CPU, so that a seed draws the same everywhere."""
    costs, drawn = {"low_rank": 0.25, "dense": 0.5}, []
    for device in ("cpu", "meta"):
        choice = ChoiceDelta((4, 3), {"low_rank": LowRankDelta((4, 3), 1), "dense": DenseDelta((4, 3))}, costs)
        before = choice.state_dict().keys()
        choice.to(device).draw(1.0, torch.Generator().manual_seed(0))
        drawn.append(choice.weights)
        assert choice.costs.device.type == choice.weights.device.type == choice.compute_cost().device.type == device
        assert "costs" not in before
    expected = torch.empty(3).exponential_(generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn[0], torch.softmax(-expected.log(), 0))
