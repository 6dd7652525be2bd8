"""Source and target differ in nothing but their sizes: other settings, activations and types are refused."""

import functools

import pytest
from growing import CHANGES, build, build_encoder, build_llama, build_timm_vit, check_refused, make_inputs
from growing import fixed_seed as fixed_seed
from torch import nn

from pycodesign import growth


@pytest.mark.parametrize(
    ("build_one", "text"),
    [
        (
            lambda wide: [nn.Conv2d(3, 4, 3, stride=1 + wide), nn.Conv2d(4, 2, 1)],
            r"stride=\(1, 1\) in 0, .* got \(2, 2\)",
        ),
        (lambda wide: [nn.Conv2d(3, 4, 3, padding=1 - wide), nn.Conv2d(4, 2, 1)], "padding="),
        (lambda wide: [nn.Linear(3, 4), nn.LeakyReLU(0.1 + wide), nn.Linear(4, 2)], "negative_slope=0.1 in 1"),
        (
            lambda wide: [nn.Linear(3, 4), nn.ReLU() if wide else nn.GELU(), nn.Linear(4, 2)],
            "expected GELU as 1, .* got ReLU as 1",
        ),
        (lambda wide: [nn.Linear(3, 4), *[nn.ReLU(), nn.Linear(4, 4)] * wide, nn.Linear(4, 2)], "exact would be 2"),
    ],
)
def test_models_that_differ_in_more_than_size(build_one, text):
    source, target = (nn.Sequential(*build_one(wide)) for wide in (False, True))
    with pytest.raises(ValueError, match=text):
        growth.grow(source, target)


def test_settings_in_lists():
    source, target = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d([k, k]), nn.Flatten()) for k in (2, 3))
    check_refused(source, target, r"target: expected kernel_size=\(2, 2\) in 1, as the source's, got \(3, 3\)")


@pytest.mark.parametrize(
    ("build_one", "old", "new", "text"),
    [
        (build_timm_vit, {}, {"global_pool": "avg", "fc_norm": False}, "global_pool='token' in the model, .*got 'avg'"),
        (
            build_timm_vit,
            {"reg_tokens": 2},
            {"reg_tokens": 2, "pool_include_prefix": True},
            "pool_include_prefix=False",
        ),
        (functools.partial(build_encoder, "Bert"), {}, {"is_decoder": True}, "is_decoder False .*, got True"),
        (functools.partial(build_encoder, "ViT"), {}, {"pooler_act": "relu"}, "pooler_act 'tanh' .*, got 'relu'"),
        (
            build_llama,
            {"rope_scaling": (dynamic := {"rope_type": "dynamic", "factor": 2.0}), "max_position_embeddings": 64},
            {"rope_scaling": dynamic, "max_position_embeddings": 32},
            "max_position_embeddings 64 as the source's, got 32",
        ),
    ],
)
def test_settings_that_no_tensor_shows(build_one, old, new, text):
    with pytest.raises(ValueError, match=f"target: expected {text}"):
        growth.grow(build_one(**old), build_one(D=48, H=12, **new))


def test_activations_are_compared_and_dropout_is_not():
    source = build("timm vit")
    with pytest.raises(ValueError, match=r"target: expected GELU as blocks\.0\.mlp\.act, as the source's, got ReLU"):
        growth.grow(source, build_timm_vit(**CHANGES["2x"], act_layer=nn.ReLU))
    target = build_timm_vit(**CHANGES["deeper"], drop_path_rate=0.1, proj_drop_rate=0.1).double()
    assert growth.grow(source, target, inputs=make_inputs("timm vit")).difference <= 1e-12


def test_types_of_one_name_are_told_apart():
    source, target = build_timm_vit(), build_timm_vit(D=48, H=12, norm_layer=nn.LayerNorm)
    text = r"timm\.layers\.norm\.LayerNorm as blocks\.0\.norm1, as the source's, got torch\.nn\..*\.LayerNorm"
    with pytest.raises(ValueError, match=f"target: expected {text}"):
        growth.grow(source, target)
