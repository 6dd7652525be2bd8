"""Low-rank tasks in peft's file format."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pycodesign.sharing import files
from pycodesign.sharing.components import Task
from pycodesign.sharing.deltas import LowRankDelta
from pycodesign.sharing.multitask import MultiTask

__all__ = ["export_adapter", "import_adapter"]

CONFIG, WEIGHTS, OTHERS = "adapter_config.json", "adapter_model.safetensors", "sharing.safetensors"
PREFIX = "base_model.model."
ONE_PASS = (
    "Its layers read what its own earlier layers have changed, as in ordinary fine-tuning, so that one exact pass "
    "for several tasks is impossible: serve it by peft, one pass for each task, or train the task by "
    "sharing.MultiTask with delta='low_rank'."
)


def export_adapter(tasks: MultiTask, name: str, path: str | os.PathLike[str]) -> None:
    """Write a task whose deltas are all low-rank as a LoRA adapter in peft's format.

    The folder has ``adapter_config.json`` and ``adapter_model.safetensors``, which peft reads, and, in
    ``sharing.safetensors``, what peft has no place for: the aggregator, the head, the biases. peft puts the adapter
    into the backbone the ordinary way, where layers read what earlier ones have changed: that is another function
    than the task's. `import_adapter` gives the task again, unless peft has trained its factors.

    Raises
    ------
    KeyError, ValueError
        For an unknown task, one with other deltas, or deltas of projections that are no modules of their own.

    Examples
    --------
    >>> import tempfile
    >>> import transformers
    >>> from pycodesign import sharing
    >>> sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    >>> backbone = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes))
    >>> tasks = sharing.MultiTask(backbone, {"tone": 2}, delta={"query": "low_rank", "value": "low_rank"})
    >>> folder = tempfile.mkdtemp()
    >>> sharing.export_adapter(tasks, "tone", folder)
    >>> sharing.import_adapter(tasks, folder, "again")
    >>> list(tasks.tasks)
    ['tone', 'again']
    """
    task = tasks.get_task(name)
    deltas = task.list_deltas()
    if not deltas or not all(isinstance(delta, LowRankDelta) for delta in deltas.values()):
        kinds = ", ".join(sorted(set(task.spec.deltas.values()))) or "none"
        raise ValueError(f"name: expected a task whose deltas are all low-rank, got {kinds}")
    paths = _find_paths(tasks, deltas)
    ranks = {paths[place]: delta.up.shape[1] for place, delta in deltas.items() if isinstance(delta, LowRankDelta)}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: own for module, own in ranks.items() if own != rank}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(tasks.backbone, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # products are not scaled
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    weights: dict[str, Tensor] = {}
    rest = files.list_tensors(name, task)
    for place in deltas:
        key = f"deltas.{place.replace('.', '_')}"
        weights[f"{PREFIX}{paths[place]}.lora_A.weight"] = rest.pop(f"{key}.down")
        weights[f"{PREFIX}{paths[place]}.lora_B.weight"] = rest.pop(f"{key}.up")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {**files.describe(task, tasks.hash, rest), "factors": files.compute_digest(weights)}
    contents = {
        OTHERS: save(rest, metadata),
        WEIGHTS: save(weights, {"format": "pt"}),
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }
    files.write_files({folder / file: content for file, content in contents.items()})


def import_adapter(tasks: MultiTask, path: str | os.PathLike[str], name: str) -> None:
    """Add a task from a folder that `export_adapter` wrote; peft may have read and written, but not trained, the
    adapter since.

    Raises
    ------
    ValueError
        If the adapter was trained the ordinary way, before it was exported or since, for which one exact pass is
        impossible; if files are damaged, of another backbone, or do not fit it.
    """
    folder = Path(path)
    try:
        config: Any = json.loads((folder / CONFIG).read_text())
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"path: expected {CONFIG} and {WEIGHTS} in {folder}, got {error}") from None
    if not (folder / OTHERS).exists():
        raise ValueError(f"path: expected an adapter that export_adapter wrote, got one without {OTHERS}. {ONE_PASS}")
    _check_config(config)
    tensors, spec = files.read_tensors(folder / OTHERS, tasks.encoder, tasks.hash)
    if set(spec.deltas.values()) != {"low_rank"}:
        raise ValueError(f"{folder / OTHERS}: expected low-rank deltas alone, got {dict(spec.deltas)}")
    paths, digest = _find_paths(tasks, spec.deltas), files.compute_digest(weights)
    for place in spec.deltas:
        module, key = paths[place], f"deltas.{place.replace('.', '_')}"
        pair = [weights.pop(f"{PREFIX}{module}.lora_{part}.weight", None) for part in "AB"]
        if pair[0] is None or pair[1] is None:
            raise ValueError(f"{folder / WEIGHTS}: expected lora_A and lora_B of {module}, got none")
        if pair[0].ndim != 2:
            shape = tuple(pair[0].shape)
            raise ValueError(f"{folder / WEIGHTS}: expected a matrix lora_A of {module}, got one of shape {shape}")
        rank = _find_number(config, "r", "rank_pattern", module)
        if len(pair[0]) != rank:
            raise ValueError(f"{folder / CONFIG}: expected r={len(pair[0])} of {module}, as its factors, got {rank:g}")
        alpha = _find_number(config, "lora_alpha", "alpha_pattern", module)
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        tensors[f"{key}.down"] = pair[0]
        tensors[f"{key}.up"] = pair[1] if scale == 1 else pair[1] * scale
    if weights:
        raise ValueError(f"{folder / WEIGHTS}: expected no other tensors, got {min(weights)}. {ONE_PASS}")
    try:
        task: Task = files.make_task(spec, tasks.encoder, tensors, tasks.dropout)
    except ValueError as error:
        raise ValueError(f"path: {folder}: {error}") from None
    with safe_open(folder / OTHERS, framework="pt") as file:
        if file.metadata().get("factors") != digest:
            raise ValueError(f"{folder / WEIGHTS}: expected the factors that were exported, got others. {ONE_PASS}")
    tasks.insert_task(name, task)


def _check_config(config: Any) -> None:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"path: expected a LoRA adapter, got {got}. {ONE_PASS}")
    for key in ("r", "lora_alpha"):
        if not _is_positive(config.get(key)):
            raise ValueError(f"path: expected a positive {key} in {CONFIG}, got {config.get(key)!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(_is_positive(value) for value in pattern.values()):
            raise ValueError(f"path: expected positive numbers by module in {key} of {CONFIG}, got {pattern!r:.200}")
        for expression in pattern:
            try:
                _compile_pattern(expression)
            except (re.error, OverflowError, RecursionError) as error:
                wrong = f"{expression!r}: {error}"
                raise ValueError(f"path: expected names or expressions in {key} of {CONFIG}, got {wrong}") from None
    for key in ("use_dora", "fan_in_fan_out", "modules_to_save", "layer_replication"):
        if config.get(key):
            raise ValueError(f"path: expected plain LoRA, got {key}={config[key]!r}. {ONE_PASS}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"path: expected bias='none', got {config['bias']!r}. {ONE_PASS}")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _compile_pattern(expression: str) -> re.Pattern[str]:
    """Compile an expression for the end of a module's name, as peft does."""
    return re.compile(rf"(.*\.)?({expression})$")


def _find_number(config: Any, key: str, pattern: str, module: str) -> float:
    """Return a module's rank or alpha: that of the first expression that matches."""
    for expression, value in (config.get(pattern) or {}).items():
        if _compile_pattern(expression).match(module):
            return float(value)
    return float(config[key])


def _find_paths(tasks: MultiTask, places: Iterable[str]) -> dict[str, str]:
    """Return the backbone's module for each ``"LAYER.PROJECTION"``."""
    modules = {m.weight.data_ptr(): name for name, m in tasks.backbone.named_modules() if isinstance(m, nn.Linear)}
    paths = {}
    for place in places:
        layer, _, projection = place.partition(".")
        module = modules.get(tasks.encoder.layers[int(layer)].projections[projection].weight.data_ptr())
        if module is None:
            raise ValueError(f"tasks: expected a module for each projection with a delta, got none for {place}")
        paths[place] = module.removesuffix(".base_layer")  # into which peft has put an adapter
    return paths
