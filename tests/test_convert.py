"""`nn.convert`: results of converted networks, what is left as it is and why, bad arguments."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, ResNet, as_list, copy_state, find_rows, function, images, randomize, same
from torch import nn

from pycodesign import ops, quantize
from pycodesign.demo import load_digits, load_network
from pycodesign.nn import Conv2d, Linear, Segment, convert, report
from pycodesign.nn.calibration import find_range, to_affine
from pycodesign.nn.program import parse_program, split_weights
from pycodesign.reference import repetition as reference


@pytest.fixture(params=NETWORKS)
def network(request):
    make, shape = NETWORKS[request.param]
    return randomize(make()), torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def resnet():
    """First and last layer are float."""
    return randomize(ResNet(), skip=("conv1", "fc"))


# --- converted networks


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


def test_skipped_layers_stay_as_they_are(resnet):
    converted = convert(resnet, activations="uint8", example_inputs=images(), skip=["conv1", "blocks.1.conv2"])
    rows = find_rows(converted)
    assert rows["conv1"].why == rows["blocks.1.conv2"].why == "named in skip"
    assert torch.equal(converted.conv1.weight, resnet.conv1.weight)
    wanted = resnet(images())
    assert (converted(images()) - wanted).abs().max() < 0.05 * wanted.abs().max()


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


def test_calibration_runs_the_quantized_network():
    """Scales are those of what runs, not of the float network, whose weights are much smaller here."""
    model = randomize(ResNet(), skip=dict(ResNet().named_modules()))
    x = images(4)
    wanted = convert(model, enlarge)(x)
    y = convert(model, enlarge, activations="uint8", example_inputs=x)(x)
    assert (y - wanted).abs().max() < 0.05 * wanted.abs().max()


def enlarge(w):
    return quantize.ternary(8 * w)


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
def test_a_converted_network_is_copied_saved_and_loaded(resnet, activations):
    converted = convert(resnet, activations=activations, example_inputs=images())
    x, y = images(), converted(images())
    for made in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(made(x), y)
        assert str(report(made)) == str(report(converted))
    file = io.BytesIO()
    torch.save(converted.state_dict(), file)
    file.seek(0)
    other = convert(randomize(ResNet(), skip=("conv1", "fc")), activations=activations, example_inputs=5 * images())
    for tensor in (other.segment_0.scale, other.segment_0.bias):
        tensor.mul_(3)
    assert not torch.equal(other(x), y)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about its own code
@pytest.mark.parametrize("activations", ["float32", "uint8"])
def test_a_converted_network_is_compiled_and_exported(resnet, activations):
    converted = convert(resnet, activations=activations, example_inputs=images())
    x = images()
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), converted(x))
    exported = torch.export.export(converted, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    for n in (2, 3):
        assert torch.equal(exported.module()(images(n)), converted(images(n)))
    assert [str(n.target) for n in exported.graph.nodes].count("pycodesign.chain.default") == 1


def test_gradient_to_the_input_is_that_of_the_network(network):
    model, x = network
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    for module, given in ((convert(model), ours), (model, theirs)):
        sum(y.square().sum() for y in as_list(module(given))).backward()
    assert (ours.grad - theirs.grad).abs().max() <= 1e-4 * theirs.grad.abs().max()


def test_in_place_all_or_nothing():
    model = randomize(Untraceable(), skip=("plain",))
    with pytest.raises(ValueError, match=r"strict: every layer was to be converted; plain: .* do not repeat"):
        convert(model, inplace=True, strict=True)
    assert type(model.conv) is nn.Conv2d
    assert convert(model, inplace=True) is model
    assert type(model.conv) is Conv2d


def test_in_place(resnet):
    wanted, alias = resnet(images()), resnet
    converted = convert(resnet, inplace=True)
    assert converted is alias
    assert hasattr(alias, "segment_0")
    torch.testing.assert_close(alias(images()), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(copy.deepcopy(alias)(images()), alias(images()))


# --- inputs


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


# --- networks that cannot be traced


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 5)
        self.plain = nn.Linear(5, 300)

    def forward(self, x):
        y = self.conv(x)
        if y.sum() > 0:
            y = y + 1
        return self.plain(self.fc(input=y.movedim(1, -1)))


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


def test_a_layer_alone_is_converted():
    layer = randomize(nn.Linear(16, 4))
    converted = convert(layer)
    assert isinstance(converted, Linear)
    assert [(row.layer, row.converted) for row in report(converted)] == [("", True)]
    torch.testing.assert_close(converted(torch.ones(2, 16)), layer(torch.ones(2, 16)))


# --- what is left, and why


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


# --- arguments


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


def test_ranges():
    values = torch.arange(-1000, 19001, dtype=torch.float32)[torch.randperm(20001)]
    assert find_range(values, "minmax") == (-1000, 19000)
    assert find_range(values, "percentile") == (-999, 18999)  # without one of 10,000 at either end
    assert to_affine([(-1, 1), (-2, 3)], "minmax", "x") == (float(np.float32(5 / 255)), 102)
    assert to_affine([(-1, 1), (-2, 3)], "percentile", "x") == (float(np.float32(3.5 / 255)), 109)
    assert to_affine([(1, 2)], "minmax", "x") == (float(np.float32(2 / 255)), 0)  # zero is held exactly
    assert to_affine([(0, 0)], "minmax", "x") == (1.0, 0)
