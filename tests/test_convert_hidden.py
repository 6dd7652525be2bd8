"""`nn.convert`: what modules and forwards do that neither their classes nor a graph show at first sight."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import find_rows, function, randomize, same
from torch import nn
from torch.nn.utils import parametrize

from pycodesign.nn import convert, report
from pycodesign.quantize import ternary


class Sign(nn.Module):
    def forward(self, w):
        return w.sign()


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Circular(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)


def patched(*args):
    conv = nn.Conv2d(*args)
    conv._conv_forward = lambda x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)
    return conv


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("make", [Doubled, Circular, patched])
def test_layers_with_a_forward_of_their_own_are_left(make, signed):
    layer = make(4, 4, 3)
    if signed:
        layer = parametrize.register_parametrization(layer, "weight", Sign())
    model, x = nn.Sequential(layer, nn.BatchNorm2d(4), same(4, 4)).eval(), torch.randn(2, 4, 6, 6)
    converted = convert(model, {"0": "from_fake_quantized" if signed else "ternary", "2": "ternary"})
    assert "forward of its own" in find_rows(converted)["0"].why and find_rows(converted)["2"].converted
    model[2].weight.data = torch.from_numpy(ternary(model[2].weight).dequantize())
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("converts", [False, True])
def test_a_weight_that_is_read_keeps_its_size(converts):
    layers = {"conv": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8)}
    model = randomize(function(lambda m, x: m.norm(m.conv(x)) / m.conv.weight.norm(), **layers))
    if not converts:
        nn.init.normal_(model.conv.weight)
    x = torch.randn(2, 3, 5, 5)
    converted = convert(model)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)
    assert not find_rows(converted)["conv"].converted


def test_a_parametrized_weight_that_is_read():
    model = function(lambda m, x: m.conv(x) * m.conv.weight.abs().sum(), conv=nn.Conv2d(3, 8, 3)).eval()
    parametrize.register_parametrization(model.conv, "weight", Sign()).eval()
    x = torch.randn(2, 3, 5, 5)
    converted = convert(model)
    assert find_rows(converted)["conv"].why == "the model reads its weights itself"
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)


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


def scale_data(m, x):
    y = m.a(x)
    data = y.data
    data *= 2
    return m.b(y)


def scale_transposed(m, x):
    y = m.a(x)
    transposed = y.mT
    transposed += 1
    return m.b(y)


def widen(m, x):
    y = m.a(x)
    y *= m.window.double()
    return m.b(F.silu(y))


def widen_by_a_method(m, x):
    y = m.a(x)
    y.add_(x.double())
    return m.b(F.silu(y))


def widen_by_an_attribute(m, x):
    y = m.a(x)
    y += m.double_window
    return m.b(F.silu(y))


def widen_by_a_new_value(m, x):
    y = m.a(x)
    y += torch.ones_like(x, dtype=torch.float64)
    return m.b(F.silu(y))


@pytest.mark.parametrize(
    "forward",
    [scale_data, scale_transposed, widen, widen_by_a_method, widen_by_an_attribute, widen_by_a_new_value],
)
def test_writes_that_no_new_value_replaces(forward):
    model = randomize(function(forward, a=same(3, 3), b=same(3, 3)))
    model.register_buffer("window", torch.rand(5))
    model.register_buffer("double_window", torch.rand(5, dtype=torch.float64))
    x = torch.randn(2, 3, 5, 5)
    converted = convert(model)
    assert all(row.converted for row in report(converted))
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


def test_gradients_that_a_forward_turns_off():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        @torch.no_grad()
        def forward(self, x):
            return self.conv(self.stem(x))

    model, x = Network().eval(), torch.randn(2, 3, 7, 7)
    converted = convert(model, {"conv": "ternary"})
    assert find_rows(converted)["conv"].converted
    assert not converted(x).requires_grad


def test_conversion_in_inference_mode_makes_ordinary_tensors():
    model, x = randomize(nn.Sequential(same(3, 3), nn.ReLU(), same(3, 3))), torch.randn(2, 3, 5, 5)
    with torch.inference_mode():
        converted = convert(model, example_inputs=x)
    assert not any(tensor.is_inference() for tensor in converted.state_dict().values())
    converted(x.requires_grad_()).sum().backward()
    assert x.grad is not None


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


@pytest.mark.parametrize("act", [lambda y: y.mean((2, y.dim() - 1)), lambda y: y.clamp(min=float("nan")).flatten(1)])
def test_arguments_that_are_no_numbers(act):
    model, x = randomize(function(lambda m, x: act(m.a(x)), a=same(3, 3))), torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(convert(model)(x), model(x), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_layers_that_are_functions_are_reported():
    class Functions(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.conv = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.conv(F.conv2d(x, self.w.sign()))

    model, x = randomize(Functions()), torch.randn(2, 3, 5, 5)
    converted = convert(model)
    assert [(row.layer, row.kind, row.converted) for row in report(converted)] == [
        ("conv", "Conv2d 4x4x1x1", True),
        ("conv2d()", "conv2d", False),
    ]
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"conv2d\(\): a function: there are kernels for modules"):
        convert(model, strict=True)


def test_layers_that_are_gone_are_reported():
    model = randomize(function(lambda m, x: m.a(x), a=same(3, 3), b=nn.Linear(3, 3)))
    for _ in range(2):  # also of what was converted before
        rows = {row.layer: row.why for row in report(convert(model))}
        assert rows["b"] == "the model does not call it by itself"
    assert str(report(convert(model))).endswith("1 of 2 layers converted, in 1 call")


def test_any_name_of_a_shared_module_can_be_given():
    conv = same(3, 3)
    model = randomize(nn.Sequential(conv, nn.ReLU(), conv))
    assert not find_rows(convert(model, skip=["2"]))["0"].converted
    assert find_rows(convert(model, {"2": "ternary"}))["0"].converted
    with pytest.raises(ValueError, match="skip: expected names of convolutions and linear layers, got '3'"):
        convert(model, skip=["3"])


def test_models_that_cannot_be_copied():
    with pytest.warns(FutureWarning, match="deprecated"):
        model = torch.nn.utils.weight_norm(nn.Linear(4, 4))
    model(torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"model: expected one that can be copied \(torch.nn.utils.weight_norm cannot"):
        convert(nn.Sequential(model).eval())
