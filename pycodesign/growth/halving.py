"""Search for a larger shape: candidates grown from a trained model are judged after few steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import Progress
from torch import nn
from torch.optim import AdamW, Optimizer

from pycodesign.growth.modules import grow
from pycodesign.growth.schedule import copy_optimizer
from pycodesign.growth.spec import Spec

__all__ = ["Search", "compare_proxies", "search"]

Build: TypeAlias = Callable[[], nn.Module]
Train: TypeAlias = Callable[[nn.Module, Optimizer, int, int], Any]
Score: TypeAlias = Callable[[nn.Module], float]


@dataclass
class Search:
    """What `search` found.

    Attributes
    ----------
    best : str
        Name of the winner.
    model : torch.nn.Module
        It, as far as it was trained.
    optimizer : torch.optim.Optimizer
        Its optimizer.
    rungs : list of (int, dict)
        Training steps done, and the score of each candidate that was still in the race.
    """

    best: str
    model: nn.Module
    optimizer: Optimizer
    rungs: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{steps} steps: " + ", ".join(f"{name} {score:.4g}" for name, score in _sort_scores(scores))
            for steps, scores in self.rungs
        ]
        return "\n".join([*lines, f"best: {self.best}"])


@dataclass
class _Candidate:
    model: nn.Module
    optimizer: Optimizer


def search(
    source: nn.Module,
    candidates: Mapping[str, Build],
    train: Train,
    score: Score,
    *,
    steps: int,
    rungs: int | None = None,
    keep: float = 0.5,
    optimizer: Optimizer | None = None,
    build_optimizer: Callable[[Any], Optimizer] = AdamW,
    spec: Spec | str = "auto",
    seed: int = 0,
) -> Search:
    """Find the best of larger shapes by successive halving.

    Every candidate starts as the trained source, grown, with its optimizer's states; all train a little, the worse ones
    are dropped, the others train twice as long, and so on.

    Parameters
    ----------
    source : torch.nn.Module
        A small model that is trained.
    candidates : mapping from str to callable
        Functions that build larger models.
    train : callable
        ``train(model, optimizer, first, last)`` runs the training steps from `first` to `last`.
    score : callable
        ``score(model)``, higher is better.
    steps : int
        Training steps of each candidate in the first rung; each further rung has as many as all before it.
    rungs : int, optional
        How many; by default until one candidate is left.
    keep : float
        Share of the candidates that stay after a rung, in (0, 1); at least one is dropped.
    optimizer : Adam, AdamW or SGD, optional
        Of the source; its states are grown.
    build_optimizer : callable
        Builds an optimizer of parameters where `optimizer` is None.
    spec, seed
        As `grow` takes them.

    Returns
    -------
    Search

    Raises
    ------
    ValueError
        If a candidate cannot be grown from the source (none is trained then), or an argument is out of range.

    References
    ----------
    Successive halving: Jamieson and Talwalkar, AISTATS 2016. Growth as the proxy: TripLe, ICCV 2023.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from pycodesign import growth
    >>> x = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    >>> def build(width):
    ...     return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
    >>> def loss(model):
    ...     return (model(x) - x.prod(1, keepdim=True)).square().mean()
    >>> def train(model, optimizer, first, last):
    ...     for _ in range(first, last):
    ...         optimizer.zero_grad()
    ...         loss(model).backward()
    ...         optimizer.step()
    >>> found = growth.search(
    ...     build(4), {str(w): lambda w=w: build(w) for w in (5, 6, 8)}, train, lambda m: -loss(m).item(), steps=10
    ... )
    >>> [(steps, len(scores)) for steps, scores in found.rungs]
    [(10, 3), (20, 2)]
    """
    _check_candidates(candidates)
    if not candidates:
        raise ValueError("candidates: expected one or more, got none")
    for name, number in (("steps", steps), ("rungs", 1 if rungs is None else rungs)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}: expected an integer of 1 or more, got {number!r}")
    if not 0 < keep < 1:
        raise ValueError(f"keep: expected a share between 0 and 1, got {keep}")
    if rungs is None:
        rungs = len(candidates)  # at most: each drops one or more
    racing = {
        name: _grow_candidate(source, build(), optimizer, build_optimizer, spec, seed)
        for name, build in candidates.items()
    }
    found: list[tuple[int, dict[str, float]]] = []
    done = 0
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for rung in range(rungs):
            last = steps * 2**rung
            scores = {}
            for name, candidate in progress.track(racing.items(), description=f"{last} steps"):
                train(candidate.model, candidate.optimizer, done, last)
                scores[name] = score(candidate.model)
            found.append((last, scores))
            done = last
            ranked = [name for name, _ in _sort_scores(scores)]
            racing = {
                name: racing[name] for name in ranked[: max(1, min(math.ceil(len(ranked) * keep), len(ranked) - 1))]
            }
            if len(racing) == 1:
                break
    best = ranked[0]
    return Search(best, racing[best].model, racing[best].optimizer, found)


def _check_candidates(candidates: Mapping[str, Build]) -> None:
    if not isinstance(candidates, Mapping):
        raise TypeError(f"candidates: expected a mapping of names to functions, got {type(candidates).__name__}")
    for name, build in candidates.items():
        if not callable(build):
            raise TypeError(f"candidates: expected a function that builds {name!r}, got {type(build).__name__}")


def _sort_scores(scores: Mapping[str, float]) -> list[tuple[str, float]]:
    """Sort from the best to the worst."""
    return sorted(scores.items(), key=lambda item: _rank(item[1]), reverse=True)


def _rank(score: float) -> float:
    """A training that diverged is the worst."""
    return -math.inf if math.isnan(score) else score


def _grow_candidate(
    source: nn.Module,
    target: nn.Module,
    optimizer: Optimizer | None,
    build_optimizer: Callable[[Any], Optimizer],
    spec: Spec | str,
    seed: int,
) -> _Candidate:
    new = _build_optimizer(source, target, optimizer, build_optimizer, spec)
    states: dict[str, Any] = {} if optimizer is None else {"optimizer": optimizer, "target_optimizer": new}
    grow(source, target, spec=spec, seed=seed, **states)
    return _Candidate(target, new)


def _build_optimizer(
    source: nn.Module,
    target: nn.Module,
    optimizer: Optimizer | None,
    build_optimizer: Callable[[Any], Optimizer],
    spec: Spec | str,
) -> Optimizer:
    """Build one without states, with the settings of the source's where there is one."""
    if optimizer is None:
        return build_optimizer(target.parameters())
    return copy_optimizer(source, target, optimizer, spec)


def compare_proxies(
    source: nn.Module,
    candidates: Mapping[str, Build],
    train: Train,
    score: Score,
    *,
    steps: Sequence[int],
    final_steps: int,
    final_score: Score | None = None,
    optimizer: Optimizer | None = None,
    build_optimizer: Callable[[Any], Optimizer] = AdamW,
    spec: Spec | str = "auto",
    seed: int = 0,
) -> dict[str, dict[Any, float]]:
    """Compare how well few steps rank candidates, grown or from scratch.

    The truth is the final score after training from scratch to the end.

    Parameters
    ----------
    source, candidates, train, score, optimizer, build_optimizer, spec, seed
        As `search` takes them; functions in `candidates` initialize the weights.
    steps : sequence of int
        Training steps after which to rank, ascending.
    final_steps : int
        Training steps of the truth.
    final_score : callable, optional
        Scores it; by default `score`.

    Returns
    -------
    dict
        ``"grown"`` and ``"scratch"``: for each number of steps Kendall's tau of the scores and the truth, from -1 to 1;
        and ``"final"``, the truth by candidate.

    Raises
    ------
    ValueError
        If there are fewer than two candidates, or `steps` do not rise to `final_steps`; nothing is trained then.
    ImportError
        Without scipy.
    """
    _check_candidates(candidates)
    if len(candidates) < 2:
        raise ValueError(f"candidates: expected two or more, got {len(candidates)}")
    marks = [0, *steps]
    if len(marks) == 1 or any(b <= a for a, b in itertools.pairwise(marks)) or final_steps < marks[-1]:
        raise ValueError(f"steps: expected ascending ones from 1 to final_steps, {final_steps}, got {list(steps)}")
    try:
        from scipy.stats import kendalltau
    except ImportError as error:
        raise ImportError("growth.compare_proxies needs scipy: `pip install scipy`") from error

    def run(candidate: _Candidate) -> list[float]:
        scores = []
        for first, last in zip([0, *steps], steps, strict=False):
            train(candidate.model, candidate.optimizer, first, last)
            scores.append(score(candidate.model))
        return scores

    scores: dict[str, list[list[float]]] = {"grown": [], "scratch": []}
    final = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for name, build in progress.track(candidates.items(), description="candidates"):
            scores["grown"].append(run(_grow_candidate(source, build(), optimizer, build_optimizer, spec, seed)))
            model = build()
            candidate = _Candidate(model, _build_optimizer(source, model, optimizer, build_optimizer, spec))
            scores["scratch"].append(run(candidate))
            train(model, candidate.optimizer, steps[-1], final_steps)
            final[name] = (final_score or score)(model)
    taus = {
        proxy: {
            mark: float(kendalltau([*map(_rank, column)], [*map(_rank, final.values())]).statistic)
            for mark, column in zip(steps, columns, strict=True)
        }
        for proxy, columns in ((proxy, zip(*rows, strict=True)) for proxy, rows in scores.items())
    }
    return {**taus, "final": final}
