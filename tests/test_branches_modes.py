"""What holds on the caller's thread holds in branches: modes, transforms and hooks of torch, and context variables."""

from __future__ import annotations

import contextvars
from typing import Any

import numpy as np
import pytest
import torch
from branch_graphs import both, make_graph, spread, two_torch_bodies
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pycodesign import ops, quantize
from pycodesign.branches import Executor

# Modes of torch


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    layer = ops.prepack_linear(quantize.ternary(rng.standard_normal((3, 5), dtype=np.float32)))
    x = torch.randn(4, 5)
    module = torch.nn.Linear(5, 2)
    with torch.no_grad():
        found = ops.run_branches([layer, module], x)[::-1]
        assert not found[0].requires_grad and torch.equal(found[0], module(x))
    assert torch.equal(found[1], ops.linear(x, layer))
    with torch.inference_mode():
        assert ops.run_branches([torch.is_inference_mode_enabled] * 2) == [True, True]
    assert ops.run_branches([torch.is_grad_enabled] * 2) == [True, True]
    with torch.autocast("cpu"):
        assert ops.run_branches([lambda: torch.is_autocast_enabled("cpu")] * 2) == [True, True]
    threads = torch.get_num_threads()
    ops.run_branches([lambda: None] * 2, timeout=60)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("timeout", [None, 60])
def test_torch_modes_of_bodies(timeout: float | None) -> None:
    torch = pytest.importorskip("torch")
    layer, x = torch.nn.Linear(32, 32), torch.randn(4, 32)
    graph, place = two_torch_bodies(lambda x: layer(x).float(), (4, 32), 32)
    executor = Executor(graph, place, timeout=timeout)
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            found, wanted = executor(x), graph(x)
        assert all(torch.equal(y, z) for y, z in zip(found, wanted, strict=True))
        assert not torch.equal(wanted[0], graph(x)[0]) and torch.equal(executor(x)[1], graph(x)[1])


@both
def test_default_device_and_autocast_of_a_gpu(timeout: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        found = ops.run_branches([lambda: torch.zeros(1).device.type] * 3, timeout=timeout)
    assert found == ["meta"] * 3
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    with torch.autocast("cuda", torch.float16):
        assert ops.run_branches([lambda: torch.is_autocast_enabled("cuda")] * 3, timeout=timeout) == [True] * 3
    assert ops.run_branches([lambda: torch.is_autocast_enabled("cuda")] * 3, timeout=timeout) == [False] * 3


def square(x: Tensor) -> Tensor:
    return (x * x).sum()


def cube(x: Tensor) -> Tensor:
    return (x * x * x).sum()


def run_both(x: Tensor) -> Tensor:
    first, second = ops.run_branches([square, cube], x)
    return first + second  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of torch.func.jvp
def test_transforms_of_branches() -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    wanted = 2 * x + 3 * x * x
    assert torch.equal(torch.func.grad(run_both)(x), wanted)
    value, tangent = torch.func.jvp(run_both, (x,), (torch.ones(3),))
    assert value == run_both(x) and tangent == wanted.sum()
    assert torch.equal(torch.func.vmap(run_both)(torch.stack([x, 2 * x])), torch.stack([run_both(x), run_both(2 * x)]))
    assert torch.equal(torch.func.hessian(run_both)(x), torch.diag(2 + 6 * x))


def test_modes_and_hooks_see_all_branches() -> None:
    x = torch.ones(4, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ops.run_branches([lambda: x @ x] * 3)
    assert counter.get_total_flops() == 3 * 2 * 4**3
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor)
        return len(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index - 1]):
        ops.run_branches([lambda: x.sin()] * 3)
    assert len(packed) == 3
    with FlopCounterMode(display=False), pytest.raises(RuntimeError, match="timeout: expected None where torch has"):
        ops.run_branches([abs, abs], -1.0, timeout=60)


# Context variables


def test_context_variables() -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    variable.set(3)

    def change(x: int) -> int:
        before = variable.get()
        variable.set(before + x)
        return before

    def fail(x: int) -> None:
        variable.set(x)
        raise ArithmeticError

    for timeout in (None, 60):
        assert ops.run_branches([abs, change, change, change], 4, timeout=timeout) == [4, 3, 3, 3]
        with pytest.raises(ArithmeticError):
            ops.run_branches([abs, fail], 4, timeout=timeout)
        assert variable.get() == 3
    with FlopCounterMode(display=False):  # all on this thread
        assert ops.run_branches([abs, change, change], 4) == [4, 3, 3]
        with pytest.raises(ArithmeticError):
            ops.run_branches([abs, fail], 4)
    assert variable.get() == 3


@both
def test_bodies_have_the_callers_context(timeout: float | None) -> None:
    variable: contextvars.ContextVar[float] = contextvars.ContextVar("variable", default=1)

    def scale(x: Any) -> Any:
        factor = variable.get()
        variable.set(100)
        return x * np.float32(factor)

    graph, x = make_graph(scale), np.ones((1, 4), np.float32)
    executor = Executor(graph, spread(graph), timeout=timeout)
    for factor in (3, 4):
        variable.set(factor)
        assert [float(y[0, 0]) for y in executor(x)] == [factor] * 2
        assert variable.get() == factor
    graph = make_graph(lambda x: x / np.float32(0))
    executor = Executor(graph, spread(graph), timeout=timeout)
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        executor(x)
    with np.errstate(divide="ignore"):
        assert np.isinf(executor(x)[1]).all()
