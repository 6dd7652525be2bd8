"""An `nn.Sequential` grows without a spec where what its modules compute is known, and is refused elsewhere."""

import pytest
import torch
from growing import fixed_seed as fixed_seed
from torch import nn

from pycodesign import growth


@pytest.mark.parametrize(
    ("build_one", "change", "exact"),
    [
        (lambda w: [nn.Linear(8, w), nn.ReLU(), nn.LayerNorm(w), nn.Linear(w, 4)], (12, 18), False),
        (lambda w: [nn.Linear(8, w), nn.ReLU(), nn.LayerNorm(w), nn.Linear(w, 4)], (12, 24), True),
        (lambda w: [nn.Linear(8, w), nn.LayerNorm(w), nn.Sigmoid(), nn.Linear(w, 4)], (12, 18), False),
        (lambda w: [nn.Linear(8, w), nn.LayerNorm(w, elementwise_affine=False), nn.Linear(w, 4)], (12, 18), False),
        (lambda w: [nn.Linear(8, w), nn.LayerNorm(w), nn.Tanh(), nn.Linear(w, 4)], (12, 18), True),
        (lambda w: [nn.LayerNorm(8), nn.Linear(8, w), nn.Softplus(), nn.Linear(w, 4)], (12, 18), True),
        (lambda w: [nn.Linear(8, w), nn.ReLU(), nn.Linear(w, 4), nn.LogSoftmax(-1)], (12, 18), True),
        (lambda w: [nn.Unflatten(1, (4, 2)), nn.Linear(2, w), nn.Flatten(), nn.Linear(4 * w, 4)], (12, 18), True),
        (
            lambda w: [nn.Unflatten(1, (4, 2)), nn.Linear(2, w), nn.LayerNorm(w), nn.Flatten(), nn.Linear(4 * w, 4)],
            (12, 18),
            True,
        ),
        (
            lambda w: [nn.Linear(8, w), nn.Softmax(-1), nn.Linear(w, 4)],
            (12, 18),
            "modules that 'auto' knows, got Softmax",
        ),
        (
            lambda w: [nn.Linear(8, w), nn.MaxPool1d(2), nn.Linear(w // 2, 4)],
            (12, 24),
            "1 to work on the last of features 0",
        ),
        (
            lambda w: [nn.Linear(8, w), nn.Flatten(0), nn.Linear(5 * w, 4)],
            (12, 24),
            "1 to work on the last of features 0",
        ),
        (
            lambda w: [nn.Unflatten(1, (1, 8)), nn.Conv1d(1, w, 3), nn.Linear(6, 6), nn.Conv1d(w, 4, 3)],
            (6, 12),
            "2 to work on the channels",
        ),
        (
            lambda w: [nn.Unflatten(1, (4, 2)), nn.Linear(2, w), nn.BatchNorm1d(4), nn.Linear(w, 4)],
            (12, 24),
            "2 of 12 inputs",
        ),
    ],
    ids=[
        "relu then norm",
        "its multiple",
        "norm then sigmoid",
        "norm without gamma",
        "norm then tanh",
        "norm of the input",
        "module behind the last layer",
        "flattened tokens",
        "flattened tokens behind a norm",
        "unknown",
        "pooled features",
        "flattened batch",
        "pixels",
        "norm of tokens",
    ],
)
def test_sequentials_are_read_with_care(build_one, change, exact):
    source, target = (nn.Sequential(*build_one(width)).double() for width in change)
    if isinstance(exact, str):
        with pytest.raises(ValueError, match=f"spec: expected {exact}"):
            growth.grow(source, target)
    elif not exact:
        with pytest.raises(growth.Inexact, match="12 -> 18; exact would be 24"):
            growth.grow(source, target)
    else:
        x = torch.randn(5, 8, dtype=torch.float64)
        assert growth.grow(source, target, inputs=x).difference <= 1e-12


class Squared(nn.ReLU):
    def forward(self, x):
        return super().forward(x) ** 2


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x / x.norm(dim=-1, keepdim=True))


class Residuals(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x)).softmax(-1) @ self[2].weight.mT


def share(modules, one, other):
    modules[other].weight = modules[one].weight
    return modules


@pytest.mark.parametrize(
    ("build_one", "text"),
    [
        (lambda w: [nn.Linear(8, w), nn.LayerNorm(w), nn.Hardtanh(0.2, 1), nn.Linear(w, 4)], "12 -> 18; exact .* 24"),
        (
            lambda w: [nn.Linear(8, w), (act := nn.Sigmoid()), nn.Linear(w, w), nn.LayerNorm(w), act, nn.Linear(w, 4)],
            "features 2 12 -> 18; exact would be 24",
        ),
        (
            lambda w: [nn.Linear(8, w), (norm := nn.LayerNorm(w)), nn.Linear(w, w), norm, nn.Linear(w, 4)],
            "1 and 3 share weight.* exact would be the source's shape, or parameters of their own",
        ),
        (
            lambda w: share([nn.Embedding(9, w), nn.Tanh(), nn.Linear(w, 9, bias=False)], 0, 2),
            r"0 and 2 share weight, \(9, 12\) -> \(9, 18\)",
        ),
        (lambda w: [nn.Embedding(9, w, max_norm=1.0), nn.Linear(w, 4)], "0 limits the norm of 12 -> 18.* be 12"),
        (lambda w: [nn.Linear(8, w), Squared(), nn.Linear(w, 4)], "knows, got Squared as 1"),
        (lambda w: [nn.Linear(8, w), nn.ReLU(), Scaled(w, w), nn.Linear(w, 4)], "knows, got Scaled as 2"),
        (
            lambda w: [nn.Linear(8, w), Residuals(nn.Linear(w, w), nn.Tanh(), nn.Linear(w, w)), nn.Linear(w, 4)],
            "got Residuals as 1",
        ),
    ],
)
def test_sequentials_that_compute_something_else(build_one, text):
    source, target = (nn.Sequential(*build_one(width)) for width in (12, 18))
    with pytest.raises(ValueError, match=text):
        growth.grow(source, target)


def test_a_sequential_with_a_forward_of_its_own():
    source, target = (Residuals(nn.Linear(8, w), nn.Tanh(), nn.Linear(w, 8)) for w in (12, 18))
    with pytest.raises(ValueError, match="spec: expected a Spec for Residuals"):
        growth.grow(source, target)


def test_eps_of_norms_without_parameters():
    source, target = (
        nn.Sequential(nn.Linear(8, w), nn.LayerNorm(w, eps, elementwise_affine=False), nn.Linear(w, 4)).double()
        for w, eps in ((8, 0.5), (16, 1e-5))
    )
    x = torch.randn(5, 8, dtype=torch.float64)
    assert growth.grow(source, target, inputs=x).difference <= 1e-12
    assert target[1].eps == 0.5


# Convolutions


def test_transposed_and_depthwise_convolutions():
    def build_one(width, factor=2):
        return nn.Sequential(
            nn.ConvTranspose2d(3, width, 2),
            nn.ReLU(),
            nn.Conv2d(width, factor * width, 3, groups=width),
            nn.ReLU(),
            nn.Conv2d(factor * width, 4, 1),
        ).double()

    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert growth.grow(build_one(6), build_one(8), inputs=x).difference <= 1e-12
    with pytest.raises(growth.Inexact, match="2: a convolution of 6 -> 6 groups"):
        growth.grow(build_one(6), build_one(6, 3))


def test_convolutions_in_three_dimensions():
    def build_one(width):
        layers = [nn.Conv3d(1, width, 2), nn.BatchNorm3d(width), nn.ReLU(), nn.Conv3d(width, width, 1, groups=width)]
        return nn.Sequential(*layers, nn.ConvTranspose3d(width, 2 * width, 2), nn.Flatten(), nn.Linear(54 * width, 4))

    source, target = build_one(4).double(), build_one(6).double()
    adams = torch.optim.AdamW(source.parameters()), torch.optim.AdamW(target.parameters())
    x = torch.randn(2, 1, 3, 3, 3, dtype=torch.float64)
    source(x).sum().backward()
    adams[0].step()
    options = {"optimizer": adams[0], "target_optimizer": adams[1]}
    assert growth.grow(source, target, inputs=x, **options).difference <= 1e-12


@pytest.mark.parametrize(("old", "new"), [((4, 2), (8, 4)), ((4, 2), (4, 1))])
def test_groups_that_no_weight_shows(old, new):
    def build_one(width, groups):
        return nn.Sequential(nn.Conv2d(3, width, 1), nn.Conv2d(width, 8, 1, groups=groups), nn.Linear(4, 4)).double()

    with pytest.raises(ValueError, match=r"groups; exact would be|1.weight: expected 2 in axis 1"):
        growth.grow(build_one(*old), build_one(*new))
