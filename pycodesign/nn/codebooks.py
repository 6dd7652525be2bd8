"""Training of networks whose filters are few small kernels."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, SupportsFloat

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pycodesign.quantize import KernelCodebook, kernel_codebook

__all__ = ["Codebook", "anneal_codebooks", "use_codebooks"]

BEGIN = {"sign": 0.5, "ternary": 0.75, "real": 1.0}  # what a float kernel has where the rounded one has 1
BLOCK = 1 << 22  # products of a pattern and a kernel at a time
SMALLEST_SCALE = 1e-12  # of outputs without weights; its logarithm is finite
FAR = 8  # scales: a weight that is no longer asked which scale would suit it (LSQ: beyond the largest level)


class Codebook(nn.Module):
    """Parametrization of a weight: each filter becomes one of few kernels, up to sign and the output's scale.

    The forward pass assigns each filter of the float weight its nearest kernel. Gradients go straight through the
    assignment to the float weight, and to the kernel and scale that took its place; kernels of -1, 0 and 1 are the
    rounded values of float ones, to which the gradient goes straight, too. So a trained network is the start, and one
    optimizer trains everything. A learning rate for `log_scale` of a tenth of the others' does well, and no weight
    decay, which would pull all scales towards 1. Outputs whose weights are all zero stay close to it.

    The attribute `share`, 1 from the start, is how much of the result the codebook makes; the float weight makes the
    rest. `anneal_codebooks` sets it in all layers of a network, and a state dict keeps it.

    Parameters
    ----------
    w : Tensor (O, I) or (O, I / groups, kH, kW)
        The weights to begin with, those of a trained network if there is one.
    kernels, values, **options
        As for `pycodesign.quantize.kernel_codebook`.

    Raises
    ------
    TypeError, ValueError
        As that function does.

    References
    ----------
    Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", arXiv:1308.3432, 2013: the
    straight-through estimator; Esser et al., "Learned Step Size Quantization", ICLR 2020: the scale's gradient.

    Examples
    --------
    >>> import torch, pycodesign
    >>> layer = torch.nn.Conv2d(16, 32, 3)
    >>> codebook = pycodesign.nn.Codebook(layer.weight, kernels=8)
    >>> layer = torch.nn.utils.parametrize.register_parametrization(layer, "weight", codebook)
    >>> layer.weight.unique(dim=0).shape[0], len((layer.weight / codebook.scale()).unique())
    (32, 2)
    """

    def __init__(self, w: Tensor, kernels: int = 32, values: str = "sign", **options: Any) -> None:
        super().__init__()
        fitted = kernel_codebook(w, kernels, values, **options)
        self.values, self.share = values, 1.0
        self.kernels = nn.Parameter(BEGIN[values] * torch.from_numpy(fitted.kernels).to(w.device, w.dtype))
        log_scale = torch.from_numpy(fitted.scale.copy()).clamp(min=SMALLEST_SCALE).log()
        self.log_scale = nn.Parameter(log_scale.view(-1, *[1] * (w.dim() - 1)).to(w.device, w.dtype))

    def forward(self, w: Tensor) -> Tensor:
        scale, kernels = self.scale(), self._rounded_kernels()
        normalized = (w / scale).detach()
        index, sign = self._assign(normalized, kernels)
        first = torch.arange(0, kernels[..., 0].numel(), kernels.shape[1], device=w.device)  # kernel of each codebook
        chosen = F.embedding(index + first[:, None], kernels.flatten(0, 1)) * sign[..., None]  # (C, O * J / C, D)
        chosen = chosen.unflatten(1, (len(w), -1)).transpose(0, 1).reshape(w.shape)
        # Both terms of the estimator are exactly 0: the result is scale times kernel, to the last bit.
        near = torch.where(normalized.abs() <= FAR, normalized, 0)
        result: Tensor = scale * chosen + (w - w.detach()) - (scale - scale.detach()) * near
        return result if self.share == 1 else torch.lerp(w, result, self.share)

    def scale(self) -> Tensor:
        """Return the scales, (O, 1) or (O, 1, 1, 1), which are never 0, not in 16 bits either."""
        limits = torch.finfo(self.log_scale.dtype)
        return self.log_scale.exp().clamp(min=limits.tiny * limits.eps)

    @torch.no_grad()
    def export(self, w: Tensor) -> KernelCodebook:
        """Return what the forward pass makes of float weights `w`; ``dequantize()`` equals it.

        Raises ValueError before annealing has ended, and where training has left a number that is not finite.
        """
        if self.share != 1:
            raise ValueError(f"share: expected 1, the end of annealing, got {self.share}")
        for name, values in (("w", w), ("kernels", self.kernels), ("log_scale", self.log_scale)):
            if not values.isfinite().all():
                raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
        scale, kernels = self.scale(), self._rounded_kernels()
        index, sign = (
            part.unflatten(1, (len(w), -1)).transpose(0, 1).reshape(len(w), -1)
            for part in self._assign(w / scale, kernels)
        )
        arrays: Any = (
            index.to(torch.uint8),
            sign.to(torch.int8),
            kernels.view_as(self.kernels).float(),
            scale.flatten().float(),
        )
        return KernelCodebook(*arrays)

    def _rounded_kernels(self) -> Tensor:
        """Return the kernels (C, U, D) that the network computes with."""
        kernels = self.kernels.flatten(2)
        if self.values == "real":
            return kernels
        clipped = kernels.clamp(-1, 1)
        rounded = torch.where(clipped < 0, -1.0, 1.0).to(clipped) if self.values == "sign" else clipped.round()
        return rounded.detach() + (clipped - clipped.detach())

    @torch.no_grad()
    def _assign(self, normalized: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest kernel of each pattern, and its sign: both (C, O * J / C). Autocast would find others."""
        codebooks, count, size = kernels.shape
        patterns = normalized.reshape(len(normalized), codebooks, -1, size).transpose(0, 1).reshape(codebooks, -1, size)
        half_norms = 0.5 * kernels.square().sum(2)[:, None]
        index, negative = [], []
        for block in patterns.split(max(1, BLOCK // (codebooks * count)), dim=1):
            with torch.autocast(block.device.type, enabled=False):
                products = block @ kernels.mT
            index.append((products.abs() - half_norms).argmax(2))
            negative.append(products.gather(2, index[-1][..., None])[..., 0] < 0)
        return torch.cat(index, 1), 1 - 2 * torch.cat(negative, 1).to(normalized.dtype)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.share, list(BEGIN).index(self.values)], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        share, values = state.tolist()
        if list(BEGIN)[int(values)] != self.values:
            raise ValueError(f"state: expected kernels of {self.values!r}, got {list(BEGIN)[int(values)]!r}")
        self.share = share

    def extra_repr(self) -> str:
        codebooks, count, channels, *filter_size = self.kernels.shape
        return f"kernels={count}, values={self.values!r}, codebooks={codebooks}, pattern={(channels, *filter_size)}"


def use_codebooks(
    model: nn.Module, kernels: int = 32, values: str = "sign", *, skip: Collection[str] = (), **options: Any
) -> list[str]:
    """Give the convolutions of a network a `Codebook` each, in place, to be trained further.

    These are the ungrouped ones (`torch.nn.Conv2d`) with filters larger than 1x1, but for those whose weight has a
    parametrization already: a second call changes nothing. A first layer that reads three channels gains no time and
    costs accuracy: name it in `skip`.

    Parameters
    ----------
    model : torch.nn.Module
        Trained, best in float: its weights are where the codebooks begin.
    kernels, values, **options
        As for `pycodesign.quantize.kernel_codebook`, for each layer.
    skip : collection of str
        Exact names of modules to leave as they are.

    Returns
    -------
    list of str
        Names of all layers that now have a codebook.

    Raises
    ------
    TypeError, ValueError
        If a name in `skip` is no convolution's; if a hook computes a weight (`torch.nn.utils.weight_norm`), which then
        is no parameter; as `kernel_codebook` does, with the layer's name. The model is then as it was.

    Examples
    --------
    >>> import torch, pycodesign
    >>> conv = torch.nn.Conv2d
    >>> model = torch.nn.Sequential(conv(3, 64, 3), torch.nn.ReLU(), conv(64, 64, 3), conv(64, 10, 1))
    >>> pycodesign.nn.use_codebooks(model, kernels=16, skip=["0"])
    ['2']
    """
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    if isinstance(skip, str):
        raise TypeError(f"skip: expected a collection of module names, got {skip!r}")
    skip = set(skip)
    for name in sorted(skip):
        if name not in convs:
            raise ValueError(f"skip: expected names of convolutions, got {name!r}")
    made = {}
    for name, conv in convs.items():
        large = max(conv.kernel_size) > 1 and conv.groups == 1
        if large and name not in skip and not parametrize.is_parametrized(conv, "weight"):
            if "weight" not in conv._parameters:
                raise ValueError(f"{name}: expected a weight that is a parameter, got one that a hook computes")
            try:
                made[name] = Codebook(conv.weight, kernels, values, **options)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from None
    for name, codebook in made.items():
        parametrize.register_parametrization(convs[name], "weight", codebook).train(convs[name].training)
    return [name for name, conv in convs.items() if _parametrization(conv)]


def anneal_codebooks(model: nn.Module, share: float) -> None:
    """Set how much of their weights the codebooks of a network make; the float weights make the rest.

    So that a trained network is not changed at once, call this before each step of training with a share that rises
    from 0 to 1, and train on from there.

    Parameters
    ----------
    model : torch.nn.Module
    share : float
        From 0, float weights alone, to 1, codebooks alone.

    Raises
    ------
    ValueError
        For another share.

    Examples
    --------
    >>> import torch, pycodesign
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.Conv2d(64, 64, 3))
    >>> pycodesign.nn.use_codebooks(model, skip=["0"])
    ['1']
    >>> for step in range(101):
    ...     pycodesign.nn.anneal_codebooks(model, min(1.0, step / 50))    # then a step of the optimizer
    """
    if not isinstance(share, SupportsFloat) or not 0 <= float(share) <= 1:
        raise ValueError(f"share: expected a number from 0 to 1, got {share!r}")
    for module in model.modules():
        if isinstance(module, Codebook):
            module.share = float(share)


def find_codebook(module: nn.Module) -> KernelCodebook | None:
    """Return the weights of a module whose weight a `Codebook` makes; None for any other module."""
    made = _parametrization(module)
    return made[0].export(made.original) if made else None


def _parametrization(module: nn.Module) -> Any:
    """Return the parametrization of a weight that is a `Codebook` and nothing else, or None."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    made: Any = module.parametrizations["weight"]  # type: ignore[index]
    return made if len(made) == 1 and isinstance(made[0], Codebook) else None
