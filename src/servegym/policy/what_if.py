"""Forward simulation of each choice, with predicted lengths: the planner's features.

For every replica that may take the pending request, its engine is run dry twice: once as it is,
once with the request added; see `policy.dry_run`. The planner looks at the engines themselves, so
it is not held back by stale metrics as other policies are.
"""

from __future__ import annotations

import numpy as np

from servegym.cluster.jit import kernel
from servegym.cluster.simulator import Simulator
from servegym.cluster.state import VIEW_WHAT_IF_ADDED, VIEW_WHAT_IF_E2E, Params, State
from servegym.policy.dry_run import Copied, Scratch, list_requests, run_dry, step_left_s


@kernel
def _fill(p: Params, quiet: Params, s: State, e: int, c: Copied, scratch: State) -> None:
    i = s.env[e].deciding
    view = s.shown[e]
    for r in range(s.env[e].num_replicas):
        view[VIEW_WHAT_IF_E2E, r] = 0.0
        view[VIEW_WHAT_IF_ADDED, r] = 0.0
        if not s.allowed[e, r]:
            continue
        delay_s = step_left_s(p, s, e, r)
        speed = s.replica[e, r].base_speed
        count = list_requests(p, s, e, r, i, c)
        for slot in range(count):
            c.output[slot] = int(np.round(s.request[e, c.source[slot]].predicted))
        before_s = run_dry(p, quiet, s, e, r, speed, c, count - 1, scratch)
        after_s = run_dry(p, quiet, s, e, r, speed, c, count, scratch)
        view[VIEW_WHAT_IF_E2E, r] = delay_s + scratch.request[0, count - 1].finish_s
        view[VIEW_WHAT_IF_ADDED, r] = delay_s + after_s - before_s


def fill_what_if(simulator: Simulator, env: int) -> None:
    """Fill the planner's rows of one environment's view for the decision that is due."""
    scratch = simulator.scratch
    if not isinstance(scratch, Scratch) or not scratch.covers(simulator):
        scratch = simulator.scratch = Scratch(simulator)
    _fill(simulator.params, scratch.quiet, simulator.state, env, scratch.copied, scratch.state)
