#!/usr/bin/env python3
"""Write the generated pages: observation, policies and environments. `--check` only compares."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import gymnasium

from servegym.baselines.migration.registry import MIGRATIONS
from servegym.baselines.placement import PLACEMENTS
from servegym.baselines.retention.registry import RETENTIONS
from servegym.baselines.rules import Rules
from servegym.envs.cluster import ClusterEnv
from servegym.envs.dispatch import DispatchEnv
from servegym.envs.observation import column_table
from servegym.envs.preemption import PreemptionEnv
from servegym.envs.workflow import WorkflowEnv
from servegym.evaluate.compare import with_interval
from servegym.evaluate.suite import load_record, load_suite, reference
from servegym.export.shipped import shipped_names, shipped_text
from servegym.policy.contract import (
    FIRST_ROLE,
    NUM_EXTENDED_FEATURES,
    NUM_OBSERVED_FEATURES,
    NUM_OBSERVED_REQUEST_FEATURES,
    REPLICA_FEATURES,
    REQUEST_FEATURES,
    SCHEMA_VERSION,
    Group,
)
from servegym.problems.registry import PROBLEMS

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTE = "<!-- Written by scripts/write_docs.py; do not edit. -->\n"


def observation_page() -> str:
    """Describe the observation contract."""
    return f"""{NOTE}
# The observation

What a policy sees of a replica and of the request, schema version {SCHEMA_VERSION}. The same
rows are filled by the simulator and by a live adapter. Values are raw, in the units given; a
learned policy carries its own normalisation. A policy sees what a router can know: true output
lengths and future arrivals are not in it. An *oracle* gets the true output length in place of the
predicted one.

## Per replica
{column_table(REPLICA_FEATURES[:NUM_OBSERVED_FEATURES], "Feature")}

## Per request
{column_table(REQUEST_FEATURES[:NUM_OBSERVED_REQUEST_FEATURES], "Feature")}

## What is inferred
A router can work these out from its own book-keeping: when tokens came, how long answers became,
and what it was told of the requests that are there. That takes a microsecond or two for each
request that is outstanding, so they are filled for policies that ask for them, and shown by
environments with `features="extended"`. Of a replica:

{column_table(REPLICA_FEATURES[NUM_OBSERVED_FEATURES:NUM_EXTENDED_FEATURES], "Feature")}

Of the request:

{column_table(REQUEST_FEATURES[NUM_OBSERVED_REQUEST_FEATURES:], "Feature")}

How they are inferred:

- *Step times.* As long as a stream decodes on a replica, the time from token to token is observed;
  `recent_itl_s` is its mean. Where every request that is there decodes, it is the time of a step
  that does nothing else, and expected are `decode_step_s` and `decode_seq_s` for each further
  stream: `step_time_ratio` is the quotient of the sums of both. A step beside which prompts may
  have been computed counts only if it took longer than with as many of their tokens as a step may
  have. From one decision to the next, what is older is forgotten: times between tokens with a time
  constant of 2 s, steps with one of 0.5 s of newer ones observed and 10 s of any time, so that the
  ratio of a replica without streams goes back to 1. 0.1 s in which all was as expected are added
  before quotients are formed.
- *Lengths.* The logarithm of true over predicted length of ended requests is regressed on the
  logarithm of the prediction, with a prior of 20 requests whose predictions were right and a memory
  of 2,000 requests. What that leaves over is taken as normal, so the mean is that of a log-normal
  length; given the tokens that have come, that of the lengths above them. A request is expected
  to be as long as at its dispatch until it ends. Requests that end early are learnt early:
  expectations are a little low until about as many have ended as are outstanding.
- *Limits.* A request's TPOT is taken as the time since its first token, and a step for each token
  still expected, over all its tokens. A step takes what is known, times `step_time_ratio`; with
  the new request, there is one stream more and a pause for its prefill.

`policy.lengths` and `policy.inferred` have the formulas.

## For planners only
Filled when a policy asks for them, by simulating each choice forward; not in the environment's
observation.

{column_table([f for f in REPLICA_FEATURES if f.group == Group.WHAT_IF], "Feature")}

## Roles
Where requests are [prefilled on one replica and decode on another](disaggregation.md): for rules
that ask for them, and shown by `Cluster-v0` on such fleets. A request is placed if some replica's
`has_prefill` is 1, else dispatched. They are as of now, however old the engine metrics are: whoever
runs the transfers counts them. Networks and exported policies do not see them, so they are in no
schema. A live router has no transfers: there the first two are 1 and the others 0.

{column_table(REPLICA_FEATURES[FIRST_ROLE:], "Feature")}

## Versions
| schema | changed |
|---|---|
| 2 | what is inferred; exported policies of schema 1 are read and decide as before |
| 1 | the first |

## Information classes
| class | may use |
|---|---|
| `blind` | counters the router keeps itself: what was dispatched where and has not ended |
| `metric` | also engine metrics (as old as `metrics_age_s`), the prefix index and known speeds |
| `predictive` | also predicted output lengths |
| `oracle` | the true output lengths: a bound, no rival |
"""


def rules_table(rules: Rules[Any]) -> str:
    """List rules of one kind."""
    rows = ["| policy | knows | parameters | rule | source |", "|---|---|---|---|---|"]
    for name in rules.names():
        parameters, text, reference = rules.describe(name)
        knows = rules.make(name).information
        rows.append(f"| `{name}` | {knows} | {parameters or '-'} | {text} | {reference or '-'} |")
    return "\n".join(rows)


def shipped_table() -> str:
    """List the learned policies that come with servegym."""
    rows = ["| policy | what it is |", "|---|---|"]
    rows += [f"| `{name}` | {shipped_text(name)} |" for name in shipped_names()]
    return "\n".join(rows)


def policies_page() -> str:
    """List the rules of all problems."""
    sections = "\n\n".join(
        f"## {problem.name.capitalize()}: {problem.decides}\n{rules_table(problem.rules)}"
        for problem in PROBLEMS.values()
    )
    return f"""{NOTE}
# Policies

Parameters are given after a colon: `--policies prefix-load:weight=0.01,eta=0.5 llm-d:kv=1`.
`servegym tune` searches them on training seeds ([evaluation](evaluation.md#tuning)). Each rule is
one file in `baselines/`. `NAME-oracle` is told the truth that others predict: a bound, no rival.
In a fleet of engines that go by priorities, `DISPATCH+ORDER` names a policy of the first table and
one of the second ([order](preemption.md#in-a-fleet)). Where some replicas only prefill,
`DISPATCH+PLACEMENT` names one of the first and one of those of placement
([disaggregation](disaggregation.md)). Where requests migrate, `DISPATCH+MIGRATION` names one for
who moves ([migration](migration.md)). `DISPATCH+RETENTION` names one for the KV of ended turns
([KV behind the GPU](kv-tiers.md#what-becomes-of-the-kv-of-an-ended-turn)).

Some rules of dispatch go by what a router [infers](observation.md#what-is-inferred): `shrink` is
how far they go from a predicted length towards the one that is expected, given how long answers
became (0: not at all, 1: all the way); `observed` is the power of `step_time_ratio` by which times
are multiplied. `class-aware` prices, in seconds of added delay, a TTFT over a share `ttft` of its
limit (`late`), a TPOT over a share `tpot` (`slow`), and each request there that it pushes over that
share (`pushed`); where the scenario allows it, a request is rejected that costs more than `most`
everywhere. `added-delay-reject` does so if the least TTFT or TPOT is over a share of its limit.

{sections}

## Learned: dispatchers that come with servegym
Named as rules are: `--policies generalist`. Files, manifests and cards are in `assets/policies`;
what they reach is in results: [the generalist's](results.md#one-policy-for-many-scenarios),
[for the tail](results.md#the-tail), [for
limits](results.md#limits-from-below-saturation-to-far-beyond).

{shipped_table()}

## Placement: where a request decodes that is prefilled elsewhere
{rules_table(PLACEMENTS)}

## Migration: which request moves to another replica
{rules_table(MIGRATIONS)}

## Retention: what becomes of the KV of a turn that another request waits for
{rules_table(RETENTIONS)}

A learned policy is named by its file: `--policies runs/ppo-mixed-chat/policy/policy.onnx`.
"""


def environment_page(env_class: type[gymnasium.Env]) -> str:
    """Show the docstring of an environment, with what Gymnasium says of it above."""
    entry = f"{env_class.__module__}:{env_class.__name__}"
    plain, shaped = sorted(
        (spec for spec in gymnasium.registry.values() if spec.entry_point == entry),
        key=lambda spec: len(spec.id),
    )
    env = gymnasium.make(plain.id)
    observed = "<br>".join(
        f"`{key}` `{space.dtype}{list(space.shape)}`"
        for key, space in env.observation_space.items()
    )
    first, _, rest = inspect.cleandoc(env_class.__doc__ or "").partition("\n\n")
    rest = re.sub(r"`docs/([\w-]+)\.md`", r"[\1](../\1.md)", rest)
    return f"""{NOTE}
# {plain.id.removeprefix("servegym/")}

{first}

| | |
|---|---|
| Make | `gymnasium.make("{plain.id}")`, `gymnasium.make_vec("{plain.id}", num_envs=8)` |
| For stock algorithms | `servegym.envs.sb3.make_vec("{shaped.id}", 8)` |
| Class | `{env_class.__module__}.{env_class.__name__}` |
| Actions by default | `Discrete({env.action_space.n})` |
| Observation by default | {observed} |

{rest}
"""


def suite_table() -> str:
    """List the scenarios of the suite with what was recorded of them."""
    suite = load_suite("servegym-bench-v1")
    record = load_record(suite)
    rows = [
        "| scenario | stands for | played | load | episodes | judged by | best tuned rule |"
        " clairvoyant over it |",
        "|---|---|---|---|---|---|---|---:|",
    ]
    for scenario in suite.scenarios:
        problem, _ = suite.pose(scenario)
        for load in scenario.loads:
            there = reference(suite, record, scenario, load)
            rule = record["scenarios"][scenario.name][f"{load:g}"]["rules"][there.best]["policy"]
            bound = with_interval(there.score(there.bound_values).ratio)
            rows.append(
                f"| `{scenario.name}` | {scenario.regime} | `{scenario.scenario}` | {load:g} |"
                f" {suite.num_test_seeds} of {scenario.num_units:,} {problem.unit} |"
                f" {there.objective.label} | `{rule}`, {there.rule_values.mean():.3g} | {bound} |"
            )
    return "\n".join(rows)


def leaderboard_page() -> str:
    """Put the table of scenarios into the page about the leaderboard."""
    text = (DOCS / "leaderboard.md").read_text()
    begin, end = "<!-- scenarios: scripts/write_docs.py -->\n", "<!-- end of scenarios -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}{suite_table()}\n\n{end}{after}"


def pages() -> dict[str, str]:
    """Make all generated pages, by name."""
    return {
        "observation.md": observation_page(),
        "policies.md": policies_page(),
        "leaderboard.md": leaderboard_page(),
        "environments/dispatch.md": environment_page(DispatchEnv),
        "environments/preemption.md": environment_page(PreemptionEnv),
        "environments/workflow.md": environment_page(WorkflowEnv),
        "environments/cluster.md": environment_page(ClusterEnv),
    }


def main() -> None:
    """Write or compare."""
    stale = []
    for name, text in pages().items():
        path = DOCS / name
        if "--check" in sys.argv:
            if not path.is_file() or path.read_text() != text:
                stale.append(name)
        else:
            path.write_text(text)
    if stale:
        sys.exit(f"out of date: {', '.join(stale)}; run scripts/write_docs.py")


if __name__ == "__main__":
    main()
