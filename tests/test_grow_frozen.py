"""What a `Schedule` keeps of a model, in a Trainer, too: what is frozen, dtypes, modes, gradient checkpointing."""

import pytest
import torch
import transformers
from growing import TOKENS, WIDER, X, build_gpt2, build_mlp
from growing import fixed_seed as fixed_seed

from pycodesign import growth


def freeze(model):
    model.transformer.wpe.weight.requires_grad_(False)
    return model


def make_stages():
    return growth.Schedule([(0, lambda: build_gpt2(**WIDER)), (3, lambda: build_gpt2(**WIDER, L=3))])


def build_first():
    torch.manual_seed(3)
    return build_gpt2()


def test_a_schedule_keeps_what_is_frozen_and_modes_and_dtypes():
    model = build_mlp(8, torch.float32)
    model[0].weight.requires_grad_(False)
    model[1].eval()
    model[3].to(torch.float64)
    larger, _ = growth.Schedule([(0, lambda: build_mlp(16))]).grow(0, model)
    assert [p.requires_grad for p in larger.parameters()] == [False, True, True, True]
    assert [p.dtype for p in larger.parameters()] == [torch.float32] * 2 + [torch.float64] * 2
    assert larger.training and not larger[1].training and larger[2].training


def test_a_schedule_resumes_with_what_is_frozen_and_dtypes():
    schedule = make_stages()
    model = freeze(build_first())
    model.transformer.ln_f.to(torch.float32)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model, optimizer = schedule.grow(3, model, optimizer)
    checkpoint = schedule.save(4, model, optimizer)
    for first in (build_first, lambda: freeze(build_first())):
        resumed, _, _ = make_stages().load(checkpoint, first, torch.optim.AdamW)
        for expected, got in zip(model.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(expected, got)
            assert (expected.dtype, expected.requires_grad) == (got.dtype, got.requires_grad)
    built = make_stages().build(4, lambda: freeze(build_first()))
    assert [p.requires_grad for p in built.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradient_checkpointing_goes_on():
    model = build_gpt2()
    model.gradient_checkpointing_enable()
    model, _ = make_stages().grow(3, model)
    assert [block.gradient_checkpointing for block in model.transformer.h] == [True] * 3
    model.train()(**X, labels=X["input_ids"]).loss.backward()


# Trainer


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, row):
        tokens = torch.randint(TOKENS, (6,), generator=torch.Generator().manual_seed(row))
        return {"input_ids": tokens, "labels": tokens}


def make_trainer(model, schedule, folder, **options):
    plain = {"lr_scheduler_type": "constant", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    arguments = transformers.TrainingArguments(
        folder, max_steps=5, save_steps=1, per_device_train_batch_size=4, **plain, **options
    )
    data = {"train_dataset": Texts(), "eval_dataset": Texts()}
    return transformers.Trainer(model, arguments, callbacks=[schedule.callback()], **data)


@pytest.mark.filterwarnings("ignore")  # Trainer's own
def test_a_trainer_resumes_with_what_is_frozen(tmp_path):
    trainer = make_trainer(freeze(build_first()), make_stages(), tmp_path)
    trainer.train()
    schedule = make_stages()
    resumed = make_trainer(schedule.build(4, lambda: freeze(build_first())), schedule, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert not resumed.model.transformer.wpe.weight.requires_grad
    for expected, got in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore")
def test_the_best_model_may_be_a_smaller_one(tmp_path):
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    text = "load_best_model_at_end: expected False where the model grows during training"
    with pytest.raises(ValueError, match=text):
        make_trainer(build_first(), make_stages(), tmp_path, **options).train()
