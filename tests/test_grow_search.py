"""`search` halves its candidates, and `compare_proxies` says how well growth ranks them."""

import pytest
import torch
from growing import build_mlp, build_small
from growing import fixed_seed as fixed_seed

from pycodesign import growth


def make_task():
    x = torch.randn(256, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = (x[:, :1] * x[:, 1:2]).tanh()

    def loss(model):
        return (model(x)[:, :1] - y).square().mean()

    def train(model, optimizer, first, last):
        for _ in range(first, last):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

    return train, lambda model: -loss(model).item()


def test_search_halves_its_candidates():
    train, score = make_task()
    source = build_small(8)
    adam = torch.optim.AdamW(source.parameters(), lr=1e-2)
    train(source, adam, 0, 20)
    trained = []

    def count(model, optimizer, first, last):
        trained.append((model[0].out_features, first, last))
        assert first or optimizer.state  # grown with the model
        train(model, optimizer, first, last)

    candidates = {f"{w}": lambda w=w: build_small(w) for w in (8, 10, 16, 24)}
    found = growth.search(source, candidates, count, score, steps=5, optimizer=adam)
    assert [(steps, len(scores)) for steps, scores in found.rungs] == [(5, 4), (10, 2)]
    assert found.best == max(found.rungs[-1][1], key=found.rungs[-1][1].get)
    assert found.model[0].out_features == int(found.best)
    assert [(first, last) for _, first, last in trained] == [(0, 5)] * 4 + [(5, 10)] * 2
    assert f"best: {found.best}" in str(found)
    assert score(found.model) == found.rungs[-1][1][found.best]


def test_search_checks_before_it_trains():
    train, score = make_task()
    source = build_small(8)
    candidates = {"wide": lambda: build_small(16), "narrow": lambda: build_small(4)}
    with pytest.raises(ValueError, match="expected at least 8"):
        growth.search(source, candidates, None, score, steps=5)
    del candidates["narrow"]
    bad = {"steps": (0, 1.5), "keep": (0, 1), "rungs": (0, -1, 1.5)}
    for options, text in (({"steps": 1, name: value}, name) for name, values in bad.items() for value in values):
        with pytest.raises(ValueError, match=text):
            growth.search(source, candidates, train, score, **options)
    with pytest.raises(ValueError, match="candidates"):
        growth.search(source, {}, train, score, steps=1)


def test_each_rung_drops_a_candidate():
    train, score = make_task()
    candidates = {f"{w}": lambda w=w: build_small(w) for w in (8, 10, 16, 24)}
    found = growth.search(build_small(8), candidates, train, score, steps=1, keep=0.999)
    assert [(steps, len(scores)) for steps, scores in found.rungs] == [(1, 4), (2, 3), (4, 2)]


def test_a_diverged_candidate_loses():
    train, _ = make_task()
    scores = {8: float("nan"), 10: 0.5}
    candidates = {f"{w}": lambda w=w: build_small(w) for w in scores}
    found = growth.search(build_small(8), candidates, train, lambda model: scores[model[0].out_features], steps=1)
    assert found.best == "10"


@pytest.mark.parametrize("candidates", [[build_mlp], {"wide": 5}])
def test_candidates_are_functions_by_name(candidates):
    for run in (
        lambda: growth.search(build_mlp(8), candidates, None, None, steps=1),
        lambda: growth.compare_proxies(build_mlp(8), candidates, None, None, steps=[1], final_steps=1),
    ):
        with pytest.raises(TypeError, match="candidates: expected a"):
            run()


# Proxies


def test_proxies_are_compared():
    train, score = make_task()
    candidates = {f"{w}": lambda w=w: build_small(w) for w in (8, 12, 16)}
    result = growth.compare_proxies(build_small(8), candidates, train, score, steps=[2, 30], final_steps=30)
    assert result["scratch"][30] == 1
    assert all(-1 <= tau <= 1 for tau in result["grown"].values())
    assert list(result["final"]) == ["8", "12", "16"]


@pytest.mark.parametrize(
    ("count", "steps", "final", "text"),
    [
        (1, [2], 4, "candidates: expected two or more, got 1"),
        (2, [], 4, r"steps: expected ascending ones from 1 to final_steps, 4, got \[\]"),
        (2, [4, 2], 8, "steps: expected ascending"),
        (2, [0], 8, "steps: expected ascending"),
        (2, [2, 10], 8, "steps: expected ascending"),
    ],
)
def test_proxies_are_checked_before_they_are_trained(count, steps, final, text):
    candidates = {f"{w}": lambda w=w: build_small(w) for w in range(16, 16 + count)}
    with pytest.raises(ValueError, match=text):
        growth.compare_proxies(build_small(8), candidates, None, None, steps=steps, final_steps=final)


def test_proxies_from_scratch_train_as_the_source_does():
    pytest.importorskip("scipy")
    source, seen = build_mlp(8), []
    sgd = torch.optim.SGD(source.parameters(), lr=0.25)

    def train(model, optimizer, first, last):
        seen.append((type(optimizer), optimizer.param_groups[0]["lr"]))

    candidates = {str(width): lambda width=width: build_mlp(width) for width in (12, 16)}

    def score(model):
        return float(model[0].out_features)

    growth.compare_proxies(source, candidates, train, score, steps=[1], final_steps=2, optimizer=sgd)
    assert set(seen) == {(torch.optim.SGD, 0.25)}
