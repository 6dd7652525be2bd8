"""Growth of checkpoints on disk, tensor by tensor."""

from __future__ import annotations

import difflib
import errno
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias

from pycodesign.growth.plan import Plan, make_plan
from pycodesign.growth.rules import OPTIMIZERS, POWERS, Rule, scale_settings
from pycodesign.growth.shards import NUMPY, TORCH, Array, Checkpoint, Tensor, Writer, read_checkpoint
from pycodesign.growth.sizes import DEFAULTS, FREE, check_configs, compute_shapes, is_tied, read_heads, read_sizes
from pycodesign.growth.spec import Spec
from pycodesign.growth.specs import find_spec
from pycodesign.growth.staging import stage_directory

__all__ = ["CheckpointReport", "grow_checkpoint"]

Config: TypeAlias = Any  # a mapping, a path, or a config of transformers

MODEL, OPTIMIZER, CONFIG = "model", "optimizer", "config.json"
MARKS = (CONFIG, f"{MODEL}.safetensors", f"{MODEL}.safetensors.index.json")  # of a checkpoint
SHARD_BYTES = 5_000_000_000
WRITTEN = ("architectures", "dtype", "torch_dtype")  # may be null in a config made for its sizes
REPLACED = re.compile(  # what overwriting removes: the weights in any format, the optimizer's state
    r"(model|pytorch_model|tf_model|flax_model|consolidated|optimizer)([-.].+)?"
    r"\.(safetensors|bin|pt|pth|h5|msgpack)(\.index\.json)?"
)
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".h5", ".msgpack")
FLOATS = ("F16", "BF16", "F32", "F64")
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
    source_config: Config = None,
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
    it is on the disk: whenever the process ends, `dst` is what it was or complete. What a process that was killed left
    beside `dst` is removed by the next one. (Where the file system cannot swap two directories, overwriting is two
    renames; a process that ends between them leaves the old one beside `dst`, as ``.NAME.HEX.old``.)

    Parameters
    ----------
    src : path
        A directory in Hugging Face's layout: ``config.json`` and ``model.safetensors``, or shards and
        ``model.safetensors.index.json``. An ``optimizer.safetensors`` (or shards) beside it, as
        `growth.save_optimizer` writes it, is grown, too; small files, such as a tokenizer's, are copied, folders in it
        are not: what they hold may depend on the width.
    dst : path
        A directory that does not exist, unless `overwrite`; may be `src` then.
    source_config : mapping, path or transformers.PreTrainedConfig, optional
        In place of the ``config.json`` of `src`.
    target_config : mapping, path or transformers.PreTrainedConfig
        Sizes of the larger model, as in its ``config.json``; what it leaves out stays as it is. A norm's eps follows
        the width. All other keys must agree, but for dropout and what only loading and generation read.
    spec : Spec or str
        What the axes of the parameters mean; ``"auto"``: by the config's ``model_type``.
    mode, seed, noise
        As for `grow`. In mode ``"exact"`` the optimizer's groups are scaled.
    max_shard_bytes : int
        Of one file.
    overwrite : bool
        Replace the checkpoint in `dst`: its weights in any format, its optimizer's state, and the files that `src` has,
        too. Whatever else is there stays.
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
    if not isinstance(max_shard_bytes, Integral) or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected an integer of at least 1, got {max_shard_bytes!r}")
    if source.is_file():
        raise ValueError(f"src: expected a directory, got the file {source}")
    if target.exists() and not overwrite:
        raise ValueError(f"dst: expected a new directory, or overwrite, got {target}, which exists")
    if target.exists() and not target.is_dir():
        raise ValueError(f"dst: expected a directory, got the file {target}")
    if target in Path(os.path.realpath(source)).parents:
        raise ValueError(f"dst: expected another directory than one that src lies in, got {target}")
    if target.exists() and any(target.iterdir()) and not any((target / name).exists() for name in MARKS):
        raise ValueError(f"dst: expected a checkpoint to overwrite, got {target} without any of {', '.join(MARKS)}")
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
    said = _find_dtype(checkpoint, old_config)
    _check_configs({**old_config, **said}, {**old_config, **said, **changes}, spec)
    plan = _make_plan(checkpoint, source, old_config, new_config, spec, mode, noise, seed)
    _scale_eps(old_config, changes, new_config, plan)
    parts = [_plan_model(checkpoint, plan)]
    if optimizer := read_checkpoint(source, OPTIMIZER):
        parts.append(_plan_optimizer(optimizer, plan))
    cls = _find_class(old_config) if verify else None
    tolerance = max(TOLERANCES.get(tensor.dtype, 1e-5) for tensor in checkpoint.tensors.values())
    bytes_read = sum(tensor.nbytes for part in parts for tensor in part.sources.values())
    if dry_run:
        bytes_written = sum(tensor.nbytes for part in parts for tensor in part.list_targets())
        return CheckpointReport(plan, new_config, [], bytes_read, bytes_written)
    _check_room(target, source, parts)
    with stage_directory(target, replace=overwrite) as staging:
        files, bytes_written = _write_parts(staging, parts, max_shard_bytes, progress)
        (staging / CONFIG).write_text(json.dumps(new_config, indent=2, sort_keys=True) + "\n")
        for file in _list_others(source):
            if not (staging / file.name).exists():
                shutil.copyfile(file, staging / file.name)
        difference = None
        if cls is not None:
            difference = _verify(cls, source, old_config, staging, new_config, tolerance)
        if overwrite and target.exists():
            _keep_others(target, staging)
    return CheckpointReport(plan, new_config, files, bytes_read, bytes_written, difference)


def _read_config(name: str, config: Config) -> dict[str, Any]:
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if isinstance(config, Mapping):
        return dict(config)
    if not isinstance(config, (str, os.PathLike)):
        raise TypeError(f"{name}: expected a mapping, a path or a config of transformers, got {type(config).__name__}")
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


def _find_dtype(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, str]:
    """Say what the files hold where a config does not."""
    dtypes = {tensor.dtype for tensor in checkpoint.tensors.values()} & {*FLOATS}
    if len(dtypes) != 1 or config.get("dtype") or config.get("torch_dtype"):
        return {}
    return {"dtype": {**NUMPY, **TORCH}[dtypes.pop()]}


def _check_configs(old: Mapping[str, Any], new: Mapping[str, Any], spec: Spec) -> None:
    check_configs("target_config", spec, old, new, [key for key in FREE if key not in WRITTEN])
    before, after = read_sizes(spec, old, "source_config"), read_sizes(spec, new, "target_config")
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
    plan = make_plan(
        shapes,
        compute_shapes(shapes, spec, old_sizes, new_sizes),
        spec,
        heads=(read_heads(old_sizes), read_heads(new_sizes)),
        mode=mode,
        tied=is_tied(spec, old_config, shapes),
        noise=noise,
        seed=seed,
    )
    for rule in plan:
        if rule.axes and (dtype := checkpoint.tensors[rule.source].dtype) not in FLOATS:
            raise ValueError(f"{source}: expected {rule.source} of {', '.join(FLOATS)}, got {dtype}")
    return plan


def _check_blocks(names: Mapping[str, object], source: Path, spec: Spec, layers: int) -> None:
    """Every block has the same parameters."""
    found: dict[str, set[str]] = {}  # what may be missing in a block, by what is before its number
    for name in names:
        if split := spec.split_block(name):
            found.setdefault(split[0], set()).add(split[2])
    if spec.blocks and layers and not found:
        raise ValueError(f"{source}: expected blocks {', '.join(spec.blocks)} in a model of {layers} layers, got none")
    for before, endings in found.items():
        for number in range(layers):
            for ending in sorted(endings):
                if (name := f"{before}{number}{ending}") not in names:
                    raise ValueError(f"{source}: expected {name} in a model of {layers} layers, got no such tensor")
    for name in names:
        if (split := spec.split_block(name)) and split[1] >= layers:
            raise ValueError(f"{source}: expected blocks below {layers} by the config, got {name}")


def _scale_eps(old: Mapping[str, Any], changes: Mapping[str, Any], new: dict[str, Any], plan: Plan) -> None:
    key = plan.spec.config.get("eps", "")
    for name, config in (("source_config", old), ("target_config", changes)):
        if key in config and (not isinstance(config[key], (int, float)) or isinstance(config[key], bool)):
            raise ValueError(f"{name}: expected a number for {key!r}, got {config[key]!r}")
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
    rules: dict[str, list[tuple[str, Rule]]] = {}  # by either name of the source: new names of the same kind
    for rule in plan:
        rules.setdefault(rule.source, []).append((rule.name, rule))
        if (other := plan.spec.translate(rule.source)) != rule.source:
            rules.setdefault(other, []).append((plan.spec.translate(rule.name), rule))
    targets: dict[str, list[tuple[str, Rule | None, int]]] = {}
    for tensor in checkpoint.tensors.values():
        prefix, _, rest = tensor.name.partition(".")
        parameter, _, key = rest.rpartition(".")
        if prefix != "state" or parameter not in rules or key not in (*POWERS, "step"):
            wanted = f"state.PARAMETER.KEY, a parameter of the model and a key of {', '.join(POWERS)}, step"
            raise ValueError(f"{tensor.file}: expected {wanted}, got {tensor.name}")
        power = POWERS.get(key, 0)
        expected = rules[parameter][0][1].old_shape
        if power and tensor.dtype not in FLOATS:
            raise ValueError(f"{tensor.file}: expected {tensor.name} of {', '.join(FLOATS)}, got {tensor.dtype}")
        if power and tensor.shape != expected:
            raise ValueError(f"{tensor.file}: expected {tensor.name} of shape {expected}, got {tensor.shape}")
        targets[tensor.name] = [
            (f"state.{name}.{key}", rule if power else None, power) for name, rule in rules[parameter]
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
        numbers = ["lr", "weight_decay", *(["eps"] if kind != "SGD" else [])]
        if not all(isinstance(group[key], (int, float)) for group in groups for key in numbers):
            raise ValueError
        if not all(isinstance(group["params"], list) for group in groups):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError("optimizer: expected the settings that save_optimizer writes, got damaged ones") from None
    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected {', '.join(OPTIMIZERS)}, got {kind}")
    return {"class": kind, "param_groups": groups}


def _grow_groups(optimizer: dict[str, Any], rules: Mapping[str, list[tuple[str, Rule]]], mode: str) -> dict[str, Any]:
    """Name the new parameters in an optimizer's groups; in mode ``"exact"`` one group for each way to scale."""
    groups = []
    for group in optimizer["param_groups"]:
        by_scale: dict[tuple[float, float], list[str]] = {} if group["params"] else {(1.0, 1.0): []}
        for parameter in group["params"]:
            if parameter not in rules:
                raise ValueError(f"optimizer: expected groups of the model's parameters, got {parameter}")
            for name, rule in rules[parameter]:
                exact = mode == "exact" and rule.scale is not None and rule.gradient is not None
                key = (rule.scale or 1.0, rule.gradient or 1.0) if exact else (1.0, 1.0)
                by_scale.setdefault(key, []).append(name)
        for (scale, gradient), names in by_scale.items():
            lists = {key: names for key in ("params", "param_names") if key in group}
            groups.append({**scale_settings(optimizer["class"], group, scale, gradient), **lists})
    return {**optimizer, "param_groups": groups}


def _write_parts(
    staging: Path, parts: list[Part], max_shard_bytes: int, progress: Callable[[int, int], object] | None
) -> tuple[list[str], int]:
    total = sum(tensor.nbytes for part in parts for tensor in part.list_targets())
    done = 0
    free = shutil.disk_usage(staging).free
    with ExitStack() as stack:
        try:
            writers = [
                stack.enter_context(Writer(staging, part.stem, part.list_targets(), part.metadata, max_shard_bytes))
                for part in parts
            ]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
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


def _list_others(source: Path) -> list[Path]:
    """List the files that go along as they are, such as a tokenizer's; warn of optimizer states that cannot."""
    others = []
    for file in sorted(source.iterdir()):
        if not file.is_file() or file.name.startswith("."):
            continue
        if not file.name.endswith(WEIGHTS):
            others.append(file)
        elif file.name in ("optimizer.pt", "optimizer.bin"):
            text = f"{file}: left out; growth.save_optimizer writes a state that can be grown"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
    return others


def _check_room(target: Path, source: Path, parts: list[Part]) -> None:
    others = (file.stat().st_size for file in source.iterdir() if file.is_file() and not file.name.endswith(WEIGHTS))
    total = sum(tensor.nbytes for part in parts for tensor in part.list_targets()) + sum(others)
    free = shutil.disk_usage(next(folder for folder in (target, *target.parents) if folder.exists())).free
    if total > free:
        raise OSError(f"dst: expected room on the disk for {total:,} bytes, got {free:,} free")


def _keep_others(target: Path, staging: Path) -> None:
    """Take over what is no part of the checkpoint that is replaced, without a copy where the disk can do so.

    What replaces a file has its permissions, and so has the directory.
    """
    for entry in target.iterdir():
        new = staging / entry.name
        if new.is_file() and entry.is_file():
            shutil.copymode(entry, new)
        if new.exists() or (entry.is_file() and REPLACED.fullmatch(entry.name)):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new, symlinks=True, copy_function=_link)
        else:
            _link(entry, new)
    shutil.copymode(target, staging)


def _link(old: str | Path, new: str | Path) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)


def _find_class(config: Mapping[str, Any]) -> Any:
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError:
        text = 'verify: comparing outputs needs torch and transformers: pip install "pycodesign[torch,hf]"'
        raise ModuleNotFoundError(text) from None
    names = config.get("architectures") or []
    if not names or not hasattr(transformers, names[0]):
        raise ValueError(f"verify: expected the name of a transformers model in architectures, got {names}")
    return getattr(transformers, names[0])


def _verify(
    cls: Any, source: Path, old: Mapping[str, Any], staging: Path, new: Mapping[str, Any], tolerance: float
) -> float:
    import torch

    from pycodesign.growth.modules import compare_outputs

    small, large = (
        cls.from_pretrained(directory, config=cls.config_class.from_dict(dict(values)), dtype=torch.float32)
        for directory, values in ((source, old), (staging, new))
    )
    config, generator = small.config, torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
    if hasattr(config, "image_size"):
        sizes = [config.image_size] * 2 if isinstance(config.image_size, int) else config.image_size
        inputs["pixel_values"] = torch.randn(2, config.num_channels, *sizes, generator=generator)
    else:
        choices = (1,) if "MultipleChoice" in cls.__name__ else ()
        shape = (2, *choices, min(16, config.max_position_embeddings))
        inputs["input_ids"] = torch.randint(config.vocab_size, shape, generator=generator)
    difference = compare_outputs(small, large, inputs)
    if not difference <= tolerance:
        text = f"outputs within {tolerance:.1g} of the largest"
        raise ValueError(f"verify: expected {text}, got a difference of {difference:.2g}")
    return difference
