"""What a model computes, as a graph without writes into tensors, traced by torch.fx."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pycodesign.nn.graph import KEEPS, bind, call_name, find_rank, is_plain

IDENTITIES = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)
IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
DRAWS = ("normal_", "bernoulli_", "random_")  # what torch has under their names does something else
CASTS = ("to", "type", "type_as", "double", "half", "bfloat16", "int", "long", "short", "char", "byte", "bool")
NUMBERS = ("size", "dim", "numel", "item", "stride", "shape", "ndim")  # attributes that are no tensors
# What may return its input, or share its memory. Functions of other modules than torch's may, too.
VIEWS = frozenset(
    "T mT H mH adjoint as_tensor asarray unsafe_chunk unsafe_split unsafe_split_with_sizes"
    " data real imag atleast_1d atleast_2d atleast_3d as_strided broadcast_tensors broadcast_to chunk conj"
    " contiguous cpu cuda detach diagonal double dsplit expand expand_as flatten float getitem half hsplit bfloat16 int"
    " long bool meshgrid moveaxis movedim narrow permute pos positive ravel requires_grad_ reshape reshape_as"
    " resolve_conj resolve_neg select split split_with_sizes squeeze swapaxes swapdims t tensor_split to transpose"
    " type type_as unbind unflatten unfold unsqueeze view view_as view_as_complex view_as_real vsplit".split()
)


class _InPlace:
    """Records ``y += x`` as it stands; `torch.fx` makes it ``y = y + x``, and other names of y keep the old value."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "_node", "root", "attr"):
            raise ValueError(f"it sets {name} of a tensor")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        return InPlaceAttribute(self, name)  # type: ignore[arg-type]


def _record_in_place(name: str) -> Any:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, f"__i{name}__"), (self, other), {})

    return record


for _name in IN_PLACE:
    setattr(_InPlace, f"__i{_name}__", _record_in_place(_name))


class InPlaceProxy(_InPlace, fx.Proxy):
    """What a node makes."""


class InPlaceAttribute(_InPlace, fx.proxy.Attribute):
    """An attribute of that, as ``y.data``."""


class Argument(nn.Module):
    """Refuses other values of an argument than the one that a network was traced with."""

    _is_impure = True  # tells torch.fx that it is no dead code

    def __init__(self, name: str, value: Any) -> None:
        super().__init__()
        self.name, self.value = name, value

    def forward(self, value: Any) -> None:
        if value is self.value or (isinstance(value, (bool, int, float, str)) and value == self.value):
            return
        got = type(value).__name__ if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{self.name}: expected {self.value!r}, as when the network was converted, got {got}")

    def extra_repr(self) -> str:
        return f"{self.name}={self.value!r}"


class Tracer(fx.Tracer):
    """Keeps layers whole, also those of derived classes and of Brevitas, and modules with hooks.

    Arguments with a default are constants, but for those that an example gives a tensor, or tensors.
    """

    def __init__(self, calls: Sequence[tuple[Any, ...]]) -> None:
        super().__init__()
        self.calls, self.modes = calls, _list_modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, KEEPS) or type(m).__module__.startswith(("brevitas.", "pycodesign.nn."))
        return whole or not is_plain(m) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if _list_modes() != self.modes:
            raise ValueError("it turns gradients or autocast on or off")
        return InPlaceProxy(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        root_fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        required = False  # Python wants no argument without a default behind one that has one
        for i in reversed(range(1, len(args))):
            node = args[i].node
            given = [call[i - 1] for call in self.calls if len(call) >= i] or list(node.args)
            if node.args and _is_constant(given[0]):
                name = f"argument_{node.target}"
                self.root.add_module(name, Argument(str(node.target), given[0]))
                self.create_proxy("call_module", name, (args[i],), {})
                args[i] = given[0]
            elif node.args and given[0] is not node.args[0]:
                required = True
            if required:
                node.args = ()
        return root_fn, args


def _list_modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")


def _is_constant(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def trace(model: nn.Module, calls: Sequence[tuple[Any, ...]] = ()) -> fx.GraphModule:
    """Return the graph of a model in evaluation mode, where nothing is written in place and nothing does nothing.

    Parameters
    ----------
    model : torch.nn.Module
        May be changed.
    calls : sequence of tuple
        Arguments of calls.

    Raises
    ------
    Exception
        Of many kinds, where the model's code cannot be traced, or does what a graph does not show.
    """
    if not is_plain(model):
        raise ValueError("it has hooks, or a forward of its own")
    tracer, modules = Tracer(calls), dict(model.named_modules())
    before = _list_state(modules)
    random = torch.get_rng_state()
    graph = tracer.trace(model)
    graph._tracer_cls = None  # whoever unpickles the graph traces its code again, by torch.fx's own tracer
    traced = fx.GraphModule(model, graph, type(model).__name__)
    if not torch.equal(torch.get_rng_state(), random):
        torch.set_rng_state(random)
        raise ValueError("it draws random numbers")
    constants = set(tracer.tensor_attrs.values()) - before.keys()  # that the forward makes: attributes of torch.fx
    for name, value in _list_state(modules).items():
        if name not in constants and (name not in before or not _is_same(value, before[name])):
            raise ValueError(f"its forward changes {name}")
    drop_writes(traced)
    find_norms(traced)
    graph = traced.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and not node.args and node.kwargs.keys() == {"input"}:
            node.args, node.kwargs = (node.kwargs["input"],), {}
        if is_identity(traced, node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.op == "call_module" and not is_plain(module := traced.get_submodule(str(node.target))):
            module._is_impure = True  # type: ignore[assignment]  # its hooks run also where nothing reads its result
    graph.eliminate_dead_code()
    return traced


def find_norms(traced: fx.GraphModule) -> None:
    """Let modules do what derived classes of `torch.nn.BatchNorm2d` do by a function, as timm's BatchNormAct2d."""
    graph = traced.graph
    for node in list(graph.nodes):
        if node.target is torch._assert and _is_true(traced, node.args[0]):
            graph.erase_node(node)
        elif node.target is F.batch_norm and (norm := _make_norm(traced, node)) is not None:
            traced.add_submodule(name := f"norm_{node.name}", norm)
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_module(name, (node.args[0],)))
            graph.erase_node(node)


def _is_true(traced: fx.GraphModule, node: Any) -> bool:
    """Say whether a node is ``x.ndim == 4`` of a value that has as many dimensions."""
    if not isinstance(node, fx.Node) or node.target is not operator.eq or node.args[1] != 4:
        return False
    ndim = node.args[0]
    if not isinstance(ndim, fx.Node) or call_name(ndim) not in ("ndim", "dim"):
        return False
    return isinstance(x := ndim.args[0], fx.Node) and find_rank(traced, x) == 4


def _make_norm(traced: fx.GraphModule, node: fx.Node) -> nn.BatchNorm2d | None:
    """Return the module that normalizes four dimensions by constants, as a call of `F.batch_norm` does."""
    names = "x", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"
    a = bind(node, *names, weight=None, bias=None, training=False, eps=1e-5)
    x: Any = node.args[0]
    constants = {name: a.get(name) for name in names[1:5]}
    if any(value is not None and getattr(value, "op", "") != "get_attr" for value in constants.values()):
        return None
    values: Any = (value and operator.attrgetter(value.target)(traced) for value in constants.values())
    mean, variance, weight, bias = values
    if a["training"] is not False or mean is None or find_rank(traced, x) != 4:
        return None
    norm = nn.BatchNorm2d(len(mean), a["eps"], affine=False).eval()
    norm.running_mean, norm.running_var = mean, variance
    for name, value in (("weight", weight), ("bias", bias)):
        is_buffer = value is not None and not isinstance(value, nn.Parameter)
        norm.register_parameter(name, nn.Parameter(value, requires_grad=False) if is_buffer else value)
    return norm


def _list_state(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return every attribute and buffer of every module by name, and how often tensors were written to."""
    state, torchs = {}, vars(nn.Module()).keys()
    for prefix, module in modules.items():
        for name, value in {**vars(module), **module._buffers}.items():
            state[f"{prefix}.{name}".lstrip(".")] = _freeze(value, 0 if name in torchs else 4)
    return state


def _freeze(value: Any, depth: int) -> tuple[Any, ...]:
    """Return a value and what it holds now: how often a tensor was written to, the elements of a list or dict."""
    if isinstance(value, Tensor):
        return value, 0 if value.is_inference() else value._version
    if depth and isinstance(value, (list, dict)):
        elements = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return value, *(_freeze(element, depth - 1) for element in elements)
    return (value,)


def _is_same(now: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    if len(now) != len(before) or now[0] is not before[0]:
        return False
    pairs = zip(now[1:], before[1:], strict=True)
    return all(_is_same(*pair) if isinstance(pair[0], tuple) else pair[0] == pair[1] for pair in pairs)


def drop_writes(traced: fx.GraphModule) -> None:
    """Let every operation that overwrites its input make a new value instead, which is what is read from then on.

    Raises
    ------
    ValueError
        If that cannot be said of one, or if what it overwrites is read later under another name.
    """
    nodes = list(traced.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    writers = {node for node in nodes if _writes(traced, node)}
    roots: dict[fx.Node, frozenset[fx.Node]] = {}  # nodes whose values it may share memory with
    for node in nodes:
        if node in writers:
            written = node.args[0] if node.args else None
            if not isinstance(written, fx.Node):
                raise ValueError(f"{node.name} writes into a tensor in place")
            for other in nodes[: order[node]]:
                if not roots[other] & roots[written]:
                    continue
                if other.op == "get_attr":
                    raise ValueError(f"{node.name} writes into {other.target}")
                if other is not written and any(order[user] > order[node] for user in other.users):
                    raise ValueError(f"{node.name} writes into a tensor that is read later under another name")
            _make_pure(traced, node)
            for user in list(written.users):
                if order[user] > order[node]:
                    user.replace_input_with(written, node)
        roots[node] = frozenset().union(*(roots[x] for x in _list_shared(traced, node))) or frozenset([node])


def _writes(traced: fx.GraphModule, node: fx.Node) -> bool:
    if is_identity(traced, node):
        return False
    if node.op == "call_module":
        return bool(getattr(traced.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    if node.kwargs.get("out") is not None:
        raise ValueError(f"{node.name} writes into out")
    name = call_name(node)
    if node.target in IN_PLACE_OPERATORS and _is_number(node):
        node.target = IN_PLACE_OPERATORS[node.target]
    found = node.target is operator.setitem or node.target in IN_PLACE_OPERATORS or node.kwargs.get("inplace")
    return bool(found) or (name.endswith("_") and not name.endswith("__"))


IN_PLACE_OPERATORS = {getattr(operator, f"__i{name}__"): getattr(operator, f"__{name}__") for name in IN_PLACE}


def _is_number(node: fx.Node) -> bool:
    """Say whether a value is no tensor: a size, or what is computed from sizes."""
    if call_name(node) in NUMBERS:
        return True
    return node.op == "call_function" and bool(node.all_input_nodes) and all(map(_is_number, node.all_input_nodes))


def _make_pure(traced: fx.GraphModule, node: fx.Node) -> None:
    if node.op == "call_module":
        traced.get_submodule(str(node.target)).inplace = False  # type: ignore[assignment]
    elif node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
    elif node.target in IN_PLACE_OPERATORS:
        _check_dtypes(traced, node)
        node.target = IN_PLACE_OPERATORS[node.target]
    else:
        _check_dtypes(traced, node)
        name = call_name(node)
        pure = getattr(torch, name.removesuffix("_"), None)
        if node.target is operator.setitem or name in DRAWS or pure is None:
            raise ValueError(f"{name} writes into a tensor in place")
        node.op, node.target = "call_function", pure


def _check_dtypes(traced: fx.GraphModule, node: fx.Node) -> None:
    """Raise ValueError where operands may differ in dtype: what is written keeps its own, a new value may have another.

    Layers with weights make float32, or no packed layer could be among them.
    """
    seen, left = set(), list(node.all_input_nodes)
    while len(node.all_input_nodes) > 1 and left:
        operand = left.pop()
        constant = operator.attrgetter(str(operand.target))(traced) if operand.op == "get_attr" else None
        other = isinstance(constant, Tensor) and constant.dtype != torch.float32
        given = (*operand.args, *operand.kwargs.values())
        casts = call_name(operand) in CASTS or any(isinstance(argument, torch.dtype) for argument in given)
        if other or (casts and torch.float32 not in given):
            raise ValueError(f"{node.name} writes a value into one that may have another dtype")
        module = traced.get_submodule(str(operand.target)) if operand.op == "call_module" else None
        weighs = module is not None and next(module.parameters(), None) is not None
        if operand not in seen and not weighs and call_name(operand) != "float":
            left += operand.all_input_nodes
        seen.add(operand)


def _list_shared(traced: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Return the inputs that a node's value may share memory with."""
    if node.op == "call_module":
        kind = type(traced.get_submodule(str(node.target)))
        own = kind.__module__.startswith(("torch.nn.", "pycodesign.nn."))
        fresh = own and not issubclass(kind, (*IDENTITIES, nn.Flatten, nn.Unflatten))
    else:
        name = call_name(node)
        fresh = bool(name) and name not in VIEWS and "dropout" not in name
    return [] if fresh else node.all_input_nodes


def is_identity(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        return type(module) in IDENTITIES and is_plain(module)
    if node.op == "call_function" and (name := getattr(node.target, "__name__", "")).endswith("dropout"):
        return not bind(node, "input", "p", "training", training=True)["training"]
    if node.op == "call_function" and name == "stochastic_depth":  # of torchvision
        return not bind(node, "input", "p", "mode", "training", training=True)["training"]
    return False
