"""The same arrivals under other policies: what the simulator says would have been."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from servegym.cluster.outcome import latencies, within_slo
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.cluster.state import DECISION
from servegym.errors import ConfigError, ExportError
from servegym.export.manifest import read_manifest
from servegym.export.resolve import DISPATCH_SUFFIXES, resolve_policy
from servegym.policy.observe import observe_batch
from servegym.policy.policy import Policy
from servegym.replay.forced import CostWindows, Factors
from servegym.replay.log import ReplayLog
from servegym.serve.router.config import RouterConfig
from servegym.typing import FloatArray, IntArray
from servegym.workloads.table import RequestTable

#: Whether requests wait for the answers they followed, or come when they came.
Loop = Literal["closed", "open"]
#: What the logged decisions are called among the policies.
LOGGED = "as logged"
_RESAMPLES = 500
_BLOCKS = 50


class Ratio(NamedTuple):
    """Mean E2E over that of the logged decisions, both simulated, with a 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Counterfactual:
    """What a policy would have made of the arrivals, by the simulator.

    Attributes:
        policy: Its name.
        decided: Whether the log says that it decided.
        statistics: Mean, p50, p90 and p99 of TTFT, TPOT and E2E, seconds, by `metric, statistic`.
        slo_attainment: Share of requests within the limits of their class.
        agreement: Share of requests that it sends where the log did.
        ratio: To the logged decisions.
        shift_s: How much later than recorded each request arrives, `float64[m]`; 0 in an open
            loop.
    """

    policy: str
    decided: bool
    statistics: dict[tuple[str, str], float]
    slo_attainment: float
    agreement: float
    ratio: Ratio
    shift_s: FloatArray


class Arrivals(NamedTuple):
    """The requests that every policy meets.

    Attributes:
        rows: Of the log, `int64[m]`.
        table: They; the first arrives at 0.
        loop: Whether those that followed an answer wait for it.
    """

    rows: IntArray
    table: RequestTable
    loop: Loop

    @classmethod
    def of(cls, log: ReplayLog, loop: Loop | None = None) -> Arrivals:
        """Take the requests of a log that were dispatched and fit a replica.

        Args:
            log: The log.
            loop: `None`: closed if the log says what followed what.

        Raises:
            ConfigError: If the loop is to be closed and the log does not say.
        """
        known = log.links.num_waiting > 0
        if loop == "closed" and not known:
            raise ConfigError(
                "the log does not say what followed what, so its loop cannot be closed: leave "
                "--loop out, or give a log of a router with dispatch.log.max_ends above 0"
            )
        loop = loop or ("closed" if known else "open")
        table = log.table if loop == "closed" else log.table.open_loop()
        room = max(t.num_blocks for t in log.fleet.types) * log.fleet.spec.block_size
        fits = table.prompt_tokens.astype(np.int64) + table.output_tokens <= room
        rows = np.flatnonzero(log.dispatched & fits)
        table = table.take(rows)
        return cls(rows, replace(table, arrival_s=table.arrival_s - table.arrival_s[0]), loop)

    def with_way(self, request_s: FloatArray) -> Arrivals:
        """Return the same requests with the way of answers from the engine to the client.

        The log's ends are those that the router saw, the simulator's those of the engine: who
        follows comes so much later after the latter.

        Args:
            request_s: Seconds of each request of the log outside the engine, `float64[n]`.
        """
        after, delay_s = self.table.after, self.table.delay_s.copy()
        waits = after >= 0
        delay_s[waits] += request_s[self.rows[after[waits]]]
        return self._replace(table=replace(self.table, delay_s=np.maximum(delay_s, 0.0)))


class _Played(NamedTuple):
    ttft_s: FloatArray
    tpot_s: FloatArray
    e2e_s: FloatArray
    met: FloatArray
    replica: IntArray
    arrival_s: FloatArray


def deciding_policies(log: ReplayLog) -> tuple[list[str], list[str]]:
    """Return the policies that decided, as texts that can be resolved, and what cannot be.

    The log names exported policies by their checksum; the router's configuration knows the file.
    """
    found, unknown = [], []
    config = log.fleet.origin
    for text, _ in sorted(log.deciders.items(), key=lambda item: -item[1]):
        file = config.dispatch.runtime.policy if isinstance(config, RouterConfig) else ""
        if file.endswith(DISPATCH_SUFFIXES) and _has_checksum(file, text):
            found.append(file)
            continue
        try:
            resolve_policy(text)
        except (ConfigError, ExportError):
            unknown.append(text)
        else:
            found.append(text)
    return found, unknown


def _has_checksum(file: str, text: str) -> bool:
    try:
        return read_manifest(Path(file)).sha256.startswith(text)
    except ExportError:
        return False


def counterfactuals(
    log: ReplayLog, policies: Sequence[str], factors: Factors, arrivals: Arrivals | None = None
) -> list[Counterfactual]:
    """Simulate the arrivals of a log under policies, and under the decisions it has.

    Every policy meets the requests that were dispatched, when they arrived or, in a closed loop,
    as long after the simulated end of what they followed as after the real one; those that clients
    gave up are as long as they had become. Costs change when they changed, whoever arrives then.

    Args:
        log: The log.
        policies: Rules by name, or exported policies by path.
        factors: Costs; windows count from the first dispatch.
        arrivals: Of the log; left out: in a closed loop if it says what followed what.

    Raises:
        ConfigError: If a policy is unknown.
        ExportError: If a file is not a valid policy.
    """
    rows, table, _ = Arrivals.of(log) if arrivals is None else arrivals
    first_s = float(np.min(table.arrival_s + log.dispatch_s[rows]))
    edges = Factors(factors.edges_s + first_s, factors.values)
    logged = log.replica[rows].astype(np.int64)
    costs = CostWindows.of(log.fleet, [edges])
    episode = Episode(table, costs.types[0][0].astype(np.int16), log.fleet.speed)
    decided, _ = deciding_policies(log)

    def play(policy: Policy | None) -> _Played:
        simulator = Simulator(costs.spec, [episode])
        _drive(simulator, policy, logged, edges, costs)
        out = simulator.outcomes()
        ttft, tpot, e2e = latencies(out)
        met = within_slo(out, costs.spec).astype(np.float64)
        return _Played(
            ttft, tpot, e2e, met, out["replica"].astype(np.int64), out["arrival_s"].copy()
        )

    def summary(name: str, decided: bool, played: _Played) -> Counterfactual:
        return _summary(name, decided, played, base, logged, table.arrival_s)

    base = play(None)
    found = [summary(LOGGED, False, base)]
    for text in dict.fromkeys(policies):
        policy = resolve_policy(text)
        found.append(summary(policy.name, text in decided, play(policy)))
    return found


def _drive(
    simulator: Simulator,
    policy: Policy | None,
    logged: IntArray,
    factors: Factors,
    costs: CostWindows,
) -> None:
    """Play to the end; costs change when the first request after an edge is decided."""
    if policy is not None:
        policy.reset(1, 0)
        if policy.information == "oracle":
            simulator.state.request["predicted"] = simulator.state.request["output"]
    at = 0
    while simulator.advance()[0] == DECISION:
        env = simulator.state.env[0]
        window = int(np.searchsorted(factors.edges_s, float(env["now_s"]), side="right"))
        if window != at:
            at = window
            simulator.state.replica[0]["type_idx"] = costs.types[0][at]
        if policy is None:
            simulator.apply(logged[int(env["deciding"])][None])
            continue
        seen, envs = observe_batch(simulator, policy.needs)
        simulator.apply(policy.act(seen, envs))


def _summary(
    name: str,
    decided: bool,
    played: _Played,
    base: _Played,
    logged: IntArray,
    recorded_s: FloatArray,
) -> Counterfactual:
    statistics = {}
    for metric in ("ttft_s", "tpot_s", "e2e_s"):
        values = getattr(played, metric)
        values = values[np.isfinite(values)]
        if len(values):
            statistics[metric, "mean"] = float(values.mean())
            for q in (50, 90, 99):
                statistics[metric, f"p{q}"] = float(np.percentile(values, q))
    both = np.isfinite(played.e2e_s) & np.isfinite(base.e2e_s)
    return Counterfactual(
        policy=name,
        decided=decided,
        statistics=statistics,
        slo_attainment=float(played.met.mean()),
        agreement=float((played.replica == logged).mean()),
        ratio=_ratio(played.e2e_s[both], base.e2e_s[both]),
        shift_s=played.arrival_s - recorded_s,
    )


def _ratio(values: FloatArray, base: FloatArray) -> Ratio:
    """Compare the means; requests near in time are drawn together."""
    if not len(values):
        return Ratio(float("nan"), float("nan"), float("nan"))
    block = np.arange(len(values)) * _BLOCKS // len(values)
    sums = np.bincount(block, values, _BLOCKS), np.bincount(block, base, _BLOCKS)
    draws = np.random.default_rng(0).integers(0, _BLOCKS, (_RESAMPLES, _BLOCKS))
    ratios = sums[0][draws].sum(axis=1) / np.maximum(sums[1][draws].sum(axis=1), 1e-12)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return Ratio(float(values.mean() / base.mean()), float(low), float(high))
