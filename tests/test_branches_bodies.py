"""What bodies take and return: inputs of any layout, inputs they overwrite, results that are no arrays or misshapen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from branch_graphs import both, make_chain, make_graph, spread, two_torch_bodies

from pycodesign.branches import Body, Executor, Graph, Placement, Slice, Value


@pytest.mark.parametrize("timeout", [None, 60])
def test_inputs_of_any_layout(timeout: float | None) -> None:
    """Sums of floats depend on strides and alignment."""
    torch = pytest.importorskip("torch")
    functional, x = torch.nn.functional, np.random.default_rng(0).standard_normal((2, 4, 40, 66), dtype=np.float32)
    weight = torch.from_numpy(x[0, :, 3:6, :12].reshape(4, 4, 3, 3))
    shifted = np.empty(x.size + 1, np.float32)[1:].reshape(x.shape)
    shifted[...] = x
    layouts = [x, shifted, np.asfortranarray(x), x[:, ::-1, ::-1], x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)]
    for run in (
        lambda x: functional.conv2d(x, weight, padding=1),
        lambda x: x @ x.transpose(2, 3) @ x,
        lambda x: functional.scaled_dot_product_attention(x, x, x),
        lambda x: x.flatten(1).sum(1)[:, None, None, None].expand(x.shape),
    ):
        graph, place = two_torch_bodies(run, x.shape, 4)
        executor = Executor(graph, place, timeout=timeout)
        for layout in layouts:
            for got, wanted in zip(executor(layout), graph(layout), strict=True):
                np.testing.assert_array_equal(got, wanted, strict=True)


def test_inputs_with_a_gradient_and_of_any_alignment() -> None:
    chained, plain = make_graph(make_chain()), make_graph(np.copy)
    x = torch.ones(1, 4, requires_grad=True)
    assert not plain(x)[0].requires_grad and torch.equal(chained(x)[1], Executor(chained, spread(chained))(x)[1])
    shifted = np.ones(17, np.uint8)[1:].view(np.float32).reshape(1, 4)
    assert not shifted.flags.aligned
    np.testing.assert_array_equal(Executor(chained, spread(chained))(shifted)[0], chained(shifted)[0])


@pytest.mark.parametrize("timeout", [None, 60])
def test_bodies_that_overwrite_their_input(timeout: float | None) -> None:
    torch = pytest.importorskip("torch")
    values = {"x": Value((1, 9)), "y": Value((1, 9))}
    graph = Graph(values, [Body("a", torch.nn.ReLU(inplace=True), (Slice("x"),), (Slice("y"),))], ["x"], ["y"])
    x = torch.randn(1, 9)
    before = x.clone()
    assert torch.equal(Executor(graph, Placement.sequential(graph), timeout=timeout)(x)[0], before.relu())
    assert torch.equal(x, before)


def test_torch_bodies_may_return_arrays() -> None:
    graph = make_graph(lambda x: x.numpy() + 1, arrays="torch", names="a")
    assert graph(torch.ones(1, 4))[0].tolist() == [[2] * 4]


@both
@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: None, "a: expected a NumPy array or a torch tensor, got NoneType"),
        (lambda x: x.bfloat16(), "a: expected a dtype that NumPy has, got torch.bfloat16"),
        (lambda x: torch.empty(1, 4, device="meta"), "a: expected an array in host memory, got a tensor on meta"),
    ],
)
def test_results_that_are_no_arrays_name_their_body(run: Any, message: str, timeout: float | None) -> None:
    graph, x = make_graph(run, arrays="torch", names="a"), torch.ones(1, 4)
    for call in (graph, Executor(graph, Placement.sequential(graph), timeout=timeout)):
        with pytest.raises(TypeError, match=message):
            call(x)


def test_body_of_wrong_shape() -> None:
    values = {"x": Value((1, 2)), "y": Value((1, 4))}
    graph = Graph(values, [Body("same", np.copy, (Slice("x"),), (Slice("y"),), "numpy")], ["x"], ["y"])
    with pytest.raises(ValueError, match=r"same: expected to return float32 \(1, 4\)"):
        Executor(graph, Placement.sequential(graph))(np.zeros((1, 2), np.float32))


def test_bodies_without_outputs() -> None:
    seen: list[Any] = []
    body = Body("a", lambda x: seen.append(x.sum()) or (), (Slice("x"),), (), "numpy")
    graph = Graph({"x": Value((1, 4))}, [body], ["x"], ["x"])
    Executor(graph, Placement.sequential(graph))(np.ones((1, 4), np.float32))
    assert seen == [4]
