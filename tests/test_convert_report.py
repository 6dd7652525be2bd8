"""`nn.convert`: layers that stay as they are, the reason that `report` gives, and what else it says."""

import pytest
import torch
import torch.nn.functional as F
from networks import find_rows, function, images, make_resnet, randomize, same
from torch import nn
from torch.nn.utils import parametrize

from pycodesign.nn import Conv2d, Linear, convert, report
from pycodesign.quantize import ternary


@pytest.fixture
def resnet():
    return make_resnet()


# --- what is left, and why


def test_layers_that_do_not_repeat_stay_in_float32(resnet):
    converted = convert(resnet)
    rows = find_rows(converted)
    assert [name for name, row in rows.items() if not row.converted] == ["conv1", "fc"]
    assert rows["conv1"].why == (
        "its weights do not repeat: 27 distinct values among the 27 of an output; batch normalization folded"
    )
    assert type(converted.conv1) is nn.Conv2d
    torch.testing.assert_close(converted(images()), resnet(images()), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"strict: .*; conv1: its weights do not repeat.*; fc: its weights do not"):
        convert(resnet, strict=True)
    convert(resnet, strict=True, skip=("conv1", "fc"))


class TernaryConv2d(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight.sign(), self.bias)


def test_reasons():
    model = nn.ModuleDict(
        {
            "custom": TernaryConv2d(8, 8, 3),
            "reflect": nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
            "same": nn.Conv2d(8, 8, (2, 3), padding="same"),
            "transposed": nn.ConvTranspose2d(8, 8, 3),
            "one": nn.Conv1d(8, 8, 3),
            "narrow": nn.Linear(8, 8, dtype=torch.bfloat16),
            "hooked": nn.Linear(64, 8),
            "attention": nn.MultiheadAttention(16, 2),
            "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "many": nn.Linear(400, 2),
        }
    )
    randomize(model, skip=("depthwise", "many", "narrow"))
    model["hooked"].register_forward_hook(lambda *_: None)
    why = {row.layer: row.why.partition("; not traced")[0] for row in report(convert(model))}
    assert why == {
        "custom": "TernaryConv2d has a forward of its own",
        "reflect": "padding_mode: expected 'zeros', got 'reflect'",
        "same": "padding: expected as much on both sides, got 'same' with kernel (2, 3)",
        "transposed": "ConvTranspose2d: there are kernels for Conv2d and Linear only",
        "one": "Conv1d: there are kernels for Conv2d and Linear only",
        "narrow": "weight: expected torch.float32, got torch.bfloat16",
        "hooked": "it has hooks, or a forward of its own",
        "attention.out_proj": "MultiheadAttention reads its weight itself",
        "depthwise": "its weights do not repeat: 9 distinct values among the 9 of an output",
        "many": "w: output 0 has 400 distinct values, expected at most 256",
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_layers_of_other_floats_are_left_wherever_their_weights_come_from(dtype):
    class Sign(nn.Module):
        def forward(self, weight):
            return weight.sign()

    model, x = nn.Sequential(nn.Linear(16, 8)).to(dtype), torch.randn(3, 16, dtype=dtype)
    nn.utils.parametrize.register_parametrization(model[0], "weight", Sign())
    converted = convert(model.eval())
    assert find_rows(converted)["0"].why == f"weight: expected torch.float32, got {dtype}"
    torch.testing.assert_close(converted(x), model(x))


def test_a_layer_that_is_not_called_is_left():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.fc = nn.MultiheadAttention(32, 2, batch_first=True), nn.Linear(32, 8)

        def forward(self, x):
            return self.fc(self.attention(x, x, x, need_weights=False)[0])

    model, x = randomize(Network()), torch.randn(2, 3, 32)
    converted = convert(model)
    assert find_rows(converted)["attention.out_proj"].why == "MultiheadAttention reads its weight itself"
    assert find_rows(converted)["fc"].converted
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)


def test_layers_of_a_part_that_runs_in_training_alone():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.auxiliary = nn.Conv2d(3, 8, 3), nn.Sequential(nn.Flatten(), nn.Linear(32, 4))

        def forward(self, x):
            y = self.conv(x)
            return (y, self.auxiliary(y)) if self.training else y

    model, x = randomize(Network()), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(convert(model)(x), model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"auxiliary\.1: the model does not call it"):
        convert(model, strict=True)
    convert(model, skip=["auxiliary.1"], strict=True)


def test_a_layer_that_cannot_be_packed_is_left():
    """Sums of 255 * 127 * 70,000 do not fit 32 bits."""
    model = nn.Sequential(nn.Linear(70_000, 2), nn.ReLU(), nn.Linear(2, 3)).eval()
    model[0].weight.data = torch.full((2, 70_000), 127.0)
    model[0].weight.data[:, 0] = 1
    model[2].weight.data = torch.ones(3, 2)
    x = torch.rand(2, 70_000)
    converted = convert(model, activations="uint8", example_inputs=x)
    rows = find_rows(converted)
    assert not rows["0"].converted
    assert "overflow" in rows["0"].why or "32 bits" in rows["0"].why
    assert rows["2"].converted
    torch.testing.assert_close(converted(x), model(x), rtol=0.02, atol=1)


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


# --- weights that the model reads


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


class Reading(nn.Module):
    """Reads what its layers hold."""

    def __init__(self, traceable):
        super().__init__()
        self.conv, self.fc, self.traceable = nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Linear(8, 8), traceable
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        if not self.traceable and x.sum() > -1e9:
            layer = self.conv
            x = x.to(layer.weight.dtype).view(-1, layer.in_channels, *x.shape[2:]) * layer.padding[0]
        y = self.norm(self.conv(x)).movedim(1, -1)
        y = F.linear(self.fc(y.reshape(-1, self.fc.in_features)), self.fc.weight.t())
        return y / self.conv.weight.norm() * self.conv.weight.shape[0] + self.norm.weight


@pytest.mark.parametrize("activations", ["float32", "uint8"])
@pytest.mark.parametrize("traceable", [True, False])
def test_what_a_model_reads_of_its_layers(traceable, activations):
    model, x = randomize(Reading(traceable)), torch.rand(2, 4, 5, 5)
    converted = convert(model, activations=activations, example_inputs=x, strict=not traceable)
    y, wanted = converted(x), model(x)
    assert (y - wanted).abs().max() <= (1e-5 if activations == "float32" else 0.05) * wanted.abs().max()
    rows = find_rows(converted)
    if traceable:
        assert {rows["conv"].why, rows["fc"].why} == {"the model reads its weights itself"}
        with pytest.raises(ValueError, match="conv: the model reads its weights itself"):
            convert(model, strict=True)
        return
    for name in ("conv", "fc"):
        ours, theirs = (made.get_submodule(name) for made in (converted, model))
        torch.testing.assert_close(ours.weight, theirs.weight)
        for attribute in ("in_features", "in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups"):
            assert getattr(ours, attribute, None) == getattr(theirs, attribute, None)


# --- what the report says


def test_report_of_a_network_that_was_not_converted(resnet):
    rows = report(resnet)
    assert {row.why for row in rows} == {"convert has not seen it"}
    text = str(report(convert(resnet)))
    assert text.splitlines()[0].split() == ["layer", "kind", "runs", "levels", "where", "why"]
    assert text.splitlines()[-1] == "7 of 9 layers converted, in 1 call"


def test_report_of_packed_layers_that_somebody_placed():
    layer = Conv2d.from_float(nn.Conv2d(4, 4, 3, padding=1), "ternary")
    model = nn.Sequential(layer, nn.ReLU(), same(4, 4), Linear.from_float(nn.Linear(5, 5), "binary")).eval()
    rows = find_rows(model)
    assert (rows["0"].kind, rows["0"].levels, rows["0"].where) == ("Conv2d 4x4x3x3", "3", "0")
    assert rows["0"].runs == f"{layer.packed().algorithm}, float32"
    assert rows["3"].kind == "Linear 5x5"
    assert [row.converted for row in rows.values()] == [True, False, True]
    converted = convert(model, "ternary", strict=True)
    assert all(row.converted for row in report(converted))
    assert str(report(converted)).endswith("3 of 3 layers converted, in 3 calls")


def test_a_layer_that_is_called_often_is_one_layer():
    conv = same(4, 4)
    model = randomize(function(lambda m, x: m.a(F.silu(m.a(F.silu(m.a(x))))), a=conv))
    rows = report(convert(model))
    assert [row.layer for row in rows] == ["a"] * 3
    assert str(rows).endswith("1 of 1 layers converted, in 3 calls")


@pytest.mark.parametrize("activations", ["float32", "uint8"])
def test_a_layer_with_two_names_is_replaced_under_both(activations):
    def forward(m, x):
        return m.b(m.a(x if x.sum() > 0 else -x))

    conv = same(4, 4)
    model, x = randomize(function(forward, a=conv, b=conv)), torch.rand(1, 4, 6, 6)
    converted = convert(model, activations=activations, example_inputs=x, strict=True)
    assert converted.a is converted.b
    assert [row.converted for row in report(converted)] == [True]
    y, wanted = converted(x), model(x)
    assert (y - wanted).abs().max() <= (0.05 if activations == "uint8" else 1e-5) * wanted.abs().max()
