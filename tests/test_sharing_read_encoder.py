"""`read_encoder`: which backbones it refuses, and that reading leaves them as they were."""

from __future__ import annotations

import threading
import types

import pytest
import sharing_models
import torch
from sharing_models import SIZES, VOCABULARY, Own, make_bert, make_stack
from torch import nn
from transformers import BertConfig, BertModel, BigBirdConfig, BigBirdModel, LongformerConfig, LongformerModel

from pycodesign import sharing

backbone = sharing_models.backbone


def test_backbones_that_are_no_such_encoders(backbone):
    long = {"vocab_size": VOCABULARY, "max_position_embeddings": 600, **SIZES}
    for wrong in (BigBirdModel(BigBirdConfig(**long, block_size=8)), LongformerModel(LongformerConfig(**long))):
        with pytest.raises(TypeError, match=f"backbone: expected a bare BERT.*, got {type(wrong).__name__}"):
            sharing.read_encoder(wrong.eval())  # like BERT on short texts alone

    class Windowed(BertModel):
        def forward(self, input_ids, attention_mask):
            order = abs(torch.arange(input_ids.shape[1])[:, None] - torch.arange(input_ids.shape[1]))
            return super().forward(input_ids, (order < 9) & (attention_mask[:, None, None] > 0))

    with pytest.raises(ValueError, match="outputs that differ from those by"):
        sharing.read_encoder(Windowed(BertConfig(vocab_size=VOCABULARY, **SIZES)).eval())
    decoder = BertModel(BertConfig(vocab_size=VOCABULARY, is_decoder=True, **SIZES))
    with pytest.raises(ValueError, match="backbone: expected an encoder"):
        sharing.read_encoder(decoder)
    backbone.encoder.layer[1].attention.output.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="outputs that differ from those by"):
        sharing.read_encoder(backbone)
    layer = nn.TransformerEncoderLayer(32, 4, 64)
    with pytest.raises(ValueError, match="batch_first=True"):
        sharing.read_encoder(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    half = BertModel(BertConfig(vocab_size=VOCABULARY, **SIZES)).to(torch.bfloat16)
    with pytest.raises(TypeError, match=r"backbone: expected float32 in host memory, got torch.bfloat16"):
        sharing.MultiTask(half, {}).build_engine()


class Doubled(nn.TransformerEncoderLayer):
    """Torch's layer, and then something else."""

    def forward(self, *arguments, **options):
        return 2 * super().forward(*arguments, **options)


def test_layers_that_do_something_else():
    stack = nn.TransformerEncoder(Doubled(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False)
    hooked = make_stack()
    hooked.layers[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    for wrong in (stack, Own(stack), hooked, Own(hooked)):
        with pytest.raises(ValueError, match="outputs that differ from those by"):
            sharing.read_encoder(wrong)


@pytest.mark.parametrize("place", ["attention.self.query", "output.dense"])
@pytest.mark.parametrize(
    "change_weight",
    [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm],
)
def test_weights_that_are_computed(place, change_weight):
    bert = make_bert()
    change_weight(bert.encoder.layer[1].get_submodule(place))
    with pytest.raises(ValueError, match=r"backbone: expected a parameter as each weight .* for 1\.(query|down)"):
        sharing.read_encoder(bert)
    stack = make_stack()
    nn.utils.parametrizations.weight_norm(stack.layers[0].self_attn, "in_proj_weight")
    with pytest.raises(ValueError, match="backbone: expected a parameter as each weight"):
        sharing.read_encoder(stack)


@pytest.mark.parametrize("config", [{"width": 16}, types.SimpleNamespace(width=16), "small"])
def test_own_backbones_may_have_a_config(config):
    own = Own()
    own.config = config
    assert sharing.MultiTask(own, {"tone": 2})(torch.zeros(2, 3, dtype=torch.long))["tone"].shape == (2, 2)


def test_backbones_are_read_as_they_compute_in_evaluation():
    backbone = make_bert().train()
    sharing.read_encoder(backbone)
    assert all(module.training for module in backbone.modules())
    sharing.MultiTask(backbone, {})
    assert not any(module.training for module in backbone.modules())


def test_a_refused_backbone_stays_as_it_is():
    for backbone, options in (
        (nn.TransformerEncoder(Doubled(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False), {}),
        (nn.Linear(2, 2), {}),
        (make_stack(), {"delta": "full"}),
    ):
        with pytest.raises((TypeError, ValueError)):
            sharing.MultiTask(backbone.train(), {"tone": 2}, **options)
        assert all(module.training for module in backbone.modules())
        assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_backbones_are_read_by_several_threads():
    stack = make_stack().train()
    barrier = threading.Barrier(4)

    def read():
        barrier.wait()
        for _ in range(20):
            sharing.read_encoder(Own(stack))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(module.training for module in stack.modules())
