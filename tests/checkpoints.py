"""Checkpoints to grow, how tests read them, and how they change them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

SIZES = {"n_embd": 24, "n_layer": 2, "n_head": 6, "n_inner": 40}
LARGER = {"n_embd": 36, "n_layer": 3, "n_head": 9, "n_inner": 60}
DOUBLE = {"n_embd": 48, "n_head": 12, "n_inner": 80}


# Fixtures are imported as ``quiet as quiet``, which linters take for used


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "tokenizer.json").write_text("{}")
    return tmp_path / "small"


def build(**sizes: int) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    tokens = {"vocab_size": 50, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**{**tokens, **SIZES, **sizes}, layer_norm_epsilon=1e-2)
    return transformers.GPT2LMHeadModel(config).eval()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(x).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), x.roll(-1, 1).flatten()).backward()
        optimizer.step()


def read_all(directory: Path, stem: str = "model") -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob(f"{stem}*.safetensors")):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def list_files(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def edit_config(src: Path, **changes: Any) -> None:
    (src / "config.json").write_text(json.dumps({**json.loads((src / "config.json").read_text()), **changes}))


def edit_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(src: Path) -> None:
        file = src / "model.safetensors"
        data = file.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return edit
