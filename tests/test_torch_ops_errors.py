"""torch.ops.pycodesign: bad tensors, options and programs are refused by name, of fake tensors, too."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_operators import GEOMETRY, OPTIONS, chain, conv2d, linear, make_chain, make_conv, make_rows, random


@pytest.fixture
def conv():
    return make_conv()


@pytest.fixture
def rows():
    return make_rows()


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(2, 4, 9, 8, dtype=torch.float64), TypeError, "x: expected float32 .*, got float64"),
        (torch.ones(2, 4, 9, 8, dtype=torch.bfloat16), TypeError, "x: expected float32.*, got .*bfloat16"),
        (torch.ones(2, 3, 9, 8), ValueError, r"x: expected float32 \(N, 4, H, W\), got float32 \(2, 3, 9, 8\)"),
        (torch.ones(4, 9, 8), ValueError, r"x: expected float32 \(N, 4, H, W\), got float32 \(4, 9, 8\)"),
    ],
)
def test_bad_input(conv, x, error, message, fake):
    if fake:
        with FakeTensorMode() as mode, pytest.raises(error, match=message):
            conv2d(mode.from_tensor(x), *map(mode.from_tensor, conv), None, OPTIONS)
    else:
        with pytest.raises(error, match=message):
            conv2d(x, *conv, None, OPTIONS)


def test_bad_rows(rows):
    with pytest.raises(ValueError, match=r"x: expected float32 \(\.\.\., 8\), got float32 \(2, 3, 7\)"):
        linear(random(2, 3, 7), *rows)
    with pytest.raises(ValueError, match=r"residual: expected .* \(2, 3, 5\), got float32 \(2, 3, 8\)"):
        linear(random(2, 3, 8), *rows, random(2, 3, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{", "options: expected JSON, got '{'"),
        ("[]", r"options: expected a JSON object with input_dtype, .* got '\[\]'"),
        ('{"strides": 2}', "options: expected a JSON object with .*stride, padding"),
        ('{"stride": 0}', "stride: expected an integer >= 1, got 0"),
        ('{"clamp": [2, 1]}', "clamp: expected lowest <= highest"),
        ('{"algorithm": "packed"}', "algorithm: expected 'auto'"),
    ],
)
def test_bad_options(conv, options, message):
    with pytest.raises(ValueError, match=message):
        conv2d(random(2, 2, 9, 8), *conv, None, options)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("nonsense", "program: expected JSON of inputs, steps and outputs, got 'nonsense'"),
        ('{"inputs": [], "steps": []}', "program: expected JSON of inputs, steps and outputs"),
        (
            '{"inputs": [], "outputs": [], "steps": [{"op": "output", "x": 0}]}',
            "program: expected conv2d, .* got 'output'",
        ),
    ],
)
def test_bad_program(program, message):
    with pytest.raises(ValueError, match=message):
        chain([random(1, 3, 8, 8)], *make_chain()[0], program)


def test_a_chain_checks_its_arguments():
    weights, program, _ = make_chain()
    with pytest.raises(ValueError, match=r"codes, levels, scale, bias: expected \(.*\) elements for this program"):
        chain([random(2, 3, 8, 8), random(2, 4, 4, 4)], weights[0][1:], *weights[1:], program.to_json())
    with pytest.raises(ValueError, match=r"x: expected .*got .*\(2, 2, 8, 8\)|C|channels"):
        chain([random(2, 2, 8, 8), random(2, 4, 4, 4)], *weights, program.to_json())
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=r"inputs: expected \(N, 3, H, W\) for layer 0"):
        chain(
            [mode.from_tensor(random(2, 2, 8, 8)), mode.from_tensor(random(2, 4, 4, 4))],
            *map(mode.from_tensor, weights),
            program.to_json(),
        )


def test_promised_bits_are_verified(conv, monkeypatch):
    x = torch.full((1, 4, 5, 5), 16, dtype=torch.uint8)
    options = json.dumps({**GEOMETRY, "input_dtype": "uint8", "input_bits": 4})
    conv2d(x, *conv, None, options)
    monkeypatch.setenv("PYCODESIGN_CHECK", "1")
    with pytest.raises(ValueError, match="x: expected values of 4 bits, 0 to 15, got 16 to 16"):
        conv2d(x, *conv, None, options)
