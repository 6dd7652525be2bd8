"""Growth during training, step by step."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from pycodesign.growth.modules import Report, grow, list_tensors, pair_modules, plan_modules, unwrap, write_eps
from pycodesign.growth.plan import Plan, check_options
from pycodesign.growth.spec import Spec

__all__ = ["Schedule", "copy_optimizer"]

Build: TypeAlias = Callable[[], nn.Module]

CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func", "grad_checkpointing")  # of a module
KEPT = ("forward", "_original_forward")  # attributes by which Accelerate wraps a model


class Schedule:
    """When a model grows, and into what.

    Part of the growth may come before training, at step 0, the rest during it: new parameters then copy warmed-up
    weights and states. Each step of growth keeps the function.

    Parameters
    ----------
    stages : sequence of (int, callable)
        Training steps, ascending, and functions that build the model to train from then on; its weights do not matter.
    spec, mode, seed, noise
        As `grow` takes them; `seed` rises by one with each stage.

    Attributes
    ----------
    stage : int
        How many stages were reached.
    report : Report or None
        Of the last growth.

    References
    ----------
    TripLe (ICCV 2023).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from pycodesign import growth
    >>> build = lambda width: nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))
    >>> schedule = growth.Schedule([(0, lambda: build(24)), (20, lambda: build(32))])
    >>> model = build(16)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> for step in range(30):
    ...     model, optimizer = schedule.grow(step, model, optimizer)
    ...     model(torch.randn(5, 8)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> model[0].out_features
    32

    A checkpoint holds the stage, too; training resumes at any step:

    >>> checkpoint = schedule.save(30, model, optimizer)
    >>> model, optimizer, step = schedule.load(checkpoint, lambda: build(16), torch.optim.AdamW)
    >>> step, model[0].out_features
    (30, 32)

    With Hugging Face's Trainer, ``callbacks=[schedule.callback()]``; to resume, the model to begin with is
    ``schedule.build(steps, build_first)``, `steps` being the checkpoint's, and the rest is as ever:
    ``trainer.train(resume_from_checkpoint=...)``. The best model of a training in which it grows cannot be loaded at
    the end (``load_best_model_at_end``), as it may be a smaller one. That is for one process; where several train, by
    DistributedDataParallel, end a Trainer at each growth and begin another, or grow in a loop of your own:
    ``inner, optimizer = schedule.grow(step, model.module, optimizer)``, and where `inner` is another module than
    before, ``model = DistributedDataParallel(inner)``.
    """

    def __init__(
        self,
        stages: Sequence[tuple[int, Build]],
        *,
        spec: Spec | str = "auto",
        mode: str = "break_symmetry",
        seed: int = 0,
        noise: float = 0.1,
    ) -> None:
        for stage in stages:
            if not isinstance(stage, Sequence) or len(stage) != 2:
                raise TypeError(f"stages: expected pairs of a step and a function, got {stage!r}")
        self.steps = [step for step, _ in stages]
        self.builds = [build for _, build in stages]
        ascending = all(isinstance(step, Integral) for step in self.steps) and self.steps == sorted({*self.steps})
        if not stages or not ascending or self.steps[0] < 0:
            raise ValueError(f"stages: expected ascending steps from 0, got {self.steps}")
        if not all(callable(build) for build in self.builds):
            raise TypeError(f"stages: expected functions that build models, got {self.builds}")
        check_options(mode, noise, seed)
        self._options: dict[str, Any] = {"spec": spec, "mode": mode, "noise": noise}
        self._seed = seed
        self.stage = 0
        self.report: Report | None = None

    def grow(
        self, step: int, model: nn.Module, optimizer: Optimizer | None = None, ema: nn.Module | None = None
    ) -> tuple[nn.Module, Optimizer | None]:
        """Grow what is due before a training step.

        Parameters
        ----------
        step : int
            The number of training steps done.
        model : torch.nn.Module
            Not in DistributedDataParallel: its hooks would stay with the small model. Grow ``model.module``, and wrap
            what comes back anew.
        optimizer : Adam, AdamW or SGD, optional
        ema : torch.nn.Module, optional
            Average of the model, as `torch.optim.swa_utils.AveragedModel`; it grows in place.

        Returns
        -------
        tuple of torch.nn.Module and Optimizer
            The model is the same or a larger one, without its wrapper, with the dtypes, the modes (train, eval), the
            frozen parameters and the gradient checkpointing of what it continues; the optimizer is always the same
            object, then of the larger model's parameters, so that a schedule of its learning rates goes on.

        Raises
        ------
        ValueError
            As `growth.grow`; or if the model is in DistributedDataParallel, or in mode ``"exact"``, which makes more
            groups, the optimizer has a schedule of learning rates.
        """
        if isinstance(model, DistributedDataParallel):
            text = "one that is not wrapped; grow its .module, and wrap what comes back anew"
            raise ValueError(f"model: expected {text}, got DistributedDataParallel")
        stage, larger, average = self.stage, optimizer, None if ema is None else unwrap(ema)
        while stage < len(self.steps) and self.steps[stage] <= step:
            model, larger, average = self._grow(stage, model, larger, average)
            stage += 1
        if ema is not None and average is not None and average is not unwrap(ema):
            unwrap(ema).__dict__ = average.__dict__
        self.stage = stage
        if optimizer is not None and larger is not None and larger is not optimizer:
            inner = getattr(optimizer, "optimizer", optimizer)
            inner.param_groups[:] = larger.param_groups
            inner.state = larger.state
        return model, optimizer

    def _grow(
        self, stage: int, model: nn.Module, optimizer: Optimizer | None, ema: nn.Module | None
    ) -> tuple[nn.Module, Optimizer | None, nn.Module | None]:
        source, target = unwrap(model), self._build_stage(stage)
        like = next(source.parameters())
        target.to(like.device, like.dtype).train(source.training)
        plan = plan_modules(source, target, spec=self._options["spec"])
        average = None if ema is None else copy.deepcopy(target).to(next(ema.parameters())).train(ema.training)
        for old, new in ((source, target), (ema, average)):
            if old is not None and new is not None:
                _match_state(plan, old, new)
        options = {**self._options, "seed": self._seed + stage}
        larger = None if optimizer is None else copy_optimizer(source, target, optimizer, self._options["spec"])
        options |= {"ema": ema, "target_ema": average}
        self.report = grow(source, target, optimizer=optimizer, target_optimizer=larger, **options)
        return target, larger, average

    def _build_stage(self, stage: int) -> nn.Module:
        model = self.builds[stage]()
        if not isinstance(model, nn.Module):
            text = f"a function that builds a torch.nn.Module for step {self.steps[stage]}"
            raise TypeError(f"stages: expected {text}, got one that returns {type(model).__name__}")
        return model

    def build(self, steps: int, first: Build) -> nn.Module:
        """Build the model that a checkpoint made after so many training steps holds, and go to its stage.

        Parameters
        ----------
        steps : int
            Training steps done.
        first : callable
            Builds the model before the first growth.
        """
        stage = sum(step < steps for step in self.steps)
        model = self._build(stage, first)
        self.stage = stage
        return model

    def _build(self, stage: int, first: Build) -> nn.Module:
        model = first()
        for number in range(stage):
            larger = self._build_stage(number)
            plan = plan_modules(model, larger, spec=self._options["spec"])
            _match_state(plan, model, larger)
            write_eps(plan, model, larger)
            model = larger
        return model

    def save(self, steps: int, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Return a checkpoint, to be written with `torch.save`, after so many training steps.

        Raises
        ------
        ValueError
            If the optimizer has other parameters than the model's.
        """
        model = unwrap(model)
        names = {id(tensor): name for name, tensor in list_tensors(model).items()}
        if not all(id(p) in names for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("optimizer: expected parameters of the model alone, got others")
        return {
            "steps": steps,
            "stage": self.stage,
            "model": model.state_dict(),
            "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
            "class": type(getattr(optimizer, "optimizer", optimizer)).__name__,
            "optimizer": optimizer.state_dict(),
            "groups": [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups],
        }

    def load(
        self, checkpoint: Mapping[str, Any], first: Build, build_optimizer: Callable[[Any], Optimizer]
    ) -> tuple[nn.Module, Optimizer, int]:
        """Build what was saved.

        Parameters
        ----------
        checkpoint : mapping
            What `save` returned.
        first : callable
            Builds the model before the first growth.
        build_optimizer : callable
            Builds the optimizer of an iterable of parameters; the checkpoint has its settings and groups.

        Returns
        -------
        tuple of torch.nn.Module, Optimizer and int
            The model has the dtypes and the frozen parameters of the one that was saved; the int is the number of
            training steps done.

        Raises
        ------
        ValueError
            If the optimizer is of another class than the one that was saved, or the checkpoint of a stage that the
            schedule does not have. The schedule stays at its stage then.
        """
        stage = checkpoint["stage"]
        if stage > len(self.builds):
            raise ValueError(f"checkpoint: expected a stage of at most {len(self.builds)}, got {stage}")
        model = self._build(stage, first)
        for name, tensor in list_tensors(model).items():
            if name in checkpoint["model"]:
                tensor.data = tensor.data.to(checkpoint["model"][name].dtype)
        model.load_state_dict(checkpoint["model"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in checkpoint["frozen"])
        optimizer = build_optimizer(model.parameters())
        if type(optimizer).__name__ != checkpoint["class"]:
            kinds = checkpoint["class"], type(optimizer).__name__
            raise ValueError(f"build_optimizer: expected {kinds[0]} as was saved, got {kinds[1]}")
        tensors = list_tensors(model)
        settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        optimizer.param_groups[:] = [{**settings, "params": [tensors[n] for n in g]} for g in checkpoint["groups"]]
        optimizer.load_state_dict(checkpoint["optimizer"])
        self.stage = stage
        return model, optimizer, checkpoint["steps"]

    def callback(self) -> Any:
        """Return a callback for Hugging Face's Trainer; the model and the optimizer grow in place.

        Raises
        ------
        ValueError
            In mode ``"exact"``, which makes more groups of parameters than the learning rates' schedule knows.
        """
        try:
            from transformers import TrainerCallback
        except ImportError as error:
            raise ImportError("Schedule.callback needs transformers: `pip install 'pycodesign[hf]'`") from error

        if self._options["mode"] == "exact":
            raise ValueError("mode: expected 'break_symmetry' with a Trainer, got 'exact'")
        schedule = self

        class Grow(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                check_alone()
                if args.load_best_model_at_end and schedule.steps[-1] > 0:
                    text = "False where the model grows during training, as the best may be a smaller one"
                    raise ValueError(f"load_best_model_at_end: expected {text}, got True")

            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                schedule.grow_in_place(state.global_step, kwargs["model"], kwargs["optimizer"])

        return Grow()

    def grow_in_place(self, step: int, model: nn.Module, optimizer: Any) -> None:
        """Grow what is due, as `grow`, but make the larger one of the same object.

        Raises
        ------
        ValueError
            As `grow`; or if several processes train the model: DistributedDataParallel would not see the new one.
        """
        check_alone()
        model = unwrap(model)
        larger, _ = self.grow(step, model, optimizer)
        if larger is not model:
            kept = {name: model.__dict__[name] for name in KEPT if name in model.__dict__}
            model.__dict__ = {**larger.__dict__, **kept}


def check_alone() -> None:
    """Refuse growth in place where several processes train."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        text = "one process, for growth in place; where several train, Schedule.grow the module, and wrap it anew"
        raise ValueError(f"model: expected {text}, got {distributed.get_world_size()}")


def _match_state(plan: Plan, source: nn.Module, target: nn.Module) -> None:
    """Give a larger model the dtypes, the modes, the frozen parameters and the checkpointing of what it continues."""
    for _, old, new in pair_modules(plan, source, target):
        new.training = old.training
        for name in CHECKPOINTING:
            if name in vars(old):
                setattr(new, name, getattr(old, name))
        olds, news = ({**module._parameters, **module._buffers} for module in (old, new))
        for key, tensor in news.items():
            like = olds.get(key)
            if isinstance(tensor, Tensor) and isinstance(like, Tensor) and tensor.is_floating_point():
                tensor.data = tensor.data.to(like.dtype)
                if isinstance(tensor, nn.Parameter):
                    tensor.requires_grad_(like.requires_grad)


def copy_optimizer(source: nn.Module, target: nn.Module, optimizer: Any, spec: Spec | str = "auto") -> Optimizer:
    """Build an optimizer for the target with the source's settings and groups, without states."""
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
    tensors = source.state_dict(keep_vars=True)
    numbers = {id(p): number for number, group in enumerate(inner.param_groups) for p in group["params"]}
    lists = ("params", "param_names")
    groups = [{**group, **{key: [] for key in lists if key in group}} for group in inner.param_groups]
    sources = {rule.name: rule.source for rule in plan_modules(source, target, spec=spec)}
    for name, parameter in target.named_parameters():
        number = numbers.get(id(tensors[sources[name]]))
        if number is not None:
            groups[number]["params"].append(parameter)
            if "param_names" in groups[number]:
                groups[number]["param_names"].append(name)
    known = inspect.signature(type(inner)).parameters
    return type(inner)(groups, **{key: value for key, value in inner.defaults.items() if key in known})
