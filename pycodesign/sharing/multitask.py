"""Many tasks on one frozen encoder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from pycodesign.sharing import files, masks
from pycodesign.sharing.cache import FeatureCache
from pycodesign.sharing.components import (
    Features,
    Task,
    TaskSpec,
    check_dropout,
    check_names,
    check_task,
    is_integer,
    read_features,
)
from pycodesign.sharing.deltas import KINDS, DenseDelta, LowRankDelta
from pycodesign.sharing.encoders import PROJECTIONS, Inputs, read_encoder
from pycodesign.sharing.inputs import check_inputs
from pycodesign.sharing.task_model import TaskModel

if TYPE_CHECKING:
    from pycodesign.sharing.choices import Search
    from pycodesign.sharing.engine import Engine

__all__ = ["MultiTask"]

Labels: TypeAlias = int | str | tuple[str, int]
NAME = re.compile(r"[A-Za-z0-9_-]+")


class MultiTask(nn.Module):
    """Tasks on one frozen encoder: each reads its activations and changes none of them.

    A task has, for chosen projections of chosen layers, a difference of weights dW, which reads what the projection
    reads in the frozen model; an attention over all layers' outputs; and a head. With dW = 0, as at the start, layers
    give what the frozen model gives. Ordinary fine-tuning, and LoRA, change what later layers read, so that N tasks
    need N passes; here N tasks need one.

    Parameters
    ----------
    backbone : torch.nn.Module
        See `read_encoder`. Its parameters are frozen, and it stays in evaluation mode: each call puts it back there.
    tasks : dict
        For each name the number of classes, ``"regression"``, or ``("tokens", classes)`` for labels of tokens.
    delta : {"sparse", "rows", "low_rank", "dense", "none"}, or dict
        Kind of all dW, or of each projection's: ``"query"``, ``"key"``, ``"value"``, ``"output"``, ``"up"``,
        ``"down"``. Of ``"rows"``, few outputs of a projection differ, each in all of its weights. Sparse deltas and
        rows are there after `select_mask`; until then a task computes without them, and its `load_state_dict` does not
        take them.
    density : float
        Share of the entries, or rows, that may differ; for low-rank ones it sets the rank unless `rank` does.
    rank : int, optional
    positions : {"mean", "first"}
        What heads read: the mean over a text's tokens, or its first token, which padding may precede. Labels of tokens
        read all.
    layers : sequence of int, optional
        With components; all by default.
    aggregator : {"attention", "concat"}
        How heads read the layers: by an attention over them, or all side by side, each feature at mean 0 and variance
        1 (the batch norm without parameters takes both from training, which then needs batches of at least two texts;
        for labels of tokens they are those of padding, too). The latter has more parameters for each class, and is
        easier to train.
    dropout : float
        Before the head, in training.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    References
    ----------
    Fu et al., "LeTS", ICML 2021.

    Examples
    --------
    >>> import torch
    >>> from pycodesign import sharing
    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> backbone = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    >>> tasks = sharing.MultiTask(backbone, {"tone": 2, "topic": 5}, delta="low_rank", rank=2)
    >>> x = torch.randn(3, 7, 16)
    >>> {name: tuple(logits.shape) for name, logits in tasks(x).items()}
    {'tone': (3, 2), 'topic': (3, 5)}
    """

    def __init__(
        self,
        backbone: nn.Module,
        tasks: Mapping[str, Labels],
        *,
        delta: str | Mapping[str, str] = "sparse",
        density: float = 0.014,
        rank: int | None = None,
        positions: str = "mean",
        layers: Sequence[int] | None = None,
        aggregator: str = "attention",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not isinstance(tasks, Mapping):
            raise TypeError(f"tasks: expected labels by name, got {type(tasks).__name__}")
        self.encoder = read_encoder(backbone)
        self.backbone = backbone
        self.tasks = nn.ModuleDict()
        options = {"delta": delta, "density": density, "rank": rank, "positions": positions}
        self._options: dict[str, Any] = {**options, "layers": layers, "aggregator": aggregator, "dropout": dropout}
        self._make_spec(("tokens", 1) if positions == "all" else 1, self._options)  # checks them
        for name, labels in tasks.items():
            self.add_task(name, labels)
        backbone.requires_grad_(False).eval()

    @property
    def dropout(self) -> float:
        """Before the head of a task that is added or read, unless it has its own."""
        dropout: float = self._options["dropout"]
        return dropout

    def add_task(self, name: str, labels: Labels, **options: Any) -> None:
        """Add a task; `options` are those of the constructor, whose values are the defaults.

        Raises
        ------
        TypeError, ValueError
            For a name that is taken, also by an attribute of `torch.nn.ModuleDict`, or has other characters than
            letters, digits, ``_`` and ``-``; for labels or options that are not as the constructor's.
        """
        self._check_name(name)
        unknown = options.keys() - self._options.keys()
        if unknown:
            raise TypeError(f"{min(unknown)}: expected one of {', '.join(self._options)}, got another option")
        chosen = {**self._options, **options}
        spec = self._make_spec(labels, chosen)
        task = Task(spec, self.encoder, chosen["dropout"])
        for place, what in spec.deltas.items():
            layer, _, projection = place.partition(".")
            weight = self.encoder.layers[int(layer)].projections[projection].weight
            shape = (weight.shape[0], weight.shape[1])
            if what == "low_rank":
                rank = spec.rank or masks.find_rank(shape, spec.density)
                task.deltas[f"{layer}_{projection}"] = LowRankDelta(shape, rank).to(weight.device)
            elif what == "dense":
                task.deltas[f"{layer}_{projection}"] = DenseDelta(shape).to(weight.device)
        self.tasks[name] = task.train(self.training)

    def _make_spec(self, labels: Labels, options: Mapping[str, Any]) -> TaskSpec:
        count, kind = _read_labels(labels)
        check_dropout(options["dropout"])
        return TaskSpec(
            labels=count,
            kind=kind,
            positions="all" if kind == "tokens" else options["positions"],
            deltas=_list_places(options["delta"], options["layers"], len(self.encoder.layers)),
            rank=options["rank"],
            density=options["density"],
            aggregator=options["aggregator"],
        )

    def remove_task(self, name: str) -> None:
        """Remove a task."""
        self.get_task(name)
        del self.tasks[name]

    def get_task(self, name: str) -> Task:
        """Return a task's module.

        Raises
        ------
        KeyError
            For a name that there is not.
        """
        if name not in self.tasks:
            raise KeyError(f"name: expected one of {', '.join(self.tasks) or 'no task at all'}, got {name!r}")
        task = self.tasks[name]
        assert isinstance(task, Task)
        return task

    def task_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Iterate over what training a task changes."""
        return self.get_task(name).parameters()

    def forward(
        self,
        inputs: Tensor | Inputs | None = None,
        attention_mask: Tensor | None = None,
        tasks: Sequence[str] | None = None,
        **named: Tensor | None,
    ) -> dict[str, Tensor]:
        """Return logits by task: (B, labels), or (B, T, labels) of token labels. Gradients reach tasks alone.

        Parameters
        ----------
        inputs : Tensor or dict
            ``input_ids`` (B, T) of integers, ``pixel_values`` (B, C, H, W), ``inputs_embeds`` (B, T, D), or the
            backbone's arguments by name, ``attention_mask`` among them; None counts as not given.
        attention_mask : Tensor (B, T), optional
            1 where a token is.
        tasks : sequence of str, optional
            All by default.
        **named
            The backbone's arguments, as a tokenizer gives them: ``tasks(**tokenizer(texts, return_tensors="pt"))``.

        Raises
        ------
        KeyError
            For a task that there is not.
        TypeError, ValueError
            For inputs that the backbone does not take, texts longer than it takes among them.
        """
        names = list(self.tasks) if tasks is None else check_names(tasks)
        chosen = {name: self.get_task(name) for name in names}
        with torch.no_grad():
            checked, mask = self.check_inputs(inputs, attention_mask, **named)
            first, layers = self.encoder.run(checked, mask)
            mask = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device) if mask is None else mask
        logits = {}
        for name, task in chosen.items():
            with torch.no_grad():
                wanted = {n: task.spec.find_deltas(n) for n in task.spec.layers}
                features = read_features(self.encoder, first, layers, mask, task.spec.positions, wanted)
            logits[name] = task(self.encoder, features)
        return logits

    @torch.no_grad()
    def read(self, name: str, inputs: Tensor | Inputs, attention_mask: Tensor | None = None) -> Features:
        """Run the backbone, and return what a task reads of it."""
        spec = self.get_task(name).spec
        named, mask = self.check_inputs(inputs, attention_mask)
        first, layers = self.encoder.run(named, mask)
        mask = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device) if mask is None else mask
        wanted = {n: spec.find_deltas(n) for n in spec.layers}
        return read_features(self.encoder, first, layers, mask, spec.positions, wanted)

    def run(self, name: str, features: Features) -> Tensor:
        """Return a task's logits of what `read` or a cache gave for it."""
        logits: Tensor = self.get_task(name)(self.encoder, features)
        return logits

    def cache(
        self, name: str, batches: Iterable[Tensor | Inputs], dtype: torch.dtype | None = torch.bfloat16
    ) -> FeatureCache:
        """Run the backbone once over all texts, and keep what a task reads: training it needs no further pass.

        Parameters
        ----------
        name : str
        batches : iterable
            Of inputs as `forward` takes them.
        dtype : torch.dtype or None
            In which features are kept; None: as the backbone computes them.
        """
        cache = FeatureCache(dtype)
        for inputs in batches:
            cache.extend(self.read(name, inputs))
        if not len(cache):
            raise ValueError("batches: expected at least one batch, got none")
        return cache

    def select_mask(
        self,
        name: str,
        batches: Iterable[tuple[Any, Any]],
        loss: Callable[[Tensor, Any], Tensor],
        *,
        method: str = "gradient",
        scope: str = "global",
        lr: float = 1e-3,
    ) -> dict[str, float]:
        """Choose which entries or rows of a task's weights may differ. After this, they alone are trained.

        Call it when the head has been trained a little: gradients of a random head say little. What is chosen starts at
        zero.

        Parameters
        ----------
        name : str
        batches : iterable of (inputs, labels)
            Inputs as `forward` takes them, or `Features`, as `read` and a cache's batches are.
        loss : callable
            Of logits and labels.
        method : {"gradient", "change"}
            By the sum of gradients' magnitudes at dW = 0 (a saliency of weight times gradient would be zero there), or
            by the change of weights in a warm-up of Adam over the batches.
        scope : {"global", "matrix"}
            `density` of all matrices together, or of each.
        lr : float
            Of the warm-up.

        Returns
        -------
        dict
            For each ``"LAYER.PROJECTION"`` the share of its weights that was chosen, biases aside.

        Raises
        ------
        KeyError, ValueError
            For an unknown task, one without sparse deltas or rows, no batch at all, or gradients that are all zero. The
            task is then as it was.
        """
        task = self.get_task(name)
        with masks.restore_on_failure(task):
            return masks.select_mask(task, self.encoder, self.read_batches(name, batches), loss, method, scope, lr)

    def read_batches(self, name: str, batches: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Features, Any]]:
        """Read each batch's inputs, unless they are features already, when it is asked for."""
        for batch in batches:
            if not isinstance(batch, Sequence) or isinstance(batch, str | Features) or len(batch) != 2:
                raise TypeError(f"batches: expected pairs of inputs and labels, got {type(batch).__name__}")
            inputs, labels = batch
            yield inputs if isinstance(inputs, Features) else self.read(name, inputs), labels

    def search(
        self, name: str, batches: Sequence[tuple[Any, Any]], loss: Callable[[Tensor, Any], Tensor], **options: Any
    ) -> Search:
        """Choose for each layer and projection of a task whether it differs, and how; see `sharing.search`."""
        from pycodesign.sharing import choices

        return choices.search(self, name, batches, loss, **options)

    def count_parameters(self, name: str) -> dict[str, float]:
        """Count a task's parameters: ``components``, ``head``, and ``share``, components over the backbone's."""
        counts = self.get_task(name).count_parameters()
        return {**counts, "share": counts["components"] / self.encoder.count_parameters()}

    @property
    def hash(self) -> str:
        """SHA-256 of the backbone as it is now."""
        return self.encoder.compute_hash()

    def save_pretrained(self, path: str | os.PathLike[str], tasks: Sequence[str] | None = None) -> list[Path]:
        """Write each task to ``NAME.safetensors`` in a folder; the backbone is not written.

        Raises
        ------
        KeyError, ValueError
            For an unknown task, one whose mask is not selected yet, or one with values that are not finite.
        OSError
            If a file cannot be written. Either way nothing is.
        """
        folder = Path(path)
        names = list(self.tasks) if tasks is None else check_names(tasks)
        chosen = {name: self.get_task(name) for name in names}
        backbone = self.hash
        contents = {name: files.encode_task(name, task, backbone) for name, task in chosen.items()}
        folder.mkdir(parents=True, exist_ok=True)
        paths = {name: folder / f"{name}.safetensors" for name in contents}
        files.write_files({paths[name]: content for name, content in contents.items()})
        return [paths[name] for name in names]

    def load_task(self, path: str | os.PathLike[str], name: str | None = None) -> str:
        """Add a task from its file, which is checked as a whole before; return its name.

        Parameters
        ----------
        path : path
        name : str, optional
            The file's by default.

        Raises
        ------
        ValueError
            If the file is damaged, of another backbone, or does not fit it.
        """
        return self._load_task(Path(path), name, self.hash)

    def _load_task(self, source: Path, name: str | None, backbone: str) -> str:
        name = source.stem if name is None else name
        self.insert_task(name, files.read_task(source, self.encoder, backbone, self.dropout))
        return name

    def insert_task(self, name: str, task: Task) -> None:
        """Add a task that is made already.

        Raises
        ------
        TypeError, ValueError
            For a name that `add_task` refuses, what is no task, or one that was made for another backbone.
        """
        self._check_name(name)
        check_task(task)
        task.check_fits(self.encoder)
        self.tasks[name] = task.train(self.training)

    @classmethod
    def from_pretrained(cls, backbone: nn.Module, path: str | os.PathLike[str], **options: Any) -> MultiTask:
        """Read all tasks of a folder that `save_pretrained` wrote."""
        tasks = cls(backbone, {}, **options)
        sources = sorted(Path(path).glob("*.safetensors"))
        if not sources:
            raise ValueError(f"path: expected tasks' files in {path}, got none")
        backbone_hash = tasks.hash
        for source in sources:
            tasks._load_task(source, None, backbone_hash)
        return tasks

    def task_model(self, name: str) -> TaskModel:
        """Return one task as a model for a training loop, such as Hugging Face's Trainer."""
        self.get_task(name)
        return TaskModel(self, name)

    def build_engine(self, tasks: Sequence[str] | None = None) -> Engine:
        """Return an `Engine`, which runs the backbone once and tasks through the package's kernels."""
        from pycodesign.sharing.engine import Engine

        engine = Engine(self.encoder, self.check_inputs)
        for name in list(self.tasks) if tasks is None else check_names(tasks):
            engine.add_task(name, self.get_task(name))
        return engine

    def check_inputs(
        self, inputs: Tensor | Inputs | None = None, attention_mask: Tensor | None = None, **others: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return inputs by name, and the mask (B, T) of bool; None if there is none, or it hides nothing."""
        if any(module.training for module in self.backbone.modules()):
            self.backbone.eval()
        config = getattr(self.backbone, "config", None)
        return check_inputs(self.encoder, config, inputs, attention_mask, others)

    def train(self, mode: bool = True) -> MultiTask:
        """Set the mode of tasks; the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"name: expected letters, digits, _ and -, got {name!r}")
        if name in self.tasks:
            raise ValueError(f"name: expected a new name, got {name!r}, which is a task's")
        if hasattr(self.tasks, name):
            raise ValueError(f"name: expected one that torch.nn.ModuleDict takes, got {name!r}, its attribute")


def _read_labels(labels: Labels) -> tuple[int, str]:
    if labels == "regression":
        return 1, "regression"
    if isinstance(labels, tuple) and len(labels) == 2 and labels[0] == "tokens" and is_integer(labels[1]):
        return labels[1], "tokens"
    if is_integer(labels):
        return labels, "classification"  # type: ignore[return-value]
    raise TypeError(f"labels: expected a number of classes, 'regression' or ('tokens', classes), got {labels!r}")


def _list_places(delta: str | Mapping[str, str], layers: Sequence[int] | None, count: int) -> dict[str, str]:
    """Return kinds by ``"LAYER.PROJECTION"``."""
    if not isinstance(delta, str | Mapping):
        raise TypeError(f"delta: expected a kind, or kinds by projection, got {delta!r}")
    if layers is not None and not (isinstance(layers, Iterable) and all(is_integer(layer) for layer in layers)):
        raise TypeError(f"layers: expected a sequence of integers, got {layers!r}")
    kinds = dict.fromkeys(PROJECTIONS, delta) if isinstance(delta, str) else dict(delta)
    for projection, kind in kinds.items():
        if projection not in PROJECTIONS:
            raise ValueError(f"delta: expected projections among {', '.join(PROJECTIONS)}, got {projection!r}")
        if kind not in (*KINDS, "none"):
            raise ValueError(f"delta: expected one of {', '.join((*KINDS, 'none'))}, got {kind!r}")
    chosen = range(count) if layers is None else sorted(set(layers))
    for layer in chosen:
        if not 0 <= layer < count:
            raise ValueError(f"layers: expected numbers from 0 to {count - 1}, got {layer}")
    order = [(layer, projection) for layer in chosen for projection in PROJECTIONS]
    return {f"{n}.{p}": kinds[p] for n, p in order if kinds.get(p, "none") != "none"}
