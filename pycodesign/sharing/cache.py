"""Features of the frozen backbone, computed once: training a task then runs no backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pycodesign._deltas import to_indices
from pycodesign.sharing.components import Features, Frozen

__all__ = ["FeatureCache"]


class FeatureCache:
    """What one task reads of the backbone for many texts, made by `MultiTask.cache`.

    ``cache[[2, 0]]`` is a batch of two texts, ``cache[:8]`` one of the first eight.

    Texts are kept without padding; of token labels, whose places must not shift, without what follows the last token.

    Attributes
    ----------
    lengths : list of int
        Tokens of each text.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.lengths: list[int] = []
        self._dtype = dtype
        self._masks: list[Tensor] = []
        self._slots: list[Tensor] = []
        self._layers: list[dict[int, Frozen]] = []

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all features."""
        tensors = [*self._slots, *(t for layers in self._layers for own in layers.values() for t in own)]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def extend(self, features: Features) -> None:
        """Append a batch."""
        whole = features.slots.shape[2] == features.mask.shape[1]
        for row, length in enumerate(features.mask.sum(1).tolist()):
            tokens = features.mask[row].nonzero()[:, 0]
            if whole:
                tokens = torch.arange(int(tokens[-1]) + 1, device=tokens.device)
            self.lengths.append(int(length))
            self._masks.append(features.mask[row, tokens])
            self._slots.append(self._keep(features.slots[:, row], tokens, features.mask.shape[1]))
            own = {n: self._keep_layer(frozen, row, tokens) for n, frozen in features.layers.items()}
            self._layers.append(own)

    def __getitem__(self, indices: Sequence[int] | slice) -> Features:
        count = len(self)
        chosen = range(count)[indices] if isinstance(indices, slice) else to_indices("indices", indices, count)
        if not chosen:
            raise ValueError("indices: expected at least one, got none")
        mask = nn.utils.rnn.pad_sequence([self._masks[index] for index in chosen], batch_first=True)
        slots = _stack([self._slots[index] for index in chosen]).transpose(0, 1)
        layers = {}
        for number in self._layers[chosen[0]]:
            columns = zip(*(self._layers[index][number] for index in chosen), strict=True)
            layers[number] = Frozen(*(None if part[0] is None else _stack(list(part)) for part in columns))
        return Features(mask, slots, layers)

    def _keep_layer(self, frozen: Frozen, row: int, tokens: Tensor) -> Frozen:
        width = 0 if frozen.x is None else frozen.x.shape[1]
        width = width or (0 if frozen.a is None else frozen.a.shape[1])
        return Frozen(*(None if part is None else self._keep(part[row], tokens, width) for part in frozen))

    def _keep(self, part: Tensor, tokens: Tensor, width: int) -> Tensor:
        """Copy a text's part (..., T, D) without padding; those of pooled positions whole."""
        part = part[..., tokens, :] if part.shape[-2] == width and width > 1 else part
        return part.to(self._dtype or part.dtype, copy=True)


def _stack(parts: list[Tensor]) -> Tensor:
    """Stack (..., T, D) of different T, with zeros behind, as float32 where they are kept in less."""
    longest = max(part.shape[-2] for part in parts)
    first = parts[0]
    dtype = torch.float32 if first.dtype in (torch.bfloat16, torch.float16) else first.dtype
    out = torch.zeros((len(parts), *first.shape[:-2], longest, first.shape[-1]), dtype=dtype, device=first.device)
    for row, part in enumerate(parts):
        out[row, ..., : part.shape[-2], :] = part
    return out
