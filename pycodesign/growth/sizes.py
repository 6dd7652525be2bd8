"""Sizes of a Hugging Face model, read from its config, and the shapes that follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pycodesign.growth.indices import Heads, Inexact
from pycodesign.growth.spec import Spec

__all__ = ["SAME", "check_configs", "compute_shapes", "is_tied", "read_heads", "read_sizes"]

OUTPUT_HEADS = ("LMHead", "ForCausalLM", "ForMaskedLM", "ForPreTraining", "DoubleHeads")  # in names of classes with one
NO_OUTPUT_HEAD = ("Model", "Classification", "QuestionAnswering", "MultipleChoice", "Prediction")
UNSCALED, BY_LAYER = "scale_attn_weights", "scale_attn_by_inverse_layer_idx"  # GPT-2's: false, true
SAME = (  # what must agree where a spec does not say which keys are sizes
    *("hidden_act", "activation_function", "rope_parameters", "rope_theta", "position_embedding_type"),
    *(UNSCALED, BY_LAYER),
)
FREE = (  # what may differ: what only loading, generation and training read
    *("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "tokenizer_class"),
    *("_attn_implementation_autoset", "_attn_implementation", "use_cache", "problem_type", "task_specific_params"),
    *("bos_token_id", "eos_token_id", "sep_token_id", "initializer_range", "gradient_checkpointing"),
)
LABELS = ("id2label", "label2id")  # only their number matters
DEFAULTS = {  # where a config does not say
    UNSCALED: True,
    BY_LAYER: False,
    "position_embedding_type": "absolute",
    "qkv_bias": True,
    "pooler_act": "tanh",
    "pretraining_tp": 1,
    "is_decoder": False,
    "add_cross_attention": False,
    "attention_bias": False,
    "mlp_bias": False,
    "chunk_size_feed_forward": 0,
    "return_dict": True,
    "encoder_stride": 16,
}
FOURFOLD = "n_inner"  # may be null: four times the width


def read_sizes(spec: Spec, config: Mapping[str, Any], name: str = "config") -> dict[str, int]:
    """Read the sizes that a config holds.

    Parameters
    ----------
    spec : Spec
        Its `config` names the keys.
    config : mapping
        As in ``config.json``.
    name : str
        Of the argument, for messages.

    Returns
    -------
    dict from str to int
        By space, and ``"layers"``, ``"heads"``, ``"kv_heads"``, ``"head_dim"``.

    Raises
    ------
    ValueError
        If a size is missing or no such number, or the spec names no keys.

    Examples
    --------
    >>> from pycodesign.growth import GPT2
    >>> read_sizes(GPT2, {"n_embd": 64, "n_head": 4, "n_layer": 2})["hidden"]
    256
    """
    if not spec.config:
        raise ValueError(f"spec: expected one whose config names the keys of sizes, got {spec.name!r}")
    sizes = {}
    for size, key in spec.config.items():
        value = config.get(key)
        if size != "eps" and value is not None:
            least = 0 if size == "layers" else 1
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least} for {key!r}, got {value!r}")
            sizes[size] = value
    for size in ("stream", "heads", "layers"):
        if size in spec.config and size not in sizes:
            raise ValueError(f"{name}: expected {spec.config[size]!r}, got none")
    if "hidden" not in sizes and spec.config.get("hidden", FOURFOLD) != FOURFOLD:
        raise ValueError(f"{name}: expected {spec.config['hidden']!r}, got none")
    heads = sizes.setdefault("heads", 1)
    sizes.setdefault("kv_heads", heads)
    sizes.setdefault("layers", 0)
    if "stream" in sizes:
        sizes.setdefault("hidden", 4 * sizes["stream"])
        sizes.setdefault("pooled", sizes["stream"])
        if "head_dim" not in sizes and sizes["stream"] % heads:
            raise ValueError(f"{name}: expected a width that {heads} heads divide, got {sizes['stream']}")
        sizes.setdefault("head_dim", sizes["stream"] // heads)
    return sizes


def check_configs(
    name: str, spec: Spec, old: Mapping[str, Any], new: Mapping[str, Any], free: Sequence[str] = FREE
) -> None:
    """Refuse what changes the function though no parameter shows it.

    Parameters
    ----------
    name : str
        Of the argument with the new one, for the message.
    spec : Spec
        Its `config` names the keys of sizes; all others must agree, but for `free` ones and dropout.
    old, new : mapping
        Configs of the two models.
    free : sequence of str
        Keys that may differ.

    Raises
    ------
    ValueError
        If a key does not agree, or the change cannot be exact (`Inexact`).
    """
    found = _find_difference(spec, old, new, free)
    if found and old.get("model_type") == new.get("model_type"):
        found = _find_difference(spec, _fill(old), _fill(new), free)
    if found:
        key, expected, got = found
        raise ValueError(f"{name}: expected {key} {expected!r} as the source's, got {got!r}")
    if not spec.config:
        return
    before, after = read_sizes(spec, old, name.replace("target", "source")), read_sizes(spec, new, name)
    if old.get(BY_LAYER) and before["layers"] != after["layers"]:
        raise Inexact(f"{name}: {BY_LAYER} scales each layer by its number; exact would be {before['layers']} layers")
    if old.get(UNSCALED) is False and before["head_dim"] != after["head_dim"]:
        raise Inexact(f"{name}: without {UNSCALED} exact would be heads of {before['head_dim']} dimensions")


def _find_difference(
    spec: Spec, old: Mapping[str, Any], new: Mapping[str, Any], free: Sequence[str]
) -> tuple[str, Any, Any] | None:
    """Return the first key that does not agree, and its two values."""
    defaults = {**DEFAULTS, "tie_word_embeddings": spec.tied_by_default}
    keys = sorted((old.keys() | new.keys()) - {*free, *spec.config.values()}) if spec.config else SAME
    for key in keys:
        expected, got = (config.get(key, defaults.get(key)) for config in (old, new))
        if key in LABELS:
            expected, got = (2 if labels is None else len(labels) for labels in (expected, got))
        if "drop" not in key and (None if expected is False else expected) != (None if got is False else got):
            return key, expected, got
    return None


def _fill(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fill in what a config leaves out, and translate old keys, as transformers does where it knows the model."""
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        return config
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return config
    try:
        filled: Mapping[str, Any] = CONFIG_MAPPING[kind].from_dict(dict(config)).to_dict()
    except Exception:  # of many kinds, for values that the class refuses
        return config
    return filled


def read_heads(sizes: Mapping[str, int]) -> Heads:
    return Heads(sizes["heads"], sizes["kv_heads"])


def is_tied(spec: Spec, config: Mapping[str, Any], names: Iterable[str] = ()) -> bool:
    """Whether the output layer shares the embedding's weight.

    Parameters
    ----------
    spec : Spec
    config : mapping
        As in ``config.json``.
    names : iterable of str
        Of the parameters in the files: a tied layer need not be among them.

    Raises
    ------
    ValueError
        If neither the files nor the config's ``architectures`` show whether there is an output layer.
    """
    if not spec.tied or not config.get("tie_word_embeddings", spec.tied_by_default):
        return False
    if any(spec.find(name)[0] in spec.tied for name in names):
        return True
    classes = config.get("architectures") or []
    if any(part in name for name in classes for part in OUTPUT_HEADS):
        return True
    if not classes or not all(name.endswith(NO_OUTPUT_HEAD) for name in classes):
        ways = "a class of transformers in architectures, the output layer in the files, or tie_word_embeddings false"
        raise ValueError(f"source_config: expected {ways}, got {config.get('architectures')!r}")
    return False


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
        If a parameter has no rule, or its shape contradicts the config, or the blocks cannot be repeated (`Inexact`).
    """
    if not spec.blocks and source["layers"] != target["layers"]:
        text = f"{spec.config['layers']}: {source['layers']} -> {target['layers']}, but no block of {spec.name}"
        raise Inexact(f"{text} can be an identity; exact would be {source['layers']}")
    if spec.blocks and source["layers"] == 0 != target["layers"]:
        text = f"{spec.config['layers']}: 0 -> {target['layers']} blocks, none of which can be copied"
        raise Inexact(f"{text}; exact would be 0")
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
    total = 0
    for part in space.split("+"):
        size = "head_dim" if part in heads else part
        if size not in sizes:
            raise ValueError(f"spec: expected a config key for the size of {size!r}, got none")
        total += sizes[size] * (sizes[heads[part]] if part in heads else 1)
    return total


def _repeat_block(name: str, spec: Spec, old: int, new: int) -> list[str]:
    """Return the name, and from the last block of the source, the names of all blocks behind it."""
    split = spec.split_block(name)
    if split is None or split[1] != old - 1:
        return [name]
    return [f"{split[0]}{number}{split[2]}" for number in range(old - 1, max(old, new))]
