"""Linear recurrences over whole sequences, a chunk of tokens at a time in matrix products.

A head's state is a matrix S [key, value]. Each token decays it, writes its value under its key, and reads it with its
query. All that does not depend on the state is computed for all chunks at once; `jax.lax.scan` carries the state from
chunk to chunk, and products read all the states at once.

States, decays and sums of products are float32. Operands of products are of `dtype`, as in the kernels that engines
have (flash-linear-attention, mamba): of float32, products are never rounded to TF32.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lexi_search.layers.ffn import find_precision

CHUNK = 64  # tokens: products within chunks grow with it, the number of steps shrinks
Keys = Float[Array, "sequences length groups key"]
Values = Float[Array, "sequences length groups heads value"]
Decays = Float[Array, "sequences length groups heads channels"]
Rates = Float[Array, "sequences length groups heads"]


class _Chunks(NamedTuple):
    """The inputs in chunks [n, sequences, groups, (heads,) CHUNK, .]; `decays` are sums from the start of each."""

    queries: Float[Array, "n sequences groups chunk key"]
    keys: Float[Array, "n sequences groups chunk key"]
    values: Float[Array, "n sequences groups heads chunk value"]
    decays: Float[Array, "n sequences groups heads chunk channels"]


def scan_linear(
    queries: Keys, keys: Keys, values: Values, decays: Decays, *, dtype: DTypeLike
) -> Float[Array, "sequences length groups heads value"]:
    """What every token reads, S_t^T query_t, of S_t = exp(decay_t) S_(t-1) + key_t value_t^T.

    Heads of one group share queries and keys. `decays` are logarithms, at most 0, one for each head.
    """
    chunks = _Chunks(_cut(queries), _cut(keys), _cut(values), jnp.cumsum(_cut(decays), axis=-2))
    rest = _decay_to_end(chunks.decays)
    written = _multiply("nsgck,nsghcv->nsghkv", chunks.keys, rest * chunks.values, dtype)

    def step(state: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, new = inputs
        return kept * state + new, state.astype(dtype)

    _, states = jax.lax.scan(step, jnp.zeros_like(written[0]), (jnp.exp(chunks.decays[..., -1:, :]), written))
    read = _multiply("nsgck,nsghkv->nsghcv", chunks.queries, states, dtype) * jnp.exp(chunks.decays)
    return _join(read + _read_within(chunks, chunks.values, dtype), values.shape[1])


def scan_delta(
    queries: Keys, keys: Keys, values: Values, decays: Decays, rates: Rates, *, dtype: DTypeLike
) -> Float[Array, "sequences length groups heads value"]:
    """What every token reads under the gated delta rule (arXiv 2412.06464), which replaces what its key would read.

    S = exp(decay_t) S_(t-1), then S_t = S + rate_t key_t (value_t - S^T key_t)^T. There is a decay for each head, or
    for each channel of its keys (arXiv 2510.26692).

    What the tokens of a chunk write depends on those before them: the solution of a unit triangular system, `own` minus
    `seen` times the state before the chunk (the WY form, arXiv 2406.06484).
    """
    chunks = _Chunks(_cut(queries), _cut(keys), _cut(values), jnp.cumsum(_cut(decays), axis=-2))
    rates, wide = _cut(rates[..., None]), chunks.keys[:, :, :, None]
    system = rates * _compare(chunks.keys, chunks.keys, chunks.decays, dtype)
    faded = jnp.broadcast_to(wide * jnp.exp(chunks.decays), (*chunks.values.shape[:-1], keys.shape[-1]))
    targets = rates * jnp.concatenate([chunks.values, faded], axis=-1)
    solved = _multiply("nsghij,nsghjv->nsghiv", _invert(system), targets, dtype)
    own, seen = solved[..., : values.shape[-1]], solved[..., values.shape[-1] :].astype(dtype)
    rest = jnp.broadcast_to(wide * _decay_to_end(chunks.decays), seen.shape).astype(dtype)
    kept = jnp.swapaxes(jnp.exp(chunks.decays[..., -1:, :]), -1, -2)

    def step(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        kept, own, seen, rest = inputs
        written = own - _multiply("sghck,sghkv->sghcv", seen, state, dtype)
        new = kept * state + _multiply("sghck,sghcv->sghkv", rest, written, dtype)
        return new, (state.astype(dtype), written.astype(dtype))

    start = jnp.zeros((*rest.shape[1:4], keys.shape[-1], values.shape[-1]), jnp.float32)
    _, (states, written) = jax.lax.scan(step, start, (kept, own, seen, rest))
    faded = jnp.broadcast_to(chunks.queries[:, :, :, None] * jnp.exp(chunks.decays), rest.shape)
    read = _multiply("nsghck,nsghkv->nsghcv", faded, states, dtype)
    return _join(read + _read_within(chunks, written, dtype), values.shape[1])


def scan_channels(
    queries: Float[Array, "sequences length state"],
    keys: Float[Array, "sequences length state"],
    values: Float[Array, "sequences length channels"],
    steps: Float[Array, "sequences length channels"],
    rates: Float[Array, "channels state"],
) -> Float[Array, "sequences length channels"]:
    """What every token reads, S_t query_t, of states S [channels, state] whose every value decays at its own rate.

    S_t = exp(step_t rate) S_(t-1) + value_t key_t^T. No product of matrices computes it: the maps of the tokens of a
    chunk are composed pair by pair.
    """

    def compose(first: tuple[Array, Array], last: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * last[0], last[0] * first[1] + last[1]

    def read(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        queries, keys, values, steps = inputs
        maps = jnp.exp(steps[..., None] * rates[None, None]), values[..., None] * keys[:, :, None]
        kept, written = jax.lax.associative_scan(compose, maps, axis=1)
        states = kept * state[:, None] + written
        return states[:, -1], jnp.sum(states * queries[:, :, None], axis=-1)

    chunks = tuple(map(_cut, (queries, keys, values, steps)))
    start = jnp.zeros((len(values), *rates.shape), jnp.float32)
    _, outputs = jax.lax.scan(read, start, chunks)
    return jnp.moveaxis(outputs, 0, 1).reshape(len(values), -1, values.shape[-1])[:, : values.shape[1]]


def _cut(x: Float[Array, "sequences length *heads width"]) -> Float[Array, "n sequences *heads chunk width"]:
    """The sequences in chunks; zeros after their end write nothing and decay nothing."""
    count = -(-x.shape[1] // CHUNK)
    padded = jnp.pad(x, ((0, 0), (0, count * CHUNK - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(padded.reshape(x.shape[0], count, CHUNK, *x.shape[2:]), (1, 2), (0, -2))


def _join(
    x: Float[Array, "n sequences groups heads chunk value"], length: int
) -> Float[Array, "sequences length groups heads value"]:
    joined = jnp.moveaxis(x, (0, -2), (1, 2))
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]


def _decay_to_end(decays: Float[Array, "*heads chunk channels"]) -> Float[Array, "*heads chunk channels"]:
    """The share of what each token writes that is left after the chunk."""
    return jnp.exp(decays[..., -1:, :] - decays)


def _compare(
    left: Float[Array, "n sequences groups chunk key"],
    right: Float[Array, "n sequences groups chunk key"],
    decays: Float[Array, "n sequences groups heads chunk channels"],
    dtype: DTypeLike,
) -> Float[Array, "n sequences groups heads chunk chunk"]:
    """left_i . right_j times the decay from j to i, for every j up to i; else 0."""
    gaps = decays[..., :, None, :] - decays[..., None, :, :]
    faded = jnp.exp(jnp.minimum(gaps, 0))  # of later j, which are left out, it might overflow
    if decays.shape[-1] == 1:
        products = _multiply("nsgik,nsgjk->nsgij", left, right, dtype)[:, :, :, None]
        return jnp.tril(products * faded[..., 0])
    # A decay for each channel makes no product of matrices; the sum is one loop over the channels.
    return jnp.tril(jnp.sum(left[:, :, :, None, :, None] * right[:, :, :, None, None] * faded, axis=-1))


def _invert(
    system: Float[Array, "n sequences groups heads chunk chunk"],
) -> Float[Array, "n sequences groups heads chunk chunk"]:
    """The inverse of the unit triangular matrices whose parts below the diagonal are those of `system`.

    Block by block, as substitution does, so as exact; but in a few products of matrices, which a GPU is fast at. Of a
    block on the diagonal whose quarters are A, 0, C and B, the inverse has the quarters A', 0, -B' C A' and B'.
    """
    multiply = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    inverse, size = jnp.ones((*system.shape[:-1], 1, 1), jnp.float32), 1
    while size < CHUNK:
        count = CHUNK // (2 * size)
        blocks = system.reshape(*system.shape[:-2], count, 2, size, count, 2, size)[..., 1, :, :, 0, :]
        corners = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)
        first, last = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        lower = -multiply(multiply(last, corners), first)
        rows = [first, jnp.zeros_like(first)], [lower, last]
        inverse = jnp.concatenate([jnp.concatenate(row, axis=-1) for row in rows], axis=-2)
        size *= 2
    return inverse[..., 0, :, :]


def _read_within(
    chunks: _Chunks, values: Float[Array, "n sequences groups heads chunk value"], dtype: DTypeLike
) -> Float[Array, "n sequences groups heads chunk value"]:
    """What tokens read of `values` written in their own chunk."""
    shares = _compare(chunks.queries, chunks.keys, chunks.decays, dtype)
    return _multiply("nsghij,nsghjv->nsghiv", shares, values, dtype)


def _multiply(axes: str, left: Array, right: Array, dtype: DTypeLike) -> Array:
    """The product of operands of `dtype`, in float32."""
    left, right = left.astype(dtype), right.astype(dtype)
    return jnp.einsum(axes, left, right, precision=find_precision(left), preferred_element_type=jnp.float32)
