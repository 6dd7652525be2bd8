"""Sizes of a Hugging Face model, read from its config, and the shapes that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pycodesign.growth.indices import Heads
from pycodesign.growth.spec import Spec

__all__ = ["SAME", "compute_shapes", "is_tied", "read_heads", "read_sizes"]

OUTPUT_HEADS = ("LMHead", "ForCausalLM", "ForMaskedLM", "ForPreTraining")  # in names of classes with an output layer
SAME = ("hidden_act", "activation_function", "rope_parameters", "rope_theta", "position_embedding_type")


def read_sizes(spec: Spec, config: Mapping[str, Any]) -> dict[str, int]:
    """Read the sizes that a config holds.

    Parameters
    ----------
    spec : Spec
        Its `config` names the keys.
    config : mapping
        As in ``config.json``.

    Returns
    -------
    dict from str to int
        By space, and ``"layers"``, ``"heads"``, ``"kv_heads"``, ``"head_dim"``.

    Examples
    --------
    >>> from pycodesign.growth import GPT2
    >>> read_sizes(GPT2, {"n_embd": 64, "n_head": 4, "n_layer": 2})["hidden"]
    256
    """
    sizes = {}
    for size, key in spec.config.items():
        value = config.get(key)
        if size != "eps" and value is not None:
            sizes[size] = int(value)
    for size in ("stream", "heads", "layers"):
        if size in spec.config and size not in sizes:
            raise ValueError(f"config: expected {spec.config[size]!r}, got none")
    sizes.setdefault("hidden", 4 * sizes["stream"])
    sizes.setdefault("kv_heads", sizes["heads"])
    sizes.setdefault("head_dim", sizes["stream"] // sizes["heads"])
    return sizes


def read_heads(sizes: Mapping[str, int]) -> Heads:
    return Heads(sizes["heads"], sizes["kv_heads"])


def is_tied(spec: Spec, config: Mapping[str, Any]) -> bool:
    """Whether the output layer shares the embedding's weight."""
    has_output = any(part in name for name in config.get("architectures") or [] for part in OUTPUT_HEADS)
    return bool(spec.tied) and has_output and bool(config.get("tie_word_embeddings", spec.tied_by_default))


def compute_shapes(
    shapes: Mapping[str, Sequence[int]], spec: Spec, source: Mapping[str, int], target: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Compute the shapes of a larger model from a smaller one's.

    Parameters
    ----------
    shapes : mapping from str to shape
        The smaller model's parameters.
    spec : Spec
    source, target : mapping from str to int
        What `read_sizes` returned for each.

    Returns
    -------
    dict from str to tuple of int

    Raises
    ------
    ValueError
        If a parameter has no rule, or its shape contradicts the config.
    """
    grown = {}
    for name, shape in shapes.items():
        _, roles = spec.find(name)
        new = list(shape)
        for position, role in enumerate(roles[: len(new)]):
            if role.kind != "keep":
                old = _size_of(role.space, source)
                if shape[position] != old:
                    raise ValueError(f"{name}: expected {old} in axis {position} by the config, got {shape[position]}")
                new[position] = _size_of(role.space, target)
        for repeated in _repeat_block(name, spec, source["layers"], target["layers"]):
            grown[repeated] = tuple(new)
    return grown


def _size_of(space: str, sizes: Mapping[str, int]) -> int:
    heads = {"q": "heads", "o": "heads", "k": "kv_heads", "v": "kv_heads"}
    return sum(sizes[heads[s]] * sizes["head_dim"] if s in heads else sizes[s] for s in space.split("+"))


def _repeat_block(name: str, spec: Spec, old: int, new: int) -> list[str]:
    """Return the name, and from the last block of the source, the names of all blocks behind it."""
    split = spec.split_block(name)
    if split is None or split[1] != old - 1:
        return [name]
    return [f"{split[0]}{number}{split[2]}" for number in range(old - 1, max(old, new))]
