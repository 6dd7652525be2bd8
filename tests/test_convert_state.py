"""`nn.convert`: converted networks are copied, saved, loaded, compiled and exported; conversion in place, and modes."""

import copy
import io
import pickle

import pytest
import torch
from networks import ResNet, Untraceable, find_rows, images, make_resnet, randomize, same
from torch import nn

from pycodesign.nn import Conv2d, convert, report


@pytest.fixture
def resnet():
    return make_resnet()


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


def test_models_that_cannot_be_copied():
    with pytest.warns(FutureWarning, match="deprecated"):
        model = torch.nn.utils.weight_norm(nn.Linear(4, 4))
    model(torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"model: expected one that can be copied \(torch.nn.utils.weight_norm cannot"):
        convert(nn.Sequential(model).eval())


def test_conversion_in_inference_mode_makes_ordinary_tensors():
    model, x = randomize(nn.Sequential(same(3, 3), nn.ReLU(), same(3, 3))), torch.randn(2, 3, 5, 5)
    with torch.inference_mode():
        converted = convert(model, example_inputs=x)
    assert not any(tensor.is_inference() for tensor in converted.state_dict().values())
    converted(x.requires_grad_()).sum().backward()
    assert x.grad is not None


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
