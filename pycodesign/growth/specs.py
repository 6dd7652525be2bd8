"""Specs of known architectures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pycodesign.growth.spec import (
    Layer,
    Spec,
    batch_norm,
    convolution,
    embedding,
    keep,
    layer_norm,
    layer_scale,
    linear,
    parameter,
    rms_norm,
)

__all__ = ["BERT", "GPT2", "LLAMA", "SPECS", "TIMM_RESNET", "TIMM_VIT", "VIT", "find_spec", "find_timm_spec"]

GPT2 = Spec(
    "gpt2",
    {
        "wte": embedding("stream"),
        "wpe": embedding("stream"),
        "h.*.ln_1": layer_norm("stream"),
        "h.*.attn.c_attn": linear("stream", "q+k+v", transposed=True),
        "h.*.attn.c_proj": linear("o", "stream", transposed=True),
        "h.*.attn": keep("bias", "masked_bias"),  # masks in old checkpoints
        "h.*.ln_2": layer_norm("stream"),
        "h.*.mlp.c_fc": linear("stream", "hidden", transposed=True),
        "h.*.mlp.c_proj": linear("hidden", "stream", transposed=True),
        "ln_f": layer_norm("stream"),
        "lm_head": linear("stream", None),
        "score": linear("stream", None),
        "classifier": linear("stream", None),
        "qa_outputs": linear("stream", None),
    },
    spaces={"stream": "mean"},
    blocks={"h.*": 0},
    silence=("h.*.attn.c_proj", "h.*.mlp.c_proj"),
    prefixes=("transformer",),
    tied={"lm_head": "ln_f"},
    config={
        "stream": "n_embd",
        "hidden": "n_inner",
        "heads": "n_head",
        "layers": "n_layer",
        "eps": "layer_norm_epsilon",
    },
)

LLAMA = Spec(
    "llama",
    {
        "embed_tokens": embedding("stream"),
        "layers.*.self_attn.q_proj": linear("stream", "q"),
        "layers.*.self_attn.k_proj": linear("stream", "k"),
        "layers.*.self_attn.v_proj": linear("stream", "v"),
        "layers.*.self_attn.o_proj": linear("o", "stream"),
        "layers.*.self_attn.rotary_emb": keep("inv_freq"),  # in old checkpoints
        "layers.*.mlp.gate_proj": linear("stream", "hidden"),
        "layers.*.mlp.up_proj": linear("stream", "hidden"),
        "layers.*.mlp.down_proj": linear("hidden", "stream"),
        "layers.*.input_layernorm": rms_norm("stream"),
        "layers.*.post_attention_layernorm": rms_norm("stream"),
        "norm": rms_norm("stream"),
        "lm_head": linear("stream", None),
        "score": linear("stream", None),
        "qa_outputs": linear("stream", None),
    },
    spaces={"stream": "zero"},
    blocks={"layers.*": 0},
    silence=("layers.*.self_attn.o_proj", "layers.*.mlp.down_proj"),
    prefixes=("model", "transformer"),
    rotary=True,
    tied={"lm_head": "norm"},
    tied_by_default=False,
    config={
        "stream": "hidden_size",
        "hidden": "intermediate_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "layers": "num_hidden_layers",
        "eps": "rms_norm_eps",
    },
)

TRANSFORMER_CONFIG = {
    "stream": "hidden_size",
    "pooled": "hidden_size",
    "hidden": "intermediate_size",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
    "eps": "layer_norm_eps",
}

VIT_ALIASES = {  # names of transformers 5: those of transformers 4 and of every checkpoint
    f"layers.*.{one}": f"encoder.layer.*.{other}"
    for one, other in {
        "layernorm_before": "layernorm_before",
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
        "layernorm_after": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }.items()
}
VIT_BLOCK = {
    "layers.*.layernorm_before": layer_norm("stream"),
    "layers.*.attention.q_proj": linear("stream", "q"),
    "layers.*.attention.k_proj": linear("stream", "k"),
    "layers.*.attention.v_proj": linear("stream", "v"),
    "layers.*.attention.o_proj": linear("o", "stream"),
    "layers.*.layernorm_after": layer_norm("stream"),
    "layers.*.mlp.fc1": linear("stream", "hidden"),
    "layers.*.mlp.fc2": linear("hidden", "stream"),
}

VIT = Spec(
    "vit",
    {
        "embeddings.cls_token": parameter(None, None, "stream"),
        "embeddings.mask_token": parameter(None, None, "stream"),
        "embeddings.distillation_token": parameter(None, None, "stream"),
        "embeddings.position_embeddings": parameter(None, None, "stream"),
        "embeddings.patch_embeddings.projection": convolution(None, "stream"),
        **VIT_BLOCK,
        **{VIT_ALIASES[name]: layer for name, layer in VIT_BLOCK.items()},
        "layernorm": layer_norm("stream"),
        "pooler.dense": linear("stream", "pooled"),
        "classifier": linear("stream", None),
        "cls_classifier": linear("stream", None),
        "distillation_classifier": linear("stream", None),
    },
    spaces={"stream": "mean"},
    blocks={"layers.*": 0, "encoder.layer.*": 0},
    silence=(
        "layers.*.attention.o_proj",
        "layers.*.mlp.fc2",
        "encoder.layer.*.attention.output.dense",
        "encoder.layer.*.output.dense",
    ),
    prefixes=("vit", "deit"),
    config={**TRANSFORMER_CONFIG, "pooled": "pooler_output_size"},
    aliases=VIT_ALIASES,
)

# A block of BERT normalizes its sum: it is never an identity, and a mean in the stream would vary.
BERT = Spec(
    "bert",
    {
        "embeddings.word_embeddings": embedding("stream"),
        "embeddings.position_embeddings": embedding("stream"),
        "embeddings.token_type_embeddings": embedding("stream"),
        "embeddings": keep("position_ids"),
        "embeddings.LayerNorm": layer_norm("stream"),
        "encoder.layer.*.attention.self.query": linear("stream", "q"),
        "encoder.layer.*.attention.self.key": linear("stream", "k"),
        "encoder.layer.*.attention.self.value": linear("stream", "v"),
        "encoder.layer.*.attention.output.dense": linear("o", "stream"),
        "encoder.layer.*.attention.output.LayerNorm": layer_norm("stream"),
        "encoder.layer.*.intermediate.dense": linear("stream", "hidden"),
        "encoder.layer.*.output.dense": linear("hidden", "stream"),
        "encoder.layer.*.output.LayerNorm": layer_norm("stream"),
        "pooler.dense": linear("stream", "pooled"),
        "cls.predictions.transform.dense": linear("stream", "stream"),
        "cls.predictions.transform.LayerNorm": layer_norm("stream"),
        "cls.predictions.decoder": linear("stream", None),
        "cls.predictions": keep("bias"),
        "cls.seq_relationship": linear("pooled", None),
        "classifier": linear("pooled", None),
        "qa_outputs": linear("stream", None),
    },
    spaces={"stream": "repeat", "pooled": "repeat"},
    prefixes=("bert",),
    tied={"cls.predictions.decoder": "cls.predictions.transform.LayerNorm"},
    config=TRANSFORMER_CONFIG,
)

TIMM_VIT = Spec(
    "timm_vit",
    {
        "cls_token": parameter(None, None, "stream"),
        "dist_token": parameter(None, None, "stream"),
        "reg_token": parameter(None, None, "stream"),
        "pos_embed": parameter(None, None, "stream"),
        "patch_embed.proj": convolution(None, "stream"),
        "norm_pre": layer_norm("stream"),
        "blocks.*.norm1": layer_norm("stream"),
        "blocks.*.attn.qkv": linear("stream", "q+k+v"),
        "blocks.*.attn.q_norm": keep(),
        "blocks.*.attn.k_norm": keep(),
        "blocks.*.attn.proj": linear("o", "stream", factor="blocks.*.ls1.gamma"),
        "blocks.*.ls1": layer_scale("stream"),
        "blocks.*.norm2": layer_norm("stream"),
        "blocks.*.mlp.fc1": linear("stream", "hidden"),
        "blocks.*.mlp.fc2": linear("hidden", "stream", factor="blocks.*.ls2.gamma"),
        "blocks.*.ls2": layer_scale("stream"),
        "norm": layer_norm("stream"),
        "fc_norm": layer_norm("stream"),
        "head": linear("stream", None),
        "head_dist": linear("stream", None),
    },
    spaces={"stream": "mean"},
    blocks={"blocks.*": 0},
    silence=("blocks.*.attn.proj", "blocks.*.mlp.fc2"),
    heads="blocks.0.attn.num_heads",
)


def _make_resnet(last: int) -> Spec:
    """Blocks of `last` convolutions. Copies depend on sizes alone, so that one space serves all stages."""
    layers: dict[str, Layer] = {
        "conv1": convolution(None, "channels"),
        "bn1": batch_norm("channels"),
        "fc": linear("channels", None),
    }
    for number, reads in enumerate((None, "channels", "channels")):  # a stem of three convolutions
        layers[f"conv1.{3 * number}"] = convolution(reads, "channels")
        layers[f"conv1.{3 * number + 1}"] = batch_norm("channels")
    shortcut = Layer({**batch_norm("channels").roles, **convolution("channels", "channels").roles})
    for stage in ("layer1.*", "layer2.*", "layer3.*", "layer4.*"):
        for number in range(1, last + 1):
            layers[f"{stage}.conv{number}"] = convolution("channels", "channels")
            layers[f"{stage}.bn{number}"] = batch_norm("channels")
        layers[f"{stage}.se.fc1"] = layers[f"{stage}.se.fc2"] = convolution("channels", "channels")
        layers[f"{stage}.downsample.*"] = shortcut  # a convolution and its BatchNorm, in some variants after a pooling
    stages = {f"layer{stage}.*": 1 for stage in range(1, 5)}
    return Spec("timm_resnet", layers, blocks=stages, silence=[f"{stage}.bn{last}" for stage in stages])


TIMM_RESNET = _make_resnet(2)
TIMM_RESNET_BOTTLENECK = _make_resnet(3)

SPECS = {"gpt2": GPT2, "llama": LLAMA, "vit": VIT, "deit": VIT, "bert": BERT}  # by a Hugging Face config's model_type


def find_spec(config: Mapping[str, Any]) -> Spec:
    """Return the spec of a Hugging Face model by its config.

    Raises
    ------
    ValueError
        If there is none for its ``model_type``.

    Examples
    --------
    >>> find_spec({"model_type": "gpt2"}).name
    'gpt2'
    """
    kind = config.get("model_type")
    if kind not in SPECS:
        raise ValueError(f"spec: expected a model_type of {', '.join(SPECS)}, or spec=, got {kind!r}")
    return SPECS[kind]


# Classes of timm's and torch's modules whose roles are known. Others with parameters of the same names, such as blocks
# that normalize behind their layers, would not keep the function.
_TIMM_MODULES = {
    *("Linear", "Conv2d", "Identity", "Dropout", "DropPath", "Sequential", "ModuleList"),
    *("VisionTransformer", "VisionTransformerDistilled", "PatchEmbed", "PatchDropout", "Block", "LayerNorm"),
    *("Attention", "Mlp", "LayerScale"),
    *("ResNet", "BasicBlock", "Bottleneck", "BatchNorm2d", "SEModule", "DropBlock2d", "BlurPool2d", "MaxPool2d"),
    *("AvgPool2d", "AvgPool2dSame", "SelectAdaptivePool2d", "AdaptiveAvgPool2d", "FastAdaptiveAvgPool", "Flatten"),
    # activations, applied to each number alone
    *("ReLU", "ReLU6", "LeakyReLU", "ELU", "SELU", "CELU", "GELU", "GELUTanh", "QuickGELU", "SiLU", "Swish", "Mish"),
    *("Tanh", "Hardtanh", "Hardswish", "HardSwish", "HardMish", "Sigmoid", "Hardsigmoid", "HardSigmoid", "Softplus"),
}
_IDEMPOTENT = {"ReLU", "ReLU6", "Identity"}  # applied twice they are the same as once


def find_timm_spec(modules: Mapping[str, object]) -> Spec | None:
    """Return the spec of a timm model by its modules, None for another library's.

    Raises
    ------
    ValueError
        If it has a module whose roles are not known.
    """
    kinds = {cls.__name__ for cls in type(modules[""]).__mro__ if cls.__module__.startswith("timm.models.")}
    if not kinds & {"VisionTransformer", "ResNet"}:
        return None
    for name, module in modules.items():
        kind = type(module)
        if kind.__name__ not in _TIMM_MODULES or kind.__module__.partition(".")[0] not in ("timm", "torch"):
            text = f"modules that 'auto' knows, or a Spec, got {kind.__name__} as {name or 'the model'}"
            raise ValueError(f"spec: expected {text}")
    return _find_vit_spec(modules) if "VisionTransformer" in kinds else _find_resnet_spec(modules)


def _find_vit_spec(modules: Mapping[str, Any]) -> Spec:
    """Means can fill the stream if all that reads it is LayerNorms with a gamma, or behind one, or linear."""
    norms = {name: m for name, m in modules.items() if type(m).__name__ == "LayerNorm" and not name.endswith("k_norm")}
    scaled = all(norm.weight is not None for name, norm in norms.items() if not name.endswith("q_norm"))
    pooled = "fc_norm" in norms and getattr(modules[""], "global_pool", "") in ("", "token", "avg")
    if scaled and "norm_pre" not in norms and ("norm" in norms or pooled):
        return TIMM_VIT
    return replace(TIMM_VIT, spaces={"stream": "repeat"})


def _find_resnet_spec(modules: Mapping[str, object]) -> Spec:
    """A block that adds nothing is an identity if the activation behind the sum does not change what it has made."""
    last, spec = (3, TIMM_RESNET_BOTTLENECK) if "layer1.0.conv3" in modules else (2, TIMM_RESNET)
    kinds = {type(module).__name__ for name, module in modules.items() if name.endswith(f".act{last}")}
    return spec if kinds <= _IDEMPOTENT else replace(spec, blocks={})
