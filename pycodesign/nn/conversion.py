"""`convert`: packed layers in place of a network's own, in as few calls as possible."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pycodesign.nn.calibration import Affines, Observer, find_range, list_calls, to_affine
from pycodesign.nn.fusion import Weights, fuse, gather
from pycodesign.nn.graph import KEEPS, call_name, is_plain, read_norm
from pycodesign.nn.layers import SKIPPED, UNNAMED, Quantizers, check_arguments, find_layers, resolve_names
from pycodesign.nn.lowering import CannotPack, Lowered, insert, lower, quantize_to, sort_graph
from pycodesign.nn.modules import WINDOWS, Conv2d, Linear, Segment
from pycodesign.nn.program import Program, Step, describe_layer, prepack
from pycodesign.nn.reports import ROWS, Row, attach_rows, describe_packed
from pycodesign.nn.tracing import trace
from pycodesign.ops import Packed

__all__ = ["convert"]

# of a layer, that a model's own code may read
ATTRIBUTES = {"in_features", "out_features", "in_channels", "out_channels", "kernel_size", "groups", *WINDOWS}
NO_VALUES = "example_inputs: expected an example that shows values, got none but empty ones"
READ = "the model reads its weights itself"
FUNCTIONS = {"linear", "addmm", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))}
FUNCTION = "a function: there are kernels for modules, which hold their weights"


def convert(
    model: nn.Module,
    weights: Quantizers = "from_fake_quantized",
    activations: str = "float32",
    example_inputs: Any = None,
    skip: Collection[str] = (),
    strict: bool = False,
    inplace: bool = False,
    *,
    calibration: str = "minmax",
) -> nn.Module:
    """Replace a network's convolutions and linear layers by packed ones that compute the same.

    Batch normalization is folded into the layer before it, or becomes a layer; ReLU, ReLU6, clamps and residual adds
    are fused, these where it is known that both shapes are equal in every call; neighboring layers, with the pooling
    and the adds between them, run in one call. `report` tells what became of each layer: one that cannot be converted
    stays torch's.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode, in host memory. Traced by `torch.fx`; where that fails, layers are replaced one by one and
        nothing else is. The same happens where a graph would not show all that a call does: hooks of the model itself,
        writes into buffers or attributes, writes into a part of what is read later, random numbers. Modules with hooks
        are called as they are. An argument with a default is a constant, unless an example gives a tensor for it: calls
        with another value raise.
    weights : str, callable or dict
        Name of a function of `pycodesign.quantize`, a function from weights to a `QuantizedTensor`, or a dict from
        module names to either, which leaves the layers that it does not name. By default weights are those of a
        quantizer already (see `pycodesign.nn.sources`) and kept exactly.
    activations : {"float32", "uint8"}
        Between layers of a call. With ``"uint8"``, layers whose weights do not repeat are rounded to 8 bits.
    example_inputs : Tensor, tuple, or iterable of these, optional
        The argument of a call, the arguments of one, or several calls. Needed for uint8 activations, whose scales come
        from the ranges that values have; otherwise they tell how many dimensions values have, so that more can be
        fused.
    skip : collection of str
        Names of layers to leave.
    strict : bool
        Raise if a layer other than those of `skip` is left.
    inplace : bool
        Turn `model` itself into the result. Otherwise, and where an error is raised, it is not touched.
    calibration : {"minmax", "percentile"}
        How a range follows from observed values: all of them, or all but 1 in 10,000 at either end.

    Returns
    -------
    torch.nn.Module
        In evaluation mode; takes inputs of any size that the model does, images with their batch, and (N, I) where a
        BatchNorm1d was folded; does not write into them. With uint8 activations nothing in it has a gradient.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came: a model in training mode, unknown names, missing examples;
        with `strict`, each layer that was left, and why.

    Examples
    --------
    >>> import torch, pycodesign
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    >>> packed = pycodesign.nn.convert(model, "ternary")
    >>> packed
    Sequential(
      (segment_0): Segment(
        conv2d 0
        conv2d 3
      )
    )
    >>> packed(torch.ones(1, 8, 8, 8)).shape
    torch.Size([1, 16, 4, 4])
    """
    check_arguments(model, weights, activations, skip, calibration)
    calls = list_calls(example_inputs)
    if activations == "uint8" and not calls:
        raise ValueError("example_inputs: expected at least one for uint8 activations, got None")
    names = resolve_names(model)
    skip = {names[name] for name in skip}
    if isinstance(weights, Mapping):
        weights = {names[name]: quantizer for name, quantizer in weights.items()}
    with torch.inference_mode(False):  # tensors made in it have no gradients, and nobody can tell whether they change
        converted, rows = _convert(model, weights, calls, skip, calibration if activations == "uint8" else "")
    left = _attach_reasons(converted, rows)
    if strict and (refused := [row for row in left if row.layer not in skip]):
        raise ValueError(
            f"strict: every layer was to be converted; {'; '.join(f'{r.layer}: {r.why}' for r in refused)}"
        )
    if inplace:
        model.__class__, model.__dict__ = converted.__class__, converted.__dict__
        return model
    return converted


def _convert(
    model: nn.Module, weights: Quantizers, calls: list[tuple[Any, ...]], skip: Collection[str], calibration: str
) -> tuple[nn.Module, dict[str, Row]]:
    """Return the converted network and a row for each of its layers; with `calibration` activations are uint8."""
    source = _copy(model)
    layers, rows = find_layers(source, weights, "uint8" if calibration else "float32", skip)
    try:
        if isinstance(source, KEEPS):
            raise ValueError("it is a layer")
        traced = trace(source, calls)
    except Exception as error:  # of any kind: it is the model's code that runs
        source = _copy(model)  # its code may have changed the other copy
        why = f"not traced ({_first_line(error)}), so by itself"
        for name in layers:
            rows[name].why = "; ".join(filter(None, [rows[name].why, why]))
        converted = _replace_layers(source, layers, rows, calls, calibration)
    else:
        converted = _convert_graph(traced, layers, rows, calls, calibration)
    if calibration:
        converted.requires_grad_(False)  # of layers that stay torch's: there is no way back through integers
    return converted, rows


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        wanted = "one that can be copied (torch.nn.utils.weight_norm cannot: remove it first)"
        raise ValueError(f"model: expected {wanted}, got {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _convert_graph(
    traced: fx.GraphModule,
    layers: dict[str, Weights],
    rows: dict[str, Row],
    calls: list[tuple[Any, ...]],
    calibration: str,
) -> fx.GraphModule:
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    read = _find_read(traced, rows)
    for name in read:
        layers.pop(name, None)
        rows[name].why = rows[name].why or READ
    for name in rows:
        if name not in called:
            layers.pop(name, None)
            rows[name].why = rows[name].why or _find_hooks(traced, name) or "the model does not call it by itself"
    for node in traced.graph.nodes:
        if node.op == "call_function" and call_name(node) in FUNCTIONS:
            name = f"{node.name}()"
            rows[name] = Row(name, call_name(node), why=FUNCTION, position=len(rows))
    _fold_norms(traced, layers, rows, read)
    affines: Affines | None = None
    if calls:
        observer = Observer(traced, layers, calibration)
        with torch.no_grad():
            for call in calls if calibration else calls[:1]:
                observer.run(*call)
        if calibration and layers and not observer.ranges:
            raise ValueError(NO_VALUES)
        affines = Affines(observer.ranges, calibration)
    replaced: dict[fx.Node, fx.Node] = {}
    for lowered in _lower_all(traced, layers, rows, affines if calibration else None):
        layers = {name: layer for name, layer in layers.items() if name not in lowered.names}
        insert(traced, lowered, rows, replaced)
    for name in layers:
        rows[name].why = "it is called in a way that packed layers cannot be"
    sort_graph(traced.graph)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return traced


def _find_read(traced: fx.GraphModule, names: Iterable[str]) -> list[str]:
    """Return the modules whose tensors, or what computes them, are not only read by themselves."""
    read = [str(node.target) for node in traced.graph.nodes if node.op in ("get_attr", "call_module")]
    return [name for name in names if any(target.startswith(f"{name}.") for target in read)]


def _find_hooks(traced: fx.GraphModule, name: str) -> str:
    """Say which of the modules around a layer is called as it is."""
    modules, parts = dict(traced.named_modules()), name.split(".")  # those that are called, or hold one that is
    for parent in (".".join(parts[:depth]) for depth in range(1, len(parts))):
        if parent in modules and not is_plain(modules[parent]):
            return f"{parent} has hooks, or a forward of its own"
    return ""


def _lower_all(traced: fx.GraphModule, layers: dict[str, Weights], rows: dict[str, Row], affines: Any) -> list[Lowered]:
    """Lower every segment; a layer that cannot be packed is left out, and segments are found anew."""
    norms: set[str] = set()  # that stay torch's
    while True:
        try:
            return [lower(segment, affines) for segment in gather(fuse(traced, layers, norms), layers)]
        except CannotPack as error:
            name, why = error.args
            if layers.pop(name, None) is not None:
                rows[name].why = why
            elif name in norms:
                raise
            norms.add(name)


def _fold_norms(
    traced: fx.GraphModule, layers: Mapping[str, Weights], rows: dict[str, Row], read: Collection[str]
) -> None:
    """Fold batch normalization into convolutions that stay torch's; those that are named or read stay as they are."""
    called = [node.target for node in traced.graph.nodes]
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        name = str(before.target)
        norm, conv = traced.get_submodule(str(node.target)), traced.get_submodule(name)
        plain = type(norm) is nn.BatchNorm2d and type(conv) is nn.Conv2d and is_plain(norm) and is_plain(conv)
        kept = name in layers or name in read or (name in rows and rows[name].why in (SKIPPED, UNNAMED))
        if not plain or norm.running_mean is None or kept:
            continue
        finite = all(np.isfinite(array).all() for array in read_norm(norm))
        if finite and called.count(name) == 1 and len(before.users) == 1:
            traced.add_submodule(name, fuse_conv_bn_eval(conv, norm))  # type: ignore[type-var, arg-type]
            rows[name].why += "; batch normalization folded"
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)


def _replace_layers(
    model: nn.Module,
    layers: Mapping[str, Weights],
    rows: Mapping[str, Row],
    calls: list[tuple[Any, ...]],
    calibration: str,
) -> nn.Module:
    """Replace layers one by one: the model's own code goes on calling them."""
    names: dict[nn.Module, list[str]] = {}  # all that a module has
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    aliases = {given[0]: given for given in names.values()}
    made: dict[str, Conv2d | Linear] = {}
    for name, weights in layers.items():
        kind = Conv2d if len(weights.q.shape) == 4 else Linear
        try:
            layer = made[name] = kind.from_quantized(weights.q, weights.bias, **weights.options)
        except (TypeError, ValueError) as error:
            rows[name].why = str(error)
            continue
        model = _set_module(model, aliases[name], layer)
        attach_rows(layer, [describe_packed(rows[name], layer.packed(), name)])
    for name, affine in _observe_inputs(model, made, calls, calibration).items() if calibration else ():
        segment, packed = _quantize_input(layers[name], affine)
        for attribute in ATTRIBUTES & vars(made[name]).keys():
            setattr(segment, attribute, getattr(made[name], attribute))
        model = _set_module(model, aliases[name], segment)
        attach_rows(segment, [describe_packed(rows[name], packed, name)])
    return model.eval()


def _set_module(model: nn.Module, names: Iterable[str], module: nn.Module) -> nn.Module:
    for name in names:
        if not name:
            return module
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module)
    return model


def _observe_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], calls: list[tuple[Any, ...]], calibration: str
) -> dict[str, tuple[float, int]]:
    ranges: dict[str, list[tuple[float, float]]] = {}
    hooks = []
    for name, layer in layers.items():

        def observe(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], name: str = name) -> None:
            x = args[0] if args else kwargs["input"]
            if isinstance(x, Tensor) and x.numel():
                ranges.setdefault(name, []).append(find_range(x, calibration))

        hooks.append(layer.register_forward_pre_hook(observe, with_kwargs=True))
    with torch.no_grad():
        for call in calls:
            model(*call)
    for hook in hooks:
        hook.remove()
    if layers and not ranges:
        raise ValueError(NO_VALUES)
    return {name: to_affine(found, calibration, name) for name, found in ranges.items()}


def _quantize_input(weights: Weights, affine: tuple[float, int]) -> tuple[Segment, Packed]:
    """Return a layer that rounds its float32 input to uint8."""
    form, layer = ("uint8", *affine), (weights.q, weights.bias)
    packed = prepack(layer, weights.options, *form)
    described = describe_layer(weights.name, layer, weights.options)
    op = "conv2d" if len(weights.q.shape) == 4 else "linear"
    steps = [Step("add", 0, None, quantize_to(*form)), Step(op, 1, None, {}, described)]
    return Segment(Program([{"dtype": "float32"}], steps, [2]), [layer], op == "linear", [packed]), packed


def _attach_reasons(converted: nn.Module, rows: Mapping[str, Row]) -> list[Row]:
    """Leave the rows of layers that stay as they were with these, and return them."""
    done = {row.layer for module in converted.modules() for row in module.__dict__.get(ROWS, ())}
    left = [row for name, row in rows.items() if name not in done]
    modules = dict(converted.named_modules())
    for row in left:
        if row.layer in modules:
            attach_rows(modules[row.layer], [row])
    if gone := [row for row in left if row.layer not in modules]:  # or never was a module: the network tells
        attach_rows(converted, [*(row for row in converted.__dict__.get(ROWS, ()) if row.layer not in rows), *gone])
    return left
