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
from servegym.baselines.score import RULES_AS_SCORES
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
from servegym.policy.expression import FUNCTIONS, MAX_CHARACTERS, MAX_DEPTH, MAX_SIZE
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
are multiplied; `displaced` is the price, in seconds, of all of a replica's KV memory: charged is
what a prompt takes of it beyond its cached prefix, as others' prefixes go for that. `class-aware`
prices, in seconds of added delay, a TTFT over a share `ttft` of its limit (`late`), a TPOT over a
share `tpot` (`slow`), and each request there that it pushes over that share (`pushed`); where the
scenario allows it, a request is rejected that costs more than `most` everywhere.
`added-delay-reject` does so if the least TTFT or TPOT is over a share of its limit. Where it allows
that (`actions: {{hold: true}}`), `added-delay-held` holds a request, `most` seconds at most, while
more than `wait` seconds of prefill wait where it would go.

`linucb` and `llm-d-predicted` [learn while they serve](#rules-that-learn-while-they-serve).

{sections}

## Learned: dispatchers that come with servegym
Named as rules are: `--policies generalist`. Files, manifests and cards are in `assets/policies`;
what they reach is in results: [the generalist's](results.md#one-policy-for-many-scenarios),
[for the tail](results.md#the-tail), [for
limits](results.md#limits-from-below-saturation-to-far-beyond), [for short
memory](results.md#whom-to-hold) and [for bursts](results.md#holding-in-bursts), where the router
may hold requests (`allow_hold` in its file); where memory suffices and traffic is even, `held` is
4 % behind the rule.

{shipped_table()}

## Placement: where a request decodes that is prefilled elsewhere
{rules_table(PLACEMENTS)}

## Migration: which request moves to another replica
{rules_table(MIGRATIONS)}

## Retention: what becomes of the KV of a turn that another request waits for
{rules_table(RETENTIONS)}

A learned policy is named by its file: `--policies runs/ppo-mixed-chat/policy/policy.onnx`, or
`runs/evolve-mixed-chat/policy/score.json`.

## Rules that learn while they serve
They begin with nothing in every episode, and learn from the requests that have ended: whoever
carries decisions out, a simulated run or a live router, tells them which replica each request went
to, and later how it fared there. On the same events they decide alike in both (a test plays them
through the dispatcher of a router). What they draw follows the seed.

- `llm-d-predicted` predicts a `quantile` of TTFT and of TPOT for each replica, by boosted trees
  over KV use, waiting and running requests, the prompt's length and its cached share, learned anew
  from the latest 2,000 ended requests after every 200. Of replicas within both limits one is drawn,
  the likelier the less it has to spare (`least=0`: the more); a share `explore` of the time it is
  another. Without limits, or where none is within, the lowest blend of both times is chosen, by
  weights `ttft` and `tpot`. Until 100 have ended, `llm-d` decides. Its authors say that it is for
  fleets of equal replicas; with `typed=1` (from 0.5 on) the known speeds are features, too.
- `linucb` learns what a request's own latency, over what it would be alone, depends on, by ridge
  regression that forgets (`memory`, in requests), and gives a choice that is little known the
  benefit of the doubt (`alpha`). What a choice costs the others no latency of the request itself
  shows; it is known, and added (`price`; 0 is the textbook's bandit).

TTFT is learned when a first token comes, all else when a request ends. Trees take some 25 ms for
both times, every 200 requests; a decision is taken in Python, in some 0.1 ms, so these rules are
not compared by default. Environments and data sets tell nobody how requests fare: these rules
decide there as they do at the beginning. As parts of `DISPATCH+...` they are refused.

Mean E2E over that of the best tuned rule (`added-delay-inferred` and `added-delay-shrink`), load 1,
8 held-out seeds of 1,500 requests, paired, 95 % bootstrap; in round brackets the share within
limits ([commands](../EXPERIMENTS.md)):

| policy | azure-conv-fit | mixed-chat |
|---|---|---|
| `added-delay`, tuned | 1.034 [1.029, 1.038] (85.1 %) | 1.008 [1.004, 1.012] (94.5 %) |
| `linucb`, tuned | 1.044 [1.035, 1.052] (86.8 %) | 1.015 [1.011, 1.020] (96.2 %) |
| `llm-d-predicted:typed=1` | 1.444 [1.417, 1.476] (80.6 %) | 1.575 [1.530, 1.624] (88.5 %) |
| `llm-d`, as it is | 1.530 [1.514, 1.547] (69.2 %) | 1.336 [1.309, 1.365] (91.1 %) |
| `llm-d-predicted`, as it is | 1.907 [1.763, 2.065] (65.8 %) | 2.003 [1.867, 2.177] (73.4 %) |

- The bandit is behind the rule that it starts near. What it could learn in 1,500 requests, known
  rates already say; tuning doubles the price of others' delay.
- Predicted latency as its authors ship it takes all replicas for equal, and these fleets are not.
  With speeds as features, 11 points more requests are within their limits than under `llm-d` on
  `azure-conv-fit`; on `mixed-chat` it leaves caches unused (35 % of the prompts' tokens are found
  there, 66 % under `llm-d`). Filling replicas up to their limits is not what mean latency wants.
- Tuning, 20 settings, finds nothing better for either of the two on `azure-conv-fit`: 1.475 [1.437,
  1.513] and 1.540 [1.528, 1.553].

## Closed-form scores
A dispatcher can be one formula: each replica that may be chosen has a score, and the lowest is
chosen. `score.json` holds its text, with a manifest beside it, and goes wherever a policy is named,
into the live router too. It is read by a parser of its own, never run as a program:

- numbers, and the features of the [observation](observation.md) by name, of a replica, of the
  request, and what is inferred. What only planners and transfers know is not among them;
- `+ - * /`, `< <= > >=` (1 or 0), brackets, and the functions
  {_functions()};
- `where(c, a, b)` is `a` where `c` is above 0, else `b`; `lowest`, `highest` and `mean` are over
  the replicas that may be chosen. Others are what they are called;
- at most {MAX_SIZE} parts, {MAX_DEPTH} levels and {MAX_CHARACTERS:,} characters. Arithmetic is that
  of floating point; what is no number, such as `0 / 0`, is the worst score.

What a rule of the first table does is then such a text (`baselines/score.py` has those of
{_as_scores()};
tests see that they decide as the rules do):
```
least-tpot:   {RULES_AS_SCORES["least-tpot"]}
speed-family: {RULES_AS_SCORES["speed-family"]}
```

### Evolved
```
servegym train --scenario azure-conv-fit --learner evolve --load 0.7 1.05 --minutes 14
servegym evaluate --scenario azure-conv-fit --policies added-delay:tuned \\
    runs/evolve-azure-conv-fit/policy/score.json
```
A genetic search (`train/evolution.py`) begins with the rules: tournaments, exchanged and redrawn
parts, numbers that are changed, and a price on parts, so that what brings nothing goes. All
candidates of a generation play the same whole episodes, each compared with `added-delay` there, and
one that lives on is judged by the mean of all its generations. What is kept is what is best on
validation episodes, four times as long. `--starts` gives it scores of your own to begin with. A run
that was killed goes on, as [all runs](training.md#the-runs-folder) do.

What a quarter of an hour found on a busy machine of two cores, each run on a part of one: 58
and 22 generations on `azure-conv-fit`, 44 and 18 on `mixed-chat`. Mean E2E over that of tuned
rules, 12 held-out seeds, paired, 95 % bootstrap ([commands](../EXPERIMENTS.md)); below 1 is better.
The best rule is `added-delay-inferred`, on `mixed-chat` at load 1 `added-delay-shrink`:

| scenario, begun with | load | over `added-delay` | over the best rule |
|---|---|---|---|
| azure-conv-fit, rules, seed 0 | 0.7 | **0.973 [0.972, 0.975]** | **0.992 [0.990, 0.993]** |
| | 1 | **0.967 [0.965, 0.970]** | **0.992 [0.989, 0.994]** |
| azure-conv-fit, rules, seed 1 | 0.7 | | **0.996 [0.994, 0.997]** |
| | 1 | | **0.997 [0.995, 0.999]** |
| mixed-chat, rules | 0.7 | 0.991 [0.989, 0.992] | 1.004 [1.002, 1.006] |
| | 1 | 0.992 [0.988, 0.996] | 1.007 [1.004, 1.010] |
| mixed-chat, the tuned rule too | 0.7 | | **0.993 [0.990, 0.996]** |
| | 1 | | **0.991 [0.989, 0.993]** |

The formula of `azure-conv-fit`, seed 0, small terms left out, is
```
((pending_prefill_tokens / prefill_tokens_per_s + recent_ttft_s) * 2.47
 + 0.78 * expected_tokens * decode_step_s
 + 1.43 * outstanding_requests * prompt_tokens / prefill_tokens_per_s) * step_time_ratio
```
- It is ahead of the best tuned rule, and says why in a line: queues count two and a half times, a
  TTFT that has lately been long tells of a queue, and tokens delay others less than prompts do. The
  [network](results.md#learned-from-what-every-choice-would-have-done) that learns from
  counterfactuals is ahead of it (0.954 over `added-delay` at load 1).
- On `mixed-chat` it is behind the best rules if it begins with rules as they are: in so few
  generations numbers are not tuned to the end. It is ahead of them if it is given the tuned rule to
  begin with (`--starts`): it then counts the own decode a third, and the delay of others by prompts
  1.7 times.

### Proposed from outside
```
servegym score candidates.jsonl --scenario azure-conv-fit --reference added-delay:tuned \\
    --out scores.jsonl --export best
```
Whoever proposes scores, a program, a language model or you, writes JSON lines and reads them:
```
{{"score": "outstanding_requests / relative_speed", "id": 1}}
{{"score": "outstanding_requests / speed", "id": 2}}
```
```
{{"id": 1, "score": "...", "parts": 3, "objective": 4.5, "compared": 1.26, "low": 1.25, ...}}
{{"id": 2, "score": "...", "error": "unknown feature or function of a score 'speed': ..."}}
```
`objective` is in the scenario's own unit, `compared` with the reference on the same training seeds
(a ratio, or a difference of shares; 95 % bootstrap). `--export` writes the best as a policy.
"""


def _functions() -> str:
    shown = [f"`{name}`" for name in FUNCTIONS if name != "negative"]
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def _as_scores() -> str:
    shown = [f"`{name}`" for name in RULES_AS_SCORES]
    lines = [", ".join(shown[:5]), f"{', '.join(shown[5:-1])} and {shown[-1]}"]
    return ",\n".join(lines)


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
    suite = load_suite("servegym-bench-v2")
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
