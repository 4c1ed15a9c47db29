"""How long an answer becomes, given its prediction: learnt from the answers that have ended.

The logarithm of the true length over the predicted one is regressed on that of the prediction, by
ridge regression whose prior is that predictions are right: the mean error and the slope are zero
after `_PRIOR` requests of exactly that. What is left over is taken as normal. Older answers are
forgotten at a rate of one in `_MEMORY`.

Plain arithmetic, so that one text serves compiled kernels and the live router. All of it is what a
router can do: an answer is learnt when it has ended.
"""

from __future__ import annotations

import math

from servegym.cluster.jit import inlined
from servegym.typing import FloatArray

_MEMORY = 2000.0
_PRIOR = 20.0
#: Places in the sums: requests, x, d, x^2, x d and d^2, where x is the logarithm of the predicted
#: length and d that of the true over the predicted one.
_N, _X, _D, _XX, _XD, _DD = range(6)
#: Variance of x in the prior.
_PRIOR_XX = 1.0
_ROOT_HALF = math.sqrt(0.5)


@inlined
def learn_length(sums: FloatArray, predicted_tokens: float, output_tokens: float) -> None:
    """Learn from a request that has ended.

    Args:
        sums: `float64[NUM_LENGTH_SUMS]`.
        predicted_tokens: What was predicted.
        output_tokens: What came.
    """
    x = math.log(max(predicted_tokens, 1.0))
    d = math.log(max(output_tokens, 1.0)) - x
    keep = 1.0 - 1.0 / _MEMORY
    sums[_N] = keep * sums[_N] + 1.0
    sums[_X] = keep * sums[_X] + x
    sums[_D] = keep * sums[_D] + d
    sums[_XX] = keep * sums[_XX] + x * x
    sums[_XD] = keep * sums[_XD] + x * d
    sums[_DD] = keep * sums[_DD] + d * d


@inlined
def error_of(sums: FloatArray) -> tuple[float, float, float, float]:
    """Return the regression of d: mean of x, mean of d, slope, and variance of what is left."""
    n = sums[_N]
    if n <= 0.0:
        return 0.0, 0.0, 0.0, 0.0
    mean_x, mean_d = sums[_X] / n, sums[_D] / n
    xx = max(0.0, sums[_XX] - n * mean_x * mean_x)
    xd = sums[_XD] - n * mean_x * mean_d
    dd = max(0.0, sums[_DD] - n * mean_d * mean_d)
    slope = xd / (xx + _PRIOR * _PRIOR_XX)
    rest = max(0.0, dd - slope * (2.0 * xd - slope * xx))
    return mean_x, sums[_D] / (n + _PRIOR), slope, rest / (n + _PRIOR)


@inlined
def expected_length(predicted_tokens: float, error: tuple[float, float, float, float]) -> float:
    """Mean output length of a request so predicted, at least 1.

    Args:
        predicted_tokens: The prediction.
        error: From `error_of`.
    """
    mean_x, mean_d, slope, variance = error
    x = math.log(max(predicted_tokens, 1.0))
    return max(1.0, math.exp(x + mean_d + slope * (x - mean_x) + 0.5 * variance))


@inlined
def spread_of(variance: float) -> float:
    """Standard deviation of a length over its mean, whose logarithm has such a variance."""
    return math.sqrt(math.expm1(variance))


@inlined
def tokens_left(mean_tokens: float, variance: float, tokens: float) -> float:
    """Mean of what is still to come of an answer that has not ended, at least 1.

    Args:
        mean_tokens: Of the whole length, whose logarithm is normal,
        variance: and has this variance.
        tokens: What has come.
    """
    if variance < 1e-6 or tokens < 1.0:
        return max(1.0, mean_tokens - tokens)
    sigma = math.sqrt(variance)
    z = (math.log(tokens / mean_tokens) + 0.5 * variance) / sigma  # how far it has come
    if z < -3.0:
        return max(1.0, mean_tokens - tokens)
    z = min(z, 6.0)  # so far out both tails would vanish
    longer = math.erfc(_ROOT_HALF * z)
    return max(1.0, mean_tokens * math.erfc(_ROOT_HALF * (z - sigma)) / longer - tokens)
