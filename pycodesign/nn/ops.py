"""``torch.ops.pycodesign.conv2d`` and ``linear``: packed layers as torch operators.

The operators take weights as tensors and options as JSON, so graphs that hold them can be compiled, exported and
saved::

    conv2d(Tensor x, Tensor codes, Tensor levels, Tensor scale, Tensor? bias=None, Tensor? residual=None,
           str options='{}') -> Tensor

Options are the keyword arguments of `pycodesign.ops.prepack_conv2d` and `pycodesign.ops.conv2d`. What is packed stays
in a cache for as long as the weights live.

Every operator has a kernel for the CPU, and may have one for CUDA, one for fake tensors, whose sizes may be symbols,
one for autograd, which knows the gradient to the input, and one for autocast, which gives a layer the float inputs that
it was packed for.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.grad
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

from pycodesign import _device
from pycodesign._arguments import (
    INPUT_RANGES,
    OUTPUT_DTYPES,
    SHORT_FLOATS,
    check_array,
    check_epilogue,
    check_promise,
    join_names,
    to_pair,
)
from pycodesign._device_layer import DeviceLayer, run_layer
from pycodesign._quantized import from_arrays
from pycodesign.nn.cache import TensorCache, Weights
from pycodesign.nn.weights import dequantize, weight_shape
from pycodesign.ops import Packed, prepack_conv2d, prepack_linear

# A packed layer, its native call and the epilogue for it, and whether `input_bits` promises something.
Prepared: TypeAlias = tuple[Packed, Callable[..., NDArray[Any]], tuple[Any, ...], bool]

# The options, with their defaults: of packing, and of running.
INPUT = {
    "input_dtype": "float32",
    "input_scale": 1.0,
    "input_zero_point": 0,
    "input_bits": None,
    "algorithm": "auto",
}
GEOMETRY = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
EPILOGUE = {
    "residual_scale": 1.0,
    "residual_zero_point": 0,
    "clamp": None,
    "out_dtype": "float32",
    "out_scale": None,
    "out_zero_point": 0,
}
DTYPES = {name: getattr(torch, name) for name in (*OUTPUT_DTYPES, *SHORT_FLOATS)}

library = torch.library.Library("pycodesign", "DEF")
prepared: TensorCache[Prepared] = TensorCache()
placed: TensorCache[tuple[Packed, tuple[Any, ...]]] = TensorCache()  # layers on GPUs


def define(
    schema: str,
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    differentiable: Callable[..., Any] | None,
    cuda: Callable[..., Any] | None = None,
    cast: Callable[..., Sequence[Any]] | None = None,
    is_plain: Callable[..., bool] | None = None,
) -> None:
    """Define an operator with its kernels; `differentiable(operator, *args)` calls it, and has a gradient.

    Without a kernel for CUDA it refuses tensors there. Under autocast it takes `cast(*args)`: float32 by default. Where
    ``is_plain(*args)``, no gradient is recorded and all tensors but weights are in host memory and nothing else: its
    kernel is called at once.
    """
    name = schema[: schema.index("(")]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.pycodesign, name).default

    def autograd(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            refuse_tangents(name, args)
        if is_plain is not None and is_plain(*args):
            return cpu(*args)  # a microsecond less than another dispatch
        if differentiable is not None and torch.is_grad_enabled() and any_requires_grad(*args):
            return differentiable(operator, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    def autocast(device: str, *args: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return operator(*(cast(*args) if cast else _to_float32(args)))

    def check_device(*args: Any, **kwargs: Any) -> Any:
        if cuda is None and any(tensor.device.type == "cuda" for tensor in list_tensors(args[:1])):
            refuse_cuda()
        check_meta(operator._schema.arguments[0].name, args)
        return fake(*args, **kwargs)

    for device, kernel in (("CPU", cpu), ("CUDA", cuda or refuse_cuda)):
        library.impl(name, kernel, device)
        library.impl(name, autograd, f"Autograd{device}")  # a microsecond less than with its keys
        library.impl(name, functools.partial(autocast, device.lower()), f"Autocast{device}")
    torch.library.register_fake(f"pycodesign::{name}", check_device, lib=library)


_keys_of, _count_modes, _find_transform = (
    torch._C._dispatch_keys,
    torch._C._len_torch_dispatch_stack,
    torch._C._functorch.peek_interpreter_stack,
)
_from_numpy, _is_grad_enabled = torch.from_numpy, torch.is_grad_enabled
_plain_keys = _keys_of(torch.empty(0, device="cpu")).raw_repr()


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Return whether all are in host memory and neither views with a sign, nor fake, nor of a transform or a mode."""
    if _count_modes() or _find_transform() is not None:
        return False
    for tensor in tensors:  # `all` takes a third longer
        if _keys_of(tensor).raw_repr() != _plain_keys:
            return False
    return True


def refuse_tangents(name: str, args: Sequence[Any]) -> None:
    """Raise NotImplementedError within forward-mode differentiation, which would find a derivative of zero."""
    if torch._C._is_fwd_grad_enabled() and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in list_tensors(args)
    ):
        raise NotImplementedError(
            f"{name}: expected no forward-mode differentiation (torch.func.jvp, make_dual), got a tensor with a "
            "tangent; gradients are there in reverse mode"
        )


def check_meta(name: str, args: Sequence[Any]) -> None:
    """Check that no result is asked of tensors without data, such as weights that were never loaded."""
    values = list_tensors([args[0], *(given for given in args if isinstance(given, (list, tuple)))])
    if any(tensor.is_meta for tensor in list_tensors(args)):
        for x in values:
            if not x.is_meta:
                raise TypeError(f"{name}: expected a tensor on meta, where others are, got one on {x.device}")


def list_tensors(args: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among arguments, some of which may be lists."""
    given = [a for argument in args for a in (argument if isinstance(argument, (list, tuple)) else [argument])]
    return [a for a in given if isinstance(a, Tensor)]


def _search_requires_grad(*args: Any) -> bool:
    return any(_search_requires_grad(*a) if isinstance(a, list) else getattr(a, "requires_grad", False) for a in args)


any_requires_grad = getattr(torch._C, "_any_requires_grad", _search_requires_grad)  # since torch 2.5


def _to_float32(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return [_to_float32(tensor) for tensor in argument]
    half = isinstance(argument, Tensor) and argument.dtype in (torch.float16, torch.bfloat16)
    return argument.float() if half else argument


def cast_layer(kind: str, x: Tensor, *others: Any) -> tuple[Any, ...]:
    """Return the arguments of a layer under autocast."""
    options = others[-1] if isinstance(others[-1], str) else "{}"
    asked = parse_options(options, kind)[0]["input_dtype"]
    if asked in SHORT_FLOATS and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return x.to(DTYPES[asked]), *others
    return _to_float32(x), *_to_float32(others)


def refuse_cuda(*_: Any) -> Any:
    raise TypeError("x: expected tensors in host memory (no CUDA kernel does this), got tensors on a CUDA device")


def run_conv2d(
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    options: str = "{}",
) -> Tensor:
    """Kernel of ``torch.ops.pycodesign.conv2d`` for the CPU."""
    key = id(codes), id(levels), id(scale), id(bias), options
    packed, run, epilogue, promised = prepared.get(key, (codes, levels, scale, bias), _prepare_conv2d, options)
    try:
        given = x.numpy()
    except (RuntimeError, TypeError):
        given = to_array("x", x)
    if promised:
        check_promise(given, packed._options)
    added = None if residual is None else to_array("residual", residual)
    return _from_numpy(run(given, added, *epilogue, None))


def run_linear(
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    options: str = "{}",
) -> Tensor:
    """Kernel of ``torch.ops.pycodesign.linear`` for the CPU."""
    key = id(codes), id(levels), id(scale), id(bias), options
    packed, run, epilogue, promised = prepared.get(key, (codes, levels, scale, bias), _prepare_linear, options)
    try:
        given = x.numpy()
    except (RuntimeError, TypeError):
        given = to_array("x", x)
    if promised:
        check_promise(given, packed._options)
    added = None if residual is None else to_array("residual", residual)
    if given.ndim == 2:
        return _from_numpy(run(given, added, *epilogue, None))
    outputs, inputs = packed._shape
    check_array("x", given, (packed._options["input_dtype"],), f"(..., {inputs})", given.shape[-1:] == (inputs,))
    shape, rows = (*given.shape[:-1], outputs), math.prod(given.shape[:-1])
    if added is not None:
        check_array("residual", added, tuple(INPUT_RANGES), str(shape), added.shape == shape)
        added = added.reshape(rows, outputs)
    return torch.from_numpy(run(given.reshape(rows, inputs), added, *epilogue, None).reshape(shape))


def run_on_device(
    kind: str,
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    options: str = "{}",
) -> Tensor:
    """Kernel of both operators for CUDA; the weights may be in either memory."""
    device = _device.locate(x)
    if device is None:
        raise TypeError(f"x: expected a tensor on {codes.device}, where the weights are, got one on {x.device}")
    key = id(codes), id(levels), id(scale), id(bias), options, device.index
    packed, numbers = placed.get(key, (codes, levels, scale, bias), _place, kind, options, device.index)
    assert isinstance(packed._native, DeviceLayer)
    y: Tensor = run_layer(packed._native, packed._options, x.detach(), residual, numbers, None)
    return y


def _place(weights: Weights, kind: str, options: str, index: int) -> tuple[Packed, tuple[Any, ...]]:
    inputs, epilogue = parse_options(options, kind)
    bias = None if weights[3] is None else weights[3].detach().cpu()
    codes, levels, scale = (tensor.detach().cpu() for tensor in weights[:3] if tensor is not None)
    prepack: Callable[..., Packed] = prepack_conv2d if kind == "conv2d" else prepack_linear
    packed = prepack(from_arrays(codes, levels, scale), bias, **inputs, device=index)
    return packed, tuple(epilogue[name] for name in EPILOGUE)


def to_array(name: str, tensor: Tensor) -> NDArray[Any]:
    """Return a view of the tensor."""
    try:
        array: NDArray[Any] = (tensor.detach() if tensor.requires_grad else tensor).numpy()
    except TypeError:
        raise TypeError(f"{name}: expected float32, uint8 or int8, got {tensor.dtype}") from None
    return array


def _to_host(weights: Weights) -> list[Any]:
    """Return the weights with their signs; they have to lie where x does."""
    for tensor in weights:
        if tensor is not None and tensor.device.type != "cpu":
            raise TypeError(f"x: expected a tensor on {tensor.device}, where the weights are, got one on cpu")
    return [None if tensor is None else tensor.resolve_neg() for tensor in weights]


def _prepare_conv2d(weights: Weights, options: str, packed: Packed | None = None) -> Prepared:
    inputs, epilogue = parse_options(options, "conv2d")
    if packed is None:
        codes, levels, scale, bias = _to_host(weights)
        packed = prepack_conv2d(from_arrays(codes, levels, scale), bias, **inputs)
    return packed, packed._native.run, _to_native(epilogue), inputs["input_bits"] is not None  # type: ignore[union-attr]


def _prepare_linear(weights: Weights, options: str, packed: Packed | None = None) -> Prepared:
    inputs, epilogue = parse_options(options, "linear")
    if packed is None:
        codes, levels, scale, bias = _to_host(weights)
        packed = prepack_linear(from_arrays(codes, levels, scale), bias, **inputs)
    run = packed._native.run_rows  # type: ignore[union-attr]
    return packed, run, _to_native(epilogue), inputs["input_bits"] is not None


def find_packed(kind: str, weights: Weights, options: str, packed: Packed | None = None) -> Packed:
    """Return what runs for these weights and options: if there is none yet, `packed` or what is packed now."""
    prepare = _prepare_conv2d if kind == "conv2d" else _prepare_linear
    return prepared.get((*map(id, weights), options), weights, prepare, options, packed)[0]


def _to_native(epilogue: dict[str, Any]) -> tuple[Any, ...]:
    """Check what `pycodesign.ops.conv2d` takes; return the arguments of the native call that follow `residual`."""
    arguments = check_epilogue(None, **epilogue)
    return tuple(value for name, value in arguments.items() if name != "residual")


@functools.cache
def parse_options(options: str, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what packing takes and what running takes, with their defaults."""
    defaults = default_options(kind)
    try:
        given = json.loads(options)
    except json.JSONDecodeError as error:
        raise ValueError(f"options: expected JSON, got {options!r}: {error}") from None
    if not isinstance(given, dict) or not given.keys() <= defaults.keys():
        raise ValueError(f"options: expected a JSON object with {join_names(defaults)}, got {options!r}")
    merged = defaults | given
    epilogue = {name: merged.pop(name) for name in EPILOGUE}
    return merged, epilogue


def default_options(kind: str) -> dict[str, Any]:
    return INPUT | (GEOMETRY if kind == "conv2d" else {}) | EPILOGUE


def fake_conv2d(
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    options: str = "{}",
) -> Tensor:
    inputs, epilogue = parse_options(options, "conv2d")
    outputs, channels, *kernel = weight_shape(codes, levels)
    channels *= inputs["groups"]
    check_fake("x", x, inputs["input_dtype"], x.dim() == 4 and x.shape[1] == channels, f"(N, {channels}, H, W)")
    windows = zip(kernel, *(to_pair(name, inputs[name], 0) for name in ("stride", "padding", "dilation")), strict=True)
    sizes = [output_size(size, *window) for size, window in zip(x.shape[2:], windows, strict=True)]
    return x.new_empty((x.shape[0], outputs, *sizes), dtype=DTYPES[epilogue["out_dtype"]])


def fake_linear(
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    options: str = "{}",
) -> Tensor:
    inputs, epilogue = parse_options(options, "linear")
    count, channels = weight_shape(codes, levels)
    check_fake("x", x, inputs["input_dtype"], x.dim() > 0 and x.shape[-1] == channels, f"(..., {channels})")
    return x.new_empty((*x.shape[:-1], count), dtype=DTYPES[epilogue["out_dtype"]])


def output_size(size: Any, kernel: int, stride: int, padding: int, dilation: int) -> Any:
    """Return how often a window fits; `size` may be a symbol."""
    return torch.sym_max((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1, 0)


def check_fake(name: str, x: Tensor, dtype: str, fits: bool, shape: str) -> None:
    if x.dtype == DTYPES[dtype] and fits:
        return
    text = f"{name}: expected {dtype} {shape}, got {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
    raise ValueError(text) if x.dtype == DTYPES[dtype] else TypeError(text)


class LayerGradient(torch.autograd.Function):
    """A packed layer, with the gradient to its input and its residual."""

    @staticmethod
    def forward(ctx: Any, operator: Any, *args: Any) -> Tensor:
        defaults: tuple[Any, ...] = None, None, "{}"
        x, codes, levels, scale, bias, _, options = *args, *defaults[len(args) - 4 :]
        refuse_weight_gradients({"levels": levels, "scale": scale, "bias": bias})
        kind = "conv2d" if len(weight_shape(codes, levels)) == 4 else "linear"
        ctx.inputs, ctx.epilogue = parse_options(options, kind)
        dtype = ctx.epilogue["out_dtype"]
        if dtype != "float32":
            raise ValueError(f"out_dtype: expected 'float32' where a gradient is asked for, got {dtype!r}")
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = operator(*args)
        ctx.x_shape, ctx.count = x.shape, len(args)
        ctx.save_for_backward(codes, levels, scale, None if ctx.epilogue["clamp"] is None else y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, levels, scale, y = ctx.saved_tensors
        if y is not None:
            grad = mask_clamped(grad, y, ctx.epilogue["clamp"])
        grad_x = grad_residual = None
        if ctx.needs_input_grad[1]:
            weight = dequantize(codes, levels, scale)
            with torch.autocast(grad.device.type, enabled=False):
                if weight.dim() == 2:
                    grad_x = grad @ weight
                else:
                    geometry = (ctx.inputs[name] for name in GEOMETRY)
                    grad_x = torch.nn.grad.conv2d_input(ctx.x_shape, weight, grad, *geometry)
        if ctx.count > 5 and ctx.needs_input_grad[6]:
            grad_residual = grad * ctx.epilogue["residual_scale"]
        return (None, grad_x, None, None, None, None, grad_residual, None)[: 1 + ctx.count]


def refuse_weight_gradients(weights: dict[str, Tensor | None]) -> None:
    for name, tensor in weights.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name}: expected requires_grad=False: only the input of a packed layer has a gradient")


def mask_clamped(grad: Tensor, y: Tensor, clamp: tuple[float | None, float | None]) -> Tensor:
    """Return the gradient to what was clamped to y: none at the limits, as for torch's ReLU, ReLU6 and Hardtanh.

    (`torch.clamp` itself lets the gradient pass there.)
    """
    low, high = (math.nan if limit is None else limit for limit in clamp)  # nothing compares with NaN
    return torch.where((y <= low) | (y >= high), 0, grad)


ARGUMENTS = (
    "(Tensor x, Tensor codes, Tensor levels, Tensor scale, Tensor? bias=None, Tensor? residual=None, "
    "str options='{}') -> Tensor"
)


def _is_plain_call(
    x: Tensor,
    codes: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    options: str = "{}",
) -> bool:
    """`are_plain` of x and residual, where no gradient is to be recorded: in one frame, as every call asks."""
    if _count_modes() or _keys_of(x).raw_repr() != _plain_keys or _find_transform() is not None:
        return False
    if residual is not None and _keys_of(residual).raw_repr() != _plain_keys:
        return False
    return not _is_grad_enabled() or not (
        x.requires_grad
        or levels.requires_grad
        or scale.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


on_device = {kind: functools.partial(run_on_device, kind) for kind in ("conv2d", "linear")}
casts = {kind: functools.partial(cast_layer, kind) for kind in ("conv2d", "linear")}
for kind, cpu, fake in (("conv2d", run_conv2d, fake_conv2d), ("linear", run_linear, fake_linear)):
    define(
        f"{kind}{ARGUMENTS}",
        cpu,
        fake,
        LayerGradient.apply,
        on_device[kind],
        casts[kind],
        _is_plain_call,
    )
