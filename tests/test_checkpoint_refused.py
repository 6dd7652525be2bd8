"""Damaged checkpoints, and requests that cannot be, are refused before anything is at the destination."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import transformers
from checkpoints import LARGER, edit_config, edit_header, list_files
from checkpoints import quiet as quiet
from checkpoints import small as small

from pycodesign import growth


def edit_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(src: Path) -> None:
        file = src / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return edit


def drop(name: str) -> Callable[[Path], None]:
    def edit(src: Path) -> None:
        file = src / "model.safetensors"
        tensors = safetensors.numpy.load_file(file)
        del tensors[name]
        safetensors.numpy.save_file(tensors, file)

    return edit


def convert(name: str, dtype: str) -> Callable[[Path], None]:
    def edit(src: Path) -> None:
        file = src / "model.safetensors"
        tensors = safetensors.numpy.load_file(file)
        safetensors.numpy.save_file({**tensors, name: tensors[name].astype(dtype)}, file)

    return edit


def shard(change: Callable[[Path, dict[str, str]], object]) -> Callable[[Path], None]:
    def edit(src: Path) -> None:
        tensors = safetensors.numpy.load_file(src / "model.safetensors")
        (src / "model.safetensors").unlink()
        names = sorted(tensors)
        weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
        for file in set(weight_map.values()):
            safetensors.numpy.save_file({n: tensors[n] for n in names if weight_map[n] == file}, src / file)
        change(src, weight_map)
        (src / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return edit


def save_states(names: dict[str, tuple[int, ...]]) -> Callable[[Path], None]:
    states = {name: np.zeros(shape, "f4") for name, shape in names.items()}
    return lambda src: safetensors.numpy.save_file(states, src / "optimizer.safetensors")


def save_settings(settings: dict[str, Any]) -> Callable[[Path], None]:
    states, metadata = {f"state.{LN}.exp_avg": np.zeros(24, "f4")}, {"optimizer": json.dumps(settings)}
    return lambda src: safetensors.numpy.save_file(states, src / "optimizer.safetensors", metadata)


LN = "transformer.ln_f.weight"


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (edit_bytes(lambda data: b""), "expected a safetensors file, got a damaged one: no header in 0 bytes"),
    "cut header": (edit_bytes(lambda data: data[:50]), "got a damaged one: no header in 50 bytes"),
    "cut data": (edit_bytes(lambda data: data[:-9]), "expected .* bytes, got a damaged file of"),
    "longer": (edit_bytes(lambda data: data + b"more"), "expected .* bytes, got a damaged file of"),
    "no JSON": (edit_bytes(lambda data: data[:8] + b"x" + data[9:]), "got a damaged one: Expecting value"),
    "offsets": (edit_header(lambda h: h[LN].update(data_offsets=[0, 96])), "got a damaged one: .* begins at byte"),
    "size": (edit_header(lambda h: h[LN].update(shape=[23])), f"{LN} has 96 bytes for shape .* of F32"),
    "negative": (edit_header(lambda h: h[LN].update(data_offsets=[-96, 0])), f"{LN} has shape"),
    "no offsets": (edit_header(lambda h: h[LN].pop("data_offsets")), "got a damaged one: 'data_offsets'"),
    "dtype": (edit_header(lambda h: h[LN].update(dtype="Q4")), f"{LN} is Q4, none of BOOL, U8"),
    "no file": (lambda src: (src / "model.safetensors").unlink(), "src: expected model.safetensors or .*, got neither"),
    "missing tensor": (drop("transformer.h.0.ln_1.bias"), "expected transformer.h.0.ln_1.bias in a model of 2 layers"),
    "integers": (convert(LN, "i4"), f"expected {LN} of F16, BF16, F32, F64, got I32"),
    "too many blocks": (
        lambda src: edit_config(src, n_layer=1),
        r"small: expected blocks below 1 by the config, got transformer\.h\.1\.",
    ),
    "missing shard": (
        shard(lambda src, _: (src / "model-1.safetensors").unlink()),
        "expected a shard that model.safetensors.index.json lists, got no file",
    ),
    "cut shard": (
        shard(lambda src, _: os.truncate(src / "model-1.safetensors", 5000)),
        "model-1.safetensors: expected .* bytes, got a damaged file of 5,000",
    ),
    "tensor not in its shard": (
        shard(lambda src, names: names.update(other="model-0.safetensors")),
        "model-0.safetensors: expected other, which model.safetensors.index.json lists",
    ),
    "tensor not in the index": (shard(lambda src, names: names.pop(LN)), f"index.json lists, got {LN} as well"),
    "shard elsewhere": (
        shard(lambda src, names: names.update(other="../model-0.safetensors")),
        "expected a weight_map from tensors to file names",
    ),
    "empty index": (shard(lambda src, names: names.clear()), "src: expected tensors in .*, got none"),
    "config": (lambda src: (src / "config.json").write_text("{"), "source_config: expected JSON, got"),
    "no config": (lambda src: (src / "config.json").unlink(), "source_config: expected a config, got no file"),
    "state of nothing": (
        save_states({"state.nothing.exp_avg": (2,)}),
        "optimizer.safetensors: expected state.PARAMETER.KEY, .*, got state.nothing.exp_avg",
    ),
    "unknown optimizer": (save_settings({"class": "Lion", "param_groups": []}), "expected Adam, AdamW, SGD, got Lion"),
    "damaged settings": (
        save_settings({"class": "SGD"}),
        "optimizer: expected the settings that save_optimizer writes",
    ),
    "settings without a learning rate": (
        save_settings({"class": "AdamW", "param_groups": [{"params": [LN], "weight_decay": 0.1, "eps": 1e-8}]}),
        "optimizer: expected the settings that save_optimizer writes",
    ),
    "unknown state": (save_states({f"state.{LN}.prodigy": (24,)}), f"expected state.* got state.{LN}.prodigy"),
    "shape of a state": (save_states({f"state.{LN}.exp_avg": (23,)}), r"of shape \(24,\), got \(23,\)"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoints(small: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(small)
    before = list_files(small.parent)
    with pytest.raises(ValueError, match=message):
        growth.grow_checkpoint(small, small.parent / "large", target_config=LARGER)
    assert list_files(small.parent) == before
    assert [path.name for path in small.parent.iterdir()] == ["small"]


REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "narrower": ({"n_embd": 12}, "target_config: expected n_embd of at least 24, got 12"),
    "shallower": ({"n_layer": 1}, "target_config: expected n_layer of at least 2, got 1"),
    "misspelled": ({"n_emdb": 48}, "target_config: expected 'n_embd', or another key of the config, got 'n_emdb'"),
    "misspelled in a whole config": (
        {"model_type": "gpt2", "n_layers": 4},
        "target_config: expected 'n_layer', or another key of the config, got 'n_layers'",
    ),
    "another architecture's key": (
        {"width": 48},
        "target_config: expected keys of the config or of sizes (n_embd, n_head, n_inner, n_layer), got 'width'",
    ),
    "vocabulary": ({"vocab_size": 64}, "target_config: expected vocab_size 50 as the source's, got 64"),
    "activation": (
        {"activation_function": "relu"},
        "target_config: expected activation_function 'gelu_new' as the source's, got 'relu'",
    ),
    "no number": ({"n_embd": "48"}, "target_config: expected an integer of at least 1 for 'n_embd', got '48'"),
    "no heads": ({"n_head": 0}, "target_config: expected an integer of at least 1 for 'n_head', got 0"),
    "heads": ({"n_head": 7}, "target_config: expected a width that 7 heads divide, got 24"),
    "attention": (
        {"scale_attn_by_inverse_layer_idx": True},
        "target_config: expected scale_attn_by_inverse_layer_idx False as the source's, got True",
    ),
    "cross attention": (
        {"add_cross_attention": True},
        "target_config: expected add_cross_attention False as the source's, got True",
    ),
    "class": (
        {"architectures": ["GPT2ForSequenceClassification"]},
        "target_config: expected architectures ['GPT2LMHeadModel'] as the source's, "
        "got ['GPT2ForSequenceClassification']",
    ),
    "eps": (
        {"n_embd": 32, "n_head": 8, "layer_norm_epsilon": 0.3},
        "target_config: expected layer_norm_epsilon 0.0075, which keeps the function, got 0.3",
    ),
    "unknown in a whole config": (
        {"model_type": "gpt2", "sliding_window": 8},
        "target_config: expected sliding_window None as the source's, got 8",
    ),
    "architecture": ({"model_type": "llama"}, "target_config: expected model_type 'gpt2' as the source's, got 'llama'"),
}


@pytest.mark.parametrize(("target", "message"), REQUESTS.values(), ids=REQUESTS)
def test_requests_that_cannot_be(small: Path, target: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        growth.grow_checkpoint(small, small.parent / "large", target_config=target)
    with pytest.raises(growth.Inexact, match="exact"):
        growth.grow_checkpoint(small, small.parent / "large", target_config=LARGER, mode="exact")
    assert [path.name for path in small.parent.iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("name", "target", "text"),
    [
        ("ViTModel", {"qkv_bias": False}, "target_config: expected qkv_bias True as the source's, got False"),
        ("ViTModel", {"pooler_act": "relu"}, "target_config: expected pooler_act 'tanh' as the source's, got 'relu'"),
        ("BertModel", {"is_decoder": True}, "target_config: expected is_decoder False as the source's, got True"),
        ("LlamaModel", {"attention_bias": True}, "target_config: expected attention_bias False .*, got True"),
        ("LlamaModel", {"mlp_bias": True}, "target_config: expected mlp_bias False as the source's, got True"),
        ("LlamaModel", {"intermediate_size": None}, "config: expected 'intermediate_size', got none"),
        ("LlamaModel", {"num_attention_heads": 8}, "6 heads on 6 keys -> 8 on 6; exact would be 6 keys, 1 or more"),
    ],
)
def test_settings_that_no_tensor_shows(tmp_path: Path, name: str, target: dict[str, Any], text: str) -> None:
    cls = getattr(transformers, name)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 6, "intermediate_size": 40}
    cls(cls.config_class(**sizes, **({"image_size": 16} if "ViT" in name else {"vocab_size": 50}))).save_pretrained(
        tmp_path / "small"
    )
    with pytest.raises(ValueError, match=text):
        growth.grow_checkpoint(tmp_path / "small", tmp_path / "large", target_config=target)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_verification_refuses_another_function(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = growth.Rule.apply
    monkeypatch.setattr(growth.Rule, "apply", lambda self, *arguments: apply(self, *arguments) * 1.01)
    with pytest.raises(ValueError, match="verify: expected outputs within 1e-05 of the largest, got a difference of"):
        growth.grow_checkpoint(small, small.parent / "large", target_config=LARGER, verify=True)
    assert [path.name for path in small.parent.iterdir()] == ["small"]
