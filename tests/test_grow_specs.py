"""Models of one's own grow by a `Spec`; specs that contradict themselves, or the model, are refused."""

import pytest
import torch
import torch.nn.functional as F
from growing import CLASSES, check_refused, randomize
from growing import fixed_seed as fixed_seed
from torch import nn

from pycodesign import growth
from pycodesign.growth.spec import Layer, Role


class Residual(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class Mlp(nn.Module):
    def __init__(self, width, hidden, depth):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(8, width), nn.LayerNorm(width), nn.Linear(width, CLASSES)
        self.blocks = nn.ModuleList(Residual(width, hidden) for _ in range(depth))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make_mlp_spec(**changes):
    options = {
        "name": "mlp",
        "layers": {
            "embed": growth.linear(None, "stream"),
            "blocks.*.norm": growth.layer_norm("stream"),
            "blocks.*.fc1": growth.linear("stream", "hidden"),
            "blocks.*.fc2": growth.linear("hidden", "stream"),
            "norm": growth.layer_norm("stream"),
            "head": growth.linear("stream", None),
        },
        "spaces": {"stream": "mean"},
        "blocks": {"blocks.*": 0},
        "silence": ["blocks.*.fc2"],
    }
    return growth.Spec(**{**options, **changes})


def test_own_spec():
    source, target = Mlp(16, 24, 2).double(), Mlp(21, 40, 3).double()
    with pytest.raises(ValueError, match=r"spec: expected a Spec for Mlp"):
        growth.grow(source, target)
    x = torch.randn(4, 8, dtype=torch.float64)
    assert growth.grow(source, target, spec=make_mlp_spec(), inputs=x).difference <= 1e-12


def test_specs_that_contradict_themselves():
    with pytest.raises(ValueError, match="silence: expected patterns of layers, got 'fc3'"):
        make_mlp_spec(silence=["fc3"])
    with pytest.raises(ValueError, match=r"spaces: expected .* for 'stream', got 'means'"):
        make_mlp_spec(spaces={"stream": "means"})
    with pytest.raises(ValueError, match="spaces: expected 'mean', 'zero' or 'repeat' for 'stream'"):
        make_mlp_spec(spaces={})


NAMES = {
    "embed": growth.linear(None, "stream"),
    "blocks.*.fc": growth.linear("stream", "stream", factor="blocks.*.ls.gamma"),
    "blocks.*.ls": growth.layer_scale("stream"),
    "norm": growth.layer_norm("stream"),
}


@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        ({"blocks.*.fc": growth.linear("stream", "stream", factor="blocks.*.ls.gama")}, {}, "factor: expected a param"),
        (
            {"blocks.*.fc": growth.linear("stream", "stream")},
            {},
            "layers: expected a layer whose factor is that",
        ),
        ({}, {"blocks": {"block.*": 0}}, r"blocks: expected beginnings .* one '\*', .*, got 'block\.\*'"),
        ({}, {"blocks": {"*.*": 0}}, r"blocks: expected beginnings"),
        ({"stages.*.blocks.*.fc": growth.keep()}, {"blocks": {"stages.0.blocks.*": 0}}, "blocks: expected beginnings"),
        ({"stages.*.blocks.*.fc": growth.keep()}, {"blocks": {"stages.*.blocks.*": 0}}, "blocks: expected beginnings"),
        (
            {"a.0.b.*.fc": growth.keep(), "a.*.b.*.fc": growth.keep()},
            {"blocks": {"a.0.b.*": 0}},
            r"layers: expected patterns that begin as those of blocks do, 'a\.0\.b\.\*', got 'a\.\*\.b\.\*\.fc'",
        ),
        ({}, {"spaces": {"stream": "mean", "steam": "zero"}}, "spaces: expected names that layers use, got 'steam'"),
    ],
)
def test_names_in_specs(change, options, text):
    growth.Spec("named", NAMES, spaces={"stream": "mean"}, blocks={"blocks.*": 0})
    with pytest.raises(ValueError, match=text):
        growth.Spec("named", {**NAMES, **change}, **{"spaces": {"stream": "mean"}, **options})


def test_heads_that_no_attribute_holds():
    spec = growth.Spec("headed", {"0": growth.linear(None, "q")}, heads="0.num_heads")
    text = "spec: expected heads to name an attribute of Sequential that holds their number, got '0.num_heads'"
    check_refused(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 8)), text, spec=spec)


# Layers of all kinds


class Depthwise(nn.Module):
    def __init__(self, width, norm=False):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 1)
        self.mix = nn.BatchNorm2d(width) if norm else nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.norm(self.mix(self.embed(x)).movedim(1, -1)))


@pytest.mark.parametrize("norm", [False, True])
def test_features_that_are_mapped_one_by_one_hold_no_means(norm):
    spec = growth.Spec(
        "mixer",
        {
            "embed": growth.convolution(None, "stream"),
            "mix": growth.batch_norm("stream") if norm else growth.depthwise("stream"),
            "norm": growth.layer_norm("stream"),
            "head": growth.linear("stream", None),
        },
        spaces={"stream": "mean"},
    )
    source = randomize(Depthwise(8, norm).double())
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert growth.grow(source, Depthwise(16, norm).double(), spec=spec, inputs=x).difference <= 1e-12
    with pytest.raises(growth.Inexact, match=r"mix.weight: stream 8 -> 12; exact would be 16"):
        growth.grow(source, Depthwise(12, norm).double(), spec=spec)


class Fused(nn.Module):
    """Gates and values of one projection, of sizes that differ."""

    def __init__(self, gates, values):
        super().__init__()
        self.sizes = gates, values
        self.first = nn.Linear(6, gates + values)
        self.gate, self.value = nn.Linear(gates, 4), nn.Linear(values, 4)

    def forward(self, x):
        one, other = self.first(x).split(self.sizes, -1)
        return self.gate(one.sigmoid()) * self.value(other)


def test_fused_spaces_of_unequal_sizes():
    layers = {"first": growth.linear(None, "gates+values"), "gate": growth.linear("gates", None)}
    spec = growth.Spec("fused", {**layers, "value": growth.linear("values", None)})
    source, target = Fused(4, 6).double(), Fused(7, 13).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    assert growth.grow(source, target, spec=spec, inputs=x).difference <= 1e-12
    unknown = growth.Spec("fused", {"fc": growth.linear(None, "gates+values")})
    with pytest.raises(ValueError, match=r"fc.weight: expected axes that show the size of gates, apart from"):
        growth.make_plan({"fc.weight": (10, 6)}, {"fc.weight": (20, 6)}, unknown)


class Norm(nn.Module):
    def __init__(self, width, eps, name="eps", affine=True):
        super().__init__()
        if affine:
            self.weight = nn.Parameter(torch.randn(width))
        self.name = name
        setattr(self, name, eps)

    def forward(self, x):
        x = x * (x.square().mean(-1, keepdim=True) + getattr(self, self.name)).rsqrt()
        return x * self.weight if hasattr(self, "weight") else x


class Normed(nn.Module):
    def __init__(self, width, **options):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(8, width), Norm(width, **options), nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.norm(self.embed(x)))


@pytest.mark.parametrize("name", ["eps", "variance_epsilon", "epsilon", "norm_eps"])
def test_names_of_eps(name):
    layers = {"embed": growth.linear(None, "stream"), "norm": growth.rms_norm("stream")}
    spec = growth.Spec("normed", {**layers, "head": growth.linear("stream", None)}, spaces={"stream": "zero"})
    x = torch.randn(5, 8, dtype=torch.float64)
    source, target = (Normed(width, eps=0.3, name=name).double() for width in (8, 12))
    assert growth.grow(source, target, spec=spec, inputs=x).difference <= 1e-12
    source, target = (Normed(width, eps=0.3, name="small").double() for width in (8, 12))
    check_refused(source, target, "target: expected one of the attributes eps, .* in norm, which follows", spec=spec)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, 4)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x):
        x = self.embed(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def test_multihead_attention():
    output = Role("write", "q+k+v")
    spec = growth.Spec(
        "attention",
        {
            "embed": growth.linear(None, "stream"),
            "attention": Layer({"in_proj_weight": (output, Role("read", "stream")), "in_proj_bias": (output,)}),
            "attention.out_proj": growth.linear("o", "stream"),
            "head": growth.linear("stream", None),
        },
        heads="attention.num_heads",
    )
    source, target = Attention(8, 2).double(), Attention(16, 4).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    assert growth.grow(source, target, spec=spec, inputs=x).difference <= 1e-12


class Half(nn.Module):
    """No wrapper, though its only module is called as theirs."""

    def __init__(self, width):
        super().__init__()
        self.module = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 4))
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.module(x) * self.scale


def test_a_model_that_looks_like_a_wrapper():
    layers = {"module.0": growth.linear(None, "hidden"), "module.1": growth.linear("hidden", None)}
    spec = growth.Spec("half", {**layers, "scale": growth.parameter()})
    source, target = Half(12).double(), Half(18).double()
    with torch.no_grad():
        source.scale.fill_(3)
    x = torch.randn(4, 8, dtype=torch.float64)
    assert growth.grow(source, target, spec=spec, inputs=x).difference <= 1e-12
    assert target.scale == 3
