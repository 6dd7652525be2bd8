"""What no shape shows: shared parameters, groups, settings, buffers, modes; refused before anything is written."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pycodesign import growth
from pycodesign.growth.modules import list_tensors
from pycodesign.growth.spec import Layer, Role


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def check_refused(source, target, text, error=ValueError, **options):
    """Refused, and nothing written."""
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(error, match=text):
        growth.grow(source, target, **options)
    for key, value in target.state_dict().items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, before[key])


class Tied(nn.Module):
    """An embedding, a norm and an output layer; their order of definition is what is tested."""

    def __init__(self, width, head_first=False):
        super().__init__()
        head = nn.Linear(width, 10, bias=False)
        if head_first:
            self.head = head
        self.embed, self.norm = nn.Embedding(10, width), nn.LayerNorm(width)
        if not head_first:
            self.head = head
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.norm(self.embed(x)))


TIED = {
    "embed": growth.embedding("stream"),
    "norm": growth.layer_norm("stream"),
    "head": growth.linear("stream", None),
}


def test_a_tied_output_layer_that_the_spec_does_not_tie():
    spec = growth.Spec("tied", TIED, spaces={"stream": "mean"})
    text = "spec: expected embed.weight and head.weight, which are one, to mean the same, or to be tied"
    check_refused(Tied(8).double(), Tied(16).double(), text, spec=spec)


@pytest.mark.parametrize("head_first", [False, True])
def test_tied_layers_in_either_order(head_first):
    spec = growth.Spec("tied", TIED, spaces={"stream": "mean"}, tied={"head": "norm"})
    source, target = (Tied(width, head_first).double() for width in (8, 20))
    assert growth.grow(source, target, spec=spec, inputs=torch.arange(10)).difference <= 1e-12


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class Repeated(nn.Module):
    """One block, several times."""

    def __init__(self, width, hidden, times):
        super().__init__()
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, 5)
        self.blocks = nn.ModuleList([Block(width, hidden)] * times)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_blocks_that_are_one():
    spec = growth.Spec(
        "repeated",
        {
            "embed": growth.linear(None, "stream"),
            "blocks.*.norm": growth.layer_norm("stream"),
            "blocks.*.fc1": growth.linear("stream", "hidden"),
            "blocks.*.fc2": growth.linear("hidden", "stream"),
            "head": growth.linear("stream", None),
        },
        spaces={"stream": "mean"},
        blocks={"blocks.*": 0},
        silence=["blocks.*.fc2"],
    )
    x = torch.randn(4, 8, dtype=torch.float64)
    source = Repeated(8, 12, 2).double()
    assert growth.grow(source, Repeated(16, 24, 2).double(), spec=spec, inputs=x).difference <= 1e-12
    text = "target: expected blocks that share what the source's do, got others: blocks.2.fc1.bias and blocks.0.fc1"
    check_refused(source, Repeated(16, 24, 3).double(), text, spec=spec)


@pytest.mark.parametrize(("old", "new"), [((4, 2), (8, 4)), ((4, 2), (4, 1))])
def test_groups_that_no_weight_shows(old, new):
    def build_one(width, groups):
        return nn.Sequential(nn.Conv2d(3, width, 1), nn.Conv2d(width, 8, 1, groups=groups), nn.Linear(4, 4)).double()

    with pytest.raises(ValueError, match=r"groups; exact would be|1.weight: expected 2 in axis 1"):
        growth.grow(build_one(*old), build_one(*new))


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


def test_fused_spaces_of_several_kinds():
    layers = {"in": growth.linear(None, "q+k+v+hidden"), "out": growth.linear("hidden", None)}
    heads = growth.Heads(2, 2), growth.Heads(4, 4)
    old, new = {"in.weight": (34, 3), "out.weight": (3, 10)}, {"in.weight": (66, 3), "out.weight": (3, 18)}
    rule = growth.make_plan(old, new, growth.Spec("parallel", layers), heads=heads).rules[0]
    index = rule.axes[0].index
    assert index[:16].max() == 7 and index[16:32].min() == 8 and index[48:].tolist() == [*range(24, 34), *range(24, 32)]
    means = growth.Spec("two", {"fc": growth.linear(None, "stream+stream")}, spaces={"stream": "mean"})
    assert growth.make_plan({"fc.weight": (8, 3)}, {"fc.weight": (16, 3)}, means)
    with pytest.raises(growth.Inexact, match="8 -> 12, of spaces one after the other; exact would be"):
        growth.make_plan({"fc.weight": (8, 3)}, {"fc.weight": (12, 3)}, means)


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


def test_eps_of_norms_without_parameters():
    source, target = (
        nn.Sequential(nn.Linear(8, w), nn.LayerNorm(w, eps, elementwise_affine=False), nn.Linear(w, 4)).double()
        for w, eps in ((8, 0.5), (16, 1e-5))
    )
    x = torch.randn(5, 8, dtype=torch.float64)
    assert growth.grow(source, target, inputs=x).difference <= 1e-12
    assert target[1].eps == 0.5


class Table(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, width), nn.Linear(width, 4)
        self.register_buffer("table", torch.randn(6, width), persistent=False)

    def forward(self, x):
        return self.head(self.embed(x) + self.table)


def test_buffers_outside_the_state():
    spec = growth.Spec("table", {"embed": growth.embedding("stream"), "head": growth.linear("stream", None)})
    text = r"target: expected buffers outside its state as the source's, got table, \(6, 8\) -> \(6, 16\)"
    check_refused(Table(8), Table(16), text, spec=spec)


def test_settings_in_lists():
    source, target = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d([k, k]), nn.Flatten()) for k in (2, 3))
    check_refused(source, target, r"target: expected kernel_size=\(2, 2\) in 1, as the source's, got \(3, 3\)")


def test_plans_that_cannot_be_written():
    wide = growth.Spec("wide", {"w": growth.parameter("a", "b", "c")})
    with pytest.raises(ValueError, match=r"w: expected one axis, or the first two, to grow, got \[0, 1, 2\]"):
        growth.make_plan({"w": (2, 2, 2)}, {"w": (4, 4, 4)}, wide)
    with pytest.raises(ValueError, match=r"w: expected one axis, or the first two, to grow, got \[0, 2\]"):
        growth.make_plan({"w": (2, 2, 2)}, {"w": (4, 2, 4)}, wide)


def build_mlp(width, dtype=torch.float64):
    return nn.Sequential(nn.Linear(8, width), nn.Dropout(0.1), nn.ReLU(), nn.Linear(width, 4)).to(dtype)


def test_inputs_that_the_target_cannot_take():
    x = torch.randn(3, 8, dtype=torch.float64)
    check_refused(build_mlp(8), build_mlp(16, torch.float32), "dtype", RuntimeError, inputs=x)


class Stateful(nn.Sequential):
    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def test_extra_state_that_is_no_tensor():
    spec = growth.Spec("stateful", {"0": growth.linear(None, "hidden"), "1": growth.linear("hidden", None)})
    source, target = (Stateful(nn.Linear(8, width), nn.Linear(width, 4)).double() for width in (8, 16))
    x = torch.randn(3, 8, dtype=torch.float64)
    assert growth.grow(source, target, spec=spec, inputs=x).difference <= 1e-12


def test_averages_of_two_kinds():
    source, target = build_mlp(8), build_mlp(16)
    average, plain = AveragedModel(source), copy.deepcopy(target)
    growth.grow(source, target, ema=average, target_ema=plain)
    counting = AveragedModel(target)
    text = "target_ema: expected a Sequential as ema, which counts no updates, got AveragedModel"
    check_refused(source, target, text, ema=copy.deepcopy(source), target_ema=counting)


def test_a_schedule_keeps_what_is_frozen_and_modes_and_dtypes():
    model = build_mlp(8, torch.float32)
    model[0].weight.requires_grad_(False)
    model[1].eval()
    model[3].to(torch.float64)
    larger, _ = growth.Schedule([(0, lambda: build_mlp(16))]).grow(0, model)
    assert [p.requires_grad for p in larger.parameters()] == [False, True, True, True]
    assert [p.dtype for p in larger.parameters()] == [torch.float32] * 2 + [torch.float64] * 2
    assert larger.training and not larger[1].training and larger[2].training


def test_a_refused_stage_leaves_the_average():
    model = build_mlp(8)
    average = AveragedModel(model)
    before = copy.deepcopy(average.state_dict())
    schedule = growth.Schedule([(0, lambda: build_mlp(16)), (1, lambda: build_mlp(12))])
    with pytest.raises(ValueError, match="expected at least 16"):
        schedule.grow(1, model, ema=average)
    assert all(torch.equal(value, before[key]) for key, value in average.state_dict().items())
    assert schedule.stage == 0


@pytest.mark.parametrize("mode", ["exact", "break_symmetry"])
def test_names_in_groups_are_the_targets(mode):
    source, target = build_mlp(8), build_mlp(16)
    named = [*source.named_parameters()]
    adam = torch.optim.AdamW([{"params": named[:1]}, {"params": named[1:]}])
    adam.param_groups[0]["param_names"] = ["another"]
    larger = growth.schedule.copy_optimizer(source, target, adam)
    growth.grow(source, target, optimizer=adam, target_optimizer=larger, mode=mode)
    names = {id(tensor): name for name, tensor in list_tensors(target).items()}
    assert all(group["param_names"] == [names[id(p)] for p in group["params"]] for group in larger.param_groups)
    assert sum(len(group["params"]) for group in larger.param_groups) == 4


def test_empty_groups_stay():
    source, target = build_mlp(8), build_mlp(16)
    adam = torch.optim.AdamW([{"params": source.parameters()}, {"params": [], "lr": 0.5}])
    larger = torch.optim.AdamW(target.parameters())
    growth.grow(source, target, optimizer=adam, target_optimizer=larger, mode="exact")
    assert larger.param_groups[-1]["lr"] == 0.5 and larger.param_groups[-1]["params"] == []


def test_exact_growth_under_a_schedule_of_learning_rates():
    source, target = build_mlp(8), build_mlp(16)
    adams = [torch.optim.AdamW(model.parameters()) for model in (source, target)]
    torch.optim.lr_scheduler.StepLR(adams[1], 1)
    text = "mode: expected 'break_symmetry' with a schedule of learning rates"
    check_refused(source, target, text, optimizer=adams[0], target_optimizer=adams[1], mode="exact")


def test_proxies_from_scratch_train_as_the_source_does():
    pytest.importorskip("scipy")
    source, seen = build_mlp(8), []
    sgd = torch.optim.SGD(source.parameters(), lr=0.25)

    def train(model, optimizer, first, last):
        seen.append((type(optimizer), optimizer.param_groups[0]["lr"]))

    candidates = {str(width): lambda width=width: build_mlp(width) for width in (12, 16)}

    def score(model):
        return float(model[0].out_features)

    growth.compare_proxies(source, candidates, train, score, steps=[1], final_steps=2, optimizer=sgd)
    assert set(seen) == {(torch.optim.SGD, 0.25)}


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


class Config:
    def __init__(self, width):
        self.width = width

    def to_dict(self):
        return {"model_type": "own", "width": self.width}


def test_a_config_of_both_models():
    source, target = build_mlp(8), build_mlp(16)
    source.config = target.config = Config(8)
    check_refused(source, target, "target: expected a config of its own, which holds its sizes, got the source's")
    target.config = Config(16)
    growth.grow(source, target)
