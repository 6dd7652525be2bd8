"""`nn.convert`: its arguments: weights and layers by name, examples and the ranges that they show; what is refused."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import ResNet, Untraceable, find_rows, function, images, make_resnet, randomize, same
from torch import nn

from pycodesign import quantize
from pycodesign.nn import convert, report
from pycodesign.nn.calibration import find_range, to_affine


@pytest.fixture
def resnet():
    return make_resnet()


def test_weights_by_name_function_and_dict(resnet):
    x, quantizers = images(), {"conv1": lambda w: quantize.uniform(w, 4), "fc": "binary", "blocks.0.conv1": "ternary"}
    rows = find_rows(convert(resnet, quantizers))
    assert {name: row.levels for name, row in rows.items() if row.converted} == {
        "conv1": "16",
        "fc": "2",
        "blocks.0.conv1": "3",
    }
    assert rows["blocks.1.conv1"].why == "not named in weights"
    for weights in ("binary", quantize.binary):
        wanted = copy.deepcopy(resnet)
        randomized = convert(wanted, weights)
        for module in wanted.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.data = torch.from_numpy(quantize.binary(module.weight).dequantize())
        torch.testing.assert_close(randomized(x), wanted(x), rtol=1e-4, atol=1e-4)


def test_skipped_layers_stay_as_they_are(resnet):
    converted = convert(resnet, activations="uint8", example_inputs=images(), skip=["conv1", "blocks.1.conv2"])
    rows = find_rows(converted)
    assert rows["conv1"].why == rows["blocks.1.conv2"].why == "named in skip"
    assert torch.equal(converted.conv1.weight, resnet.conv1.weight)
    wanted = resnet(images())
    assert (converted(images()) - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_any_name_of_a_shared_module_can_be_given():
    conv = same(3, 3)
    model = randomize(nn.Sequential(conv, nn.ReLU(), conv))
    assert not find_rows(convert(model, skip=["2"]))["0"].converted
    assert find_rows(convert(model, {"2": "ternary"}))["0"].converted
    with pytest.raises(ValueError, match="skip: expected names of convolutions and linear layers, got '3'"):
        convert(model, skip=["3"])


# --- examples


def test_calibration_runs_the_quantized_network():
    """Scales are those of what runs, not of the float network, whose weights are much smaller here."""
    model = randomize(ResNet(), skip=dict(ResNet().named_modules()))
    x = images(4)
    wanted = convert(model, enlarge)(x)
    y = convert(model, enlarge, activations="uint8", example_inputs=x)(x)
    assert (y - wanted).abs().max() < 0.05 * wanted.abs().max()


def enlarge(w):
    return quantize.ternary(8 * w)


def test_ranges():
    values = torch.arange(-1000, 19001, dtype=torch.float32)[torch.randperm(20001)]
    assert find_range(values, "minmax") == (-1000, 19000)
    assert find_range(values, "percentile") == (-999, 18999)  # without one of 10,000 at either end
    assert to_affine([(-1, 1), (-2, 3)], "minmax", "x") == (float(np.float32(5 / 255)), 102)
    assert to_affine([(-1, 1), (-2, 3)], "percentile", "x") == (float(np.float32(3.5 / 255)), 109)
    assert to_affine([(1, 2)], "minmax", "x") == (float(np.float32(2 / 255)), 0)  # zero is held exactly
    assert to_affine([(0, 0)], "minmax", "x") == (1.0, 0)


def test_examples_that_show_no_range():
    model = randomize(function(lambda m, x: m.b(F.relu(m.a(x))), a=same(4, 4), b=same(4, 4)))
    untraceable = randomize(Untraceable())
    for made in (model, untraceable):
        with pytest.raises(ValueError, match="example_inputs: expected an example that shows values, got none but em"):
            convert(made, activations="uint8", example_inputs=torch.empty(0, 4, 5, 5))
        converted = convert(made, activations="uint8", example_inputs=[torch.empty(0, 4, 5, 5), torch.rand(1, 4, 5, 5)])
        assert converted(torch.rand(2, 4, 5, 5)).shape[0] == 2
    layers = {"a": same(4, 4), "b": same(4, 4), "c": same(4, 4), "norm": nn.BatchNorm2d(4)}
    parts = randomize(function(lambda m, x: (m.a(x), m.c(m.norm(m.b(x[x.shape[0] :])))), **layers))
    converted = convert(parts, activations="uint8", example_inputs=torch.rand(2, 4, 5, 5))
    why = {row.layer: row.why for row in report(converted) if not row.converted}
    assert set(why) == {"b", "c"}
    assert why["b"].startswith("no example shows the range of its input")
    assert [len(y) for y in converted(torch.rand(2, 4, 5, 5))] == [2, 0]


def test_examples_must_be_finite(resnet):
    x = images()
    x[0, 0, 0, 0] = np.inf
    with pytest.raises(ValueError, match=r"example_inputs: expected finite activations, got .* from x$"):
        convert(resnet, activations="uint8", example_inputs=x)


@pytest.mark.parametrize("traceable", [True, False])
def test_what_no_layer_takes_need_not_be_finite(traceable):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = self.a(x) if traceable or x.sum() < 1e9 else x
            masked = torch.softmax(x.masked_fill(x < 0, -torch.inf), -1)
            return self.b(masked), masked.log()

    model, x = randomize(Network()), torch.randn(16, 8)
    converted = convert(model, activations="uint8", example_inputs=x)
    for got, expected in zip(converted(x), model(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=0.1, atol=0.05)


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "model: expected torch.nn.Module, got int"),
        ({"activations": "int8"}, ValueError, "activations: expected 'float32' or 'uint8', got 'int8'"),
        ({"activations": "uint8"}, ValueError, "example_inputs: expected at least one for uint8 activations, got None"),
        ({"example_inputs": 3}, TypeError, "example_inputs: expected a tensor, a tuple .* got int"),
        ({"example_inputs": [[torch.ones(1), 2]]}, TypeError, "example_inputs: expected a tensor.* got list of list"),
        ({"example_inputs": "x"}, TypeError, "example_inputs: expected a tensor.* got str of str"),
        ({"example_inputs": []}, ValueError, "example_inputs: expected at least one example, got none"),
        ({"calibration": "mean"}, ValueError, "calibration: expected 'minmax' or 'percentile', got 'mean'"),
        ({"skip": "fc"}, TypeError, "skip: expected a collection of module names, got 'fc'"),
        ({"skip": ["fd"]}, ValueError, "skip: expected names of convolutions and linear layers, got 'fd'"),
        ({"skip": ["bn1"]}, ValueError, "skip: expected names of convolutions and linear layers, got 'bn1'"),
        ({"weights": {"fd": "binary"}}, ValueError, "weights: expected names of convolutions .* got 'fd'"),
        (
            {"weights": "uniform"},
            ValueError,
            "weights: expected 'binary', 'from_fake_quantized', 'kernel_codebook' or 'ternary', or a",
        ),
        ({"weights": 2}, TypeError, "weights: expected a name or a function, got int"),
    ],
)
def test_bad_arguments(resnet, arguments, error, message):
    with pytest.raises(error, match=message):
        convert(**{"model": resnet, **arguments})


def test_bad_models(resnet):
    with pytest.raises(TypeError, match=r"model: expected tensors in host memory, got conv1.weight on meta"):
        convert(copy.deepcopy(resnet).to("meta"))
    resnet.blocks[1].bn1.train()
    with pytest.raises(
        ValueError, match=r"model: expected evaluation mode .*got 'blocks.1.bn1' \(BatchNorm2d\) in train"
    ):
        convert(resnet)
