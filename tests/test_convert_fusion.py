"""`nn.convert`: additions, batch normalization and pooling that run with packed layers, and what is left to torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import NormAct, Normalized, function, images, randomize, same
from torch import nn

from pycodesign.nn import Conv2d, Linear, Segment, convert, report
from pycodesign.nn.program import parse_program

# --- additions


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


def test_residuals_that_are_added_in_place_are_fused():
    def forward(m, x):
        y = m.a(x.float() / 255)
        z = m.b(y)
        z += y
        return F.relu(z, inplace=True)

    model, x = randomize(function(forward, a=same(3, 3), b=same(3, 3))), torch.randn(2, 3, 5, 5)
    converted = convert(model)
    assert str(report(converted)).endswith("2 of 2 layers converted, in 1 call")
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)


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


# --- batch normalization


def test_batch_normalization_of_other_dimensions_is_not_folded():
    model, x = randomize(Normalized()), torch.randn(3, 6, 12)
    torch.testing.assert_close(convert(model, example_inputs=x)(x), model(x))


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


# --- pooling, and arguments of operations


class Stem(nn.Module):
    """A first layer that stays torch's, a ReLU, and pooling."""

    def __init__(self, **options):
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(**options)
        self.relu, self.conv = nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(self.pool(self.relu(self.stem(x))))


def list_operations(converted):
    (segment,) = (module for module in converted.modules() if isinstance(module, Segment))
    return [step.op for step in parse_program(segment.program).steps]


def test_pooling_comes_before_a_relu_that_nothing_else_reads():
    model = randomize(Stem(kernel_size=3, stride=2, padding=1))
    converted = convert(model, skip=["stem"])
    assert list_operations(converted) == ["max_pool2d", "add", "conv2d"]
    grads = []
    for module in (model, converted):
        x = images().requires_grad_()
        y = module(x)
        y.square().sum().backward()
        grads.append((y, x.grad))
    for wanted, made in zip(*grads, strict=True):
        assert (made - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert list_operations(convert(model)) == ["conv2d", "max_pool2d", "conv2d"]
    # A window of padding alone is -inf, which a ReLU behind it would change.
    dilated = randomize(Stem(kernel_size=2, stride=1, padding=1, dilation=2))
    assert list_operations(convert(dilated, skip=["stem"])) == ["add", "max_pool2d", "conv2d"]
    both = function(lambda m, x: m.conv(F.max_pool2d(r := F.relu(x), 2)) + r.mean(), conv=nn.Conv2d(3, 4, 3))
    assert list_operations(convert(randomize(both), example_inputs=images()))[:2] == ["add", "max_pool2d"]


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


@pytest.mark.parametrize("act", [lambda y: y.mean((2, y.dim() - 1)), lambda y: y.clamp(min=float("nan")).flatten(1)])
def test_arguments_that_are_no_numbers(act):
    model, x = randomize(function(lambda m, x: act(m.a(x)), a=same(3, 3))), torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(convert(model)(x), model(x), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_numbers_as_pruned_networks_have_them():
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, stride=np.int64(1), padding=(1,), groups=np.int64(2)),
        nn.MaxPool2d(np.int64(2), (2,)),
        nn.AvgPool2d((np.int32(2),), padding=(np.int64(0), 0)),
        nn.Conv2d(8, 4, 1, dilation=(np.int64(1),)),
    )
    x = torch.randn(2, 8, 9, 9)
    converted = convert(randomize(model), strict=True)
    assert str(report(converted)).endswith("2 of 2 layers converted, in 1 call")
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)
