"""Packed layers, chains and converted modules as branches and as bodies: they compute as they do alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from branch_graphs import both, make_chain, make_graph, spread, two_torch_bodies
from torch import nn

import pycodesign.nn
from pycodesign import ops, quantize
from pycodesign.branches import Body, Executor, Slice, Space
from pycodesign.repetition.chain import Chain

# Packed layers and chains


def test_layers_and_chains() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (2, 8, 6, 5)).astype(np.uint8)
    w = rng.standard_normal((4, 8, 3, 3), dtype=np.float32)
    layer = ops.prepack_conv2d(quantize.ternary(w), padding=1, input_dtype="uint8", input_scale=0.1)
    chain = Chain()
    value = chain.input("uint8", 0.1)
    chain.output(chain.conv2d(value, layer, clamp=(0, 1)), chain.avg_pool2d(value))
    for _ in range(3):
        found = ops.run_branches([layer, chain, lambda x: x.sum()], x)
        np.testing.assert_array_equal(found[0], ops.conv2d(x, layer), strict=True)
        for got, wanted in zip(found[1], chain(x), strict=True):
            np.testing.assert_array_equal(got, wanted, strict=True)
        assert found[2] == x.sum()
        x = x[:1]  # another size
    linear = ops.prepack_linear(quantize.ternary(rng.standard_normal((3, 5), dtype=np.float32)))
    rows = rng.standard_normal((4, 5), dtype=np.float32)
    np.testing.assert_array_equal(ops.run_branches([linear], rows)[0], ops.linear(rows, linear), strict=True)


@both
@pytest.mark.parametrize("to_kind", [np.asarray, torch.from_numpy])
def test_layers_and_chains_take_what_their_functions_do(timeout: float | None, to_kind: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    x = to_kind(rng.standard_normal((2, 4, 5, 5), dtype=np.float32))
    layer = ops.prepack_conv2d(quantize.ternary(rng.standard_normal((3, 4, 3, 3), dtype=np.float32)), padding=1)
    found = ops.run_branches([layer, layer, make_chain(), make_chain(2)], x, timeout=timeout)
    for got, wanted in zip([*found[:3], *found[3]], [*[ops.conv2d(x, layer)] * 2, *[2 * x] * 3], strict=True):
        assert type(got) is type(x)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted), strict=True)


@both
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (4, 1, 1, 5), (0, 5), (2, 0, 5)])
def test_linear_layers_take_any_rows(shape: tuple[int, ...], timeout: float | None) -> None:
    rng = np.random.default_rng(0)
    layer = ops.prepack_linear(quantize.ternary(rng.standard_normal((3, 5), dtype=np.float32)))
    x = rng.standard_normal(shape, dtype=np.float32)
    for got in ops.run_branches([layer, layer], x, timeout=timeout):
        np.testing.assert_array_equal(got, ops.linear(x, layer), strict=True)
    with pytest.raises(ValueError, match=r": expected float32 \(\.\.\., 5\), got float32 "):
        ops.run_branches([layer], x[..., :4], timeout=timeout)


@both
def test_a_chain_takes_arrays_whatever_the_body_says(timeout: float | None) -> None:
    graph, x = make_graph(make_chain(), arrays="torch"), torch.ones(1, 4)
    assert graph.bodies["a"].arrays == "numpy"
    for found in (graph(x), Executor(graph, spread(graph), timeout=timeout)(x)):
        assert [y.tolist() for y in found] == [[[2] * 4]] * 2
    with pytest.raises(ValueError, match="arrays: expected 'torch' or 'numpy', got 'Torch'"):
        Body("a", np.copy, (Slice("x"),), (Slice("a"),), "Torch")


def test_a_chain_with_other_results_than_its_body() -> None:
    graph = make_graph(make_chain(2))
    with pytest.raises(ValueError, match=r"a: expected 1 results, got a chain of 2"):
        Executor(graph, spread(graph))


def test_bound_chains() -> None:
    chain = Chain()
    chain.output(chain.avg_pool2d(chain.input(), 2))
    bound = chain.bind([(2, 3, 4, 4)], 1)
    assert bound.output_shapes == [[2, 3, 2, 2]]
    with pytest.raises(ValueError, match="bodies: expected chains with all inputs and outputs set"):
        bound.run()
    with pytest.raises(TypeError, match=r"x: expected float32 \(2, 3, 4, 4\), got float64"):
        bound.set_input(0, np.zeros((2, 3, 4, 4)))
    with pytest.raises(IndexError, match="index"):
        bound.set_input(1, np.zeros((2, 3, 4, 4), np.float32))
    out = np.full((2, 9, 2, 2), np.nan, np.float32)
    with pytest.raises(ValueError, match="out: expected images whose elements follow one another"):
        bound.set_output(0, out[:, ::3])
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 4), dtype=np.float32)
    bound.set_input(0, x)
    bound.set_output(0, out[:, 3:6])
    bound.run()
    np.testing.assert_array_equal(out[:, 3:6], chain(x)[0])
    assert np.isnan(out[:, :3]).all() and np.isnan(out[:, 6:]).all()
    for let_go in (lambda: bound.set_input(0, None), lambda: bound.set_output(0, None), bound.release):
        bound.set_input(0, x)
        bound.set_output(0, out[:, 3:6])
        let_go()
        with pytest.raises(ValueError, match="bodies"):
            bound.run()


def test_finished_chains_are_copied() -> None:
    space = Space(branches=2, segments=1, layers=1, width=4, size=8, operators=("skip", "pool"), gates=("none",))
    graph = space.build(space.sample()).to_graph()
    x = torch.rand(space.input_shape())
    assert torch.equal(copy.deepcopy(graph)(x)[0], graph(x)[0])
    with pytest.raises(TypeError, match="chain: expected outputs before it is copied"):
        copy.deepcopy(Chain())
    with pytest.raises(TypeError, match="chain: expected to be made anew"):
        pickle.dumps(make_chain())


# Converted modules


def convert(*modules: nn.Module) -> nn.Module:
    return pycodesign.nn.convert(nn.Sequential(*modules).eval(), "ternary")


def test_linear_layers_read_the_last_dimension() -> None:
    x = torch.randn(2, 3, 5, 4)
    for modules in ([nn.Linear(4, 4)], [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)]):
        module = convert(*modules)
        graph = make_graph(module, tuple(x.shape), "torch")
        assert torch.equal(Executor(graph, spread(graph))(x)[1], graph(x)[1])


def test_subclasses_of_packed_modules_run_what_they_say() -> None:
    class Negative(pycodesign.nn.Linear):
        def forward(self, *inputs: Any) -> Any:
            return -super().forward(*inputs)

    x, layer = torch.randn(2, 4), Negative.from_float(nn.Linear(4, 4), "ternary")
    graph = make_graph(layer, (2, 4), "torch")
    found = Executor(graph, spread(graph))(x)
    assert torch.equal(found[1], layer(x)) and torch.equal(found[1], graph(x)[1])
    segment = next(convert(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).children())
    plain = type(segment)
    assert plain is pycodesign.nn.modules.Segment
    segment.__class__ = type("Negative", (plain,), {"forward": lambda self, x: -plain.forward(self, x)})
    graph = make_graph(segment, (2, 4), "torch")
    assert torch.equal(Executor(graph, spread(graph))(x)[1], graph(x)[1])


def test_hooks_of_all_modules() -> None:
    module, x = convert(nn.Linear(4, 4)), torch.randn(2, 4)
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, result: result + 1)
    try:
        graph = make_graph(module, (2, 4), "torch")
        assert torch.equal(Executor(graph, spread(graph))(x)[1], graph(x)[1])
    finally:
        handle.remove()


def test_converted_modules_with_hooks() -> None:
    torch = pytest.importorskip("torch")
    nn = pytest.importorskip("pycodesign.nn")
    x = torch.randn(1, 8, 6, 6)
    for hook in ("register_forward_hook", "register_forward_pre_hook"):
        for inner in (False, True):
            module = nn.convert(
                torch.nn.Sequential(torch.nn.Conv2d(8, 4, 3, padding=1), torch.nn.ReLU()).eval(), "ternary"
            )
            hooked = next(module.children()) if inner else module
            getattr(hooked, hook)(lambda module, inputs, *result: result[0] + 1 if result else (inputs[0] + 1,))
            graph, place = two_torch_bodies(module, (1, 8, 6, 6), 4)
            assert torch.equal(Executor(graph, place)(x)[1], graph(x)[1])
