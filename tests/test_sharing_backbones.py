"""Backbones of transformers, of torch and of one's own: what encoders compute of them, in every dtype."""

from __future__ import annotations

import pytest
import sharing_models
import torch
import torch.nn.functional as F
from sharing_models import KINDS, LABELS, SIZES, VOCABULARY, train
from sharing_models import OwnWithPositions as Own
from torch import nn
from transformers import (
    Data2VecTextConfig,
    Data2VecTextModel,
    DeiTConfig,
    DeiTModel,
    ElectraConfig,
    ElectraModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

from pycodesign import sharing

backbone, texts = sharing_models.backbone, sharing_models.texts


def test_encoders_compute_what_backbones_do():
    torch.manual_seed(0)
    sizes = {**SIZES, "image_size": 16, "patch_size": 4}
    roberta = RobertaModel(RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=20, pad_token_id=1, **SIZES))
    electra = ElectraModel(ElectraConfig(vocab_size=VOCABULARY, embedding_size=32, **SIZES))
    for backbone, inputs in (
        (ViTModel(ViTConfig(**sizes)), {"pixel_values": torch.randn(2, 3, 16, 16)}),
        (DeiTModel(DeiTConfig(**sizes)), {"pixel_values": torch.randn(2, 3, 16, 16)}),
        (electra, {"input_ids": torch.randint(VOCABULARY, (2, 9))}),
        (roberta, {"input_ids": torch.randint(2, VOCABULARY, (2, 18))}),
    ):
        encoder = sharing.read_encoder(backbone.eval())
        with torch.no_grad():
            h = encoder.run(inputs)[1][-1].h
            h = h if encoder.norm is None else encoder.norm(h)
            torch.testing.assert_close(h, backbone(**inputs).last_hidden_state, atol=1e-5, rtol=1e-4)
    assert sharing.read_encoder(roberta).longest == 18
    data2vec = Data2VecTextModel(Data2VecTextConfig(vocab_size=VOCABULARY, max_position_embeddings=20, **SIZES))
    assert sharing.read_encoder(data2vec.eval()).longest == 18
    tasks = sharing.MultiTask(ViTModel(ViTConfig(**sizes)), {"kind": 4}, delta="low_rank", positions="first").eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(tasks.build_engine()(images)["kind"], tasks(images)["kind"], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_encoder(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first, activation=F.gelu)
    stack = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32) if norm_first else None, enable_nested_tensor=False)
    tasks = sharing.MultiTask(stack, {"tone": 2}, delta="low_rank").eval()
    x, mask = torch.randn(2, 7, 32), torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    _, layers = tasks.encoder.run({"inputs_embeds": x}, mask.bool())
    expected = stack.eval()(x, src_key_padding_mask=mask == 0)
    h = layers[-1].h if tasks.encoder.norm is None else tasks.encoder.norm(layers[-1].h)
    torch.testing.assert_close(h[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tasks.build_engine()(x, mask)["tone"], tasks(x, mask)["tone"], atol=2e-6, rtol=1e-5)


def test_own_protocol():
    tasks = sharing.MultiTask(Own(), {"tone": 2}, delta="low_rank")
    assert tasks(torch.zeros(2, 12, dtype=torch.long))["tone"].shape == (2, 2)
    with pytest.raises(ValueError, match="at most 12 tokens, got 13"):
        tasks(torch.zeros(2, 13, dtype=torch.long))
    own = tasks.backbone
    assert tasks.encoder.count_parameters() == sum(parameter.numel() for parameter in own.parameters())


@pytest.mark.parametrize("delta", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_backbones_of_other_dtypes(backbone, texts, delta, dtype):
    """Tasks stay float32, unless they are converted, too."""
    tasks = sharing.MultiTask(backbone.to(dtype), LABELS, delta=delta, density=0.1)
    train(tasks, texts, steps=2)
    logits = tasks(texts)
    cached = tasks.run("tone", tasks.cache("tone", [texts])[[0, 1, 2]])
    torch.testing.assert_close(cached, logits["tone"], atol=0.05, rtol=0.05)
    assert {own.dtype for own in logits.values()} == {torch.float32}
    for own in (torch.float64, torch.bfloat16):
        converted = tasks.to(own)(texts)
        assert {logits.dtype for logits in converted.values()} == {own}
        torch.testing.assert_close(converted["topic"].float(), logits["topic"], atol=0.05, rtol=0.05)


def test_backbones_that_change(backbone, texts):
    """What is computed follows the backbone's weights, and an engine, which has copies, refuses."""
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta={"up": "dense", "query": "dense"}).eval()
    engine = tasks.build_engine()
    before = engine(texts)["tone"]
    backbone.train()
    assert torch.equal(engine(texts)["tone"], before) and not backbone.training
    state = {key: value + 0.1 * torch.randn_like(value) for key, value in backbone.state_dict().items()}
    for assign in (True, False):
        backbone.load_state_dict(state, assign=assign)
        named, mask = tasks.check_inputs(texts["input_ids"])
        expected = backbone(texts["input_ids"]).last_hidden_state
        torch.testing.assert_close(tasks.encoder.run(named, mask)[1][-1].h, expected, atol=1e-5, rtol=1e-4)
        with pytest.raises(RuntimeError, match="backbone: expected the weights that the engine was built on"):
            engine(texts)
        with pytest.raises(RuntimeError, match="build it again"):
            engine.add_task("other", tasks.get_task("tone"))
        engine = tasks.build_engine()
        torch.testing.assert_close(engine(texts)["tone"], tasks(texts)["tone"], atol=2e-6, rtol=1e-5)
        state = {key: value + 0.1 for key, value in state.items()}
