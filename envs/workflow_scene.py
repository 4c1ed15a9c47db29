"""What is to be seen of environments that play jobs."""

from __future__ import annotations

import numpy as np

from servegym.envs.scene import Row, Scene, progress, share_ended
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.state import ENDED, READY, STARTED
from servegym.workflow_scenario import WorkflowScenario

#: Rows for jobs in the picture.
_MOST_JOBS = 10


def workflow_scene(scenario: WorkflowScenario, simulator: Simulator, env: int) -> Scene:
    """Show each device with the stages it runs, then the jobs in the system; a colour is a job."""
    s = simulator.state
    e, now_s = s.env[env], float(s.env[env]["now_s"])
    stage = s.stage[env][: int(e["num_stages"])]
    rows = []
    for d in range(int(e["num_devices"])):
        v = s.device[env, d]
        mine = (stage["status"] == STARTED) & (stage["device"] == d)
        rows.append(
            Row(
                f"{d}  {scenario.spec.types[v['type_idx']].name}",
                float(v["num_running"]) / max(1, int(v["slots"])),
                tuple(stage["job"][mine].tolist()),
                note=f"{v['num_running']} of {v['slots']} slots, speed {v['speed']:.2f}",
                lit=bool(v["up"] and v["num_running"] < v["slots"]),
                down=not v["up"],
            )
        )
    job = s.job[env][: int(e["next_job"])]
    for j in np.flatnonzero(np.isnan(job["finish_s"])).tolist():
        first, count = int(job[j]["first_stage"]), int(job[j]["num_stages"])
        own = stage[first : first + count]
        status = own["status"]
        rows.append(
            Row(
                f"job {j}",
                float((status == ENDED).mean()),
                (j,) * int((status == STARTED).sum()),
                (j,) * int((status == READY).sum()),
                f"{int((status == ENDED).sum())} of {count} stages, for"
                f" {now_s - job[j]['arrival_s']:.1f} s",
            )
        )
    return Scene(
        progress(scenario.name, e, "jobs"),
        f"what starts where: {e['num_ready']} stages are ready"
        if e["num_ended"] < e["num_jobs"]
        else "the episode is over",
        "slots; stages ended",
        "stages on devices (full), ready stages",
        tuple(rows),
        s.device.shape[1] + _MOST_JOBS,
        share_ended(e, "jobs"),
    )
