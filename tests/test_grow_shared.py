"""What models share, and hold beside parameters: tied layers, repeated blocks, buffers, extra state, configs."""

import pytest
import torch
import torch.nn.functional as F
from growing import CHANGES, build, build_mlp, check_refused, make_inputs
from growing import fixed_seed as fixed_seed
from torch import nn

from pycodesign import growth


def test_untied_output_layer():
    source, target = build("gpt2"), build("gpt2 untied", **CHANGES["2x"])
    assert growth.grow(source, target, inputs=make_inputs("gpt2")).difference <= 1e-12
    with pytest.raises(growth.Inexact, match="tied"):
        growth.grow(source, target, mode="exact")
    with pytest.raises(ValueError, match="tied"):
        growth.grow(build("gpt2 untied"), build("gpt2", **CHANGES["2x"]))


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


# No parameters


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
