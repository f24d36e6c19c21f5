"""Which tensors make up each MoE layer of a checkpoint: found by their names, told apart by their shapes."""

import re
from typing import NamedTuple

from lexi_search.architectures import Architecture
from lexi_search.errors import InputError
from lexi_search.formats import Tensors

# Names of an expert's (gate, up, down) matrices where each expert has its own, and (gate_up, down) where all share two.
PER_EXPERT = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
FUSED = ("gate_up_proj", "down_proj")
WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "float64")


class ExpertTensors(NamedTuple):
    """Names of one layer's expert tensors, in one of two layouts.

    `separate` has one (gate, up, down) per expert, or (up, down) where experts have no gate, each stored [out, in].
    `fused` is (gate_up, down), perhaps with their biases (.., gate_up_bias, down_bias), with a leading expert axis,
    stored [out, in] or, if `transposed`, [in, out]; gate comes before up, or row by row in turn if `interleaved`.
    """

    separate: tuple[tuple[str, ...], ...] = ()
    fused: tuple[str, ...] | None = None
    transposed: bool = False
    interleaved: bool = False


class LayerTensors(NamedTuple):
    """Names of one MoE layer's tensors: router [E, H], bias of the selection [E] or None, experts."""

    router: str
    bias: str | None
    experts: ExpertTensors


def find_routers(tensors: Tensors, architecture: Architecture, num_layers: int) -> tuple[str, tuple[int, ...]]:
    """The name pattern of the routers, and the indices of the layers that have one."""
    modules = "|".join(re.escape(module) for module in architecture.routers)
    router_name = re.compile(rf"(|.*\.)layers\.(\d+)\.({modules})\.weight")
    found: dict[str, set[int]] = {}
    for match in filter(None, map(router_name.fullmatch, tensors)):
        prefix, layer, module = match.groups()
        if int(layer) < num_layers:
            found.setdefault(f"{prefix}layers.{{}}.{module}.weight", set()).add(int(layer))
    if not found:
        wanted = " or ".join(f"layers.N.{module}.weight" for module in architecture.routers)
        raise InputError(f"{tensors.folder}: no router tensor ({wanted}) in any layer; is this model dense?")
    if len(found) > 1:
        raise InputError(f"{tensors.folder}: routers under several names: {', '.join(sorted(found))}")
    [(pattern, layers)] = found.items()
    return pattern, tuple(sorted(layers))


def locate_tensors(
    tensors: Tensors, router: str, num_experts: int, hidden_size: int, has_bias: bool
) -> LayerTensors:
    """Find and check the tensors of the layer whose router is called `router`; InputError names what does not fit."""
    _require_shape(tensors, router, (num_experts, hidden_size))
    bias = router.removesuffix("weight") + "e_score_correction_bias" if has_bias else None
    if bias:
        _require_shape(tensors, bias, (num_experts,))
    stem = router.removesuffix("gate.weight") + "experts."
    fused = (stem + FUSED[0], stem + FUSED[1])
    if fused[0] in tensors or fused[1] in tensors:
        return LayerTensors(router, bias, _check_fused(tensors, fused, num_experts, hidden_size))
    names = next((names for names in PER_EXPERT if f"{stem}0.{names[0]}.weight" in tensors), PER_EXPERT[0])
    gate, up, down = names
    separate = tuple(
        (f"{stem}{e}.{gate}.weight", f"{stem}{e}.{up}.weight", f"{stem}{e}.{down}.weight") for e in range(num_experts)
    )
    width = _require_shape(tensors, separate[0][0], (None, hidden_size))[0]
    for expert in separate:
        for name, shape in zip(expert, ((width, hidden_size), (width, hidden_size), (hidden_size, width)), strict=True):
            _require_shape(tensors, name, shape)
    return LayerTensors(router, bias, ExpertTensors(separate=separate))


def _check_fused(tensors: Tensors, names: tuple[str, str], num_experts: int, hidden_size: int) -> ExpertTensors:
    """Tell the orientation from both shapes: one alone is ambiguous where gate and up are as wide as the model."""
    gate_up, down = (_require_shape(tensors, name, (num_experts, None, None))[1:] for name in names)
    for transposed in (False, True):
        (double, inner), (outer, width) = (gate_up[::-1], down[::-1]) if transposed else (gate_up, down)
        if inner == outer == hidden_size and double == 2 * width:
            return ExpertTensors(fused=names, transposed=transposed)
    shapes = f"{names[0]} {list(gate_up)} and {names[1]} {list(down)}"
    raise InputError(f"{tensors[names[0]].file}: {shapes} per expert do not fit hidden_size {hidden_size}")


def _require_shape(tensors: Tensors, name: str, shape: tuple[int | None, ...]) -> tuple[int, ...]:
    """Check that a tensor is there, of a plain float type, and of this shape (None: any extent); return its shape."""
    entry = tensors.get(name)
    if entry is None:
        raise InputError(f"{tensors.folder}: tensor {name} is missing; is the download complete?")
    if entry.dtype.name not in WEIGHT_DTYPES:
        raise InputError(f"{entry.file}: tensor {name} is {entry.dtype.name}; known are {', '.join(WEIGHT_DTYPES)}")
    fits = len(entry.shape) == len(shape) and all(b in (None, a) for a, b in zip(entry.shape, shape, strict=True))
    if not fits or 0 in entry.shape:
        wanted = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise InputError(f"{entry.file}: tensor {name} has shape {list(entry.shape)}, expected [{wanted}]")
    return entry.shape
