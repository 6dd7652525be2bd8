"""`grow` keeps the function, whatever grows; what grown weights are, what is reported, and docstrings' examples."""

import copy
import doctest
import importlib
import math
from itertools import product

import pytest
import torch
import transformers
from growing import CHANGES, POST_NORM, PRE_NORM, WIDER, X, build, build_gpt2, check_refused, make_inputs, train_steps
from growing import fixed_seed as fixed_seed
from growing import precise_llama as precise_llama

from pycodesign import growth

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


def test_steps_of_growth_compose():
    small, wide, deep = build("gpt2"), build("gpt2", **CHANGES["1.33x"]), build("gpt2", **CHANGES["1.33x and deeper"])
    inputs = make_inputs("gpt2")
    assert growth.grow(small, wide, inputs=inputs).difference <= 1e-12
    assert growth.grow(wide, deep, inputs=inputs).difference <= 1e-12


def test_wrapped_models():
    source, target = build("sequential"), build("sequential", **CHANGES["2x"])
    inputs = make_inputs("sequential")
    wrapped = torch.optim.swa_utils.AveragedModel(source), torch.optim.swa_utils.AveragedModel(target)
    assert growth.grow(*wrapped, inputs=inputs).difference <= 1e-12
    torch.testing.assert_close(wrapped[1].eval()(inputs), wrapped[0].eval()(inputs), rtol=1e-12, atol=1e-12)


def test_grown_weights_in_16_bits():
    source, target = build("vit", torch.bfloat16), build("vit", torch.bfloat16, **CHANGES["1.33x"])
    assert growth.grow(source, target, inputs=make_inputs("vit", torch.bfloat16)).difference < 0.1


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


# What is reported


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


def test_nan_is_no_agreement():
    source, target = build("sequential"), build("sequential", **CHANGES["2x"])
    with torch.no_grad():
        source[8].bias[0] = float("nan")
    report = growth.grow(source, target, inputs=make_inputs("sequential"))
    assert report.difference != report.difference  # NaN
    assert growth.modules.compare([torch.tensor([1.0, -math.inf])], [torch.tensor([1.5, -math.inf])]) == 0.5


def test_outputs_of_each_layer_are_not_compared():
    source, target = build_gpt2().double(), build_gpt2(**WIDER, L=3).double()
    inputs = {**X, "output_hidden_states": True}
    check_refused(source, target, "inputs: expected outputs that both models", inputs={**inputs, "return_dict": False})
    assert growth.grow(source, target, inputs=inputs).difference <= 1e-12


# Docstrings


@pytest.mark.parametrize("name", ["halving", "modules", "plan", "schedule", "sizes", "spec", "specs"])
def test_examples(name):
    module = importlib.import_module(f"pycodesign.growth.{name}")
    attempted = doctest.testmod(module)
    assert attempted.failed == 0 and attempted.attempted > 0
