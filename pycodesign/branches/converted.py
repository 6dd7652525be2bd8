"""Bodies that run without Python: chains, packed layers, and torch modules that do no more than one."""

from __future__ import annotations

import operator
import sys
from typing import Any, NamedTuple

from pycodesign.branches.graph import Body, Graph, Slice

__all__ = ["Found", "find_chain", "is_hooked"]

EPILOGUE = ("clamp", "out_dtype", "out_scale", "out_zero_point")


class Found(NamedTuple):
    """The chain that a body is, and the shapes (N, C, H, W) or (N, I) of its inputs."""

    chain: Any
    input_shapes: list[tuple[int, ...]]


def find_chain(graph: Graph, body: Body) -> Found | None:
    """Return the chain that a body is; None for a body that needs Python."""
    shapes = [_shape(graph, piece) for piece in body.inputs]
    if any(len(shape) not in (2, 4) for shape in shapes):
        return None
    from pycodesign.ops import Packed
    from pycodesign.repetition.chain import Chain

    if isinstance(body.run, Chain):
        return Found(body.run, shapes)
    if isinstance(body.run, Packed):
        if len(shapes) != 1 or (body.run.kind == "linear" and len(shapes[0]) != 2):
            return None
        chain = body.run.to_chain()
        return Found(chain, shapes) if isinstance(chain, Chain) else None
    if body.arrays != "torch" or "pycodesign.nn" not in sys.modules:  # nothing was converted
        return None
    chain = _find_in_module(body.run, shapes)
    return None if chain is None else Found(chain, shapes)


def _shape(graph: Graph, piece: Slice) -> tuple[int, ...]:
    images, channels, *size = graph.values[piece.value].shape
    return images, (channels if piece.end is None else piece.end) - piece.begin, *size


def _find_in_module(module: Any, shapes: list[tuple[int, ...]]) -> Any:
    from torch import fx

    from pycodesign.nn.modules import Conv2d, Linear, Segment
    from pycodesign.nn.program import find_chain as chain_of

    if isinstance(module, fx.GraphModule) and not is_hooked(module):
        module = _find_only_module(module)
    if type(module) not in (Segment, Conv2d, Linear) or is_hooked(module):  # a subclass may do something else
        return None
    reads_rows = module.rows if isinstance(module, Segment) else module.kind == "linear"
    if reads_rows and any(len(shape) != 2 for shape in shapes):  # a chain would flatten images
        return None
    if isinstance(module, Segment):
        return chain_of(module.weights(), module.program)
    return _chain_of_layer(module) if len(shapes) == 1 else None  # others add a residual


def is_hooked(module: Any) -> bool:
    """Return whether a module does more, or something else, than its class says."""
    from torch.nn.modules import module as of_all

    own = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(own or of_all._global_forward_hooks or of_all._global_forward_pre_hooks)


def _find_only_module(traced: Any) -> Any:
    """Return the module that takes all inputs and whose results, flattened or not, are all that comes out, or None."""
    nodes = list(traced.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    called = [node for node in nodes if node.op == "call_module"]
    if len(called) != 1 or list(called[0].args) != inputs or called[0].kwargs:
        return None
    results = nodes[-1].args[0]
    results = list(results) if isinstance(results, (list, tuple)) else [results]
    others = [node for node in nodes if node.op not in ("placeholder", "call_module", "output")]
    expected = []
    for position, result in enumerate(results):
        if result.op == "call_method" and result.target == "flatten" and result.args[1:] == (1,) and not result.kwargs:
            expected.append(result)
            result = result.args[0]
        if len(results) > 1 or result is not called[0]:
            if result.op != "call_function" or result.target is not operator.getitem or result.args[1] != position:
                return None
            expected.append(result)
            result = result.args[0]
        if result is not called[0]:
            return None
    return traced.get_submodule(called[0].target) if set(others) == set(expected) else None


def _chain_of_layer(layer: Any) -> Any:
    from pycodesign.repetition.chain import Chain

    packed = layer.packed()
    options = packed._options
    chain = Chain()
    x = chain.input(options["input_dtype"], options["input_scale"], options["input_zero_point"])
    epilogue = {name: layer.options[name] for name in EPILOGUE if name in layer.options}
    chain.output(getattr(chain, layer.kind)(x, packed, **epilogue))
    return chain
