"""Forward simulation of each choice, with predicted lengths: the planner's features.

For every replica that may take the pending request, its engine is run dry twice: once as it is,
once with the request added; see `policy.dry_run`. The planner looks at the engines themselves, so
it is not held back by stale metrics as other policies are.
"""

from __future__ import annotations

import numpy as np

from servegym.cluster.jit import kernel
from servegym.cluster.simulator import Simulator
from servegym.cluster.state import OBSERVED_WHAT_IF_ADDED, OBSERVED_WHAT_IF_E2E, Params, State
from servegym.policy.counterfactual import SECONDS, Teacher
from servegym.policy.drawn_lengths import lengths_of
from servegym.policy.dry_run import Copied, Scratch, list_requests, run_dry, step_left_s


@kernel
def _fill(p: Params, quiet: Params, s: State, e: int, c: Copied, scratch: State) -> None:
    i = s.env[e].deciding
    rows = s.observation[e]
    for r in range(s.env[e].num_replicas):
        rows[OBSERVED_WHAT_IF_E2E, r] = 0.0
        rows[OBSERVED_WHAT_IF_ADDED, r] = 0.0
        if not s.allowed[e, r]:
            continue
        delay_s = step_left_s(p, s, e, r)
        speed = s.replica[e, r].base_speed
        count = list_requests(p, s, e, r, i, c)
        for slot in range(count):
            c.output[slot] = int(np.round(s.request[e, c.source[slot]].predicted))
        before_s = run_dry(p, quiet, s, e, r, speed, c, count - 1, scratch)
        after_s = run_dry(p, quiet, s, e, r, speed, c, count, scratch)
        rows[OBSERVED_WHAT_IF_E2E, r] = delay_s + scratch.request[0, count - 1].finish_s
        rows[OBSERVED_WHAT_IF_ADDED, r] = delay_s + after_s - before_s


def fill_what_if(simulator: Simulator, env: int) -> None:
    """Fill the planner's rows of one environment's observation for the decision that is due."""
    scratch = simulator.scratch
    if not isinstance(scratch, Scratch) or not scratch.covers(simulator):
        scratch = simulator.scratch = Scratch(simulator)
    _fill(simulator.params, scratch.quiet, simulator.state, env, scratch.copied, scratch.state)


#: Over so many futures, and without knowing that a replica became slow.
_SAMPLED = SECONDS._replace(num_samples=8, sees_speed=False)


def fill_sampled(simulator: Simulator, env: int) -> None:
    """Fill the row of added time for the decision that is due, over drawn lengths.

    What a prediction leaves open is known from all requests of the episodes that the simulator
    plays: how wrong predictions are, not which.
    """
    teacher = simulator.scratch
    if not isinstance(teacher, Teacher):
        tables = [episode.table for episode in simulator.episodes]
        predicted = np.concatenate([table.predicted_output_tokens for table in tables])
        output = np.concatenate([table.output_tokens for table in tables]).astype(np.float64)
        teacher = simulator.scratch = Teacher(lengths_of(predicted, output), _SAMPLED)
    # the futures of a request are the same whenever it is decided about
    key = int(simulator.state.env[env]["deciding"])
    values = teacher.values(simulator, np.array([env]), key)[0]
    simulator.state.observation[env, OBSERVED_WHAT_IF_ADDED] = -values[: simulator.max_replicas]
