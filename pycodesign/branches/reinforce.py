"""Placements by reinforcement learning, as published: to compare with."""

from __future__ import annotations

import math

try:
    import torch
except ImportError as error:
    raise ImportError("method='reinforce' needs torch: `pip install 'pycodesign[torch]'`") from error

from torch import Tensor, nn

from pycodesign.branches.simulate import Problem, simulate
from pycodesign.branches.timed import hold_torch_threads

__all__ = ["place_by_policy"]


class _Policy(nn.Module):
    """Devices of bodies, one after another: an LSTM that reads all bodies, one that says where each goes."""

    def __init__(self, features: int, devices: int, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.LSTM(features, width, bidirectional=True)
        self.decoder = nn.LSTMCell(2 * width + devices + 1, width)
        self.output = nn.Linear(width, devices)
        self.devices = devices

    def forward(self, bodies: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """Return devices (samples, bodies), and their log probabilities (samples,)."""
        encoded, _ = self.encoder(bodies)
        previous = bodies.new_zeros(samples, self.devices + 1)
        previous[:, -1] = 1
        state, total, chosen = None, bodies.new_zeros(samples), []
        for row in encoded:
            state = self.decoder(torch.cat([row.expand(samples, -1), previous], 1), state)
            distribution = torch.distributions.Categorical(logits=self.output(state[0]))
            devices = distribution.sample()
            total = total + distribution.log_prob(devices)
            previous = nn.functional.one_hot(devices, self.devices + 1).float()
            chosen.append(devices)
        return torch.stack(chosen, 1), total


def place_by_policy(
    problem: Problem, *, updates: int = 60, samples: int = 16, rate: float = 1e-2, seed: int = 0
) -> list[list[int]]:
    """Train a policy by REINFORCE on the simulator's latency, and return the fastest placement that it tried.

    The reward is the negative square root of the latency, relative to the sequential one, less a running mean.

    Parameters
    ----------
    problem : Problem
    updates, samples : int
        Steps of the policy, and placements in each.
    rate : float
        Of Adam.
    seed : int

    Returns
    -------
    list of list of int
        Bodies of each device, in the order of the graph.

    References
    ----------
    Mirhoseini et al., Device Placement Optimization with Reinforcement Learning (ICML 2017); the third phase of
    ColocNAS (Fu et al., IEEE Micro 2020) does so for branches.
    """
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller's modes are
        return _place(problem, updates, samples, rate, seed)


def _place(problem: Problem, updates: int, samples: int, rate: float, seed: int) -> list[list[int]]:
    n, devices = len(problem.names), problem.devices
    scale = sum(min(row) for row in problem.costs) or 1.0
    adjacency = torch.zeros(n, n, dtype=torch.float32)
    for body, row in enumerate(problem.before):
        for other, delay in row:
            adjacency[body, other] = 1 + delay / scale
    costs = torch.tensor(problem.costs, dtype=torch.float32) / scale
    bodies = torch.cat([costs, adjacency, adjacency.T, torch.eye(n, dtype=torch.float32)], 1)
    best: tuple[float, list[list[int]]] = (math.inf, [])
    known: dict[tuple[int, ...], float] = {}
    with torch.random.fork_rng(devices=[]), hold_torch_threads(1):  # for tensors of this size
        torch.manual_seed(seed)
        policy = _Policy(bodies.shape[1], devices).float()
        optimizer = torch.optim.Adam(policy.parameters(), rate)
        baseline = None
        for _ in range(updates):
            chosen, log_probability = policy(bodies, samples)
            rewards = []
            for row in chosen.tolist():
                teams = [[body for body in range(n) if row[body] == device] for device in range(devices)]
                key = tuple(row)
                if key not in known:
                    known[key] = simulate(problem, teams)
                rewards.append(-math.sqrt(known[key] / scale))
                best = min(best, (known[key], teams))
            reward = torch.tensor(rewards, dtype=torch.float32)
            baseline = reward.mean() if baseline is None else 0.9 * baseline + 0.1 * reward.mean()
            loss = -((reward - baseline) * log_probability).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return best[1]
