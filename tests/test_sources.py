"""Weights of other libraries' modules: read exactly as those modules compute with them."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from pycodesign.nn import convert, report, sources
from pycodesign.nn.sources import find_weight
from pycodesign.quantize import QuantizedTensor


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def qnn() -> ModuleType:
    return pytest.importorskip("brevitas.nn", reason="Brevitas is not installed")


@pytest.fixture(scope="module")
def ao() -> ModuleType:
    return pytest.importorskip("torchao.quantization", reason="torchao is not installed")


def check_equal(q: QuantizedTensor | None, weight: torch.Tensor) -> QuantizedTensor:
    """The weights are the library's bit for bit; the sign of zero aside."""
    assert q is not None
    np.testing.assert_array_equal(q.dequantize(), weight.detach().float().numpy())
    return q


@torch.no_grad()
def check_forward(module: nn.Module, x: torch.Tensor, q: QuantizedTensor) -> None:
    """The module computes with these weights: no other part of it changes the result."""
    w = torch.from_numpy(q.dequantize())
    conv = isinstance(module, nn.Conv2d)
    expected = nn.functional.conv2d(x, w, module.bias) if conv else nn.functional.linear(x, w, module.bias)
    got = module(x)
    torch.testing.assert_close(getattr(got, "value", got), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", [nn.Conv2d(3, 4, 3), nn.Linear(3, 4), nn.ReLU(), nn.Sequential()], ids=str)
def test_plain_modules_have_none(module: nn.Module) -> None:
    assert find_weight(module) is None


# Brevitas


BREVITAS = [
    ("SignedBinaryWeightPerTensorConst", None, [-1, 1]),
    ("SignedTernaryWeightPerTensorConst", None, [-1, 0, 1]),
    ("Int8WeightPerChannelFloat", 2, [-1, 0, 1]),
    ("Int8WeightPerChannelFloat", 3, range(-3, 4)),
    ("Int8WeightPerChannelFloat", 4, range(-7, 8)),
    ("Int8WeightPerTensorFloat", 4, range(-7, 8)),
    ("Int8WeightPerTensorFixedPoint", 3, range(-4, 4)),
    ("Int8WeightPerChannelFloat", 8, range(-127, 128)),
]


@pytest.mark.parametrize(("quantizer", "bits", "levels"), BREVITAS)
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_brevitas(qnn: ModuleType, kind: str, quantizer: str, bits: int | None, levels: list[int]) -> None:
    quant = pytest.importorskip("brevitas.quant")
    options = {"weight_quant": getattr(quant, quantizer), **({"weight_bit_width": bits} if bits else {})}
    module = qnn.QuantConv2d(8, 16, 3, **options) if kind == "conv" else qnn.QuantLinear(32, 16, bias=True, **options)
    nn.init.normal_(module.weight)
    module.eval()
    q = check_equal(find_weight(module), module.quant_weight().value)
    assert set(q.levels.ravel()) <= set(levels)
    assert bits == 8 or q.levels.ndim == 1
    assert q.scale.shape == (16,)
    np.testing.assert_array_equal(q.scale, module.quant_weight().scale.detach().flatten().expand(16))
    check_forward(module, torch.randn(2, 8, 5, 5) if kind == "conv" else torch.randn(2, 32), q)


@pytest.mark.parametrize("quantizer", ["ShiftedUint8WeightPerChannelFloat", "ShiftedUint8WeightPerTensorFloatHQO"])
def test_brevitas_zero_points(qnn: ModuleType, quantizer: str) -> None:
    """Each output its own zero point; and one that is no integer."""
    quant = pytest.importorskip("brevitas.quant")
    module = qnn.QuantConv2d(8, 16, 3, weight_quant=getattr(quant, quantizer), weight_bit_width=3).eval()
    with torch.no_grad():
        module.weight += torch.linspace(-0.1, 0.2, 16).view(16, 1, 1, 1)
    q = check_equal(find_weight(module), module.quant_weight().value)
    if quantizer.endswith("PerChannelFloat"):
        assert (q.levels == np.rint(q.levels)).all()


def test_brevitas_groups_of_inputs(qnn: ModuleType) -> None:
    quant = pytest.importorskip("brevitas.quant")
    module = qnn.QuantLinear(64, 16, bias=False, weight_quant=quant.MXInt8Weight, weight_bit_width=4).eval()
    q = check_equal(find_weight(module), module.quant_weight().value)
    assert q.scale.shape == (16, 2)
    assert set(q.levels) <= set(range(-8, 8))
    module = qnn.QuantConv2d(64, 16, 3, weight_quant=quant.MXInt8Weight, weight_bit_width=4).eval()
    q = check_equal(find_weight(module), module.quant_weight().value)
    assert q.scale.shape == (16,)  # one scale after all: those of the groups are powers of two apart


def test_brevitas_without_a_weight_quantizer_is_plain(qnn: ModuleType) -> None:
    assert find_weight(qnn.QuantConv2d(8, 16, 3, weight_quant=None).eval()) is None


@pytest.mark.parametrize(
    ("name", "quantizer"),
    [
        ("input_quant", "Int8ActPerTensorFloat"),
        ("output_quant", "Int8ActPerTensorFloat"),
        ("bias_quant", "Int8BiasPerTensorFloatInternalScaling"),
    ],
)
def test_brevitas_that_quantizes_more_than_weights_is_refused(qnn: ModuleType, name: str, quantizer: str) -> None:
    quant = pytest.importorskip("brevitas.quant")
    module = qnn.QuantLinear(32, 16, bias=True, **{name: getattr(quant, quantizer)}).eval()
    with pytest.raises(ValueError, match=f"QuantLinear: expected weights alone to be quantized, got {name}"):
        find_weight(module)


def test_brevitas_weights_that_depend_on_the_input_are_refused(qnn: ModuleType) -> None:
    quant = pytest.importorskip("brevitas.quant")
    module = qnn.QuantConv2d(8, 16, 3, weight_quant=quant.Int8AccumulatorAwareWeightQuant).eval()
    with pytest.raises(ValueError, match=r"QuantConv2d: its quant_weight\(\) failed"):
        find_weight(module)


def test_brevitas_activations_that_are_no_tensors(qnn: ModuleType) -> None:
    """uint8 needs the range of a layer's input, which examples show of tensors alone."""
    quant = pytest.importorskip("brevitas.quant")
    options = {"weight_quant": quant.Int8WeightPerChannelFloat, "weight_bit_width": 2}
    layers = [qnn.QuantConv2d(3, 8, 3, **options), qnn.QuantReLU(bit_width=4, return_quant_tensor=True)]
    model = nn.Sequential(*layers, qnn.QuantConv2d(8, 8, 3, **options))
    x = torch.rand(2, 3, 9, 9)
    model(x)
    model.eval()
    converted = convert(model, activations="uint8", example_inputs=x)
    left = {row.layer: row.why for row in report(converted) if not row.converted}
    assert left == {"2": "no example shows the range of its input: that was empty, or no tensor of floats"}
    wanted = model(x).detach()
    assert (converted(x) - wanted).abs().max() < 0.1 * wanted.abs().max()


# torchao


def quantized_linear(ao: ModuleType, config: object, dtype: torch.dtype = torch.float32) -> nn.Linear:
    model = nn.Sequential(nn.Linear(64, 16)).to(dtype)
    ao.quantize_(model, config)
    return model[0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("mapping", ["SYMMETRIC", "ASYMMETRIC"])
@pytest.mark.parametrize("groups", [1, 2])
def test_torchao_weight_only_tensors(ao: ModuleType, groups: int, mapping: str, bits: int) -> None:
    granularity = ao.PerAxis(0) if groups == 1 else ao.PerGroup(32)
    dtype, mapping_type = getattr(torch, f"int{bits}"), ao.MappingType[mapping]
    module = quantized_linear(ao, ao.IntxWeightOnlyConfig(dtype, granularity, mapping_type))
    assert type(module.weight).__name__ == "IntxUnpackedToInt8Tensor"
    q = check_equal(find_weight(module), module.weight.dequantize())
    assert q.scale.shape == ((16,) if groups == 1 else (16, 2))
    zero_point = module.weight.zero_point.repeat_interleave(64 // groups, 1).numpy()
    np.testing.assert_array_equal(q.decode(), module.weight.qdata.numpy() - zero_point.astype(np.float32))
    check_forward(module, torch.randn(3, 64), q)


def test_torchao_int8(ao: ModuleType) -> None:
    module = quantized_linear(ao, ao.Int8WeightOnlyConfig())
    assert type(module.weight).__name__ == "Int8Tensor"
    q = check_equal(find_weight(module), module.weight.dequantize())
    np.testing.assert_array_equal(q.decode(), module.weight.qdata)
    check_forward(module, torch.randn(3, 64), q)


def test_torchao_int8_convolution(ao: ModuleType) -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3))
    ao.quantize_(model, ao.Int8WeightOnlyConfig(), filter_fn=lambda module, _: isinstance(module, nn.Conv2d))
    check_equal(find_weight(model[0]), model[0].weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_torchao_scales_of_16_bits(ao: ModuleType, dtype: torch.dtype) -> None:
    """The integers are kept; torchao's own dequantize() would round each product to 16 bits."""
    module = quantized_linear(ao, ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(32)), dtype)
    q = find_weight(module)
    assert q is not None and q.scale.shape == (16, 2)
    np.testing.assert_array_equal(q.decode(), module.weight.qdata)
    np.testing.assert_array_equal(q.scale, module.weight.scale.float())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("Int8DynamicActivationInt8WeightConfig", "Int8Tensor with act_quant_kwargs"),
        ("Int8DynamicActivationIntxWeightConfig", "IntxUnpackedToInt8Tensor with activation_quantization"),
    ],
)
def test_torchao_that_quantizes_activations_is_refused(ao: ModuleType, config: str, reason: str) -> None:
    module = quantized_linear(ao, getattr(ao, config)())
    with pytest.raises(ValueError, match=f"weight: expected weights alone to be quantized, got {reason}"):
        find_weight(module)


def test_torchao_tensors_of_other_kinds_are_refused(ao: ModuleType) -> None:
    module = nn.Linear(64, 16)
    module.weight = nn.Parameter(ao.to_nf4(module.weight.detach(), 64, 4), requires_grad=False)
    with pytest.raises(ValueError, match="weight: expected torchao's Int8Tensor or IntxUnpackedToInt8Tensor, got NF4"):
        find_weight(module)


@pytest.mark.parametrize(("granularity", "scales"), [("per_channel", (16,)), ("per_group", (16, 2))])
def test_torchao_quantization_aware_training(ao: ModuleType, granularity: str, scales: tuple[int, ...]) -> None:
    qat = pytest.importorskip("torchao.quantization.qat")
    size = {"group_size": 32} if granularity == "per_group" else {"granularity": granularity}
    config = qat.IntxFakeQuantizeConfig(torch.int4, is_symmetric=True, **size)
    module = quantized_linear(ao, qat.QATConfig(weight_config=config, step="prepare"))
    assert isinstance(module, qat.FakeQuantizedLinear)
    q = find_weight(module)
    assert module.weight_fake_quantizer.scale is None  # the module is as it was
    q = check_equal(q, module.weight_fake_quantizer(module.weight))
    assert q.scale.shape == scales and set(q.levels) <= set(range(-8, 8))
    check_forward(module, torch.randn(3, 64), q)

    module.weight_fake_quantizer.enabled = False
    assert find_weight(module) is None


def test_torchao_training_with_quantized_activations_is_refused(ao: ModuleType) -> None:
    qat = pytest.importorskip("torchao.quantization.qat")
    weights = qat.IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True)
    activations = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    module = quantized_linear(ao, qat.QATConfig(None, activations, weights, step="prepare"))
    with pytest.raises(ValueError, match="got activation_fake_quantizer"):
        find_weight(module)


# torch.nn.utils.parametrize


class Ternarize(nn.Module):
    """A learned scale, and the straight-through estimator as `find_weight` recommends it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        q = self.scale * (w / self.scale).round().clamp(-1, 1)
        return q.detach() + (w - w.detach())


@pytest.mark.parametrize("module", [nn.Conv2d(8, 16, 3), nn.Linear(32, 16)], ids=["conv", "linear"])
def test_parametrized_weights(module: nn.Module) -> None:
    nn.init.normal_(module.weight)
    module = parametrize.register_parametrization(module, "weight", Ternarize())
    q = check_equal(find_weight(module), module.weight)
    np.testing.assert_array_equal(q.levels, [-1, 0, 1])
    np.testing.assert_array_equal(q.scale, np.full(16, 0.7, np.float32))
    assert module.weight.requires_grad  # not changed


def test_other_parametrizations_are_refused_or_ignored() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(300, 2))
    with pytest.raises(ValueError, match=r"has \d+ distinct values, expected at most 256: these weights are not q"):
        find_weight(module)
    module = parametrize.register_parametrization(nn.Linear(3, 2), "bias", nn.Identity())
    assert find_weight(module) is None


def test_docstring_example() -> None:
    (found,) = doctest.DocTestFinder(recurse=False).find(find_weight, "find_weight", module=sources)
    assert found.examples
    assert doctest.DocTestRunner().run(found).failed == 0
