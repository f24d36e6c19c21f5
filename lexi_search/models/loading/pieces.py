"""The tensors, or rows of tensors, that each expert is made of, and their conversion to its weights on the device."""

from functools import partial
from itertools import chain
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from lexi_search.checkpoint.dequantise import Parts, Plain, Scheme, dequantise
from lexi_search.checkpoint.tensors import Tensors
from lexi_search.layers.weights import ExpertWeights
from lexi_search.models.moe_tensors import ExpertTensors, LayerTensors


class Recipe(NamedTuple):
    """The conversion of one tensor's stored parts into some of an expert's weights; hashable, static under `jit`.

    The rows of the values [out, in] belong to the `fields` of `ExpertWeights`: in equal blocks or, if `interleaved`,
    alternately.
    """

    fields: tuple[str, ...]
    scheme: Scheme
    shape: tuple[int, ...]
    dtype: str
    transposed: bool = False
    interleaved: bool = False


class Piece(NamedTuple):
    """A tensor that an expert needs, by its logical name; only row `row` of a tensor that holds all experts."""

    name: str
    row: int | None
    recipe: Recipe


def list_pieces(tensors: Tensors, experts: ExpertTensors) -> list[tuple[Piece, ...]]:
    """The tensors, or rows of tensors, that each expert is made of."""
    if not experts.fused:
        return [
            tuple(
                Piece(name, None, describe_recipe(tensors, name, (field,)))
                for field, name in zip(("gate", "up", "down")[-len(names) :], names, strict=True)
            )
            for names in experts.separate
        ]
    fields = (("gate", "up"), ("down",), ("gate_bias", "up_bias"), ("down_bias",))
    if experts.apart:
        fields = (("gate",), ("up",), ("down",))
    recipes = [
        describe_recipe(tensors, name, group, fused=True)._replace(
            transposed=experts.transposed, interleaved=experts.interleaved
        )
        for name, group in zip(experts.fused, fields, strict=False)
    ]
    num_experts = tensors[experts.fused[0]].shape[0]
    return [
        tuple(Piece(name, row, recipe) for name, recipe in zip(experts.fused, recipes, strict=True))
        for row in range(num_experts)
    ]


def list_parts(tensors: Tensors, layer: LayerTensors) -> set[str]:
    """Stored names of everything that a MoE layer's router and experts are made of."""
    names = {*layer.names, *chain.from_iterable(layer.experts.separate)}
    return {part for name in names for part in tensors[name].parts.values()}


def make_plain(recipe: Recipe) -> Recipe:
    """The recipe of one plain matrix, stored as it is used, of the same shape and type."""
    return Recipe(fields=recipe.fields[:1], scheme=Plain(), shape=recipe.shape, dtype=recipe.dtype)


def describe_recipe(tensors: Tensors, name: str, fields: tuple[str, ...], fused: bool = False) -> Recipe:
    stored = tensors[name]
    shape = stored.shape[1:] if fused else stored.shape
    return Recipe(fields=fields, scheme=stored.scheme, shape=shape, dtype=stored.dtype.name)


@partial(jax.jit, static_argnames="recipe")
def dequantise_one(parts: Parts, *, recipe: Recipe) -> Array:
    return dequantise(parts, recipe.scheme, recipe.shape, recipe.dtype)


@partial(jax.jit, static_argnames="recipes")
def make_expert(parts: tuple[Parts, ...], *, recipes: tuple[Recipe, ...]) -> ExpertWeights:
    weights: dict[str, Array | None] = {"gate": None}
    for stored, recipe in zip(parts, recipes, strict=True):
        values = dequantise(stored, recipe.scheme, recipe.shape, recipe.dtype)
        values, count = values.T if recipe.transposed else values, len(recipe.fields)
        if count == 1:
            rows = [values]
        else:
            rows = [values[i::count] for i in range(count)] if recipe.interleaved else jnp.split(values, count)
        weights |= zip(recipe.fields, rows, strict=True)
    return ExpertWeights(**weights)


@partial(jax.jit, static_argnames="recipes")
def all_finite(parts: tuple[Parts, ...], *, recipes: tuple[Recipe, ...]) -> Bool[Array, " pieces"]:
    values = [dequantise(p, r.scheme, r.shape, r.dtype) for p, r in zip(parts, recipes, strict=True)]
    return jnp.stack([jnp.isfinite(value).all() for value in values])
