"""What was measured so far of one layer, as sums, and the means with standard errors that they give."""

from typing import NamedTuple

import numpy as np

from lexi_search.artifacts import LayerLoss


class Moments(NamedTuple):
    """Sums over what was drawn so far, for k = 1..K, with d = ||y_k - y_base||^2 of one token; float64.

    `frobenius` sums ||Y_k - Y_base||_F over iterations, `squares` sums d and `fourths` sums d^2 over tokens.
    """

    iterations: int
    samples: int
    frobenius: np.ndarray
    squares: np.ndarray
    fourths: np.ndarray


def summarise(moments: Moments) -> LayerLoss:
    """Means with their standard errors, which all come from the spread of d over tokens, drawn independently.

    Over the few iterations that reach 1 %, the spread of the norms themselves would be a poor estimate. By the delta
    method se(sqrt(m)) = se(m) / (2 sqrt(m)); a norm over n tokens is sqrt(n) times a root mean square.
    """
    rms = np.sqrt(moments.squares / moments.samples)
    rms_stderr = rms * relative_errors(moments)
    frobenius = moments.frobenius / moments.iterations
    return LayerLoss(
        iterations=moments.iterations,
        samples=moments.samples,
        frobenius=tuple(frobenius.tolist()),
        frobenius_stderr=tuple((frobenius * relative_errors(moments)).tolist()),
        rms=tuple(rms.tolist()),
        rms_stderr=tuple(rms_stderr.tolist()),
    )


def relative_errors(moments: Moments) -> np.ndarray:
    """Relative standard error of the root mean square for k = 1..K, [K] float64; zero where the loss itself is zero."""
    mean = moments.squares / moments.samples
    variance = np.maximum(moments.fourths / moments.samples - mean * mean, 0.0)
    positive = mean > 0
    spread = np.sqrt(variance / moments.samples, where=positive, out=np.zeros_like(mean))
    return np.divide(spread, 2 * mean, where=positive, out=np.zeros_like(mean))


def accumulate(moments: Moments, samples: int, squares: np.ndarray, fourths: np.ndarray) -> Moments:
    """The sums with one more iteration of `samples` tokens, whose sums of d and d^2 are given, [K] float64."""
    return Moments(
        iterations=moments.iterations + 1,
        samples=moments.samples + samples,
        frobenius=moments.frobenius + np.sqrt(squares),
        squares=moments.squares + squares,
        fourths=moments.fourths + fourths,
    )
