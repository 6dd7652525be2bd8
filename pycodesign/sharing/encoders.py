"""Frozen encoders, seen as what they all are: layers of attention and an MLP, with norms and residual sums."""

from __future__ import annotations

import copy
import hashlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

try:
    import torch
except ImportError as error:
    raise ImportError("pycodesign.sharing needs torch: `pip install 'pycodesign[torch]'`") from error

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PROJECTIONS", "Activations", "Encoder", "Layer", "Linear", "attend", "read_encoder"]

PROJECTIONS = ("query", "key", "value", "output", "up", "down")
TOLERANCE = 1e-3  # of the probe's outputs, relative to the largest
PROBED = 24  # tokens
OFFSET = ("camembert", "data2vec-text", "roberta", "xlm-roberta")  # positions start behind that of padding
TEXT = (*OFFSET, "bert", "bert-generation", "electra", "ernie", "splinter")
IMAGES = ("deit", "ijepa", "vit", "vit_msn")

Inputs: TypeAlias = Mapping[str, Tensor]

_probing = threading.Lock()  # which changes modes, and a switch of the whole process, for a while


@dataclass(frozen=True)
class Linear:
    """A projection: weight (O, I) and bias (O,) of a module, looked up at each use, since modules may get others.

    Attributes
    ----------
    module : torch.nn.Module
    weight_name, bias_name : str
        Of the module's parameters.
    part : int or None
        Which third of them it is, of queries, keys and values in one.
    """

    module: nn.Module
    weight_name: str = "weight"
    bias_name: str = "bias"
    part: int | None = None

    @property
    def weight(self) -> Tensor:
        """The backbone's weight (O, I), without gradient."""
        return self._take(getattr(self.module, self.weight_name))

    @property
    def bias(self) -> Tensor | None:
        """The backbone's bias (O,), without gradient."""
        bias: Tensor | None = getattr(self.module, self.bias_name)
        return None if bias is None else self._take(bias)

    def _take(self, parameter: Tensor) -> Tensor:
        own = parameter.detach()
        return own if self.part is None else own.chunk(3)[self.part]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Layer:
    """One layer; the norms come before attention and MLP (`pre_norm`), or after the residual sums.

    Attributes
    ----------
    projections : dict of Linear
        By the names in `PROJECTIONS`.
    """

    projections: dict[str, Linear]
    attention_norm: nn.Module
    mlp_norm: nn.Module
    heads: int
    activation: Callable[[Tensor], Tensor]
    pre_norm: bool


class Activations(NamedTuple):
    """What a frozen layer computes, for B texts of T tokens.

    Attributes
    ----------
    x, a : Tensor (B, T, D)
        What attention reads, and what the MLP reads.
    q, k, v : Tensor (B, T, D)
        Of `x`.
    context : Tensor (B, T, D)
        What attention's output projection reads.
    z, g : Tensor (B, T, F)
        The MLP's first projection, and what its second reads: the activation function of it.
    h : Tensor (B, T, D)
        The layer's output.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    context: Tensor
    a: Tensor
    z: Tensor
    g: Tensor
    h: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Return contexts (B, P, D) of queries (B, P, D) over keys and values (B, T, D); mask (B, T): where a token is."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    visible = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Embedding:
    """A module's method, called with the inputs by name; of a copy of the two, the copied module's."""

    module: nn.Module
    method: str

    def __call__(self, inputs: Inputs) -> Tensor:
        embedded: Tensor = getattr(self.module, self.method)(**inputs)
        return embedded


@dataclass(frozen=True)
class Encoder:
    """A backbone's embedding and layers.

    Attributes
    ----------
    embed : callable
        From the backbone's inputs, by name, to (B, T, D).
    norm : callable or None
        The final norm of pre-norm encoders, which every layer's features go through before they are aggregated.
    longest : int or None
        Tokens that the backbone takes.
    """

    layers: list[Layer]
    embed: Callable[[Inputs], Tensor]
    norm: nn.Module | None
    longest: int | None
    modules: dict[str, nn.Module]  # with parameters beside the layers': embeddings, final norm
    owner: nn.Module | None = None  # of `embed`, which may read all of its state
    padding: int | None = None  # id of tokens that take no position

    @property
    def width(self) -> int:
        """Features of a token, D."""
        return self.layers[0].projections["query"].weight.shape[1]

    def count_positions(self, inputs: Inputs) -> int:
        """Return how many positions the longest of the texts takes."""
        ids = inputs.get("input_ids")
        if ids is None or self.padding is None or "position_ids" in inputs:
            return int(inputs["inputs_embeds" if ids is None else "input_ids"].shape[1])
        return int((ids != self.padding).sum(1).max())

    def run(self, inputs: Inputs, mask: Tensor | None = None) -> tuple[Tensor, list[Activations]]:
        """Return the embedded inputs (B, T, D), and all layers' activations."""
        first = h = self.embed(inputs)
        layers = []
        for layer in self.layers:
            layers.append(run_layer(layer, h, mask))
            h = layers[-1].h
        return first, layers

    def count_parameters(self) -> int:
        """Count the parameters of embeddings, layers and final norm."""
        return sum(tensor.numel() for _, tensor in self._list_tensors(buffers=False))

    def list_versions(self) -> list[tuple[int, int]]:
        """Return addresses and versions of layers' weights: others once these are replaced or changed in place."""
        linears = [linear for layer in self.layers for linear in layer.projections.values()]
        tensors = [tensor for linear in linears for tensor in (linear.weight, linear.bias) if tensor is not None]
        return [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]

    def compute_hash(self) -> str:
        """Return a SHA-256 over the values, shapes and order of all weights, and what else fixes the function."""
        digest = hashlib.sha256()
        for layer in self.layers:
            norms = [(type(norm).__name__, _list_options(norm)) for norm in (layer.attention_norm, layer.mlp_norm)]
            digest.update(f"{layer.heads} {layer.pre_norm} {norms};".encode())
            digest.update(_sample(layer.activation, len(layer.projections["up"].weight)))
        for name, module in sorted(self.modules.items()):
            digest.update(f"{name} {_list_settings(module)};".encode())
        if self.norm is not None:
            digest.update(f"{type(self.norm).__name__} {_list_options(self.norm)};".encode())
        if self.owner is not None:
            digest.update(f"{_list_options(self.owner)};".encode())
        for name, tensor in self._list_tensors():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _list_tensors(self, buffers: bool = True) -> list[tuple[str, Tensor]]:
        named = [
            (f"{name}.{key}", tensor)
            for name, module in sorted(self.modules.items())
            for key, tensor in sorted(module.state_dict().items())
        ]
        if self.owner is not None:
            own = dict(self.owner.named_parameters()) | (dict(self.owner.named_buffers()) if buffers else {})
            named += [(key, own[key]) for key in sorted(own) if not key.startswith("encoder.")]
        for number, layer in enumerate(self.layers):
            for name, linear in layer.projections.items():
                named.append((f"{number}.{name}.weight", linear.weight))
                if linear.bias is not None:
                    named.append((f"{number}.{name}.bias", linear.bias))
            modules = {
                "attention_norm": layer.attention_norm,
                "mlp_norm": layer.mlp_norm,
                "activation": layer.activation,
            }
            for name, module in modules.items():
                state = module.state_dict() if isinstance(module, nn.Module) else {}
                named += [(f"{number}.{name}.{key}", state[key]) for key in sorted(state)]
        return named


def run_layer(layer: Layer, h: Tensor, mask: Tensor | None) -> Activations:
    """Run a frozen layer on (B, T, D)."""
    project = layer.projections
    x = layer.attention_norm(h) if layer.pre_norm else h
    q, k, v = (project[name](x) for name in ("query", "key", "value"))
    context = attend(q, k, v, layer.heads, mask)
    h = h + project["output"](context)
    a = layer.mlp_norm(h) if layer.pre_norm else layer.attention_norm(h)
    z = project["up"](a)
    g = layer.activation(z)
    if g.data_ptr() == z.data_ptr():  # the activation function works in place
        z = project["up"](a)
    m = project["down"](g)
    h = h + m if layer.pre_norm else layer.mlp_norm(a + m)
    return Activations(x, q, k, v, context, a, z, g, h)


def _list_settings(module: nn.Module) -> list[tuple[Any, Any]]:
    """Return what norms add to variances, and which ids are padding, which may shift positions."""
    settings = [(getattr(own, "eps", None), getattr(own, "padding_idx", None)) for own in module.modules()]
    return [pair for pair in settings if pair != (None, None)]


def _list_options(module: nn.Module) -> list[tuple[Any, ...]]:
    """Return the plain attributes of a module, and of what there is in it beside an encoder."""
    options: list[tuple[Any, ...]] = []
    for name, own in module.named_modules():
        if name.partition(".")[0] == "encoder" or isinstance(own, nn.modules.dropout._DropoutNd):
            continue
        public = {key: value for key, value in vars(own).items() if not key.startswith("_") and key != "training"}
        told = [(key, public[key]) for key in sorted(public) if _is_plain(public[key])]
        options.append((name, name and type(own).__name__, told))
    return options


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(part) for part in value)
    return isinstance(value, bool | int | float | str)


@torch.no_grad()
def _sample(function: Callable[[Tensor], Tensor], width: int) -> bytes:
    """Return values of an activation function, which no name or attribute tells for sure.

    In float64, and rounded, they are the same on every machine.
    """
    place = torch.arange(41, device="cpu")[:, None] + torch.arange(width, device="cpu")
    x = (place % 41 - 20).double()  # each feature has all of -20 to 20
    x = x * x.abs() / 8  # denser at 0
    own = copy.deepcopy(function).eval().cpu().double() if isinstance(function, nn.Module) else function
    try:
        y = own(x[None])
    except (RuntimeError, TypeError) as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise ValueError(f"backbone: expected an activation function of float64, too, got {name}: {error}") from None
    values: bytes = (y.round(decimals=6) + 0.0).numpy().tobytes()  # no -0.0
    return values


def read_encoder(backbone: nn.Module) -> Encoder:
    """Read a backbone as an `Encoder`, whose layers share its weights, and compare the two on a small input.

    Parameters
    ----------
    backbone : torch.nn.Module
        Hugging Face's BERT, RoBERTa or ELECTRA, ViT or DeiT, or one built like them (CamemBERT, XLM-RoBERTa,
        Data2VecText, ERNIE, Splinter, BertGeneration, ViTMSN, I-JEPA), the bare model without a head; a
        `torch.nn.TransformerEncoder`, whose input is (B, T, D); or a module of your own with such an encoder as its
        ``encoder`` and a method ``embed`` that takes the inputs by name and returns (B, T, D). Files of tasks are bound
        to its parameters, its buffers and its attributes that are numbers, strings or tuples of these: nothing else may
        change what it gives.

    Raises
    ------
    TypeError
        For any other module, those that attend within a window on long texts alone among them.
    ValueError
        If the backbone computes something else than its layers, read so, do, or computes weights of others, as
        parametrizations do.
    """
    if isinstance(backbone, nn.TransformerEncoder):
        encoder = _read_torch(backbone, None)
    elif isinstance(getattr(backbone, "encoder", None), nn.TransformerEncoder) and callable(
        getattr(backbone, "embed", None)
    ):
        encoder = _read_torch(backbone.encoder, backbone)  # type: ignore[arg-type]
    else:
        encoder = _read_transformers(backbone)
    for number, layer in enumerate(encoder.layers):
        for name, linear in layer.projections.items():
            weight = getattr(linear.module, linear.weight_name)
            if not isinstance(weight, nn.Parameter):
                wanted = "a parameter as each weight (see torch.nn.utils.parametrize.remove_parametrizations)"
                raise ValueError(f"backbone: expected {wanted}, got one that is computed for {number}.{name}")
    with _probing:
        modes = [(module, module.training) for module in backbone.modules()]
        backbone.eval()
        try:
            _probe(backbone, encoder)
        finally:
            for module, training in modes:
                module.training = training
    return encoder


def _read_torch(stack: nn.TransformerEncoder, owner: nn.Module | None) -> Encoder:
    layers = []
    for layer in stack.layers:
        if not isinstance(layer, nn.TransformerEncoderLayer):
            raise TypeError(f"backbone: expected TransformerEncoderLayer in it, got {type(layer).__name__}")
        attention = layer.self_attn
        if not attention.batch_first or attention.in_proj_weight is None:
            raise ValueError("backbone: expected batch_first=True and keys and values as wide as queries, got others")
        projections = {
            name: Linear(attention, "in_proj_weight", "in_proj_bias", part) for part, name in enumerate(PROJECTIONS[:3])
        }
        for name, module in (("output", attention.out_proj), ("up", layer.linear1), ("down", layer.linear2)):
            projections[name] = _read_linear(module)
        norms = layer.norm1, layer.norm2
        layers.append(Layer(projections, *norms, attention.num_heads, layer.activation, layer.norm_first))
    if not layers:
        raise ValueError("backbone: expected at least one layer, got none")
    if stack.norm is not None and not layers[0].pre_norm:
        raise ValueError("backbone: expected a final norm of pre-norm layers only, got one after post-norm layers")
    modules = {} if stack.norm is None else {"norm": stack.norm}
    if owner is None:
        return Encoder(layers, _take_embedded, stack.norm, None, modules)
    longest = getattr(owner, "max_length", None)
    return Encoder(layers, Embedding(owner, "embed"), stack.norm, longest, modules, owner)


def _take_embedded(inputs: Inputs) -> Tensor:
    if set(inputs) != {"inputs_embeds"}:
        raise ValueError(f"inputs: expected inputs_embeds (B, T, D), got {', '.join(inputs) or 'none'}")
    return inputs["inputs_embeds"]


def _read_transformers(backbone: nn.Module) -> Encoder:
    config: Any = getattr(backbone, "config", None)
    embeddings: Any = getattr(backbone, "embeddings", None)
    stack: Any = getattr(backbone, "encoder", backbone)
    blocks: Any = getattr(stack, "layer", getattr(stack, "layers", None))
    known = getattr(config, "model_type", None) in (*TEXT, *IMAGES)
    if not known or not isinstance(embeddings, nn.Module) or not isinstance(blocks, nn.ModuleList) or not blocks:
        wanted = "a bare BERT, RoBERTa, ELECTRA, ViT or DeiT of transformers, or a torch.nn.TransformerEncoder"
        raise TypeError(f"backbone: expected {wanted}, got {type(backbone).__name__}")
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError("backbone: expected an encoder, got one with is_decoder or add_cross_attention")
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        raise ValueError(f"backbone: expected absolute positions, got {config.position_embedding_type}")
    if getattr(backbone, "embeddings_project", None) is not None:
        raise ValueError("backbone: expected embeddings as wide as the layers, got a projection of them")
    try:
        layers = [_read_block(block, config) for block in blocks]
    except AttributeError as error:
        name = type(backbone).__name__
        raise TypeError(f"backbone: expected layers as those of BERT or ViT, got {name}: {error}") from None
    modules = {"embeddings": embeddings}
    norm = getattr(backbone, "layernorm", None) if layers[0].pre_norm else None
    if norm is not None:
        modules["norm"] = norm
    longest, padding = getattr(config, "max_position_embeddings", None), None
    if longest is not None and config.model_type in OFFSET:
        padding = config.pad_token_id
        longest -= padding + 1
    return Encoder(layers, Embedding(embeddings, "__call__"), norm, longest, modules, padding=padding)


def _read_block(block: Any, config: Any) -> Layer:
    heads, activation = config.num_attention_heads, _find_activation(config.hidden_act)
    if hasattr(block, "layernorm_before"):  # ViT
        if hasattr(block.attention, "q_proj"):
            names = {name: f"attention.{name[0]}_proj" for name in ("query", "key", "value", "output")}
            names |= {"up": "mlp.fc1", "down": "mlp.fc2"}
        else:  # as it was called before transformers 5
            names = {name: f"attention.attention.{name}" for name in ("query", "key", "value")}
            names |= {"output": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}
        norms = block.layernorm_before, block.layernorm_after
        pre_norm = True
    else:
        names = {name: f"attention.self.{name}" for name in ("query", "key", "value")}
        names |= {"output": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}
        norms = block.attention.output.LayerNorm, block.output.LayerNorm
        pre_norm = False
    projections = {name: _read_linear(block.get_submodule(path)) for name, path in names.items()}
    return Layer(projections, *norms, heads, activation, pre_norm)


def _find_activation(activation: Any) -> Callable[[Tensor], Tensor]:
    if not isinstance(activation, str):
        found: Callable[[Tensor], Tensor] = activation
        return found
    from transformers.activations import ACT2FN

    function: Callable[[Tensor], Tensor] = F.gelu if activation == "gelu" else ACT2FN[activation]
    return function


def _read_linear(module: Any) -> Linear:
    if type(module).__module__.partition(".")[0] == "peft":
        raise TypeError(
            "backbone: expected plain weights, got adapters in it; sharing.import_adapter reads their files"
        )
    if not isinstance(module, nn.Linear):
        raise TypeError(f"backbone: expected Linear projections, got {type(module).__name__}")
    return Linear(module)


def _run_stack(stack: nn.TransformerEncoder, x: Tensor, fast: bool) -> Tensor:
    """Run torch's encoder; its fast path does not see activation functions that were replaced."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(before and fast)
    try:
        h: Tensor = stack(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    return h


@torch.no_grad()
def _probe(backbone: nn.Module, encoder: Encoder) -> None:
    """Compare with the backbone's own forward, which may do something that no attribute tells."""
    weight = encoder.layers[0].projections["query"].weight
    generator = torch.Generator().manual_seed(0)
    config: Any = getattr(backbone, "config", None)
    length = min(PROBED, encoder.longest or PROBED)
    mask = torch.ones(2, length, dtype=torch.bool, device=weight.device)
    mask[1, (length + 1) // 2 :] = False
    stack: Any = backbone if encoder.owner is None else backbone.encoder
    if isinstance(stack, nn.TransformerEncoder):  # an owner's inputs are its own
        encoder = replace(encoder, embed=_take_embedded)
        x = torch.randn(2, length, encoder.width, generator=generator).to(weight)
        inputs, expected, mask = (
            {"inputs_embeds": x},
            _run_stack(stack, x, encoder.owner is None),
            torch.ones_like(mask),
        )
    elif config.model_type in TEXT:
        ids = torch.randint(config.vocab_size, (2, length), generator=generator).to(weight.device)
        inputs = {"input_ids": ids}
        expected = backbone(**inputs, attention_mask=mask.long()).last_hidden_state
    else:
        size: Any = config.image_size
        height, width = size if isinstance(size, Sequence) else (size, size)
        pixels = torch.randn(2, config.num_channels, height, width, generator=generator)
        inputs = {"pixel_values": pixels.to(weight)}
        expected = backbone(**inputs).last_hidden_state
        mask = mask.new_ones(expected.shape[:2])
    got = encoder.run(inputs, None if mask.all() else mask)[1][-1].h
    got = (got if encoder.norm is None else encoder.norm(got))[mask]
    expected = expected[mask]
    difference = float((got - expected).abs().max() / expected.abs().max())
    tolerance = max(TOLERANCE, 8 * torch.finfo(weight.dtype).eps)
    if not difference <= tolerance or math.isnan(difference):
        wanted = "attention and an MLP per layer, and nothing else"
        raise ValueError(f"backbone: expected {wanted}, got outputs that differ from those by {difference:.2g}")
