"""Packed layers as torch modules."""

from __future__ import annotations

import json
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pycodesign import quantize
from pycodesign._arguments import SHORT_FLOATS, Array, join_names, to_number, to_numpy, to_pair
from pycodesign._quantized import FewValued, from_arrays, to_arrays
from pycodesign.nn import ops
from pycodesign.nn.graph import to_plain
from pycodesign.nn.program import LayerWeights, Program, Step, find_chain, join_weights, parse_program, split_weights
from pycodesign.nn.sources import find_weight
from pycodesign.nn.weights import dequantize, weight_shape
from pycodesign.ops import Packed
from pycodesign.quantize import KernelCodebook, QuantizedTensor

__all__ = ["Conv2d", "Linear"]

Quantizer: TypeAlias = str | Callable[[Any], FewValued]
L = TypeVar("L", bound="Layer")

WINDOWS = ("stride", "padding", "dilation")
QUANTIZERS = ("binary", "from_fake_quantized", "kernel_codebook", "ternary")  # they need the weights alone


class PackedModule(nn.Module):
    """Loads the states of modules whose weights have as many levels."""

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        wanted = {name: tuple(x.shape) for name, x in self._buffers.items() if x is not None}
        got = {name: tuple(state_dict[prefix + name].shape) for name in wanted if prefix + name in state_dict}
        wanted = {name: wanted[name] for name in got}
        if got != wanted:
            sizes = (", ".join(f"{name} {shape}" for name, shape in shapes.items()) for shapes in (wanted, got))
            text = (
                "{}: expected {}, got {}: other layers, or another number of levels; convert a network of those weights"
            )
            error_msgs.append(text.format(prefix.rstrip(".") or type(self).__name__, *sizes))
            return
        others = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, *others)


class Layer(PackedModule):
    """What `Conv2d` and `Linear` share.

    Parameters
    ----------
    codes, levels, scale, bias : Tensor
        Become buffers; as in `QuantizedTensor`, or of a `KernelCodebook` as `pycodesign._quantized.to_arrays` says.
        Where one is written to, by `load_state_dict` for instance, the layer is packed anew at its next call. Writes
        that torch does not count go unnoticed: those through ``.data`` or through an array of ``numpy()``.
    **options
        As for `from_quantized`.
    """

    kind: ClassVar[str]
    codes: Tensor
    levels: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self, codes: Tensor, levels: Tensor, scale: Tensor, bias: Tensor | None = None, **options: Any
    ) -> None:
        super().__init__()
        for name, tensor in {"codes": codes, "levels": levels, "scale": scale, "bias": bias}.items():
            self.register_buffer(name, tensor)
        defaults = ops.default_options(self.kind)
        for name in options.keys() - defaults.keys():
            raise TypeError(f"{name}: expected one of the options {join_names(defaults)}, got another")
        options = {name: _to_plain(name, value) for name, value in options.items()}
        self.options = {k: v for k, v in options.items() if v not in (defaults[k], (defaults[k], defaults[k]))}
        self.options_json = json.dumps(self.options)
        outputs, inputs, *kernel = weight_shape(codes, levels)  # what follows has the names that torch's layers give it
        if self.kind == "linear":
            self.in_features, self.out_features = inputs, outputs
            return
        geometry = defaults | options
        self.stride, self.padding, self.dilation = (to_pair(name, geometry[name], 0) for name in WINDOWS)
        self.groups, self.kernel_size = geometry["groups"], tuple(kernel)
        self.in_channels, self.out_channels = inputs * self.groups, outputs
        windows = zip(kernel, self.stride, self.padding, self.dilation, strict=False)  # packing checks the weights
        self.least = [least_size(1, *window) for window in windows]

    @classmethod
    def from_quantized(
        cls: type[L], q: FewValued, bias: Array | None = None, *, packed: Packed | None = None, **options: Any
    ) -> L:
        """Make a layer from quantized weights, and pack it; one of 16-bit floats, at its first call on a GPU.

        Parameters
        ----------
        q : QuantizedTensor or KernelCodebook (O, C / groups, kH, kW), or (O, I) for a linear layer
        bias : float32 (O,), optional
        packed : Packed, optional
            The same layer, where it is packed already.
        **options
            Those of `pycodesign.ops.prepack_conv2d` (stride, padding, dilation, groups, input_dtype, input_scale,
            input_zero_point, input_bits, algorithm) and of `pycodesign.ops.conv2d` (clamp, out_dtype, out_scale,
            out_zero_point, residual_scale, residual_zero_point); for a linear layer, those of its functions.

        Raises
        ------
        TypeError, ValueError
            As those functions do.
        """
        if not isinstance(q, (QuantizedTensor, KernelCodebook)):
            raise TypeError(f"q: expected QuantizedTensor or KernelCodebook, got {type(q).__name__}")
        arrays = [*to_arrays(q)]
        if bias is not None:
            arrays.append(to_numpy("bias", bias)[0])
        layer = cls(*(torch.from_numpy(np.array(array)) for array in arrays), **options)
        if options.get("input_dtype") not in SHORT_FLOATS:
            layer.packed(packed)
        return layer

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # named as in torch's layers
        """Run the layer; `residual` is added before the clamp."""
        run = getattr(torch.ops.pycodesign, self.kind).default
        y: Tensor = run(input, self.codes, self.levels, self.scale, self.bias, residual, self.options_json)
        return y

    def packed(self, given: Packed | None = None) -> Packed:
        """Return what runs, `given` if there is none yet; its `explain` says why."""
        weights = self.codes, self.levels, self.scale, self.bias
        return ops.find_packed(self.kind, weights, self.options_json, given)

    def quantized(self) -> FewValued:
        """Return the weights that the layer was made of."""
        return from_arrays(self.codes, self.levels, self.scale)

    @property
    def weight(self) -> Tensor:
        """The weights as torch's layers have them, made anew for each reader."""
        return dequantize(self.codes, self.levels, self.scale)

    def extra_repr(self) -> str:
        outputs, inputs, *kernel = weight_shape(self.codes, self.levels)
        text = f"{inputs * self.options.get('groups', 1)}, {outputs}, "
        text += f"kernel_size={tuple(kernel)}, " if kernel else ""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        few = f"levels={self.levels.shape[-1]}" if self.levels.dim() < 3 else f"kernels={self.levels.shape[1]}"
        return f"{text}{few}, bias={self.bias is not None}{options}"


class Conv2d(Layer):
    """Convolution with packed weights, of `from_quantized` or `from_float`.

    Weights have no gradient; the gradient to a float32 input is that of the dequantized convolution. Inputs are float32
    (also under autocast), or what `input_dtype` says; (N, C, H, W) or (C, H, W), of any strides.

    Examples
    --------
    >>> import torch, pycodesign
    >>> layer = pycodesign.nn.Conv2d.from_float(torch.nn.Conv2d(16, 32, 3, padding=1), "ternary")
    >>> layer
    Conv2d(16, 32, kernel_size=(3, 3), levels=3, bias=True, padding=(1, 1))
    >>> layer(torch.ones(1, 16, 8, 8)).shape
    torch.Size([1, 32, 8, 8])
    """

    kind = "conv2d"

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if len(input.shape) == 3:
            return self.forward(input[None], None if residual is None else residual[None])[0]
        check_size(input, self.least)
        return super().forward(input, residual)

    @classmethod
    def from_float(cls, module: nn.Conv2d, weights: Quantizer = "from_fake_quantized", **options: Any) -> Conv2d:
        """Make a packed convolution from one of torch's, or of a class derived from it.

        Parameters
        ----------
        module : torch.nn.Conv2d
            Not changed.
        weights : str or callable
            Name of a function of `pycodesign.quantize`, or a function from weights to a `QuantizedTensor` or a
            `KernelCodebook`. By default the weights are those of a quantizer already, and are kept exactly.
        **options
            As for `from_quantized`.

        Raises
        ------
        TypeError, ValueError
            For weights with too many distinct values, for a padding mode other than zeros, and as `from_quantized`.
        """
        if not isinstance(module, nn.Conv2d):
            raise TypeError(f"module: expected torch.nn.Conv2d, got {type(module).__name__}")
        return cls.from_quantized(quantize_weight(module, weights), module.bias, **read_geometry(module), **options)


class Linear(Layer):
    """Linear layer with packed weights, of `from_quantized` or `from_float`.

    As `Conv2d`; inputs are (..., I).

    Examples
    --------
    >>> import torch, pycodesign
    >>> layer = pycodesign.nn.Linear.from_float(torch.nn.Linear(64, 10), "binary")
    >>> layer
    Linear(64, 10, levels=2, bias=True)
    >>> layer(torch.ones(2, 5, 64)).shape
    torch.Size([2, 5, 10])
    """

    kind = "linear"

    @classmethod
    def from_float(cls, module: nn.Linear, weights: Quantizer = "from_fake_quantized", **options: Any) -> Linear:
        """Make a packed linear layer from one of torch's; arguments as for `Conv2d.from_float`."""
        if not isinstance(module, nn.Linear):
            raise TypeError(f"module: expected torch.nn.Linear, got {type(module).__name__}")
        return cls.from_quantized(quantize_weight(module, weights), module.bias, **options)


class Segment(PackedModule):
    """Layers, with the pooling and the adds between them, that run in one call; made by `convert`.

    Its state holds the program, too, which has the scales of activations.

    Parameters
    ----------
    program : Program
    weights : sequence of (QuantizedTensor, bias or None)
        Of the program's layers, in their order.
    rows : bool
        Whether inputs are (..., I); else they are (N, C, H, W) or (N, I).
    packed : sequence of Packed, optional
        The same weights where they are packed already.
    """

    codes: Tensor
    levels: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(
        self,
        program: Program,
        weights: Sequence[LayerWeights],
        rows: bool = False,
        packed: Sequence[Packed] | None = None,
    ) -> None:
        super().__init__()
        for name, tensor in zip(("codes", "levels", "scale", "bias"), join_weights(weights), strict=True):
            self.register_buffer(name, tensor)
        self.program, self.rows = program.to_json(), rows
        self.least = find_least_sizes(program)
        find_chain(self.weights(), self.program, packed)

    def weights(self) -> tuple[Tensor, ...]:
        named: Any = self._buffers  # a microsecond less than attributes of a module
        return named["codes"], named["levels"], named["scale"], named["bias"]

    @property
    def weight(self) -> Tensor:
        """The weights of the only layer, as torch's layers have them."""
        layers = split_weights(parse_program(self.program), self.weights())
        if len(layers) != 1:
            raise AttributeError(f"weight: expected a segment of one layer, got {len(layers)}")
        return torch.from_numpy(layers[0][0].dequantize())

    def forward(self, input: Tensor, *others: Tensor) -> Any:
        """Run the segment; a list where it makes several values."""
        inputs = input, *others
        for x, least in zip(inputs, self.least, strict=True):
            if least is not None:
                check_size(x, least)
        given = [x.reshape(-1, x.shape[-1]) for x in inputs] if self.rows else list(inputs)
        values = torch.ops.pycodesign.chain.default(given, *self.weights(), self.program)
        if self.rows:
            values = [y.reshape(*input.shape[:-1], y.shape[-1]) for y in values]
        return values[0] if len(values) == 1 else values

    def get_extra_state(self) -> Tensor:
        return torch.frombuffer(bytearray(self.program.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        program = state.numpy().tobytes().decode()
        self.least = find_least_sizes(parse_program(program))
        self.program = program

    def extra_repr(self) -> str:
        steps = parse_program(self.program).steps
        return "\n".join(f"{step.op} {step.layer['name']}" if step.layer else step.op for step in steps)


def _to_plain(name: str, value: Any) -> Any:
    """Return an option as JSON takes it: with numbers of Python's, also within pairs, for those of NumPy."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Sequence):
        return tuple(_to_plain(name, v) for v in value)
    try:
        return operator.index(value)
    except TypeError:
        if isinstance(value, numbers.Real):
            return to_number(name, value)
    raise TypeError(f"{name}: expected a number, a pair, a name or None, got {type(value).__name__}")


def check_size(x: Tensor, least: Sequence[int]) -> None:
    if len(x.shape) != 4 or x.shape[2] < least[0] or x.shape[3] < least[1]:
        wanted = f"(N, C, H, W) of {least[0]} x {least[1]} pixels at least, which kernels and pooling need"
        raise ValueError(f"input: expected {wanted}, got {tuple(x.shape)}")


def least_size(outputs: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Return the size that a window needs for this many results."""
    return max((outputs - 1) * stride + dilation * (kernel - 1) + 1 - 2 * padding, 1)


def find_least_sizes(program: Program) -> list[list[int] | None]:
    """Return height and width that each input must have; None for inputs that no window slides over."""
    least: dict[int, list[int]] = {}
    for result, step in reversed(list(enumerate(program.steps, len(program.inputs)))):
        needed = least.get(result)
        if step.op in ("conv2d", "max_pool2d", "avg_pool2d"):
            needed = needed or [1, 1]
            _raise_to(least, step.x, _find_least_input(step, needed))
        elif step.op == "add" and needed:
            _raise_to(least, step.x, needed)
        if step.other is not None and needed:
            _raise_to(least, step.other, needed)
    return [least.get(i) for i in range(len(program.inputs))]


def _find_least_input(step: Step, outputs: Sequence[int]) -> list[int]:
    given = step.arguments
    if step.layer is not None:
        given = {"kernel_size": step.layer["shape"][2:], "stride": 1, **step.layer["options"]}
    kernel = given.get("kernel_size")
    if kernel is None:
        return [1, 1]  # pooling of the whole image
    windows = kernel, given.get("stride") or kernel, given.get("padding", 0), given.get("dilation", 1)
    pairs = (to_pair("kernel_size", values, 0) for values in windows)
    return [least_size(n, *window) for n, *window in zip(outputs, *pairs, strict=True)]


def _raise_to(least: dict[int, list[int]], value: int, needed: Sequence[int]) -> None:
    least[value] = [max(pair) for pair in zip(least.get(value, (1, 1)), needed, strict=True)]


def quantize_weight(module: nn.Module, weights: Quantizer) -> FewValued:
    """Quantize, or read without loss, the weights of a convolution or a linear layer."""
    if weights == "from_fake_quantized":
        found = find_weight(module)
        return quantize.from_fake_quantized(module.weight) if found is None else found
    weight = module.weight.detach()  # type: ignore[operator]
    q = find_quantizer(weights)(weight)
    if not isinstance(q, (QuantizedTensor, KernelCodebook)):
        wanted = "a function that returns a QuantizedTensor or a KernelCodebook"
        raise TypeError(f"weights: expected {wanted}, got {type(q).__name__}")
    if q.shape != tuple(weight.shape):
        raise ValueError(f"weights: expected a {type(q).__name__} {tuple(weight.shape)}, got {q.shape}")
    return q


def find_quantizer(weights: Quantizer) -> Callable[[Any], FewValued]:
    if callable(weights):
        return weights
    if not isinstance(weights, str):
        raise TypeError(f"weights: expected a name or a function, got {type(weights).__name__}")
    if weights not in QUANTIZERS:
        wanted = f"{join_names(map(repr, QUANTIZERS))}, or a function from weights to a QuantizedTensor"
        raise ValueError(f"weights: expected {wanted}, got {weights!r}")
    function: Callable[[Any], FewValued] = getattr(quantize, weights)
    return function


def read_geometry(module: nn.Conv2d) -> dict[str, Any]:
    """Return stride, padding, dilation and groups; ValueError if the kernels know no such padding."""
    if module.padding_mode != "zeros":
        raise ValueError(f"padding_mode: expected 'zeros', got {module.padding_mode!r}")
    padding = module.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        margins = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(margin % 2 for margin in margins):
            raise ValueError(f"padding: expected as much on both sides, got 'same' with kernel {module.kernel_size}")
        padding = (margins[0] // 2, margins[1] // 2)
    geometry = {"stride": module.stride, "padding": padding, "dilation": module.dilation, "groups": module.groups}
    return {name: to_plain(value) for name, value in geometry.items()}
