"""What a term that no rule has would bring: a rule is tried with it, number by number.

    python benchmarks/what_is_left.py displaced   a price on prefixes that a prompt displaces
    python benchmarks/what_is_left.py hold        holding a request while its best replica is busy
    python benchmarks/what_is_left.py lasts       a slow-down that is over after so many seconds

Ratios of mean E2E to the same rule without the term, on the same episodes of 1,000 requests at load
1, training seeds, with 95 % intervals. A term that brings nothing here at any number is not worth a
learner's time: what learns it could do no better than the number that is best.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from servegym.baselines.added_delay import cost_s
from servegym.baselines.choice import better, no_replica, num_replicas
from servegym.baselines.registry import policy
from servegym.policy.contract import EXPECTED_TOKENS, STEP_TIME_RATIO, Group
from servegym.policy.online import OnlinePolicy
from servegym.policy.policy import Heuristic
from servegym.policy.rule import rule
from servegym.scenario import Scenario, load_scenario
from servegym.train.validation import judged
from servegym.typing import BoolArray, FloatArray, UInt64Array

#: Scenarios with the tuned weights of `added-delay-shrink` there.
SUITE = "assets/suites/servegym-bench-v1"
RULES = {
    "azure-conv-fit": "prefill=1.263,decode=0.07108",
    f"{SUITE}/bursts.yaml": "prefill=1.263,decode=0.07108",
    f"{SUITE}/short-kv.yaml": "prefill=2.017,decode=0.1437",
    "hetero-prefix": "prefill=5.775,decode=3.13",
    "mixed-chat": "prefill=2.122,decode=0.4806",
    "agent-sessions": "prefill=5.487,decode=0.9356",
}
FAULTY = ("failures", f"{SUITE}/faults.yaml")
FAULTY_RULE = (2.017, 0.1437)
NEVER = 1e9


@rule
def _decide_with_recovery(
    replicas: FloatArray,
    request: FloatArray,
    mask: BoolArray,
    params: FloatArray,
    memory: FloatArray,
    rng: UInt64Array,
) -> int:
    """Act as `added-delay-inferred`; what is slow is taken to be so for `params[2]` seconds."""
    best, best_cost = -1, 0.0
    for r in range(num_replicas(mask)):
        if mask[r]:
            cost = cost_s(replicas, request, r, request[EXPECTED_TOKENS], params[0], params[1])
            ratio = replicas[STEP_TIME_RATIO, r]
            slowed = cost * ratio
            if ratio > 1.0 and slowed > params[2]:
                slowed = params[2] + cost - params[2] / ratio
            if better(slowed, r, best_cost, best):
                best, best_cost = r, slowed
    return best if best >= 0 else no_replica(mask)


def displaced() -> Iterator[tuple[str, Scenario, list[tuple[str, Heuristic | OnlinePolicy]]]]:
    """Prices; the first, nothing, is what the others are compared with."""
    for name, weights in RULES.items():
        prices = (0, 5, 10, 20, 40, 80)
        rules = [(f"{x} s", policy(f"added-delay-shrink:{weights},displaced={x}")) for x in prices]
        yield name, load_scenario(name), rules


def hold() -> Iterator[tuple[str, Scenario, list[tuple[str, Heuristic | OnlinePolicy]]]]:
    """From how much waiting prefill on, and for how long at most; the first is never."""
    numbers = [(NEVER, 0.0), *((s, most_s) for s in (0.2, 0.5, 1, 2, 5) for most_s in (1, 5, 60))]
    for name, weights in RULES.items():
        scenario = load_scenario(name)
        actions = scenario.actions.model_copy(update={"hold": True})
        rules = [
            (
                f"{s:g} s wait, held {most_s:g} s at most",
                policy(f"added-delay-held:{weights},wait={s},most={most_s}"),
            )
            for s, most_s in numbers
        ]
        yield name, scenario.model_copy(update={"actions": actions}), rules


def lasts() -> Iterator[tuple[str, Scenario, list[tuple[str, Heuristic | OnlinePolicy]]]]:
    """How long what is slow is taken to stay so; the first is for good."""
    for name in FAULTY:
        rules: list[tuple[str, Heuristic | OnlinePolicy]] = [
            (
                f"{s:g} s",
                Heuristic(
                    name="lasts",
                    information="predictive",
                    needs=Group.COUNTERS | Group.PREFIX | Group.LENGTHS | Group.STEP_TIMES,
                    decide=_decide_with_recovery,
                    params=np.array([*FAULTY_RULE, s]),
                ),
            )
            for s in (NEVER, 2, 4, 5, 10, 20, 40)
        ]
        yield name, load_scenario(name), rules


TERMS = {"displaced": displaced, "hold": hold, "lasts": lasts}


def main() -> None:
    """Try, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("term", choices=TERMS)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--num-requests", type=int, default=1000)
    given = parser.parse_args()
    print("| scenario | number | mean E2E s | ratio |\n|---|---|--:|---|")
    for name, scenario, rules in TERMS[given.term]():
        episodes = [
            scenario.episode(seed, load=1.0, num_requests=given.num_requests)
            for seed in range(given.seeds)
        ]
        scores = [judged(scenario, episodes, rule_).scores for _, rule_ in rules]
        for (text, _), own in zip(rules, scores, strict=True):
            gains = own - scores[0]
            error = 1.96 * gains.std(ddof=1) / np.sqrt(len(gains))
            ratio = f"{np.exp(gains.mean()):.4f} +- {error:.4f}"
            print(f"| {name} | {text} | {np.exp(own).mean():.3f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
