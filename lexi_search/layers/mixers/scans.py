"""Linear recurrences over whole sequences, a chunk of tokens at a time in matrix products.

A head's state is a matrix S [key, value]. Each token decays it, writes its value under its key, and reads it with its
query. A chunk of tokens is an affine map of the state, S' = M S + N. Products within chunks give all M and N at once,
`jax.lax.scan` the state before every chunk, and products again what all tokens read.

Everything is float32. A GPU rounds operands of products to TF32 unless `precision` says otherwise.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

CHUNK = 64  # tokens: products within chunks grow with it, the number of steps shrinks
Precision = jax.lax.Precision | None
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
    queries: Keys, keys: Keys, values: Values, decays: Decays, *, precision: Precision = None
) -> Float[Array, "sequences length groups heads value"]:
    """What every token reads, S_t^T query_t, of S_t = exp(decay_t) S_(t-1) + key_t value_t^T.

    Heads of one group share queries and keys. `decays` are logarithms, at most 0, one for each head.
    """
    chunks = _Chunks(_cut(queries), _cut(keys), _cut(values), jnp.cumsum(_cut(decays), axis=-2))
    rest = _decay_to_end(chunks.decays)
    written = jnp.einsum("nsgck,nsghcv->nsghkv", chunks.keys, rest * chunks.values, precision=precision)

    def step(state: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, new = inputs
        return kept * state + new, state

    _, states = jax.lax.scan(step, jnp.zeros_like(written[0]), (jnp.exp(chunks.decays[..., -1:, :]), written))
    read = jnp.einsum("nsgck,nsghkv->nsghcv", chunks.queries, states, precision=precision) * jnp.exp(chunks.decays)
    return _join(read + _read_within(chunks, chunks.values, precision), values.shape[1])


def scan_delta(
    queries: Keys, keys: Keys, values: Values, decays: Decays, rates: Rates, *, precision: Precision = None
) -> Float[Array, "sequences length groups heads value"]:
    """What every token reads under the gated delta rule (arXiv 2412.06464), which replaces what its key would read.

    S = exp(decay_t) S_(t-1), then S_t = S + rate_t key_t (value_t - S^T key_t)^T. There is a decay for each head, or
    for each channel of its keys (arXiv 2510.26692).

    What the tokens of a chunk write depends on those before them: the solution of a unit triangular system, `own` minus
    `seen` times the state before the chunk (the WY form, arXiv 2406.06484).
    """
    chunks = _Chunks(_cut(queries), _cut(keys), _cut(values), jnp.cumsum(_cut(decays), axis=-2))
    rates, wide = _cut(rates[..., None]), chunks.keys[:, :, :, None]
    system = rates * _compare(chunks.keys, chunks.keys, chunks.decays, precision)
    faded = jnp.broadcast_to(wide * jnp.exp(chunks.decays), (*chunks.values.shape[:-1], keys.shape[-1]))
    targets = rates * jnp.concatenate([chunks.values, faded], axis=-1)
    solved = jnp.einsum("nsghij,nsghjv->nsghiv", _invert(system), targets, precision=precision)
    own, seen = solved[..., : values.shape[-1]], solved[..., values.shape[-1] :]
    rest = wide * _decay_to_end(chunks.decays)
    kept = jnp.exp(chunks.decays[..., -1:, :]) * jnp.eye(keys.shape[-1])[None, None, None, None]
    maps = kept - jnp.einsum("nsghck,nsghcl->nsghkl", rest, seen, precision=precision)
    written = jnp.einsum("nsghck,nsghcv->nsghkv", rest, own, precision=precision)

    def step(state: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        matrix, new = inputs
        return jnp.einsum("sghkl,sghlv->sghkv", matrix, state, precision=precision) + new, state

    _, states = jax.lax.scan(step, jnp.zeros_like(written[0]), (maps, written))
    own = own - jnp.einsum("nsghck,nsghkv->nsghcv", seen, states, precision=precision)
    faded = chunks.queries[:, :, :, None] * jnp.exp(chunks.decays)
    faded = jnp.broadcast_to(faded, (*own.shape[:-1], keys.shape[-1]))
    read = jnp.einsum("nsghck,nsghkv->nsghcv", faded, states, precision=precision)
    return _join(read + _read_within(chunks, own, precision), values.shape[1])


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
    precision: Precision,
) -> Float[Array, "n sequences groups heads chunk chunk"]:
    """left_i . right_j times the decay from j to i, for every j up to i; else 0."""
    gaps = decays[..., :, None, :] - decays[..., None, :, :]
    faded = jnp.exp(jnp.minimum(gaps, 0))  # of later j, which are left out, it might overflow
    if decays.shape[-1] == 1:
        products = jnp.einsum("nsgik,nsgjk->nsgij", left, right, precision=precision)[:, :, :, None]
        return jnp.tril(products * faded[..., 0])
    # A decay for each channel makes no product of matrices; the sum is one loop over the channels.
    return jnp.tril(jnp.sum(left[:, :, :, None, :, None] * right[:, :, :, None, None] * faded, axis=-1))


def _invert(
    system: Float[Array, "n sequences groups heads chunk chunk"],
) -> Float[Array, "n sequences groups heads chunk chunk"]:
    """The inverse of the unit triangular matrices whose parts below the diagonal are those of `system`.

    Block by block, as substitution does, so as exact; but in a few products of matrices, which a GPU is fast at. With
    the inverses of blocks on the diagonal in T, those of blocks twice as large are T - T C T, where C are their lower
    left quarters.
    """
    positions, size = jnp.arange(CHUNK), 1
    inverse = jnp.broadcast_to(jnp.eye(CHUNK), system.shape)
    while size < CHUNK:
        block = positions // size
        corners = (block[:, None] == block[None, :] + 1) & (block[:, None] % 2 == 1)
        corner = jnp.where(corners[None, None, None, None], system, jnp.float32(0))
        exact = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        inverse = inverse - exact(exact(inverse, corner), inverse)
        size *= 2
    return inverse


def _read_within(
    chunks: _Chunks, values: Float[Array, "n sequences groups heads chunk value"], precision: Precision
) -> Float[Array, "n sequences groups heads chunk value"]:
    """What tokens read of `values` written in their own chunk."""
    shares = _compare(chunks.queries, chunks.keys, chunks.decays, precision)
    return jnp.einsum("nsghij,nsghjv->nsghiv", shares, values, precision=precision)
