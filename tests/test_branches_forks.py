"""Processes that fork, and that exit, while branches run or after they have run."""

from __future__ import annotations

import subprocess
import sys

import pytest
from branch_graphs import make_graph, spread, two_cores

FORK = """
import os, signal
import torch
from pycodesign import ops
from pycodesign.branches import Body, Executor, Graph, Placement, Slice, Value

x = torch.ones(1, 1 << 20)
values = {name: Value((1, 1 << 20)) for name in "xab"}
graph = Graph(values, [Body(n, torch.abs, (Slice("x"),), (Slice(n),)) for n in "ab"], ["x"], ["a", "b"])
executor = Executor(graph, Placement((("a",), ("b",))))
calls = [
    lambda: executor(x),
    lambda: graph(x),
    lambda: ops.run_branches([torch.abs, torch.neg], x),
    lambda: ops.run_branches([torch.abs, torch.neg], x, timeout=60),
]
torch.set_num_threads(2)
for call in [lambda: torch.abs(x), *calls]:
    call()
for call in calls:
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        call()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@two_cores
def test_forked_child_of_a_process_that_used_torch() -> None:
    pytest.importorskip("torch")
    subprocess.run([sys.executable, "-P", "-c", FORK], check=True, timeout=200)


def run_script(script: str) -> str:
    """Run lines of Python in a process of its own, and return what they print."""
    lines = "import os, sys, threading, time\nimport numpy as np\nfrom pycodesign import ops\n"
    lines += "from pycodesign.branches import Body, Executor, Graph, Placement, Slice, Value\n"
    lines += "x = np.ones((1, 4), np.float32)\nbegun = threading.Event()\n"
    lines += "def make(run):\n    values = {name: Value((1, 4)) for name in 'xab'}\n"
    lines += "    bodies = [Body(name, run, (Slice('x'),), (Slice(name),), 'numpy') for name in 'ab']\n"
    lines += (
        f"    return Executor(Graph(values, bodies, ['x'], ['a', 'b']), Placement({spread(make_graph(abs)).teams!r}))\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", lines + script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("call", ["make(wait)(x)", "ops.run_branches([wait] * 2, x)", "make(count)(x)"])
def test_python_exits_while_a_daemon_is_in_a_body(call: str) -> None:
    script = "class Last:\n    def __del__(self, sleep=time.sleep):\n        sleep(1)\n"  # in the end of Python
    script += "last = Last()\ndef wait(x):\n    begun.set()\n    time.sleep(0.3)\n    return x\n"
    script += "def count(x):\n    begun.set()\n    while True:\n        pass\n"
    script += f"threading.Thread(target=lambda: {call}, daemon=True).start()\nbegun.wait()\nprint('end')\n"
    assert run_script(script) == "end\n"


def test_forks_while_another_thread_is_in_an_executor() -> None:
    script = "def wait(x):\n    begun.set()\n    time.sleep(0 if forked else 1)\n    return x + 1\n"
    script += "forked, run = False, make(wait)\nthread = threading.Thread(target=run, args=(x,))\nthread.start()\n"
    script += "begun.wait()\nchild = os.fork()\nif child == 0:\n    forked = True\n"
    script += "    os._exit(7 if [y.tolist() for y in run(x) + run(x)] == [[[2] * 4]] * 4 else 8)\n"
    script += "end = time.monotonic() + 60\n"
    script += (
        "while not (found := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:\n    time.sleep(0.01)\n"
    )
    script += "if not found[0]:\n    os.kill(child, 9)\nprint(os.waitstatus_to_exitcode(found[1]), run(x)[0])\n"
    assert run_script(script) == "7 [[2. 2. 2. 2.]]\n"
