"""torch.ops.pycodesign: compiled, exported, in modes of torch, and with tensors that are not plain host memory."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch_operators import (
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
)

import pycodesign.nn
from pycodesign.nn import ops as torch_ops


@pytest.fixture
def conv():
    return make_conv()


@pytest.fixture
def rows():
    return make_rows()


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
