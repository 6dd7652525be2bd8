"""Training tasks: losses, features that are read once and kept in a cache, Hugging Face's Trainer."""

from __future__ import annotations

import pytest
import sharing_models
import torch
from sharing_models import change, make_bert, train

from pycodesign import sharing

backbone, texts = sharing_models.backbone, sharing_models.texts


def test_labels_of_a_regression():
    spec = sharing.TaskSpec(1, kind="regression")
    logits, labels = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1, 3, 2])
    for own in (labels, labels[:, None]):
        assert sharing.compute_loss(spec, logits, own).item() == pytest.approx(5 / 3)
    for own in (labels[:2], labels[None], labels[0]):
        with pytest.raises(ValueError, match=r"labels: expected \(3,\), got"):
            sharing.compute_loss(spec, logits, own)


def test_labels_in_another_order():
    logits = torch.randn(3, 7, 2)
    spec = sharing.TaskSpec(2, "tokens", "all")
    sharing.compute_loss(spec, logits, torch.zeros(3, 7, dtype=torch.long))
    for shape in ((7, 3), (21,), (3,)):
        with pytest.raises(ValueError, match=r"labels: expected \(3, 7\), got"):
            sharing.compute_loss(spec, logits, torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels: expected \(3,\), got \(1, 3\)"):
        sharing.compute_loss(sharing.TaskSpec(2), logits[:, 0], torch.zeros(1, 3, dtype=torch.long))


def test_cache_in_batches(backbone, texts):
    """Texts of different lengths, shuffled, and with less padding than they were read with."""
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta="low_rank").eval()
    train(tasks, texts, steps=3)
    cache = tasks.cache("tone", [texts, texts], dtype=None)
    assert len(cache) == 6 and cache.lengths == [9, 6, 4] * 2
    with torch.no_grad():
        expected = tasks(texts)["tone"]
        torch.testing.assert_close(tasks.run("tone", cache[[5, 1]]), expected[[2, 1]], atol=1e-5, rtol=1e-4)
    half = tasks.cache("tone", [texts])
    assert half.nbytes * 4 == cache.nbytes
    assert half[[0]].slots.dtype == torch.float32
    with pytest.raises(ValueError, match="indices: expected at least one"):
        cache[[]]


def test_parts_of_a_cache():
    tasks = sharing.MultiTask(make_bert(), {"tone": 2})
    cache = tasks.cache("tone", [torch.arange(15).view(3, 5)])
    for part, rows in ((slice(0, 2), [0, 1]), (slice(None), [0, 1, 2]), (torch.tensor([2, 0]), [2, 0])):
        assert torch.equal(cache[part].slots, cache[rows].slots)
    for wrong, error, message in (
        (0, TypeError, "indices: expected a sequence of integers, got 0"),
        ([3], IndexError, "indices: expected indices from 0 to 2, got 3"),
        (slice(3, 9), ValueError, "indices: expected at least one, got none"),
    ):
        with pytest.raises(error, match=message):
            cache[wrong]


@pytest.mark.parametrize("delta", ["none", "dense"])
def test_labels_of_tokens_keep_their_places_in_a_cache(delta):
    tasks = change(sharing.MultiTask(make_bert(), {"names": ("tokens", 3)}, delta=delta))
    ids = torch.arange(18).view(3, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = tasks(inputs)["names"]
    cache = tasks.cache("names", [inputs], dtype=None)
    assert cache.lengths == [4, 3, 5]
    for rows in ([0, 1, 2], [2, 1], [1]):
        features = cache[rows]
        length = features.mask.shape[1]
        assert torch.equal(features.mask, mask[rows, :length].bool())
        got, tokens = tasks.run("names", features), features.mask
        torch.testing.assert_close(got[tokens], expected[rows][:, :length][tokens], atol=1e-5, rtol=1e-4)


def test_training_by_trainer(backbone, texts, tmp_path):
    from transformers import Trainer, TrainingArguments

    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta="low_rank")
    model = tasks.task_model("tone")
    rows = [{key: value[n] for key, value in texts.items()} | {"labels": n % 2} for n in range(3)] * 4
    arguments = TrainingArguments(
        tmp_path, max_steps=4, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=1e-2
    )
    before = tasks.get_task("tone").head.weight.clone()
    Trainer(model, arguments, train_dataset=rows).train()
    assert not torch.equal(before, tasks.get_task("tone").head.weight)
    assert len(model.state_dict()) == len(tasks.get_task("tone").state_dict())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_models_for_trainers_take_positions():
    tasks = sharing.MultiTask(make_bert(), {"tone": 2}, delta="none")
    model = tasks.task_model("tone").eval()
    ids, places = torch.arange(10).view(2, 5), torch.arange(5).flip(0).expand(2, 5)
    inputs = {"input_ids": ids, "position_ids": places}
    assert torch.equal(model(**inputs)["logits"], tasks.eval()(inputs)["tone"])
    assert not torch.equal(model(**inputs)["logits"], model(ids)["logits"])
