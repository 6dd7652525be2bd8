"""`search`: a network of a space that is accurate under a target latency."""

from __future__ import annotations

import math
import numbers
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress

from pycodesign._arguments import to_integer, to_number
from pycodesign.branches.network import Network
from pycodesign.branches.space import Architecture, Space
from pycodesign.branches.supernet import Choices, LatencyModel, Supernet
from pycodesign.branches.table import LatencyTable
from pycodesign.branches.training import Data, fit, measure_accuracy, split_data, to_data

__all__ = ["Found", "search"]

METHODS = ("differentiable", "random", "optuna")
LATENCIES = ("max_plus", "sum")
WARM_UP = 0.25  # share of the supernet's steps in which its weights alone learn
SMOOTHNESS = 0.1  # of the maximum at the beginning, in targets; 0 at the end
COOLED = 0.3  # temperature of the Gumbel-softmax at the end; 3 at the beginning
DRAWN = 400  # samples of the final distribution among which the network is chosen
COMPARED = 32  # likeliest of them under the target, compared by the supernet's own loss
CHANGED = 150  # networks that differ from one of the best of these in a choice or two, compared with them
PARENTS = 8


@dataclass
class Found:
    """What a search found, and what it took: `Network.found` of its result.

    Attributes
    ----------
    architecture : Architecture
    latency : float
        Seconds, by the table.
    accuracy : float
        On the fifth of the data that no weight of the network was trained with.
    seconds : float
        Of processor time for everything.
    candidates : list of (Architecture, float, float)
        All that were trained, with latency and accuracy.
    history : list of dict
        Of the differentiable search: step, loss, latency of the sample.
    """

    architecture: Architecture
    latency: float
    accuracy: float
    seconds: float
    candidates: list[tuple[Architecture, float, float]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)


@torch.inference_mode(False)  # whatever the caller's modes are
@torch.enable_grad()
def search(
    space: Space,
    table: LatencyTable,
    data: Any,
    *,
    target_ms: float,
    workers: int = 2,
    method: str = "differentiable",
    latency: str = "max_plus",
    steps: int = 600,
    train_steps: int = 400,
    finalists: int = 4,
    candidates: int | None = None,
    budget: float | None = None,
    batch: int = 64,
    strength: float = 1.0,
    warm_start: Callable[[Network], object] | None = None,
    seed: int = 0,
) -> Network:
    """Find an accurate network whose predicted latency is under a target.

    Parameters
    ----------
    space : Space
    table : LatencyTable
        Of this machine, as `profile` measures it.
    data : (Tensor (n, C, H, W), Tensor (n,))
        float32 images and int64 labels. Four fifths train weights, one fifth the choices, and compares networks.
    target_ms : float
        Milliseconds.
    workers : int
        Teams that branches will run on.
    method : {"differentiable", "random", "optuna"}
        ``"differentiable"`` trains all networks at once (a `Supernet`), one sample a step; weights and choices take
        turns; of likely networks and their neighbors those with the smallest loss go on from the shared weights, fewer
        and fewer of them.
        ``"random"`` and ``"optuna"`` (the extra `nas`) train one network after another.
    latency : {"max_plus", "sum"}
        Ready times of branches and a smooth maximum where they meet; or, to compare, the sum of all layers.
    steps : int
        Of the supernet.
    train_steps : int
        Of each network that is trained.
    finalists : int
        Networks that the differentiable search begins to train at the end, by successive halving: they share
        `train_steps`, then the more accurate half of them does, until the last one has had as many for itself.
    candidates : int, optional
        Networks that the other two methods train; by default as many as the supernet's steps pay for.
    budget : float, optional
        Seconds of processor time instead, after which they begin no further network.
    batch : int
    strength : float
        Of the latency in the loss: ``cross entropy + strength * relu(log(latency / target))``.
    warm_start : callable, optional
        ``warm_start(net)`` fills a network before it is trained, by `grow_network` from a narrower one, for example.
    seed : int

    Returns
    -------
    Network
        Trained, in evaluation mode; its attribute `found` is a `Found`.

    Raises
    ------
    TypeError, ValueError
        For arguments out of range, a table that lacks a layer, and a target that no sample of the space reaches.
    ImportError
        For ``"optuna"`` without it.

    References
    ----------
    Fu et al., ColocNAS (IEEE Micro 2020): the three phases. Jang et al. (ICLR 2017): Gumbel-softmax. Dong and Yang,
    GDAS (CVPR 2019): only what was sampled is computed. Jamieson and Talwalkar (AISTATS 2016): successive halving.
    Akiba et al., Optuna (KDD 2019).
    """
    check_search(space, table, method, latency)
    target = to_number("target_ms", target_ms) / 1e3
    if not 0 < target < math.inf:
        raise ValueError(f"target_ms: expected a positive number, got {target_ms}")
    for name, value in (("workers", workers), ("steps", steps), ("train_steps", train_steps)):
        to_integer(name, value, 1)
    to_integer("batch", batch, 2)
    to_integer("finalists", finalists, 1)
    if candidates is not None:
        to_integer("candidates", candidates, 1)
    for name, number in (("budget", 0.0 if budget is None else budget), ("strength", strength)):
        if not 0 <= to_number(name, number) < math.inf:
            raise ValueError(f"{name}: expected a finite number, 0 or more, got {number}")
    if not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed: expected an integer, got {type(seed).__name__}")
    model = LatencyModel(space, table, workers)
    data = to_data(data, space.input_shape()[1:], space.classes)
    begin = time.process_time()
    weights_data, choices_data = split_data(data, 0.8, seed)
    trainer = _Trainer(space, model, weights_data, choices_data, train_steps, batch, warm_start, seed)
    history: list[dict[str, float]] = []
    if method == "differentiable":
        guide = model if latency == "max_plus" else LatencyModel(space, table, workers, summed=True)
        supernet, architectures, history = _search_choices(
            space, model, guide, weights_data, choices_data, target, steps, batch, strength, seed
        )
        trainer.halve(architectures[:finalists], supernet)
    else:
        count = candidates or max(1, round(steps / train_steps) + 1)
        limit = math.inf if budget is None else budget
        propose = _propose_randomly if method == "random" else _propose_by_optuna
        for architecture, tell in propose(space, model, target, seed):
            tell(trainer.train(architecture))
            if len(trainer.trained) >= count if budget is None else time.process_time() - begin >= limit:
                break
    net = trainer.best
    assert net is not None and net.found is not None
    net.found.seconds = time.process_time() - begin
    net.found.history = history
    net.found.candidates = trainer.trained
    return net


def check_search(space: Space, table: LatencyTable, method: str, latency: str) -> None:
    """Check what can be said about a search before it starts."""
    if not isinstance(space, Space):
        raise TypeError(f"space: expected a Space, got {type(space).__name__}")
    if not isinstance(table, LatencyTable):
        raise TypeError(f"table: expected a LatencyTable, got {type(table).__name__}")
    table.check_machine()
    if method not in METHODS:
        raise ValueError(f"method: expected {', '.join(map(repr, METHODS))}, got {method!r}")
    if latency not in LATENCIES:
        raise ValueError(f"latency: expected {', '.join(map(repr, LATENCIES))}, got {latency!r}")


@dataclass
class _Trainer:
    """Trains candidates and keeps the most accurate one."""

    space: Space
    model: LatencyModel
    weights_data: Data
    choices_data: Data
    steps: int
    batch: int
    warm_start: Callable[[Network], object] | None
    seed: int
    trained: list[tuple[Architecture, float, float]] = field(default_factory=list)
    best: Network | None = None

    def train(self, architecture: Architecture) -> float:
        """Train a network from its beginning; return its accuracy."""
        net = self._build(architecture)
        accuracy = self._train(net, self.steps, self.seed)
        self._keep(net, architecture, accuracy)
        return accuracy

    def halve(self, architectures: list[Architecture], supernet: Supernet) -> None:
        """Train networks from the shared weights, in each round the better half of those before."""
        left, seed = [(self._build(architecture, supernet), architecture) for architecture in architectures], self.seed
        while left:
            steps = math.ceil(self.steps / len(left))
            trained = [(self._train(net, steps, seed), net, architecture) for net, architecture in left]
            trained.sort(key=lambda item: -item[0])
            better = len(left) // 2
            for accuracy, net, architecture in trained[better:]:
                self._keep(net, architecture, accuracy)
            left, seed = [(net, architecture) for _, net, architecture in trained[:better]], seed + 1

    def _build(self, architecture: Architecture, supernet: Supernet | None = None) -> Network:
        net: Network = self.space.build(architecture, self.seed)
        if supernet is not None:
            supernet.hand_on(net, architecture)
        if self.warm_start is not None:
            self.warm_start(net)
        return net

    def _train(self, net: Network, steps: int, seed: int) -> float:
        fit(net, self.weights_data, steps, batch=self.batch, seed=seed)
        return measure_accuracy(net, self.choices_data)

    def _keep(self, net: Network, architecture: Architecture, accuracy: float) -> None:
        seconds = self.model.seconds(architecture)
        self.trained.append((architecture, seconds, accuracy))
        if self.best is None or self.best.found is None or accuracy > self.best.found.accuracy:
            self.best = net
            net.found = Found(architecture, seconds, accuracy, 0.0)


def _search_choices(
    space: Space,
    model: LatencyModel,
    guide: LatencyModel,
    weights_data: Data,
    choices_data: Data,
    target: float,
    steps: int,
    batch: int,
    strength: float,
    seed: int,
) -> tuple[Supernet, list[Architecture], list[dict[str, float]]]:
    """Train weights and choices in turns, and return the best of the likely networks under the target first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Supernet(space)
    generator = torch.Generator().manual_seed(seed)
    logits = [net.operator_logits, net.gate_logits]
    weights_optimizer = torch.optim.AdamW(net.weights(), 3e-3, weight_decay=1e-2)
    choices_optimizer = torch.optim.Adam(logits, 0.05, betas=(0.5, 0.999))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(weights_optimizer, steps, 1e-4)
    batches = weights_data.batches(min(batch, len(weights_data)), seed)
    others = choices_data.batches(min(batch, len(choices_data)), seed + 1)
    history = []
    net.train()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for step in progress.track(range(steps), description="supernet"):
            done = step / steps
            temperature = 3 * (COOLED / 3) ** done
            images, labels = next(batches)
            choices = net.sample(temperature, generator)
            fixed = Choices(choices.operators.detach(), choices.gates.detach())
            loss = F.cross_entropy(net(images, fixed), labels)
            weights_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            weights_optimizer.step()
            schedule.step()
            if done < WARM_UP:
                continue
            images, labels = next(others)
            choices = net.sample(temperature, generator)
            seconds = guide(net.expected(), target * SMOOTHNESS * (1 - done))
            loss = F.cross_entropy(net(images, choices), labels) + strength * (seconds / target).log().relu()
            gradients = torch.autograd.grad(loss, logits, allow_unused=True)
            for parameter, gradient in zip(logits, gradients, strict=True):
                parameter.grad = gradient
            choices_optimizer.step()
            history.append({"step": step, "loss": float(loss.detach()), "ms": 1e3 * float(seconds.detach())})
    return net, _choose(net, model, guide, choices_data, target, generator), history


def _choose(
    net: Supernet,
    model: LatencyModel,
    guide: LatencyModel,
    data: Data,
    target: float,
    generator: torch.Generator,
) -> list[Architecture]:
    """Return likely networks under the target, and neighbors of the best; those of the smallest loss first."""
    drawn: dict[Architecture, Choices] = {}
    with torch.no_grad():
        best = net.best()
        drawn[net.architecture(best)] = best
        for _ in range(DRAWN):
            choices = net.sample(1.0, generator)
            drawn.setdefault(net.architecture(choices), choices)
        ranked = sorted(drawn.items(), key=lambda item: -net.log_probability(item[1]))
        fitting = [item for item in ranked if float(guide(item[1])) <= target]
        if not fitting:
            rng = random.Random(0)
            seconds, architecture = min((model.seconds(a), i, a) for i, a in enumerate(drawn))[::2]
            if seconds <= target:
                return [architecture]
            return [_sample_under(net.space, model, target, rng)]
        rng, losses = random.Random(0), dict[Architecture, float]()

        def compare(choices: Choices) -> None:
            outputs = net(data.images[:400], choices)
            losses[net.architecture(choices)] = float(F.cross_entropy(outputs, data.labels[:400]))

        for _, choices in fitting[:COMPARED]:
            compare(choices)
        for _ in range(CHANGED):
            parent = rng.choice(sorted(losses, key=losses.__getitem__)[:PARENTS])
            choices = model.architecture_choices(net.space.change(parent, rng))
            if net.architecture(choices) not in losses and float(guide(choices)) <= target:
                compare(choices)
    return sorted(losses, key=losses.__getitem__)


def _sample_under(
    space: Space, model: LatencyModel, target: float, rng: random.Random, tries: int = 2000
) -> Architecture:
    """Draw architectures until one is under the target.

    Raises
    ------
    ValueError
        With the fastest that was drawn.
    """
    fastest = math.inf
    for _ in range(tries):
        architecture = space.sample(rng)
        seconds = model.seconds(architecture)
        if seconds <= target:
            return architecture
        fastest = min(fastest, seconds)
    raise ValueError(
        f"target_ms: expected one that networks of the space reach, got {1e3 * target:.3g}; "
        f"the fastest of {tries} takes {1e3 * fastest:.3g}"
    )


def _propose_randomly(
    space: Space, model: LatencyModel, target: float, seed: int
) -> Iterator[tuple[Architecture, Callable[[float], object]]]:
    rng = random.Random(seed)
    while True:
        yield _sample_under(space, model, target, rng), lambda accuracy: None


def _propose_by_optuna(
    space: Space, model: LatencyModel, target: float, seed: int
) -> Iterator[tuple[Architecture, Callable[[float], object]]]:
    """Ask Optuna's TPE; what is over the target is told to be so, and not trained."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError("method='optuna' needs optuna: `pip install 'pycodesign[nas]'`") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    proposed = 0
    while True:
        trial = study.ask()
        operators = tuple(
            tuple(
                tuple(trial.suggest_categorical(f"{s}.{b}.{n}", space.operators) for n in range(space.layers))
                for b in range(space.branches)
            )
            for s in range(space.segments)
        )
        gates = tuple(
            tuple(trial.suggest_categorical(f"gate.{s}.{p}", space.gates) for p in range(len(space.pairs)))
            for s in range(space.segments - 1)
        )
        architecture = Architecture(operators, gates, space.stem)
        over = math.log(model.seconds(architecture) / target)
        if over > 0:
            proposed += 1
            if proposed > 2000:
                raise ValueError(f"target_ms: expected one that networks of the space reach, got {1e3 * target:.3g}")
            study.tell(trial, -over)
            continue
        yield architecture, lambda accuracy, trial=trial: study.tell(trial, accuracy)  # type: ignore[misc]
