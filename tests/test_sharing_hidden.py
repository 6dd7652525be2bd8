"""What goes wrong without a word: activations in place, copies, tasks and labels that do not fit, halves of files."""

from __future__ import annotations

import copy
import io
import json
import types

import numpy as np
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel

from pycodesign import ops, sharing
from pycodesign.sharing.files import compute_digest

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VOCABULARY = 20


def make_stack(width: int = 16, layers: int = 2, mlp: int = 32, **options) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 2, mlp, batch_first=True, **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def make_bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **SIZES)).eval()


class Own(nn.Module):
    """A backbone of one's own."""

    def __init__(self, stack: nn.TransformerEncoder | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.encoder = make_stack() if stack is None else stack

    def embed(self, input_ids):
        return self.embedding(input_ids)


def change(tasks: sharing.MultiTask) -> sharing.MultiTask:
    """Give all deltas values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tasks.tasks.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tasks.eval()


def select(tasks: sharing.MultiTask, inputs) -> None:
    labels = torch.arange(len(inputs)) % 2
    for name in tasks.tasks:
        tasks.select_mask(name, [(inputs, labels)], F.cross_entropy, scope="matrix")


@pytest.mark.parametrize("positions", ["mean", "first"])
@pytest.mark.parametrize("delta", [{"up": "dense"}, {"up": "rows"}, {"up": "low_rank", "down": "dense"}], ids=str)
def test_activations_in_place(delta, positions):
    names = dict.fromkeys("abc", 2)
    stack = make_stack(activation=nn.ReLU(inplace=True))
    tasks = sharing.MultiTask(stack, names, delta=delta, positions=positions, density=0.16, rank=1)
    x = torch.randn(3, 5, 16)
    if "rows" in delta.values():
        select(tasks, x)
    change(tasks)
    engine = tasks.build_engine()
    served, expected = engine(x), tasks(x)
    for name in names:
        torch.testing.assert_close(served[name], expected[name], atol=2e-6, rtol=1e-5)
        assert torch.equal(engine(x, tasks=[name])[name], served[name])
    _, (first, _) = tasks.encoder.run({"inputs_embeds": x})
    torch.testing.assert_close(first.z, tasks.encoder.layers[0].projections["up"](first.a))


@pytest.mark.parametrize("make", [make_bert, Own], ids=["transformers", "own"])
def test_copies_embed_by_their_own_weights(make):
    tasks = change(sharing.MultiTask(make(), {"tone": 2}, delta="low_rank"))
    ids = torch.arange(10).view(2, 5)
    expected = tasks(ids)["tone"]
    file = io.BytesIO()
    torch.save(tasks, file)
    file.seek(0)
    copies = [copy.deepcopy(tasks), torch.load(file, weights_only=False)]
    with torch.no_grad():
        tasks.backbone.get_parameter(next(name for name, _ in tasks.backbone.named_parameters())).zero_()
    for own in copies:
        assert own.hash != tasks.hash
        assert torch.equal(own(ids)["tone"], expected)


def test_tasks_of_other_backbones():
    tasks = sharing.MultiTask(make_stack(), {}, delta="dense")
    engine = tasks.build_engine()
    for stack, message in (
        (make_stack(width=32), "task: expected one of a backbone of 16 features, got 32"),
        (make_stack(layers=3), "task: expected one of a backbone of 2 layers, got 3"),
        (make_stack(mlp=64), r"task: expected a delta \(32, 16\) of 0.up, got \(64, 16\)"),
        (make_stack(norm_first=True), r"task: expected one of the backbone \w{12}\.\.\., got one of"),
    ):
        task = sharing.MultiTask(stack, {"tone": 2}, delta="dense").get_task("tone")
        for add in (tasks.insert_task, engine.add_task):
            with pytest.raises(ValueError, match=message):
                add("tone", task)
    assert not tasks.tasks and not engine.tasks
    for stack in (make_stack(), tasks.backbone):  # of the same weights, and the same
        same = sharing.MultiTask(stack, {"tone": 2}, delta="dense")
        engine.add_task("tone", same.get_task("tone"))
        engine.add_task("copy", copy.deepcopy(same.get_task("tone")))
    assert engine.tasks == ["tone", "copy"]


def test_engines_have_copies_of_rows():
    tasks = sharing.MultiTask(make_stack(), {"tone": 2}, delta={"up": "rows"}, density=0.1)
    x = torch.randn(3, 5, 16)
    select(tasks, x)
    change(tasks)
    engine = tasks.build_engine()
    expected = engine(x)["tone"]
    for delta in tasks.get_task("tone").list_deltas().values():
        delta.rows.copy_(torch.arange(len(delta.rows)) + (0 if delta.rows[0] else 1))
    assert torch.equal(engine(x)["tone"], expected)


def test_labels_of_a_regression():
    spec = sharing.TaskSpec(1, kind="regression")
    logits, labels = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1, 3, 2])
    for own in (labels, labels[:, None]):
        assert sharing.compute_loss(spec, logits, own).item() == pytest.approx(5 / 3)
    for own in (labels[:2], labels[None], labels[0]):
        with pytest.raises(ValueError, match=r"labels: expected \(3,\), got"):
            sharing.compute_loss(spec, logits, own)


@pytest.mark.parametrize("kind", ["csr", "csc", "bsr"])
def test_entries_behind_the_last_row_do_not_count(kind):
    dense = np.arange(16, dtype=np.float32).reshape(4, 4) * np.array([0, 1, 0, 1], np.float32)
    matrix = scipy.sparse.coo_array(dense).asformat(kind)
    matrix.indices = np.append(matrix.indices, np.zeros(50, matrix.indices.dtype))
    matrix.data = np.append(matrix.data, np.full((50, *matrix.data.shape[1:]), 7, np.float32), axis=0)
    for _ in range(3):
        packed = ops.prepack_deltas([matrix])
        assert np.array_equal(ops.delta_linear(np.eye(4, dtype=np.float32), None, packed)[0], dense.T)


LARGEST = np.float32(float.fromhex("0x1.fep127"))  # of bfloat16
BEYOND = np.float32(float.fromhex("0x1.ffp127"))


@pytest.mark.parametrize("make", [scipy.sparse.csr_array, np.ascontiguousarray, lambda w: (w, np.eye(2, dtype="f4"))])
def test_values_beyond_bfloat16(make):
    for sign in (1, -1):
        w = np.array([[0, sign * BEYOND], [1, 2]], np.float32)
        ops.prepack_deltas([make(w)])
        with pytest.raises(ValueError, match=r"expected values that are finite in bfloat16, too, got -?3\.39"):
            ops.prepack_deltas([make(w)], dtype="bfloat16")
        w[0, 1] = sign * np.nextafter(BEYOND, np.float32(0))
        packed = ops.prepack_deltas([make(w)], dtype="bfloat16")
        assert ops.delta_linear(np.eye(2, dtype="f4"), None, packed)[0, 1, 0] == sign * LARGEST


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_files_of_converted_tasks(dtype, tmp_path):
    tasks = change(sharing.MultiTask(make_bert(), {"tone": 2}, delta="low_rank", rank=1))
    tasks.tasks.to(dtype)
    tasks.save_pretrained(tmp_path)
    again = sharing.MultiTask.from_pretrained(tasks.backbone, tmp_path)
    sharing.export_adapter(tasks, "tone", tmp_path / "adapter")
    sharing.import_adapter(again, tmp_path / "adapter", "adapter")
    for name in again.tasks:
        for key, value in again.get_task(name).state_dict().items():
            assert torch.equal(value, tasks.get_task("tone").state_dict()[key].float())


def test_save_writes_all_tasks_or_none(tmp_path):
    stack = make_stack()
    tasks = sharing.MultiTask(stack, {"first": 2}, delta="dense")
    tasks.add_task("second", 2, delta="sparse")
    with pytest.raises(ValueError, match="second: expected a mask"):
        tasks.save_pretrained(tmp_path)
    tasks = sharing.MultiTask(stack, {"first": 2, "second": 2}, delta="dense")
    with torch.no_grad():
        tasks.get_task("second").head.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"second: expected finite values, got others in head\.bias"):
        tasks.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["type", "train", "keys", "pop", "forward", "half", "cpu", "training"])
def test_names_that_torch_has_taken(name, tmp_path):
    tasks = sharing.MultiTask(make_stack(), {"tone": 2}, delta="dense")
    message = f"name: expected one that torch.nn.ModuleDict takes, got '{name}'"
    with pytest.raises(ValueError, match=message):
        tasks.add_task(name, 2)
    (path,) = tasks.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        tasks.load_task(path, name)


@pytest.mark.parametrize("config", [{"width": 16}, types.SimpleNamespace(width=16), "small"])
def test_own_backbones_may_have_a_config(config):
    own = Own()
    own.config = config
    assert sharing.MultiTask(own, {"tone": 2})(torch.zeros(2, 3, dtype=torch.long))["tone"].shape == (2, 2)


class Doubled(nn.TransformerEncoderLayer):
    """Torch's layer, and then something else."""

    def forward(self, *arguments, **options):
        return 2 * super().forward(*arguments, **options)


def test_layers_that_do_something_else():
    stack = nn.TransformerEncoder(Doubled(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False)
    hooked = make_stack()
    hooked.layers[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    for wrong in (stack, Own(stack), hooked, Own(hooked)):
        with pytest.raises(ValueError, match="outputs that differ from those by"):
            sharing.read_encoder(wrong)


def test_backbones_are_read_as_they_compute_in_evaluation():
    backbone = make_bert().train()
    sharing.read_encoder(backbone)
    assert all(module.training for module in backbone.modules())
    sharing.MultiTask(backbone, {})
    assert not any(module.training for module in backbone.modules())


def test_a_refused_backbone_stays_as_it_is():
    for backbone, options in (
        (nn.TransformerEncoder(Doubled(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False), {}),
        (nn.Linear(2, 2), {}),
        (make_stack(), {"delta": "full"}),
    ):
        with pytest.raises((TypeError, ValueError)):
            sharing.MultiTask(backbone.train(), {"tone": 2}, **options)
        assert all(module.training for module in backbone.modules())
        assert all(parameter.requires_grad for parameter in backbone.parameters())


def make_adapter(path) -> tuple[sharing.MultiTask, dict]:
    kinds = {"query": "low_rank", "value": "low_rank"}
    tasks = change(sharing.MultiTask(make_bert(), {"tone": 2}, delta=kinds, rank=2))
    sharing.export_adapter(tasks, "tone", path)
    return tasks, json.loads((path / "adapter_config.json").read_text())


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


@pytest.mark.parametrize("delta", ["none", "dense"])
def test_labels_of_tokens_keep_their_places_in_a_cache(delta):
    tasks = change(sharing.MultiTask(make_bert(), {"names": ("tokens", 3)}, delta=delta))
    ids = torch.arange(18).view(3, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = tasks(inputs)["names"]
    cache = tasks.cache("names", [inputs], dtype=None)
    assert cache.lengths == [4, 3, 5]
    for rows in ([0, 1, 2], [2, 1], [1]):
        features = cache[rows]
        length = features.mask.shape[1]
        assert torch.equal(features.mask, mask[rows, :length].bool())
        got, tokens = tasks.run("names", features), features.mask
        torch.testing.assert_close(got[tokens], expected[rows][:, :length][tokens], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.bool, torch.bfloat16])
def test_variances_of_other_dtypes(dtype, tmp_path):
    tasks = sharing.MultiTask(make_stack(), {"tone": 2}, delta="none", aggregator="concat")
    (path,) = tasks.save_pretrained(tmp_path)
    tensors, key = load_file(path), "aggregator.norm.running_var"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors[key] = tensors[key].to(dtype)
    save_file(tensors, path, {**metadata, "digest": compute_digest(tensors, metadata["spec"])})
    with pytest.raises(ValueError, match=f"{key}: expected float32"):
        tasks.load_task(path, "again")


def test_models_for_trainers_take_positions():
    tasks = sharing.MultiTask(make_bert(), {"tone": 2}, delta="none")
    model = tasks.task_model("tone").eval()
    ids, places = torch.arange(10).view(2, 5), torch.arange(5).flip(0).expand(2, 5)
    inputs = {"input_ids": ids, "position_ids": places}
    assert torch.equal(model(**inputs)["logits"], tasks.eval()(inputs)["tone"])
    assert not torch.equal(model(**inputs)["logits"], model(ids)["logits"])


def test_wrong_kinds_of_arguments(tmp_path):
    tasks = sharing.MultiTask(make_bert(), {"tone": 2}, delta="none")
    engine, ids = tasks.build_engine(), torch.arange(10).view(2, 5)
    for call in (tasks, engine):
        for arguments, options, message in (
            ((ids.tolist(),), {}, "inputs: expected a tensor, or tensors by name, got list"),
            ((None,), {}, "inputs: expected a tensor, or tensors by name, got NoneType"),
            (({"input_ids": ids.tolist()},), {}, "input_ids: expected a tensor, got list"),
            (({"input_ids": ids, "token_type_ids": 0},), {}, "token_type_ids: expected a tensor, got int"),
            ((ids, [[1] * 5] * 2), {}, "attention_mask: expected a tensor, got list"),
            ((ids,), {"tasks": "tone"}, "tasks: expected a sequence of names, got 'tone'"),
            ((ids,), {"tasks": 3}, "tasks: expected a sequence of names, got 3"),
        ):
            with pytest.raises(TypeError, match=message):
                call(*arguments, **options)
    for call in (lambda: tasks.build_engine("tone"), lambda: tasks.save_pretrained(tmp_path, "tone")):
        with pytest.raises(TypeError, match="tasks: expected a sequence of names, got 'tone'"):
            call()


def test_dropout_of_tasks_that_are_read(tmp_path):
    tasks, _ = make_adapter(tmp_path / "adapter")
    tasks.save_pretrained(tmp_path)
    again = sharing.MultiTask.from_pretrained(tasks.backbone, tmp_path, dropout=0.0)
    sharing.import_adapter(again, tmp_path / "adapter", "adapter")
    again.add_task("new", 2)
    assert [again.get_task(name).dropout.p for name in ("tone", "adapter", "new")] == [0.0] * 3
