"""torch.ops.pycodesign: the same results as pycodesign.ops, and everything torch asks of an operator."""

import gc
import json
import math
import multiprocessing
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import pycodesign.nn
from pycodesign import ops, quantize
from pycodesign.nn import ops as torch_ops
from pycodesign.nn.program import Program, Step, build_chain, chains, describe_layer, join_weights
from pycodesign.quantize import QuantizedTensor

ROOT = Path(__file__).parents[1]
NAMES = ("conv2d", "linear", "chain", "chain_backward", "chain_weights")
conv2d, linear, chain, chain_backward, chain_weights = (getattr(torch.ops.pycodesign, name).default for name in NAMES)

GEOMETRY = {"stride": [2, 1], "padding": [1, 2], "dilation": [1, 2], "groups": 2}
OPTIONS = json.dumps(GEOMETRY)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def to_tensors(q):
    return [torch.from_numpy(np.array(array)) for array in (q.codes, q.levels, q.scale)]


@pytest.fixture
def conv():
    """Weights (6, 2, 3, 3) in two groups, with a bias."""
    return [*to_tensors(quantize.ternary(random(6, 2, 3, 3))), random(6)]


@pytest.fixture
def rows():
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


def test_results_of_backward_share_no_memory():
    layer = quantize.ternary(random(4, 3)), None
    steps = [Step("linear", 0, None, {}, describe_layer("layer", layer, {})), Step("add", 3, 1)]
    program = Program([{"dtype": "float32"}] * 3, steps, [4]).to_json()
    grad, inputs = random(2, 4), [random(2, 3), random(2, 4), random(2, 4)]
    results = chain_backward([grad], inputs, *join_weights([layer]), program)
    assert torch.equal(results[1], grad) and not results[2].any()
    assert len({x.data_ptr() for x in (grad, *inputs, *results)}) == 7


def test_gradient_is_that_of_torch(conv, rows):
    weight = torch.from_numpy(QuantizedTensor(*conv[:3]).dequantize())
    options = {**GEOMETRY, "clamp": [-1, 1.5], "residual_scale": 0.5}
    shape = conv2d(random(2, 4, 9, 8), *conv, None, OPTIONS).shape
    ours, theirs = ([random(2, 4, 9, 8).requires_grad_(), random(*shape).requires_grad_()] for _ in range(2))
    conv2d(ours[0], *conv, ours[1], json.dumps(options)).square().sum().backward()
    y = F.conv2d(theirs[0], weight, conv[3], **GEOMETRY) + 0.5 * theirs[1]
    y.clamp(-1, 1.5).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)

    a, b = (random(2, 3, 8).requires_grad_() for _ in range(2))
    linear(a, *rows).square().sum().backward()
    F.linear(b, torch.from_numpy(QuantizedTensor(*rows[:3]).dequantize()), rows[3]).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_gradient_of_a_chain_is_that_of_torch():
    weights, program, layers = make_chain()
    ours, theirs = ([random(2, 3, 8, 8).requires_grad_(), random(2, 4, 4, 4).requires_grad_()] for _ in range(2))
    sum(y.square().sum() for y in chain(ours, *weights, program.to_json())).backward()
    sum(y.square().sum() for y in run_in_torch(layers, *theirs)).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


LIMITED = {
    "relu": (F.relu, (0, None)),
    "relu6": (F.relu6, (0, 6)),
    "hardtanh": (lambda y: F.hardtanh(y, -2, 3), (-2, 3)),
    "an upper limit": (lambda y: -F.threshold(-y, -3, -3), (None, 3)),
    "none": (lambda y: y, (None, None)),
}


@pytest.mark.parametrize("name", LIMITED)
def test_gradient_at_the_limits_is_that_of_torch(name):
    function, clamp = LIMITED[name]
    q, clamped = quantize.from_fake_quantized(np.array([[-1, 1], [0, 1], [1, 1]], np.float32)), {"clamp": [*clamp]}
    x = torch.cartesian_prod(torch.arange(-4.0, 5), torch.arange(-4.0, 5))
    ours, in_chain, theirs = (x.clone().requires_grad_() for _ in range(3))
    program = Program(
        [{"dtype": "float32"}], [Step("linear", 0, None, clamped, describe_layer("0", (q, None), {}))], [1]
    )
    linear(ours, *to_tensors(q), None, None, json.dumps(clamped)).exp().sum().backward()
    chain([in_chain], *join_weights([(q, None)]), program.to_json())[0].exp().sum().backward()
    y = theirs @ torch.from_numpy(q.dequantize()).T
    assert all((y == limit).any() for limit in clamp if limit is not None)
    function(y).exp().sum().backward()
    assert torch.equal(ours.grad, theirs.grad) and torch.equal(in_chain.grad, theirs.grad)


def test_nan_lets_the_gradient_pass_as_in_torch():
    grads = []
    for function in (F.relu, lambda y: torch_ops.mask_clamped(y, y.detach().clamp(0), (0, None))):
        y = torch.tensor([math.nan, -math.inf, -1, 0, 1, math.inf]).requires_grad_()
        function(y).backward(torch.ones(6))
        grads.append(y.grad)
    assert torch.equal(*grads) and grads[0].tolist() == [1, 0, 0, 0, 1, 1]


def test_second_and_third_gradients_are_those_of_torch():
    found = []
    for run in make_runs():
        inputs = [random(2, 3, 8, 8).requires_grad_(), random(2, 4, 4, 4).requires_grad_()]
        total = sum(y.sin().sum() for y in run(*inputs))
        for _ in range(3):
            gradients = torch.autograd.grad(total, inputs, create_graph=True)
            found.append(gradients)
            total = sum(gradient.sin().sum() for gradient in gradients)
    for a, b in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_many_gradients_at_once():
    ours, theirs = make_runs()
    inputs = random(2, 3, 8, 8), random(2, 4, 4, 4)
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(ours, inputs, vectorize=True), jacobian(theirs, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # of torch, about its own code
@pytest.mark.parametrize("gradient", [False, True])
def test_forward_mode_is_refused(conv, rows, gradient):
    run_chain, _ = make_runs()
    calls = {
        "conv2d": (lambda x: conv2d(x, *conv, None, OPTIONS), random(2, 4, 9, 8)),
        "linear": (lambda x: linear(x, *rows), random(3, 8)),
        "chain": (lambda x: run_chain(x, random(2, 4, 4, 4))[0], random(2, 3, 8, 8)),
    }
    for name, (run, x) in calls.items():
        x.requires_grad_(gradient)
        with pytest.raises(NotImplementedError, match=f"{name}: expected no forward-mode differentiation"):
            torch.func.jvp(run, (x,), (x,))
        with forward_ad.dual_level():
            with pytest.raises(NotImplementedError, match=f"{name}: expected no forward-mode differentiation"):
                run(forward_ad.make_dual(x, x))
            assert torch.equal(run(x), run(x.detach()))  # nothing to differentiate


def test_function_transforms_are_refused():
    run, _ = make_runs()
    x, residual = random(2, 3, 8, 8), random(2, 4, 4, 4)
    with pytest.raises(RuntimeError, match="Batching rule not implemented for pycodesign::chain"):
        torch.func.vmap(lambda x: run(x, residual)[0])(torch.stack([x, x]))
    with pytest.raises(RuntimeError, match="with functorch transforms"):
        torch.func.grad(lambda x: run(x, residual)[0].sum())(x)


@pytest.mark.parametrize("name", ["levels", "scale", "bias"])
def test_weight_gradients_are_refused(conv, name):
    conv[("codes", "levels", "scale", "bias").index(name)].requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: expected requires_grad=False"):
        conv2d(random(2, 4, 9, 8), *conv, None, OPTIONS)
    with torch.no_grad():
        conv2d(random(2, 4, 9, 8), *conv, None, OPTIONS)


def test_gradients_through_integers_are_refused(conv):
    x = random(2, 4, 9, 8).requires_grad_()
    with pytest.raises(ValueError, match="out_dtype: expected 'float32' where a gradient is asked for, got 'uint8'"):
        conv2d(x, *conv, None, json.dumps({**GEOMETRY, "out_dtype": "uint8", "out_scale": 0.5}))
    weights, program, _ = make_chain()
    program.steps.append(Step("add", 8, None, {"out_dtype": "int8", "out_scale": 1.0}))
    with pytest.raises(ValueError, match="inputs: expected no gradient through integer activations"):
        chain([random(2, 3, 8, 8).requires_grad_(), random(2, 4, 4, 4)], *weights, program.to_json())


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(conv, dynamic):
    weights, program, _ = make_chain()
    text = program.to_json()

    def network(x, residual):
        y, pooled = chain([x, residual], *weights, text)
        return 2 * y.exp(), conv2d(pooled, *conv, None, OPTIONS).relu()

    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n, size in ((2, 8), (3, 10)):
        x, residual = random(n, 3, size, size).requires_grad_(), random(n, 4, size // 2, size // 2)
        ours, theirs = compiled(x, residual), network(x, residual)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        gradients = [torch.autograd.grad(sum(y.sum() for y in given), x)[0] for given in (ours, theirs)]
        torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about its own code
def test_inductor(conv):
    compiled = torch.compile(lambda x: conv2d(x.relu(), *conv, None, OPTIONS) + 1, fullgraph=True)
    x = random(2, 4, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), conv2d(x.relu(), *conv, None, OPTIONS) + 1)


def test_export_with_free_sizes(conv):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, tensor in zip(("codes", "levels", "scale", "bias"), conv, strict=True):
                self.register_buffer(name, tensor)

        def forward(self, x):
            return conv2d(x, self.codes, self.levels, self.scale, self.bias, None, OPTIONS).relu()

    network, auto = Network(), torch.export.Dim.AUTO
    exported = torch.export.export(network, (random(2, 4, 9, 8),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    for shape in ((2, 4, 9, 8), (5, 4, 12, 7)):
        x = random(*shape)
        assert torch.equal(exported.module()(x), network(x))


def test_gradients_under_autocast_are_float32(conv, rows):
    for run, x, weights in (
        (conv2d, random(2, 4, 9, 8), (*conv[:3], None, None, OPTIONS)),
        (linear, random(3, 8), rows),
    ):
        x.requires_grad_()
        y = run(x, *weights)
        given = random(*y.shape)
        (wanted,) = torch.autograd.grad(y, x, given, retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            (grad,) = torch.autograd.grad(y, x, given)
        assert torch.equal(grad, wanted)


def test_autocast_keeps_float32(conv, rows):
    x = random(2, 4, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        half = F.conv2d(x, torch.ones(4, 4, 1, 1))
        y = conv2d(half, *conv, None, OPTIONS)
        z = linear(random(3, 8), *rows)
    assert (half.dtype, y.dtype, z.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(y, conv2d(half.float(), *conv, None, OPTIONS))
    assert torch.equal(z, linear(random(3, 8), *rows))
    weights, program, _ = make_chain()
    inputs = [random(2, 3, 8, 8).bfloat16(), random(2, 4, 4, 4).half()]
    with torch.autocast("cpu", torch.bfloat16):
        values = chain(inputs, *weights, program.to_json())
    wanted = chain([x.float() for x in inputs], *weights, program.to_json())
    assert all(torch.equal(a, b) for a, b in zip(values, wanted, strict=True))


def test_backward_in_inference_mode():
    weights, program, _ = make_chain()
    inputs = [random(2, 3, 8, 8), random(2, 4, 4, 4)]
    grads = chain(inputs, *weights, program.to_json())
    wanted = chain_backward(grads, inputs, *weights, program.to_json())
    with torch.inference_mode():
        found = chain_backward(grads, inputs, *weights, program.to_json())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_inference_mode(conv):
    x = random(2, 4, 9, 8)
    wanted = conv2d(x, *conv, None, OPTIONS)
    with torch.inference_mode():
        assert torch.equal(conv2d(x, *conv, None, OPTIONS), wanted)
        made = [tensor.clone() for tensor in conv]  # these count no versions
        assert torch.equal(conv2d(x, *made, None, OPTIONS), wanted)
        made[2].mul_(2)
        made[3].mul_(2)
        torch.testing.assert_close(conv2d(x, *made, None, OPTIONS), 2 * wanted)


def test_weights_that_are_written_to_are_packed_anew(conv):
    x = random(2, 4, 9, 8)
    conv2d(x, *conv, None, OPTIONS)
    entries = len(torch_ops.prepared)
    for tensor in (conv[2], conv[3]):
        tensor.mul_(-3)
    wanted = ops.conv2d(x, ops.prepack_conv2d(QuantizedTensor(*conv[:3]), conv[3], **GEOMETRY))
    assert torch.equal(conv2d(x, *conv, None, OPTIONS), wanted)
    conv[0].zero_()
    wanted = ops.conv2d(x, ops.prepack_conv2d(QuantizedTensor(*conv[:3]), conv[3], **GEOMETRY))
    assert torch.equal(conv2d(x, *conv, None, OPTIONS), wanted)
    assert len(torch_ops.prepared) == entries


def test_what_is_packed_dies_with_its_weights():
    gc.collect()  # of other tests
    before = len(torch_ops.prepared), len(chains)
    weights = [*to_tensors(quantize.ternary(random(6, 2, 3, 3))), random(6)]
    flat, program, _ = make_chain()
    conv2d(random(2, 4, 9, 8), *weights, None, OPTIONS)
    conv2d(random(2, 4, 9, 8), *weights[:3], None, None, OPTIONS)
    chain([random(2, 3, 8, 8), random(2, 4, 4, 4)], *flat, program.to_json())
    assert (len(torch_ops.prepared), len(chains)) == (before[0] + 2, before[1] + 1)
    del weights[3]
    gc.collect()
    assert len(torch_ops.prepared) == before[0] + 1
    del weights, flat
    gc.collect()
    assert (len(torch_ops.prepared), len(chains)) == before


def test_programs_of_one_length_share_weights():
    weights, program, _ = make_chain()
    x, residual = random(2, 3, 8, 8), random(2, 4, 4, 4)
    texts = [program.to_json(), program.to_json().replace('"clamp": [0, 6]', '"clamp": [0, 3]')]
    assert len(texts[0]) == len(texts[1]) and texts[0] != texts[1]
    wanted = [build_chain(weights, text)(x.numpy(), residual.numpy()) for text in texts]
    assert not np.array_equal(wanted[0][0], wanted[1][0])
    for i in (0, 1, 0, 1, 1):
        for y, expected in zip(chain([x, residual], *weights, texts[i]), wanted[i], strict=True):
            np.testing.assert_array_equal(y.numpy(), expected)


def test_threads_share_what_is_packed(conv, monkeypatch):
    x, options = random(2, 4, 9, 8), json.dumps({**GEOMETRY, "algorithm": "dense"})
    packed, start = [], threading.Barrier(8)
    prepack = torch_ops.prepack_conv2d

    def prepack_slowly(*args, **options):
        packed.append(1)
        time.sleep(0.05)
        return prepack(*args, **options)

    monkeypatch.setattr(torch_ops, "prepack_conv2d", prepack_slowly)

    def run(_):
        start.wait()
        return [conv2d(x, *conv, None, options) for _ in range(20)]

    with ThreadPoolExecutor(8) as threads:
        results = [y for ys in threads.map(run, range(8)) for y in ys]
    assert packed == [1]
    assert all(torch.equal(y, results[0]) for y in results)


class Layers(torch.utils.data.Dataset):
    """Runs layers where it is asked for an item: in a worker. One of them is new there."""

    def __init__(self, weights):
        self.weights, self.flat = weights, make_chain()

    def __len__(self):
        return 4

    def __getitem__(self, index):
        y = conv2d(random(1, 4, 33, 32, seed=index), *self.weights, None, OPTIONS)
        new = conv2d(random(1, 4, 9, 9, seed=index), *[tensor.clone() for tensor in self.weights], None, OPTIONS)
        z, _ = chain([random(1, 3, 8, 8, seed=index), random(1, 4, 4, 4)], *self.flat[0], self.flat[1].to_json())
        return y[0], new[0], z[0]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_forked_workers(conv):
    dataset = Layers(conv)
    wanted = [dataset[i] for i in range(4)]  # its team of threads runs before the fork
    held, done = threading.Event(), threading.Event()

    def hold_lock():  # as if it were packing
        with torch_ops.prepared._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold_lock)
    thread.start()
    held.wait()
    try:
        loader = torch.utils.data.DataLoader(dataset, num_workers=2, multiprocessing_context="fork", timeout=20)
        for ours, theirs in zip(loader, wanted, strict=True):
            assert all(torch.equal(a[0], b) for a, b in zip(ours, theirs, strict=True))
    finally:
        done.set()
        thread.join()


def test_cuda_tensors(conv):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("pycodesign::conv2d", "CUDA")
    with pytest.raises(TypeError, match=r"x: expected tensors in host memory .* got tensors on a CUDA device"):
        torch_ops.refuse_cuda(random(1))
    with FakeTensorMode():
        x, *weights = (torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in (torch.empty(2, 4, 9, 8), *conv))
        y = conv2d(x, *weights, None, OPTIONS)
        assert y.device.type == "cuda"
        with pytest.raises(TypeError, match="expected tensors in host memory"):
            torch.ops.pycodesign.chain([x], *weights, "{}")


def test_meta_tensors(conv, rows):
    """Shapes of tensors on meta, and no numbers of weights that have none."""
    weights, program, _ = make_chain()
    inputs = [random(2, 3, 8, 8), random(2, 4, 4, 4)]
    grads = chain(inputs, *weights, program.to_json())
    calls = [
        (conv2d, (random(2, 4, 9, 8), *conv), OPTIONS),
        (linear, (random(2, 8), *rows), "{}"),
        (chain, (inputs, *weights), program.to_json()),
        (chain_backward, (grads, inputs, *weights), program.to_json()),
        (chain_weights, tuple(weights), program.to_json()),
    ]
    for operator, tensors, text in calls:
        names = [argument.name for argument in operator._schema.arguments]
        options = {names[-1]: text}
        wanted = torch.utils._pytree.tree_leaves(operator(*tensors, **options))
        moved = torch.utils._pytree.tree_map(lambda tensor: tensor.to("meta"), tensors)
        made = torch.utils._pytree.tree_leaves(operator(*moved, **options))
        assert [(y.shape, y.device.type) for y in made] == [(y.shape, "meta") for y in wanted]
        for at in range(1, len(tensors)):
            mixed = (*tensors[:at], moved[at], *tensors[at + 1 :])
            with pytest.raises(
                TypeError, match=f"{names[0]}: expected a tensor on meta, where others are, got one on "
            ):
                operator(*mixed, **options)
    with pytest.raises(TypeError, match="x: expected a tensor on meta, where others are, got one on cpu"):
        pycodesign.nn.Linear.from_float(torch.nn.Linear(8, 4), "ternary").to("meta")(random(2, 8))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.operators.append(operator)
        return operator(*args, **(kwargs or {}))


def test_tensors_that_are_more_than_memory(conv, rows):
    """Views with a sign, zeros without memory, modes, and functions that follow: a kernel alone would not see them."""
    weights, program, _ = make_chain()
    x, inputs = random(2, 4, 9, 8), [random(2, 3, 8, 8), random(2, 4, 4, 4)]
    residual = conv2d(x, *conv, options=OPTIONS)
    runs = {
        conv2d: lambda sign: conv2d(sign(x), *(sign(w) if w.is_floating_point() else w for w in conv), options=OPTIONS),
        linear: lambda sign: linear(sign(x[0, 0]), *(sign(w) if w.is_floating_point() else w for w in rows)),
        chain: lambda sign: torch.cat(
            [
                y.flatten()
                for y in chain([sign(x) for x in inputs], weights[0], *map(sign, weights[1:]), program.to_json())
            ]
        ),
    }
    runs[None] = lambda sign: conv2d(x, *conv, residual=sign(residual), options=OPTIONS)
    for operator, run in runs.items():
        wanted = run(lambda tensor: tensor)
        torch.testing.assert_close(run(lambda tensor: torch._neg_view(-tensor)), wanted, rtol=0, atol=0)
        with Seen() as mode:
            torch.testing.assert_close(run(lambda tensor: tensor), wanted, rtol=0, atol=0)
        assert operator in (None, *mode.operators)
        functional = torch.func.functionalize(run)(lambda tensor: tensor + 0)
        torch.testing.assert_close(functional, wanted, rtol=0, atol=0)
    signed = [torch._neg_view(-w) if w.is_floating_point() else w for w in conv]  # weights alone
    torch.testing.assert_close(conv2d(x, *signed, options=OPTIONS), residual, rtol=0, atol=0)
    signed = [weights[0], *(torch._neg_view(-w) for w in weights[1:])]
    made, wanted = (chain(inputs, *given, program.to_json()) for given in (signed, weights))
    torch.testing.assert_close(made, wanted, rtol=0, atol=0)
    zeros = conv2d(torch._efficientzerotensor(x.shape), *conv, options=OPTIONS)
    torch.testing.assert_close(zeros, conv2d(torch.zeros_like(x), *conv, options=OPTIONS), rtol=0, atol=0)


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


def test_documented_schemas():
    rows = re.findall(r"^\| `(\w+)` \| `(.*)` \| `(.*)` \|$", (ROOT / "docs/torch.md").read_text(), re.MULTILINE)
    documented = [f"pycodesign::{name}({arguments}) -> {result}" for name, arguments, result in rows]
    assert documented == [str(getattr(torch.ops.pycodesign, name).default._schema) for name in NAMES]


def test_without_torch_one_sentence_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['torch'] = None; import pycodesign; pycodesign.quantize; pycodesign.nn"
    python = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    wanted = "ImportError: pycodesign.nn needs torch: `pip install 'pycodesign[torch]'`"
    assert python.stderr.splitlines()[-1] == wanted
