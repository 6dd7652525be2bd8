"""`nn.convert`: results of converted networks, in float32 and uint8, of inputs of any size, and their gradients."""

import numpy as np
import pytest
import torch
from networks import NETWORKS, as_list, copy_state, find_rows, images, make_resnet, randomize
from torch import nn

from pycodesign import ops
from pycodesign.demo import load_digits, load_network
from pycodesign.nn import Conv2d, Linear, Segment, convert, report
from pycodesign.nn.program import parse_program, split_weights
from pycodesign.reference import repetition as reference


@pytest.fixture(params=NETWORKS)
def network(request):
    make, shape = NETWORKS[request.param]
    return randomize(make()), torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def resnet():
    return make_resnet()


@pytest.mark.parametrize("examples", [False, True])
def test_float32_results_are_those_of_the_network(network, examples):
    model, x = network
    before = copy_state(model)
    converted = convert(model, example_inputs=x if examples else None, strict=True)
    for y, wanted in zip(as_list(converted(x)), as_list(model(x)), strict=True):
        assert y.shape == wanted.shape
        assert (y - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(row.converted for row in report(converted))


CALLS = {"resnet": 1, "preactivation": 1, "inception": 2, "crossing": 2, "vgg": 1, "mlp": 1}


@pytest.mark.parametrize("name", CALLS)
def test_segments_are_as_large_as_they_can_be(name):
    make, shape = NETWORKS[name]
    converted = convert(randomize(make()), example_inputs=torch.zeros(shape))
    packed = [module for module in converted.modules() if isinstance(module, (Segment, Conv2d, Linear))]
    assert len(packed) == CALLS[name]


def run_step_by_step(segment, *inputs):
    """Execute a segment's program with `ops` and the reference, every step on arrays of its own."""
    program = parse_program(segment.program)
    layers = iter(split_weights(program, segment.weights()))
    values = [(x.numpy(), "float32", 1.0, 0) for x in inputs]
    for step in program.steps:
        x, dtype, scale, zero_point = values[step.x]
        arguments = {"clamp": None, **step.arguments}
        form = (
            arguments.get("out_dtype", "float32"),
            arguments.get("out_scale", 1.0),
            arguments.get("out_zero_point", 0),
        )
        given = {"input_scale": scale, "input_zero_point": zero_point}
        added = {}
        if step.other is not None:
            other, _, other_scale, other_zero_point = values[step.other]
            added = {"residual_scale": other_scale, "residual_zero_point": other_zero_point}
        if step.layer is not None:
            prepack, run = (getattr(ops, name) for name in (f"prepack_{step.op}", step.op))
            packed = prepack(*next(layers), **step.layer["options"], **given, input_dtype=dtype)
            x = x.reshape(len(x), -1) if step.op == "linear" and x.ndim == 4 else x
            y = run(x, packed, residual=None if step.other is None else other, **added, **arguments)
        elif step.op == "max_pool2d":
            del arguments["clamp"]
            y, form = reference.max_pool2d(x, **as_pairs(arguments)), (dtype, scale, zero_point)
        elif step.op == "avg_pool2d":
            y = reference.avg_pool2d(x, **as_pairs(arguments), **given)
        else:
            y = reference.add(x, None if step.other is None else other, **given, **added, **arguments)
        values.append((y, *form))
    return [torch.from_numpy(values[index][0]) for index in program.outputs]


def as_pairs(arguments):
    return {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}


@pytest.mark.parametrize("calibration", ["minmax", "percentile"])
def test_uint8_results_are_those_of_its_steps(network, calibration):
    model, x = network
    converted = convert(model, activations="uint8", example_inputs=[x, 2 * x], strict=True, calibration=calibration)
    checked = []

    def check(segment, inputs, output):
        if segment.rows:
            inputs, output = [x.flatten(0, -2) for x in inputs], output.flatten(0, -2)
        for y, wanted in zip(as_list(output), run_step_by_step(segment, *inputs), strict=True):
            assert torch.equal(y, wanted)
            checked.append(y)

    for module in converted.modules():
        assert not isinstance(module, (Conv2d, Linear))
        if isinstance(module, Segment):
            module.register_forward_hook(check)
    for y, wanted in zip(as_list(converted(x)), as_list(model(x)), strict=True):
        assert y.dtype == torch.float32
        assert y.shape == wanted.shape
        assert (y - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert checked


def test_uint8_network_runs_in_one_call_from_floats_to_floats(resnet):
    converted = convert(resnet, activations="uint8", example_inputs=images(), strict=True)
    rows = find_rows(converted)
    assert {row.where for row in rows.values()} == {"segment_0"}
    assert rows["conv1"].runs == rows["fc"].runs == "dense, uint8"
    assert rows["conv1"].levels == "256"
    assert "rounded to 8 bits: its levels are no integers" in rows["conv1"].why
    assert rows["blocks.0.conv1"].levels == "3"
    (segment,) = (module for module in converted.modules() if isinstance(module, Segment))
    program = parse_program(segment.program)
    dtypes = [step.arguments.get("out_dtype") for step in program.steps if step.op not in ("max_pool2d",)]
    assert dtypes == ["uint8"] * (len(dtypes) - 1) + [None]
    y, wanted = converted(images()), resnet(images())
    assert (y - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert torch.equal(y.argmax(1), wanted.argmax(1))


def test_predictions_of_digits_agree():
    steps = []
    for layer in load_network("mnist_ternary")[0]:
        w, bias = (torch.from_numpy(np.array(array)) for array in (layer.weights.dequantize(), layer.bias))
        made = nn.Conv2d(w.shape[1], len(w), 3, padding=1) if w.dim() == 4 else nn.Linear(w.shape[1], len(w))
        made.weight.data, made.bias.data = w, bias
        pools = {"max": [nn.MaxPool2d(2)], "mean": [nn.AdaptiveAvgPool2d(1), nn.Flatten()]}
        steps += [made, nn.ReLU(), *pools.get(layer.pool, [])]
    model = nn.Sequential(*steps[:-1]).eval()
    (train, _), (test, _) = load_digits()
    x, examples = torch.from_numpy(test), torch.from_numpy(train[::40])
    with torch.inference_mode():
        wanted = model(x)
        assert (convert(model, strict=True)(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        for calibration in ("minmax", "percentile"):
            options = {"activations": "uint8", "example_inputs": examples, "calibration": calibration}
            y = convert(model, strict=True, **options)(x)
            assert (y.argmax(1) == wanted.argmax(1)).float().mean() >= 0.995


def test_gradient_to_the_input_is_that_of_the_network(network):
    model, x = network
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    for module, given in ((convert(model), ours), (model, theirs)):
        sum(y.square().sum() for y in as_list(module(given))).backward()
    assert (ours.grad - theirs.grad).abs().max() <= 1e-4 * theirs.grad.abs().max()


def test_a_layer_alone_is_converted():
    layer = randomize(nn.Linear(16, 4))
    converted = convert(layer)
    assert isinstance(converted, Linear)
    assert [(row.layer, row.converted) for row in report(converted)] == [("", True)]
    torch.testing.assert_close(converted(torch.ones(2, 16)), layer(torch.ones(2, 16)))


@pytest.mark.parametrize("activations", ["float32", "uint8"])
def test_sizes_may_change(resnet, activations):
    converted = convert(resnet, activations=activations, example_inputs=images())
    for shape in ((1, 3, 33, 40), (3, 3, 20, 18), (0, 3, 20, 18), (1, 3, 8, 8)):
        x = torch.rand(shape, generator=torch.Generator().manual_seed(2))
        y, wanted = converted(x), resnet(x)
        assert y.shape == wanted.shape
        if activations == "float32":
            torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    y = converted(images().contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(y, converted(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activations", ["float32", "uint8"])
@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 4, 5, dilation=(1, 2)), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.MaxPool2d(2)],
        [nn.Conv2d(3, 4, (3, 1), padding=(1, 0)), nn.AvgPool2d(3, 2, 1), nn.Conv2d(4, 4, 4, padding=1)],
        [nn.Conv2d(3, 4, 3)],
    ],
)
def test_images_smaller_than_a_window_are_refused(layers, activations):
    model = randomize(nn.Sequential(*layers))
    converted = convert(model, activations=activations, example_inputs=torch.rand(1, 3, 30, 30))
    refused = 0
    for height in range(1, 12):
        for width in range(1, 16):
            x = torch.rand(2, 3, height, width)
            try:
                wanted = model(x)
            except RuntimeError:  # Kernel size can't be greater than actual input size; Output size is too small
                refused += 1
                with pytest.raises(ValueError, match=r"input: expected \(N, C, H, W\) of \d+ x \d+ pixels at least"):
                    converted(x)
            else:
                assert converted(x).shape == wanted.shape
    assert refused


def test_images_without_a_batch():
    layer = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
    packed, x, residual = Conv2d.from_float(layer, "ternary"), torch.rand(3, 5, 5), torch.rand(4, 5, 5)
    assert torch.equal(packed(x, residual), packed(x[None], residual[None])[0])
    converted = convert(nn.Sequential(layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), "ternary")
    for shape in ((3, 5, 5), (3, 5), (5,)):
        with pytest.raises(ValueError, match=r"input: expected \(N, C, H, W\) of 1 x 1 pixels .*, got \("):
            converted(torch.rand(shape))
    pooled = convert(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval(), "ternary")
    with pytest.raises(ValueError, match=r"input: expected \(N, C, H, W\) of 1 x 1 pixels .*, got \(2, 6\)"):
        pooled(torch.rand(2, 6))
    rows = convert(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval(), "ternary")
    assert torch.equal(rows(torch.ones(6)), rows(torch.ones(1, 6))[0])
