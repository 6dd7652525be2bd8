"""Search for what is shared, its costs, and peft's files."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel

from pycodesign import sharing
from pycodesign.sharing.encoders import PROJECTIONS

# peft reads an attribute that transformers renames
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
KINDS = ("sparse", "low_rank", "dense")
COSTS = {"sparse": 2.0, "low_rank": 1.0, "dense": 5.0}
LOW_RANK = {"query": "low_rank", "value": "low_rank", "down": "low_rank"}


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES)).eval()


@pytest.fixture
def texts():
    return {"input_ids": torch.randint(50, (8, 6), generator=torch.Generator().manual_seed(1))}


@pytest.fixture
def table():
    return sharing.CostTable({p: dict(COSTS) for p in PROJECTIONS}, 100.0, 16, "mean")


def test_measured_costs(backbone):
    encoder = sharing.MultiTask(backbone, {}).encoder
    for positions in ("mean", "first", "all"):
        table = sharing.measure_costs(encoder, tokens=8, positions=positions, rounds=3, kinds=("rows", *KINDS))
        assert table.seconds.keys() == set(PROJECTIONS)
        assert table.backbone > 0
        assert all(seconds >= 0 for row in table.seconds.values() for seconds in row.values())
        assert sharing.CostTable.from_json(table.to_json()) == table
        assert str(table).startswith("per cent of a pass")
    with pytest.raises(ValueError, match="kinds: expected some of sparse, rows, low_rank, dense, got full"):
        sharing.measure_costs(encoder, kinds=("full",))
    with pytest.raises(ValueError, match="text: expected the fields"):
        sharing.CostTable.from_json("{}")


def test_operations(backbone):
    tasks = sharing.MultiTask(backbone, {"none": 2}, delta="none")
    tasks.add_task("up", 2, delta={"up": "dense"})
    tasks.add_task("first", 2, delta={"up": "dense"}, positions="first")
    encoder, width, inner, tokens = tasks.encoder, 32, 64, 10
    layer = tokens * (4 * width * width + 2 * width * inner) + 2 * tokens * tokens * width
    assert sharing.count_operations(encoder, tokens) == 2 * layer
    least = 3 * 2 * width + 2 * width
    assert sharing.count_operations(encoder, tokens, tasks.get_task("none")) == least
    entries = width * inner + inner  # and a bias
    pooled = tokens * entries + tokens * inner + width * inner
    assert sharing.count_operations(encoder, tokens, tasks.get_task("up")) == least + 2 * pooled
    assert sharing.count_operations(encoder, tokens, tasks.get_task("first")) == least + 2 * (entries + width * inner)


@pytest.mark.parametrize("target", [0.02, 0.1, 1.0])
def test_search_keeps_the_target(backbone, texts, table, target):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, density=0.1).eval()
    labels = (texts["input_ids"][:, 0] > 25).long()
    found = tasks.search("tone", [(texts, labels)] * 3, F.cross_entropy, costs=table, target=target, epochs=4)
    task = tasks.get_task("tone")
    assert found.choices.keys() == {f"{n}.{p}" for n in range(2) for p in PROJECTIONS}
    assert {place: kind for place, kind in found.choices.items() if kind != "reuse"} == dict(task.spec.deltas)
    assert found.cost == pytest.approx(table.compute_share(dict(task.spec.deltas)))
    assert found.cost <= target
    assert all(sum(own.values()) == pytest.approx(1) for own in found.probabilities.values())
    assert f"{found.shared:.0%} of the projections are shared" in str(found)
    assert len(found.losses) == 12 and found.losses[-1] < found.losses[0]
    torch.testing.assert_close(tasks.build_engine()(texts)["tone"], tasks(texts)["tone"], atol=2e-6, rtol=1e-5)


def test_search_learns_where_the_difference_is(backbone, texts, table):
    """The labels are those of a task that differs in one projection; differing elsewhere costs, and does not help."""
    teacher = sharing.MultiTask(backbone, {"tone": 2}, delta={"down": "dense"}, layers=[1]).eval()
    task = teacher.get_task("tone")
    with torch.no_grad():
        task.list_deltas()["1.down"].values.normal_(std=0.5)
    labels = teacher(texts)["tone"].detach().argmax(1)
    tasks = sharing.MultiTask(backbone, {"tone": 2}, density=0.1).eval()
    tasks.get_task("tone").head.load_state_dict(task.head.state_dict())
    options = {"costs": table, "target": 0.05, "epochs": 30, "kinds": ("dense",)}
    found = sharing.search(tasks, "tone", [(texts, labels)] * 3, F.cross_entropy, **options)
    assert found.cost <= 0.05
    assert (tasks(texts)["tone"].argmax(1) == labels).all()


def test_wrong_searches(backbone, texts, table):
    tasks = sharing.MultiTask(backbone, {"tone": 2})
    batches = [(texts, torch.zeros(8, dtype=torch.long))]
    small = sharing.CostTable({p: {"sparse": 1.0} for p in PROJECTIONS}, 1.0, 16, "mean")
    for changed, message in (
        ({"batches": []}, "batches: expected at least one batch"),
        ({"target": 0}, "target: expected a positive number of passes, got 0"),
        ({"kinds": ("rows",)}, "kinds: expected some of sparse, low_rank, dense, got rows"),
        ({"costs": small}, "costs: expected a table with sparse, low_rank, dense, got none of low_rank"),
        ({"loss": lambda y, _: y.sum() * torch.inf}, "loss: expected finite"),
    ):
        options = {"batches": batches, "loss": F.cross_entropy, "costs": table, "target": 0.1, **changed}
        own, loss = options.pop("batches"), options.pop("loss")
        with pytest.raises(ValueError, match=message):
            sharing.search(tasks, "tone", own, loss, **options)


def test_a_failed_search_leaves_the_task_as_it_was(backbone, texts, table):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta="low_rank").eval()
    task, labels = tasks.get_task("tone"), torch.zeros(8, dtype=torch.long)
    spec, before, steps = task.spec, tasks(texts)["tone"], iter(range(20))

    def fail(logits, labels):
        return F.cross_entropy(logits, labels) * (torch.nan if next(steps) > 4 else 1)

    with pytest.raises(ValueError, match="loss: expected finite"):
        sharing.search(tasks, "tone", [(texts, labels)] * 2, fail, costs=table, target=0.5, epochs=4)
    assert task.spec is spec and torch.equal(tasks(texts)["tone"], before)


def make_adapter_task(backbone) -> sharing.MultiTask:
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta=LOW_RANK, rank=3).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tasks.task_parameters("tone"):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tasks


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
