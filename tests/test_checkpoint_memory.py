"""Checkpoints grow in the memory of one tensor and its result, whatever they hold in all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import quiet as quiet

from pycodesign.growth import shards

MEASURE = """
import json, re, sys
from pycodesign.growth import grow_checkpoint

def read_peak():  # ru_maxrss begins with what the parent process had
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", status.read())[1])

src, dst, target = sys.argv[1:]
before = read_peak()
report = grow_checkpoint(src, dst, target_config=json.loads(target), max_shard_bytes=700_000_000)
print(before, read_peak(), report.bytes_read, report.bytes_written)
"""


def write_random(src: Path, config: dict[str, Any], shard_bytes: int) -> tuple[int, int]:
    """Write a GPT-2 of random weights, one tensor in memory at a time; return its bytes, and the largest tensor's."""
    D, L, V, P = (config[key] for key in ("n_embd", "n_layer", "vocab_size", "n_positions"))
    block = {"ln_1.weight": (D,), "ln_1.bias": (D,), "ln_2.weight": (D,), "ln_2.bias": (D,)}
    block |= {"attn.c_attn.weight": (D, 3 * D), "attn.c_attn.bias": (3 * D,), "attn.c_proj.weight": (D, D)}
    block |= {"attn.c_proj.bias": (D,), "mlp.c_fc.weight": (D, 4 * D), "mlp.c_fc.bias": (4 * D,)}
    block |= {"mlp.c_proj.weight": (4 * D, D), "mlp.c_proj.bias": (D,)}
    shapes = {"wte.weight": (V, D), "wpe.weight": (P, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
    shapes |= {f"h.{i}.{name}": shape for i in range(L) for name, shape in block.items()}
    tensors = [shards.Tensor(f"transformer.{name}", src, "F32", shape, 0) for name, shape in shapes.items()]
    src.mkdir()
    (src / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    with shards.Writer(src, "model", tensors, {"format": "pt"}, shard_bytes) as writer:
        for tensor in tensors:
            writer.write(tensor.name, rng.standard_normal(tensor.shape, np.float32))
    sizes = [tensor.nbytes for tensor in tensors]
    return sum(sizes), max(sizes)


def measure(src: Path, dst: Path, target: dict[str, Any]) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(src), str(dst), json.dumps(target)],
        cwd=sys.prefix,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


CONFIG = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "layer_norm_epsilon": 1e-5, "n_positions": 256}


def test_memory_holds_one_tensor_and_its_result(tmp_path: Path) -> None:
    config = CONFIG | {"n_embd": 512, "n_layer": 4, "n_head": 8, "vocab_size": 8192}
    total, largest = write_random(tmp_path / "small", config, 20_000_000)
    target = {"n_embd": 768, "n_head": 12, "n_layer": 5}
    before, peak, read, written = measure(tmp_path / "small", tmp_path / "large", target)
    assert read == total and written > 2 * total
    slack = 40_000_000  # the noise is made in blocks
    assert peak - before < largest + largest * 768 / 512 + slack, (before, peak, largest)


@pytest.mark.slow
def test_two_gigabytes_grow_in_little_memory(tmp_path: Path) -> None:
    config = CONFIG | {"n_embd": 1280, "n_layer": 23, "n_head": 20, "vocab_size": 50257, "n_positions": 1024}
    total, _ = write_random(tmp_path / "small", config, 500_000_000)
    assert total > 2_000_000_000 and len(list((tmp_path / "small").glob("*.safetensors"))) > 3
    target = {"n_embd": 1600, "n_head": 25, "n_layer": 24}
    _, peak, read, written = measure(tmp_path / "small", tmp_path / "large", target)
    print(f"{read:,} bytes -> {written:,} bytes, at most {peak:,} resident")
    assert read == total and written > read
    assert peak <= 1_200_000_000
