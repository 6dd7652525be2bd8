"""`Schedule`, in a plain loop, in a Trainer and from its checkpoints, and what it refuses."""

import copy

import numpy as np
import pytest
import torch
import transformers
from growing import CHANGES, CLASSES, TOKENS, build, build_gpt2, build_mlp, build_small, make_inputs, train_steps
from growing import fixed_seed as fixed_seed
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pycodesign import growth


def run_loop(schedule, model, optimizer, first, last, save_at=()):
    saved = {}
    for step in range(first, last):
        model, optimizer = schedule.grow(step, model, optimizer)
        x = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x).square().mean() + model(x).mean()).backward()
        optimizer.step()
        if step + 1 in save_at:
            saved[step + 1] = copy.deepcopy(schedule.save(step + 1, model, optimizer))
    return model, optimizer, saved


@pytest.mark.parametrize("mode", ["break_symmetry", "exact"])
def test_schedule_resumes_at_any_step(mode):
    def make_schedule():
        return growth.Schedule([(0, lambda: build_small(32)), (6, lambda: build_small(96))], mode=mode)

    def make_optimizer(parameters):
        return torch.optim.AdamW(parameters, lr=1e-2)

    model = build_small()
    small = copy.deepcopy(model)
    model, _, saved = run_loop(make_schedule(), model, make_optimizer(model.parameters()), 0, 12, range(1, 12))
    assert model[0].out_features == 96
    if mode == "exact":
        smaller = run_loop(growth.Schedule([(99, build_small)]), small, make_optimizer(small.parameters()), 0, 12)[0]
        assert growth.modules.compare_outputs(smaller, model, torch.randn(4, 8, dtype=torch.float64)) <= 1e-12
    for steps, checkpoint in saved.items():
        schedule = make_schedule()
        resumed, optimizer, done = schedule.load(checkpoint, build_small, make_optimizer)
        assert (done, resumed[0].out_features) == (steps, 32 if steps <= 6 else 96)
        resumed = run_loop(schedule, resumed, optimizer, done, 12)[0]
        for expected, got in zip(model.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(expected, got)


def test_averages_grow_with_the_model():
    model = build("sequential")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    average = torch.optim.swa_utils.AveragedModel(model)
    train_steps(model, optimizer, "sequential", 5, average)
    old, inputs = copy.deepcopy(average), make_inputs("sequential")
    schedule = growth.Schedule(
        [(0, lambda: build("sequential", **CHANGES["1.33x"])), (1, lambda: build("sequential", **CHANGES["2x"]))]
    )
    for step in range(2):
        model, optimizer = schedule.grow(step, model, optimizer, average)
        assert growth.modules.compare_outputs(old, average, inputs) <= 1e-12
        assert growth.modules.compare_outputs(model, average, inputs) > 1e-6
        assert int(average.n_averaged) == 5
    train_steps(model, optimizer, "sequential", 1, average)
    assert int(average.n_averaged) == 6 and average.module[5].out_features == 80


def test_schedule_keeps_groups():
    model = build_small()
    groups = [
        {"params": [model[0].weight, model[2].weight], "weight_decay": 0.5},
        {"params": [model[0].bias], "lr": 0.1},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.2, momentum=0.9)
    model[2].bias.requires_grad_(False)
    model, optimizer = growth.Schedule([(0, lambda: build_small(24))]).grow(0, model, optimizer)
    assert [[p.shape for p in group["params"]] for group in optimizer.param_groups] == [
        [model[0].weight.shape, model[2].weight.shape],
        [model[0].bias.shape],
    ]
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.2, 0.5), (0.1, 0)]


def test_learning_rates_go_on_through_growth():
    model = build_small()
    first = optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
    schedule = growth.Schedule([(2, lambda: build_small(24)), (4, lambda: build_small(32))])
    for step in range(6):
        model, optimizer = schedule.grow(step, model, optimizer)
        assert optimizer.param_groups[0]["lr"] == rates.get_last_lr()[0] == pytest.approx(1 - 0.09 * step)
        model(torch.ones(2, 8).double()).sum().backward()
        optimizer.step()
        rates.step()
    assert optimizer is first and model[0].out_features == 32
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    schedule = growth.Schedule([(0, lambda: build_small(40)), (1, lambda: build_small(8))])
    with pytest.raises(ValueError, match="expected at least 40 features"):
        schedule.grow(1, model, optimizer)
    assert schedule.stage == 0 and {id(p) for p in model.parameters()} == {
        *map(id, optimizer.param_groups[0]["params"])
    }
    with pytest.raises(ValueError, match="mode: expected 'break_symmetry' with a schedule of learning rates"):
        growth.Schedule([(0, lambda: build_small(64))], mode="exact").grow(0, model, optimizer)


def test_growth_in_place_of_a_wrapped_model():
    model = build_small()
    average = torch.optim.swa_utils.AveragedModel(model)
    schedule = growth.Schedule([(2, lambda: build_small(24))])
    for step in range(4):
        schedule.grow_in_place(step, average, None)
        assert average(torch.ones(2, 8).double()).shape == (2, CLASSES)
        assert average.module[0].out_features == (16 if step < 2 else 24)


def test_growth_in_several_processes(monkeypatch):
    schedule, model = growth.Schedule([(2, lambda: build_small(24))]), build_small()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(ValueError, match=r"model: .* grow its \.module, and wrap .*, got DistributedDataParallel"):
            schedule.grow(0, wrapped)
        assert schedule.grow(2, wrapped.module)[0][0].out_features == 24
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(ValueError, match=r"model: expected one process, for growth in place; .*, got 2"):
            schedule.grow_in_place(0, model, None)
    finally:
        torch.distributed.destroy_process_group()


# Trainer


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, row):
        tokens = torch.randint(TOKENS, (6,), generator=torch.Generator().manual_seed(row))
        return {"input_ids": tokens, "labels": tokens}


def make_trainer(model, schedule, folder, steps):
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=steps,
        save_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=100,
    )
    return transformers.Trainer(model, arguments, train_dataset=Texts(), callbacks=[schedule.callback()])


@pytest.mark.filterwarnings("ignore")  # Trainer's own
def test_trainer_grows_and_resumes(tmp_path):
    def build_first():
        torch.manual_seed(3)
        return build_gpt2()

    def make_schedule():
        return growth.Schedule([(3, lambda: build_gpt2(D=32, H=8)), (6, lambda: build_gpt2(D=32, H=8, L=3))])

    schedule = make_schedule()
    trainer = make_trainer(build_first(), schedule, tmp_path, 10)
    trainer.train()
    assert trainer.model.config.n_embd == 32 and len(trainer.model.transformer.h) == 3
    assert sum(p.numel() for g in trainer.optimizer.param_groups for p in g["params"]) == trainer.model.num_parameters()
    for steps in range(1, 10):
        schedule = make_schedule()
        resumed = make_trainer(schedule.build(steps, build_first), schedule, tmp_path / "resumed", 10)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
        for expected, got in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="mode: expected 'break_symmetry' with a Trainer"):
        growth.Schedule([(0, build_gpt2)], mode="exact").callback()


# What is refused


@pytest.mark.parametrize("steps", [[], [3, 3], [5, 2], [-1], [1.5], ["a", 2]])
def test_refused_schedules(steps):
    with pytest.raises(ValueError, match="stages: expected ascending steps from 0"):
        growth.Schedule([(step, build_small) for step in steps])
    with pytest.raises(TypeError, match="stages: expected functions that build models, got"):
        growth.Schedule([(0, 5)])
    with pytest.raises(ValueError, match="noise: expected"):
        growth.Schedule([(0, build_small)], noise=-1)


def test_stages_are_pairs_of_a_step_and_a_function():
    model, _ = growth.Schedule([(np.int64(0), lambda: build_mlp(16))]).grow(0, build_mlp(8))
    assert model[0].out_features == 16
    with pytest.raises(TypeError, match="stages: expected pairs of a step and a function, got 3"):
        growth.Schedule([3])
    text = "stages: expected a function that builds a torch.nn.Module for step 0, got one that returns NoneType"
    with pytest.raises(TypeError, match=text):
        growth.Schedule([(0, lambda: None)]).grow(0, build_mlp(8))


def test_checkpoints_of_another_optimizer():
    model, other = build_mlp(8), build_mlp(8)
    schedule = growth.Schedule([(0, lambda: build_mlp(16))])
    checkpoint = schedule.save(0, model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="build_optimizer: expected AdamW as was saved, got SGD"):
        schedule.load(checkpoint, lambda: build_mlp(8), torch.optim.SGD)
    with pytest.raises(ValueError, match="optimizer: expected parameters of the model alone, got others"):
        schedule.save(0, model, torch.optim.AdamW(other.parameters()))


def test_a_refused_checkpoint_leaves_the_stage():
    stages = [(0, lambda: build_mlp(16)), (1, lambda: build_mlp(24))]
    model, schedule = build_mlp(8), growth.Schedule(stages)
    model, optimizer = schedule.grow(1, model, torch.optim.AdamW(model.parameters()))
    checkpoint = schedule.save(2, model, optimizer)
    for fresh, kind, text in (
        (growth.Schedule(stages), torch.optim.SGD, "build_optimizer: expected AdamW as was saved, got SGD"),
        (growth.Schedule(stages[:1]), torch.optim.AdamW, "checkpoint: expected a stage of at most 1, got 2"),
    ):
        with pytest.raises(ValueError, match=text):
            fresh.load(checkpoint, lambda: build_mlp(8), kind)
        assert fresh.stage == 0
    fresh = growth.Schedule([(0, lambda: build_mlp(16)), (1, lambda: None)])
    with pytest.raises(TypeError, match="expected a function that builds"):
        fresh.build(2, lambda: build_mlp(8))
    assert fresh.stage == 0


def test_a_refused_stage_leaves_the_average():
    model = build_mlp(8)
    average = AveragedModel(model)
    before = copy.deepcopy(average.state_dict())
    schedule = growth.Schedule([(0, lambda: build_mlp(16)), (1, lambda: build_mlp(12))])
    with pytest.raises(ValueError, match="expected at least 16"):
        schedule.grow(1, model, ema=average)
    assert all(torch.equal(value, before[key]) for key, value in average.state_dict().items())
    assert schedule.stage == 0
