"""Plans made from shapes alone, without torch: their rules, and which cannot be made."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from growing import CHANGES, WIDER, build, build_gpt2, check_refused
from growing import fixed_seed as fixed_seed

from pycodesign import growth
from pycodesign.growth.sizes import compute_shapes, is_tied, read_heads, read_sizes


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


def test_fused_spaces_of_several_kinds():
    layers = {"in": growth.linear(None, "q+k+v+hidden"), "out": growth.linear("hidden", None)}
    heads = growth.Heads(2, 2), growth.Heads(4, 4)
    old, new = {"in.weight": (34, 3), "out.weight": (3, 10)}, {"in.weight": (66, 3), "out.weight": (3, 18)}
    rule = growth.make_plan(old, new, growth.Spec("parallel", layers), heads=heads).rules[0]
    index = rule.axes[0].index
    assert index[:16].max() == 7 and index[16:32].min() == 8 and index[48:].tolist() == [*range(24, 34), *range(24, 32)]
    means = growth.Spec("two", {"fc": growth.linear(None, "stream+stream")}, spaces={"stream": "mean"})
    assert growth.make_plan({"fc.weight": (8, 3)}, {"fc.weight": (16, 3)}, means)
    with pytest.raises(growth.Inexact, match="8 -> 12, of spaces one after the other; exact would be"):
        growth.make_plan({"fc.weight": (8, 3)}, {"fc.weight": (12, 3)}, means)


def test_plans_that_cannot_be_written():
    wide = growth.Spec("wide", {"w": growth.parameter("a", "b", "c")})
    with pytest.raises(ValueError, match=r"w: expected one axis, or the first two, to grow, got \[0, 1, 2\]"):
        growth.make_plan({"w": (2, 2, 2)}, {"w": (4, 4, 4)}, wide)
    with pytest.raises(ValueError, match=r"w: expected one axis, or the first two, to grow, got \[0, 2\]"):
        growth.make_plan({"w": (2, 2, 2)}, {"w": (4, 2, 4)}, wide)


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
