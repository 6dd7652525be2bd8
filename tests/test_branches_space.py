"""Spaces of networks: their architectures, quantizers and growth, and what they refuse."""

from __future__ import annotations

import random

import pytest
import torch
from branch_spaces import (
    NATIVE,
    SMALL,
    one_thread,  # noqa: F401
)

from pycodesign.branches import Architecture, Space, grow_network
from pycodesign.branches.operators import FourBits, Ternary, build_gate, build_operator
from pycodesign.branches.space import GATES, NATIVE_GATES


def test_quantizers():
    w = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for quantizer, most in ((Ternary(), 3), (FourBits(), 15)):
        q = quantizer(w)
        assert all(len(row.unique()) <= most for row in q.detach())
        (gradient,) = torch.autograd.grad(q.sum(), w)
        assert torch.equal(gradient, torch.ones_like(w))  # straight through
    assert torch.equal(Ternary()(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_changes_of_an_architecture():
    space, rng = Space(branches=3, operators=NATIVE, gates=("none", "add"), **SMALL), random.Random(0)
    before = space.sample(rng)

    def choices(architecture):
        operators = [name for segment in architecture.operators for branch in segment for name in branch]
        return operators + [name for row in architecture.gates for name in row]

    changed = set()
    for _ in range(300):
        after = space.change(before, rng)
        space.check(after)
        places = [i for i, (a, b) in enumerate(zip(choices(before), choices(after), strict=True)) if a != b]
        assert len(places) <= 2
        changed.update(places)
    assert changed == set(range(len(choices(before))))


def test_grown_networks_compute_the_same():
    spaces = [Space(branches=3, width=width, segments=3, size=16) for width in (4, 6)]
    for seed in range(4):
        architecture = spaces[0].sample(seed)
        small, large = (space.build(architecture).double() for space in spaces)
        small.train()(torch.rand(8, 1, 16, 16, dtype=torch.double))
        before = large.state_dict()["bodies.head.1.parametrizations.weight.original"].clone()
        report = grow_network(small.eval(), large.eval(), inputs=torch.rand(2, 1, 16, 16, dtype=torch.double))
        assert report.difference < 1e-12
        assert not torch.equal(large.state_dict()["bodies.head.1.parametrizations.weight.original"], before)
    with pytest.raises(ValueError, match="target: expected the architecture of the source, wider, got another one"):
        grow_network(spaces[0].build(spaces[0].sample(0)), spaces[1].build(spaces[1].sample(1)))


def test_architectures_are_text():
    architecture = Space(branches=3).sample(0)
    assert Architecture.from_json(architecture.to_json()) == architecture
    for text in ("", "{}", "[1]", '{"operators": 1, "gates": [], "stem": "shared"}'):
        with pytest.raises(ValueError, match="text: expected an architecture in JSON"):
            Architecture.from_json(text)


def test_deep_text_is_no_architecture() -> None:
    with pytest.raises(ValueError, match="text: expected an architecture in JSON"):
        Architecture.from_json("[" * 100_000)


def test_what_spaces_refuse():
    for options, message in [
        ({"branches": 5}, "branches: expected 1 to 4, got 5"),
        ({"width": 0}, "width: expected an integer >= 1"),
        ({"operators": ("conv5x5",)}, "operators: expected different ones of .*, got 'conv5x5'"),
        ({"operators": ()}, "operators: expected different ones"),
        ({"gates": ("add", "add")}, "gates: expected different ones"),
        ({"gates": ("multiply",)}, "got 'multiply'"),
        ({"stem": "none"}, "stem: expected 'shared' or 'recomputed'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Space(**options)
    space = Space(branches=2, operators=NATIVE, gates=("none",))
    for wrong, message in [
        (Space(branches=3).sample(0), "3 segments of 2 branches of 2 layers"),
        (Architecture(space.sample(0).operators, ()), "2 times 1 gates"),
        (Architecture(((("conv3x3",) * 2,) * 2,) * 3, (("none",),) * 2), "got 'conv3x3'"),
        (Architecture(((("skip",) * 2,) * 2,) * 3, (("add",),) * 2), "got 'add'"),
        (Architecture(((("skip",) * 2,) * 2,) * 3, (("none",),) * 2, "x"), "got 'x'"),
    ]:
        with pytest.raises(ValueError, match=f"architecture: expected .*{message}"):
            space.build(wrong)
    with pytest.raises(TypeError, match="architecture: expected an Architecture, got str"):
        space.build("conv")
    with pytest.raises(ValueError, match=r"operator: expected one of .*, got 'conv5x5'"):
        build_operator("conv5x5", 4, 4)
    with pytest.raises(ValueError, match=r"gate: expected one of add, concatenate, pooled, got .none."):
        build_gate("none", 4)
    assert NATIVE_GATES < set(GATES)
