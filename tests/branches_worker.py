"""One process of `test_branches_distributed.py`: ``branches_worker.py RANK SIZE STORE TASK``."""

from __future__ import annotations

import datetime
import os
import sys
import time
from functools import partial
from pathlib import Path

import branches_conformance as conformance
import torch
import torch.distributed as dist

from pycodesign.branches import Executor, Graph, Placement, build_inception, build_parnet


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
        if name == "ladder":
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
    if task == "conform":
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
