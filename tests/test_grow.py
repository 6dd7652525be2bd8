"""Growth of torch modules: the function, the trajectory of a training, optimizers, refusals."""

import copy
import doctest
import functools
import importlib
import json
import math
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import timm.models as timm
import torch
import torch.nn.functional as F
import transformers
from growing import (
    BUILDS,
    CHANGES,
    CLASSES,
    POST_NORM,
    PRE_NORM,
    build,
    build_encoder,
    build_gpt2,
    build_llama,
    build_resnet,
    build_timm_vit,
    make_inputs,
    randomize,
    train_steps,
)
from torch import nn

from pycodesign import growth
from pycodesign.growth.modules import list_tensors
from pycodesign.growth.sizes import compute_shapes, is_tied, read_heads, read_sizes


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()


@pytest.fixture
def precise_llama(monkeypatch):
    """Llama's norm rounds to float32, whatever the model's dtype."""
    llama = importlib.import_module("transformers.models.llama.modeling_llama")
    monkeypatch.setattr(
        llama.LlamaRMSNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
    )


PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-5)]
WITHOUT = {("sequential", "deeper"), ("timm resnet", "MLP"), ("timm resnet with bottlenecks", "MLP")}


@pytest.mark.parametrize(("name", "change"), [pair for pair in product(PRE_NORM, CHANGES) if pair not in WITHOUT])
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS, ids=["float64", "float32"])
def test_function_is_kept(name, change, dtype, bound, request):
    sizes = CHANGES[change]
    if "llama" in name and dtype == torch.float64:
        request.getfixturevalue("precise_llama")
    source, target = build(name, dtype), build(name, dtype, **sizes)
    before = copy.deepcopy(source.state_dict())
    report = growth.grow(source, target, inputs=make_inputs(name, dtype))
    assert report.difference <= bound
    assert all(torch.equal(before[key], tensor) for key, tensor in source.state_dict().items())


@pytest.mark.parametrize("change", ["2x", "3x"])
@pytest.mark.parametrize("name", POST_NORM)
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS, ids=["float64", "float32"])
def test_function_is_kept_by_multiples_of_post_norm_models(name, change, dtype, bound):
    source, target = build(name, dtype), build(name, dtype, **CHANGES[change])
    assert growth.grow(source, target, inputs=make_inputs(name, dtype)).difference <= bound


@pytest.mark.parametrize("heads", [(4, 2, 8, 4), (4, 2, 8, 8), (4, 2, 12, 3), (4, 4, 9, 9), (4, 1, 8, 2), (4, 2, 8, 2)])
def test_groups_of_heads(heads, precise_llama):
    old_h, old_k, new_h, new_k = heads
    source, target = build("llama", H=old_h, K=old_k), build("llama", H=new_h, K=new_k, D=72)
    assert growth.grow(source, target, inputs=make_inputs("llama")).difference <= 1e-12


@pytest.mark.parametrize("name", ["gpt2", "vit", "timm vit", "bert"])
@pytest.mark.parametrize("mode", ["break_symmetry", "exact"])
def test_wider_heads(name, mode):
    if mode == "exact" and name in ("gpt2", "timm vit"):  # keys' settings are not those of queries in the same tensor
        with pytest.raises(
            growth.Inexact, match=r"mode: expected heads of the same dimensions for 'exact'.*(c_attn|qkv)"
        ):
            growth.grow(build(name), build(name, D=48), mode=mode)
        return
    source, target = build(name), build(name, D=48)
    assert growth.grow(source, target, mode=mode, inputs=make_inputs(name)).difference <= 1e-12


def test_untied_output_layer():
    source, target = build("gpt2"), build("gpt2 untied", **CHANGES["2x"])
    assert growth.grow(source, target, inputs=make_inputs("gpt2")).difference <= 1e-12
    with pytest.raises(growth.Inexact, match="tied"):
        growth.grow(source, target, mode="exact")
    with pytest.raises(ValueError, match="tied"):
        growth.grow(build("gpt2 untied"), build("gpt2", **CHANGES["2x"]))


def test_steps_of_growth_compose():
    small, wide, deep = build("gpt2"), build("gpt2", **CHANGES["1.33x"]), build("gpt2", **CHANGES["1.33x and deeper"])
    inputs = make_inputs("gpt2")
    assert growth.grow(small, wide, inputs=inputs).difference <= 1e-12
    assert growth.grow(wide, deep, inputs=inputs).difference <= 1e-12


# What grown weights are


def test_old_features_keep_their_places():
    for name, change in (("vit features", "1.33x"), ("bert features", "2x")):
        source, target = build(name), build(name, **CHANGES[change])
        inputs = make_inputs(name)
        growth.grow(source, target)
        outputs = []
        for model in (source.eval(), target.eval()):
            kwargs = inputs if isinstance(inputs, dict) else {"pixel_values": inputs}
            outputs.append(model(**kwargs).last_hidden_state)
        torch.testing.assert_close(outputs[1][..., :24], outputs[0], rtol=1e-12, atol=1e-12)


def test_noise_parts_copies_and_is_repeatable():
    source = build("sequential")
    targets = [build("sequential", **CHANGES["2x"]) for _ in range(4)]
    for target, seed, noise in zip(targets, (0, 0, 1, 0), (0.1, 0.1, 0.1, 0.0), strict=True):
        growth.grow(source, target, seed=seed, noise=noise)
    weights = [target[5].weight for target in targets]
    halves = weights[0].split(weights[0].shape[1] // 2, 1)
    assert (halves[0] - halves[1]).abs().mean() > 0.01 * weights[0].abs().mean()
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(*weights[3].split(weights[3].shape[1] // 2, 1))


def test_training_parts_copies():
    torch.manual_seed(1)
    pairs = []
    for mode in growth.plan.MODES:
        small, large = build("sequential"), build("sequential", **CHANGES["2x"])
        growth.grow(small, large, mode=mode)
        train_steps(large, torch.optim.SGD(large.parameters(), lr=1e-2), "sequential", 5)
        rows = large[8].weight.detach().split(24)
        pairs.append(float((rows[0] - rows[1]).abs().max()))
    assert pairs[0] < 1e-12 < 1e-6 < pairs[1]


def test_new_blocks_change_nothing_until_trained():
    source, target = build("gpt2"), build("gpt2", L=4)
    growth.grow(source, target)
    silent = [
        (block.attn.c_proj.weight == 0).all() and (block.mlp.c_proj.bias == 0).all() for block in target.transformer.h
    ]
    assert silent == [False, True, False, True]
    assert torch.equal(target.transformer.h[3].mlp.c_fc.weight, source.transformer.h[1].mlp.c_fc.weight)


def test_eps_follows_the_width_in_modules_and_config(tmp_path):
    source, target = build("gpt2"), build("gpt2", **CHANGES["1.33x"])
    growth.grow(source, target)
    assert target.transformer.ln_f.eps == target.config.layer_norm_epsilon == pytest.approx(1e-2 * 24 / 32)
    target.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64)
    inputs = make_inputs("gpt2")
    torch.testing.assert_close(loaded(**inputs).logits, source.eval()(**inputs).logits, rtol=1e-12, atol=1e-12)


def test_dry_run_plans_each_parameter_and_writes_nothing():
    source, target = build("gpt2"), build("gpt2", **CHANGES["1.33x and deeper"])
    before = copy.deepcopy(target.state_dict())
    report = growth.grow(source, target, dry_run=True)
    assert all(torch.equal(before[key], tensor) for key, tensor in target.state_dict().items())
    text = str(report)
    assert all(name in text for name, _ in target.named_parameters())
    (row,) = [line for line in text.splitlines() if line.split()[:1] == ["transformer.h.1.mlp.c_proj.weight"]]
    assert row.split()[1:5] == ["transformer.h.0.mlp.c_proj.weight", "40x24", "->", "53x32"]
    assert "zero in a new block" in row
    assert "eps x 0.75" in text


def test_wrapped_models():
    source, target = build("sequential"), build("sequential", **CHANGES["2x"])
    inputs = make_inputs("sequential")
    wrapped = torch.optim.swa_utils.AveragedModel(source), torch.optim.swa_utils.AveragedModel(target)
    assert growth.grow(*wrapped, inputs=inputs).difference <= 1e-12
    torch.testing.assert_close(wrapped[1].eval()(inputs), wrapped[0].eval()(inputs), rtol=1e-12, atol=1e-12)


def test_grown_weights_in_16_bits():
    source, target = build("vit", torch.bfloat16), build("vit", torch.bfloat16, **CHANGES["1.33x"])
    assert growth.grow(source, target, inputs=make_inputs("vit", torch.bfloat16)).difference < 0.1


# Optimizers


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


# Other models


class Residual(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class Mlp(nn.Module):
    def __init__(self, width, hidden, depth):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(8, width), nn.LayerNorm(width), nn.Linear(width, CLASSES)
        self.blocks = nn.ModuleList(Residual(width, hidden) for _ in range(depth))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make_mlp_spec(**changes):
    options = {
        "name": "mlp",
        "layers": {
            "embed": growth.linear(None, "stream"),
            "blocks.*.norm": growth.layer_norm("stream"),
            "blocks.*.fc1": growth.linear("stream", "hidden"),
            "blocks.*.fc2": growth.linear("hidden", "stream"),
            "norm": growth.layer_norm("stream"),
            "head": growth.linear("stream", None),
        },
        "spaces": {"stream": "mean"},
        "blocks": {"blocks.*": 0},
        "silence": ["blocks.*.fc2"],
    }
    return growth.Spec(**{**options, **changes})


def test_own_spec():
    source, target = Mlp(16, 24, 2).double(), Mlp(21, 40, 3).double()
    with pytest.raises(ValueError, match=r"spec: expected a Spec for Mlp"):
        growth.grow(source, target)
    x = torch.randn(4, 8, dtype=torch.float64)
    assert growth.grow(source, target, spec=make_mlp_spec(), inputs=x).difference <= 1e-12


def test_specs_that_contradict_themselves():
    with pytest.raises(ValueError, match="silence: expected patterns of layers, got 'fc3'"):
        make_mlp_spec(silence=["fc3"])
    with pytest.raises(ValueError, match=r"spaces: expected .* for 'stream', got 'means'"):
        make_mlp_spec(spaces={"stream": "means"})
    with pytest.raises(ValueError, match="spaces: expected 'mean', 'zero' or 'repeat' for 'stream'"):
        make_mlp_spec(spaces={})


@pytest.mark.parametrize(
    ("build_one", "change", "exact"),
    [
        (lambda w: [nn.Linear(8, w), nn.ReLU(), nn.LayerNorm(w), nn.Linear(w, 4)], (12, 18), False),
        (lambda w: [nn.Linear(8, w), nn.ReLU(), nn.LayerNorm(w), nn.Linear(w, 4)], (12, 24), True),
        (lambda w: [nn.Linear(8, w), nn.LayerNorm(w), nn.Sigmoid(), nn.Linear(w, 4)], (12, 18), False),
        (lambda w: [nn.Linear(8, w), nn.LayerNorm(w, elementwise_affine=False), nn.Linear(w, 4)], (12, 18), False),
        (lambda w: [nn.Linear(8, w), nn.LayerNorm(w), nn.Tanh(), nn.Linear(w, 4)], (12, 18), True),
        (lambda w: [nn.LayerNorm(8), nn.Linear(8, w), nn.Softplus(), nn.Linear(w, 4)], (12, 18), True),
        (lambda w: [nn.Linear(8, w), nn.ReLU(), nn.Linear(w, 4), nn.LogSoftmax(-1)], (12, 18), True),
        (lambda w: [nn.Unflatten(1, (4, 2)), nn.Linear(2, w), nn.Flatten(), nn.Linear(4 * w, 4)], (12, 18), True),
        (
            lambda w: [nn.Unflatten(1, (4, 2)), nn.Linear(2, w), nn.LayerNorm(w), nn.Flatten(), nn.Linear(4 * w, 4)],
            (12, 18),
            True,
        ),
        (
            lambda w: [nn.Linear(8, w), nn.Softmax(-1), nn.Linear(w, 4)],
            (12, 18),
            "modules that 'auto' knows, got Softmax",
        ),
        (
            lambda w: [nn.Linear(8, w), nn.MaxPool1d(2), nn.Linear(w // 2, 4)],
            (12, 24),
            "1 to work on the last of features 0",
        ),
        (
            lambda w: [nn.Linear(8, w), nn.Flatten(0), nn.Linear(5 * w, 4)],
            (12, 24),
            "1 to work on the last of features 0",
        ),
        (
            lambda w: [nn.Unflatten(1, (1, 8)), nn.Conv1d(1, w, 3), nn.Linear(6, 6), nn.Conv1d(w, 4, 3)],
            (6, 12),
            "2 to work on the channels",
        ),
        (
            lambda w: [nn.Unflatten(1, (4, 2)), nn.Linear(2, w), nn.BatchNorm1d(4), nn.Linear(w, 4)],
            (12, 24),
            "2 of 12 inputs",
        ),
    ],
    ids=[
        "relu then norm",
        "its multiple",
        "norm then sigmoid",
        "norm without gamma",
        "norm then tanh",
        "norm of the input",
        "module behind the last layer",
        "flattened tokens",
        "flattened tokens behind a norm",
        "unknown",
        "pooled features",
        "flattened batch",
        "pixels",
        "norm of tokens",
    ],
)
def test_sequentials_are_read_with_care(build_one, change, exact):
    source, target = (nn.Sequential(*build_one(width)).double() for width in change)
    if isinstance(exact, str):
        with pytest.raises(ValueError, match=f"spec: expected {exact}"):
            growth.grow(source, target)
    elif not exact:
        with pytest.raises(growth.Inexact, match="12 -> 18; exact would be 24"):
            growth.grow(source, target)
    else:
        x = torch.randn(5, 8, dtype=torch.float64)
        assert growth.grow(source, target, inputs=x).difference <= 1e-12


@pytest.mark.parametrize(
    ("build_one", "text"),
    [
        (
            lambda wide: [nn.Conv2d(3, 4, 3, stride=1 + wide), nn.Conv2d(4, 2, 1)],
            r"stride=\(1, 1\) in 0, .* got \(2, 2\)",
        ),
        (lambda wide: [nn.Conv2d(3, 4, 3, padding=1 - wide), nn.Conv2d(4, 2, 1)], "padding="),
        (lambda wide: [nn.Linear(3, 4), nn.LeakyReLU(0.1 + wide), nn.Linear(4, 2)], "negative_slope=0.1 in 1"),
        (
            lambda wide: [nn.Linear(3, 4), nn.ReLU() if wide else nn.GELU(), nn.Linear(4, 2)],
            "expected GELU as 1, .* got ReLU as 1",
        ),
        (lambda wide: [nn.Linear(3, 4), *[nn.ReLU(), nn.Linear(4, 4)] * wide, nn.Linear(4, 2)], "exact would be 2"),
    ],
)
def test_models_that_differ_in_more_than_size(build_one, text):
    source, target = (nn.Sequential(*build_one(wide)) for wide in (False, True))
    with pytest.raises(ValueError, match=text):
        growth.grow(source, target)


class Squared(nn.ReLU):
    def forward(self, x):
        return super().forward(x) ** 2


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x / x.norm(dim=-1, keepdim=True))


class Residuals(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x)).softmax(-1) @ self[2].weight.mT


def share(modules, one, other):
    modules[other].weight = modules[one].weight
    return modules


@pytest.mark.parametrize(
    ("build_one", "text"),
    [
        (lambda w: [nn.Linear(8, w), nn.LayerNorm(w), nn.Hardtanh(0.2, 1), nn.Linear(w, 4)], "12 -> 18; exact .* 24"),
        (
            lambda w: [nn.Linear(8, w), (act := nn.Sigmoid()), nn.Linear(w, w), nn.LayerNorm(w), act, nn.Linear(w, 4)],
            "features 2 12 -> 18; exact would be 24",
        ),
        (
            lambda w: [nn.Linear(8, w), (norm := nn.LayerNorm(w)), nn.Linear(w, w), norm, nn.Linear(w, 4)],
            "1 and 3 share weight.* exact would be the source's shape, or parameters of their own",
        ),
        (
            lambda w: share([nn.Embedding(9, w), nn.Tanh(), nn.Linear(w, 9, bias=False)], 0, 2),
            r"0 and 2 share weight, \(9, 12\) -> \(9, 18\)",
        ),
        (lambda w: [nn.Embedding(9, w, max_norm=1.0), nn.Linear(w, 4)], "0 limits the norm of 12 -> 18.* be 12"),
        (lambda w: [nn.Linear(8, w), Squared(), nn.Linear(w, 4)], "knows, got Squared as 1"),
        (lambda w: [nn.Linear(8, w), nn.ReLU(), Scaled(w, w), nn.Linear(w, 4)], "knows, got Scaled as 2"),
        (
            lambda w: [nn.Linear(8, w), Residuals(nn.Linear(w, w), nn.Tanh(), nn.Linear(w, w)), nn.Linear(w, 4)],
            "got Residuals as 1",
        ),
    ],
)
def test_sequentials_that_compute_something_else(build_one, text):
    source, target = (nn.Sequential(*build_one(width)) for width in (12, 18))
    with pytest.raises(ValueError, match=text):
        growth.grow(source, target)


def test_a_sequential_with_a_forward_of_its_own():
    source, target = (Residuals(nn.Linear(8, w), nn.Tanh(), nn.Linear(w, 8)) for w in (12, 18))
    with pytest.raises(ValueError, match="spec: expected a Spec for Residuals"):
        growth.grow(source, target)


def test_activations_are_compared_and_dropout_is_not():
    source = build("timm vit")
    with pytest.raises(ValueError, match=r"target: expected GELU as blocks\.0\.mlp\.act, as the source's, got ReLU"):
        growth.grow(source, build_timm_vit(**CHANGES["2x"], act_layer=nn.ReLU))
    target = build_timm_vit(**CHANGES["deeper"], drop_path_rate=0.1, proj_drop_rate=0.1).double()
    assert growth.grow(source, target, inputs=make_inputs("timm vit")).difference <= 1e-12


@pytest.mark.parametrize(
    ("build_one", "old", "new", "text"),
    [
        (build_timm_vit, {}, {"global_pool": "avg", "fc_norm": False}, "global_pool='token' in the model, .*got 'avg'"),
        (
            build_timm_vit,
            {"reg_tokens": 2},
            {"reg_tokens": 2, "pool_include_prefix": True},
            "pool_include_prefix=False",
        ),
        (functools.partial(build_encoder, "Bert"), {}, {"is_decoder": True}, "is_decoder False .*, got True"),
        (functools.partial(build_encoder, "ViT"), {}, {"pooler_act": "relu"}, "pooler_act 'tanh' .*, got 'relu'"),
        (
            build_llama,
            {"rope_scaling": (dynamic := {"rope_type": "dynamic", "factor": 2.0}), "max_position_embeddings": 64},
            {"rope_scaling": dynamic, "max_position_embeddings": 32},
            "max_position_embeddings 64 as the source's, got 32",
        ),
    ],
)
def test_settings_that_no_tensor_shows(build_one, old, new, text):
    with pytest.raises(ValueError, match=f"target: expected {text}"):
        growth.grow(build_one(**old), build_one(D=48, H=12, **new))


def test_types_of_one_name_are_told_apart():
    source, target = build_timm_vit(), build_timm_vit(D=48, H=12, norm_layer=nn.LayerNorm)
    text = r"timm\.layers\.norm\.LayerNorm as blocks\.0\.norm1, as the source's, got torch\.nn\..*\.LayerNorm"
    with pytest.raises(ValueError, match=f"target: expected {text}"):
        growth.grow(source, target)


@pytest.mark.parametrize("name", ["resnet18d", "seresnet18"])
def test_variants_of_resnets(name):
    source, target = (
        timm.create_model(name, channels=[width * n for n in (1, 2, 3, 4)], num_classes=CLASSES).double()
        for width in (8, 12)
    )
    assert growth.grow(source, target, inputs=make_inputs("resnet")).difference <= 1e-12


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"block_fn": timm.vision_transformer.ResPostBlock}, "got ResPostBlock as blocks.0"),
        ({"mlp_layer": importlib.import_module("timm.layers").GluMlp}, "got GluMlp as blocks.0.mlp"),
        ({"norm_layer": nn.RMSNorm}, "got RMSNorm as blocks.0.norm1"),
        ({"act_layer": nn.Softmax}, "got Softmax as blocks.0.mlp.act"),
        ({"mlp_layer": type("Mlp", (importlib.import_module("timm.layers").Mlp,), {})}, "got Mlp as blocks.0.mlp"),
    ],
)
def test_unknown_modules_of_timm(options, text):
    source, target = build_timm_vit(**options), build_timm_vit(**CHANGES["2x"], **options)
    with pytest.raises(ValueError, match=f"spec: expected modules that 'auto' knows, or a Spec, {text}"):
        growth.grow(source, target)


@pytest.mark.parametrize(
    "options",
    [
        {"pre_norm": True},
        {"final_norm": False},
        {"global_pool": "max"},
        {"global_pool": "avgmax"},
        {"norm_layer": functools.partial(nn.LayerNorm, elementwise_affine=False)},
    ],
)
def test_vits_whose_stream_holds_no_means(options):
    source = randomize(build_timm_vit(**options).double())
    with pytest.raises(growth.Inexact, match="stream 24 -> 32; exact would be 48"):
        growth.grow(source, build_timm_vit(D=32, H=8, **options))
    target = build_timm_vit(D=48, H=12, L=3, **options).double()
    assert growth.grow(source, target, inputs=make_inputs("timm vit")).difference <= 1e-12


@pytest.mark.parametrize("pool", ["max", "avgmax", "avg"])
def test_vits_that_pool_behind_the_norm(pool):
    options = {"global_pool": pool, "fc_norm": False}
    source, target = build_timm_vit(**options).double(), build_timm_vit(D=32, H=8, **options).double()
    assert growth.grow(randomize(source), target, inputs=make_inputs("timm vit")).difference <= 1e-12


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"act_layer": nn.SiLU}, r"layer1\.2\.conv1\.weight: no block of timm_resnet can be an identity"),
        ({"act_layer": nn.LeakyReLU}, "no block of timm_resnet can be an identity"),
        ({"norm_layer": functools.partial(nn.BatchNorm2d, affine=False)}, "no parameters that make layer1.2.bn2 zero"),
    ],
)
def test_resnets_whose_blocks_are_no_identities(options, text):
    source = randomize(build_resnet(**options).double())
    with pytest.raises(growth.Inexact, match=f"{text}; exact would be the source's depth"):
        growth.grow(source, build_resnet(L=3, **options))
    target = build_resnet(D=32, **options).double()
    assert growth.grow(source, target, inputs=make_inputs("resnet")).difference <= 1e-12


def test_transposed_and_depthwise_convolutions():
    def build_one(width, factor=2):
        return nn.Sequential(
            nn.ConvTranspose2d(3, width, 2),
            nn.ReLU(),
            nn.Conv2d(width, factor * width, 3, groups=width),
            nn.ReLU(),
            nn.Conv2d(factor * width, 4, 1),
        ).double()

    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert growth.grow(build_one(6), build_one(8), inputs=x).difference <= 1e-12
    with pytest.raises(growth.Inexact, match="2: a convolution of 6 -> 6 groups"):
        growth.grow(build_one(6), build_one(6, 3))


# Plans of shapes


@pytest.mark.parametrize("name", ["gpt2", "gpt2 untied", "llama", "llama tied", "vit", "bert", "bert features"])
def test_shapes_follow_from_configs(name, tmp_path):
    change = CHANGES["2x"] if name.startswith("bert") else CHANGES["1.33x and deeper"]
    shapes, configs = [], []
    for sizes in ({}, change):
        model = build(name, **sizes)
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        spec = growth.find_spec(config)
        configs.append(config)
        tensors = importlib.import_module("safetensors.torch").load_file(tmp_path / "model.safetensors")
        shapes.append({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    sizes = [read_sizes(spec, config) for config in configs]
    assert compute_shapes(shapes[0], spec, *sizes) == shapes[1]
    tied = is_tied(spec, configs[0])
    assert tied == (name in ("gpt2", "llama tied", "bert"))
    heads = read_heads(sizes[0]), read_heads(sizes[1])
    plan = growth.make_plan(shapes[0], shapes[1], spec, heads=heads, tied=tied)
    for rule in plan:
        if rule.shape == rule.old_shape and not rule.silent:
            continue
        old = np.random.default_rng(0).standard_normal(rule.old_shape).astype(np.float32)
        torch.testing.assert_close(torch.from_numpy(rule.apply(old)), rule.apply(torch.from_numpy(old)))
        assert (rule.apply_state(old**2, 2) >= 0).all()


def test_rules_check_their_arguments():
    source = {"fc.weight": (4, 3), "fc.bias": (4,)}
    target = {"fc.weight": (6, 3), "fc.bias": (6,)}
    plan = growth.make_plan(source, target, growth.Spec("fc", {"fc": growth.linear(None, "hidden")}))
    rule = plan.rules[0]
    with pytest.raises(ValueError, match=r"fc.weight: expected shape \(4, 3\), got \(3, 4\)"):
        rule.apply(np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"out: expected shape \(6, 3\), got \(4, 3\)"):
        rule.apply(np.zeros((4, 3)), out=np.zeros((4, 3)))


def test_plans_need_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np; from pycodesign import growth\n"
        "spec = growth.Spec('fc', {'fc': growth.linear(None, 'hidden')})\n"
        "(rule,) = growth.make_plan({'fc.bias': (4,)}, {'fc.bias': (6,)}, spec)\n"
        "print(rule.apply(np.arange(4.0)))\n"
        "try: growth.grow\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=sys.prefix, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert first == "[0. 1. 2. 3. 0. 1.]"
    assert "pip install 'pycodesign[torch]'" in second


# What is refused


@pytest.mark.parametrize(
    ("name", "sizes", "options", "error", "text"),
    [
        ("gpt2", {"D": 16, "H": 4}, {}, ValueError, "wte.weight: expected at least 24 features of stream, got 16"),
        ("gpt2", {"L": 1}, {}, ValueError, r"target: expected at least 2 blocks transformer.h.\*, got 1"),
        ("gpt2", {"F": 39}, {}, ValueError, "expected at least 40 features of hidden, got 39"),
        ("bert", {"D": 36}, {}, growth.Inexact, "stream 24 -> 36; exact would be 48"),
        ("bert", {"D": 60}, {}, growth.Inexact, "stream 24 -> 60; exact would be 48 or 72"),
        (
            "bert",
            {"L": 3},
            {},
            growth.Inexact,
            "no block of bert can be an identity; exact would be the source's depth",
        ),
        ("llama", {"head_dim": 8}, {}, growth.Inexact, "heads of 4 -> 8 dimensions.*exact would be 4"),
        (
            "llama",
            {"H": 8, "K": 4},
            {},
            growth.Inexact,
            "6 heads on 6 keys -> 8 on 4; exact would be 6 keys, 1 or more",
        ),
        ("llama", {"H": 8, "K": 7, "D": 32}, {}, growth.Inexact, "6 heads on 6 keys -> 8 on 7; exact would be 7 keys"),
        ("vit", {"H": 12}, {}, growth.Inexact, "heads of 4 -> 2 dimensions; exact would be 4 or more"),
        (
            "gpt2",
            {"D": 32, "H": 8},
            {"mode": "exact"},
            growth.Inexact,
            "integer multiples .* for 'exact', got .*24 -> 32",
        ),
        ("gpt2", {"L": 3}, {"mode": "exact"}, growth.Inexact, "the source's depth for 'exact'"),
        (
            "gpt2",
            {"D": 48, "H": 12},
            {"mode": "even"},
            ValueError,
            "mode: expected 'exact' or 'break_symmetry', got 'even'",
        ),
        ("gpt2", {"D": 48, "H": 12}, {"seed": -1}, ValueError, "seed: expected an integer of at least 0, got -1"),
        ("gpt2", {"D": 48, "H": 12}, {"seed": 1.5}, ValueError, "seed: expected an integer of at least 0, got 1.5"),
        ("gpt2", {"D": 48, "H": 12}, {"noise": "a"}, ValueError, "noise: expected a finite number .*, got 'a'"),
        ("gpt2", {"D": 48, "H": 12}, {"noise": -0.5}, ValueError, "noise: expected a finite number of at least 0"),
        ("gpt2", {"D": 48, "H": 12}, {"noise": float("nan")}, ValueError, "noise: expected a finite number .* got nan"),
        ("gpt2", {"D": 48, "H": 12}, {"inputs": {"input_ids": torch.full((2, 9), 99)}}, IndexError, "range"),
        (
            "sequential",
            {"D": 48},
            {"inputs": torch.ones(0, 3, 16, 16)},
            ValueError,
            "inputs: expected some for which the model returns floating-point numbers, got none",
        ),
        ("gpt2", {"D": 48, "H": 12}, {"spec": "rnn"}, ValueError, "spec: expected a model_type of gpt2, .* got 'rnn'"),
        ("gpt2", {"activation_function": "relu"}, {}, ValueError, "activation_function 'gelu_new' .* got 'relu'"),
        (
            "gpt2",
            {"L": 3, "scale_attn_by_inverse_layer_idx": True},
            {"first": {"scale_attn_by_inverse_layer_idx": True}},
            growth.Inexact,
            "scales each layer by its number; exact would be 2 layers",
        ),
        (
            "gpt2",
            {"D": 48, "scale_attn_weights": False},
            {"first": {"scale_attn_weights": False}},
            growth.Inexact,
            "exact would be heads of 4 dimensions",
        ),
        ("gpt2", {"vocab_size": 60}, {}, ValueError, "target: expected vocab_size 50 as the source's, got 60"),
        ("timm resnet", {"L": 3}, {"first": {"L": 1}}, growth.Inexact, "none of which can be copied; exact would be 1"),
        ("sequential", {"D": 48}, {"spec": growth.GPT2}, ValueError, "0.weight: .* found no rule for it"),
    ],
)
def test_refused(name, sizes, options, error, text):
    options = dict(options)
    build_one = {"gpt2": build_gpt2, "llama": build_llama}.get(name, BUILDS[name])
    if "vocab_size" in sizes:
        source, target = build_one(), build_one()
        target.resize_token_embeddings(60, mean_resizing=False)
    else:
        source, target = build_one(**options.pop("first", {})), build_one(**sizes)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(error, match=text):
        growth.grow(source, target, **options)
    assert all(torch.equal(before[key], tensor) for key, tensor in target.state_dict().items())


def test_nan_is_no_agreement():
    source, target = build("sequential"), build("sequential", **CHANGES["2x"])
    with torch.no_grad():
        source[8].bias[0] = float("nan")
    report = growth.grow(source, target, inputs=make_inputs("sequential"))
    assert report.difference != report.difference  # NaN
    assert growth.modules.compare([torch.tensor([1.0, -math.inf])], [torch.tensor([1.5, -math.inf])]) == 0.5


def test_convolutions_in_three_dimensions():
    def build_one(width):
        layers = [nn.Conv3d(1, width, 2), nn.BatchNorm3d(width), nn.ReLU(), nn.Conv3d(width, width, 1, groups=width)]
        return nn.Sequential(*layers, nn.ConvTranspose3d(width, 2 * width, 2), nn.Flatten(), nn.Linear(54 * width, 4))

    source, target = build_one(4).double(), build_one(6).double()
    adams = torch.optim.AdamW(source.parameters()), torch.optim.AdamW(target.parameters())
    x = torch.randn(2, 1, 3, 3, 3, dtype=torch.float64)
    source(x).sum().backward()
    adams[0].step()
    options = {"optimizer": adams[0], "target_optimizer": adams[1]}
    assert growth.grow(source, target, inputs=x, **options).difference <= 1e-12


def test_tensors_that_cannot_be_read_or_written():
    source, target = build("sequential"), build("sequential", **CHANGES["2x"])
    with pytest.raises(ValueError, match="target: expected plain tensors in memory, got one on the meta device for 0"):
        growth.grow(source, copy.deepcopy(target).to("meta"))
    with pytest.raises(ValueError, match="target: expected parameters of its own, got the source's"):
        growth.grow(source, source)
    with pytest.raises(TypeError, match=r"source: expected a torch\.nn\.Module, got NoneType"):
        growth.grow(None, target)
    for model in (source, target):
        model[5].weight = nn.Parameter(model[5].weight.int(), requires_grad=False)
    with pytest.raises(ValueError, match=r"5.weight of floating-point numbers .*, got torch\.int32 -> torch\.int32"):
        growth.grow(source, target)


class Half(nn.Module):
    """No wrapper, though its only module is called as theirs."""

    def __init__(self, width):
        super().__init__()
        self.module = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 4))
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.module(x) * self.scale


def test_a_model_that_looks_like_a_wrapper():
    layers = {"module.0": growth.linear(None, "hidden"), "module.1": growth.linear("hidden", None)}
    spec = growth.Spec("half", {**layers, "scale": growth.parameter()})
    source, target = Half(12).double(), Half(18).double()
    with torch.no_grad():
        source.scale.fill_(3)
    x = torch.randn(4, 8, dtype=torch.float64)
    assert growth.grow(source, target, spec=spec, inputs=x).difference <= 1e-12
    assert target.scale == 3


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


def test_refused_models_and_optimizers():
    source, target = build("gpt2"), build("gpt2", **CHANGES["2x"])
    adam, larger = (torch.optim.AdamW(model.parameters()) for model in (source, target))
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(TypeError, match="target: expected GPT2LMHeadModel as the source, got ViTModel"):
        growth.grow(source, build("vit features"))
    with pytest.raises(TypeError, match=r"optimizer: expected torch.optim.Adam, AdamW or SGD, got RMSprop"):
        growth.grow(source, target, optimizer=torch.optim.RMSprop(source.parameters()), target_optimizer=larger)
    with pytest.raises(TypeError, match="target_optimizer: expected AdamW as the source's, got SGD"):
        growth.grow(source, target, optimizer=adam, target_optimizer=torch.optim.SGD(target.parameters()))
    with pytest.raises(ValueError, match="expected both or none"):
        growth.grow(source, target, optimizer=adam)
    with pytest.raises(ValueError, match="target_optimizer: expected parameters of the model alone"):
        growth.grow(source, target, optimizer=adam, target_optimizer=adam)
    with pytest.raises(ValueError, match="ema: expected the model's parameters and shapes"):
        growth.grow(source, target, ema=target, target_ema=target)
    source.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"expected all of the source's parameters, got none for extra"):
        growth.grow(source, target, spec=growth.GPT2)
    target.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra.bias: expected a parameter that the spec 'gpt2' knows|extra.weight"):
        growth.grow(source, target, spec=growth.GPT2)
    assert all(torch.equal(before[key], target.state_dict()[key]) for key in before)


@pytest.mark.parametrize("name", ["halving", "modules", "plan", "schedule", "sizes", "spec", "specs"])
def test_examples(name):
    module = importlib.import_module(f"pycodesign.growth.{name}")
    attempted = doctest.testmod(module)
    assert attempted.failed == 0 and attempted.attempted > 0
