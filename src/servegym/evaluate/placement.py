"""DistServe's placement: how many GPUs prefill, how many decode, and over how many each is spread.

Each phase is searched alone: one instance of it, beside another for the other phase that takes no
time, and the highest load at which enough requests are within their limits. To whoever prefills
that of the time per token does not apply; who waits for memory where it decodes waits for its first
token, so both apply there. Instances are then shared out so that neither phase is short (OSDI'24,
placement for nodes with fast links).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from servegym.cluster.spec import Role
from servegym.errors import ConfigError
from servegym.evaluate.saturation import SMALLEST, saturation_load
from servegym.problems.dispatch import Dispatch
from servegym.scenario import Scenario

#: Stand for a phase that takes no time, a link that is never in the way, and for no limit.
_AT_ONCE, _FAST_GB_PER_S, _NO_LIMIT_S = 1e4, 1e6, 1e6
_LINK = {"gb_per_s": 40.0, "latency_s": 0.001}
#: Largest load tried of an instance.
_LARGEST = 100.0
_PHASES: tuple[Role, Role] = ("prefill", "decode")
#: One replica of each kind: there is nothing to choose.
_POLICY = "round-robin+least-outstanding"


class Instance(NamedTuple):
    """One replica of a phase.

    Attributes:
        tp: GPUs.
        load: Highest load at which enough requests are within the limit of the phase.
    """

    tp: int
    load: float


class Placement(NamedTuple):
    """How GPUs are shared out.

    Attributes:
        prefill: What prefills.
        num_prefill: How many of them.
        decode: What decodes.
        num_decode: How many of them.
    """

    prefill: Instance
    num_prefill: int
    decode: Instance
    num_decode: int

    @property
    def load(self) -> float:
        """What the scarcer phase bears."""
        return min(self.num_prefill * self.prefill.load, self.num_decode * self.decode.load)

    @property
    def num_gpus(self) -> int:
        """GPUs taken."""
        return self.num_prefill * self.prefill.tp + self.num_decode * self.decode.tp


def distserve_placement(
    scenario: Scenario,
    num_gpus: int,
    *,
    tps: Sequence[int] = (1,),
    attainment: float = 0.9,
    num_seeds: int = 2,
    num_requests: int | None = None,
) -> Placement:
    """Search the placement that bears the highest load.

    Args:
        scenario: What is played, within which limits; its first fleet entry is the GPU.
        num_gpus: That there are.
        tps: GPUs over which an instance may be spread.
        attainment: Share of requests that are to be within each limit.
        num_seeds: Episodes for each load.
        num_requests: Requests of an episode, else the scenario's own.

    Returns:
        The best; of equal ones that with the fewest GPUs.

    Raises:
        ConfigError: If there are too few GPUs for both phases, or the scenario's rate is far from
            what an instance bears.
    """
    if num_gpus < 2 * min(tps):
        raise ConfigError(
            f"num_gpus must be at least {2 * min(tps)}, to prefill and to decode, got {num_gpus}"
        )

    def instance(role: Role, tp: int) -> Instance:
        load = saturation_load(
            _alone(scenario, role, tp),
            Dispatch().resolve(_POLICY),
            attainment,
            num_seeds=num_seeds,
            num_units=num_requests,
            largest=_LARGEST,
        )
        if not SMALLEST < load < _LARGEST:
            raise ConfigError(
                f"{tp} GPUs that are to {role} do not reach their limits at any load from "
                f"{SMALLEST:g} to {_LARGEST:g}: give {scenario.name} a rate that is nearer to them"
            )
        return Instance(tp, load)

    made = {role: [instance(role, tp) for tp in tps] for role in _PHASES}
    found: list[Placement] = []
    for prefill in made["prefill"]:
        for decode in made["decode"]:
            for n in range(1, (num_gpus - decode.tp) // prefill.tp + 1):
                m = (num_gpus - n * prefill.tp) // decode.tp
                found.append(_without_idle(Placement(prefill, n, decode, m)))
    return min(found, key=lambda placement: (-placement.load, placement.num_gpus))


def _without_idle(placement: Placement) -> Placement:
    """Leave out instances of the ampler phase that the other cannot keep busy."""
    load = placement.load
    counts = [
        next(n for n in range(1, most + 1) if n * instance.load >= load)
        for instance, most in (
            (placement.prefill, placement.num_prefill),
            (placement.decode, placement.num_decode),
        )
    ]
    return placement._replace(num_prefill=counts[0], num_decode=counts[1])


def split_scenario(scenario: Scenario, num_prefill: int, num_decode: int) -> Scenario:
    """Let so many replicas like those of the first fleet entry prefill, and so many decode."""
    entry = _entry(scenario)
    fleet = [
        {**entry, "count": count, "role": role}
        for role, count in zip(_PHASES, (num_prefill, num_decode), strict=True)
    ]
    return _changed(scenario, fleet=fleet)


def _alone(scenario: Scenario, role: Role, tp: int) -> Scenario:
    """Let one instance of a phase decide whether requests are within its limits."""
    entry = {**_entry(scenario), "count": 1, "tp": tp}
    other = {**entry, "speed": _AT_ONCE, "link": {"gb_per_s": _FAST_GB_PER_S}}
    other["role"] = "decode" if role == "prefill" else "prefill"
    fleet = [{**entry, "role": role}, other]
    if role == "decode":
        return _changed(scenario, fleet=fleet)
    classes = [c.model_dump() | {"tpot_s": _NO_LIMIT_S} for c in scenario.slo_classes]
    return _changed(scenario, fleet=fleet, slo_classes=classes)


def _entry(scenario: Scenario) -> dict[str, Any]:
    entry = scenario.fleet[0].model_dump(exclude_unset=True)
    return {"link": _LINK, **entry}


def _changed(scenario: Scenario, **changes: Any) -> Scenario:
    return Scenario.model_validate({**scenario.model_dump(exclude_unset=True), **changes})
