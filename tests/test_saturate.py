"""Equality saturation: what it proves equal is equal, extraction sees sharing, limits are kept and said."""

import doctest
import itertools
import math
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_factor import dense, layers, quantized, random_quantized

from pycodesign.repetition import factor
from pycodesign.repetition.extract import Graph, Node, extract_greedily, extract_optimally, order_nodes
from pycodesign.repetition.program import ADD, MULTIPLY, SUBTRACT

if sys.version_info < (3, 11):
    pytest.skip("egglog needs Python 3.11", allow_module_level=True)

from pycodesign.repetition.saturate import saturate


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("extraction", ["ilp", "greedy"])
@pytest.mark.filterwarnings("ignore:saturate:RuntimeWarning")
@given(integer=st.booleans(), data=st.data())
@settings(deadline=None, max_examples=15)
def test_programs_are_exact(subtract, extraction, integer, data):
    q, groups = data.draw(layers(integer=integer))
    codes = q.codes[: 2 * groups, :2]
    q = quantized(codes, q.levels[: 2 * groups] if q.levels.ndim == 2 else q.levels)
    if len(codes) % groups:
        groups = 1
    options = {"subtract": subtract, "extraction": extraction, "groups": groups}
    found = saturate(q, **options, rounds=1, time_limit=1, node_limit=100)
    for program in (found.program, found.from_unique, found.from_pair):
        program.validate()
        assert program.method == "saturate"
    x = np.random.default_rng(0).integers(-128, 256, (found.program.inputs, 3)) / 256
    np.testing.assert_allclose(found.program(x), dense(q, groups, x), rtol=1e-12, atol=1e-12)
    assert found.program.op.size == min(found.from_unique.op.size, found.from_pair.op.size)
    assert found.from_pair.op.size <= found.pair.op.size


def test_published_rules_share_a_sum():
    # One output at a time: x0 + x1 + x2 and x1 + x2 + x3 take four additions, by association and sharing three.
    q = quantized([[1, 1, 1, 0], [0, 1, 1, 1]], [0, 1])
    assert factor(q, "unique").adds == 4
    found = saturate(q, subtract=False)
    assert found.from_unique.adds == 3
    assert found.rounds[0].optimal


def test_published_rules_factor_out():
    # 3 (x0 + x1) + x2 + x3 and x2 + x3 - 3 (x0 + x1): by hand from 3 x0 + 3 x1 + ..., products are of sums already.
    q = quantized([[2, 2, 1, 1], [2, 2, 1, 1]], [0, 1, 3])
    found = saturate(q, subtract=False)
    assert (found.from_unique.adds, found.from_unique.multiplies) == (3, 1)


def test_subtraction_pays():
    # x0 - x1 is an output, and part of the two others.
    q = quantized([[2, 0, 2, 1], [0, 2, 1, 2], [2, 0, 1, 1]], [-1, 0, 1])
    with_it, without = (saturate(q, subtract=subtract, rounds=3, time_limit=20) for subtract in (True, False))
    assert with_it.from_unique.op.size == 3
    assert without.from_unique.op.size > 4


def test_saturation_goes_beyond_pair():
    q = random_quantized((16, 16), [-1, 0, 1], seed=2)
    found = saturate(q, rounds=1, time_limit=600, node_limit=100)
    found.program.validate()
    assert found.program.adds < found.pair.adds == factor(q).adds
    assert found.stopped == "rounds"
    assert 0 < found.nodes
    assert "from_unique=" in repr(found)


@pytest.mark.slow
def test_random_ternary_matrices():
    adders = []
    for seed in range(100):
        found = saturate(random_quantized((16, 16), [-1, 0, 1], seed), rounds=2, time_limit=60, node_limit=500)
        found.program.validate()
        adders.append(found.program.adds)
    assert np.mean(adders) <= 83


def test_factor_takes_options():
    q = random_quantized((4, 6), [-1, 0, 1], seed=0)
    rounds = []
    program = factor(q, "saturate", extraction="greedy", rounds=2, progress=rounds.append)
    program.validate()
    assert program.method == "saturate"
    assert {entry.start for entry in rounds} == {"unique", "pair"}
    assert all(entry.nodes > 0 and entry.classes > 0 for entry in rounds)


@pytest.mark.parametrize("extraction", ["ilp", "greedy"])
def test_time_limit_is_said(extraction):
    q = random_quantized((24, 24), [-1, 0, 1], seed=0)
    with pytest.warns(RuntimeWarning, match=r"saturate: the time limit of 0\.01 s is reached; the program of \d+ op"):
        found = saturate(q, extraction=extraction, time_limit=0.01)
    found.program.validate()
    assert found.stopped == "time limit"
    assert found.program.op.size <= factor(q).op.size


@pytest.mark.parametrize("extraction", ["ilp", "greedy"])
@pytest.mark.filterwarnings("ignore:saturate:RuntimeWarning")
def test_time_limit_is_kept(extraction):
    q = random_quantized((48, 48), [-1, 0, 1], seed=0)
    start = time.process_time()
    found = saturate(q, extraction=extraction, time_limit=1)
    assert time.process_time() - start < 5
    assert found.stopped == "time limit"


def test_node_limit():
    q = random_quantized((10, 10), [-1, 0, 1], seed=0)
    small, large = (saturate(q, extraction="greedy", node_limit=limit) for limit in (150, 1500))
    assert small.nodes < large.nodes
    assert large.nodes <= 1500


def test_bad_input():
    q = random_quantized((4, 4), [-1, 0, 1], seed=0)
    with pytest.raises(ValueError, match="q: expected at most 4096 weights to saturate, got 4160; take 'pair'"):
        saturate(random_quantized((65, 64), [-1, 0, 1], seed=0))
    with pytest.raises(ValueError, match="extraction: expected 'ilp' or 'greedy', got 'magic'"):
        saturate(q, extraction="magic")
    for name in ("rounds", "time_limit", "node_limit"):
        with pytest.raises(ValueError, match=f"{name}: expected a positive number, got 0"):
            saturate(q, **{name: 0})
    with pytest.raises(TypeError, match="q: expected a QuantizedTensor, got ndarray"):
        saturate(np.ones((4, 4)))
    with pytest.raises(ValueError, match="groups: expected a divisor of 4 outputs, got 3"):
        saturate(q, groups=3)


@pytest.mark.parametrize("package", ["egglog", "highspy"])
def test_missing_package(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r'needs .*: pip install "pycodesign\[saturate\]"'):
        saturate(random_quantized((4, 4), [-1, 0, 1], seed=0))


def enumerate_choices(graph):
    """The fewest nodes that compute all outputs, by trying every choice."""
    classes = list(graph.members)
    least = len(graph.nodes) + 1
    for choice in itertools.product(*graph.members.values()):
        try:
            order, cycle = order_nodes(graph, dict(zip(classes, choice, strict=True)))
        except KeyError:
            continue
        if not cycle:
            least = min(least, len(order))
    return least


def draw_graph(seed):
    """A small e-graph with circles in which every class can be computed."""
    rng = np.random.default_rng(seed)
    inputs, classes = 3, 8
    nodes = []
    for output in range(inputs, classes):
        nodes.append(Node(ADD, *sorted(rng.integers(0, output, 2).tolist()), output))
        for _ in range(2):
            nodes.append(Node(int(rng.integers(2)), *rng.integers(0, classes, 2).tolist(), output))
    return Graph(list(dict.fromkeys(nodes)), dict(zip(range(3), range(3), strict=True)), {0: 7, 1: 6, 2: 5})


@pytest.mark.parametrize("seed", range(20))
def test_extraction_finds_the_fewest(seed):
    graph = draw_graph(seed)
    first = [members[0] for members in graph.members.values()]
    chosen, optimal = extract_optimally(graph, first, seconds=600)
    assert optimal
    assert len(chosen) == enumerate_choices(graph)
    greedy = extract_greedily(graph, first, math.inf)
    assert len(chosen) <= len(greedy) <= 2 * len(chosen)
    for choice in (chosen, greedy):
        known = set(graph.inputs)
        for index in choice:
            assert graph.nodes[index].operands <= known
            known.add(graph.nodes[index].output)
        assert set(graph.outputs.values()) <= known


def test_extraction_sees_sharing_and_circles():
    # Class 4 takes two nodes by class 3, or one once class 2 is there. Classes 2 and 6 define each other.
    nodes = [
        Node(ADD, 0, 1, 2),
        Node(SUBTRACT, 6, 0, 2),
        Node(ADD, 0, 2, 6),
        Node(MULTIPLY, 0, 0, 3),
        Node(ADD, 1, 3, 4),
        Node(ADD, 1, 2, 4),
        Node(ADD, 1, 6, 5),
    ]
    graph = Graph(nodes, {0: 0, 1: 1}, {0: 4, 1: 5})
    first = [0, 2, 3, 4, 6]
    for chosen in (extract_greedily(graph, first, math.inf), extract_optimally(graph, first, 600)[0]):
        assert sorted(chosen) == [0, 2, 5, 6]
    assert order_nodes(graph, {2: 1, 6: 2, 5: 6, 4: 5})[1]


def test_docstring_example():
    (found,) = doctest.DocTestFinder(recurse=False).find(saturate, "example", module=False, globs={})
    assert doctest.DocTestRunner().run(found).failed == 0
