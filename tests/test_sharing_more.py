"""What must not pass for the same: selections, backbones that compute something else, tasks and files of others."""

from __future__ import annotations

import copy
import functools
import json
import threading

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_sharing_hidden import SIZES, VOCABULARY, Own, change, make_bert, make_stack
from torch import nn
from transformers import RobertaConfig, RobertaModel, ViTConfig, ViTModel

from pycodesign import ops, sharing
from pycodesign.sharing.encoders import PROJECTIONS


def count_entries(tasks: sharing.MultiTask, name: str) -> dict[str, int]:
    return {place: delta.values.numel() for place, delta in tasks.get_task(name).list_deltas().items()}


@pytest.mark.parametrize("delta", ["sparse", {"up": "rows", "down": "sparse", "value": "low_rank"}], ids=str)
def test_a_selection_is_the_same_each_time(delta, tmp_path):
    """Also of places that one before has left empty, and of a task that was read."""
    tasks = sharing.MultiTask(make_bert(), {"tone": 2}, delta=delta, density=0.002).eval()
    batches = [({"input_ids": torch.arange(12).view(3, 4)}, torch.tensor([0, 1, 0]))]
    shares = tasks.select_mask("tone", batches, F.cross_entropy)
    spec = tasks.get_task("tone").spec
    assert 0.0 in shares.values() and len(spec.deltas) < len(spec.asked)
    tasks.save_pretrained(tmp_path)
    read = sharing.MultiTask.from_pretrained(tasks.backbone, tmp_path).eval()
    for again in (tasks, tasks, read):
        before = again.get_task("tone").spec
        with pytest.raises(ValueError, match="batches: expected at least one"):
            again.select_mask("tone", [], F.cross_entropy)
        assert again.get_task("tone").spec is before == spec
        assert again.select_mask("tone", batches, F.cross_entropy) == shares
        assert again.get_task("tone").spec == spec


def scale(x, by):
    return by * F.relu(x)


class Scaled(nn.Module):
    """With a plain attribute."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x):
        return scale(x, self.by)


class ScaledOwn(Own):
    """With a plain attribute that `embed` reads."""

    by = 1.0

    def embed(self, input_ids):
        return self.by * super().embed(input_ids)


def set_norms(stack: nn.TransformerEncoder, make) -> nn.TransformerEncoder:
    for layer in stack.layers:
        layer.norm1 = make()
    return stack


NORMS = functools.partial(nn.LayerNorm, 16, bias=False), functools.partial(nn.RMSNorm, 16, eps=1e-5)


def set_scale(by: float) -> ScaledOwn:
    own = ScaledOwn(make_stack())
    own.by = by
    return own


def set_embedding(*after: nn.Module) -> Own:
    own = Own(make_stack())
    own.embedding = nn.Sequential(own.embedding, *after)
    return own


@pytest.mark.parametrize(
    "backbones",
    [
        [lambda by=by: make_stack(activation=functools.partial(scale, by=by)) for by in (1.0, 1.001)],
        [lambda by=by: make_stack(activation=functools.partial(F.gelu, approximate=by)) for by in ("none", "tanh")],
        [lambda by=by: make_stack(activation=functools.partial(F.leaky_relu, negative_slope=by)) for by in (0.1, 0.2)],
        [lambda by=by: make_stack(activation=lambda x: F.hardtanh(x, -by, by)) for by in (10.0, 20.0)],
        [lambda by=by: make_stack(activation=Scaled(by)) for by in (1.0, 1.001)],
        [lambda by=by: Own(set_norms(make_stack(), by)) for by in NORMS],
        [lambda by=by: set_scale(by) for by in (1.0, 2.0)],
        [lambda by=by: set_embedding(by()) for by in NORMS],
        [lambda by=by: set_embedding(nn.GELU(by)) for by in ("none", "tanh")],
    ],
    ids=["function", "gelu", "leaky_relu", "lambda", "module", "norm", "embed", "embed norm", "embed gelu"],
)
def test_backbones_that_no_name_tells_apart(backbones, tmp_path):
    one, other = (make() for make in backbones)
    tasks = sharing.MultiTask(one, {"tone": 2}, delta="low_rank")
    (path,) = tasks.save_pretrained(tmp_path)
    assert sharing.MultiTask(copy.deepcopy(one), {}).hash == sharing.MultiTask(backbones[0](), {}).hash == tasks.hash
    with pytest.raises(ValueError, match="expected a task of the backbone"):
        sharing.MultiTask(other, {}).load_task(path)


def test_one_function_by_several_names():
    functions = [F.relu, torch.relu, nn.ReLU(), nn.ReLU(inplace=True), "relu", lambda x: x.clamp(min=0)]
    assert len({sharing.MultiTask(make_stack(activation=own), {}).hash for own in functions}) == 1


def test_functions_that_float64_does_not_fit():
    weight = torch.ones(1)
    tasks = sharing.MultiTask(make_stack(activation=lambda x: F.prelu(x, weight)), {})
    with pytest.raises(ValueError, match="backbone: expected an activation function of float64, too, got <lambda>"):
        _ = tasks.hash


def test_backbones_that_share_their_layers():
    stack = make_stack()
    one, other = (sharing.MultiTask(Own(stack), {"tone": 2}, delta="dense") for _ in range(2))
    engine = other.build_engine([])
    for add in (other.insert_task, engine.add_task):
        with pytest.raises(ValueError, match=r"task: expected one of the backbone \w{12}\.\.\., got one of"):
            add("again", one.get_task("tone"))
    same = sharing.MultiTask(other.backbone, {})
    for add in (same.insert_task, engine.add_task):
        add("again", other.get_task("tone"))


def test_backbones_are_read_by_several_threads():
    stack = make_stack().train()
    barrier = threading.Barrier(4)

    def read():
        barrier.wait()
        for _ in range(20):
            sharing.read_encoder(Own(stack))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(module.training for module in stack.modules())


@pytest.mark.parametrize("place", ["attention.self.query", "output.dense"])
@pytest.mark.parametrize(
    "change_weight",
    [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm],
)
def test_weights_that_are_computed(place, change_weight):
    bert = make_bert()
    change_weight(bert.encoder.layer[1].get_submodule(place))
    with pytest.raises(ValueError, match=r"backbone: expected a parameter as each weight .* for 1\.(query|down)"):
        sharing.read_encoder(bert)
    stack = make_stack()
    nn.utils.parametrizations.weight_norm(stack.layers[0].self_attn, "in_proj_weight")
    with pytest.raises(ValueError, match="backbone: expected a parameter as each weight"):
        sharing.read_encoder(stack)


def test_logits_of_an_engine_may_be_targets():
    tasks = change(sharing.MultiTask(make_bert(), {"tone": 2, "stars": "regression"}, delta="low_rank"))
    ids = torch.arange(10).view(2, 5)
    served = tasks.build_engine()(ids)
    for name, own in served.items():
        student = torch.zeros_like(own, requires_grad=True)
        F.mse_loss(student, own).backward()
        torch.testing.assert_close(student.grad, -2 * own / own.numel())
        assert not own.requires_grad and not own.is_inference(), name


def test_files_under_another_default_dtype(tmp_path):
    """Tasks, and a search, too, compute in float32 on a backbone of float32."""
    delta = {"query": "sparse", "up": "rows", "down": "low_rank", "value": "dense"}
    tasks = sharing.MultiTask(make_bert(), {"tone": 2}, delta=delta, density=0.2)
    tasks.add_task("wide", 2, delta="none", aggregator="concat")
    batches = [(torch.arange(10).view(2, 5), torch.tensor([0, 1]))]
    tasks.select_mask("tone", batches, F.cross_entropy, scope="matrix")
    change(tasks).save_pretrained(tmp_path)
    expected = tasks(batches[0][0])
    torch.set_default_dtype(torch.float64)
    try:
        again = sharing.MultiTask.from_pretrained(tasks.backbone, tmp_path).eval()
        for name, own in again(batches[0][0]).items():
            assert torch.equal(own, expected[name])
        torch.testing.assert_close(again.build_engine()(batches[0][0]), expected, atol=2e-6, rtol=1e-5)
        costs = sharing.measure_costs(again.encoder, tokens=5, rounds=1)
        again.search("tone", batches, F.cross_entropy, costs=costs, target=100.0, epochs=1)
        assert {parameter.dtype for parameter in again.task_parameters("tone")} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


def test_bools_are_no_indices():
    tasks = sharing.MultiTask(make_bert(), {"tone": 2})
    cache = tasks.cache("tone", [torch.arange(10).view(2, 5)])
    packed = ops.prepack_deltas([np.eye(2, dtype=np.float32)] * 2)
    x = np.ones((2, 2), np.float32)
    for wrong in ([True, False], [np.True_], torch.tensor([True, False]), np.array([False, True])):
        for call, name in (
            (lambda own: ops.delta_linear(x, None, packed, positions=own), "positions"),
            (lambda own: ops.delta_linear(x, None, packed, tasks=own), "tasks"),
            (packed.select, "tasks"),
            (cache.__getitem__, "indices"),
        ):
            with pytest.raises(TypeError, match=f"{name}: expected a sequence of integers, got"):
                call(wrong)


def test_parts_of_a_cache():
    tasks = sharing.MultiTask(make_bert(), {"tone": 2})
    cache = tasks.cache("tone", [torch.arange(15).view(3, 5)])
    for part, rows in ((slice(0, 2), [0, 1]), (slice(None), [0, 1, 2]), (torch.tensor([2, 0]), [2, 0])):
        assert torch.equal(cache[part].slots, cache[rows].slots)
    for wrong, error, message in (
        (0, TypeError, "indices: expected a sequence of integers, got 0"),
        ([3], IndexError, "indices: expected indices from 0 to 2, got 3"),
        (slice(3, 9), ValueError, "indices: expected at least one, got none"),
    ):
        with pytest.raises(error, match=message):
            cache[wrong]


def test_labels_in_another_order():
    logits = torch.randn(3, 7, 2)
    spec = sharing.TaskSpec(2, "tokens", "all")
    sharing.compute_loss(spec, logits, torch.zeros(3, 7, dtype=torch.long))
    for shape in ((7, 3), (21,), (3,)):
        with pytest.raises(ValueError, match=r"labels: expected \(3, 7\), got"):
            sharing.compute_loss(spec, logits, torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels: expected \(3,\), got \(1, 3\)"):
        sharing.compute_loss(sharing.TaskSpec(2), logits[:, 0], torch.zeros(1, 3, dtype=torch.long))


TABLE = {projection: {"sparse": 1.0, "low_rank": 1.0, "dense": 2.0} for projection in PROJECTIONS}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seconds": {"query": TABLE["query"]}}, "seconds: expected rows for query, key, value, output, up, down"),
        ({"seconds": TABLE | {"up": {"sparse": 1.0}}}, "seconds: expected the same of sparse, rows, low_rank, dense"),
        ({"seconds": {p: {} for p in PROJECTIONS}}, "seconds: expected the same of"),
        ({"seconds": {p: {"other": 1.0} for p in PROJECTIONS}}, "seconds: expected the same of"),
        ({"seconds": {p: {"sparse": -1.0} for p in PROJECTIONS}}, "seconds: expected finite numbers of at least 0"),
        ({"seconds": {p: {"sparse": "1"} for p in PROJECTIONS}}, "seconds: expected finite numbers of at least 0"),
        ({"seconds": []}, "seconds: expected rows for"),
        ({"backbone": 0}, "backbone: expected a positive number of seconds, got 0"),
        ({"backbone": float("nan")}, "backbone: expected a positive number of seconds, got nan"),
        ({"tokens": 0}, "tokens: expected at least 1, got 0"),
        ({"positions": "last"}, "positions: expected one of mean, first, all, got 'last'"),
    ],
)
def test_tables_of_costs_that_are_wrong(fields, message):
    table = {"seconds": TABLE, "backbone": 100.0, "tokens": 8, "positions": "mean"}
    assert sharing.CostTable.from_json(json.dumps(table)) == sharing.CostTable(**table)
    with pytest.raises(ValueError, match=message):
        sharing.CostTable.from_json(json.dumps({**table, **fields}))
    with pytest.raises(ValueError, match="text: expected JSON, got other text"):
        sharing.CostTable.from_json("{")


def test_searches_that_are_wrong():
    tasks = sharing.MultiTask(make_bert(), {"tone": 2, "first": 2}, density=0.1)
    tasks.add_task("first-token", 2, positions="first")
    batches = [(torch.arange(10).view(2, 5), torch.tensor([0, 1]))]
    options = {"costs": sharing.CostTable(TABLE, 100.0, 5, "mean"), "target": 0.1}
    for changed, message in (
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"epochs": -1}, "epochs: expected at least 1, got -1"),
        ({"lr": -1}, "lr: expected positive numbers, got -1"),
        ({"choice_lr": float("nan")}, "choice_lr: expected positive numbers, got nan"),
        ({"temperatures": (0, 0)}, "temperatures: expected positive numbers, got 0"),
        ({"temperatures": (1.0,)}, "temperatures: expected one at the start and one at the end"),
        ({"pressure": -1}, "pressure: expected at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.search("tone", batches, F.cross_entropy, **{**options, **changed})
    with pytest.raises(ValueError, match="costs: expected a table for positions 'first', as the task's, got one for"):
        tasks.search("first-token", batches, F.cross_entropy, **options)
    for options, message in (({"rounds": 0}, "rounds: expected at least 1"), ({"tokens": 0}, "tokens: expected at")):
        with pytest.raises(ValueError, match=message):
            sharing.measure_costs(tasks.encoder, **options)


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


def test_ranks_that_factors_do_not_have(tmp_path):
    tasks = change(sharing.MultiTask(make_bert(), {"tone": 2}, delta={"query": "low_rank"}, rank=2))
    sharing.export_adapter(tasks, "tone", tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 4, "lora_alpha": 4}))
    with pytest.raises(
        ValueError, match=r"expected r=2 of encoder\.layer\.0\.attention\.self\.query, as its factors, g"
    ):
        sharing.import_adapter(tasks, tmp_path, "again")


def test_adapters_of_projections_that_are_modules(tmp_path):
    """Queries, keys and values of torch's encoder are one weight, which a task need not change."""
    tasks = change(sharing.MultiTask(make_stack(), {"tone": 2}, delta={"up": "low_rank", "down": "low_rank"}))
    sharing.export_adapter(tasks, "tone", tmp_path)
    sharing.import_adapter(tasks, tmp_path, "again")
    x = torch.randn(2, 5, 16)
    assert torch.equal(tasks(x)["again"], tasks(x)["tone"])


def test_inputs_by_name():
    tasks = change(sharing.MultiTask(make_bert(), {"tone": 2}, delta="low_rank"))
    ids, mask = torch.arange(10).view(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    inputs = {"input_ids": ids, "token_type_ids": (ids > 4).long(), "attention_mask": mask}
    for call in (tasks, tasks.build_engine()):
        expected = call(inputs)["tone"]
        others = {"token_type_ids": inputs["token_type_ids"], "position_ids": None}
        for got in (call(**inputs), call(ids, mask, ["tone"], **others), call({"input_ids": ids}, mask, **others)):
            assert torch.equal(got["tone"], expected)
        with pytest.raises(ValueError, match="input_ids: expected one, got one among the inputs and another"):
            call(ids, input_ids=ids)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"inputs_embeds": torch.zeros(2, 5, 16)}, "inputs: expected input_ids or inputs_embeds, got both"),
        ({"attention_mask": torch.full((2, 5), -1.0)}, "attention_mask: expected 1 where a token is and 0 elsewhere"),
        ({"attention_mask": torch.full((2, 5), 0.5)}, "attention_mask: expected 1 where a token is and 0 elsewhere"),
        ({"attention_mask": torch.full((2, 5), torch.nan)}, "attention_mask: expected 1 where a token is"),
        ({"input_ids": torch.ones(2, 5, dtype=torch.uint8)}, "input_ids: expected int32 or int64, got torch.uint8"),
        ({"input_ids": torch.ones(2, 5, dtype=torch.int16)}, "input_ids: expected int32 or int64, got torch.int16"),
        ({"token_type_ids": torch.zeros(2, 4, dtype=torch.long)}, r"token_type_ids: expected \(2, 5\), got \(2, 4\)"),
        ({"position_ids": torch.zeros(3, 5, dtype=torch.long)}, r"position_ids: expected \(2, 5\), got \(3, 5\)"),
    ],
)
def test_inputs_that_are_wrong(inputs, message):
    tasks = sharing.MultiTask(make_bert(), {"tone": 2}, delta="none")
    inputs = {"input_ids": torch.arange(10).view(2, 5), **inputs}
    for call in (tasks, tasks.build_engine()):
        with pytest.raises(ValueError, match=message):
            call(inputs)


def test_images_one_by_one():
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(image_size=8, patch_size=4, **SIZES), add_pooling_layer=False)
    tasks = sharing.MultiTask(vit, {"tone": 2}, delta="none")
    pixels = torch.randn(2, 3, 8, 8)
    assert tasks(pixels)["tone"].shape == (2, 2)
    for wrong in (pixels[0], {"pixel_values": pixels[0]}):
        with pytest.raises(ValueError, match=r"inputs: expected pixel_values \(B, C, H, W\), got .* \(3, 8, 8\)"):
            tasks(wrong)


def test_padding_takes_no_position():
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=20, **SIZES)
    backbone = RobertaModel(config, add_pooling_layer=False).eval()
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta="none").eval()
    ids = torch.full((2, 18), 5)
    padded = F.pad(ids, (0, 2), value=config.pad_token_id)
    expected = tasks(ids)["tone"]
    torch.testing.assert_close(tasks(padded, (padded != config.pad_token_id).long())["tone"], expected)
    with pytest.raises(ValueError, match="inputs: expected at most 18 tokens, got 19"):
        tasks(torch.full((2, 19), 5))


def test_a_bit_that_flipped(tmp_path):
    tasks = change(sharing.MultiTask(make_bert(), {"tone": 2}, delta="low_rank"))
    (path,) = tasks.save_pretrained(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected the values that were written, got others: a damaged file"):
        tasks.load_task(path, "again")


def test_files_are_written_all_or_none(tmp_path):
    tasks = sharing.MultiTask(make_bert(), {"a": 2, "b": 2}, delta={"query": "low_rank"})
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match=r"expected to write the file .*b\.safetensors, got a folder"):
        tasks.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]
    (tmp_path / "adapter" / "adapter_config.json").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        sharing.export_adapter(tasks, "a", tmp_path / "adapter")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["adapter_config.json"]


def test_numbers_of_numpy(tmp_path):
    tasks = sharing.MultiTask(make_bert(), {"tone": np.int64(2)}, density=np.float32(0.25), delta="none")
    tasks.add_task("names", ("tokens", np.int32(3)), layers=np.arange(2), rank=np.int64(2), delta="low_rank")
    tasks.save_pretrained(tmp_path)
    again = sharing.MultiTask.from_pretrained(tasks.backbone, tmp_path)
    assert all(again.get_task(name).spec == tasks.get_task(name).spec for name in tasks.tasks)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": [True]}, TypeError, "layers: expected a sequence of integers, got"),
        ({"layers": [1.0]}, TypeError, "layers: expected a sequence of integers, got"),
        ({"layers": 3}, TypeError, "layers: expected a sequence of integers, got 3"),
        ({"delta": None}, TypeError, "delta: expected a kind, or kinds by projection, got None"),
        ({"density": 5}, ValueError, "density: expected a share in"),
        ({"dropout": float("nan")}, ValueError, "dropout: expected a share in"),
        ({"tasks": ["a"]}, TypeError, "tasks: expected labels by name, got list"),
    ],
)
def test_options_that_are_wrong(options, error, message):
    """Those of the constructor are checked before any task is added."""
    names = options.pop("tasks", {})
    with pytest.raises(error, match=message):
        sharing.MultiTask(make_stack(), names, **options)


def test_calls_that_are_wrong():
    tasks = sharing.MultiTask(make_bert(), {"tone": 2, "low": 2, "plain": 2, "names": ("tokens", 2)}, delta="none")
    tasks.add_task("new", 2, delta="sparse")
    tasks.add_task("up", 2, delta={"up": "dense"})
    ids, labels = torch.arange(10).view(2, 5), torch.tensor([0, 1])
    features = tasks.read("plain", ids)
    engine = tasks.build_engine(["plain"])

    def select(*batches, loss=F.cross_entropy):
        return lambda: tasks.select_mask("new", batches, loss)

    for call, error, message in (
        (select((ids, labels, 0)), TypeError, "batches: expected pairs of inputs and labels, got tuple"),
        (select(ids), TypeError, "batches: expected pairs of inputs and labels, got Tensor"),
        (
            select((ids, labels), loss=lambda y, _: y),
            ValueError,
            "loss: expected one number with a gradient, got float",
        ),
        (select((ids, labels), loss=lambda y, _: y.sum().detach()), ValueError, "loss: expected one number .*detached"),
        (select((ids, labels), loss=lambda y, _: y.sum().item()), ValueError, "loss: expected one .* got float"),
        (select((features, labels)), ValueError, "features: expected what 0.query reads, got none"),
        (lambda: tasks.run("up", features), ValueError, "features: expected what 0.up reads, got none"),
        (lambda: tasks.run("names", features), ValueError, "features: expected 3 outputs at positions 'all', got"),
        (lambda: engine.add_task("x", "y"), TypeError, "task: expected one that get_task returns, got str"),
        (lambda: tasks.insert_task("x", "y"), TypeError, "task: expected one that get_task returns, got str"),
        (lambda: tasks.build_engine(["plain", "new"]), ValueError, "new: expected a mask chosen by select_mask"),
    ):
        with pytest.raises(error, match=message):
            call()
