"""`nn.convert`: networks that cannot be traced, and what a trace does not show: hooks, defaults, changes of state."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from networks import Untraceable, find_rows, function, randomize, same
from torch import nn

from pycodesign.nn import convert


@pytest.mark.parametrize("activations", ["float32", "uint8"])
def test_layers_are_replaced_one_by_one_where_tracing_fails(activations):
    model, x = randomize(Untraceable(), skip=("plain",)), torch.rand(2, 4, 5, 5)
    converted = convert(model, activations=activations, example_inputs=x)
    assert type(converted) is Untraceable
    rows = find_rows(converted)
    runs = {name: row.runs.partition(", ")[2] for name, row in rows.items()}
    uint8 = activations == "uint8"
    assert runs == {"conv": activations, "fc": activations, "plain": "uint8" if uint8 else ""}
    assert "not traced (symbolically traced variables cannot be used as inputs to control flow)" in rows["conv"].why
    y, wanted = converted(x), model(x)
    assert (y - wanted).abs().max() <= (0.05 if uint8 else 1e-5) * wanted.abs().max()
    assert isinstance(model.conv, nn.Conv2d)


def scale_input(module, args):
    return (2 * args[0],)


def scale_output(module, args, y):
    return 3 * y


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Identity()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Dropout())

    def forward(self, x):
        return self.drop(self.norm(self.conv(self.body(x))))


@pytest.mark.parametrize("name", ["", "conv", "norm", "drop", "body", "body.1"])
@pytest.mark.parametrize("change", ["pre_hook", "hook", "forward"])
def test_modules_with_hooks_are_called(name, change):
    model, x = randomize(Hooked()), torch.randn(2, 4, 6, 6)
    module = model.get_submodule(name)
    if change == "pre_hook":
        module.register_forward_pre_hook(scale_input)
    elif change == "hook":
        module.register_forward_hook(scale_output)
    else:
        module.forward = lambda x: F.max_pool2d(x, 1) * 2
    converted, wanted = convert(model), model(x)
    # Sums of up to 160, which torch rounds, too: its own error is 2e-5 on some processors.
    torch.testing.assert_close(converted(x), wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())
    rows = find_rows(converted)
    if not name:
        assert rows["conv"].why.startswith("not traced (it has hooks, or a forward of its own), so by itself")
    elif name == "body":
        assert rows["body.0"].why == "body has hooks, or a forward of its own"


def test_hooks_of_modules_whose_result_nobody_reads():
    seen = []

    def forward(m, x):
        y = m.a(x)
        m.probe(y)
        return m.b(y)

    model = randomize(function(forward, a=same(3, 3), b=same(3, 3), probe=nn.Identity()))
    model.probe.register_forward_hook(lambda module, args, y: seen.append(args[0].sum()))
    converted, x = convert(model), torch.randn(2, 3, 5, 5)
    seen.clear()
    converted(x)
    assert len(seen) == 1


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, mask=None, scale=None, *, twice=False):
        x = self.a(x)
        if mask is not None:
            x = x * mask
        x = self.b(F.relu(x)) * (1.0 if scale is None else 2.0)
        return x + x if twice else x


def test_arguments_with_a_default():
    model, x, mask = randomize(Optional()), torch.randn(2, 8), torch.rand(2, 8)
    converted = convert(model)
    assert find_rows(converted)["a"].where == find_rows(converted)["b"].where
    for made in (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        torch.testing.assert_close(made(x, None, twice=False), model(x))
        for name, got, value in (("mask", "Tensor", mask), ("scale", "3", 3), ("twice", "True", True)):
            with pytest.raises(ValueError, match=f"^{name}: expected .*, as when the network was converted, got {got}"):
                made(x, **{name: value})
    torch.testing.assert_close(convert(model, example_inputs=(x, None, 3))(x, scale=3), model(x, scale=3))
    masked = convert(model, example_inputs=[(x, mask), (x, 2 * mask)])
    torch.testing.assert_close(masked(x, mask), model(x, mask))
    with pytest.raises(TypeError, match="mask"):
        masked(x)


class Unseen(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.conv, self.act, self.calls = nn.Conv2d(4, 4, 3), act, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        return self.act(self, self.conv(x))


def count(model, y):
    model.seen += 1
    return y * model.seen


def count_in_python(model, y):
    model.calls += 1
    return y * model.calls


def keep_a_sum(model, y):
    model.seen.add_(y.sum())
    return y * model.seen


def set_data(model, y):
    y.data = y.relu()
    return y


def add_noise(model, y):
    return y + torch.randn(1)


@pytest.mark.parametrize(
    ("act", "why"),
    [
        (count, "its forward changes seen"),
        (count_in_python, "its forward changes calls"),
        (keep_a_sum, "add_ writes into seen"),
        (set_data, "it sets data of a tensor"),
        (add_noise, "it draws random numbers"),
        (lambda model, y: y.normal_(), "normal_ writes into a tensor in place"),
    ],
)
def test_what_a_graph_does_not_show_is_not_traced(act, why):
    model, x = randomize(Unseen(act)), torch.randn(2, 4, 6, 6)
    converted = convert(model, strict=True)
    for _ in range(2):
        ours, theirs = ([torch.manual_seed(3), made(x)][1] for made in (converted, model))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert find_rows(converted)["conv"].why.startswith(f"not traced ({why}), so by itself")


def test_lists_and_dicts_that_a_forward_fills():
    def collect(m, x):
        m.held.append(m.conv(x))
        m.named["last"] = m.held[-1]
        return sum(m.held)

    model = randomize(function(collect, conv=same(3, 3)))
    model.held, model.named = [], {}
    converted = convert(model)
    assert "its forward changes held" in find_rows(converted)["conv"].why
    x = torch.randn(2, 3, 5, 5)
    for _ in range(2):
        torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(converted.held) == 2 and converted.named["last"] is converted.held[-1]


def test_constants_that_a_forward_makes_are_traced():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.register = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3), torch.ones(1)

        def forward(self, x):
            scale = torch.full((1, 8, 1, 1), 0.5)
            scale[:, 3] = -1
            return self.b(self.a(x) * scale + self.register)

    model, x = randomize(Network()), torch.randn(2, 4, 8, 8)
    converted = convert(model)
    assert isinstance(converted, torch.fx.GraphModule)
    for made in (converted, pickle.loads(pickle.dumps(converted)), copy.deepcopy(converted)):
        torch.testing.assert_close(made(x), model(x), rtol=1e-5, atol=1e-5)
