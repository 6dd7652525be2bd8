"""`nn.convert`: residual additions, values written in place, normalizations, what graphs do not show."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import NormAct, Normalized, find_rows, function, randomize, same
from torch import nn

from pycodesign.nn import Conv2d, Linear, convert, report

# --- what the graph shows


class Residual(nn.Module):
    """A layer alone, to which its own input is added."""

    def __init__(self, layer, norm=None, stem=None):
        super().__init__()
        self.layer, self.norm, self.stem = layer, norm or nn.Identity(), stem or nn.LeakyReLU()

    def forward(self, x):
        x = self.stem(x)
        return F.relu(self.norm(self.layer(x)) + x)


@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: Residual(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), (2, 4, 6, 6)),
        (lambda: Residual(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(3, 4, 3)), (2, 3, 6, 6)),
        (lambda: Residual(nn.Linear(8, 8)), (2, 3, 8)),
    ],
)
def test_a_layer_that_adds_its_own_input(make, shape, examples):
    model, x = randomize(make(), skip=("stem",)), torch.randn(shape)
    converted = convert(model, example_inputs=x if examples else None)
    assert isinstance(converted.layer, (Conv2d, Linear))
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.act, self.leaky = nn.ReLU(inplace=True), nn.LeakyReLU(inplace=True)

    def forward(self, x):
        y = self.first(x)
        before = self.second(y)
        self.act(y)
        z = y.add_(1)
        return before + y * 2 + z


@pytest.mark.parametrize("skip", [(), ("first",), ("second",)])
def test_values_written_in_place_are_read_as_written(skip):
    model, x = randomize(Overwriting()), torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(convert(model, skip=skip)(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("skip", [(), ("first",)])
def test_what_reads_a_value_before_it_is_overwritten_is_not_moved_behind(skip):
    class Network(Overwriting):
        def forward(self, x):
            y = self.first(x)
            before = self.second(y)
            return before + self.leaky(y)

    model, x = randomize(Network()), torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(convert(model, skip=skip)(x), model(x), rtol=1e-5, atol=1e-5)


class Written(nn.Module):
    """Writes into a value that has another name, or is a part of another."""

    def __init__(self, write):
        super().__init__()
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.act, self.write = nn.ReLU(inplace=True), write

    def forward(self, x):
        return self.write(self, self.first(x))


def add_to_itself(model, y):
    skip = y
    y += 1
    return model.second(y) + skip


def multiply_in_a_list(model, y):
    kept = [model.act(y)]
    y *= 2
    return model.second(y) + kept[0]


def halve_a_size(model, y):
    size = height = y.size(2)
    size //= 2
    return model.second(y)[:, :, size:height]


def call_one_activation_twice(model, y):
    z = model.second(model.act(y))
    model.act(z)
    return y - z


def activate_a_chunk(model, y):
    model.act(y.chunk(2, 1)[0])
    return model.second(y)


def activate_a_view(model, y):
    model.act(y.flatten(2))
    return model.second(y)


def activate_what_is_detached(model, y):
    z = y.detach()
    F.relu(y, inplace=True)
    return model.second(z)


def activate_a_part_and_read_another(model, y):
    a = y[:, :2]
    y.relu_()
    return model.second(y)[:, :2] + a


def drop_nothing_in_place(model, y):
    kept = y.flatten(2)
    return model.second(F.dropout(y, training=False, inplace=True)).flatten(2) + kept


@pytest.mark.parametrize(
    "write", [add_to_itself, multiply_in_a_list, halve_a_size, call_one_activation_twice, drop_nothing_in_place]
)
def test_other_names_of_a_value_that_is_written_to(write):
    model, x = randomize(Written(write)), torch.randn(2, 4, 6, 6)
    model.register_buffer("unused", torch.zeros(1))
    for _ in range(300):
        model.unused += 1  # as often as training would; the forward itself does not
    converted = convert(model)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)
    assert all("not traced" not in row.why for row in report(converted))


@pytest.mark.parametrize(
    "write", [activate_a_chunk, activate_a_view, activate_what_is_detached, activate_a_part_and_read_another]
)
def test_parts_of_a_value_that_is_written_to(write):
    model, x = randomize(Written(write)), torch.randn(2, 4, 6, 6)
    converted = convert(model, strict=True)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)
    why = {row.why.partition(", so by itself")[0].partition("writes ")[2] for row in report(converted)}
    assert why == {"into a tensor that is read later under another name)"}


def test_batch_normalization_of_other_dimensions_is_not_folded():
    model, x = randomize(Normalized()), torch.randn(3, 6, 12)
    torch.testing.assert_close(convert(model, example_inputs=x)(x), model(x))


def add_squeezed(m, x):
    x = F.silu(m.d(x))
    return m.a(x) + m.b(x * torch.sigmoid(m.c(F.adaptive_avg_pool2d(x, 1))))


def add_padded(m, x):
    return m.a(x) + F.pad(m.b(x)[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))


# networks with an add, shapes of their inputs, and whether it is known that no operand is expanded
ADDS = {
    "channels": (lambda m, x: m.a(x) + m.b(x), {"a": same(3, 8), "b": same(3, 1)}, [(2, 3, 8, 8)], False),
    "sides": (lambda m, x: m.a(x) + m.b(x), {"a": same(3, 8), "b": nn.Conv2d(3, 8, 8)}, [(2, 3, 8, 8)], False),
    "mean": (
        lambda m, x: m.a(x) + m.b(x.mean((2, 3), keepdim=True)),
        {"a": same(3, 8), "b": same(3, 8, 1)},
        [(2, 3, 1, 1), (2, 3, 5, 5)],
        False,
    ),
    "tokens": (
        lambda m, x: m.a(x) + m.b(x[:, :1]),
        {"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)},
        [(2, 1, 6), (2, 5, 6)],
        False,
    ),
    "parameter": (
        lambda m, x: m.a(x) + m.c.weight[None],
        {"a": same(3, 8), "c": nn.Conv1d(1, 8, 1)},
        [(1, 3, 1, 1), (3, 3, 4, 4)],
        False,
    ),
    "bool": (lambda m, x: m.a(x) + (x > 0), {"a": same(3, 3)}, [(2, 3, 8, 8)], False),
    "double": (lambda m, x: m.a(x) + F.silu(x.double()), {"a": same(3, 3)}, [(2, 3, 8, 8)], False),
    "strides": (
        lambda m, x: m.b(m.a(x)) + m.c(F.silu(x)),
        {"a": same(3, 8, 3, stride=2), "b": same(8, 8, 5, stride=3), "c": same(3, 8, 1, stride=6)},
        [(2, 3, 8, 8), (1, 3, 17, 5)],
        True,
    ),
    "other strides": (
        lambda m, x: m.a(x) + m.c(x),
        {"a": same(3, 8, 3, stride=3), "c": nn.Conv2d(3, 8, 2, stride=3)},
        [(2, 3, 8, 8)],
        False,
    ),
    "pooling": (
        lambda m, x: m.a(F.max_pool2d(F.gelu(x), 3, 2, 1)) + m.b(F.gelu(x)),
        {"a": same(3, 4), "b": same(3, 4, 1, stride=2)},
        [(2, 3, 9, 9), (2, 3, 8, 6)],
        True,
    ),
    "squeeze": (add_squeezed, {name: same(8, 8) for name in "abcd"}, [(2, 8, 5, 5)], True),
    "padding": (add_padded, {"a": same(4, 8, 3, stride=2), "b": same(4, 4)}, [(2, 4, 7, 8)], True),
    "concatenation": (
        lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)) + F.leaky_relu(m.a(x)),
        {"a": same(4, 4), "b": same(4, 4), "c": same(8, 4)},
        [(2, 4, 5, 5)],
        True,
    ),
    "a part of the channels": (
        lambda m, x: m.a(x)[:, :3, :, :] + m.b(x),
        {"a": same(4, 5), "b": same(4, 3)},
        [(2, 4, 5, 5)],
        True,
    ),
    "features": (
        lambda m, x: m.b(F.gelu(m.a(F.layer_norm(x, (8,))))) + x,
        {"a": nn.Linear(8, 16), "b": nn.Linear(16, 8)},
        [(2, 5, 8), (2, 8), (8,)],
        True,
    ),
}


@pytest.mark.parametrize("name", ADDS)
@pytest.mark.parametrize("examples", [False, True])
def test_adds_are_fused_where_shapes_are_equal_in_every_call(name, examples):
    forward, layers, shapes, fused = ADDS[name]
    model = randomize(function(forward, **layers))
    xs = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]
    converted = convert(model, example_inputs=xs[0] if examples else None)
    for x in xs:
        y, wanted = converted(x), model(x)
        assert (y.dtype, y.shape) == (wanted.dtype, wanted.shape)
        assert (y - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    last = next(node for node in converted.graph.nodes if node.op == "output").args[0]
    assert (last.op == "call_module") == fused


@pytest.mark.parametrize(
    "act",
    [
        lambda y: F.avg_pool2d(y, y.size()[3]),
        lambda y: F.avg_pool2d(y, kernel_size=y.shape[2:]),
        lambda y: F.max_pool2d(y, 2, y.shape[-1] // 3),
        lambda y: y.clamp(2, 1),
        lambda y: y.clamp(max=y.shape[1]),
        lambda y: torch.add(y, y.relu(), out=torch.empty(2, 4, 6, 6)),
    ],
)
@pytest.mark.parametrize("activations", ["float32", "uint8"])
def test_arguments_that_no_step_can_have_are_computed_by_torch(act, activations):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.last(act(self.first(x)))

    model, x = randomize(Network()), torch.randn(2, 4, 6, 6)
    y, wanted = convert(model, activations=activations, example_inputs=x, strict=True)(x), model(x)
    assert (y - wanted).abs().max() <= (1e-5 if activations == "float32" else 0.05) * wanted.abs().max()


@pytest.mark.parametrize("examples", [None, (2, 6)])
@pytest.mark.parametrize("rest", [[], [nn.ReLU(), nn.Linear(6, 4)]])
def test_batch_normalization_of_features_takes_no_more_dimensions(rest, examples):
    model = randomize(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), *rest))
    converted = convert(model, example_inputs=None if examples is None else torch.randn(examples), strict=True)
    x = torch.randn(3, 6)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"inputs: expected float32 .*\(N, I\), got \(2, 6, 6\)"):
        converted(torch.randn(2, 6, 6))


@pytest.mark.parametrize(
    ("variance", "eps", "gain"), [(0.0, 0.0, 1.0), (np.nan, 1e-5, 1.0), (-5.0, 1e-5, 1.0), (1e-38, 0.0, 1e30)]
)
@pytest.mark.parametrize("skip", [(), ("0",)])
@pytest.mark.parametrize("own", [False, True])
def test_batch_normalization_that_is_not_finite_stays_torchs(variance, eps, gain, skip, own):
    act = [nn.LeakyReLU()] if own else []
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 3), *act, nn.BatchNorm2d(4, eps=eps), nn.Conv2d(4, 4, 1)))
    model[1 + own].running_var[1], model[1 + own].weight.data[1] = variance, gain
    model[2 + own].weight.data = torch.ones(4, 4, 1, 1)  # a weight of zero may be left out, whatever it meets
    x = torch.randn(2, 4, 6, 6)
    converted = convert(model, strict=True, skip=skip)
    assert not converted(x).isfinite().all()
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("skip", [(), ("0",)])
@pytest.mark.parametrize("affine", [True, False])
def test_classes_derived_from_batch_normalization_are_folded(affine, skip):
    norms = [NormAct(8, affine=affine), NormAct(8, affine=affine)]
    model, x = nn.Sequential(same(4, 8), norms[0], same(8, 8), norms[1], same(8, 4)), torch.randn(2, 4, 7, 7)
    converted = convert(randomize(model), skip=skip, strict=True)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    assert str(report(converted)).endswith(f"{3 - len(skip)} of 3 layers converted, in 1 call")
    torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-4)


# --- what the graph does not show


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
