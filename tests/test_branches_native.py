"""Networks as native bodies: which layers become chains, that these compute as torch does, and what stays torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from branch_spaces import (
    NATIVE,
    SMALL,
    one_thread,  # noqa: F401
)
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pycodesign.branches import LatencyTable, Network, Part, Space, describe_machine, place
from pycodesign.branches.lowering import CannotChain, build_chain
from pycodesign.branches.operators import BranchBody, Concatenate, Ternary, build_gate, build_operator, quantize
from pycodesign.repetition.chain import Chain

# Layers


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + super().forward(x)
        return found


class Twice(nn.AvgPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def conv(**options: Any) -> nn.Module:
    return quantize(nn.Conv2d(4, 4, 3, **{"padding": 1, **options}), Ternary())


def norm(**options: Any) -> nn.BatchNorm2d:
    found = nn.BatchNorm2d(4, **options)
    for name, value in found.state_dict().items():
        if value.ndim:
            getattr(found, name).data = torch.rand(4) + (0.5 if name.endswith("r") else 0)
    return found


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, inputs, result: result + 1)
    return module


LAYERS: dict[str, tuple[Callable[[], nn.Module], bool]] = {  # whether they are native
    "convolution": (conv, True),
    "dilation": (lambda: conv(dilation=2, padding=2), True),
    "stride and groups": (lambda: conv(stride=2, groups=2), True),
    "norm": (lambda: nn.Sequential(conv(), norm(), nn.ReLU()), True),
    "norm without weights": (lambda: nn.Sequential(conv(), norm(affine=False)), True),
    "nested": (lambda: nn.Sequential(nn.Sequential(conv(), nn.Identity()), nn.Sequential(norm(), nn.ReLU())), True),
    "pooling": (lambda: nn.AvgPool2d(3, 1, 1), True),
    "pooling without padding": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), True),
    "rows": (lambda: nn.Sequential(nn.Flatten(), quantize(nn.Linear(144, 3), Ternary()), nn.ReLU()), True),
    "reflection": (lambda: conv(padding_mode="reflect"), False),
    "same": (lambda: conv(padding="same"), False),
    "norm without running means": (lambda: nn.Sequential(conv(), norm(track_running_stats=False)), False),
    "norm of its batch": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), norm(track_running_stats=False)), False),
    "another divisor": (lambda: nn.AvgPool2d(2, divisor_override=1), False),
    "ceiling": (lambda: nn.AvgPool2d(4, ceil_mode=True), False),
    "subclass": (lambda: Twice(2), False),
    "residual": (lambda: Residual(conv(), nn.ReLU()), False),
    "residual of floats": (lambda: Residual(nn.Conv2d(4, 4, 1), norm()), False),
    "last dimension": (lambda: quantize(nn.Linear(6, 3), Ternary()), False),
    "flat at the end": (lambda: nn.Sequential(nn.AvgPool2d(2), nn.Flatten()), False),
    "flat from elsewhere": (lambda: nn.Sequential(nn.Flatten(2), quantize(nn.Linear(36, 3), Ternary())), False),
    "weight norm": (lambda: weight_norm(nn.Conv2d(4, 4, 9, padding=4)), False),
    "weight norm and norm": (lambda: nn.Sequential(weight_norm(nn.Conv2d(4, 4, 9, padding=4)), norm()), False),
    "hook": (lambda: hooked(conv()), False),
    "hook within": (lambda: nn.Sequential(conv(), hooked(nn.ReLU())), False),
    "hook before a norm": (lambda: nn.Sequential(hooked(nn.Conv2d(4, 4, 1)), norm()), False),
    "hook of all": (lambda: hooked(nn.Sequential(conv(), nn.ReLU())), False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_native_layers_do_what_torch_does(name: str) -> None:
    torch.manual_seed(0)
    make, is_native = LAYERS[name]
    module, x = make().eval(), torch.randn(2, 4, 6, 6)
    net = Network([(Part("stem", ("x",), (("y", 0),)), module)], (2, 4, 6, 6)).eval()
    graph = net.to_graph(native=True)
    assert isinstance(graph.bodies["stem"].run, Chain) == is_native
    np.testing.assert_allclose(graph(x)[0], net(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [lambda gate: hooked(gate), lambda gate: hooked(gate.conv), lambda gate: gate])
def test_gates_with_hooks_are_left_alone(change: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    gate = Concatenate(4)
    gate.norm = norm()
    change(gate)
    net = Network([(Part("a", ("x", "x"), (("y", 0),)), BranchBody([gate], []))], (2, 4, 6, 6)).eval()
    x, graph = torch.randn(2, 4, 6, 6), net.to_graph(native=True)
    assert isinstance(graph.bodies["a"].run, Chain) == (not gate._forward_hooks and not gate.conv._forward_hooks)
    np.testing.assert_allclose(graph(x)[0], net(x).detach(), rtol=1e-4, atol=1e-4)


def test_networks_with_unknown_layers_are_placed() -> None:
    parts: list[tuple[Part, nn.Module]] = [(Part("a", ("x",), (("y", 0),)), weight_norm(nn.Conv2d(4, 4, 9, padding=4)))]
    table = LatencyTable(describe_machine(), {"a": {"solo/1": 1e-5}})
    assert place(Network(parts, (1, 4, 6, 6)), table).teams == (("a",),)


# Networks of a space


def settle(net, shape):
    """Give norms statistics that are not those they begin with."""
    net.train()
    for seed in range(2):
        net(torch.rand(8, *shape[1:], generator=torch.Generator().manual_seed(seed)))
    return net.eval()


@pytest.mark.parametrize("stem", ["shared", "recomputed"])
@pytest.mark.parametrize("branches", [1, 2, 3, 4])
def test_networks_of_a_space_run_natively(branches, stem):
    space = Space(branches=branches, stem=stem, operators=NATIVE, gates=("none", "add", "concatenate"), **SMALL)
    assert space.all_native
    for seed in range(4):
        net = settle(space.build(space.sample(seed), seed), space.input_shape())
        graph = net.to_graph(native=True)
        assert {body.arrays for body in graph.bodies.values()} == {"numpy"}
        assert len(graph.bodies) == 1 + 2 * branches + (branches if stem == "recomputed" else 1)
        x = torch.rand(net.shape, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            np.testing.assert_allclose(graph(x)[0], net(x), atol=1e-5)


def test_bodies_with_float_weights_stay_torch():
    space = Space(branches=3, **SMALL)
    assert not space.all_native
    kinds = set()
    for seed in range(6):
        architecture = space.sample(seed)
        net = settle(space.build(architecture), space.input_shape())
        graph = net.to_graph(native=True)
        for body in graph.bodies.values():
            if body.segment >= 0:
                kinds.add(body.arrays)
                assert (body.arrays == "numpy") == space.is_native(architecture, body.segment, body.branch)
        x = torch.rand(net.shape, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            np.testing.assert_allclose(graph(x)[0], net(x), atol=1e-5)
    assert kinds == {"torch", "numpy"}
    with pytest.raises(CannotChain, match="weights of few values, got float ones in Conv2d"):
        build_chain(BranchBody([], [build_operator("conv3x3", 4, 4)]).eval())
    with pytest.raises(CannotChain, match="one that is native, got Pooled"):
        build_chain(BranchBody([build_gate("pooled", 4)], []).eval(), 2)
