"""Growth of torch modules."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

try:
    import torch
except ImportError as error:
    raise ImportError("pycodesign.growth.grow needs torch: `pip install 'pycodesign[torch]'`") from error

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from pycodesign.growth.indices import Heads, Inexact
from pycodesign.growth.optimizers import OptimizerGrowth
from pycodesign.growth.plan import Plan, find_roles, make_plan
from pycodesign.growth.rules import Rule
from pycodesign.growth.sequential import is_sequential, make_sequential_spec, name_types
from pycodesign.growth.sizes import FREE, check_configs, read_heads, read_sizes
from pycodesign.growth.spec import Role, Spec
from pycodesign.growth.specs import find_spec, find_timm_spec

__all__ = ["Report", "grow", "plan_modules"]

IDLE = ("Identity", "DropPath", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d")  # keep what they get, evaluated
SIZES = (  # attributes of torch's and timm's modules in which the larger may differ, and what only training reads
    *("in_features", "out_features", "in_channels", "out_channels", "num_features", "embedding_dim"),
    *("normalized_shape", "groups", "num_parameters", "unflattened_size"),
    *("eps", "momentum", "padding_idx", "inplace", "training"),
    *("embed_dim", "head_hidden_size", "num_heads", "head_dim", "attn_dim", "scale", "channels", "fused_attn"),
    *("kdim", "vdim"),
    *("drop_rate", "drop_prob", "scale_by_keep", "init_values", "weight_init_mode", "fix_init", "grad_checkpointing"),
)
LIBRARIES = ("torch.nn.modules", "timm.")
WRAPPERS = (DistributedDataParallel, nn.DataParallel, AveragedModel)  # and torch.compile's
EPS = ("eps", "variance_epsilon", "epsilon", "norm_eps")  # what norms call theirs
BY_LAYER = ("past_key_values", "hidden_states", "attentions", "cross_attentions")  # in outputs of transformers
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Report:
    """What `grow` did, or would do.

    Attributes
    ----------
    plan : Plan
    difference : float or None
        The largest difference of outputs for `inputs`, relative to the largest output; None without inputs, NaN where
        an output is.
    """

    plan: Plan
    difference: float | None = None

    def __str__(self) -> str:
        text = str(self.plan)
        if self.difference is not None:
            text += f"\nlargest difference of outputs, relative to the largest: {self.difference:.2g}"
        return text


def grow(
    source: nn.Module,
    target: nn.Module,
    *,
    spec: Spec | str = "auto",
    mode: str = "break_symmetry",
    optimizer: Optimizer | None = None,
    target_optimizer: Optimizer | None = None,
    seed: int = 0,
    inputs: Any = None,
    noise: float = 0.1,
    ema: nn.Module | None = None,
    target_ema: nn.Module | None = None,
    dry_run: bool = False,
) -> Report:
    """Fill a larger model, and its optimizer, so that it continues a smaller one.

    The function is kept: wider in the residual stream, in MLPs, by heads or by their dimensions, deeper, or several at
    once. Old units keep their places: the first features of a grown representation are the old ones, up to the constant
    factor that a tied output layer puts into the last norm. New blocks are identities until they are trained.

    Parameters
    ----------
    source, target : torch.nn.Module
        Two models of one class, the target larger; its parameters are written, its norms' ``eps`` follow the width, in
        its config, too.
    spec : Spec or str
        What the axes of the parameters mean. ``"auto"`` knows Hugging Face's GPT-2, Llama, ViT, DeiT and BERT, timm's
        ViT, DeiT and ResNet, and `torch.nn.Sequential`, by the exact types of their modules; a subclass of one of
        Hugging Face's may have another name, but no forward of its own. Modules with forward hooks need a Spec.
    mode : {"break_symmetry", "exact"}
        ``"break_symmetry"`` gives copies different weights where only their sum matters, moves the optimizer's states
        as well as can be, and leaves learning rates and weight decay alone. ``"exact"`` copies evenly, and gives the
        target's optimizer the source's settings, scaled by parameter as groups: without dropout the training continues
        on the source's trajectory, copies stay copies. It needs integer multiples and the same depth. Clipping by the
        norm of all gradients leaves the trajectory, once it clips: copies change that norm.
    optimizer, target_optimizer : torch.optim.Adam, AdamW or SGD, optional
        Of the source's and of the target's parameters. The target's moments and step counts are written.
    seed : int
        Of the noise.
    inputs : Tensor, tuple or dict, optional
        Arguments to call both models with, to compare what they return. Both are called before anything is written.
    noise : float
        How different copies are, relative to the weights.
    ema, target_ema : torch.nn.Module, optional
        Averages of the two models, as `torch.optim.swa_utils.AveragedModel`; grown alike.
    dry_run : bool
        Check and plan, write nothing.

    Returns
    -------
    Report
        Prints as a table with a row for each parameter.

    Raises
    ------
    TypeError
        If the two are not of one class, or the optimizer is not one of those three.
    ValueError
        Before anything is written: if the target is smaller or differs in more than size (an activation, a stride, a
        key of its config), if the change cannot be exact (`Inexact`; the message says what would be), if no rule covers
        a parameter, if the source returns nothing for `inputs` that could be compared, or if in mode ``"exact"`` the
        learning rates of the target's optimizer have a schedule, which knows the old groups.

    Notes
    -----
    States follow the gradients. A parameter that becomes s times itself, with a times the gradient, continues with the
    moments times a and a squared; in mode ``"exact"`` Adam's learning rate goes by s and its eps by a, SGD's learning
    rate by s / a, decoupled weight decay by 1 / s, coupled by a / s.

    A change of a post-norm model (BERT) is exact for integer multiples of its width only, as is that of timm's ViTs
    with a norm before the blocks (CLIP's), none behind them, max pooling before the last one, or norms without gamma.
    Rotary heads keep their dimension, and ResNets with another activation than ReLU their depth. In mode ``"exact"``
    the loss must read outputs that keep their size: logits, not features.

    References
    ----------
    TripLe (ICCV 2023): weights and states, step by step. LEMON (Wang et al., ICLR 2024): LayerNorm by means, noise of
    sum zero. Net2Net (Chen et al., ICLR 2016).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from pycodesign import growth
    >>> build = lambda width: nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4)).double()
    >>> small, large = build(16), build(24)
    >>> adam, larger_adam = torch.optim.AdamW(small.parameters()), torch.optim.AdamW(large.parameters())
    >>> x = torch.randn(5, 8, dtype=torch.double)
    >>> report = growth.grow(small, large, optimizer=adam, target_optimizer=larger_adam, inputs=x)
    >>> report.difference < 1e-12
    True
    """
    for name, model in (("source", source), ("target", target)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name}: expected a torch.nn.Module, got {type(model).__name__}")
    source, target = unwrap(source), unwrap(target)
    plan = plan_modules(source, target, spec=spec, mode=mode, seed=seed, noise=noise)
    optimizers = None
    if (optimizer is None) != (target_optimizer is None):
        raise ValueError("optimizer, target_optimizer: expected both or none, got one")
    if optimizer is not None and target_optimizer is not None:
        olds = list_names(source)
        optimizers = OptimizerGrowth(plan, olds, list_tensors(target), optimizer, target_optimizer)
    pairs = [(source, target)]
    if (ema is None) != (target_ema is None):
        raise ValueError("ema, target_ema: expected both or none, got one")
    if ema is not None and target_ema is not None:
        pairs.append((unwrap(ema), unwrap(target_ema)))
        for name, pair in (("ema", (source, pairs[1][0])), ("target_ema", (target, pairs[1][1]))):
            _check_same_shapes(name, *pair)
        _check_tensors(plan, *pairs[1], ("ema", "target_ema"))
        if "n_averaged" in target_ema._buffers and "n_averaged" not in ema._buffers:
            kinds = name_types(ema, target_ema)
            raise ValueError(f"target_ema: expected a {kinds[0]} as ema, which counts no updates, got {kinds[1]}")
    if dry_run:
        return Report(plan)
    outputs = None
    if inputs is not None:
        outputs = compute_outputs(source, inputs)
        compare(outputs, compute_outputs(target, inputs))  # raises what it would once all is written
    for old, new in pairs:
        _write(plan, old, new)
    if ema is not None and target_ema is not None and "n_averaged" in target_ema._buffers:
        target_ema.get_buffer("n_averaged").copy_(ema.get_buffer("n_averaged"))
    if optimizers is not None:
        optimizers.write()
    return Report(plan, None if outputs is None else compare(outputs, compute_outputs(target, inputs)))


def plan_modules(
    source: nn.Module,
    target: nn.Module,
    *,
    spec: Spec | str = "auto",
    mode: str = "break_symmetry",
    seed: int = 0,
    noise: float = 0.1,
) -> Plan:
    """Plan what `grow` would do."""
    if type(source) is not type(target):
        kinds = name_types(source, target)
        raise TypeError(f"target: expected {kinds[0]} as the source, got {kinds[1]}")
    if _read_config(source) is not None and source.config is target.config:
        raise ValueError("target: expected a config of its own, which holds its sizes, got the source's")
    _check_initialized(source, target)
    if not isinstance(spec, Spec):
        spec = _find_spec(source, target, spec)
    _check_config(source, target, spec)
    olds, news = list_tensors(source), list_tensors(target)
    tied = _has_tied(target, spec)
    if tied != _has_tied(source, spec):
        if tied:
            raise ValueError(
                "target: expected an output layer of its own as the source's, got one tied to the embedding"
            )
        if mode == "exact":
            raise Inexact(
                "mode: expected an output layer tied to the embedding as the source's for 'exact', got its own"
            )
        shared = list_aliases(target)
        olds = {name: tensor for name, tensor in list_names(source).items() if name not in shared}
    heads = None
    if (old_heads := _read_heads(source, spec)) and (new_heads := _read_heads(target, spec)):
        heads = old_heads, new_heads
    old_shapes, new_shapes = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (olds, news))
    plan = make_plan(old_shapes, new_shapes, spec, heads=heads, mode=mode, tied=tied, noise=noise, seed=seed)
    _check_shared(plan, source, target, tied)
    _check_groups(plan, source, target)
    _check_settings(plan, source, target)
    _check_buffers(plan, source, target)
    _check_eps(plan, target)
    _check_tensors(plan, source, target)
    return plan


def unwrap(model: nn.Module) -> nn.Module:
    """Take a model out of DistributedDataParallel, AveragedModel or torch.compile."""
    while True:
        if isinstance(model, WRAPPERS):
            model = model.get_submodule("module")
        elif type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def list_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, each once."""
    tensors: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in list_names(model).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def list_names(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by all of their names."""
    return {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}


def list_aliases(model: nn.Module) -> dict[str, str]:
    """Return further names of parameters and buffers: the first of each."""
    names = list_names(model)
    firsts = {id(tensor): name for name, tensor in list_tensors(model).items()}
    return {name: firsts[id(tensor)] for name, tensor in names.items() if firsts[id(tensor)] != name}


def pair_modules(plan: Plan, source: nn.Module, target: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield the target's modules with their names and, between the two, what each continues in the source."""
    olds, blocks = dict(source.named_modules()), {}
    for rule in plan:
        if (new := plan.spec.split_block(rule.name)) and (old := plan.spec.split_block(rule.source)):
            blocks[f"{new[0]}{new[1]}"] = f"{old[0]}{old[1]}"
    for name, module in target.named_modules():
        split = plan.spec.split_block(f"{name}.")
        block = f"{split[0]}{split[1]}" if split else ""
        if (old_module := olds.get(blocks.get(block, block) + name[len(block) :])) is not None:
            yield name, old_module, module


def _find_spec(source: nn.Module, target: nn.Module, name: str) -> Spec:
    if name != "auto":
        return find_spec({"model_type": name})
    for argument, model in (("source", source), ("target", target)):
        _check_hooks(argument, model)
    if is_sequential(source) and is_sequential(target):
        return make_sequential_spec(source, target)
    if (config := _read_config(source)) is not None and "model_type" in config:
        known = find_spec(config)
        for model in (source, target):
            _check_own(model, config["model_type"])
        return known
    if (spec := find_timm_spec(dict(source.named_modules()))) is not None:
        return spec
    raise ValueError(f"spec: expected a Spec for {type(source).__name__}, which 'auto' does not know, got 'auto'")


def _check_hooks(argument: str, model: nn.Module) -> None:
    """Refuse hooks, which may change what a module returns; those of transformers do not, evaluated."""
    for name, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if not (getattr(hook, "__module__", None) or "").startswith("transformers."):
                text = "modules without forward hooks, or a Spec that holds with them"
                raise ValueError(f"{argument}: expected {text}, got one of {name or 'the model'}")


def _check_own(model: nn.Module, kind: str) -> None:
    """Refuse other modules than those that transformers makes by the model's config."""
    own: Any = next((c for c in type(model).__mro__ if c.__module__.startswith(f"transformers.models.{kind}.")), None)
    expected: dict[str, Any] = {}
    if own is not None and type(model).forward is own.forward:
        with torch.device("meta"):
            expected = dict(own(copy.deepcopy(model.config)).named_modules())
    for name, module in model.named_modules():
        like = expected.get(name)
        if like is None or type(module).forward is not type(like).forward:
            text = f"the modules that transformers makes for {kind!r}, or a Spec"
            raise ValueError(f"spec: expected {text}, got {type(module).__name__} as {name or 'the model'}")


def _read_config(model: nn.Module) -> Mapping[str, Any] | None:
    config: Any = getattr(model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else None


def _check_config(source: nn.Module, target: nn.Module, spec: Spec) -> None:
    old, new = _read_config(source), _read_config(target)
    if old is not None and new is not None:
        check_configs("target", spec, old, new, [*FREE, "tie_word_embeddings"])  # that the tensors show


def _check_settings(plan: Plan, source: nn.Module, target: nn.Module) -> None:
    """Refuse modules that differ in more than size: in an activation, a stride, a slope."""
    for name, old_module, module in pair_modules(plan, source, target):
        if type(old_module).__name__ in IDLE and type(module).__name__ in IDLE:
            continue
        if type(old_module) is not type(module):
            kinds = name_types(old_module, module)
            raise ValueError(f"target: expected {kinds[0]} as {name}, as the source's, got {kinds[1]}")
        expected, got = _read_settings(old_module), _read_settings(module)
        for key in sorted(expected.keys() | got.keys()):
            if expected.get(key) != got.get(key):
                wanted = f"{key}={expected.get(key)!r} in {name or 'the model'}, as the source's"
                raise ValueError(f"target: expected {wanted}, got {got.get(key)!r}")


def _read_settings(module: nn.Module) -> dict[str, Any]:
    """Return the numbers and strings of one of torch's or timm's own modules that are no sizes."""
    own = any(c.__module__.startswith(LIBRARIES) and c is not nn.Module for c in type(module).__mro__)
    plain = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in SIZES}
    plain |= {k: tuple(v) for k, v in plain.items() if type(v) is list and all(isinstance(i, (int, float)) for i in v)}
    return {k: v for k, v in plain.items() if isinstance(v, (int, float, str, tuple))} if own else {}


def _read_heads(model: nn.Module, spec: Spec) -> Heads | None:
    config = _read_config(model)
    if spec.heads:
        path, _, name = spec.heads.rpartition(".")
        try:
            return Heads(*[int(getattr(model.get_submodule(path), name))] * 2)
        except (AttributeError, TypeError, ValueError):
            text = f"heads to name an attribute of {type(model).__name__} that holds their number"
            raise ValueError(f"spec: expected {text}, got {spec.heads!r}") from None
    if spec.config and config is not None:
        return read_heads(read_sizes(spec, config))
    return None


def _has_tied(model: nn.Module, spec: Spec) -> bool:
    """Whether an output layer shares the weight of another layer, whichever comes first."""
    for pair in list_aliases(model).items() if spec.tied else ():
        reading = [p in spec.tied and "read" in [role.kind for role in roles] for p, roles in map(spec.find, pair)]
        if reading[0] != reading[1]:
            return True
    return False


def _check_shared(plan: Plan, source: nn.Module, target: nn.Module, tied: bool) -> None:
    """Refuse parameters with several names of which one would have to grow otherwise."""
    spec = plan.spec
    blocks: list[set[tuple[str, str]]] = []
    for pairs in (list_aliases(model).items() for model in (source, target)):
        splits = {pair: [spec.split_block(name) for name in pair] for pair in pairs}
        blocks.append({pair for pair, (one, other) in splits.items() if one and other and one[:2] != other[:2]})
    if blocks[0] != blocks[1]:
        alias, first = min(blocks[0] ^ blocks[1])
        raise ValueError(f"target: expected blocks that share what the source's do, got others: {alias} and {first}")
    rules = {rule.name: rule for rule in plan}
    for alias, first in list_aliases(target).items():
        for position in rules[first].axes:
            roles = [find_roles(spec, name, tied)[1] for name in (first, alias)]
            kinds = [each[position] if position < len(each) else Role("keep") for each in roles]
            if kinds[0] != kinds[1]:
                text = f"{first} and {alias}, which are one, to mean the same, or to be tied"
                ways = [" ".join(kind).strip() for kind in kinds]
                raise ValueError(f"spec: expected {text}, got {ways[0]!r} and {ways[1]!r} for axis {position}")


def _check_buffers(plan: Plan, source: nn.Module, target: nn.Module) -> None:
    """Refuse buffers that depend on a size and lie in no state."""
    for name, old, new in pair_modules(plan, source, target):
        for key in sorted(new._non_persistent_buffers_set & old._buffers.keys()):
            one, other = old._buffers[key], new._buffers.get(key)
            if one is not None and other is not None and one.shape != other.shape:
                text = f"{name}.{key}".lstrip(".")
                shapes = f"{tuple(one.shape)} -> {tuple(other.shape)}"
                raise ValueError(f"target: expected buffers outside its state as the source's, got {text}, {shapes}")


def _check_eps(plan: Plan, target: nn.Module) -> None:
    for name, factor in plan.eps.items():
        if factor != 1 and not any(_has_eps(target.get_submodule(name), key) for key in EPS):
            text = f"one of the attributes {', '.join(EPS)} in {name}"
            raise ValueError(f"target: expected {text}, which follows the width by {factor:.4g}, got none")


def _check_groups(plan: Plan, source: nn.Module, target: nn.Module) -> None:
    changed = {rule.name for rule in plan if rule.axes}
    for name, old, new in pair_modules(plan, source, target):
        if not isinstance(new, nn.modules.conv._ConvNd) or not isinstance(old, nn.modules.conv._ConvNd):
            continue
        same = (old.groups, old.in_channels, old.out_channels) == (new.groups, new.in_channels, new.out_channels)
        if max(old.groups, new.groups) > 1 and (not same or f"{name}.weight" in changed):
            depthwise = all(conv.groups == conv.in_channels for conv in (old, new))
            if not depthwise or old.out_channels * new.in_channels != new.out_channels * old.in_channels:
                text = f"{name}: a convolution of {old.groups} -> {new.groups} groups"
                raise Inexact(f"{text}; exact would be its source's shape, or as many groups as channels")


def _check_initialized(source: nn.Module, target: nn.Module) -> None:
    """Refuse parameters of lazy modules, which have no shape before the first call."""
    for name, model in (("source", source), ("target", target)):
        for key, tensor in list_names(model).items():
            if is_lazy(tensor):
                raise ValueError(f"{name}: expected initialized parameters, got {key} of a lazy module; call it first")


def _check_tensors(
    plan: Plan, source: nn.Module, target: nn.Module, names: tuple[str, str] = ("source", "target")
) -> None:
    """Refuse tensors that cannot be read or written, before the first is."""
    olds, news = list_names(source), list_tensors(target)
    for key, tensor in news.items():
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{names[1]}: expected tensors that can be written, got one of inference mode for {key}")
    for name, tensors in zip(names, (olds, news), strict=True):
        for key, tensor in tensors.items():
            if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter):
                kind = "one on the meta device" if tensor.is_meta else type(tensor).__name__
                raise ValueError(f"{name}: expected plain tensors in memory, got {kind} for {key}")
    if {id(tensor) for tensor in olds.values()} & {id(tensor) for tensor in news.values()}:
        raise ValueError(f"{names[1]}: expected parameters of its own, got the {names[0]}'s")
    for rule in plan:
        old, new = olds[rule.source], news[rule.name]
        if old.is_floating_point() != new.is_floating_point() or (rule.axes and old.dtype not in FLOATS):
            expected = f"{rule.name} of floating-point numbers of 16 bits or more"
            raise ValueError(f"{names[1]}: expected {expected}, got {old.dtype} -> {new.dtype}")


def _check_same_shapes(name: str, model: nn.Module, average: nn.Module) -> None:
    expected, got = ({n: t.shape for n, t in list_tensors(m).items()} for m in (model, average))
    if expected != got:
        different = min(n for n in expected.keys() | got.keys() if expected.get(n) != got.get(n))
        raise ValueError(f"{name}: expected the model's parameters and shapes, got others, such as {different}")


@torch.no_grad()
def _write(plan: Plan, source: nn.Module, target: nn.Module) -> None:
    olds, news = list_names(source), list_tensors(target)
    for rule in plan:
        _write_tensor(rule, olds, news[rule.name])
    write_eps(plan, source, target)


def write_eps(plan: Plan, source: nn.Module, target: nn.Module) -> None:
    """Write what no tensor holds: the eps of norms, in modules and config."""
    for name, old, new in pair_modules(plan, source, target):
        _scale_eps(old, new, plan.eps.get(name, 1.0))
    key = plan.spec.config.get("eps", "")
    if hasattr(source, "config") and hasattr(target, "config") and hasattr(source.config, key):
        setattr(target.config, key, getattr(source.config, key) * plan.eps_factor)


def _write_tensor(rule: Rule, olds: Mapping[str, Tensor], new: Tensor) -> None:
    """Write one parameter, on whatever device it is."""
    old = olds[rule.source].detach()
    factor = olds[rule.factor].detach().cpu() if rule.factor else None
    new = new.detach()
    if new.device.type == "cpu" and new.is_contiguous() and old.dtype == new.dtype:
        rule.apply(old.cpu(), factor, new)
    else:
        new.copy_(rule.apply(old.cpu(), factor))


def _scale_eps(old: nn.Module, new: nn.Module, factor: float) -> None:
    for name in EPS:
        if _has_eps(old, name) and _has_eps(new, name):
            eps = getattr(old, name)
            if eps is None and factor != 1:  # the default of torch.nn.RMSNorm
                eps = torch.finfo(next(old.parameters()).dtype).eps
            eps = eps if eps is None or factor == 1 else eps * factor
            if getattr(new, name) != eps:
                setattr(new, name, eps)


def _has_eps(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, ""), (int, float, type(None)))


def compare_outputs(source: nn.Module, target: nn.Module, inputs: Any) -> float:
    """Return the largest difference of outputs, relative to the largest output; NaN where there is one.

    Of representations that grew the old features are compared.
    """
    return compare(compute_outputs(source, inputs), compute_outputs(target, inputs))


@torch.no_grad()
def compute_outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Call a model that does not train at the time, and return what it returns of floating-point numbers."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        outputs = [output for output in _flatten(_call(model, inputs)) if output.numel()]
    finally:
        for module, training in modes.items():
            module.training = training
    if not outputs:
        raise ValueError("inputs: expected some for which the model returns floating-point numbers, got none")
    return outputs


def compare(olds: list[Tensor], news: list[Tensor]) -> float:
    if len(olds) != len(news):
        text = "outputs that both models have, without those of each layer"
        raise ValueError(f"inputs: expected {text}, got {len(olds)} and {len(news)} tensors")
    worst = []
    for old, new in zip(olds, news, strict=True):
        new = new[tuple(slice(size) for size in old.shape)].to(old.device)
        if new.shape != old.shape:
            raise ValueError(f"target: expected outputs of shape {tuple(old.shape)}, got {tuple(new.shape)}")
        difference = (new - old).abs().masked_fill(new == old, 0)  # infinities, too
        largest = old.abs().masked_fill(~old.isfinite(), 0).max().clamp_min(1e-30)
        worst.append(float(difference.max() / largest))
    return math.nan if any(map(math.isnan, worst)) else max(worst)


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _flatten(output: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors of an output; what there is of each layer is none of it."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            if key not in BY_LAYER:
                yield from _flatten(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _flatten(value)
