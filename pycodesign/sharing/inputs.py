"""What a backbone is called with: given in one or by name, and checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pycodesign.sharing.encoders import IMAGES, Encoder, Inputs

__all__ = ["check_inputs"]

RANGES = {"input_ids": "vocab_size", "token_type_ids": "type_vocab_size", "position_ids": "max_position_embeddings"}
TENSORS = (*RANGES, "inputs_embeds", "pixel_values")


def check_inputs(
    encoder: Encoder,
    config: Any,
    inputs: Tensor | Inputs | None,
    attention_mask: Tensor | None,
    others: Mapping[str, Tensor | None],
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return inputs by name, and the mask (B, T) of bool; None if there is none, or it hides nothing.

    Parameters
    ----------
    config : object or None
        The backbone's, which says what it takes if it is one of transformers.
    inputs, attention_mask, others
        As for `MultiTask.forward`; `others` are the arguments by name.
    """
    named = _name_inputs(inputs, others)
    own = named.pop("attention_mask", None)
    if own is not None and attention_mask is not None:
        raise ValueError("attention_mask: expected one, got one among the inputs and another beside them")
    attention_mask = attention_mask if own is None else own
    tokens = _check_named(encoder, config, named)
    if attention_mask is None:
        return named, None
    _check_tensor("attention_mask", attention_mask)
    if tokens is None or tuple(attention_mask.shape) != tokens:
        raise ValueError(f"attention_mask: expected {tokens}, got {tuple(attention_mask.shape)}")
    mask = attention_mask != 0
    if mask.ne(attention_mask).any():
        raise ValueError("attention_mask: expected 1 where a token is and 0 elsewhere, got other values")
    if not bool(mask.any(1).all()):
        raise ValueError("attention_mask: expected at least one token in each text, got a text of padding")
    return named, None if bool(mask.all()) else mask


def _check_named(encoder: Encoder, config: Any, named: dict[str, Tensor]) -> tuple[int, int] | None:
    """Check the inputs, and return how many texts of how many tokens they are, where they are texts."""
    if not named:
        raise ValueError("inputs: expected input_ids, pixel_values or inputs_embeds, got none")
    for name in TENSORS:
        _check_tensor(name, named.get(name))
    first = next((value for value in named.values() if isinstance(value, Tensor)), None)
    if first is not None and not first.numel():
        raise ValueError(f"inputs: expected at least one text and one token, got {tuple(first.shape)}")
    if getattr(config, "model_type", None) in IMAGES:
        pixels = named.get("pixel_values")
        if pixels is None or pixels.ndim != 4:
            tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
            got = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
            raise ValueError(f"inputs: expected pixel_values (B, C, H, W), got {got}")
    ids, embedded = named.get("input_ids"), named.get("inputs_embeds")
    tokens = None
    if ids is not None:
        if embedded is not None:
            raise ValueError("inputs: expected input_ids or inputs_embeds, got both")
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"input_ids: expected integers (B, T), got {ids.dtype} {tuple(ids.shape)}")
        tokens = ids.shape[0], ids.shape[1]
    elif embedded is not None:
        if embedded.ndim != 3:
            raise ValueError(f"inputs_embeds: expected (B, T, D), got {tuple(embedded.shape)}")
        tokens = embedded.shape[0], embedded.shape[1]
    for name, size in RANGES.items():
        count, numbers = getattr(config, size, None), named.get(name)
        if numbers is not None and count is not None:
            _check_numbers(name, numbers, count, tokens)
    longest = encoder.longest
    if tokens is not None and longest is not None and tokens[1] > longest:
        count = encoder.count_positions(named)
        if count > longest:
            raise ValueError(f"inputs: expected at most {longest} tokens, got {count}")
    return tokens


def _name_inputs(inputs: Tensor | Inputs | None, others: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Return all inputs that are given, by name."""
    given: Mapping[str, Tensor] = {}
    if isinstance(inputs, Tensor):
        kinds = {2: "input_ids", 3: "inputs_embeds", 4: "pixel_values"}
        if inputs.ndim not in kinds:
            raise ValueError(f"inputs: expected input_ids (B, T), got {tuple(inputs.shape)}")
        given = {kinds[inputs.ndim]: inputs}
    elif isinstance(inputs, Mapping):
        given = inputs
    elif inputs is not None or not others:
        raise TypeError(f"inputs: expected a tensor, or tensors by name, got {type(inputs).__name__}")
    beside = {name: value for name, value in others.items() if value is not None}
    for name in beside:
        if given.get(name) is not None:
            raise ValueError(f"{name}: expected one, got one among the inputs and another beside them")
    return {name: value for name, value in given.items() if value is not None} | beside


def _check_numbers(name: str, numbers: Tensor, count: int, tokens: tuple[int, int] | None) -> None:
    """Check ids and positions, which are looked up in a table of `count` rows."""
    shape = tuple(numbers.shape)
    if numbers.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected int32 or int64, got {numbers.dtype} {shape}")
    if tokens is not None and shape not in (tokens, (1, tokens[1]), tokens[1:]):
        raise ValueError(f"{name}: expected {tokens}, got {shape}")
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= count:
        raise ValueError(f"{name}: expected numbers from 0 to {count - 1}, got {low if low < 0 else high}")


def _check_tensor(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
