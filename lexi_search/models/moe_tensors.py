"""The tensors of each MoE layer of a checkpoint, recognised by their names and shapes."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from lexi_search.checkpoint.dequantise import Plain
from lexi_search.checkpoint.tensors import Tensors
from lexi_search.errors import InputError
from lexi_search.layers.weights import Scales
from lexi_search.models.families.moe import Architecture
from lexi_search.models.finder import explain_absence, require_shape

# Names of an expert's (gate, up, down), or (up, down) where it has no gate, below `experts.N.` of the block; the first
# entry that is present counts.
PER_EXPERT = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("up_proj", "down_proj"))
# Names of (gate_up, down) below the block, where all experts share two tensors, and the ending of their biases' names.
FUSED = (
    ("experts.gate_up_proj", "experts.down_proj"),
    ("input_linear.weight", "output_linear.weight"),
    ("experts.fc1.weight", "experts.fc2.weight"),
)
FUSED_BIAS = "_bias"
APART = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")  # (gate, up, down), each of all experts
# Names of the bias per expert, of the selection or the logits, below the block.
BIASES = (
    "gate.e_score_correction_bias",
    "e_score_correction_bias",
    "moe_statics.e_score_correction_bias",
    "experts.e_score_correction_bias",
    "expert_bias",
    "gate.expert_bias",
    "gate.bias",
    "router.bias",
    "router_bias",
)
# Beside a router: the experts of every token of the vocabulary. Such a layer keeps its own k: it has none to choose.
FIXED_CHOICES = "tid2eid"
LATENT = ("fc1_latent_proj", "fc2_latent_proj")  # into the space that the experts work in, and back
# Prefixes of parts with decoder layers of their own: multi-token prediction, speech.
LEFT_OUT = re.compile(r"(.*\.)?(mtp|talker)\.")
# Names below `layers.N.` of tensors that only a MoE layer has, and of tensors one of which a dense layer has.
EXPERTS = re.compile(r"(.*\.)?(experts|switch_mlp|block_sparse_moe|moe)\.")
MLP = re.compile(r"(.*\.)?(mlp|feed_forward|shared_mlp|mixer)\.")


class ExpertTensors(NamedTuple):
    """Names of one layer's expert tensors, in one of three layouts.

    `separate` has one (gate, up, down) per expert, or (up, down) where experts have no gate, each stored [out, in].
    `fused` is (gate_up, down), perhaps with their biases (.., gate_up_bias, down_bias), with a leading expert axis,
    stored [out, in] or, if `transposed`, [in, out]; gate comes before up, or their rows alternate if `interleaved`. If
    `apart`, it is (gate, up, down).
    """

    separate: tuple[tuple[str, ...], ...] = ()
    fused: tuple[str, ...] | None = None
    transposed: bool = False
    interleaved: bool = False

    @property
    def apart(self) -> bool:
        return self.fused is not None and len(self.fused) == len(APART)

    @property
    def down(self) -> str:
        """The name of the down projection, of all experts or of the first."""
        return self.fused[2 if self.apart else 1] if self.fused else self.separate[0][-1]


class LayerTensors(NamedTuple):
    """Names of one MoE layer's tensors: router [E, H], bias of the selection or of the logits (or None), experts.

    `scales` are those of the layer's `Scales`, if it has them; `limit` is that of its experts, a number; `latent` are
    the maps into the space of its experts, and back. `choices` has the experts of every token of the vocabulary, where
    the layer looks them up; such a layer has no k to choose.
    """

    router: str
    bias: str | None
    experts: ExpertTensors
    scales: Scales | None = None
    limit: float | None = None
    latent: tuple[str, str] | None = None
    choices: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors but those of separate experts."""
        single = (self.router, *filter(None, (self.bias, self.choices)))
        return (*single, *(self.experts.fused or ()), *(self.scales or ()), *(self.latent or ()))


def find_routers(
    tensors: Tensors, architecture: Architecture, num_layers: int
) -> tuple[str, tuple[int, ...], frozenset[int]]:
    """The name pattern of the routers, the layers that have one, ascending, and those of them that choose no experts.

    The latter look the experts of a token up.
    """
    modules = "|".join(re.escape(module) for module in architecture.routers)
    router_name = re.compile(rf"(|.*\.)layers\.(\d{{1,9}})\.({modules})\.weight")
    layers_of: dict[str, set[int]] = {}  # by name pattern
    for match in filter(None, map(router_name.fullmatch, tensors)):
        prefix, layer, module = match.groups()
        if int(layer) < num_layers and not LEFT_OUT.match(prefix):
            layers_of.setdefault(f"{prefix}layers.{{}}.{module}.weight", set()).add(int(layer))
    if not layers_of and not len(tensors):
        raise InputError(f"{tensors.folder}: the safetensors files hold no tensors; save or fetch the weights again")
    if not layers_of:
        wanted = " or ".join(f"layers.N.{module}.weight" for module in architecture.routers)
        raise InputError(f"{tensors.folder}: no router tensor ({wanted}) in any layer; is this model dense?")
    if len(layers_of) > 1:
        raise InputError(f"{tensors.folder}: routers under several names: {', '.join(sorted(layers_of))}")
    [(pattern, layers)] = layers_of.items()
    stored = _list_names(tensors, pattern)
    if num_layers > 1 + max(stored):
        thing = f"num_hidden_layers is {num_layers}, but the files hold tensors of {1 + max(stored)} layers"
        raise InputError(f"{tensors.folder}: {thing}; {explain_absence(tensors)}")
    fixed = {layer for layer in layers if find_choices(pattern.format(layer)) in tensors}
    if layers == fixed:
        raise InputError(f"{tensors.folder}: every layer looks its experts up by token: none has a k to choose")
    for layer in range(num_layers):
        thing = None if layer in layers else _find_fault(stored.get(layer, ()), pattern.format(layer))
        if thing:
            raise InputError(f"{tensors.folder}: layer {layer} has {thing}; {explain_absence(tensors)}")
    return pattern, tuple(sorted(layers)), frozenset(fixed)


def find_choices(router: str) -> str:
    """The name of the tensor with the experts of every token, if the layer whose router is called so has one."""
    return router.removesuffix("weight") + FIXED_CHOICES


def _list_names(tensors: Tensors, pattern: str) -> dict[int, list[str]]:
    """Layer index -> the names of its tensors, below `layers.N.`."""
    in_layer = re.compile(rf"{re.escape(pattern.partition('{}')[0])}(\d{{1,9}})\.(.*)")
    names: dict[int, list[str]] = {}
    for match in filter(None, map(in_layer.fullmatch, tensors)):
        names.setdefault(int(match[1]), []).append(match[2])
    return names


def _find_fault(names: Sequence[str], router: str) -> str | None:
    """What is wrong with a layer that has no router, unless it is dense: what a missing shard or index entry leaves."""
    if expert := next(filter(EXPERTS.match, names), None):
        return f"experts ({expert}), but no router {router}"
    return None if any(map(MLP.match, names)) else f"neither a router {router} nor an MLP"


def locate_tensors(
    tensors: Tensors,
    router: str,
    num_experts: int,
    hidden_size: int,
    *,
    has_bias: bool = False,
    interleaved: bool = False,
    scales: Scales | None = None,
    latent_size: int | None = None,
    fixed_k: int | None = None,
) -> LayerTensors:
    """The checked tensors of the layer whose router is called `router`; InputError names a tensor that does not fit.

    With `fixed_k` it looks up so many experts of a token.
    """
    require_shape(tensors, router, (num_experts, hidden_size))
    if tensors[router].scheme != Plain():
        raise InputError(f"{tensors[router].file}: router {router} is quantised; only plain routers are supported")
    block = find_block(router, in_layer=scales is not None)
    bias = _find_bias(tensors, block, num_experts) if has_bias and fixed_k is None else None
    choices = None if fixed_k is None else _check_choices(tensors, find_choices(router), fixed_k)
    latent = None if latent_size is None else _find_latent(tensors, block, latent_size, hidden_size)
    width = latent_size or hidden_size  # of the experts' inputs and outputs
    fused = next((names for names in FUSED if any(block + name in tensors for name in names)), None)
    stacks = [block + name for name in APART]
    if any(name in tensors and len(tensors[name].shape) == 3 for name in stacks):
        experts = _check_apart(tensors, stacks, num_experts, width)
    elif fused:
        experts = _check_fused(tensors, (block + fused[0], block + fused[1]), num_experts, width, interleaved)
    else:
        experts = _check_separate(tensors, block + "experts.", num_experts, width)
    if scales is not None:
        scales = Scales(*(block + name for name in scales))
        for name, extent in zip(scales, (hidden_size, hidden_size, num_experts), strict=True):
            require_shape(tensors, name, (extent,))
    return LayerTensors(router, bias, experts, scales, latent=latent, choices=choices)


def _check_choices(tensors: Tensors, name: str, k: int) -> str:
    entry = tensors[name]
    if entry.dtype.kind not in "iu" or len(entry.shape) != 2 or entry.shape[1] != k or not entry.shape[0]:
        thing = f"{entry.dtype.name} of shape {list(entry.shape)}"
        raise InputError(f"{entry.file}: tensor {name} is {thing}, expected whole numbers of shape [any, {k}]")
    return name


def find_block(router: str, *, in_layer: bool) -> str:
    """What the names of a layer's experts begin with: that of the router's block, or of the layer itself."""
    return re.match(r"(.*\.)?layers\.\d+\." + ("" if in_layer else r"[^.]+\."), router).group()


def _find_latent(tensors: Tensors, block: str, latent_size: int, hidden_size: int) -> tuple[str, str]:
    names = tuple(f"{block}{module}.weight" for module in LATENT)
    for name, shape in zip(names, ((latent_size, hidden_size), (hidden_size, latent_size)), strict=True):
        require_shape(tensors, name, shape)
        if (bias := name.removesuffix("weight") + "bias") in tensors:
            raise InputError(f"{tensors[bias].file}: tensor {bias} is not supported beside experts in a latent space")
    return names


def _find_bias(tensors: Tensors, block: str, num_experts: int) -> str:
    """The bias per expert, stored [E] or [1, E]."""
    name = next((block + name for name in BIASES if block + name in tensors), block + BIASES[0])
    one_row = name in tensors and len(tensors[name].shape) == 2
    require_shape(tensors, name, (1, num_experts) if one_row else (num_experts,))
    return name


def _check_separate(tensors: Tensors, stem: str, num_experts: int, hidden_size: int) -> ExpertTensors:
    # Looks at all experts: if the gate of the first is missing, that must not pass for a model without gates.
    expert_stems = [f"{stem}{e}." for e in range(num_experts)]
    present = (parts for parts in PER_EXPERT if any(f"{one}{parts[0]}.weight" in tensors for one in expert_stems))
    parts = next(present, PER_EXPERT[0])
    if biased := next((part for part in parts if f"{stem}0.{part}.bias" in tensors), None):
        raise InputError(f"{tensors.folder}: {stem}0.{biased} has a bias, which is supported for fused experts only")
    separate = tuple(tuple(f"{stem}{e}.{part}.weight" for part in parts) for e in range(num_experts))
    width = require_shape(tensors, separate[0][0], (None, hidden_size))[0]
    for *inputs, down in separate:
        for name in inputs:
            require_shape(tensors, name, (width, hidden_size))
        require_shape(tensors, down, (hidden_size, width))
    return ExpertTensors(separate=separate)


def _check_apart(tensors: Tensors, names: Sequence[str], num_experts: int, hidden_size: int) -> ExpertTensors:
    width = require_shape(tensors, names[0], (num_experts, None, hidden_size))[1]
    require_shape(tensors, names[1], (num_experts, width, hidden_size))
    require_shape(tensors, names[2], (num_experts, hidden_size, width))
    return ExpertTensors(fused=tuple(names))


def _check_fused(
    tensors: Tensors, names: tuple[str, str], num_experts: int, hidden_size: int, interleaved: bool
) -> ExpertTensors:
    """Tells the orientation from both shapes: one is ambiguous if gate and up together are as wide as the model."""
    gate_up, down = (require_shape(tensors, name, (num_experts, None, None))[1:] for name in names)
    for transposed in (False, True):
        (double, inner), (outer, width) = (gate_up[::-1], down[::-1]) if transposed else (gate_up, down)
        if inner == outer == hidden_size and double == 2 * width:
            biases = tuple(name + FUSED_BIAS for name in names)
            if not any(bias in tensors for bias in biases):
                return ExpertTensors(fused=names, transposed=transposed, interleaved=interleaved)
            for bias, extent in zip(biases, (double, hidden_size), strict=True):
                require_shape(tensors, bias, (num_experts, extent))
            return ExpertTensors(fused=names + biases, transposed=transposed, interleaved=interleaved)
    shapes = f"{names[0]} {list(gate_up)} and {names[1]} {list(down)}"
    raise InputError(f"{tensors[names[0]].file}: {shapes} per expert do not fit hidden_size {hidden_size}")
