"""One process of `test_branches_distributed.py`: ``branches_worker.py RANK SIZE STORE TASK``."""

from __future__ import annotations

import datetime
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path

import branches_conformance as conformance
import torch
import torch.distributed as dist

from pycodesign.branches import (
    Body,
    Executor,
    Graph,
    Placement,
    Slice,
    Value,
    build_inception,
    build_parnet,
    distributed,
)


def spread(graph: Graph, size: int) -> Placement:
    """Branch by branch over all ranks."""
    teams: list[list[str]] = [[] for _ in range(size)]
    for name, body in graph.bodies.items():
        teams[max(0, body.branch) % size].append(name)
    return Placement(tuple(map(tuple, teams)))


def conform(size: int) -> None:
    for name, build in conformance.CASES.items():
        case = build()
        teams = (*case.place.teams, *[()] * (size - len(case.place.teams)))
        for turned in (teams, teams[::-1]):
            make = partial(Executor, backend="distributed", timeout=60)
            conformance.check(case._replace(place=Placement(turned)), make)
        if name == "ladder" and not distributed.is_nccl(None):
            make = partial(Executor, backend="distributed", timeout=60, link_delay=0.002)
            conformance.check(case._replace(place=Placement(teams)), make)


def run_networks(size: int) -> None:
    for build in (build_parnet, build_inception):
        net = build(width=8, size=8, batch=2)
        graph = net.to_graph()
        x = torch.rand(net.shape, generator=torch.Generator().manual_seed(0))
        stems = {}
        for recompute in ("never", "always", "auto"):
            run = Executor(graph, spread(graph, size), backend="distributed", recompute=recompute, timeout=60)
            for _ in range(3):
                assert torch.equal(run(x)[0], graph(x)[0])
            stems[recompute] = sum(name.startswith("stem") for name in run._run.graph.bodies)
        assert stems["never"] == 1 < stems["always"] == stems["auto"], stems


def run_two(rank: int) -> None:
    """Two executors of one group at the same time, which the ranks begin in different orders."""
    values = {name: Value((1, 4)) for name in "xab"}
    bodies = [Body(y, torch.neg, (Slice(x),), (Slice(y),)) for x, y in ("xa", "ab")]
    graph = Graph(values, bodies, ["x"], ["b"])
    runs = [Executor(graph, Placement((("a",), ("b",))), backend="distributed", timeout=20) for _ in range(2)]
    found: list[float] = [0.0, 0.0]

    def call(index: int) -> None:
        found[index] = float(runs[index](torch.full((1, 4), index + 1.0))[0][0, 0])

    threads = [threading.Thread(target=call, args=(index,)) for index in range(2)]
    for thread in threads[:: 1 if rank == 0 else -1]:
        thread.start()
        time.sleep(0.5)
    for thread in threads:
        thread.join()
    print(found)


def expect_error(rank: int, size: int, task: str) -> None:
    net = build_inception(modules=2, width=8, size=8)
    graph = net.to_graph()
    place = spread(graph, size)
    if task == "other":
        teams = place.teams if rank == 0 else place.teams[::-1]
        try:
            Executor(graph, Placement(teams), backend="distributed")
        except ValueError as error:
            print(f"ValueError: {error}")
        return
    run = Executor(graph, place, backend="distributed", timeout=2.0)
    x = torch.rand(net.shape)
    run(x)
    if rank == size - 1:
        if task == "dies":
            os._exit(0)
        time.sleep(6)  # longer than anybody waits
        return
    begin = time.monotonic()
    for _ in range(2):
        try:
            run(x)
        except (ConnectionError, RuntimeError) as error:
            print(f"{type(error).__name__}: {error}")
    print(f"seconds {time.monotonic() - begin:.1f}")


def main() -> None:
    rank, size, store, task = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=wait)
    if task == "pairs":  # the groups of nccl, by gloo
        distributed.is_nccl, task = (lambda group: True), "conform"
    if task in ("conform", "two"):
        if task == "two":
            run_two(rank)
        else:
            conform(size)
            run_networks(size)
            print("fine")
        dist.barrier()
        dist.destroy_process_group()
    else:
        expect_error(rank, size, task)
        sys.stdout.flush()
        os._exit(0)  # what hangs in the backend does not matter any more


if __name__ == "__main__":
    main()
