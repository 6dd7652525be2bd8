"""Configs of checkpoints as the hub has them, whole or without their defaults; arguments of other kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from checkpoints import LARGER, build, edit_config
from checkpoints import quiet as quiet
from checkpoints import small as small
from click.testing import CliRunner

from pycodesign import growth
from pycodesign.cli import main

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 40}
DOUBLE = {"hidden_size": 48, "num_attention_heads": 12}
IMAGES = {"image_size": 16, "patch_size": 8}
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 6, "n_inner": 40, "n_positions": 16}
HUB = {  # what their configs say beside their sizes
    "BertModel": {"vocab_size": 50},
    "GPT2LMHeadModel": {"vocab_size": 50},
    "ViTModel": IMAGES,
    "LlamaForCausalLM": {"vocab_size": 50, "rope_theta": 10000.0},
}


def save(directory: Path, name: str, **more: Any) -> tuple[Path, type[Any], dict[str, Any]]:
    """Save a model with a config that leaves out all it can."""
    cls = getattr(transformers, name)
    sizes = {**(GPT2 if name.startswith("GPT2") else SIZES), **HUB.get(name, {"vocab_size": 50})}
    cls(cls.config_class(**sizes)).save_pretrained(directory)
    eps = {"GPT2": "layer_norm_epsilon", "Llam": "rms_norm_eps"}.get(name[:4], "layer_norm_eps")
    config = {**sizes, "architectures": [name], "model_type": cls.config_class.model_type, eps: 1e-5, **more}
    (directory / "config.json").write_text(json.dumps(config))
    return directory, cls, sizes


@pytest.mark.parametrize("name", HUB)
def test_a_whole_config_for_one_that_leaves_out_defaults(tmp_path: Path, name: str) -> None:
    src, cls, sizes = save(tmp_path / "small", name)
    larger = {"n_embd": 48, "n_head": 12} if name.startswith("GPT2") else DOUBLE
    eps = {key: 1e-5 for key in json.loads((src / "config.json").read_text()) if "eps" in key}
    config = cls.config_class(**{**sizes, **larger, **eps}, architectures=[name], dtype="float32")
    config.save_pretrained(tmp_path / "wanted")
    wanted = json.loads((tmp_path / "wanted" / "config.json").read_text())
    for number, target in enumerate((wanted, config, tmp_path / "wanted" / "config.json")):
        report = growth.grow_checkpoint(src, tmp_path / f"{number}", target_config=target, verify=number == 0)
        assert report.difference is None or report.difference < 1e-6
    other = {"rope_parameters": {**wanted["rope_parameters"], "rope_theta": 1e6}} if "Llama" in name else None
    other = other or ({"scale_attn_weights": False} if "GPT2" in name else {"hidden_act": "relu"})
    with pytest.raises(ValueError, match=f"target_config: expected {next(iter(other))} .* as the source's, got"):
        growth.grow_checkpoint(src, tmp_path / "other", target_config={**wanted, **other})


def test_a_whole_config_of_the_larger_model(small: Path, tmp_path: Path) -> None:
    config = build(**LARGER).config
    for number, whole in enumerate((config.to_dict(), config.to_json_file(tmp_path / "c.json") or tmp_path / "c.json")):
        report = growth.grow_checkpoint(small, tmp_path / f"{number}", target_config=whole, verify=True)
        assert report.config["architectures"] == ["GPT2LMHeadModel"] and report.config["dtype"] == "float32"


def test_hidden_states_are_not_compared(tmp_path: Path) -> None:
    src, _, _ = save(tmp_path / "small", "GPT2LMHeadModel", output_hidden_states=True)
    report = growth.grow_checkpoint(src, tmp_path / "deep", target_config={"n_layer": 3}, verify=True)
    assert report.difference is not None and report.difference < 1e-6


def test_models_of_several_choices_are_verified(tmp_path: Path) -> None:
    src, _, _ = save(tmp_path / "small", "BertForMultipleChoice")
    (tmp_path / "double.json").write_text(json.dumps(DOUBLE))
    arguments = ["grow", str(src), str(tmp_path / "large"), "--target", str(tmp_path / "double.json"), "--verify"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output


def test_sizes_say_whose_they_are(tmp_path: Path) -> None:
    src, _, _ = save(tmp_path / "small", "GPT2LMHeadModel")
    with pytest.raises(ValueError, match=r"^target_config: expected an integer of at least 1 for 'n_embd', got '48'"):
        growth.grow_checkpoint(src, tmp_path / "large", target_config={"n_embd": "48"})
    with pytest.raises(ValueError, match=r"^source_config: expected 'n_embd', got none"):
        growth.grow_checkpoint(src, tmp_path / "large", source_config={"model_type": "gpt2"}, target_config={})


@pytest.mark.parametrize("eps", [None, "1e-5"])
def test_eps_that_is_no_number(small: Path, eps: str | None) -> None:
    edit_config(small, layer_norm_epsilon=eps)
    text = f"^source_config: expected a number for 'layer_norm_epsilon', got {eps!r}$"
    with pytest.raises(ValueError, match=text):
        growth.grow_checkpoint(small, small.parent / "large", target_config=LARGER)


def test_models_without_blocks_stay_so(small: Path, tmp_path: Path) -> None:
    build(n_layer=0).save_pretrained(tmp_path / "empty")
    with pytest.raises(growth.Inexact, match="n_layer: 0 -> 4 blocks, none of which can be copied; exact would be 0"):
        growth.grow_checkpoint(tmp_path / "empty", tmp_path / "large", target_config={"n_layer": 4})
    edit_config(tmp_path / "empty", n_layer=2)
    with pytest.raises(ValueError, match=r"expected blocks h\.\* in a model of 2 layers, got none"):
        growth.grow_checkpoint(tmp_path / "empty", tmp_path / "large", target_config={"n_layer": 4})


def test_arguments_of_other_kinds(tmp_path: Path) -> None:
    src, _, _ = save(tmp_path / "small", "GPT2LMHeadModel")
    with pytest.raises(TypeError, match=r"target_config: expected a mapping, a path or a config .*, got int"):
        growth.grow_checkpoint(src, tmp_path / "large", target_config=48)
    with pytest.raises(ValueError, match="max_shard_bytes: expected an integer of at least 1, got '5GB'"):
        growth.grow_checkpoint(src, tmp_path / "large", target_config={}, max_shard_bytes="5GB")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="src: expected a directory, got the file"):
        growth.grow_checkpoint(src / "config.json", tmp_path / "large", target_config={})
    assert not (tmp_path / "large").exists()


def test_uneven_growth_is_no_fault_of_keys(tmp_path: Path) -> None:
    src, _, _ = save(tmp_path / "small", "GPT2LMHeadModel")
    with pytest.raises(growth.Inexact, match="mode: expected integer multiples of width and heads for 'exact'"):
        growth.grow_checkpoint(src, tmp_path / "large", target_config={"n_embd": 32, "n_head": 8}, mode="exact")
