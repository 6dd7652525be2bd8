"""What the axes of each parameter mean, so that a larger parameter can be made from a smaller one.

A *space* is a set of features that several parameters share: the residual stream, the hidden units of an MLP, the heads
of an attention. A layer writes some spaces and reads others. A `Spec` says for each layer of an architecture which; the
rest, index maps, scales, what happens to the optimizer's states, follows (`pycodesign.growth.plan`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

__all__ = [
    "Role",
    "Spec",
    "batch_norm",
    "convolution",
    "depthwise",
    "embedding",
    "keep",
    "layer_norm",
    "layer_scale",
    "linear",
    "parameter",
    "rms_norm",
]

ATTENTION = ("q", "k", "v", "o")  # spaces made of heads: queries, keys, values, and what the output projection reads
KINDS = ("cycle", "mean", "zero", "repeat")


class Role(NamedTuple):
    """What one axis of a parameter is.

    `kind` is ``"write"`` (the parameter produces the features), ``"map"`` (it works on each of them alone, in a way of
    its own: a mean of features is none of the result), ``"read"`` (it sums over them), ``"gamma"`` or
    ``"beta"`` (of a norm over them), ``"factor"`` (it multiplies what the preceding layer writes) or ``"keep"`` (not
    features: tokens, positions, classes). `space` names the features; ``"q+k+v"`` are spaces one after the
    other: those that are not made of heads have the sizes that they have alone, in other layers.
    """

    kind: str
    space: str = ""


class Layer(NamedTuple):
    roles: Mapping[str, tuple[Role, ...]]  # of each parameter, by the end of its name; axes not named stay as they are
    factor: str = ""  # pattern of the vector that multiplies what this layer writes


def linear(reads: str | None, writes: str | None, *, transposed: bool = False, factor: str = "") -> Layer:
    """A weight (outputs, inputs) and a bias: `torch.nn.Linear`; a convolution, too.

    Parameters
    ----------
    reads, writes : str or None
        Spaces of the inputs and the outputs; None where they must stay as they are: pixels, classes.
    transposed : bool
        The weight is (inputs, outputs), as in GPT-2's ``Conv1D``.
    factor : str
        Pattern of the LayerScale vector that multiplies the outputs.
    """
    output = Role("write", writes) if writes else Role("keep")
    axes = (output, Role("read", reads) if reads else Role("keep"))
    return Layer({"weight": axes[::-1] if transposed else axes, "bias": (output,)}, factor)


convolution = linear


def depthwise(space: str) -> Layer:
    """A convolution (C, 1, ...) of as many groups as channels."""
    return Layer({"weight": (Role("map", space),), "bias": (Role("map", space),)})


def embedding(writes: str) -> Layer:
    """A table (rows, features)."""
    return Layer({"weight": (Role("keep"), Role("write", writes))})


def parameter(*spaces: str | None) -> Layer:
    """A parameter that is no module's weight, one space (or None) for each axis, added to what others write."""
    return Layer({"": tuple(Role("write", space) if space else Role("keep") for space in spaces)})


def layer_norm(space: str) -> Layer:
    """A LayerNorm; where the space is of kind ``"mean"`` its eps follows the width."""
    gamma, beta = (Role("gamma", space),), (Role("beta", space),)
    return Layer({"weight": gamma, "bias": beta, "gamma": gamma, "beta": beta})  # the last two in old files


def rms_norm(space: str) -> Layer:
    """An RMSNorm, over a space of kind ``"zero"``."""
    return Layer({"weight": (Role("gamma", space),)})


def batch_norm(space: str) -> Layer:
    """A BatchNorm with its running statistics."""
    names = ("weight", "bias", "running_mean", "running_var")
    return Layer({**dict.fromkeys(names, (Role("map", space),)), "num_batches_tracked": ()})


def layer_scale(space: str, name: str = "gamma") -> Layer:
    """A vector that multiplies what the layer before it writes; that layer names it as its `factor`."""
    return Layer({name: (Role("factor", space),)})


def keep(*names: str) -> Layer:
    """Parameters that do not depend on any size that grows."""
    return Layer(dict.fromkeys(names or ("weight", "bias"), ()))


@dataclass(frozen=True)
class Spec:
    """Axis roles of an architecture.

    Attributes
    ----------
    name : str
        For messages.
    layers : mapping from str to Layer
        By the name of the module (or of the parameter, with `parameter`); ``*`` stands for one part of a name, such as
        a layer's number. The first pattern that fits counts.
    spaces : mapping from str to str
        How a space may grow, ``"cycle"`` where nothing is said:

        * ``"cycle"``: to any width, by copies. For features that meet no norm, or BatchNorm.
        * ``"mean"``: to any width, by copies and, where the width is no multiple, by features that hold the mean of
          the others: a LayerNorm makes zeros of them. For the residual stream of a pre-norm transformer.
        * ``"zero"``: the same with zeros, for RMSNorm.
        * ``"repeat"``: to integer multiples only. For a post-norm transformer.

        The spaces q, k, v and o are made of heads and need no entry.
    blocks : mapping from str to int
        Pattern of the blocks that can be repeated, such as ``{"h.*": 0}``, and how many at its beginning cannot be
        copied. Empty: the depth cannot grow. Its ``*`` is the block's number: stages have patterns, and layers, of
        their own, ``"stages.0.*"``, ``"stages.1.*"``.
    silence : sequence of str
        Layers whose parameters are zero in a new block, which makes it an identity.
    prefixes : sequence of str
        Names of modules around the model, as ``"transformer"`` in ``GPT2LMHeadModel``.
    heads : str
        Name of an attribute that holds the number of heads, as ``"blocks.0.attn.num_heads"``. Where the model has a
        Hugging Face config, `config` says it.
    rotary : bool
        Positions are rotations of the heads' dimensions: these cannot grow.
    tied : mapping from str to str
        Output layer that may share the embedding's weight: the norm before it.
    tied_by_default : bool
        It does where a Hugging Face config does not say.
    config : mapping from str to str
        Hugging Face config keys of the sizes: of ``"heads"``, ``"kv_heads"``, ``"head_dim"``, ``"layers"``, ``"eps"``,
        and of spaces by their names.
    aliases : mapping from str to str
        Patterns of layers that have two names, one in modules and one in files: the other's.

    Examples
    --------
    A network that `grow` does not know: blocks ``x + fc2(gelu(fc1(norm(x))))`` between an embedding and a classifier.

    >>> import torch
    >>> from torch import nn
    >>> class Block(nn.Module):
    ...     def __init__(self, width, hidden):
    ...         super().__init__()
    ...         self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)
    ...     def forward(self, x):
    ...         return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))
    >>> class Network(nn.Module):
    ...     def __init__(self, width, hidden, depth):
    ...         super().__init__()
    ...         self.embed, self.norm, self.head = nn.Linear(8, width), nn.LayerNorm(width), nn.Linear(width, 5)
    ...         self.blocks = nn.Sequential(*[Block(width, hidden) for _ in range(depth)])
    ...     def forward(self, x):
    ...         return self.head(self.norm(self.blocks(self.embed(x))))

    Go through the layers and say what each reads and writes. Whatever is added together, or normalized, is one space:
    here the residual stream. The pixels that ``embed`` reads and the classes that ``head`` writes are none: they stay.
    LayerNorms read the stream, so that it is of kind ``"mean"``; the hidden units of an MLP meet no norm and need no
    entry. A block adds nothing once ``fc2`` is zero: that layer is silenced in new blocks.

    >>> from pycodesign import growth
    >>> spec = growth.Spec(
    ...     "network",
    ...     {
    ...         "embed": growth.linear(None, "stream"),
    ...         "blocks.*.norm": growth.layer_norm("stream"),
    ...         "blocks.*.fc1": growth.linear("stream", "hidden"),
    ...         "blocks.*.fc2": growth.linear("hidden", "stream"),
    ...         "norm": growth.layer_norm("stream"),
    ...         "head": growth.linear("stream", None),
    ...     },
    ...     spaces={"stream": "mean"},
    ...     blocks={"blocks.*": 0},
    ...     silence=["blocks.*.fc2"],
    ... )

    Wider by a third, with more hidden units and one more block, it computes the same:

    >>> small, large = Network(12, 24, 2).double(), Network(16, 40, 3).double()
    >>> report = growth.grow(small, large, spec=spec, inputs=torch.randn(4, 8, dtype=torch.double))
    >>> report.difference < 1e-12
    True
    >>> for rule in report.plan.rules[-4:]:
    ...     print(f"{rule.name}: {rule.what}")
    blocks.2.fc1.weight: writes hidden; reads stream
    blocks.2.fc1.bias: writes hidden
    blocks.2.fc2.weight: writes stream, 4 means; reads hidden, each copy its share
    blocks.2.fc2.bias: writes stream, 4 means

    Always pass `inputs` when a spec is new: what is wrong in it shows in the difference.
    """

    name: str
    layers: Mapping[str, Layer]
    spaces: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, int] = field(default_factory=dict)
    silence: tuple[str, ...] | list[str] = ()
    prefixes: tuple[str, ...] | list[str] = ()
    heads: str = ""
    rotary: bool = False
    tied: Mapping[str, str] = field(default_factory=dict)
    tied_by_default: bool = True
    config: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for space, kind in self.spaces.items():
            if kind not in KINDS:
                raise ValueError(f"spaces: expected {', '.join(map(repr, KINDS))} for {space!r}, got {kind!r}")
        for pattern, layer in self.layers.items():
            for role in (role for roles in layer.roles.values() for role in roles):
                if role.kind in ("gamma", "beta", "factor") and self.spaces.get(role.space, "cycle") == "cycle":
                    text = "'mean', 'zero' or 'repeat'"
                    raise ValueError(f"spaces: expected {text} for {role.space!r}, which {pattern} scales, got 'cycle'")
        patterns = set(self.layers)
        pairs = {name: [*names, *names.values()] for name, names in (("tied", self.tied), ("aliases", self.aliases))}
        for name, named in (("silence", self.silence), *pairs.items()):
            for pattern in named:
                if pattern not in patterns:
                    raise ValueError(f"{name}: expected patterns of layers, got {pattern!r}")
        roles = [role for layer in self.layers.values() for each in layer.roles.values() for role in each]
        used = {space for role in roles for space in role.space.split("+")}
        for space in self.spaces:
            if space not in used:
                raise ValueError(f"spaces: expected names that layers use, got {space!r}")
        self._check_blocks()
        self._check_factors()

    def _check_blocks(self) -> None:
        for block in self.blocks:
            alone = block.find("*") == len(block) - 1
            if not alone or not any(pattern.startswith(f"{block}.") for pattern in self.layers):
                text = "beginnings of layers' patterns that end with their one '*', the block's number"
                raise ValueError(f"blocks: expected {text}, got {block!r}")
        for pattern in self.layers:
            inside = self.split_block(f"{pattern.replace('*', '0')}.") is not None
            if inside and not any(pattern.startswith(f"{block}.") for block in self.blocks):
                text = f"patterns that begin as those of blocks do, {', '.join(map(repr, self.blocks))}"
                raise ValueError(f"layers: expected {text}, got {pattern!r}")

    def _check_factors(self) -> None:
        """Every vector of kind ``"factor"`` is the factor of a layer, and the other way round."""
        factors = {layer.factor: layer.factor.replace("*", "0") for layer in self.layers.values() if layer.factor}
        vectors = [(name, pattern) for name, pattern, roles in self._patterns if roles and roles[0].kind == "factor"]
        for factor, name in factors.items():
            if not any(compiled.fullmatch(name) for compiled, _ in vectors):
                raise ValueError(f"factor: expected a parameter of a layer_scale, got {factor!r}")
        for compiled, pattern in vectors:
            if not any(compiled.fullmatch(name) for name in factors.values()):
                raise ValueError(f"layers: expected a layer whose factor is that of {pattern}, got none")

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], str, tuple[Role, ...]]]:
        return [
            (self._compile(f"{pattern}.{name}" if name else pattern), pattern, roles)
            for pattern, layer in self.layers.items()
            for name, roles in layer.roles.items()
        ]

    @cached_property
    def _blocks(self) -> list[tuple[re.Pattern[str], int]]:
        return [
            (re.compile(self._prefix + re.escape(pattern).replace(r"\*", r")(\d+)(\..*") + ")"), first)
            for pattern, first in self.blocks.items()
        ]

    @property
    def _prefix(self) -> str:
        return "(" + "".join(rf"(?:{re.escape(prefix)}\.)?" for prefix in self.prefixes)

    def _compile(self, pattern: str) -> re.Pattern[str]:
        return re.compile(self._prefix + ")" + re.escape(pattern).replace(r"\*", "[^.]+"))

    def find(self, name: str) -> tuple[str, tuple[Role, ...]]:
        """Return the pattern of the layer that a parameter belongs to, and the roles of its axes.

        Raises
        ------
        ValueError
            If no pattern fits.
        """
        for compiled, pattern, roles in self._patterns:
            if compiled.fullmatch(name):
                return pattern, roles
        raise ValueError(f"{name}: expected a parameter that the spec {self.name!r} knows, found no rule for it")

    def translate(self, name: str) -> str:
        """Return a parameter's other name, in files or in modules; the same where it has but one."""
        pattern, _ = self.find(name)
        others = {**self.aliases, **{other: one for one, other in self.aliases.items()}}
        return f"{self.resolve(others[pattern], name)}.{name.rpartition('.')[2]}" if pattern in others else name

    def split_block(self, name: str) -> tuple[str, int, str, int] | None:
        """Return what is before a block's number, the number, what is after it, and how many cannot be copied."""
        for compiled, first in self._blocks:
            found = compiled.fullmatch(name)
            if found:
                return found[1], int(found[2]), found[3], first
        return None

    def resolve(self, pattern: str, name: str) -> str:
        """Put the block's number of `name` into a pattern, and its prefix before it."""
        split = self.split_block(name)
        if split is None:
            return pattern
        start = re.match(self._prefix + ")", name)
        return (start[0] if start else "") + pattern.replace("*", str(split[1]), 1)
