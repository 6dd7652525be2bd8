"""torch.ops.pycodesign: gradients are those of torch, in every mode; what cannot be differentiated is refused."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch_operators import (
    GEOMETRY,
    OPTIONS,
    chain,
    chain_backward,
    conv2d,
    linear,
    make_chain,
    make_conv,
    make_rows,
    make_runs,
    random,
    run_in_torch,
    to_tensors,
)

from pycodesign import quantize
from pycodesign.nn import ops as torch_ops
from pycodesign.nn.program import Program, Step, describe_layer, join_weights
from pycodesign.quantize import QuantizedTensor


@pytest.fixture
def conv():
    return make_conv()


@pytest.fixture
def rows():
    return make_rows()


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


def test_results_of_backward_share_no_memory():
    layer = quantize.ternary(random(4, 3)), None
    steps = [Step("linear", 0, None, {}, describe_layer("layer", layer, {})), Step("add", 3, 1)]
    program = Program([{"dtype": "float32"}] * 3, steps, [4]).to_json()
    grad, inputs = random(2, 4), [random(2, 3), random(2, 4), random(2, 4)]
    results = chain_backward([grad], inputs, *join_weights([layer]), program)
    assert torch.equal(results[1], grad) and not results[2].any()
    assert len({x.data_ptr() for x in (grad, *inputs, *results)}) == 7


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


def test_backward_in_inference_mode():
    weights, program, _ = make_chain()
    inputs = [random(2, 3, 8, 8), random(2, 4, 4, 4)]
    grads = chain(inputs, *weights, program.to_json())
    wanted = chain_backward(grads, inputs, *weights, program.to_json())
    with torch.inference_mode():
        found = chain_backward(grads, inputs, *weights, program.to_json())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


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
