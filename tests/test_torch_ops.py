"""torch.ops.pycodesign: the same results as pycodesign.ops and torch, torch's own checks, schemas as documented."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch_operators import (
    GEOMETRY,
    NAMES,
    OPTIONS,
    chain,
    chain_backward,
    chain_weights,
    conv2d,
    linear,
    make_chain,
    make_conv,
    make_rows,
    random,
    run_in_torch,
)

from pycodesign import ops
from pycodesign.quantize import QuantizedTensor

ROOT = Path(__file__).parents[1]


@pytest.fixture
def conv():
    return make_conv()


@pytest.fixture
def rows():
    return make_rows()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_conv2d_is_that_of_ops(conv, layout):
    x = random(2, 4, 9, 8)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = random(2, 4, 18, 8)[:, :, ::2]
    elif layout == "expanded":
        x = random(1, 4, 9, 8).expand(2, -1, -1, -1)
    packed = ops.prepack_conv2d(QuantizedTensor(*conv[:3]), conv[3], **GEOMETRY)
    residual = random(*ops.conv2d(x, packed).shape)
    y = conv2d(x, *conv, residual, json.dumps({**GEOMETRY, "clamp": [-1, None]}))
    assert torch.equal(y, ops.conv2d(x, packed, residual=residual, clamp=(-1, None)))


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (8,), (0, 8), (2, 0, 8)])
def test_linear_is_that_of_ops(rows, shape):
    x = random(*shape)
    packed = ops.prepack_linear(QuantizedTensor(*rows[:3]), rows[3])
    residual = random(*shape[:-1], 5)
    y = linear(x, *rows, residual, '{"clamp": [0, 6]}')
    assert y.shape == (*shape[:-1], 5)
    assert torch.equal(y, ops.linear(x, packed, residual=residual, clamp=(0, 6)))


def test_integers_are_those_of_ops(conv):
    x = torch.randint(0, 256, (2, 4, 7, 7), dtype=torch.uint8)
    given = {"input_dtype": "uint8", "input_scale": 0.25, "input_zero_point": 7}
    epilogue = {"out_dtype": "int8", "out_scale": 0.5, "out_zero_point": -3, "residual_scale": 0.125}
    packed = ops.prepack_conv2d(QuantizedTensor(*conv[:3]), conv[3], **GEOMETRY, **given)
    residual = torch.randint(0, 256, ops.conv2d(x, packed).shape, dtype=torch.uint8)
    y = conv2d(x, *conv, residual, json.dumps(GEOMETRY | given | epilogue))
    assert y.dtype == torch.int8
    assert torch.equal(y, ops.conv2d(x, packed, residual=residual, **epilogue))


def test_chain_is_that_of_torch():
    weights, program, layers = make_chain()
    x, residual = random(2, 3, 8, 8), random(2, 4, 4, 4)
    for y, wanted in zip(
        chain([x, residual], *weights, program.to_json()), run_in_torch(layers, x, residual), strict=True
    ):
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(conv, rows, gradient):
    x, options = random(2, 4, 9, 8), json.dumps({**GEOMETRY, "clamp": [0, 6]})
    samples = [
        (conv2d, (x, *conv[:3], None, None, OPTIONS)),
        (conv2d, (x, *conv, random(*conv2d(x, *conv, None, options).shape), options)),
        (linear, (random(2, 3, 8), *rows)),
    ]
    weights, program, _ = make_chain()
    inputs = [random(2, 3, 8, 8), random(2, 4, 4, 4)]
    grads = chain(inputs, *weights, program.to_json())
    samples += [
        (chain, (inputs, *weights, program.to_json())),
        (chain, ([x.to(memory_format=torch.channels_last) for x in inputs], *weights, program.to_json())),
        (chain_backward, (grads, inputs, *weights, program.to_json())),
        (chain_weights, (weights[0], *weights[1:], program.to_json())),
    ]
    for operator, (first, *others) in samples:
        if operator is not chain_weights:
            for tensor in first if isinstance(first, list) else [first]:
                tensor.requires_grad_(gradient)
        assert set(torch.library.opcheck(operator, (first, *others)).values()) == {"SUCCESS"}


def test_documented_schemas():
    rows = re.findall(r"^\| `(\w+)` \| `(.*)` \| `(.*)` \|$", (ROOT / "docs/torch.md").read_text(), re.MULTILINE)
    documented = [f"pycodesign::{name}({arguments}) -> {result}" for name, arguments, result in rows]
    assert documented == [str(getattr(torch.ops.pycodesign, name).default._schema) for name in NAMES]
