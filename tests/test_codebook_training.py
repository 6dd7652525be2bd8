"""Codebooks learned by torch: the parametrization, its gradients, its conversion."""

import copy
import doctest
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck
from torch.nn.utils import parametrize

import pycodesign
from pycodesign.nn import Codebook, anneal_codebooks, codebooks, use_codebooks
from pycodesign.nn.codebooks import find_codebook
from pycodesign.nn.sources import find_weight
from pycodesign.quantize import KernelCodebook, kernel_codebook

VALUES = ("sign", "ternary", "real")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def parametrized(layer, **options):
    nn.init.normal_(layer.weight)
    return parametrize.register_parametrization(layer, "weight", Codebook(layer.weight, **options))


def network(width=16):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 4),
    )


def images(count):
    """Images (N, 1, 12, 12) of noise with a bar in one of four directions, and which."""
    bars = torch.stack([torch.eye(12), torch.eye(12).flip(1), torch.eye(12)[:1].T.expand(12, 12), torch.zeros(12, 12)])
    bars[2], bars[3, 5:7] = 0, 1
    bars[2, :, 5:7] = 1
    labels = torch.arange(count) % 4
    return 0.7 * torch.randn(count, 1, 12, 12) + bars[labels, None], labels


def train(model, steps, rate=3e-3):
    optimizer = torch.optim.Adam(model.parameters(), rate)
    model.train()
    for _ in range(steps):
        x, labels = images(64)
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def accuracy(model):
    x, labels = images(400)
    with torch.no_grad():
        return float((model(x).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (lambda: nn.Conv2d(12, 16, 3), {}),
        (lambda: nn.Conv2d(12, 16, (1, 5)), {"codebooks": 3}),
        (lambda: nn.Conv2d(16, 16, 3, groups=2), {"codebooks": 2}),
        (lambda: nn.Conv2d(16, 24, 1), {"codebooks": 2}),
        (lambda: nn.Linear(20, 24), {"pattern_channels": 5}),
    ],
    ids=["3x3", "1x5", "groups", "1x1", "linear"],
)
def test_the_weight_begins_as_the_fit_and_is_exported_exactly(layer, options, values):
    layer = parametrized(layer(), kernels=8, values=values, **options)
    fitted = kernel_codebook(layer.parametrizations.weight.original, 8, values, **options)
    weight = layer.weight.detach().numpy()
    # the fit ends with new scales, for which another kernel may be nearer
    assert np.isclose(weight, fitted.dequantize(), rtol=1e-5).mean() > 0.9
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    exported = find_codebook(layer)
    assert np.array_equal(exported.dequantize(), layer.weight.detach().numpy())
    assert exported.values == values and exported.kernels.shape == fitted.kernels.shape
    assert not np.array_equal(exported.dequantize(), weight)


def test_each_pattern_gets_its_nearest_kernel(monkeypatch):
    layer = parametrized(nn.Conv2d(8, 12, 3), kernels=8, values="real", codebooks=2)
    codebook = layer.parametrizations.weight[0]
    v = (layer.parametrizations.weight.original / codebook.scale()).detach().reshape(12, 8, 1, 9)
    kernels = codebook.kernels.detach().reshape(2, 8, 9).repeat_interleave(4, 0)  # (J, U, D)
    choices = torch.cat([kernels, -kernels], 1)
    nearest = (v - choices).square().sum(-1).min(-1).values
    chosen = layer.weight.detach() / codebook.scale().detach()
    torch.testing.assert_close((v[:, :, 0] - chosen.reshape(12, 8, 9)).square().sum(-1), nearest)
    whole = layer.weight.detach()
    monkeypatch.setattr(codebooks, "BLOCK", 50)  # three patterns at a time
    assert torch.equal(layer.weight, whole)


@pytest.mark.parametrize("values", VALUES)
def test_gradients_go_straight_through(values):
    layer = parametrized(nn.Conv2d(6, 8, 3), kernels=4, values=values)
    codebook, given = layer.parametrizations.weight[0], torch.randn(8, 6, 3, 3)
    (layer.weight * given).sum().backward()
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, given)
    exported = find_codebook(layer)
    scale, chosen = codebook.scale().detach(), torch.from_numpy(exported.decode())
    normalized = layer.parametrizations.weight.original.detach() / scale
    expected = (given * scale * (chosen - normalized)).sum((1, 2, 3), keepdim=True)
    torch.testing.assert_close(codebook.log_scale.grad, expected)
    expected = torch.zeros_like(codebook.kernels)
    for o, j in np.ndindex(8, 6):
        expected[0, exported.index[o, j]] += given[o, j] * scale[o] * int(exported.sign[o, j])
    torch.testing.assert_close(codebook.kernels.grad, expected)


def test_dead_outputs_stay_finite_and_do_not_shrink():
    for dtype in (torch.float16, torch.float32):
        layer = nn.Conv2d(6, 8, 3)
        nn.init.normal_(layer.weight)
        nn.init.zeros_(layer.weight[3:4])
        layer = parametrize.register_parametrization(layer.to(dtype), "weight", Codebook(layer.weight, kernels=4))
        (codebook,), original = layer.parametrizations.weight, layer.parametrizations.weight.original
        with torch.no_grad():
            original[3] = 0.01  # the least scale of 16 bits makes it infinite
        assert np.array_equal(layer.weight.detach().float().numpy(), find_codebook(layer).dequantize())
        layer.weight[3].sum().backward()
        assert torch.equal(original.grad[3], torch.ones_like(original[3]))
        assert codebook.log_scale.grad.isfinite().all() and codebook.log_scale.grad[3].abs() < 1e-5


def test_autocast_assigns_the_same_kernels():
    layer = parametrized(nn.Conv2d(32, 64, 3), kernels=64, values="real")
    with torch.autocast("cpu", torch.bfloat16):
        weight = layer.weight.detach()
    assert torch.equal(weight, layer.weight)


def test_state_of_other_values_is_refused():
    sign, real = (parametrized(nn.Conv2d(6, 8, 3), kernels=4, values=values) for values in ("sign", "real"))
    with pytest.raises(ValueError, match="state: expected kernels of 'sign', got 'real'"):
        sign.load_state_dict(real.state_dict())


def test_annealing_blends_float_weights_and_codebook():
    layer = parametrized(nn.Conv2d(6, 8, 3), kernels=4)
    (codebook,) = layer.parametrizations.weight
    whole = layer.weight.detach()
    codebook.share = 0.25
    torch.testing.assert_close(layer.weight, 0.25 * whole + 0.75 * layer.parametrizations.weight.original)
    with pytest.raises(ValueError, match=r"share: expected 1, the end of annealing, got 0\.25"):
        find_weight(layer)
    anneal_codebooks(nn.Sequential(layer), 0)
    assert torch.equal(layer.weight, layer.parametrizations.weight.original)
    other = parametrized(nn.Conv2d(6, 8, 3), kernels=4)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    anneal_codebooks(layer, 0.3)
    other.load_state_dict(layer.state_dict())
    assert other.parametrizations.weight[0].share == 0.3
    assert use_codebooks(nn.Sequential(layer)) == ["0"]
    anneal_codebooks(layer, 1)
    assert torch.equal(layer.weight, whole)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share: expected a number from 0 to 1, got"):
            anneal_codebooks(layer, share)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, values):
    layer = parametrized(nn.Conv2d(6, 8, 3), kernels=4, values=values).to(dtype)
    layer.weight.float().square().sum().backward()
    assert layer.weight.dtype == layer.parametrizations.weight.original.grad.dtype == dtype
    torch.testing.assert_close(
        torch.from_numpy(find_codebook(layer).dequantize()), layer.weight.detach().float(), rtol=0.02, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_floats(dtype):
    """The codebook has the model's dtype; an output of zeros stays one."""
    conv = nn.Conv2d(6, 8, 3)
    nn.init.zeros_(conv.weight[3:4])
    models = [nn.Sequential(copy.deepcopy(conv)).to(dtype), nn.Sequential(conv)]
    for model in models:
        assert use_codebooks(model, kernels=4) == ["0"]
    models[1].to(dtype)
    for model in models:
        y = model(torch.ones(1, 6, 4, 4, dtype=dtype))
        y.sum().backward()
        assert y.dtype == dtype and y.isfinite().all()
        assert model[0].weight[3].abs().max() < 1e-7
        assert model[0].parametrizations.weight[0].kernels.grad.isfinite().all()


@pytest.mark.parametrize("name", ["w", "kernels", "log_scale"])
def test_what_is_not_finite_is_not_exported(name):
    layer = parametrized(nn.Conv2d(6, 8, 3), kernels=4)
    (codebook,) = layer.parametrizations.weight
    with torch.no_grad():
        (layer.parametrizations.weight.original if name == "w" else getattr(codebook, name)).view(-1)[3] = torch.nan
    with pytest.raises(ValueError, match=f"{name}: expected finite numbers, got NaN or infinity"):
        find_weight(layer)


def test_use_codebooks_takes_what_gains_and_is_idempotent():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.Conv2d(16, 16, 3),
        nn.Sequential(nn.Conv2d(16, 16, (1, 3)), nn.Conv2d(16, 16, 1)),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.ReLU(),
        nn.Linear(16, 16),
    )
    model.eval()
    assert use_codebooks(model, kernels=8, skip=["0"], codebooks=2, values="ternary") == ["1", "2.0"]
    assert not any(module.training for module in model.modules())
    (codebook,) = model[1].parametrizations.weight
    assert repr(codebook) == "Codebook(kernels=8, values='ternary', codebooks=2, pattern=(1, 3, 3))"
    weights = model[1].weight
    assert use_codebooks(model, kernels=4, skip=["0"]) == ["1", "2.0"]
    assert list(model[1].parametrizations.weight) == [codebook] and torch.equal(model[1].weight, weights)


def test_bad_arguments_leave_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 2, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r"1: kernels: expected at most 32, the patterns of a codebook, got 64"):
        use_codebooks(model, kernels=64)
    with pytest.raises(TypeError, match="0: kernels: expected int, got str"):
        use_codebooks(model, kernels="64")
    with pytest.raises(ValueError, match="skip: expected names of convolutions, got '2'"):
        use_codebooks(model, skip=["2"])
    with pytest.raises(TypeError, match="skip: expected a collection of module names, got '0'"):
        use_codebooks(model, skip="0")
    with pytest.warns(FutureWarning, match="deprecated"):
        torch.nn.utils.weight_norm(model[1])
    with pytest.raises(ValueError, match="1: expected a weight that is a parameter, got one that a hook computes"):
        use_codebooks(model, kernels=4)
    assert not any(parametrize.is_parametrized(module) for module in model)


def test_state_dict_and_deepcopy():
    model, other = network(), network()
    for part in (model, other):
        use_codebooks(part, kernels=8, skip=["0"])
    assert not torch.equal(model[2].weight, other[2].weight)
    other.load_state_dict(model.state_dict())
    for same in (other, copy.deepcopy(model)):
        assert torch.equal(same[2].weight, model[2].weight)


@pytest.fixture(scope="module")
def pretrained():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return train(network(), 60)


@pytest.mark.parametrize("values", VALUES)
def test_training_learns_weights_kernels_and_scales_and_converts_exactly(pretrained, values):
    model = copy.deepcopy(pretrained)
    names = use_codebooks(model, kernels=4, values=values, skip=["0"])
    assert names == ["2", "5"]
    before, begun = accuracy(model.eval()), copy.deepcopy(model.state_dict())
    train(model, 40)
    assert accuracy(pretrained) > 0.95 and accuracy(model) > max(before, 0.9)
    for name, value in model.state_dict().items():
        assert torch.equal(value, begun[name]) == ("extra_state" in name) or "num_" in name
    for name in names:
        layer, exported = model.get_submodule(name), find_codebook(model.get_submodule(name))
        assert np.array_equal(exported.dequantize(), layer.weight.detach().numpy())
        assert exported.U == 4 and exported.values == values

    converted = pycodesign.nn.convert(model, skip=["0", "10"])
    rows = {row.layer: row for row in pycodesign.nn.report(converted)}
    x, _ = images(20)
    with torch.no_grad():
        expected, got = model(x), converted(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert rows["2"].converted and rows["5"].converted
    q = find_weight(model[2])
    assert isinstance(q, KernelCodebook) and np.array_equal(q.dequantize(), model[2].weight.detach().numpy())
    if values == "real":
        assert "codebook" in rows["2"].runs
        return
    eight = pycodesign.nn.convert(model, activations="uint8", example_inputs=x, skip=["0", "10"])
    rows = {row.layer: row for row in pycodesign.nn.report(eight)}
    assert all(rows[name].converted and "rounded" not in rows[name].why for name in names)
    with torch.no_grad():
        torch.testing.assert_close(eight(x), expected, rtol=0, atol=0.1 * float(expected.abs().max()))


def test_convert_fits_codebooks_to_float_weights():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 1)).eval()
    x = torch.randn(2, 16, 6, 6)
    converted = pycodesign.nn.convert(model, weights="kernel_codebook")
    assert [row.converted for row in pycodesign.nn.report(converted)] == [True, False]
    assert "kernels: expected at most 24" in pycodesign.nn.report(converted)[1].why
    model[0].weight.data = torch.from_numpy(kernel_codebook(model[0].weight).dequantize())
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)


def test_convert_keeps_real_kernels():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 1), nn.Flatten())
    model = model.append(nn.Linear(24 * 16, 10)).eval()
    model[1].running_mean.normal_(generator=torch.Generator().manual_seed(0))
    converted = pycodesign.nn.convert(model, weights=lambda w: kernel_codebook(w, 6, "real"))
    assert [row.levels for row in pycodesign.nn.report(converted)] == ["6 kernels"] * 3
    for layer in (model[0], model[3], model[5]):
        layer.weight.data = torch.from_numpy(kernel_codebook(layer.weight, 6, "real").dequantize())
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    y = model(x.requires_grad_())
    torch.testing.assert_close(converted(x), y, rtol=1e-5, atol=1e-5)
    (expected,), (grad,) = (torch.autograd.grad(f.sum(), x) for f in (y, converted(x)))
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)

    file = io.BytesIO()
    torch.save(converted.state_dict(), file)
    again = pycodesign.nn.convert(model, weights=lambda w: kernel_codebook(torch.randn_like(w), 6, "real"))
    assert not torch.allclose(again(x), y)
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    torch.testing.assert_close(again(x), converted(x), rtol=0, atol=0)

    integers = pycodesign.nn.convert(
        model, weights=lambda w: kernel_codebook(w, 6, "real"), activations="uint8", example_inputs=x.detach()
    )
    assert all("its kernels are no integers" in row.why for row in pycodesign.nn.report(integers))


@pytest.mark.parametrize("size", [(12, 8, 3, 3), (12, 16, 1, 1), (10, 32)])
@pytest.mark.parametrize("codebooks", [1, 2])
@pytest.mark.parametrize("values", VALUES)
def test_operators_take_codebooks(size, codebooks, values):
    w = torch.randn(size, generator=torch.Generator().manual_seed(2))
    q = kernel_codebook(w, 5, values, codebooks=codebooks)
    kind = pycodesign.nn.Linear if len(size) == 2 else pycodesign.nn.Conv2d
    layer = kind.from_quantized(q)
    assert "kernels=5" in repr(layer)
    kept = layer.quantized()
    assert all(np.array_equal(getattr(kept, name), getattr(q, name)) for name in ("index", "sign", "kernels", "scale"))
    x = torch.randn(3, *(size[1:] if len(size) == 2 else (size[1], 5, 7)), requires_grad=True)
    operator = getattr(torch.ops.pycodesign, layer.kind).default
    arguments = x, layer.codes, layer.levels, layer.scale, None, None, layer.options_json
    opcheck(operator, arguments)
    w = torch.from_numpy(q.dequantize())
    expected = x @ w.T if len(size) == 2 else torch.nn.functional.conv2d(x, w)
    torch.testing.assert_close(operator(*arguments), expected, rtol=1e-5, atol=1e-5)
    for codes, got in ((layer.codes + 20, "int8 from 0 to 2[0-4]"), (layer.codes.short(), "int16 from ")):
        with pytest.raises(ValueError, match=f"codes: expected int8 from -5 to 4 for 5 kernels, got {got}"):
            operator(x.detach(), codes, *arguments[2:])


@pytest.mark.parametrize(("kernels", "dtype"), [(128, torch.int8), (129, torch.int16)])
def test_modules_hold_one_byte_a_pattern_up_to_128_kernels(kernels, dtype):
    q = kernel_codebook(torch.randn(24, 24, 3, 3), kernels)
    layer = pycodesign.nn.Conv2d.from_quantized(q)
    assert layer.codes.dtype == dtype and layer.codes.shape == (24, 24)
    assert np.array_equal(layer.quantized().dequantize(), q.dequantize())
    model = nn.Sequential(nn.Conv2d(24, 24, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval()
    segment = pycodesign.nn.convert(model, weights=lambda w: q)
    (codes,) = (value for name, value in segment.state_dict().items() if name.endswith("codes"))
    assert codes.numel() * codes.itemsize == 576 * layer.codes.itemsize
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(q.dequantize()))
        x = torch.randn(2, 24, 6, 6)
        torch.testing.assert_close(segment(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("item", [Codebook, use_codebooks])
def test_docstring_examples(item):
    (found,) = doctest.DocTestFinder(recurse=False).find(item, item.__name__, module=codebooks)
    assert found.examples
    assert doctest.DocTestRunner().run(found).failed == 0
