"""`nn.Conv2d` and `nn.Linear`: packed layers as modules; examples of docstrings; an import without torch."""

import copy
import doctest
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from networks import copy_state
from torch import nn

from pycodesign import ops, quantize
from pycodesign.nn import Conv2d, Linear, convert, modules, report


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


@pytest.mark.parametrize(
    "options",
    [
        {"input_dtype": "uint8", "input_scale": np.float32(0.1), "input_zero_point": np.uint8(3)},
        {"stride": np.int64(2), "padding": (np.int32(1), np.int64(0)), "groups": np.int64(2)},
        {"clamp": (np.float32(0.1), None), "out_dtype": "uint8", "out_scale": np.float64(0.1)},
    ],
)
def test_options_may_be_numbers_of_numpy(options):
    q = quantize.ternary(torch.randn(8, 4, 3, 3))
    module = Conv2d.from_quantized(q, **options)
    dtype = torch.uint8 if "input_dtype" in options else torch.float32
    x = torch.randint(0, 9, (1, 4 * options.get("groups", 1), 7, 7)).to(dtype)
    epilogue = {name: value for name, value in options.items() if name in ("clamp", "out_dtype", "out_scale")}
    packing = {name: value for name, value in options.items() if name not in epilogue}
    assert torch.equal(module(x), ops.conv2d(x, ops.prepack_conv2d(q, **packing), **epilogue))
    assert "np." not in repr(module)


def test_bad_modules():
    q = quantize.binary(torch.randn(8, 4))
    with pytest.raises(TypeError, match="q: expected QuantizedTensor or KernelCodebook, got Tensor"):
        Linear.from_quantized(torch.randn(8, 4))
    with pytest.raises(TypeError, match=r"stride: expected one of the options input_dtype, .* got another"):
        Linear.from_quantized(q, stride=2)
    with pytest.raises(TypeError, match=r"input_scale: expected a number, .*, got ndarray"):
        Linear.from_quantized(q, input_dtype="uint8", input_scale=np.ones(2, np.float32))
    with pytest.raises(ValueError, match=r"stride: expected an integer or a pair, got \(2,\)"):
        Conv2d.from_quantized(quantize.binary(torch.randn(4, 4, 3, 3)), stride=(2,))
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


def test_without_torch_one_sentence_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['torch'] = None; import pycodesign; pycodesign.quantize; pycodesign.nn"
    python = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    wanted = "ImportError: pycodesign.nn needs torch: `pip install 'pycodesign[torch]'`"
    assert python.stderr.splitlines()[-1] == wanted
