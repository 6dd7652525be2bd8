"""The layers that are timed: shapes, random quantized weights, and the results to expect.

A call of an engine costs a fixed amount (arguments, layout changes at the ends of the graph) that a network pays once,
not once per layer. So a case holds `Case.length` layers of one shape and different weights, which a contender runs in
one call. Layers that keep their shape follow one another; the others all read the same input.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = {"uint8": 255, "uint4": 15}  # uint4: uint8 values below 16, of which kernels are told
# Of every integer tensor of a chain; the zero point is 0, so that saturation is the ReLU.
ACTIVATION_SCALES = {dtype: np.float32(4 / largest) for dtype, largest in LARGEST.items()}
CHAIN_MACS = 800e6  # long enough for the ends of a graph not to count
CHAIN_BYTES = 3 << 28  # of float32 weights, and of each engine's copy
CHAIN_LENGTHS = (4, 32)

Array = NDArray[Any]


@dataclass(frozen=True)
class Layer:
    """Shape of a convolution, or of a linear layer (`size` 0).

    Parameters
    ----------
    name : str
    batch, inputs, outputs : int
        N, C and O.
    size : int
        H = W of the input; 0 for a linear layer.
    kernel, stride, padding : int
        Equal in both directions.
    """

    name: str
    batch: int
    inputs: int
    outputs: int
    size: int = 0
    kernel: int = 1
    stride: int = 1
    padding: int = 0

    @property
    def is_conv(self) -> bool:
        """Whether this is a convolution."""
        return self.size > 0

    @property
    def output_size(self) -> int:
        """H = W of the output; 1 for a linear layer."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1 if self.is_conv else 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(N, C, H, W) or (N, C)."""
        return (self.batch, self.inputs, self.size, self.size) if self.is_conv else (self.batch, self.inputs)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(N, O, H, W) or (N, O)."""
        side = (self.output_size, self.output_size) if self.is_conv else ()
        return (self.batch, self.outputs, *side)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(O, C, kH, kW) or (O, C)."""
        return (self.outputs, self.inputs, *((self.kernel, self.kernel) if self.is_conv else ()))

    @property
    def terms(self) -> int:
        """Products in the sum of one output."""
        return self.inputs * self.kernel**2

    @property
    def macs(self) -> int:
        """Multiply-adds of the dense layer."""
        return self.batch * self.outputs * self.output_size**2 * self.terms

    @property
    def chain_length(self) -> int:
        """Layers that one call runs."""
        low, high = CHAIN_LENGTHS
        by_bytes = CHAIN_BYTES // (4 * math.prod(self.weight_shape))
        return int(min(max(CHAIN_MACS // self.macs, low), high, max(by_bytes, low)))


@dataclass(frozen=True)
class Case:
    """Layers of one shape with their weights, biases and input.

    Parameters
    ----------
    layer : Layer
    weights : sequence of pycodesign.QuantizedTensor or KernelCodebook
        One for each layer of the chain; integer levels that fit int8, one scale per output.
    biases : sequence of (O,) float32
        Each value a multiple of uint8's `ACTIVATION_SCALES` times the layer's weight scale, as engines that keep the
        bias in int32 need it.
    x : (N, C, H, W) or (N, C) float32
        Real input: a ReLU's output, and exact in uint8.
    """

    layer: Layer
    weights: Sequence[Any]
    biases: Sequence[NDArray[np.float32]]
    x: NDArray[np.float32]

    @classmethod
    def random(cls, layer: Layer, weights: str = "ternary", *, length: int | None = None, seed: int = 0) -> Case:
        """Quantize Gaussian weights, scaled so that a ReLU network of them keeps the size of its activations.

        Parameters
        ----------
        layer : Layer
        weights : str
            A function of `pycodesign.quantize`, with its bits where it takes some: ``"binary"``, ``"ternary"``,
            ``"uniform2"`` (4 levels), ``"power_of_two4"``; ``"codebook32"``: any of 32 random sign kernels.
        length : int, optional
            Layers in the chain, `Layer.chain_length` by default.
        seed : int
        """
        quantize = find_quantizer(weights)
        rng = np.random.default_rng(seed)
        unit = ACTIVATION_SCALES["uint8"]
        quantized, biases = [], []
        for _ in range(layer.chain_length if length is None else length):
            q = quantize(rng.standard_normal(layer.weight_shape, np.float32))
            power = float(np.mean(np.square(q.dequantize(), dtype=np.float64))) * layer.terms
            q = replace(q, scale=(q.scale * np.float32(math.sqrt(2 / power))).astype(np.float32))
            step = unit * q.scale
            bias = np.rint(0.1 * rng.standard_normal(layer.outputs) / step).astype(np.float32) * step
            quantized.append(q)
            biases.append(bias)
        codes = np.clip(np.rint(rng.standard_normal(layer.input_shape, np.float32) / unit), 0, LARGEST["uint8"])
        return cls(layer, quantized, biases, codes * unit)

    @property
    def length(self) -> int:
        """Layers that one call runs."""
        return len(self.weights)

    @property
    def sequential(self) -> bool:
        """Whether the layers follow one another; else all read `x`, and a check looks at one pixel of each."""
        return self.length == 1 or self.layer.output_shape == self.layer.input_shape

    @cached_property
    def head(self) -> Case:
        """The first layer alone."""
        return replace(self, weights=self.weights[:1], biases=self.biases[:1])

    def int8_weights(self, index: int) -> NDArray[np.int8]:
        """Levels of layer `index` in place of its codes, shape (O, C, kH, kW) or (O, C)."""
        levels: NDArray[np.int8] = self.weights[index].decode().astype(np.int8)
        return levels

    def float_weights(self, index: int) -> NDArray[np.float32]:
        """Real weights of layer `index`."""
        weights: NDArray[np.float32] = self.weights[index].dequantize()
        return weights

    def input(self, dtype: str) -> Array:
        """`x` as float32, or as uint8 values of the scale in `ACTIVATION_SCALES`."""
        return self.x if dtype == "float32" else np.rint(self.x / ACTIVATION_SCALES[dtype]).astype(np.uint8)

    def expected(self, dtype: str) -> list[Array]:
        """Results of the last layer (sequential) or of every layer, by a plain float64 computation.

        Parameters
        ----------
        dtype : {"float32", "uint8", "uint4"}

        Returns
        -------
        list of arrays
            float64, or uint8 in exactly the order of operations that `pycodesign.ops` promises.
        """
        if dtype not in self._expected:
            compute = self._layer_float32 if dtype == "float32" else partial(self._layer_integer, dtype)
            self._expected[dtype] = self._chain(self.input(dtype), compute)
        return self._expected[dtype]

    @cached_property
    def _expected(self) -> dict[str, list[Array]]:
        return {}

    def _chain(self, y: Array, compute: Callable[[Array, int], Array]) -> list[Array]:
        if self.sequential:
            for index in range(self.length):
                y = compute(y, index)
            return [y]
        corner = y[..., : self.layer.kernel, : self.layer.kernel] if self.layer.is_conv else y
        return [first_pixel(compute(corner, index)) for index in range(self.length)]

    def _layer_float32(self, x: Array, index: int) -> Array:
        sums = _sums(self.layer, x.astype(np.float64), self.float_weights(index).astype(np.float64))
        y: Array = np.maximum(sums + _along_channels(self.biases[index].astype(np.float64), sums), 0)
        return y

    def _layer_integer(self, dtype: str, x: Array, index: int) -> Array:
        unit = ACTIVATION_SCALES[dtype]
        sums = _sums(self.layer, x.astype(np.float64), self.int8_weights(index).astype(np.float64))
        scale = (np.float64(unit) * self.weights[index].scale).astype(np.float32)
        y = sums.astype(np.float32) * _along_channels(scale, sums)
        y = y + _along_channels(self.biases[index], sums)
        codes: Array = np.rint(np.clip(y / unit, 0, LARGEST[dtype])).astype(np.uint8)
        return codes

    @cached_property
    def float_bound(self) -> Array:
        """Error allowed in each float32 result of the first layer."""
        sums = _sums(self.layer, np.abs(self.x, dtype=np.float64), np.abs(self.float_weights(0), dtype=np.float64))
        bias = _along_channels(np.abs(self.biases[0], dtype=np.float64), sums)
        bound: Array = 8 * np.finfo(np.float32).eps * math.sqrt(self.layer.terms) * (sums + bias)
        return bound


def first_pixel(y: Array) -> Array:
    """Keep the pixel that the graphs of `build_onnx` keep."""
    return y[:, :, :1, :1] if y.ndim == 4 else y


def find_quantizer(weights: str) -> Callable[[Array], Any]:
    """Find ``"uniform4"`` and its like: a function of `pycodesign.quantize` with its bits, or a number of kernels."""
    name, number = re.fullmatch(r"(.*?)(\d*)", weights).groups()  # type: ignore[union-attr]
    quantize = importlib.import_module("pycodesign.quantize")
    if name == "codebook" and number:
        return partial(_draw_codebook, kernels=int(number))
    if name not in ("binary", "ternary", "uniform", "power_of_two"):
        wanted = "binary, ternary, uniform<bits>, power_of_two<bits> or codebook<kernels>"
        raise ValueError(f"weights: expected {wanted}, got {weights!r}")
    function: Callable[..., Any] = getattr(quantize, name)
    return (lambda w: function(w, int(number))) if number else function


def _draw_codebook(w: Array, kernels: int) -> Any:
    """Any of so many sign kernels for each filter of w, or for 8 channels where these are 1x1: their speed, not w."""
    rng = np.random.default_rng(np.abs(w.view(np.int32)).sum())
    outputs, inputs, *size = w.shape
    channels = 1 if math.prod(size) > 1 else math.gcd(8, inputs)
    shape = outputs, inputs // channels
    return importlib.import_module("pycodesign.quantize").KernelCodebook(
        rng.integers(0, kernels, shape, np.uint8),
        rng.choice(np.array([-1, 1], np.int8), shape),
        rng.choice(np.array([-1, 1], np.float32), (1, kernels, channels, *size)),
        np.ones(outputs, np.float32),
    )


def _sums(layer: Layer, x: Array, weights: Array) -> Array:
    """Sum of weight times input, float64, exact for integers: (N, O, H, W) or (N, O)."""
    if not layer.is_conv:
        return np.asarray(x @ weights.T)
    k, p, s = layer.kernel, layer.padding, layer.stride
    padded = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), axis=(2, 3))[:, :, ::s, ::s]
    rows = weights.reshape(layer.outputs, -1)
    results = []
    for image in windows:  # (C, H, W, k, k)
        columns = image.transpose(0, 3, 4, 1, 2).reshape(layer.terms, -1)
        results.append((rows @ columns).reshape(layer.outputs, *image.shape[1:3]))
    return np.stack(results)


def _along_channels(values: Array, like: Array) -> Array:
    """Shape (O,) values to broadcast over (N, O) or (N, O, H, W)."""
    return values.reshape(-1, *(1,) * (like.ndim - 2))
