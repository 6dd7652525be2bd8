"""Variants of the models of timm and transformers: those that grow, those that grow only by multiples, unknown ones."""

import functools
import importlib

import pytest
import timm.models as timm
import torch
import transformers
from growing import (
    CHANGES,
    CLASSES,
    WIDER,
    X,
    build_gpt2,
    build_resnet,
    build_timm_vit,
    check_refused,
    make_inputs,
    randomize,
)
from growing import fixed_seed as fixed_seed
from torch import nn

from pycodesign import growth

# timm


@pytest.mark.parametrize("name", ["resnet18d", "seresnet18"])
def test_variants_of_resnets(name):
    source, target = (
        timm.create_model(name, channels=[width * n for n in (1, 2, 3, 4)], num_classes=CLASSES).double()
        for width in (8, 12)
    )
    assert growth.grow(source, target, inputs=make_inputs("resnet")).difference <= 1e-12


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"act_layer": nn.SiLU}, r"layer1\.2\.conv1\.weight: no block of timm_resnet can be an identity"),
        ({"act_layer": nn.LeakyReLU}, "no block of timm_resnet can be an identity"),
        ({"norm_layer": functools.partial(nn.BatchNorm2d, affine=False)}, "no parameters that make layer1.2.bn2 zero"),
    ],
)
def test_resnets_whose_blocks_are_no_identities(options, text):
    source = randomize(build_resnet(**options).double())
    with pytest.raises(growth.Inexact, match=f"{text}; exact would be the source's depth"):
        growth.grow(source, build_resnet(L=3, **options))
    target = build_resnet(D=32, **options).double()
    assert growth.grow(source, target, inputs=make_inputs("resnet")).difference <= 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"pre_norm": True},
        {"final_norm": False},
        {"global_pool": "max"},
        {"global_pool": "avgmax"},
        {"norm_layer": functools.partial(nn.LayerNorm, elementwise_affine=False)},
    ],
)
def test_vits_whose_stream_holds_no_means(options):
    source = randomize(build_timm_vit(**options).double())
    with pytest.raises(growth.Inexact, match="stream 24 -> 32; exact would be 48"):
        growth.grow(source, build_timm_vit(D=32, H=8, **options))
    target = build_timm_vit(D=48, H=12, L=3, **options).double()
    assert growth.grow(source, target, inputs=make_inputs("timm vit")).difference <= 1e-12


@pytest.mark.parametrize("pool", ["max", "avgmax", "avg"])
def test_vits_that_pool_behind_the_norm(pool):
    options = {"global_pool": pool, "fc_norm": False}
    source, target = build_timm_vit(**options).double(), build_timm_vit(D=32, H=8, **options).double()
    assert growth.grow(randomize(source), target, inputs=make_inputs("timm vit")).difference <= 1e-12


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"block_fn": timm.vision_transformer.ResPostBlock}, "got ResPostBlock as blocks.0"),
        ({"mlp_layer": importlib.import_module("timm.layers").GluMlp}, "got GluMlp as blocks.0.mlp"),
        ({"norm_layer": nn.RMSNorm}, "got RMSNorm as blocks.0.norm1"),
        ({"act_layer": nn.Softmax}, "got Softmax as blocks.0.mlp.act"),
        ({"mlp_layer": type("Mlp", (importlib.import_module("timm.layers").Mlp,), {})}, "got Mlp as blocks.0.mlp"),
    ],
)
def test_unknown_modules_of_timm(options, text):
    source, target = build_timm_vit(**options), build_timm_vit(**CHANGES["2x"], **options)
    with pytest.raises(ValueError, match=f"spec: expected modules that 'auto' knows, or a Spec, {text}"):
        growth.grow(source, target)


# transformers


class Renamed(transformers.GPT2LMHeadModel):
    """Nothing but a name of its own."""


class Doubled(transformers.GPT2LMHeadModel):
    def forward(self, **inputs):
        return 2 * super().forward(**inputs).logits


class Classifier(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.config = transformers.ViTConfig(
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=width // 4,
            intermediate_size=40,
            image_size=16,
            patch_size=8,
        )
        self.vit, self.classifier = transformers.ViTModel(self.config), nn.Linear(width, 3)

    def forward(self, x):
        return self.classifier(self.vit(x).last_hidden_state.square().mean(1))


def build_as(cls, **sizes):
    return cls(build_gpt2(**sizes).config).double()


def replace_norms(model):
    for block in model.transformer.h:
        block.ln_1 = nn.RMSNorm(model.config.n_embd).double()
    return model


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        (lambda: Classifier(24), lambda: Classifier(32), "'vit', or a Spec, got Classifier as the model"),
        (lambda: build_as(Doubled), lambda: build_as(Doubled, **WIDER), "'gpt2', or a Spec, got Doubled as the model"),
        (
            lambda: replace_norms(build_gpt2()),
            lambda: replace_norms(build_gpt2(**WIDER)),
            "'gpt2', or a Spec, got RMSNorm as transformer.h.0.ln_1",
        ),
    ],
)
def test_modules_that_transformers_does_not_make(source, target, text):
    check_refused(source(), target(), f"spec: expected the modules that transformers makes for {text}")


def test_a_class_of_transformers_may_have_another_name():
    before = torch.get_rng_state()
    source, target = randomize(build_as(Renamed)), build_as(Renamed, **WIDER)
    state = torch.get_rng_state()
    assert growth.grow(source, target, inputs=X).difference <= 1e-12
    assert torch.equal(state, torch.get_rng_state()) and not torch.equal(before, state)
