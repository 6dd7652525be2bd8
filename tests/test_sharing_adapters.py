"""Low-rank tasks as adapters of peft: through peft and back, ranks and patterns, those that are refused."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import sharing_models
import torch
from safetensors.torch import load_file, save_file
from sharing_models import TWO_LAYERS as SIZES
from sharing_models import change, make_bert, make_stack
from torch import nn
from transformers import BertConfig, BertModel

from pycodesign import sharing

# peft reads an attribute that transformers renames
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

LOW_RANK = {"query": "low_rank", "value": "low_rank", "down": "low_rank"}
backbone, texts = sharing_models.shallow, sharing_models.sentences


def make_adapter_task(backbone) -> sharing.MultiTask:
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta=LOW_RANK, rank=3).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tasks.task_parameters("tone"):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tasks


def make_adapter(path) -> tuple[sharing.MultiTask, dict]:
    kinds = {"query": "low_rank", "value": "low_rank"}
    tasks = change(sharing.MultiTask(make_bert(), {"tone": 2}, delta=kinds, rank=2))
    sharing.export_adapter(tasks, "tone", path)
    return tasks, json.loads((path / "adapter_config.json").read_text())


def test_adapters_round_trip(backbone, texts, tmp_path):
    """Through peft itself: it reads the adapter, and writes it again."""
    tasks = make_adapter_task(backbone)
    expected = tasks(texts)["tone"]
    sharing.export_adapter(tasks, "tone", tmp_path / "first")
    model = peft.PeftModel.from_pretrained(backbone, tmp_path / "first")
    module = model.base_model.model.encoder.layer[1].output.dense
    delta = tasks.get_task("tone").list_deltas()["1.down"]
    torch.testing.assert_close(module.get_delta_weight("default"), delta.up @ delta.down)
    model.save_pretrained(tmp_path / "second")
    model.unload()
    (tmp_path / "second" / "sharing.safetensors").write_bytes((tmp_path / "first/sharing.safetensors").read_bytes())
    for folder in ("first", "second"):
        again = sharing.MultiTask(backbone, {}).eval()
        sharing.import_adapter(again, tmp_path / folder, "tone")
        assert torch.equal(again(texts)["tone"], expected)


def test_scaled_adapters(backbone, texts, tmp_path):
    tasks = make_adapter_task(backbone)
    tasks.add_task("mixed", 2, delta=LOW_RANK, rank=None, density=0.3)  # 5 and 6
    sharing.export_adapter(tasks, "mixed", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] and config["rank_pattern"] == config["alpha_pattern"]
    config["lora_alpha"] *= 2
    config["alpha_pattern"] = {name: 2 * rank for name, rank in config["rank_pattern"].items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    sharing.import_adapter(tasks, tmp_path, "again")
    deltas = tasks.get_task("mixed").list_deltas(), tasks.get_task("again").list_deltas()
    assert all(torch.equal(2 * deltas[0][place].up, deltas[1][place].up) for place in deltas[0])


def test_patterns_of_adapters(tmp_path):
    """Keys are expressions for the ends of modules' names, as in peft."""
    tasks, config = make_adapter(tmp_path)
    for number, (pattern, scales) in enumerate(
        (
            (None, {"query": 1, "value": 1}),
            ({"query": 4}, {"query": 2, "value": 1}),
            ({"self.query": 4, ".*value": 8}, {"query": 2, "value": 4}),
            ({"layer.0.attention.self.(query|value)": 8}, {"query": 4, "value": 4}),
            ({"uery": 8}, {"query": 1, "value": 1}),
        )
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": pattern}))
        sharing.import_adapter(tasks, tmp_path, f"again{number}")
        own, expected = (tasks.get_task(name).list_deltas() for name in (f"again{number}", "tone"))
        for projection, scale in scales.items():
            assert torch.equal(own[f"0.{projection}"].up, scale * expected[f"0.{projection}"].up)


def test_adapters_of_a_backbone_that_has_one(tmp_path):
    """peft renames the modules that it puts adapters into; files have the names of before."""
    bert = make_bert()
    tasks = change(sharing.MultiTask(bert, {"tone": 2}, delta={"query": "low_rank"}, rank=2))
    sharing.export_adapter(tasks, "tone", tmp_path / "before")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["query"]), bert)
    sharing.export_adapter(tasks, "tone", tmp_path / "after")
    one, other = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("before", "after"))
    assert one == other
    assert (
        load_file(tmp_path / "before/adapter_model.safetensors").keys()
        == load_file(tmp_path / "after/adapter_model.safetensors").keys()
    )
    sharing.import_adapter(tasks, tmp_path / "after", "again")


def test_adapters_of_projections_that_are_modules(tmp_path):
    """Queries, keys and values of torch's encoder are one weight, which a task need not change."""
    tasks = change(sharing.MultiTask(make_stack(), {"tone": 2}, delta={"up": "low_rank", "down": "low_rank"}))
    sharing.export_adapter(tasks, "tone", tmp_path)
    sharing.import_adapter(tasks, tmp_path, "again")
    x = torch.randn(2, 5, 16)
    assert torch.equal(tasks(x)["again"], tasks(x)["tone"])


def test_dropout_of_tasks_that_are_read(tmp_path):
    tasks, _ = make_adapter(tmp_path / "adapter")
    tasks.save_pretrained(tmp_path)
    again = sharing.MultiTask.from_pretrained(tasks.backbone, tmp_path, dropout=0.0)
    sharing.import_adapter(again, tmp_path / "adapter", "adapter")
    again.add_task("new", 2)
    assert [again.get_task(name).dropout.p for name in ("tone", "adapter", "new")] == [0.0] * 3


def test_ordinary_adapters_are_refused(backbone, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query", "value"])
    peft.get_peft_model(BertModel(BertConfig(**SIZES)), config).save_pretrained(tmp_path)
    tasks = sharing.MultiTask(backbone, {})
    with pytest.raises(ValueError, match="one exact pass for several tasks is impossible"):
        sharing.import_adapter(tasks, tmp_path, "tone")
    adapted = peft.get_peft_model(BertModel(BertConfig(**SIZES)), config).base_model.model
    with pytest.raises(TypeError, match="backbone: expected plain weights, got adapters"):
        sharing.read_encoder(adapted)


def test_adapters_trained_the_ordinary_way_since_are_refused(backbone, texts, tmp_path):
    tasks = make_adapter_task(backbone)
    sharing.export_adapter(tasks, "tone", tmp_path)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path, is_trainable=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**texts).last_hidden_state[..., 0].sum().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected the factors that were exported, got others. .* impossible"):
        sharing.import_adapter(tasks, tmp_path, "again")


def test_damaged_adapters(backbone, tmp_path):
    tasks = make_adapter_task(backbone)
    sharing.export_adapter(tasks, "tone", tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    weights, text = load_file(file), config.read_text()
    key = "base_model.model.encoder.layer.0.attention.self.query.lora_B.weight"

    def refuse(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            sharing.import_adapter(tasks, tmp_path, "again")
        assert list(tasks.tasks) == ["tone"]

    for changed, message in (
        ({key: None}, "expected lora_A and lora_B of encoder.layer.0.attention.self.query, got none"),
        ({key: torch.zeros(31, 3)}, r"0.query: up: expected float32 \(32, 3\), got float32 \(31, 3\)"),
        ({key: torch.full((32, 3), torch.inf)}, "0.query: up: expected finite values"),
        (
            {key.replace("_B", "_A"): torch.tensor(1.0)},
            r"expected a matrix lora_A of encoder.*query, got one of shape \(\)",
        ),
        ({"other": torch.zeros(1)}, "expected no other tensors, got other"),
    ):
        save_file({k: v for k, v in {**weights, **changed}.items() if v is not None}, file)
        refuse(message)
    save_file(weights, file)
    for fields, message in (
        ({"peft_type": "IA3"}, "expected a LoRA adapter, got IA3"),
        ({"use_dora": True}, "expected plain LoRA, got use_dora=True"),
        ({"bias": "all"}, "expected bias='none', got 'all'"),
        ({"r": 0}, "expected a positive r"),
    ):
        config.write_text(json.dumps({**json.loads(text), **fields}))
        refuse(message)
    config.unlink()
    refuse("expected adapter_config.json and adapter_model.safetensors")


def test_configs_of_adapters_that_are_wrong(tmp_path):
    tasks, config = make_adapter(tmp_path)
    for fields, message in (
        ({"rank_pattern": {"query": 0}}, "path: expected positive numbers by module in rank_pattern"),
        ({"rank_pattern": {"query": "4"}}, "path: expected positive numbers by module in rank_pattern"),
        ({"alpha_pattern": [1]}, "path: expected positive numbers by module in alpha_pattern"),
        ({"alpha_pattern": {"(": 1}}, "path: expected names or expressions in alpha_pattern"),
        ({"alpha_pattern": {"(?i)query": 1}}, "path: expected names or expressions in alpha_pattern"),
        ({"r": 10**400}, "path: expected a positive r"),
        ({"r": True}, "path: expected a positive r"),
        ({"lora_alpha": float("inf")}, "path: expected a positive lora_alpha"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **fields}))
        with pytest.raises(ValueError, match=message):
            sharing.import_adapter(tasks, tmp_path, "again")
    (tmp_path / "adapter_config.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"path: expected adapter_config\.json"):
        sharing.import_adapter(tasks, tmp_path, "again")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights = tmp_path / "adapter_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match=r"expected float32 .* got bfloat16"):
        sharing.import_adapter(tasks, tmp_path, "again")
    assert list(tasks.tasks) == ["tone"]


def test_ranks_that_factors_do_not_have(tmp_path):
    tasks = change(sharing.MultiTask(make_bert(), {"tone": 2}, delta={"query": "low_rank"}, rank=2))
    sharing.export_adapter(tasks, "tone", tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 4, "lora_alpha": 4}))
    with pytest.raises(
        ValueError, match=r"expected r=2 of encoder\.layer\.0\.attention\.self\.query, as its factors, g"
    ):
        sharing.import_adapter(tasks, tmp_path, "again")


def test_what_cannot_be_exported(backbone, tmp_path):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta="dense")
    with pytest.raises(ValueError, match="expected a task whose deltas are all low-rank, got dense"):
        sharing.export_adapter(tasks, "tone", tmp_path)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    fused = sharing.MultiTask(plain, {"tone": 2}, delta="low_rank")
    with pytest.raises(ValueError, match="expected a module for each projection"):
        sharing.export_adapter(fused, "tone", tmp_path)
    assert not list(tmp_path.iterdir())
