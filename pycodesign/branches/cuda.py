"""Streams of one GPU, for `Executor`."""

from __future__ import annotations

import threading
from typing import Any

try:
    import torch
except ImportError as error:
    raise ImportError("backend='cuda' needs torch: `pip install 'pycodesign[torch]'`") from error

from pycodesign.branches.graph import Graph, Placement
from pycodesign.branches.on_device import find_device, move_body, run_tensors
from pycodesign.branches.streams import plan_steps

__all__ = ["Runner"]

WARMUPS = 3  # runs before the capture: libraries choose their algorithms and allocate


class Runner:
    """A placed graph on a GPU: each team is a stream; `Executor` says what all backends do.

    Bodies are torch modules or callables, of tensors on the device. All of them are captured once, as one CUDA graph,
    which a call replays on the caller's current stream. ``Placement.by_chains`` needs the fewest streams that can run
    all that may run at once; ``Placement.sequential`` is one after another in a CUDA graph.

    Parameters
    ----------
    graph : Graph
    place : Placement
    device : str or torch.device
    capture : bool
        Whether to capture; otherwise every call starts every body.

    Raises
    ------
    RuntimeError
        Where there is no such device, and for bodies that cannot be captured.
    ValueError
        For bodies that take NumPy's arrays.
    """

    def __init__(
        self, graph: Graph, place: Placement, *, device: str | torch.device = "cuda", capture: bool = True
    ) -> None:
        self.device = find_device(device)
        self.graph, self._steps = graph, plan_steps(graph, place)
        self._bodies = {name: move_body(body, self.device) for name, body in graph.bodies.items()}
        self._values = {
            name: torch.zeros(value.shape, dtype=getattr(torch, value.dtype), device=self.device)
            for name, value in graph.values.items()
        }
        self._lock = threading.Lock()
        with torch.cuda.device(self.device):
            self._streams = [torch.cuda.Stream() for _ in place.teams]
            self._captured = self._capture() if capture else None
            self._last = torch.cuda.current_stream().record_event()  # of the last call: the next overwrites its values

    def __del__(self) -> None:
        if (last := getattr(self, "_last", None)) is not None:
            last.synchronize()  # other streams than that of its memory may still use it

    def _capture(self) -> Any:
        first = torch.cuda.Stream()
        first.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(first):
            for _ in range(WARMUPS):
                self._start()
        torch.cuda.current_stream().wait_stream(first)
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured, stream=first, capture_error_mode="thread_local"):
                self._start()
        except RuntimeError as error:
            wanted = "bodies that a CUDA graph can capture, without a wait for the device"
            raise RuntimeError(f"net: expected {wanted}, or capture=False; got {error.__context__ or error}") from error
        return captured

    def _start(self) -> None:
        """Start all bodies behind what the current stream has, and let it wait for all of them."""
        current = torch.cuda.current_stream()
        done: dict[str, Any] = {}
        for stream in self._streams:
            stream.wait_stream(current)
        for step in self._steps:
            stream = self._streams[step.stream]
            with torch.cuda.stream(stream):
                for source in step.waits:
                    stream.wait_event(done[source])
                run_tensors(self._bodies[step.body], self._values)
                if step.is_awaited:
                    done[step.body] = stream.record_event()
        for stream in self._streams:
            current.wait_stream(stream)

    def __call__(self, *inputs: Any) -> list[Any]:
        as_torch = self.graph.check_inputs(inputs)
        with self._lock, torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            current.wait_event(self._last)
            for name, x in zip(self.graph.inputs, inputs, strict=True):
                self._values[name].copy_(torch.as_tensor(x))
            self._start() if self._captured is None else self._captured.replay()
            made = [self._values[name].clone() for name in self.graph.outputs]
            self._last = current.record_event()
        if as_torch and inputs[0].is_cuda:
            return made
        return [y.cpu() for y in made] if as_torch else [y.cpu().numpy() for y in made]
