"""Growth of optimizer states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from pycodesign.growth.plan import Plan
from pycodesign.growth.rules import POWERS, Rule, scale_settings

__all__ = ["OptimizerGrowth"]

IMPLEMENTATION = ("foreach", "fused", "capturable")


class OptimizerGrowth:
    """Checked when made, then written.

    Parameters
    ----------
    plan : Plan
    olds, news : mapping from str to Tensor
        Parameters of the two models.
    optimizer, target_optimizer : Adam, AdamW or SGD
        Theirs.
    """

    def __init__(
        self,
        plan: Plan,
        olds: Mapping[str, Tensor],
        news: Mapping[str, Tensor],
        optimizer: Optimizer,
        target_optimizer: Optimizer,
    ) -> None:
        self.plan, self.olds, self.news = plan, olds, news
        self.old = _unwrap("optimizer", optimizer)
        self.new = _unwrap("target_optimizer", target_optimizer)
        if type(self.old) is not type(self.new):
            kinds = type(self.old).__name__, type(self.new).__name__
            raise TypeError(f"target_optimizer: expected {kinds[0]} as the source's, got {kinds[1]}")
        self.old_groups = _find_groups("optimizer", self.old, olds)
        self.new_groups = _find_groups("target_optimizer", self.new, news)
        if plan.mode == "exact" and any("initial_lr" in group for group in self.new.param_groups):
            text = "'break_symmetry' with a schedule of learning rates, which knows the old groups"
            raise ValueError(f"mode: expected {text}, got 'exact'")
        self.rules = {rule.name: rule for rule in plan}
        if plan.mode == "exact":
            for name, rule in self.rules.items():
                if rule.source in self.old_groups and name not in self.new_groups:
                    text = f"{name}, as the source's has {rule.source}"
                    raise ValueError(f"target_optimizer: expected {text}, got it without")
        for name in self.new_groups:
            if self.rules[name].source not in self.old_groups:
                source = self.rules[name].source
                raise ValueError(f"optimizer: expected the source's {source}, from which {name} grows, got none")
            for key, state in self._state(name).items():
                if isinstance(state, Tensor) and key != "step" and key not in POWERS:
                    raise ValueError(f"optimizer: expected states {', '.join(POWERS)}, got {key}")
                if isinstance(state, Tensor) and key != "step" and state.shape != self.rules[name].old_shape:
                    shapes = self.rules[name].old_shape, tuple(state.shape)
                    raise ValueError(f"optimizer: expected {key} of {name} of shape {shapes[0]}, got {shapes[1]}")

    def _state(self, name: str) -> Mapping[str, Any]:
        """Return the source's state, and what the target's settings need beside it."""
        state: dict[str, Any] = dict(self.old.state.get(self.olds[self.rules[name].source], {}))
        settings = self.new.param_groups[self.new_groups[name]]
        if settings.get("amsgrad") and self.plan.mode != "exact" and "exp_avg_sq" in state:
            state.setdefault("max_exp_avg_sq", state["exp_avg_sq"])  # the largest so far, as far as is known
        return state

    @torch.no_grad()
    def write(self) -> None:
        for name in self.new_groups:
            new = self.news[name]
            self.new.state[new] = {
                key: self._grow(key, value, self.rules[name], new) for key, value in self._state(name).items()
            }
        if self.plan.mode == "exact":
            self._write_groups()

    def _grow(self, key: str, value: Any, rule: Rule, new: Tensor) -> Any:
        if key in POWERS and value is not None:
            return rule.apply_state(value.detach().cpu(), POWERS[key]).to(new.device, new.dtype)
        if not isinstance(value, Tensor):
            return value
        group = self.new.param_groups[self.new_groups[rule.name]]
        on_device = group.get("capturable") or group.get("fused")
        return value.detach().clone().to(new.device if on_device else "cpu")

    def _write_groups(self) -> None:
        """Give the parameters of the target the source's settings, scaled; one group for each way to scale."""
        groups: dict[tuple[int, float, float], dict[str, Any]] = {}
        for name, number in self.new_groups.items():
            rule = self.rules[name]
            assert rule.scale is not None and rule.gradient is not None  # the plan's mode is "exact"
            old = self.old_groups[rule.source]
            key = (old, rule.scale, rule.gradient)
            if key not in groups:
                settings = {k: v for k, v in self.old.param_groups[old].items() if k != "params"}
                settings |= {k: v for k, v in self.new.param_groups[number].items() if k in IMPLEMENTATION}
                kind = type(self.new).__name__
                groups[key] = {"params": [], **scale_settings(kind, settings, rule.scale, rule.gradient)}
                if "param_names" in settings:
                    groups[key]["param_names"] = []
            groups[key]["params"].append(self.news[name])
            if "param_names" in groups[key]:
                groups[key]["param_names"].append(name)
        empty = [{**group, "params": []} for group in self.old.param_groups if not group["params"]]
        self.new.param_groups[:] = [*groups.values(), *empty]


def _unwrap(name: str, optimizer: Any) -> Optimizer:
    """Take an optimizer out of Accelerate's wrapper, and refuse those whose states are not known."""
    inner = optimizer
    while not isinstance(inner, (Adam, SGD)) and isinstance(getattr(inner, "optimizer", None), Optimizer):
        inner = inner.optimizer
    if type(inner) not in (Adam, AdamW, SGD):
        raise TypeError(f"{name}: expected torch.optim.Adam, AdamW or SGD, got {type(inner).__name__}")
    known: Optimizer = inner
    return known


def _find_groups(name: str, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of the group of each parameter, by name."""
    numbers = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    groups = {key: numbers[id(tensor)] for key, tensor in tensors.items() if id(tensor) in numbers}
    if len({id(tensors[key]) for key in groups}) < len(numbers):
        raise ValueError(f"{name}: expected parameters of the model alone, got others")
    return groups
