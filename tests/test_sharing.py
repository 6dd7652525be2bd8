"""Tasks on one frozen encoder: what they compute, how they are trained, their files."""

from __future__ import annotations

import copy
import doctest
import json
import threading

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BigBirdConfig,
    BigBirdModel,
    Data2VecTextConfig,
    Data2VecTextModel,
    DeiTConfig,
    DeiTModel,
    ElectraConfig,
    ElectraModel,
    LongformerConfig,
    LongformerModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

from pycodesign import ops, set_num_threads, sharing
from pycodesign.sharing.components import TaskSpec, run_difference
from pycodesign.sharing.deltas import DenseDelta, LowRankDelta, RowDelta, SparseDelta
from pycodesign.sharing.encoders import Linear
from pycodesign.sharing.files import compute_digest

KINDS = ("sparse", "rows", "low_rank", "dense", {"up": "rows", "down": "sparse", "value": "low_rank"})
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
VOCABULARY = 50


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=20, **SIZES)).eval()


@pytest.fixture
def texts():
    ids = torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = mask[2, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def make_labels(kind: str) -> torch.Tensor:
    return torch.zeros(3, 9, dtype=torch.long) if kind == "tokens" else torch.tensor([0, 1, 0])


def train(tasks: sharing.MultiTask, texts, steps: int = 8) -> None:
    """Select masks where there are none, and train a little; dropout is off."""
    tasks.eval()
    for name in tasks.tasks:
        task = tasks.get_task(name)

        def loss(logits, labels, spec=task.spec):
            return sharing.compute_loss(spec, logits, labels)

        labels = make_labels(task.spec.kind)
        if not task.is_selected:
            tasks.select_mask(name, [(texts, labels)], loss, scope="matrix")
        features = tasks.read(name, texts)
        optimizer = torch.optim.Adam(tasks.task_parameters(name), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(tasks.run(name, features), labels).backward()
            optimizer.step()


LABELS = {"tone": 2, "topic": 5, "stars": "regression", "names": ("tokens", 3)}


@pytest.mark.parametrize("kind", ["sparse", "rows", "low_rank", "dense"])
def test_delta_is_a_difference_of_weights(kind):
    index, rows = torch.tensor([0, 7, 8, 22]), torch.tensor([1, 3])
    made = {"sparse": SparseDelta((4, 6), index), "rows": RowDelta((4, 6), rows)}
    made |= {"low_rank": LowRankDelta((4, 6), 2), "dense": DenseDelta((4, 6))}
    delta = made[kind].double()
    torch.manual_seed(0)
    for parameter in delta.parameters():
        nn.init.normal_(parameter)
    difference, bias = torch.zeros(4, 6).double(), torch.zeros(4).double()
    if kind == "sparse":
        difference.view(-1)[index] = delta.values.detach()
    elif kind == "rows":
        difference[rows] = delta.values.detach()
    else:
        difference = (delta.up @ delta.down if kind == "low_rank" else delta.values).detach()
    bias[rows if kind == "rows" else slice(4)] = delta.bias.detach()
    linear, x = nn.Linear(6, 4).double(), torch.randn(2, 3, 6).double()
    torch.testing.assert_close(run_difference(delta, x), F.linear(x, difference, bias))
    y = F.linear(x, linear.weight + difference, linear.bias + bias)
    torch.testing.assert_close(delta.project(Linear(linear), x), y[..., rows] if kind == "rows" else y)
    run_difference(delta, x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in delta.parameters())


@pytest.mark.parametrize("positions", ["mean", "first"])
@pytest.mark.parametrize("delta", KINDS, ids=str)
def test_tasks_and_engine(backbone, texts, delta, positions, tmp_path):
    """Training changes what is asked for; engine, cache and files give the same again; the backbone is untouched."""
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    tasks = sharing.MultiTask(backbone, LABELS, delta=delta, density=0.1, positions=positions)
    train(tasks, texts)
    with torch.no_grad():
        logits = tasks(texts)
    assert {name: tuple(own.shape) for name, own in logits.items()} == {
        "tone": (3, 2),
        "topic": (3, 5),
        "stars": (3, 1),
        "names": (3, 9, 3),
    }
    engine = tasks.build_engine()
    served = engine(texts["input_ids"], texts["attention_mask"])
    for name, own in logits.items():
        torch.testing.assert_close(served[name], own, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(
            tasks.run(name, tasks.cache(name, [texts], dtype=None)[[0, 1, 2]])[..., :4, :] if name == "names" else own,
            own[..., :4, :] if name == "names" else own,
        )
    tasks.save_pretrained(tmp_path)
    again = sharing.MultiTask.from_pretrained(backbone, tmp_path).eval()
    with torch.no_grad():
        assert all(torch.equal(own, logits[name]) for name, own in again(texts).items())
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_heads_on_all_layers(backbone, texts, tmp_path):
    """The head reads every layer's features at mean 0 and variance 1; engine and files give the same again."""
    tasks = sharing.MultiTask(backbone, LABELS, delta="rows", density=0.1, aggregator="concat")
    train(tasks, texts)
    tasks.train()
    for name in tasks.tasks:
        for _ in range(200):  # until the running averages are those of these texts
            tasks.run(name, tasks.read(name, texts))
    tasks.eval()
    task, features = tasks.get_task("tone"), tasks.read("tone", texts)
    joined = task.aggregator(features.slots)
    assert joined.shape == (3, 1, 4 * 32)
    frozen = torch.cat(list(features.slots[:, :, 0]), 1)
    slots, (mean, variance) = joined[:, 0], (task.aggregator.norm.running_mean, task.aggregator.norm.running_var)
    torch.testing.assert_close(slots * (variance + 1e-5).sqrt() + mean, frozen, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mean[:32], frozen[:, :32].mean(0), atol=1e-5, rtol=1e-4)  # no delta is before those
    torch.testing.assert_close(variance[:32], frozen[:, :32].var(0), atol=1e-5, rtol=1e-4)
    deltas = sum(parameter.numel() for parameter in task.deltas.parameters())
    assert task.count_parameters() == {"components": deltas + 3 * 32 * 2, "head": 33 * 2}
    with torch.no_grad():
        logits = tasks(texts)
    for name, own in tasks.build_engine()(texts).items():
        torch.testing.assert_close(own, logits[name], atol=2e-5, rtol=1e-4)
    tasks.save_pretrained(tmp_path)
    with torch.no_grad():
        again = sharing.MultiTask.from_pretrained(backbone, tmp_path).eval()(texts)
    assert all(torch.equal(own, logits[name]) for name, own in again.items())


@pytest.mark.parametrize("delta", KINDS, ids=str)
def test_a_task_is_the_same_to_the_bit_alone_and_among_others(backbone, texts, delta):
    names = {f"task{n}": 2 + n for n in range(5)} | {"names": ("tokens", 3), "first": 2}
    tasks = sharing.MultiTask(backbone, {}, delta=delta, density=0.1)
    for name, labels in names.items():
        options = {"positions": "first"} if name == "first" else {}
        tasks.add_task(name, labels, **options)
    train(tasks, texts)
    engine = tasks.build_engine()
    for inputs in (texts, {key: value[:1] for key, value in texts.items()}):
        expected = engine(inputs)
        for asked in (["task3"], ["first"], ["task1", "names"], ["task4", "task0", "first"], list(reversed(names))):
            for threads in (1, 2):
                set_num_threads(threads)
                got = engine(inputs, tasks=asked)
                assert list(got) == asked
                assert all(torch.equal(got[name], expected[name]) for name in asked)


def test_a_task_is_the_same_to_the_bit_at_any_width():
    """What attention reads of a task lies between other tasks', at addresses that torch never allocates."""
    for width, heads in ((90, 5), (39, 3)):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(width, heads, 64, batch_first=True)
        stack = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        kinds = dict.fromkeys(("query", "key", "value"), "low_rank")
        tasks = sharing.MultiTask(stack, dict.fromkeys("abc", 2), delta=kinds, rank=2).eval()
        with torch.no_grad():
            for parameter in tasks.tasks.parameters():
                parameter.normal_(std=0.3)
        x, engine = torch.randn(1, 5, width), tasks.build_engine()
        expected = engine(x)
        for asked in (["a"], ["b"], ["c"], ["c", "b", "a"]):
            assert all(torch.equal(own, expected[name]) for name, own in engine(x, tasks=asked).items())


def test_backbone_is_the_same_to_the_bit_whatever_is_asked(backbone, texts):
    tasks = sharing.MultiTask(backbone, LABELS, delta="low_rank")
    engine = tasks.build_engine()
    named, mask = tasks.check_inputs(texts)
    seen = []
    run = engine.encoder.run

    class Recorded:
        def __getattr__(self, name):
            return getattr(tasks.encoder, name)

        def run(self, *arguments):
            seen.append(run(*arguments))
            return seen[-1]

    engine.encoder = Recorded()
    for asked in ([], ["tone"], ["names", "topic"], None):
        engine(texts, tasks=asked)
    first, layers = tasks.encoder.run(named, mask)
    for own_first, own_layers in seen:
        assert torch.equal(own_first, first)
        assert all(
            torch.equal(a, b)
            for own, one in zip(own_layers, layers, strict=True)
            for a, b in zip(own, one, strict=True)
        )
    assert len(seen) == 4  # one pass for each call


def test_encoders_compute_what_backbones_do():
    torch.manual_seed(0)
    sizes = {**SIZES, "image_size": 16, "patch_size": 4}
    roberta = RobertaModel(RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=20, pad_token_id=1, **SIZES))
    electra = ElectraModel(ElectraConfig(vocab_size=VOCABULARY, embedding_size=32, **SIZES))
    for backbone, inputs in (
        (ViTModel(ViTConfig(**sizes)), {"pixel_values": torch.randn(2, 3, 16, 16)}),
        (DeiTModel(DeiTConfig(**sizes)), {"pixel_values": torch.randn(2, 3, 16, 16)}),
        (electra, {"input_ids": torch.randint(VOCABULARY, (2, 9))}),
        (roberta, {"input_ids": torch.randint(2, VOCABULARY, (2, 18))}),
    ):
        encoder = sharing.read_encoder(backbone.eval())
        with torch.no_grad():
            h = encoder.run(inputs)[1][-1].h
            h = h if encoder.norm is None else encoder.norm(h)
            torch.testing.assert_close(h, backbone(**inputs).last_hidden_state, atol=1e-5, rtol=1e-4)
    assert sharing.read_encoder(roberta).longest == 18
    data2vec = Data2VecTextModel(Data2VecTextConfig(vocab_size=VOCABULARY, max_position_embeddings=20, **SIZES))
    assert sharing.read_encoder(data2vec.eval()).longest == 18
    tasks = sharing.MultiTask(ViTModel(ViTConfig(**sizes)), {"kind": 4}, delta="low_rank", positions="first").eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(tasks.build_engine()(images)["kind"], tasks(images)["kind"], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_encoder(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first, activation=F.gelu)
    stack = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32) if norm_first else None, enable_nested_tensor=False)
    tasks = sharing.MultiTask(stack, {"tone": 2}, delta="low_rank").eval()
    x, mask = torch.randn(2, 7, 32), torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    _, layers = tasks.encoder.run({"inputs_embeds": x}, mask.bool())
    expected = stack.eval()(x, src_key_padding_mask=mask == 0)
    h = layers[-1].h if tasks.encoder.norm is None else tasks.encoder.norm(layers[-1].h)
    torch.testing.assert_close(h[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tasks.build_engine()(x, mask)["tone"], tasks(x, mask)["tone"], atol=2e-6, rtol=1e-5)


class Own(nn.Module):
    """A backbone of one's own, with positions of no module."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.positions = nn.Parameter(torch.randn(12, 32))
        self.register_buffer("scale", torch.ones(1), persistent=False)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.max_length = 12

    def embed(self, input_ids):
        return self.scale * (self.embedding(input_ids) + self.positions[: input_ids.shape[1]])


def test_own_protocol():
    tasks = sharing.MultiTask(Own(), {"tone": 2}, delta="low_rank")
    assert tasks(torch.zeros(2, 12, dtype=torch.long))["tone"].shape == (2, 2)
    with pytest.raises(ValueError, match="at most 12 tokens, got 13"):
        tasks(torch.zeros(2, 13, dtype=torch.long))
    own = tasks.backbone
    assert tasks.encoder.count_parameters() == sum(parameter.numel() for parameter in own.parameters())


@pytest.mark.parametrize(
    "name",
    ["embedding.weight", "positions", "scale", "encoder.layers.1.norm2.weight", "encoder.layers.1.activation.weight"],
)
def test_files_are_bound_to_all_of_a_backbone(tmp_path, name):
    own = Own()
    for layer in own.encoder.layers:
        layer.activation = nn.PReLU()
    tasks = sharing.MultiTask(own, {"tone": 2}, delta="low_rank")
    tasks.save_pretrained(tmp_path)
    other = copy.deepcopy(tasks.backbone)
    sharing.MultiTask.from_pretrained(other, tmp_path)
    state = dict(other.named_parameters()) | dict(other.named_buffers())
    state[name].data.add_(1)
    with pytest.raises(ValueError, match="expected a task of the backbone"):
        sharing.MultiTask.from_pretrained(other, tmp_path)


@pytest.mark.parametrize(
    ("module", "setting"),
    [("embeddings.LayerNorm", "eps"), ("encoder.layer.1.output.LayerNorm", "eps"), ("embeddings", "padding_idx")],
)
def test_files_are_bound_to_the_backbone_of_now(backbone, tmp_path, module, setting):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta="low_rank")
    tasks.save_pretrained(tmp_path)
    other = copy.deepcopy(backbone)
    setattr(other.get_submodule(module), setting, 0.1)
    with pytest.raises(ValueError, match="expected a task of the backbone"):
        sharing.MultiTask.from_pretrained(other, tmp_path)
    backbone.load_state_dict({key: 2 * value for key, value in backbone.state_dict().items()})
    with pytest.raises(ValueError, match="expected a task of the backbone"):
        tasks.load_task(tmp_path / "tone.safetensors", "again")


@pytest.mark.parametrize("delta", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_backbones_of_other_dtypes(backbone, texts, delta, dtype):
    """Tasks stay float32, unless they are converted, too."""
    tasks = sharing.MultiTask(backbone.to(dtype), LABELS, delta=delta, density=0.1)
    train(tasks, texts, steps=2)
    logits = tasks(texts)
    cached = tasks.run("tone", tasks.cache("tone", [texts])[[0, 1, 2]])
    torch.testing.assert_close(cached, logits["tone"], atol=0.05, rtol=0.05)
    assert {own.dtype for own in logits.values()} == {torch.float32}
    for own in (torch.float64, torch.bfloat16):
        converted = tasks.to(own)(texts)
        assert {logits.dtype for logits in converted.values()} == {own}
        torch.testing.assert_close(converted["topic"].float(), logits["topic"], atol=0.05, rtol=0.05)


def test_backbones_that_change(backbone, texts):
    """What is computed follows the backbone's weights, and an engine, which has copies, refuses."""
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta={"up": "dense", "query": "dense"}).eval()
    engine = tasks.build_engine()
    before = engine(texts)["tone"]
    backbone.train()
    assert torch.equal(engine(texts)["tone"], before) and not backbone.training
    state = {key: value + 0.1 * torch.randn_like(value) for key, value in backbone.state_dict().items()}
    for assign in (True, False):
        backbone.load_state_dict(state, assign=assign)
        named, mask = tasks.check_inputs(texts["input_ids"])
        expected = backbone(texts["input_ids"]).last_hidden_state
        torch.testing.assert_close(tasks.encoder.run(named, mask)[1][-1].h, expected, atol=1e-5, rtol=1e-4)
        with pytest.raises(RuntimeError, match="backbone: expected the weights that the engine was built on"):
            engine(texts)
        with pytest.raises(RuntimeError, match="build it again"):
            engine.add_task("other", tasks.get_task("tone"))
        engine = tasks.build_engine()
        torch.testing.assert_close(engine(texts)["tone"], tasks(texts)["tone"], atol=2e-6, rtol=1e-5)
        state = {key: value + 0.1 for key, value in state.items()}


@pytest.mark.parametrize("positions", ["mean", "first"])
def test_zero_deltas_keep_the_frozen_features(backbone, texts, positions):
    tasks = sharing.MultiTask(backbone, {"plain": 2}, delta="none", positions=positions).eval()
    tasks.add_task("zero", 2, delta="dense")
    task, plain = tasks.get_task("zero"), tasks.get_task("plain")
    task.head.load_state_dict(plain.head.state_dict())
    torch.testing.assert_close(*tasks(texts).values(), atol=1e-6, rtol=1e-5)
    assert torch.equal(*tasks.build_engine()(texts).values())  # to the bit


def test_deltas_at_the_first_token_are_those_of_all_tokens(backbone, texts):
    """The same weights, asked at every token: the first token's logits are those of positions="first"."""
    tasks = sharing.MultiTask(backbone, {"all": ("tokens", 3)}, delta="dense")
    tasks.add_task("one", 3, positions="first")
    train(tasks, texts)
    tasks.get_task("one").load_state_dict(tasks.get_task("all").state_dict())
    logits = tasks(texts)
    torch.testing.assert_close(logits["one"], logits["all"][:, 0], atol=1e-5, rtol=1e-4)


def test_masks(backbone, texts):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta="sparse", density=0.02).eval()
    labels = make_labels("classification")
    task = tasks.get_task("tone")
    assert not task.is_selected
    gradients = {}
    dense = sharing.MultiTask(backbone, {}).eval()
    dense.add_task("tone", 2, delta="dense")
    dense.get_task("tone").head.load_state_dict(task.head.state_dict())
    F.cross_entropy(dense(texts)["tone"], labels).backward()
    for place, delta in dense.get_task("tone").list_deltas().items():
        gradients[place] = delta.values.grad.abs().flatten()
    shares = tasks.select_mask("tone", [(texts, labels)], F.cross_entropy)
    chosen = torch.cat([gradients[place][delta.index] for place, delta in task.list_deltas().items()])
    everything = torch.cat(list(gradients.values()))
    assert len(chosen) == round(0.02 * len(everything))
    torch.testing.assert_close(chosen.sort().values, everything.topk(len(chosen)).values.sort().values)
    assert shares.keys() == gradients.keys()
    assert task.is_selected
    trained = sum(parameter.numel() for parameter in tasks.task_parameters("tone"))
    biases = sum(delta.bias.numel() for delta in task.list_deltas().values())
    others = sum(p.numel() for module in (task.aggregator, task.head) for p in module.parameters())
    assert trained == len(chosen) + biases + others  # memory for those alone: no dense parameter is left
    for method, scope in (("change", "matrix"), ("gradient", "matrix"), ("change", "global")):
        tasks.add_task(f"{method}-{scope}", 2, delta={"up": "rows", "value": "sparse"}, density=0.25)
        tasks.select_mask(f"{method}-{scope}", [(texts, labels)] * 3, F.cross_entropy, method=method, scope=scope)
        if scope == "matrix":
            deltas = tasks.get_task(f"{method}-{scope}").list_deltas()
            assert {len(delta.rows) for place, delta in deltas.items() if place.endswith("up")} == {16}
            assert {len(delta.index) for place, delta in deltas.items() if place.endswith("value")} == {256}


def test_a_failed_mask_leaves_the_task_as_it_was(backbone, texts):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta={"up": "rows", "value": "sparse"}, density=1.0)
    labels, task = make_labels("classification"), tasks.get_task("tone")
    shares = tasks.select_mask("tone", [(texts, labels)], F.cross_entropy)
    assert set(shares.values()) == {1.0}  # of weights; there are biases, too
    train(tasks, texts)
    spec, before = task.spec, tasks(texts)["tone"]
    for batches, loss in (([], F.cross_entropy), ([(texts, labels)], lambda y, _: y.sum() * torch.nan)):
        with pytest.raises(ValueError):
            tasks.select_mask("tone", batches, loss)
        assert task.spec is spec and task.is_selected
        assert torch.equal(tasks(texts)["tone"], before)


def test_tasks_come_and_go_while_others_are_served(backbone, texts):
    tasks = sharing.MultiTask(backbone, {f"task{n}": 2 for n in range(4)}, delta="low_rank")
    train(tasks, texts, steps=2)
    engine = tasks.build_engine()
    expected = engine(texts)
    failures = []

    def serve():
        try:
            for _ in range(20):
                got = engine(texts, tasks=["task0", "task1"])
                failures.extend(name for name in got if not torch.equal(got[name], expected[name]))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        engine.remove_task("task3")
        engine.add_task("task3", tasks.get_task("task3"))
    for thread in threads:
        thread.join()
    assert not failures
    engine.remove_task("task2")
    assert engine.tasks == ["task0", "task1", "task3"]
    with pytest.raises(KeyError, match="tasks: expected some of task0, task1, task3, got 'task2'"):
        engine(texts, tasks=["task2"])
    with torch.no_grad():
        tasks.get_task("task0").head.weight.zero_()
    assert torch.equal(engine(texts)["task0"], expected["task0"])  # it serves copies


def test_engine_runs_the_kernels(backbone, texts, monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "delta_linear", lambda *args, own=ops.delta_linear: calls.append(args) or own(*args))
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta="low_rank")
    tasks.build_engine()(texts)
    assert calls


@pytest.mark.parametrize("delta", KINDS, ids=str)
def test_padding_may_come_first(backbone, texts, delta):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta=delta, density=0.1, positions="first")
    train(tasks, texts, steps=3)
    ids = texts["input_ids"][:, :5]
    padded = {
        "input_ids": F.pad(ids, (3, 0)),
        "position_ids": F.pad(torch.arange(5), (3, 0)).expand(3, 8),
        "attention_mask": F.pad(torch.ones_like(ids), (3, 0)),
    }
    expected = tasks(ids)["tone"]
    cached = tasks.run("tone", tasks.cache("tone", [padded], dtype=None)[[0, 1, 2]])
    for own in (tasks(padded)["tone"], tasks.build_engine()(padded)["tone"], cached):
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)


def test_engine_is_exact_under_autocast(backbone, texts):
    engine = sharing.MultiTask(backbone, {"tone": 2}, delta="low_rank").build_engine()
    expected = engine(texts)["tone"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(engine(texts)["tone"], expected)


def test_masks_are_taken_wherever_they_are_given(backbone, texts):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta="none").eval()
    expected, ids, mask = tasks(texts)["tone"], texts["input_ids"], texts["attention_mask"]
    for inputs in ({"input_ids": ids, "attention_mask": None}, {"input_ids": ids, "token_type_ids": None}):
        assert torch.equal(tasks(inputs, mask)["tone"], expected)


def test_cache_in_batches(backbone, texts):
    """Texts of different lengths, shuffled, and with less padding than they were read with."""
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta="low_rank").eval()
    train(tasks, texts, steps=3)
    cache = tasks.cache("tone", [texts, texts], dtype=None)
    assert len(cache) == 6 and cache.lengths == [9, 6, 4] * 2
    with torch.no_grad():
        expected = tasks(texts)["tone"]
        torch.testing.assert_close(tasks.run("tone", cache[[5, 1]]), expected[[2, 1]], atol=1e-5, rtol=1e-4)
    half = tasks.cache("tone", [texts])
    assert half.nbytes * 4 == cache.nbytes
    assert half[[0]].slots.dtype == torch.float32
    with pytest.raises(ValueError, match="indices: expected at least one"):
        cache[[]]


def test_training_by_trainer(backbone, texts, tmp_path):
    from transformers import Trainer, TrainingArguments

    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta="low_rank")
    model = tasks.task_model("tone")
    rows = [{key: value[n] for key, value in texts.items()} | {"labels": n % 2} for n in range(3)] * 4
    arguments = TrainingArguments(
        tmp_path, max_steps=4, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=1e-2
    )
    before = tasks.get_task("tone").head.weight.clone()
    Trainer(model, arguments, train_dataset=rows).train()
    assert not torch.equal(before, tasks.get_task("tone").head.weight)
    assert len(model.state_dict()) == len(tasks.get_task("tone").state_dict())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def damage(path, change_tensors=None, change_metadata=None):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if change_tensors:
        change_tensors(tensors)
    if change_metadata:
        change_metadata(metadata)
    metadata["digest"] = compute_digest(tensors, metadata["spec"])
    save_file(tensors, path, metadata)


def set_item(key, value):
    return lambda mapping: mapping.__setitem__(key, value)


def set_spec(**fields):
    def change(metadata):
        metadata["spec"] = json.dumps({**json.loads(metadata["spec"]), **fields})

    return change


@pytest.mark.parametrize(
    ("change_tensors", "change_metadata", "message"),
    [
        (
            set_item("head.weight", torch.zeros(3, 32)),
            None,
            r"head.weight: expected float32 \(2, 32\), got float32 \(3, 32\)",
        ),
        (
            set_item("head.weight", torch.zeros(10**9, 0)),
            set_spec(labels=10**9),
            r"head.weight: expected float32 \(1000000000, 32\), got float32 \(1000000000, 0\)",
        ),
        (set_item("head.weight", torch.full((2, 32), torch.nan)), None, "head.weight: expected finite values"),
        (set_item("head.bias", torch.zeros(2, dtype=torch.float16)), None, "head.bias: expected float32"),
        (set_item("other", torch.zeros(2)), None, "other: expected no such tensor"),
        (lambda tensors: tensors.pop("aggregator.query"), None, "aggregator.query: expected float32"),
        (
            set_item("deltas.0_value.index", torch.tensor([5, 4096])),
            None,
            "0.value: index: expected indices from 0 to 1023",
        ),
        (set_item("deltas.0_value.index", torch.tensor([-1, 6])), None, "expected indices from 0 to 1023, got -1"),
        (set_item("deltas.0_value.index", torch.tensor([6, 6])), None, "expected ascending indices"),
        (set_item("deltas.0_value.index", torch.zeros(0, dtype=torch.long)), None, "got none: an empty delta"),
        (set_item("deltas.0_value.index", torch.zeros(3)), None, r"index: expected int64 \(n,\), got float32"),
        (set_item("deltas.0_value.values", torch.zeros(1)), None, "0.value: values: expected float32"),
        (None, set_item("backbone", "0" * 64), "expected a task of the backbone"),
        (None, set_item("format", "other"), "expected format 'pycodesign.sharing'"),
        (None, set_item("spec", "{"), "spec: expected JSON"),
        (None, set_item("spec", "{}"), "spec: expected the fields"),
        (None, set_item("spec", "[" * 10**5), "spec: expected JSON"),
        (None, set_spec(density=True), r"density: expected a share in \(0, 1\], got True"),
        (None, set_spec(labels=10**9), r"head.weight: expected float32 \(1000000000, 32\), got float32 \(2, 32\)"),
        (None, set_spec(labels=10**30), "head.weight: expected float32"),
        (None, set_spec(deltas={"9.value": "sparse"}), "spec: expected deltas of projections in 3 layers"),
        (None, set_spec(deltas={"0.value": "other"}), "spec: expected kinds of deltas"),
        (None, set_spec(density=0), r"density: expected a share in \(0, 1\], got 0"),
        (None, set_spec(labels=-1), "labels: expected at least 1"),
    ],
)
def test_damaged_files(backbone, texts, tmp_path, change_tensors, change_metadata, message):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta={"value": "sparse"})
    train(tasks, texts)
    (path,) = tasks.save_pretrained(tmp_path)
    damage(path, change_tensors, change_metadata)
    with pytest.raises(ValueError, match=message):
        tasks.load_task(path, "again")
    assert list(tasks.tasks) == ["tone"]


def test_damaged_files_of_other_tasks(backbone, tmp_path):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta={"value": "low_rank"}, rank=2, aggregator="concat")
    (path,) = tasks.save_pretrained(tmp_path)
    for change_tensors, change_metadata, message in (
        (None, set_spec(rank=3), r"0.value: up: expected float32 \(32, 3\), got float32 \(32, 2\)"),
        (None, set_spec(rank=None), r"0.value: up: expected float32 \(32, 1\), got float32 \(32, 2\)"),
        (set_item("deltas.0_value.up", torch.zeros(0, 10**9)), set_spec(rank=10**9), "0.value: up: expected float32"),
        (lambda tensors: tensors["aggregator.norm.running_var"].neg_(), None, "expected variances of at least 0"),
    ):
        tasks.save_pretrained(tmp_path)
        damage(path, change_tensors, change_metadata)
        with pytest.raises(ValueError, match=message):
            tasks.load_task(path, "again")


def test_files_of_other_backbones(backbone, texts, tmp_path):
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta="low_rank")
    (path,) = tasks.save_pretrained(tmp_path)
    other = BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=20, **SIZES))
    with pytest.raises(ValueError, match="expected a task of the backbone"):
        sharing.MultiTask.from_pretrained(other, tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="expected a safetensors file, got a damaged one"):
        sharing.MultiTask.from_pretrained(backbone, tmp_path)
    with pytest.raises(ValueError, match="expected a task's file, got none"):
        tasks.load_task(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="expected tasks' files in"):
        sharing.MultiTask.from_pretrained(backbone, tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, r"density: expected a share in \(0, 1\], got 0"),
        ({"density": 1.5}, r"density: expected a share in \(0, 1\], got 1.5"),
        ({"rank": 0}, "rank: expected at least 1, got 0"),
        ({"positions": "last"}, "positions: expected one of mean, first, all, got 'last'"),
        ({"positions": "all"}, "positions: expected 'all' for labels of tokens and no others"),
        ({"delta": "full"}, "delta: expected one of sparse, rows, low_rank, dense, none, got 'full'"),
        ({"delta": {"gate": "sparse"}}, "delta: expected projections among query"),
        ({"aggregator": "mean"}, "aggregator: expected one of attention, concat, got 'mean'"),
        ({"layers": [3]}, "layers: expected numbers from 0 to 2, got 3"),
    ],
)
def test_wrong_options(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        sharing.MultiTask(backbone, {"tone": 2}, **options)


@pytest.mark.parametrize("name", ["MultiTask", "export_adapter", "search"])
def test_docstrings(name):
    item = getattr(sharing, name)
    (found,) = doctest.DocTestFinder(recurse=False).find(item, name, module=False, globs={})
    assert doctest.DocTestRunner().run(found).failed == 0


def test_wrong_calls(backbone, texts, tmp_path):
    tasks = sharing.MultiTask(backbone, {"tone": 2})
    ids = texts["input_ids"]

    def serve(**others):
        engine = sharing.MultiTask(backbone, {"tone": 2}, delta="none").build_engine()
        engine({"input_ids": ids, **others})

    for call, error, message in (
        (lambda: tasks.add_task("tone", 2), ValueError, "name: expected a new name, got 'tone'"),
        (lambda: tasks.add_task("a/b", 2), ValueError, "name: expected letters, digits, _ and -"),
        (lambda: tasks.add_task("other", "many"), TypeError, "labels: expected a number of classes"),
        (lambda: tasks.add_task("other", 0), ValueError, "labels: expected at least 1, got 0"),
        (lambda: tasks.add_task("other", 2, depth=3), TypeError, "depth: expected one of delta, density"),
        (lambda: tasks(ids, tasks=["topic"]), KeyError, "name: expected one of tone, got 'topic'"),
        (lambda: tasks(torch.zeros(1, 21, dtype=torch.long)), ValueError, "inputs: expected at most 20 tokens, got 21"),
        (lambda: tasks(ids + VOCABULARY), ValueError, "input_ids: expected numbers from 0 to 49"),
        (lambda: serve(token_type_ids=ids + 1), ValueError, "token_type_ids: expected numbers from 0 to 1"),
        (lambda: serve(position_ids=ids - 1), ValueError, "position_ids: expected numbers from 0 to 19, got -1"),
        (lambda: serve(position_ids=ids * 0.5), ValueError, "position_ids: expected int32 or int64, got torch.float32"),
        (lambda: tasks(texts, ids > 0), ValueError, "attention_mask: expected one, got one among"),
        (lambda: tasks(ids, torch.zeros(3, 9)), ValueError, "attention_mask: expected at least one token"),
        (lambda: tasks(ids, torch.ones(3, 8)), ValueError, r"attention_mask: expected \(3, 9\), got \(3, 8\)"),
        (lambda: tasks(ids[:, :0]), ValueError, "inputs: expected at least one text and one token"),
        (lambda: tasks.save_pretrained(tmp_path), ValueError, "tone: expected a mask chosen by select_mask"),
        (lambda: tasks.build_engine(), ValueError, "tone: expected a mask chosen by select_mask"),
        (lambda: tasks.select_mask("tone", [], F.cross_entropy), ValueError, "batches: expected at least one"),
        (lambda: tasks.select_mask("tone", [(texts, 0)], lambda y, _: 0 * y.sum()), ValueError, "not all zero"),
        (lambda: sharing.MultiTask(nn.Linear(2, 2), {}), TypeError, "backbone: expected a bare BERT"),
        (lambda: TaskSpec(2, kind="ranking"), ValueError, "kind: expected one of classification"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert not list(tmp_path.iterdir())


def test_backbones_that_are_no_such_encoders(backbone):
    long = {"vocab_size": VOCABULARY, "max_position_embeddings": 600, **SIZES}
    for wrong in (BigBirdModel(BigBirdConfig(**long, block_size=8)), LongformerModel(LongformerConfig(**long))):
        with pytest.raises(TypeError, match=f"backbone: expected a bare BERT.*, got {type(wrong).__name__}"):
            sharing.read_encoder(wrong.eval())  # like BERT on short texts alone

    class Windowed(BertModel):
        def forward(self, input_ids, attention_mask):
            order = abs(torch.arange(input_ids.shape[1])[:, None] - torch.arange(input_ids.shape[1]))
            return super().forward(input_ids, (order < 9) & (attention_mask[:, None, None] > 0))

    with pytest.raises(ValueError, match="outputs that differ from those by"):
        sharing.read_encoder(Windowed(BertConfig(vocab_size=VOCABULARY, **SIZES)).eval())
    decoder = BertModel(BertConfig(vocab_size=VOCABULARY, is_decoder=True, **SIZES))
    with pytest.raises(ValueError, match="backbone: expected an encoder"):
        sharing.read_encoder(decoder)
    backbone.encoder.layer[1].attention.output.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="outputs that differ from those by"):
        sharing.read_encoder(backbone)
    layer = nn.TransformerEncoderLayer(32, 4, 64)
    with pytest.raises(ValueError, match="batch_first=True"):
        sharing.read_encoder(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    half = BertModel(BertConfig(vocab_size=VOCABULARY, **SIZES)).to(torch.bfloat16)
    with pytest.raises(TypeError, match=r"backbone: expected float32 in host memory, got torch.bfloat16"):
        sharing.MultiTask(half, {}).build_engine()
