"""Optimizers and averages grow with their model: training goes on as before, with its groups and states."""

import copy

import pytest
import torch
from growing import CHANGES, build, build_mlp, check_refused, make_inputs, train_steps
from growing import fixed_seed as fixed_seed
from growing import precise_llama as precise_llama
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pycodesign import growth
from pycodesign.growth import schedule as schedule  # loads growth.schedule
from pycodesign.growth.modules import list_tensors

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1, foreach=True),
    "Adam with decay": lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=0.01, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.01, nesterov=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.01, fused=True),
    "SGD without momentum": lambda p: torch.optim.SGD(p, lr=1e-3),
}
MULTIPLE = {"D": 48, "H": 12, "F": 120}  # the MLP by 3


def continue_both(name, build_optimizer, sizes, average=False):
    """Train, grow, train both; return the models, and their averages."""
    source, target = build(name), build(name, **sizes)
    optimizers = build_optimizer(source.parameters()), build_optimizer(target.parameters())
    averages = [torch.optim.swa_utils.AveragedModel(m) for m in (source, target)] if average else [None, None]
    train_steps(source, optimizers[0], name, 30, averages[0])
    growth.grow(
        source,
        target,
        mode="exact",
        optimizer=optimizers[0],
        target_optimizer=optimizers[1],
        ema=averages[0],
        target_ema=averages[1],
    )
    for model, optimizer, each in zip((source, target), optimizers, averages, strict=True):
        train_steps(model, optimizer, name, 30, each)
    return (source, target), averages


def measure_difference(models, name):
    return growth.modules.compare_outputs(*models, make_inputs(name))


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "llama tied", "vit", "timm vit", "timm resnet", "sequential", "bert"]
)
def test_training_continues_on_the_trajectory(name, precise_llama):
    models, _ = continue_both(name, OPTIMIZERS["AdamW"], MULTIPLE)
    assert measure_difference(models, name) <= 1e-12


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_continues_on_the_trajectory(optimizer):
    name = "gpt2"
    models, averages = continue_both(name, OPTIMIZERS[optimizer], MULTIPLE, average=True)
    assert measure_difference(models, name) <= 1e-12
    assert measure_difference([average.module for average in averages], name) <= 1e-12
    assert int(averages[1].n_averaged) == 60


def test_wider_heads_continue_on_the_trajectory():
    models, _ = continue_both("vit", OPTIMIZERS["AdamW"], {"D": 48})
    assert measure_difference(models, "vit") <= 1e-12


@pytest.mark.parametrize("change", ["2x", "1.33x and deeper"])
def test_states_where_symmetry_breaks(change):
    source, target = build("gpt2"), build("gpt2", **CHANGES[change])
    adam, larger = (torch.optim.AdamW(m.parameters(), lr=lr) for m, lr in ((source, 1e-3), (target, 5e-4)))
    train_steps(source, adam, "gpt2", 3)
    report = growth.grow(source, target, optimizer=adam, target_optimizer=larger)
    assert [group["lr"] for group in larger.param_groups] == [5e-4]
    olds, news = list_tensors(source), list_tensors(target)
    for rule in report.plan:
        if isinstance(news[rule.name], nn.Parameter):
            old, new = adam.state[olds[rule.source]], larger.state[news[rule.name]]
            assert new["step"] == 3
            torch.testing.assert_close(new["exp_avg"], rule.apply_state(old["exp_avg"]))
            torch.testing.assert_close(new["exp_avg_sq"], rule.apply_state(old["exp_avg_sq"], 2))
            assert (new["exp_avg_sq"] > 0).all() or not (old["exp_avg_sq"] > 0).all()
    copies = 2 if change == "2x" else 1
    moments = (
        larger.state[target.transformer.wpe.weight]["exp_avg"],
        adam.state[source.transformer.wpe.weight]["exp_avg"],
    )
    torch.testing.assert_close(moments[0][:, :24], moments[1] / copies)
    train_steps(target, larger, "gpt2", 2)


def test_kept_states_disturb_less_than_dropped_ones():
    """The first step after growth is the one that the small model would have taken, or nearly so."""
    source = build("vit")
    adam = OPTIMIZERS["AdamW"](source.parameters())
    train_steps(source, adam, "vit", 30)
    changes = []
    for keep in (True, False):
        target = build("vit", **CHANGES["2x"])
        larger = OPTIMIZERS["AdamW"](target.parameters())
        states = {"optimizer": adam, "target_optimizer": larger} if keep else {}
        growth.grow(source, target, **states)
        small = copy.deepcopy(source)
        smaller = OPTIMIZERS["AdamW"](small.parameters())
        smaller.load_state_dict(adam.state_dict())
        train_steps(small, smaller, "vit", 1)
        train_steps(target, larger, "vit", 1)
        changes.append(measure_difference((small, target), "vit"))
    assert changes[0] < changes[1] / 2


def test_amsgrad_begins_at_the_growth():
    source, target = build("sequential"), build("sequential", **CHANGES["2x"])
    adam, larger = torch.optim.AdamW(source.parameters()), torch.optim.AdamW(target.parameters(), amsgrad=True)
    train_steps(source, adam, "sequential", 2)
    growth.grow(source, target, optimizer=adam, target_optimizer=larger)
    state = larger.state[target[5].weight]
    assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])
    train_steps(target, larger, "sequential", 1)
    adam.state[source[5].weight]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"optimizer: expected exp_avg of 5.weight of shape \(40, 216\), got \(3,\)"):
        growth.grow(source, target, optimizer=adam, target_optimizer=larger)


# Groups


def test_groups_are_kept_and_scaled():
    def build_optimizer(parameters):
        parameters = list(parameters)
        groups = [{"params": parameters[:4], "lr": 0.1}, {"params": parameters[4:], "weight_decay": 0.5}]
        return torch.optim.AdamW(groups, lr=0.2, weight_decay=0.3)

    source, target = build("gpt2"), build("gpt2", **MULTIPLE)
    optimizers = build_optimizer(source.parameters()), build_optimizer(target.parameters())
    torch.optim.lr_scheduler.StepLR(optimizers[0], 1)
    growth.grow(source, target, mode="exact", optimizer=optimizers[0], target_optimizer=optimizers[1])
    settings = {id(p): group for group in optimizers[1].param_groups for p in group["params"]}
    fc = settings[id(target.transformer.h[1].mlp.c_proj.weight)]
    assert (fc["lr"], fc["weight_decay"], fc["eps"]) == pytest.approx((0.2 / 3, 0.5 * 3, 0.5e-8))
    assert fc["initial_lr"] == fc["lr"]
    wte = settings[id(target.transformer.wte.weight)]
    assert (wte["lr"], wte["weight_decay"], wte["eps"]) == (0.1, 0.3, 0.5e-8)


@pytest.mark.parametrize("mode", ["exact", "break_symmetry"])
def test_names_in_groups_are_the_targets(mode):
    source, target = build_mlp(8), build_mlp(16)
    named = [*source.named_parameters()]
    adam = torch.optim.AdamW([{"params": named[:1]}, {"params": named[1:]}])
    adam.param_groups[0]["param_names"] = ["another"]
    larger = growth.schedule.copy_optimizer(source, target, adam)
    growth.grow(source, target, optimizer=adam, target_optimizer=larger, mode=mode)
    names = {id(tensor): name for name, tensor in list_tensors(target).items()}
    assert all(group["param_names"] == [names[id(p)] for p in group["params"]] for group in larger.param_groups)
    assert sum(len(group["params"]) for group in larger.param_groups) == 4


def test_empty_groups_stay():
    source, target = build_mlp(8), build_mlp(16)
    adam = torch.optim.AdamW([{"params": source.parameters()}, {"params": [], "lr": 0.5}])
    larger = torch.optim.AdamW(target.parameters())
    growth.grow(source, target, optimizer=adam, target_optimizer=larger, mode="exact")
    assert larger.param_groups[-1]["lr"] == 0.5 and larger.param_groups[-1]["params"] == []


def test_exact_growth_under_a_schedule_of_learning_rates():
    source, target = build_mlp(8), build_mlp(16)
    adams = [torch.optim.AdamW(model.parameters()) for model in (source, target)]
    torch.optim.lr_scheduler.StepLR(adams[1], 1)
    text = "mode: expected 'break_symmetry' with a schedule of learning rates"
    check_refused(source, target, text, optimizer=adams[0], target_optimizer=adams[1], mode="exact")


def test_exact_growth_of_some_parameters():
    source, target = build_mlp(8), build_mlp(16)
    adam, larger = torch.optim.AdamW(source.parameters()), torch.optim.AdamW(target[0].parameters())
    text = "target_optimizer: expected 3.weight, as the source's has 3.weight, got it without"
    check_refused(source, target, text, optimizer=adam, target_optimizer=larger, mode="exact")


# Averages


def test_averages_of_two_kinds():
    source, target = build_mlp(8), build_mlp(16)
    average, plain = AveragedModel(source), copy.deepcopy(target)
    growth.grow(source, target, ema=average, target_ema=plain)
    counting = AveragedModel(target)
    text = "target_ema: expected a Sequential as ema, which counts no updates, got AveragedModel"
    check_refused(source, target, text, ema=copy.deepcopy(source), target_ema=counting)
