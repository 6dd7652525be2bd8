"""What `grow` refuses, before anything is written: sizes, arguments, tensors, modules, optimizers."""

import copy

import pytest
import torch
from growing import BUILDS, CHANGES, build, build_gpt2, build_llama, build_mlp, check_refused
from growing import fixed_seed as fixed_seed
from torch import nn

from pycodesign import growth


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


def test_inputs_that_the_target_cannot_take():
    x = torch.randn(3, 8, dtype=torch.float64)
    check_refused(build_mlp(8), build_mlp(16, torch.float32), "dtype", RuntimeError, inputs=x)


# Tensors


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


# Modules


def test_parametrized_modules_are_named():
    def build(width):
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, width)), nn.Linear(width, 4))

    text = "spec: expected modules without parametrizations, or a Spec, got ParametrizedLinear as 0"
    check_refused(build(8), build(16), text)
    text = "target: expected ReLU as 1, as the source's, got Tanh as 1"
    check_refused(*(nn.Sequential(nn.Linear(8, 8), act()) for act in (nn.ReLU, nn.Tanh)), text)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_no_part_of_a_known_model(register):
    source = build_mlp(8)
    getattr(source[2], register)(lambda *arguments: arguments[-1])
    text = "source: expected modules without forward hooks, or a Spec that holds with them, got one of 2"
    check_refused(source, build_mlp(16), text)
    check_refused(build_mlp(8), source, "target: expected modules without forward hooks")
    spec = growth.Spec("mlp", {"0": growth.linear(None, "hidden"), "3": growth.linear("hidden", None)})
    growth.grow(source, build_mlp(16), spec=spec)
