"""The fit of corrections: what the router says of a token predicts a part of what its dropped experts would have added.

A layer at k, with the gate exponent, is short of its own output at K. That rest is regressed on `moe.find_features` by
ridge, and the map cut to low rank, all in closed form from sums over one pass of text that the model wrote itself. Most
of the rest is unlike from token to token and stays; what goes is its mean, given the router, and that is what later
layers suffer from most (issue 15; `examples/fidelity`).
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial, reduce
from itertools import permutations
from threading import Lock
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from lexi_search.artifacts.compensation import Correction
from lexi_search.errors import InputError, explain_overflow
from lexi_search.layers.moe import find_features, find_seen, mixing_changes
from lexi_search.layers.routing import Choice
from lexi_search.layers.spec import Routing
from lexi_search.profiling.forward.layer import MoEOutputs
from lexi_search.profiling.forward.passes import forward
from lexi_search.profiling.forward.variants import Run

RANK = 32
CORRECTED_EXPONENTS = (0.0, 0.25, 0.5, 0.75)  # tried with corrections, which leave less to hand on
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # of features scaled to unit variance
FOLDS = 2  # of sequences: one half chooses the ridge of the other
PARTS = (*([fold] for fold in range(FOLDS)), list(range(FOLDS)))  # each fold, and all tokens
JITTER = 1e-6  # of the largest variance, below which a feature does not vary


class Sums(NamedTuple):
    """Sums over the tokens of each fold, for some k: of features, the rest, and their products."""

    count: Float[Array | np.ndarray, " folds"]
    features: Float[Array | np.ndarray, "folds ks features"]
    rest: Float[Array | np.ndarray, "folds ks hidden"]
    squares: Float[Array | np.ndarray, "folds ks features features"]
    products: Float[Array | np.ndarray, "folds ks features hidden"]


class Solving(Mapping):
    """Corrections, by (decoder layer, k), that are being solved; getting one waits for it.

    So the layers of the next pass can begin with the first, while the last are solved. Getting one raises InputError
    where the outputs that it is fitted to overflow.
    """

    def __init__(self, solved: Mapping[tuple[int, int], Future[list[Correction]]], exponent: int):
        self._solved, self._exponent = solved, exponent

    def __getitem__(self, key: tuple[int, int]) -> Correction:
        return self._solved[key].result()[self._exponent]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._solved)

    def __len__(self) -> int:
        return len(self._solved)


def fit_layers(
    run: Run,
    tokens: Int[np.ndarray, "sequences length"],
    ks: Mapping[int, Sequence[int]],
    *,
    exponents: Sequence[float],
    rank: int,
    ridges: Sequence[float] = RIDGES,
    report: Callable[[int], None] = lambda layer: None,
) -> list[Solving]:
    """The corrections of each layer at its `ks`, for each of the gate `exponents`; after one pass over the model."""
    sums: dict[int, dict[jax.Device, list[Sums]]] = {layer: {} for layer in ks}  # of what each device has seen
    seen, counting = dict.fromkeys(ks, 0), Lock()  # sequences
    solved: dict[tuple[int, int], Future[list[Correction]]] = {}  # for each exponent
    pool = ThreadPoolExecutor(os.cpu_count())

    def observe(first: int, outputs: MoEOutputs) -> None:
        layer, (sequences, length) = outputs.layer, outputs.hidden.shape[:2]
        if layer not in seen:
            return
        folds = np.repeat(np.arange(first, first + sequences) % FOLDS, length).astype(np.int32)
        found = [
            _sum(
                outputs.outputs,
                outputs.choice,
                folds,
                np.float32(exponent),
                np.asarray(ks[layer], np.int32),
                routing=run.model.routing,
            )
            for exponent in exponents
        ]
        by_device, [device] = sums[layer], outputs.x.devices()
        by_device[device] = jax.tree.map(jnp.add, by_device[device], found) if device in by_device else found
        with counting:
            seen[layer] += sequences
            complete = seen[layer] == len(tokens)
        if complete:  # solved while the devices go on
            in_order = [by_device[device] for device in sorted(by_device, key=lambda device: device.id)]
            whole = [pool.submit(_fetch, run, layer, parts) for parts in zip(*in_order, strict=True)]
            by_device.clear()
            for at, k in enumerate(ks[layer]):
                solved[layer, k] = pool.submit(_solve_fetched, run, layer, whole, at, rank=rank, ridges=ridges)

    try:
        forward(run, tokens, observe=observe, report=report)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown(wait=False)  # its threads end when all is solved
    return [Solving(solved, number) for number in range(len(exponents))]


def list_unfitted(
    run: Run, fitted: Collection[int], layers: Collection[int], *, background_k: int | None
) -> dict[int, Sequence[int]]:
    """The k of layers at which corrections are to be fitted: every k of those of `layers` that are not `fitted`, and
    `background_k`, unless it is None, of all other layers."""
    ks: dict[int, Sequence[int]] = {layer: range(1, run.model.top_k) for layer in layers if layer not in fitted}
    if background_k is not None:
        ks |= {layer: [background_k] for layer in run.model.layers if layer not in layers}
    return ks


def _fetch(run: Run, layer: int, parts: Sequence[Sums]) -> Sums:
    """The sums over all devices, in host memory; InputError where they are not finite."""
    whole = reduce(lambda one, other: jax.tree.map(np.add, one, other), jax.device_get(list(parts)))
    if not all(np.isfinite(array).all() for array in whole):
        raise _explain_overflow(run, layer)
    return whole


def _explain_overflow(run: Run, layer: int) -> InputError:
    return explain_overflow(f"{run.checkpoint.folder}: the output of layer {layer} overflows", run.dtype)


def _solve_fetched(run: Run, layer: int, sums: Sequence[Future[Sums]], at: int, **settings: Any) -> list[Correction]:
    corrections = solve([one.result() for one in sums], at, **settings)
    if not all(np.isfinite(array.astype(np.float32)).all() for correction in corrections for array in correction):
        raise _explain_overflow(run, layer)
    return corrections


def try_exponents(
    run: Run, tokens: Int[np.ndarray, "sequences length"], *, rank: int, report: Callable[[int], None]
) -> dict[float, Solving]:
    """Corrections of all layers at `choose_ks` for each of `CORRECTED_EXPONENTS`, to choose one of them."""
    ks = dict.fromkeys(run.model.layers, choose_ks(run.model.top_k))
    found = fit_layers(run, tokens, ks, exponents=CORRECTED_EXPONENTS, rank=rank, report=report)
    return dict(zip(CORRECTED_EXPONENTS, found, strict=True))


def split(tokens: Int[np.ndarray, "sequences length"]) -> tuple[np.ndarray, np.ndarray]:
    """Text to fit corrections on, and text to try them on: halves, or the whole twice where either half would be one
    sequence, of which no fold is left to choose a ridge by."""
    return (tokens[::2], tokens[1::2]) if len(tokens) >= 2 * FOLDS else (tokens, tokens)


def choose_ks(top_k: int) -> list[int]:
    """A quarter, a half and three quarters of the model's own k, as far as they differ and are whole."""
    return sorted({max(1, share * top_k // 4) for share in (1, 2, 3)})


def find_rank(hidden_size: int, num_experts: int, rank: int | None) -> int:
    """`rank`, `RANK` where it is None, or the largest that a correction of these sizes can have."""
    if rank is not None and rank < 1:
        raise InputError(f"--rank is {rank}, at least 1 expected")
    return min(rank or RANK, hidden_size, 3 * num_experts)


@partial(jax.jit, static_argnames="routing")
def _sum(
    outputs: Float[Array, "tokens K hidden"],
    choice: Choice,
    folds: Int[Array | np.ndarray, " tokens"],
    exponent: Float[Array | np.ndarray | np.generic, ""],
    ks: Int[Array | np.ndarray, " ks"],
    *,
    routing: Routing,
) -> Sums:
    """The sums of those tokens that get a correction; `folds` says the fold of each."""
    change = mixing_changes(choice.scores, routing=routing._replace(exponent=exponent))
    member = (find_seen(choice)[None, :] & (jnp.arange(FOLDS)[:, None] == folds[None, :])).astype(jnp.float32)
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def sum_at(k: Int[Array, ""]) -> tuple[Array, ...]:
        features = find_features(choice, k, routing=routing)
        rest = -(change[:, k - 1, :, None] * outputs.astype(jnp.float32)).sum(axis=1)
        split = member[:, :, None] * features[None]  # features of each fold
        return (
            split.sum(axis=1),
            product("nt,th->nh", member, rest),
            *(product("ntf,tg->nfg", split, values) for values in (features, rest)),
        )

    found = jax.lax.map(sum_at, ks)
    return Sums(member.sum(axis=1), *(jnp.swapaxes(array, 0, 1) for array in found))


class Moments(NamedTuple):
    """The features of the tokens of some folds, at one k, and their decompositions; float64.

    `values` and `vectors`, the latter scaled, are of the covariance of the features as scaled to unit variance.
    """

    count: float
    mean: Float64[np.ndarray, " features"]
    covariance: Float64[np.ndarray, "features features"]
    values: Float64[np.ndarray, " features"]
    vectors: Float64[np.ndarray, "features features"]


class Features(NamedTuple):
    """All of a fit at one k that the rest has no part in, and so is the same for every gate exponent.

    `moments` are of each fold, the last of all tokens; `crossed` are covariances of each other fold in the basis of
    one, by (one, other). `root` is a square root of the last covariance.
    """

    moments: Sequence[Moments]
    crossed: Mapping[tuple[int, int], Float64[np.ndarray, "features features"]]
    root: Float64[np.ndarray, "features features"]


def _decompose(sums: Sums, at: int) -> Features:
    moments = [_find_moments(sums, at, folds) for folds in PARTS]
    crossed = {
        (one, other): moments[one].vectors.T @ moments[other].covariance @ moments[one].vectors
        for one, other in permutations(range(FOLDS), 2)
    }
    values, vectors = np.linalg.eigh(moments[-1].covariance)
    return Features(moments, crossed, np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T)


def solve(sums: Sequence[Sums], at: int, *, rank: int, ridges: Sequence[float] = RIDGES) -> list[Correction]:
    """The corrections at the `at`-th k for each of `sums`, of several gate exponents, which change the rest alone.

    Each is the one with that of `ridges` with which each fold predicts the others best. `c` is right for `A` and `B` as
    they are stored, in bfloat16. All in float64 on the host: the matrices are small, and nearly singular. `sums` are
    finite.
    """
    features = _decompose(sums[0], at)
    return [_solve(one, features, at, rank=rank, ridges=ridges) for one in sums]


def _solve(sums: Sums, features: Features, at: int, *, rank: int, ridges: Sequence[float]) -> Correction:
    moments = features.moments
    rests = [_find_rest(sums, at, folds, own) for folds, own in zip(PARTS, moments, strict=True)]
    rows = [own.vectors.T @ products for own, (_, products) in zip(moments, rests, strict=True)]
    errors = np.zeros(len(ridges))
    for one, other in features.crossed:
        errors += _judge(features, rests, rows[one], one, other, ridges)
    whole, (mean, _) = moments[-1], rests[-1]
    weights = whole.vectors @ (rows[-1] / (whole.values + ridges[int(errors.argmin())])[:, None])
    A, B = (array.astype(ml_dtypes.bfloat16) for array in _cut(features.root, weights, rank))
    c = mean - B.astype(np.float64) @ (A.astype(np.float64) @ whole.mean)
    return Correction(A, B, c.astype(np.float32))


def _find_moments(sums: Sums, at: int, folds: Sequence[int]) -> Moments:
    """The moments over some folds; features that do not vary have no part in a regression on them."""
    count = max(float(sums.count[folds].sum()), 1.0)
    mean, squares = (array[folds, at].sum(axis=0, dtype=np.float64) / count for array in (sums.features, sums.squares))
    covariance = squares - np.outer(mean, mean)
    variance = np.diagonal(covariance)
    varies = variance > JITTER * variance.max(initial=0.0)
    scale = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1.0)), 0.0)
    values, vectors = np.linalg.eigh(covariance * np.outer(scale, scale))
    # Sums in float32 could make a value negative.
    return Moments(count, mean, covariance, np.maximum(values, 0.0), scale[:, None] * vectors)


def _find_rest(sums: Sums, at: int, folds: Sequence[int], own: Moments) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the rest [hidden], and its central products with the features [features, hidden]; float64."""
    mean, products = (
        array[folds, at].sum(axis=0, dtype=np.float64) / own.count for array in (sums.rest, sums.products)
    )
    return mean, products - np.outer(own.mean, mean)


def _judge(
    features: Features,
    rests: Sequence[tuple[np.ndarray, np.ndarray]],
    rows: Float64[np.ndarray, "features hidden"],
    one: int,
    other: int,
    ridges: Sequence[float],
) -> Float64[np.ndarray, " ridges"]:
    """The mean squared error on the tokens of fold `other` of the regressions on `one`, less what no ridge changes.

    The weights of a ridge are W = vectors @ D @ `rows`, where the diagonal D is all that depends on it: traces of
    products with W are sums over matrices [features, features].
    """
    own, judge = features.moments[one], features.moments[other]
    (own_mean, _), (mean, products) = rests[one], rests[other]
    quadratic = features.crossed[one, other] * (rows @ rows.T)
    linear = ((own.vectors.T @ products) * rows).sum(axis=1)
    shift, moved = mean - own_mean, (judge.mean - own.mean) @ own.vectors
    errors = []
    for ridge in ridges:
        diagonal = 1 / (own.values + ridge)
        missed = shift - (moved * diagonal) @ rows
        errors.append(diagonal @ quadratic @ diagonal - 2 * linear @ diagonal + missed @ missed)
    return np.array(errors)


def _cut(
    root: Float64[np.ndarray, "features features"], weights: Float64[np.ndarray, "features hidden"], rank: int
) -> tuple[Float64[np.ndarray, "rank features"], Float64[np.ndarray, "hidden rank"]]:
    """A and B, whose product maps to the `rank` directions in which the fitted values vary most."""
    fitted = root @ weights  # vary as the fitted values do
    _, directions = np.linalg.eigh(fitted @ fitted.T)
    largest = directions[:, ::-1][:, :rank].T @ fitted
    norms = np.linalg.norm(largest, axis=1, keepdims=True)
    B = np.divide(largest, norms, where=norms > 0, out=np.zeros_like(largest)).T
    return (weights @ B).T, B
