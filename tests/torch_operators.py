"""The operators of torch.ops.pycodesign, weights and programs to call them with, and the same functions in torch."""

import json

import numpy as np
import torch
import torch.nn.functional as F

from pycodesign import quantize
from pycodesign.nn.program import Program, Step, describe_layer, join_weights
from pycodesign.quantize import QuantizedTensor

NAMES = ("conv2d", "linear", "chain", "chain_backward", "chain_weights")
conv2d, linear, chain, chain_backward, chain_weights = (getattr(torch.ops.pycodesign, name).default for name in NAMES)

GEOMETRY = {"stride": [2, 1], "padding": [1, 2], "dilation": [1, 2], "groups": 2}
OPTIONS = json.dumps(GEOMETRY)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def to_tensors(q):
    return [torch.from_numpy(np.array(array)) for array in (q.codes, q.levels, q.scale)]


def make_conv():
    """Weights (6, 2, 3, 3) in two groups, with a bias."""
    return [*to_tensors(quantize.ternary(random(6, 2, 3, 3))), random(6)]


def make_rows():
    """Weights (5, 8) with two scales for each output, with a bias."""
    q = quantize.uniform(random(5, 8), 3)
    return [*to_tensors(QuantizedTensor(q.codes, q.levels, np.stack([q.scale, 2 * q.scale], axis=1))), random(5)]


def make_chain():
    """A program of every step: float32 throughout, two inputs and two outputs."""
    layers = [
        (quantize.binary(random(4, 3, 3, 3)), random(4).numpy()),
        (quantize.ternary(random(4, 4, 1, 1, seed=1)), None),
        (quantize.uniform(random(5, 4, seed=2), 4), random(5).numpy()),
    ]
    described = [
        describe_layer(f"layer {i}", layer, {"padding": [1, 1]} if i == 0 else {}) for i, layer in enumerate(layers)
    ]
    steps = [
        Step("conv2d", 0, None, {"clamp": [0, 6]}, described[0]),
        Step("max_pool2d", 2, None, {"kernel_size": 2}),
        Step("conv2d", 3, 1, {}, described[1]),
        Step("add", 4, 3, {"clamp": [0, None]}),
        Step("avg_pool2d", 5),
        Step("linear", 6, None, {}, described[2]),
        Step("avg_pool2d", 5, None, {"kernel_size": [2, 2], "stride": 1, "padding": 1}),
    ]
    program = Program([{"dtype": "float32"}] * 2, steps, [7, 8])
    return list(join_weights(layers)), program, layers


def run_in_torch(layers, x, residual):
    (a, b, c), (bias_a, _, bias_c) = zip(*layers, strict=True)
    a, b, c = (torch.from_numpy(q.dequantize()) for q in (a, b, c))
    y = F.max_pool2d(F.conv2d(x, a, torch.from_numpy(bias_a), padding=1).clamp(0, 6), 2)
    y = F.relu(F.conv2d(y, b) + residual + y)
    return F.linear(y.mean((2, 3)), c, torch.from_numpy(bias_c)), F.avg_pool2d(y, 2, 1, 1)


def make_runs():
    """The same two functions of two tensors, ours and torch's."""
    weights, program, layers = make_chain()
    return (
        lambda x, residual: tuple(chain([x, residual], *weights, program.to_json())),
        lambda x, residual: run_in_torch(layers, x, residual),
    )
