"""Growth of checkpoints on disk, tensor by tensor."""

from __future__ import annotations

import difflib
import errno
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from pycodesign.growth.plan import Plan, make_plan
from pycodesign.growth.rules import OPTIMIZERS, POWERS, Rule, scale_settings
from pycodesign.growth.shards import Array, Checkpoint, Tensor, Writer, read_checkpoint
from pycodesign.growth.sizes import DEFAULTS, FREE, check_configs, compute_shapes, is_tied, read_heads, read_sizes
from pycodesign.growth.spec import Spec
from pycodesign.growth.specs import find_spec
from pycodesign.growth.staging import stage_directory

__all__ = ["CheckpointReport", "grow_checkpoint"]

Config: TypeAlias = Mapping[str, Any] | str | os.PathLike[str]

MODEL, OPTIMIZER, CONFIG = "model", "optimizer", "config.json"
SHARD_BYTES = 5_000_000_000
WRITTEN = ("architectures", "dtype", "torch_dtype")  # may be null in a config made for its sizes
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".h5", ".msgpack")
TOLERANCES = {"F16": 2.0**-7, "BF16": 2.0**-4}  # of rounded weights; 1e-5 for others


@dataclass(frozen=True)
class CheckpointReport:
    """What `grow_checkpoint` did, or would do.

    Attributes
    ----------
    plan : Plan
    config : mapping
        Of the larger model.
    files : list of str
        The weights' and the optimizer's; empty after a dry run.
    bytes_read, bytes_written : int
        Of tensors.
    difference : float or None
        The largest difference of outputs, relative to the largest output; None where it was not verified.
    """

    plan: Plan
    config: Mapping[str, Any]
    files: list[str]
    bytes_read: int
    bytes_written: int
    difference: float | None = None

    @property
    def summary(self) -> str:
        """One sentence."""
        made = f"{self.bytes_read:,} -> {self.bytes_written:,} bytes, {len(self.plan.rules)} parameters"
        if not self.files:
            return f"{made}; nothing was written"
        if self.difference is None:
            return f"{made}, in {len(self.files)} files"
        return f"{made}, in {len(self.files)} files; outputs differ by {self.difference:.2g} of the largest"

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {
            "parameters": [
                {"name": r.name, "source": r.source, "from": r.old_shape, "to": r.shape, "how": r.what}
                for r in self.plan
            ],
            "config": dict(self.config),
            "files": self.files,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "difference": self.difference,
        }

    def __str__(self) -> str:
        return f"{self.plan}\n{self.summary}"


@dataclass(frozen=True)
class Part:
    """Tensors of one kind: what each new one is made from, and how."""

    stem: str
    metadata: Mapping[str, str]
    sources: Mapping[str, Tensor]
    targets: Mapping[str, list[tuple[str, Rule | None, int]]]  # by source: name, rule, power; no rule: a copy

    @property
    def factors(self) -> set[str]:
        """Names of the vectors that rules need beside their source."""
        rules = (rule for targets in self.targets.values() for _, rule, _ in targets)
        return {rule.factor for rule in rules if rule is not None and rule.factor}

    def list_targets(self) -> list[Tensor]:
        return [
            Tensor(name, source.file, source.dtype, source.shape if rule is None else rule.shape, 0)
            for source in self.sources.values()
            for name, rule, _ in self.targets[source.name]
        ]


def grow_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    source_config: Config | None = None,
    target_config: Config,
    spec: Spec | str = "auto",
    mode: str = "break_symmetry",
    seed: int = 0,
    noise: float = 0.1,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> CheckpointReport:
    """Grow a checkpoint in safetensors files, with no more in memory than one tensor and what it becomes.

    Each tensor is read once. The new checkpoint is written under a temporary name beside `dst` and renamed when all of
    it is on the disk: whenever the process ends, `dst` is what it was or complete.

    Parameters
    ----------
    src : path
        A directory in Hugging Face's layout: ``config.json`` and ``model.safetensors``, or shards and
        ``model.safetensors.index.json``. An ``optimizer.safetensors`` (or shards) beside it, as
        `growth.save_optimizer` writes it, is grown, too; small files, such as a tokenizer's, are copied.
    dst : path
        A directory that does not exist, unless `overwrite`; may be `src` then.
    source_config : mapping or path, optional
        In place of the ``config.json`` of `src`.
    target_config : mapping or path
        Sizes of the larger model, as in its ``config.json``; what it leaves out stays as it is.
    spec : Spec or str
        What the axes of the parameters mean; ``"auto"``: by the config's ``model_type``.
    mode, seed, noise
        As for `grow`. In mode ``"exact"`` the optimizer's groups are scaled.
    max_shard_bytes : int
        Of one file.
    overwrite : bool
        Replace `dst`.
    dry_run : bool
        Check and plan, write nothing.
    verify : bool
        Load both models, which needs memory for them, torch and transformers, and compare their outputs before the
        renaming. A ValueError, and no new checkpoint, if they differ by more than rounding explains.
    progress : callable, optional
        Called with the bytes written so far, and in all.

    Returns
    -------
    CheckpointReport

    Raises
    ------
    ValueError
        Before anything is written: if a file is damaged or missing, a key of the target is one that neither source nor
        spec knows, a shape contradicts the config, no rule covers a parameter, or the change cannot be exact
        (`Inexact`; the message says what would be).
    OSError
        Before anything is written, if the disk has too little room.

    References
    ----------
    Fu et al., "TripLe", ICCV 2023: weights and optimizer states of the small model, copied into the large one.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from safetensors.numpy import load_file, save_file
    >>> from pycodesign import growth
    >>> spec = growth.Spec(
    ...     "mlp",
    ...     {"fc1": growth.linear(None, "hidden"), "fc2": growth.linear("hidden", None)},
    ...     config={"hidden": "width"},
    ... )
    >>> src = Path(tempfile.mkdtemp())
    >>> save_file({"fc1.weight": np.ones((4, 3), "f4"), "fc2.weight": np.ones((2, 4), "f4")}, src / "model.safetensors")
    >>> report = growth.grow_checkpoint(
    ...     src, src / "large", source_config={"width": 4}, target_config={"width": 8}, spec=spec, mode="exact"
    ... )
    >>> load_file(src / "large" / "model.safetensors")["fc2.weight"]
    array([[0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
           [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]], dtype=float32)
    """
    source, target = Path(src), Path(os.path.realpath(dst))
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected at least 1, got {max_shard_bytes}")
    if target.exists() and not overwrite:
        raise ValueError(f"dst: expected a new directory, or overwrite, got {target}, which exists")
    if target.exists() and not target.is_dir():
        raise ValueError(f"dst: expected a directory, got the file {target}")
    old_config = _read_config("source_config", source / CONFIG if source_config is None else source_config)
    changes = _read_config("target_config", target_config)
    changes = {key: value for key, value in changes.items() if value is not None or key not in WRITTEN}
    new_config = {**old_config, **changes}
    spec = spec if isinstance(spec, Spec) else find_spec(old_config if spec == "auto" else {"model_type": spec})
    checkpoint = read_checkpoint(source, MODEL)
    if checkpoint is None:
        wanted = f"{MODEL}.safetensors or {MODEL}.safetensors.index.json"
        raise ValueError(f"src: expected {wanted} in {source}, got neither")
    if not checkpoint.tensors:
        raise ValueError(f"src: expected tensors in {source}, got none")
    _check_keys(old_config, changes, spec)
    _check_configs(old_config, new_config, spec)
    plan = _make_plan(checkpoint, source, old_config, new_config, spec, mode, noise, seed)
    _scale_eps(old_config, changes, new_config, plan)
    parts = [_plan_model(checkpoint, plan)]
    if optimizer := read_checkpoint(source, OPTIMIZER):
        parts.append(_plan_optimizer(optimizer, plan))
    tolerance = max(TOLERANCES.get(tensor.dtype, 1e-5) for tensor in checkpoint.tensors.values())
    bytes_read = sum(tensor.nbytes for part in parts for tensor in part.sources.values())
    if dry_run:
        bytes_written = sum(tensor.nbytes for part in parts for tensor in part.list_targets())
        return CheckpointReport(plan, new_config, [], bytes_read, bytes_written)
    with stage_directory(target) as staging:
        files, bytes_written = _write_parts(staging, parts, max_shard_bytes, progress)
        (staging / CONFIG).write_text(json.dumps(new_config, indent=2, sort_keys=True) + "\n")
        _copy_others(source, staging)
        difference = _verify(source, old_config, staging, new_config, tolerance) if verify else None
    return CheckpointReport(plan, new_config, files, bytes_read, bytes_written, difference)


def _read_config(name: str, config: Config) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config)
    try:
        read = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{name}: expected a config, got no file {path}") from None
    except ValueError as error:
        raise ValueError(f"{name}: expected JSON, got {path}: {error}") from None
    if not isinstance(read, dict):
        raise ValueError(f"{name}: expected a JSON object, got {path} with {type(read).__name__}")
    return read


def _check_keys(old: Mapping[str, Any], changes: Mapping[str, Any], spec: Spec) -> None:
    """Refuse keys that would change nothing; a whole config may have some, if they are no misspelled sizes."""
    sizes = sorted({key for size, key in spec.config.items() if size != "eps"})
    for key in changes:
        if key in {*old, *sizes, *DEFAULTS, *FREE}:
            continue
        if meant := difflib.get_close_matches(key, sizes, 1, 0.8):
            raise ValueError(f"target_config: expected {meant[0]!r}, or another key of the config, got {key!r}")
        if "model_type" not in changes:
            raise ValueError(
                f"target_config: expected keys of the config or of sizes ({', '.join(sizes)}), got {key!r}"
            )


def _check_configs(old: Mapping[str, Any], new: Mapping[str, Any], spec: Spec) -> None:
    check_configs("target_config", spec, old, new, [key for key in FREE if key not in WRITTEN])
    before, after = read_sizes(spec, old), read_sizes(spec, new)
    for size, count in before.items():
        if after[size] < count:
            key = spec.config.get(size, size)
            raise ValueError(f"target_config: expected {key} of at least {count}, got {after[size]}")


def _make_plan(
    checkpoint: Checkpoint,
    source: Path,
    old_config: Mapping[str, Any],
    new_config: Mapping[str, Any],
    spec: Spec,
    mode: str,
    noise: float,
    seed: int,
) -> Plan:
    old_sizes, new_sizes = read_sizes(spec, old_config), read_sizes(spec, new_config)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    _check_blocks(shapes, source, spec, old_sizes["layers"])
    return make_plan(
        shapes,
        compute_shapes(shapes, spec, old_sizes, new_sizes),
        spec,
        heads=(read_heads(old_sizes), read_heads(new_sizes)),
        mode=mode,
        tied=is_tied(spec, old_config),
        noise=noise,
        seed=seed,
    )


def _check_blocks(names: Mapping[str, object], source: Path, spec: Spec, layers: int) -> None:
    """Every block has the same parameters."""
    found: dict[str, set[str]] = {}  # what may be missing in a block, by what is before its number
    for name in names:
        if split := spec.split_block(name):
            found.setdefault(split[0], set()).add(split[2])
    for before, endings in found.items():
        for number in range(layers):
            for ending in sorted(endings):
                if (name := f"{before}{number}{ending}") not in names:
                    raise ValueError(f"{source}: expected {name} in a model of {layers} layers, got no such tensor")


def _scale_eps(old: Mapping[str, Any], changes: Mapping[str, Any], new: dict[str, Any], plan: Plan) -> None:
    key = plan.spec.config.get("eps", "")
    if key in old:
        new[key] = old[key] * plan.eps_factor
        if not any(math.isclose(changes.get(key, new[key]), eps) for eps in (old[key], new[key])):
            raise ValueError(
                f"target_config: expected {key} {new[key]!r}, which keeps the function, got {changes[key]!r}"
            )
    elif plan.eps_factor != 1:
        raise ValueError(f"source_config: expected {key or 'eps'!r}, which changes with the width, got none")


def _plan_model(checkpoint: Checkpoint, plan: Plan) -> Part:
    targets: dict[str, list[tuple[str, Rule | None, int]]] = {}
    for rule in plan:
        targets.setdefault(rule.source, []).append((rule.name, rule, 0))
    return Part(MODEL, checkpoint.metadata, checkpoint.tensors, targets)


def _plan_optimizer(checkpoint: Checkpoint, plan: Plan) -> Part:
    rules: dict[str, list[Rule]] = {}
    for rule in plan:
        rules.setdefault(rule.source, []).append(rule)
    targets: dict[str, list[tuple[str, Rule | None, int]]] = {}
    for tensor in checkpoint.tensors.values():
        prefix, _, rest = tensor.name.partition(".")
        parameter, _, key = rest.rpartition(".")
        if prefix != "state" or parameter not in rules or key not in (*POWERS, "step"):
            wanted = f"state.PARAMETER.KEY, a parameter of the model and a key of {', '.join(POWERS)}, step"
            raise ValueError(f"{tensor.file}: expected {wanted}, got {tensor.name}")
        power = POWERS.get(key, 0)
        if power and tensor.shape != rules[parameter][0].old_shape:
            expected = rules[parameter][0].old_shape
            raise ValueError(f"{tensor.file}: expected {tensor.name} of shape {expected}, got {tensor.shape}")
        targets[tensor.name] = [
            (f"state.{rule.name}.{key}", rule if power else None, power) for rule in rules[parameter]
        ]
    metadata = dict(checkpoint.metadata)
    if OPTIMIZER in metadata:
        settings = _read_settings(metadata[OPTIMIZER])
        metadata[OPTIMIZER] = json.dumps(_grow_groups(settings, rules, plan.mode))
    return Part(OPTIMIZER, metadata, checkpoint.tensors, targets)


def _read_settings(text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
        kind, groups = settings["class"], [dict(group) for group in settings["param_groups"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError("optimizer: expected the settings that save_optimizer writes, got damaged ones") from None
    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected {', '.join(OPTIMIZERS)}, got {kind}")
    return {"class": kind, "param_groups": groups}


def _grow_groups(optimizer: dict[str, Any], rules: Mapping[str, list[Rule]], mode: str) -> dict[str, Any]:
    """Name the new parameters in an optimizer's groups; in mode ``"exact"`` one group for each way to scale."""
    groups = []
    for group in optimizer["param_groups"]:
        by_scale: dict[tuple[float, float], list[str]] = {}
        for parameter in group["params"]:
            if parameter not in rules:
                raise ValueError(f"optimizer: expected groups of the model's parameters, got {parameter}")
            for rule in rules[parameter]:
                exact = mode == "exact" and rule.scale is not None and rule.gradient is not None
                key = (rule.scale or 1.0, rule.gradient or 1.0) if exact else (1.0, 1.0)
                by_scale.setdefault(key, []).append(rule.name)
        for (scale, gradient), names in by_scale.items():
            groups.append({**scale_settings(optimizer["class"], group, scale, gradient), "params": names})
    return {**optimizer, "param_groups": groups}


def _write_parts(
    staging: Path, parts: list[Part], max_shard_bytes: int, progress: Callable[[int, int], object] | None
) -> tuple[list[str], int]:
    total = sum(tensor.nbytes for part in parts for tensor in part.list_targets())
    done = 0
    with ExitStack() as stack:
        try:
            writers = [
                stack.enter_context(Writer(staging, part.stem, part.list_targets(), part.metadata, max_shard_bytes))
                for part in parts
            ]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            free = shutil.disk_usage(staging).free
            raise OSError(f"dst: expected room on the disk for {total:,} bytes, got {free:,} free") from None
        for part, writer in zip(parts, writers, strict=True):
            factors = {name: part.sources[name].read() for name in part.factors}
            for source in part.sources.values():
                old = factors[source.name] if source.name in factors else source.read()
                for name, rule, power in part.targets[source.name]:
                    done += writer.write(name, _grow(old, rule, power, factors))
                    if progress is not None:
                        progress(done, total)
                del old
    return [file for writer in writers for file in writer.files], total


def _grow(old: Array, rule: Rule | None, power: int, factors: Mapping[str, Array]) -> Array:
    if rule is None:
        return old
    return rule.apply_state(old, power) if power else rule.apply(old, factors.get(rule.factor))


def _copy_others(source: Path, staging: Path) -> None:
    for file in sorted(source.iterdir()):
        if not file.is_file() or file.name.startswith(".") or (staging / file.name).exists():
            continue
        if not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, staging / file.name)
        elif file.name in ("optimizer.pt", "optimizer.bin"):
            text = f"{file}: left out; growth.save_optimizer writes a state that can be grown"
            warnings.warn(text, RuntimeWarning, stacklevel=3)


def _verify(source: Path, old: Mapping[str, Any], staging: Path, new: Mapping[str, Any], tolerance: float) -> float:
    try:
        import torch
        import transformers
    except ImportError:
        text = 'verify: comparing outputs needs torch and transformers: pip install "pycodesign[torch,hf]"'
        raise ModuleNotFoundError(text) from None
    from pycodesign.growth.modules import compare_outputs

    names = old.get("architectures") or []
    if not names or not hasattr(transformers, names[0]):
        raise ValueError(f"verify: expected the name of a transformers model in architectures, got {names}")
    cls = getattr(transformers, names[0])
    config = cls.config_class
    small, large = (
        cls.from_pretrained(directory, config=config.from_dict(dict(values)), dtype=torch.float32)
        for directory, values in ((source, old), (staging, new))
    )
    generator = torch.Generator().manual_seed(0)
    if "image_size" in old:
        size = old["image_size"]
        inputs = {"pixel_values": torch.randn(2, old.get("num_channels", 3), size, size, generator=generator)}
    else:
        inputs = {"input_ids": torch.randint(old["vocab_size"], (2, 16), generator=generator)}
    difference = compare_outputs(small, large, inputs)
    if not difference <= tolerance:
        text = f"outputs within {tolerance:.1g} of the largest"
        raise ValueError(f"verify: expected {text}, got a difference of {difference:.2g}")
    return difference
