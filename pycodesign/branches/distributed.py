"""One process for each device, over torch.distributed, for `Executor`."""

from __future__ import annotations

import datetime
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np

try:
    import torch
    import torch.distributed as dist
except ImportError as error:
    raise ImportError("backend='distributed' needs torch: `pip install 'pycodesign[torch]'`") from error

from torch import Tensor

from pycodesign._arguments import to_number, to_numpy
from pycodesign.branches.graph import Graph, Placement, Slice, overlap
from pycodesign.branches.on_device import find_device, move_body, run_tensors, view_tensor
from pycodesign.branches.simulate import predict
from pycodesign.branches.table import LatencyTable
from pycodesign.branches.timed import hold_torch_threads

__all__ = ["Runner", "recompute_bodies"]

next_tag = 0  # of a message: two runners of a group have none in common


def is_nccl(group: Any) -> bool:
    """Return whether a group's messages are kernels on streams."""
    return dist.get_backend(group) == "nccl"


class Runner:
    """This process's part of a placed graph; `Executor` says what all backends do.

    Every process of the group makes one, of the same graph and placement, and calls it with the same inputs; team n is
    the process of rank n. All receives are posted before anything is computed, into memory that is allocated once;
    results are sent as soon as they are there.

    Parameters
    ----------
    graph : Graph
    place : Placement
    group : torch.distributed.ProcessGroup, optional
        Of as many processes as there are teams, with gloo on the CPU or nccl on GPUs; by default the default group.
        With nccl, of all processes there are: pairs that exchange results get groups of their own, for each direction.
    device : str or torch.device
        Where this process computes.
    timeout : float
        Seconds to wait for another process in a run; to make a runner waits as long as the group does.
    recompute : {"auto", "always", "never"}
        Whether a stem that several teams need runs on each of them instead of being sent. ``"auto"``: where that is
        faster by `table`, or, without one, where a stem reads nothing that would have to be sent.
    table : LatencyTable, optional
        With the waits and transfers of the links between processes.
    link_delay : float
        Seconds by which each message is held back, to try what slower links do; on the CPU only.

    Raises
    ------
    RuntimeError
        Without a process group.
    ValueError
        If the group has another size, or another process another graph.
    """

    def __init__(
        self,
        graph: Graph,
        place: Placement,
        *,
        group: Any = None,
        device: str | torch.device = "cpu",
        timeout: float = 30.0,
        recompute: str = "auto",
        table: LatencyTable | None = None,
        link_delay: float = 0.0,
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("group: expected torch.distributed.init_process_group to have been called, got no group")
        self.group, self.device = group, find_device(device)
        self.rank, size = dist.get_rank(group), dist.get_world_size(group)
        if size != len(place.teams):
            raise ValueError(f"group: expected {len(place.teams)} processes, one for each team, got {size}")
        if is_nccl(group) and size != dist.get_world_size():
            raise ValueError(f"group: expected all {dist.get_world_size()} processes with nccl, got {size} of them")
        self.timeout = to_number("timeout", timeout)
        if not 0 < self.timeout < 1e6:
            raise ValueError(f"timeout: expected a positive number of seconds, got {timeout}")
        self.delay = to_number("link_delay", link_delay)
        if not 0 <= self.delay < self.timeout:
            raise ValueError(f"link_delay: expected seconds, fewer than the timeout, got {link_delay}")
        if self.delay and self.device.type != "cpu":
            raise ValueError(f"link_delay: expected 0 on {self.device}, got {link_delay}")
        if table is not None and not isinstance(table, LatencyTable):
            raise TypeError(f"table: expected a LatencyTable, got {type(table).__name__}")
        self.graph, self.place = recompute_bodies(graph, place, recompute, table)
        self._lock = threading.RLock()  # a body that calls its executor fails rather than waits
        self._failed: str | None = None
        self._pairs: dict[tuple[int, int], Any] = {}
        self._queued: list[tuple[Any, _Message, int]] = []
        with self._on_device():
            self._first_tag = self._check_peers()
            self._allocate()
            if is_nccl(group):
                self._connect()
        self._sender = _Sender(self.delay) if self.delay else None

    def _check_peers(self) -> int:
        """Compare what all processes are to run; return the first tag that is new to all of them."""
        global next_tag
        values = sorted((name, value.shape, value.dtype) for name, value in self.graph.values.items())
        bodies = [(b.name, b.inputs, b.outputs) for b in self.graph.bodies.values()]
        mine = repr((values, bodies, self.place.teams))
        found: list[Any] = [None] * len(self.place.teams)
        dist.all_gather_object(found, (mine, next_tag), group=self.group)
        for rank, (other, _) in enumerate(found):
            if other != mine:
                raise ValueError(f"net: expected the same graph and placement on all ranks, got others on rank {rank}")
        first = max(tag for _, tag in found)
        next_tag = first + len(_list_messages(self.graph, self.place))
        return int(first)

    def _allocate(self) -> None:
        graph = self.graph
        self.values = {
            name: torch.empty(value.shape, dtype=getattr(torch, value.dtype), device=self.device)
            for name, value in graph.values.items()
        }
        self.messages = _list_messages(graph, self.place)
        for message in self.messages:
            if self.rank in (message.source, message.target):
                message.allocate(self.values)
        self.bodies = [move_body(graph.bodies[name], self.device) for name in self.place.teams[self.rank]]
        self.sends: dict[str, list[_Message]] = {}
        self.waits: dict[str, list[_Message]] = {}
        for message in self.messages:
            if message.source == self.rank:
                self.sends.setdefault(message.body, []).append(message)
            elif message.target == self.rank:
                for reader in message.readers:
                    self.waits.setdefault(reader, []).append(message)

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _connect(self) -> None:
        """Make a group for each direction in which two processes exchange results.

        NCCL runs what a pair of processes does in a group one after the other: a receive that is posted early would
        hold up the sends that the other side waits for. All processes make all groups, in one order, and those of a
        group connect by their first exchange.
        """
        hello = torch.zeros(1, device=self.device)
        for source, target in sorted({(message.source, message.target) for message in self.messages}):
            ranks = [self._global(source), self._global(target)]
            pair = self._pairs[source, target] = dist.new_group(ranks)
            if self.rank == source:
                dist.send(hello, ranks[1], group=pair)
            elif self.rank == target:
                dist.recv(hello, ranks[0], group=pair)

    def __call__(self, *inputs: Any) -> list[Any]:
        as_torch = self.graph.check_inputs(inputs)
        given = [
            x.detach() if isinstance(x, Tensor) else torch.from_numpy(np.array(to_numpy(name, x)[0]))
            for name, x in zip(self.graph.inputs, inputs, strict=True)
        ]
        with self._lock, self._on_device():
            if self._failed is not None:
                raise RuntimeError(f"run: expected all processes, got an executor that failed before ({self._failed})")
            try:
                made = self._run(given)
            except BaseException as error:  # what other processes wait for does not come
                self._failed = str(error) or type(error).__name__
                raise
        return made if as_torch else [y.cpu().numpy() for y in made]

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        for name, x in zip(self.graph.inputs, inputs, strict=True):
            self.values[name].copy_(x)
        pending: dict[int, Any] = {}
        for message in self.messages:  # all of them now: what comes early finds its place
            if message.target == self.rank:
                pending[message.index] = self._post(dist.irecv, message, message.source)
        sent: list[tuple[_Message, Any]] = []
        with hold_torch_threads(self.place.threads[self.rank]):
            for body in self.bodies:
                for message in self.waits.get(body.name, ()):
                    self._receive(message, pending)
                run_tensors(body, self.values)
                for message in self.sends.get(body.name, ()):
                    message.fill(self.values)
                    sent.append((message, self._send(message)))
        for message in self.messages:  # those that only the outputs need
            if message.target == self.rank:
                self._receive(message, pending)
        for message, work in sent:
            self._wait(work, message, message.target)
        self._await_queued()
        return [self.values[name].clone() for name in self.graph.outputs]

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def _send(self, message: _Message) -> Any:
        def post() -> Any:
            return self._post(dist.isend, message, message.target)

        return post() if self._sender is None else self._sender.add(post)

    def _post(self, function: Callable[..., Any], message: _Message, peer: int) -> Any:
        try:
            tag = self._first_tag + message.index
            group = self._pairs.get((message.source, message.target), self.group)
            return function(message.buffer, self._global(peer), group=group, tag=tag)
        except RuntimeError as error:
            raise self._describe(error, message, peer, 0.0) from error

    def _receive(self, message: _Message, pending: dict[int, Any]) -> None:
        if (work := pending.pop(message.index, None)) is not None:
            self._wait(work, message, message.source)
            message.empty(self.values)

    def _wait(self, work: Any, message: _Message, peer: int) -> None:
        begin = time.monotonic()
        if self._pairs:  # the stream waits, and this process goes on
            work.wait()
            self._queued.append((work, message, peer))
            return
        try:
            work.wait(datetime.timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise self._describe(error, message, peer, time.monotonic() - begin) from error

    def _await_queued(self) -> None:
        """Wait for what streams wait for."""
        begin = time.monotonic()
        while self._queued:
            work, message, peer = self._queued[-1]
            if work.is_completed():
                self._queued.pop()
            elif (waited := time.monotonic() - begin) > self.timeout:
                raise self._describe(RuntimeError("its stream still waits"), message, peer, waited)
            else:
                time.sleep(2e-5)

    def _describe(self, error: Exception, message: _Message, peer: int, waited: float) -> ConnectionError:
        action = "receive" if peer == message.source else "send"
        reason = re.sub(r"^\[\S+\] ", "", str(error)).split(". ")[0].splitlines()[0]
        return ConnectionError(
            f"rank {self.rank}: expected to {action} the result of {message.body!r} "
            f"{'from' if action == 'receive' else 'to'} rank {peer} within {self.timeout:g} s, "
            f"got none after {waited:.1f} s: {reason}"
        )


@dataclass
class _Message:
    """A slice that one process makes and another needs.

    Its index, behind the runner's first, is its tag, and its place in the order in which both sides post what goes
    between them.
    """

    index: int
    body: str
    piece: Slice
    source: int
    target: int
    readers: list[str] = field(default_factory=list)
    buffer: Any = None
    is_view: bool = False

    def allocate(self, values: dict[str, Tensor]) -> None:
        part = view_tensor(values, self.piece)
        self.is_view = part.is_contiguous()
        self.buffer = part if self.is_view else torch.empty_like(part, memory_format=torch.contiguous_format)

    def fill(self, values: dict[str, Tensor]) -> None:
        if not self.is_view:
            self.buffer.copy_(view_tensor(values, self.piece))

    def empty(self, values: dict[str, Tensor]) -> None:
        if not self.is_view:
            view_tensor(values, self.piece).copy_(self.buffer)


class _Sender:
    """Sends messages later, from a thread of its own."""

    def __init__(self, delay: float) -> None:
        self.delay = delay
        self.queue: SimpleQueue[_Later] = SimpleQueue()
        threading.Thread(target=self._run, name="sender", daemon=True).start()

    def add(self, post: Callable[[], Any]) -> _Later:
        later = _Later(time.monotonic() + self.delay, post)
        self.queue.put(later)
        return later

    def _run(self) -> None:
        while True:
            later = self.queue.get()
            time.sleep(max(0.0, later.due - time.monotonic()))
            try:
                later.work = later.post()
            except Exception as error:
                later.error = error
            later.posted.set()


class _Later:
    def __init__(self, due: float, post: Callable[[], Any]) -> None:
        self.due, self.post, self.posted = due, post, threading.Event()
        self.work: Any = None
        self.error: Exception | None = None

    def wait(self, timeout: datetime.timedelta) -> None:
        if not self.posted.wait(timeout.total_seconds()):
            raise RuntimeError("not sent in time")
        if self.error is not None:
            raise self.error
        self.work.wait(timeout)


def _list_messages(graph: Graph, place: Placement) -> list[_Message]:
    """List what goes between processes, in the order in which a sequential run would make it.

    Outputs go to every process.
    """
    team_of, found = place.team_of, []
    for body in graph.bodies.values():
        for piece in body.outputs:
            for target in range(len(place.teams)):
                if target == team_of[body.name]:
                    continue
                readers = [
                    name
                    for name in place.teams[target]
                    if any(overlap(piece, mine) for mine in graph.bodies[name].inputs)
                ]
                if readers or piece.value in graph.outputs:
                    found.append(_Message(0, body.name, piece, team_of[body.name], target, readers))
    # Each process sends in the order in which it runs: matters to backends without tags.
    position = {name: i for team in place.teams for i, name in enumerate(team)}
    found.sort(key=lambda message: (message.source, position[message.body]))
    for index, message in enumerate(found):
        message.index = index
    return found


def recompute_bodies(
    graph: Graph, place: Placement, choice: str = "auto", table: LatencyTable | None = None
) -> tuple[Graph, Placement]:
    """Let teams run copies of a stem of their own where that is cheaper than to send it.

    Parameters
    ----------
    graph : Graph
    place : Placement
    choice : {"auto", "always", "never"}
        ``"auto"``: by `table`, where there is one; else where a stem reads inputs of the graph alone, which every
        process has.
    table : LatencyTable, optional

    Returns
    -------
    (Graph, Placement)
    """
    if choice not in ("auto", "always", "never"):
        raise ValueError(f"recompute: expected 'auto', 'always' or 'never', got {choice!r}")
    for name in [name for name, body in graph.bodies.items() if body.may_recompute and choice != "never"]:
        team_of = place.team_of
        readers = [other for other in graph.bodies if name in graph.before[other]]
        teams = {team_of[reader] for reader in readers}
        written = {piece.value for piece in graph.bodies[name].outputs}
        if len(teams) < 2 or written & set(graph.outputs):
            continue
        if choice == "auto" and table is None and not {p.value for p in graph.bodies[name].inputs} <= set(graph.inputs):
            continue
        changed = graph.recompute(name, team_of)
        rows: list[list[str]] = []
        for bodies in place.teams:  # each copy comes in front of the first body that reads it
            rows.append([])
            for other in bodies:
                if other != name:
                    copies = [body for body in changed.before[other] if body not in graph.bodies]
                    rows[-1] += [*(copy for copy in copies if copy not in rows[-1]), other]
        moved = Placement(tuple(map(tuple, rows)), place.threads, method=place.method)
        moved.check(changed)
        if choice == "always" or table is None or predict(changed, moved, table) <= predict(graph, place, table):
            graph, place = changed, moved
    return graph, place
