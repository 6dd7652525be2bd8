"""What torch.fx traced, reduced to the few kinds of operations that run between packed layers."""

from __future__ import annotations

import math
import operator
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import fx, nn

Match: TypeAlias = "tuple[str, dict[str, Any]] | None"  # kind and arguments of a node; its first argument is `x`

KEEPS = (nn.Conv2d, nn.Linear)  # also where derived classes compute more
IMAGE_MODULES = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
ELEMENTWISE = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Hardswish, nn.Sigmoid)


def bind(node: fx.Node, *names: str, **defaults: Any) -> dict[str, Any]:
    """Return a call's arguments by name."""
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def call_name(node: fx.Node) -> str:
    """Return the name of what a node calls of torch's or Python's own, or of the attribute that it reads; or ""."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if node.target is getattr:
        return str(node.args[1])
    where = getattr(node.target, "__module__", None) or "torch"
    own = where.partition(".")[0] in ("torch", "_operator", "builtins", "math")
    return str(getattr(node.target, "__name__", "")) if own else ""


def match(traced: fx.GraphModule, node: fx.Node) -> Match:
    """Say which of these kinds a node is: conv2d, linear, norm, clamp, max_pool2d, avg_pool2d, flatten, add."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.op == "call_module":
        if len(node.args) > 1 or node.kwargs:
            return None
        return match_module(traced.get_submodule(str(node.target)))
    if node.op not in ("call_function", "call_method"):
        return None
    found = match_call(node)
    known = {node.args[0], found[1].get("other")} if found is not None else set()
    if found is not None and found[0] != "flatten" and not known.issuperset(node.all_input_nodes):
        return None  # the network computes another argument, too
    return found


def match_module(module: nn.Module) -> Match:
    if not is_plain(module):
        return None
    if isinstance(module, KEEPS):
        return "conv2d" if isinstance(module, nn.Conv2d) else "linear", {}
    m: Any = module
    kind = type(m)  # derived classes may do anything
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d) and m.running_mean is not None:
        return "norm", {"image": kind is nn.BatchNorm2d}
    if kind is nn.ReLU:
        return "clamp", {"clamp": (0.0, None)}
    if kind in (nn.ReLU6, nn.Hardtanh):
        return _clamp(m.min_val, m.max_val)
    if kind is nn.MaxPool2d:
        return _max_pool(m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)
    if kind is nn.AvgPool2d:
        return _avg_pool(m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override)
    if kind is nn.AdaptiveAvgPool2d:
        return _adaptive_pool(m.output_size)
    if kind is nn.Flatten:
        return _flatten(m.start_dim, m.end_dim)
    return None


def is_plain(module: nn.Module) -> bool:
    """Say whether a call runs the forward of the module's class and nothing else."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return not any(hooks) and module.__dict__.keys().isdisjoint(("forward", "_conv_forward"))


def match_call(node: fx.Node) -> Match:
    target: Any = node.target
    names: tuple[str, ...]
    if target in (F.relu, torch.relu, "relu"):
        return "clamp", {"clamp": (0.0, None)}
    if target is F.relu6:
        return "clamp", {"clamp": (0.0, 6.0)}
    if target is F.hardtanh:
        a = bind(node, "x", "min_val", "max_val", min_val=-1.0, max_val=1.0)
        return _clamp(a["min_val"], a["max_val"])
    if target in (torch.clamp, torch.clip, "clamp", "clip", torch.clamp_min, "clamp_min", torch.clamp_max, "clamp_max"):
        names = ("x", "max") if str(getattr(target, "__name__", target)) == "clamp_max" else ("x", "min", "max")
        a = bind(node, *names, min=None, max=None)
        return _clamp(a["min"], a["max"])
    if target in (operator.add, torch.add, "add"):
        a = bind(node, "x", "other", alpha=1)
        return ("add", {"other": a["other"]}) if isinstance(a["other"], fx.Node) and a["alpha"] == 1 else None
    if target in (F.max_pool2d, torch.max_pool2d):
        names = ("x", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        defaults = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
        return _max_pool(*(bind(node, *names, **defaults)[name] for name in names[1:]))
    if target is F.avg_pool2d:
        names = "x", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
        defaults = {"stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True}
        return _avg_pool(*(bind(node, *names, divisor_override=None, **defaults)[name] for name in names[1:]))
    if target is F.adaptive_avg_pool2d:
        return _adaptive_pool(bind(node, "x", "output_size")["output_size"])
    if target in (torch.mean, "mean"):
        a = bind(node, "x", "dim", "keepdim", dim=None, keepdim=False)
        dims = a["dim"] if isinstance(a["dim"], (tuple, list)) else ()
        images = set(dims) in ({2, 3}, {-2, -1}) and len(dims) == 2 and a.keys() <= {"x", "dim", "keepdim"}
        return ("avg_pool2d", {"flat": not a["keepdim"]}) if images else None
    if target in (torch.flatten, "flatten"):
        a = bind(node, "x", "start_dim", "end_dim", start_dim=0, end_dim=-1)
        return _flatten(a["start_dim"], a["end_dim"])
    if target in (torch.reshape, "reshape", "view"):
        a = bind(node, "x", "shape")
        sizes = node.args[1:] if len(node.args) > 2 else a.get("shape")
        rows = isinstance(sizes, (tuple, list)) and len(sizes) == 2 and _is_batch_size(sizes[0], node.args[0])
        return ("flatten", {}) if rows and sizes[1] == -1 else None  # type: ignore[index]
    return None


def _is_batch_size(value: Any, x: Any) -> bool:
    """Say whether a node is ``x.size(0)``, ``x.shape[0]`` or ``x.size()[0]``."""
    if not isinstance(value, fx.Node):
        return False
    if value.op == "call_method" and value.target == "size":
        return value.args == (x, 0)
    if value.target is operator.getitem and value.args[1] == 0 and isinstance(value.args[0], fx.Node):
        sizes = value.args[0]
        return (sizes.target is getattr and sizes.args == (x, "shape")) or (
            sizes.op == "call_method" and sizes.target == "size" and sizes.args == (x,)
        )
    return False


def _clamp(low: Any, high: Any) -> Match:
    if not all(bound is None or (isinstance(bound, (int, float)) and not math.isnan(bound)) for bound in (low, high)):
        return None
    if low is not None and high is not None and not low <= high:
        return None
    return "clamp", {"clamp": tuple(None if bound is None else float(bound) for bound in (low, high))}


def _max_pool(kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, return_indices: bool) -> Match:
    if ceil_mode or return_indices:
        return None
    windows = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    return "max_pool2d", {name: to_plain(value) for name, value in windows.items()}


def _avg_pool(kernel: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool, divisor: Any) -> Match:
    if ceil_mode or divisor is not None:
        return None
    windows = {"kernel_size": kernel, "stride": stride, "padding": padding}
    plain = {name: to_plain(value) for name, value in windows.items()}
    return "avg_pool2d", {**plain, "count_include_pad": count_include_pad}


def to_plain(value: Any) -> Any:
    """Return an integer or a pair of Python's for one that torch takes: of NumPy, or one number in a tuple."""
    if isinstance(value, (tuple, list)):
        numbers = tuple(map(to_plain, value))
        return numbers[0] if len(numbers) == 1 else numbers
    return operator.index(value) if hasattr(value, "__index__") else value


def _adaptive_pool(size: Any) -> Match:
    return ("avg_pool2d", {}) if size in (1, (1, 1), [1, 1]) else None


def _flatten(start: int, end: int) -> Match:
    return ("flatten", {}) if (start, end) == (1, -1) else None


def find_rank(traced: fx.GraphModule, node: fx.Node) -> int | None:
    """Return the number of dimensions of a node's value, if it can be told."""
    if "shape" in node.meta:
        return None if node.meta["shape"] is None else len(node.meta["shape"])
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        if isinstance(module, IMAGE_MODULES):
            return 4
        if not isinstance(module, ELEMENTWISE):
            return None
    elif (found := match(traced, node)) is None or found[0] not in ("clamp", "add"):
        return 4 if found is not None and found[0] == "max_pool2d" else None
    return find_rank(traced, node.args[0]) if isinstance(node.args[0], fx.Node) else None


def read_norm(norm: Any) -> tuple[Any, Any]:
    """Return scale and shift of each channel of a batch normalization, in float64."""
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale.detach().numpy(), shift.detach().numpy()
