"""How agents see a dispatch: replicas by row, in float32, and only the actions they have.

The simulator, the live state, rules and `Observations` have features by row (`[F, R]`), in float64,
and every action of `State.allowed`: replicas 0 to R - 1, hold (R), reject (R + 1). Environments,
networks and exported graphs have replicas by row (`[R, F]`), as many of the features as are
observed, and the actions that their scenario has. Which of all actions an agent's are is said here;
`envs.dispatch_kernels` follows it in compiled form.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from servegym.policy.contract import observed
from servegym.policy.policy import Observations
from servegym.typing import BoolArray, Float32Array, IntArray

#: Names of `agent_arrays` where a graph takes them.
GRAPH_INPUTS = ("replicas", "request", "mask")


@cache
def scenario_actions(width: int, *, hold: bool, reject: bool) -> IntArray:
    """Return the actions of a scenario's environment, read-only: its n-th is the n-th of these.

    Args:
        width: Replica columns, R.
        hold: Whether the scenario allows a hold.
        reject: Whether it allows a rejection.

    Returns:
        Indices into `R + 2` actions, ascending, `int64[R + hold + reject]`.
    """
    actions = np.flatnonzero(np.array([True] * width + [hold, reject]))
    actions.flags.writeable = False
    return actions


def agent_actions(mask: BoolArray, num_extra: int, *, holds: bool = False) -> IntArray:
    """Return the actions of an agent that has `num_extra` besides replicas, read-only.

    With one such action it is hold where a hold is possible, else reject.

    Args:
        mask: Of the decisions it is to take, `bool[batch, R + 2]`.
        num_extra: 0, 1 or 2.
        holds: Whether the first of them is known to be hold, possible or not.

    Returns:
        Indices into the mask's columns, ascending, `int64[R + num_extra]`.
    """
    width = mask.shape[1] - 2
    holds = holds or num_extra == 2 or (num_extra == 1 and bool(mask[:, width].any()))
    return scenario_actions(width, hold=holds, reject=num_extra > holds)


def agent_arrays(
    observations: Observations, actions: IntArray, *, extended: bool = False
) -> tuple[Float32Array, Float32Array, Float32Array]:
    """Bring observations into the layout of environments and exported graphs.

    Args:
        observations: Of a batch of decisions.
        actions: Of the agent; see `agent_actions`.
        extended: Whether it sees what is inferred, too.

    Returns:
        `replicas float32[batch, R, F]`, `request float32[batch, G]` with F and G of
        `contract.observed`, and `mask float32[batch, len(actions)]`, 1 where allowed.
    """
    shape = observed(extended=extended)
    replicas = observations.replicas[:, : shape.replicas].transpose(0, 2, 1)
    return (
        np.ascontiguousarray(replicas, np.float32),
        observations.request[:, : shape.request].astype(np.float32),
        observations.mask[:, actions].astype(np.float32),
    )
