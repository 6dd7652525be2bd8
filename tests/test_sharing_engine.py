"""The engine: the same bits whatever else is asked, copies of its own, tasks that come and go."""

from __future__ import annotations

import threading

import pytest
import sharing_models
import torch
import torch.nn.functional as F
from sharing_models import KINDS, LABELS, change, make_bert, make_stack, train
from torch import nn

from pycodesign import ops, set_num_threads, sharing

backbone, texts = sharing_models.backbone, sharing_models.texts


def select(tasks: sharing.MultiTask, inputs) -> None:
    labels = torch.arange(len(inputs)) % 2
    for name in tasks.tasks:
        tasks.select_mask(name, [(inputs, labels)], F.cross_entropy, scope="matrix")


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


def test_engine_runs_the_kernels(backbone, texts, monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "delta_linear", lambda *args, own=ops.delta_linear: calls.append(args) or own(*args))
    tasks = sharing.MultiTask(backbone, {"tone": 2}, delta="low_rank")
    tasks.build_engine()(texts)
    assert calls


def test_engine_is_exact_under_autocast(backbone, texts):
    engine = sharing.MultiTask(backbone, {"tone": 2}, delta="low_rank").build_engine()
    expected = engine(texts)["tone"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(engine(texts)["tone"], expected)


def test_logits_of_an_engine_may_be_targets():
    tasks = change(sharing.MultiTask(make_bert(), {"tone": 2, "stars": "regression"}, delta="low_rank"))
    ids = torch.arange(10).view(2, 5)
    served = tasks.build_engine()(ids)
    for name, own in served.items():
        student = torch.zeros_like(own, requires_grad=True)
        F.mse_loss(student, own).backward()
        torch.testing.assert_close(student.grad, -2 * own / own.numel())
        assert not own.requires_grad and not own.is_inference(), name


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
