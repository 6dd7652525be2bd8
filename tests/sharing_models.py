"""Backbones, inputs and tasks, for tests of sharing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from pycodesign import sharing

KINDS = ("sparse", "rows", "low_rank", "dense", {"up": "rows", "down": "sparse", "value": "low_rank"})
LABELS = {"tone": 2, "topic": 5, "stars": "regression", "names": ("tokens", 3)}
VOCABULARY = 50
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
TWO_LAYERS = {**SIZES, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
SMALL_VOCABULARY = 20
SMALL_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


# Fixtures: a file of tests assigns those that it needs, as in backbone, texts = sharing_models.backbone, ...


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


@pytest.fixture
def shallow():
    """A backbone of two layers."""
    torch.manual_seed(0)
    return BertModel(BertConfig(**TWO_LAYERS)).eval()


@pytest.fixture
def sentences():
    """Texts of one length, without a mask."""
    return {"input_ids": torch.randint(VOCABULARY, (8, 6), generator=torch.Generator().manual_seed(1))}


def make_bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=SMALL_VOCABULARY, max_position_embeddings=16, **SMALL_SIZES)).eval()


def make_stack(width: int = 16, layers: int = 2, mlp: int = 32, **options) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 2, mlp, batch_first=True, **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class Own(nn.Module):
    """A backbone of one's own."""

    def __init__(self, stack: nn.TransformerEncoder | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SMALL_VOCABULARY, 16)
        self.encoder = make_stack() if stack is None else stack

    def embed(self, input_ids):
        return self.embedding(input_ids)


class OwnWithPositions(nn.Module):
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


def change(tasks: sharing.MultiTask) -> sharing.MultiTask:
    """Give all deltas values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tasks.tasks.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tasks.eval()
