"""`select_mask`: the entries and rows that it chooses, the same each time, and what a failure leaves."""

from __future__ import annotations

import pytest
import sharing_models
import torch
import torch.nn.functional as F
from sharing_models import make_bert, make_labels, train

from pycodesign import sharing

backbone, texts = sharing_models.backbone, sharing_models.texts


def test_masks(backbone, texts):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta="sparse", density=0.02).eval()
    labels = make_labels("classification")
    task = tasks.get_task("tone")
    assert not task.is_selected
    gradients = {}
    dense = sharing.MultiTask(backbone, {}).eval()
    dense.add_task("tone", 2, delta="dense")
    dense.get_task("tone").head.load_state_dict(task.head.state_dict())
    F.cross_entropy(dense(texts)["tone"], labels).backward()
    for place, delta in dense.get_task("tone").list_deltas().items():
        gradients[place] = delta.values.grad.abs().flatten()
    shares = tasks.select_mask("tone", [(texts, labels)], F.cross_entropy)
    chosen = torch.cat([gradients[place][delta.index] for place, delta in task.list_deltas().items()])
    everything = torch.cat(list(gradients.values()))
    assert len(chosen) == round(0.02 * len(everything))
    torch.testing.assert_close(chosen.sort().values, everything.topk(len(chosen)).values.sort().values)
    assert shares.keys() == gradients.keys()
    assert task.is_selected
    trained = sum(parameter.numel() for parameter in tasks.task_parameters("tone"))
    biases = sum(delta.bias.numel() for delta in task.list_deltas().values())
    others = sum(p.numel() for module in (task.aggregator, task.head) for p in module.parameters())
    assert trained == len(chosen) + biases + others  # memory for those alone: no dense parameter is left
    for method, scope in (("change", "matrix"), ("gradient", "matrix"), ("change", "global")):
        tasks.add_task(f"{method}-{scope}", 2, delta={"up": "rows", "value": "sparse"}, density=0.25)
        tasks.select_mask(f"{method}-{scope}", [(texts, labels)] * 3, F.cross_entropy, method=method, scope=scope)
        if scope == "matrix":
            deltas = tasks.get_task(f"{method}-{scope}").list_deltas()
            assert {len(delta.rows) for place, delta in deltas.items() if place.endswith("up")} == {16}
            assert {len(delta.index) for place, delta in deltas.items() if place.endswith("value")} == {256}


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


def test_a_failed_mask_leaves_the_task_as_it_was(backbone, texts):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta={"up": "rows", "value": "sparse"}, density=1.0)
    labels, task = make_labels("classification"), tasks.get_task("tone")
    shares = tasks.select_mask("tone", [(texts, labels)], F.cross_entropy)
    assert set(shares.values()) == {1.0}  # of weights; there are biases, too
    train(tasks, texts)
    spec, before = task.spec, tasks(texts)["tone"]
    for batches, loss in (([], F.cross_entropy), ([(texts, labels)], lambda y, _: y.sum() * torch.nan)):
        with pytest.raises(ValueError):
            tasks.select_mask("tone", batches, loss)
        assert task.spec is spec and task.is_selected
        assert torch.equal(tasks(texts)["tone"], before)
