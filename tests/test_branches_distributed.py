"""The backend of processes: the conformance suite on two and three of them, peers that are lost, what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pycodesign.branches import Executor, LatencyTable, Placement, build_parnet, describe_machine
from pycodesign.branches.distributed import recompute_bodies

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def run_processes(size, task, store, wait=120):
    command = [sys.executable, "-W", "error", str(Path(__file__).parent / "branches_worker.py")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(store), task],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        return [(*process.communicate(timeout=wait), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("task, size", [("conform", 2), ("conform", 3), ("pairs", 3)])
def test_processes_compute_as_one(task, size, tmp_path):
    for out, err, code in run_processes(size, task, tmp_path / "store"):
        assert (out, code) == ("fine\n", 0), err


def test_executors_of_one_group_keep_their_messages(tmp_path):
    for out, err, code in run_processes(2, "two", tmp_path / "store"):
        assert (out, code) == ("[1.0, 2.0]\n", 0), err


@pytest.mark.parametrize("task", ["dies", "hangs"])
def test_a_lost_peer_is_an_error(task, tmp_path):
    (out, err, _), _ = run_processes(2, task, tmp_path / "store")
    lines = out.splitlines()
    assert len(lines) == 3, out + err
    assert lines[0].startswith("ConnectionError: rank 0: expected to "), out
    assert "rank 1 within 2 s, got none after" in lines[0]
    assert lines[1].startswith("RuntimeError: run: expected all processes, got an executor that failed before")
    assert float(lines[2].split()[1]) < 5


def test_other_placements_are_an_error(tmp_path):
    for rank, (out, err, _) in enumerate(run_processes(2, "other", tmp_path / "store")):
        wanted = f"the same graph and placement on all ranks, got others on rank {1 - rank}"
        assert wanted in out, out + err


def test_what_is_refused(tmp_path):
    graph = build_parnet(width=8, size=8).to_graph()
    place = Placement.sequential(graph)
    with pytest.raises(RuntimeError, match="init_process_group to have been called, got no group"):
        Executor(graph, place, backend="distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for options, message in [
            ({"timeout": 0}, "timeout: expected a positive number of seconds"),
            ({"link_delay": -1}, "link_delay: expected seconds, fewer than the timeout"),
            ({"recompute": "maybe"}, "recompute: expected 'auto', 'always' or 'never', got 'maybe'"),
        ]:
            with pytest.raises(ValueError, match=message):
                Executor(graph, place, backend="distributed", **options)
        if not torch.cuda.is_available():
            with pytest.raises(RuntimeError, match="device: torch sees no CUDA device, got 'cuda'"):
                Executor(graph, place, backend="distributed", device="cuda")
        with pytest.raises(ValueError, match="group: expected 2 processes, one for each team, got 1"):
            Executor(graph, Placement((*place.teams, ())), backend="distributed")
    finally:
        dist.destroy_process_group()


def test_a_stem_is_recomputed_where_that_is_cheaper():
    graph = build_parnet(width=8, size=8).to_graph()
    place = Placement((("stem", "stream.0", "head"), ("stream.1",)))
    moved, placed = recompute_bodies(graph, place)
    assert placed.teams == (("stem.0", "stream.0", "head"), ("stem.1", "stream.1"))
    placed.check(moved)
    assert recompute_bodies(graph, place, "never") == (graph, place)
    names = [*graph.bodies, *moved.bodies]

    def make_table(sync):
        return LatencyTable(
            describe_machine(), {name: {"solo/1": 1e-4, "together/1": 2e-4} for name in names}, {}, sync
        )

    assert recompute_bodies(graph, place, "auto", make_table(1e-6)) == (graph, place)  # two stems slow each other
    assert recompute_bodies(graph, place, "auto", make_table(1e-3))[1].teams == placed.teams
