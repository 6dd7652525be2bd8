"""Inputs of tasks: with padding and masks, by name, images; those that are wrong."""

from __future__ import annotations

import pytest
import sharing_models
import torch
import torch.nn.functional as F
from sharing_models import KINDS, change, make_bert, train
from sharing_models import SMALL_SIZES as SIZES
from sharing_models import SMALL_VOCABULARY as VOCABULARY
from transformers import RobertaConfig, RobertaModel, ViTConfig, ViTModel

from pycodesign import sharing

backbone, texts = sharing_models.backbone, sharing_models.texts


@pytest.mark.parametrize("delta", KINDS, ids=str)
def test_padding_may_come_first(backbone, texts, delta):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta=delta, density=0.1, positions="first")
    train(tasks, texts, steps=3)
    ids = texts["input_ids"][:, :5]
    padded = {
        "input_ids": F.pad(ids, (3, 0)),
        "position_ids": F.pad(torch.arange(5), (3, 0)).expand(3, 8),
        "attention_mask": F.pad(torch.ones_like(ids), (3, 0)),
    }
    expected = tasks(ids)["tone"]
    cached = tasks.run("tone", tasks.cache("tone", [padded], dtype=None)[[0, 1, 2]])
    for own in (tasks(padded)["tone"], tasks.build_engine()(padded)["tone"], cached):
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)


def test_masks_are_taken_wherever_they_are_given(backbone, texts):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta="none").eval()
    expected, ids, mask = tasks(texts)["tone"], texts["input_ids"], texts["attention_mask"]
    for inputs in ({"input_ids": ids, "attention_mask": None}, {"input_ids": ids, "token_type_ids": None}):
        assert torch.equal(tasks(inputs, mask)["tone"], expected)


def test_padding_takes_no_position():
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=20, **SIZES)
    backbone = RobertaModel(config, add_pooling_layer=False).eval()
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta="none").eval()
    ids = torch.full((2, 18), 5)
    padded = F.pad(ids, (0, 2), value=config.pad_token_id)
    expected = tasks(ids)["tone"]
    torch.testing.assert_close(tasks(padded, (padded != config.pad_token_id).long())["tone"], expected)
    with pytest.raises(ValueError, match="inputs: expected at most 18 tokens, got 19"):
        tasks(torch.full((2, 19), 5))


def test_inputs_by_name():
    tasks = change(sharing.MultiTask(make_bert(), {"tone": 2}, delta="low_rank"))
    ids, mask = torch.arange(10).view(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    inputs = {"input_ids": ids, "token_type_ids": (ids > 4).long(), "attention_mask": mask}
    for call in (tasks, tasks.build_engine()):
        expected = call(inputs)["tone"]
        others = {"token_type_ids": inputs["token_type_ids"], "position_ids": None}
        for got in (call(**inputs), call(ids, mask, ["tone"], **others), call({"input_ids": ids}, mask, **others)):
            assert torch.equal(got["tone"], expected)
        with pytest.raises(ValueError, match="input_ids: expected one, got one among the inputs and another"):
            call(ids, input_ids=ids)


def test_images_one_by_one():
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(image_size=8, patch_size=4, **SIZES), add_pooling_layer=False)
    tasks = sharing.MultiTask(vit, {"tone": 2}, delta="none")
    pixels = torch.randn(2, 3, 8, 8)
    assert tasks(pixels)["tone"].shape == (2, 2)
    for wrong in (pixels[0], {"pixel_values": pixels[0]}):
        with pytest.raises(ValueError, match=r"inputs: expected pixel_values \(B, C, H, W\), got .* \(3, 8, 8\)"):
            tasks(wrong)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"inputs_embeds": torch.zeros(2, 5, 16)}, "inputs: expected input_ids or inputs_embeds, got both"),
        ({"attention_mask": torch.full((2, 5), -1.0)}, "attention_mask: expected 1 where a token is and 0 elsewhere"),
        ({"attention_mask": torch.full((2, 5), 0.5)}, "attention_mask: expected 1 where a token is and 0 elsewhere"),
        ({"attention_mask": torch.full((2, 5), torch.nan)}, "attention_mask: expected 1 where a token is"),
        ({"input_ids": torch.ones(2, 5, dtype=torch.uint8)}, "input_ids: expected int32 or int64, got torch.uint8"),
        ({"input_ids": torch.ones(2, 5, dtype=torch.int16)}, "input_ids: expected int32 or int64, got torch.int16"),
        ({"token_type_ids": torch.zeros(2, 4, dtype=torch.long)}, r"token_type_ids: expected \(2, 5\), got \(2, 4\)"),
        ({"position_ids": torch.zeros(3, 5, dtype=torch.long)}, r"position_ids: expected \(2, 5\), got \(3, 5\)"),
    ],
)
def test_inputs_that_are_wrong(inputs, message):
    tasks = sharing.MultiTask(make_bert(), {"tone": 2}, delta="none")
    inputs = {"input_ids": torch.arange(10).view(2, 5), **inputs}
    for call in (tasks, tasks.build_engine()):
        with pytest.raises(ValueError, match=message):
            call(inputs)
