"""Which factors on a cost model's terms make the simulator agree with what was observed.

The simulator is the model: it takes the logged decisions, and the factors are those under which
what it predicts and what was observed differ neither in the mean nor along the share that a term
has in a latency (the method of simulated moments; McFadden, Econometrica 1989). Derivatives are
differences between simulations, so what queues make of a slower step is in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from servegym.replay.conditions import Observed, conditions
from servegym.replay.forced import Factors, Forced
from servegym.replay.terms import TERMS
from servegym.typing import FloatArray, IntArray

#: Change of a parameter for a derivative: of the logarithm of a factor, and in seconds. Large
#: enough that the batches of a simulation, which fall out otherwise, do not hide it.
_STEP = 0.08
_STEP_S = 0.005
#: How far a parameter may be from nothing before data must say so: logarithm, seconds.
_PRIOR = 0.7
_PRIOR_S = 0.2
#: How far the factors on `step` and `kv` may differ, likewise: both wait for the memory.
_PRIOR_MEMORY = 0.25
#: Share of the direct effect that is believed whatever simulations say of batches and queues.
_BELIEF = 0.03
#: Largest move in one iteration.
_LONGEST = 0.3
_LONGEST_S = 0.05
_ITERATIONS = 10
_HUBER = 1.345
#: Least scatter of the logarithm of a latency, so that exact agreement stays finite.
_LEAST_SCATTER = 0.004
#: What is more than so many times a request's latency apart is taken for independent, as far as
#: each stretch has so many blocks of that length.
_BLOCK_LATENCIES = 4.0
_BLOCKS_A_STRETCH = 8


class Parameter(NamedTuple):
    """One number to fit for each replica and stretch of time.

    Attributes:
        name: In reports.
        terms: Terms whose factors it moves together; none: it is seconds of every request.
    """

    name: str
    terms: tuple[str, ...]


FULL = (*(Parameter(term, (term,)) for term in TERMS), Parameter("request", ()))
#: Of short stretches, which cannot tell more apart.
COARSE = (Parameter("decode", ("step", "kv")), Parameter("prefill", ("prefill",)))


@dataclass(frozen=True)
class Fit:
    """Parameters of each replica in each stretch of time.

    Attributes:
        parameters: What was fitted.
        edges_s: Where windows begin but for the first, `float64[W - 1]`.
        stretch: Which stretch of a replica a window belongs to, `int64[W, R]`.
        values: Logarithms of factors, or seconds, `float64[S, R, P]`.
        covariance: Of a replica's, `float64[R, S * P, S * P]`, stretch by stretch.
        count: Usable requests by stretch and replica, `int64[S, R]`.
    """

    parameters: tuple[Parameter, ...]
    edges_s: FloatArray
    stretch: IntArray
    values: FloatArray
    covariance: FloatArray
    count: IntArray

    def factors(self) -> Factors:
        """Return the costs it stands for."""
        return _factors(self.values, self.parameters, self.edges_s, self.stretch)

    def request_s(self, at_s: FloatArray, replica: IntArray) -> FloatArray:
        """Return seconds outside the engine of requests, `float64[m]`."""
        window = np.searchsorted(self.edges_s, at_s, side="right")
        return _request_s(self.values, self.parameters, self.stretch[window, replica], replica)

    def block(self, stretch: int, replica: int) -> FloatArray:
        """Return the covariance of the parameters of one stretch, `float64[P, P]`."""
        size = len(self.parameters)
        part = slice(stretch * size, (stretch + 1) * size)
        return np.asarray(self.covariance[replica, part, part])

    def sigma(self) -> FloatArray:
        """Return standard errors, `float64[S, R, P]`."""
        variance = np.diagonal(self.covariance, axis1=1, axis2=2)
        num, _, size = self.values.shape
        return np.sqrt(variance).reshape(-1, num, size).transpose(1, 0, 2)


def fit(
    forced: Forced,
    observed: Observed,
    parameters: Sequence[Parameter] = FULL,
    *,
    edges_s: FloatArray | None = None,
    stretch: IntArray | None = None,
    base: Fit | None = None,
    start: FloatArray | None = None,
) -> Fit:
    """Fit by Newton's method on robust moments of the logarithms of TTFT and TPOT.

    Args:
        forced: The dispatches, to be simulated.
        observed: What happened to the requests.
        parameters: What to fit.
        edges_s: Windows, if costs may change at their edges.
        stretch: Windows of one replica with the same number share parameters, `int64[W, R]`;
            left out: each window has its own.
        base: Its seconds per request are kept where `parameters` has none.
        start: Where the search begins, `float64[S, R, P]`; left out: at the costs as they are.
    """
    edges_s = np.zeros(0) if edges_s is None else edges_s
    num_replicas = len(forced.fleet.names)
    if stretch is None:
        stretch = np.tile(np.arange(len(edges_s) + 1)[:, None], (1, num_replicas))
    search = _Search(forced, observed, tuple(parameters), edges_s, stretch, base)
    return search.solve(search.nothing() if start is None else start)


class _Search:
    """Moments and their derivatives, of all replicas at once: they do not touch each other."""

    def __init__(
        self,
        forced: Forced,
        observed: Observed,
        parameters: tuple[Parameter, ...],
        edges_s: FloatArray,
        stretch: IntArray,
        base: Fit | None,
    ) -> None:
        self.forced, self.observed = forced, observed
        self.parameters, self.edges_s, self.stretch = parameters, edges_s, stretch
        self.num_stretches, self.num_replicas = int(stretch.max()) + 1, stretch.shape[1]
        self.size = len(parameters)
        window = np.searchsorted(edges_s, self.observed.at_s, side="right")
        self.at_stretch = stretch[window, self.observed.replica]
        self.fixed_s = np.zeros(len(self.observed.at_s))
        if base is not None and all(p.terms for p in parameters):
            self.fixed_s = base.request_s(self.observed.at_s, self.observed.replica)
        seconds = np.array([not p.terms for p in parameters])
        self.step = np.where(seconds, _STEP_S, _STEP)
        self.longest = np.where(seconds, _LONGEST_S, _LONGEST)
        self.precision = np.kron(np.eye(self.num_stretches), _precision(parameters))
        latency_s = float(np.mean(self.observed.e2e_s[self.observed.usable]))
        self.block_s = max(
            min(
                _BLOCK_LATENCIES * latency_s,
                forced.span_s / (_BLOCKS_A_STRETCH * self.num_stretches),
            ),
            1e-9,
        )
        self.weight, self.logs = self.observed.weight, self.observed.logs
        self.rows = [
            np.flatnonzero(self.observed.usable & (self.observed.replica == r))
            for r in range(self.num_replicas)
        ]

    def _leanings(self, ttft_s: FloatArray, e2e_s: FloatArray, cached: IntArray) -> FloatArray:
        """How far each latency leans on each parameter of its stretch, `float64[2, m, P]`."""
        shares = conditions(self.forced, ttft_s, e2e_s, cached).shares
        lean = np.zeros((2, len(self.forced), self.size))
        for i, parameter in enumerate(self.parameters):
            for term in parameter.terms:
                lean[:, :, i] += shares[:, :, TERMS.index(term)]
            if not parameter.terms:
                usable = self.observed.usable
                lean[0, usable, i] = 1.0 / np.maximum(ttft_s[usable], 1e-6)
        return lean

    def nothing(self) -> FloatArray:
        """Return the values of costs as they are."""
        return np.zeros((self.num_stretches, self.num_replicas, self.size))

    def _simulate(self, variants: Sequence[FloatArray]) -> tuple[FloatArray, FloatArray]:
        """Simulate each set of values.

        Returns:
            Observed over simulated, in logarithms, `float64[V, 2, m]`, and how far latencies lean
            on the parameters, `float64[2, m, P]`. A request that happens to be slow shares its
            replica with more others, so what is compared must not say what it leans on: neither
            what was observed nor the first set does, but the simulations of the others.
        """
        factors = [_factors(v, self.parameters, self.edges_s, self.stretch) for v in variants]
        made = self.forced.play(factors)
        residuals, lean = [], np.zeros((2, len(self.forced), self.size))
        for i, (values, one) in enumerate(zip(variants, made, strict=True)):
            extra_s = self._extra_s(values)
            ttft_s = np.maximum(one.ttft_s + extra_s, 1e-6)
            with np.errstate(divide="ignore", invalid="ignore"):
                tpot_s = (one.e2e_s - one.ttft_s) / self.observed.gaps
                logs = np.log(np.stack((ttft_s, tpot_s)))
            residuals.append(np.where(self.weight > 0, self.logs - logs, 0.0))
            if i > 0:
                lean += self._leanings(ttft_s, one.e2e_s + extra_s, one.cached_tokens) / self.size
        return np.array(residuals), lean

    def _extra_s(self, values: FloatArray) -> FloatArray:
        replica = self.observed.replica
        return self.fixed_s + _request_s(values, self.parameters, self.at_stretch, replica)

    def _variants(self, values: FloatArray) -> list[FloatArray]:
        """Return the values, and each parameter moved in all stretches at once."""
        steps = np.diag(self.step)
        return [values, *(values + step for step in steps)]

    def _scatter(self, residual: FloatArray) -> FloatArray:
        """Robust scatter of each latency around its median by replica, `float64[2, R]`."""
        found = np.ones((2, self.num_replicas))
        for r, rows in enumerate(self.rows):
            for kind in range(2):
                values = residual[kind, rows][self.weight[kind, rows] > 0]
                if len(values):
                    off = float(np.median(np.abs(values - np.median(values))))
                    found[kind, r] = max(1.4826 * off, _LEAST_SCATTER)
        return found

    def _leverage(
        self, residual: FloatArray, lean: FloatArray, scatter: FloatArray, r: int
    ) -> FloatArray:
        """Return what a unit of residual of each request pulls, `float64[2, m_r, P]`.

        Outliers pull no more than `_HUBER` times the scatter (Huber's weights).
        """
        rows = self.rows[r]
        z = np.abs(residual[:, rows]) / scatter[:, r, None]
        weight = self.weight[:, rows] / np.maximum(1.0, z / _HUBER)
        return np.asarray(lean[:, rows] * (weight / scatter[:, r, None] ** 2)[:, :, None])

    def _spread(self, values: FloatArray, r: int) -> FloatArray:
        """Put each request's `float64[..., m_r, P]` into the columns of its stretch."""
        rows = self.rows[r]
        out = np.zeros((len(rows), self.num_stretches, self.size))
        out[np.arange(len(rows)), self.at_stretch[rows]] = values
        return out.reshape(len(rows), -1)

    def _slope(
        self, lever: FloatArray, lean: FloatArray, residuals: FloatArray, r: int
    ) -> FloatArray:
        """Return the derivative of the summed pulls, `float64[S * P, S * P]`.

        At equal batches a latency follows a parameter as far as it leans on it. What batches and
        queues make of that is known from simulations, for all stretches together.
        """
        rows = self.rows[r]
        moved = (residuals[0] - residuals[1:])[:, :, rows] / self.step[:, None, None]
        whole = np.einsum("kip,vki->pv", lever, moved)
        found = np.zeros((self.num_stretches, self.size, self.num_stretches, self.size))
        direct = [
            np.einsum(
                "kip,kiq->pq",
                lever[:, self.at_stretch[rows] == j],
                lean[:, rows[self.at_stretch[rows] == j]],
            )
            for j in range(self.num_stretches)
        ]
        total = np.sum(direct, axis=0)
        scale = np.sqrt(np.maximum(np.diagonal(total), 1e-12))
        belief = _BELIEF * np.diag(scale**2)
        feedback = np.linalg.solve(total + belief, whole + belief)
        for j, block in enumerate(direct):
            found[j, :, j] = block @ feedback
        return found.reshape(self.num_stretches * self.size, -1)

    def solve(self, values: FloatArray) -> Fit:
        """Iterate until the moves are small beside the standard errors."""
        size = self.num_stretches * self.size
        for _ in range(_ITERATIONS):
            residuals, lean = self._simulate(self._variants(values))
            scatter = self._scatter(residuals[0])
            covariance = np.zeros((self.num_replicas, size, size))
            move = np.zeros_like(values)
            for r, rows in enumerate(self.rows):
                if not len(rows):
                    covariance[r] = np.linalg.inv(self.precision)
                    continue
                lever = self._leverage(residuals[0], lean, scatter, r)
                slope = self._slope(lever, lean, residuals, r)
                pull = self._spread(
                    np.asarray(np.einsum("kip,ki->ip", lever, residuals[0][:, rows])), r
                )
                inverse = np.linalg.inv(slope + self.precision)
                step = inverse @ (pull.sum(axis=0) - self.precision @ values[:, r].ravel())
                move[:, r] = step.reshape(self.num_stretches, self.size)
                covariance[r] = self._covariance(inverse, pull, rows)
            longest = np.abs(move / self.longest).max(axis=(0, 2), keepdims=True)
            values = values + move / np.maximum(longest, 1.0)
            sigma = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
            sigma = sigma.reshape(-1, self.num_stretches, self.size).transpose(1, 0, 2)
            if (np.abs(move) <= np.maximum(0.3 * sigma, 0.01 * self.step)).all():
                break
        count = np.zeros((self.num_stretches, self.num_replicas), np.int64)
        for r, rows in enumerate(self.rows):
            count[:, r] = np.bincount(self.at_stretch[rows], minlength=self.num_stretches)
        return Fit(self.parameters, self.edges_s, self.stretch, values, covariance, count)

    def _covariance(self, inverse: FloatArray, pull: FloatArray, rows: IntArray) -> FloatArray:
        """Return the covariance of a replica's parameters.

        Requests near in time are alike: their pulls are summed over blocks of the log, whose sums
        scatter as if they were independent (a clustered sandwich). What the data leave open is as
        uncertain as it was before.
        """
        block = (self.observed.at_s[rows] / self.block_s).astype(np.int64)
        num_blocks = int(block.max()) + 1
        sums = np.zeros((num_blocks, pull.shape[1]))
        np.add.at(sums, block, pull)
        # the sums of a stretch add up to nothing: each parameter takes a block's worth of scatter
        freedom = max(1, num_blocks - self.num_stretches * self.size)
        spread = sums.T @ sums * (num_blocks / freedom)
        return np.asarray(inverse @ (spread + self.precision) @ inverse.T)


def _precision(parameters: Sequence[Parameter]) -> FloatArray:
    """Return how surely the parameters of a stretch are nothing, before any data."""
    sigma = np.array([_PRIOR if p.terms else _PRIOR_S for p in parameters])
    found = np.diag(sigma**-2.0)
    names = [p.name for p in parameters]
    if "step" in names and "kv" in names:
        gap = np.zeros(len(names))
        gap[names.index("step")], gap[names.index("kv")] = 1.0, -1.0
        found += np.outer(gap, gap) / _PRIOR_MEMORY**2
    return found


def _factors(
    values: FloatArray, parameters: Sequence[Parameter], edges_s: FloatArray, stretch: IntArray
) -> Factors:
    num_windows, num_replicas = stretch.shape
    found = np.ones((num_windows, num_replicas, len(TERMS)))
    each = np.arange(num_replicas)
    for i, parameter in enumerate(parameters):
        for term in parameter.terms:
            for w in range(num_windows):
                found[w, :, TERMS.index(term)] = np.exp(values[stretch[w], each, i])
    return Factors(edges_s, found)


def _request_s(
    values: FloatArray, parameters: Sequence[Parameter], stretch: IntArray, replica: IntArray
) -> FloatArray:
    for i, parameter in enumerate(parameters):
        if not parameter.terms:
            return np.asarray(values[stretch, replica, i])
    return np.zeros(len(replica))
