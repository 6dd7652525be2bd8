"""What `grow` refuses because it could not keep the function, and what a `Schedule` keeps."""

import copy

import numpy as np
import pytest
import torch
import transformers
from growing import TOKENS, build_gpt2, randomize
from test_grow_hidden import build_mlp, check_refused
from torch import nn

from pycodesign import growth


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()


X = {"input_ids": torch.arange(12).reshape(2, 6)}


WIDER = {"D": 32, "H": 8}


class Renamed(transformers.GPT2LMHeadModel):
    """Nothing but a name of its own."""


class Doubled(transformers.GPT2LMHeadModel):
    def forward(self, **inputs):
        return 2 * super().forward(**inputs).logits


class Classifier(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.config = transformers.ViTConfig(
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=width // 4,
            intermediate_size=40,
            image_size=16,
            patch_size=8,
        )
        self.vit, self.classifier = transformers.ViTModel(self.config), nn.Linear(width, 3)

    def forward(self, x):
        return self.classifier(self.vit(x).last_hidden_state.square().mean(1))


def build_as(cls, **sizes):
    return cls(build_gpt2(**sizes).config).double()


def replace_norms(model):
    for block in model.transformer.h:
        block.ln_1 = nn.RMSNorm(model.config.n_embd).double()
    return model


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        (lambda: Classifier(24), lambda: Classifier(32), "'vit', or a Spec, got Classifier as the model"),
        (lambda: build_as(Doubled), lambda: build_as(Doubled, **WIDER), "'gpt2', or a Spec, got Doubled as the model"),
        (
            lambda: replace_norms(build_gpt2()),
            lambda: replace_norms(build_gpt2(**WIDER)),
            "'gpt2', or a Spec, got RMSNorm as transformer.h.0.ln_1",
        ),
    ],
)
def test_modules_that_transformers_does_not_make(source, target, text):
    check_refused(source(), target(), f"spec: expected the modules that transformers makes for {text}")


def test_a_class_of_transformers_may_have_another_name():
    before = torch.get_rng_state()
    source, target = randomize(build_as(Renamed)), build_as(Renamed, **WIDER)
    state = torch.get_rng_state()
    assert growth.grow(source, target, inputs=X).difference <= 1e-12
    assert torch.equal(state, torch.get_rng_state()) and not torch.equal(before, state)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_no_part_of_a_known_model(register):
    source = build_mlp(8)
    getattr(source[2], register)(lambda *arguments: arguments[-1])
    text = "source: expected modules without forward hooks, or a Spec that holds with them, got one of 2"
    check_refused(source, build_mlp(16), text)
    check_refused(build_mlp(8), source, "target: expected modules without forward hooks")
    spec = growth.Spec("mlp", {"0": growth.linear(None, "hidden"), "3": growth.linear("hidden", None)})
    growth.grow(source, build_mlp(16), spec=spec)


def test_outputs_of_each_layer_are_not_compared():
    source, target = build_gpt2().double(), build_gpt2(**WIDER, L=3).double()
    inputs = {**X, "output_hidden_states": True}
    check_refused(source, target, "inputs: expected outputs that both models", inputs={**inputs, "return_dict": False})
    assert growth.grow(source, target, inputs=inputs).difference <= 1e-12


def test_heads_that_no_attribute_holds():
    spec = growth.Spec("headed", {"0": growth.linear(None, "q")}, heads="0.num_heads")
    text = "spec: expected heads to name an attribute of Sequential that holds their number, got '0.num_heads'"
    check_refused(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 8)), text, spec=spec)


def test_tensors_that_cannot_be_written():
    with torch.inference_mode():
        target = build_mlp(16)
    text = "target: expected tensors that can be written, got one of inference mode for 0.weight"
    check_refused(build_mlp(8), target, text)
    average = copy.deepcopy(build_mlp(16))
    with torch.inference_mode():
        average[0].weight = nn.Parameter(average[0].weight.clone())
    check_refused(build_mlp(8), build_mlp(16), "target_ema: expected tensors", ema=build_mlp(8), target_ema=average)


def test_lazy_modules():
    source = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 4))
    text = "source: expected initialized parameters, got 0.weight of a lazy module; call it first"
    with pytest.raises(ValueError, match=text):
        growth.grow(source, copy.deepcopy(source))


def test_parametrized_modules_are_named():
    def build(width):
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, width)), nn.Linear(width, 4))

    text = "spec: expected modules without parametrizations, or a Spec, got ParametrizedLinear as 0"
    check_refused(build(8), build(16), text)
    text = "target: expected ReLU as 1, as the source's, got Tanh as 1"
    check_refused(*(nn.Sequential(nn.Linear(8, 8), act()) for act in (nn.ReLU, nn.Tanh)), text)


class Depthwise(nn.Module):
    def __init__(self, width, norm=False):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 1)
        self.mix = nn.BatchNorm2d(width) if norm else nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.norm(self.mix(self.embed(x)).movedim(1, -1)))


@pytest.mark.parametrize("norm", [False, True])
def test_features_that_are_mapped_one_by_one_hold_no_means(norm):
    spec = growth.Spec(
        "mixer",
        {
            "embed": growth.convolution(None, "stream"),
            "mix": growth.batch_norm("stream") if norm else growth.depthwise("stream"),
            "norm": growth.layer_norm("stream"),
            "head": growth.linear("stream", None),
        },
        spaces={"stream": "mean"},
    )
    source = randomize(Depthwise(8, norm).double())
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert growth.grow(source, Depthwise(16, norm).double(), spec=spec, inputs=x).difference <= 1e-12
    with pytest.raises(growth.Inexact, match=r"mix.weight: stream 8 -> 12; exact would be 16"):
        growth.grow(source, Depthwise(12, norm).double(), spec=spec)


NAMES = {
    "embed": growth.linear(None, "stream"),
    "blocks.*.fc": growth.linear("stream", "stream", factor="blocks.*.ls.gamma"),
    "blocks.*.ls": growth.layer_scale("stream"),
    "norm": growth.layer_norm("stream"),
}


@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        ({"blocks.*.fc": growth.linear("stream", "stream", factor="blocks.*.ls.gama")}, {}, "factor: expected a param"),
        (
            {"blocks.*.fc": growth.linear("stream", "stream")},
            {},
            "layers: expected a layer whose factor is that",
        ),
        ({}, {"blocks": {"block.*": 0}}, r"blocks: expected beginnings .* one '\*', .*, got 'block\.\*'"),
        ({}, {"blocks": {"*.*": 0}}, r"blocks: expected beginnings"),
        ({"stages.*.blocks.*.fc": growth.keep()}, {"blocks": {"stages.0.blocks.*": 0}}, "blocks: expected beginnings"),
        ({"stages.*.blocks.*.fc": growth.keep()}, {"blocks": {"stages.*.blocks.*": 0}}, "blocks: expected beginnings"),
        (
            {"a.0.b.*.fc": growth.keep(), "a.*.b.*.fc": growth.keep()},
            {"blocks": {"a.0.b.*": 0}},
            r"layers: expected patterns that begin as those of blocks do, 'a\.0\.b\.\*', got 'a\.\*\.b\.\*\.fc'",
        ),
        ({}, {"spaces": {"stream": "mean", "steam": "zero"}}, "spaces: expected names that layers use, got 'steam'"),
    ],
)
def test_names_in_specs(change, options, text):
    growth.Spec("named", NAMES, spaces={"stream": "mean"}, blocks={"blocks.*": 0})
    with pytest.raises(ValueError, match=text):
        growth.Spec("named", {**NAMES, **change}, **{"spaces": {"stream": "mean"}, **options})


def test_uneven_copies_are_no_fault_of_keys():
    source, target = build_gpt2(), build_gpt2(**WIDER)
    check_refused(source, target, "expected integer multiples of width and heads for 'exact', got", mode="exact")
    plan = {"attn.weight": (3 * 24, 24)}, {"attn.weight": (3 * 32, 24)}
    spec = growth.Spec("fused", {"attn": growth.linear(None, "q+k+v")})
    with pytest.raises(growth.Inexact, match="expected integer multiples of width and heads"):
        growth.make_plan(*plan, spec, heads=(growth.Heads(6, 6), growth.Heads(8, 8)), mode="exact")
    plan = {"attn.weight": (3 * 24, 24)}, {"attn.weight": (3 * 48, 24)}
    with pytest.raises(growth.Inexact, match="expected heads of the same dimensions"):
        growth.make_plan(*plan, spec, heads=(growth.Heads(6, 6), growth.Heads(6, 6)), mode="exact")


def test_exact_growth_of_some_parameters():
    source, target = build_mlp(8), build_mlp(16)
    adam, larger = torch.optim.AdamW(source.parameters()), torch.optim.AdamW(target[0].parameters())
    text = "target_optimizer: expected 3.weight, as the source's has 3.weight, got it without"
    check_refused(source, target, text, optimizer=adam, target_optimizer=larger, mode="exact")


def freeze(model):
    model.transformer.wpe.weight.requires_grad_(False)
    return model


def make_stages():
    return growth.Schedule([(0, lambda: build_gpt2(**WIDER)), (3, lambda: build_gpt2(**WIDER, L=3))])


def build_first():
    torch.manual_seed(3)
    return build_gpt2()


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


def test_checkpoints_of_another_optimizer():
    model, other = build_mlp(8), build_mlp(8)
    schedule = growth.Schedule([(0, lambda: build_mlp(16))])
    checkpoint = schedule.save(0, model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="build_optimizer: expected AdamW as was saved, got SGD"):
        schedule.load(checkpoint, lambda: build_mlp(8), torch.optim.SGD)
    with pytest.raises(ValueError, match="optimizer: expected parameters of the model alone, got others"):
        schedule.save(0, model, torch.optim.AdamW(other.parameters()))


def test_stages_are_pairs_of_a_step_and_a_function():
    model, _ = growth.Schedule([(np.int64(0), lambda: build_mlp(16))]).grow(0, build_mlp(8))
    assert model[0].out_features == 16
    with pytest.raises(TypeError, match="stages: expected pairs of a step and a function, got 3"):
        growth.Schedule([3])
    text = "stages: expected a function that builds a torch.nn.Module for step 0, got one that returns NoneType"
    with pytest.raises(TypeError, match=text):
        growth.Schedule([(0, lambda: None)]).grow(0, build_mlp(8))


@pytest.mark.parametrize("candidates", [[build_mlp], {"wide": 5}])
def test_candidates_are_functions_by_name(candidates):
    for run in (
        lambda: growth.search(build_mlp(8), candidates, None, None, steps=1),
        lambda: growth.compare_proxies(build_mlp(8), candidates, None, None, steps=[1], final_steps=1),
    ):
        with pytest.raises(TypeError, match="candidates: expected a"):
            run()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradient_checkpointing_goes_on():
    model = build_gpt2()
    model.gradient_checkpointing_enable()
    model, _ = make_stages().grow(3, model)
    assert [block.gradient_checkpointing for block in model.transformer.h] == [True] * 3
    model.train()(**X, labels=X["input_ids"]).loss.backward()


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
