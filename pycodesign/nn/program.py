"""``torch.ops.pycodesign.chain``: many layers, with the pooling and the adds between them, in one call::

    chain(Tensor[] inputs, Tensor codes, Tensor levels, Tensor scale, Tensor bias, str program) -> Tensor[]

The program is JSON. It numbers values: first the inputs, then what each step makes. A step names a method of
`pycodesign.repetition.chain.Chain` and its arguments. The weights of all layers lie one after another in four flat
tensors, the codes as few bits each as in the file of a packed layer.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pycodesign._arguments import join_names, to_pair
from pycodesign._packed_file import code_bits, pack_bits, unpack_bits
from pycodesign._quantized import FewValued, from_arrays, index_type, to_arrays
from pycodesign.nn.cache import TensorCache, Weights
from pycodesign.nn.ops import (
    DTYPES,
    GEOMETRY,
    check_fake,
    define,
    output_size,
    refuse_weight_gradients,
    to_array,
)
from pycodesign.ops import Packed, prepack_conv2d, prepack_linear
from pycodesign.repetition.chain import Chain

OPERATIONS = ("conv2d", "linear", "max_pool2d", "avg_pool2d", "add")

LayerWeights: TypeAlias = "tuple[FewValued, NDArray[np.float32] | None]"  # and the bias


@dataclass
class Step:
    """One call of a method of `Chain`.

    Parameters
    ----------
    op : {"conv2d", "linear", "max_pool2d", "avg_pool2d", "add"}
    x : int
        The value that it takes.
    other : int, optional
        The value that it adds.
    arguments : dict
        Other arguments of the method.
    layer : dict, optional
        Of a convolution or linear layer: name, shape, sizes of levels and scale, whether there is a bias, arguments of
        packing.
    """

    op: str
    x: int
    other: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    layer: dict[str, Any] | None = None


@dataclass
class Program:
    inputs: list[dict[str, Any]]  # arguments of `Chain.input`
    steps: list[Step]
    outputs: list[int]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@functools.cache
def parse_program(text: str) -> Program:
    try:
        given = json.loads(text)
        program = Program(given["inputs"], [Step(**step) for step in given["steps"]], given["outputs"])
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"program: expected JSON of inputs, steps and outputs, got {text[:80]!r}: {error}") from None
    for step in program.steps:
        if step.op not in OPERATIONS:
            raise ValueError(f"program: expected {join_names(OPERATIONS)}, got {step.op!r}")
    return program


def describe_layer(name: str, weights: LayerWeights, options: dict[str, Any]) -> dict[str, Any]:
    """Return what `Step.layer` holds; `options` are those of packing, but for the input's."""
    q, bias = weights
    _, levels, scale = to_arrays(q)
    sizes = {"shape": q.shape, "levels": levels.shape, "scale": scale.shape, "bias": bias is not None}
    return {"name": name, **sizes, "options": options}


def join_weights(layers: Iterable[LayerWeights]) -> tuple[Tensor, ...]:
    """Return codes, levels, scale and bias of all layers, flat."""
    empty = np.empty(0, np.float32)
    parts = []
    for q, bias in layers:
        codes, levels, scale = to_arrays(q)
        packed = pack_bits(codes, code_bits(levels.shape[-1])) if levels.ndim < 3 else codes.ravel().view(np.uint8)
        parts.append((packed, levels.ravel(), scale.ravel(), empty if bias is None else bias))
    return tuple(torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))


def split_weights(program: Program, weights: Weights) -> list[LayerWeights]:
    """Return what `join_weights` was given."""
    names = ("codes", "levels", "scale", "bias")
    flat = [to_array(name, tensor) for name, tensor in zip(names, weights, strict=True) if tensor is not None]
    layers = [step.layer for step in program.steps if step.layer is not None]
    sizes = [_flat_sizes(layer) for layer in layers]
    wanted = tuple(sum(column) for column in zip(*sizes, strict=True))
    if tuple(array.shape for array in flat) != tuple((size,) for size in wanted):
        got = tuple(array.shape for array in flat)
        raise ValueError(f"codes, levels, scale, bias: expected {wanted} elements for this program, got {got}")
    ends = np.cumsum(sizes, axis=0)
    split = []
    for layer, size, end in zip(layers, sizes, ends, strict=True):
        codes, levels, scale, bias = (a[e - n : e] for a, n, e in zip(flat, size, end, strict=True))
        shape = tuple(layer["shape"])
        if len(layer["levels"]) < 3:
            codes = unpack_bits(codes, code_bits(layer["levels"][-1]), shape)
        else:
            codes = np.frombuffer(codes.tobytes(), index_type(layer["levels"][1])).reshape(shape[0], -1)
        q = from_arrays(codes, levels.reshape(layer["levels"]), scale.reshape(layer["scale"]))
        split.append((q, bias if layer["bias"] else None))
    return split


def _flat_sizes(layer: dict[str, Any]) -> tuple[int, ...]:
    shape, levels = layer["shape"], layer["levels"]
    if len(levels) < 3:
        codes = -(-math.prod(shape) * code_bits(levels[-1]) // 8)
    else:
        codes = np.dtype(index_type(levels[1])).itemsize * shape[0] * (shape[1] // levels[2])
    return codes, math.prod(layer["levels"]), math.prod(layer["scale"]), layer["bias"] * layer["shape"][0]


def prepack(weights: LayerWeights, options: dict[str, Any], dtype: str, scale: float, zero_point: int) -> Packed:
    """Pack a layer for the value that it takes."""
    given: dict[str, Any] = {"input_dtype": dtype, "input_scale": scale, "input_zero_point": zero_point}
    return (prepack_linear if len(weights[0].shape) == 2 else prepack_conv2d)(*weights, **options | given)


def build_chain(weights: Weights, text: str, packed: Sequence[Packed] | None = None) -> Chain:
    """Make the chain of a program, of layers packed before where given."""
    program = parse_program(text)
    layers: Iterator[LayerWeights | Packed] = iter(split_weights(program, weights) if packed is None else packed)
    chain = Chain()
    values = [chain.input(**given) for given in program.inputs]
    for step in program.steps:
        x = values[step.x]
        arguments = dict(step.arguments)
        if step.layer is not None:
            layer = next(layers)
            if not isinstance(layer, Packed):
                layer = prepack(layer, step.layer["options"], x.dtype, x.scale, x.zero_point)
            arguments["packed"] = layer
        if step.other is not None:
            arguments["b" if step.op == "add" else "residual"] = values[step.other]
        values.append(getattr(chain, step.op)(x, **arguments))
    chain.output(*(values[index] for index in program.outputs))
    return chain


chains: TensorCache[Chain] = TensorCache()


def find_chain(weights: Weights, program: str, packed: Sequence[Packed] | None = None) -> Chain:
    """Return the chain of these weights, made now if it has not been."""
    return chains.get((*map(id, weights), program), weights, build_chain, program, packed)


def run_chain(
    inputs: Sequence[Tensor], codes: Tensor, levels: Tensor, scale: Tensor, bias: Tensor, program: str
) -> list[Tensor]:
    """Kernel of ``torch.ops.pycodesign.chain`` for the CPU."""
    chain = find_chain((codes, levels, scale, bias), program)
    return [torch.from_numpy(y) for y in chain(*(to_array("inputs", x) for x in inputs))]


def fake_chain(
    inputs: Sequence[Tensor], codes: Tensor, levels: Tensor, scale: Tensor, bias: Tensor, program: str
) -> list[Tensor]:
    parsed = parse_program(program)
    values = []
    for x, given in zip(inputs, parsed.inputs, strict=True):
        check_fake("inputs", x, given["dtype"], x.dim() in (2, 4), "(N, C, H, W) or (N, I)")
        values.append(x)
    for step in parsed.steps:
        x = values[step.x]
        dtype = x.dtype if step.op == "max_pool2d" else DTYPES[step.arguments.get("out_dtype", "float32")]
        values.append(x.new_empty(_fake_shape(step, x), dtype=dtype))
    return [values[index] for index in parsed.outputs]


def _fake_shape(step: Step, x: Tensor) -> Sequence[Any]:
    if step.op == "add":
        return x.shape
    if step.layer is not None:
        outputs, inputs, *kernel = step.layer["shape"]
        if step.op == "linear":
            got = math.prod(x.shape[1:])
            if got != inputs:
                raise ValueError(f"inputs: expected {inputs} for each row of {step.layer['name']}, got {got}")
            return x.shape[0], outputs
        options = GEOMETRY | step.layer["options"]
        if x.dim() != 4 or x.shape[1] != inputs * options["groups"]:
            wanted = f"(N, {inputs * options['groups']}, H, W) for {step.layer['name']}"
            raise ValueError(f"inputs: expected {wanted}, got {tuple(x.shape)}")
    else:
        outputs, kernel, options = x.shape[1], step.arguments.get("kernel_size"), {"dilation": 1, **step.arguments}
        if kernel is None:
            return *x.shape[:2], 1, 1
        kernel = to_pair("kernel_size", kernel, 1)
    default = {"stride": kernel, "padding": 0}
    windows = (to_pair(name, {**default, **options}[name], 0) for name in ("stride", "padding", "dilation"))
    sizes = (output_size(*window) for window in zip(x.shape[2:], kernel, *windows, strict=True))
    return x.shape[0], outputs, *sizes


class ChainGradient(torch.autograd.Function):
    """A chain of float32 values, with the gradient to its inputs."""

    @staticmethod
    def forward(ctx: Any, operator: Any, program: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        *inputs, codes, levels, scale, bias = tensors
        refuse_weight_gradients({"levels": levels, "scale": scale, "bias": bias})
        parsed = parse_program(program)
        dtypes = {step.arguments.get("out_dtype", "float32") for step in parsed.steps}
        if dtypes | {given["dtype"] for given in parsed.inputs} != {"float32"}:
            raise ValueError("inputs: expected no gradient through integer activations, got requires_grad=True")
        with torch._C._AutoDispatchBelowAutograd():
            outputs = operator(inputs, codes, levels, scale, bias, program)
        ctx.program = program
        ctx.save_for_backward(*tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, codes, levels, scale, bias = ctx.saved_tensors
        backward = torch.ops.pycodesign.chain_backward
        return None, None, *backward(grads, inputs, codes, levels, scale, bias, ctx.program), None, None, None, None


def _apply_gradient(
    operator: Any, inputs: Sequence[Tensor], codes: Tensor, levels: Tensor, scale: Tensor, bias: Tensor, program: str
) -> list[Tensor]:
    apply: Any = ChainGradient.apply
    return list(apply(operator, program, *inputs, codes, levels, scale, bias))


def run_backward(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    codes: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor,
    program: str,
) -> list[Tensor]:
    """Run the chain again, in torch with dequantized weights, and let torch find the gradients."""
    parsed = parse_program(program)
    weights = split_weights(parsed, (codes, levels, scale, bias))
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = evaluate(parsed, weights, leaves)
        found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, found, strict=True)]


def evaluate(program: Program, weights: Sequence[LayerWeights], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Compute in torch, with dequantized weights, what a chain of float32 values does."""
    layers = iter(weights)
    values = list(inputs)
    for step in program.steps:
        x, arguments = values[step.x], dict(step.arguments)
        low, high = arguments.pop("clamp", None) or (None, None)
        arguments.pop("out_dtype", None)
        if step.layer is not None:
            q, bias = next(layers)
            w, b = torch.from_numpy(q.dequantize()), None if bias is None else torch.from_numpy(bias)
            options = {name: value for name, value in step.layer["options"].items() if name in GEOMETRY}
            y = F.linear(x.flatten(1), w, b) if step.op == "linear" else F.conv2d(x, w, b, **options)
        elif step.op == "max_pool2d":
            y = F.max_pool2d(x, **arguments)
        elif step.op == "avg_pool2d":
            y = F.avg_pool2d(x, **arguments) if "kernel_size" in arguments else x.mean((2, 3), keepdim=True)
        else:
            y = x
        if step.other is not None:
            y = y + values[step.other]
        if low is not None or high is not None:
            y = torch.clamp(y, low, high)
        values.append(y)
    return [values[index] for index in program.outputs]


def _fake_backward(grads: Sequence[Tensor], inputs: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in inputs]


WEIGHTS = "Tensor codes, Tensor levels, Tensor scale, Tensor bias, str program"
define(f"chain(Tensor[] inputs, {WEIGHTS}) -> Tensor[]", run_chain, fake_chain, _apply_gradient)
define(f"chain_backward(Tensor[] grads, Tensor[] inputs, {WEIGHTS}) -> Tensor[]", run_backward, _fake_backward, None)
