"""Running sums over one layer's samples, and the means and standard errors that they give."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from lexi_search.artifacts.profile import LayerLoss


class Controls(NamedTuple):
    """Sums over tokens of the control variate c, a function of the router's scores alone, for k = 1..K; float64.

    Over the measured tokens: `sums` of c, `squares` of c^2, `products` of c d. Over `ratio` times as many others, which
    went through the router only: `others` of c, divided by `ratio`.
    """

    ratio: int
    sums: np.ndarray
    squares: np.ndarray
    products: np.ndarray
    others: np.ndarray


class Moments(NamedTuple):
    """Running sums over samples, for k = 1..K, with d = ||y_k - y_base||^2 of one token; float64.

    `frobenius` sums ||Y_k - Y_base||_F over iterations, `squares` sums d and `fourths` sums d^2 over tokens. With a
    leading axis, as of `accumulate`, the two counts are arrays [..., 1].
    """

    iterations: int | np.ndarray
    samples: int | np.ndarray
    frobenius: np.ndarray
    squares: np.ndarray
    fourths: np.ndarray
    controls: Controls | None = None


def begin(top_k: int, ratio: int | None = None) -> Moments:
    """The sums before the first sample; with `ratio`, with a control variate over so many times as many tokens."""
    zero = np.zeros(top_k)
    return Moments(0, 0, zero, zero, zero, Controls(ratio, zero, zero, zero, zero) if ratio else None)


def summarise(moments: Moments) -> LayerLoss:
    """The losses with standard errors, which all come from the spread of d over tokens, drawn independently.

    Over the few iterations that reach 1 %, the spread of the norms themselves would be a poor estimate. By the delta
    method se(sqrt(m)) = se(m) / (2 sqrt(m)); a norm over n tokens is sqrt(n) times a root mean square. What a control
    variate corrects of the one, it corrects of the other in the same proportion.
    """
    mean, _ = estimate(moments)
    plain, rms, errors = moments.squares / moments.samples, np.sqrt(mean), relative_errors(moments)
    correction = np.sqrt(np.divide(mean, plain, where=plain > 0, out=np.ones_like(mean)))
    frobenius = moments.frobenius / moments.iterations * correction
    return LayerLoss(
        iterations=moments.iterations,
        samples=moments.samples,
        frobenius=tuple(frobenius.tolist()),
        frobenius_stderr=tuple((frobenius * errors).tolist()),
        rms=tuple(rms.tolist()),
        rms_stderr=tuple((rms * errors).tolist()),
    )


def relative_errors(moments: Moments) -> np.ndarray:
    """Relative standard error of the root mean square for k = 1..K, [K] float64; zero where the loss itself is zero."""
    mean, variance = estimate(moments)
    return np.divide(np.sqrt(variance), 2 * mean, where=mean > 0, out=np.zeros_like(mean))


def estimate(moments: Moments) -> tuple[np.ndarray, np.ndarray]:
    """The mean of d and the variance of that mean, each [K] float64.

    A control variate c takes off what the measured tokens' c happened to be above the mean of c over all n + N tokens,
    times the slope b = cov(c, d) / var(c) (two-phase sampling: Cochran, Sampling Techniques, chapter 12). What is left
    is var(d) (1 - r^2) / n + var(d) r^2 / (n + N), with r the correlation. b comes from the same n tokens, which biases
    the mean by a share of the order of 1/n.
    """
    n = moments.samples
    mean = moments.squares / n
    variance = np.maximum(moments.fourths / n - mean * mean, 0.0)
    if moments.controls is None:
        return mean, variance / n
    ratio, sums, squares, products, others = moments.controls
    spread = np.maximum(squares / n - (sums / n) ** 2, 0.0)
    slope = np.divide(products / n - sums / n * mean, spread, where=spread > 0, out=np.zeros_like(mean))
    corrected = mean - slope * (sums - others) / n * ratio / (1 + ratio)
    slope = np.where(corrected > 0, slope, 0.0)  # too few tokens to correct anything
    explained = np.minimum(slope * slope * spread, variance)
    left = (variance - explained) / n + explained / (n * (1 + ratio))
    return np.where(corrected > 0, corrected, mean), left


def accumulate(moments: Moments, samples: int, sums: Float64[np.ndarray, "iterations sums K"]) -> Moments:
    """The sums after each of some more iterations of `samples` tokens: all fields have a leading axis.

    `sums` has those of d and of d^2 over each iteration, with a control variate also those of `Controls`, in its order.
    """

    def add(before: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.add.accumulate(np.concatenate([before[None], values]))[1:]

    squares, fourths, *controls = np.moveaxis(sums, 1, 0)
    number, known = np.arange(1, len(sums) + 1)[:, None], moments.controls
    return Moments(
        iterations=moments.iterations + number,
        samples=moments.samples + samples * number,
        frobenius=add(moments.frobenius, np.sqrt(squares)),
        squares=add(moments.squares, squares),
        fourths=add(moments.fourths, fourths),
        controls=known and Controls(known.ratio, *map(add, known[1:], controls)),
    )


def pick(moments: Moments, place: int) -> Moments:
    """The sums at one place of the leading axis that `accumulate` makes."""
    iterations, samples, *sums, controls = moments
    return Moments(
        int(iterations[place, 0]),
        int(samples[place, 0]),
        *(array[place] for array in sums),
        controls and Controls(controls.ratio, *(array[place] for array in controls[1:])),
    )
