"""HEFT as it was published: planned once, and the plan is kept whatever happens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from servegym.baselines.workflow.online.heft_replan import HeftReplan, next_planned
from servegym.typing import IntArray
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.state import NOWHERE


@dataclass
class HeftStatic(HeftReplan):
    """HEFT with insertion over all unfinished stages, planned when a job arrives, and only then.

    What takes longer than planned delays all that was planned behind it, and a device that fails
    is waited for. There to show what replanning is worth.
    """

    name: str = "heft-static"
    reference: str = "HEFT (Topcuoglu, Hariri, Wu 2002), a plan for each arrival"
    _planned: IntArray = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)

    def reset(self, simulator: Simulator, seed: int) -> None:
        """Drop all plans; nothing is random."""
        super().reset(simulator, seed)
        self._planned = np.zeros(simulator.num_envs, np.int64)

    def act(self, simulator: Simulator, envs: IntArray) -> IntArray:
        """Follow the plans; make one for jobs that have just arrived."""
        actions = np.empty(len(envs), np.int64)
        for row, env in enumerate(envs.tolist()):
            plan, w = self._plans[env], simulator.view(env)
            ready = w.ready[: int(w.env[0]["num_ready"])]
            # nothing could run a stage when its job was planned: all its devices were down
            if self._planned[env] != w.env[0]["next_job"] or (plan.lane[ready] == NOWHERE).any():
                plan.make(w)
                self._planned[env] = w.env[0]["next_job"]
            actions[row] = next_planned(w, plan.lane_device, plan.lane, plan.start_s, plan.first)
        return actions
