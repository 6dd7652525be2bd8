"""Checkpoints grown on disk are the same as models grown in memory, by the function and by the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from checkpoints import DOUBLE, LARGER, build, edit_config, edit_header, list_files, read_all, train
from checkpoints import quiet as quiet
from checkpoints import small as small
from click.testing import CliRunner
from safetensors import safe_open

from pycodesign import growth
from pycodesign.cli import main
from pycodesign.growth import shards


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 20_000])
@pytest.mark.parametrize("source_shards", ["10GB", "20KB"])
def test_a_checkpoint_grows_as_the_model_does(tmp_path: Path, shard_bytes: int, source_shards: str) -> None:
    src, dst = tmp_path / "small", tmp_path / "large"
    model, larger = build(), build(**LARGER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer)
    model.save_pretrained(src, max_shard_size=source_shards)
    growth.save_optimizer(model, optimizer, src)
    (src / "tokenizer.json").write_text("{}")
    target_optimizer = torch.optim.AdamW(larger.parameters())
    growth.grow(model, larger, optimizer=optimizer, target_optimizer=target_optimizer)

    steps: list[tuple[int, int]] = []
    report = growth.grow_checkpoint(
        src,
        dst,
        target_config=LARGER,
        verify=True,
        max_shard_bytes=shard_bytes,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert report.difference is not None and report.difference < 1e-6
    assert {*report.files, "config.json", "generation_config.json", "tokenizer.json"} == set(list_files(dst))
    assert (len(report.files) > 2) == (shard_bytes == 20_000)
    assert all(file.stat().st_size < 30_000 for file in dst.glob("*.safetensors")) == (shard_bytes == 20_000)
    assert steps[-1] == (report.bytes_written, report.bytes_written) and steps == sorted(steps)

    loaded = transformers.GPT2LMHeadModel.from_pretrained(dst)
    assert loaded.config.n_layer == 3 and loaded.config.layer_norm_epsilon == larger.config.layer_norm_epsilon
    for (name, got), expected in zip(loaded.state_dict().items(), larger.state_dict().values(), strict=True):
        assert torch.equal(got, expected), name
    loaded_optimizer = torch.optim.AdamW(loaded.parameters())
    growth.load_optimizer(loaded, loaded_optimizer, dst)
    assert loaded_optimizer.param_groups[0]["lr"] == 1e-2
    for got, expected in zip(loaded.parameters(), larger.parameters(), strict=True):
        states = loaded_optimizer.state[got], target_optimizer.state[expected]
        assert states[0].keys() == states[1].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    build().to(dtype).save_pretrained(tmp_path / "small")
    report = growth.grow_checkpoint(tmp_path / "small", tmp_path / "large", target_config=LARGER, verify=True)
    assert report.difference is not None and report.difference < 2 * torch.finfo(dtype).eps + 1e-6
    with safe_open(tmp_path / "large" / "model.safetensors", "pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {dtype}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("LlamaForCausalLM", {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}),
        ("ViTModel", {"hidden_size": 36, "num_attention_heads": 9, "num_hidden_layers": 3}),
        ("BertForMaskedLM", {"hidden_size": 48, "num_attention_heads": 12, "intermediate_size": 80}),
    ],
)
def test_other_architectures(tmp_path: Path, name: str, target: dict[str, int]) -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 40}
    cls = getattr(transformers, name)
    options = {"image_size": 16, "patch_size": 8} if name == "ViTModel" else {"vocab_size": 50}
    heads = {"num_key_value_heads": 2, "head_dim": 4} if name == "LlamaForCausalLM" else {}
    cls(cls.config_class(**sizes, **options, **heads)).save_pretrained(tmp_path / "small")
    report = growth.grow_checkpoint(tmp_path / "small", tmp_path / "large", target_config=target, verify=True)
    assert report.difference is not None and report.difference < 1e-6
    if name == "BertForMaskedLM":
        with pytest.raises(growth.Inexact, match="num_hidden_layers: 2 -> 3, but no block of bert can be an identity"):
            growth.grow_checkpoint(tmp_path / "small", tmp_path / "deep", target_config={"num_hidden_layers": 3})


def test_old_names_of_norms(tmp_path: Path) -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 6, "intermediate_size": 40}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes))
    model.save_pretrained(tmp_path / "small")
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {name: np.ascontiguousarray(array) for name, array in read_all(tmp_path / "small").items()}
    for new, old in names.items():
        tensors = {name.replace(new, old): array for name, array in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "small" / "model.safetensors", {"format": "pt"})
    target = {"hidden_size": 48, "num_attention_heads": 12}
    report = growth.grow_checkpoint(tmp_path / "small", tmp_path / "large", target_config=target, verify=True)
    assert report.difference is not None and report.difference < 1e-6


def test_metadata_that_is_null(small: Path) -> None:
    edit_header(lambda header: header.update(__metadata__=None))(small)
    names = safetensors.numpy.load_file(small / "model.safetensors")
    (small / "model.safetensors").rename(small / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (small / "model.safetensors.index.json").write_text(json.dumps(index))
    growth.grow_checkpoint(small, small.parent / "large", target_config=LARGER, dry_run=True)


def test_tied_layers_of_configs_that_name_no_class(small: Path, tmp_path: Path) -> None:
    edit_config(small, architectures=None)
    text = "source_config: expected a class of transformers in architectures, .* false, got None"
    with pytest.raises(ValueError, match=text):
        growth.grow_checkpoint(small, tmp_path / "large", target_config=DOUBLE)
    build().transformer.save_pretrained(tmp_path / "features")
    tensors = safetensors.numpy.load_file(small / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    safetensors.numpy.save_file(tensors, small / "model.safetensors", {"format": "pt"})
    config = {**json.loads((small / "config.json").read_text()), "architectures": ["GPT2LMHeadModel"]}
    growth.grow_checkpoint(small, tmp_path / "large", target_config=DOUBLE)
    grown = json.loads((tmp_path / "large" / "config.json").read_text())
    models = [
        transformers.GPT2LMHeadModel.from_pretrained(path, config=transformers.GPT2Config.from_dict(values)).eval()
        for path, values in ((small, config), (tmp_path / "large", grown))
    ]
    x = torch.arange(16)[None]
    torch.testing.assert_close(models[1](x).logits, models[0](x).logits)
    growth.grow_checkpoint(tmp_path / "features", tmp_path / "larger", target_config=DOUBLE, verify=True)


def test_few_positions_are_verified(tmp_path: Path) -> None:
    build(n_positions=5).save_pretrained(tmp_path / "small")
    report = growth.grow_checkpoint(tmp_path / "small", tmp_path / "large", target_config=LARGER, verify=True)
    assert report.difference is not None and report.difference < 1e-6


def test_layer_scale_vectors_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = growth.Spec(
        "scaled",
        {
            "embed": growth.linear(None, "stream"),
            "blocks.*.fc1": growth.linear("stream", "hidden"),
            "blocks.*.fc2": growth.linear("hidden", "stream", factor="blocks.*.ls.gamma"),
            "blocks.*.ls": growth.layer_scale("stream"),
            "norm": growth.layer_norm("stream"),
            "head": growth.linear("stream", None),
        },
        spaces={"stream": "mean"},
        blocks={"blocks.*": 0},
        silence=["blocks.*.fc2"],
        config={"stream": "width", "hidden": "hidden", "heads": "heads", "layers": "layers"},
    )
    rng = np.random.default_rng(0)
    shapes = {"embed.weight": (4, 3), "norm.weight": (4,), "norm.bias": (4,), "head.weight": (2, 4)}
    for block in range(2):
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in (("fc1.weight", (6, 4)), ("fc2.weight", (4, 6)))}
        shapes[f"blocks.{block}.ls.gamma"] = (4,)
    old = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    (tmp_path / "small").mkdir()
    safetensors.numpy.save_file(old, tmp_path / "small" / "model.safetensors")
    reads: list[str] = []
    read = shards.Tensor.read
    monkeypatch.setattr(shards.Tensor, "read", lambda self: reads.append(self.name) or read(self))
    report = growth.grow_checkpoint(
        tmp_path / "small",
        tmp_path / "large",
        source_config={"width": 4, "hidden": 6, "heads": 1, "layers": 2, "eps": 1e-5},
        target_config={"width": 6, "layers": 4},
        spec=replace(spec, config=spec.config | {"eps": "eps"}),
    )
    assert sorted(reads) == sorted(old)
    new = read_all(tmp_path / "large")
    assert {name: array.shape for name, array in new.items()} == {rule.name: rule.shape for rule in report.plan}
    for rule in report.plan:
        np.testing.assert_array_equal(new[rule.name], rule.apply(old[rule.source], old.get(rule.factor)))
    assert any(rule.factor for rule in report.plan)


# ---- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main, ["grow", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command(small: Path, tmp_path: Path) -> None:
    target, large = tmp_path / "target.json", tmp_path / "large"
    target.write_text(json.dumps(LARGER))
    printed = run(small, large, "--target", target, "--dry-run")
    assert "transformer.h.2.mlp.c_proj.weight" in printed and "nothing was written" in printed
    assert not large.exists()
    result = json.loads(run(small, large, "--target", target, "--verify", "--json"))
    assert result["difference"] < 1e-6 and result["config"]["n_embd"] == 36
    assert result["files"] == ["model.safetensors"]
    assert {entry["name"]: entry["to"] for entry in result["parameters"]}["transformer.wte.weight"] == [50, 36]
    failed = CliRunner().invoke(main, ["grow", str(small), str(large), "--target", str(target)])
    assert failed.exit_code == 1 and "dst: expected a new directory, or overwrite" in failed.stderr
    assert "in 1 files; outputs differ by" in run(small, large, "--target", target, "--overwrite", "--verify")
