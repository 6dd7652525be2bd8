"""pycodesign.nn: modules, and networks converted to them."""

import copy
import doctest
import io
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pycodesign import ops, quantize
from pycodesign.demo import load_digits, load_network
from pycodesign.nn import Conv2d, Linear, Segment, convert, modules, report
from pycodesign.nn.calibration import find_range, to_affine
from pycodesign.nn.program import parse_program, split_weights
from pycodesign.reference import repetition as reference

# --- networks


class Block(nn.Module):
    """Residual, with a shortcut of its own where the size changes; in place where that is usual."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 16, 2), Block(16, 16))
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, 1)
        x = torch.flatten(F.adaptive_avg_pool2d(self.blocks(x), 1), 1)
        return self.fc(self.dropout(x))


class PreActivation(nn.Module):
    """Batch normalization before convolutions, where none can take it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.bns = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        for bn, conv in zip(self.bns, self.convs, strict=True):
            x = x + conv(bn(x).relu())
        return x.mean([-2, -1])


class Inception(nn.Module):
    """Branches that meet in a concatenation, and one convolution called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 1)
        self.right = nn.Sequential(OrderedDict(a=nn.Conv2d(8, 4, 1), act=nn.ReLU6(), b=nn.Conv2d(4, 8, 3, padding=1)))
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.last = nn.Conv2d(24, 6, 1)

    def forward(self, x):
        x = F.hardtanh(self.stem(x), -0.5, 2)
        y = torch.cat([self.left(x), self.right(x), self.pool(x)], 1)
        y = self.last(y)
        z = self.shared(self.shared(x).clamp(min=0))
        return y.reshape(y.shape[0], -1), F.leaky_relu(z)


class Crossing(nn.Module):
    """A value leaves the packed layers and comes back: these cannot all run in one call."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))

    def forward(self, x):
        a = self.a(x).relu()
        b = self.b(a)
        back = F.leaky_relu(b)
        c = self.c(back) + a
        return self.d(c) + b


def make_vgg():
    conv = [nn.Conv2d(4, 16, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.Hardtanh()]
    return nn.Sequential(*conv, nn.Conv2d(16, 8, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(32, 12), nn.BatchNorm1d(12))


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels, **options):
        super().__init__(channels, **options)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4 dimensions, got {x.ndim}")
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return self.act(y)


class Normalized(nn.Module):
    """Batch normalization of the second of three dimensions, which is as large as the third."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(12, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.bn(self.fc(x))


class Mlp(nn.Module):
    """Linear layers over (batch, tokens, features)."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(24, 48), nn.Linear(48, 24), nn.Linear(24, 7)

    def forward(self, x):
        return self.head(x + self.down(input=F.relu(self.up(x))))


NETWORKS = {
    "resnet": (ResNet, (2, 3, 20, 18)),
    "preactivation": (PreActivation, (2, 4, 9, 9)),
    "inception": (Inception, (2, 4, 10, 11)),
    "crossing": (Crossing, (1, 8, 7, 7)),
    "vgg": (make_vgg, (3, 4, 8, 8)),
    "mlp": (Mlp, (2, 5, 24)),
}


def randomize(model, quantizer=quantize.ternary, skip=()):
    """Give layers fake-quantized weights, and batch normalization statistics; some of its scales are negative."""
    torch.manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight)
            if name not in skip:
                module.weight.data = torch.from_numpy(quantizer(module.weight).dequantize())
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_()
            module.running_var.uniform_(1, 30)
            if module.affine:
                module.weight.data.uniform_(-1, 2)
                module.bias.data.normal_()
    return model.eval().requires_grad_(False)


@pytest.fixture(params=NETWORKS)
def network(request):
    make, shape = NETWORKS[request.param]
    return randomize(make()), torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def resnet():
    """First and last layer are float."""
    return randomize(ResNet(), skip=("conv1", "fc"))


def images(n=2, seed=1):
    return torch.randn(n, 3, 20, 18, generator=torch.Generator().manual_seed(seed))


def as_list(values):
    return list(values) if isinstance(values, (tuple, list)) else [values]


def find_rows(model):
    return {row.layer: row for row in report(model)}


def copy_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


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


def same(inputs, outputs, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def function(forward, **modules):
    """Return a network that computes a function of itself and its input."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            for name, module in modules.items():
                setattr(self, name, module)

        def forward(self, x):
            return forward(self, x)

    return Network()


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
    x = torch.randn(2, 4, 6, 6)
    converted = convert(model, strict=True, skip=skip)
    assert not converted(x).isfinite().all()
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5, equal_nan=True)


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


# --- modules


@pytest.fixture(params=["conv2d", "linear"])
def layer(request):
    torch.manual_seed(0)
    if request.param == "linear":
        return nn.Linear(24, 10), torch.randn(3, 2, 24)
    return nn.Conv2d(6, 8, 3, (2, 1), "valid", 2, 2), torch.randn(2, 6, 9, 9)


@pytest.fixture
def packed_layer(layer):
    module, x = layer
    return (Linear if isinstance(module, nn.Linear) else Conv2d).from_float(module, "ternary"), x


def test_from_float_computes_the_quantized_layer(layer, packed_layer):
    module, x = layer
    module.weight.data = torch.from_numpy(quantize.ternary(module.weight).dequantize())
    torch.testing.assert_close(packed_layer[0](x), module(x))
    exact = type(packed_layer[0]).from_float(module)
    torch.testing.assert_close(exact(x), module(x))
    assert np.array_equal(exact.quantized().dequantize(), module.weight.detach().numpy())
    residual = torch.randn_like(module(x))
    clamped = type(exact).from_float(module, clamp=(0, 1))
    torch.testing.assert_close(clamped(x, residual), (module(x) + residual).clamp(0, 1))


def test_same_padding():
    module = nn.Conv2d(4, 4, (3, 5), padding="same", dilation=(2, 1))
    x = torch.randn(1, 4, 8, 8)
    packed = Conv2d.from_float(module, "binary")
    assert packed.options["padding"] == (2, 2)
    assert packed(x).shape == module(x).shape


def test_a_module_is_copied_saved_and_loaded(packed_layer):
    module, x = packed_layer
    y = module(x)
    for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(made(x), y)
        assert repr(made) == repr(module)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert list(state) == ["codes", "levels", "scale", "bias"]
    other = copy.deepcopy(module)
    for tensor in other.buffers():
        tensor.zero_() if tensor.dtype == torch.uint8 else tensor.mul_(3)
    assert not torch.equal(other(x), y)
    other.load_state_dict(state)
    assert torch.equal(other(x), y)


def test_states_of_other_weights_are_refused():
    weights = [torch.randint(-1, 2, (4, 4, 3, 3)).float() for _ in range(2)]
    weights[1].clamp_(min=0)
    models = [nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval() for _ in weights]
    for model, weight in zip(models, weights, strict=True):
        for layer in (model[0], model[2]):
            layer.weight.data = weight
    first, second = (convert(model) for model in models)
    message = r"segment_0: expected codes \(72,\), levels \(6,\), .*, got codes \(36,\), levels \(4,\), .* of levels"
    before = copy_state(first)
    with pytest.raises(RuntimeError, match=message):
        first.load_state_dict(second.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())
    with pytest.raises(
        RuntimeError, match=r"Conv2d: expected codes .*, levels \(3,\), .*, got codes .*, levels \(2,\)"
    ):
        Conv2d.from_float(models[0][0]).load_state_dict(Conv2d.from_float(models[1][0]).state_dict())


def test_from_quantized():
    q = quantize.uniform(torch.randn(8, 4, 3, 3), 3)
    bias = torch.randn(8)
    module = Conv2d.from_quantized(q, bias, stride=2, groups=2, input_dtype="uint8", input_scale=0.5, algorithm="dense")
    x = torch.randint(0, 256, (2, 8, 7, 7), dtype=torch.uint8)
    packed = ops.prepack_conv2d(q, bias, stride=2, groups=2, input_dtype="uint8", input_scale=0.5, algorithm="dense")
    assert torch.equal(module(x), ops.conv2d(x, packed))
    assert module.packed().algorithm == "dense"
    assert not list(module.parameters())
    text = "Conv2d(8, 8, kernel_size=(3, 3), levels=8, bias=True, stride=2, groups=2, input_dtype='uint8', "
    assert repr(module).startswith(text)
    assert Linear.from_quantized(quantize.binary(torch.randn(2, 3))).bias is None


def test_bad_modules():
    q = quantize.binary(torch.randn(8, 4))
    with pytest.raises(TypeError, match="q: expected QuantizedTensor or KernelCodebook, got Tensor"):
        Linear.from_quantized(torch.randn(8, 4))
    with pytest.raises(TypeError, match=r"stride: expected one of the options input_dtype, .* got another"):
        Linear.from_quantized(q, stride=2)
    with pytest.raises(ValueError, match=r"bias: expected float32 \(8,\), got float32 \(4,\)"):
        Linear.from_quantized(q, torch.ones(4))
    with pytest.raises(
        ValueError, match=r"q: expected QuantizedTensor \(O, C / groups, kH, kW\), got weights of shape"
    ):
        Conv2d.from_quantized(q)
    with pytest.raises(ValueError, match="padding_mode: expected 'zeros', got 'circular'"):
        Conv2d.from_float(nn.Conv2d(4, 4, 3, padding_mode="circular"), "binary")
    with pytest.raises(TypeError, match=r"module: expected torch.nn.Conv2d, got Linear"):
        Conv2d.from_float(nn.Linear(4, 4), "binary")
    with pytest.raises(TypeError, match=r"module: expected torch.nn.Linear, got Conv2d"):
        Linear.from_float(nn.Conv2d(4, 4, 3), "binary")
    wanted = "weights: expected a function that returns a QuantizedTensor or a KernelCodebook, got Tensor"
    with pytest.raises(TypeError, match=wanted):
        Linear.from_float(nn.Linear(4, 4), lambda w: w)
    with pytest.raises(ValueError, match=r"weights: expected a QuantizedTensor \(4, 4\), got \(8, 4\)"):
        Linear.from_float(nn.Linear(4, 4), lambda w: q)
    with pytest.raises(ValueError, match="w: output 0 has 300 distinct values"):
        Linear.from_float(nn.Linear(300, 4))


@pytest.mark.parametrize("example", [modules.Conv2d, modules.Linear, convert, report], ids=lambda e: e.__name__)
def test_docstring_examples(example):
    (found,) = doctest.DocTestFinder(recurse=False).find(example, "example", module=False, globs={})
    assert found.examples
    assert doctest.DocTestRunner().run(found).failed == 0
