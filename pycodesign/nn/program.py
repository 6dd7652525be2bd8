"""``torch.ops.pycodesign.chain``: many layers, with the pooling and the adds between them, in one call::

    chain(Tensor[] inputs, Tensor codes, Tensor levels, Tensor scale, Tensor bias, str program) -> Tensor[]

The program is JSON. It numbers values: first the inputs, then what each step makes. A step names a method of
`pycodesign.repetition.chain.Chain` and its arguments. The weights of all layers lie one after another in four flat
tensors, the codes as few bits each as in the file of a packed layer.

``chain_backward`` takes the gradients to the outputs, and what ``chain`` took, to the gradients to the inputs;
``chain_weights`` makes float weights and bias of each layer, one after another.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    any_requires_grad,
    are_plain,
    check_fake,
    define,
    library,
    mask_clamped,
    output_size,
    refuse_weight_gradients,
    to_array,
)
from pycodesign.ops import Packed, prepack_conv2d, prepack_linear
from pycodesign.repetition.chain import Chain

OPERATIONS = ("conv2d", "linear", "max_pool2d", "avg_pool2d", "add")

LayerWeights: TypeAlias = "tuple[FewValued, NDArray[np.float32] | None]"  # and the bias
FloatWeights: TypeAlias = Mapping[int, tuple[Tensor, Tensor]]  # and the bias, by the value that a layer makes


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
    flat = [to_array(name, t.resolve_neg()) for name, t in zip(names, weights, strict=True) if t is not None]
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


chains: TensorCache[tuple[Chain, str]] = TensorCache()  # and the program


def find_chain(weights: Weights, program: str, packed: Sequence[Packed] | None = None) -> Chain:
    """Return the chain of these weights, made now if it has not been."""
    key = *map(id, weights), len(program)  # to compare a long text takes a tenth of what its hash does
    chain, text = chains.get(key, weights, _make_chain, program, packed)
    return chain if text == program else chains.get((*key, program), weights, _make_chain, program, packed)[0]


def _make_chain(weights: Weights, program: str, packed: Sequence[Packed] | None) -> tuple[Chain, str]:
    return build_chain(weights, program, packed), program


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
    """Run a chain again, in torch with dequantized weights, and from its outputs back to its inputs.

    All of it is torch's operators, which have gradients themselves.
    """
    parsed = parse_program(program)
    with torch.no_grad():  # what follows is linear in `grads`, and constant in the values between limits
        weights = _name_weights(parsed, torch.ops.pycodesign.chain_weights(codes, levels, scale, bias, program))
        values = evaluate(parsed, weights, inputs)
    found = dict(zip(parsed.outputs, grads, strict=True))
    for made, step in reversed([*enumerate(parsed.steps, len(inputs))]):
        if made not in found:
            continue
        grad, clamp = found[made], _find_clamp(step)
        if clamp is not None:
            grad = mask_clamped(grad, values[made], clamp)
        taken = [(step.x, _find_gradient(step, weights.get(made), values[step.x], grad))]
        if step.other is not None:
            taken.append((step.other, grad))
        for value, part in taken:
            found[value] = found[value] + part if value in found else part
    # Copies: an operator's results share no memory with what it takes, nor with each other.
    return [
        found[i].clone(memory_format=torch.contiguous_format) if i in found else x.new_zeros(x.shape)
        for i, x in enumerate(inputs)
    ]


def run_weights(codes: Tensor, levels: Tensor, scale: Tensor, bias: Tensor, program: str) -> list[Tensor]:
    """Return weights and bias of each layer; without a bias, zeros."""
    made = []
    for q, b in split_weights(parse_program(program), (codes, levels, scale, bias)):
        made += [q.dequantize(), np.zeros(q.shape[0], np.float32) if b is None else b.copy()]
    return [torch.from_numpy(array) for array in made]


def _fake_weights(codes: Tensor, levels: Tensor, scale: Tensor, bias: Tensor, program: str) -> list[Tensor]:
    shapes = [step.layer["shape"] for step in parse_program(program).steps if step.layer is not None]
    return [codes.new_empty(size, dtype=torch.float32) for shape in shapes for size in (shape, shape[:1])]


def _name_weights(program: Program, tensors: Sequence[Tensor]) -> FloatWeights:
    made = [value for value, step in enumerate(program.steps, len(program.inputs)) if step.layer is not None]
    return dict(zip(made, zip(tensors[::2], tensors[1::2], strict=True), strict=True))


def evaluate(program: Program, weights: FloatWeights, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return all values of a chain of float32 values, computed in torch."""
    values = list(inputs)
    for made, step in enumerate(program.steps, len(inputs)):
        x = values[step.x]
        if step.op == "linear":
            y = F.linear(x.flatten(1), *weights[made])
        elif step.op == "conv2d":
            y = F.conv2d(x, *weights[made], *_find_geometry(step))
        elif step.op == "add":
            y = x
        elif step.arguments.get("kernel_size") is None:
            y = x.mean((2, 3), keepdim=True)
        else:
            y = (F.max_pool2d if step.op == "max_pool2d" else F.avg_pool2d)(x, *_find_windows(step))
        if step.other is not None:
            y = y + values[step.other]
        clamp = _find_clamp(step)
        values.append(y if clamp is None else torch.clamp(y, *clamp))
    return values


def _find_gradient(step: Step, weights: tuple[Tensor, Tensor] | None, x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient to what a step takes."""
    if weights is not None:
        if step.op == "linear":
            return (grad @ weights[0]).reshape(x.shape)
        grad_x: Tensor = torch.nn.grad.conv2d_input(x.shape, weights[0], grad, *_find_geometry(step))
    elif step.op == "add":
        grad_x = grad
    elif step.arguments.get("kernel_size") is None:
        grad_x = (grad / (x.shape[2] * x.shape[3])).expand(x.shape)
    elif step.op == "avg_pool2d":
        grad_x = torch.ops.aten.avg_pool2d_backward(grad, x, *_find_windows(step), None)
    else:
        windows = _find_windows(step)
        _, places = F.max_pool2d(x, *windows, return_indices=True)
        grad_x = torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *windows, places)
    return grad_x


def _find_clamp(step: Step) -> tuple[float | None, float | None] | None:
    low, high = step.arguments.get("clamp") or (None, None)
    return None if low is None and high is None else (low, high)


def _find_geometry(step: Step) -> list[Any]:
    """Return what torch's convolutions take behind their weights."""
    assert step.layer is not None
    options = GEOMETRY | step.layer["options"]
    return [options[name] for name in GEOMETRY]


def _find_windows(step: Step) -> list[Any]:
    """Return what torch's pooling takes behind its input, sizes not rounded up."""
    options = {"stride": step.arguments["kernel_size"], "padding": 0, "dilation": 1, "count_include_pad": True}
    options |= {"ceil_mode": False} | step.arguments
    last = ("dilation", "ceil_mode") if step.op == "max_pool2d" else ("ceil_mode", "count_include_pad")
    return [options[name] for name in ("kernel_size", "stride", "padding", *last)]


def _fake_backward(grads: Sequence[Tensor], inputs: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs]


def _record_backward(_: Any, *args: Any) -> list[Tensor]:
    return run_backward(*args)


def _is_plain_call(inputs: Sequence[Tensor], codes: Tensor, *others: Any) -> bool:
    recorded = torch.is_grad_enabled() and any_requires_grad(inputs, codes, *others)
    return not recorded and are_plain([*inputs, codes])


WEIGHTS = "Tensor codes, Tensor levels, Tensor scale, Tensor bias, str program"
BACKWARD = f"chain_backward(Tensor[] grads, Tensor[] inputs, {WEIGHTS}) -> Tensor[]"
CHAIN = f"chain(Tensor[] inputs, {WEIGHTS}) -> Tensor[]"
define(CHAIN, run_chain, fake_chain, _apply_gradient, is_plain=_is_plain_call)
define(BACKWARD, run_backward, _fake_backward, _record_backward)
define(f"chain_weights({WEIGHTS}) -> Tensor[]", run_weights, _fake_weights, None)
for key in ("Batched", "FuncTorchBatched"):  # of many gradients at once: `is_grads_batched`, and vmap
    library.impl("chain_backward", run_backward, key)
